"""visling regions merge, subset and check: new stores from existing ones, and what is wrong with one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visling.cli.options import Json, Out, Resume
from visling.cli.printing import claim_store, progress_bar, show
from visling.errors import DataError

if TYPE_CHECKING:
    from visling.regions.store import NativeStore

_SHOWN = 20
"""Problems of one kind that are shown as text."""


def merge_stores(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Region stores of the same features.")],
    out: Out,
    join: Annotated[
        bool,
        typer.Option(
            "--join", help="An image that is in several stores gets the regions of all, in the order of the stores."
        ),
    ] = False,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Merge region stores into one. Their features must be of one detector; no image may be in two of them without
    --join.

    Example: visling regions merge regions more-regions --out joined
    """
    from visling.regions.copying import merge
    from visling.regions.store import NativeStore

    opened = [NativeStore.open(store) for store in stores]
    claim_store(out, resume)
    with progress_bar("Merging") as step:
        merged = merge(opened, out, join=join, resume=resume, progress=step)
    _show_store(merged, json_, out)


def take_subset(
    store: Annotated[Path, typer.Argument(help="Region store.")],
    images: Annotated[
        list[str],
        typer.Option(
            "--images",
            metavar="FILE|ID",
            help="Image ids: a file that lists them (.npy, .json, or text with one per line), or one id. May be "
            "repeated.",
        ),
    ],
    out: Out,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Copy some images of a region store into a new one.

    Example: visling regions subset regions --images minival.txt --out minival-regions
    """
    from visling.data.annotations.image_lists import read_image_list
    from visling.regions.copying import subset
    from visling.regions.store import NativeStore

    opened = NativeStore.open(store)
    chosen: list[str] = []
    for name in images:
        if name in opened:
            chosen.append(name)
        elif Path(name).is_file():
            chosen.extend(sorted(read_image_list(name)))
        else:
            raise DataError(
                f"{name} is neither an image of {store} nor a file that lists images. Check the id, or the path."
            )
    if missing := [name for name in chosen if name not in opened]:
        raise DataError(
            f"{len(missing)} of {len(chosen)} images are not in {store}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Leave them out, or take a store that holds them."
        )
    claim_store(out, resume)
    with progress_bar("Copying") as step:
        copied = subset(opened, chosen, out, resume=resume, progress=step)
    _show_store(copied, json_, out)


def check_store(
    store: Annotated[Path, typer.Argument(help="Region store.")],
    json_: Json = False,
) -> None:
    """Read a whole region store and report everything that is wrong with it; status 1 if anything is.

    Digests of all files; numbers that are not finite; boxes that are inverted or leave their image; sizes; images that
    are stored twice; labels without a name; class distributions that do not sum to 1.

    Example: visling regions check regions
    """
    from visling.regions.checking import find_problems
    from visling.regions.store import NativeStore

    opened = NativeStore.open(store)
    with progress_bar("Checking") as step:
        problems = list(find_problems(opened, step))
    counts = Counter(problem.kind for problem in problems)
    found: dict[str, object] = {"images": len(opened), "regions": int(opened.counts.sum()), "problems": len(problems)}
    if json_:
        listed = [{"kind": problem.kind, "image": problem.image, "problem": problem.what} for problem in problems]
        show({**found, "found": listed}, json_)
    else:
        show(found, json_, f"Read {store}")
        for kind, count in counts.items():
            print(f"{kind}: {count}")
            same = [problem for problem in problems if problem.kind == kind]
            for problem in same[:_SHOWN]:
                print(f"  {'' if problem.image is None else f'{problem.image}: '}{problem.what}")
            if count > _SHOWN:
                print(f"  ... and {count - _SHOWN} more; --json lists all")
    if problems:
        raise typer.Exit(1)


def _show_store(store: NativeStore, json_: bool, out: Path) -> None:
    show({"images": len(store), "regions": int(store.counts.sum())}, json_, f"Wrote {out}")
