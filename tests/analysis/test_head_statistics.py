"""What heads attend to, against hand-made maps, an independent count, and other ways to batch the same questions."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny_models import FAMILIES, save_tiny_model
from numpy.testing import assert_allclose
from torch import Tensor

from visling import api
from visling.analysis.encoded_rows import encode_shown
from visling.analysis.encoding import EncodedRow, Encoding, NamedRegion, Word
from visling.analysis.head_statistics import (
    QUANTITIES,
    HeadStatistics,
    HeadSums,
    head_statistics,
    render_heads,
)
from visling.api import Question
from visling.runs.examples import open_run
from visling.types import Maps

QUESTIONS = ("how many objects are there?", "what colour is the star?", "is there a ring left of the small moon?")


def joint_maps(joint: Tensor, tokens: int) -> Maps:
    """The four quadrants of attention (H, N, N) of one layer over one sequence."""
    text, regions = slice(None, tokens), slice(tokens, None)
    return Maps(
        text_to_text={"layers.0": joint[:, text, text]},
        text_to_regions={"layers.0": joint[:, text, regions]},
        regions_to_text={"layers.0": joint[:, regions, text]},
        regions_to_regions={"layers.0": joint[:, regions, regions]},
    )


def row_of(words: list[str], regions: list[str], maps: Maps) -> EncodedRow:
    """A row of single-piece words; what stands in brackets, and the whole image, is special."""
    return EncodedRow(
        words=tuple(Word(text=w, tokens=(at,), pieces=(w,), special=w.startswith("[")) for at, w in enumerate(words)),
        regions=tuple(
            NamedRegion(at=at, name=name, box=(0, 0, 1, 1), special=name in ("whole image", "[END]"))
            for at, name in enumerate(regions)
        ),
        text_states=torch.zeros(len(words), 1),
        region_states=torch.zeros(len(regions), 1),
        pooled=torch.zeros(1),
        whole=None,
        maps=maps,
        states=None,
    )


def statistics_of(*rows: EncodedRow) -> HeadStatistics:
    return head_statistics(Encoding(question="", images=(), rows=(row,)) for row in rows)


WORDS, REGIONS = ["[CLS]", "red", "star", "[SEP]"], ["star", "whole image", "moon"]
#  [CLS]  red   star [SEP] star whole moon
RED = [0.10, 0.20, 0.05, 0.05, 0.30, 0.20, 0.10]
STAR = [0.20, 0.10, 0.10, 0.10, 0.05, 0.05, 0.40]
MOON = [0.05, 0.05, 0.20, 0.10, 0.10, 0.20, 0.30]
NEVER = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
"""Attention of what is special, and of the region that is tested apart: it must not enter any mean."""


def hand_made() -> EncodedRow:
    joint = torch.tensor([NEVER, RED, STAR, NEVER, MOON, NEVER, MOON])[None]
    return row_of(WORDS, REGIONS, joint_maps(joint, len(WORDS)))


def entropy_of(shares: list[float]) -> float:
    total = sum(shares)
    return -sum(share / total * math.log(share / total) for share in shares if share)


def test_hand_made_maps_have_the_statistics_that_a_pencil_finds() -> None:
    found = statistics_of(hand_made())
    expected = {
        "text_to_text": {
            "mass": (0.4 + 0.5) / 2,
            "special_mass": (0.15 + 0.30) / 2,
            "largest_mass": (0.20 + 0.10) / 2,
            "own_mass": (0.20 + 0.10) / 2,
            "entropy": (entropy_of(RED[:4]) + entropy_of(STAR[:4])) / 2,
            "normalised_entropy": (entropy_of(RED[:4]) + entropy_of(STAR[:4])) / 2 / math.log(4),
        },
        "text_to_regions": {
            "mass": (0.6 + 0.5) / 2,
            "special_mass": (0.20 + 0.05) / 2,
            "largest_mass": (0.30 + 0.40) / 2,
            "entropy": (entropy_of(RED[4:]) + entropy_of(STAR[4:])) / 2,
            "normalised_entropy": (entropy_of(RED[4:]) + entropy_of(STAR[4:])) / 2 / math.log(3),
        },
        "regions_to_text": {
            "mass": 0.4,
            "special_mass": 0.15,
            "largest_mass": 0.20,
            "entropy": entropy_of(MOON[:4]),
            "normalised_entropy": entropy_of(MOON[:4]) / math.log(4),
        },
        "regions_to_regions": {
            "mass": 0.6,
            "special_mass": 0.20,
            "largest_mass": 0.30,
            "own_mass": (0.10 + 0.30) / 2,
            "entropy": entropy_of(MOON[4:]),
            "normalised_entropy": entropy_of(MOON[4:]) / math.log(3),
        },
    }
    for direction, quantities in expected.items():
        part = found.directions[direction]
        assert {name: values.shape for name, values in part.quantities.items()} == dict.fromkeys(quantities, (1, 1))
        assert {name: values.item() for name, values in part.quantities.items()} == pytest.approx(quantities, abs=1e-6)
        assert part.by_construction == ()
    counts = {name: (part.queries, part.special_queries) for name, part in found.directions.items()}
    assert counts == dict.fromkeys(("text_to_text", "text_to_regions"), (2, 2)) | dict.fromkeys(
        ("regions_to_text", "regions_to_regions"), (2, 1)
    )


def test_leaving_out_special_tokens_does_not_move_the_border_to_the_regions() -> None:
    """Where [CLS] and [SEP] are cut from a joint matrix and the border stays, regions leak into means of the text."""
    to_regions = torch.zeros(1, 7, 7)
    to_regions[:, :, 4] = 1.0  # everything looks at the first region, right behind the border
    found = statistics_of(row_of(WORDS, REGIONS, joint_maps(to_regions, len(WORDS))))
    assert found.array("mass", "text_to_text").item() == 0.0
    assert found.array("mass", "text_to_regions").item() == 1.0
    to_last_word = torch.zeros(1, 7, 7)
    to_last_word[:, :, 2] = 1.0
    found = statistics_of(row_of(WORDS, REGIONS, joint_maps(to_last_word, len(WORDS))))
    assert found.array("mass", "text_to_text").item() == 1.0
    assert found.array("special_mass", "text_to_text").item() == 0.0
    assert found.array("mass", "text_to_regions").item() == 0.0


def test_a_layer_that_sees_one_modality_has_its_mass_by_construction() -> None:
    cross = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]])
    maps = Maps(
        text_to_text={"text_layers.0": torch.full((1, 4, 4), 0.25)},
        text_to_regions={"cross_layers.0": cross},
        regions_to_text={},
        regions_to_regions={},
    )
    found = statistics_of(row_of(WORDS, ["star", "moon"], maps))
    assert list(found.directions) == ["text_to_text", "text_to_regions"], "no direction is guessed"
    part = found.directions["text_to_regions"]
    assert (part.layers, part.by_construction) == (("cross_layers.0",), ("cross_layers.0",))
    assert part.quantities["mass"].item() == 1.0
    assert part.quantities["largest_mass"].item() == pytest.approx((0.5 + 1.0) / 2)
    assert found.directions["text_to_text"].by_construction == ("text_layers.0",)
    assert found.array("normalised_entropy", "text_to_text").item() == pytest.approx(1.0), "uniform attention"


def test_what_has_nothing_to_attend_to_is_left_out_and_is_no_number() -> None:
    def seen(regions: list[str]) -> EncodedRow:
        size = len(WORDS) + len(regions)
        return row_of(WORDS, regions, joint_maps(torch.full((2, size, size), 1 / size), len(WORDS)))

    alone = statistics_of(seen(["whole image"]))
    part = alone.directions["text_to_regions"]
    assert (part.queries, part.special_queries) == (0, 0)
    assert part.quantities["mass"].shape == (1, 2)
    assert np.isnan(part.quantities["mass"]).all()
    assert alone.directions["text_to_text"].queries == 2
    with_nothing = statistics_of(seen(["star", "moon"]), seen(["whole image"]))
    assert_allclose(with_nothing.array("mass", "text_to_regions"), [[2 / 6, 2 / 6]], rtol=1e-6)
    one_region = statistics_of(seen(["star"]))
    assert np.isnan(one_region.array("normalised_entropy", "text_to_regions")).all(), "one key is neither"
    assert one_region.array("entropy", "text_to_regions").tolist() == [[0.0, 0.0]]
    written = json.loads(json.dumps(alone.to_json(), allow_nan=False))
    assert written["statistics"]["mass"]["text_to_regions"] == {"layers.0": [None, None]}


def test_layers_with_other_numbers_of_heads_stand_side_by_side() -> None:
    maps = Maps(
        text_to_text={"wide": torch.full((3, 4, 4), 0.25), "narrow": torch.eye(4)[None]},
        text_to_regions={},
        regions_to_text={},
        regions_to_regions={},
    )
    values = statistics_of(row_of(WORDS, [], maps)).array("own_mass", "text_to_text")
    assert_allclose(values, [[0.25, 0.25, 0.25], [1.0, np.nan, np.nan]])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, world: Any, tmp_path_factory: pytest.TempPathFactory) -> api.Predictor:
    folder = tmp_path_factory.mktemp("models") / request.param
    return api.load(save_tiny_model(world, request.param, folder), device="cpu")


def ask(model: api.Predictor, world: Any) -> list[Question]:
    """Questions of several lengths about two images with other numbers of regions."""
    pictures = sorted((world.scenes / "images" / "test").glob("*.png"))[:2]
    return [Question(picture, text) for picture in pictures for text in QUESTIONS]


def count_by_hand(encodings: list[Encoding]) -> dict[tuple[str, str, str], list[float]]:
    """Means of (quantity, direction, layer), one per head, by going through every query one by one."""
    values: dict[tuple[str, str, str], list[list[float]]] = {}
    for encoding in encodings:
        for row in encoding.rows:
            assert row.maps is not None
            special = {
                "text": [word.special for word in row.words for _ in word.tokens],
                "regions": [region.special for region in row.regions],
            }
            for direction in ("text_to_text", "text_to_regions", "regions_to_text", "regions_to_regions"):
                source, target = direction.split("_to_")
                for layer, maps in getattr(row.maps, direction).items():
                    for query in (at for at, hidden in enumerate(special[source]) if not hidden):
                        heads = maps[:, query].tolist()
                        kept = [[w for w, s in zip(head, special[target], strict=True) if not s] for head in heads]
                        measured = {
                            "mass": [sum(head) for head in heads],
                            "special_mass": [sum(head) - sum(real) for head, real in zip(heads, kept, strict=True)],
                            "largest_mass": [max(real) for real in kept],
                            "entropy": [entropy_of(head) for head in heads],
                            "normalised_entropy": [entropy_of(head) / math.log(len(head)) for head in heads],
                        }
                        if source == target:
                            measured["own_mass"] = [head[query] for head in heads]
                        for quantity, of_heads in measured.items():
                            values.setdefault((quantity, direction, layer), []).append(of_heads)
    return {key: np.mean(of_queries, axis=0).tolist() for key, of_queries in values.items()}


def assert_same(found: HeadStatistics, expected: HeadStatistics, tolerance: float) -> None:
    assert found.questions == expected.questions
    assert found.directions.keys() == expected.directions.keys()
    for name, part in found.directions.items():
        other = expected.directions[name]
        assert (part.layers, part.by_construction) == (other.layers, other.by_construction)
        assert (part.queries, part.special_queries) == (other.queries, other.special_queries)
        for quantity, values in part.quantities.items():
            assert not np.isnan(values).any()
            assert_allclose(values, other.quantities[quantity], rtol=0, atol=tolerance, err_msg=f"{quantity} {name}")


def test_statistics_of_every_family_are_those_counted_query_by_query(model: api.Predictor, world: Any) -> None:
    encodings = list(model.encode_each(ask(model, world), capture=True))
    found = head_statistics(encodings).by_quantity()
    expected = count_by_hand(encodings)
    assert {key for key, _ in expected.items()} == {
        (quantity, direction, layer)
        for quantity, directions in found.items()
        for direction, layers in directions.items()
        for layer in layers
    }
    for (quantity, direction, layer), heads in expected.items():
        assert found[quantity][direction][layer] == pytest.approx(heads, abs=2e-6)
    spread = [max(heads) - min(heads) for (quantity, _, _), heads in expected.items() if quantity == "entropy"]
    assert max(spread) > 0.05, "heads that are all alike would let a mix-up pass"


def test_padding_and_batches_change_no_statistic(model: api.Predictor, world: Any) -> None:
    questions = ask(model, world)
    together = head_statistics(model.encode_each(questions, capture=True))
    alone = head_statistics(model.encode(one.image, one.text, capture=True) for one in questions)
    assert_same(together, alone, 2e-6)


def test_a_data_set_has_the_statistics_of_its_parts(model: api.Predictor, world: Any) -> None:
    encodings = list(model.encode_each(ask(model, world), capture=True))
    whole, (first, second) = (
        head_statistics(encodings),
        (head_statistics(part) for part in (encodings[:2], encodings[2:])),
    )
    for name, part in whole.directions.items():
        one, two = first.directions[name], second.directions[name]
        assert part.queries == one.queries + two.queries
        for quantity, values in part.quantities.items():
            joined = one.queries * one.quantities[quantity] + two.queries * two.quantities[quantity]
            assert_allclose(values, joined / part.queries, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_data_set_has_the_same_statistics_whatever_the_batch(
    model: api.Predictor, world: Any, batch_size: int
) -> None:
    def measure(size: int) -> HeadStatistics:
        opened = open_run(model.folder.path, split="val", data=world.scenes, store=world.regions, device="cpu")
        assert len(opened.records) == 12
        sums = HeadSums()
        for shown in opened.batches(batch_size=size):
            for rows in encode_shown(opened.encoder, shown, tokenizer=opened.inputs.tokenizer):
                sums.add(rows)
        return sums.statistics()

    assert_same(measure(batch_size), measure(12), 2e-6)


def test_the_json_and_the_page_say_what_the_numbers_are() -> None:
    statistics = statistics_of(hand_made())
    written = json.loads(json.dumps(statistics.to_json(), allow_nan=False))
    assert (written["format"], written["questions"]) == ("visling-heads-1", 1)
    assert written["quantities"] == dict(QUANTITIES)
    assert written["directions"]["text_to_regions"] == {
        "layers": ["layers.0"], "mass_is_1_by_construction": [], "queries": 2, "special_queries": 2,
    }  # fmt: skip
    assert written["statistics"]["mass"]["text_to_regions"]["layers.0"] == [pytest.approx(0.55)]
    page = render_heads(statistics, "vqa <val>")
    assert "vqa &lt;val&gt;" in page
    assert page.count("<svg") == sum(len(part.quantities) for part in statistics.directions.values())
    assert "<title>layers.0, 0: 0.550</title>" in page
    assert "Attention is not an explanation" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert repr(statistics).splitlines()[2] == "  text_to_regions: 1 layers x 1 heads, 2 queries"
