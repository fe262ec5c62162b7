"""Pre-training runs on a tiny world: what a run folder holds, which corpora are read, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visling import config as configs
from visling import models, runtime
from visling.data.answer_table import table_rows
from visling.data.answers import AnswerVocabulary
from visling.data.corpora.reading import images_of
from visling.data.text import TextLayout
from visling.errors import CheckpointError, ConfigError, DataError, RunError, StoreError
from visling.models import head_styles
from visling.nn.head_blocks import NormedClassifier
from visling.nn.heads import build
from visling.pretrained.answers import table_of
from visling.pretrained.folder import ModelFolder, load_part, read_model_folder
from visling.recipes.configs import PretrainConfig
from visling.recipes.tables import PRETRAINING
from visling.regions.copying import subset
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.estimate import estimate
from visling.runs.inputs import Inputs, fit_to_store
from visling.runs.pretrain import pretrain, read_corpora
from visling.types import Head, RegionArray


def tiny(world: Any, *settings: str, recipe: str = "visualbert-scenes") -> PretrainConfig:
    return configs.override(PRETRAINING[recipe](), [*world.settings, *settings])


def test_a_run_folder_says_all_about_its_run(world: Any) -> None:
    about = json.loads((world.pretrained / "run.json").read_text())
    store = NativeStore.open(world.regions)
    assert about["status"] == "finished"
    assert about["recipe"] == "visualbert-scenes"
    assert about["task"] is None
    assert about["images"] == str(world.scenes)
    assert about["store"] == str(world.regions)
    assert about["fingerprint"] == store.fingerprint
    assert about["inputs"]["feature_size"] == store.feature_size
    assert set(about["versions"]) == {"python", "visling", "torch", "numpy", "tokenizers"}
    weights = load_file(world.pretrained / "model" / "model.safetensors")
    assert about["parameters"] == sum(tensor.numel() for name, tensor in weights.items() if ".whiten." not in name)
    assert {"encoder", "objectives"} == {name.split(".")[0] for name in weights}
    lines = [json.loads(line) for line in (world.pretrained / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4]
    assert set(train[0]["parts"]) == {"masked_lm", "masked_lm_accuracy", "matching", "matching_accuracy"}
    assert about["product_rate"] > 1e8
    for line in train:
        assert 0 < line["utilisation"] < 1.5
        assert 0 <= line["data_wait"] < 1
        assert line["memory"] > 1e7
    (valid,) = [line for line in lines if line["kind"] == "valid"]
    assert valid["scores"]["loss"] == pytest.approx(valid["scores"]["masked_lm"] + 0.1 * valid["scores"]["matching"])


def test_training_moves_the_encoder(world: Any) -> None:
    run = fit_to_store(tiny(world), NativeStore.open(world.regions))
    torch.manual_seed(run.train.seed)
    fresh = models.build(run.model, run.encoder).state_dict()
    trained = read_model_folder(world.pretrained).encoder().state_dict()
    assert not torch.equal(fresh["projection.weight"], trained["projection.weight"])
    assert (fresh["projection.weight"] - trained["projection.weight"]).abs().max() < 0.1  # it started from this seed


def test_features_are_measured_on_training_images_alone(world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    trained = {picture.stem for picture in (world.scenes / "images" / "train").glob("*.png")}

    def whitening(name: str, spoilt: set[str]) -> torch.Tensor:
        path = tmp_path / name
        with StoreWriter(path, feature_size=store.feature_size, fingerprint=store.fingerprint) as writer:
            for image_id in store.ids:
                found = store[image_id]
                features = found.features * (3 if image_id in spoilt else 1)
                writer.add(image_id, RegionArray(features=features, boxes=found.boxes, size=found.size))
        run = tiny(world, "train.max_steps=1", "train.optim.lr=1e-12")
        pretrain(run, tmp_path / f"run-{name}", data=[str(world.scenes)], store=path, device="cpu")
        return torch.cat(
            [
                tensor.flatten()
                for key, tensor in sorted(read_model_folder(tmp_path / f"run-{name}").weights.items())
                if ".whiten." in key
            ]
        )

    clean = whitening("clean", set())
    torch.testing.assert_close(whitening("others", set(store.ids) - trained), clean, rtol=0, atol=0)
    assert not torch.equal(whitening("one", {min(trained)}), clean)


def test_a_run_goes_on_from_another_run(world: Any, tmp_path: Path) -> None:
    run = tiny(world, "train.max_steps=1", "train.optim.lr=1e-12", "train.optim.weight_decay=0.0")
    pretrain(run, tmp_path / "run", data=[str(world.scenes)], store=world.regions, init=world.pretrained, device="cpu")
    before, after = read_model_folder(world.pretrained).weights, read_model_folder(tmp_path / "run").weights
    assert {"objectives.masked_lm.head.bias", "objectives.matching.head.linear.weight"} <= before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert "has no head" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_objectives_that_come_in_later_start_with_fresh_heads(world: Any, tmp_path: Path) -> None:
    run = tiny(world, 'corpora=[{kind = "captions"}]', "objectives={masked_lm = 1.0}", "train.max_steps=1")
    pretrain(run, tmp_path / "words", data=[str(world.scenes)], store=world.regions, device="cpu")
    pretrain(
        tiny(world),
        tmp_path / "run",
        data=[str(world.scenes)],
        store=world.regions,
        init=tmp_path / "words",
        device="cpu",
    )
    assert "has no head for matching: randomly initialised" in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_corpus_of_ones_own_is_mixed_in_and_trained_on(world: Any, tmp_path: Path) -> None:
    """One module outside the package (`fixtures/toy_corpus.py`), named by its path."""
    (tmp_path / "own").mkdir()
    images = [picture.stem for picture in sorted((world.scenes / "images" / "train").glob("*.png"))[:3]]
    lines = [f"{image}\ta caption of {image}" for image in (*images, "gone")]
    (tmp_path / "own" / "shouted.txt").write_text("\n".join(lines), encoding="utf-8")
    run = tiny(
        world,
        'corpora=[{kind = "captions"}, {kind = "fixtures.toy_corpus.shouted", weight = 2.0}]',
        "train.max_steps=2",
    )
    data = [str(world.scenes), str(tmp_path / "own")]
    store = NativeStore.open(world.regions)
    layout = Inputs(run.model, run.encoder, None, "cpu").layout
    found = read_corpora(run, data, layout, store, valid=False, answers=None)
    assert images_of(found.examples)[-3:] == images
    assert len(found.examples) == 120 + 2 * 3
    note = f"fixtures.toy_corpus.shouted of {tmp_path / 'own'}: left out 1 sentences of 1 images without regions"
    assert list(found.notes) == [note]
    state = pretrain(run, tmp_path / "run", data=data, store=world.regions, device="cpu")
    assert state.step == 2
    assert note in (tmp_path / "run" / "log.jsonl").read_text()
    assert estimate(run).assumed["tokens"] == {"captions": 16, "fixtures.toy_corpus.shouted": 9}


def test_every_corpus_of_every_folder_is_read_by_weight(world: Any) -> None:
    run = tiny(world, 'corpora=[{kind = "captions"}, {kind = "single_captions", weight = 0.5}]')
    store = NativeStore.open(world.regions)
    layout = TextLayout(
        Inputs(run.model, run.encoder, None, "cpu").tokenizer, models.spec(run.model).inputs(run.encoder)
    )
    captions = {
        split: len(json.loads((world.scenes / "annotations" / f"captions_{split}.json").read_text())["annotations"])
        for split in ("train", "val")
    }
    data = [str(world.scenes), f"{world.scenes}@val"]
    assert captions == {"train": 120, "val": 15}
    assert len(read_corpora(run, data, layout, store, valid=False, answers=None).examples) == 120 + 60 + 15 + 8
    assert len(read_corpora(run, data, layout, store, valid=True, answers=None).examples) == 15 + 8
    with pytest.raises(DataError, match="give one without @SPLIT"):
        read_corpora(run, data[1:], layout, store, valid=True, answers=None)


def test_resuming_with_other_settings_is_refused(world: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(world.pretrained, tmp_path / "run")
    with pytest.raises(RunError, match=r"train.optim.lr was 0.0015, now 0.5"):
        pretrain(
            tiny(world, "train.optim.lr=0.5"),
            folder,
            data=[str(world.scenes)],
            store=world.regions,
            device="cpu",
            resume=True,
        )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            ['corpora=[{kind = "pictures"}]'],
            ConfigError,
            r"no corpus 'pictures'\. Valid: answered_questions, caption_pairs",
        ),
        (["objectives={masked_lmm = 1.0}"], ConfigError, r"unknown objective 'masked_lmm'. Did you mean 'masked_lm'"),
        (["objective_settings.matching.foo=1"], ConfigError, r"objective matching has no setting 'foo'. It has none"),
        (
            ["objectives.region_contrast=1", "objective_settings.region_contrast.queue=9"],
            ConfigError,
            r"no setting 'queue'. .*'queue_size'",
        ),
        (["valid_split=vall"], DataError, r"captions_vall\*.json.*captions_val.json"),
        (["train_split=trian"], DataError, r"captions_trian\*.json.*captions_train.json"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_folder(
    world: Any, tmp_path: Path, settings: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pretrain(tiny(world, *settings), tmp_path / "run", data=[str(world.scenes)], store=world.regions, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_store_without_any_region_is_refused(world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    with StoreWriter(tmp_path / "regions", feature_size=store.feature_size, fingerprint=store.fingerprint) as writer:
        for image in store.ids:
            writer.add(
                image,
                RegionArray(features=store[image].features[:0], boxes=store[image].boxes[:0], size=store[image].size),
            )
    with pytest.raises(StoreError, match="no region at all"):
        pretrain(tiny(world), tmp_path / "run", data=[str(world.scenes)], store=tmp_path / "regions", device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_empty_validation_split_is_refused(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    file = data / "annotations" / "captions_val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    run = tiny(world, 'corpora=[{kind = "captions"}]', "objectives={masked_lm = 1.0}")
    with pytest.raises(DataError, match=r"split 'val' of .* holds no example to validate on"):
        pretrain(run, tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")


def test_a_store_without_an_image_of_the_captions_is_refused_at_once(world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    subset(store, [image for image in store.ids if image != "scene_000000000003"], tmp_path / "regions")
    with pytest.raises(StoreError, match=r"example '300' needs image 'scene_000000000003'"):
        pretrain(tiny(world), tmp_path / "run", data=[str(world.scenes)], store=tmp_path / "regions", device="cpu")
    assert not (tmp_path / "run").exists()


def test_going_on_with_features_of_another_detector_needs_consent(world: Any, tmp_path: Path) -> None:
    def go_on(**options: Any) -> None:
        run = tiny(world, "train.max_steps=1")
        pretrain(
            run,
            tmp_path / "run",
            data=[str(world.scenes)],
            store=world.other_regions,
            init=world.pretrained,
            device="cpu",
            **options,
        )

    with pytest.raises(CheckpointError, match="--other-features"):
        go_on()
    assert not (tmp_path / "run").exists()
    go_on(other_features=True)
    assert read_model_folder(tmp_path / "run").fingerprint == NativeStore.open(world.other_regions).fingerprint


@pytest.mark.parametrize("content", ['{"images": [], "annotations": [', "", '{"annotations": []}'])
def test_truncated_captions_name_the_file(world: Any, tmp_path: Path, content: str) -> None:
    data = world.annotations(tmp_path / "data")
    (data / "annotations" / "captions_train.json").write_text(content)
    with pytest.raises(DataError, match=r"captions_train.json (is truncated or not JSON|must be an object)"):
        pretrain(tiny(world), tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")


LXMERT = (
    "encoder.hidden_size=16", "encoder.num_text_layers=1", "encoder.num_region_layers=1", "encoder.num_cross_layers=1",
    "encoder.num_heads=2", "encoder.intermediate_size=32", "batch_size=8", "train.max_steps=4", "train.precision=fp32",
    "train.log_every=2", "train.validate_every=100",
)  # fmt: skip
ASKED = (
    'corpora=[{kind = "captions"}, {kind = "answered_questions"}]',
    "objectives={masked_lm = 1.0, matching = 1.0, image_qa = 1.0}",
)


def asked(*settings: str) -> PretrainConfig:
    return configs.override(PRETRAINING["lxmert-scenes"](), [*LXMERT, *ASKED, "min_answer_count=2", *settings])


def test_a_model_that_learns_to_answer_keeps_its_table(world: Any, tmp_path: Path) -> None:
    pretrain(asked(), tmp_path / "run", data=[str(world.scenes)], store=world.regions, device="cpu")
    saved = read_model_folder(tmp_path / "run")
    table = table_of(saved)
    assert list(table) == sorted(table)
    assert {"yes", "no"} <= set(table)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["answers"] == table.fingerprint
    assert saved.weights["objectives.image_qa.head.linear.bias"].shape == (len(table),)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    parts = next(line["parts"] for line in lines if line["kind"] == "train")
    assert {"masked_lm", "matching", "image_qa", "image_qa_accuracy"} <= set(parts)
    scores = next(line["scores"] for line in lines if line["kind"] == "valid")
    assert 0 <= scores["image_qa_score"] == scores["image_qa_score_vqa"] <= 1

    # A task's head starts from it by what its answers say.
    encoder, style = saved.encoder(), head_styles("lxmert")["classify"]
    trained = build(Head(kind="classify", outputs=len(table)), encoder.dims, style=style)
    load_part(trained, saved.weights, "objectives.image_qa.head.", saved.path)
    fresh = build(Head(kind="classify", outputs=3), encoder.dims, style=style)
    assert isinstance(fresh, NormedClassifier)
    assert isinstance(trained, NormedClassifier)
    fresh.start_from(trained, table_rows(["the No.", "never seen", "Yes"], list(table)))
    assert torch.equal(fresh.linear.weight[0], trained.linear.weight[table.index("no")])
    assert not fresh.linear.weight[1].any()


def test_an_answer_head_goes_on_answer_by_answer(world: Any, tmp_path: Path) -> None:
    pretrain(asked(), tmp_path / "first", data=[str(world.scenes)], store=world.regions, device="cpu")
    data = world.annotations(tmp_path / "data")
    for file in (data / "annotations").glob("*_annotations.json"):
        file.write_text(file.read_text().replace('"yes"', '"absolutely"').replace('"red"', '"zinnober"'))
    still = asked("train.max_steps=1", "train.optim.lr=1e-12", "train.optim.weight_decay=0.0")
    pretrain(still, tmp_path / "second", data=[str(data)], store=world.regions, init=tmp_path / "first", device="cpu")
    before, after = read_model_folder(tmp_path / "first"), read_model_folder(tmp_path / "second")
    old, new = table_of(before), table_of(after)
    assert len(old) == len(new)
    assert list(old) != list(new)
    name = "objectives.image_qa.head.linear.weight"
    torch.testing.assert_close(
        after.weights[name][new.index("no")], before.weights[name][old.index("no")], rtol=0, atol=1e-6
    )
    assert after.weights[name][new.index("absolutely")].abs().max() < 1e-6
    assert (
        f"{len(set(old) & set(new))} of {len(new)} answers carried over"
        in (tmp_path / "second" / "log.jsonl").read_text()
    )


def test_a_start_may_be_the_key_networks_alone(world: Any, tmp_path: Path) -> None:
    still = [*LXMERT, "encoder.num_cross_layers=2", "train.max_steps=1", "train.optim.lr=1e-12"]
    contrast = "objective_settings.region_contrast"
    run = configs.override(PRETRAINING["cvlp-scenes"](), [*still, f"{contrast}.queue_size=64"])
    where: dict[str, Any] = {"data": [str(world.scenes)], "store": world.regions, "device": "cpu"}
    pretrain(run, tmp_path / "first", **where)
    release = configs.override(
        run,
        [
            "train.seed=5",
            "start=bert-base-uncased",
            f"{contrast}.key_start=init",
            f"{contrast}.independent_heads=true",
            f"{contrast}.momentum=0.9999",
        ],
    )
    pretrain(release, tmp_path / "second", init=tmp_path / "first", **where)
    before, after = read_model_folder(tmp_path / "first").weights, read_model_folder(tmp_path / "second").weights
    name = "lxmert.text_layers.0.feed_forward.up.weight"
    key = f"objectives.region_contrast.key.network.{name}"
    torch.testing.assert_close(after[key], before[f"encoder.{name}"], rtol=0, atol=1e-3)
    assert (after[f"encoder.{name}"] - before[f"encoder.{name}"]).abs().max() > 0.05, "the trained network is random"
    head = "objectives.region_contrast.head.dense.weight"
    assert (after[head] - before[head]).abs().max() > 0.01, "and so are its heads"
    assert (after[head] - after[head.replace(".head.", ".key_head.network.")]).abs().max() > 0.01
    assert f"the key network starts from {tmp_path / 'first'}" in (tmp_path / "second" / "log.jsonl").read_text()
    pretrain(release, tmp_path / "third", **where)
    told = (tmp_path / "third" / "log.jsonl").read_text()
    assert "the key network of the published run starts from bert-base-uncased" in told


def test_a_key_head_follows_a_loaded_head(world: Any, tmp_path: Path) -> None:
    run = configs.override(
        PRETRAINING["cvlp-scenes"](),
        [
            *LXMERT,
            "encoder.num_cross_layers=2",
            "objective_settings.region_contrast.queue_size=64",
            "train.max_steps=1",
            "train.optim.lr=1e-12",
        ],
    )
    pretrain(run, tmp_path / "first", data=[str(world.scenes)], store=world.regions, device="cpu")
    pretrain(
        configs.override(run, ["train.seed=5"]),
        tmp_path / "second",
        data=[str(world.scenes)],
        store=world.regions,
        init=tmp_path / "first",
        device="cpu",
    )
    before, after = read_model_folder(tmp_path / "first").weights, read_model_folder(tmp_path / "second").weights
    learnt = [name for name in before if name.startswith("objectives.region_contrast.head.")]
    assert learnt
    for name in learnt:
        key = name.replace(".head.", ".key_head.network.")
        torch.testing.assert_close(after[key], before[name], rtol=0, atol=1e-6)


def test_a_run_does_not_go_on_with_another_answer_table(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    pretrain(asked("train.max_seconds=0.0"), tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")
    file = next((data / "annotations").glob("*train_annotations.json"))
    file.write_text(file.read_text().replace('"yes"', '"certainly"'))
    with pytest.raises(RunError, match="started with another answer table"):
        pretrain(asked(), tmp_path / "run", data=[str(data)], store=world.regions, device="cpu", resume=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            ["objective_settings={image_qa = {num_answers = 9500}}"],
            ConfigError,
            r"distinguishes 9500 answers, but the data's answer table has \d+",
        ),
        (['corpora=[{kind = "captions"}]'], ConfigError, "image_qa needs a corpus with answers"),
        (["min_answer_count=5000"], DataError, "no answer occurs 5000 times"),
    ],
)
def test_answers_that_cannot_be_learnt(
    world: Any, tmp_path: Path, settings: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pretrain(asked(*settings), tmp_path / "run", data=[str(world.scenes)], store=world.regions, device="cpu")
    assert not (tmp_path / "run").exists()


OBJECTIVES = {
    "visualbert": {"masked_lm", "matching"},
    "vlbert": {"masked_lm", "masked_regions", "region_classes"},
    "vilbert": {"masked_lm", "matching", "masked_regions", "region_classes"},
    "lxmert": {
        "masked_lm",
        "matching",
        "masked_regions",
        "region_classes",
        "region_attributes",
        "region_features",
        "image_qa",
    },
    "cvlp": {"masked_lm", "matching", "region_contrast"},
}


def small(model: str, *settings: str) -> PretrainConfig:
    """A family's recipe on scenes, with its small encoder and few updates."""
    size = (
        "batch_size=8",
        "train.max_steps=4",
        "train.precision=fp32",
        "train.log_every=4",
        "train.validate_every=100",
    )
    return configs.override(PRETRAINING[f"{model}-scenes"](), [*size, *settings])


