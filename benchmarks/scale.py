"""What a billion examples cost in memory and time before anything is trained: loader, index, annotations, states.

    # about ten minutes, 6 GB of memory and 3 GB of disk:
    python benchmarks/scale.py --out benchmarks/results
    # the tables alone, from the results that exist:
    python benchmarks/scale.py --out benchmarks/results --tables

Loader       The real one, over a source of 10^9 examples that makes an example when it is asked for: from nothing to
             the first batch of an epoch, to the first after resuming in its middle, batches after that, and memory.
Order        The list of numbers that a smaller corpus is shuffled as, at sizes that a machine bears.
Index        That of a region store without features: opened and asked for images, at two sizes.
Annotations  Captions in COCO's layout, read by the real reader and split into word pieces, and the same file entry by
             entry, at two sizes.
States       Writing what a run is resumed from, to the disk of the temporary folder, until it is there.

Each is measured in a process of its own. What is not run at 10^9 is extrapolated, and the page says from what. Then
follow the tables of `scale_tables.py`: storage, feed, hours and failures of two corpora, from the rates in results.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scale_tables
import torch

# The script's folder is on the path: benchmarks share how a machine is described and results are written.
from measuring import (
    SEED,
    circumstances,
    in_new_process,
    load_averages,
    machine,
    resident,
    summary,
    today,
    versions,
    write_result,
)
from numpy.typing import NDArray

from visling import runtime
from visling.data.annotations.captions import read_captions
from visling.data.annotations.streamed import stream_list
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.masking import TokenMasking
from visling.data.batches.permutation import MOST_LISTED, shuffle
from visling.data.corpora.captions import SingleCaption
from visling.data.text import TextLayout, Tokenizer
from visling.regions.files import BOXES, FORMAT, INDEX, MANIFEST, SCHEMA, Field, hash_file, write_tensors
from visling.regions.store import NativeStore
from visling.types import Example, InputSpec, TextRow

T = TypeVar("T")

BILLION = 10**9
MIB = 2**20
ASKED = 100_000
"""Images that an index is asked for."""

NOT_CLAIMED = (
    "Nothing was trained on 10^9 examples: an example is made of its number, and no image or caption is read.",
    "Index and annotations are measured at the sizes in the table; what they need at 10^9 is these bytes times 10^9.",
    "Files have just been written and are in the system's cache.",
    "Words are drawn at random, ten a caption; people's captions differ in length.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


class Numbered:
    """Examples that are made of their numbers when somebody asks for them: one sentence in as many words as the last
    digit says."""

    def __init__(self, count: int, layout: TextLayout) -> None:
        self._count = count
        self._rows: list[TextRow] = [layout.row(" ".join(["cat"] * (4 + digit))) for digit in range(10)]

    def __len__(self) -> int:
        return self._count

    def prepare(self) -> None:
        """Nothing is done ahead."""

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`."""
        return self.lay_out([self.choose(index, rng)])[0]

    def choose(self, index: int, rng: np.random.Generator) -> int:
        """The number itself, and a draw as real sources take one."""
        rng.random()
        return index

    def measure(self, choices: Sequence[int]) -> NDArray[np.int64]:
        """(N,) word pieces."""
        return 6 + np.asarray(choices) % 10

    def lay_out(self, choices: Sequence[int]) -> Sequence[Example]:
        """The examples."""
        return [Example(id=str(number), rows=(self._rows[number % 10],), images=()) for number in choices]


