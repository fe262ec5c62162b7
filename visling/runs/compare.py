"""Controlled comparison: models on the same data, budget and features, over seeds, with and without pre-training.

Every run is an ordinary run folder, as pretrain, finetune and evaluate write it:

    OUT/comparison.json               plan and results, rewritten whenever a run ends
    OUT/MODEL/seed-0/pretrain/        by the recipe MODEL-RECIPE
    OUT/MODEL/seed-0/TASK/            by the recipe MODEL-TASK, from those weights
    OUT/MODEL/seed-0/TASK-scratch/    the same from random weights
    OUT/MODEL/seed-0/TASK-text-only/  as TASK, but without any region

Seed k is `train.seed` of both phases: it determines the random weights, the order and masking of examples, and the
choice by `train_limit`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from visling import config as configs
from visling import damage, models, runtime
from visling.data.corpora.base import check_images
from visling.errors import ConfigError, DataError, RunError, nearest
from visling.recipes.configs import FinetuneConfig, PretrainConfig, value_at
from visling.recipes.tables import FINETUNING, PRETRAINING, find_finetuning, find_pretraining
from visling.regions.store import NativeStore
from visling.runs.finetune import fit_to_family
from visling.runs.inputs import Inputs, fit_to_store
from visling.runs.jobs import FOLDER_SUFFIX, Job, Places, Start, carry_out
from visling.runs.pretrain import read_corpora, run_answers
from visling.runs.verdicts import spread
from visling.runtime import versions
from visling.tasks.base import load as load_task
from visling.tasks.base import read_records
from visling.train import log
from visling.train.state import RunFolder

FILE = "comparison.json"

FORMAT = 1
"""Version of the layout of comparison.json."""

_BUDGET = (
    "batch_size", "train_split", "valid_split", "train.epochs", "train.max_steps", "train.accumulation",
    "train.patience", "train_limit", "task",
)  # fmt: skip
"""Settings that must be the same for all models; the number of updates is made equal."""

_MAY_GROW = ("seeds", "tasks", "without_pretraining", "text_only")
"""What a resumed comparison may extend: they add runs to those that exist."""

_OWN = ("recipe", "model", "encoder", "any_features", "paper", "release")
"""Settings in which models differ by nature, and the remarks about them."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared."""

    models: tuple[str, ...]
    """Families; your own as MODULE:NAME, where the module offers its recipes (`recipes/tables.py`)."""
    recipe: str
    """End of the name of the pre-training recipes: scenes for visualbert-scenes, lxmert-scenes."""
    tasks: tuple[str, ...]
    """Ends of the names of the fine-tuning recipes: vqa-scenes for visualbert-vqa-scenes, lxmert-vqa-scenes."""
    seeds: int = 3
    """Number of seeds, counted from 0."""
    split: str = "test"
    """Scored once, with the weights that were best on the recipe's validation split."""
    pretrain_settings: tuple[str, ...] = ()
    """`a.b=value` for every pre-training run."""
    finetune_settings: tuple[str, ...] = ()
    """`a.b=value` for every fine-tuning run."""
    without_pretraining: bool = False
    """Whether to fine-tune from random weights too, with the same budget."""
    text_only: bool = False
    """Whether to fine-tune from the pre-trained weights without any region too: how far the words alone get."""

    def __post_init__(self) -> None:
        for what, names in (("models", self.models), ("tasks", self.tasks)):
            if not names or len(set(names)) < len(names):
                raise ConfigError(f"a comparison needs {what}, each once; found {', '.join(names) or 'none'}.")
        if self.seeds < 1:
            raise ConfigError(f"a comparison needs 1 seed or more; found {self.seeds}.")
        for setting in (*self.pretrain_settings, *self.finetune_settings):
            if setting.partition("=")[0].strip() == "train.seed":
                raise ConfigError(
                    f"a comparison counts its seeds itself; found the setting {setting!r}. Say how many with --seeds."
                )
        for model in self.models:
            if ":" in model:  # your own family, as the module of its recipes names it
                self.pretraining(model)
                for task in self.tasks:
                    self.finetuning(model, task)
            else:
                models.spec(model)
                _check_recipe(PRETRAINING, model, self.recipe)
                for task in self.tasks:
                    _check_recipe(FINETUNING, model, task)

    @property
    def starts(self) -> tuple[Start, ...]:
        """The kinds of fine-tuned runs: what they start from and see."""
        asked: dict[Start, bool] = {
            "pre-trained": True,
            "from scratch": self.without_pretraining,
            "text only": self.text_only,
        }
        return tuple(start for start, wanted in asked.items() if wanted)

    def pretraining(self, model: str) -> PretrainConfig:
        """A model's pre-training with this comparison's settings.

        Raises:
            ConfigError: the settings do not fit it.
        """
        return configs.override(find_pretraining(f"{model}-{self.recipe}")(), self.pretrain_settings)

    def finetuning(self, model: str, task: str) -> FinetuneConfig:
        """A model's fine-tuning with this comparison's settings.

        Raises:
            ConfigError: the settings do not fit it.
        """
        return configs.override(find_finetuning(f"{model}-{task}")(), self.finetune_settings)


