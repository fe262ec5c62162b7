"""Networks that compute the features of regions from pixels and are trained jointly with an encoder, by their settings.

A config names the network in its field `kind` and offers `feature_size` (F), `build()` (a module that is a
`types.FeatureExtractor`), and how the network reads images (`vision.pictures.PictureSettings`). Another network adds
its config to `ExtractorSettings` and itself to `NETWORKS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from visling import config as configs
from visling.checkpoints.keymap import KeyMap
from visling.errors import ConfigError, nearest
from visling.vision import end_to_end, vcr_network
from visling.vision.end_to_end import ExtractorConfig
from visling.vision.vcr_network import VcrNetworkConfig

ExtractorSettings: TypeAlias = ExtractorConfig | VcrNetworkConfig
"""Config of any of the networks."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network and its files."""

    settings: type[ExtractorSettings]
    keys: Mapping[str, KeyMap]
    """Layout -> rules for part "extractor": "official", the release's files, and "resnet", what training starts
    from."""
    prefix: str
    """What the names of its tensors begin with in the release's files."""
    files: str
    """What these files are."""


NETWORKS: Mapping[str, Network] = {
    "vlbert": Network(
        settings=ExtractorConfig,
        keys=end_to_end.KEYS,
        prefix="image_feature_extractor.",
        files="a VL-BERT end to end",
    ),
    "visualbert": Network(
        settings=VcrNetworkConfig, keys=vcr_network.KEYS, prefix="detector.", files="a VisualBERT for VCR"
    ),
}
"""By `kind`."""


def read_settings(values: Mapping[str, Any]) -> ExtractorSettings:
    """Config of a network from plain values, as a model folder keeps them; `kind` says which, VL-BERT's by default.

    Raises:
        ConfigError: no such network, or other settings than it has.
    """
    kind = values.get("kind", "vlbert")
    if kind not in NETWORKS:
        raise ConfigError(f"no region extractor {kind!r}. {nearest(str(kind), NETWORKS)}")
    return configs.from_dict(NETWORKS[kind].settings, values)
