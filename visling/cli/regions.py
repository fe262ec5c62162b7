"""visling regions: extract, convert and inspect region features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visling.cli.extracting import extract_regions
from visling.cli.options import Command, Dtype, Group, Json, Out, Resume
from visling.cli.printing import claim_store, progress_bar, refuse_existing, show
from visling.cli.region_stores import check_store, merge_stores, take_subset

if TYPE_CHECKING:
    from visling.regions.store import NativeStore

regions_app = typer.Typer(cls=Group, no_args_is_help=True, help="Create and inspect stores of region features.")
regions_app.command("extract", cls=Command)(extract_regions)
regions_app.command("merge", cls=Command)(merge_stores)
regions_app.command("subset", cls=Command)(take_subset)
regions_app.command("check", cls=Command)(check_store)


@regions_app.command("convert", cls=Command)
def regions_convert(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="Released files of region features, such as LXMERT's obj36 TSV files, or folders of them; all of one "
            "layout.",
        ),
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
            help="Name of the features, by which models recognise those they were trained on. If left out, that of the "
            "features that were released in this layout with this width and these numbers of regions, such as "
            "bottom-up-36; else the layout's name."
        ),
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Names of the object classes, one per line.")] = None,
    attributes: Annotated[Path | None, typer.Option(help="Names of the attributes, one per line.")] = None,
    dtype: Dtype = "float16",
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Turn released files of region features into a store, whatever their size. If an image occurs twice, its first
    entry counts.

    Example: visling regions convert train2014_obj36.tsv val2014_obj36.tsv --classes objects_vocab.txt --out regions
    """
    from visling.names import read_names
    from visling.regions.formats import open_sources
    from visling.regions.formats.base import convert_regions
    from visling.regions.rows import OPTIONAL
    from visling.regions.store import NativeStore

    class_names, attribute_names = (() if names is None else read_names(names) for names in (classes, attributes))
    readers, left_out = open_sources(sources, layout)
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
    store, first = NativeStore.open(out), readers[0]
    lacking = [name for name in OPTIONAL if name not in store.fields]
    summary: dict[str, Any] = {
        "files": len(readers),
        "layout": first.layout,
        "features": store.fingerprint,
        "images": report.images,
        "regions": report.regions,
        "found already": report.existing,
        "repeated entries": report.repeated,
        "boxes cut to their image": report.clipped,
        **_describe_counts(store),
        "feature width": store.feature_size,
        "fields": list(store.fields),
        "missing": lacking,
        "boxes": first.has_boxes,
        "image sizes": first.has_sizes,
        "notes": list(first.notes),
        "left out": [str(path) for path in left_out],
    }
    if not json_:
        summary |= {name: ", ".join(value) or None for name, value in summary.items() if isinstance(value, list)}
        summary["boxes"] = "in the files" if first.has_boxes else "not in this layout: every region is the whole image"
        summary["image sizes"] = "in the files" if first.has_sizes else "not in this layout"
    show(summary, json_, f"Wrote {out}")


def _describe_counts(store: NativeStore) -> dict[str, Any]:
    """How many regions the images of a store have."""
    counts = store.counts
    fewest, most, mean = (counts.min(), counts.max(), counts.mean()) if len(counts) else (0, 0, 0.0)
    return {
        "regions per image": f"{fewest} to {most}, mean {mean:.1f}",
        "images without regions": int((counts == 0).sum()),
    }


@regions_app.command("inspect", cls=Command)
def regions_inspect(
    store: Annotated[Path, typer.Argument(help="Region store.")],
    image: Annotated[Path | None, typer.Option(help="Draw this image with its boxes.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to draw it to; NAME-regions.png in the working folder if left out.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show what a region store holds; draw an image with its boxes.

    Example: visling regions inspect regions --image scenes/images/test/scene_000000002251.png
    """
    from PIL import Image

    from visling.analysis.drawing import draw_regions, save_picture
    from visling.regions.store import NativeStore
    from visling.vision.images import read_image

    regions = NativeStore.open(store)
    named = {"classes": regions.class_names, "attributes": regions.attribute_names}
    described = {
        "images": len(regions),
        "regions": int(regions.counts.sum()),
        **_describe_counts(regions),
        "feature width": regions.feature_size,
        "fingerprint": regions.fingerprint,
        **{what: len(names) if names or json_ else "no names" for what, names in named.items()},
        "first ids": ", ".join(regions.ids[:3]),
        **{f"setting {name}": value for name, value in regions.settings.items()},
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
