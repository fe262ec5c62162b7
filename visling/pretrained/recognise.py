"""Recognises a weight file: family, layout, preset and heads, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from visling import config as configs
from visling import models
from visling.checkpoints import catalog, files, hub
from visling.checkpoints.catalog import ReleasedFile
from visling.checkpoints.keymap import KeyMap
from visling.errors import CheckpointError, ConfigError, nearest
from visling.models import encoder_config
from visling.models.base import Encoder, ModelSpec
from visling.models.task_model import SavedHead
from visling.nn.heads import STYLES, build
from visling.pretrained.fetch import fetch_entry
from visling.types import Dims, Head, HeadKind

BY_PRODUCTS = ("official_key", "vqa_start", "refcoco_start", "vcr_start")
"""Key maps that read a file for another purpose than its model."""

_GROUPS = {"pair": 2, "score": 4}
"""Rows per example where a head sees several: two images, four choices."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a source will be read."""

    model: str
    layout: str
    preset: str
    config: Any
    release: ReleasedFile | None


def fitting_layouts(tensors: Mapping[str, Tensor], model: str | None = None) -> list[tuple[str, str]]:
    """Families and layouts with a rule for every name of a state dict, by names and shapes alone.

    Args:
        model: the only family to look at; None = all of this package.
    """
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    prefixed = with_bert_prefix(shapes)
    found = []
    for family in models.names() if model is None else (model,):
        for layout, keys in models.spec(family).keys.items():
            if layout in BY_PRODUCTS:
                continue
            try:
                ours, coverage = keys.convert(prefixed if layout == "bert" else shapes)
            except CheckpointError:
                continue
            if not coverage.unexpected and any(name.startswith("encoder.") for name in ours):
                found.append((family, layout))
    return found


def find_weights(
    source: str | Path, release: str | None, *, by_name: bool, offline: bool | None
) -> tuple[Path, ReleasedFile | None]:
    """The weight file of a source, and its entry in the catalogue."""
    path, name = Path(source), str(source)
    known = None if release is None else catalog.find(release)
    listed = {entry.name: entry for entry in catalog.RELEASED_FILES}
    if path.exists():
        if known is None and by_name:
            known = listed.get(path.name) or listed.get(path.stem)
        return _weights_in(path), known
    if name in listed:
        return _weights_in(fetch_entry(listed[name], offline=offline)), listed[name]
    if hub.is_id(name):
        if known is None and by_name:
            known = next((entry for entry in catalog.RELEASED_FILES if entry.source == f"{catalog.HUB}{name}"), None)
        return _weights_in(hub.fetch(name, files=hub.RELEASE_FILES, offline=offline)), known
    raise CheckpointError(
        f"no weight file {source}. Check the path; released weights need the file that `visling catalog` names, "
        "downloaded."
    )


def _weights_in(path: Path) -> Path:
    """The path itself, or the one weight file in a folder."""
    if not path.is_dir():
        return path
    if (path / "model.safetensors").exists():
        return path / "model.safetensors"
    found = sorted(file for file in path.iterdir() if file.suffix in (".bin", ".pth", ".th", ".safetensors", ".model"))
    if len(found) != 1:
        raise CheckpointError(
            f"{path} holds {len(found)} weight files: {', '.join(file.name for file in found) or 'none'}. Name the "
            "file."
        )
    return found[0]


def check_file(path: Path, release: ReleasedFile | None) -> None:
    """Compare size and digest with the catalogue's, where it has them."""
    if release is None:
        return
    if release.size is not None and path.stat().st_size != release.size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes; {release.name} has {release.size}. Fetch it again."
        )
    if release.sha256 is not None and (found := files.digest(path)) != release.sha256:
        raise CheckpointError(
            f"{path} has the SHA-256 {found}; {release.name} has {release.sha256}. Fetch it again from the "
            "catalogue's address."
        )


def choose(
    tensors: Mapping[str, Tensor],
    release: ReleasedFile | None,
    *,
    layout: str | None,
    model: str | None,
    preset: str | None,
    config: Any,
    settings: Sequence[str],
) -> Choice:
    """Family, layout and config: as given, else those of the release, else the only ones that fit."""
    model = model or (release.family if release is not None else None)
    layout = layout or (release.layout if release is not None else None)
    if model is None or layout is None:
        model, layout = _only_fit(tensors, model, layout)
    spec = models.spec(model)
    if layout not in spec.keys or layout in BY_PRODUCTS:
        usable = [name for name in spec.keys if name not in BY_PRODUCTS]
        raise ConfigError(
            f"{model} has no layout {layout!r} to convert from. {nearest(layout, usable)}{_suggestion(tensors)}"
        )
    preset = preset or (release.preset if release is not None and release.family == model else None)
    if config is None:
        preset = preset or _only_preset(tensors, spec, model, layout)
        config = configs.override(encoder_config(model, preset), settings)
    return Choice(model=model, layout=layout, preset=preset or "", config=config, release=release)


