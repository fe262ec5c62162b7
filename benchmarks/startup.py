"""Seconds from the command to the first training step, on annotations and a region store of a published run's size.

    # 100,000 images with 500,000 captions and as many questions, about five minutes and 0.8 GB of disk:
    python benchmarks/startup.py --out benchmarks/results
    # With the encoder of the release, whose weights are drawn and whose first step is computed too:
    python benchmarks/startup.py --out benchmarks/results --size base

Captions in COCO's layout, questions with ten answers each in VQA's, and a region store are generated in a temporary
folder. The features of the store are sparse: the files have their full size, but no block of the disk holds anything,
and whatever is read of them is 0. Boxes, index and manifest are complete.

Then `visling pretrain` and `visling finetune` are started in turn, each as a new process, and ended as soon as their
log has the line of the first step. The clock starts before the process does. The first run of each finds no cache of
its own and is reported apart: later runs are what somebody sees who changes a setting and tries again. The files have
just been written, so the system has them in its cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The script's folder is on the path: benchmarks share how a machine is described and results are written.
from measuring import SEED, circumstances, claim, load_averages, machine, summary, versions, write_result
from numpy.typing import NDArray

from visling import models, runtime
from visling.data.text import Tokenizer
from visling.regions.files import (
    BOXES,
    FORMAT,
    HEADER_BYTES,
    INDEX,
    MANIFEST,
    SCHEMA,
    Field,
    describe_file,
    describe_tensor,
    encode_header,
    shard_name,
    write_tensors,
)

BASE = {"visualbert": "vqa", "lxmert": "base", "cvlp": "base", "vlbert": "base_prec", "vilbert": "connect6"}
"""Preset of each family that is as large as its release."""
SENTENCES_PER_IMAGE = 5
"""Captions of an image, and questions about it; VQA has 5.4."""
CAPTION_WORDS, QUESTION_WORDS = (10.5, 2.4), (6.2, 2.1)
"""Mean and standard deviation of their numbers of words."""
PEOPLE = 10
"""Who answer a question."""
ANSWERS = 3000
"""Different ones."""
VALID_SHARE = 0.05
"""Of the images."""
SHARD_BYTES = 2_000_000_000
"""Largest shard, as `StoreWriter` writes them."""
POLL_SECONDS = 0.005
TARGET = 6.0
"""Seconds that a later run may take."""
FULL = 100_000
"""Images of the store that the target speaks of."""

NOT_CLAIMED = (
    "The annotations have just been written and are in the system's cache; a first command after a boot also waits "
    "for the disk, and for Python's and PyTorch's own files.",
    "Features are sparse: reading them from a disk is measured nowhere here. A step reads those of one batch.",
    "Words are drawn at random, so the texts repeat less than people's do.",
    "No features are whitened, which the small recipes do when they start from scratch: at this width it takes as long "
    "as everything else.",
    "The first step itself is included: with --size base it takes longer than everything before it.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


def image_name(number: int) -> str:
    """Id of an image, in COCO's spelling."""
    return f"COCO_{split_of(number)}2014_{number:012d}"


def split_of(number: int) -> str:
    """Which split an image belongs to."""
    return "val" if number % round(1 / VALID_SHARE) == 0 else "train"


def write_sparse_store(path: Path, options: argparse.Namespace) -> None:
    """A finished store whose features take no space."""
    rng, regions = runtime.generator_for(SEED, 5), options.regions
    fields = {"features": Field(dtype="float16", width=options.feature_size), "boxes": Field(dtype="float32", width=4)}
    path.mkdir()
    images_per_shard = max(SHARD_BYTES // (regions * sum(field.row_bytes for field in fields.values())), 1)
    shards: list[dict[str, Any]] = []
    for first in range(0, options.images, images_per_shard):
        rows = min(images_per_shard, options.images - first) * regions
        file, length = path / shard_name(len(shards)), fields["features"].row_bytes * rows
        header = {
            "features": describe_tensor("float16", fields["features"].shape(rows), 0),
            "boxes": describe_tensor("float32", fields["boxes"].shape(rows), length),
        }
        with file.open("wb") as target:
            target.write(encode_header(header, HEADER_BYTES))
            target.seek(length, os.SEEK_CUR)
            target.write(draw_boxes(rows, rng).tobytes())
        shards.append({"first_row": first * regions, "rows": rows, **describe_unread(file)})
    names = sorted((image_name(number), number) for number in range(options.images))
    write_tensors(
        path / INDEX,
        {
            "starts": np.array([number * regions for _, number in names], np.int64),
            "counts": np.full(len(names), regions, np.int64),
            "sizes": np.full((len(names), 2), (640, 480), np.int32),
            "ids": np.frombuffer("\n".join(name for name, _ in names).encode(), np.uint8),
        },
    )
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "fingerprint": "sparse",
        "feature_size": options.feature_size,
        "dtype": "float16",
        "class_names": [],
        "attribute_names": [],
        "settings": {},
        "boxes": BOXES,
        "images": options.images,
        "regions": options.images * regions,
        "fields": {name: asdict(field) for name, field in fields.items()},
        "index": describe_file(path / INDEX),
        "shards": shards,
    }
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def describe_unread(file: Path) -> dict[str, Any]:
    """Entry of a manifest without the digest, for which the whole file would have to be read; training needs none."""
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": ""}


