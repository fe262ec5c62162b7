"""Files by their address: resumed after an interruption, checked, and under their name only once they are whole.

Until then a file grows as `NAME.part`; `NAME.part.json` says which version of which address it belongs to. Without that
note a partial file is never continued.
"""

from __future__ import annotations

import errno
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visling.checkpoints.files import digest, locked
from visling.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with the bytes that are here and all bytes; 0 for all if the server does not say."""

_CHUNK = 1 << 20
_TIMEOUT = 60.0
"""Seconds without an answer after which a server counts as unreachable."""
_PAGES = ("text/html", "application/xhtml")
"""Content types of web pages: servers answer with one instead of a file that is gone, or that needs a confirmation."""


def download(
    address: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download a file, or continue an interrupted download; nothing is asked of the server if the file is there.

    Args:
        size: bytes that the file must have; None = unknown.
        sha256: digest that it must have; None = unknown.
        offline: refuse to ask the server.
    Returns:
        `target`.
    Raises:
        CheckpointError: no network, no such file at the address, a web page in its place, another size or digest than
            expected, or the folder cannot be written. What was downloaded so far stays in `NAME.part`.
    """
    if not address.startswith(("http://", "https://")):
        raise CheckpointError(f"{address} is not an address that can be downloaded: expected http:// or https://.")
    if target.is_file():
        return target
    if offline:
        raise CheckpointError(
            f"{target.name} is not here, and {address} is not asked while offline (VISLING_OFFLINE, HF_HUB_OFFLINE or "
            "--offline). Fetch it once online."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if not target.is_file():  # another process may have finished it
                _fill_part(address, target, progress)
                _check_part(address, target, size, sha256)
                _part(target).replace(target)
                _note(target).unlink(missing_ok=True)
    except OSError as error:
        raise _explain_disk(error, target) from error
    return target


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.part.json")


def _fill_part(address: str, target: Path, progress: Progress | None) -> None:
    """Bring `NAME.part` to its full length."""
    part, note = _part(target), _read_note(target, address)
    have = part.stat().st_size if note and part.is_file() else 0
    try:
        answer = _ask(address, target, have, note.get("version", ""))
    except urllib.error.HTTPError as error:
        if not have or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _explain_status(address, error) from error
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return  # it was whole already
        _note(target).unlink()
        _fill_part(address, target, progress)
        return
    with answer:
        if have and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # another version than the one begun, or a server that cannot continue
        left = answer.headers.get("Content-Length")
        total = have + int(left) if left is not None else 0
        chunk = _read(answer, address, target)
        if have == 0:
            _refuse_page(address, answer.headers.get_content_type(), chunk)
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            _note(target).write_text(json.dumps({"address": address, "version": version}), encoding="utf-8")
        with part.open("ab" if have else "wb") as file:
            while chunk:
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, total)
                chunk = _read(answer, address, target)
    if have < total:
        raise CheckpointError(
            f"{address} ended after {have:,} of {total:,} bytes. Repeat the command: it continues there ({part})."
        )


def _ask(address: str, target: Path, have: int, version: str) -> Any:
    """The server's answer, from byte `have` on if the file is still that version."""
    headers = {"User-Agent": "visling", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version and not version.startswith("W/"):  # a weak tag does not promise equal bytes
            headers["If-Range"] = version
    try:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _explain_network(error, address, target) from error


def _read(answer: Any, address: str, target: Path) -> bytes:
    try:
        chunk: bytes = answer.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _explain_network(error, address, target) from error
    return chunk


def _read_note(target: Path, address: str) -> dict[str, str]:
    """What `NAME.part` is the beginning of; empty if that is unknown, or another address."""
    try:
        note: Any = json.loads(_note(target).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) and note.get("address") == address else {}


def _refuse_page(address: str, content_type: str, first: bytes) -> None:
    """Refuse a web page, or an error in XML, where a file of data is expected."""
    if not content_type.startswith(_PAGES) and first.lstrip()[:1] != b"<":
        return
    start = " ".join(first[:300].decode("utf-8", errors="replace").split())
    raise CheckpointError(
        f"{address} answered with a web page ({content_type}) in place of the file: it has moved, is gone, or wants a "
        f"confirmation. Open the address in a browser. The page begins: {start[:120]}"
    )


def _check_part(address: str, target: Path, size: int | None, sha256: str | None) -> None:
    """Compare the whole file with what is known of it. If it is another, `NAME.part` stays to be looked at, and the
    next download begins anew."""
    part, wrong = _part(target), ""
    found = part.stat().st_size
    if size is not None and found != size:
        wrong = f"has {found:,} bytes; expected {size:,}"
    elif sha256 is not None and (hashed := digest(part)) != sha256:
        wrong = f"has the SHA-256 {hashed}; expected {sha256}"
    elif found == 0:
        wrong = "is empty"
    if wrong:
        _note(target).unlink(missing_ok=True)
        raise CheckpointError(
            f"the file from {address} {wrong}. It was damaged on the way or replaced by another: it is kept as {part}, "
            "and not used. Repeat the command to download it again."
        )


def _explain_status(address: str, error: urllib.error.HTTPError) -> CheckpointError:
    if error.code in (404, 410):
        return CheckpointError(
            f"{address} does not exist (any more): the server answered {error.code}. `visling catalog NAME` says where "
            "else it was published, if anything is known."
        )
    if error.code in (401, 403, 409):
        return CheckpointError(
            f"{address} is not open to the public (any more): the server answered {error.code} {error.reason}. "
            "`visling catalog NAME` says where else it was published, if anything is known."
        )
    return CheckpointError(
        f"{address} cannot be downloaded now: the server answered {error.code} {error.reason}. Try again later."
    )


def _explain_disk(error: OSError, target: Path) -> CheckpointError:
    if error.errno == errno.ENOSPC:
        mend = (
            f"The disk is full: free space, or use another folder (VISLING_HOME, --to); {_part(target)} is continued."
        )
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        mend = "The folder is not yours to write to: use another one (VISLING_HOME, --to)."
    else:
        mend = "Use another folder (VISLING_HOME, --to)."
    return CheckpointError(f"cannot write {target}: {error.strerror or error}. {mend}")


def _explain_network(error: Exception, address: str, target: Path) -> CheckpointError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return CheckpointError(
        f"cannot download {address}: {reason or type(error).__name__}. Check the connection, then repeat the command: "
        f"it continues where it was interrupted. A file that you have from elsewhere can be put there as {target}."
    )
