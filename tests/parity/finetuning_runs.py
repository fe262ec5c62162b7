"""Fine-tuning runs recorded from the official code of LXMERT and CVLP (`golden/{family}_tasks`), and our engine on the
same data: start weights, batches in the recorded order, loss, optimiser and clipping.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from visling import models
from visling.data.annotations.statements import Nlvr2Record
from visling.data.answers import AnswerVocabulary
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.models.task_model import TaskModel
from visling.recipes.lxmert import lxmert_optimiser
from visling.regions.formats.base import convert_regions
from visling.regions.formats.tsv import RegionTsv
from visling.regions.store import NativeStore
from visling.runtime import generator_for
from visling.tasks.base import Task, TaskSource
from visling.tasks.nlvr2 import NLVR2, Nlvr2Config
from visling.tasks.vqa import VQA, VqaConfig
from visling.train import engine
from visling.train.averaging import WeightAverage
from visling.train.config import TrainConfig
from visling.train.log import Log
from visling.train.optim import apply_schedule, clip_gradients
from visling.train.state import RunFolder
from visling.types import Batch, InputSpec, Loss, Record, Targets

FEATURES: Mapping[str, tuple[str, ...]] = {
    "vqa": tuple(f"mscoco_imgfeat/{split}_obj36.tsv" for split in ("train2014", "val2014", "test2015")),
    "gqa": ("vg_gqa_imgfeat/vg_gqa_obj36.tsv",),
    "nlvr2": tuple(f"nlvr2_imgfeat/{split}_obj36.tsv" for split in ("train", "valid", "test")),
}
"""Task -> files of region features."""
TESTDEV_FEATURES: Mapping[str, tuple[str, ...]] = {"gqa": ("vg_gqa_imgfeat/gqa_testdev_obj36.tsv",)}
"""Of the split testdev, where some images have other features."""


@dataclass(frozen=True)
class Recorded:
    """One task of one family."""

    root: Path
    """`golden/{family}_tasks`."""
    family: str
    task: str

    @property
    def folder(self) -> Path:
        return self.root / self.task

    def read(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        with np.load(self.folder / f"{name}.npz") as found:
            return dict(found)

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(str(self.root / "vocab.txt"))

    def regions(self, target: Path, split: str) -> NativeStore:
        """The features that the release reads for a split, as a store."""
        files = (TESTDEV_FEATURES if split == "testdev" else FEATURES)[self.task]
        convert_regions([RegionTsv(self.root / "data" / file) for file in files], target, dtype="float32")
        return NativeStore.open(target)

    def records(self, splits: str) -> list[Record]:
        """Records of splits that commas join, those without features too."""
        return [record for split in splits.split(",") for record in self._read_split(split)]

    def _read_split(self, split: str) -> Sequence[Record]:
        data = self.root / "data" / self.task
        if self.task != "nlvr2":  # LXMERT keeps both sets of questions in one layout
            return VQA(VqaConfig(layout="lxmert")).records(data, split)
        return [
            Nlvr2Record(
                id=entry["uid"],
                images=(entry["img0"], entry["img1"]),
                sentence=entry["sent"],
                label=bool(entry["label"]) if "label" in entry else None,
            )
            for entry in json.loads((data / f"{split}.json").read_text(encoding="utf-8"))
        ]

    @property
    def answers(self) -> AnswerVocabulary:
        return AnswerVocabulary.load(self.root / "data" / self.task / "trainval_label2ans.json")

    def build_task(self) -> Task[Any, Any]:
        """Our task with the loss of the family's release."""
        if self.task == "nlvr2":
            return NLVR2(Nlvr2Config(joined=False))
        return VQA(VqaConfig(**models.spec(self.family).tasks["vqa"]), self.answers)

    def build_model(self, task: Task[Any, Any], settings: Mapping[str, Any], weights: str) -> TaskModel:
        """A model of the recorded sizes with recorded weights."""
        sizes, spec = settings["tiny_model"], models.spec(self.family)
        config = spec.config(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_text_layers=sizes["l_layers"],
            num_region_layers=sizes["r_layers"],
            num_cross_layers=sizes["x_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            num_segments=sizes["type_vocab_size"],
            dropout_rate=sizes["hidden_dropout_prob"],
            attention_dropout_rate=sizes["attention_probs_dropout_prob"],
            feature_size=sizes["visual_feat_dim"],
            max_tokens=sizes["max_seq_length"],
        )
        model = TaskModel(spec.build(config), task.heads, models.head_styles(self.family), group=task.group)
        (head,) = model.heads.values()
        spec.keys["official_finetuned"].load(self.weights(weights), {"encoder": model.encoder, "classifier": head})
        return model

    def official(self, model: TaskModel) -> dict[str, Tensor]:
        """The parameters of a model under their official names."""
        (head,) = model.heads.keys()
        ours = {
            name.replace(f"heads.{head}.", "classifier.", 1): parameter.detach()
            for name, parameter in model.named_parameters()
        }
        return models.spec(self.family).keys["official_finetuned"].invert(ours)

    def inputs(self, settings: Mapping[str, Any]) -> InputSpec:
        sizes = settings["tiny_model"]
        return InputSpec(feature_size=sizes["visual_feat_dim"], max_tokens=sizes["max_seq_length"], max_regions=36)


@dataclass
class Replayed:
    """What a run of ours gave, update by update."""

    logits: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Of all gradients, before clipping."""
    rates: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """After the update, by official name."""
    averaged: list[dict[str, Tensor]] = field(default_factory=list)
    """Averaged weights after the update, by official name, of a run that averages them."""
    scores: list[float] = field(default_factory=list)
    """Of the validations, in their order; where weights are averaged, those of the model and of the average in turn."""
    predicted: list[list[int]] = field(default_factory=list)
    """Number of the best answer to each validation record, likewise."""
    without_gradient: set[str] = field(default_factory=set)
    """Official names of parameters that never had a gradient."""


class _Given:
    """Batches in a prescribed order, as the engine reads them."""

    epoch = 0

    def __init__(self, epochs: Sequence[Sequence[tuple[Batch, Targets]]]) -> None:
        self.epochs = epochs

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self) -> Iterator[tuple[Batch, Targets]]:
        return iter(self.epochs[self.epoch])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("a replayed run is not resumed")


@dataclass(frozen=True)
class Data:
    """Examples of a recorded task as tensors."""

    recorded: Recorded
    task: Task[Any, Any]
    store: NativeStore
    spec: InputSpec
    records: Mapping[str, Record]

    def collate(self, ids: Sequence[str]) -> tuple[Batch, Targets]:
        layout = TextLayout(self.recorded.tokenizer, self.spec)
        source = TaskSource(self.task, [self.records[name] for name in ids], layout)
        rngs = [generator_for(0)] * len(ids)
        examples = [source.example(number, rngs[0]) for number in range(len(ids))]
        batch, targets = Collator(self.store, self.spec, self.recorded.tokenizer)(examples, rngs)
        batch.validate()
        return batch, targets


def read_data(recorded: Recorded, settings: Mapping[str, Any], splits: str, store: Path) -> Data:
    """Records and regions of splits that commas join."""
    return Data(
        recorded,
        recorded.build_task(),
        recorded.regions(store, splits),
        recorded.inputs(settings),
        {record.id: record for record in recorded.records(splits)},
    )


def replay(
    recorded: Recorded,
    data: Data,
    run: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    valid: Data | None = None,
    run_folder: RunFolder | None = None,
    average: float | None = None,
    **optim: Any,
) -> Replayed:
    """Train as recorded, through `engine.fit` and nothing else.

    Args:
        valid: validate on the recorded records of it after each epoch.
        average: momentum of averaged weights.
        optim: settings of the optimiser to change, to see that the comparison notices.
    """
    settings, steps = run["settings"], run["steps"]
    given = settings["optimizer"]
    model = recorded.build_model(data.task, settings, "training_run_start")
    found = Replayed()
    named = dict(model.named_parameters())
    unseen = set(named)

    def step(batch: Batch, targets: Targets) -> Loss:
        logits = model(batch)
        (scores,) = logits.values()
        loss = data.task.loss(logits, targets)
        found.logits.append(scores.detach().clone())
        found.losses.append(loss.value.item())
        reached, count = loss.parts["answer_accuracy"]
        found.accuracies.append(float(reached / count))
        return loss

    def clip_and_note(optimizer: Any, config: Any, known: Any) -> Any:
        gradients = [parameter.grad for parameter in named.values() if parameter.grad is not None]
        unseen.difference_update(name for name, parameter in named.items() if parameter.grad is not None)
        found.norms.append(float(nn.utils.get_total_norm(gradients)))
        return clip_gradients(optimizer, config, known)

    def schedule_and_note(*arguments: Any, **named: Any) -> float:
        found.rates.append(apply_schedule(*arguments, **named))
        return found.rates[-1]

    def note_weights() -> None:
        found.weights.append({name: tensor.clone() for name, tensor in recorded.official(model).items()})

    def update_and_note(weights: WeightAverage) -> None:
        update_average(weights)
        with weights.in_place_of_model():
            found.averaged.append({name: tensor.clone() for name, tensor in recorded.official(model).items()})

    def validate() -> dict[str, float]:
        assert valid is not None
        kept = recorded.read(f"rows_{settings['valid']}")["kept_ids"]
        batch, targets = valid.collate([str(name) for name in kept])
        with torch.inference_mode():
            logits = model(batch)
            reached, count = data.task.loss(logits, targets).parts["answer_accuracy"]
        found.scores.append(float(reached / count))
        found.predicted.append(next(iter(logits.values())).argmax(1).tolist())
        return {"accuracy": found.scores[-1]}

    update_average = WeightAverage.update
    monkeypatch.setattr(WeightAverage, "update", update_and_note)
    monkeypatch.setattr(engine, "clip_gradients", clip_and_note)
    monkeypatch.setattr(engine, "apply_schedule", schedule_and_note)
    per_epoch = settings["updates_per_epoch"]
    batches = [data.collate([str(name) for name in each["ids"]]) for each in steps]
    config = TrainConfig(
        epochs=settings["epochs"],
        metric="accuracy",
        direction="max",
        average=average,
        optim=replace(
            lxmert_optimiser(),
            **{
                "lr": given["lr"],
                "betas": (given["b1"], given["b2"]),
                "eps": given["e"],
                "weight_decay": given["weight_decay"],
                "schedule": given["schedule"],
                "warmup_share": given["warmup"],
                "clip_norm": settings["clip"],
                **optim,
            },
        ),
    )
    assert len(steps) == settings["epochs"] * per_epoch == given["t_total"]
    engine.fit(
        model,
        step,
        _Given([batches[start : start + per_epoch] for start in range(0, len(batches), per_epoch)]),
        config=config,
        log=Log(),
        validate=None if valid is None else validate,
        run_folder=run_folder,
        after_update=note_weights,
    )
    found.without_gradient = _official_names(recorded, model, unseen)
    return found


def _official_names(recorded: Recorded, model: TaskModel, names: set[str]) -> set[str]:
    """Official names of the tensors that consist of these parameters alone."""
    with torch.no_grad():
        kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name in names else 0.0)
        found = {name for name, tensor in recorded.official(model).items() if bool((tensor == 1).all())}
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return found
