"""CVLP's own promises: the query network is LXMERT, what the key network leaves out and follows, released key
layouts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling import models
from visling.errors import CheckpointError, ConfigError
from visling.models.cvlp import PRESETS, Cvlp, CvlpConfig, KeyNetwork, followed, inputs
from visling.models.lxmert import Lxmert
from visling.nn.heads import build
from visling.nn.momentum import HasMomentumCopy
from visling.objectives.base import PretrainStep
from visling.objectives.region_contrast import RegionContrast
from visling.train.optim import OptimConfig, build_optimizer
from visling.types import Batch, Head, Reads, Regions, Targets, Text

SPEC = models.spec("cvlp")
KEYS = SPEC.keys
ALL = "text_layers", "region_layers", "cross_layers"
THREE = {f"num_{stream}": 3 for stream in ALL}


def config_of(**changes: Any) -> CvlpConfig:
    return dataclasses.replace(PRESETS["tiny"], **{"vocab_size": 50, **THREE, **changes})


def batch_of(rows: int = 2, regions: int = 3, counts: tuple[int, ...] | None = None) -> Batch:
    corners = torch.rand(rows, regions, 2) * 0.5
    return Batch(
        text=Text(
            ids=torch.randint(1, 50, (rows, 4)),
            mask=torch.ones(rows, 4, dtype=torch.bool),
            segments=torch.zeros(rows, 4, dtype=torch.int64),
        ),
        regions=Regions(
            features=torch.randn(rows, regions, PRESETS["tiny"].feature_size),
            boxes=torch.cat([corners, corners + 0.3], dim=-1),
            mask=torch.arange(regions) < torch.tensor(counts or (regions,) * rows)[:, None],
            size=torch.ones(rows, 2),
        ),
    )


def layers_run(network: KeyNetwork, batch: Batch) -> set[str]:
    """Names of the layers that a pass went through."""
    states = network(batch, capture=True).states
    assert states is not None
    return {".".join(name.split(".")[:2]) for name in states if "_layers." in name}


def contrast_of(encoder: Cvlp, **changes: Any) -> RegionContrast:
    settings: dict[str, Any] = {"projection_size": 8, "queue_size": 12, "momentum": 0.5, **changes}
    return RegionContrast(encoder.dims, "cvlp", encoder.word_embeddings, encoder=encoder, **settings)


def dropping(network: nn.Module, batch: Batch, **given: Any) -> Any:
    """What a network returns with the dropout of one seed: two networks agree if their sites are the same, in the same
    order."""
    torch.manual_seed(5)
    return network(batch, **given)


DROPOUT = pytest.mark.parametrize(
    "rates", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.3, 0.4)], ids=["none", "states", "probabilities", "both"]
)
"""Of states and of attention probabilities. Where they stand in LXMERT is the business of its own tests."""


@DROPOUT
@pytest.mark.parametrize("capture", [True, False])
def test_the_query_network_is_lxmert(capture: bool, rates: tuple[float, float]) -> None:
    model = Cvlp(config_of(dropout_rate=rates[0], attention_dropout_rate=rates[1])).train()
    plain = Lxmert(model.config).train()
    plain.load_state_dict(model.lxmert.state_dict())
    batch = batch_of(counts=(3, 2))
    ours, theirs = dropping(model, batch, capture=capture), dropping(plain, batch, capture=capture)
    assert torch.equal(ours.pooled, model(batch, capture=capture).pooled) == (not any(rates))
    for name in ("text", "regions", "pooled"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.states is None) != capture
    assert ours.states is None or ours.states.keys() == theirs.states.keys()
    assert model.word_embeddings is model.lxmert.embeddings.words
    assert {name.removeprefix("lxmert.") for name in model.state_dict()} == plain.state_dict().keys()


def test_streams_may_be_run_apart() -> None:
    model, batch = Cvlp(config_of()).eval(), batch_of(counts=(3, 0))
    assert batch.regions is not None
    text, regions = model.encode_text(batch.text), model.encode_regions(batch.regions)
    assert torch.equal(model(batch, text_states=text, region_states=regions).pooled, model(batch).pooled)


def test_features_are_whitened_where_the_preset_says_so() -> None:
    model = Cvlp(config_of())
    model.fit_features(torch.randn(100, model.config.feature_size) + 5)
    assert model.lxmert.region_features.whiten is not None
    assert model.lxmert.region_features.whiten.mean.mean().item() == pytest.approx(5, abs=0.2)
    Cvlp(config_of(whiten_features=False)).fit_features(torch.randn(100, 16))


def test_pairs_of_the_released_depth_in_the_order_of_the_draws() -> None:
    with torch.device("meta"):
        network = KeyNetwork(Cvlp(PRESETS["base_replace"]))
    assert network.pairs == (
        *(("region_layers", i) for i in range(2)),
        *(("text_layers", i) for i in range(4)),
        *(("cross_layers", i) for i in range(2)),
    )
    assert network.successors is not None
    assert {stream: len(list(layers.children())) for stream, layers in network.successors.items()} == dict(
        zip(ALL, (5, 3, 3), strict=True)
    )
    assert network.drop_rate == 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_first_and_last_layers_are_never_dropped(count: int) -> None:
    network = KeyNetwork(Cvlp(config_of(**dict.fromkeys(THREE, count), key_drop_rate=1.0))).train()
    left = {number for number in range(count) if number % 2 == 0 or number == count - 1}
    assert layers_run(network, batch_of()) == {f"{stream}.{number}" for stream in ALL for number in left}


def test_each_second_layer_is_dropped_half_of_the_time_by_itself() -> None:
    network, batch, passes = (
        KeyNetwork(Cvlp(config_of())).train(),
        batch_of(rows=1, regions=1),
        33_334,
    )  # of three draws each
    skipped: Counter[frozenset[str]] = Counter()

    class Listening(nn.Module):
        """In the place of the layers: which of them are left out is known before any is run."""

        def forward(
            self, batch: Batch, *, capture: bool, reads: Reads, replacements: Mapping[str, nn.Module | None]
        ) -> None:
            skipped[frozenset(name for name, successor in replacements.items() if successor is None)] += 1

    network.lxmert = Listening()
    for number in range(passes):
        network.draw_path(number)
        network(batch)
    middle = [f"{stream}.1" for stream in ALL]
    assert skipped.keys() == {frozenset(names) for count in range(4) for names in itertools.combinations(middle, count)}
    for name in middle:
        dropped = sum(count for names, count in skipped.items() if name in names)
        assert abs(dropped - passes / 2) <= 5 * math.sqrt(passes / 4), (name, dropped)
    assert abs(sum(len(names) * count for names, count in skipped.items()) - 1.5 * passes) <= 5 * math.sqrt(
        3 * passes / 4
    )
    for names, count in skipped.items():
        assert abs(count - passes / 8) <= 5 * math.sqrt(passes / 8 * 7 / 8), (names, count)


def test_what_is_dropped_follows_the_seed_and_the_update() -> None:
    batch = batch_of()

    def passes(seed: int) -> list[set[str]]:
        torch.manual_seed(seed)
        network, run = KeyNetwork(Cvlp(config_of())).train(), []
        for number in range(8):
            network.draw_path(number)
            torch.rand(number)  # other draws, which processes make of their own, change nothing
            run.append(layers_run(network, batch))
            assert layers_run(network, batch) == run[-1], "all batches of an update"
        return run

    assert passes(5) == passes(5) != passes(6)


def test_without_training_every_layer_runs() -> None:
    model = Cvlp(config_of(key_drop_rate=1.0)).eval()
    batch = batch_of()
    assert torch.equal(KeyNetwork(model).eval()(batch).regions, model(batch).regions)


@DROPOUT
def test_a_dropped_layer_is_a_network_without_it(rates: tuple[float, float]) -> None:
    model = Cvlp(config_of(dropout_rate=rates[0], attention_dropout_rate=rates[1]))
    short = Lxmert(dataclasses.replace(model.config, **dict.fromkeys(THREE, 2)))
    weights = {name: value for name, value in model.lxmert.state_dict().items() if "_layers.1." not in name}
    short.load_state_dict({name.replace("_layers.2.", "_layers.1."): value for name, value in weights.items()})
    batch = batch_of()
    network = KeyNetwork(model).train()
    assert torch.equal(dropping(network, batch, chosen=[True] * 3).regions, dropping(short.train(), batch).regions)
    assert torch.equal(
        dropping(network, batch, chosen=[False] * 3).regions, dropping(model.lxmert.train(), batch).regions
    )


@DROPOUT
def test_a_successor_runs_in_the_place_of_two_layers(rates: tuple[float, float]) -> None:
    model = Cvlp(
        config_of(
            dropout_rate=rates[0], attention_dropout_rate=rates[1], key_layers="replace", **dict.fromkeys(THREE, 5)
        )
    )
    network, batch = KeyNetwork(model).train(), batch_of()
    successors = network.successors
    assert successors is not None
    with torch.no_grad():
        for parameter in successors.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    short = Lxmert(dataclasses.replace(model.config, **dict.fromkeys(THREE, 3)))
    for stream in ALL:
        for number, source in enumerate(
            (successors[stream].get_submodule("0"), successors[stream].get_submodule("1"), None)
        ):
            source = model.lxmert.get_submodule(f"{stream}.4") if source is None else source
            short.get_submodule(f"{stream}.{number}").load_state_dict(source.state_dict())
    for part in ("embeddings", "norm", "region_embeddings", "pooler"):
        short.get_submodule(part).load_state_dict(model.lxmert.get_submodule(part).state_dict())
    assert torch.equal(dropping(network, batch, chosen=[True] * 6).regions, dropping(short, batch).regions)
    for stream in ALL:
        short.get_submodule(f"{stream}.2").load_state_dict(successors[stream].get_submodule("2").state_dict())
    assert torch.equal(
        network.eval()(batch).regions, short.eval()(batch).regions
    )  # the release evaluates the successors alone
    assert torch.equal(dropping(network.train(), batch, chosen=[False] * 6).regions, dropping(model, batch).regions)


@pytest.mark.parametrize("key_layers", ["drop", "replace"])
def test_key_and_query_start_alike_and_everything_follows_something_of_its_shape(key_layers: str) -> None:
    model = Cvlp(config_of(key_layers=key_layers, **dict.fromkeys(THREE, 5)))
    assert isinstance(model, HasMomentumCopy)
    slow = model.momentum_copy(0.0)
    theirs = model.state_dict()
    successors = [name for name in slow.network.state_dict() if name.startswith("successors.")]
    assert bool(successors) == (key_layers == "replace")
    for name, value in slow.network.state_dict().items():
        assert theirs[followed(name)].shape == value.shape
        if name not in successors:
            assert torch.equal(theirs[name], value)
            assert theirs[name].data_ptr() != value.data_ptr()
    if successors:  # the release's start: layers 0, 1 and the last, although they follow 0, 2 and 4
        for name in successors:
            _, stream, number, rest = name.split(".", 3)
            assert torch.equal(
                slow.network.state_dict()[name], theirs[f"lxmert.{stream}.{(0, 1, 4)[int(number)]}.{rest}"]
            )
    slow.update(model)
    for name, value in slow.network.state_dict().items():
        assert_close(value, theirs[followed(name)], atol=0, rtol=0)


def test_the_key_network_keeps_dropout_in_training() -> None:
    model, batch = Cvlp(config_of(dropout_rate=0.1)), batch_of()
    slow = model.momentum_copy(0.5).train()
    assert not torch.equal(slow(batch, chosen=[False] * 3).regions, slow(batch, chosen=[False] * 3).regions)
    assert not slow(batch).regions.requires_grad
    assert torch.equal(slow.eval()(batch).regions, slow(batch).regions)


@pytest.mark.parametrize("key_layers", ["drop", "replace"])
@pytest.mark.parametrize(("regions", "counts"), [(1, (1, 1)), (3, (3, 0)), (3, (0, 0)), (0, (0, 0))])
def test_training_steps_are_finite(regions: int, counts: tuple[int, ...], key_layers: str) -> None:
    encoder = Cvlp(config_of(key_layers=key_layers))
    objective = contrast_of(encoder)
    whole = nn.ModuleDict({"encoder": encoder, "contrast": objective}).train()
    optimizer, _ = build_optimizer(whole, OptimConfig(lr=1e-3), 10)
    full = batch_of(rows=4)
    assert full.regions is not None
    objective.fill((full, Targets(region_features=full.regions.features)))
    key = {name: value.clone() for name, value in objective.key.network.named_parameters()}
    batch = batch_of(regions=regions, counts=counts)
    assert batch.regions is not None
    loss = objective(PretrainStep(encoder, batch, encoder(batch), Targets(region_features=batch.regions.features)))
    torch.autograd.backward(loss.value)
    assert loss.value.isfinite()
    assert (loss.value.item() != 0) == (sum(counts) > 0)
    assert all(parameter.grad is None for parameter in objective.key.parameters())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in whole.parameters())
    optimizer.step()
    objective.after_update()
    moved = sum(not torch.equal(key[name], value) for name, value in objective.key.network.named_parameters())
    assert moved > len(key) / 2 or not sum(counts)  # without a loss, decay alone moves
    assert objective.queue.rows.isfinite().all()


def test_the_whole_state_is_saved_once_and_restored() -> None:
    def fresh() -> nn.ModuleDict:
        encoder = Cvlp(config_of(key_layers="replace"))
        return nn.ModuleDict({"encoder": encoder, "contrast": contrast_of(encoder)})

    first, second = fresh(), fresh()
    state = first.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers)
    second.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in second.state_dict().items())


def test_the_projection_is_initialised_as_the_release_does() -> None:
    dims = dataclasses.replace(Cvlp(config_of()).dims, regions=768)
    head = build(Head(kind="projection", outputs=128), dims, style="cvlp").train()
    shapes = {name: tuple(value.shape) for name, value in head.named_parameters()}
    assert shapes == {
        "dense.weight": (1536, 768),
        "dense.bias": (1536,),
        "norm.weight": (1536,),
        "norm.bias": (1536,),
        "linear.weight": (128, 1536),
        "linear.bias": (128,),
    }
    for name in ("dense.weight", "linear.weight"):
        assert head.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.02)
        assert head.get_parameter(name).mean().item() == pytest.approx(0, abs=1e-4)
    assert not any(head.get_parameter(f"{name}.bias").any() for name in ("dense", "norm", "linear"))
    assert (head.get_parameter("norm.weight") == 1).all()
    states = torch.randn(2, 5, 768)
    assert torch.equal(head(states), head(states))  # no dropout
    hidden = nn.functional.gelu(states.double() @ head.get_parameter("dense.weight").double().T)
    normed = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
    assert_close(head(states), (normed @ head.get_parameter("linear.weight").double().T).float(), atol=1e-5, rtol=1e-4)


def test_fresh_weights_are_those_of_lxmert() -> None:
    """Initialisation statistics per group are LXMERT's; its own tests look at them."""
    config = config_of()
    torch.manual_seed(3)
    ours = Cvlp(config).state_dict()
    torch.manual_seed(3)
    theirs = Lxmert(config).state_dict()
    assert all(torch.equal(ours[f"lxmert.{name}"], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_layers": "skip"}, "must be drop or replace; found 'skip'"),
        ({"key_drop_rate": 1.5}, r"must lie in \[0, 1\]; found 1.5"),
        ({"key_layers": "replace", "num_text_layers": 4}, r"odd numbers; found \(4, 3, 3\)"),
        ({"hidden_size": 30, "num_heads": 4}, "30 and 4"),
    ],
)
def test_impossible_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


