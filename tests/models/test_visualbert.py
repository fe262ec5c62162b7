"""VisualBERT's own promises: dropout sites, initialisation, configuration errors, region segments, alignment, spatial
values, late fusion, start from BERT, released key layouts."""

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
from torch.testing import assert_close

from visling import models
from visling.boxes import spatial_six
from visling.errors import CheckpointError, ConfigError
from visling.models.visualbert import PRESETS, VisualBert, VisualBertConfig, inputs
from visling.nn.embeddings import Whitening
from visling.nn.heads import build
from visling.nn.packing import Packing
from visling.types import Batch, Encoded, Head, Regions, Text

KEYS = models.spec("visualbert").keys
TINY = PRESETS["tiny"]
BERT_BIAS = "bert.encoder.layer.0.attention.self.value.bias"
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}


def tiny(**changes: Any) -> VisualBert:
    return VisualBert(dataclasses.replace(TINY, vocab_size=50, **changes)).eval()


def batch_of(config: VisualBertConfig, *, tokens: int = 4, regions: int = 3, **given: Any) -> Batch:
    corners = torch.rand(2, regions, 2) * 0.5
    return Batch(
        text=Text(
            ids=torch.randint(1, 50, (2, tokens)),
            mask=torch.ones(2, tokens, dtype=torch.bool),
            segments=torch.zeros(2, tokens, dtype=torch.int64),
        ),
        regions=Regions(
            features=torch.randn(2, regions, config.feature_size),
            boxes=torch.cat([corners, corners + 0.3], dim=-1),
            mask=torch.ones(2, regions, dtype=torch.bool),
            size=torch.ones(2, 2),
            **given,
        ),
    )


def heads_of(model: VisualBert, keys: dict[str, Tensor], head_size: int = 64) -> dict[str, nn.Module]:
    """A fresh head for every part that a released file holds besides the encoder."""
    wanted: dict[str, tuple[Head, str]] = {}
    names = {name.removeprefix("bert."): tensor for name, tensor in keys.items()}
    for name, tensor in names.items():
        if name in ("classifier.bias", "cls.bias"):
            kind: Any = "classify" if len(tensor) > 1 else "score"
            wanted["classifier"] = (Head(kind=kind, outputs=len(tensor)), "linear")
    if "cls.predictions.bias" in names:
        wanted["vocabulary"] = (Head(kind="vocabulary", outputs=model.config.vocab_size), "bert")
        wanted["matching"] = (Head(kind="classify", outputs=2), "plain")
    if "flickr_attention.query.bias" in names:
        wanted["slots_regions"] = (Head(kind="slots_regions", outputs=1, options={"head_size": head_size}), "flickr")
    return {
        part: build(head, model.dims, style=style, words=model.word_embeddings)
        for part, (head, style) in wanted.items()
    }


def region_sum(model: VisualBert, batch: Batch) -> Tensor:
    """What the shared norm sees of the regions."""
    seen: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(batch)
    hook.remove()
    assert batch.regions is not None
    rows = Packing.of(torch.cat([batch.text.mask, batch.regions.mask], dim=1))
    return rows.unpack(seen[0])[:, batch.text.ids.shape[1] :]


