"""What a claim compares: one number in percent, read off a finished run.

    RUN/evaluation_SPLIT.json           score, as `visling evaluate` writes it; with RUN/details_SPLIT.jsonl that of
                                        long texts
    RUN/log.jsonl                       validation
    RUN/measure_heads_SPLIT/            heads and syntax, as `visling analysis alignment` writes it; ..._random-N/: of
                                        random weights
    RUN/measure_unread_SPLIT.json       unread
    RUN/measured-DIGEST/                the same of other data or another store than the run was trained on

What is there already is read, not computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from visling import config as configs
from visling import damage
from visling.data.batches.masking import RegionMasking
from visling.data.corpora.base import split_root
from visling.data.text import Tokenizer
from visling.errors import ConfigError, RunError
from visling.models import head_styles
from visling.nn.extraction import extract_features
from visling.nn.head_blocks import RegionTargets
from visling.objectives.masked_regions import MaskedRegions, RegionLosses
from visling.objectives.pretrain_model import PretrainModel
from visling.pretrained.folder import load_heads
from visling.recipes.claim_configs import Measure
from visling.runs.evaluate import evaluate
from visling.runs.examples import open_run, read_run_json
from visling.tasks.base import list_images
from visling.train import engine, log
from visling.train.disk import explain_failure, write_json
from visling.types import IGNORE, Batch, Example, Targets, TextRow

HIDDEN_SHARE = 0.15
"""Share of the regions that `unread` hides: the releases', whatever the run was trained with."""

FEWEST_QUERIES = 20
"""Queries below which a relation in one direction is left out of `syntax`, as the page of the alignment leaves it out:
the best of many heads is right about some by chance."""

_UNREAD_BATCH = 64
"""Images encoded at a time."""

_ROUNDED = 0.01
"""Percentage points by which the rounding of official scores moves a mean."""

_LAST_LINES = 5
"""Lines shown of a command that failed."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was read off a run."""

    value: float
    """Percent, except for losses of a validation."""
    examples: int | None
    """What it is a mean over; None = not recorded."""


def measure(
    run: Path,
    measure: Measure,
    *,
    data: Path,
    store: Path,
    device: str,
    images: Path | None = None,
    random_seed: int | None = None,
) -> Measured:
    """Read off a finished run what a claim compares.

    Args:
        data: folder of annotations whose split is measured.
        store: region store of its images.
        images: folder of the images, for a run that computes features from pixels.
        random_seed: measure random weights of this seed in the model's place (`heads` and `syntax`).
    Raises:
        RunError: the run is unfinished, lacks the score, or predicts no classes of regions; a command failed; or the
            result cannot be written.
        ConfigError: random weights of another kind of measure.
        CheckpointError, DataError, StoreError: see their messages.
    """
    if random_seed is not None and measure.kind not in ("heads", "syntax"):
        raise ConfigError(f"random weights are measured by heads or syntax; found the measure {measure.kind!r}.")
    known = read_run_json(run)
    if known.get("status") != "finished":
        raise RunError(f"{run} is {known.get('status')}, and only a finished run is measured. Resume it first.")
    place = _find_place(run, known, data, store)
    where: dict[str, Any] = {"data": data, "store": store, "device": device, "images": images}
    if measure.kind == "validation":
        return _read_validation(run, known, measure.name)
    if measure.kind == "score":
        return _measure_score(run, place, measure, where)
    if measure.kind == "unread":
        return _measure_unread(run, known, place, measure.split, where)
    found = _align(run, place, measure.split, where, random_seed)
    return _read_heads(found) if measure.kind == "heads" else _read_syntax(found)


def _find_place(run: Path, known: Mapping[str, Any], data: Path, store: Path) -> Path:
    """Folder of the results: the run's own, or one of its folders for data or a store that it was not trained on."""
    given = os.path.abspath(data), os.path.abspath(store)
    trained_on = [str(split_root(root)[0]) for root in known["data"]]
    if given[0] in trained_on and given[1] == known["store"]:
        return run
    return run / f"measured-{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]}"


