"""What the machines of one run must have in common: the run folder, the examples, the versions.

A machine that lacks the folder would begin anew where the others resume, and one with other examples would wait for
others in vain, or train on something else: both are refused before the first update.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from visling import runtime
from visling.errors import RunError
from visling.train.exchange import gather

_LATE = 30.0
"""Seconds until a network file system shows on one machine what another has written."""


def require_shared(file: Path) -> None:
    """See that every process finds a file that the main one has written.

    Raises:
        RunError: on every process, if one does not.
    """
    if runtime.world_size() == 1:
        return
    lacking = sorted({host for host, found in gather((socket.gethostname(), _appears(file))) if not found})
    if lacking:
        raise RunError(
            f"{', '.join(lacking)}: no {file}, which the main process has written. All machines of a run need its "
            "folder: put --out on a file system that they share."
        )


def require_equal(what: Mapping[str, Any]) -> None:
    """See that a run's examples and versions are the same for every process.

    Args:
        what: where the examples are in their order, and what that depends on; JSON values.
    Raises:
        RunError: on every process, if they differ.
    """
    if runtime.world_size() == 1:
        return
    versions = runtime.versions()
    own = dict(_flatten({**what, "visling": versions["visling"], "torch": versions["torch"]}))
    (main_host, main), *others = gather((socket.gethostname(), own))
    for number, (host, other) in enumerate(others, 1):
        for name in sorted({*main, *other}):
            if main.get(name) != other.get(name):
                raise RunError(
                    f"the processes of this run do not read the same: {name} is {main.get(name)!r} in process 0 on "
                    f"{main_host} and {other.get(name)!r} in process {number} on {host}. Give all machines the same "
                    "data, stores and versions."
                )


def _appears(file: Path) -> bool:
    """Whether a file is there, or soon will be; the folder is listed, which asks the server instead of a cache."""
    until = time.monotonic() + _LATE
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
        if file.parent.is_dir():
            os.listdir(file.parent)
    return True


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
