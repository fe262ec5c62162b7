"""The socket that the server listens on, reachable from this machine alone by default; how it starts and stops."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from visling.errors import RunError

_MOST_CONNECTIONS = 512
"""Simultaneous connections; further ones get status 503."""
_PORTS_TRIED = 20


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def make_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, so that whoever connects from now on is served.

    Raises:
        RunError: the port is taken, or the address is not one of this machine.
    """
    try:
        return _listen(host, port)
    except OSError as error:
        with contextlib.suppress(OSError):
            _listen(host, 0).close()  # the address itself is one of this machine
            free = _find_free_port(host, port)
            hint = "" if free is None else f" Port {free} is free: --port {free}."
            raise RunError(f"cannot listen on port {port} of {host}: {error.strerror or error}.{hint}") from error
        why = error.strerror or error
        raise RunError(f"cannot listen on {host}: {why}. Give an address of this machine: --host 127.0.0.1.") from error


def serve(app: FastAPI, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until Ctrl-C; who is being answered then still gets the answer, within a few seconds.

    Args:
        ready: called once requests are answered.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=5,
        proxy_headers=False,
        ws="none",
    )
    with contextlib.suppress(KeyboardInterrupt):
        _Server(config, ready).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()


def address_of(listening: socket.socket, host: str, token: str | None) -> str:
    """What a browser opens; the token is in it."""
    port = listening.getsockname()[1]
    name = f"[{host}]" if ":" in host and not host.startswith("[") else host
    if host in ("0.0.0.0", "::"):
        name = socket.gethostname()
    return f"http://{name}:{port}/" + ("" if token is None else f"?token={token}")


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
    except BaseException:
        listening.close()
        raise
    return listening


def _find_free_port(host: str, port: int) -> int | None:
    first = max(port + 1, 1024)  # those below need special rights
    for other in range(first, min(first + _PORTS_TRIED, 65536)):
        with contextlib.suppress(OSError):
            _listen(host, other).close()
            return other
    return None
