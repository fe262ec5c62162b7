"""CVLP's region contrast against its whole queue: in blocks as the library computes it, and with the whole matrix of
scores at once.

    # The release's queue, batches of 8 and 256 images of 36 regions:
    python benchmarks/region_contrast.py --out benchmarks/results
    # A quick look:
    python benchmarks/region_contrast.py --out benchmarks/results --images 8

Measured: the loss and the gradient of the queries (forward and backward), and one push of a batch's keys into the
queue. Next to the push stands what the release does: a new queue, stacked from the old rows and the new ones. The whole
matrix is computed only where it fits into --most-memory; both must agree in loss and gradient before anything is
timed. They take turns, A B A B. The peak memory of each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

# The script's folder is on the path: the benchmarks share how results are written.
from measuring import SEED, circumstances, load_averages, machine, resident, summary, versions, write_result
from torch import Tensor
from torch.nn import functional as F

from visling import runtime
from visling.nn.momentum import RingQueue
from visling.objectives.region_contrast import contrast

TEMPERATURE, CLIP = 0.07, 10.0
"""As released."""
MATRICES = 4
"""Arrays of the size of the matrix of scores that the direct way holds at its peak, approximately: scores, clipped
scores, and the intermediates of backward."""

Way = Literal["blocks", "whole"]

NOT_CLAIMED = (
    "The whole matrix is our own few lines of PyTorch, written as the paper's formula reads; the release's code is "
    "not run.",
    "Encoders are not part of it: this is the loss, its gradient with respect to the queries, and the queue.",
    "Nothing is claimed about other devices.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


def draw(images: int, options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys (N, E) and a queue (K, E)."""
    generator = torch.Generator().manual_seed(SEED)
    sizes = (images * options.regions, images * options.regions, options.queue)
    queries, keys, queue = (
        F.normalize(torch.randn(size, options.width, generator=generator), dim=-1).to(device) for size in sizes
    )
    return queries, keys, queue


