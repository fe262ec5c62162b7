"""Networks that compute the features of regions from pixels and are trained jointly with an encoder, by their settings.

A config names the network in its field `kind` and offers `feature_size` (F), `mask_size` (M), `build()` (a module that
is a `types.FeatureExtractor`), and `open_pictures(files)` and `given_pictures(images)`, which prepare images as the
network reads them (`data.batches.pixels.Pictures`). Another network adds its config to `ExtractorSettings` and
`_KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from visling import config as configs
from visling.errors import ConfigError, nearest
from visling.vision.end_to_end import ExtractorConfig

ExtractorSettings: TypeAlias = ExtractorConfig
"""Config of any of the networks."""

_KINDS: Mapping[str, type[ExtractorSettings]] = {"vlbert": ExtractorConfig}


def read_settings(values: Mapping[str, Any]) -> ExtractorSettings:
    """Config of a network from plain values, as a model folder keeps them; `kind` says which, VL-BERT's by default.

    Raises:
        ConfigError: no such network, or other settings than it has.
    """
    kind = values.get("kind", "vlbert")
    if kind not in _KINDS:
        raise ConfigError(f"no region extractor {kind!r}. {nearest(str(kind), _KINDS)}")
    return configs.from_dict(_KINDS[kind], values)
