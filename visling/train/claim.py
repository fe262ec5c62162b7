"""Which folders a run may write to, and that no other run writes to them meanwhile."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from visling.errors import RunError
from visling.train.disk import explain_failure
from visling.train.not_finite import FOLDER
from visling.train.restarts import MARK, was_restarted

REGIONS = "regions"
"""Folder of a run with the regions of its own images; they are extracted before anything else is written."""


LOCK = ".lock"
"""File of a run's folder that its main process holds while the run lives. It is deleted at the end; after a kill it
stays, and nobody holds it."""

_held: dict[Path, tuple[int, str]] = {}
"""Folder -> file descriptor of the lock that this process holds, and what there is to say about it."""


@contextlib.contextmanager
def hold_folder(path: Path, *, resume: bool) -> Iterator[str]:
    """Hold a run's folder, so that no other process can start or resume a run in it; the folder is made if it may be
    taken (`refuse_taken`), and removed at the end if nothing is in it. The system frees it when the process ends,
    however it ends. A block inside another one for the same folder changes nothing.

    Yields:
        What there is to say: whether the folder's file system has no locks. Systems without `fcntl` have none, either.
    Raises:
        RunError: another process holds it, or it must not be taken or cannot be written to.
    """
    place = path.resolve()
    if place in _held or sys.platform == "win32":
        yield _held.get(place, (0, ""))[1]
        return
    made = not path.exists()
    if not (path / LOCK).exists():
        refuse_taken(path, resume)
        with explain_failure(path):
            path.mkdir(parents=True, exist_ok=True)
    try:
        with hold_alone(path) as note:
            refuse_taken(path, resume)  # what lies there may have changed before it was held
            yield note
    finally:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def hold_alone(path: Path) -> Iterator[str]:
    """Hold a folder that exists, whatever it is of: `hold_folder` without its other rules.

    Yields:
        What `hold_folder` does.
    Raises:
        RunError: another process holds it, or it cannot be written to.
    """
    place = path.resolve()
    if place in _held or sys.platform == "win32":
        yield _held.get(place, (0, ""))[1]
        return
    handle, note = _lock(path / LOCK)
    _free_in_children()
    _held[place] = handle, note
    try:
        yield note
    finally:
        del _held[place]
        with contextlib.suppress(OSError):
            (path / LOCK).unlink()
        os.close(handle)


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
    ours = ("run.json.part", REGIONS, LOCK, MARK, FOLDER)
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


def _lock(file: Path) -> tuple[int, str]:
    """A file, opened and locked; and what there is to say if its file system has no locks.

    Raises:
        RunError: another process holds it.
    """
    import fcntl  # not on Windows

    while True:
        with explain_failure(file.parent):
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise RunError(
                f"{file.parent} is in use: {holder} runs in it. Wait until it ends, stop it, or use another --out."
            ) from None
        except OSError as error:
            return handle, (
                f"{file.parent} lies on a file system without locks ({error.strerror}): make sure that no other run "
                "uses it"
            )
        if _is_same(handle, file):
            with contextlib.suppress(OSError):  # on a full disk nobody learns who holds it
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
            return handle, ""
        os.close(handle)  # its holder has just ended and deleted it


def _is_same(handle: int, file: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


@functools.cache
def _free_in_children() -> None:
    """Let children that are forked from now on hold no lock: they would keep it when this process has ended."""
    os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for handle, _ in _held.values():
        os.close(handle)
    _held.clear()
