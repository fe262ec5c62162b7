"""Batches prepared by other processes: the same ones, exact after a restart, with errors and ends that are clean."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visling.data import texts
from visling.data.annotations.captions import CaptionRecord
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.captions import CaptionPairs
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, RunError, StoreError
from visling.types import Example, InputSpec

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="workers are copies of this process"
)

TOKENIZER = Tokenizer()
SPEC = InputSpec(max_tokens=16)
CAPTIONS = [
    CaptionRecord(id=str(n), images=(f"image {n // 3}",), caption=" ".join(["cat", "dog", "bird"] * (1 + n * 7 % 4)))
    for n in range(60)
]


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def loader(number: int, **settings: Any) -> tuple[Loader, TextLayout]:
    """A loader with a number of workers, and its layout."""
    layout = TextLayout(TOKENIZER, SPEC)
    source = settings.pop("source", None) or CaptionPairs(CAPTIONS, layout)
    collator = Collator(None, SPEC, TOKENIZER, masking=TokenMasking(in_turn=True))
    made = Loader(
        source, collator, **{"batch_size": 4, "seed": 1, "bucket": 3, "workers": number, "layout": layout, **settings}
    )
    return made, layout


def contents(made: Loader) -> list[Any]:
    return [
        (index.tolist(), batch.text.ids.tolist(), targets.token_ids.tolist(), targets.matched.tolist())  # type: ignore[union-attr]
        for index, batch, targets in made.batches_with_index()
    ]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("bucket", [1, 3])
def test_batches_are_the_same(bucket: int, prefetch: int) -> None:
    (alone, own), (spread, counted) = loader(0, bucket=bucket), loader(2, bucket=bucket, prefetch=prefetch)
    for epoch in (0, 3):
        alone.epoch = spread.epoch = epoch
        expected = contents(alone)
        assert len(expected) == 15
        assert contents(spread) == expected
    assert own.truncated == counted.truncated > 0, "rows that workers cut are counted"


def test_evaluation_over_processes_is_the_same() -> None:
    for rank in range(3):
        settings = {"rank": rank, "world_size": 3, "deal": "batches", "shuffle": False, "drop_last": False}
        assert contents(loader(2, **settings)[0]) == contents(loader(0, **settings)[0])


def test_resume_in_the_middle_with_another_number_of_workers() -> None:
    whole = contents(loader(0)[0])
    first, _ = loader(2)
    given = first.batches_with_index()
    seen = [next(given)[0].tolist() for _ in range(5)]
    state = first.state_dict()
    given.close()  # type: ignore[attr-defined]
    second, _ = loader(3)
    second.load_state_dict(state)
    assert seen == [index for index, *_ in whole[:5]]
    assert contents(second) == whole[5:]


def test_mapped_texts_are_read_by_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = contents(loader(0)[0])
    monkeypatch.setenv("VISLING_HOME", str(tmp_path))
    monkeypatch.setattr(texts, "KEPT_FROM", 1)
    for _ in range(2):
        made, _ = loader(2)
        made.source.prepare()
        assert contents(made) == expected
    assert len(list((tmp_path / "texts").iterdir())) == 1


def test_nothing_is_drawn_from_the_generators_of_this_process() -> None:
    before, ours = torch.get_rng_state(), str(np.random.get_state())
    contents(loader(2)[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == ours


class Odd(Exception):
    """An error that cannot be sent to another process."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second} do not fit")


class Broken:
    """Sentences, of which one raises an error, or ends its process."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 60

    def example(self, index: int, rng: np.random.Generator) -> Example:
        if index == 21 and self.error is not None:
            raise self.error
        if index == 21 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return Example(
            id=str(index), rows=(TextLayout(TOKENIZER, SPEC).row("a cat"),), images=(), labels={"matched": 1}
        )


def read(made: Loader) -> list[list[int]]:
    got: list[list[int]] = []
    try:
        got.extend(index.tolist() for index, _, _ in made.batches_with_index())
    except Exception as error:
        error.add_note(f"after {len(got)} batches")
        raise
    return got


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (StoreError("image 'x' is missing"), StoreError, "image 'x' is missing"),
        (Odd(1, 2), RuntimeError, "Odd: 1 and 2 do not fit"),
    ],
)
def test_errors_arrive_in_order(error: Exception, kind: type[Exception], message: str) -> None:
    made, _ = loader(2, source=Broken(error), shuffle=False, bucket=1)
    with pytest.raises(kind) as raised:
        read(made)
    assert str(raised.value) == message
    assert raised.value.__notes__[-1] == "after 5 batches", "those before the broken one were handed out"
    assert any("in a process that prepares batches" in note for note in raised.value.__notes__)


def test_a_killed_worker_is_reported() -> None:
    made, _ = loader(2, source=Broken(None), shuffle=False, bucket=1)
    with pytest.raises(RunError, match=r"was ended from outside.*workers=0"):
        read(made)


def test_leaving_early_ends_the_processes() -> None:
    made, _ = loader(2)
    given = made.batches_with_index()
    next(given)
    assert len(multiprocessing.active_children()) == 2
    given.close()  # type: ignore[attr-defined]


def test_a_system_that_cannot_fork_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert contents(loader(0)[0])
    with pytest.raises(ConfigError, match="workers is 2, but this system cannot fork"):
        loader(2)


PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from batches.test_workers import loader
import multiprocessing
given = loader(2)[0].batches_with_index()
next(given)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux lists them")
def test_workers_end_with_a_killed_run() -> None:
    folder = str(Path(__file__).parents[1])
    with subprocess.Popen([sys.executable, "-c", PROGRAM, folder], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        started = [int(number) for number in run.stdout.readline().split()]
        assert len(started) == 2
        assert all(map(is_running, started))
        run.kill()
    deadline = time.monotonic() + 30
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, started))
