"""The page of `visling serve` as its readers use it: with a pointer, with keys alone, on a phone, by a link."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Visit = Callable[..., Any]


def wait(page: Any) -> None:
    """Until the answer to what was asked is shown, or why there is none."""
    page.wait_for_selector("#result[aria-busy=false]")


def open_page(visit: Visit, address: str, **options: Any) -> Any:
    """The page with the answer to its first question."""
    page = visit(address, **options)
    page.wait_for_selector("#inspection > *")
    wait(page)
    return page


def ask(page: Any, text: str) -> None:
    """Ask something, as a reader does."""
    page.get_by_label("Question", exact=True).fill(text)
    page.get_by_role("button", name="Ask", exact=True).click()
    wait(page)


def choose_task(page: Any, task: str) -> None:
    """Choose the first model of a task."""
    option = (
        page.locator("#run option")
        .filter(has_text=f"/{task}")
        .or_(page.locator("#run option").filter(has_text=f"· {task}"))
    )
    page.get_by_label("Model", exact=True).select_option(option.first.get_attribute("value"))
    wait(page)


def width_beyond(page: Any) -> int:
    """Pixels by which the page is wider than its window."""
    found: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return found


def test_the_first_question_is_answered_at_once(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    assert page.get_by_label("Question", exact=True).input_value().endswith("?")
    facts = page.locator("#facts").inner_text()
    assert "VisualBERT" in facts
    assert "vqa" in facts
    assert "may be wrong" in page.locator(".about").inner_text()
    assert page.evaluate("history.length") == 2, "nothing but about:blank and the page"


def test_an_upload_is_asked_about(visit: Visit, site: str, world: Any) -> None:
    page = open_page(visit, site)
    page.locator("#file").set_input_files(str(world.picture("train")))
    page.wait_for_selector(f".slot .name:text('{world.picture('train').name}')")
    ask(page, "how many things are there?")
    assert "how+many+things" in page.url
    assert page.locator("#message").is_hidden()
    page.get_by_role("button", name="Copy link").click()
    page.wait_for_selector("#copy-link:has-text('your own picture is not in it')")

    again = open_page_of_link(visit, page.url)
    assert "cannot carry pictures of your own" in again.locator("#message").inner_text()


def open_page_of_link(visit: Visit, address: str) -> Any:
    """The page of a link that has no answer to show."""
    page = visit(address)
    page.wait_for_selector("#message:not([hidden])")
    return page


def test_a_broken_picture_is_refused_in_the_words_of_the_server(visit: Visit, site: str, tmp_path: Path) -> None:
    page = open_page(visit, site)
    before = page.locator(".slot .name").inner_text()
    (tmp_path / "broken.png").write_bytes(b"this is no picture")
    page.locator("#file").set_input_files(str(tmp_path / "broken.png"))
    page.wait_for_selector("#message:not([hidden])")
    assert "cannot read image upload" in page.locator("#message").inner_text()
    assert page.evaluate("document.activeElement.id") == "message"
    assert page.locator(".slot .name").inner_text() == before, "the picture that was chosen stays"
    ask(page, "is there a star?")
    assert page.locator("#message").is_hidden()


def test_pictures_are_dropped_and_pasted(visit: Visit, site: str, world: Any) -> None:
    page = open_page(visit, site)
    bytes_ = list(world.picture("val").read_bytes())
    transfer = page.evaluate_handle(
        """(bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
          return transfer;
        }""",
        bytes_,
    )
    page.dispatch_event("#result", "drop", {"dataTransfer": transfer})
    page.wait_for_selector(".slot .name:text('dropped.png')")
    page.evaluate(
        """(bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
          document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
        }""",
        bytes_,
    )
    page.wait_for_selector(".slot .name:text('pasted.png')")
    ask(page, "is there a ring?")
    assert page.locator("#message").is_hidden()


def test_an_empty_question_is_refused_as_on_the_command_line(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    ask(page, " ")
    assert "the question is empty" in page.locator("#message").inner_text()


def test_a_server_that_is_gone_is_said_and_asked_again(visit: Any, site: str) -> None:
    visit.expected.append("Failed to load resource: net::ERR_FAILED")
    page = open_page(visit, site)
    page.route("**/api/inspect", lambda route: route.abort())
    ask(page, "what is red?")
    assert "The server does not answer" in page.locator("#message").inner_text()
    page.unroute("**/api/inspect")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#message", state="hidden")
    wait(page)
    assert "what+is+red" in page.url


def test_a_running_question_is_cancelled(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    shown = page.url
    page.route("**/api/inspect", lambda route: None)  # never answered
    page.get_by_label("Question", exact=True).fill("what is blue?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Cancel").click()
    wait(page)
    assert page.locator("#status").inner_text() == "Cancelled."
    assert page.url == shown
    page.unroute("**/api/inspect")
    ask(page, "what is blue?")
    assert "what+is+blue" in page.url


def test_a_link_brings_back_what_was_asked_and_seen(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    page.locator("#examples input").nth(1).check(force=True)
    ask(page, "how many rings are there?")
    first = page.url
    ask(page, "what colour is the star?")
    assert page.url != first

    page.go_back()
    page.wait_for_selector("#text")
    wait(page)
    assert page.url == first
    assert page.get_by_label("Question", exact=True).input_value() == "how many rings are there?"

    again = open_page(visit, first)
    assert again.get_by_label("Question", exact=True).input_value() == "how many rings are there?"
    assert again.locator("#examples input").nth(1).is_checked()
    assert again.locator("#status").inner_text() == page.locator("#status").inner_text()


def test_a_link_to_a_run_that_is_not_served_says_so(visit: Visit, site: str) -> None:
    page = open_page_of_link(visit, f"{site}#run=gone/away&image=example-1&text=why")
    assert "the run gone/away, which is not served here" in page.locator("#message").inner_text()


def test_keys_alone_are_enough(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    keys = page.keyboard
    keys.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    keys.press("Enter")
    keys.press("Shift+Tab")
    reached = []
    for _ in range(40):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        if reached[-1] == "example":
            break
        keys.press("Shift+Tab")
    assert reached[-1] == "example", reached
    assert "text" in reached
    keys.press("ArrowRight")
    assert page.locator("#examples input").nth(1).is_checked()
    while page.evaluate("document.activeElement.id") != "text":
        keys.press("Tab")
    keys.press("Control+A")
    keys.type("is there a moon?")
    keys.press("Enter")
    page.wait_for_url("**is+there+a+moon**")
    wait(page)
    assert page.locator("#status").inner_text().endswith("%.")


def test_every_control_has_a_name(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, [tabindex='0']")].filter((element) =>
          element.checkVisibility() && !element.textContent.trim() && !element.getAttribute("aria-label") &&
          !element.getAttribute("aria-labelledby") && !element.labels?.length && !element.title
        ).map((element) => element.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    assert page.locator("img:not([alt])").count() == 0
    landmarks = [page.get_by_role(role).count() for role in ("banner", "form", "main", "complementary")]
    assert landmarks == [1, 1, 1, 1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_reader_s_and_can_be_changed(visit: Visit, site: str, scheme: str) -> None:
    page = open_page(visit, site, scheme=scheme)

    def is_dark() -> bool:
        red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        return int(red) < 128

    assert is_dark() == (scheme == "dark")
    switch = page.get_by_role("switch", name="Dark")
    assert switch.get_attribute("aria-checked") == json.dumps(scheme == "dark")
    switch.click()
    assert is_dark() == (scheme == "light")
    page.reload()
    page.wait_for_selector("#inspection > *")
    assert is_dark() == (scheme == "light"), "the choice is kept"


@pytest.mark.parametrize("width", [360, 390, 768])
def test_nothing_is_wider_than_a_narrow_window(visit: Visit, site: str, width: int) -> None:
    page = open_page(visit, site, size=(width, 800))
    assert width_beyond(page) <= 0
    for task in ("nlvr2", "referring", "grounding", "vcr", "retrieval"):
        choose_task(page, task)
        page.get_by_role("button", name="Cancel").wait_for(state="detached")
        assert width_beyond(page) <= 0, task


def test_two_pictures_are_judged(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    choose_task(page, "nlvr2")
    assert page.locator(".slot").count() == 2
    names = page.locator(".slot .name").all_inner_texts()
    page.get_by_role("button", name="Right picture").first.click()
    page.locator("#examples label").nth(2).click()
    left, _ = page.locator(".slot .name").all_inner_texts()
    assert left == names[0], "only the chosen slot changes"
    page.get_by_label("Sentence").fill("both pictures have a star")
    page.get_by_role("button", name="Judge").click()
    wait(page)
    assert page.locator("#status").inner_text().split(",")[0].lower() in ("true", "false")
    assert page.url.count("image=") == 2


def test_choices_are_entered_and_ranked(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    choose_task(page, "vcr")
    page.get_by_label("Question", exact=True).fill("what is there?")
    texts = ["a red star", "a blue moon", "nothing at all"]
    while page.locator("#choice-list li").count() > 2:
        page.get_by_role("button", name="Remove choice 1").click()
    page.get_by_role("button", name="Add a choice").click()
    for number, text in enumerate(texts, 1):
        page.get_by_label(f"Choice {number}", exact=True).fill(text)
    page.get_by_role("button", name="Choose").click()
    wait(page)
    assert page.locator("#status").inner_text().split(",")[0] in texts
    shown = page.locator("#inspection").inner_text()
    assert all(text in shown for text in texts)


def test_a_caption_searches_the_folder(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    choose_task(page, "retrieval")
    assert page.locator("#pictures").is_hidden()
    page.get_by_label("Caption").fill("two red stars")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector(".ranking li")
    wait(page)
    scores = [float(text) for text in page.locator(".ranking .score").all_inner_texts()]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    page.locator(".ranking button").nth(1).click()
    page.wait_for_selector("#inspection > *")
    wait(page)
    assert page.url.count("image=") == 1
    page.go_back()
    page.wait_for_selector("#inspection", state="hidden")
    assert page.url.count("image=") == 0
