"""LXMERT against values recorded from the official release and from transformers (`golden/lxmert`; its config.json
describes every tensor), and against the transformers package that is installed.

Sizes come from the recorded config.json. Tolerance 1e-5 + 1e-5 |b| (gradients 1e-6 + 1e-4 |b|), tighter than the set
asks for; on another folder what that folder's config.json states, if it is more. Compared at every real position; our
states of padding are zeros, where both references keep what their layers make of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_support import assert_rows_close, labelled, nudge, sequential
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling import models
from visling.checkpoints.keymap import Coverage
from visling.models.lxmert import Lxmert, LxmertConfig
from visling.nn.coattention import CrossModalityLayer
from visling.nn.heads import build
from visling.nn.packing import Packing
from visling.objectives.base import PretrainStep
from visling.objectives.image_qa import ImageQA
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import MaskedRegions, RegionLosses
from visling.objectives.matching import Matching
from visling.tasks.answers import answer_loss
from visling.tasks.nlvr import NLVR
from visling.types import IGNORE, Batch, Encoded, Head, Loss, Regions, Slots, Targets, Text

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}
OFFICIAL_SCALE, TRANSFORMERS_SCALE = 1 / 0.15, 6.67
"""Factor of the three region losses."""


@dataclass(frozen=True)
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
        return LxmertConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_text_layers=sizes["l_layers"],
            num_region_layers=sizes["r_layers"],
            num_cross_layers=sizes["x_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            num_segments=sizes["type_vocab_size"],
            norm_eps=sizes["layer_norm_eps"],
            feature_size=sizes["visual_feat_dim"],
            max_tokens=sizes["max_position_embeddings"],
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def finetuned(self, task: str) -> dict[str, Tensor]:
        """The file that the release would write after fine-tuning on a task."""
        encoder = {
            f"lxrt_encoder.model.{name}": tensor
            for name, tensor in self.tensors("state_dict").items()
            if name.startswith("bert.")
        }
        added = {
            name.removeprefix(f"{task}."): tensor
            for name, tensor in self.tensors("finetune_heads").items()
            if name.startswith(task)
        }
        return {**encoder, **added}


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "lxmert")


def batch_of(inputs: Mapping[str, Tensor], *, region_mask: bool = False) -> Batch:
    """Recorded inputs as our batch; all regions are real unless the recorded mask is asked for."""
    mask = inputs["visual_attention_mask"].bool()
    batch = Batch(
        text=Text(ids=inputs["input_ids"], mask=inputs["attention_mask"].bool(), segments=inputs["token_type_ids"]),
        regions=Regions(
            features=inputs["visual_feats"],
            boxes=inputs["visual_pos"],
            mask=mask if region_mask else torch.ones_like(mask),
            size=torch.ones(len(mask), 2),
        ),
    )
    batch.validate()
    return batch


def unlabelled(labels: Tensor) -> Tensor:
    """The release ignores -1, we ignore IGNORE."""
    return labels.masked_fill(labels == -1, IGNORE)


def everywhere(like: Tensor, chosen: Tensor | None = None) -> Slots:
    """Every position of (B, N) as a slot, or those that are chosen."""
    return Slots(
        at=torch.arange(like.shape[1]).expand(like.shape[:2]),
        mask=torch.ones_like(like, dtype=torch.bool) if chosen is None else chosen,
    )


def targets_of(inputs: Mapping[str, Tensor]) -> Targets:
    labels = inputs["lm_labels"]
    return Targets(
        token_slots=everywhere(labels, labels >= 0),
        token_ids=labels.clamp(min=0),
        matched=inputs["matched_label"],
        class_slots=everywhere(inputs["obj_labels"]),
        region_classes=unlabelled(inputs["obj_labels"]),
        region_weights=inputs["obj_conf"],
        region_attributes=unlabelled(inputs["attr_labels"]),
        attribute_weights=inputs["attr_conf"],
        feature_slots=everywhere(inputs["feat_mask"], inputs["feat_mask"] > 0),
        region_features=inputs["feat_labels"],
        answer=unlabelled(inputs["ans"]),
    )


class Pretraining(nn.Module):
    """Encoder and the objectives of the release, as recorded."""

    def __init__(self, recording: Recording, scale: float = OFFICIAL_SCALE) -> None:
        super().__init__()
        sizes, self.encoder = recording.sizes, Lxmert(recording.config)
        dims, words = self.encoder.dims, self.encoder.word_embeddings
        styles = {
            kind: style for (layout, kind), style in models.spec("lxmert").head_styles.items() if layout == "official"
        }
        losses = RegionLosses(
            classes="hard",
            num_classes=sizes["num_object_labels"],
            attributes=True,
            num_attributes=sizes["num_attr_labels"],
            features="smooth_l1",
            feature_size=sizes["visual_feat_dim"],
            weighted=True,
            over="regions",
            scale=scale,
        )
        self.masked_lm = MaskedLM(dims, styles["vocabulary"], words)
        self.matching = Matching(dims, styles["matching"], words)
        self.masked_regions = MaskedRegions(dims, styles["region_targets"], words, losses=losses)
        self.image_qa = ImageQA(dims, styles["classify"], words, num_answers=sizes["num_qa_labels"])
        self.parts = {
            "encoder": self.encoder,
            "vocabulary": self.masked_lm.head,
            "matching": self.matching.head,
            "region_targets": self.masked_regions.head,
            "answers": self.image_qa.head,
        }
        self.coverage: Coverage = (
            models.spec("lxmert").keys["official"].load(recording.tensors("state_dict"), self.parts)
        )
        self.eval()

    def losses(self, batch: Batch, targets: Targets, encoded: Encoded) -> dict[str, Loss]:
        step = PretrainStep(model=self.encoder, batch=batch, encoded=encoded, targets=targets)
        names = ("masked_lm", "matching", "masked_regions", "image_qa")
        return {name: self.get_submodule(name)(step) for name in names}


@contextmanager
def sublayers(encoder: Lxmert) -> Iterator[dict[str, Tensor]]:
    """Output of every attention block of the cross-modality layers, packed, by the names of the recording."""
    seen: dict[str, Tensor] = {}
    handles = []
    for number, layer in enumerate(encoder.cross_layers):
        assert isinstance(layer, CrossModalityLayer)
        for stream, theirs, read in (
            ("text", "language", layer.text_self_attention),
            ("region", "vision", layer.region_self_attention),
        ):
            name = f"hidden.x_layer.{number}.after_{{}}_att.{theirs}"
            feed_forward = layer.get_submodule(f"{stream}_feed_forward")
            for module, when in ((read, "cross"), (feed_forward, "self")):
                key = name.format(when)
                handles.append(
                    module.register_forward_pre_hook(lambda _, arguments, key=key: seen.__setitem__(key, arguments[0]))
                )
    yield seen
    for handle in handles:
        handle.remove()


def state_names(config: LxmertConfig, official: bool) -> dict[str, str]:
    """Our captured states -> recorded names."""
    text, region, cross = config.num_text_layers, config.num_region_layers, config.num_cross_layers
    if official:
        return {
            "text_embeddings": "hidden.embeddings",
            "region_embeddings": "hidden.visn_fc",
            **{f"text_layers.{i}": f"hidden.l_layer.{i}" for i in range(text)},
            **{f"region_layers.{i}": f"hidden.r_layer.{i}" for i in range(region)},
            **{f"cross_layers.{i}.text": f"hidden.x_layer.{i}.language" for i in range(cross)},
            **{f"cross_layers.{i}.regions": f"hidden.x_layer.{i}.vision" for i in range(cross)},
        }
    return {
        **{f"text_layers.{i}": f"language_hidden_states.{i}" for i in range(text)},
        **{f"region_layers.{i}": f"vision_hidden_states.{i}" for i in range(region)},
        **{f"cross_layers.{i}.text": f"language_hidden_states.{text + i}" for i in range(cross)},
        **{f"cross_layers.{i}.regions": f"vision_hidden_states.{region + i}" for i in range(cross)},
    }


def real_positions(batch: Batch, name: str) -> Tensor:
    """Real tokens (B, T) or regions (B, R): what states of this name, ours or a recorded one, stand for."""
    assert batch.regions is not None
    of_regions = name.startswith("region") or name.endswith((".regions", ".vision"))
    return batch.regions.mask if of_regions else batch.text.mask


def compare_outputs(batch: Batch, encoded: Encoded, recorded: Mapping[str, Tensor], prefix: str = "") -> None:
    for name, states, theirs in (("text", encoded.text, "language"), ("regions", encoded.regions, "vision")):
        real = real_positions(batch, name)
        assert_rows_close(states, recorded[f"{prefix}{theirs}_output"], real, name, **CLOSE)
    assert_close(encoded.pooled, recorded[f"{prefix}pooled_output"], **CLOSE, msg=labelled("pooled"))


def part(losses: Mapping[str, Loss], objective: str, name: str) -> Tensor:
    """A mean that an objective reports, as it enters the sum."""
    total, count = losses[objective].parts[name]
    return (total / count).reshape(1)


def compare_official(model: Pretraining, recording: Recording) -> None:
    """All values that the official pre-training model recorded."""
    inputs, recorded = recording.tensors("inputs"), recording.tensors("outputs")
    batch, targets = batch_of(inputs), targets_of(inputs)
    with sublayers(model.encoder) as inner:
        encoded = model.encoder(batch, capture=True)
    compare_outputs(batch, encoded, recorded)
    names = state_names(model.encoder.config, official=True)
    assert encoded.states is not None
    assert encoded.states.keys() == names.keys()
    for ours, theirs in names.items():
        assert_rows_close(encoded.states[ours], recorded[theirs], real_positions(batch, ours), ours, **CLOSE)
    assert {*inner, *names.values()} == {name for name in recorded if name.startswith("hidden.")}
    for name, packed in inner.items():
        real = real_positions(batch, name)
        assert_rows_close(Packing.of(real).unpack(packed), recorded[name], real, name, **CLOSE)
    real = batch.text.mask
    assert_close(model.masked_lm.head(encoded.text)[real], recorded["logits.lm"][real], **CLOSE)
    assert_close(model.matching.head(encoded.pooled), recorded["logits.matched"], **CLOSE)
    assert_close(model.image_qa.head(encoded.pooled), recorded["logits.answer"], **CLOSE)
    regions = model.masked_regions.head(encoded.regions)
    for ours, theirs in (("classes", "obj"), ("attributes", "attr"), ("features", "feat")):
        assert_close(regions[ours], recorded[f"logits.{theirs}"], **CLOSE, msg=labelled(ours))
    losses = model.losses(batch, targets, encoded)
    assert_close(losses["masked_lm"].value.reshape(1), recorded["loss.lm"], **CLOSE)
    assert_close(losses["matching"].value.reshape(1), recorded["loss.matched"], **CLOSE)
    assert_close(losses["image_qa"].value.reshape(1), recorded["loss.answer"], **CLOSE)
    for ours, theirs in (("region_classes", "obj"), ("region_attributes", "attr"), ("region_features", "feat")):
        assert_close(part(losses, "masked_regions", ours), recorded[f"loss.{theirs}"], **CLOSE, msg=labelled(ours))
    assert_close(sum(loss.value for loss in losses.values()).reshape(1), recorded["loss.total"], **CLOSE)


def test_pretraining_states_scores_and_losses(recording: Recording) -> None:
    compare_official(Pretraining(recording), recording)


def compare_region_mask(model: Pretraining, recording: Recording, source: str) -> None:
    batch = batch_of(recording.tensors("inputs"), region_mask=True)
    compare_outputs(batch, model.encoder(batch), recording.tensors(source), "vmask.")


def test_states_of_padding_are_noticed(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(rows: Packing, packed: Tensor) -> Tensor:
        return packed.new_ones(*rows.mask.shape, packed.shape[1]).index_put((rows.mask,), packed)

    monkeypatch.setattr(Packing, "unpack", unpack)
    batch = batch_of(recording.tensors("inputs"))
    encoded = Pretraining(recording).encoder(batch)
    with pytest.raises(AssertionError, match="text: padding has states"):
        compare_outputs(batch, encoded, recording.tensors("outputs"))


@pytest.mark.parametrize("source", ["outputs", "outputs_hf"])
def test_region_mask(recording: Recording, source: str) -> None:
    compare_region_mask(Pretraining(recording), recording, source)


def test_no_text_mask_and_no_segments(recording: Recording) -> None:
    batch = batch_of(recording.tensors("inputs"))
    text = batch.text
    batch = replace(
        batch, text=replace(text, mask=torch.ones_like(text.mask), segments=torch.zeros_like(text.segments))
    )
    compare_outputs(batch, Pretraining(recording).encoder(batch), recording.tensors("outputs"), "nomask.")


def test_gradient_of_every_weight(recording: Recording) -> None:
    inputs, recorded = recording.tensors("inputs"), recording.tensors("grads")
    model = Pretraining(recording)
    batch = batch_of(inputs)
    losses = model.losses(batch, targets_of(inputs), model.encoder(batch))
    sum(loss.value for loss in losses.values()).backward()  # type: ignore[union-attr]
    statistics = json.loads((recording.folder / "grad_stats.json").read_text())
    assert (
        {key for keys in model.coverage.mapped.values() for key in keys}
        == recorded.keys()
        == statistics["per_parameter"].keys()
    )
    gradients = []
    for part_name, module in model.parts.items():
        for name, parameter in module.named_parameters():
            (theirs,) = model.coverage.mapped[f"{part_name}.{name}"]
            assert parameter.grad is not None, name
            assert_close(parameter.grad, recorded[theirs], **GRADIENTS, msg=labelled(theirs))
            assert_close(
                float(parameter.grad.norm()), statistics["per_parameter"][theirs][0], **GRADIENTS, msg=labelled(theirs)
            )
            gradients.append(parameter.grad)
    assert_close(float(nn.utils.get_total_norm(gradients)), statistics["total_grad_norm"], **GRADIENTS)
    tables = model.encoder.embeddings
    for table in (
        tables.positions,
        tables.segments,
    ):  # rows that padding_idx=0 keeps from learning, although they are read
        assert table.weight.grad is not None
        assert not table.weight.grad[0].any()
        assert table.weight.grad[1:].any()


def test_finetuning_teaches_what_it_does_in_the_release(recording: Recording) -> None:
    """The pooled state depends on all but the region side of the last layer."""
    encoder = Pretraining(recording).encoder
    encoder(batch_of(recording.tensors("inputs"))).pooled.square().sum().backward()  # type: ignore[no-untyped-call]
    _, coverage = models.spec("lxmert").keys["official"].convert(recording.tensors("state_dict"))
    idle = {
        coverage.mapped[f"encoder.{name}"][0]
        for name, parameter in encoder.named_parameters()
        if parameter.grad is None
    }
    assert idle == set(
        json.loads((recording.folder / "grad_stats.json").read_text())["vqa_finetune_parameters_without_gradient"]
    )


def compare_transformers(model: Pretraining, recording: Recording) -> None:
    """All values that transformers' pre-training model recorded but attention maps."""
    inputs, recorded = recording.tensors("inputs"), recording.tensors("outputs_hf")
    batch = batch_of(inputs)
    encoded = model.encoder(batch, capture=True)
    compare_outputs(batch, encoded, recorded)
    assert encoded.states is not None
    names = state_names(model.encoder.config, official=False)
    for ours, theirs in names.items():
        assert_rows_close(encoded.states[ours], recorded[theirs], real_positions(batch, ours), ours, **CLOSE)
    assert set(names.values()) == {name for name in recorded if "hidden_states" in name}
    real = batch.text.mask
    assert_close(model.masked_lm.head(encoded.text)[real], recorded["logits.lm"][real], **CLOSE)
    assert_close(model.matching.head(encoded.pooled), recorded["logits.matched"], **CLOSE)
    assert_close(model.image_qa.head(encoded.pooled), recorded["logits.answer"], **CLOSE)
    losses = model.losses(batch, targets_of(inputs), encoded)
    for ours, theirs in (
        ("masked_lm", "lm"),
        ("matching", "matched"),
        ("image_qa", "answer"),
        ("masked_regions", "visual_sum"),
    ):
        assert_close(losses[ours].value.reshape(1), recorded[f"loss.{theirs}"], **CLOSE, msg=labelled(ours))
    assert_close(sum(loss.value for loss in losses.values()).reshape(1), recorded["loss.total"], **CLOSE)


