"""visling analysis states, project: hidden states as files, and in two dimensions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from visling.cli.options import MACHINE, Device, Json, OtherFeatures, Out, TaskName, Threads
from visling.cli.printing import claim_file, progress_bar, show, write_new
from visling.cli.shown_examples import Data, File, ImageFolder, Limit, Run, Split, Store
from visling.errors import ConfigError

if TYPE_CHECKING:
    from visling.runs.examples import OpenedRun


def states(
    run: Run,
    out: Out,
    split: Split = "test",
    file: File = None,
    data: Data = None,
    store: Store = None,
    images: ImageFolder = None,
    task: TaskName = None,
    examples: Limit = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="NAME", help="A layer to keep; may be repeated. All by default."),
    ] = None,
    only_pooled: Annotated[
        bool, typer.Option("--only-pooled", help="Keep nothing but the pooled state of each row.")
    ] = False,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="How states are stored; float16 takes half the space.")
    ] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted export in --out.")] = False,
    other_features: OtherFeatures = False,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Examples per batch; results depend on it to rounding.",
            rich_help_panel=MACHINE,
        ),
    ] = 32,
    device: Device = "auto",
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Write the hidden states of every layer over a data set, with words, regions, ids and masks, for probing and
    brain-encoding studies (docs/formats/states.md); visling.analysis.states.read_states reads them.

    Example: visling analysis states vqa --split val --out states

    Example: visling analysis states pretrain --layer layers.2 --dtype float16 --out states
    """
    from visling import runtime
    from visling.analysis.encoded_rows import encode_shown
    from visling.analysis.states import StatesWriter, read_states
    from visling.runs.examples import open_run

    if only_pooled and layers:
        raise ConfigError("--only-pooled keeps no layer: leave it out, or leave out --layer.")
    runtime.limit_threads(threads)
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
        writer = StatesWriter(
            out,
            _describe_origin(opened, split if file is None else file.name),
            layers=() if only_pooled else layers,
            dtype=dtype,
            resume=resume,
        )
        for shown in opened.batches(batch_size=batch_size, first=writer.examples):
            encoded = encode_shown(
                opened.encoder,
                shown,
                tokenizer=opened.inputs.tokenizer,
                class_names=opened.class_names,
                attribute_names=opened.attribute_names,
                capture=not only_pooled,
            )
            for example, rows in zip(shown.examples, encoded, strict=True):
                writer.add(example, rows)
            writer.end_batch()
            progress(shown.numbers[-1] + 1, len(opened.records))
        writer.finish()
    written = read_states(out)
    described = {
        "examples": len(opened.records),
        "rows": len(written),
        "layers": [*written.layers] if json_ else ", ".join(written.layers) or "none",
        "pooled": written.pooled().shape[1],
        "dtype": dtype,
        "out": str(out),
    }
    if opened.notice and not json_:
        print(opened.notice)
    show(described, json_, f"Wrote {out}")


def _describe_origin(opened: OpenedRun, source: str) -> dict[str, Any]:
    """What says that an export is resumed with the same model and data."""
    import hashlib

    with (opened.saved.path / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    ids = hashlib.sha256("\n".join(record.id for record in opened.records).encode("utf-8"))
    return {
        "family": opened.saved.model,
        "task": opened.saved.task,
        "weights": digest,
        "features": "" if opened.store is None else opened.store.fingerprint,
        "source": source,
        "examples": len(opened.records),
        "ids": ids.hexdigest(),
    }


def project(
    states: Annotated[Path, typer.Argument(metavar="STATES", help="Folder that `visling analysis states` wrote.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="HTML page to write; NAME.json goes beside it.")],
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="NAME", help="Layer to show; the last one by default.")
    ] = None,
    points: Annotated[
        int, typer.Option("--points", min=1, metavar="N", help="Most points on the map, evenly chosen.")
    ] = 4000,
    special: Annotated[
        bool, typer.Option("--special", help="Also show what is no word or detected region: [CLS], the whole image.")
    ] = False,
    json_: Json = False,
) -> None:
    """Draw exported hidden states in two dimensions, words and regions together, by their first two principal
    components: one page, coloured by modality, region class or word, and the same as JSON.

    Example: visling analysis project states --layer layers.2 --out map.html
    """
    from visling.analysis.projection import project as project_layer
    from visling.analysis.states import read_states

    beside = out.with_suffix(".json")
    if beside == out:
        raise ConfigError(f"--out is the name of a page, such as map.html; found {out}. NAME.json goes beside it.")
    for target in (out, beside):
        claim_file(target)
    known = read_states(states)
    found = project_layer(known, _last_layer(known.layers) if layer is None else layer, most=points, special=special)
    write_new(beside, json.dumps(found.to_json()) + "\n")
    write_new(out, found.to_html())
    described = {
        "layer": found.layer,
        "positions": found.components.positions,
        "points": len(found.points),
        "variance_shares": [round(share, 4) for share in found.components.shares.tolist()],
        "out": str(out),
        "json": str(beside),
    }
    show(described, json_, f"Wrote {out} and {beside}")


def _last_layer(layers: Mapping[str, Mapping[str, int]]) -> str:
    """The last layer with states of text and regions, else the last one.

    Raises:
        ConfigError: there is none.
    """
    if not layers:
        raise ConfigError("the folder holds pooled states alone: there is no layer of words and regions to draw.")
    both = [name for name, streams in layers.items() if len(streams) > 1]
    return (both or list(layers))[-1]
