"""visling fetch, catalog: what others published, and what of it fits together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visling import config as configs
from visling.cli.options import Json, Offline
from visling.cli.printing import download_bar, format_rows, show, terminal_width
from visling.errors import ConfigError, nearest

if TYPE_CHECKING:
    from visling.checkpoints.catalog import Entry
    from visling.checkpoints.entries import Published, ReadyAnswer, ReleasedFile

_REACHES = {"hub": "on the hub", "address": "download", "by hand": "by hand"}


def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names in `visling catalog`.")],
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="DIR",
            help="Folder that gets a folder for each of them; by default that of VISLING_HOME, where other commands "
            "find them, and the hub's cache.",
        ),
    ] = None,
    offline: Offline = False,
    json_: Json = False,
) -> None:
    """Download weights, detectors, answer lists or feature files; the name of a set that answers stands for all its
    parts. An interrupted download continues where it ended.

    Example: visling fetch lxmert-vqa
    """
    from visling.checkpoints import catalog
    from visling.pretrained.fetch import fetch as fetch_named

    for name in names:
        catalog.find_entry(name)  # a name that is wrong is found before anything is downloaded
    found = {}
    with download_bar() as report:
        for name in names:
            for part in fetch_named(name, into=to, offline=offline or None, report=report):
                found[part.name] = str(part.path)
    show(found, json_, "Fetched")


def catalog(
    name: Annotated[str | None, typer.Argument(help="Show everything about one entry.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Details of the weights of one model family.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="Details of the weights in one layout.")] = None,
    json_: Json = False,
) -> None:
    """List what others published and this package can use: weights, detectors, answer lists, feature files; where they
    are, whether anybody has reported them gone, and what fits together.

    Nothing of it was downloaded when the list was made: what nobody has reported is not known to be there either.

    Example: visling catalog

    Example: visling catalog --model lxmert
    """
    from visling.checkpoints import catalog

    if name is not None and (model, layout) != (None, None):
        raise ConfigError("--model and --layout choose among the weights: leave them out where NAME is given.")
    if name is not None:
        entry = catalog.find_entry(name)
        if json_:
            print(json.dumps(_to_json(entry)))
        else:
            show(_describe(entry), False, entry.name)
    elif (model, layout) != (None, None):
        _show_weights(model, layout, json_)
    elif json_:
        groups: dict[str, Sequence[Entry]] = {
            "ready": catalog.READY,
            "weights": catalog.RELEASED_FILES,
            "detectors": catalog.DETECTORS,
            "answers": catalog.ANSWERS,
            "features": catalog.FEATURES,
        }
        print(json.dumps({group: [_to_json(entry) for entry in entries] for group, entries in groups.items()}))
    else:
        _show_overview()


def _show_weights(model: str | None, layout: str | None, json_: bool) -> None:
    from visling.checkpoints.catalog import RELEASED_FILES

    chosen = [entry for entry in RELEASED_FILES if model in (None, entry.family) and layout in (None, entry.layout)]
    if not chosen:
        pairs = {f"--model {entry.family} --layout {entry.layout}" for entry in RELEASED_FILES}
        raise ConfigError(f"the catalogue has no such file. {nearest(f'--model {model} --layout {layout}', pairs)}")
    if json_:
        print(json.dumps([_to_json(entry) for entry in chosen]))
        return
    for entry in chosen:
        show(_describe(entry), False, entry.name)


def _show_overview() -> None:
    from visling.checkpoints import catalog
    from visling.feature_kinds import KINDS

    _show_group(
        "Ready to answer about a photograph: visling predict --run NAME photo.jpg TEXT",
        ((ready.name, _summarise_ready(ready)) for ready in catalog.READY),
    )
    _show_group(
        "Weights: visling convert NAME --to MODEL",
        _join_epochs(
            (entry.name, f"{entry.family}; {_name_features(entry)}; {_locate(entry)}")
            for entry in catalog.RELEASED_FILES
        ),
    )
    _show_group(
        "Detectors: --detector NAME, or visling fetch NAME",
        ((entry.name, f"makes {entry.makes}; {_locate(entry)}") for entry in catalog.DETECTORS),
    )
    _show_group(
        "Answer lists: visling fetch NAME",
        ((entry.name, f"{entry.answers:,} answers; {_locate(entry)}") for entry in catalog.ANSWERS),
    )
    _show_group(
        "Feature files: visling fetch NAME, then visling regions convert FILE --out STORE",
        ((entry.name, f"{entry.features}; {entry.images}; {_locate(entry)}") for entry in catalog.FEATURES),
    )
    _show_group(
        "Kinds of features; one of them does not stand for another, unless it comes near",
        (
            (kind, f"{about.detector}; {about.regions} regions, width {about.width:,}{_list_near(kind)}")
            for kind, about in KINDS.items()
        ),
    )
    print("`visling catalog NAME` shows the address, licence, size and notes of an entry.")


def _join_epochs(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows in which files that differ in their epoch alone share one."""
    joined: dict[tuple[str, str], list[str]] = {}
    for name, text in rows:
        joined.setdefault((re.sub(r"(?<=Epoch)\d+", "", name), text), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}", text) for (_, text), names in joined.items()
    ]


