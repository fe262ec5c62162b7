"""VL-BERT against values recorded from the official release (`golden/vlbert`; its config.json describes every tensor).

Sizes and token ids come from the recorded config.json, and so does the tolerance of states and logits, 2e-5: a rounding
of a unit corner is magnified a hundredfold before its sine is taken. Losses 1e-5 + 1e-5 |b| (on another folder what its
config.json states), gradient norms 1e-6 + 1e-4 |b|. The release packs text, whole image, regions and [END] of a row
without a gap; ours are brought into that order before they are compared. Exempt: what stands on padding, in
`text_out_last` and the logits past a row's text too (states of regions there), zeros or a constant on padded regions;
our states there are zeros.
`fast_rcnn` is compared from `obj_reps_raw` on; what comes before, and `obj_reps_with_segms`, is in
test_vlbert_extractor.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_support import assert_rows_close, labelled, nudge_first, parameter_of, rough_norms
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling import models
from visling.boxes import to_pixels, to_unit
from visling.checkpoints.keymap import Coverage
from visling.models import vlbert
from visling.models.vlbert import RegionProjection, VlBert, VlBertConfig, geometry
from visling.nn.attention import Attention
from visling.nn.heads import build
from visling.nn.packing import Packing
from visling.nn.trace import Trace
from visling.objectives.base import PretrainStep
from visling.objectives.masked_lm import MaskedLM, masked_lm_loss
from visling.objectives.masked_regions import MaskedRegions, hard_class_loss, soft_class_cross_entropy_loss
from visling.objectives.matching import Matching
from visling.recipes.vlbert import REGION_LOSSES
from visling.tasks.answers import answer_loss
from visling.types import IGNORE, Batch, Encoded, Head, Regions, Slots, Targets, Text

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 0}
LOSSES: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}


@dataclass(frozen=True)
class Recording:
    """The recorded set and ways to rebuild its models."""

    folder: Path
    nudged: str = ""
    """A recorded weight whose first entry is moved by a hundredth."""
    norm_eps: float | None = None
    """Of every norm, where it is not the recorded one."""

    @property
    def sizes(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads((self.folder / "config.json").read_text())["hyper_parameters"]
        return described

    def token(self, name: str) -> int:
        """Id of a special token such as [CLS]."""
        found = re.search(rf"{re.escape(name)} (\d+)", self.sizes["token ids"])
        assert found is not None, name
        return int(found[1])

    def config(self, **changes: Any) -> VlBertConfig:
        sizes = self.sizes
        config = VlBertConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            norm_eps=sizes["layer_norm_eps"],
            feature_size=sizes["appearance_feature_dim"],
            coordinate_size=sizes["coordinate_embedding_dim"],
            visual_size=sizes["visual_size"],
            max_tokens=sizes["max_position_embeddings"] - 2,
        )
        return replace(config, **changes)

    def broken(self, model: nn.Module) -> None:
        """Give every norm the epsilon that was asked for."""
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and self.norm_eps is not None:
                module.eps = self.norm_eps

    def tensors(self, file: str) -> dict[str, Tensor]:
        found = load_file(self.folder / f"{file}.safetensors")
        if self.nudged in found:
            found[self.nudged].view(-1)[0] += 0.01
        return found

    def inputs(self, case: str) -> dict[str, Tensor]:
        return self.tensors(f"{case}/inputs")

    def outputs(self, case: str, variant: str = "") -> dict[str, Tensor]:
        prefix = f"{variant}/" if variant else ""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors(f"{case}/outputs").items()
            if name.startswith(prefix)
        }

    def weights(self, case: str) -> dict[str, Tensor]:
        """The state dict of a case, put together as config.json says."""
        if case.startswith("core_"):
            bare = self.tensors("core_visual_ln/state_dict")
            if case == "core_visual_scale":
                bare = {
                    name: tensor for name, tensor in bare.items() if not name.startswith(("visual_ln_", "pooler."))
                } | self.tensors("core_visual_scale/extra_state")
            return {f"vlbert.{name}": tensor for name, tensor in bare.items()}
        whole = self.tensors("pretrain_single/state_dict")
        if case == "pretrain_single":
            return whole
        without = {
            name: tensor
            for name, tensor in whole.items()
            if not name.startswith(("vlbert.pooler.", "vlbert.relationsip_head."))
        }
        if case == "pretrain_multitask":
            return without | self.tensors("pretrain_multitask/extra_state")
        kept = ("image_feature_extractor.", "object_linguistic_embeddings.", "vlbert.")
        encoder = {name: tensor for name, tensor in without.items() if name.startswith(kept) and "_head." not in name}
        if case == "vcr":
            encoder = {name.replace("vlbert.", "vlbert._module."): tensor for name, tensor in encoder.items()}
        return encoder | self.tensors(f"{case}/head_state")

    def load(self, case: str, parts: Mapping[str, nn.Module]) -> Coverage:
        layout = case if case in ("vqa", "refcoco", "vcr") else "official"
        return models.spec("vlbert").keys[layout].load(self.weights(case), parts, strict=not case.startswith("core_"))

    def encoder(self, case: str, **changes: Any) -> VlBert:
        encoder = VlBert(self.config(**changes)).eval()
        self.load(case, {"encoder": encoder})
        self.broken(encoder)
        return encoder

    def head(self, case: str, part: str, encoder: VlBert, head: Head, style: str, group: int = 1) -> nn.Module:
        module = build(head, encoder.dims, style=style, words=encoder.word_embeddings, group=group).eval()
        self.load(case, {"encoder": encoder, part: module})
        self.broken(module)
        return module


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "vlbert")


def text_of(ids: Tensor, segments: Tensor | None = None, answer_at: Tensor | None = None) -> Text:
    return Text(
        ids=ids, mask=ids > 0, segments=torch.zeros_like(ids) if segments is None else segments, answer_at=answer_at
    )


def whole_last(objects: Tensor) -> Tensor:
    """(B, N, ...) with the whole image moved from the front to the back."""
    return torch.cat([objects[:, 1:], objects[:, :1]], dim=1)


def regions_of(boxes: Tensor, im_info: Tensor, ops: Tensor | None = None) -> Regions:
    """Recorded boxes (B, N, 4 + F), whole image first, padding -2, as our regions."""
    mask = boxes[:, 1:, 0] > -1.5
    size = im_info[:, :2]
    return Regions(
        features=boxes[:, 1:, 4:],
        boxes=to_unit(boxes[:, 1:, :4], size) * mask[..., None],
        mask=mask,
        size=size,
        whole=boxes[:, 0, 4:],
        hidden=None if ops is None else ops[:, 1:] == 1,
    )


def checked(batch: Batch) -> Batch:
    batch.validate()
    return batch


def packed(states: Tensor, text_mask: Tensor, region_mask: Tensor | None) -> list[Tensor]:
    """States (B, T + N + 1, ...) of ours, row by row in the order of the release: text, whole image, regions, [END];
    nothing else."""
    rows, tokens = text_mask.shape
    regions = 0 if region_mask is None else region_mask.shape[1]
    return [
        states[row][_order(text_mask[row], tokens, regions, None if region_mask is None else region_mask[row])]
        for row in range(rows)
    ]


def _order(text: Tensor, tokens: int, regions: int, mask: Tensor | None) -> Tensor:
    words = text.nonzero().flatten()
    if mask is None:
        return torch.cat([words, torch.tensor([tokens])])
    return torch.cat(
        [
            words,
            torch.tensor([tokens + regions]),
            tokens + mask.nonzero().flatten(),
            torch.tensor([tokens + regions + 1]),
        ]
    )


def compare_packed(states: Tensor, recorded: Tensor, text_mask: Tensor, region_mask: Tensor | None, name: str) -> None:
    """States equal the recorded ones of each row, and are zeros at padding."""
    seen_mask = text_mask[:, :0] if region_mask is None else F.pad(region_mask, (0, 1), value=True)
    real = torch.cat([text_mask, seen_mask, text_mask.new_ones(len(text_mask), 1)], dim=1)  # (B, T + N + 1)
    assert not states[~real].any(), f"{name}: padding has states"
    for row, (ours, theirs) in enumerate(zip(packed(states, text_mask, region_mask), recorded, strict=True)):
        assert_close(ours, theirs[: len(ours)], **CLOSE, msg=labelled(f"{name}, row {row}"))


@contextmanager
def seen(model: VlBert) -> Iterator[list[tuple[Any, ...]]]:
    """Collects what the joint embeddings are given: text, token_visual, region_words, region_visual, region_rows."""
    calls: list[tuple[Any, ...]] = []
    hook = model.embeddings.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    yield calls
    hook.remove()


# ---------------------------------------------------------------------------------------------------------------------
# the Transformer by itself


def compare_core(recording: Recording, case: str, model: VlBert) -> None:
    inputs, recorded = recording.inputs(case), recording.outputs(case)
    text = Text(ids=inputs["text_input_ids"], mask=inputs["text_mask"], segments=inputs["text_token_type_ids"])
    objects, mask = whole_last(inputs["object_vl_embeddings"]), whole_last(inputs["object_mask"])
    visual, words = objects.split([model.config.visual_size, model.config.hidden_size], dim=-1)  # type: ignore[no-untyped-call]
    region_mask = mask[:, :-1]
    packed, rows = model.embeddings(text, inputs["text_visual_embeddings"], words, visual, Packing.of(mask))
    states = rows.unpack(packed)
    compare_packed(states, recorded["embedding_output"], text.mask, region_mask, "embeddings")
    assert torch.equal(rows.mask.sum(1), recorded["packed_mask"].sum(1))
    trace = Trace(True, num_tokens=rows.mask.shape[1])  # kept whole: all positions as text
    for number, layer in enumerate(model.layers):
        packed = layer(packed, rows, trace.at(f"layers.{number}"))
        states = rows.unpack(packed)
        compare_packed(states, recorded[f"layer_{number}"], text.mask, region_mask, f"layer {number}")
        if f"attention_{number}" in recorded:
            theirs = recorded[f"attention_{number}"].movedim(1, -1)  # (B, from, to, H)
            maps = trace.maps()
            assert maps is not None
            _compare_attention(maps.text_to_text[f"layers.{number}"].movedim(1, -1), theirs, text.mask, region_mask)
    tokens = text.ids.shape[1]
    assert_rows_close(states[:, :tokens], recorded["text_out_last"], text.mask, "text", **CLOSE)
    assert_rows_close(states[:, tokens:-1], whole_last(recorded["object_out_last"]), mask, "regions", **CLOSE)
    if "pooled" in recorded:
        assert_close(model.pooler(states), recorded["pooled"], **CLOSE)


def _compare_attention(ours: Tensor, theirs: Tensor, text_mask: Tensor, region_mask: Tensor) -> None:
    tokens, regions = text_mask.shape[1], region_mask.shape[1]
    for row in range(len(ours)):
        order = _order(text_mask[row], tokens, regions, region_mask[row])
        assert_close(
            ours[row][order][:, order],
            theirs[row, : len(order), : len(order)],
            **CLOSE,
            msg=labelled(f"attention, row {row}"),
        )


@pytest.mark.parametrize("case", ["core_visual_ln", "core_visual_scale"])
def test_transformer_states_and_attention(recording: Recording, case: str) -> None:
    changes = (
        {}
        if case == "core_visual_ln"
        else {"visual_norm": False, "visual_size": recording.sizes["visual_size in core_visual_scale"]}
    )
    compare_core(recording, case, recording.encoder(case, **changes))


def test_geometry(recording: Recording) -> None:
    boxes, recorded = recording.inputs("geometry")["boxes"], recording.outputs("geometry")
    assert recorded
    for theirs in recorded.values():
        ours = geometry(to_unit(boxes[:, None, :4], boxes[:, 4:]), theirs.shape[-1] // 2)
        assert_close(ours, theirs.flatten(1)[:, None], **CLOSE)


@pytest.mark.parametrize("variant", ["dilated", "strided"])
def test_projection_of_what_the_trained_extractor_pools(recording: Recording, variant: str) -> None:
    inputs, recorded = recording.inputs("fast_rcnn"), recording.tensors(f"fast_rcnn/outputs_{variant}")
    raw, size = recorded["obj_reps_raw"], inputs["im_info"][:, :2]
    weights = recording.tensors("fast_rcnn/state_dict")
    weight = weights["obj_downsample.1.weight"]
    projection = RegionProjection(
        feature_size=raw.shape[-1],
        coordinate_size=(weight.shape[1] - raw.shape[-1]) // 8,
        visual_size=len(weight),
        dropout_rate=0.1,
    ).eval()
    projection.linear.load_state_dict({name: weights[f"obj_downsample.1.{name}"] for name in ("weight", "bias")})
    boxes, real = to_unit(inputs["boxes"], size), inputs["box_mask"]
    assert_close(projection(raw, boxes)[real], recorded["obj_reps"][real], **CLOSE)
    masked = torch.where(inputs["mvrc_ops"][..., None] == 1, inputs["mask_visual_embed"], raw)
    assert_close(projection(masked, boxes)[real], recorded["obj_reps_masked_feature"][real], **CLOSE)


# --------------------------------------------------------------------------------------------------------- pre-training


class Pretraining(nn.Module):
    """Encoder and the heads of the release, as recorded."""

    def __init__(self, recording: Recording, case: str) -> None:
        super().__init__()
        self.encoder = VlBert(recording.config())
        dims, classes = self.encoder.dims, recording.sizes["visual_region_classes"]
        self.masked_lm = MaskedLM(dims, "bert", self.encoder.word_embeddings)
        losses = replace(REGION_LOSSES, num_classes=classes)
        self.masked_regions = MaskedRegions(dims, "vlbert", self.encoder.word_embeddings, losses=losses)
        self.matching = Matching(dims, "plain", self.encoder.word_embeddings)
        self.parts = {
            "encoder": self.encoder,
            "vocabulary": self.masked_lm.head,
            "region_targets": self.masked_regions.head,
        }
        if case == "pretrain_single":
            self.parts["matching"] = self.matching.head
        self.coverage = recording.load(case, self.parts)
        self.eval()

    def words(self, states: Tensor) -> Tensor:
        scores: Tensor = self.masked_lm.head(states)
        return scores

    def classes(self, encoded: Encoded) -> Tensor:
        """(B, N, C), the whole image first as recorded."""
        assert encoded.whole is not None
        scores: Tensor = self.masked_regions.head(torch.cat([encoded.whole[:, None], encoded.regions], dim=1))[
            "classes"
        ]
        return scores

    def step(
        self,
        batch: Batch,
        encoded: Encoded,
        word_labels: Tensor,
        region_labels: Tensor | None,
        matched: Tensor | None = None,
    ) -> PretrainStep:
        """What the objectives read; every region with a label is a slot. The whole image, first in the labels, never
        has one."""
        probs = None if region_labels is None else region_labels[:, 1:]
        targets = Targets(
            token_slots=slots_of(word_labels >= 0),
            token_ids=word_labels,
            class_slots=None if probs is None else slots_of(probs.sum(-1) > 0.5),
            region_probs=probs,
            matched=matched,
        )
        return PretrainStep(model=self.encoder, batch=batch, encoded=encoded, targets=targets)


def slots_of(chosen: Tensor) -> Slots:
    """Every position as a slot, the chosen ones real."""
    return Slots(at=torch.arange(chosen.shape[1]).expand_as(chosen), mask=chosen)


def words_by_rows(scores: Tensor, labels: Tensor) -> Tensor:
    """Masked language modelling, averaged per row first (`MLM_LOSS_NORM_IN_BATCH_FIRST`)."""
    return masked_lm_loss(scores, labels, labels >= 0, over="rows").value


def regions_by_rows(scores: Tensor, labels: Tensor) -> Tensor:
    """Masked region classification, averaged per row first (`MVRC_LOSS_NORM_IN_BATCH_FIRST`)."""
    return soft_class_cross_entropy_loss(scores, labels, labels.sum(-1) > 0.5, over="rows").value


def captions_of(inputs: Mapping[str, Tensor]) -> Batch:
    return checked(
        Batch(text=text_of(inputs["text"]), regions=regions_of(inputs["boxes"], inputs["im_info"], inputs["mvrc_ops"]))
    )


def compare_single(recording: Recording, model: Pretraining) -> None:
    """Everything recorded of pre-training on captions."""
    inputs, recorded = recording.inputs("pretrain_single"), recording.outputs("pretrain_single")
    on = {name.removeprefix("rel_on/"): tensor for name, tensor in recorded.items() if name.startswith("rel_on/")}
    batch = captions_of(inputs)
    regions = batch.regions
    assert regions is not None
    with seen(model.encoder) as calls:
        encoded = model.encoder(batch, capture=True)
    real = inputs["boxes"][..., 0] > -1.5
    assert_close(calls[0][3][whole_last(real)], whole_last(on["obj_reps"])[whole_last(real)], **CLOSE)
    assert encoded.states is not None
    for number in range(recording.sizes["num_hidden_layers"]):
        compare_packed(
            encoded.states[f"layers.{number}"], on[f"layer_{number}"], batch.text.mask, regions.mask, f"layer {number}"
        )
    words, classes, matching = model.words(encoded.text), model.classes(encoded), model.matching.head(encoded.pooled)
    assert_close(words[batch.text.mask], on["mlm_logits"][batch.text.mask], **CLOSE)
    assert_close(classes[real], on["mvrc_logits"][real], **CLOSE)
    assert_close(matching, on["relationship_logits"], **CLOSE)
    step = model.step(batch, encoded, inputs["mlm_labels"], inputs["mvrc_labels"], inputs["relationship_label"])
    masked_lm, masked_regions, matched = (
        objective(step).value for objective in (model.masked_lm, model.masked_regions, model.matching)
    )
    assert_close(masked_lm, on["mlm_loss"], **LOSSES)
    assert_close(masked_regions, on["mvrc_loss"], **LOSSES)
    assert_close(matched, on["relationship_loss"], **LOSSES)
    assert_close(masked_lm + masked_regions + matched, on["loss"], **LOSSES)
    for name, loss in (("mlm_loss", masked_lm), ("mvrc_loss", masked_regions), ("loss", masked_lm + masked_regions)):
        assert_close(loss, recorded[f"rel_off/{name}"], **LOSSES)
    by_rows = words_by_rows(words, inputs["mlm_labels"]), regions_by_rows(classes, inputs["mvrc_labels"])
    for name, loss in (("mlm_loss", by_rows[0]), ("mvrc_loss", by_rows[1]), ("loss", by_rows[0] + by_rows[1])):
        assert_close(loss, recorded[f"rel_off_norm_in_batch_first/{name}"], **LOSSES)


def test_pretraining_on_captions(recording: Recording) -> None:
    compare_single(recording, Pretraining(recording, "pretrain_single"))


def compare_multitask(recording: Recording, model: Pretraining, *, gradients: bool = True) -> None:
    """Everything recorded of a step on captions and plain text, which are two batches here."""
    inputs, recorded = recording.inputs("pretrain_multitask"), recording.outputs("pretrain_multitask")
    captions, plain = captions_of(inputs), checked(Batch(text=text_of(inputs["aux_text"]), regions=None))
    regions = captions.regions
    assert regions is not None
    rows = len(captions.text.ids)
    with seen(model.encoder) as calls:
        first, second = model.encoder(captions, capture=True), model.encoder(plain, capture=True)
    given, mask = (
        whole_last(recorded["object_vl_embeddings_multi"][:rows]),
        whole_last(recorded["box_mask_multi"][:rows]),
    )
    assert_close(torch.cat([calls[0][3], calls[0][2]], dim=-1)[mask], given[mask], **CLOSE)
    assert first.states is not None
    assert second.states is not None
    names = {
        "embeddings": "embedding_output",
        **{f"layers.{i}": f"layer_{i}" for i in range(recording.sizes["num_hidden_layers"])},
    }
    for ours, theirs in names.items():
        compare_packed(first.states[ours], recorded[theirs][:rows], captions.text.mask, regions.mask, ours)
        compare_packed(second.states[ours], recorded[theirs][rows:], plain.text.mask, None, f"{ours} of plain text")
    words, plain_words, classes = model.words(first.text), model.words(second.text), model.classes(first)
    assert_close(
        words[captions.text.mask], recorded["mlm_logits_wvc"][:, : words.shape[1]][captions.text.mask], **CLOSE
    )
    assert_close(plain_words[plain.text.mask], recorded["mlm_logits_aux"][plain.text.mask], **CLOSE)
    real = inputs["boxes"][..., 0] > -1.5
    assert_close(classes[real], recorded["mvrc_logits"][real], **CLOSE)
    steps = (
        model.step(captions, first, inputs["mlm_labels"], inputs["mvrc_labels"]),
        model.step(plain, second, inputs["aux_mlm_labels"], None),
    )
    losses = model.masked_lm(steps[0]).value, model.masked_lm(steps[1]).value, model.masked_regions(steps[0]).value
    assert model.masked_regions(steps[1]).value == 0
    by_rows = (
        words_by_rows(words, inputs["mlm_labels"]),
        words_by_rows(plain_words, inputs["aux_mlm_labels"]),
        regions_by_rows(classes, inputs["mvrc_labels"]),
    )
    for computed, expected in (
        (losses, recorded),
        (by_rows, recording.tensors("pretrain_multitask/outputs_norm_in_batch_first")),
    ):
        for name, loss in zip(("mlm_loss_wvc", "mlm_loss_aux", "mvrc_loss"), computed, strict=True):
            assert_close(loss, expected[name], **LOSSES, msg=labelled(name))
        assert_close(sum(computed), expected["loss"], **LOSSES)
    if gradients:
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        _compare_gradients(
            model, {name.removeprefix("grad_norm/"): norm for name, norm in recorded.items() if "grad_norm/" in name}
        )


def _compare_gradients(model: Pretraining, recorded: Mapping[str, Tensor]) -> None:
    squares: dict[str, Tensor] = {}
    for part, module in model.parts.items():
        for name, parameter in module.named_parameters():
            if f"{part}.{name}" in model.coverage.mapped:
                assert parameter.grad is not None, name
                (theirs,) = model.coverage.mapped[f"{part}.{name}"]
                # One table of the release may be several parameters here.
                squares[theirs] = squares.get(theirs, torch.zeros(())) + parameter.grad.square().sum()
    assert squares.keys() == recorded.keys()
    for name, square in squares.items():
        assert_close(square.sqrt(), recorded[name], **GRADIENTS, msg=labelled(name))


def test_pretraining_on_captions_and_plain_text_with_gradients(recording: Recording) -> None:
    compare_multitask(recording, Pretraining(recording, "pretrain_multitask"))


# ---------------------------------------------------------------------------------------------------------------- tasks


def laid_out(recording: Recording, questions: Tensor, *ending: str) -> Tensor:
    """[CLS], the real pieces of each row, then special tokens; padded with zeros."""
    first, last = recording.token("[CLS]"), [recording.token(name) for name in ending]
    rows = [torch.tensor([first, *question[question > 0].tolist(), *last]) for question in questions]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_question_answering(recording: Recording) -> None:
    inputs, recorded = recording.inputs("vqa"), recording.outputs("vqa")
    encoder = recording.encoder("vqa")
    head = recording.head(
        "vqa", "classifier", encoder, Head(kind="classify", outputs=recording.sizes["vqa_answers"]), "vlbert"
    )
    ids = laid_out(recording, inputs["question"], "[SEP]", "[MASK]", "[SEP]")
    answer_at = (ids == recording.token("[MASK]")).int().argmax(1)
    segments = ((torch.arange(ids.shape[1]) >= answer_at[:, None]) & (ids > 0)).long()
    assert torch.equal(ids, recorded["text_input_ids"])
    assert torch.equal(segments, recorded["text_token_type_ids"])
    assert torch.equal(ids > 0, recorded["text_mask"])
    batch = checked(
        Batch(text=text_of(ids, segments, answer_at), regions=regions_of(inputs["boxes"], inputs["im_info"]))
    )
    logits = head(encoder(batch).pooled)
    assert_close(logits, recorded["label_logits"], **CLOSE)
    loss = answer_loss(logits, inputs["label"], "bce").value
    assert_close(loss, recorded["ans_loss"], **LOSSES)
    assert_close(loss, recorded["loss"], **LOSSES)


def test_referring_expressions(recording: Recording) -> None:
    inputs, recorded = recording.inputs("refcoco"), recording.outputs("refcoco")
    encoder = recording.encoder("refcoco")
    head = recording.head("refcoco", "regions", encoder, Head(kind="regions", outputs=1), "vlbert")
    regions = regions_of(inputs["boxes"], inputs["im_info"])
    encoded = encoder(checked(Batch(text=text_of(laid_out(recording, inputs["expression"], "[SEP]")), regions=regions)))
    assert encoded.whole is not None
    logits = head(torch.cat([encoded.regions, encoded.whole[:, None]], dim=1))
    labels = whole_last(inputs["label"])
    real = labels >= 0
    for name in ("label_logits", "inference_label_logits"):
        assert_close(logits[real], whole_last(recorded[name])[real], **CLOSE)
    loss = F.binary_cross_entropy_with_logits(logits[real], labels[real])
    assert_close(loss, recorded["cls_loss"], **LOSSES)
    assert_close(loss, recorded["loss"], **LOSSES)
    best = logits.masked_fill(~real, -torch.inf).argmax(1)
    whole = torch.cat([torch.zeros_like(regions.size), 1 - 1 / regions.size], dim=-1)
    boxes = torch.cat([regions.boxes, whole[:, None]], dim=1)[torch.arange(len(best)), best]
    pixels = to_pixels(boxes[:, None], regions.size)[:, 0] / inputs["im_info"][:, 2:].repeat(1, 2)
    assert_close(pixels, recorded["pred_boxes"], atol=1e-3, rtol=1e-6)


class Given(nn.Module):
    """Stands in for the projection of regions, whose results `visual` (S, N, Dv) are recorded; `real` (S, N)."""

    def __init__(self, visual: Tensor, real: Tensor) -> None:
        super().__init__()
        self.visual = Packing.of(real).pack(visual)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        assert len(features) == len(boxes) == len(self.visual)
        return self.visual


def choices_of(recording: Recording, question: Tensor, answers: Tensor) -> tuple[Text, Tensor]:
    """Rows [CLS] question [SEP] answer [SEP] of every choice, and the tag (0 = whole image) of each piece; padding
    -2."""
    cls, sep = recording.token("[CLS]"), recording.token("[SEP]")
    rows, tags, segments = [], [], []
    for asked, choices in zip(question, answers, strict=True):
        asked = asked[asked[:, 0] >= 0]
        for choice in choices:
            told = choice[choice[:, 0] >= 0]
            rows.append(torch.tensor([cls, *asked[:, 0].tolist(), sep, *told[:, 0].tolist(), sep]))
            tags.append(torch.tensor([0, *asked[:, 1].tolist(), 0, *told[:, 1].tolist(), 0]))
            segments.append(torch.tensor([0] * (len(asked) + 2) + [1] * (len(told) + 1)))
    ids, tag, segment = (nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (rows, tags, segments))
    return text_of(ids, segment), tag


def test_choices_with_tagged_words(recording: Recording) -> None:
    inputs, recorded = recording.inputs("vcr"), recording.outputs("vcr")
    boxes, num_choices = inputs["boxes"], inputs["answer_choices"].shape[1]
    encoder = recording.encoder("vcr")
    head = recording.head("vcr", "classifier", encoder, Head(kind="score", outputs=1), "linear")
    objects = recording.tensors("vcr/head_state")["cnn_loss_reg.2.bias"].numel()
    region_head = recording.head(
        "vcr", "objects", encoder, Head(kind="region_targets", outputs=objects, options={"classes": objects}), "vlbert"
    )
    encoder.projection = Given(  # type: ignore[assignment]
        whole_last(inputs["obj_reps"]), whole_last(boxes[..., 3] > -0.5)
    )

    text, tag = choices_of(recording, inputs["question"], inputs["answer_choices"])
    for name, ours in (("text_input_ids", text.ids), ("text_token_type_ids", text.segments), ("text_mask", text.mask)):
        assert torch.equal(ours.view_as(recorded[name]), recorded[name])
    mask = boxes[:, 1:, 3] > -0.5
    row = torch.arange(len(boxes)).repeat_interleave(num_choices)
    links = F.one_hot(tag, boxes.shape[1])[..., 1:].bool()
    regions = Regions(
        features=torch.zeros(*mask.shape, encoder.config.feature_size),
        boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*mask.shape, 4),
        mask=mask,
        size=boxes[:, 0, 2:4] + 1,
        row=row,
    )
    batch = checked(Batch(text=text, regions=regions, links=links, group=num_choices))
    with seen(encoder) as calls:
        encoded = encoder(batch)
    assert_close(calls[0][1][text.mask], recorded["text_visual_embeddings"].flatten(0, 1)[text.mask], **CLOSE)
    logits = head(encoded.pooled).view(-1, num_choices)
    assert_close(logits, recorded["label_logits"], **CLOSE)

    assert encoded.whole is not None
    classes = region_head(torch.cat([encoded.regions, encoded.whole[:, None]], dim=1))["classes"]
    real, labels = whole_last(boxes[..., 3] > -0.5)[row], whole_last(boxes[..., 5]).long()[row]
    region_loss = hard_class_loss(classes, labels.masked_fill(~real, IGNORE), real).value
    assert_close(region_loss, recorded["cnn_regularization_loss"], **LOSSES)
    right = inputs["answer_label"]
    for kind, loss in (
        ("sigmoid", answer_loss(logits, F.one_hot(right, num_choices), "bce").value / num_choices),
        ("softmax", F.cross_entropy(logits, right)),
    ):
        assert_close(loss, recorded[f"ans_loss_{kind}"], **LOSSES)
        assert_close(loss + region_loss, recorded[f"loss_{kind}"], **LOSSES)


# -------------------------------------------------------------------------------------------- broken models are noticed


def _swap(first: str, second: str) -> Callable[[Pretraining], None]:
    """Exchange two parameters of one shape."""

    def change(model: Pretraining) -> None:
        with torch.no_grad():
            one, two = parameter_of(model, first), parameter_of(model, second)
            kept = one.clone()
            one.copy_(two)
            two.copy_(kept)

    return change


def _other_heads(model: Pretraining) -> None:
    attention = model.encoder.get_submodule("layers.0.self_attention.attention")
    assert isinstance(attention, Attention)
    attention.num_heads = 2 if attention.num_heads == 1 else 1


def _appearance_first(model: Pretraining) -> None:
    linear = model.encoder.projection.linear
    with torch.no_grad():
        linear.weight.copy_(linear.weight.roll(model.encoder.config.feature_size, dims=1))


def _features_stay(model: Pretraining) -> None:
    model.encoder.mask_feature = None


def _later_positions(model: Pretraining) -> None:
    positions = model.encoder.embeddings.positions
    with torch.no_grad():
        positions.weight[1:] = positions.weight[:-1].clone()


MUTATIONS: Mapping[str, Callable[[Pretraining], Any]] = {
    **{
        f"nudge {name}": nudge_first(name)
        for name in (
            "encoder.image_word",
            "encoder.mask_word",
            "encoder.mask_feature",
            "encoder.text_only",
            "encoder.projection.linear.bias",
            "encoder.projection.linear.weight",
            "encoder.embeddings.end",
            "encoder.embeddings.norm.bias",
            "encoder.embeddings.positions.weight",
            "encoder.embeddings.segments.0",
            "encoder.embeddings.segments.2",
            "encoder.embeddings.visual_text.norm.weight",
            "encoder.embeddings.visual_text.norm.bias",
            "encoder.embeddings.visual_regions.norm.weight",
            "encoder.embeddings.visual_regions.norm.bias",
            "encoder.layers.0.self_attention.attention.query.bias",
            "encoder.layers.0.self_attention.attention.value.bias",
            "encoder.layers.0.self_attention.norm.weight",
            "encoder.layers.-1.feed_forward.up.bias",
            "encoder.layers.-1.feed_forward.norm.weight",
            "masked_lm.head.bias",
            "masked_lm.head.norm.weight",
            "masked_regions.head.transform.dense.bias",
            "masked_regions.head.outputs.classes.bias",
        )
    },
    "epsilon of the norms": rough_norms,
    "another number of heads": _other_heads,
    "appearance before geometry": _appearance_first,
    "hidden features stay": _features_stay,
    "positions one later": _later_positions,
    "segments of text and regions swapped": _swap("encoder.embeddings.segments.0", "encoder.embeddings.segments.2"),
    "word vectors of shown and hidden regions swapped": _swap("encoder.image_word", "encoder.mask_word"),
    "visual norms of text and regions swapped": _swap(
        "encoder.embeddings.visual_text.norm.weight", "encoder.embeddings.visual_regions.norm.weight"
    ),
    "query and value swapped": _swap(
        "encoder.layers.-1.self_attention.attention.query.weight",
        "encoder.layers.-1.self_attention.attention.value.weight",
    ),
    "dropout on": lambda model: model.train(),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_model_is_noticed(recording: Recording, mutation: str) -> None:
    model = Pretraining(recording, "pretrain_multitask")
    MUTATIONS[mutation](model)
    with pytest.raises(AssertionError):
        compare_multitask(recording, model, gradients=False)


RELATIONSHIP: Mapping[str, Callable[[Pretraining], None]] = {
    **{
        name: nudge_first(name)
        for name in ("encoder.pooler.dense.bias", "matching.head.linear.bias", "encoder.embeddings.norm.weight")
    },
    "epsilon of the norms": rough_norms,
}


@pytest.mark.parametrize("mutation", RELATIONSHIP)
def test_a_broken_relationship_head_is_noticed(recording: Recording, mutation: str) -> None:
    model = Pretraining(recording, "pretrain_single")
    RELATIONSHIP[mutation](model)
    with pytest.raises(AssertionError):
        compare_single(recording, model)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("core_visual_ln", "embeddings.segments.1"),
        ("core_visual_scale", "embeddings.visual_text.scale"),
        ("core_visual_scale", "embeddings.visual_regions.linear.bias"),
        ("core_visual_scale", "embeddings.visual_text.linear.weight"),
        *(
            (case, name)
            for case in ("core_visual_ln", "core_visual_scale")
            for name in ("layers.-1.self_attention.norm.weight", "epsilon")
        ),
    ],
)
def test_a_broken_transformer_is_noticed(recording: Recording, case: str, name: str) -> None:
    changes = (
        {}
        if case == "core_visual_ln"
        else {"visual_norm": False, "visual_size": recording.sizes["visual_size in core_visual_scale"]}
    )
    model = recording.encoder(case, **changes)
    (rough_norms if name == "epsilon" else nudge_first(name))(model)
    with pytest.raises(AssertionError):
        compare_core(recording, case, model)


@pytest.mark.parametrize(
    ("compare", "name"),
    [
        (test_question_answering, "final_mlp.0.dense.bias"),
        (test_question_answering, "final_mlp.0.LayerNorm.weight"),
        (test_question_answering, "final_mlp.2.bias"),
        (test_question_answering, "vlbert.token_type_embeddings.weight"),
        (test_referring_expressions, "final_mlp.0.dense.bias"),
        (test_referring_expressions, "final_mlp.2.weight"),
        (test_referring_expressions, "object_linguistic_embeddings.weight"),
        (test_choices_with_tagged_words, "vlbert._module.pooler.dense.bias"),
        (test_choices_with_tagged_words, "cnn_loss_reg.0.dense.bias"),
        (test_choices_with_tagged_words, "final_mlp.1.bias"),
        (partial(test_projection_of_what_the_trained_extractor_pools, variant="dilated"), "obj_downsample.1.bias"),
    ],
)
def test_a_nudged_weight_of_a_task_is_noticed(
    recording: Recording, compare: Callable[[Recording], None], name: str
) -> None:
    with pytest.raises(AssertionError):
        compare(replace(recording, nudged=name))


@pytest.mark.parametrize(
    "compare", [test_question_answering, test_referring_expressions, test_choices_with_tagged_words]
)
def test_another_epsilon_in_a_task_is_noticed(recording: Recording, compare: Callable[[Recording], None]) -> None:
    with pytest.raises(AssertionError):
        compare(replace(recording, norm_eps=1e-3))


def test_other_wavelengths_are_noticed(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlbert, "BASE", 10000.0)
    with pytest.raises(AssertionError):
        test_geometry(recording)
