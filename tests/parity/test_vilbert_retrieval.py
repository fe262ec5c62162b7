"""Caption retrieval against what both ViLBERT releases did (`golden/vilbert_tasks/retrieval`): every recorded row with
its recorded draws, losses and gradients of a batch, scores of all pairs, ranks.

Converted here, because our contract keeps it elsewhere or refuses it:
- The first release cuts a long text after its special tokens, so that it ends without [SEP]; here [SEP] always ends a
  row. For its rows the layout is given one more place and the row is cut as there.
- Boxes that leave the image are unit corners, clipped, in a batch; the releases compute locations from them as they
  are. Rows are compared with clipped locations; for losses and scores the batch gets the locations of the release.
- The whole image is the mean of the regions that the model reads; in the releases that of all regions, also those
  beyond the cap. Where an image has more, the batch gets the mean of all as `Regions.whole`, as collate allows.
- Class 0 of the released alignment head means that text and image fit, here class 1.
Rows behind the regions of the third alternative's image hold leftovers in the releases, masked: compared where real.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling import models
from visling.boxes import locate
from visling.data.annotations.captions import read_flickr30k_lines
from visling.data.annotations.retrieval import RetrievalRecord
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import StoreError
from visling.models.task_model import TaskModel
from visling.models.vilbert import VilbertConfig
from visling.tasks.retrieval import RankedPrediction, Retrieval, RetrievalConfig
from visling.types import Batch, Example, InputSpec, RegionArray, Regions, Targets, Text, TextRow

FEATURES: dict[str, Any] = {"rtol": 0, "atol": 1e-6}
LOSS: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}
SCORES: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
GRADIENTS: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
RELEASES = ("beta", "mt")
ROWS = ("rows_beta_train", "rows_beta_val", "rows_mt_train", "rows_mt_val", "rows_mt_train_clean")
CUTS_LATE = "beta"
"""Release that cuts after the special tokens."""


class Arrays:
    """The recorded regions as a store, in the precision of the recording."""

    fingerprint = "recorded"

    def __init__(self, file: Path) -> None:
        with np.load(file) as content:
            self.arrays = {name: content[name] for name in content}
        self.ids = {name.rpartition("/")[0] for name in self.arrays}
        self.feature_size = next(v.shape[1] for name, v in self.arrays.items() if name.endswith("/features"))

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, image_id: str) -> RegionArray:
        if image_id not in self:
            raise StoreError(f"no regions of image {image_id!r}.")
        height, width = self.arrays[f"{image_id}/size"].tolist()
        return RegionArray(
            features=self.arrays[f"{image_id}/features"],
            boxes=self.arrays[f"{image_id}/boxes"],
            size=(int(width), int(height)),
        )


class Script:
    """A generator that repeats recorded draws, and insists on their bounds."""

    def __init__(self, draws: Sequence[Mapping[str, int]]) -> None:
        self.draws = list(draws)

    def integers(self, low: int, high: int | None = None) -> int:
        draw = self.draws.pop(0)
        if high is None:
            assert draw["of"] == low, "a choice among another number"
            return draw["index"]
        assert (draw["low"], draw["high"]) == (low, high)
        return draw["value"]


@dataclass(frozen=True)
class Recording:
    """The recorded set, and our side of it."""

    golden: Path

    @property
    def folder(self) -> Path:
        return self.golden / "vilbert_tasks" / "retrieval"

    @property
    def store(self) -> Arrays:
        return Arrays(self.folder / "data" / "features.npz")

    def json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return content

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        with np.load(self.folder / f"{name}.npz") as content:
            return {key: content[key] for key in content}

    def records(self, name: str, config: RetrievalConfig) -> list[RetrievalRecord]:
        split = name.split("_", 2)[2]
        # The classes read the test file where training validates.
        return Retrieval(config).records(self.folder / "data" / "flickr30k", {"val": "test"}.get(split, split))

    def task(self, name: str) -> tuple[Retrieval, list[RetrievalRecord]]:
        """The task of a file of rows, ready to draw."""
        config = RetrievalConfig(negatives="random" if name.endswith("val") else "alike")
        task, records = Retrieval(config), self.records(name, config)
        task.setup(records)
        return task, records

    def collate(self, name: str, examples: Sequence[Example], inputs: InputSpec) -> tuple[Batch, Targets]:
        return Collator(self.store, inputs, self.tokenizer)(examples, [np.random.default_rng(0)] * len(examples))

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(str(self.golden / "vilbert_tasks" / "vocab.txt"))

    def spec(self, name: str) -> InputSpec:
        """Of a file of rows; the rows of an image count the whole image."""
        about = self.json(name)
        return InputSpec(
            feature_size=self.store.feature_size,
            max_tokens=about["max_seq_length"],
            max_regions=about["max_region_num"] - 1,
        )

    def layout(self, name: str) -> TextLayout:
        spec, late = self.spec(name), int(CUTS_LATE in name)
        return TextLayout(self.tokenizer, replace(spec, max_tokens=spec.max_tokens + late))

    def examples(self, name: str) -> list[Example]:
        """Ours for every recorded row, made with its draws."""
        task, records = self.task(name)
        layout, most, examples = self.layout(name), self.spec(name).max_tokens, []
        for row in self.json(name)["rows"]:
            script: Any = Script(row["draws"])
            examples.append(cut(task.example(records[row["row"]], layout, script), most))
            assert not script.draws, "draws are left over"
        return examples


def cut(example: Example, most: int) -> Example:
    """Rows with their first pieces, as the first release cuts them."""

    def shorten(row: TextRow) -> TextRow:
        return replace(row, ids=row.ids[:most], segments=row.segments[:most])

    return replace(example, rows=tuple(map(shorten, example.rows)))


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden)


def regions_of(batch: Batch) -> Regions:
    """Of every text row."""
    assert batch.regions is not None
    regions = batch.regions
    if regions.row is None:
        return regions
    row = regions.row
    return replace(regions, row=None).map(lambda tensor: tensor[row])


def as_released(batch: Batch, image_ids: Sequence[str], store: Arrays) -> Batch:
    """The batch with locations of boxes as they lie outside, and the mean of all regions as the whole image.

    Args:
        image_ids: of the region rows.
    """
    assert batch.regions is not None
    regions = batch.regions
    boxes, whole = regions.boxes.clone(), torch.empty(len(image_ids), regions.features.shape[2])
    for number, image in enumerate(image_ids):
        array, kept = store[image], int(regions.mask[number].sum())
        boxes[number, :kept] = torch.from_numpy(array.boxes[:kept] / np.array(array.size * 2, np.float32))
        whole[number] = torch.from_numpy(array.features.mean(0))
    return replace(batch, regions=replace(regions, boxes=boxes, whole=whole))


def distinct(examples: Sequence[Example]) -> list[str]:
    """Images of the region rows: each once per example."""
    return [image for example in examples for image in dict.fromkeys(example.images)]


@pytest.mark.parametrize("name", ROWS)
def test_captions_are_read_in_the_recorded_order(recording: Recording, name: str) -> None:
    about, records = recording.json(name), recording.records(name, RetrievalConfig())
    assert [[int(record.images[0]), record.caption] for record in records] == about["entries"]
    assert len(records) == about["number_of_rows"]
    assert list(dict.fromkeys(int(record.images[0]) for record in records)) == about["image_id_list"]
    if "train_hard_pool" in about:
        images = about["train_image_list"]
        pool = [[images[int(at)] for at in row[1:]] for row in about["train_hard_pool"]]
        ours = {record.images[0]: [int(image) for image in record.alike] for record in records}
        assert ours == {str(image): row for image, row in zip(images, pool, strict=True)}


@pytest.mark.parametrize("name", ROWS)
def test_rows_with_the_recorded_draws(recording: Recording, name: str) -> None:
    recorded, examples = recording.arrays(name), recording.examples(name)
    batch, targets = recording.collate(name, examples, recording.spec(name))
    batch.validate()
    assert batch.regions is not None
    assert len(batch.regions.mask) == len(distinct(examples)), "an image that an example shows again is gathered once"
    rows, tokens = recorded["tokens"].shape[:2], recorded["tokens"].shape[2]
    text = batch.text.map(lambda tensor: torch.nn.functional.pad(tensor, (0, tokens - tensor.shape[1])))
    for ours, theirs in ((text.ids, "tokens"), (text.mask, "input_mask"), (text.segments, "segment_ids")):
        np.testing.assert_array_equal(ours.view(*rows, -1), recorded[theirs], err_msg=theirs)
    assert targets.choice is not None
    np.testing.assert_array_equal(targets.choice, recorded["target"])
    assert [int(example.images[0]) for example in examples] == recorded["id"].tolist()

    regions, mask = regions_of(batch), torch.from_numpy(recorded["image_mask"]).flatten(0, 1).bool()
    assert mask[:, 0].all(), "the whole image comes first"
    real = mask[:, 1:]
    assert torch.equal(regions.mask, real[:, : regions.mask.shape[1]])
    assert not real[:, regions.mask.shape[1] :].any()
    features, places = (torch.from_numpy(recorded[key]).flatten(0, 1) for key in ("features", "spatials"))
    assert_close(regions.features[regions.mask], features[:, 1:][real], **FEATURES)
    assert_close(locate(regions.boxes)[regions.mask], locate(places[:, 1:, :4].clamp(0, 1))[real], **FEATURES)
    assert not regions.features[~regions.mask].any(), "no leftovers"

    shown = as_released(batch, distinct(examples), recording.store)
    regions = regions_of(shown)
    assert regions.whole is not None
    assert_close(regions.whole, features[:, 0], **FEATURES)
    assert_close(locate(regions.boxes)[regions.mask], places[:, 1:][real], **FEATURES)


@pytest.mark.parametrize("name", ROWS)
def test_other_draws_are_noticed(recording: Recording, name: str) -> None:
    """Another caption is drawn last, or the first draw is among one image more."""
    task, records = recording.task(name)
    row, layout = recording.json(name)["rows"][0], recording.layout(name)
    *before, last = row["draws"]
    script: Any = Script([*before, {**last, "index": (last["index"] + 1) % last["of"]}])
    changed = cut(task.example(records[row["row"]], layout, script), recording.spec(name).max_tokens)
    same = [np.array_equal(a.ids, b.ids) for a, b in zip(changed.rows, recording.examples(name)[0].rows, strict=True)]
    assert same == [True, True, True, False]
    first, *after = row["draws"]
    script = Script([{**first, "of": first["of"] + 1}, *after])
    with pytest.raises(AssertionError, match="another number"):
        task.example(records[row["row"]], layout, script)


class Scored(nn.Module):
    """The recorded encoder with the head that scores pairs."""

    def __init__(self, recording: Recording, release: str, task: Retrieval, file: str = "state_dict_vltasks") -> None:
        super().__init__()
        folder = recording.golden / "vilbert"
        source = load_file(folder / f"{file}.safetensors")
        sizes = json.loads((folder / "config.json").read_text())["hyper_parameters"]
        table = source.get("bert.embeddings.task_embeddings.weight")
        tasks = 0 if release == CUTS_LATE or table is None else len(table)
        config = VilbertConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            max_tokens=sizes["max_position_embeddings"],
            region_hidden_size=sizes["v_hidden_size"],
            num_region_layers=sizes["v_num_hidden_layers"],
            num_region_heads=sizes["v_num_attention_heads"],
            region_intermediate_size=sizes["v_intermediate_size"],
            co_attention_size=sizes["bi_hidden_size"],
            num_co_attention_heads=sizes["bi_num_attention_heads"],
            pooled_size=sizes["bi_hidden_size"],
            text_layers_before=tuple(sizes["t_biattention_id"]),
            region_layers_before=tuple(sizes["v_biattention_id"]),
            feature_size=sizes["v_feature_size"],
            num_tasks=tasks,
        )
        styles = models.head_styles("vilbert")
        style = {"score": styles["score"], "classify": styles["matching"]}
        self.model = TaskModel(models.build("vilbert", config), task.heads, style)
        (name, head), *_ = self.model.heads.items()
        self.parts = {"encoder": self.model.encoder, {"score": "score", "alignment": "matching"}[name]: head}
        if not tasks:
            source.pop("bert.embeddings.task_embeddings.weight", None)
        self.coverage = (
            models.spec("vilbert")
            .keys["multitask"]
            .load(
                {key: tensor for key, tensor in source.items() if key.startswith(("bert.", "vil_logit", "cls.bi_seq"))},
                self.parts,
            )
        )
        self.task_number = int(recording.json("step_mt")["task_id_used"].removeprefix("TASK")) if tasks else None
        self.eval()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Logits; the text names the task where the model has a token for it."""
        if self.task_number is not None:
            text = batch.text
            batch = replace(batch, text=replace(text, task=torch.full((len(text.ids),), self.task_number)))
        logits: dict[str, Tensor] = self.model(batch)
        return logits


