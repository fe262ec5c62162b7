"""visling predict: answers about raw images, asked one at a time or by the file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visling.cli.options import Device, Json, Offline, OtherFeatures, TaskName
from visling.cli.printing import (
    download_bar,
    find_free_name,
    progress_bar,
    refuse_existing,
    slugify,
)
from visling.errors import DataError, RunError

if TYPE_CHECKING:
    from visling.api import Answer, Predictor

_USE = 'visling predict --run RUN image.png "how many stars are there?"'


def predict(
    run: Annotated[
        Path,
        typer.Option(
            help='Run folder, model folder, a name under "Ready to answer" in `visling catalog`, or owner/name on the '
            "hub."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE... TEXT", help="Image files or folders of them, then the question or sentence."),
    ] = None,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help='Instead of IMAGE... TEXT: JSON lines {"image": "a.png", "question": "..."}, or - for stdin. Tasks '
            'about several images read "images": [...], VCR "choices": [...]; a text-only model takes "images": []. '
            "Paths start from the working folder.",
        ),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(help="An answer to choose from, for VCR; give two or more of them."),
    ] = None,
    task: TaskName = None,
    detector: Annotated[
        Path | None,
        typer.Option(
            help="Detector folder, or its name in `visling catalog`; by default the one in the model folder, or that "
            "of the name."
        ),
    ] = None,
    other_features: OtherFeatures = False,
    offline: Offline = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the drawings; RUN/answers by default, ./answers for a model on the hub. With --input: "
            "file for the answers as JSON lines, stdout by default."
        ),
    ] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Ask a model about raw images and draw what it saw: a question, a sentence to judge (about as many images as the
    task reads), a choice among answers, an expression or phrases in brackets to point at, a caption that ranks images.

    A file of questions is answered in one call.

    Example: visling predict --run lxmert-vqa photo.jpg "what is the man holding?"

    Example: visling predict --run vqa scenes/images/test/scene_000000002251.png "what colour is the star?"
    """
    if input_ is not None and words:
        raise typer.BadParameter("give IMAGE... TEXT or --input, not both")
    if input_ is None and len(words or ()) < 2:
        raise typer.BadParameter(f"give one or more images, then the text: {_USE}; or --input FILE")

    def load() -> Predictor:
        return load_model(run, task, detector, other_features, device, offline)

    if input_ is not None:
        rows = list(_read_questions(input_))
        if out is not None:
            refuse_existing(out)
        for number, row in rows:
            check_images(row["images"], _USE, f"{input_}, line {number}: ")
        _answer_file(load(), input_, rows, out)
        return
    assert words
    *places, text = words
    images = _list_images(places)
    check_images(images, _USE)
    model = load()
    if model.task.all_pairs() is not None:
        _print_ranking(model, images, text, json_)
        return
    from visling.api import Question

    # A model's name on the hub is no folder here.
    folder = out if out is not None else run / "answers" if run.exists() else Path("answers")
    together = model.task.images  # as many images make one question
    groups = [images[first : first + together] for first in range(0, len(images), together)]
    answers = model.answer_each(Question(group, text, choice or ()) for group in groups)
    for group, answer in zip(groups, answers, strict=True):
        target = _draw(answer, group, folder)
        if json_:
            rows_ = [
                {"image": image, "text": text, **answer.to_json(), "regions": len(regions), "picture": str(target)}
                for image, regions in zip(group, answer.regions_by_image, strict=True)
            ]
            print("\n".join(map(json.dumps, rows_)))
            continue
        for line in _list_answers(answer):
            print(f"{', '.join(group)}: {line}")
        counts = " and ".join(str(len(regions)) for regions in answer.regions_by_image)
        print(f"  {counts} regions, drawn in {target}")
        for notice in answer.notices:
            print(f"  {notice}")


def load_model(
    run: Path, task: str | None, detector: Path | None, other_features: bool, device: str, offline: bool
) -> Predictor:
    """A model for raw images; says on stderr how its detector's features differ from those of the training."""
    from visling.api import load

    with download_bar() as report:
        model = load(
            run, task=task, detector=detector, other_features=other_features, device=device, offline=offline or None,
            report=report,
        )  # fmt: skip
    if model.notice:
        print(f"note: {model.notice}", file=sys.stderr)
    return model


