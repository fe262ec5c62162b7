"""Every kind in every style: shapes, values, grouping, tying, and errors."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling.errors import ConfigError
from visling.nn import heads
from visling.nn.heads import STYLES
from visling.types import Batch, Dims, Encoded, Head, Regions, Slots, Text

DIMS = Dims(text=6, regions=4, pooled=6)
POOLED = torch.arange(24.0).reshape(4, 6) / 24


def build(
    kind: str, style: str, outputs: int = 1, words: nn.Embedding | None = None, group: int = 1, **options: int
) -> Any:
    named: Any = kind
    return heads.build(
        Head(kind=named, outputs=outputs, options=options), DIMS, style=style, words=words, group=group
    ).eval()


@pytest.mark.parametrize("style", ["linear", "plain"])
def test_classify(style: str) -> None:
    head = build("classify", style, outputs=3)
    assert_close(head(POOLED), F.linear(POOLED, head.linear.weight, head.linear.bias))
    head.train()
    assert torch.equal(head(POOLED), head(POOLED)) == (style == "plain")


def test_score_gives_one_number_per_row() -> None:
    head = build("score", "linear")
    scores = head(POOLED)
    assert scores.shape == (4,)
    assert_close(scores[2], head.linear(POOLED[2])[0])


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


def stirred(kind: str, style: str, outputs: int = 1, group: int = 1, **options: int) -> Any:
    """A head in training whose every parameter matters."""
    head = build(kind, style, outputs=outputs, group=group, **options)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head.train()


@pytest.fixture
def fixed_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in training multiplies by what it keeps: where it stands, and how much it drops, can be read off the
    result."""
    monkeypatch.setattr(
        nn.Dropout, "forward", lambda module, states: states * (1 - module.p) if module.training else states
    )


def transformed(head: Any, states: Tensor) -> Tensor:
    """Linear, GELU and, if there is one, the norm."""
    states = F.gelu(states @ head.dense.weight.T + head.dense.bias)
    if head.norm is None:
        return states
    spread = states - states.mean(-1, keepdim=True)
    return spread / (spread.square().mean(-1, keepdim=True) + 1e-12).sqrt() * head.norm.weight + head.norm.bias


@pytest.mark.usefixtures("fixed_dropout")
@pytest.mark.parametrize(
    ("kind", "style", "outputs", "group"),
    [
        ("classify", "linear", 3, 1),
        ("score", "linear", 1, 1),
        ("pair", "linear", 3, 1),
        ("pair", "linear", 3, 2),
    ],
)
def test_linear_heads_drop_what_they_read(kind: str, style: str, outputs: int, group: int) -> None:
    """Before the linear layer, and nowhere else: the bias is whole."""
    head = stirred(kind, style, outputs=outputs, group=group)
    joined = POOLED.reshape(-1, 6 * group) if kind == "pair" else POOLED
    for mode, kept in ((True, 0.9), (False, 1.0)):
        expected = joined * kept @ head.linear.weight.T + head.linear.bias
        assert_close(head.train(mode)(POOLED), expected.squeeze(-1) if kind == "score" else expected)


@pytest.mark.usefixtures("fixed_dropout")
def test_heads_without_dropout() -> None:
    words = nn.Embedding(11, 6)
    states, regions, mask = torch.randn(2, 3, 6), torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    calls: list[tuple[Any, tuple[Tensor, ...]]] = [
        (stirred("classify", "plain", outputs=2), (POOLED,)),
        (build("vocabulary", "bert", words=words).train(), (states,)),
        (stirred("slots_regions", "flickr", head_size=2), (states, regions, mask)),
    ]
    for head, given in calls:
        assert torch.equal(head(*given), head.eval()(*given))


@pytest.mark.usefixtures("fixed_dropout")
def test_vlbert_classify_drops_between_transform_and_output() -> None:
    head = stirred("classify", "vlbert", outputs=3)
    hidden = transformed(head.transform, POOLED)
    assert_close(head(POOLED), F.linear(hidden * 0.9, head.linear.weight, head.linear.bias))
    assert_close(head.eval()(POOLED), F.linear(hidden, head.linear.weight, head.linear.bias))


