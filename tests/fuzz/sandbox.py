"""A process in which hostile files are read: what a reader does there is watched, and its death is an answer.

The server process imports the readers once and forks a worker, which reads one case after another. A worker that dies
(a crash in a C library, too much time) costs its case alone: the server says what killed it and forks the next.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from fuzz.readers.base import Reader
from fuzz.sample import Sample

from visling.errors import VislingError

SECONDS = 5
"""Processor time that reading one file may take."""
PATIENCE = 120
"""Seconds after which a worker that neither answers nor dies is given up."""
MEGABYTE = 1 << 20
LEAST_MEMORY = 64 * MEGABYTE
TIMES_THE_FILE = 50
"""A reader may ask for `LEAST_MEMORY`, or for so many times the size of the file, whichever is more."""

_TESTS = Path(__file__).parents[1]
_MODES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.remove", "os.rename", "os.rmdir",
    "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.kill", "subprocess.Popen",
    "shutil.", "socket.", "ctypes.dlopen", "pty.spawn", "urllib.Request", "tempfile.",
)  # fmt: skip
"""Beginnings of the names of audit events that no reader causes."""


class Outcome(NamedTuple):
    """What came of reading one file."""

    kind: Literal["read", "refused", "escaped"]
    """read: the value that was promised; refused: by an error of the library; escaped: everything else."""
    what: str
    """The message of the refusal, or what escaped."""
    died: bool = False
    """Whether the worker died of it."""


class Sandbox:
    """The client's side. A context manager, which ends the processes."""

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()
        folders = os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"from fuzz.sandbox import serve; serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": folders},
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def read(self, reader: str, folder: Path) -> Outcome:
        """Let a reader of `readers.READERS` read the files in a folder."""
        self._connection.send((reader, folder, 0, None))
        return self._receive()

    def read_changed(self, sample: Sample, file: Path, content: bytes) -> Outcome:
        """What comes of reading a sample with another content of one file."""
        (sample.folder / file).write_bytes(content)
        try:
            return self.read(sample.reader.name, sample.folder)
        finally:
            sample.restore()

    def run(self, sample: Sample, seed: int, cases: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """Let a reader read its sample, damaged in another way in each case. The worker does all of it: where many
        processes share a processor, every answer that is waited for costs a turn."""
        waiting = list(cases)
        while waiting:
            sample.restore()
            self._connection.send((sample.reader.name, sample.folder, seed, waiting))
            died = False
            while waiting and not died:
                outcome = self._receive()
                died = outcome.died
                yield waiting.pop(0), outcome
        sample.restore()

    def _receive(self) -> Outcome:
        if not self._connection.poll(PATIENCE):
            raise TimeoutError(f"neither an answer nor an end of the worker after {PATIENCE} seconds")
        found: Outcome = self._connection.recv()
        return found


def serve(handle: int) -> None:
    """Fork workers for as long as there is a client at the other end of a socket."""
    import fuzz.readers  # noqa: F401  # once, for all workers
    import torch

    torch.set_num_threads(1)
    connection = Connection(handle)
    while True:
        worker = os.fork()
        if not worker:
            with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
                _work(connection)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        if os.WIFEXITED(status) and not os.WEXITSTATUS(status):
            return
        connection.send(Outcome("escaped", _describe_death(status), died=True))


def _describe_death(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"the process ended with {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    return f"more than {SECONDS} s" if number == signal.SIGPROF else f"killed by {signal.Signals(number).name}"


def _work(connection: Connection) -> None:
    """Read what the client asks for, under watch."""
    from fuzz.readers import READERS

    seen: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and (event.startswith(_FORBIDDEN) or (event == "open" and _writes(arguments))):
            seen.append(f"{event}{arguments!r:.100}")

    sys.addaudithook(watch)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while True:
        name, folder, number, cases = connection.recv()
        reader = READERS[name]
        sample = None if cases is None else Sample(reader, folder)
        for case in [0] if cases is None else cases:
            if sample is not None:
                sample.restore()
                sample.damage(number, case)
            watching = True
            with _limit(folder, reader.least_memory or LEAST_MEMORY):
                outcome = _read(reader, folder)
            watching = False
            if seen and not reader.writes:
                outcome = Outcome("escaped", f"did what no reader does: {seen[0]}")
            seen.clear()
            connection.send(outcome)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(set("wax+") & set(mode)) if isinstance(mode, str) else bool((flags or 0) & _MODES)


@contextlib.contextmanager
def _limit(folder: Path, least: int) -> Iterator[None]:
    """Bound the memory that can be asked for, and the time."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    allowed = max(least, TIMES_THE_FILE * size)
    resource.setrlimit(resource.RLIMIT_AS, (used + allowed, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _read(reader: Reader, folder: Path) -> Outcome:
    try:
        reader.read(folder)
    except VislingError as error:
        if _lacked_memory(error):
            return Outcome("escaped", f"asked for more memory than is allowed: {error}"[:300])
        if folder.name not in str(error):
            return Outcome("escaped", f"names no file: {type(error).__name__}: {error}"[:300])
        return Outcome("refused", f"{type(error).__name__}: {error}"[:300])
    except BaseException as error:
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        return Outcome("escaped", f"{type(error).__name__}: {error!s:.120} at {' < '.join(reversed(ours[-6:]))}")
    return Outcome("read", "")


def _lacked_memory(error: BaseException | None) -> bool:
    """Whether an error comes of memory that was refused."""
    while error is not None:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error) or "Cannot allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