def _list_answers(answer: Answer) -> list[str]:
    """What is printed of an answer: its candidates in one line, or a line for each box."""
    if answer.boxes:
        return [
            f"{name} {share:.0%} at ({', '.join(f'{corner:.0f}' for corner in box)})"
            for (name, share), box in zip(answer.pointed_at, answer.boxes, strict=False)
        ]
    return [", ".join(f"{name} {share:.0%}" for name, share in answer.top) or answer.text]


def _print_ranking(model: Predictor, images: Sequence[str], text: str, json_: bool) -> None:
    """Images from the one that the text fits best to the one that it fits least."""
    for place, (image, score) in enumerate(model.rank(images, text), 1):
        if json_:
            print(json.dumps({"image": image, "text": text, "rank": place, "score": score}))
        else:
            print(f"{place:>4}  {score:>9.3f}  {image}")


def _draw(answer: Answer, images: Sequence[str], folder: Path) -> Path:
    """Draw an answer into a file named after its images and the text."""
    parts = [*(Path(image).stem for image in images), slugify(answer.question)]
    target = find_free_name(folder, "-".join(filter(None, parts)))
    answer.save(target)
    return target


def _list_images(places: Sequence[str]) -> list[str]:
    """Image files as they were named, and those below folders."""
    from visling.vision.image_files import find_images

    return [
        image for place in places for image in (map(str, find_images(Path(place))) if Path(place).is_dir() else [place])
    ]


def check_images(images: Sequence[str], use: str, where: str = "") -> None:
    """Refuse images that cannot be read, before any question is answered; what is not a file may be a word of a text
    that lacks its quotes.

    Args:
        use: how the command is called.
        where: place of the images in a file, before the message.
    """
    from PIL import Image

    from visling.analysis.question import check_address
    from visling.vision.images import read_image

    for image in images:
        check_address(image, where)
        if not Path(image).exists():
            hint = "Check the path." if where else f"Check the path, and put the text into quotes: {use}."
            raise DataError(f"{where}no image {image}. {hint}")
        try:
            with Image.open(image):
                pass
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            read_image(Path(image))  # says what is wrong


def _read_questions(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line of a file of questions, or of stdin."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the questions {source}: {error}. Check the path.") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}, line {number} is not JSON: {error}.") from error
        asked = row.get("question", row.get("text")) if isinstance(row, dict) else None
        images = row.get("images", [row.get("image")]) if isinstance(row, dict) else None
        choices = row.get("choices", []) if isinstance(row, dict) else None
        listed = all(isinstance(names, list) and all(isinstance(i, str) for i in names) for names in (images, choices))
        if not isinstance(asked, str) or not listed:
            raise DataError(
                f'{source}, line {number} is not a question: expected {{"image": "a.png", "question": "..."}} (or '
                f'"images": [...], "text": "..."); found {line.strip()[:80]}'
            )
        yield number, {"row": row, "images": images, "text": asked, "choices": choices}


def _answer_rows(model: Predictor, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is said about each of the questions of a file."""
    from visling.api import Question

    if model.task.all_pairs() is not None:
        for asked in rows:
            yield {"ranking": [list(pair) for pair in model.rank(asked["images"], asked["text"])]}
        return
    for answer in model.answer_each(Question(asked["images"], asked["text"], asked["choices"]) for asked in rows):
        yield answer.to_json()


def _answer_file(model: Predictor, source: str, rows: Sequence[tuple[int, dict[str, Any]]], out: Path | None) -> None:
    """Answer every question; each line is the question's own with the answer added."""
    try:
        with (
            out.open("x", encoding="utf-8") if out is not None else nullcontext(sys.stdout) as file,
            progress_bar("Answering") as step,
        ):
            done = 0
            try:
                for found in _answer_rows(model, [asked for _, asked in rows]):
                    file.write(json.dumps(rows[done][1]["row"] | found) + "\n")
                    done += 1
                    step(done, len(rows))
            except DataError as error:
                raise DataError(f"{source}, line {rows[done][0]}: {error}") from error
    except OSError as error:
        raise RunError(f"cannot write the answers {out}: {error}. Name another file with --out.") from error
    if out is not None:
        print(f"Wrote {out}: {len(rows)} answers")
