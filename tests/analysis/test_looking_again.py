"""Models that are asked again about examples of their evaluation: views of a gallery, relevance in a report."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visling.analysis.gallery import GalleryRun, write_gallery
from visling.analysis.looked_at import LookedAt, look_again
from visling.analysis.relevance import explain
from visling.analysis.report import write_report
from visling.cli.gallery import open_to_ask
from visling.errors import DataError, RunError
from visling.runs.evaluate import evaluate


@pytest.fixture(scope="module")
def scored(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny VQA run, evaluated on `test`."""
    run = tmp_path_factory.mktemp("scored") / "vqa"
    shutil.copytree(world.vqa, run)
    evaluate(run, split="test", device="cpu")
    return run


def read_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "details_test.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_model_answers_again_as_it_did_when_it_was_evaluated(scored: Path) -> None:
    asked, rows = open_to_ask(scored, "test", device="cpu"), read_rows(scored)
    for row, prediction in zip(rows, asked.predict(rows), strict=True):
        assert prediction.value == row["prediction"]
        assert prediction.confidence == pytest.approx(row["confidence"], abs=1e-5)
    assert asked.ask(rows, blind=True).batch.regions is None
    blind = asked.predict(rows, blind=True)
    assert [one.confidence for one in blind] != [row["confidence"] for row in rows]
    with pytest.raises(DataError, match=r"no example 'q0'.*--overwrite"):
        asked.predict([{"id": "q0"}])


def test_relevance_is_shared_out_among_words_and_regions(scored: Path) -> None:
    asked, rows = open_to_ask(scored, "test", device="cpu"), read_rows(scored)
    looks = look_again(asked, rows)
    assert len(looks) == len(rows)
    for look, row in zip(looks, rows, strict=True):
        assert look.answer == row["prediction"]
        assert sum(one.weight for one in (*look.words, *look.regions)) == pytest.approx(1, abs=1e-5)
        assert "".join(word.text for word in look.words) == re.sub(r"\W", "", row["text"]) + "?" * row["text"].count(
            "?"
        )
        boxes = asked.store[row["image"]].boxes.tolist()  # type: ignore[index]
        weights = look.weigh_boxes(boxes, 0)
        assert sum(weights) == pytest.approx(look.image_share, abs=1e-5)
        assert max(weights) == look.heaviest(1)[0].weight
        assert look.weigh_boxes(boxes, 1) == [0.0] * len(boxes), "there is no second image"
    # Batched examples do not influence one another.
    alone = look_again(asked, rows[3:4])[0]
    assert [one.weight for one in alone.regions] == pytest.approx([one.weight for one in looks[3].regions], abs=1e-5)
    one = asked.ask(rows[3:4])
    (explained,) = explain(asked.model, asked.task, one.batch, one.records, methods=("relevance",), most=1)
    regions = explained.scores["relevance"][0][0].regions
    assert np.argmax(regions) == int(np.argmax([region.weight for region in alone.regions]))


def test_nothing_relevant_divides_by_nothing() -> None:
    look = LookedAt(answer="", words=(), regions=())
    assert (look.strongest, look.image_share, look.heaviest()) == (0.0, 0, [])


def test_the_report_shows_what_the_model_looked_at(scored: Path, world: Any, tmp_path: Path) -> None:
    def asks(split: str) -> Any:
        assert split == "test"
        return open_to_ask(scored, split, device="cpu")

    images = world.scenes / "images"
    text = write_report(scored, out=tmp_path / "with.html", images=images, asks=asks).read_text(encoding="utf-8")
    cards = text.count('<article class="card')
    assert cards == 12
    assert text.count('<p class="looked">Looked at: ') == cards
    strengths = [float(value) for value in re.findall(r'class="look" style="--strength:([\d.]+)"', text)]
    assert len(strengths) > 3 * cards
    assert 0 <= min(strengths) <= max(strengths) <= 1
    assert "What is missing" not in text
    plain = write_report(scored, out=tmp_path / "plain.html", images=images).read_text(encoding="utf-8")
    assert "looked at" not in plain.lower()


def test_a_copied_run_is_reported_without_what_it_lacks(scored: Path, world: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(scored, copy)
    shutil.rmtree(copy / "model")
    text = write_report(copy, asks=lambda split: open_to_ask(copy, split, device="cpu")).read_text(encoding="utf-8")
    assert "what the model looked at is not shown: no model" in text
    assert str(tmp_path) not in text
    assert text.count('<article class="card') == 12
    gone = tmp_path / "gone"
    shutil.copytree(scored, gone)
    about = json.loads((gone / "run.json").read_text())
    (gone / "run.json").write_text(json.dumps(about | {"store": str(tmp_path / "no_store")}))
    text = write_report(gone, asks=lambda split: open_to_ask(gone, split, device="cpu")).read_text(encoding="utf-8")
    assert "what the model looked at is not shown" in text
    assert "no_store" in text
    assert str(tmp_path) not in text, "the page can be shared"
    with pytest.raises(RunError, match="pre-trained encoder without a task head"):
        open_to_ask(world.pretrained, "test", data=world.scenes, device="cpu")


def test_every_example_has_a_view_for_each_run(scored: Path, world: Any, tmp_path: Path) -> None:
    run = GalleryRun.read(scored)
    asked = open_to_ask(scored, "test", device="cpu")
    weaker = replace(asked, model=type(asked.model)(*_parts_of(asked)).eval())
    seen: list[tuple[int, int]] = []
    write_gallery(
        run,
        tmp_path / "out",
        other=GalleryRun.read(scored),
        examples=5,
        asked=[asked, weaker],
        images=world.scenes / "images",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(number, 5) for number in range(1, 6)]
    entries = json.loads((tmp_path / "out" / "examples.js").read_text()[len("window.visling_gallery = ") : -2])
    assert [entry["view"] for entry in entries] == [f"views/{number:05d}.js" for number in range(1, 6)]
    assert all(entry["boxes"] and entry["blind"] and entry["removal"] is not None for entry in entries)
    view = tmp_path / "out" / "views" / "00002.js"
    text = view.read_text(encoding="utf-8")
    assert text.startswith('window.visling_view("00002", [{"format": "visling-inspection-1"')
    documents = json.loads(text[len('window.visling_view("00002", ') : -3])
    assert len(documents) == 2
    for document in documents:
        assert document["question"] == entries[1]["text"]
        assert document["truth"]["text"]
        assert document["images"][0]["src"].startswith("data:image/")
    assert documents[0]["answers"][0]["text"] == entries[1]["answer"]
    # Resuming keeps the views that are there, and computes the others.
    view.write_text(text.replace('"question": "', '"question": "kept: '), encoding="utf-8")
    (tmp_path / "out" / "views" / "00004.js").unlink()
    write_gallery(
        run, tmp_path / "out", other=GalleryRun.read(scored), examples=5, asked=[asked, weaker],
        images=world.scenes / "images", resume=True,
    )  # fmt: skip
    assert "kept: " in view.read_text(encoding="utf-8")
    assert (tmp_path / "out" / "views" / "00004.js").is_file()


def _parts_of(asked: Any) -> tuple[Any, ...]:
    """What a `TaskModel` of the same task with other heads is made of."""
    from visling.models import head_styles

    torch.manual_seed(1)
    return asked.model.encoder, asked.task.heads, head_styles(asked.saved.model)
