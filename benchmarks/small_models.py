"""Models of demo size (width 96): seconds of a pre-training step and of answering, and against an older checkout.

    python benchmarks/small_models.py --out benchmarks/results
    git worktree add --detach /tmp/older COMMIT
    python benchmarks/small_models.py --out benchmarks/results --against /tmp/older

The "scenes" recipes of all families, batches of 32: a step is forward, loss, backward and AdamW update; answering is
the forward pass of the VQA head over 100 answers. With little work in a product, what surrounds the products counts.

With --against, the same measurement runs with the package of another checkout. Each side lives in a process of its own;
both are asked in turn (A B A B ...) for a few steps at a time, on the same drawn batches, and report the time that
their process has computed for (`time.process_time`), which other work on the machine disturbs less than a clock. The
ratio is the older checkout's time over this one's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from drawn_data import draw_pretraining, draw_questions
from measuring import (
    ADAMW,
    SEED,
    circumstances,
    claim,
    describe,
    finish,
    load_averages,
    stem_of,
    summary,
    write_result,
)

from visling import models, runtime
from visling.models.task_model import TaskModel
from visling.objectives.pretrain_model import PretrainModel
from visling.recipes.tables import PRETRAINING
from visling.runs.pretrain import untrained_model
from visling.types import Batch, Head, Targets

WORKS = ("pre-training step", "answering")
NUM_ANSWERS = 100
NUM_CLASSES = 24
"""Of objects and of attributes: drawn scenes have few."""
BATCHES = 4
"""Drawn batches that the steps go through."""


def make_work(model: str, work: str, preset: str, batch_size: int) -> Callable[[int], object]:
    """What one step does; called with its number."""
    device = torch.device("cpu")
    runtime.seed_everything(SEED)
    config = models.spec(model).presets[preset]
    if work == "answering":
        spec = models.spec(model).inputs(config)
        drawn = draw_questions(model, spec, batch_size, BATCHES, device, num_answers=NUM_ANSWERS)
        heads = {"classify": Head(kind="classify", outputs=NUM_ANSWERS)}
        answering = TaskModel(models.build(model, config), heads, models.head_styles(model)).eval()

        def answer(number: int) -> None:
            with torch.inference_mode():
                answering(drawn[number % BATCHES][0])

        return answer
    pretraining, batches = make_pretraining(model, config, batch_size)
    optimizer = torch.optim.AdamW(pretraining.parameters(), **ADAMW)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(pretraining(*batches[number % BATCHES]).value)
        optimizer.step()
        pretraining.after_update()

    return step


def make_pretraining(model: str, config: Any, batch_size: int) -> tuple[PretrainModel, list[tuple[Batch, Targets]]]:
    """The model of a family's recipe on drawn scenes, and drawn batches.

    Args:
        config: of its encoder.
    """
    run = replace(PRETRAINING[f"{model}-scenes"](), encoder=config)
    if run.region_losses is not None:
        losses = replace(
            run.region_losses,
            feature_size=config.feature_size,
            num_classes=NUM_CLASSES,
            num_attributes=NUM_CLASSES,
        )
        run = replace(run, region_losses=losses)
    pretraining = untrained_model(run).train()
    needs = frozenset[str]().union(*(objective.reads() for objective in pretraining.all_objectives()))
    return pretraining, draw_pretraining(run, batch_size, BATCHES, torch.device("cpu"), needs=needs)


def serve(options: argparse.Namespace) -> None:
    """Answer every line "MODEL<tab>WORK" with the seconds of each step, the first of which is a warm-up."""
    torch.set_num_threads(options.threads)
    known: dict[tuple[str, ...], Callable[[int], object]] = {}
    for line in sys.stdin:
        model, work = line.rstrip("\n").split("\t")
        if (model, work) not in known:
            known.clear()
            gc.collect()
            known[model, work] = make_work(model, work, options.preset, options.batch_size)
            known[model, work](0)
        start = time.process_time()
        for number in range(options.steps):
            known[model, work](number)
        print(json.dumps((time.process_time() - start) / options.steps), flush=True)


class Server:
    """`serve` in a new process, with the package of one checkout."""

    def __init__(self, checkout: Path, options: argparse.Namespace) -> None:
        if not (checkout / "visling" / "__init__.py").exists():
            raise SystemExit(f"{checkout} is no checkout: it holds no visling/__init__.py")
        command = [
            sys.executable, str(Path(__file__).resolve()), "--serve", "--preset", options.preset,
            "--batch-size", str(options.batch_size), "--steps", str(options.steps), "--threads", str(options.threads),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def seconds(self, model: str, work: str) -> float:
        """Computing time of a step, mean of a few."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{model}\t{work}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process for {model} ended; its message is above")
        found: float = json.loads(line)
        return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of every family's work, in turn."""
    here = Path(__file__).resolve().parents[1]
    found = []
    with ExitStack() as stack:
        sides = {"here": stack.enter_context(Server(here, options))}
        if options.against is not None:
            sides["older"] = stack.enter_context(Server(options.against, options))
        for model in options.models:
            for work in WORKS:
                seconds: dict[str, list[float]] = {name: [] for name in sides}
                for number in range(options.warmup + options.pairs):
                    for name, side in sides.items():
                        spent = side.seconds(model, work)
                        if number >= options.warmup:
                            seconds[name].append(spent)
                one: dict[str, Any] = {
                    "model": model,
                    "work": work,
                    "seconds": {name: summary(values) for name, values in seconds.items()},
                }
                if "older" in seconds:
                    one["ratio"] = summary([b / a for a, b in zip(seconds["here"], seconds["older"], strict=True)])
                found.append(one)
                told = ", ".join(f"{side} {each['median'] * 1e3:.2f} ms" for side, each in one["seconds"].items())
                print(f"{model}, {work}: {told}", flush=True)
    return found


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""

    def lines() -> Iterator[str]:
        settings = result["settings"]
        yield f"# Models of demo size, {result['date']}"
        yield ""
        yield (
            f"Preset {settings['preset']} of every family, batches of {settings['batch_size']}. Milliseconds that the "
            "process computed for in a step, median (smallest to largest). Ratio: the older checkout's time over this "
            "one's, in turn; above 1 this one is faster."
        )
        yield ""
        yield "| model | work | here | older checkout | ratio |"
        yield "|---|---|---|---|---|"
        for one in result["works"]:
            cells = [one["model"], one["work"]]
            for side in ("here", "older"):
                seconds = one["seconds"].get(side)
                cells.append("" if seconds is None else describe({k: _times(v, 1e3) for k, v in seconds.items()}))
            cells.append(describe(one["ratio"]) if "ratio" in one else "")
            yield "| " + " | ".join(cells) + " |"
        yield ""
        yield from circumstances(result)

    return "\n".join(lines()) + "\n"


