"""TensorBoard, Weights & Biases and trackio: what they receive, that a resumed run continues where it was logged, and
that nothing leaves this machine. The services are run themselves where they are installed; what we tell them is
compared on stand-ins too."""

from __future__ import annotations

import socket
import sqlite3
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from visling.errors import ConfigError, RunError
from visling.train.log import Log, Machine
from visling.train.loggers import EXTRAS, check_loggers, open_loggers
from visling.train.state import RunFolder

CONFIG = {"train": {"epochs": 2}, "recipe": "toy"}
MACHINE = Machine(examples_per_second=1.0, data_wait=0.1, memory=10**9, utilisation=None, product_rate=None)


def write(path: Path, names: list[str], *, resume: bool = False) -> RunFolder:
    """A run of two updates, or two more of it."""
    folder = RunFolder.create(path, resume=resume)
    begin = 2 if resume else 0
    with Log(loggers=open_loggers(names, folder, CONFIG)) as log:
        log.start(begin, 4)
        for step in (begin + 1, begin + 2):
            log.train(
                step=step, epoch=1, loss=1.0 / step, parts={}, lr=0.1, machine=MACHINE, seconds=1.0,
                seconds_per_step=1.0,
            )  # fmt: skip
        log.valid(step=begin + 2, epoch=1, scores={"accuracy": 0.5})
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials, no settings of the user, and no connection but to this machine."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        host = address if self.family == getattr(socket, "AF_UNIX", None) else address[0]
        assert self.family == getattr(socket, "AF_UNIX", None) or host in ("127.0.0.1", "::1", "localhost"), host
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


@pytest.mark.parametrize("name", EXTRAS)
def test_a_logger_that_is_not_installed_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name} was requested .* pip install 'visling\[{EXTRAS[name]}\]'"):
        check_loggers([name])


def test_an_unknown_logger_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--log-to knows no 'tensorbord'.*tensorboard"):
        check_loggers(["tensorbord"])


def test_other_processes_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run")
    monkeypatch.setattr("visling.runtime.is_main", lambda: False)
    assert open_loggers(["tensorboard", "wandb"], folder, CONFIG) == []
    assert "logged_as" not in folder.read()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "run", ["tensorboard"])
    write(tmp_path / "run", ["tensorboard"], resume=True)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
    assert [event.step for event in read.Scalars("valid/accuracy")] == [2, 4]


class Service(ModuleType):
    """A stand-in for wandb or trackio, which remembers how it was called."""

    def __init__(
        self, name: str, mode: str = "online", project: str | None = None, *, credentials: bool = False
    ) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.Settings, self.Error = dict, ConnectionError
        self.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode, project=project))
        self.login = lambda *, prompt, verify: credentials or prompt or verify

    def init(self, **options: Any) -> Service:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize(
    ("service", "mode", "project"),
    [
        ({}, "offline", "visling"),
        ({"credentials": True}, None, "visling"),
        ({"credentials": True, "mode": "offline"}, None, "visling"),
        ({"mode": "disabled", "project": "mine"}, None, "mine"),
    ],
)
def test_what_wandb_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: dict[str, Any], mode: str | None, project: str
) -> None:
    """Offline without credentials, else in the mode that the user has chosen."""
    wandb = Service("wandb", **service)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = write(tmp_path / "run", ["wandb"])
    identity = folder.read()["logged_as"]["wandb"]
    assert [name for name, _ in wandb.calls] == ["init", "log", "log", "log", "finish"]
    assert wandb.calls[0][1] == {
        "project": project,
        "name": "run",
        "id": identity,
        "resume": "allow",
        "mode": mode,
        "dir": str(folder.path),
        "config": CONFIG,
        "settings": {"console": "off"},
    }
    assert wandb.calls[2:4] == [
        (
            "log",
            (
                2,
                {
                    "train/loss": 0.5,
                    "train/lr": 0.1,
                    "train/examples_per_second": 1.0,
                    "train/data_wait": 0.1,
                    "train/memory": 10**9,
                },
            ),
        ),
        ("log", (2, {"valid/accuracy": 0.5})),
    ]
    write(tmp_path / "run", ["wandb"], resume=True)
    assert wandb.calls[5][1]["id"] == identity
    write(tmp_path / "other", ["wandb"])
    assert wandb.calls[10][1]["id"] != identity


def test_wandb_that_cannot_be_reached_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ConnectionError("no route")

    wandb = Service("wandb", credentials=True)
    wandb.init = fail  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(RunError, match=r"did not open the run: no route.*WANDB_MODE=offline"):
        write(tmp_path / "run", ["wandb"])


def test_what_trackio_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = Service("trackio")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    folder = write(tmp_path / "run", ["trackio"])
    identity = folder.read()["logged_as"]["trackio"]
    assert [name for name, _ in trackio.calls] == ["init", "log", "log", "log", "finish"]
    assert trackio.calls[0][1] == {
        "project": "visling",
        "name": f"run-{identity}",
        "resume": "allow",
        "config": CONFIG,
        "embed": False,
        "auto_log_gpu": False,
        "auto_log_cpu": False,
    }
    write(tmp_path / "run", ["trackio"], resume=True)
    assert trackio.calls[5][1]["name"] == f"run-{identity}"


@pytest.mark.usefixtures("offline")
def test_wandb_itself_writes_into_the_run_folder(tmp_path: Path) -> None:
    """Two offline files of one identity, which `wandb sync` joins."""
    pytest.importorskip("wandb")
    folder = write(tmp_path / "run", ["wandb"])
    time.sleep(1.1)  # its folders are named by the second
    write(tmp_path / "run", ["wandb"], resume=True)
    identity = folder.read()["logged_as"]["wandb"]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 60  # its service writes the files in a process of its own
    while not all(b"train/loss" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline, "the files hold no losses"
        time.sleep(0.1)


@pytest.mark.usefixtures("offline")
def test_trackio_itself_continues_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it when it is first imported
    trackio = pytest.importorskip("trackio")
    write(tmp_path / "run", ["trackio"])
    write(tmp_path / "run", ["trackio"], resume=True)
    assert capsys.readouterr().out == ""
    with sqlite3.connect(Path(trackio.utils.TRACKIO_DIR) / "visling.db") as database:
        rows = database.execute("select run_name, step from metrics order by step").fetchall()
    assert len({name for name, _ in rows}) == 1
    assert [step for _, step in rows] == [1, 2, 2, 3, 4, 4]
