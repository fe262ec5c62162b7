"""Several processes by one command: they train one model, predict what one predicts, speak with one voice, and end
together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def train_by_two(world: Any, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`visling pretrain --processes 2` on the tiny world."""
    settings = [part for setting in (*world.settings, "batch_size=4", *words) for part in ("--set", setting)]
    command = [
        sys.executable, "-m", "visling", "pretrain", "--recipe", "visualbert-scenes", "--data", str(world.scenes),
        "--store", str(world.regions), "--out", str(out), "--device", "cpu", "--threads", "1", "--processes", "2",
        *settings,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_train_one_model(world: Any, tmp_path: Path) -> None:
    ended = train_by_two(world, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Pre-trained model in") == 1
    assert "Warning" not in ended.stderr
    about = json.loads((tmp_path / "two" / "run.json").read_text())
    assert about["status"] == "finished"
    state = json.loads((max((tmp_path / "two" / "last").glob("step-*")) / "state.json").read_text())
    assert len(state["generators"]) == 2


def test_what_both_processes_refuse_is_said_once(world: Any, tmp_path: Path) -> None:
    ended = train_by_two(world, tmp_path / "two", "encoder.num_heads=3")
    assert ended.returncode == 2
    assert ended.stderr.count("visling:") == 1
    assert not (tmp_path / "two").exists()


def test_a_process_that_dies_ends_its_group(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom visling import runtime\n"
        "import os\n"
        "if os.environ.get('RANK') == '1':\n    sys.exit('out of everything')\n"
        "with runtime.process_group(2):\n    pass\n"
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "process 1 of this run (0 to 1) ended with status 1;" in ended.stderr
    assert ended.stderr.endswith("That process wrote:\nout of everything\n")


def test_what_another_process_refuses_is_said(tmp_path: Path) -> None:
    """This one sends to a process that is gone, which fails at once and says nothing of use."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nimport torch\nfrom visling import runtime\nfrom visling.errors import DataError, RunError\n"
        "try:\n"
        "    with runtime.process_group(2):\n"
        "        if runtime.rank() == 1:\n"
        "            raise DataError('its share is unreadable')\n"
        "        while True:\n"
        "            runtime.sum_over_processes(torch.ones(1 << 20))\n"
        "except (DataError, RunError) as error:\n"
        "    sys.exit(f'refused: {error}')\n"
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("refused: process 1 of this run (0 to 1) ended with status 1;")
    assert ended.stderr.endswith("That process wrote:\nrefused: its share is unreadable\n")
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc that tells whether a process still runs")
def test_processes_end_when_torchrun_is_killed(tmp_path: Path) -> None:
    """Nobody else would end them: they would keep their memory and wait for each other for ever."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from visling import runtime\n"
        "with runtime.process_group():\n"
        "    Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    time.sleep(120)\n"
    )
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program), str(tmp_path)]
    )
    files = [tmp_path / "0", tmp_path / "1"]
    try:
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
    finally:
        torchrun.kill()
        torchrun.wait()
    pids = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(is_running(pid) for pid in pids), 20)


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait for something that must come true in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.2)


def is_running(pid: int) -> bool:
    """Whether a process exists that has not ended."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_one_process_makes_what_the_others_read(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from visling import runtime\n"
        f"made = Path({str(tmp_path / 'made')!r})\n"
        "with runtime.process_group(2):\n"
        "    with runtime.one_first():\n"
        "        if runtime.local_rank() == 0:\n"
        "            time.sleep(0.5)\n"
        "            made.write_text('by one')\n"
        "        assert made.read_text() == 'by one'\n"
        "    try:\n"
        "        with runtime.one_first():\n"
        "            assert runtime.local_rank(), 'the first fails'\n"
        "    except AssertionError as error:\n"
        "        print(error)\n"
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "the first fails\n", "nobody waits for it for ever"


def test_trained_norms_have_the_statistics_of_the_main_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from visling import runtime\n"
        "from visling.train.parallel import share_statistics\n"
        "with runtime.process_group(2):\n"
        "    trained, frozen = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3).requires_grad_(False)\n"
        "    for norm in (trained, frozen):\n"
        "        for _ in range(1 + runtime.rank()):\n"
        "            norm(torch.arange(12.0).reshape(4, 3) * (1 + runtime.rank()))\n"
        "    own = [buffer.clone() for buffer in trained.buffers()]\n"
        "    other = frozen.running_mean.clone()\n"
        "    share_statistics(torch.nn.Sequential(trained, frozen))\n"
        "    same = [a.equal(b) for a, b in zip(own, trained.buffers())]\n"
        "    assert same == [runtime.rank() == 0] * 3 and other.equal(frozen.running_mean)\n"
        "    print('shared')\n"
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "shared\n"


STILL = ("train.optim.lr=0.0", "train.optim.weight_decay=0.0", "train.max_steps=1", "train.validate_every=1")
"""Settings under which training changes no weight: what is validated does not depend on how it was trained."""


def run_by(processes: int, verb: str, *words: str) -> None:
    """A command of the tiny world with so many processes, on one thread each."""
    command = [sys.executable, "-m", "visling", verb, *words, "--device", "cpu", "--threads", "1"]
    command += ["--processes", str(processes)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr


def validated(run: Path) -> list[dict[str, float]]:
    """The validation scores in a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["scores"] for line in lines if line["kind"] == "valid"]


