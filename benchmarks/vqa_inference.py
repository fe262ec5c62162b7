"""Answering five questions about each image at base size: LXMERT and VisualBERT against transformers, ViLBERT and
VL-BERT against the dense padded way.

    python benchmarks/vqa_inference.py --out benchmarks/results
    python benchmarks/vqa_inference.py --out benchmarks/results --models lxmert --precision bf16

VQA asks about five questions of an image. visling is given each image once (`Regions.row` names it for every question)
and computes what depends on the image alone once; the peers, as their users run them, get every question with the
features of its image. Forward only, without gradients and dropout; the logits of all sides agree before anything is
timed. In turn (A B B A ...), each round on a batch of its own: 35 questions about 7 images, lengths about those of VQA,
36 regions (LXMERT) or 10 to 100.

Peers       `LxmertForQuestionAnswering` with texts padded to 20 word pieces, as its documentation and its release do,
            and in another column to the longest of the batch; `VisualBertForQuestionAnswering`, padded to the longest.
            ViLBERT and VL-BERT: every layer at every position of the padded batch (`dense_sides.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from dense_sides import DenseAnswering
from drawn_data import QUESTIONS_PER_IMAGE, describe_batches
from measuring import (
    Rate,
    claim,
    compare,
    in_turn,
    require_equal_outputs,
)
from sides import VQA_PRESETS, Answering, share_images, vqa_config
from steps import at_base_size, run_families
from torch import Tensor
from transformers_sides import LxmertAnswering, Padded, VisualBertAnswering

from visling import runtime
from visling.types import Batch, Targets

WORK = {
    "lxmert": "LXMERT VQA inference, five questions an image",
    "visualbert": "VisualBERT VQA inference, five questions an image",
    "vilbert": "ViLBERT VQA inference, five questions an image",
    "vlbert": "VL-BERT VQA inference, five questions an image",
}
TARGETS = {"lxmert": 1.9, "visualbert": 1.8}
EFFICIENCY = {"fp32": 0.85, "bf16": 0.45}


def measure(model: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One family."""
    ours = Answering(model, vqa_config(model, options), device)
    theirs: Any
    forms: dict[str, Callable[..., Any]] = {}
    if model == "lxmert":
        theirs, tokens = LxmertAnswering(ours, device), ours.config.max_tokens
        forms[f"transformers padded to {tokens}"] = partial(theirs.feed, padded=Padded(tokens=tokens))
        forms["transformers padded to the longest"] = theirs.feed
    elif model == "visualbert":
        theirs = VisualBertAnswering(ours, device)
        forms["transformers padded to the longest"] = theirs.feed
    else:
        theirs = DenseAnswering(ours)
        forms["dense padded to the longest"] = theirs.feed
    name = next(iter(forms))
    ours.module.eval()
    theirs.module.eval()
    rows = -(-options.batch_size // QUESTIONS_PER_IMAGE) * QUESTIONS_PER_IMAGE
    batches = draw_by_image(ours, rows, options.warmup + options.pairs, device)
    shared = [share_images(batch) for batch, _ in batches]

    def answer(side: Any, inputs: Sequence[Any], number: int) -> Tensor:
        with torch.inference_mode(), runtime.autocast(device, options.precision):
            logits: Tensor = side.logits(inputs[number])
        return logits

    works = {"visling": partial(answer, ours, shared)}
    for form, feed in forms.items():
        fed = [feed(batch, targets) for batch, targets in batches]
        works[form] = partial(answer, theirs, [each[0] if isinstance(each, tuple) else each for each in fed])
    precision = runtime.resolve(options.precision, device)
    difference = require_equal_outputs({side: work(0) for side, work in works.items()}, precision)
    with Rate(device, options.precision, options.product_size) as rate:
        seconds = in_turn(works, pairs=options.pairs, warmup=options.warmup, device=device)
    needed = [
        ours.needed(batch, targets).forward.total
        for batch, (_, targets) in zip(shared[options.warmup :], batches[options.warmup :], strict=True)
    ]
    found, reached = compare(seconds), rate.efficiency(needed, seconds["visling"])
    claims = []
    if at_base_size(options):
        if model in TARGETS:
            claims.append(claim(WORK[model], f"ratio to {name}", found["ratio"][name]["median"], TARGETS[model]))
        claims.append(claim(WORK[model], "efficiency", reached["median"], EFFICIENCY[precision]))
    ratios = {form: round(ratio["median"], 2) for form, ratio in found["ratio"].items()}
    print(f"{WORK[model]}: ratios {ratios}", flush=True)
    return {
        "work": WORK[model],
        "config": dataclasses.asdict(ours.config),
        "parameters": sum(p.numel() for p in ours.module.parameters()),
        "agreement": {"logits": {"largest difference": difference}},
        "batches": describe_batches([batch for batch, _ in batches[options.warmup :]]),
        **found,
        "needed_gflop": [value / 1e9 for value in needed],
        "product_tflops": rate.described(),
        "efficiency": reached,
        "claims": claims,
    }


def draw_by_image(ours: Answering, rows: int, number: int, device: torch.device) -> list[tuple[Batch, Targets]]:
    """Random batches in which the questions of an image follow one another, each with the image's regions."""
    drawn = []
    for batch, targets in ours.draw(rows, number, device):
        assert batch.regions is not None
        image = torch.arange(rows, device=device) // QUESTIONS_PER_IMAGE
        regions = batch.regions.map(lambda tensor, image=image: tensor[image])  # type: ignore[misc]
        drawn.append((dataclasses.replace(batch, regions=regions), targets))
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    run_families(
        "vqa_inference",
        "Answering five questions an image",
        "Logits of questions, five of them about an image, forward only: visling gets each image once, the others with "
        "every question.",
        [*VQA_PRESETS],
        measure,
        arguments,
        pairs=5,
    )


if __name__ == "__main__":
    main()
