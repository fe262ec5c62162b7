"""The examples of an evaluated run as a folder of pages: index.html, and the linked view of each example.

index.html        filters, groups with scores, pages of examples; opens from a disk, asks nobody for anything
examples.js       what the index shows of each example
gallery.json      what the folder was made from; says whether `resume` may continue it
static/           scripts of the pages
thumbnails/       small pictures
views/N.js        the documents (`analysis.inspection`) of an example, one for each run
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visling.analysis.ask_again import AskAgain
from visling.analysis.examples import Row, describe, find_image_files, list_images
from visling.analysis.gallery_entries import (
    Pair,
    compare_blind,
    describe_entry,
    group_pairs,
    list_truth,
    name_candidates,
    read_removal,
)
from visling.analysis.gallery_page import render_index, write_static
from visling.analysis.inspection import Inspection, inspect
from visling.analysis.page import replace_file
from visling.analysis.run_files import RunFiles, as_mapping, score_value
from visling.analysis.thumbnails import Thumbnails
from visling.errors import DataError, RunError, VislingError
from visling.types import Prediction, RegionStore

Progress = Callable[[int, int], None]
"""Called with the examples that are done, and all."""

_FORMAT = "visling-gallery-1"
_SETTINGS, _EXAMPLES = "gallery.json", "examples.js"
_TOGETHER = 32
"""Examples that are asked about without their images in one batch."""


@dataclass(frozen=True, kw_only=True)
class GalleryRun:
    """A run whose examples are shown."""

    path: Path
    """Run folder."""
    files: RunFiles
    about: Mapping[str, Any]
    """run.json; of a run of several tasks, what it says of the task."""
    split: str
    rows: Sequence[Row]
    """Details of the split."""
    task: str | None = None
    """Of a run of several tasks: the name of the one that is meant."""

    @classmethod
    def read(cls, path: Path, split: str | None = None, task: str | None = None) -> GalleryRun:
        """Read a run and its details.

        Args:
            split: that was evaluated; None = the one that represents the run.
        Raises:
            RunError: no such run, or the split was not evaluated.
        """
        files = RunFiles.read(path if task is None else path / "tasks" / task)
        about = (files if task is None else RunFiles.read(path)).about
        chosen = split or next((name for name, rows in files.details.items() if rows), None)
        rows = files.details.get(chosen or "", [])
        if chosen is None or not rows:
            there = ", ".join(name for name, found in files.details.items() if found)
            what = f"has not been evaluated on {split!r}" if split else "has not been evaluated"
            found = f" It was on {there}." if there else ""
            raise RunError(
                f"{files.path} {what}: there is no details_{chosen or 'SPLIT'}.jsonl with examples.{found} First: "
                f"visling evaluate {path} --split {split or 'test'}"
            )
        known = {**about, **as_mapping(as_mapping(about.get("tasks")).get(task or ""))}
        return cls(path=path, files=files, about=known, split=chosen, rows=rows, task=task)

    @property
    def name(self) -> str:
        """The last two parts of its path."""
        return "/".join(self.files.path.resolve().parts[-2:])


def write_gallery(
    run: GalleryRun,
    out: Path,
    *,
    other: GalleryRun | None = None,
    examples: int = 200,
    asked: Sequence[AskAgain] = (),
    notes: Sequence[str] = (),
    images: Path | None = None,
    store: RegionStore | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the folder; returns its index.

    Args:
        out: a new or empty folder, or one that was begun before, with `resume`.
        other: a run that was evaluated on the same examples, for comparison; half of the examples are then those in
            which the two differ most.
        examples: most examples shown, at even distances over the details.
        asked: the models of the run and of the other one, for the linked view of each example; without any there is
            none.
        notes: what is missing, to be shown at the top.
        images: folder of the images, searched with its sub-folders; None = that of the run.
        store: regions; None opens the store that the run names.
        resume: continue a folder that was begun with the same settings, keeping the views that it has.
    Raises:
        RunError: the folder holds something else, cannot be written, or the two runs have no example in common.
        DataError: no such image folder.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"no image folder {images}. Check the path.")
    pairs = _pair_rows(run, other)
    chosen = _choose(pairs, examples, compared=other is not None)
    settings = _describe_settings(run, other, chosen, views=len(asked))
    _claim(out, settings, resume=resume)
    folder = images if images is not None else _image_folder(run.about)
    files = find_image_files(folder, {image for pair in chosen for image in list_images(pair.row)})
    missing = [*notes]
    if folder is None:
        missing.append("No image folder is known: name it with --images.")
    elif not files:
        missing.append("None of the images was found in the image folder.")
    try:
        regions = store if store is not None else run.files.open_store()
        entries = _Writer(out, files, regions, asked).write(chosen, progress)
        write_static(out)
        replace_file(out / _EXAMPLES, f"window.visling_gallery = {json.dumps(entries)};\n")
        page = render_index(
            title=_title(run),
            facts=_list_facts(run, other, chosen),
            groupings=group_pairs(pairs, regions),
            notes=missing,
            entries=entries,
            runs=_name_runs(run, other),
        )
        replace_file(out / "index.html", page)
    except OSError as error:
        raise RunError(f"cannot write the gallery {out}: {error}. Free space, then repeat with --resume.") from error
    return out / "index.html"


def _pair_rows(run: GalleryRun, other: GalleryRun | None) -> list[Pair]:
    """The examples of a run; with another run, those that both were evaluated on."""
    if other is None:
        return [Pair(row=row, other=None) for row in run.rows]
    theirs = {str(row.get("id")): row for row in other.rows}
    pairs = [Pair(row=row, other=theirs[name]) for row in run.rows if (name := str(row.get("id"))) in theirs]
    if not pairs:
        raise RunError(
            f"{run.files.path} and {other.files.path} have no example in common: they were evaluated on other data. "
            "Compare runs of one task that were evaluated on the same split."
        )
    return pairs


def _choose(pairs: Sequence[Pair], most: int, *, compared: bool) -> list[Pair]:
    """Examples at even distances, in their order; of compared runs, half of them those with the largest difference."""
    if len(pairs) <= most:
        return list(pairs)
    count = most - most // 2 if compared else most
    even = {int((k + 0.5) * len(pairs) / count) for k in range(count)}
    rest = [number for number in range(len(pairs)) if number not in even]
    differing = sorted(rest, key=lambda number: -pairs[number].difference)[: most - count]
    return [replace(pairs[number], even=number in even) for number in sorted({*even, *differing})]


def _describe_settings(
    run: GalleryRun, other: GalleryRun | None, chosen: Sequence[Pair], *, views: int
) -> dict[str, Any]:
    """What the folder is made from."""
    return {
        "format": _FORMAT,
        "run": run.name,
        "compare": None if other is None else other.name,
        "split": run.split,
        "views": views,
        "finished": [str(one.about.get("finished")) for one in (run, other) if one is not None],
        "examples": [str(pair.row.get("id")) for pair in chosen],
    }


def _claim(out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder, or take up one that was begun with the same settings."""
    known = out / _SETTINGS
    try:
        held = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
        if held and not (resume and known.is_file()):
            mend = "continue it with --resume, " if known.is_file() else ""
            raise RunError(
                f"{out} is not empty: it holds {', '.join(held[:5])}. Name another folder with --out, {mend}or delete "
                "it."
            )
        if held:
            before = json.loads(known.read_text(encoding="utf-8"))
            changed = [name for name, value in settings.items() if as_mapping(before).get(name) != value]
            if changed:
                raise RunError(
                    f"{out} was begun with other settings: {', '.join(changed)} differ. Repeat the command that began "
                    "it, or name another folder with --out."
                )
        out.mkdir(parents=True, exist_ok=True)
        replace_file(known, json.dumps(settings, indent=1) + "\n")
    except (OSError, ValueError) as error:
        if isinstance(error, VislingError):
            raise
        raise RunError(f"cannot write the gallery {out}: {error}. Name another folder with --out.") from error


