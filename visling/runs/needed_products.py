"""Which matrix products a batch needs, in operations, computed from lengths and settings: what `count_products` should
count if nothing is computed for padding, and nothing that nobody reads.

Needed   A layer multiplies every real position with its weights, and every real query with every real key. The last
         layers do so for those positions alone whose states somebody reads: the summary, chosen slots, or all. What is
         computed of a text or an image before both meet is needed once, however many rows share it.
Counted  Two operations for each multiplication and addition; products only. Backward takes two products for each of the
         forward pass: one for the gradient of the weights, one for that of the states, which inputs do not have.
Letters  B batch rows, U text rows, S region rows, D F I widths of states, features and feed-forward blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from visling.models.base import Encoder
from visling.models.cvlp import KeyNetwork
from visling.models.lxmert import LxmertConfig
from visling.models.task_model import TaskModel
from visling.models.vilbert import VilbertConfig
from visling.models.vilbert_baseline import VilbertBaselineConfig
from visling.models.visualbert import VisualBertConfig
from visling.models.vlbert import VlBertConfig
from visling.nn.head_blocks import RegionTargets
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import MaskedRegions
from visling.objectives.pretrain_model import PretrainModel
from visling.objectives.region_contrast import RegionContrast
from visling.types import Batch, Slots, Targets

Counts = NDArray[np.int64]
"""A number of positions for each row."""


@dataclass(frozen=True, kw_only=True)
class Products:
    """Operations of matrix products."""

    linear: int = 0
    """Of states with weights."""
    attention: int = 0
    """Of queries with keys, and of probabilities with values."""

    def __add__(self, other: Products) -> Products:
        return Products(linear=self.linear + other.linear, attention=self.attention + other.attention)

    def times(self, factor: int) -> Products:
        """So many times as much."""
        return Products(linear=self.linear * factor, attention=self.attention * factor)

    @property
    def total(self) -> int:
        """Both kinds."""
        return self.linear + self.attention


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Products of a forward and of a backward pass."""

    forward: Products = field(default_factory=Products)
    backward: Products = field(default_factory=Products)

    def __add__(self, other: Needed) -> Needed:
        return Needed(forward=self.forward + other.forward, backward=self.backward + other.backward)

    @property
    def step(self) -> Products:
        """Forward and backward."""
        return self.forward + self.backward

    def without_gradient(self) -> Needed:
        """The forward pass alone."""
        return Needed(forward=self.forward)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Whose states are read of each of (B) rows, in addition to the summary."""

    summary: bool = True
    """The pooled state."""
    tokens: Counts | None = None
    """Other tokens than that of the summary; None = none."""
    regions: Counts | None = None
    """Regions, the whole image among them if the family has one and it is read beside its part in the summary; None =
    none."""


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """Real positions."""

    tokens: Counts
    """(U,)."""
    regions: Counts
    """(S,)."""
    text_row: Counts
    """(B,) text row of each batch row."""
    region_row: Counts
    """(B,)."""
    images: bool
    """Whether the batch has images, be it without regions."""
    answer_slot: bool
    """Whether the state of a token is the summary as it is."""
    hidden: bool
    """Whether a learned vector takes the place of hidden features."""

    @classmethod
    def of(cls, batch: Batch) -> _Lengths:
        text, regions = batch.text, batch.regions
        tokens = _count(text.mask)
        text_row = np.arange(len(tokens)) if text.row is None else text.row.numpy()
        found = np.zeros(len(text_row), np.int64) if regions is None else _count(regions.mask)
        own = regions is None or regions.row is None
        return cls(
            tokens=tokens,
            regions=found,
            text_row=text_row,
            region_row=np.arange(len(found)) if own or regions is None or regions.row is None else regions.row.numpy(),
            images=regions is not None,
            answer_slot=text.answer_at is not None,
            hidden=regions is not None and regions.hidden is not None,
        )

    @property
    def rows(self) -> int:
        """B."""
        return len(self.text_row)

    @property
    def text(self) -> Counts:
        """(B,) tokens."""
        return self.tokens[self.text_row]

    @property
    def shown(self) -> Counts:
        """(B,) regions."""
        return self.regions[self.region_row]


def pretraining_products(model: PretrainModel, batch: Batch, targets: Targets) -> Needed:
    """What one step of pre-training needs; the weights of the heads are read off the model.

    Raises:
        NotImplementedError: features that an extractor computes are not counted.
    """
    if model.extractor is not None:
        raise NotImplementedError("products of a trained region extractor are not counted")
    objectives = dict(model.objectives.items())
    rows = _Lengths.of(batch).rows
    tokens = regions = None
    if "masked_lm" in objectives and targets.token_slots is not None:
        tokens = _count(targets.token_slots.mask)
    if "masked_regions" in objectives and batch.regions is not None:
        predicted = [slots for slots in (targets.class_slots, targets.feature_slots) if slots is not None]
        regions = _count_any(predicted, (rows, batch.regions.mask.shape[1]))
    if "region_contrast" in objectives and batch.regions is not None:
        regions = _Lengths.of(batch).shown
    summary = bool(objectives.keys() & {"matching", "image_qa"})
    reading = Reading(summary=summary, tokens=tokens, regions=regions)
    encoder = cast(Encoder, model.encoder)
    needed = encoder_products(encoder.config, batch, reading)
    for objective in objectives.values():
        if isinstance(objective, MaskedLM):
            words = 0 if tokens is None else int(tokens.sum())
            outputs, size = encoder.word_embeddings.weight.shape
            needed += _head(objective.head, words) + _weights(words, size, outputs)
        elif isinstance(objective, MaskedRegions):
            needed += _region_targets(objective, targets, 0 if regions is None else int(regions.sum()))
        elif isinstance(objective, RegionContrast):
            needed += _region_contrast(objective, batch)
        else:
            needed += _head(objective.get_submodule("head"), rows)
    return needed


def task_products(model: TaskModel, batch: Batch) -> Needed:
    """What the logits of a batch need, and their gradient.

    Raises:
        NotImplementedError: features that an extractor computes are not counted.
    """
    if model.extractor is not None:
        raise NotImplementedError("products of a trained region extractor are not counted")
    lengths, config = _Lengths.of(batch), model.encoder.config
    summary, tokens, regions, heads = False, None, None, Needed()
    for name, head in model.heads.items():
        kind = model.kinds[name]
        if kind in ("classify", "score", "pair"):
            summary = True
            heads += _head(head, lengths.rows // batch.group if kind == "pair" else lengths.rows)
        elif kind == "slots_regions":
            tokens = lengths.text if batch.phrases is None else _count(batch.phrases.mask)
            regions = lengths.shown
            query, key = head.get_submodule("query"), head.get_submodule("key")
            heads += _head(query, int(tokens.sum())) + _head(key, int(regions.sum()))
            size = next(query.parameters()).shape[0]
            heads += _with_gradient(_attend(tokens, regions, size, products=1))
        else:
            regions = lengths.shown + isinstance(config, _WITH_WHOLE_IMAGE)
            heads += _head(head, int(regions.sum()))
    return encoder_products(config, batch, Reading(summary=summary, tokens=tokens, regions=regions)) + heads


def encoder_products(config: Any, batch: Batch, reading: Reading) -> Needed:
    """What the states that are read of a batch need.

    Args:
        config: of the family.
    Raises:
        NotImplementedError: a family of another package.
    """
    lengths = _Lengths.of(batch)
    for kind, family in _FAMILIES.items():
        if isinstance(config, kind):
            return family(config, lengths, reading)
    raise NotImplementedError(f"the products of {type(config).__name__} are not known here")


def _visualbert(config: VisualBertConfig, lengths: _Lengths, reading: Reading) -> Needed:
    text, shown = lengths.text, lengths.shown
    width, read = config.hidden_size, _read(lengths, reading)
    needed = _features(config, lengths, config.feature_size + (6 if config.append_spatial else 0), width)
    if config.bypass:
        needed += _stream(config, config.num_layers, text, text)
        needed += _layer(config, read, text + shown)
    else:
        needed += _stream(config, config.num_layers, text + shown, read)
    pooler = 0 if lengths.answer_slot or not reading.summary else lengths.rows
    return needed + _weights(pooler, width, width)


def _vlbert(config: VlBertConfig, lengths: _Lengths, reading: Reading) -> Needed:
    width, visual = config.hidden_size, config.visual_size
    whole = 1 if lengths.images else 0
    length = lengths.text + lengths.shown + whole + 1  # [END]
    needed = Needed()
    if lengths.images:
        # The gradient of the vector that stands for hidden features goes through their projection.
        learned, size = lengths.hidden and config.masks_features, 8 * config.coordinate_size + config.feature_size
        needed += _features(config, lengths, size, visual, whole=whole, learned=learned)
    if visual != width:
        needed += _weights(
            int(lengths.regions.sum() + lengths.text.sum()) + whole * len(lengths.regions), visual, width
        )
    needed += _stream(config, config.num_layers, length, _read(lengths, reading))
    pooler = 0 if lengths.answer_slot or not reading.summary else lengths.rows
    return needed + _weights(pooler, width, width)


def _vilbert_baseline(config: VilbertBaselineConfig, lengths: _Lengths, reading: Reading) -> Needed:
    width = config.hidden_size
    needed = _features(config, lengths, config.feature_size + 5, width, whole=1)
    needed += _stream(config, config.num_layers, lengths.text + lengths.shown + 1, _read(lengths, reading))
    return needed + _weights(lengths.rows if reading.summary else 0, width, width)


def _vilbert(config: VilbertConfig, lengths: _Lengths, reading: Reading) -> Needed:
    regions = _RegionStream(config.region_hidden_size, config.region_intermediate_size)
    task = 1 if config.num_tasks else 0
    text, shown = lengths.text + task, lengths.shown + 1  # the whole image
    needed = _features(config, lengths, config.feature_size + 5, config.region_hidden_size, whole=1)
    if reading.summary:
        needed += _weights(lengths.rows, config.hidden_size, config.pooled_size)
        needed += _weights(lengths.rows, config.region_hidden_size, config.pooled_size)
    # From the last layer to the first: a layer runs for what is read of it, and reads everything before it.
    read_text = _read_text(lengths, reading)
    read_regions = _or_none(reading.regions, lengths.rows) + reading.summary
    layers, region_layers = config.num_layers, config.num_region_layers
    for before, region_before in zip(
        reversed(config.text_layers_before), reversed(config.region_layers_before), strict=True
    ):
        needed += _stream(config, layers - before, text, read_text)
        needed += _gates(config, lengths, region_layers - region_before)
        needed += _stream(regions, region_layers - region_before, shown, read_regions)
        read_text = text if layers > before and read_text.any() else read_text
        read_regions = shown if region_layers > region_before and read_regions.any() else read_regions
        needed += _co_attention(config, text, shown, read_text, read_regions)
        some_text, some_regions = read_text.any(), read_regions.any()
        read_text = text if some_regions else read_text
        read_regions = shown if some_text else read_regions
        layers, region_layers = before, region_before
    needed += _stream(config, layers, lengths.tokens + task, lengths.tokens + task)
    return needed + _stream(regions, region_layers, lengths.regions + 1, lengths.regions + 1)


def _lxmert(config: LxmertConfig, lengths: _Lengths, reading: Reading) -> Needed:
    counts = (config.num_text_layers, config.num_region_layers, config.num_cross_layers)
    return _lxmert_layers(config, counts, lengths, reading)


def _lxmert_layers(config: LxmertConfig, counts: tuple[int, int, int], lengths: _Lengths, reading: Reading) -> Needed:
    """LXMERT with so many text, region and cross-modality layers."""
    width, text, shown = config.hidden_size, lengths.text, lengths.shown
    num_text, num_regions, num_cross = counts
    needed = _features(config, lengths, config.feature_size + 4, width)
    needed += _stream(config, num_text, lengths.tokens, lengths.tokens)
    needed += _stream(config, num_regions, lengths.regions, lengths.regions)
    for _ in range(num_cross - 1):
        needed += _cross_layer(config, text, shown, text, shown)
    read_regions = _or_none(reading.regions, lengths.rows)
    needed += _cross_layer(config, text, shown, _read_text(lengths, reading), read_regions)
    return needed + _weights(lengths.rows if reading.summary else 0, width, width)


_FAMILIES: Mapping[type, Callable[[Any, _Lengths, Reading], Needed]] = {
    VisualBertConfig: _visualbert,
    VlBertConfig: _vlbert,
    VilbertConfig: _vilbert,
    VilbertBaselineConfig: _vilbert_baseline,
    LxmertConfig: _lxmert,  # and CVLP, whose config is one of LXMERT
}
_WITH_WHOLE_IMAGE = (VlBertConfig, VilbertBaselineConfig, VilbertConfig)
"""Families in which a region stands for the whole image."""


@dataclass(frozen=True)
class _RegionStream:
    """Widths of ViLBERT's region stream under the names of a config."""

    hidden_size: int
    intermediate_size: int


