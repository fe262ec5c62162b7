"""The valid files of a reader, which each case damages and sets right again."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from fuzz.mutations import damage, guess_kind
from fuzz.readers.base import Reader


class Sample:
    """Which file is damaged in a case, and how, follows from the seed and the number of the case alone.

    Args:
        folder: an empty one, whose name is part of every message about a file in it; or one that holds the sample.
    """

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        if not any(folder.iterdir()):
            reader.write(folder)
        self.files = {
            file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }

    def damage(self, seed: int, case: int) -> None:
        """Damage one of the files."""
        draw = random.Random(f"{seed}/{self.reader.name}/{case}")
        name = draw.choice(list(self.files))
        content = damage(self.files[name], self.reader.kind or guess_kind(name.name), draw)
        (self.folder / name).write_bytes(content)

    def restore(self) -> None:
        """Set the files right."""
        if self.reader.writes:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        for name, content in self.files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