def _image_folder(about: Mapping[str, Any]) -> Path | None:
    """The folder of images that a run, or a task of it, names."""
    named = about.get("images")
    return Path(named) if isinstance(named, str) else None


class _Writer:
    """Writes what belongs to single examples.

    Args:
        store: regions that are counted; None leaves that out.
        asked: models whose documents make up the view of an example; the first is asked without images, too.
    """

    def __init__(
        self, out: Path, files: Mapping[str, Path], store: RegionStore | None, asked: Sequence[AskAgain]
    ) -> None:
        self._out, self._files, self._store, self._asked = out, files, store, asked
        self._thumbnails = Thumbnails(out, files)

    def write(self, chosen: Sequence[Pair], progress: Progress | None) -> list[dict[str, Any]]:
        """Write thumbnails and views; returns what the index shows of each example."""
        blind = self._ask_blind(chosen)
        entries = []
        for number, pair in enumerate(chosen, 1):
            pictures = [self._thumbnails.write(image) for image in list_images(pair.row)]
            entry = describe_entry(pair, self._store, pictures)
            if blind:
                entry["blind"] = compare_blind(pair.row, blind[number - 1])
            if self._asked:
                documents = self._write_view(number, pair.row)
                entry["view"] = f"views/{number:05d}.js"
                entry["removal"] = read_removal(documents[0])
                name_candidates(entry, documents[0])
            entries.append(entry)
            if progress is not None:
                progress(number, len(chosen))
        return entries

    def _ask_blind(self, chosen: Sequence[Pair]) -> list[Prediction]:
        """What the model answers without any image; nothing where it cannot be asked."""
        first = self._asked[0] if self._asked else None
        if first is None or first.store is None or not first.answers_blind:
            return []
        rows = [pair.row for pair in chosen]
        return [
            prediction
            for begin in range(0, len(rows), _TOGETHER)
            for prediction in first.predict(rows[begin : begin + _TOGETHER], blind=True)
        ]

    def _write_view(self, number: int, row: Row) -> list[dict[str, Any]]:
        """The documents of an example, computed and written unless they are there."""
        file = self._out / "views" / f"{number:05d}.js"
        begin, end = f'window.visling_view("{number:05d}", ', ");\n"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            found: list[dict[str, Any]] = json.loads(text.removeprefix(begin).removesuffix(end))
            return found
        documents = [self._inspect(one, row).to_json() for one in self._asked]
        file.parent.mkdir(exist_ok=True)
        replace_file(file, f"{begin}{json.dumps(documents)}{end}")
        return documents

    def _inspect(self, model: AskAgain, row: Row) -> Inspection:
        asked = model.prepare(row, self._files)
        unseen = model.saved.extractor is None and asked.regions and not any(map(len, asked.regions))
        found = inspect(
            model.model,
            model.task,
            asked,
            folder=model.saved,
            tokenizer=model.tokenizer,
            class_names=model.class_names,
            attribute_names=model.attribute_names,
            notices=["the detector found nothing; this is answered from the words alone"] if unseen else (),
        )
        texts, boxes = list_truth(row)
        return replace(found, truth=texts, truth_boxes=boxes)


