"""The examples of a data set as a trained model reads them: which records, which regions, on which device.

opened = open_run(Path("vqa"), split="val")
for shown in opened.batches(batch_size=32):
    encoded = opened.encoder(shown.batch, capture=True)

`evaluate` scores these examples; what looks inside a model (heads, hidden states, relevance, alignment) goes through
them batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visling import damage
from visling.data.annotations.problems import Problems
from visling.data.batches.collate import Collator
from visling.data.batches.shown import ShownExamples
from visling.data.corpora.base import check_images, split_root
from visling.draws import KeyedDraws, Stream
from visling.errors import ConfigError, DataError, RunError
from visling.models.base import Encoder
from visling.models.task_model import TaskModel
from visling.nn.extraction import extract_features
from visling.pretrained.description import find_run
from visling.pretrained.features import check_features
from visling.pretrained.folder import ModelFolder, read_model_folder
from visling.regions.store import NativeStore
from visling.runs.inputs import Inputs
from visling.runs.own_files import OwnFiles, OwnRecords, check_records, read_files
from visling.runs.own_regions import check_ids, prepare_regions
from visling.runs.pictures import open_pictures
from visling.tasks.base import Task, TaskSource, TextOnly, read_records
from visling.tasks.retrieval import Retrieval
from visling.train.claim import REGIONS

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Records of a task, and what makes a model's inputs of them."""

    records: Sequence[Any]
    inputs: Inputs
    known: Mapping[str, Any]
    """What run.json says of the training; empty for a model folder that is in no run."""
    notice: str
    """How the features differ from those of the training, where they only come near."""
    data: Path | None
    """Folder of the annotations; None = a file of one's own."""


def open_examples(
    run: Path,
    saved: ModelFolder,
    task: Task[Any, Any],
    *,
    split: str,
    name: str | None = None,
    data: Path | None = None,
    file: Path | None = None,
    store: Path | None = None,
    images: Path | None = None,
    device: str = "auto",
    other_features: bool = False,
    progress: Progress | None = None,
) -> Examples:
    """The examples of a split, or of a file of one's own, for a model in or out of a run.

    Args:
        run: the folder that `saved` was read from.
        name: of a model of several tasks: the one that is meant.
        data, file, store, images, other_features: see `runs.evaluate.evaluate`.
        progress: called with images whose regions are extracted, and all of them.
    Raises:
        CheckpointError, DataError, StoreError: see their messages.
        RunError: a model folder without `data` or `store`.
    """
    home = find_run(run)
    known = {} if home is None else read_run_json(home)
    known = known.get("tasks", {}).get(name or run.name, known)
    unknown = [
        option
        for option, given in (("data", data or file), ("store", saved.text_only or store))
        if not given and not known.get(option)
    ]
    if unknown:
        raise RunError(
            f"{run} is not a run folder, nor in one: there is no run.json that says what the model was trained on. "
            f"Give {' and '.join(f'--{option}' for option in unknown)}, or the folder that finetune wrote with --out."
        )
    own = _read_own(task, known, split, data=data, file=file)
    regions, notice = None, ""
    if not saved.text_only:
        extracted = None if home is None else home / REGIONS
        if store is None:
            used = known.get("valid_store") or known["store"]
            store = extracted if extracted is not None and extracted.is_dir() else Path(used)
        if images is not None and own is not None and store != extracted and saved.extractor is None:
            raise RunError(
                f"{run} was trained on the regions in {store}, so none are extracted from --images: extract them with "
                "`visling regions extract` or convert released ones, and name them with --store instead."
            )
        if file is not None and own is not None and store == extracted:
            folder = images if images is not None else Path(known["images"])
            prepare_regions(own.images, folder, None, store, Problems(), init=run, device=device, progress=progress)
        regions = NativeStore.open(store)
        notice = check_features(saved, regions, override=other_features, extracts=saved.extractor is not None)
    if own is not None:
        records = own.splits[split]
        check_records(task, records, str(file or f"split {split}"))
        if regions is not None:
            check_ids(own.images, regions)
    else:
        data = split_root(known["data"][0])[0] if data is None else data
        records = read_records(task, data, split)
    if not records:
        raise DataError(f"split {split!r} of {data} holds no example.")
    if regions is not None:
        check_images(records, regions)
    inputs = Inputs(
        saved.model, saved.config, regions, device, vocabulary=saved.path / "vocab.txt", task_token=saved.task_token
    )
    if regions is not None:
        inputs.pictures = open_pictures(saved, records, images or known.get("images"), regions)
    return Examples(records=records, inputs=inputs, known=known, notice=notice, data=data)


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A trained model, in evaluation mode on its device, with the examples to look at it with."""

    saved: ModelFolder
    task: Task[Any, Any]
    """What its examples are of: of a pre-trained model retrieval, captions with their images."""
    model: TaskModel | None
    """None for a pre-trained model."""
    encoder: Encoder
    extractor: nn.Module | None
    inputs: Inputs
    records: Sequence[Any]
    notice: str
    data: Path | None
    """Folder of the annotations; None = a file of one's own."""

    @property
    def store(self) -> NativeStore | None:
        """Regions of the images; None for a model of the words alone."""
        regions = self.inputs.regions
        assert regions is None or isinstance(regions, NativeStore)
        return regions

    @property
    def class_names(self) -> Sequence[str]:
        """Of the detector; empty if they are not known."""
        return () if self.store is None else self.store.class_names

    @property
    def attribute_names(self) -> Sequence[str]:
        """Of the detector; empty if they are not known."""
        return () if self.store is None else self.store.attribute_names

    def batches(self, *, batch_size: int, first: int = 0) -> Iterator[ShownExamples]:
        """All examples in their order, as evaluation shows them; texts are not masked, and no row is cut to the joint
        length that some presets train with.

        Args:
            first: number of the example to begin with.
        """
        inputs = self.inputs
        source = TaskSource(self.task, self.records, inputs.layout)
        shown = source if self.store is not None else TextOnly(source)
        collate = Collator(
            inputs.regions,
            replace(inputs.spec, joint_limit=None),
            inputs.tokenizer,
            pictures=inputs.pictures,
            few_shapes=inputs.few_shapes,
            share=True,
        )
        for begin in range(first, len(self.records), batch_size):
            numbers = range(begin, min(begin + batch_size, len(self.records)))
            draws = KeyedDraws(0, 0, numbers)
            examples = [shown.example(n, rng) for n, rng in zip(numbers, draws.each(Stream.EXAMPLE), strict=True)]
            batch = collate(examples, draws)[0].to(inputs.device)
            with torch.no_grad():
                batch, _ = extract_features(self.extractor, batch)
            yield ShownExamples(
                numbers=numbers,
                records=[self.records[n] for n in numbers],
                examples=examples,
                batch=batch,
                regions=[
                    [] if self.store is None else [self.store[image] for image in example.images]
                    for example in examples
                ],
            )


