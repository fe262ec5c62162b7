"""LXMERT: a text stream, a region stream, then layers in which each attends to the other.

One file although it is long: header, config, presets, module and key maps of one family, read side by side with its
paper and its release.

Paper    Tan & Bansal 2019 (arXiv 1908.07490), section 2.
Release  airsplay/lxmert, `lxrt/modeling` (also transformers, `lxmert`).
Differs  The paper draws two cross-attention blocks in a layer; the release shares one set of weights between the
         directions. The paper sends what the cross-attention returns into the feed-forward block; in the release it
         goes through self-attention first. The paper's text embedding has no segments; the release adds them, and row 0
         of its three text tables is never updated by look-ups. We follow the release, so its checkpoints load. Boxes
         are the unit corners as they are; regions carry no other position. Region masks, which the release has but
         never uses, are always used. VOLTA's reproduction ends its pooler in ReLU (preset "volta").
Shapes   B rows, T tokens, R regions, S text or region rows, which batch rows may share, K packed positions
         (`nn.packing`), Kt tokens and Kr regions, D hidden width; feature_size is the region features' width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visling.checkpoints import bert
from visling.checkpoints.keymap import KeyMap, Rule, drop, fresh, rename, repair, tie
from visling.errors import ConfigError, nearest
from visling.models.base import VOLTA_ANSWERS, AnswerList, Encoder, HeadWeights, ModelSpec
from visling.nn.coattention import CrossModalityLayer
from visling.nn.dropout import Dropout
from visling.nn.embeddings import RegionFeatures, TextEmbeddings
from visling.nn.layers import LayerSizes, TransformerLayer, initialise
from visling.nn.packing import Packing, Reading, mark_read
from visling.nn.pooling import FirstTokenPooler
from visling.nn.trace import Trace
from visling.types import EVERYTHING, Batch, Dims, Encoded, InputSpec, Reads, Regions, Text


@dataclass(frozen=True, kw_only=True)
class LxmertConfig:
    """Sizes of the encoder and what it expects of its input. Defaults: the release."""

    vocab_size: int = 30522
    """Word pieces of bert-base-uncased."""
    hidden_size: int = 768
    """D, of both streams."""
    num_text_layers: int = 9
    """Language encoder."""
    num_region_layers: int = 5
    """Object-relationship encoder."""
    num_cross_layers: int = 5
    """Cross-modality encoder."""
    num_heads: int = 12
    intermediate_size: int = 3072
    """Width inside the feed-forward blocks."""
    max_positions: int = 512
    """Rows of the position table: the longest text."""
    num_segments: int = 2
    """Rows of the segment table; every pipeline of the release writes segment 0 only."""
    norm_eps: float = 1e-12
    """Of every layer norm."""
    dropout_rate: float = 0.1
    """After both embeddings and every block."""
    attention_dropout_rate: float = 0.1
    """On attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices and tables; narrow models need more for their attention to be
    more than an average."""
    feature_size: int = 2048
    """Width of the region features in the store."""
    whiten_features: bool = False
    """Whiten region features by statistics of the training store before they are projected
    (`nn.embeddings.Whitening`)."""
    pooler: Literal["tanh", "relu"] = "tanh"
    """Activation of the pooler: tanh in the release, ReLU in VOLTA."""
    vocabulary: str = "bert-base-uncased"
    """WordPiece vocabulary."""
    max_tokens: int = 20
    """Longest text row, [CLS] and [SEP] included (release)."""
    max_regions: int = 36
    """Regions used per image (release: exactly 36)."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads; found {self.hidden_size} and {self.num_heads}."
            )
        if self.pooler not in _ACTIVATIONS:
            raise ConfigError(f"pooler must be one of {', '.join(_ACTIVATIONS)}; found {self.pooler!r}.")
        if self.max_tokens > self.max_positions:
            raise ConfigError(
                f"max_tokens {self.max_tokens} exceeds the {self.max_positions} rows of the position table. "
                "Raise max_positions too."
            )


