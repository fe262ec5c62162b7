"""Regions of photographs with the Visual Genome detector: images a second, the share of time of each stage, memory.

    # The library alone:
    python benchmarks/extraction.py --out benchmarks/results
    # Against the public port, whose three files lie in a folder:
    python benchmarks/extraction.py --out benchmarks/results --port PORT

The port is the research project of transformers that released `unc-nlp/frcnn-vg-finetuned`: modeling_frcnn.py,
processing_image.py and utils.py of its folder `lxmert`, from its public repository. Both sides have the same random
weights at full size and read the same JPEG files, one at a time on a CPU; they must find the same regions first. They
take turns (A B A B ...). The library's side ends with a store on the disk, the port's with arrays in memory. Peak
memory is that of a new process for each side.

The port calls torchvision and OpenCV. Where they are not installed, it is given this library's own pooling and
suppression (which end as early as in the library, unlike torchvision's) and Pillow: its time in these stand-ins is
reported, and its rate if they took none.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml

# The script's folder is on the path: the benchmarks share how results are written.
from measuring import SEED, circumstances, load_averages, machine, resident, summary, versions, write_result
from PIL import Image
from torch import Tensor, nn

from visling import runtime
from visling.image_ids import from_file_name
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.vision import ops
from visling.vision.extract import Timings, extract
from visling.vision.image_files import find_images
from visling.vision.visual_genome import VisualGenomeDetector
from visling.vision.visual_genome_config import read_config
from visling.vision.visual_genome_weights import KEYS

PORT_FILES = ("modeling_frcnn.py", "processing_image.py", "utils.py")

FULL: Mapping[str, Any] = {
    "anchor_generator": {"aspect_ratios": [[0.5, 1.0, 2.0]], "sizes": [[64, 128, 256, 512]], "offset": 0.0},
    "backbone": {"freeze_at": 2},
    "input": {"format": "BGR", "min_size_test": 800, "max_size_test": 1333},
    "max_detections": 36,
    "min_detections": 36,
    "size_divisibility": 0,
    "pad_value": 0,
    "model": {
        "device": "cpu", "max_pool": True, "pixel_mean": [102.9801, 115.9465, 122.7717], "pixel_std": [1.0, 1.0, 1.0]
    },
    "proposal_generator": {"hidden_channels": 512, "min_size": 0},
    "resnets": {
        "depth": 101, "norm": "BN", "num_groups": 1, "out_features": ["res4"], "res2_out_channels": 256,
        "res5_dilation": 1, "stem_out_channels": 64, "stride_in_1x1": True, "width_per_group": 64,
    },
    "roi_box_head": {
        "attr": True, "bbox_reg_weights": [10.0, 10.0, 5.0, 5.0], "cls_agnostic_bbox_reg": False, "num_attrs": 400,
        "pooler_resolution": 14, "pooler_sampling_ratio": 0, "res5halve": False, "smooth_l1_beta": 0.0,
    },
    "roi_heads": {
        "in_features": ["res4"], "num_classes": 1600, "nms_thresh_test": [0.5, 0.6, 0.7, 0.8, 0.9],
        "positive_fraction": 0.25, "proposal_append_gt": True, "score_thresh_test": 0.2,
    },
    "rpn": {
        "batch_size_per_image": 256, "bbox_reg_weights": [1.0, 1.0, 1.0, 1.0], "boundary_thresh": -1,
        "in_features": ["res4"], "iou_labels": [0, -1, 1], "iou_thresholds": [0.3, 0.7], "loss_weight": 1.0,
        "nms_thresh": 0.7, "positive_fraction": 0.5, "post_nms_topk_test": 300, "post_nms_topk_train": 2000,
        "pre_nms_topk_test": 6000, "pre_nms_topk_train": 12000, "smooth_l1_beta": 0.0,
    },
}  # fmt: skip
"""Configuration of the released detector, in the port's names."""

TINY: Mapping[str, Any] = {
    "anchor_generator": {"sizes": [[16, 32, 64, 96]]},
    "input": {"min_size_test": 64, "max_size_test": 100},
    "proposal_generator": {"hidden_channels": 8},
    "resnets": {"depth": 50, "res2_out_channels": 8, "stem_out_channels": 4, "width_per_group": 2},
    "roi_box_head": {"num_attrs": 5},
    "roi_heads": {"num_classes": 7},
    "max_detections": 4,
    "min_detections": 4,
    "rpn": {"post_nms_topk_test": 20, "pre_nms_topk_test": 60},
}
"""What makes it small, for trials of this script."""

