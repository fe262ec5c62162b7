"""What the heads of a model attend to, in numbers: means over the words and regions that attend, per layer and head.

A direction names who attends to what: a text query attends to regions in "text_to_regions". In a layer over one
sequence, a query's attention is spread over text and regions, and each direction has a part of it: its `mass`, which in
"text_to_regions" is the share that crosses to the other modality. In a layer whose queries see one modality alone
(co-attention, the layers of one stream), that share is 1 by construction and says nothing.

What is no word or detected region ([CLS], [SEP], [MASK], a task token, the whole image, [END]) does not count as a
query; its queries are counted apart. As a key it does count: `special_mass` says how much of the attention it draws. A
row without any word or detected region to attend to (an image in which nothing was found) is left out of that
direction.

Letters  L layers, H heads, M queries, N keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.analysis.encoding import EncodedRow, Encoding
from visling.analysis.matrices import render_matrix
from visling.analysis.page import REPORT_STYLE, escape, render_page
from visling.types import Maps

FORMAT: Final = "visling-heads-1"

CAUTION: Final = "Attention is not an explanation: it says where information could flow, not what decided the answer."

DIRECTIONS: Final = ("text_to_text", "text_to_regions", "regions_to_text", "regions_to_regions")
"""Who attends to what; a model has maps of some of them in each layer."""

QUANTITIES: Final[Mapping[str, str]] = {
    "mass": "share of a query's attention that goes in this direction; across modalities in text_to_regions and "
    "regions_to_text; 1 by construction in layers whose queries see one modality alone",
    "special_mass": "share of a query's attention on the special tokens or regions of this direction: [CLS], [SEP], "
    "[MASK], a task token, the whole image, [END]",
    "largest_mass": "largest share of a query's attention on one word piece or detected region of this direction",
    "own_mass": "share of a query's attention on its own position; within one modality only",
    "entropy": "entropy in nats of a query's attention over all keys of this direction, special ones included, scaled "
    "to sum to 1",
    "normalised_entropy": "entropy divided by that of uniform attention over the same keys: 0 on one key, 1 uniform; "
    "queries with a single key are left out",
}
"""Quantity -> what it is; each is a mean over queries."""

_WITHIN: Final = ("text_to_text", "regions_to_regions")
"""Directions in which a query is one of its own keys."""


def maps_by_direction(maps: Maps) -> dict[str, dict[str, Tensor]]:
    """Direction -> layer -> map, of the directions that a model has maps of."""
    found: dict[str, dict[str, Tensor]] = {direction: getattr(maps, direction) for direction in DIRECTIONS}
    return {direction: layers for direction, layers in found.items() if layers}


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectionStatistics:
    """Heads of all layers that have maps of one direction."""

    layers: tuple[str, ...]
    """In the order of computation."""
    by_construction: tuple[str, ...]
    """Layers whose queries see no other modality: their mass is 1 whatever was learned."""
    queries: int
    """Words or regions that attend, over which the means are."""
    special_queries: int
    """Special tokens or regions, left out of the means."""
    quantities: Mapping[str, NDArray[np.float64]]
    """Quantity -> (L, H) means, see `QUANTITIES`; NaN where there is nothing to average, or a layer has fewer heads."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadStatistics:
    """Statistics of the heads of a model, over a question, a batch or a data set."""

    questions: int
    directions: Mapping[str, DirectionStatistics]

    def __repr__(self) -> str:
        """A line per direction."""
        lines = [f"HeadStatistics({self.questions} question{'' if self.questions == 1 else 's'})"]
        for name, part in self.directions.items():
            heads = part.quantities["mass"].shape[1]
            lines.append(f"  {name}: {len(part.layers)} layers x {heads} heads, {part.queries} queries")
        return "\n".join(lines)

    def array(self, quantity: str, direction: str) -> NDArray[np.float64]:
        """(L, H) means of a quantity."""
        return self.directions[direction].quantities[quantity]

    def by_quantity(self) -> dict[str, dict[str, dict[str, list[float | None]]]]:
        """Quantity -> direction -> layer -> mean of each head; None where there is nothing to average."""
        return {
            quantity: {
                direction: {
                    layer: [None if np.isnan(value) else float(value) for value in values]
                    for layer, values in zip(part.layers, part.quantities[quantity], strict=True)
                }
                for direction, part in self.directions.items()
                if quantity in part.quantities
            }
            for quantity in QUANTITIES
        }

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, with a sentence on what each quantity is."""
        return {
            "format": FORMAT,
            "questions": self.questions,
            "directions": {
                name: {
                    "layers": list(part.layers),
                    "mass_is_1_by_construction": list(part.by_construction),
                    "queries": part.queries,
                    "special_queries": part.special_queries,
                }
                for name, part in self.directions.items()
            },
            "quantities": dict(QUANTITIES),
            "statistics": self.by_quantity(),
        }

    def draw(self, quantity: str, direction: str) -> str:
        """Layers x heads as inline SVG, with the mean of each layer.

        Shares are drawn on a scale from 0 to 1, entropy in nats on one that ends at the largest mean of any direction:
        the colours of heads, layers and directions can be compared.
        """
        part = self.directions[direction]
        values, high = part.quantities[quantity], 1.0
        if quantity == "entropy":
            high = max(
                float(np.nanmax(other.quantities[quantity])) for other in self.directions.values() if other.queries
            )
        title = f"{direction.replace('_', ' ')}: {quantity.replace('_', ' ')}"
        return render_matrix(
            title, values, part.layers, [str(head) for head in range(values.shape[1])], high=high, means=True
        )

    def _repr_html_(self) -> str:
        """A matrix for each direction: the mass, or where that is 1 by construction the largest mass on one key."""
        drawn = [
            self.draw("largest_mass" if part.by_construction == part.layers else "mass", direction)
            for direction, part in self.directions.items()
            if part.queries
        ]
        return "".join(f"<div>{figure}</div>" for figure in drawn)


@dataclass
class _Sums:
    """Of one direction so far."""

    queries: int = 0
    special_queries: int = 0
    sums: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    """Quantity -> layer -> (H,) sum over queries."""
    counts: dict[str, int] = field(default_factory=dict)
    """Quantity -> queries in its sums."""
    layers: dict[str, int] = field(default_factory=dict)
    """Layer -> its heads."""
    by_construction: set[str] = field(default_factory=set)
    """Layers whose mass is 1 whatever was learned."""


class HeadSums:
    """Collects the statistics of any number of questions in memory that does not grow with them."""

    def __init__(self) -> None:
        self._questions = 0
        self._directions: dict[str, _Sums] = {}

    def add(self, rows: Iterable[EncodedRow]) -> None:
        """Add the rows of one question, captured."""
        self._questions += 1
        for row in rows:
            assert row.maps is not None, "statistics need captured maps: encode with capture=True"
            special = {
                "text": torch.tensor([word.special for word in row.words for _ in word.tokens], dtype=torch.bool),
                "regions": torch.tensor([region.special for region in row.regions], dtype=torch.bool),
            }
            for direction, maps in maps_by_direction(row.maps).items():
                query, key = (special[stream] for stream in direction.split("_to_"))
                sums = self._directions.setdefault(direction, _Sums())
                sums.layers |= {layer: len(probs) for layer, probs in maps.items()}
                sums.by_construction |= {layer for layer in maps if not _sees_both(row.maps, direction, layer)}
                if not query.all() and not key.all():
                    _add_direction(sums, maps, query, key, within=direction in _WITHIN)

    def statistics(self) -> HeadStatistics:
        """The means so far."""
        return HeadStatistics(
            questions=self._questions,
            directions={
                name: _average(self._directions[name], within=name in _WITHIN)
                for name in DIRECTIONS
                if name in self._directions
            },
        )


def head_statistics(encodings: Iterable[Encoding]) -> HeadStatistics:
    """Statistics of the heads over encoded questions, which may be an iterator over a whole data set.

    Args:
        encodings: captured (`capture=True`).
    """
    sums = HeadSums()
    for encoding in encodings:
        sums.add(encoding.rows)
    return sums.statistics()


def render_heads(statistics: HeadStatistics, title: str) -> str:
    """One HTML page with a matrix of layers and heads for every quantity and direction."""
    parts = [f"<h1>What the heads attend to</h1><p>{escape(title)}, {statistics.questions} examples.</p>"]
    for quantity, meaning in QUANTITIES.items():
        drawn = [
            statistics.draw(quantity, direction)
            for direction, part in statistics.directions.items()
            if quantity in part.quantities and part.queries
        ]
        parts.append(
            f"<h2>{escape(quantity.replace('_', ' ').capitalize())}</h2><p>{escape(meaning)}.</p>"
            f'<div class="charts">{"".join(f"<div>{figure}</div>" for figure in drawn)}</div>'
        )
    parts.append(f"<p>{CAUTION}</p>")
    return render_page("What the heads attend to", "".join(parts), REPORT_STYLE)


def _sees_both(maps: Maps, direction: str, layer: str) -> bool:
    """Whether a query of a layer attends to both modalities."""
    source = direction.partition("_to_")[0]
    return all(layer in getattr(maps, f"{source}_to_{target}") for target in ("text", "regions"))


def _add_direction(sums: _Sums, maps: Mapping[str, Tensor], query: Tensor, key: Tensor, *, within: bool) -> None:
    """Add the queries of one row in one direction.

    Args:
        maps: layer -> (H, M, N).
        query, key: (M,) and (N,), whether special.
    """
    sums.queries += int((~query).sum())
    sums.special_queries += int(query.sum())
    for heads in {len(probs) for probs in maps.values()}:
        layers = [layer for layer, probs in maps.items() if len(probs) == heads]
        stacked = torch.stack([maps[layer] for layer in layers]).float()
        for quantity, values in measure(stacked, query, key, within=within).items():
            totals = values.cpu().double().sum(2).numpy()  # (L, H)
            known = sums.sums.setdefault(quantity, {})
            for layer, total in zip(layers, totals, strict=True):
                known[layer] = known[layer] + total if layer in known else total
    for quantity in QUANTITIES:
        if (quantity != "own_mass" or within) and (quantity != "normalised_entropy" or len(key) > 1):
            sums.counts[quantity] = sums.counts.get(quantity, 0) + int((~query).sum())


def measure(maps: Tensor, query: Tensor, key: Tensor, *, within: bool) -> dict[str, Tensor]:
    """Each of `QUANTITIES` that applies, (L, H, queries), of the queries that are not special.

    Args:
        maps: (L, H, M, N) attention of one row in one direction, without padding.
        query, key: (M,) and (N,), whether special.
        within: whether queries and keys are the same positions.
    """
    real = (~query).nonzero()[:, 0]
    probs = maps[:, :, real]
    mass = probs.sum(-1)
    shares = probs / mass.clamp(min=torch.finfo(mass.dtype).tiny)[..., None]
    entropy = torch.special.entr(shares).sum(-1)
    found = {
        "mass": mass,
        "special_mass": probs[..., key.nonzero()[:, 0]].sum(-1),
        "largest_mass": probs[..., (~key).nonzero()[:, 0]].amax(-1),
        "entropy": entropy,
    }
    if within:
        found["own_mass"] = maps.diagonal(dim1=2, dim2=3)[:, :, real]
    if len(key) > 1:
        found["normalised_entropy"] = entropy / float(np.log(len(key)))
    return found


def _average(sums: _Sums, *, within: bool) -> DirectionStatistics:
    """The means of one direction."""
    quantities = {}
    for quantity in QUANTITIES:
        if quantity == "own_mass" and not within:
            continue
        means = np.full((len(sums.layers), max(sums.layers.values())), np.nan)
        for number, layer in enumerate(sums.layers):
            if (total := sums.sums.get(quantity, {}).get(layer)) is not None:
                means[number, : len(total)] = total / sums.counts[quantity]
        quantities[quantity] = means
    return DirectionStatistics(
        layers=tuple(sums.layers),
        by_construction=tuple(layer for layer in sums.layers if layer in sums.by_construction),
        queries=sums.queries,
        special_queries=sums.special_queries,
        quantities=quantities,
    )
