"""Kinds of corpora by name: which there are, what their table promises, which are refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fixtures import toy_corpus

from visling.data.corpora.base import Corpus, CorpusReader, TextReader
from visling.data.corpora.readers import check_corpora, find_reader, names, readers
from visling.errors import ConfigError

DOCS = Path(__file__).parents[3] / "docs" / "corpora.md"


def test_the_kinds_of_all_modules_are_offered() -> None:
    assert names() == sorted([
        "captions", "caption_pairs", "single_captions", "statements", "unmasked_statements", "true_statements",
        "questions", "spelled_questions", "answered_questions", "conceptual_captions", "sbu", "flickr30k",
        "vilbert_captions", "vg_regions", "vg_qa", "gqa", "lxmert", "vcr", "text",
    ])  # fmt: skip
    assert all(find_reader(name) is reader for name, reader in readers().items())


@pytest.mark.parametrize("heading", ["# Pre-training corpora", "## What an example shows"])
def test_the_page_lists_every_kind(heading: str) -> None:
    """Both of its tables: where a kind is read from, and what it shows."""
    page = DOCS.read_text(encoding="utf-8")
    section = page.partition(f"{heading}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [kind for row in rows for kind in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == names()


@pytest.mark.parametrize("name", names())
def test_every_kind_says_what_it_shows(name: str) -> None:
    reader = find_reader(name)
    assert reader.shows
    assert (reader.typical.images == 0) == isinstance(reader, TextReader)


def test_every_setting_belongs_to_a_kind() -> None:
    owned = frozenset[str]().union(*(reader.settings for reader in readers().values()))
    assert owned == {"answers", "keep_above", "question_text", "same_choice", "special_tokens", "word_links"}


def test_which_kinds_have_questions_or_numbers_of_visual_genome() -> None:
    images = {name: reader for name, reader in readers().items() if isinstance(reader, CorpusReader)}
    assert {name for name, reader in images.items() if reader.questions} == {
        "answered_questions", "gqa", "lxmert", "vg_qa"
    }  # fmt: skip
    assert {name for name, reader in images.items() if reader.numbered} == {"gqa", "lxmert", "vg_qa", "vg_regions"}
    assert {name for name, reader in images.items() if not reader.validates} == {"sbu", "vg_qa", "vg_regions"}


def test_a_corpus_of_ones_own_is_found_by_its_path() -> None:
    assert find_reader("fixtures.toy_corpus.shouted") is toy_corpus.READERS["shouted"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("capshuns", r"no corpus 'capshuns'\. Did you mean 'captions'\?.*my_package\.my_module\.kind"),
        ("no_such_package.gqa", "there is no module no_such_package"),
        ("fixtures.toy_corpus.shoted", r"fixtures\.toy_corpus offers no corpus 'shoted'.*Did you mean 'shouted'"),
        ("visling.data.answers.gqa", r"visling\.data\.answers offers no corpus 'gqa': expected READERS"),
    ],
)
def test_unknown_kinds_are_refused(kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_corpora([Corpus(kind="captions"), Corpus(kind=kind)])


def test_a_module_that_cannot_import_something_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_corpus.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        find_reader("broken_corpus.any")


def test_what_is_no_reader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("odd_corpus")
    module.READERS = {"any": print}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_corpus", module)
    with pytest.raises(ConfigError, match="odd_corpus offers no corpus 'any'"):
        find_reader("odd_corpus.any")


@pytest.mark.parametrize(
    ("setting", "value", "owner"), [("keep_above", False, "vilbert_captions"), ("same_choice", True, "vcr")]
)
def test_settings_of_another_kind_are_refused(setting: str, value: bool, owner: str) -> None:
    check_corpora([Corpus(kind=owner, weight=2.0, **{setting: value})])
    with pytest.raises(ConfigError, match=f"{setting} is a setting of {owner}; found it with captions"):
        check_corpora([Corpus(kind="captions", **{setting: value})])
