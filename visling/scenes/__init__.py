"""The embedded data set: drawn scenes and panels, written in the official formats of the data sets they imitate."""

from __future__ import annotations

from visling.scenes.settings import ScenesConfig
from visling.scenes.write import write_scenes

__all__ = ["ScenesConfig", "write_scenes"]
