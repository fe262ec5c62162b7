"""All pairs in tiles: equal to pairs one by one, a stream at a time, by any number of processes; zero-shot, shortlists
and limits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visling import api, models, runtime
from visling import config as configs
from visling.data.batches.collate import Collator
from visling.errors import CheckpointError, ConfigError, DataError, RunError
from visling.models.task_model import TaskModel
from visling.pretrained.folder import read_model_folder
from visling.recipes.tables import FINETUNING
from visling.regions.store import NativeStore
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune
from visling.runs.inputs import Inputs
from visling.runs.retrieve import limit_images, retrieval_model, retrieve, score_pairs
from visling.tasks.base import distinct_images
from visling.tasks.retrieval import RankedPrediction, Retrieval, RetrievalConfig
from visling.types import Batch

FAMILIES = sorted(models.names())


def made(world: Any, name: str, task: Retrieval) -> tuple[TaskModel, Inputs]:
    """A tiny model of a family, randomly initialised, and its inputs."""
    store = NativeStore.open(world.regions)
    config = replace(models.spec(name).presets["tiny"], feature_size=store.feature_size)
    encoder = models.build(name, config)
    encoder.fit_features(torch.from_numpy(store[store.ids[0]].features.astype(np.float32)))
    model = TaskModel(encoder, task.heads, models.head_styles(name), group=task.group)
    return model, Inputs(name, config, store, "cpu")


def some_records(world: Any, images: int = 5) -> tuple[Retrieval, Any]:
    task = Retrieval()
    return task, limit_images(task.records(world.scenes, "train"), images)


def one_by_one(model: TaskModel, task: Retrieval, inputs: Inputs, records: Any) -> NDArray[np.float32]:
    """The simple way: a forward for every pair."""
    collate = Collator(inputs.regions, inputs.spec, inputs.tokenizer)
    scores = np.empty((len(distinct_images(records)), len(records)), np.float32)
    model.eval()
    for image, row in distinct_images(records).items():
        for column, record in enumerate(records):
            rng = runtime.generator_for(0)
            example = task.example(replace(record, images=(image,)), inputs.layout, rng)
            with torch.inference_mode():
                scores[row, column] = task.score(model(collate([example], [rng])[0])).item()
    return scores


@pytest.mark.parametrize("head", ["score", "alignment"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tiles_score_as_pairs_one_by_one(world: Any, name: str, head: Any) -> None:
    task, records = some_records(world)
    task = Retrieval(RetrievalConfig(head=head))
    model, inputs = made(world, name, task)
    expected = one_by_one(model, task, inputs, records)
    assert expected.std() > 1e-4, "scores differ from pair to pair"
    for batch_size in (1, 40, 10_000):
        scores = score_pairs(model, task, inputs, records, batch_size=batch_size, precision="fp32")
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "once"),
    [
        ("lxmert", {"text_layers.0": "tokens", "region_layers.0": "regions"}),
        ("cvlp", {"lxmert.text_layers.0": "tokens", "lxmert.region_layers.0": "regions"}),
        ("vilbert", {"embeddings": "texts", "projection": "regions and whole images"}),
    ],
)
def test_a_stream_runs_once_over_each_text_and_image(world: Any, name: str, once: dict[str, str]) -> None:
    task, records = some_records(world)
    model, inputs = made(world, name, task)
    if name == "vilbert":  # text layers before the first co-attention, which the tiny preset lacks
        config = replace(model.encoder.config, text_layers_before=(1, 2))
        model = TaskModel(models.build(name, config), task.heads, models.head_styles(name), group=task.group)
        once = {**once, "text_layers.0": "tokens"}
    images, store = distinct_images(records), NativeStore.open(world.regions)
    expected = {
        "texts": len(records),
        "tokens": sum(len(task.text(record, inputs.layout).ids) for record in records),
        "regions": sum(len(store[image]) for image in images),
    }
    expected["regions and whole images"] = expected["regions"] + len(images)
    read: dict[str, int] = dict.fromkeys(once, 0)

    def count(module: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            read[module] += len(output)

        return hook

    for module in once:
        model.encoder.get_submodule(module).register_forward_hook(count(module))
    score_pairs(model, task, inputs, records, batch_size=16, precision="fp32")
    assert read == {module: expected[what] for module, what in once.items()}


def test_no_more_pairs_at_a_time_than_a_tile(world: Any) -> None:
    task, records = some_records(world)
    model, inputs = made(world, "visualbert", task)
    seen: list[int] = []
    model.encoder.register_forward_hook(lambda _, given, __: seen.append(len(given[0].text.row)))
    done: list[tuple[int, int]] = []
    score_pairs(model, task, inputs, records, batch_size=12, precision="fp32", progress=lambda *now: done.append(now))
    assert max(seen) <= 12
    assert sum(seen) == 5 * len(records)
    assert done[-1] == (sum(seen), sum(seen))
    assert [now for now, _ in done] == sorted(now for now, _ in done)
    assert model.training, "the model is left in the mode in which it came"


def test_a_model_without_regions_scores_a_text_alike_with_every_image(world: Any) -> None:
    task, records = some_records(world)
    model, _ = made(world, "vilbert", task)
    blind = Inputs("vilbert", model.encoder.config, None, "cpu")
    scores = score_pairs(model, task, blind, records, batch_size=12, precision="fp32")
    assert scores.shape == (5, len(records))
    assert (scores == scores[0]).all()
    assert len(set(scores[0].tolist())) > 1


@pytest.fixture(scope="module")
def tuned(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the task."""
    out = tmp_path_factory.mktemp("retrieval") / "run"
    settings = ["encoder=tiny", "batch_size=8", "train.max_steps=2", "train.precision=fp32", "valid_images=2"]
    config = configs.override(FINETUNING["lxmert-retrieval-scenes"](), settings)
    finetune(config, out, data=world.scenes, store=world.regions, device="cpu")
    return out


