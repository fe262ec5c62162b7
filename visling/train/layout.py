"""How processes share the batches of a run that others may have started."""

from __future__ import annotations

from collections.abc import Mapping

from visling import runtime
from visling.errors import ConfigError


def fit_layout(
    batch_sizes: Mapping[str, int], accumulation: int, processes_before: int | None, processes_now: int | None = None
) -> tuple[dict[str, int], int]:
    """Batch sizes per process, and micro-batches per update, with which other processes train the same global batches:
    batches that are no larger than before, and as few for each update as that allows.

    Args:
        batch_sizes: what micro-batches hold -> examples per process.
        accumulation: micro-batches per update.
        processes_before: that started the run; None = those of now.
        processes_now: None = those that call this.
    Returns:
        The batch sizes, and the micro-batches per update.
    Raises:
        ConfigError: the processes cannot share a global batch equally; names numbers that can.
    """
    now = runtime.world_size() if processes_now is None else processes_now
    before = processes_before or now
    whole = {name: size * accumulation * before for name, size in batch_sizes.items()}
    for micro_batches in range(1, min(whole.values()) // now + 1):
        shares = now * micro_batches
        fitted = {name: size // shares for name, size in whole.items()}
        if all(fitted[name] * shares == size and fitted[name] <= batch_sizes[name] for name, size in whole.items()):
            return fitted, micro_batches
    working = [n for n in range(1, min(whole.values()) + 1) if all(size % n == 0 for size in whole.values())]
    listed = ", ".join(map(str, working[:12])) + (", ..." if len(working) > 12 else "")
    examples = " and ".join(f"{size} {name}" for name, size in whole.items())
    raise ConfigError(
        f"every update of this run has {examples}, with {before} "
        f"process{'es' if before > 1 else ''} at its start; {now} cannot share them equally. Resume it with "
        f"one of these numbers of processes: {listed}."
    )