def test_presets_and_inputs() -> None:
    base = PRESETS["base"]
    assert (base.num_text_layers, base.num_region_layers, base.num_cross_layers, base.hidden_size, base.key_layers) == (
        9,
        5,
        5,
        768,
        "drop",
    )
    spec = inputs(base)
    assert (spec.feature_size, spec.max_regions, spec.max_tokens, spec.answer_slot, spec.pair) == (
        2048,
        36,
        20,
        "none",
        "rows",
    )
    with torch.device("meta"):
        scenes = KeyNetwork(Cvlp(PRESETS["scenes"]))
    assert scenes.pairs == (("text_layers", 0),)  # something is left out there too


def released(golden: Path, *, key: bool) -> dict[str, Tensor]:
    """Every key of a full-size file, on the meta device: LXMERT's, the projections, in a key file the successors."""
    manifest = json.loads((golden / "lxmert" / "manifest_full.json").read_text())["official"]["state_dict"]
    shapes = {name: tuple(described["shape"]) for name, described in manifest.items()}
    for head in ("visual_embed_head", "lang_embed_head"):
        for number, wide in ((0, (1536, 768)), (2, (1536,)), (3, (128, 1536))):
            shapes |= {f"{head}.logit_fc.{number}.weight": wide, f"{head}.logit_fc.{number}.bias": wide[:1]}
    if key:
        for theirs, successor, count in (("layer", "l", 5), ("r_layers", "r", 3), ("x_layers", "x", 3)):
            inner = {
                name.split(f".{theirs}.0.")[1]: shape
                for name, shape in shapes.items()
                if name.startswith(f"bert.encoder.{theirs}.0.")
            }
            shapes |= {
                f"bert.encoder.scc_layer_{successor}.{i}.{name}": shape
                for i in range(count)
                for name, shape in inner.items()
            }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


