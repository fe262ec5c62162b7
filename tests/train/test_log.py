"""Lines for programs and for people."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from visling.errors import DataError, RunError
from visling.train.log import WIDTH, Log, Machine, cut, duration, read


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Recorder:
    """A logger that records what it receives."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, step: int) -> None:
        self.calls.append(("start", step))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.calls.append((step, dict(values)))

    def close(self) -> None:
        self.calls.append("close")


USED = "80 examples/s  waits 1%  3.1 GB  42%"
"""How `machine` reads, without the measured rate."""


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {"examples_per_second": 80.0, "data_wait": 0.012, "memory": 3_120_000_000}
    return Machine(**{**values, "utilisation": 0.42, "product_rate": 1.08e11, **changes})


def train_line(log: Log, step: int, **changes: Any) -> None:
    values: dict[str, Any] = {"step": step, "epoch": 1, "loss": 1.5, "parts": {"mlm": 1.0, "match": 0.5}, "lr": 5e-5}
    log.train(**{**values, "machine": machine(), "seconds": 3.0, "seconds_per_step": 2.0, **changes})


def test_lines_have_the_documented_fields(tmp_path: Path) -> None:
    with Log(tmp_path / "log.jsonl") as log:
        log.start(0, 100)
        train_line(log, 10)
        log.valid(step=10, epoch=1, scores={"accuracy": 0.5})
        log.event("saved", step=10)
    train, valid, event = read(tmp_path / "log.jsonl")
    assert train == {
        "kind": "train",
        "step": 10,
        "epoch": 1,
        "loss": 1.5,
        "parts": {"mlm": 1.0, "match": 0.5},
        "lr": 5e-5,
        "examples_per_second": 80.0,
        "data_wait": 0.012,
        "memory": 3_120_000_000,
        "utilisation": 0.42,
        "seconds": 3.0,
    }
    assert valid == {"kind": "valid", "step": 10, "epoch": 1, "scores": {"accuracy": 0.5}}
    assert event == {"kind": "event", "step": 10, "message": "saved"}


def test_every_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.event("one", step=0)
    assert len(read(tmp_path / "log.jsonl")) == 1
    log.close()


def test_resuming_cuts_what_lies_past_the_step_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    entries = [{"kind": "train", "step": step} for step in (2, 4, 6)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"kind": "tr')
    with Log(path) as log:
        log.start(4, 10)
        log.event("resumed", step=4)
    assert [entry["step"] for entry in read(path)] == [2, 4, 4]
    path.write_text("")
    cut(path, 0)
    cut(tmp_path / "missing.jsonl", 0)
    assert read(path) == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "train"}\nnonsense\n{"kind": "train"}\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read(path)


def test_plain_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(stream=stream) as log:
        log.start(0, 100)
        log.advance(9)
        train_line(log, 10)
        train_line(log, 20, parts={"mlm": 1.0})
        train_line(log, 20, parts={"mlm": 1.0}, machine=machine(utilisation=None, product_rate=None))
        train_line(log, 20, parts={"mlm": 1.0}, machine=machine(memory=None, utilisation=None, product_rate=None))
        log.valid(step=20, epoch=2, scores={"accuracy": 0.5})
        log.event("done", step=20)
    assert stream.getvalue().splitlines() == [
        f"step 10/100  epoch 1  loss 1.5  (mlm 1  match 0.5)  lr 5.00e-05  {USED}  3 min left",
        f"step 20/100  epoch 1  loss 1.5  lr 5.00e-05  {USED} of 0.108 TFLOP/s  3 min left",
        "step 20/100  epoch 1  loss 1.5  lr 5.00e-05  80 examples/s  waits 1%  3.1 GB  3 min left",
        "step 20/100  epoch 1  loss 1.5  lr 5.00e-05  80 examples/s  waits 1%  3 min left",
        "step 20/100  epoch 2  validation: accuracy 0.5000",
        "done",
    ]


def test_a_line_is_no_wider_than_a_screen() -> None:
    """Parts of the loss that do not fit are on lines of their own."""
    stream = io.StringIO()
    parts = {"masked_lm": 2.90812, "matching": 0.704213, "masked_regions": 0.123456, "image_qa": 6.41231}
    more = {f"{name}_accuracy": 0.25 for name in parts}
    with Log(stream=stream) as log:
        log.start(0, 917_000)
        train_line(log, 123_450, parts={**parts, **more})
        train_line(log, 9, parts=dict(list(parts.items())[:1]), loss=2.9, lr=1e-4)
    first, second, more_parts, third = stream.getvalue().splitlines()
    assert first == (f"step 123450/917000  epoch 1  loss 1.5  lr 5.00e-05  {USED}  18.4 days left")
    assert second == (
        "  masked_lm 2.908  matching 0.7042  masked_regions 0.1235  image_qa 6.412  masked_lm_accuracy 0.25"
    )
    assert more_parts == "  matching_accuracy 0.25  masked_regions_accuracy 0.25  image_qa_accuracy 0.25"
    assert third.startswith("step 9/917000  epoch 1  loss 2.9  lr 1.00e-04  80 examples/s")
    assert all(len(line) <= WIDTH for line in (first, second, more_parts, third))


