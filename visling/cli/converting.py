"""visling convert, verify."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from visling import config as configs
from visling.cli.options import Json, Offline, Settings
from visling.cli.printing import show
from visling.errors import CheckpointError, ConfigError


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Weight file, folder with one, name in `visling catalog`, or owner/name on the hub; with "
            "--to-layout a model or run folder."
        ),
    ],
    to: Annotated[
        Path,
        typer.Option("--to", help="Model folder to write; with --to-layout a weight file (a folder for transformers)."),
    ],
    from_: Annotated[
        str | None, typer.Option("--from", help="Layout of the file; recognised by its tensor names by default.")
    ] = None,
    to_layout: Annotated[
        str | None,
        typer.Option(
            "--to-layout", help="Export a model folder: official, transformers, or another layout of the family."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model family, for example vilbert; recognised by the tensor names by default."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Preset of the family; recognised by the tensor shapes if only one fits."),
    ] = None,
    set_: Settings = None,
    release: Annotated[
        str | None, typer.Option("--release", help="Name in `visling catalog`; implies family, layout and preset.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Task whose head the file holds; recognised by the number of answers by default."),
    ] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            "--answers", help="Answers in the order of a classifier: .json, .pkl or one a line; may be repeated."
        ),
    ] = None,
    task_token: Annotated[
        int | None,
        typer.Option("--task-token", help="Number of the task among the file's task tokens; the release's by default."),
    ] = None,
    other_answers: Annotated[
        bool, typer.Option("--other-answers", help="Accept an answer list other than the release's.")
    ] = False,
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="Leave all heads out.")] = False,
    features: Annotated[
        Path | None, typer.Option("--features", help="Region store with the features that the weights were trained on.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of parameters that the file does not hold.")] = 0,
    offline: Offline = False,
    json_: Json = False,
) -> None:
    """Convert released weights to a model folder, or a model folder to a released layout.

    Released weights are named as in `visling catalog` and fetched, or given as a file.

    Example: visling convert model_LXRT.pth --release model_LXRT --to lxmert
    """
    from visling.pretrained import convert as conversion
    from visling.pretrained.export import export

    if to_layout is not None:
        if (
            (from_, model, preset, set_, release, task, answers, features) != (None,) * 8
            or encoder_only
            or other_answers
        ):
            raise ConfigError(
                "--to-layout writes a model folder back as it is: give only SOURCE, --to and --to-layout."
            )
        done = export(Path(source), to, layout=to_layout)
        show({"layout": done.layout, "tensors": done.tensors, **done.left_out}, json_, f"Wrote {to}")
        return
    made = conversion.convert(
        source,
        to,
        layout=from_,
        model=model,
        preset=preset,
        settings=set_ or (),
        release=release,
        task=task,
        task_token=task_token,
        answers=answers or (),
        other_answers=other_answers,
        encoder_only=encoder_only,
        features=features,
        seed=seed,
        offline=offline or None,
    )
    read_as = {
        "model": made.model,
        "preset": made.preset,
        "layout": made.layout,
        "release": made.release or None,
        "task": made.task,
    }
    heads = {place: f"{saved.head.kind}, {saved.head.outputs} outputs" for place, saved in made.heads.items()}
    if json_:
        print(
            json.dumps({**read_as, "heads": heads, "path": str(made.path), "coverage": configs.to_dict(made.coverage)})
        )
        return
    show({**read_as, **heads}, json_, f"Read {source} as")
    print(made.coverage)
    print(f"Model in {made.path}")


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Model folder or run folder.")],
    recording: Annotated[Path, typer.Argument(help="Folder of recorded values, written with --record.")],
    record: Annotated[
        bool, typer.Option("--record", help="Write the recording: a random batch and the output of every layer.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest absolute difference that passes; 5e-5 by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random batch.")] = 0,
    json_: Json = False,
) -> None:
    """Compare every layer of a model with recorded values and name the first that differs; status 1 if one does.

    Released weights are converted first, from the file that `visling catalog` names.

    Example: visling verify vqa recording --record
    """
    from visling.pretrained import verify as verification

    if not checkpoint.exists():
        raise CheckpointError(
            f"no model in {checkpoint}: there is no such folder. Train one, or convert a released file; that needs the "
            "file that `visling catalog` names."
        )
    if record:
        layers = verification.record(checkpoint, recording, seed=seed)
        show({"layers": len(layers)}, json_, f"Recorded in {recording}")
        return
    found = verification.verify(checkpoint, recording, atol=verification.ATOL if tolerance is None else tolerance)
    if json_:
        by_layer = {
            layer.name: {"largest": layer.largest if math.isfinite(layer.largest) else None, "agrees": layer.agrees}
            for layer in found.layers
        }
        print(
            json.dumps(
                {
                    "first": found.first,
                    "tolerance": {"absolute": found.atol, "relative": found.rtol},
                    "layers": by_layer,
                }
            )
        )
    else:
        print(found)
    if found.first is not None:
        raise typer.Exit(1)
