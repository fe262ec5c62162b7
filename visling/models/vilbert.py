"""ViLBERT: a text stream and a region stream, each a BERT of its own, that attend to one another in a few co-attention
layers.

One file although it is long: header, config, presets, module and key maps of one family, read side by side with its
paper and its release.

Paper    Lu, Batra, Parikh & Lee 2019 (arXiv 1908.02265), section 2; multi-task: Lu, Goswami, Rohrbach, Parikh & Lee
         2020 (arXiv 1912.02315).
Release  jiasenlu/vilbert_beta (first) and facebookresearch/vilbert-multi-task; VOLTA's `ctrl_vilbert` has the same form
         with equal widths.
Differs  The paper's figure draws a block as co-attention followed by self-attention in both streams; in the release the
         visual layer of a block has a number of its own and runs with the text layer that starts the next block, which
         is the same order in another notation. The feed-forward width of the region stream is its hidden width, not
         four times it. The image token is an ordinary region here: mean feature, whole box. We follow the release, so
         its checkpoints load.
Shapes   B rows, T tokens, R regions, U text rows, S region rows, Dt and Dr widths of the streams, Dp of the summary.
         Inside, a task token stands behind the tokens and the whole image behind the regions; attention does not care,
         and neither has a position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visling.checkpoints import bert
from visling.checkpoints.keymap import KeyMap, Rule, drop, fresh, rename
from visling.errors import ConfigError
from visling.models.base import KEPT_BY_RECIPES, VOLTA_ANSWERS, WHOLE, AnswerList, Encoder, ModelSpec
from visling.nn.coattention import CoAttentionLayer, GatedLayer
from visling.nn.dropout import Dropout
from visling.nn.embeddings import RegionFeatures, TextEmbeddings, with_whole_image, without_regions
from visling.nn.layers import LayerSizes, TransformerLayer, initialise
from visling.nn.packing import Packing, Reading, count_with_one_more, mark_read
from visling.nn.pooling import gather
from visling.nn.trace import Trace
from visling.types import EVERYTHING, Batch, Dims, Encoded, InputSpec, Reads, Regions, Text


@dataclass(frozen=True, kw_only=True)
class VilbertConfig:
    """Sizes of the encoder and what it expects of its input. Defaults: six co-attention layers on BERT base, as
    pre-trained."""

    vocab_size: int = 30522
    """Word pieces of bert-base-uncased."""
    hidden_size: int = 768
    """Dt, width of the text stream."""
    num_layers: int = 12
    """Self-attention layers of the text stream."""
    num_heads: int = 12
    """Of the text stream."""
    intermediate_size: int = 3072
    """Width inside the feed-forward blocks of the text stream."""
    max_positions: int = 512
    """Rows of the position table: the longest text."""
    num_segments: int = 2
    """Rows of the segment table."""
    region_hidden_size: int = 1024
    """Dr, width of the region stream."""
    num_region_layers: int = 6
    """Self-attention layers of the region stream."""
    num_region_heads: int = 8
    """Of the region stream."""
    region_intermediate_size: int = 1024
    """Width inside the feed-forward blocks of the region stream (release: not widened)."""
    co_attention_size: int = 1024
    """Width of queries, keys and values in the co-attention layers, all heads together."""
    num_co_attention_heads: int = 8
    """Of both directions."""
    pooled_size: int = 1024
    """Dp, width of each stream's summary."""
    text_layers_before: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    """Text layers that run before each co-attention layer; one entry per co-attention layer (release:
    `t_biattention_id`)."""
    region_layers_before: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Region layers that run before each co-attention layer (release: `v_biattention_id`)."""
    num_tasks: int = 0
    """Rows of the task table; above 0 every text must name its task (multi-task release: 20)."""
    gated_regions: bool = False
    """Whether the text gates the attention among regions (release: `dynamic_attention`, off)."""
    fusion: Literal["product", "sum"] = "product"
    """How the two summaries become one (release: product)."""
    norm_eps: float = 1e-12
    """Of every layer norm."""
    dropout_rate: float = 0.1
    """After embeddings and every block, both streams."""
    attention_dropout_rate: float = 0.1
    """On attention probabilities, both streams and co-attention."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices and tables in both streams; the release's
    `v_initializer_range` is never read."""
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
        for name, size, heads in (
            ("hidden_size", self.hidden_size, self.num_heads),
            ("region_hidden_size", self.region_hidden_size, self.num_region_heads),
            ("co_attention_size", self.co_attention_size, self.num_co_attention_heads),
        ):
            if size % heads:
                raise ConfigError(f"{name} must be a multiple of its number of heads; found {size} and {heads}.")
        for name, before, layers in (
            ("text_layers_before", self.text_layers_before, self.num_layers),
            ("region_layers_before", self.region_layers_before, self.num_region_layers),
        ):
            if list(before) != sorted(before) or not all(0 <= count <= layers for count in before):
                raise ConfigError(f"{name} must ascend within the {layers} layers of its stream; found {before}.")
        if len(self.text_layers_before) != len(self.region_layers_before):
            raise ConfigError(
                "text_layers_before and region_layers_before must name the same co-attention layers; "
                f"found {len(self.text_layers_before)} and {len(self.region_layers_before)}."
            )
        if self.max_tokens > self.max_positions:
            raise ConfigError(
                f"max_tokens {self.max_tokens} exceeds the {self.max_positions} rows of the position table. "
                "Raise max_positions too."
            )


def _connected(co_attentions: int, text_layers: int = 12, **changes: Any) -> VilbertConfig:
    """A released depth: the last text layers alternate with co-attention, one region layer to each."""
    return VilbertConfig(
        num_layers=text_layers,
        num_region_layers=co_attentions,
        text_layers_before=tuple(range(text_layers - co_attentions, text_layers)),
        region_layers_before=tuple(range(co_attentions)),
        **changes,
    )


_LARGE: Mapping[str, Any] = {"text_layers": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096}
_SMALL = VilbertConfig(
    hidden_size=96,
    num_layers=2,
    num_heads=6,
    intermediate_size=384,
    max_positions=128,
    region_hidden_size=96,
    num_region_layers=1,
    num_region_heads=6,
    region_intermediate_size=96,  # as in the release, the region stream is not widened
    co_attention_size=96,
    num_co_attention_heads=6,
    pooled_size=96,
    text_layers_before=(1, 2),
    region_layers_before=(0, 1),
    # Keeps attention scores at the size they have in BERT base, 0.02 times the root of the ratio of widths
    init_std=0.06,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    feature_size=256,
    whiten_features=True,
    max_tokens=64,
)
PRESETS: Mapping[str, VilbertConfig] = {
    # paper, table 2: depth; the release's `bert_base_<n>layer_<n>conect.json` and `bert_large_...`
    **{f"connect{count}": _connected(count) for count in (2, 4, 6, 8)},
    **{f"large_connect{count}": _connected(count, **_LARGE) for count in (2, 4, 6)},
    # first release, fine-tuning: its region counts include the whole image
    "vqa": _connected(6, max_tokens=16, max_regions=99),
    "vcr": _connected(6, max_tokens=80, max_regions=99),  # question to answer takes 60 tokens, answer to rationale 80
    "referring": _connected(6, max_tokens=20, max_regions=99),
    "retrieval": _connected(6, max_tokens=30, max_regions=99),
    # multi-task release, "12-in-1"
    "multitask": _connected(6, num_tasks=20, max_tokens=56, max_regions=100),  # 16 to 56 tokens, by task
    # VOLTA: equal widths in both streams
    "ctrl": _connected(
        6,
        max_tokens=38,
        region_hidden_size=768,
        num_region_heads=12,
        region_intermediate_size=3072,
        co_attention_size=768,
        num_co_attention_heads=12,
    ),
    # ours: from scratch on drawn scenes
    "scenes": dataclasses.replace(_SMALL, vocabulary="scenes", vocab_size=318),
    # ours: from scratch on a few thousand examples of one's own
    "small": dataclasses.replace(
        _SMALL,
        hidden_size=128,
        num_layers=3,
        num_heads=8,
        intermediate_size=512,
        region_hidden_size=128,
        num_region_heads=8,
        region_intermediate_size=128,
        co_attention_size=128,
        num_co_attention_heads=8,
        pooled_size=128,
        text_layers_before=(2, 3),
        dropout_rate=0.1,
        init_std=0.05,
        max_tokens=40,
    ),
    "tiny": dataclasses.replace(
        _SMALL,
        hidden_size=32,
        num_heads=2,
        intermediate_size=64,
        max_positions=64,
        region_hidden_size=24,
        num_region_layers=2,
        num_region_heads=3,
        region_intermediate_size=24,
        co_attention_size=40,
        num_co_attention_heads=4,
        pooled_size=32,
        text_layers_before=(0, 1),
        dropout_rate=0.1,
        feature_size=16,
        max_regions=36,
    ),
}
"""Released configurations at full size, VOLTA's controlled one, and ours."""


