"""ViLBERT's own promises: embeddings, schedules, task tokens, shared texts, dropout sites, initialisation, start from
BERT, released key layouts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
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
from visling.boxes import locate
from visling.checkpoints import catalog
from visling.errors import CheckpointError, ConfigError
from visling.models.vilbert import PRESETS, Vilbert, VilbertConfig, inputs, volta_keys
from visling.nn import heads
from visling.objectives.base import PretrainStep
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import soft_class_kl_loss
from visling.objectives.matching import Matching
from visling.types import IGNORE, Batch, Dims, Head, Regions, Slots, Targets, Text

SPEC = models.spec("vilbert")
KEYS, STYLES = SPEC.keys, SPEC.head_styles
TINY = PRESETS["tiny"]
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}
RELEASED_BY_DEPTH = {2: 160_782_973, 4: 205_413_501, 6: 250_044_029, 8: 294_674_557}
DEAD_PER_CO_ATTENTION = 11_020_800 // 6
"""Weights in the files that the release never applies (`q_dense1`, `q_dense2`)."""


def tiny(**changes: Any) -> Vilbert:
    """With weights away from their symmetric start."""
    model = Vilbert(dataclasses.replace(TINY, vocab_size=50, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch_of(
    config: VilbertConfig,
    *,
    tokens: int = 4,
    regions: int = 3,
    counts: tuple[int, int] | None = None,
    whole: bool = False,
    **text: Any,
) -> Batch:
    corners = torch.rand(2, regions, 2) * 0.5
    task = {"task": torch.tensor([1, 0])} if config.num_tasks else {}
    return Batch(
        text=Text(
            ids=torch.randint(1, 50, (2, tokens)),
            mask=torch.arange(tokens) < torch.tensor([[tokens], [tokens - 1]]),
            segments=torch.randint(0, 2, (2, tokens)),
            **(task | text),
        ),
        regions=Regions(
            features=torch.randn(2, regions, config.feature_size),
            boxes=torch.cat([corners, corners + 0.3], dim=-1),
            mask=torch.arange(regions) < torch.tensor(counts or (regions, regions))[:, None],
            size=torch.ones(2, 2),
            whole=torch.randn(2, config.feature_size) if whole else None,
        ),
    )


def regions_of(batch: Batch) -> Regions:
    assert batch.regions is not None
    return batch.regions


def pretraining_heads(dims: Dims, words: nn.Embedding, classes: int = 1601) -> dict[str, nn.Module]:
    wanted = {
        "vocabulary": Head(kind="vocabulary", outputs=words.num_embeddings),
        "matching": Head(kind="classify", outputs=2),
        "region_targets": Head(kind="region_targets", outputs=classes, options={"classes": classes}),
    }
    return {part: build(part, head, "multitask", dims, words) for part, head in wanted.items()}


def build(part: str, head: Head, layout: str, dims: Dims, words: nn.Embedding | None = None) -> nn.Module:
    """A head as a catalogued file wants it: by its part if the table names that, else by its kind."""
    style = STYLES.get((layout, part)) or STYLES[layout, head.kind]
    return heads.build(head, dims, style=style, words=words, group=2 if head.kind == "pair" else 1)


def on_meta(
    preset: VilbertConfig | str, added: Mapping[str, Head] | None = None, layout: str = "multitask"
) -> dict[str, nn.Module]:
    """Encoder, pre-training heads and others at full size, without memory."""
    with torch.device("meta"):
        model = Vilbert(PRESETS[preset] if isinstance(preset, str) else preset)
        parts: dict[str, nn.Module] = {"encoder": model, **pretraining_heads(model.dims, model.word_embeddings)}
        return parts | {part: build(part, head, layout, model.dims) for part, head in (added or {}).items()}


def number_of_weights(parts: Mapping[str, nn.Module]) -> int:
    return sum(parameter.numel() for module in parts.values() for parameter in module.parameters())


def test_region_embedding_term_by_term() -> None:
    model = tiny(whiten_features=False)
    batch = batch_of(model.config, counts=(3, 2))
    regions = regions_of(batch)
    states = model(batch, capture=True).states["region_embeddings"]
    assert states.shape == (2, 4, model.config.region_hidden_size)
    expected = model.region_norm(
        model.projection(regions.features[0, 2]) + model.box_projection(locate(regions.boxes)[0, 2])
    )
    assert_close(states[0, 2], expected)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    whole = model.region_norm(
        model.projection(regions.features[1, :2].mean(0)) + model.box_projection(box)
    )  # the padded region does not count
    assert_close(states[1, 3], whole)


def test_a_given_whole_image_replaces_the_mean() -> None:
    model = tiny()
    batch = batch_of(model.config, whole=True)
    without = dataclasses.replace(batch, regions=dataclasses.replace(regions_of(batch), whole=None))
    mean = dataclasses.replace(
        batch, regions=dataclasses.replace(regions_of(batch), whole=regions_of(batch).features.mean(1))
    )
    assert not torch.allclose(model(batch).pooled, model(without).pooled)
    assert_close(model(mean).pooled, model(without).pooled)


def test_whitening_reaches_regions_and_the_whole_image() -> None:
    model = tiny(whiten_features=True)
    sample = torch.randn(500, model.config.feature_size) * 7 + 3
    batch = batch_of(model.config)
    before = model(batch).whole
    model.fit_features(sample)
    assert model.region_features.whiten is not None
    features = model.region_features.whiten(regions_of(batch).features)
    plain = tiny(whiten_features=False)
    plain.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("region_features")}
    )
    white = dataclasses.replace(batch, regions=dataclasses.replace(regions_of(batch), features=features))
    assert_close(model(batch).whole, plain(white).whole)
    assert not torch.allclose(model(batch).whole, before)


def test_task_token_has_no_position_and_no_segment() -> None:
    model = tiny(num_tasks=3)
    states = model(batch_of(model.config), capture=True).states["text_embeddings"]
    assert states.shape[1] == 5
    assert model.tasks is not None
    assert_close(states[:, 4], model.text_norm(model.tasks.weight[torch.tensor([1, 0])]))
    assert model(batch_of(model.config)).text.shape[1] == 4


def test_task_changes_the_answer_and_must_be_told() -> None:
    model = tiny(num_tasks=3)
    batch = batch_of(model.config)
    other = dataclasses.replace(batch, text=dataclasses.replace(batch.text, task=torch.tensor([2, 2])))
    assert not torch.allclose(model(batch).pooled, model(other).pooled)
    with pytest.raises(ConfigError, match="has 3 task tokens, and the texts name no task"):
        model(dataclasses.replace(batch, text=dataclasses.replace(batch.text, task=None)))
    with pytest.raises(ConfigError, match="has 0 task tokens, and the texts name a task"):
        tiny()(batch)


def test_summary_reads_the_slot_and_the_whole_image() -> None:
    model = tiny()
    batch = batch_of(model.config)
    at_slot = model(dataclasses.replace(batch, text=dataclasses.replace(batch.text, answer_at=torch.tensor([2, 1]))))
    image = model.region_pooler(at_slot.whole).relu()
    assert_close(
        at_slot.pooled, model.text_pooler(torch.stack([at_slot.text[0, 2], at_slot.text[1, 1]])).relu() * image
    )
    assert_close(model(batch).pooled, model.text_pooler(at_slot.text[:, 0]).relu() * image)


def order_of_layers(config: VilbertConfig) -> list[str]:
    small = {
        "hidden_size": 12,
        "intermediate_size": 12,
        "region_hidden_size": 8,
        "region_intermediate_size": 8,
        "pooled_size": 4,
    }
    small |= {
        "num_heads": 1,
        "num_region_heads": 1,
        "co_attention_size": 8,
        "num_co_attention_heads": 1,
        "vocab_size": 50,
        "feature_size": 3,
    }
    model = Vilbert(dataclasses.replace(config, num_tasks=0, **small)).eval()
    order: list[str] = []
    for letter, layers in (("T", model.text_layers), ("V", model.region_layers), ("C", model.co_attention_layers)):
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, name=f"{letter}{number}": order.append(name))
    model(batch_of(model.config))
    return order


@pytest.mark.parametrize(
    ("preset", "first", "last"),
    [("connect2", 10, 12), ("connect4", 8, 12), ("connect6", 6, 12), ("large_connect6", 18, 24)],
)
def test_released_schedules(preset: str, first: int, last: int) -> None:
    """Text alone first; then each co-attention, and after it one layer of either stream."""
    order = order_of_layers(PRESETS[preset])
    assert order[: first + 1] == [*(f"T{number}" for number in range(first)), "C0"]
    rest = order[first + 1 :]
    blocks = [rest[at : at + 3] for at in range(0, len(rest), 3)]
    assert len(blocks) == last - first
    for number, block in enumerate(blocks):
        following = {f"C{number + 1}"} if number + 1 < len(blocks) else set()
        assert set(block) == {f"T{first + number}", f"V{number}"} | following
        assert not following or block[2] in following


def test_a_text_for_many_images_is_encoded_once_up_to_the_first_co_attention() -> None:
    model = tiny(num_layers=3, text_layers_before=(2, 3), num_tasks=3)
    batch = batch_of(model.config, answer_at=torch.tensor([1, 2]))
    row = torch.tensor([1, 1, 1, 0, 1])
    repeated = batch.map(lambda tensor: tensor[row])
    shared = dataclasses.replace(repeated, text=dataclasses.replace(batch.text, row=row))
    rows: dict[str, int] = {}
    for number, layer in enumerate(model.text_layers):
        layer.register_forward_pre_hook(
            lambda _, arguments, name=number: rows.__setitem__(name, len(arguments[1].mask))
        )
    assert_close(model(shared).pooled, model(repeated).pooled)
    model(shared)
    assert rows == {0: 2, 1: 2, 2: 5}
    states = model(shared, capture=True).states
    assert {len(state) for state in states.values()} == {5}


def test_maps_and_states_by_stream() -> None:
    model = tiny(num_tasks=2)
    encoded = model(batch_of(model.config), capture=True)
    maps = encoded.maps
    assert maps.text_to_text.keys() == {"text_layers.0", "text_layers.1"}
    assert maps.regions_to_regions.keys() == {"region_layers.0", "region_layers.1"}
    assert (
        maps.text_to_regions.keys() == maps.regions_to_text.keys() == {"co_attention_layers.0", "co_attention_layers.1"}
    )
    assert maps.text_to_text["text_layers.0"].shape == (2, 2, 5, 5)  # four tokens and the task
    assert maps.text_to_regions["co_attention_layers.0"].shape == (2, 4, 5, 4)  # three regions and the whole image
    for quadrant in (maps.text_to_text, maps.regions_to_regions, maps.text_to_regions, maps.regions_to_text):
        for probs in quadrant.values():
            assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))
    assert_close(encoded.states["text_layers.1"][:, :4], encoded.text)
    assert_close(encoded.states["region_layers.1"][:, 3], encoded.whole)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (3, 1)])
def test_rows_with_few_regions_are_finite(gated: bool, counts: tuple[int, int]) -> None:
    model = tiny(gated_regions=gated, num_tasks=2)
    batch = batch_of(model.config, counts=counts)
    encoded = model(batch)
    (encoded.pooled.sum() + encoded.text.sum() + encoded.whole.sum()).backward()
    assert encoded.pooled.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    other = dataclasses.replace(
        batch,
        regions=dataclasses.replace(
            regions_of(batch), features=regions_of(batch).features.masked_fill(~regions_of(batch).mask[..., None], 9.0)
        ),
    )
    assert_close(model(other).pooled, encoded.pooled)
    if counts == (0, 0):
        assert_close(model(dataclasses.replace(batch, regions=None)).pooled, encoded.pooled)


def test_texts_alone_with_shared_rows() -> None:
    model, row = tiny(), torch.tensor([1, 0, 1])
    batch = dataclasses.replace(batch_of(model.config), regions=None)
    shared = dataclasses.replace(batch, text=dataclasses.replace(batch.text, row=row))
    assert_close(model(shared).pooled, model(batch).pooled[row])
    assert model(shared).regions.shape == (3, 0, model.dims.regions)


@pytest.mark.parametrize(
    "changes",
    [{"gated_regions": True, "num_tasks": 2}, {"fusion": "sum", "text_layers_before": (), "region_layers_before": ()}],
)
def test_options_compile_and_give_gradients_to_every_weight(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    batch = batch_of(model.config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    encoded = model(batch)
    assert_close(compiled(batch).pooled, encoded.pooled)
    assert_close(model(batch, capture=True).pooled, encoded.pooled)
    (encoded.pooled.square().sum() + encoded.text[..., 0].sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_rows_without_a_label_cost_nothing() -> None:
    model = tiny()
    batch = batch_of(model.config)
    encoded = model(batch)
    objectives = (
        MaskedLM(model.dims, "bert", model.word_embeddings),
        Matching(model.dims, "match_first", model.word_embeddings),
    )
    none = torch.zeros(2, 3, dtype=torch.bool)
    targets = Targets(
        token_slots=Slots(at=torch.zeros(2, 3, dtype=torch.int64), mask=none),
        token_ids=torch.zeros(2, 3, dtype=torch.int64),
        matched=torch.full((2,), IGNORE),
    )
    step = PretrainStep(model=model, batch=batch, encoded=encoded, targets=targets)
    told = pretraining_heads(model.dims, model.word_embeddings, 5)["region_targets"](encoded.regions)["classes"]
    value = (
        objectives[0](step).value
        + objectives[1](step).value
        + soft_class_kl_loss(told, torch.rand(2, 3, 5), none).value
    )
    assert value == 0
    value.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


# Dropout sites: every dropout becomes a fixed factor, and the model must equal a reference written from the release's
# description.


class Reference:
    """ViLBERT's forward in float64, `kept` after dense layers and embeddings, `seen` on attention probabilities; tokens
    in the release's order."""

    def __init__(self, model: Vilbert, *, kept: float, seen: float) -> None:
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.config, self.kept, self.seen = model.config, kept, seen

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(
        self, name: str, x: Tensor, y: Tensor, mask: Tensor, num_heads: int, gates: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        query, key, value = (
            self.linear(f"{name}.attention.{part}", states) for part, states in (("query", x), ("key", y), ("value", y))
        )
        if gates is not None:
            query, key = query * gates[0], key * gates[1]
        context = []
        for q, k, v in zip(*(part.chunk(num_heads, dim=-1) for part in (query, key, value)), strict=True):
            scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + (1 - mask[:, None].double()) * -10000.0
            context.append(scores.softmax(-1) * self.seen @ v)
        return self.norm(f"{name}.norm", self.linear(f"{name}.output", torch.cat(context, dim=-1)) * self.kept + x)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        wide = self.linear(f"{name}.up", x)
        wide = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
        return self.norm(f"{name}.norm", self.linear(f"{name}.down", wide) * self.kept + x)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Text states, region states (whole image first), summary."""
        w, config, text_batch, region_batch = self.weights, self.config, batch.text, regions_of(batch)
        words = w["embeddings.words.weight"][text_batch.ids] + w["embeddings.segments.weight"][text_batch.segments]
        words = words + w["embeddings.positions.weight"][: words.shape[1]]
        assert text_batch.task is not None
        text = torch.cat([words[:, :1], w["tasks.weight"][text_batch.task][:, None], words[:, 1:]], dim=1)
        text = self.norm("text_norm", text) * self.kept
        text_mask = torch.cat(
            [text_batch.mask[:, :1], torch.ones(2, 1, dtype=torch.bool), text_batch.mask[:, 1:]], dim=1
        )
        features = region_batch.features.double() * region_batch.mask[..., None]
        mean = features.sum(1, keepdim=True) / region_batch.mask.sum(1)[:, None, None]
        boxes = torch.cat([torch.tensor([0.0, 0, 1, 1]).expand(2, 1, 4), region_batch.boxes], dim=1).double()
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        regions = self.linear("projection", torch.cat([mean, features], dim=1))
        regions = regions + self.linear("box_projection", torch.cat([boxes, area[..., None]], dim=-1))
        regions = self.norm("region_norm", regions) * self.kept
        region_mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), region_batch.mask], dim=1)

        def text_layer(number: int, x: Tensor) -> Tensor:
            x = self.attend(f"text_layers.{number}.self_attention", x, x, text_mask, config.num_heads)
            return self.feed_forward(f"text_layers.{number}.feed_forward", x)

        def region_layer(number: int, x: Tensor) -> Tensor:
            gates = None
            if config.gated_regions:
                mean = (text * text_mask[..., None]).sum(1, keepdim=True) / text_mask.sum(1)[:, None, None]
                made = [
                    1 + torch.sigmoid(self.linear(f"region_layers.{number}.{name}_gate", mean))
                    for name in ("query", "key")
                ]
                gates = (made[0], made[1])
            x = self.attend(f"region_layers.{number}.self_attention", x, x, region_mask, config.num_region_heads, gates)
            return self.feed_forward(f"region_layers.{number}.feed_forward", x)

        def meet(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            name, num_heads = f"co_attention_layers.{number}", config.num_co_attention_heads
            new_x = self.attend(f"{name}.text_attention", x, y, region_mask, num_heads)
            new_y = self.attend(f"{name}.region_attention", y, x, text_mask, num_heads)
            return self.feed_forward(f"{name}.text_feed_forward", new_x), self.feed_forward(
                f"{name}.region_feed_forward", new_y
            )

        # the tiny preset, spelled out: C0, T0, V0, C1, V1, T1
        assert (config.text_layers_before, config.region_layers_before) == ((0, 1), (0, 1))
        text, regions = meet(0, text, regions)
        text = text_layer(0, text)
        regions = region_layer(0, regions)
        text, regions = meet(1, text, regions)
        regions = region_layer(1, regions)
        text = text_layer(1, text)
        pooled = self.linear("text_pooler", text[:, 0]).clamp(min=0) * self.linear(
            "region_pooler", regions[:, 0]
        ).clamp(min=0)
        return torch.cat([text[:, :1], text[:, 2:]], dim=1), regions, pooled


@pytest.fixture
def fixed_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout of rate p multiplies by 1 - p."""
    fix_dropout(monkeypatch, lambda rate: 1 - rate)


@pytest.mark.usefixtures("fixed_dropout")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_dropout_site(gated: bool, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_by(monkeypatch, way)
    model = (
        tiny(dropout_rate=0.25, attention_dropout_rate=0.4, num_tasks=2, gated_regions=gated, whiten_features=False)
        .double()
        .train()
    )
    batch = batch_of(model.config, counts=(3, 2))
    batch = dataclasses.replace(
        batch, regions=dataclasses.replace(regions_of(batch), boxes=regions_of(batch).boxes.double())
    )
    encoded = model(batch, capture=way == "captured")
    text, regions, pooled = Reference(model, kept=0.75, seen=0.6)(batch)
    assert_close(encoded.text[batch.text.mask], text[batch.text.mask], **EXACT)
    assert_close(encoded.regions[regions_of(batch).mask], regions[:, 1:][regions_of(batch).mask], **EXACT)
    assert_close(encoded.whole, regions[:, 0], **EXACT)
    assert_close(encoded.pooled, pooled, **EXACT)


@pytest.mark.usefixtures("fixed_dropout")
@pytest.mark.parametrize(("kept", "seen"), [(0.76, 0.6), (0.75, 0.61), (1.0, 1.0)])
def test_the_reference_notices_each_rate(kept: float, seen: float) -> None:
    model = tiny(dropout_rate=0.25, attention_dropout_rate=0.4, num_tasks=2, whiten_features=False).double().train()
    batch = batch_of(model.config)
    expected = Reference(model, kept=kept, seen=seen)(batch)[0]
    assert not torch.allclose(model(batch).text[batch.text.mask], expected[batch.text.mask], **EXACT)


@pytest.mark.usefixtures("fixed_dropout")
def test_dropout_sites_of_the_heads() -> None:
    dims = Dims(text=6, regions=4, pooled=6)
    pooled, states = torch.randn(4, 6), torch.randn(2, 3, 4)

    def made(kind: Any, style: str, outputs: int = 2, **options: int) -> Any:
        head: Any = heads.build(
            Head(kind=kind, outputs=outputs, options=options), dims, style=style, group=2 if kind == "pair" else 1
        )
        for parameter in head.parameters():
            nn.init.normal_(parameter)
        return head.train()

    classify = made("classify", "vilbert")
    assert_close(classify(pooled), classify.linear(classify.norm(F.gelu(classify.dense(pooled * 0.9)))))
    assert classify.dense.out_features == 12
    assert made("classify", "vilbert", hidden_size=5).dense.out_features == 5
    pair = made("pair", "vilbert")
    assert_close(pair(pooled)[1], pair.linear(pair.norm(F.gelu(pair.dense(pooled[2:].flatten() * 0.9)))))
    match = made("classify", "match_first")
    assert_close(match(pooled)[:, 1], match.linear(pooled * 0.9)[:, 0])
    first = made("classify", "weight_norm")

    def normed(layer: Any, x: Tensor) -> Tensor:
        return x @ (layer.direction * layer.gain / layer.direction.square().sum().sqrt()).T + layer.bias

    assert_close(first(pooled), normed(first.output, normed(first.dense, pooled * 0.9).relu() * 0.5))
    regions = made("regions", "linear", 1)
    assert_close(regions(states), regions.linear(states * 0.9)[..., 0])
    deep = made("regions", "deep", 1)
    assert_close(deep(states), deep.output(F.gelu(deep.dense(states * 0.9)) * 0.9)[..., 0])
    told = made("region_targets", "bert", 3, classes=3, features=5)
    assert {name: value.shape for name, value in told(states).items()} == {"classes": (2, 3, 3), "features": (2, 3, 5)}
    with pytest.raises(ConfigError, match="outputs must be 2; found 3"):
        made("classify", "match_first", 3)


@pytest.mark.parametrize("std", [0.02, 0.06])
def test_initialisation_by_group(std: float) -> None:
    """Matrices and tables normal with one deviation in both streams (`v_initializer_range` is never read), biases 0,
    norms 1 and 0."""
    model = Vilbert(dataclasses.replace(PRESETS["scenes"], init_std=std, num_tasks=20, gated_regions=True))
    seen = set()
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.LayerNorm):
            assert torch.equal(
                parameter, torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
            ), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            error = 4 / (2 * parameter.numel()) ** 0.5  # four standard errors
            assert abs(parameter.std().item() / std - 1) < error, name
            assert abs(parameter.mean().item()) < 4 * std / parameter.numel() ** 0.5, name
            seen.add(name.split(".")[0])
    assert seen >= {
        "embeddings",
        "tasks",
        "projection",
        "box_projection",
        "text_layers",
        "region_layers",
        "co_attention_layers",
        "text_pooler",
    }


def test_initialisation_of_weight_normalised_matrices() -> None:
    head: Any = build("classifier", Head(kind="classify", outputs=40), "first", Dims(text=8, regions=8, pooled=64))
    for layer, width in ((head.dense, 64), (head.output, 128)):
        assert_close(layer.gain, layer.direction.norm())
        assert not layer.bias.any()
        assert layer.direction.abs().max() <= width**-0.5
        assert abs(layer.direction.std().item() * (3 * width) ** 0.5 - 1) < 0.05


def test_released_sizes() -> None:
    for depth, weights in RELEASED_BY_DEPTH.items():
        assert number_of_weights(on_meta(f"connect{depth}")) == weights - depth * DEAD_PER_CO_ATTENTION
    multitask = catalog.find("vilbert-multi-task_multi_task_model")
    unread = 768 + 1  # `linguisic_logit`
    assert number_of_weights(on_meta("multitask", multitask.heads)) == 268_028_859 - 6 * DEAD_PER_CO_ATTENTION - unread
    assert abs(number_of_weights(on_meta("ctrl", layout="volta")) - 242.1e6) < 0.1e6
    assert abs(number_of_weights(on_meta("connect6", layout="volta")) - 239.0e6) < 0.1e6
    assert number_of_weights({"encoder": Vilbert(PRESETS["scenes"])}) < 750_000


def test_input_spec_follows_the_config() -> None:
    spec = inputs(PRESETS["referring"])
    assert (spec.feature_size, spec.max_regions, spec.max_tokens, spec.answer_slot, spec.pair) == (
        2048,
        99,
        20,
        "none",
        "rows",
    )
    assert inputs(PRESETS["scenes"]).vocabulary == "scenes"
    assert inputs(PRESETS["multitask"]).num_tasks == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 770}, "hidden_size must be a multiple of its number of heads; found 770 and 12"),
        ({"region_hidden_size": 1025}, "1025 and 8"),
        ({"co_attention_size": 1001}, "1001 and 8"),
        ({"text_layers_before": (7, 6, 8, 9, 10, 11)}, "text_layers_before must ascend"),
        ({"region_layers_before": (0, 1, 2, 3, 4, 7)}, "within the 6 layers"),
        ({"text_layers_before": (6, 7)}, "found 2 and 6"),
        ({"max_tokens": 513}, "513 exceeds the 512"),
    ],
)
def test_impossible_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VilbertConfig(**changes)


