"""The contracts: what data hands to a model, what a model hands back, what a loss is.

One file although it is long: the contracts refer to one another, and whoever looks for one finds all of them here.

Letters  B batch rows, T tokens, R regions, S region rows, F region feature width, P and Q slots, G rows per example, N
         = B/G examples, Dt Dr Dp widths of text, region and pooled states, C detector classes, A answers, V vocabulary,
         I images, H heads.
Masks    Boolean, True = real. Labels to skip are IGNORE.
Boxes    x1, y1, x2, y2; unit corners inside `Batch`, pixels in `RegionArray`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from visling.head import Head as Head
from visling.head import HeadKind as HeadKind

IGNORE = -100
"""Label that no loss counts."""

_C = TypeVar("_C", bound=type)


class _Movable:
    """What applies one function to every tensor of a nested contract."""

    __slots__ = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `change` applied to every tensor."""

        def visit(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, _Movable):
                return value.map(change)
            if isinstance(value, dict):
                return {key: visit(item) for key, item in value.items()}
            return value

        return dataclasses.replace(self, **{f.name: visit(getattr(self, f.name)) for f in dataclasses.fields(self)})  # type: ignore[arg-type, type-var]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """A copy on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self) -> Self:
        """A copy in page-locked memory, for asynchronous transfer to a GPU."""
        return self.map(lambda tensor: tensor.pin_memory())


