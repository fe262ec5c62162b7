"""visling pretrain and finetune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from visling.cli.options import (
    Backbone,
    BatchSize,
    Device,
    Epochs,
    Images,
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
from visling.cli.recipes import find_recipe


def pretrain(
    recipe: Recipe,
    data: Annotated[
        list[str],
        typer.Option(help="Folder of annotations; may be repeated. DIR@SPLIT reads one split, for training only."),
    ],
    store: Annotated[Path, typer.Option(help="Region store that holds every image.")],
    out: Out,
    init: Init = None,
    images: Images = None,
    backbone: Backbone = None,
    other_features: OtherFeatures = False,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    set_: Settings = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    processes: Processes = 1,
    log_to: LogTo = None,
    resume: Resume = False,
) -> None:
    """Pre-train an encoder on sentences about images.

    Example: visling pretrain --recipe visualbert-scenes --data scenes --store regions --out pretrained
    """
    from visling import runtime
    from visling.recipes.tables import find_pretraining
    from visling.runs import pretrain as pretraining

    short = {"--epochs": epochs, "--batch-size": batch_size, "--lr": lr, "--seed": seed}
    run = find_recipe(find_pretraining(recipe), set_, short, init)
    runtime.limit_threads(threads)
    with runtime.process_group(processes):
        state = pretraining.pretrain(
            run,
            out,
            data=data,
            store=store,
            init=init,
            device=device,
            resume=resume,
            other_features=other_features,
            images=images,
            backbone=backbone,
            stream=sys.stderr,
            log_to=log_to or (),
            command=["visling", *sys.argv[1:]],
        )
    print_model_folder("Pre-trained", out, state.stopped)


def finetune(
    recipe: Recipe,
    data: Annotated[Path, typer.Option(help="Folder of annotations of the task.")],
    out: Out,
    store: Annotated[
        Path | None, typer.Option(help="Region store that holds every image; not needed with --text-only.")
    ] = None,
    init: Init = None,
    images: Images = None,
    backbone: Backbone = None,
    valid_store: Annotated[
        Path | None,
        typer.Option(
            help="Region store of the validation images, where they are shown with other regions than in training."
        ),
    ] = None,
    other_features: OtherFeatures = False,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Train without any region, to measure what the words alone give away.")
    ] = False,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    set_: Settings = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    processes: Processes = 1,
    log_to: LogTo = None,
    resume: Resume = False,
) -> None:
    """Fine-tune a model on a task.

    Example: visling finetune --recipe visualbert-vqa-scenes --data scenes --store regions --init pretrained --out vqa
    """
    from visling import runtime
    from visling.recipes.tables import find_finetuning
    from visling.runs import finetune as finetuning

    settings = [*(set_ or []), *(["text_only=true"] if text_only else [])]
    short = {"--epochs": epochs, "--batch-size": batch_size, "--lr": lr, "--seed": seed}
    run = find_recipe(find_finetuning(recipe), settings, short, init)
    runtime.limit_threads(threads)
    with runtime.process_group(processes):
        state = finetuning.finetune(
            run,
            out,
            data=data,
            store=store,
            init=init,
            device=device,
            resume=resume,
            other_features=other_features,
            images=images,
            backbone=backbone,
            valid_store=valid_store,
            stream=sys.stderr,
            log_to=log_to or (),
            command=["visling", *sys.argv[1:]],
        )
    print_model_folder("Fine-tuned", out, state.stopped)