class Grown:
    """Resident memory in bytes beyond what there was, now and at its peak: `with Grown() as grown: ...`."""

    def __enter__(self) -> Grown:
        gc.collect()
        self._before = resident("VmRSS") or 0.0
        return self

    def __exit__(self, *_: object) -> None:
        gc.collect()
        self.now = ((resident("VmRSS") or 0.0) - self._before) * MIB
        self.peak = ((resident("VmHWM") or 0.0) - self._before) * MIB


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and its seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def measure_loader(options: argparse.Namespace, bucket: int) -> dict[str, Any]:
    """One process of many: seconds to the first batch of an epoch and of its middle, batches after it, memory."""
    torch.set_num_threads(options.threads)
    layout = TextLayout(Tokenizer(), InputSpec())
    source = Numbered(options.examples, layout)
    collator = Collator(None, layout.spec, layout.tokenizer, masking=TokenMasking())

    def begin(batches: int) -> tuple[Loader, Any]:
        loader = Loader(
            source,
            collator,
            batch_size=options.batch_size,
            seed=SEED,
            bucket=bucket,
            prefetch=0,
            rank=options.world_size - 1,
            world_size=options.world_size,
        )
        loader.load_state_dict({**loader.state_dict(), "epoch": 1, "batches": batches})
        made = loader.batches_with_index()
        next(made)
        return loader, made

    begin(0)  # what is loaded and compiled at first use belongs to no start
    with Grown() as grown:
        starts = [timed(lambda: begin(0)) for _ in range(options.repeats)]
        middle = len(starts[0][0][0]) // 2
        resumed = [timed(lambda: begin(middle)) for _ in range(options.repeats)]
        _, made = resumed[0][0]
        _, spent = timed(lambda: [next(made) for _ in range(options.batches)])
    return {
        "sorted_together": bucket,
        "start_seconds": summary([seconds for _, seconds in starts]),
        "resume_seconds": summary([seconds for _, seconds in resumed]),
        "examples_per_second": options.batches * options.batch_size / spent,
        "peak_bytes": grown.peak,
    }


def measure_list(count: int) -> dict[str, Any]:
    """A shuffled list of numbers, as corpora of up to `MOST_LISTED` examples have it."""
    with Grown() as grown:
        numbers, spent = timed(lambda: runtime.generator_for(SEED).permutation(count))
    assert len(numbers) == count
    return {"examples": count, "seconds": spent, "bytes": grown.now}


