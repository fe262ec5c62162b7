"""ViLBERT against values recorded from the official multi-task release (`golden/vilbert`; its config.json describes
every tensor).

Sizes come from the recorded config.json. The set allows 1e-4 for states and logits and 1e-5 for losses; here 1e-5 +
1e-5 |b| holds for all of them (gradient norms 1e-6 + 1e-4 |b|), on another folder what that folder's config.json
states, if it is more. States are compared at real positions only. The recorded rows begin with the whole image, ours
end with it; the recorded task token is second, ours last. Exempt, and checked for our definition instead:
`quirk_all_layers` (another state is pooled when all layers are asked for), `tasks_odd_batch` (another head's logits in
the place of NLVR2's), logits of padded regions (-10000 more in the release). `data.*` is recorded for readers and
masking and is no business of the model.
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
from parity_support import assert_rows_close, labelled, nudge, one_after_the_other
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling import models
from visling.models.vilbert import Vilbert, VilbertConfig
from visling.nn.attention import Attention
from visling.nn.coattention import CoAttentionLayer
from visling.nn.heads import build
from visling.objectives.base import PretrainStep
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import feature_regression_loss, region_nce_loss, soft_class_kl_loss
from visling.objectives.matching import Matching
from visling.tasks.answers import answer_loss
from visling.types import Batch, Encoded, Head, Loss, Regions, Slots, Targets, Text

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}
KEYS = models.spec("vilbert").keys
STYLES = models.spec("vilbert").head_styles


@dataclass(frozen=True)
class Recording:
    """The recorded set and ways to rebuild its models."""

    folder: Path

    @property
    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found

    def config(self, **changes: Any) -> VilbertConfig:
        sizes = self.described["hyper_parameters"]
        config = VilbertConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            num_segments=sizes["type_vocab_size"],
            region_hidden_size=sizes["v_hidden_size"],
            num_region_layers=sizes["v_num_hidden_layers"],
            num_region_heads=sizes["v_num_attention_heads"],
            region_intermediate_size=sizes["v_intermediate_size"],
            co_attention_size=sizes["bi_hidden_size"],
            num_co_attention_heads=sizes["bi_num_attention_heads"],
            pooled_size=sizes["bi_hidden_size"],
            text_layers_before=tuple(sizes["t_biattention_id"]),
            region_layers_before=tuple(sizes["v_biattention_id"]),
            feature_size=sizes["v_feature_size"],
            max_tokens=sizes["max_position_embeddings"],
        )
        return replace(config, **changes)

    def tensors(self, name: str, prefix: str) -> dict[str, Tensor]:
        found = load_file(self.folder / f"{name}.safetensors")
        return {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}

    def inputs(self, case: str) -> dict[str, Tensor]:
        return self.tensors("inputs", f"{case}.")

    def outputs(self, case: str) -> dict[str, Tensor]:
        return self.tensors("outputs", f"{case}.")

    def extras(self, variant: str) -> dict[str, Tensor]:
        return self.tensors("state_dict_extras", f"{variant}:")


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "vilbert")


def batch_of(inputs: Mapping[str, Tensor], *, group: int = 1) -> Batch:
    """Recorded inputs as our batch; the first region row is the whole image and becomes `whole`."""
    flat = {name: tensor.flatten(0, 1) if group > 1 and tensor.dim() > 2 else tensor for name, tensor in inputs.items()}
    features, boxes, mask = flat["image_feat"], flat["image_loc"], flat["image_attention_mask"].bool()
    task = flat.get("task_ids")
    batch = Batch(
        text=Text(
            ids=flat["input_ids"],
            mask=flat["attention_mask"].bool(),
            segments=flat["token_type_ids"],
            task=None if task is None else task[:, 0],
        ),
        regions=Regions(
            features=features[:, 1:],
            boxes=boxes[:, 1:, :4],
            mask=mask[:, 1:],
            size=torch.ones(len(features), 2),
            whole=features[:, 0],
        ),
        group=group,
    )
    batch.validate()
    return batch


def regions_of(batch: Batch) -> Regions:
    assert batch.regions is not None
    return batch.regions


def whole_first(states: Tensor) -> Tensor:
    """(B, R + 1, ...) with the whole image behind the regions -> in front of them, as recorded."""
    return torch.cat([states[:, -1:], states[:, :-1]], dim=1)


def task_second(states: Tensor) -> Tensor:
    """(B, T + 1, ...) with the task token behind the tokens -> after the first one, as recorded."""
    return torch.cat([states[:, :1], states[:, -1:], states[:, 1:-1]], dim=1)


def candidates(encoded: Encoded) -> Tensor:
    """(B, R + 1, Dr), the whole image last."""
    assert encoded.whole is not None
    return torch.cat([encoded.regions, encoded.whole[:, None]], dim=1)


def slots_of(chosen: Tensor) -> Slots:
    """Every position (B, P) in turn, those that are chosen masked in."""
    return Slots(at=torch.arange(chosen.shape[1]).expand_as(chosen).masked_fill(~chosen, 0), mask=chosen)


Change = Callable[[Any], Any]
"""Breaks a model in place."""


def unchanged(model: nn.Module) -> None:
    """No change."""


class Pretraining(nn.Module):
    """Encoder, the two objectives with heads on text and pair, and the region head, as recorded."""

    def __init__(
        self,
        recording: Recording,
        weights: str = "state_dict",
        *,
        added: Mapping[str, Tensor] | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        self.encoder = Vilbert(recording.config(**changes))
        dims, words = self.encoder.dims, self.encoder.word_embeddings
        self.masked_lm = MaskedLM(dims, STYLES["multitask", "vocabulary"], words)
        self.matching = Matching(dims, STYLES["multitask", "matching"], words)
        source = {**load_file(recording.folder / f"{weights}.safetensors"), **(added or {})}
        widths = {"classes": len(source["cls.imagePredictions.decoder.bias"])}
        self.regions = build(
            Head(kind="region_targets", outputs=1, options=widths), dims, style=STYLES["multitask", "region_targets"]
        )
        self.parts = {
            "encoder": self.encoder,
            "vocabulary": self.masked_lm.head,
            "matching": self.matching.head,
            "region_targets": self.regions,
        }
        self.coverage = KEYS["multitask"].load(source, self.parts)
        self.eval()

    def forward(self, batch: Batch) -> tuple[Encoded, Tensor, Tensor, Tensor]:
        """States, and logits of words, regions (whole image first) and match."""
        encoded = self.encoder(batch, capture=True)
        return (
            encoded,
            self.masked_lm.head(encoded.text),
            whole_first(self.region_logits(encoded)),
            self.match(encoded.pooled),
        )

    def match(self, pooled: Tensor) -> Tensor:
        """(B, 2) as recorded: class 0 = text and image belong together, which is our class 1."""
        logits: Tensor = self.matching.head(pooled)
        return logits.flip(-1)

    def region_logits(self, encoded: Encoded) -> Tensor:
        """(B, R + 1, C), the whole image last."""
        logits: Tensor = self.regions(candidates(encoded))["classes"]
        return logits

    def losses(self, batch: Batch, inputs: Mapping[str, Tensor]) -> tuple[Loss, Loss, Loss]:
        """Words, regions, match; labels as recorded."""
        labels, chosen = inputs["masked_lm_labels"], inputs["image_label"] == 1
        encoded = self.encoder(batch)
        targets = Targets(
            token_slots=slots_of(labels >= 0), token_ids=labels, matched=1 - inputs["next_sentence_label"]
        )
        step = PretrainStep(model=self.encoder, batch=batch, encoded=encoded, targets=targets)
        kl = soft_class_kl_loss(self.regions(encoded.regions)["classes"], inputs["image_target"], chosen)
        return self.masked_lm(step), kl, self.matching(step)


def compare_states(
    recording: Recording, batch: Batch, encoded: Encoded, recorded: Mapping[str, Tensor], *, task: bool = False
) -> None:
    """Every captured state that was recorded, at real positions; ours are zeros at padding."""
    assert encoded.states is not None
    assert encoded.whole is not None
    text_mask, region_mask = (
        F.pad(batch.text.mask, (1, 0), value=True) if task else batch.text.mask,
        regions_of(batch).mask,
    )
    region_mask = F.pad(region_mask, (1, 0), value=True)
    sizes = recording.described["hyper_parameters"]
    names = {
        **{f"text_layers.{i}": f"text_layer.{i}" for i in range(sizes["num_hidden_layers"])},
        **{f"region_layers.{i}": f"image_layer.{i}" for i in range(sizes["v_num_hidden_layers"])},
        **{f"co_attention_layers.{i}.text": f"co_layer.{i}.text" for i in range(len(sizes["t_biattention_id"]))},
        **{f"co_attention_layers.{i}.regions": f"co_layer.{i}.image" for i in range(len(sizes["t_biattention_id"]))},
        "text_embeddings": "emb.text",
        "region_embeddings": "emb.image",
    }
    assert encoded.states.keys() == names.keys()
    compared = 0
    for ours, theirs in names.items():
        if theirs not in recorded:
            continue
        compared += 1
        if "text" in ours:
            states = task_second(encoded.states[ours]) if task else encoded.states[ours]
            assert_rows_close(states, recorded[theirs], text_mask, ours, **CLOSE)
        else:
            assert_rows_close(whole_first(encoded.states[ours]), recorded[theirs], region_mask, ours, **CLOSE)
    assert compared == sum(name.startswith(("text_layer.", "image_layer.", "co_layer.", "emb.")) for name in recorded)
    final = recorded["sequence_output_t"]
    final = torch.cat([final[:, :1], final[:, 2:]], dim=1) if task else final
    assert_rows_close(encoded.text, final, batch.text.mask, "text", **CLOSE)
    regions = whole_first(candidates(encoded))
    assert_rows_close(regions, recorded["sequence_output_v"], region_mask, "regions", **CLOSE)
    assert_close(encoded.pooled, recorded["pooled_output_t"] * recorded["pooled_output_v"], **CLOSE)


def compare_pretraining(recording: Recording, model: Pretraining) -> None:
    """Everything that was recorded of the pre-training model but maps and gradients."""
    inputs, recorded = recording.inputs("pretrain"), recording.outputs("pretrain")
    batch = batch_of(inputs)
    encoded, words, regions, match = model(batch)
    compare_states(recording, batch, encoded, recorded)
    real, real_regions = batch.text.mask, F.pad(regions_of(batch).mask, (1, 0), value=True)
    assert_close(words[real], recorded["prediction_scores_t"][real], **CLOSE)
    assert_close(regions[real_regions], recorded["prediction_scores_v"][real_regions], **CLOSE)
    assert_close(match, recorded["seq_relationship_score"], **CLOSE)
    masked_lm, kl, matching = model.losses(batch, inputs)
    for loss, name in (
        (masked_lm, "masked_lm"),
        (kl, "masked_img_kl"),
        (matching, "next_sentence"),
        (masked_lm + kl + matching, "total"),
    ):
        assert_close(loss.value[None], recorded[f"loss.{name}"], **CLOSE, msg=labelled(name))


def test_pretraining_states_scores_and_losses(recording: Recording) -> None:
    compare_pretraining(recording, Pretraining(recording))


def test_losses_of_mismatched_pairs_left_out(recording: Recording) -> None:
    """The multi-task release's objective 1: no masked prediction where text and image do not belong together."""
    inputs, recorded = recording.inputs("pretrain"), recording.outputs("pretrain.loss_objective1")
    wrong = inputs["next_sentence_label"][:, None] == 1
    inputs |= {name: inputs[name].masked_fill(wrong, -1) for name in ("masked_lm_labels", "image_label")}
    losses = Pretraining(recording).losses(batch_of(inputs), inputs)
    for loss, name in zip(losses, ("masked_lm", "masked_img_kl", "next_sentence"), strict=True):
        assert_close(loss.value[None], recorded[name], **CLOSE, msg=labelled(name))


