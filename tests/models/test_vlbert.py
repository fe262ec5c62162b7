"""VL-BERT's own promises: what each element is made of, rows without images, dropout sites, initialisation, start from
BERT, released key layouts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.attention_ways import WAYS, Way, attend_by, fix_dropout
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling import models
from visling.boxes import to_unit
from visling.errors import CheckpointError, ConfigError
from visling.models.vlbert import PRESETS, VlBert, VlBertConfig, inputs
from visling.nn.attention import Attention
from visling.nn.head_blocks import TransformClassifier
from visling.nn.heads import build
from visling.types import Batch, Encoded, Head, Regions, Text

KEYS = models.spec("vlbert").keys
TINY = PRESETS["tiny"]
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
ONLY_PRETRAINING = {"mask_word", "mask_feature", "text_only"}


def tiny(**changes: Any) -> VlBert:
    """A tiny model whose norms and biases matter."""
    model = VlBert(dataclasses.replace(TINY, vocab_size=50, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def text_of(*lengths: int) -> Text:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 50, mask.shape) * mask
    return Text(ids=ids, mask=mask, segments=(torch.arange(max(lengths)) > 2).long() * mask)


def regions_of(config: VlBertConfig, *counts: int, width: int | None = None, **given: Any) -> Regions:
    width = max(counts) if width is None else width
    corners = torch.rand(len(counts), width, 2) * 0.5
    return Regions(
        features=torch.randn(len(counts), width, config.feature_size),
        boxes=torch.cat([corners, corners + 0.1 + torch.rand(len(counts), width, 2) * 0.3], dim=-1),
        mask=torch.arange(width) < torch.tensor(counts)[:, None],
        size=torch.tensor([[64.0, 48.0], [100.0, 50.0], [33.0, 77.0]])[: len(counts)],
        **given,
    )


def batch_of(config: VlBertConfig, *counts: int, **given: Any) -> Batch:
    """Texts of 6, 4, 5 tokens with so many regions each."""
    return Batch(text=text_of(*(6, 4, 5)[: len(counts)]), regions=regions_of(config, *counts, **given))


def regions_in(batch: Batch) -> Regions:
    assert batch.regions is not None
    return batch.regions


def given_to_the_embeddings(model: VlBert, batch: Batch) -> tuple[Any, ...]:
    """text, token_visual, region_words, region_visual, region_rows; the whole image last of the regions."""
    calls: list[tuple[Any, ...]] = []
    hook = model.embeddings.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    model(batch)
    hook.remove()
    return calls[0]


def heads_of(model: VlBert, keys: Mapping[str, Tensor], layout: str) -> dict[str, nn.Module]:
    """A fresh head for every part that a released file holds besides the encoder."""
    wanted: dict[str, tuple[Head, str]] = {}

    def width(key: str) -> int:
        return len(keys[key])

    if layout == "vqa":
        wanted["classifier"] = (Head(kind="classify", outputs=width("final_mlp.2.bias")), "vlbert")
    if layout == "refcoco":
        wanted["regions"] = (Head(kind="regions", outputs=1), "vlbert")
    if layout == "vcr":
        objects = width("cnn_loss_reg.2.bias")
        wanted["classifier"] = (Head(kind="score", outputs=1), "linear")
        wanted["objects"] = (Head(kind="region_targets", outputs=objects, options={"classes": objects}), "vlbert")
    if "vlbert.mlm_head.predictions.bias" in keys:
        classes = width("vlbert.mvrc_head.region_cls_pred.bias")
        wanted["vocabulary"] = (Head(kind="vocabulary", outputs=model.config.vocab_size), "bert")
        wanted["region_targets"] = (
            Head(kind="region_targets", outputs=classes, options={"classes": classes}),
            "vlbert",
        )
    if "vlbert.relationsip_head.caption_image_relationship.bias" in keys:
        wanted["matching"] = (Head(kind="classify", outputs=2), "plain")
    return {
        part: build(head, model.dims, style=style, words=model.word_embeddings)
        for part, (head, style) in wanted.items()
    }


# ------------------------------------------------------------------------------------------------------------ what each
# element is made of


def test_what_tokens_see() -> None:
    model = tiny()
    batch = batch_of(model.config, 3, 2)
    links = torch.zeros(2, 6, 3, dtype=torch.bool)
    links[0, 1, 2] = links[0, 3, 0] = links[0, 3, 2] = True
    _, token_visual, _, visual, rows = given_to_the_embeddings(model, dataclasses.replace(batch, links=links))
    whole = visual[:, -1]
    assert_close(token_visual[0, 1], visual[0, 2])
    assert_close(token_visual[0, 3], (visual[0, 0] + visual[0, 2]) / 2)
    assert_close(token_visual[0, [0, 2, 4, 5]], whole[0].expand(4, -1))
    assert_close(token_visual[1], whole[1].expand(6, -1))
    assert rows.mask.tolist() == [[True, True, True, True], [True, True, False, True]]
    assert_close(given_to_the_embeddings(model, batch)[1], whole[:, None])  # of all tokens of a row


def test_whole_image_is_the_mean_of_what_is_shown_and_ends_at_the_last_pixel() -> None:
    model = tiny()
    hidden = torch.tensor([[True, False, False], [True, True, False]])
    batch = batch_of(model.config, 3, 2, hidden=hidden)
    features, size = regions_in(batch).features, regions_in(batch).size
    sums = torch.stack([features[0, 1] + features[0, 2], torch.zeros(model.config.feature_size)])
    given = sums / torch.tensor([[2 + 1e-5], [1e-5]])
    told = dataclasses.replace(batch, regions=dataclasses.replace(regions_in(batch), whole=given))
    assert_close(given_to_the_embeddings(model, batch)[3][:, -1], given_to_the_embeddings(model, told)[3][:, -1])
    last_pixel = torch.cat([torch.zeros(2, 2), (size - 1) / size], dim=-1)
    assert_close(given_to_the_embeddings(model, told)[3][:, -1:], model.projection(given[:, None], last_pixel[:, None]))
    shown = dataclasses.replace(batch, regions=dataclasses.replace(regions_in(batch), hidden=None, whole=None))
    mean = torch.stack([features[0].mean(0), features[1, :2].mean(0)])
    assert_close(given_to_the_embeddings(model, shown)[3][:, -1:], model.projection(mean[:, None], last_pixel[:, None]))


@pytest.mark.parametrize("masks_features", [True, False])
def test_hidden_regions(masks_features: bool) -> None:
    model = tiny(masks_features=masks_features)
    hidden = torch.tensor([[False, True, False], [False, False, False]])
    batch = batch_of(model.config, 3, 2, hidden=hidden)
    _, _, words, visual, _ = given_to_the_embeddings(model, batch)
    assert_close(words[0, 1], model.mask_word[0])
    assert_close(words[0, [0, 2, 3]], model.image_word.expand(3, -1))
    feature = regions_in(batch).features[0, 1]
    if masks_features:
        assert model.mask_feature is not None
        feature = model.mask_feature[0]
    assert_close(
        visual[0, 1], model.projection(feature[None, None], regions_in(batch).boxes[:1, 1:2])[0, 0]
    )  # its place stays visible
    assert ("mask_feature" in dict(model.named_parameters())) == masks_features


def test_whitened_features_are_what_is_read() -> None:
    model = tiny()
    assert model.region_features.whiten is not None
    batch = batch_of(model.config, 3, 2)
    model.fit_features(torch.randn(300, model.config.feature_size) * 7 + 3)
    whitened = dataclasses.replace(
        batch,
        regions=dataclasses.replace(
            regions_in(batch), features=model.region_features.whiten(regions_in(batch).features)
        ),
    )
    seen = given_to_the_embeddings(model, batch)[3]
    model.region_features.whiten = None
    assert_close(seen, given_to_the_embeddings(model, whitened)[3])


# ------------------------------------------------------------------------------------------------------------------
# rows with and without images


def test_rows_without_regions_are_plain_text() -> None:
    model = tiny()
    batch = batch_of(model.config, 3, 0, 1)
    encoded = model(batch)
    alone = model(Batch(text=batch.text, regions=None))
    assert_close(encoded.text[1, :4], alone.text[1, :4], **CLOSE)
    assert_close(encoded.pooled[1], alone.pooled[1], **CLOSE)
    assert alone.whole is None
    assert alone.regions.shape == (3, 0, model.dims.regions)
    assert (encoded.text[0] != alone.text[0]).any()


def test_an_image_without_regions_is_seen_if_its_feature_is_stored() -> None:
    model = tiny()
    batch = batch_of(model.config, 0, 0, width=2, whole=torch.randn(2, model.config.feature_size))
    _, token_visual, _, visual, rows = given_to_the_embeddings(model, batch)
    assert rows.mask.tolist() == [[False, False, True]] * 2
    assert_close(token_visual, visual[:, -1:])


@pytest.mark.parametrize("counts", [(1, 0, 1), (0, 0, 0)])
def test_few_regions_all_of_them_hidden_have_finite_gradients(counts: tuple[int, ...]) -> None:
    model = tiny()
    batch = batch_of(model.config, *counts, width=2, hidden=torch.ones(3, 2, dtype=torch.bool))
    encoded = model(batch)
    (encoded.text.sum() + encoded.regions.sum() + encoded.pooled.sum()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_two_corpora_reach_every_parameter() -> None:
    model = tiny()
    batch = batch_of(model.config, 3, 2, hidden=torch.tensor([[False, True, False], [False, False, False]]))
    weights = torch.randn(model.dims.text)
    total = sum(
        ((each.pooled + each.text.sum(1)) * weights).sum()
        for each in (model(batch), model(Batch(text=text_of(5, 3), regions=None)))
    )
    total.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_what_only_pretraining_reads() -> None:
    model = tiny()
    model(batch_of(model.config, 3, 2)).text.sum().backward()
    untouched = {
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    }
    assert untouched - {"pooler.dense.weight", "pooler.dense.bias"} == ONLY_PRETRAINING


@pytest.mark.parametrize("plain", [True, False])
def test_compiled_equals_eager_with_and_without_images(plain: bool) -> None:
    model = tiny()
    batch = (
        Batch(text=text_of(6, 4), regions=None)
        if plain
        else batch_of(model.config, 3, 2, hidden=torch.rand(2, 3) < 0.5)
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(batch).text, model(batch).text, **CLOSE)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision(precision: torch.dtype) -> None:
    model = tiny()
    batch = batch_of(model.config, 3, 2, hidden=torch.tensor([[False, True, False], [False, False, False]]))
    expected = model(batch).text
    halved = model.to(precision)(batch).text
    assert halved.dtype == precision
    assert_close(halved.float(), expected, atol=0.1, rtol=0.1)


def test_captured_maps_have_whole_image_and_end_behind_the_regions() -> None:
    model = tiny()
    encoded = model(batch_of(model.config, 3, 2), capture=True)
    maps, states = encoded.maps, encoded.states
    assert maps is not None
    assert states is not None
    assert states["layers.1"].shape[1] == 6 + 3 + 2
    assert torch.equal(states["layers.1"][:, 9], encoded.whole)
    for name in ("layers.0", "layers.1"):
        assert maps.text_to_regions[name].shape[2:] == (6, 5)
        assert maps.regions_to_regions[name].shape[2:] == (5, 5)
        assert maps.text_to_regions[name][1, :, :, 2].eq(0).all()  # padding
        assert_close(maps.text_to_text[name].sum(-1) + maps.text_to_regions[name].sum(-1), torch.ones(2, 2, 6))
    plain = model(Batch(text=text_of(6, 4), regions=None), capture=True)
    assert plain.maps is not None
    assert plain.maps.text_to_regions["layers.0"].shape[2:] == (6, 1)  # [END]


def test_slot_reads_the_raw_state_and_none_the_pooler() -> None:
    model = tiny()
    batch = batch_of(model.config, 3, 2)
    at_slot = model(dataclasses.replace(batch, text=dataclasses.replace(batch.text, answer_at=torch.tensor([2, 1]))))
    assert torch.equal(at_slot.pooled, torch.stack([at_slot.text[0, 2], at_slot.text[1, 1]]))
    assert_close(model(batch).pooled, torch.tanh(model.pooler.dense(at_slot.text[:, 0])))


# ------------------------------------------------------------------------------------------------- an independent
# reference, with its dropout sites


def factor(rate: float) -> float:
    """Stands in for dropout: tells by its size which rate was asked for."""
    return 1.0 + rate


RATES = {"dropout_rate": 0.1, "attention_dropout_rate": 0.3, "feature_dropout_rate": 0.5}


class Reference:
    """VL-BERT in float64, one packed row at a time, from the description of the release; boxes in pixels."""

    def __init__(self, model: VlBert) -> None:
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        product: Tensor = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return product

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        normed: Tensor = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return normed

    def region(self, box: list[float], size: list[float], feature: Tensor) -> Tensor:
        x1, y1, x2, y2 = box
        numbers = [(x1 + x2) / 2 / size[0], (y1 + y2) / 2 / size[1], (x2 - x1) / size[0], (y2 - y1) / size[1]]
        number = self.config.coordinate_size
        waves = [
            f(100 * p / 1000 ** (i / number)) for p in numbers for f in (math.sin, math.cos) for i in range(number)
        ]
        joined = torch.cat([torch.tensor(waves, dtype=torch.float64), feature]) * factor(RATES["feature_dropout_rate"])
        return F.relu(self.linear("projection.linear", joined))

    def row(
        self, ids: list[int], segments: list[int], features: Tensor, boxes: list[list[float]], size: list[float]
    ) -> Tensor:
        """States of text, whole image, regions, [END]."""
        w, dropped = self.weights, factor(RATES["dropout_rate"])
        seen = [self.region([0, 0, size[0] - 1, size[1] - 1], size, features.mean(0))]
        seen += [self.region(box, size, feature) for box, feature in zip(boxes, features, strict=True)]
        rows = []
        for t, (word, segment) in enumerate(zip(ids, segments, strict=True)):
            vector = (
                w["embeddings.words.weight"][word]
                + w[f"embeddings.segments.{segment}"][0]
                + w["embeddings.positions.weight"][t]
            )
            rows.append(vector + self.norm("embeddings.visual_text.norm", seen[0]))
        third, place = w["embeddings.segments.2"][0], w["embeddings.positions.weight"]
        rows += [
            w["image_word"][0] + third + place[len(ids)] + self.norm("embeddings.visual_regions.norm", visual)
            for visual in seen
        ]
        rows.append(w["embeddings.end"][0] + third + place[len(ids) + 1])
        states = self.norm("embeddings.norm", torch.stack(rows)) * dropped
        for number in range(self.config.num_layers):
            states = self.layer(f"layers.{number}", states, dropped)
        return states

    def layer(self, name: str, states: Tensor, dropped: float) -> Tensor:
        parts = [
            self.linear(f"{name}.self_attention.attention.{part}", states).chunk(self.config.num_heads, dim=-1)
            for part in ("query", "key", "value")
        ]
        contexts = []
        for query, key, value in zip(*parts, strict=True):
            probs = (query @ key.T / query.shape[-1] ** 0.5).softmax(-1) * factor(RATES["attention_dropout_rate"])
            contexts.append(probs @ value)
        attended = self.linear(f"{name}.self_attention.output", torch.cat(contexts, dim=-1)) * dropped
        states = self.norm(f"{name}.self_attention.norm", states + attended)
        wide = self.linear(f"{name}.feed_forward.up", states)
        wide = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
        return self.norm(f"{name}.feed_forward.norm", states + self.linear(f"{name}.feed_forward.down", wide) * dropped)


def compare_with_reference(model: VlBert, monkeypatch: pytest.MonkeyPatch, way: Way = "padded") -> None:
    batch = batch_of(model.config, 3, 2)
    regions = regions_in(batch)
    pixels = [
        [[3.0, 4.0, 40.0, 30.0], [10.0, 2.0, 60.0, 47.0], [5.0, 5.0, 9.0, 40.0]],
        [[0.0, 0.0, 50.0, 49.0], [20.0, 10.0, 99.0, 30.0]],
    ]
    boxes = to_unit(torch.tensor([pixels[0], [*pixels[1], [0.0] * 4]]), regions.size)
    batch = dataclasses.replace(batch, regions=dataclasses.replace(regions, boxes=boxes))

    attend_by(monkeypatch, way)
    fix_dropout(monkeypatch, factor)
    encoded: Encoded = model.train()(batch, capture=way == "captured")
    reference = Reference(model)
    assert encoded.whole is not None
    for row, count in enumerate((3, 2)):
        length = int(batch.text.mask[row].sum())
        ids, segments = batch.text.ids[row, :length].tolist(), batch.text.segments[row, :length].tolist()
        expected = reference.row(
            ids, segments, regions.features[row, :count].double(), pixels[row], regions.size[row].tolist()
        )
        ours = torch.cat([encoded.text[row, :length], encoded.whole[row : row + 1], encoded.regions[row, :count]])
        assert_close(ours.double(), expected[:-1], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("way", WAYS)
def test_every_dropout_stands_where_the_release_has_it(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_with_reference(tiny(whiten_features=False, **RATES), monkeypatch, way)


def _no_attention_dropout(model: VlBert) -> None:
    attention = model.get_submodule("layers.0.self_attention.attention")
    assert isinstance(attention, Attention)
    attention.dropout_rate = 0.0


def _without(name: str) -> Callable[[VlBert], None]:
    def change(model: VlBert) -> None:
        dropout = model.get_submodule(name)
        assert isinstance(dropout, nn.Dropout)
        dropout.p = 0.0

    return change


MOVED: Mapping[str, Callable[[VlBert], None]] = {
    "none on attention": _no_attention_dropout,
    **{
        f"no {name}": _without(name)
        for name in (
            "projection.dropout",
            "embeddings.dropout",
            "layers.0.self_attention.dropout",
            "layers.1.feed_forward.dropout",
        )
    },
}


@pytest.mark.parametrize("moved", MOVED)
def test_a_missing_dropout_is_noticed(moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(whiten_features=False, **RATES)
    MOVED[moved](model)
    with pytest.raises(AssertionError):
        compare_with_reference(model, monkeypatch)


# ------------------------------------------------------------------------------------------------------- initialisation


def test_initial_values_per_group() -> None:
    config = VlBertConfig(
        hidden_size=256,
        num_layers=1,
        num_heads=4,
        intermediate_size=512,
        vocab_size=2000,
        visual_size=256,
        feature_size=512,
    )
    model = VlBert(config)
    embeddings = model.embeddings

    def spread(*tensors: Tensor) -> float:
        return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).std())

    assert spread(embeddings.words.weight) == pytest.approx(0.02, rel=0.02)
    assert spread(embeddings.positions.weight) == pytest.approx(0.02, rel=0.02)
    assert spread(*embeddings.segments, embeddings.end) == pytest.approx(0.02, rel=0.1)
    assert spread(model.image_word, model.mask_word, model.text_only) == pytest.approx(0.02, rel=0.1)
    assert model.mask_feature is not None
    assert model.mask_feature.eq(0).all()
    assert spread(
        *(module.weight for module in model.layers.modules() if isinstance(module, nn.Linear))
    ) == pytest.approx(0.02, rel=0.02)
    assert spread(model.pooler.dense.weight) == pytest.approx(0.02, rel=0.05)
    assert all(
        module.bias.eq(0).all()
        for part in (model.layers, model.pooler)
        for module in part.modules()
        if isinstance(module, nn.Linear)
    )
    for path in (embeddings.visual_text, embeddings.visual_regions):
        assert path.norm is not None
        assert path.norm.weight.eq(0).all()
        assert path.norm.bias.eq(0).all()
    others = [m for m in (embeddings.norm, *model.layers.modules()) if isinstance(m, nn.LayerNorm)]
    assert len(others) == 3
    assert all(norm.weight.eq(1).all() and norm.bias.eq(0).all() for norm in others)
    linear = model.projection.linear  # PyTorch's own: uniform within one over the root of the inputs
    bound = linear.in_features**-0.5
    assert linear.weight.abs().max() <= bound
    assert linear.bias.abs().max() <= bound
    assert spread(linear.weight) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_images_are_silent_at_the_start() -> None:
    config = dataclasses.replace(TINY, vocab_size=50, visual_scale_init=0.0, text_visual_scale_init=0.0)
    for visual_norm in (True, False):
        model = VlBert(dataclasses.replace(config, visual_norm=visual_norm)).eval()
        batch = batch_of(config, 3, 2)
        other = dataclasses.replace(
            batch, regions=dataclasses.replace(regions_in(batch), features=torch.randn_like(regions_in(batch).features))
        )
        assert torch.equal(model(batch).text, model(other).text)
    assert VlBert(TINY).embeddings.visual_text.norm.weight.eq(TINY.text_visual_scale_init).all()  # type: ignore[union-attr]


def test_other_visual_width_and_scalar_instead_of_norm() -> None:
    model = tiny(visual_size=20, visual_norm=False)
    names = dict(model.named_parameters())
    assert names["embeddings.visual_text.linear.weight"].shape == (32, 20)
    assert names["embeddings.visual_regions.scale"].shape == ()
    assert names["text_only"].shape == (1, 20)
    assert model(batch_of(model.config, 3, 2)).text.isfinite().all()


def test_second_segment_restarts_from_the_first() -> None:
    model = tiny()
    first = model.embeddings.segments[0].clone()
    model.restart_second_segment()
    assert torch.equal(model.embeddings.segments[1], first)
    assert torch.equal(model.embeddings.segments[0], first)
    assert not torch.equal(model.embeddings.segments[2], first)


def test_answers_start_from_their_words() -> None:
    head = build(Head(kind="classify", outputs=3), models.build_tiny("vlbert").dims, style="vlbert")
    assert isinstance(head, TransformClassifier)
    table = nn.Embedding(9, head.linear.in_features)
    head.start_from_words(table, [[1], [2, 5], []])
    assert_close(
        head.linear.weight.detach(),
        torch.stack([table.weight[1], (table.weight[2] + table.weight[5]) / 2, torch.zeros(32)]).detach(),
    )


# -------------------------------------------------------------------------------------------------------- configuration


def test_input_spec_follows_the_config() -> None:
    spec = inputs(PRESETS["base_prec"])
    assert (spec.feature_size, spec.max_regions, spec.max_tokens, spec.joint_limit, spec.answer_slot) == (
        2048,
        100,
        64,
        64,
        "none",
    )
    assert inputs(PRESETS["large_vqa"]).answer_slot == "second_segment"
    assert inputs(PRESETS["large_vqa"]).joint_limit is None
    assert {name for name, preset in PRESETS.items() if inputs(preset).region_order == "confidence"} == {
        "base_prec", "base_e2e", "large_prec", "large_e2e",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "30 and 4"),
        ({"max_tokens": 511}, "511, the regions and .END. take 513 positions"),
    ],
)
def test_impossible_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VlBertConfig(**changes)


def test_text_beyond_the_position_table_and_features_of_another_width() -> None:
    model = tiny(max_positions=8, max_tokens=6)
    assert (
        model(Batch(text=text_of(6, 6), regions=regions_of(model.config, 40, 1))).pooled.isfinite().all()
    )  # regions share one position
    with pytest.raises(ConfigError, match=r"7 tokens.*holds 8"):
        model(Batch(text=text_of(7, 7), regions=regions_of(model.config, 2, 1)))
    with pytest.raises(ConfigError, match="17 wide; this model reads 16"):
        model(batch_of(dataclasses.replace(TINY, feature_size=17), 3, 2))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def random_bert(model: VlBert) -> dict[str, Tensor]:
    """A text-only BERT of the model's sizes in its oldest spelling."""
    width, wide, config = model.config.hidden_size, model.config.intermediate_size, model.config
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (config.vocab_size, width),
        "bert.embeddings.position_embeddings.weight": (config.max_positions, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
        "cls.predictions.bias": (config.vocab_size,),
        "cls.seq_relationship.weight": (2, width),
        "cls.seq_relationship.bias": (2,),
    }
    dense = {"bert.pooler.dense": (width, width), "cls.predictions.transform.dense": (width, width)}
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for number in range(config.num_layers):
        prefix = f"bert.encoder.layer.{number}"
        dense |= {
            f"{prefix}.{name}": (width, width)
            for name in ("attention.self.query", "attention.self.key", "attention.self.value")
        }
        dense |= {f"{prefix}.attention.output.dense": (width, width), f"{prefix}.intermediate.dense": (wide, width)}
        dense |= {f"{prefix}.output.dense": (width, wide)}
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    shapes |= {f"{name}.weight": shape for name, shape in dense.items()} | {
        f"{name}.bias": shape[:1] for name, shape in dense.items()
    }
    shapes |= {f"{name}.{old}": (width,) for name in norms for old in ("gamma", "beta")}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**tensors, "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}


