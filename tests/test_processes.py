"""Several processes by one command: they train one model, speak with one voice, and end together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def train_by_two(world: Any, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`visling pretrain --processes 2` on the tiny world."""
    settings = [part for setting in (*world.settings, "batch_size=4", *words) for part in ("--set", setting)]
    command = [
        sys.executable, "-m", "visling", "pretrain", "--recipe", "visualbert-scenes", "--data", str(world.scenes), "--store", str(world.regions),
        "--out", str(out), "--device", "cpu", "--threads", "1", "--processes", "2", *settings,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_train_one_model(world: Any, tmp_path: Path) -> None:
    ended = train_by_two(world, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Pre-trained model in") == 1
    assert "Warning" not in ended.stderr
    about = json.loads((tmp_path / "two" / "run.json").read_text())
    assert about["status"] == "finished"
    state = json.loads((tmp_path / "two" / "last" / "state.json").read_text())
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
    assert "another process of this run failed:\nout of everything" in ended.stderr


def test_gradients_are_means_over_processes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from visling import runtime\n"
        "from visling.train.parallel import average_gradients\n"
        "with runtime.process_group(2):\n"
        "    first, second, none = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))\n"
        "    first.grad = torch.full((2, 3), 1.0 + 2 * runtime.rank())\n"
        "    if runtime.rank() == 1:\n"
        "        second.grad = torch.ones(2, 3)\n"
        "    average_gradients([first, second, none])\n"
        "    assert first.grad.eq(2.0).all() and second.grad.eq(0.5).all() and none.grad is None\n"
        "    print('means')\n"
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "means\n"
