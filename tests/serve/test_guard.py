"""Which requests are answered, how large they may be, and which headers browsers get."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fixtures.serving import ADDRESS, error_of, serving
from starlette.testclient import TestClient

from visling import api
from visling.serve.app import create_app
from visling.serve.guard import SECURITY_HEADERS
from visling.serve.pictures import Pictures
from visling.serve.service import Service
from visling.serve.settings import ServeSettings

TOKEN = "a-secret-of-some-length"


@pytest.fixture
def guarded(world: Any, predictor: api.Predictor) -> Iterator[TestClient]:
    """A client that is not redirected and holds no token, of a server that others can reach."""
    with serving({"vqa": predictor}, world.picture().parent, token=TOKEN, host_names=()) as client:
        client.follow_redirects = False
        yield client


def test_every_response_has_the_headers(client: TestClient, world: Any) -> None:
    for answered in (
        client.get("/"), client.get("/api/models"), client.get("/gone"), client.post("/api/answer", content=b"{"),
        client.get(f"/api/examples/{world.picture().stem}"), client.get("/api/models", headers={"Host": "evil"}),
    ):  # fmt: skip
        for name, value in SECURITY_HEADERS.items():
            assert answered.headers[name] == value
    policy = SECURITY_HEADERS["Content-Security-Policy"]
    for part in ("default-src 'self'", "img-src 'self' data: blob:", "frame-ancestors 'none'", "base-uri 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    assert client.get("/api/models").headers["cache-control"] == "no-store"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST:8000"])
def test_the_names_of_this_machine_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_other_names_are_not(client: TestClient, host: str) -> None:
    message = error_of(client.get("/api/models", headers={"Host": host}), 403)
    assert message.startswith(f"the host name {host!r} is not answered")
    assert "--allow-host" in message


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8000@evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_may_not_post(client: TestClient, world: Any, headers: dict[str, str]) -> None:
    body = {"run": "vqa", "images": [world.picture().stem], "text": "how many?"}
    assert "other sites" in error_of(client.post("/api/answer", json=body, headers=headers), 403)
    assert "other sites" in error_of(client.post("/api/images", content=b"x", headers=headers), 403)
    own = {"Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/answer", json=body, headers=own).status_code == 200
    assert "access-control-allow-origin" not in client.get("/api/models", headers=headers).headers


def test_a_form_of_another_site_is_no_question(client: TestClient) -> None:
    body = json.dumps({"run": "vqa", "images": [], "text": "how many?"})
    sent = client.post("/api/answer", content=body, headers={"Content-Type": "text/plain"})
    error_of(sent, 422)


@pytest.mark.parametrize(
    "address", ["/", "/api/models", "/static/app.js", "/openapi.json", "/gone", "/?token=", "/?token=wrong"]
)
def test_nothing_is_answered_without_the_token(guarded: TestClient, address: str) -> None:
    refused = guarded.get(address)
    assert "the token is missing or wrong" in error_of(refused, 401)
    assert refused.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in refused.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer é"},
        {"Cookie": "visling_token=wrong"},
        {"Cookie": f"other={TOKEN}"},
        {"Cookie": "visling_token="},
    ],
)
def test_a_wrong_token_is_refused(guarded: TestClient, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    error_of(guarded.get("/api/models", headers=raw), 401)


def test_the_token_is_taken_three_ways(guarded: TestClient) -> None:
    for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"Cookie": f"visling_token={TOKEN}"}):
        assert guarded.get("/api/models", headers=headers).status_code == 200
    assert guarded.get("/api/models", params={"token": TOKEN}).status_code == 200
    assert guarded.get("/api/models").status_code == 401, "only the page hands out the cookie"


def test_the_page_takes_the_token_out_of_its_address(guarded: TestClient) -> None:
    opened = guarded.get("/", params={"token": TOKEN})
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert guarded.get("/api/models").status_code == 200, "the cookie is sent from now on"


def test_a_large_body_is_refused_by_its_length(world: Any, predictor: api.Predictor) -> None:
    with serving({"vqa": predictor}, most_upload_bytes=1000, most_json_bytes=500) as client:
        message = error_of(client.post("/api/images", content=b"x" * 1001), 413)
        assert message == "the request is larger than 1,000 bytes. Scale the image down, or save it as JPEG."
        message = error_of(client.post("/api/answer", json={"run": "vqa", "text": "x" * 600}), 413)
        assert message == "the request is larger than 500 bytes."


async def _send(address: str, part: bytes, settings: ServeSettings, *, stops: bool) -> tuple[int, int]:
    """Status that a client gets if it never ends its body, and the number of parts that were read.

    Args:
        stops: send nothing after the first part.
    """
    read, status = 0, 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        if read and stops:
            await asyncio.sleep(10)
        read += 1
        return {"type": "http.request", "body": part, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http", "method": "POST", "path": address, "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip
    await create_app(Service([], Pictures(settings), settings))(scope, receive, send)
    return status, read


@pytest.mark.parametrize("address", ["/api/images", "/api/answer"])
def test_a_large_body_without_a_length_is_not_read_to_its_end(address: str) -> None:
    settings = ServeSettings(most_upload_bytes=1000, most_json_bytes=1000)
    assert asyncio.run(_send(address, b"x" * 400, settings, stops=False)) == (413, 3)


@pytest.mark.parametrize("address", ["/api/images", "/api/answer"])
def test_a_body_that_stops_arriving_is_given_up(address: str) -> None:
    assert asyncio.run(_send(address, b"x", ServeSettings(receive_seconds=0.05), stops=True)) == (408, 1)


def test_many_uploads_at_once_are_put_off(world: Any, predictor: api.Predictor) -> None:
    picture = world.picture().read_bytes()

    async def upload_slowly(client: httpx.AsyncClient) -> httpx.Response:
        async def parts() -> AsyncIterator[bytes]:
            for at in range(0, len(picture), 500):
                yield picture[at : at + 500]
                await asyncio.sleep(0.01)

        return await client.post("/api/images", content=parts())

    async def upload_together(app: Any) -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS) as client:
            return await asyncio.gather(*(upload_slowly(client) for _ in range(6)))

    with serving({"vqa": predictor}, upload_bytes=3 * len(picture)) as client:
        found = asyncio.run(upload_together(client.app))
        assert {one.status_code for one in found} == {200, 503}
        refused = next(one for one in found if one.status_code == 503)
        assert "too many images arrive at once" in error_of(refused, 503)
        assert refused.headers["retry-after"] == "2"
        assert client.post("/api/images", content=picture).status_code == 200, "all that arrived was counted out"
