"""Image-text matching: does the text belong to the image? Class 1 = it does.

Shapes   B rows, Dp pooled width.
Source   VisualBERT section 3.2 (sentence-image prediction): the second of two captions fits the image or comes from
         another one. The release names its label `is_random_next` but uses 1 for a match, the opposite of BERT's
         next-sentence head from which it starts; its checkpoints follow the code, and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from visling.nn.heads import build
from visling.objectives.base import Objective, PretrainStep
from visling.types import IGNORE, POOLED, Batch, Dims, Head, Loss, Reads, Targets


class Matching(Objective):
    """Cross-entropy of a two-way classification of the pooled state; rows labelled IGNORE do not count."""

    needs: ClassVar[frozenset[str]] = frozenset({"matched"})

    def __init__(self, dims: Dims, style: str, words: nn.Embedding) -> None:
        super().__init__(dims, style, words)
        self.head = build(Head(kind="classify", outputs=2), dims, style=style)

    def reads_of_encoded(self, batch: Batch, targets: Targets) -> Reads:
        return POOLED

    def forward(self, step: PretrainStep) -> Loss:
        self.check(step.targets)
        return matching_loss(self.head(step.encoded.pooled), cast(Tensor, step.targets.matched))

    def count(self, batch: Batch, targets: Targets) -> Mapping[str, Tensor]:
        self.check(targets)
        return {"matching": (cast(Tensor, targets.matched) != IGNORE).sum()}


def matching_loss(logits: Tensor, matched: Tensor) -> Loss:
    """Mean cross-entropy over the labelled rows, and the share of them that is classified correctly.

    Args:
        logits: (B, 2), any floating type; the loss is computed in float32.
        matched: (B,) int64: 1 = the text fits, 0 = it does not, IGNORE = no label.
    """
    labelled = matched != IGNORE
    values = F.cross_entropy(logits.float(), matched, ignore_index=IGNORE, reduction="none")
    loss = Loss.mean("matching", values, labelled)
    hits = ((logits.detach().argmax(-1) == matched) & labelled).sum()
    return loss.reporting({"matching_accuracy": (hits, labelled.sum())})
