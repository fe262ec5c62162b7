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

    own = page.url
    page.locator("#examples label").first.click()
    ask(page, "how many things are there?")
    page.go_back()
    page.wait_for_selector(f".slot .name:text('{world.picture('train').name}')")
    wait(page)
    assert page.url == own, "while the page is open, the picture is still there"

    again = open_page_of_link(visit, own)
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


def test_a_link_is_of_what_is_on_the_screen(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    asked = page.url.split("&show=")[0]
    page.locator("#examples label").nth(1).click()
    page.get_by_label("Question", exact=True).fill("not asked yet")
    page.locator(".vl-answer").nth(1).click()
    assert page.url.startswith(asked)
    assert "answer=" in page.url


def test_a_server_without_an_interface_is_said(visit: Any, site: str) -> None:
    visit.expected.append("Failed to load resource: net::ERR_FAILED")
    page = open_page(visit, site)
    page.route("**/api/models", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("#message:not([hidden])")
    assert "The server does not answer" in page.locator("#message").inner_text()
    page.unroute("**/api/models")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#inspection > *")


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
    page.wait_for_url("**is+there+a+moon**", wait_until="commit")
    wait(page)
    assert page.locator("#status").inner_text().endswith(" %.")


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
    names = [name.get_attribute("title") for name in page.locator(".slot .name").all()]
    page.get_by_role("button", name="Right picture").first.click()
    page.locator("#examples label").nth(2).click()
    left, _ = [name.get_attribute("title") for name in page.locator(".slot .name").all()]
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
    scores = [float(text.replace("−", "-")) for text in page.locator(".ranking .score").all_inner_texts()]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    page.locator(".ranking button").nth(1).click()
    page.wait_for_selector("#inspection > *")
    wait(page)
    assert page.url.count("image=") == 1
    page.go_back()
    page.wait_for_selector("#inspection", state="hidden")
    assert page.url.count("image=") == 0


def test_an_expression_gets_a_box(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    choose_task(page, "referring")
    page.get_by_label("Expression").fill("the red star")
    page.get_by_role("button", name="Find it").click()
    wait(page)
    box = page.locator(".vl-mark-answer")
    assert box.count() == 1
    assert float(box.get_attribute("width")) > 1
    first = box.get_attribute("x"), box.get_attribute("y")
    page.locator(".vl-answer").nth(1).click()
    assert (box.get_attribute("x"), box.get_attribute("y")) != first, "another candidate is elsewhere"


def test_phrases_get_a_box_each(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    choose_task(page, "grounding")
    page.get_by_label("Sentence").fill("[the red star] is above [a ring]")
    page.get_by_role("button", name="Find them").click()
    wait(page)
    assert page.locator(".vl-answer .vl-name").all_inner_texts() == ["the red star", "a ring"]
    page.locator(".vl-answer").nth(1).click()
    assert "answer=a+ring" in page.url
    page.get_by_label("Sentence").fill("[the red star is above [a ring]")
    page.get_by_role("button", name="Find them").click()
    wait(page)
    assert "do not mark phrases: each is closed before the next" in page.locator("#message").inner_text()


def test_hovering_links_boxes_words_and_answers(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    item, strong = page.locator(".vl-item").nth(2), page.locator(".vl-box[stroke-width='4']")
    place, strongest = item.bounding_box(), strong.count()
    item.hover()
    assert item.bounding_box() == place, "what is hovered stays under the pointer"
    assert item.locator(".vl-name").inner_text() in page.locator(".vl-readout").inner_text()
    assert strong.count() == strongest + 1, "its box is emphasised in the picture"
    page.locator(".vl-sentence .vl-word").first.hover()
    assert strong.count() == strongest
    page.locator(".vl-answer").nth(1).click()
    assert page.locator(".vl-answer").nth(1).get_attribute("aria-pressed") == "true"
    assert "answer=" in page.url


def test_layer_head_and_direction_are_chosen_and_linked(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    page.locator(".vl-heads [data-cells='0.1']").first.click()
    assert "show=attention" in page.url
    assert "cells=0.1" in page.url
    page.locator(".vl-sentence .vl-word").first.hover()
    assert "looks at these boxes" in page.locator(".vl-readout").inner_text()
    one = page.locator(".vl-item .vl-number").all_inner_texts()
    page.locator(".vl-heads [data-cells='0.0']").first.click()
    page.locator(".vl-sentence .vl-word").first.hover()
    assert page.locator(".vl-item .vl-number").all_inner_texts() != one, "another head has other weights"
    page.get_by_role("button", name="boxes → words").click()

    again = open_page(visit, page.url)
    assert again.get_by_role("button", name="boxes → words").get_attribute("aria-pressed") == "true"
    assert again.get_by_label("Colours show").input_value() == "attention"


def test_two_models_stand_side_by_side_and_are_hovered_in_step(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    page.get_by_label("Compare").select_option(index=1)
    page.wait_for_selector(".vl-doc >> nth=1")
    wait(page)
    left, right = (page.locator(".vl-doc").nth(n) for n in range(2))
    assert left.bounding_box()["y"] == right.bounding_box()["y"]
    left.locator(".vl-sentence .vl-word").nth(1).hover()
    assert right.locator(".vl-sentence .vl-word").nth(1).evaluate("word => word.classList.contains('vl-active')")
    assert page.locator("#facts dt").all_inner_texts() == ["Model", "Task", "Run", "Weights"] * 2
    assert "second=" in page.url
    assert open_page(visit, page.url).locator(".vl-doc").count() == 2


def test_a_model_of_the_words_alone_stands_beside_one_that_sees(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    options = page.locator("#second option").all()
    (blind,) = [name for option in options if (name := option.get_attribute("value") or "").endswith("words-alone")]
    page.get_by_label("Compare").select_option(blind)
    page.wait_for_selector(".vl-doc >> nth=1")
    wait(page)
    assert "reads the words alone" in page.locator(".vl-doc").nth(1).inner_text()
    draw_box(page)
    assert page.locator("#parts button").all_inner_texts() == ["with a drawn box ×"]
    assert page.locator(".vl-doc").count() == 2


def take_away(page: Any, kind: str, number: int) -> str:
    """Take away a word or a box; returns its text."""
    unit = page.locator(".vl-sentence .vl-word" if kind == "word" else ".vl-item").nth(number)
    name = unit.locator("span").first.inner_text()
    unit.click()
    page.get_by_role("button", name="Take away").click()
    page.locator("#parts button", has_text=name).last.wait_for()
    wait(page)
    return str(name)


def test_what_is_taken_away_is_asked_again_and_put_back(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    words = page.locator(".vl-sentence .vl-word").count()
    boxes = page.locator(".vl-item:not(.vl-special)").count()
    before = page.locator("#status").inner_text()
    for number in (0, 0):  # the numbers of what is left are others
        take_away(page, "word", number)
    name = take_away(page, "box", 0)
    assert page.locator(".vl-sentence .vl-word").count() == words - 2
    assert page.locator(".vl-item:not(.vl-special)").count() == boxes - 1
    assert page.locator("#parts button").all_inner_texts()[2] == f"without {name} ×"
    assert "no_word=0.1&no_word=0.2&no_region=" in page.url
    rows = page.locator(".change tbody tr").all_inner_texts()
    assert rows
    assert all(len(row.split("\t")) == 4 for row in rows), "answer, before, now, change"

    again = open_page(visit, page.url)
    again.wait_for_selector("#parts button")
    wait(again)
    assert again.locator(".change tbody tr").all_inner_texts() == rows

    page.get_by_role("button", name="Undo: without", exact=False).first.click()
    wait(page)
    assert page.locator(".vl-sentence .vl-word").count() == words - 1
    page.get_by_role("button", name="undo all").click()
    wait(page)
    assert page.locator("#edit").is_hidden()
    assert page.locator("#status").inner_text() == before
    page.go_back()
    page.wait_for_selector("#parts button")


def draw_box(page: Any) -> None:
    """Draw a box into the first picture."""
    page.get_by_role("button", name="Draw a box").click()
    picture = page.locator(".vl-picture").first
    picture.scroll_into_view_if_needed()
    frame = picture.bounding_box()
    page.mouse.move(frame["x"] + 10, frame["y"] + 10)
    page.mouse.down()
    page.mouse.move(frame["x"] + 120, frame["y"] + 90, steps=3)
    page.mouse.up()
    page.wait_for_selector("#parts button")
    wait(page)


def test_a_box_is_drawn(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    boxes = page.locator(".vl-item:not(.vl-special)").count()
    draw_box(page)
    assert page.locator("#message").is_hidden(), page.locator("#message").inner_text()
    assert page.locator("#parts button").all_inner_texts() == ["with a drawn box ×"]
    assert page.locator(".vl-item:not(.vl-special)").count() >= boxes
    assert "box=0%2C" in page.url


def test_another_picture_is_compared_with_the_one_before(visit: Visit, site: str) -> None:
    page = open_page(visit, site)
    ask(page, "is there a star?")
    page.locator("#examples label").nth(1).click()
    page.get_by_role("button", name="Ask", exact=True).click()
    wait(page)
    assert page.locator("#difference summary").inner_text() == "Before and now: another picture"
    page.locator("#examples label").nth(0).click()
    ask(page, "what colour is the ring?")
    assert page.locator("#difference").is_hidden(), "two changes at once leave nothing to compare"