def test_transformers_pretraining(recording: Recording) -> None:
    compare_transformers(Pretraining(recording, TRANSFORMERS_SCALE), recording)


def attention_of(asking: Tensor, probs: Tensor) -> Tensor:
    """Attention (B, H, M, N) of the real ones (B, M) of the positions that attend, one after the other: (K, H, N)."""
    return probs.transpose(1, 2)[asking]


def compare_maps(model: Pretraining, recording: Recording) -> None:
    """The recorded attention probabilities of real tokens and regions."""
    recorded, encoder = recording.tensors("outputs_hf"), model.encoder
    batch = batch_of(recording.tensors("inputs"))
    assert batch.regions is not None
    maps = encoder(batch, capture=True).maps
    ours = {
        **{
            f"language_attentions.{i}": maps.text_to_text[f"text_layers.{i}"]
            for i in range(encoder.config.num_text_layers)
        },
        **{
            f"vision_attentions.{i}": maps.regions_to_regions[f"region_layers.{i}"]
            for i in range(encoder.config.num_region_layers)
        },
        **{
            f"cross_encoder_attentions.{i}": maps.text_to_regions[f"cross_layers.{i}.cross"]
            for i in range(encoder.config.num_cross_layers)
        },
    }
    assert ours.keys() == {name for name in recorded if "_attentions." in name}
    for name, probs in ours.items():
        asking = batch.regions.mask if name.startswith("vision") else batch.text.mask
        assert_close(attention_of(asking, probs), attention_of(asking, recorded[name]), **CLOSE, msg=labelled(name))
    for quadrant in (maps.regions_to_text["cross_layers.0.cross"], maps.text_to_text["cross_layers.0.self"]):
        assert_close(quadrant.sum(-1), torch.ones(quadrant.shape[:-1]))


