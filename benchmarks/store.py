"""How fast a native store delivers regions, and the loader caption pairs.

    # 2000 images of 36 x 2048, 0.3 GB in a temporary folder:
    python benchmarks/store.py --out benchmarks/results
    # Larger than the cache of many machines:
    python benchmarks/store.py --out benchmarks/results --images 20000

The store is drawn at random, written by StoreWriter, opened, and read once before anything is timed, so that its pages
are in the system's cache as far as they fit. Measured in turn, one pass over all images (gather) or one epoch (loader)
each time:

    copy                      as many bytes copied from one array to another, batch by batch: a bound for any reading
    gather                    NativeStore.gather of random batches into new memory
    gather, own buffer        the same into reused memory
    loader, text only         caption pairs, tokenised, masked and collated, without a store
    loader                    the same with regions, in the caller's thread
    loader, ahead             the same, prepared by the background thread while the caller only receives
    loader, masked regions    as loader, with LXMERT's masking of regions and its targets, the clean features among them
    loader, row numbers       the same for a store that lives on the device: batches carry row numbers, not features

With --threads 1 all of it runs on one core, and two rates have a target (TARGETS).
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The script's folder is on the path: the benchmarks share how captions are drawn and results are written.
from drawn_data import CAPTIONS_PER_IMAGE, draw_captions, draw_regions, image_id
from measuring import SEED, circumstances, claim, load_averages, machine, summary, versions, write_result
from numpy.typing import NDArray

from visling import runtime
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.masking import RegionMasking, TokenMasking
from visling.data.corpora.captions import CaptionPairs
from visling.data.text import TextLayout, Tokenizer
from visling.recipes.lxmert import REGION_MASKING
from visling.regions.on_device import FeatureRows
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.types import InputSpec, RegionArray, RegionStore

TARGETS = {"loader, text only": 25_000, "loader": 12_000}
"""Caption pairs a second that one core must reach from a warm cache, with regions of 36 x 2048 in half precision."""
NEEDS = ("class_slots", "feature_slots", "region_features")
"""Targets of LXMERT's regression of region features, those of labels left out: the drawn store has none."""
POOL_ROWS = 4096
"""Distinct feature rows of the drawn store; images are cut out of them."""

