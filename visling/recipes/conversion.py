"""Released weight files -> model folders, and back.

    file -> tensors -> key map -> encoder + heads -> model folder -> key map, backwards -> file, or a folder for transformers

What a file holds is read from its names and shapes; what they cannot tell (the preset, the order of the answers) is asked for.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visling import config as configs
from visling import models, runtime
from visling.checkpoints import catalog, files, hub
from visling.checkpoints.catalog import Release
from visling.checkpoints.keymap import Coverage, KeyMap
from visling.data.answers import UNKNOWN, AnswerVocabulary
from visling.data.store import NativeStore
from visling.data.text import Tokenizer
from visling.errors import CheckpointError, ConfigError, DataError, nearest
from visling.models.base import Encoder, ModelSpec
from visling.nn import heads as head_blocks
from visling.recipes import answer_tables, assembly
from visling.recipes.assembly import Saved, SavedHead
from visling.tasks import base as tasks
from visling.types import Dims, Head, HeadKind
from visling.vision import end_to_end

OBJECTIVES: Mapping[str, str] = {
    "vocabulary": "masked_lm",
    "matching": "matching",
    "region_targets": "masked_regions",
    "answers": "image_qa",
    "projection": "region_contrast",
}
"""Part of the key maps -> objective whose head it is."""


@dataclass(frozen=True, kw_only=True)
class AnswerList:
    """The answers of a release's classifiers, in the order of their outputs: which file holds them, and how it is told from others."""

    file: str
    unknown: Literal["first", "listed", "absent"]
    """Where the 3,129 answers of VQA hold `<unk>`."""
    fingerprints: Mapping[int, str] = field(default_factory=dict)
    """Number of answers -> `AnswerVocabulary.fingerprint`, where the file has been seen."""


_LXMERT_LIST = AnswerList(
    file="data/vqa/trainval_label2ans.json of airsplay/lxmert (3,129 answers; for GQA data/gqa/trainval_label2ans.json, 1,842; for pre-training "
    "data/lxmert/all_ans.json, 9,500)",
    unknown="absent",
    fingerprints={
        3129: "b05467ee028c22da4547e880ae734786065c0395435ff561865187dc184c3b19",
        1842: "3ba2e3668760dfcfcfe40dc58711a7c551ca7da48be87a7fdd3fae9963f8264d",
        9500: "b12f511ca271f7d23fb45d639d5afb802ca5066f201311d97aaaf53f3f7739ea",
    },
)
ANSWER_LISTS: Mapping[str, AnswerList] = {
    "visualbert": AnswerList(file="answers_vqa.txt of Pythia's VQA 2.0 data (3,129 lines, the first is <unk>)", unknown="first"),
    "vlbert": AnswerList(file="answers_vqa.txt of its VQA data (3,129 lines, <unk> among them)", unknown="listed"),
    "vilbert": AnswerList(
        file="trainval_label2ans.pkl of the release's cache folder for the data set (VQA 3,129 answers, GQA 1,533)", unknown="absent"
    ),
    "lxmert": _LXMERT_LIST,
    "cvlp": _LXMERT_LIST,
    "volta": AnswerList(file="trainval_label2ans.pkl of VOLTA's cache folder for the data set (VQA 3,129 answers, GQA 1,842)", unknown="absent"),
}
"""Family -> its answers; a layout with lists of its own goes before the family."""

_VQA_ANSWERS = 3129
_ANSWER_TASKS = {_VQA_ANSWERS: "vqa", 1842: "gqa", 1533: "gqa"}
"""Outputs of a released classifier -> its task."""

KEPT = "kept.safetensors"
"""File of a model folder with the tensors that a release holds and never reads; no loader asks for it, `export` writes them back."""

_VQA_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "visualbert": {"loss": "kl", "mask_unknown": True},
    "vlbert": {"loss": "bce", "mask_unknown": False},  # its test predictions may be <unk>
}
_VQA_ELSEWHERE: Mapping[str, Any] = {"loss": "bce"}

_BY_PRODUCTS = ("official_key", "vqa_start", "refcoco_start", "vcr_start")
"""Key maps that read a file for another purpose than to keep its model."""

