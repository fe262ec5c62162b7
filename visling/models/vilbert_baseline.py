"""The single-stream model that ViLBERT is compared with: one BERT over the words and the regions of an image, with
ViLBERT's region embedding and objectives.

Paper    Lu, Batra, Parikh & Lee 2019 (arXiv 1908.02265), the rows "Single-Stream" of table 1.
Release  jiasenlu/vilbert_beta, vilbert/basebert.py and `--baseline` of train_tasks.py. No weights were published, and
         its pre-training stops at the first batch: the heads are called with four arguments, and take three.
Differs  Nothing from the release, as far as it runs. As in ViLBERT, the image token is an ordinary region: mean
         feature, whole box.
Shapes   B rows, T tokens, R regions, S region rows, D hidden width. Inside, the whole image stands behind the regions;
         attention does not care, and it has no position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from visling.checkpoints import bert
from visling.checkpoints.keymap import KeyMap, drop, fresh, rename
from visling.errors import ConfigError
from visling.models import vilbert
from visling.models.base import WHOLE, AnswerList, Encoder, ModelSpec
from visling.nn.dropout import Dropout
from visling.nn.embeddings import RegionFeatures, TextEmbeddings, with_whole_image, without_regions
from visling.nn.layers import LayerSizes, TransformerLayer, initialise, through_layers
from visling.nn.packing import Packing, add_counts, read_joint
from visling.nn.pooling import FirstTokenPooler, gather
from visling.nn.trace import Trace
from visling.types import EVERYTHING, Batch, Dims, Encoded, InputSpec, Reads, Text

REGION_SEGMENT = 1
"""Row of their own segment table that all regions have."""


@dataclass(frozen=True, kw_only=True)
class VilbertBaselineConfig:
    """Sizes of the encoder and what it expects of its input. Defaults: BERT base, as pre-trained."""

    vocab_size: int = 30522
    """Word pieces of bert-base-uncased."""
    hidden_size: int = 768
    """D."""
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    """Width inside the feed-forward blocks."""
    max_positions: int = 512
    """Rows of the position table: the longest text."""
    num_segments: int = 2
    """Rows of the segment tables, of text and of regions."""
    norm_eps: float = 1e-12
    """Of every layer norm."""
    dropout_rate: float = 0.1
    """After embeddings and every block."""
    attention_dropout_rate: float = 0.1
    """On attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices and tables."""
    feature_size: int = 2048
    """F, width of the region features in the store."""
    whiten_features: bool = False
    """Whiten region features by statistics of the training store before they are projected
    (`nn.embeddings.Whitening`)."""
    vocabulary: str = "bert-base-uncased"
    """WordPiece vocabulary."""
    max_tokens: int = 36
    """Longest text row (release: captions)."""
    max_regions: int = 36
    """Regions used per image, the whole image not counted (release: pre-training)."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads; found {self.hidden_size} and {self.num_heads}."
            )
        if self.num_segments <= REGION_SEGMENT:
            raise ConfigError(f"regions have segment {REGION_SEGMENT}; found {self.num_segments} segments.")
        if self.max_tokens > self.max_positions:
            raise ConfigError(
                f"max_tokens {self.max_tokens} exceeds the {self.max_positions} rows of the position table. "
                "Raise max_positions too."
            )


PRESETS: Mapping[str, VilbertBaselineConfig] = {
    # the release's `bert_base_baseline.json` and `bert_large_baseline.json`
    "base": VilbertBaselineConfig(),
    "large": VilbertBaselineConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
    # fine-tuning: its region counts include the whole image
    "vqa": VilbertBaselineConfig(max_tokens=16, max_regions=99),
    "vcr": VilbertBaselineConfig(max_tokens=80, max_regions=99),
    "referring": VilbertBaselineConfig(max_tokens=20, max_regions=99),
    # ours: from scratch on drawn scenes; as wide as ViLBERT's preset, and as many layers as that has in its streams and
    # between them, which makes 0.63 million parameters to its 0.69
    "scenes": VilbertBaselineConfig(
        vocab_size=318,
        hidden_size=96,
        num_layers=5,
        num_heads=6,
        intermediate_size=384,
        max_positions=128,
        init_std=0.06,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        feature_size=256,
        whiten_features=True,
        vocabulary="scenes",
        max_tokens=64,
    ),
    "tiny": VilbertBaselineConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_positions=64,
        feature_size=16,
        max_tokens=64,
    ),
}
"""Released configurations at full size, and ours."""


