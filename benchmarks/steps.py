"""A training step of visling against those of peers: agreement, seconds in turn, ratios, efficiency, and the page."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from drawn_data import describe_batches
from measuring import (
    TOLERANCE,
    Rate,
    Trained,
    add_options,
    begin,
    check_agreement,
    circumstances,
    claim,
    compare,
    describe,
    finish,
    in_turn,
    load_averages,
    require_agreement,
    stem_of,
    write_result,
)
from sides import Answering, Pretraining

from visling import runtime
from visling.types import Batch, Targets

EFFICIENCY = {"fp32": 0.75, "bf16": 0.45}
"""Least that is wanted of a training step, by precision."""
SMALL = 8
"""Rows of the batches on which the sides must agree and warm up."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A way to compute the same step; several of them may train the same module on batches in different form."""

    name: str
    """As the table names it."""
    trained: Trained
    feed: Callable[[Batch, Targets], Any]
    target: float | None = None
    """Least wanted ratio of its time to visling's; None = none was set."""


def compare_steps(
    work: str,
    ours: Pretraining | Answering,
    peers: Sequence[Peer],
    options: argparse.Namespace,
    device: torch.device,
    *,
    efficiency: float,
) -> dict[str, Any]:
    """Agreement, times, ratios and efficiency of one family.

    Args:
        work: as the table names it.
        efficiency: least that is wanted.
    """
    mine = Trained(ours, device, options.precision)
    agreement = _agree(mine, ours, peers, options, device)
    warmup = ours.draw(min(SMALL, options.batch_size), max(options.warmup, 1), device)[: options.warmup]
    batches = [*warmup, *ours.draw(options.batch_size, options.pairs, device)]
    fed = {"visling": [ours.feed(*batch) for batch in batches]}
    fed |= {peer.name: [peer.feed(*batch) for batch in batches] for peer in peers}
    for trained in (mine, *(peer.trained for peer in peers)):
        trained.side.module.train()

    def step(trained: Trained, inputs: Sequence[Any], number: int) -> None:
        trained.update(inputs[number])

    works: Mapping[str, Callable[[int], object]] = {
        "visling": partial(step, mine, fed["visling"]),
        **{peer.name: partial(step, peer.trained, fed[peer.name]) for peer in peers},
    }
    with Rate(device, options.precision, options.product_size) as rate:
        seconds = in_turn(works, pairs=options.pairs, warmup=options.warmup, device=device)
    needed = [ours.needed(*batch).step.total for batch in batches[options.warmup :]]
    found = compare(seconds)
    reached = rate.efficiency(needed, seconds["visling"])
    claims = []
    if at_base_size(options):
        claims = [
            claim(work, f"ratio to {peer.name}", found["ratio"][peer.name]["median"], peer.target)
            for peer in peers
            if peer.target is not None
        ]
        claims.append(claim(work, "efficiency", reached["median"], efficiency))
    print(f"{work}: ratios { {name: round(ratio['median'], 2) for name, ratio in found['ratio'].items()} }", flush=True)
    return {
        "work": work,
        "config": dataclasses.asdict(ours.module.encoder.config),
        "parameters": sum(p.numel() for p in ours.module.parameters()),
        "agreement": agreement,
        "batches": describe_batches([batch for batch, _ in batches[options.warmup :]]),
        **found,
        "needed_gflop": [value / 1e9 for value in needed],
        "product_tflops": rate.described(),
        "efficiency": reached,
        "claims": claims,
    }


