"""The gallery's index in a real browser, opened from the disk: filters, keys, the linked view, a thousand examples."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from fixtures.evaluated_runs import make_details, make_evaluated_run, make_images

from visling.analysis.gallery import GalleryRun, write_gallery
from visling.cli.gallery import open_to_ask
from visling.runs.evaluate import evaluate

SOON = 5.0
"""Seconds within which a thousand examples are shown on a busy machine; a second is usual."""


@pytest.fixture(scope="module")
def index(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gallery of the tiny VQA run with views."""
    folder = tmp_path_factory.mktemp("gallery")
    shutil.copytree(world.vqa, folder / "vqa")
    evaluate(folder / "vqa", split="test", device="cpu")
    run, asked = GalleryRun.read(folder / "vqa"), open_to_ask(folder / "vqa", "test", device="cpu")
    return write_gallery(run, folder / "out", asked=[asked], images=world.scenes / "images")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gallery of a hand-made run of 130 examples and another one, without views."""
    folder = tmp_path_factory.mktemp("compared")
    images = make_images(folder / "images", range(20))
    run = GalleryRun.read(make_evaluated_run(folder / "vqa", make_details(130), images=images))
    other = GalleryRun.read(make_evaluated_run(folder / "words", make_details(130, flip=10)))
    return write_gallery(run, folder / "out", other=other)


def read_ids(page: Any) -> list[str]:
    """Of the cards that are shown."""
    links = page.locator(".entry").evaluate_all("cards => cards.map(card => card.getAttribute('href'))")
    return [link.partition("=")[2] for link in links]


def test_filters_choose_count_and_are_in_the_address(visit: Any, compared: Path) -> None:
    page = visit(compared.as_uri())
    assert page.locator("#count").inner_text() == "130 of 130 examples, 97 right (75 %)"
    assert read_ids(page) == [f"q{number}" for number in range(60)], "a page has sixty"
    page.select_option("select[name=verdict]", "wrong")
    assert read_ids(page) == [f"q{number}" for number in range(0, 130, 4)]
    page.select_option("select[name=verdict]", "gained")
    assert page.locator("#count").inner_text().startswith("7 of 130 examples, 7 right")
    page.select_option("select[name=order]", "difference")
    assert read_ids(page) == [f"q{number}" for number in (129, 127, 126, 125, 123, 122, 121)], "the surer, the further"
    assert "verdict=gained" in page.url
    page.reload()
    assert page.locator("#count").inner_text().startswith("7 of 130")
    assert page.locator("select[name=order]").input_value() == "difference"
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("130 of 130 examples").wait_for()
    page.fill("input[name=words]", "THING 12")
    assert read_ids(page) == ["q12", "q112", *(f"q{number}" for number in range(120, 130))]
    page.fill("input[name=words]", "")
    page.locator("summary").click()
    page.get_by_role("button", name="verify", exact=True).click()
    assert page.locator("select[name=type]").input_value() == "verify"
    assert page.locator("#count").inner_text().startswith("44 of 130")


def test_pages_of_examples_are_turned(visit: Any, compared: Path) -> None:
    page = visit(compared.as_uri())
    page.get_by_role("button", name="Next").click()
    assert read_ids(page)[0] == "q60"
    assert "page=2" in page.url
    page.reload()
    assert read_ids(page)[0] == "q60"
    page.get_by_role("button", name="Next").click()
    assert read_ids(page) == [f"q{number}" for number in range(120, 130)]
    assert page.get_by_role("button", name="Next").is_disabled()
    page.select_option("select[name=verdict]", "right")
    assert read_ids(page)[0] == "q1", "a filter begins at the first page"


def test_arrows_walk_and_enter_opens_the_linked_view(visit: Any, index: Path) -> None:
    page = visit(index.as_uri())
    ids = read_ids(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"#example={ids[1]}"
    across = page.evaluate("window.visling_index.columns()")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"#example={ids[1 + across]}"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    view, head = page.locator("#view"), page.locator("#view > header")
    view.locator(".linked svg, .linked canvas").first.wait_for()
    entries = json.loads((index.parent / "examples.js").read_text()[len("window.visling_gallery = ") : -2])
    assert entries[1]["text"] in head.inner_text()
    assert f"example={ids[1]}" in page.url
    # The view is that of inspect.js: words and boxes are there, linked.
    assert page.evaluate("window.visling_index.controller.state !== undefined")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(f"**#example={ids[2]}*")
    assert entries[2]["text"] in head.inner_text()
    page.reload()
    view.locator(".linked svg, .linked canvas").first.wait_for()
    assert entries[2]["text"] in head.inner_text(), "the address leads back"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    assert not view.is_visible()
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"#example={ids[1]}"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "words"
    page.keyboard.type("no such words")
    assert page.locator("#count").inner_text().startswith("0 of 12")


def test_what_is_locked_in_a_view_is_freed_before_the_view_closes(visit: Any, index: Path) -> None:
    page = visit(index.as_uri())
    page.locator(".entry").first.click()
    view = page.locator("#view")
    view.locator(".linked svg, .linked canvas").first.wait_for()
    page.evaluate("window.visling_index.controller.set({lock: {document: 0, row: 0, kind: 'words', index: 1}})")
    page.keyboard.press("Escape")
    assert view.is_visible()
    page.evaluate("window.visling_index.controller.set({lock: null})")
    page.keyboard.press("Escape")
    assert not view.is_visible()


def test_examples_without_a_view_show_picture_and_answers(visit: Any, compared: Path) -> None:
    page = visit(f"{compared.as_uri()}#example=q3", size=(390, 800), scheme="dark")
    view = page.locator("#view")
    assert "what colour is thing 3?" in view.inner_text()
    assert "words: red 58 %" in view.inner_text()
    assert view.locator("li").all_inner_texts()[0].split() == ["red", "58", "%"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "a phone shows all of its width"
    view.get_by_role("button", name="Close").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_view_that_is_gone_is_said(browser: Any, index: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(index.parent, copy)
    (copy / "views" / "00001.js").unlink()
    page = browser.new_page()
    page.goto((copy / "index.html").as_uri())
    page.locator(".entry").first.click()
    page.get_by_text("This view cannot be shown: views/00001.js cannot be read.").wait_for()
    page.close()


def test_a_thousand_examples_stay_usable(visit: Any, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", range(0, 1000, 10))
    run = GalleryRun.read(make_evaluated_run(tmp_path / "vqa", make_details(1000), images=images))
    index = write_gallery(run, tmp_path / "out", examples=1000)
    began = time.monotonic()
    page = visit(index.as_uri())
    page.locator(".entry").nth(59).wait_for()
    assert time.monotonic() - began < SOON
    assert page.locator(".entry").count() == 60
    took = page.evaluate(
        """() => {
            const field = document.querySelector("select[name=verdict]");
            const began = performance.now();
            field.value = "wrong";
            field.dispatchEvent(new Event("input", {bubbles: true}));
            return performance.now() - began;
        }"""
    )
    assert page.locator("#count").inner_text().startswith("250 of 1000")
    assert took < 500, f"a filter took {took:.0f} ms"


def test_a_reader_without_scripts_has_a_list(browser: Any, compared: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(compared.as_uri())
    assert page.locator("noscript tr").count() == 131
    context.close()
