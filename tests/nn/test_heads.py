"""Every kind in every style: shapes, values, grouping, tying, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling.errors import ConfigError
from visling.nn import heads
from visling.types import Dims, Head

DIMS = Dims(text=6, regions=4, pooled=6)
POOLED = torch.arange(24.0).reshape(4, 6) / 24


def build(kind: str, style: str, outputs: int = 1, words: nn.Embedding | None = None, group: int = 1, **options: int) -> Any:
    named: Any = kind
    return heads.build(Head(kind=named, outputs=outputs, options=options), DIMS, style=style, words=words, group=group).eval()


@pytest.mark.parametrize("style", ["linear", "plain"])
def test_classify(style: str) -> None:
    head = build("classify", style, outputs=3)
    assert_close(head(POOLED), F.linear(POOLED, head.linear.weight, head.linear.bias))
    head.train()
    assert torch.equal(head(POOLED), head(POOLED)) == (style == "plain")


def test_score_puts_the_rows_of_an_example_side_by_side() -> None:
    head = build("score", "linear", group=2)
    scores = head(POOLED)
    assert scores.shape == (2, 2)
    assert_close(scores[1, 0], head.linear(POOLED[2])[0])


def test_pair_joins_the_rows_of_an_example() -> None:
    head = build("pair", "linear", outputs=3, group=2)
    assert_close(head(POOLED)[1], head.linear(torch.cat([POOLED[2], POOLED[3]])))
    assert build("pair", "linear", outputs=3)(POOLED).shape == (4, 3)  # one row holds both images


def test_vocabulary_is_tied_to_the_words() -> None:
    words = nn.Embedding(11, 6)
    head = build("vocabulary", "bert", words=words)
    states = torch.randn(2, 3, 6)
    before = head(states)
    assert before.shape == (2, 3, 11)
    assert_close(before, F.layer_norm(F.gelu(head.dense(states)), (6,), eps=1e-12) @ words.weight.t())
    assert all("word" not in name and tensor.shape != words.weight.shape for name, tensor in head.state_dict().items())
    with torch.no_grad():
        words.weight[4] += 1
        head.bias[5] += 1
    moved = (head(states) != before).any(0).any(0)
    assert moved.nonzero().flatten().tolist() == [4, 5]


def test_vocabulary_stays_tied_in_a_copy_of_the_whole_model() -> None:
    words = nn.Embedding(11, 6)
    model: Any = nn.ModuleDict({"words": words, "head": build("vocabulary", "bert", words=words)})
    twin = copy.deepcopy(model)
    twin["head"](torch.randn(1, 1, 6)).sum().backward()
    assert twin["words"].weight.grad is not None
    assert model["words"].weight.grad is None


def test_flickr_attention() -> None:
    head = build("slots_regions", "flickr", head_size=2)
    states, regions = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    scores = head(states, regions, mask)
    assert_close(scores[0, 1, 4], head.query(states[0, 1]) @ head.key(regions[0, 4]) / 2**0.5)
    assert (scores.softmax(-1)[1, :, 2:] == 0).all()
    assert scores.isfinite().all()
    assert build("slots_regions", "flickr").query.out_features == 64


def test_new_heads_start_as_bert_does() -> None:
    head = build("classify", "plain", outputs=500)
    assert abs(head.linear.weight.std().item() - 0.02) < 0.002
    assert (head.linear.bias == 0).all()


@pytest.mark.parametrize(
    ("kind", "style", "outputs", "message"),
    [
        ("classify", "liner", 2, "Did you mean 'linear'"),
        ("regions", "linear", 2, "no regions head"),
        ("score", "linear", 2, "one number per row"),
        ("vocabulary", "bert", 2, "pass words="),
    ],
)
def test_errors(kind: str, style: str, outputs: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, style, outputs=outputs)
