"""ViLBERT and VisualBERT against values recorded from VOLTA (`golden/volta_vilbert`, `volta_ctrl_vilbert`,
`volta_visualbert`), a second opinion.

Sizes come from the recorded config.json. Tolerance 1e-5 + 1e-5 |b|, at real positions; our states of padding are
zeros. VOLTA reads the whole image as
the first region; ViLBERT here takes it as `whole`, VisualBERT as an ordinary region of segment 1. VOLTA's VisualBERT
has two ReLU poolers that ours lacks: what reads them is computed in this file from our states and the recorded weights.
Scores of padded regions, -10000 more in VOLTA, are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_support import assert_rows_close, labelled, nudge, one_after_the_other, rough_norms
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling import models
from visling.checkpoints.keymap import KeyMap
from visling.errors import CheckpointError
from visling.models import vilbert, visualbert
from visling.models.vilbert import Vilbert, VilbertConfig
from visling.models.visualbert import VisualBert, VisualBertConfig
from visling.nn.coattention import CoAttentionLayer
from visling.nn.heads import build
from visling.nn.layers import AttentionBlock, FeedForwardBlock
from visling.nn.packing import Packing
from visling.objectives.base import PretrainStep
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import soft_class_kl_loss
from visling.objectives.matching import Matching
from visling.types import Batch, Encoded, Head, Regions, Slots, Targets, Text

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
TWO_STREAM = ("volta_vilbert", "volta_ctrl_vilbert")
STYLES = models.spec("vilbert").head_styles
DEEP: Mapping[str, str] = {"regions_refcocog": "deep"}
"""Heads that were recorded with two layers, which no task of VOLTA's ViLBERT has."""


@dataclass(frozen=True)
class Recording:
    """One recorded set and ways to rebuild its model."""

    folder: Path

    @property
    def sizes(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())["hyper_parameters"]
        return found

    def vilbert(self, **changes: Any) -> VilbertConfig:
        sizes = self.sizes
        bridges = sizes["tv_attn_sublayers"]
        before = tuple(sum(at < bridge for at in sizes["tt_attn_sublayers"]) for bridge in bridges)
        config = VilbertConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_layers=len(sizes["tt_attn_sublayers"]),
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            num_segments=sizes["type_vocab_size"],
            region_hidden_size=sizes["v_hidden_size"],
            num_region_layers=len(sizes["vv_attn_sublayers"]),
            num_region_heads=sizes["v_num_attention_heads"],
            region_intermediate_size=sizes["v_intermediate_size"],
            co_attention_size=sizes["sublayer2attn_hidden_size"].get(str(bridges[0]), sizes["hidden_size"]),
            num_co_attention_heads=sizes["sublayer2num_attention_heads"].get(
                str(bridges[0]), sizes["num_attention_heads"]
            ),
            pooled_size=sizes["pooler_size"],
            text_layers_before=before,
            region_layers_before=tuple(sum(at < bridge for at in sizes["vv_attn_sublayers"]) for bridge in bridges),
            feature_size=sizes["v_feature_size"],
            max_tokens=sizes["max_position_embeddings"],
        )
        return replace(config, **changes)

    def visualbert(self) -> VisualBertConfig:
        sizes = self.sizes
        return VisualBertConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_layers=len(sizes["tt_attn_sublayers"]),
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            num_segments=sizes["type_vocab_size"],
            feature_size=sizes["v_feature_size"],
            max_tokens=sizes["max_position_embeddings"],
            region_segment=1,
        )

    @property
    def keys(self) -> KeyMap:
        if self.folder.name == "volta_visualbert":
            return visualbert.volta_keys(self.visualbert().num_layers)
        return vilbert.volta_keys(self.vilbert().text_layers_before, self.vilbert().num_layers)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def weights(self) -> dict[str, Tensor]:
        """Pre-training model and task heads together."""
        return {**self.tensors("state_dict"), **self.tensors("state_dict_tasks_extra")}


