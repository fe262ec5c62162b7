"""ViLBERT, VL-BERT and CVLP over padded batches, the way in which their releases compute them, from the weights of
visling's modules.

No maintained implementation of the three exists to compare with. Every layer runs at every position of a padded batch,
attention as product, softmax and product; embeddings, layers and summaries are written here with plain functions of
torch. Heads and losses are visling's own and read the same positions, so that the layers alone differ.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from sides import Answering, Pretraining
from torch import Tensor, nn
from torch.nn import functional as F

from visling.boxes import locate, whole_image
from visling.models.cvlp import Cvlp
from visling.models.lxmert import Lxmert
from visling.models.vilbert import Vilbert
from visling.models.vlbert import COUNT_EPS, VlBert, geometry
from visling.objectives.base import PretrainStep
from visling.objectives.pretrain_model import PretrainModel
from visling.tasks.answers import answer_loss
from visling.types import Batch, Encoded, Regions, Targets


class DensePretraining:
    """A recipe's objectives over a dense encoder."""

    def __init__(self, ours: Pretraining) -> None:
        self.module: PretrainModel = copy.deepcopy(ours.module)

    def feed(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """As they are."""
        return batch, targets

    def loss(self, fed: tuple[Batch, Targets]) -> Tensor:
        """Weighted sum of the objectives."""
        batch, targets = fed
        step = PretrainStep(self.module.encoder, batch, encode(self.module.encoder, batch), targets)
        losses = [
            objective(step).value * self.module.weights[name] for name, objective in self.module.objectives.items()
        ]
        return torch.stack(losses).sum()


class DenseAnswering:
    """A task's head over a dense encoder; an image is encoded once for each of its questions."""

    def __init__(self, ours: Answering) -> None:
        self.module, self.kind = copy.deepcopy(ours.module), ours.kind

    def feed(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """As they are."""
        return batch, targets

    def loss(self, fed: tuple[Batch, Targets]) -> Tensor:
        """Of soft answer scores."""
        batch, targets = fed
        assert targets.answer is not None
        return answer_loss(self.logits(batch), targets.answer, self.kind).value

    def logits(self, batch: Batch) -> Tensor:
        """(B, A)."""
        return self.module.read(encode(self.module.encoder, batch), batch)["classify"]


def encode(encoder: nn.Module, batch: Batch) -> Encoded:
    """States of all positions of a padded batch, rows one to one with images."""
    if isinstance(encoder, Vilbert):
        return encode_vilbert(encoder, batch)
    if isinstance(encoder, Cvlp):
        return encode_lxmert(encoder.lxmert, batch)
    assert isinstance(encoder, VlBert)
    return encode_vlbert(encoder, batch)


def encode_vilbert(encoder: Vilbert, batch: Batch) -> Encoded:
    """Two streams with co-attention, whole image last."""
    config, train, regions = encoder.config, encoder.training, batch.regions
    assert regions is not None
    text_mask, region_mask = batch.text.mask, F.pad(regions.mask, (0, 1), value=True)
    tables = encoder.embeddings
    text = tables.words(batch.text.ids) + tables.positions.weight[: text_mask.shape[1]]
    text = drop(norm(encoder.text_norm, text + tables.segments(batch.text.segments)), config.dropout_rate, train)
    read = encoder.region_features(regions.features, encoder.projection.weight.dtype)
    features, locations = with_whole_image(dataclasses.replace(regions, features=read))
    seen = linear(encoder.projection, features) + linear(encoder.box_projection, locations)
    seen = drop(norm(encoder.region_norm, seen), config.dropout_rate, train)
    done = region_done = 0
    befores = zip(config.text_layers_before, config.region_layers_before, strict=True)
    for number, (before, region_before) in enumerate(befores):
        for layer in encoder.text_layers[done:before]:
            text = transform(layer, text, text_mask, train)
        for layer in encoder.region_layers[region_done:region_before]:
            seen = transform(layer, seen, region_mask, train)
        done, region_done = before, region_before
        meeting: Any = encoder.co_attention_layers[number]
        informed = attend(meeting.text_attention, text, seen, region_mask, train)
        seen = attend(meeting.region_attention, seen, text, text_mask, train)
        text = feed_forward(meeting.text_feed_forward, informed, train)
        seen = feed_forward(meeting.region_feed_forward, seen, train)
    for layer in encoder.text_layers[done:]:
        text = transform(layer, text, text_mask, train)
    for layer in encoder.region_layers[region_done:]:
        seen = transform(layer, seen, region_mask, train)
    summaries = F.relu(linear(encoder.text_pooler, text[:, 0])), F.relu(linear(encoder.region_pooler, seen[:, -1]))
    pooled = summaries[0] * summaries[1] if config.fusion == "product" else summaries[0] + summaries[1]
    return Encoded(text=text, regions=seen[:, :-1], whole=seen[:, -1], pooled=pooled)


def encode_lxmert(encoder: Lxmert, batch: Batch) -> Encoded:
    """Two streams, then layers in which they meet."""
    config, train, regions, text_mask = encoder.config, encoder.training, batch.regions, batch.text.mask
    assert regions is not None
    tables, placed = encoder.embeddings, encoder.region_embeddings
    text = tables(batch.text.ids, batch.text.segments)
    text = drop(norm(encoder.norm, text), config.dropout_rate, train)
    seen = norm(placed.feature_norm, linear(placed.features, regions.features))
    seen = drop((seen + norm(placed.box_norm, linear(placed.boxes, regions.boxes))) / 2, config.dropout_rate, train)
    for layer in encoder.text_layers:
        text = transform(layer, text, text_mask, train)
    for layer in encoder.region_layers:
        seen = transform(layer, seen, regions.mask, train)
    for layer in encoder.cross_layers:
        meeting: Any = layer
        informed = attend(meeting.cross_attention, text, seen, regions.mask, train)
        seen = attend(meeting.cross_attention, seen, text, text_mask, train)
        text = attend(meeting.text_self_attention, informed, informed, text_mask, train)
        seen = attend(meeting.region_self_attention, seen, seen, regions.mask, train)
        text = feed_forward(meeting.text_feed_forward, text, train)
        seen = feed_forward(meeting.region_feed_forward, seen, train)
    pooled = torch.tanh(linear(encoder.pooler.dense, text[:, 0]))
    return Encoded(text=text, regions=seen, pooled=pooled)


def encode_vlbert(encoder: VlBert, batch: Batch) -> Encoded:
    """One stream: text, regions, whole image, [END]."""
    config, train, text, regions = encoder.config, encoder.training, batch.text, batch.regions
    assert regions is not None
    tables, boxes = encoder.embeddings, regions.boxes
    features = encoder.region_features(regions.features, encoder.image_word.dtype)
    regions = dataclasses.replace(regions, features=features)
    whole = mean_of_visible(regions) if regions.whole is None else regions.whole
    words: Tensor = encoder.image_word.expand(*regions.mask.shape, -1)
    if regions.hidden is not None:
        words = torch.where(regions.hidden[..., None], encoder.mask_word, words)
        if encoder.mask_feature is not None:
            features = torch.where(regions.hidden[..., None], encoder.mask_feature, features)
    words = torch.cat([words, encoder.image_word.expand(len(words), 1, -1)], dim=1)
    features = torch.cat([features, whole[:, None]], dim=1)
    placed = geometry(torch.cat([boxes, whole_image(regions.size)], dim=1), config.coordinate_size)
    placed = drop(torch.cat([placed, features], dim=-1), config.feature_dropout_rate, train)
    visual = F.relu(linear(encoder.projection.linear, placed))  # (B, N, Dv)
    segments, length = torch.cat(tuple(tables.segments)), text.mask.sum(1)
    tokens = (
        tables.words(text.ids) + tables.positions.weight[: text.ids.shape[1]] + F.embedding(text.segments, segments)
    )
    tokens = tokens + norm(tables.visual_text.norm, visual[:, -1:])
    place = (tables.positions(length) + segments[2])[:, None]
    seen = words + norm(tables.visual_regions.norm, visual) + place
    end = (tables.end + tables.positions(length + 1) + segments[2])[:, None]
    states = drop(norm(tables.norm, torch.cat([tokens, seen, end], dim=1)), config.dropout_rate, train)
    mask = torch.cat([text.mask, F.pad(regions.mask, (0, 2), value=True)], dim=1)
    for layer in encoder.layers:
        states = transform(layer, states, mask, train)
    first = text.ids.shape[1]
    if text.answer_at is None:
        pooled = torch.tanh(linear(encoder.pooler.dense, states[:, 0]))
    else:
        pooled = states[torch.arange(len(states), device=states.device), text.answer_at]
    return Encoded(text=states[:, :first], regions=states[:, first:-2], whole=states[:, -2], pooled=pooled)


def with_whole_image(regions: Regions) -> tuple[Tensor, Tensor]:
    """Features and locations (B, R + 1, .) of the regions and of the whole image, the mean of the real ones."""
    count = regions.mask.sum(1, keepdim=True).clamp(min=1)
    whole = (regions.features * regions.mask[..., None]).sum(1) / count if regions.whole is None else regions.whole
    box = F.pad(regions.boxes.new_zeros(len(whole), 1, 2), (0, 2), value=1.0)
    return torch.cat([regions.features, whole[:, None]], dim=1), locate(torch.cat([regions.boxes, box], dim=1))


def mean_of_visible(regions: Regions) -> Tensor:
    """(B, F) mean of the regions that are real and not hidden."""
    counted = regions.mask if regions.hidden is None else regions.mask & ~regions.hidden
    number = counted.sum(1, keepdim=True).float()
    if regions.hidden is not None:
        number = number + COUNT_EPS * (regions.mask & regions.hidden).any(1, keepdim=True)
    return (regions.features * counted[..., None]).sum(1) / number.clamp(min=COUNT_EPS)


def transform(layer: Any, states: Tensor, mask: Tensor, train: bool) -> Tensor:
    """A Transformer layer at every position."""
    return feed_forward(layer.feed_forward, attend(layer.self_attention, states, states, mask, train), train)


def attend(block: Any, x: Tensor, y: Tensor, mask: Tensor, train: bool) -> Tensor:
    """An attention block: every query with every key, those of padding masked by the lowest number."""
    attention = block.attention
    query, key, value = (
        linear(part, states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part, states in ((attention.query, x), (attention.key, y), (attention.value, y))
    )
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    context = drop(scores.softmax(-1), attention.dropout_rate, train) @ value
    output = linear(block.output, context.transpose(1, 2).flatten(2))
    return norm(block.norm, x + drop(output, block.dropout.p, train))


def feed_forward(block: Any, states: Tensor, train: bool) -> Tensor:
    """A feed-forward block."""
    output = linear(block.down, F.gelu(linear(block.up, states)))
    return norm(block.norm, states + drop(output, block.dropout.p, train))


def linear(layer: Any, states: Tensor) -> Tensor:
    """A linear layer's weights."""
    return F.linear(states, layer.weight, layer.bias)


def norm(layer: Any, states: Tensor) -> Tensor:
    """A layer norm's weights."""
    return F.layer_norm(states, states.shape[-1:], layer.weight, layer.bias, layer.eps)


def drop(states: Tensor, rate: float, train: bool) -> Tensor:
    """Dropout in training."""
    return F.dropout(states, rate, train)
