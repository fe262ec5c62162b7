"""Storage, feed, hours and failures of large runs, computed from the rates in results.

A rate is one that was measured for one process; what many of them reach is that times their number, which no network
does: the tables are bounds. Everything that was not measured is in `ASSUMED`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REGIONS, WIDTH = 36, 2048
FEATURE_BYTES = REGIONS * WIDTH * 2
"""Of an image in half precision."""
BOX_BYTES = REGIONS * 4 * 4
IMAGE_BYTES = 13e9 / 82_783
"""Of a photograph: COCO's train2014.zip has 13 GB and 82,783 images."""
MACHINE_DAYS = 2048 * 54 / 419
"""Days of one machine between failures: 419 in 54 days of 2,048 machines of 8 GPUs (Grattafiori et al. 2024, "The Llama
3 herd of models", section 3.3.4)."""
STATE_BYTES_PER_WEIGHT = 12
"""Weight and two moments of AdamW in float32."""
PROCESSES = (1, 8, 64, 512, 4096)
MACHINES = (1, 8, 64, 512)
EACH = 8
"""Processes of a machine."""

ASSUMED = (
    f"Tables: {EACH} processes a machine; perfect scaling, so hours are lower bounds; one image a pair in the billion; "
    f"{IMAGE_BYTES / 1e3:.0f} KB an image as in COCO's train2014.",
    f"Failures: one in {MACHINE_DAYS:.0f} days of a machine, as published of the training of Llama 3 "
    "(arXiv 2407.21783, section 3.3.4); yours will differ.",
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is trained on."""

    name: str
    pairs: int
    epochs: int
    images: int


CORPORA = (
    Corpus(name="LXMERT: 9.18 M pairs x 20 epochs", pairs=9_180_000, epochs=20, images=180_000),  # its section 3.3
    Corpus(name="a billion pairs, one epoch", pairs=10**9, epochs=1, images=10**9),
)


def compute(folder: Path, saving: float) -> dict[str, Any]:
    """All tables as numbers.

    Args:
        folder: results.
        saving: bytes a second at which a state is written.
    Raises:
        SystemExit: a result is missing.
    """
    rates = list(_read_rates(folder))
    store = _read(folder, "store")
    startup = _read(folder, "startup")
    extraction = _read(folder, "extraction")
    weights = rates[0]["parameters"]
    save_seconds = weights * STATE_BYTES_PER_WEIGHT / saving
    restart = startup["seconds"]["pretrain"]["later runs"]["median"] + save_seconds  # reading it takes as long at most
    return {
        "storage": [
            {
                "corpus": corpus.name,
                "images": corpus.images,
                "features": corpus.images * FEATURE_BYTES,
                "boxes": corpus.images * BOX_BYTES,
                "photographs": corpus.images * IMAGE_BYTES,
                "extraction_process_days": corpus.images / extraction["images_per_second"]["visling"]["median"] / 86400,
            }
            for corpus in CORPORA
        ],
        "feed": {
            "rates": [
                {**rate, "bytes_per_second": rate["pairs_per_second"] * (FEATURE_BYTES + BOX_BYTES)} for rate in rates
            ],
            "loader": store["rates"]["loader"]["median"],
            "store": store["file"],
        },
        "hours": [
            {
                "corpus": corpus.name,
                "rate": rate["name"],
                "hours": {
                    str(count): corpus.pairs * corpus.epochs / (rate["pairs_per_second"] * count) / 3600
                    for count in PROCESSES
                },
            }
            for corpus in CORPORA
            for rate in rates
        ],
        "failures": {
            "weights": weights,
            "save_seconds": save_seconds,
            "restart_seconds": restart,
            "startup": startup["file"],
            "extraction": extraction["file"],
            "machines": [_describe_failures(count, save_seconds, restart) for count in MACHINES],
        },
    }


def choose_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """Seconds of training between two states that lose the least time (Young 1974, "A first order approximation to the
    optimum checkpoint interval")."""
    return math.sqrt(2 * save_seconds * seconds_between_failures)


def _describe_failures(machines: int, save_seconds: float, restart: float) -> dict[str, float]:
    between = MACHINE_DAYS * 86400 / machines
    interval = choose_interval(save_seconds, between)
    lost = save_seconds / interval + (interval / 2 + restart) / between
    return {
        "machines": machines,
        "failures_per_day": machines / MACHINE_DAYS,
        "best_interval_seconds": interval,
        "lost_share": lost,
        "lost_share_saving_hourly": save_seconds / 3600 + (1800 + restart) / between,
    }


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The last result of a benchmark, with the name of its file."""
    files = sorted(folder.glob(f"{name}_*.json"))
    if not files:
        raise SystemExit(f"{folder} holds no result of {name}.py: run it first.")
    return {**json.loads(files[-1].read_text(encoding="utf-8")), "file": files[-1].stem}


def _read_rates(folder: Path) -> Iterator[dict[str, Any]]:
    """Pairs a second of LXMERT's pre-training step, of one process: the last result of each precision on a CPU, and of
    each GPU."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("pretraining_*lxmert*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        settings, (work, *_) = result["settings"], result["comparisons"]
        if settings["preset"] is None and settings["layers"] is None:
            where = result["machine"]
            name = f"{where['processor']}, {where['threads']} threads, {settings['precision']}"
            found[name] = {
                "name": name,
                "pairs_per_second": settings["batch_size"] / work["seconds"]["visling"]["median"],
                "parameters": work["parameters"],
                "file": file.stem,
            }
    for file in sorted(folder.glob("gpu_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        for work in result["measurements"]:
            if (work["model"], work["work"]) == ("lxmert", "pre-training"):
                name = f"{result['machine']['device']}, {result['settings']['precision']}"
                found[name] = {
                    "name": name,
                    "pairs_per_second": work["samples_per_second"]["visling"],
                    "parameters": next(iter(found.values()))["parameters"],
                    "file": file.stem,
                }
    if not found:
        raise SystemExit(f"{folder} holds no result of pretraining.py for LXMERT at its full size: run it first.")
    yield from found.values()


def as_markdown(tables: Mapping[str, Any]) -> Iterator[str]:
    """The tables for readers; paths are those of the folder of results."""
    yield "## Storage"
    yield ""
    yield f"{REGIONS} regions of width {WIDTH} in half precision, and their boxes."
    yield ""
    yield "| corpus | images | features | boxes | photographs | process-days of extraction |"
    yield "|---|---|---|---|---|---|"
    for each in tables["storage"]:
        yield (
            f"| {each['corpus']} | {each['images']:,} | {_bytes(each['features'])} | {_bytes(each['boxes'])} | "
            f"{_bytes(each['photographs'])} | {each['extraction_process_days']:,.0f} |"
        )
    yield ""
    yield (
        "Extraction at the rate of the Visual Genome detector in one process of two CPU threads "
        f"([file]({tables['failures']['extraction']}.md))."
    )
    yield ""
    yield "## Feed"
    yield ""
    yield f"| one process | pairs a second | of features | {EACH} of them | result |"
    yield "|---|---|---|---|---|"
    for each in tables["feed"]["rates"]:
        yield (
            f"| {each['name']} | {each['pairs_per_second']:.1f} | {each['bytes_per_second'] / 1e6:.1f} MB/s | "
            f"{EACH * each['bytes_per_second'] / 1e6:.0f} MB/s | [file]({each['file']}.md) |"
        )
    yield ""
    yield (
        f"The loader makes {tables['feed']['loader']:,.0f} pairs a second with their features on one core, out of the "
        f"system's cache ([file]({tables['feed']['store']}.md))."
    )
    yield ""
    yield "## Hours"
    yield ""
    yield "| corpus | rate of a process | " + " | ".join(f"{count:,} processes" for count in PROCESSES) + " |"
    yield "|---" * (2 + len(PROCESSES)) + "|"
    for each in tables["hours"]:
        hours = " | ".join(f"{each['hours'][str(count)]:,.1f}" for count in PROCESSES)
        yield f"| {each['corpus']} | {each['rate']} | {hours} |"
    failures = tables["failures"]
    yield ""
    yield "## Failures"
    yield ""
    yield (
        f"A state of {failures['weights'] / 1e6:.0f} million weights is written in {failures['save_seconds']:.1f} s; a "
        f"restart takes {failures['restart_seconds']:.0f} s to the first step, reading the state included "
        f"([start-up]({failures['startup']}.md)), and loses half of the time between two states on average."
    )
    yield ""
    yield "| machines | failures a day | best time between states | time lost | lost if saved hourly |"
    yield "|---|---|---|---|---|"
    for each in failures["machines"]:
        yield (
            f"| {each['machines']} | {each['failures_per_day']:.3f} | {each['best_interval_seconds'] / 60:.0f} min | "
            f"{each['lost_share']:.2%} | {each['lost_share_saving_hourly']:.2%} |"
        )


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.0f} MB"
