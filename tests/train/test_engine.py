"""The loop: what happens in a step and in which order, what is kept, and how it fails."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling import config as configs
from visling.errors import ConfigError, DataError, RunError
from visling.train import engine
from visling.train.config import TrainConfig
from visling.train.engine import fit, predict
from visling.train.graphs import MOST_SHAPES
from visling.train.log import Log, read
from visling.train.meter import Meter, count_examples
from visling.train.optim import OptimConfig
from visling.train.schedule import Plateau, PlateauState
from visling.train.state import RunFolder, State, Sums
from visling.types import Batch, Loss, Text

PLAIN = OptimConfig(name="adamw", lr=0.05, schedule="constant", clip="none", weight_decay=0.0)


def train(
    toy: ModuleType, *, dropout: float = 0.0, batch_size: int = 4, step: Any = None, device: str = "cpu", **changes: Any
) -> tuple[Any, State]:
    """A toy run without a folder."""
    extra = {
        name: changes.pop(name)
        for name in ("validate", "after_update", "run_folder", "save_model", "log", "reseed", "count")
        if name in changes
    }
    model, usual = toy.make(dropout)
    model.to(device)
    settings: dict[str, Any] = {"optim": PLAIN, "accumulation": 1, "epochs": 1} | changes
    state = fit(
        model,
        (step or (lambda model: usual))(model),
        toy.Pairs(batch_size),
        config=toy.config(**settings),
        **{"log": Log(), **extra},
    )
    return model, state


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_accumulation_equals_one_big_batch(toy: ModuleType) -> None:
    small, _ = train(toy, batch_size=4, accumulation=2)
    big, state = train(toy, batch_size=8)
    assert state.step == 5
    assert_close(weights(small), weights(big), atol=1e-6, rtol=1e-5)
    start, _ = toy.make(0.0)
    assert not torch.allclose(start.out.weight, big.out.weight, atol=1e-3)


def test_normalising_by_counts_equals_one_big_batch_whatever_the_counts(toy: ModuleType) -> None:
    def lines(**settings: Any) -> tuple[nn.Module, list[float]]:
        stream = io.StringIO()
        model, _ = train(toy, step=toy.masked, log=Log(None, stream=stream), log_every=1, **settings)
        return model, [float(loss) for loss in re.findall(r"loss ([0-9.]+)", stream.getvalue())]

    big, expected = lines(batch_size=8)
    by_counts, losses = lines(batch_size=4, accumulation=2, normalise="counts", count=toy.count_masked)
    by_steps, others = lines(batch_size=4, accumulation=2)
    assert_close(weights(by_counts), weights(big), atol=1e-6, rtol=1e-5)
    assert losses == pytest.approx(expected, abs=1e-3)
    assert not torch.allclose(by_steps.out.weight, big.out.weight, atol=1e-4)
    assert others != pytest.approx(expected, abs=1e-3)


def test_one_process_and_one_batch_minimise_the_loss_as_it_is(toy: ModuleType) -> None:
    one, other = (train(toy, step=toy.masked, normalise=kind)[0] for kind in ("counts", "micro_steps"))
    assert equal(weights(one), weights(other))


def test_counts_must_be_known_before_the_first_of_several_batches(toy: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"accumulation = 2 divides by counts.*micro_steps"):
        train(toy, normalise="counts", accumulation=2)


def test_a_loss_without_terms_has_no_exact_average(toy: ModuleType) -> None:
    def plain(model: nn.Module) -> Callable[[Tensor, Tensor], Loss]:
        def step(x: Tensor, y: Tensor) -> Loss:
            value = F.cross_entropy(model(x), y)
            return Loss(value=value, parts={"answer": (value.detach() * len(x), torch.tensor(len(x)))})

        return step

    train(toy, normalise="counts", step=plain)
    with pytest.raises(ConfigError, match=r"the loss answer is not known as sums and counts.*Loss\.mean"):
        train(toy, normalise="counts", accumulation=2, step=plain, count=toy.count_masked)


def test_bf16_keeps_weights_in_float32_and_learns(toy: ModuleType) -> None:
    seen = []

    def spying(model: nn.Module) -> Callable[[Tensor, Tensor], Loss]:
        def step(x: Tensor, y: Tensor) -> Loss:
            logits = model(x)
            seen.append(logits.dtype)
            return Loss.mean("answer", F.cross_entropy(logits.float(), y, reduction="none"))

        return step

    model, _ = train(toy, precision="bf16", step=spying, epochs=4)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert toy.accuracy(model.eval())()["loss"] < toy.accuracy(toy.make(0.0)[0].eval())()["loss"] - 0.2


def test_order_of_a_step(toy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events: list[str] = []

    def note(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(engine, "apply_schedule", note("schedule", engine.apply_schedule))
    monkeypatch.setattr(engine, "clip_gradients", note("clip", engine.clip_gradients))
    monkeypatch.setattr(torch.optim.AdamW, "step", note("update", torch.optim.AdamW.step))
    monkeypatch.setattr(Log, "train", note("log", Log.train))
    monkeypatch.setattr(RunFolder, "save_model", note("model", RunFolder.save_model))
    monkeypatch.setattr(RunFolder, "save_last", note("last", RunFolder.save_last))

    def spying(model: nn.Module) -> Callable[[Tensor, Tensor], Loss]:
        model.out.weight.register_hook(note("backward", lambda grad: grad))
        return note("forward", lambda x, y: Loss.mean("answer", F.cross_entropy(model(x), y, reduction="none")))

    train(
        toy,
        step=spying,
        accumulation=2,
        max_steps=1,
        log_every=1,
        validate=note("validate", lambda: {"accuracy": 0.5}),
        validate_every=1,
        validate_unit="steps",
        after_update=note("after_update", lambda: None),
        run_folder=RunFolder.create(tmp_path / "run"),
    )
    once = ["forward", "backward"]
    assert events == [*once, *once, "schedule", "clip", "update", "after_update", "log", "validate", "model", "last"]


def test_updates_epochs_and_dropped_batches(toy: ModuleType) -> None:
    calls = 0

    def counting(model: nn.Module) -> Callable[[Tensor, Tensor], Loss]:
        def step(x: Tensor, y: Tensor) -> Loss:
            nonlocal calls
            calls += 1
            return Loss.mean("answer", F.cross_entropy(model(x), y, reduction="none"))

        return step

    _, state = train(toy, step=counting, accumulation=2, epochs=2)
    assert (state.step, state.epoch, state.batch, calls) == (10, 2, 0, 20)
    calls = 0
    _, state = train(toy, step=counting, accumulation=3, max_steps=5)
    assert (state.step, state.epoch, state.batch, calls) == (5, 1, 6, 15)
    assert state.stopped == "finished"


def scored(scores: list[float]) -> Callable[[], dict[str, float]]:
    left = iter(scores)
    return lambda: {"accuracy": next(left)}


@pytest.mark.parametrize(
    ("direction", "scores", "best", "best_step", "steps"),
    [
        ("max", [0.1, 0.3, 0.2, 0.3, 0.9], 0.3, 2, 4),
        ("min", [0.5, 0.4, 0.6, 0.3, 0.35, 0.36], 0.3, 4, 6),
        ("max", [math.nan, 0.1, math.nan, 0.0], 0.1, 2, 4),
        ("max", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 0.8, 8, 8),
    ],
)
def test_the_best_is_kept_and_patience_stops(
    toy: ModuleType, tmp_path: Path, direction: str, scores: list[float], best: float, best_step: int, steps: int
) -> None:
    at_step: list[Tensor] = []
    model, step = toy.make(0.0)
    folder = RunFolder.create(tmp_path / "run")
    config = toy.config(
        max_steps=8,
        accumulation=1,
        direction=direction,
        patience=1,
        validate_every=1,
        validate_unit="steps",
        optim=PLAIN,
    )
    given = scored(scores)

    def validate() -> dict[str, float]:
        at_step.append(model.out.weight.detach().clone())
        return given()

    with Log(folder.log) as log:
        state = fit(model, step, toy.Pairs(), config=config, log=log, validate=validate, run_folder=folder)
    assert (state.best, state.best_step, state.step) == (best, best_step, steps)
    assert state.stopped == ("patience" if steps < 8 else "finished")
    assert torch.equal(load_file(folder.model / "model.safetensors")["out.weight"], at_step[best_step - 1])
    assert [entry["scores"]["accuracy"] for entry in read(folder.log) if entry["kind"] == "valid"] == pytest.approx(
        scores[:steps], nan_ok=True
    )


def test_the_end_of_a_run_is_validated(toy: ModuleType) -> None:
    calls: list[int] = []
    _, state = train(
        toy, max_steps=7, validate_every=3, validate_unit="steps", validate=lambda: calls.append(1) or {"accuracy": 0.0}
    )  # type: ignore[func-returns-value]
    assert len(calls) == 3
    assert state.validated == 7


def test_without_validation_the_final_weights_are_the_best(toy: ModuleType, tmp_path: Path) -> None:
    written: list[Path] = []
    folder = RunFolder.create(tmp_path / "run")

    def save_model(path: Path) -> None:
        written.append(path)
        (path / "config.json").write_text("{}")

    train(toy, run_folder=folder, save_model=save_model)
    assert len(written) == 1
    assert (folder.model / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (("best",), {"model": "best"}),
        (("last",), {"model": "last"}),
        (("last", "best"), {"model": "best", "models/last": "last"}),
        (("epochs",), {"model": "last", "models/epoch-0001": 1, "models/epoch-0002": 2}),
        (
            ("best", "last", "epochs"),
            {"model": "best", "models/last": "last", "models/epoch-0001": 1, "models/epoch-0002": 2},
        ),
    ],
)
def test_the_models_that_are_kept(
    toy: ModuleType, tmp_path: Path, keep: tuple[Any, ...], kept: dict[str, str | int]
) -> None:
    """11 updates an epoch, 25 in all: the best weights are those after 7, the last are in the middle of an epoch."""
    model, step = toy.make(0.0)
    folder = RunFolder.create(tmp_path / "run")
    at: dict[str | int, Tensor] = {}
    done = 0

    def after_update() -> None:
        nonlocal done
        done += 1
        for name, steps in {"best": 7, 1: 11, 2: 22, "last": 25}.items():
            if done == steps:
                at[name] = model.out.weight.detach().clone()

    fit(
        model,
        step,
        toy.Pairs(),
        config=toy.config(
            max_steps=25, accumulation=1, keep=keep, validate_every=7, validate_unit="steps", optim=PLAIN
        ),
        log=Log(),
        validate=scored([0.9, 0.1, 0.2, 0.3]),
        run_folder=folder,
        after_update=after_update,
    )
    found = {
        file.parent.relative_to(folder.path).as_posix(): file
        for file in folder.path.rglob("model.safetensors")
        if folder.last not in file.parents
    }
    assert set(found) == set(kept)
    for name, expected in kept.items():
        assert torch.equal(load_file(found[name])["out.weight"], at[expected]), name


def test_without_validation_the_last_weights_are_kept(toy: ModuleType, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    model, _ = train(toy, run_folder=folder, keep=("best", "last"), max_steps=3)
    for kept in (folder.model, folder.models / "last"):
        assert torch.equal(load_file(kept / "model.safetensors")["out.weight"], model.out.weight)


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        ({}, 2),
        ({"keep": ("last",)}, 2),
        ({"keep": ("best", "last")}, 3),
        ({"keep": ("best", "epochs"), "epochs": 7}, 9),
        ({"keep": ("epochs",), "max_steps": 35}, 5),  # 11 updates an epoch: three epochs and a bit
        ({"keep": ("epochs",), "seconds": 1e-6}, 3),
    ],
)
def test_the_disk_must_have_room_for_the_models_that_are_kept(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], models: int
) -> None:
    asked: list[tuple[int, str]] = []

    def ask(folder: RunFolder, needed: int, *, mend: str) -> None:
        asked.append((needed, mend))

    monkeypatch.setattr(RunFolder, "require_space", ask)
    model, _ = train(toy, run_folder=RunFolder.create(tmp_path / "run"), **changes)
    ((needed, mend),) = asked
    size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    trained = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert needed == 3 * (size + 2 * trained) + models * size
    assert ("train.keep" in mend) == ("epochs" in changes.get("keep", ()))


@pytest.mark.parametrize("keep", [(), ("best", "best")])
def test_each_model_is_kept_once_and_one_at_least(keep: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=r"train\.keep must name each of best, last and epochs at most once"):
        TrainConfig(keep=keep)


def test_validation_does_not_change_the_training(toy: ModuleType) -> None:
    modes: list[bool] = []
    model, step = toy.make(0.3)

    def validate() -> dict[str, float]:
        modes.append(model.training)
        torch.rand(5)
        return {"accuracy": 0.0}

    config = toy.config(optim=PLAIN, validate_unit="steps")
    fit(model, step, toy.Pairs(), config=config, log=Log(), validate=validate)
    assert set(modes) == {False}
    assert model.training
    other, step = toy.make(0.3)
    fit(other, step, toy.Pairs(), config=config, log=Log())
    assert equal(weights(model), weights(other))


def test_an_unknown_metric_is_named(toy: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"'accuracy'.*Did you mean 'acuracy'"):
        train(toy, validate=lambda: {"acuracy": 1.0})


def test_log_lines_are_exact_means(toy: ModuleType, tmp_path: Path) -> None:
    losses: list[tuple[float, float, int]] = []

    def spying(model: nn.Module) -> Callable[[Tensor, Tensor], Loss]:
        inner = toy.masked(model)

        def step(x: Tensor, y: Tensor) -> Loss:
            loss = inner(x, y)
            amount, count = loss.parts["answer"]
            losses.append((loss.value.item(), amount.item(), int(count)))
            return loss

        return step

    with Log(tmp_path / "log.jsonl") as log:
        train(toy, step=spying, accumulation=2, log_every=2, log=log, epochs=1)
    found = [entry for entry in read(tmp_path / "log.jsonl") if entry["kind"] == "train"]
    assert [(entry["step"], entry["epoch"]) for entry in found] == [(2, 1), (4, 1), (5, 1)]
    for entry, (start, end) in zip(found, [(0, 4), (4, 8), (8, 10)], strict=True):
        span = losses[start:end]
        assert entry["loss"] == pytest.approx(sum(value for value, _, _ in span) / len(span), rel=1e-12)
        assert entry["parts"]["answer"] == pytest.approx(
            sum(amount for _, amount, _ in span) / sum(count for _, _, count in span), rel=1e-12
        )
        assert entry["lr"] == PLAIN.lr
        assert entry["examples_per_second"] > 0


def spoilt(toy: ModuleType, at: int) -> tuple[Any, Any]:
    """A toy whose loss is not a number in its `at`-th call."""
    model, step = toy.make()

    def spoil() -> None:
        raise KeyError

    wrapped = toy.interrupted(step, at, spoil)

    def bad(x: Tensor, y: Tensor) -> Loss:
        try:
            return wrapped(x, y)
        except KeyError:
            loss = step(x, y)
            return Loss(value=loss.value * math.nan, parts=loss.parts)

    return model, bad


def test_a_bad_loss_names_the_step_and_leaves_the_state_before_it(toy: ModuleType, tmp_path: Path) -> None:
    expected, _ = toy.run(tmp_path / "good")
    model, step = spoilt(toy, at=14)
    folder = RunFolder.create(tmp_path / "bad")
    with (
        pytest.raises(RunError, match=r"step 7 is not finite \(answer .*, size .*lower train.optim.lr"),
        Log(folder.log) as log,
    ):
        fit(model, step, toy.Pairs(), config=toy.config(), log=log, validate=toy.accuracy(model), run_folder=folder)
    saved = json.loads((max(folder.last.glob("step-*")) / "state.json").read_text())
    assert saved["state"]["step"] == 6
    assert saved["position"] == {"epoch": 1, "next": 2, "accumulation": 1}
    resumed, state = toy.run(tmp_path / "bad", resume=True)
    assert state.step == 15
    assert equal(weights(resumed), weights(expected))
    assert toy.lines(tmp_path / "bad") == toy.lines(tmp_path / "good")


def test_a_bad_loss_seen_late_names_its_step(tmp_path: Path) -> None:
    meter = Meter(Sums(), torch.device("cpu"), "fp32")
    for step, value in ((4, 1.0), (5, math.inf), (6, math.nan)):
        loss = Loss(value=torch.tensor(value), parts={"answer": (torch.tensor(value), torch.tensor(1))})
        meter.add(step, loss, 2, flops=0.0)
    with pytest.raises(RunError, match=r"step 5 is not finite \(answer inf\)"):
        meter.read(6)


def test_a_loader_that_promises_too_much(toy: ModuleType) -> None:
    class Short(toy.Pairs):  # type: ignore[name-defined, misc]
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield from list(super().__iter__())[:3]

    model, step = toy.make()
    with pytest.raises(DataError, match=r"11 more batches .* gave 3"):
        fit(model, step, Short(), config=toy.config(accumulation=1), log=Log())


def test_too_few_batches_for_an_update(toy: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"11 batches.*accumulation = 12"):
        train(toy, accumulation=12)


def test_time_bounds_a_run_by_a_schedule_over_its_share(toy: ModuleType, tmp_path: Path) -> None:
    """Of a clock that moves only in the step: 0.25 s per update, so that a run of 2 s has eight."""
    now = [100.0]

    def ticking(model: nn.Module) -> Callable[[Tensor, Tensor], Loss]:
        def step(x: Tensor, y: Tensor) -> Loss:
            now[0] += 0.25
            return Loss.mean("answer", F.cross_entropy(model(x), y, reduction="none"))

        return step

    optim = OptimConfig(name="adamw", lr=0.5, schedule="cosine", warmup_steps=1, clip="none")
    with pytest.MonkeyPatch.context() as patch, Log(tmp_path / "log.jsonl") as log:
        patch.setattr("time.monotonic", lambda: now[0])
        _, state = train(toy, step=ticking, seconds=2.0, optim=optim, log_every=3, log=log, epochs=1)
    assert (state.step, state.epoch, state.stopped, state.elapsed) == (8, 0, "finished", 2.0)
    found = [entry for entry in read(tmp_path / "log.jsonl") if entry["kind"] == "train"]
    assert [entry["step"] for entry in found] == [3, 6, 8]  # the last update is logged
    expected = [0.5 * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))) for share in (2 / 8, 5 / 8, 7 / 8)]
    assert [entry["lr"] for entry in found] == pytest.approx(expected)
    _, state = train(toy, seconds=1e-9, max_steps=3)
    assert state.step == 3  # updates replace time


def test_slow_updates_are_reported_by_time(toy: ModuleType, tmp_path: Path) -> None:
    """By a clock that moves only after updates: 4 s each, so that with lines every 10 s the third is due first."""
    now = [100.0]

    def tick() -> None:
        now[0] += 4.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now[0])
        for name, seconds in (("by-time", 10.0), ("by-updates", None)):
            with Log(tmp_path / name) as log:
                train(toy, after_update=tick, max_steps=8, log_every=5, log_seconds=seconds, log=log)
    assert [line["step"] for line in read(tmp_path / "by-time") if line["kind"] == "train"] == [3, 5, 8]
    assert [line["step"] for line in read(tmp_path / "by-updates") if line["kind"] == "train"] == [5, 8]


def test_a_run_bounded_by_time_resumes_with_the_time_that_is_left(toy: ModuleType, tmp_path: Path) -> None:
    now = [100.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now[0])

        def tick() -> None:
            now[0] += 0.5

        settings = {"seconds": 2.0, "after_update": tick}
        first = RunFolder.create(tmp_path / "run")
        _, state = train(toy, **settings, max_seconds=1.0, run_folder=first)
        assert (state.step, state.elapsed, state.stopped) == (2, 1.0, "max_seconds")
        now[0] += 1000
        again = RunFolder.create(tmp_path / "run", resume=True)
        with Log(again.log) as log:
            _, state = train(toy, **settings, run_folder=again, log=log)
    assert (state.step, state.elapsed, state.stopped) == (4, 2.0, "finished")
    assert "resumed at step 2 after 1 of 2 s" in again.log.read_text()


def test_a_caller_may_keep_its_random_stream(toy: ModuleType) -> None:
    """With `reseed=False` the seed of the config counts for nothing, and the caller's for everything."""

    def run(seed: int, *, reseed: bool, caller: int) -> list[Tensor]:
        model, step = toy.make(0.3)
        torch.manual_seed(caller)
        fit(model, step, toy.Pairs(), config=toy.config(optim=PLAIN, seed=seed), log=Log(), reseed=reseed)
        return weights(model)

    assert equal(run(1, reseed=False, caller=5), run(2, reseed=False, caller=5))
    assert not equal(run(1, reseed=False, caller=5), run(1, reseed=False, caller=6))
    assert equal(run(1, reseed=True, caller=5), run(1, reseed=True, caller=6))


