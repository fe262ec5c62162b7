"""Scores of answers: VQA accuracy, NLVR v1 and NLVR2 consistency, equal to the official scripts; LXMERT's scores by
data set; bootstrap intervals.

Sources  VQA: GT-Vision-Lab/VQA, PythonEvaluationTools, in its two official versions. NLVR v1: lil-lab/nlvr,
         `metrics_images.py` and `metrics_structured_rep.py`; NLVR2: the same, `metrics.py`. By data set: LXMERT's
         release, `LXMERTEvaluator`.
Units    Scores of single questions are fractions. `Average.percent` is what the official scripts print.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from visling.errors import DataError

Version = Literal["2017", "2021", "mmf"]
"""Official VQA script: until March 2021, and since. They differ in what is normalised (see `vqa_score`)."""

MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation that is deleted or becomes a space. Apostrophe, period, colon, $, %, &, # and * stay."""

NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}

ARTICLES = frozenset({"a", "an", "the"})

_CONTRACTION_PAIRS = """
aint ain't, arent aren't, cant can't, couldve could've, couldnt couldn't, couldn'tve couldn't've,
couldnt've couldn't've, didnt didn't, doesnt doesn't, dont don't, hadnt hadn't, hadnt've hadn't've,
hadn'tve hadn't've, hasnt hasn't, havent haven't, hed he'd, hed've he'd've, he'dve he'd've, hes he's, howd how'd,
howll how'll, hows how's, Id've I'd've, I'dve I'd've, Im I'm, Ive I've, isnt isn't, itd it'd, itd've it'd've,
it'dve it'd've, itll it'll, let's let's, maam ma'am, mightnt mightn't, mightnt've mightn't've, mightn'tve mightn't've,
mightve might've, mustnt mustn't, mustve must've, neednt needn't, notve not've, oclock o'clock, oughtnt oughtn't,
ow's'at 'ow's'at, 'ows'at 'ow's'at, 'ow'sat 'ow's'at, shant shan't, shed've she'd've, she'dve she'd've, she's she's,
shouldve should've, shouldnt shouldn't, shouldnt've shouldn't've, shouldn'tve shouldn't've, somebody'd somebodyd,
somebodyd've somebody'd've, somebody'dve somebody'd've, somebodyll somebody'll, somebodys somebody's,
someoned someone'd, someoned've someone'd've, someone'dve someone'd've, someonell someone'll, someones someone's,
somethingd something'd, somethingd've something'd've, something'dve something'd've, somethingll something'll,
thats that's, thered there'd, thered've there'd've, there'dve there'd've, therere there're, theres there's,
theyd they'd, theyd've they'd've, they'dve they'd've, theyll they'll, theyre they're, theyve they've, twas 'twas,
wasnt wasn't, wed've we'd've, we'dve we'd've, weve we've, werent weren't, whatll what'll, whatre what're,
whats what's, whatve what've, whens when's, whered where'd, wheres where's, whereve where've, whod who'd,
whod've who'd've, who'dve who'd've, wholl who'll, whos who's, whove who've, whyll why'll, whyre why're, whys why's,
wont won't, wouldve would've, wouldnt wouldn't, wouldnt've wouldn't've, wouldn'tve wouldn't've, yall y'all,
yall'll y'all'll, y'allll y'all'll, yall'd've y'all'd've, y'alld've y'all'd've, y'all'dve y'all'd've, youd you'd,
youd've you'd've, you'dve you'd've, youll you'll, youre you're, youve you've
"""

CONTRACTIONS: Mapping[str, str] = dict(pair.split() for pair in _CONTRACTION_PAIRS.split(","))
"""Word without apostrophe -> word. Official entries, quirks kept: those with a capital never match, somebody'd loses
its apostrophe."""

FEWEST_ANSWERS = 4
"""Answers that a question needs for the official VQA rule: with fewer, no answer can reach 1, and a single one scores
0, because each person is left out in turn."""

