"""Vocabularies, answer tables, lists of images, and other tables next to data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.promises import check_texts, find_one
from fuzz.readers.base import Reader, read_table, writes_json, writes_pickle, writes_text

from visling.config import load_toml
from visling.data.annotations.classification import labelled_texts
from visling.data.annotations.image_lists import read_image_list
from visling.data.annotations.passages import Passages
from visling.data.annotations.questions import table_questions
from visling.data.annotations.referring import table_expressions
from visling.data.annotations.retrieval import read_pool, read_test_images
from visling.data.annotations.statements import table_statements
from visling.data.answer_table import read_table as read_answer_table
from visling.data.answers import AnswerVocabulary
from visling.data.named_objects import read_name_table
from visling.data.text import Tokenizer
from visling.names import read_names
from visling.types import Record

_ANSWERS = ["yes", "no", "2", "red"]
_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "dog", "ü")


def _load_answers(folder: Path) -> None:
    found = AnswerVocabulary.load(find_one(folder, "a.*"))
    check_texts(found.answers)


def _load_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(str(folder / "vocab.txt"))
    ids = tokenizer.encode("a dogb ü")
    assert all(0 <= piece < tokenizer.size for piece in ids)


def _read_pool(folder: Path) -> None:
    for image, others in read_pool(folder / "hard_negative.pkl", ["a", "b", "c"]).items():
        check_texts([image, *others])


def _read_passages(folder: Path) -> None:
    passages = Passages([folder / "x.doc"])
    check_texts(passages[:])


def _save_array(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, content)


_POOL = {"train_hard_pool": np.array([[0, 1], [1, 2], [2, 0]]), "train_image_list": ["a", "b", "c"]}


def _tables(name: str, rows: list[dict[str, Any]], parse: Callable[..., Any]) -> list[Reader]:
    """A table of one's own as JSON lines, as a JSON list, and as CSV."""
    columns = list(rows[0])
    cells = "".join(",".join(str(row[column]) for column in columns) + "\n" for row in rows)
    kinds = {
        "JSON lines": ("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        "JSON": ("x.json", json.dumps(rows)),
        "CSV": ("x.csv", ",".join(columns) + "\n" + cells),
    }

    def read(folder: Path) -> None:
        records = read_table(find_one(folder, "x.*"), parse)
        assert all(isinstance(record, Record) for record in records)
        for record in records:
            check_texts([record.id, *record.images])

    return [
        Reader(f"tables of one's own, {name} as {kind}", writes_text(file, text), read)
        for kind, (file, text) in kinds.items()
    ]


READERS = (
    Reader("vocabularies, answers as JSON", writes_json("a.json", _ANSWERS), _load_answers),
    Reader("vocabularies, LXMERT's answers", writes_json("a.json", [{"ans": one} for one in _ANSWERS]), _load_answers),
    Reader("vocabularies, answers as text", writes_text("a.txt", "\n".join(_ANSWERS)), _load_answers),
    Reader("vocabularies, pickled answers", writes_pickle("a.pkl", _ANSWERS), _load_answers),
    Reader(
        "vocabularies, numbered answers",
        writes_pickle("a.pkl", {answer: number for number, answer in enumerate(_ANSWERS)}),
        _load_answers,
    ),
    Reader("vocabularies, word pieces", writes_text("vocab.txt", "\n".join(_PIECES)), _load_tokenizer),
    Reader(
        "vocabularies, names of classes",
        writes_text("names.txt", "person,human\nred car\n"),
        lambda folder: check_texts(read_names(folder / "names.txt")),
    ),
    Reader(
        "vocabularies, names of people",
        writes_text("names.csv", "id,name\n1,Casey\n2,Riley\n"),
        lambda folder: check_texts(read_name_table(folder / "names.csv")),
    ),
    Reader(
        "answer tables, LXMERT",
        writes_json("all_ans.json", [{"ans": one, "dsets": ["vqa", "gqa"]} for one in _ANSWERS]),
        lambda folder: check_texts(read_answer_table(folder / "all_ans.json", ["vqa"]).answers),
    ),
    Reader(
        "image lists, numpy",
        _save_array("x.npy", np.array([9, 7])),
        lambda folder: check_texts([*read_image_list(folder / "x.npy")]),
    ),
    Reader(
        "image lists, JSON",
        writes_json("x.json", ["a.jpg", 9]),
        lambda folder: check_texts([*read_image_list(folder / "x.json")]),
    ),
    Reader(
        "image lists, text",
        writes_text("x.txt", "a.jpg\nCOCO_val2014_000000000009\n"),
        lambda folder: check_texts([*read_image_list(folder / "x.txt")]),
    ),
    Reader(
        "image lists, test images",
        _save_array("x.npy", np.array(["a", "bc"])),
        lambda folder: check_texts([*read_test_images(folder / "x.npy")]),
    ),
    Reader("image lists, images that look alike", writes_pickle("hard_negative.pkl", _POOL), _read_pool),
    Reader("text without images", writes_text("x.doc", "A first sentence.\n\nAnother one, ü.\n"), _read_passages),
    Reader(
        "configuration, TOML",
        writes_text("x.toml", '[encoder]\nhidden_size = 12\n\n[train]\nname = "x"\nrates = [0.5, 1e-3]\n'),
        lambda folder: load_toml(folder / "x.toml") and None,
    ),
    *_tables("questions", [{"id": 1, "image": "a.jpg", "question": "is it?", "answer": "yes"}] * 1, table_questions),
    *_tables(
        "expressions",
        [{"id": "r1", "image": "a.jpg", "text": "the dog", "x1": 1, "y1": 2, "x2": 30, "y2": 40}],
        table_expressions,
    ),
    *_tables(
        "statements",
        [{"id": "s1", "image1": "a.jpg", "image2": "b.jpg", "text": "two dogs", "label": "true"}],
        table_statements,
    ),
    *_tables("labels", [{"id": "l1", "image": "a.jpg", "text": "a dog", "label": "good"}], labelled_texts),
)