class VilbertBaseline(Encoder):
    """Text positions first, then regions and the whole image, in one bidirectional stream."""

    behind_regions = (WHOLE,)

    def __init__(self, config: VilbertBaselineConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.dims = Dims(text=width, regions=width, pooled=width)
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            num_segments=config.num_segments,
            hidden_size=width,
            freeze_first_rows=True,
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.region_features = RegionFeatures(config.feature_size, whiten=config.whiten_features)
        self.projection = nn.Linear(config.feature_size, width)
        self.box_projection = nn.Linear(5, width)
        self.region_segments = nn.Embedding(config.num_segments, width)
        self.region_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout_rate)
        self.layers = nn.ModuleList(TransformerLayer(LayerSizes.of(config)) for _ in range(config.num_layers))
        self.pooler = FirstTokenPooler(width)
        self.apply(partial(initialise, std=config.init_std))

    def forward(self, batch: Batch, *, capture: bool = False, reads: Reads = EVERYTHING) -> Encoded:
        """States of text, regions and the whole image; `pooled` is the summary of `text.answer_at`, or the first
        token."""
        text, text_mask, answer_at = self._embed_text(batch.text)  # (B, T, D)
        regions, region_mask = self._embed_regions(batch)  # (B, R + 1, D)
        num_tokens, num_regions = text.shape[1], regions.shape[1] - 1
        rows = Packing.of(torch.cat([text_mask, region_mask], dim=1), add_counts(batch.text, batch.regions, extra=1))
        trace = Trace(capture, num_tokens=num_tokens)
        states = rows.pack(torch.cat([text, regions], dim=1))  # (K, D)
        states = trace.add_states("embeddings", states, rows)
        read = rows.read_all()
        if reads != EVERYTHING and not capture:
            read = read_joint(reads, rows, num_tokens=num_tokens, num_regions=num_regions, answer_at=answer_at)
        padded = read.rows.unpack_real(through_layers(self.layers, states, rows, trace, read=read))  # (B, T + R + 1, D)
        summed_up = padded if answer_at is None else gather(padded, answer_at[:, None])
        return Encoded(
            text=padded[:, :num_tokens],
            regions=padded[:, num_tokens:-1],
            whole=padded[:, -1],
            pooled=self.pooler(summed_up) if reads.pooled else padded[:, 0, :0],
            maps=trace.maps(),
            attention=trace.attention(),
            states=trace.states(),
        )

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.embeddings.words

    def fit_features(self, features: Tensor) -> None:
        """Measure the whitening, if this preset whitens."""
        self.region_features.fit(features)

    def _embed_text(self, text: Text) -> tuple[Tensor, Tensor, Tensor | None]:
        """Normed sums of the word, position and segment vectors (B, T, D), mask (B, T) and answer positions (B,)."""
        rows = Packing.of(text.mask, text.count)
        packed = self.dropout(self.norm(rows.pack(self.embeddings(text.ids, text.segments))))
        states, row = rows.unpack(packed), text.row
        if row is None:
            return states, text.mask, text.answer_at
        return states[row], text.mask[row], None if text.answer_at is None else text.answer_at[row]

    def _embed_regions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normed sums of the projected features and locations and the segment of regions, the whole image last
        (B, R + 1, D), and their mask."""
        regions = batch.regions
        if regions is None:
            regions = without_regions(batch.text, self.config.feature_size, self.projection.weight)
        features, locations, rows = with_whole_image(regions, self.region_features, self.projection.weight.dtype)
        segment = self.region_segments.weight[REGION_SEGMENT]
        summed = self.projection(features) + self.box_projection(locations) + segment
        states, mask = rows.unpack(self.dropout(self.region_norm(summed))), rows.mask
        return (states, mask) if regions.row is None else (states[regions.row], mask[regions.row])


def inputs(config: VilbertBaselineConfig) -> InputSpec:
    """What collate must deliver for a configuration."""
    return InputSpec(
        vocabulary=config.vocabulary,
        feature_size=config.feature_size,
        max_tokens=config.max_tokens,
        max_regions=config.max_regions,
        answer_slot="none",
        pair="rows",
    )


# Parts: encoder, vocabulary (masked language modelling), region_targets (masked regions), matching (alignment),
# classifier (VQA), score (VCR, retrieval), regions (referring expressions).
_FIRST = KeyMap(
    (
        *bert.REPAIRS,
        *bert.text_embeddings("bert.embeddings", "encoder.embeddings"),
        rename("bert.embeddings.LayerNorm.*", "encoder.norm.*"),
        rename("bert.image_embeddings.image_embeddings.*", "encoder.projection.*"),
        rename("bert.image_embeddings.image_location_embeddings.*", "encoder.box_projection.*"),
        rename("bert.image_embeddings.token_type_embeddings.weight", "encoder.region_segments.weight"),
        rename("bert.image_embeddings.LayerNorm.*", "encoder.region_norm.*"),
        *bert.layer("bert.encoder.layer.*", "encoder.layers.*"),
        rename("bert.pooler.dense.*", "encoder.pooler.dense.*"),
        *bert.vocabulary("cls.predictions", "vocabulary", words="bert.embeddings.word_embeddings.weight"),
        rename("cls.seq_relationship.*", "matching.linear.*"),
        rename("cls.imagePredictions.transform.dense.*", "region_targets.transform.dense.*"),
        rename("cls.imagePredictions.transform.LayerNorm.*", "region_targets.transform.norm.*"),
        rename("cls.imagePredictions.decoder.*", "region_targets.outputs.classes.*"),
        *vilbert.WEIGHT_NORM_CLASSIFIER,
        rename("vil_logit.*", "score.linear.*"),
        rename("vision_logit.*", "regions.linear.*"),
        drop("linguisic_logit.*", "no task of the release reads it"),
    )
)
_BERT = KeyMap(
    (
        *bert.RELEASE,  # its next-sentence head too: class 0 means "fits" there and in the release
        *(
            fresh(f"encoder.{name}.**", "not in BERT: random")
            for name in ("projection", "box_projection", "region_segments", "region_norm")
        ),
        fresh("encoder.region_features.whiten.*", "not in BERT: measured on the region store"),
        fresh("region_targets.**", "not in BERT: random"),
    )
)

SPEC = ModelSpec(
    config=VilbertBaselineConfig,
    build=VilbertBaseline,
    presets=PRESETS,
    inputs=inputs,
    layout="first",
    head_styles={
        ("first", "classify"): "weight_norm_plain",
        ("first", "score"): "plain",
        ("first", "matching"): "match_first_plain",
        ("first", "regions"): "linear",
        ("first", "region_targets"): "bert",
        ("first", "vocabulary"): "bert",
        ("first", "pair"): "linear",  # ours
        ("first", "slots_regions"): "flickr",  # ours
        ("first", "projection"): "cvlp",  # ours
    },
    keys={"first": _FIRST, "bert": _BERT},
    answers={
        "first": AnswerList(file="trainval_label2ans.pkl of ViLBERT's cache folder for VQA (3,129)", unknown="absent")
    },
    tasks=vilbert.SPEC.tasks,
)
