"""The states that a run can be resumed from: a folder each, of which only complete ones carry a step's name.

Layout  step-00000500/ with model.safetensors, optimizer.pt, average.safetensors (if weights are averaged) and
        state.json: how far the run had come, and size and SHA-256 of every other file and of its own contents.
Atomic  A state is written as step-00000500.part, flushed to the disk and renamed. One of the same step stays as
        step-00000500.old until then. Whatever interrupts this, the states before it are untouched.
Safe    Weights are safetensors, the optimiser is a weights-only torch file, the rest is JSON. Torch's own format for
        states (`torch.distributed.checkpoint.save`) is not used: its index is a pickle, which executes what it names.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from visling.errors import RunError
from visling.train.disk import flush
from visling.train.snapshot import Snapshot

FORMAT = 2
"""Version of the layout of a state."""

_WEIGHTS, _OPTIMIZER, _AVERAGES, _ABOUT = "model.safetensors", "optimizer.pt", "average.safetensors", "state.json"

_NAME = re.compile(r"step-(\d{8,})(\.old)?")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A state as it was read."""

    snapshot: Snapshot
    about: dict[str, Any]
    """What `write` was given in addition to the tensors."""
    notes: list[str]
    """What is wrong with newer states, which were passed over."""


class _Damaged(Exception):
    """A state cannot be used; the message names the file and says why."""


class SavedStates:
    """The states in a folder, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exist(self) -> bool:
        """Whether there is anything to resume from, of whatever version."""
        return (self.path / _ABOUT).exists() or bool(self._list())

    def write(self, step: int, snapshot: Snapshot, about: Mapping[str, Any], *, keep: int) -> None:
        """Save a state; then delete all but the `keep` newest, and those of later steps: they belong to a course that
        was given up when an older state was resumed.

        Args:
            about: JSON values.
        Raises:
            OSError, RuntimeError, SafetensorError: the disk is full or not writable; the older states are left intact.
        """
        folder = self.path / f"step-{step:08d}"
        part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            self._write_files(part, snapshot, about)
            flush(part)
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
            flush(self.path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self._sweep(step, keep)

    def _write_files(self, folder: Path, snapshot: Snapshot, about: Mapping[str, Any]) -> None:
        names = [_WEIGHTS, _OPTIMIZER]
        save_file(snapshot.weights, folder / _WEIGHTS)
        torch.save(snapshot.optimizer, folder / _OPTIMIZER)
        if snapshot.averages is not None:
            names.append(_AVERAGES)
            save_file(snapshot.averages, folder / _AVERAGES)
        for name in names:
            flush(folder / name)
        files = {name: _describe(folder / name) for name in names}
        contents = {"format": FORMAT, "files": files, "ties": snapshot.ties, **about}
        text = json.dumps({**contents, "sha256": _hash_contents(contents)}, allow_nan=False)
        (folder / _ABOUT).write_text(text + "\n", encoding="utf-8")
        flush(folder / _ABOUT)

    def _sweep(self, step: int, keep: int) -> None:
        kept = [folder for at, folder in self._list() if at <= step and folder.suffix != ".old"][:keep]
        for entry in self.path.iterdir():
            if entry in kept:
                continue
            if entry.is_dir():
                # Under a name that is no state's, so that a kill does not leave half of one
                gone = entry.with_name("deleted.part")
                shutil.rmtree(gone, ignore_errors=True)
                shutil.rmtree(entry.rename(gone))
            else:
                entry.unlink()

    def _list(self) -> list[tuple[int, Path]]:
        """(step, folder) of the states, newest first."""
        if not self.path.is_dir():
            return []
        named = [(match, entry) for entry in self.path.iterdir() if (match := _NAME.fullmatch(entry.name))]
        found = [(int(match[1]), match[2] is None, entry) for match, entry in named]
        return [(step, entry) for step, _, entry in sorted(found, reverse=True)]

    def read(self) -> Found:
        """The newest state that is complete and undamaged.

        Raises:
            RunError: there is none, or it is of another version.
        """
        if (self.path / _ABOUT).exists():
            raise RunError(
                f"{self.path} was saved by an earlier version (layout 1; this one reads {FORMAT}). Finish the run with "
                "the version that started it, or start another from its weights in model/."
            )
        problems: list[tuple[int, str]] = []
        for step, folder in self._list():
            try:
                snapshot, about = _read(folder)
            except _Damaged as problem:
                problems.append((step, str(problem)))
                continue
            notes = [
                f"the state of step {at} is left out: {why}; resumed at step {step} instead" for at, why in problems
            ]
            return Found(snapshot=snapshot, about=about, notes=notes)
        listed = "; ".join(why for _, why in problems) or "it holds no state"
        raise RunError(
            f"no state in {self.path} can be resumed: {listed}. Put back an intact copy of one of these folders, start "
            "again with another --out, or start from the weights in model/."
        )


def _read(folder: Path) -> tuple[Snapshot, dict[str, Any]]:
    about = _read_about(folder / _ABOUT)
    if about.get("format") != FORMAT:
        raise RunError(
            f"{folder} has layout {about.get('format')}; this version reads {FORMAT}. Finish the run with the version "
            "that started it."
        )
    averaged = _AVERAGES in about["files"]
    for name in (_WEIGHTS, _OPTIMIZER, *([_AVERAGES] if averaged else [])):
        _check(folder / name, about["files"][name])
    try:
        return Snapshot(
            weights=load_file(folder / _WEIGHTS),
            ties=about["ties"],
            optimizer=torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True),
            averages=load_file(folder / _AVERAGES) if averaged else None,
        ), about
    except Exception as error:  # torch's restricted unpickler raises whatever a file that was tampered with leads to
        raise _Damaged(f"{folder} cannot be read ({type(error).__name__}: {error})") from error


def _read_about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _Damaged(f"{file} cannot be read ({error})") from error
    if not isinstance(about, dict) or about.pop("sha256", None) != _hash_contents(about):
        raise _Damaged(f"{file} is damaged: its contents do not have the SHA-256 that was written with them")
    return about


def _check(file: Path, expected: Mapping[str, Any]) -> None:
    try:
        found = _describe(file)
    except OSError as error:
        raise _Damaged(f"{file} cannot be read ({error})") from error
    if found["size"] != expected["size"]:
        raise _Damaged(f"{file} has {found['size']:,} bytes, not {expected['size']:,}")
    if found["sha256"] != expected["sha256"]:
        raise _Damaged(f"{file} is damaged: its SHA-256 is not the one that was written with it")


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _hash_contents(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