class Vilbert(Encoder):
    """Two streams with co-attention layers between; the summary joins a ReLU summary of each."""

    behind_regions = (WHOLE,)
    summarises_image = True

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.config = config
        text_size, region_size = config.hidden_size, config.region_hidden_size
        self.dims = Dims(text=text_size, regions=region_size, pooled=config.pooled_size)
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            num_segments=config.num_segments,
            hidden_size=text_size,
        )
        self.tasks = nn.Embedding(config.num_tasks, text_size) if config.num_tasks else None
        self.behind_text = ("[TASK]",) if config.num_tasks else ()
        self.text_norm = nn.LayerNorm(text_size, eps=config.norm_eps)
        self.region_features = RegionFeatures(config.feature_size, whiten=config.whiten_features)
        self.projection = nn.Linear(config.feature_size, region_size)
        self.box_projection = nn.Linear(5, region_size)
        self.region_norm = nn.LayerNorm(region_size, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout_rate)
        text, regions = LayerSizes.of(config), _region_sizes(config)
        self.text_layers = nn.ModuleList(TransformerLayer(text) for _ in range(config.num_layers))
        self.region_layers = nn.ModuleList(
            GatedLayer(text_size, regions) if config.gated_regions else TransformerLayer(regions)
            for _ in range(config.num_region_layers)
        )
        self.co_attention_layers = nn.ModuleList(
            CoAttentionLayer(
                text, regions, attention_size=config.co_attention_size, num_heads=config.num_co_attention_heads
            )
            for _ in config.text_layers_before
        )
        self.text_pooler = nn.Linear(text_size, config.pooled_size)
        self.region_pooler = nn.Linear(region_size, config.pooled_size)
        self.apply(partial(initialise, std=config.init_std))

    def forward(
        self,
        batch: Batch,
        *,
        capture: bool = False,
        reads: Reads = EVERYTHING,
        text_states: Tensor | None = None,
        region_states: Tensor | None = None,
    ) -> Encoded:
        """States of text, regions and the whole image; `pooled` joins the summaries of the whole image and of
        `text.answer_at`, or the first token.

        Captured states and maps have the task token, if any, behind the tokens and the whole image behind the regions.

        Args:
            text_states: what `encode_text` returned for these text rows; they are computed if not given.
            region_states: what `encode_regions` returned for these region rows.
        """
        config, trace = self.config, Trace(capture)
        text_rows = self._pack_text(batch.text)
        text = self._embed_text(batch.text, text_rows) if text_states is None else text_rows.pack(text_states)
        regions, region_rows = self._run_regions(batch, region_states)  # (Kr, Dr)
        text = trace.add_states("text_embeddings", text, text_rows, batch.text.row)
        regions = trace.add_states("region_embeddings", regions, region_rows)
        if text_states is None:
            text = self._through_first_layers(batch.text, text, text_rows, trace)
        text, text_rows = self._share_text(batch.text, text, text_rows)  # (Kt, Dt)
        answer_at = batch.text.answer_at
        if answer_at is not None and batch.text.row is not None:
            answer_at = answer_at[batch.text.row]

        text_spans = _spans(self._num_first_layers, *config.text_layers_before, config.num_layers)
        region_spans = _spans(0, *config.region_layers_before, config.num_region_layers)
        for number, layer in enumerate(self.co_attention_layers):
            text = self._through_text(text, text_rows, text_spans[number], trace)
            regions = self._through_regions(regions, region_rows, text, text_rows, region_spans[number], trace)
            here = trace.at(f"co_attention_layers.{number}")
            text, regions = layer(text, regions, text_rows, region_rows, here)
        read_text, read_regions = text_rows.read_all(), region_rows.read_all()
        if reads != EVERYTHING and not capture:
            read_text, read_regions = self._what_is_read(reads, text_rows, region_rows, answer_at)
        last = regions, region_rows, text, text_rows, region_spans[-1], trace
        regions = read_regions.rows.unpack_real(self._through_regions(*last, read=read_regions))  # (B, R + 1, Dr)
        text = read_text.rows.unpack_real(self._through_text(text, text_rows, text_spans[-1], trace, read=read_text))

        whole, summed_up = regions[:, -1], text[:, 0] if answer_at is None else gather(text, answer_at)
        return Encoded(
            text=text[:, : batch.text.ids.shape[1]],
            regions=regions[:, :-1],
            whole=whole,
            pooled=self._pool(summed_up, whole) if reads.pooled else summed_up[:, :0],
            maps=trace.maps(),
            attention=trace.attention(),
            states=trace.states(),
        )

    def encode_text(self, text: Text) -> Tensor:
        """States of the text rows, and of the task token behind them, before the first co-attention;
        (U, T + task, Dt)."""
        rows = self._pack_text(text)
        return rows.unpack(self._through_first_layers(text, self._embed_text(text, rows), rows, Trace(False)))

    def encode_regions(self, regions: Regions) -> Tensor:
        """Normed sums of the projected features and locations, the whole image behind the regions; (S, R + 1, Dr). In
        all releases the first region layer follows the first co-attention."""
        states, rows = self._embed_regions(regions)
        return rows.unpack(states)

    def encode_pairs(
        self, batch: Batch, text_states: Tensor | None, region_states: Tensor | None, *, reads: Reads = EVERYTHING
    ) -> Encoded:
        """The layers from the first co-attention on."""
        encoded: Encoded = self(batch, reads=reads, text_states=text_states, region_states=region_states)
        return encoded

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.embeddings.words

    def fit_features(self, features: Tensor) -> None:
        """Measure the whitening, if this preset whitens."""
        self.region_features.fit(features)

    @property
    def _num_first_layers(self) -> int:
        """Text layers before the first co-attention: a text of many images runs through them once (release:
        `fast_mode`)."""
        before = self.config.text_layers_before
        return before[0] if before else 0

    def _pack_text(self, text: Text) -> Packing:
        """Where the tokens, and the task token behind them, lie; (U, T + task)."""
        if self.tasks is None:
            return Packing.of(text.mask, text.count)
        count = count_with_one_more(text.count, len(text.mask))
        return Packing.of(F.pad(text.mask, (0, 1), value=True), count)

    def _embed_text(self, text: Text, rows: Packing) -> Tensor:
        """Normed sums of the word, position and segment vectors, the task's own vector behind them; packed,
        (Kt, Dt)."""
        states = self.embeddings(text.ids, text.segments)
        if (self.tasks is None) != (text.task is None):
            raise ConfigError(
                f"this model has {self.config.num_tasks} task tokens, and the texts name "
                f"{'no' if text.task is None else 'a'} task. Set text.task where num_tasks is above 0, and only there."
            )
        if self.tasks is not None:
            states = torch.cat([states, self.tasks(text.task)[:, None]], dim=1)
        embedded: Tensor = self.dropout(self.text_norm(rows.pack(states)))
        return embedded

    def _through_first_layers(self, text: Text, states: Tensor, rows: Packing, trace: Trace) -> Tensor:
        return self._through_text(states, rows, range(self._num_first_layers), trace, text.row)

    def _share_text(self, text: Text, states: Tensor, rows: Packing) -> tuple[Tensor, Packing]:
        """Packed states of the text rows as those of the batch's rows."""
        if text.row is None:
            return states, rows
        count = text.shared if self.tasks is None else count_with_one_more(text.shared, len(text.row))
        return rows.share(states, text.row, count)

    def _run_regions(self, batch: Batch, states: Tensor | None) -> tuple[Tensor, Packing]:
        """Packed states of the batch's region rows before the first co-attention; `states` as from
        `encode_regions`."""
        regions = batch.regions
        if regions is None:
            regions = without_regions(batch.text, self.config.feature_size, self.projection.weight)
        if states is None:
            packed, rows = self._embed_regions(regions)
        else:
            count = count_with_one_more(regions.count, len(regions.mask))
            rows = Packing.of(F.pad(regions.mask, (0, 1), value=True), count)
            packed = rows.pack(states)
        if regions.row is None:
            return packed, rows
        return rows.share(packed, regions.row, count_with_one_more(regions.shared, len(regions.row)))

    def _embed_regions(self, regions: Regions) -> tuple[Tensor, Packing]:
        """`encode_regions`, packed."""
        features, locations, rows = with_whole_image(regions, self.region_features, self.projection.weight.dtype)
        return self.dropout(self.region_norm(self.projection(features) + self.box_projection(locations))), rows

    def _what_is_read(
        self, reads: Reads, text_rows: Packing, region_rows: Packing, answer_at: Tensor | None
    ) -> tuple[Reading, Reading]:
        """Positions of both streams that are read after the last layers. `pooled` reads the whole image too."""
        first = text_rows.mask.new_zeros(len(text_rows.mask), dtype=torch.int64) if answer_at is None else answer_at
        text = mark_read(reads.text, text_rows.mask, first=first if reads.pooled else None)
        whole = first.new_full(first.shape, region_rows.mask.shape[1] - 1) if reads.whole or reads.pooled else None
        return text_rows.read(*text), region_rows.read(*mark_read(reads.regions, region_rows.mask, first=whole))

    def _through_text(
        self,
        text: Tensor,
        rows: Packing,
        numbers: Sequence[int],
        trace: Trace,
        row: Tensor | None = None,
        *,
        read: Reading | None = None,
    ) -> Tensor:
        """Packed text states through some layers; where `read` is given, only those that are read after the last."""
        for number in numbers:
            here, last = trace.at(f"text_layers.{number}", "text", row), number == numbers[-1]
            text = self.text_layers[number](text, rows, here, read=read if last else None)
        return text if numbers or read is None else read.take(text)

    def _through_regions(
        self,
        regions: Tensor,
        rows: Packing,
        text: Tensor,
        text_rows: Packing,
        numbers: Sequence[int],
        trace: Trace,
        *,
        read: Reading | None = None,
    ) -> Tensor:
        """The same for region states."""
        gating = (text, text_rows) if self.config.gated_regions else ()
        for number in numbers:
            here, last = trace.at(f"region_layers.{number}", "regions"), number == numbers[-1]
            regions = self.region_layers[number](regions, rows, *gating, here, read=read if last else None)
        return regions if numbers or read is None else read.take(regions)

    def _pool(self, text: Tensor, whole: Tensor) -> Tensor:
        """Summary (B, Dp) of a text state (B, Dt) and the whole image (B, Dr)."""
        summaries = F.relu(self.text_pooler(text)), F.relu(self.region_pooler(whole))
        return summaries[0] * summaries[1] if self.config.fusion == "product" else summaries[0] + summaries[1]