def _only_fit(tensors: Mapping[str, Tensor], model: str | None, layout: str | None) -> tuple[str, str]:
    found = [(family, name) for family, name in fitting_layouts(tensors, model) if layout in (None, name)]
    if len(found) == 1:
        return found[0]
    given = " and ".join(
        f"{what} {name!r}" for what, name in (("--model", model), ("--from", layout)) if name is not None
    )
    if not found:
        raise CheckpointError(
            f"the names in the file fit no family{f' with {given}' if given else ''}: the first are "
            f"{', '.join(list(tensors)[:3])}.{_suggestion(tensors)}"
        )
    raise CheckpointError(f"the names in the file fit {listed(found)}. Choose with --model and --from.")


def _only_preset(tensors: Mapping[str, Tensor], spec: ModelSpec[Any], model: str, layout: str) -> str:
    """The preset whose shapes a file has."""
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    shapes = with_bert_prefix(shapes) if layout == "bert" else shapes
    found = []
    for preset, config in spec.presets.items():
        with torch.device("meta"):
            encoder = spec.build(config)
        if _covers(spec.keys[layout], shapes, encoder):
            found.append(preset)
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"the shapes in the file fit several presets of {model}: {', '.join(found)}. They differ in their "
            "inputs: choose with --preset."
        )
    raise CheckpointError(
        f"the file fits no preset of {model} in layout {layout!r} ({', '.join(spec.presets)}). Name the "
        f"closest with --preset and the differences with --set.{_suggestion(tensors)}"
    )


def _covers(keys: KeyMap, source: Mapping[str, Tensor], encoder: Encoder) -> bool:
    try:
        return keys.load(source, {"encoder": encoder}, strict=False).complete
    except CheckpointError:
        return False


def _suggestion(tensors: Mapping[str, Tensor]) -> str:
    """A sentence on the layouts that fit, if any does."""
    found = fitting_layouts(tensors)
    return f" The names fit {listed(found)}." if found else ""


def listed(found: Iterable[tuple[str, str]]) -> str:
    return " or ".join(f"--model {model} --from {layout}" for model, layout in found)


def with_bert_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BERT's tensors under the names of its pre-training model, also from a file of the bare model."""
    bare = ("embeddings.", "encoder.", "pooler.")
    return {f"bert.{name}" if name.startswith(bare) else name: tensor for name, tensor in tensors.items()}


def find_heads(
    ours: Mapping[str, Tensor], spec: ModelSpec[Any], layout: str, encoder: Encoder
) -> dict[str, tuple[SavedHead, nn.Module]]:
    """Every head that a file holds, by part, recognised by its tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in ours.items():
        part, _, rest = name.partition(".")
        found.setdefault(part, {})[rest] = tensor
    heads = {}
    for part, tensors in found.items():
        if part != "encoder":
            saved = _head(part, tensors, spec, layout, encoder)
            heads[part] = (saved, saved.build(encoder))
    return heads


def _head(part: str, tensors: Mapping[str, Tensor], spec: ModelSpec[Any], layout: str, encoder: Encoder) -> SavedHead:
    """The head with the names and shapes of a part: of the kinds that it may be, in the styles of the family first.

    Raises:
        CheckpointError: no head looks like that.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    outputs = _outputs(tensors)
    options: dict[str, int] = {}
    if widths := {
        name.split(".")[1]: len(tensor)
        for name, tensor in tensors.items()
        if name.startswith("outputs.") and name.endswith(".bias")
    }:
        outputs, options = sum(widths.values()), widths
    elif "query.weight" in tensors:
        options = {"head_size": len(tensors["query.weight"])}
    elif "dense.weight" in tensors and "norm.weight" in tensors:
        options = {"hidden_size": len(tensors["dense.weight"])}
    for kind in _kinds(part, outputs):
        named = [spec.head_styles.get((place, name)) for place in (layout, spec.layout) for name in (part, kind)]
        for style in dict.fromkeys([*filter(None, named), *STYLES[kind]]):
            head = Head(
                kind=kind,
                outputs=outputs,
                options=options if kind in ("region_targets", "slots_regions", "classify", "pair") else {},
            )
            group = _GROUPS.get(kind, 1)
            if style in STYLES[kind] and _shapes(head, encoder.dims, style, encoder.word_embeddings, group) == shapes:
                return SavedHead(part=part, head=head, style=style, group=group)
    listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    raise CheckpointError(
        f"the head {part!r} of the file matches none of ours on this encoder: it holds {listed}. Another preset, or a "
        "damaged file?"
    )


def _shapes(head: Head, dims: Dims, style: str, words: nn.Embedding, group: int) -> dict[str, torch.Size] | None:
    """Name -> shape of a head's parameters; None where the style cannot be built like that."""
    try:
        with torch.device("meta"):
            module = build(head, dims, style=style, words=words, group=group)
    except ConfigError:
        return None
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _outputs(tensors: Mapping[str, Tensor]) -> int:
    """Number of outputs of a head: the length of its last bias."""
    return next((len(tensors[name]) for name in ("linear.bias", "output.bias", "bias") if name in tensors), 1)


def _kinds(part: str, outputs: int) -> tuple[HeadKind, ...]:
    """What a part may be."""
    if part in STYLES:
        return (cast(HeadKind, part),)
    base = part.removeprefix("text_").split("_")[0]  # regions_refcoco, score_coco, classifier_gqa, text_projection
    if base in STYLES:
        return (cast(HeadKind, base),)
    if part == "objects":
        return ("region_targets",)
    return ("score",) if outputs == 1 else ("classify", "pair")
