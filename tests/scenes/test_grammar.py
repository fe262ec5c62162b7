"""The grammar of captions: every form by hand, and files that say the same as the captions themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.entities import read_entities
from visling.data.annotations.parses import Parse, read_parses
from visling.runtime import generator_for
from visling.scenes import ScenesConfig, write_scenes
from visling.scenes.captions import captions
from visling.scenes.grammar import Tree, join_and, tree, write_conllu
from visling.scenes.language import place_tree
from visling.scenes.world import Item, Scene, sample_items

SPLITS = ("train", "val", "test")


def relations(sentence: Tree) -> str:
    """Each word with its relation and the word that it depends on."""
    words = sentence.words
    return ", ".join(
        f"{word.form} {word.relation}" + ("" if word.head is None else f" {words[word.head].form}") for word in words
    )


STAR, RING, MOON = (tree(f"the:det {noun}*") for noun in ("star", "ring", "moon"))


def test_a_pattern_places_trees_within_others() -> None:
    above = tree("above:case {}*", RING)
    sentence = tree("{}:nsubj is:cop {}*", STAR, above)
    assert sentence.text == "the star is above the ring"
    assert relations(sentence) == "the det star, star nsubj ring, is cop ring, above case ring, the det ring, ring root"
    assert [word.tag for word in sentence.words] == ["DET", "NOUN", "AUX", "ADP", "DET", "NOUN"]


def test_an_enumeration_hangs_on_its_first_part() -> None:
    assert join_and([STAR]) == STAR
    assert join_and([STAR, RING]).text == "the star and the ring"
    three = join_and([STAR, RING, MOON])
    assert three.text == "the star, the ring and the moon"
    assert join_and([STAR, RING, MOON], comma=",").text == "the star , the ring and the moon"
    assert relations(three) == (
        "the det star, star root, , punct ring, the det ring, ring conj star, and cc moon, the det moon, moon conj star"
    )


@pytest.mark.parametrize(
    ("where", "text", "expected"),
    [
        ("above", "above the ring", "above case ring, the det ring, ring root"),
        ("left of", "left of the ring", "left root, of case ring, the det ring, ring obl left"),
        (
            "to the left of",
            "to the left of the ring",
            "to case left, the det left, left root, of case ring, the det ring, ring nmod left",
        ),
    ],
)
def test_places(where: str, text: str, expected: str) -> None:
    place, relation = place_tree(where, RING)
    assert (place.text, relations(place)) == (text, expected)
    assert relation == ("advmod" if where == "left of" else "nmod")


def test_marks_enclose_the_words_of_a_phrase() -> None:
    listed = join_and([STAR.marked("/EN#1/other"), RING.marked("/EN#2/other")])
    assert tree("{}* +.:punct", listed).marked_text == "[/EN#1/other the star] and [/EN#2/other the ring]."


def test_a_pattern_of_no_words_is_refused() -> None:
    for broken in ("the star*", "the:det star:nsubj", "the* star*"):
        with pytest.raises(AssertionError, match="pattern"):
            tree(broken)
    with pytest.raises(AssertionError, match="fewer braces"):
        tree("the:det star*", STAR)


def test_conllu_is_written_as_the_format_wants_it() -> None:
    assert write_conllu([("7", tree("{}* +,:punct", STAR))]) == (
        "# sent_id = 7\n# text = the star,\n"
        "1\tthe\t_\tDET\t_\t_\t2\tdet\t_\t_\n"
        "2\tstar\t_\tNOUN\t_\t_\t0\troot\t_\tSpaceAfter=No\n"
        "3\t,\t_\tPUNCT\t_\t_\t2\tpunct\t_\t_\n\n"
    )


def test_every_form_of_a_caption() -> None:
    """Those that a thousand scenes have; a form is the words that are no description."""
    forms: dict[str, str] = {}
    for number in range(1, 1001):
        items = [
            Item(shape=one.shape, color=one.color, size=one.size, texture=one.texture, box=(20 * k, k, 20 * k + 8, 9))
            for k, one in enumerate(sample_items(generator_for(number), 3, 10))
        ]
        for sentence in captions(Scene(image_id=number, size=128, items=tuple(items)), generator_for(number, 1)):
            verb = next((word for word in sentence.words if word.head is None), None)
            assert verb is not None
            named = {"there", "same", "different", "more", "picture", "exactly", "all", "every", "no"}
            kept = [word.form for word in sentence.words if word.form in named or word.tag in ("VERB", "AUX")]
            forms.setdefault(" ".join(kept), relations(sentence))
    for form, expected in {
        "there are more": "there expl are, are root, more amod",
        "has same": "has root",
        "there are exactly": "exactly advmod",
        "every has same": "every det object, object nsubj has",
    }.items():
        assert expected in forms[form], forms[form]
    assert len(forms) > 12


def _parses(written: Any, name: str) -> dict[str, Parse]:
    return {parse.id: parse for parse in read_parses(written.folder / name)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_caption_has_its_parse(written: Any, split: str) -> None:
    parses = _parses(written, f"annotations/captions_{split}.conllu")
    content = written.json(f"annotations/captions_{split}.json")["annotations"]
    captions_by_id = {str(one["id"]): one["caption"] for one in content}
    assert captions_by_id.keys() == parses.keys()
    entities = _parses(written, f"flickr30k_entities/{split}.conllu")
    records = {record.id: record.sentence for record in read_entities(written.folder, split).records}
    assert records.keys() == entities.keys()
    for name, caption in (*captions_by_id.items(), *records.items()):
        parse = (parses if name in parses else entities)[name]
        assert [caption[start:stop] for start, stop in parse.place(caption)] == [word.form for word in parse.words]
    counts = Counter(word.relation for parse in (*parses.values(), *entities.values()) for word in parse.words)
    assert {"root", "nsubj", "obj", "det", "amod", "nummod", "case", "nmod", "conj", "cc", "punct", "cop"} <= set(
        counts
    )


def test_the_head_of_a_phrase_is_its_noun(written: Any) -> None:
    """Within a phrase all words depend on the last one, which alone depends on a word outside."""
    parses = _parses(written, "flickr30k_entities/test.conllu")
    for record in read_entities(written.folder, "test").records:
        words, spans = parses[record.id].words, parses[record.id].place(record.sentence)
        for phrase in record.phrases:
            own = [number for number, span in enumerate(spans, start=1) if phrase.start <= span[0] < phrase.stop]
            assert [number for number in own if words[number - 1].head not in own] == [own[-1]]


def test_no_captions_make_an_empty_file(tmp_path: Path) -> None:
    write_scenes(tmp_path / "out", ScenesConfig(images=4, captions_per_image=0))
    assert (tmp_path / "out/annotations/captions_train.conllu").read_text() == ""
