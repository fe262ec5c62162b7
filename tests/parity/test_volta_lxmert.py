"""LXMERT in its original configuration against values recorded from VOLTA (`golden/volta_lxmert_orig`).

Sizes come from the recorded config.json. Tolerance 1e-5 + 1e-5 |b|, at real positions; our states of padding are
zeros. VOLTA regresses the masked input features by
mistake: its region loss is reproduced here by handing those in as the target.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_support import assert_rows_close, labelled, nudge, rough_norms, sequential
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling import models
from visling.checkpoints.keymap import KeyMap
from visling.errors import CheckpointError
from visling.models.lxmert import PRESETS, Lxmert, LxmertConfig, volta_keys
from visling.nn.coattention import CrossModalityLayer
from visling.nn.heads import build
from visling.nn.packing import Packing
from visling.objectives.base import PretrainStep
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import MaskedRegions, RegionLosses
from visling.objectives.matching import Matching
from visling.types import IGNORE, Batch, Encoded, Head, HeadKind, Regions, Slots, Targets, Text

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
STYLES = {kind: style for (layout, kind), style in models.spec("lxmert").head_styles.items() if layout == "volta"}


@dataclasses.dataclass(frozen=True)
class Recording:
    """The recorded set and ways to rebuild its models."""

    folder: Path

    @property
    def sizes(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads((self.folder / "config.json").read_text())["hyper_parameters"]
        return described

    @property
    def config(self) -> LxmertConfig:
        sizes = self.sizes
        text_layers, region_layers = (
            len(set(sizes[f"{streams}_attn_sublayers"]) - set(sizes[f"{other}_attn_sublayers"]))
            for streams, other in (("tt", "vv"), ("vv", "tt"))
        )
        cross = len(sizes["shared_sublayers"])
        both = len(set(sizes["tt_attn_sublayers"]) & set(sizes["vv_attn_sublayers"])) - cross
        return dataclasses.replace(
            PRESETS["volta"],
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_text_layers=both + text_layers,
            num_region_layers=both + region_layers,
            num_cross_layers=cross,
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            num_segments=sizes["type_vocab_size"],
            feature_size=sizes["v_feature_size"],
            max_tokens=sizes["max_position_embeddings"],
        )

    @property
    def keys(self) -> KeyMap:
        return volta_keys(self.config)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "volta_lxmert_orig")


def batch_of(inputs: Mapping[str, Tensor]) -> Batch:
    return Batch(
        text=Text(ids=inputs["input_ids"], mask=inputs["attention_mask"].bool(), segments=inputs["token_type_ids"]),
        regions=Regions(
            features=inputs["image_feat"],
            boxes=inputs["image_loc"],
            mask=inputs["image_attention_mask"].bool(),
            size=torch.ones(len(inputs["image_loc"]), 2),
        ),
    )


class Pretraining(nn.Module):
    """Encoder and heads of VOLTA's pre-training model."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.encoder = Lxmert(recording.config)
        dims, words = self.encoder.dims, self.encoder.word_embeddings
        source, weights = recording.tensors("state_dict"), set(recording.sizes["visual_target_weights"].values())
        losses = RegionLosses(
            classes="hard",
            num_classes=len(source["cls.imagePredictions.decoder_dict.3.bias"]),
            attributes=True,
            num_attributes=len(source["cls.imagePredictions.decoder_dict.4.bias"]),
            features="smooth_l1",
            feature_size=recording.config.feature_size,
            weighted=True,
            scale=weights.pop(),
        )
        assert not weights
        self.masked_lm = MaskedLM(dims, STYLES["vocabulary"], words)
        self.matching = Matching(dims, STYLES["matching"], words)
        self.masked_regions = MaskedRegions(dims, STYLES["region_targets"], words, losses=losses)
        parts = {
            "encoder": self.encoder,
            "vocabulary": self.masked_lm.head,
            "matching": self.matching.head,
            "region_targets": self.masked_regions.head,
        }
        self.coverage = recording.keys.load(source, parts)
        self.eval()


