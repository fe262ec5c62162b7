"""visling detect convert: released weights of the Visual Genome detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from visling.cli.options import Json, Offline, Out, Settings
from visling.cli.printing import show
from visling.errors import ConfigError


def detect_convert(
    source: Annotated[
        str,
        typer.Argument(
            help="owner/name on the hub, a folder with pytorch_model.bin and config.yaml, or a weight file (PyTorch, "
            "safetensors, or detectron2's pickle)."
        ),
    ],
    out: Out,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration, config.yaml; that of the folder if left out, for a file the release's."),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Names of the object classes, one per line; the release's 1,600 if left out.")
    ] = None,
    attributes: Annotated[
        Path | None, typer.Option(help="Names of the attributes, one per line; the release's 400 if left out.")
    ] = None,
    selection: Annotated[
        Literal["port", "original"] | None,
        typer.Option(
            help="How regions are found and chosen: as the transformers port does, or as the original did, which "
            "released feature files come from; what the configuration describes if left out."
        ),
    ] = None,
    regions: Annotated[
        str | None,
        typer.Option(
            metavar="N | LEAST:MOST", help="Regions per image, 36 or 10:100; the configuration's if left out."
        ),
    ] = None,
    set_: Settings = None,
    half: Annotated[bool, typer.Option("--half", help="Store matrices in half precision: half the file.")] = False,
    offline: Offline = False,
    json_: Json = False,
) -> None:
    """Make a detector of released weights of the Visual Genome detector (bottom-up attention).

    The features that released models were trained on differ in --selection and --regions; docs/detectors/
    visual_genome.md says which needs which.

    Example: visling detect convert unc-nlp/frcnn-vg-finetuned --selection original --regions 36 --out vg-detector
    """
    limits = None if regions is None else _read_limits(regions)

    from visling import config as configs
    from visling.vision.visual_genome_conversion import convert_detector

    made = convert_detector(
        source,
        out,
        config=config,
        classes=classes,
        attributes=attributes,
        selection=selection,
        regions=limits,
        settings=set_ or (),
        half=half,
        offline=offline or None,
    )
    described = {
        "classes": len(made.config.class_names),
        "attributes": len(made.config.attribute_names),
        "selection": made.config.selection,
        "regions": f"{made.config.min_regions} to {made.config.max_regions}",
        "picture": f"{made.config.short_side} to {made.config.long_side} pixels",
        "defaults used for": ", ".join(made.unsaid) or None,
        "not used": ", ".join(made.ignored) or None,
        "fingerprint": made.fingerprint,
    }
    if json_:
        print(json.dumps({**described, "path": str(out), "coverage": configs.to_dict(made.coverage)}))
        return
    show(described, json_, f"Read {source}")
    print(made.coverage)
    print(f"Detector in {out}")


def _read_limits(text: str) -> tuple[int, int]:
    """36 -> (36, 36); 10:100 -> (10, 100)."""
    least, _, most = text.partition(":")
    try:
        return int(least), int(most or least)
    except ValueError as error:
        raise ConfigError(f"--regions {text} is not a number of regions; expected N or LEAST:MOST.") from error
