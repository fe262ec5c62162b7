"""Batches prepared by processes of their own, where cores are free: the same ones, in the same order."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import traceback
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from visling.data.text import TextLayout
from visling.errors import ConfigError, RunError

_AHEAD = 2
"""Batches that each process prepares ahead."""


_SEMAPHORES, _SEMAPHORES_OF_EACH = 10, 5
"""What the queues and events of a DataLoader have in shared memory, a page each: of all and of each process."""


class ByNumber(Protocol):
    """What is made by number."""

    def __getitem__(self, number: int, /) -> Any: ...


def check_workers(workers: int) -> None:
    """Refuse a number of processes that cannot be started.

    Raises:
        ConfigError: the system cannot copy a process with all that it has read.
    """
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            f"workers is {workers}, but this system cannot fork a process. Use workers=0: a thread prepares batches."
        )


def spread(
    items: ByNumber, numbers: Sequence[int], workers: int, layout: TextLayout | None
) -> Generator[Any, None, None]:
    """`items[number]` for all numbers in order, made by processes, which are started at once and end with the generator
    or with this process.

    Args:
        layout: whose count of cut rows is kept as if the items were made here.
    Raises:
        RunError: a process was killed, or none can be started for want of shared memory.
    """
    _check_shared_memory(workers)
    guarded = _Guarded(items, layout)
    with warnings.catch_warnings():
        # Newer versions of Python warn that a process with threads is forked; ours hold no lock that the copy needs.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        # How many processes the cores bear is up to who asks for them.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        made = iter(
            DataLoader(
                guarded,
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                prefetch_factor=_AHEAD,
                collate_fn=_pass_on,
                multiprocessing_context="fork",
                generator=torch.Generator(),  # the global one would be drawn from
            )
        )
    return _receive(made, layout)


def _check_shared_memory(workers: int) -> None:
    """Make, and forget, as many semaphores as the queues of so many processes have: where there is no room for them,
    PyTorch's attempt would leave half an object behind."""
    context = multiprocessing.get_context("fork")
    try:
        made = [context.Lock() for _ in range(_SEMAPHORES + _SEMAPHORES_OF_EACH * workers)]
    except OSError as error:
        raise RunError(
            f"the {workers} processes that prepare batches cannot be started: {error}. They need shared memory "
            "(/dev/shm): free some, or use workers=0."
        ) from error
    del made


@dataclass(frozen=True)
class _Made:
    item: Any
    error: Exception | None
    cut: int


class _Guarded(Dataset[_Made]):
    """The items, each with the error that it raised and the rows that were cut for it."""

    def __init__(self, items: ByNumber, layout: TextLayout | None) -> None:
        self.items, self.layout = items, layout

    def __getitem__(self, number: int) -> _Made:
        before = self._count_cut()
        item, failed = None, None
        try:
            made = self.items[number]
            _share_tensors(made)
            item = made
        except Exception as error:
            failed = _make_portable(error)
        return _Made(item, failed, self._count_cut() - before)

    def _count_cut(self) -> int:
        return 0 if self.layout is None else self.layout.truncated


@contextlib.contextmanager
def explain_killed(*, receiving: bool = False) -> Iterator[None]:
    """Say what to do where the block learns that a worker was killed: PyTorch tells the main thread, wherever it is,
    and a thread that waits for a batch.

    Args:
        receiving: the block does nothing but receive a batch; connections that break are signs of it, too.
    Raises:
        RunError: in place of their errors.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if "DataLoader worker" not in str(error) and (isinstance(error, RuntimeError) or not receiving):
            raise
        raise RunError(
            f"a process that prepares batches was ended from outside ({str(error).strip()}); often memory, or shared "
            "memory (/dev/shm), was short. Continue the run with --resume, with fewer workers or workers=0."
        ) from error


def _receive(made: Any, layout: TextLayout | None) -> Generator[Any, None, None]:
    try:
        while True:
            with explain_killed(receiving=True):
                found = next(made, None)
            if found is None:
                return
            if found.error is not None:
                raise found.error
            if layout is not None:
                layout.truncated += found.cut
            yield found.item
    finally:
        # It would end its processes when it is forgotten, but the traceback of an error may keep it.
        made._shutdown_workers()


def _share_tensors(item: Any) -> None:
    """Move an item's tensors into shared memory. A queue would do it in a thread of its own, which loses the item when
    it fails: the run would wait for it for ever.

    Raises:
        RunError: there is no room.
    """
    try:
        for leaf in pytree.tree_leaves(item):
            if isinstance(leaf, torch.Tensor) and leaf.numel():
                leaf.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise RunError(
            f"no shared memory (/dev/shm) is left for batches: {error}. Free some and continue the run with --resume, "
            "with fewer workers or workers=0."
        ) from error


def _make_portable(error: Exception) -> Exception:
    """The error, with where it came from as a note, as it can be sent to another process."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a process that prepares batches:\n{where}")
    return error


def _pass_on(made: Any) -> Any:
    return made