def _region_sizes(config: VilbertConfig) -> LayerSizes:
    """The numbers of the region stream's layers."""
    return dataclasses.replace(
        LayerSizes.of(config),
        hidden_size=config.region_hidden_size,
        num_heads=config.num_region_heads,
        intermediate_size=config.region_intermediate_size,
    )


def _spans(*stops: int) -> list[range]:
    """The layers between one stop and the next."""
    return [range(start, stop) for start, stop in pairwise(stops)]


def inputs(config: VilbertConfig) -> InputSpec:
    """What collate must deliver for a configuration."""
    return InputSpec(
        vocabulary=config.vocabulary,
        feature_size=config.feature_size,
        max_tokens=config.max_tokens,
        max_regions=config.max_regions,
        answer_slot="none",
        pair="rows",
        num_tasks=config.num_tasks,
    )


# Parts: encoder, vocabulary (masked language modelling), region_targets (masked regions), matching (alignment),
# classifier (VQA), classifier_gqa, pair (NLVR2), score (VCR, retrieval), entailment, regions (referring expressions).
_EMBEDDINGS = (
    *bert.REPAIRS,
    *bert.text_embeddings("bert.embeddings", "encoder.embeddings"),
    rename("bert.embeddings.LayerNorm.*", "encoder.text_norm.*"),
    rename("bert.v_embeddings.image_embeddings.*", "encoder.projection.*"),
    rename("bert.v_embeddings.image_location_embeddings.*", "encoder.box_projection.*"),
    rename("bert.v_embeddings.LayerNorm.*", "encoder.region_norm.*"),
    rename("bert.t_pooler.dense.*", "encoder.text_pooler.*"),
    rename("bert.v_pooler.dense.*", "encoder.region_pooler.*"),
)
_PRETRAINING = (
    *bert.vocabulary("cls.predictions", "vocabulary", words="bert.embeddings.word_embeddings.weight"),
    rename("cls.bi_seq_relationship.*", "matching.linear.*"),
    rename("cls.imagePredictions.transform.dense.*", "region_targets.transform.dense.*"),
    rename("cls.imagePredictions.transform.LayerNorm.*", "region_targets.transform.norm.*"),
)
_OURS, _THEIRS = "encoder.co_attention_layers.*", "bert.encoder.c_layer.*"
_ENCODER = (
    *_EMBEDDINGS,
    rename("bert.embeddings.task_embeddings.weight", "encoder.tasks.weight"),
    *bert.layer("bert.encoder.layer.*", "encoder.text_layers.*"),
    *bert.layer("bert.encoder.v_layer.*", "encoder.region_layers.*"),
    rename("bert.encoder.v_layer.*.attention.self.dyLinear_q.*", "encoder.region_layers.*.query_gate.*"),
    rename("bert.encoder.v_layer.*.attention.self.dyLinear_k.*", "encoder.region_layers.*.key_gate.*"),
    # In the release 1 is vision and 2 is text: the text's queries read the keys and values of the regions.
    rename(f"{_THEIRS}.biattention.query2.*", f"{_OURS}.text_attention.attention.query.*"),
    rename(f"{_THEIRS}.biattention.key1.*", f"{_OURS}.text_attention.attention.key.*"),
    rename(f"{_THEIRS}.biattention.value1.*", f"{_OURS}.text_attention.attention.value.*"),
    rename(f"{_THEIRS}.biOutput.dense2.*", f"{_OURS}.text_attention.output.*"),
    rename(f"{_THEIRS}.biOutput.LayerNorm2.*", f"{_OURS}.text_attention.norm.*"),
    rename(f"{_THEIRS}.biattention.query1.*", f"{_OURS}.region_attention.attention.query.*"),
    rename(f"{_THEIRS}.biattention.key2.*", f"{_OURS}.region_attention.attention.key.*"),
    rename(f"{_THEIRS}.biattention.value2.*", f"{_OURS}.region_attention.attention.value.*"),
    rename(f"{_THEIRS}.biOutput.dense1.*", f"{_OURS}.region_attention.output.*"),
    rename(f"{_THEIRS}.biOutput.LayerNorm1.*", f"{_OURS}.region_attention.norm.*"),
    drop(f"{_THEIRS}.biOutput.q_dense1.*", "the release never applies it"),
    drop(f"{_THEIRS}.biOutput.q_dense2.*", "the release never applies it"),
    rename(f"{_THEIRS}.t_intermediate.dense.*", f"{_OURS}.text_feed_forward.up.*"),
    rename(f"{_THEIRS}.t_output.dense.*", f"{_OURS}.text_feed_forward.down.*"),
    rename(f"{_THEIRS}.t_output.LayerNorm.*", f"{_OURS}.text_feed_forward.norm.*"),
    rename(f"{_THEIRS}.v_intermediate.dense.*", f"{_OURS}.region_feed_forward.up.*"),
    rename(f"{_THEIRS}.v_output.dense.*", f"{_OURS}.region_feed_forward.down.*"),
    rename(f"{_THEIRS}.v_output.LayerNorm.*", f"{_OURS}.region_feed_forward.norm.*"),
    *_PRETRAINING,
    rename("cls.imagePredictions.decoder.*", "region_targets.outputs.classes.*"),
    rename("vil_logit.*", "score.linear.*"),
    rename("vision_logit.*", "regions.linear.*"),
    drop("linguisic_logit.*", "no task of the release reads it"),
)
WEIGHT_NORM_CLASSIFIER = tuple(
    rename(f"vil_prediction.main.{theirs}.{name}", f"classifier.{ours}.{our_name}")
    for theirs, ours in ((0, "dense"), (3, "output"))
    for name, our_name in (("weight_g", "gain"), ("weight_v", "direction"), ("bias", "bias"))
)
"""The first release's classifier -> the "weight_norm" styles."""
_FIRST = KeyMap((*_ENCODER, *WEIGHT_NORM_CLASSIFIER))


