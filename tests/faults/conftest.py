"""What tests of faults share: commands in this process, and the uninterrupted run that others are compared with."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from fixtures.commands import pretrain_words

from visling import config as configs
from visling.cli import app
from visling.pretrained.folder import read_model_folder


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str | Path]], tuple[int, str]]:
    """Runs a `visling` command in this process; returns its exit status and what it said to stderr."""

    def call(words: Sequence[str | Path]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["visling", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            app.run()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def scenes(world: Any, tmp_path: Path) -> Path:
    """A copy of the drawn scenes that a test may damage."""
    return Path(shutil.copytree(world.scenes, tmp_path / "scenes"))


@pytest.fixture
def regions(world: Any, tmp_path: Path) -> Path:
    """A copy of the region store that a test may damage."""
    return Path(shutil.copytree(world.regions, tmp_path / "regions"))


@pytest.fixture
def released(world: Any, tmp_path: Path, call: Any) -> list[str]:
    """Words of `visling convert` that read a weight file in a released layout; --to is missing."""
    run, weights = tmp_path / "unwhitened", tmp_path / "weights.safetensors"
    assert call(pretrain_words(world, run, "encoder.whiten_features=false")) == (0, ANY)
    assert call(["convert", run, "--to-layout", "official", "--to", weights]) == (0, "")
    encoder = configs.to_dict(read_model_folder(run).config)
    encoder["vocabulary"] = str(run / "model" / "vocab.txt")
    settings = [word for name, value in encoder.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return ["convert", str(weights), "--from", "official", "--model", "visualbert", "--preset", "scenes", *settings]
