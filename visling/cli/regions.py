"""visling regions: extract, import and inspect region features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from visling.cli.options import Command, Device, Dtype, Group, Json, Out, Precision, Resume
from visling.cli.printing import progress_bar, refuse_existing, save_picture, show, show_with_unreadable
from visling.errors import ConfigError, RunError

regions_app = typer.Typer(cls=Group, no_args_is_help=True, help="Create and inspect stores of region features.")


@regions_app.command("extract", cls=Command)
def regions_extract(
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
    from visling.vision.detector import Detector
    from visling.vision.extract import extract, list_images

    if keep_detected and not boxes:
        raise ConfigError("--keep-detected says where the boxes of --boxes go: name their file too.")
    on = runtime.pick_device(device)
    model = Detector.load(detector, device=on)
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
            feature_size=model.config.feature_size,
            fingerprint=model.fingerprint,
            class_names=model.config.class_names,
            attribute_names=model.config.attribute_names,
            dtype=dtype,
            settings={"detector": str(detector.resolve()), "precision": resolved, **settings},
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


@regions_app.command("import", cls=Command)
def regions_import(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Released files, such as LXMERT's obj36 TSV files, unpacked."),
    ],
    out: Out,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Layout of the files, or a module of your own that reads them (my_package.my_module); "
            "recognised by their content if left out."
        ),
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="Name of the detector that computed the features, by which models recognise features they were "
            "trained on; the layout's name if left out."
        ),
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Names of the object classes, one per line.")] = None,
    attributes: Annotated[Path | None, typer.Option(help="Names of the attributes, one per line.")] = None,
    dtype: Dtype = "float16",
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Turn released files of region features into a store. If an image occurs twice, its first entry counts.

    Example: visling regions import train2014_obj36.tsv val2014_obj36.tsv --classes objects_vocab.txt --out regions
    """
    from visling.regions.formats import open_reader
    from visling.regions.formats.base import import_regions, read_names

    class_names, attribute_names = (() if names is None else read_names(names) for names in (classes, attributes))
    readers = [open_reader(file, layout) for file in files]
    claim_store(out, resume)
    unit, shown = (10**6, "MB") if readers[0].unit == "bytes" else (1, readers[0].unit)
    with progress_bar(f"Importing, {shown}") as step:
        report = import_regions(
            readers,
            out,
            fingerprint=fingerprint,
            class_names=class_names,
            attribute_names=attribute_names,
            dtype=dtype,
            resume=resume,
            progress=lambda done, total: step(done // unit, total // unit),
        )
    counts = {
        "images": report.images,
        "regions": report.regions,
        "found already": report.existing,
        "repeated entries": report.repeated,
    }
    show(counts, json_, f"Wrote {out}")


@regions_app.command("inspect", cls=Command)
def regions_inspect(
    store: Annotated[Path, typer.Argument(help="Region store.")],
    image: Annotated[Path | None, typer.Option(help="Draw this image with its boxes.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to draw it to; NAME-regions.png in the working folder if left out.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read everything and compare the SHA-256 of every shard.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show what a region store holds; draw an image with its boxes.

    Example: visling regions inspect regions --image scenes/images/test/scene_000000002251.png
    """
    from PIL import Image

    from visling.analysis.drawing import draw_regions
    from visling.regions.store import NativeStore
    from visling.vision.images import read_image

    regions = NativeStore.open(store)
    if check:
        regions.check()
    named = {"classes": regions.class_names, "attributes": regions.attribute_names}
    counts = [regions.count(image_id) for image_id in regions.ids]
    mean = sum(counts) / max(len(counts), 1)
    described = {
        "images": len(regions),
        "regions": sum(counts),
        "regions per image": f"{min(counts, default=0)} to {max(counts, default=0)}, mean {mean:.1f}",
        "images without regions": counts.count(0),
        "feature width": regions.feature_size,
        "fingerprint": regions.fingerprint,
        **{
            what: len(names) if names or json_ else f"no names; give --{what} when importing"
            for what, names in named.items()
        },
        "first ids": ", ".join(regions.ids[:3]),
        **{f"setting {name}": value for name, value in regions.settings.items()},
        **({"digests": "all match"} if check else {}),
    }
    if image is not None:
        target = out if out is not None else Path(f"{image.stem}-regions.png")
        refuse_existing(target)
        drawn = draw_regions(
            Image.fromarray(read_image(image)),
            regions[image.stem],
            class_names=regions.class_names,
            attribute_names=regions.attribute_names,
        )
        save_picture(drawn, target)
        described["drawing"] = str(target)
    show(described, json_)


def claim_store(out: Path, resume: bool) -> None:
    """Refuse a folder that is taken or cannot be created, before regions are written into it."""
    from visling.regions.files import JOURNAL, MANIFEST

    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; a region store needs a folder. Use another --out.")
    held = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    is_store = MANIFEST in held or JOURNAL in held
    if held and not (resume and is_store):
        resuming = "add to it with --resume, " if is_store else ""
        raise RunError(
            f"{out} is not empty: it holds {', '.join(held[:5])}. Use another --out, {resuming}or delete the folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error}. Use another --out.") from error