@pytest.mark.parametrize("name", ["epochs", "accumulation", "log_every", "validate_every", "save_every", "max_steps"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{name} must be 1 or more; found 0"):
        TrainConfig(**{name: 0})


def test_seconds_must_be_positive() -> None:
    for seconds in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"train\.seconds must be more than 0; found"):
            TrainConfig(seconds=seconds)


def test_the_rate_drops_after_epochs_and_when_validation_stagnates(toy: ModuleType, tmp_path: Path) -> None:
    """Epochs of 11 updates; the score rises once, by less than the threshold after that."""
    scores = iter([0.5, 0.6, 0.6001, 0.6, 0.6, 0.6])
    optim = replace(PLAIN, lr=1.0, drop_epochs=(4.0,), plateau=Plateau(factor=0.5, patience=1, cooldown=1))
    with Log(tmp_path / "log.jsonl") as log:
        _, state = train(toy, optim=optim, epochs=6, log_every=11, log=log, validate=lambda: {"accuracy": next(scores)})
    lines = read(tmp_path / "log.jsonl")
    assert [line["lr"] for line in lines if line["kind"] == "train"] == [1.0, 1.0, 1.0, 1.0, 0.05, 0.05]
    told = [line for line in lines if line["kind"] == "event" and "stopped improving" in line["message"]]
    assert [(line["step"], line["message"]) for line in told] == [
        (44, "step 44: accuracy has stopped improving; the learning rate is multiplied by 0.5")
    ]
    assert state.plateau == PlateauState(best=0.6, stale=1, cooldown=0, level=0.5)


def test_a_plateau_needs_a_validation(toy: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"optim\.plateau .* by 'accuracy', but this run is not validated"):
        train(toy, optim=replace(PLAIN, plateau=Plateau()))


@pytest.mark.parametrize("average", [-0.1, 1.0])
def test_the_momentum_of_an_average_must_leave_it_movable(average: float) -> None:
    with pytest.raises(ConfigError, match=r"train\.average must lie in \[0, 1\)"):
        TrainConfig(average=average)


def test_patience_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match="patience"):
        TrainConfig(patience=-1)


