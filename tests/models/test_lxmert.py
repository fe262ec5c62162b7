"""LXMERT's own promises: dropout sites, initialisation, shared and replaced layers, answer heads, start from BERT,
released key layouts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.attention_ways import WAYS, Way, attend_by, fix_dropout
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling import models
from visling.errors import CheckpointError, ConfigError
from visling.models.lxmert import PRESETS, Lxmert, LxmertConfig, inputs, volta_keys
from visling.nn.head_blocks import NormedClassifier
from visling.nn.heads import build
from visling.nn.trace import LayerTrace
from visling.objectives.base import PretrainStep
from visling.objectives.image_qa import ImageQA
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import MaskedRegions, RegionLosses
from visling.objectives.matching import Matching
from visling.types import IGNORE, Batch, Encoded, Head, Regions, Slots, Targets, Text

SPEC = models.spec("lxmert")
TINY = PRESETS["tiny"]
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}


def tiny(**changes: Any) -> Lxmert:
    """With weights away from their symmetric start."""
    model = Lxmert(dataclasses.replace(TINY, vocab_size=50, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch_of(
    config: LxmertConfig, *, tokens: int = 4, regions: int = 3, counts: tuple[int, int] | None = None
) -> Batch:
    corners = torch.rand(2, regions, 2) * 0.5
    return Batch(
        text=Text(
            ids=torch.randint(1, 50, (2, tokens)),
            mask=torch.arange(tokens) < torch.tensor([[tokens], [tokens - 1]]),
            segments=torch.randint(0, 2, (2, tokens)),
        ),
        regions=Regions(
            features=torch.randn(2, regions, config.feature_size),
            boxes=torch.cat([corners, corners + 0.3], dim=-1),
            mask=torch.arange(regions) < torch.tensor(counts or (regions, regions))[:, None],
            size=torch.ones(2, 2),
        ),
    )


def regions_of(batch: Batch) -> Regions:
    assert batch.regions is not None
    return batch.regions


Sites = Mapping[str, float]
"""Dropout site -> factor that stands in for it."""
SITES: Sites = {"text": 0.5, "regions": 0.5, "probs": 0.7, "attention": 0.5, "feed_forward": 0.5}
"""Hidden states go by half, probabilities by 0.7."""


def reference(model: Lxmert, batch: Batch, sites: Sites) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass written out from the paper and the release, with a fixed factor at every dropout site.

    Text and region states and the pooled state. Sites: after the norm of the text embedding, after the mean of the
    region embedding, on attention probabilities, after the output projection of an attention block and after the second
    matrix of a feed-forward block, both before the residual.
    """
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    text, regions = batch.text, regions_of(batch)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + model.config.norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def split(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], model.config.num_heads, -1).transpose(1, 2)

    def attend(name: str, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            split(linear(f"{name}.attention.{part}", z)) for part, z in (("query", x), ("key", y), ("value", y))
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        probs = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1) * sites["probs"]
        context = (probs @ value).transpose(1, 2).flatten(2)
        return norm(f"{name}.norm", x + linear(f"{name}.output", context) * sites["attention"])

    def feed_forward(name: str, x: Tensor) -> Tensor:
        wide = linear(f"{name}.up", x)
        gelu = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
        return norm(f"{name}.norm", x + linear(f"{name}.down", gelu) * sites["feed_forward"])

    tables = [weights[f"embeddings.{name}.weight"] for name in ("words", "positions", "segments")]
    words = tables[0][text.ids] + tables[1][: text.ids.shape[1]] + tables[2][text.segments]
    words = norm("norm", words) * sites["text"]
    for number in range(model.config.num_text_layers):
        name = f"text_layers.{number}"
        words = feed_forward(f"{name}.feed_forward", attend(f"{name}.self_attention", words, words, text.mask))
    features, boxes = regions.features.double(), regions.boxes.double()
    things = norm("region_embeddings.feature_norm", linear("region_embeddings.features", features))
    things = (
        (things + norm("region_embeddings.box_norm", linear("region_embeddings.boxes", boxes))) / 2 * sites["regions"]
    )
    for number in range(model.config.num_region_layers):
        name = f"region_layers.{number}"
        things = feed_forward(f"{name}.feed_forward", attend(f"{name}.self_attention", things, things, regions.mask))
    for number in range(model.config.num_cross_layers):
        name = f"cross_layers.{number}"
        told_words, told_things = (
            attend(f"{name}.cross_attention", words, things, regions.mask),
            attend(f"{name}.cross_attention", things, words, text.mask),
        )
        words = feed_forward(
            f"{name}.text_feed_forward", attend(f"{name}.text_self_attention", told_words, told_words, text.mask)
        )
        things = feed_forward(
            f"{name}.region_feed_forward",
            attend(f"{name}.region_self_attention", told_things, told_things, regions.mask),
        )
    return words, things, torch.tanh(linear("pooler.dense", words[:, 0]))


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> tuple[Lxmert, Batch]:
    """A model in double precision in training mode, whose dropout is a fixed factor: 0.5 for hidden states, 0.7 for
    probabilities."""
    model = tiny(dropout_rate=0.1, attention_dropout_rate=0.2, whiten_features=False).double().train()
    fix_dropout(monkeypatch, {0.1: 0.5, 0.2: 0.7}.__getitem__)
    return model, batch_of(model.config, counts=(3, 2))


