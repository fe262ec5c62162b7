"""Device, precision, seeds and processes; the one file that reads the environment."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import os
import platform
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from visling.errors import ConfigError, LostProcessError, RunError
from visling.members import Members


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("visling", "torch", "numpy", "tokenizers")},
    }


Precision = Literal["auto", "fp32", "bf16"]
"""Of matrix products. auto: bf16 where the device has units for it, fp32 elsewhere (bf16 emulated in software is ten
times slower than fp32)."""


_PARENT = "VISLING_PARENT"
"""Environment variable of the processes that a command starts: the number of its own process."""

PATIENCE = timedelta(minutes=10)
"""How long processes that train together wait for one that says nothing; one that has ended is noticed at once."""

_NOTICE = 5.0
"""Seconds in which a process that was lost is seen to have failed, where this one started it."""


def home() -> Path:
    """The one data and cache folder: `VISLING_HOME`, else the platform's data folder."""
    chosen = os.environ.get("VISLING_HOME")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "visling"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "visling"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visling"  # set but empty counts as unset


def is_offline() -> bool:
    """Whether the environment forbids downloads: `VISLING_OFFLINE`, or the hub's own `HF_HUB_OFFLINE`."""
    yes = ("1", "on", "yes", "true")
    return any(os.environ.get(name, "").lower() in yes for name in ("VISLING_OFFLINE", "HF_HUB_OFFLINE"))


def serve_token() -> str | None:
    """The token of `visling serve`, `VISLING_TOKEN`: unlike an option, other users of a machine do not see it."""
    return os.environ.get("VISLING_TOKEN") or None


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; "auto" takes the first GPU, else the CPU.

    Raises:
        ConfigError: the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} sees no GPU. Use --device cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs, counted from 0."
        )
    return device


