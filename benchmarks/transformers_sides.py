"""transformers' LXMERT and VisualBERT, the maintained implementations, as their users run them.

Both sides have the same weights, copied through the library's key maps. A user's batch is padded
to its longest row, or to a fixed length: 20 word pieces in LXMERT's own scripts, 128 pieces and 100 regions in
VisualBERT's. The vocabulary is predicted at every position, as these classes do it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from sides import Answering, Pretraining
from torch import Tensor, nn
from torch.nn import functional as F

from visling import models
from visling.boxes import spatial_six
from visling.objectives.masked_regions import MaskedRegions
from visling.tasks.answers import answer_loss
from visling.types import IGNORE, Batch, Slots, Targets


@dataclass(frozen=True, kw_only=True)
class Padded:
    """How many positions every row of a batch has; None = as many as the longest needs."""

    tokens: int | None = None
    regions: int | None = None


def pad(batch: Batch, targets: Targets, padded: Padded) -> tuple[Batch, Targets]:
    """The batch with padding up to fixed lengths."""
    text, regions = batch.text, batch.regions
    assert regions is not None
    more = (padded.tokens or text.ids.shape[1]) - text.ids.shape[1]
    if more > 0:
        text = dataclasses.replace(
            text,
            ids=F.pad(text.ids, (0, more)),
            mask=F.pad(text.mask, (0, more)),
            segments=F.pad(text.segments, (0, more)),
        )
    more = (padded.regions or regions.mask.shape[1]) - regions.mask.shape[1]
    if more > 0:
        regions = dataclasses.replace(
            regions,
            features=F.pad(regions.features, (0, 0, 0, more)),
            boxes=F.pad(regions.boxes, (0, 0, 0, more)),
            mask=F.pad(regions.mask, (0, more)),
        )
        if targets.region_features is not None:
            features = F.pad(targets.region_features, (0, 0, 0, more))
            targets = dataclasses.replace(targets, region_features=features)
    return dataclasses.replace(batch, text=text, regions=regions), targets


def at_slots(slots: Slots | None, values: Tensor | None, length: int, otherwise: float) -> Tensor:
    """Values (B, P) at slots as (B, length), with one value elsewhere."""
    assert slots is not None
    rows, places = slots.mask.nonzero()[:, 0], slots.at[slots.mask]
    chosen = torch.ones_like(places, dtype=torch.float32) if values is None else values[slots.mask]
    spread = torch.full((len(slots.mask), length), otherwise, dtype=chosen.dtype, device=chosen.device)
    spread[rows, places] = chosen
    return spread


class LxmertPretraining:
    """`LxmertForPreTraining` with its four tasks; all of their losses equal visling's."""

    def __init__(self, ours: Pretraining, device: torch.device) -> None:
        objectives = dict(ours.module.objectives.items())
        parts = {
            "encoder": ours.module.encoder,
            "vocabulary": objectives["masked_lm"].head,
            "matching": objectives["matching"].head,
            "region_targets": objectives["masked_regions"].head,
            "answers": objectives["image_qa"].head,
        }
        masked_regions = objectives["masked_regions"]
        assert isinstance(masked_regions, MaskedRegions)
        # The class divides by the number of all regions and multiplies by this.
        self.module: Any = build(
            "LxmertForPreTraining", ours.config.encoder, parts, visual_loss_normalizer=masked_regions.losses.scale
        ).to(device)

    def feed(self, batch: Batch, targets: Targets, padded: Padded = Padded()) -> dict[str, Any]:
        """The arguments of the class."""
        batch, targets = pad(batch, targets, padded)
        assert batch.regions is not None
        regions = batch.regions.mask.shape[1]
        return {
            **lxmert_inputs(batch),
            "labels": at_slots(targets.token_slots, targets.token_ids, batch.text.ids.shape[1], IGNORE),
            "obj_labels": {
                "obj": (
                    at_slots(targets.class_slots, targets.region_classes, regions, IGNORE),
                    at_slots(targets.class_slots, targets.region_weights, regions, 0.0),
                ),
                "attr": (
                    at_slots(targets.class_slots, targets.region_attributes, regions, IGNORE),
                    at_slots(targets.class_slots, targets.attribute_weights, regions, 0.0),
                ),
                "feat": (targets.region_features, at_slots(targets.feature_slots, None, regions, 0.0)),
            },
            "matched_label": targets.matched,
            "ans": targets.answer,
        }

    def loss(self, fed: dict[str, Any]) -> Tensor:
        """The class's own sum."""
        value: Tensor = self.module(**fed).loss
        return value


