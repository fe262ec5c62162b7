"""What a server does with requests, apart from how HTTP says it: checks them, has them computed, gives up in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from starlette.exceptions import HTTPException

from visling.errors import DataError, nearest
from visling.serve.compute import ComputeQueue
from visling.serve.examples import OfferedQuestion, list_clear_questions, offer_questions
from visling.serve.pictures import Content, Pictures, UnknownPicture
from visling.serve.served import Asked, Inspected, ServedModel
from visling.serve.settings import ServeSettings

_SEARCHED_TOGETHER = 8
"""Pictures of a search that are computed at a time, between other people's questions."""

Leaving = Callable[[], Awaitable[None]]
"""Waits until a client has left."""
Result = TypeVar("Result")


class Service:
    """Some models on some pictures. Everything but decoding and computing happens in the event loop's thread.

    Args:
        scenes: folder of drawn scenes, for questions that can be asked at once.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        pictures: Pictures,
        settings: ServeSettings,
        scenes: Path | None = None,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.pictures, self.settings = pictures, settings
        self.clear: dict[str, list[tuple[str, str]]] = {}
        """Questions with one clear answer, and the answer, by example."""
        self.offered: dict[str, list[OfferedQuestion]] = {name: [] for name in self.models}
        """Questions to begin with, by model."""
        if scenes is not None:
            self.clear = list_clear_questions(scenes, pictures)
            self.offered = {
                name: offer_questions(model, scenes, pictures, self.clear) for name, model in self.models.items()
            }
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="visling-decode")
        self._arriving = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Compute what is asked while the context is open."""
        self._queue = ComputeQueue(
            most_waiting=self.settings.most_waiting,
            most_together=self.settings.most_together,
            most_pixels=self.settings.most_pixels,
            collect_seconds=self.settings.collect_seconds,
        )
        computing = asyncio.create_task(self._queue.run())
        yield
        computing.cancel()
        self._queue.close()
        self._decoding.shutdown(wait=False, cancel_futures=True)

    async def upload(self, parts: AsyncIterator[bytes]) -> tuple[str, tuple[int, int]]:
        """Hold an image that arrives in parts. Returns its id and its width and height.

        Raises:
            DataError: it is no image within the limits.
            HTTPException: too much arrives at once, from all clients together.
        """
        data = bytearray()
        try:
            async for part in parts:
                self._arriving += len(part)
                data += part
                if self._arriving > self.settings.upload_bytes:
                    text = "too many images arrive at once. Upload yours again in a moment."
                    raise HTTPException(503, text, headers={"Retry-After": "2"})
            return await self._decode(lambda: self.pictures.add(bytes(data)))
        finally:
            self._arriving -= len(data)

    async def read_example(self, name: str, side: int | None) -> Content:
        """An example's file, or a picture of it with at most so many pixels on a side.

        Raises:
            UnknownPicture: there is none of this id.
        """
        if name not in self.pictures.examples:
            raise UnknownPicture(f"no example {name!r}. /api/examples lists them.")
        return await self._decode(
            lambda: self.pictures.find(name) if side is None else self.pictures.shrink(name, side)
        )

    async def answer(self, run: str, asked: Asked, left: Leaving) -> dict[str, Any]:
        """What a model answers, as `Answer.to_json` says it.

        Args:
            left: waits until the client has left.
        Raises:
            DataError: it cannot be answered.
            QueueFull: too many wait.
            HTTPException: it took too long.
        """
        model = self._find_model(run)
        pixels = self._check(model, asked)
        found: dict[str, Any] = await self._wait_for(self._queue.ask(model.answer, asked, pixels=pixels), left)
        return found

    async def inspect(self, run: str, asked: Inspected, left: Leaving) -> bytes:
        """The document of a question as JSON; see `answer` for arguments and errors."""
        model = self._find_model(run)
        self._check(model, asked)
        alone = self.settings.most_pixels
        found: bytes = await self._wait_for(self._queue.ask(model.inspect, asked, pixels=alone), left)
        return found

    async def search(self, run: str, text: str, left: Leaving) -> list[tuple[str, float]]:
        """Examples with their scores, the one that a caption fits best first; see `answer` for arguments and errors."""
        model, names = self._find_model(run), self.pictures.searched
        self._check_texts([text])
        if not names:
            raise DataError("there is no folder to search. Name one with --examples.")

        async def score() -> list[tuple[str, float]]:
            scored: list[tuple[str, float]] = []
            for first in range(0, len(names), _SEARCHED_TOGETHER):
                some = names[first : first + _SEARCHED_TOGETHER]
                asked = Asked(images=tuple(some), text=text)
                scores = await self._queue.ask(model.rank, asked, pixels=self.settings.most_pixels)
                scored += zip(some, scores, strict=True)
            return sorted(scored, key=lambda pair: -pair[1])

        return await self._wait_for(score(), left)

    def _find_model(self, name: str) -> ServedModel:
        if name not in self.models:
            raise DataError(f"no model {name!r} is served. {nearest(name, self.models)}")
        return self.models[name]

    def _check(self, model: ServedModel, asked: Asked) -> int:
        """Refuse what is too much before anything is computed. Returns the pixels of the images."""
        most = self.settings.most_choices
        self._check_texts([asked.text, *asked.choices])
        if len(asked.choices) > most:
            raise DataError(f"{len(asked.choices)} answers to choose from; at most {most} are taken.")
        if len(asked.images) > max(model.images, 1):
            model.predictor.check_query(len(asked.images), asked.choices)
        return sum(self.pictures.count_pixels(image) for image in asked.images)

    def _check_texts(self, texts: Sequence[str]) -> None:
        longest, most = max(map(len, texts)), self.settings.most_text
        if longest > most:
            raise DataError(f"the text has {longest:,} characters; at most {most:,} are taken. Shorten it.")
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = ascii(text[error.start])
                raise DataError(
                    f"the text has half a character, {half} at place {error.start}. Type it again."
                ) from error

    async def _decode(self, work: Callable[[], Result]) -> Result:
        """One picture at a time is decoded, however many clients send some."""
        return await asyncio.get_running_loop().run_in_executor(self._decoding, work)

    async def _wait_for(self, answer: Awaitable[Result], left: Leaving) -> Result:
        """An answer within the time limit; it is given up when its client leaves."""
        asked, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(left())
        seconds = self.settings.answer_seconds
        try:
            await asyncio.wait({asked, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            if leaving.done():
                raise HTTPException(499, "the client left.")
            raise HTTPException(504, f"no answer within {seconds:g} seconds. Ask again when fewer people ask.")
        finally:
            asked.cancel()
            leaving.cancel()
