"""Masked regions: predict the hidden regions from the rest of the image and from the text.

Targets  soft classes    the detector's distribution: KL divergence (ViLBERT), cross-entropy (VL-BERT)
         hard classes    the detector's best class and attribute, cross-entropy weighted by its confidence (LXMERT)
         features        the region's own feature: smooth L1 (LXMERT), squared error (ViLBERT, `visual_target` 1), or
                         picked out among the features of other regions (ViLBERT, `visual_target` 2)
Shapes   B rows, Q region slots, R regions, C classes, F feature width, K negatives, Dr region width.
Source   ViLBERT section 3.1 and release (`BertForMultiModalPreTraining`), VL-BERT section 3.3 and release
         (`ResNetVLBERTForPretraining`), LXMERT section 3.1 and release (`LXRTPretraining`).
Differs  LXMERT's paper predicts the labels of hidden regions only and knows no confidence; its release predicts them
         for every region, visible ones included, and so does the default here. ViLBERT's release may draw padding as a
         negative; here only real regions are drawn. Where a release has no chosen region in a batch it gives NaN; here
         the loss is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visling.errors import ConfigError
from visling.nn.head_blocks import RegionTargets
from visling.nn.heads import build
from visling.nn.pooling import gather
from visling.objectives.base import Objective, Over, PretrainStep, average, count_chosen
from visling.types import IGNORE, NOTHING, Batch, Dims, Head, Loss, Reads, Regions, Slots, Targets, Term

SUM_TOLERANCE = 0.1
"""How far from 1 the sum of a detector distribution may be for it to count (VL-BERT release)."""

ELSEWHERE_SHARE, HERE_SHARE = 0.7, 0.3
"""Shares of the negatives that are regions of other images and other regions of the same image, each rounded down
(ViLBERT release)."""


@dataclass(frozen=True, kw_only=True)
class RegionLosses:
    """What is predicted about masked regions, and how the losses are averaged."""

    classes: Literal["none", "kl", "cross_entropy", "hard"] = "none"
    """none; the detector's distribution by KL divergence (ViLBERT) or by cross-entropy (VL-BERT); its best class
    (LXMERT)."""
    num_classes: int = 1601
    """C: 1600 of Visual Genome, and background where the distribution has it (ViLBERT, VL-BERT)."""
    attributes: bool = False
    """Predict the detector's best attribute too (LXMERT)."""
    num_attributes: int = 400
    """Attributes of Visual Genome."""
    features: Literal["none", "smooth_l1", "l2", "nce"] = "none"
    """none; the region's feature by smooth L1 (LXMERT) or squared error (ViLBERT, `visual_target` 1), or picked out
    among others (2)."""
    feature_size: int = 2048
    """F."""
    weighted: bool = False
    """Multiply the losses of best class and attribute by the detector's confidence (LXMERT)."""
    over: Literal["chosen", "rows", "regions"] = "chosen"
    """What a sum is divided by: the chosen regions of the batch; those of each row, then the rows (a switch of VL-BERT,
    off in its configs); all real regions of the batch, chosen or not (LXMERT)."""
    scale: float = 1.0
    """Factor of every loss: 1/0.15 in LXMERT."""
    num_negatives: int = 128
    """K of nce. ViLBERT's command line offers 255, but its model reads 128 from its config."""
    padded_negatives: bool = False
    """Allow the padding of the batch's images among the negatives of nce, as ViLBERT's release does; False draws real
    regions only."""

    def __post_init__(self) -> None:
        if not self.widths:
            raise ConfigError(
                "region losses: nothing to predict. Set classes, attributes or features, or leave the objective out."
            )
        if self.weighted and self.classes != "hard" and not self.attributes:
            raise ConfigError(
                "region losses: weighted needs the confidence of a best class or attribute. "
                "Set classes='hard' or attributes=true."
            )

    @property
    def widths(self) -> dict[str, int]:
        """Name -> width of the outputs of a head of kind `region_targets`."""
        outputs = {
            "classes": (self.classes != "none", self.num_classes),
            "attributes": (self.attributes, self.num_attributes),
            "features": (self.features != "none", self.feature_size),
        }
        return {name: width for name, (on, width) in outputs.items() if on}

    @property
    def needs(self) -> frozenset[str]:
        """`Targets` fields that these losses read."""
        hard = self.classes == "hard"
        needed = {
            "class_slots": self.classes != "none" or self.attributes,
            "region_probs": self.classes in ("kl", "cross_entropy"),
            "region_classes": hard,
            "region_weights": hard and self.weighted,
            "region_attributes": self.attributes,
            "attribute_weights": self.attributes and self.weighted,
            "feature_slots": self.features != "none",
            "region_features": self.features != "none",
        }
        return frozenset(name for name, wanted in needed.items() if wanted)


