"""Labels of examples side by side, as `Targets` holds them.

Letters  B batch rows, R regions, G rows per example, N = B/G examples, A answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.answers import SoftScores
from visling.errors import ConfigError, DataError, nearest
from visling.types import IGNORE, Example, Targets

REGION_LABELS = frozenset({"region_scores", "phrase_boxes", "object_classes"})
"""Labels with one entry per region in their last dimension."""

_PER_ROW = frozenset({"matched"}) | REGION_LABELS
"""Labels that belong to rows, not to examples."""

_NAMES = frozenset(field.name for field in dataclasses.fields(Targets)) - {
    "token_slots",
    "token_ids",
    "class_slots",
    "feature_slots",
}


def stack_labels(
    examples: Sequence[Example], labels: Sequence[Mapping[str, Any]], group: int, *, regions: int = 0
) -> dict[str, Tensor]:
    """Labels by `Targets` name; an integer label that some examples lack is IGNORE there.

    Args:
        labels: of each example, by name.
        group: rows per example; labels of rows are then G values, or one for all of them.
        regions: R of the batch, to which labels of regions are padded.
    Raises:
        ConfigError: a label that `Targets` does not know.
        DataError: a label that only some examples have, or not one for each row.
    """
    stacked = {}
    for name in dict.fromkeys(name for each in labels for name in each):
        if name not in _NAMES:
            raise ConfigError(
                f"label {name!r} of example {examples[0].id!r} is not a field of Targets. {nearest(name, _NAMES)}"
            )
        values = [each.get(name) for each in labels]
        owners = examples
        if name in _PER_ROW and group > 1:
            values = [
                item
                for example, value in zip(examples, values, strict=True)
                for item in _spread(name, value, example, group)
            ]
            owners = [example for example in examples for _ in range(group)]
        stacked[name] = _stack(name, values, owners, regions if name in REGION_LABELS else 0)
    return stacked


def drop_mismatched_answers(labels: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    """The labels without the answer to a question that is shown with another image (`matched` 0)."""
    if group == 1 and "matched" in labels and "answer" in labels and labels["answer"].dim() == 1:
        return labels | {"answer": labels["answer"].masked_fill(labels["matched"] == 0, IGNORE)}
    return labels


def _spread(name: str, value: Any, example: Example, group: int) -> Sequence[Any] | NDArray[Any]:
    """One value for each row of an example."""
    if not isinstance(value, (Sequence, np.ndarray)):
        return [value] * group
    if len(value) != group:
        raise DataError(
            f"example {example.id!r} has {len(value)} values of the label {name!r} for {group} rows; "
            "expected one for each row."
        )
    return value


def _stack(name: str, values: Sequence[Any], examples: Sequence[Example], regions: int) -> Tensor:
    present = next(value for value in values if value is not None)
    if isinstance(present, (int, np.integer, np.bool_)):
        return torch.tensor([IGNORE if value is None else int(value) for value in values], dtype=torch.int64)
    if lacking := [number for number, value in enumerate(values) if value is None]:
        raise DataError(
            f"example {examples[lacking[0]].id!r} lacks the label {name!r} that others of its batch have; "
            "only integer labels may be left out."
        )
    if isinstance(present, (float, np.floating)):
        return torch.tensor(values, dtype=torch.float32)
    if isinstance(present, SoftScores):
        return _stack_scores(values)
    return _stack_arrays([np.asarray(value) for value in values], regions)


def _stack_scores(values: Sequence[SoftScores]) -> Tensor:
    """Soft scores as (N, A)."""
    dense = np.zeros((len(values), values[0].size), np.float32)
    at = np.repeat(np.arange(len(values)), [len(value.indices) for value in values])
    dense[at, np.concatenate([value.indices for value in values])] = np.concatenate([value.scores for value in values])
    return torch.from_numpy(dense)


def _stack_arrays(arrays: Sequence[NDArray[Any]], regions: int) -> Tensor:
    """Arrays side by side, the shorter padded, the last dimension to at least `regions`: integers with IGNORE, others
    with zero."""
    integers = np.issubdtype(arrays[0].dtype, np.integer)
    shape = np.max([array.shape for array in arrays], axis=0)
    shape[-1] = max(shape[-1], regions)
    full = np.full((len(arrays), *shape), IGNORE if integers else 0, np.int64 if integers else np.float32)
    for number, array in enumerate(arrays):
        full[number][tuple(slice(length) for length in array.shape)] = array
    return torch.from_numpy(full)
