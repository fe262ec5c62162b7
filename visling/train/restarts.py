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
    """Whether torchrun has started this process again after it had begun this very folder: one that lay there before is
    not continued unasked."""
    if runtime.restarts() == 0:
        return False
    try:
        return (folder / MARK).read_text(encoding="utf-8").strip() == runtime.launch()
    except OSError:
        return False
