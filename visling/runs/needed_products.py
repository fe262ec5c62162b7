"""Which matrix products a batch needs, in operations, computed from lengths and settings: what `count_products` should
count if nothing is computed for padding, and nothing that nobody reads.

Needed   A layer multiplies every real position with its weights, and every real query with every real key. The last
         layers do so for those positions alone whose states somebody reads: the summary, chosen slots, or all. What is
         computed of a text or an image before both meet is needed once, however many rows share it.
Counted  As `layer_products` has it.
Letters  B batch rows, U text rows, S region rows, D F I widths of states, features and feed-forward blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
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
from visling.runs.layer_products import (
    Counts,
    Needed,
    Products,
    attend,
    attention_block,
    feed_forward,
    head_products,
    layer,
    stream,
    weights,
    with_gradient,
)
from visling.types import Batch, Slots, Targets


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


def are_known(config: Any, extractor: nn.Module | None = None) -> bool:
    """Whether the functions below can say what a model needs.

    Args:
        config: of its encoder.
        extractor: what computes its region features, if that is trained jointly.
    """
    return extractor is None and isinstance(config, tuple(_FAMILIES))


def pretraining_products(
    model: PretrainModel, batch: Batch, targets: Targets, *, only: Collection[str] | None = None
) -> Needed:
    """What one step of pre-training needs; the weights of the heads are read off the model.

    Args:
        only: names of the objectives that are computed; None = all.
    Raises:
        NotImplementedError: features that an extractor computes are not counted.
    """
    if model.extractor is not None:
        raise NotImplementedError("products of a trained region extractor are not counted")
    objectives = {name: part for name, part in model.objectives.items() if only is None or name in only}
    lengths = _Lengths.of(batch)
    rows, tokens, regions = lengths.rows, None, None
    if "masked_lm" in objectives and targets.token_slots is not None:
        tokens = _count(targets.token_slots.mask)
    if "masked_regions" in objectives and batch.regions is not None:
        predicted = [slots for slots in (targets.class_slots, targets.feature_slots) if slots is not None]
        regions = _count_any(predicted, (rows, batch.regions.mask.shape[1]))
    if "region_contrast" in objectives and batch.regions is not None:
        regions = lengths.shown
    summary = bool(objectives.keys() & {"matching", "image_qa"})
    reading = Reading(summary=summary, tokens=tokens, regions=regions)
    encoder = cast(Encoder, model.encoder)
    needed = _encode(encoder.config, lengths, reading)
    for objective in objectives.values():
        if isinstance(objective, MaskedLM):
            words = 0 if tokens is None else int(tokens.sum())
            outputs, size = encoder.word_embeddings.weight.shape
            needed += head_products(objective.head, words) + weights(words, size, outputs)
        elif isinstance(objective, MaskedRegions):
            needed += _region_targets(objective, targets, 0 if regions is None else int(regions.sum()))
        elif isinstance(objective, RegionContrast):
            needed += _region_contrast(objective, lengths)
        else:
            needed += head_products(objective.get_submodule("head"), rows)
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
            heads += head_products(head, lengths.rows // batch.group if kind == "pair" else lengths.rows)
        elif kind == "slots_regions":
            tokens = lengths.text if batch.phrases is None else _count(batch.phrases.mask)
            regions = lengths.shown
            query, key = head.get_submodule("query"), head.get_submodule("key")
            heads += head_products(query, int(tokens.sum())) + head_products(key, int(regions.sum()))
            size = next(query.parameters()).shape[0]
            heads += with_gradient(attend(tokens, regions, size, products=1))
        else:
            regions = lengths.shown + isinstance(config, _WITH_WHOLE_IMAGE)
            heads += head_products(head, int(regions.sum()))
    return _encode(config, lengths, Reading(summary=summary, tokens=tokens, regions=regions)) + heads


def count_for_task(model: TaskModel) -> Callable[[tuple[Batch, Any]], float] | None:
    """What the engine asks of a batch with its targets: operations of a micro-step; None where they are not known."""
    if not are_known(model.encoder.config, model.extractor):
        return None
    return lambda pair: task_products(model, pair[0]).step.total


def encoder_products(config: Any, batch: Batch, reading: Reading) -> Needed:
    """What the states that are read of a batch need.

    Args:
        config: of the family.
    Raises:
        NotImplementedError: a family of another package.
    """
    return _encode(config, _Lengths.of(batch), reading)


def _encode(config: Any, lengths: _Lengths, reading: Reading) -> Needed:
    """`encoder_products` of a batch with these lengths."""
    for kind, family in _FAMILIES.items():
        if isinstance(config, kind):
            return family(config, lengths, reading)
    raise NotImplementedError(f"the products of {type(config).__name__} are not known here")


def _visualbert(config: VisualBertConfig, lengths: _Lengths, reading: Reading) -> Needed:
    text, shown = lengths.text, lengths.shown
    width, read = config.hidden_size, _read(lengths, reading)
    needed = _features(config, lengths, config.feature_size + (6 if config.append_spatial else 0), width)
    if config.bypass:
        needed += stream(config, config.num_layers, text, text)
        needed += with_gradient(layer(config, read, text + shown))
    else:
        needed += stream(config, config.num_layers, text + shown, read)
    pooler = 0 if lengths.answer_slot or not reading.summary else lengths.rows
    return needed + weights(pooler, width, width)


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
        needed += weights(int(lengths.regions.sum() + lengths.text.sum()) + whole * len(lengths.regions), visual, width)
    needed += stream(config, config.num_layers, length, _read(lengths, reading))
    pooler = 0 if lengths.answer_slot or not reading.summary else lengths.rows
    return needed + weights(pooler, width, width)


def _vilbert_baseline(config: VilbertBaselineConfig, lengths: _Lengths, reading: Reading) -> Needed:
    width = config.hidden_size
    needed = _features(config, lengths, config.feature_size + 5, width, whole=1)
    needed += stream(config, config.num_layers, lengths.text + lengths.shown + 1, _read(lengths, reading))
    return needed + weights(lengths.rows if reading.summary else 0, width, width)


def _vilbert(config: VilbertConfig, lengths: _Lengths, reading: Reading) -> Needed:
    regions = _RegionStream(config.region_hidden_size, config.region_intermediate_size)
    task = 1 if config.num_tasks else 0
    text, shown = lengths.text + task, lengths.shown + 1  # the whole image
    needed = _features(config, lengths, config.feature_size + 5, config.region_hidden_size, whole=1)
    if reading.summary:
        needed += weights(lengths.rows, config.hidden_size, config.pooled_size)
        needed += weights(lengths.rows, config.region_hidden_size, config.pooled_size)
    # From the last layer to the first: a layer runs for what is read of it, and reads everything before it.
    read_text = _read_text(lengths, reading)
    read_regions = _or_none(reading.regions, lengths.rows) + reading.summary
    layers, region_layers = config.num_layers, config.num_region_layers
    for before, region_before in zip(
        reversed(config.text_layers_before), reversed(config.region_layers_before), strict=True
    ):
        needed += stream(config, layers - before, text, read_text)
        needed += _gates(config, lengths, region_layers - region_before)
        needed += stream(regions, region_layers - region_before, shown, read_regions)
        read_text = text if layers > before and read_text.any() else read_text
        read_regions = shown if region_layers > region_before and read_regions.any() else read_regions
        needed += _co_attention(config, text, shown, read_text, read_regions)
        some_text, some_regions = read_text.any(), read_regions.any()
        read_text = text if some_regions else read_text
        read_regions = shown if some_text else read_regions
        layers, region_layers = before, region_before
    needed += stream(config, layers, lengths.tokens + task, lengths.tokens + task)
    return needed + stream(regions, region_layers, lengths.regions + 1, lengths.regions + 1)


def _lxmert(config: LxmertConfig, lengths: _Lengths, reading: Reading) -> Needed:
    counts = (config.num_text_layers, config.num_region_layers, config.num_cross_layers)
    return _lxmert_layers(config, counts, lengths, reading)


def _lxmert_layers(config: LxmertConfig, counts: tuple[int, int, int], lengths: _Lengths, reading: Reading) -> Needed:
    """LXMERT with so many text, region and cross-modality layers."""
    width, text, shown = config.hidden_size, lengths.text, lengths.shown
    num_text, num_regions, num_cross = counts
    needed = _features(config, lengths, config.feature_size + 4, width)
    needed += stream(config, num_text, lengths.tokens, lengths.tokens)
    needed += stream(config, num_regions, lengths.regions, lengths.regions)
    needed += _cross_layer(config, text, shown, text, shown).times(num_cross - 1)
    read_regions = _or_none(reading.regions, lengths.rows)
    needed += _cross_layer(config, text, shown, _read_text(lengths, reading), read_regions)
    return needed + weights(lengths.rows if reading.summary else 0, width, width)


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
    needed = weights(regions + whole * len(lengths.regions), inputs_size, width)
    if not learned:
        needed = Needed(forward=needed.forward, backward=needed.forward)
    if getattr(config, "whiten_features", False):
        needed += weights(regions, config.feature_size, config.feature_size).without_gradient()
    return needed


def _cross_layer(config: LxmertConfig, text: Counts, shown: Counts, read_text: Counts, read_regions: Counts) -> Needed:
    """LXMERT's layer: a stream reads the other and then all of itself; one that nobody reads is left out."""
    products, width = Products(), config.hidden_size
    for own, other, read in ((text, shown, read_text), (shown, text, read_regions)):
        if read.any():
            products += attention_block(width, width, width, own, other) + layer(config, read, own)
    return with_gradient(products)