NOT_CLAIMED = (
    "Weights are random: no feature means anything, and suppression has other boxes to compare than with trained ones.",
    "Photographs are drawn, and stored as JPEG; reading from a slow disk or a network is not measured.",
    "Nothing is claimed about GPUs.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


class Stopwatch:
    """Seconds spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def configure(options: argparse.Namespace) -> dict[str, Any]:
    """The detector's configuration in the port's names."""
    small = TINY if options.size == "tiny" else {}
    return {
        name: {**value, **small.get(name, {})} if isinstance(value, dict) else small.get(name, value)
        for name, value in FULL.items()
    }


def draw_photographs(folder: Path, options: argparse.Namespace) -> list[Path]:
    """JPEG files of soft noise at two scales, every other one upright."""
    folder.mkdir()
    for number in range(options.images):
        rng = runtime.generator_for(SEED, number)
        size = (options.width, options.height) if number % 2 == 0 else (options.height, options.width)
        coarse, fine = (
            Image.fromarray(rng.integers(0, 256, (rows, rows, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
            for rows in (6, 40)
        )
        Image.blend(coarse, fine, 0.4).save(folder / f"{number:04d}.jpg", quality=90)
    return find_images(folder)


def build(options: argparse.Namespace, folder: Path) -> VisualGenomeDetector:
    """The library's detector with random weights."""
    content = configure(options)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    names = (
        tuple(f"{kind} {number}" for number in range(content[part][count]))
        for kind, part, count in (("class", "roi_heads", "num_classes"), ("attribute", "roi_box_head", "num_attrs"))
    )
    torch.manual_seed(SEED)
    # The port does not bring local files into the order of colours that its configuration names.
    return VisualGenomeDetector(read_config(file, *names, channel_order="RGB").config).eval()


class Ours:
    """Files to a store."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.detector, self.folder = build(options, folder), folder
        self.stores = 0

    def run(self, files: Sequence[Path]) -> tuple[Timings, NativeStore]:
        """Extract into a new store."""
        self.stores += 1
        path = self.folder / f"store-{self.stores}"
        with StoreWriter(path, feature_size=self.detector.feature_size, fingerprint="random") as writer:
            report = extract(files, self.detector, writer)
        if report.unreadable:
            raise SystemExit(f"unreadable: {report.unreadable}")
        return report.timings, NativeStore.open(path)


class Port:
    """Files to arrays, image by image, as the port's demonstrations do."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.stand_ins, self.preparing = Stopwatch(), Stopwatch()
        content = configure(options)
        with port_modules(options.port, self.stand_ins, content) as (modeling, processing, utils):
            config = utils.Config(_upper_pad(content))
            self.prepare = self.preparing.wrap(processing.Preprocess(config))
            self.model: nn.Module = modeling.GeneralizedRCNN(config).eval()
        self.most = content["max_detections"]
        ours = {f"detector.{name}": value for name, value in build(options, folder).state_dict().items()}
        self.model.load_state_dict(KEYS.invert(ours))

    def run(self, files: Sequence[Path]) -> dict[str, Mapping[str, Any]]:
        """Its outputs by image id."""
        found = {}
        for file in files:
            images, sizes, scales = self.prepare(str(file))
            found[from_file_name(file.name)] = self.model(
                images, sizes, scales_yx=scales, padding="max_detections", max_detections=self.most,
                return_tensors="np", location="cpu",
            )  # fmt: skip
        return found


def _upper_pad(content: Mapping[str, Any]) -> dict[str, Any]:
    """The port reads this one name in capitals only."""
    return {**{name: value for name, value in content.items() if name != "pad_value"}, "PAD_VALUE": 0}


@contextlib.contextmanager
def port_modules(folder: Path, watch: Stopwatch, content: Mapping[str, Any]) -> Iterator[list[ModuleType]]:
    """The port's modules, with stand-ins for packages that are missing; sys.modules is as before afterwards."""
    missing = [name for name in PORT_FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"{folder} lacks {', '.join(missing)}: copy them from the folder `lxmert` of "
            "https://github.com/huggingface/transformers-research-projects"
        )
    before = dict(sys.modules)
    stand_ins: dict[str, Callable[[], Mapping[str, Any]]] = {
        "transformers.image_utils": lambda: {"PILImageResampling": Image.Resampling},
        "huggingface_hub.utils": lambda: {"insecure_hashlib": None},
        "tqdm.auto": lambda: {"tqdm": None},
        "filelock": lambda: {"FileLock": None},
        "requests": dict,
        "wget": dict,
        "cv2": lambda: make_cv2(watch),
        "torchvision": lambda: make_torchvision(watch, content),
    }
    absent = [name for name in stand_ins if not can_import(name)]  # all before the first stand-in is there to be found
    for name in absent:
        add_module(name, stand_ins[name]())
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield [importlib.import_module(name.removesuffix(".py")) for name in PORT_FILES]
    finally:
        sys.path.pop(0)
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] not in ("transformers", "huggingface_hub"):
                del sys.modules[name]


