"""Which region a word attends to most, by hand; heads that are planted; the command on every family."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visling import models
from visling.analysis.alignment import (
    Collector,
    Kind,
    Lost,
    Query,
    Sentences,
    align_heads,
    attend,
    check_regions,
    choose_layers,
    find_best,
    guess_boxes,
    list_queries,
)
from visling.analysis.encoded_rows import encode_shown
from visling.analysis.head_accuracy import FEWEST_QUERIES, measure_alignment, render_alignment
from visling.cli import app
from visling.data.annotations.entities import EntitiesRecord, parse_sentence, read_entities
from visling.data.annotations.parses import find_parses
from visling.data.batches.shown import ShownExamples
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, RunError, StoreError, VislingError
from visling.metrics.phrases import MatchRule, right_boxes
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.examples import open_run
from visling.runs.untrained import open_preset, reset_weights
from visling.tasks.grounding import PhraseGrounding
from visling.types import Batch, Example, InputSpec, Maps, RegionArray, Regions, Text

TOKENIZER = Tokenizer()
BOXES = ((0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 40.0, 20.0), (50.0, 50.0, 90.0, 90.0))
"""Regions of every image here, 100 x 100 pixels."""


def maps_of(text_to_regions: Mapping[str, torch.Tensor]) -> Maps:
    return Maps(text_to_text={}, text_to_regions=dict(text_to_regions), regions_to_text={}, regions_to_regions={})


# attention by hand


def test_the_papers_quantities_of_one_row() -> None:
    """Text .7, regions .05, .20, .05: the second region, and .30 of the attention on regions."""
    probs = torch.tensor([0.05, 0.20, 0.05])[None, None, None]
    best, mass = attend({"layers.0": probs}, torch.ones(1, 3, dtype=torch.bool), torch.tensor([0]), [(0,)])
    assert best.tolist() == [[1]]
    assert mass.tolist() == [[pytest.approx(0.30)]]


def test_padding_and_what_stands_behind_are_set_aside() -> None:
    """Two real regions, one of padding, then the whole image, which draws most."""
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])[None, None, None]
    real = torch.tensor([[True, True, False]])
    best, mass = attend({"layers.0": probs}, real, torch.tensor([0]), [(0,)])
    assert (best.tolist(), mass.tolist()) == ([[1]], [[pytest.approx(0.3)]])
    best, mass = attend({"layers.0": probs}, real & False, torch.tensor([0]), [(0,)])
    assert (best.tolist(), mass.tolist()) == ([[0]], [[0.0]])


def test_queries_of_several_pieces_rows_layers_and_heads() -> None:
    """Pieces 1 and 2 attend to regions 0 and 1; their mean to region 2, which is second of both."""
    first = torch.zeros(2, 2, 4, 3)
    first[1, 0, 1] = torch.tensor([0.6, 0.0, 0.4])
    first[1, 0, 2] = torch.tensor([0.0, 0.6, 0.4])
    first[1, 1, :, 1] = 1.0
    second = torch.zeros(2, 1, 4, 3)
    second[0, 0, 3, 2] = 1.0
    maps = {"a": first, "b": second}
    real = torch.ones(2, 3, dtype=torch.bool)
    best, mass = attend(maps, real, torch.tensor([1, 1, 0]), [(1, 2), (2,), (3,)])
    assert best.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 2]], "cells: a 0, a 1, b 0"
    assert np.allclose(mass, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])


def test_every_token_has_its_best_region() -> None:
    """(B, T, C), what is behind and padding set aside."""
    probs = torch.zeros(1, 2, 2, 4)
    probs[0, 0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    probs[0, 0, 1] = torch.tensor([0.3, 0.2, 0.1, 0.4])
    probs[0, 1, :, 1] = 1.0
    real = torch.tensor([[True, True, False]])
    assert find_best({"a": probs, "b": probs[:, :1]}, real).tolist() == [[[1, 1, 1], [0, 1, 0]]]


# words and pieces


def record_of(marked: str, **boxes: Any) -> EntitiesRecord:
    """A sentence whose phrases have chains 1, 2, ... and the boxes given for them (`b1`), or the first of BOXES."""
    sentence = parse_sentence(marked, "here")
    phrases = tuple(replace(one, boxes=boxes.get(f"b{one.chain}", (BOXES[0],))) for one in sentence.phrases)
    return EntitiesRecord(id="7#0", images=("7",), sentence=sentence.text, phrases=phrases, size=(100, 100))


def parsed(tmp_path: Path, caption: str, words: str) -> Any:
    """The parse of words given as `form head relation`, separated by `|`."""
    lines = [
        f"{number}\t{form}\t_\tX\t_\t_\t{head}\t{relation}\t_\t_"
        for number, (form, head, relation) in enumerate((one.split(" ") for one in words.split("|")), start=1)
    ]
    path = tmp_path / "one.conllu"
    path.write_text("\n".join(["# sent_id = 7#0", *lines, ""]), encoding="utf-8")
    return find_parses(path, {"7#0": caption})["7#0"]


def queries_of(record: EntitiesRecord, parse: Any = None, *, kept: int = 100, stands: Any = "last") -> Any:
    lost = Lost()
    pieces = TOKENIZER.spans(record.sentence)
    return list_queries(record, parse, pieces, kept=kept, stands=stands, lost=lost), lost


SKATER = "[/EN#1/people Two skateboarders] in [/EN#2/other 1990s hats] , smiling ."
"""Pieces from position 1: two skate ##board ##ers in 1990s hats , smiling ."""


