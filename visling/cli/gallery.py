"""visling gallery: the examples of a run as pages, and retrieval before and after fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visling.cli.options import IMAGES, Device, OtherFeatures, TaskName, Threads
from visling.cli.printing import claim_folder, progress_bar
from visling.cli.shown_examples import Data, Store
from visling.errors import RunError, VislingError

if TYPE_CHECKING:
    from visling.analysis.ask_again import AskAgain
    from visling.analysis.retrieval_gallery import RankedImages
    from visling.runs.retrieve import Retrieved


def gallery(
    run: Annotated[Path, typer.Argument(help="Run folder that was evaluated.")],
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Split that was evaluated; by default test, if it was.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own examples, if the run was evaluated with --file: the same file."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Another run that was evaluated on the split: shows where the two differ, side by side.",
        ),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Of a retrieval run: the pre-trained model that it started from. The gallery then shows the images "
            "that both rank first for the same captions.",
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of examples, 200 by default; or of captions, 12 by default."),
    ] = None,
    views: Annotated[
        bool, typer.Option(help="Compute what the model looked at in each example, the linked view that it opens.")
    ] = True,
    data: Data = None,
    store: Store = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the images; the training run's by default.", rich_help_panel=IMAGES
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --before: rank only the first so many images and their captions."),
    ] = None,
    task: TaskName = None,
    other_features: OtherFeatures = False,
    device: Device = "auto",
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write; RUN/gallery by default. It must be new or empty."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a folder that the same command began, keeping what it has.")
    ] = False,
) -> None:
    """Write a folder of pages about a run's examples: filters, groups with scores, and for each example what the model
    looked at. It opens from a disk, without a server.

    Example: visling gallery vqa --compare question-only

    Example: visling gallery retrieval --before pretrained --out before-after
    """
    from visling import runtime

    runtime.limit_threads(threads)
    target = out if out is not None else run / "gallery"
    if before is not None:
        if compare is not None or resume:
            wrong = "--compare" if compare is not None else "--resume"
            raise RunError(f"{wrong} does not go with --before, which compares rankings in one go. Leave it out.")
        page = _write_rankings(
            run, before, target, split=split or "test", data=data, store=store, images=images, limit=limit,
            examples=examples or 12, other_features=other_features, device=device,
        )  # fmt: skip
    else:
        page = _write_examples(
            run, compare, target, split=split, file=file, task=task, data=data, store=store, images=images, views=views,
            examples=examples or 200, other_features=other_features, device=device, resume=resume,
        )  # fmt: skip
    print(f"Wrote {page}")


def _write_examples(
    run: Path,
    compare: Path | None,
    out: Path,
    *,
    split: str | None,
    file: Path | None,
    task: str | None,
    data: Path | None,
    store: Path | None,
    images: Path | None,
    views: bool,
    examples: int,
    other_features: bool,
    device: str,
    resume: bool,
) -> Path:
    """Open the models where that is possible, then write the pages."""
    from visling.analysis.gallery import GalleryRun, write_gallery
    from visling.regions.store import NativeStore

    shown = GalleryRun.read(run, split if file is None else file.stem, task)
    other = None if compare is None else GalleryRun.read(compare, shown.split, task)
    asked, notes = [], []
    for one in filter(None, (shown, other) if views else ()):
        try:
            asked.append(
                open_to_ask(
                    one.path, one.split, file=file, task=task, data=data, store=store, images=images, device=device,
                    other_features=other_features,
                )
            )  # fmt: skip
        except VislingError as error:
            notes.append(f"What {one.name} looked at is not shown: {error}")
    with progress_bar("examples") as progress:
        return write_gallery(
            shown, out, other=other, examples=examples, asked=asked, notes=notes, images=images,
            store=None if store is None else NativeStore.open(store), resume=resume, progress=progress,
        )  # fmt: skip


def open_to_ask(
    run: Path,
    split: str,
    *,
    file: Path | None = None,
    task: str | None = None,
    data: Path | None = None,
    store: Path | None = None,
    images: Path | None = None,
    device: str = "auto",
    other_features: bool = False,
) -> AskAgain:
    """A run's model with the examples of a split; see `runs.examples.open_run`.

    Raises:
        RunError: the model answers nothing.
    """
    from visling.analysis.ask_again import AskAgain
    from visling.pretrained.description import find_model, read_description
    from visling.runs.examples import open_run

    if "extractor" not in read_description(find_model(run)):
        images = None  # they are shown, but the model reads none
    found = open_run(
        run, split=split, file=file, task=task, data=data, store=store, images=images, device=device,
        other_features=other_features,
    )  # fmt: skip
    if found.model is None:
        raise RunError(f"{run} holds a pre-trained encoder without a task head, which answers nothing.")
    return AskAgain(
        saved=found.saved,
        model=found.model,
        task=found.task,
        layout=found.inputs.layout,
        records={record.id: record for record in found.records},
        store=found.store,
        pictures=found.inputs.pictures,
        device=found.inputs.device,
    )


def _write_rankings(
    run: Path,
    before: Path,
    out: Path,
    *,
    split: str,
    data: Path | None,
    store: Path | None,
    images: Path | None,
    limit: int | None,
    examples: int,
    other_features: bool,
    device: str,
) -> Path:
    """Rank by both models, then write the page."""
    from visling.analysis.retrieval_gallery import Captions, write_retrieval_gallery
    from visling.metrics.ranking import CUTS
    from visling.pretrained.folder import read_model_folder
    from visling.runs.examples import read_run_json
    from visling.runs.retrieve import retrieval_model, retrieve

    known = read_run_json(run)
    data = data if data is not None else Path(known["data"][0])
    store = store if store is not None else Path(known.get("valid_store") or known["store"])
    images = images if images is not None else Path(known["images"])
    for model in (before, run):  # both, before the first is ranked for minutes
        retrieval_model(read_model_folder(model))
    claim_folder(out)
    found = []
    for model in (before, run):
        with progress_bar("pairs", at_once=False) as progress:
            found.append(
                retrieve(
                    model, data=data, store=store, split=split, images=images, device=device, limit=limit,
                    other_features=other_features, progress=progress,
                )
            )  # fmt: skip
    first, last = found
    cuts = " / ".join(map(str, CUTS))
    print(f"{len(first.captions)} captions, {len(first.images)} images; before and after, R@{cuts}")
    for of, title in (("image", "image of a caption"), ("text", "caption of an image")):
        recalls = [" / ".join(f"{one.report.scores[f'{of}_r{cut}'].value:.1f}" for cut in CUTS) for one in found]
        print(f"  {title:<20}{recalls[0]:>22}{recalls[1]:>22}")
    return write_retrieval_gallery(
        out,
        Captions(images=first.images, texts=first.captions, owners=first.owners),
        _name_ranking(before, first),
        _name_ranking(run, last),
        split=split,
        images=images,
        examples=examples,
    )


def _name_ranking(model: Path, found: Retrieved) -> RankedImages:
    from visling.analysis.retrieval_gallery import RankedImages

    return RankedImages(
        name="/".join(model.resolve().parts[-2:]),
        scores=found.scores,
        numbers={name: score.value for name, score in found.report.scores.items()},
        zero_shot=found.zero_shot,
    )
