"""VL-BERT: one BERT in which every element of the sequence, word or region, has a visual feature in addition to its
word embedding.

One file although it is long: header, config, presets, module and key maps of one family, read side by side with its
paper and its release.

Paper    Su, Zhu, Cao, Li, Lu, Wei & Dai 2020 (arXiv 1908.08530), section 3.
Release  jackroos/VL-BERT, `common/visual_linguistic_bert.py`, `common/fast_rcnn.py` and the modules of each task.
Differs  The paper encodes the corners of a box, the release its centre and size; the release's base for the wavelengths
         is 1000. The release packs text and regions without a gap; here padding stays where it is and positions are
         counted from the real length of the text, with equal results. A row without any region and without a
         whole-image feature is read as text alone. We follow the release, so its checkpoints load.
Shapes   B rows, T tokens, R regions, S region rows, N = R + 1 regions and the whole image (0 without images), D hidden
         width, Dv width of the visual embeddings; feature_size is the width of the region features. The sequence is
         text, regions, whole image, [END].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visling.boxes import corners_to_centre, whole_image
from visling.checkpoints import bert
from visling.checkpoints.keymap import KeyMap, Rule, drop, fresh, rename, split
from visling.errors import ConfigError
from visling.models.base import KEPT_BY_RECIPES, WHOLE, AnswerList, Encoder, ModelSpec, TaskStart
from visling.nn.dropout import Dropout
from visling.nn.embeddings import RegionFeatures
from visling.nn.head_blocks import RegionScorer, RegionTargets, Scorer, Transform, TransformClassifier
from visling.nn.layers import LayerSizes, TransformerLayer, initialise, through_layers
from visling.nn.packing import Packing, count_with_one_more, read_joint
from visling.nn.pooling import FirstTokenPooler, gather
from visling.nn.trace import Trace
from visling.types import EVERYTHING, Batch, Dims, Encoded, InputSpec, Reads, Regions, Text

SCALE = 100.0
"""Coordinates, as shares of the image's width and height, are multiplied by this (release, `coordinate_embeddings`)."""
BASE = 1000.0
"""Ratio of the longest to the shortest wavelength; 10000 in Transformers."""
COUNT_EPS = 1e-5
"""Added to the number of regions that make the whole-image feature once any is hidden (release,
`conceptual_captions.py`)."""
NUM_SEGMENTS = 3
"""A and B for text, C for regions and [END]."""