def whole(queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    """The loss (N,) by one matrix product and one log-sum-exp."""
    scores = torch.cat([(queries * keys).sum(-1, keepdim=True), queries @ negatives.T], dim=1) / TEMPERATURE
    scores = CLIP * torch.tanh(scores / CLIP)
    return torch.logsumexp(scores, dim=1) - scores[:, 0]


def blocks(queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    """The loss (N,) as the library computes it."""
    return contrast(queries, keys, negatives, temperature=TEMPERATURE, clip=CLIP)[0]


WAYS: Mapping[Way, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"blocks": blocks, "whole": whole}


def gradient(way: Way, queries: Tensor, keys: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss () and the gradient of the queries (N, E)."""
    queries = queries.detach().requires_grad_()
    loss = WAYS[way](queries, keys, negatives).mean()
    (found,) = torch.autograd.grad(loss, queries)
    return loss.detach(), found


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Duration of one call."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1000


def peak_memory(way: Way, images: int, options: argparse.Namespace) -> float | None:
    """MiB that loss and gradient take at most beyond queries, keys and queue; None where it cannot be measured."""
    device = runtime.pick_device(options.device)
    torch.set_num_threads(options.threads)
    given = draw(images, options, device)
    gradient(way, *(part[:8] for part in given))  # what PyTorch loads at first use does not belong to the loss
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gradient(way, *given)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # drawing had its own peak; reset it (Linux)
    low = resident("VmRSS")
    gradient(way, *given)
    high = resident("VmHWM")
    return None if low is None or high is None else high - low


def measure(images: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Agreement, timings and memory of loss and gradient at one batch."""
    given = draw(images, options, device)
    matrix = len(given[0]) * options.queue * 4 / 2**20
    ways: tuple[Way, ...] = ("blocks", "whole") if MATRICES * matrix < options.most_memory else ("blocks",)
    found = {way: gradient(way, *given) for way in ways}  # also the warm-up
    if len(ways) > 1:
        torch.testing.assert_close(found["blocks"], found["whole"], rtol=1e-4, atol=1e-7)
        print(
            f"{images} images: losses agree: {float(found['blocks'][0]):.6f}, {float(found['whole'][0]):.6f}",
            flush=True,
        )
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            times[way].append(milliseconds(lambda way=way: gradient(way, *given), device))  # type: ignore[misc]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {way: pool.apply(peak_memory, (way, images, options)) for way in ways}
    print(
        f"{images} images: { ({way: round(summary(values)['median']) for way, values in times.items()}) } ms, "
        f"{memory} MiB",
        flush=True,
    )
    return {
        "images": images,
        "regions": len(given[0]),
        "scores_mib": matrix,
        "loss": float(found["blocks"][0]),
        "milliseconds": {way: summary(values) for way, values in times.items()},
        "peak_memory_mib": memory,
    }


def measure_push(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One batch of keys into a full queue: the ring in place, and a new queue stacked out of old and new rows."""
    rows = min(max(options.images) * options.regions, options.queue)
    _, keys, old = draw(max(options.images), options, device)
    keys, ring, mask = (
        keys[:rows],
        RingQueue(options.queue, options.width).to(device),
        torch.ones(rows, dtype=torch.bool, device=device),
    )
    ring.rows.copy_(old)
    stacked = [old]

    def restack() -> None:
        stacked[0] = torch.cat([keys, stacked[0][: options.queue - rows]])

    times: dict[str, list[float]] = {"ring": [], "stacked anew": []}
    for number in range(3 + 10 * options.repeats):
        for name, work in (("ring", lambda: ring.push(keys, mask)), ("stacked anew", restack)):
            spent = milliseconds(work, device)
            if number >= 3:
                times[name].append(spent)
    return {
        "rows": rows,
        "queue_mib": old.numel() * 4 / 2**20,
        "milliseconds": {name: summary(values) for name, values in times.items()},
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""

    def told(found: Mapping[str, Any] | None) -> str:
        return (
            "not run: does not fit"
            if found is None
            else f"{found['median']:.1f} ({found['quartiles'][0]:.1f} to {found['quartiles'][1]:.1f})"
        )

    def lines() -> Iterator[str]:
        sizes, push = result["settings"], result["push"]
        yield f"# Region contrast against a queue of {sizes['queue']} rows, {result['date']}"
        yield ""
        yield (
            f"Loss and gradient of the queries; queries, keys and queue of width {sizes['width']} in float32, "
            f"{sizes['regions']} regions an image. Milliseconds, median (quartiles), the two ways in turn."
        )
        yield ""
        yield (
            "| images in the batch | the matrix of scores would take | in blocks | whole matrix | peak memory in "
            "blocks | whole matrix |"
        )
        yield "|---|---|---|---|---|---|"
        for batch in result["batches"]:
            times, memory = batch["milliseconds"], batch["peak_memory_mib"]
            amounts = [f"{memory[way]:.0f} MiB" if memory.get(way) is not None else "" for way in WAYS]
            cells = [
                batch["images"],
                f"{batch['scores_mib']:.0f} MiB",
                told(times["blocks"]),
                told(times.get("whole")),
                *amounts,
            ]
            yield "| " + " | ".join(map(str, cells)) + " |"
        yield ""
        yield f"## One push of {push['rows']} keys into the full queue ({push['queue_mib']:.0f} MiB)"
        yield ""
        yield "| | milliseconds |"
        yield "|---|---|"
        yield f"| ring, written in place | {told(push['milliseconds']['ring'])} |"
        yield f"| a new queue, stacked out of old and new rows | {told(push['milliseconds']['stacked anew'])} |"
        yield ""
        yield from circumstances(result)

    return "\n".join(lines()) + "\n"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time region contrast and its queue.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--images", type=int, nargs="+", default=[8, 256], help="images per batch (default: 8 256)")
    parser.add_argument("--regions", type=int, default=36, help="regions per image")
    parser.add_argument("--queue", type=int, default=276_480, help="rows of the queue (default: the release's)")
    parser.add_argument("--width", type=int, default=128, help="of queries and keys")
    parser.add_argument(
        "--most-memory",
        type=int,
        default=8192,
        help="MiB that the whole matrix may take; beyond it that way is not run",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    device = runtime.pick_device(options.device)
    date, load_before = datetime.date.today().isoformat(), load_averages()
    batches = [measure(images, options, device) for images in options.images]
    names = ("regions", "queue", "width", "most_memory", "repeats")
    result = {
        "benchmark": "region_contrast",
        "date": date,
        "machine": machine(device),
        "versions": versions("visling", "torch"),
        "settings": {name: getattr(options, name) for name in names}
        | {"temperature": TEMPERATURE, "clip": CLIP, "seed": SEED},
        "batches": batches,
        "push": measure_push(options, device),
        "load_before": load_before,
        "load_after": load_averages(),
        "not_claimed": NOT_CLAIMED,
    }
    stem = f"region-contrast_{date}_queue-{options.queue}_{device.type}_{options.threads}-threads"
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