def test_start_from_bert() -> None:
    model = tiny(num_layers=1)
    shapes = {"vlbert.mlm_head.predictions.bias": 50, "vlbert.mvrc_head.region_cls_pred.bias": 13}
    shapes["vlbert.relationsip_head.caption_image_relationship.bias"] = 2
    parts = heads_of(model, {name: torch.empty(size) for name, size in shapes.items()}, "official")
    source, before = random_bert(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coverage = KEYS["bert"].load(source, {"encoder": model, **parts})
    assert coverage.complete
    fresh = {name.removeprefix("encoder.") for name in coverage.fresh if name.startswith("encoder.")}
    random = (
        "projection",
        "region_features",
        "embeddings.visual",
        "embeddings.end",
        "embeddings.segments.2",
        "image_word",
        "mask_",
        "text_only",
    )
    assert fresh == {name for name in before if name.startswith(random)}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in fresh)
    segments = source["bert.embeddings.token_type_embeddings.weight"]
    assert torch.equal(torch.cat([model.embeddings.segments[0], model.embeddings.segments[1]]), segments)
    assert torch.equal(model.embeddings.norm.weight, source["bert.embeddings.LayerNorm.gamma"])
    assert torch.equal(model.pooler.dense.weight, source["bert.pooler.dense.weight"])
    assert torch.equal(model.embeddings.positions.weight, source["bert.embeddings.position_embeddings.weight"])
    assert torch.equal(parts["matching"].get_parameter("linear.bias"), source["cls.seq_relationship.bias"])
    written = KEYS["bert"].invert(
        {f"encoder.{name}": tensor for name, tensor in model.state_dict().items() if name not in fresh}
    )
    assert torch.equal(written["bert.embeddings.token_type_embeddings.weight"], segments)


