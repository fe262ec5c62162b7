"""How long to train, how, and what to keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from visling import runtime
from visling.errors import ConfigError, refuse
from visling.train.optim import OptimConfig

Kept = Literal["best", "last", "epochs"]

MAY_CHANGE = tuple(
    f"train.{name}"
    for name in (
        "log_every",
        "log_seconds",
        "save_every",
        "keep_states",
        "save_in_background",
        "max_seconds",
        "not_finite",
    )
)
"""Settings that may differ when a run is resumed, in the config of any run: they change nothing that is trained."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, how, and what to keep."""

    epochs: int = 10
    """Passes over the data."""
    max_steps: int | None = None
    """Optimiser updates in all; replaces `epochs` and `seconds` when given."""
    seconds: float | None = None
    """Length of the run in time, validation and saving included; replaces `epochs` when given. The schedule follows the
    share of it that has passed, so no two runs are the same: for repeatable runs use `max_steps`."""
    accumulation: int = 1
    """Micro-batches per update. Those that do not fill an update at the end of an epoch are dropped."""
    normalise: Literal["counts", "micro_steps"] = "counts"
    """How a loss is averaged over the micro-batches of an update and over processes. counts: every sum over all of them
    is divided by its count over all of them, as if they were one batch. micro_steps: the mean of their means (the
    releases), another number wherever their counts differ."""
    precision: runtime.Precision = "fp32"
    """bf16: matrix products in bfloat16; weights, optimiser and losses stay in float32."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    compile: Literal["auto", "no", "kernels", "graphs"] = "auto"
    """How forward and backward reach the device. no: operation by operation. kernels: torch.compile joins operations,
    which takes a minute or more for every shape of batch and a C compiler, on a GPU Triton too. graphs: both are
    recorded for every shape of batch and replayed as a CUDA graph (`train.graphs`); they then need the memory of a
    step twice. auto: graphs on a single GPU, if steps can be recorded; else no."""
    few_shapes: bool | None = None
    """Round the sizes of batches up, so that an epoch has few different ones and nothing waits for the device to count
    what is real; None = on a GPU."""
    seed: int = 0
    """Seed of dropout and of every other random draw in training; process k uses seed + k."""
    log_every: int = 50
    """Updates between training lines."""
    log_seconds: float | None = None
    """Seconds after which a training line is written although fewer than `log_every` updates were made; None =
    never."""
    validate_every: int = 1
    """Epochs or updates between validations; the end of a run is always validated."""
    validate_unit: Literal["epochs", "steps"] = "epochs"
    """Unit of `validate_every`."""
    metric: str = "loss"
    """Validation score by which the best weights are chosen."""
    direction: Literal["max", "min"] = "min"
    """Whether a higher or a lower `metric` is better."""
    keep: tuple[Kept, ...] = ("best",)
    """Weights that are kept as model folders: the best by `metric`; the last (written at each validation and at the
    end); those after every epoch, as models/epoch-0001 and so on. model/ holds the best if they are kept, else the
    last; if both are, the last are in models/last."""
    average: float | None = None
    """Momentum m of a second, averaged model: average = m x average + (1 - m) x model after every update. It is
    validated next to the model, with scores named averaged_<name>, and its best weights by `metric` are kept in
    models/averaged; None = no such model."""
    patience: int | None = None
    """Stop when the best score is more than this many validations old (VisualBERT: 3); None = never."""
    save_every: int = 500
    """Updates between saves of last/, in addition to those at each validation and at the end."""
    keep_states: int = 2
    """States that last/ keeps, the newest: if one is damaged, the one before it is resumed."""
    save_in_background: bool = True
    """Write states by a thread while training continues. It reads a copy: of the weights, the averaged ones, and what
    the optimiser keeps of each (twice as much for Adam), in main memory. False: training waits for the disk."""
    max_seconds: float | None = None
    """Save and return after this time, to be resumed with --resume; None = no limit."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What happens at a loss or a gradient that is infinite or NaN; its batch is kept in not_finite/. stop: the run
    ends; on a CPU before the update is applied, on a GPU when the loss is read for the next training line. skip: the
    update is left out and the schedule goes on (bert_adam's, which counts the updates of a parameter, stands still), at
    most ten times in a row; on a GPU every update then waits for the device."""
    unused_parameters: bool = True
    """Several processes only: some parameters receive no gradient in some steps. False saves a walk over the graph."""
    shard: bool = False
    """Several processes only: parameters, gradients and moments of the optimiser are spread over them (FSDP2), for
    models that are too large for the memory of one; else each process has all of them."""

    def __post_init__(self) -> None:
        refuse(self._find_problems())

    def _find_problems(self) -> Iterator[ConfigError]:
        for name in ("epochs", "accumulation", "log_every", "validate_every", "save_every", "keep_states"):
            if getattr(self, name) < 1:
                yield ConfigError(f"train.{name} must be 1 or more; found {getattr(self, name)}.")
        if not self.keep or len(set(self.keep)) < len(self.keep):
            yield ConfigError(
                f"train.keep must name each of best, last and epochs at most once, and one at least; found {self.keep}."
            )
        if self.max_steps is not None and self.max_steps < 1:
            yield ConfigError(
                f"train.max_steps must be 1 or more; found {self.max_steps}. To train by epochs leave it out."
            )
        if self.seconds is not None and not self.seconds > 0:
            yield ConfigError(
                f"train.seconds must be more than 0; found {self.seconds}. To train by epochs leave it out."
            )
        if self.average is not None and not 0 <= self.average < 1:
            yield ConfigError(
                f"train.average must lie in [0, 1); found {self.average}. To average no weights leave it out."
            )
        if self.seed < 0:
            yield ConfigError(f"train.seed must be 0 or more; found {self.seed}.")
        if self.patience is not None and self.patience < 0:
            yield ConfigError(
                f"train.patience must be 0 or more; found {self.patience}. To never stop early leave it out."
            )