def test_text_beyond_the_position_table_and_features_of_another_width() -> None:
    model = tiny(max_positions=8, max_tokens=8, num_tasks=2)
    with pytest.raises(ConfigError, match=r"9 tokens.*holds 8"):
        model(batch_of(model.config, tokens=9))
    assert (
        model(batch_of(model.config, tokens=8, regions=100)).pooled.isfinite().all()
    )  # neither task nor regions have a position
    with pytest.raises(ConfigError, match="17 wide; this model reads 16"):
        tiny()(batch_of(dataclasses.replace(TINY, feature_size=17)))
    wide = batch_of(TINY)
    with pytest.raises(ConfigError, match="5 wide; this model reads 16"):
        tiny()(dataclasses.replace(wide, regions=dataclasses.replace(regions_of(wide), whole=torch.randn(2, 5))))


def random_bert(config: VilbertConfig) -> dict[str, Tensor]:
    """A text-only BERT of the model's text sizes, in its oldest spelling."""
    width, wide = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (config.vocab_size, width),
        "bert.embeddings.position_embeddings.weight": (config.max_positions, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
        "bert.embeddings.LayerNorm.gamma": (width,),
        "bert.embeddings.LayerNorm.beta": (width,),
        "bert.pooler.dense.weight": (width, width),
        "bert.pooler.dense.bias": (width,),
        "cls.predictions.bias": (config.vocab_size,),
        "cls.predictions.transform.dense.weight": (width, width),
        "cls.predictions.transform.dense.bias": (width,),
        "cls.predictions.transform.LayerNorm.gamma": (width,),
        "cls.predictions.transform.LayerNorm.beta": (width,),
        "cls.seq_relationship.weight": (2, width),
        "cls.seq_relationship.bias": (2,),
    }
    for number in range(config.num_layers):
        prefix = f"bert.encoder.layer.{number}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{prefix}.{name}.weight": (width, width), f"{prefix}.{name}.bias": (width,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{prefix}.{name}.gamma": (width,), f"{prefix}.{name}.beta": (width,)}
        shapes |= {f"{prefix}.intermediate.dense.weight": (wide, width), f"{prefix}.intermediate.dense.bias": (wide,)}
        shapes |= {f"{prefix}.output.dense.weight": (width, wide), f"{prefix}.output.dense.bias": (width,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**tensors, "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}


def test_start_from_bert() -> None:
    model = tiny(num_tasks=2, gated_regions=True)
    parts = {"encoder": model, **pretraining_heads(model.dims, model.word_embeddings, 7)}
    source = random_bert(model.config)
    theirs = ("embeddings", "text_norm", "text_layers")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coverage = KEYS["bert"].load(source, parts)
    assert coverage.complete
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith(theirs), name
    assert coverage.dropped.keys() == {key for key in source if key.startswith(("bert.pooler", "cls.seq_relationship"))}
    assert torch.equal(
        model.get_parameter("text_layers.1.self_attention.attention.value.bias"),
        source["bert.encoder.layer.1.attention.self.value.bias"],
    )
    assert torch.equal(parts["vocabulary"].get_parameter("bias"), source["cls.predictions.bias"])
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.after_text_weights()  # nothing is copied into the region stream
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


def shapes_on_meta(*files: Path) -> dict[str, Tensor]:
    shapes = {key: shape for path in files for key, shape in json.loads(path.read_text()).items()}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_every_released_key_is_accounted_for(golden: Path) -> None:
    folder = golden / "vilbert"
    pretraining = shapes_on_meta(folder / "manifest_full.json")
    multitask = shapes_on_meta(folder / "manifest_full.json", folder / "manifest_full_vltasks_extra.json")
    assert (len(pretraining), len(multitask)) == (533, 560)
    dead = {key for key in pretraining if "q_dense" in key}
    assert len(dead) == 24
    tasks = catalog.find("vilbert-multi-task_multi_task_model").heads
    unread = {"linguisic_logit.weight", "linguisic_logit.bias"}
    for layout, keys, parts, dropped in (
        ("multitask", pretraining, on_meta("connect6"), dead),
        ("first", pretraining, on_meta("connect6"), dead),
        ("multitask", multitask, on_meta("multitask", tasks), dead | unread),
    ):
        coverage = KEYS[layout].load(keys, parts)
        filled = [key for sources in coverage.mapped.values() for key in sources]
        assert sorted([*filled, *coverage.tied, *coverage.dropped]) == sorted(keys)
        assert coverage.dropped.keys() == dropped
        assert not coverage.fresh


def test_every_key_of_voltas_full_size_is_accounted_for() -> None:
    """No list of them was recorded: their names come from the map itself, their number from VOLTA's modules."""
    for preset in ("ctrl", "connect6"):
        parts = on_meta(preset, layout="volta")
        ours = {
            f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()
        }
        theirs = KEYS["volta"].invert(ours)
        assert len({key.split(".")[3] for key in theirs if key.startswith("bert.encoder.layer")}) == 36
        text_only, both = {"0", "10"}, {"12", "34"}
        for at, streams in ((text_only, 1), (both, 2)):
            for number in at:
                assert (
                    len([key for key in theirs if key.startswith(f"bert.encoder.layer.{number}.attention")])
                    == 10 * streams
                )
        assert KEYS["volta"].load(theirs, parts).complete


@pytest.mark.parametrize(
    ("layout", "name"), [("multitask", "state_dict"), ("first", "state_dict"), ("multitask", "state_dict_vltasks")]
)
def test_recorded_files_are_written_back_bit_for_bit(golden: Path, layout: str, name: str) -> None:
    source = load_file(golden / "vilbert" / f"{name}.safetensors")
    ours, coverage = KEYS[layout].convert(source)
    assert coverage.complete
    assert {key.split(".")[-2] if "q_dense" in key else key.split(".")[0] for key in coverage.dropped} <= {
        "q_dense1",
        "q_dense2",
        "linguisic_logit",
    }
    written = KEYS[layout].invert(ours)
    assert written.keys() == source.keys() - coverage.dropped.keys()
    assert all(torch.equal(written[key], source[key]) for key in written)


def test_gates_have_names_in_the_release(golden: Path) -> None:
    extras = load_file(golden / "vilbert" / "state_dict_extras.safetensors")
    source = {
        key.removeprefix("dynamic_attention:"): tensor
        for key, tensor in extras.items()
        if key.startswith("dynamic_attention:")
    }
    ours, coverage = KEYS["multitask"].convert(source)
    assert coverage.complete
    assert len(ours) == 8
    written = KEYS["multitask"].invert(ours)
    assert all(torch.equal(written[key], tensor) for key, tensor in source.items())


def test_module_names_follow_the_key_map(golden: Path) -> None:
    modules = KEYS["multitask"].modules(load_file(golden / "vilbert" / "state_dict.safetensors"))
    assert (
        modules["bert.encoder.c_layer.1.biattention.query2"]
        == "encoder.co_attention_layers.1.text_attention.attention.query"
    )
    assert (
        modules["bert.encoder.c_layer.1.biattention.key2"]
        == "encoder.co_attention_layers.1.region_attention.attention.key"
    )
    assert modules["bert.v_embeddings.image_embeddings"] == "encoder.projection"


def test_the_other_releases_classifier_is_refused(golden: Path) -> None:
    source = load_file(golden / "vilbert" / "state_dict_vltasks.safetensors")
    with pytest.raises(CheckpointError, match=r"vil_prediction"):
        KEYS["first"].load(source, {"encoder": nn.Linear(1, 1)})


def test_voltas_numbering_needs_one_text_layer_after_each_co_attention() -> None:
    with pytest.raises(AssertionError, match="consecutive"):
        volta_keys((1, 3), 4)
