"""Every reader of files that strangers may have made: how a small valid sample is written, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping

from fuzz.readers import data_sets, features, images, lists, runs, stores, weights
from fuzz.readers.base import Reader

READERS: Mapping[str, Reader] = {
    reader.name: reader
    for module in (weights, stores, features, data_sets, lists, runs, images)
    for reader in module.READERS
}
"""By name."""