def _features(
    config: Any, lengths: _Lengths, inputs_size: int, width: int, *, whole: int = 0, learned: bool = False
) -> Needed:
    """Projection of region features, with boxes, to the width of the states.

    Args:
        whole: images that are projected whole in addition to the regions of each.
        learned: a learned vector is among what is projected, which has a gradient.
    """
    regions = int(lengths.regions.sum())
    needed = _weights(regions + whole * len(lengths.regions), inputs_size, width)
    if not learned:
        needed = Needed(forward=needed.forward, backward=needed.forward)
    if getattr(config, "whiten_features", False):
        needed += _weights(regions, config.feature_size, config.feature_size).without_gradient()
    return needed


def _stream(sizes: Any, number: int, length: Counts, read: Counts) -> Needed:
    """So many layers of one stream, the last of them for `read` (B,) of `length` (B,) positions."""
    if not number or not read.any():
        return Needed()
    needed = Needed()
    for _ in range(number - 1):
        needed += _layer(sizes, length, length)
    return needed + _layer(sizes, read, length)


def _layer(sizes: Any, read: Counts, length: Counts) -> Needed:
    """A Transformer layer for `read` of `length` positions."""
    width, inner, number = sizes.hidden_size, sizes.intermediate_size, int(read.sum())
    needed = _attention_block(width, width, width, read, length)
    return needed + _weights(number, width, inner) + _weights(number, inner, width)


