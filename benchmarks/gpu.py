"""All five models on one GPU: pre-training, fine-tuning and answering of VQA at base size, in less than eight minutes.

    python benchmarks/gpu.py --out benchmarks/results
    # Everything but the GPU, on a CPU:
    python benchmarks/gpu.py --out benchmarks/results --device cpu --precision fp32 --preset tiny --batch-size 4 \\
        --product-size 64

visling     As a run makes a step: batches of few shapes (`visling.data.batches.shapes`), forward and backward recorded
            as a CUDA graph where they can be (`train.compile = "auto"`), fused AdamW. Where they are recorded, the same
            step operation by operation runs in turn with it.
Peers       transformers for LXMERT and VisualBERT; for ViLBERT, VL-BERT and CVLP the dense padded way over visling's
            modules (`dense_sides.py`; of CVLP the trained network alone, its key network is visling's). Same weights,
            batches, labels, precision and optimiser, in turn (A B A B ...); losses, gradient norms and the losses after
            one update agree before anything is timed.
Utilisation Operations of the products that real positions which are read need, over the time times the rate of one
            product of two 8192 x 8192 matrices, measured before and after.
Waits       Whether the host waited for the device within a step (`torch.cuda.set_sync_debug_mode`).
Feed        Captions a second with 36 regions each, on the device: from a store in the system's cache, and from one
            whose features live on the device.
Time        Before a measurement begins, there must be room for one as long as the longest so far. What there was no
            room for is listed, and so is what failed, with the reason: sides that disagree, too little memory.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pretraining
import torch
import vqa_inference
import vqa_training
from dense_sides import DenseAnswering
from drawn_data import QUESTIONS_PER_IMAGE, describe_batches, draw_captions, draw_regions, image_id
from measuring import (
    Rate,
    Trained,
    add_options,
    begin,
    check_agreement,
    circumstances,
    compare,
    describe,
    finish,
    in_turn,
    load_averages,
    require_equal_outputs,
    stem_of,
    synchronise,
    write_result,
)
from sides import Answering, Pretraining, pretraining_config, share_images, shrink, vqa_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers_sides import LxmertAnswering, VisualBertAnswering

from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.masking import TokenMasking
from visling.data.batches.shapes import give_few_shapes
from visling.data.corpora.captions import SingleCaption
from visling.data.text import TextLayout, Tokenizer
from visling.errors import VislingError
from visling.nn.momentum import DependsOnValues
from visling.objectives.region_contrast import RegionContrast
from visling.recipes.cvlp import cvlp_release
from visling.regions.on_device import FeatureRows, load_features
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.tasks.answers import answer_loss
from visling.train.config import TrainConfig
from visling.train.graphs import CudaRecorder
from visling.train.parallel import Backward, Step, choose_compilation
from visling.train.transfer import move_ahead
from visling.types import Batch, InputSpec, Targets

MODELS = ("lxmert", "visualbert", "vilbert", "vlbert", "cvlp")
SECONDS = 440.0
"""Of the whole run, if not told otherwise."""
AGREEMENT_ROWS = 8
"""Of the batch on which all sides must agree."""
BATCHES = 4
"""Different batches, taken in turn."""
FED_IMAGES = 512
"""Images of the store from which batches are fed: 75 MB."""
MIB = 2**20

Pair = tuple[Batch, Targets]


class Budget:
    """The time that a run has, and what it was spent on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._began, self._longest = seconds, time.monotonic(), 0.0
        self.left_out: dict[str, str] = {}
        """What was not measured, and why."""

    def spend(self, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The result of a measurement; None if there is no room for one as long as the longest so far, or if it
        fails."""
        start, found = time.monotonic(), None
        if start - self._began + self._longest > self.seconds:
            self.left_out[what] = "the time was up"
            return None
        try:
            found = work()
        except (SystemExit, VislingError, torch.OutOfMemoryError) as error:
            self.left_out[what] = str(error)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._longest = max(self._longest, time.monotonic() - start)
        print(f"{time.monotonic() - self._began:5.0f} s  {what}", flush=True)
        return found


class Stepped:
    """visling's step as a run makes it.

    Args:
        optimizer: of the side's weights, which several ways to make a step share.
        recordable: whether it may be recorded.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Step,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        precision: runtime.Precision,
        recordable: bool,
    ) -> None:
        config = TrainConfig(precision=precision)
        variant = (lambda: None) if recordable else None
        self.recorded = choose_compilation(config, device, recordable=recordable) == "graphs"
        self._module, self._optimizer = module, optimizer
        self._backward = Backward(module, step, config, device, variant)

    def update(self, fed: Pair) -> None:
        """Forward, backward, AdamW."""
        self._optimizer.zero_grad(set_to_none=True)
        self._backward(fed, last=True)
        self._backward.finish()
        self._optimizer.step()
        follow(self._module)


