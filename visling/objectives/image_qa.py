"""Question answering as pre-training: predict one of many answers from the pooled state.

Shapes   N examples, A answers of the table, Dp pooled width.
Source   LXMERT section 3.1 and release: 9,500 answers of VQA, GQA and Visual7W; one answer is drawn for every visit of
         a question, in proportion to its score. Captions, questions whose answers are not in the table and questions
         shown with another image have no label.
Differs  The paper trains half of the epochs without this loss, then half with it; the release trains all of them with
         weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from visling.nn.heads import build
from visling.objectives.base import Objective, PretrainStep
from visling.types import IGNORE, POOLED, Batch, Dims, Head, Loss, Reads, Targets

NUM_ANSWERS = 9500
"""Entries of LXMERT's answer table."""


class ImageQA(Objective):
    """Cross-entropy of a classification of the pooled state; examples labelled IGNORE do not count.

    Args:
        num_answers: A, entries of the answer table.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"answer"})

    def __init__(self, dims: Dims, style: str, words: nn.Embedding, *, num_answers: int = NUM_ANSWERS) -> None:
        super().__init__(dims, style, words)
        self.head = build(Head(kind="classify", outputs=num_answers), dims, style=style)

    def reads_of_encoded(self, batch: Batch, targets: Targets) -> Reads:
        return POOLED

    def forward(self, step: PretrainStep) -> Loss:
        self.check(step.targets)
        return image_qa_loss(self.head(step.encoded.pooled), cast(Tensor, step.targets.answer))

    def count(self, batch: Batch, targets: Targets) -> Mapping[str, Tensor]:
        self.check(targets)
        return {"image_qa": (cast(Tensor, targets.answer) != IGNORE).sum()}


def image_qa_loss(logits: Tensor, answers: Tensor) -> Loss:
    """Mean cross-entropy over the examples that have an answer, and the share of them that is answered as labelled.

    Args:
        logits: (N, A), any floating type; the loss is computed in float32.
        answers: (N,) int64 entries of the table; IGNORE = no label.
    """
    labelled = answers != IGNORE
    values = F.cross_entropy(logits.float(), answers, ignore_index=IGNORE, reduction="none")
    loss = Loss.mean("image_qa", values, labelled)
    hits = ((logits.detach().argmax(-1) == answers) & labelled).sum()
    return loss.reporting({"image_qa_accuracy": (hits, labelled.sum())})
