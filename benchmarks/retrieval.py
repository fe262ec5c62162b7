"""All pairs of captions and images: in tiles as the library scores them, in plain batches of pairs, and one by one.

    # ViLBERT at base size, 10 to 99 regions, against the padded pairwise loop:
    python benchmarks/retrieval.py --out benchmarks/results
    # Every family's tiny preset, 100 images and 500 captions:
    python benchmarks/retrieval.py --out benchmarks/results --models visualbert lxmert vlbert vilbert cvlp \
        --preset tiny --images 100 --captions 500 --fewest-regions 36 --regions 36 --batch-size 256 \\
        --sample-images 20 --single-images 5

Measured: pairs a second of the ways on the same few images with all their captions, in turn (A B C A B C); they must
agree first. Then all pairs in tiles, once, with the time that ranking takes and the memory that is added at its peak,
in a process of its own. Features are random and captions are random words: no score means anything.

    tiles         As the library scores: what depends on a text or an image alone is computed once.
    batches       Batches of pairs, each with a text and an image of its own, through the library's model.
    one by one    The same, a pair at a time.
    padded pairs  ViLBERT and VL-BERT: batches of pairs with every layer at every position, written with plain functions
                  of torch over the same weights (`dense_sides.py`). As in a release's evaluation, every text is padded
                  to the most word pieces and every image to the most regions that the preset allows (ViLBERT: 30 and
                  99).
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
from dense_sides import encode

# The script's folder is on the path: the benchmarks share how results are written.
from measuring import (
    PRODUCT_SIZE,
    SEED,
    Rate,
    circumstances,
    claim,
    load_averages,
    machine,
    resident,
    summary,
    versions,
    write_result,
)
from numpy.typing import NDArray
from transformers_sides import Padded, pad

from visling import models, runtime
from visling.data.annotations.retrieval import RetrievalRecord
from visling.data.batches.collate import Collator
from visling.models.task_model import TaskModel
from visling.runs.inputs import Inputs
from visling.runs.needed_products import task_products
from visling.runs.retrieve import score_pairs
from visling.tasks.base import distinct_images
from visling.tasks.retrieval import Retrieval
from visling.types import Batch, Encoded, RegionArray, Targets

WORDS = (
    "a", "the", "two", "man", "woman", "dog", "child", "street", "red", "blue", "small", "large", "with", "near",
    "holding", "riding", "in", "front", "of", "behind", "and", "looking", "at", "table", "bike", "ball", "hat", "shirt",
)  # fmt: skip
LENGTHS = (7, 17)
"""Fewest and most words of a caption, about those of Flickr30K."""
DENSE = ("vilbert", "vlbert")
"""Families of `dense_sides.py`."""
BASE = "retrieval"
"""ViLBERT's preset for Flickr30K, base size."""
TOLERANCE = 1e-4
"""Largest difference of two scores."""
TARGETS = {"ratio": 2.5, "efficiency": 0.80}
"""Of ViLBERT at base size."""

NOT_CLAIMED = (
    "The other ways are our own few lines over the same weights: a release's evaluation script is not run.",
    "Tiny models spend much of their time outside matrix products; full-size ones do not.",
    "Nothing is claimed about other devices.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


class Store:
    """Random regions of numbered images, in memory."""

    fingerprint = "random"

    def __init__(self, images: int, fewest: int, regions: int, feature_size: int) -> None:
        rng = np.random.default_rng(SEED)
        self.feature_size, self.images = feature_size, images
        self.counts = rng.integers(min(fewest, regions), regions + 1, images)
        self.features = rng.standard_normal((images, regions, feature_size), np.float32).astype(np.float16)
        low = rng.random((images, regions, 2), np.float32) * 300
        self.boxes = np.concatenate([low, low + 50], axis=2)

    def __contains__(self, image_id: str) -> bool:
        return int(image_id) < self.images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, image_id: str) -> RegionArray:
        at, count = int(image_id), self.counts[int(image_id)]
        return RegionArray(features=self.features[at, :count], boxes=self.boxes[at, :count], size=(400, 400))