def contract(cls: _C) -> _C:
    """Register a frozen dataclass with torch's pytrees; fields marked static are part of the structure, not leaves."""
    static = tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("static"))
    names = tuple(f.name for f in dataclasses.fields(cls) if f.name not in static)

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, name) for name in names], tuple(getattr(value, name) for name in static)

    def unflatten(leaves: Any, context: tuple[Any, ...]) -> Any:
        return cls(**dict(zip(names, leaves, strict=True)), **dict(zip(static, context, strict=True)))

    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"visling.{cls.__name__}")
    return cls


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Slots(_Movable):
    """A fixed number of chosen positions per row."""

    at: Tensor
    """(B, P) int64 positions; 0 where the mask is False."""
    mask: Tensor
    """(B, P) bool, True = a chosen position."""
    taken: Tensor | None = None
    """(K,) int64: the slots with a chosen position, counted row by row (row * P + slot), then free ones up to a rounded
    K; None = all are read."""


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Text(_Movable):
    """Word pieces of each row."""

    ids: Tensor
    """(B, T) int64, 0 = padding."""
    mask: Tensor
    """(B, T) bool."""
    segments: Tensor
    """(B, T) int64 in {0, 1}."""
    answer_at: Tensor | None = None
    """(B,) int64: token whose state answers; None = the first token."""
    task: Tensor | None = None
    """(B,) int64: number of the task, the row of ViLBERT's table of task tokens; None without such a table."""
    row: Tensor | None = None
    """(B,) int64: text row of each batch row when one text meets many images; None = one to one."""
    count: int | None = field(default=None, metadata={"static": True})
    """Positions of all rows that a model computes, at least the real ones, so that shapes repeat and nothing waits for
    the device; None = the real ones, counted by the model."""
    shared: int | None = field(default=None, metadata={"static": True})
    """As `count`, of the batch rows that `row` makes of these."""


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Regions(_Movable):
    """Detector features of each region row; S = B unless several text rows share one image."""

    features: Tensor
    """(S, R, F) half or float; F = 0 where a trained extractor computes them from the batch's pixels."""
    boxes: Tensor
    """(S, R, 4) float32 unit corners."""
    mask: Tensor
    """(S, R) bool; may be all False."""
    size: Tensor
    """(S, 2) float32 image width and height in pixels."""
    row: Tensor | None = None
    """(B,) int64: region row of each text row; None = one to one."""
    whole: Tensor | None = None
    """(S, F) whole-image feature; None = the model averages the real regions."""
    hidden: Tensor | None = None
    """(S, R) bool: the feature was masked; a model may put its own learned vector in its place."""
    image: Tensor | None = None
    """(S, R) int64: which of several images a region belongs to."""
    labels: Tensor | None = None
    """(S, R) int64 detector class."""
    count: int | None = field(default=None, metadata={"static": True})
    """As `Text.count`, of regions."""
    shared: int | None = field(default=None, metadata={"static": True})
    """As `Text.shared`, of regions."""


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels(_Movable):
    """Images for models whose region extractor is trained."""

    images: Tensor
    """(I, 3, H, W) float32, normalised; padded with zeros on the right and below, or laid on a canvas."""
    size: Tensor
    """(I, 2) int64 unpadded height and width."""
    row: Tensor
    """(S,) int64: image of each region row."""
    classes: Tensor | None = None
    """(S, R) int64: class of the object that each region shows, from 1; 0 for the whole image and for no object."""
    masks: Tensor | None = None
    """(S, R, M, M) bool: cells of a grid over each region's box that its object covers; all, where no shape is
    known. Mirrored with the image."""
    corner: Tensor | None = None
    """(I, 2) int64 x and y of the upper left corner of each image in its block; None = 0, 0."""


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(_Movable):
    """Everything a model reads in one step."""

    text: Text
    regions: Regions | None
    """None for text-only corpora."""
    links: Tensor | None = None
    """(B, T, R) bool: token t names region r."""
    phrases: Slots | None = None
    """(B, P): last piece of each phrase to be grounded."""
    pixels: Pixels | None = None
    group: int = field(default=1, metadata={"static": True})
    """G: consecutive rows that belong to one example."""

    def unshared(self) -> Batch:
        """The batch with a text row and a region row for each of its rows, for readers that go through it row by
        row."""
        text, regions, pixels = self.text, self.regions, self.pixels
        if (own := text.row) is not None:
            text = dataclasses.replace(text, row=None, count=text.shared, shared=None)
            text = text.map(lambda tensor: tensor[own])
        if regions is not None and (row := regions.row) is not None:
            regions = dataclasses.replace(regions, row=None, count=regions.shared, shared=None)
            regions = regions.map(lambda tensor: tensor[row])
            if pixels is not None:
                per_row = {name: getattr(pixels, name) for name in ("row", "classes", "masks")}
                pixels = dataclasses.replace(
                    pixels, **{name: value[row] for name, value in per_row.items() if value is not None}
                )
        return dataclasses.replace(self, text=text, regions=regions, pixels=pixels)

    def validate(self) -> None:
        """Raise `ValueError` naming the first broken invariant. Reads values back to the host: for tests and the first
        batch of a run."""
        text, rows = self.text, self.text.ids.shape[0] if self.text.row is None else self.text.row.shape[0]
        _require(
            text.ids.shape == text.mask.shape == text.segments.shape, "text ids, mask and segments differ in shape"
        )
        _require(text.mask.dtype == torch.bool, f"text mask must be boolean; found {text.mask.dtype}")
        _require(bool(text.mask.any(1).all()), "a text row has no real token")
        _require_counts("tokens", text)
        _require(rows % self.group == 0, f"{rows} rows are not a multiple of the group of {self.group}")
        if self.regions is None:
            return
        regions = self.regions
        real = regions.mask
        _require(real.dtype == torch.bool, f"region mask must be boolean; found {real.dtype}")
        _require(regions.features.shape[:2] == real.shape, "region features and mask differ in shape")
        _require(
            regions.boxes.shape == (*real.shape, 4), f"boxes must be (S, R, 4); found {tuple(regions.boxes.shape)}"
        )
        _require(bool((real.int().diff(dim=1) <= 0).all()), "real regions must come before padding")
        _require_counts("regions", regions)
        paired = len(real) if regions.row is None else len(regions.row)
        _require(
            paired == rows,
            f"{paired} region rows meet {rows} text rows; say in regions.row which region row each text row reads",
        )
        boxes = regions.boxes[real]
        _require(
            bool(((boxes >= 0) & (boxes <= 1)).all()), "boxes must be unit corners in [0, 1]; pixels? use boxes.to_unit"
        )
        _require(bool((boxes[:, 2:] > boxes[:, :2]).all()), "a real box has no area")
        if self.pixels is not None:
            pixels = self.pixels
            _require(pixels.images.dtype == torch.float32, f"pixels must be float32; found {pixels.images.dtype}")
            _require(
                pixels.row.shape == (len(real),),
                f"pixels.row names the image of {len(pixels.row)} region rows; found {len(real)}",
            )
            _require(
                bool(((pixels.row >= 0) & (pixels.row < len(pixels.images))).all()),
                "pixels.row names an image that the batch lacks",
            )
            first = torch.zeros_like(pixels.size) if pixels.corner is None else pixels.corner.flip(1)
            last = first + pixels.size
            block = torch.tensor(pixels.images.shape[2:], device=last.device)
            inside = (pixels.size >= 1) & (first >= 0) & (last <= block)
            _require(bool(inside.all()), "the size of an image exceeds the padded pixels")
        if self.links is not None:
            text_real = text.mask if text.row is None else text.mask[text.row]
            region_real = real if regions.row is None else real[regions.row]
            shape = (*text_real.shape, region_real.shape[1])
            _require(self.links.shape == shape, f"links must be (B, T, R) = {shape}; found {tuple(self.links.shape)}")
            _require(not bool((self.links & ~text_real[:, :, None]).any()), "a link starts at a padded token")
            _require(not bool((self.links & ~region_real[:, None, :]).any()), "a link ends at a padded region")