def test_attention_maps(recording: Recording) -> None:
    compare_maps(Pretraining(recording), recording)


class Finetuned(nn.Module):
    """Encoder and head of a task."""

    def __init__(self, recording: Recording, task: str, wanted: Head, group: int = 1) -> None:
        super().__init__()
        self.encoder = Lxmert(recording.config)
        self.head = build(wanted, self.encoder.dims, style="gelu_norm", group=group)
        models.spec("lxmert").keys["official_finetuned"].load(
            recording.finetuned(task), {"encoder": self.encoder, "classifier": self.head}
        )
        self.eval()

    def forward(self, batch: Batch) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.encoder(batch).pooled)
        return logits


def compare_question_answering(recording: Recording, change: Callable[[Finetuned], Any] = lambda model: None) -> None:
    """Everything recorded of VQA; `change` may break the model before."""
    target, recorded = recording.tensors("finetune_inputs")["vqa.target"], recording.tensors("finetune_outputs")
    answers = recording.sizes["num_vqa_answers"]
    model = Finetuned(recording, "vqa", Head(kind="classify", outputs=answers))
    change(model)
    logits = model(batch_of(recording.tensors("inputs")))
    assert_close(logits, recorded["vqa.logits"], **CLOSE)
    assert_close(answer_loss(logits, target, "bce").value.reshape(1), recorded["vqa.loss_bce"], **CLOSE)
    hard = (
        nn.functional.cross_entropy(logits, target.argmax(-1)) * answers
    )  # a flag of the release that no task here offers
    assert_close(hard.reshape(1), recorded["vqa.loss_mce"], **CLOSE)