@pytest.mark.parametrize("model", OBJECTIVES)
def test_every_family_learns_what_its_paper_says(world: Any, tmp_path: Path, model: str) -> None:
    settings = ["objective_settings.region_contrast.queue_size=60"] if model == "cvlp" else []
    pretrain(small(model, *settings), tmp_path / "run", data=[str(world.scenes)], store=world.regions, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    parts = next(line["parts"] for line in lines if line["kind"] == "train")
    told = {name for name in parts if not name.endswith("_accuracy")}
    assert (
        told | ({"matching"} & OBJECTIVES[model]) == OBJECTIVES[model]
    )  # wrong captions are few, and these batches may have none
    for name in told:
        assert 0 < parts[name] < 100, parts


@pytest.mark.parametrize(
    ("model", "widths"), [("vlbert", {"classes": 10}), ("lxmert", {"classes": 9, "attributes": 14, "features": 16})]
)
def test_region_losses_have_the_widths_of_the_store(world: Any, model: str, widths: dict[str, int]) -> None:
    store = NativeStore.open(world.regions)
    assert len(store.class_names) == 9
    fitted = fit_to_store(small(model), store)
    assert fitted.region_losses is not None
    assert fitted.region_losses.widths == widths
    with pytest.raises(StoreError, match=r"have \d+ classes, not 160\d.* as recipe .* --set any_features=true"):
        fit_to_store(dataclasses.replace(small(model), any_features=False, encoder=fitted.encoder), store)


def test_soft_losses_need_distributions(world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    with StoreWriter(
        tmp_path / "regions", feature_size=16, fingerprint=store.fingerprint, class_names=store.class_names
    ) as writer:
        for image in store.ids:
            writer.add(image, dataclasses.replace(store[image], probs=None, attributes=None))
    where: dict[str, Any] = {"data": [str(world.scenes)], "store": tmp_path / "regions", "device": "cpu"}
    with pytest.raises(
        StoreError, match=r"holds no class distributions.*again with --probs.*--set region_losses.classes=hard"
    ):
        pretrain(small("vilbert"), tmp_path / "run", **where)
    with pytest.raises(StoreError, match="holds no attributes of regions"):
        pretrain(small("lxmert"), tmp_path / "run", **where)
    assert not (tmp_path / "run").exists()
    pretrain(small("vilbert", "region_losses.classes=hard"), tmp_path / "run", **where)
    told = [
        tensor
        for name, tensor in read_model_folder(tmp_path / "run").weights.items()
        if name.startswith("objectives.masked_regions.head.")
    ]
    assert 9 in {len(tensor) for tensor in told}
    assert 10 not in {len(tensor) for tensor in told}


VLBERT = (
    "encoder.hidden_size=16", "encoder.num_layers=1", "encoder.num_heads=2", "encoder.intermediate_size=32",
    "encoder.visual_size=16", "encoder.max_tokens=24", "batch_size=8", "train.precision=fp32", "train.log_every=2",
    "train.validate_every=100",
    "objectives={masked_lm = 1.0}", 'corpora=[{kind = "captions"}, {kind = "text", weight = 0.5}]',
)  # fmt: skip


def texted(*settings: str) -> PretrainConfig:
    return configs.override(PRETRAINING["vlbert-scenes"](), [*VLBERT, "train.max_steps=6", *settings])


def text_of(folder: Path, split: str) -> str:
    """Captions of the scenes as text."""
    captions = json.loads((folder / "annotations" / f"captions_{split}.json").read_text())["annotations"]
    return "\n".join(caption["caption"] for caption in captions[:12]) + "\n\n"


def test_captions_and_text_side_by_side(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    for split in ("train", "val"):
        (data / f"{split}.doc").write_text(text_of(world.scenes, split))
    pretrain(texted(), tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["kind"] == "train")
    assert set(train["parts"]) == {"masked_lm", "masked_lm_accuracy", "text_masked_lm", "text_masked_lm_accuracy"}
    assert train["loss"] == pytest.approx(train["parts"]["masked_lm"] + train["parts"]["text_masked_lm"], rel=0.1), (
        "a sum of two means"
    )
    assert train["utilisation"] > 0
    (scores,) = [line["scores"] for line in lines if line["kind"] == "valid"]
    assert scores["loss"] == scores["masked_lm"], "the best model is chosen by what it says about images"
    assert scores["text_masked_lm"] > 0
    assert [line["message"] for line in lines if "left out" in line.get("message", "")] == [
        f"text of {data}: left out 1 lines without a word"
    ]
    saved = read_model_folder(tmp_path / "run")
    runtime.seed_everything(0)
    fresh = models.build("vlbert", saved.config).get_parameter("text_only")
    assert 0 < (saved.encoder().get_parameter("text_only") - fresh).abs().max() < 0.1, (
        "what words see without an image is learnt"
    )


def test_captions_and_text_resume_bit_by_bit(world: Any, tmp_path: Path) -> None:
    def train(name: str, *settings: str, resume: bool = False) -> str:
        run = texted("train.max_steps=40", *settings)
        return pretrain(
            run, tmp_path / name, data=[str(world.scenes)], store=world.regions, device="cpu", resume=resume
        ).stopped

    assert train("whole") == "finished"
    assert '"text_masked_lm"' in (tmp_path / "whole" / "log.jsonl").read_text(), "drawn scenes come with text"
    assert train("parts", "train.max_seconds=0.02") == "max_seconds"
    assert train("parts", resume=True) == "finished"
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_the_table_of_a_model() -> None:
    bias = {"objectives.image_qa.head.linear.bias": torch.zeros(2)}

    def saved(weights: dict[str, torch.Tensor], **state: Any) -> ModelFolder:
        return ModelFolder(
            path=Path("model"),
            model="lxmert",
            config=None,
            task=None,
            text_only=False,
            fingerprint="",
            weights=weights,
            state=state,
        )

    released = AnswerVocabulary(["no", "yes"])
    assert table_of(saved(bias, answers=["no", "yes"])) == released
    with pytest.raises(CheckpointError, match="was not trained to answer questions"):
        table_of(saved({}))
    with pytest.raises(CheckpointError, match="does not say which answers its 2 outputs stand for"):
        table_of(saved(bias))
    with pytest.raises(CheckpointError, match="does not belong to model: found 3 answers for 2 outputs"):
        table_of(saved(bias, answers=["a", "b", "c"]))
