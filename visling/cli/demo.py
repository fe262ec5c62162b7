"""visling demo: the whole way in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def demo(
    size: Annotated[
        Literal["tiny", "small", "large"],
        typer.Option(help="How much is drawn and how long is trained; small takes minutes, tiny learns nothing."),
    ] = "small",
    model: Annotated[
        Literal["visualbert", "lxmert", "cvlp", "vlbert", "vilbert"], typer.Option(help="Model family.")
    ] = "visualbert",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, demo/SIZE by default; all models share its pictures and regions."),
    ] = None,
    at_least: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS", help="Fail unless the full model is this far above the model that sees no image."
        ),
    ] = None,
) -> None:
    """Draw scenes, train a detector and a model, answer questions: every stage by a command that you could type.

    Finished stages are skipped, a stopped one is resumed.

    Example: visling demo --size small --model lxmert
    """
    from visling.runs.demo import run_demo

    run_demo(size, out or Path("demo") / size, model, at_least=at_least)
