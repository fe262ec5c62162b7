"""What docs/serving.md says of the HTTP interface is true of a server."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from fixtures.serving import serving
from starlette.testclient import TestClient

from visling import api
from visling.serve.pictures import MEDIA_TYPES
from visling.serve.settings import ServeSettings

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for line in re.split(r"\n(?=curl )", block.replace("\\\n", " "))
]


def ask_as_curl(client: TestClient, words: list[str], files: dict[str, Path]) -> Any:
    """What a server says to a curl command."""
    headers: dict[str, str] = {}
    data: bytes | None = None
    given = iter(words[1:])
    address = ""
    for word in given:
        if word == "-H":
            name, _, value = next(given).partition(": ")
            headers[name] = value
        elif word == "-d":
            data = next(given).encode()
        elif word == "--data-binary":
            data = files[next(given)].read_bytes()
        elif word.startswith("http://"):
            address = word
        else:
            assert word == "-s", f"{word} is not known to this test"
    return client.get(address, headers=headers) if data is None else client.post(address, content=data, headers=headers)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_every_curl_command_is_answered(world: Any, predictor: api.Predictor, words: list[str]) -> None:
    with serving({"visualbert/vqa": predictor}, world.picture().parent, world.scenes) as client:
        here = [word.replace("scene_000000002251", world.picture().stem) for word in words]
        answered = ask_as_curl(client, here, {"@photo.jpg": world.picture()})
        assert answered.status_code == 200, answered.text


def test_every_address_is_on_the_page_and_the_other_way_round(predictor: api.Predictor) -> None:
    assert len(COMMANDS) == 4
    with serving({"visualbert/vqa": predictor}) as client:
        paths = client.get("/openapi.json").json()["paths"]
    described = {f"{verb.upper()} {path.replace('{name}', 'ID')}" for path, verbs in paths.items() for verb in verbs}
    assert set(re.findall(r"^\| `((?:GET|POST) [^`]+)`", PAGE, flags=re.MULTILINE)) == described


def test_the_limits_on_the_page_are_the_limits() -> None:
    limits = ServeSettings()
    for said in (
        f"{limits.most_upload_bytes // 10**6} MB, {limits.most_pixels // 10**6} million pixels, "
        f"{limits.longest_side:,} pixels on a side",
        f"| a text | {limits.most_text:,} characters",
        f"| choices | {limits.most_choices} |",
        f"| any other body | {limits.most_json_bytes // 1000} kB |",
        f"| uploads held | {limits.upload_bytes // 10**6} MB",
        f"| pictures held with their regions | {limits.seen_bytes // 10**6} MB",
        f"| an answer | {limits.answer_seconds:.0f} seconds |",
        f"| a pause while sending | {limits.receive_seconds:.0f} seconds |",
        f"in one batch ({limits.most_together} at most)",
        f"{limits.most_waiting} questions may wait",
        f"the first {limits.most_examples} pictures",
    ):
        assert said in PAGE, said
    row = re.findall(r"^\| formats \| (.*?), known by content", PAGE, flags=re.MULTILINE)[0]
    assert {name.upper() for name in row.split(", ")} == {name for name in MEDIA_TYPES if name != "MPO"}