NOT_CLAIMED = (
    "The files have just been written and read: this is the speed of the system's cache, not of a disk. Where "
    "the store is larger than free memory, and in a first epoch, the disk decides.",
    (
        "No other library's store is measured. The released code's files (one .npy per image, a pickle, a TSV) are "
        "not compared."
    ),
    (
        "The loader's consumer does nothing. In training the background thread shares the cores and the interpreter "
        "with the step."
    ),
    (
        "All images have the same number of regions. Words are drawn at random, one word piece each, and have been "
        "tokenised in an earlier epoch."
    ),
    "Peak memory is not reported: mapped pages count as resident although the system may drop them.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


def draw_store(path: Path, options: argparse.Namespace) -> NativeStore:
    """Write and open a store of random regions."""
    rng = runtime.generator_for(SEED, 3)
    pool = draw_regions(max(POOL_ROWS, options.regions), options.feature_size, rng)
    with StoreWriter(path, feature_size=options.feature_size, fingerprint="random") as writer:
        for number in range(options.images):
            first = int(rng.integers(len(pool) - options.regions + 1))
            rows = slice(first, first + options.regions)
            writer.add(
                image_id(number), RegionArray(features=pool.features[rows], boxes=pool.boxes[rows], size=pool.size)
            )
    return NativeStore.open(path)


def gatherer(store: NativeStore, options: argparse.Namespace, *, buffered: bool) -> Callable[[int], int]:
    """One pass over all images in random order, in batches; returns how many were read."""
    shape = (options.batch_size, options.regions, options.feature_size)
    buffer: NDArray[Any] | None = np.empty(shape, np.float16).reshape(-1) if buffered else None

    def run(number: int) -> int:
        order = runtime.generator_for(SEED, 4, number).permutation(options.images)
        for start in range(0, options.images, options.batch_size):
            store.gather(
                [image_id(at) for at in order[start : start + options.batch_size]], options.regions, buffer=buffer
            )
        return int(options.images)

    return run


def copier(options: argparse.Namespace) -> Callable[[int], int]:
    """Copies of as many bytes as a pass reads, from an array larger than a processor's caches; returns the number of
    images."""
    rows = options.batch_size * options.regions
    source = np.ones((8 * rows, options.feature_size), np.float16)
    target = np.empty((rows, options.feature_size), np.float16)

    def run(number: int) -> int:
        for start in range(0, options.images, options.batch_size):
            size = min(options.batch_size, options.images - start) * options.regions
            first = (start // options.batch_size) % 8 * rows
            np.copyto(target[:size], source[first : first + size])
        return int(options.images)

    return run


def epochs(
    store: RegionStore | None,
    options: argparse.Namespace,
    tokenizer: Tokenizer,
    *,
    prefetch: int = 0,
    masking: RegionMasking | None = None,
) -> Callable[[int], int]:
    """One epoch of masked caption pairs; returns the number of examples."""
    spec = InputSpec(feature_size=options.feature_size, max_regions=options.regions)
    source = CaptionPairs(draw_captions(options.images, tokenizer), TextLayout(tokenizer, spec))
    loader = Loader(
        source,
        Collator(
            store,
            spec,
            tokenizer,
            masking=TokenMasking(),
            region_masking=masking,
            needs=() if masking is None else NEEDS,
            pool=[image_id(number) for number in range(options.images)],
        ),
        batch_size=options.batch_size,
        seed=SEED,
        drop_last=False,
        prefetch=prefetch,
    )

    def run(number: int) -> int:
        loader.epoch = number
        return sum(batch.text.ids.shape[0] for batch, _ in loader)

    return run


def rate(run: Callable[[int], int], number: int) -> float:
    """Items per second of one pass."""
    start = time.perf_counter()
    items = run(number)
    return items / (time.perf_counter() - start)


def measure(store: NativeStore, options: argparse.Namespace) -> dict[str, Any]:
    """Rates by name: images per second of the first three, pairs per second of the others."""
    tokenizer = Tokenizer()
    runs = {
        "copy": copier(options),
        "gather": gatherer(store, options, buffered=False),
        "gather, own buffer": gatherer(store, options, buffered=True),
        "loader, text only": epochs(None, options, tokenizer),
        "loader": epochs(store, options, tokenizer),
        "loader, ahead": epochs(store, options, tokenizer, prefetch=4),
        "loader, masked regions": epochs(store, options, tokenizer, masking=REGION_MASKING),
        "loader, row numbers": epochs(FeatureRows(store), options, tokenizer, masking=REGION_MASKING),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.warmup + options.repeats):
        for name, run in runs.items():
            found = rate(run, number)
            if number >= options.warmup:
                rates[name].append(found)
    return {name: summary(values) for name, values in rates.items()}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    sizes = result["settings"]
    bytes_per_image = sizes["regions"] * sizes["feature_size"] * 2
    lines = [
        f"# Region store and loader, {result['date']}",
        "",
        f"{sizes['images']} images of {sizes['regions']} regions of width {sizes['feature_size']} in half precision "
        f"({sizes['images'] * bytes_per_image / 1e9:.2f} GB of features), read in batches of {sizes['batch_size']}; "
        f"{sizes['captions']} captions, an epoch being one pair for each. Items per second, median (quartiles) over "
        "whole passes, the rows of the table taking turns.",
        "",
        "| | unit | per second | features | target on one core |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["rates"].items():
        low, high = found["quartiles"]
        copied = "text" not in name and "numbers" not in name
        volume = f"{found['median'] * bytes_per_image / 1e9:.2f} GB/s" if copied else ""
        target = f"{TARGETS[name]}: {found['median'] / TARGETS[name]:.2f} of it" if name in TARGETS else ""
        lines.append(
            f"| {name} | {'pairs' if 'loader' in name else 'images'} | {found['median']:.0f} ({low:.0f} to "
            f"{high:.0f}) | {volume} | {target} |"
        )
    lines += [
        "",
        "copy: as many bytes from one array to another. gather: NativeStore.gather into new memory, or into "
        "reused memory. loader: caption pairs, masked, padded, with their regions; 'ahead' by the background thread; "
        "'masked regions' with LXMERT's masking and targets; 'row numbers' the same for features that live on the "
        "device.",
        "",
        *circumstances(result),
    ]
    return "\n".join(lines) + "\n"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the native region store and the loader.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--images", type=int, default=2000, help="images in the store")
    parser.add_argument("--regions", type=int, default=36, help="regions per image")
    parser.add_argument("--feature-size", type=int, default=2048, help="width of a region's feature")
    parser.add_argument("--batch-size", type=int, default=128, help="images per gather, examples per batch")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--warmup", type=int, default=1, help="passes before timing")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes")
    parser.add_argument("--folder", type=Path, help="where to put the temporary store (default: the system's place)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    date, load_before = datetime.date.today().isoformat(), load_averages()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="visling-benchmark-") as folder:
        rates = measure(draw_store(Path(folder) / "store", options), options)
    result = {
        "benchmark": "store",
        "date": date,
        "machine": machine(torch.device("cpu")),
        "versions": versions("visling", "torch", "numpy", "tokenizers"),
        "settings": {
            "images": options.images,
            "captions": options.images * CAPTIONS_PER_IMAGE,
            "regions": options.regions,
            "feature_size": options.feature_size,
            "dtype": "float16",
            "batch_size": options.batch_size,
            "seed": SEED,
            "warmup": options.warmup,
            "repeats": options.repeats,
        },
        "load_before": load_before,
        "load_after": load_averages(),
        "rates": rates,
        "claims": [
            claim(name, "caption pairs a second", rates[name]["median"], target)
            for name, target in TARGETS.items()
            if (options.regions, options.feature_size) == (36, 2048)
        ],
        "not_claimed": NOT_CLAIMED,
    }
    stem = f"store_{date}_{options.images}x{options.regions}x{options.feature_size}_batch-{options.batch_size}"
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
