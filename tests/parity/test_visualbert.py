"""VisualBERT against values recorded from the official release and from transformers (`golden/visualbert`; its
config.json describes every tensor).

Sizes come from the recorded config.json. Tolerance 1e-5 + 1e-5 |b| (gradient norms 1e-6 + 1e-4 |b|): the two references
differ by up to 6e-6; on another folder what that folder's config.json states, if it is more.
States are compared at real positions only: what stands on padding is nobody's business. Exempt, and checked for our
definition instead: scores of padded regions (-10000 more in the release, the lowest number in transformers) and logits
that transformers turns into log-softmax values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_support import assert_rows_close, labelled, nudge_first, parameter_of
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling import models
from visling.checkpoints.keymap import Coverage
from visling.models.visualbert import VisualBert, VisualBertConfig
from visling.nn.attention import Attention
from visling.nn.heads import build
from visling.nn.pooling import gather
from visling.objectives.base import PretrainStep
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.matching import Matching
from visling.tasks.answers import answer_loss
from visling.tasks.nlvr import NLVR
from visling.types import Batch, Encoded, Head, Loss, Regions, Slots, Targets, Text

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}
VARIANTS = ("plain", "aligned", "text_only")
OFFICIAL_NAMES = {
    "input_ids": "bert_input_ids",
    "attention_mask": "bert_input_mask",
    "token_type_ids": "bert_input_type_ids",
    "visual_embeds": "image_feat_variable",
    "visual_attention_mask": "image_mask",
    "visual_token_type_ids": "visual_embeddings_type",
    "image_text_alignment_flat": "image_text_alignment",
}


Change = Callable[[nn.Module], Any]
"""Breaks a model, whose parts it is given under the names of the key map."""


@dataclass(frozen=True)
class Recording:
    """The recorded set and ways to rebuild its models."""

    folder: Path
    change: Change = lambda parts: None
    """What is done to the parts of every model after its weights are loaded."""

    @property
    def sizes(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads((self.folder / "config.json").read_text())["hyper_parameters"]
        return described

    def config(self, **changes: Any) -> VisualBertConfig:
        sizes = self.sizes
        config = VisualBertConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            num_segments=sizes["type_vocab_size"],
            norm_eps=sizes["layer_norm_eps"],
            feature_size=sizes["visual_embedding_dim"],
            max_tokens=sizes["text_length"],
        )
        return replace(config, **changes)

    def inputs(self, case: str) -> dict[str, Tensor]:
        """Inputs under the official names; transformers' names are translated."""
        return {
            OFFICIAL_NAMES.get(name, name): tensor
            for name, tensor in load_file(self.folder / case / "inputs.safetensors").items()
        }

    def outputs(self, case: str, variant: str = "") -> dict[str, Tensor]:
        tensors = load_file(self.folder / case / "outputs.safetensors")
        prefix = f"{variant}/" if variant else ""
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def weights(self, case: str = "") -> dict[str, Tensor]:
        """The state dict of a case, in the layout that its folder implies."""
        base = "hf/state_dict.safetensors" if case.startswith("hf/") else "state_dict.safetensors"
        added = self.folder / case / "head_state.safetensors"
        return {**load_file(self.folder / base), **(load_file(added) if case and added.exists() else {})}

    def load(self, case: str, parts: Mapping[str, nn.Module]) -> Coverage:
        layout = "transformers" if case.startswith("hf/") else "official"
        coverage = models.spec("visualbert").keys[layout].load(self.weights(case), parts)
        self.change(nn.ModuleDict(parts))
        return coverage

    def models(self, case: str, part: str, head: Head, style: str, group: int = 1) -> tuple[VisualBert, nn.Module]:
        """Encoder and head of a task."""
        encoder = VisualBert(self.config()).eval()
        module = build(head, encoder.dims, style=style, words=encoder.word_embeddings, group=group).eval()
        self.load(case, {"encoder": encoder, part: module})
        return encoder, module


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "visualbert")