@pytest.mark.parametrize("release", RELEASES)
def test_losses_scores_and_gradients_of_a_batch(recording: Recording, release: str) -> None:
    name, recorded = f"rows_{release}_train", recording.json(f"step_{release}")
    examples = recording.examples(name)[: recorded["val_batch_size"]]
    batch, targets = recording.collate(name, examples, recording.spec(name))
    task, _ = recording.task(name)
    model = Scored(recording, release, task)
    loss = task.loss(model(as_released(batch, distinct(examples), recording.store)), targets)
    hits, count = loss.parts["retrieval_accuracy"]
    for value, theirs in (
        (loss.value.item(), recorded["train_loss"]),
        (loss.value.item(), recorded["val_loss"]),
        (float(hits / count), recorded["train_score"]),
        (float(hits), recorded["val_score_sum"]),
    ):
        assert value == pytest.approx(theirs, rel=LOSS["rtol"], abs=LOSS["atol"])
    loss.value.backward()  # type: ignore[no-untyped-call]
    compared, squares = set(), 0.0
    for part, module in model.parts.items():
        for parameter_name, parameter in module.named_parameters():
            if parameter.grad is None or not parameter.grad.any():
                continue
            (theirs,) = model.coverage.mapped[f"{part}.{parameter_name}"]
            norm = parameter.grad.norm()
            squares += float(norm) ** 2
            assert norm.item() == pytest.approx(recorded["grad_norms"].get(theirs, 0.0), rel=1e-4, abs=1e-6), theirs
            compared.add(theirs)
    assert {key for key, norm in recorded["grad_norms"].items() if norm > 1e-6} <= compared
    assert squares**0.5 == pytest.approx(recorded["grad_total_norm"], rel=1e-4)