def _times(value: Any, factor: float) -> Any:
    return [each * factor for each in value] if isinstance(value, list) else value * factor


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time models of demo size, here and in an older checkout.")
    parser.add_argument("--out", type=Path, help="folder of the dated result")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this repository")
    parser.add_argument("--models", nargs="+", choices=models.names(), default=[*models.names()], help="families")
    parser.add_argument("--preset", default="scenes", help="of every family")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--warmup", type=int, default=1, help="turns before timing")
    parser.add_argument("--pairs", type=int, default=7, help="timed turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options)
        return
    if options.out is None:
        parser.error("the following arguments are required: --out")
    torch.set_num_threads(options.threads)
    load_before, device = load_averages(), torch.device("cpu")
    works = measure(options)
    claims = [
        claim(f"demo size, {one['model']}, {one['work']}", "ratio to the older checkout", one["ratio"]["median"], 1.0)
        for one in works
        if "ratio" in one and options.preset == "scenes"
    ]
    options.against = None if options.against is None else "an older checkout"  # no names of folders in results
    options.precision, options.layers = "fp32", None
    result = finish("small_models", options, device, load_before, works=works, claims=claims)
    parts = [] if options.against is None else ["against"]
    print(write_result(options.out, stem_of("small_models", options, device, *parts), result, as_markdown(result)))


if __name__ == "__main__":
    main()