def test_phrases_stand_at_the_last_piece_or_at_all(tmp_path: Path) -> None:
    record = record_of(SKATER)
    assert TOKENIZER.tokens(TOKENIZER.encode(record.sentence)) == [
        "two", "skate", "##board", "##ers", "in", "1990s", "hats", ",", "smiling", ".",
    ]  # fmt: skip
    found, lost = queries_of(record)
    assert [(query.at, query.phrase) for query in found] == [((4,), 0), ((7,), 1)]
    assert {query.kind for query in found} == {Kind("", "phrase")}
    found, _ = queries_of(record, stands="mean")
    assert [query.at for query in found] == [(1, 2, 3, 4), (6, 7)]
    assert lost == Lost()


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    record = record_of(SKATER)
    words = "Two 2 nummod|skateboarders 0 root|in 5 case|1990s 5 compound|hats 2 nmod|, 7 punct|smiling 2 acl|. 2 punct"
    parse = parsed(tmp_path, record.sentence, words)
    found, lost = queries_of(record, parse, kept=4)
    assert [(query.kind.relation, query.at) for query in found] == [("", (4,)), ("nummod", (1,)), ("nmod", (4,))]
    # "hats" and "1990s" are cut; so are "hats" (to skateboarders), "in" (to hats), "smiling" and "." (to skateboarders)
    assert lost == Lost(cut_phrases=1, cut_words=5)
    found, _ = queries_of(record, kept=3)
    assert not found, "a phrase whose last piece is cut is not read"


def test_words_attend_to_the_region_of_their_head_or_dependent(tmp_path: Path) -> None:
    record = record_of(SKATER)
    words = "Two 2 nummod|skateboarders 0 root|in 5 case|1990s 5 compound|hats 2 nmod|, 7 punct|smiling 2 acl|. 2 punct"
    found, lost = queries_of(record, parsed(tmp_path, record.sentence, words))
    asked = {(query.kind.relation, query.kind.direction): (query.at, query.phrase) for query in found[2:]}
    assert asked == {
        ("nummod", "dependent_to_head"): ((1,), 0),
        ("case", "dependent_to_head"): ((5,), 1),
        ("compound", "dependent_to_head"): ((6,), 1),
        ("nmod", "dependent_to_head"): ((7,), 0),
        ("nmod", "head_to_dependent"): ((4,), 1),
        ("acl", "dependent_to_head"): ((9,), 0),
        ("punct", "dependent_to_head"): ((10,), 0),
    }
    assert lost == Lost()