_DETECTOR_DISTRIBUTION = RegionLosses(classes="kl")


class MaskedRegions(Objective):
    """Sum of the region losses that are asked for, over one head.

    Args:
        losses: the KL divergence from the detector's distribution unless given.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Those of its losses: `RegionLosses.needs`."""

    def __init__(
        self, dims: Dims, style: str, words: nn.Embedding, *, losses: RegionLosses = _DETECTOR_DISTRIBUTION
    ) -> None:
        super().__init__(dims, style, words)
        self.losses = losses
        widths = losses.widths
        self.head = build(Head(kind="region_targets", outputs=sum(widths.values()), options=widths), dims, style=style)

    def reads(self) -> frozenset[str]:
        return self.losses.needs

    def reads_of_encoded(self, batch: Batch, targets: Targets) -> Reads:
        slots = targets.class_slots, targets.feature_slots
        return replace(NOTHING, regions=tuple(each for each in slots if each is not None))

    def forward(self, step: PretrainStep) -> Loss:
        if step.batch.regions is None:  # text alone, as one of VL-BERT's two corpora
            nothing = step.encoded.regions.sum() * 0.0
            none = nothing.detach()
            terms = {f"region_{name}": Term(total=nothing, count=none) for name in self.losses.widths}
            return Loss(value=nothing, parts={"masked_regions": (none, none)}, terms=terms)
        self.check(step.targets)
        predicted, real = self._predict(step), _mask_regions(step.batch.regions)
        over = self._over()
        count = real.sum() if self.losses.over == "regions" else None
        losses = [
            *self._label_losses(predicted, step.targets, over, count),
            *self._feature_losses(predicted, step.targets, real, over, count),
        ]
        return _sum_losses(losses, self.losses.scale)

    def count(self, batch: Batch, targets: Targets) -> Mapping[str, Tensor]:
        names = [f"region_{name}" for name in self.losses.widths]
        if batch.regions is None:
            return dict.fromkeys(names, torch.zeros((), dtype=torch.int64, device=batch.text.ids.device))
        self.check(targets)
        if self.losses.over == "regions":
            return dict.fromkeys(names, _mask_regions(batch.regions).sum())
        over, chosen = self._over(), self._choose_regions(targets)
        return {name: count_chosen(chosen[name], over) for name in names}

    def _over(self) -> Over:
        return "rows" if self.losses.over == "rows" else "chosen"

    def _choose_regions(self, targets: Targets) -> dict[str, Tensor]:
        """Term -> (B, Q) bool: the slots that count in it, where not all regions do."""
        chosen: dict[str, Tensor] = {}
        if targets.class_slots is not None:
            mask = targets.class_slots.mask
            if self.losses.classes == "hard":
                chosen["region_classes"] = mask & (cast(Tensor, targets.region_classes) != IGNORE)
            elif self.losses.classes == "cross_entropy":
                chosen["region_classes"] = mask & is_distribution(cast(Tensor, targets.region_probs))
            else:
                chosen["region_classes"] = mask
            if self.losses.attributes:
                chosen["region_attributes"] = mask & (cast(Tensor, targets.region_attributes) != IGNORE)
        if targets.feature_slots is not None:
            chosen["region_features"] = targets.feature_slots.mask
        return chosen

    def _predict(self, step: PretrainStep) -> Mapping[str, Tensor]:
        """Outputs of the head at the slots, (B, Q, width) by name."""
        targets = step.targets
        slots = {"classes": targets.class_slots, "attributes": targets.class_slots, "features": targets.feature_slots}
        head = cast(RegionTargets, self.head)
        return head.at_slots(step.encoded.regions, {name: cast(Slots, slots[name]) for name in self.losses.widths})

    def _label_losses(
        self, predicted: Mapping[str, Tensor], targets: Targets, over: Over, count: Tensor | None
    ) -> Iterator[Loss]:
        settings, slots = self.losses, targets.class_slots
        if slots is None:
            return
        if settings.classes == "hard":
            weights = targets.region_weights if settings.weighted else None
            classes = cast(Tensor, targets.region_classes)
            yield hard_class_loss(predicted["classes"], classes, slots.mask, weights=weights, over=over, count=count)
        elif settings.classes != "none":
            soft = soft_class_kl_loss if settings.classes == "kl" else soft_class_cross_entropy_loss
            yield soft(predicted["classes"], cast(Tensor, targets.region_probs), slots.mask, over=over, count=count)
        if settings.attributes:
            weights = targets.attribute_weights if settings.weighted else None
            attributes = cast(Tensor, targets.region_attributes)
            yield attribute_loss(
                predicted["attributes"], attributes, slots.mask, weights=weights, over=over, count=count
            )

    def _feature_losses(
        self, predicted: Mapping[str, Tensor], targets: Targets, real: Tensor, over: Over, count: Tensor | None
    ) -> Iterator[Loss]:
        kind, slots, features = self.losses.features, targets.feature_slots, targets.region_features
        if kind == "none" or slots is None or features is None:
            return
        if kind == "nce":
            drawn_from = torch.ones_like(real) if self.losses.padded_negatives else real
            negatives = draw_negatives(drawn_from, slots.at, self.losses.num_negatives)
            yield region_nce_loss(predicted["features"], features, slots, negatives, over=over, count=count)
        else:
            yield feature_regression_loss(
                predicted["features"], gather(features, slots.at), slots.mask, distance=kind, over=over, count=count
            )


