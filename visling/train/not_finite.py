"""Losses and gradients that are infinite or NaN: how they are found, which batch is kept for inspection, and how an
update is left out.

On a CPU, and with `train.not_finite` "skip" everywhere, each update is looked at before it is applied: its losses, and
the norms of its gradients, which may be infinite although the loss is not. On a GPU that is a wait per update; with
"stop" its losses are therefore read at the next training line only, when the batch is made again to be kept.

    OUT/not_finite/step-00000123-process-0.safetensors    every tensor of the batch and its targets, by its path
    OUT/not_finite/step-00000123-process-0.json           step, epoch, losses, examples, position, settings
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from visling import config as configs
from visling import runtime
from visling.errors import RunError
from visling.shards import norms
from visling.train.config import TrainConfig
from visling.train.exchange import gather
from visling.train.generators import capture_generators
from visling.types import Loss

FOLDER = "not_finite"
"""Folder of a run with the batches that are kept."""

MOST_IN_A_ROW = 10
"""Updates that are left out one after another; the next one stops the run, whose weights are to blame by then."""


class NotFiniteError(RunError):
    """A loss or a gradient is infinite or NaN.

    Args:
        step: of the update.
        parts: mean of each part of the loss.
        consequence: what has become of the weights, as sentences.
        what: that is not finite.
        own: whether it was found on this process.
    """

    def __init__(
        self,
        step: int,
        parts: Mapping[str, float],
        consequence: str,
        what: Literal["loss", "gradient"] = "loss",
        own: bool = True,
    ) -> None:
        self.step, self.parts, self.consequence, self.what, self.own = step, parts, consequence, what, own
        super().__init__(
            f"{self.summary}. {consequence} Look for NaN in the features or empty targets; otherwise lower "
            'train.optim.lr, warm up longer, clip gradients, or use train.precision = "fp32".'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Made again where it arrives: a comparison's runs are processes of their own."""
        return type(self), (self.step, self.parts, self.consequence, self.what, self.own)

    @property
    def summary(self) -> str:
        """What was found, as a sentence without its end."""
        listed = ", ".join(f"{name} {value:.4g}" for name, value in self.parts.items())
        return f"the {self.what} of step {self.step} is not finite ({listed})"


class MicroBatch(Protocol):
    """What is known of a micro-batch."""

    @property
    def pair(self) -> tuple[Any, Any]:
        """Batch and targets."""
        ...

    @property
    def before(self) -> Mapping[str, Any]:
        """Position of the loader before it."""
        ...

    @property
    def examples(self) -> list[int] | None:
        """Numbers of its examples in their source, if they are known."""
        ...


@dataclasses.dataclass(frozen=True)
class _MadeAgain:
    pair: tuple[Any, Any]
    before: Mapping[str, Any]
    examples: list[int] | None


_Unread = tuple[int, int, list[tuple[Mapping[str, Any], list[int] | None]]]
"""Step and epoch of an update whose losses were not read, and position and examples of its micro-batches."""