class Case:
    """A randomly initialised model with images and captions."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        rng, config = np.random.default_rng(SEED), models.spec(name).presets[options.preset]
        store = Store(options.images, options.fewest_regions, options.regions, config.feature_size)
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

    def in_batches(self, records: Sequence[RetrievalRecord], size: int, *, padded: bool = False) -> NDArray[np.float32]:
        """(I, T) by batches of pairs, each with a text and an image of its own.

        Args:
            padded: compute every position of a batch of fixed sizes.
        """
        spec = self.inputs.spec
        collate = Collator(self.inputs.regions, spec, self.inputs.tokenizer)
        rng, images = runtime.generator_for(SEED), distinct_images(records)
        pairs = [replace(record, images=(image,)) for image in images for record in records]
        scores = []
        with torch.inference_mode():
            for first in range(0, len(pairs), size):
                examples = [self.task.example(pair, self.inputs.layout, rng) for pair in pairs[first : first + size]]
                batch = collate(examples, [rng] * len(examples))[0].to(self.inputs.device)
                if padded:
                    batch, _ = pad(batch, Targets(), Padded(tokens=spec.max_tokens, regions=spec.max_regions))
                    logits = self.model.read(self.encode_padded(batch), batch)
                else:
                    logits = self.model(batch)
                scores.append(self.task.score(logits).cpu().numpy())
        found: NDArray[np.float32] = np.concatenate(scores).reshape(len(images), len(records))
        return found

    def encode_padded(self, batch: Batch) -> Encoded:
        """The states of all positions."""
        return encode(self.model.encoder, batch)

    def needed(self, records: Sequence[RetrievalRecord]) -> int:
        """Operations of the products that all pairs need if every text and every image is encoded once."""
        images, rng = list(distinct_images(records)), runtime.generator_for(SEED)
        examples = [self.task.example(record, self.inputs.layout, rng) for record in records]
        collate = Collator(self.inputs.regions, self.inputs.spec, self.inputs.tokenizer)
        alone = [replace(example, images=(images[at % len(images)],)) for at, example in enumerate(examples)]
        batch, _ = collate(alone, [rng] * len(alone))
        assert batch.regions is not None
        pairs = torch.cartesian_prod(torch.arange(len(records)), torch.arange(len(images)))
        regions = batch.regions.map(lambda tensor: tensor[: len(images)])
        shared = replace(
            batch, text=replace(batch.text, row=pairs[:, 0]), regions=replace(regions, row=pairs[:, 1]), group=1
        )
        return task_products(self.model, shared).forward.total


def rate(work: Callable[[], NDArray[np.float32]]) -> tuple[float, NDArray[np.float32]]:
    """Pairs a second, and the scores."""
    start = time.perf_counter()
    scores = work()
    return scores.size / (time.perf_counter() - start), scores


def first_images(records: Sequence[RetrievalRecord], count: int) -> list[RetrievalRecord]:
    """The captions of the first images."""
    kept = list(distinct_images(records))[:count]
    return [record for record in records if record.images[0] in kept]


def compare(case: Case, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Pairs a second of all ways, and the efficiency of the tiles."""
    some, few = (first_images(case.records, count) for count in (options.sample_images, options.single_images))
    ways: dict[str, Callable[[], NDArray[np.float32]]] = {
        "tiles": lambda: case.in_tiles(some),
        "batches": lambda: case.in_batches(some, options.batch_size),
        "one by one": lambda: case.in_batches(few, 1),
    }
    if name in DENSE:
        ways["padded pairs"] = lambda: case.in_batches(some, options.batch_size, padded=True)
    _, tiled = rate(ways["tiles"])  # also the warm-up
    for way, work in ways.items():
        whole = tiled[: options.single_images, : len(few)] if way == "one by one" else tiled
        np.testing.assert_allclose(whole, rate(work)[1], rtol=0, atol=TOLERANCE, err_msg=way)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with Rate(case.inputs.device, "fp32", options.product_size) as product:
        for _ in range(options.repeats):
            for way, work in ways.items():
                rates[way].append(rate(work)[0])
    pairs = tiled.size
    reached = product.efficiency([case.needed(some)] * options.repeats, [pairs / each for each in rates["tiles"]])
    found = {
        "pairs_per_second": {way: summary(values) for way, values in rates.items()},
        "efficiency": reached,
        "product_tflops": product.described(),
        "claims": [],
    }
    if name in DENSE:
        ratios = [ours / theirs for ours, theirs in zip(rates["tiles"], rates["padded pairs"], strict=True)]
        found["ratio"] = summary(ratios)
        if name == "vilbert" and options.preset == BASE and options.device == "cpu":
            work_name = "ViLBERT retrieval, 10 to 99 regions"
            found["claims"] = [
                claim(work_name, "ratio to the padded pairwise loop", found["ratio"]["median"], TARGETS["ratio"]),
                claim(work_name, "efficiency", reached["median"], TARGETS["efficiency"]),
            ]
    return found


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


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One family."""
    found = compare(Case(name, options), name, options)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        whole = pool.apply(run_whole, (name, options))
    print(
        f"{name}: { ({way: round(each['median'], 1) for way, each in found['pairs_per_second'].items()}) } "
        "pairs a second; "
        f"all {whole['pairs']} pairs in {whole['seconds']:.1f} s",
        flush=True,
    )
    return {"model": name, **found, "whole": whole}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""

    def told(found: Mapping[str, Any]) -> str:
        return f"{found['median']:,.1f} ({found['quartiles'][0]:,.1f} to {found['quartiles'][1]:,.1f})"

    def lines() -> Iterator[str]:
        sizes = result["settings"]
        yield f"# All pairs of {sizes['images']} images and {sizes['captions']} captions, {result['date']}"
        yield ""
        yield (
            f"Preset {sizes['preset']}, {sizes['fewest_regions']} to {sizes['regions']} regions an image, float32, "
            f"{sizes['batch_size']} pairs a tile or batch. Pairs a second, median (quartiles), in turn: tiles, batches "
            f"and padded pairs on {sizes['sample_images']} images with their captions, one by one on "
            f"{sizes['single_images']}. Ratio: tiles over padded pairs. Efficiency: of the tiles, operations of the "
            "products that real positions need over time times the rate of a plain product."
        )
        yield ""
        yield (
            "| model | tiles | batches of pairs | one by one | padded pairs | ratio | efficiency | all pairs in tiles "
            "| their ranking | memory added at the peak |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for one in result["models"]:
            rates, whole = one["pairs_per_second"], one["whole"]
            memory = "" if whole["peak_memory_mib"] is None else f"{whole['peak_memory_mib']:.0f} MiB"
            cells = [
                one["model"],
                *(
                    told(rates[way]) if way in rates else ""
                    for way in ("tiles", "batches", "one by one", "padded pairs")
                ),
                f"{one['ratio']['median']:.2f}" if "ratio" in one else "",
                f"{one['efficiency']['median']:.2f}",
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
    parser.add_argument("--models", nargs="+", choices=models.names(), default=["vilbert"], help="families")
    parser.add_argument("--preset", default=BASE, help="of each family")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--fewest-regions", type=int, default=10, help="fewest regions of an image")
    parser.add_argument("--regions", type=int, default=99, help="most regions of an image")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per tile or batch")
    parser.add_argument("--sample-images", type=int, default=8, help="images on which tiles and batches are compared")
    parser.add_argument("--single-images", type=int, default=4, help="images whose pairs are scored one by one")
    parser.add_argument("--product-size", type=int, default=PRODUCT_SIZE, help="rows of the product of the rate")
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
    names = (
        "preset", "images", "captions", "fewest_regions", "regions", "batch_size", "sample_images", "single_images",
        "repeats",
    )  # fmt: skip
    found = [measure(name, options) for name in options.models]
    result = {
        "benchmark": "retrieval",
        "date": date,
        "machine": machine(device),
        "versions": versions("visling", "torch"),
        "settings": {name: getattr(options, name) for name in names} | {"seed": SEED},
        "models": found,
        "claims": [each for one in found for each in one["claims"]],
        "load_before": load_before,
        "load_after": load_averages(),
        "not_claimed": NOT_CLAIMED,
    }
    stem = (
        f"retrieval_{date}_{options.preset}_{options.images}x{options.captions}_{device.type}_{options.threads}-threads"
    )
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