class VisualBertPretraining:
    """`VisualBertForPreTraining`; its loss equals visling's."""

    def __init__(self, ours: Pretraining, device: torch.device) -> None:
        objectives = dict(ours.module.objectives.items())
        parts = {
            "encoder": ours.module.encoder,
            "vocabulary": objectives["masked_lm"].head,
            "matching": objectives["matching"].head,
        }
        self.config = ours.config.encoder
        self.module: Any = build("VisualBertForPreTraining", ours.config.encoder, parts).to(device)

    def feed(self, batch: Batch, targets: Targets, padded: Padded = Padded()) -> dict[str, Tensor]:
        """The arguments of the class; labels go on over the regions."""
        batch, targets = pad(batch, targets, padded)
        assert batch.regions is not None
        assert targets.matched is not None
        positions = batch.text.ids.shape[1] + batch.regions.mask.shape[1]
        return {
            **visualbert_inputs(batch, self.config),
            "labels": at_slots(targets.token_slots, targets.token_ids, positions, IGNORE),
            "sentence_image_labels": targets.matched,
        }

    def loss(self, fed: dict[str, Tensor]) -> Tensor:
        """The class's own sum."""
        value: Tensor = self.module(**fed).loss
        return value


class LxmertAnswering:
    """`LxmertForQuestionAnswering`, with the loss of LXMERT's release on its scores: its own takes one answer each."""

    def __init__(self, ours: Answering, device: torch.device) -> None:
        parts = {"encoder": ours.module.encoder, "answers": ours.module.heads["classify"]}
        self.module: Any = build("LxmertForQuestionAnswering", ours.config, parts).to(device)

    def feed(self, batch: Batch, targets: Targets, padded: Padded = Padded()) -> dict[str, Any]:
        """The arguments of the class, and the soft scores."""
        return {**lxmert_inputs(pad(batch, targets, padded)[0]), "scores": targets.answer}

    def loss(self, fed: dict[str, Any]) -> Tensor:
        """Binary cross-entropy, summed over the answers."""
        return answer_loss(self.logits(fed), fed["scores"], "bce").value

    def logits(self, fed: dict[str, Any]) -> Tensor:
        """(B, A)."""
        found: Tensor = self.module(
            **{name: value for name, value in fed.items() if name != "scores"}
        ).question_answering_score
        return found


class VisualBertAnswering:
    """`VisualBertForQuestionAnswering` with its own loss, which is that of the release."""

    def __init__(self, ours: Answering, device: torch.device) -> None:
        parts = {"encoder": ours.module.encoder, "classifier": ours.module.heads["classify"]}
        self.config = ours.config
        self.module: Any = build("VisualBertForQuestionAnswering", ours.config, parts).to(device)

    def feed(self, batch: Batch, targets: Targets, padded: Padded = Padded()) -> dict[str, Any]:
        """The arguments of the class."""
        return {**visualbert_inputs(pad(batch, targets, padded)[0], self.config), "labels": targets.answer}

    def loss(self, fed: dict[str, Any]) -> Tensor:
        """KL divergence, averaged over the rows."""
        value: Tensor = self.module(**fed).loss
        return value

    def logits(self, fed: dict[str, Any]) -> Tensor:
        """(B, A)."""
        found: Tensor = self.module(**{name: value for name, value in fed.items() if name != "labels"}).logits
        return found


def build(name: str, config: Any, parts: dict[str, nn.Module], **changes: Any) -> Any:
    """A class of transformers, randomly initialised; visling's modules, by part of the key map, get its weights, unless
    they have none (device meta)."""
    import transformers  # here, so that the memory of our side is measured without it

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    spec = models.spec("lxmert" if name.startswith("Lxmert") else "visualbert")
    assert spec.transformers is not None
    described = spec.transformers(config, {part: dict(module.state_dict()) for part, module in parts.items()})
    kind = getattr(transformers, name)
    built = kind(kind.config_class(**described, **changes))
    if not any(parameter.is_meta for module in parts.values() for parameter in module.parameters()):
        spec.keys["transformers"].load(built.state_dict(), parts)
    return built


def lxmert_inputs(batch: Batch) -> dict[str, Any]:
    """What LXMERT's classes read; all 36 regions are real, so that a mask of them is not given."""
    regions = batch.regions
    assert regions is not None
    assert bool(regions.mask.all())
    return {
        "input_ids": batch.text.ids,
        "attention_mask": batch.text.mask.long(),
        "token_type_ids": batch.text.segments,
        "visual_feats": regions.features,
        "visual_pos": regions.boxes,
    }


def visualbert_inputs(batch: Batch, config: Any) -> dict[str, Tensor]:
    """What VisualBERT's classes read; regions are of segment 0, as in the release."""
    regions = batch.regions
    assert regions is not None
    features = regions.features
    if config.append_spatial:
        features = torch.cat([features, spatial_six(regions.boxes)], dim=-1)
    return {
        "input_ids": batch.text.ids,
        "attention_mask": batch.text.mask.long(),
        "token_type_ids": batch.text.segments,
        "visual_embeds": features,
        "visual_attention_mask": regions.mask.long(),
        "visual_token_type_ids": torch.zeros_like(regions.mask, dtype=torch.int64),
    }


def warm_import() -> None:
    """Load the code of transformers' classes: it is no memory of a step."""
    import transformers

    _ = transformers.VisualBertForPreTraining, transformers.LxmertForPreTraining