def test_attention_maps(recording: Recording) -> None:
    recorded, batch = recording.outputs("pretrain.attn"), batch_of(recording.inputs("pretrain"))
    maps = Pretraining(recording).encoder(batch, capture=True).maps
    assert maps is not None
    text, regions = batch.text.mask, F.pad(regions_of(batch).mask, (1, 0), value=True)

    def ordered(probs: Tensor, *, queries: bool, keys: bool) -> Tensor:
        """(B, H, from, to) -> (B, from, H, to), whole image first where an axis runs over regions."""
        probs = probs.transpose(1, 2)
        probs = whole_first(probs) if queries else probs
        return torch.cat([probs[..., -1:], probs[..., :-1]], dim=-1) if keys else probs

    quadrants: tuple[tuple[dict[str, Tensor], str, bool, bool], ...] = (
        (maps.text_to_text, "text_layer.{}", False, False),
        (maps.regions_to_regions, "image_layer.{}", True, True),
        (maps.text_to_regions, "co_layer.{}.text_over_regions", False, True),
        (maps.regions_to_text, "co_layer.{}.regions_over_text", True, False),
    )
    compared = set()
    for found, pattern, queries, keys in quadrants:
        for name, probs in found.items():
            theirs = pattern.format(name.split(".")[1])
            real = regions if queries else text
            assert_close(
                ordered(probs, queries=queries, keys=keys)[real],
                recorded[theirs].transpose(1, 2)[real],
                **CLOSE,
                msg=labelled(theirs),
            )
            compared.add(theirs)
    assert compared == recorded.keys()


