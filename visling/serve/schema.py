"""What is sent and returned, as OpenAPI describes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from visling.serve.served import Form


class _Sent(BaseModel):
    """What a client sends: a field that does not exist is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class AnswerRequest(_Sent):
    """A question for one model."""

    run: str = Field(description="Name of the model, as /api/models lists it.")
    images: list[str] = Field(default=[], description="Ids of uploads or examples, as many as the task reads.")
    text: str = Field(description="The question, sentence, expression or caption.")
    choices: list[str] = Field(default=[], description="Answers to choose from, for tasks that read them.")


class DrawnBox(_Sent):
    """A box that the reader draws."""

    image: int = Field(default=0, description="Which of the question's images it is in.")
    box: tuple[float, float, float, float] = Field(description="Corners x1, y1, x2, y2 in pixels of the image.")


Number = int | tuple[int, int]
"""Number of a word or region in the first row of a document, or in the row that stands before it."""


class InspectRequest(AnswerRequest):
    """A question to be looked into, perhaps changed: asked again without some words and regions, with drawn boxes."""

    without_words: list[Number] = Field(default=[], description="Numbers in the row's `words`, or [row, number].")
    without_regions: list[Number] = Field(
        default=[], description="Numbers in the row's `regions`, or [row, number], of the document without drawn boxes."
    )
    boxes: list[DrawnBox] = []
    removal: bool = Field(default=True, description="Also ask again without each part, which takes most of the time.")


class SearchRequest(_Sent):
    """A caption for which the folder of examples is searched."""

    run: str
    text: str


class ExampleQuestion(BaseModel):
    """A question that can be asked at once."""

    images: list[str]
    text: str
    choices: list[str] = []
    truth: str | None = Field(default=None, description="Its right answer, if that is one text.")


class ModelInfo(BaseModel):
    """A model that is served."""

    run: str
    family: str
    task: str
    form: Form
    images: int = Field(description="Images of one question; 0 where the model reads the words alone.")
    choices: bool = Field(description="Whether it chooses among answers that are given with the question.")
    notice: str = Field(description="What makes its answers doubtful; empty if nothing does.")
    examples: list[ExampleQuestion]


class ExampleInfo(BaseModel):
    """A picture of the folder of examples."""

    id: str
    name: str = Field(description="Its file's name.")
    width: int
    height: int
    searched: bool = Field(description="Whether /api/search looks at it; else it belongs to a model's question.")
    questions: list[str] = Field(description="Questions about it that have one clear answer.")


class UploadInfo(BaseModel):
    """An uploaded image."""

    id: str
    width: int
    height: int


class AnswerInfo(BaseModel):
    """What a model answers; the same as `visling predict --json` prints."""

    answer: str
    confidence: float
    top: list[tuple[str, float]] = Field(description="Best answers with probabilities, best first.")
    boxes: list[tuple[float, float, float, float]] = Field(
        default=[], description="Where each of `top` is, in pixels of the first image, of tasks that point."
    )
    pointed_at: list[tuple[str, float]] = []
    truncated: bool = Field(description="Whether the text was longer than the model reads.")
    notice: str = ""
    spelled_out: list[str] = Field(default=[], description="Words that the model does not know, if most are.")
    regions: list[int] = Field(description="Regions found in each image.")


class SearchResult(BaseModel):
    """An example and how well the caption fits it."""

    id: str
    score: float


class ErrorInfo(BaseModel):
    """Why a request failed."""

    error: str


def list_places(numbers: Sequence[Number]) -> tuple[tuple[int, int], ...]:
    """(row, number) of each."""
    return tuple((0, number) if isinstance(number, int) else number for number in numbers)


def describe_invalid(errors: list[Any]) -> str:
    """One sentence about what a request's body lacks, from pydantic's list."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    return f"the request is not understood: {where}: {first['msg']}. /openapi.json describes it."
