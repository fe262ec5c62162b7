"""Operations that a sample needs, computed for all five models at base size, and how many samples a second a device
would train at a given rate. Nothing is timed.

    python benchmarks/needed.py --out benchmarks/results
    python benchmarks/needed.py --out benchmarks/results --tflops 400 --pairs 20

The operations are those of the matrix products that real positions which are read need, forward and twice as many
backward (`visling/runs/needed_products.py`), of random batches with the lengths of the recipe. The rate that the
products of a whole step reach, in TFLOP/s, is an assumption: by default 40 % of the 989 that the maker states for bf16
products of an H100 or H200.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gpu import MODELS, make_answering, make_pretraining
from measuring import add_options, begin, circumstances, finish, load_averages, stem_of, write_result
from sides import share_images
from vqa_inference import draw_by_image

RATE = 0.4 * 989
LXMERT_PAIRS, LXMERT_EPOCHS = 9_180_000, 20
"""Sentences with their image in LXMERT's pre-training, and how often its release goes through them."""
QUESTIONS = 35
"""Of a batch of answering: five about each of seven images."""


def compute(model: str, options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """GFLOP of a sample, by kind of work."""
    ours, found = make_pretraining(model, options, device), {}
    drawn = ours.draw(options.batch_size, options.pairs, device)
    steps = [ours.needed(*pair).step.total for pair in drawn]
    found["pre-training step"] = sum(steps) / len(steps) / options.batch_size / 1e9
    answering = make_answering(model, options, device)
    drawn = answering.draw(options.batch_size, options.pairs, device)
    steps = [answering.needed(*pair).step.total for pair in drawn]
    found["VQA fine-tuning step"] = sum(steps) / len(steps) / options.batch_size / 1e9
    shared = [
        (share_images(batch), targets) for batch, targets in draw_by_image(answering, QUESTIONS, options.pairs, device)
    ]
    passes = [answering.needed(*pair).forward.total for pair in shared]
    found["VQA answer"] = sum(passes) / len(passes) / QUESTIONS / 1e9
    print(f"{model}: { ({name: round(value, 1) for name, value in found.items()}) } GFLOP a sample", flush=True)
    return {
        work: {"gflop": value, "samples_per_second": options.tflops * 1000 / value} for work, value in found.items()
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    rate, works = result["settings"]["tflops"], list(next(iter(result["models"].values())))
    lines = [
        f"# Operations that a sample needs, {result['date']}",
        "",
        f"Computed, not measured: GFLOP of a sample, and samples a second if a step reaches {rate:.0f} TFLOP/s.",
        "",
        "| | " + " | ".join(works) + " |",
        "|---|" + "---|" * len(works),
    ]
    for model, found in result["models"].items():
        cells = [f"{each['gflop']:.1f} ({each['samples_per_second']:,.0f}/s)" for each in found.values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    if hours := result["lxmert_hours"]:
        lines += [
            "",
            f"LXMERT's whole pre-training, {LXMERT_EPOCHS} passes over {LXMERT_PAIRS:,} sentences with their image, "
            f"would take {hours:.1f} hours.",
        ]
    return "\n".join([*lines, "", *circumstances(result)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compute the operations that a sample of each model needs.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="families")
    parser.add_argument("--tflops", type=float, default=RATE, help="rate that a whole step is assumed to reach")
    add_options(parser, pairs=8)
    options = parser.parse_args(arguments)
    device, load_before = begin(options), load_averages()
    found = {model: compute(model, options, device) for model in options.models}
    lxmert = found.get("lxmert", {}).get("pre-training step")
    hours = None if lxmert is None else LXMERT_PAIRS * LXMERT_EPOCHS / lxmert["samples_per_second"] / 3600
    result = finish("needed", options, device, load_before, models=found, lxmert_hours=hours)
    stem = stem_of("needed", options, device, "+".join(options.models))
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
