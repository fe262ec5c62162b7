"""Hidden states on disk: those of the encoder, bit for bit, with the names that belong to them; resumed, refused, read
back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny_models import FAMILIES, save_tiny_model
from numpy.testing import assert_allclose, assert_array_equal

from visling.analysis.encoded_rows import encode_shown
from visling.analysis.encoding import EncodedRow
from visling.analysis.states import States, StatesWriter, read_states, split_layers
from visling.errors import ConfigError, DataError, RunError
from visling.runs.examples import OpenedRun, open_run
from visling.types import Example

ABOUT = {"weights": "abc", "source": "val"}


@pytest.fixture(scope="module")
def opened(world: Any) -> OpenedRun:
    return open_run(world.vqa, split="val", device="cpu")


def encode(opened: OpenedRun, *, batch_size: int = 5, first: int = 0, **given: Any) -> Any:
    """(example, its rows) batch by batch."""
    for shown in opened.batches(batch_size=batch_size, first=first):
        rows = encode_shown(
            opened.encoder,
            shown,
            tokenizer=opened.inputs.tokenizer,
            class_names=opened.class_names,
            attribute_names=opened.attribute_names,
            **given,
        )
        yield list(zip(shown.examples, rows, strict=True))


def export(opened: OpenedRun, folder: Path, *, capture: bool = True, **given: Any) -> States:
    writer = StatesWriter(folder, ABOUT, **given)
    for batch in encode(opened, first=writer.examples, capture=capture):
        for example, rows in batch:
            writer.add(example, rows)
        writer.end_batch()
    writer.finish()
    return read_states(folder)


def all_rows(opened: OpenedRun) -> list[tuple[Example, int, EncodedRow]]:
    return [
        (example, number, row) for batch in encode(opened) for example, rows in batch for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_encoder_bit_for_bit(world: Any, tmp_path: Path, family: str) -> None:
    folder = save_tiny_model(world, family, tmp_path / "model")
    opened = open_run(folder, split="val", data=world.scenes, store=world.regions, device="cpu")
    states = export(opened, tmp_path / "states", shard_bytes=10_000)
    assert len(list((tmp_path / "states").glob("*.safetensors"))) > 1
    expected = all_rows(opened)
    assert len(states) == len(expected) == len(opened.records)
    for found, (example, number, row) in zip(states, expected, strict=True):
        assert (found.id, found.row, found.images) == (example.id, number, example.images)
        assert (found.words, found.regions) == (row.words, row.regions)
        layers = split_layers(row)
        assert list(states.layers) == list(layers)
        for name, streams in layers.items():
            assert states.layers[name] == {stream: values.shape[1] for stream, values in streams.items()}
            if "text" in streams:
                assert_array_equal(found.text[name], streams["text"].numpy())
            if "regions" in streams:
                assert_array_equal(found.region_states[name], streams["regions"].numpy())
        assert found.pooled is not None
        assert_array_equal(found.pooled, row.pooled.numpy())
    assert {record.id for record in opened.records} == {found.id for found in states}
    last = next(reversed(states.layers))
    stacked, rows, special = states.stack(last, "text")
    assert_array_equal(stacked, np.concatenate([row.text_states_of(last) for row in map(_Last, expected)]))
    assert_array_equal(np.bincount(rows), [sum(len(word.tokens) for word in row.words) for _, _, row in expected])
    assert_array_equal(special, [word.special for _, _, row in expected for word in row.words for _ in word.tokens])


class _Last:
    """States of a layer of an encoded row, as arrays."""

    def __init__(self, entry: tuple[Example, int, EncodedRow]) -> None:
        self.layers = split_layers(entry[2])

    def text_states_of(self, layer: str) -> Any:
        return self.layers[layer]["text"].numpy()


@pytest.mark.parametrize("family", ["visualbert", "lxmert"])
def test_states_lie_where_the_encoder_has_them(world: Any, tmp_path: Path, family: str) -> None:
    """Read off the padded tensors by position: in a single stream, regions stand behind the longest text."""
    folder = save_tiny_model(world, family, tmp_path / "model")
    opened = open_run(folder, split="val", data=world.scenes, store=world.regions, device="cpu")
    states = export(opened, tmp_path / "states")
    at = 0
    for shown in opened.batches(batch_size=5):
        batch = shown.batch.unshared()
        with torch.no_grad():
            encoded, fast = (opened.encoder(shown.batch, capture=capture) for capture in (True, False))
        assert encoded.states is not None
        longest = batch.text.ids.shape[1]
        for place in range(len(shown.examples)):
            found, tokens = states[at], int(batch.text.mask[place].sum())
            for name, values in encoded.states.items():
                own = values[place].numpy()
                layer = name.removesuffix(".text").removesuffix(".regions")
                if family == "visualbert":
                    assert_array_equal(found.text[layer], own[:tokens])
                    assert_array_equal(found.region_states[layer], own[longest : longest + len(found.regions)])
                elif "region" in name:
                    assert_array_equal(found.region_states[layer], own[: len(found.regions)])
                else:
                    assert_array_equal(found.text[layer], own[:tokens])
            last = list(found.text)[-1]
            assert_allclose(found.text[last], fast.text[place, :tokens].numpy(), atol=1e-5)
            assert_array_equal(found.pooled, encoded.pooled[place].numpy())
            at += 1
    assert at == len(states)


def test_regions_have_their_class_their_box_and_their_attributes(opened: OpenedRun, tmp_path: Path) -> None:
    store = opened.store
    assert store is not None
    found = export(opened, tmp_path / "states")[0]
    stored = store[found.images[0]]
    assert stored.classes is not None
    for region, number, box in zip(found.regions, stored.classes, stored.boxes, strict=True):
        assert region.class_name == store.class_names[int(number)]
        assert region.name.endswith(region.class_name)
        assert region.box == pytest.approx(box.tolist())


def test_padded_states_come_with_a_mask(opened: OpenedRun, tmp_path: Path) -> None:
    states = export(opened, tmp_path / "states")
    for stream in ("text", "regions"):
        filled, mask = states.padded("layers.0", stream)
        assert filled.shape[:2] == mask.shape
        for number, row in enumerate(states):
            own = (row.text if stream == "text" else row.region_states)["layers.0"]
            assert_array_equal(mask[number], np.arange(mask.shape[1]) < len(own))
            assert_array_equal(filled[number][mask[number]], own)
            assert not filled[number][~mask[number]].any()
    assert len(set(states.padded("layers.0")[1].sum(1))) > 1, "rows of one length would need no mask"


def test_a_resumed_export_equals_an_uninterrupted_one(opened: OpenedRun, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    export(opened, whole, shard_bytes=5_000)
    writer = StatesWriter(parts, ABOUT, shard_bytes=5_000)
    for number, batch in enumerate(encode(opened)):
        for example, rows in batch:
            writer.add(example, rows)
        if number == 1:
            break  # in the middle: this batch is in no shard
        writer.end_batch()
    assert 0 < writer.examples < len(opened.records)
    with pytest.raises(DataError, match=rf"interrupted after {writer.examples} examples\. .*--resume"):
        read_states(parts)
    export(opened, parts, shard_bytes=5_000, resume=True)
    files = sorted(file.name for file in whole.iterdir())
    assert files == sorted(file.name for file in parts.iterdir())
    assert len(files) > 4
    for name in files:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_a_second_export_is_refused(opened: OpenedRun, tmp_path: Path) -> None:
    export(opened, tmp_path)
    with pytest.raises(RunError, match=r"is not empty: it holds shard-00000\.jsonl.*another --out, or --resume"):
        StatesWriter(tmp_path, ABOUT)
    with pytest.raises(RunError, match="are complete: there is nothing to resume"):
        StatesWriter(tmp_path, ABOUT, resume=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"about": {**ABOUT, "weights": "def"}}, "weights was 'abc', now it is 'def'"),
        ({"dtype": "float16"}, "dtype was 'float32', now it is 'float16'"),
        ({"layers": ["layers.0"]}, r"layers was None, now it is \['layers\.0'\]"),
        ({"pooled": False}, "pooled was True, now it is False"),
    ],
)
def test_an_export_is_resumed_with_the_same_inputs_only(
    opened: OpenedRun, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    writer = StatesWriter(tmp_path, ABOUT, shard_bytes=1)
    for example, rows in next(encode(opened)):
        writer.add(example, rows)
    writer.end_batch()
    with pytest.raises(RunError, match=message):
        StatesWriter(tmp_path, given.pop("about", ABOUT), resume=True, **given)


def test_what_is_no_export_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"no hidden states in .*cannot read states\.json"):
        StatesWriter(tmp_path, ABOUT, resume=True)
    assert StatesWriter(tmp_path / "new", ABOUT, resume=True).examples == 0, "nothing was begun: begin"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make the folder"):
        StatesWriter(tmp_path / "file" / "states", ABOUT)


def test_layers_and_pooled_states_are_chosen(opened: OpenedRun, tmp_path: Path) -> None:
    chosen = export(opened, tmp_path / "one", layers=["layers.0"], pooled=False)
    assert list(chosen.layers) == ["layers.0"]
    assert chosen[0].pooled is None
    with pytest.raises(ConfigError, match="holds no pooled states"):
        chosen.pooled()
    pooled = export(opened, tmp_path / "pooled", layers=(), capture=False)
    assert pooled.layers == {}
    assert pooled[0].text == {}
    everything = export(opened, tmp_path / "all")
    assert_allclose(pooled.pooled(), everything.pooled(), atol=1e-5)
    assert_array_equal(chosen.stack("layers.0")[0], everything.stack("layers.0")[0])
    assert sum(len(word.tokens) for word in pooled[0].words) == len(everything[0].text["layers.0"])
    with pytest.raises(ConfigError, match=r"no layer 'layer\.0'\. Did you mean 'layers\.0'\?"):
        export(opened, tmp_path / "none", layers=["layer.0"])
    assert list((tmp_path / "none").iterdir()) == [], "the corrected command can use the same folder"


def test_half_precision_rounds_and_refuses_what_it_cannot_hold(opened: OpenedRun, tmp_path: Path) -> None:
    half, full = export(opened, tmp_path / "half", dtype="float16"), export(opened, tmp_path / "full")
    values = half.stack("layers.0")[0]
    assert values.dtype == np.float16
    assert_array_equal(values, full.stack("layers.0")[0].astype(np.float16))
    example, rows = next(encode(opened))[0]
    assert rows[0].states is not None
    rows[0].states["layers.0"][0, 0] = 1e5
    with pytest.raises(DataError, match=r"text/layers\.0 has a state of 1e\+05.*--dtype float32"):
        StatesWriter(tmp_path / "large", ABOUT, dtype="float16").add(example, rows)


def test_states_are_a_sequence_that_names_what_it_lacks(opened: OpenedRun, tmp_path: Path) -> None:
    states = export(opened, tmp_path / "states", shard_bytes=5_000)
    assert [row.id for row in states[-2:]] == [record.id for record in opened.records[-2:]]
    assert states[-1].id == opened.records[-1].id
    with pytest.raises(IndexError):
        states[len(states)]
    with pytest.raises(ConfigError, match=r"holds no layer 'layers\.9'\. Did you mean 'layers\.0'\?"):
        states.stack("layers.9")
    with pytest.raises(ConfigError, match=r"no states of 'pixels'; it has: text, regions"):
        states.stack("layers.0", "pixels")
    assert repr(states).endswith(f": {len(states)} rows, layers embeddings, layers.0, float32)")
    assert repr(states[0]).startswith(f'StateRow({states[0].id}, "[CLS] ')
    assert len(repr(states[0])) < 200


def _truncate(folder: Path) -> None:
    file = folder / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lose_a_line(folder: Path) -> None:
    file = folder / "shard-00000.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def _lose_a_shard(folder: Path) -> None:
    (folder / "shard-00000.safetensors").unlink()


def _break_the_manifest(folder: Path) -> None:
    (folder / "states.json").write_text("{")


def _change_the_format(folder: Path) -> None:
    (folder / "states.json").write_text(json.dumps({"format": "other"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "shard-00000.safetensors is damaged or missing"),
        (_lose_a_line, "11 rows where the manifest has 12"),
        (_lose_a_shard, "shard-00000.safetensors is damaged or missing"),
        (_break_the_manifest, "states.json is damaged"),
        (_change_the_format, "does not describe hidden states"),
    ],
)
def test_damaged_files_are_named(opened: OpenedRun, tmp_path: Path, damage: Any, message: str) -> None:
    export(opened, tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        read_states(tmp_path)


def test_a_limit_takes_the_first_examples(world: Any, opened: OpenedRun, tmp_path: Path) -> None:
    few = open_run(world.vqa, split="val", device="cpu", limit=3)
    states: Sequence[Any] = export(few, tmp_path)
    assert [row.id for row in states] == [record.id for record in opened.records[:3]]
