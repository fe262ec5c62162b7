"""Do the heads ground words? How often the region that a phrase, or a parsed word, attends to most is a right one.

Paper    VisualBERT, Li et al. 2019 (arXiv 1908.03557), section 5: for each head, the attention of an entity's token is
         compared over the regions alone; and for each dependency relation, that of a word whose head or dependent is
         such an entity. No head was trained for it. Baseline: the region in which the detector is most confident.
Ours     The paper does not say which word piece stands for a phrase, nor which overlap makes a region right. As in its
         release's fine-tuning on the same data: the last piece of the last word, and IoU >= 0.5 with any box of the
         phrase. A phrase belongs to the word in it whose head is outside. Phrases that no region matches are misses.
         The paper reports the best of all heads on the phrases that chose it; we add its score on held-out images,
         and a control: how often the sentence's words in general attend to the same region. A head that looks at the
         first thing named, whatever the word, is right about many relations and follows none of them.
Letters  B rows, T tokens, R regions, H heads; N queries: a phrase or word that attends; K pieces of a query; C cells: a
         head of a layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling import boxes as box_ops
from visling.data.annotations.entities import Box, EntitiesRecord
from visling.data.annotations.parses import Parse, Span
from visling.data.batches.shown import ShownExamples
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError, nearest
from visling.metrics.phrases import MatchRule, right_boxes
from visling.models.base import Encoder
from visling.tasks.grounding import PhraseGrounding, frequent_places
from visling.types import Example, Maps, RegionArray, RegionStore

Pieces = Literal["last", "mean"]
"""What stands for a phrase or word: its last piece, or the mean attention of all of its pieces."""
Direction = Literal["phrase", "dependent_to_head", "head_to_dependent"]

PHRASES: Final = ""
"""In place of a relation: a phrase attends to its own region."""
DIRECTIONS: Final[Mapping[str, str]] = {
    "dependent_to_head": "a word attends to the region of its head",
    "head_to_dependent": "a word attends to the region of its dependent",
}


class Kind(NamedTuple):
    """What is asked of a query."""

    relation: str
    direction: Direction


PHRASE: Final = Kind(PHRASES, "phrase")


class Query(NamedTuple):
    """A phrase or a word that attends."""

    kind: Kind
    at: tuple[int, ...]
    """Positions of its pieces in the row; the last one, or all."""
    phrase: int
    """Number of the phrase, among those of its sentence, whose region is the right one."""


@dataclass
class Lost:
    """What could not be asked."""

    cut_phrases: int = 0
    """Beyond the longest text that the model reads."""
    cut_words: int = 0
    """Pairs of a relation whose attending word is beyond it, or without a piece."""
    headless_phrases: int = 0
    """Phrases with several words, or none, whose head is outside: no word stands for them in relations."""


class Sentences(PhraseGrounding):
    """The records of phrase grounding, whose rows no preset cuts to a joint length; nothing is trained on them."""

    def example(self, record: EntitiesRecord, layout: TextLayout, rng: np.random.Generator) -> Example:
        """The sentence with its image."""
        return Example(id=record.id, rows=(layout.row(record.sentence),), images=record.images)

    def region_targets(
        self, record: EntitiesRecord, regions: Sequence[RegionArray]
    ) -> Mapping[str, NDArray[np.float32]]:
        """None."""
        return {}


def list_queries(
    record: EntitiesRecord,
    parsed: tuple[Parse, Sequence[Span]] | None,
    pieces: NDArray[np.int64],
    *,
    kept: int,
    stands: Pieces,
    lost: Lost,
) -> list[Query]:
    """The phrases of a sentence and, if it is parsed, its words with a head or dependent that is a phrase.

    Args:
        parsed: the parse, and where its words stand in the sentence.
        pieces: (T, 2) where each piece of the sentence begins and ends in it.
        kept: pieces that the model reads.
        lost: counts what is left out.
    """
    queries = []
    for number, phrase in enumerate(record.phrases):
        at = _place_pieces((phrase.start, phrase.stop), pieces, kept, stands)
        if at:
            queries.append(Query(PHRASE, at, number))
        else:
            lost.cut_phrases += 1
    if parsed is None:
        return queries
    parse, spans = parsed
    phrase_of = _find_heads(record, parse, spans, lost)
    places = [_place_pieces(span, pieces, kept, stands) for span in spans]
    for number, word in enumerate(parse.words, start=1):
        asked: tuple[tuple[Direction, int, int], ...] = (
            ("dependent_to_head", number, word.head),
            ("head_to_dependent", word.head, number),
        )
        for direction, attending, grounded in asked:
            if not word.head or grounded not in phrase_of:
                continue
            if at := places[attending - 1]:
                queries.append(Query(Kind(word.relation, direction), at, phrase_of[grounded]))
            else:
                lost.cut_words += 1
    return queries


def _place_pieces(span: Span, pieces: NDArray[np.int64], kept: int, stands: Pieces) -> tuple[int, ...]:
    """Positions in the row, after [CLS], of the pieces that share a character with a span; empty if some are cut."""
    own = np.flatnonzero((pieces[:, 0] < span[1]) & (pieces[:, 1] > span[0]))
    if not len(own) or own[-1] >= kept:
        return ()
    return tuple((1 + own[-1:] if stands == "last" else 1 + own).tolist())


def _find_heads(record: EntitiesRecord, parse: Parse, spans: Sequence[Span], lost: Lost) -> dict[int, int]:
    """Number of a word, from 1 -> the phrase whose head it is."""
    found = {}
    for number, phrase in enumerate(record.phrases):
        own = {k for k, span in enumerate(spans, start=1) if span[0] < phrase.stop and span[1] > phrase.start}
        heads = [k for k in own if parse.words[k - 1].head not in own]
        if len(heads) == 1:
            found[heads[0]] = number
        else:
            lost.headless_phrases += 1
    return found


def choose_layers(maps: Maps, layers: Sequence[str], model: str) -> dict[str, Tensor]:
    """Attention from text to regions by layer.

    Args:
        layers: names of those that are wanted; empty = all.
        model: its name, for errors.
    Raises:
        ConfigError: no layer attends in this direction, or a named one does not.
    """
    found = maps.text_to_regions
    if not found:
        raise ConfigError(
            f"{model} has no layer whose words attend to regions, so no head can ground them. Choose a preset with "
            "layers over both, or with attention across the two streams."
        )
    if missing := [name for name in layers if name not in found]:
        raise ConfigError(
            f"{model} has no layer {missing[0]!r} with attention from text to regions. {nearest(missing[0], found)}"
        )
    return {name: found[name] for name in layers or found}


def attend(
    maps: Mapping[str, Tensor], real: Tensor, row: Tensor, at: Sequence[tuple[int, ...]]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The region that each query attends to most in each cell, and the share of its attention on all real regions.

    Args:
        maps: layer -> (B, H, T, R or more) attention; what stands behind the regions is set aside.
        real: (B, R) which regions there are; of a row without any, the best is region 0.
        row: (N,) of each query.
        at: positions of the pieces of each query, whose attention is averaged.
    Returns:
        (N, C) numbers of regions and (N, C) shares.
    """
    longest = max(map(len, at))
    places = torch.tensor([[*own, *own[-1:] * (longest - len(own))] for own in at], device=real.device)
    weights = torch.tensor([[1 / len(own)] * len(own) + [0.0] * (longest - len(own)) for own in at])
    weights = weights.to(real.device)
    mask, regions = real[row][:, None], real.shape[1]
    best, shares = [], []
    for probs in maps.values():
        picked = probs[row[:, None], :, places, :regions].float()  # (N, K, H, R)
        mean = (picked * weights[:, :, None, None]).sum(1)  # (N, H, R)
        shares.append((mean * mask).sum(-1))
        best.append(mean.masked_fill(~mask, -1.0).argmax(-1))
    return torch.cat(best, 1).cpu().numpy(), torch.cat(shares, 1).cpu().numpy()


