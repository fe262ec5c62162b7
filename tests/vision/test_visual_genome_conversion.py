"""Released weights of the Visual Genome detector -> a detector's folder: files of every kind, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from visling.checkpoints import hub
from visling.cli import app
from visling.errors import CheckpointError, ConfigError, DataError
from visling.vision.detectors import load_detector
from visling.vision.visual_genome import VisualGenomeDetector
from visling.vision.visual_genome_config import VisualGenomeConfig, read_config
from visling.vision.visual_genome_conversion import convert_detector
from visling.vision.visual_genome_weights import KEYS, load_weights, unify

NAMES = tuple(map("class {}".format, range(5))), tuple(map("attribute {}".format, range(3)))

PORT: Mapping[str, Any] = {
    "anchor_generator": {"sizes": [[16, 32]], "aspect_ratios": [[0.5, 1.0, 2.0]], "offset": 0.0},
    "input": {"format": "BGR", "min_size_test": 64, "max_size_test": 100},
    "max_detections": 8,
    "min_detections": 4,
    "model": {"max_pool": True, "pixel_mean": [1.0, 2.0, 3.0], "pixel_std": [1.0, 1.0, 1.0]},
    "proposal_generator": {"hidden_channels": 6, "min_size": 0},
    "resnets": {"depth": 50, "stem_out_channels": 4, "res2_out_channels": 8, "width_per_group": 2, "num_groups": 1},
    "roi_box_head": {"attr": True, "num_attrs": 3, "res5halve": False, "bbox_reg_weights": [10.0, 10.0, 5.0, 5.0]},
    "roi_heads": {"num_classes": 5, "nms_thresh_test": [0.3, 0.5]},
    "rpn": {"nms_thresh": 0.7, "pre_nms_topk_test": 60, "post_nms_topk_test": 20},
}
"""A small configuration as the transformers port writes it."""


def random_detector(config: VisualGenomeConfig) -> VisualGenomeDetector:
    detector = VisualGenomeDetector(config).eval()
    for name, buffer in detector.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return detector


def released(detector: VisualGenomeDetector) -> dict[str, Tensor]:
    """Its weights as the transformers port stores them."""
    return KEYS.invert({f"detector.{name}": value for name, value in detector.state_dict().items()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights, configuration and names in the layout of the released repository."""
    target = tmp_path / "released"
    target.mkdir()
    (target / "config.yaml").write_text(yaml.safe_dump(dict(PORT)))
    (target / "objects_vocab.txt").write_text("\n".join(f"{name},synonym" for name in NAMES[0]))
    (target / "attributes_vocab.txt").write_text("\n".join(NAMES[1]))
    config = read_config(target / "config.yaml", *NAMES).config
    torch.save(released(random_detector(config)), target / "pytorch_model.bin")
    return target


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / "pytorch_model.bin", weights_only=True))


def loaded(folder: Path) -> dict[str, Tensor]:
    return dict(load_detector(folder).state_dict())


def test_a_folder_of_the_released_layout(folder: Path, tmp_path: Path) -> None:
    made = convert_detector(folder, tmp_path / "out")
    weights = weights_of(folder)
    assert len(made.coverage.mapped) == len(weights)
    assert made.coverage.complete
    detector = load_detector(tmp_path / "out")
    assert isinstance(detector, VisualGenomeDetector)
    assert detector.fingerprint == made.fingerprint
    assert (detector.class_names, detector.attribute_names) == NAMES
    assert detector.config.pixel_mean == (1.0, 2.0, 3.0)
    assert made.unsaid == ("pool_size", "class_specific_boxes", "proposal_box_scale", "min_confidence")
    assert made.ignored == ()
    stored = released(detector)
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)


def as_torch(weights: Mapping[str, Tensor], file: Path) -> None:
    torch.save({"model": dict(weights), "iteration": 7}, file)


def as_old_torch(weights: Mapping[str, Tensor], file: Path) -> None:
    torch.save(dict(weights), file, _use_new_zipfile_serialization=False)