def soft_class_kl_loss(
    logits: Tensor, probs: Tensor, mask: Tensor, *, over: Over = "chosen", count: Tensor | None = None
) -> Loss:
    """KL divergence of the predicted from the detector's distribution, summed over classes, averaged over chosen
    regions.

    Args:
        logits: (B, Q, C), any floating type; the loss is computed in float32.
        probs: (B, Q, C), taken as they are: neither normalised nor sharpened.
        mask: (B, Q) bool, True = chosen.
        over, count: see `objectives.base.average`.
    Source:
        ViLBERT release, `visual_target` 0.
    """
    probs = probs.float()
    values = F.kl_div(logits.float().log_softmax(-1), probs, reduction="none").sum(-1)
    return _with_hits(average("region_classes", values, mask, over=over, count=count), logits, probs.argmax(-1), mask)


def soft_class_cross_entropy_loss(
    logits: Tensor, probs: Tensor, mask: Tensor, *, over: Over = "chosen", count: Tensor | None = None
) -> Loss:
    """Cross-entropy of the detector's distribution, averaged over chosen regions; distributions that do not sum to 1
    within 0.1 do not count.

    Args:
        logits: (B, Q, C), any floating type; the loss is computed in float32.
        probs: (B, Q, C).
        mask: (B, Q) bool, True = chosen.
        over, count: see `objectives.base.average`.
    Source:
        VL-BERT release, `soft_cross_entropy`.
    """
    mask, probs = mask & is_distribution(probs), probs.float()
    values = -(probs * logits.float().log_softmax(-1)).sum(-1)
    return _with_hits(average("region_classes", values, mask, over=over, count=count), logits, probs.argmax(-1), mask)


