"""The releases' optimisers and schedules, with exactly their arithmetic, and torch's AdamW.

Sources  BertAdam: VisualBERT, LXMERT, CVLP and the first ViLBERT release. ReleaseAdamW: VL-BERT (bias correction) and
ViLBERT's multi-task
         release (no bias correction). Recorded trajectories: tests/parity/test_optimisers.py.
Speed    Both are written as calls of torch's fused AdamW kernel, one for all parameters, which is five times faster on a CPU than list operations
         (`torch._foreach_*`). No host synchronisation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visling.errors import ConfigError

ScheduleName = Literal[
    "constant", "warmup_constant", "warmup_linear", "warmup_cosine", "warmup_stable_decay", "triangle"
]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Which optimiser moves which parameters, how far, and how that changes over a run."""

    name: Literal["bert_adam", "release_adamw", "adamw"] = "adamw"
    """bert_adam: no bias correction (VisualBERT, LXMERT). release_adamw: VL-BERT's. adamw: torch's fused one."""
    lr: float = 5e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment (BertAdam's default)."""
    bias_correction: bool = True
    """release_adamw only: True in VL-BERT, False in ViLBERT's multi-task release."""
    weight_decay: float = 0.01
    """Decoupled decay per update, times the learning rate."""
    no_decay: tuple[str, ...] = ("bias", "norm")
    """Parameters whose name contains one of these, in any case, are not decayed (VisualBERT: bias, LayerNorm; LXMERT
    and VL-BERT: none)."""
    no_decay_except: tuple[str, ...] = ()
    """Parts of names that `no_decay` does not cover after all (ViLBERT: its pattern misses the norms behind
    co-attention)."""
    swap_decay: bool = False
    """Decay what `no_decay` names, and nothing else (first ViLBERT release, by mistake)."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Part of a name -> factor of `lr` for the parameters whose name contains it, the first that fits; 1 for all others
    (first ViLBERT release: 0.1 for what starts from BERT). Each must match something."""
    exclude: tuple[str, ...] = ()
    """Parameters whose name contains one of these stay out of the optimiser (VisualBERT: pooler). Each must match
    something."""
    clip: Literal["global", "per_tensor", "none"] = "global"
    """Gradient clipping: one norm over all parameters, or one per parameter (VisualBERT, ViLBERT's first release)."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    schedule: ScheduleName = "warmup_linear"
    """Shape of the learning rate; `triangle` is VL-BERT's name for `warmup_linear`."""
    warmup_share: float = 0.1
    """Share of all updates spent warming up."""
    warmup_steps: int | None = None
    """Updates spent warming up; replaces `warmup_share` when given."""
    decay_share: float = 0.3
    """Share of all updates in which warmup_stable_decay falls to 0."""
    evaluate: Literal["before", "after"] = "before"
    """Whether the schedule reads the number of updates before the increment (BertAdam: the first update has lr 0) or
    after (VL-BERT)."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_share <= 1:
            raise ConfigError(
                f"warmup_share must lie in [0, 1]; found {self.warmup_share}. For a number of updates use warmup_steps."
            )
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"decay_share must lie in (0, 1]; found {self.decay_share}.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be 0 or more; found {self.warmup_steps}.")
        if self.lr < 0 or self.eps < 0 or self.weight_decay < 0:
            raise ConfigError(
                f"lr, eps and weight_decay must be 0 or more; found {self.lr}, {self.eps}, {self.weight_decay}."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must lie in [0, 1); found {self.betas}.")
        if any(factor < 0 for factor in self.rates.values()):
            raise ConfigError(f"rates must be 0 or more; found {dict(self.rates)}. They are factors of lr.")
        if self.clip != "none" and self.clip_norm <= 0:
            raise ConfigError(f'clip_norm must be positive; found {self.clip_norm}. To clip nothing use clip = "none".')


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factor of the peak learning rate at each update."""

    name: ScheduleName
    total: int
    """Updates of the whole run."""
    warmup: float
    """Share of `total` spent warming up."""
    evaluate: Literal["before", "after"] = "before"
    decay: float = 0.3
    """Share of `total` in which warmup_stable_decay falls."""

    def factor(self, done: int) -> float:
        """Factor of the next update when `done` updates have been made.

        Source:
            warmup_linear, warmup_constant: BertAdam, x / w, then (1 - x) / (1 - w) or 1. VL-BERT's triangle is the same
                line read one update later.
            warmup_cosine: ours, half a cosine from the end of the warm-up (BertAdam's own jumps there).
            warmup_stable_decay: the peak rate until the last part of the run, then a line to 0.
        """
        if self.name == "constant":
            return 1.0
        x = (done + (self.evaluate == "after")) / self.total
        if x < self.warmup:
            return x / self.warmup
        if self.name == "warmup_constant":
            return 1.0
        if x >= 1:
            return 0.0
        if self.name == "warmup_cosine":
            return 0.5 * (1 + math.cos(math.pi * (x - self.warmup) / (1 - self.warmup)))
        if self.name == "warmup_stable_decay":
            return min(1.0, (1 - x) / self.decay)
        return (x - 1) / (self.warmup - 1)


class BertAdam(Optimizer):
    """Adam as the BERT family's releases have it: no bias correction, decay added to the update before the learning
    rate.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g g;  p = p - lr factor(n) (m / (sqrt(v) + eps) + decay p)

    n counts the updates of each parameter by itself: one whose gradient is None is skipped, decay included, and its
    schedule lags.

    Args:
        schedule: factor of `lr` by number of updates already made; None = 1.
        max_grad_norm: clip the gradient of each tensor by itself to this norm; None = do not clip here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        schedule: Callable[[int], float] | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for done, bucket in _buckets(self, group):
                if self.max_grad_norm is not None:
                    clip_each([p.grad for p in bucket if p.grad is not None], self.max_grad_norm)
                factor = 1.0 if self.schedule is None else self.schedule(done)
                _move(self, bucket, group, lr=group["lr"] * factor, decay=group["weight_decay"])
        return loss


class ReleaseAdamW(Optimizer):
    """AdamW as VL-BERT and ViLBERT's multi-task release have it.

    It differs from torch's: eps joins the root before the bias correction, and decay (lr times decay) is applied after
    the step, to the moved value.

    Args:
        bias_correction: scale the step by sqrt(1 - b2^n) / (1 - b1^n).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.bias_correction = bias_correction

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for done, bucket in _buckets(self, group):
                size = lr
                if self.bias_correction:
                    size *= math.sqrt(1 - beta2 ** (done + 1)) / (1 - beta1 ** (done + 1))
                _move(self, bucket, group, lr=size, decay=0.0)
                if group["weight_decay"] > 0:
                    torch._foreach_add_(bucket, bucket, alpha=-lr * group["weight_decay"])
        return loss


def clip_each(grads: Sequence[Tensor], norm: float) -> None:
    """Scale each gradient, in place, to at most `norm` by itself.

    Source:
        VisualBERT release: clip_grad_norm_ per parameter, min(1, norm / (its norm + 1e-6)).
    """
    if grads:
        factors = (norm / (torch.stack(torch._foreach_norm(list(grads))) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(grads), list(factors.unbind()))


def clip_gradients(optimizer: Optimizer, config: OptimConfig) -> None:
    """Clip the gradients an optimiser is about to use; a BertAdam that clips each tensor does so itself."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if config.clip == "global":
        nn.utils.clip_grad_norm_(parameters, config.clip_norm, foreach=True)
    elif config.clip == "per_tensor" and not isinstance(optimizer, BertAdam):
        clip_each([p.grad for p in parameters if p.grad is not None], config.clip_norm)


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters of a module in a decayed and an undecayed group for each learning rate; the names of each
    are under `names`.

    Raises:
        ConfigError: an excluded name or one with a rate of its own matches nothing, or nothing is left to train.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for what, parts in (("exclude", config.exclude), ("rates", tuple(config.rates))):
        for part in parts:
            if not any(_contains(name, (part,)) for name, _ in module.named_parameters()):
                raise ConfigError(
                    f"optim.{what} names {part!r}, but no parameter of {type(module).__name__} contains it. Take it out of the list."
                )
    named = [(name, parameter) for name, parameter in named if not _contains(name, config.exclude)]
    if not named:
        raise ConfigError(
            f"{type(module).__name__} has no parameter left to train. Check optim.exclude and what is frozen."
        )
    members: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        members.setdefault((_rate(name, config), _decays(name, config)), []).append((name, parameter))
    # Those at the full rate first: the log shows the rate of the first group.
    return [
        {
            "params": [p for _, p in members[rate, decays]],
            "names": [n for n, _ in members[rate, decays]],
            "lr": config.lr * rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for rate, decays in sorted(members, key=lambda group: (group[0] != 1, group[0], not group[1]))
    ]


def _rate(name: str, config: OptimConfig) -> float:
    """Factor of the learning rate of a parameter."""
    return next((factor for part, factor in config.rates.items() if _contains(name, (part,))), 1.0)


def _decays(name: str, config: OptimConfig) -> bool:
    """Whether a parameter is decayed."""
    covered = _contains(name, config.no_decay) and not _contains(name, config.no_decay_except)
    return covered is config.swap_decay


def build_schedule(config: OptimConfig, total: int) -> Schedule:
    """The schedule of a run of `total` updates."""
    warmup = config.warmup_share if config.warmup_steps is None else config.warmup_steps / total
    return Schedule(
        name=config.schedule, total=total, warmup=warmup, evaluate=config.evaluate, decay=config.decay_share
    )


def build_optimizer(module: nn.Module, config: OptimConfig, total: int) -> tuple[Optimizer, Schedule]:
    """The optimiser of a module's parameters and the schedule of a run of `total` updates.

    Raises:
        ConfigError: see `parameter_groups`.
    """
    groups, schedule = parameter_groups(module, config), build_schedule(config, total)
    for group in groups:
        group["initial_lr"] = group["lr"]
    if config.name == "bert_adam":
        own = config.clip_norm if config.clip == "per_tensor" else None
        return BertAdam(
            groups, config.lr, betas=config.betas, eps=config.eps, schedule=schedule.factor, max_grad_norm=own
        ), schedule
    if config.name == "release_adamw":
        return ReleaseAdamW(
            groups, config.lr, betas=config.betas, eps=config.eps, bias_correction=config.bias_correction
        ), schedule
    return torch.optim.AdamW(groups, config.lr, betas=config.betas, eps=config.eps, fused=True), schedule


def apply_schedule(optimizer: Optimizer, schedule: Schedule, done: int) -> float:
    """Set the learning rate of the next update, `done` updates having been made, and return it."""
    factor = schedule.factor(done)
    if not isinstance(optimizer, BertAdam):  # BertAdam asks the schedule itself, by each parameter's own count
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["initial_lr"] * factor)


def _contains(name: str, parts: Iterable[str]) -> bool:
    return any(part.lower() in name.lower() for part in parts)


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _buckets(optimizer: Optimizer, group: dict[str, Any]) -> list[tuple[int, list[Tensor]]]:
    """Parameters that have a gradient, in lists of one kind, each with the number of updates already made; counts them
    as made."""
    buckets: defaultdict[tuple[int, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["square"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buckets[state["step"], parameter.device, parameter.dtype].append(parameter)
        state["step"] += 1
    return [(done, bucket) for (done, _, _), bucket in buckets.items()]


def _move(optimizer: Optimizer, bucket: list[Tensor], group: dict[str, Any], *, lr: float, decay: float) -> None:
    """m and v take in the gradients; then p = p - lr (m / (sqrt(v) + eps) + decay p).

    That is torch's fused AdamW after infinitely many updates, when its bias corrections are exactly 1.
    """
    torch._fused_adamw_(
        bucket,
        [p.grad for p in bucket if p.grad is not None],
        [optimizer.state[p]["mean"] for p in bucket],
        [optimizer.state[p]["square"] for p in bucket],
        [],
        [torch.full((), math.inf, device=bucket[0].device)] * len(bucket),
        lr=lr,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=decay,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
