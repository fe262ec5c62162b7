"""Takes the pictures of the served page that the documentation shows: a real browser, real runs.

    python docs/make_screenshots.py demo/small/visualbert/vqa demo/small/lxmert/vqa ...

Runs of other tasks are welcome: of those that are named, a picture is taken of each form that has one. Needs the extras
`serve` and `dev`, and Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
MOST_BYTES = 200_000
"""Of a picture."""


def main() -> None:
    """Serve the runs, and photograph the page in its states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one of the task vqa among them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "inspect", metavar="DIR")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with serve(options.runs) as address, sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        switches = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=switches)
        for name, page in take_pictures(browser, address):
            target = options.out / f"serve-{name}.png"
            page.screenshot(path=target)
            size = target.stat().st_size
            assert size <= MOST_BYTES, f"{target} has {size:,} bytes; expected at most {MOST_BYTES:,}"
            print(f"{target}: {size:,} bytes")
        browser.close()


@contextmanager
def serve(runs: list[Path]) -> Iterator[str]:
    """The address of a server of these runs."""
    options = [word for run in runs for word in ("--run", str(run))]
    command = [sys.executable, "-m", "visling", "serve", *options, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found, "the server did not start; it says why above"
        yield found[0]
        server.send_signal(signal.SIGINT)


def take_pictures(browser: Browser, address: str) -> Iterator[tuple[str, Page]]:
    """The page in each of its states, with the state's name."""
    for scheme in ("light", "dark"):
        page = open_page(browser, address, scheme, DESKTOP)
        yield ("page" if scheme == "light" else "page-dark"), page
        page = open_page(browser, address, scheme, PHONE)
        page.get_by_role("button", name="Ask", exact=True).tap()
        wait(page)
        yield ("phone" if scheme == "light" else "phone-dark"), page

    page = open_page(browser, address, "light", DESKTOP)
    cells = page.locator(".vl-heads td .vl-cell[data-cells]:not([data-cells$='*'])")
    weights = [float(text) for text in cells.all_inner_texts()]
    cells.nth(weights.index(max(weights))).click()
    page.get_by_label("lines").check()
    page.locator(".vl-pictures").first.evaluate("part => scrollBy(0, part.getBoundingClientRect().top - 200)")
    page.locator(".vl-sentence .vl-word").nth(4).hover()
    yield "heads", page

    page = open_page(browser, address, "light", DESKTOP)
    page.locator(".vl-item").first.click()
    page.get_by_role("button", name="Take away").click()
    wait(page)
    page.mouse.move(0, 0)
    yield "asked-again", page

    page = open_page(browser, address, "light", DESKTOP)
    if page.locator("#second option").count() > 1:
        page.get_by_label("Compare").select_option(index=1)
        wait(page)
        yield "two-models", page

    for form, task in (
        ("pair", "nlvr2"),
        ("box", "referring"),
        ("phrases", "grounding"),
        ("choices", "vcr"),
        ("search", "retrieval"),
    ):
        page = open_page(browser, address, "light", DESKTOP)
        names = page.locator("#run option").evaluate_all("options => options.map(option => option.value)")
        run = next((name for name in names if name.endswith(f"/{task}")), None)
        if run is not None:
            page.get_by_label("Model", exact=True).select_option(run)
            wait(page)
            yield form, page


def open_page(browser: Browser, address: str, scheme: Any, window: dict[str, Any]) -> Page:
    """The page with the answer to its first question."""
    page = browser.new_context(color_scheme=scheme, reduced_motion="reduce", **window).new_page()
    page.goto(address)
    page.wait_for_selector("#inspection > *")
    wait(page)
    return page


def wait(page: Page) -> None:
    """Until the answer to what was asked is shown."""
    page.wait_for_selector("#result[aria-busy=false]")
    page.wait_for_load_state("networkidle")


if __name__ == "__main__":
    main()
