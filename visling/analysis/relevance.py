"""What a model's answer rests on: a score for each word and each region, by six methods and for any candidate.

explanation = model.explain("picture.png", "what colour is the star?")
explanation.scores["relevance"][0][0].regions  # of the best answer, in the first row

method              a position's score
relevance           what the positions that the answer is read from took from it, through all layers; attention counts
                    where its gradient speaks for the answer (Chefer et al. 2021)
contrast            relevance of the answer's logarithm of probability among the candidates that are listed, instead of
                    its own output (ours): a softmax does not change where all outputs rise together, and so its
                    training leaves open by how much
attention_gradient  attention of the last layer, each head weighted by its mean gradient
input_gradient      gradient times embedded input, with its sign
rollout             attention of all layers multiplied, whatever the answer (Abnar & Zuidema 2020)
raw_attention       attention of the last layer, averaged over the heads, whatever the answer

The rules are in `analysis.relevance_rules`. But for contrast, the gradient is that of the answer's own output
(`Task.logit`), before any softmax. Where an answer is read is seen from its gradient: the first token or the answer
token, with ViLBERT the whole image too, the candidate's region, the phrase and its region. Scores of several such
positions are added. A region or a phrase that is pointed at also rests on itself: what residual connections keep of it
counts with relevance, contrast and rollout.
Methods that need layer-wise relevance propagation are not offered.

Letters  B rows, N positions: T of the text, then R regions, each with what stands behind them; Dt and Dr widths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from visling.analysis.relevance_rules import (
    Found,
    Mix,
    Rules,
    Step,
    accumulate_relevance,
    keep_last,
    list_attention,
    list_steps,
    mix_by_head,
    mix_evenly,
    mix_negative,
    mix_positive,
    roll_out,
)
from visling.errors import ConfigError, nearest
from visling.models.base import Encoder
from visling.models.task_model import TaskModel
from visling.tasks.base import Task
from visling.types import Batch, Encoded, Prediction, Record

METHODS = ("relevance", "contrast", "attention_gradient", "input_gradient", "rollout", "raw_attention")
"""Names of the methods."""
PUBLISHED = Rules()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What each position of one row counts for."""

    text: NDArray[np.float32]
    """(T',) by token, and by what stands behind the tokens, as in `EncodedRow.words`."""
    regions: NDArray[np.float32]
    """(R',) by region, and by what stands behind the regions, as in `EncodedRow.regions`."""


ByPlace = tuple[tuple[Scores, ...], ...]
"""Scores for each candidate that was asked for, as `Prediction.top` has them, and each row of the example."""
ByHead = Mapping[str, Mapping[str, NDArray[np.float32]]]
"""Direction -> layer -> (H,): attention of a head times its gradient where that speaks for the candidate, summed over
all real queries and keys, special ones included."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """A prediction, and what each of its candidates rests on."""

    prediction: Prediction
    scores: Mapping[str, ByPlace]
    """By method. There is no candidate where nothing was predicted, such as a box in an image without regions."""
    against: ByPlace
    """What speaks against a candidate: relevance of its negated output. Empty unless relevance was asked for."""
    heads: tuple[ByHead, ...] = ()
    """Of the best candidate, for each row. Empty unless relevance was asked for, or where nothing was predicted."""

    def __repr__(self) -> str:
        """One line."""
        count = len(next(iter(self.scores.values()), ()))
        names = [name for name, _ in self.prediction.top[:count]] or [str(self.prediction.value)] * count
        return f"Explanation({', '.join(names) or 'nothing predicted'}; {', '.join(self.scores)})"


def explain(
    model: TaskModel,
    task: Task[Any, Any],
    batch: Batch,
    records: Sequence[Record],
    *,
    methods: Sequence[str] = METHODS,
    most: int = 10,
    rules: Rules = PUBLISHED,
    encoded: Encoded | None = None,
) -> list[Explanation]:
    """Predictions for the records of a batch and what they rest on; examples do not influence one another.

    Args:
        model: in evaluation mode.
        batch: on the model's device, with features of the regions.
        most: candidates of each prediction.
        encoded: what the encoder captured of this very batch, with its graph and no rows shared; None = it is encoded.
    Raises:
        ConfigError: no such method or layer, the task does not define which output speaks for a candidate, or all
            weights are frozen.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"no method {unknown[0]!r} of explanation. {nearest(unknown[0], METHODS)}")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(
            "all weights of the model are frozen, so that no gradient leads back to words and regions. Call "
            "model.requires_grad_(True) first; explaining changes no weight."
        )
    batch = batch.unshared()
    with torch.enable_grad():
        encoded = model.encoder(batch, capture=True) if encoded is None else encoded
        logits = model.read(encoded, batch)
        predictions = task.decode({name: values.detach() for name, values in logits.items()}, batch, records)
        counts = [_count_candidates(prediction, most) for prediction in predictions]
        graph = _Graph(model.encoder, encoded, batch)
        found: dict[str, list[list[Scores]]] = {name: [] for name in methods}
        if "relevance" in methods:
            found[_AGAINST] = []
        heads: list[ByHead] = []
        outputs = {name: _contrast if name == "contrast" else _take_logit for name in found}
        for place in range(max(counts, default=0)):
            chosen = [number for number, count in enumerate(counts) if place < count]
            # Examples do not depend on one another: one backward pass, or two with contrast, serves them all.
            slopes = {
                output: graph.differentiate(
                    torch.stack([output(task, logits, batch, n, predictions[n], place) for n in chosen]).sum()
                )
                for output in set(outputs.values())
            }
            if "relevance" in methods and not place:
                heads = graph.weigh_heads(slopes[_take_logit])
            for name, by_place in found.items():
                by_place.append(graph.cut_rows(graph.score(name, slopes[outputs[name]], rules)))
    each: list[Explanation] = []
    for number, (prediction, count) in enumerate(zip(predictions, counts, strict=True)):
        own = slice(number * batch.group, (number + 1) * batch.group)
        scores = {name: tuple(tuple(rows[own]) for rows in by_place[:count]) for name, by_place in found.items()}
        against, weighed = scores.pop(_AGAINST, ()), tuple(heads[own]) if count else ()
        each.append(Explanation(prediction=prediction, against=against, heads=weighed, scores=scores))
    return each