def test_gradient_norm_of_every_weight(recording: Recording) -> None:
    recorded = json.loads((recording.folder / "grad_norms.json").read_text())
    model, inputs = Pretraining(recording), recording.inputs("pretrain")
    masked_lm, kl, matching = model.losses(batch_of(inputs), inputs)
    (masked_lm + kl + matching).value.backward()  # type: ignore[no-untyped-call]
    dead = {name for name, norm in recorded.items() if norm is None}
    assert dead == model.coverage.dropped.keys()
    ours = {
        f"{part}.{name}": value for part, module in model.parts.items() for name, value in module.named_parameters()
    }
    compared = set()
    for name, parameter in ours.items():
        (theirs,) = model.coverage.mapped[name]
        assert parameter.grad is not None, name
        assert_close(
            parameter.grad.norm().double(), torch.tensor(recorded[theirs]).double(), **GRADIENTS, msg=labelled(name)
        )
        compared.add(theirs)
    assert compared == recorded.keys() - dead - model.coverage.tied.keys()


def paired(batch: Batch, text: Tensor, regions: Tensor) -> Batch:
    """Text rows and region rows joined by number."""
    return replace(batch, text=replace(batch.text, row=text), regions=replace(regions_of(batch), row=regions))


def compare_shared_texts(recording: Recording, case: str, change: Change = unchanged) -> None:
    """What was recorded of texts that meet several images; `change` may break the model before."""
    recorded, batch, model = recording.outputs(case), batch_of(recording.inputs("pretrain")), Pretraining(recording)
    change(model)
    rows = torch.arange(len(batch.text.ids))
    if case == "fast_mode":
        batch = replace(
            batch,
            text=replace(
                batch.text, ids=batch.text.ids[:1], mask=batch.text.mask[:1], segments=batch.text.segments[:1]
            ),
        )
        batch = paired(batch, torch.zeros_like(rows), rows)
    else:
        batch = paired(batch, rows.repeat_interleave(len(rows)), rows.repeat(len(rows)))
    batch.validate()
    assert batch.text.row is not None
    encoded = model.encoder(batch)
    assert_close(model.match(encoded.pooled), recorded["seq_relationship_score"], **CLOSE)
    if case == "fast_mode":
        real = batch.text.mask[batch.text.row]
        assert_close(model.masked_lm.head(encoded.text)[real], recorded["prediction_scores_t"][real], **CLOSE)
    captured = model.encoder(batch, capture=True)
    assert_close(captured.pooled, encoded.pooled, **CLOSE)
    assert captured.states is not None
    assert {len(states) for states in captured.states.values()} == {len(batch.text.row)}


