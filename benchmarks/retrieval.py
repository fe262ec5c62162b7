"""All pairs of captions and images: in tiles as the library scores them, in plain batches of pairs, and one by one.

    # Every family's tiny preset, 100 images and 500 captions:
    python benchmarks/retrieval.py --out benchmarks/results
    # Flickr30K's size:
    python benchmarks/retrieval.py --out benchmarks/results --images 1000 --captions 5000 --models lxmert

Measured: pairs a second of the three ways on the same few images with all their captions, in turn (A B C A B C); the
three must agree first. Then all pairs in tiles, once, with the time that ranking takes and the memory that is added at
its peak, in a process of its own. Features are random and captions are random words: no score means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The script's folder is on the path: the benchmarks share how results are written.
from measuring import SEED, circumstances, load_averages, machine, resident, summary, versions, write_result
from numpy.typing import NDArray

from visling import models, runtime
from visling.data.annotations.retrieval import RetrievalRecord
from visling.data.batches.collate import Collator
from visling.models.task_model import TaskModel
from visling.runs.inputs import Inputs
from visling.runs.retrieve import score_pairs
from visling.tasks.base import distinct_images
from visling.tasks.retrieval import Retrieval
from visling.types import RegionArray

WORDS = (
    "a", "the", "two", "man", "woman", "dog", "child", "street", "red", "blue", "small", "large", "with", "near",
    "holding", "riding", "in", "front", "of", "behind", "and", "looking", "at", "table", "bike", "ball", "hat", "shirt",
)  # fmt: skip
LENGTHS = (7, 17)
"""Fewest and most words of a caption, about those of Flickr30K."""

NOT_CLAIMED = (
    "The other two ways are our own few lines over the same model: a release's evaluation script is not run.",
    "Tiny models spend much of their time outside matrix products; full-size ones do not.",
    "Nothing is claimed about other devices.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


class Store:
    """Random regions of numbered images, in memory."""

    fingerprint = "random"

    def __init__(self, images: int, regions: int, feature_size: int) -> None:
        rng = np.random.default_rng(SEED)
        self.feature_size, self.images = feature_size, images
        self.features = rng.standard_normal((images, regions, feature_size), np.float32).astype(np.float16)
        low = rng.random((images, regions, 2), np.float32) * 300
        self.boxes = np.concatenate([low, low + 50], axis=2)

    def __contains__(self, image_id: str) -> bool:
        return int(image_id) < self.images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, image_id: str) -> RegionArray:
        at = int(image_id)
        return RegionArray(features=self.features[at], boxes=self.boxes[at], size=(400, 400))


class Case:
    """A randomly initialised model with images and captions."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        rng, config = np.random.default_rng(SEED), models.spec(name).presets[options.preset]
        store = Store(options.images, options.regions, config.feature_size)
        self.inputs = Inputs(name, config, store, options.device)
        self.records = [
            RetrievalRecord(
                id=str(number),
                images=(str(number * options.images // options.captions),),
                caption=" ".join(rng.choice(WORDS, int(rng.integers(*LENGTHS, endpoint=True)))),
            )
            for number in range(options.captions)
        ]
        self.task, self.batch_size = Retrieval(), options.batch_size
        torch.manual_seed(SEED)
        encoder = models.build(name, config)
        encoder.fit_features(torch.from_numpy(store.features[0].astype(np.float32)))
        styles = models.head_styles(name)
        self.model = TaskModel(encoder, self.task.heads, styles, group=self.task.group).to(self.inputs.device).eval()

    def in_tiles(self, records: Sequence[RetrievalRecord]) -> NDArray[np.float32]:
        """(I, T) as the library scores them."""
        return score_pairs(self.model, self.task, self.inputs, records, batch_size=self.batch_size, precision="fp32")

    def in_batches(self, records: Sequence[RetrievalRecord], size: int) -> NDArray[np.float32]:
        """(I, T) by batches of pairs, each with a text and an image of its own."""
        collate = Collator(self.inputs.regions, self.inputs.spec, self.inputs.tokenizer)
        rng, images = runtime.generator_for(SEED), distinct_images(records)
        pairs = [replace(record, images=(image,)) for image in images for record in records]
        scores = []
        with torch.inference_mode():
            for first in range(0, len(pairs), size):
                examples = [self.task.example(pair, self.inputs.layout, rng) for pair in pairs[first : first + size]]
                batch = collate(examples, [rng] * len(examples))[0].to(self.inputs.device)
                scores.append(self.task.score(self.model(batch)).cpu().numpy())
        found: NDArray[np.float32] = np.concatenate(scores).reshape(len(images), len(records))
        return found


def rate(work: Callable[[], NDArray[np.float32]]) -> tuple[float, NDArray[np.float32]]:
    """Pairs a second, and the scores."""
    start = time.perf_counter()
    scores = work()
    return scores.size / (time.perf_counter() - start), scores


def first_images(records: Sequence[RetrievalRecord], count: int) -> list[RetrievalRecord]:
    """The captions of the first images."""
    kept = list(distinct_images(records))[:count]
    return [record for record in records if record.images[0] in kept]


def compare(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Pairs a second of the three ways."""
    some, few = (first_images(case.records, count) for count in (options.sample_images, options.single_images))
    ways: dict[str, Callable[[], NDArray[np.float32]]] = {
        "tiles": lambda: case.in_tiles(some),
        "batches": lambda: case.in_batches(some, options.batch_size),
        "one by one": lambda: case.in_batches(few, 1),
    }
    _, tiled = rate(ways["tiles"])  # also the warm-up
    np.testing.assert_allclose(tiled, rate(ways["batches"])[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        tiled[: options.single_images, : len(few)], rate(ways["one by one"])[1], rtol=0, atol=1e-5
    )
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, work in ways.items():
            rates[name].append(rate(work)[0])
    return {name: summary(values) for name, values in rates.items()}


def run_whole(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All pairs in tiles, once."""
    torch.set_num_threads(options.threads)
    case = Case(name, options)
    case.in_tiles(first_images(case.records, 2))  # what PyTorch loads at first use does not belong to it
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # making the case had its own peak; reset it (Linux)
    low, start = resident("VmRSS"), time.perf_counter()
    scores = case.in_tiles(case.records)
    seconds, high, start = time.perf_counter() - start, resident("VmHWM"), time.perf_counter()
    case.task.report(case.task.predictions(scores, case.records), case.records)
    return {
        "pairs": scores.size,
        "seconds": seconds,
        "pairs_per_second": scores.size / seconds,
        "ranking_seconds": time.perf_counter() - start,
        "peak_memory_mib": None if low is None or high is None else high - low,
        "scores_mib": scores.nbytes / 2**20,
    }


def product_rate(device: torch.device) -> float:
    """GFLOP a second of a large matrix product."""
    matrix = torch.randn(1024, 1024, device=device)
    spent = []
    for _ in range(10):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        spent.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(spent) / 1e9


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One family."""
    rates = compare(Case(name, options), options)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        whole = pool.apply(run_whole, (name, options))
    print(
        f"{name}: { ({way: round(found['median']) for way, found in rates.items()}) } pairs a second; "
        f"all {whole['pairs']} pairs in {whole['seconds']:.1f} s",
        flush=True,
    )
    return {"model": name, "pairs_per_second": rates, "whole": whole}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""

    def told(found: Mapping[str, Any]) -> str:
        return f"{found['median']:,.0f} ({found['quartiles'][0]:,.0f} to {found['quartiles'][1]:,.0f})"

    def lines() -> Iterator[str]:
        sizes = result["settings"]
        yield f"# All pairs of {sizes['images']} images and {sizes['captions']} captions, {result['date']}"
        yield ""
        yield (
            f"Preset {sizes['preset']} of every family, {sizes['regions']} regions an image, float32, "
            f"{sizes['batch_size']} pairs a tile or batch. Pairs a second, median (quartiles), in turn: tiles and "
            f"batches on {sizes['sample_images']} images with their captions, one by one on {sizes['single_images']}. "
            f"Matrix products run at {result['product_gflops']:.0f} GFLOP a second here."
        )
        yield ""
        yield (
            "| model | tiles | batches of pairs | one by one | all pairs in tiles | their ranking | memory added at "
            "the peak |"
        )
        yield "|---|---|---|---|---|---|---|"
        for one in result["models"]:
            rates, whole = one["pairs_per_second"], one["whole"]
            memory = "" if whole["peak_memory_mib"] is None else f"{whole['peak_memory_mib']:.0f} MiB"
            cells = [
                one["model"],
                *(told(rates[way]) for way in ("tiles", "batches", "one by one")),
                f"{whole['seconds']:,.0f} s ({whole['pairs_per_second']:,.0f} a second)",
                f"{whole['ranking_seconds']:.1f} s",
                memory,
            ]
            yield "| " + " | ".join(cells) + " |"
        yield ""
        yield from circumstances(result)

    return "\n".join(lines()) + "\n"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the scoring of all pairs of captions and images.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--models", nargs="+", default=sorted(models.names()), help="families (default: all)")
    parser.add_argument("--preset", default="tiny", help="of each family")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--regions", type=int, default=36, help="regions per image")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs per tile or batch")
    parser.add_argument("--sample-images", type=int, default=20, help="images on which tiles and batches are compared")
    parser.add_argument("--single-images", type=int, default=5, help="images whose pairs are scored one by one")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    device = runtime.pick_device(options.device)
    date, load_before = datetime.date.today().isoformat(), load_averages()
    names = ("preset", "images", "captions", "regions", "batch_size", "sample_images", "single_images", "repeats")
    result = {
        "benchmark": "retrieval",
        "date": date,
        "machine": machine(device),
        "versions": versions("visling", "torch"),
        "settings": {name: getattr(options, name) for name in names} | {"seed": SEED},
        "product_gflops": product_rate(device),
        "models": [measure(name, options) for name in options.models],
        "load_before": load_before,
        "load_after": load_averages(),
        "not_claimed": NOT_CLAIMED,
    }
    stem = f"retrieval_{date}_{options.images}x{options.captions}_{device.type}_{options.threads}-threads"
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