def test_a_run_bounded_by_time_shows_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Log(stream=stream) as log:
        log.start(0, None, seconds=200.0)
        train_line(log, 10, seconds=50.0)
        log.valid(step=10, epoch=1, scores={"accuracy": 0.5})
        train_line(log, 20, seconds=201.0)
    assert stream.getvalue().splitlines() == [
        f"25%  step 10  epoch 1  loss 1.5  (mlm 1  match 0.5)  lr 5.00e-05  {USED}  2 min left",
        "step 10  epoch 1  validation: accuracy 0.5000",
        f"100%  step 20  epoch 1  loss 1.5  (mlm 1  match 0.5)  lr 5.00e-05  {USED}  0 s left",
    ]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    with Log(stream=terminal) as log:
        log.start(0, None, seconds=200.0)
        log.advance(6, 30.0)
        train_line(log, 10, seconds=50.0)
    assert "50/200" in terminal.getvalue()
    assert "step 10  epoch 1  loss 1.5" in terminal.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Log(stream=stream) as log:
        log.start(5, 100)
        log.advance(6)
        train_line(log, 10)
        log.event("[best] so far", step=10)
    assert "10/100" in stream.getvalue()
    assert "loss 1.5" in stream.getvalue()
    assert "[best] so far" in stream.getvalue()


@pytest.mark.parametrize("step", [1200, 123_456])
@pytest.mark.parametrize(
    ("width", "shown", "hidden"),
    [
        (60, ["loss 3.412"], ["masked_lm"]),
        (80, ["loss 3.412", "80 examples/s"], ["masked_lm", "waits"]),
        (120, ["epoch 1", "loss 3.412", "lr 5.00e-05", "80 examples/s", "3.1 GB  42%"], ["masked_lm", "TFLOP/s"]),
        (200, ["epoch 1", "(masked_lm 2.908  matching 0.7042)", "80 examples/s", "42% of 0.108 TFLOP/s"], []),
    ],
)
def test_bar_step_and_time_left_have_their_place_at_any_width(
    width: int, shown: list[str], hidden: list[str], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    with Log(stream=Terminal()) as log:
        log.start(step - 10, 500_000 if step > 9999 else 3125)
        log.advance(step - 5)
        train_line(log, step, loss=3.412, parts={"masked_lm": 2.908, "matching": 0.7042})
        bar = log._bar
        assert bar is not None
        console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
        console.print(bar.get_renderable())
        lines = [line for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]
    assert len(lines) == 1, lines
    assert len(lines[0]) <= width
    assert re.search(rf"^[━╸╺ ]{{20}} {step}/\d+ +(-:--:--|\d:\d\d:\d\d)", lines[0]), lines
    for word in shown if step < 9999 else shown[:1]:
        assert word in lines[0], lines
    for word in [*hidden, "…"]:
        assert word not in lines[0], lines


@pytest.mark.parametrize(("speed", "text"), [(0.6, "0.6 images/s"), (9.96, "10.0 images/s"), (80.0, "80 images/s")])
def test_slow_runs_have_a_speed(speed: float, text: str) -> None:
    stream = io.StringIO()
    with Log(stream=stream, unit="images") as log:
        log.start(0, 100)
        train_line(log, 1, machine=machine(examples_per_second=speed))
    assert f"  {text}  " in stream.getvalue()


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visling.runtime.is_main", lambda: False)
    stream = io.StringIO()
    other = Recorder()
    with Log(tmp_path / "log.jsonl", stream=stream, loggers=[other]) as log:
        log.start(0, 10)
        train_line(log, 1)
    assert other.calls == []
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_other_loggers_receive_every_number() -> None:
    other = Recorder()
    with Log(loggers=[other]) as log:
        log.start(4, 10)
        train_line(log, 5)
        log.valid(step=5, epoch=1, scores={"accuracy": 0.5, "averaged_accuracy": 0.6})
        log.event("not a number", step=5)
    assert other.calls == [
        ("start", 4),
        (
            5,
            {
                "train/loss": 1.5,
                "train/lr": 5e-5,
                "train/part/mlm": 1.0,
                "train/part/match": 0.5,
                "train/examples_per_second": 80.0,
                "train/data_wait": 0.012,
                "train/memory": 3_120_000_000,
                "train/utilisation": 0.42,
            },
        ),
        (5, {"valid/accuracy": 0.5, "valid/averaged_accuracy": 0.6}),
        "close",
    ]


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(RunError, match="cannot write the log"):
        Log(tmp_path / "log.jsonl").event("one", step=0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (3.4 * 3600, "3.4 h"), (2.1 * 86400, "2.1 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