def find_best(maps: Mapping[str, Tensor], real: Tensor) -> NDArray[np.int64]:
    """The region that each token attends to most in each cell, (B, T, C); arguments as of `attend`."""
    best = [
        probs[..., : real.shape[1]].masked_fill(~real[:, None, None], -1.0).argmax(-1).transpose(1, 2)
        for probs in maps.values()
    ]
    return torch.cat(best, 2).cpu().numpy()


@dataclass(eq=False)
class Answers:
    """Of queries of one kind: what was right."""

    images: list[str] = field(default_factory=list)
    """Of each query."""
    hits: list[NDArray[np.bool_]] = field(default_factory=list)
    """(C,) of each query: whether the region that a cell attends to most is right."""
    mass: list[NDArray[np.float32]] = field(default_factory=list)
    """(C,) of each query: share of its attention on regions."""
    control: list[NDArray[np.float32]] = field(default_factory=list)
    """(C,) of each query: share of the pieces of its sentence that attend most to a region that is right for it."""
    chance: list[float] = field(default_factory=list)
    """Share of the regions that is right, of each query."""
    guesses: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    """Baseline -> whether its region is right, for each query."""


class _Judged(NamedTuple):
    """What is right for a phrase."""

    right: NDArray[np.bool_]
    """(R,) of the regions that are shown."""
    control: NDArray[np.float32]
    """As `Answers.control`, one row."""
    guesses: dict[str, bool]
    """Baseline -> whether its region is right."""


