from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling.data.text import Tokenizer
from visling.errors import ConfigError
from visling.runtime import generator_for
from visling.scenes.drawing import STYLES, draw_scene
from visling.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, Item, sample_items


def background(picture: np.ndarray) -> np.ndarray:
    """(H, W) whether a pixel of a plain picture shows the sheet."""
    sheet = Counter(map(tuple, picture.reshape(-1, 3).tolist())).most_common(1)[0][0]
    return np.asarray((picture == np.array(sheet)).all(axis=-1))


@pytest.mark.parametrize("seed", range(12))
def test_plain_boxes_are_tight_and_hold_every_drawn_pixel(seed: int) -> None:
    rng = generator_for(seed)
    image, items = draw_scene(sample_items(rng, 3, 10), 128, "plain", rng)
    drawn = ~background(np.asarray(image))
    outside = drawn.copy()
    for item in items:
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 < x2 <= 128
        assert 0 <= y1 < y2 <= 128
        part = drawn[y1:y2, x1:x2]
        assert part[0].any()
        assert part[-1].any()
        assert part[:, 0].any()
        assert part[:, -1].any()
        outside[y1:y2, x1:x2] = False
    assert not outside.any()


@pytest.mark.parametrize("style", STYLES)
def test_boxes_hardly_overlap_and_sizes_differ(style: str) -> None:
    widths: dict[str, list[int]] = {size: [] for size in SIZES}
    for seed in range(20):
        rng = generator_for(seed, 1)
        _, items = draw_scene(sample_items(rng, 3, 10), 128, style, rng)
        for i, a in enumerate(items):
            widths[a.size].append(max(a.box[2] - a.box[0], a.box[3] - a.box[1]))
            for b in items[i + 1 :]:
                w = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
                h = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
                areas = [(c.box[2] - c.box[0]) * (c.box[3] - c.box[1]) for c in (a, b)]
                assert max(w, 0) * max(h, 0) <= 0.12 * min(areas) + 1e-9
    assert max(widths["small"]) < min(widths["medium"])
    assert max(widths["medium"]) < min(widths["large"])


def test_styles_look_different_and_show_the_same_world() -> None:
    pictures, worlds = [], []
    for style in STYLES:
        items = sample_items(generator_for(3, 0), 3, 10)
        image, placed = draw_scene(items, 128, style, generator_for(3, 1))
        pictures.append(np.asarray(image))
        worlds.append([(item.shape, item.color, item.size, item.texture) for item in placed])
    assert worlds[0] == worlds[1]
    flat = [len(np.unique(picture.reshape(-1, 3), axis=0)) for picture in pictures]
    assert flat[1] > 5 * flat[0], "a plain sheet has few colours, paper has many"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", SIZES)
def test_textures_can_be_told_apart_at_every_size(style: str, size: str) -> None:
    """Share of the box that is inked differs between textures, and so do the pictures."""
    ink = {}
    for texture in TEXTURES:
        image, placed = draw_scene(
            [Item(shape="square", color="black", size=size, texture=texture)], 128, style, generator_for(5)
        )
        x1, y1, x2, y2 = placed[0].box
        ink[texture] = float((np.asarray(image.convert("L"))[y1:y2, x1:x2] < 128).mean())
    assert ink["solid"] > ink["striped"] + 0.08, ink
    assert ink["solid"] > ink["dotted"] + 0.08, ink


def test_size_scales_objects() -> None:
    widths = [
        draw_scene([Item(shape="square", color="red", size="large", texture="solid")], size, "plain", generator_for(1))[
            1
        ][0].box
        for size in (128, 256)
    ]
    small, large = (box[2] - box[0] for box in widths)
    assert large == pytest.approx(2 * small, abs=2)


def test_too_many_objects_are_refused() -> None:
    items = [Item(shape="square", color="red", size="large", texture="solid")] * 16
    with pytest.raises(ConfigError, match="do not fit"):
        draw_scene(items, 128, "plain", generator_for(0))


def test_traits_are_evenly_frequent() -> None:
    """A biased trait would let a question's words predict its answer."""
    items = [item for seed in range(1500) for item in sample_items(generator_for(seed, 9), 3, 10)]
    for values, name in ((SHAPES, "shape"), (COLOURS, "color"), (SIZES, "size"), (TEXTURES, "texture")):
        counts = Counter(item.trait(name) for item in items)
        for value in values:
            assert counts[value] / len(items) == pytest.approx(1 / len(values), rel=0.15), (name, counts)


def test_every_word_is_one_piece(written: Any) -> None:
    tokenizer = Tokenizer()
    questions = [
        q["question"] for q in written.json("annotations/v2_OpenEnded_scenes_train_questions.json")["questions"]
    ]
    captions = [c["caption"] for c in written.json("annotations/captions_train.json")["annotations"]]
    statements = [s["sentence"] for s in written.lines("statements/train.json")]
    for texts, most in ((questions, 18), (captions, 40), (statements, 30)):
        for text in texts:
            pieces = tokenizer.words(text)
            assert all(len(word) == 1 for word in pieces), text
            assert len(pieces) <= most, text
    answers = {
        a["multiple_choice_answer"] for a in written.json("annotations/v2_scenes_train_annotations.json")["annotations"]
    }
    for answer in answers:
        assert len(tokenizer.encode(answer)) == 1, answer


def test_pictures_are_the_size_their_entry_says(written: Any) -> None:
    for entry in written.json("annotations/instances_val.json")["images"]:
        with Image.open(written.folder / "images" / "val" / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"]) == (128, 128)
            assert image.mode == "RGB"
