"""visling regions extract: region features of one's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from visling.cli.options import Device, Dtype, Json, Out, Precision, Resume
from visling.cli.printing import claim_store, progress_bar, show_with_unreadable
from visling.errors import ConfigError


def extract_regions(
    images: Annotated[list[Path], typer.Argument(help="Folders of images (searched recursively) or image files.")],
    detector: Annotated[Path, typer.Option(help="Folder of a trained detector.")],
    out: Out,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 32,
    device: Device = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Precision of the detector; fp32 features do not depend on the device.")
    ] = "fp32",
    dtype: Dtype = "float16",
    probs: Annotated[
        bool | None,
        typer.Option(
            "--probs/--no-probs",
            help="Keep class distributions (soft region losses need them). Default: up to 100 classes.",
        ),
    ] = None,
    boxes: Annotated[
        list[Path] | None,
        typer.Option(
            help="Take features at these boxes instead of detecting any: a COCO instances file, the refer API's, "
            "MAttNet's detections, or a folder of VCR's metadata. Images that it does not list are left out. May be "
            "repeated: the boxes of an image follow one another."
        ),
    ] = None,
    keep_detected: Annotated[
        bool, typer.Option("--keep-detected", help="Put the boxes of --boxes behind the detected regions.")
    ] = False,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Turn images into a store of region features. Unreadable images are listed at the end; they stop nothing.

    Example: visling regions extract scenes/images --detector detector --out regions
    """
    from visling import runtime
    from visling.data.annotations.boxes import join_boxes, read_boxes
    from visling.regions.writer import StoreWriter
    from visling.vision.detectors import load_detector
    from visling.vision.extract import extract, list_images

    if keep_detected and not boxes:
        raise ConfigError("--keep-detected says where the boxes of --boxes go: name their file too.")
    on = runtime.pick_device(device)
    model = load_detector(detector, device=on)
    files = list_images(images)
    given = join_boxes([read_boxes(path) for path in boxes]) if boxes else None
    settings: dict[str, Any] = {}
    if given is not None:
        settings = {
            "boxes": ", ".join(map(str, boxes or ())),
            "boxes_digest": given.fingerprint,
            "keep_detected": keep_detected,
        }
    resolved = runtime.resolve(precision, on)
    claim_store(out, resume)
    with (
        StoreWriter(
            out,
            feature_size=model.feature_size,
            fingerprint=model.fingerprint,
            class_names=model.class_names,
            attribute_names=model.attribute_names,
            dtype=dtype,
            settings={"detector": str(detector.resolve()), "precision": resolved, **model.store_settings, **settings},
            # The fingerprint says whether a detector that moved is the same, the digest whether boxes are.
            may_differ=("detector", "boxes"),
            resume=resume,
        ) as writer,
        progress_bar("Extracting") as step,
    ):
        report = extract(
            files, model, writer, batch_size=batch_size, precision=resolved, probs=probs, progress=step, boxes=given,
            keep_detected=keep_detected,
        )  # fmt: skip
    counts = {"images": report.done, "regions": report.regions, "found already": report.skipped_existing}
    if given is not None:
        counts |= {
            "images without annotation": report.unlisted,
            "boxes cut to their image": report.clipped,
            "boxes without area": report.empty,
        }
    show_with_unreadable(counts, report.unreadable, json_, f"Wrote {out}")
