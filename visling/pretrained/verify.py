"""Does a checkpoint compute what was recorded? Names the first layer that does not.

A recording (`record` writes one) is a batch and the output of every layer for it.

Letters  B rows, T tokens, R regions.
Order    Native names and order: text, then regions, then what a model adds behind them (whole image, task token,
         [END]).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from visling import models
from visling.errors import CheckpointError, VislingError
from visling.models.task_model import SavedHead
from visling.nn import heads
from visling.pretrained.folder import ModelFolder, claim_folder, read_model_folder
from visling.runtime import versions
from visling.types import Batch, Encoded, Regions, Text

ATOL, RTOL = 5e-5, 1e-5
"""A value agrees if |ours - recorded| <= ATOL + RTOL |recorded|; for float32 on two machines, twelve layers deep."""

FORMAT = 1
"""Version of a native recording."""

_ROWS, _TOKENS, _REGIONS = 4, 12, 6


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A batch, and what was recorded for it."""

    batch: Batch
    values: Mapping[str, Tensor]
    """Name -> output of a layer or head, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How one layer compares."""

    name: str
    largest: float
    """Largest absolute difference at a real position; infinite where one side has no such value or another shape."""
    agrees: bool


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A checkpoint compared with a recording, layer by layer in the order in which they run. Prints as a table."""

    recording: str
    layers: tuple[Deviation, ...]
    atol: float
    rtol: float

    @property
    def first(self) -> str | None:
        """The first layer that differs; None if all agree."""
        return next((layer.name for layer in self.layers if not layer.agrees), None)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [
            f"{layer.name:<{width}}  {layer.largest:>9.2e}  {'' if layer.agrees else 'differs'}".rstrip()
            for layer in self.layers
        ]
        end = "all agree" if self.first is None else f"first to differ: {self.first}"
        return "\n".join([*rows, f"{end} (tolerance {self.atol:g} + {self.rtol:g} of the value)"])


def verify(checkpoint: Path, recording: Path, *, atol: float = ATOL, rtol: float = RTOL) -> Verification:
    """Compare a model folder with a recording, in float32 on the CPU.

    Args:
        recording: folder that `record` wrote.
    Raises:
        CheckpointError: no model, no recording, another family, or inputs that the model cannot read.
    """
    saved = read_model_folder(checkpoint)
    return compare(saved, _read_recording(saved, recording), str(recording), atol=atol, rtol=rtol)


def compare(
    saved: ModelFolder, recording: Recording, name: str, *, atol: float = ATOL, rtol: float = RTOL
) -> Verification:
    """Compare a model folder that has been read with a recording; see `verify`."""
    batch, recorded = recording.batch, recording.values
    ours = _compute_values(saved, batch)
    # Our order is that in which layers run; what only the recording has comes last.
    names = [*(layer for layer in ours if layer in recorded), *(layer for layer in recorded if layer not in ours)]
    layers = tuple(_compare_layer(layer, ours.get(layer), recorded[layer], batch, atol, rtol) for layer in names)
    return Verification(recording=name, layers=layers, atol=atol, rtol=rtol)


def record(checkpoint: Path, folder: Path, *, seed: int = 0) -> tuple[str, ...]:
    """Write a random batch and the output of every layer of a model for it; returns the names of the layers.

    Raises:
        CheckpointError: no model, or the folder is not empty.
    """
    saved = read_model_folder(checkpoint)
    batch = sample_batch(saved, seed)
    values = _compute_values(saved, batch)
    claim_folder(folder)
    described = {"format": FORMAT, "model": saved.model, "layers": list(values), "seed": seed, "versions": versions()}
    try:
        save_file(_flatten_batch(batch), folder / "batch.safetensors")
        save_file({name: tensor.contiguous().clone() for name, tensor in values.items()}, folder / "values.safetensors")
        (folder / "recording.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write the recording to {folder}: {error}. Free space or use another folder."
        ) from error
    return tuple(values)


@torch.inference_mode()
def _compute_values(saved: ModelFolder, batch: Batch) -> dict[str, Tensor]:
    """Name -> output of every captured layer, the encoder's results, and the logits of the heads, as they run."""
    encoder = saved.encoder().eval()
    built = {place: saved.head(place, encoder).eval() for place in saved.heads}
    try:
        encoded = encoder(batch, capture=True)
        assert encoded.states is not None
        values = {**encoded.states, "text": encoded.text, "regions": encoded.regions, "pooled": encoded.pooled}
        if encoded.whole is not None:
            values["whole"] = encoded.whole
        for place, head in built.items():
            values |= _head_logits(saved.heads[place], head, encoded, batch)
    except VislingError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"the recorded inputs do not fit {saved.path}: {error}. Record them with a model of the same settings."
        ) from error
    return {name: value.float() for name, value in values.items()}


