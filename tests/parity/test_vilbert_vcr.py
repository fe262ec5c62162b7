"""ViLBERT's fine-tuning on VCR (`golden/vilbert_tasks/vcr`; the README in the folder above says what is in each file):
rows of both releases, links, regions, losses, scores and gradients.

Names are drawn once per question here, and per entry in the releases (four entries of a test question have four sets of
names), so the recorded draws are put in place of ours. Mistakes of the releases that are not imitated, and that the
tests put in place for the comparison: the first release goes on with a question that an earlier choice has cut
(`Chained`); the multi-task release splits the written pieces once more (`SplitTwice`), and stops at long questions
(`facts_mt.json`). The identity of an entry, which is the number of its image there, is the question's here.

The recorded rows begin with the whole image, which here is last, and whose recorded feature, a mean of two means, is
the mean of all regions here unless it is given. Recorded boxes may leave the image; ours are clipped. The links of the
first release (`co_attention_mask`) have no effect on its attention; here the encoder has none, and the setting
`links` none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_vilbert import Recording
from torch import Tensor
from torch.testing import assert_close

from visling import models
from visling.data import named_text
from visling.data.annotations.vcr import VcrRecord, read_vcr
from visling.data.batches.collate import Collator
from visling.data.named_objects import draw_names, read_name_table
from visling.data.text import TextLayout, Tokenizer
from visling.errors import DataError
from visling.models.task_model import TaskModel
from visling.tasks import vcr
from visling.tasks.base import TaskSource
from visling.tasks.vcr import VCR, VcrConfig
from visling.types import Batch, Example, RegionArray, Regions, Targets, Text

BETA = tuple(f"beta_vcr_{task}_{split}" for task in ("qa", "qar") for split in ("train", "val", "test"))
MULTI_TASK = (
    "mt_vcr_qa_train_long", "mt_vcr_qa_train_short", "mt_vcr_qa_val_long", "mt_vcr_qa_val_short",
    "mt_vcr_qa_test_long", "mt_vcr_qar_train_long", "mt_vcr_qar_val_long", "mt_vcr_qar_test_long",
)  # fmt: skip
STEPS = {"beta_vcr_qa": "beta_vcr_qa_train", "beta_vcr_qar": "beta_vcr_qar_train", "mt_vcr_qa": "mt_vcr_qa_train_short"}
"""Recorded step -> the rows of its batch."""
LOSSES: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}
GRADIENTS: dict[str, Any] = {"atol": 1e-7, "rtol": 1e-4}


class Replayed:
    """Draws what was drawn."""

    def __init__(self, draws: list[dict[str, Any]]) -> None:
        self.draws: Iterator[dict[str, Any]] = iter(draws)

    def integers(self, high: int) -> int:
        draw = next(self.draws)
        assert draw["of"] == high
        return int(draw["index"])


class Chained:
    """The first release's cut: a question stays as short as an earlier choice has made it."""

    def __init__(self) -> None:
        self.left = 10**9

    def __call__(self, first: int, second: int, limit: int) -> tuple[int, int]:
        self.left, second = CUT_LONGER(min(first, self.left), second, limit)
        return self.left, second


CUT_LONGER = named_text.cut_longer