def draw_boxes(count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Boxes in images of 640 x 480 pixels."""
    corner = rng.uniform(0, (500, 350), (count, 2))
    return np.concatenate([corner, corner + rng.uniform(10, 120, (count, 2))], axis=1).astype(np.float32)


def write_annotations(path: Path, options: argparse.Namespace) -> None:
    """Captions and questions with answers of both splits, in the official layouts."""
    rng = runtime.generator_for(SEED, 6)
    tokenizer = Tokenizer()
    words = np.array([word for word in tokenizer.tokens(range(tokenizer.size)) if word.isalpha() and len(word) > 2])
    answers = words[rng.permutation(len(words))[:ANSWERS]]
    shares = 1 / np.arange(1, len(answers) + 1)
    path.mkdir()
    for split in ("train", "val"):
        images = [number for number in range(options.images) if split_of(number) == split]
        about = np.repeat(images, SENTENCES_PER_IMAGE).tolist()
        captions, questions = (
            draw_sentences(len(about), length, words, rng) for length in (CAPTION_WORDS, QUESTION_WORDS)
        )
        given = answers[rng.choice(len(answers), (len(about), PEOPLE), p=shares / shares.sum())].tolist()
        listed = [
            {
                "license": 3,
                "file_name": f"{image_name(number)}.jpg",
                "coco_url": f"http://images.cocodataset.org/{split}2014/{image_name(number)}.jpg",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{number}_z.jpg",
                "id": number,
            }
            for number in images
        ]
        annotated = [
            {"image_id": image, "id": number, "caption": text.capitalize()}
            for number, (image, text) in enumerate(zip(about, captions, strict=True))
        ]
        asked = [
            {"image_id": image, "question": f"{text.capitalize()}?", "question_id": image * 1000 + number % 1000}
            for number, (image, text) in enumerate(zip(about, questions, strict=True))
        ]
        answered = [
            {
                "question_type": "what is",
                "multiple_choice_answer": people[0],
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                    for person, answer in enumerate(people, start=1)
                ],
                "image_id": question["image_id"],
                "answer_type": "other",
                "question_id": question["question_id"],
            }
            for question, people in zip(asked, given, strict=True)
        ]
        subset = {"data_type": "mscoco", "data_subtype": f"{split}2014"}
        for name, content in (
            (f"captions_{split}2014.json", {"images": listed, "licenses": [], "annotations": annotated}),
            (f"v2_OpenEnded_mscoco_{split}2014_questions.json", {**subset, "questions": asked}),
            (f"v2_mscoco_{split}2014_annotations.json", {**subset, "annotations": answered}),
        ):
            (path / name).write_text(json.dumps(content), encoding="utf-8")


def draw_sentences(
    count: int, length: tuple[float, float], words: NDArray[np.str_], rng: np.random.Generator
) -> list[str]:
    """Sentences of random words."""
    lengths = np.maximum(rng.normal(*length, count).round().astype(np.int64), 3)
    drawn = words[rng.integers(len(words), size=int(lengths.sum()))].tolist()
    ends = np.cumsum(lengths).tolist()
    return [" ".join(drawn[end - number : end]) for end, number in zip(ends, lengths.tolist(), strict=True)]


def list_changes(model: str, size: str) -> list[str]:
    """Settings that make a small recipe's encoder as large as the release's, for `--set`."""
    if size == "small":
        return []
    presets = models.spec(model).presets
    small, base = asdict(presets["small"]), asdict(presets[BASE[model]])
    widths = [field.name for field in dataclasses.fields(presets["small"]) if field.type == "int"]
    return [f"encoder.{name}={base[name]}" for name in widths if base[name] != small[name] and name != "feature_size"]


def start_once(verb: str, place: Path, options: argparse.Namespace) -> float:
    """Seconds from the start of a command's process to the log line of its first step; the process is then ended."""
    with tempfile.TemporaryDirectory(dir=place) as out:
        log = Path(out) / "run" / "log.jsonl"
        # As in all releases. To whiten features of this width takes longer than all the rest: a matrix of 2048 x 2048.
        settings = ["train.log_every=1", "encoder.whiten_features=false", *list_changes(options.model, options.size)]
        arguments = [
            *(sys.executable, "-m", "visling", verb, "--recipe", f"{options.model}-small"),
            *("--data", str(place / "annotations"), "--store", str(place / "store"), "--out", str(log.parent)),
            *("--batch-size", str(options.batch_size), "--device", options.device, "--threads", str(options.threads)),
            *(part for setting in settings for part in ("--set", setting)),
        ]
        with (Path(out) / "output").open("w+") as output:
            began = time.perf_counter()
            process = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment(place))
            try:
                while not (log.is_file() and '"kind": "train"' in log.read_text(encoding="utf-8")):
                    if process.poll() is not None:
                        output.seek(0)
                        raise SystemExit(f"{' '.join(arguments)} ended before its first step:\n{output.read()}")
                    time.sleep(POLL_SECONDS)
                return time.perf_counter() - began
            finally:
                process.kill()
                process.wait()