_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
_SMALL = LxmertConfig(
    # Keeps attention scores at the size they have in BERT base, 0.02 times the root of the ratio of widths
    init_std=0.06,
    attention_dropout_rate=0.0,  # the fused CPU kernel knows none; dropping it saves about a tenth of a step
    whiten_features=True,
    max_tokens=64,
)
PRESETS: Mapping[str, LxmertConfig] = {
    "base": LxmertConfig(),  # paper, section 4.1; all released files
    "volta": LxmertConfig(pooler="relu"),  # VOLTA, `original_lxmert`
    # ours: from scratch on drawn scenes, with the vocabulary of VisualBERT's preset for them
    "scenes": dataclasses.replace(
        _SMALL,
        hidden_size=96,
        num_text_layers=2,
        num_region_layers=1,
        num_cross_layers=2,
        num_heads=6,
        intermediate_size=384,
        max_positions=128,
        feature_size=256,
        dropout_rate=0.0,
        vocabulary="scenes",
        vocab_size=318,
    ),
    # ours: from scratch on a few thousand examples of one's own
    "small": dataclasses.replace(
        _SMALL,
        hidden_size=128,
        num_text_layers=3,
        num_region_layers=1,
        num_cross_layers=2,
        num_heads=8,
        intermediate_size=512,
        max_positions=128,
        feature_size=256,
        init_std=0.05,
        max_tokens=40,
    ),
    "tiny": dataclasses.replace(
        _SMALL,
        hidden_size=32,
        num_text_layers=2,
        num_region_layers=2,
        num_cross_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_positions=64,
        feature_size=16,
    ),
}
"""Released configurations at full size, and ours. Fine-tuned files have the size of "base"."""

Replacements = Mapping[str, nn.Module | None]
"""Layer name ("text_layers.0", "region_layers.0", "cross_layers.0") -> the module to run in its place, or None to skip
it."""
_NONE: Replacements = {}


class RegionEmbeddings(nn.Module):
    """Feature and box of each region, each projected and normed, averaged."""

    def __init__(self, hidden_size: int, *, feature_size: int, norm_eps: float) -> None:
        super().__init__()
        self.features = nn.Linear(feature_size, hidden_size)
        self.feature_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.boxes = nn.Linear(4, hidden_size)
        self.box_norm = nn.LayerNorm(hidden_size, eps=norm_eps)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """(K, F) and unit corners (K, 4) -> (K, D)."""
        mean: Tensor = (self.feature_norm(self.features(features)) + self.box_norm(self.boxes(boxes))) / 2
        return mean


