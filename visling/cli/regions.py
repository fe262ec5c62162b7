"""visling regions: extract, import and inspect region features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from visling import runtime
from visling.cli.options import Device, Json, Out, Resume, parse_dtype, parse_precision
from visling.cli.printing import progress_bar, refuse_existing, save_picture, show, show_with_unreadable
from visling.errors import RunError

regions_app = typer.Typer(no_args_is_help=True, help="Make and look at stores of region features.")


@regions_app.command("extract")
def regions_extract(
    images: Annotated[list[Path], typer.Argument(help="Folders of images (searched recursively) or image files.")],
    detector: Annotated[Path, typer.Option(help="Folder of a trained detector.")],
    out: Out,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 32,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(help="Of the detector: fp32 or bf16; fp32 features do not depend on the device.")
    ] = "fp32",
    dtype: Annotated[
        str, typer.Option(help="How features are stored: float16, or float32 in twice the space.")
    ] = "float16",
    probs: Annotated[
        bool | None,
        typer.Option(
            "--probs/--no-probs",
            help="Keep class distributions (soft region losses need them). Default: up to 100 classes.",
        ),
    ] = None,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Turn images into a store of region features. Unreadable images are listed at the end, never a crash.

    Example: visling regions extract scenes/images --detector detector --out regions
    """
    from visling.regions.writer import StoreWriter
    from visling.vision.detector import Detector
    from visling.vision.extract import extract, list_images

    where = runtime.pick_device(device)
    model = Detector.load(detector, device=where)
    files = list_images(images)
    in_ = runtime.resolve(parse_precision(precision), where)
    claim_store(out, resume)
    with (
        StoreWriter(
            out,
            feature_size=model.config.feature_size,
            fingerprint=model.fingerprint,
            class_names=model.config.class_names,
            attribute_names=model.config.attribute_names,
            dtype=parse_dtype(dtype),
            settings={"detector": str(detector.resolve()), "precision": in_},
            may_differ=("detector",),  # the fingerprint says whether a detector that moved is the same
            resume=resume,
        ) as writer,
        progress_bar("Extracting") as step,
    ):
        report = extract(files, model, writer, batch_size=batch_size, precision=in_, probs=probs, progress=step)
    counts = {"images": report.done, "regions": report.regions, "found already": report.skipped_existing}
    show_with_unreadable(counts, report.unreadable, json_, f"Wrote {out}")


@regions_app.command("import")
def regions_import(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="TSV...", help="Files of LXMERT (obj36) or of bottom-up attention, unpacked."),
    ],
    out: Out,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="Name of the detector that made the features, if not the layout's own: models tell the features they know by it."
        ),
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Names of the object classes, one a line.")] = None,
    attributes: Annotated[Path | None, typer.Option(help="Names of the attributes, one a line.")] = None,
    dtype: Annotated[
        str, typer.Option(help="How features are stored: float16, or float32 in twice the space.")
    ] = "float16",
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Turn released files of region features into a store. Of an image that comes twice the first line counts.

    Example: visling regions import train2014_obj36.tsv val2014_obj36.tsv --classes objects_vocab.txt --attributes
    attributes_vocab.txt --out regions
    """
    from visling.regions.formats.tsv import import_regions, read_names

    class_names, attribute_names = (() if names is None else read_names(names) for names in (classes, attributes))
    claim_store(out, resume)
    with progress_bar("Importing, MB") as step:
        found = import_regions(
            files,
            out,
            fingerprint=fingerprint,
            class_names=class_names,
            attribute_names=attribute_names,
            dtype=parse_dtype(dtype),
            resume=resume,
            progress=lambda done, total: step(done // 10**6, total // 10**6),
        )
    counts = {
        "images": found.images,
        "regions": found.regions,
        "found already": found.existing,
        "repeated lines": found.repeated,
    }
    show(counts, json_, f"Wrote {out}")


@regions_app.command("inspect")
def regions_inspect(
    store: Annotated[Path, typer.Argument(help="Region store.")],
    image: Annotated[Path | None, typer.Option(help="Draw this image with its boxes.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to draw it; beside the command's working folder if left out.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read everything and compare the SHA-256 of every shard.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show what a region store holds, and draw an image with its boxes.

    Example: visling regions inspect regions --image scenes/images/test/scene_000000002251.png
    """
    from visling.analysis.drawing import draw_regions
    from visling.regions.store import NativeStore
    from visling.vision.images import read_image

    found = NativeStore.open(store)
    if check:
        found.check()
    counts = [found.count(image_id) for image_id in found.ids]
    described = {
        "images": len(found),
        "regions": sum(counts),
        "regions per image": f"{min(counts, default=0)} to {max(counts, default=0)}, mean {sum(counts) / max(len(counts), 1):.1f}",
        "images without regions": counts.count(0),
        "feature width": found.feature_size,
        "fingerprint": found.fingerprint,
        "classes": len(found.class_names),
        "attributes": len(found.attribute_names),
        "first ids": ", ".join(found.ids[:3]),
        **{f"setting {name}": value for name, value in found.settings.items()},
        **({"digests": "all match"} if check else {}),
    }
    if image is not None:
        target = out if out is not None else Path(f"{image.stem}-regions.png")
        refuse_existing(target)
        drawn = draw_regions(
            Image.fromarray(read_image(image)),
            found[image.stem],
            class_names=found.class_names,
            attribute_names=found.attribute_names,
        )
        save_picture(drawn, target)
        described["drawing"] = str(target)
    show(described, json_)


def claim_store(out: Path, resume: bool) -> None:
    """Refuse a place that is taken, or where no folder can be made, before regions are extracted into it."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; a region store needs a folder. Use another --out.")
    held = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    is_store = "manifest.json" in held or "journal.jsonl" in held
    if held and not (resume and is_store):
        mend = "add to it with --resume, " if is_store else ""
        raise RunError(
            f"{out} is not empty: it holds {', '.join(held[:5])}. Use another --out, {mend}or delete the folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error}. Use another --out.") from error