HEADS = {
    "vocabulary": Head(kind="vocabulary", outputs=30522),
    "matching": Head(kind="classify", outputs=2),
    "region_targets": Head(
        kind="region_targets", outputs=4048, options={"classes": 1600, "attributes": 400, "features": 2048}
    ),
    "answers": Head(kind="classify", outputs=9500),
    "projection": Head(kind="projection", outputs=128),
    "text_projection": Head(kind="projection", outputs=128),
}


def parts_of(model: Cvlp, **wanted: Head) -> dict[str, nn.Module]:
    styles = SPEC.head_styles
    return {
        part: build(
            head,
            model.dims,
            style=styles["official", "matching" if part == "matching" else head.kind],
            words=model.word_embeddings,
        )
        for part, head in wanted.items()
    }


def test_every_key_of_a_query_file_is_accounted_for(golden: Path) -> None:
    source = released(golden, key=False)
    with torch.device("meta"):
        model = Cvlp(PRESETS["base"])
        coverage = KEYS["official"].load(source, {"encoder": model, **parts_of(model, **HEADS)})
    filled = [key for keys in coverage.mapped.values() for key in keys]
    assert sorted([*filled, *coverage.tied]) == sorted(source)
    assert not coverage.dropped
    assert not coverage.fresh
    assert coverage.tied == {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}