class Lxmert(Encoder):
    """Text layers and region layers in parallel, then cross-modality layers.

    The streams can be run separately (`encode_text`, `encode_regions`) and passed to `forward`, and single layers
    replaced or skipped.
    """

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.dims = Dims(text=width, regions=width, pooled=width)
        sizes = LayerSizes.of(config)
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            num_segments=config.num_segments,
            hidden_size=width,
            freeze_first_rows=True,
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.region_features = RegionFeatures(config.feature_size, whiten=config.whiten_features)
        self.region_embeddings = RegionEmbeddings(width, feature_size=config.feature_size, norm_eps=config.norm_eps)
        self.dropout = Dropout(config.dropout_rate)
        self.text_layers = nn.ModuleList(TransformerLayer(sizes) for _ in range(config.num_text_layers))
        self.region_layers = nn.ModuleList(TransformerLayer(sizes) for _ in range(config.num_region_layers))
        self.cross_layers = nn.ModuleList(CrossModalityLayer(sizes) for _ in range(config.num_cross_layers))
        self.pooler = FirstTokenPooler(width, activation=_ACTIVATIONS[config.pooler])
        self.apply(partial(initialise, std=config.init_std))

    def forward(
        self,
        batch: Batch,
        *,
        capture: bool = False,
        reads: Reads = EVERYTHING,
        text_states: Tensor | None = None,
        region_states: Tensor | None = None,
        replacements: Replacements = _NONE,
    ) -> Encoded:
        """States of text and regions; `pooled` summarises the first token, whatever `text.answer_at` says.

        Args:
            text_states: what `encode_text` returned for these text rows; they are computed if not given.
            region_states: what `encode_regions` returned for these region rows.
            replacements: layers to replace or skip in this call.
        Raises:
            ConfigError: no such layer.
        """
        self._require_layers(replacements)
        trace = Trace(capture)
        text, text_rows = self._run_text(batch.text, text_states, trace, replacements)  # (Kt, D)
        regions, region_rows = self._run_regions(batch, region_states, trace, replacements)  # (Kr, D)
        layers = list(_layers("cross_layers", self.cross_layers, replacements))
        if capture or reads == EVERYTHING:
            last = layers[:0]
        else:
            layers, last = layers[:-1], layers[-1:]
        for name, layer in layers:
            text, regions = layer(text, regions, text_rows, region_rows, trace.at(name))
        read_text, read_regions = text_rows.read_all(), region_rows.read_all()
        for _, layer in last:
            assert isinstance(layer, CrossModalityLayer)
            read_text, read_regions = _what_is_read(reads, text_rows, region_rows)
            text, regions = layer.read(text, regions, text_rows, region_rows, read_text, read_regions)
        states = read_text.rows.unpack_real(text)  # (B, T, D)
        return Encoded(
            text=states,
            regions=read_regions.rows.unpack_real(regions),  # (B, R, D)
            pooled=self.pooler(states) if reads.pooled else states[:, 0, :0],
            maps=trace.maps(),
            attention=trace.attention(),
            states=trace.states(),
        )

    def encode_text(self, text: Text, *, trace: Trace | None = None, replacements: Replacements = _NONE) -> Tensor:
        """States of the text rows before they meet any region, (S, T, D).

        Args:
            trace: receives states (of the batch's rows) and attention.
        """
        rows = Packing.of(text.mask, text.count)
        return rows.unpack(self._encode_text(text, rows, trace, replacements))

    def encode_regions(
        self, regions: Regions, *, trace: Trace | None = None, replacements: Replacements = _NONE
    ) -> Tensor:
        """States of the region rows before they meet any text, (S, R, D).

        Raises:
            ConfigError: the features are of another width than the model's.
        """
        rows = Packing.of(regions.mask, regions.count)
        return rows.unpack(self._encode_regions(regions, rows, trace, replacements))

    def encode_pairs(
        self, batch: Batch, text_states: Tensor | None, region_states: Tensor | None, *, reads: Reads = EVERYTHING
    ) -> Encoded:
        """The cross-modality layers alone."""
        encoded: Encoded = self(batch, reads=reads, text_states=text_states, region_states=region_states)
        return encoded

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.embeddings.words

    def fit_features(self, features: Tensor) -> None:
        """Measure the whitening, if this preset whitens."""
        self.region_features.fit(features)

    def _require_layers(self, replacements: Replacements) -> None:
        if replacements:
            streams = {
                "text_layers": self.text_layers,
                "region_layers": self.region_layers,
                "cross_layers": self.cross_layers,
            }
            known = [f"{stream}.{number}" for stream, layers in streams.items() for number in range(len(layers))]
            if unknown := [name for name in replacements if name not in known]:
                raise ConfigError(f"no layer {unknown[0]!r} to replace. {nearest(unknown[0], known)}")

    def _run_text(
        self, text: Text, states: Tensor | None, trace: Trace, replacements: Replacements
    ) -> tuple[Tensor, Packing]:
        """Packed states of the batch's text rows before they meet any region; `states` as from `encode_text`."""
        rows = Packing.of(text.mask, text.count)
        packed = self._encode_text(text, rows, trace, replacements) if states is None else rows.pack(states)
        return rows.share(packed, text.row, text.shared)

    def _run_regions(
        self, batch: Batch, states: Tensor | None, trace: Trace, replacements: Replacements
    ) -> tuple[Tensor, Packing]:
        """Packed states of the batch's region rows before they meet any text; `states` as from `encode_regions`."""
        regions = batch.regions
        if regions is None:
            mask = batch.text.mask if batch.text.row is None else batch.text.mask[batch.text.row]
            return self.norm.weight.new_zeros(0, self.config.hidden_size), Packing.of(mask[:, :0])
        rows = Packing.of(regions.mask, regions.count)
        packed = self._encode_regions(regions, rows, trace, replacements) if states is None else rows.pack(states)
        return rows.share(packed, regions.row, regions.shared)

    def _encode_text(self, text: Text, rows: Packing, trace: Trace | None, replacements: Replacements) -> Tensor:
        """`encode_text`, packed."""
        states = self.dropout(self.norm(rows.pack(self.embeddings(text.ids, text.segments))))
        return self._through("text", self.text_layers, states, rows, text.row, trace, replacements)

    def _encode_regions(
        self, regions: Regions, rows: Packing, trace: Trace | None, replacements: Replacements
    ) -> Tensor:
        """`encode_regions`, packed."""
        dtype = self.region_embeddings.features.weight.dtype
        features, boxes = self.region_features(rows.pack(regions.features), dtype), rows.pack(regions.boxes).to(dtype)
        states = self.dropout(self.region_embeddings(features, boxes))
        return self._through("region", self.region_layers, states, rows, regions.row, trace, replacements)

    def _through(
        self,
        stream: Literal["text", "region"],
        layers: nn.ModuleList,
        states: Tensor,
        rows: Packing,
        row: Tensor | None,
        trace: Trace | None,
        replacements: Replacements,
    ) -> Tensor:
        """Packed states (K, D) through the layers of one stream."""
        trace = trace or Trace(False)
        states = trace.add_states(f"{stream}_embeddings", states, rows, row)
        for name, layer in _layers(f"{stream}_layers", layers, replacements):
            states = layer(states, rows, trace.at(name, "text" if stream == "text" else "regions", row))
        return states