def _attention_block(width: int, context: int, attention: int, queries: Counts, keys: Counts) -> Needed:
    """Queries, keys, values, their attention and the output projection."""
    number, read = int(queries.sum()), int(keys.sum())
    needed = _weights(number, width, attention) + _weights(number, attention, width)
    needed += _weights(2 * read, context, attention)
    return needed + _with_gradient(_attend(queries, keys, attention))


def _cross_layer(config: LxmertConfig, text: Counts, shown: Counts, read_text: Counts, read_regions: Counts) -> Needed:
    """LXMERT's layer: a stream reads the other and then all of itself; one that nobody reads is left out."""
    needed, width = Needed(), config.hidden_size
    for own, other, read in ((text, shown, read_text), (shown, text, read_regions)):
        if read.any():
            needed += _attention_block(width, width, width, own, other) + _layer(config, read, own)
    return needed


def _co_attention(
    config: VilbertConfig, text: Counts, shown: Counts, read_text: Counts, read_regions: Counts
) -> Needed:
    """ViLBERT's layer: each stream reads the other, then goes through its feed-forward block."""
    needed = Needed()
    streams = (
        (config.hidden_size, config.intermediate_size, read_text, config.region_hidden_size, shown),
        (config.region_hidden_size, config.region_intermediate_size, read_regions, config.hidden_size, text),
    )
    for width, inner, read, context, keys in streams:
        if read.any():
            needed += _attention_block(width, context, config.co_attention_size, read, keys)
            needed += _weights(int(read.sum()), width, inner) + _weights(int(read.sum()), inner, width)
    return needed


