"""visling analysis alignment: which heads ground phrases and follow syntax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from visling.cli.options import Device, Json, OtherFeatures, TaskName, Threads
from visling.cli.printing import progress_bar, write_new
from visling.cli.shown_examples import BatchSize, Data, ImageFolder, Limit, Split, Store
from visling.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from visling.analysis.head_accuracy import Alignment, HeadAccuracy
    from visling.data.annotations.entities import EntitiesRecord
    from visling.runs.examples import OpenedRun

FILES = ("alignment.json", "alignment.svg", "alignment.html")


def alignment(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run folder of pretrain or finetune, or a model folder; or FAMILY:PRESET, such as lxmert:scenes, for "
            "random weights.",
        ),
    ],
    split: Split = "test",
    data: Data = None,
    store: Store = None,
    parses: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Parses of the sentences as CoNLL-U, with `# sent_id = IMAGE#NUMBER`; by default SPLIT.conllu next to "
            "the split's list of images. Without any, phrases alone are measured.",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this layer; may be repeated. All by default.")
    ] = None,
    pieces: Annotated[
        Literal["last", "mean"],
        typer.Option(help="What stands for a phrase or word: its last piece, or the mean attention of all its pieces."),
    ] = "last",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The same model before training: random weights of --seed.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of random weights.")] = 0,
    images: ImageFolder = None,
    task: TaskName = None,
    examples: Limit = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write to; by default RUN/alignment_SPLIT, or ..._random."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    other_features: OtherFeatures = False,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """How often each head, from words to regions, attends most to what a phrase names, without having been trained for
    it; and by dependency relation, how often a word attends to the region of its head or dependent. Reads Flickr30K
    Entities (docs/tasks/grounding.md).

    Example: visling analysis alignment pretrain --split val --data scenes

    Example: visling analysis alignment pretrain --random-weights
    """
    from visling import runtime
    from visling.analysis.alignment import Sentences, align_heads, check_regions
    from visling.analysis.head_accuracy import measure_alignment
    from visling.data.annotations.parses import find_parses
    from visling.runs.examples import open_run
    from visling.runs.untrained import is_preset, open_preset, reset_weights
    from visling.tasks.base import list_images

    runtime.limit_threads(threads)
    reads = Sentences()
    preset = is_preset(run)
    if out is None:
        if preset:
            raise RunError(f"{run} is a preset, not a folder that results could be written into: name one with --out.")
        out = Path(run) / f"alignment_{split}{'_random' if random_weights else ''}"
    if (out / FILES[0]).exists() and not overwrite:
        raise RunError(f"{out / FILES[0]} exists. Use --overwrite to replace it, or name another folder with --out.")
    with progress_bar("sentences", at_once=False) as progress:
        if preset:
            if data is None or store is None:
                raise RunError(f"{run} is a preset, which no run has trained: name --data and --store.")
            opened = open_preset(
                run, reads, split=split, data=data, store=store, seed=seed, device=device, limit=examples
            )
        else:
            opened = open_run(
                Path(run),
                split=split,
                task=task,
                data=data,
                store=store,
                images=images,
                device=device,
                other_features=other_features,
                limit=examples,
                reads=reads,
            )
        regions = check_regions(list_images(opened.records), opened.store, run)
        records = cast("Sequence[EntitiesRecord]", opened.records)
        if random_weights and not preset:
            opened = reset_weights(opened, seed)
        if parses is None:
            parses = _find_parses(opened.data, split)
        collector, lost = align_heads(
            opened.encoder,
            opened.batches(batch_size=batch_size),
            records=records,
            layout=opened.inputs.layout,
            store=regions,
            parses=None if parses is None else find_parses(parses, {one.id: one.sentence for one in records}),
            rule=reads.rule,
            layers=layer or (),
            stands=pieces,
            model=run,
            progress=progress,
        )
    found = measure_alignment(collector, lost)
    about = _describe_model(opened, run, seed if random_weights or preset else None)
    about |= {"split": split, "sentences": len(opened.records), "right": str(reads.rule), "pieces": pieces}
    about |= {"parses": None if parses is None else str(parses)}
    result = about | found.to_json()
    _write(out, found, result)
    if json_:
        print(json.dumps(result))
        return
    _print_table(found, about, opened.notice)
    print(f"Wrote {', '.join(str(out / name) for name in FILES)}")


def _find_parses(data: Path | None, split: str) -> Path | None:
    """The parses next to a split's list of images, if there are any."""
    from visling.data.annotations.entities import find_entities

    found = None if data is None else find_entities(data, split)
    if found is None:
        return None
    file = found[0] / f"{split}.conllu"
    return file if file.is_file() else None