class FiniteGuard:
    """Watches the updates of a run.

    Args:
        folder: of the run; None = no batch is kept.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, device: torch.device, folder: Path | None) -> None:
        self.checks = device.type == "cpu" or config.not_finite == "skip"
        """Whether each update is looked at before it is applied."""
        self._config, self._folder = config, folder
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers()
        ]
        """What a forward pass changes."""
        self._unread: deque[tuple[int, int, list[tuple[Mapping[str, Any], list[int] | None]]]] = deque(
            maxlen=config.log_every
        )
        """Step, epoch, and positions and examples of the latest updates."""
        self._step, self._epoch = 0, 0
        self._taken: Sequence[MicroBatch] = ()
        self._before: list[Tensor] = []
        self._in_a_row = 0
        self._norms: Mapping[Tensor, Tensor] | None = None
        self.generators: Mapping[str, Any] | None = None
        """State before the update; None = nobody asks for it."""

    def begin(self, step: int, epoch: int, taken: Sequence[MicroBatch]) -> None:
        """Announce an update, before its forward passes."""
        self._step, self._epoch, self._taken = step, epoch, taken
        if self.checks:
            self._before = [buffer.clone() for buffer in self._statistics]
            self.generators = capture_generators() if self._folder is not None else None
        else:
            self._unread.append((step, epoch, [(one.before, one.examples) for one in taken]))

    def finds_bad_loss(self, losses: Sequence[Loss]) -> bool:
        """Whether a loss of this process is not finite, if each update is looked at."""
        return self.checks and not torch.stack([loss.value.detach() for loss in losses]).isfinite().all().item()

    def finds_bad_gradient(self) -> bool:
        """Whether a gradient is not finite, if each update is looked at; the same on all processes, once gradients are
        those of the update."""
        grads = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        if not self.checks or not grads:
            return False
        measured = norms(grads)
        self._norms = dict(zip(grads, measured.unbind(), strict=True))
        return not measured.isfinite().all().item()

    def accept(self) -> Mapping[Tensor, Tensor] | None:
        """The update is applied.

        Returns:
            Norms of its gradients, if they were looked at.
        """
        self._in_a_row = 0
        measured, self._norms = self._norms, None  # gradients that are referred to would stay in memory
        return measured

    def refuse(self, losses: Sequence[Loss]) -> str:
        """Undo what the forward passes of an update changed that must not be applied, and keep its batches. Every
        process must call it.

        Returns:
            What was found and where the batches are, as a sentence without its end.
        Raises:
            NotFiniteError: the update is not to be left out.
        """
        for buffer, before in zip(self._statistics, self._before, strict=True):
            buffer.copy_(before)
        self._norms = None
        self._in_a_row += 1
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss.value.item())]
        everywhere = gather(mean_parts(losses[bad[0]]) if bad else None)
        first = next((parts for parts in everywhere if parts is not None), None)
        what: Literal["loss", "gradient"] = "gradient" if first is None else "loss"
        kept = ""
        if bad or first is None:  # a gradient is everybody's
            batches = {number: (self._taken[number], losses[number]) for number in bad or range(len(losses))}
            kept = self._keep(self._step, self._epoch, what, batches)
        files = _name_files(gather(kept))
        many = self._in_a_row > MOST_IN_A_ROW
        error = NotFiniteError(
            self._step,
            mean_parts(losses[0]) if first is None else first,
            (f"It is the {self._in_a_row}th update in a row that would have to be left out. " if many else "")
            + "The weights were not updated by it; the saved state, if there is a run folder, is the one before it."
            + files,
            what=what,
        )
        if many or self._config.not_finite == "stop":
            raise error
        return f"{error.summary}; the update was left out.{files}"

    def keep_late(self, batches: Any, error: NotFiniteError) -> NotFiniteError:
        """Make the batches of an update again whose loss was found not to be finite after it had been applied, and keep
        them. Every process must call it.

        Args:
            batches: of the run, which is over.
        Returns:
            The error, which now says where they are.
        """
        kept = ""
        for step, epoch, taken in self._unread:
            if step == error.step and error.own:
                made: dict[int, tuple[MicroBatch, Loss | None]] = {}
                for number, (position, examples) in enumerate(taken):
                    batches.load_state_dict(position)
                    made[number] = _MadeAgain(next(iter(batches)), position, examples), None
                kept = self._keep(step, epoch, error.what, made)
        return NotFiniteError(error.step, error.parts, error.consequence + _name_files(gather(kept)), what=error.what)

    def _keep(self, step: int, epoch: int, what: str, batches: Mapping[int, tuple[MicroBatch, Loss | None]]) -> str:
        """Write micro-batches, by number, to a file; returns its path, or why there is none."""
        if self._folder is None:
            return ""
        stem = self._folder / FOLDER / f"step-{step:08d}-process-{runtime.rank()}"
        tensors = {
            f"micro_batch_{number}.{name}": tensor
            for number, (taken, _) in batches.items()
            for part, value in zip(("batch", "targets"), taken.pair, strict=True)
            for name, tensor in name_tensors(part, value)
        }
        about = {
            "step": step,
            "epoch": epoch,
            "process": runtime.rank(),
            "processes": runtime.world_size(),
            "not_finite": what,
            "micro_batches": {
                str(number): {
                    "examples": taken.examples,
                    "position": dict(taken.before),
                    "loss": None if loss is None else str(loss.value.item()),  # JSON has no NaN
                    "parts": {} if loss is None else {name: str(mean) for name, mean in mean_parts(loss).items()},
                }
                for number, (taken, loss) in batches.items()
            },
            "settings": configs.to_dict(self._config),
        }
        try:
            stem.parent.mkdir(exist_ok=True)
            save_file(tensors, stem.with_suffix(".safetensors"))
            stem.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            return f"(not written: {error})"
        return str(stem.with_suffix(".safetensors"))


def mean_parts(loss: Loss) -> dict[str, float]:
    """Mean of each part of a loss."""
    return {name: float(amount) / max(float(count), 1.0) for name, (amount, count) in loss.parts.items()}


def name_tensors(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors and arrays in a value, in main memory, each with its path: batch.text.ids."""
    if isinstance(value, Tensor):
        yield path, value.detach().cpu().clone(memory_format=torch.contiguous_format)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield path, torch.from_numpy(value.copy())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from name_tensors(f"{path}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from name_tensors(f"{path}.{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from name_tensors(f"{path}.{number}", item)


def _name_files(kept: Sequence[str]) -> str:
    """Sentence that says where the batches are."""
    files = [file for file in kept if file]
    return f" Its batch is in {', '.join(files)}." if files else ""