def batch_of(
    inputs: Mapping[str, Tensor], *, aligned: bool = False, text_only: bool = False, slot: bool = False, group: int = 1
) -> Batch:
    """Recorded inputs as our batch; examples of several rows are flattened, boxes (which the model does not read) cover
    the image."""
    rows = inputs["bert_input_ids"].shape[:-1].numel()
    ids, mask, segments = (inputs[f"bert_input_{name}"].reshape(rows, -1) for name in ("ids", "mask", "type_ids"))
    text = Text(ids=ids, mask=mask.bool(), segments=segments, answer_at=mask.sum(1) - 2 if slot else None)
    if text_only:
        return Batch(text=text, regions=None, group=group)
    features = inputs["image_feat_variable"].flatten(0, -3)
    types = inputs.get("visual_embeddings_type")
    regions = Regions(
        features=features,
        boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*features.shape[:2], 4),
        mask=inputs["image_mask"].reshape(features.shape[:2]).bool(),
        size=torch.ones(rows, 2),
        image=None if types is None else types.reshape(features.shape[:2]),
    )
    links = links_of(inputs["image_text_alignment"].flatten(0, -3), text.mask, regions.mask) if aligned else None
    batch = Batch(text=text, regions=regions, links=links, group=group)
    batch.validate()
    return batch


def links_of(alignment: Tensor, text_mask: Tensor, region_mask: Tensor) -> Tensor:
    """(B, R', n) text positions, -1 = none -> (B, T, R) bool; regions beyond R and links to padding are left out."""
    alignment = alignment[:, : region_mask.shape[1]]
    named = F.one_hot(alignment.clamp(min=0), text_mask.shape[1]).bool() & (alignment >= 0)[..., None]  # (B, R, n, T)
    return named.any(2).transpose(1, 2) & text_mask[:, :, None] & region_mask[:, None, :]


def slots_of(positions: Tensor, chosen: Tensor) -> Slots:
    return Slots(at=positions.masked_fill(~chosen, 0), mask=chosen)


def real_positions(batch: Batch) -> Tensor:
    """(B, T + R) bool."""
    return batch.text.mask if batch.regions is None else torch.cat([batch.text.mask, batch.regions.mask], dim=1)


def joint(encoded: Encoded) -> Tensor:
    return torch.cat([encoded.text, encoded.regions], dim=1)


class Pretraining(nn.Module):
    """Encoder and the two objectives of the release, as recorded."""

    def __init__(self, recording: Recording, case: str = "", **changes: Any) -> None:
        super().__init__()
        self.encoder = VisualBert(recording.config(**changes))
        self.masked_lm = MaskedLM(self.encoder.dims, "bert", self.encoder.word_embeddings)
        self.matching = Matching(self.encoder.dims, "plain", self.encoder.word_embeddings)
        self.parts = {"encoder": self.encoder, "vocabulary": self.masked_lm.head, "matching": self.matching.head}
        self.eval()
        self.coverage = recording.load(case, self.parts)

    def losses(self, batch: Batch, inputs: Mapping[str, Tensor]) -> tuple[Encoded, Loss, Loss]:
        """Masked language modelling and matching, through the objectives themselves."""
        labels = inputs["masked_lm_labels"]
        positions = torch.arange(labels.shape[1]).expand_as(labels)
        targets = Targets(
            token_slots=slots_of(positions, labels >= 0), token_ids=labels, matched=inputs["is_random_next"]
        )
        encoded = self.encoder(batch, capture=True)
        step = PretrainStep(model=self.encoder, batch=batch, encoded=encoded, targets=targets)
        return encoded, self.masked_lm(step), self.matching(step)

    def vocabulary(self, states: Tensor) -> Tensor:
        scores: Tensor = self.masked_lm.head(states)
        return scores


def pretraining_inputs(recording: Recording, case: str) -> dict[str, Tensor]:
    """Inputs of a pre-training case; transformers' labels cover the regions too and call the match label otherwise."""
    inputs = recording.inputs(case)
    if case.startswith("hf/"):
        inputs["masked_lm_labels"] = inputs.pop("labels")[:, : inputs["bert_input_ids"].shape[1]]
        inputs["is_random_next"] = inputs.pop("sentence_image_labels")
    return inputs