def test_a_phrase_without_one_head_stands_for_no_word(tmp_path: Path) -> None:
    record = record_of("[/EN#1/people a man] runs")
    parse = parsed(tmp_path, record.sentence, "a 3 det|man 3 nsubj|runs 0 root")
    found, lost = queries_of(record, parse)
    assert [query.kind.relation for query in found] == [""]
    assert lost.headless_phrases == 1


def test_words_that_share_a_piece_and_clitics(tmp_path: Path) -> None:
    """ "don't" is don ' t; a parser has do and n't."""
    record = record_of("[/EN#1/people cats] don't run")
    parse = parsed(tmp_path, record.sentence, "cats 4 nsubj|do 4 aux|n't 4 advmod|run 0 root")
    found, _ = queries_of(record, parse)
    assert found[1] == Query(Kind("nsubj", "head_to_dependent"), (5,), 0)
    spans = parse[1]
    assert [record.sentence[start:stop] for start, stop in spans] == ["cats", "do", "n't", "run"]


def test_positions_are_those_of_the_fine_tuned_task(world: Any, golden: Path, tmp_path: Path) -> None:
    """Also where sentences are cut, and in files that people wrote."""
    shutil.copytree(golden / "flickr30k_entities_files", tmp_path, dirs_exist_ok=True)
    images = sorted(path.stem for path in (tmp_path / "Sentences").iterdir())
    (tmp_path / "val.txt").write_text("".join(f"{image}\n" for image in images), encoding="utf-8")
    compared = 0
    for most in (128, 9):
        layout = TextLayout(TOKENIZER, InputSpec(max_tokens=most))
        for root, split in ((world.scenes, "train"), (tmp_path, "val")):
            for record in read_entities(root, split).records:
                wanted = PhraseGrounding().example(record, layout, np.random.default_rng(0)).rows[0].phrases
                kept = len(layout.row(record.sentence).ids) - 2
                found, _ = queries_of(record, kept=kept)
                places = {query.phrase: query.at[0] for query in found}
                assert [places.get(number, 0) for number in range(len(record.phrases))] == list(wanted), record.sentence
                compared += len(wanted)
    assert compared > 400


def test_no_preset_cuts_rows_to_a_joint_length() -> None:
    record = record_of(SKATER)
    layout = TextLayout(TOKENIZER, InputSpec(joint_limit=4))
    assert len(Sentences().example(record, layout, np.random.default_rng(0)).rows[0].ids) == 12
    assert Sentences().region_targets(record, []) == {}


# planted heads


class Store:
    """The same three regions for every image: confidence .2, .9, .5; classes 4, 5, 4."""

    feature_size, fingerprint = 1, ""

    def __init__(self, **changes: Any) -> None:
        self.array = replace(
            RegionArray(
                features=np.zeros((3, 1), np.float32),
                boxes=np.array(BOXES, np.float32),
                size=(100, 100),
                classes=np.array([4, 5, 4]),
                class_confidence=np.array([0.2, 0.9, 0.5], np.float16),
            ),
            **changes,
        )

    def __contains__(self, image_id: str) -> bool:
        return True

    def __getitem__(self, image_id: str) -> RegionArray:
        return self.array

    def __len__(self) -> int:
        return 1


def shown_of(records: Sequence[EntitiesRecord], regions: int = 3) -> ShownExamples:
    """A batch whose regions are the first of BOXES."""
    rows = [TextLayout(TOKENIZER, InputSpec()).row(record.sentence) for record in records]
    longest, count = max(len(row.ids) for row in rows), len(records)
    ids = torch.zeros(count, longest, dtype=torch.int64)
    for own, row in zip(ids, rows, strict=True):
        own[: len(row.ids)] = torch.from_numpy(row.ids)
    batch = Batch(
        text=Text(ids=ids, mask=ids > 0, segments=ids * 0),
        regions=Regions(
            features=torch.zeros(count, regions, 1),
            boxes=torch.tensor(BOXES)[:regions].repeat(count, 1, 1) / 100,
            mask=torch.ones(count, regions, dtype=torch.bool),
            size=torch.full((count, 2), 100.0),
        ),
    )
    examples = [Example(id=one.id, rows=(row,), images=one.images) for one, row in zip(records, rows, strict=True)]
    return ShownExamples(
        numbers=range(count), records=records, examples=examples, batch=batch, regions=[[] for _ in records]
    )