def score_matrix(recording: Recording, release: str, *, zero_shot: bool) -> tuple[Retrieval, Any, NDArray[np.float32]]:
    """Every caption with every image of the recorded evaluation, (I, T)."""
    name = f"rows_{release}_val"
    task = Retrieval(RetrievalConfig(head="alignment" if zero_shot else "score"))
    records = recording.records(name, task.config)
    layout, spec = recording.layout(name), recording.spec(name)
    examples = [cut(task.example(record, layout, np.random.default_rng(0)), spec.max_tokens) for record in records]
    batch, _ = recording.collate(name, examples, spec)
    images = list(dict.fromkeys(record.images[0] for record in records))
    first = [next(at for at, record in enumerate(records) if record.images[0] == image) for image in images]
    check_inputs(recording, release, batch, first)
    shown = as_released(batch, [record.images[0] for record in records], recording.store)
    assert shown.regions is not None
    pairs = np.indices((len(images), len(records))).reshape(2, -1)
    regions = shown.regions.map(lambda tensor: tensor[first])
    text = replace(shown.text, row=torch.from_numpy(pairs[1]))
    model = Scored(recording, release, task, "state_dict" if zero_shot else "state_dict_vltasks")
    with torch.inference_mode():
        logits = model(Batch(text=text, regions=replace(regions, row=torch.from_numpy(pairs[0]))))
        scores = task.score(logits).view(len(images), len(records)).numpy()
    return task, records, scores


