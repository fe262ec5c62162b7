"""A server of the tiny world's model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fixtures.serving import serving
from starlette.testclient import TestClient

from visling import api


@pytest.fixture(scope="package")
def predictor(world: Any) -> api.Predictor:
    """The fine-tuned model."""
    return api.load(world.vqa, device="cpu")


@pytest.fixture
def client(world: Any, predictor: api.Predictor) -> Iterator[TestClient]:
    """A client of a server of that model and the test scenes."""
    with serving({"vqa": predictor}, world.scenes / "images" / "test", world.scenes) as found:
        yield found
