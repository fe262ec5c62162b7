"""One pre-training step of VisualBERT, here and in transformers, timed in turn.

    # Two configurations, about two minutes on two cores:
    python benchmarks/training_step.py --out benchmarks/results
    # The released size, a long run:
    python benchmarks/training_step.py --out benchmarks/results --case release

A step is forward, loss, backward and AdamW update. Both sides get the same weights (copied through the key map), the
same batches and labels, the same optimiser settings, precision and threads, and run as A B A B ..., each pair on a
batch of its own. Before anything is timed both losses must agree, and agree again after one update.

What is compared: transformers' `VisualBertForPreTraining` predicts the vocabulary at every text and region position, as
the release does; visling predicts it at the masked positions only, with the same loss. That is the claimed difference.
So that readers see where the time goes, everything is also timed without the vocabulary head (encoder only) and without
dropout.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from visling import runtime
from visling.data.annotations.captions import CaptionRecord
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.captions import CaptionPairs
from visling.data.text import TextLayout, Tokenizer
from visling.models import head_styles
from visling.models.visualbert import SPEC, VisualBert, VisualBertConfig, inputs
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.matching import Matching
from visling.objectives.pretrain_model import PretrainModel
from visling.types import IGNORE, Batch, RegionArray, Targets

SEED = 0
CAPTION_PIECES = (12.0, 3.0, 6)
"""Mean, standard deviation and least number of word pieces of a drawn caption; COCO's average about twelve."""
CAPTIONS_PER_IMAGE = 5
FEWEST_REGIONS = 10
"""Bottom-up features hold 10 to 100 boxes per image; drawn images hold 10 to the case's number."""
DROPOUT = 0.1
"""On states and on attention probabilities, as released."""
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 2e-2)}
"""Largest relative difference of the two losses, before and after one update."""
ADAMW: Mapping[str, Any] = {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "fused": True}

Work = Literal["step", "encoder"]
Lengths = Literal["varied", "full"]
Sides = Literal["visling", "transformers"]
MEASUREMENTS: tuple[tuple[str, Work, bool], ...] = (
    ("whole step", "step", True),
    ("whole step, no dropout", "step", False),
    ("encoder only", "encoder", True),
    ("encoder only, no dropout", "encoder", False),
)
"""Name, what is computed, and whether dropout is on."""

ROWS: Mapping[Lengths, str] = {
    "varied": (
        "Rows are pairs of captions of random words (normal, mean 12 word pieces, deviation 3, at least 6), batched "
        "with others of similar length by visling's loader and padded to the longest of their batch; images have 10 "
        "to the case's number of regions, evenly drawn, padded likewise. Each pair of steps has a batch of its own, "
        "so the spread of the times includes that of the lengths."
    ),
    "full": (
        "All rows are as long as the case allows and all images have its full number of regions: there is "
        "practically no padding."
    ),
}
"""How the rows of a batch are drawn."""

NOT_CLAIMED = (
    "Nothing is claimed about other sizes, batches, devices or machines. With few layers the "
    "vocabulary head is a larger share of a step than with twelve: the whole-step ratios of small and base2 flatter "
    "visling against that of the released size (`--case release`).",
    ("Nothing is claimed about accuracy or convergence: both sides compute the same loss (checked)."),
    (
        "Reading data is not part of a step; see store.py. Words and region features are drawn at random; their "
        "lengths are as described."
    ),
    "The transformers class is used as its documentation shows. A user who gathers the masked positions before "
    "calling its head saves most of that head's cost; 'encoder only' shows what would remain. torch.compile is used "
    "on neither side.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a model and of its batches."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    feature_size: int
    batch_size: int
    tokens: int
    """Longest text row; longer pairs are cut."""
    regions: int
    """Most regions of an image."""


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="small",
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            intermediate_size=512,
            feature_size=256,
            batch_size=32,
            tokens=64,
            regions=36,
        ),
        Case(
            name="base2",
            hidden_size=768,
            num_layers=2,
            num_heads=12,
            intermediate_size=3072,
            feature_size=2048,
            batch_size=8,
            tokens=128,
            regions=36,
        ),
        Case(
            name="release",
            hidden_size=768,
            num_layers=12,
            num_heads=12,
            intermediate_size=3072,
            feature_size=2048,
            batch_size=48,
            tokens=128,
            regions=100,
        ),
    )
}
"""small: the width of the scenes preset. base2: BERT-base width, two layers. release: VisualBERT's COCO phase in its
VQA configuration."""


