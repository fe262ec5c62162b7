"""visling detect: train and score a region detector, or make one of released weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from visling.cli.detector_weights import detect_convert
from visling.cli.options import (
    Command,
    Device,
    Group,
    Json,
    LogTo,
    Out,
    Precision,
    Processes,
    Resume,
    Settings,
    Threads,
)
from visling.cli.printing import rounded, show_with_unreadable

detect_app = typer.Typer(cls=Group, no_args_is_help=True, help="Train, score or convert a region detector.")
detect_app.command("convert", cls=Command)(detect_convert)


@detect_app.command("train", cls=Command)
def detect_train(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    annotations: Annotated[
        Path,
        typer.Option(
            help="COCO instances JSON (boxes, categories, optional attributes), or SPLIT/SPLIT.json of NLVR v1."
        ),
    ],
    out: Out,
    preset: Annotated[
        Literal["default", "scenes", "nlvr"],
        typer.Option(help="Size and input of the detector; the default is for photographs."),
    ] = "default",
    seconds: Annotated[float | None, typer.Option(help="Train for a time, not for a number of updates.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates; the preset's number if left out.")] = None,
    set_: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    device: Device = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Precision of matrix products; auto is bf16 where the device has units for it.")
    ] = "auto",
    threads: Threads = None,
    processes: Processes = 1,
    log_to: LogTo = None,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Train a small Faster R-CNN on any folder with boxes.

    Example: visling detect train images --annotations instances_train.json --preset scenes --out detector
    """
    from visling import runtime
    from visling.recipes.detectors import detect_config
    from visling.runs import detect as detection

    target = runtime.pick_device(device)
    options = {
        "max_steps": steps,
        "seconds": seconds,
        "seed": seed,
        "precision": runtime.resolve(precision, target),
    }
    chosen = [f"train.{name}={value}" for name, value in options.items() if value is not None]
    config = detect_config([*chosen, *(set_ or [])], preset)
    runtime.limit_threads(threads)
    with runtime.process_group(processes):
        trained = detection.train_detector(
            images,
            detection.read_annotations(annotations),
            out,
            config,
            device=device,
            resume=resume,
            stream=sys.stderr,
            log_to=log_to or (),
        )
    counts = {
        "images": trained.images,
        "steps": trained.steps,
        "epochs": round(trained.epochs, 2),
        "seconds": round(trained.seconds, 1),
    }
    paused = trained.stopped == "max_seconds"
    title = f"Stopped by train.max_seconds; resume {out} with --resume" if paused else f"Wrote {out}"
    show_with_unreadable(counts, trained.unreadable, json_, title)


@detect_app.command("eval", cls=Command)
def detect_eval(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    annotations: Annotated[Path, typer.Option(help="COCO instances JSON, or SPLIT/SPLIT.json of NLVR v1.")],
    detector: Annotated[Path, typer.Option(help="Folder of a trained detector.")],
    device: Device = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first images.")] = None,
    json_: Json = False,
) -> None:
    """Score a detector: mean average precision at IoU 0.5, recall, attributes.

    Example: visling detect eval images --annotations instances_val.json --detector detector
    """
    from visling.runs import detect as detection

    scored = detection.evaluate_detector(
        detector, images, detection.read_annotations(annotations), device=device, limit=limit
    )
    scores = {
        "images": scored.images,
        "mean average precision at IoU 0.5": rounded(scored.scores.mean_ap),
        "recall at IoU 0.5": rounded(scored.scores.recall),
        "attribute accuracy": rounded(scored.scores.attribute_accuracy),
        "images per second": round(scored.images_per_second, 1),
        **{f"average precision of {name}": rounded(value) for name, value in sorted(scored.ap.items())},
    }
    show_with_unreadable(scores, scored.unreadable, json_)