def _require(true: bool, message: str) -> None:
    if not true:
        raise ValueError(f"invalid batch: {message}")


def _require_counts(what: str, part: Text | Regions) -> None:
    for count, mask in ((part.count, part.mask), (part.shared, part.mask if part.row is None else part.mask[part.row])):
        real = int(mask.sum())
        _require(
            count is None or real <= count <= mask.numel(),
            f"a count of {count} {what} for {real} real ones in {mask.numel()} places",
        )


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Maps(_Movable):
    """Attention probabilities, (B, H, from, to) per layer name; single-stream maps are sliced into the same four
    quadrants."""

    text_to_text: dict[str, Tensor]
    text_to_regions: dict[str, Tensor]
    regions_to_text: dict[str, Tensor]
    regions_to_regions: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What a caller reads of `Encoded`. The last layers compute nothing else; other states are zeros."""

    pooled: bool = True
    text: tuple[Slots, ...] | None = None
    """Token positions; None = all."""
    regions: tuple[Slots, ...] | None = None
    """Regions; None = all."""
    whole: bool = True
    """The whole-image state, of models that have one."""

    def __or__(self, other: Reads) -> Reads:
        """What either reads."""
        return Reads(
            pooled=self.pooled or other.pooled,
            text=None if self.text is None or other.text is None else self.text + other.text,
            regions=None if self.regions is None or other.regions is None else self.regions + other.regions,
            whole=self.whole or other.whole,
        )


EVERYTHING = Reads()
NOTHING = Reads(pooled=False, text=(), regions=(), whole=False)
POOLED = Reads(text=(), regions=(), whole=False)


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded(_Movable):
    """What every model returns: all of it, or what a caller reads (`Reads`)."""

    text: Tensor
    """(B, T, Dt)."""
    regions: Tensor
    """(B, R, Dr): only the regions of the batch; R = 0 for text-only rows."""
    pooled: Tensor
    """(B, Dp): the model's own cross-modal summary, fusion and read-out done; (B, 0) where it is not read."""
    whole: Tensor | None = None
    """(B, Dr): a model's global region."""
    maps: Maps | None = None
    """Captured attention; None unless asked for."""
    attention: dict[str, Tensor] | None = None
    """The same attention as it was computed, in that order, for what follows its gradient: "LAYER/joint" (B, H, T + R,
    T + R), "LAYER/text", "LAYER/regions", "LAYER/text_to_regions" and "LAYER/regions_to_text"; where rows share no text
    and no image, these tensors are part of the graph. None unless asked for."""
    states: dict[str, Tensor] | None = None
    """Captured hidden states by layer name; None unless asked for. Those before the first layer ("embeddings", or
    "text_embeddings" and "region_embeddings") are part of the graph, as the attention is."""


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Targets(_Movable):
    """Labels of a batch; any subset. Objectives and tasks declare the names they need."""

    token_slots: Slots | None = None
    token_ids: Tensor | None = None
    """(B, P) int64 original ids at the token slots."""
    class_slots: Slots | None = None
    feature_slots: Slots | None = None
    region_probs: Tensor | None = None
    """(B, Q, C) detector distribution."""
    region_classes: Tensor | None = None
    """(B, Q) int64."""
    region_attributes: Tensor | None = None
    """(B, Q) int64."""
    region_weights: Tensor | None = None
    """(B, Q) detector confidence."""
    attribute_weights: Tensor | None = None
    """(B, Q)."""
    region_features: Tensor | None = None
    """(B, R, F) unmasked features."""
    matched: Tensor | None = None
    """(B,) int64: 1 = the text fits the image, IGNORE = no label."""
    answer: Tensor | None = None
    """(N,) int64, or (N, A) soft scores."""
    choice: Tensor | None = None
    """(N,) int64."""
    region_scores: Tensor | None = None
    """(B, R) or (B, R+1) referring targets."""
    phrase_boxes: Tensor | None = None
    """(B, P, R) grounding shares, may be all zero."""
    object_classes: Tensor | None = None
    """(B, R) or (B, R+1)."""


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One average of a loss as its sum and its count, so that it can be taken over several batches together."""

    total: Tensor
    """Scalar sum, with its graph."""
    count: Tensor
    """Scalar, detached: what the sum is divided by. It depends on the targets alone."""
    weight: float = field(default=1.0, metadata={"static": True})
    """Factor of the average in the loss."""
    added: float = field(default=0.0, metadata={"static": True})
    """Added to the count before the division."""

    def over(self, count: Tensor) -> Tensor:
        """The weighted sum divided by a count, at least 1, which may be that of several batches together."""
        divisor = (count + self.added).clamp(min=1).to(self.total.dtype)
        return self.total / divisor * self.weight

    def scaled(self, weight: float) -> Term:
        """The same average, its weight times `weight`."""
        return Term(total=self.total, count=self.count, weight=self.weight * weight, added=self.added)


@contract
@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A value to minimise, and what it consists of: as terms, so that its average over steps and processes is exact,
    and as parts for the log."""

    value: Tensor
    """Scalar: the sum of the terms, each over its own count."""
    parts: Mapping[str, tuple[Tensor, Tensor]]
    """Name -> (sum, count), both scalar tensors, detached."""
    terms: Mapping[str, Term] | None = None
    """Name -> average; None = not known, and the loss can only be averaged by its values."""

    @staticmethod
    def mean(name: str, values: Tensor, mask: Tensor | None = None) -> Loss:
        """Mean of `values` where `mask` holds; exactly zero (with a gradient of zero) where nothing is chosen."""
        if mask is not None:
            assert mask.shape == values.shape, (
                f"{name}: mask {tuple(mask.shape)} and values {tuple(values.shape)} differ in shape"
            )
            values = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
            count = mask.sum()
        else:
            count = torch.full((), values.numel(), device=values.device)  # filled there: no copy from the host
        return Loss.ratio(name, values.sum(), count)

    @staticmethod
    def ratio(name: str, total: Tensor, count: Tensor, *, added: float = 0.0) -> Loss:
        """A sum divided by a count, at least 1.

        Args:
            added: added to the count before the division.
        """
        return Loss(
            value=total / (count + added if added else count.clamp(min=1)),
            parts={name: (total.detach(), count)},
            terms={name: Term(total=total, count=count, added=added)},
        )

    def __add__(self, other: Loss) -> Loss:
        """Sum of values, union of terms and of parts, whose names must differ."""
        clash = self.parts.keys() & other.parts.keys()
        assert not clash, f"two losses report the same parts: {sorted(clash)}"
        terms = None if self.terms is None or other.terms is None else {**self.terms, **other.terms}
        return Loss(value=self.value + other.value, parts={**self.parts, **other.parts}, terms=terms)

    def scaled(self, weight: float) -> Loss:
        """The same parts, the value times `weight`."""
        terms = None if self.terms is None else {name: term.scaled(weight) for name, term in self.terms.items()}
        return Loss(value=self.value * weight, parts=self.parts, terms=terms)

    def reporting(self, parts: Mapping[str, tuple[Tensor, Tensor]]) -> Loss:
        """The same loss with further parts, such as the share of right answers."""
        return Loss(value=self.value, parts={**self.parts, **parts}, terms=self.terms)

    def prefixed(self, prefix: str) -> Loss:
        """The same loss, with `prefix` before the names of its terms and parts."""
        return Loss(
            value=self.value,
            parts={f"{prefix}{name}": part for name, part in self.parts.items()},
            terms=None if self.terms is None else {f"{prefix}{name}": term for name, term in self.terms.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionArray:
    """Regions of one image as they lie in a store: numpy views, boxes in pixels."""

    features: NDArray[Any]
    """(R, F) float16 or float32."""
    boxes: NDArray[np.float32]
    """(R, 4) pixel corners of the original image."""
    size: tuple[int, int]
    """Image width and height in pixels."""
    classes: NDArray[Any] | None = None
    """(R,) detector class, 0-based, background excluded."""
    class_confidence: NDArray[Any] | None = None
    attributes: NDArray[Any] | None = None
    """(R,) or (R, K) attribute ids (K heads), -1 = none."""
    attribute_confidence: NDArray[Any] | None = None
    probs: NDArray[Any] | None = None
    """(R, C) class distribution."""

    def __len__(self) -> int:
        return int(self.features.shape[0])

    def join(self, other: RegionArray) -> RegionArray:
        """These regions and, behind them, others of the same image with the same fields."""
        arrays: dict[str, Any] = {
            field.name: np.concatenate([value, getattr(other, field.name)])
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        return dataclasses.replace(self, **arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionObjects:
    """What an annotation says of the objects that the regions of an image show."""

    classes: NDArray[np.int64]
    """(R,) as `Pixels.classes`."""
    masks: NDArray[np.bool_]
    """(R, M, M) as `Pixels.masks`, row y, column x; not mirrored."""


class FeatureExtractor(Protocol):
    """A module that computes the regions' features from the pixels of a batch, and is trained with the encoder."""

    def describe(self, regions: Regions, pixels: Pixels) -> tuple[Regions, Loss | None]:
        """The regions with `features` and `whole` computed from the pixels; and a loss of the extractor's own, which is
        added to that of the run, if it has one.

        Boxes are unit corners of the unpadded picture. `pixels.classes` and `pixels.masks` are None unless the task
        knows its objects.
        """
        ...

    def count(self, regions: Regions) -> Mapping[str, Tensor]:
        """What the terms of its own loss divide by, by name; empty without one."""
        ...


@runtime_checkable
class RegionStore(Protocol):
    """Regions by image id, in constant time."""

    feature_size: int
    fingerprint: str
    """Identity of the detector and settings that computed the features; a checkpoint remembers it."""

    def __contains__(self, image_id: str) -> bool: ...
    def __getitem__(self, image_id: str) -> RegionArray: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """What every picture of a batch is laid on, where a region extractor reads pictures of one size."""

    width: int
    height: int
    """Pixels."""
    colour: tuple[float, float, float]
    """Of what the picture leaves free, normalised as the picture is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskGrid:
    """How the outline of an object becomes a mask: where in its box the cells lie that are asked for."""

    size: int
    """M: cells along each side."""
    inclusive: bool
    """Whether a box ends on its last pixels and cells start at its corner, what lies beyond clamped to it (VL-BERT), or
    the cells' centres are spread evenly over the box (VisualBERT, after R2C)."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One annotation as read from a file; subclasses add the fields of their data set."""

    id: str
    """Unique within its split."""
    images: tuple[str, ...]
    """Canonical image ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """Word pieces of one row, laid out with special tokens by `data.text.TextLayout`."""

    ids: NDArray[np.int64]
    """(T,)."""
    segments: NDArray[np.int64]
    """(T,)."""
    answer_at: int | None = None
    """Position of the answer token, if the model reads its answer there."""
    words: NDArray[np.int64] | None = None
    """(T,) word number of each piece, -1 for special tokens; for whole-word masking."""
    links: tuple[tuple[int, int], ...] = ()
    """(token, region) pairs; (token, object) pairs where `Example.linked_regions` says which regions those are."""
    phrases: tuple[int, ...] = ()
    """Token positions to be grounded."""
    task: int | None = None
    """Number of the task, for models with task tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example without tensors: G text rows, the images they refer to, and labels by `Targets` name."""

    id: str
    rows: tuple[TextRow, ...]
    images: tuple[str, ...]
    """One id shared by all rows, or one per row, or (pair = "sequence") the images joined in the single row."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """`Targets` field name -> int, float or array: `matched`, `answer`, `choice`, ..."""
    mirrored_labels: Mapping[str, Any] = field(default_factory=dict)
    """Labels in place of those of the same name where the image is mirrored and left and right are exchanged."""
    region_labels: Callable[[Sequence[RegionArray]], Mapping[str, Any]] | None = None
    """Further labels, computed from the regions: called with those of each of `images` that the model sees, in the
    order in which it sees them and with boxes in pixels of the stored image; a batch without regions leaves it out.
    Labels of rows (`region_scores`, ...) are of one row, or G values where an example has G rows."""
    chosen_regions: Callable[[RegionArray], NDArray[np.int64]] | None = None
    """Where not all regions are shown: called with the regions of the only image, in the order of the preset and cut to
    its number; returns the numbers of those that are, in the order in which they are."""
    linked_regions: Callable[[RegionArray], NDArray[np.int64]] | None = None
    """For rows whose links name objects of an annotation: called, as `region_labels` is, with the regions of the only
    image; returns (objects,) the region of each, -1 where there is none."""
    region_objects: Callable[[RegionArray, MaskGrid], RegionObjects] | None = None
    """For a trained region extractor: called, as `linked_regions` is, with the regions of the only image, and with how
    the masks are drawn that the extractor reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a task predicts for one example."""

    id: str
    value: Any
    """The answer itself: a string, a box, a choice."""
    confidence: float
    """Probability of `value` under the model, in [0, 1]."""
    top: tuple[tuple[str, float], ...] = ()
    """Best candidates with probabilities, best first."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Of each of `top`, where the task chooses regions: pixel corners in the stored image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Widths of a model's outputs."""

    text: int
    regions: int
    pooled: int


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What collate must deliver for a model preset."""

    vocabulary: str = "bert-base-uncased"
    """WordPiece vocabulary: a name shipped with the package or a path to a vocab.txt."""
    feature_size: int = 2048
    """Width F of the region features in the store."""
    max_tokens: int = 128
    """Longest text row, special tokens included; longer ones are cut as the release cuts them, counted and reported."""
    max_regions: int = 100
    """Regions used per image; the first ones in `region_order`."""
    region_order: Literal["store", "confidence"] = "store"
    """As the store has them, or the most confident first (VL-BERT pre-training)."""
    joint_limit: int | None = None
    """Most text plus region positions (VL-BERT pre-training: 64)."""
    answer_slot: Literal["none", "same_segment", "second_segment"] = "none"
    """Whether questions end in a [MASK] whose state answers, and in which segment it stands."""
    pair: Literal["rows", "sequence"] = "rows"
    """Two images: two rows joined by the head, or one row with regions typed 0 and 1."""
    num_tasks: int = 0
    """Tasks for which the model has a token of their own; above 0 every text names its task (`Text.task`), and the
    vectors are the encoder's `tasks`."""
