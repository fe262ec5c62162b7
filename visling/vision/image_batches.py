"""Images read and scaled by background threads, in batches of one scaled size, in bounded memory.

Shapes   h x w pixels of a scaled image.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from visling.errors import DataError
from visling.vision.image_files import ImageFile, ImageReader
from visling.vision.region_detector import ScaledImage

MOST_IMAGES = 32
"""Of a batch whose size is left open."""

_BATCH_PIXELS = {"cpu": 1_000_000, "cuda": 16_000_000}
"""Scaled pixels of such a batch, by kind of device: a CPU gains nothing from more, a GPU has only so much memory."""

_WAITING_BYTES = 1 << 28
"""Scaled images that wait for others of their size; as much again for those that were read ahead."""

_MOST_WORKERS = {"cpu": 2, "cuda": 8}
"""Threads by default, if there are so many cores: on a CPU the network needs the cores itself."""


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image at the size at which the detector reads it."""

    image: ImageFile
    scaled: ScaledImage


class ImageBatches:
    """Batches of images of equal scaled size, so that what a detector sees in one does not depend on the others.

    Images of rare sizes wait for others of their size, until too many bytes wait.

    Args:
        scale: of the detector, see `RegionDetector.scale`; called by the threads.
        batch_size: None = as many as have some million pixels together, at most `MOST_IMAGES`.
        workers: threads; None = two beside a network on the CPU, up to eight beside one on a GPU.
        device: kind of the device that the network runs on.
    """

    def __init__(
        self,
        images: Sequence[ImageFile],
        scale: Callable[[NDArray[Any]], ScaledImage],
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        device: str = "cpu",
    ) -> None:
        kind = device if device in _MOST_WORKERS else "cuda"
        self._images, self._scale, self._batch_size = images, scale, batch_size
        self._batch_pixels = _BATCH_PIXELS[kind]
        self._workers = workers or max(1, min(_MOST_WORKERS[kind], os.cpu_count() or 1))
        self._lock = threading.Lock()
        self.unreadable: list[tuple[ImageFile, str]] = []
        """Images that could not be read, with the reason."""
        self.first_of_several = 0
        """Images whose files have further frames or pages."""
        self.reading = self.scaling = 0.0
        """Seconds of all threads together."""

    def __iter__(self) -> Iterator[list[LoadedImage]]:
        groups: dict[tuple[int, ...], list[LoadedImage]] = {}
        waiting = 0
        for loaded in self._load_ahead():
            shape = loaded.scaled.pixels.shape
            group = groups.setdefault(shape, [])
            group.append(loaded)
            waiting += loaded.scaled.pixels.nbytes
            if len(group) == self._choose_size(shape):
                waiting -= _count_bytes(group)
                yield groups.pop(shape)
            while waiting > _WAITING_BYTES:
                most = max(groups, key=lambda shape: len(groups[shape]))
                waiting -= _count_bytes(groups[most])
                yield groups.pop(most)
        yield from groups.values()

    def _choose_size(self, shape: tuple[int, ...]) -> int:
        """Images of a batch of this scaled shape (h, w, 3)."""
        if self._batch_size is not None:
            return self._batch_size
        return max(1, min(MOST_IMAGES, self._batch_pixels // (shape[0] * shape[1])))

    def _load_ahead(self) -> Iterator[LoadedImage]:
        """Each readable image in order."""
        rest = iter(self._images)
        running: deque[tuple[ImageFile, Future[LoadedImage | str]]] = deque()
        most, largest = max(2 * self._workers, self._batch_size or MOST_IMAGES), 0
        with ImageReader() as reader, ThreadPoolExecutor(self._workers) as pool:
            try:
                while True:
                    # The first images say how much memory others may need.
                    fit = min(most, _WAITING_BYTES // largest) if largest else 0
                    while len(running) < max(self._workers, fit) and (image := next(rest, None)) is not None:
                        running.append((image, pool.submit(self._try_load, reader, image)))
                    if not running:
                        return
                    image, future = running.popleft()
                    loaded = future.result()
                    if isinstance(loaded, str):
                        self.unreadable.append((image, loaded))
                    else:
                        largest = max(largest, loaded.scaled.pixels.nbytes)
                        yield loaded
            finally:
                for _, future in running:
                    future.cancel()

    def _try_load(self, reader: ImageReader, image: ImageFile) -> LoadedImage | str:
        """The scaled image, or why it cannot be read."""
        start = time.perf_counter()
        try:
            picture = reader.read(image)
        except DataError as error:
            return str(error)
        middle = time.perf_counter()
        scaled = self._scale(picture.pixels)
        end = time.perf_counter()
        with self._lock:
            self.reading += middle - start
            self.scaling += end - middle
            self.first_of_several += picture.has_more
        return LoadedImage(image, scaled)


def _count_bytes(group: list[LoadedImage]) -> int:
    return sum(loaded.scaled.pixels.nbytes for loaded in group)