def is_distribution(probs: Tensor) -> Tensor:
    """(B, Q) bool: whether the probabilities (B, Q, C) of a region sum to 1, within `SUM_TOLERANCE`."""
    return (probs.float().sum(-1) - 1).abs() < SUM_TOLERANCE


def hard_class_loss(
    logits: Tensor,
    classes: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    over: Over = "chosen",
    count: Tensor | None = None,
) -> Loss:
    """Cross-entropy of the detector's best class, times its confidence if `weights` are given.

    Args:
        logits: (B, Q, C), any floating type; the loss is computed in float32.
        classes: (B, Q) int64; a region labelled IGNORE adds nothing, and counts only if `count` says so.
        mask: (B, Q) bool, True = chosen; LXMERT's release chooses every region.
        weights: (B, Q) confidence.
        over, count: see `objectives.base.average`.
    Source:
        LXMERT release; its mean divides by all regions of the batch, those labelled IGNORE included (`count`), and is
        multiplied by 1/0.15.
    """
    return _hard_label_loss("region_classes", logits, classes, mask, weights, over, count)


def attribute_loss(
    logits: Tensor,
    attributes: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    over: Over = "chosen",
    count: Tensor | None = None,
) -> Loss:
    """`hard_class_loss` for the detector's best attribute."""
    return _hard_label_loss("region_attributes", logits, attributes, mask, weights, over, count)


def feature_regression_loss(
    predicted: Tensor,
    features: Tensor,
    mask: Tensor,
    *,
    distance: Literal["smooth_l1", "l2"] = "smooth_l1",
    over: Over = "chosen",
    count: Tensor | None = None,
) -> Loss:
    """Distance of predicted and clean features, averaged over the width, then over chosen regions.

    Args:
        predicted, features: (B, Q, F), any floating type; the loss is computed in float32.
        mask: (B, Q) bool, True = chosen.
        distance: smooth_l1 with its bend at 1 (LXMERT), or the squared difference (ViLBERT, `visual_target` 1).
        over, count: see `objectives.base.average`; LXMERT's release divides by all regions of the batch, then
            multiplies by 1/0.15.
    """
    measure = F.smooth_l1_loss if distance == "smooth_l1" else F.mse_loss
    values = measure(predicted.float(), features.float(), reduction="none").mean(-1)
    return average("region_features", values, mask, over=over, count=count)


def region_nce_loss(
    predicted: Tensor,
    features: Tensor,
    slots: Slots,
    negatives: Tensor,
    *,
    over: Over = "chosen",
    count: Tensor | None = None,
) -> Loss:
    """Cross-entropy of a region's own feature among those of other regions, scored by dot products.

    Args:
        predicted: (B, Q, F) at the slots, any floating type; the loss is computed in float32.
        features: (B, R, F) clean features of the batch.
        slots: (B, Q) chosen regions.
        negatives: (B, Q, K) int64 regions of the batch, counted row by row (row * R + region); one that is the region
            itself does not compete.
        over, count: see `objectives.base.average`.
    Source:
        ViLBERT release, `visual_target` 2.
    """
    rows, regions = features.shape[:2]
    own = slots.at + torch.arange(rows, device=slots.at.device)[:, None] * regions  # (B, Q)
    # Dot products of raw features are large: half precision would blur them
    with torch.autocast(predicted.device.type, enabled=False):
        scores = predicted.float() @ features.float().flatten(0, 1).T  # (B, Q, B * R)
    others = scores.gather(-1, negatives).masked_fill(negatives == own[..., None], -torch.inf)
    candidates = torch.cat([scores.gather(-1, own[..., None]), others], dim=-1)  # (B, Q, 1 + K), the right one first
    values = -candidates.log_softmax(-1)[..., 0]
    return _with_hits(
        average("region_features", values, slots.mask, over=over, count=count),
        candidates,
        torch.zeros_like(own),
        slots.mask,
    )