@pytest.mark.usefixtures("fixed_dropout")
def test_vlbert_regions_has_neither_norm_nor_dropout() -> None:
    head, states = stirred("regions", "vlbert"), torch.randn(2, 5, 4)
    assert_close(
        head(states), F.linear(transformed(head.transform, states), head.linear.weight, head.linear.bias)[..., 0]
    )
    assert head.transform.norm is None
    assert head(states[:, :0]).shape == (2, 0)


@pytest.mark.usefixtures("fixed_dropout")
@pytest.mark.parametrize(("style", "normed"), [("vlbert", False), ("bert", True)])
def test_region_targets_share_one_transform(style: str, normed: bool) -> None:
    head, states = stirred("region_targets", style, outputs=5, classes=3, features=2), torch.randn(2, 5, 4)
    assert (head.transform.norm is not None) == normed
    hidden = transformed(head.transform, states)
    found = head(states)
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "classes": (2, 5, 3),
        "features": (2, 5, 2),
    }
    for name, values in found.items():
        assert_close(values, F.linear(hidden, head.outputs[name].weight, head.outputs[name].bias))


@pytest.mark.usefixtures("fixed_dropout")
@pytest.mark.parametrize(("style", "kept"), [("gelu_norm", 1.0), ("vilbert", 0.9)])
@pytest.mark.parametrize(("kind", "group"), [("classify", 1), ("pair", 2)])
def test_classifiers_with_a_norm(style: str, kept: float, kind: str, group: int) -> None:
    head = stirred(kind, style, outputs=3, group=group)
    joined = POOLED.reshape(-1, 6 * group)
    assert head.dense.weight.shape == (12, 6 * group)  # twice the pooled width, however many rows are joined
    assert_close(head(POOLED), F.linear(transformed(head, joined * kept), head.linear.weight, head.linear.bias))
    assert head(POOLED).shape == (4 // group, 3)
    assert build(kind, style, outputs=3, group=group, hidden_size=5).dense.out_features == 5


@pytest.mark.usefixtures("fixed_dropout")
def test_weight_norm_classify() -> None:
    head = stirred("classify", "weight_norm", outputs=3)

    def gained(layer: Any, states: Tensor) -> Tensor:
        return states @ (layer.direction * layer.gain / layer.direction.square().sum().sqrt()).T + layer.bias

    assert_close(head(POOLED), gained(head.output, gained(head.dense, POOLED * 0.9).relu() * 0.5))
    fresh = build("classify", "weight_norm", outputs=3)
    assert fresh.dense.direction.shape == (12, 6)
    for layer in (fresh.dense, fresh.output):
        assert_close(layer.gain, layer.direction.norm())  # it starts as the linear layer that it was made of
        assert not layer.bias.any()


@pytest.mark.usefixtures("fixed_dropout")
def test_match_first_swaps_the_two_classes() -> None:
    head = stirred("classify", "match_first", outputs=2)
    assert_close(head(POOLED)[:, [1, 0]], F.linear(POOLED * 0.9, head.linear.weight, head.linear.bias))


@pytest.mark.usefixtures("fixed_dropout")
def test_regions_by_one_linear_layer_or_two() -> None:
    states = torch.randn(2, 5, 4)
    head = stirred("regions", "linear")
    assert_close(head(states), F.linear(states * 0.9, head.linear.weight, head.linear.bias)[..., 0])
    assert head(states[:, :0]).shape == (2, 0)
    deep = stirred("regions", "deep")
    hidden = F.gelu(F.linear(states * 0.9, deep.dense.weight, deep.dense.bias))
    assert_close(deep(states), F.linear(hidden * 0.9, deep.output.weight, deep.output.bias)[..., 0])


@pytest.mark.usefixtures("fixed_dropout")
def test_projection_has_twice_the_width_inside() -> None:
    head, states = stirred("projection", "cvlp", outputs=7), torch.randn(2, 5, 4)
    assert head.dense.weight.shape == (8, 4)
    assert_close(head(states), F.linear(transformed(head, states), head.linear.weight, head.linear.bias))


@pytest.mark.parametrize(
    ("kind", "style", "outputs"),
    [("classify", "vlbert", 300), ("score", "vlbert", 1), ("regions", "vlbert", 1), ("classify", "linear", 300)],
)
def test_heads_of_vlbert_tasks_start_by_xaviers_rule(kind: Any, style: str, outputs: int) -> None:
    torch.manual_seed(3)
    dims = Dims(text=768, regions=768, pooled=768)
    head = heads.build(Head(kind=kind, outputs=outputs), dims, style=style)
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == (1 if kind == "score" or style == "linear" else 2)
    for linear in linears:
        std, bound = linear.weight.std().item(), (6 / sum(linear.weight.shape)) ** 0.5
        if style == "vlbert":
            assert std == pytest.approx((2 / sum(linear.weight.shape)) ** 0.5, rel=0.05)
            assert 0.99 * bound < linear.weight.abs().max().item() <= bound
        else:
            assert std == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()
    assert all(torch.equal(norm.weight, torch.ones(768)) for norm in head.modules() if isinstance(norm, nn.LayerNorm))


def test_classes_of_regions_start_as_in_bert() -> None:
    dims = Dims(text=768, regions=768, pooled=768)
    head = heads.build(Head(kind="region_targets", outputs=0, options={"classes": 81}), dims, style="vlbert")
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2
    assert all(linear.weight.std().item() == pytest.approx(0.02, rel=0.05) for linear in linears)


def test_answers_start_from_the_words_they_are_made_of() -> None:
    words, head = nn.Embedding(9, 6), build("classify", "vlbert", outputs=3)
    bias = head.linear.bias.clone()
    head.start_from_words(words, [[1], [2, 5], []])
    assert_close(
        head.linear.weight, torch.stack([words.weight[1], (words.weight[2] + words.weight[5]) / 2, torch.zeros(6)])
    )
    assert torch.equal(head.linear.bias, bias)
    with pytest.raises(AssertionError, match="2 answers for 3 outputs"):
        head.start_from_words(words, [[1], [2]])


def test_answers_start_from_those_of_pretraining() -> None:
    trained, head = stirred("classify", "gelu_norm", outputs=4), stirred("classify", "gelu_norm", outputs=3)
    head.start_from(trained, [2, None, 0])
    assert_close(head(POOLED)[:, [0, 2]], trained(POOLED)[:, [2, 0]])
    assert not head(POOLED)[:, 1].any()
    for other, rows in ((trained, [2, None]), (build("classify", "gelu_norm", outputs=4, hidden_size=5), [2, None, 0])):
        with pytest.raises(ConfigError, match="cannot start from"):
            head.start_from(other, rows)


@pytest.mark.parametrize(("kind", "style"), [(kind, style) for kind, styles in STYLES.items() for style in styles])
def test_first_values_in_every_style(kind: str, style: str) -> None:
    outputs = {"score": 1, "classify": 2}.get(kind, 3)
    options = {"classes": 3} if kind == "region_targets" else {}
    head = build(kind, style, outputs=outputs, words=nn.Embedding(3, 6), **options)
    for name, module in head.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-12, name
            assert (module.weight == 1).all()
        if isinstance(module, nn.Linear | nn.LayerNorm):
            assert not module.bias.any(), name
        if isinstance(module, nn.Linear):
            xavier = style == "vlbert" and kind != "region_targets"
            bound = (6 / sum(module.weight.shape)) ** 0.5 if xavier else 0.15  # N(0, 0.02)
            assert module.weight.abs().max() <= bound, name


def test_new_heads_start_as_bert_does() -> None:
    head = build("classify", "plain", outputs=500)
    assert abs(head.linear.weight.std().item() - 0.02) < 0.002
    assert (head.linear.bias == 0).all()


@pytest.mark.parametrize(
    ("kind", "style", "outputs", "message"),
    [
        ("classify", "liner", 2, "Did you mean 'linear'"),
        ("region_targets", "linear", 2, r"no region_targets head in style 'linear'.*vlbert"),
        ("tail", "linear", 2, "no tail head"),
        ("classify", "match_first", 3, "outputs must be 2; found 3"),
        ("score", "linear", 2, "one number per row"),
        ("vocabulary", "bert", 2, "pass words="),
    ],
)
def test_errors(kind: str, style: str, outputs: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, style, outputs=outputs)


# --------------------------------------------------------------------------------------------------------------------
# reading


def encoded_batch(**changes: Any) -> tuple[Encoded, Batch]:
    """Two rows of five tokens; three regions, of which the second row has one."""
    text = Text(ids=torch.ones(2, 5).long(), mask=torch.ones(2, 5).bool(), segments=torch.zeros(2, 5).long())
    mask = torch.tensor([[True, True, True], [True, False, False]])
    regions = Regions(features=torch.zeros(2, 3, 1), boxes=torch.zeros(2, 3, 4), mask=mask, size=torch.ones(2, 2))
    encoded = Encoded(text=torch.randn(2, 5, 6), regions=torch.randn(2, 3, 4), pooled=torch.randn(2, 6))
    return encoded, Batch(**{"text": text, "regions": regions, **changes})


def read_one(kind: Any, head: nn.Module, encoded: Encoded, batch: Batch, **at: Tensor) -> Tensor:
    logits = heads.read(kind, head, encoded, batch, **at)
    assert isinstance(logits, Tensor)
    return logits


def test_words_are_read_at_every_token_or_at_the_given_ones() -> None:
    encoded, batch = encoded_batch(phrases=Slots(at=torch.tensor([[1], [2]]), mask=torch.ones(2, 1).bool()))
    head = build("vocabulary", "bert", words=nn.Embedding(11, 6))
    every = read_one("vocabulary", head, encoded, batch)
    assert_close(every, head(encoded.text))
    chosen = read_one("vocabulary", head, encoded, batch, at=torch.tensor([[3, 0], [1, 1]]))
    assert_close(chosen, torch.stack([every[0, [3, 0]], every[1, [1, 1]]]))


def test_phrases_are_read_where_the_batch_has_them() -> None:
    encoded, batch = encoded_batch()
    head = build("slots_regions", "flickr", head_size=2)
    every = read_one("slots_regions", head, encoded, batch)
    assert every.shape == (2, 5, 3)
    phrases = Slots(at=torch.tensor([[1, 4], [2, 0]]), mask=torch.tensor([[True, True], [True, False]]))
    of_phrases = read_one("slots_regions", head, encoded, dataclasses.replace(batch, phrases=phrases))
    assert_close(of_phrases, torch.stack([every[0, [1, 4]], every[1, [2, 0]]]))


def test_padded_regions_are_masked_also_where_rows_share_an_image_or_there_is_none() -> None:
    encoded, batch = encoded_batch()
    head = build("slots_regions", "flickr", head_size=2)
    own = read_one("slots_regions", head, encoded, batch).softmax(-1)
    assert (own[1, :, 1:] == 0).all()
    assert batch.regions is not None
    shared = dataclasses.replace(batch.regions, row=torch.tensor([1, 1]))
    of_one_image = read_one("slots_regions", head, encoded, dataclasses.replace(batch, regions=shared)).softmax(-1)
    assert (of_one_image[:, :, 1:] == 0).all()
    without = dataclasses.replace(encoded, regions=encoded.regions[:, :0])
    assert read_one("slots_regions", head, without, dataclasses.replace(batch, regions=None)).shape == (2, 5, 0)


def test_the_whole_image_is_the_last_candidate() -> None:
    encoded, batch = encoded_batch()
    head = build("regions", "linear")
    assert read_one("regions", head, encoded, batch).shape == (2, 3)
    whole = torch.randn(2, 4)
    with_whole = read_one("regions", head, dataclasses.replace(encoded, whole=whole), batch)
    assert_close(with_whole, head(torch.cat([encoded.regions, whole[:, None]], dim=1)))


def test_targets_of_regions_have_a_name_each() -> None:
    encoded, batch = encoded_batch()
    head = build("region_targets", "bert", outputs=7, classes=4, features=3)
    logits = heads.flatten("masked", heads.read("region_targets", head, encoded, batch))
    assert {name: tuple(values.shape) for name, values in logits.items()} == {
        "masked.classes": (2, 3, 4),
        "masked.features": (2, 3, 3),
    }
    assert heads.flatten("pair", torch.zeros(1)).keys() == {"pair"}


def test_the_whole_image_has_targets_too() -> None:
    encoded, batch = encoded_batch()
    head = build("region_targets", "vlbert", outputs=4, classes=4).eval()
    whole = torch.randn(2, 4)
    logits = heads.read("region_targets", head, dataclasses.replace(encoded, whole=whole), batch)
    assert isinstance(logits, dict)
    assert_close(logits["classes"], head(torch.cat([encoded.regions, whole[:, None]], dim=1))["classes"])
    assert logits["classes"].shape == (2, 4, 4)