def planted(tmp_path: Path) -> tuple[list[EntitiesRecord], Any]:
    """Forty images with a star in one of the regions, by turns, and the parse of the sentence."""
    records = []
    for number in range(40):
        one = record_of("[/EN#1/other the red star] shines", b1=(BOXES[number % 3],))
        records.append(replace(one, id="7#0", images=(f"image {number}",)))
    return records, parsed(tmp_path, records[0].sentence, "the 3 det|red 3 amod|star 4 nsubj|shines 0 root")


def test_planted_heads_are_found(tmp_path: Path) -> None:
    """Head 1 of layer "b" looks at the star from "star" and from "shines", head 0 of "a" always at region 1; the rest
    at region 2."""
    records, parse = planted(tmp_path)
    shown = shown_of(records)
    length = shown.batch.text.ids.shape[1]
    maps = {name: torch.zeros(40, 2, length, 3) for name in ("a", "b")}
    for probs in maps.values():
        probs[..., 2] = 0.5
    maps["a"][:, 0, :, 1] = 1.0
    for number in range(40):
        maps["b"][number, 1, 3:6, number % 3] = 1.0  # [CLS] the red star shine ##s
    queries = [queries_of(record, parse)[0] for record in records]
    collector = Collector(MatchRule(), guess_boxes(records, Store()))
    collector.add(shown, maps, queries)
    found = measure_alignment(collector, Lost())
    assert found.layers == ("a", "b")
    # region k is right for images k, k + 3, ...: 14, 13 and 13 of 40
    assert found.phrases.accuracy.tolist() == [[32.5, 32.5], [32.5, 100.0]]
    best = found.phrases.best
    assert (best.layer, best.head, best.score.value, best.score.low, best.score.high) == ("b", 1, 100.0, 100.0, 100.0)
    assert best.held_out is not None
    assert (best.held_out.value, best.held_out.count) == (100.0, 40)
    assert found.phrases.above == 1
    assert 15 < found.phrases.low[0, 0] < 32.5 < found.phrases.high[0, 0] < 50
    # unlike a model's attention, the planted one is not normalised: 1 or, with the .5 of region 2, 1.5
    assert np.allclose(found.phrases.mass, [[1.5, 0.5], [0.5, (13 * 1.0 + 27 * 1.5) / 40]])
    assert found.phrases.upper_bound.value == 100.0
    # of the five pieces "the red star shine ##s", the last three attend to the star in the planted head
    assert found.phrases.best.control.value == pytest.approx(100 * (3 + 2 * 13 / 40) / 5)
    assert np.allclose(found.phrases.control, [[32.5, 32.5], [32.5, 73.0]])
    nsubj = found.relations["nsubj"]["head_to_dependent"]
    assert (nsubj.best.layer, nsubj.best.head, nsubj.best.score.value) == ("b", 1, 100.0)
    assert found.relations["amod"]["dependent_to_head"].accuracy.tolist() == [[32.5, 32.5], [32.5, 32.5]]
    assert set(found.relations["amod"]) == {"dependent_to_head"}, "the adjective is within the phrase, and no region"
    assert {name: score.value for name, score in found.phrases.baselines.items()} == {
        "most frequent class": 32.5,  # class 4, region 2
        "most confident": 32.5,  # region 1
        "same place": 35.0,  # region 0
        "random region": pytest.approx(100 / 3),
    }
    content = json.loads(json.dumps(found.to_json()))
    assert content["phrases"]["accuracy"] == [[32.5, 32.5], [32.5, 100.0]]
    assert content["relations"]["nsubj"]["head_to_dependent"]["best"]["layer"] == "b"
    assert [name for name, _, _ in found.frequent()] == ["amod", "det", "nsubj"]
    page = render_alignment(found, "planted <heads>", {"model": "a & b"})
    assert "planted &lt;heads&gt;" in page
    assert page.count("<svg") == 4
    assert page.count(">32</text>") == 3 + 4 + 3 + 4, "numbers in cells: three of four heads, or all"
    assert "script" not in page
    assert "http://www.w3.org/2000/svg" in page
    assert not re.findall(r'(?:src|href)="', page)


