"""Options that several commands share, and the classes of commands: flags show no type in --help.

Files of `cli` import what is heavy (torch, numpy, Pillow) inside the commands, so that --help and lists answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Precision = Literal["auto", "fp32", "bf16"]
"""That of `runtime`, which imports torch."""

OWN_FILES, IMAGES, SETTINGS, MACHINE = "Your own files", "Images and regions", "Settings", "Machine"
"""Headings in the help of a command with many options; what stands under none of them comes first."""

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; it must be new or empty.")]

Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Name of a recipe; `visling recipes list` shows them. Your own: MODULE:NAME.",
    ),
]

Init = Annotated[
    Path | None,
    typer.Option("--init", metavar="DIR", help="Model folder or run folder to start from; random weights by default."),
]

Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="Device: auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Download nothing, as with the variables VISLING_OFFLINE and HF_HUB_OFFLINE: use what is here.",
    ),
]

Resume = Annotated[bool, typer.Option("--resume", help="Resume the interrupted run in --out.")]

OtherFeatures = Annotated[
    bool,
    typer.Option(
        "--other-features",
        help="Accept a model that was trained on another detector's features.",
        rich_help_panel=IMAGES,
    ),
]

Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Folder of the images, for recipes whose region extractor is trained jointly.",
        rich_help_panel=IMAGES,
    ),
]

Backbone = Annotated[
    Path | None,
    typer.Option(
        "--backbone",
        metavar="FILE",
        help="Weight file that the region extractor starts from: a ResNet, or a released model that has one.",
        rich_help_panel=IMAGES,
    ),
]

LogTo = Annotated[
    list[str] | None,
    typer.Option(
        "--log-to",
        metavar="NAME",
        help="Where losses and scores go in addition to OUT/log.jsonl: tensorboard, wandb or trackio; may be repeated.",
        rich_help_panel=SETTINGS,
    ),
]

TaskName = Annotated[
    str | None, typer.Option("--task", metavar="NAME", help="Of a run of several tasks: the one that is meant.")
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=VALUE",
        help="Change one setting, as a.b=value; may be repeated.",
        rich_help_panel=SETTINGS,
    ),
]

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="CPU threads; PyTorch's choice by default. The small models gain nothing from a second.",
        rich_help_panel=MACHINE,
    ),
]

Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        metavar="N",
        help="Processes to train with, one device each; each reads batches of batch_size.",
        rich_help_panel=MACHINE,
    ),
]

Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        metavar="N",
        help="Seed of every random choice; the recipe's by default.",
        rich_help_panel=SETTINGS,
    ),
]

Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        min=1,
        metavar="N",
        help="Passes over the training data: --set train.epochs=N.",
        rich_help_panel=SETTINGS,
    ),
]

BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Examples per step and process: --set batch_size=N.",
        rich_help_panel=SETTINGS,
    ),
]

LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        min=0,
        metavar="X",
        help="Peak learning rate: --set train.optim.lr=X.",
        rich_help_panel=SETTINGS,
    ),
]

Dtype = Annotated[
    Literal["float16", "float32"],
    typer.Option("--dtype", help="How features are stored; float32 takes twice the space."),
]


class Command(typer.core.TyperCommand):
    """A command whose help shows no type for flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All options and arguments."""
        return _hide_types_of_flags(super().get_params(ctx))


class Group(typer.core.TyperGroup):
    """A group of commands whose help shows no type for flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All options and arguments."""
        return _hide_types_of_flags(super().get_params(ctx))


def _hide_types_of_flags(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params