_AGAINST = "against"
_RULES: Mapping[str, tuple[Callable[[Sequence[Step], Tensor, Rules], Found], Mix]] = {
    "relevance": (accumulate_relevance, mix_positive),
    "contrast": (accumulate_relevance, mix_positive),
    _AGAINST: (accumulate_relevance, mix_negative),
    "attention_gradient": (keep_last, mix_by_head),
    "rollout": (roll_out, mix_evenly),
    "raw_attention": (keep_last, mix_evenly),
}


def _take_logit(
    task: Task[Any, Any], logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
) -> Tensor:
    return task.logit(logits, batch, number, prediction, place)


def _contrast(
    task: Task[Any, Any], logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
) -> Tensor:
    """`Task.logit` as a logarithm of probability, where the candidates exclude one another; phrases do not."""
    phrases = bool(prediction.boxes) and prediction.value != prediction.boxes[0]
    places = [place] if phrases or not prediction.top else range(len(prediction.top))
    outputs = torch.stack([task.logit(logits, batch, number, prediction, each) for each in places])
    return outputs[0] if len(places) == 1 else outputs.log_softmax(0)[place]


def _count_candidates(prediction: Prediction, most: int) -> int:
    """Candidates with an output behind them: a prediction without a list has one, unless nothing was predicted."""
    return min(most, len(prediction.top) or int(prediction.confidence > 0))


@dataclass(frozen=True, slots=True)
class _Slopes:
    """Derivatives of an output."""

    attention: Sequence[Tensor | None]
    """With respect to each attention's probabilities (B, H, M, K); None = the output does not depend on them."""
    embedded: Tensor
    """Times the embedded input, summed over its width; (B, N)."""
    read: Tensor
    """(B, N) bool: the positions whose last states make a difference to it."""
    summaries: Tensor
    """(B, N) bool: those of them that are read for the summary of a row: the first token, the answer token, the whole
    image."""


