"""Writes panels in NLVR's layout: presentations of one sentence with four pictures; it is true of two of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visling.runtime import generator_for
from visling.scenes.files import image_entry, in_order, info, license_entry, write_json, write_lines
from visling.scenes.panels.captions import panel_captions
from visling.scenes.panels.logic import Sentence
from visling.scenes.panels.panel import COLOURS, SHAPES, SIZES, Panel, draw_panel, piece_box, sample_panel, vary_panel
from visling.scenes.panels.plain import plain_captions, plain_statements
from visling.scenes.panels.sentences import sample_sentences
from visling.scenes.settings import ScenesConfig
from visling.scenes.world import shuffled

_POOL = 12
"""Candidate panels per presentation; four of them are chosen to suit the first sentence."""
_PER_DIRECTORY = 500
"""Presentations per picture directory."""


@dataclass(frozen=True, kw_only=True)
class _JudgedSentence:
    """A sentence and the panels it is judged on: (place, whether it is true), as many true as false ones."""

    form: str
    text: str
    labels: list[tuple[int, bool]]


@dataclass(frozen=True, kw_only=True)
class _Presentation:
    """One presentation: panels and the sentences judged on them; the first sentence of each panel is written in NLVR's
    layout."""

    number: int
    panels: list[Panel]
    captions: list[list[str]]
    """Captions of each panel."""
    judged: list[_JudgedSentence]


def write_panels(folder: Path, config: ScenesConfig, progress: Callable[[int], None]) -> dict[str, Any]:
    """Draw all panels into folder/nlvr and return counts per split; `progress` is called with the number of panels
    done."""
    counts: dict[str, Any] = {}
    presentations = -(-config.panels // 4)
    splits = config.bounds(presentations)
    presented = _make_presentations(
        config, presentations, {split: folder / "nlvr" / split / "images" for split in splits}
    )
    done = 0
    for split, places in splits.items():
        files = _SplitFiles(split, config)
        for place in (Path(split) / "images", Path("annotations")):
            (folder / "nlvr" / place).mkdir(parents=True, exist_ok=True)
        for one in itertools.islice(presented, len(places)):
            files.add(one)
            done += len(one.panels)
            progress(done)
        counts[split] = files.write(folder)
    return counts


def stem(split: str, number: int, place: int, order: int) -> str:
    """File name of a panel without extension, as NLVR writes it."""
    return f"{split}-{number}-{place}-{order}"


def _image_id(number: int, place: int, order: int) -> int:
    """COCO image id of a panel."""
    return (4 * number + place) * 6 + order + 1


def directory(number: int) -> str:
    """Picture directory of a presentation."""
    return str(number // _PER_DIRECTORY)


def _make_presentations(config: ScenesConfig, presentations: int, folders: dict[str, Path]) -> Iterator[_Presentation]:
    """Every presentation in order; its pictures are on disk by the time it is yielded."""
    jobs = []
    for split, places in config.bounds(presentations).items():
        for number in places:
            name = config.panel_first + number
            (folders[split] / directory(name)).mkdir(parents=True, exist_ok=True)
            jobs.append(
                (str(folders[split] / directory(name)), split, config, name, min(4, config.panels - 4 * number))
            )
    return in_order(_make_presentation, jobs, config.processes)


def _make_presentation(job: tuple[str, str, ScenesConfig, int, int]) -> _Presentation:
    """Panels and sentences of one presentation; draws its pictures."""
    folder, split, config, number, num_panels = job
    rng = generator_for(config.seed, number - config.panel_first, 20)
    panels, judged = (_judge_plain_sentences if config.panel_language == "plain" else _judge_people_sentences)(
        config, num_panels, rng
    )
    for place, panel in enumerate(panels):
        for k, order in enumerate(_list_orders(config)):
            draw_panel(panel.permuted(order)).save(
                Path(folder) / f"{stem(split, number, place, k)}.png", compress_level=4
            )
    voices = [generator_for(config.seed, number - config.panel_first, 21, place) for place in range(len(panels))]
    describe = plain_captions if config.panel_language == "plain" else panel_captions
    captions = [describe(panel, voice, config.captions_per_image) for panel, voice in zip(panels, voices, strict=True)]
    return _Presentation(number=number, panels=panels, captions=captions, judged=judged)


def _judge_people_sentences(
    config: ScenesConfig, num_panels: int, rng: np.random.Generator
) -> tuple[list[Panel], list[_JudgedSentence]]:
    """Panels and sentences, each true of some panels and false of as many: its words alone give nothing away."""
    panels, first = _find_first_sentence(config, num_panels, rng)
    judged, said = [first], {first.text}
    for _ in range(20 * config.statements_per_panel):
        if sum(len(one.labels) for one in judged) >= num_panels * config.statements_per_panel:
            break
        for sentence in sample_sentences(rng, panels[0].towers, config.panel_boxes):
            labels = _judge_sentence(sentence, panels, rng)
            if labels and sentence.text not in said:
                said.add(sentence.text)
                judged.append(_JudgedSentence(form=sentence.form, text=sentence.text, labels=labels))
                break
    return panels, judged


def _judge_plain_sentences(
    config: ScenesConfig, num_panels: int, rng: np.random.Generator
) -> tuple[list[Panel], list[_JudgedSentence]]:
    """Panels, and plain sentences about each panel on its own."""
    towers = bool(rng.random() < config.panel_towers)
    panels = [sample_panel(rng, config.panel_boxes, towers, config.panel_items) for _ in range(num_panels)]
    judged = [
        _JudgedSentence(form=sentence.form, text=sentence.text, labels=[(place, truth)])
        for place, panel in enumerate(panels)
        for sentence, truth in plain_statements(panel, rng, config.statements_per_panel)
    ]
    return panels, judged


def _list_orders(config: ScenesConfig) -> list[tuple[int, ...]]:
    """Orders of the boxes in which each panel is drawn."""
    return list(itertools.permutations(range(config.panel_boxes)))[: config.permutations]


def _find_first_sentence(
    config: ScenesConfig, num_panels: int, rng: np.random.Generator
) -> tuple[list[Panel], _JudgedSentence]:
    """Panels in which small differences decide, and a sentence true of half of them."""
    towers = bool(rng.random() < config.panel_towers)
    while True:
        pool: list[Panel] = []
        while len(pool) < _POOL:
            pool.append(sample_panel(rng, config.panel_boxes, towers, config.panel_items))
            pool += [vary_panel(pool[-1], rng, config.panel_items) for _ in range(2)]
        for sentence in sample_sentences(rng, towers, config.panel_boxes):
            truths = [sentence.truth(panel) for panel in pool]
            chosen = _choose_halves(truths, num_panels, rng)
            if chosen is not None:
                labels = [(place, bool(truths[i])) for place, i in enumerate(chosen)]
                return [pool[i] for i in chosen], _JudgedSentence(form=sentence.form, text=sentence.text, labels=labels)


def _choose_halves(truths: Sequence[bool | None], number: int, rng: np.random.Generator) -> list[int] | None:
    """Positions of as many true as false panels, variations of one panel first; None if there are not enough."""
    true = [i for i, truth in enumerate(truths) if truth is True]
    false = [i for i, truth in enumerate(truths) if truth is False]
    want_true = number // 2 + (number % 2 and int(rng.integers(2)))
    if len(true) < want_true or len(false) < number - want_true:
        return None
    true, false = shuffled(rng, true), shuffled(rng, false)
    true.sort(key=lambda i: -any(i // 3 == j // 3 for j in false))
    kept = true[:want_true]
    false.sort(key=lambda j: -any(i // 3 == j // 3 for i in kept))
    return shuffled(rng, [*kept, *false[: number - want_true]])


def _judge_sentence(sentence: Sentence, panels: Sequence[Panel], rng: np.random.Generator) -> list[tuple[int, bool]]:
    """(place, truth) of as many true as false panels; empty unless there is one of each."""
    truths = [sentence.truth(panel) for panel in panels]
    true = shuffled(rng, [i for i, truth in enumerate(truths) if truth is True])
    false = shuffled(rng, [i for i, truth in enumerate(truths) if truth is False])
    number = min(len(true), len(false))
    return sorted([(i, True) for i in true[:number]] + [(i, False) for i in false[:number]])


class _SplitFiles:
    """Collects the annotations of one split of panels and writes them."""

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self.split, self.config = split, config
        self.examples: list[dict[str, Any]] = []
        self.extra: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.instances: list[dict[str, Any]] = []
        self.captions: list[dict[str, Any]] = []
        self.forms: Counter[str] = Counter()

    def add(self, presented: _Presentation) -> None:
        """Collect the annotations of one presentation."""
        number = presented.number
        described: set[int] = set()
        for j, judged in enumerate(presented.judged):
            self.forms[judged.form] += len(judged.labels)
            for place, truth in judged.labels:
                label = "true" if truth else "false"
                if place not in described:
                    described.add(place)
                    self.examples.append(
                        {
                            "sentence": judged.text,
                            "label": label,
                            "identifier": f"{number}-{place}",
                            "directory": directory(number),
                            "evals": {"r0": label},
                            "structured_rep": [
                                [piece.official() for piece in box] for box in presented.panels[place].boxes
                            ],
                        }
                    )
                else:
                    image = stem(self.split, number, place, 0)
                    self.extra.append(
                        {
                            "sentence": judged.text,
                            "label": label,
                            "identifier": f"{number}-{place}-s{j}",
                            "image": image,
                        }
                    )
        for place, panel in enumerate(presented.panels):
            for k, order in enumerate(_list_orders(self.config)):
                self._add_picture(number, place, k, panel.permuted(order))
            for k, text in enumerate(presented.captions[place]):
                image_id = _image_id(number, place, 0)
                self.captions.append({"id": image_id * 100 + k, "image_id": image_id, "caption": text})

    def _add_picture(self, number: int, place: int, k: int, panel: Panel) -> None:
        image_id = _image_id(number, place, k)
        name = f"{directory(number)}/{stem(self.split, number, place, k)}.png"
        self.images.append(image_entry(image_id, name, 150 * len(panel.boxes) - 50, 100))
        pieces = [(where, piece) for where, box in enumerate(panel.boxes) for piece in box]
        size_words = {width: word for word, width in SIZES.items()}
        for n, (where, piece) in enumerate(pieces):
            x1, y1, x2, y2 = piece_box(where, piece)
            self.instances.append(
                {
                    "id": image_id * 100 + n,
                    "image_id": image_id,
                    "category_id": SHAPES.index(piece.shape) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [],
                    "attributes": [piece.color, size_words[piece.size]],
                }
            )

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files of the split and return their counts."""
        place = folder / "nlvr" / self.split
        write_lines(place / f"{self.split}.json", self.examples)
        write_lines(place / "statements.json", self.extra)
        head = {"info": info("panels"), "licenses": [license_entry()], "images": self.images}
        write_json(
            folder / "nlvr" / "annotations" / f"captions_{self.split}.json", head | {"annotations": self.captions}
        )
        categories = [{"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES)]
        write_json(
            folder / "annotations" / f"instances_nlvr_{self.split}.json",
            head | {"annotations": self.instances, "categories": categories, "attributes": [*COLOURS, *SIZES]},
        )
        labels = Counter(row["label"] for row in (*self.examples, *self.extra))
        return {
            "pictures": len(self.images),
            "objects": len(self.instances),
            "captions": len(self.captions),
            "statements": len(self.examples),
            "extra_statements": len(self.extra),
            "labels": dict(sorted(labels.items())),
            "forms": dict(sorted(self.forms.items())),
        }