def _gelu_norm(theirs: str, part: str) -> tuple[Rule, ...]:
    """A classifier of the multi-task release or VOLTA -> the "gelu_norm" style."""
    return (
        rename(f"{theirs}.logit_fc.0.*", f"{part}.dense.*"),
        rename(f"{theirs}.logit_fc.2.*", f"{part}.norm.*"),
        rename(f"{theirs}.logit_fc.3.*", f"{part}.linear.*"),
    )


_MULTITASK = KeyMap(
    (
        *_ENCODER,
        *_gelu_norm("vil_prediction", "classifier"),
        *_gelu_norm("vil_prediction_gqa", "classifier_gqa"),
        *_gelu_norm("vil_binary_prediction", "pair"),
        rename("vil_tri_prediction.*", "entailment.linear.*"),
    )
)
VOLTA_TASKS: Mapping[str, int] = {
    "classifier": 1,
    "score_coco": 7,
    "score": 8,
    "regions_refcoco": 9,
    "regions": 10,
    "regions_refcocog": 11,
    "pair": 12,
    "entailment": 13,
    "classifier_gqa": 15,
}
"""Part -> number of the task in VOLTA's files: VQA, COCO and Flickr30K retrieval, RefCOCO, RefCOCO+, RefCOCOg, NLVR2,
entailment, GQA."""