def check_inputs(recording: Recording, release: str, batch: Batch, first: Sequence[int]) -> None:
    recorded, regions = recording.arrays(f"eval_inputs_{release}"), regions_of(batch)
    np.testing.assert_array_equal(batch.text.ids, recorded["tokens"][:, : batch.text.ids.shape[1]])
    np.testing.assert_array_equal(batch.text.mask, recorded["input_mask"][:, : batch.text.ids.shape[1]])
    assert not recorded["input_mask"][:, batch.text.ids.shape[1] :].any()
    mask = recorded["image_mask"][:, 1:].astype(bool)
    np.testing.assert_array_equal(regions.mask[first], mask[:, : regions.mask.shape[1]])
    features = regions.features[first][regions.mask[first]]
    np.testing.assert_allclose(features, recorded["features"][:, 1:][mask], **FEATURES)


@pytest.mark.parametrize("zero_shot", [False, True])
@pytest.mark.parametrize("release", RELEASES)
def test_scores_and_ranks_of_all_pairs(recording: Recording, release: str, zero_shot: bool) -> None:
    name = f"eval_{release}" + "_zero_shot" * zero_shot
    about, recorded = recording.json(name), recording.arrays(name)
    task, records, scores = score_matrix(recording, release, zero_shot=zero_shot)
    ours = 1 / (1 + np.exp(-scores.astype(float))) if zero_shot else scores  # log-odds are ranked, not probabilities
    np.testing.assert_allclose(ours.T, recorded["score_matrix"], **SCORES)
    assert [int(record.images[0]) for record in records] == about["caption_image"]

    predictions = task.predictions(scores, records)
    captions = [one for one in predictions if isinstance(one, RankedPrediction) and one.of == "image"]
    assert [one.rank for one in captions] == recorded["rank"].tolist() == about["ranks"]
    found = task.report(predictions, records).scores
    for ours_name, theirs in (
        ("image_r1", "r1"),
        ("image_r5", "r5"),
        ("image_r10", "r10"),
        ("image_median_rank", "median_rank"),
        ("image_mean_rank", "mean_rank"),
    ):
        assert found[ours_name].value == pytest.approx(about[theirs], abs=1e-9), theirs
    images = list(dict.fromkeys(record.images[0] for record in records))
    for one, listed in zip(captions, about["result_file_top20"], strict=True):
        assert [name for name, _ in one.top] == [images[at] for at in listed[: len(one.top)]]