def test_rare_relations_are_in_the_numbers_alone(tmp_path: Path) -> None:
    records, parse = planted(tmp_path)
    records = records[: FEWEST_QUERIES - 1]
    shown = shown_of(records)
    collector = Collector(MatchRule(), {})
    maps = {"a": torch.rand(len(records), 2, shown.batch.text.ids.shape[1], 3)}
    collector.add(shown, maps, [queries_of(record, parse)[0] for record in records])
    found = measure_alignment(collector, Lost())
    assert (found.frequent(), set(found.relations)) == ([], {"amod", "det", "nsubj"})


def test_the_held_out_score_is_that_of_heads_chosen_elsewhere() -> None:
    """One head is right on images 0, 2, ..., the other on the rest: both halves choose wrongly."""
    records = [replace(record_of("[/EN#1/other star]"), images=(f"{n}",)) for n in range(10)]
    shown = shown_of(records)
    maps = {"a": torch.zeros(10, 2, 3, 3)}
    for number in range(10):
        maps["a"][number, :, :, 1] = 0.5
        maps["a"][number, number % 2, :, 0] = 1.0
    collector = Collector(MatchRule(), {})
    collector.add(shown, maps, [queries_of(record)[0] for record in records])
    best = measure_alignment(collector, Lost()).phrases.best
    assert best.score.value == 50.0
    assert best.held_out is not None
    assert best.held_out.value == 0.0
    alone = Collector(MatchRule(), {})
    alone.add(shown_of(records[:1]), {"a": maps["a"][:1]}, [queries_of(records[0])[0]])
    assert measure_alignment(alone, Lost()).phrases.best.held_out is None


def test_layers_of_other_widths_and_images_without_regions() -> None:
    records = [record_of("[/EN#1/other star]"), replace(record_of("[/EN#1/other star]"), images=("8",))]
    shown = shown_of(records)
    assert shown.batch.regions is not None
    shown.batch.regions.mask[1] = False
    maps = {"a": torch.ones(2, 1, 3, 3), "b": torch.ones(2, 2, 3, 3)}
    collector = Collector(MatchRule(), {})
    collector.add(shown, maps, [queries_of(record)[0] for record in records])
    found = measure_alignment(collector, Lost(cut_phrases=1, cut_words=2, headless_phrases=3))
    assert found.phrases.accuracy[0, 0] == 50.0
    assert np.isnan(found.phrases.accuracy[0, 1])
    assert found.to_json()["phrases"]["accuracy"][0] == [50.0, None]
    assert found.phrases.upper_bound.value == 50.0
    assert [note.rpartition(" ")[2] for note in found.notes()] == ["1", "2", "3", "1"]
    bare = shown_of(records, regions=0)
    none = Collector(MatchRule(), {})
    none.add(bare, {"a": torch.ones(2, 1, 3, 0)}, [queries_of(record)[0] for record in records])
    assert measure_alignment(none, Lost()).phrases.accuracy.tolist() == [[0.0]]


def test_baselines_that_the_store_cannot_tell_are_left_out() -> None:
    records = [record_of("[/EN#1/other star]")]
    assert set(guess_boxes(records, Store())) == {"most confident", "most frequent class", "same place"}
    assert set(guess_boxes(records, Store(classes=None))) == {"most confident", "same place"}
    assert set(guess_boxes(records, Store(class_confidence=None))) == {"same place"}
    empty = Store(features=np.zeros((0, 1)), boxes=np.zeros((0, 4)), classes=np.zeros(0), class_confidence=np.zeros(0))
    assert guess_boxes(records, empty) == {}