@pytest.mark.parametrize("case", ["fast_mode", "in_batch_pairs"])
def test_one_text_meets_many_images(recording: Recording, case: str) -> None:
    compare_shared_texts(recording, case)


def compare_sum(recording: Recording, change: Change = unchanged) -> None:
    model = Pretraining(recording, fusion="sum")
    change(model)
    match = model(batch_of(recording.inputs("pretrain")))[3]
    assert_close(match, recording.outputs("fusion_sum")["seq_relationship_score"], **CLOSE)


def test_sum_of_summaries(recording: Recording) -> None:
    compare_sum(recording)


def test_without_co_attention(recording: Recording) -> None:
    whole, recorded = Pretraining(recording), recording.outputs("no_coattention")
    apart = Vilbert(recording.config(text_layers_before=(), region_layers_before=())).eval()
    apart.load_state_dict(
        {name: tensor for name, tensor in whole.encoder.state_dict().items() if not name.startswith("co_attention")}
    )
    batch = batch_of(recording.inputs("pretrain"))
    encoded = apart(batch)
    assert_close(
        whole.masked_lm.head(encoded.text)[batch.text.mask], recorded["prediction_scores_t"][batch.text.mask], **CLOSE
    )
    assert_close(whole.match(encoded.pooled), recorded["seq_relationship_score"], **CLOSE)


def compare_gated(recording: Recording, change: Change = unchanged) -> None:
    """What was recorded of the model whose text steers the attention among regions."""
    recorded, batch = recording.outputs("dynamic_attention"), batch_of(recording.inputs("pretrain"))
    model = Pretraining(recording, added=recording.extras("dynamic_attention"), gated_regions=True)
    change(model)
    encoded, words, regions, match = model(batch)
    real, real_regions = batch.text.mask, F.pad(regions_of(batch).mask, (1, 0), value=True)
    assert encoded.states is not None
    states = whole_first(encoded.states["region_layers.0"])
    assert_rows_close(states, recorded["image_layer.0"], real_regions, "first region layer", **CLOSE)
    assert_close(words[real], recorded["prediction_scores_t"][real], **CLOSE)
    assert_close(regions[real_regions], recorded["prediction_scores_v"][real_regions], **CLOSE)
    assert_close(match, recorded["seq_relationship_score"], **CLOSE)
    assert_close(model.encoder(batch).pooled, encoded.pooled, **CLOSE)


def test_dynamic_attention(recording: Recording) -> None:
    compare_gated(recording)


def compare_features(recording: Recording, change: Change = unchanged) -> None:
    """What was recorded of the model that tells the features of regions."""
    inputs = recording.inputs("pretrain")
    batch = batch_of(inputs)
    model = Pretraining(recording, added=recording.extras("feature_target"))
    change(model)
    predicted = model(batch)[2]
    real = F.pad(regions_of(batch).mask, (1, 0), value=True)
    assert_close(predicted[real], recording.outputs("regression")["prediction_scores_v"][real], **CLOSE)
    compare_feature_losses(recording, predicted[:, 1:], inputs, recording.inputs("nce")["negative_index"])


def compare_feature_losses(
    recording: Recording, predicted: Tensor, inputs: Mapping[str, Tensor], negatives: Tensor
) -> None:
    """Regression and contrast of the predicted features (B, R, F) of regions."""
    chosen, features = inputs["image_label"] == 1, inputs["image_target_feat"]
    loss = feature_regression_loss(predicted, features, chosen, distance="l2")
    assert_close(loss.value[None], recording.outputs("regression")["loss.masked_img"], **CLOSE)
    slots = Slots(at=torch.arange(chosen.shape[1]).expand_as(chosen), mask=chosen)
    nce = region_nce_loss(predicted, features, slots, negatives)
    assert_close(nce.value[None], recording.outputs("nce")["loss.masked_img"], **CLOSE)