@dataclass(frozen=True, kw_only=True)
class VlBertConfig:
    """Sizes of the encoder and what it expects of its input. Defaults: the release, base, on precomputed features."""

    vocab_size: int = 30522
    """Word pieces of bert-base-uncased."""
    hidden_size: int = 768
    """D."""
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    """Width inside the feed-forward blocks."""
    max_positions: int = 512
    """Rows of the position table: the longest text, and one each for the regions and [END]."""
    norm_eps: float = 1e-12
    """Of every layer norm."""
    dropout_rate: float = 0.1
    """After embeddings and every block."""
    attention_dropout_rate: float = 0.1
    """On attention probabilities."""
    feature_dropout_rate: float = 0.1
    """On geometry and feature of a region, before they are projected."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices and tables (BERT); narrow models need more for their
    attention to be more than an average."""
    feature_size: int = 2048
    """F, width of the region features in the store."""
    whiten_features: bool = False
    """Whiten region features by statistics of the training store before they are projected
    (`nn.embeddings.Whitening`)."""
    coordinate_size: int = 256
    """Wavelengths per coordinate of a box; the geometry of a region has eight times as many numbers."""
    visual_size: int = 768
    """Dv, width of a projected region; if it is not D, a further linear layer maps it to D (in no released file)."""
    visual_norm: bool = True
    """Normalise visual embeddings before they are added (all released configurations), or multiply them by a learned
    number."""
    visual_scale_init: float = 0.0
    """Initial weights of those norms, or initial value of those numbers: 0 switches the visual path off at the start
    (release)."""
    text_visual_scale_init: float = 0.0
    """The same for the visual vector of every word: the whole image, unless the word names a region."""
    masks_features: bool = True
    """Replace hidden features by a learned vector; False where pixels are hidden before features are extracted (end to
    end, unless `region_masking.cut_pixels` is off)."""
    vocabulary: str = "bert-base-uncased"
    """WordPiece vocabulary."""
    max_tokens: int = 64
    """Longest text row (release, pre-training)."""
    max_regions: int = 100
    """Regions used per image, the whole image not counted."""
    region_order: Literal["store", "confidence"] = "store"
    """As the store has them, or the most confident first (release, pre-training), so that `joint_limit` drops the least
    confident."""
    joint_limit: int | None = None
    """Most text pieces and regions together, the whole image counted."""
    answer_slot: Literal["none", "same_segment", "second_segment"] = "none"
    """Whether questions end in a [MASK] whose raw state answers (VQA release: in segment B)."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads; found {self.hidden_size} and {self.num_heads}."
            )
        if self.max_tokens + 2 > self.max_positions:
            raise ConfigError(
                f"max_tokens {self.max_tokens}, the regions and [END] take {self.max_tokens + 2} positions, but "
                f"max_positions is {self.max_positions}. Raise it, or lower max_tokens."
            )


_BASE = VlBertConfig()
_LARGE: Mapping[str, Any] = {
    "hidden_size": 1024,
    "num_layers": 24,
    "num_heads": 16,
    "intermediate_size": 4096,
    "visual_size": 1024,
}
_BASE_SIZED: Mapping[str, VlBertConfig] = {
    "prec": dataclasses.replace(_BASE, region_order="confidence", joint_limit=64),  # cfgs/pretrain/base_prec_*.yaml
    "e2e": dataclasses.replace(
        _BASE, region_order="confidence", joint_limit=64, masks_features=False
    ),  # cfgs/pretrain/base_e2e_*.yaml
    "vqa": dataclasses.replace(_BASE, max_tokens=128, answer_slot="second_segment"),  # cfgs/vqa: no limit on the length
    "refcoco": dataclasses.replace(_BASE, max_tokens=128, masks_features=False),  # cfgs/refcoco: no limit on the length
    "vcr": dataclasses.replace(_BASE, max_tokens=67, masks_features=False),  # cfgs/vcr: 64 pieces, one [CLS], two [SEP]
}
_SMALL = VlBertConfig(
    hidden_size=96,
    num_layers=3,
    num_heads=6,
    intermediate_size=384,
    max_positions=128,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,  # the fused CPU kernel knows none
    feature_dropout_rate=0.0,
    # Keeps attention scores at the size they have in BERT base, 0.02 times the root of the ratio of widths
    init_std=0.06,
    feature_size=256,
    whiten_features=True,
    coordinate_size=4,
    visual_size=96,
    # Non-zero from the start: there is no pre-trained text model to protect
    visual_scale_init=0.3,
    # Close to zero for words: a strong summary of the whole image keeps them from attending to single regions
    text_visual_scale_init=0.01,
    max_regions=36,
    answer_slot="second_segment",
)
PRESETS: Mapping[str, VlBertConfig] = {
    **{f"base_{name}": config for name, config in _BASE_SIZED.items()},
    **{f"large_{name}": dataclasses.replace(config, **_LARGE) for name, config in _BASE_SIZED.items()},
    # ours: from scratch on drawn scenes, with the part of BERT's vocabulary that they use
    "scenes": dataclasses.replace(_SMALL, vocabulary="scenes", vocab_size=318),
    # ours: from scratch on a few thousand examples of one's own
    "small": dataclasses.replace(
        _SMALL,
        hidden_size=128,
        num_layers=4,
        num_heads=8,
        intermediate_size=512,
        visual_size=128,
        dropout_rate=0.1,
        feature_dropout_rate=0.1,
        init_std=0.05,
        max_tokens=40,
    ),
    "tiny": dataclasses.replace(
        _SMALL,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_positions=66,  # 64 tokens, regions, [END]
        dropout_rate=0.1,
        feature_dropout_rate=0.1,
        feature_size=16,
        coordinate_size=4,
        visual_size=32,
    ),
}
"""Released configurations at full size, and ours."""


def geometry(boxes: Tensor, size: int) -> Tensor:
    """Sines and cosines of centre, width and height of each box.

    Args:
        boxes: (..., 4) unit corners.
        size: wavelengths per coordinate.
    Returns:
        (..., 8 * size): for x, y, width and height in turn, the sines of all wavelengths, then the cosines.
    Source:
        Release, `coordinate_embeddings`; the paper's visual geometry embedding (section 3.2) starts from the corners.
    """
    wavelengths = BASE ** (torch.arange(size, dtype=torch.float32, device=boxes.device) / size)
    angles = (corners_to_centre(boxes.float()) * SCALE)[..., None] / wavelengths  # (..., 4, size)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class RegionProjection(nn.Module):
    """The visual feature embedding of a region: geometry and appearance, concatenated, through one linear layer and
    ReLU."""

    def __init__(self, *, feature_size: int, coordinate_size: int, visual_size: int, dropout_rate: float) -> None:
        super().__init__()
        self.coordinate_size = coordinate_size
        self.dropout = Dropout(dropout_rate)
        self.linear = nn.Linear(8 * coordinate_size + feature_size, visual_size)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Features (K, F) and unit corners (K, 4) -> (K, Dv)."""
        placed = torch.cat([geometry(boxes, self.coordinate_size).to(features.dtype), features], dim=-1)
        return F.relu(self.linear(self.dropout(placed)))