def volta_keys(text_layers_before: tuple[int, ...], num_layers: int) -> KeyMap:
    """VOLTA's layout of a schedule: every attention and every feed-forward block is a sub-layer with a number of its
    own.

    Text layers before the first co-attention take two numbers each; then each co-attention two, and two the text and
    the region layer after it. Of a layer the attention has the even number, the feed-forward the odd one; the region
    stream's weights are called `v_...`.

    Args:
        text_layers_before: one text layer after every co-attention, as in all released depths.
    """
    first = text_layers_before[0]
    assert text_layers_before == tuple(range(first, num_layers)), (
        f"VOLTA's numbering needs consecutive depths up to {num_layers}"
    )
    rules: list[Rule] = []
    for number in range(num_layers):
        at = 2 * number if number < first else 2 * first + 4 * (number - first) + 2
        rules += _volta_attention(at, "", f"encoder.text_layers.{number}.self_attention", reads="")
        rules += _volta_feed_forward(at + 1, "", f"encoder.text_layers.{number}.feed_forward")
    for number in range(num_layers - first):
        at, ours = 2 * first + 4 * number, f"encoder.co_attention_layers.{number}"
        rules += _volta_attention(at, "", f"{ours}.text_attention", reads="v_")
        rules += _volta_attention(at, "v_", f"{ours}.region_attention", reads="")
        rules += _volta_feed_forward(at + 1, "", f"{ours}.text_feed_forward")
        rules += _volta_feed_forward(at + 1, "v_", f"{ours}.region_feed_forward")
        rules += _volta_attention(at + 2, "v_", f"encoder.region_layers.{number}.self_attention", reads="v_")
        rules += _volta_feed_forward(at + 3, "v_", f"encoder.region_layers.{number}.feed_forward")
    return KeyMap(
        (
            *_EMBEDDINGS,
            *rules,
            *_PRETRAINING,
            rename("cls.imagePredictions.decoder_dict.0.*", "region_targets.outputs.classes.*"),
            *(rule for part, task in VOLTA_TASKS.items() for rule in _volta_head(f"clfs_dict.TASK{task}", part)),
        )
    )