def can_import(name: str) -> bool:
    """Whether a module is there."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def add_module(name: str, content: Mapping[str, Any]) -> None:
    """Put a module with this content, and the packages above it, into sys.modules."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(parts[end - 1]))
    vars(sys.modules[name]).update(content)


def make_torchvision(watch: Stopwatch, content: Mapping[str, Any]) -> dict[str, Any]:
    """Non-maximum suppression and region pooling by this library, as fast as in the library's own detector."""

    def nms(boxes: Tensor, scores: Tensor, threshold: float, most: int | None = None) -> Tensor:
        order = scores.sort(descending=True, stable=True)[1]
        return order[ops.suppress(boxes[order][None], threshold, most=most)[0]]

    def batched_nms(boxes: Tensor, scores: Tensor, levels: Tensor, threshold: float) -> Tensor:
        return nms(boxes, scores, threshold, content["rpn"]["post_nms_topk_test"])  # the detector has one level

    class RoIPool(nn.Module):
        def __init__(self, output_size: tuple[int, int], spatial_scale: float) -> None:
            super().__init__()
            self.output_size, self.scale = output_size[0], spatial_scale

        def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
            """(N, 5) image and corners."""
            pool: Callable[..., Tensor] = watch.wrap(ops.roi_pool)
            return pool(features, boxes[:, 1:], boxes[:, 0].long(), output_size=self.output_size, scale=self.scale)

    add_module("torchvision.ops", {"RoIPool": RoIPool})
    add_module("torchvision.ops.boxes", {"nms": watch.wrap(nms), "batched_nms": watch.wrap(batched_nms)})
    return {}


def make_cv2(watch: Stopwatch) -> dict[str, Any]:
    """Reading of images with Pillow, which decodes JPEG by the same library."""

    def imread(file: str) -> Any:
        return np.array(Image.open(file).convert("RGB"))[:, :, ::-1]

    return {
        "imread": watch.wrap(imread),
        "cvtColor": lambda image, code: np.ascontiguousarray(image[:, :, ::-1]),
        "COLOR_BGR2RGB": 4,
    }


def check_agreement(store: NativeStore, found: Mapping[str, Mapping[str, Any]], regions: int) -> float:
    """Largest difference of features, relative to the largest feature, where both sides have found the same box;
    refuses to time sides of which more than one region in fifty differs."""
    worst, differing = 0.0, 0
    for image_id, theirs in found.items():
        ours = store[image_id]
        count = int(theirs["preds_per_image"][0])
        if len(ours) != count or count != regions:
            raise SystemExit(f"image {image_id}: {len(ours)} regions, the port has {count}, {regions} are expected")
        boxes, features = theirs["boxes"][0], theirs["roi_features"][0]
        apart = np.abs(ours.boxes[:, None] - boxes[None]).max(-1)  # (R, R)
        same = apart.min(1) < 0.5
        differing += int((~same).sum())
        gap = np.abs(ours.features.astype(np.float32) - features[apart.argmin(1)])[same].max(initial=0.0)
        worst = max(worst, float(gap / np.abs(features).max()))
    if differing * 50 > regions * len(found) or worst > 0.01:
        raise SystemExit(f"the sides differ: {differing} boxes, features by {worst:.1%} of the largest")
    return worst


