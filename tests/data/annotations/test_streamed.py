from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations import streamed
from visling.data.annotations.streamed import list_chunks, stream_list, stream_object
from visling.errors import DataError

ENTRIES = {
    "07": {"text": 'a "quoted" \\ brace } and ] é 汉 😀', "more": [1, 2.5, None, True, {"deep": [[]]}]},
    "7": {},
    "number": 12345,
    "list": [],
    "é": "x",
}


def save(path: Path, content: Any, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, **how), encoding="utf-8")
    return path


@pytest.mark.parametrize("window", [1, 2, 3, 7, 16, 1 << 20])
@pytest.mark.parametrize("how", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}], ids=str)
def test_entries_are_those_of_the_whole_file_wherever_the_window_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, how: dict[str, Any]
) -> None:
    monkeypatch.setattr(streamed, "WINDOW", window)
    assert list(stream_object(save(tmp_path / "x.json", ENTRIES, **how))) == list(ENTRIES.items())
    values = [*ENTRIES.values(), 12345, "last"]
    assert list(stream_list(save(tmp_path / "y.json", values, **how))) == values


@pytest.mark.parametrize("text", ["{}", " {\n} \n", "\ufeff{ }"])
def test_no_entries(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    assert list(stream_object(path)) == []
    path.write_text(text.replace("{", "[").replace("}", "]"), encoding="utf-8")
    assert list(stream_list(path)) == []


@pytest.mark.parametrize("window", [8, 1 << 20])
@pytest.mark.parametrize("cut", [1, 2, 20, 40, -1])
def test_a_truncated_file_is_an_error_after_its_whole_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, window: int
) -> None:
    monkeypatch.setattr(streamed, "WINDOW", window)
    path = save(tmp_path / "x.json", ENTRIES)
    path.write_bytes(path.read_bytes()[:cut])
    read = []
    with pytest.raises(DataError, match=r"x\.json is truncated or not JSON: .*character \d+, of \d+ bytes"):
        read.extend(stream_object(path))
    assert all(ENTRIES[key] == value for key, value in read)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found 'the end of the file'"),
        ("[1]", "must be an object of entries by id; found a list"),
        ("nothing", "found something that begins with 'n'"),
        ('{"a": 1} {"b": 2}', r"something follows the end of the JSON value \(character 9,"),
        ('{"a" 1}', "expected ':'; found '1'"),
        ('{"a": 1 "b": 2}', "expected ',' or '}'; found '\"'"),
        ('{1: 2}', "expected a text as the id of an entry; found 1"),
        ('{"a": 1,}', "truncated or not JSON"),
        ('{"a": {"b": tru}, "c": "' + "x" * 100 + '"}', r"Expecting value \(character 12,"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(stream_object(path))


def test_an_entry_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "WINDOW", 64)
    monkeypatch.setattr(streamed, "LONGEST", 500)
    path = tmp_path / "x.json"
    path.write_text('{"a": {"b": 1, ' + '"c": [1, 2, 3], ' * 200)
    with pytest.raises(DataError, match=r"an entry is longer than 500 characters \(character 6,"):
        list(stream_object(path))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8 text"):
        list(stream_object(path))
    with pytest.raises(DataError, match="no annotation file"):
        list(stream_object(tmp_path / "y.json"))


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "WINDOW", 1 << 12)

    def measure(number: int) -> int:
        path = save(tmp_path / "x.json", {str(key): {"text": "words " * 20} for key in range(number)})
        tracemalloc.start()
        assert sum(1 for _ in stream_object(path)) == number
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    measure(10)
    few, many = measure(200), measure(20_000)
    assert many < 1.5 * few, (few, many)


def test_chunks(tmp_path: Path) -> None:
    folder = tmp_path / "train_all_questions"
    for number in range(11):
        save(folder / f"train_all_questions_{number}.json", {})
    save(folder / "readme.json", {})
    assert [path.stem.rpartition("_")[2] for path in list_chunks(folder)] == [str(number) for number in range(11)]
    assert list_chunks(folder / "readme.json") == [folder / "readme.json"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no chunk empty_\*\.json"):
        list_chunks(tmp_path / "empty")