def _co_attention(
    config: VilbertConfig, text: Counts, shown: Counts, read_text: Counts, read_regions: Counts
) -> Needed:
    """ViLBERT's layer: each stream reads the other, then goes through its feed-forward block."""
    products = Products()
    streams = (
        (config.hidden_size, config.intermediate_size, read_text, config.region_hidden_size, shown),
        (config.region_hidden_size, config.region_intermediate_size, read_regions, config.hidden_size, text),
    )
    for width, inner, read, context, keys in streams:
        if read.any():
            products += attention_block(width, context, config.co_attention_size, read, keys)
            products += feed_forward(int(read.sum()), width, inner)
    return with_gradient(products)


def _gates(config: VilbertConfig, lengths: _Lengths, number: int) -> Needed:
    """The text's gates of the attention among regions in so many layers, where a model has them."""
    rows = 2 * number * lengths.rows if config.gated_regions else 0
    return weights(rows, config.hidden_size, config.region_hidden_size)


def _region_contrast(objective: RegionContrast, lengths: _Lengths) -> Needed:
    """CVLP's own: the head, the key network with its head, and the scores against the queue, of every real region."""
    number = int(lengths.shown.sum())
    needed = (
        head_products(objective.head, number) + head_products(objective.key_head.network, number).without_gradient()
    )
    queued, size = objective.queue.rows.shape
    # The gradient is summed up along with the scores.
    needed += weights(2 * number, size, queued).without_gradient()
    network = objective.key.network
    reading = Reading(summary=False, regions=lengths.shown)
    if isinstance(network, KeyNetwork):
        config: Any = network.lxmert.config
        return needed + _lxmert_layers(config, _count_key_layers(network), lengths, reading).without_gradient()
    config = network.config
    return needed + _encode(config, lengths, reading).without_gradient()


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


def _region_targets(objective: MaskedRegions, targets: Targets, positions: int) -> Needed:
    """One transform of every region that is read, then each output at its own slots."""
    head = objective.head
    assert isinstance(head, RegionTargets)
    needed = head_products(head.transform, positions)
    for name, output in head.outputs.items():
        slots = targets.feature_slots if name == "features" else targets.class_slots
        needed += head_products(output, 0 if slots is None else int(slots.mask.sum()))
    return needed


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