def test_regions_told_by_their_features(recording: Recording) -> None:
    compare_features(recording)


# Part -> head, outputs from the recorded weights.
TASK_HEADS: Mapping[str, tuple[str, str]] = {
    "classifier": ("classify", "vil_prediction.logit_fc.3.bias"),
    "classifier_gqa": ("classify", "vil_prediction_gqa.logit_fc.3.bias"),
    "entailment": ("classify", "vil_tri_prediction.bias"),
    "pair": ("pair", "vil_binary_prediction.logit_fc.3.bias"),
    "score": ("score", "vil_logit.bias"),
    "regions": ("regions", "vision_logit.bias"),
}


class MultiTask(Pretraining):
    """The multi-task model: task tokens, and all heads at once."""

    def __init__(self, recording: Recording) -> None:
        source = load_file(recording.folder / "state_dict_vltasks.safetensors")
        num_tasks = len(source["bert.embeddings.task_embeddings.weight"])
        super().__init__(recording, "state_dict_vltasks", num_tasks=num_tasks)
        self.heads = nn.ModuleDict()
        for part, (kind, bias) in TASK_HEADS.items():
            named: Any = kind
            style = STYLES.get(("multitask", part), STYLES["multitask", kind])
            in_group = 2 if part == "pair" else 1
            self.heads[part] = build(
                Head(kind=named, outputs=len(source[bias])), self.encoder.dims, style=style, group=in_group
            )
        self.parts |= dict(self.heads.items())
        self.coverage = KEYS["multitask"].load(source, self.parts)
        self.tokens = nn.Linear(self.encoder.dims.text, 1)  # a head of the release that no task reads
        self.tokens.load_state_dict({name: source[f"linguisic_logit.{name}"] for name in ("weight", "bias")})
        self.eval()


def test_every_head_of_the_multi_task_model(recording: Recording) -> None:
    recorded, batch, model = recording.outputs("tasks"), batch_of(recording.inputs("tasks")), MultiTask(recording)
    encoded, words, regions, _ = model(batch)
    compare_states(recording, batch, encoded, recorded, task=True)
    real, real_regions = batch.text.mask, F.pad(regions_of(batch).mask, (1, 0), value=True)
    for part, theirs in {
        "classifier": "vil_prediction",
        "classifier_gqa": "vil_prediction_gqa",
        "entailment": "vil_tri_prediction",
    }.items():
        assert_close(model.heads[part](encoded.pooled), recorded[theirs], **CLOSE, msg=labelled(part))
    assert_close(model.heads["pair"](encoded.pooled), recorded["vil_binary_prediction"], **CLOSE)
    assert_close(model.heads["score"](encoded.pooled)[:, None], recorded["vil_logit"], **CLOSE)
    scores = whole_first(model.heads["regions"](candidates(encoded)))
    assert_close(scores[real_regions], recorded["vision_logit"].squeeze(-1)[real_regions], **CLOSE)
    assert (recorded["vision_logit"].squeeze(-1)[~real_regions] < -5000).all()  # theirs; ours are not masked
    without_task = {
        name: torch.cat([recorded[name][:, :1], recorded[name][:, 2:]], dim=1)
        for name in ("linguisic_prediction", "linguisic_logit")
    }
    assert_close(words[real], without_task["linguisic_prediction"][real], **CLOSE)
    assert_close(model.tokens(encoded.text)[real], without_task["linguisic_logit"][real], **CLOSE)
    assert_close(regions[real_regions], recorded["vision_prediction"][real_regions], **CLOSE)


@pytest.mark.parametrize(
    ("task", "part"), [("vqa", "classifier"), ("gqa", "classifier_gqa"), ("ve", "entailment"), ("refcoco", "regions")]
)
def test_losses_and_scores_of_tasks_on_one_image(recording: Recording, task: str, part: str) -> None:
    recorded, target = recording.outputs(f"task.{task}"), recording.inputs(f"task.{task}")["target"]
    number = {"vqa": 1, "gqa": 15, "ve": 13, "refcoco": 10}[task]  # the task token is part of each task
    inputs = recording.inputs("tasks")
    batch, model = batch_of({**inputs, "task_ids": torch.full_like(inputs["task_ids"], number)}), MultiTask(recording)
    encoded = model.encoder(batch)
    if task == "refcoco":
        target = target.squeeze(-1)
        mask = F.pad(regions_of(batch).mask, (1, 0), value=True)
        logits = whole_first(model.heads[part](candidates(encoded))).masked_fill(
            ~mask, -10000.0
        )  # as in the release, whose mean counts padding
    else:
        logits = model.heads[part](encoded.pooled)
    loss = answer_loss(logits, target, "bce").value
    assert_close((loss / logits.shape[1] if task == "ve" else loss)[None], recorded["loss"], **CLOSE)
    reached = target.gather(1, logits.argmax(1, keepdim=True))
    reached = (reached > 0.5).float() if task == "refcoco" else reached
    assert_close(reached.mean()[None], recorded["train_score"], **CLOSE)
    assert_close(reached.sum()[None], recorded["val_score_sum"], **CLOSE)