def assert_states(encoded: Encoded, expected: tuple[Tensor, Tensor, Tensor], batch: Batch) -> None:
    """Text and region states at real positions, and the pooled state."""
    real = regions_of(batch).mask
    assert_close(encoded.text[batch.text.mask], expected[0][batch.text.mask], **EXACT)
    assert_close(encoded.regions[real], expected[1][real], **EXACT)
    assert_close(encoded.pooled, expected[2], **EXACT)


@pytest.mark.parametrize("way", WAYS)
def test_dropout_stands_where_the_release_has_it(
    dropped: tuple[Lxmert, Batch], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend_by(monkeypatch, way)
    model, batch = dropped
    assert_states(model(batch, capture=way == "captured"), reference(model, batch, SITES), batch)


@pytest.mark.parametrize("site", SITES)
def test_every_dropout_site_counts(dropped: tuple[Lxmert, Batch], site: str) -> None:
    model, batch = dropped
    without = reference(model, batch, {**SITES, site: 1.0})[2]
    assert not torch.allclose(model(batch, capture=True).pooled, without, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_equals_the_reference(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_by(monkeypatch, way)
    model = tiny(whiten_features=False).double()
    batch = batch_of(model.config, counts=(3, 2))
    expected = reference(model, batch, dict.fromkeys(SITES, 1.0))
    assert_states(model(batch, capture=way == "captured"), expected, batch)


def test_pooler_and_heads_have_no_dropout() -> None:
    model = tiny(dropout_rate=0.5)
    assert not [module for module in model.pooler.modules() if isinstance(module, nn.Dropout)]
    pooled = torch.randn(4, model.dims.pooled)
    for kind, group in (("classify", 1), ("pair", 2)):
        head = build(
            Head(kind=kind, outputs=3), model.dims, style=SPEC.head_styles["official", kind], group=group
        ).train()
        assert torch.equal(head(pooled), head.eval()(pooled))


def test_fresh_weights_by_group() -> None:
    torch.manual_seed(0)
    model = Lxmert(
        dataclasses.replace(PRESETS["base"], hidden_size=96, vocab_size=3000, feature_size=64, intermediate_size=384)
    )
    assert PRESETS["base"].init_std == 0.02
    groups: dict[str, list[Tensor]] = {"matrices": [], "tables": [], "biases": [], "norm scales": []}
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in (module.weight,)
    }
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            groups["biases"].append(parameter.detach().flatten())
        elif id(parameter) in norms:
            groups["norm scales"].append(parameter.detach())
        else:
            groups["tables" if name.startswith("embeddings") else "matrices"].append(parameter.detach().flatten())
    assert not torch.cat(groups["biases"]).any()
    assert (torch.cat(groups["norm scales"]) == 1).all()
    for name in ("matrices", "tables"):
        for values in groups[name]:
            error = 5 / len(values) ** 0.5  # five standard errors, roughly
            assert abs(values.std() / 0.02 - 1) < error, name
            assert abs(values.mean() / 0.02) < error, name
    for table in (model.embeddings.words, model.embeddings.positions, model.embeddings.segments):
        assert table.weight[0].std() > 0.01  # rows of padding_idx are not zeroed, as in the release
    head = build(Head(kind="classify", outputs=50), model.dims, style="gelu_norm")
    assert 0.018 < head.get_parameter("dense.weight").std() < 0.022
    assert not head.get_parameter("dense.bias").any()


@pytest.mark.parametrize(("regions", "counts"), [(1, (1, 1)), (3, (1, 0)), (3, (0, 0)), (0, (0, 0))])
def test_gradients_are_finite_with_one_region_or_none(regions: int, counts: tuple[int, int]) -> None:
    model = tiny(dropout_rate=0.1).train()
    encoded = model(batch_of(model.config, regions=regions, counts=counts))
    (encoded.pooled.sum() + encoded.text.square().sum() + encoded.regions.square().sum()).backward()
    assert encoded.pooled.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_rows_without_a_label() -> None:
    """Nothing is asked about any row: losses are zero, gradients are zero and finite."""
    model = tiny()
    batch, dims, words = batch_of(model.config), model.dims, model.word_embeddings
    losses = RegionLosses(
        classes="hard",
        num_classes=5,
        attributes=True,
        num_attributes=4,
        features="smooth_l1",
        feature_size=16,
        weighted=True,
        over="regions",
    )
    style = {kind: style for (layout, kind), style in SPEC.head_styles.items() if layout == "official"}
    objectives = [
        MaskedLM(dims, style["vocabulary"], words),
        Matching(dims, style["matching"], words),
        MaskedRegions(dims, style["region_targets"], words, losses=losses),
        ImageQA(dims, style["classify"], words, num_answers=7),
    ]
    none = Slots(at=torch.zeros(2, 3, dtype=torch.int64), mask=torch.zeros(2, 3, dtype=torch.bool))
    nothing = torch.full((2, 3), IGNORE)
    targets = Targets(
        token_slots=none,
        token_ids=nothing,
        matched=nothing[:, 0],
        class_slots=none,
        feature_slots=none,
        region_classes=nothing,
        region_attributes=nothing,
        region_weights=torch.ones(2, 3),
        attribute_weights=torch.ones(2, 3),
        region_features=regions_of(batch).features,
        answer=nothing[:, 0],
    )
    step = PretrainStep(model=model, batch=batch, encoded=model(batch), targets=targets)
    total = torch.stack([objective(step).value for objective in objectives]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert total == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_first_rows_are_read_but_get_no_gradient() -> None:
    model = tiny()
    batch = batch_of(model.config)
    batch = dataclasses.replace(
        batch, text=dataclasses.replace(batch.text, segments=torch.zeros_like(batch.text.segments))
    )
    weights = torch.randn(model.dims.pooled)
    (model(batch).pooled * weights).sum().backward()
    tables = model.embeddings
    assert tables.positions.weight.grad is not None
    assert tables.segments.weight.grad is not None
    assert tables.words.weight.grad is not None
    assert not tables.positions.weight.grad[0].any()
    assert tables.positions.weight.grad[1:4].abs().sum(-1).all()
    assert not tables.segments.weight.grad.any()  # a zero, not None: weight decay still moves it in the release
    assert tables.words.weight.grad[batch.text.ids[0]].abs().sum(-1).all()
    before = model(batch).pooled
    with torch.no_grad():
        tables.segments.weight[0, 0] += 1
    assert not torch.allclose(model(batch).pooled, before)


def test_one_block_reads_in_both_directions() -> None:
    model = tiny()
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.cross_layers[0]
    layer.get_submodule("cross_attention").register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[:2])
    )
    model(batch_of(model.config))
    (text, regions), (regions_too, text_too) = seen
    assert text is text_too  # both directions start from the states that enter the layer
    assert regions is regions_too


def test_slot_is_not_read() -> None:
    model = tiny()
    batch = batch_of(model.config)
    slotted = dataclasses.replace(batch, text=dataclasses.replace(batch.text, answer_at=torch.tensor([2, 1])))
    assert torch.equal(model(batch).pooled, model(slotted).pooled)


def test_streams_encoded_apart_can_be_handed_in() -> None:
    model = tiny()
    batch, row = batch_of(model.config, counts=(3, 2)), torch.tensor([0, 1, 1, 0])
    crossed = dataclasses.replace(
        batch,
        text=dataclasses.replace(batch.text, row=row),
        regions=dataclasses.replace(regions_of(batch), row=torch.tensor([0, 1, 0, 1])),
    )
    with torch.no_grad():
        expected = model(crossed)
        text, regions = model.encode_text(batch.text), model.encode_regions(regions_of(batch))
        for layers in (model.text_layers, model.region_layers):
            for layer in layers:
                layer.register_forward_pre_hook(lambda module, arguments: pytest.fail("computed again"))
        found = model(crossed, text_states=text, region_states=regions)
    assert torch.equal(found.pooled, expected.pooled)
    assert torch.equal(found.regions, expected.regions)


def test_captured_states_are_of_the_batch_rows() -> None:
    model = tiny()
    batch, row = batch_of(model.config), torch.tensor([0, 1, 1])
    shared = dataclasses.replace(batch.map(lambda tensor: tensor[row]), text=dataclasses.replace(batch.text, row=row))
    expected, found = model(batch.map(lambda tensor: tensor[row]), capture=True), model(shared, capture=True)
    assert expected.states.keys() == found.states.keys()
    for name, states in expected.states.items():
        assert_close(found.states[name], states)
    for name, probs in expected.maps.text_to_text.items():
        assert_close(found.maps.text_to_text[name], probs)


class _Halved(nn.Module):
    """Stands in for a layer of one stream."""

    def forward(self, states: Tensor, mask: Tensor, trace: LayerTrace | None = None) -> Tensor:
        return states / 2


def test_layers_can_be_skipped_and_replaced() -> None:
    model = tiny()
    batch = batch_of(model.config)
    plain = model(batch).pooled
    skipped = model(batch, replacements={"text_layers.1": None, "region_layers.1": None, "cross_layers.1": None}).pooled
    shorter = tiny(num_text_layers=1, num_region_layers=1, num_cross_layers=1)
    shorter.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "_layers.1." not in name})
    assert_close(skipped, shorter(batch).pooled)
    assert_close(
        model(batch, replacements={"text_layers.1": model.text_layers[0]}).pooled,
        _with(model, "text_layers", 1, model.text_layers[0], batch),
    )
    assert not torch.allclose(model(batch, replacements={"region_layers.0": _Halved()}, capture=True).pooled, plain)
    assert torch.equal(model(batch, replacements={}).pooled, plain)