def _what_is_read(reads: Reads, text: Packing, regions: Packing) -> tuple[Reading, Reading]:
    """Positions of both streams that are read after the last layer."""
    first = text.mask.new_zeros(len(text.mask), dtype=torch.int64) if reads.pooled else None
    read_text, read_regions = mark_read(reads.text, text.mask, first=first), mark_read(reads.regions, regions.mask)
    return text.read(*read_text), regions.read(*read_regions)


def _layers(prefix: str, layers: nn.ModuleList, replacements: Replacements) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers to run, in order."""
    for number, layer in enumerate(layers):
        name = f"{prefix}.{number}"
        chosen = replacements.get(name, layer)
        if chosen is not None:
            yield name, chosen


def inputs(config: LxmertConfig) -> InputSpec:
    """What collate must deliver for a configuration."""
    return InputSpec(
        vocabulary=config.vocabulary,
        feature_size=config.feature_size,
        max_tokens=config.max_tokens,
        max_regions=config.max_regions,
        answer_slot="none",
        pair="rows",
    )


# Parts: encoder; in pre-training vocabulary (masked language modelling), matching, region_targets (classes, attributes,
# features) and answers (the table of 9,500); in tasks classifier (what reads one pooled state, or the two of a pair).
def _attention(theirs: str, ours: str, inner: str) -> tuple[Rule, ...]:
    """An attention block whose projections lie under `inner`."""
    return (
        rename(f"{theirs}.{inner}.query.*", f"{ours}.attention.query.*"),
        rename(f"{theirs}.{inner}.key.*", f"{ours}.attention.key.*"),
        rename(f"{theirs}.{inner}.value.*", f"{ours}.attention.value.*"),
        rename(f"{theirs}.output.dense.*", f"{ours}.output.*"),
        rename(f"{theirs}.output.LayerNorm.*", f"{ours}.norm.*"),
    )


def _feed_forward(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A feed-forward block of one modality of a cross-modality layer."""
    return (
        rename(f"{theirs}_inter.dense.*", f"{ours}.up.*"),
        rename(f"{theirs}_output.dense.*", f"{ours}.down.*"),
        rename(f"{theirs}_output.LayerNorm.*", f"{ours}.norm.*"),
    )


def _encoder(theirs: str) -> tuple[Rule, ...]:
    """The encoder under one of the release's prefixes."""
    return (
        *bert.REPAIRS,
        *bert.text_embeddings(f"{theirs}.embeddings", "encoder.embeddings"),
        rename(f"{theirs}.embeddings.LayerNorm.*", "encoder.norm.*"),
        rename(f"{theirs}.encoder.visn_fc.visn_fc.*", "encoder.region_embeddings.features.*"),
        rename(f"{theirs}.encoder.visn_fc.visn_layer_norm.*", "encoder.region_embeddings.feature_norm.*"),
        rename(f"{theirs}.encoder.visn_fc.box_fc.*", "encoder.region_embeddings.boxes.*"),
        rename(f"{theirs}.encoder.visn_fc.box_layer_norm.*", "encoder.region_embeddings.box_norm.*"),
        *bert.layer(f"{theirs}.encoder.layer.*", "encoder.text_layers.*"),
        *bert.layer(f"{theirs}.encoder.r_layers.*", "encoder.region_layers.*"),
        *_attention(f"{theirs}.encoder.x_layers.*.visual_attention", "encoder.cross_layers.*.cross_attention", "att"),
        *_attention(f"{theirs}.encoder.x_layers.*.lang_self_att", "encoder.cross_layers.*.text_self_attention", "self"),
        *_attention(
            f"{theirs}.encoder.x_layers.*.visn_self_att", "encoder.cross_layers.*.region_self_attention", "self"
        ),
        *_feed_forward(f"{theirs}.encoder.x_layers.*.lang", "encoder.cross_layers.*.text_feed_forward"),
        *_feed_forward(f"{theirs}.encoder.x_layers.*.visn", "encoder.cross_layers.*.region_feed_forward"),
        rename(f"{theirs}.pooler.dense.*", "encoder.pooler.dense.*"),
        fresh("encoder.region_features.whiten.*", "not in the release: measured on the region store"),
    )