@pytest.mark.parametrize("preset", ["base", "base_replace"])
def test_every_key_of_a_key_file_is_accounted_for(golden: Path, preset: str) -> None:
    source = released(golden, key=True)
    with torch.device("meta"):
        model = Cvlp(PRESETS[preset])
        network = KeyNetwork(model)
        own = {} if network.successors is None else {"successors": network.successors}
        coverage = KEYS["official_key"].load(
            source, {"encoder": network.lxmert, **own, **parts_of(model, projection=HEADS["projection"])}
        )
    filled = [key for keys in coverage.mapped.values() for key in keys]
    assert sorted([*filled, *coverage.tied, *coverage.dropped]) == sorted(source)
    unused = {
        "vocabulary",
        "matching",
        "region_targets",
        "answers",
        "text_projection",
        *([] if own else ["successors"]),
    }
    assert {reason.split("'")[1] for reason in coverage.dropped.values()} == unused


@pytest.mark.parametrize(("layout", "file"), [("official", "query_state_dict"), ("official_key", "key_state_dict")])
def test_recorded_files_are_written_back_bit_for_bit(golden: Path, layout: str, file: str) -> None:
    source = load_file(golden / "cvlp" / f"{file}.safetensors")
    ours, coverage = KEYS[layout].convert(source)
    assert coverage.complete
    assert not coverage.dropped
    written = KEYS[layout].invert(ours)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in written)