def task_inputs(recording: Recording, task: str, rows: int) -> dict[str, Tensor]:
    """Inputs of a task that regroups rows, under the names of the others, one task token each."""
    inputs = recording.inputs(f"task.{task}")
    number = {"vcr": 5, "retrieval": 8, "nlvr2": 12}[task]
    names = {"question": "input_ids", "input_mask": "attention_mask", "segment_ids": "token_type_ids"}
    names |= {"features": "image_feat", "spatials": "image_loc", "image_mask": "image_attention_mask"}
    return {
        **{ours: inputs[theirs] for theirs, ours in names.items()},
        "task_ids": torch.full((rows, 1), number),
        "target": inputs["target"],
    }


@pytest.mark.parametrize("task", ["vcr", "retrieval"])
def test_four_choices(recording: Recording, task: str) -> None:
    inputs, recorded = recording.inputs(f"task.{task}"), recording.outputs(f"task.{task}")
    choices = inputs["question"].shape[1]
    rows = inputs["question"].shape[:2].numel()
    given = task_inputs(recording, task, rows)
    texts = {name: given[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "token_type_ids")}
    shared = given["image_feat"].dim() == 3  # VCR: four texts to an image
    images = {
        name: given[name] if shared else given[name].flatten(0, 1)
        for name in ("image_feat", "image_loc", "image_attention_mask")
    }
    batch = replace(
        batch_of({**texts, **images, "task_ids": given["task_ids"]})
        if not shared
        else _shared(texts, images, given, choices),
        group=choices,
    )
    batch.validate()
    model = MultiTask(recording)
    logits = model.heads["score"](model.encoder(batch).pooled).view(-1, choices)
    assert_close(logits, recorded["logits"], **CLOSE)
    assert_close(F.cross_entropy(logits, given["target"])[None], recorded["loss"], **CLOSE)
    hits = (logits.argmax(1) == given["target"]).float()
    assert_close(hits.mean()[None], recorded["train_score"], **CLOSE)
    assert_close(hits.sum()[None], recorded["val_score_sum"], **CLOSE)


def _shared(
    texts: Mapping[str, Tensor], images: Mapping[str, Tensor], given: Mapping[str, Tensor], choices: int
) -> Batch:
    """Several texts to an image, the image's row shared."""
    row = torch.arange(len(images["image_feat"])).repeat_interleave(choices)
    batch = batch_of({**texts, **{name: tensor[row] for name, tensor in images.items()}, "task_ids": given["task_ids"]})
    first = regions_of(batch).map(lambda tensor: tensor[::choices])
    return replace(batch, regions=replace(first, row=row))


def test_two_images_to_a_sentence(recording: Recording) -> None:
    recorded, target = recording.outputs("task.nlvr2"), recording.inputs("task.nlvr2")["target"]
    pairs = len(target)
    given = task_inputs(recording, "nlvr2", 2 * pairs)
    texts = {
        name: given[name].repeat_interleave(2, dim=0) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    images = {
        name: given[name].unflatten(1, (2, -1)).flatten(0, 1)
        for name in ("image_feat", "image_loc", "image_attention_mask")
    }
    batch = replace(batch_of({**texts, **images, "task_ids": given["task_ids"]}), group=2)
    model = MultiTask(recording)
    logits = model.heads["pair"](model.encoder(batch).pooled)
    assert_close(logits, recorded["logits"], **CLOSE)
    assert_close(answer_loss(logits, target, "bce").value[None] / logits.shape[1], recorded["loss"], **CLOSE)
    hits = (logits.argmax(1) == target.argmax(1)).float()
    assert_close(hits.mean()[None], recorded["train_score"], **CLOSE)
    assert_close(hits.sum()[None], recorded["val_score_sum"], **CLOSE)


def compare_first_classifier(recording: Recording, change: Change = unchanged) -> nn.Module:
    """The first release's classifier by itself, once its recorded logits have been compared."""
    source = recording.extras("beta_vqa_head")
    pooled = recording.inputs("beta_vqa_head")["pooled"]
    head = build(
        Head(kind="classify", outputs=len(source["vil_prediction.main.3.bias"])),
        Vilbert(recording.config()).dims,
        style=STYLES["first", "classify"],
    )
    KEYS["first"].load(source, {"classifier": head})
    head.eval()
    change(head)
    assert_close(head(pooled), recording.outputs("beta_vqa_head")["logits"], **CLOSE)
    return head


def test_first_releases_classifier(recording: Recording) -> None:
    source, head = recording.extras("beta_vqa_head"), compare_first_classifier(recording)
    written = KEYS["first"].invert({f"classifier.{name}": tensor for name, tensor in head.state_dict().items()})
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in source)