def _title(run: GalleryRun) -> str:
    return f"{describe(run.about.get('model'), 'model')} on {describe(run.about.get('task'), 'task')}, {run.split}"


def _name_runs(run: GalleryRun, other: GalleryRun | None) -> list[str]:
    """Short names: the folders alone, if they differ."""
    names = [one.name for one in (run, other) if one is not None]
    short = [name.rpartition("/")[2] for name in names]
    return short if len(set(short)) == len(short) else names


def _list_facts(run: GalleryRun, other: GalleryRun | None, chosen: Sequence[Pair]) -> dict[str, str]:
    """What is said at the top of the index."""
    facts = {}
    for one in (run, other):
        if one is not None:
            scores = as_mapping(as_mapping(one.files.evaluations.get(one.split)).get("scores"))
            name, cell = next(iter(scores.items()), ("", None))
            value = score_value(cell)
            facts[one.name] = "not scored" if value is None else f"{value:.1f} % {name}"
    even = sum(pair.even for pair in chosen)
    facts["examples"] = f"{len(chosen):,} of {len(run.rows):,}"
    if len(chosen) < len(run.rows):
        facts["examples"] += ", at even distances"
    if even < len(chosen):
        facts["examples"] = f"{facts['examples']}: {even}; where the runs differ most: {len(chosen) - even}"
    return facts