def released(golden: Path) -> dict[str, tuple[str, str, dict[str, tuple[int, ...]]]]:
    """Variant -> preset, layout, and shape of every key at full size."""
    manifest = json.loads((golden / "vlbert" / "manifest_full.json").read_text())
    prec = manifest["base_prec_pretrain_multitask"]
    captions = {
        key: shape
        for key, shape in prec.items()
        if key not in manifest["base_prec_pretrain_without_text_only__missing_from_multitask"]
    }
    (beyond,) = (name for name in manifest if name.startswith("base_e2e_pretrain_multitask__beyond_prec"))
    network = manifest[beyond]
    twins = {
        key.replace("roi_head_feature_extractor", "head.0"): shape
        for key, shape in network.items()
        if "roi_head_feature_extractor" in key
    }
    missing = manifest["base_e2e_pretrain_multitask__not_present_but_in_prec"]
    e2e = {key: shape for key, shape in prec.items() if key not in missing} | network | twins

    def tuned(base: dict[str, Any], name: str) -> dict[str, Any]:
        """What a task's model keeps of a pre-trained one, and its own head."""
        only_pretraining = ("vlbert.mlm_head.", "vlbert.mvrc_head.", "object_mask_", "aux_text_")
        added: dict[str, Any] = manifest[name]
        return {key: shape for key, shape in base.items() if not key.startswith(only_pretraining)} | added

    vcr = tuned(e2e, "base_vcr_e2e__keys_beyond_base_e2e_pretrain_after_vlbert_to_vlbert._module")
    vcr = {
        key.replace("vlbert.", "vlbert._module.") if "_module." not in key else key: shape for key, shape in vcr.items()
    }
    large = manifest["large_prec_pretrain_multitask__non_encoder_and_layer0"]
    first = {key: shape for key, shape in large.items() if ".layer.0." in key}
    large = large | {
        key.replace(".layer.0.", f".layer.{number}."): shape for key, shape in first.items() for number in range(24)
    }
    return {
        "prec": ("base_prec", "official", prec),
        "captions only": ("base_prec", "official", captions),
        "relationship": ("base_prec", "official", prec | manifest["relationship_head_variant_extra_keys"]),
        "e2e": ("base_e2e", "official", e2e),
        "large": ("large_prec", "official", large),
        "vqa": ("base_vqa", "vqa", tuned(prec, "base_vqa_prec__keys_beyond_base_prec_pretrain")),
        "refcoco": ("base_refcoco", "refcoco", tuned(e2e, "base_refcoco_e2e__keys_beyond_base_e2e_pretrain")),
        "vcr": ("base_vcr", "vcr", vcr),
    }


