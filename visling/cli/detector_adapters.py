"""visling detect wrap, visling detect grid: detectors made of networks that others trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visling.cli.options import Json, Offline, Out
from visling.cli.printing import show
from visling.errors import RunError

if TYPE_CHECKING:
    from visling.vision.region_detector import RegionDetector


def detect_wrap(
    source: Annotated[
        str, typer.Argument(help="Folder that transformers wrote, or owner/name of an object detector on the hub.")
    ],
    out: Out,
    min_confidence: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Regions below this class probability are dropped.")
    ] = 0.3,
    min_regions: Annotated[
        int | None,
        typer.Option(min=0, help="This many of the best regions are kept whatever their confidence; 10 by default."),
    ] = None,
    max_regions: Annotated[
        int | None, typer.Option(min=1, help="Most regions per image; 36 by default, or as many as there are queries.")
    ] = None,
    offline: Offline = False,
    json_: Json = False,
) -> None:
    """Make a detector of any object detector of the transformers package (extra hf).

    Example: visling detect wrap detr --out detector
    """
    from visling.train.claim import refuse_taken
    from visling.vision import transformers_detector

    refuse_taken(out, resume=False)
    detector = transformers_detector.wrap(
        source,
        min_confidence=min_confidence,
        min_regions=min_regions,
        max_regions=max_regions,
        offline=offline or None,
    )
    _save(detector, out)
    facts = {
        "network": type(detector.network).__name__,
        "classes": len(detector.class_names),
        "feature width": detector.feature_size,
        "queries": detector.config.num_queries,
        "regions": f"{detector.config.min_regions} to {detector.config.max_regions}",
        "fingerprint": detector.fingerprint,
    }
    show(facts, json_, f"Wrote {out}")


def detect_grid(
    source: Annotated[
        str,
        typer.Argument(
            help="Weight file of a ResNet-50, -101 or -152 with torchvision's names; folder that transformers wrote; "
            "or owner/name of an image backbone on the hub."
        ),
    ],
    out: Out,
    grid: Annotated[
        int | None,
        typer.Option(min=1, help="Average the feature map to N x N cells; its own cells by default.", metavar="N"),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Height and width of the input in pixels; by default what the backbone was trained with, 448 for a "
            "weight file.",
        ),
    ] = None,
    offline: Offline = False,
    json_: Json = False,
) -> None:
    """Make a detector whose regions are the cells of an image backbone's feature map.

    Example: visling detect grid resnet50.pth --grid 7 --out grid
    """
    from visling.train.claim import refuse_taken
    from visling.vision import grid_features

    refuse_taken(out, resume=False)
    detector = grid_features.wrap(source, grid=grid, side=size, offline=offline or None)
    _save(detector, out)
    config = detector.config
    rows, columns = config.cells
    facts = {
        "input, pixels": f"{config.width} x {config.height}",
        "feature map": f"{config.columns} x {config.rows}",
        "regions": f"{columns} x {rows}",
        "feature width": config.feature_size,
        "fingerprint": detector.fingerprint,
    }
    show(facts, json_, f"Wrote {out}")


def _save(detector: RegionDetector, out: Path) -> None:
    """Write the folder of a detector.

    Raises:
        RunError: it cannot be written.
    """
    try:
        detector.save(out)
    except OSError as error:
        raise RunError(
            f"cannot write the detector to {out}: {error}. Use another --out; what is there is no whole detector."
        ) from error
