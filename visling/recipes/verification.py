"""Does a checkpoint compute what was recorded? Names the first layer that does not.

A recording is either native (`record` writes one: a batch and what came out of every layer) or one of the sets recorded from the official releases
under their own names (`tests/golden` holds small ones); `_OFFICIAL` translates these.

Letters  B rows, T tokens, R regions.
Order    Native names and order: text, then regions, then what a model adds behind them (whole image, task token, [END]).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from visling import models
from visling.boxes import to_unit
from visling.errors import CheckpointError, VislingError
from visling.recipes import assembly
from visling.recipes.assembly import Saved, SavedHead
from visling.types import Batch, Encoded, Regions, Text

ATOL, RTOL = 5e-5, 1e-5
"""A value agrees if |ours - recorded| <= ATOL + RTOL |recorded|; float32 on two machines, twelve layers deep."""
FORMAT = 1
"""Version of a native recording."""

_ROWS, _TOKENS, _REGIONS = 4, 12, 6


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How one layer compares."""

    name: str
    largest: float
    """Largest absolute difference at a real position; infinite where one side has no such value or another shape."""
    agrees: bool


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A checkpoint beside a recording, layer by layer in the order in which they run. Prints as a table."""

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
        rows = [f"{layer.name:<{width}}  {layer.largest:>9.2e}  {'' if layer.agrees else 'differs'}".rstrip() for layer in self.layers]
        end = "all agree" if self.first is None else f"first to differ: {self.first}"
        return "\n".join([*rows, f"{end} (tolerance {self.atol:g} + {self.rtol:g} of the value)"])


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """Inputs, and what was recorded of them, under our names and in our order."""

    batch: Batch
    values: Mapping[str, Tensor]
    optional: tuple[str, ...] = field(default=())
    """Heads: compared where the checkpoint has them."""


def verify(checkpoint: Path, recording: Path, *, atol: float = ATOL, rtol: float = RTOL) -> Verification:
    """Compare a model folder with a recording, in float32 on the CPU.

    Args:
        recording: folder that `record` wrote, or of an official set.
    Raises:
        CheckpointError: no model or no recording there, of another family, or inputs that the model cannot read.
    """
    saved = assembly.read(checkpoint)
    found = _read_native(saved, recording) if (recording / "recording.json").exists() else _read_official(saved, recording)
    ours = _values(saved, found.batch)
    # Our order is that in which layers run; what only the recording has comes last.
    names = [name for name in ours if name in found.values] + [name for name in found.values if name not in ours and name not in found.optional]
    layers = tuple(_compare(name, ours.get(name), found.values[name], found.batch, atol, rtol) for name in names)
    return Verification(recording=str(recording), layers=layers, atol=atol, rtol=rtol)


def record(checkpoint: Path, folder: Path, *, seed: int = 0) -> tuple[str, ...]:
    """Write a made-up batch and what comes out of every layer of a model for it; returns the names of the layers.

    Raises:
        CheckpointError: no model there, or the folder holds something.
    """
    saved = assembly.read(checkpoint)
    batch = _sample(saved, seed)
    values = _values(saved, batch)
    assembly.claim(folder)
    described = {"format": FORMAT, "model": saved.model, "layers": list(values), "seed": seed, "versions": assembly.versions()}
    try:
        save_file(_flat(batch), folder / "batch.safetensors")
        save_file({name: tensor.contiguous().clone() for name, tensor in values.items()}, folder / "values.safetensors")
        (folder / "recording.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write the recording to {folder}: {error}. Free space or use another folder.") from error
    return tuple(values)


@torch.inference_mode()
def _values(saved: Saved, batch: Batch) -> dict[str, Tensor]:
    """Name -> output of every captured layer, the encoder's results, and the logits of the heads, as they run."""
    encoder = saved.encoder().eval()
    heads = {place: saved.head(place, encoder).eval() for place in saved.heads}
    try:
        encoded = encoder(batch, capture=True)
        assert encoded.states is not None
        found = {**encoded.states, "text": encoded.text, "regions": encoded.regions, "pooled": encoded.pooled}
        if encoded.whole is not None:
            found["whole"] = encoded.whole
        for place, head in heads.items():
            found |= _logits(saved.heads[place], head, encoded, batch)
    except VislingError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(f"the recorded inputs do not fit {saved.path}: {error}. Record them with a model of the same settings.") from error
    return {name: value.float() for name, value in found.items()}