def _with(model: Lxmert, stream: str, number: int, layer: nn.Module, batch: Batch) -> Tensor:
    """The pooled state with another layer in its list."""
    layers = model.get_submodule(stream)
    assert isinstance(layers, nn.ModuleList)
    kept = layers[number]
    layers[number] = layer
    pooled: Tensor = model(batch).pooled
    layers[number] = kept
    return pooled


def test_skipping_compiles() -> None:
    model = tiny()
    batch = batch_of(model.config)
    replacements = {"text_layers.1": None, "cross_layers.1": None}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(
        compiled(batch, replacements=replacements).pooled,
        model(batch, replacements=replacements).pooled,
        atol=1e-5,
        rtol=1e-5,
    )


def test_whitening_is_measured_and_used() -> None:
    model = tiny()
    batch = batch_of(model.config)
    before = model(batch).pooled
    model.fit_features(torch.randn(200, TINY.feature_size) * 5 + 2)
    assert not torch.allclose(model(batch).pooled, before)
    tiny(whiten_features=False).fit_features(torch.randn(200, TINY.feature_size))  # nothing to measure


def test_input_spec_follows_the_release() -> None:
    spec = inputs(PRESETS["base"])
    assert (spec.feature_size, spec.max_regions, spec.max_tokens, spec.answer_slot, spec.pair) == (
        2048,
        36,
        20,
        "none",
        "rows",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "30 and 4"),
        ({"max_tokens": 513}, "513 exceeds the 512"),
        ({"pooler": "gelu"}, "tanh, relu; found 'gelu'"),
    ],
)
def test_impossible_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LxmertConfig(**changes)


