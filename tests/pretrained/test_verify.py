"""Checkpoints compared with recorded values: every family agrees with its release, and a spoilt weight is named by its
layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official_recordings import read_official
from safetensors.torch import load_file, save_file

from visling import models
from visling.errors import CheckpointError
from visling.pretrained import convert as conversion
from visling.pretrained import verify as verification
from visling.pretrained.folder import ModelFolder, read_model_folder

FAMILIES = models.names()
SPOILT = [
    ("visualbert", "encoder.projection.bias", "embeddings"),
    ("visualbert", "encoder.layers.0.self_attention.attention.value.bias", "layers.0"),
    ("visualbert", "encoder.layers.2.feed_forward.down.weight", "layers.2"),
    ("visualbert", "encoder.pooler.dense.bias", "pooled"),
    ("visualbert", "objectives.matching.head.linear.bias", "matching"),
    ("visualbert", "objectives.masked_lm.head.norm.weight", "vocabulary"),
    ("vlbert", "encoder.layers.1.self_attention.norm.weight", "layers.1"),
    ("vlbert", "objectives.masked_regions.head.outputs.classes.bias", "region_targets.classes"),
    ("vilbert", "encoder.region_norm.bias", "region_embeddings"),
    ("vilbert", "encoder.text_layers.1.self_attention.output.bias", "text_layers.1"),
    ("vilbert", "encoder.region_layers.0.feed_forward.up.weight", "region_layers.0"),
    ("vilbert", "encoder.co_attention_layers.1.text_attention.attention.query.weight", "co_attention_layers.1.text"),
    ("vilbert", "encoder.co_attention_layers.0.region_attention.output.weight", "co_attention_layers.0.regions"),
    ("lxmert", "encoder.text_layers.1.self_attention.output.weight", "text_layers.1"),
    ("lxmert", "encoder.region_embeddings.boxes.weight", "region_embeddings"),
    ("lxmert", "encoder.region_layers.1.feed_forward.norm.bias", "region_layers.1"),
    ("lxmert", "encoder.cross_layers.0.cross_attention.output.weight", "cross_layers.0.text"),
    ("lxmert", "encoder.cross_layers.0.region_feed_forward.norm.bias", "cross_layers.0.regions"),
    ("cvlp", "encoder.lxmert.text_layers.3.self_attention.output.bias", "text"),  # the set records no layer
    ("cvlp", "objectives.region_contrast.head.linear.bias", "projection"),
]


@pytest.fixture
def folder(recorded: Any, tmp_path: Path) -> Any:
    """Makes the model folder of a family's recorded weights."""

    def make(name: str) -> Path:
        source = recorded(name)
        out = tmp_path / name
        conversion.convert(
            source.save(tmp_path / "w.pth"), out, layout=source.layout, model=source.model, config=source.config
        )
        return out

    return make


def compare_with_official(checkpoint: Path, golden: Path) -> verification.Verification:
    """A model folder compared with the set that was recorded from its release."""
    saved = read_model_folder(checkpoint)
    return verification.compare(saved, read_official(saved.model, golden / saved.model), "official")


def spoil(folder: Path, name: str, value: float | None = None) -> None:
    """Move the first entry of a weight by a hundredth and more, or set it."""
    weights = load_file(folder / "model.safetensors")
    entry = weights[name].view(-1)[:1]
    entry.copy_(entry + 0.05 if value is None else torch.tensor([value]))
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_converted_weights_agree_with_the_release(folder: Any, golden: Path, name: str) -> None:
    found = compare_with_official(folder(name), golden)
    assert found.first is None
    assert max(layer.largest for layer in found.layers) < 1e-5
    names = [layer.name for layer in found.layers]
    assert {"vocabulary", "matching"} <= set(names)
    assert len(names) >= 6
    assert str(found).endswith("all agree (tolerance 5e-05 + 1e-05 of the value)")