def measure_order(count: int) -> dict[str, Any]:
    """The numbers at a million places anywhere in the order."""
    shuffle(count, SEED, 0)[:10]  # what is loaded at first use belongs to no order
    chunks = range(0, count, max(count // 250, 1))
    with Grown() as grown:
        order, start = timed(lambda: shuffle(count, SEED, 1))
        places, spent = timed(lambda: sum(len(order[at : at + 4096]) for at in chunks))
    return {"examples": count, "start_seconds": start, "places_per_second": places / spent, "bytes": grown.peak}


def measure_index(images: int) -> dict[str, Any]:
    """A store's index: its file, opening it, and asking for images in random order. The images have no regions, of
    which an index holds no more than their number."""
    with tempfile.TemporaryDirectory(prefix="visling-benchmark-") as folder:
        path = Path(folder)
        names = [f"{number:012d}" for number in range(images)]
        write_tensors(
            path / INDEX,
            {
                "starts": np.zeros(images, np.int64),
                "counts": np.zeros(images, np.int64),
                "sizes": np.full((images, 2), (640, 480), np.int32),
                "ids": np.frombuffer("\n".join(names).encode(), np.uint8),
            },
        )
        asked = [names[number] for number in runtime.generator_for(SEED).integers(images, size=ASKED)]
        del names
        size = (path / INDEX).stat().st_size
        fields = {"features": Field(dtype="float16", width=2048), "boxes": Field(dtype="float32", width=4)}
        manifest = {
            "format": FORMAT, "schema": SCHEMA, "fingerprint": "none", "feature_size": 2048, "dtype": "float16",
            "class_names": [], "attribute_names": [], "settings": {}, "boxes": BOXES, "images": images,
            "regions": 0, "fields": {name: asdict(field) for name, field in fields.items()},
            "shards": [], "index": {"file": INDEX, "bytes": size, "sha256": hash_file(path / INDEX)},
        }  # fmt: skip
        (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        with Grown() as grown:
            store, opened = timed(lambda: NativeStore.open(path))
            _, first = timed(lambda: store.count(asked[0]))
            _, spent = timed(lambda: store.count_regions(asked))
    return {
        "images": images,
        "file_bytes_per_image": size / images,
        "memory_bytes_per_image": grown.now / images,
        "open_seconds": opened,
        "first_lookup_seconds": first,
        "lookups_per_second": ASKED / spent,
    }


def measure_captions(captions: int) -> dict[str, Any]:
    """Captions read into records, split into word pieces, and streamed out of a file that is one list."""
    rng = runtime.generator_for(SEED, 7)
    tokenizer = Tokenizer()
    words = [word for word in tokenizer.tokens(range(tokenizer.size)) if word.isalpha() and len(word) > 2]
    with tempfile.TemporaryDirectory(prefix="visling-benchmark-") as folder:
        file, entries = Path(folder) / "captions_train2017.json", Path(folder) / "list.json"
        with entries.open("w", encoding="utf-8") as target:
            for number in range(captions):
                text = " ".join(words[int(at)] for at in rng.integers(len(words), size=10))
                begun = ", " if number else "["
                target.write(f'{begun}{{"id": {number}, "image_id": {number // 5}, "caption": "{text}"}}')
            target.write("]")
        with file.open("w", encoding="utf-8") as target:
            images = range(-(-captions // 5))
            listed = ", ".join(f'{{"id": {image}, "file_name": "{image:012d}.jpg"}}' for image in images)
            target.write(f'{{"images": [{listed}], "annotations": ')
            with entries.open(encoding="utf-8") as listing:
                shutil.copyfileobj(listing, target)
            target.write("}")
        size = file.stat().st_size
        with Grown() as streaming:
            _, streamed = timed(lambda: sum(len(entry["caption"]) for entry in stream_list(entries)))
        with Grown() as grown:
            read, seconds = timed(lambda: read_captions(file))
        with Grown() as laid:
            source = SingleCaption(read.records, TextLayout(tokenizer, InputSpec()))
            _, split = timed(source.prepare)
    return {
        "captions": captions,
        "file_bytes_per_caption": size / captions,
        "memory_bytes_per_caption": grown.now / captions,
        "peak_bytes_per_caption": grown.peak / captions,
        "source_bytes_per_caption": laid.now / captions,
        "seconds_to_read": seconds,
        "seconds_to_split": split,
        "seconds_to_stream": streamed,
        "streamed_peak_bytes": streaming.peak,
    }


def measure_saving(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second of a state that is written and flushed, as `train.state` does it."""
    tensor = torch.rand(options.state_mib * MIB // 4)

    def save(file: Path) -> None:
        torch.save({"weights": tensor}, file)
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    with tempfile.TemporaryDirectory(prefix="visling-benchmark-") as folder:
        spent = [timed(lambda: save(Path(folder) / "state.pt"))[1] for _ in range(options.repeats)]
    return {"mib": options.state_mib, "bytes_per_second": summary([options.state_mib * MIB / each for each in spent])}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "loader": [in_new_process(measure_loader, options, bucket) for bucket in (1, options.sorted_together)],
        "list": [in_new_process(measure_list, count) for count in options.lists],
        "order": in_new_process(measure_order, options.examples),
        "index": [in_new_process(measure_index, count) for count in options.images],
        "annotations": [in_new_process(measure_captions, count) for count in options.captions],
        "saving": in_new_process(measure_saving, options),
    }


def describe_loader(result: Mapping[str, Any]) -> Iterator[str]:
    settings = result["settings"]
    yield (
        f"Process {settings['world_size'] - 1} of {settings['world_size']}, {settings['examples']:,} examples, batches "
        f"of {settings['batch_size']} a process; seconds to the first batch, median (smallest to largest)."
    )
    yield ""
    yield "| batches sorted together | epoch begins | resumed in its middle | then examples a second | memory |"
    yield "|---|---|---|---|---|"
    for each in result["loader"]:
        yield (
            f"| {each['sorted_together']} | {_seconds(each['start_seconds'])} | {_seconds(each['resume_seconds'])} | "
            f"{each['examples_per_second']:,.0f} | {each['peak_bytes'] / 1e6:.0f} MB |"
        )
    yield ""
    order = result["order"]
    yield (
        f"Order that is computed: {order['places_per_second'] / 1e6:.1f} million places a second, "
        f"{order['start_seconds'] * 1e3:.2f} ms to begin with. The list that it replaces "
        f"above {MOST_LISTED:,} examples:"
    )
    yield ""
    yield "| examples | seconds | memory |"
    yield "|---|---|---|"
    for each in result["list"]:
        yield f"| {each['examples']:,} | {each['seconds']:.2f} | {each['bytes'] / 1e9:.2f} GB |"
    last = result["list"][-1]
    ratio = BILLION / last["examples"]
    yield (
        f"| {BILLION:,} (extrapolated from the row above) | at least {last['seconds'] * ratio:.0f} | "
        f"{last['bytes'] * ratio / 1e9:.1f} GB |"
    )


def describe_records(result: Mapping[str, Any]) -> Iterator[str]:
    yield "| images in an index | file, bytes each | memory, bytes each | opened | first lookup | lookups a second |"
    yield "|---|---|---|---|---|---|"
    for each in result["index"]:
        yield (
            f"| {each['images']:,} | {each['file_bytes_per_image']:.0f} | {each['memory_bytes_per_image']:.0f} | "
            f"{each['open_seconds']:.2f} s | {each['first_lookup_seconds']:.2f} s | {each['lookups_per_second']:,.0f} |"
        )
    last = result["index"][-1]
    yield ""
    yield (
        f"At 10^9 images: a file of {last['file_bytes_per_image']:.0f} GB, {last['memory_bytes_per_image']:.0f} GB of "
        "memory in every process."
    )
    yield ""
    yield (
        "| captions | file, bytes each | records in memory, bytes each | at the peak of reading | with word pieces | "
        "read | split | streamed, memory at the peak |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for each in result["annotations"]:
        whole = each["memory_bytes_per_caption"] + each["source_bytes_per_caption"]
        yield (
            f"| {each['captions']:,} | {each['file_bytes_per_caption']:.0f} | {each['memory_bytes_per_caption']:.0f} | "
            f"{each['peak_bytes_per_caption']:.0f} | {whole:.0f} | {each['seconds_to_read']:.1f} s | "
            f"{each['seconds_to_split']:.1f} s | {each['seconds_to_stream']:.1f} s, "
            f"{each['streamed_peak_bytes'] / 1e6:.0f} MB |"
        )
    last = result["annotations"][-1]
    whole = last["memory_bytes_per_caption"] + last["source_bytes_per_caption"]
    yield ""
    yield "| memory of a machine, for one process on it | pairs that fit in memory, while they are read |"
    yield "|---|---|"
    for gigabytes in (64, 256, 1024):
        most = gigabytes * 1e9 / max(whole, last["peak_bytes_per_caption"])
        yield f"| {gigabytes} GB | {most / 1e6:,.0f} million |"
    yield ""
    yield f"A state is written at {result['saving']['bytes_per_second']['median'] / 1e6:.0f} MB/s."


def _seconds(found: Mapping[str, Any]) -> str:
    return f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})"


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    return (
        "\n".join(
            [
                f"# A billion examples, {result['date']}",
                "",
                "## Loader",
                "",
                *describe_loader(result),
                "",
                "## Index, annotations, states",
                "",
                *describe_records(result),
                "",
                *scale_tables.as_markdown(result["arithmetic"]),
                "",
                *circumstances(result),
            ]
        )
        + "\n"
    )


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a billion examples cost before anything is trained.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--tables", action="store_true", help="print the tables of the last result in --out, only")
    parser.add_argument("--examples", type=int, default=BILLION, help="of the loader")
    parser.add_argument("--world-size", type=int, default=64, help="processes that share a global batch")
    parser.add_argument("--batch-size", type=int, default=256, help="examples per batch and process")
    parser.add_argument("--sorted-together", type=int, default=16, help="global batches, of the second loader")
    parser.add_argument("--batches", type=int, default=64, help="timed after the first")
    parser.add_argument("--lists", type=int, nargs="+", default=[MOST_LISTED, 100_000_000], help="sizes of lists")
    parser.add_argument("--images", type=int, nargs="+", default=[1_000_000, 10_000_000], help="sizes of indexes")
    parser.add_argument("--captions", type=int, nargs="+", default=[200_000, 1_000_000], help="sizes of corpora")
    parser.add_argument("--state-mib", type=int, default=512, help="size of the state that is written")
    parser.add_argument("--repeats", type=int, default=3, help="of starts and of states")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--rates", type=Path, default=Path(__file__).parent / "results", help="results with the rates")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    if options.tables:
        last = max(options.out.glob("scale_*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        saving = json.loads(last.read_text(encoding="utf-8"))["saving"]["bytes_per_second"]["median"]
        print("\n".join(scale_tables.as_markdown(scale_tables.compute(options.rates, saving))))
        return
    load_before = load_averages()
    found = measure(options)
    result = {
        "benchmark": "scale",
        "date": today(),
        "machine": machine(torch.device("cpu")),
        "versions": versions("visling", "torch", "numpy", "tokenizers"),
        "settings": {
            **{name: value for name, value in vars(options).items() if name not in ("out", "rates", "tables")},
            "seed": SEED,
        },
        "load_before": load_before,
        "load_after": load_averages(),
        **found,
        "arithmetic": scale_tables.compute(options.rates, found["saving"]["bytes_per_second"]["median"]),
        "not_claimed": [*NOT_CLAIMED, *scale_tables.ASSUMED],
    }
    print(write_result(options.out, f"scale_{today()}_{options.examples}", result, as_markdown(result)))


if __name__ == "__main__":
    main()