_DIGIT_COMMA = re.compile(r"[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
_MOST_PERIODS = 32
_STRIPPED = frozenset((*MARKS, "."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """A mean kept as sum and count, so that parts can be combined and checked."""

    total: float
    count: int

    @property
    def value(self) -> float:
        """The mean as a fraction.

        Raises:
            DataError: over nothing.
        """
        if not self.count:
            raise DataError("the mean of no examples was asked for. Is the annotation file empty?")
        return self.total / self.count

    @property
    def percent(self) -> float:
        """100 x mean, rounded to 2 decimals as the official scripts print it."""
        return round(100 * self.value, 2)


class Question(Protocol):
    """What the VQA metric reads of a question."""

    @property
    def id(self) -> str: ...
    @property
    def answers(self) -> Sequence[str] | None: ...
    @property
    def question_type(self) -> str: ...
    @property
    def answer_type(self) -> str: ...


class ScoredQuestion(Protocol):
    """What the metric by data set reads of a question."""

    @property
    def source(self) -> str: ...
    @property
    def scores(self) -> Mapping[str, float] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceScores:
    """Scores of answers to questions of several data sets."""

    overall: Average
    """Every question counts the same."""
    sources: Mapping[str, Average]
    """By data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VqaScores:
    """VQA accuracy of a set of questions."""

    overall: Average
    question_types: Mapping[str, Average]
    answer_types: Mapping[str, Average]
    each: Mapping[str, float]
    """Question id -> accuracy in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NlvrScores:
    """The two official numbers of NLVR v1."""

    precision: Average
    """Correct predictions among all."""
    consistency: Average
    """Presentations (first field of the identifier) of which every prediction is correct."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nlvr2Scores:
    """The two official numbers of NLVR2."""

    accuracy: Average
    """Correct predictions among all."""
    consistency: Average
    """Groups (the pairs of one sentence of one set) of which every prediction is correct."""


def strip_marks(text: str) -> str:
    """First step of the official normalisation: punctuation deleted, or replaced by a space when it stood between two
    words.

    Quirks, kept: one comma between digits anywhere makes *all* marks be deleted; every period that no digit follows
    goes, whatever precedes it (a typo in the look-behind), but at most 32 of them (a flag passed as the count).
    """
    if _STRIPPED.isdisjoint(text):  # most answers
        return text
    deletes = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in MARKS:
        if deletes or f"{mark} " in text or f" {mark}" in text:
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def strip_articles(text: str) -> str:
    """Second step: lower case, number words to digits, no articles, apostrophes restored, single spaces. May be the
    empty string."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strip_space(text: str) -> str:
    """Line ends and tabs become spaces; none at either end."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 17)  # people give the same answers again and again
def normalise(answer: str) -> str:
    """An answer as the official VQA script compares it: space, punctuation, then articles and numbers."""
    return strip_articles(strip_marks(strip_space(answer)))


def normalise_as_mmf(answer: str) -> str:
    """An answer as MMF's accuracy of VQA compares it: lower case, commas and question marks gone, "'s" apart, then
    `normalise`.

    Source:
        MMF, `EvalAIAnswerProcessor`.
    """
    return normalise(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_score(prediction: str, answers: Sequence[str] | None, version: Version = "2021") -> float:
    """Accuracy of one answer: for each annotator, min(1, agreeing others / 3), averaged over the annotators.

    With fewer than `FEWEST_ANSWERS` annotators, for which the rule was not made, the share of them who agree; both
    sides are then normalised.

    Args:
        answers: of the (usually ten) annotators.
        version: "2021" normalises both sides, or neither when the annotators agree. "2017" always normalises the
            prediction, leaves unanimous answers as they are, and strips only the punctuation of others; published
            numbers of 2019 come from it. "mmf", no official script: MMF's own, see `normalise_as_mmf`, on both sides.
    Raises:
        DataError: no answers.
    """
    if not answers:
        raise DataError("a question without answers cannot be scored. Use a split whose annotation file is published.")
    if len(answers) < FEWEST_ANSWERS:
        return sum(normalise(answer) == normalise(prediction) for answer in answers) / len(answers)
    if version == "mmf":
        given = normalise_as_mmf(prediction)
        return _leave_one_out([normalise_as_mmf(answer) == given for answer in answers])
    prediction = strip_space(prediction)
    truths = [strip_space(answer) for answer in answers] if version == "2021" else list(answers)
    unanimous = len(set(truths)) == 1
    if version == "2017" or not unanimous:
        prediction = normalise(prediction)
    if not unanimous:
        truths = list(map(normalise if version == "2021" else strip_marks, truths))
    return _leave_one_out([truth == prediction for truth in truths])


def _leave_one_out(hits: Sequence[bool]) -> float:
    """For each annotator, min(1, agreeing others / 3), averaged."""
    agreeing = sum(hits)
    return sum(min(1.0, (agreeing - hit) / 3) for hit in hits) / len(hits)


def vqa_accuracy(predictions: Mapping[str, str], questions: Iterable[Question], version: Version = "2021") -> VqaScores:
    """VQA accuracy overall, per question type and per answer type.

    Args:
        predictions: question id -> answer, exactly the ids of `questions`.
    Raises:
        DataError: ids missing or in excess (the official loader refuses them too), or a question without answers.
    """
    truths = {question.id: question for question in questions}
    same_ids(predictions, truths)
    each: dict[str, float] = {}
    by_question: dict[str, list[float]] = defaultdict(list)
    by_answer: dict[str, list[float]] = defaultdict(list)
    for name, question in truths.items():
        score = vqa_score(predictions[name], question.answers, version)
        each[name] = score
        by_question[question.question_type].append(score)
        by_answer[question.answer_type].append(score)
    return VqaScores(
        overall=_average(each.values()),
        question_types={kind: _average(scores) for kind, scores in sorted(by_question.items())},
        answer_types={kind: _average(scores) for kind, scores in sorted(by_answer.items())},
        each=each,
    )


def source_scores(answered: Iterable[tuple[str, ScoredQuestion]]) -> SourceScores:
    """Mean score of answers, overall and by data set: the score of the answer in its question's list, 0 if the list
    lacks it.

    Questions that list no answer (an empty mapping) count as 0; examples that are no questions (None) do not count.

    Args:
        answered: answer and question; both spell answers alike.
    Source:
        LXMERT release, the score of its pre-training on questions.
    """
    by_source: dict[str, list[float]] = defaultdict(list)
    for answer, question in answered:
        if question.scores is not None:
            by_source[question.source].append(question.scores.get(answer, 0.0))
    return SourceScores(
        overall=_average(score for scores in by_source.values() for score in scores),
        sources={source: _average(scores) for source, scores in sorted(by_source.items())},
    )


def same_ids(predictions: Mapping[str, object], truths: Mapping[str, object]) -> None:
    """Raise `DataError` unless there is exactly one prediction for each id."""
    missing, extra = truths.keys() - predictions.keys(), predictions.keys() - truths.keys()
    if missing or extra:
        first = ", ".join(
            f"{word} {min(ids, key=str)!r}" for word, ids in (("lacks", missing), ("has unknown", extra)) if ids
        )
        raise DataError(
            f"{len(predictions)} predictions for {len(truths)} examples: {len(missing)} missing, "
            f"{len(extra)} in excess ({first}). "
            "Predict the whole split, and score it with the annotations of the same split."
        )


def nlvr_images(predictions: Iterable[tuple[str, str]], labels: Mapping[str, str], pictures: int = 6) -> NlvrScores:
    """Official scores of predictions per picture.

    Args:
        predictions: (file name "split-n-m-k.png", "true" or "false" in any case); the split and the extension are not
            read, and of two predictions for one picture the later counts.
        labels: identifier "n-m" -> "true" or "false".
        pictures: PNGs of one example: the orders of its three boxes.
    Raises:
        DataError: not exactly one prediction per picture of every example.
    """
    by_picture = {name.partition(".")[0].partition("-")[2]: value for name, value in predictions}
    return _nlvr(
        by_picture, {f"{name}-{picture}": label for name, label in labels.items() for picture in range(pictures)}
    )


def nlvr_structured(predictions: Iterable[tuple[str, str]], labels: Mapping[str, str]) -> NlvrScores:
    """Official scores of one prediction per example (identifier "n-m").

    Raises:
        DataError: not exactly one prediction per example.
    """
    return _nlvr(dict(predictions), labels)


def nlvr2_scores(predictions: Mapping[str, str], labels: Mapping[str, str], groups: Mapping[str, str]) -> Nlvr2Scores:
    """Official scores of predictions for NLVR2.

    Args:
        predictions: identifier -> value, compared without regard to case; words other than true and false are wrong,
            identifiers without a label are not read.
        labels: identifier -> "True" or "False".
        groups: identifier -> group whose predictions must all be correct.
    Raises:
        DataError: an identifier without a prediction.
    """
    if missing := sorted(labels.keys() - predictions.keys()):
        raise DataError(
            f"{len(missing)} of {len(labels)} examples have no prediction, first {missing[0]!r}. "
            "Predict the whole split."
        )
    right: dict[str, list[float]] = defaultdict(list)
    for name, label in labels.items():
        right[groups[name]].append(float(predictions[name].lower() == label.lower()))
    return Nlvr2Scores(
        accuracy=_average(hit for hits in right.values() for hit in hits),
        consistency=_average(float(all(hits)) for hits in right.values()),
    )


def bootstrap(
    values: Sequence[float], groups: Sequence[str], draws: int = 1000, seed: int = 0, *, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a mean when whole groups, not single values, are independent.

    Args:
        values: one number per example.
        groups: group of each value; groups are drawn with replacement, values never apart from their group.
        draws: resampled data sets.
        level: share of the draws between the two ends.
    Returns:
        Low and high end, in the unit of the values.
    Raises:
        DataError: no values, or not one group per value.
    """
    low, high = bootstrap_columns(np.asarray(values, np.float64)[:, None], groups, draws, seed, level=level)
    return float(low[0]), float(high[0])


def bootstrap_columns(
    values: NDArray[np.floating], groups: Sequence[str], draws: int = 1000, seed: int = 0, *, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`bootstrap` of many means over the same examples, (N, C), with the same resampled data sets: low and high ends,
    each (C,)."""
    if not len(values) or len(values) != len(groups):
        raise DataError(
            f"an interval needs one group per value and at least one value; found {len(values)} values and "
            f"{len(groups)} groups."
        )
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    totals = np.zeros((len(names), values.shape[1]))
    np.add.at(totals, member, values)
    counts = np.bincount(member)
    rng = np.random.default_rng(seed)
    means = np.empty((draws, values.shape[1]))
    for draw in range(draws):
        times = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        means[draw] = (times @ totals) / (times @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _nlvr(predictions: Mapping[str, str], labels: Mapping[str, str]) -> NlvrScores:
    same_ids(predictions, labels)
    presentations: dict[str, bool] = {}
    correct = 0
    for name, label in labels.items():
        hit = predictions[name].lower() == label.lower()
        correct += hit
        presentation = name.partition("-")[0]
        presentations[presentation] = presentations.get(presentation, True) and hit
    return NlvrScores(
        precision=Average(total=correct, count=len(labels)),
        consistency=Average(total=sum(presentations.values()), count=len(presentations)),
    )


def _average(scores: Iterable[float]) -> Average:
    values = list(scores)
    return Average(total=float(sum(values)), count=len(values))
