"""visling inspect: one page that shows what models looked at when they answered."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from visling.cli.options import Device, Offline, OtherFeatures, TaskName
from visling.cli.predicting import check_images, load_model
from visling.cli.printing import refuse_existing, slugify, write_new
from visling.errors import ConfigError

if TYPE_CHECKING:
    from visling.analysis.inspection import Inspection

_USE = 'visling inspect RUN image.png "how many stars are there?"'
Direction = Literal["text_to_text", "text_to_regions", "regions_to_text", "regions_to_regions"]


def inspect(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... IMAGE... TEXT",
            help='Run folders, model folders or names under "Ready to answer" in `visling catalog`; then the image, '
            "or the two that the task reads together; then the question or sentence. Several runs stand side by side.",
        ),
    ],
    choice: Annotated[
        list[str] | None, typer.Option(help="An answer to choose from, for VCR; give two or more of them.")
    ] = None,
    task: TaskName = None,
    detector: Annotated[
        Path | None,
        typer.Option(help="Detector folder, or its name in `visling catalog`; by default the one in the model folder."),
    ] = None,
    other_features: OtherFeatures = False,
    offline: Offline = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; named after the image and the text by default.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers of the page, as JSON.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help='Show attention first, of this layer: "layers.2", or its number, from 0.'),
    ] = None,
    head: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Show attention first, of this head, from 0.")
    ] = None,
    direction: Annotated[
        Direction | None,
        typer.Option(
            metavar="NAME",
            help="Show attention first, in this direction: text_to_regions, regions_to_text, "
            "text_to_text or regions_to_regions.",
        ),
    ] = None,
    alignment: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="alignment.json of a run (`visling analysis alignment`): heads can then be coloured by the phrases "
            "that they ground. Several runs may each have one.",
        ),
    ] = None,
    no_removal: Annotated[
        bool, typer.Option("--no-removal", help="Do not ask again without parts of the question: faster.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Show what models looked at when they answered a question: one HTML page that needs no network, with the picture,
    its boxes, the words, the answers, what each of them rests on, and every attention head.

    Example: visling inspect vqa scenes/images/test/scene_000000002251.png "what colour is the star?"
    """
    from visling.analysis.head_quantities import read_grounding
    from visling.analysis.inspection_page import write_page

    runs, images, text = _sort_words(words)
    check_images(images, _USE)
    grounding = {file: read_grounding(file) for file in alignment or ()}
    stem = "-".join(filter(None, (Path(images[0]).stem if images else "", slugify(text)))) or "inspection"
    target = out if out is not None else Path(f"{stem}.html")
    for file in filter(None, (target, json_)):
        refuse_existing(file)
    command = shlex.join(["visling", *sys.argv[1:]])
    found = []
    for run in runs:
        model = load_model(Path(run), task, detector, other_features, device, offline)
        inspection = model.inspect(images, text, choice or (), removal=not no_removal)
        measured = [heads for weights, heads in grounding.values() if weights.startswith(inspection.model.checkpoint)]
        about = replace(inspection.model, command=command)
        found.append(replace(inspection, model=about, grounding=measured[0] if measured else {}))
    for file, (weights, _) in grounding.items():
        if not any(weights.startswith(inspection.model.checkpoint) for inspection in found):
            raise ConfigError(
                f"{file} was measured on weights {weights[:12]}, which no run given here has: "
                f"{', '.join(f'{one.model.name} has {one.model.checkpoint}' for one in found)}. Leave --alignment out, "
                "or measure again: visling analysis alignment RUN."
            )
    documents = [inspection.to_json() for inspection in found]
    write_page(target, documents, _choose_view(found, layer, head, direction))
    if json_ is not None:
        write_new(json_, json.dumps(documents[0] if len(documents) == 1 else documents))
    for inspection in found:
        print("\n".join(_summarise(inspection)))
    print(f"Wrote {target}" + ("" if json_ is None else f" and {json_}"))


def _sort_words(words: Sequence[str]) -> tuple[list[str], list[str], str]:
    """Runs, images and the text. Images begin with the first file; without one, the last word before the text is meant
    as an image, unless it is the only one: a run that reads words alone needs none."""
    *places, text = words
    if not places:
        raise typer.BadParameter(f"give a run, an image and the text: {_USE}")
    first = next((n for n, place in enumerate(places) if n and Path(place).is_file()), max(len(places) - 1, 1))
    return places[:first], places[first:], text


def _choose_view(
    found: Sequence[Inspection], layer: str | None, head: int | None, direction: str | None
) -> dict[str, Any]:
    """What the page shows first, as fields of its state.

    Raises:
        ConfigError: a layer or head that is not there.
        DataError: no maps of the direction.
    """
    if layer is None and head is None and direction is None:
        return {}
    for inspection in found:
        inspection.check_direction(direction)
    name, known = found[0].model.name, found[0].layers_by_direction
    ways = sorted(known, key=lambda way: way != "text_to_regions")
    chosen = direction or next((way for way in ways if layer in known[way]), ways[0])
    layers, heads = known[chosen], found[0].count_heads(chosen)
    if layer is not None and layer not in layers and not (layer.isdecimal() and int(layer) < len(layers)):
        raise ConfigError(
            f"no layer {layer!r} with maps {chosen} in {name}. Give one of {', '.join(layers)}, or its number, from 0 "
            f"to {len(layers) - 1}."
        )
    if head is not None and head >= heads:
        raise ConfigError(f"no head {head} in {name}: a layer has {heads} heads, numbered from 0 to {heads - 1}.")
    row = "*" if layer is None else str(layers.index(layer)) if layer in layers else str(int(layer))
    column = "*" if head is None else str(head)
    cells = "all" if row == column == "*" else f"{row}.{column}"
    return {"show": "attention", "direction": chosen, "cells": cells}


def _summarise(inspection: Inspection) -> list[str]:
    """The top of what the page shows."""
    answers = ", ".join(f"{answer.text} {answer.probability:.0%}" for answer in inspection.answers[:3]) or "no answer"
    lines = [f"{inspection.model.name}: {answers}"]
    if reasons := inspection.list_reasons():
        lines.append(f"  what counted most: {', '.join(f'{name} {score:.2f}' for name, score in reasons)}")
    if inspection.notice:
        lines.append(f"  {inspection.notice}")
    return lines
