"""A byte flips, a file is cut short, a file is gone: what notices it, and when."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures.commands import assert_same_weights, pretrain_words

from visling import config as configs
from visling.errors import StoreError
from visling.recipes.tables import PRETRAINING
from visling.regions.store import NativeStore
from visling.runs import pretrain as pretraining
from visling.vision import image_batches

Call = Callable[[Sequence[str | Path]], tuple[int, str]]


def flip(file: Path, at: int) -> None:
    """Flip one bit of a byte; `at` counts from the end if it is negative."""
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


def cut(file: Path, share: float = 0.5) -> None:
    """Cut a file short."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def on(world: Any, **changes: Path) -> Any:
    """The world with other scenes or another store."""
    return types.SimpleNamespace(**{**vars(world), **changes})


def finetune_words(world: Any, out: Path, init: Path) -> list[str]:
    changes = [part for setting in world.settings for part in ("--set", setting)]
    return [
        "finetune", "--recipe", "visualbert-vqa-scenes", "--data", str(world.scenes), "--store", str(world.regions),
        "--init", str(init), "--out", str(out), "--device", "cpu", "--threads", "1", *changes,
    ]  # fmt: skip


# A store


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99], ids=["first numbers", "middle", "last id"])
def test_a_byte_of_a_stores_index(
    world: Any, tmp_path: Path, regions: Path, call: Call, record_property: Callable[[str, object], None], place: float
) -> None:
    """Noticed whenever the store is opened."""
    index = regions / "index.safetensors"
    flip(index, int(place * index.stat().st_size))
    status, said = call(pretrain_words(on(world, regions=regions), tmp_path / "run"))
    assert status == 2
    assert f"{index} is damaged: SHA-256" in said
    assert not (tmp_path / "run").exists()
    record_property("message", said.strip())


def test_a_byte_of_a_shard_is_noticed_by_the_check_alone(world: Any, tmp_path: Path, regions: Path, call: Call) -> None:
    """A start reads the length of every shard; all of their numbers are read by `visling regions check`."""
    shard = regions / "shard-00000.safetensors"
    flip(shard, 5000)
    assert call(pretrain_words(on(world, regions=regions), tmp_path / "run"))[0] == 0
    assert call(["regions", "check", regions])[0] == 1
    with pytest.raises(StoreError, match=r"shard-00000.safetensors is damaged: SHA-256"):
        NativeStore.open(regions).check()
    shard.write_bytes(shard.read_bytes()[:-1])
    status, said = call(pretrain_words(on(world, regions=regions), tmp_path / "again"))
    assert status == 2
    assert f"{shard} is truncated" in said


# Weights and states

STATES = ("train.max_steps=6", "train.save_every=2")


@pytest.fixture(scope="module")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with states of its steps 4 and 6."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretraining.pretrain(
        configs.override(PRETRAINING["visualbert-scenes"](), [*world.settings, *STATES]),
        out,
        data=[str(world.scenes)],
        store=world.regions,
        device="cpu",
    )
    return out


@pytest.mark.parametrize("place", [0.05, 0.6, 0.99])
def test_a_byte_of_a_models_weights(
    world: Any, tmp_path: Path, call: Call, record_property: Callable[[str, object], None], place: float
) -> None:
    """Noticed whenever the model is read."""
    init = Path(shutil.copytree(world.pretrained, tmp_path / "pretrained"))
    weights = init / "model" / "model.safetensors"
    flip(weights, int(place * weights.stat().st_size))
    status, said = call(finetune_words(world, tmp_path / "run", init))
    assert status == 2
    assert str(init / "model") in said
    record_property("message", said.strip())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", [lambda file: flip(file, -9), cut, Path.unlink], ids=["flipped", "cut", "deleted"])
