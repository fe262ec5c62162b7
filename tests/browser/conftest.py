"""A real browser for pages: Chromium from the system's packages, or the one that Playwright brings.

Every worker process starts its own; modules that need one stop it at their end, because Playwright's event loop would
be in the way of tests that start one of their own.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

from visling import config as configs
from visling.recipes.tables import FINETUNING
from visling.runs import finetune as finetuning

TASKS = ("nlvr2", "referring", "grounding", "vcr", "retrieval")
"""That the served page is tried on, apart from two models of "vqa"."""
NO_BROWSER = "no browser found: install Chromium to run these"
_SWITCHES = ["--no-sandbox", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running browser (`playwright.sync_api.Browser`); tests are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        program = installed or playwright.chromium.executable_path
        if not Path(program).exists():
            pytest.skip(NO_BROWSER)
        running = playwright.chromium.launch(executable_path=program, args=_SWITCHES)
        yield running
        running.close()


@dataclass
class Visits:
    """Opens pages, and remembers what they did that nobody should see."""

    browser: Any
    contexts: list[Any] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)
    """Of the pages that were opened."""
    asked: list[str] = field(default_factory=list)
    """Addresses of all requests."""
    faults: list[str] = field(default_factory=list)
    """Errors of scripts and of the console."""
    expected: list[str] = field(
        default_factory=lambda: ["Failed to load resource: the server responded with a status of 4"]
    )
    """Beginnings of what is no fault: Chromium reports a refused request, and the page shows why."""

    def __call__(
        self,
        address: str,
        *,
        size: tuple[int, int] = (1280, 800),
        scheme: Literal["light", "dark"] = "light",
        **options: Any,
    ) -> Any:
        """A page (`playwright.sync_api.Page`) in a window of its own.

        Args:
            size: width and height of the window in pixels.
            scheme: colour scheme that the reader prefers.
            options: further ones of `Browser.new_context`.
        """
        width, height = size
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce", **options
        )
        self.contexts.append(context)
        self.origins.add(_origin(address))
        page = context.new_page()
        page.set_default_timeout(60_000)  # others may use the machine too
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._hear)
        page.goto(address)
        return page

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(tuple(self.expected)):
            self.faults.append(message.text)

    @property
    def strangers(self) -> list[str]:
        """Requests to other places than those that the pages came from."""
        return [address for address in self.asked if _origin(address) not in self.origins | {"data://", "blob://"}]


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens an address in a new window (`Visits`). Afterwards: no script failed, nothing was written into the
    console, and no request left the place that the page came from."""
    visits = Visits(browser)
    yield visits
    for context in visits.contexts:
        context.close()
    assert not visits.faults, f"the page complained: {visits.faults}"
    assert not visits.strangers, f"requests left the page's origin: {visits.strangers}"


def _origin(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}"


@pytest.fixture(scope="session")
def site(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running `visling serve`, with three models of "vqa", one of which reads the words alone, and one of
    each of `TASKS`."""
    folder, names = tmp_path_factory.mktemp("served"), ["vqa", "words-alone", *TASKS]
    for name in names:
        recipe = FINETUNING["visualbert-vqa-scenes" if name == "words-alone" else f"visualbert-{name}-scenes"]()
        own = ["text_only=true"] if name == "words-alone" else []
        finetuning.finetune(
            configs.override(recipe, [*world.settings, "train.seed=7", *own]),
            folder / name,
            data=world.scenes,
            store=world.regions,
            init=world.pretrained,
            device="cpu",
        )
    runs = [world.vqa, *(folder / name for name in names)]
    options = [word for run in runs for word in ("--run", str(run))]
    server = subprocess.Popen(
        [sys.executable, "-m", "visling", "serve", *options, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with server:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if found := re.search(r"http://\S+", line):
                yield found[0]
                break
        else:
            pytest.fail(f"the server ended: {''.join(said)}")
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
