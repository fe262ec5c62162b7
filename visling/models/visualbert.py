"""VisualBERT: one BERT over the words and the regions of an image, which only their embeddings distinguish.

Paper    Li, Yatskar, Yin, Hsieh & Chang 2019 (arXiv 1908.03557), section 3.1.
Release  uclanlp/visualbert, `bert_modeling` (also transformers, `visual_bert`).
Differs  The paper sums the position vectors of the words linked to a region; the release averages them and adds the
         visual position vector as well. The release never trains the pooler (its optimiser skips it), not even where a
         task reads it. We follow the release, so its checkpoints load; presets that start from scratch train the
         pooler. A Flickr30K option appends the box to the feature; regions carry no other position.
Shapes   B rows, T tokens, R regions, S region rows, D hidden width; feature_size is the width of the region features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visling.boxes import spatial_six
from visling.checkpoints import bert
from visling.checkpoints.keymap import KeyMap, Rule, drop, fresh, rename, tie
from visling.errors import ConfigError
from visling.models.base import KEPT_BY_RECIPES, VOLTA_ANSWERS, AnswerList, Encoder, HeadWeights, ModelSpec
from visling.nn.dropout import Dropout
from visling.nn.embeddings import RegionFeatures, TextEmbeddings
from visling.nn.layers import LayerSizes, TransformerLayer, initialise, through_layers
from visling.nn.packing import Packing, add_counts, read_joint
from visling.nn.pooling import FirstTokenPooler, gather
from visling.nn.trace import Trace
from visling.types import EVERYTHING, Batch, Dims, Encoded, InputSpec, Reads, Regions, Text


@dataclass(frozen=True, kw_only=True)
class VisualBertConfig:
    """Sizes of the encoder and what it expects of its input. Defaults: the release, on BERT base."""

    vocab_size: int = 30522
    """Word pieces of bert-base-uncased."""
    hidden_size: int = 768
    """D."""
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    """Width inside the feed-forward blocks."""
    max_positions: int = 512
    """Rows of the position tables: the longest text."""
    num_segments: int = 2
    """Rows of the segment tables, text and visual."""
    norm_eps: float = 1e-12
    """Of every layer norm."""
    dropout_rate: float = 0.1
    """After embeddings and every block."""
    attention_dropout_rate: float = 0.1
    """On attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices and tables (BERT); narrow models need more for their
    attention to be more than an average."""
    feature_size: int = 2048
    """F, width of the region features in the store."""
    whiten_features: bool = False
    """Whiten region features by statistics of the training store before they are projected
    (`nn.embeddings.Whitening`)."""
    append_spatial: bool = False
    """Append unit corners, width and height of the box to each feature (Flickr30K release: 2048 + 6)."""
    region_segment: int = 0
    """Visual segment of regions whose image is not stated: 0 in the release, 1 by default in transformers and VOLTA."""
    bypass: bool = False
    """Late fusion (paper, "without early fusion"): the layers read text only, one additional layer adds the regions."""
    vocabulary: str = "bert-base-uncased"
    """WordPiece vocabulary."""
    max_tokens: int = 128
    """Longest text row (release)."""
    max_regions: int = 100
    """Regions used per image."""
    answer_slot: Literal["none", "same_segment", "second_segment"] = "none"
    """Whether questions end in a [MASK] whose raw state answers (VQA release: in the same segment)."""
    pair: Literal["rows", "sequence"] = "sequence"
    """Two images: one row in which visual segments distinguish their regions (NLVR2 release), or two rows."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads; found {self.hidden_size} and {self.num_heads}."
            )
        if not 0 <= self.region_segment < self.num_segments:
            raise ConfigError(
                f"region_segment must be one of {self.num_segments} segments, counted from 0; "
                f"found {self.region_segment}."
            )
        if self.max_tokens > self.max_positions:
            raise ConfigError(
                f"max_tokens {self.max_tokens} exceeds the {self.max_positions} rows of the position table. "
                "Raise max_positions too."
            )


