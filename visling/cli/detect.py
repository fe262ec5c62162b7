"""visling detect: train and score a region detector, or make one of released weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from visling.cli.detector_adapters import detect_grid, detect_wrap
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
from visling.cli.printing import claim_folder, describe_early_end, progress_bar, rounded, show_with_unreadable

_HARDLY_ANY = 0.01
"""Mean average precision below which a warning says what to do."""

detect_app = typer.Typer(cls=Group, no_args_is_help=True, help="Train, score, convert or make a region detector.")
detect_app.command("convert", cls=Command)(detect_convert)
detect_app.command("wrap", cls=Command)(detect_wrap)
detect_app.command("grid", cls=Command)(detect_grid)


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
        Literal["default", "scenes", "nlvr", "resnet50"],
        typer.Option(help="Size and input of the detector, and its training; the default is for photographs."),
    ] = "default",
    init: Annotated[
        Path | None,
        typer.Option(
            help="Trained detector to start from, with its size and input, be it one's own or the released one: what "
            "fits is taken, and classes and attributes of the same name keep their rows."
        ),
    ] = None,
    backbone: Annotated[
        Path | None,
        typer.Option(help="Weights of a plain ResNet under torchvision's names, for --preset resnet50."),
    ] = None,
    freeze: Annotated[
        int | None,
        typer.Option(min=0, help="Parts of the backbone, from the pixels on, that keep the weights they start from."),
    ] = None,
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
    """Train a Faster R-CNN on any folder with boxes: from scratch, from a trained detector, or on a ResNet.

    Example: visling detect train images --annotations instances_train.json --preset scenes --out detector
    """
    from visling import runtime
    from visling.recipes.detectors import detect_config
    from visling.runs import detect as detection
    from visling.vision.detector_start import read_trainable

    target = runtime.pick_device(device)
    options = {
        "train.max_steps": steps,
        "train.seconds": seconds,
        "train.seed": seed,
        "train.precision": runtime.resolve(precision, target),
        "frozen_stages": freeze,
    }
    chosen = [f"{name}={value}" for name, value in options.items() if value is not None]
    start = None if init is None else read_trainable(init).config
    config = detect_config([*chosen, *(set_ or [])], preset, start)
    runtime.limit_threads(threads)
    with runtime.process_group(processes):
        trained = detection.train_detector(
            images,
            detection.read_annotations(annotations),
            out,
            config,
            init=init,
            backbone=backbone,
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
    title = describe_early_end(out, trained.stopped) or f"Wrote {out}"
    show_with_unreadable(counts, trained.unreadable, json_, title)


@detect_app.command("eval", cls=Command)
def detect_eval(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    annotations: Annotated[Path, typer.Option(help="COCO instances JSON, or SPLIT/SPLIT.json of NLVR v1.")],
    detector: Annotated[Path, typer.Option(help="Folder of a trained detector.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for evaluation_detector.json, the precision-recall curve as SVG, and pictures; "
            "DETECTOR/evaluation if only --pictures is given."
        ),
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Draw this many images: the objects, and next to them what was found.")
    ] = 0,
    device: Device = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first images.")] = None,
    json_: Json = False,
) -> None:
    """Score a detector: mean average precision at IoU 0.5, recall, attributes; classes from the best to the worst.

    Example: visling detect eval images --annotations instances_val.json --detector detector --pictures 12
    """
    from visling.analysis.detections import write_detections
    from visling.runs import detect as detection

    if out is None and pictures:
        out = detector / "evaluation"
    if out is not None:
        claim_folder(out)
    with progress_bar("Detecting") as step:
        scored = detection.evaluate_detector(
            detector,
            images,
            detection.read_annotations(annotations),
            device=device,
            limit=limit,
            examples=pictures,
            progress=step,
        )
    if out is not None:
        write_detections(
            out,
            {"detector": str(detector), "fingerprint": scored.detector.fingerprint, "annotations": str(annotations)},
            scored.scores,
            scored.curve,
            names=scored.detector.class_names,
            attributes=scored.detector.attribute_names,
            examples=[(one.image, one.truth, one.found) for one in scored.examples],
        )
    best = scored.curve.best
    scores = {
        "images": scored.images,
        "mean average precision at IoU 0.5": rounded(scored.scores.mean_ap),
        "recall at IoU 0.5": rounded(scored.scores.recall),
        "recall regardless of class": rounded(scored.scores.recall_any_class),
        "attribute accuracy": rounded(scored.scores.attribute_accuracy),
        "best confidence threshold": None if best is None else rounded(float(scored.curve.confidence[best])),
        "images per second": round(scored.images_per_second, 1),
        **{f"average precision of {name}": rounded(value) for name, value in scored.ap.items()},
    }
    show_with_unreadable(scores, scored.unreadable, json_, "" if out is None else f"Wrote {out}")
    if scored.scores.mean_ap < _HARDLY_ANY:
        print(
            "warning: the detector finds hardly any of these objects. Train it longer or on more boxes (a detector of "
            "photographs needs thousands), start from a trained one with --init, or take regions from elsewhere "
            "(`visling detect convert`, `visling regions convert`); docs/detectors/own.md says more.",
            file=sys.stderr,
        )
