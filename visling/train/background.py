"""One job at a time in a thread, whose error reaches the thread that started it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs a job while its owner goes on. A program that ends waits for the job."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run a job, after the one before it; raises that one's error."""
        self.wait()

        def work() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="visling-background")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a job that has failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the job to end, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
