"""`model.attend`: maps with names, what is joined and how, and what is said of what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny_models import FAMILIES, save_tiny_model
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from visling import api
from visling.analysis.attention import Attention, attend
from visling.analysis.encoding import EncodedRow, Encoding, NamedRegion, Word
from visling.errors import ConfigError, DataError
from visling.types import Maps, RegionArray

QUESTION = "how many objects are there?"


def hand_made(*, rows: int = 1) -> Attention:
    """Two layers of two heads over "[CLS] unhappy star [SEP]", whose second word has two pieces, and three regions."""
    words = (
        Word(text="[CLS]", tokens=(0,), pieces=("[CLS]",), special=True),
        Word(text="unhappy", tokens=(1, 2), pieces=("un", "##happy")),
        Word(text="star", tokens=(3,), pieces=("star",)),
        Word(text="[SEP]", tokens=(4,), pieces=("[SEP]",), special=True),
    )
    regions = (
        NamedRegion(at=0, name="whole image", box=(0, 0, 9, 9), special=True),
        NamedRegion(at=1, name="red star", box=(1, 1, 3, 3), confidence=0.9),
        NamedRegion(at=2, name="moon", box=(4, 4, 8, 8), confidence=0.8),
    )
    draws = torch.Generator().manual_seed(0)
    joint = {name: torch.rand(2, 8, 8, generator=draws).softmax(-1) for name in ("layers.0", "layers.1")}
    text, seen = slice(None, 5), slice(5, None)
    row = EncodedRow(
        words=words,
        regions=regions,
        text_states=torch.zeros(5, 1),
        region_states=torch.zeros(3, 1),
        pooled=torch.zeros(1),
        whole=None,
        maps=Maps(
            text_to_text={name: probs[:, text, text] for name, probs in joint.items()},
            text_to_regions={name: probs[:, text, seen] for name, probs in joint.items()},
            regions_to_text={"layers.1": joint["layers.1"][:, seen, text]},
            regions_to_regions={},
        ),
        states=None,
    )
    return attend(Encoding(question="unhappy star", images=(Image.new("RGB", (9, 9)),), rows=(row,) * rows))


@pytest.fixture(scope="module")
def model(world: Any) -> api.Predictor:
    return api.load(world.vqa, device="cpu")


def test_three_lines_show_where_a_word_looks(world: Any) -> None:
    model = api.load(world.vqa, device="cpu")
    attention = model.attend(world.picture(), QUESTION)
    found = attention.map("layers.0", head=1)
    assert found.rows == ("[CLS]", "how", "many", "objects", "are", "there", "?", "[MASK]", "[SEP]")
    assert found.columns == tuple(region.name for region in attention.encoding.regions)
    maps = attention.encoding.maps
    assert maps is not None
    assert_array_equal(found.values, maps.text_to_regions["layers.0"][1].numpy())
    best = attention.top("objects", 3, layer="layers.0", head=1)
    order = np.argsort(-found.values[3], kind="stable")[:3]
    assert [one.region.at for one in best] == order.tolist()
    assert [one.mass for one in best] == found.values[3][order].tolist()
    assert attention.heads.directions["text_to_regions"].queries == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_directions_of_every_family_are_those_it_computes(world: Any, tmp_path: Path, family: str) -> None:
    model = api.load(save_tiny_model(world, family, tmp_path / family), device="cpu")
    attention = model.attend(world.picture(), QUESTION)
    assert list(attention.directions) == ["text_to_text", "text_to_regions", "regions_to_text", "regions_to_regions"]
    row = attention.encoding.rows[0]
    tokens = [piece for word in row.words for piece in word.pieces]
    for direction, layers in attention.directions.items():
        for layer in layers:
            found = attention.map(layer, 0, direction, words=False)
            names = {"text": tuple(tokens), "regions": tuple(region.name for region in row.regions)}
            source, target = direction.split("_to_")
            assert (found.rows, found.columns) == (names[source], names[target])
            assert found.values.shape == (len(found.rows), len(found.columns))
            assert found.values.max() > 0
    assert {one.region.special for one in attention.top("objects", 99)} == {False}
    assert len(attention.top("objects", 99)) == sum(not region.special for region in row.regions)


def test_pieces_are_joined_into_words_and_given_on_demand() -> None:
    attention = hand_made()
    maps = attention.encoding.maps
    assert maps is not None
    probs = maps.text_to_text["layers.0"][0].numpy()
    pieces = attention.map("layers.0", 0, "text_to_text", words=False)
    assert pieces.rows == pieces.columns == ("[CLS]", "un", "##happy", "star", "[SEP]")
    assert_array_equal(pieces.values, probs)
    words = attention.map("layers.0", 0, "text_to_text")
    assert words.rows == words.columns == ("[CLS]", "unhappy", "star", "[SEP]")
    columns = np.stack([probs[:, 0], probs[:, 1] + probs[:, 2], probs[:, 3], probs[:, 4]], 1)
    expected = np.stack([columns[0], (columns[1] + columns[2]) / 2, columns[3], columns[4]])
    assert_allclose(words.values, expected, rtol=1e-6)
    assert_allclose(words.values.sum(1) + attention.map("layers.0", 0).values.sum(1), 1, rtol=1e-6)
    back = attention.map("layers.1", 1, "regions_to_text")
    raw = maps.regions_to_text["layers.1"][1].numpy()
    assert back.rows == ("whole image", "red star", "moon")
    assert_allclose(back.values[:, 1], raw[:, 1] + raw[:, 2], rtol=1e-6)


def test_heads_and_layers_are_joined_by_mean_or_maximum() -> None:
    attention = hand_made()
    single = [attention.map(layer, head).values for layer in ("layers.0", "layers.1") for head in (0, 1)]
    assert_allclose(attention.map("layers.1").values, (single[2] + single[3]) / 2, rtol=1e-6)
    assert_allclose(attention.map().values, np.mean(single, axis=0), rtol=1e-6)
    assert_array_equal(attention.map(over="max").values, np.max(single, axis=0))
    assert_array_equal(attention.map("layers.0", [1]).values, single[1])
    assert_array_equal(attention.map(["layers.0", "layers.1"], 1, over="max").values, np.maximum(single[1], single[3]))
    joined = attention.map(over="max")
    assert (joined.layers, joined.heads, joined.over) == (("layers.0", "layers.1"), (0, 1), "max")
    assert repr(joined) == "LabelledMap(text to regions, 2 layers, max of 2 heads: 4 x 3)"
    assert joined.to_json()["values"] == joined.values.tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": "layer.1"}, r"no layer 'layer\.1'\. Did you mean 'layers\.1'\? .*: layers\.0, layers\.1\."),
        (
            {"layer": "layers.0", "direction": "regions_to_text"},
            r"'layers\.0' has no maps regions_to_text; it has: text_to_text, text_to_regions\. .*: layers\.1\.",
        ),
        ({"direction": "text_to_region"}, r"no direction 'text_to_region'\. Did you mean 'text_to_regions'\?"),
        ({"head": 2}, r"head 2 is not there: a layer has 2 heads, numbered from 0 to 1"),
        ({"head": -1}, r"head -1 is not there"),
        ({"head": []}, r"an empty list of heads"),
        ({"layer": []}, r"an empty list of layers.* layers\.0, layers\.1"),
        ({"row": 1}, r"no row 1: the question has 1"),
    ],
)
def test_what_is_not_there_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hand_made().map(**given)


def test_a_direction_without_maps_says_which_there_are() -> None:
    with pytest.raises(
        DataError, match=r"no maps regions_to_regions.*It has: text_to_text, text_to_regions, regions_to_text"
    ):
        hand_made().map(direction="regions_to_regions")


def test_a_word_that_is_not_in_the_text_is_named() -> None:
    with pytest.raises(DataError, match=r"no word 'stars'\. Did you mean 'star'\?"):
        hand_made().top("stars")


@pytest.mark.parametrize("family", ["visualbert", "vilbert", "vlbert"])
def test_an_image_without_regions_says_so(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = api.load(save_tiny_model(world, family, tmp_path / family), device="cpu")
    empty = RegionArray(features=np.zeros((0, 16), np.float32), boxes=np.zeros((0, 4), np.float32), size=(64, 64))
    monkeypatch.setattr(model, "_detect", lambda pixels: empty)
    attention = model.attend(Image.new("RGB", (64, 64)), QUESTION)
    with pytest.raises(DataError, match="the detector found no region in the image"):
        attention.top("objects")
    assert attention.map(direction="text_to_text").values.shape == (len(attention.encoding.words),) * 2
    assert "text_to_text" in attention.heads.directions
    assert attention.heads._repr_html_().startswith("<div><svg")


@pytest.mark.parametrize("family", ["visualbert", "lxmert", "vilbert"])
def test_a_model_of_the_words_alone_says_so(world: Any, tmp_path: Path, family: str) -> None:
    model = api.load(save_tiny_model(world, family, tmp_path / family, text_only=True), device="cpu")
    attention = model.attend(world.picture(), QUESTION)
    for ask in (attention.map, lambda: attention.top("objects")):
        with pytest.raises(DataError, match=r"trained on the words alone.*It has: text_to_text"):
            ask()
    assert attention.map(direction="text_to_text").rows[1] == "how"


def test_an_encoding_without_maps_says_how_to_get_them(world: Any, model: api.Predictor) -> None:
    with pytest.raises(DataError, match="capture=True"):
        attend(model.encode(world.picture(), QUESTION))


def test_maps_and_heads_show_themselves_in_notebooks(world: Any, model: api.Predictor) -> None:
    attention = model.attend(world.picture(), "what is <this>?")
    shown = attention._repr_html_()
    assert "what is &lt;this&gt;?" in shown
    assert shown.count("<svg") == 4
    assert "Attention is not an explanation" in shown
    drawn = attention.map("layers.0", 0)._repr_html_()
    assert drawn.count("<rect") == attention.map("layers.0", 0).values.size + 6, "a cell each, and the scale"
    assert len(repr(model.attend(world.picture(), "star " * 300))) < 600
    assert repr(hand_made(rows=2)).startswith('Attention("unhappy star", 3 regions, 2 rows)')
    assert_array_equal(hand_made(rows=2).map(row=1).values, hand_made().map().values)
