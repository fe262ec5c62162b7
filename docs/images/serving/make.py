"""Make the pictures of docs/serving.md: a real browser, real runs.

python docs/images/serving/make.py RUN...

The first two runs are of the task vqa; runs of nlvr2, referring, vcr and retrieval are shown in their forms. Needs
playwright (extra `dev`), the extra `serve` and Chromium.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

OUT = Path(__file__).parent
FORMS = {"pair": "nlvr2", "box": "referring", "choices": "vcr", "search": "retrieval"}
"""Picture -> task of the run that it shows."""
MOST_BYTES = 200_000
"""Of a picture; it is kept with the code."""


def main() -> None:
    """Serve the runs, and photograph the page in its states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    with serve(parser.parse_args().runs) as address, sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        switches = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=switches)
        for name, page in take_pictures(browser, address):
            save(page.screenshot(), OUT / f"{name}.png")
        browser.close()


def save(picture: bytes, target: Path) -> None:
    """Write a picture; colours are kept, since questions are about them."""
    Image.open(io.BytesIO(picture)).convert("RGB").save(target, optimize=True)
    size = target.stat().st_size
    print(f"{target}: {size:,} bytes")
    if size > MOST_BYTES:
        sys.exit(f"{target} has more than {MOST_BYTES:,} bytes: show less.")


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
    page = open_page(browser, address)
    yield "page", page
    page.get_by_label("Compare").select_option(index=1)
    wait(page)
    yield "two-models", page

    page = open_page(browser, address)
    page.locator(".vl-item").first.click()
    page.get_by_role("button", name="Take away").click()
    wait(page)
    page.mouse.move(0, 0)
    yield "asked-again", page

    for picture, task in FORMS.items():
        page = open_page(browser, address)
        names = page.locator("#run option").evaluate_all("options => options.map(option => option.value)")
        page.get_by_label("Model", exact=True).select_option(next(name for name in names if name.endswith(f"/{task}")))
        wait(page)
        yield picture, page


def open_page(browser: Browser, address: str) -> Page:
    """The page with the answer to its first question."""
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light", reduced_motion="reduce")
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
