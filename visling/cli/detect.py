"""visling detect: train and score a region detector."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from visling import runtime
from visling.cli.options import Device, Json, Out, Resume, Settings, parse_precision
from visling.cli.printing import rounded, show_with_unreadable

detect_app = typer.Typer(no_args_is_help=True, help="Train and score a region detector.")


@detect_app.command("train")
def detect_train(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    annotations: Annotated[
        Path,
        typer.Option(
            help="COCO instances JSON (boxes, categories, optional attributes), or SPLIT/SPLIT.json of NLVR v1."
        ),
    ],
    out: Out,
    preset: Annotated[str, typer.Option(help="Size and input of the detector: default, scenes or nlvr.")] = "default",
    seconds: Annotated[float | None, typer.Option(help="Training time; the preset's own if left out.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates instead of time, which makes a run repeatable.")] = None,
    set_: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Train a small Faster R-CNN on any folder with boxes.

    Example: visling detect train scenes/images/train --annotations scenes/annotations/instances_train.json --preset
    scenes --out detector
    """
    from visling.recipes.detectors import detect_config
    from visling.runs import detect as detection

    given = {"seconds": seconds, "steps": steps}
    settings = [*(f"{name}={value}" for name, value in given.items() if value is not None), *(set_ or [])]
    training = detect_config(settings, preset)

    def say(now: detection.DetectionProgress) -> None:
        speed, left = f"{now.images_per_second:.0f} images/s", timedelta(seconds=round(now.seconds_left))
        print(f"{now.share:>4.0%}  step {now.step}  loss {now.loss:.3f}  {speed}  {left} left", file=sys.stderr)

    where = runtime.pick_device(device)
    found = detection.train_detector(
        images,
        detection.read_annotations(annotations),
        out,
        training,
        seed=seed,
        device=str(where),
        precision=runtime.resolve(parse_precision(precision), where),
        progress=say,
        resume=resume,
    )
    counts = {
        "images": found.images,
        "steps": found.steps,
        "epochs": round(found.epochs, 2),
        "seconds": round(found.seconds, 1),
    }
    show_with_unreadable(counts, found.unreadable, json_, f"Wrote {out}")


@detect_app.command("eval")
def detect_eval(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    annotations: Annotated[Path, typer.Option(help="COCO instances JSON, or SPLIT/SPLIT.json of NLVR v1.")],
    detector: Annotated[Path, typer.Option(help="Folder of a trained detector.")],
    device: Device = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first images only.")] = None,
    json_: Json = False,
) -> None:
    """Score a detector: mean average precision at IoU 0.5, recall, attributes.

    Example: visling detect eval scenes/images/val --annotations scenes/annotations/instances_val.json --detector
    detector
    """
    from visling.runs import detect as detection

    found = detection.evaluate_detector(
        detector, images, detection.read_annotations(annotations), device=device, limit=limit
    )
    scores = {
        "images": found.images,
        "mean average precision at IoU 0.5": rounded(found.scores.mean_ap),
        "recall at IoU 0.5": rounded(found.scores.recall),
        "attribute accuracy": rounded(found.scores.attribute_accuracy),
        "images per second": round(found.images_per_second, 1),
        **{f"average precision of {name}": rounded(value) for name, value in sorted(found.ap.items())},
    }
    show_with_unreadable(scores, found.unreadable, json_)
