"""Pre-training end to end: pictures in the batch, a jointly trained region extractor, what is kept of it and what
is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

from visling import config as configs
from visling import models, runtime
from visling.cli.app import app
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.corpora.base import Typical
from visling.data.text import TextLayout
from visling.draws import KeyedDraws, Stream
from visling.errors import CheckpointError, ConfigError, DataError, VislingError
from visling.models.vlbert import VlBert
from visling.pretrained.export import export
from visling.pretrained.folder import load_part, read_model_folder
from visling.recipes.configs import PretrainConfig
from visling.recipes.tables import FINETUNING, PRETRAINING, PUBLISHED_PRETRAINING
from visling.regions.store import NativeStore
from visling.runs import finetune as finetuning
from visling.runs.inputs import Inputs, fit_to_store
from visling.runs.pictures import find_corpus_pictures
from visling.runs.pretrain import pretrain, read_corpora, untrained_model
from visling.runs.typical_batch import typical_batch
from visling.train.optim import build_optimizer
from visling.types import Batch
from visling.vision.end_to_end import KEYS, MEAN_BGR, ExtractorConfig, RegionExtractor
from visling.vision.images import read_image
from visling.vision.pictures import PictureFiles

SMALL = ExtractorConfig(blocks=(1, 1, 1), stem_size=4, widths=(4, 4, 6, 4), shorter_side=32, longer_side=64)
E2E = (
    "extractor={blocks = [1, 1, 1], stem_size = 4, widths = [4, 4, 6, 4], shorter_side = 32, longer_side = 64}",
    "encoder.feature_size=16", "encoder.whiten_features=false", "encoder.masks_features=false", "flip=0.5",
    "region_masking.rate=0.3",
    "encoder.hidden_size=16", "encoder.visual_size=16", "encoder.num_layers=1", "encoder.num_heads=2",
    "encoder.intermediate_size=32", "batch_size=4", "train.max_steps=4", "train.precision=fp32", "train.log_every=2",
    "train.validate_every=100",
)  # fmt: skip


def end_to_end(*settings: str) -> PretrainConfig:
    """VL-BERT's recipe on scenes with a tiny extractor."""
    return configs.override(PRETRAINING["vlbert-scenes"](), [*E2E, *settings])


def train(world: Any, out: Path, *settings: str, **options: Any) -> list[dict[str, Any]]:
    """Run it; what it logged."""
    where = {"data": [str(world.scenes)], "store": world.regions, "images": world.scenes, "device": "cpu", **options}
    pretrain(end_to_end(*settings), out, **where)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def loader(world: Any, run: PretrainConfig, *, valid: bool = True, **settings: Any) -> Loader:
    """Examples as a run reads them; 15 of validation, or 120 of training."""
    store = NativeStore.open(world.regions)
    spec, tokenizer = models.spec(run.model).inputs(run.encoder), Inputs(run.model, run.encoder, None, "cpu").tokenizer
    source = read_corpora(
        run, [str(world.scenes)], TextLayout(tokenizer, spec), store, valid=valid, answers=None
    ).examples
    assert run.extractor is not None
    pictures = PictureFiles(find_corpus_pictures(run.corpora, world.scenes, [source], store), run.extractor)
    collator = Collator(
        store, spec, tokenizer, masking=run.masking, region_masking=run.region_masking,
        needs=("region_probs", "class_slots"), pictures=pictures, flip=settings.pop("flip", run.flip),
    )  # fmt: skip
    return Loader(source, collator, **{"batch_size": 4, "seed": 3, "prefetch": 0, **settings})


# ----------------------------------------------------------------------------------------------- what the encoder reads


