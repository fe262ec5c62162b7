"""What the figures of a training line cost: counting the products that a batch needs and timing the wait for it,
against a step of pre-training with models of demo size.

    python benchmarks/log_cost.py --out benchmarks/results

The "scenes" recipes of all families on one thread. Seconds are those that the process has computed for
(`time.process_time`), which other work on the machine disturbs less than a clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from measuring import (
    ADAMW,
    add_options,
    begin,
    circumstances,
    claim,
    describe,
    finish,
    load_averages,
    stem_of,
    summary,
    write_result,
)
from small_models import BATCHES, make_pretraining

from visling import models, runtime
from visling.runs.needed_products import pretraining_products
from visling.train.meter import Meter
from visling.train.state import Sums

REPEATS = 20
"""Batches of which one measurement of counting takes the mean."""
TARGET = 0.005
"""Largest share of a step."""


def time_call(work: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One family."""
    config = models.spec(model).presets[options.preset or "scenes"]
    pretraining, batches = make_pretraining(model, config, options.batch_size)
    optimizer = torch.optim.AdamW(pretraining.parameters(), **ADAMW)
    device = torch.device("cpu")
    meter = Meter(Sums(), device, "fp32", lambda pair: pretraining_products(pretraining, *pair).step.total)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(pretraining(*batches[number % BATCHES]).value)
        optimizer.step()
        pretraining.after_update()

    def count() -> None:
        for number in range(REPEATS):
            with meter.waiting():
                pass
            meter.count_products(batches[number % BATCHES])

    counted, stepped = [], []
    for number in range(options.warmup + options.pairs):
        seconds = time_call(lambda number=number: step(number)), time_call(count) / REPEATS  # type: ignore[misc]
        if number >= options.warmup:
            stepped.append(seconds[0])
            counted.append(seconds[1])
    shares = [mine / whole for mine, whole in zip(counted, stepped, strict=True)]
    print(f"{model}: {1e6 * summary(counted)['median']:.0f} us of {summary(stepped)['median']:.4f} s", flush=True)
    return {"step": summary(stepped), "counting": summary(counted), "share": summary(shares)}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    lines = [
        f"# What the figures of a training line cost, {result['date']}",
        "",
        "Median (smallest to largest), in processor time.",
        "",
        "| | step, milliseconds | counting, microseconds | share |",
        "|---|---|---|---|",
    ]
    for model, found in result["models"].items():
        scaled = {
            name: {key: found[name][key] * factor for key in ("median", "min", "max")}
            for name, factor in (("step", 1e3), ("counting", 1e6), ("share", 100))
        }
        lines.append(
            f"| {model} | {describe(scaled['step'], '.1f')} | {describe(scaled['counting'], '.0f')} | "
            f"{describe(scaled['share'], '.2f')} % |"
        )
    return "\n".join([*lines, "", *circumstances(result)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the counting of needed products against a small step.")
    parser.add_argument("--models", nargs="+", choices=models.names(), default=models.names(), help="families")
    add_options(parser, pairs=15, warmup=3)
    parser.set_defaults(threads=1)
    options = parser.parse_args(arguments)
    device, load_before = begin(options), load_averages()
    runtime.keep_freed_memory()
    found = {model: measure(model, options) for model in options.models}
    claims = [
        claim(
            "figures of a training line", f"share of a step, {model}", each["share"]["median"], TARGET, better="lower"
        )
        for model, each in found.items()
        if options.preset is None  # others claim nothing
    ]
    result = finish("log_cost", options, device, load_before, models=found, claims=claims)
    print(write_result(options.out, stem_of("log_cost", options, device), result, as_markdown(result)))


if __name__ == "__main__":
    main()