def _classifier(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A head of the "gelu_norm" style; number 1 is the activation."""
    return (
        rename(f"{theirs}.0.*", f"{ours}.dense.*"),
        rename(f"{theirs}.2.*", f"{ours}.norm.*"),
        rename(f"{theirs}.3.*", f"{ours}.linear.*"),
    )


def _heads(theirs: str) -> tuple[Rule, ...]:
    """The pre-training heads, which have no prefix; their word table lies under the encoder's."""
    return (
        *bert.vocabulary("cls.predictions", "vocabulary", words=f"{theirs}.embeddings.word_embeddings.weight"),
        rename("cls.seq_relationship.*", "matching.linear.*"),
        rename("obj_predict_head.transform.dense.*", "region_targets.transform.dense.*"),
        rename("obj_predict_head.transform.LayerNorm.*", "region_targets.transform.norm.*"),
        rename("obj_predict_head.decoder_dict.obj.*", "region_targets.outputs.classes.*"),
        rename("obj_predict_head.decoder_dict.attr.*", "region_targets.outputs.attributes.*"),
        rename("obj_predict_head.decoder_dict.feat.*", "region_targets.outputs.features.*"),
        *_classifier("answer_head.logit_fc", "answers"),
    )


_OFFICIAL = KeyMap((*_encoder("bert"), *_heads("bert")))
_FINETUNED = KeyMap(
    (
        repair("lxrt_encoder.model.module.**", "lxrt_encoder.model.**"),  # trained on several GPUs
        *_encoder("lxrt_encoder.model.bert"),
        *_classifier("logit_fc", "classifier"),
    )
)
_TRANSFORMERS = KeyMap(
    (
        # files of the bare LxmertModel
        repair("embeddings.**", "lxmert.embeddings.**"),
        repair("encoder.**", "lxmert.encoder.**"),
        repair("pooler.**", "lxmert.pooler.**"),
        *_encoder("lxmert"),
        *_heads("lxmert"),
    )
)
_BERT = KeyMap(
    (
        *bert.REPAIRS,
        *bert.text_embeddings("bert.embeddings", "encoder.embeddings"),
        rename("bert.embeddings.LayerNorm.*", "encoder.norm.*"),
        # the first nine layers, whatever the size of the model; the paper's footnote speaks of the top nine
        *(
            rule
            for number in range(9)
            for rule in bert.layer(f"bert.encoder.layer.{number}", f"encoder.text_layers.{number}")
        ),
        drop("bert.encoder.layer.**", "the text stream has nine layers"),
        rename("bert.pooler.dense.*", "encoder.pooler.dense.*"),
        *bert.vocabulary(
            "cls.predictions", "vocabulary", words="bert.embeddings.word_embeddings.weight", second_bias=True
        ),
        rename("cls.seq_relationship.*", "matching.linear.*"),
        fresh("encoder.region_embeddings.**", "not in BERT: random"),
        fresh("encoder.region_layers.**", "not in BERT: random"),
        fresh("encoder.cross_layers.**", "not in BERT: random"),
        fresh("encoder.region_features.whiten.*", "not in BERT: measured on the region store"),
        fresh("region_targets.**", "not in BERT: random"),
        fresh("answers.**", "not in BERT: random"),
        fresh("classifier.**", "not in BERT: random"),
    )
)


def volta_keys(config: LxmertConfig) -> KeyMap:
    """The layout of VOLTA's reproduction, which numbers attention and feed-forward blocks ("sub-layers") of all streams
    in one list.

    First come pairs (attention, feed-forward), which text and regions pass through in parallel as long as each has
    layers, then triples (cross-attention, self-attention, feed-forward). What both streams share is stored twice. In
    its matching head class 0 means "fits"; the style "match_first" swaps. Parts of tasks: classifier (VQA),
    classifier_gqa, pair (NLVR2), score (retrieval), entailment, regions and regions_deep (referring expressions).
    """
    base = "bert.encoder.layer"

    def attention(number: int, mark: str, ours: str) -> tuple[Rule, ...]:
        return (
            *(
                rename(f"{base}.{number}.attention_self.{mark}{name}.*", f"{ours}.attention.{name}.*")
                for name in ("query", "key", "value")
            ),
            rename(f"{base}.{number}.attention_output.{mark}dense.*", f"{ours}.output.*"),
            rename(f"{base}.{number}.attention_output.{mark}LayerNorm.*", f"{ours}.norm.*"),
        )

    def feed_forward(number: int, mark: str, ours: str) -> tuple[Rule, ...]:
        return (
            rename(f"{base}.{number}.intermediate.{mark}dense.*", f"{ours}.up.*"),
            rename(f"{base}.{number}.output.{mark}dense.*", f"{ours}.down.*"),
            rename(f"{base}.{number}.output.{mark}LayerNorm.*", f"{ours}.norm.*"),
        )

    def second_copies(number: int) -> tuple[Rule, ...]:
        places = ("self.{}query", "self.{}key", "self.{}value", "output.{}dense", "output.{}LayerNorm")
        return tuple(
            tie(
                f"{base}.{number}.attention_{place.format('v_')}.{name}",
                f"{base}.{number}.attention_{place.format('')}.{name}",
                part="encoder",
            )
            for place in places
            for name in ("weight", "bias")
        )

    rules: list[Rule] = []
    for mark, stream, count in (("", "text", config.num_text_layers), ("v_", "region", config.num_region_layers)):
        for number in range(count):
            rules += attention(2 * number, mark, f"encoder.{stream}_layers.{number}.self_attention")
            rules += feed_forward(2 * number + 1, mark, f"encoder.{stream}_layers.{number}.feed_forward")
    start = 2 * max(config.num_text_layers, config.num_region_layers)
    for number in range(config.num_cross_layers):
        cross, ours = start + 3 * number, f"encoder.cross_layers.{number}"
        rules += (*second_copies(cross), *attention(cross, "", f"{ours}.cross_attention"))
        for mark, stream in (("", "text"), ("v_", "region")):
            rules += attention(cross + 1, mark, f"{ours}.{stream}_self_attention")
            rules += feed_forward(cross + 2, mark, f"{ours}.{stream}_feed_forward")
    return KeyMap(
        (
            *bert.REPAIRS,
            *bert.text_embeddings("bert.embeddings", "encoder.embeddings"),
            rename("bert.embeddings.LayerNorm.*", "encoder.norm.*"),
            rename("bert.v_embeddings.image_embeddings.*", "encoder.region_embeddings.features.*"),
            rename("bert.v_embeddings.ImgLayerNorm.*", "encoder.region_embeddings.feature_norm.*"),
            rename("bert.v_embeddings.image_location_embeddings.*", "encoder.region_embeddings.boxes.*"),
            rename("bert.v_embeddings.LocLayerNorm.*", "encoder.region_embeddings.box_norm.*"),
            *rules,
            rename("bert.t_pooler.dense.*", "encoder.pooler.dense.*"),
            drop("bert.v_pooler.dense.*", "the text's pooler alone is read"),
            *bert.vocabulary("cls.predictions", "vocabulary", words="bert.embeddings.word_embeddings.weight"),
            rename("cls.bi_seq_relationship.*", "matching.linear.*"),
            rename("cls.imagePredictions.transform.dense.*", "region_targets.transform.dense.*"),
            rename("cls.imagePredictions.transform.LayerNorm.*", "region_targets.transform.norm.*"),
            rename("cls.imagePredictions.decoder_dict.3.*", "region_targets.outputs.classes.*"),
            rename("cls.imagePredictions.decoder_dict.4.*", "region_targets.outputs.attributes.*"),
            rename("cls.imagePredictions.decoder_dict.5.*", "region_targets.outputs.features.*"),
            *_classifier("cls.qaPredictions.logit_fc", "answers"),
            *_classifier("clfs_dict.TASK1.logit_fc", "classifier"),
            *_classifier("clfs_dict.TASK15.logit_fc", "classifier_gqa"),
            *_classifier("clfs_dict.TASK12.logit_fc", "pair"),
            rename("clfs_dict.TASK8.*", "score.linear.*"),
            rename("clfs_dict.TASK13.*", "entailment.linear.*"),
            rename("clfs_dict.TASK10.*", "regions.linear.*"),
            rename("clfs_dict.TASK11.0.*", "regions_deep.dense.*"),
            rename("clfs_dict.TASK11.3.*", "regions_deep.output.*"),
            fresh("encoder.region_features.whiten.*", "not in the release: measured on the region store"),
        )
    )


def _describe_for_transformers(config: LxmertConfig, heads: HeadWeights) -> dict[str, Any]:
    def count_rows(part: str, output: str, otherwise: int) -> int:
        bias = heads.get(part, {}).get(f"{output}.bias")
        return otherwise if bias is None else len(bias)

    if heads.keys() & {"vocabulary", "matching", "region_targets"}:
        architecture = "LxmertForPreTraining"
    else:
        architecture = "LxmertForQuestionAnswering" if "answers" in heads else "LxmertModel"
    answers = count_rows("answers", "linear", 9500)
    return {
        "architectures": [architecture],
        "model_type": "lxmert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_qa_labels": answers,
        "num_object_labels": count_rows("region_targets", "outputs.classes", 1600),
        "num_attr_labels": count_rows("region_targets", "outputs.attributes", 400),
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_segments,
        "initializer_range": config.init_std,
        "l_layers": config.num_text_layers,
        "r_layers": config.num_region_layers,
        "x_layers": config.num_cross_layers,
        "visual_feat_dim": config.feature_size,
        "visual_pos_dim": 4,
        "task_mask_lm": "vocabulary" in heads,
        "task_matched": "matching" in heads,
        "task_obj_predict": "region_targets" in heads,
        "task_qa": "answers" in heads,
        "num_labels": answers,
    }


SPEC = ModelSpec(
    config=LxmertConfig,
    build=Lxmert,
    presets=PRESETS,
    inputs=inputs,
    layout="official",
    head_styles={
        ("official", "classify"): "gelu_norm",
        ("official", "pair"): "gelu_norm",
        ("official", "matching"): "plain",
        ("official", "vocabulary"): "bert",
        ("official", "region_targets"): "bert",
        # ours: the release has no such task or objective
        ("official", "score"): "linear",
        ("official", "regions"): "linear",
        ("official", "slots_regions"): "flickr",
        ("official", "projection"): "cvlp",
        ("volta", "classify"): "vilbert",
        ("volta", "pair"): "vilbert",
        ("volta", "matching"): "match_first",
        ("volta", "vocabulary"): "bert",
        ("volta", "region_targets"): "bert",
        ("volta", "score"): "linear",
        ("volta", "regions"): "linear",
    },
    keys={
        "official": _OFFICIAL,
        "official_finetuned": _FINETUNED,
        "transformers": _TRANSFORMERS,
        "volta": volta_keys(PRESETS["volta"]),
        "bert": _BERT,
    },
    answers={
        "official": AnswerList(
            file="data/vqa/trainval_label2ans.json of airsplay/lxmert (3,129 answers; for GQA "
            "data/gqa/trainval_label2ans.json, 1,842; for pre-training data/lxmert/all_ans.json, 9,500)",
            unknown="absent",
            fingerprints={
                3129: "b05467ee028c22da4547e880ae734786065c0395435ff561865187dc184c3b19",
                1842: "3ba2e3668760dfcfcfe40dc58711a7c551ca7da48be87a7fdd3fae9963f8264d",
                9500: "b12f511ca271f7d23fb45d639d5afb802ca5066f201311d97aaaf53f3f7739ea",
            },
        ),
        "volta": VOLTA_ANSWERS,
    },
    tasks={"vqa": {"loss": "bce"}, "nlvr2": {"joined": False}},
    carries_answers=True,  # release: load_lxmert_qa
    transformers=_describe_for_transformers,
)
