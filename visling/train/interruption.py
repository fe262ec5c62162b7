"""Being asked to end: SIGTERM, which schedulers and `kill` send, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal

Asked = Literal["", "terminated", "interrupted"]
"""Not at all, by SIGTERM, by Ctrl-C; a later one is the stronger one."""

STRENGTH: tuple[Asked, ...] = ("", "terminated", "interrupted")
"""From weak to strong."""


class Interruption:
    """Whether this process has been asked to end."""

    def __init__(self) -> None:
        self.asked: Asked = ""


@contextlib.contextmanager
def listen(act: Callable[[Asked], None] | None = None) -> Iterator[Interruption]:
    """Context in which the first SIGTERM or Ctrl-C only sets `asked`. Another SIGTERM changes nothing, whatever is
    being saved; another Ctrl-C ends the process at once.

    Signals come to the main thread alone: elsewhere nothing is listened to. Handlers of the program itself, and signals
    that it ignores, are left as they are.

    Args:
        act: called at the first request, inside the signal's handler.
    """
    interruption = Interruption()

    def note(number: int, frame: FrameType | None) -> None:
        first = not interruption.asked
        if number == signal.SIGINT:
            interruption.asked = "interrupted"
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        elif first:
            interruption.asked = "terminated"
        if first and act is not None:
            act(interruption.asked)

    replaced: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        for number, handler in usual.items():
            if signal.getsignal(number) is handler:
                replaced[number] = signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def announce_end(asked: Asked) -> None:
    """Say that training has heard the request."""
    hint = "; Ctrl-C again ends at once" if asked == "interrupted" else ""
    # Not by a stream: the signal may have come in the middle of writing to it
    os.write(2, f"visling: training ends after this update, and its state is saved{hint}.\n".encode())