def test_fine_tuned_files_are_read_and_written_back(golden: Path) -> None:
    weights = load_file(golden / "lxmert" / "state_dict.safetensors")
    source = {f"lxrt_encoder.model.{key}": tensor for key, tensor in weights.items() if key.startswith("bert.")}
    source |= {
        key: tensor
        for key, tensor in load_file(golden / "lxmert" / "finetune_heads.safetensors").items()
        if key.startswith("vqa.")
    }
    source = {key.removeprefix("vqa."): tensor for key, tensor in source.items()}
    ours, coverage = KEYS["official_finetuned"].convert(source)
    assert coverage.complete
    assert all(name.startswith(("encoder.lxmert.", "classifier.")) for name in ours)
    written = KEYS["official_finetuned"].invert(ours)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in written)


def test_an_lxmert_file_starts_a_query_network(golden: Path) -> None:
    """The release's first script began so."""
    source = load_file(golden / "lxmert" / "state_dict.safetensors")
    sizes = json.loads((golden / "lxmert" / "config.json").read_text())["hyper_parameters"]
    model = Cvlp(
        config_of(
            vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"], num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"], max_positions=sizes["max_position_embeddings"],
            max_tokens=sizes["max_position_embeddings"],
            num_text_layers=sizes["l_layers"], num_region_layers=sizes["r_layers"], num_cross_layers=sizes["x_layers"],
            feature_size=sizes["visual_feat_dim"], whiten_features=False,
        )
    )  # fmt: skip
    assert KEYS["official"].load(source, {"encoder": model}).complete
    assert torch.equal(model.word_embeddings.weight, source["bert.embeddings.word_embeddings.weight"])


