"""Pre-training steps at base size: LXMERT and VisualBERT against transformers, ViLBERT and VL-BERT against the dense
padded way.

    python benchmarks/pretraining.py --out benchmarks/results
    python benchmarks/pretraining.py --out benchmarks/results --models lxmert --precision bf16

A step is forward, loss, backward and AdamW update, with dropout. All sides have the same weights, batches, labels,
optimiser settings, precision and threads, and run in turn (A B B A ...), each round on a batch of its own. Before
anything is timed, loss, gradient norms and the loss after one update agree.

LXMERT      As its recipe has it: masked words, matching, classes, attributes and features of regions, answers; caption
            lengths as COCO, 36 regions of 2048. Peer: `LxmertForPreTraining` with all four tasks, whose losses are
            equal; its users pad texts to 20 word pieces, and another column pads to the longest of the batch.
VisualBERT  COCO phase: two captions, masked words and matching, 10 to 100 regions. Peer: `VisualBertForPreTraining`,
            padded to the longest of the batch, and to 128 word pieces and 100 regions, as its release does.
ViLBERT     First release: a caption, 10 to 36 regions. Peer: the same layers at every position of the padded batch,
            written with plain functions of torch over visling's weights (`dense_sides.py`).
VL-BERT     A caption, at most 64 word pieces and regions together. Peer: as ViLBERT's.

transformers' classes predict the vocabulary, and LXMERT's also all of regions, at every position, as their releases do;
visling does where something is to be predicted, with the same loss. The dense peers read the same positions as visling.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from dense_sides import DensePretraining
from measuring import Trained
from sides import RECIPES, Pretraining, pretraining_config
from steps import EFFICIENCY, Peer, compare_steps, run_families
from transformers_sides import LxmertPretraining, Padded, VisualBertPretraining

from visling import runtime

WORK = {
    "lxmert": "LXMERT pre-training, caption lengths as COCO",
    "visualbert": "VisualBERT COCO phase, two captions, 10 to 100 regions",
    "vilbert": "ViLBERT pre-training, 10 to 36 regions",
    "vlbert": "VL-BERT pre-training, at most 64 positions",
}


def make_peers(model: str, ours: Pretraining, device: torch.device, precision: runtime.Precision) -> list[Peer]:
    """What a family is compared with."""
    bf16, encoder = runtime.resolve(precision, device) == "bf16", ours.config.encoder
    if model == "lxmert":
        lxmert = LxmertPretraining(ours, device)
        trained = Trained(lxmert, device, precision)
        padded = partial(lxmert.feed, padded=Padded(tokens=encoder.max_tokens))
        return [
            Peer(
                name=f"transformers padded to {encoder.max_tokens}",
                trained=trained,
                feed=padded,
                target=2.0 if bf16 else 1.25,
            ),
            Peer(name="transformers padded to the longest", trained=trained, feed=lxmert.feed),
        ]
    if model == "visualbert":
        visualbert = VisualBertPretraining(ours, device)
        trained = Trained(visualbert, device, precision)
        released = Padded(tokens=encoder.max_tokens, regions=encoder.max_regions)
        return [
            Peer(
                name="transformers padded to the longest",
                trained=trained,
                feed=visualbert.feed,
                target=None if bf16 else 2.0,
            ),
            Peer(
                name=f"transformers padded to {released.tokens} + {released.regions}",
                trained=trained,
                feed=partial(visualbert.feed, padded=released),
                target=3.0,
            ),
        ]
    dense = DensePretraining(ours)
    return [Peer(name="dense padded to the longest", trained=Trained(dense, device, precision), feed=dense.feed)]


def measure(model: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One family."""
    ours = Pretraining(pretraining_config(model, options), device)
    peers = make_peers(model, ours, device, options.precision)
    precision = runtime.resolve(options.precision, device)
    return compare_steps(WORK[model], ours, peers, options, device, efficiency=EFFICIENCY[precision])


def main(arguments: Sequence[str] | None = None) -> None:
    run_families(
        "pretraining",
        "Pre-training steps",
        "A step: forward, loss, backward and AdamW update, in turn, same weights, batches and labels.",
        [*RECIPES],
        measure,
        arguments,
        pairs=3,
    )


if __name__ == "__main__":
    main()
