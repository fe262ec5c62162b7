"""Folders, devices, precision, seeds, and processes seen from one alone."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from visling import __main__, runtime
from visling.errors import ConfigError

CPU = torch.device("cpu")


# The search for reference cycles


def test_the_search_for_cycles_rests_until_it_is_resumed_or_the_context_ends() -> None:
    assert gc.isenabled()
    with runtime.collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    runtime.resume_collector()
    assert gc.get_freeze_count() == frozen, "nothing was paused"
    try:
        with runtime.collector_paused():
            runtime.resume_collector()
            assert gc.isenabled()
            assert gc.get_freeze_count() > frozen
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_search_that_somebody_else_stopped_stays_so() -> None:
    gc.disable()
    try:
        with runtime.collector_paused():
            runtime.resume_collector()
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


# Folders


def test_home_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VISLING_HOME", str(tmp_path / "data"))
    assert runtime.home() == tmp_path / "data"
    assert not (tmp_path / "data").exists(), "asking makes no folder"


@pytest.mark.parametrize("unset", [True, False])
def test_home_without_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unset: bool) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("VISLING_HOME", "XDG_CACHE_HOME"):
        if unset:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, "")
    assert runtime.home() == tmp_path / ".cache" / "visling"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert runtime.home() == tmp_path / "cache" / "visling"


@pytest.mark.parametrize(
    ("platform", "inside"), [("darwin", "Library/Caches/visling"), ("win32", "AppData/Local/visling")]
)
def test_home_on_other_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, inside: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("VISLING_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert runtime.home() == tmp_path / inside


# Devices


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_takes_the_gpu_of_this_process_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    gpus(monkeypatch, 0)
    assert runtime.pick_device() == CPU
    gpus(monkeypatch, 4)
    assert runtime.pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert runtime.pick_device() == torch.device("cuda", 3)
    assert runtime.pick_device("cpu") == CPU


def test_devices_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"'cuda' was asked for, but PyTorch .* sees no GPU\. Use --device cpu"):
        runtime.pick_device("cuda")
    with pytest.raises(ConfigError, match="unknown device 'gpu': use auto, cpu, cuda or cuda:N"):
        runtime.pick_device("gpu")
    gpus(monkeypatch, 2)
    assert runtime.pick_device("cuda:1") == torch.device("cuda", 1)
    assert runtime.pick_device("cuda") == torch.device("cuda")
    with pytest.raises(ConfigError, match="'cuda:2' was asked for, but there are 2 GPUs, counted from 0"):
        runtime.pick_device("cuda:2")


# Precision


@pytest.mark.parametrize("able", [True, False])
def test_auto_precision_follows_the_units(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return able or including_emulation

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = "bf16" if able else "fp32"
    assert runtime.resolve("auto", CPU) == expected
    assert runtime.resolve("auto", torch.device("cuda")) == expected
    assert asked == [False], "emulated bf16 is slower than fp32"
    assert runtime.resolve("auto", torch.device("mps")) == "fp32"
    assert runtime.resolve("bf16", CPU) == "bf16"
    assert runtime.resolve("fp32", CPU) == "fp32"


def test_autocast_lowers_matrix_products_only_and_losses_stay() -> None:
    x, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
    with runtime.autocast(CPU, "bf16"):
        scores = x @ x
        loss = torch.nn.functional.cross_entropy(scores, labels)
    assert (scores.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    with runtime.autocast(CPU, "fp32") as given:
        assert (x @ x).dtype == torch.float32
    assert given is None
    assert isinstance(runtime.autocast(CPU, "fp32"), contextlib.nullcontext)


# Seeds


RECORDED = {
    (0,): [1555378585, 1221250863, 759123856],
    (7, 0, 0): [2099785575, 94189881, 17620317],
    (7, 0, 1): [184291324, 769183290, 190543205],
    (7, 1, 0): [147947851, 476444818, 1905573359],
    (1, 2, 3, 4, 5): [148970431, 1979518171, 560662097],
}
"""Key -> first three of `integers(2**31)`: a change would change every stored scene and every resumed run."""


@pytest.mark.parametrize("key", RECORDED)
def test_generators_are_stable(key: tuple[int, ...]) -> None:
    assert runtime.generator_for(*key).integers(2**31, size=3).tolist() == RECORDED[key]


def test_generators_depend_on_every_number_and_its_place() -> None:
    keys = [(seed, epoch, index) for seed in (0, 1, 7) for epoch in (0, 1, 7) for index in (0, 1, 7, 2**32 - 1)]
    first = {tuple(runtime.generator_for(*key).integers(2**31, size=3)) for key in keys}
    assert len(first) == len(keys), f"{len(first)} streams for {len(keys)} keys"


def test_generators_do_not_share_state() -> None:
    first = runtime.generator_for(1, 2)
    first.random(100)
    np.random.seed(5)
    assert runtime.generator_for(1, 2).random() == runtime.generator_for(1, 2).random()
    assert runtime.generator_for(1, 2).random() != first.random()


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


@pytest.mark.parametrize("seed", [0, 3, 2**40])
def test_seeds_reach_all_three_sources(seed: int) -> None:
    runtime.seed_everything(seed)
    first = draws()
    second = draws()
    runtime.seed_everything(seed)
    assert draws() == first
    runtime.seed_everything(seed + 1)
    others = draws()
    assert all(a != b and a != c for a, b, c in zip(first, second, others, strict=True)), (first, second, others)


# Processes


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"}])
def test_alone_there_is_no_process_group(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with runtime.process_group():
        assert not torch.distributed.is_initialized()
        assert (runtime.rank(), runtime.world_size(), runtime.local_rank(), runtime.is_main()) == (0, 1, 0, True)


def test_a_process_group_is_joined_and_left_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(runtime, "_meet", lambda: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, **_: f"patient {backend}")
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: calls.append(f"all done, {group}"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("left"))
    with pytest.raises(KeyError), runtime.process_group():
        raise KeyError
    assert calls == ["gloo", "left"]
    with runtime.process_group():
        calls.append("worked")
    assert calls[2:] == ["gloo", "worked", "all done, patient gloo", "left"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_sums_over_processes_leave_the_values(
    monkeypatch: pytest.MonkeyPatch, processes: int, dtype: torch.dtype
) -> None:
    values = torch.tensor([1, 2], dtype=dtype)
    monkeypatch.setattr(runtime, "world_size", lambda: processes)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2)
    )  # the other process holds the same
    total = runtime.sum_over_processes(values)
    assert total.dtype == torch.float64
    assert total.tolist() == [processes, 2 * processes]
    assert values.tolist() == [1, 2]


# Entry


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_entry_settles_threads_and_keeps_a_given_setting(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr("visling.cli.app.run", lambda: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    __main__.main()
    assert seen == [expected]


# Memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_or_given_back() -> None:
    """The system clears the pages that a process asks for: it is asked once, or for every tensor again."""
    script = """
import resource
import sys
import torch
from visling import runtime

runtime.keep_freed_memory(sys.argv[1] == "keep")
asked = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)  # 128 MiB
    asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(asked[-1])
"""

    def pages(way: str) -> int:
        command = [sys.executable, "-c", script, way]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert pages("give back") > 50  # huge pages or small ones
    assert pages("keep") < 10
