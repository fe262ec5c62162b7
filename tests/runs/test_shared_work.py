"""Evaluation computes what rows have in common once: predictions, their order and the official files are those of
records predicted alone, and the products of matrices show what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from visling import config as configs
from visling.data.batches.collate import Collator
from visling.models.task_model import TaskModel
from visling.recipes.scenes import TASKS
from visling.recipes.tables import FINETUNING
from visling.runs import inputs as inputs_module
from visling.runs.count_products import MatrixProducts
from visling.runs.evaluate import predict_records
from visling.runs.finetune import Finetuning
from visling.runtime import generator_for
from visling.tasks.base import TaskSource
from visling.types import Batch, Prediction, Record

MODELS = ("lxmert", "visualbert", "vilbert")
DECODED = tuple(task for task in TASKS if task != "retrieval")
"""Tasks that answer record by record; retrieval has its own tiles (test_retrieve.py)."""


def prepare(world: Any, model: str, task: str, *settings: str) -> tuple[Finetuning, TaskModel]:
    """A run that is ready to start, and its model, randomly initialised."""
    torch.manual_seed(0)
    config = configs.override(FINETUNING[f"{model}-{task}-scenes"](), ["encoder=tiny"])
    config = configs.override(config, settings)
    store = None if config.text_only else world.regions
    run = Finetuning(config, data=world.scenes, store=store, init=None, device="cpu", other_features=False)
    module = run.build().model
    assert isinstance(module, TaskModel)
    return run, module.eval()


def scatter(records: Sequence[Record], most: int = 30) -> list[Record]:
    """Some records in an order in which those about one image are far apart."""
    chosen = list(records[:most])
    return [chosen[at] for at in np.random.default_rng(0).permutation(len(chosen))]


def predict(run: Finetuning, model: TaskModel, records: Sequence[Record], *, batch_size: int = 7) -> list[Prediction]:
    return predict_records(model, run.task, run.inputs, records, batch_size=batch_size, precision="fp32")


def predict_alone(run: Finetuning, model: TaskModel, records: Sequence[Record]) -> list[Prediction]:
    """The simple way: a batch for every record, and nothing shared but the image of its rows."""
    collate = Collator(run.inputs.regions, run.inputs.spec, run.inputs.tokenizer)
    source, found = TaskSource(run.task, records, run.inputs.layout), []
    for number, record in enumerate(records):
        rng = generator_for(0, 0, number)
        example = source.example(number, rng)
        if run.inputs.regions is None:
            example = replace(example, images=(), region_labels=None, linked_regions=None)
        batch, _ = collate([example], [rng])
        with torch.inference_mode():
            found += run.task.decode(model(batch), batch.unshared(), [record])
    return found


def assert_same(found: Sequence[Prediction], expected: Sequence[Prediction]) -> None:
    assert [prediction.id for prediction in found] == [prediction.id for prediction in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.value == theirs.value
        assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-6)
        assert dict(ours.top) == pytest.approx(dict(theirs.top), abs=1e-6)
        assert sorted(ours.boxes) == sorted(theirs.boxes)


@pytest.mark.parametrize("task", DECODED)
@pytest.mark.parametrize("model", MODELS)
def test_predictions_are_those_of_records_alone(world: Any, model: str, task: str) -> None:
    run, module = prepare(world, model, task)
    records = scatter(run.train_records)
    assert_same(predict(run, module, records), predict_alone(run, module, records))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_of_the_words_alone(world: Any, model: str) -> None:
    run, module = prepare(world, model, "vqa", "text_only=true")
    records = scatter(run.train_records)
    assert_same(predict(run, module, records), predict_alone(run, module, records))


@pytest.mark.parametrize("images", ["of their own", "none"])
def test_records_that_share_no_image(world: Any, images: str) -> None:
    """Images that all differ; records that name none, for a model of the words alone."""
    run, module = prepare(world, "lxmert", "vqa", f"text_only={str(images == 'none').lower()}")
    records = list({record.images: record for record in run.train_records}.values())
    if images == "none":
        records = [replace(record, images=()) for record in records]
    assert_same(predict(run, module, records), predict_alone(run, module, records))


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_any_size_of_batch_predicts_alike(world: Any, batch_size: int) -> None:
    run, module = prepare(world, "vilbert", "vqa")
    records = scatter(run.train_records)
    assert_same(predict(run, module, records, batch_size=batch_size), predict(run, module, records))


# Work, counted in products of matrices


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts the operations of a call; inference mode would hide the products inside of composite operations."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)

    def call(work: Any) -> int:
        with torch.no_grad(), MatrixProducts() as products:
            work()
        flops: int = products.flops
        return flops

    return call


def stop_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "Collator", lambda *given, share, **named: Collator(*given, **named))


def first_batch(run: Finetuning, records: Sequence[Record]) -> Batch:
    loader = run.inputs.loader(
        TaskSource(run.task, records, run.inputs.layout), batch_size=len(records), training=False
    )
    ((batch, _),) = loader
    return batch


@pytest.mark.parametrize("model", ["lxmert", "cvlp", "vilbert", "visualbert"])
def test_the_region_stream_runs_once_over_an_image(
    world: Any, count: Any, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    run, module = prepare(world, model, "vqa")
    image = run.train_records[0].images
    records = [record for record in run.train_records if record.images == image]
    texts = {text_of(run, record) for record in records}
    assert len(texts) == len(records) == 4, "questions that differ"
    regions = first_batch(run, records).regions
    assert regions is not None
    assert len(regions.features) == 1
    encoder = module.encoder
    if model == "visualbert":  # a single stream reads both from the start: what is done to the features is saved
        stream = count(partial(encoder.get_submodule("region_features"), regions.features, torch.float32))
        stream += 2 * regions.mask.numel() * encoder.get_parameter("projection.weight").numel()
    else:
        stream = count(partial(encoder.encode_regions, regions))
    assert stream > 0
    shared = count(partial(predict, run, module, records))
    stop_sharing(monkeypatch)
    assert count(partial(predict, run, module, records)) - shared == (len(records) - 1) * stream


def text_of(run: Finetuning, record: Record) -> bytes:
    """The first row of a record's text, as bytes."""
    return run.task.example(record, run.inputs.layout, generator_for(0)).rows[0].ids.tobytes()


