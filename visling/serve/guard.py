"""Checks every request before the application sees it (host, origin, token, size), and adds the security headers."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visling.serve.settings import ServeSettings

COOKIE = "visling_token"
"""Holds the token once a browser has opened the page with ?token=, so that scripts and pictures are sent it too."""

UPLOADS = "/api/images"
"""Where bodies may be as large as a picture."""

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Of every response: the page runs its own scripts only, asks nobody else, and is shown in nobody's frame."""

_log = logging.getLogger("visling.serve")


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._refuse(scope)
        if refused is not None:
            await refused(scope, receive, send_with_headers)
            return
        try:
            await self.app(scope, self._limit(scope, receive), send_with_headers)
        except Exception:
            _log.exception("%s %s failed", scope["method"], scope["path"])
            if not started:
                failed = say("the server failed to answer this; its log says why. Ask something else.", 500)
                await failed(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> Response | None:
        """Why a request is not answered; None if it is."""
        headers, settings = Headers(scope=scope), self.settings
        host = headers.get("host", "")
        if settings.host_names and _without_port(host) not in settings.host_names:
            names = ", ".join(settings.host_names)
            return say(f"the host name {host!r} is not answered; expected {names}. Add it with --allow-host.", 403)
        if scope["method"] not in ("GET", "HEAD") and not _is_same_origin(headers, host):
            return say("requests from pages of other sites are refused. Open the page of this server.", 403)
        if settings.token is not None:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if not _is_token(headers, given, settings.token):
                wrong = say("the token is missing or wrong. Open the address that `visling serve` printed.", 401)
                wrong.headers["WWW-Authenticate"] = "Bearer"
                return wrong
            if given and scope["path"] == "/" and scope["method"] == "GET":
                # The address is then free of the token: it may be bookmarked and shown.
                response = RedirectResponse("/", status_code=303)
                response.set_cookie(COOKIE, settings.token, httponly=True, samesite="strict", path="/")
                return response
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._most_bytes(scope):
            return say(self._describe_too_large(scope), 413)
        return None

    def _limit(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, which stops when too much arrives, or nothing for too long. After the body it waits for the end of
        the connection, which takes as long as it takes."""
        left, complete = self._most_bytes(scope), False

        async def receive_within_limits() -> Message:
            nonlocal left, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.settings.receive_seconds)
            except TimeoutError as error:
                text = f"nothing arrived for {self.settings.receive_seconds:.0f} seconds. Send the request again."
                raise HTTPException(408, text) from error
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, self._describe_too_large(scope))
            complete = not message.get("more_body", False)
            return message

        return receive_within_limits

    def _most_bytes(self, scope: Scope) -> int:
        settings = self.settings
        return settings.most_upload_bytes if scope["path"] == UPLOADS else settings.most_json_bytes

    def _describe_too_large(self, scope: Scope) -> str:
        mend = " Scale the image down, or save it as JPEG." if scope["path"] == UPLOADS else ""
        return f"the request is larger than {self._most_bytes(scope):,} bytes.{mend}"


def say(text: str, status: int, **headers: str) -> Response:
    """An error as every client gets it; in ASCII, since it may quote what is no text at all."""
    return Response(json.dumps({"error": text}), status, headers=headers, media_type="application/json")


def _without_port(host: str) -> str:
    """Lower-case name of a Host header: "[::1]" of "[::1]:8000"."""
    host = host.lower()
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _is_same_origin(headers: Headers, host: str) -> bool:
    """Whether a request comes from a page of this server, or from no page at all."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == host.lower()


def _is_token(headers: Headers, given: str, token: str) -> bool:
    """Whether a request carries the token: in its address, as `Authorization: Bearer`, or in the cookie. The time that
    comparing takes does not depend on how much of it is right."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        cookies.clear()
    held: Any = cookies.get(COOKIE)
    tries = [given, bearer if kind.lower() == "bearer" else "", "" if held is None else held.value]
    return any(hmac.compare_digest(one.encode(), token.encode()) for one in tries)
