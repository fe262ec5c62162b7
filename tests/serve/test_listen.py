"""The command: what it serves, where it listens, what it prints, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest

from visling import api
from visling import config as configs
from visling.cli import app, serving
from visling.recipes.tables import MULTITASK
from visling.runs.multitask import multitask
from visling.serve import listen
from visling.serve.pictures import Pictures
from visling.serve.runs import load_runs, name_runs
from visling.serve.settings import ServeSettings


@contextmanager
def serving_process(*words: object, environment: dict[str, str] | None = None) -> Iterator[tuple[Any, str]]:
    """A server in a process of its own, and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "visling", "serve", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"on (http://\S+) ", line)
        if found is None:
            process.wait(timeout=30)
            pytest.fail(f"{line}{process.stderr.read() if process.stderr else ''}")
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def test_the_command_serves_until_it_is_interrupted(world: Any) -> None:
    with serving_process("--run", world.vqa, "--port", 0) as (process, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        with httpx.Client(base_url=address) as client:
            (model,) = client.get("/api/models").json()
            assert model["run"] == f"{world.vqa.parent.name}/{world.vqa.name}"
            assert len(client.get("/api/examples").json()) == 3, "the test pictures of the run's own scenes"
            body = {"run": model["run"], **{key: model["examples"][0][key] for key in ("images", "text")}}
            assert client.post("/api/answer", json=body).json()["answer"]
            assert client.get("/api/models", headers={"Host": "evil.example"}).status_code == 403
            sent = client.post("/api/images", content=b"no picture")
            assert "not an image" in sent.json()["error"]
            _leave_early(address, body)
            assert client.post("/api/answer", json=body).status_code == 200, "others are answered"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert err.strip() == "Stopped."


def _leave_early(address: str, body: dict[str, Any]) -> None:
    """Ask, and close the connection without waiting for the answer."""
    host, port = re.findall(r"//([\d.]+):(\d+)", address)[0]
    content = json.dumps(body).encode()
    head = f"POST /api/inspect HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for _ in range(5):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)


def test_what_others_can_reach_needs_the_token(world: Any) -> None:
    with serving_process("--run", world.vqa, "--port", 0, "--host", "0.0.0.0") as (_, address):
        found = re.fullmatch(r"http://[^/]+:(\d+)/\?token=([\w-]{32})", address)
        assert found is not None, address
        here = f"http://127.0.0.1:{found[1]}"
        assert httpx.get(f"{here}/api/models").status_code == 401
        assert httpx.get(f"{here}/api/models", headers={"Authorization": f"Bearer {found[2]}"}).status_code == 200
        assert httpx.get(f"{here}/", params={"token": found[2]}).status_code == 303


def test_the_token_of_the_environment_is_not_printed_as_another(world: Any) -> None:
    words = ("--run", world.vqa, "--port", 0, "--allow-host", "Models.Example")
    with serving_process(*words, environment={"VISLING_TOKEN": "mine"}) as (_, address):
        assert address.endswith("/?token=mine")
        port = re.findall(r":(\d+)/", address)[0]
        headers = {"Authorization": "Bearer mine", "Host": "models.example"}
        assert httpx.get(f"http://127.0.0.1:{port}/api/models", headers=headers).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/api/models", headers={"Host": "models.example"}).status_code == 401


def test_a_port_in_use_is_named_with_a_free_one(world: Any, call: Callable[..., tuple[int, str]]) -> None:
    with listen.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        status, err = call("--run", world.vqa, "--port", port)
        assert status == 2
        found = re.search(
            rf"cannot listen on port {port} of 127\.0\.0\.1: Address already in use\. Port (\d+) is free: --port \1\.",
            err,
        )
        assert found is not None, err
        listen.bind("127.0.0.1", int(found[1])).close()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `visling serve` and returns its status and stderr."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["visling", "serve", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            app.run()
        return int(str(ended.value.code)), capsys.readouterr().err

    return run


def test_what_cannot_be_served_is_said_before_anything_is_served(
    world: Any, call: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    for words, expected in [
        (("--run", tmp_path / "gone"), "no model in"),
        (("--run", world.detector), "holds no model"),
        (("--run", world.pretrained), "head"),
        (("--run", world.vqa, "--examples", tmp_path / "gone"), "Check --examples"),
        (("--run", world.vqa, "--examples", tmp_path), "no picture in"),
        (("--run", world.vqa, "--host", "203.0.113.7"), "cannot listen on 203.0.113.7"),
        (("--run", world.vqa, "--host", "no.such.host.invalid"), "Give an address of this machine: --host 127.0.0.1"),
    ]:
        status, err = call(*words, "--port", 0)
        assert (status, "Traceback" in err) == (2, False), err
        assert expected in err, err


def test_the_extra_is_asked_for_where_it_is_missing(
    world: Any, call: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = serving.util.find_spec
    monkeypatch.setattr(serving.util, "find_spec", lambda name: None if name == "fastapi" else found(name))
    status, err = call("--run", world.vqa)
    assert status == 2
    assert "visling serve needs fastapi. Install them: pip install 'visling[serve]'" in err


def test_the_page_is_opened_once_it_is_served(
    world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: Queue[str] = Queue()
    monkeypatch.setattr("webbrowser.open", opened.put)
    monkeypatch.setattr(listen, "serve", lambda app, listening, ready: ready())
    for words in ((), ("--open",)):
        monkeypatch.setattr(sys, "argv", ["visling", "serve", "--run", str(world.vqa), "--port", "0", *words])
        with pytest.raises(SystemExit) as ended:
            app.run()
        assert not ended.value.code
    address = opened.get(timeout=5)
    assert opened.empty(), "only when it is asked for"
    assert address in capsys.readouterr().out


def test_a_run_of_several_tasks_is_served_task_by_task(world: Any, tmp_path: Path) -> None:
    tiny = ["encoder=tiny", "train.max_steps=2", "train.precision=fp32"]
    config = configs.override(MULTITASK["visualbert-multitask-scenes"](), tiny)
    out = tmp_path / "several"
    multitask(config, out, data=[str(world.scenes)], store=[str(world.regions)], device="cpu")
    models = load_runs([str(out)], Pictures(ServeSettings()), device="cpu")
    assert len(models) > 3
    assert len({model.form for model in models}) > 3
    assert [model.name for model in models] == [
        f"{tmp_path.name}/several: {task}" for task in api.from_pretrained(out).tasks
    ]


def test_short_names_differ(tmp_path: Path) -> None:
    for name in ("a/vqa", "b/a/vqa"):
        (tmp_path / name).mkdir(parents=True)
    assert name_runs([str(tmp_path / "a/vqa"), str(tmp_path / "b/a/vqa"), str(tmp_path / "a/vqa")]) == [
        "a/vqa", "a/vqa (2)", "a/vqa (3)",
    ]  # fmt: skip
    assert name_runs(["lxmert-vqa", "owner/name"]) == ["lxmert-vqa", "owner/name"]


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("::1", True), ("[::1]", True),
        ("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("example.org", False), ("", False),
        ("127.0.0.1.evil.example", False),
    ],
)  # fmt: skip
def test_only_this_machine_is_private(host: str, private: bool) -> None:
    assert listen.is_loopback(host) == private


def test_the_address_is_one_that_a_browser_opens() -> None:
    with listen.bind("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        assert listen.address_of(one, "127.0.0.1", None) == f"http://127.0.0.1:{port}/"
        assert listen.address_of(one, "::1", "t") == f"http://[::1]:{port}/?token=t"
        assert listen.address_of(one, "0.0.0.0", "t") == f"http://{socket.gethostname()}:{port}/?token=t"
