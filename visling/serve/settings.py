"""Limits and rights of the served page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visling.vision.images import LARGE


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What a server takes, from whom, and how much of it."""

    token: str | None = None
    """Secret that every request carries; None = none is needed, for a server that only this machine reaches."""
    host_names: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Names in the Host header that are answered, without port; empty = any. A page of another site that makes its own
    name mean this machine (DNS rebinding) is refused by it."""

    examples: Path | None = None
    """Folder whose pictures are offered, and searched by a caption."""
    most_examples: int = 200
    """Pictures of that folder that are offered, the first ones by name."""

    most_upload_bytes: int = 20_000_000
    """Of one picture."""
    most_json_bytes: int = 200_000
    """Of the body of any other request."""
    most_pixels: int = LARGE
    """Of one picture, and of those that go through a model together."""
    longest_side: int = 20_000
    """Of a picture, in pixels."""
    most_text: int = 2_000
    """Characters of a question or of a choice."""
    most_choices: int = 20
    """Answers to choose from."""

    upload_bytes: int = 256_000_000
    """Uploaded files that are held in memory, the latest used; also those that are just arriving."""
    seen_bytes: int = 256_000_000
    """Pictures with their regions that are held for each model, the latest used."""

    most_waiting: int = 256
    """Questions that wait for the models; more are refused until there is room."""
    most_together: int = 32
    """Questions that go through a model in one batch."""
    collect_seconds: float = 0.004
    """How long a question waits for others to join it."""
    answer_seconds: float = 60.0
    """Longest time until an answer."""
    receive_seconds: float = 20.0
    """Longest pause between two parts of a request's body."""
