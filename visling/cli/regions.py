"""visling regions: extract, convert and inspect region features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visling.cli.extracting import extract_regions
from visling.cli.options import Command, Dtype, Group, Json, Out, Resume
from visling.cli.printing import claim_store, progress_bar, refuse_existing, save_picture, show

regions_app = typer.Typer(cls=Group, no_args_is_help=True, help="Create and inspect stores of region features.")
regions_app.command("extract", cls=Command)(extract_regions)


@regions_app.command("convert", cls=Command)
def regions_convert(
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

    Example: visling regions convert train2014_obj36.tsv val2014_obj36.tsv --classes objects_vocab.txt --out regions
    """
    from visling.names import read_names
    from visling.regions.formats import open_reader
    from visling.regions.formats.base import convert_regions

    class_names, attribute_names = (() if names is None else read_names(names) for names in (classes, attributes))
    readers = [open_reader(file, layout) for file in files]
    claim_store(out, resume)
    unit, shown = (10**6, "MB") if readers[0].unit == "bytes" else (1, readers[0].unit)
    with progress_bar(f"Converting, {shown}") as step:
        report = convert_regions(
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
            what: len(names) if names or json_ else f"no names; give --{what} to `regions convert`"
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
