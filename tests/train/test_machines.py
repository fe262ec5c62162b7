"""What the machines of a run must have in common is checked; several are simulated by what they answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visling import runtime
from visling.errors import RunError
from visling.train import machines


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Any], Any]]:
    """What further processes answer, as functions of this one's answer."""
    answers: list[Callable[[Any], Any]] = []
    monkeypatch.setattr(runtime, "world_size", lambda: 1 + len(answers))
    monkeypatch.setattr(machines, "gather", lambda own: [own, *(answer(own) for answer in answers)])
    monkeypatch.setattr(machines, "_LATE", 0.3)
    return answers


def test_a_folder_that_a_machine_lacks_is_refused(others: list[Callable[[Any], Any]], tmp_path: Path) -> None:
    file = tmp_path / "run" / "run.json"
    machines.require_shared(file)  # nobody else is there
    others.append(lambda own: ("second", True))
    with pytest.raises(RunError, match=r"no .*run\.json, which the main process has written"):
        machines.require_shared(file)
    file.parent.mkdir()
    file.touch()
    machines.require_shared(file)
    others.append(lambda own: ("third", False))
    with pytest.raises(RunError, match=r"^third: no .*--out on a file system that they share"):
        machines.require_shared(file)


def test_other_examples_or_versions_are_refused(others: list[Callable[[Any], Any]]) -> None:
    position = {"images": {"examples": 10, "seed": 1}, "text": {"examples": 3}}
    machines.require_equal(position)
    others.append(lambda own: own)
    machines.require_equal(position)
    others.append(lambda own: ("third", {**own[1], "text.examples": 4}))
    with pytest.raises(RunError, match=r"text\.examples is 3 in process 0 on .* and 4 in process 2 on third"):
        machines.require_equal(position)
    others[1:] = [lambda own: ("third", {**own[1], "torch": "1.0"})]
    with pytest.raises(RunError, match=r"torch is '.*' in process 0 on .* and '1\.0' in process 2 on third"):
        machines.require_equal(position)
