"""Explanations of every family: equal to rules written out once more, example by example; the same in a padded batch;
and where there is nothing to explain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.relevance_models import ANSWERS, COUNTS, LENGTHS, VARIANTS, build, cut, make_batch, records_of, vqa
from fixtures.relevance_recordings import EveryAnswer
from fixtures.relevance_reference import relevance, weigh
from torch import Tensor
from torch.testing import assert_close

from visling.analysis.relevance import METHODS, Explanation, Scores, explain
from visling.analysis.relevance_rules import Rules, accumulate_relevance, list_attention, list_steps, mix_positive
from visling.errors import ConfigError
from visling.nn.trace import Trace
from visling.tasks.base import Task
from visling.tasks.grounding import PhraseGrounding
from visling.tasks.nlvr2 import NLVR2, Nlvr2Config
from visling.tasks.referring import Referring
from visling.tasks.retrieval import Retrieval
from visling.types import Batch

SINGLE: Mapping[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


def same(found: Scores, expected: Scores, message: str) -> None:
    for part in ("text", "regions"):
        ours, theirs = torch.from_numpy(getattr(found, part)), torch.from_numpy(getattr(expected, part))
        assert_close(ours, theirs, **SINGLE, msg=lambda said, p=part: f"{message}, {p}: {said}")


def same_explanations(found: Explanation, expected: Explanation) -> None:
    assert found.prediction.value == expected.prediction.value
    for method in METHODS:
        assert len(found.scores[method]) == len(expected.scores[method])
        for place, (ours, theirs) in enumerate(zip(found.scores[method], expected.scores[method], strict=True)):
            for one, two in zip(ours, theirs, strict=True):
                same(one, two, f"{method} of {place}")


def read_out(
    variant: str, task: Task[Any, Any], batch: Batch, logits: Mapping[str, Tensor], place: int, prediction: Any
) -> tuple[list[int], list[int]]:
    """Positions of one unpadded row that an answer is read from, text and regions, as the heads are described."""
    assert batch.regions is not None
    whole = batch.regions.mask.shape[1]
    if task.name == "referring":
        name = prediction.top[place][0]
        return [], [whole if not name.isdigit() else int(name)]
    if task.name == "grounding":
        assert batch.phrases is not None
        at = int(batch.phrases.at[0, place])
        return [at], [int(logits["phrases"][0, place].argmax())]
    at = (
        0
        if batch.text.answer_at is None or VARIANTS[variant][0] in ("lxmert", "cvlp")
        else int(batch.text.answer_at[0])
    )
    return [at], [whole] if VARIANTS[variant][0] == "vilbert" else []


TASKS = {"vqa": vqa, "referring": Referring, "grounding": PhraseGrounding}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_relevance_is_that_of_the_rules_written_out(variant: str, kind: str) -> None:
    """In one padded batch, of every candidate, for and against."""
    task = TASKS[kind]()
    slot = kind == "vqa" and VARIANTS[variant][0] not in ("lxmert", "cvlp")
    model, batch = build(variant, task), make_batch(variant, slot=slot, phrases=kind == "grounding")
    records = records_of(task, len(LENGTHS))
    found = explain(model, task, batch, records, methods=["relevance"])
    compared = 0
    for row, explanation in enumerate(found):
        single = cut(batch, row)
        encoded = model.encoder(single, capture=True)
        assert encoded.attention is not None
        logits = model.read(encoded, single)
        (prediction,) = task.decode(
            {name: values.detach() for name, values in logits.items()}, single, records[row : row + 1]
        )
        tokens = LENGTHS[row] + len(model.encoder.behind_text)
        for place, (scores,) in enumerate(explanation.scores["relevance"]):
            output = task.logit(logits, single, 0, prediction, place)
            read = read_out(variant, task, single, logits, place, prediction)
            for sign, ours in ((1, scores), (-1, explanation.against[place][0])):
                weights, own = weigh(encoded.attention, sign * output), kind != "vqa" and sign > 0
                text, regions = relevance(model.encoder, weights, *read, tokens, own)
                expected = Scores(text=text.astype(np.float32), regions=regions.astype(np.float32))
                same(ours, expected, f"row {row}, candidate {place}, sign {sign}")
                compared += bool(text.any())
    assert compared > len(LENGTHS)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_order_of_a_batch_do_not_matter(variant: str, kind: str) -> None:
    task = TASKS[kind]()
    model, batch = build(variant, task), make_batch(variant, phrases=kind == "grounding")
    records = records_of(task, len(LENGTHS))
    together = explain(model, task, batch, records)
    order = [2, 0, 3, 1]
    mixed = explain(model, task, batch.map(lambda tensor: tensor[order]), [records[row] for row in order])
    for row, explanation in enumerate(together):
        (alone,) = explain(model, task, cut(batch, row), [records[row]])
        same_explanations(explanation, alone)
        same_explanations(mixed[order.index(row)], explanation)
        for method in METHODS:
            for (scores,) in explanation.scores[method]:
                assert len(scores.text) == LENGTHS[row] + len(model.encoder.behind_text)
                assert len(scores.regions) == COUNTS[row] + len(model.encoder.behind_regions)
                assert np.isfinite(scores.text).all()
                assert np.isfinite(scores.regions).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_that_leave_room_do_not_matter(variant: str) -> None:
    """Batches of few shapes bound the number of positions and compute some padding."""
    task = vqa()
    model, batch = build(variant, task), make_batch(variant)
    assert batch.regions is not None
    records = records_of(task, len(LENGTHS))
    roomy = dataclasses.replace(
        batch,
        text=dataclasses.replace(batch.text, count=sum(LENGTHS) + 2),
        regions=dataclasses.replace(batch.regions, count=sum(COUNTS) + 3),
    )
    for found, expected in zip(explain(model, task, roomy, records), explain(model, task, batch, records), strict=True):
        same_explanations(found, expected)


@pytest.mark.parametrize("variant", ["visualbert", "vilbert", "lxmert"])
def test_every_row_of_an_example_is_explained(variant: str) -> None:
    """Two images in two rows: the answer depends on both."""
    task = NLVR2(Nlvr2Config(joined=False))
    model, batch = build(variant, task), make_batch(variant, group=2)
    first, second = explain(model, task, batch, records_of(task, 2))
    for number, explanation in enumerate((first, second)):
        for method in METHODS:
            assert len(explanation.scores[method]) == 2, "true and false"
            for rows in explanation.scores[method]:
                assert [len(scores.text) for scores in rows] == list(LENGTHS[2 * number : 2 * number + 2])
                assert all(scores.text.any() for scores in rows) or method in ("relevance", "attention_gradient")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_times_input_is_the_slope_of_scaling_it(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences of the answer's output, position by position, in double precision."""
    task = vqa()
    model, batch = build(variant, task).double(), cut(make_batch(variant), 1)
    assert batch.regions is not None
    batch = dataclasses.replace(
        batch, regions=dataclasses.replace(batch.regions, features=batch.regions.features.double())
    )
    (explanation,) = explain(model, task, batch, records_of(task, 1), methods=["input_gradient"], most=1)
    answer = task.answers.index(explanation.prediction.top[0][0])
    (scores,) = explanation.scores["input_gradient"][0]
    keep, step = Trace.add_states, 1e-3
    for place, found in enumerate(np.concatenate([scores.text, scores.regions])):
        outputs = []
        for factor in (1 + step, 1 - step):
            scale = partial(scale_one, keep, place, len(scores.text), factor)
            monkeypatch.setattr(Trace, "add_states", lambda trace, *given, scale=scale: scale(trace, *given))
            encoded = model.encoder(batch, capture=True)
            outputs.append(model.read(encoded, batch)["classify"][0, answer].item())
        slope = (outputs[0] - outputs[1]) / (2 * step)
        assert slope == pytest.approx(found, rel=1e-3, abs=1e-4), f"position {place}"