_RELEASED: Mapping[str, VisualBertConfig] = {
    "vqa": VisualBertConfig(answer_slot="same_segment"),  # 100 fixed detections
    "nlvr2": VisualBertConfig(feature_size=1024, max_regions=144),  # first 144 of up to 150 rows per image
    "vcr": VisualBertConfig(feature_size=512),  # output of its own network, vision/vcr_network.py
    "flickr30k": VisualBertConfig(append_spatial=True),  # bottom-up features, 10 to 100 boxes
}
_SMALL = VisualBertConfig(
    hidden_size=128,
    num_layers=4,
    num_heads=8,
    intermediate_size=512,
    # Keeps attention scores at the size they have in BERT base, 0.02 times the root of the ratio of widths
    init_std=0.06,
    attention_dropout_rate=0.0,  # the fused CPU kernel knows none; dropping it saves about a tenth of a step
    max_positions=128,
    feature_size=256,
    whiten_features=True,
    append_spatial=True,
    max_tokens=64,
    max_regions=36,
)
_DRAWN_WORDS: Mapping[str, Any] = {"vocabulary": "scenes", "vocab_size": 318}
"""The part of BERT's vocabulary that drawn scenes and NLVR's development sentences use, and single letters for all
other words."""
PRESETS: Mapping[str, VisualBertConfig] = {
    **_RELEASED,
    # paper, section 4: the rows "w/o early fusion"
    **{f"{name}_bypass": dataclasses.replace(config, bypass=True) for name, config in _RELEASED.items()},
    # VOLTA's controlled comparison, 36 regions and the whole image before them
    "ctrl": VisualBertConfig(region_segment=1, max_tokens=38, max_regions=37),
    # ours: from scratch on drawn scenes, where positions matter, so boxes are seen and the pooler is trained
    "scenes": dataclasses.replace(
        _SMALL,
        hidden_size=96,
        num_layers=3,
        num_heads=6,
        intermediate_size=384,
        dropout_rate=0.0,
        answer_slot="same_segment",
        **_DRAWN_WORDS,
    ),
    "nlvr": dataclasses.replace(
        _SMALL, hidden_size=96, num_heads=6, intermediate_size=384, dropout_rate=0.0, **_DRAWN_WORDS
    ),
    # ours: from scratch on a few thousand examples of one's own
    "small": dataclasses.replace(_SMALL, init_std=0.05, max_tokens=40, answer_slot="same_segment"),
    "tiny": dataclasses.replace(
        _SMALL,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_positions=64,
        feature_size=16,
        answer_slot="same_segment",
    ),
}
"""Released configurations at full size, and ours."""


