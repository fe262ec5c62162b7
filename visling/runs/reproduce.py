"""Claims of the papers, checked on drawn scenes: arms that differ in one thing, several seeds, a verdict.

    OUT/reproduce.json         how large everything in the folder is
    OUT/worlds/, OUT/runs/     what all claims share (`runs/worlds.py`, `runs/claim_runs.py`)
    OUT/claims/NAME/claim.json plan and results of a claim, rewritten whenever a run ends

The same command continues what was stopped, and adds seeds.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from visling import config as configs
from visling import damage, runtime
from visling.errors import ConfigError, RunError
from visling.recipes.claim_configs import FEWEST_SEEDS, Claim
from visling.runs.claim_runs import ClaimRun, PlacedArm, find_world, place_arm, plan_runs
from visling.runs.demo import end_stages
from visling.runs.jobs import PlacedTraining, carry_out, read_status
from visling.runs.verdicts import MOST_SEEDS, Verdict, count_seeds, find_interval, join_verdicts, judge, spread
from visling.runs.worlds import SIZES, Worlds
from visling.runtime import versions
from visling.train import log
from visling.train.claim import hold_alone
from visling.train.disk import explain_failure, write_json
from visling.train.state import RunFolder

FILE = "claim.json"
FOLDER_FILE = "reproduce.json"

FORMAT = 1
"""Version of the layout of both."""

CURVES = ("masked_lm_accuracy",)
"""Parts of the training loss that are drawn, in addition to what is measured and to the validation score of tasks."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """What seeds can decide, estimated before anything is run."""

    spread: float | None
    """Standard deviation over seeds of the first contrast, percentage points; None = unknown."""
    source: str
    """Where it comes from."""
    seeds_needed: int | None
    """To decide a difference of the size that the claim names; None = unknown, or more than any budget has room for."""
    minutes: float
    """Of one core, for so many seeds, or for the claim's own number if that is unknown; runs that are already there are
    not counted."""
    fits: bool
    """Whether that is within the budget."""


class Reproduction:
    """The claims in a folder.

    Args:
        size: a key of `SIZES`.
        jobs: runs at a time, each in a process of its own with one thread.
    Raises:
        RunError: the folder holds something else, or runs of another size.
    """

    def __init__(self, out: Path, *, size: str = "small", device: str = "auto", jobs: int = 1) -> None:
        self.out, self.size, self.jobs = out, size, jobs
        self.device = str(runtime.pick_device(device))
        self.worlds = Worlds(out, SIZES[size], self.device)
        found = _read_json(out / FOLDER_FILE)
        if found is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"{out} holds other files than those of visling reproduce. Use a new folder.")
        if found is not None and found.get("size") != size:
            raise RunError(
                f"{out} holds runs of size {found.get('size')}; found --size {size}. Use the same size, or another "
                "--out."
            )

    def estimate(self, claim: Claim, seeds: int | None = None, budget: float | None = None) -> Power:
        """How many seeds a claim needs, and how long they take, before it is run.

        Args:
            seeds: as asked for; None = as many as are needed.
            budget: minutes of wall clock; None = those of the claim's own number of seeds.
        """
        deviation, source = self._find_spread(claim)
        size = next(iter(claim.contrasts.values())).size
        needed = None if deviation is None else count_seeds(deviation, size)
        planned = range(seeds or (claim.seeds if deviation is None or needed is None else needed))
        minutes = claim.minutes * self._count_missing(claim, planned)
        room = claim.minutes * claim.seeds if budget is None else budget * self.jobs
        enough = seeds is not None or deviation is None or needed is not None
        return Power(
            spread=deviation,
            source=source,
            seeds_needed=needed,
            minutes=minutes,
            fits=enough and minutes <= room + 1e-9,
        )

    def run(
        self,
        claims: Sequence[Claim],
        *,
        seeds: int | None = None,
        budget: float | None = None,
        stream: TextIO | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Train and measure what is missing of the claims, one after the other.

        Args:
            seeds: of each, from 0 on; None = the claim's own number.
            budget: minutes of wall clock for all of them. A claim whose needed seeds do not fit is not begun, unless
                `seeds` are asked for; what is under way when they are over is saved.
            progress: called with a line of text when a run has ended and its claim.json is updated.
        Returns:
            Contents of each claim.json.
        Raises:
            ConfigError, DataError, StoreError, RunError: see their messages, among them that another process uses the
                folder; no claim is begun before all have been checked.
        """
        for claim in claims:
            if seeds is not None and seeds < 1:
                raise ConfigError(f"a claim needs 1 seed or more; found {seeds}.")
            plan_runs(claim, range(1), self.out, self.worlds)
        self._claim_folder()
        until = None if budget is None else time.monotonic() + 60 * budget
        results, stopped = [], False
        with hold_alone(self.out):
            for claim in claims:
                rest = None if until is None else max(0.0, until - time.monotonic())
                power = self.estimate(claim, seeds, None if rest is None else rest / 60)
                begun = not stopped and (power.fits or seeds is not None or budget is None)
                planned = range(seeds or claim.seeds)
                runs = plan_runs(claim, planned, self.out, self.worlds)
                if all(read_status(run.folder) == "finished" for run in runs):
                    power = self._read_power(claim) or power
                if begun and rest != 0.0 and not all(run.ended for run in runs):
                    if progress is not None:
                        progress(f"{claim.name}: {_describe_power(claim, power, len(planned))}")
                    stopped = not self._carry_out(claim, planned, power, rest, stream, progress)
                results.append(self.collect(claim, planned, power))
        return results

    def collect(self, claim: Claim, planned: Iterable[int], power: Power) -> dict[str, Any]:
        """Write claim.json from what the runs have left, and return it."""
        planned = list(planned)
        arms = {name: [place_arm(claim, name, seed, self.out, self.worlds) for seed in planned] for name in claim.arms}
        values = {
            name: {
                seed: float(result["value"])
                for seed, arm in zip(planned, placed, strict=True)
                if (result := arm.result) is not None
            }
            for name, placed in arms.items()
        }
        contrasts = {name: self._measure_contrast(claim, name, values) for name in claim.contrasts}
        measured = [seed for seed in planned if all(seed in of_arm for of_arm in values.values())]
        any_begun = any(map(len, values.values()))
        verdicts: list[Verdict] = [contrast["verdict"] for contrast in contrasts.values()]
        trained = {run.folder: run for placed in arms.values() for arm in placed for run in arm.runs}
        found = {
            "format": FORMAT,
            "claim": configs.to_dict(claim),
            "status": "finished" if measured == planned else "running" if any_begun else "not run",
            "size": self.size,
            "planned_seeds": len(planned),
            "versions": versions(),
            "device": self.device,
            "jobs": self.jobs,
            "machine": _describe_machine(trained.values()),
            "arms": {name: self._describe_arm(placed, values[name]) for name, placed in arms.items()},
            "contrasts": contrasts,
            "verdict": join_verdicts(verdicts),
            "power": configs.to_dict(power),
            "minutes": sum(filter(None, map(_count_minutes, trained.values()))) if any_begun else None,
            "curves": _collect_curves(claim, arms),
        }
        folder = self.out / "claims" / claim.name
        with explain_failure(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, found)
        return found

    def _carry_out(
        self,
        claim: Claim,
        planned: Sequence[int],
        power: Power,
        seconds: float | None,
        stream: TextIO | None,
        progress: Callable[[str], None] | None,
    ) -> bool:
        """Prepare the worlds of a claim and carry out its runs; False if it was asked to end, or time was over."""
        begun = time.monotonic()
        names = dict.fromkeys(training.world for arm in claim.arms.values() for training in arm.trainings)
        with end_stages() as interruption:
            for name in (*names, *(arm.measured_in for arm in claim.arms.values() if arm.measured_in)):
                self.worlds.prepare(find_world(claim, name))
        if interruption.asked == "interrupted":
            raise KeyboardInterrupt
        if interruption.asked:
            return False
        runs = plan_runs(claim, planned, self.out, self.worlds)

        def note(run: ClaimRun) -> None:
            self.collect(claim, planned, power)
            if progress is not None:
                progress(f"{sum(one.ended for one in runs)} of {len(runs)}: {run}")

        rest = None if seconds is None else max(0.0, seconds - (time.monotonic() - begun))
        return carry_out([run for run in runs if not run.ended], self.jobs, stream, note, seconds=rest)

    def _measure_contrast(self, claim: Claim, name: str, values: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
        """A contrast seed by seed, its interval and verdict."""
        contrast = claim.contrasts[name]
        needed = [values[arm] for arm, factor in contrast.weights.items() if factor]
        seeds = [seed for seed in needed[0] if all(seed in of_arm for of_arm in needed)]
        sums = {
            seed: sum(factor * values[arm][seed] for arm, factor in contrast.weights.items() if factor)
            for seed in seeds
        }
        interval = find_interval(list(sums.values()))
        about = spread(sums)
        return {
            **about,
            "low": None if interval is None else interval.low,
            "high": None if interval is None else interval.high,
            "expected": contrast.expected,
            "size": contrast.size,
            "verdict": "undecided" if self.size == "tiny" else judge(contrast, list(sums.values())),
            "seeds_needed": None if about["spread"] is None else count_seeds(about["spread"], contrast.size),
        }

    def _describe_arm(self, placed: Sequence[PlacedArm], values: Mapping[int, float]) -> dict[str, Any]:
        minutes = [sum(filter(None, map(_count_minutes, arm.runs))) for arm in placed if arm.result is not None]
        examples = next((arm.result["examples"] for arm in placed if arm.result is not None), None)
        return {
            **spread(values),
            "minutes": sum(minutes) / len(minutes) if minutes else None,
            "updates": [_count_updates(run) for run in placed[0].runs],
            "examples": examples,
            "runs": [[str(run.folder.relative_to(self.out)) for run in arm.runs] for arm in placed],
            "commands": [run.command for run in placed[0].runs],
        }

    def _find_spread(self, claim: Claim) -> tuple[float | None, str]:
        """Standard deviation over seeds of the first contrast: from runs in this folder, else what the claim knows."""
        earlier = _read_json(self.out / "claims" / claim.name / FILE)
        if earlier is not None and self.size != "tiny":
            contrast: dict[str, Any] = next(iter(earlier.get("contrasts", {}).values()), {})
            if len(contrast.get("values", {})) >= FEWEST_SEEDS and contrast.get("spread"):
                return float(
                    contrast["spread"]
                ), f"{len(contrast['values'])} seeds in {self.out / 'claims' / claim.name}"
        if claim.spread is not None:
            return claim.spread, "earlier runs of the same kind, as the claim says"
        return None, "no earlier run"

    def _read_power(self, claim: Claim) -> Power | None:
        """The estimate that was made before the last run of a claim."""
        earlier = _read_json(self.out / "claims" / claim.name / FILE)
        return None if earlier is None else configs.from_dict(Power, earlier["power"])

    def _count_missing(self, claim: Claim, seeds: Sequence[int]) -> float:
        """Seeds' worth of runs that have not ended; of more seeds than the claim has, all are missing."""
        begun = seeds[: claim.seeds]
        runs = plan_runs(claim, begun, self.out, self.worlds)
        return len(begun) * sum(not run.ended for run in runs) / len(runs) + len(seeds) - len(begun)

    def _claim_folder(self) -> None:
        with explain_failure(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / FOLDER_FILE, {"format": FORMAT, "size": self.size})


def describe_plan(claim: Claim, power: Power) -> dict[str, Any]:
    """What stands in the table for a claim that has not been run."""
    return {"claim": configs.to_dict(claim), "status": "not run", "power": configs.to_dict(power)}


def _describe_power(claim: Claim, power: Power, planned: int) -> str:
    """What so many seeds can be expected to decide, in a sentence."""
    size = next(iter(claim.contrasts.values())).size
    if power.spread is None:
        return f"how many seeds decide {size:g} points is not known before some have run; {planned} are planned"
    needed = f"more than {MOST_SEEDS:,}" if power.seeds_needed is None else str(power.seeds_needed)
    return (
        f"it takes {needed} seeds to decide {size:g} points at a spread of {power.spread:.1f} ({power.source}); "
        f"{planned} are planned"
    )


def read_result(out: Path, name: str) -> dict[str, Any] | None:
    """Contents of a claim's claim.json; None if it has never been begun.

    Raises:
        RunError: it cannot be read.
    """
    return _read_json(out / "claims" / name / FILE)


# What runs have left


def _count_minutes(run: PlacedTraining) -> float | None:
    """Minutes of training, validation included; None if it has not finished."""
    if read_status(run.folder) != "finished":
        return None
    lines = [line for line in log.read(run.folder / "log.jsonl") if line["kind"] == "train"]
    return float(lines[-1]["seconds"]) / 60 if lines else 0.0


def _count_updates(run: PlacedTraining) -> int | None:
    if read_status(run.folder) != "finished":
        return None
    return max((int(line["step"]) for line in log.read(run.folder / "log.jsonl")), default=0)


def _collect_curves(claim: Claim, arms: Mapping[str, Sequence[PlacedArm]]) -> dict[str, dict[str, list[list[float]]]]:
    """Title -> arm -> [step, mean over seeds], of the runs that have finished."""
    points: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, placed in arms.items():
        wanted = {*CURVES, claim.measure_of(name).name}
        for arm in placed:
            for run in arm.runs:
                if read_status(run.folder) != "finished":
                    continue
                for title, step, value in _list_points(run, wanted):
                    points.setdefault(title, {}).setdefault(name, {}).setdefault(step, []).append(value)
    return {
        title: {
            name: [[step, sum(values) / len(values)] for step, values in sorted(of_arm.items())]
            for name, of_arm in of_title.items()
        }
        for title, of_title in points.items()
    }


def _list_points(run: PlacedTraining, wanted: Iterable[str]) -> Iterable[tuple[str, int, float]]:
    """Title, step and value of the curves of one run: shares of its training lines and scores of its validation."""
    for line in log.read(run.folder / "log.jsonl"):
        if run.verb == "pretrain" and line["kind"] == "train":
            for name in wanted:
                if name in line["parts"]:
                    yield f"pre-training: {name}", int(line["step"]), float(line["parts"][name])
        elif run.verb == "finetune" and line["kind"] == "valid":
            for name in wanted:
                if name in line["scores"]:
                    yield f"fine-tuning: {name}", int(line["step"]), float(line["scores"][name])


def _describe_machine(runs: Iterable[PlacedTraining]) -> dict[str, Any]:
    """Processor, and its rate of matrix products as the runs measured it (products a second, one thread)."""
    rates = [
        rate
        for run in runs
        if read_status(run.folder) == "finished" and (rate := RunFolder(run.folder).read().get("product_rate"))
    ]
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "product_rate": sorted(rates)[len(rates) // 2] if rates else None,
        "date": datetime.date.today().isoformat(),
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    """An object in a file; None if there is no such file.

    Raises:
        RunError: it cannot be read, or is something else.
    """
    if not path.exists():
        return None
    try:
        found = damage.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}. It is damaged; delete it and repeat the command.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds {type(found).__name__}, not what visling reproduce writes. Delete it.")
    return found
