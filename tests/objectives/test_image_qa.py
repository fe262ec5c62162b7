"""Questions as pre-training: the recorded loss, what must not count, empty batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling.errors import ConfigError
from visling.objectives.base import PretrainStep
from visling.objectives.image_qa import ImageQA, image_qa_loss
from visling.types import IGNORE, Batch, Dims, Encoded, Targets, Text

WIDTH, ANSWERS = 6, 9
DIMS = Dims(text=WIDTH, regions=WIDTH, pooled=WIDTH)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def step(answer: Tensor | None) -> PretrainStep:
    ids = torch.ones(3, 2, dtype=torch.int64)
    states = torch.randn(3, 2, WIDTH)
    encoded = Encoded(text=states, regions=states[:, :0], pooled=torch.randn(3, WIDTH, requires_grad=True))
    return PretrainStep(
        nn.Identity(),
        Batch(text=Text(ids=ids, mask=ids > 0, segments=ids * 0), regions=None),
        encoded,
        Targets(answer=answer),
    )


def test_lxmert_loss(golden: Path) -> None:
    inputs, outputs = load_file(golden / "lxmert/inputs.safetensors"), load_file(golden / "lxmert/outputs.safetensors")
    answers = inputs["ans"].masked_fill(inputs["ans"] == -1, IGNORE)
    assert_close(
        image_qa_loss(outputs["logits.answer"], answers).value, outputs["loss.answer"][0], rtol=1e-5, atol=1e-5
    )


def test_examples_without_a_label_do_not_count() -> None:
    logits = torch.randn(4, ANSWERS, requires_grad=True)
    answers = torch.tensor([3, IGNORE, 8, IGNORE])
    loss = image_qa_loss(logits, answers)
    expected = [-logits[row].log_softmax(-1)[answers[row]] for row in (0, 2)]
    assert_close(loss.value, torch.stack(expected).mean())
    assert loss.parts["image_qa"][1].item() == loss.parts["image_qa_accuracy"][1].item() == 2
    torch.autograd.backward(loss.value)
    assert logits.grad is not None
    assert logits.grad.any(1).tolist() == [True, False, True, False]


def test_no_label_at_all_gives_zero_and_zero_gradient() -> None:
    objective = ImageQA(DIMS, "gelu_norm", nn.Embedding(5, WIDTH), num_answers=ANSWERS)
    now = step(torch.full((3,), IGNORE))
    loss = objective(now)
    torch.autograd.backward(loss.value)
    assert loss.value.item() == 0
    assert now.encoded.pooled.grad is not None
    assert not now.encoded.pooled.grad.any()


def test_the_head_reads_the_pooled_state() -> None:
    objective = ImageQA(DIMS, "gelu_norm", nn.Embedding(5, WIDTH), num_answers=ANSWERS).eval()
    now = step(torch.tensor([1, 2, 3]))
    logits = objective.head(now.encoded.pooled)
    assert logits.shape == (3, ANSWERS)
    assert_close(objective(now).value, nn.functional.cross_entropy(logits, torch.tensor([1, 2, 3])))


def test_loss_is_float32_in_half_precision() -> None:
    logits, answers = torch.randn(4, ANSWERS, dtype=torch.bfloat16), torch.tensor([0, 1, IGNORE, 3])
    loss = image_qa_loss(logits, answers)
    assert loss.value.dtype == torch.float32
    assert_close(loss.value, image_qa_loss(logits.float(), answers).value, rtol=0, atol=0)


def test_missing_answers_are_named() -> None:
    with pytest.raises(ConfigError, match="ImageQA needs the targets answer"):
        ImageQA(DIMS, "gelu_norm", nn.Embedding(5, WIDTH), num_answers=ANSWERS)(step(None))
