"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from visling import runtime
from visling.errors import ConfigError

Out = Annotated[Path, typer.Option("--out", help="Folder to write; it must be new or empty.")]

Device = Annotated[str, typer.Option("--device", help="Device: auto, cpu, cuda or cuda:N.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

Resume = Annotated[bool, typer.Option("--resume", help="Resume the interrupted run in --out.")]

OtherFeatures = Annotated[
    bool, typer.Option("--other-features", help="Accept a model that was trained on another detector's features.")
]

Settings = Annotated[list[str] | None, typer.Option("--set", help="Change one setting, as a.b=value; may be repeated.")]

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads; PyTorch's choice by default. The small models gain nothing from a second.",
    ),
]

Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        help="Processes to train with, one device each; each reads batches of batch_size.",
    ),
]

Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of every random choice; the recipe's by default.")
]


def parse_precision(name: str) -> runtime.Precision:
    """The value of --precision.

    Raises:
        ConfigError: not auto, fp32 or bf16.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision is {name!r}; expected auto, fp32 or bf16.")
    return name  # type: ignore[return-value]


def parse_dtype(name: str) -> Literal["float16", "float32"]:
    """The value of --dtype.

    Raises:
        ConfigError: not float16 or float32.
    """
    if name not in ("float16", "float32"):
        raise ConfigError(f"dtype is {name!r}; expected float16 or float32.")
    return name  # type: ignore[return-value]