class Side(Protocol):
    """One of the two implementations."""

    module: nn.Module

    def feed(self, batch: Batch, targets: Targets) -> Any:
        """The batch in this side's form; not timed."""

    def loss(self, fed: Any) -> Tensor:
        """Masked language modelling plus matching."""

    def probe(self, fed: Any) -> Tensor:
        """A number into which every real state enters, without any head."""


class Visling:
    """Our encoder with its two objectives, as `visling pretrain` runs them; their accuracies are computed too."""

    def __init__(self, case: Case, device: torch.device) -> None:
        encoder = VisualBert(config_of(case))
        styles = head_styles("visualbert")
        self.vocabulary = MaskedLM(encoder.dims, styles["vocabulary"], encoder.word_embeddings)
        self.matching = Matching(encoder.dims, styles["matching"], encoder.word_embeddings)
        self.encoder = encoder
        self.module: nn.Module = PretrainModel(
            encoder, {"masked_lm": self.vocabulary, "matching": self.matching}, {"masked_lm": 1.0, "matching": 1.0}
        ).to(device)
        self.direction = direction(case, device)

    def load(self, released: Mapping[str, Tensor]) -> None:
        """Copy weights of the other side, all of them."""
        SPEC.keys["transformers"].load(
            released, {"encoder": self.encoder, "vocabulary": self.vocabulary.head, "matching": self.matching.head}
        )

    def feed(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        return batch, targets

    def loss(self, fed: tuple[Batch, Targets]) -> Tensor:
        value: Tensor = self.module(*fed).value
        return value

    def probe(self, fed: tuple[Batch, Targets]) -> Tensor:
        batch = fed[0]
        assert batch.regions is not None
        encoded = self.encoder(batch)
        states = along(encoded.text, self.direction, batch.text.mask) + along(
            encoded.regions, self.direction, batch.regions.mask
        )
        value: Tensor = states + (encoded.pooled @ self.direction).mean()
        return value


class Peer:
    """transformers' `VisualBertForPreTraining`, the only other maintained implementation."""

    def __init__(self, case: Case, device: torch.device) -> None:
        import transformers  # here, so that the memory of our side is measured without it

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self.module: Any = transformers.VisualBertForPreTraining(
            transformers.VisualBertConfig(
                hidden_size=case.hidden_size,
                visual_embedding_dim=case.feature_size,
                num_hidden_layers=case.num_layers,
                num_attention_heads=case.num_heads,
                intermediate_size=case.intermediate_size,
                hidden_dropout_prob=DROPOUT,
                attention_probs_dropout_prob=DROPOUT,
                pad_token_id=0,  # the default, 1, would freeze the vector of an unused word
            )
        )
        self.module.to(device)  # type: ignore[arg-type]
        self.direction = direction(case, device)

    def feed(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        text, regions = batch.text, batch.regions
        assert regions is not None
        assert targets.token_slots is not None
        assert targets.token_ids is not None
        assert targets.matched is not None
        slots = targets.token_slots
        labels = torch.full(
            (text.ids.shape[0], text.ids.shape[1] + regions.mask.shape[1]), IGNORE, device=text.ids.device
        )
        rows = slots.mask.nonzero()[:, 0]
        labels[rows, slots.at[slots.mask]] = targets.token_ids[slots.mask]
        return {
            "input_ids": text.ids,
            "attention_mask": text.mask.long(),
            "token_type_ids": text.segments,
            "visual_embeds": regions.features,
            "visual_attention_mask": regions.mask.long(),
            "visual_token_type_ids": torch.zeros_like(regions.mask, dtype=torch.int64),
            "labels": labels,
            "sentence_image_labels": targets.matched,
        }

    def loss(self, fed: dict[str, Tensor]) -> Tensor:
        value: Tensor = self.module(**fed).loss
        return value

    def probe(self, fed: dict[str, Tensor]) -> Tensor:
        encoded = self.module.visual_bert(**{name: tensor for name, tensor in fed.items() if "labels" not in name})
        states, tokens = encoded.last_hidden_state, fed["input_ids"].shape[1]
        value: Tensor = (encoded.pooler_output @ self.direction).mean()
        for part, mask in (
            (states[:, :tokens], fed["attention_mask"]),
            (states[:, tokens:], fed["visual_attention_mask"]),
        ):
            value = value + along(part, self.direction, mask.bool())
        return value


SIDES: Mapping[Sides, type[Visling] | type[Peer]] = {"visling": Visling, "transformers": Peer}


def config_of(case: Case) -> VisualBertConfig:
    """Our configuration of a case."""
    return VisualBertConfig(
        hidden_size=case.hidden_size,
        num_layers=case.num_layers,
        num_heads=case.num_heads,
        intermediate_size=case.intermediate_size,
        feature_size=case.feature_size,
        dropout_rate=DROPOUT,
        attention_dropout_rate=DROPOUT,
        max_tokens=case.tokens,
        max_regions=case.regions,
    )


def direction(case: Case, device: torch.device) -> Tensor:
    """A fixed random vector (D,)."""
    return torch.randn(case.hidden_size, generator=torch.Generator().manual_seed(SEED)).to(device)


def along(states: Tensor, vector: Tensor, real: Tensor) -> Tensor:
    """Mean component of real states (B, N, D) along a vector (D,)."""
    mean: Tensor = ((states @ vector) * real).sum() / real.sum()
    return mean


class DrawnStore:
    """Random regions of numbered images, in memory."""

    def __init__(self, num_images: int, case: Case, lengths: Lengths) -> None:
        self.feature_size = case.feature_size
        self.fingerprint = "random"
        counts = np.full(num_images, case.regions)
        if lengths == "varied":
            low = min(FEWEST_REGIONS, case.regions)
            counts = runtime.generator_for(SEED, 1).integers(low, case.regions + 1, num_images)
        self._counts = {image_id(number): int(most) for number, most in enumerate(counts)}

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, image_id: str) -> RegionArray:
        return draw_regions(
            self._counts[image_id], self.feature_size, runtime.generator_for(SEED, 2, int(image_id.rpartition("_")[2]))
        )


def image_id(number: int) -> str:
    """Id of a drawn image."""
    return f"drawn_{number:012d}"


def draw_regions(regions: int, feature_size: int, rng: np.random.Generator) -> RegionArray:
    """Random features in [0, 1) and boxes of an image of 640 x 480 pixels."""
    corner = rng.uniform(0, (500, 350), (regions, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 120, (regions, 2))], axis=1).astype(np.float32)
    return RegionArray(features=rng.random((regions, feature_size), dtype=np.float32), boxes=boxes, size=(640, 480))