def as_safetensors(weights: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: value.contiguous() for name, value in weights.items()}, file)


def as_detectron2(weights: Mapping[str, Tensor], file: Path) -> None:
    arrays = {name: value.numpy() for name, value in weights.items()}
    file.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}, protocol=2))


@pytest.mark.parametrize(
    ("suffix", "write"),
    [(".pth", as_torch), (".bin", as_old_torch), (".safetensors", as_safetensors), (".pkl", as_detectron2)],
)
def test_a_weight_file_of_every_kind(
    folder: Path, tmp_path: Path, suffix: str, write: Callable[[Mapping[str, Tensor], Path], None]
) -> None:
    weights = {name: value for name, value in weights_of(folder).items() if not name.endswith("num_batches_tracked")}
    write(weights, tmp_path / f"weights{suffix}")
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(dict(PORT)))
    made = convert_detector(
        tmp_path / f"weights{suffix}",
        tmp_path / "out",
        config=tmp_path / "plain.yaml",
        classes=folder / "objects_vocab.txt",
        attributes=folder / "attributes_vocab.txt",
    )
    assert set(made.coverage.fresh.values()) == {"frozen norms lack this counter in many files; nothing reads it"}
    convert_detector(folder, tmp_path / "same")
    expected = loaded(tmp_path / "same")
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected if "num_batches" not in name)
    assert made.fingerprint == load_detector(tmp_path / "same").fingerprint


def test_half_precision_files_are_read_in_full(folder: Path, tmp_path: Path) -> None:
    weights = {name: value.half() if value.is_floating_point() else value for name, value in weights_of(folder).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    convert_detector(folder, tmp_path / "out")
    state = loaded(tmp_path / "out")
    assert state["stem.convolution.weight"].dtype == torch.float32
    assert torch.equal(state["stem.convolution.weight"].half(), weights["backbone.stem.conv1.weight"])


def caffe_weights(detector: VisualGenomeDetector, background: Tensor) -> dict[str, Tensor]:
    """Its weights as MILVLG's port stores them; `background` are the logits' weights that the difference hides."""
    weights = {name: value for name, value in released(detector).items() if "num_batches" not in name}
    head, predictor = "proposal_generator.rpn_head.objectness_logits", "roi_heads.box_predictor"
    for name in ("weight", "bias"):
        one = weights[f"{head}.{name}"]
        shift = background.reshape(-1, *[1] * (one.dim() - 1)).expand_as(one)
        weights[f"{head}.{name}"] = torch.cat([shift, one + shift])
        refine = weights[f"{predictor}.bbox_pred.{name}"]
        weights[f"{predictor}.bbox_pred.{name}"] = torch.cat([torch.full_like(refine[:4], 9.0), refine])
    for ours, theirs in (("cls_score", "cls_score"), ("cls_embedding", "cls_embed"), ("attr_score", "attr_linear2")):
        for name in ("weight", "bias"):
            if (value := weights.pop(f"{predictor}.{ours}.{name}", None)) is not None:
                weights[f"{predictor}.{theirs}.{name}"] = torch.cat([value[-1:], value[:-1]])
    for name in ("weight", "bias"):
        weights[f"{predictor}.attr_linear1.{name}"] = weights.pop(f"{predictor}.fc_attr.{name}")
    return weights


CAFFE: Mapping[str, Any] = {
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedBUARCNN",
        "PIXEL_MEAN": [1.0, 2.0, 3.0],
        "ANCHOR_GENERATOR": {"SIZES": [[1, 2]]},
        "PROPOSAL_GENERATOR": {"NAME": "BUARPN", "MIN_SIZE": 16},
        "BUA": {
            "ATTRIBUTE_ON": True,
            "RPN": {"CONV_OUT_CHANNELS": 6},
            "ATTRIBUTE": {"NUM_CLASSES": 4},
            "EXTRACTOR": {"MIN_BOXES": 2, "MAX_BOXES": 9},
        },
        "RESNETS": {
            "DEPTH": 50, "OUT_FEATURES": ["res4"], "NORM": "BN", "RES5_DILATION": 2, "STEM_OUT_CHANNELS": 4,
            "RES2_OUT_CHANNELS": 8, "WIDTH_PER_GROUP": 2,
        },
        "RPN": {"PRE_NMS_TOPK_TEST": 60, "POST_NMS_TOPK_TEST": 20},
        "ROI_HEADS": {"NUM_CLASSES": 6, "NMS_THRESH_TEST": 0.3},
        "ROI_BOX_HEAD": {"POOLER_TYPE": "ROIPool", "BBOX_REG_WEIGHTS": "(1.0, 1.0, 1.0, 1.0)"},
    },
    "INPUT": {"MIN_SIZE_TEST": 60, "MAX_SIZE_TEST": 90},
}  # fmt: skip
"""A small configuration as MILVLG's port writes it."""


