"""CVLP: LXMERT trained by contrast. A key network, a momentum copy that skips layers at random, gives the embedding
that each region should have.

Paper    Shi, Shuang, Geng et al. 2020 (arXiv 2007.13135).
Release  gao-peng-cuhk/CVLP-, `lxrt/modeling`; its pre-training script is in earlier commits only.
Differs  The paper drops layers of the key network with probability 0.5. The release (`LXRTEncoderSeus`) replaces two
         layers by one successor; the successor follows the first of them, so this amounts to dropping the second,
         apart from its start as a copy of another layer, which fades. Default: dropping; the release's way is
         `key_layers = "replace"`. A rate that grows is computed in the release and never read. The paper starts both
         networks alike; the release, from scratch, re-initialises the query network alone, so that its key network
         starts from BERT's text weights. Here they start alike, or apart by `key_start = "init"` of region contrast.
         The query network is the release's and the paper's LXMERT; its loss, temperature, queue and momentum are in
         `objectives.region_contrast`.
Shapes   As in `lxmert`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visling import runtime
from visling.checkpoints.keymap import KeyMap, Rule, rename
from visling.errors import ConfigError
from visling.models import lxmert
from visling.models.base import KEPT_BY_RECIPES, Encoder, ModelSpec
from visling.models.lxmert import Lxmert, LxmertConfig
from visling.nn.momentum import MomentumCopy
from visling.types import EVERYTHING, Batch, Encoded, InputSpec, Reads, Regions, Text


@dataclass(frozen=True, kw_only=True)
class CvlpConfig(LxmertConfig):
    """LXMERT's settings, and how the key network skips layers. Defaults: the release's sizes, the paper's way."""

    key_layers: Literal["drop", "replace"] = "drop"
    """Skip every second layer of a stream at random but never its last (paper), or let a successor replace two
    (release)."""
    key_drop_rate: float = 0.5
    """Probability for each such layer, drawn for all examples of an update together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_layers not in ("drop", "replace"):
            raise ConfigError(f"key_layers must be drop or replace; found {self.key_layers!r}.")
        if not 0 <= self.key_drop_rate <= 1:
            raise ConfigError(f"key_drop_rate must lie in [0, 1]; found {self.key_drop_rate}.")
        counts = (self.num_text_layers, self.num_region_layers, self.num_cross_layers)
        if self.key_layers == "replace" and not all(count % 2 for count in counts):
            raise ConfigError(
                "successors replace pairs of layers before a last one: key_layers = 'replace' needs "
                f"odd numbers; found {counts}."
            )


def _of(config: LxmertConfig, **changes: Any) -> CvlpConfig:
    """LXMERT's settings as ours."""
    return CvlpConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | changes)


PRESETS: Mapping[str, CvlpConfig] = {
    "base": CvlpConfig(),  # all released files
    "base_replace": CvlpConfig(key_layers="replace"),  # key files with their successors
    # ours; a stream of three layers is the shortest of which one can be left out, and a third text layer costs least
    "scenes": _of(lxmert.PRESETS["scenes"], num_text_layers=3),
    "small": _of(lxmert.PRESETS["small"]),
    "tiny": _of(lxmert.PRESETS["tiny"]),
}
"""Released configurations at full size, and ours. Fine-tuned files have the size of "base"."""