def random_bert(model: VisualBert) -> dict[str, Tensor]:
    """A text-only BERT of the model's sizes in its oldest spelling."""
    width, config = model.config.hidden_size, model.config
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
        wide = config.intermediate_size
        shapes |= {f"{prefix}.intermediate.dense.weight": (wide, width), f"{prefix}.intermediate.dense.bias": (wide,)}
        shapes |= {f"{prefix}.output.dense.weight": (width, wide), f"{prefix}.output.dense.bias": (width,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**tensors, "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}


Sites = Mapping[str, float]
"""Dropout site -> factor that stands in for it; a site of the additional layer has that layer's name before its own."""
SITES: Sites = {"embeddings": 0.5, "probs": 0.7, "attention": 0.5, "feed_forward": 0.5}
"""Hidden states go by half, probabilities by 0.7."""


def reference(model: VisualBert, batch: Batch, sites: Sites) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass written out from the paper and the release, with a fixed factor at every dropout site.

    Text and region states and the pooled state. Sites: once after the norm that text and regions share, on attention
    probabilities, after the output projection of an attention block and after the second matrix of a feed-forward
    block, both before the residual. None after the pooler.
    """
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    text, regions = batch.text, batch.regions
    assert regions is not None
    assert regions.image is not None
    assert batch.links is not None

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + model.config.norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def split(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], model.config.num_heads, -1).transpose(1, 2)

    def layer(name: str, x: Tensor, mask: Tensor) -> Tensor:
        probs, attention, feed_forward = (
            sites.get(f"{name}.{site}", sites[site]) for site in ("probs", "attention", "feed_forward")
        )
        query, key, value = (
            split(linear(f"{name}.self_attention.attention.{part}", x)) for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        read = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1) * probs @ value
        x = norm(
            f"{name}.self_attention.norm",
            x + linear(f"{name}.self_attention.output", read.transpose(1, 2).flatten(2)) * attention,
        )
        wide = linear(f"{name}.feed_forward.up", x)
        gelu = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
        return norm(f"{name}.feed_forward.norm", x + linear(f"{name}.feed_forward.down", gelu) * feed_forward)

    tables = {name: weights[f"embeddings.{name}.weight"] for name in ("words", "positions", "segments")}
    words = tables["words"][text.ids] + tables["positions"][: text.ids.shape[1]] + tables["segments"][text.segments]
    features = torch.cat(
        [regions.features, regions.boxes, regions.boxes[..., 2:] - regions.boxes[..., :2]], dim=-1
    ).double()
    things = (
        linear("projection", features)
        + weights["visual_segments.weight"][regions.image]
        + weights["visual_positions.weight"][0]
    )
    for row, word, region in batch.links.nonzero().tolist():
        things[row, region] += tables["positions"][word] / batch.links[row, :, region].sum()
    states = norm("norm", torch.cat([words, things], dim=1)) * sites["embeddings"]
    tokens, mask = text.ids.shape[1], torch.cat([text.mask, regions.mask], dim=1)
    layers = [f"layers.{number}" for number in range(model.config.num_layers)]
    if model.config.bypass:
        words, things = states[:, :tokens], states[:, tokens:]
        for name in layers:
            words = layer(name, words, text.mask)
        states = layer("additional_layer", torch.cat([words, things], dim=1), mask)
    else:
        for name in layers:
            states = layer(name, states, mask)
    return states[:, :tokens], states[:, tokens:], torch.tanh(linear("pooler.dense", states[:, 0]))


def double_precision(*, bypass: bool, **changes: Any) -> tuple[VisualBert, Batch]:
    """A model with weights away from their symmetric start, and a batch in which everything that regions may have is
    told."""
    model = tiny(bypass=bypass, whiten_features=False, append_spatial=True, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = batch_of(model.config, image=torch.tensor([[0, 1, 1], [1, 0, 0]]))
    assert batch.regions is not None
    links = torch.zeros(2, 4, 3, dtype=torch.bool)
    links[0, 1, 2] = links[0, 3, 2] = links[1, 2, 0] = True
    text = dataclasses.replace(
        batch.text, mask=torch.tensor([[True] * 4, [True] * 3 + [False]]), segments=torch.tensor([[0, 0, 1, 1]] * 2)
    )
    regions = dataclasses.replace(batch.regions, mask=torch.tensor([[True] * 3, [True] * 2 + [False]]))
    return model.double(), dataclasses.replace(batch, text=text, regions=regions, links=links)


def assert_states(encoded: Encoded, expected: tuple[Tensor, Tensor, Tensor], batch: Batch) -> None:
    """Text and region states at real positions, and the pooled state."""
    assert batch.regions is not None
    assert_close(encoded.text[batch.text.mask], expected[0][batch.text.mask], **EXACT)
    assert_close(encoded.regions[batch.regions.mask], expected[1][batch.regions.mask], **EXACT)
    assert_close(encoded.pooled, expected[2], **EXACT)


@pytest.fixture
def fixed_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in training is a fixed factor: 0.5 at a rate of 0.1, 0.7 at 0.2."""
    fix_dropout(monkeypatch, {0.1: 0.5, 0.2: 0.7}.__getitem__)


RATES: Mapping[str, float] = {"dropout_rate": 0.1, "attention_dropout_rate": 0.2}


@pytest.mark.usefixtures("fixed_dropout")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bypass", [False, True])
def test_dropout_stands_where_the_release_has_it(bypass: bool, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_by(monkeypatch, way)
    model, batch = double_precision(bypass=bypass, **RATES)
    for mode, sites in ((True, SITES), (False, dict.fromkeys(SITES, 1.0))):
        encoded = model.train(mode)(batch, capture=way == "captured")
        assert_states(encoded, reference(model, batch, sites), batch)


@pytest.mark.usefixtures("fixed_dropout")
@pytest.mark.parametrize(
    ("bypass", "site"),
    [
        *((False, site) for site in SITES),
        *((True, site) for site in SITES),
        *((True, f"additional_layer.{site}") for site in list(SITES)[1:]),
    ],
)
def test_every_dropout_site_counts(bypass: bool, site: str) -> None:
    model, batch = double_precision(bypass=bypass, **RATES)
    without = reference(model, batch, {**SITES, site: 1.0})[2]
    assert not torch.allclose(model.train()(batch).pooled, without, atol=1e-4)


@pytest.mark.parametrize("bypass", [False, True])
def test_evaluation_equals_the_reference(bypass: bool) -> None:
    model, batch = double_precision(bypass=bypass, **RATES)
    assert_states(model(batch), reference(model, batch, dict.fromkeys(SITES, 1.0)), batch)


def test_fresh_weights_by_group() -> None:
    """Matrices and tables N(0, 0.02), the visual ones too; biases 0; norms 1 and 0."""
    torch.manual_seed(0)
    changes: dict[str, Any] = {
        "hidden_size": 96,
        "num_layers": 2,
        "vocab_size": 3000,
        "feature_size": 64,
        "intermediate_size": 384,
        "bypass": True,
    }
    model = VisualBert(dataclasses.replace(PRESETS["flickr30k"], **changes))
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    drawn: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias":
            assert not parameter.any(), name
        elif owner in norms:
            assert (parameter == 1).all(), name
        else:
            values = parameter.detach().flatten()
            error = 5 / len(values) ** 0.5  # five standard errors, roughly
            assert abs(values.std() / 0.02 - 1) < error, name
            assert abs(values.mean() / 0.02) < error, name
            group = owner.split(".")[0]
            drawn[group] = drawn.get(group, 0) + 1
    assert drawn == {
        "embeddings": 3,
        "projection": 1,
        "visual_segments": 1,
        "visual_positions": 1,
        "layers": 12,
        "additional_layer": 6,
        "pooler": 1,
    }
    # Each table has values of its own until weights from elsewhere make copies of the text tables
    # (`after_text_weights`).
    assert not torch.equal(model.visual_segments.weight, model.embeddings.segments.weight)
    assert not torch.equal(model.visual_positions.weight, model.embeddings.positions.weight)
    assert PRESETS["vqa"].init_std == 0.02


def test_region_embedding_term_by_term() -> None:
    model = tiny()
    batch = batch_of(model.config, image=torch.tensor([[0, 1, 1], [1, 0, 0]]))
    assert batch.regions is not None
    links = torch.zeros(2, 4, 3, dtype=torch.bool)
    links[0, 1, 2] = links[0, 3, 2] = True
    batch = dataclasses.replace(batch, links=links)
    assert batch.regions is not None
    features = torch.cat([batch.regions.features, spatial_six(batch.regions.boxes)], dim=-1)
    positions = model.embeddings.positions.weight
    expected = (
        model.projection(features[0, 2])
        + model.visual_segments.weight[1]
        + model.visual_positions.weight[0]
        + (positions[1] + positions[3]) / 2
    )
    sums = region_sum(model, batch)
    assert_close(sums[0, 2], expected)
    assert_close(
        sums[1, 1],
        model.projection(features[1, 1]) + model.visual_segments.weight[0] + model.visual_positions.weight[0],
    )


def test_whitening_of_features_that_are_all_alike_takes_their_mean_away() -> None:
    whiten = Whitening(5)
    sample = torch.full((7, 5), 3.3)
    whiten.fit(sample)
    assert_close(whiten(sample), torch.zeros(7, 5), atol=1e-6, rtol=0)
    assert_close(whiten(sample + 1), torch.ones(7, 5), atol=1e-6, rtol=0)


def test_whitened_features_forget_their_scale_and_offset() -> None:
    batch = batch_of(tiny().config)
    assert batch.regions is not None
    sample = torch.randn(500, batch.regions.features.shape[-1]) @ torch.randn(
        batch.regions.features.shape[-1], batch.regions.features.shape[-1]
    )
    scaled = dataclasses.replace(
        batch, regions=dataclasses.replace(batch.regions, features=batch.regions.features * 50 + 3)
    )
    model = tiny()
    model.fit_features(sample)
    assert model.region_features.whiten is not None
    spread = torch.cov(model.region_features.whiten(sample).T)
    assert_close(spread, torch.diag(spread.diagonal()), atol=1e-3, rtol=0)
    assert 0.5 < spread.diagonal().max() <= 1.01
    before = region_sum(model, batch)
    model.fit_features(sample * 50 + 3)
    after = region_sum(model, scaled)
    # Each direction may come out with either sign; what it says does not depend on scale and offset.
    assert model.region_features.whiten(sample * 50 + 3).abs().allclose(_whitened(sample).abs(), atol=1e-2)
    assert before.shape == after.shape


def _whitened(sample: torch.Tensor) -> torch.Tensor:
    whiten = Whitening(sample.shape[-1])
    whiten.fit(sample)
    return whiten(sample)


@pytest.mark.parametrize("segment", [0, 1])
def test_region_segment_where_no_image_is_told(segment: int) -> None:
    model = tiny(region_segment=segment)
    batch = batch_of(model.config)
    assert batch.regions is not None
    told = dataclasses.replace(batch, regions=dataclasses.replace(batch.regions, image=torch.full((2, 3), segment)))
    assert_close(region_sum(model, batch), region_sum(model, told))


def test_boxes_are_seen_only_if_appended() -> None:
    for append in (True, False):
        model = tiny(append_spatial=append)
        batch = batch_of(model.config)
        assert batch.regions is not None
        moved = dataclasses.replace(batch, regions=dataclasses.replace(batch.regions, boxes=batch.regions.boxes * 0.5))
        assert torch.equal(model(batch).pooled, model(moved).pooled) != append


def test_slot_reads_the_raw_state_and_none_the_pooler() -> None:
    model = tiny()
    batch = batch_of(model.config)
    at_slot = model(dataclasses.replace(batch, text=dataclasses.replace(batch.text, answer_at=torch.tensor([2, 1]))))
    assert torch.equal(at_slot.pooled, torch.stack([at_slot.text[0, 2], at_slot.text[1, 1]]))
    assert_close(model(batch).pooled, torch.tanh(model.pooler.dense(at_slot.text[:, 0])))


def test_late_fusion_shows_regions_to_the_additional_layer_only() -> None:
    model = tiny(bypass=True)
    encoded = model(batch_of(model.config), capture=True)
    assert encoded.states is not None
    assert encoded.maps is not None
    assert encoded.states["layers.0"].shape[1] == 4
    assert encoded.states["additional_layer"].shape[1] == 7
    assert encoded.maps.text_to_regions["layers.0"].shape[-1] == 0
    assert encoded.maps.regions_to_text["additional_layer"].shape[2:] == (3, 4)


def test_released_widths() -> None:
    widths = {"vqa": 2048, "nlvr2": 1024, "vcr": 512, "flickr30k": 2054, "flickr30k_bypass": 2054}
    with torch.device("meta"):
        assert {name: VisualBert(PRESETS[name]).projection.in_features for name in widths} == widths


def test_input_spec_follows_the_config() -> None:
    spec = inputs(PRESETS["vqa"])
    assert (spec.feature_size, spec.max_regions, spec.max_tokens, spec.answer_slot, spec.pair) == (
        2048,
        100,
        128,
        "same_segment",
        "sequence",
    )
    assert inputs(PRESETS["nlvr2"]).max_regions == 144


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "30 and 4"),
        ({"region_segment": 2}, "region_segment"),
        ({"max_tokens": 513}, "513 exceeds the 512"),
    ],
)
def test_impossible_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisualBertConfig(**changes)


