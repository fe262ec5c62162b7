"""Memory that a pre-training step takes beyond weights, gradients and moments: LXMERT and VisualBERT, here and in
transformers.

    python benchmarks/step_memory.py --out benchmarks/results

Each side runs alone in a new process: it builds the model, then makes two whole updates with dropout on random batches
as in `pretraining.py`, gradients and moments in place during the second. What is reported is the peak of the resident
memory (on CUDA: of what PyTorch allocated) beyond libraries and batches, less 16 bytes for each parameter: its weight,
its gradient and its two moments. The rest is what the forward pass keeps for the backward pass, and working memory.

Peers       `LxmertForPreTraining`, texts padded to 20; `VisualBertForPreTraining`, padded to the longest of the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from measuring import (
    Trained,
    add_options,
    begin,
    circumstances,
    claim,
    finish,
    in_new_process,
    load_averages,
    peak_memory,
    stem_of,
    write_result,
)
from sides import Pretraining, pretraining_config
from steps import at_base_size
from transformers_sides import LxmertPretraining, Padded, VisualBertPretraining, warm_import

from visling import runtime

WORK = {"lxmert": "LXMERT pre-training", "visualbert": "VisualBERT COCO phase"}
TARGET = 0.6
BYTES = 16
"""Of a parameter in float32: weight, gradient, two moments."""
SideName = Literal["visling", "transformers"]


def measure_side(name: SideName, model: str, options: argparse.Namespace) -> float | None:
    """Peak of one side in MiB, weights and all."""
    device, config = begin(options), pretraining_config(model, options)
    if name == "transformers":
        warm_import()
    with torch.device("meta"):
        outline = Pretraining(config, torch.device("meta"))
    batches = outline.draw(options.batch_size, 2, device)

    def build() -> Callable[[], object]:
        side: Any
        if name == "visling":
            runtime.keep_freed_memory()  # as `visling pretrain` does
            side = Pretraining(config, device)
            feed = side.feed
        elif model == "lxmert":
            side = LxmertPretraining(outline, device)
            feed = partial(side.feed, padded=Padded(tokens=config.encoder.max_tokens))
        else:
            side = VisualBertPretraining(outline, device)
            feed = side.feed
        trained = Trained(side, device, options.precision)
        side.module.train()

        def run() -> None:
            for batch in batches:
                trained.update(feed(*batch), keep_gradients=True)

        return run

    return peak_memory(build, device)


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one family."""
    with torch.device("meta"):
        outline = Pretraining(pretraining_config(model, options), torch.device("meta"))
    parameters = sum(p.numel() for p in outline.module.parameters())
    names: tuple[SideName, ...] = ("visling", "transformers")
    peaks = {name: in_new_process(measure_side, name, model, options) for name in names}
    beyond = {name: None if peak is None else peak - parameters * BYTES / 2**20 for name, peak in peaks.items()}
    ours, theirs = beyond["visling"], beyond["transformers"]
    share = None if ours is None or theirs is None else ours / theirs
    work = f"{WORK[model]}, memory of a step, batch {options.batch_size}"
    claims = [claim(work, "share of transformers'", share, TARGET, better="lower")] if at_base_size(options) else []
    print(f"{work}: {beyond} MiB", flush=True)
    return {
        "work": work,
        "parameters": parameters,
        "peak_mib": peaks,
        "beyond_mib": beyond,
        "share": share,
        "claims": claims,
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""

    def lines() -> Iterator[str]:
        yield f"# Memory of a pre-training step, {result['date']}"
        yield ""
        yield (
            "Peak of the resident memory of a process that trains one side, beyond libraries and batches; and the same "
            "less 16 bytes for each parameter (weight, gradient, two moments). MiB."
        )
        yield ""
        yield "| | parameters | visling | transformers | visling, beyond | transformers, beyond | share |"
        yield "|---|---|---|---|---|---|---|"
        for one in result["comparisons"]:
            amounts = [*one["peak_mib"].values(), *one["beyond_mib"].values()]
            cells = ["not measured" if amount is None else f"{amount:,.0f}" for amount in amounts]
            share = "" if one["share"] is None else f"{one['share']:.2f}"
            yield "| " + " | ".join([one["work"], f"{one['parameters'] / 1e6:.1f} million", *cells, share]) + " |"
        yield ""
        yield from circumstances(result)

    return "\n".join(lines()) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of pre-training steps here and in transformers.")
    parser.add_argument("--models", nargs="+", choices=sorted(WORK), default=[*WORK], help="families")
    add_options(parser, pairs=1)
    parser.set_defaults(batch_size=16)
    options = parser.parse_args(arguments)
    device, load_before = begin(options), load_averages()
    found = [measure(model, options) for model in options.models]
    claims = [each for one in found for each in one["claims"]]
    result = finish("step_memory", options, device, load_before, comparisons=found, claims=claims)
    stem = stem_of("step_memory", options, device, "+".join(options.models))
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