def test_a_damaged_state_is_left_out_and_an_older_one_resumed(
    world: Any, whole: Path, tmp_path: Path, call: Call, name: str, damage: Callable[[Path], None],
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    damage(max((run / "last").iterdir()) / name)
    status, said = call([*pretrain_words(world, run, *STATES), "--resume"])
    assert status == 0, said
    assert "the state of step 6 is left out" in said
    assert name in said
    assert "resumed at step 4" in said
    assert_same_weights(run / "model" / "model.safetensors", whole / "model" / "model.safetensors")
    record_property("message", next(line for line in said.splitlines() if "left out" in line))


def test_when_every_state_is_damaged_the_run_says_so(world: Any, whole: Path, tmp_path: Path, call: Call) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for state in (run / "last").iterdir():
        flip(state / "optimizer.pt", -9)
    status, said = call([*pretrain_words(world, run, *STATES), "--resume"])
    assert status == 2
    assert "can be resumed" in said
    assert "step-00000006" in said


# Annotations and images


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_annotation(
    world: Any, tmp_path: Path, call: Call, record_property: Callable[[str, object], None], share: float
) -> None:
    """Noticed before anything is trained."""
    scenes = world.annotations(tmp_path / "scenes")
    file = scenes / "annotations" / "captions_train.json"
    cut(file, share)
    status, said = call(pretrain_words(on(world, scenes=scenes), tmp_path / "run"))
    assert status == 2
    assert f"{file} is truncated or not JSON" in said
    assert not (tmp_path / "run").exists()
    record_property("message", said.strip())


def own_words(world: Any, table: Path, out: Path) -> list[str | Path]:
    """Words of `visling finetune` on a table of one's own."""
    changes = [part for setting in world.settings for part in ("--set", setting)]
    return [
        "finetune", "--task", "vqa", "--train", table, "--valid", "0.4", "--images", world.picture().parent,
        "--detector", world.detector, "--init", world.pretrained, "--out", out, "--device", "cpu", "--threads", "1",
        *changes,
    ]  # fmt: skip


def write_tables(world: Any, folder: Path) -> dict[str, Path]:
    """The same questions in each kind of table."""
    names = sorted(path.name for path in world.picture().parent.glob("*.png"))
    rows = [{"image": name, "question": "is it red?", "answer": answer} for name in names for answer in ("yes", "no")]
    for suffix, separator in ((".tsv", "\t"), (".csv", ",")):
        lines = [separator.join(("image", "question", "answer")), *(separator.join(row.values()) for row in rows)]
        (folder / f"table{suffix}").write_text("\n".join(lines) + "\n")
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.json").write_text(json.dumps(rows))
    return {suffix: folder / f"table{suffix}" for suffix in (".tsv", ".csv", ".jsonl", ".json")}


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json"])
def test_a_table_cut_within_a_row(
    world: Any, tmp_path: Path, call: Call, suffix: str, record_property: Callable[[str, object], None]
) -> None:
    table = write_tables(world, tmp_path)[suffix]
    content = table.read_text()
    table.write_text(content[: content.rindex("is it red?") + 4])
    status, said = call(own_words(world, table, tmp_path / "run"))
    assert status == 2
    assert str(table) in said
    record_property("message", said.strip())


def test_an_image_that_is_deleted_is_listed_and_stops_nothing(
    world: Any, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted between the listing of the folder and its turn: it is left out, and named."""
    images = Path(shutil.copytree(world.picture().parent, tmp_path / "images"))
    gone = min(images.glob("*.png"))
    words = ["regions", "extract", images, "--detector", world.detector, "--device", "cpu", "--threads", "1"]
    real = image_batches.ImageBatches.__init__

    def delete_first(self: Any, *args: Any, **kwargs: Any) -> None:
        gone.unlink(missing_ok=True)
        real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(image_batches.ImageBatches, "__init__", delete_first)
        status, said = call([*words, "--out", tmp_path / "regions"])
    assert status == 0, said
    assert f"left out: no image {gone}" in said
    assert gone.name in (tmp_path / "regions" / "unreadable.txt").read_text()
    assert call([*words, "--out", tmp_path / "rest"])[0] == 0
    shards = [(tmp_path / name / "shard-00000.safetensors").read_bytes() for name in ("regions", "rest")]
    assert shards[0] == shards[1]
