"""VQA fine-tuning steps at base size: LXMERT and VisualBERT against transformers, ViLBERT and VL-BERT against the dense
padded way.

    python benchmarks/vqa_training.py --out benchmarks/results
    python benchmarks/vqa_training.py --out benchmarks/results --models visualbert --precision bf16

A step is forward, loss over 3,129 answers, backward and AdamW update, with dropout, as in `pretraining.py`: same
weights, batches, labels, optimiser settings, precision and threads, in turn, and nothing is timed before loss, gradient
norms and the loss after one update agree. A batch holds random questions, each with an image of its own: lengths about
those of VQA, 36 regions (LXMERT) or 10 to 100.

Peers       `LxmertForQuestionAnswering` with the loss of LXMERT's release on its scores (its own loss takes one answer
            a question), its texts padded to 20 word pieces, as its documentation and its release do, and in another
            column to the longest of the batch; `VisualBertForQuestionAnswering` with its own loss, padded to the
            longest. ViLBERT and VL-BERT: every layer at every position of the padded batch (`dense_sides.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from dense_sides import DenseAnswering
from measuring import Trained
from sides import VQA_PRESETS, Answering, vqa_config
from steps import EFFICIENCY, Peer, compare_steps, run_families
from transformers_sides import LxmertAnswering, Padded, VisualBertAnswering

from visling import runtime

WORK = {
    "lxmert": "LXMERT VQA fine-tuning",
    "visualbert": "VisualBERT VQA fine-tuning, 10 to 100 regions",
    "vilbert": "ViLBERT VQA fine-tuning, 10 to 99 regions",
    "vlbert": "VL-BERT VQA fine-tuning, 10 to 100 regions",
}
TARGETS = {"lxmert": 1.35, "visualbert": 1.8}


def make_peers(model: str, ours: Answering, device: torch.device, precision: runtime.Precision) -> list[Peer]:
    """What a family is compared with."""
    longest, target = "transformers padded to the longest", TARGETS.get(model)
    if model == "lxmert":
        lxmert, tokens = LxmertAnswering(ours, device), ours.config.max_tokens
        trained = Trained(lxmert, device, precision)
        padded = partial(lxmert.feed, padded=Padded(tokens=tokens))
        return [
            Peer(name=f"transformers padded to {tokens}", trained=trained, feed=padded, target=target),
            Peer(name=longest, trained=trained, feed=lxmert.feed),
        ]
    if model == "visualbert":
        side = VisualBertAnswering(ours, device)
        return [Peer(name=longest, trained=Trained(side, device, precision), feed=side.feed, target=target)]
    dense = DenseAnswering(ours)
    return [Peer(name="dense padded to the longest", trained=Trained(dense, device, precision), feed=dense.feed)]


def measure(model: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One family."""
    ours = Answering(model, vqa_config(model, options), device)
    peers = make_peers(model, ours, device, options.precision)
    precision = runtime.resolve(options.precision, device)
    return compare_steps(WORK[model], ours, peers, options, device, efficiency=EFFICIENCY[precision])


def main(arguments: Sequence[str] | None = None) -> None:
    run_families(
        "vqa_training",
        "VQA fine-tuning steps",
        "A step: forward, loss over 3,129 answers, backward and AdamW update; a question has its own image.",
        [*VQA_PRESETS],
        measure,
        arguments,
        pairs=3,
    )


if __name__ == "__main__":
    main()