def follow(module: nn.Module) -> None:
    """What comes after an update of objectives with networks and queues of their own."""
    after_update = getattr(module, "after_update", None)
    if after_update is not None:
        after_update()


def make_pretraining(model: str, options: argparse.Namespace, device: torch.device) -> Pretraining:
    """visling's side of pre-training; CVLP's key network takes its typical path, and its queue is full."""
    if model != "cvlp":
        return Pretraining(pretraining_config(model, options), device)
    run = cvlp_release()
    encoder = run.encoder if options.preset is None else models.spec(model).presets[options.preset]
    if options.preset is not None:
        settings = {**run.objective_settings["region_contrast"], "queue_size": 1024, "max_regions": encoder.max_regions}
        run = replace(run, objective_settings={**run.objective_settings, "region_contrast": settings})
    ours = Pretraining(replace(run, encoder=shrink(encoder, options.layers)), device)
    for module in ours.module.modules():
        if isinstance(module, RegionContrast):
            rows = module.queue.rows
            real = torch.ones(len(rows), dtype=torch.bool, device=device)
            module.queue.push(F.normalize(torch.randn(rows.shape, device=device), dim=-1), real)
    for module in ours.module.modules():
        if isinstance(module, DependsOnValues):
            module.use_typical_path()
    return ours


def make_answering(model: str, options: argparse.Namespace, device: torch.device) -> Answering:
    """visling's side of VQA."""
    config = vqa_config(model, options) if model != "cvlp" else shrink(
        models.spec(model).presets[options.preset or "base"], options.layers
    )  # fmt: skip
    return Answering(model, config, device)