def test_config_survives_plain_values() -> None:
    config = TrainConfig(precision="bf16", patience=3, optim=OptimConfig(name="bert_adam"))
    assert configs.from_dict(TrainConfig, configs.to_dict(config)) == config


def test_the_step_is_compiled_when_asked(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_step(step: Any, *, dynamic: bool) -> Any:
        assert dynamic is False, "a kernel for every shape of batch"
        compiled.append(step)
        return step

    monkeypatch.setattr(torch, "compile", compile_step)
    with torch._dynamo.config.patch(recompile_limit=8):
        train(toy, max_steps=1)
        assert compiled == []
        train(toy, max_steps=1, compile="kernels")
        assert len(compiled) == 1
        assert torch._dynamo.config.recompile_limit == MOST_SHAPES


def test_excluded_parameters_do_not_move(toy: ModuleType) -> None:
    optim = OptimConfig(name="bert_adam", lr=0.05, exclude=("norm",), clip="per_tensor", schedule="constant")
    model, _ = train(toy, optim=optim)
    start, _ = toy.make(0.0)
    assert torch.equal(model.norm.weight, start.norm.weight)
    assert not torch.equal(model.out.weight, start.out.weight)


def test_predict_neither_learns_nor_leaves_a_trace(toy: ModuleType) -> None:
    model, _ = toy.make(0.5)
    model.train()
    pairs = toy.Pairs()
    seen = []

    def step(x: Tensor, y: Tensor) -> Tensor:
        seen.append((model.training, torch.is_grad_enabled()))
        return model(x)

    results = []
    for result in predict(step, pairs, model=model):
        assert torch.is_grad_enabled()
        results.append(result)
    assert len(results) == len(pairs)
    assert set(seen) == {(False, False)}
    assert model.training
    assert next(iter(predict(step, toy.Pairs(), model=model, precision="bf16"))).dtype == torch.bfloat16


def test_examples_are_groups_of_rows() -> None:
    ids = torch.ones(8, 3, dtype=torch.int64)
    batch = Batch(text=Text(ids=ids, mask=ids.bool(), segments=ids), regions=None, group=4)
    assert count_examples((batch, None)) == 2
    shared = Batch(
        text=Text(ids=ids, mask=ids.bool(), segments=ids, row=torch.zeros(12, dtype=torch.int64)), regions=None, group=4
    )
    assert count_examples((shared, None)) == 3
    assert count_examples((torch.zeros(5, 2), None)) == 5
    assert count_examples(([object(), object(), object()], [])) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_run_follows_the_cpu_run(toy: ModuleType, tmp_path: Path, precision: str) -> None:
    here, _ = train(toy, accumulation=2, epochs=2)
    there, _ = train(
        toy, accumulation=2, epochs=2, device="cuda", precision=precision, run_folder=RunFolder.create(tmp_path / "run")
    )
    tolerance = 1e-4 if precision == "fp32" else 0.1
    assert_close([w.cpu() for w in weights(there)], weights(here), atol=tolerance, rtol=tolerance)