class VisualBert(Encoder):
    """Text positions first, then regions, in one bidirectional stream."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.dims = Dims(text=width, regions=width, pooled=width)
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            num_segments=config.num_segments,
            hidden_size=width,
        )
        self.region_features = RegionFeatures(config.feature_size, whiten=config.whiten_features)
        self.projection = nn.Linear(config.feature_size + (6 if config.append_spatial else 0), width)
        self.visual_segments = nn.Embedding(config.num_segments, width)
        self.visual_positions = nn.Embedding(
            config.max_positions, width
        )  # Quirk: only row 0 is ever read; the files hold the whole table
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout_rate)
        sizes = LayerSizes.of(config)
        self.layers = nn.ModuleList(TransformerLayer(sizes) for _ in range(config.num_layers))
        self.additional_layer = TransformerLayer(sizes) if config.bypass else None
        self.pooler = FirstTokenPooler(width)
        self.apply(partial(initialise, std=config.init_std))

    def forward(self, batch: Batch, *, capture: bool = False, reads: Reads = EVERYTHING) -> Encoded:
        """States of text and regions; `pooled` is the raw state at `text.answer_at` where given, else the pooled first
        token."""
        text, text_mask, answer_at = self._embed_text(batch.text)  # (B, T, D)
        regions, region_mask = self._embed_regions(batch, like=text)  # (B, R, D)
        num_tokens = text.shape[1]
        rows = Packing.of(torch.cat([text_mask, region_mask], dim=1), add_counts(batch.text, batch.regions))
        states = self.dropout(self.norm(rows.pack(torch.cat([text, regions], dim=1))))  # (K, D)
        trace = Trace(capture, num_tokens=num_tokens)
        states = trace.add_states("embeddings", states, rows)
        read = rows.read_all()
        if reads != EVERYTHING and not capture:
            read = read_joint(reads, rows, num_tokens=num_tokens, num_regions=regions.shape[1], answer_at=answer_at)

        if self.additional_layer is None:
            states = through_layers(self.layers, states, rows, trace, read=read)
        else:
            states = self._bypass(states, rows, Packing.of(text_mask, add_counts(batch.text, None)), trace)
            states = self.additional_layer(states, rows, trace.at("additional_layer"), read=read)

        padded = read.rows.unpack_real(states)  # (B, T + R, D)
        pooled = padded[:, 0, :0]
        if reads.pooled:
            pooled = self.pooler(padded) if answer_at is None else gather(padded, answer_at)
        return Encoded(
            text=padded[:, :num_tokens],
            regions=padded[:, num_tokens:],
            pooled=pooled,
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

    def after_text_weights(self) -> None:
        """Visual segments and positions start as copies of the text tables (release: `special_initialize`)."""
        with torch.no_grad():
            self.visual_segments.weight.copy_(self.embeddings.segments.weight)
            self.visual_positions.weight.copy_(self.embeddings.positions.weight)

    def _embed_text(self, text: Text) -> tuple[Tensor, Tensor, Tensor | None]:
        """Summed vectors (B, T, D), mask (B, T) and answer positions (B,) of the batch's rows."""
        states, row = self.embeddings(text.ids, text.segments), text.row
        if row is None:
            return states, text.mask, text.answer_at
        return states[row], text.mask[row], None if text.answer_at is None else text.answer_at[row]

    def _embed_regions(self, batch: Batch, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Summed vectors (B, R, D) and mask (B, R) of the batch's rows; R = 0 without regions."""
        regions = batch.regions
        if regions is None:
            return like[:, :0], like.new_zeros(like.shape[0], 0, dtype=torch.bool)
        states, mask = self._project(regions), regions.mask
        if regions.row is not None:
            states, mask = states[regions.row], mask[regions.row]
        if batch.links is not None:
            states = states + self._linked_positions(batch.links)
        return states, mask

    def _project(self, regions: Regions) -> Tensor:
        """Feature, visual segment and visual position vectors, summed; (S, R, D), one row per image row."""
        rows = Packing.of(regions.mask, regions.count)
        features = self.region_features(rows.pack(regions.features), self.projection.weight.dtype)  # (Kr, F)
        if self.config.append_spatial:
            features = torch.cat([features, spatial_six(rows.pack(regions.boxes)).to(features.dtype)], dim=-1)
        if regions.image is None:
            segments = self.visual_segments.weight[self.config.region_segment]
        else:
            segments = self.visual_segments(rows.pack(regions.image))
        projected: Tensor = self.projection(features)
        return rows.unpack(projected + segments + self.visual_positions.weight[0])

    def _linked_positions(self, links: Tensor) -> Tensor:
        """Mean TEXT position vector of the tokens that name each region, (B, R, D); zeros where none does."""
        positions = self.embeddings.positions.weight[: links.shape[1]]
        weights = links.transpose(1, 2).to(positions.dtype)
        return weights @ positions / weights.sum(-1, keepdim=True).clamp(min=1)

    def _bypass(self, states: Tensor, rows: Packing, text_rows: Packing, trace: Trace) -> Tensor:
        """Packed states (K, D) of which the tokens alone went through the layers."""
        padded, num_tokens = rows.unpack(states), text_rows.mask.shape[1]
        text = through_layers(self.layers, text_rows.pack(padded[:, :num_tokens]), text_rows, trace)
        return rows.pack(torch.cat([text_rows.unpack(text), padded[:, num_tokens:]], dim=1))


def inputs(config: VisualBertConfig) -> InputSpec:
    """What collate must deliver for a configuration."""
    return InputSpec(
        vocabulary=config.vocabulary,
        feature_size=config.feature_size,
        max_tokens=config.max_tokens,
        max_regions=config.max_regions,
        answer_slot=config.answer_slot,
        pair=config.pair,
    )


# Parts: encoder, vocabulary (masked language modelling), matching (sentence-image), classifier (whatever reads the
# pooled state), slots_regions.
_OFFICIAL = KeyMap(
    (
        *bert.REPAIRS,
        *bert.text_embeddings("bert.bert.embeddings", "encoder.embeddings"),
        rename("bert.bert.embeddings.LayerNorm.*", "encoder.norm.*"),
        rename("bert.bert.embeddings.token_type_embeddings_visual.weight", "encoder.visual_segments.weight"),
        rename("bert.bert.embeddings.position_embeddings_visual.weight", "encoder.visual_positions.weight"),
        rename("bert.bert.embeddings.projection.*", "encoder.projection.*"),
        *bert.layer("bert.bert.encoder.layer.*", "encoder.layers.*"),
        *bert.layer("bert.bert.additional_layer", "encoder.additional_layer"),
        rename("bert.bert.pooler.dense.*", "encoder.pooler.dense.*"),
        *bert.vocabulary("bert.cls.predictions", "vocabulary", words="bert.bert.embeddings.word_embeddings.weight"),
        rename("bert.cls.seq_relationship.*", "matching.linear.*"),
        rename("bert.classifier.*", "classifier.linear.*"),
        rename("bert.flickr_attention.query.*", "slots_regions.query.*"),
        rename("bert.flickr_attention.key.*", "slots_regions.key.*"),
        drop("bert.flickr_attention.value.*", "the release never reads it"),
        drop("detector.**", "VCR's network, which vision/vcr_network.py reads (`visling finetune --backbone`)"),
    )
)
_TRANSFORMERS = KeyMap(
    (
        *bert.REPAIRS,
        *bert.text_embeddings("visual_bert.embeddings", "encoder.embeddings"),
        rename("visual_bert.embeddings.LayerNorm.*", "encoder.norm.*"),
        rename("visual_bert.embeddings.visual_token_type_embeddings.weight", "encoder.visual_segments.weight"),
        rename("visual_bert.embeddings.visual_position_embeddings.weight", "encoder.visual_positions.weight"),
        rename("visual_bert.embeddings.visual_projection.*", "encoder.projection.*"),
        *bert.layer("visual_bert.encoder.layer.*", "encoder.layers.*"),
        *bert.layer("visual_bert.additional_layer", "encoder.additional_layer"),
        rename("visual_bert.pooler.dense.*", "encoder.pooler.dense.*"),
        *bert.vocabulary(
            "cls.predictions", "vocabulary", words="visual_bert.embeddings.word_embeddings.weight", second_bias=True
        ),
        rename("cls.seq_relationship.*", "matching.linear.*"),
        rename("cls.weight", "classifier.linear.weight"),
        rename("cls.bias", "classifier.linear.bias"),
        rename("attention.query.*", "slots_regions.query.*"),
        rename("attention.key.*", "slots_regions.key.*"),
        drop("attention.value.*", "the release never reads it"),
    )
)


def volta_keys(num_layers: int) -> KeyMap:
    """VOLTA's layout: attention and feed-forward of layer n are sub-layers 2n and 2n + 1; the text's and the regions'
    names hold the same weights."""
    rules: list[Rule] = []
    for number in range(num_layers):
        ours, attention, forward = (
            f"encoder.layers.{number}",
            f"bert.encoder.layer.{2 * number}",
            f"bert.encoder.layer.{2 * number + 1}",
        )
        for theirs, name, to in (
            *(
                (f"{attention}.attention_self", name, f"self_attention.attention.{name}")
                for name in ("query", "key", "value")
            ),
            (f"{attention}.attention_output", "dense", "self_attention.output"),
            (f"{attention}.attention_output", "LayerNorm", "self_attention.norm"),
            (f"{forward}.intermediate", "dense", "feed_forward.up"),
            (f"{forward}.output", "dense", "feed_forward.down"),
            (f"{forward}.output", "LayerNorm", "feed_forward.norm"),
        ):
            rules.append(rename(f"{theirs}.{name}.*", f"{ours}.{to}.*"))
            rules += (
                tie(f"{theirs}.v_{name}.{end}", f"{theirs}.{name}.{end}", part="encoder") for end in ("weight", "bias")
            )
    joined = "reads the product of VOLTA's two ReLU poolers, of text and of the whole image, which VisualBERT lacks"
    return KeyMap(
        (
            *bert.REPAIRS,
            *bert.text_embeddings("bert.embeddings", "encoder.embeddings"),
            rename("bert.embeddings.LayerNorm.*", "encoder.norm.*"),
            rename("bert.embeddings.token_type_embeddings_visual.weight", "encoder.visual_segments.weight"),
            rename("bert.embeddings.position_embeddings_visual.weight", "encoder.visual_positions.weight"),
            rename("bert.embeddings.projection.*", "encoder.projection.*"),
            *rules,
            *bert.vocabulary("cls.predictions", "vocabulary", words="bert.embeddings.word_embeddings.weight"),
            rename("cls.imagePredictions.transform.dense.*", "region_targets.transform.dense.*"),
            rename("cls.imagePredictions.transform.LayerNorm.*", "region_targets.transform.norm.*"),
            rename("cls.imagePredictions.decoder_dict.0.*", "region_targets.outputs.classes.*"),
            *(
                rename(f"clfs_dict.TASK{task}.{theirs}", f"{part}.{ours}")
                for task, part in ((9, "regions_refcoco"), (10, "regions"), (11, "regions_refcocog"))
                for theirs, ours in (
                    ("0.*", "dense.*"),
                    ("3.*", "output.*"),
                    ("weight", "linear.weight"),
                    ("bias", "linear.bias"),
                )
            ),
            drop("bert.t_pooler.**", "one of VOLTA's two ReLU poolers, whose product VisualBERT lacks"),
            drop("bert.v_pooler.**", "one of VOLTA's two ReLU poolers, whose product VisualBERT lacks"),
            drop("cls.bi_seq_relationship.*", joined),
            *(drop(f"clfs_dict.TASK{task}.**", joined) for task in (1, 7, 8, 12, 13, 15)),
            fresh("encoder.pooler.**", "VOLTA has two poolers of its own: random"),
        )
    )


_BERT = KeyMap(
    (
        *bert.RELEASE,
        fresh("encoder.visual_*.weight", "not in BERT: becomes a copy of the text table"),
        fresh("encoder.projection.*", "not in BERT: random"),
        fresh("encoder.region_features.whiten.*", "not in BERT: measured on the region store"),
        fresh("encoder.additional_layer.**", "not in BERT: random, as in the release"),
    )
)


def _describe_for_transformers(config: VisualBertConfig, heads: HeadWeights) -> dict[str, Any]:
    labels = len(heads["classifier"]["linear.bias"]) if "classifier" in heads else 2
    if "slots_regions" in heads:
        architecture = "VisualBertForRegionToPhraseAlignment"  # has the pre-training heads too
    elif "vocabulary" in heads or "matching" in heads:
        architecture = "VisualBertForPreTraining"
    elif labels == 1:
        architecture = "VisualBertForMultipleChoice"
    elif "classifier" in heads:
        architecture = (
            "VisualBertForQuestionAnswering" if config.answer_slot != "none" else "VisualBertForVisualReasoning"
        )
    else:
        architecture = "VisualBertModel"
    return {
        "architectures": [architecture],
        "model_type": "visual_bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "visual_embedding_dim": config.feature_size + (6 if config.append_spatial else 0),
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_segments,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_eps,
        "bypass_transformer": config.bypass,
        "special_visual_initialize": True,
        "pad_token_id": 0,
        "num_labels": labels,
    }


SPEC = ModelSpec(
    config=VisualBertConfig,
    build=VisualBert,
    presets=PRESETS,
    inputs=inputs,
    layout="official",
    head_styles={
        ("official", "classify"): "linear",
        ("official", "score"): "linear",
        ("official", "pair"): "linear",
        ("official", "matching"): "plain",
        ("official", "vocabulary"): "bert",
        ("official", "slots_regions"): "flickr",
        # ours: the release has no such task or objective
        ("official", "regions"): "linear",
        ("official", "region_targets"): "bert",
        ("official", "projection"): "cvlp",
        ("volta", "vocabulary"): "bert",
        ("volta", "region_targets"): "bert",
        ("volta", "regions"): "linear",
    },
    keys={"official": _OFFICIAL, "transformers": _TRANSFORMERS, "volta": volta_keys(12), "bert": _BERT},
    answers={
        "official": AnswerList(
            file="answers_vqa.txt of Pythia's VQA 2.0 data (3,129 lines, the first is <unk>)", unknown="first"
        ),
        "volta": VOLTA_ANSWERS,
    },
    tasks={
        "vqa": {"loss": "kl", "mask_unknown": True},
        "nlvr2": {"joined": True},
        "vcr": {"loss": "softmax", "names": "mentioned", "links": "first_piece", "cut": "front"},
    },
    kept=KEPT_BY_RECIPES | {"answer_slot", "pair"},
    transformers=_describe_for_transformers,
)