def compare(
    comparison: Comparison,
    out: Path,
    *,
    data: Path,
    store: Path,
    device: str = "auto",
    jobs: int = 1,
    resume: bool = False,
    stream: TextIO | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and score every model. With `resume`, finished runs are kept and unfinished ones continue. After SIGTERM
    those under way have saved their states, and the status of the comparison is still "running".

    Args:
        data: folder of annotations, for pre-training and tasks.
        store: region store of every image.
        jobs: runs at a time, each in a process of its own with one thread; with 1 they run in this process.
        stream: where progress is written, with one job; with several, progress is in the run folders alone.
        progress: called with a line of text when a run has ended and `comparison.json` is updated.
    Returns:
        Contents of `comparison.json`.
    Raises:
        ConfigError, DataError, StoreError: see their messages; nothing is trained before all models have been
            checked.
        RunError: the folder holds other files or another comparison, or a run failed; what was saved is kept.
    """
    place = Places(data=data, store=store, device=str(runtime.pick_device(device)))
    comparison, plan = _prepare(comparison, place)
    earlier = _claim_folder(out, plan, resume)
    found: dict[str, Any] = {"format": FORMAT, "status": "running", "jobs": sorted({jobs, *earlier}), "plan": plan}
    runs = _plan_runs(comparison, out, place)

    def note(run: Job | None) -> None:
        ended = [one for one in runs if one.ended]
        found.update(
            status="finished" if len(ended) == len(runs) else "running",
            runs={"ended": len(ended), "planned": len(runs)},
        )
        found.update(_collect_outcomes(comparison, ended, plan))
        _write_json(out / FILE, found)
        if progress is not None and run is not None:
            progress(f"{len(ended)} of {len(runs)}: {run}")

    note(None)
    carry_out([run for run in runs if not run.ended], jobs, stream, note)
    return found


# What is planned


def _check_recipe(table: Mapping[str, Any], model: str, end: str) -> None:
    if f"{model}-{end}" not in table:
        having = [name for name in models.names() if f"{name}-{end}" in table]
        known = f"Models that have it: {', '.join(having)}." if having else nearest(f"{model}-{end}", table)
        raise ConfigError(f"no recipe {f'{model}-{end}'!r}. {known}")


def _prepare(comparison: Comparison, place: Places) -> tuple[Comparison, dict[str, Any]]:
    """The comparison with the same number of updates for all models, and everything that a resumed one must not change.

    Raises:
        ConfigError: budgets differ, or a fine-tuned encoder cannot take the pre-trained weights.
        DataError, StoreError: a split or an image is missing.
    """
    store = NativeStore.open(place.store)
    first = {model: fit_to_store(comparison.pretraining(model), store) for model in comparison.models}
    updates = {model: _count_updates(run, place, store) for model, run in first.items()}
    if len(set(updates.values())) > 1:  # VL-BERT, which has no matching objective, reads no wrong captions
        settings = (*comparison.pretrain_settings, f"train.max_steps={max(updates.values())}")
        comparison = replace(comparison, pretrain_settings=settings)
        first = {model: fit_to_store(comparison.pretraining(model), store) for model in comparison.models}
    phases: dict[str, Mapping[str, Any]] = {"pretrain": first}
    for task in comparison.tasks:
        phases[task] = {
            model: fit_to_store(fit_to_family(comparison.finetuning(model, task)), store) for model in comparison.models
        }
    differences = {phase: _compare_settings(phase, runs) for phase, runs in phases.items()}
    for task in comparison.tasks:
        for model in comparison.models:
            _check_encoder(first[model], phases[task][model])
    return comparison, {
        **configs.to_dict(comparison),
        "updates": max(updates.values()),
        "data": os.path.abspath(place.data),
        "examples": {
            task: _digest_examples(phases[task][comparison.models[0]], comparison.split, place, store)
            for task in comparison.tasks
        },
        "store": os.path.abspath(place.store),
        "fingerprint": store.fingerprint,
        "feature_size": store.feature_size,
        "device": place.device,
        "versions": versions(),
        "configs": {
            model: {phase: configs.to_dict(runs[model]) for phase, runs in phases.items()}
            for model in comparison.models
        },
        "differences": differences,
    }


def _count_updates(run: PretrainConfig, place: Places, store: NativeStore) -> int:
    """Updates of a pre-training run, whose corpora are read for it."""
    layout = Inputs(run.model, run.encoder, store, place.device).layout
    data = [str(place.data)]
    examples = read_corpora(run, data, layout, store, valid=False, answers=run_answers(run, data)).examples
    return run.train.max_steps or run.train.epochs * (len(examples) // run.batch_size // run.train.accumulation)


def _digest_examples(run: FinetuneConfig, split: str, place: Places, store: NativeStore) -> dict[str, Any]:
    """Number of examples in each split that a task reads, and a digest of all of them."""
    task = load_task(run.task).configured(run.task_settings)
    digest, counts = hashlib.sha256(), {}
    for name in (run.train_split, run.valid_split, split):
        records = read_records(task, place.data, name)
        if not records:
            raise DataError(
                f"split {name!r} of {place.data} holds no example for {run.recipe}. Name another with --split or --set."
            )
        check_images(records, store)
        for record in records:
            digest.update(repr(record).encode())
        counts[name] = len(records)
    if not task.labelled(records):
        raise DataError(
            f"split {split!r} of {place.data} has no labels: there is nothing to compare. Name another with --split."
        )
    return {"splits": counts, "digest": digest.hexdigest()}


def _compare_settings(phase: str, runs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Setting -> model -> value, for settings outside the encoder that differ between models.

    Raises:
        ConfigError: one of them is part of the budget.
    """
    (first, base), *others = runs.items()
    names: set[str] = set()
    for model, run in others:
        names |= {name for name in configs.difference(run, base) if name.partition(".")[0] not in _OWN}
        unequal = {name: pair for name, pair in configs.difference(run, base).items() if name in _BUDGET}
        if unequal:
            listed = "; ".join(
                f"{name} is {ours!r} for {first}, {theirs!r} for {model}" for name, (ours, theirs) in unequal.items()
            )
            option = "--pretrain-set" if phase == "pretrain" else "--set"
            raise ConfigError(
                f"budgets of {phase} differ: {listed}. Make them the same with {option} {next(iter(unequal))}=VALUE."
            )
    for name in ("max_seconds", "seconds"):
        if (limit := getattr(base.train, name)) is not None:
            raise ConfigError(
                f"train.{name} is {limit:g}: models would get unequal numbers of updates. Use train.max_steps instead."
            )
    return {
        name: {model: value_at(configs.to_dict(run), name).get("here") for model, run in runs.items()}
        for name in sorted(names)
    }


def _check_encoder(first: PretrainConfig, then: FinetuneConfig) -> None:
    """Refuse a fine-tuning encoder that the pre-trained weights will not fit, before they are trained."""
    with torch.device("meta"):
        shapes = [
            {name: tuple(tensor.shape) for name, tensor in models.build(run.model, run.encoder).state_dict().items()}
            for run in (first, then)
        ]
    if shapes[0] != shapes[1]:
        changed = ", ".join(
            f"{name} {pair[0]!r} and {pair[1]!r}"
            for name, pair in configs.difference(then.encoder, first.encoder).items()
        )
        raise ConfigError(
            f"{then.recipe} cannot take the weights of {first.recipe}: their encoders differ ({changed}). "
            "Give settings of the encoder to both: --pretrain-set encoder.NAME=VALUE --set encoder.NAME=VALUE."
        )


# Its folder


def _claim_folder(out: Path, plan: Mapping[str, Any], resume: bool) -> list[int]:
    """Claim a new or empty folder, or with `resume` one of the same comparison; returns the numbers of jobs used so
    far."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; a comparison needs a folder. Use another --out.")
    held = sorted(entry.name for entry in out.iterdir() if entry.name != f"{FILE}.part") if out.exists() else []
    if resume:
        if FILE not in held:
            raise RunError(
                f"nothing to resume in {out}: there is no {FILE}. Check the path, or start without --resume."
            )
        known = read_comparison(out / FILE)
        changed = configs.difference(json.loads(json.dumps(plan)), known.get("plan", {}))
        had, have = set(known.get("plan", {}).get("tasks", [])), set(plan["tasks"])
        if missing := sorted(had - have):
            raise RunError(f"{out} also compares {', '.join(missing)}: name them too, or use another --out.")
        allowed = {name for name in changed if name in _MAY_GROW or (have - had).intersection(name.split("."))}
        changed = {name: pair for name, pair in changed.items() if name not in allowed}
        if changed:
            listed = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in list(changed.items())[:5])
            raise RunError(
                f"{out} holds a comparison of other things: {listed}. Resume with the same, or use another --out."
            )
        return list(known.get("jobs", []))
    if held:
        mend = "continue with --resume, " if FILE in held else ""
        raise RunError(
            f"{out} is not empty: it holds {', '.join(held[:5])}. Use another --out, {mend}or delete the folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error}. Use another --out.") from error
    return []


def read_comparison(path: Path) -> dict[str, Any]:
    """Contents of a comparison.json.

    Raises:
        RunError: it cannot be read or is something else.
    """
    try:
        found = damage.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}. It is damaged; delete it or use another --out.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds {type(found).__name__}, not a comparison. Delete it or use another --out.")
    return found


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}. Free space or fix permissions, then continue with --resume."
        ) from error


def _plan_runs(comparison: Comparison, out: Path, place: Places) -> list[Job]:
    """All runs, each after the one that it starts from."""
    runs = []
    for seed in range(comparison.seeds):
        for model in comparison.models:
            folder = out / model.replace(":", "-") / f"seed-{seed}"
            of_seed = f"train.seed={seed}"
            pretrained = Job(
                model=model,
                seed=seed,
                recipe=f"{model}-{comparison.recipe}",
                settings=(*comparison.pretrain_settings, of_seed),
                folder=folder / "pretrain",
                place=place,
                split=comparison.split,
            )
            runs.append(pretrained)
            runs += [
                Job(
                    model=model,
                    seed=seed,
                    task=task,
                    start=start,
                    recipe=f"{model}-{task}",
                    settings=(
                        *comparison.finetune_settings,
                        of_seed,
                        *(["text_only=true"] if start == "text only" else []),
                    ),
                    folder=folder / f"{task}{FOLDER_SUFFIX[start]}",
                    init=None if start == "from scratch" else pretrained.folder,
                    place=place,
                    split=comparison.split,
                )
                for task in comparison.tasks
                for start in comparison.starts
            ]
    return runs


# What came out


def _collect_outcomes(comparison: Comparison, ended: Sequence[Job], plan: Mapping[str, Any]) -> dict[str, Any]:
    """A row for every task and model, and the scores of baselines that look at nothing."""
    rows: list[dict[str, Any]] = []
    baselines: dict[str, Any] = {}
    for task in comparison.tasks:
        metric = load_task(comparison.finetuning(comparison.models[0], task).task).metric
        for model in comparison.models:
            first = {
                run.seed: _measure_run(run, plan["configs"][model]["pretrain"])
                for run in ended
                if run.model == model and not run.task
            }
            row: dict[str, Any] = {
                "task": task,
                "model": model,
                "metric": metric,
                "pretraining": _summarise(first),
                "starts": {},
                "gains": {},
            }
            scores: dict[Start, dict[int, float]] = {}
            for start in comparison.starts:
                of_start = [run for run in ended if (run.model, run.task, run.start) == (model, task, start)]
                tuned = {run.seed: _measure_run(run, plan["configs"][model][task]) for run in of_start}
                reports = {run.seed: run.evaluation or {} for run in of_start}
                scores[start] = {seed: report["scores"][metric]["value"] for seed, report in reports.items()}
                row["starts"][start] = {**_summarise(tuned), "score": spread(scores[start])}
                for report in reports.values():
                    row["examples"] = report["scores"][metric]["count"]
                    baselines[task] = {
                        name: part["scores"][metric]["value"] for name, part in report["baselines"].items()
                    }
            for start in comparison.starts[1:]:
                both = scores["pre-trained"].keys() & scores[start].keys()
                row["gains"][start] = spread(
                    {seed: scores["pre-trained"][seed] - scores[start][seed] for seed in sorted(both)}
                )
            rows.append(row)
    return {"rows": rows, "baselines": baselines}


def _measure_run(run: Job, config: Mapping[str, Any]) -> dict[str, float]:
    """Size and effort of a finished run.

    Raises:
        RunError: its folder holds a run of other settings; an encoder that `from_init` changed differs by itself.
    """
    about = RunFolder(run.folder).read()
    own = {"train": {**config["train"], "seed": run.seed}, **({"text_only": True} if run.start == "text only" else {})}
    changed = configs.difference({**about.get("config", {}), "from_init": None}, {**config, **own})
    if changed:
        listed = "; ".join(
            f"{name} should be {ours!r}, is {theirs!r}" for name, (ours, theirs) in list(changed.items())[:5]
        )
        raise RunError(
            f"{run.folder} holds a run of other settings: {listed}. Delete that folder and continue with --resume."
        )
    steps = [line for line in log.read(run.folder / "log.jsonl") if line["kind"] == "train"]
    return {"parameters": about["parameters"], "updates": steps[-1]["step"], "seconds": steps[-1]["seconds"]}


def _summarise(trained: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Size, updates and wall-clock seconds over all seeds; empty if no run has ended yet."""
    if not trained:
        return {}
    one = next(iter(trained.values()))
    return {
        "parameters": one["parameters"],
        "updates": spread({seed: run["updates"] for seed, run in trained.items()}),
        "seconds": spread({seed: run["seconds"] for seed, run in trained.items()}),
    }