def _volta_attention(at: int, queries: str, ours: str, *, reads: str) -> tuple[Rule, ...]:
    """Attention of one stream in sub-layer `at`; prefixes of the stream that asks and of the one that is read."""
    theirs = f"bert.encoder.layer.{at}"
    return (
        rename(f"{theirs}.attention_self.{queries}query.*", f"{ours}.attention.query.*"),
        rename(f"{theirs}.attention_self.{reads}key.*", f"{ours}.attention.key.*"),
        rename(f"{theirs}.attention_self.{reads}value.*", f"{ours}.attention.value.*"),
        rename(f"{theirs}.attention_output.{queries}dense.*", f"{ours}.output.*"),
        rename(f"{theirs}.attention_output.{queries}LayerNorm.*", f"{ours}.norm.*"),
    )


def _volta_feed_forward(at: int, stream: str, ours: str) -> tuple[Rule, ...]:
    theirs = f"bert.encoder.layer.{at}"
    return (
        rename(f"{theirs}.intermediate.{stream}dense.*", f"{ours}.up.*"),
        rename(f"{theirs}.output.{stream}dense.*", f"{ours}.down.*"),
        rename(f"{theirs}.output.{stream}LayerNorm.*", f"{ours}.norm.*"),
    )


def _volta_head(theirs: str, part: str) -> tuple[Rule, ...]:
    """A task's head: classifiers as in the multi-task release but for their width; regions by one linear layer or
    two."""
    if part.startswith(("classifier", "pair")):
        return _gelu_norm(theirs, part)
    return (
        rename(f"{theirs}.0.*", f"{part}.dense.*"),
        rename(f"{theirs}.3.*", f"{part}.output.*"),
        rename(f"{theirs}.weight", f"{part}.linear.weight"),
        rename(f"{theirs}.bias", f"{part}.linear.bias"),
    )