def text_of(inputs: Mapping[str, Tensor]) -> Text:
    return Text(ids=inputs["input_ids"], mask=inputs["attention_mask"].bool(), segments=inputs["token_type_ids"])


def split_batch(inputs: Mapping[str, Tensor]) -> Batch:
    """The recorded inputs with the first region as the whole image."""
    features, mask = inputs["image_feat"], inputs["image_attention_mask"].bool()
    regions = Regions(
        features=features[:, 1:],
        boxes=inputs["image_loc"][:, 1:, :4],
        mask=mask[:, 1:],
        size=torch.ones(len(features), 2),
        whole=features[:, 0],
    )
    batch = Batch(text=text_of(inputs), regions=regions)
    batch.validate()
    return batch


def joint_batch(inputs: Mapping[str, Tensor]) -> Batch:
    """The recorded inputs with the whole image as an ordinary region."""
    mask = inputs["image_attention_mask"].bool()
    regions = Regions(
        features=inputs["image_feat"], boxes=inputs["image_loc"][..., :4], mask=mask, size=torch.ones(len(mask), 2)
    )
    batch = Batch(text=text_of(inputs), regions=regions)
    batch.validate()
    return batch


def whole_first(states: Tensor) -> Tensor:
    return torch.cat([states[:, -1:], states[:, :-1]], dim=1)


def slots_of(chosen: Tensor) -> Slots:
    return Slots(at=torch.arange(chosen.shape[1]).expand_as(chosen).masked_fill(~chosen, 0), mask=chosen)


def blocks(model: nn.Module, batch: Batch) -> tuple[Encoded, dict[str, Tensor]]:
    """What the model returns, and the output of every attention and feed-forward block, packed, by module name."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, arguments, output: outputs.__setitem__(
            name, output[0] if isinstance(output, tuple) else output
        )

    hooks = [
        m.register_forward_hook(note(n))
        for n, m in model.named_modules()
        if isinstance(m, (AttentionBlock, FeedForwardBlock))
    ]
    encoded: Encoded = model(batch)
    for hook in hooks:
        hook.remove()
    return encoded, outputs


class TwoStreams(nn.Module):
    """ViLBERT with all heads that were recorded."""

    def __init__(self, recording: Recording, **changes: Any) -> None:
        super().__init__()
        self.recording = recording
        self.encoder = Vilbert(recording.vilbert(**changes))
        dims, words = self.encoder.dims, self.encoder.word_embeddings
        source = recording.weights
        self.masked_lm = MaskedLM(dims, STYLES["volta", "vocabulary"], words)
        self.matching = Matching(dims, STYLES["volta", "matching"], words)
        hidden = {"hidden_size": recording.sizes["clf_hidden_size"]}
        wanted: dict[str, tuple[Head, int]] = {
            "region_targets": (
                Head(
                    kind="region_targets",
                    outputs=1,
                    options={"classes": len(source["cls.imagePredictions.decoder_dict.0.bias"])},
                ),
                1,
            ),
            "classifier": (
                Head(kind="classify", outputs=len(source["clfs_dict.TASK1.logit_fc.3.bias"]), options=hidden),
                1,
            ),
            "score": (Head(kind="score", outputs=1), 1),
            "regions": (Head(kind="regions", outputs=1), 1),
            "regions_refcocog": (Head(kind="regions", outputs=1), 1),
            "pair": (Head(kind="pair", outputs=len(source["clfs_dict.TASK12.logit_fc.3.bias"]), options=hidden), 2),
            "entailment": (Head(kind="classify", outputs=len(source["clfs_dict.TASK13.bias"])), 1),
        }
        self.heads = nn.ModuleDict(
            {
                part: build(
                    head,
                    dims,
                    style=DEEP.get(part) or STYLES.get(("volta", part)) or STYLES["volta", head.kind],
                    group=group,
                )
                for part, (head, group) in wanted.items()
            }
        )
        parts = {
            "encoder": self.encoder,
            "vocabulary": self.masked_lm.head,
            "matching": self.matching.head,
            **dict(self.heads.items()),
        }
        self.coverage = recording.keys.load(source, parts)
        self.eval()

    def sublayers(self, packed: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Padded block outputs by VOLTA's number and stream, where a block changes the stream."""
        assert batch.regions is not None
        first, found = self.encoder.config.text_layers_before[0], {}
        text, regions = Packing.of(batch.text.mask), Packing.of(F.pad(batch.regions.mask, (0, 1), value=True))
        outputs = {name: (regions if "region" in name else text).unpack(states) for name, states in packed.items()}
        for number in range(self.encoder.config.num_layers):
            at = 2 * number if number < first else 2 * first + 4 * (number - first) + 2
            found[f"{at}.text"] = outputs[f"text_layers.{number}.self_attention"]
            found[f"{at + 1}.text"] = outputs[f"text_layers.{number}.feed_forward"]
        for number in range(len(self.encoder.co_attention_layers)):
            at, ours = 2 * first + 4 * number, f"co_attention_layers.{number}"
            found[f"{at}.text"], found[f"{at}.image"] = (
                outputs[f"{ours}.text_attention"],
                whole_first(outputs[f"{ours}.region_attention"]),
            )
            found[f"{at + 1}.text"] = outputs[f"{ours}.text_feed_forward"]
            found[f"{at + 1}.image"] = whole_first(outputs[f"{ours}.region_feed_forward"])
            found[f"{at + 2}.image"] = whole_first(outputs[f"region_layers.{number}.self_attention"])
            found[f"{at + 3}.image"] = whole_first(outputs[f"region_layers.{number}.feed_forward"])
        return found


