"""Images are scaled in the background, share batches with others of their scaled size, and few are held at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from visling.vision import image_batches
from visling.vision.image_batches import ImageBatches
from visling.vision.image_files import ImageFile, list_images
from visling.vision.region_detector import ScaledImage


def scale(image: NDArray[Any]) -> ScaledImage:
    return ScaledImage(pixels=image[::2, ::2], size=(image.shape[1], image.shape[0]))


def draw(folder: Path, *sizes: tuple[int, int]) -> list[ImageFile]:
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number:03d}.png")
    return list_images([folder])


def test_batches_have_one_scaled_size(tmp_path: Path) -> None:
    images = draw(tmp_path, *[(7 + number % 2, 4 + 4 * (number % 5 == 0)) for number in range(40)])
    batches = list(ImageBatches(images, scale, batch_size=4))
    assert sorted(one.image.id for batch in batches for one in batch) == [image.id for image in images]
    for batch in batches:
        assert len({one.scaled.pixels.shape for one in batch}) == 1
    assert {size for batch in batches for size in {one.scaled.size for one in batch}} == {
        (7, 4),
        (8, 4),
        (7, 8),
        (8, 8),
    }
    assert [len(batch) for batch in batches].count(4) == 10, "sides of 7 and 8 are both 4 once scaled"


def test_large_images_make_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_batches, "_BATCH_PIXELS", {"cpu": 40, "cuda": 400})
    images = draw(tmp_path, *[(8, 4)] * 70)  # eight pixels once scaled
    assert [len(batch) for batch in ImageBatches(images, scale)] == [5] * 14
    assert [len(batch) for batch in ImageBatches(images, scale, device="cuda")] == [32, 32, 6], "never more"
    assert len(next(iter(ImageBatches(images, scale, batch_size=9)))) == 9
    monkeypatch.setattr(image_batches, "_BATCH_PIXELS", {"cpu": 1})
    assert {len(batch) for batch in ImageBatches(images, scale)} == {1}


def test_few_bytes_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty sizes: rare ones are released early instead of piling up, and reading ahead stops."""
    monkeypatch.setattr(image_batches, "_WAITING_BYTES", 600)
    images = draw(tmp_path, *[(82 - 2 * (number % 40), 8) for number in range(120)])
    held, most, lock = [0], [0], threading.Lock()

    def count(image: NDArray[Any]) -> ScaledImage:
        scaled = scale(image)
        with lock:
            held[0] += scaled.pixels.nbytes
            most[0] = max(most[0], held[0])
        return scaled

    taken = 0
    for batch in ImageBatches(images, count, batch_size=30, workers=2):
        taken += len(batch)
        with lock:
            held[0] -= sum(one.scaled.pixels.nbytes for one in batch)
    assert taken == 120
    largest = 4 * 41 * 3
    assert largest < most[0] <= 2 * 600 + 3 * largest


def test_threads_work_while_the_network_does(tmp_path: Path) -> None:
    images = draw(tmp_path, *[(8, 8)] * 12)
    main, helpers = threading.get_ident(), set()

    def slow(image: NDArray[Any]) -> ScaledImage:
        helpers.add(threading.get_ident())
        time.sleep(0.02)
        return scale(image)

    batches = ImageBatches(images, slow, batch_size=2, workers=3)
    for number, _ in enumerate(batches):
        if number == 0:
            time.sleep(0.3)  # the network; all others are scaled meanwhile
            start = time.perf_counter()
    assert time.perf_counter() - start < 0.1
    assert len(helpers) == 3
    assert main not in helpers
    assert batches.scaling >= 12 * 0.02
    assert batches.reading > 0


def test_bad_images_are_listed_and_do_not_break_a_batch(tmp_path: Path) -> None:
    images = draw(tmp_path, *[(8, 8)] * 6)
    images[2].path.write_bytes(b"")
    images[4].path.unlink()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(images[5].path, "GIF", save_all=True, append_images=frames[1:])
    batches = ImageBatches(images, scale, batch_size=2)
    assert [[one.image.id for one in batch] for batch in batches] == [["000", "001"], ["003", "005"]]
    assert [image.id for image, _ in batches.unreadable] == ["002", "004"]
    assert "it is empty" in batches.unreadable[0][1]
    assert batches.first_of_several == 1


def test_a_failure_in_a_thread_reaches_the_reader(tmp_path: Path) -> None:
    """A detector that cannot scale is no unreadable image."""

    def fail(image: NDArray[Any]) -> ScaledImage:
        raise RuntimeError("no such size")

    with pytest.raises(RuntimeError, match="no such size"):
        list(ImageBatches(draw(tmp_path, (8, 8)), fail))


def test_nothing_is_left_running_if_the_reader_stops(tmp_path: Path) -> None:
    before = threading.active_count()
    batches = iter(ImageBatches(draw(tmp_path, *[(8, 8)] * 50), scale, batch_size=2))
    assert np.array_equal(next(batches)[1].scaled.pixels[0, 0], (1, 0, 0))
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
