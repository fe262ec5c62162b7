"""Fixtures of all tests: one thread, fixed seeds, the folder of recorded values, a tiny world to train in."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

# Spinning OpenMP threads starve their neighbours on a shared machine; torch reads these when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from visling import config as configs
from visling import runtime
from visling.recipes.detectors import detect_config
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.regions.writer import StoreWriter
from visling.runs import detect as detection
from visling.runs import finetune as finetuning
from visling.runs import pretrain as pretraining
from visling.scenes import ScenesConfig, write_scenes
from visling.vision.detector import Detector
from visling.vision.extract import extract
from visling.vision.image_files import find_images

pytest_plugins = ["fixtures.corpora", "fixtures.file_server", "fixtures.published", "fixtures.released_files"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        metavar="DIR",
        help="folder of recorded values (default: tests/golden)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    runtime.seed_everything(0)


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """Folder with one sub-folder per recorded set."""
    folder: Path = request.config.getoption("--golden")
    if not folder.is_dir():
        pytest.fail(f"--golden {folder} is not a folder")
    return folder


@dataclass(frozen=True, kw_only=True)
class World:
    """A tiny data set and one of everything that is made of it. Tests read it; who writes, writes into a copy."""

    folder: Path
    scenes: Path
    """24 train, 3 val and 3 test scenes with questions and captions; panels with statements in `nlvr`."""
    detector: Path
    regions: Path
    other_detector: Path
    """Of the same width, trained from another seed."""
    other_regions: Path
    pretrained: Path
    """Run folder."""
    vqa: Path
    """Run folder of a model fine-tuned from `pretrained`; not evaluated."""
    settings: tuple[str, ...]
    """What makes a recipe tiny."""

    @property
    def nlvr(self) -> Path:
        """Panels and statements in NLVR's layout."""
        return self.scenes / "nlvr"

    def picture(self, split: str = "test") -> Path:
        """The first picture of a split."""
        return min((self.scenes / "images" / split).glob("*.png"))

    def annotations(self, target: Path) -> Path:
        """A copy of the scenes without any picture, to be changed."""
        shutil.copytree(self.scenes / "annotations", target / "annotations")
        return target


_TINY_DETECTOR = (
    "train.max_steps=4", "batch_size=4", "detector.long_side=64", "detector.channels=[8, 12]", "detector.blocks=[0, 0]",
    "detector.anchor_sizes=[12.0, 18.0]", "detector.proposal_size=8", "detector.pool_size=3",
    "detector.feature_size=16", "detector.min_regions=4", "detector.max_regions=8",
    "detector.proposals=12", "detector.candidates=32",
)  # fmt: skip
_TINY_RUN = (
    "encoder.hidden_size=16", "encoder.num_layers=1", "encoder.num_heads=2", "encoder.intermediate_size=32",
    "batch_size=8", "train.max_steps=4", "train.precision=fp32", "train.log_every=2", "train.validate_every=100",
)  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Scenes, a detector, regions, a pre-trained and a fine-tuned run: everything that recipes, api and command line
    work on."""
    folder = tmp_path_factory.mktemp("world")
    world = World(
        folder=folder,
        scenes=folder / "scenes",
        detector=folder / "detector",
        regions=folder / "regions",
        other_detector=folder / "other-detector",
        other_regions=folder / "other-regions",
        pretrained=folder / "pretrained",
        vqa=folder / "vqa",
        settings=_TINY_RUN,
    )
    write_scenes(world.scenes, ScenesConfig(images=30, panels=40, questions_per_image=4))
    for seed, (detector, regions) in enumerate(
        [(world.detector, world.regions), (world.other_detector, world.other_regions)]
    ):
        _train_and_extract(world.scenes, detector, regions, seed)
    pretraining.pretrain(
        configs.override(PRETRAINING["visualbert-scenes"](), world.settings),
        world.pretrained,
        data=[str(world.scenes)],
        store=world.regions,
        device="cpu",
    )
    finetuning.finetune(
        configs.override(FINETUNING["visualbert-vqa-scenes"](), world.settings),
        world.vqa,
        data=world.scenes,
        store=world.regions,
        init=world.pretrained,
        device="cpu",
    )
    return world


def _train_and_extract(scenes: Path, folder: Path, regions: Path, seed: int) -> None:
    config = detect_config([*_TINY_DETECTOR, f"train.seed={seed}"], "scenes")
    detection.train_detector(
        scenes / "images" / "train",
        scenes / "annotations" / "instances_train.json",
        folder,
        config,
        device="cpu",
    )
    detector = Detector.load(folder)
    with StoreWriter(
        regions,
        feature_size=detector.config.feature_size,
        fingerprint=detector.fingerprint,
        class_names=detector.config.class_names,
        attribute_names=detector.config.attribute_names,
        settings={"detector": str(folder)},
    ) as writer:
        extract(find_images(scenes), detector, writer)