def _read_result(file: Path) -> dict[str, Any] | None:
    """A result that is there already; None if there is none, or the process that wrote it was killed."""
    try:
        found = damage.parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# score and validation


def _measure_score(run: Path, place: Path, measure: Measure, where: Mapping[str, Any]) -> Measured:
    found = _read_result(place / f"evaluation_{measure.split}.json")
    if found is None:
        found = evaluate(run, split=measure.split, overwrite=True, out=place, **where)
    where_found = f"{run} on split {measure.split!r}"
    score = _pick(found["scores"], measure.name, where_found)
    if not measure.fewest_words:
        return Measured(value=score["value"], examples=score["count"])
    with (place / f"details_{measure.split}.jsonl").open(encoding="utf-8") as file:
        details = [json.loads(line) for line in file]
    if abs(100 * np.mean([row["score"] for row in details]) - score["value"]) > _ROUNDED:
        raise RunError(
            f"the score {measure.name!r} of {where_found} is no mean over examples: measure it without words."
        )
    long = [row["score"] for row in details if len(row["text"].split()) >= measure.fewest_words]
    if not long:
        raise RunError(f"{where_found} has no text of {measure.fewest_words} words or more. Lower fewest_words.")
    return Measured(value=100 * float(np.mean(long)), examples=len(long))


def _read_validation(run: Path, known: Mapping[str, Any], name: str) -> Measured:
    valid = [entry for entry in log.read(run / "log.jsonl") if entry["kind"] == "valid"]
    if not valid:
        raise RunError(f"{run} has validated nothing: its log.jsonl has no line of kind 'valid'. Train it longer.")
    value = _pick(valid[-1]["scores"], name, f"the validation of {run}")
    # Scores of a task are in percent; pre-training reports shares.
    share = known["task"] is None and name.endswith("_accuracy")
    return Measured(value=100 * value if share else value, examples=None)


def _pick(scores: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in scores:
        raise RunError(f"{where} has no score {name!r}; it has {', '.join(sorted(scores))}.")
    return scores[name]


# heads and syntax


def _align(run: Path, place: Path, split: str, where: Mapping[str, Any], random_seed: int | None) -> Mapping[str, Any]:
    """Contents of alignment.json, which a process of its own computes: `analysis` knows no `runs`, nor the other way
    round."""
    out = place / f"measure_heads_{split}{'' if random_seed is None else f'_random-{random_seed}'}"
    found = _read_result(out / "alignment.json")
    if found is None:
        command = ["analysis", "alignment", str(run), "--split", split, "--threads", "1", "--overwrite"]
        command += [word for name, value in where.items() if value is not None for word in (f"--{name}", str(value))]
        command += [] if random_seed is None else ["--random-weights", "--seed", str(random_seed)]
        _run_command([*command, "--out", str(out)])
        found = json.loads((out / "alignment.json").read_text(encoding="utf-8"))
    return found


def _run_command(words: Sequence[str]) -> None:
    """Run a command of visling to its end.

    Raises:
        RunError: it failed; shows its last lines.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "visling", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if ended.returncode:
        last = "\n".join(ended.stdout.splitlines()[-_LAST_LINES:])
        raise RunError(f"`visling {' '.join(words)}` ended with status {ended.returncode}:\n{last}")


def _read_heads(found: Mapping[str, Any]) -> Measured:
    phrases = found["phrases"]
    held_out = phrases["best"]["held_out"]
    if held_out is None:
        raise RunError(
            f"all {phrases['queries']} phrases are about one image, so no other image can choose the head. Measure a "
            "split with more images."
        )
    return Measured(value=held_out["value"], examples=phrases["queries"])


def _read_syntax(found: Mapping[str, Any]) -> Measured:
    parts = [part for directions in found["relations"].values() for part in directions.values()]
    frequent = [part for part in parts if part["queries"] >= FEWEST_QUERIES and part["best"]["held_out"] is not None]
    if not frequent:
        raise RunError(
            f"no relation has {FEWEST_QUERIES} queries in one direction; the most frequent one has "
            f"{max((part['queries'] for part in parts), default=0)}. Measure a split with parses of more "
            "sentences (SPLIT.conllu)."
        )
    gains = [part["best"]["held_out"]["value"] - part["best"]["any_word"]["value"] for part in frequent]
    return Measured(value=float(np.mean(gains)), examples=sum(part["queries"] for part in frequent))


# unread


@dataclass(frozen=True)
class _Wordless:
    """One example per image, whose text has no word: [CLS] [SEP]."""

    images: Sequence[str]
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.images)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Image `index`; nothing is drawn."""
        ids = np.array([self.tokenizer.cls, self.tokenizer.sep], np.int64)
        row = TextRow(ids=ids, segments=np.zeros_like(ids), words=np.full_like(ids, -1))
        return Example(id=self.images[index], rows=(row,), images=(self.images[index],))


def _measure_unread(run: Path, known: Mapping[str, Any], place: Path, split: str, where: Mapping[str, Any]) -> Measured:
    file = place / f"measure_unread_{split}.json"
    found = _read_result(file)
    if found is not None:
        return Measured(**found)
    measured = _name_hidden_regions(run, known, split, where)
    with explain_failure(place):
        place.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(measured))
    return measured