def test_text_beyond_the_position_table_and_features_of_another_width() -> None:
    model = tiny(max_positions=8, max_tokens=8)
    with pytest.raises(ConfigError, match=r"9 tokens.*holds 8"):
        model(batch_of(model.config, tokens=9))
    assert (
        model(batch_of(model.config, tokens=8, regions=100)).pooled.isfinite().all()
    )  # regions have no position of their own
    with pytest.raises(ConfigError, match="17 wide; this model reads 16"):
        model(batch_of(dataclasses.replace(TINY, feature_size=17)))


def test_start_from_bert() -> None:
    model = tiny(num_layers=1, bypass=True)
    pretraining = heads_of(
        model, {"cls.predictions.bias": torch.empty(50), "cls.seq_relationship.bias": torch.empty(2)}
    )
    source = random_bert(model)
    untouched = {
        n: t.clone()
        for n, t in model.state_dict().items()
        if n.startswith(("projection", "additional_layer", "visual_", "region_features"))
    }
    coverage = KEYS["bert"].load(source, {"encoder": model, **pretraining})
    assert coverage.complete
    assert {name.removeprefix("encoder.") for name in coverage.fresh} == untouched.keys()
    assert all(torch.equal(model.state_dict()[name], before) for name, before in untouched.items())
    assert torch.equal(model.norm.weight, source["bert.embeddings.LayerNorm.gamma"])
    assert torch.equal(model.get_parameter("layers.0.self_attention.attention.value.bias"), source[BERT_BIAS])
    assert torch.equal(model.pooler.dense.weight, source["bert.pooler.dense.weight"])
    assert torch.equal(pretraining["matching"].get_parameter("linear.bias"), source["cls.seq_relationship.bias"])
    model.after_text_weights()
    assert torch.equal(model.visual_segments.weight, source["bert.embeddings.token_type_embeddings.weight"])
    assert torch.equal(model.visual_positions.weight, source["bert.embeddings.position_embeddings.weight"])
    with torch.no_grad():
        model.visual_positions.weight.add_(1)  # copies, not views
    assert torch.equal(model.embeddings.positions.weight, source["bert.embeddings.position_embeddings.weight"])


