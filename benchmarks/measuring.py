"""How all benchmarks measure: sides in turn, agreement first, rate of a plain product, memory in a new process, dated
results.

In turn     A B B A A B ..., so that whatever else the machine does meets both sides; ratios are taken pair by pair, and
            the median of the pairs counts.
Agreement   Both sides have the same weights and see the same batches. Before anything is timed, loss, gradient norms of
            all weights and the loss after one update must agree, without dropout.
Efficiency  Operations of the products that real positions which somebody reads need (`visling.runs.needed_products`),
            over the time times the rate of one product of two 2048 x 2048 matrices, measured right before and right
            after.
Memory      Peak of the resident memory in a new process, beyond what was there before the model.
Results     `<script>_<date>_<configuration>.json` with every single time, and `.md` for readers; nothing is
            overwritten. `claims` of a result are what `table.py` compares with the targets.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from visling import runtime
from visling.types import Batch, Targets

T = TypeVar("T")

SEED = 0
PRODUCT_SIZE = 2048
"""Rows and columns of the two matrices whose product gives the machine's rate."""
PRODUCT_SECONDS = 0.5
"""For how long that product is repeated."""
ADAMW: Mapping[str, Any] = {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "fused": True}
TOLERANCE: Mapping[str, Mapping[str, float]] = {
    "fp32": {"loss": 1e-5, "gradient norm": 1e-3, "loss after one update": 1e-4, "outputs": 1e-4},
    "bf16": {"loss": 2e-2, "gradient norm": 2e-1, "loss after one update": 2e-2, "outputs": 1e-1},
}
"""Largest difference of two sides: relative for losses above 1 and for gradient norms, else absolute."""
NOISE = 1e-5
"""Gradient norms below this share of the largest are not compared."""
NOT_CLAIMED = (
    "Nothing is claimed about other sizes, batches, devices or machines.",
    "Nothing is claimed about accuracy or convergence: all sides compute the same loss (checked).",
    "Reading data is not part of a step; see store.py. Words, features and labels are drawn at random; their lengths "
    "are as described.",
    "torch.compile is used on no side. transformers' classes are used as their documentation shows.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)
"""Of benchmarks that compare steps of models."""


FIRST = "visling"
"""Name of the side that the others are compared with."""


class Side(Protocol):
    """One of several implementations of a training step."""

    module: nn.Module

    def feed(self, batch: Batch, targets: Targets) -> Any:
        """The batch in this side's form; not timed."""
        ...

    def loss(self, fed: Any) -> Tensor:
        """What is minimised."""
        ...


class Trained:
    """A side with its optimiser."""

    def __init__(self, side: Side, device: torch.device, precision: runtime.Precision) -> None:
        self.side, self.device, self.precision = side, device, precision
        self.optimizer = torch.optim.AdamW(side.module.parameters(), **ADAMW)

    def loss(self, fed: Any) -> Tensor:
        """The side's loss in its precision."""
        with runtime.autocast(self.device, self.precision):
            return self.side.loss(fed).float()

    def update(self, fed: Any, *, keep_gradients: bool = False) -> None:
        """One step: forward, loss, backward, AdamW.

        Args:
            keep_gradients: set them to zero before, instead of freeing them.
        """
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        torch.autograd.backward(self.loss(fed))
        self.optimizer.step()


def check_agreement(
    sides: Mapping[str, Trained], fed: Mapping[str, Any], precision: Literal["fp32", "bf16"]
) -> dict[str, dict[str, float]]:
    """Loss, gradient norms and loss after one update of all sides, without dropout.

    Gradient norms are compared for each weight; those of one shape are matched by size, so that names do not matter.

    Args:
        fed: the same batch in the form of each side.
    Raises:
        SystemExit: they differ by more than the tolerance, or the sides do not have the same number of weights.
    """
    sizes = {name: sum(p.numel() for p in trained.side.module.parameters()) for name, trained in sides.items()}
    if len(set(sizes.values())) > 1:
        raise SystemExit(f"the models differ in size, nothing is timed: {sizes}")
    losses: dict[str, float] = {}
    later: dict[str, float] = {}
    norms: dict[str, dict[tuple[int, ...], list[float]]] = {}
    for name, trained in sides.items():
        trained.side.module.eval()
        trained.optimizer.zero_grad(set_to_none=True)
        loss = trained.loss(fed[name])
        torch.autograd.backward(loss)
        losses[name], norms[name] = loss.item(), _gradient_norms(trained.side.module)
        trained.optimizer.step()
        with torch.no_grad():
            later[name] = float(trained.loss(fed[name]))
    tolerance = TOLERANCE[precision]
    require_agreement("loss", losses, tolerance["loss"])
    first, *others = norms
    worst = {name: _differ(norms[first], norms[name]) for name in others}
    if not all(value <= tolerance["gradient norm"] for value in worst.values()):
        raise SystemExit(
            f"the sides disagree, nothing is timed: gradient norms differ by up to {worst} (relative) from those of "
            f"{first}, tolerance {tolerance['gradient norm']:g}"
        )
    require_agreement("loss after one update", later, tolerance["loss after one update"])
    return {"loss": losses, "largest difference of gradient norms": worst, "loss after one update": later}


def _gradient_norms(module: nn.Module) -> dict[tuple[int, ...], list[float]]:
    """Shape -> gradient norms of the weights of this shape, ascending."""
    found: dict[tuple[int, ...], list[float]] = {}
    for parameter in module.parameters():
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        found.setdefault(tuple(parameter.shape), []).append(norm)
    return {shape: sorted(values) for shape, values in found.items()}


def _differ(first: Mapping[tuple[int, ...], list[float]], other: Mapping[tuple[int, ...], list[float]]) -> float:
    """Largest relative difference of two sides' gradient norms; infinite if their weights have not the same shapes."""
    if {shape: len(norms) for shape, norms in first.items()} != {shape: len(norms) for shape, norms in other.items()}:
        return float("inf")
    least = NOISE * max(max(norms) for norms in first.values())
    pairs = [pair for shape in first for pair in zip(first[shape], other[shape], strict=True)]
    return max(abs(a - b) / max(a, b, least) for a, b in pairs)


def require_agreement(what: str, values: Mapping[str, float], tolerance: float) -> None:
    """Stop unless the sides found the same number.

    Raises:
        SystemExit: they differ by more than the tolerance.
    """
    low, high = min(values.values()), max(values.values())
    if not high - low <= tolerance * max(1.0, abs(high)):
        raise SystemExit(f"the sides disagree, nothing is timed: {what} {dict(values)}, tolerance {tolerance:g}")


def require_equal_outputs(outputs: Mapping[str, Tensor], precision: Literal["fp32", "bf16"]) -> float:
    """Largest difference between the outputs of the first side and of the others.

    Raises:
        SystemExit: they differ by more than the tolerance.
    """
    first, *others = outputs
    tolerance = TOLERANCE[precision]["outputs"]
    worst = max(float((outputs[first].float() - outputs[other].float()).abs().max()) for other in others)
    if not worst <= tolerance:
        raise SystemExit(
            f"outputs of {first} and {', '.join(others)} differ by up to {worst:.3g}, nothing is timed; "
            f"tolerance {tolerance:g}"
        )
    return worst


def in_turn(
    works: Mapping[str, Callable[[int], object]], *, pairs: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each work, A B B A A B ...: every other round in reverse, so that a drift of the machine meets all.

    Whatever runs visling's commands keeps the memory that it frees (`runtime.keep_freed_memory`), and others do not. So
    on a CPU the side whose turn it is has its own way, and does its work once untimed when the way has changed.

    Args:
        works: called with the number of the round, of which there are `warmup` + `pairs`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    keeps: bool | None = None
    for number in range(warmup + pairs):
        order = list(works.items())
        for name, work in order if number % 2 == 0 else reversed(order):
            if device.type == "cpu" and keeps is not (name == FIRST):
                keeps = name == FIRST
                runtime.keep_freed_memory(keeps)
                work(number)
            synchronise(device)
            start = time.perf_counter()
            work(number)
            synchronise(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds: Mapping[str, Sequence[float]], first: str = FIRST) -> dict[str, Any]:
    """Summaries of the seconds of all sides, and of the ratios of the others to the first, pair by pair."""
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratio": {
            name: summary([theirs / ours for ours, theirs in zip(seconds[first], values, strict=True)])
            for name, values in seconds.items()
            if name != first
        },
    }


