"""By what the map of layers and heads of one question can be coloured.

quantity                     of a head
mass, entropy, ...           statistics of its attention in this question (`analysis.head_statistics`)
gradient_weighted_attention  what it brings to the best answer (`analysis.relevance.ByHead`)
phrases_grounded             share of a data set's phrases whose best region it finds (`visling analysis alignment`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from visling import damage
from visling.analysis.encoding import EncodedRow, Encoding
from visling.analysis.head_accuracy import FORMAT
from visling.analysis.head_statistics import head_statistics
from visling.analysis.relevance import ByHead
from visling.errors import DataError

Quantities = dict[str, dict[str, dict[str, list[float | None]]]]
"""Quantity -> direction -> layer -> value of each head, or None."""
_DIGITS = 5


def list_quantities(row: EncodedRow, heads: ByHead, grounding: Mapping[str, Sequence[float]]) -> Quantities:
    """Quantities of one row.

    Args:
        heads: what heads bring to the best answer; may be empty.
        grounding: layer -> share of phrases that each head grounds; may be empty.
    """
    found: Quantities = head_statistics([Encoding(question="", images=(), rows=(row,))]).by_quantity()
    if heads:
        found["gradient_weighted_attention"] = {
            direction: {layer: [float(f"{value:.{_DIGITS}g}") for value in values] for layer, values in layers.items()}
            for direction, layers in heads.items()
        }
    if grounding:
        found["phrases_grounded"] = {"text_to_regions": {layer: [*values] for layer, values in grounding.items()}}
    return found


def read_grounding(file: Path) -> tuple[str, dict[str, list[float]]]:
    """The weights' SHA-256 and, by layer, the share of phrases that each head grounds, as `visling analysis alignment`
    measured them.

    Raises:
        DataError: no such file, or it holds something else.
    """
    try:
        found = damage.parse_json(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}")
        shares = [[value / 100 for value in heads] for heads in found["phrases"]["accuracy"]]
        return str(found["checkpoint"]), dict(zip(found["layers"], shares, strict=True))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error}. Give the alignment.json of this model.") from error
    except damage.LAYOUT as error:
        raise DataError(
            f"{file} is not what `visling analysis alignment` writes ({error}); expected {FORMAT}. Give the "
            "alignment.json of this model."
        ) from error