def draw_negatives(mask: Tensor, at: Tensor, count: int) -> Tensor:
    """Negatives for `region_nce_loss`: `int(0.7 n)` regions of other images, then `int(0.3 n)` other regions of the
    same image, with repetition.

    Where no other image of the batch has a region, those of the same image stand in; where an image has one region, the
    region itself is named, which does not compete. Draws from the generator of the device, as dropout does.

    Args:
        mask: (B, R) bool regions to draw from, which come first in every row; each is equally likely.
        at: (B, Q) regions that they are drawn for.
        count: n.
    Returns:
        (B, Q, K) int64, counted row by row (row * R + region).
    Source:
        ViLBERT release; it draws the image first and then one of its positions, padding included, which comes to the
        same as a mask that is True everywhere.
    """
    rows, regions = mask.shape
    numbers = mask.sum(1)  # (B,)
    ends = numbers.cumsum(0)
    starts, start_of_row = ends - numbers, torch.arange(rows, device=mask.device) * regions
    elsewhere_count, here_count = int(ELSEWHERE_SHARE * count), int(HERE_SHARE * count)
    others = ends[-1] - numbers  # (B,) real regions of the other images

    def draw(most: Tensor, number: int) -> Tensor:
        return (torch.rand(*at.shape, number, device=mask.device) * most[:, None, None]).long()

    here = draw((numbers - 1).clamp(min=0), here_count + elsewhere_count)
    here = here + (here >= at[..., None]) * (numbers > 1)[:, None, None]
    here = torch.where((numbers > 1)[:, None, None], here, at[..., None]) + start_of_row[:, None, None]
    rank = draw(others, elsewhere_count)
    rank = rank + (rank >= starts[:, None, None]) * numbers[:, None, None]  # the regions of its own image are skipped
    owner = torch.searchsorted(ends, rank, right=True).clamp(max=rows - 1)
    elsewhere = rank - starts[owner] + start_of_row[owner]
    elsewhere = torch.where((others > 0)[:, None, None], elsewhere, here[..., here_count:])
    return torch.cat([elsewhere, here[..., :here_count]], dim=-1)


def _hard_label_loss(
    name: str, logits: Tensor, labels: Tensor, mask: Tensor, weights: Tensor | None, over: Over, count: Tensor | None
) -> Loss:
    mask = mask & (labels != IGNORE)
    labels = labels.masked_fill(~mask, IGNORE)
    values = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(labels)
    if weights is not None:
        values = values * weights.float()
    return _with_hits(average(name, values, mask, over=over, count=count), logits, labels, mask)


def _with_hits(loss: Loss, logits: Tensor, best: Tensor, mask: Tensor) -> Loss:
    """The loss with the share of chosen regions whose highest logit is the `best` one (B, Q)."""
    (name,) = loss.parts
    hits = ((logits.detach().argmax(-1) == best) & mask).sum()
    return loss.reporting({f"{name}_accuracy": (hits, mask.sum())})


def _mask_regions(regions: Regions) -> Tensor:
    """(B, R) bool: real regions of every batch row."""
    return regions.mask if regions.row is None else regions.mask[regions.row]


def _sum_losses(losses: Sequence[Loss], scale: float) -> Loss:
    """Sum of the losses, each times `scale`, with the part `masked_regions` for the whole; its count is that of the
    first."""
    value = torch.stack([loss.value for loss in losses]).sum() * scale
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    terms: dict[str, Term] = {}
    for loss in losses:
        terms.update(loss.scaled(scale).terms or {})
        for name, (total, count) in loss.parts.items():
            parts[name] = (total if name.endswith("_accuracy") else total * scale, count)
    count = next(iter(parts.values()))[1]
    return Loss(value=value, parts={"masked_regions": (value.detach() * count, count), **parts}, terms=terms)