def peak_memory(side: str, options: argparse.Namespace, files: Sequence[Path]) -> float | None:
    """MiB of this process at its peak, after extracting two images."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        (Ours if side == "visling" else Port)(options, Path(folder)).run(files[:2])
    return resident("VmHWM")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of both sides, in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = draw_photographs(folder / "photographs", options)
        ours = Ours(options, folder)
        port = Port(options, folder) if options.port else None
        _, store = ours.run(files[:2])  # also the warm-up
        regions = ours.detector.config.max_regions
        agreement = check_agreement(store, port.run(files[:2]), regions) if port else None
        timings: list[Timings] = []
        theirs: list[dict[str, float]] = []
        for _ in range(options.repeats):
            timings.append(ours.run(files)[0])
            if port is not None:
                port.stand_ins.seconds = port.preparing.seconds = 0.0
                start = time.perf_counter()
                port.run(files)
                seconds = time.perf_counter() - start
                theirs.append(
                    {"seconds": seconds, "stand_ins": port.stand_ins.seconds, "preparing": port.preparing.seconds}
                )
        context = multiprocessing.get_context("spawn")
        memory = {}
        for side in ("visling", "port") if port else ("visling",):
            with context.Pool(1, maxtasksperchild=1) as pool:
                memory[side] = pool.apply(peak_memory, (side, options, files))
    stages = {
        name: summary([getattr(one, name) / one.total for one in timings])
        for name in ("waiting", "network", "writing", "reading", "scaling")
    }
    result: dict[str, Any] = {
        "images_per_second": {"visling": summary([len(files) / one.elapsed for one in timings])},
        "visling_share_of_time": stages,
        "peak_memory_mib": memory,
    }
    if port is not None:
        rates = result["images_per_second"]
        rates["port"] = summary([len(files) / one["seconds"] for one in theirs])
        rates["port, stand-ins taken off"] = summary(
            [len(files) / (one["seconds"] - one["stand_ins"]) for one in theirs]
        )
        result["ratio"] = summary([b["seconds"] / a.elapsed for a, b in zip(timings, theirs, strict=True)])
        result["port_share_of_time"] = {
            name: summary([one[name] / one["seconds"] for one in theirs]) for name in ("preparing", "stand_ins")
        }
        result["largest_difference_of_features"] = agreement
        result["stand_ins"] = [name for name in ("torchvision", "cv2") if not can_import(name)]
    return result


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""

    def say(found: Mapping[str, Any], form: str = ".3f") -> str:
        return f"{found['median']:{form}} ({found['quartiles'][0]:{form}} to {found['quartiles'][1]:{form}})"

    def lines() -> Iterator[str]:
        sizes = result["settings"]
        yield f"# Extraction with the Visual Genome detector, {result['date']}"
        yield ""
        yield (
            f"Random weights ({sizes['size']} size), {sizes['images']} JPEG files of {sizes['width']} x "
            f"{sizes['height']}, float32, {sizes['threads']} threads, {sizes['repeats']} rounds in turn; median "
            "(quartiles)."
        )
        yield ""
        yield "| | images a second |"
        yield "|---|---|"
        for side, rate in result["images_per_second"].items():
            yield f"| {side} | {say(rate)} |"
        yield ""
        if "ratio" in result:
            yield (
                f"visling is {say(result['ratio'], '.2f')} times as fast as the port, round by round. Both find the "
                f"same regions; features differ by {result['largest_difference_of_features']:.1e} of the largest. "
                f"Stand-ins for packages that are not installed: {', '.join(result['stand_ins']) or 'none'}."
            )
            yield ""
        yield "| share of time | |"
        yield "|---|---|"
        named = {
            "waiting": "waiting for images", "network": "detector", "writing": "writing the store",
            "reading": "reading, in background threads", "scaling": "scaling, in background threads",
        }  # fmt: skip
        for name, share in result["visling_share_of_time"].items():
            yield f"| visling: {named[name]} | {say(share, '.1%')} |"
        theirs = {"preparing": "reading and scaling", "stand_ins": "stand-ins: suppression, pooling, decoding"}
        for name, share in result.get("port_share_of_time", {}).items():
            yield f"| port: {theirs[name]} | {say(share, '.1%')} |"
        yield ""
        for side, peak in result["peak_memory_mib"].items():
            if peak is not None:
                yield f"Peak memory of a process, {side}: {peak:,.0f} MiB."
        yield ""
        yield from circumstances(result)

    return "\n".join(lines()) + "\n"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the extraction of regions with the Visual Genome detector.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--port", type=Path, metavar="DIR", help="folder with the port's files; left out if missing")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of the detector")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--width", type=int, default=640, help="of the photographs, in pixels")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the result."""
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    before = load_averages()
    found = measure(options)
    date = datetime.date.today().isoformat()
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "port")}
    result = {
        "benchmark": "extraction",
        "date": date,
        "machine": machine(torch.device("cpu")),
        "versions": versions("visling", "torch", "numpy", "pillow"),
        "settings": {**settings, "seed": SEED},
        **found,
        "load_before": before,
        "load_after": load_averages(),
        "not_claimed": NOT_CLAIMED,
    }
    against = "port" if options.port else "alone"
    written = write_result(
        options.out, f"extraction_{date}_{options.size}_{against}_cpu_{options.threads}-threads", result,
        as_markdown(result),
    )  # fmt: skip
    print(written.read_text(encoding="utf-8"))
    print(f"Wrote {written}")


if __name__ == "__main__":
    main()