def _logits(saved: SavedHead, head: nn.Module, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
    """What a head makes of a batch: words and phrases at every token; rows of an example as they follow one another, a rest left out."""
    part, kind = saved.part, saved.head.kind
    if kind == "vocabulary":
        return {part: head(encoded.text)}
    if kind == "region_targets":
        return {f"{part}.{name}": logits for name, logits in head(encoded.regions).items()}
    if kind == "projection":
        return {part: head(encoded.text if part.startswith("text_") else encoded.regions)}
    if kind == "regions":  # "scores", since the states of the regions are called "regions"
        whole = () if encoded.whole is None else (encoded.whole[:, None],)
        return {f"{part}.scores": head(torch.cat([encoded.regions, *whole], dim=1))}
    if kind == "slots_regions":
        assert batch.regions is not None
        return {part: head(encoded.text, encoded.regions, batch.regions.mask)}
    rows = len(encoded.pooled) // saved.group * saved.group
    return {part: head(encoded.pooled[:rows])} if rows else {}


def _compare(name: str, ours: Tensor | None, recorded: Tensor, batch: Batch, atol: float, rtol: float) -> Deviation:
    if ours is None or ours.shape != recorded.shape:
        return Deviation(name=name, largest=float("inf"), agrees=False)
    if ours.dim() > 1 and (real := _real(name, ours.shape[1], batch)) is not None:
        ours, recorded = ours[real], recorded[real]
    difference = (ours - recorded).abs()
    agrees = bool((difference <= atol + rtol * recorded.abs()).all())  # False where either is no number
    return Deviation(name=name, largest=difference.max().item() if difference.numel() else 0.0, agrees=agrees)


def _real(name: str, length: int, batch: Batch) -> Tensor | None:
    """Real positions (B, N) of a layer's states, with those that a model adds behind; None where a layer has no positions."""
    text = batch.text.mask
    regions = text[:, :0] if batch.regions is None else batch.regions.mask
    mask = {"text": text, "regions": regions, "both": torch.cat([text, regions], dim=1)}.get(_stream(name))
    return None if mask is None else F.pad(mask, (0, length - mask.shape[1]), value=True)


def _stream(name: str) -> str:
    """Whose positions the second axis of a layer has: "text", "regions", "both" one after the other, or none, where it is a summary."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if last == "text" or first.startswith(("text", "vocabulary", "slots_regions")):
        return "text"
    if last == "regions" or first.startswith(("region", "projection", "objects")):
        return "regions"
    return "both" if first in ("embeddings", "layers", "additional_layer") else ""


# ---------------------------------------------------------------------------------------------------------------- native recordings


def _sample(saved: Saved, seed: int) -> Batch:
    """Four rows of made-up tokens and regions, of different lengths."""
    spec = models.spec(saved.model).inputs(saved.config)
    generator = torch.Generator().manual_seed(seed)
    tokens, regions = min(_TOKENS, spec.max_tokens), min(_REGIONS, spec.max_regions)
    lengths, counts = torch.tensor([tokens, tokens - 3, tokens - 5, tokens]), torch.tensor([regions, max(regions - 2, 1), 1, max(regions - 1, 1)])
    text_mask, region_mask = torch.arange(tokens) < lengths[:, None], torch.arange(regions) < counts[:, None]
    corners = torch.rand(_ROWS, regions, 2, 2, generator=generator).sort(2).values * 0.9
    boxes = torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.1], dim=-1)  # (B, R, 4), sides of a tenth and more
    features = torch.randn(_ROWS, regions, spec.feature_size, generator=generator).relu()
    task = torch.arange(_ROWS) % saved.config.num_tasks if getattr(saved.config, "num_tasks", 0) else None
    return Batch(
        text=Text(
            ids=torch.randint(1, saved.config.vocab_size, (_ROWS, tokens), generator=generator) * text_mask,
            mask=text_mask,
            segments=((torch.arange(tokens) >= tokens // 2) & text_mask).long(),
            slot=None if spec.answer_slot == "none" else lengths - 2,
            task=task,
        ),
        regions=Regions(
            features=features * region_mask[..., None],
            boxes=boxes * region_mask[..., None],
            mask=region_mask,
            size=torch.tensor([[640.0, 480.0]]).repeat(_ROWS, 1),
        ),
    )


def _flat(batch: Batch) -> dict[str, Tensor]:
    """Tensors of text and regions by dotted name."""
    assert batch.regions is not None
    fields = {f"text.{f.name}": getattr(batch.text, f.name) for f in dataclasses.fields(batch.text)}
    fields |= {f"regions.{f.name}": getattr(batch.regions, f.name) for f in dataclasses.fields(batch.regions)}
    return {name: tensor.contiguous() for name, tensor in fields.items() if tensor is not None}


def _read_native(saved: Saved, folder: Path) -> _Recording:
    try:
        described = json.loads((folder / "recording.json").read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise CheckpointError(f"{folder} is a recording of layout {described['format']}; this version reads {FORMAT}. Record it again.")
        if described["model"] != saved.model:
            raise CheckpointError(f"{folder} was recorded with {described['model']}, but {saved.path} holds {saved.model}. Name another recording.")
        flat, values = load_file(folder / "batch.safetensors"), load_file(folder / "values.safetensors")
        text = {name.removeprefix("text."): tensor for name, tensor in flat.items() if name.startswith("text.")}
        regions = {name.removeprefix("regions."): tensor for name, tensor in flat.items() if name.startswith("regions.")}
        batch = Batch(text=Text(**text), regions=Regions(**regions))
        return _Recording(batch=batch, values={name: values[name] for name in described["layers"]})
    except (OSError, json.JSONDecodeError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the recording in {folder}: {error}. Record it again with visling verify --record.") from error


# ---------------------------------------------------------------------------------------------------------------- sets recorded from the releases


def _read_official(saved: Saved, folder: Path) -> _Recording:
    name, read = _OFFICIAL[saved.model]
    place = folder / name if (folder / name).is_dir() else folder
    try:
        inputs, outputs = load_file(place / "inputs.safetensors"), load_file(place / "outputs.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"no recording in {folder}: {error}. Expected recording.json (visling verify --record), or inputs.safetensors and outputs.safetensors "
            "of an official set."
        ) from error
    try:
        return read(inputs, outputs)
    except KeyError as error:
        raise CheckpointError(
            f"{place} holds no recording of {saved.model}: it lacks {error}. Name the set that was recorded from its release."
        ) from error


def _boxes(like: Tensor) -> Tensor:
    """Whole-image boxes (B, R, 4), for models that read none."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*like.shape[:2], 4)


def _numbered(pattern: str, ours: str, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers 0, 1, 2, ... of a recording under our names."""
    found: dict[str, Tensor] = {}
    while (name := pattern.format(len(found))) in recorded:
        found[ours.format(len(found))] = recorded[name]
    return found


def _visualbert(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> _Recording:
    features, mask = inputs["image_feat_variable"], inputs["image_mask"].bool()
    recorded = {name.removeprefix("plain/"): tensor for name, tensor in outputs.items() if name.startswith("plain/")}
    tokens = inputs["bert_input_ids"].shape[1]
    return _Recording(
        batch=Batch(
            text=Text(ids=inputs["bert_input_ids"], mask=inputs["bert_input_mask"].bool(), segments=inputs["bert_input_type_ids"]),
            regions=Regions(features=features, boxes=_boxes(features), mask=mask, size=torch.ones(len(mask), 2)),
        ),
        values={
            "embeddings": recorded["embedding_output"],
            **_numbered("layer_{}", "layers.{}", recorded),
            "pooled": recorded["pooled"],
            "vocabulary": recorded["prediction_scores"][:, :tokens],
            "matching": recorded["seq_relationship_score"],
        },
        optional=("vocabulary", "matching"),
    )


def _vlbert(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> _Recording:
    boxes, ids, size = inputs["boxes"], inputs["text"], inputs["im_info"][:, :2]  # the whole image is the first box; padding is -2
    mask = boxes[:, 1:, 0] > -1.5
    text_mask = ids > 0
    recorded = {name.removeprefix("rel_on/"): tensor for name, tensor in outputs.items() if name.startswith("rel_on/")}
    layers = _numbered("layer_{}", "layers.{}", recorded)
    return _Recording(
        batch=Batch(
            text=Text(ids=ids, mask=text_mask, segments=torch.zeros_like(ids)),
            regions=Regions(
                features=boxes[:, 1:, 4:],
                boxes=to_unit(boxes[:, 1:, :4], size) * mask[..., None],
                mask=mask,
                size=size,
                whole=boxes[:, 0, 4:],
                hidden=inputs["mvrc_ops"][:, 1:] == 1,
            ),
        ),
        values={
            **{name: _unpacked(states, text_mask, mask) for name, states in layers.items()},
            "vocabulary": recorded["mlm_logits"],
            "region_targets.classes": recorded["mvrc_logits"][:, 1:],
            "matching": recorded["relationship_logits"],
        },
        optional=("vocabulary", "region_targets.classes", "matching"),
    )


def _unpacked(states: Tensor, text: Tensor, regions: Tensor) -> Tensor:
    """VL-BERT's rows without gaps (text, whole image, regions, [END]) -> (B, T + R + 2, D): text, regions, whole image, [END], each in its place."""
    spread = states.new_zeros(len(states), text.shape[1] + regions.shape[1] + 2, states.shape[-1])
    for row, packed in enumerate(states):
        words, count = int(text[row].sum()), int(regions[row].sum())
        spread[row, :words] = packed[:words]
        spread[row, text.shape[1] : text.shape[1] + count] = packed[words + 1 : words + 1 + count]
        spread[row, -2], spread[row, -1] = packed[words], packed[words + 1 + count]
    return spread


def _vilbert(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> _Recording:
    given = {name.removeprefix("pretrain."): tensor for name, tensor in inputs.items() if name.startswith("pretrain.")}
    recorded = {name.removeprefix("pretrain."): tensor for name, tensor in outputs.items() if name.startswith("pretrain.")}
    features, mask = given["image_feat"], given["image_attention_mask"].bool()  # the whole image is the first region

    def whole_last(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat([tensor[:, 1:], tensor[:, :1]], dim=1) for name, tensor in states.items()}

    return _Recording(
        batch=Batch(
            text=Text(ids=given["input_ids"], mask=given["attention_mask"].bool(), segments=given["token_type_ids"]),
            regions=Regions(
                features=features[:, 1:],
                boxes=given["image_loc"][:, 1:, :4],
                mask=mask[:, 1:],
                size=torch.ones(len(mask), 2),
                whole=features[:, 0],
            ),
        ),
        values={
            "text_embeddings": recorded["emb.text"],
            **_numbered("text_layer.{}", "text_layers.{}", recorded),
            **_numbered("co_layer.{}.text", "co_attention_layers.{}.text", recorded),
            **whole_last({"region_embeddings": recorded["emb.image"]}),
            **whole_last(_numbered("image_layer.{}", "region_layers.{}", recorded)),
            **whole_last(_numbered("co_layer.{}.image", "co_attention_layers.{}.regions", recorded)),
            "pooled": recorded["pooled_output_t"] * recorded["pooled_output_v"],
            "vocabulary": recorded["prediction_scores_t"],
            "region_targets.classes": recorded["prediction_scores_v"][:, 1:],
            "matching": recorded["seq_relationship_score"].flip(-1),  # class 0 = fits, there
        },
        optional=("vocabulary", "region_targets.classes", "matching"),
    )


def _lxmert(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> _Recording:
    heads = {
        "vocabulary": "logits.lm",
        "matching": "logits.matched",
        "region_targets.classes": "logits.obj",
        "region_targets.attributes": "logits.attr",
        "region_targets.features": "logits.feat",
        "answers": "logits.answer",
    }
    return _Recording(
        batch=_lxmert_batch(inputs, inputs["visual_feats"]),
        values={
            "text_embeddings": outputs["hidden.embeddings"],
            **_numbered("hidden.l_layer.{}", "text_layers.{}", outputs),
            "region_embeddings": outputs["hidden.visn_fc"],
            **_numbered("hidden.r_layer.{}", "region_layers.{}", outputs),
            **_numbered("hidden.x_layer.{}.language", "cross_layers.{}.text", outputs),
            **_numbered("hidden.x_layer.{}.vision", "cross_layers.{}.regions", outputs),
            "pooled": outputs["pooled_output"],
            **{ours: outputs[theirs] for ours, theirs in heads.items()},
        },
        optional=tuple(heads),
    )


def _cvlp(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> _Recording:
    heads = {"vocabulary": "query.logits_lm", "matching": "query.logits_matched", "projection": "query.visn_embed_raw"}
    return _Recording(
        batch=_lxmert_batch(inputs, inputs["query_visual_feats"]),
        values={
            "text": outputs["query.language_output"],
            "regions": outputs["query.vision_output"],
            "pooled": outputs["query.pooled_output"],
            **{ours: outputs[theirs] for ours, theirs in heads.items()},
        },
        optional=tuple(heads),
    )


def _lxmert_batch(inputs: Mapping[str, Tensor], features: Tensor) -> Batch:
    """All regions are real."""
    return Batch(
        text=Text(ids=inputs["input_ids"], mask=inputs["attention_mask"].bool(), segments=inputs["token_type_ids"]),
        regions=Regions(
            features=features, boxes=inputs["visual_pos"], mask=torch.ones(features.shape[:2], dtype=torch.bool), size=torch.ones(len(features), 2)
        ),
    )


_OFFICIAL: Mapping[str, tuple[str, Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], _Recording]]] = {
    "visualbert": ("pretraining", _visualbert),
    "vlbert": ("pretrain_single", _vlbert),
    "vilbert": ("", _vilbert),
    "lxmert": ("", _lxmert),
    "cvlp": ("", _cvlp),
}
"""Family -> folder of its pre-training set, and what its official names mean."""
