"""Fixtures of all tests: one thread, fixed seeds, the folder of recorded values."""

from __future__ import annotations

import os
from pathlib import Path

# Spinning OpenMP threads starve their neighbours on a shared machine; torch reads these when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from visling import runtime


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", type=Path, default=Path(__file__).parent / "golden", metavar="DIR", help="folder of recorded values (default: tests/golden)"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    runtime.seed_everything(0)


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """Folder with one sub-folder per recorded set."""
    folder: Path = request.config.getoption("--golden")
    if not folder.is_dir():
        pytest.fail(f"--golden {folder} is not a folder")
    return folder