def compare_states(
    model: Pretraining, recorded: Mapping[str, Tensor], batch: Batch, encoded: Encoded, names: Mapping[str, str]
) -> None:
    """Every captured state, by the names of the recording, and what the heads make of the last one; ours are zeros at
    padding."""
    real = real_positions(batch)
    states = encoded.states
    assert states is not None
    assert states.keys() == names.keys()
    for ours, theirs in names.items():
        assert_rows_close(states[ours], recorded[theirs], real, ours, **CLOSE)
    scores = recorded.get("prediction_scores", recorded.get("prediction_logits"))
    assert scores is not None
    assert_close(model.vocabulary(joint(encoded))[real], scores[real], **CLOSE)
    match = recorded.get("seq_relationship_score", recorded.get("seq_relationship_logits"))
    assert_close(model.matching.head(encoded.pooled), match, **CLOSE)


def layer_names(recording: Recording, theirs: str, embeddings: str, first: int) -> dict[str, str]:
    number = recording.sizes["num_hidden_layers"]
    return {"embeddings": embeddings, **{f"layers.{i}": theirs.format(i + first) for i in range(number)}}


def compare_official(
    recording: Recording, variant: str, change: Callable[[Batch], Batch] = lambda batch: batch
) -> None:
    """All values of one pre-training variant of the official model."""
    model = Pretraining(recording)
    inputs, recorded = recording.inputs("pretraining"), recording.outputs("pretraining", variant)
    batch = change(batch_of(inputs, aligned=variant == "aligned", text_only=variant == "text_only"))
    encoded, masked_lm, matching = model.losses(batch, inputs)
    compare_states(model, recorded, batch, encoded, layer_names(recording, "layer_{}", "embedding_output", 0))
    assert_close(encoded.pooled, recorded["pooled"], **CLOSE)
    assert_close(masked_lm.value, recorded["masked_lm_loss"], **CLOSE)
    assert_close(masked_lm.value, recorded["loss_mlm_only"], **CLOSE)
    assert_close(matching.value, recorded["next_sentence_loss"], **CLOSE)
    assert_close((masked_lm + matching).value, recorded["loss"], **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pretraining_states_scores_and_losses(recording: Recording, variant: str) -> None:
    compare_official(recording, variant)


@pytest.mark.parametrize(
    ("case", "variant", "theirs"),
    [
        ("pretraining", "plain", "attention_{}"),
        ("pretraining", "aligned", "attention_{}"),
        ("hf/pretraining", "plain", "attentions_{}"),
    ],
)
def test_attention_maps(recording: Recording, case: str, variant: str, theirs: str) -> None:
    recorded = recording.outputs(case, variant)
    batch = batch_of(recording.inputs(case), aligned=variant == "aligned")
    maps = Pretraining(recording, case).encoder(batch, capture=True).maps
    real = real_positions(batch)
    for number in range(recording.sizes["num_hidden_layers"]):
        name = f"layers.{number}"
        top = torch.cat([maps.text_to_text[name], maps.text_to_regions[name]], dim=-1)
        bottom = torch.cat([maps.regions_to_text[name], maps.regions_to_regions[name]], dim=-1)
        ours = torch.cat([top, bottom], dim=-2).transpose(1, 2)  # (B, from, H, to)
        assert_close(ours[real], recorded[theirs.format(number)].transpose(1, 2)[real], **CLOSE)


@pytest.mark.parametrize("variant", ["plain", "aligned"])
def test_gradient_norm_of_every_weight(recording: Recording, variant: str) -> None:
    inputs = recording.inputs("pretraining")
    recorded = {
        name.removeprefix("grad_norm/"): norm
        for name, norm in recording.outputs("pretraining", variant).items()
        if "grad_norm/" in name
    }
    model = Pretraining(recording)
    _, masked_lm, matching = model.losses(batch_of(inputs, aligned=variant == "aligned"), inputs)
    (masked_lm + matching).value.backward()  # type: ignore[no-untyped-call]
    ours = {
        f"{part}.{name}": value for part, module in model.parts.items() for name, value in module.named_parameters()
    }
    assert {key for keys in model.coverage.mapped.values() for key in keys} == recorded.keys()
    for name, parameter in ours.items():
        (theirs,) = model.coverage.mapped[name]
        assert parameter.grad is not None, name
        assert_close(parameter.grad.norm(), recorded[theirs], **GRADIENTS, msg=labelled(name))


@pytest.mark.parametrize("variant", ["plain", "aligned", "default_visual_type"])
def test_transformers_pretraining(recording: Recording, variant: str) -> None:
    inputs, recorded = pretraining_inputs(recording, "hf/pretraining"), recording.outputs("hf/pretraining", variant)
    model = Pretraining(recording, "hf/pretraining", region_segment=1 if variant == "default_visual_type" else 0)
    batch = batch_of(inputs, aligned=variant == "aligned")
    encoded, masked_lm, matching = model.losses(batch, inputs)
    compare_states(model, recorded, batch, encoded, layer_names(recording, "hidden_states_{}", "hidden_states_0", 1))
    assert_close((masked_lm + matching).value, recorded["loss"], **CLOSE)


def test_late_fusion(recording: Recording) -> None:
    inputs, recorded = recording.inputs("pretraining"), recording.outputs("bypass")
    model = Pretraining(recording, "bypass", bypass=True)
    batch = batch_of(inputs, aligned=True)
    encoded, masked_lm, matching = model.losses(batch, inputs)
    real = real_positions(batch)
    assert_close(model.vocabulary(joint(encoded))[real], recorded["prediction_scores"][real], **CLOSE)
    assert_close(model.matching.head(encoded.pooled), recorded["seq_relationship_score"], **CLOSE)
    assert_close(masked_lm.value, recorded["masked_lm_loss"], **CLOSE)
    assert_close(matching.value, recorded["next_sentence_loss"], **CLOSE)
    assert_close((masked_lm + matching).value, recorded["loss"], **CLOSE)


@pytest.mark.parametrize("case", ["vqa", "hf/question_answering"])
def test_question_answering(recording: Recording, case: str) -> None:
    inputs, recorded = recording.inputs(case), recording.outputs(case)
    encoder, head = recording.models(
        case, "classifier", Head(kind="classify", outputs=recording.sizes["vqa_answers"]), "linear"
    )
    batch = batch_of(inputs, slot=True)
    encoded = encoder(batch)
    logits = head(encoded.pooled)
    scores = inputs["label" if case == "vqa" else "labels"]
    if case == "vqa":
        real = real_positions(batch)
        assert_rows_close(joint(encoded), recorded["last_hidden"], real, "last layer", **CLOSE)
        assert_close(logits, recorded["logits"].squeeze(1), **CLOSE)
        best = logits.index_fill(1, torch.tensor([0]), -torch.inf).argmax(1)
        assert_close(scores.gather(1, best[:, None]).mean(), recorded["accuracy"], **CLOSE)
    else:
        assert_close(logits, recorded["logits_without_labels"], **CLOSE)
        assert_close(logits.log_softmax(-1), recorded["logits_with_labels"], **CLOSE)
    assert_close(answer_loss(logits, scores, "kl").value, recorded["loss"], **CLOSE)


@pytest.mark.parametrize("case", ["nlvr", "hf/visual_reasoning"])
def test_two_images_in_one_row(recording: Recording, case: str) -> None:
    inputs, recorded = recording.inputs(case), recording.outputs(case)
    encoder, head = recording.models(case, "classifier", Head(kind="classify", outputs=2), "linear")
    logits = head(encoder(batch_of(inputs)).pooled)
    assert_close(logits, recorded["logits"], **CLOSE)
    targets = Targets(answer=inputs["label" if case == "nlvr" else "labels"])
    assert_close(NLVR().loss({"classify": logits}, targets).value, recorded["loss"], **CLOSE)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("case", ["multichoice", "hf/multiple_choice"])
def test_multiple_choice(recording: Recording, case: str, aligned: bool) -> None:
    inputs, recorded = recording.inputs(case), recording.outputs(case)
    choices = inputs["bert_input_ids"].shape[1]
    encoder, head = recording.models(case, "classifier", Head(kind="score", outputs=1), "linear")
    logits = head(encoder(batch_of(inputs, aligned=aligned, group=choices)).pooled).view(-1, choices)
    official = case == "multichoice"
    suffix = ("" if aligned else "_no_alignment") if official else ("_aligned" if aligned else "")
    assert_close(logits, recorded[f"logits{suffix}"], **CLOSE)
    assert_close(F.cross_entropy(logits, inputs["label" if official else "labels"]), recorded[f"loss{suffix}"], **CLOSE)


@pytest.mark.parametrize("case", ["flickr", "hf/region_to_phrase"])
def test_phrases_choose_regions(recording: Recording, case: str) -> None:
    inputs, recorded = recording.inputs(case), recording.outputs(case)
    official = case == "flickr"
    at, shares = (
        inputs[name] for name in (("flickr_position", "label") if official else ("region_to_phrase_position", "labels"))
    )
    size = recording.sizes["hidden_size"] // recording.sizes["num_attention_heads"]
    encoder, head = recording.models(
        case, "slots_regions", Head(kind="slots_regions", outputs=1, options={"head_size": size}), "flickr"
    )
    batch = batch_of(inputs)
    assert batch.regions is not None
    encoded = encoder(batch)
    slots = slots_of(at, at >= 0)
    scores = head(gather(encoded.text, slots.at), encoded.regions, batch.regions.mask)
    compared = slots.mask[:, :, None] & batch.regions.mask[:, None, :]
    assert_close(scores[compared], recorded["scores" if official else "logits"][compared], **CLOSE)
    assert (scores.softmax(-1).masked_select(~batch.regions.mask[:, None, :]) == 0).all()
    log_probs = scores.log_softmax(-1).masked_fill(~batch.regions.mask[:, None, :], 0.0)
    assert_close(F.kl_div(log_probs, shares, reduction="batchmean"), recorded["loss"], **CLOSE)
    if official:
        hit = (shares > 0).gather(2, scores.argsort(dim=-1, descending=True))  # by rank
        assert_close(hit[:, :, 0].sum() / recorded["entity_num"], recorded["accuracy"], **CLOSE)
        assert_close(hit.any(-1).sum() / recorded["entity_num"], recorded["upperbound_accuracy"], **CLOSE)
        assert hit[:, :, :2].any(-1).sum() == recorded["recall_at_2_hits"].long().sum()


def _swap(first: str, second: str) -> Change:
    """Exchange two parameters of one shape."""

    def change(parts: nn.Module) -> None:
        with torch.no_grad():
            one, two = parameter_of(parts, first), parameter_of(parts, second)
            kept = one.clone()
            one.copy_(two)
            two.copy_(kept)

    return change


def _rough_norms(factor: float = 1) -> Change:
    """Another epsilon in every norm: as large as the tolerance, or more where nothing but a few logits is recorded."""

    def change(parts: nn.Module) -> None:
        for module in parts.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = factor * CLOSE["atol"]

    return change


def _other_visual_segment(parts: nn.Module) -> None:
    encoder = parts.get_submodule("encoder")
    assert isinstance(encoder, VisualBert)
    encoder.config = replace(encoder.config, region_segment=1 - encoder.config.region_segment)


def _other_heads(parts: nn.Module) -> None:
    attention = parts.get_submodule("encoder.layers.0.self_attention.attention")
    assert isinstance(attention, Attention)
    attention.num_heads = 2 if attention.num_heads == 1 else 1


ENCODER: Mapping[str, Change] = {
    **{
        f"nudge {name}": nudge_first(f"encoder.{name}")
        for name in (
            "norm.weight",
            "projection.bias",
            "visual_positions.weight",  # row 0, the one that is read
            "embeddings.segments.weight",
            "layers.0.self_attention.attention.value.bias",
            "layers.-1.feed_forward.norm.weight",
        )
    },
    "large epsilon": _rough_norms(100),
    "another number of heads": _other_heads,
    "dropout on": lambda parts: parts.train(),
}
"""What every recorded case must notice."""
PRETRAINING: Mapping[str, Change] = {
    **{
        f"nudge {name}": nudge_first(name)
        for name in (
            "encoder.pooler.dense.bias",
            "vocabulary.dense.bias",
            "vocabulary.bias",
            "vocabulary.norm.weight",
            "matching.linear.bias",
        )
    },
    "epsilon of the norms": _rough_norms(),
    "visual segment 1 for 0": _other_visual_segment,
}
MORE: Mapping[str, Change] = {
    **{
        f"nudge {name}": nudge_first(f"encoder.{name}")
        for name in (
            "norm.bias",
            "projection.weight",
            "visual_segments.weight",
            "embeddings.positions.weight",
            "layers.0.self_attention.attention.query.bias",
            "layers.0.self_attention.norm.weight",
            "layers.-1.feed_forward.up.bias",
        )
    },
    "position tables swapped": _swap("encoder.embeddings.positions.weight", "encoder.visual_positions.weight"),
    "segment tables swapped": _swap("encoder.embeddings.segments.weight", "encoder.visual_segments.weight"),
    "query and value swapped": _swap(
        "encoder.layers.-1.self_attention.attention.query.weight",
        "encoder.layers.-1.self_attention.attention.value.weight",
    ),
}
"""The rest of the encoder, of which one case is enough."""
ADDITIONAL: Mapping[str, Change] = {
    f"nudge additional {name}": nudge_first(f"encoder.additional_layer.{name}")
    for name in (
        "self_attention.attention.value.bias",
        "self_attention.norm.weight",
        "feed_forward.up.bias",
        "feed_forward.norm.bias",
    )
}
SLOT_CLASSIFIER: Mapping[str, Change] = {
    f"nudge {name}": nudge_first(f"classifier.linear.{name}") for name in ("weight", "bias")
}
CLASSIFIER: Mapping[str, Change] = {**SLOT_CLASSIFIER, "nudge pooler": nudge_first("encoder.pooler.dense.bias")}
PHRASES: Mapping[str, Change] = {
    f"nudge {name}": nudge_first(f"slots_regions.{name}")
    for name in ("query.bias", "query.weight", "key.bias", "key.weight")
}
CASES: Mapping[str, tuple[Callable[[Recording], None], Mapping[str, Change]]] = {
    "pretraining": (partial(compare_official, variant="aligned"), {**PRETRAINING, **MORE}),
    "hf/pretraining": (partial(test_transformers_pretraining, variant="aligned"), PRETRAINING),
    "bypass": (test_late_fusion, {**PRETRAINING, **ADDITIONAL}),
    **{
        case: (partial(test_question_answering, case=case), SLOT_CLASSIFIER)
        for case in ("vqa", "hf/question_answering")
    },
    **{case: (partial(test_two_images_in_one_row, case=case), CLASSIFIER) for case in ("nlvr", "hf/visual_reasoning")},
    **{
        case: (partial(test_multiple_choice, case=case, aligned=True), CLASSIFIER)
        for case in ("multichoice", "hf/multiple_choice")
    },
    **{case: (partial(test_phrases_choose_regions, case=case), PHRASES) for case in ("flickr", "hf/region_to_phrase")},
}
"""Recorded case -> its comparison, and what it must notice besides."""


@pytest.mark.parametrize(
    ("case", "mutation"), [(case, mutation) for case, (_, own) in CASES.items() for mutation in (*ENCODER, *own)]
)
def test_a_broken_model_is_noticed(recording: Recording, case: str, mutation: str) -> None:
    compare, own = CASES[case]
    with pytest.raises(AssertionError):
        compare(replace(recording, change={**ENCODER, **own}[mutation]))


def _first_word_only(batch: Batch) -> Batch:
    """Links to one word only: what is left of an average over several is another vector."""
    links = batch.links
    assert links is not None
    return replace(batch, links=links & (links.cumsum(1) == 1))


@pytest.mark.parametrize(
    "change", [_first_word_only, lambda batch: replace(batch, links=None)], ids=["first word only", "no links"]
)
def test_broken_alignment_is_noticed(recording: Recording, change: Callable[[Batch], Batch]) -> None:
    with pytest.raises(AssertionError):
        compare_official(recording, "aligned", change)
