"""Where a run's numbers may go in addition to its log: TensorBoard, Weights & Biases, trackio, each imported late.

Nothing is sent over a network unless the user has set that up: W&B runs offline without credentials or with
WANDB_MODE=offline, and trackio writes to this machine unless its own variables name a server.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from visling import runtime
from visling.errors import ConfigError, RunError, nearest
from visling.train.state import RunFolder

EXTRAS: Mapping[str, str] = {"tensorboard": "log", "wandb": "wandb", "trackio": "trackio"}
"""Logger, which is also the name of its package -> extra that installs it."""

PROJECT = "visling"
"""Name under which W&B and trackio collect runs, unless the user's W&B settings name another."""


class Logger(Protocol):
    """What receives a run's numbers; it writes in the main process only."""

    def start(self, step: int) -> None:
        """Begin, or continue a run that is resumed after `step` updates."""
        ...

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Numbers by name at a step."""
        ...

    def close(self) -> None:
        """Write what is left; may be called again, and before `start`."""
        ...


class TensorBoard:
    """Event files in the run folder; what an interrupted run wrote past the step it resumes from is hidden."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / "tensorboard"
        self._writer: Any = None

    def start(self, step: int) -> None:
        """See `Logger`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._path), purge_step=step + 1)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Logger`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """A run of Weights & Biases; its files are in the run folder. Steps that a resumed run repeats are ignored there,
    and have the same values."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], identity: str) -> None:
        self._folder, self._config, self._identity = folder, config, identity
        self._run: Any = None

    def start(self, step: int) -> None:
        """See `Logger`."""
        import wandb

        try:
            settings = wandb.setup().settings
            closed = settings.mode == "online" and not wandb.login(prompt=False, verify=False)
            self._run = wandb.init(
                project=settings.project or PROJECT,
                name=self._folder.path.resolve().name,
                id=self._identity,
                resume="allow",  # of an offline run, `wandb sync` joins the files of one id
                mode="offline" if closed else None,  # None: the user's
                dir=str(self._folder.path),
                config=dict(self._config),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise RunError(
                f"Weights & Biases did not open the run: {error}. Check the connection and `wandb login`, or set "
                "WANDB_MODE=offline and upload later with `wandb sync`."
            ) from error

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Logger`."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Trackio:
    """A run of trackio, in its own folder on this machine (TRACKIO_DIR)."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], identity: str) -> None:
        self._name = f"{folder.path.resolve().name}-{identity}"  # trackio finds a run again by its name
        self._config = config
        self._module: Any = None

    def start(self, step: int) -> None:
        """See `Logger`."""
        import trackio

        self._module = trackio
        with contextlib.redirect_stdout(sys.stderr):  # it announces itself
            trackio.init(
                project=PROJECT, name=self._name, resume="allow", config=dict(self._config), embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """See `Logger`."""
        if self._module is not None:
            with contextlib.redirect_stdout(sys.stderr):
                self._module.finish()
            self._module = None


_SERVICES: Mapping[str, Callable[[RunFolder, Mapping[str, Any], str], Logger]] = {
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
"""Loggers whose runs have an identity."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that do not exist, or whose package is not installed.

    Raises:
        ConfigError: naming the nearest logger, or the command that installs it.
    """
    for name in names:
        if name not in EXTRAS:
            raise ConfigError(f"--log-to knows no {name!r}. {nearest(name, EXTRAS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{name} was requested with --log-to, but it is not installed. Install the extra: "
                f"pip install 'visling[{EXTRAS[name]}]'."
            )


def open_loggers(names: Sequence[str], folder: RunFolder, config: Mapping[str, Any]) -> list[Logger]:
    """The loggers of a run, none in a process that is not the main one. Identities are kept in `run.json`, so that a
    resumed run continues where it was logged.

    Args:
        config: settings of the run, plain values.
    """
    if not names or not runtime.is_main():
        return []
    known: dict[str, str] = folder.read().get("logged_as", {})
    identities = {name: known.get(name) or secrets.token_hex(4) for name in names if name in _SERVICES}
    folder.record({"logged_as": {**known, **identities}})
    return [
        _SERVICES[name](folder, config, identities[name]) if name in _SERVICES else TensorBoard(folder)
        for name in dict.fromkeys(names)
    ]
