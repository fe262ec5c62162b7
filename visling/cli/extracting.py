"""visling regions extract: region features of one's own images."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from visling.cli.options import IMAGES, MACHINE, Device, Dtype, Json, Out, Precision, Resume, Threads
from visling.cli.printing import claim_store, download_bar, progress_bar, show_with_unreadable
from visling.errors import ConfigError

if TYPE_CHECKING:
    from visling.vision.extract import ExtractionReport, Timings

_MANY_EMPTY = 0.1
"""Share of images without regions from which on a warning says so."""


def extract_regions(
    detector: Annotated[Path, typer.Option(help="Folder of a detector, or its name in `visling catalog`.")],
    out: Out,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders of images (searched recursively), image files, zip archives (read in place), quoted patterns "
            "such as 'photos/**/*.jpg', and @LIST for a list."
        ),
    ] = None,
    lists: Annotated[
        list[Path] | None,
        typer.Option("--list", metavar="FILE", help="A list: one image path in each line. May be repeated."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder that the lines of lists are relative to; the list's own by default."),
    ] = None,
    ids: Annotated[
        Literal["name", "path"],
        typer.Option(
            help="What regions are stored under: the file name without suffix, or the path below the folder, archive "
            "or list that is named, for images of the same name in several folders."
        ),
    ] = "name",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images per step. Default: up to 32, fewer of large ones.", rich_help_panel=MACHINE),
    ] = None,
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
            "repeated: the boxes of an image follow one another.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    keep_detected: Annotated[
        bool,
        typer.Option(
            "--keep-detected", help="Put the boxes of --boxes behind the detected regions.", rich_help_panel=IMAGES
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Threads that read and scale images. Default: 2 on a CPU, up to 8 with a GPU.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    threads: Threads = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes that share the images, one device each; torchrun starts them on several machines.",
            rich_help_panel=MACHINE,
        ),
    ] = 1,
    part: Annotated[
        str,
        typer.Option(
            metavar="K/N",
            help="Extract only the K-th of N shares, for machines that know nothing of each other; `visling regions "
            "merge` joins their stores.",
            rich_help_panel=MACHINE,
        ),
    ] = "1/1",
    timings: Annotated[
        bool, typer.Option("--timings", help="Say where the time went.", rich_help_panel=MACHINE)
    ] = False,
    min_regions: Annotated[
        int | None,
        typer.Option(
            min=0, help="Keep the best boxes below the detector's confidence threshold, too, until there are this many."
        ),
    ] = None,
    max_regions: Annotated[int | None, typer.Option(min=1, help="Keep only this many of the best boxes.")] = None,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Turn images into a store of region features. Unreadable images are listed at the end and in OUT/unreadable.txt;
    they stop nothing.

    Example: visling regions extract scenes/images --detector detector --out regions

    Example: visling regions extract photos.zip '2019/**/*.jpg' --list more.txt --detector detector --out regions
    """
    from visling import runtime
    from visling.data.annotations.boxes import join_boxes, read_boxes
    from visling.pretrained.ready import is_detector_name, prepare_detector
    from visling.regions.files import DETECTOR
    from visling.runs.extraction import UNREADABLE, Target, extract_to_store, on_main
    from visling.vision.detectors import load_detector
    from visling.vision.image_files import list_images

    if keep_detected and not boxes:
        raise ConfigError("--keep-detected says where the boxes of --boxes go: name their file too.")
    share = _read_part(part)
    files = list_images(images or (), lists=lists or (), base=base, ids=ids)
    given = join_boxes([read_boxes(path) for path in boxes]) if boxes else None
    settings: dict[str, Any] = {} if ids == "name" else {"ids": ids}
    if given is not None:
        settings |= {
            "boxes": ", ".join(map(str, boxes or ())),
            "boxes_digest": given.fingerprint,
            "keep_detected": keep_detected,
        }
    if is_detector_name(detector):
        with download_bar() as show_download:
            detector = prepare_detector(str(detector), report=show_download)
    runtime.limit_threads(threads)
    with runtime.process_group(processes), contextlib.ExitStack() as stack:
        on = runtime.pick_device(device)
        model = load_detector(detector, device=on)
        if given is not None:
            model.check_given_boxes()
        limited = min_regions is not None or max_regions is not None
        if limited:
            model.limit_regions(min_regions, max_regions)
            # Other limits make other features: what is kept with a model must be the detector that has them.
            detector = out / DETECTOR
        resolved = runtime.resolve(precision, on)
        on_main(lambda: claim_store(out, resume))
        title = "Extracting" if runtime.world_size() == 1 else f"Extracting, share 1 of {runtime.world_size()}"
        report = extract_to_store(
            files,
            Target(
                path=out,
                detector=model,
                dtype=dtype,
                settings={"detector": str(detector.resolve()), "precision": resolved, **settings},
                # The fingerprint says whether a detector that moved is the same, the digest whether boxes are.
                may_differ=("detector", "boxes"),
            ),
            part=share,
            boxes=given,
            progress=stack.enter_context(progress_bar(title)) if runtime.is_main() else None,
            keep_detected=keep_detected,
            batch_size=batch_size,
            precision=resolved,
            probs=probs,
            workers=workers,
        )
        if limited:
            on_main(lambda: model.save(detector))
        if not runtime.is_main():
            return
    counts = _count(report)
    if given is not None:
        counts |= {
            "images without annotation": report.unlisted,
            "boxes cut to their image": report.clipped,
            "boxes without area": report.empty,
        }
    else:
        counts["images without regions"] = report.without_regions
    if timings:
        counts |= _describe_timings(report.timings, report.done)
    title = f"Wrote {out}"
    if report.unreadable:
        title += f"; the images that cannot be read are listed in {out / UNREADABLE}"
    show_with_unreadable(counts, report.unreadable, json_, title)
    if given is None and report.without_regions >= _MANY_EMPTY * max(report.done, 1):
        _warn_of_empty(report.without_regions, report.done)