class _Graph:
    """An encoded batch and where its positions lie."""

    def __init__(self, encoder: Encoder, encoded: Encoded, batch: Batch) -> None:
        assert encoded.attention is not None
        assert encoded.states is not None
        self.encoder, self.encoded, self.batch = encoder, encoded, batch
        text = batch.text.mask
        regions = text[:, :0] if batch.regions is None else batch.regions.mask
        self.num_text = text.shape[1] + len(encoder.behind_text)
        self.attention = list_attention(encoded.attention, self.num_text)
        length = max(one.keys.stop for one in self.attention)
        self.whole_at = self.num_text + regions.shape[1]
        self.real = torch.cat(  # what stands behind is always there
            [
                F.pad(text, (0, len(encoder.behind_text)), value=True),
                F.pad(regions, (0, length - self.whole_at), value=True),
            ],
            dim=1,
        )
        names = ("embeddings", "text_embeddings", "region_embeddings")
        self.embedded = [encoded.states[name] for name in names if name in encoded.states]

    def differentiate(self, output: Tensor) -> _Slopes:
        """Derivatives of a scalar."""
        probs = [one.probs for one in self.attention]
        last = (self.encoded.pooled, self.encoded.text, self.encoded.regions, self.encoded.whole)
        slopes = _differentiate(output, [*probs, *self.embedded, *last])
        attention, embedded = slopes[: len(probs)], slopes[len(probs) : -len(last)]
        products = [
            torch.zeros_like(states[..., 0]) if slope is None else (slope * states.detach()).sum(-1)
            for slope, states in zip(embedded, self.embedded, strict=True)
        ]
        pooled, *states = slopes[-len(last) :]
        summaries = self._mark_summaries(pooled)
        return _Slopes(attention, torch.cat(products, dim=1), summaries | self._mark_states(*states), summaries)

    def _mark_summaries(self, pooled: Tensor | None) -> Tensor:
        """Positions that the summary of a row reads, (B, N), if its derivative (B, Dp) is not zero."""
        read = torch.zeros_like(self.real)
        if pooled is not None:
            rows = (pooled != 0).any(-1)
            first, at = torch.zeros_like(rows, dtype=torch.int64), self.batch.text.answer_at
            read.scatter_(1, (first if at is None else at)[:, None], rows[:, None])
            if self.encoder.summarises_image:
                read[:, self.whole_at] |= rows
        return read

    def _mark_states(self, text: Tensor | None, regions: Tensor | None, whole: Tensor | None) -> Tensor:
        """Positions with a derivative of their own that is not zero, (B, N)."""
        read = torch.zeros_like(self.real)
        if text is not None:
            read[:, : text.shape[1]] |= (text != 0).any(-1)
        if regions is not None:
            read[:, self.num_text : self.whole_at] |= (regions != 0).any(-1)
        if whole is not None:
            read[:, self.whole_at] |= (whole != 0).any(-1)
        return read

    def score(self, method: str, slopes: _Slopes, rules: Rules) -> Tensor:
        """(B, N) by a method, or by relevance of the negated output."""
        if method == "input_gradient":
            return slopes.embedded
        apply, mix = _RULES[method]
        steps = list_steps(self.attention, slopes.attention, self.real, mix, first_layer=rules.first_layer)
        taken, kept = apply(steps, self.real, rules)
        scores = (taken * slopes.read[:, :, None]).sum(1)
        return scores if method == _AGAINST else scores + kept * (slopes.read & ~slopes.summaries)

    def weigh_heads(self, slopes: _Slopes) -> list[ByHead]:
        """How much each head brings to the output, for each row."""
        streams = {"text": range(self.num_text), "regions": range(self.num_text, self.real.shape[1])}
        found: list[dict[str, dict[str, NDArray[np.float32]]]] = [{} for _ in self.real]
        for one, slope in zip(self.attention, slopes.attention, strict=True):
            pairs = self.real[:, one.queries, None] & self.real[:, None, one.keys]
            product = torch.zeros_like(one.probs) if slope is None else slope * one.probs.detach()
            weighed = product.clamp(min=0).masked_fill(~pairs[:, None], 0).float().cpu()  # (B, H, M, K)
            for (source, from_), (target, to) in itertools.product(streams.items(), repeat=2):
                queries, keys = _overlap(one.queries, from_), _overlap(one.keys, to)
                if not queries or not keys:
                    continue
                part = weighed[:, :, queries.start : queries.stop, keys.start : keys.stop].sum((2, 3)).numpy()
                for row, values in zip(found, part, strict=True):
                    row.setdefault(f"{source}_to_{target}", {})[one.layer] = values
        return [*found]

    def cut_rows(self, scores: Tensor) -> list[Scores]:
        """(B, N) as the scores of each row, without padding."""
        values, real = scores.detach().float().cpu().numpy(), self.real.cpu().numpy()
        text, regions = np.s_[: self.num_text], np.s_[self.num_text :]
        return [
            Scores(text=row[text][mask[text]], regions=row[regions][mask[regions]])
            for row, mask in zip(values, real, strict=True)
        ]


def _overlap(block: slice, stream: range) -> range:
    """The part of a block of positions that lies in a stream, counted from the block's first."""
    return range(max(block.start, stream.start) - block.start, min(block.stop, stream.stop) - block.start)


def _differentiate(output: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Derivatives of a scalar with respect to tensors; None for those that it does not depend on."""
    inputs = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors]