def settings_of(world: Any, recipe: str) -> list[str]:
    changes = [*world.settings, *STILL, "batch_size=5"]
    if recipe.startswith(("lxmert", "cvlp")):
        changes.remove("encoder.num_layers=1")
        changes += [f"encoder.num_{stream}_layers=1" for stream in ("text", "region", "cross")]
    return [part for change in changes for part in ("--set", change)]


@pytest.mark.parametrize(
    "recipe",
    [
        "vlbert-scenes",
        "lxmert-scenes",
        pytest.param("visualbert-scenes", marks=pytest.mark.slow),
        pytest.param("cvlp-scenes", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_validates_pretraining_alike(world: Any, tmp_path: Path, recipe: str) -> None:
    """Among them text without images (VL-BERT), questions scored one by one (LXMERT) and a queue (CVLP), which holds
    the regions that training has met: other ones for another number of processes."""
    scores = []
    for processes in (1, 2, 3):
        out = tmp_path / f"{processes}"
        run_by(
            processes, "pretrain", "--recipe", recipe, "--data", str(world.scenes), "--store", str(world.regions),
            "--out", str(out), *settings_of(world, recipe),
        )  # fmt: skip
        scores.append(validated(out))
    for (only,) in scores:
        for name in [name for name in only if recipe == "cvlp-scenes" and (name == "loss" or "contrast" in name)]:
            del only[name]
    assert scores[0][0]
    assert scores[1] == scores[0]
    assert scores[2] == scores[0]


def test_any_number_of_processes_trains_on_text_alone(world: Any, tmp_path: Path) -> None:
    """The whole training, to rounding: no example of an update depends on who computes it."""
    changes = ['corpora=[{kind = "text"}]', "objectives={masked_lm = 1.0}", "train.max_steps=4"]
    scores = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        own = [f"batch_size={12 // processes}", *changes]
        run_by(
            processes, "pretrain", "--recipe", "vilbert-scenes", "--data", str(world.scenes), "--out", str(out),
            *(part for change in own for part in ("--set", change)),
        )  # fmt: skip
        scores.append(validated(out))
    assert scores[0][0].keys() == {"loss", "masked_lm", "masked_lm_accuracy"}
    assert scores[1][0]["loss"] == pytest.approx(scores[0][0]["loss"], rel=1e-4)


def test_any_number_of_processes_validates_fine_tuning_alike(world: Any, tmp_path: Path) -> None:
    scores = []
    for processes in (1, 2, 3):
        out = tmp_path / f"{processes}"
        run_by(
            processes, "finetune", "--recipe", "visualbert-vqa-scenes", "--data", str(world.scenes), "--store",
            str(world.regions), "--init", str(world.vqa), "--out", str(out), *settings_of(world, "visualbert"),
        )  # fmt: skip
        scores.append(validated(out))
    assert scores[0]
    assert scores[1] == scores[0]
    assert scores[2] == scores[0]


def test_any_number_of_processes_predicts_what_one_predicts(world: Any, tmp_path: Path) -> None:
    """Scores, details with confidences, and the submission file, byte for byte; no example is left out or doubled."""
    written = []
    for processes in (1, 2, 3):
        run = shutil.copytree(world.vqa, tmp_path / f"{processes}")
        run_by(processes, "evaluate", str(run), "--split", "train", "--batch-size", "7")
        names = ("evaluation_train.json", "details_train.jsonl", "predictions_train.json")
        written.append({name: (run / name).read_bytes() for name in names})
    rows = [json.loads(line)["id"] for line in written[0]["details_train.jsonl"].splitlines()]
    assert len(rows) == len(set(rows)) > 2 * 7
    assert written[1] == written[0]
    assert written[2] == written[0]