def test_errors_say_what_is_wrong() -> None:
    model = tiny(max_positions=8, max_tokens=8)
    with pytest.raises(ConfigError, match=r"9 tokens.*holds 8"):
        model(batch_of(model.config, tokens=9))
    with pytest.raises(ConfigError, match="17 wide; this model reads 16"):
        model(batch_of(dataclasses.replace(TINY, feature_size=17)))
    with pytest.raises(ConfigError, match=r"no layer 'text_layer.1'.*'text_layers.1'"):
        model(batch_of(TINY), replacements={"text_layer.1": None})


def parts_of(model: Lxmert, keys: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The encoder and a fresh head for every part that a released file holds besides it."""
    wanted: dict[str, tuple[Head, str]] = {}
    if "cls.predictions.bias" in keys:
        wanted["vocabulary"] = (Head(kind="vocabulary", outputs=model.config.vocab_size), "bert")
        wanted["matching"] = (Head(kind="classify", outputs=2), "plain")
    names = {"classes": "obj", "attributes": "attr", "features": "feat"}
    if "obj_predict_head.transform.dense.bias" in keys:
        widths = {ours: len(keys[f"obj_predict_head.decoder_dict.{theirs}.bias"]) for ours, theirs in names.items()}
        wanted["region_targets"] = (Head(kind="region_targets", outputs=sum(widths.values()), options=widths), "bert")
    for part, prefix in (("answers", "answer_head.logit_fc"), ("classifier", "logit_fc")):
        if f"{prefix}.3.bias" in keys:
            wanted[part] = (Head(kind="classify", outputs=len(keys[f"{prefix}.3.bias"])), "gelu_norm")
    built = {
        part: build(head, model.dims, style=style, words=model.word_embeddings)
        for part, (head, style) in wanted.items()
    }
    return {"encoder": model, **built}


def manifest(golden: Path, layout: str = "official") -> dict[str, Tensor]:
    """Every released key at full size, without values."""
    described = json.loads((golden / "lxmert" / "manifest_full.json").read_text())
    keys = {
        name: torch.empty(entry["shape"], device="meta") for name, entry in described["official"]["state_dict"].items()
    }
    assert len(keys) == described["official"]["n_keys"]
    if layout == "transformers":
        return {
            f"lxmert.{name.removeprefix('bert.')}" if name.startswith("bert.") else name: tensor
            for name, tensor in keys.items()
        }
    return keys


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_every_released_key_is_accounted_for(golden: Path, layout: str) -> None:
    keys = manifest(golden, layout)
    with torch.device("meta"):
        parts = parts_of(Lxmert(PRESETS["base"]), keys)
    coverage = SPEC.keys[layout].load(keys, parts)
    filled = [key for sources in coverage.mapped.values() for key in sources]
    assert sorted([*filled, *coverage.tied]) == sorted(keys)
    assert not coverage.fresh
    assert not coverage.dropped
    total = json.loads((golden / "lxmert" / "manifest_full.json").read_text())["official"][
        "n_parameters_tied_counted_once"
    ]
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in parts.items()}
    assert sum(sizes.values()) == total
    assert sizes["encoder"] == 207_936_768
    assert sizes["region_targets"] == 3_705_040
    assert sizes["answers"] == 15_785_756


def test_finetuned_keys_are_accounted_for(golden: Path) -> None:
    for several_devices in (False, True):
        middle = "module." if several_devices else ""
        keys = {
            f"lxrt_encoder.model.{middle}{name}": tensor
            for name, tensor in manifest(golden).items()
            if name.startswith("bert.")
        }
        for place, shape in (("0", (1536, 768)), ("3", (3129, 1536))):
            keys |= {
                f"logit_fc.{place}.weight": torch.empty(shape, device="meta"),
                f"logit_fc.{place}.bias": torch.empty(shape[0], device="meta"),
            }
        keys |= {f"logit_fc.2.{name}": torch.empty(1536, device="meta") for name in ("weight", "bias")}
        with torch.device("meta"):
            parts = parts_of(Lxmert(PRESETS["base"]), keys)
        coverage = SPEC.keys["official_finetuned"].load(keys, parts)
        assert sorted(key for sources in coverage.mapped.values() for key in sources) == sorted(keys)


def test_keys_of_the_bare_transformers_model(golden: Path) -> None:
    keys = {
        name.removeprefix("lxmert."): tensor
        for name, tensor in manifest(golden, "transformers").items()
        if name.startswith("lxmert.")
    }
    with torch.device("meta"):
        coverage = SPEC.keys["transformers"].load(keys, {"encoder": Lxmert(PRESETS["base"])})
    assert len(coverage.mapped) == len(keys)


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_recorded_files_are_written_back_bit_for_bit(golden: Path, layout: str) -> None:
    source = load_file(golden / "lxmert" / "state_dict.safetensors")
    if layout == "transformers":
        source = {
            f"lxmert.{name.removeprefix('bert.')}" if name.startswith("bert.") else name: tensor
            for name, tensor in source.items()
        }
    ours, coverage = SPEC.keys[layout].convert(source)
    assert coverage.complete
    written = SPEC.keys[layout].invert(ours)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in source)


def test_finetuned_files_are_written_back_bit_for_bit(golden: Path) -> None:
    source = {
        f"lxrt_encoder.model.{name}": tensor
        for name, tensor in load_file(golden / "lxmert" / "state_dict.safetensors").items()
        if name.startswith("bert.")
    }
    added = load_file(golden / "lxmert" / "finetune_heads.safetensors")
    source |= {name.removeprefix("vqa."): tensor for name, tensor in added.items() if name.startswith("vqa.")}
    ours, _ = SPEC.keys["official_finetuned"].convert(source)
    written = SPEC.keys["official_finetuned"].invert(ours)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in source)


def test_module_names_follow_the_key_map(golden: Path) -> None:
    modules = SPEC.keys["official"].modules(manifest(golden))
    assert (
        modules["bert.encoder.x_layers.3.visual_attention.att.query"]
        == "encoder.cross_layers.3.cross_attention.attention.query"
    )
    assert modules["bert.encoder.visn_fc.visn_fc"] == "encoder.region_embeddings.features"


def test_volta_numbers_its_blocks_as_its_configuration_does() -> None:
    """Full size: text attention at 0, 2, ... 16, regions at 0, 2, ... 8, cross-attention at 18, 21, ... 30."""
    with torch.device("meta"):
        parts = {"encoder": Lxmert(PRESETS["volta"])}
    ours = {f"encoder.{name}": tensor for name, tensor in parts["encoder"].state_dict().items()}
    theirs = SPEC.keys["volta"].invert(ours)

    def numbers(part: str) -> list[int]:
        found = {
            name.split(".")[3] for name in theirs if name.startswith("bert.encoder.layer.") and f".{part}." in name
        }
        return sorted(int(number) for number in found)

    cross, own = list(range(18, 33, 3)), list(range(19, 33, 3))
    assert numbers("attention_self.query") == sorted([*range(0, 17, 2), *cross, *own])
    assert numbers("attention_self.v_query") == sorted([*range(0, 9, 2), *cross, *own])
    assert numbers("intermediate.dense") == sorted([*range(1, 18, 2), *range(20, 33, 3)])
    assert numbers("intermediate.v_dense") == sorted([*range(1, 10, 2), *range(20, 33, 3)])
    assert SPEC.keys["volta"].load(theirs, parts).complete
    assert volta_keys(PRESETS["volta"]) == SPEC.keys["volta"]


def random_bert(config: LxmertConfig, layers: int) -> dict[str, Tensor]:
    """A text-only BERT of the model's sizes in its oldest spelling."""
    width, wide = config.hidden_size, config.intermediate_size
    matrices = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
    }
    matrices |= {
        "attention.output.dense": (width, width),
        "intermediate.dense": (wide, width),
        "output.dense": (width, wide),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (config.vocab_size, width),
        "bert.embeddings.position_embeddings.weight": (config.max_positions, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
        "cls.predictions.bias": (config.vocab_size,),
    }
    linears = {
        "bert.pooler.dense": (width, width),
        "cls.predictions.transform.dense": (width, width),
        "cls.seq_relationship": (2, width),
    }
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for number in range(layers):
        linears |= {f"bert.encoder.layer.{number}.{name}": shape for name, shape in matrices.items()}
        norms += [f"bert.encoder.layer.{number}.{name}.LayerNorm" for name in ("attention.output", "output")]
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()} | {
        f"{name}.bias": shape[:1] for name, shape in linears.items()
    }
    shapes |= {f"{name}.{end}": (width,) for name in norms for end in ("gamma", "beta")}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**tensors, "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}