def _warn_of_empty(empty: int, images: int) -> None:
    """Say that many images have no region. It is no error, since the images may show nothing that the detector knows,
    and a store of them is whole; training refuses one without any region."""
    every = "ANY of the" if empty == images else f"{empty} of the"
    print(
        f"warning: the detector found nothing in {every} {images} images ({empty / images:.0%}); a model sees these as "
        "blank. --min-regions 10 keeps the best boxes below its threshold. Or train it longer or on more boxes, or "
        "take a detector or features made for such images (docs/detectors/own.md).",
        file=sys.stderr,
    )


def _count(report: ExtractionReport) -> dict[str, Any]:
    counts = {"images": report.done, "regions": report.regions, "found already": report.skipped_existing}
    if report.first_of_several:
        counts["of several frames or pages, the first one taken"] = report.first_of_several
    return counts


def _describe_timings(timings: Timings, images: int) -> dict[str, Any]:
    """Images per second, and the share of time of each stage."""
    total = max(timings.total, 1e-9)
    stages = {"waiting for images": timings.waiting, "detector": timings.network, "writing": timings.writing}
    return {
        "seconds": round(timings.elapsed, 2),
        "images per second": round(images / max(timings.elapsed, 1e-9), 2),
        **{f"share of time, {stage}": f"{seconds / total:.1%}" for stage, seconds in stages.items()},
        "seconds of the threads, reading": round(timings.reading, 2),
        "seconds of the threads, scaling": round(timings.scaling, 2),
    }


def _read_part(text: str) -> tuple[int, int]:
    """K and N of K/N.

    Raises:
        ConfigError: it is not of this form, or K is not from 1 to N.
    """
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise ConfigError(f"--part {text!r} must be K/N with K from 1 to N, such as 2/4 for the second of four shares.")
