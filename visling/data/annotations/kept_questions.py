"""Questions with their answers, kept after the first reading of large files: VQA's annotations are 400 MB of JSON, of
which a run needs a tenth.

A kept file is named by where its sources lie and remembers their sizes and times: it is written anew when they change.

Letters  N questions, P answers of all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from visling import runtime
from visling.types import Record

R = TypeVar("R", bound=Record)

KEPT_FROM = 50_000_000
"""Bytes of the sources from which on their questions are kept; less is read in a second."""

_VERSION = 1
"""Of the layout and of how questions are read; raised when either changes."""

_FEW = ("question_type", "answer_type", "multiple_choice_answer")
"""Fields of few different texts, which are stored by number; -1 = None."""


def keep_questions(
    kind: Callable[..., R], sources: Sequence[Path], read: Callable[[Counter[str]], list[R]]
) -> tuple[list[R], Counter[str]]:
    """What `read` returns, and what it counts as left out: from the file that an earlier run left in the cache folder
    (`runtime.home()`), if the sources are still the same; else read now and left there for the next.

    Args:
        kind: makes a question of its fields, those of `QuestionRecord`; each has one image.
    """
    left_out = Counter[str]()
    if not all(file.is_file() for file in sources) or sum(file.stat().st_size for file in sources) < KEPT_FROM:
        return read(left_out), left_out
    state = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sources]
    name = hashlib.blake2b(json.dumps([path for path, *_ in state]).encode(), digest_size=16).hexdigest()
    kept = runtime.home() / "questions" / f"{name}.bin"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent, damaged, or of other sources
        return _load(kept, kind, state)
    records = read(left_out)
    with contextlib.suppress(OSError):  # a full disk or a folder of somebody else: the next run reads them again
        _save(kept, records, left_out, state)
    return records, left_out


def _save(file: Path, records: Sequence[Any], left_out: Mapping[str, int], state: Sequence[Sequence[Any]]) -> None:
    """Write a file that is either complete or absent, whatever interrupts it and however many processes write it."""
    numbers: dict[str, int] = {}
    images: dict[str, int] = {}

    def number(text: str | None) -> int:
        return -1 if text is None else numbers.setdefault(text, len(numbers))

    few = [number(getattr(record, name)) for name in _FEW for record in records]
    answers = [record.answers for record in records]
    counts = [-1 if own is None else len(own) for own in answers]
    answered = [numbers.setdefault(text, len(numbers)) for text in chain.from_iterable(filter(None, answers))]
    shown = [images.setdefault(record.images[0], len(images)) for record in records]
    texts = {
        "ids": [record.id for record in records],
        "questions": [record.question for record in records],
        "images": list(images),
        "few": list(numbers),
        "left_out": left_out,
    }
    arrays = (np.array(part, np.int32) for part in (few, counts, answered, shown))
    parts = [json.dumps(texts).encode(), *(array.tobytes() for array in arrays)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    header = {"version": _VERSION, "state": state, "sizes": [len(part) for part in parts], "checksum": checksum}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".questions-", delete=False) as target:
        try:
            for part in (json.dumps(header).encode(), b"\n", *parts):
                target.write(part)
            target.close()
            Path(target.name).replace(file)
        except BaseException:
            target.close()
            Path(target.name).unlink(missing_ok=True)
            raise


def _load(file: Path, kind: Callable[..., R], state: Sequence[Sequence[Any]]) -> tuple[list[R], Counter[str]]:
    """The questions of a file.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is absent, damaged, or of other sources.
    """
    content = file.read_bytes()
    start = content.index(b"\n") + 1
    header = json.loads(content[:start])
    body = memoryview(content)[start:]
    if (header["version"], header["state"]) != (_VERSION, state):
        raise ValueError("the file is of other sources")
    if len(body) != sum(header["sizes"]) or zlib.crc32(body) != header["checksum"]:
        raise ValueError("the file is damaged")
    ends = np.cumsum([0, *header["sizes"]]).tolist()
    parts = [body[low:high] for low, high in pairwise(ends)]
    texts = json.loads(bytes(parts[0]))
    few, counts, answered, shown = (np.frombuffer(part, np.int32) for part in parts[1:])
    known = np.array([*texts["few"], None], object)  # -1 is the last one
    named = [(image,) for image in texts["images"]]
    columns = known[few].reshape(len(_FEW), -1).tolist()
    rows = zip(
        texts["ids"], texts["questions"], _split(known[answered].tolist(), counts), *columns, shown.tolist(),
        strict=True,
    )  # fmt: skip
    records = [
        kind(
            id=name,
            images=named[image],
            question=question,
            question_type=question_type,
            answer_type=answer_type,
            answers=answers,
            multiple_choice_answer=most,
        )
        for name, question, answers, question_type, answer_type, most, image in rows
    ]
    return records, Counter(texts["left_out"])


def _split(answers: list[str], counts: NDArray[np.int32]) -> list[tuple[str, ...] | None]:
    """The answers (P) of all questions as those of each; `counts` (N,) is -1 where there are none."""
    ends = np.cumsum(counts.clip(min=0)).tolist()
    places = zip(ends, counts.tolist(), strict=True)
    return [None if count < 0 else tuple(answers[end - count : end]) for end, count in places]