def product_rate(device: torch.device, precision: runtime.Precision, size: int = PRODUCT_SIZE) -> float:
    """Operations a second of the product of two square matrices, the median of its repetitions."""
    dtype = torch.bfloat16 if runtime.resolve(precision, device) == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    spent: list[float] = []
    while len(spent) < 3 or sum(spent) < PRODUCT_SECONDS:
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronise(device)
        spent.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(spent))


class Rate:
    """Rate of a plain product right before and right after what is timed: `with Rate(...) as rate: ...`."""

    def __init__(self, device: torch.device, precision: runtime.Precision, size: int = PRODUCT_SIZE) -> None:
        self._asked: tuple[torch.device, runtime.Precision, int] = (device, precision, size)
        self.before = self.after = 0.0

    def __enter__(self) -> Rate:
        self.before = product_rate(*self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        self.after = product_rate(*self._asked)

    @property
    def mean(self) -> float:
        """Operations a second."""
        return (self.before + self.after) / 2

    def efficiency(self, flops: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
        """Share of that rate which the needed operations of each repetition were computed at."""
        return summary([needed / spent / self.mean for needed, spent in zip(flops, seconds, strict=True)])

    def described(self) -> dict[str, float]:
        """TFLOP a second, before and after."""
        return {"before": self.before / 1e12, "after": self.after / 1e12}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_new_process(work: Callable[..., T], *arguments: Any) -> T:
    """What a function of this folder returns in a process of its own: memory that one side has freed would hide the
    other's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def peak_memory(build: Callable[[], Callable[[], object]], device: torch.device) -> float | None:
    """MiB that building something and then running it takes at most, beyond what there was before; None where that
    cannot be measured. Call it in a new process.

    CPU: resident memory (Linux only). CUDA: what PyTorch allocated.
    """
    load_libraries(device)
    gc.collect()
    before = resident("VmRSS")
    build()()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resident("VmHWM")
    return None if before is None or peak is None else peak - before


def load_libraries(device: torch.device) -> None:
    """One step of a single weight: what PyTorch loads at first use is no memory of a model."""
    layer = nn.Linear(1, 1).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), **ADAMW)
    torch.autograd.backward(layer(torch.ones(1, 1, device=device)).sum())
    optimizer.step()


def resident(field: Literal["VmRSS", "VmHWM"]) -> float | None:
    """Resident memory of this process in MiB, now or at its peak."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return None


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of repeated measurements, and all of them in order."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "min": float(min(values)),
        "max": float(max(values)),
        "all": [float(f"{value:.6g}") for value in values],
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; no name of the machine."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def load_averages() -> list[float]:
    """Processes that wanted a core over the last 1, 5 and 15 minutes; empty where the system does not say."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def today() -> str:
    """The date that names a result."""
    return datetime.date.today().isoformat()


def claim(
    work: str, what: str, measured: float | None, target: float, *, better: Literal["higher", "lower"] = "higher"
) -> dict[str, Any]:
    """A number with its target, for `table.py`.

    Args:
        work: what was done, as the table names it.
        what: what was measured, as "ratio to transformers".
        measured: None where this machine cannot measure it.
        better: higher: the target is the least that is wanted; lower: the most.
    """
    return {"work": work, "what": what, "measured": measured, "target": target, "better": better}


def write_result(folder: Path, stem: str, result: Mapping[str, Any], markdown: str) -> Path:
    """Write `stem.json` and `stem.md`, or stem-2, stem-3, ...: a result is never overwritten. Returns the Markdown
    file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        if not any((folder / f"{name}{suffix}").exists() for suffix in (".json", ".md")):
            break
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
    return folder / f"{name}.md"


def circumstances(result: Mapping[str, Any]) -> Iterator[str]:
    """Markdown lines on machine, versions and settings, and on what is not claimed."""
    yield "## Circumstances"
    yield ""
    for title, values in (
        ("Machine", result["machine"]),
        ("Versions", result["versions"]),
        ("Settings", result["settings"]),
    ):
        yield f"- {title}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    yield f"- Load averages (1, 5, 15 minutes): before {result['load_before']}, after {result['load_after']}"
    yield ""
    yield "## Not claimed"
    yield ""
    for line in result["not_claimed"]:
        yield f"- {line}"


def describe(found: Mapping[str, Any], spec: str = ".2f", *, spread: Literal["quartiles", "range"] = "range") -> str:
    """A summary for readers: median (smallest to largest), or (quartiles)."""
    low, high = found["quartiles"] if spread == "quartiles" else (found["min"], found["max"])
    return f"{found['median']:{spec}} ({low:{spec}} to {high:{spec}})"


def add_options(parser: argparse.ArgumentParser, *, pairs: int, warmup: int = 1) -> None:
    """The options that all benchmarks of steps have."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--preset", help="of every family (default: that of its release, base size)")
    parser.add_argument("--layers", type=int, help="at most so many layers of each kind (default: the preset's)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a batch")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of matrix products, on all sides"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of all sides (default: PyTorch's choice)"
    )
    parser.add_argument("--warmup", type=int, default=warmup, help="rounds before timing")
    parser.add_argument("--pairs", type=int, default=pairs, help="timed rounds")
    parser.add_argument("--product-size", type=int, default=PRODUCT_SIZE, help="rows of the product of the rate")


def begin(options: argparse.Namespace) -> torch.device:
    """Set threads and seed as asked for; the device."""
    torch.set_num_threads(options.threads)
    runtime.seed_everything(SEED)
    return runtime.pick_device(options.device)


def finish(
    name: str, options: argparse.Namespace, device: torch.device, load_before: Sequence[float], **content: Any
) -> dict[str, Any]:
    """A whole result: what was found, and what it depends on."""
    given = {key: value for key, value in vars(options).items() if key != "out"}
    return {
        "benchmark": name,
        "date": today(),
        "machine": machine(device),
        "versions": versions("visling", "torch", "transformers", "numpy"),
        "settings": {
            **{key: [*value] if isinstance(value, (list, tuple)) else value for key, value in given.items()},
            "seed": SEED,
            "optimiser": "AdamW " + ", ".join(f"{key} {value}" for key, value in ADAMW.items()),
        },
        "load_before": list(load_before),
        "load_after": load_averages(),
        "not_claimed": NOT_CLAIMED,
        **content,
    }


def stem_of(name: str, options: argparse.Namespace, device: torch.device, *parts: str) -> str:
    """Name of the files of a result."""
    changed = [
        f"{key.replace('_', '-')}-{value}"
        for key in ("preset", "layers")
        if (value := getattr(options, key)) is not None
    ]
    return "_".join(
        [
            name.replace("_", "-"),
            today(),
            *parts,
            *changed,
            f"batch-{options.batch_size}",
            device.type,
            options.precision,
            f"{options.threads}-threads",
        ]
    )