# what cannot be measured


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="lxmert has no layer whose words attend to regions"):
        choose_layers(maps_of({}), (), "lxmert")
    with pytest.raises(
        ConfigError, match=r"no layer 'layer.1' with attention from text to regions. Did you .*layers.1"
    ):
        choose_layers(maps_of({"layers.0": torch.ones(1), "layers.1": torch.ones(1)}), ["layer.1"], "m")
    assert list(choose_layers(maps_of({"a": torch.ones(1), "b": torch.ones(1)}), ["b"], "m")) == ["b"]
    with pytest.raises(ConfigError, match="run is a model of the words alone"):
        check_regions(["7"], None, "run")
    with pytest.raises(DataError, match="none of the images has a region"):
        check_regions(["7"], Store(features=np.zeros((0, 1))), "run")
    check_regions(["7"], Store(), "run")


def test_a_model_whose_streams_never_meet_has_no_map() -> None:
    encoder = models.build("lxmert", replace(models.spec("lxmert").presets["tiny"], num_cross_layers=0)).eval()
    records = [record_of("[/EN#1/other star]")]
    shown = shown_of(records)
    assert shown.batch.regions is not None
    features = torch.zeros(1, 3, encoder.config.feature_size)
    shown = replace(shown, batch=replace(shown.batch, regions=replace(shown.batch.regions, features=features)))
    with pytest.raises(ConfigError, match="has no layer whose words attend to regions"):
        align_heads(
            encoder,
            [shown],
            records=records,
            layout=TextLayout(TOKENIZER, InputSpec()),
            store=Store(),
            parses=None,
            rule=MatchRule(),
        )


# the command

Call = Callable[..., tuple[str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs `visling analysis alignment`; errors are raised."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[str, str]:
        capsys.readouterr()
        app.app(["analysis", "alignment", *map(str, words)], standalone_mode=False)
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("family", models.names())
def test_every_family(call: Call, world: Any, tmp_path: Path, family: str) -> None:
    arguments = (f"{family}:tiny", "--data", world.scenes, "--store", world.regions, "--split", "val")
    shown, _ = call(*arguments, "--out", "found")
    content = json.loads((tmp_path / "found/alignment.json").read_text())
    assert content["format"] == "visling-alignment-1"
    assert (content["family"], content["weights"], content["checkpoint"]) == (family, "random weights, seed 0", None)
    records = read_entities(world.scenes, "val").records
    assert content["phrases"]["queries"] == sum(len(record.phrases) for record in records)
    layers = len(content["layers"])
    assert layers == len(content["phrases"]["accuracy"]) == len(content["phrases"]["mass_on_regions"]) > 0
    assert {"amod", "det", "conj"} <= set(content["relations"])
    assert all(0 <= value <= 100 for row in content["phrases"]["accuracy"] for value in row)
    assert all(0 < value <= 1.0001 for row in content["phrases"]["mass_on_regions"] for value in row)
    assert "amod, dependent to head" in shown
    svg = (tmp_path / "found/alignment.svg").read_text()
    assert svg.startswith("<svg ")
    assert 'role="img"' in svg
    # batches and seeds
    call(*arguments, "--out", "again", "--batch-size", 4)
    again = json.loads((tmp_path / "again/alignment.json").read_text())
    assert again["phrases"]["accuracy"] == content["phrases"]["accuracy"]
    assert np.allclose(again["phrases"]["mass_on_regions"], content["phrases"]["mass_on_regions"], atol=1e-4)
    call(*arguments, "--out", "other", "--seed", 1, "--json")
    assert json.loads((tmp_path / "other/alignment.json").read_text())["weights"] == "random weights, seed 1"


def test_runs_before_and_after_training(call: Call, world: Any, tmp_path: Path) -> None:
    for name, run in (("pretrained", world.pretrained), ("vqa", world.vqa)):
        shutil.copytree(run, tmp_path / name)
    call("pretrained", "--split", "val")
    trained = json.loads((tmp_path / "pretrained/alignment_val/alignment.json").read_text())
    assert trained["weights"] == "trained weights"
    assert len(trained["checkpoint"]) == 64
    call("pretrained", "--split", "val", "--random-weights")
    random = json.loads((tmp_path / "pretrained/alignment_val_random/alignment.json").read_text())
    assert random["phrases"]["mass_on_regions"] != trained["phrases"]["mass_on_regions"]
    assert random["phrases"]["baselines"] == trained["phrases"]["baselines"]
    shown, _ = call("vqa", "--split", "val", "--json", "--pieces", "mean", "--layer", "layers.0")
    found = json.loads(shown)
    assert (found["task"], found["layers"], found["pieces"]) == ("vqa", ["layers.0"], "mean")
    with pytest.raises(RunError, match=r"alignment_val/alignment.json exists. Use --overwrite"):
        call("vqa", "--split", "val")
    call("vqa", "--split", "val", "--overwrite", "--examples", 2)


def write_true_regions(scenes: Path, target: Path) -> Path:
    """A store whose regions are the drawn objects, with random features of width 16."""
    content = json.loads((scenes / "annotations/instances_val.json").read_text())
    rng = np.random.default_rng(0)
    with StoreWriter(target, feature_size=16, fingerprint="drawn") as writer:
        for image in content["images"]:
            corners = [one["bbox"] for one in content["annotations"] if one["image_id"] == image["id"]]
            boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in corners], np.float32)
            array = RegionArray(
                features=rng.standard_normal((len(boxes), 16), np.float32), boxes=boxes, size=(128, 128)
            )
            writer.add(Path(image["file_name"]).stem, array)
    return target


