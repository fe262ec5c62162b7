"""visling multitask."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from visling.cli.options import (
    Device,
    Init,
    LearningRate,
    LogTo,
    OtherFeatures,
    Out,
    Processes,
    Recipe,
    Resume,
    Seed,
    Settings,
    Threads,
)
from visling.cli.printing import print_model_folder


def multitask(
    recipe: Recipe,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="DIR|NAME=DIR",
            help="Folder of the annotations of all tasks; each may have its own sub-folder there. NAME=DIR: folder of "
            "one task; may be repeated.",
        ),
    ],
    store: Annotated[
        list[str],
        typer.Option(
            metavar="DIR|NAME=DIR",
            help="Region store that holds every image. NAME=DIR: that of one task; may be repeated.",
        ),
    ],
    out: Out,
    init: Init = None,
    resume: Resume = False,
    other_features: OtherFeatures = False,
    lr: LearningRate = None,
    seed: Seed = None,
    set_: Settings = None,
    log_to: LogTo = None,
    device: Device = "auto",
    threads: Threads = None,
    processes: Processes = 1,
) -> None:
    """Train one model on several tasks in turn. A task whose score has stopped rising pauses.

    Example: visling multitask --recipe vilbert-multitask-scenes --data scenes --store regions --init pretrained --out
    several
    """
    from visling import runtime
    from visling.recipes.tables import find_multitask
    from visling.runs import multitask as multitasking
    from visling.runs.configure import configure

    run = configure(find_multitask(recipe)(), set_ or (), options={"--lr": lr, "--seed": seed}, init=init)
    runtime.limit_threads(threads)
    with runtime.collector_paused(), runtime.process_group(processes):
        state = multitasking.multitask(
            run,
            out,
            data=data,
            store=store,
            init=init,
            device=device,
            resume=resume,
            other_features=other_features,
            stream=sys.stderr,
            log_to=log_to or (),
            command=["visling", *sys.argv[1:]],
        )
    print_model_folder("Trained", out, state.stopped)