def test_validation_ranks_some_images_only(tuned: Path) -> None:
    assert json.loads((tuned / "run.json").read_text())["examples"]["valid"] == 2 * 5


def test_a_run_is_ranked_evaluated_and_asked(world: Any, tuned: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tuned, tmp_path / "run")
    found = evaluate(run, split="test", batch_size=7)
    ranked = retrieve(run, data=world.scenes, store=world.regions, split="test", device="cpu", batch_size=50)
    assert {name: score["value"] for name, score in found["scores"].items()} == {
        name: score.value for name, score in ranked.report.scores.items()
    }
    assert found["baselines"].keys() == {"random order", "same order for every query"}
    rows = [json.loads(line) for line in (run / "details_test.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(ranked.texts)
    best = ranked.scores.argmax(0)
    assert [row["prediction"] for row in rows] == [ranked.images[at] for at in best]
    submitted = json.loads((run / "predictions_test.json").read_text())
    assert submitted["image"].keys() == set(ranked.texts)
    assert submitted["text"].keys() == set(ranked.images)
    # Asked about one picture, the model says how well the caption fits: the score of that pair.
    answer = api.load(run, detector=world.detector, device="cpu").answer(world.picture(), rows[0]["text"])
    asked = ranked.scores[ranked.images.index(world.picture().stem), 0]
    assert float(answer.text) == pytest.approx(float(asked), abs=0.05), "features of a picture are stored in halves"
    assert 0 < answer.confidence < 1


def test_limits_and_shortlists(world: Any, tuned: Path, tmp_path: Path) -> None:
    where: Any = {"data": world.scenes, "store": world.regions, "split": "train", "device": "cpu"}
    whole = retrieve(tuned, **where, limit=6)
    assert whole.scores.shape == (6, 30)
    whole.save(tmp_path / "scores.npz")
    some = retrieve(tuned, **where, limit=6, shortlist=tmp_path / "scores.npz", top=2, batch_size=8)
    scored = np.isfinite(some.scores)
    np.testing.assert_allclose(some.scores[scored], whole.scores[scored], rtol=0, atol=1e-5)
    assert (scored.sum(0) >= 2).all()
    assert (scored.sum(1) >= 2).all()
    assert scored.sum() < scored.size
    best = np.sort(np.argsort(-whole.scores, axis=0)[:2], axis=0)
    assert scored[best, np.arange(30)].all(), "the two best images of every caption"
    first, again = (
        {one.id: one.rank == 0 for one in found.predictions if isinstance(one, RankedPrediction)}
        for found in (whole, some)
    )
    assert first == again, "what comes first is on the list"

    with pytest.raises(ConfigError, match="at least 1; found 0"):
        retrieve(tuned, **where, limit=0)
    with pytest.raises(DataError, match="no scores of"):
        retrieve(tuned, **where, limit=7, shortlist=tmp_path / "scores.npz")
    (tmp_path / "damaged.npz").write_bytes(b"scores")
    with pytest.raises(DataError, match="not a file of scores"):
        retrieve(tuned, **where, shortlist=tmp_path / "damaged.npz")
    with pytest.raises(RunError, match="cannot write the scores"):
        whole.save(tmp_path / "nowhere" / "scores.npz")


def test_a_pretrained_model_ranks_as_it_is(world: Any, tmp_path: Path) -> None:
    run = shutil.copytree(world.pretrained, tmp_path / "pretrained")
    found = evaluate(run, split="test", zero_shot=True, batch_size=30)
    assert found["task"] == "retrieval"
    assert found["variants"]["score"] == "alignment"
    ranked = retrieve(run, data=world.scenes, store=world.regions, split="test", device="cpu")
    assert found["scores"]["rsum"]["value"] == ranked.report.scores["rsum"].value
    # The head is that of the pre-training: class 1 = the text fits.
    saved = read_model_folder(run)
    _, task = retrieval_model(saved)
    records = task.records(world.scenes, "test")
    inputs = Inputs(saved.model, saved.config, NativeStore.open(world.regions), "cpu")
    encoder = saved.encoder().eval()
    head = {name.rpartition(".")[2]: w for name, w in saved.weights.items() if "objectives.matching.head" in name}
    rng = runtime.generator_for(0)
    batch, _ = Collator(inputs.regions, inputs.spec, inputs.tokenizer)(
        [task.example(record, inputs.layout, rng) for record in records], [rng] * len(records)
    )
    with torch.inference_mode():
        logits = encoder(batch).pooled @ head["weight"].T + head["bias"]
    own = [ranked.scores[ranked.images.index(record.images[0]), at] for at, record in enumerate(records)]
    np.testing.assert_allclose(own, logits[:, 1] - logits[:, 0], rtol=0, atol=1e-5)
    shares = task.decode({"alignment": logits}, batch, records)
    np.testing.assert_allclose([one.confidence for one in shares], logits.softmax(1)[:, 1], rtol=0, atol=1e-6)


def test_a_model_that_ranks_nothing_is_refused(world: Any, tmp_path: Path) -> None:
    where: Any = {"data": world.scenes, "store": world.regions, "split": "test", "device": "cpu"}
    with pytest.raises(CheckpointError, match="fine-tuned for vqa, which ranks nothing"):
        retrieve(world.vqa, **where)
    saved = read_model_folder(world.pretrained)
    bare = replace(saved, weights={k: w for k, w in saved.weights.items() if not k.startswith("objectives.matching")})
    with pytest.raises(CheckpointError, match="no head of image-text matching"):
        retrieval_model(bare)


def test_any_number_of_processes_ranks_alike(tuned: Path, tmp_path: Path) -> None:
    written = []
    for processes in (1, 2):
        run = shutil.copytree(tuned, tmp_path / f"{processes}")
        command = [
            sys.executable, "-m", "visling", "evaluate", str(run), "--split", "train", "--batch-size", "30",
            "--device", "cpu", "--threads", "1", "--processes", str(processes),
        ]  # fmt: skip
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert ended.returncode == 0, ended.stderr
        names = ("evaluation_train.json", "details_train.jsonl", "predictions_train.json")
        written.append({name: (run / name).read_bytes() for name in names})
    assert written[0] == written[1]


def test_a_batch_of_pairs_is_valid(world: Any) -> None:
    """Texts and images that many rows share pass the contract's own check."""
    task, records = some_records(world, 2)
    model, inputs = made(world, "visualbert", task)
    batches: list[Batch] = []
    model.encoder.register_forward_pre_hook(lambda _, given: batches.append(given[0]))
    score_pairs(model, task, inputs, records, batch_size=9, precision="fp32")
    assert len(batches) > 1
    for batch in batches:
        batch.validate()