class VisualPath(nn.Module):
    """Maps visual embeddings to the width and the scale of word embeddings, to which they are added."""

    def __init__(self, *, visual_size: int, hidden_size: int, norm: bool, norm_eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(visual_size, hidden_size) if visual_size != hidden_size else None
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps) if norm else None
        self.scale = None if norm else nn.Parameter(torch.zeros(()))

    def start_at(self, value: float) -> None:
        """Set the weights of the norm, or the number, to one value."""
        for weight in (self.scale, None if self.norm is None else self.norm.weight):
            if weight is not None:
                nn.init.constant_(weight, value)

    def forward(self, visual: Tensor) -> Tensor:
        """(..., Dv) -> (..., D)."""
        if self.linear is not None:
            visual = self.linear(visual)
        if self.scale is not None:
            return visual * self.scale
        assert self.norm is not None
        normed: Tensor = self.norm(visual)
        return normed


class JointEmbeddings(nn.Module):
    """Word, visual, segment and position vectors of every element, summed and normalised (paper, section 3.2)."""

    def __init__(self, config: VlBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_positions, width)
        # One row each: BERT has the first two only.
        self.segments = nn.ParameterList(torch.empty(1, width) for _ in range(NUM_SEGMENTS))
        self.end = nn.Parameter(torch.empty(1, width))
        path = partial(
            VisualPath,
            visual_size=config.visual_size,
            hidden_size=width,
            norm=config.visual_norm,
            norm_eps=config.norm_eps,
        )
        self.visual_text, self.visual_regions = path(), path()
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout_rate)

    def forward(
        self, text: Text, token_visual: Tensor, region_words: Tensor, region_visual: Tensor, region_rows: Packing
    ) -> tuple[Tensor, Packing]:
        """Embedded sequence (K, D), packed, and its rows (B, T + N + 1); [END] is last.

        Args:
            text: one row per batch row, real tokens first.
            token_visual: (B, T, Dv) visual embedding of each token, or (B, 1, Dv) of all tokens of a row.
            region_words: (B, N, D) token embeddings of the regions.
            region_visual: (B, N, Dv).
            region_rows: (B, N).
        Raises:
            ConfigError: the text is longer than the position table allows.
        """
        longest, most = text.ids.shape[1], self.positions.num_embeddings
        if longest + 2 > most:
            raise ConfigError(
                f"a text row has {longest} tokens, and regions and [END] need one position each, but the position "
                f"table holds {most}. Lower max_tokens or raise max_positions."
            )
        # All regions share the position after the row's own text; [END] has the one after, even without regions.
        length = text.mask.sum(1)  # (B,)
        segments = torch.cat(tuple(self.segments))  # (3, D)
        if token_visual.shape[1] == 1:
            visual_text = self.visual_text(token_visual)
        else:
            text_rows = Packing.of(text.mask, text.count)
            visual_text = text_rows.unpack(self.visual_text(text_rows.pack(token_visual)))
        tokens = self.words(text.ids) + self.positions.weight[:longest] + F.embedding(text.segments, segments)
        seen = region_rows.unpack(self.visual_regions(region_rows.pack(region_visual)))
        regions = region_words + seen + (self.positions(length) + segments[2])[:, None]
        end = (self.end + self.positions(length + 1) + segments[2])[:, None]
        mask = torch.cat([text.mask, region_rows.mask, text.mask.new_ones(len(length), 1)], dim=1)
        count = text.count + len(region_rows.at) + len(mask) if text.count is not None and region_rows.bounded else None
        rows = Packing.of(mask, count)
        states = self.dropout(self.norm(rows.pack(torch.cat([tokens + visual_text, regions, end], dim=1))))
        return states, rows