@pytest.mark.parametrize(("name", "weight", "layer"), SPOILT)
def test_a_spoilt_weight_is_named_by_its_layer(folder: Any, golden: Path, name: str, weight: str, layer: str) -> None:
    checkpoint = folder(name)
    verification.record(checkpoint, checkpoint.parent / "own")
    spoil(checkpoint, weight)
    found = compare_with_official(checkpoint, golden)
    assert found.first == layer, found
    assert f"first to differ: {layer} " in str(found)
    assert all(other.agrees for other in found.layers[: [other.name for other in found.layers].index(layer)])
    own = verification.verify(checkpoint, checkpoint.parent / "own")
    assert own.first == ("text_layers.3" if "lxmert.text_layers.3" in weight else layer)


def test_what_is_no_number_differs(folder: Any, golden: Path) -> None:
    checkpoint = folder("visualbert")
    spoil(checkpoint, "encoder.layers.1.feed_forward.norm.bias", float("nan"))
    assert compare_with_official(checkpoint, golden).first == "layers.1"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recording_of_our_own_is_repeated_exactly(folder: Any, tmp_path: Path, name: str) -> None:
    checkpoint = folder(name)
    layers = verification.record(checkpoint, tmp_path / "recording")
    found = verification.verify(checkpoint, tmp_path / "recording", atol=0, rtol=0)
    assert tuple(layer.name for layer in found.layers) == layers
    assert found.first is None
    assert {"text", "regions", "pooled", "vocabulary"} <= set(layers)
    described = json.loads((tmp_path / "recording" / "recording.json").read_text())
    assert described["model"] == name
    assert "torch" in described["versions"]


def change(recording: Path, name: str, at: tuple[int, ...]) -> None:
    values = load_file(recording / "values.safetensors")
    values[name][at] += 1
    save_file(values, recording / "values.safetensors")


@pytest.mark.parametrize(
    ("model", "layer", "more"),
    [("lxmert", "region_layers.1", 0), ("lxmert", "regions", 1), ("vilbert", "region_embeddings", 0)],
)
def test_regions_are_compared_where_regions_are_real(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, layer: str, more: int
) -> None:
    checkpoint = folder(model)
    config = read_model_folder(checkpoint).config
    tokens = min(verification._TOKENS, config.max_tokens)
    monkeypatch.setattr(verification, "_REGIONS", tokens + more)  # as many regions as tokens, or as tokens and one more
    verification.record(checkpoint, tmp_path / "recording")
    batch = load_file(tmp_path / "recording" / "batch.safetensors")
    text, regions = batch["text.mask"], batch["regions.mask"]
    assert regions.shape[1] == text.shape[1] + more
    hidden = next(at for at in range(text.shape[1]) if regions[1, at] and not text[1, at])
    padding = next(at for at in range(text.shape[1]) if text[2, at] and not regions[2, at])
    change(tmp_path / "recording", layer, (2, padding))
    assert verification.verify(checkpoint, tmp_path / "recording").first is None
    change(tmp_path / "recording", layer, (1, hidden))
    assert verification.verify(checkpoint, tmp_path / "recording").first == layer


HEADS = [
    (
        "vilbert multitask",
        {"pair": (2, 2), "score": (1, 4), "regions.scores": (4, 7), "entailment": (4, 3)},
    ),  # regions and the whole image
    ("visualbert flickr", {"slots_regions": (4, 12, 6)}),
]


