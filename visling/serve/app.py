"""The application: what each address answers. docs/serving.md describes it for users, /openapi.json for programs."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from visling.analysis import __file__ as analysis_package
from visling.errors import VislingError
from visling.serve import schema
from visling.serve.compute import QueueFull
from visling.serve.guard import UPLOADS, Guard, say
from visling.serve.pictures import UnknownPicture
from visling.serve.served import Asked, Inspected
from visling.serve.service import Service

STATIC = (Path(__file__).parent / "static", Path(analysis_package).parent / "static")
"""Folders of the page's files: its own, and what it shares with the files that `visling inspect` writes."""

_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
"""By the end of a file's name. Not the system's table: where that is wrong, browsers refuse scripts."""


def create_app(service: Service) -> FastAPI:
    """The application of a service."""

    @asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="visling",
        summary="Region-based vision-and-language models, asked about pictures.",
        version=metadata.version("visling"),
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=run,
        responses={"4XX": {"model": schema.ErrorInfo}, "5XX": {"model": schema.ErrorInfo}},
    )
    app.add_middleware(Guard, settings=service.settings)
    _add_errors(app, service.settings.most_waiting)
    _add_lists(app, service)
    _add_questions(app, service)
    _add_page(app)
    return app


def _add_errors(app: FastAPI, most_waiting: int) -> None:
    """Every error is {"error": text}."""

    @app.exception_handler(VislingError)
    async def refuse(_: Request, error: VislingError) -> Response:
        return say(str(error), 404 if isinstance(error, UnknownPicture) else 400)

    @app.exception_handler(QueueFull)
    async def put_off(_: Request, __: QueueFull) -> Response:
        return say(f"{most_waiting} questions wait already. Ask again in a moment.", 503, **{"Retry-After": "2"})

    @app.exception_handler(HTTPException)
    async def fail(request: Request, error: HTTPException) -> Response:
        text = f"there is nothing at {request.url.path}." if error.status_code == 404 else str(error.detail)
        return say(text, error.status_code, **(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> Response:
        return say(schema.describe_invalid(list(error.errors())), 422)


def _add_lists(app: FastAPI, service: Service) -> None:
    """Models and pictures."""

    @app.get("/api/models")
    async def list_models() -> list[schema.ModelInfo]:
        """The models that are served, in the order in which they were named."""
        return [
            schema.ModelInfo(
                run=name,
                family=model.predictor.folder.model,
                task=model.predictor.task.name,
                form=model.form,
                images=model.images,
                choices=model.predictor.task.choices,
                notice=model.predictor.notice,
                examples=[schema.ExampleQuestion(**asdict(one)) for one in service.offered[name]],
            )
            for name, model in service.models.items()
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
                questions=[text for text, _ in service.clear.get(one.id, [])],
            )
            for one in service.pictures.examples.values()
        ]

    @app.get("/api/examples/{name}", response_class=Response, responses={200: {"content": {"image/*": {}}}})
    async def show_example(
        name: str, request: Request, side: Annotated[int | None, Query(ge=16, le=4096)] = None
    ) -> Response:
        """A picture of the folder of examples, as it is; with `side` one of at most so many pixels on a side, in a
        format that every browser shows."""
        content = await service.read_example(name, side)
        return _cacheable(request, content.data, content.media_type, "private, max-age=3600")

    @app.post(
        UPLOADS,
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {"schema": {"format": "binary"}}}}},
    )
    async def upload(request: Request) -> schema.UploadInfo:
        """Take the bytes of one image; it is held in memory, for a while."""
        name, (width, height) = await service.upload(request.stream())
        return schema.UploadInfo(id=name, width=width, height=height)


def _add_questions(app: FastAPI, service: Service) -> None:
    """What models are asked."""

    @app.post("/api/answer")
    async def answer(body: schema.AnswerRequest, request: Request) -> schema.AnswerInfo:
        """Ask a model."""
        asked = Asked(images=tuple(body.images), text=body.text, choices=tuple(body.choices))
        return schema.AnswerInfo(**await service.answer(body.run, asked, partial(_wait_for_leaving, request)))

    @app.post("/api/inspect", response_class=JSONResponse)
    async def inspect(body: schema.InspectRequest, request: Request) -> Response:
        """Ask a model, and see what it looked at: the document "visling-inspection-1"."""
        asked = Inspected(
            images=tuple(body.images),
            text=body.text,
            choices=tuple(body.choices),
            without_words=schema.list_places(body.without_words),
            without_regions=schema.list_places(body.without_regions),
            boxes=tuple((drawn.image, drawn.box) for drawn in body.boxes),
            removal=body.removal,
        )
        document = await service.inspect(body.run, asked, partial(_wait_for_leaving, request))
        return Response(document, media_type="application/json")

    @app.post("/api/search")
    async def search(body: schema.SearchRequest, request: Request) -> list[schema.SearchResult]:
        """The pictures of the folder of examples, the one that the caption fits best first."""
        ranked = await service.search(body.run, body.text, partial(_wait_for_leaving, request))
        return [schema.SearchResult(id=name, score=score) for name, score in ranked]


def _add_page(app: FastAPI) -> None:
    """The page and its files."""

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return _send_static(request, "index.html")

    @app.api_route("/static/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        return _send_static(request, name)


async def _wait_for_leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _send_static(request: Request, name: str) -> Response:
    """A file of the page: one that lies in its folders, by its name alone."""
    for folder in STATIC:
        file = next((file for file in folder.glob("*") if file.name == name and file.suffix in _TYPES), None)
        if file is not None:
            return _cacheable(request, file.read_bytes(), _TYPES[file.suffix], "no-cache")
    raise HTTPException(404)


def _cacheable(request: Request, data: bytes, media_type: str, control: str) -> Response:
    """A response that browsers keep, and ask about by its tag."""
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": control}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)
