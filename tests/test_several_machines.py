"""Two machines, simulated on this one: two launches of torchrun that share an address and the output folder, and
nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.regions.store import NativeStore

PATIENCE = 600
"""Seconds that a command may take on a machine that does much else."""

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(folder: Path) -> dict[str, str]:
    """Of a machine whose local folders are in `folder`."""
    local = {"VISLING_HOME": folder / "home", "TMPDIR": folder / "tmp"}
    for place in local.values():
        place.mkdir(parents=True, exist_ok=True)
    return {**os.environ, **{name: str(place) for name, place in local.items()}}


def run_on_two(
    folder: Path, words: Mapping[int, Sequence[str]] | Sequence[str], *, each: int = 2, rendezvous: str = "static"
) -> list[subprocess.CompletedProcess[str]]:
    """A command on two simulated machines at once.

    Args:
        words: of the command; by number where the machines get different ones.
        each: processes of a machine.
    """
    port = free_port()
    started = []
    for number in (0, 1):
        if rendezvous == "c10d":
            where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", str(port)]
        else:
            where = ["--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        given = words[number] if isinstance(words, Mapping) else words
        command = [TORCHRUN, "--nnodes", "2", "--nproc-per-node", str(each), *where, "-m", "visling", *given]
        started.append(
            subprocess.Popen(
                command,
                env=environment(folder / f"machine-{number}"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = []
    try:
        for process in started:
            out, errors = process.communicate(timeout=PATIENCE)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, errors))
    finally:
        for process in started:
            process.kill()
    return ended


def pretraining(world: Any, out: Path, *words: str, batch_size: int) -> list[str]:
    changes = [*world.settings, f"batch_size={batch_size}", *words]
    settings = [part for change in changes for part in ("--set", change)]
    return [
        "pretrain", "--recipe", "visualbert-scenes", "--data", str(world.scenes), "--store", str(world.regions),
        "--out", str(out), "--device", "cpu", "--threads", "1", *settings,
    ]  # fmt: skip


def said(ended: Sequence[subprocess.CompletedProcess[str]]) -> str:
    return "".join(one.stdout + one.stderr for one in ended)


def test_two_machines_train_one_model(world: Any, tmp_path: Path) -> None:
    ended = run_on_two(tmp_path, pretraining(world, tmp_path / "run", batch_size=4), each=1)
    assert [one.returncode for one in ended] == [0, 0], said(ended)
    assert ended[0].stdout == f"Pre-trained model in {tmp_path / 'run' / 'model'}\n"
    assert ended[1].stdout == ""
    assert said(ended).count("step 4/4  epoch 1  loss") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_machines_that_meet_at_a_rendezvous_fine_tune_one_model(world: Any, tmp_path: Path) -> None:
    """Which machine is the first is settled there."""
    words = [
        "finetune", "--recipe", "visualbert-vqa-scenes", *pretraining(world, tmp_path / "run", batch_size=2)[3:],
        "--init", str(world.pretrained),
    ]  # fmt: skip
    ended = run_on_two(tmp_path, words, rendezvous="c10d")
    assert [one.returncode for one in ended] == [0, 0], said(ended)
    assert said(ended).count("Fine-tuned model in") == 1
    assert said(ended).count("step 4/4  epoch 1  loss") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines_predict_what_one_process_predicts(world: Any, tmp_path: Path, rendezvous: str) -> None:
    written = []
    for machines in (1, 2):
        run = shutil.copytree(world.vqa, tmp_path / f"{machines}")
        words = ["evaluate", str(run), "--split", "train", "--batch-size", "7", "--device", "cpu", "--threads", "1"]
        if machines == 2:
            ended = run_on_two(tmp_path, words, rendezvous=rendezvous)
            assert [one.returncode for one in ended] == [0, 0], said(ended)
            assert said(ended).count("task vqa, script 2021") == 1
        else:
            subprocess.run([sys.executable, "-m", "visling", *words], capture_output=True, timeout=PATIENCE, check=True)
        names = ("evaluation_train.json", "details_train.jsonl", "predictions_train.json")
        written.append([(run / name).read_bytes() for name in names])
    assert written[1] == written[0]


@pytest.mark.slow
def test_two_machines_extract_the_regions_that_one_process_extracts(world: Any, tmp_path: Path) -> None:
    """Each process writes a part named by its number among all. Images are looked at one by one: a batch of other
    images would change the last bits, which decide between boxes of a detector that has hardly been trained."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["regions", "extract", str(world.scenes), "--detector", str(world.detector), "--batch-size", "1"]
    words += ["--device", "cpu", "--threads", "1", "--out"]
    ended = run_on_two(tmp_path, [*words, str(two)])
    assert [each.returncode for each in ended] == [0, 0], said(ended)
    assert said(ended).count("Wrote ") == 1
    assert not (two / "parts").exists()
    subprocess.run(
        [sys.executable, "-m", "visling", *words, str(one)], capture_output=True, timeout=PATIENCE, check=True
    )
    expected, made = NativeStore.open(one), NativeStore.open(two)
    assert made.ids == expected.ids
    for name in made.ids:
        for field in made.fields:
            assert np.array_equal(getattr(made[name], field), getattr(expected[name], field))


@pytest.mark.slow
def test_what_all_machines_refuse_is_said_once(world: Any, tmp_path: Path) -> None:
    words = pretraining(dataclasses.replace(world, regions=tmp_path / "nowhere"), tmp_path / "run", batch_size=2)
    ended = run_on_two(tmp_path, words)
    assert [one.returncode for one in ended] == [1, 1], "torchrun's status for a command that failed"
    assert said(ended).count("visling: no region store at") == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_torchrun_starts_every_verb_that_several_processes_share(world: Any, tmp_path: Path, processes: int) -> None:
    tasks = ("vqa", "gqa", "referring", "retrieval", "vcr", "nlvr2")
    changes = ["encoder.hidden_size=16", "encoder.num_heads=2", "train.max_steps=2"]
    changes += [f"tasks.{task}.batch_size=2" for task in tasks]
    tiny = [part for change in changes for part in ("--set", change)]
    multitask = ["--recipe", "visualbert-multitask-scenes", "--data", str(world.scenes), "--store", str(world.regions)]
    boxes = world.scenes / "annotations" / "instances_train.json"
    verbs = {
        "Wrote ": [
            "detect",
            "train",
            str(world.scenes / "images" / "train"),
            "--annotations",
            str(boxes),
            "--steps",
            "2",
        ],
        "model in ": ["multitask", *multitask, *tiny],
    }
    for number, (says, words) in enumerate(verbs.items()):
        command = [TORCHRUN, "--nproc-per-node", str(processes), "-m", "visling", *words, "--device", "cpu"]
        command += ["--out", str(tmp_path / str(number)), "--threads", "1"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count(says) == 1