class Cvlp(Encoder):
    """The query network: LXMERT as it is."""

    def __init__(self, config: CvlpConfig) -> None:
        super().__init__()
        self.config = config
        self.lxmert = Lxmert(config)
        self.dims = self.lxmert.dims

    def forward(
        self,
        batch: Batch,
        *,
        capture: bool = False,
        reads: Reads = EVERYTHING,
        text_states: Tensor | None = None,
        region_states: Tensor | None = None,
    ) -> Encoded:
        """States of text and regions; `pooled` summarises the first token.

        Args:
            text_states: what `encode_text` returned for these text rows; they are computed if not given.
            region_states: what `encode_regions` returned for these region rows.
        """
        encoded: Encoded = self.lxmert(
            batch, capture=capture, reads=reads, text_states=text_states, region_states=region_states
        )
        return encoded

    def encode_text(self, text: Text) -> Tensor:
        """States of the text rows before they meet any region, (S, T, D)."""
        return self.lxmert.encode_text(text)

    def encode_regions(self, regions: Regions) -> Tensor:
        """States of the region rows before they meet any text, (S, R, D)."""
        return self.lxmert.encode_regions(regions)

    def encode_pairs(
        self, batch: Batch, text_states: Tensor | None, region_states: Tensor | None, *, reads: Reads = EVERYTHING
    ) -> Encoded:
        """The cross-modality layers alone."""
        return self.lxmert.encode_pairs(batch, text_states, region_states, reads=reads)

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.lxmert.word_embeddings

    def fit_features(self, features: Tensor) -> None:
        """Measure the whitening, if this preset whitens."""
        self.lxmert.fit_features(features)

    def momentum_copy(self, momentum: float) -> MomentumCopy:
        """The key network with this network's weights, which then follows it."""
        return MomentumCopy(KeyNetwork(self), momentum=momentum, source_name=followed)


_PATH = 0x70617468
"""Key that keeps the draws of skipped layers apart from other ones."""

STREAMS = ("region_layers", "text_layers", "cross_layers")
"""In the order in which the release draws what is left out."""


