"""The embedded data set: drawn scenes and panels, written in the official annotation formats of the data sets that they
stand for."""

from __future__ import annotations

from visling.scenes.settings import ScenesConfig
from visling.scenes.write import write_scenes

__all__ = ["ScenesConfig", "write_scenes"]