@pytest.mark.parametrize("family", models.names())
def test_numbers_equal_those_counted_row_by_row(world: Any, tmp_path: Path, family: str) -> None:
    """From named words and regions, one sentence at a time, where nothing is padded."""
    store = write_true_regions(world.scenes, tmp_path / "drawn")
    opened = open_preset(f"{family}:tiny", Sentences(), split="val", data=world.scenes, store=store, seed=0)
    records: Any = opened.records
    assert opened.store is not None
    collector, _ = align_heads(
        opened.encoder,
        opened.batches(batch_size=8),
        records=records,
        layout=opened.inputs.layout,
        store=opened.store,
        parses=None,
        rule=MatchRule(),
    )
    found = measure_alignment(collector, Lost()).phrases
    hits: dict[tuple[str, int], list[bool]] = {}
    for shown in opened.batches(batch_size=1):
        ((row,),) = encode_shown(opened.encoder, shown, tokenizer=opened.inputs.tokenizer)
        assert row.maps is not None
        real = [number for number, region in enumerate(row.regions) if not region.special]
        places: Any = PhraseGrounding().example(shown.records[0], opened.inputs.layout, np.random.default_rng(0))
        for phrase, at in zip(shown.records[0].phrases, places.rows[0].phrases, strict=True):
            for layer, probs in row.maps.text_to_regions.items():
                for head, attention in enumerate(probs[:, at]):
                    best = row.regions[max(real, key=lambda k, seen=attention: float(seen[k]))]  # type: ignore[misc]
                    assert best.box is not None
                    right = bool(right_boxes([best.box], phrase.boxes, MatchRule())[0])
                    hits.setdefault((layer, head), []).append(right)
    layers, heads = dict.fromkeys(layer for layer, _ in hits), range(found.accuracy.shape[1])
    counted = [[100 * float(np.mean(hits[layer, head])) for head in heads] for layer in layers]
    assert np.allclose(found.accuracy, counted)
    assert 0 < found.accuracy.min() < found.accuracy.max() < 100
    assert found.upper_bound.value == 100.0


