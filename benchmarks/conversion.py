"""How fast a released text file of region features becomes a store.

    # 1,000 images of 36 x 2048, a file of 0.4 GB in a temporary folder:
    python benchmarks/conversion.py --out benchmarks/results

The file has the layout of LXMERT's release and is drawn at random. Measured in turn, one pass over the whole file each
time, in one thread of the interpreter:

    reading     lines are read, split, and every array is decoded from base64, which any reader must do
    converting  `visling regions convert`: the same, checked, rounded to half precision and written to a store that is
                finished, with digests and everything flushed to the disk

The file has just been written and is in the system's cache. The peak memory of a conversion is measured in a process of
its own.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The script's folder is on the path: benchmarks share how results are written.
from measuring import SEED, circumstances, load_averages, machine, resident, summary, versions, write_result

from visling import runtime
from visling.regions.formats import open_reader
from visling.regions.formats.base import convert_regions

WIDTH, HEIGHT = 640, 480
ENCODED = (3, 4, 5, 6, 8, 9)
"""Columns of the layout that are base64."""

NOT_CLAIMED = (
    "The file is in the system's cache: this is the cost of the processor and of writing, not of reading a disk.",
    "Zip archives, in which these files are released, are unpacked before.",
    "Other layouts are not measured.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


def draw_file(path: Path, options: argparse.Namespace) -> Path:
    """A file in the layout of LXMERT's release."""
    rng = runtime.generator_for(SEED, 11)
    count, width = options.regions, options.feature_size
    pool = np.maximum(rng.standard_normal((4 * count, width), np.float32), 0)
    with path.open("wb") as file:
        for number in range(options.images):
            corners = np.sort(rng.random((count, 2, 2), np.float32), axis=1).reshape(count, 4)
            arrays = (
                rng.integers(0, 1600, count),
                rng.random(count, np.float32),
                rng.integers(0, 400, count),
                rng.random(count, np.float32),
                (corners * np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)),
                pool[(first := int(rng.integers(0, 3 * count))) : first + count],
            )
            encoded = [base64.b64encode(np.ascontiguousarray(array)) for array in arrays]
            about = [f"COCO_train2014_{number:012d}".encode(), b"%d" % HEIGHT, b"%d" % WIDTH]
            file.write(b"\t".join([*about, *encoded[:4], b"%d" % count, *encoded[4:]]) + b"\n")
    return path


def read_plainly(path: Path) -> int:
    """Read the file and decode its arrays; returns the number of bytes decoded."""
    decoded = 0
    with path.open("rb") as file:
        for line in file:
            columns = line.split(b"\t")
            for column in ENCODED:
                decoded += np.frombuffer(base64.b64decode(columns[column]), np.uint8).size
    return decoded


def convert(path: Path, store: Path) -> None:
    """Convert the file into a new store."""
    shutil.rmtree(store, ignore_errors=True)
    convert_regions([open_reader(path)], store)


def peak_memory(path: str, store: str, threads: int) -> float | None:
    """MiB of this process at its peak, after one conversion."""
    torch.set_num_threads(threads)
    convert(Path(path), Path(store))
    return resident("VmHWM")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of both, in turn, and the ratio pair by pair."""
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        store = Path(temporary) / "store"
        path = draw_file(Path(temporary) / "train2014_obj36.tsv", options)
        seconds: dict[str, list[float]] = {"reading": [], "converting": []}
        for number in range(options.warmup + options.repeats):
            for name in seconds:
                start = time.perf_counter()
                if name == "reading":
                    read_plainly(path)
                else:
                    convert(path, store)
                if number >= options.warmup:
                    seconds[name].append(time.perf_counter() - start)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_memory, (str(path), str(store), options.threads))
        size = path.stat().st_size
    return {
        "file_bytes": size,
        "images_per_second": {
            name: summary([options.images / one for one in taken]) for name, taken in seconds.items()
        },
        "ratio": summary([a / b for a, b in zip(seconds["reading"], seconds["converting"], strict=True)]),
        "peak_memory_mib": peak,
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    sizes = result["settings"]
    lines = [
        f"# From a text file of region features to a store, {result['date']}",
        "",
        f"{sizes['images']} images of {sizes['regions']} regions of width {sizes['feature_size']} in the layout of "
        f"LXMERT's release, a file of {result['file_bytes'] / 1e9:.2f} GB. Median (quartiles) over {sizes['repeats']} "
        "passes, in turn.",
        "",
        "| | images a second | GB of the file a second |",
        "|---|---|---|",
    ]
    for name, found in result["images_per_second"].items():
        low, high = found["quartiles"]
        volume = found["median"] * result["file_bytes"] / sizes["images"] / 1e9
        lines.append(f"| {name} | {found['median']:.0f} ({low:.0f} to {high:.0f}) | {volume:.2f} |")
    low, high = result["ratio"]["quartiles"]
    lines += [
        "",
        f"Converting runs at {result['ratio']['median']:.2f} ({low:.2f} to {high:.2f}) of the speed of plain reading, "
        "pair by pair.",
    ]
    if result["peak_memory_mib"] is not None:
        lines += ["", f"Peak memory of a process that converts: {result['peak_memory_mib']:,.0f} MiB."]
    lines += [
        "",
        "reading: lines are read, split, every array is decoded from base64. converting: the same, checked, rounded "
        "to half precision, and written to a finished store with digests.",
        "",
        *circumstances(result),
    ]
    return "\n".join(lines) + "\n"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the conversion of a text file of region features.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--images", type=int, default=1000, help="images in the file")
    parser.add_argument("--regions", type=int, default=36, help="regions per image")
    parser.add_argument("--feature-size", type=int, default=2048, help="width of a region's feature")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--warmup", type=int, default=1, help="passes before timing")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes")
    parser.add_argument("--folder", type=Path, help="where to put the temporary files (default: the system's place)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    date, load_before = datetime.date.today().isoformat(), load_averages()
    result = {
        "benchmark": "conversion",
        "date": date,
        "machine": machine(torch.device("cpu")),
        "versions": versions("visling", "torch", "numpy"),
        "settings": {
            "layout": "lxmert-obj36",
            "images": options.images,
            "regions": options.regions,
            "feature_size": options.feature_size,
            "dtype": "float16",
            "seed": SEED,
            "warmup": options.warmup,
            "repeats": options.repeats,
        },
        "load_before": load_before,
        **measure(options),
        "load_after": load_averages(),
        "not_claimed": NOT_CLAIMED,
    }
    stem = f"conversion_{date}_{options.images}x{options.regions}x{options.feature_size}"
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