def _describe_model(opened: OpenedRun, run: str, seed: int | None) -> dict[str, Any]:
    """What was measured.

    Args:
        seed: of random weights; None = trained ones.
    """
    from visling.checkpoints.files import digest

    saved = opened.saved
    weights = "trained weights" if seed is None else f"random weights, seed {seed}"
    checkpoint = digest(saved.path / "model.safetensors") if seed is None else None
    return {
        "model": run,
        "family": saved.model,
        "task": saved.task,
        "weights": weights,
        "checkpoint": checkpoint,
    }


def _write(out: Path, found: Alignment, result: dict[str, Any]) -> None:
    """Write all files; the JSON last: it says that the others are complete."""
    from visling.analysis.head_accuracy import render_alignment

    title = f"{result['model']} ({result['weights']}), {result['split']}"
    facts = {name: str(value) for name, value in result.items() if isinstance(value, str | int)}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error}. Name another folder with --out.") from error
    svg = found.draw(found.phrases, f"phrases, percent right: {title}")
    json_, drawing, page = FILES
    write_new(out / drawing, svg + "\n")
    write_new(out / page, render_alignment(found, f"What the heads ground: {title}", facts))
    write_new(out / json_, json.dumps(result, indent=1) + "\n")


def _print_table(found: Alignment, about: dict[str, Any], notice: str) -> None:
    """The best head of phrases and of each relation, next to the baselines."""
    if notice:
        print(notice)
    print(
        f"{about['model']} ({about['weights']}), split {about['split']}: {about['sentences']} sentences, "
        f"{len(found.layers)} layers with attention from text to regions. Percent; held out: heads that one half of "
        "the images chose, on the other; any word: how often, in the best head, the words of the sentence in general "
        "attend to the same region."
    )
    rows = [("phrases", found.phrases)]
    rows += [(f"{relation}, {direction.replace('_', ' ')}", part) for relation, direction, part in found.frequent()]
    width = max(len(name) for name, _ in rows)
    layers = max(len(f"{layer} head {0:2}") for layer in found.layers)
    names = list(found.phrases.baselines)
    print(
        f"{'':<{width}}  {'queries':>8}  {'best head':<{layers}}  {'right':>6}  {'95 %':<14}"
        + "".join(f"  {name}" for name in ("held out", "any word", *names, "upper bound", "heads above"))
    )
    for name, part in rows:
        print(_format_row(name, part, names, width, layers))
    rare = sum(len(parts) for parts in found.relations.values()) - len(rows) + 1
    for note in found.notes():
        print(note)
    if rare:
        print(f"relations with too few pairs to be shown, in the JSON: {rare}")
    if not found.relations:
        print("no parses, so no relations: put SPLIT.conllu next to the list of images, or name it with --parses")


def _format_row(name: str, part: HeadAccuracy, baselines: list[str], width: int, layers: int) -> str:
    best = part.best
    held_out = "-" if best.held_out is None else f"{best.held_out.value:.1f}"
    interval = f"{best.score.low:.1f} to {best.score.high:.1f}"
    shown = [part.baselines[baseline].value for baseline in baselines] + [part.upper_bound.value]
    cells = "".join(
        f"  {value:>{len(head)}.1f}" for value, head in zip(shown, (*baselines, "upper bound"), strict=True)
    )
    return (
        f"{name:<{width}}  {part.queries:>8}  {f'{best.layer} head {best.head}':<{layers}}  {best.score.value:>6.1f}  "
        f"{interval:<14}  {held_out:>8}  {best.control.value:>8.1f}{cells}  {part.above:>11}"
    )
