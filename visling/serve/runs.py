"""From runs to the models that are served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visling import api
from visling.pretrained.fetch import Report
from visling.serve.pictures import Pictures
from visling.serve.served import ServedModel


def load_runs(
    runs: Sequence[str],
    pictures: Pictures,
    *,
    detector: Path | None = None,
    other_features: bool = False,
    device: str = "auto",
    offline: bool | None = None,
    report: Report | None = None,
) -> list[ServedModel]:
    """The models of all runs; of a run of several tasks one for each. See `api.load` for the arguments.

    Raises:
        CheckpointError: as `api.load`.
    """
    models = []
    for run, name in zip(runs, name_runs(runs), strict=True):
        tasks: list[str | None] = [*api.from_pretrained(run, offline=offline).tasks] if Path(run).exists() else []
        for task in tasks or [None]:
            model = api.load(
                run, task=task, detector=detector, other_features=other_features, device=device, offline=offline,
                report=report,
            )  # fmt: skip
            models.append(ServedModel(name if task is None else f"{name}: {task}", model, pictures))
    return models


def name_runs(runs: Sequence[str]) -> list[str]:
    """A short name for each run: the last two folders of its path, and a number where that is taken."""
    names: list[str] = []
    for run in runs:
        short = "/".join((Path(run).resolve() if Path(run).exists() else Path(run)).parts[-2:])
        number = sum(name == short or name.startswith(f"{short} (") for name in names)
        names.append(f"{short} ({number + 1})" if number else short)
    return names