def _agree(
    mine: Trained,
    ours: Pretraining | Answering,
    peers: Sequence[Peer],
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """What all sides agree on: an update of every module, and the loss of the batch in every other form."""
    (batch,) = ours.draw(min(SMALL, options.batch_size), 1, device)
    modules = {id(peer.trained): peer for peer in reversed(peers)}
    sides = {"visling": mine, **{peer.name: peer.trained for peer in modules.values()}}
    fed = {"visling": ours.feed(*batch), **{peer.name: peer.feed(*batch) for peer in modules.values()}}
    precision = runtime.resolve(options.precision, device)
    agreement = check_agreement(sides, fed, precision)
    forms = {"visling": float(mine.loss(fed["visling"]).detach())}
    with torch.no_grad():
        forms |= {peer.name: float(peer.trained.loss(peer.feed(*batch))) for peer in peers}
    require_agreement("loss in every form", forms, TOLERANCE[precision]["loss after one update"])
    return {**agreement, "loss in every form": forms}


def run_families(
    name: str,
    title: str,
    introduction: str,
    families: Sequence[str],
    measure: Callable[[str, argparse.Namespace, torch.device], dict[str, Any]],
    arguments: Sequence[str] | None,
    *,
    pairs: int,
) -> None:
    """A whole script: options, the families one after the other, the dated result.

    Args:
        families: all that can be measured.
        measure: one of them.
        pairs: timed rounds, if not told otherwise.
    """
    parser = argparse.ArgumentParser(description=f"{title}: seconds, ratios and efficiency.")
    parser.add_argument("--models", nargs="+", choices=sorted(families), default=[*families], help="families")
    add_options(parser, pairs=pairs)
    options = parser.parse_args(arguments)
    device, load_before, found = begin(options), load_averages(), []
    for model in options.models:
        found.append(measure(model, options, device))
        gc.collect()
    claims = [each for one in found for each in one["claims"]]
    result = finish(name, options, device, load_before, comparisons=found, claims=claims)
    stem = stem_of(name, options, device, "+".join(options.models))
    print(write_result(options.out, stem, result, page(title, introduction, result)))


def at_base_size(options: argparse.Namespace) -> bool:
    """Whether a run is one that the targets speak of: models of base size, random batches of 32, on a CPU."""
    return options.preset is None and options.layers is None and options.device == "cpu"


def page(title: str, introduction: str, result: Mapping[str, Any]) -> str:
    """The result for readers."""
    return "\n".join(_lines(title, introduction, result)) + "\n"


def _lines(title: str, introduction: str, result: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {title}, {result['date']}"
    yield ""
    yield introduction
    yield ""
    yield (
        "Seconds and ratios: median (smallest to largest). Ratio: the other's time over visling's, pair by pair; above "
        "1 visling is faster. Efficiency: operations of the products that real positions which are read need, over "
        "time times the rate of a plain product."
    )
    yield ""
    for one in result["comparisons"]:
        batches = one["batches"]
        yield f"## {one['work']}"
        yield ""
        yield "| | seconds | ratio |"
        yield "|---|---|---|"
        for name, seconds in one["seconds"].items():
            ratio = describe(one["ratio"][name]) if name in one["ratio"] else ""
            yield f"| {name} | {describe(seconds, '.3f')} | {ratio} |"
        yield ""
        needed = one["needed_gflop"]
        yield (
            f"Efficiency {describe(one['efficiency'])}: {sum(needed) / len(needed):,.0f} GFLOP needed, plain products "
            f"at {one['product_tflops']['before']:.3f} TFLOP/s before and {one['product_tflops']['after']:.3f} after. "
            f"Batches: {batches['tokens_per_row']['mean']:.1f} tokens ({batches['tokens_per_row']['min']} to "
            f"{batches['tokens_per_row']['max']}) and {batches['regions_per_image']['mean']:.1f} regions "
            f"({batches['regions_per_image']['min']} to {batches['regions_per_image']['max']}) a row, "
            f"{batches['padding_share']:.0%} padding. {one['parameters'] / 1e6:.1f} million parameters."
        )
        yield ""
        for what, values in one["agreement"].items():
            yield f"- {what}: " + "; ".join(f"{name} {value:.6g}" for name, value in values.items())
        yield ""
    yield from circumstances(result)