def draw_captions(num_images: int, tokenizer: Tokenizer, *, pieces: int | None = None) -> list[CaptionRecord]:
    """Captions of random words, each one piece of the vocabulary.

    Args:
        pieces: length of every caption; None draws it (CAPTION_PIECES).
    """
    rng = runtime.generator_for(SEED, 0)
    words = [word for word in tokenizer.tokens(range(tokenizer.size)) if word.isascii() and word.isalpha()]
    mean, spread, least = CAPTION_PIECES
    records = []
    for number in range(num_images * CAPTIONS_PER_IMAGE):
        length = max(round(rng.normal(mean, spread)), least) if pieces is None else pieces
        caption = " ".join(words[at] for at in rng.integers(len(words), size=length))
        records.append(CaptionRecord(id=str(number), images=(image_id(number // CAPTIONS_PER_IMAGE),), caption=caption))
    return records


def draw_batches(case: Case, lengths: Lengths, number: int, device: torch.device) -> list[tuple[Batch, Targets]]:
    """Batches as pre-training sees them, through our own loader: caption pairs of similar length, 15 % masked, features
    in float32."""
    num_images = max(-(-max(number, 16) * case.batch_size // CAPTIONS_PER_IMAGE), 2)
    spec, tokenizer = inputs(config_of(case)), Tokenizer()
    records = draw_captions(num_images, tokenizer, pieces=None if lengths == "varied" else (case.tokens - 3) // 2)
    loader = Loader(
        CaptionPairs(records, TextLayout(tokenizer, spec)),
        Collator(DrawnStore(num_images, case, lengths), spec, tokenizer, masking=TokenMasking()),
        batch_size=case.batch_size,
        seed=SEED,
        prefetch=0,
    )
    with contextlib.closing(loader.batches_with_index()) as made:  # type: ignore[type-var]
        drawn = list(islice(((batch, targets) for _, batch, targets in made), number))
    return [
        (batch.map(lambda t: t.float() if t.is_floating_point() else t).to(device), targets.to(device))
        for batch, targets in drawn
    ]


def describe_batches(batches: Sequence[tuple[Batch, Targets]]) -> dict[str, Any]:
    """How long the rows are, how much of a batch is padding, and at how many positions the vocabulary is predicted."""
    real_tokens = np.concatenate([batch.text.mask.sum(1).cpu().numpy() for batch, _ in batches])
    regions = [batch.regions for batch, _ in batches if batch.regions is not None]
    real_regions = np.concatenate([each.mask.sum(1).cpu().numpy() for each in regions])
    positions = sum(batch.text.mask.numel() for batch, _ in batches) + sum(each.mask.numel() for each in regions)
    slots = [targets.token_slots for _, targets in batches if targets.token_slots is not None]
    return {
        "batches": len(batches),
        "tokens_per_row": {
            "mean": float(real_tokens.mean()),
            "min": int(real_tokens.min()),
            "max": int(real_tokens.max()),
        },
        "regions_per_row": {
            "mean": float(real_regions.mean()),
            "min": int(real_regions.min()),
            "max": int(real_regions.max()),
        },
        "padding_share": 1 - float(real_tokens.sum() + real_regions.sum()) / positions,
        "positions_per_batch": positions / len(batches),
        "slots_per_batch": sum(each.mask.numel() for each in slots) / len(batches),
        "masked_per_batch": float(sum(each.mask.sum() for each in slots)) / len(batches),
    }


def evaluate(side: Side, fed: Any, work: Work, device: torch.device, precision: runtime.Precision) -> Tensor:
    """Loss of a whole step, or the probe of the encoder alone."""
    with runtime.autocast(device, precision):
        return (side.loss if work == "step" else side.probe)(fed).float()


def update(
    side: Side,
    optimizer: torch.optim.Optimizer,
    fed: Any,
    work: Work,
    device: torch.device,
    precision: runtime.Precision,
) -> None:
    """One step: forward, loss, backward, AdamW."""
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(evaluate(side, fed, work, device, precision))
    optimizer.step()


def timed(
    side: Side,
    optimizer: torch.optim.Optimizer,
    fed: Any,
    work: Work,
    device: torch.device,
    precision: runtime.Precision,
) -> float:
    """Milliseconds of one step."""
    synchronise(device)
    start = time.perf_counter()
    update(side, optimizer, fed, work, device, precision)
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_agreement(
    sides: Mapping[str, tuple[Side, torch.optim.Optimizer]],
    fed: Sequence[Mapping[str, Any]],
    device: torch.device,
    precision: runtime.Precision,
) -> dict[str, dict[str, float]]:
    """Loss and probe of both sides without dropout, before an update and after one.

    Raises:
        SystemExit: they differ by more than the tolerance, or the sides do not have the same number of weights.
    """
    sizes = {name: sum(p.numel() for p in side.module.parameters()) for name, (side, _) in sides.items()}
    if len(set(sizes.values())) > 1:
        raise SystemExit(f"the two models differ in size, nothing is timed: {sizes}")
    found: dict[str, dict[str, float]] = {}
    works: tuple[Work, ...] = ("step", "encoder")
    for moment, tolerance, batch in zip(
        ("before", "after one update"), TOLERANCE[runtime.resolve(precision, device)], fed, strict=False
    ):
        for work in works:
            values = {}
            for name, (side, optimizer) in sides.items():
                side.module.eval()
                if moment != "before" and work == "step":
                    update(side, optimizer, fed[0][name], "step", device, precision)
                with torch.no_grad():
                    values[name] = float(evaluate(side, batch[name], work, device, precision))
            found[f"{'loss' if work == 'step' else 'probe of the encoder'}, {moment}"] = values
            low, high = sorted(values.values())
            if not high - low <= tolerance * max(1.0, abs(high)):
                raise SystemExit(
                    f"the two sides disagree, nothing is timed: {work} {moment}: {values}, tolerance {tolerance:g} "
                    "(relative)"
                )
    return found


def measure(case: Case, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Agreement, timings and memory of one case."""
    runtime.seed_everything(SEED)
    theirs, ours = Peer(case, device), Visling(case, device)
    ours.load(theirs.module.state_dict())
    chosen: dict[str, Side] = {"visling": ours, "transformers": theirs}
    sides = {name: (side, torch.optim.AdamW(side.module.parameters(), **ADAMW)) for name, side in chosen.items()}
    batches = draw_batches(case, options.lengths, max(options.warmup + options.repeats, 2), device)
    fed = [{name: side.feed(*pair) for name, (side, _) in sides.items()} for pair in batches]
    agreement = check_agreement(sides, fed, device, options.precision)
    print(f"{case.name}: losses agree: {agreement['loss, before']}", flush=True)
    measurements = {}
    for name, work, dropout in MEASUREMENTS:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for side, _ in sides.values():
            side.module.train(dropout)
        for number in range(options.warmup + options.repeats):
            for label, (side, optimizer) in sides.items():
                spent = timed(side, optimizer, fed[number][label], work, device, options.precision)
                if number >= options.warmup:
                    times[label].append(spent)
        ratios = [b / a for a, b in zip(times["visling"], times["transformers"], strict=True)]
        measurements[name] = {**{label: summary(values) for label, values in times.items()}, "ratio": summary(ratios)}
        medians = ", ".join(f"{label} {found['median']:.4g}" for label, found in measurements[name].items())
        print(f"{case.name}: {name}: {medians}", flush=True)
    return {
        "case": asdict(case),
        "parameters": sum(p.numel() for p in ours.module.parameters()),
        "agreement": agreement,
        "batches": describe_batches(batches[options.warmup :]),
        "milliseconds": measurements,
        "peak_memory_mib": {label: in_new_process(label, case, options) for label in SIDES},
    }


def in_new_process(label: Sides, case: Case, options: argparse.Namespace) -> float | None:
    """Peak memory of one side alone, in a process of its own: memory that one side has freed would hide the other's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (label, case, options))


def peak_memory(label: Sides, case: Case, options: argparse.Namespace) -> float | None:
    """MiB that model, optimiser and three whole steps with dropout take at most, beyond libraries and batches; None
    where it cannot be measured.

    CPU: resident memory (Linux only). CUDA: what PyTorch allocated.
    """
    device = runtime.pick_device(options.device)
    torch.set_num_threads(options.threads)
    if label == "transformers":
        import transformers

        _ = transformers.VisualBertForPreTraining  # loads the module: its code is no memory of a step
    batches = draw_batches(case, options.lengths, 3, device)
    _load_libraries(device)
    before = resident("VmRSS")
    side = SIDES[label](case, device)
    optimizer = torch.optim.AdamW(side.module.parameters(), **ADAMW)
    side.module.train()
    for pair in batches:
        update(side, optimizer, side.feed(*pair), "step", device, options.precision)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resident("VmHWM")
    return None if before is None or peak is None else peak - before


def _load_libraries(device: torch.device) -> None:
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
        "min": min(values),
        "max": max(values),
        "all": [round(value, 4) for value in values],
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


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    lines = [
        f"# One pre-training step of VisualBERT: visling and transformers, {result['date']}",
        "",
        "Forward, loss, backward and AdamW update, in turn (A B A B ...), same weights, batches, labels, optimiser, "
        "precision and threads. Milliseconds, median (quartiles). Ratio: transformers over visling, pair by pair, "
        "median (smallest to largest); above 1 visling is faster.",
        "",
        "transformers predicts the vocabulary at every position, as the release does; visling at the masked "
        "positions only, with the same loss. 'Encoder only' has no vocabulary or matching head on either side.",
        "",
        ROWS[result["settings"]["lengths"]],
        "",
    ]
    for case in result["cases"]:
        sizes, batches, memory = case["case"], case["batches"], case["peak_memory_mib"]
        lines += [
            (
                f"## {sizes['name']}: hidden {sizes['hidden_size']}, {sizes['num_layers']} layers, batch "
                f"{sizes['batch_size']}"
            ),
            "",
            "| | visling | transformers | ratio |",
            "|---|---|---|---|",
        ]
        for name, found in case["milliseconds"].items():
            ours, theirs = (
                f"{side['median']:.1f} ({side['quartiles'][0]:.1f} to {side['quartiles'][1]:.1f})"
                for side in (found["visling"], found["transformers"])
            )
            ratio = found["ratio"]
            lines.append(
                f"| {name} | {ours} | {theirs} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |"
            )
        told = {side: "not measured" if amount is None else f"{amount:.0f} MiB" for side, amount in memory.items()}
        loss = case["agreement"]["loss, before"]
        lines += [
            f"| peak memory of whole steps | {told['visling']} | {told['transformers']} | |",
            "",
            f"Batches: {batches['tokens_per_row']['mean']:.1f} tokens ({batches['tokens_per_row']['min']} to "
            f"{batches['tokens_per_row']['max']}) and {batches['regions_per_row']['mean']:.1f} regions "
            f"({batches['regions_per_row']['min']} to {batches['regions_per_row']['max']}) per row, "
            f"{batches['padding_share']:.0%} padding. Per batch {batches['positions_per_batch']:.0f} positions, of "
            f"which {batches['masked_per_batch']:.0f} are masked ({batches['slots_per_batch']:.0f} slots). Regions "
            f"of width {sizes['feature_size']}; {case['parameters'] / 1e6:.1f} million parameters on both sides.",
            "",
            (
                f"Loss before timing: visling {loss['visling']:.6f}, transformers {loss['transformers']:.6f}; all "
                "four comparisons are in the JSON file."
            ),
            "",
        ]
    return "\n".join([*lines, *circumstances(result)]) + "\n"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one pre-training step of VisualBERT here and in transformers.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument(
        "--case", nargs="+", choices=CASES, default=["small", "base2"], help="sizes to measure (default: small base2)"
    )
    parser.add_argument("--layers", type=int, help="number of layers, for every case")
    parser.add_argument("--batch-size", type=int, help="rows per batch, for every case")
    parser.add_argument("--tokens", type=int, help="longest text row, for every case")
    parser.add_argument("--regions", type=int, help="most regions per image, for every case")
    parser.add_argument(
        "--lengths",
        choices=["varied", "full"],
        default="varied",
        help="varied: as captions and images have them; full: no padding",
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of matrix products, on both sides"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of both sides (default: PyTorch's choice)"
    )
    parser.add_argument("--warmup", type=int, default=2, help="pairs of steps before timing, for each measurement")
    parser.add_argument("--repeats", type=int, default=8, help="timed pairs of steps, for each measurement")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    device = runtime.pick_device(options.device)
    torch.set_num_threads(options.threads)
    changes = {
        name: value
        for name, value in (
            ("num_layers", options.layers),
            ("batch_size", options.batch_size),
            ("tokens", options.tokens),
            ("regions", options.regions),
        )
        if value is not None
    }
    date, load_before = datetime.date.today().isoformat(), load_averages()
    cases = [measure(replace(CASES[name], **changes), options, device) for name in options.case]
    result = {
        "benchmark": "training_step",
        "date": date,
        "machine": machine(device),
        "versions": versions("visling", "torch", "transformers", "numpy", "tokenizers"),
        "settings": {
            "precision": options.precision,
            "lengths": options.lengths,
            "seed": SEED,
            "warmup": options.warmup,
            "repeats": options.repeats,
            "dropout": DROPOUT,
            "optimiser": "AdamW " + ", ".join(f"{name} {value}" for name, value in ADAMW.items()),
            "attention": (
                "visling: torch scaled_dot_product_attention; transformers: eager, the only one it has for this model"
            ),
        },
        "load_before": load_before,
        "load_after": load_averages(),
        "cases": cases,
        "not_claimed": NOT_CLAIMED,
    }
    changed = [f"{name.replace('_', '-')}-{value}" for name, value in changes.items()] + (
        [] if options.lengths == "varied" else [options.lengths]
    )
    stem = "_".join(
        [
            "training-step",
            date,
            "+".join(options.case),
            *changed,
            device.type,
            options.precision,
            f"{options.threads}-threads",
        ]
    )
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