def scale_one(
    keep: Callable[..., Tensor],
    place: int,
    tokens: int,
    factor: float,
    trace: Trace,
    name: str,
    states: Tensor,
    *rest: Any,
) -> Tensor:
    """`Trace.add_states` after the embedded state of one position, in a row without padding, is scaled."""
    at = place - tokens if name == "region_embeddings" else place
    if name.endswith("embeddings") and 0 <= at < len(states):
        states = torch.cat([states[:at], factor * states[at : at + 1], states[at + 1 :]])
    return keep(trace, name, states, *rest)


def no_regions(batch: Batch) -> Batch:
    assert batch.regions is not None
    return dataclasses.replace(
        batch, regions=dataclasses.replace(batch.regions, mask=torch.zeros_like(batch.regions.mask))
    )


def text_alone(batch: Batch) -> Batch:
    return dataclasses.replace(batch, regions=None)


@pytest.mark.parametrize("change", [no_regions, text_alone])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_regions_the_words_are_explained(variant: str, change: Callable[[Batch], Batch]) -> None:
    task = vqa()
    model, batch = build(variant, task), change(make_batch(variant))
    behind = len(model.encoder.behind_regions)
    if change is text_alone and VARIANTS[variant][0] == "vlbert":
        behind = 1  # [END] alone
    for row, explanation in enumerate(explain(model, task, batch, records_of(task, len(LENGTHS)))):
        for method in METHODS:
            assert len(explanation.scores[method]) == ANSWERS
            for (scores,) in explanation.scores[method]:
                assert scores.text.shape == (LENGTHS[row] + len(model.encoder.behind_text),)
                assert scores.regions.shape == (behind,)
                assert np.isfinite(np.concatenate([scores.text, scores.regions])).all()
        (scores,) = explanation.scores["raw_attention"][0]
        assert scores.text.sum() > 0


