"""visling pretrain and finetune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from visling.cli.options import (
    IMAGES,
    OWN_FILES,
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
from visling.cli.printing import print_model_folder, progress_bar


def pretrain(
    recipe: Recipe,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="DIR",
            help="Folder of annotations; may be repeated. DIR@SPLIT reads one split, for training only.",
        ),
    ],
    out: Out,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Region store that holds every image; text alone needs none."),
    ] = None,
    init: Init = None,
    resume: Resume = False,
    images: Images = None,
    backbone: Backbone = None,
    other_features: OtherFeatures = False,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Seed = None,
    set_: Settings = None,
    log_to: LogTo = None,
    device: Device = "auto",
    threads: Threads = None,
    processes: Processes = 1,
) -> None:
    """Pre-train an encoder on sentences about images.

    Example: visling pretrain --recipe visualbert-scenes --data scenes --store regions --out pretrained
    """
    from visling import runtime
    from visling.recipes.tables import find_pretraining
    from visling.runs import pretrain as pretraining
    from visling.runs.configure import configure

    short = {"--epochs": epochs, "--batch-size": batch_size, "--lr": lr, "--seed": seed}
    run = configure(find_pretraining(recipe)(), set_ or (), options=short, init=init)
    runtime.limit_threads(threads)
    with runtime.collector_paused(), runtime.process_group(processes):
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
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="Name of a recipe; `visling recipes list` shows them. Your own: MODULE:NAME. "
            "Without it: the small one for your own data (FAMILY-small), with the task that --task names.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What is learned: vqa, classification, ..., or a task of your own: MODULE."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the official annotations of a task.")
    ] = None,
    init: Init = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FAMILY", help="Model family with --task; that of --init by default, else visualbert."),
    ] = None,
    resume: Resume = False,
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of --data: training examples, .jsonl, .json, .csv or .tsv.",
            rich_help_panel=OWN_FILES,
        ),
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|SHARE",
            help="Validation examples; or the share of the images of --train to hold out, such as 0.1.",
            rich_help_panel=OWN_FILES,
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Test examples, checked now and scored later.", rich_help_panel=OWN_FILES),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="List of the answers or labels; by default those of the training examples.",
            rich_help_panel=OWN_FILES,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the images. With your own files: their regions are extracted into OUT/regions first. With "
            "--store: for recipes whose region extractor is trained jointly.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Detector that extracts the regions of --images; by default the one that --init carries.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Region store that holds every image; not needed with --images or --text-only.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    valid_store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Region store of the validation images, where they are shown with other regions than in training.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only",
            help="Train without any region, to measure what the words alone give away.",
            rich_help_panel=IMAGES,
        ),
    ] = False,
    backbone: Backbone = None,
    other_features: OtherFeatures = False,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Seed = None,
    set_: Settings = None,
    log_to: LogTo = None,
    device: Device = "auto",
    threads: Threads = None,
    processes: Processes = 1,
) -> None:
    """Fine-tune a model on a task, by a recipe or on files of your own.

    Example: visling finetune --recipe visualbert-vqa-scenes --data scenes --store regions --init pretrained --out vqa

    Example: visling finetune --task vqa --train train.csv --valid 0.1 --images photos --init pretrained --out run
    """
    from visling import runtime
    from visling.cli.own_data import OwnOptions
    from visling.runs import finetune as finetuning
    from visling.runs.configure import configure

    options = OwnOptions(
        recipe=recipe, task=task, data=data, train=train, valid=valid, test=test, images=images, detector=detector,
        store=store, answers=answers, init=init, model=model, text_only=text_only,
    )  # fmt: skip
    source = options.source()
    short = {"--epochs": epochs, "--batch-size": batch_size, "--lr": lr, "--seed": seed}
    chosen = options.find_recipe()()
    run = configure(chosen, [*(set_ or []), *options.settings(chosen.task)], options=short, init=init)
    runtime.limit_threads(threads)
    with (
        runtime.collector_paused(),
        runtime.process_group(processes),
        progress_bar("Extracting regions", at_once=False) as progress,
    ):
        state = finetuning.finetune(
            run,
            out,
            data=source,
            store=store,
            images=images,
            detector=detector,
            progress=progress,
            init=init,
            device=device,
            resume=resume,
            other_features=other_features,
            backbone=backbone,
            valid_store=valid_store,
            stream=sys.stderr,
            log_to=log_to or (),
            command=["visling", *sys.argv[1:]],
        )
    print_model_folder("Fine-tuned", out, state.stopped)
