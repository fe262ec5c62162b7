"""From drawn pictures to answered questions, by the same commands that a user types.

Run by `make demo`. Every stage prints its command, writes one folder under --out, and is skipped when that folder is finished, so a
second run is quick and a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything; times are of two quiet cores."""

    images: int
    detector_seconds: int
    pretrain_epochs: int
    finetune_epochs: int


SIZES = {
    "tiny": Size(images=120, detector_seconds=8, pretrain_epochs=1, finetune_epochs=1),  # does it run; learns nothing
    "small": Size(images=2500, detector_seconds=75, pretrain_epochs=6, finetune_epochs=10),
    "large": Size(images=8000, detector_seconds=180, pretrain_epochs=8, finetune_epochs=12),
}


def main() -> None:
    """Run every stage, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, default=Path("demo/small"))
    parser.add_argument("--model", default="visualbert")
    options = parser.parse_args()
    size, out, model = SIZES[options.size], options.out, options.model
    started = time.monotonic()

    scenes, detector, regions = out / "scenes", out / "detector", out / "regions"
    data = ["--data", str(scenes), "--store", str(regions)]
    stage("Draw scenes with captions, questions and answers", scenes / "scenes.json", "scenes", "--out", scenes, "--images", size.images, "--seed", 0)
    boxes = ["--annotations", scenes / "annotations"]
    stage("Train a detector on their boxes", finished(detector), "detect", "train", scenes / "images" / "train",
          *boxes[:1], boxes[1] / "instances_train.json", "--out", detector, "--preset", "scenes", "--seconds", size.detector_seconds)  # fmt: skip
    stage("Score the detector on images it has not seen", detector / "evaluation.json", "detect", "eval", scenes / "images" / "val",
          *boxes[:1], boxes[1] / "instances_val.json", "--detector", detector)  # fmt: skip
    stage(
        "Turn every picture into regions",
        regions / "manifest.json",
        "regions",
        "extract",
        scenes / "images",
        "--detector",
        detector,
        "--out",
        regions,
    )
    stage("Pre-train on the captions", finished(out / "pretrain"), "pretrain", "--recipe", f"{model}-scenes", *data, "--out", out / "pretrain",
          "--set", f"train.epochs={size.pretrain_epochs}")  # fmt: skip
    tuning = ["finetune", "--recipe", f"{model}-vqa-scenes", *data, "--init", out / "pretrain", "--set", f"train.epochs={size.finetune_epochs}"]
    stage("Fine-tune on questions", finished(out / "vqa"), *tuning, "--out", out / "vqa")
    stage("The same for a model that never sees the image", finished(out / "question-only"), *tuning, "--text-only", "--out", out / "question-only")
    for run in ("question-only", "vqa"):
        stage(f"Score {run} on the test split", out / run / "evaluation_test.json", "evaluate", out / run, "--split", "test")
    pictures = sorted((scenes / "images" / "test").glob("*.png"))[:3]
    stage("Answer a question about three pictures", out / "vqa" / "answers" / f"{pictures[0].stem}.png",
          "predict", "--run", out / "vqa", *pictures, "how many objects are there?")  # fmt: skip
    stage("Write the report", out / "vqa" / "report.html", "report", out / "vqa", "--compare", out / "question-only")

    print_table(out)
    print(f"\nThis run took {(time.monotonic() - started) / 60:.1f} minutes. Everything is in {out}; open {out / 'vqa' / 'report.html'}.")


def finished(run: Path) -> Path:
    """The file that says a run is complete."""
    return run / "finished.json"


def stage(title: str, done: Path, *words: object) -> None:
    """Print a command and run it, unless its result is already there."""
    command = [str(word) for word in words]
    print(f"\n== {title}\n$ visling {' '.join(command)}", flush=True)
    if done.exists():
        print(f"(done before: {done})")
        return
    if command[0] in ("pretrain", "finetune") or command[:2] in (["detect", "train"], ["regions", "extract"]):
        command.append("--resume")  # a new folder starts from the beginning, an interrupted one goes on
    started = time.monotonic()
    status = subprocess.call([sys.executable, "-m", "visling", *command])
    if status:
        sys.exit(f"The demo stopped: `visling {command[0]}` ended with status {status}; its message stands above.")
    print(f"({time.monotonic() - started:.0f} s)")


def print_table(out: Path) -> None:
    """Majority answer, question-only model and full model, by question family, on the test split."""
    full = json.loads((out / "vqa" / "evaluation_test.json").read_text())
    blind = json.loads((out / "question-only" / "evaluation_test.json").read_text())
    majority = full["baselines"]["majority answer per question type"]
    columns = [majority["by"]["question_type"], blind["by"]["question_type"], full["by"]["question_type"]]
    print(f"\nVQA accuracy on {full['scores']['accuracy']['count']} test questions, percent")
    print(f"{'question family':<24}{'questions':>10}{'majority':>10}{'question only':>15}{'full model':>12}")
    for family in sorted(columns[2]):
        values = [column[family]["value"] for column in columns]
        print(f"{family:<24}{columns[2][family]['count']:>10}{values[0]:>10.1f}{values[1]:>15.1f}{values[2]:>12.1f}")
    values = [part["scores"]["accuracy"]["value"] for part in (majority, blind, full)]
    print(f"{'all':<24}{full['scores']['accuracy']['count']:>10}{values[0]:>10.1f}{values[1]:>15.1f}{values[2]:>12.1f}")
    print(f"The full model is {values[2] - values[1]:.1f} points above the question-only model.")


if __name__ == "__main__":
    main()
