"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from visling import runtime
from visling.errors import ConfigError

T = TypeVar("T")

Out = Annotated[Path, typer.Option("--out", help="Folder to write; a folder that already holds something is refused.")]

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run into --out stopped.")]

OtherFeatures = Annotated[
    bool, typer.Option("--other-features", help="Accept a model that was trained on features of another detector.")
]

Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting: a.b=value. May be given several times.")
]

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads; torch's choice if left out. A second one gains nothing at width 96."
    ),
]

Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        help="Processes that train side by side, one device each; every one reads batches of batch_size.",
    ),
]

Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of every random choice; the recipe's own if left out.")
]


def parse_precision(name: str) -> runtime.Precision:
    if name not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision is {name!r}; expected auto, fp32 or bf16.")
    return name  # type: ignore[return-value]


def parse_dtype(name: str) -> Literal["float16", "float32"]:
    if name not in ("float16", "float32"):
        raise ConfigError(f"dtype is {name!r}; expected float16 or float32.")
    return name  # type: ignore[return-value]
