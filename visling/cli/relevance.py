"""visling analysis relevance: whether explanations find what answers rest on, over a data set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visling.cli.options import Device, Json, OtherFeatures, TaskName, Threads
from visling.cli.printing import progress_bar, refuse_existing, write_new
from visling.cli.shown_examples import BatchSize, Data, File, ImageFolder, Run, Split, Store

if TYPE_CHECKING:
    from visling.analysis.judging import JudgedCurve, Judgement
    from visling.tasks.base import Score


def relevance(
    run: Run,
    split: Split = "test",
    file: File = None,
    data: Data = None,
    store: Store = None,
    images: ImageFolder = None,
    task: TaskName = None,
    examples: Annotated[
        int | None,
        typer.Option("--examples", min=1, metavar="N", help="So many examples, drawn by --seed; all by default."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Draws the examples.")] = 0,
    orders: Annotated[
        int, typer.Option("--orders", min=1, metavar="N", help="Random orders of removal that are averaged.")
    ] = 5,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the curves as JSON.")] = None,
    other_features: OtherFeatures = False,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Whether explanations find what answers rest on: accuracy as regions or words are removed, the most relevant first
    and the least relevant first, by every method, against removal by chance and by raw attention.

    Example: visling analysis relevance vqa --examples 500 --out relevance.json
    """
    import numpy as np

    from visling import runtime
    from visling.analysis.judging import judge
    from visling.errors import RunError
    from visling.runs.examples import open_run

    runtime.limit_threads(threads)
    if out is not None:
        refuse_existing(out)
    with progress_bar("questions", at_once=False) as progress:
        opened = open_run(
            run,
            split=split,
            task=task,
            data=data,
            file=file,
            store=store,
            images=images,
            device=device,
            other_features=other_features,
            progress=progress,
        )
        model = opened.model
        if model is None:
            raise RunError(
                f"{run} is a pre-trained model, which answers nothing that could be right or wrong: give a run that "
                "finetune has written."
            )
        if examples is not None and examples < len(opened.records):
            chosen = np.sort(runtime.generator_for(seed).permutation(len(opened.records))[:examples])
            opened = replace(opened, records=[opened.records[number] for number in chosen])
        found = judge(
            model,
            opened.task,
            opened.batches(batch_size=batch_size),
            seeds=orders,
            progress=lambda done: progress(done, len(opened.records)),
        )
    source = {
        "run": str(run),
        "model": opened.saved.model,
        "task": opened.task.name,
        "split": split if file is None else file.name,
        "examples": len(opened.records),
        "seed": None if examples is None else seed,
    }
    written = json.dumps(source | found.to_json(), indent=2) + "\n"
    if out is not None:
        write_new(out, written)
    if json_:
        print(written, end="")
        return
    if opened.notice:
        print(opened.notice)
    print(_describe(found, f"{run}, {source['split']}"))
    if out is not None:
        print(f"Wrote {out}")


def _describe(found: Judgement, source: str) -> str:
    """The table of a judgement."""
    lines = [
        f"{source}: accuracy as more is removed, of questions about {found.images} images; area under it in percent, "
        "with its 95 % interval over images"
    ]
    for part, count in found.questions.items():
        lines += ["", f"{part}: {count} questions" + ("" if count else "; nothing to remove")]
        curves = [curve for curve in found.curves if curve.part == part]
        for order, title in (
            ("most_first", "most relevant first (the smaller the better)"),
            ("least_first", "least relevant first (the larger the better)"),
        ):
            shown = [curve for curve in curves if curve.order in (order, "random")]
            if shown:
                lines.append(
                    f"  {title:<44}  {'area':<20}  {'better than random by':<22}  better than raw attention by"
                )
                lines += [_describe_curve(curve) for curve in shown]
    return "\n".join(lines)


def _describe_curve(curve: JudgedCurve) -> str:
    cells = [
        _describe_score(curve.area),
        *(_describe_score(curve.gain.get(name)) for name in ("random", "raw_attention")),
    ]
    return f"    {curve.method.replace('_', ' '):<42}  {cells[0]:<20}  {cells[1]:<22}  {cells[2]}".rstrip()


def _describe_score(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.1f} ({score.low:.1f} to {score.high:.1f})"
