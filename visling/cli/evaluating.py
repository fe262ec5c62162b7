"""visling evaluate, report, compare."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from visling.cli.gallery import open_to_ask
from visling.cli.options import MACHINE, Device, Json, OtherFeatures, Out, Precision, TaskName, Threads
from visling.cli.printing import describe_early_end, progress_bar
from visling.cli.shown_examples import Data, File, ImageFolder, Store


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            help="Run folder of finetune, or a model folder; one that is in no run needs --data and --store."
        ),
    ],
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to score.")] = "test",
    file: File = None,
    data: Data = None,
    store: Store = None,
    images: ImageFolder = None,
    task: TaskName = None,
    other_features: OtherFeatures = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier evaluation of this split.")
    ] = False,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="Another run that was scored on this split, such as one that saw no image; its scores are shown next "
            "to this one's. May be repeated.",
        ),
    ] = None,
    zero_shot: Annotated[
        bool,
        typer.Option(
            "--zero-shot", help="Caption retrieval by the matching head of a pre-trained model, without fine-tuning."
        ),
    ] = False,
    joint: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Run of VCR's other phase that was evaluated on this split: scores both together (Q -> AR), or writes "
            "the official file of both for a split without labels.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Examples per batch.", rich_help_panel=MACHINE)
    ] = 256,
    device: Device = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Precision of matrix products.", rich_help_panel=MACHINE)
    ] = "fp32",
    threads: Threads = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            min=1,
            metavar="N",
            help="Processes that share the batches; the results do not change.",
            rich_help_panel=MACHINE,
        ),
    ] = 1,
    json_: Json = False,
) -> None:
    """Score a model by the official metric and write the official submission file.

    Example: visling evaluate vqa --split test

    Example: visling evaluate run --file more.csv --images photos
    """
    from visling import runtime
    from visling.runs import evaluate as evaluate_module

    runtime.limit_threads(threads)
    with (
        runtime.process_group(processes),
        progress_bar("images" if file is not None else "pairs", at_once=False) as progress,
    ):
        found = evaluate_module.evaluate(
            run,
            split=split,
            data=data,
            file=file,
            store=store,
            images=images,
            device=device,
            precision=precision,
            batch_size=batch_size,
            other_features=other_features,
            overwrite=overwrite,
            compare=compare or (),
            joint=joint,
            zero_shot=zero_shot,
            task=task,
            progress=progress,
        )
    if json_:
        print(json.dumps(found))
        return
    variants = "".join(f", {name} {value}" for name, value in found.get("variants", {}).items())
    print(f"{run}, {f'file {file}' if file is not None else f'split {split}'}, task {found['task']}{variants}")
    for name, score in found["scores"].items():
        print(_describe_score(name, score))
    for name, other in (*found["baselines"].items(), *found.get("compared", {}).items()):
        print(f"{name}{' (text only)' if other.get('text_only') else ''}")
        for key, score in other["scores"].items():
            print(f"  {_describe_score(key, score, width=22)}")
    if "joint" in found:
        print(f"together with {joint}")
        for key, score in found["joint"]["scores"].items():
            print(f"  {_describe_score(key, score, width=22)}")
    for category, rows in found["by"].items():
        print(f"by {category.replace('_', ' ')}")
        for name, score in sorted(rows.items()):
            print(f"  {name:<22}{score['value']:>8.2f}   ({score['count']})")
    for note in found.get("notes", ()):
        print(note)
    if found["truncated"]:
        print(f"{found['truncated']} texts were longer than the model reads and were cut")


def _describe_score(name: str, score: Mapping[str, Any], *, width: int = 24) -> str:
    """A line with a score in percent, its 95 % interval if it has one, and the examples that it is the mean of."""
    interval = f"   {score['low']:.1f} to {score['high']:.1f}" if "low" in score else ""
    return f"{name:<{width}}{score['value']:>8.2f}{interval}   ({score['count']})"


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Another run whose scores are shown next to it; may be repeated."),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, metavar="N", help="Number of examples shown.")] = 24,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the images; the one that the run names by default.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Region store to draw from; the run's by default.")
    ] = None,
    relevance: Annotated[
        bool,
        typer.Option(
            help="Show on each example what the model looked at; needs the run's weights, regions and annotations."
        ),
    ] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write; RUN/report.html by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page.")] = False,
) -> None:
    """Write one self-contained HTML page about a run: curves, scores, right and wrong answers with boxes, the exact
    configuration.

    Example: visling report vqa --compare question-only
    """
    from visling.analysis.report import write_report
    from visling.regions.store import NativeStore

    regions = None if store is None else NativeStore.open(store)
    page = write_report(
        run,
        out=out,
        examples=examples,
        images=images,
        store=regions,
        compare=compare or [],
        asks=partial(open_to_ask, run, store=store, images=images) if relevance else None,
        overwrite=overwrite,
    )
    print(f"Wrote {page}")


def compare_models(
    families: Annotated[
        str, typer.Option("--models", metavar="NAME,NAME", help="Model families, separated by commas.")
    ],
    phase: Annotated[str, typer.Option("--recipe", help="Pre-training: the recipe MODEL-RECIPE of each model.")],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="TASK,TASK",
            help="Fine-tuning: the recipes MODEL-TASK of each model, separated by commas.",
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder of annotations, the same for all.")],
    store: Annotated[Path, typer.Option(metavar="DIR", help="Region store that holds every image.")],
    out: Out,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Number of repetitions, with seeds from 0.")] = 3,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to score.")] = "test",
    without_pretraining: Annotated[
        bool, typer.Option("--without-pretraining", help="Also fine-tune from random weights.")
    ] = False,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only", help="Also fine-tune without any region, to measure what the words alone give away."
        ),
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one setting of every fine-tuning, as a.b=value; may be repeated."),
    ] = None,
    pretrain_set: Annotated[
        list[str] | None, typer.Option(help="Change one setting of every pre-training, as a.b=value; may be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs in parallel, each on one thread.")] = 1,
    device: Device = "auto",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the comparison in --out, or add seeds or starts to it."),
    ] = False,
    json_: Json = False,
) -> None:
    """Pre-train and fine-tune models on the same data, budget and features, and write one table as Markdown, JSON and
    HTML.

    Example: visling compare --models visualbert,lxmert --recipe scenes --tasks vqa-scenes --data scenes --store regions
    --out comparison
    """
    from visling import runtime
    from visling.analysis.comparison import write_comparison
    from visling.runs import compare as comparison

    plan = comparison.Comparison(
        models=_split_names(families),
        recipe=phase,
        tasks=_split_names(tasks),
        seeds=seeds,
        split=split,
        pretrain_settings=tuple(pretrain_set or ()),
        finetune_settings=tuple(set_ or ()),
        without_pretraining=without_pretraining,
        text_only=text_only,
    )
    runtime.limit_threads(1)

    def report_progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        write_comparison(out)

    found = comparison.compare(
        plan,
        out,
        data=data,
        store=store,
        device=device,
        jobs=jobs,
        resume=resume,
        stream=sys.stderr,
        progress=report_progress,
    )
    table, page = write_comparison(out)
    if json_:
        print(json.dumps(found))
    elif found["status"] == "running":
        print(describe_early_end(out, "terminated"))
    else:
        print(f"{table.read_text(encoding='utf-8')}\nWrote {table}, {page} and {out / comparison.FILE}")


def _split_names(joined: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in joined.split(",") if name.strip())