def resolve(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision that a setting means on a device."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[None]:
    """Context in which matrix products run in the given precision; losses stay in float32."""
    if resolve(precision, device) == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def limit_threads(count: int | None) -> None:
    """Limit torch to this many CPU threads; None leaves its choice."""
    if count is not None:
        torch.set_num_threads(count)


_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1
"""Parameters of glibc's `mallopt`."""


def keep_freed_memory(keep: bool = True) -> None:
    """Let this process keep the memory that it frees, instead of handing it back to the system, which must clear it
    before the next step gets it. Does nothing without glibc.

    Args:
        keep: False = as glibc does it by itself once large tensors have come and gone.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    settings = (
        {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
        if keep
        else {_MMAP_MAX: 2**16, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
    )
    for name, value in settings.items():
        libc.mallopt(name, value)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Stop Python's search for reference cycles until `resume_collector` is called or the context ends. While millions
    of records are read, it looks through all of them again and again, for half of the time."""
    global _collector_paused
    if not gc.isenabled():
        yield
        return
    gc.disable()
    _collector_paused = True
    try:
        yield
    finally:
        _collector_paused = False
        gc.enable()


_collector_paused = False
"""Whether it is `collector_paused` that stopped the search."""


def resume_collector() -> None:
    """Search for cycles again where `collector_paused` stopped it, but never in what exists by now."""
    if _collector_paused:
        gc.freeze()
        gc.enable()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_for(*key: int) -> np.random.Generator:
    """A NumPy generator that depends on these numbers only: (seed, epoch, index) for an example.

    Different keys of one length, of numbers below 2**32, have independent streams; NumPy pads short keys with zeros, so
    (7,) and (7, 0) share one.
    """
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def rank() -> int:
    """Number of this process; 0 if there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, as torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launch() -> str | None:
    """What identifies the torchrun that started this process, the same whenever it starts it again: its --rdzv-id, or
    the process itself if it has none; None = torchrun did not start it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":
        return name
    parent, began = os.getppid(), ""
    with contextlib.suppress(OSError):  # numbers of processes are used again; in a container they often start anew
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"process {parent} {began} of {socket.gethostname()}"


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


_patient: dist.ProcessGroup | None = None
"""Group in which processes wait for each other however long it takes; None = there is a single process."""


def wait_for_all() -> None:
    """Wait until every process has come here, however long one of them works: for what is not shared out evenly. A
    process that has ended is noticed at once."""
    if _patient is not None:
        dist.barrier(group=_patient)


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """Let one process of each machine run the block before the others do: it makes what they then read. Every process
    must come here."""
    if local_rank() > 0:
        wait_for_all()
    try:
        yield
    finally:
        if local_rank() == 0:
            wait_for_all()


@contextlib.contextmanager
def process_group(processes: int = 1) -> Iterator[None]:
    """Join the other processes if torchrun started this one, or start `processes` - 1 more of this same command; does
    nothing for a single process.

    Raises:
        LostProcessError: another process has ended, or has said nothing for too long.
        RunError: a process that this one started failed.
    """
    global _patient
    with contextlib.ExitStack() as stack:
        if processes > 1 and "RANK" not in os.environ:
            stack.enter_context(_start_others(processes))
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield
            return
        # The first optimizer step imports this, and if a group exists by then, something in it keeps the group alive
        # past `destroy_process_group`: gloo's threads, still running when the interpreter ends, may abort the process.
        importlib.import_module("torch._dynamo")
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        _end_with_parent()
        with _explain_lost():
            dist.init_process_group(
                "nccl" if torch.cuda.is_available() else "gloo",
                store=_meet(),
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=PATIENCE,
            )
            _patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
            if not is_main():
                _silence_output()
            try:
                yield
                # Nobody leaves while another still saves: a process that ends badly after this can harm nothing.
                wait_for_all()
            finally:
                _patient = None
                _forget_spread_tensors()
                dist.destroy_process_group()


def _meet() -> Any:
    """Where the processes of a group learn each other's addresses.

    torchrun offers a store of its own, which outlives its restarts and still has the addresses of processes that are
    gone (seen with PyTorch 2.13: the restarted ones try to reach those, and fail). There it only says where process 0
    of this start serves another one.
    """
    # Not every build of PyTorch has them
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, processes = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    host, key = os.environ["MASTER_ADDR"], "visling/port"
    if rank == 0:
        served = TCPStore(host, 0, processes, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        store.set(key, str(served.port))
        return served
    end = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < end:
        port = int(store.get(key))
        with contextlib.suppress(OSError):  # that of an earlier start, whose process 0 is gone
            socket.create_connection((host, port), timeout=5).close()
            return TCPStore(host, port, processes, is_master=False, wait_for_workers=False, timeout=PATIENCE)
        time.sleep(0.1)
    raise LostProcessError(f"process {rank} has found no process 0 at {host} for {PATIENCE}. Start the command again.")


def _forget_spread_tensors() -> None:
    """Let go of what keeps a group alive: models and optimisers of DTensors, which refer to each other in circles, and
    what PyTorch remembers of their operations."""
    gc.collect()
    if "torch.distributed.tensor" in sys.modules:
        importlib.import_module("torch.distributed.tensor.debug")._clear_sharding_prop_cache()


@contextlib.contextmanager
def _explain_lost() -> Iterator[None]:
    """Turn errors of messages between processes into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's own are plain RuntimeErrors
            raise
        number, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
        happened = "has waited too long for another one" if "imed out" in str(error) else "has lost another one"
        raise LostProcessError(
            f"process {number} of {count}, counted from 0, {happened}: it failed or was killed, or its machine is "
            "gone; its own message says why. What was saved is kept: give the same command again, with --resume if it "
            "trains or extracts; torchrun --max-restarts does so by itself."
        ) from error


def _silence_output() -> None:
    """Drop what this process prints from now on: the main one prints the same. Errors and warnings are still shown."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def is_first_to_say(message: str) -> bool:
    """Whether no other process that torchrun started for this command, on any machine, has said this before: what all
    refuse is said once, what one alone refuses is said, too."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or host is None or port is None:
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # exported if PyTorch was built with it
            host, int(port), is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
        )
        return bool(store.add(f"visling/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1)
    except RuntimeError:  # the store is gone: it ends with torchrun on the first machine
        return True


def _end_with_parent() -> None:
    """Let a process that `_start_others` or torchrun started end soon after the one that did: if that is killed, nobody
    else ends this one, which would write into the files of a run that has been resumed meanwhile, or wait for ever."""
    parent = os.environ.get(_PARENT)
    if parent is None and "TORCHELASTIC_RUN_ID" in os.environ:
        parent = str(os.getppid())
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _start_others(processes: int) -> Iterator[None]:
    """Processes 1, 2, ... of a group on this machine, of which this process becomes number 0. They end with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    members = Members(
        [sys.executable, *sys.orig_argv[1:]],
        [
            os.environ | group | {"RANK": str(number), "LOCAL_RANK": str(number), _PARENT: str(os.getpid())}
            for number in range(1, processes)
        ],
    )
    os.environ.update(group, RANK="0", LOCAL_RANK="0")
    finished = threading.Event()
    threading.Thread(target=members.watch, args=(finished,), daemon=True).start()
    try:
        yield
        if failure := members.join():
            raise RunError(failure)
    except LostProcessError as error:
        if failure := members.find_failure(within=_NOTICE):
            raise RunError(failure) from error
        raise
    finally:
        finished.set()
        for name in (*group, "RANK", "LOCAL_RANK"):
            del os.environ[name]
        members.end()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, in float64; `values` is not changed."""
    total = values.to(torch.float64, copy=world_size() > 1)  # all_reduce writes into its argument
    if world_size() > 1:
        dist.all_reduce(total)
    return total
