"""Hidden states of every layer of a data set, as files for probing and for encoding models of the brain.

The folder (docs/formats/states.md) is written shard by shard; an interrupted export resumes after its last whole shard.

Letters  N rows, T and R positions of text and regions of a row, what stands behind them included; D width of a state.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visling.analysis.encoding import EncodedRow, NamedRegion, Word
from visling.errors import ConfigError, DataError, RunError, nearest
from visling.regions.files import read_tensors, shard_name, write_atomically, write_tensors
from visling.types import Example

FORMAT: Final = "visling-states-1"
MANIFEST: Final = "states.json"
STREAMS: Final = ("text", "regions")

Dtype = Literal["float16", "float32"]

_SHARD_BYTES = 1 << 28
"""Size from which on a shard is closed at the end of a batch."""


def split_layers(row: EncodedRow) -> dict[str, dict[str, Tensor]]:
    """Layer -> stream -> its states, (T, D) of the text and (R, D) of the regions, in the order of computation. A layer
    over one sequence has both, as has one of two streams ("cross_layers.0")."""
    assert row.states is not None, "states of layers are captured: encode with capture=True"
    tokens = sum(len(word.tokens) for word in row.words)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, states in row.states.items():
        base, _, last = name.rpartition(".")
        if last in STREAMS:
            layers.setdefault(base, {})[last] = states
        elif "region" in name:
            layers[name] = {"regions": states}
        elif "text" in name:
            layers[name] = {"text": states}
        else:
            layers[name] = {"text": states[:tokens], "regions": states[tokens:]}
    return layers


class StatesWriter:
    """Writes the states of examples into a folder.

    Args:
        about: where the states come from, kept in the manifest; plain JSON values, which must be the same when writing
            resumes.
        layers: names of those that are kept; None = all.
        pooled: whether the pooled states are kept.
        dtype: how states are stored.
        resume: continue an interrupted export.
        shard_bytes: size from which on a shard is closed.
    Raises:
        RunError: the folder holds something, or with `resume` no export, a finished one, or one of another model, data
            set or choice; or it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        *,
        layers: Sequence[str] | None = None,
        pooled: bool = True,
        dtype: Dtype = "float32",
        resume: bool = False,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self._folder, self._wanted, self._pooled = folder, layers, pooled
        self._dtype, self._shard_bytes = dtype, shard_bytes
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "complete": False,
            "about": dict(about),
            "chosen": {"layers": None if layers is None else list(layers), "pooled": pooled, "dtype": dtype},
            "layers": {},
            "examples": 0,
            "rows": 0,
            "shards": [],
        }
        self._open(resume)
        self._rows: list[dict[str, Any]] = []
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self._bytes = self._new_examples = 0

    @property
    def examples(self) -> int:
        """How many are in whole shards; the next one to be added has this number."""
        return int(self._manifest["examples"])

    def _open(self, resume: bool) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            held = sorted(entry.name for entry in self._folder.iterdir())
        except OSError as error:
            raise RunError(f"cannot make the folder {self._folder}: {error}. Use another --out.") from error
        if not held:
            return
        if not resume:
            raise RunError(
                f"{self._folder} is not empty: it holds {', '.join(held[:5])}. Use another --out, or --resume to "
                "continue an interrupted export."
            )
        known = _read_manifest(self._folder)
        if known["complete"]:
            raise RunError(f"the states in {self._folder} are complete: there is nothing to resume. Use another --out.")
        for name in ("about", "chosen"):
            if known[name] != self._manifest[name]:
                raise RunError(
                    f"the export in {self._folder} was begun with other inputs: "
                    f"{_describe_change(known[name], self._manifest[name])}. Resume with the same model, data and "
                    "choices, or use another --out."
                )
        self._manifest = known

    def add(self, example: Example, rows: Sequence[EncodedRow]) -> None:
        """Add one example.

        Raises:
            ConfigError: a layer that was asked for is not there.
            DataError: a state that half precision cannot hold.
        """
        for number, row in enumerate(rows):
            self._rows.append(_describe_row(example, number, row))
            self._keep("text_lengths", np.array([sum(len(word.tokens) for word in row.words)], np.int64))
            self._keep("region_lengths", np.array([len(row.regions)], np.int64))
            self._keep("text_special", np.array([w.special for w in row.words for _ in w.tokens], np.uint8))
            self._keep("region_special", np.array([region.special for region in row.regions], np.uint8))
            if self._pooled:
                self._keep_states("pooled", row.pooled[None])
            if row.states is not None:
                self._add_layers(split_layers(row))
        self._new_examples += 1

    def _add_layers(self, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
        wanted = list(layers) if self._wanted is None else self._wanted
        for name in wanted:
            if name not in layers and name not in self._manifest["layers"]:
                raise ConfigError(f"no layer {name!r}. {nearest(name, layers)} Layers: {', '.join(layers)}.")
            for stream, states in layers.get(name, {}).items():
                self._manifest["layers"].setdefault(name, {})[stream] = states.shape[1]
                self._keep_states(f"{stream}/{name}", states)

    def _keep_states(self, name: str, states: Tensor) -> None:
        with np.errstate(over="ignore"):
            values = states.cpu().numpy().astype(self._dtype)
        if self._dtype == "float16" and not np.isfinite(values).all():
            raise DataError(
                f"{name} has a state of {float(states.abs().max()):.3g}, which half precision cannot hold. Use --dtype "
                "float32."
            )
        self._keep(name, values)

    def _keep(self, name: str, values: NDArray[Any]) -> None:
        self._parts.setdefault(name, []).append(values)
        self._bytes += values.nbytes

    def end_batch(self) -> None:
        """Write a shard, if what was added is large enough. Resuming begins behind the last one."""
        if self._bytes >= self._shard_bytes:
            self._write_shard()

    def finish(self) -> None:
        """Write what is left and mark the export as complete."""
        if self._rows:
            self._write_shard()
        self._write_manifest(complete=True)

    def _write_shard(self) -> None:
        file = shard_name(len(self._manifest["shards"]))
        tensors = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        widest_first = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        try:
            write_tensors(self._folder / file, widest_first)
            write_atomically(self._folder / _rows_file(file), lines.encode("utf-8"))
        except OSError as error:
            raise _cannot_write(self._folder, error) from error
        self._manifest["shards"].append({"file": file, "rows": len(self._rows)})
        self._manifest["rows"] += len(self._rows)
        self._manifest["examples"] += self._new_examples
        self._rows, self._parts, self._bytes, self._new_examples = [], {}, 0, 0
        self._write_manifest(complete=False)

    def _write_manifest(self, *, complete: bool) -> None:
        self._manifest["complete"] = complete
        try:
            write_atomically(self._folder / MANIFEST, (json.dumps(self._manifest, indent=2) + "\n").encode("utf-8"))
        except OSError as error:
            raise _cannot_write(self._folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> RunError:
    return RunError(f"cannot write to {folder}: {error}. Free space or fix permissions, then repeat with --resume.")


def _rows_file(shard: str) -> str:
    """Name of the file that describes the rows of a shard."""
    return shard.replace(".safetensors", ".jsonl")


def _describe_row(example: Example, number: int, row: EncodedRow) -> dict[str, Any]:
    return {
        "id": example.id,
        "row": number,
        "images": list(example.images),
        "words": [dataclasses.asdict(word) for word in row.words],
        "regions": [dataclasses.asdict(region) for region in row.regions],
    }


def _describe_change(known: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first setting that differs."""
    key = next(key for key in {**known, **found} if known.get(key) != found.get(key))
    return f"{key} was {known.get(key)!r}, now it is {found.get(key)!r}"


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Contents of states.json.

    Raises:
        DataError: none there, a damaged one, or one of another format.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"no hidden states in {folder}: cannot read {MANIFEST} ({error}). Give the folder that `visling analysis "
            "states` wrote."
        ) from error
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}). Export the states again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file} does not describe hidden states: expected format {FORMAT!r}. Check the path.")
    return manifest


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StateRow:
    """A row of an example: a question, a caption with one image of a pair, a question with one of its choices."""

    id: str
    """Of the example."""
    row: int
    """Number among the rows of the example."""
    images: tuple[str, ...]
    """Ids of the example's images."""
    words: tuple[Word, ...]
    regions: tuple[NamedRegion, ...]
    text: Mapping[str, NDArray[Any]]
    """Layer -> (T, D)."""
    region_states: Mapping[str, NDArray[Any]]
    """Layer -> (R, D)."""
    pooled: NDArray[Any] | None
    """(Dp,), if it was kept."""

    def __repr__(self) -> str:
        """One line."""
        words = " ".join(word.text for word in self.words)
        return f'StateRow({self.id}, "{words}", {len(self.regions)} regions, {len(self.text)} layers)'


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shard:
    """A mapped file and where its rows are."""

    rows: list[dict[str, Any]]
    tensors: dict[str, NDArray[Any]]
    bounds: dict[str, NDArray[np.int64]]
    """Stream -> (rows + 1,) first position of each row, and the end."""


class States(Sequence[StateRow]):
    """Hidden states on disk: a sequence of rows, mapped and not read until they are asked for."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], shards: Sequence[_Shard]) -> None:
        self.folder, self.about, self._shards = folder, manifest["about"], shards
        self.layers: dict[str, dict[str, int]] = manifest["layers"]
        """Layer -> stream ("text", "regions") -> width D, in the order of computation."""
        self.dtype: str = manifest["chosen"]["dtype"]
        self._starts = list(itertools.accumulate((len(shard.rows) for shard in shards), initial=0))

    def __repr__(self) -> str:
        """One line."""
        return f"States({self.folder}: {len(self)} rows, layers {', '.join(self.layers) or 'none'}, {self.dtype})"

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> StateRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[StateRow]: ...
    def __getitem__(self, index: int | slice) -> StateRow | list[StateRow]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        number = bisect.bisect_right(self._starts, places) - 1
        return self._read_row(self._shards[number], places - self._starts[number])

    def _read_row(self, shard: _Shard, at: int) -> StateRow:
        found = shard.rows[at]
        parts: dict[str, dict[str, NDArray[Any]]] = {stream: {} for stream in STREAMS}
        for layer, streams in self.layers.items():
            for stream in streams:
                low, high = shard.bounds[stream][at : at + 2]
                parts[stream][layer] = self._states_of(shard, layer, stream)[low:high]
        return StateRow(
            id=found["id"],
            row=found["row"],
            images=tuple(found["images"]),
            words=tuple(_build_word(word) for word in found["words"]),
            regions=tuple(_build_region(region) for region in found["regions"]),
            text=parts["text"],
            region_states=parts["regions"],
            pooled=shard.tensors["pooled"][at] if "pooled" in shard.tensors else None,
        )

    def _states_of(self, shard: _Shard, layer: str, stream: str) -> NDArray[Any]:
        """(positions, D) of a shard; none where all its rows lack the stream."""
        return shard.tensors.get(f"{stream}/{layer}", np.empty((0, self.layers[layer][stream]), self.dtype))

    def blocks(self, layer: str, stream: str) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], NDArray[np.bool_]]]:
        """The states of a layer shard by shard: (positions, D) mapped, the number of the row that each position belongs
        to, and whether it is special.

        Raises:
            ConfigError: no such layer, or it has no states of the stream.
        """
        self._check(layer, stream)
        for shard, start in zip(self._shards, self._starts, strict=False):
            bounds = shard.bounds[stream]
            rows = np.repeat(np.arange(start, start + len(shard.rows)), np.diff(bounds))
            special = shard.tensors[f"{'text' if stream == 'text' else 'region'}_special"].astype(bool)
            yield self._states_of(shard, layer, stream), rows, special

    def stack(self, layer: str, stream: str = "text") -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.bool_]]:
        """`blocks` joined: the states of all rows one behind the other."""
        states, rows, special = zip(*self.blocks(layer, stream), strict=True)
        return np.concatenate(states), np.concatenate(rows), np.concatenate(special)

    def padded(self, layer: str, stream: str = "text") -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(N, longest, D) states, zeros behind the last position of a row, and the mask (N, longest), True = real."""
        states, rows, _ = self.stack(layer, stream)
        counts = np.bincount(rows, minlength=len(self))
        mask = np.arange(int(counts.max(initial=0))) < counts[:, None]
        filled = np.zeros((*mask.shape, states.shape[1]), states.dtype)
        filled[mask] = states
        return filled, mask

    def pooled(self) -> NDArray[Any]:
        """(N, Dp).

        Raises:
            ConfigError: they were not kept.
        """
        if any("pooled" not in shard.tensors for shard in self._shards):
            raise ConfigError(f"{self.folder} holds no pooled states: they were left out when it was written.")
        return np.concatenate([shard.tensors["pooled"] for shard in self._shards])

    def _check(self, layer: str, stream: str) -> None:
        if layer not in self.layers:
            raise ConfigError(f"{self.folder} holds no layer {layer!r}. {nearest(layer, self.layers)}")
        if stream not in self.layers[layer]:
            raise ConfigError(
                f"layer {layer!r} has no states of {stream!r}; it has: {', '.join(self.layers[layer])}. Layers with "
                f"{stream}: {', '.join(name for name, streams in self.layers.items() if stream in streams)}."
            )


def read_states(folder: str | Path) -> States:
    """The hidden states that `visling analysis states` wrote.

    Raises:
        DataError: none there, an interrupted export, or damaged files.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if not manifest["complete"]:
        raise DataError(
            f"the states in {folder} are not complete: writing them was interrupted after {manifest['examples']} "
            "examples. Repeat the command with --resume."
        )
    return States(folder, manifest, [_read_shard(folder, entry) for entry in manifest["shards"]])


def _read_shard(folder: Path, entry: Mapping[str, Any]) -> _Shard:
    try:
        tensors = read_tensors(folder / entry["file"])
        text = (folder / _rows_file(entry["file"])).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        bounds = {
            stream: np.concatenate([[0], np.cumsum(tensors[name])]).astype(np.int64)
            for stream, name in (("text", "text_lengths"), ("regions", "region_lengths"))
        }
        if not len(rows) == entry["rows"] == len(tensors["text_lengths"]):
            raise ValueError(f"{len(rows)} rows where the manifest has {entry['rows']}")
        for name, values in tensors.items():
            stream = name.partition("/")[0]
            if stream in STREAMS and len(values) != bounds[stream][-1]:
                raise ValueError(f"{name} has {len(values)} states for rows of {bounds[stream][-1]} in all")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder / entry['file']} is damaged or missing ({error}). Copy the folder again, or repeat the export."
        ) from error
    return _Shard(rows=rows, tensors=tensors, bounds=bounds)


def _build_word(found: Mapping[str, Any]) -> Word:
    return Word(
        text=found["text"], tokens=tuple(found["tokens"]), pieces=tuple(found["pieces"]), special=found["special"]
    )


def _build_region(found: Mapping[str, Any]) -> NamedRegion:
    box = found["box"]
    return NamedRegion(**{**found, "box": None if box is None else tuple(box)})