def test_the_configuration_and_weights_of_milvlgs_port(folder: Path, tmp_path: Path) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(CAFFE)))
    config = read_config(folder / "config.yaml", *NAMES).config
    assert (config.selection, config.boxes, config.inclusive_boxes) == ("original", "proposals", True)
    assert (config.min_regions, config.max_regions, config.min_side) == (2, 9, 16.0)
    assert (config.anchor_sizes, config.box_scale) == ((16.0, 32.0), (1.0, 1.0, 1.0, 1.0))
    assert config.dilated_head
    detector = random_detector(config)
    theirs = caffe_weights(detector, torch.randn(len(detector.base_anchors)))
    torch.save({"model": theirs}, folder / "pytorch_model.bin")
    made = convert_detector(folder, tmp_path / "out")
    found, expected = loaded(tmp_path / "out"), dict(detector.state_dict())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert made.config == config


def test_a_file_in_caffes_conventions_without_configuration_is_read_as_the_original(tmp_path: Path) -> None:
    detector = VisualGenomeDetector(VisualGenomeConfig(class_names=NAMES[0], attribute_names=NAMES[1], depth=50))
    weights = caffe_weights(detector, torch.zeros(12))
    unified = unify(weights)
    assert unified.keys() == {name for name in released(detector) if "num_batches" not in name}
    torch.save(weights, tmp_path / "bua.pth")
    for name, names in zip(("objects", "attributes"), NAMES, strict=True):
        (tmp_path / name).write_text("\n".join(names))
    made = convert_detector(
        tmp_path / "bua.pth", tmp_path / "out", classes=tmp_path / "objects", attributes=tmp_path / "attributes",
        settings=["depth=50"], regions=(5, 50),
    )  # fmt: skip
    assert (made.config.selection, made.config.short_side) == ("original", 600)
    assert (made.config.min_regions, made.config.max_regions) == (5, 50)
    assert made.config.box_scale == (1.0, 1.0, 1.0, 1.0)


def test_a_selection_brings_all_that_belongs_to_it(folder: Path, tmp_path: Path) -> None:
    made = convert_detector(folder, tmp_path / "original", selection="original", regions=(3, 7))
    original = made.config
    assert (original.resize, original.boxes, original.filter_first) == ("factor", "proposals", True)
    assert (original.short_side, original.long_side, original.proposals) == (600, 1000, 300)
    assert (original.min_regions, original.max_regions) == (3, 7)
    assert original.box_scale == (10.0, 10.0, 5.0, 5.0), "that of the weights, not of the selection"
    assert (
        convert_detector(folder, tmp_path / "port", selection="port").config
        == read_config(folder / "config.yaml", *NAMES).config
    )
    other = convert_detector(folder, tmp_path / "rgb", settings=iter(["channel_order=RGB"])).config
    assert other.channel_order == "RGB"


