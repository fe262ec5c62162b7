"""Masked language modelling and image-text matching: values against plain arithmetic, labels that must not count, empty
batches."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from visling.errors import ConfigError
from visling.objectives.base import Objective, PretrainStep
from visling.objectives.masked_lm import MaskedLM, masked_lm_loss
from visling.objectives.matching import Matching, matching_loss
from visling.types import IGNORE, Batch, Dims, Encoded, Loss, Slots, Targets, Text

WORDS, WIDTH = 11, 6
DIMS = Dims(text=WIDTH, regions=WIDTH, pooled=WIDTH)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def step(text: Tensor, **targets: Any) -> PretrainStep:
    rows, tokens = text.shape[:2]
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    batch = Batch(text=Text(ids=ids, mask=ids == 0, segments=ids), regions=None)
    encoded = Encoded(text=text, regions=text[:, :0], pooled=text[:, 0])
    return PretrainStep(nn.Identity(), batch, encoded, Targets(**targets))


def part(loss: Loss, name: str) -> tuple[Any, int]:
    total, count = loss.parts[name]
    assert not total.requires_grad
    return total.item(), int(count)


def plain_cross_entropy(logits: Tensor, label: int) -> float:
    row = logits.double()
    return math.log(row.exp().sum().item()) - row[label].item()


def test_masked_lm_is_the_mean_over_chosen_slots() -> None:
    logits = torch.randn(2, 3, WORDS)
    ids = torch.tensor([[4, 1, 0], [7, 0, 0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logits[0, 1, 1] = 20.0  # the only exact prediction
    logits[0, 0, 5] = logits[1, 0, 5] = 20.0
    expected = [
        plain_cross_entropy(logits[0, 0], 4),
        plain_cross_entropy(logits[0, 1], 1),
        plain_cross_entropy(logits[1, 0], 7),
    ]
    loss = masked_lm_loss(logits, ids, mask)
    assert loss.value.item() == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert part(loss, "masked_lm") == (pytest.approx(sum(expected), rel=1e-6), 3)
    assert part(loss, "masked_lm_accuracy") == (1, 3)


def test_masked_lm_reads_the_hidden_positions_of_the_batch_and_no_others() -> None:
    objective = MaskedLM(DIMS, "bert", nn.Embedding(WORDS, WIDTH))
    text = torch.randn(3, 7, WIDTH)
    at = torch.tensor([[2, 5, 6, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    ids = torch.tensor([[3, 1, 9, 0], [0, 0, 0, 0], [7, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, False], [False] * 4, [True, False, False, False]])
    read: list[int] = []
    objective.head.register_forward_hook(lambda module, given, logits: read.append(logits[..., 0].numel()))
    padded = objective(step(text, token_slots=Slots(at=at, mask=mask), token_ids=ids))
    taken = objective(
        step(text, token_slots=Slots(at=at, mask=mask, taken=torch.tensor([0, 1, 2, 8, 3])), token_ids=ids)
    )
    assert read == [12, 5]
    assert_close(taken.value, padded.value)
    assert part(taken, "masked_lm") == (pytest.approx(part(padded, "masked_lm")[0]), 4)
    assert part(taken, "masked_lm_accuracy") == part(padded, "masked_lm_accuracy")


@pytest.mark.parametrize("filler", [0, -1, IGNORE, 99])
def test_masked_lm_does_not_read_labels_of_free_slots(filler: int) -> None:
    logits = torch.randn(1, 3, WORDS)
    mask = torch.tensor([[True, False, False]])
    assert_close(
        masked_lm_loss(logits, torch.tensor([[4, filler, filler]]), mask).value,
        masked_lm_loss(logits[:, :1], torch.tensor([[4]]), mask[:, :1]).value,
    )


@pytest.mark.parametrize("slots", [0, 3])
def test_nothing_masked_gives_zero_and_zero_gradient(slots: int) -> None:
    words = nn.Embedding(WORDS, WIDTH)
    objective = MaskedLM(DIMS, "bert", words)
    text = torch.randn(2, 5, WIDTH, requires_grad=True)
    at = torch.zeros(2, slots, dtype=torch.int64)
    loss = objective(step(text, token_slots=Slots(at=at, mask=at > 0), token_ids=at))
    torch.autograd.backward(loss.value)
    assert loss.value.item() == 0
    assert part(loss, "masked_lm") == (0, 0)
    assert part(loss, "masked_lm_accuracy") == (0, 0)
    assert text.grad is not None
    assert not text.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


def test_masked_lm_reads_the_states_at_its_slots() -> None:
    words = nn.Embedding(WORDS, WIDTH)
    objective = MaskedLM(DIMS, "bert", words).eval()
    text = torch.randn(2, 5, WIDTH, requires_grad=True)
    at, mask = torch.tensor([[3, 1], [4, 0]]), torch.tensor([[True, True], [True, False]])
    ids = torch.tensor([[2, 9], [6, 0]])
    loss = objective(step(text, token_slots=Slots(at=at, mask=mask), token_ids=ids))
    dense = objective.head(text)  # (B, T, V): the release runs the head everywhere
    labels = torch.full((2, 5), IGNORE)
    labels[0, 3], labels[0, 1], labels[1, 4] = 2, 9, 6
    assert_close(loss.value, nn.functional.cross_entropy(dense.flatten(0, 1), labels.flatten()))
    torch.autograd.backward(loss.value)
    assert text.grad is not None
    assert text.grad.any(-1).tolist() == [[False, True, False, True, False], [False, False, False, False, True]]


def test_losses_are_float32_in_half_precision() -> None:
    logits = torch.randn(2, 4, WORDS, dtype=torch.bfloat16)
    ids, mask = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
    loss = masked_lm_loss(logits, ids, mask)
    assert loss.value.dtype == torch.float32
    assert_close(loss.value, masked_lm_loss(logits.float(), ids, mask).value, rtol=0, atol=0)
    pair = matching_loss(logits[:, 0, :2], torch.tensor([0, 1]))
    assert pair.value.dtype == torch.float32
    assert_close(pair.value, matching_loss(logits[:, 0, :2].float(), torch.tensor([0, 1])).value, rtol=0, atol=0)


def test_matching_class_one_is_a_match_and_unlabelled_rows_do_not_count() -> None:
    logits = torch.tensor([[0.0, 3.0], [0.0, 3.0], [5.0, -5.0], [0.0, 3.0]], requires_grad=True)
    loss = matching_loss(logits, torch.tensor([1, 0, IGNORE, 1]))
    right, wrong = math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))
    assert loss.value.item() == pytest.approx((2 * right + wrong) / 3, rel=1e-6)
    assert part(loss, "matching") == (pytest.approx(2 * right + wrong, rel=1e-6), 3)
    assert part(loss, "matching_accuracy") == (2, 3)
    torch.autograd.backward(loss.value)
    assert logits.grad is not None
    assert logits.grad.any(1).tolist() == [True, True, False, True]


def test_matching_without_any_label_is_zero() -> None:
    objective = Matching(DIMS, "plain", nn.Embedding(WORDS, WIDTH))
    text = torch.randn(2, 5, WIDTH, requires_grad=True)
    loss = objective(step(text, matched=torch.tensor([IGNORE, IGNORE])))
    torch.autograd.backward(loss.value)
    assert loss.value.item() == 0
    assert text.grad is not None
    assert not text.grad.any()
    assert part(loss, "matching_accuracy") == (0, 0)


def test_matching_has_no_dropout() -> None:
    objective = Matching(DIMS, "plain", nn.Embedding(WORDS, WIDTH)).train()
    now = step(torch.randn(4, 5, WIDTH), matched=torch.tensor([0, 1, 1, 0]))
    assert_close(objective(now).value, objective(now).value, rtol=0, atol=0)
    assert_close(
        objective(now).value, matching_loss(objective.head(now.encoded.pooled), cast(Tensor, now.targets.matched)).value
    )


@pytest.mark.parametrize(
    ("kind", "style", "missing"), [(MaskedLM, "bert", "token_ids, token_slots"), (Matching, "plain", "matched")]
)
def test_missing_targets_are_named(kind: type[Objective], style: str, missing: str) -> None:
    objective = kind(DIMS, style, nn.Embedding(WORDS, WIDTH))
    with pytest.raises(ConfigError, match=f"needs the targets {missing}"):
        objective(step(torch.randn(2, 5, WIDTH)))


def test_after_update_does_nothing() -> None:
    objective = Matching(DIMS, "plain", nn.Embedding(WORDS, WIDTH))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.after_update()
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())