@pytest.mark.parametrize("model", ["lxmert", "cvlp", "vilbert"])
def test_the_text_stream_runs_once_over_a_sentence_about_two_images(
    world: Any, count: Any, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    settings = ["encoder.text_layers_before=[1, 2]"] if model == "vilbert" else []
    run, module = prepare(world, model, "nlvr2", *settings)
    record = next(record for record in run.train_records if record.images[0] != record.images[1])
    text = first_batch(run, [record]).text
    assert text.row is not None
    assert text.row.tolist() == [0, 0]
    stream = count(partial(module.encoder.encode_text, text))
    assert stream > 0
    shared = count(partial(predict, run, module, [record]))
    stop_sharing(monkeypatch)
    assert count(partial(predict, run, module, [record])) - shared == stream


def test_questions_of_an_image_are_in_one_batch_wherever_they_stand(world: Any, count: Any) -> None:
    """A batch has room for the questions of an image, so the order of the records costs nothing."""
    run, module = prepare(world, "lxmert", "vqa")
    images = list(dict.fromkeys(record.images for record in run.train_records))[:5]
    records = [record for image in images for record in run.train_records if record.images == image][:20]
    assert len(records) == 20, "four questions about each image"
    apart = [records[4 * number + place] for place in range(4) for number in range(5)]
    together = count(partial(predict, run, module, records, batch_size=4))
    assert count(partial(predict, run, module, apart, batch_size=4)) == together
    assert_same(
        sorted(predict(run, module, apart, batch_size=4), key=lambda one: one.id),
        sorted(predict(run, module, records, batch_size=4), key=lambda one: one.id),
    )


@pytest.mark.parametrize("task", ["vcr", "referring", "gqa", "grounding"])
def test_every_image_is_read_once_in_a_batch(world: Any, task: str) -> None:
    run, _ = prepare(world, "lxmert", task)
    records = list(run.train_records[:12])
    batch = first_batch(run, records)
    images = {image for record in records for image in record.images}
    assert batch.regions is not None
    assert len(batch.regions.features) == len(images) < len(records)


def test_training_gives_every_row_noise_of_its_own(world: Any) -> None:
    """As in the releases: there rows of one image or one sentence have dropout of their own."""
    run, _ = prepare(world, "lxmert", "vqa")
    image = run.train_records[0].images
    run.train_records = [record for record in run.train_records if record.images == image] * 8
    batch, _ = next(iter(run.load_batches(run.config.batch_size, 1)))
    assert batch.regions is not None
    assert batch.regions.row is None
    assert batch.text.row is None
