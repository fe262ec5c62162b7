"""Attention of packed rows on a CPU: one row after the other against rows padded to the longest.

    python benchmarks/attention.py --out benchmarks/results

`nn/attention_kernels.py` chooses between the two; this is the measurement that its rules come from (`--threads 1` and
2). Both ways get the same packed queries, keys and values and give equal contexts and gradients (checked). Times are
forward alone, and forward with backward, without dropout and with a rate of 0.1; the two ways in turn (A B B A ...).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import (
    SEED,
    begin,
    circumstances,
    in_turn,
    load_averages,
    machine,
    summary,
    today,
    versions,
    write_result,
)
from torch import Tensor

from visling.nn.attention_kernels import Kernel, attend_padded, choose_kernel
from visling.nn.packing import Packing
from visling.nn.row_attention import attend_by_row

WIDTHS = ((96, 6), (128, 8), (256, 4), (768, 12), (1024, 8))
"""Width of all heads together, and their number: of the presets, of BERT base, of ViLBERT's co-attention."""
LENGTHS = ((5, 12), (10, 20), (20, 40), (36, 36), (40, 80), (40, 130))
"""Shortest and longest row: words, words and some regions, regions, both."""
KERNELS: Mapping[str, Kernel] = {"rows": attend_by_row, "padded": attend_padded}
DROPOUT_RATES = (0.0, 0.1)
TOLERANCE = 1e-4

NOT_CLAIMED = (
    "Nothing is claimed about other processors: where products or calls cost something else, the threshold may lie "
    "elsewhere by a factor of two, at which both ways take about as long.",
    "Projections are not part of the times.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


def measure(width: int, heads: int, low: int, high: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways at one width and one range of lengths."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = torch.randint(low, high + 1, (options.batch_size,), generator=generator)
    rows = Packing.of(torch.arange(int(lengths.max())) < lengths[:, None])
    states = [torch.randn(len(rows.at), width, generator=generator, requires_grad=True) for _ in range(3)]
    target = torch.randn(len(rows.at), width, generator=generator)

    def attend(kernel: Kernel, rate: float) -> Tensor:
        query, key, value = states
        return kernel(query, key, value, rows, rows, num_heads=heads, dropout_rate=rate)

    def infer(kernel: Kernel) -> Callable[[int], object]:
        def work(_: int) -> None:
            with torch.inference_mode():
                attend(kernel, 0.0)

        return work

    def train(kernel: Kernel, rate: float) -> Callable[[int], object]:
        return lambda _: torch.autograd.grad(attend(kernel, rate), states, target)

    for ours, theirs in zip(
        *(torch.autograd.grad(attend(kernel, 0.0), states, target) for kernel in KERNELS.values()), strict=True
    ):
        if not torch.allclose(ours, theirs, atol=TOLERANCE):
            raise SystemExit(f"the two ways disagree at width {width}, lengths {low} to {high}: nothing is timed")
    works: dict[str, dict[str, Callable[[int], object]]] = {
        "forward": {name: infer(kernel) for name, kernel in KERNELS.items()}
    }
    for rate in DROPOUT_RATES:
        works[f"both, dropout {rate:g}"] = {name: train(kernel, rate) for name, kernel in KERNELS.items()}
    cpu, work = torch.device("cpu"), len(rows.at) ** 2 * width / options.batch_size**2
    found: dict[str, Any] = {
        "width": width,
        "heads": heads,
        "lengths": [low, high],
        "work": work,
        "chosen": next(
            name
            for name, kernel in KERNELS.items()
            if kernel is choose_kernel(states[0], rows, rows, num_heads=heads, dropout_rate=0.0)
        ),
    }
    for name, ways in works.items():
        seconds = in_turn(ways, pairs=options.repeats, warmup=options.warmup, device=cpu)
        ratios = [padded / row for row, padded in zip(seconds["rows"], seconds["padded"], strict=True)]
        found[name] = {
            "milliseconds": {way: summary([value * 1000 for value in values]) for way, values in seconds.items()},
            "ratio": summary(ratios),
        }
    return found


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    times = [name for name in result["cases"][0] if isinstance(result["cases"][0][name], dict)]
    lines = [
        f"# Attention of packed rows: row by row and padded, {result['date']}",
        "",
        "Milliseconds row by row / padded (ratio padded over rows, above 1 row by row is faster), medians. Work: "
        "multiplications of a row's scores, as a power of two. Chosen: what `choose_kernel` takes with these threads.",
        "",
        "| width, heads | lengths | work | chosen | " + " | ".join(times) + " |",
        "|---|---|---|---|" + "---|" * len(times),
    ]
    for case in result["cases"]:
        cells = [
            f"{case[name]['milliseconds']['rows']['median']:.2f} / "
            f"{case[name]['milliseconds']['padded']['median']:.2f} ({case[name]['ratio']['median']:.2f})"
            for name in times
        ]
        low, high = case["lengths"]
        lines.append(
            f"| {case['width']}, {case['heads']} | {low} to {high} | 2^{math.log2(case['work']):.1f} | "
            f"{case['chosen']} | " + " | ".join(cells) + " |"
        )
    return "\n".join([*lines, "", *circumstances(result)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the two ways in which packed rows attend on a CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--batch-size", type=int, default=32, help="rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's choice")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before timing")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    device, load_before = begin(options), load_averages()
    cases = [measure(width, heads, low, high, options) for width, heads in WIDTHS for low, high in LENGTHS]
    result = {
        "benchmark": "attention",
        "date": today(),
        "machine": machine(device),
        "versions": versions("visling", "torch"),
        "settings": {key: value for key, value in vars(options).items() if key != "out"} | {"seed": SEED},
        "load_before": load_before,
        "load_after": load_averages(),
        "cases": cases,
        "not_claimed": NOT_CLAIMED,
    }
    stem = f"attention_{today()}_batch-{options.batch_size}_cpu_{options.threads}-threads"
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