@pytest.mark.parametrize(("name", "expected"), HEADS, ids=[name for name, _ in HEADS])
def test_heads_of_every_kind_are_recorded(
    recorded: Any, tmp_path: Path, name: str, expected: dict[str, tuple[int, ...]]
) -> None:
    source, out = recorded(name), tmp_path / "model"
    conversion.convert(
        source.save(tmp_path / "w.pth"), out, layout=source.layout, model=source.model, config=source.config
    )
    verification.record(out, tmp_path / "recording")
    shapes = {
        layer: tuple(values.shape) for layer, values in load_file(tmp_path / "recording" / "values.safetensors").items()
    }
    assert {layer: shapes[layer] for layer in expected} == expected
    assert verification.verify(out, tmp_path / "recording").first is None
    for place, about in read_model_folder(out).heads.items():
        layer = next((layer for layer in expected if layer.partition(".")[0] == about.part), None)
        if layer is not None:
            weight = next(weight for weight in load_file(out / "model.safetensors") if weight.startswith(f"{place}."))
            whole = (out / "model.safetensors").read_bytes()
            weights = load_file(out / "model.safetensors")
            save_file(
                {**weights, weight: weights[weight] + torch.randn(weights[weight].shape)}, out / "model.safetensors"
            )
            assert verification.verify(out, tmp_path / "recording").first == layer
            (out / "model.safetensors").write_bytes(whole)


def test_runs_are_recorded_too(world: Any, tmp_path: Path) -> None:
    verification.record(world.vqa, tmp_path / "recording", seed=3)
    assert verification.verify(world.vqa, tmp_path / "recording").first is None
    verification.sample_batch(read_model_folder(world.vqa), 3).validate()
    assert verification.verify(world.pretrained, tmp_path / "recording").first is not None


def test_made_up_batches_keep_every_rule(recorded: Any) -> None:
    for name in (*FAMILIES, "visualbert vqa", "vilbert multitask"):
        source = recorded(name)
        saved = ModelFolder(
            path=Path(),
            model=source.model,
            config=source.config,
            task=None,
            text_only=False,
            fingerprint="",
            weights={},
            state={},
        )
        verification.sample_batch(saved, 0).validate()


def test_a_layer_too_many_differs(folder: Any, tmp_path: Path) -> None:
    checkpoint = folder("visualbert")
    verification.record(checkpoint, tmp_path / "recording")
    values = load_file(tmp_path / "recording" / "values.safetensors")
    save_file({**values, "layers.3": values["layers.2"].clone()}, tmp_path / "recording" / "values.safetensors")
    described = json.loads((tmp_path / "recording" / "recording.json").read_text())
    described["layers"].append("layers.3")
    (tmp_path / "recording" / "recording.json").write_text(json.dumps(described))
    found = verification.verify(checkpoint, tmp_path / "recording")
    assert (found.first, found.layers[-1].largest) == ("layers.3", float("inf"))


def test_recordings_that_do_not_fit_are_refused(folder: Any, golden: Path, tmp_path: Path) -> None:
    visualbert, lxmert = folder("visualbert"), folder("lxmert")
    verification.record(visualbert, tmp_path / "recording")
    with pytest.raises(CheckpointError, match=r"was recorded with visualbert, but .* holds lxmert"):
        verification.verify(lxmert, tmp_path / "recording")
    with pytest.raises(CheckpointError, match=r"no recording in .*golden.*: expected recording.json"):
        verification.verify(lxmert, golden / "lxmert")
    with pytest.raises(CheckpointError, match=r"no recording in .*gone.*--record"):
        verification.verify(lxmert, tmp_path / "gone")
    with pytest.raises(CheckpointError, match="not empty"):
        verification.record(visualbert, tmp_path / "recording")
    batch = load_file(tmp_path / "recording" / "batch.safetensors")
    save_file({**batch, "text.ids": batch["text.ids"] + 1000}, tmp_path / "recording" / "batch.safetensors")
    with pytest.raises(CheckpointError, match=r"the recorded inputs do not fit .*visualbert: index out of range"):
        verification.verify(visualbert, tmp_path / "recording")
    values = tmp_path / "recording" / "values.safetensors"
    values.write_bytes(values.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read the recording"):
        verification.verify(visualbert, tmp_path / "recording")
    described = json.loads((tmp_path / "recording" / "recording.json").read_text())
    (tmp_path / "recording" / "recording.json").write_text(json.dumps({**described, "format": 2}))
    with pytest.raises(CheckpointError, match="is a recording of layout 2; this version reads 1"):
        verification.verify(visualbert, tmp_path / "recording")