class VisualInputs(NamedTuple):
    """The visual half of every row's sequence; N = 0 where the batch has no images."""

    token_visual: Tensor
    """(B, T, Dv) visual embeddings of the tokens, or (B, 1, Dv) of all tokens of a row."""
    words: Tensor
    """(B, N, D) token embeddings of the regions."""
    visual: Tensor
    """(B, N, Dv) visual embeddings of the regions, the whole image last."""
    rows: Packing
    """(B, N)."""


class VlBert(Encoder):
    """Text, regions, whole image and [END] in one bidirectional stream."""

    behind_regions = (WHOLE, "[END]")

    def __init__(self, config: VlBertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.dims = Dims(text=width, regions=width, pooled=width)
        self.region_features = RegionFeatures(config.feature_size, whiten=config.whiten_features)
        self.projection = RegionProjection(
            feature_size=config.feature_size,
            coordinate_size=config.coordinate_size,
            visual_size=config.visual_size,
            dropout_rate=config.feature_dropout_rate,
        )
        self.image_word = nn.Parameter(torch.empty(1, width))  # [IMG]: the token embedding of every region
        self.mask_word = nn.Parameter(torch.empty(1, width))  # the same of hidden regions
        self.mask_feature = nn.Parameter(torch.zeros(1, config.feature_size)) if config.masks_features else None
        self.text_only = nn.Parameter(torch.empty(1, config.visual_size))  # visual embedding of words without an image
        self.embeddings = JointEmbeddings(config)
        self.layers = nn.ModuleList(TransformerLayer(LayerSizes.of(config)) for _ in range(config.num_layers))
        self.pooler = FirstTokenPooler(width)
        self._initialise()

    def forward(self, batch: Batch, *, capture: bool = False, reads: Reads = EVERYTHING) -> Encoded:
        """States of text, regions and whole image; `pooled` is the raw state at `text.answer_at` where given, else the
        pooled first token.

        Captured states and maps have the whole image, if there are images, and [END] behind the regions.
        """
        text = _rows_of(batch.text)
        seen = (
            self._without_images(text)
            if batch.regions is None
            else self._embed_images(batch.regions, batch.links, text)
        )
        num_tokens, num_regions = text.ids.shape[1], max(seen.rows.mask.shape[1] - 1, 0)
        states, rows = self.embeddings(text, seen.token_visual, seen.words, seen.visual, seen.rows)  # (K, D)
        trace = Trace(capture, num_tokens=num_tokens)
        states = trace.add_states("embeddings", states, rows)
        read = rows.read_all()
        if reads != EVERYTHING and not capture:
            read = read_joint(reads, rows, num_tokens=num_tokens, num_regions=num_regions, answer_at=text.answer_at)
        padded = read.rows.unpack_real(through_layers(self.layers, states, rows, trace, read=read))  # (B, T + N + 1, D)
        pooled = padded[:, 0, :0]
        if reads.pooled:
            pooled = self.pooler(padded) if text.answer_at is None else gather(padded, text.answer_at)
        return Encoded(
            text=padded[:, :num_tokens],
            regions=padded[:, num_tokens : num_tokens + num_regions],
            whole=None if batch.regions is None else padded[:, num_tokens + num_regions],
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

    def restart_second_segment(self) -> None:
        """Make segment B a copy of A, as VCR starts: pre-training never used B (release,
        `PARTIAL_PRETRAIN_SEGMB_INIT`)."""
        with torch.no_grad():
            self.embeddings.segments[1].copy_(self.embeddings.segments[0])

    def _initialise(self) -> None:
        std = self.config.init_std
        self.apply(partial(initialise, std=std))
        self.projection.linear.reset_parameters()  # the release leaves it to the framework
        for vector in (self.image_word, self.mask_word, self.text_only, self.embeddings.end, *self.embeddings.segments):
            nn.init.normal_(vector, std=std)
        self.embeddings.visual_text.start_at(self.config.text_visual_scale_init)
        self.embeddings.visual_regions.start_at(self.config.visual_scale_init)

    def _without_images(self, text: Text) -> VisualInputs:
        rows = len(text.ids)
        return VisualInputs(
            token_visual=self.text_only.expand(rows, 1, -1),
            words=self.image_word.new_empty(rows, 0, self.config.hidden_size),
            visual=self.image_word.new_empty(rows, 0, self.config.visual_size),
            rows=Packing.of(text.mask[:, :0], None if text.count is None else 0),
        )

    def _embed_images(self, regions: Regions, links: Tensor | None, text: Text) -> VisualInputs:
        """Regions and whole image of every row, and the visual embedding of each token."""
        visual, words, rows = self._embed_regions(regions)
        if (row := regions.row) is not None:
            count = count_with_one_more(regions.shared, len(row))
            visual, words, rows = visual[row], words[row], Packing.of(rows.mask[row], count)
        whole = visual[:, -1:]  # (B, 1, Dv)
        token_visual = whole if links is None else _linked(links, visual[:, :-1], otherwise=whole)
        token_visual = torch.where(rows.mask[:, -1:, None], token_visual, self.text_only)
        return VisualInputs(token_visual=token_visual, words=words, visual=visual, rows=rows)

    def _embed_regions(self, regions: Regions) -> tuple[Tensor, Tensor, Packing]:
        """Visual embeddings (S, N, Dv), token embeddings (S, N, D) and rows (S, N) of the regions and, last, the whole
        image."""
        dtype = self.image_word.dtype
        real, whole = Packing.of(regions.mask, regions.count), regions.whole
        features = real.unpack(self.region_features(real.pack(regions.features), dtype))  # (S, R, F)
        if whole is None:
            whole, present = _whole_image(features, regions.mask, regions.hidden), regions.mask.any(1)
        else:
            whole, present = self.region_features(whole, dtype), regions.mask.new_ones(len(whole))
        words = self.image_word.expand(*regions.mask.shape, -1)
        if regions.hidden is not None:
            words = torch.where(regions.hidden[..., None], self.mask_word, words)
            if self.mask_feature is not None:
                features = torch.where(regions.hidden[..., None], self.mask_feature, features)
        mask = torch.cat([regions.mask, present[:, None]], dim=1)
        rows = Packing.of(mask, count_with_one_more(regions.count, len(mask)))
        features = torch.cat([features, whole[:, None]], dim=1)
        boxes = torch.cat([regions.boxes, whole_image(regions.size)], dim=1)
        visual = rows.unpack(self.projection(rows.pack(features), rows.pack(boxes)))
        words = torch.cat([words, self.image_word.expand(len(words), 1, -1)], dim=1)
        return visual, words, rows


def _rows_of(text: Text) -> Text:
    """The text of every batch row; tokens have the visual embedding of their own row's image, so shared texts are
    repeated before they are embedded."""
    if text.row is None:
        return text
    answer_at = None if text.answer_at is None else text.answer_at[text.row]
    return Text(
        ids=text.ids[text.row],
        mask=text.mask[text.row],
        segments=text.segments[text.row],
        answer_at=answer_at,
        count=text.shared,
    )


def _whole_image(features: Tensor, mask: Tensor, hidden: Tensor | None) -> Tensor:
    """Mean feature (S, F) of the regions that are real and not hidden; zero where there are none."""
    counted = mask if hidden is None else mask & ~hidden
    count = counted.sum(1, keepdim=True).float()
    if hidden is not None:
        count = count + COUNT_EPS * (mask & hidden).any(1, keepdim=True)
    total = features.masked_fill(~counted[..., None], 0.0).sum(1, dtype=torch.float32)
    return (total / count.clamp(min=COUNT_EPS)).to(features.dtype)


def _linked(links: Tensor, visual: Tensor, *, otherwise: Tensor) -> Tensor:
    """Mean visual embedding of the regions that each token names, (B, T, Dv); `otherwise` where it names none. The
    release allows one region."""
    weights = links.to(visual.dtype)
    count = weights.sum(-1, keepdim=True)
    return torch.where(count > 0, weights @ visual / count.clamp(min=1), otherwise)


def inputs(config: VlBertConfig) -> InputSpec:
    """What collate must deliver for a configuration."""
    return InputSpec(
        vocabulary=config.vocabulary,
        feature_size=config.feature_size,
        max_tokens=config.max_tokens,
        max_regions=config.max_regions,
        region_order=config.region_order,
        joint_limit=config.joint_limit,
        answer_slot=config.answer_slot,
    )


def start_task(task: TaskStart) -> list[str]:
    """What the release does before a fine-tuning, in addition to loading the encoder; returns what was done.

    VQA: the transform of the answer head is that of masked words, and its output weights are the word vectors of the
    answers (`CLASSIFIER_PRETRAINED`). Referring expressions, and the classes of VCR's regions: the transform is that of
    masked regions (`PARTIAL_PRETRAIN_PREFIX_CHANGES`). VCR: segment B starts as A (`PARTIAL_PRETRAIN_SEGMB_INIT`), and
    a choice is scored by how much more likely pre-training held text and image to match than not, if it learned that.
    """
    assert isinstance(task.encoder, VlBert)
    words = dict(task.objectives.get("masked_lm", {}))
    regions = {
        name.removeprefix("transform."): tensor for name, tensor in task.objectives.get("masked_regions", {}).items()
    }
    done = []
    for name, head in task.heads.items():
        if isinstance(head, TransformClassifier) and task.answers:
            if _take_over(head.transform, words):
                done.append(f"the transform of head {name} starts from that of masked words")
            head.start_from_words(task.encoder.word_embeddings, task.answers)
            done.append(f"the {len(task.answers)} answers of head {name} start from their word vectors")
        elif isinstance(head, RegionScorer | RegionTargets) and _take_over(head.transform, regions):
            done.append(f"the transform of head {name} starts from that of masked regions")
        elif isinstance(head, Scorer) and (matching := task.objectives.get("matching")):
            with torch.no_grad():
                for kind, parameter in head.linear.named_parameters():
                    unlike, alike = matching[f"linear.{kind}"]
                    parameter.copy_((alike - unlike)[None])
            done.append(f"head {name} starts from that of matching")
    if "score" in task.kinds.values():
        task.encoder.restart_second_segment()
        done.append("segment B, which pre-training never uses, starts as a copy of A")
    return done


def _take_over(transform: Transform, trained: Mapping[str, Tensor]) -> bool:
    """Load the transform of another head, if there is one of the same shape."""
    own = transform.state_dict()
    if any(name not in trained or trained[name].shape != tensor.shape for name, tensor in own.items()):
        return False
    transform.load_state_dict({name: trained[name] for name in own})
    return True


_SEGMENTS = [f"encoder.embeddings.segments.{number}" for number in range(NUM_SEGMENTS)]
_STORE_REGIONS = "the trained convolutional network, which vision/end_to_end.py reads (`--backbone`)"


def _encoder(prefix: str = "vlbert") -> tuple[Rule, ...]:
    """The encoder in a released file, whose Transformer has this prefix; and what the file does not hold."""
    return (
        *bert.REPAIRS,
        rename(f"{prefix}.word_embeddings.weight", "encoder.embeddings.words.weight"),
        rename(f"{prefix}.position_embeddings.weight", "encoder.embeddings.positions.weight"),
        split(f"{prefix}.token_type_embeddings.weight", _SEGMENTS),
        rename(f"{prefix}.end_embedding.weight", "encoder.embeddings.end"),
        rename(f"{prefix}.embedding_LayerNorm.*", "encoder.embeddings.norm.*"),
        *(
            rule
            for theirs, ours in (("text", "text"), ("object", "regions"))
            for rule in (
                rename(f"{prefix}.visual_ln_{theirs}.*", f"encoder.embeddings.visual_{ours}.norm.*"),
                rename(f"{prefix}.visual_1x1_{theirs}.*", f"encoder.embeddings.visual_{ours}.linear.*"),
                rename(f"{prefix}.visual_scale_{theirs}", f"encoder.embeddings.visual_{ours}.scale"),
            )
        ),
        *bert.layer(f"{prefix}.encoder.layer.*", "encoder.layers.*"),
        rename(f"{prefix}.pooler.dense.*", "encoder.pooler.dense.*"),
        rename("image_feature_extractor.obj_downsample.1.*", "encoder.projection.linear.*"),
        rename("object_linguistic_embeddings.weight", "encoder.image_word"),
        rename("object_mask_word_embedding.weight", "encoder.mask_word"),
        rename("object_mask_visual_embedding.weight", "encoder.mask_feature"),
        rename("aux_text_visual_embedding.weight", "encoder.text_only"),
        drop("image_feature_extractor.backbone.**", _STORE_REGIONS),
        drop("image_feature_extractor.roi_head_feature_extractor.**", _STORE_REGIONS),
        drop("image_feature_extractor.head.0.**", "the same tensors as roi_head_feature_extractor"),
        fresh("encoder.pooler.dense.*", "pre-training, VQA and RefCOCO+ have no pooler: BERT's, or random"),
        fresh("encoder.mask_word", "fine-tuned files lack what only pre-training reads"),
        fresh("encoder.mask_feature", "files that were fine-tuned, or pre-trained end to end, hide no features"),
        fresh(
            "encoder.text_only",
            "files that were fine-tuned, or pre-trained on captions alone, know no text without an image",
        ),
    )


_WORDS = "vlbert.word_embeddings.weight"
_OBJECTIVES = (
    *bert.vocabulary("vlbert.mlm_head.predictions", "vocabulary", words=_WORDS),
    rename("vlbert.mvrc_head.transform.dense.*", "region_targets.transform.dense.*"),
    rename("vlbert.mvrc_head.region_cls_pred.*", "region_targets.outputs.classes.*"),
    rename("vlbert.relationsip_head.caption_image_relationship.*", "matching.linear.*"),
)


def _start(*rules: Rule, reason: str) -> KeyMap:
    """A pre-trained file as the start of a task: a head's transform moves, output layers stay behind (release,
    `PARTIAL_PRETRAIN_PREFIX_CHANGES`)."""
    return KeyMap(
        (
            *_encoder(),
            *rules,
            drop("vlbert.mlm_head.**", "predicts words"),
            drop("vlbert.mvrc_head.**", "predicts classes of regions"),
            drop("vlbert.relationsip_head.**", "predicts whether caption and image match"),
            fresh("classifier.linear.*", reason),
            fresh("regions.linear.*", reason),
            fresh("objects.outputs.**", reason),
        )
    )


# Parts: encoder; in pre-training vocabulary (masked words), region_targets (masked regions), matching (relationship, in
# no released file); in tasks classifier (VQA's answers, VCR's scores), regions (referring expressions), objects (VCR's
# classes of all regions).
_OFFICIAL = KeyMap((*_encoder(), *_OBJECTIVES))
_VQA = KeyMap(
    (
        *_encoder(),
        rename("final_mlp.0.dense.*", "classifier.transform.dense.*"),
        rename("final_mlp.0.LayerNorm.*", "classifier.transform.norm.*"),
        rename("final_mlp.2.*", "classifier.linear.*"),
    )
)
_REFCOCO = KeyMap(
    (
        *_encoder(),
        rename("final_mlp.0.dense.*", "regions.transform.dense.*"),
        rename("final_mlp.2.*", "regions.linear.*"),
    )
)
_VCR = KeyMap(
    (
        *_encoder("vlbert._module"),
        rename("final_mlp.1.*", "classifier.linear.*"),
        rename("cnn_loss_reg.0.dense.*", "objects.transform.dense.*"),
        rename("cnn_loss_reg.2.*", "objects.outputs.classes.*"),
    )
)
_BERT = KeyMap(
    (
        split("bert.embeddings.token_type_embeddings.weight", _SEGMENTS[:2]),
        rename("bert.embeddings.LayerNorm.*", "encoder.embeddings.norm.*"),
        *bert.RELEASE,
        fresh(_SEGMENTS[2], "BERT has no third segment: random"),
        fresh("encoder.embeddings.end", "not in BERT: random"),
        fresh("encoder.embeddings.visual_*.**", "not in BERT: silent until it is trained"),
        fresh("encoder.projection.linear.*", "not in BERT: random"),
        fresh("encoder.region_features.whiten.*", "not in BERT: measured on the region store"),
        fresh("encoder.image_word", "not in BERT: random"),
        fresh("encoder.mask_*", "not in BERT: random word, zero feature"),
        fresh("encoder.text_only", "not in BERT: random"),
        fresh("region_targets.**", "not in BERT: random"),
    )
)

SPEC = ModelSpec(
    config=VlBertConfig,
    build=VlBert,
    presets=PRESETS,
    inputs=inputs,
    layout="official",
    head_styles={
        ("official", "vocabulary"): "bert",
        ("official", "region_targets"): "vlbert",
        ("official", "matching"): "plain",
        ("official", "classify"): "vlbert",
        ("official", "score"): "vlbert",
        ("official", "regions"): "vlbert",
        ("official", "pair"): "linear",  # ours: the release has no task with two images
        ("official", "slots_regions"): "flickr",  # ours: nor one with phrases
        ("official", "projection"): "cvlp",  # ours: nor a contrastive objective
    },
    keys={
        "official": _OFFICIAL,
        "vqa": _VQA,
        "refcoco": _REFCOCO,
        "vcr": _VCR,
        "vqa_start": _start(
            rename("vlbert.mlm_head.predictions.transform.dense.*", "classifier.transform.dense.*"),
            rename("vlbert.mlm_head.predictions.transform.LayerNorm.*", "classifier.transform.norm.*"),
            reason="starts from the word vectors of the answers (`start_from_words`)",
        ),
        "refcoco_start": _start(
            rename("vlbert.mvrc_head.transform.dense.*", "regions.transform.dense.*"), reason="random"
        ),
        "vcr_start": _start(rename("vlbert.mvrc_head.transform.dense.*", "objects.transform.dense.*"), reason="random"),
        "bert": _BERT,
    },
    answers={
        "official": AnswerList(
            file="answers_vqa.txt of its VQA data (3,129 lines, <unk> among them)", unknown="listed"
        ),
    },
    tasks={
        "vqa": {"loss": "bce", "mask_unknown": False},  # its test predictions may be <unk>
        "nlvr2": {"joined": False},  # ours: the release has no task with two images
        "referring": {"text": "tokens", "loss": "positive", "whole_image": True},
        "vcr": {
            "loss": "sigmoid",
            "names": "listed",
            "conjunction": True,
            "links": "every_piece",
            "cut": "shared",
            "class_weight": 1.0,
        },
    },
    kept=KEPT_BY_RECIPES
    | {"feature_dropout_rate", "visual_scale_init", "text_visual_scale_init"}
    | {"region_order", "joint_limit", "answer_slot"},
    start_task=start_task,
)