def released(golden: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Key -> shape of every released variant at full size."""
    variants = json.loads((golden / "visualbert" / "manifest_full.json").read_text())
    first, base = next(iter(variants.items()))
    found = {first: base}
    for name, described in variants.items():
        if "removed" in described:
            found[name] = {
                key: shape
                for key, shape in {**base, **described["changed_or_added"]}.items()
                if key not in described["removed"]
            }
        elif name != first:
            found[name] = {**base, **described}
    return found


def full_size(variant: str, keys: dict[str, Tensor]) -> dict[str, nn.Module]:
    """The preset and heads for a variant, on whatever device is current."""
    preset = {"flickr": "flickr30k", "bypass": "vqa_bypass"}.get(variant.split("_")[0], variant.split("_")[0])
    model = VisualBert(PRESETS[preset])
    return {"encoder": model, **heads_of(model, keys)}


def test_every_released_key_is_accounted_for(golden: Path) -> None:
    variants = released(golden)
    assert len(variants) == 9
    for name, shapes in variants.items():
        keys = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        if name.startswith("vcr"):
            keys["detector.backbone.0.weight"] = torch.empty(64, 3, 7, 7, device="meta")
        with torch.device("meta"):
            parts = full_size(name, keys)
        coverage = KEYS["official"].load(keys, parts)
        filled = [key for sources in coverage.mapped.values() for key in sources]
        assert sorted([*filled, *coverage.tied, *coverage.dropped]) == sorted(keys), name
        assert not coverage.fresh, name
        assert set(coverage.dropped) == {
            key for key in keys if "flickr_attention.value" in key or key.startswith("detector.")
        }, name


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("official", ["state_dict"]),
        ("official", ["state_dict", "bypass/head_state"]),
        ("official", ["state_dict", "flickr/head_state"]),
        ("official", ["state_dict", "vqa/head_state"]),
        ("transformers", ["hf/state_dict"]),
        ("transformers", ["hf/state_dict", "hf/visual_reasoning/head_state"]),
    ],
)
def test_recorded_files_are_written_back_bit_for_bit(golden: Path, layout: str, files: list[str]) -> None:
    source = {
        key: tensor
        for name in files
        for key, tensor in load_file(golden / "visualbert" / f"{name}.safetensors").items()
    }
    ours, coverage = KEYS[layout].convert(source)
    assert coverage.complete
    written = KEYS[layout].invert(ours)
    assert written.keys() == source.keys() - coverage.dropped.keys()
    assert all(torch.equal(written[key], source[key]) for key in written)


def test_two_layouts_meet_in_the_same_weights(golden: Path) -> None:
    official, _ = KEYS["official"].convert(load_file(golden / "visualbert" / "state_dict.safetensors"))
    transformers, _ = KEYS["transformers"].convert(load_file(golden / "visualbert" / "hf" / "state_dict.safetensors"))
    assert official.keys() == transformers.keys()
    assert all(torch.equal(official[name], transformers[name]) for name in official)


def test_module_names_follow_the_key_map(golden: Path) -> None:
    modules = KEYS["official"].modules(load_file(golden / "visualbert" / "state_dict.safetensors"))
    assert modules["bert.bert.encoder.layer.1.attention.output.dense"] == "encoder.layers.1.self_attention.output"
    assert modules["bert.bert.embeddings.projection"] == "encoder.projection"


def test_wrong_preset_is_refused_with_both_shapes(golden: Path) -> None:
    source = load_file(golden / "visualbert" / "state_dict.safetensors")
    model = tiny(num_layers=3, num_heads=4, max_positions=24, max_tokens=24, feature_size=20)
    before = model.norm.weight.clone()
    with pytest.raises(CheckpointError, match=r"encoder.projection.weight \(32, 20\) -> \(32, 26\)"):
        KEYS["official"].load(source, {"encoder": model})
    assert torch.equal(model.norm.weight, before)
