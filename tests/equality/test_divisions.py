"""One global batch on 1, 2 and 4 processes, with and without accumulation: the same examples in the same order, the
same losses at every step, the same weights and the same queue."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fixtures import division
from fixtures.division import GLOBAL_BATCH, STEPS, Job, carry_out_jobs
from fixtures.groups import run_group
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

CLOSE = 1e-5
"""How far losses may be apart: sums in another order, in float32."""

TEXTED = 'corpora=[{kind = "captions"}, {kind = "text", weight = 1.0}]'
JOBS = (
    Job(recipe="visualbert-scenes"),
    Job(recipe="vlbert-scenes", settings=("encoder.visual_size=16",)),
    Job(recipe="vilbert-scenes"),
    Job(recipe="lxmert-scenes"),
    Job(
        recipe="cvlp-scenes",
        settings=(
            "objective_settings.region_contrast.queue_size=300",
            "objective_settings.region_contrast.momentum=0.9",
        ),
    ),
    Job(recipe="vilbert-referring-scenes"),
    Job(recipe="lxmert-vqa-scenes"),
)
"""Pre-training of every family, a fine-tuning that masks candidates, and one that does not."""

DIVISIONS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
"""Processes, and micro-batches of each per update."""


@dataclass(frozen=True)
class Trace:
    """What is left of a run."""

    examples: list[list[int]]
    """Of each update, in the order of its global batch."""
    losses: list[float]
    parts: list[dict[str, float]]
    weights: dict[str, Tensor]


def divide(job: Job, accumulation: int) -> Job:
    return dataclasses.replace(job, accumulation=accumulation)


def start(processes: int, jobs: Sequence[Job], out: Path, world: Any) -> None:
    """Carry out runs in a group of processes."""
    asked = json.dumps([dataclasses.asdict(job) for job in jobs])
    run_group(processes, division.__file__, out, world.scenes, world.regions, asked, timeout=900)


def read_trace(folder: Path, processes: int, accumulation: int) -> Trace:
    shares = [json.loads((folder / f"shares-{rank}.json").read_text()) for rank in range(processes)]
    size, stride = GLOBAL_BATCH, processes * accumulation
    if "cvlp" in folder.name:  # the queue is filled first
        shares = [share[-STEPS * accumulation :] for share in shares]
    examples = []
    for update in range(STEPS):
        members = [-1] * size
        for rank, share in enumerate(shares):
            for part in range(accumulation):
                members[rank + processes * part :: stride] = share[update * accumulation + part]
        examples.append(members)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    (saved,) = (folder / "last").rglob("model*.safetensors")
    return Trace(examples, [line["loss"] for line in lines], [line["parts"] for line in lines], load_file(saved))


def measure_distance(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def check_equal(found: Trace, expected: Trace) -> None:
    assert found.examples == expected.examples
    assert measure_distance(found.losses, expected.losses) < CLOSE
    for here, there in zip(found.parts, expected.parts, strict=True):
        assert here == pytest.approx(there, abs=CLOSE)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in found.weights.items():
        assert_close(value, expected.weights[name], atol=1e-4, rtol=1e-4, msg=name)


QUICK = (JOBS[3], JOBS[4], JOBS[5])
"""Regions that count differently from words, a queue, and candidates of different number."""


def test_two_processes_with_two_micro_batches_equal_one_batch(world: Any, tmp_path: Path) -> None:
    averaged = dataclasses.replace(QUICK[0], accumulation=2, normalise="micro_steps")
    start(2, [*(divide(job, 2) for job in QUICK), averaged], tmp_path / "2", world)
    carry_out_jobs(QUICK, tmp_path / "1", data=world.scenes, store=world.regions)
    for job in QUICK:
        expected = read_trace(tmp_path / "1" / job.folder, 1, 1)
        check_equal(read_trace(tmp_path / "2" / divide(job, 2).folder, 2, 2), expected)
        assert len(set(map(tuple, expected.examples))) == STEPS
        assert expected.losses[-1] > 0
        if job.recipe == "cvlp-scenes":  # compared row for row with the weights
            (queue,) = (value for name, value in expected.weights.items() if name.endswith("queue.rows"))
            assert (queue.norm(dim=1) > 0.9).all(), "full"
    means = read_trace(tmp_path / "2" / averaged.folder, 2, 2)
    expected = read_trace(tmp_path / "1" / QUICK[0].folder, 1, 1)
    assert means.examples == expected.examples
    assert measure_distance(means.losses, expected.losses) > 100 * CLOSE, "the mean of means is another number"


@pytest.fixture(scope="module")
def divided(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs in all divisions, and in one of them averaged as the releases do."""
    out = tmp_path_factory.mktemp("divided")
    for processes in (1, 2, 4):
        jobs = [divide(job, parts) for count, parts in DIVISIONS if count == processes for job in JOBS]
        if processes == 2:
            jobs += [dataclasses.replace(job, normalise="micro_steps") for job in JOBS]
        start(processes, jobs, out / str(processes), world)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("division", DIVISIONS[1:], ids=lambda pair: f"{pair[0]}x{pair[1]}")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.recipe)
def test_every_division_trains_the_same(divided: Path, job: Job, division: tuple[int, int]) -> None:
    processes, parts = division
    found = read_trace(divided / str(processes) / divide(job, parts).folder, processes, parts)
    check_equal(found, read_trace(divided / "1" / job.folder, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("job", [job for job in JOBS if "vqa" not in job.recipe], ids=lambda job: job.recipe)
def test_means_of_means_do_not(divided: Path, job: Job) -> None:
    averaged = dataclasses.replace(job, normalise="micro_steps")
    found, expected = read_trace(divided / "2" / averaged.folder, 2, 1), read_trace(divided / "1" / job.folder, 1, 1)
    assert found.examples == expected.examples
    assert measure_distance(found.losses, expected.losses) > 10 * CLOSE
