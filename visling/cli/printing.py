"""Printing for people and programs, progress bars, and file names that are not overwritten."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visling.errors import RunError

if TYPE_CHECKING:
    from rich.progress import TaskID


def rounded(score: float | None) -> float | None:
    """A score as it is printed; None where nothing could be scored (JSON has no NaN)."""
    return None if score is None or math.isnan(score) else round(score, 4)


def show(values: dict[str, Any], json_: bool, title: str = "") -> None:
    """Values by name: one JSON object, or a title and one line each."""
    if json_:
        print(json.dumps(values))
        return
    if title:
        print(title)
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        print(f"  {name:<{width}}  {'-' if value is None else value}")


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None if it is a file or a pipe, whose lines are not wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def format_rows(rows: Mapping[str, str], width: int | None) -> list[str]:
    """Lines of a table of names and texts, in which a text continues under its beginning.

    Args:
        width: columns of the terminal; None = one line for each row.
    """
    names = max(map(len, rows), default=0)
    lines: list[str] = []
    for name, text in rows.items():
        space = None if width is None else max(width - names - 5, 30)
        first, *rest = [text] if space is None else textwrap.wrap(text, space, break_on_hyphens=False) or [""]
        lines += [f"  {name:<{names}}  {first}".rstrip(), *(" " * (names + 4) + line for line in rest)]
    return lines


def show_with_unreadable(
    values: dict[str, Any], unreadable: Sequence[tuple[object, str]], json_: bool, title: str = ""
) -> None:
    """`show`, with the number of unreadable images; each is named on stderr, and in the JSON object."""
    values = {**values, "unreadable": len(unreadable)}
    if json_:
        values["unreadable_images"] = [{"image": str(image), "reason": reason} for image, reason in unreadable]
    show(values, json_, title)
    for _, reason in unreadable:
        print(f"left out: {reason}", file=sys.stderr)


def describe_early_end(out: Path, stopped: str) -> str:
    """What to say about a run that is to be resumed; empty if it has finished."""
    causes = {"max_seconds": "train.max_seconds", "terminated": "SIGTERM"}
    if stopped not in causes:
        return ""
    return (
        f"Stopped by {causes[stopped]}. What was trained is saved in {out}; the same command with --resume continues."
    )


def print_model_folder(what: str, out: Path, stopped: str) -> None:
    """Say where a run's model is, or how to resume a run that stopped early."""
    print(describe_early_end(out, stopped) or f"{what} model in {out / 'model'}")


def refuse_existing(target: Path) -> None:
    """Raise a `RunError` if a file exists."""
    if target.exists():
        raise RunError(f"{target} exists. Name another file with --out, or remove it.")


def claim_file(target: Path) -> None:
    """Make sure that a new file can be written, before what it is to hold is computed.

    Raises:
        RunError: it exists, or its folder is missing or cannot be written to.
    """
    refuse_existing(target)
    part = target.with_name(f"{target.name}.part")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise RunError(f"cannot write {target}: {error}. Make its folder, or name another file.") from error


def write_new(target: Path, content: str) -> None:
    """Write a file completely or not at all.

    Raises:
        RunError: it cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        part.write_text(content, encoding="utf-8")
        part.replace(target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error}. Free space or name another file.") from error


def find_free_name(folder: Path, stem: str) -> Path:
    """A name for a picture in the folder that no file has yet: STEM.png, STEM-2.png, ...

    Raises:
        RunError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}. Name another folder with --out.") from error
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for path in (folder / f"{name}.png" for name in names) if not path.exists())


def slugify(text: str, longest: int = 48) -> str:
    """The words of a text as part of a file name: lower case, joined by hyphens, whole words up to a length."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    slug = ""
    for word in words:
        if slug and len(slug) + 1 + len(word) > longest:
            break
        slug = f"{slug}-{word}" if slug else word[:longest]
    return slug


@contextlib.contextmanager
def progress_bar(title: str, *, at_once: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; the context's value is called with (done, total).

    Args:
        at_once: show it before the first call.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None, visible=at_once, rate="")

        def step(done: int, total: int) -> None:
            speed = progress.tasks[0].speed
            rate = "" if speed is None else f"{speed:,.{0 if speed >= 10 else 1}f}/s"
            progress.update(task, completed=done, total=total, visible=True, rate=rate)

        yield step


def claim_folder(out: Path) -> None:
    """Make a new or empty folder, before what it is to hold is computed.

    Raises:
        RunError: it holds something, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error}. Use another --out.") from error
    if held:
        raise RunError(f"{out} is not empty: it holds {', '.join(held[:5])}. Use another --out, or delete the folder.")


@contextlib.contextmanager
def download_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar of downloads on a terminal, a line for each of them elsewhere; the context's value is called with
    (what, bytes here, all bytes), where 0 bytes in all are unknown."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:

        def show_download(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"Fetching {what}", total=total or None)
                if not console.is_terminal:
                    print(f"Fetching {what}", file=sys.stderr, flush=True)
            progress.update(tasks[what], completed=done, total=total or None)

        yield show_download


def claim_store(out: Path, resume: bool) -> None:
    """Refuse a folder that is taken or cannot be created, before regions are written into it."""
    from visling.regions.files import JOURNAL, MANIFEST, PARTS
    from visling.train.restarts import MARK, mark_begun, was_restarted

    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; a region store needs a folder. Use another --out.")
    held = sorted(entry.name for entry in out.iterdir() if entry.name != MARK) if out.exists() else []
    is_store = not {MANIFEST, JOURNAL, PARTS}.isdisjoint(held)
    if held and not ((resume and is_store) or was_restarted(out)):
        resuming = "add to it with --resume, " if is_store else ""
        raise RunError(
            f"{out} is not empty: it holds {', '.join(held[:5])}. Use another --out, {resuming}or delete the folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark_begun(out)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error}. Use another --out.") from error
