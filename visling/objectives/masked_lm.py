"""Masked language modelling: predict the masked tokens from the rest of the text and the image (BERT; all five models
use it).

Shapes   B rows, P token slots, V vocabulary, Dt text width.
Source   VisualBERT section 3.2 and release: cross-entropy, mean over the labelled positions of the whole batch. The
         release runs its head at every position; here it runs at the slots only, with equal results. ViLBERT, LXMERT
         and CVLP take the same mean; so does VL-BERT, whose switch MLM_LOSS_NORM_IN_BATCH_FIRST (off in all its
         configs) averages each row first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from visling.nn.heads import build
from visling.nn.pooling import gather, take
from visling.objectives.base import Objective, Over, PretrainStep, average, count_chosen
from visling.types import IGNORE, NOTHING, Batch, Dims, Head, Loss, Reads, Slots, Targets


class MaskedLM(Objective):
    """Cross-entropy of the original word pieces at the token slots."""

    needs: ClassVar[frozenset[str]] = frozenset({"token_slots", "token_ids"})

    def __init__(self, dims: Dims, style: str, words: nn.Embedding, *, over: Over = "chosen") -> None:
        super().__init__(dims, style, words)
        self.over: Over = over
        self.head = build(Head(kind="vocabulary", outputs=words.num_embeddings), dims, style=style, words=words)

    def reads_of_encoded(self, batch: Batch, targets: Targets) -> Reads:
        return replace(NOTHING, text=() if targets.token_slots is None else (targets.token_slots,))

    def forward(self, step: PretrainStep) -> Loss:
        self.check(step.targets)
        slots, ids = cast(Slots, step.targets.token_slots), cast(Tensor, step.targets.token_ids)
        if self.over == "rows" or slots.taken is None:
            return masked_lm_loss(self.head(gather(step.encoded.text, slots.at)), ids, slots.mask, over=self.over)
        # (K, Dt), (K,): rows have few hidden pieces, and not the same number of them
        states, mask = take(step.encoded.text, slots)
        return masked_lm_loss(self.head(states), ids.flatten()[slots.taken], mask)

    def count(self, batch: Batch, targets: Targets) -> Mapping[str, Tensor]:
        self.check(targets)
        return {"masked_lm": count_chosen(cast(Slots, targets.token_slots).mask, self.over)}


def masked_lm_loss(logits: Tensor, ids: Tensor, mask: Tensor, *, over: Over = "chosen") -> Loss:
    """Mean cross-entropy over the positions where `mask` holds, and the share of them that is predicted exactly.

    Args:
        logits: (..., V), any floating type; the loss is computed in float32.
        ids: (...) int64 original word pieces; not read where the mask is False.
        mask: (...) bool.
        over: "rows" averages each row first and needs (B, P, V) logits.
    """
    labels = ids.masked_fill(~mask, IGNORE)
    values = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(labels)
    loss = average("masked_lm", values, mask, over=over)
    hits = ((logits.detach().argmax(-1) == labels) & mask).sum()
    return loss.reporting({"masked_lm_accuracy": (hits, mask.sum())})
