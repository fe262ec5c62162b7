"""The releases' optimisers and schedules, with exactly their arithmetic, and torch's AdamW.

Sources  BertAdam: VisualBERT, LXMERT, CVLP and the first ViLBERT release. ReleaseAdamW: VL-BERT (bias correction) and
         ViLBERT's multi-task release (no bias correction). Recorded trajectories: tests/parity/test_optimisers.py.
Speed    Both are calls of torch's fused AdamW kernel, one call for all parameters: on a CPU five times faster than list
         operations (`torch._foreach_*`). No host synchronisation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visling.errors import ConfigError, refuse
from visling.shards import is_spread, local_parts, norms
from visling.train.schedule import Plateau, Schedule, ScheduleName


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Which optimiser updates which parameters, by how much, and how that changes over a run."""

    name: Literal["bert_adam", "release_adamw", "adamw", "sgd"] = "adamw"
    """bert_adam: no bias correction (VisualBERT, LXMERT). release_adamw: VL-BERT's. adamw: torch's fused one. sgd:
    torch's, with momentum (VL-BERT's VCR)."""
    lr: float = 5e-5
    """Peak learning rate."""
    momentum: float = 0.9
    """sgd only: share of the previous update that is repeated."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment (BertAdam's default)."""
    bias_correction: bool = True
    """release_adamw only: True in VL-BERT, False in ViLBERT's multi-task release."""
    weight_decay: float = 0.01
    """Decay per update, times the learning rate; decoupled, except in sgd, where it is added to the gradient."""
    no_decay: tuple[str, ...] = ("bias", "norm")
    """Parameters whose name contains one of these, in any case, are not decayed (VisualBERT: bias, LayerNorm; LXMERT
    and VL-BERT: none)."""
    no_decay_except: tuple[str, ...] = ()
    """Parts of names that `no_decay` does not cover after all (ViLBERT: its pattern misses the norms behind
    co-attention)."""
    decay_vectors: bool = True
    """False: parameters of at most one dimension (biases and norms, whatever their names) are not decayed either."""
    swap_decay: bool = False
    """Decay what `no_decay` names, and nothing else (first ViLBERT release, by mistake)."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Part of a name -> factor of `lr` for the parameters whose name contains it; the first match counts, all others
    have 1 (first ViLBERT release: 0.1 for what starts from BERT). Each must match something."""
    exclude: tuple[str, ...] = ()
    """Parameters whose name contains one of these are left out of the optimiser (VisualBERT: pooler). Each must match
    something."""
    clip: Literal["global", "global_in_order", "per_tensor", "none"] = "global"
    """Gradient clipping: one norm over all parameters, or one per parameter (VisualBERT, ViLBERT's first release).
    global_in_order adds up the norm in the order of the model instead of group by group: its last bit may differ."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    schedule: ScheduleName = "warmup_linear"
    """Shape of the learning rate; `triangle` is VL-BERT's name for `warmup_linear`."""
    warmup_share: float = 0.1
    """Share of the run (of its updates, or of its seconds) spent warming up."""
    warmup_steps: int | None = None
    """Updates spent warming up; replaces `warmup_share` when given, and cosine needs it."""
    decay_share: float = 0.3
    """Share of the run in which warmup_stable_decay falls to 0."""
    restarts: int = 0
    """warmup_cosine only: how often the rate jumps back to its peak, at equal distances."""
    cosine_period: Literal["rest", "run"] = "rest"
    """warmup_cosine only: what the half cosines are stretched over: the run after the warm-up, so that the last one
    ends at 0; or as many updates as the whole run has, so that the end cuts it off (ViLBERT's multi-task release)."""
    drop_epochs: tuple[float, ...] = ()
    """Epochs after each of which the rate is multiplied by `drop_factor`, in any schedule."""
    drop_factor: float = 0.1
    """What the rate is multiplied by after each of `drop_epochs`."""
    plateau: Plateau | None = None
    """Lower the rate when the validation metric stops improving, in any schedule; None = do not."""
    evaluate: Literal["before", "after"] = "before"
    """Whether the schedule reads the number of updates before the increment (BertAdam: the first update has lr 0) or
    after (VL-BERT)."""

    def __post_init__(self) -> None:
        refuse(self._find_problems())

    def _find_problems(self) -> Iterator[ConfigError]:
        if not 0 <= self.warmup_share <= 1:
            yield ConfigError(
                f"warmup_share must lie in [0, 1]; found {self.warmup_share}. For a number of updates use warmup_steps."
            )
        if not 0 < self.decay_share <= 1:
            yield ConfigError(f"decay_share must lie in (0, 1]; found {self.decay_share}.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            yield ConfigError(f"warmup_steps must be 0 or more; found {self.warmup_steps}.")
        if self.schedule == "cosine" and self.warmup_steps is None:
            yield ConfigError('schedule "cosine" warms up over a number of updates: set warmup_steps, 0 for none.')
        if self.lr < 0 or self.eps < 0 or self.weight_decay < 0:
            yield ConfigError(
                f"lr, eps and weight_decay must be 0 or more; found {self.lr}, {self.eps}, {self.weight_decay}."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            yield ConfigError(f"betas must lie in [0, 1); found {self.betas}.")
        if not 0 <= self.momentum < 1:
            yield ConfigError(f"momentum must lie in [0, 1); found {self.momentum}.")
        if self.restarts < 0:
            yield ConfigError(f"restarts must be 0 or more; found {self.restarts}.")
        if (self.restarts or self.cosine_period != "rest") and self.schedule != "warmup_cosine":
            yield ConfigError(
                f'restarts and cosine_period belong to schedule "warmup_cosine"; found {self.schedule!r}. '
                "Change the schedule or leave them out."
            )
        if any(epoch <= 0 for epoch in self.drop_epochs) or list(self.drop_epochs) != sorted(set(self.drop_epochs)):
            yield ConfigError(f"drop_epochs must be more than 0 and rise; found {self.drop_epochs}.")
        if self.drop_factor < 0:
            yield ConfigError(f"drop_factor must be 0 or more; found {self.drop_factor}.")
        if any(factor < 0 for factor in self.rates.values()):
            yield ConfigError(f"rates must be 0 or more; found {dict(self.rates)}. They are factors of lr.")
        if self.clip != "none" and self.clip_norm <= 0:
            yield ConfigError(f'clip_norm must be positive; found {self.clip_norm}. To clip nothing use clip = "none".')


class BertAdam(Optimizer):
    """Adam as in the BERT family's releases: no bias correction, decay added to the update before the learning rate.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g g;  p = p - lr factor(n) (m / (sqrt(v) + eps) + decay p)

    n counts the updates of each parameter separately: a parameter whose gradient is None is skipped, decay included,
    and its schedule lags.

    Args:
        schedule: factor of `lr` by the number of updates already made; None = 1.
        max_grad_norm: clip the gradient of each tensor to this norm; None = do not clip here.
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
        self.known_norms: Mapping[Tensor, Tensor] | None = None
        """Norms of the gradients of the next step, if they are known."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for done, bucket in _group_by_updates(self, group):
                if self.max_grad_norm is not None:
                    grads = [p.grad for p in bucket if p.grad is not None]
                    clip_each(grads, self.max_grad_norm, self.known_norms)
                factor = 1.0 if self.schedule is None else self.schedule(done)
                _apply_adamw(self, bucket, group, lr=group["lr"] * factor, decay=group["weight_decay"])
        self.known_norms = None
        return loss


class ReleaseAdamW(Optimizer):
    """AdamW as in VL-BERT and ViLBERT's multi-task release.

    It differs from torch's: eps is added to the root before the bias correction, and decay (lr times decay) is applied
    after the step, to the updated value.

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
            for done, bucket in _group_by_updates(self, group):
                size = lr
                if self.bias_correction:
                    size *= math.sqrt(1 - beta2 ** (done + 1)) / (1 - beta1 ** (done + 1))
                _apply_adamw(self, bucket, group, lr=size, decay=0.0)
                if group["weight_decay"] > 0:
                    weights = local_parts(bucket)
                    torch._foreach_add_(weights, weights, alpha=-lr * group["weight_decay"])
        return loss


def clip_each(grads: Sequence[Tensor], norm: float, known: Mapping[Tensor, Tensor] | None = None) -> None:
    """Scale each gradient, in place, to a norm of at most `norm`.

    Args:
        known: see `clip_gradients`.
    Source:
        VisualBERT release: clip_grad_norm_ per parameter, min(1, norm / (its norm + 1e-6)).
    """
    if grads:
        factors = (norm / (_find_norms(grads, known) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local_parts(grads), list(factors.unbind()))


def clip_together(grads: Sequence[Tensor], norm: float, known: Mapping[Tensor, Tensor] | None = None) -> None:
    """Scale all gradients, in place, by one factor to a joint norm of at most `norm`, as torch's `clip_grad_norm_`
    does.

    Args:
        known: see `clip_gradients`.
    """
    if grads:
        factor = (norm / (torch.linalg.vector_norm(_find_norms(grads, known)) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local_parts(grads), factor)


def clip_gradients(optimizer: Optimizer, config: OptimConfig, known: Mapping[Tensor, Tensor] | None = None) -> None:
    """Clip the gradients that an optimiser is about to use; a BertAdam that clips each tensor does so itself.

    Args:
        known: norms of gradients, all or none; measuring them takes as long as reading all weights.
    """
    if isinstance(optimizer, BertAdam):
        optimizer.known_norms = known
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if config.clip == "global_in_order":
        positions = [position for group in optimizer.param_groups for position in group["positions"]]
        parameters = [parameter for _, parameter in sorted(zip(positions, parameters, strict=True), key=itemgetter(0))]
    if config.clip in ("global", "global_in_order"):
        clip_together([p.grad for p in parameters if p.grad is not None], config.clip_norm, known)
    elif config.clip == "per_tensor" and not isinstance(optimizer, BertAdam):
        clip_each([p.grad for p in parameters if p.grad is not None], config.clip_norm, known)


def _find_norms(grads: Sequence[Tensor], known: Mapping[Tensor, Tensor] | None) -> Tensor:
    """(len(grads),) norm of each gradient."""
    return torch.stack([known[grad] for grad in grads]) if known else norms(grads)


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters of a module, in a decayed and an undecayed group for each learning rate; `names` and
    `positions` say which parameters of the module are in a group.

    Raises:
        ConfigError: an excluded name or one with its own rate matches nothing, or nothing is left to train.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for what, parts in (("exclude", config.exclude), ("rates", tuple(config.rates))):
        for part in parts:
            if not any(_contains(name, (part,)) for name, _ in module.named_parameters()):
                raise ConfigError(
                    f"optim.{what} names {part!r}, but no parameter of {type(module).__name__} contains it. "
                    "Take it out of the list."
                )
    named = [(name, parameter) for name, parameter in named if not _contains(name, config.exclude)]
    if not named:
        raise ConfigError(
            f"{type(module).__name__} has no parameter left to train. Check optim.exclude and what is frozen."
        )
    members: dict[tuple[float, bool], list[tuple[int, str, nn.Parameter]]] = {}
    for position, (name, parameter) in enumerate(named):
        group = (_find_rate(name, config), _is_decayed(name, parameter, config))
        members.setdefault(group, []).append((position, name, parameter))
    # Groups at the full rate come first: the log shows the rate of the first group.
    return [
        {
            "params": [parameter for _, _, parameter in members[rate, decays]],
            "names": [name for _, name, _ in members[rate, decays]],
            "positions": [position for position, _, _ in members[rate, decays]],
            "lr": config.lr * rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for rate, decays in sorted(members, key=lambda group: (group[0] != 1, group[0], not group[1]))
    ]


def _find_rate(name: str, config: OptimConfig) -> float:
    """Factor of the learning rate of a parameter."""
    return next((factor for part, factor in config.rates.items() if _contains(name, (part,))), 1.0)


def _is_decayed(name: str, parameter: nn.Parameter, config: OptimConfig) -> bool:
    covered = _contains(name, config.no_decay) and not _contains(name, config.no_decay_except)
    covered |= not config.decay_vectors and parameter.dim() <= 1
    return covered is config.swap_decay


def build_schedule(config: OptimConfig, total: int | None, *, per_epoch: float | None = None) -> Schedule:
    """The schedule of a run of `total` updates, or (None) of one that is bounded by time or by stop-and-go.

    Args:
        per_epoch: updates of an epoch, by which drops are placed.
    Raises:
        ConfigError: a run whose number of updates is not known, with a warm-up or an optimiser that needs it.
    """
    warmup = config.warmup_share
    if total is None:
        if config.name == "bert_adam":
            raise ConfigError(
                "bert_adam reads its schedule by the updates of each parameter, whose number a run of train.seconds or "
                "with stop_and_go does not know. Use train.max_steps, stop_and_go=none, or another optimiser."
            )
        if config.warmup_steps is not None and config.schedule not in ("constant", "cosine"):
            raise ConfigError(
                f"a run of train.seconds or with stop_and_go does not know its number of updates, of which "
                f"{config.warmup_steps} should warm up. Use optim.warmup_share, train.max_steps or stop_and_go=none."
            )
    elif config.warmup_steps is not None:
        warmup = config.warmup_steps / total
    assert per_epoch is not None or not config.drop_epochs, "drops need the updates of an epoch"
    return Schedule(
        name=config.schedule,
        total=total,
        warmup=warmup,
        warmup_steps=config.warmup_steps or 0,
        evaluate=config.evaluate,
        decay=config.decay_share,
        restarts=config.restarts,
        cosine_period=config.cosine_period,
        drops=tuple(int(epoch * (per_epoch or 0)) for epoch in config.drop_epochs),
        drop_factor=config.drop_factor,
    )


def build_optimizer(
    module: nn.Module, config: OptimConfig, total: int | None, *, per_epoch: float | None = None
) -> tuple[Optimizer, Schedule]:
    """The optimiser of a module's parameters and the schedule of a run of `total` updates; see `build_schedule`.

    Args:
        per_epoch: updates of an epoch, by which drops are placed.
    Raises:
        ConfigError: see `parameter_groups` and `build_schedule`.
    """
    groups, schedule = parameter_groups(module, config), build_schedule(config, total, per_epoch=per_epoch)
    for group in groups:
        group["initial_lr"] = group["lr"]
    return _build(groups, config, schedule), schedule


def _build(groups: list[dict[str, Any]], config: OptimConfig, schedule: Schedule) -> Optimizer:
    if config.name == "bert_adam":
        own = config.clip_norm if config.clip == "per_tensor" else None
        return BertAdam(
            groups, config.lr, betas=config.betas, eps=config.eps, schedule=schedule.factor, max_grad_norm=own
        )
    if config.name == "release_adamw":
        return ReleaseAdamW(
            groups, config.lr, betas=config.betas, eps=config.eps, bias_correction=config.bias_correction
        )
    if config.name == "sgd":
        spread = any(is_spread(parameter) for group in groups for parameter in group["params"])
        # PyTorch's fused kernel does not take tensors that are spread
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, fused=not spread, foreach=spread)
    return torch.optim.AdamW(groups, config.lr, betas=config.betas, eps=config.eps, fused=True)


def apply_schedule(
    optimizer: Optimizer, schedule: Schedule, done: int, share: float | None = None, *, level: float = 1.0
) -> float:
    """Set the learning rate of the next update after `done` updates, or after a share of the time, and return it.

    Args:
        level: what a plateau has multiplied the rate by.
    """
    shape, level = schedule.factor(done, share), level * schedule.drop(done)
    # BertAdam reads the shape itself, by each parameter's own count
    factor = level if isinstance(optimizer, BertAdam) else shape * level
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["initial_lr"] * shape * level)


def _contains(name: str, parts: Iterable[str]) -> bool:
    return any(part.lower() in name.lower() for part in parts)


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _group_by_updates(optimizer: Optimizer, group: dict[str, Any]) -> list[tuple[int, list[Tensor]]]:
    """Parameters that have a gradient, in lists of one device, dtype and number of updates already made, which comes
    first; counts this update."""
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


def _apply_adamw(optimizer: Optimizer, bucket: list[Tensor], group: dict[str, Any], *, lr: float, decay: float) -> None:
    """Update m and v by the gradients; then p = p - lr (m / (sqrt(v) + eps) + decay p).

    This is torch's fused AdamW after infinitely many updates, when its bias corrections are exactly 1.
    """
    torch._fused_adamw_(
        local_parts(bucket),
        local_parts(p.grad for p in bucket if p.grad is not None),
        local_parts(optimizer.state[p]["mean"] for p in bucket),
        local_parts(optimizer.state[p]["square"] for p in bucket),
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
