"""Which folders a run may write to."""

from __future__ import annotations

from pathlib import Path

from visling.errors import RunError
from visling.train.not_finite import FOLDER
from visling.train.restarts import MARK, was_restarted

REGIONS = "regions"
"""Folder of a run with the regions of its own images; they are extracted before anything else is written."""


def refuse_taken(path: Path, resume: bool) -> None:
    """Check that a folder can become that of a run, or with `resume` that it holds one, or the regions of one that was
    stopped while they were extracted.

    One that was begun by this run before torchrun restarted it may be resumed in any state.

    Raises:
        RunError: it is not empty, but for regions of its own, or it holds nothing to resume.
    """
    if was_restarted(path):
        return
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; a run needs a folder. Use another --out.")
    if file := next((parent for parent in path.parents if parent.is_file()), None):
        raise RunError(f"cannot write to {path}: {file} is a file, not a folder. Use another --out.")
    # A kill during the very first write leaves only run.json.part: nothing was trained, and the next write replaces it.
    # So does a bad first loss on a GPU: its batch.
    ours = ("run.json.part", REGIONS, MARK, FOLDER)
    held = sorted(entry.name for entry in path.iterdir() if entry.name not in ours) if path.exists() else []
    if resume:
        if "run.json" not in held and not (path / REGIONS).is_dir():
            raise RunError(
                f"nothing to resume in {path}: there is no run.json. Check the path, or start without --resume."
            )
        return
    if held:
        some = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
        offer = "continue it with --resume, " if "run.json" in held else ""
        raise RunError(f"{path} is not empty: it holds {some}. Use another --out, {offer}or delete the folder.")