class Collector:
    """Goes through the batches of a data set and remembers for every query which heads were right.

    Args:
        guesses: baseline -> image -> the box that it always takes; None where the image has no region.
    """

    def __init__(self, rule: MatchRule, guesses: Mapping[str, Mapping[str, NDArray[np.float32] | None]]) -> None:
        self.rule, self.guesses = rule, guesses
        self.answers: dict[Kind, Answers] = defaultdict(Answers)
        self.cells: list[tuple[str, int]] = []
        """Layer and head."""
        self.empty: set[str] = set()
        """Images without any region, of which every query is a miss."""

    def add(self, shown: ShownExamples, maps: Mapping[str, Tensor], queries: Sequence[Sequence[Query]]) -> None:
        """Add the queries of each example of a batch.

        Args:
            maps: layer -> (B, H, T, R or more) attention from text to regions.
        """
        self.cells = [(layer, head) for layer, probs in maps.items() for head in range(probs.shape[1])]
        batch = shown.batch.unshared()
        regions = batch.regions
        assert regions is not None, "alignment needs regions"
        listed = [(row, query) for row, own in enumerate(queries) for query in own]
        if not listed:
            return
        real = regions.mask
        rows = torch.tensor([row for row, _ in listed], device=real.device)
        cells = len(self.cells)
        best, mass = np.zeros((len(listed), cells), np.int64), np.zeros((len(listed), cells), np.float32)
        everywhere = np.zeros((*batch.text.ids.shape, cells), np.int64)
        if real.shape[1]:
            best, mass = attend(maps, real, rows, [query.at for _, query in listed])
            everywhere = find_best(maps, real)
        # Unit corners have the precision of float32: hundredths of a pixel keep an overlap of exactly one half.
        corners = box_ops.to_pixels(regions.boxes.cpu().double(), regions.size.cpu()).numpy().round(2)
        counts = real.sum(1).tolist()
        judged: dict[tuple[int, int], _Judged] = {}
        for number, (row, query) in enumerate(listed):
            record: EntitiesRecord = shown.records[row]
            image, key = record.images[0], (row, query.phrase)
            if key not in judged:
                pieces = slice(1, len(shown.examples[row].rows[0].ids) - 1)
                boxes = record.phrases[query.phrase].boxes or ()
                judged[key] = self._judge(image, boxes, corners[row, : counts[row]], everywhere[row, pieces])
            right, control, guesses = judged[key]
            own = self.answers[query.kind]
            own.images.append(image)
            own.hits.append(right[best[number]] if len(right) else np.zeros(cells, bool))
            own.mass.append(mass[number])
            own.control.append(control)
            own.chance.append(float(right.mean()) if len(right) else 0.0)
            for name, hit in guesses.items():
                own.guesses[name].append(hit)
            if not len(right):
                self.empty.add(image)

    def _judge(
        self, image: str, boxes: Sequence[Box], corners: NDArray[np.float64], best: NDArray[np.int64]
    ) -> _Judged:
        """What is right for a phrase with these boxes.

        Args:
            corners: (R, 4) of the regions that are shown.
            best: (T, C) the region that each piece of the sentence attends to most.
        """
        right = right_boxes(corners, boxes, self.rule)
        control = right[best].mean(0, dtype=np.float32) if len(right) else np.zeros(best.shape[1], np.float32)
        taken = {name: guess[image] for name, guess in self.guesses.items()}
        return _Judged(
            right,
            control,
            {
                name: box is not None and bool(right_boxes(box[None], boxes, self.rule)[0])
                for name, box in taken.items()
            },
        )


