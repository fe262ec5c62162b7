"""What is no question is refused in words, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling import api
from visling.analysis.question import Question
from visling.api import Predictor
from visling.errors import DataError


@pytest.fixture(scope="module")
def model(world: Any) -> Predictor:
    return api.load(world.vqa, device="cpu")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, r"an image must be a path or an open PIL image; found None"),
        (3, r"found int \(3\)"),
        (np.zeros((2, 2)), r"found ndarray .*Image\.fromarray\(array\)"),
        (b"\x89PNG", r"found bytes .*Image\.open\(io\.BytesIO\(content\)\)"),
        ({"a.png"}, r"found set"),
        ([None], r"found None"),
        (["a.png", 5], r"found int \(5\)"),
        ("https://example.com/x.png", r"https://example.com/x.png is an address, which is not read"),
        ([], r"the task vqa reads 1 image at a time; found 0"),
    ],
)
def test_what_is_no_image_is_refused(model: Predictor, image: Any, message: str) -> None:
    for ask in (model.answer, model.encode):
        with pytest.raises(DataError, match=message):
            ask(image, "what is it?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"the text must be a string; found None"),
        (["a", "b"], r"found list \(\['a', 'b'\]\)\. Ask several questions with answer_each"),
        (5, r"found int \(5\)"),
        (b"what?", r"found bytes"),
    ],
)
def test_what_is_no_text_is_refused(world: Any, model: Predictor, text: Any, message: str) -> None:
    for ask in (model.answer, model.encode):
        with pytest.raises(DataError, match=message):
            ask(world.picture(), text)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("yes", r"choices must be a list of strings; found str \('yes'\)"),
        (3, r"choices must be a list of strings; found int"),
        (["yes", None], r"every choice must be a string; found None"),
    ],
)
def test_what_are_no_choices_is_refused(world: Any, model: Predictor, choices: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.answer(world.picture(), "what?", choices)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (Question("a.png", "what?"), r"several questions are a list of Question\(image, text\); found Question"),
        (None, r"several questions are a list of Question\(image, text\); found None"),
        ([("a.png", "what?")], r"questions must be Question\(image, text\); found tuple"),
        ("what?", r"questions must be Question\(image, text\); found str \('w'\)"),
    ],
)
def test_what_are_no_questions_is_refused(model: Predictor, questions: Any, message: str) -> None:
    for ask in (model.answer_each, model.encode_each):
        with pytest.raises(DataError, match=message):
            list(ask(questions))


def test_an_image_that_cannot_be_read_any_more_is_named(world: Any, model: Predictor, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(world.picture().read_bytes()[:300])
    with Image.open(world.picture()) as closed:
        pass
    with Image.open(tmp_path / "half.png") as truncated:
        for image in (closed, truncated):
            with pytest.raises(DataError, match=r"cannot read the open image .*Open it again"):
                model.answer(image, "what?")
            with pytest.raises(DataError, match=r"cannot read the open image"):
                model.detect(image)
