"""UNITER, as a user would add it: a family outside the package, whose facts all stand in `SPEC`.

Paper    Chen et al. 2020 (arXiv 1909.11740), section 3.1.
Release  ChenRocks/UNITER, `model/`; the names of its weights are as remembered, and no file of it was read.
Differs  The release adds a learnt vector to the features of masked regions; here they are zeros only.
Shapes   B rows, T tokens, R regions, S region rows, K packed positions (`nn.packing`), D hidden width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from visling.boxes import area, spatial_six
from visling.checkpoints import bert
from visling.checkpoints.keymap import KeyMap, drop, fresh, rename
from visling.models.base import Encoder, ModelSpec
from visling.nn.dropout import Dropout
from visling.nn.embeddings import TextEmbeddings
from visling.nn.layers import LayerSizes, TransformerLayer, initialise, through_layers
from visling.nn.packing import Packing, add_counts, read_joint
from visling.nn.pooling import FirstTokenPooler
from visling.nn.trace import Trace
from visling.types import EVERYTHING, Batch, Dims, Encoded, InputSpec, Reads, Regions

REGION_SEGMENT = 1


@dataclass(frozen=True, kw_only=True)
class UniterConfig:
    """Sizes of the encoder and what it expects of its input. Defaults: UNITER base."""

    vocab_size: int = 28996
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    norm_eps: float = 1e-12
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    init_std: float = 0.02
    feature_size: int = 2048
    vocabulary: str = "bert-base-uncased"
    max_tokens: int = 60
    max_regions: int = 100


_TINY = UniterConfig(
    vocab_size=30522,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    max_positions=64,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    feature_size=16,
    max_regions=36,
)
PRESETS: Mapping[str, UniterConfig] = {
    "base": UniterConfig(),
    "scenes": dataclasses.replace(_TINY, vocabulary="scenes", vocab_size=318),
    "tiny": _TINY,
}


class RegionEmbeddings(nn.Module):
    """Feature, seven-number box and segment of each region: each of the first two projected and normalised, summed,
    normalised."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.features = nn.Linear(config.feature_size, width)
        self.feature_norm = nn.LayerNorm(width, eps=eps)
        self.boxes = nn.Linear(7, width)
        self.box_norm = nn.LayerNorm(width, eps=eps)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, regions: Regions, segment: Tensor) -> Tensor:
        """(S, R, D); zeros at padding."""
        rows = Packing.of(regions.mask, regions.count)
        features, boxes = rows.pack(regions.features), rows.pack(regions.boxes)  # (K, F), (K, 4)
        seven = torch.cat([spatial_six(boxes), area(boxes)[..., None]], dim=-1)  # (K, 7)
        features, seven = (x.to(self.features.weight.dtype) for x in (features, seven))
        states = self.feature_norm(self.features(features)) + self.box_norm(self.boxes(seven))
        return rows.unpack(self.norm(states + segment))