def compare_two_streams(recording: Recording, model: TwoStreams) -> None:
    """Everything that was recorded."""
    inputs, recorded = recording.tensors("inputs"), recording.tensors("outputs")
    batch = split_batch(inputs)
    encoded, outputs = blocks(model.encoder, batch)
    text, regions = inputs["attention_mask"].bool(), inputs["image_attention_mask"].bool()
    real = {"text": text, "image": regions}

    states = model.encoder(batch, capture=True).states
    assert states is not None
    last = {"text": states["text_embeddings"], "image": whole_first(states["region_embeddings"])}
    for stream, mask in real.items():
        assert_rows_close(last[stream], recorded[f"embeddings.{stream}"], mask, f"{stream} embeddings", **CLOSE)
    found = model.sublayers(outputs, batch)
    for number in range(1 + max(int(name.split(".")[1]) for name in recorded if name.startswith("sublayer."))):
        for stream, mask in real.items():
            last[stream] = found.get(f"{number}.{stream}", last[stream])
            name = f"{number}.{stream}"
            assert_rows_close(last[stream], recorded[f"sublayer.{name}"], mask, name, **CLOSE)

    assert encoded.whole is not None
    candidates = torch.cat([encoded.regions, encoded.whole[:, None]], dim=1)
    assert_close(encoded.pooled, recorded["pooled_text"] * recorded["pooled_image"], **CLOSE)
    assert_close(model.masked_lm.head(encoded.text)[text], recorded["prediction_scores_t"][text], **CLOSE)
    told = whole_first(model.heads["region_targets"](candidates)["classes"])
    assert_close(told[regions], recorded["prediction_scores_v.0"][regions], **CLOSE)
    assert_close(model.matching.head(encoded.pooled).flip(-1), recorded["seq_relationship_score"], **CLOSE)
    for part, task in {"classifier": 1, "score": 8, "entailment": 13}.items():
        expected = recorded[f"tasks.TASK{task}"]
        assert_close(model.heads[part](encoded.pooled).view_as(expected), expected, **CLOSE, msg=labelled(part))
    assert_close(
        model.heads["pair"](encoded.pooled[: 2 * len(recorded["tasks.TASK12"])]), recorded["tasks.TASK12"], **CLOSE
    )
    for part, task in {"regions": 10, "regions_refcocog": 11}.items():
        scores = whole_first(model.heads[part](candidates))
        assert_close(scores[regions], recorded[f"tasks.TASK{task}"].squeeze(-1)[regions], **CLOSE, msg=labelled(part))

    labels = inputs["masked_lm_labels"]
    targets = Targets(token_slots=slots_of(labels >= 0), token_ids=labels, matched=1 - inputs["next_sentence_label"])
    step = PretrainStep(model=model.encoder, batch=batch, encoded=encoded, targets=targets)
    assert_close(model.masked_lm(step).value[None], recorded["loss.masked_lm"], **CLOSE)
    assert_close(model.matching(step).value[None], recorded["loss.next_sentence"], **CLOSE)
    kl = soft_class_kl_loss(told[:, 1:], inputs["image_cls"], inputs["image_label"] == 1)
    assert_close(kl.value[None], recorded["loss.masked_img"], **CLOSE)


