"""A run says once which words its vocabulary spells out, if they are many, and run.json always does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling.api import load
from visling.recipes.changes import change_recipe
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.runs.finetune import finetune
from visling.runs.pretrain import pretrain

FEW = ("train.max_steps=2", "train.precision=fp32", "batch_size=4")


def rewrite(data: Path, pattern: str, key: str, field: str, text: str) -> None:
    """Put the same text into every annotation."""
    for file in (data / "annotations").glob(pattern):
        content = json.loads(file.read_text())
        for entry in content[key]:
            entry[field] = text
        file.write_text(json.dumps(content))


def messages(out: Path) -> list[str]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["message"] for row in rows if "letter by letter" in row.get("message", "")]


def test_questions_of_ones_own(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    rewrite(data, "v2_OpenEnded*.json", "questions", "question", "Where do the giraffes graze?")
    told = {}
    for name, init in (
        ("visualbert-vqa-scenes", None),
        ("visualbert-vqa-scenes", world.pretrained),
        ("visualbert-small", None),
    ):
        out = tmp_path / f"{name}-{init is not None}"
        settings = world.settings if init is not None else FEW
        run = change_recipe(FINETUNING[name](), [*settings, "train.max_steps=1"])
        finetune(run, out, data=data, store=world.regions, init=init, device="cpu")
        told[name, init is not None] = messages(out)
        found = json.loads((out / "run.json").read_text())["spelled_out"]
        assert (found["share"] == 0.4) == (name == "visualbert-vqa-scenes"), found
        assert ("giraffes" in found["most_often"]) == (name == "visualbert-vqa-scenes")
    (alone,), (started,) = told["visualbert-vqa-scenes", False], told["visualbert-vqa-scenes", True]
    assert alone.startswith("40% of the words of the training text are not in the vocabulary scenes")
    assert alone.endswith("Use --set encoder.vocabulary=bert-base-uncased, or the recipe visualbert-small.")
    assert started.endswith("was trained with this vocabulary: start from a model that has BERT's.")
    assert told["visualbert-small", False] == []


def test_captions(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    rewrite(data, "captions_*.json", "annotations", "caption", "giraffes")
    run = change_recipe(PRETRAINING["lxmert-scenes"](), [*FEW, "objectives.image_qa=0", "objectives.masked_regions=0"])
    pretrain(run, tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")
    (note,) = messages(tmp_path / "run")
    assert "100% of the words" in note
    assert "most often: giraffes. Use" in note
    assert json.loads((tmp_path / "run" / "run.json").read_text())["spelled_out"] == {
        "share": 1.0, "most_often": ["giraffes"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [("giraffes graze near lakes", ("giraffes", "graze", "lakes")), ("what color is the zebra", ())],
)
def test_a_question_of_unknown_words(world: Any, text: str, words: tuple[str, ...]) -> None:
    """Only where they are more than half of its words."""
    answer = load(world.vqa, detector=world.detector, device="cpu").answer(world.picture(), text)
    assert answer.spelled_out == words