@pytest.mark.parametrize("release", RELEASES)
def test_what_stopped_the_releases(recording: Recording, release: str) -> None:
    """An image with more regions than rows as third alternative is cut; one without a record is an error; without a
    box, the whole image is zeros, not NaN; COCO's lines name images by `id`."""
    name, facts = f"rows_{release}_train", recording.json(f"facts_{release}")
    if "draws" in facts["crash"]:
        task, records = recording.task(name)
        script: Any = Script(facts["crash"]["draws"])
        example = cut(
            task.example(records[facts["crash"]["row"]], recording.layout(name), script),
            recording.spec(name).max_tokens,
        )
        batch, _ = recording.collate(name, [example], recording.spec(name))
        third = regions_of(batch).mask[2]
        assert len(recording.store[example.images[2]]) > third.sum() == recording.spec(name).max_regions
    (missing,) = re.findall(r"b'(\w+)'", facts["image_without_record"])
    unknown = Example(id="1", rows=(recording.layout(name).row("cat"),), images=(missing,))
    with pytest.raises(StoreError, match=f"no regions of image '{missing}'"):
        recording.collate(name, [unknown], recording.spec(name))
    lines = recording.folder / "data" / "flickr30k" / "all_data_final_train_2014.jsonline"
    ids = list(dict.fromkeys(int(one.images[0]) for one in read_flickr30k_lines(lines, image_field="id").records))
    assert ids == facts["image_ids_when_the_same_file_is_read_as_RetrievalCOCO"]


@pytest.mark.parametrize("release", RELEASES)
def test_an_image_without_regions_has_a_finite_score(recording: Recording, release: str) -> None:
    assert recording.json(f"facts_{release}")["image_without_boxes"]["global_feature_is_nan"]
    task, _ = recording.task(f"rows_{release}_train")
    model, size = Scored(recording, release, task), recording.store.feature_size
    ids = torch.tensor([[2, 5, 3]])
    batch = Batch(
        text=Text(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), segments=torch.zeros_like(ids)),
        regions=Regions(
            features=torch.zeros(1, 1, size),
            boxes=torch.zeros(1, 1, 4),
            mask=torch.zeros(1, 1, dtype=torch.bool),
            size=torch.ones(1, 2),
        ),
    )
    assert task.score(model(batch)).isfinite().all()