@pytest.mark.parametrize("name", TWO_STREAM)
def test_vilbert(golden: Path, name: str) -> None:
    recording = Recording(golden / name)
    model = TwoStreams(recording)
    assert not model.coverage.dropped
    compare_two_streams(recording, model)


def _keys_of_the_other_values(model: TwoStreams) -> None:
    layer = model.encoder.co_attention_layers[0]
    assert isinstance(layer, CoAttentionLayer)
    attention = layer.text_attention.attention
    attention.key, attention.value = attention.value, attention.key


def _other_schedule(model: TwoStreams) -> None:
    """Each co-attention a region layer later, or one earlier where none is left."""
    config = model.encoder.config
    before, layers = config.region_layers_before, config.num_region_layers
    later = tuple(min(count + 1, layers) for count in before)
    model.encoder.config = replace(
        config, region_layers_before=later if later != before else tuple(max(count - 1, 0) for count in before)
    )


def _exchanged_directions(model: TwoStreams) -> None:
    """Each direction by the weights of the other one; both streams must be equally wide."""
    for layer in model.encoder.co_attention_layers:
        assert isinstance(layer, CoAttentionLayer)
        layer.text_attention, layer.region_attention = layer.region_attention, layer.text_attention


TWO_STREAM_MUTATIONS: Mapping[str, Callable[[TwoStreams], Any]] = {
    **{
        f"nudge {name}": nudge(name)
        for name in (
            "encoder.box_projection.bias",
            "encoder.region_norm.weight",
            "encoder.text_layers.0.feed_forward.up.bias",
            "encoder.text_layers.-1.self_attention.norm.weight",
            "encoder.co_attention_layers.0.region_attention.attention.value.bias",
            "encoder.co_attention_layers.-1.text_attention.output.bias",
            "encoder.co_attention_layers.-1.text_attention.norm.weight",
            "encoder.region_layers.-1.self_attention.attention.query.bias",
            "encoder.text_pooler.bias",
            "encoder.region_pooler.bias",
            "heads.classifier.norm.weight",
            "heads.regions_refcocog.dense.bias",
            "heads.pair.linear.bias",
            "heads.region_targets.transform.norm.bias",
            "masked_lm.head.norm.weight",
            "matching.head.linear.bias",
        )
    },
    "epsilon of the norms": rough_norms,
    "directions one after the other": one_after_the_other,
    "keys and values exchanged": _keys_of_the_other_values,
    "another schedule": _other_schedule,
    "dropout on": lambda model: model.train(),
}


@pytest.mark.parametrize("name", TWO_STREAM)
@pytest.mark.parametrize("mutation", TWO_STREAM_MUTATIONS)
def test_a_broken_vilbert_is_noticed(golden: Path, name: str, mutation: str) -> None:
    recording = Recording(golden / name)
    model = TwoStreams(recording)
    TWO_STREAM_MUTATIONS[mutation](model)
    with pytest.raises(AssertionError):
        compare_two_streams(recording, model)


