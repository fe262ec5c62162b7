"""What a run reports: JSON lines for programs, text or a progress bar for people, numbers for other loggers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from visling import damage, runtime
from visling.errors import DataError, RunError
from visling.train.loggers import Logger

WIDTH = 120
"""Columns that a line of text should not exceed."""

TIMED = frozenset({"examples_per_second", "data_wait", "memory", "utilisation", "seconds"})
"""Fields of a training line that depend on the machine and what else it does: all others are the same in a run that is
repeated or resumed."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a run used its machine, or machines, since the last line; validation and saving are left out."""

    examples_per_second: float
    """Of all processes together."""
    data_wait: float
    """Share of the time in which a process waited for its loader, of the one that waited longest: the others wait for
    it."""
    memory: int | None
    """Bytes at the peak (`memory.take_peak_memory`), of the process with most; None = the system does not say."""
    utilisation: float | None
    """Matrix products that the batches needed, per second, over `product_rate`; None = what they need is not known."""
    product_rate: float | None
    """Operations a second of all processes together (`rate.measure_rate`); None = not measured."""

    def describe(self, unit: str) -> tuple[str, str, str]:
        """In words: everything, the same without the measured rate, and the speed alone.

        Args:
            unit: what an example is called.
        """
        number = self.examples_per_second
        speed = f"{number:.{0 if number >= 10 else 1}f} {unit}/s"
        most = f"{speed}  waits {self.data_wait:.0%}"
        if self.memory is not None:
            most += f"  {self.memory / 1e9:.1f} GB"
        if self.utilisation is None or self.product_rate is None:
            return most, most, speed
        most += f"  {self.utilisation:.0%}"
        return f"{most} of {format_rate(self.product_rate)}", most, speed


