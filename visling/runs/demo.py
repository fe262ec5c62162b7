"""From drawn pictures to answered questions, by the commands that a user would type.

Every stage prints its command, writes one folder under `out`, and is skipped when that folder is finished: a second run
is quick, and a stopped run resumes where it was.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.errors import RunError
from visling.scenes.clear_questions import ClearQuestion, choose_questions, describe_answer
from visling.train.interruption import Interruption, listen


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is drawn and how long is trained."""

    images: int
    detector_steps: int
    pretrain_epochs: int
    finetune_epochs: int


SIZES: Mapping[str, Size] = {
    "tiny": Size(images=120, detector_steps=80, pretrain_epochs=1, finetune_epochs=1),  # does it run; learns nothing
    "small": Size(images=2500, detector_steps=450, pretrain_epochs=12, finetune_epochs=5),
    "large": Size(images=6000, detector_steps=900, pretrain_epochs=9, finetune_epochs=5),
}
SHARE_OF_EPOCHS: Mapping[str, float] = {"visualbert": 2 / 3, "lxmert": 0.72}
"""Share of `pretrain_epochs`, 1 if not listed: VisualBERT learns soonest which word belongs to which region, and
LXMERT, which also reads questions, makes as many updates in fewer epochs."""


def run_demo(size_name: str, out: Path, model: str, *, at_least: float | None = None) -> None:
    """Run every stage, then print the table. SIGTERM ends it: what a stage trains is saved, and the same command
    continues.

    Args:
        size_name: a key of SIZES.
        out: folder to write; all models share its pictures and regions.
        model: family.
        at_least: points that the full model must be above the question-only model.
    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the same holds.
        RunError: a stage failed, or the full model is not as far above.
    """
    with end_stages() as interruption:
        _run_stages(SIZES[size_name], out, model, at_least)
    if interruption.asked:
        print("\nThe demo was stopped. Run the same command to continue from here.")
    if interruption.asked == "interrupted":
        raise KeyboardInterrupt


@contextlib.contextmanager
def end_stages() -> Iterator[Interruption]:
    """Context in which SIGTERM and Ctrl-C are passed on to the stages that run, and their ends are no errors."""
    _children.asked_to_end = False
    with listen(lambda _: _children.end()) as interruption:
        try:
            yield interruption
        except RunError:
            if not interruption.asked:
                raise


def _run_stages(size: Size, out: Path, model: str, at_least: float | None) -> None:
    started = time.monotonic()

    scenes, detector, regions = out / "scenes", out / "detector", out / "regions"
    pretrained, full, blind = out / model / "pretrain", out / model / "vqa", out / model / "question-only"
    instances = scenes / "annotations"
    epochs = max(1, round(size.pretrain_epochs * SHARE_OF_EPOCHS.get(model, 1.0)))
    data = ["--data", scenes, "--store", regions, "--threads", 1]
    tuning = [
        "finetune",
        "--recipe",
        f"{model}-vqa-scenes",
        *data,
        "--init",
        pretrained,
        "--set",
        f"train.epochs={size.finetune_epochs}",
    ]
    # fmt: off
    stage("Draw scenes with boxes, captions, questions and answers", (scenes / "scenes.json").exists(),
          "scenes", "--out", scenes, "--images", size.images, "--seed", 0)
    stage("Train a detector on the boxes", finished(detector),
          "detect", "train", scenes / "images" / "train", "--annotations", instances / "instances_train.json",
          "--preset", "scenes", "--steps", size.detector_steps, "--out", detector)
    stage("Score the detector on images it has not seen", (regions / "manifest.json").exists(),
          "detect", "eval", scenes / "images" / "val", "--annotations", instances / "instances_val.json",
          "--detector", detector)
    stage("Turn every picture into regions", (regions / "manifest.json").exists(),
          "regions", "extract", scenes / "images", "--detector", detector, "--out", regions)
    stage("Pre-train on the captions, two processes with half a batch each", finished(pretrained),
          "pretrain", "--recipe", f"{model}-scenes", *data, "--processes", 2, "--set", "batch_size=16",
          "--set", f"train.epochs={epochs}", "--out", pretrained)
    # Two processes of one thread each: small models gain nothing from a second thread.
    with ThreadPoolExecutor() as pool:
        for one in (
            pool.submit(stage, "Fine-tune on questions", finished(full), *tuning, "--out", full, label=full.name),
            pool.submit(stage, "At the same time, for as long: a model that never sees the image", finished(blind),
                        *tuning, "--text-only", "--out", blind, label=blind.name),
        ):
            one.result()
        for one in [
            pool.submit(stage, f"Score {run.name} on the test split", (run / "evaluation_test.json").exists(),
                        "evaluate", run, "--split", "test", label=run.name)
            for run in (blind, full)
        ]:
            one.result()
    questions = choose_questions(scenes)
    for question in questions:
        ask(question, full)
    stage("Write the report", (full / "report.html").exists(), "report", full, "--compare", blind)
    # fmt: on

    gain = print_table(full, blind)
    minutes = (time.monotonic() - started) / 60
    print(f"\nThis run took {minutes:.1f} minutes. Everything is in {out}; open {full / 'report.html'}.")
    for line in list_next_steps(full, questions):
        print(line)
    if at_least is not None and gain < at_least:
        raise RunError(f"the full model should be {at_least:g} points above the question-only model; it is {gain:.1f}.")