def test_question_answering(recording: Recording) -> None:
    compare_question_answering(recording)


def compare_two_images(
    recording: Recording, *, shared: bool, change: Callable[[Finetuned], Any] = lambda model: None
) -> None:
    """Everything recorded of NLVR2, each sentence encoded once for both of its images, or twice."""
    given, recorded = recording.tensors("finetune_inputs"), recording.tensors("finetune_outputs")
    features, boxes = given["nlvr2.visual_feats"].flatten(0, 1), given["nlvr2.visual_pos"].flatten(0, 1)
    text = batch_of(recording.tensors("inputs")).text
    row = torch.arange(len(text.ids)).repeat_interleave(2)
    batch = Batch(
        text=replace(text, row=row) if shared else text.map(lambda tensor: tensor[row]),
        regions=Regions(
            features=features,
            boxes=boxes,
            mask=torch.ones(features.shape[:2], dtype=torch.bool),
            size=torch.ones(len(features), 2),
        ),
        group=2,
    )
    batch.validate()
    model = Finetuned(recording, "nlvr2", Head(kind="pair", outputs=2), group=2)
    change(model)
    logits = model(batch)
    assert_close(logits, recorded["nlvr2.logits"], **CLOSE)
    loss = NLVR().loss({"classify": logits}, Targets(answer=given["nlvr2.label"]))
    assert_close(loss.value.reshape(1), recorded["nlvr2.loss"], **CLOSE)


