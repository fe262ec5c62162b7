"""The page of an inspection in a real browser, opened from the disk with the network off."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from visling import api
from visling.analysis.inspection_page import write_page

QUESTION = "what colour is the <b>small</b> star?"
Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def document(world: Any) -> Any:
    model = api.load(world.vqa, device="cpu")
    return json.loads(json.dumps(model.inspect(world.picture(), QUESTION).to_json()))


@pytest.fixture
def page(document: Any, visit: Visit, tmp_path: Path) -> Any:
    write_page(tmp_path / "page.html", [document])
    return visit(f"file://{tmp_path}/page.html", offline=True)


def large_document(boxes: int = 100, words: int = 20, layers: int = 12, heads: int = 12) -> dict[str, Any]:
    """A document of random numbers in the sizes of the published models."""
    rng = np.random.default_rng(0)
    sizes = {"text": words + 2, "regions": boxes}
    corners = rng.uniform(0, 560, (boxes, 2))
    named = ["[CLS]", *(f"word{n}" for n in range(words)), "[SEP]"]

    def scores() -> dict[str, list[float]]:
        return {"words_tokens": rng.random(words + 2).tolist(), "regions": rng.random(boxes).tolist()}

    def attend(start: str, end: str) -> dict[str, Any]:
        data = rng.integers(0, 256, heads * sizes[start] * sizes[end], dtype=np.uint8)
        packed = base64.b64encode(data.tobytes()).decode()
        return {"heads": heads, "from": sizes[start], "to": sizes[end], "data": packed}

    directions = [(start, end) for start in sizes for end in sizes]
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "gray").save(picture, "PNG")
    row = {
        "label": "",
        "image": [0],
        "words": [
            {"text": text, "tokens": [n], "pieces": [text], "special": text.startswith("[")}
            for n, text in enumerate(named)
        ],
        "regions": [
            {"name": f"thing {n}", "box": [x, y, x + 80, y + 60], "image": 0, "confidence": 0.5, "special": False}
            for n, (x, y) in enumerate(corners.tolist())
        ],
        "attention": {
            "layers": [
                {"name": f"layers.{n}", "directions": {f"{a}_to_{b}": attend(a, b) for a, b in directions}}
                for n in range(layers)
            ]
        },
        "statistics": {},
    }
    return {
        "format": "visling-inspection-1",
        "model": {"family": "visualbert", "task": "vqa", "name": "large", "checkpoint": "0" * 12, "command": "make"},
        "question": "a long question",
        "choices": [],
        "notice": "",
        "images": [
            {
                "width": 640,
                "height": 640,
                "src": f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}",
            }
        ],
        "scale": 1.0,
        "rows": [row],
        "answers_are": "alternatives",
        "answers": [
            {"text": f"answer {n}", "probability": 0.1, "box": None, "region": None, "truth": None} for n in range(10)
        ],
        "truth": None,
        "relevance": {"relevance": [[scores()] for _ in range(10)]},
        "against": [],
        "removal": None,
        "leave_one_out": None,
    }


def open_documents(visit: Visit, folder: Path, documents: list[Any], fragment: str = "", **options: Any) -> Any:
    write_page(folder / "page.html", documents)
    return visit(f"file://{folder}/page.html#{fragment}", **options)


def read_list(page: Any) -> list[str]:
    """The number beside each box, in the order of the document."""
    return page.evaluate(
        "[...document.querySelectorAll('.vl-item')].sort((a, b) => a.dataset.index - b.dataset.index)"
        ".map((row) => row.querySelector('.vl-number').textContent)"
    )


def read_words(page: Any) -> dict[str, str]:
    return {
        word.locator("span").inner_text(): word.locator("small").text_content()
        for word in page.locator(".vl-sentence .vl-word").all()
    }


def assert_numbers(shown: Sequence[str], expected: Any) -> None:
    """The page shows these values, with the digits that it shows."""
    read = [0.0 if text[0] in "<>" else float(text.replace("−", "-")) for text in shown]
    for found, value in zip(read, np.asarray(expected, float).tolist(), strict=True):
        assert found == pytest.approx(value, abs=0.0051 if abs(value) >= 0.1 else 0.001)


def weights(document: Any, direction: str, layer: int, head: int) -> Any:
    """(M, N) of one head."""
    part = document["rows"][0]["attention"]["layers"][layer]["directions"][direction]
    levels = np.frombuffer(base64.b64decode(part["data"]), np.uint8).reshape(part["heads"], part["from"], part["to"])
    return levels[head] / 255 * document["scale"]


def number_of(document: Any, text: str) -> int:
    return next(n for n, word in enumerate(document["rows"][0]["words"]) if word["text"] == text)


class _Links(HTMLParser):
    """Collects every address that a page names, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "poster")]
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""