def list_next_steps(run: Path, questions: Sequence[ClearQuestion]) -> list[str]:
    """Commands that show what the model looks at, as they can be typed here; last the one that starts its page."""
    program = _name_program()
    lines = ["\nLook inside: one page about a question, then a page in the browser to ask more (Ctrl-C stops it)"]
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        lines.append(f"The second needs {' and '.join(missing)}: {sys.executable} -m pip install {' '.join(missing)}")
    shown = [["inspect", str(run), str(one.image), one.text] for one in questions[:1]]
    return lines + [f"$ {program} {shlex.join(words)}" for words in (*shown, ["serve", "--run", str(run)])]


def _name_program() -> str:
    """What starts this program from the working folder: `visling` where that is the one beside this Python."""
    beside = Path(sys.executable).parent / "visling"
    found = shutil.which("visling")
    if found is not None and Path(found).parent.resolve() == beside.parent.resolve():
        return "visling"
    return os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m visling"


def finished(run: Path) -> bool:
    """Whether a run folder says that its run is complete."""
    return _status(run) == "finished"


def _status(run: Path) -> str:
    about = run / "run.json"
    return str(json.loads(about.read_text())["status"]) if about.exists() else "none"


def stage(title: str, done: bool, *words: object, label: str = "") -> None:
    """Print a command and run it, unless its result exists; an interrupted run is resumed.

    Args:
        label: stands before each of its lines, for stages that run side by side.
    Raises:
        RunError: the command failed.
    """
    command = [str(word) for word in words]
    if "--out" in command:
        out = Path(command[command.index("--out") + 1])
        begun = _status(out) == "running" or (out.exists() and command[:2] == ["regions", "extract"])
        command += ["--resume"] if begun and not done else []
    mark = f"[{label}] " if label else ""
    print(f"\n== {title}\n$ visling {' '.join(command)}", flush=True)
    if done:
        print(f"{mark}(done before)")
        return
    started = time.monotonic()
    status = _children.call([sys.executable, "-m", "visling", *command], mark)
    if status:
        raise RunError(
            f"stopped: `visling {command[0]}` ended with status {status}; see its message above. "
            "Run the same command to continue from here."
        )
    print(f"{mark}({time.monotonic() - started:.0f} s)")


def ask(question: ClearQuestion, run: Path) -> None:
    """Ask a run a question about an image, and print its answer next to the truth, unless it was asked before.

    Raises:
        RunError: the command failed.
    """
    command = ["predict", "--run", str(run), str(question.image), question.text, "--json"]
    print(f"\n== Ask about a picture\n$ visling {shlex.join(command)}", flush=True)
    if any((run / "answers").glob(f"{question.image.stem}*.png")):
        print("(done before)")
        return
    ended = subprocess.run([sys.executable, "-m", "visling", *command], stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise RunError(f"stopped: `visling predict` ended with status {ended.returncode}; see its message above.")
    answer = json.loads(ended.stdout)
    print(describe_answer(question, answer["top"]))
    if "notice" in answer:
        print(answer["notice"])


class _Children:
    """Commands that the demo has started and that have not ended."""

    def __init__(self) -> None:
        self.asked_to_end = False
        self._running: list[subprocess.Popen[str]] = []

    def call(self, command: list[str], mark: str) -> int:
        """Status of a command, that of a killed one if it was asked to end; with a mark, its lines are printed behind
        it."""
        if self.asked_to_end:
            return -signal.SIGTERM
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if mark else {}
        with subprocess.Popen(command, text=True, **options) as process:
            self._running.append(process)
            for line in process.stdout or ():
                sys.stdout.write(f"{mark}{line}")
                sys.stdout.flush()
            status = process.wait()
            self._running.remove(process)
        return -signal.SIGTERM if self.asked_to_end else status

    def end(self) -> None:
        """Ask them all: those that train save first."""
        self.asked_to_end = True
        for process in self._running:
            process.terminate()


_children = _Children()


def print_table(full_run: Path, blind_run: Path) -> float:
    """Print majority answer, question-only model and full model by question family on the test split; returns the full
    model's gain in points."""
    full = json.loads((full_run / "evaluation_test.json").read_text())
    blind = json.loads((blind_run / "evaluation_test.json").read_text())
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
    return float(values[2] - values[1])
