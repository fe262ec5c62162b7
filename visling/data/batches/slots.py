"""A fixed number of slots per row for the positions that a model predicts, so that batches come in few shapes.

Letters  B batch rows, N positions of a row, P slots, K slots of the whole batch that are read.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from visling.types import Slots

SLOT_MULTIPLE = 4
"""Slots per row are padded to a multiple of this."""
TAKEN_MULTIPLE = 16
"""Slots of a whole batch that are read are padded to a multiple of this, as far as there are free ones."""


def slots_of_grid(chosen: NDArray[np.bool_]) -> Slots:
    """Slots of the True positions of (B, N)."""
    return slots_of_counts(chosen.sum(1), np.nonzero(chosen)[1])


def slots_of_counts(counts: NDArray[np.int64], positions: NDArray[np.int64]) -> Slots:
    """Slots of `counts` (B,) positions per row, given for all rows one after the other."""
    width = -(-max(int(counts.max()), 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    mask = np.arange(width) < counts[:, None]
    at = np.zeros(mask.shape, np.int64)
    at[mask] = positions
    most = -(-max(int(counts.sum()), 1) // TAKEN_MULTIPLE) * TAKEN_MULTIPLE
    taken = np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)])[:most]
    return Slots(at=torch.from_numpy(at), mask=torch.from_numpy(mask), taken=torch.from_numpy(taken))