def blocks(encoder: Lxmert, batch: Batch) -> tuple[Encoded, dict[str, Tensor]]:
    """States after every block, in VOLTA's numbering; a stream that has no block there keeps its state."""
    assert batch.regions is not None
    inner: dict[str, Tensor] = {}
    rows = {"text": Packing.of(batch.text.mask), "image": Packing.of(batch.regions.mask)}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        stream = rows[name.rpartition(".")[2]]
        return lambda module, arguments: inner.__setitem__(name, stream.unpack(arguments[0]))

    handles = []
    for stream, layers in (("text", encoder.text_layers), ("image", encoder.region_layers)):
        for number, layer in enumerate(layers):
            handles.append(
                layer.get_submodule("feed_forward").register_forward_pre_hook(note(f"{2 * number}.{stream}"))
            )
    start = 2 * max(len(encoder.text_layers), len(encoder.region_layers))
    for number, layer in enumerate(encoder.cross_layers):
        for ours, stream in (("text", "text"), ("region", "image")):
            handles.append(
                layer.get_submodule(f"{ours}_self_attention").register_forward_pre_hook(
                    note(f"{start + 3 * number}.{stream}")
                )
            )
            handles.append(
                layer.get_submodule(f"{ours}_feed_forward").register_forward_pre_hook(
                    note(f"{start + 3 * number + 1}.{stream}")
                )
            )
    encoded = encoder(batch, capture=True)
    for handle in handles:
        handle.remove()
    states = encoded.states
    assert states is not None
    for stream, ours, layers in (("text", "text", encoder.text_layers), ("image", "region", encoder.region_layers)):
        inner |= {f"{2 * number + 1}.{stream}": states[f"{ours}_layers.{number}"] for number in range(len(layers))}
    for number in range(len(encoder.cross_layers)):
        inner[f"{start + 3 * number + 2}.text"] = states[f"cross_layers.{number}.text"]
        inner[f"{start + 3 * number + 2}.image"] = states[f"cross_layers.{number}.regions"]
    found = {"embeddings.text": states["text_embeddings"], "embeddings.image": states["region_embeddings"]}
    for stream in ("text", "image"):
        current = found[f"embeddings.{stream}"]
        for number in range(start + 3 * len(encoder.cross_layers)):
            current = inner.get(f"{number}.{stream}", current)
            found[f"sublayer.{number}.{stream}"] = current
    return encoded, found


def compare(model: Pretraining, recording: Recording) -> None:
    """Every state, score and loss of the recorded pre-training model."""
    inputs, recorded = recording.tensors("inputs"), recording.tensors("outputs")
    batch = batch_of(inputs)
    encoded, found = blocks(model.encoder, batch)
    assert found.keys() == {name for name in recorded if name.startswith(("sublayer.", "embeddings."))}
    text, real_regions = inputs["attention_mask"].bool(), inputs["image_attention_mask"].bool()
    for name, states in found.items():
        real = text if name.endswith(".text") else real_regions
        assert_rows_close(states, recorded[name], real, name, **CLOSE)
    assert_close(encoded.pooled, recorded["pooled_text"], **CLOSE)
    assert_close(model.masked_lm.head(encoded.text)[text], recorded["prediction_scores_t"][text], **CLOSE)
    assert_close(
        model.matching.head(encoded.pooled).flip(-1), recorded["seq_relationship_score"], **CLOSE
    )  # class 0 = fits, there
    regions = model.masked_regions.head(encoded.regions)
    for number, name in ((3, "classes"), (4, "attributes"), (5, "features")):
        theirs = recorded[f"prediction_scores_v.{number}"]
        assert_close(regions[name][real_regions], theirs[real_regions], **CLOSE, msg=labelled(name))
    words, chosen = inputs["masked_lm_labels"], inputs["image_label"] == 1
    slots = Slots(at=torch.arange(chosen.shape[1]).expand_as(chosen), mask=chosen)
    targets = Targets(
        token_slots=Slots(at=torch.arange(words.shape[1]).expand_as(words), mask=words >= 0),
        token_ids=words.clamp(min=0),
        matched=1 - inputs["next_sentence_label"],
        class_slots=slots,
        feature_slots=slots,
        region_classes=inputs["obj_labels"].masked_fill(inputs["obj_labels"] < 0, IGNORE),
        region_attributes=inputs["attr_labels"].masked_fill(inputs["attr_labels"] < 0, IGNORE),
        region_weights=inputs["obj_confs"],
        attribute_weights=inputs["attr_confs"],
        region_features=inputs["image_feat"],  # as recorded: the masked input, not the clean feature
    )
    step = PretrainStep(model=model.encoder, batch=batch, encoded=encoded, targets=targets)
    assert_close(model.masked_lm(step).value.reshape(1), recorded["loss.masked_lm"], **CLOSE)
    assert_close(model.matching(step).value.reshape(1), recorded["loss.next_sentence"], **CLOSE)
    assert_close(model.masked_regions(step).value.reshape(1), recorded["loss.masked_img"], **CLOSE)


def test_pretraining_states_scores_and_losses(recording: Recording) -> None:
    compare(Pretraining(recording), recording)


TASKS: Mapping[int, tuple[str, HeadKind, str, str]] = {
    1: ("classifier", "classify", STYLES["classify"], "logit_fc.3.bias"),
    8: ("score", "score", "linear", "bias"),
    10: ("regions", "regions", "linear", "bias"),
    11: ("regions_deep", "regions", "deep", "3.bias"),
    12: ("pair", "pair", STYLES["pair"], "logit_fc.3.bias"),
    13: ("entailment", "classify", "linear", "bias"),
}
"""VOLTA's task number -> part, kind and style of head, and the recorded weight that is as long as its outputs are
many."""