def test_exchanged_directions_are_noticed(golden: Path) -> None:
    recording = Recording(golden / "volta_ctrl_vilbert")
    model = TwoStreams(recording)
    _exchanged_directions(model)
    with pytest.raises(AssertionError):
        compare_two_streams(recording, model)


@pytest.mark.parametrize("name", [*TWO_STREAM, "volta_visualbert"])
def test_recorded_files_are_written_back_bit_for_bit(golden: Path, name: str) -> None:
    recording = Recording(golden / name)
    source = recording.weights
    ours, coverage = recording.keys.convert(source)
    assert coverage.complete
    written = recording.keys.invert(ours)
    assert written.keys() == source.keys() - coverage.dropped.keys()
    assert all(torch.equal(written[key], source[key]) for key in written)
    assert bool(coverage.dropped) == (name == "volta_visualbert")


class OneStream(nn.Module):
    """VisualBERT with the heads that do not read VOLTA's poolers."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.encoder = VisualBert(recording.visualbert())
        source, styles = recording.weights, models.spec("visualbert").head_styles
        dims, words = self.encoder.dims, self.encoder.word_embeddings
        self.masked_lm = MaskedLM(dims, styles["volta", "vocabulary"], words)
        classes = Head(
            kind="region_targets",
            outputs=1,
            options={"classes": len(source["cls.imagePredictions.decoder_dict.0.bias"])},
        )
        self.region_targets = build(classes, dims, style=styles["volta", "region_targets"])
        self.regions = build(Head(kind="regions", outputs=1), dims, style=styles["volta", "regions"])
        self.deep = build(Head(kind="regions", outputs=1), dims, style=DEEP["regions_refcocog"])
        parts = {"encoder": self.encoder, "vocabulary": self.masked_lm.head, "region_targets": self.region_targets}
        self.coverage = recording.keys.load(source, {**parts, "regions": self.regions, "regions_refcocog": self.deep})
        self.eval()


def linear(weights: Mapping[str, Tensor], name: str, states: Tensor) -> Tensor:
    return F.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])


def compare_one_stream(recording: Recording, model: OneStream) -> None:
    """Everything that was recorded; what VOLTA pools is pooled here."""
    inputs, recorded, weights = recording.tensors("inputs"), recording.tensors("outputs"), recording.weights
    batch = joint_batch(inputs)
    encoded, outputs = blocks(model.encoder, batch)
    text, regions, tokens = (
        inputs["attention_mask"].bool(),
        inputs["image_attention_mask"].bool(),
        inputs["input_ids"].shape[1],
    )
    states = model.encoder(batch, capture=True).states
    assert states is not None
    found = {"embeddings": states["embeddings"]}
    rows = Packing.of(torch.cat([text, regions], dim=1))
    for number in range(len(model.encoder.layers)):
        found[f"sublayer.{2 * number}"] = rows.unpack(outputs[f"layers.{number}.self_attention"])
        found[f"sublayer.{2 * number + 1}"] = rows.unpack(outputs[f"layers.{number}.feed_forward"])
    assert {f"{name}.{stream}" for name in found for stream in ("text", "image")} == {
        name for name in recorded if name.startswith(("sublayer", "embeddings"))
    }
    for name, ours in found.items():
        assert_rows_close(ours[:, :tokens], recorded[f"{name}.text"], text, name, **CLOSE)
        assert_rows_close(ours[:, tokens:], recorded[f"{name}.image"], regions, name, **CLOSE)

    words, told = model.masked_lm.head(encoded.text), model.region_targets(encoded.regions)["classes"]
    assert_close(words[text], recorded["prediction_scores_t"][text], **CLOSE)
    assert_close(told[regions], recorded["prediction_scores_v.0"][regions], **CLOSE)
    assert_close(model.regions(encoded.regions)[regions], recorded["tasks.TASK10"].squeeze(-1)[regions], **CLOSE)
    assert_close(model.deep(encoded.regions)[regions], recorded["tasks.TASK11"].squeeze(-1)[regions], **CLOSE)
    pooled_text = linear(weights, "bert.t_pooler.dense", encoded.text[:, 0]).relu()
    pooled_image = linear(weights, "bert.v_pooler.dense", encoded.regions[:, 0]).relu()
    assert_close(pooled_text, recorded["pooled_text"], **CLOSE)
    assert_close(pooled_image, recorded["pooled_image"], **CLOSE)
    pooled = pooled_text * pooled_image
    match = linear(weights, "cls.bi_seq_relationship", pooled)
    assert_close(match, recorded["seq_relationship_score"], **CLOSE)
    assert_close(linear(weights, "clfs_dict.TASK8", pooled), recorded["tasks.TASK8"], **CLOSE)
    assert_close(linear(weights, "clfs_dict.TASK13", pooled), recorded["tasks.TASK13"], **CLOSE)
    for task, joined in (
        (1, pooled),
        (12, pooled[: 2 * len(recorded["tasks.TASK12"])].reshape(len(recorded["tasks.TASK12"]), -1)),
    ):
        name = f"clfs_dict.TASK{task}.logit_fc"
        wide = F.gelu(linear(weights, f"{name}.0", joined))
        normed = F.layer_norm(wide, wide.shape[-1:], weights[f"{name}.2.weight"], weights[f"{name}.2.bias"], eps=1e-12)
        assert_close(linear(weights, f"{name}.3", normed), recorded[f"tasks.TASK{task}"], **CLOSE)

    labels = inputs["masked_lm_labels"]
    targets = Targets(token_slots=slots_of(labels >= 0), token_ids=labels)
    step = PretrainStep(model=model.encoder, batch=batch, encoded=encoded, targets=targets)
    assert_close(model.masked_lm(step).value[None], recorded["loss.masked_lm"], **CLOSE)
    kl = soft_class_kl_loss(told[:, 1:], inputs["image_cls"], inputs["image_label"] == 1)
    assert_close(kl.value[None], recorded["loss.masked_img"], **CLOSE)
    assert_close(F.cross_entropy(match, inputs["next_sentence_label"])[None], recorded["loss.next_sentence"], **CLOSE)


def test_visualbert(golden: Path) -> None:
    recording = Recording(golden / "volta_visualbert")
    compare_one_stream(recording, OneStream(recording))


def _other_segment(model: OneStream) -> None:
    model.encoder.config = replace(model.encoder.config, region_segment=0)


ONE_STREAM_MUTATIONS: Mapping[str, Callable[[OneStream], Any]] = {
    **{
        f"nudge {name}": nudge(name)
        for name in (
            "encoder.norm.weight",
            "encoder.projection.bias",
            "encoder.layers.0.self_attention.norm.bias",
            "encoder.layers.0.self_attention.norm.weight",
            "encoder.layers.0.self_attention.attention.value.bias",
            "encoder.layers.-1.feed_forward.down.bias",
            "encoder.layers.-1.feed_forward.norm.weight",
            "masked_lm.head.norm.weight",
            "region_targets.transform.norm.weight",
            "region_targets.outputs.classes.bias",
            "regions.linear.weight",
            "deep.dense.bias",
        )
    },
    "epsilon of the norms": rough_norms,
    "region segment 0": _other_segment,
    "dropout on": lambda model: model.train(),
}


@pytest.mark.parametrize("mutation", ONE_STREAM_MUTATIONS)
def test_a_broken_visualbert_is_noticed(golden: Path, mutation: str) -> None:
    recording = Recording(golden / "volta_visualbert")
    model = OneStream(recording)
    ONE_STREAM_MUTATIONS[mutation](model)
    with pytest.raises(AssertionError):
        compare_one_stream(recording, model)


def test_shared_weights_that_differ_are_refused(golden: Path) -> None:
    recording = Recording(golden / "volta_visualbert")
    source = recording.weights
    source["bert.encoder.layer.1.output.v_dense.bias"] = source["bert.encoder.layer.1.output.v_dense.bias"] + 1
    with pytest.raises(CheckpointError, match="should be a copy"):
        recording.keys.convert(source)