def open_run(
    run: Path,
    *,
    split: str,
    task: str | None = None,
    data: Path | None = None,
    file: Path | None = None,
    store: Path | None = None,
    images: Path | None = None,
    device: str = "auto",
    other_features: bool = False,
    limit: int | None = None,
    reads: Task[Any, Any] | None = None,
    progress: Progress | None = None,
) -> OpenedRun:
    """A run folder or model folder with the examples of a split. A pre-trained model reads captions: those of a folder
    that the task retrieval reads, or a file of one's own with images and captions.

    Args:
        task: of a model of several tasks: the name of the one that is meant.
        limit: only the first so many examples; None = all.
        reads: task whose examples are read in place of the model's own.
        data, file, store, images, device, other_features, progress: see `open_examples`.
    Raises:
        CheckpointError, DataError, StoreError, RunError: see their messages.
        ConfigError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit is a number of examples, at least 1; found {limit}.")
    saved = read_model_folder(run)
    model: TaskModel | None = None
    asked: Task[Any, Any] = Retrieval()
    if saved.task is not None or saved.tasks or task is not None:
        saved = saved.for_task(task)
        model, asked = saved.task_model()
        encoder, extractor = model.encoder, model.extractor
    else:
        encoder, extractor = saved.encoder(), saved.region_extractor()
    asked = reads or asked
    found = open_examples(
        run,
        saved,
        asked,
        split=split if file is None else file.stem,
        name=task,
        data=data,
        file=file,
        store=store,
        images=images,
        device=device,
        other_features=other_features,
        progress=progress,
    )
    for module in filter(None, (model, encoder, extractor)):
        module.to(found.inputs.device).eval()
    return OpenedRun(
        saved=saved,
        task=asked,
        model=model,
        encoder=encoder,
        extractor=extractor,
        inputs=found.inputs,
        records=found.records if limit is None else found.records[:limit],
        notice=found.notice,
        data=found.data,
    )


def read_run_json(run: Path) -> dict[str, Any]:
    """Contents of a run folder's run.json.

    Raises:
        RunError: there is none.
    """
    try:
        known = damage.parse_json((run / "run.json").read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError(f"it holds a {type(known).__name__}")
    except (OSError, ValueError) as error:
        raise RunError(
            f"{run} is not a run folder: cannot read run.json ({error}). Give the folder that finetune wrote with "
            "--out."
        ) from error
    return known


def _read_own(
    task: Task[Any, Any], known: Mapping[str, Any], split: str, *, data: Path | None, file: Path | None
) -> OwnRecords | None:
    """The examples of a file of one's own, or of a split of a run on such files; None if a folder is read."""
    if file is not None:
        return read_files(task, {split: file})
    files = OwnFiles.from_run(known)
    return None if data is not None or files is None else files.read_split(task, split)
