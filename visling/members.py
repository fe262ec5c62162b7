"""Processes that a command starts to train or predict with it: what they say, how they end, and who failed first."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from visling.errors import LostProcessError

_NOTICE = 5.0
"""Seconds in which a process that fails takes its group with it: what ends later has failed by itself."""

_RACE = 0.5
"""Seconds in which the process that failed is waited for, once others have ended because they lost it."""


@dataclass(frozen=True)
class _Member:
    number: int
    process: subprocess.Popen[bytes]
    output: IO[str]


class Members:
    """Processes 1, 2, ... of a group on this machine, of which this process is number 0.

    Their output is withheld, since the first process prints the same; of the one that fails it is shown.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """Start one process with each environment."""
        self._members: list[_Member] = []
        self._ended: list[tuple[_Member, int]] = []
        """Those that have ended, in the order in which they did, with their status."""
        for number, environment in enumerate(environments, 1):
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end` closes it
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            member = _Member(number, process, output)
            self._members.append(member)
            threading.Thread(target=self._await, args=(member,), daemon=True).start()

    def _await(self, member: _Member) -> None:
        self._ended.append((member, member.process.wait()))

    def find_failure(self, within: float = 0.0) -> str:
        """What there is to say about the process that failed first; empty if none fails within some seconds."""
        for _ in _poll(within):
            if any(status for _, status in self._ended):
                break
        else:
            return ""
        for _ in _poll(_RACE):
            if (cause := self._find_cause()) is not None:
                return self._describe(*cause)
        return self._describe(*next((member, status) for member, status in self._ended if status))

    def _find_cause(self) -> tuple[_Member, int] | None:
        """The first that did not merely lose another one; a process that was killed before all others."""
        failed = [(member, status) for member, status in list(self._ended) if status]
        killed = [entry for entry in failed if entry[1] < 0]
        own = [entry for entry in failed if entry[1] != LostProcessError.status]
        return next(iter(killed or own), None)

    def _describe(self, member: _Member, status: int) -> str:
        how = f"ended with status {status}" if status > 0 else f"was ended by {_name_signal(-status)}"
        member.output.seek(0)
        said = member.output.read().strip()
        return (
            f"process {member.number} of this run (0 to {len(self._members)}) {how}; the others were ended, too. What "
            "was saved is kept: give the same command again, with --resume if it trains or extracts. "
            + (f"That process wrote:\n{said}" if said else "That process wrote nothing.")
        )

    def watch(self, finished: threading.Event) -> None:
        """End this process if another one of its group fails, for it might wait forever; it has some seconds to report
        that by itself."""
        while not finished.wait(0.2):
            if any(status for _, status in self._ended) and not finished.wait(_NOTICE):
                print(f"visling: {self.find_failure()}", file=sys.stderr, flush=True)
                self._kill()
                os._exit(1)

    def join(self) -> str:
        """Wait until all have ended; returns what there is to say about one that failed."""
        for member in self._members:
            member.process.wait()
        return self.find_failure(_RACE if any(member.process.returncode for member in self._members) else 0)

    def end(self) -> None:
        """End those that are still there."""
        self._kill()
        for member in self._members:
            member.process.wait()
            member.output.close()

    def _kill(self) -> None:
        for member in self._members:
            member.process.kill()


def _poll(seconds: float) -> Iterator[None]:
    """Come back several times, at once and for so long."""
    end = time.monotonic() + seconds
    yield
    while time.monotonic() < end:
        time.sleep(0.05)
        yield


def _name_signal(number: int) -> str:
    name = str(number)
    with contextlib.suppress(ValueError):
        name = signal.Signals(number).name
    return f"{name}, as systems do where memory is short" if name == "SIGKILL" else f"signal {name}"