def test_detectron2s_names_and_bases(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("MODEL: {RPN: {POST_NMS_TOPK_TEST: 1000, PRE_NMS_TOPK_TEST: 50}}\n")
    (tmp_path / "config.yaml").write_text(
        '_BASE_: "base.yaml"\n'
        "MODEL:\n  CAFFE_MAXPOOL: false\n  PROPOSAL_GENERATOR: {HID_CHANNELS: -1}\n  RPN: {POST_NMS_TOPK_TEST: 40}\n"
        "  ROI_BOX_HEAD: {RES5HALVE: true, POOLER_TYPE: ROIPool}\n"
        "  ROI_HEADS: {NMS_THRESH_TEST: 0.5, NUM_CLASSES: 5}\n"
        "SOLVER: {STEPS: !!python/tuple [210000, 250000]}\n"
    )
    read = read_config(tmp_path / "config.yaml", *NAMES)
    assert (read.config.candidates, read.config.proposals, read.config.thresholds) == (50, 40, (0.5,))
    assert (read.config.caffe_pool, read.config.dilated_head, read.config.proposal_size) == (False, False, 1024)
    assert read.ignored == ("solver.steps",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resnets": {"num_groups": 32}}, "another network: resnets.num_groups is 32, expected 1"),
        ({"resnets": {"stride_in_1x1": False}}, "resnets.stride_in_1x1 is False"),
        ({"resnets": {"res2_out_channels": 12, "width_per_group": 2}}, "res2_out_channels is 12, expected 4 x"),
        ({"resnets": {"depth": 34}}, "depth is 34; expected one of 50, 101, 152"),
        ({"size_divisibility": 32}, "size_divisibility is 32"),
        ({"roi_heads": {"num_classes": 80}}, "roi_heads.num_classes is 80, but the vocabulary makes it 5"),
        ({"roi_box_head": {"attr": False}}, "no attribute head, but 3 attribute names"),
        ({"roi_box_head": {"bbox_reg_weights": [10.0, 10.0]}}, "box_scale has 2 numbers; expected 4"),
        ({"input": {"format": "YUV"}}, "input.format is 'YUV'"),
        ({"input": {"min_size_test": "big"}}, "cannot be read as short_side"),
        ({"model": {"max_pool": True, "caffe_maxpool": False}}, "contradicts itself"),
        ({"max_detections": 500, "rpn": {"post_nms_topk_test": 20}}, "max_regions is 500; expected 1 to 20"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(ConfigError) as refusal:
        read_config(tmp_path / "config.yaml", *NAMES)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [1", "not a configuration in YAML"), ("- 1", "holds a list"), ("", "holds a NoneType"),
     ("x: !!python/object/apply:os.system ['true']", "not a configuration in YAML")],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(folder: Path, tmp_path: Path, content: str, words: str) -> None:
    (folder / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        convert_detector(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return exec, ("raise SystemExit('code of the file was run')",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_asks_for_code_is_refused(folder: Path, tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps({"model": {"weight": np.zeros(3)}, "extra": Harmful()}, protocol=protocol)
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="without running code"):
        convert_detector(folder, tmp_path / "out")
    torch.save({"model": weights_of_nothing(), "extra": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="might run code"):
        convert_detector(folder, tmp_path / "out")


def weights_of_nothing() -> dict[str, Tensor]:
    return {"weight": torch.zeros(3)}


def test_a_damaged_weight_file_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    pickled = io.BytesIO()
    pickle.dump({"model": {"weight": np.zeros(1000)}}, pickled)
    for content in (whole[: len(whole) // 2], b"", b"<html>404</html>", pickled.getvalue()[:-200]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            convert_detector(folder, tmp_path / "out")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme", "no weights")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        convert_detector(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_size_or_without_a_key_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = weights_of(folder)
    lacking = {name: value for name, value in weights.items() if "res3.1.conv2.weight" not in name}
    torch.save(lacking, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"missing +1  detector\.stages\.1\.1\.convolve"):
        convert_detector(folder, tmp_path / "out")
    torch.save({**weights, "roi_heads.mask_head.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"unexpected +1  roi_heads\.mask_head"):
        convert_detector(folder, tmp_path / "out")
    torch.save({**weights, "backbone.stem.conv1.weight": torch.zeros(4, 3, 5, 5)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"shape differs +1  detector\.stem\.convolution\.weight \(4, 3, 5, 5\)"):
        convert_detector(folder, tmp_path / "out")
    torch.save({"bert.embeddings.weight": torch.zeros(2, 2)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no Faster R-CNN of detectron2's layout"):
        convert_detector(folder, tmp_path / "out")


def test_names_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "objects_vocab.txt").unlink()
    with pytest.raises(ConfigError, match="has 5 classes, but the release's list names 1600"):
        convert_detector(folder, tmp_path / "out")
    with pytest.raises(DataError, match="cannot read the names"):
        convert_detector(folder, tmp_path / "out", classes=tmp_path / "gone.txt")


def test_places_that_hold_no_weights_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert_detector(tmp_path / "gone", tmp_path / "out")
    convert_detector(folder, tmp_path / "made")
    with pytest.raises(CheckpointError, match="a model or a detector already"):
        convert_detector(tmp_path / "made", tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        convert_detector(folder, tmp_path / "made")
    (folder / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.yaml"):
        convert_detector(folder, tmp_path / "out")
    (folder / "pytorch_model.bin").rename(folder / "first.pth")
    (folder / "second.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 files \*\.pth"):
        convert_detector(folder, tmp_path / "out")


def test_a_name_on_the_hub_is_fetched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repository: str, **settings: Any) -> Path:
        asked.append((repository, settings["offline"]))
        return folder

    monkeypatch.setattr(hub, "fetch", fetch)
    convert_detector("unc-nlp/frcnn-vg-finetuned", tmp_path / "out", offline=True)
    assert asked == [("unc-nlp/frcnn-vg-finetuned", True)]
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.slow
def test_the_full_size_goes_there_and_back(golden: Path, tmp_path: Path) -> None:
    """Random weights under all names and shapes of the released file, in half precision."""
    shapes = json.loads((golden / "frcnn/manifest_full.json").read_text())
    weights = {
        name: torch.zeros(shape, dtype=torch.int64) if name.endswith("tracked") else torch.rand(shape).half() / 20
        for name, shape in shapes.items()
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.yaml").write_text(
        "roi_heads: {num_classes: 1600}\nroi_box_head: {attr: true, num_attrs: 400}\n"
    )
    made = convert_detector(tmp_path, tmp_path / "out", half=True)
    assert len(made.coverage.mapped) == 640
    detector = load_detector(tmp_path / "out")
    assert isinstance(detector, VisualGenomeDetector)
    assert (detector.class_names[0], detector.class_names[1599]) == ("yolk", "buoy")
    assert len(detector.attribute_names) == 400
    assert detector.fingerprint == made.fingerprint
    back = released(detector)
    assert all(torch.equal(back[name].to(value.dtype), value) for name, value in weights.items())
    assert load_weights(detector, weights).complete


def test_the_command_prints_what_became_of_every_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visling", "detect", "convert", *words])
        with pytest.raises(SystemExit) as ended:
            app.run()
        return int(ended.value.code or 0), *capsys.readouterr()

    status, out, _ = run(str(folder), "--selection", "original", "--regions", "3:7", "--out", str(tmp_path / "out"))
    assert status == 0
    assert re.search(r"mapped +\d{3}", out)
    assert re.search(r"regions +3 to 7\n", out)
    assert load_detector(tmp_path / "out").fingerprint in out
    status, out, _ = run(str(folder), "--half", "--json", "--out", str(tmp_path / "json"))
    assert status == 0
    assert json.loads(out)["coverage"]["missing"] == []
    status, out, error = run(str(folder), "--regions", "many", "--out", str(tmp_path / "other"))
    assert (status, out) == (2, "")
    assert "--regions many is not a number of regions" in error