FRESH = {
    "prec": {"pooler"},
    "captions only": {"pooler", "text_only"},
    "relationship": set(),
    "e2e": {"pooler"},
    "large": {"pooler"},
    "vqa": {"pooler", "mask_word", "mask_feature", "text_only"},
    "refcoco": {"pooler", "mask_word", "text_only"},
    "vcr": {"mask_word", "text_only"},
}


def test_every_released_key_is_accounted_for(golden: Path) -> None:
    variants = released(golden)
    assert len(variants["prec"][2]) == 218
    assert len(variants["e2e"][2]) == 901
    for name, (preset, layout, shapes) in variants.items():
        keys = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        with torch.device("meta"):
            model = VlBert(PRESETS[preset])
            parts = {"encoder": model, **heads_of(model, keys, layout)}
        coverage = KEYS[layout].load(keys, parts)
        filled = {key for sources in coverage.mapped.values() for key in sources}
        assert sorted([*filled, *coverage.tied, *coverage.dropped]) == sorted(keys), name
        assert set(coverage.dropped) == {
            key for key in keys if ".backbone." in key or "roi_head" in key or ".head.0." in key
        }, name
        assert {key.split(".")[1] for key in coverage.fresh} == FRESH[name], name


@pytest.mark.parametrize("task", ["vqa", "refcoco", "vcr"])
def test_a_pretrained_file_starts_a_task(golden: Path, task: str) -> None:
    variants = released(golden)
    _, _, shapes = variants["prec" if task == "vqa" else "e2e"]
    keys = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with torch.device("meta"):
        model = VlBert(PRESETS[f"base_{task}"])
        tuned = {key: torch.empty(shape) for key, shape in variants[task][2].items()}
        parts = heads_of(model, tuned, task)
    coverage = KEYS[f"{task}_start"].load(keys, {"encoder": model, **parts})
    assert coverage.complete
    moved = {ours: theirs for ours, (theirs, *_) in coverage.mapped.items() if not ours.startswith("encoder.")}
    expected = {
        "vqa": {
            f"classifier.transform.{n}": f"vlbert.mlm_head.predictions.transform.{n.replace('norm', 'LayerNorm')}"
            for n in _TRANSFORM
        },
        "refcoco": {f"regions.transform.{n}": f"vlbert.mvrc_head.transform.{n}" for n in _TRANSFORM[:2]},
        "vcr": {f"objects.transform.{n}": f"vlbert.mvrc_head.transform.{n}" for n in _TRANSFORM[:2]},
    }
    assert moved == expected[task]