def _show_group(title: str, rows: Iterable[tuple[str, str]]) -> None:
    print(title)
    print("\n".join(format_rows(dict(rows), terminal_width())), end="\n\n")


def _locate(entry: Published) -> str:
    """How an entry is had, and whether anybody has reported trouble."""
    return f"{_REACHES[entry.reach]}, trouble reported" if entry.dead else _REACHES[entry.reach]


def _name_features(entry: ReleasedFile) -> str:
    return entry.features or "features of its own network"


def _list_near(kind: str) -> str:
    from visling.feature_kinds import NEAR

    near = [found for needed, found in NEAR if needed == kind]
    return f"; near it: {', '.join(near)}" if near else ""


def _summarise_ready(ready: ReadyAnswer) -> str:
    from visling.checkpoints import catalog

    weights = catalog.find(ready.weights)
    if not ready.detector:
        return f"{ready.task}; no: nothing here makes {weights.features}"
    detector = catalog.find_detector(ready.detector)
    parts: list[Published] = [weights, detector]
    parts += [catalog.find_answers(ready.answers)] if ready.answers else []
    ways = list(dict.fromkeys(_REACHES[part.reach] for part in parts))
    trouble = [part.name for part in parts if part.dead]
    how = "makes" if weights.features == detector.makes else "comes near"
    return (
        f"{ready.task}; {ready.detector} {how} {weights.features}; {' and '.join(ways)}"
        f"{', trouble reported with ' + ', '.join(trouble) if trouble else ''}"
    )


def _to_json(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = configs.to_dict(entry)
    reach = getattr(entry, "reach", None)
    return found if reach is None else {**found, "reach": reach}


def _describe(entry: Entry) -> dict[str, Any]:
    """Everything about an entry, by the name of the fact."""
    from visling.checkpoints import catalog
    from visling.checkpoints.entries import AnswerFile, FeatureFile, ReadyAnswer, ReleasedDetector, ReleasedFile
    from visling.feature_kinds import NEAR, describe_kind

    if isinstance(entry, ReadyAnswer):
        needed = catalog.find(entry.weights).features
        facts: dict[str, Any] = {
            "task": entry.task,
            "weights": entry.weights,
            "answers": entry.answers or "none needed",
        }
        facts |= {"features": describe_kind(needed), "detector": entry.detector or f"none. {entry.why_no_detector}"}
        if entry.detector:
            made = catalog.find_detector(entry.detector).makes
            facts["how near"] = "the same kind" if made == needed else f"near: {NEAR[needed, made]}"
        return facts
    facts = {}
    if isinstance(entry, ReleasedFile):
        heads = ", ".join(f"{part} {head.outputs}" for part, head in entry.heads.items()) or "none"
        features = describe_kind(entry.features) if entry.features else "computed by its own network"
        facts = {"model": f"{entry.family}, preset {entry.preset}, layout {entry.layout}", "heads": heads}
        facts["features"] = features
    elif isinstance(entry, ReleasedDetector):
        stands = [needed for needed, made in NEAR if made == entry.makes]
        facts = {"makes": describe_kind(entry.makes), "comes near": ", ".join(stands) or "no other kind"}
    elif isinstance(entry, AnswerFile):
        facts = {"answers": entry.answers, "file": entry.file}
    elif isinstance(entry, FeatureFile):
        facts = {"features": describe_kind(entry.features), "images": entry.images}
    facts |= {"at": entry.source, "reach": _REACHES[entry.reach], "licence": entry.licence, "size": _state_size(entry)}
    if isinstance(entry, ReleasedFile | AnswerFile):
        facts["SHA-256"] = entry.sha256 or "unknown"
    if isinstance(entry, ReleasedDetector) and entry.mirror:
        facts["mirror"] = entry.mirror
    facts["known dead"] = entry.dead or "nothing known"
    note = getattr(entry, "note", "")
    return facts | ({"note": note} if note else {})


def _state_size(entry: Any) -> str:
    if (size := getattr(entry, "size", None)) is not None:
        return f"{size / 1e6:.2f} MB"
    rounded = getattr(entry, "megabytes", None)
    return "unknown" if rounded is None else f"about {rounded} MB"