def test_random_weights_depend_on_the_seed_alone(world: Any) -> None:
    opened = open_run(world.pretrained, split="val", reads=Sentences())
    first, same, other = (reset_weights(opened, seed).encoder.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_without_parses_phrases_alone_are_measured(call: Call, world: Any, tmp_path: Path) -> None:
    shutil.copytree(world.scenes / "flickr30k_entities", tmp_path / "data/flickr30k_entities")
    (tmp_path / "data/flickr30k_entities/val.conllu").unlink()
    shown, _ = call(world.pretrained, "--data", "data", "--split", "val", "--out", "found")
    assert "no parses, so no relations" in shown
    call(
        world.pretrained, "--data", "data", "--split", "val", "--out", "named",
        "--parses", world.scenes / "flickr30k_entities/val.conllu",
    )  # fmt: skip
    assert json.loads((tmp_path / "named/alignment.json").read_text())["relations"]


def test_errors_of_the_command(call: Call, world: Any, tmp_path: Path) -> None:
    shutil.copytree(world.scenes / "flickr30k_entities", tmp_path / "data/flickr30k_entities")
    parses = tmp_path / "data/flickr30k_entities/val.conllu"
    parses.write_text(re.sub(r"\tthe\t", "\tan\t", parses.read_text(), count=1))
    common = (world.pretrained, "--split", "val", "--out", "out")

    def refused(kind: type[VislingError], message: str, *words: object) -> None:
        with pytest.raises(kind, match=message):
            call(*words)
        assert not (tmp_path / "out").exists()

    refused(
        DataError, r"the parse 'scene_\d+#\d' does not match its caption .*token \d+ is 'an'", *common, "--data", "data"
    )
    refused(DataError, "no annotation file", *common, "--parses", "none.conllu")
    refused(ConfigError, "no layer 'layers.7' with attention from text to regions", *common, "--layer", "layers.7")
    refused(DataError, "has no Flickr30K Entities of 'nowhere'", world.pretrained, "--split", "nowhere", "--out", "out")
    refused(RunError, "is a preset, not a folder", "lxmert:tiny", "--split", "val")
    refused(RunError, "name --data and --store", "lxmert:tiny", "--split", "val", "--out", "out")
    arguments = ("--data", world.scenes, "--store", world.regions, "--out", "out")
    refused(ConfigError, "lxmert has no preset 'tini'. Did you mean 'tiny'", "lxmert:tini", *arguments)
    refused(ConfigError, "no model 'lxmrt'. Did you mean 'lxmert'", "lxmrt:tiny", *arguments)
    taken = tmp_path / "taken"
    taken.write_text("")
    refused(RunError, "cannot write to", *common[:3], "--out", taken / "sub")


def test_a_run_of_the_words_alone(call: Call, world: Any, tmp_path: Path) -> None:
    shutil.copytree(world.vqa, tmp_path / "blind")
    config = json.loads((tmp_path / "blind/model/config.json").read_text())
    (tmp_path / "blind/model/config.json").write_text(json.dumps(config | {"text_only": True}))
    with pytest.raises(ConfigError, match="blind is a model of the words alone"):
        call("blind", "--split", "val")


def test_images_that_the_store_lacks(call: Call, world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    image = read_entities(world.scenes, "val").records[0].images[0]
    for name, kept in (("less", lambda one: one != image), ("bare", lambda one: True)):
        with StoreWriter(
            tmp_path / name, feature_size=store.feature_size, fingerprint=store.fingerprint,
            class_names=store.class_names, attribute_names=store.attribute_names,
        ) as writer:  # fmt: skip
            for one in filter(kept, store.ids):
                array = store[one]
                if name == "bare" and one == image:
                    array = replace(
                        array,
                        **{
                            field: value[:0]
                            for field in ("features", "boxes", "classes", "class_confidence", "attributes",
                                          "attribute_confidence", "probs")
                            if (value := getattr(array, field)) is not None
                        },
                    )  # fmt: skip
                writer.add(one, array)
    with pytest.raises(StoreError, match=f"needs image '{image}'"):
        call(world.pretrained, "--split", "val", "--store", "less", "--out", "out")
    shown, _ = call(world.pretrained, "--split", "val", "--store", "bare", "--out", "out")
    assert "images in which the detector found nothing, whose queries are misses: 1" in shown