def guess_boxes(
    records: Sequence[EntitiesRecord], store: RegionStore
) -> dict[str, dict[str, NDArray[np.float32] | None]]:
    """Baseline -> image -> the box of the region that it takes for whatever is asked.

    "most confident": the detector's best region. "most frequent class": the most confident one of the class that most
    regions of these images have; the most confident of all where there is none. "same place": the region that overlaps
    most with the place that, in hindsight, is right for the most phrases. Those that the store cannot tell are left
    out.
    """
    images = list(dict.fromkeys(record.images[0] for record in records))
    arrays = {image: store[image] for image in images}
    classes: Counter[int] = Counter()
    for array in arrays.values():
        classes.update([] if array.classes is None else array.classes.tolist())
    common = max(classes.items(), key=lambda pair: (pair[1], -pair[0]))[0] if classes else None
    places, _ = frequent_places(records)
    found: dict[str, dict[str, NDArray[np.float32] | None]] = {}
    for image, array in arrays.items():
        chosen: dict[str, int] = {}
        if len(array) and array.class_confidence is not None:
            confidence = array.class_confidence.astype(np.float32)
            chosen["most confident"] = int(confidence.argmax())
            if common is not None and array.classes is not None:
                of_class = array.classes == common
                bounded = np.where(of_class, confidence, -1.0) if of_class.any() else confidence
                chosen["most frequent class"] = int(bounded.argmax())
        if len(array) and len(places):
            place = torch.from_numpy(places[:1] * np.array(array.size * 2, np.float64))
            overlaps = box_ops.iou(torch.from_numpy(array.boxes.astype(np.float64)), place)
            chosen["same place"] = int(overlaps[:, 0].argmax())
        for name, number in chosen.items():
            found.setdefault(name, dict.fromkeys(images))[image] = array.boxes[number]
    return found


def check_regions(images: Iterable[str], store: RegionStore | None, model: str) -> RegionStore:
    """The store, unless the model sees no region, or none of the images has one.

    Raises:
        ConfigError: a model of the words alone.
        DataError: no image has a region.
    """
    if store is None:
        raise ConfigError(
            f"{model} is a model of the words alone: no word of it attends to a region. Name a model that was trained "
            "with regions."
        )
    if not any(len(store[image]) for image in images):
        raise DataError(
            "none of the images has a region in the store, so there is nothing to attend to. The detector found "
            "nothing; extract the regions again with a better one."
        )
    return store


def align_heads(
    encoder: Encoder,
    batches: Iterable[ShownExamples],
    *,
    records: Sequence[EntitiesRecord],
    layout: TextLayout,
    store: RegionStore,
    parses: Mapping[str, tuple[Parse, Sequence[Span]]] | None,
    rule: MatchRule,
    layers: Sequence[str] = (),
    stands: Pieces = "last",
    model: str = "the model",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Collector, Lost]:
    """Encode the sentences of a split and collect what each head is right about.

    Args:
        batches: of the records, in any order.
        records: all of them, for the baselines.
        parses: id of a record -> its parse; None = phrases alone.
        layers: names of the layers that are wanted; empty = all.
        model: its name, for errors.
        progress: called with the sentences done, and all of them.
    Raises:
        ConfigError: see `choose_layers`.
        DataError: no phrase is within the text that the model reads.
    """
    collector, lost, done = Collector(rule, guess_boxes(records, store)), Lost(), 0
    for shown in batches:
        with torch.no_grad():
            maps = encoder(shown.batch, capture=True).maps
        chosen = choose_layers(maps, layers, model)
        queries = []
        for record, example in zip(shown.records, shown.examples, strict=True):
            kept = len(example.rows[0].ids) - 2  # without [CLS] and [SEP]
            parsed = None if parses is None else parses[record.id]
            pieces = layout.tokenizer.spans(record.sentence)
            queries.append(list_queries(record, parsed, pieces, kept=kept, stands=stands, lost=lost))
        collector.add(shown, chosen, queries)
        done += len(shown.records)
        progress(done, len(records))
    if PHRASE not in collector.answers:
        raise DataError(
            f"no phrase of the {len(records)} sentences is within the "
            f"{layout.spec.max_tokens} word pieces that {model} "
            "reads. Use a model that reads longer texts."
        )
    return collector, lost