def as_the_release(
    picture: NDArray[np.uint8], corners: NDArray[np.float32], mirrored: bool, hidden: NDArray[np.bool_]
) -> tuple[Tensor, Tensor]:
    """Pixels and boxes by the steps of the release's description: resize, flip, whiten, keep boxes inside, cut hidden
    ones out."""
    high, wide = picture.shape[:2]
    scale = SMALL.shorter_side / min(high, wide)
    width, height = (int(wide * scale), SMALL.shorter_side) if high <= wide else (SMALL.shorter_side, int(high * scale))
    pixels = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)).astype(np.float32)
    boxes = corners * np.array([width / wide, height / high] * 2)
    if mirrored:
        pixels = pixels[:, ::-1]
        boxes = np.stack([width - 1 - boxes[:, 2], boxes[:, 1], width - 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    pixels = pixels[..., ::-1] - np.array(MEAN_BGR, np.float32)
    boxes = np.clip(boxes, 0, [width - 1, height - 1] * 2)
    for x1, y1, x2, y2 in boxes[hidden].astype(int):
        pixels[y1 : y2 + 1, x1 : x2 + 1] = 0
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.from_numpy(boxes).float()


def test_the_encoder_reads_what_the_extractor_makes_of_the_pictures(world: Any) -> None:
    run = end_to_end()
    store, made = NativeStore.open(world.regions), loader(world, run, valid=False)
    model = untrained_model(fit_to_store(run, store)).eval()
    assert model.extractor is not None
    read: list[Batch] = []
    model.encoder.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    turned, holes = [], 0
    for number, (indices, batch, targets) in enumerate(made.batches_with_index()):
        batch.validate()
        with torch.no_grad():
            model(batch, targets)
        seen = read[-1].regions
        assert seen is not None
        assert seen.whole is not None
        assert batch.pixels is not None
        assert batch.regions is not None
        assert batch.regions.hidden is not None
        assert batch.regions.features.shape[-1] == 0
        images = torch.zeros_like(batch.pixels.images)
        boxes = torch.zeros(*seen.mask.shape, 4)
        whole = torch.zeros(len(indices), 1, 4)
        for row, index in enumerate(map(int, indices)):
            draws = KeyedDraws(3, 0, [index])
            (image,) = made.source.example(index, next(draws.each(Stream.EXAMPLE))).images
            turned.append(next(draws.each(Stream.MIRROR)).random() < 0.5)
            found, picture = store[image], read_image(next(world.scenes.rglob(f"{image}.png")))
            hidden = batch.regions.hidden[row, : len(found)].numpy()
            holes += int(hidden.sum())
            pixels, corners = as_the_release(picture, found.boxes, turned[-1], hidden)
            images[row, :, : pixels.shape[1], : pixels.shape[2]] = pixels
            boxes[row, : len(corners)] = corners
            high, wide = picture.shape[:2]
            assert batch.pixels.size[row].tolist() == list(pixels.shape[1:])
            whole[row, 0, 2:] = torch.tensor([(wide - 1) / wide * pixels.shape[2], (high - 1) / high * pixels.shape[1]])
        assert_close(batch.pixels.images, images, rtol=0, atol=0)
        with torch.no_grad():
            expected = model.extractor(
                images, torch.cat([boxes, whole], dim=1), torch.cat([seen.mask, torch.ones(len(indices), 1) > 0], dim=1)
            )
        assert bool(expected.any())
        assert_close(seen.features, expected[:, :-1], rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert_close(seen.whole, expected[:, -1], rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        if number == 7:
            break
    assert 5 < sum(turned) < len(turned) - 5
    assert holes > 10


def contents(made: Loader) -> dict[int, tuple[Any, ...]]:
    """Example -> its own pixels, boxes and labels."""
    found = {}
    for indices, batch, targets in made.batches_with_index():
        pixels, regions = batch.pixels, batch.regions
        assert pixels is not None
        assert regions is not None
        assert targets.token_slots is not None
        for row, index in enumerate(map(int, indices)):
            high, wide = pixels.size[row].tolist()
            own = pixels.images[pixels.row[row], :, :high, :wide]
            assert not bool(pixels.images[row, :, high:].any())
            found[index] = (
                own.numpy().tobytes(),
                regions.boxes[row][regions.mask[row]].tolist(),
                batch.text.ids[row][batch.text.mask[row]].tolist(),
            )
    return found


def test_an_example_depends_on_seed_epoch_and_index_alone(world: Any) -> None:
    run = end_to_end()
    one = contents(loader(world, run, drop_last=False))
    assert one == contents(loader(world, run, batch_size=5, bucket=1, shuffle=False, drop_last=False, prefetch=3))
    shares = [contents(loader(world, run, batch_size=2, rank=rank, world_size=2)) for rank in (0, 1)]
    assert not shares[0].keys() & shares[1].keys()
    assert all(one[index] == found for share in shares for index, found in share.items())
    made = loader(world, run, drop_last=False)
    made.epoch = 1
    assert sum(one[index] != found for index, found in contents(made).items()) > 7
    assert one != contents(loader(world, run, seed=4, drop_last=False))


def test_nothing_is_mirrored_unless_asked(world: Any) -> None:
    run = end_to_end("region_masking.rate=0.0", "masking.rate=0.0")
    plain = contents(loader(world, run, flip=0.0, drop_last=False))
    later = loader(world, run, flip=0.0, drop_last=False)
    later.epoch = 1
    assert contents(later) == plain
    always = contents(loader(world, run, flip=1.0, drop_last=False))
    for index, (pixels, boxes, ids) in always.items():
        assert ids == plain[index][2], "texts stay"
        assert pixels != plain[index][0]
        for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(boxes, plain[index][1], strict=True):
            assert (y1, y2) == (v1, v2)
            assert abs(x1 + u2 - 1) < 0.05
            assert abs(x2 + u1 - 1) < 0.05


# ------------------------------------------------------------------------------------------------------- what it learns


def test_losses_reach_only_the_later_stages(world: Any) -> None:
    run = end_to_end("encoder.visual_scale_init=1.0")
    run = fit_to_store(run, NativeStore.open(world.regions))
    model = untrained_model(run).train()
    assert model.extractor is not None
    batch, targets = next(iter(loader(world, run)))
    model(batch, targets).value.backward()
    trained = {
        name
        for name, parameter in model.extractor.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    behind = ("stages.1.", "stages.2.", "head.")
    assert trained == {
        name for name, _ in model.extractor.named_parameters() if name.startswith(behind) and ".norm." not in name
    }
    assert all(parameter.grad is None for name, parameter in model.extractor.named_parameters() if name not in trained)
    optimiser, _ = build_optimizer(model, run.train.optim, 10)
    moved = {name for group in optimiser.param_groups for name in group["names"] if name.startswith("extractor.")}
    assert moved == {f"extractor.{name}" for name in trained}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_any_batch_gives_a_finite_gradient(world: Any, rows: int, precision: Any) -> None:
    """Of one example, and of an image without regions, whose picture is seen as a whole all the same."""
    run = fit_to_store(end_to_end("encoder.text_visual_scale_init=1.0"), NativeStore.open(world.regions))
    model = untrained_model(run).train()
    batch, targets = typical_batch(run, Typical(), rows)
    assert batch.regions is not None
    assert batch.pixels is not None
    mask = batch.regions.mask.clone()
    mask[-1] = False
    boxes = torch.where(mask[..., None], batch.regions.boxes, 0.0)
    batch = dataclasses.replace(batch, regions=dataclasses.replace(batch.regions, mask=mask, boxes=boxes))
    batch.validate()
    with runtime.autocast(torch.device("cpu"), precision):
        loss = model(batch, targets).value
    loss.backward()
    assert loss.isfinite()
    assert model.extractor is not None
    gradient = model.extractor.get_parameter("head.0.reduce.convolution.weight").grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


def test_rows_may_share_a_picture(world: Any) -> None:
    torch.manual_seed(0)
    extractor = RegionExtractor(SMALL).eval()
    run = end_to_end()
    batch, _ = typical_batch(run, Typical(), 2)
    assert batch.regions is not None
    assert batch.pixels is not None
    row = torch.tensor([1, 0, 1])
    regions = batch.regions.map(lambda tensor: tensor[row])
    shared, _ = extractor.describe(regions, dataclasses.replace(batch.pixels, row=row))
    pixels = batch.pixels
    apart, _ = extractor.describe(
        regions, dataclasses.replace(pixels, images=pixels.images[row], size=pixels.size[row], row=torch.arange(3))
    )
    assert shared.whole is not None
    assert apart.whole is not None
    assert_close(shared.features, apart.features)
    assert_close(shared.whole, apart.whole)


def test_the_loss_falls_and_the_extractor_moves(world: Any, tmp_path: Path) -> None:
    settings = (
        "train.max_steps=40",
        "train.log_every=10",
        "train.optim.lr=0.005",
        "encoder.visual_scale_init=1.0",
        "objectives.masked_regions=1.0",
    )
    lines = train(world, tmp_path / "run", *settings)
    told = [line for line in lines if line["kind"] == "train"]
    assert told[0]["parts"]["region_classes"] > 0
    losses = [line["loss"] for line in told]
    assert losses[-1] < 0.8 * losses[0], losses
    run = end_to_end()
    runtime.seed_everything(run.train.seed)
    fresh = untrained_model(fit_to_store(run, NativeStore.open(world.regions))).state_dict()
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {
        name for name in weights if name.startswith("extractor.") and not torch.equal(weights[name], fresh[name])
    }
    behind = ("extractor.stages.1", "extractor.stages.2", "extractor.head")
    assert changed == {name for name in fresh if name.startswith(behind) and ".norm." not in name}


# --------------------------------------------------------------------------------------------------------- what is kept


def test_a_stopped_run_goes_on_bit_by_bit(world: Any, tmp_path: Path) -> None:
    text = tmp_path / "train.doc"
    text.write_text("the red circle is left of the star .\n" * 20)
    both = 'corpora=[{kind = "captions"}, {kind = "text", weight = 0.5}]'
    data = {"data": [str(world.scenes), str(text)]}

    def stopped(name: str, *settings: str, **options: Any) -> None:
        train(world, tmp_path / name, both, "train.max_steps=8", *settings, **data, **options)

    stopped("whole")
    stopped("parts", "train.max_seconds=0.1")
    about = json.loads((max((tmp_path / "parts" / "last").glob("step-*")) / "state.json").read_text())
    assert about["state"]["step"] < 8
    stopped("parts", resume=True)
    assert '"step": 8' in (max((tmp_path / "parts" / "last").glob("step-*")) / "state.json").read_text()
    for folder in ("model", "last/step-00000008"):
        whole, parts = (load_file(tmp_path / name / folder / "model.safetensors") for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert "randomly initialised" in (tmp_path / "parts" / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def trained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run end to end."""
    out = tmp_path_factory.mktemp("end_to_end") / "run"
    train(world, out)
    return out


STILL = ("train.max_steps=1", "train.optim.lr=1e-12", "train.optim.weight_decay=0.0")


def test_a_model_folder_holds_the_extractor(world: Any, trained: Path) -> None:
    saved = read_model_folder(trained)
    assert saved.extractor == SMALL
    extractor = RegionExtractor(SMALL)
    load_part(extractor, saved.weights, "extractor.", saved.path)
    assert isinstance(saved.encoder(), VlBert)
    assert json.loads((trained / "run.json").read_text())["images"] == str(world.scenes)
    assert "It computes them from pixels with its own network" in (trained / "model" / "README.md").read_text()
    assert read_model_folder(world.pretrained).extractor is None


def test_another_run_goes_on_from_it(world: Any, trained: Path, tmp_path: Path) -> None:
    lines = train(world, tmp_path / "run", *STILL, "train.seed=5", init=trained)
    before, after = read_model_folder(trained).weights, read_model_folder(tmp_path / "run").weights
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert not any("fresh" in line.get("message", "") for line in lines)


def test_it_does_not_go_on_with_stored_features_unasked(world: Any, trained: Path, tmp_path: Path) -> None:
    stored = end_to_end(*STILL, "extractor=none", "flip=0.0")
    where: dict[str, Any] = {"data": [str(world.scenes)], "store": world.regions, "device": "cpu"}
    with pytest.raises(CheckpointError, match=r"trained jointly with a region extractor of its own.*--other-features"):
        pretrain(stored, tmp_path / "run", init=trained, **where)
    tuning = configs.override(
        FINETUNING["vlbert-vqa-scenes"](), [*(setting for setting in E2E if "encoder" in setting), *STILL]
    )
    with pytest.raises(CheckpointError, match="a region extractor of its own"):
        finetuning.finetune(tuning, tmp_path / "tuned", init=trained, **{**where, "data": world.scenes})
    assert not (tmp_path / "run").exists()
    pretrain(stored, tmp_path / "run", init=trained, other_features=True, **where)
    assert read_model_folder(tmp_path / "run").extractor is None
    with pytest.raises(
        CheckpointError,
        match=r"has no network that computes them, and this run computes its own.*--other-features",
    ):
        train(world, tmp_path / "back", init=tmp_path / "run")
    lines = train(world, tmp_path / "back", *STILL, init=tmp_path / "run", other_features=True)
    assert any("the region extractor is randomly initialised" in line.get("message", "") for line in lines)


def test_boxes_of_another_detector_need_consent(world: Any, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--other-features"):
        train(world, tmp_path / "run", store=world.other_regions, init=trained)


def plain_resnet(extractor: RegionExtractor, path: Path) -> Path:
    """Its weights as a file of a ResNet."""
    theirs = KEYS["resnet"].invert({f"extractor.{name}": tensor for name, tensor in extractor.state_dict().items()})
    save_file({name: tensor.clone() for name, tensor in theirs.items()}, path)
    return path


def test_it_starts_from_a_file_of_a_resnet(world: Any, trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(8)
    extractor = RegionExtractor(SMALL)
    file = plain_resnet(extractor, tmp_path / "resnet.safetensors")
    lines = train(world, tmp_path / "run", *STILL, backbone=file)
    weights = read_model_folder(tmp_path / "run").weights
    for name, tensor in extractor.state_dict().items():
        assert_close(weights[f"extractor.{name}"], tensor, rtol=0, atol=1e-6, msg=name)
    assert any(line.get("message") == f"the region extractor starts from {file} (resnet)" for line in lines)
    with pytest.raises(ConfigError, match="give --init or --backbone"):
        train(world, tmp_path / "both", backbone=file, init=trained)
    with pytest.raises(CheckpointError, match=r"does not fill the region extractor, read as a plain ResNet"):
        train(world, tmp_path / "deeper", "extractor.blocks=[1, 2, 1]", backbone=file)
    with pytest.raises(CheckpointError, match="no weight file"):
        train(world, tmp_path / "none", backbone=tmp_path / "nowhere.pth")
    assert not (tmp_path / "deeper").exists()


def test_a_whole_model_goes_out_and_its_network_comes_back(world: Any, trained: Path, tmp_path: Path) -> None:
    done = export(trained, tmp_path / "vl-bert.safetensors")
    assert done.layout == "official"
    assert not done.left_out
    names = load_file(tmp_path / "vl-bert.safetensors").keys()
    assert {"image_feature_extractor.backbone.conv1.weight", "image_feature_extractor.obj_downsample.1.weight"} <= names
    lines = train(world, tmp_path / "run", *STILL, backbone=tmp_path / "vl-bert.safetensors")
    assert any("(official)" in line.get("message", "") for line in lines)
    before, after = read_model_folder(trained).weights, read_model_folder(tmp_path / "run").weights
    for name in before:
        if name.startswith("extractor."):
            assert_close(after[name], before[name], rtol=0, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["encoder.feature_size=32"], r"makes features of width 16.*--set encoder.feature_size=16"),
        (["encoder.whiten_features=true"], "encoder.whiten_features measures stored features"),
        (["encoder.masks_features=true"], "encoder.masks_features hides features, but here pixels are hidden"),
        (["region_masking.cut_pixels=false"], "does not hide the features that are computed from them"),
        (
            ["region_masking.cut_pixels=false", "encoder.masks_features=true", "region_masking.learned=false"],
            "Use --set encoder.masks_features=true and --set region_masking.learned=true",
        ),
        (["region_masking.hide=0.8", "region_masking.random=0.1"], "region_masking.random takes stored features"),
        (["region_losses.features=l2"], "compare with stored features"),
        (["objectives.region_contrast=1.0"], "compare with stored features"),
        (["flip=1.5"], "flip is a share of the images, from 0 to 1; found 1.5"),
    ],
)
def test_what_does_not_go_together(settings: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        end_to_end(*settings)


def test_a_recipe_without_an_extractor_may_mirror() -> None:
    assert end_to_end("extractor=none").flip == 0.5


def test_pictures_and_extractors_come_together(world: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"recipe vlbert-scenes computes region features from pixels: name the folder of the images with --images",
    ):
        train(world, tmp_path / "run", images=None)
    for given in ({"images": world.scenes}, {"backbone": tmp_path, "images": None}):
        with pytest.raises(
            ConfigError, match=rf"reads the features of the store and no image: leave out --{next(iter(given))}"
        ):
            train(world, tmp_path / "run", "extractor=none", "flip=0.0", **given)
    with pytest.raises(VislingError, match="recipe vlbert-base-e2e computes region features from pixels") as both:
        pretrain(
            PUBLISHED_PRETRAINING["vlbert-base-e2e"](),
            tmp_path / "run",
            data=["nowhere"],
            store=tmp_path / "none",
            device="cpu",
        )
    assert "no region store at" in str(both.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pictures(world: Any, tmp_path: Path) -> Path:
    """A copy of the pictures, to be changed."""
    return shutil.copytree(world.scenes / "images", tmp_path / "pictures")


def test_missing_and_doubtful_pictures_are_named_before_training(world: Any, pictures: Path, tmp_path: Path) -> None:
    first = min((pictures / "train").glob("*.png"))
    lost = first.rename(tmp_path / first.name)
    with pytest.raises(
        DataError, match=rf"pictures lacks 1 of the 27 pictures that the run reads, such as '{first.stem}'"
    ):
        train(world, tmp_path / "run", images=pictures)
    Image.open(lost).save(first.with_suffix(".jpg"))
    train(world, tmp_path / "run", "train.max_steps=1", images=pictures)
    (pictures / "again").mkdir()
    shutil.copy(lost, pictures / "again")
    with pytest.raises(DataError, match=rf"are both called {first.stem}"):
        train(world, tmp_path / "twice", images=pictures)
    with pytest.raises(DataError, match="no image folder"):
        train(world, tmp_path / "none", images=tmp_path / "nowhere")
    assert not (tmp_path / "twice").exists()


def test_damaged_and_other_pictures_are_named_when_they_are_read(world: Any, pictures: Path, tmp_path: Path) -> None:
    files = sorted((pictures / "train").glob("*.png"))
    whole = files[0].read_bytes()
    for file in files:
        file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot read image .*png .* Replace or remove the file"):
        train(world, tmp_path / "run", images=pictures)
    for file in files:
        Image.new("RGB", (90, 30)).save(file)
    with pytest.raises(
        DataError, match=r"is shaped like 63 x 21, but the regions stored for it are of an image of \d+ x \d+ pixels"
    ):
        train(world, tmp_path / "run", images=pictures)


def test_pictures_are_found_as_the_store_names_them(world: Any, tmp_path: Path) -> None:
    """As annotations call them, as the store does, or by another spelling; a number of Visual Genome by itself
    alone."""
    run = end_to_end()
    store, made = NativeStore.open(world.regions), loader(world, run).source
    names = sorted({record.images[0] for record in made.records})  # type: ignore[attr-defined]

    def find(*called: str, **changes: Any) -> list[str]:
        folder = tmp_path / "-".join(called)
        folder.mkdir()
        for name in called:
            shutil.copy(world.picture("val"), folder / f"{name}.png")
        corpora = dataclasses.replace(run, **changes).corpora
        return sorted(path.stem for path in find_corpus_pictures(corpora, folder, [made], store).values())

    assert find(*names) == names
    numbers = [str(int(name.rpartition("_")[2])) for name in names]
    assert find(*numbers) == sorted(numbers)


# ---------------------------------------------------------------------------------------------------------------- doors


def test_the_command_line_trains_end_to_end(world: Any, tmp_path: Path) -> None:
    words = [
        "pretrain",
        "--recipe",
        "vlbert-scenes",
        "--data",
        world.scenes,
        "--store",
        world.regions,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    settings = [part for setting in (*E2E, "train.max_steps=1") for part in ("--set", setting)]
    result = CliRunner().invoke(
        app, [*map(str, words), "--images", str(world.scenes / "images"), *settings], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert read_model_folder(tmp_path / "run").extractor == SMALL


def test_the_recipe_is_shown_with_its_extractor() -> None:
    result = CliRunner().invoke(
        app, ["recipes", "show", "vlbert-base-e2e", "--no-estimate", "--json"], catch_exceptions=False
    )
    shown = json.loads(result.stdout)["pretrain"]
    assert shown["extractor"]["blocks"] == [3, 4, 23]
    assert shown["extractor"]["frozen_stages"] == 2
    assert shown["flip"] == 0.5
    assert "missing" not in shown


@pytest.mark.slow
def test_two_processes_train_one_extractor(world: Any, tmp_path: Path) -> None:
    settings = [part for setting in (*E2E, "batch_size=2") for part in ("--set", setting)]
    command = [
        sys.executable, "-m", "visling", "pretrain", "--recipe", "vlbert-scenes", "--data", str(world.scenes),
        "--store", str(world.regions), "--images", str(world.scenes), "--out", str(tmp_path / "two"), "--device", "cpu",
        "--threads", "1", "--processes", "2", *settings,
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    weights, run = read_model_folder(tmp_path / "two").weights, end_to_end()
    runtime.seed_everything(run.train.seed)
    fresh = untrained_model(fit_to_store(run, NativeStore.open(world.regions))).state_dict()
    still = {name for name in fresh if name.startswith("extractor.") and torch.equal(fresh[name], weights[name])}
    assert still == {
        name
        for name in fresh
        if name.startswith(("extractor.stem", "extractor.stages.0")) or (".norm." in name and "extractor" in name)
    }