def test_quirk_of_all_layers_is_not_ours(recording: Recording) -> None:
    """Asked for all layers, the release pools the state right after the last co-attention. Ours pools the last state,
    captured or not."""
    quirk, right = recording.outputs("quirk_all_layers"), recording.outputs("pretrain")
    encoder, batch = Pretraining(recording).encoder, batch_of(recording.inputs("pretrain"))
    for capture in (False, True):
        pooled = encoder(batch, capture=capture).pooled
        assert_close(pooled, right["pooled_output_t"] * right["pooled_output_v"], **CLOSE)
        assert (pooled - quirk["pooled_output_t"] * quirk["pooled_output_v"]).abs().max() > 1e-2


def test_odd_rows_make_no_pairs(recording: Recording) -> None:
    model, batch = MultiTask(recording), batch_of(recording.inputs("tasks"))
    recorded = recording.outputs("tasks_odd_batch")["vil_binary_prediction"]
    pooled = model.encoder(batch).pooled[: len(recorded)]
    assert len(recorded) % 2
    assert_close(model.match(pooled), recorded, **CLOSE)  # what the slot really held
    with pytest.raises(RuntimeError, match="shape"):
        model.heads["pair"](pooled)


def test_whole_image_is_the_mean_of_its_regions(recording: Recording) -> None:
    encoder, batch = Pretraining(recording).encoder, batch_of(recording.inputs("pretrain"))
    averaged = encoder(replace(batch, regions=replace(regions_of(batch), whole=None)))
    assert_close(averaged.pooled, encoder(batch).pooled, **CLOSE)
    assert_close(averaged.whole, encoder(batch).whole, **CLOSE)


def _rough_norms(factor: float = 1) -> Change:
    """Another epsilon in every norm: as large as the tolerance, or more where few values are recorded."""

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = factor * CLOSE["atol"]

    return change


def _swapped_keys_and_values(model: Pretraining) -> None:
    layer = model.encoder.co_attention_layers[0]
    assert isinstance(layer, CoAttentionLayer)
    for attention in (layer.text_attention.attention, layer.region_attention.attention):
        attention.key, attention.value = attention.value, attention.key


def _other_schedule(model: Pretraining) -> None:
    """Each co-attention a text layer earlier, or one later where there is none before."""
    config = model.encoder.config
    before, layers = config.text_layers_before, config.num_layers
    earlier = tuple(max(count - 1, 0) for count in before)
    later = tuple(min(count + 1, layers) for count in before)
    model.encoder.config = replace(config, text_layers_before=earlier if earlier != before else later)


def _other_heads(layers: str, block: str) -> Change:
    """Another number of heads in the last layer."""

    def change(model: Pretraining) -> None:
        *_, last = model.encoder.get_submodule(layers).children()
        attention = last.get_submodule(f"{block}.attention")
        assert isinstance(attention, Attention)
        attention.num_heads = 2 if attention.num_heads == 1 else 1

    return change


def _linear_summaries(model: Pretraining) -> None:
    for pooler in (model.encoder.text_pooler, model.encoder.region_pooler):
        with torch.no_grad():
            pooler.weight.neg_()
            pooler.bias.neg_()