@pytest.mark.parametrize("shared", [True, False])
def test_two_images_in_two_rows(recording: Recording, shared: bool) -> None:
    compare_two_images(recording, shared=shared)


def _swap(first: str, second: str) -> Callable[[Pretraining], None]:
    """Exchange two parameters of one shape."""

    def change(model: Pretraining) -> None:
        with torch.no_grad():
            one, two = model.get_parameter(first), model.get_parameter(second)
            kept = one.clone()
            one.copy_(two)
            two.copy_(kept)

    return change


def _rough_norms(factor: float = 1) -> Callable[[nn.Module], None]:
    """Another epsilon in every norm: as large as the tolerance, or more where nothing but a few logits is recorded."""

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = factor * CLOSE["atol"]

    return change


def _own_projection_per_direction(model: Pretraining) -> None:
    """The second direction reads through weights of its own, as the paper draws it."""
    block = model.encoder.cross_layers[0].get_submodule("cross_attention")
    values = iter([None, torch.randn(model.encoder.config.hidden_size)])

    def shift(module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        extra = next(values)
        return None if extra is None else output + extra

    block.get_submodule("output").register_forward_hook(shift)


def _boxes_around_zero(model: Pretraining) -> None:
    """Boxes mapped to [-1, 1]; the norm that follows does not undo it."""
    boxes = model.encoder.region_embeddings.boxes
    boxes.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2 - 1,))