def environment(place: Path) -> dict[str, str]:
    """That of this process, with the library's own folder in the temporary one."""
    return {**os.environ, "VISLING_HOME": str(place / "home")}


def measure(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by command: of the first run, and of later ones, which take turns."""
    verbs = ("pretrain", "finetune")
    first = {verb: start_once(verb, place, options) for verb in verbs}
    later: dict[str, list[float]] = {verb: [] for verb in verbs}
    for _ in range(options.repeats):
        for verb in verbs:
            later[verb].append(start_once(verb, place, options))
    return {verb: {"first run": summary([first[verb]]), "later runs": summary(later[verb])} for verb in verbs}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    sizes = result["settings"]
    lines = [
        f"# From the command to the first step, {result['date']}",
        "",
        f"{sizes['images']} images of {sizes['regions']} regions of width {sizes['feature_size']} in half precision "
        f"({sizes['store_gb']:.1f} GB, sparse), {sizes['sentences']} captions, as many questions with {PEOPLE} answers "
        f"each; {sizes['model']}, encoder of {sizes['size']} size, batch {sizes['batch_size']}. Seconds from the start "
        "of the process to the end of the first step; later runs: median (quartiles).",
        "",
        "| command | first run | later runs | of the target |",
        "|---|---|---|---|",
    ]
    for verb, found in result["seconds"].items():
        low, high = found["later runs"]["quartiles"]
        lines.append(
            f"| visling {verb} | {found['first run']['median']:.2f} | {found['later runs']['median']:.2f} "
            f"({low:.2f} to {high:.2f}) | {found['later runs']['median'] / TARGET:.2f} |"
        )
    return "\n".join([*lines, "", *circumstances(result)]) + "\n"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the time from the command to the first training step.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--images", type=int, default=FULL, help="images in the store")
    parser.add_argument("--regions", type=int, default=36, help="regions per image")
    parser.add_argument("--feature-size", type=int, default=2048, help="width of a region's feature")
    parser.add_argument("--model", choices=BASE, default="visualbert", help="model family")
    parser.add_argument("--size", choices=["small", "base"], default="small", help="of the encoder")
    parser.add_argument("--batch-size", type=int, default=32, help="examples per batch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each command after the first")
    parser.add_argument("--folder", type=Path, help="where to put the temporary files (default: the system's place)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    date, load_before = datetime.date.today().isoformat(), load_averages()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="visling-benchmark-") as folder:
        place = Path(folder)
        write_sparse_store(place / "store", options)
        write_annotations(place / "annotations", options)
        seconds = measure(place, options)
    result = {
        "benchmark": "startup",
        "date": date,
        "machine": machine(runtime.pick_device(options.device)),
        "versions": versions("visling", "torch", "numpy", "tokenizers"),
        "settings": {
            "images": options.images,
            "sentences": options.images * SENTENCES_PER_IMAGE,
            "regions": options.regions,
            "feature_size": options.feature_size,
            "store_gb": options.images * options.regions * options.feature_size * 2 / 1e9,
            "model": options.model,
            "size": options.size,
            "batch_size": options.batch_size,
            "seed": SEED,
            "repeats": options.repeats,
        },
        "load_before": load_before,
        "load_after": load_averages(),
        "seconds": seconds,
        "claims": [
            claim(
                f"visling {verb} to the first step, 100,000 images",
                "seconds",
                found["later runs"]["median"],
                TARGET,
                better="lower",
            )
            for verb, found in seconds.items()
            if options.images == FULL
        ],
        "not_claimed": NOT_CLAIMED,
    }
    stem = f"startup_{date}_{options.images}_{options.model}-{options.size}"
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