def test_start_from_bert() -> None:
    """Rules are LXMERT's: nine text layers, embeddings, pooler and heads; all else stays random."""
    with torch.device("meta"):
        model = Cvlp(PRESETS["base"])
        fresh = {name for name in model.state_dict() if name.startswith(("lxmert.region_", "lxmert.cross_"))}
        text = {name: torch.empty(value.shape) for name, value in model.state_dict().items() if name not in fresh}
        source = KEYS["bert"].invert({f"encoder.{name}": value for name, value in text.items()})
        coverage = KEYS["bert"].load(source, {"encoder": model})
    assert {name.removeprefix("encoder.") for name in coverage.fresh} == fresh
    assert {name.removeprefix("encoder.") for name in coverage.mapped} == text.keys()
    assert "bert.encoder.layer.8.output.dense.weight" in source


def test_wrong_preset_is_refused_with_both_shapes(golden: Path) -> None:
    model = Cvlp(config_of(hidden_size=16, intermediate_size=16))
    before = model.lxmert.norm.weight.clone()
    with pytest.raises(CheckpointError, match=r"encoder.lxmert.embeddings.positions.weight \(10, 16\) -> \(64, 16\)"):
        KEYS["official"].load(load_file(golden / "cvlp" / "query_state_dict.safetensors"), {"encoder": model})
    assert torch.equal(model.lxmert.norm.weight, before)


def test_module_names_follow_the_key_map(golden: Path) -> None:
    modules = KEYS["official"].modules(load_file(golden / "cvlp" / "query_state_dict.safetensors"))
    assert (
        modules["bert.encoder.r_layers.4.attention.output.dense"]
        == "encoder.lxmert.region_layers.4.self_attention.output"
    )
    assert modules["visual_embed_head.logit_fc.3"] == "projection.linear"