def test_start_from_bert() -> None:
    model = tiny(num_text_layers=9)
    source = random_bert(model.config, layers=12)
    pretraining = parts_of(model, {"cls.predictions.bias": torch.empty(50)})
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coverage = SPEC.keys["bert"].load(source, pretraining)
    assert coverage.complete
    assert {key.split(".")[3] for key in coverage.dropped} == {"9", "10", "11"}  # the first nine layers are read
    random = ("region_embeddings", "region_layers", "cross_layers", "region_features")
    assert {name.removeprefix("encoder.") for name in coverage.fresh} == {
        name for name in given if name.startswith(random)
    }
    assert all(
        torch.equal(model.state_dict()[name.removeprefix("encoder.")], given[name.removeprefix("encoder.")])
        for name in coverage.fresh
    )
    assert torch.equal(
        model.get_parameter("text_layers.8.self_attention.attention.value.bias"),
        source["bert.encoder.layer.8.attention.self.value.bias"],
    )
    assert torch.equal(model.norm.weight, source["bert.embeddings.LayerNorm.gamma"])
    assert torch.equal(model.pooler.dense.weight, source["bert.pooler.dense.weight"])
    assert torch.equal(pretraining["matching"].get_parameter("linear.bias"), source["cls.seq_relationship.bias"])


def test_wrong_preset_is_refused_with_both_shapes(golden: Path) -> None:
    source = load_file(golden / "lxmert" / "state_dict.safetensors")
    model = tiny(
        num_cross_layers=1, num_heads=4, max_positions=16, max_tokens=16, feature_size=21, whiten_features=False
    )
    before = model.norm.weight.clone()
    with pytest.raises(CheckpointError, match=r"encoder.region_embeddings.features.weight \(32, 20\) -> \(32, 21\)"):
        SPEC.keys["official"].load(source, {"encoder": model})
    assert torch.equal(model.norm.weight, before)


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: [*rows, None]], ids=["too few", "too many"])
def test_answers_and_rows_must_agree(change: Callable[[list[int | None]], list[int | None]]) -> None:
    head, trained = NormedClassifier(4, 8, 3), NormedClassifier(4, 8, 5)
    with pytest.raises(ConfigError, match="one row"):
        head.start_from(trained, change([0, 1, None]))
    with pytest.raises(ConfigError, match=r"width \(8, 4\)"):
        head.start_from(NormedClassifier(5, 8, 5), [0, 1, None])