def _other_scale(model: Pretraining) -> None:
    losses = model.masked_regions.losses
    other = OFFICIAL_SCALE if losses.scale == TRANSFORMERS_SCALE else TRANSFORMERS_SCALE
    model.masked_regions.losses = replace(losses, scale=other)


MUTATIONS: Mapping[str, Callable[[Pretraining], Any]] = {
    **{
        f"nudge {name}": nudge(name)
        for name in (
            "encoder.embeddings.positions.weight",
            "encoder.embeddings.segments.weight",
            "encoder.norm.weight",
            "encoder.region_embeddings.features.bias",
            "encoder.region_embeddings.feature_norm.bias",
            "encoder.region_embeddings.boxes.weight",
            "encoder.region_embeddings.box_norm.weight",
            "encoder.text_layers.0.self_attention.attention.query.bias",
            "encoder.text_layers.-1.feed_forward.norm.weight",
            "encoder.region_layers.0.self_attention.attention.value.bias",
            "encoder.region_layers.-1.feed_forward.up.bias",
            "encoder.cross_layers.0.cross_attention.attention.value.weight",
            "encoder.cross_layers.0.cross_attention.norm.weight",
            "encoder.cross_layers.0.text_self_attention.output.bias",
            "encoder.cross_layers.0.region_self_attention.norm.bias",
            "encoder.cross_layers.0.text_feed_forward.down.bias",
            "encoder.cross_layers.0.region_feed_forward.norm.weight",
            "encoder.pooler.dense.bias",
            "masked_lm.head.norm.weight",
            "masked_lm.head.bias",
            "matching.head.linear.bias",
            "masked_regions.head.transform.dense.bias",
            "masked_regions.head.transform.norm.weight",
            "masked_regions.head.outputs.features.bias",
            "image_qa.head.dense.bias",
            "image_qa.head.norm.weight",
            "image_qa.head.linear.bias",
        )
    },
    "epsilon of the norms": _rough_norms(),
    "one direction after the other": sequential,
    "directions with weights of their own": _own_projection_per_direction,
    "boxes around zero": _boxes_around_zero,
    "query and value swapped": _swap(
        "encoder.cross_layers.0.cross_attention.attention.query.weight",
        "encoder.cross_layers.0.cross_attention.attention.value.weight",
    ),
    "streams of a cross layer swapped": _swap(
        "encoder.cross_layers.0.text_self_attention.attention.value.weight",
        "encoder.cross_layers.0.region_self_attention.attention.value.weight",
    ),
    "the other loss scale": _other_scale,
    "labels without confidence": lambda model: setattr(
        model.masked_regions, "losses", replace(model.masked_regions.losses, weighted=False)
    ),
    "mean over chosen regions": lambda model: setattr(
        model.masked_regions, "losses", replace(model.masked_regions.losses, over="chosen")
    ),
    "dropout on": lambda model: model.train(),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_model_is_noticed(recording: Recording, mutation: str) -> None:
    model = Pretraining(recording)
    MUTATIONS[mutation](model)
    with pytest.raises(AssertionError):
        compare_official(model, recording)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_model_is_noticed_against_transformers(recording: Recording, mutation: str) -> None:
    model = Pretraining(recording, TRANSFORMERS_SCALE)
    MUTATIONS[mutation](model)
    with pytest.raises(AssertionError):
        compare_transformers(model, recording)


MASKED = [partial(compare_region_mask, source=source) for source in ("outputs", "outputs_hf")]
LOOKS: Mapping[str, Callable[[nn.Module], None]] = {
    **{
        f"nudge {name}": nudge(f"encoder.{name}")
        for name in (
            "text_layers.0.self_attention.attention.query.bias",
            "region_embeddings.box_norm.weight",
            "cross_layers.0.cross_attention.attention.query.weight",
        )
    },
    "epsilon of the norms": _rough_norms(100),
}


@pytest.mark.parametrize("compare", [compare_maps, *MASKED], ids=["maps", "official", "transformers"])
@pytest.mark.parametrize("mutation", LOOKS)
def test_broken_maps_and_masked_states_are_noticed(
    recording: Recording, compare: Callable[[Pretraining, Recording], None], mutation: str
) -> None:
    model = Pretraining(recording)
    LOOKS[mutation](model)
    with pytest.raises(AssertionError):
        compare(model, recording)


@pytest.mark.parametrize("compare", MASKED, ids=["official", "transformers"])
def test_a_swapped_direction_is_noticed_under_a_region_mask(
    recording: Recording, compare: Callable[[Pretraining, Recording], None]
) -> None:
    model = Pretraining(recording)
    sequential(model)
    with pytest.raises(AssertionError):
        compare(model, recording)


@pytest.mark.parametrize(
    "compare", [compare_question_answering, partial(compare_two_images, shared=True)], ids=["vqa", "nlvr2"]
)
@pytest.mark.parametrize(
    "change",
    [
        *(
            nudge(f"head.{name}")
            for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "linear.weight", "linear.bias")
        ),
        nudge("encoder.pooler.dense.bias"),
        nudge("encoder.cross_layers.-1.cross_attention.norm.weight"),
        _rough_norms(1000),
        lambda model: model.train(),
    ],
    ids=[
        "dense weight",
        "dense",
        "norm scale",
        "norm",
        "linear weight",
        "linear",
        "pooler",
        "cross norm",
        "epsilon",
        "dropout",
    ],
)
def test_a_broken_task_model_is_noticed(
    recording: Recording, compare: Callable[..., None], change: Callable[[Finetuned], Any]
) -> None:
    with pytest.raises(AssertionError):
        compare(recording, change=change)