_TRANSFORM = ("dense.weight", "dense.bias", "norm.weight", "norm.bias")


def recorded(golden: Path, case: str) -> dict[str, Tensor]:
    """A recorded state dict in a released layout; a task's is cut from the pre-trained one as config.json says."""
    folder = golden / "vlbert"
    whole = load_file(folder / "pretrain_single" / "state_dict.safetensors")
    if case == "official":
        return whole | load_file(folder / "pretrain_multitask" / "extra_state.safetensors")
    kept = ("image_feature_extractor.", "object_linguistic_embeddings.", "vlbert.")
    encoder = {
        key: tensor
        for key, tensor in whole.items()
        if key.startswith(kept) and "_head." not in key and "pooler" not in key
    }
    if case == "vcr":
        encoder = {key.replace("vlbert.", "vlbert._module."): tensor for key, tensor in encoder.items()}
    return encoder | load_file(folder / case / "head_state.safetensors")


@pytest.mark.parametrize("layout", ["official", "vqa", "refcoco", "vcr"])
def test_recorded_files_are_written_back_bit_for_bit(golden: Path, layout: str) -> None:
    source = recorded(golden, layout)
    ours, coverage = KEYS[layout].convert(source)
    assert coverage.complete
    assert not coverage.dropped
    written = KEYS[layout].invert(ours)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in written)


def test_module_names_follow_the_key_map(golden: Path) -> None:
    modules = KEYS["official"].modules(recorded(golden, "official"))
    assert modules["vlbert.encoder.layer.1.attention.output.dense"] == "encoder.layers.1.self_attention.output"
    assert modules["image_feature_extractor.obj_downsample.1"] == "encoder.projection.linear"
    assert modules["vlbert.visual_ln_object"] == "encoder.embeddings.visual_regions.norm"


def test_wrong_sizes_are_refused_with_both_shapes(golden: Path) -> None:
    model = tiny(num_layers=3, max_positions=40, max_tokens=38, feature_size=20, coordinate_size=5)
    before = model.embeddings.norm.weight.clone()
    with pytest.raises(CheckpointError, match=r"encoder.projection.linear.weight \(32, 44\) -> \(32, 60\)"):
        KEYS["official"].load(recorded(golden, "official"), {"encoder": model})
    assert torch.equal(model.embeddings.norm.weight, before)