MUTATIONS: Mapping[str, Callable[[Pretraining], Any]] = {
    **{
        f"nudge {name}": nudge(name)
        for name in (
            "encoder.embeddings.positions.weight",
            "encoder.embeddings.segments.weight",
            "encoder.text_norm.bias",
            "encoder.projection.bias",
            "encoder.projection.weight",
            "encoder.box_projection.weight",
            "encoder.region_norm.weight",
            "encoder.text_layers.0.self_attention.attention.query.bias",
            "encoder.text_layers.-1.feed_forward.norm.bias",
            "encoder.region_layers.0.self_attention.attention.value.bias",
            "encoder.region_layers.-1.feed_forward.up.bias",
            "encoder.region_layers.-1.self_attention.norm.weight",
            "encoder.co_attention_layers.0.text_attention.attention.query.bias",
            "encoder.co_attention_layers.0.region_attention.attention.value.bias",
            "encoder.co_attention_layers.-1.text_attention.output.bias",
            "encoder.co_attention_layers.-1.region_attention.norm.weight",
            "encoder.co_attention_layers.0.text_feed_forward.down.bias",
            "encoder.co_attention_layers.-1.region_feed_forward.norm.bias",
            "masked_lm.head.bias",
            "masked_lm.head.norm.weight",
            "regions.outputs.classes.bias",
            "regions.transform.norm.weight",
            "matching.head.linear.bias",
        )
    },
    "epsilon of the norms": _rough_norms(),
    "keys and values swapped": _swapped_keys_and_values,
    "directions one after the other": one_after_the_other,
    "another schedule": _other_schedule,
    "other text heads": _other_heads("text_layers", "self_attention"),
    "other region heads": _other_heads("region_layers", "self_attention"),
    "other co-attention heads": _other_heads("co_attention_layers", "text_attention"),
    "summaries of the other sign": _linear_summaries,
    "dropout on": lambda model: model.train(),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_model_is_noticed(recording: Recording, mutation: str) -> None:
    model = Pretraining(recording)
    MUTATIONS[mutation](model)
    with pytest.raises(AssertionError):
        compare_pretraining(recording, model)


VARIANTS: Mapping[str, tuple[Callable[[Recording, Change], Any], Mapping[str, Change]]] = {
    "gated": (
        compare_gated,
        {
            **{
                f"nudge {name}": nudge(f"encoder.{name}")
                for name in (
                    "region_layers.0.query_gate.bias",
                    "region_layers.0.query_gate.weight",
                    "region_layers.0.key_gate.bias",
                    "region_layers.0.key_gate.weight",
                    "region_layers.-1.self_attention.norm.weight",
                    "text_norm.weight",
                )
            },
            "epsilon": _rough_norms(10),
            "directions one after the other": one_after_the_other,
        },
    ),
    "features": (
        compare_features,
        {
            **{
                f"nudge {name}": nudge(name)
                for name in (
                    "regions.outputs.classes.bias",
                    "regions.outputs.classes.weight",
                    "regions.transform.norm.weight",
                    "encoder.region_norm.bias",
                )
            },
            "epsilon": _rough_norms(10),
        },
    ),
    **{
        case: (
            partial(compare_shared_texts, case=case),
            {
                **{
                    f"nudge {name}": nudge(name)
                    for name in (
                        "encoder.text_norm.weight",
                        "encoder.text_layers.0.self_attention.attention.value.bias",
                        "encoder.co_attention_layers.0.region_attention.norm.weight",
                        "encoder.region_pooler.bias",
                        "matching.head.linear.bias",
                    )
                },
                "epsilon": _rough_norms(100),
                "directions one after the other": one_after_the_other,
            },
        )
        for case in ("fast_mode", "in_batch_pairs")
    },
    "sum": (
        compare_sum,
        {"product": lambda model: setattr(model.encoder, "config", replace(model.encoder.config, fusion="product"))},
    ),
    "first classifier": (
        compare_first_classifier,
        {
            f"nudge {name}": nudge(name)
            for name in (
                "dense.direction",
                "dense.gain",
                "dense.bias",
                "output.direction",
                "output.gain",
                "output.bias",
            )
        }
        | {"dropout on": lambda head: head.train()},
    ),
}
"""Recorded variant -> its comparison, and what it must notice."""


@pytest.mark.parametrize(
    ("variant", "mutation"), [(variant, mutation) for variant, (_, own) in VARIANTS.items() for mutation in own]
)
def test_a_broken_variant_is_noticed(recording: Recording, variant: str, mutation: str) -> None:
    compare, own = VARIANTS[variant]
    with pytest.raises(AssertionError):
        compare(recording, change=own[mutation])


@pytest.mark.parametrize("broken", ["negatives", "predictions", "targets"])
def test_broken_contrast_of_features_is_noticed(recording: Recording, broken: str) -> None:
    inputs, negatives = recording.inputs("pretrain"), recording.inputs("nce")["negative_index"]
    predicted = Pretraining(recording, added=recording.extras("feature_target"))(batch_of(inputs))[2][:, 1:]
    compare_feature_losses(recording, predicted, inputs, negatives)
    if broken == "negatives":
        negatives = negatives.roll(1, 0)  # another row's
    elif broken == "predictions":
        predicted = predicted * 1.01
    else:
        inputs["image_target_feat"] = inputs["image_target_feat"].roll(1, 0)
    with pytest.raises(AssertionError):
        compare_feature_losses(recording, predicted, inputs, negatives)


@pytest.mark.parametrize("part", TASK_HEADS)
def test_a_broken_task_head_is_noticed(recording: Recording, part: str) -> None:
    recorded, batch, model = recording.outputs("tasks"), batch_of(recording.inputs("tasks")), MultiTask(recording)
    theirs = {
        "classifier": "vil_prediction",
        "classifier_gqa": "vil_prediction_gqa",
        "entailment": "vil_tri_prediction",
    }
    theirs |= {"pair": "vil_binary_prediction", "score": "vil_logit", "regions": "vision_logit"}
    with torch.no_grad():
        model.get_parameter(f"heads.{part}.linear.bias")[0] += 1e-3
        encoded = model.encoder(batch)
        logits = (
            whole_first(model.heads[part](candidates(encoded)))[..., None]
            if part == "regions"
            else model.heads[part](encoded.pooled).view_as(recorded[theirs[part]])
        )
    with pytest.raises(AssertionError):
        assert_close(logits[:, :1], recorded[theirs[part]][:, :1], **CLOSE)


def test_a_broken_task_table_is_noticed(recording: Recording) -> None:
    recorded, batch, model = recording.outputs("tasks"), batch_of(recording.inputs("tasks")), MultiTask(recording)
    assert model.encoder.tasks is not None
    with torch.no_grad():
        model.encoder.tasks.weight[recording.inputs("tasks")["task_ids"][0, 0], 0] += 0.01
    with pytest.raises(AssertionError):
        compare_states(recording, batch, model.encoder(batch, capture=True), recorded, task=True)