def _their_config(config: LxmertConfig, **added: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LxmertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.num_segments,
        l_layers=config.num_text_layers,
        r_layers=config.num_region_layers,
        x_layers=config.num_cross_layers,
        visual_feat_dim=config.feature_size,
        **added,
    )


@pytest.fixture
def theirs(recording: Recording) -> Any:
    """A model of the installed transformers with random weights away from their symmetric start."""
    transformers = pytest.importorskip("transformers")
    sizes = recording.sizes
    model = transformers.LxmertForPreTraining(
        _their_config(
            recording.config,
            num_object_labels=sizes["num_object_labels"],
            num_attr_labels=sizes["num_attr_labels"],
            num_qa_labels=sizes["num_qa_labels"],
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _their_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", "token_type_ids", "visual_feats", "visual_pos", "visual_attention_mask")
    return {name: inputs[name].float() if name.endswith("attention_mask") else inputs[name] for name in names}


def test_installed_transformers_to_ours(recording: Recording, theirs: Any) -> None:
    inputs = recording.tensors("inputs")
    model = Pretraining(recording)
    coverage = models.spec("lxmert").keys["transformers"].load(theirs.state_dict(), model.parts)
    assert coverage.complete
    assert not coverage.dropped
    batch = batch_of(inputs, region_mask=True)
    text = batch.text.mask
    with torch.no_grad():
        expected = theirs.lxmert(**_their_inputs(inputs), output_hidden_states=True, output_attentions=True)
        scores = theirs(**_their_inputs(inputs))
    encoded = model.encoder(batch, capture=True)
    assert encoded.states is not None
    assert encoded.maps is not None
    assert_rows_close(encoded.text, expected.language_output, text, "text", **CLOSE)
    assert_rows_close(encoded.regions, expected.vision_output, real_positions(batch, "regions"), "regions", **CLOSE)
    assert_close(encoded.pooled, expected.pooled_output, **CLOSE)
    for name, theirs_name in state_names(model.encoder.config, official=False).items():
        kind, _, number = theirs_name.rpartition(".")
        recorded = getattr(expected, kind)[int(number)]
        assert_rows_close(encoded.states[name], recorded, real_positions(batch, name), name, **CLOSE)
    for layer, probs in enumerate(expected.cross_encoder_attentions):
        ours = encoded.maps.text_to_regions[f"cross_layers.{layer}.cross"]
        assert_close(attention_of(text, ours), attention_of(text, probs), **CLOSE)
    assert_close(model.masked_lm.head(encoded.text)[text], scores.prediction_logits[text], **CLOSE)
    assert_close(model.matching.head(encoded.pooled), scores.cross_relationship_score, **CLOSE)
    assert_close(model.image_qa.head(encoded.pooled), scores.question_answering_score, **CLOSE)


def test_ours_to_installed_transformers(recording: Recording, theirs: Any) -> None:
    inputs = recording.tensors("inputs")
    model = Pretraining(recording)
    tensors = {
        f"{name}.{key}": tensor for name, module in model.parts.items() for key, tensor in module.state_dict().items()
    }
    theirs.load_state_dict(models.spec("lxmert").keys["transformers"].invert(tensors))
    with torch.no_grad():
        expected = theirs.lxmert(**_their_inputs(inputs))
    batch = batch_of(inputs, region_mask=True)
    encoded = model.encoder(batch)
    assert_rows_close(encoded.text, expected.language_output, batch.text.mask, "text", **CLOSE)
    assert_rows_close(encoded.regions, expected.vision_output, real_positions(batch, "regions"), "regions", **CLOSE)
    assert_close(expected.pooled_output, encoded.pooled, **CLOSE)


@pytest.mark.parametrize("kind", ["bare", "question answering"])
def test_other_classes_of_installed_transformers(recording: Recording, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = _their_config(recording.config, num_qa_labels=7)
    encoder, inputs = Lxmert(recording.config).eval(), recording.tensors("inputs")
    batch, keys = batch_of(inputs, region_mask=True), models.spec("lxmert").keys["transformers"]
    if kind == "bare":
        model = transformers.LxmertModel(config).eval()
        keys.load(model.state_dict(), {"encoder": encoder})
        assert_close(encoder(batch).pooled, model(**_their_inputs(inputs)).pooled_output, **CLOSE)
    else:
        model = transformers.LxmertForQuestionAnswering(config).eval()
        head = build(Head(kind="classify", outputs=7), encoder.dims, style="gelu_norm")
        keys.load(model.state_dict(), {"encoder": encoder, "answers": head})
        assert_close(head(encoder(batch).pooled), model(**_their_inputs(inputs)).question_answering_score, **CLOSE)
