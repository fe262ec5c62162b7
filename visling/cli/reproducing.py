"""visling reproduce: claims of the papers, checked on drawn scenes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from visling.cli.options import Device, Json
from visling.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from visling.recipes.claim_configs import Claim
    from visling.runs.reproduce import Power, Reproduction


def reproduce(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="CLAIM...",
            help="Names of claims, as `visling reproduce list` shows them; `all`; or TOML files with claims of your "
            "own (docs/claims.md).",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write, reproduced/SIZE by default; claims share its runs."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Seeds, from 0 on; by default those of the claim. More may be added."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="MINUTES",
            help="Stop after this time; the same command continues. A claim that needs more seeds than fit is not "
            "begun, unless --seeds asks for it.",
        ),
    ] = None,
    size: Annotated[
        Literal["tiny", "small"],
        typer.Option(help="How much is drawn and how long is trained; tiny only shows that it runs."),
    ] = "small",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Runs in parallel, each on one thread; one per core by default."),
    ] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Check what a paper claims: train arms that differ in one thing, over several seeds, and give a verdict by a rule
    that was fixed beforehand.

    Stopped runs are resumed, finished ones are kept, and claims share those that they have in common.

    Example: visling reproduce list

    Example: visling reproduce visualbert-captions --budget 30
    """
    from visling import runtime
    from visling.analysis.claim_page import write_claim
    from visling.analysis.claim_table import write_table
    from visling.recipes.claims import CLAIMS
    from visling.runs.reproduce import Reproduction, describe_plan, read_result

    out = out or Path("reproduced") / size
    listed = names == ["list"]
    claims = list(CLAIMS.values()) if names in (["list"], ["all"]) else [_find_claim(name, CLAIMS) for name in names]
    place = Reproduction(out, size=size, device=device, jobs=jobs or os.cpu_count() or 1)
    if listed:
        _print_list(claims, place, seeds, budget, json_=json_)
        return
    runtime.limit_threads(1)

    def report_progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results = place.run(claims, seeds=seeds, budget=budget, stream=sys.stderr, progress=report_progress)
    for claim in claims:
        write_claim(out / "claims" / claim.name)
    known = {claim.name: claim for claim in (*CLAIMS.values(), *claims)}
    write_table(
        out, [read_result(out, name) or describe_plan(claim, place.estimate(claim)) for name, claim in known.items()]
    )
    if json_:
        print(json.dumps(results))
        return
    for found in results:
        print(_describe_result(found, out))
    print(f"\nThe table over all claims is in {out / 'claims.md'}.")


def _find_claim(name: str, known: Mapping[str, Claim]) -> Claim:
    """A claim by its name, or from a file of one's own.

    Raises:
        ConfigError: no such claim or file; a file whose claim has the name of another one.
    """
    from visling.recipes.claim_configs import read_claim

    if name in known:
        return known[name]
    if name.endswith(".toml"):
        claim = read_claim(Path(name))
        if claim.name in known:
            raise ConfigError(f"{name}: {claim.name!r} is a claim of this package. Give yours another name.")
        return claim
    raise ConfigError(
        f"no claim {name!r}. {nearest(name, known)} `visling reproduce list` shows all; one of your own is a TOML file."
    )


def _print_list(
    claims: Sequence[Claim], place: Reproduction, seeds: int | None, budget: float | None, *, json_: bool
) -> None:
    """What is claimed, how many seeds would decide it, how long they take, and what was found so far."""
    from visling.runs.reproduce import describe_plan, read_result

    plans = [(claim, place.estimate(claim, seeds, budget)) for claim in claims]
    if json_:
        print(json.dumps([describe_plan(claim, power) for claim, power in plans]))
        return
    paper = ""
    for claim, power in plans:
        if claim.paper != paper:
            paper = claim.paper
            print(f"\n{paper}")
        found = read_result(place.out, claim.name)
        verdict = "" if found is None or found["status"] == "not run" else f"; {found['verdict']}"
        print(f"  {claim.name:<26} {claim.statement}")
        print(f"  {'':<26} {_describe_need(claim, power, seeds, place.jobs)}{verdict}")


def _describe_need(claim: Claim, power: Power, seeds: int | None, jobs: int) -> str:
    """Seeds and minutes of a claim in a few words."""
    count = seeds or claim.seeds
    time = f"{power.minutes / jobs:.0f} minutes"
    if power.spread is None:
        return f"{count} seeds, about {time}"
    needed = "more seeds than any budget has room for" if power.seeds_needed is None else f"{power.seeds_needed} seeds"
    size = next(iter(claim.contrasts.values())).size
    return f"needs {needed} for {size:g} points, about {time}{'' if power.fits else ', above the budget'}"


def _describe_result(found: Mapping[str, Any], out: Path) -> str:
    """A claim's verdict and its contrasts."""
    from visling.runs.verdicts import MOST_SEEDS

    claim, power = found["claim"], found["power"]
    if found["status"] == "not run":
        if power["fits"]:
            return f"\n{claim['name']}: not begun, the time is over. The same command continues."
        needed = power["seeds_needed"] or f"more than {MOST_SEEDS:,}"
        minutes = power["minutes"] / found["jobs"]
        return (
            f"\n{claim['name']}: not run. To decide it takes {needed} seeds, about {minutes:.0f} minutes, which is "
            "more than the budget: raise --budget, or run fewer with --seeds N."
        )
    lines = [f"\n{claim['name']}: {found['verdict']}. {claim['statement']}"]
    for name, contrast in found["contrasts"].items():
        values = f"{len(contrast['values'])} seeds"
        if contrast["low"] is None:
            lines.append(f"  {name}: {values}, no interval")
        else:
            lines.append(
                f"  {name}: {contrast['mean']:+.1f} points ({contrast['low']:+.1f} to {contrast['high']:+.1f}), "
                f"{values}: {contrast['verdict']}"
            )
    if found["status"] == "running":
        lines.append("  Not finished: the same command continues.")
    return "\n".join([*lines, f"  {out / 'claims' / claim['name'] / 'claim.html'}"])
