"""Retrieval before and after fine-tuning: which captions are shown, in which order, with which ranks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from fixtures.evaluated_runs import make_images

from visling.analysis.retrieval_gallery import Captions, RankedImages, write_retrieval_gallery
from visling.errors import RunError

IMAGES, PER_IMAGE = 20, 2
"""Of the split, and captions of each."""


def make_ranking(name: str, ranks: np.ndarray, *, zero_shot: bool = False) -> RankedImages:
    """Scores under which the right image of each caption has the rank given, from 1; the others keep their order."""
    scores = np.empty((IMAGES, len(ranks)), np.float32)
    for caption, rank in enumerate(ranks):
        own = caption // PER_IMAGE
        order = [image for image in range(IMAGES) if image != own]
        order.insert(int(rank) - 1, own)
        scores[order, caption] = np.linspace(1, 0, IMAGES)
    numbers = {f"{of}_{what}": 12.5 for of in ("image", "text") for what in ("r1", "r5", "r10", "median_rank")}
    return RankedImages(name=name, scores=scores, numbers=numbers, zero_shot=zero_shot)


@pytest.fixture
def captions() -> Captions:
    images = tuple(f"scene_{number:012d}" for number in range(IMAGES))
    texts = tuple(f"<i>caption {number}" for number in range(IMAGES * PER_IMAGE))
    return Captions(images=images, texts=texts, owners=tuple(image for image in images for _ in range(PER_IMAGE)))


def test_captions_are_shown_with_both_rankings(tmp_path: Path, captions: Captions) -> None:
    first = np.full(len(captions.texts), 10)
    last = np.full(len(captions.texts), 2)
    first[7], last[7] = 20, 1  # rises most
    last[8] = 15  # falls
    images = make_images(tmp_path / "images", [number for number in range(IMAGES) if number != 2])
    out = tmp_path / "out"
    out.mkdir()
    page = write_retrieval_gallery(
        out,
        captions,
        make_ranking("before & co", first, zero_shot=True),
        make_ranking("after", last),
        split="test",
        images=images,
        examples=4,
        moved=2,
    )
    text = page.read_text(encoding="utf-8")
    parts = re.split(r"<h2>", text)[1:]
    shown = [re.findall(r"<h3>&lt;i&gt;caption (\d+)</h3>", part) for part in parts]
    assert [int(name) for name in shown[0]] == [5, 15, 25, 35], "at even distances"
    assert shown[1][0] == "7"
    assert shown[2] == ["8"]
    seven = text[text.index("caption 7<") :]
    seven = seven[: seven.index("</article>")]
    assert "rank 20 → <strong>1</strong>" in seven
    before, after = seven.split("<h4>after")
    assert len(re.findall("<figure", before)) == 6, "five, and the right one behind a gap"
    assert 'class="gap"' in before
    assert len(re.findall("<figure", after)) == 5
    assert re.findall(r'<figure class="true">.*?<figcaption>(\d+) ✓', before + after) == ["20", "1"]
    assert re.findall(r'<article class="caption (\w+)"', text)[-1] == "falls"
    assert "before &amp; co" in text
    assert "by the matching head of its pre-training" in text
    assert "image scene_000000000002 was not found" in text
    assert not re.search(r"https?://|<script|<i>", text)
    written = {f"thumbnails/{file.name}" for file in (out / "thumbnails").iterdir()}
    assert set(re.findall(r'src="([^"]*)"', text)) == written


def test_chance_and_moves_are_counted(tmp_path: Path, captions: Captions) -> None:
    ranks = np.tile([1, 3, 7, 20], 10)
    page = write_retrieval_gallery(
        tmp_path, captions, make_ranking("a", ranks), make_ranking("b", np.ones_like(ranks)), split="test",
        images=tmp_path,
    )  # fmt: skip
    text = page.read_text(encoding="utf-8")
    # One right image among 20: 5, 25 and 50 %. Two right captions among 40: 1 - 38/40, 1 - C(38, 5)/C(40, 5), ...
    assert re.findall(r'<td class="count">([\d.]+) %</td></tr>', text) == ["5.0", "25.0", "50.0", "5.0", "23.7", "44.2"]
    table = text[text.index('class="moves"') :]
    rows = [re.findall(r">([\d·]+)</td>", row) for row in table.split("<tr>")[2:7]]
    assert rows == [["10", "·", "·", "·", "·"]] * 4 + [["·"] * 5]
    assert "without any fine-tuning" not in text, "only of a model that ranks zero-shot"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, captions: Captions) -> None:
    ranks = np.ones(len(captions.texts))
    models = make_ranking("a", ranks), make_ranking("b", ranks)
    with pytest.raises(RunError, match=r"cannot write the gallery .*--out"):
        write_retrieval_gallery(tmp_path / "gone", captions, *models, split="test", images=tmp_path)
