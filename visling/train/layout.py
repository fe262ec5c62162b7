"""How processes share the batches of a run that others started."""

from __future__ import annotations

from collections.abc import Sequence

from visling.errors import ConfigError


def fit_layout(
    batch_sizes: Sequence[int], accumulation: int, processes_before: int, processes_now: int
) -> tuple[list[int], int]:
    """Batch sizes per process, and micro-batches per update, with which other processes train the same global batches.

    A process gets batches that are no larger than before, as few for each update as that allows.

    Args:
        batch_sizes: examples per process of every kind of micro-batch.
        accumulation: micro-batches per update.
        processes_before: that started the run.
    Returns:
        The batch sizes in the same order, and the micro-batches per update.
    Raises:
        ConfigError: the processes cannot share a global batch equally; names numbers that can.
    """
    whole = [size * accumulation * processes_before for size in batch_sizes]
    for micro_batches in range(1, min(whole) // processes_now + 1):
        shares = processes_now * micro_batches
        sizes = [size // shares for size in whole]
        if all(size % shares == 0 for size in whole) and all(
            size <= most for size, most in zip(sizes, batch_sizes, strict=True)
        ):
            return sizes, micro_batches
    working = [count for count in range(1, min(whole) + 1) if all(size % count == 0 for size in whole)]
    listed = ", ".join(map(str, working[:12])) + (", ..." if len(working) > 12 else "")
    examples = " and ".join(f"{size}" for size in whole)
    raise ConfigError(
        f"the run was started by {processes_before} processes with {examples} examples per update, which "
        f"{processes_now} cannot share equally. Resume it with one of these numbers of processes: {listed}."
    )
