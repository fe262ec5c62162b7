"""The rate of matrix products that a run's utilisation is measured against."""

from __future__ import annotations

import time

import pytest
import torch

from visling import runtime
from visling.train import rate
from visling.train.generators import capture_generators
from visling.train.log import format_rate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _measured_anew() -> None:
    rate._measure_group.cache_clear()


def test_the_rate_is_that_of_a_plain_product() -> None:
    measured = rate.measure_rate(CPU, "fp32")
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    assert 0.25 < 2 * 512**3 / min(seconds) / measured < 4  # whatever else the machine does


def test_it_is_measured_once_and_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    measured = rate.measure_rate(CPU, "auto")
    assert time.monotonic() - began < 1.5  # 0.12 on a machine that does nothing else
    monkeypatch.setattr(rate, "_measure_own", lambda *_: 1.0)
    assert rate.measure_rate(CPU, runtime.resolve("auto", CPU)) == measured
    rate._measure_group.cache_clear()
    assert rate.measure_rate(CPU, "fp32") == 1.0


def test_it_draws_nothing_from_the_generators_of_the_run() -> None:
    before = capture_generators()
    rate.measure_rate(CPU, "fp32")
    assert capture_generators() == before


def test_small_matrices_are_not_the_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are doubled until a product takes long enough; the best of its repetitions counts."""
    sizes: list[int] = []

    def timed(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
        sizes.append(len(a))
        return 0.02 if sizes.count(128) > 1 else {32: 1e-4, 64: 1e-3, 128: 0.05}[len(a)]

    monkeypatch.setattr(rate, "SMALLEST", 32)
    monkeypatch.setattr(rate, "_time_product", timed)
    assert rate.measure_rate(CPU, "fp32") == pytest.approx(2 * 128**3 / 0.02)
    assert sizes == [32, 64, 128, 128, 128, 128]


def test_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "_measure_own", lambda *_: 3e9)
    monkeypatch.setattr(rate, "gather", lambda value: [value, value, value])
    assert rate.measure_rate(CPU, "fp32") == 9e9


@pytest.mark.parametrize(
    ("operations", "text"), [(1.0834e11, "0.108 TFLOP/s"), (7.123e14, "712 TFLOP/s"), (5e9, "0.005 TFLOP/s")]
)
def test_rates_for_people(operations: float, text: str) -> None:
    assert format_rate(operations) == text
