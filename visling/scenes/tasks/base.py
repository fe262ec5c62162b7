"""How the files of a task are written: what could be said about a scene is computed wherever it is drawn, and chosen
and written split by split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from visling.scenes.settings import ScenesConfig
from visling.scenes.world import Scene


class TaskWriter(Protocol):
    """Files of one task in one split; a module in this package offers its own as `WRITER`."""

    name: ClassVar[str]
    """Of the task, and of its counts in scenes.json."""
    purpose: ClassVar[int]
    """Number of its random generators (`generator_for(seed, image_id, purpose)`), from 20 on and of no other writer."""

    def __init__(self, split: str, config: ScenesConfig) -> None: ...

    @staticmethod
    def describe(scene: Scene, rng: np.random.Generator) -> Any:
        """What could be said about a scene; called in worker processes, so it must be picklable."""
        ...

    def add(self, scene: Scene, described: Any, rng: np.random.Generator) -> None:
        """Choose among what could be said; called for the scenes of the split in their order."""
        ...

    def write(self, folder: Path) -> dict[str, int]:
        """Write the files of the split below the data set's folder and return their counts."""
        ...