def _gates(config: VilbertConfig, lengths: _Lengths, number: int) -> Needed:
    """The text's gates of the attention among regions in so many layers, where a model has them."""
    rows = 2 * number * lengths.rows if config.gated_regions else 0
    return _weights(rows, config.hidden_size, config.region_hidden_size)


def _region_contrast(objective: RegionContrast, batch: Batch) -> Needed:
    """CVLP's own: the head, the key network with its head, and the scores against the queue, of every real region."""
    lengths = _Lengths.of(batch)
    number = int(lengths.shown.sum())
    needed = _head(objective.head, number) + _head(objective.key_head.network, number).without_gradient()
    queued, size = objective.queue.rows.shape
    # The gradient is summed up along with the scores.
    needed += _weights(2 * number, size, queued).without_gradient()
    network = objective.key.network
    reading = Reading(summary=False, regions=lengths.shown)
    if isinstance(network, KeyNetwork):
        config: Any = network.lxmert.config
        return needed + _lxmert_layers(config, _count_key_layers(network), lengths, reading).without_gradient()
    config = network.config
    return needed + encoder_products(config, batch, reading).without_gradient()


def _count_key_layers(network: KeyNetwork) -> tuple[int, int, int]:
    """Text, region and cross-modality layers that run on the typical path of the key network
    (`KeyNetwork.use_typical_path`)."""
    left_out = [stream for number, (stream, _) in enumerate(network.pairs) if number % 2]
    config = network.lxmert.config
    return (
        config.num_text_layers - left_out.count("text_layers"),
        config.num_region_layers - left_out.count("region_layers"),
        config.num_cross_layers - left_out.count("cross_layers"),
    )