@pytest.mark.parametrize("kind", ["referring", "grounding"])
def test_nothing_is_explained_where_nothing_is_predicted(kind: str) -> None:
    task = TASKS[kind]()
    batch = text_alone(make_batch("visualbert", phrases=True))
    for explanation in explain(build("visualbert", task), task, batch, records_of(task, len(LENGTHS))):
        assert all(explanation.scores[method] == () for method in METHODS)
        assert explanation.against == ()
        assert repr(explanation).startswith("Explanation(nothing predicted; relevance")


def test_a_task_that_names_no_output_is_refused() -> None:
    class Silent(EveryAnswer):
        logit = Task.logit
        answers = None  # type: ignore[assignment]

    task = vqa()
    silent = Silent(task.config, task.answers)
    silent.decode = task.decode  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"does not define which output .* Define `logit`"):
        explain(build("visualbert", task), silent, make_batch("visualbert"), records_of(task, len(LENGTHS)))


def test_a_batch_that_is_encoded_already_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    task = vqa()
    model, batch = build("lxmert", task), make_batch("lxmert")
    records = records_of(task, len(LENGTHS))
    expected, encoded = explain(model, task, batch, records), model.encoder(batch, capture=True)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(model.encoder, "forward", never)
    for found, one in zip(explain(model, task, batch, records, encoded=encoded), expected, strict=True):
        same_explanations(found, one)
    with pytest.raises(AssertionError, match="encoded again"):
        explain(model, task, batch, records)


def test_frozen_weights_are_refused() -> None:
    task = vqa()
    model, batch = build("visualbert", task), make_batch("visualbert")
    with pytest.raises(ConfigError, match=r"all weights of the model are frozen.*requires_grad_\(True\)"):
        explain(model.requires_grad_(False), task, batch, records_of(task, len(LENGTHS)))


def test_unknown_methods_and_layers_are_refused() -> None:
    task = vqa()
    given = build("lxmert", task), task, make_batch("lxmert"), records_of(task, len(LENGTHS))
    with pytest.raises(ConfigError, match=r"no method 'relevanse' of explanation. Did you mean 'relevance'\?"):
        explain(*given, methods=["relevanse"])
    with pytest.raises(ConfigError, match=r"no layer 'cross_layers.2' in this model. Did you mean 'cross_layers"):
        explain(*given, rules=Rules(first_layer="cross_layers.2"))


@pytest.mark.parametrize(("variant", "layer"), [("lxmert", "cross_layers.0"), ("visualbert", "layers.1")])
def test_a_later_first_layer_leaves_earlier_ones_out(variant: str, layer: str) -> None:
    task = vqa()
    model, batch = build(variant, task), cut(make_batch(variant), 0)
    (found,) = explain(model, task, batch, records_of(task, 1), most=1, rules=Rules(first_layer=layer))
    encoded = model.encoder(batch, capture=True)
    logits = model.read(encoded, batch)
    assert encoded.attention is not None
    weights = weigh(encoded.attention, task.logit(logits, batch, 0, found.prediction, 0))
    names = list(weights)
    begun = next(number for number, name in enumerate(names) if name.startswith(layer))
    weights = {
        name: values if number >= begun else np.zeros_like(values)
        for number, (name, values) in enumerate(weights.items())
    }
    text, regions = relevance(model.encoder, weights, [0], [], LENGTHS[0])
    (scores,) = found.scores["relevance"][0]
    same(scores, Scores(text=text.astype(np.float32), regions=regions.astype(np.float32)), layer)
    (whole,) = explain(model, task, batch, records_of(task, 1), most=1)
    assert not np.allclose(whole.scores["relevance"][0][0].text, scores.text)