def compare_task(recording: Recording, task: int, change: Callable[[nn.Module], Any] = lambda model: None) -> None:
    """The recorded logits of a task; `change` may break encoder and head before."""
    part, kind, style, bias = TASKS[task]
    recorded, extra = recording.tensors("outputs")[f"tasks.TASK{task}"], recording.tensors("state_dict_tasks_extra")
    batch = batch_of(recording.tensors("inputs"))
    group = 2 if kind == "pair" else 1
    if kind == "pair":
        batch = batch.map(lambda tensor: tensor[: 2 * len(recorded)])
    encoder = Lxmert(recording.config).eval()
    wanted = Head(
        kind=kind,
        outputs=len(extra[f"clfs_dict.TASK{task}.{bias}"]),
        options={"hidden_size": recording.sizes["clf_hidden_size"]},
    )
    head = build(wanted, encoder.dims, style=style, group=group).eval()
    own = {name: tensor for name, tensor in extra.items() if name.startswith(f"clfs_dict.TASK{task}.")}
    recording.keys.load({**recording.tensors("state_dict"), **own}, {"encoder": encoder, part: head})
    change(nn.ModuleDict({"encoder": encoder, "head": head}))
    encoded = encoder(batch)
    assert batch.regions is not None
    if kind == "regions":
        scores = head(encoded.regions)
        assert_close(scores[batch.regions.mask], recorded.squeeze(-1)[batch.regions.mask], **CLOSE)
    else:
        assert_close(head(encoded.pooled).view_as(recorded), recorded, **CLOSE)


@pytest.mark.parametrize("task", TASKS)
def test_task_heads(recording: Recording, task: int) -> None:
    compare_task(recording, task)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (1, "head.norm.weight"), (1, "head.linear.bias"), (8, "head.linear.bias"), (10, "head.linear.weight"),
        (11, "head.dense.bias"), (11, "head.output.weight"), (12, "head.norm.bias"), (12, "head.dense.bias"),
        (13, "head.linear.bias"), (13, "encoder.pooler.dense.bias"),
    ],
)  # fmt: skip
def test_a_broken_task_head_is_noticed(recording: Recording, task: int, name: str) -> None:
    with pytest.raises(AssertionError):
        compare_task(recording, task, nudge(name))


def test_files_are_written_back_bit_for_bit(recording: Recording) -> None:
    source = {**recording.tensors("state_dict"), **recording.tensors("state_dict_tasks_extra")}
    ours, coverage = recording.keys.convert(source)
    assert coverage.complete
    assert not coverage.dropped
    written = recording.keys.invert(ours)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in source)


def test_a_second_copy_that_differs_is_noticed(recording: Recording) -> None:
    source = recording.tensors("state_dict")
    shared = recording.sizes["shared_sublayers"][0]
    source[f"bert.encoder.layer.{shared}.attention_self.v_value.bias"] += 0.01
    with pytest.raises(CheckpointError, match="should be a copy"):
        recording.keys.convert(source)


def _exchanged_streams(model: Pretraining) -> None:
    for layer in model.encoder.cross_layers:
        assert isinstance(layer, CrossModalityLayer)
        layer.text_self_attention, layer.region_self_attention = layer.region_self_attention, layer.text_self_attention


MUTATIONS: Mapping[str, Callable[[Pretraining], Any]] = {
    **{
        f"nudge {name}": nudge(name)
        for name in (
            "encoder.norm.bias",
            "encoder.region_embeddings.boxes.bias",
            "encoder.region_embeddings.feature_norm.weight",
            "encoder.text_layers.-1.self_attention.attention.value.bias",
            "encoder.region_layers.-1.feed_forward.norm.weight",
            "encoder.cross_layers.-1.cross_attention.attention.query.bias",
            "encoder.cross_layers.0.region_self_attention.output.bias",
            "encoder.pooler.dense.weight",
            "matching.head.linear.bias",
            "masked_lm.head.norm.weight",
            "masked_regions.head.transform.norm.bias",
            "masked_regions.head.outputs.attributes.bias",
        )
    },
    "epsilon of the norms": rough_norms,
    "one direction after the other": sequential,
    "self-attention of the streams exchanged": _exchanged_streams,
    "tanh for ReLU": lambda model: setattr(model.encoder.pooler, "activation", torch.tanh),
    "dropout on": lambda model: model.train(),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_model_is_noticed(recording: Recording, mutation: str) -> None:
    model = Pretraining(recording)
    MUTATIONS[mutation](model)
    with pytest.raises(AssertionError):
        compare(model, recording)
