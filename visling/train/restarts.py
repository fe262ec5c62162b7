"""Folders that a run begun by torchrun continues by itself when torchrun starts it again."""

from __future__ import annotations

from pathlib import Path

from visling import runtime

MARK = ".launch"
"""File of a folder with the identity of the torchrun that began it."""


def mark_begun(folder: Path) -> None:
    """Note in a folder that has just been claimed which torchrun began it, if one did."""
    if (launch := runtime.launch()) is not None:
        (folder / MARK).write_text(launch + "\n", encoding="utf-8")


def was_restarted(folder: Path) -> bool:
    """Whether the torchrun that started this process has begun this very folder, and has started the process again
    since. One that lay there before is not continued unasked.

    torchrun's own count of restarts does not say it: those for which another machine is to blame are not counted.
    """
    if runtime.launch() is None:
        return False
    try:
        return (folder / MARK).read_text(encoding="utf-8").strip() == runtime.launch()
    except OSError:
        return False