@pytest.mark.parametrize("variant", ["visualbert", "vilbert", "lxmert"])
def test_contrast_is_relevance_of_the_logarithm_of_probability(variant: str) -> None:
    task = vqa()
    model, batch = build(variant, task), cut(make_batch(variant), 0)
    (found,) = explain(model, task, batch, records_of(task, 1), methods=["contrast"])
    encoded = model.encoder(batch, capture=True)
    logits = model.read(encoded, batch)
    assert encoded.attention is not None
    shares = logits["classify"][0].log_softmax(0)
    for place, (scores,) in enumerate(found.scores["contrast"]):
        weights = weigh(encoded.attention, shares[task.answers.index(found.prediction.top[place][0])])
        read = read_out(variant, task, batch, logits, place, found.prediction)
        text, regions = relevance(model.encoder, weights, *read, LENGTHS[0])
        same(scores, Scores(text=text.astype(np.float32), regions=regions.astype(np.float32)), f"candidate {place}")


@pytest.mark.parametrize("variant", ["visualbert", "vlbert", "vilbert", "lxmert"])
def test_what_a_head_brings_is_its_attention_where_the_gradient_is_positive(variant: str) -> None:
    """In a padded batch, as in examples by themselves."""
    task = vqa()
    model, batch = build(variant, task), make_batch(variant)
    for number, found in enumerate(explain(model, task, batch, records_of(task, len(LENGTHS)), most=1)):
        single = cut(batch, number)
        encoded = model.encoder(single, capture=True)
        logits = model.read(encoded, single)
        assert encoded.attention is not None
        gradients = torch.autograd.grad(
            task.logit(logits, single, 0, found.prediction, 0), list(encoded.attention.values()), allow_unused=True
        )
        expected: dict[str, dict[str, torch.Tensor]] = {}
        split = single.text.ids.shape[1] + len(model.encoder.behind_text)
        parts = {"text": slice(0, split), "regions": slice(split, None)}
        for (key, probs), gradient in zip(encoded.attention.items(), gradients, strict=True):
            layer, _, kind = key.rpartition("/")
            weighed = torch.zeros_like(probs) if gradient is None else (probs * gradient).clamp(min=0)
            if kind == "joint":
                blocks = {f"{a}_to_{b}": weighed[:, :, parts[a], parts[b]] for a in parts for b in parts}
            else:
                blocks = {kind if "_to_" in kind else f"{kind}_to_{kind}": weighed}
            for direction, block in blocks.items():
                expected.setdefault(direction, {})[layer] = block.sum((2, 3))[0]
        (heads,) = found.heads
        assert {way: list(layers) for way, layers in heads.items()} == {way: list(own) for way, own in expected.items()}
        for way, layers in heads.items():
            for layer, values in layers.items():
                np.testing.assert_allclose(values, expected[way][layer].detach().numpy(), atol=1e-6, rtol=1e-4)
        assert sum(float(values.sum()) for layers in heads.values() for values in layers.values()) > 0


@pytest.mark.parametrize("kind", ["grounding", "retrieval"])
def test_phrases_and_single_scores_have_nothing_to_be_contrasted_with(kind: str) -> None:
    task = PhraseGrounding() if kind == "grounding" else Retrieval()
    model, batch = build("visualbert", task), make_batch("visualbert", phrases=kind == "grounding")
    records = records_of(task, len(LENGTHS))
    for found in explain(model, task, batch, records):
        assert len(found.scores["relevance"]) == len(found.scores["contrast"]) > 0
        for own, contrasted in zip(found.scores["relevance"], found.scores["contrast"], strict=True):
            for one, other in zip(own, contrasted, strict=True):
                same(other, one, kind)


def test_rows_without_relevance_stay_zero() -> None:
    """Where no gradient is positive, the rules divide nothing by nothing."""
    probs = {name: torch.rand(1, 2, *shape) for name, shape in TWO_STREAMS.items()}
    attention = list_attention(probs, 3)
    real = torch.ones(1, 5, dtype=torch.bool)
    speaks_against = [-torch.ones_like(one.probs) for one in attention]
    steps = list_steps(attention, speaks_against, real, mix_positive)
    assert not accumulate_relevance(steps, real, Rules())[0].any()
    speaks_against[0] = torch.ones_like(attention[0].probs)
    speaks_against[0][:, :, 1] = -1  # one row of the first attention is zero
    found, _ = accumulate_relevance(list_steps(attention, speaks_against, real, mix_positive), real, Rules())
    assert found.isfinite().all()
    assert found[0, 0, :3].all()
    assert not found[0, 1].any()


TWO_STREAMS = {
    "text_layers.0/text": (3, 3),
    "region_layers.0/regions": (2, 2),
    "cross_layers.0.cross/text_to_regions": (3, 2),
    "cross_layers.0.cross/regions_to_text": (2, 3),
    "cross_layers.0.self/text": (3, 3),
    "cross_layers.0.self/regions": (2, 2),
}
"""Name of an attention -> its queries and keys."""
