"""The application: what each address answers. docs/serving.md describes it for users, /openapi.json for programs."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from visling.analysis import __file__ as analysis_package
from visling.errors import DataError, VislingError, nearest
from visling.serve import schema
from visling.serve.compute import ComputeQueue, QueueFull
from visling.serve.examples import list_clear_questions, offer_questions
from visling.serve.guard import UPLOADS, Guard, say
from visling.serve.pictures import Pictures, UnknownPicture
from visling.serve.served import Asked, Inspected, ServedModel
from visling.serve.settings import ServeSettings

STATIC = (Path(__file__).parent / "static", Path(analysis_package).parent / "static")
"""Folders of the page's files: its own, and what it shares with the files that `visling inspect` writes."""

_SEARCHED_TOGETHER = 8
"""Pictures of a search that are computed at a time, between other people's questions."""

Result = TypeVar("Result")


def create_app(
    models: Sequence[ServedModel], pictures: Pictures, settings: ServeSettings, scenes: Path | None = None
) -> FastAPI:
    """The application that serves some models on some pictures.

    Args:
        scenes: folder of drawn scenes, for questions that can be asked at once.
    """
    queue: ComputeQueue
    by_name = {model.name: model for model in models}
    clear = {} if scenes is None else list_clear_questions(scenes, pictures)
    offered = {
        model.name: [] if scenes is None else offer_questions(model, scenes, pictures, clear) for model in models
    }
    decoding = ThreadPoolExecutor(1, thread_name_prefix="visling-decode")
    arriving = 0

    @asynccontextmanager
    async def compute(_: FastAPI) -> AsyncIterator[None]:
        nonlocal queue
        queue = ComputeQueue(
            most_waiting=settings.most_waiting,
            most_together=settings.most_together,
            most_pixels=settings.most_pixels,
            collect_seconds=settings.collect_seconds,
        )
        running = asyncio.create_task(queue.run())
        yield
        running.cancel()
        queue.close()
        decoding.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="visling",
        summary="Region-based vision-and-language models, asked about pictures.",
        version=metadata.version("visling"),
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=compute,
        responses={"4XX": {"model": schema.ErrorInfo}, "5XX": {"model": schema.ErrorInfo}},
    )
    app.add_middleware(Guard, settings=settings)

    @app.exception_handler(VislingError)
    async def refuse(_: Request, error: VislingError) -> Response:
        return say(str(error), 404 if isinstance(error, UnknownPicture) else 400)

    @app.exception_handler(QueueFull)
    async def put_off(_: Request, __: QueueFull) -> Response:
        text = f"{settings.most_waiting} questions wait already. Ask again in a moment."
        return say(text, 503, **{"Retry-After": "2"})

    @app.exception_handler(HTTPException)
    async def fail(request: Request, error: HTTPException) -> Response:
        text = f"there is nothing at {request.url.path}." if error.status_code == 404 else str(error.detail)
        return say(text, error.status_code, **(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> Response:
        return say(schema.describe_invalid(list(error.errors())), 422)

    def find_model(name: str) -> ServedModel:
        if name not in by_name:
            raise DataError(f"no model {name!r} is served. {nearest(name, by_name)}")
        return by_name[name]

    def check(body: schema.AnswerRequest) -> tuple[ServedModel, Asked, int]:
        """The model, the question, and the pixels of its images."""
        model = find_model(body.run)
        check_length(body.text, *body.choices)
        if len(body.choices) > settings.most_choices:
            raise DataError(f"{len(body.choices)} answers to choose from; at most {settings.most_choices} are taken.")
        if len(body.images) > max(model.images, 1):
            model.predictor.check_query(len(body.images), body.choices)
        pixels = sum(pictures.count_pixels(image) for image in body.images)
        return model, Asked(images=tuple(body.images), text=body.text, choices=tuple(body.choices)), pixels

    def check_length(*texts: str) -> None:
        longest = max(map(len, texts))
        if longest > settings.most_text:
            raise DataError(
                f"the text has {longest:,} characters; at most {settings.most_text:,} are taken. Shorten it."
            )

    async def wait_for(request: Request, answer: Awaitable[Result]) -> Result:
        """An answer within the time limit; it is given up when its client leaves."""
        asked = asyncio.ensure_future(answer)
        left = asyncio.ensure_future(_wait_for_leaving(request))
        try:
            await asyncio.wait({asked, left}, timeout=settings.answer_seconds, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            if left.done():
                raise HTTPException(499, "the client left.")
            raise HTTPException(
                504, f"no answer within {settings.answer_seconds:.0f} seconds. Ask again when fewer people ask."
            )
        finally:
            asked.cancel()
            left.cancel()

    @app.get("/api/models")
    async def list_models() -> list[schema.ModelInfo]:
        """The models that are served, in the order in which they were named."""
        return [
            schema.ModelInfo(
                run=model.name,
                family=model.predictor.folder.model,
                task=model.predictor.task.name,
                form=model.form,
                images=model.images,
                choices=model.predictor.task.choices,
                notice=model.predictor.notice,
                examples=[schema.ExampleQuestion(**asdict(one)) for one in offered[model.name]],
            )
            for model in models
        ]

    @app.get("/api/examples")
    async def list_examples() -> list[schema.ExampleInfo]:
        """The pictures of the folder of examples."""
        return [
            schema.ExampleInfo(
                id=one.id,
                name=one.path.name,
                width=one.size[0],
                height=one.size[1],
                searched=one.searched,
                questions=[text for text, _ in clear.get(one.id, [])],
            )
            for one in pictures.examples.values()
        ]

    @app.get("/api/examples/{name}", response_class=Response, responses={200: {"content": {"image/*": {}}}})
    async def show_example(
        name: str, request: Request, side: Annotated[int | None, Query(ge=16, le=4096)] = None
    ) -> Response:
        """A picture of the folder of examples, as it is; with `side` one of at most so many pixels on a side, in a
        format that every browser shows."""
        if name not in pictures.examples:
            raise UnknownPicture(f"no example {name!r}. /api/examples lists them.")
        find = partial(pictures.find, name) if side is None else partial(pictures.shrink, name, side)
        content = await asyncio.get_running_loop().run_in_executor(decoding, find)
        return _cacheable(request, content.data, content.media_type, "private, max-age=3600")

    @app.post(
        UPLOADS,
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {"schema": {"format": "binary"}}}}},
    )
    async def upload(request: Request) -> schema.UploadInfo:
        """Take the bytes of one image; it is held in memory, for a while."""
        nonlocal arriving
        data = bytearray()
        try:
            async for part in request.stream():
                arriving += len(part)
                data += part
                if arriving > settings.upload_bytes:
                    text = "too many images arrive at once. Upload yours again in a moment."
                    raise HTTPException(503, text, headers={"Retry-After": "2"})
            found = asyncio.get_running_loop().run_in_executor(decoding, pictures.add, bytes(data))
            name, (width, height) = await found
        finally:
            arriving -= len(data)
        return schema.UploadInfo(id=name, width=width, height=height)

    @app.post("/api/answer")
    async def answer(body: schema.AnswerRequest, request: Request) -> schema.AnswerInfo:
        """Ask a model."""
        model, asked, pixels = check(body)
        found = await wait_for(request, queue.ask(model.answer, asked, pixels=pixels))
        return schema.AnswerInfo(**found)

    @app.post("/api/inspect", response_class=JSONResponse)
    async def inspect(body: schema.InspectRequest, request: Request) -> Response:
        """Ask a model, and see what it looked at: the document "visling-inspection-1"."""
        model, asked, _ = check(body)
        changed = Inspected(
            **vars(asked),
            without_words=schema.list_places(body.without_words),
            without_regions=schema.list_places(body.without_regions),
            boxes=tuple((drawn.image, drawn.box) for drawn in body.boxes),
            removal=body.removal,
        )
        found = await wait_for(request, queue.ask(model.inspect, changed, pixels=settings.most_pixels))
        return Response(found, media_type="application/json")

    @app.post("/api/search")
    async def search(body: schema.SearchRequest, request: Request) -> list[schema.SearchResult]:
        """The pictures of the folder of examples, the one that the caption fits best first."""
        model = find_model(body.run)
        check_length(body.text)
        if not pictures.searched:
            raise DataError("there is no folder to search. Name one with --examples.")

        async def score() -> list[schema.SearchResult]:
            scored: list[schema.SearchResult] = []
            names = pictures.searched
            for first in range(0, len(names), _SEARCHED_TOGETHER):
                some = names[first : first + _SEARCHED_TOGETHER]
                asked = Asked(images=tuple(some), text=body.text)
                scores = await queue.ask(model.rank, asked, pixels=settings.most_pixels)
                scored += [schema.SearchResult(id=n, score=s) for n, s in zip(some, scores, strict=True)]
            return sorted(scored, key=lambda one: -one.score)

        return await wait_for(request, score())

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return _send_static(request, "index.html")

    @app.api_route("/static/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        return _send_static(request, name)

    return app


async def _wait_for_leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _send_static(request: Request, name: str) -> Response:
    """A file of the page: one that lies in its folders, by its name alone."""
    for folder in STATIC:
        file = next((file for file in folder.glob("*") if file.name == name and file.is_file()), None)
        if file is not None:
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            text = "; charset=utf-8" if kind.startswith(("text/", "application/javascript")) else ""
            return _cacheable(request, file.read_bytes(), kind + text, "no-cache")
    raise HTTPException(404)


def _cacheable(request: Request, data: bytes, media_type: str, control: str) -> Response:
    """A response that browsers keep, and ask about by its tag."""
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers: dict[str, Any] = {"ETag": tag, "Cache-Control": control}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)