_BERT = KeyMap(
    (
        *bert.REPAIRS,
        *bert.text_embeddings("bert.embeddings", "encoder.embeddings"),
        rename("bert.embeddings.LayerNorm.*", "encoder.text_norm.*"),
        *bert.layer("bert.encoder.layer.*", "encoder.text_layers.*"),
        *bert.vocabulary(
            "cls.predictions", "vocabulary", words="bert.embeddings.word_embeddings.weight", second_bias=True
        ),
        drop("bert.pooler.**", "the release does not start from it: its summary is wider and another function"),
        drop("cls.seq_relationship.**", "the release does not start from it"),
        fresh("encoder.tasks.weight", "not in BERT: random"),
        fresh("encoder.region_features.whiten.*", "not in BERT: measured on the region store"),
        *(
            fresh(f"encoder.{name}.**", "not in BERT: random")
            for name in ("projection", "box_projection", "region_norm", "region_layers")
        ),
        *(
            fresh(f"encoder.{name}.**", "not in BERT: random")
            for name in ("co_attention_layers", "text_pooler", "region_pooler")
        ),
        *(fresh(f"{part}.**", "not in BERT: random") for part in ("matching", "region_targets")),
    )
)

_HEAD_STYLES: Mapping[str, str] = {
    "classify": "vilbert",
    "entailment": "linear",  # a part, not a kind: the multi-task release classifies three ways by one linear layer
    "score": "linear",
    "pair": "vilbert",
    "matching": "match_first",
    "regions": "linear",
    "region_targets": "bert",
    "vocabulary": "bert",
    "slots_regions": "flickr",  # ours
    "projection": "cvlp",  # ours
}
SPEC = ModelSpec(
    config=VilbertConfig,
    build=Vilbert,
    presets=PRESETS,
    inputs=inputs,
    layout="multitask",
    head_styles={
        **{("multitask", kind): style for kind, style in _HEAD_STYLES.items()},
        **{("volta", kind): style for kind, style in _HEAD_STYLES.items()},
        **{("first", kind): style for kind, style in _HEAD_STYLES.items() if kind not in ("entailment", "pair")},
        ("first", "classify"): "weight_norm",
    },
    keys={
        "multitask": _MULTITASK,
        "first": _FIRST,
        "volta": volta_keys(PRESETS["ctrl"].text_layers_before, PRESETS["ctrl"].num_layers),
        "bert": _BERT,
    },
    answers={
        "multitask": AnswerList(
            file="trainval_label2ans.pkl of the release's cache folder for the data set (VQA 3,129 answers, GQA 1,533)",
            unknown="absent",
        ),
        "volta": VOLTA_ANSWERS,
    },
    tasks={
        "vqa": {"loss": "bce"},
        "nlvr2": {"joined": False, "loss": "bce"},
        "referring": {"text": "raw", "loss": "overlap", "whole_image": True},
        # The encoder has no place for links: the release passes them on, but its attention ignores them.
        "vcr": {"loss": "softmax", "names": "drawn", "separated": True, "cut": "longer", "links": "none"},
    },
    # Retrieval and referring expressions have a number for each data set, VCR for each phase
    task_tokens={"vqa": 1, "nlvr2": 12, "gqa": 15},
    kept=KEPT_BY_RECIPES | {"num_tasks"},  # 12-in-1 adds its task table to a model that has none
)