def _name_hidden_regions(run: Path, known: Mapping[str, Any], split: str, where: Mapping[str, Any]) -> Measured:
    """How often the class that a pre-trained model predicts of a hidden region is the detector's, without any text."""
    chosen, predicts = (known["config"].get(name) for name in ("region_masking", "region_losses"))
    if not chosen or not predicts or predicts["classes"] == "none":
        raise RunError(
            f"{run} was not pre-trained to predict the class of hidden regions: its config has no "
            "region_losses.classes. Measure a run that was."
        )
    losses, masking = configs.from_dict(RegionLosses, predicts), configs.from_dict(RegionMasking, chosen)
    opened = open_run(run, split=split, **where)
    encoder, style = opened.encoder, head_styles(opened.saved.model)["region_targets"]
    objective = MaskedRegions(encoder.dims, style, encoder.word_embeddings, losses=losses)
    if load_heads({"masked_regions": objective}, opened.saved):
        raise RunError(f"{opened.saved.path} has no head that predicts hidden regions. Measure the whole run folder.")
    model = PretrainModel(encoder, {"masked_regions": objective}, {"masked_regions": 1.0}, opened.extractor)
    model.to(opened.inputs.device)
    head = cast(RegionTargets, objective.head)
    named = len(opened.class_names) or None  # what a distribution has behind them is the background

    def step(batch: Batch, targets: Targets) -> tuple[Tensor, Tensor]:
        slots, classes = targets.class_slots, targets.region_classes
        assert slots is not None
        assert classes is not None
        described, _ = extract_features(model.extractor, batch)
        encoded = model.encode(described, targets).encoded
        predicted = head.at_slots(encoded.regions, dict.fromkeys(losses.widths, slots))["classes"]
        asked = slots.mask & (classes != IGNORE)
        return ((predicted[..., :named].argmax(-1) == classes) & asked).sum(), asked.sum()

    batches = opened.inputs.loader(
        _Wordless(list(dict.fromkeys(list_images(opened.records))), opened.inputs.tokenizer),
        batch_size=_UNREAD_BATCH,
        training=False,
        region_masking=replace(masking, rate=HIDDEN_SHARE, hide=1.0, random=0.0, labels="chosen"),
        needs=frozenset({"class_slots", "region_classes"}),
    )
    counts = [torch.stack(pair) for pair in engine.predict(step, batches, model=model)]
    right, asked = torch.stack(counts).sum(0).tolist()
    if not asked:
        raise RunError(f"no region of split {split!r} was hidden: it has too few. Measure a larger split.")
    return Measured(value=100 * right / asked, examples=asked)
