"""Make the pictures of docs/inspect.md from what `make demo MODEL=visualbert` and `make demo MODEL=lxmert` leave.

python docs/images/inspect/make.py demo/small

Runs the commands of the page in a folder that is removed afterwards, and photographs their pages with Chromium. Needs
playwright (extra `dev`) and the extra `serve`; a minute.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from playwright.sync_api import sync_playwright

import visling

OUT = Path(__file__).parent
VISUALBERT, LXMERT = "demo/small/visualbert/vqa", "demo/small/lxmert/vqa"
PICTURE, QUESTION = "demo/small/scenes/images/test/scene_000000002251.png", "what color is the cross?"
MOST_BYTES = 200_000


def run(folder: Path, *words: str) -> None:
    """Run a command of visling in a folder."""
    subprocess.run([sys.executable, "-m", "visling", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def serve(folder: Path, *runs: str) -> Iterator[str]:
    """Address of a page that serves runs."""
    options = [word for one in runs for word in ("--run", one)]
    command = [sys.executable, "-m", "visling", "serve", *options, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            (address,) = re.findall(r"http://\S+", said)
            yield address
        finally:
            server.terminate()


class Camera:
    """Takes photographs of pages."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, address: str | Path, *, width: int = 1180, scheme: Literal["light", "dark"] = "light") -> Any:
        """A page in a window of this width in pixels."""
        context = self.browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return page

    def take(self, page: Any, name: str, *, height: int = 900) -> None:
        """Write what the window shows."""
        page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        save(Image.open(io.BytesIO(page.screenshot())), name)


def save(picture: Image.Image, name: str) -> None:
    """Write a picture, small enough to be kept with the code."""
    target = OUT / f"{name}.png"
    picture = picture.convert("RGB")
    picture.save(target, optimize=True)
    if target.stat().st_size > MOST_BYTES:
        picture.quantize(256).save(target, optimize=True)
    size = target.stat().st_size
    print(f"{target}: {picture.width} x {picture.height}, {size:,} bytes")
    if size > MOST_BYTES:
        sys.exit(f"{target} has more than {MOST_BYTES:,} bytes: show less.")


def draw_answers(folder: Path) -> None:
    """What Python draws."""
    model = visling.load(folder / VISUALBERT)
    save(model.answer(folder / PICTURE, QUESTION).draw(), "answer")


def show_inspection(folder: Path, camera: Camera) -> None:
    """The page of one question: relevance, a head, and two models."""
    run(folder, "inspect", VISUALBERT, PICTURE, QUESTION, "--out", "page.html")
    camera.take(camera.open(folder / "page.html"), "inspect", height=1640)
    run(folder, "inspect", VISUALBERT, PICTURE, QUESTION, "--out", "head.html", "--layer", "2", "--head", "0")
    page = camera.open(folder / "head.html", scheme="dark")
    page.locator(".vl-word", has_text="cross").first.click()
    page.get_by_label("lines").check()
    camera.take(page, "head", height=1060)
    run(folder, "inspect", VISUALBERT, LXMERT, PICTURE, QUESTION, "--out", "two.html")
    camera.take(camera.open(folder / "two.html"), "two-models", height=1060)


def show_data_set(folder: Path, camera: Camera) -> None:
    """What is said of a whole split: the gallery, states, heads that ground phrases."""
    data = ["--data", "demo/small/scenes", "--store", "demo/small/regions"]
    blind = "demo/small/visualbert/question-only"
    images = ["--images", "demo/small/scenes"]
    run(folder, "gallery", VISUALBERT, "--compare", blind, "--examples", "60", "--out", "gallery", *data, *images)
    camera.take(camera.open(folder / "gallery" / "index.html"), "gallery")
    run(folder, "analysis", "states", VISUALBERT, "--examples", "200", "--out", "states", *data)
    run(folder, "analysis", "project", "states", "--layer", "layers.2", "--out", "map.html")
    page = camera.open(folder / "map.html", width=1000)
    page.get_by_label("by region class").check()
    camera.take(page, "states", height=830)
    run(folder, "analysis", "alignment", LXMERT, "--examples", "500", "--out", "alignment", *data)
    page = camera.open(folder / "alignment" / "alignment.html", width=1000)
    page.locator("svg").first.evaluate("drawing => drawing.parentElement.scrollIntoView()")
    camera.take(page, "alignment", height=420)


def show_served_page(folder: Path, camera: Camera) -> None:
    """The served page, on a desk and on a phone."""
    with serve(folder, VISUALBERT, LXMERT) as address:
        page = camera.open(address)
        page.locator(".vl-answer").first.wait_for()  # the page opens with an answered question
        page.locator("#text").fill(QUESTION)
        page.locator("#submit").click()
        page.locator(".vl-answer .vl-name", has_text="orange").first.wait_for()
        page.locator(".vl-item", has_text="cross").first.click()
        page.locator(".vl-editor button").first.click()
        page.locator("#difference").wait_for()
        camera.take(page, "serve")
        phone = camera.open(address, width=390, scheme="dark")
        phone.locator(".vl-answer").first.wait_for()
        phone.locator(".vl-doc").scroll_into_view_if_needed()
        camera.take(phone, "serve-phone", height=844)


def main() -> None:
    """Make every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder that the demos left, such as demo/small")
    demo = parser.parse_args().demo.resolve()
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        (folder / "demo").mkdir()
        (folder / "demo" / "small").symlink_to(demo, target_is_directory=True)
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-background-networking"]
        )
        camera = Camera(browser)
        draw_answers(folder)
        show_inspection(folder, camera)
        show_data_set(folder, camera)
        show_served_page(folder, camera)
        browser.close()


if __name__ == "__main__":
    main()
