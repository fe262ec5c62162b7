"""The scripts for clusters, run with stand-ins for Slurm and ssh that start what they are given on this machine, once
for each of two simulated ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_examples import check, fenced
from test_several_machines import PATIENCE, free_port, pretraining

SCRIPTS = Path(__file__).parents[1] / "examples" / "cluster"
STAND_INS = {
    # A step of a job: the command, once for each machine; a signal is passed on
    "srun": """
trap 'kill -TERM $(jobs -p)' TERM
for number in $(seq 0 $((SLURM_NNODES - 1))); do
  mkdir -p "$MACHINES/$number"
  SLURM_NODEID=$number TMPDIR="$MACHINES/$number" VISLING_HOME="$MACHINES/$number/home" "$@" &
done
status=0
for job in $(jobs -p); do
  while kill -0 "$job" 2>/dev/null; do wait "$job" || true; done
  wait "$job" || status=$?
done
exit $status
""",
    "scontrol": """
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.2\\n'; else echo "$@" >> "$MACHINES/asked"; fi
""",
    # ssh -tt HOST COMMAND
    "ssh": """
mkdir -p "$MACHINES/$2"
echo "$2" >> "$MACHINES/asked"
TMPDIR="$MACHINES/$2" VISLING_HOME="$MACHINES/$2/home" exec bash -c "$3"
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment in which the stand-ins are found first."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    machines = tmp_path / "machines"
    machines.mkdir()
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MACHINES": str(machines),
        "PORT": str(free_port()),
        "PROCESSES": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
    }


def start(script: str, words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(SCRIPTS / script), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and output; whatever is left of a script that hangs is ended."""
    try:
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out


def test_the_commands_of_the_page_are_those_of_the_scripts_and_parse() -> None:
    """torchrun's own words are those that are run here and in test_several_machines.py."""
    text = (SCRIPTS.parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    lines = [line for _, block in fenced(text) for line in block.replace("\\\n", " ").splitlines()]
    given = [line.partition("-m visling " if "torchrun" in line else ".sh")[2] for line in lines]
    assert len(given) == 5
    for words in given:
        check(shlex.split(words))
    scripts = "".join((SCRIPTS / name).read_text(encoding="utf-8") for name in ("slurm.sh", "ssh.sh"))
    started = " ".join(line.partition("-m visling")[0] for line in lines if "torchrun" in line)
    for option in re.findall(r"--[a-z-]+", started):
        assert f"{option} " in scripts


def test_the_tables_of_the_page_are_those_of_the_result() -> None:
    page = SCRIPTS.parents[1] / "docs" / "scaling.md"
    text = page.read_text(encoding="utf-8").partition("## Simulation")[2]
    (name,) = set(re.findall(r"\(\.\./(benchmarks/results/scale_[^)]+)\)", text))
    result = (page.parents[1] / name).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for row in rows:
        assert row.replace("../benchmarks/results/", "") in result


def test_the_scripts_are_programs() -> None:
    for file in SCRIPTS.glob("*.sh"):
        assert os.access(file, os.X_OK)
        subprocess.run(["bash", "-n", str(file)], check=True)


@pytest.mark.slow
def test_machines_by_ssh_train_one_model(world: Any, tmp_path: Path, cluster: dict[str, str]) -> None:
    """A blank in a path arrives as it is."""
    words = pretraining(world, tmp_path / "a run", batch_size=4)
    hosts = {"HOSTS": "127.0.0.1 127.0.0.2", "VISLING": str(Path(sys.executable).parents[1])}
    status, out = finish(start("ssh.sh", words, cluster | hosts))
    assert status == 0, out
    asked = (Path(cluster["MACHINES"]) / "asked").read_text().split()
    assert sorted(asked) == ["127.0.0.1", "127.0.0.2"], "both are started at the same time"
    assert out.count("Pre-trained model in") == 1
    assert json.loads((tmp_path / "a run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_job_of_slurm_whose_time_is_over_is_queued_again_and_resumes(
    world: Any, tmp_path: Path, cluster: dict[str, str]
) -> None:
    run = tmp_path / "run"
    words = pretraining(world, run, "train.max_steps=400", "train.log_every=1", batch_size=4)
    job = start("slurm.sh", words, cluster)
    until = time.monotonic() + PATIENCE
    while not (run / "log.jsonl").exists() or '"train"' not in (run / "log.jsonl").read_text():
        if job.poll() is not None or time.monotonic() > until:
            os.killpg(job.pid, signal.SIGKILL)
            pytest.fail(finish(job)[1])
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGTERM)
    _, out = finish(job)
    asked = Path(cluster["MACHINES"]) / "asked"
    assert asked.read_text() == "requeue 7\n", out
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    status, out = finish(start("slurm.sh", words, cluster))
    assert status == 0, out
    assert "resumed at step" in out
    assert out.count("Pre-trained model in") == 1
    assert finish(start("slurm.sh", words, cluster)) == (0, f"{run} has finished\n")
    assert asked.read_text() == "requeue 7\n"
