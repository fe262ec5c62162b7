"""Options of commands that look at a trained model through the examples of a data set; see `runs.examples.open_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visling.cli.options import IMAGES, MACHINE

Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run folder of finetune or pretrain, or a model folder; one that is in no run needs --data and --store.",
    ),
]

Split = Annotated[str, typer.Option("--split", metavar="NAME", help="Split to read.")]

File = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", help="Instead of a split: your own examples, .jsonl, .json, .csv or .tsv."),
]

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder of annotations; the training run's by default. A pre-trained model reads captions.",
    ),
]

Store = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="Region store; the training run's by default.", rich_help_panel=IMAGES),
]

ImageFolder = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Folder of the images: those of --file, or for a model that computes the features of regions itself; the "
        "training run's by default.",
        rich_help_panel=IMAGES,
    ),
]

Limit = Annotated[
    int | None, typer.Option("--examples", min=1, metavar="N", help="Only the first N examples; all by default.")
]

BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Examples per batch; results do not depend on it.",
        rich_help_panel=MACHINE,
    ),
]
