"""visling analysis heads: statistics of attention heads over a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visling.cli.options import Device, Json, OtherFeatures, TaskName, Threads
from visling.cli.printing import claim_file, progress_bar, write_new
from visling.cli.shown_examples import BatchSize, Data, File, ImageFolder, Limit, Run, Split, Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from visling.analysis.head_statistics import DirectionStatistics


def heads(
    run: Run,
    split: Split = "test",
    file: File = None,
    data: Data = None,
    store: Store = None,
    images: ImageFolder = None,
    task: TaskName = None,
    examples: Limit = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the statistics as JSON.")] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw every quantity as layers x heads, as one HTML page."),
    ] = None,
    other_features: OtherFeatures = False,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """What every head attends to: how much crosses to the other modality, how spread out it is, how much falls on
    special tokens, on one region, on itself; means over the words and regions of a data set.

    Example: visling analysis heads vqa --split val --examples 200

    Example: visling analysis heads pretrain --out heads.json --page heads.html
    """
    from visling import runtime
    from visling.analysis.encoded_rows import encode_shown
    from visling.analysis.head_statistics import HeadSums, render_heads
    from visling.runs.examples import open_run

    runtime.limit_threads(threads)
    for target in filter(None, (out, page)):
        claim_file(target)
    with progress_bar("examples", at_once=False) as progress:
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
            limit=examples,
            progress=progress,
        )
        sums = HeadSums()
        for shown in opened.batches(batch_size=batch_size):
            for rows in encode_shown(opened.encoder, shown, tokenizer=opened.inputs.tokenizer):
                sums.add(rows)
            progress(shown.numbers[-1] + 1, len(opened.records))
    found, source = sums.statistics(), f"{run}, {split if file is None else file.name}"
    if out is not None:
        write_new(out, json.dumps(found.to_json(), indent=2) + "\n")
    if page is not None:
        write_new(page, render_heads(found, source))
    if json_:
        print(json.dumps(found.to_json()))
        return
    if opened.notice:
        print(opened.notice)
    print(f"{source}, {found.questions} examples: mean of the heads of a layer (lowest to highest)")
    for name, part in found.directions.items():
        print(_describe_direction(name, part))
    for target in filter(None, (out, page)):
        print(f"Wrote {target}")


def _describe_direction(name: str, part: DirectionStatistics) -> str:
    """A table of its layers and quantities."""
    if not part.queries:
        return f"{name.replace('_', ' ')}: nothing to attend to"
    quantities = list(part.quantities)
    width = max(len(layer) for layer in part.layers)
    lines = [
        f"{name.replace('_', ' ')}: {part.queries} queries, {part.special_queries} special ones left out",
        f"  {'layer':<{width}}" + "".join(f"  {quantity.replace('_', ' '):<22}" for quantity in quantities).rstrip(),
    ]
    for number, layer in enumerate(part.layers):
        cells = [_describe_spread(part.quantities[quantity][number]) for quantity in quantities]
        if layer in part.by_construction:
            cells[quantities.index("mass")] = "1 by construction"
        lines.append(f"  {layer:<{width}}" + "".join(f"  {cell:<22}" for cell in cells).rstrip())
    return "\n".join(lines)


def _describe_spread(values: NDArray[np.float64]) -> str:
    """The mean of the heads, the lowest and the highest one."""
    known = [value for value in values.tolist() if value == value]
    if not known:
        return "-"
    return f"{sum(known) / len(known):.3f} ({min(known):.3f} to {max(known):.3f})"