def _head_logits(saved: SavedHead, head: nn.Module, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
    """Logits of a head for a batch, by name: for words and phrases at every token; for heads that see several rows of
    consecutive rows, without an incomplete rest."""
    name, kind = saved.part, saved.head.kind
    if kind == "projection" and saved.part.startswith("text_"):
        encoded = dataclasses.replace(encoded, regions=encoded.text)
    elif kind == "regions":
        name = f"{saved.part}.scores"  # the states of the regions are called "regions"
    elif kind == "region_targets":
        encoded = dataclasses.replace(encoded, whole=None)  # recorded of the regions alone
    elif incomplete := len(encoded.pooled) % saved.group:
        encoded = dataclasses.replace(encoded, pooled=encoded.pooled[:-incomplete])
    if len(encoded.pooled) == 0:
        return {}
    return heads.flatten(name, heads.read(kind, head, encoded, dataclasses.replace(batch, group=saved.group)))


def _compare_layer(
    name: str, ours: Tensor | None, recorded: Tensor, batch: Batch, atol: float, rtol: float
) -> Deviation:
    if ours is None or ours.shape != recorded.shape:
        return Deviation(name=name, largest=float("inf"), agrees=False)
    if ours.dim() > 1 and (real := _real_positions(name, ours.shape[1], batch)) is not None:
        ours, recorded = ours[real], recorded[real]
    difference = (ours - recorded).abs()
    agrees = bool((difference <= atol + rtol * recorded.abs()).all())  # False where either is NaN
    return Deviation(name=name, largest=difference.max().item() if difference.numel() else 0.0, agrees=agrees)


def _real_positions(name: str, length: int, batch: Batch) -> Tensor | None:
    """Real positions (B, N) of a layer's states, with those that a model adds behind; None where a layer has no
    positions."""
    text = batch.text.mask
    regions = text[:, :0] if batch.regions is None else batch.regions.mask
    mask = {"text": text, "regions": regions, "both": torch.cat([text, regions], dim=1)}.get(_stream_of(name))
    return None if mask is None else F.pad(mask, (0, length - mask.shape[1]), value=True)


def _stream_of(name: str) -> str:
    """Whose positions the second axis of a layer has: "text", "regions", "both" one after the other, or none, where it
    is a summary."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if last == "text" or first.startswith(("text", "vocabulary", "slots_regions")):
        return "text"
    if last == "regions" or first.startswith(("region", "projection", "objects")):
        return "regions"
    return "both" if first in ("embeddings", "layers", "additional_layer") else ""


def sample_batch(saved: ModelFolder, seed: int) -> Batch:
    """Four rows of random tokens and regions, of different lengths."""
    spec = models.spec(saved.model).inputs(saved.config)
    generator = torch.Generator().manual_seed(seed)
    tokens, regions = min(_TOKENS, spec.max_tokens), min(_REGIONS, spec.max_regions)
    lengths, counts = (
        torch.tensor([tokens, tokens - 3, tokens - 5, tokens]),
        torch.tensor([regions, max(regions - 2, 1), 1, max(regions - 1, 1)]),
    )
    text_mask, region_mask = torch.arange(tokens) < lengths[:, None], torch.arange(regions) < counts[:, None]
    corners = torch.rand(_ROWS, regions, 2, 2, generator=generator).sort(2).values * 0.9
    boxes = torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.1], dim=-1)  # (B, R, 4), sides of a tenth and more
    features = torch.randn(_ROWS, regions, spec.feature_size, generator=generator).relu()
    task = torch.arange(_ROWS) % spec.num_tasks if spec.num_tasks else None
    return Batch(
        text=Text(
            ids=torch.randint(1, saved.config.vocab_size, (_ROWS, tokens), generator=generator) * text_mask,
            mask=text_mask,
            segments=((torch.arange(tokens) >= tokens // 2) & text_mask).long(),
            answer_at=None if spec.answer_slot == "none" else lengths - 2,
            task=task,
        ),
        regions=Regions(
            features=features * region_mask[..., None],
            boxes=boxes * region_mask[..., None],
            mask=region_mask,
            size=torch.tensor([[640.0, 480.0]]).repeat(_ROWS, 1),
        ),
    )


def _flatten_batch(batch: Batch) -> dict[str, Tensor]:
    """Tensors of text and regions by dotted name."""
    assert batch.regions is not None
    fields = {f"text.{f.name}": getattr(batch.text, f.name) for f in dataclasses.fields(batch.text)}
    fields |= {f"regions.{f.name}": getattr(batch.regions, f.name) for f in dataclasses.fields(batch.regions)}
    return {name: tensor.contiguous() for name, tensor in fields.items() if tensor is not None}


def _read_recording(saved: ModelFolder, folder: Path) -> Recording:
    if not (folder / "recording.json").exists():
        raise CheckpointError(
            f"no recording in {folder}: expected recording.json. Write one with visling verify --record."
        )
    try:
        described = json.loads((folder / "recording.json").read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} is a recording of layout {described['format']}; this version reads {FORMAT}. Record it "
                "again."
            )
        if described["model"] != saved.model:
            raise CheckpointError(
                f"{folder} was recorded with {described['model']}, but {saved.path} holds {saved.model}. Name another "
                "recording."
            )
        flat, values = load_file(folder / "batch.safetensors"), load_file(folder / "values.safetensors")
        text: dict[str, Any] = {
            name.removeprefix("text."): tensor for name, tensor in flat.items() if name.startswith("text.")
        }
        regions: dict[str, Any] = {
            name.removeprefix("regions."): tensor for name, tensor in flat.items() if name.startswith("regions.")
        }
        batch = Batch(text=Text(**text), regions=Regions(**regions))
        return Recording(batch=batch, values={name: values[name] for name in described["layers"]})
    except (OSError, json.JSONDecodeError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the recording in {folder}: {error}. Record it again with visling verify --record."
        ) from error
