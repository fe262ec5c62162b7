"""Principal components: those of numpy's singular value decomposition, and the map that shows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.tiny_models import save_tiny_model
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from visling.analysis.encoded_rows import encode_shown
from visling.analysis.projection import principal_components, project
from visling.analysis.states import States, StatesWriter, read_states
from visling.errors import ConfigError, DataError
from visling.runs.examples import open_run


def blocks_of(states: NDArray[Any], size: int) -> Callable[[], Iterable[NDArray[Any]]]:
    return lambda: (states[first : first + size] for first in range(0, len(states), size))


def decompose(states: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Axes and shares of the variance by numpy's SVD, the largest loading of an axis positive."""
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    signs = np.sign([axis[np.abs(axis).argmax()] for axis in axes])
    return axes * signs[:, None], sizes[:2] ** 2 / (sizes**2).sum()


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_components_are_those_of_the_singular_value_decomposition(size: int, offset: float) -> None:
    draws = np.random.default_rng(0)
    states = draws.normal(size=(60, 6)) @ np.diag([3.0, 2.0, 1.0, 0.5, 0.3, 0.1]) + offset
    found = principal_components(blocks_of(states, size))
    axes, shares = decompose(states)
    assert_allclose(found.axes, axes, atol=1e-9)
    assert_allclose(found.shares, shares, rtol=1e-9)
    assert_allclose(found.project(states), (states - states.mean(0)) @ axes.T, atol=1e-8)
    assert found.positions == 60
    assert (np.take_along_axis(found.axes, np.abs(found.axes).argmax(1)[:, None], 1) > 0).all()


def test_components_of_half_precision_are_computed_in_double() -> None:
    states = (np.random.default_rng(1).normal(size=(500, 4)) * [300, 20, 1, 1] + 2000).astype(np.float16)
    axes, shares = decompose(states)
    found = principal_components(blocks_of(states, 64))
    assert_allclose(found.axes, axes, atol=1e-8)
    assert_allclose(found.shares, shares, rtol=1e-8)


def test_too_few_states_or_equal_ones_have_no_components() -> None:
    with pytest.raises(DataError, match="at least three states; found 2"):
        principal_components(blocks_of(np.eye(2), 2))
    with pytest.raises(DataError, match="found 0"):
        principal_components(list)
    with pytest.raises(DataError, match="all alike"):
        principal_components(blocks_of(np.ones((5, 3)), 2))


def export(world: Any, folder: Path, run: Path, **given: Any) -> States:
    opened = open_run(run, split="val", device="cpu", **given)
    writer = StatesWriter(folder, {}, shard_bytes=10_000)
    for shown in opened.batches(batch_size=5):
        rows = encode_shown(
            opened.encoder, shown, tokenizer=opened.inputs.tokenizer, class_names=opened.class_names,
            attribute_names=opened.attribute_names,
        )  # fmt: skip
        for example, of_example in zip(shown.examples, rows, strict=True):
            writer.add(example, of_example)
        writer.end_batch()
    writer.finish()
    return read_states(folder)


@pytest.fixture(scope="module")
def states(world: Any, tmp_path_factory: pytest.TempPathFactory) -> States:
    return export(world, tmp_path_factory.mktemp("states") / "vqa", world.vqa)


def test_words_and_regions_are_on_one_map(states: States) -> None:
    found = project(states, "layers.0")
    parts = []
    for stream in ("text", "regions"):
        values, _, special = states.stack("layers.0", stream)
        parts.append(values[~special])
    together = np.concatenate(parts)
    axes, _ = decompose(together)
    expected = (together - together.mean(0, dtype=np.float64)) @ axes.T
    assert_allclose([[point.x, point.y] for point in found.points], expected, atol=1e-5)
    assert [point.kind for point in found.points] == ["word"] * len(parts[0]) + ["region"] * len(parts[1])
    for point in found.points:
        row = states[point.row]
        assert row.id == point.id
        if point.kind == "region":
            region = row.regions[point.position]
            assert (point.text, point.label) == (region.name, region.class_name)
        else:
            word = next(word for word in row.words if point.position in word.tokens)
            assert not word.special
            assert point.text == word.text
            assert point.label in word.pieces
    with_special = project(states, "layers.0", special=True)
    assert with_special.components.positions == sum(len(states.stack("layers.0", s)[0]) for s in ("text", "regions"))
    assert "[CLS]" in {point.text for point in with_special.points}


@pytest.mark.parametrize("most", [1, 7, 50])
def test_a_map_shows_an_even_sample(states: States, most: int) -> None:
    whole, part = project(states, "layers.0"), project(states, "layers.0", most=most)
    step = -(-len(whole.points) // most)
    expected = whole.points[::step]
    assert [(p.row, p.position, p.kind) for p in part.points] == [(p.row, p.position, p.kind) for p in expected]
    assert_allclose([(p.x, p.y) for p in part.points], [(p.x, p.y) for p in expected], rtol=1e-9)
    assert 0 < len(part.points) <= most
    assert_allclose(part.components.axes, whole.components.axes)
    assert part.components.positions == len(whole.points), "components are those of all positions"


def test_the_page_stands_alone_and_names_every_point(states: States) -> None:
    found = project(states, "layers.0", most=40)
    page = found.to_html()
    assert page.count("<circle ") == sum(point.kind == "word" for point in found.points)
    assert page.count("<title>") == len(found.points) + 1
    assert f"{len(found.points)} of {found.components.positions} positions are drawn" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    for name in ("modality", "class", "word"):
        assert f'id="by-{name}"' in page
        assert f"#by-{name}:checked ~ figure .{name}-0" in page
        assert f"{name}-0" in page.partition("</style>")[2]
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (written["format"], written["layer"]) == ("visling-projection-1", "layers.0")
    assert len(written["points"]) == len(found.points)
    assert written["points"][0]["x"] == found.points[0].x
    assert np.array(written["axes"]).shape == (2, states.layers["layers.0"]["text"])
    assert repr(found).startswith(f"Projection(layers.0: {len(found.points)} of ")


def test_a_layer_that_cannot_be_drawn_is_named(world: Any, states: States, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no layer 'layers\.7'\. Did you mean 'layers\.0'\?"):
        project(states, "layers.7")
    with pytest.raises(ConfigError, match="at least one point; found 0"):
        project(states, "layers.0", most=0)
    folder = save_tiny_model(world, "vilbert", tmp_path / "model")
    wide = export(world, tmp_path / "states", folder, data=world.scenes, store=world.regions)
    with pytest.raises(
        ConfigError,
        match=r"different widths \(text 32 and regions 24\).*one stream: text_embeddings, region_embeddings",
    ):
        project(wide, "co_attention_layers.0")
    assert {point.kind for point in project(wide, "region_layers.0").points} == {"region"}