class SplitTwice(Tokenizer):
    """The multi-task release's pieces: those of the pieces as they are written."""

    def pieces(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids: list[int] = []
        for piece, token in zip(super().pieces(text)[0], self.tokens(super().pieces(text)[0]), strict=True):
            ids += [piece] if piece == self.unk else super().pieces(token)[0].tolist()
        return np.array(ids, np.int64), np.arange(len(ids))


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "vilbert_tasks" / "vcr"


def rows_of(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    described = json.loads((folder / f"rows_{name}.json").read_text(encoding="utf-8"))
    with np.load(folder / f"rows_{name}.npz") as arrays:
        return described, dict(arrays)


def records(folder: Path, name: str) -> list[VcrRecord]:
    """The questions of a recording; those of the multi-task release that it survives are in files of their own."""
    release, _, task, split, *length = name.split("_")
    data = folder / "data" / "VCR"
    file = data / (f"{split}.jsonl" if release == "beta" else f"{split}_mt_vcr_{task}_{length[0]}.jsonl")
    return list(read_vcr(file, data / "vcr1images").records)


def task_of(folder: Path, name: str, **changed: Any) -> VCR:
    own: dict[str, Any] = {"cut": "longer" if name.startswith("beta") else "second", "links": "every_piece"}
    table = folder / "data" / "VCR" / "unisex_names_table.csv"
    phase = "answer" if "_qa_" in name else "rationale"
    own |= {"phase": phase, "name_table": table, **changed}
    return VCR(VcrConfig(**{**models.spec("vilbert").tasks["vcr"], **own}))


def layout_of(folder: Path, name: str, longest: int) -> TextLayout:
    kind = Tokenizer if name.startswith("beta") else SplitTwice
    spec = models.spec("vilbert").inputs(models.spec("vilbert").presets["tiny"])
    return TextLayout(kind(str(folder.parent / "vocab.txt")), replace(spec, max_tokens=longest))


def lay_out(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **changed: Any
) -> tuple[list[Example], dict[str, Any], dict[str, NDArray[Any]]]:
    """An example for each recorded entry, with its names: of the four choices that the entry has."""
    described, arrays = rows_of(folder, name)
    task, layout = task_of(folder, name, **changed), layout_of(folder, name, described["max_seq_length"])
    found = []
    entries = iter(described["entries"])
    for record in records(folder, name):
        contexts = 4 if (task.config.phase, record.answer_label) == ("rationale", None) else 1
        for context in range(contexts):
            draws = next(entries)["name_draws"]
            monkeypatch.setattr(vcr, "generator_for", lambda *_, draws=draws: Replayed(draws))
            if contexts > 1:
                one = replace(record, answer_label=context)
                example = replace(TaskSource(task, [one], layout).example(0, np.random.default_rng(0)), labels={})
            else:
                example = TaskSource(task, [record], layout).example(0, np.random.default_rng(0))
            found.append(example)
    assert next(entries, None) is None
    return found, described, arrays


def padded(values: NDArray[np.int64], length: int) -> list[int]:
    return np.pad(values, (0, length - len(values))).tolist()


@pytest.mark.parametrize("name", [*BETA, *MULTI_TASK])
def test_rows_and_labels_are_those_of_the_releases(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("beta"):
        real = vcr.lay_out_choices

        def with_chained_cut(*arguments: Any, **settings: Any) -> Any:
            monkeypatch.setattr(named_text, "cut_longer", Chained())
            return real(*arguments, **settings)

        monkeypatch.setattr(vcr, "lay_out_choices", with_chained_cut)
    examples, described, arrays = lay_out(folder, name, monkeypatch)
    for number, example in enumerate(examples):
        for choice, row in enumerate(example.rows):
            longest = described["max_seq_length"]
            assert padded(row.ids, longest) == arrays["tokens"][number, choice].tolist()
            assert padded(row.segments, longest) == arrays["segment_ids"][number, choice].tolist()
            assert len(row.ids) == arrays["input_mask"][number, choice].sum()
        # A test entry has target 0 there, and no label here.
        assert example.labels.get("choice", 0) == arrays["target"][number]
        assert ("choice" in example.labels) == ("_test" not in name)


@pytest.mark.parametrize("name", BETA)
def test_a_choice_is_cut_by_itself(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mistake the first choice is the recorded one, and no question is shorter than there."""
    examples, described, arrays = lay_out(folder, name, monkeypatch)
    for example, tokens, segments in zip(examples, arrays["tokens"], arrays["segment_ids"], strict=True):
        assert padded(example.rows[0].ids, described["max_seq_length"]) == tokens[0].tolist()
        for row, ids, own in zip(example.rows, tokens, segments, strict=True):
            assert (row.segments == 0).sum() >= ((own == 0) & (ids != 0)).sum()


@pytest.mark.parametrize("name", [*BETA, *MULTI_TASK])
def test_names_are_those_that_were_drawn(folder: Path, name: str) -> None:
    described, _ = rows_of(folder, name)
    table = read_name_table(folder / "data" / "VCR" / "unisex_names_table.csv")
    objects = {record.metadata: record.objects for record in records(folder, name)}
    images = folder / "data" / "VCR" / "vcr1images"
    for entry in described["entries"]:
        names = draw_names(objects[images / entry["metadata_fn"]], table, Replayed(entry["name_draws"]).integers)
        assert list(names.values()) == entry["names"]


def test_names_without_a_recording_stay_from_visit_to_visit(folder: Path) -> None:
    task, layout = task_of(folder, BETA[0]), layout_of(folder, BETA[0], 60)
    record = records(folder, BETA[0])[1]
    first, second = (task.example(record, layout, np.random.default_rng(seed)) for seed in (0, 1))
    assert [row.ids.tolist() for row in first.rows] == [row.ids.tolist() for row in second.rows]


class Stored:
    """The release's rows as a store: detections, cut to leave room, then the annotated boxes."""

    fingerprint = "detections and annotated boxes"

    def __init__(self, folder: Path, most: int) -> None:
        self.most = most
        self.parts = []
        for file in ("detections", "gt"):
            with np.load(folder / "data" / f"{file}.npz") as arrays:
                self.parts.append(dict(arrays))
        self.feature_size = next(v for k, v in self.parts[0].items() if k.endswith("/features")).shape[1]

    def _name(self, image_id: str) -> str:
        return next(key.removesuffix("/size") for key in self.parts[0] if f"/{image_id}.jpg/size" in key)

    def __contains__(self, image_id: str) -> bool:
        return any(f"/{image_id}.jpg/" in key for key in self.parts[0])

    def __len__(self) -> int:
        return len(self.parts[0]) // 3

    def __getitem__(self, image_id: str) -> RegionArray:
        name = self._name(image_id)
        features, boxes = ([part[f"{name}/{field}"] for part in self.parts] for field in ("features", "boxes"))
        annotated = min(len(boxes[1]), self.most - 1)
        detected = self.most - annotated - 1  # the first row is the whole image
        height, width = self.parts[0][f"{name}/size"]
        return RegionArray(
            features=np.concatenate([features[0][:detected], features[1][:annotated]]),
            boxes=np.concatenate([boxes[0][:detected], boxes[1][:annotated]]).astype(np.float32),
            size=(int(width), int(height)),
        )

    def whole(self, image_id: str) -> NDArray[np.float32]:
        """Mean of the means of both kinds, each weighted by its rows and one more."""
        kinds = [part[f"{self._name(image_id)}/features"] for part in self.parts]
        weights = [len(kind) + 1 for kind in kinds]
        return np.average([kind.mean(0) for kind in kinds], axis=0, weights=weights)


def collate(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Batch, Targets, Stored]:
    examples, described, _ = lay_out(folder, name, monkeypatch)
    store = Stored(folder, described["max_region_num"])
    layout = layout_of(folder, name, described["max_seq_length"])
    spec = replace(layout.spec, feature_size=store.feature_size)
    rngs = [np.random.default_rng(0)] * len(examples)
    batch, targets = Collator(store, spec, layout.tokenizer)(examples, rngs)
    batch.validate()
    return batch, targets, store


@pytest.mark.parametrize("name", [*BETA, *MULTI_TASK])
def test_regions_are_those_of_the_releases(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, arrays = rows_of(folder, name)
    batch, _, store = collate(folder, name, monkeypatch)
    examples, _, _ = lay_out(folder, name, monkeypatch)
    regions = cast(Regions, batch.regions)
    assert regions.row is not None
    for number, example in enumerate(examples):
        real = arrays["image_mask"][number, 1:].astype(bool)
        assert regions.mask[number].tolist() == real.tolist()[: regions.mask.shape[1]]
        there = arrays["features"][number]
        np.testing.assert_allclose(regions.features[number][: real.sum()], there[1:][real], atol=1e-6)
        boxes = np.clip(arrays["spatials"][number, 1:, :4][real], 0, 1)
        np.testing.assert_allclose(regions.boxes[number][: real.sum()], boxes, atol=1e-6)
        np.testing.assert_allclose(store.whole(example.images[0]), there[0], atol=1e-6)


@pytest.mark.parametrize("name", BETA)
def test_links_are_those_of_the_first_release(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first choice of every entry; those after it are compared where their question was not cut before."""
    _, arrays = rows_of(folder, name)
    batch, _, _ = collate(folder, name, monkeypatch)
    links = cast(Tensor, batch.links).transpose(1, 2).numpy()  # (B, R, T)
    recorded, tokens = (
        array.reshape(-1, *array.shape[2:]) for array in (arrays["co_attention_mask"], arrays["tokens"])
    )
    same = [
        bool((ours.numpy() == theirs[: len(ours)]).all()) for ours, theirs in zip(batch.text.ids, tokens, strict=True)
    ]
    assert all(same[::4])
    for number in np.flatnonzero(same):
        found = np.zeros_like(recorded[number])
        found[1 : 1 + links.shape[1], : links.shape[2]] = links[number]
        assert found.tolist() == recorded[number].tolist()
    assert any(recorded[number].any() for number in np.flatnonzero(same))


def batch_of(arrays: dict[str, NDArray[Any]], task: int | None) -> tuple[Batch, Targets]:
    """Recorded rows as our batch; the first region is the whole image."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    rows, group = tensors["tokens"].shape[:2]
    text = Text(
        ids=tensors["tokens"].flatten(0, 1),
        mask=tensors["input_mask"].flatten(0, 1).bool(),
        segments=tensors["segment_ids"].flatten(0, 1),
        task=None if task is None else torch.full((rows * group,), task),
    )
    regions = Regions(
        features=tensors["features"][:, 1:],
        boxes=tensors["spatials"][:, 1:, :4],
        mask=tensors["image_mask"][:, 1:].bool(),
        size=torch.ones(rows, 2),
        whole=tensors["features"][:, 0],
        row=torch.arange(rows).repeat_interleave(group),
    )
    return Batch(text=text, regions=regions, group=group), Targets(choice=tensors["target"])


@pytest.mark.parametrize("step", STEPS)
def test_losses_scores_and_gradients_are_those_of_the_releases(golden: Path, folder: Path, step: str) -> None:
    recorded = json.loads((folder / f"step_{step}.json").read_text(encoding="utf-8"))
    _, arrays = rows_of(folder, STEPS[step])
    source = load_file(golden / "vilbert" / "state_dict_vltasks.safetensors")
    multi_task = step.startswith("mt")
    number = int(recorded["task_id_used"].removeprefix("TASK")) if multi_task else None
    tokens = len(source["bert.embeddings.task_embeddings.weight"]) if multi_task else 0
    config = Recording(golden / "vilbert").config(
        feature_size=arrays["features"].shape[-1], num_tasks=tokens, max_tokens=arrays["tokens"].shape[-1]
    )
    task = task_of(folder, STEPS[step], name_table=None)
    model = TaskModel(models.build("vilbert", config), task.heads, models.head_styles("vilbert"), group=task.group)
    parts = {"encoder": model.encoder, "score": model.heads["score"]}
    coverage = models.spec("vilbert").keys["multitask"].load(source, parts, strict=False)
    batch, targets = batch_of(arrays, number)
    logits = model.eval()(batch)
    loss = task.loss(logits, targets)
    assert_close(loss.value, torch.tensor(recorded["train_loss"]), **LOSSES)
    hits, count = loss.parts["answer_accuracy"]
    assert float(hits / count) == pytest.approx(recorded["train_score"])
    assert float(hits) == recorded["val_score_sum"]

    known = records(folder, STEPS[step])
    predictions = task.decode(logits, batch, known)
    for prediction, result in zip(predictions, recorded["evaluation"]["results"], strict=True):
        chances = dict(prediction.top)
        np.testing.assert_allclose([chances[str(choice)] for choice in range(4)], result["answer"], atol=1e-6)

    loss.value.backward()
    compared = set()
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            theirs = coverage.mapped.get(f"{part}.{name}", ())
            if parameter.grad is None or not theirs or theirs[0] not in recorded["grad_norms"]:
                assert parameter.grad is None or float(parameter.grad.norm()) < 1e-7, name
                continue
            norm = torch.tensor(recorded["grad_norms"][theirs[0]])
            assert_close(parameter.grad.norm(), norm, **GRADIENTS, msg=lambda text, name=name: f"{name}: {text}")
            compared.add(theirs[0])
    assert compared == recorded["grad_norms"].keys()


def test_questions_at_which_the_multi_task_release_stops_are_cut(folder: Path) -> None:
    facts = json.loads((folder / "facts_mt.json").read_text(encoding="utf-8"))
    lines = [fact for fact in facts if "line" in fact]
    assert lines
    for fact in lines:
        name = f"mt_vcr_qa_{fact['split']}_long"
        layout = layout_of(folder, name, fact["max_seq_length"])
        record = read_vcr(folder / "data" / "VCR" / f"{fact['split']}.jsonl", folder).records[fact["line"]]
        example = task_of(folder, name).example(record, layout, np.random.default_rng(0))
        assert all(len(row.ids) == fact["max_seq_length"] for row in example.rows)
        assert layout.truncated == len(example.rows)
    assert json.loads((folder / "facts_beta.json").read_text(encoding="utf-8")) == []


def test_a_table_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read names from"):
        read_name_table(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text(",total\n1,2\n")
    with pytest.raises(DataError, match="a column 'name'"):
        read_name_table(tmp_path / "other.csv")
    (tmp_path / "empty.csv").write_text(",name\n")
    with pytest.raises(DataError, match="lists no name"):
        read_name_table(tmp_path / "empty.csv")