class Log:
    """Writes a run's lines; silent in every process except the main one.

    Args:
        path: JSON-lines file to append to; None = no file.
        stream: text for people (a progress bar if it is a terminal, plain lines otherwise); None = no text.
        loggers: what else receives the losses and scores.
        unit: what an example is called in text.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        stream: TextIO | None = None,
        loggers: Sequence[Logger] = (),
        unit: str = "examples",
    ) -> None:
        main = runtime.is_main()
        self.path = path if main else None
        self._stream = stream if main else None
        self._file: TextIO | None = None
        self._unit = unit
        self._bar: Progress | None = None
        self._task: Any = None
        self._total: int | None = None
        self._seconds: float | None = None
        self._loggers = tuple(loggers) if main else ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, step: int, total: int | None, *, seconds: float | None = None) -> None:
        """Begin at `step` of a run of `total` updates, or of `seconds` if that number is not known; lines past `step`,
        from an interrupted run, are removed."""
        self._total, self._seconds = total, seconds
        if self._file is not None:  # an event was written before the start; `cut` may replace the file
            self._file.close()
            self._file = None
        if self.path is not None:
            cut(self.path, step)
        for logger in self._loggers:
            logger.start(step)
        if self._stream is not None and self._stream.isatty():
            self._open_bar(step)

    def advance(self, step: int, seconds: float = 0.0) -> None:
        """Move the progress bar to a step, or to the seconds spent on a run that time bounds."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step if self._seconds is None else int(seconds))

    def train(
        self,
        *,
        step: int,
        epoch: int,
        loss: float,
        parts: Mapping[str, float],
        lr: float,
        machine: Machine,
        seconds: float,
        seconds_per_step: float,
    ) -> None:
        """One training line; the fields are those of docs/log_lines.md.

        Args:
            epoch: number, from 1, of the epoch that the step belongs to.
            loss: mean since the last line.
            parts: mean of each part since the last line.
            seconds: spent on the run so far.
            seconds_per_step: recent mean, from which the time left is estimated.
        """
        used = {field: value for field, value in dataclasses.asdict(machine).items() if field in TIMED}
        self._write(
            kind="train",
            step=step,
            epoch=epoch,
            loss=loss,
            parts=dict(parts),
            lr=lr,
            **used,
            seconds=seconds,
        )
        inner = "  ".join(f"{name} {value:.4g}" for name, value in parts.items()) if len(parts) > 1 else ""
        full, short, speed = machine.describe(self._unit)
        start, rate = f"epoch {epoch}  loss {loss:.4g}  ", f"lr {lr:.2e}  "
        if self._bar is not None:
            at = "" if self._seconds is None else f"step {step}  "
            plain = f"{at}{start}{rate}"
            least = f"{at}loss {loss:.4g}"
            whole = f"{at}{start}{f'({inner})  ' if inner else ''}{rate}"
            self.advance(step, seconds)
            self._bar.update(
                self._task,
                metrics=(
                    whole + full, whole + short, plain + full, plain + short, plain + speed,
                    f"{least}  {speed}", least,
                ),
            )  # fmt: skip
        else:
            if self._seconds is not None:
                left = duration(max(self._seconds - seconds, 0.0))
                at = f"{min(seconds / self._seconds, 1.0):.0%}  step {step}  "
            else:
                left = duration(((self._total or step) - step) * seconds_per_step)
                at = f"step {step}/{self._total}  "
            self._say(_lay_out(f"{at}{start}", inner, rate, (full, short), f"  {left} left"))
        numbers = {name: value for name, value in used.items() if value is not None}
        inner_numbers = {f"part/{name}": value for name, value in parts.items()}
        self._scalars("train", step, {"loss": loss, "lr": lr, **inner_numbers, **numbers})

    def valid(self, *, step: int, epoch: int, scores: Mapping[str, float]) -> None:
        """One validation line."""
        self._write(kind="valid", step=step, epoch=epoch, scores=dict(scores))
        of = "" if self._total is None else f"/{self._total}"
        self._say(
            f"step {step}{of}  epoch {epoch}  validation: "
            + "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        )
        self._scalars("valid", step, scores)

    def event(self, message: str, *, step: int) -> None:
        """Something that happened."""
        self._write(kind="event", step=step, message=message)
        self._say(message)

    def close(self) -> None:
        """Close the files and the progress bar; the log can be started again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None
        for logger in self._loggers:
            logger.close()

    def _write(self, **values: Any) -> None:
        if self.path is None:
            return
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            if self._file is not None:  # what it still holds cannot be written either
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None
            raise RunError(
                f"cannot write the log {self.path}: {error}. Free space or fix permissions, then resume with --resume."
            ) from error

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._stream is not None:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def _open_bar(self, step: int) -> None:
        fixed = Column(no_wrap=True)
        self._bar = Progress(
            BarColumn(bar_width=20, table_column=fixed.copy()),
            MofNCompleteColumn(table_column=fixed.copy()),
            TimeRemainingColumn(table_column=fixed.copy()),
            _MetricsColumn(table_column=Column(ratio=1, no_wrap=True)),
            console=Console(file=self._stream),
            expand=True,
        )
        timed = self._seconds is not None
        self._task = self._bar.add_task(
            "", total=self._seconds if timed else self._total, completed=0 if timed else step, metrics=("",)
        )
        self._bar.start()


class _MetricsColumn(ProgressColumn):
    """What was measured last, in the width that bar, step and time leave."""

    def render(self, task: Task) -> _FirstThatFits:
        """The metrics of the run."""
        return _FirstThatFits(task.fields["metrics"])


@dataclass(frozen=True)
class _FirstThatFits:
    """The first of some texts that fits into the width at hand; the last, cut off, if none does."""

    texts: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Text]:
        fitting = (text for text in self.texts if len(text) <= options.max_width)
        yield Text(next(fitting, self.texts[-1]), no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a log; a torn last line, which a kill leaves, is dropped.

    Raises:
        DataError: a line before the last is not JSON.
    """
    # Bytes that are no UTF-8 make their own line unreadable, not the whole log.
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith("\n"):
                raise ValueError("no line end")
            entry = damage.parse_json(line)
            if not isinstance(entry, dict):
                raise ValueError(f"a {type(entry).__name__}")
            entries.append(entry)
        except ValueError as error:
            if number < len(lines):
                raise DataError(
                    f"{path}, line {number} is not JSON: {error}. Was the file edited? Delete the line."
                ) from error
    return entries


def cut(path: Path, step: int) -> None:
    """Remove the lines of a log that are past `step`, and a torn last line."""
    if not path.exists():
        return
    kept = [entry for entry in read(path) if entry.get("step", 0) <= step]
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in kept)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _lay_out(start: str, inner: str, rate: str, used: Sequence[str], end: str) -> str:
    """A line of text that is no wider than `WIDTH` if that can be: with fewer words on the machine, or with the parts
    of the loss on lines of their own.

    Args:
        inner: parts of the loss, two spaces apart; empty = none.
        used: how the machine was used, in words and in fewer.
    """
    if inner:
        for words in used:
            line = f"{start}({inner})  {rate}{words}{end}"
            if len(line) <= WIDTH:
                return line
    lines = [f"{start}{rate}{words}{end}" for words in used]
    whole = [next((line for line in lines if len(line) <= WIDTH), lines[-1])]
    for part in inner.split("  ") if inner else ():
        if len(whole) > 1 and len(whole[-1]) + 2 + len(part) <= WIDTH:
            whole[-1] += f"  {part}"
        else:
            whole.append(f"  {part}")
    return "\n".join(whole)


def format_rate(rate: float) -> str:
    """Operations a second as people write them."""
    return f"{rate / 1e12:.3g} TFLOP/s"


def duration(seconds: float) -> str:
    """Seconds as people write them: 45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