class Uniter(Encoder):
    """Text positions first, then regions, in one bidirectional stream."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.dims = Dims(text=width, regions=width, pooled=width)
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size, max_positions=config.max_positions, num_segments=2, hidden_size=width
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.region_embeddings = RegionEmbeddings(config)
        self.dropout = Dropout(config.dropout_rate)
        self.layers = nn.ModuleList(TransformerLayer(LayerSizes.of(config)) for _ in range(config.num_layers))
        self.pooler = FirstTokenPooler(width)
        self.apply(partial(initialise, std=config.init_std))

    def forward(self, batch: Batch, *, capture: bool = False, reads: Reads = EVERYTHING) -> Encoded:
        text, text_mask = self._embed_text(batch)  # (B, T, D)
        regions, region_mask = self._embed_regions(batch, like=text)  # (B, R, D)
        num_tokens, num_regions = text.shape[1], regions.shape[1]
        rows = Packing.of(torch.cat([text_mask, region_mask], dim=1), add_counts(batch.text, batch.regions))
        states = self.dropout(rows.pack(torch.cat([text, regions], dim=1)))  # (K, D)
        trace = Trace(capture, num_tokens=num_tokens)
        states = trace.add_states("embeddings", states, rows)
        read = rows.read_all()
        if reads != EVERYTHING and not capture:
            read = read_joint(reads, rows, num_tokens=num_tokens, num_regions=num_regions, answer_at=None)
        padded = read.rows.unpack_real(through_layers(self.layers, states, rows, trace, read=read))  # (B, T + R, D)
        return Encoded(
            text=padded[:, :num_tokens],
            regions=padded[:, num_tokens:],
            pooled=self.pooler(padded) if reads.pooled else padded[:, 0, :0],
            maps=trace.maps(),
            attention=trace.attention(),
            states=trace.states(),
        )

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.embeddings.words

    def _embed_text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        text = batch.text
        states, mask = self.norm(self.embeddings(text.ids, text.segments)), text.mask
        return (states, mask) if text.row is None else (states[text.row], mask[text.row])

    def _embed_regions(self, batch: Batch, *, like: Tensor) -> tuple[Tensor, Tensor]:
        regions = batch.regions
        if regions is None:
            return like[:, :0], like.new_zeros(like.shape[0], 0, dtype=torch.bool)
        segment = self.embeddings.segments.weight[REGION_SEGMENT]
        states, mask = self.region_embeddings(regions, segment), regions.mask
        return (states, mask) if regions.row is None else (states[regions.row], mask[regions.row])


def inputs(config: UniterConfig) -> InputSpec:
    return InputSpec(
        vocabulary=config.vocabulary,
        feature_size=config.feature_size,
        max_tokens=config.max_tokens,
        max_regions=config.max_regions,
    )


# Parts: encoder, vocabulary, matching, region_targets (its classes), classifier.
_OFFICIAL = KeyMap(
    (
        *bert.REPAIRS,
        *bert.text_embeddings("uniter.embeddings", "encoder.embeddings"),
        rename("uniter.embeddings.LayerNorm.*", "encoder.norm.*"),
        rename("uniter.img_embeddings.img_linear.*", "encoder.region_embeddings.features.*"),
        rename("uniter.img_embeddings.img_layer_norm.*", "encoder.region_embeddings.feature_norm.*"),
        rename("uniter.img_embeddings.pos_linear.*", "encoder.region_embeddings.boxes.*"),
        rename("uniter.img_embeddings.pos_layer_norm.*", "encoder.region_embeddings.box_norm.*"),
        rename("uniter.img_embeddings.LayerNorm.*", "encoder.region_embeddings.norm.*"),
        drop("uniter.img_embeddings.mask_embedding.weight", "masked regions are zeros here"),
        *bert.layer("uniter.encoder.layer.*", "encoder.layers.*"),
        rename("uniter.pooler.dense.*", "encoder.pooler.dense.*"),
        *bert.vocabulary("cls.predictions", "vocabulary", words="uniter.embeddings.word_embeddings.weight"),
        rename("itm_output.*", "matching.linear.*"),
        rename("region_classifier.net.0.*", "region_targets.transform.dense.*"),
        rename("region_classifier.net.2.*", "region_targets.transform.norm.*"),
        rename("region_classifier.net.3.*", "region_targets.outputs.classes.*"),
        rename("vqa_output.0.*", "classifier.dense.*"),
        rename("vqa_output.2.*", "classifier.norm.*"),
        rename("vqa_output.3.*", "classifier.linear.*"),
    )
)
_BERT = KeyMap((*bert.RELEASE, fresh("encoder.region_embeddings.**", "not in BERT: random")))

SPEC = ModelSpec(
    config=UniterConfig,
    build=Uniter,
    presets=PRESETS,
    inputs=inputs,
    head_styles={
        ("official", "classify"): "gelu_norm",
        ("official", "pair"): "gelu_norm",
        ("official", "score"): "linear",
        ("official", "matching"): "plain",
        ("official", "vocabulary"): "bert",
        ("official", "region_targets"): "bert",
        ("official", "regions"): "linear",
        ("official", "slots_regions"): "flickr",
        ("official", "projection"): "cvlp",
    },
    keys={"official": _OFFICIAL, "bert": _BERT},
)