_GROUPS = {"pair": 2, "score": 4}
"""Rows per example where a head sees several: two images, four choices."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` did."""

    path: Path
    model: str
    preset: str
    """Empty where the config was given."""
    layout: str
    release: str
    """Name in the catalogue; empty if it is none of these."""
    task: str | None
    heads: Mapping[str, SavedHead]
    """By place in the model folder."""
    coverage: Coverage


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export` did."""

    path: Path
    layout: str
    tensors: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Place in the model folder -> why it was not written."""


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What a source is to be read as."""

    model: str
    layout: str
    preset: str
    config: Any
    release: Release | None


def convert(
    source: str | Path,
    out: Path,
    *,
    layout: str | None = None,
    model: str | None = None,
    preset: str | None = None,
    config: Any = None,
    settings: Sequence[str] = (),
    release: str | None = None,
    task: str | None = None,
    answers: Sequence[Path] = (),
    other_answers: bool = False,
    encoder_only: bool = False,
    features: Path | None = None,
    seed: int = 0,
    offline: bool | None = None,
) -> Converted:
    """Write a model folder from a released weight file. Every key of the file and every parameter must be accounted for.

    Args:
        source: weight file, folder that holds one, name in the catalogue, or owner/name on the hub.
        layout: key map of the family; None = of the release, else the only one that the names fit.
        model: family; None = of the release, else the only one that the names fit.
        preset: None = of the release, else the only one that the shapes fit.
        config: the family's config, instead of a preset.
        settings: changes of the preset, `name=value`.
        release: name in the catalogue; None = the entry that the file is called like, if `layout` and `model` are not given either.
        task: the task that the model is to be used for; None = question answering if there is a classifier over as many answers as a released one.
        answers: files with the answers in the order of a classifier, each for that of its length; of pre-training on questions the answer table.
        other_answers: accept lists that are not those of the release.
        encoder_only: leave all heads out.
        features: region store whose features the weights were trained on; its fingerprint is recorded.
        seed: of parameters that the file does not hold.
        offline: whether to ask the hub; None = as HF_HUB_OFFLINE says.
    Raises:
        CheckpointError: unreadable or unsafe file, another layout, weights that do not fit, answers that are missing or wrong, or `out` is taken.
        ConfigError: no such family, layout, preset, setting or task.
    """
    _refuse(out)
    path, known = _find(source, release, by_name=layout is None and model is None, offline=offline)
    tensors = files.read(path)
    _check_file(path, known)
    choice = _choose(tensors, known, layout=layout, model=model, preset=preset, config=config, settings=settings)
    if choice.layout == "bert":
        tensors = _with_prefix(tensors)
    store = None if features is None else NativeStore.open(features)
    runtime.seed_everything(seed)
    encoder, heads, coverage = _load(tensors, choice, store, encoder_only=encoder_only)
    lists = _answer_lists(choice, heads, task, answers, any_list=other_answers)
    chosen = _task(choice, heads, task, lists)
    places = _places(heads, chosen)
    tokenizer = _tokenizer(choice)
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    for place, (_, module) in places.items():
        weights |= {f"{place}.{name}": tensor for name, tensor in module.state_dict().items()}
    with _whole_folder(out) as fresh:
        assembly.describe(
            fresh,
            model=choice.model,
            config=choice.config,
            task=chosen,
            text_only=choice.layout == "bert",
            fingerprint="" if store is None else store.fingerprint,
            tokenizer=tokenizer,
            trained=f"elsewhere; converted from {path.name} (layout {choice.layout})",
            heads={place: saved for place, (saved, _) in places.items()},
            source=_provenance(path, choice, coverage) | ({} if encoder_only else _precisions(tensors, choice, coverage)),
        )
        for place, (saved, _) in places.items():
            if saved.part in lists and (chosen is None or place.removeprefix("heads.") not in chosen.heads):
                answer_tables.save(fresh, lists[saved.part], place)
        _write(weights, fresh / "model.safetensors")
        if (dropped := coverage.dropped) and not encoder_only and choice.layout != "bert":
            _write({name: tensors[name] for name in dropped}, fresh / KEPT)
    return Converted(
        path=out,
        model=choice.model,
        preset=choice.preset,
        layout=choice.layout,
        release="" if choice.release is None else choice.release.name,
        task=None if chosen is None else chosen.name,
        heads={place: saved for place, (saved, _) in places.items()},
        coverage=coverage,
    )


def export(folder: Path, out: Path, *, layout: str = "official") -> Exported:
    """Write the weights of a model folder, or of a run folder, in a released layout.

    Args:
        out: weight file (.safetensors, else a PyTorch file); for `layout` "transformers" a folder that its classes load by from_pretrained.
        layout: "official" = the one that the weights came in, else the first of the family that has names for all of them; or any by name.
    Raises:
        CheckpointError: the layout has no name for a tensor, or `out` is taken.
        ConfigError: the family has no such layout.
    """
    _refuse(out)
    saved = assembly.read(folder)
    spec = models.spec(saved.model)
    if layout != "official" and layout not in spec.keys:
        raise ConfigError(f"{saved.model} has no layout {layout!r}. {nearest(layout, [*spec.keys, 'official'])}")
    parts, left_out = _parts(saved)
    found, tensors, names = _invert(saved, spec, parts, layout)
    if saved.extractor is not None and found in end_to_end.KEYS:
        network = {name: tensor for name, tensor in saved.weights.items() if name.startswith("extractor.")}
        tensors |= end_to_end.KEYS[found].invert(network)
    elif saved.extractor is not None:
        left_out["extractor"] = "the layout has no names for the network that makes features"
    if found == saved.source.get("layout"):
        tensors = _as_it_came(saved, tensors)
    if found == "transformers":
        with _whole_folder(out) as fresh:
            described = _TRANSFORMERS[saved.model](saved, names)
            (fresh / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(saved.path / "vocab.txt", fresh / "vocab.txt")
            _write(tensors, fresh / "model.safetensors")
    else:
        _write(tensors, out)
    return Exported(path=out, layout=found, tensors=len(tensors), left_out=left_out)


def fitting(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Families and layouts that know every name of a state dict, by the names and shapes alone."""
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    prefixed = _with_prefix(shapes)
    found = []
    for model in models.names():
        for layout, keys in models.spec(model).keys.items():
            if layout in _BY_PRODUCTS:
                continue
            try:
                ours, coverage = keys.convert(prefixed if layout == "bert" else shapes)
            except CheckpointError:
                continue
            if not coverage.unexpected and any(name.startswith("encoder.") for name in ours):
                found.append((model, layout))
    return found


def read_answers(path: Path) -> AnswerVocabulary:
    """A list of answers: JSON, one a line, or a pickled list of strings (ViLBERT), of which nothing but the strings is read.

    Raises:
        DataError: missing, or not such a list.
    """
    if path.suffix != ".pkl":
        return AnswerVocabulary.load(path)
    try:
        with path.open("rb") as file:
            answers = _OnlyValues(file).load()
    except FileNotFoundError as error:
        raise DataError(f"no answer vocabulary {path}. Check the path.") from error
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"answer vocabulary {path} is no pickled list of strings: {error}.") from error
    if not isinstance(answers, list):
        raise DataError(f"answer vocabulary {path} must be a list of answers in the order of their indices; found {type(answers).__name__}.")
    return AnswerVocabulary(answers)


class _OnlyValues(pickle.Unpickler):
    """Reads lists, strings and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and reading it might run code")


# ---------------------------------------------------------------------------------------------------------------- what a source is


def _find(source: str | Path, release: str | None, *, by_name: bool, offline: bool | None) -> tuple[Path, Release | None]:
    """The weight file of a source, and its entry in the catalogue."""
    path, name = Path(source), str(source)
    known = None if release is None else catalog.find(release)
    listed = {entry.name: entry for entry in catalog.RELEASES}
    if path.exists():
        if known is None and by_name:
            known = listed.get(path.name) or listed.get(path.stem)
        return _weights_in(path), known
    if name in listed:
        known = listed[name]
        if not known.source.startswith(catalog.HUB):
            raise CheckpointError(f"{name} is not fetched by itself: it is published at {known.source}. Download it, then give the path of the file.")
        name = known.source.removeprefix(catalog.HUB)
    if hub.is_id(name):
        if known is None and by_name:
            known = next((entry for entry in catalog.RELEASES if entry.source == f"{catalog.HUB}{name}"), None)
        return _weights_in(hub.fetch(name, files=hub.RELEASE_FILES, offline=offline)), known
    raise CheckpointError(f"no weight file {source}. Check the path; visling catalog lists the names of released files.")


def _weights_in(path: Path) -> Path:
    """The path itself, or the one weight file in a folder."""
    if not path.is_dir():
        return path
    if (path / "model.safetensors").exists():
        return path / "model.safetensors"
    found = sorted(file for file in path.iterdir() if file.suffix in (".bin", ".pth", ".th", ".safetensors", ".model"))
    if len(found) != 1:
        raise CheckpointError(f"{path} holds {len(found)} weight files: {', '.join(file.name for file in found) or 'none'}. Name the file.")
    return found[0]


def _check_file(path: Path, release: Release | None) -> None:
    """Compare size and digest with what the catalogue knows."""
    if release is None:
        return
    if release.size is not None and path.stat().st_size != release.size:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; {release.name} has {release.size}. Fetch it again.")
    if release.sha256 is not None and (found := files.digest(path)) != release.sha256:
        raise CheckpointError(f"{path} has the SHA-256 {found}; {release.name} has {release.sha256}. Fetch it again, from where the catalogue says.")


def _choose(
    tensors: Mapping[str, Tensor],
    release: Release | None,
    *,
    layout: str | None,
    model: str | None,
    preset: str | None,
    config: Any,
    settings: Sequence[str],
) -> _Choice:
    """Family, layout and config: as given, else of the release, else the only ones that fit."""
    model = model or (release.family if release is not None else None)
    layout = layout or (release.layout if release is not None else None)
    if model is None or layout is None:
        model, layout = _only_fit(tensors, model, layout)
    spec = models.spec(model)
    if layout not in spec.keys or layout in _BY_PRODUCTS:
        usable = [name for name in spec.keys if name not in _BY_PRODUCTS]
        raise ConfigError(f"{model} has no layout {layout!r} to convert from. {nearest(layout, usable)}{_suggestion(tensors)}")
    preset = preset or (release.preset if release is not None and release.family == model else None)
    if config is None:
        preset = preset or _only_preset(tensors, spec, model, layout)
        config = configs.override(assembly.encoder_config(model, preset), settings)
    return _Choice(model=model, layout=layout, preset=preset or "", config=config, release=release)


def _only_fit(tensors: Mapping[str, Tensor], model: str | None, layout: str | None) -> tuple[str, str]:
    found = [(family, name) for family, name in fitting(tensors) if model in (None, family) and layout in (None, name)]
    if len(found) == 1:
        return found[0]
    given = " and ".join(f"{what} {name!r}" for what, name in (("--model", model), ("--from", layout)) if name is not None)
    if not found:
        raise CheckpointError(
            f"the names in the file fit no family{f' with {given}' if given else ''}: the first are {', '.join(list(tensors)[:3])}."
            f"{_suggestion(tensors)}"
        )
    raise CheckpointError(f"the names in the file fit {_listed(found)}. Say which with --model and --from.")


def _only_preset(tensors: Mapping[str, Tensor], spec: ModelSpec, model: str, layout: str) -> str:
    """The preset whose shapes a file has."""
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    shapes = _with_prefix(shapes) if layout == "bert" else shapes
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
            f"the shapes in the file fit several presets of {model}: {', '.join(found)}. They differ in what they read: say --preset."
        )
    raise CheckpointError(
        f"the file has the size of no preset of {model} in layout {layout!r} ({', '.join(spec.presets)}). "
        f"Name the closest with --preset and the differences with --set.{_suggestion(tensors)}"
    )


def _covers(keys: KeyMap, source: Mapping[str, Tensor], encoder: Encoder) -> bool:
    try:
        return keys.load(source, {"encoder": encoder}, strict=False).complete
    except CheckpointError:
        return False


def _suggestion(tensors: Mapping[str, Tensor]) -> str:
    """A sentence on the layouts that fit, if any does."""
    found = fitting(tensors)
    return f" The names fit {_listed(found)}." if found else ""


def _listed(found: Iterable[tuple[str, str]]) -> str:
    return " or ".join(f"--model {model} --from {layout}" for model, layout in found)


def _with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BERT's tensors under the names of its pre-training model, also from a file of the bare model."""
    bare = ("embeddings.", "encoder.", "pooler.")
    return {f"bert.{name}" if name.startswith(bare) else name: tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------- modules


def _load(
    tensors: Mapping[str, Tensor], choice: _Choice, store: NativeStore | None, *, encoder_only: bool
) -> tuple[Encoder, dict[str, tuple[SavedHead, nn.Module]], Coverage]:
    """Encoder and heads by part, filled from the file."""
    spec = models.spec(choice.model)
    if choice.layout == "bert" and getattr(choice.config, "whiten_features", False) and store is None:
        raise ConfigError("this preset whitens the features by statistics of the region store, which BERT knows nothing of: name it with --features.")
    encoder = assembly.measure(models.build(choice.model, choice.config), store, store.ids if store is not None else ())
    keys = spec.keys[choice.layout]
    try:
        ours, _ = keys.convert(tensors, {"encoder"} if encoder_only else None)
        heads = _heads(ours, spec, choice.layout, encoder)
        coverage = keys.load(tensors, {"encoder": encoder, **{part: module for part, (_, module) in heads.items()}})
    except CheckpointError as error:
        others = [fit for fit in fitting(tensors) if fit != (choice.model, choice.layout)]
        hint = f"\nThe names fit {_listed(others)}." if others else ""
        raise CheckpointError(
            f"cannot read the file as {choice.layout!r} of {choice.model}, preset {choice.preset or 'as given'}: {error}{hint}"
        ) from error
    if choice.layout == "bert":
        encoder.after_text_weights()
    return encoder, heads, coverage


def _heads(ours: Mapping[str, Tensor], spec: ModelSpec, layout: str, encoder: Encoder) -> dict[str, tuple[SavedHead, nn.Module]]:
    """Every head that a file holds, by part, as its tensors say."""
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


def _head(part: str, tensors: Mapping[str, Tensor], spec: ModelSpec, layout: str, encoder: Encoder) -> SavedHead:
    """The head with the names and shapes of a part: of the kinds that it may be, in the styles of the family first.

    Raises:
        CheckpointError: no head looks like that.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    outputs = _outputs(tensors)
    options: dict[str, int] = {}
    if widths := {name.split(".")[1]: len(tensor) for name, tensor in tensors.items() if name.startswith("outputs.") and name.endswith(".bias")}:
        outputs, options = sum(widths.values()), widths
    elif "query.weight" in tensors:
        options = {"head_size": len(tensors["query.weight"])}
    elif "dense.weight" in tensors and "norm.weight" in tensors:
        options = {"hidden_size": len(tensors["dense.weight"])}
    for kind in _kinds(part, outputs):
        named = [spec.head_styles.get((place, name)) for place in (layout, spec.layout) for name in (part, kind)]
        for style in dict.fromkeys([*filter(None, named), *head_blocks.STYLES[kind]]):
            head = Head(kind=kind, outputs=outputs, options=options if kind in ("region_targets", "slots_regions", "classify", "pair") else {})
            group = _GROUPS.get(kind, 1)
            if style in head_blocks.STYLES[kind] and _shapes(head, encoder.dims, style, encoder.word_embeddings, group) == shapes:
                return SavedHead(part=part, head=head, style=style, group=group)
    listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    raise CheckpointError(
        f"the head {part!r} of the file is like none of ours on this encoder: it holds {listed}. Another preset, or a damaged file?"
    )


def _shapes(head: Head, dims: Dims, style: str, words: nn.Embedding, group: int) -> dict[str, torch.Size] | None:
    """Name -> shape of a head's parameters; None where the style cannot be built like that."""
    try:
        with torch.device("meta"):
            module = head_blocks.build(head, dims, style=style, words=words, group=group)
    except ConfigError:
        return None
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _outputs(tensors: Mapping[str, Tensor]) -> int:
    """Number of outputs of a head: the length of its last bias."""
    return next((len(tensors[name]) for name in ("linear.bias", "narrow.bias", "output.bias", "bias") if name in tensors), 1)


def _kinds(part: str, outputs: int) -> tuple[HeadKind, ...]:
    """What a part may be."""
    if part in head_blocks.STYLES:
        return (cast(HeadKind, part),)
    base = part.removeprefix("text_").split("_")[0]  # regions_refcoco, score_coco, classifier_gqa, text_projection
    if base in head_blocks.STYLES:
        return (cast(HeadKind, base),)
    if part == "objects":
        return ("region_targets",)
    return ("score",) if outputs == 1 else ("classify", "pair")


# ---------------------------------------------------------------------------------------------------------------- task and folder


def _answer_lists(
    choice: _Choice, heads: Mapping[str, tuple[SavedHead, nn.Module]], task: str | None, paths: Sequence[Path], *, any_list: bool
) -> dict[str, AnswerVocabulary]:
    """Part -> answers in the order of its outputs, for the classifiers whose lists were given; each list goes to the classifier of its length."""
    if paths and task is not None and not hasattr(tasks.load(task), "vocabulary"):
        raise ConfigError(f"the task {task} has no list of answers: --answers is not for it.")
    sizes = {
        part: saved.head.outputs for part, (saved, _) in heads.items() if saved.head.kind == "classify" and part.startswith(("classifier", "answers"))
    }
    if paths and not sizes:
        raise CheckpointError(f"--answers needs a classifier over answers; the file has none, only: {', '.join(heads) or 'no head'}.")
    known = ANSWER_LISTS.get(choice.layout) or ANSWER_LISTS[choice.model]
    found: dict[str, AnswerVocabulary] = {}
    for path in paths:
        listed = read_answers(path)
        part = next((part for part, outputs in sizes.items() if outputs == len(listed) and part not in found), None)
        if part is None:
            raise CheckpointError(
                f"{path} lists {len(listed)} answers, but the classifier has {' or '.join(map(str, sizes.values()))}. "
                f"For {choice.model} the list is {known.file}."
            )
        if not any_list and (wrong := _not_of(known, listed)):
            raise CheckpointError(
                f"{path} is not the list of the release: {wrong}. For {choice.model} it is {known.file}. Another list, or another order, gives "
                "wrong answers without an error. If these weights were trained on it all the same, say --other-answers."
            )
        found[part] = listed
    return found


def _not_of(known: AnswerList, listed: AnswerVocabulary) -> str:
    """Why answers are not those of a release; empty if nothing speaks against it."""
    at = listed.unknown
    if len(listed) == _VQA_ANSWERS and known.unknown == "first" and at != 0:
        return f"{UNKNOWN} must be the first answer, and {'is missing' if at is None else f'is number {at}'}"
    if len(listed) == _VQA_ANSWERS and (at is None) != (known.unknown == "absent"):
        return f"it {'lacks' if at is None else 'holds'} {UNKNOWN}"
    if known.fingerprints.get(len(listed), listed.fingerprint) != listed.fingerprint:
        return f"the answers or their order differ (the first are {', '.join(map(repr, listed.answers[:3]))})"
    return ""


def _task(
    choice: _Choice, heads: Mapping[str, tuple[SavedHead, nn.Module]], name: str | None, lists: Mapping[str, AnswerVocabulary]
) -> tasks.Task[Any, Any] | None:
    """The task of the model with its answers; None for a pre-trained encoder."""
    classifiers = {part: saved.head.outputs for part, (saved, _) in heads.items() if _answers(part, saved, heads)}
    kind = None if name is None else tasks.load(name)
    if kind is not None and not hasattr(kind, "vocabulary"):
        return kind()
    if kind is not None and not classifiers:
        raise CheckpointError(f"the task {name} needs a classifier over answers; the file has none, only: {', '.join(heads) or 'no head'}.")
    part = next((part for part, outputs in classifiers.items() if _ANSWER_TASKS.get(outputs) == (name or "vqa")), next(iter(classifiers), ""))
    for lacking, outputs in classifiers.items():
        if lacking not in lists and (outputs in _ANSWER_TASKS or (kind is not None and lacking == part)):
            listed = ANSWER_LISTS.get(choice.layout) or ANSWER_LISTS[choice.model]
            raise CheckpointError(
                f"the file has a classifier over {outputs} answers, whose order it does not hold: give the list with --answers FILE, once for each "
                f"classifier. For {choice.model} it is {listed.file}. Other lists of the same length have another order and give wrong answers "
                "without an error. --encoder-only leaves the classifier out."
            )
    if part not in lists:
        return None
    own = _ANSWER_TASKS.get(classifiers[part], "")
    name = name or (own if own in tasks.names() else "vqa")
    settings = _VQA_SETTINGS.get(choice.model, _VQA_ELSEWHERE) if name == "vqa" else {}
    return tasks.load(name).from_state({"config": dict(settings), "answers": list(lists[part])})


def _answers(part: str, saved: SavedHead, heads: Iterable[str]) -> bool:
    """Whether a head classifies answers for a task; LXMERT's pre-training has one too, beside its other objectives."""
    return saved.head.kind == "classify" and (part.startswith("classifier") or (part == "answers" and "vocabulary" not in set(heads)))


def _places(heads: Mapping[str, tuple[SavedHead, nn.Module]], task: tasks.Task[Any, Any] | None) -> dict[str, tuple[SavedHead, nn.Module]]:
    """Where each head stands in the model folder: as one of the task's, as an objective's, or under its own name."""
    places: dict[str, tuple[SavedHead, nn.Module]] = {}
    left = dict(heads)
    for name, wanted in {} if task is None else dict(task.heads).items():
        same = [part for part, (saved, _) in left.items() if (saved.head.kind, saved.head.outputs) == (wanted.kind, wanted.outputs)]
        same.sort(key=lambda part: part in OBJECTIVES and part != "answers")  # VisualBERT's matching is a classifier of two as well
        if not same:
            assert task is not None
            found = ", ".join(f"{part} ({saved.head.kind}, {saved.head.outputs})" for part, (saved, _) in heads.items())
            raise CheckpointError(
                f"the task {task.name} needs a head of kind {wanted.kind} with {wanted.outputs} outputs; the file has {found or 'none'}. "
                "Fine-tune the encoder instead, or name the task that the file was made for."
            )
        places[f"heads.{name}"] = left.pop(same[0])
    for part, head in left.items():
        trained = part in OBJECTIVES and (part != "answers" or "vocabulary" in heads)
        places[f"objectives.{OBJECTIVES[part]}.head" if trained else f"heads.{part}"] = head
    return places


def _tokenizer(choice: _Choice) -> Tokenizer:
    """The word pieces of the config.

    Raises:
        ConfigError: more than the word table has rows.
    """
    found = Tokenizer(models.spec(choice.model).inputs(choice.config).vocabulary)
    if found.size > choice.config.vocab_size:
        raise ConfigError(
            f"vocabulary {choice.config.vocabulary!r} has {found.size} entries, but the word table has {choice.config.vocab_size} rows. "
            "Name the vocabulary of the file with --set vocabulary=FILE."
        )
    return found


def _provenance(path: Path, choice: _Choice, coverage: Coverage) -> dict[str, Any]:
    release = choice.release
    # What a released model lacks is left out again when it is written back; BERT's weights become a model of their own.
    fresh = {} if choice.layout == "bert" or not coverage.fresh else {"fresh": sorted(coverage.fresh)}
    known = {} if release is None else {"release": release.name, "address": release.source, "licence": release.licence, "note": release.note}
    return {"file": path.name, "sha256": files.digest(path), "layout": choice.layout, **known, **fresh}


def _precisions(tensors: Mapping[str, Tensor], choice: _Choice, coverage: Coverage) -> dict[str, Any]:
    """Name -> type of numbers, for what a file does not store in float32."""
    if choice.layout == "bert":
        return {}
    keys = models.spec(choice.model).keys[choice.layout]
    read = [*coverage.tied, *(name for names in coverage.mapped.values() for name in names)]
    found = {keys.repaired(name): str(tensors[name].dtype).removeprefix("torch.") for name in read if tensors[name].dtype != torch.float32}
    return {"precision": found} if found else {}


def _as_it_came(saved: Saved, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the layout that a model came in, with those that were kept for the way back, in the file's own precision."""
    precision = saved.source.get("precision", {})
    found = {name: tensor.to(getattr(torch, precision[name])) if name in precision else tensor for name, tensor in tensors.items()}
    kept = files.read(saved.path / KEPT) if (saved.path / KEPT).exists() else {}
    return {**kept, **found}


def _refuse(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(f"{out} exists. Name another place, or remove it: nothing is overwritten.")


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to that takes its place at the end, or vanishes if anything fails."""
    fresh = out.with_name(f"{out.name}.part")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        if out.exists():
            out.rmdir()
        fresh.rename(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Free space or use another place.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a weight file whole or not at all; the suffix says which kind."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(_apart(whole), part, metadata={"format": "pt"})
        else:
            torch.save(whole, part)
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}. Free space or use another place.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


# ---------------------------------------------------------------------------------------------------------------- the way back


_ALIASES: Mapping[str, tuple[str, ...]] = {
    "classify": ("classifier", "answers"),
    "classifier": ("classifier", "answers"),
    "answers": ("classifier", "answers"),
    "pair": ("pair", "classifier"),
    "score": ("score", "classifier"),
}
"""Head of a task -> names that its part may have; most releases call any head of a task its classifier."""


def _parts(saved: Saved) -> tuple[dict[str, tuple[tuple[str, ...], dict[str, Tensor]]], dict[str, str]]:
    """Place -> names that its part may have in a key map, and its tensors; and what is no weight of the model."""
    objectives = {objective: part for part, objective in OBJECTIVES.items()}
    parts: dict[str, tuple[tuple[str, ...], dict[str, Tensor]]] = {}
    left_out: dict[str, str] = {}
    fresh = frozenset(saved.source.get("fresh", ()))
    for name, tensor in saved.weights.items():
        if name in fresh:
            left_out[name] = "was not in the file that it comes from"
            continue
        first, *rest = name.split(".")
        if first == "extractor":
            continue  # its names are those of vision/end_to_end.py
        place = first if first == "encoder" else f"{first}.{rest[0]}" if first == "heads" else ".".join([first, *rest[:2]])
        if first == "encoder":
            names: tuple[str, ...] = ("encoder",)
        elif first == "heads":
            own = saved.heads[place].part if place in saved.heads else rest[0]
            names = _ALIASES.get(own, (own,))
        elif place.endswith(".head") and rest[0] in objectives:
            names = (objectives[rest[0]],)
        else:
            left_out[place] = "state of an objective, no weight of the model"
            continue
        parts.setdefault(place, (names, {}))[1][name.removeprefix(f"{place}.")] = tensor
    return parts, left_out


def _invert(
    saved: Saved, spec: ModelSpec, parts: Mapping[str, tuple[tuple[str, ...], dict[str, Tensor]]], layout: str
) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """Layout, tensors under its names, and the part that each place became."""
    if layout == "official":
        own = [saved.source.get("layout", ""), saved.task or "", spec.layout, *spec.keys]
        foreign = {"bert", "transformers", "volta", *_BY_PRODUCTS} - ({"volta"} & {own[0]})
        layouts = [name for name in dict.fromkeys(own) if name in spec.keys and name not in foreign]
    else:
        layouts = [layout]
    reasons = []
    for aliases in (1, None):
        for name in layouts:
            try:
                return name, *_named(spec.keys[name], parts, aliases)
            except CheckpointError as error:
                reasons.append(f"{name}: {error}")
    raise CheckpointError(f"{saved.path} cannot be written as {layout!r} of {saved.model}. {' '.join(dict.fromkeys(reasons))}")


def _named(
    keys: KeyMap, parts: Mapping[str, tuple[tuple[str, ...], dict[str, Tensor]]], aliases: int | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the names of a layout; of the names that a part may have, the first that the layout knows."""
    chosen = {"encoder": "encoder"}
    ours = {f"encoder.{name}": tensor for name, tensor in parts["encoder"][1].items()}
    keys.invert(ours)
    for place, (names, tensors) in parts.items():
        reasons = []
        for part in names[:aliases] if place not in chosen else ():
            added = {f"{part}.{name}": tensor for name, tensor in tensors.items()}
            try:
                keys.invert(ours | added)
            except CheckpointError as error:
                reasons.append(str(error))
                continue
            chosen[place] = part
            ours |= added
            break
        if place not in chosen:
            raise CheckpointError(" ".join(reasons))
    return keys.invert(ours), chosen


def _visualbert_for_transformers(saved: Saved, names: Mapping[str, str]) -> dict[str, Any]:
    config, found = saved.config, set(names.values())
    labels = next((len(saved.weights[f"{place}.linear.bias"]) for place, part in names.items() if part == "classifier"), 2)
    if "slots_regions" in found:
        architecture = "VisualBertForRegionToPhraseAlignment"  # has the pre-training heads too
    elif {"vocabulary", "matching"} & found:
        architecture = "VisualBertForPreTraining"
    elif labels == 1:
        architecture = "VisualBertForMultipleChoice"
    elif "classifier" in found:
        architecture = "VisualBertForQuestionAnswering" if config.answer_slot != "none" else "VisualBertForVisualReasoning"
    else:
        architecture = "VisualBertModel"
    return {
        "architectures": [architecture],
        "model_type": "visual_bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "visual_embedding_dim": config.feature_size + (6 if config.append_spatial else 0),
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_segments,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_eps,
        "bypass_transformer": config.bypass,
        "special_visual_initialize": True,
        "pad_token_id": 0,
        **_labels(saved, labels),
    }


def _lxmert_for_transformers(saved: Saved, names: Mapping[str, str]) -> dict[str, Any]:
    config, places = saved.config, {part: place for place, part in names.items()}

    def rows(part: str, output: str, otherwise: int) -> int:
        key = f"{places.get(part, '')}.{output}.bias"
        return len(saved.weights[key]) if key in saved.weights else otherwise

    if places.keys() & {"vocabulary", "matching", "region_targets"}:
        architecture = "LxmertForPreTraining"
    else:
        architecture = "LxmertForQuestionAnswering" if "answers" in places else "LxmertModel"
    answers = rows("answers", "linear", 9500)
    return {
        "architectures": [architecture],
        "model_type": "lxmert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_qa_labels": answers,
        "num_object_labels": rows("region_targets", "outputs.classes", 1600),
        "num_attr_labels": rows("region_targets", "outputs.attributes", 400),
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_segments,
        "initializer_range": config.init_std,
        "l_layers": config.num_text_layers,
        "r_layers": config.num_region_layers,
        "x_layers": config.num_cross_layers,
        "visual_feat_dim": config.feature_size,
        "visual_pos_dim": 4,
        "task_mask_lm": "vocabulary" in places,
        "task_matched": "matching" in places,
        "task_obj_predict": "region_targets" in places,
        "task_qa": "answers" in places,
        **_labels(saved, answers),
    }


def _labels(saved: Saved, count: int) -> dict[str, Any]:
    """Names of a classifier's outputs, where they are known."""
    answers = list(saved.state.get("answers", []))
    if len(answers) != count:
        return {"num_labels": count} if count != 2 else {}
    return {"id2label": {str(number): answer for number, answer in enumerate(answers)}, "label2id": {answer: n for n, answer in enumerate(answers)}}


_TRANSFORMERS: Mapping[str, Callable[[Saved, Mapping[str, str]], dict[str, Any]]] = {
    "visualbert": _visualbert_for_transformers,
    "lxmert": _lxmert_for_transformers,
}
"""Family -> config.json of its classes in transformers, from a model folder and the part that each place became."""