def measure_pretraining(model: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Steps of a family's recipe."""
    ours = make_pretraining(model, options, device)
    peers = pretraining.make_peers(model, ours, device, options.precision)
    spec = models.spec(model).inputs(ours.config.encoder)
    return measure_steps(ours, ours.module, peers, spec, options, device, recordable=model != "cvlp")


def measure_finetuning(model: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Steps of fine-tuning on VQA."""
    ours = make_answering(model, options, device)
    peers = vqa_training.make_peers(model, ours, device, options.precision)

    def step(batch: Batch, targets: Targets) -> Any:
        assert targets.answer is not None
        return answer_loss(ours.logits(batch), targets.answer, ours.kind)

    return measure_steps(ours, step, peers, ours.spec, options, device, recordable=True)


def measure_steps(
    ours: Pretraining | Answering,
    step: Step,
    peers: Sequence[Any],
    spec: InputSpec,
    options: argparse.Namespace,
    device: torch.device,
    *,
    recordable: bool,
) -> dict[str, Any]:
    """Steps of all sides in turn."""
    side: Any = ours
    mine = Trained(side, device, options.precision)
    agreement = agree(ours, mine, peers, spec, options, device)
    drawn = ours.draw(options.batch_size, BATCHES, torch.device("cpu"))
    rounded = [give_few_shapes(*pair, spec) for pair in drawn]
    fed: dict[str, list[Any]] = {"visling": [to_device(pair, device) for pair in rounded]}
    ways: dict[str, Callable[[Any], None]] = {}
    plain = make_step(ours, step, mine, device, options, recordable=False)
    whole = make_step(ours, step, mine, device, options, recordable=recordable)
    ways["visling"] = whole.update
    if whole.recorded:
        ways["visling, operation by operation"] = plain.update
        fed["visling, operation by operation"] = fed["visling"]
    for peer in peers:
        ways[peer.name] = partial(update_peer, peer.trained)
        fed[peer.name] = [peer.feed(*to_device(pair, device)) for pair in drawn]
    for trained in (mine, *(peer.trained for peer in peers)):
        trained.side.module.train()
    for _ in range(3):  # what is recorded is recorded at the third batch of a shape
        for pair in fed["visling"]:
            whole.update(pair)
    works = {name: partial(run, way, fed[name]) for name, way in ways.items()}
    with Rate(device, options.precision, options.product_size) as rate:
        seconds = in_turn(works, pairs=options.pairs, warmup=max(options.warmup, 1), device=device)
    needed = [ours.needed(*pair).step.total for pair in drawn]
    return {
        **summarise(seconds, needed, rate, options.batch_size, first=max(options.warmup, 1)),
        "agreement": agreement,
        "batches": describe_batches([batch for batch, _ in drawn]),
        "shapes": len({shape_of(pair) for pair in rounded}),
        "recorded": whole.recorded,
        "waits": watch(partial(plain.update, fed["visling"][0]), device),
        "peak_mib": peaks(
            {
                name: partial(plain.update if name == "visling" else way, fed[name][0])
                for name, way in ways.items()
                if name != "visling, operation by operation"
            },
            device,
        ),
    }


def make_step(
    ours: Pretraining | Answering,
    step: Step,
    mine: Trained,
    device: torch.device,
    options: argparse.Namespace,
    *,
    recordable: bool,
) -> Stepped:
    """One way to make visling's step."""
    return Stepped(ours.module, step, mine.optimizer, device, precision=options.precision, recordable=recordable)


def update_peer(trained: Trained, fed: Any) -> None:
    """A step of another side."""
    trained.update(fed)
    follow(trained.side.module)


def run(way: Callable[[Any], object], fed: Sequence[Any], number: int) -> None:
    """A round on a batch of its own, as long as there are some."""
    way(fed[number % len(fed)])


def agree(
    ours: Pretraining | Answering,
    mine: Trained,
    peers: Sequence[Any],
    spec: InputSpec,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """What all sides agree on, visling's being given a batch of rounded sizes."""
    (drawn,) = ours.draw(min(AGREEMENT_ROWS, options.batch_size), 1, torch.device("cpu"))
    once = {id(peer.trained): peer for peer in peers}  # several forms of a batch may go to one module
    sides = {"visling": mine, **{peer.name: peer.trained for peer in once.values()}}
    fed: dict[str, Any] = {"visling": to_device(give_few_shapes(*drawn, spec), device)}
    fed |= {peer.name: peer.feed(*to_device(drawn, device)) for peer in once.values()}
    return check_agreement(sides, fed, runtime.resolve(options.precision, device))


def measure_inference(model: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Answers to five questions about each image: visling is given each image once, the others with each question."""
    ours = make_answering(model, options, device)
    theirs: Any
    if model in ("lxmert", "visualbert"):
        name, theirs = "transformers", (LxmertAnswering if model == "lxmert" else VisualBertAnswering)(ours, device)
    else:
        name, theirs = "dense padded to the longest", DenseAnswering(ours)
    for side in (ours, theirs):
        side.module.eval()
    rows = -(-options.batch_size // QUESTIONS_PER_IMAGE) * QUESTIONS_PER_IMAGE
    drawn = vqa_inference.draw_by_image(ours, rows, BATCHES, torch.device("cpu"))
    shared = [(share_images(batch), targets) for batch, targets in drawn]
    rounded = [give_few_shapes(*pair, ours.spec) for pair in shared]
    fed = [theirs.feed(*to_device(pair, device)) for pair in drawn]
    inputs = {
        "visling": [to_device(pair, device)[0] for pair in rounded],
        name: [given[0] if isinstance(given, tuple) else given for given in fed],
    }

    def answer(side: Any, given: Any) -> Tensor:
        with torch.inference_mode(), runtime.autocast(device, options.precision):
            logits: Tensor = side.logits(given)
        return logits

    ways = {"visling": partial(answer, ours), name: partial(answer, theirs)}
    outputs = {side: way(inputs[side][0]) for side, way in ways.items()}
    difference = require_equal_outputs(outputs, runtime.resolve(options.precision, device))
    works = {side: partial(run, way, inputs[side]) for side, way in ways.items()}
    with Rate(device, options.precision, options.product_size) as rate:
        seconds = in_turn(works, pairs=options.pairs, warmup=max(options.warmup, 1), device=device)
    needed = [ours.needed(*pair).forward.total for pair in shared]
    return {
        **summarise(seconds, needed, rate, rows, first=max(options.warmup, 1)),
        "agreement": {"logits": {"largest difference": difference}},
        "batches": describe_batches([batch for batch, _ in drawn]),
        "shapes": len({shape_of(pair) for pair in rounded}),
        "recorded": False,
        "waits": watch(partial(ways["visling"], inputs["visling"][0]), device),
        "peak_mib": peaks({side: partial(way, inputs[side][0]) for side, way in ways.items()}, device),
    }


def summarise(
    seconds: Mapping[str, Sequence[float]], needed: Sequence[int], rate: Rate, rows: int, *, first: int
) -> dict[str, Any]:
    """Times, ratios, samples a second and utilisation of all sides.

    Args:
        needed: operations of each of the batches that rounds take in turn.
        first: number of the first timed round.
    """
    found = compare(seconds)
    return {
        "rows": rows,
        **found,
        "samples_per_second": {name: rows / each["median"] for name, each in found["seconds"].items()},
        "utilisation": {
            name: rate.efficiency([needed[(first + at) % len(needed)] for at in range(len(spent))], spent)
            for name, spent in seconds.items()
        },
        "needed_gflop": [value / 1e9 for value in needed],
        "product_tflops": rate.described(),
    }


def to_device(pair: Pair, device: torch.device) -> Pair:
    """A batch on the device."""
    return pair[0].to(device), pair[1].to(device)


def shape_of(pair: Pair) -> Any:
    """What a recording is bound to."""
    leaves, structure = pytree.tree_flatten(pair)
    return structure, tuple(None if leaf is None else leaf.shape for leaf in leaves)


def watch(work: Callable[[], object], device: torch.device) -> str:
    """Whether the host waits for the device in a piece of work."""
    if device.type != "cuda":
        return "not measured on a CPU"
    return CudaRecorder(device).watch(work)[1] or "no"


def peaks(works: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Memory on the device that each piece of work needs in addition to what is there before, in MiB; on a CPU
    nothing."""
    found: dict[str, float] = {}
    for name, work in works.items() if device.type == "cuda" else ():
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronise(device)
        found[name] = (torch.cuda.max_memory_allocated(device) - before) / MIB
    return found


def measure_feed(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Masked captions with their regions on the device, pairs a second, with nothing else to do: from a store in the
    system's cache, and from one on the device."""
    spec = models.spec("lxmert").inputs(models.spec("lxmert").presets[options.preset or "base"])
    tokenizer = Tokenizer(spec.vocabulary)
    images = FED_IMAGES if options.preset is None else 4 * options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        with StoreWriter(path, feature_size=spec.feature_size, fingerprint="random") as writer:
            for number in range(images):
                rng = runtime.generator_for(0, 5, number)
                writer.add(image_id(number), draw_regions(spec.max_regions, spec.feature_size, rng))
        store = NativeStore.open(path)
        captions = draw_captions(images, tokenizer)
        source = SingleCaption(captions, TextLayout(tokenizer, spec), false_caption_ratio=0.5)
        rates: dict[str, list[float]] = {}
        table = load_features(store, device)
        for place in ("host", "device"):
            shown = store if place == "host" else FeatureRows(store)
            collator = Collator(shown, spec, tokenizer, masking=TokenMasking(), few_shapes=True)
            loader = Loader(
                source, collator, batch_size=options.batch_size, seed=0, bucket=1, pin=device.type == "cuda"
            )
            rates[place] = []
            for epoch in range(3):  # in the first the store comes into the cache
                loader.epoch, pairs, start = epoch, 0, time.perf_counter()
                for batch, targets in move_ahead(loader, device):
                    if place == "device":
                        table.fill(batch, targets)
                    pairs += len(batch.text.ids)
                synchronise(device)
                rates[place].append(pairs / (time.perf_counter() - start))
    return {
        "pairs_per_second": {place: values[1:] for place, values in rates.items()},
        "pairs": len(captions),
        "regions": spec.max_regions,
    }


MEASURES: Mapping[str, Callable[[str, argparse.Namespace, torch.device], dict[str, Any]]] = {
    "pre-training": measure_pretraining,
    "VQA fine-tuning": measure_finetuning,
    "VQA inference": measure_inference,
}


def page(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"# Five models on one device, {result['date']}"
    yield ""
    yield (
        "Samples a second and utilisation are medians of rounds in turn; ratio: the other's time over visling's, pair "
        "by pair. Utilisation: operations of the products that real positions which are read need, over time times the "
        "rate of a plain product. Memory: beyond weights, moments and batches, at the peak of a step. Shapes: of "
        f"{BATCHES} batches."
    )
    yield ""
    yield "| model | work | side | samples/s | utilisation | ratio | memory, MiB | waits | shapes |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in result["measurements"]:
        for name, samples in one["samples_per_second"].items():
            ours = name == "visling"
            memory = one["peak_mib"].get(name)
            cells = [
                one["model"],
                one["work"],
                name + (" (recorded)" if ours and one["recorded"] else ""),
                f"{samples:,.1f}",
                f"{one['utilisation'][name]['median']:.3f}",
                "" if ours else describe(one["ratio"][name]),
                "" if memory is None else f"{memory:,.0f}",
                one["waits"] if ours else "",
                str(one["shapes"]) if ours else "",
            ]
            yield f"| {' | '.join(cells)} |"
    yield ""
    for one in result["measurements"]:
        batches, needed = one["batches"], one["needed_gflop"]
        agreed = "; ".join(
            f"{what}: " + ", ".join(f"{name} {value:.6g}" for name, value in values.items())
            for what, values in one["agreement"].items()
        )
        yield (
            f"- {one['model']}, {one['work']}: {one['rows']} rows of {batches['tokens_per_row']['mean']:.1f} tokens "
            f"and {batches['regions_per_image']['mean']:.1f} regions, {batches['padding_share']:.0%} padding; "
            f"{sum(needed) / len(needed):,.1f} GFLOP needed; plain products at {one['product_tflops']['before']:.4g} "
            f"TFLOP/s before and {one['product_tflops']['after']:.4g} after. {agreed}."
        )
    if (feed := result["feed"]) is not None:
        rates = "; ".join(
            f"store on the {place} " + " and ".join(f"{rate:,.0f}" for rate in values)
            for place, values in feed["pairs_per_second"].items()
        )
        yield f"- Feed, pairs a second with {feed['regions']} regions each: {rates}."
    for what, why in result["left_out"].items():
        yield f"- Not measured: {what}: {why}"
    yield ""
    yield from circumstances(result)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time all five models on one GPU.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="families")
    parser.add_argument("--works", nargs="+", choices=[*MEASURES], default=[*MEASURES], help="what is timed")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of the whole run")
    add_options(parser, pairs=5)
    parser.set_defaults(device="cuda", precision="bf16", batch_size=128, product_size=8192)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    budget, device, load_before = Budget(options.seconds), begin(options), load_averages()
    measurements = []
    for model in options.models:
        for work in options.works:
            found = budget.spend(f"{model}, {work}", partial(MEASURES[work], model, options, device))
            if found is not None:
                measurements.append({"model": model, "work": work, **found})
    feed = budget.spend("feed", partial(measure_feed, options, device))
    result = finish("gpu", options, device, load_before, measurements=measurements, feed=feed, left_out=budget.left_out)
    print(write_result(options.out, stem_of("gpu", options, device), result, page(result)))


if __name__ == "__main__":
    main()
