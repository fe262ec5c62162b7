"""visling scenes: the embedded data set."""

from __future__ import annotations

import json
import os
from typing import Annotated, Literal

import typer

from visling import config as configs
from visling.cli.options import Json, Out, Settings
from visling.cli.printing import progress_bar, show


def scenes(
    out: Out,
    images: Annotated[int, typer.Option(help="Number of scenes over all splits.")] = 1000,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of every random choice; the same seed writes the same files, byte for byte."),
    ] = 0,
    style: Annotated[Literal["plain", "sketch"], typer.Option(help="Style of the pictures.")] = "plain",
    panels: Annotated[
        int, typer.Option(help="Number of NLVR-like pictures: boxes of items with true and false statements.")
    ] = 0,
    answer_noise: Annotated[
        float,
        typer.Option(help="Share of the ten answers to each question that are replaced by another plausible answer."),
    ] = 0.0,
    set_: Settings = None,
    json_: Json = False,
) -> None:
    """Draw pictures with boxes, captions, questions, statements and text, in the official file formats.

    Example: visling scenes --out scenes --images 200 --seed 1
    """
    from visling.scenes import ScenesConfig, write_scenes

    chosen = {
        "images": images,
        "seed": seed,
        "style": style,
        "panels": panels,
        "answer_noise": answer_noise,
        "processes": os.cpu_count() or 1,
    }
    config = configs.override(configs.from_dict(ScenesConfig, chosen), set_ or ())
    with progress_bar("Drawing") as step:
        counts = write_scenes(out, config, progress=step)
    if json_:
        print(json.dumps(counts))
        return
    panel_counts = counts["counts"].pop("nlvr", {})
    tables = {**counts["counts"], **{f"panels, {split}": found for split, found in panel_counts.items()}}
    numbers = {
        name: [f"{value} {what.replace('_', ' ')}" for what, value in found.items() if isinstance(value, int)]
        for name, found in tables.items()
    }
    show({name: ", ".join(parts) for name, parts in numbers.items()}, json_, f"Wrote {out}")