class KeyNetwork(nn.Module):
    """A copy of the query network that skips layers at random in training.

    Layers 2i and 2i + 1 of a stream, its last layer excepted, are pair i. Drop: a chosen pair runs its first layer
    only. Replace: a chosen pair is replaced by successor i. In evaluation all layers run or, as in the release, nothing
    but successors where there are any.
    """

    def __init__(self, query: Cvlp) -> None:
        super().__init__()
        config = query.config
        self.lxmert = copy.deepcopy(query.lxmert)
        self.drop_rate = config.key_drop_rate
        self.pairs = tuple((stream, i) for stream in STREAMS for i in range((len(self._layers(stream)) - 1) // 2))
        self._seed = torch.initial_seed() % 2**32  # that of the run: it builds its model on all processes alike
        self.typical = False
        """Whether training shortens what `use_typical_path` says instead of what is drawn."""
        self.draw_path(0)
        self.successors = (
            nn.ModuleDict({stream: self._successors(stream) for stream in STREAMS})
            if config.key_layers == "replace"
            else None
        )

    def forward(
        self,
        batch: Batch,
        *,
        capture: bool = False,
        reads: Reads = EVERYTHING,
        chosen: Sequence[bool] | None = None,
    ) -> Encoded:
        """States as the query network has them.

        Args:
            chosen: for each of `pairs` whether it is shortened in this call; None = in training, what was drawn last.
        """
        if chosen is None and self.training:
            chosen = self.path
        encoded: Encoded = self.lxmert(batch, capture=capture, reads=reads, replacements=self._replacements(chosen))
        return encoded

    def draw_path(self, number: int) -> None:
        """Draw which pairs are shortened in training from now on; it depends on the run's seed and this number alone.

        On the CPU: it drives Python control flow without a device sync.
        """
        if not self.typical:
            drawn = runtime.generator_for(self._seed, _PATH, number).random(len(self.pairs))
            self.path: tuple[bool, ...] = tuple((drawn < self.drop_rate).tolist())
            """For each of `pairs` whether training shortens it."""

    def use_typical_path(self) -> None:
        """Shorten every other pair, as many as on average, whatever is drawn."""
        self.typical, self.path = True, tuple(bool(number % 2) for number in range(len(self.pairs)))

    def _replacements(self, chosen: Sequence[bool] | None) -> lxmert.Replacements:
        replaced: dict[str, nn.Module | None] = {}
        for (stream, i), shortened in zip(
            self.pairs, [self.successors is not None] * len(self.pairs) if chosen is None else chosen, strict=True
        ):
            if shortened:
                replaced[f"{stream}.{2 * i + 1}"] = None
                if self.successors is not None:
                    replaced[f"{stream}.{2 * i}"] = self.successors[stream].get_submodule(str(i))
        if self.successors is not None and chosen is None:
            for stream in STREAMS:
                last = len(self._layers(stream)) - 1
                replaced[f"{stream}.{last}"] = self.successors[stream].get_submodule(str(last // 2))
        return replaced

    def _layers(self, stream: str) -> nn.ModuleList:
        layers = self.lxmert.get_submodule(stream)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def _successors(self, stream: str) -> nn.ModuleList:
        """Successor i starts as layer i, though it will follow layer 2i; the last as the last layer (release)."""
        layers = self._layers(stream)
        starts = [*range(len(layers) // 2), len(layers) - 1]
        return nn.ModuleList(copy.deepcopy(layers[number]) for number in starts)


def followed(name: str) -> str:
    """Name in the query network of what a parameter of the key network follows: its namesake; successor i follows layer
    2i."""
    part, _, rest = name.partition(".")
    if part != "successors":
        return name
    stream, number, rest = rest.split(".", 2)
    return f"lxmert.{stream}.{2 * int(number)}.{rest}"


def inputs(config: CvlpConfig) -> InputSpec:
    """What collate must deliver for a configuration."""
    return lxmert.inputs(config)


# Parts: LXMERT's, and projection (regions) and text_projection, which the release computes and never reads. A key file
# fills `KeyNetwork.lxmert` as encoder, `KeyNetwork.successors` as successors if there are any, and the key's
# projection.
_PROJECTIONS = tuple(
    rename(f"{theirs}.logit_fc.{number}.*", f"{ours}.{name}.*")
    for theirs, ours in (("visual_embed_head", "projection"), ("lang_embed_head", "text_projection"))
    for number, name in ((0, "dense"), (2, "norm"), (3, "linear"))
)


def _inside(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """LXMERT's rules for an encoder that holds an LXMERT."""
    return tuple(
        dataclasses.replace(
            rule,
            ours=tuple(
                f"encoder.lxmert.{name.removeprefix('encoder.')}" if name.startswith("encoder.") else name
                for name in rule.ours
            ),
        )
        for rule in rules
    )


def _successor_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """LXMERT's rules for layers, read for the successors of layers."""
    names = {
        "layer": ("scc_layer_l", "text_layers"),
        "r_layers": ("scc_layer_r", "region_layers"),
        "x_layers": ("scc_layer_x", "cross_layers"),
    }
    return tuple(
        rename(
            rule.theirs[0].replace(f"bert.encoder.{theirs}.", f"bert.encoder.{successor}."),
            rule.ours[0].replace("encoder.", "successors.", 1),
        )
        for theirs, (successor, stream) in names.items()
        for rule in rules
        if rule.kind == "move" and rule.ours[0].startswith(f"encoder.{stream}.")
    )


_LXMERT = {layout: keys.rules for layout, keys in lxmert.SPEC.keys.items()}

SPEC = ModelSpec(
    config=CvlpConfig,
    build=Cvlp,
    presets=PRESETS,
    inputs=inputs,
    layout="official",
    head_styles={
        **{(layout, kind): style for (layout, kind), style in lxmert.SPEC.head_styles.items() if layout == "official"},
        ("official", "projection"): "cvlp",
    },
    keys={
        "official": KeyMap((*_inside(_LXMERT["official"]), *_PROJECTIONS)),
        "official_key": KeyMap((*_LXMERT["official"], *_PROJECTIONS, *_successor_rules(_LXMERT["official"]))),
        "official_finetuned": KeyMap(_inside(_LXMERT["official_finetuned"])),
        "bert": KeyMap(_inside(_LXMERT["bert"])),
    },
    answers=lxmert.SPEC.answers,
    tasks={"vqa": {"loss": "bce"}, "nlvr2": {"joined": False}},
    carries_answers=True,  # release: load_lxmert_qa, as in LXMERT's
    loads_from=("lxmert",),  # its query network is an LXMERT
    kept=KEPT_BY_RECIPES | {"key_layers", "key_drop_rate"},  # of the key network, which only pre-training has
)