def test_nothing_is_asked_of_the_outside(document: Any, visit: Visit, tmp_path: Path) -> None:
    """Neither by its text nor by its script: the fixture fails on a request, and the network is off."""
    page = open_documents(visit, tmp_path, [document], offline=True)
    links = _Links()
    links.feed((tmp_path / "page.html").read_text())
    assert links.addresses
    assert all(address.startswith("data:") for address in links.addresses)
    assert links.policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[^']+'$", links.policy)
    page.locator(".vl-word").first.hover()
    assert page.locator(".vl-verdict").inner_text()


def test_the_policy_forbids_requests(browser: Any, document: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", [document])
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/page.html")
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => '', (error) => error.message)") == "Failed to fetch"
    refused = page.evaluate("""new Promise((resolve) => {
        document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
        document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/a.png" }));
    })""")
    assert refused == "img-src"
    page.close()


def test_a_question_is_text_and_not_markup(page: Any) -> None:
    assert page.locator(".vl h2").inner_text() == QUESTION
    assert page.locator("h2 b").count() == 0


def test_the_first_sight_names_what_decided(page: Any, document: Any) -> None:
    row, scores = document["rows"][0], document["relevance"]["relevance"][0][0]
    best = row["regions"][int(np.argmax(scores["regions"]))]["name"]
    verdict = page.locator(".vl-verdict").inner_text()
    assert document["answers"][0]["text"] in verdict
    assert best in verdict
    assert best in page.locator(".vl-picture").get_attribute("aria-label")
    assert page.locator(".vl-item .vl-name").first.inner_text() == best, "the list begins with the strongest"


def test_hovering_a_word_shows_where_it_looks_and_leaving_ends_it(page: Any, document: Any) -> None:
    page.locator("select").first.select_option("attention")
    page.locator(".vl-heads [data-cells='0.1']").click()
    before = read_list(page)
    page.locator(".vl-word", has_text="star").hover()
    expected = weights(document, "text_to_regions", 0, 1)[number_of(document, "star")]
    assert_numbers(read_list(page), expected)
    assert "this word looks at these boxes" in page.locator(".vl-readout").inner_text()
    page.mouse.move(5, 5)
    assert read_list(page) == before


def test_hovering_a_box_shows_which_words_look_at_it(page: Any, document: Any) -> None:
    page.locator("select").first.select_option("attention")
    page.locator(".vl-heads [data-cells='0.0']").click()
    page.locator(".vl-item").nth(1).hover()
    column = int(page.locator(".vl-item").nth(1).get_attribute("data-index"))
    expected = weights(document, "text_to_regions", 0, 0)[number_of(document, "star"), column]
    assert_numbers([read_words(page)["star"]], [expected])
    assert page.locator(".vl-item.vl-active").count() == 1


def test_a_click_locks_and_a_second_one_or_escape_frees(page: Any) -> None:
    word = page.locator(".vl-word", has_text="star")
    word.click()
    page.mouse.move(5, 5)
    assert word.get_attribute("aria-pressed") == "true"
    assert "Without “star”" in page.locator(".vl-without").inner_text()
    assert "lock=0.0.words." in page.url
    word.click()
    page.mouse.move(5, 5)
    assert word.get_attribute("aria-pressed") == "false"
    word.click()
    page.keyboard.press("Escape")
    assert word.get_attribute("aria-pressed") == "false"
    assert "lock=" not in page.url


def test_a_click_on_a_box_in_the_picture_locks_its_row(page: Any) -> None:
    hit = page.locator(".vl-hit").last
    number = int(hit.get_attribute("data-index"))
    hit.click()
    assert page.locator(f".vl-item[data-index='{number}']").get_attribute("aria-pressed") == "true"


def test_without_a_region_the_answers_are_those_of_the_model_asked_again(page: Any, document: Any) -> None:
    page.locator(".vl-item").first.hover()
    number = int(page.locator(".vl-item").first.get_attribute("data-index"))
    changed = document["leave_one_out"]["rows"][0]["regions"][number]
    text = page.locator(".vl-without").inner_text()
    assert f"{changed['values'][0] * 100:.{1 if 0 < changed['values'][0] < 0.1 else 0}f} %" in text


def test_another_answer_has_its_own_words_and_boxes(page: Any, document: Any) -> None:
    first = read_list(page)
    page.locator(".vl-answer").nth(1).click()
    page.mouse.move(5, 5)
    scores = document["relevance"]["relevance"][1][0]["regions"]
    assert_numbers(read_list(page), scores)
    assert read_list(page) != first
    assert page.locator(".vl-answer").nth(1).get_attribute("aria-pressed") == "true"


def test_why_one_answer_and_not_another(page: Any, document: Any) -> None:
    other = document["answers"][1]["text"]
    page.get_by_label("Why not").select_option(other)
    one, two = (document["relevance"]["relevance"][n][0]["regions"] for n in (0, 1))
    assert_numbers(read_list(page), np.subtract(one, two))


def test_evidence_against_is_shown_apart(page: Any, document: Any) -> None:
    page.get_by_role("button", name="against it").click()
    scores = document["against"][0][0]["regions"]
    assert_numbers(read_list(page), np.negative(scores))


def test_every_method_is_in_one_menu(page: Any, document: Any) -> None:
    menu = page.locator("select").first
    values = [option.get_attribute("value") for option in menu.locator("option").all()]
    assert values == [*document["relevance"], "leave_one_out", "attention"]
    for value in values:
        menu.select_option(value)
        assert len(read_list(page)) == len(document["rows"][0]["regions"])
        caution = page.locator(".vl-caution").inner_text()
        assert ("Attention is not an explanation" in caution) == (value in ("attention", "raw_attention", "rollout"))


def test_two_clicks_from_the_map_of_heads_to_the_picture(page: Any, document: Any) -> None:
    page.locator(".vl-heads [data-cells='0.1']").click()
    page.locator(".vl-word", has_text="star").click()
    expected = weights(document, "text_to_regions", 0, 1)[number_of(document, "star")]
    best = document["rows"][0]["regions"][int(np.argmax(expected))]["name"]
    assert best in page.locator(".vl-readout").inner_text()
    assert page.locator(".vl-labels text", has_text=best[:8]).count() == 1


def test_several_heads_are_joined_by_their_mean_or_maximum(page: Any, document: Any) -> None:
    page.locator(".vl-heads [data-cells='0.0']").click()
    page.locator(".vl-heads [data-cells='0.1']").click(modifiers=["Shift"])
    word = number_of(document, "star")
    page.locator(".vl-word", has_text="star").click()
    both = [weights(document, "text_to_regions", 0, head)[word] for head in (0, 1)]
    for button, joined in (("mean", np.mean(both, 0)), ("maximum", np.max(both, 0))):
        page.get_by_role("button", name=button, exact=True).click()
        assert_numbers(read_list(page), joined)


def test_the_map_of_heads_has_the_named_quantities(page: Any, document: Any) -> None:
    for quantity in ("entropy", "mass"):
        page.locator(".vl-menus select").select_option(quantity)
        values = document["rows"][0]["statistics"][quantity]["text_to_regions"]["layers.0"]
        for head, value in enumerate(values):
            title = page.locator(f"td [data-cells='0.{head}']").get_attribute("title")
            assert title.startswith(f"layer 0, head {head}: ")
            assert_numbers([title.rpartition(": ")[2]], [value])


def test_the_map_of_heads_shows_which_head_looks_at_the_selection(page: Any, document: Any) -> None:
    page.locator(".vl-menus select").select_option("selected")
    page.locator(".vl-word", has_text="star").click()
    regions = [not region["special"] for region in document["rows"][0]["regions"]]
    for head in (0, 1):
        expected = weights(document, "text_to_regions", 0, head)[number_of(document, "star")][regions].max()
        title = page.locator(f"td [data-cells='0.{head}']").get_attribute("title")
        assert_numbers([title.rpartition(": ")[2]], [expected])


def test_pieces_of_words_are_shown_on_demand(world: Any, visit: Visit, tmp_path: Path) -> None:
    document = api.load(world.vqa, device="cpu").inspect(world.picture(), "is a zebra red?", removal=False).to_json()
    (split,) = [word for word in document["rows"][0]["words"] if len(word["tokens"]) > 1]
    page = open_documents(visit, tmp_path, [document])
    whole = page.locator(".vl-word").count()
    scores = document["relevance"]["relevance"][0][0]["words_tokens"]
    assert_numbers([read_words(page)[split["text"]]], [sum(scores[token] for token in split["tokens"])])
    page.get_by_label("word pieces").check()
    assert page.locator(".vl-word").count() == whole + len(split["tokens"]) - 1
    assert_numbers([read_words(page)[split["pieces"][0]]], [scores[split["tokens"][0]]])


def test_the_rest_of_the_picture_is_darkened_on_demand(page: Any, document: Any) -> None:
    assert page.locator(".vl-shade rect").count() == 0
    page.get_by_label("darken the rest").check()
    holes = page.locator(".vl-shade mask rect").count() - 1
    assert holes == sum(not region["special"] for region in document["rows"][0]["regions"])


def test_what_is_right_is_marked(document: Any, visit: Visit, tmp_path: Path) -> None:
    known = json.loads(json.dumps(document))
    for number, answer in enumerate(known["answers"]):
        answer["truth"] = number == 1
    known["truth"] = {"text": [known["answers"][1]["text"]], "boxes": [[10, 10, 60, 50]]}
    page = open_documents(visit, tmp_path, [known])
    assert page.locator(".vl-mark-truth").count() == 1
    assert page.locator(".vl-answer b").all_inner_texts()[:2] == ["✗", "✓"]


def test_lines_link_words_and_boxes(page: Any) -> None:
    page.locator(".vl-heads [data-cells='0.1']").click()
    assert page.locator(".vl-lines path").count() == 0
    page.get_by_label("lines").check()
    assert page.locator(".vl-lines path").count() > 0


def test_thumbnails_hold_a_pixel_for_each_pair(page: Any, document: Any) -> None:
    page.get_by_label("thumbnails of every head").check()
    part = document["rows"][0]["attention"]["layers"][0]["directions"]["text_to_regions"]
    assert page.locator(".vl-heads canvas").count() == part["heads"] * len(document["rows"][0]["attention"]["layers"])
    assert page.locator(".vl-heads canvas").first.evaluate("c => [c.width, c.height]") == [part["to"], part["from"]]


def test_the_state_is_in_the_address_and_comes_back(document: Any, visit: Visit, tmp_path: Path) -> None:
    page = open_documents(visit, tmp_path, [document])
    page.locator(".vl-heads [data-cells='0.1']").click()
    page.get_by_role("button", name="boxes → words").click()
    page.locator(".vl-item").nth(1).click()
    page.mouse.move(5, 5)
    fragment = page.url.partition("#")[2]
    assert {"show=attention", "direction=regions_to_text"} <= set(fragment.split("&"))
    again = open_documents(visit, tmp_path, [document])
    again.evaluate("(fragment) => { location.hash = fragment; }", fragment)
    again.wait_for_function("document.querySelector('.vl-item[aria-pressed=true]')")
    assert read_words(again) == read_words(page)
    again = open_documents(visit, tmp_path, [document], fragment)
    assert read_words(again) == read_words(page)
    assert again.locator(".vl-readout").inner_text() == page.locator(".vl-readout").inner_text()


@pytest.mark.parametrize("fragment", ["show=nothing&cells=..&lock=9.9.words.x", "lock=0.0.words.999", "row=-5", "%%%"])
def test_a_damaged_address_shows_the_page_as_it_is(document: Any, visit: Visit, tmp_path: Path, fragment: str) -> None:
    page = open_documents(visit, tmp_path, [document], fragment)
    assert page.locator(".vl-verdict").inner_text()


def test_a_first_view_can_be_asked_for(document: Any, visit: Visit, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", [document], {"show": "attention", "cells": "0.1"})
    page = visit(f"file://{tmp_path}/page.html")
    assert page.locator(".vl-heads [data-cells='0.1']").get_attribute("aria-pressed") == "true"


def test_without_scripts_the_figure_stays(document: Any, visit: Visit, tmp_path: Path) -> None:
    page = open_documents(visit, tmp_path, [document], java_script_enabled=False)
    assert page.locator("h2").inner_text() == QUESTION
    assert [bar.inner_text() for bar in page.locator(".vl-answer .vl-name").all()] == [
        answer["text"] for answer in document["answers"][:5]
    ]
    shown = [region for region in document["rows"][0]["regions"] if not region["special"]]
    assert page.locator(".vl-picture rect.vl-halo").count() == len(shown)
    assert page.locator(".vl-sentence .vl-word").count() == len(document["rows"][0]["words"])
    assert page.locator(".vl-labels text").count() >= 1


def test_a_narrow_window_has_one_column(document: Any, visit: Visit, tmp_path: Path) -> None:
    page = open_documents(visit, tmp_path, [document], size=(360, 780))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    picture, words = (page.locator(name).first.bounding_box() for name in (".vl-figure", ".vl-words"))
    assert words["y"] >= picture["y"] + picture["height"]
    assert picture["width"] > 300


CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll(".vl-word, .vl-cell")].filter((e) => e.textContent && e.style.color).map((element) => {
    const [a, b] = [element.style.color, element.style.backgroundColor].map(light).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_colours(document: Any, visit: Visit, tmp_path: Path, scheme: Any) -> None:
    page = open_documents(visit, tmp_path, [document], scheme=scheme)
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 5
    assert min(ratios) >= 4.5


def test_dark_and_light_differ_and_can_be_set(document: Any, visit: Visit, tmp_path: Path) -> None:
    page = open_documents(visit, tmp_path, [document], scheme="dark")
    colour = "getComputedStyle(document.querySelector('.vl')).color"
    dark = page.evaluate(colour)
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    assert page.evaluate(colour) != dark
    page.locator(".vl-sentence .vl-word[style*='color: rgb(0, 0, 0)']").first.wait_for()


def test_the_keyboard_reaches_words_boxes_and_heads(page: Any) -> None:
    page.locator(".vl-sentence .vl-word").first.focus()
    page.keyboard.press("ArrowRight")
    focused = "document.activeElement.querySelector('span').textContent"
    assert page.evaluate(focused) == "colour"
    page.keyboard.press("Enter")
    assert page.locator(".vl-word", has_text="colour").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert page.locator(".vl-word[aria-pressed='true']").count() == 0
    page.locator(".vl-item").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("[...document.querySelectorAll('.vl-item')].indexOf(document.activeElement)") == 1
    page.locator(".vl-heads [data-cells='0.0']").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator(".vl-heads [data-cells='0.1']").get_attribute("aria-pressed") == "true"


def test_every_control_has_a_name(page: Any) -> None:
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, select, textarea, input')].filter((e) => !e.hidden && "
        "!(e.textContent.trim() || e.getAttribute('aria-label') || e.title || e.labels?.length)).length"
    )
    assert nameless == 0
    assert page.locator("svg.vl-picture[role='img'][aria-label]").count() == 1


def test_labels_do_not_hide_one_another(visit: Visit, tmp_path: Path) -> None:
    page = open_documents(visit, tmp_path, [large_document()], "show=attention&cells=3.2")
    page.locator(".vl-word").nth(4).click()
    rects = page.evaluate(
        "[...document.querySelectorAll('.vl-labels rect:not(.vl-mark)')].map((r) => "
        "['x', 'y', 'width', 'height'].map((a) => +r.getAttribute(a)))"
    )
    assert len(rects) > 1
    for n, (x, y, width, height) in enumerate(rects):
        for x2, y2, width2, height2 in rects[:n]:
            across = max(0, min(x + width, x2 + width2) - max(x, x2))
            shared = across * max(0, min(y + height, y2 + height2) - max(y, y2))
            assert shared <= 0.4 * min(width * height, width2 * height2) + 1e-6


HOVER = """(kind) => [...document.querySelectorAll(`button[data-kind=${kind}]`)].slice(0, 20).map((element) => {
  const times = [];
  for (let round = 0; round < 8; round++) {
    document.querySelector(".vl").dispatchEvent(new PointerEvent("pointerleave"));
    const start = performance.now();
    element.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
    document.body.getBoundingClientRect();
    times.push(performance.now() - start);
  }
  return Math.min(...times);  // other programs on the machine only ever make it longer
})"""


@pytest.mark.parametrize("fragment", ["show=attention", "show=attention&lines=true&how=max", "show=relevance"])
def test_a_hover_over_100_boxes_and_20_words_is_answered_in_50_ms(visit: Visit, tmp_path: Path, fragment: str) -> None:
    page = open_documents(visit, tmp_path, [large_document()], fragment)
    for kind in ("words", "regions"):
        times = page.evaluate(HOVER, kind)
        assert len(times) == 20
        assert max(times) < 50, times


def test_100_boxes_and_128_tokens_open(visit: Visit, tmp_path: Path) -> None:
    page = open_documents(visit, tmp_path, [large_document(words=126)])
    assert page.locator(".vl-item").count() == 100
    assert page.locator(".vl-word").count() == 128


def test_a_page_of_36_boxes_at_full_size_is_small(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", [large_document(boxes=36)])
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def test_documents_stand_side_by_side_and_are_hovered_in_step(document: Any, visit: Visit, tmp_path: Path) -> None:
    other = json.loads(json.dumps(document))
    other["model"]["name"] = "the/other"
    other["rows"][0]["regions"] = other["rows"][0]["regions"][::-1]
    page = open_documents(visit, tmp_path, [document, other], size=(1500, 900))
    boxes = [column.bounding_box() for column in page.locator(".vl-doc").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[1]["x"] >= boxes[0]["x"] + boxes[0]["width"]
    page.locator(".vl-doc").first.locator(".vl-item").first.hover()
    names = [item.locator(".vl-name").inner_text() for item in page.locator(".vl-item.vl-active").all()]
    assert len(names) == 2
    assert names[0] == names[1]
    legends = [legend.inner_text() for legend in page.locator(".vl-legend").all()]
    assert legends[0] == legends[1], "one scale"


def test_rows_of_choices_are_read_one_at_a_time(document: Any, visit: Visit, tmp_path: Path) -> None:
    several = json.loads(json.dumps(document))
    row = several["rows"][0]
    several["rows"] = [row | {"label": "red"}, row | {"label": "blue"}]
    several["choices"] = ["red", "blue"]
    several["answers"] = [several["answers"][n] | {"text": text} for n, text in enumerate(("blue", "red"))]
    several["relevance"] = {name: [by * 2 for by in places[:2]] for name, places in several["relevance"].items()}
    several["against"] = [by * 2 for by in several["against"][:2]]
    several["leave_one_out"] = None
    page = open_documents(visit, tmp_path, [several])
    assert page.locator(".vl-row-label").all_inner_texts() == ["blue"], "the row of the best answer"
    page.get_by_label("Reading").select_option("0")
    assert page.locator(".vl-row-label").all_inner_texts() == ["red"]


def test_a_run_that_reads_words_alone_says_so(document: Any, visit: Visit, tmp_path: Path) -> None:
    blind = json.loads(json.dumps(document))
    row = blind["rows"][0]
    row["regions"], row["image"], blind["images"] = [], [], []
    for layer in row["attention"]["layers"]:
        layer["directions"] = {"text_to_text": layer["directions"]["text_to_text"]}
    for places in [*blind["relevance"].values(), blind["against"]]:
        for by_row in places:
            by_row[0]["regions"] = []
    blind["leave_one_out"] = blind["removal"] = None
    page = open_documents(visit, tmp_path, [blind])
    assert "no picture side" in page.locator(".vl-none").inner_text()
    page.locator("select").first.select_option("attention")
    assert page.get_by_role("button", name="words → boxes").count() == 0
    assert page.get_by_role("button", name="words → words").count() == 1


def download(page: Any, button: str) -> bytes:
    with page.expect_download() as started:
        page.get_by_role("button", name=button, exact=True).click()
    return Path(started.value.path()).read_bytes()


def test_the_figure_can_be_taken_away(page: Any, document: Any) -> None:
    vector = download(page, "SVG")
    root = ElementTree.fromstring(vector)
    texts = "".join(root.itertext())
    assert document["answers"][0]["text"] in texts
    assert document["model"]["checkpoint"] in texts
    addresses = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    bitmap = Image.open(io.BytesIO(download(page, "PNG, 2×")))
    assert bitmap.width == 2 * int(root.attrib["width"])
    colours = bitmap.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 20, "the picture is on it"


def test_the_numbers_can_be_taken_away(page: Any, document: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(download(page, "CSV").decode())))
    (row,) = document["rows"]
    assert len(rows) == len(row["words"]) + len(row["regions"])
    boxes = [one for one in rows if one["kind"] == "regions"]
    expected = document["relevance"]["relevance"][0][0]["regions"]
    assert [float(one["relevance"]) for one in boxes] == pytest.approx(expected)
    assert [float(one["x1"]) for one in boxes] == pytest.approx([region["box"][0] for region in row["regions"]])
    assert json.loads(download(page, "JSON")) == document


def test_the_caption_says_how_to_make_the_figure_again(page: Any, document: Any) -> None:
    caption = page.get_by_label("Caption for LaTeX").input_value()
    assert caption.startswith("\\caption{")
    assert document["model"]["checkpoint"] in caption
    assert document["model"]["command"].split()[0] in unquote(caption)
    assert "relevance" in caption
    assert not re.search(r"(?<!\\)[%#&_$]", caption), "special characters are escaped"


def test_words_and_boxes_can_be_taken_away_where_somebody_listens(document: Any, visit: Visit, tmp_path: Path) -> None:
    page = open_documents(visit, tmp_path, [document])
    page.evaluate(
        "() => { window.edits = []; const place = document.getElementById('visling'); "
        "const data = JSON.parse(document.getElementById('visling-data').textContent); "
        "visling.render(place, data.documents, { onEdit: (edit) => edits.push(edit) }); }"
    )
    page.locator(".vl-item").first.click()
    number = int(page.locator(".vl-item").first.get_attribute("data-index"))
    page.get_by_role("button", name="Take away").click()
    assert page.evaluate("edits.at(-1).without_regions") == [number]
    assert page.locator(".vl-item.vl-crossed").count() == 1
    page.get_by_role("button", name="Draw a box").click()
    frame = page.locator(".vl-figure").bounding_box()
    page.mouse.move(frame["x"] + 20, frame["y"] + 20)
    page.mouse.down()
    page.mouse.move(frame["x"] + 120, frame["y"] + 90)
    page.mouse.up()
    zoom = frame["width"] / document["images"][0]["width"]
    (box,) = page.evaluate("edits.at(-1).boxes")
    assert box[:4] == pytest.approx([20 / zoom, 20 / zoom, 120 / zoom, 90 / zoom], abs=1)
    page.get_by_role("button", name="Put everything back").click()
    assert page.evaluate("[edits.at(-1).without_regions.length, edits.at(-1).boxes.length]") == [0, 0]