def _head(head: nn.Module, positions: int) -> Needed:
    """A head multiplies each state that it reads once with each of its matrices."""
    needed = Needed()
    for matrix in head.parameters():
        if matrix.dim() == 2:
            needed += _weights(positions, matrix.shape[1], matrix.shape[0])
    return needed


def _region_targets(objective: MaskedRegions, targets: Targets, positions: int) -> Needed:
    """One transform of every region that is read, then each output at its own slots."""
    head = objective.head
    assert isinstance(head, RegionTargets)
    needed = _head(head.transform, positions)
    for name, output in head.outputs.items():
        slots = targets.feature_slots if name == "features" else targets.class_slots
        needed += _head(output, 0 if slots is None else int(slots.mask.sum()))
    return needed


def _weights(positions: int, inputs: int, outputs: int) -> Needed:
    """States with one matrix, forward and backward."""
    return _with_gradient(Products(linear=2 * positions * inputs * outputs))


def _attend(queries: Counts, keys: Counts, width: int, *, products: int = 2) -> Products:
    """Products of all queries of a row with all its keys, as wide as all heads together."""
    return Products(attention=2 * products * width * int((queries * keys).sum()))


def _with_gradient(products: Products) -> Needed:
    """Backward takes two products for each."""
    return Needed(forward=products, backward=products.times(2))


def _read(lengths: _Lengths, reading: Reading) -> Counts:
    """(B,) positions of a single stream that are read."""
    return _read_text(lengths, reading) + _or_none(reading.regions, lengths.rows)


def _read_text(lengths: _Lengths, reading: Reading) -> Counts:
    """(B,) tokens that are read."""
    return _or_none(reading.tokens, lengths.rows) + reading.summary


def _or_none(counts: Counts | None, rows: int) -> Counts:
    return np.zeros(rows, np.int64) if counts is None else counts


def _count(mask: Tensor) -> Counts:
    found: Counts = mask.sum(1).cpu().numpy()
    return found


def _count_any(choices: Sequence[Slots], shape: tuple[int, int]) -> Counts:
    """(B,) positions of (B, N) that at least one of several choices names."""
    named = np.zeros(shape, bool)
    for slots in choices:
        rows, places = np.nonzero(slots.mask.cpu().numpy())
        named[rows, slots.at.cpu().numpy()[rows, places]] = True
    found: Counts = named.sum(1)
    return found
