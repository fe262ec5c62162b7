"""Every recipe builds, survives run.json and takes a step; model folders and stores that do not fit are refused with
the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from visling import api, models
from visling import config as configs
from visling.data import texts
from visling.data.corpora.base import check_images, split_root
from visling.errors import CheckpointError, ConfigError, RunError, StoreError
from visling.pretrained.features import check_features
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import FINETUNING, PRETRAINING, PUBLISHED_FINETUNING, PUBLISHED_PRETRAINING
from visling.regions.store import NativeStore
from visling.runs import finetune as finetuning
from visling.runs import pretrain as pretraining
from visling.runs.evaluate import evaluate
from visling.runs.inputs import Inputs, fit_to_store
from visling.runs.validate import mean_over_batches
from visling.types import Loss, Record

TABLES: Mapping[str, Mapping[str, Callable[[], Any]]] = {"pretrain": PRETRAINING, "finetune": FINETUNING}
EVERY = [(verb, name) for verb, table in TABLES.items() for name in table]
ON_SCENES = [
    (verb, name)
    for verb, name in EVERY
    if (TABLES[verb][name]().any_features or name in ("visualbert-coco", "visualbert-vqa"))
    and TABLES[verb][name]().extractor is None  # those read pictures: tests/runs/test_scenes_end_to_end.py
]
RELEASED = [(verb, name) for verb, name in EVERY if not TABLES[verb][name]().any_features]


@pytest.mark.parametrize(("verb", "name"), EVERY)
def test_a_recipe_is_named_after_its_place_and_says_what_it_is(verb: str, name: str) -> None:
    recipe = TABLES[verb][name]
    assert recipe().recipe == name
    assert recipe.__doc__


@pytest.mark.parametrize(("verb", "name"), EVERY)
def test_settings_survive_run_json(verb: str, name: str) -> None:
    run = configs.override(TABLES[verb][name](), ["train.seed=7", "encoder.max_tokens=33", "train.optim.lr=0.125"])
    written = json.loads(json.dumps(configs.to_dict(run), allow_nan=False))
    assert configs.from_dict(type(run), written) == run


@pytest.mark.parametrize(("verb", "name"), EVERY)
def test_published_recipes_draw_their_batches_at_random_and_ours_sort_them_by_length(verb: str, name: str) -> None:
    published = name in {"pretrain": PUBLISHED_PRETRAINING, "finetune": PUBLISHED_FINETUNING}[verb]
    assert TABLES[verb][name]().sort_by_length == (1 if published else 16)


def prepared(verb: str, world: Any, sort_by_length: int) -> Any:
    """A prepared run with a `sort_by_length` of its own, and workers; pre-training reads text without images, too."""
    settings = [*world.settings, f"sort_by_length={sort_by_length}", "workers=3", "batch_size=4"]
    if verb == "finetune":
        run = configs.override(FINETUNING["visualbert-vqa-scenes"](), settings)
        return finetuning.Finetuning(
            run, data=world.scenes, store=world.regions, init=None, device="cpu", other_features=False
        )
    both = [*settings, 'corpora=[{kind = "captions"}, {kind = "text"}]', "objectives={masked_lm = 1.0}"]
    return pretraining.Pretraining(
        configs.override(PRETRAINING["visualbert-scenes"](), both), data=[str(world.scenes)], store=world.regions,
        init=None, device="cpu", other_features=False, images=None, backbone=None,
    )  # fmt: skip


@pytest.mark.parametrize("sort_by_length", [1, 5])
@pytest.mark.parametrize("verb", TABLES)
def test_settings_of_batches_reach_the_loaders(verb: str, sort_by_length: int, world: Any) -> None:
    batches = prepared(verb, world, sort_by_length).build().batches
    loaders = [batches] if verb == "finetune" else [batches.images, batches.text]
    assert [loader.bucket for loader in loaders] == [sort_by_length] * len(loaders)
    assert [loader.workers for loader in loaders] == [3, 0][: len(loaders)], "text alone is split in no time"


@pytest.mark.parametrize("verb", TABLES)
def test_sorting_no_batch_is_refused(verb: str) -> None:
    with pytest.raises(ConfigError, match=r"sort_by_length counts batches.*found 0.*set it to 1"):
        configs.override(
            TABLES[verb][f"visualbert-{'vqa-' if verb == 'finetune' else ''}scenes"](), ["sort_by_length=0"]
        )


def test_a_resumed_run_keeps_its_sorting(world: Any, tmp_path: Path) -> None:
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), [*world.settings, "train.max_steps=1"])
    finetuning.finetune(run, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    other = configs.override(run, ["sort_by_length=1"])
    with pytest.raises(RunError, match="sort_by_length was 16, now 1"):
        finetuning.finetune(other, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu", resume=True)


def test_a_resumed_run_may_have_other_workers(world: Any, tmp_path: Path) -> None:
    """Batches do not depend on who prepares them: the losses are those of a run by itself."""

    def losses(folder: Path, *parts: tuple[float, int]) -> list[float]:
        for seconds, workers in parts:
            changes = ["train.max_steps=4", f"workers={workers}", "train.log_every=1", f"train.max_seconds={seconds}"]
            run = configs.override(PRETRAINING["visualbert-scenes"](), [*world.settings, *changes])
            pretraining.pretrain(
                run, folder, data=[str(world.scenes)], store=world.regions, device="cpu", resume=folder.exists()
            )
        entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [entry["loss"] for entry in entries if entry["kind"] == "train"]

    alone = losses(tmp_path / "alone", (1000.0, 0))
    assert len(alone) == 4
    assert losses(tmp_path / "two", (0.0, 2), (1000.0, 1)) == alone


def test_texts_are_split_before_the_first_batch(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "KEPT_FROM", 1)
    monkeypatch.setenv("VISLING_HOME", str(tmp_path))
    prepared("pretrain", world, 1).build()
    assert len(list((tmp_path / "texts").iterdir())) == 2, "captions of training and of validation"
    prepared("finetune", world, 1).build()
    assert len(list((tmp_path / "texts").iterdir())) == 2, "a task is read one example at a time"


@pytest.mark.parametrize("verb", TABLES)
def test_a_negative_number_of_workers_is_refused(verb: str) -> None:
    with pytest.raises(ConfigError, match="workers must be 0 or more; found -1"):
        configs.override(TABLES[verb][f"visualbert-{'vqa-' if verb == 'finetune' else ''}scenes"](), ["workers=-1"])


@pytest.mark.parametrize("existed", [True, False])
def test_a_first_save_that_fails_says_why_and_leaves_nothing(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    def fill_the_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("visling.train.saved_states.save_file", fill_the_disk)
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), [*world.settings, "train.save_every=1"])
    out = tmp_path / "run"
    if existed:
        out.mkdir()
    with pytest.raises(RunError, match="No space left on device"):
        finetuning.finetune(run, out, data=world.scenes, store=world.regions, device="cpu")
    assert list(tmp_path.rglob("*")) == ([out] if existed else [])


@pytest.mark.parametrize(("verb", "name"), ON_SCENES)
def test_every_recipe_that_scenes_can_feed_takes_a_step(verb: str, name: str, world: Any, tmp_path: Path) -> None:
    plan = TABLES[verb][name]()
    tiny = [setting for setting in world.settings if plan.model == "visualbert" or not setting.startswith("encoder.")]
    run = configs.override(plan, [] if plan.model == "visualbert" else ["encoder=tiny"])
    run = configs.override(run, [*tiny, "any_features=true", "train.max_steps=1", "batch_size=4", "train.log_every=1"])
    if name == "visualbert-vqa":
        run = configs.override(run, ["train_split=train", "valid_split=val"])
    data = world.nlvr if name.endswith(("-nlvr", "-panels")) else world.scenes
    if verb == "pretrain":
        state = pretraining.pretrain(run, tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")
    else:
        # a third of the questions of a tiny world is not enough for nine of one answer, and it has no split dev
        changes = {
            "vqa": ["task_settings={min_count = 1}"],
            "nlvr": ["train_split=train.train", "valid_split=train.held"],
        }
        run = configs.override(run, changes.get(run.task, []))
        state = finetuning.finetune(run, tmp_path / "run", data=data, store=world.regions, device="cpu")
    assert (state.step, state.stopped) == (1, "finished")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["status"] == "finished"
    assert configs.from_dict(type(run), about["config"]) == fit_to_store(
        finetuning.fit_to_family(run) if isinstance(run, FinetuneConfig) else run, NativeStore.open(world.regions)
    )
    saved = read_model_folder(tmp_path / "run")
    assert saved.fingerprint == NativeStore.open(world.regions).fingerprint
    assert saved.encoder().config.hidden_size == run.encoder.hidden_size
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (loss,) = [line["loss"] for line in lines if line["kind"] == "train"]
    # The untrained detector's regions may match no object: there is nothing to point at.
    assert 0 < loss < 100 or (loss == 0 and run.task in ("grounding", "referring")), loss


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, name in RELEASED if name.startswith("visualbert")])
def test_released_recipes_have_the_size_of_the_release(verb: str, name: str) -> None:
    run = TABLES[verb][name]()
    with torch.device("meta"):
        encoder = models.build(run.model, run.encoder)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    # BERT base: 109,482,240; and the projection, two visual segments and 512 visual positions
    assert (
        parameters
        == 109_482_240 + (run.encoder.feature_size + 6 * run.encoder.append_spatial + 1) * 768 + (2 + 512) * 768
    )
    assert Inputs(run.model, run.encoder, None, "cpu").tokenizer.size == 30522
    exclude = run.train.optim.exclude
    assert run.train.optim.name == "bert_adam"
    assert exclude == ("pooler",)


def test_an_encoder_may_be_named_by_its_preset() -> None:
    run = configs.override(PRETRAINING["visualbert-scenes"](), ["encoder=tiny"])
    assert run.encoder == models.spec("visualbert").presets["tiny"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("encoder=tinny", ["'encoder' is 'tinny'", "Did you mean 'tiny'?"]),
        ("encoder=3", ["'encoder' is 3", "Valid:"]),
        ("encoder={hiden_size = 3}", ["'encoder.hiden_size'", "'hidden_size'"]),
        ("encoder.hiden_size=3", ["'encoder.hiden_size'", "'hidden_size'"]),
        ("model=visualbart", ["no model 'visualbart'", "'visualbert'"]),
        ("train.epoch=3", ["'train.epoch'", "'epochs'"]),
    ],
)
@pytest.mark.parametrize("verb", TABLES)
def test_wrong_settings_name_the_right_ones(verb: str, setting: str, words: list[str]) -> None:
    name = next(iter(TABLES[verb]))
    with pytest.raises(ConfigError) as caught:
        configs.override(TABLES[verb][name](), [setting])
    for word in words:
        assert word in str(caught.value)


def test_a_vocabulary_larger_than_the_word_table_is_refused() -> None:
    run = configs.override(PRETRAINING["visualbert-scenes"](), ["encoder.vocab_size=10"])
    with pytest.raises(
        ConfigError, match=r"318 entries, but encoder.vocab_size is 10. Use --set encoder.vocab_size=318"
    ):
        Inputs(run.model, run.encoder, None, "cpu")


def test_a_released_preset_keeps_its_feature_width(world: Any) -> None:
    store = NativeStore.open(world.regions)
    with pytest.raises(StoreError, match=r"width 16; recipe visualbert-vqa reads 2048.*--set any_features=true"):
        fit_to_store(FINETUNING["visualbert-vqa"](), store)
    assert fit_to_store(FINETUNING["visualbert-vqa-scenes"](), store).encoder.feature_size == 16


def test_all_missing_images_are_counted_and_the_first_is_named(world: Any) -> None:
    store = NativeStore.open(world.regions)
    records = [
        Record(id="a", images=(store.ids[0],)),
        Record(id="b", images=("gone_1000", "gone_1001")),
        Record(id="c", images=("gone_1000",)),
    ]
    check_images(records[:1], store)
    with pytest.raises(
        StoreError, match=r"example 'b' needs image 'gone_1000'.*In all, 2 annotated images are missing"
    ):
        check_images(records, store)


@pytest.mark.parametrize(
    ("given", "folder", "split"),
    [
        ("a/b", "a/b", ""),
        ("a/b@dev.train", "a/b", "dev.train"),
        ("me@home/data", "me@home/data", ""),
        ("me@home/data@dev", "me@home/data", "dev"),
    ],
)
def test_a_folder_may_name_its_split(given: str, folder: str, split: str) -> None:
    assert split_root(given) == (Path(folder), split)


def test_a_folder_whose_name_holds_an_at_sign_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "scenes@home").mkdir()
    assert split_root(str(tmp_path / "scenes@home")) == (tmp_path / "scenes@home", "")


@pytest.fixture
def model(world: Any, tmp_path: Path) -> Path:
    """A model folder that may be spoilt."""
    return Path(shutil.copytree(world.vqa / "model", tmp_path / "model"))


def test_a_model_folder_comes_back(world: Any, model: Path) -> None:
    saved = read_model_folder(model)
    found, task = saved.task_model()
    original, _ = read_model_folder(world.vqa).task_model()
    for name, tensor in original.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert task.name == "vqa"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:200]
            ),
            "may be truncated",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot read the model"),
        (lambda folder: (folder / "config.json").write_text('{"format": 1'), "may be truncated"),
        (lambda folder: (folder / "config.json").write_text('{"format": 1}'), "lacks 'model'"),
        (
            lambda folder: (folder / "config.json").write_text('{"format": 2}'),
            "has layout 2; this version reads 1. Update visling",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "is 'list'. Check the path"),
        (lambda folder: (folder / "answers.json").write_text('{"answers": ["yes",'), "may be truncated"),
        (lambda folder: (folder / "config.json").unlink(), "no model in"),
    ],
)
def test_damaged_model_folders_say_what_is_wrong(model: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(model)
    with pytest.raises(CheckpointError, match=message):
        read_model_folder(model)


def test_a_detector_is_not_mistaken_for_a_model(world: Any) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"holds no model that pretrain or finetune wrote: the format in its config.json is 'visling detector 1'",
    ):
        read_model_folder(world.detector)


def test_weights_of_another_size_name_both_sizes(model: Path) -> None:
    described = json.loads((model / "config.json").read_text())
    described["config"]["feature_size"] = 20
    (model / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        CheckpointError, match=r"first 'encoder.projection.weight' \(\(16, 22\) instead of \(16, 26\)\)"
    ):
        read_model_folder(model).task_model()


def test_a_pretrained_encoder_is_no_task_model(world: Any) -> None:
    with pytest.raises(CheckpointError, match=r"without a task head. Fine-tune it first"):
        read_model_folder(world.pretrained).task_model()


def test_features_of_another_detector_need_consent(world: Any) -> None:
    saved, other = read_model_folder(world.vqa), NativeStore.open(world.other_regions)
    assert other.fingerprint != saved.fingerprint
    with pytest.raises(CheckpointError, match="--other-features"):
        check_features(saved, other, override=False)
    assert check_features(saved, other, override=True) == ""
    assert check_features(saved, NativeStore.open(world.regions), override=False) == ""


def test_a_run_that_fails_before_it_saved_anything_frees_its_folder(world: Any, tmp_path: Path) -> None:
    run = configs.override(PRETRAINING["visualbert-scenes"](), [*world.settings, "train.accumulation=1000"])
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="less accumulation"):
        pretraining.pretrain(run, out, data=[str(world.scenes)], store=world.regions, device="cpu")
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ConfigError, match="less accumulation"):
        pretraining.pretrain(run, out, data=[str(world.scenes)], store=world.regions, device="cpu")
    assert list(out.iterdir()) == []
    pretraining.pretrain(
        configs.override(run, ["train.accumulation=1"]),
        out,
        data=[str(world.scenes)],
        store=world.regions,
        device="cpu",
    )


def test_a_run_that_fails_later_keeps_what_it_saved(world: Any, tmp_path: Path) -> None:
    settings = [*world.settings, "train.metric=acuracy", "train.save_every=1"]
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), settings)
    with pytest.raises(ConfigError, match="'accuracy'"):
        finetuning.finetune(run, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    assert {"run.json", "last", "log.jsonl"} <= {entry.name for entry in (tmp_path / "run").iterdir()}


def test_a_detector_that_is_gone_is_mentioned(world: Any, tmp_path: Path) -> None:
    store = shutil.copytree(world.regions, tmp_path / "regions")
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["settings"]["detector"] = str(tmp_path / "gone")
    (store / "manifest.json").write_text(json.dumps(manifest))
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), [*world.settings, "train.max_steps=1"])
    finetuning.finetune(run, tmp_path / "run", data=world.scenes, store=store, device="cpu")
    assert not (tmp_path / "run" / "model" / "detector").exists()
    assert f"{tmp_path / 'gone'}, which computed the regions, is gone" in (tmp_path / "run" / "log.jsonl").read_text()


EVERY_MODEL = ['train.keep=["best", "last", "epochs"]', "train.max_steps=none", "train.epochs=2"]


def test_every_model_that_is_kept_serves_as_model_does(world: Any, tmp_path: Path) -> None:
    start = configs.override(PRETRAINING["visualbert-scenes"](), [*world.settings, *EVERY_MODEL])
    pretraining.pretrain(start, tmp_path / "start", data=[str(world.scenes)], store=world.regions, device="cpu")
    first = tmp_path / "start" / "models" / "epoch-0001"
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), [*world.settings, *EVERY_MODEL])
    out = tmp_path / "run"
    finetuning.finetune(run, out, data=world.scenes, store=world.regions, init=first, device="cpu")
    kept = sorted(folder.name for folder in (out / "models").iterdir())
    assert kept == ["epoch-0001", "epoch-0002", "last"]
    last, final = (read_model_folder(out / "models" / name).weights for name in ("last", "epoch-0002"))
    assert all(torch.equal(tensor, final[name]) for name, tensor in last.items())
    names = {file.relative_to(out / "model") for file in (out / "model").rglob("*")}
    assert Path("detector/model/model.safetensors") in names
    for name in kept:
        folder = out / "models" / name
        assert {file.relative_to(folder) for file in folder.rglob("*")} == names
        scores = evaluate(folder, split="test", data=world.scenes, store=world.regions, device="cpu")["scores"]
        assert scores["accuracy"]["count"] == 12
        assert api.load(folder, device="cpu").answer(world.picture(), "how many stars are there?").text
        read_model_folder(folder).save_pretrained(tmp_path / name)
        assert {file.relative_to(tmp_path / name) for file in (tmp_path / name).rglob("*")} == names


def test_a_resumed_run_keeps_its_choice_of_models(world: Any, tmp_path: Path) -> None:
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), [*world.settings, "train.max_steps=1"])
    finetuning.finetune(run, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    other = configs.override(run, ['train.keep=["last"]'])
    with pytest.raises(RunError, match=r"train\.keep was \['best'\], now \['last'\]"):
        finetuning.finetune(other, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu", resume=True)


def test_a_run_that_fails_after_it_kept_a_model_keeps_it(world: Any, tmp_path: Path) -> None:
    settings = [*world.settings, "train.metric=acuracy", 'train.keep=["epochs"]', "train.max_steps=none"]
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), [*settings, "train.epochs=1", "train.save_every=900"])
    with pytest.raises(ConfigError, match="'accuracy'"):
        finetuning.finetune(run, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"run.json", "log.jsonl", "models"}
    assert read_model_folder(tmp_path / "run" / "models" / "epoch-0001").task == "vqa"


def test_mean_parts_counts_examples_and_weighs_objectives() -> None:
    first = Loss.mean("masked_lm", torch.tensor([1.0, 2.0, 3.0])) + Loss.mean("matching", torch.tensor([4.0]))
    second = Loss.mean("masked_lm", torch.tensor([7.0])) + Loss.mean("matching", torch.tensor([0.0, 0.0, 0.0]))
    unasked = Loss(value=torch.tensor(0.0), parts={"image_qa": (torch.tensor(0.0), torch.tensor(0.0))})
    assert mean_over_batches([first, unasked], {"masked_lm": 1.0, "image_qa": 1.0}) == {
        "loss": 2.0,
        "masked_lm": 2.0,
        "matching": 4.0,
    }
    assert mean_over_batches([first, second], {"masked_lm": 1.0, "matching": 0.5}) == {
        "loss": 3.25 + 0.5,
        "masked_lm": 3.25,
        "matching": 1.0,
    }
