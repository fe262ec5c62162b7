"""Relevance of LXMERT and VisualBERT against values recorded from the official code of Chefer et al. 2021
(`golden/relevance`, whose READMEs state the rules).

Sizes, numbers of layers, names, answers and tolerances come from the recordings. The recorded examples went through the
models one by one; ours go through them in one padded batch.

Not as in the release, on purpose:
- The entry of the position that is read, which the release sets to 0, is what the layers add to it (not compared).
- A row without relevance is normalised to zeros, not to NaN, and constant scores stay constant.
- Numbers of what is kept are exact: at .8 and .9 the release keeps one too few where the product is a whole number.
- VisualBERT's padded regions are neither ranked nor turned into real ones, and have no part in the mean gradient of
  `attn_gradcam`, which is compared without padding only.
Methods that need layer-wise relevance propagation are out of scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.relevance_recordings import METHODS, Method, Recording, Row, read_lxmert, read_visualbert
from numpy.typing import NDArray
from parity_support import labelled
from torch import Tensor
from torch.testing import assert_close

from visling.analysis.relevance_rules import Step, list_attention, list_steps
from visling.analysis.removal import Asker, Part, count_kept
from visling.types import Batch

NARROW = 1e-5
"""Of the largest entry: to subtract the identity costs the release up to two digits of float32."""
Change = Callable[[list[Step]], list[Step]]


@pytest.fixture(params=["lxmert tiny", "lxmert deep", "visualbert"])
def recording(request: pytest.FixtureRequest, golden: Path) -> Recording:
    _, _, case = request.param.partition(" ")
    return read_lxmert(golden, case) if case else read_visualbert(golden)


def answers_of(recording: Recording) -> Iterator[tuple[int, Row, int, int]]:
    """Number of the row, the row, number and name of each recorded answer."""
    for number, row in enumerate(recording.rows):
        for place, answer in enumerate(row.answers):
            yield number, row, place, answer


def matrix_of(
    recording: Recording, row: Row, place: int, method: Method, change: Change = lambda steps: steps
) -> Tensor:
    """(N, N) by our rules from the recorded maps and gradients, in double precision; there is no padding to the
    release."""
    blocks = recording.blocks
    maps = {key: recording.maps[f"{row.name}/attn/{block}"].double()[None] for key, block in blocks.items()}
    slopes = [recording.maps.get(f"{row.name}/ans{place}/grad/{block}") for block in blocks.values()]
    attention = list_attention(maps, row.tokens)
    real = torch.ones(1, max(one.keys.stop for one in attention), dtype=torch.bool)
    gradients = [None if slope is None else slope.double()[None] for slope in slopes]
    steps = change(list_steps(attention, gradients, real, method.mix))
    return method.apply(steps, real, method.rules)[0][0]


def spread(values: Tensor) -> Tensor:
    """Min-max normalised, as the release normalises scores; NaN where all are equal."""
    return (values - values.min()) / (values.max() - values.min())


def compare_matrices(recording: Recording, name: str, change: Change = lambda steps: steps) -> int:
    """Recorded matrices or scores of a method against the rules on recorded maps; how many were compared."""
    compared, method = 0, recording.method(name)
    for _, row, place, _ in answers_of(recording):
        found = matrix_of(recording, row, place, method, change)
        assert found.isfinite().all()
        if method.method == "relevance":
            found = found + torch.eye(len(found), dtype=found.dtype)  # which we leave out
        text, regions = slice(0, row.tokens), slice(row.tokens, None)
        parts = {
            "R_t_t": found[text, text],
            "R_t_i": found[text, regions],
            "R_i_t": found[regions, text],
            "R_i_i": found[regions, regions],
            "scores": (spread(found) if name == "attn_gradcam" else found)[row.read_at],
        }
        for part, ours in parts.items():
            recorded = recording.find(row, place, name, part)
            if recorded is None:
                continue
            apart = torch.zeros_like(ours, dtype=torch.bool)  # what is not compared
            apart[(0, 0) if part == "R_t_t" else row.read_at if part == "scores" else ()] = part in ("R_t_t", "scores")
            if name == "rollout" and part in ("R_t_t", "R_i_i"):  # we leave out the identity's share
                apart |= torch.eye(len(ours), dtype=torch.bool)
            ours, recorded = ours[~apart], recorded[~apart].double()
            if recorded.isnan().all():
                assert found.max() == found.min(), f"{row.name} {part}: the release found a constant"
                continue
            close = NARROW * float(recorded.abs().max()) + 1e-12
            assert_close(ours, recorded, rtol=0, atol=close, msg=labelled(f"{row.name} {part}"))
            compared += 1
    return compared


@pytest.mark.parametrize("name", METHODS)
def test_rules(recording: Recording, name: str) -> None:
    """On recorded maps and gradients."""
    assert (compare_matrices(recording, name) > 0) == (name in recording.names)


def drop_last(steps: list[Step]) -> list[Step]:
    return steps[:-1]


def swap_first(steps: list[Step]) -> list[Step]:
    return [steps[1], steps[0], *steps[2:]]


def halve_last(steps: list[Step]) -> list[Step]:
    """Self-attention of the last layer at half its weight."""
    return [*steps[:-1], tuple(replace(block, weights=block.weights / 2) for block in steps[-1])]


@pytest.mark.parametrize("change", [drop_last, swap_first, halve_last])
def test_a_broken_step_is_noticed(recording: Recording, change: Change) -> None:
    with pytest.raises(AssertionError, match="not close"):
        compare_matrices(recording, "ours_no_lrp", change)


def test_directions_that_see_one_another_are_noticed(golden: Path) -> None:
    """Both directions of a cross-attention are computed from the matrices before it."""

    def one_after_the_other(steps: list[Step]) -> list[Step]:
        return [(block,) for step in steps for block in step]

    with pytest.raises(AssertionError, match="not close"):
        compare_matrices(read_lxmert(golden, "deep"), "ours_no_lrp", one_after_the_other)


def test_maps_and_gradients(recording: Recording) -> None:
    """Of the model, all examples in one padded batch."""
    model, batch = recording.model, recording.batch
    encoded = model.encoder(batch, capture=True)
    logits = model.read(encoded, batch)["classify"]
    probs = encoded.attention
    assert probs is not None
    assert list(probs) == list(recording.blocks)
    places = range(len(recording.rows[0].answers))
    outputs = [
        torch.stack([logits[n, row.answers[place]] for n, row in enumerate(recording.rows)]).sum() for place in places
    ]
    slopes = [torch.autograd.grad(out, list(probs.values()), retain_graph=True, allow_unused=True) for out in outputs]
    for number, row, place, answer in answers_of(recording):
        assert_close(
            logits[number], recording.relevance[f"{row.name}/logits"], rtol=0, atol=recording.tolerance["attn"] * 10
        )
        assert (place == 0) == (int(logits[number].argmax()) == answer)
        for (key, block), slope in zip(recording.blocks.items(), slopes[place], strict=True):
            ours, theirs = (
                partial(cut, key=key, row=row, tokens=length) for length in (batch.text.ids.shape[1], row.tokens)
            )
            recorded = theirs(recording.maps[f"{row.name}/attn/{block}"])
            assert_close(
                ours(probs[key][number]), recorded, rtol=0, atol=recording.tolerance["attn"], msg=labelled(block)
            )
            recorded_slope = recording.maps.get(f"{row.name}/ans{place}/grad/{block}")
            assert (slope is None) == (recorded_slope is None), f"{block}: does the answer depend on it?"
            if slope is not None and recorded_slope is not None:
                close = recording.tolerance["grad"]
                assert_close(ours(slope[number]), theirs(recorded_slope), rtol=0, atol=close, msg=labelled(block))


def cut(values: Tensor, *, key: str, row: Row, tokens: int) -> Tensor:
    """(H, M, K) of an attention without padding.

    Args:
        tokens: positions of the text, with padding.
    """
    real = {"text": [*range(row.tokens)], "regions": [*range(row.regions)]}
    real["joint"] = real["text"] + [tokens + at for at in real["regions"]]
    queries, _, keys = key.rpartition("/")[2].partition("_to_")
    return values[:, real[queries]][:, :, real[keys or queries]]


def test_explanations(recording: Recording) -> None:
    """From inputs to scores, by the function that everything else uses."""
    compared = 0
    for name in recording.names:
        explanations = recording.explain(name)
        method = recording.method(name)
        for number, row, place, answer in answers_of(recording):
            explanation = explanations[number]
            names = [candidate for candidate, _ in explanation.prediction.top]
            (scores,) = explanation.scores[method.method][names.index(str(answer))]
            assert len(scores.text) == row.tokens
            assert len(scores.regions) == row.regions
            found = torch.from_numpy(np.concatenate([scores.text, scores.regions]))
            assert found.isfinite().all()
            recorded = recorded_scores(recording, row, place, name)
            if recorded is None or (name == "attn_gradcam" and row.padding):
                continue
            assert not recorded[len(found) :].any(), "padding has relevance"
            found[row.read_at] = recorded[row.read_at] = 0.0
            close = recording.tolerance[name]
            assert_close(found, recorded[: len(found)], rtol=0, atol=close, msg=labelled(f"{row.name} {name}"))
            compared += 1
    assert compared >= len(recording.names)


def recorded_scores(recording: Recording, row: Row, place: int, name: str) -> Tensor | None:
    """What the release's matrices have in the row that is read: text, then regions; None if it is lost in NaN or
    normalised."""
    whole = recording.find(row, place, name, "scores")
    if whole is not None:
        return None if name == "attn_gradcam" else whole.clone()
    parts = [recording.find(row, place, name, part) for part in ("R_t_t", "R_t_i")]
    return torch.cat([part[row.read_at] for part in parts if part is not None])


@pytest.mark.parametrize("case", ["tiny", "deep"])
def test_normalised_scores(golden: Path, case: str) -> None:
    """Scores as the release's perturbation script reads them, spread over 0 to 1, where that is not NaN."""
    recording, compared = read_lxmert(golden, case), 0
    for name in recording.names:
        explanations = recording.explain(name)
        for number, row, place, answer in answers_of(recording):
            names = [candidate for candidate, _ in explanations[number].prediction.top]
            (scores,) = explanations[number].scores[recording.method(name).method][names.index(str(answer))]
            for part, values in (("score_text", scores.text), ("score_region", scores.regions)):
                recorded = recording.find(row, place, name, part)
                if recorded is None:
                    continue
                ours = torch.from_numpy(values.copy())
                if part == "score_text":
                    ours[row.read_at] = 0.0
                matrix = recording.find(row, place, name, "R_t_t" if part == "score_text" else "R_t_i")
                assert matrix is not None
                if float(matrix[row.read_at].max() - matrix[row.read_at].min()) < recording.tolerance[name] / 100:
                    assert float(ours.max() - ours.min()) < recording.tolerance[name] / 100  # constant, or rounding
                    continue
                assert_close(
                    spread(ours),
                    recorded,
                    rtol=0,
                    atol=recording.tolerance["spread"],
                    msg=labelled(f"{row.name} {name} {part}"),
                )
                compared += 1
    assert compared >= len(recording.names)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("part", ["regions", "text"])
def test_removals(recording: Recording, part: Part, sign: int) -> None:
    """What is kept at every fraction, and what the model answers to that, from the relevance of the arg max."""
    asker = Asker(recording.model, recording.task, recording.batch, recording.examples, recording.records)
    kind = f"{'image' if part == 'regions' else 'text'}/{'positive' if sign > 0 else 'negative'}"
    fractions, compared = recording.fractions[part], 0
    for name in recording.names:
        explanations = recording.explain(name)
        for number, row in enumerate(recording.rows):
            if part == "regions" and row.padding:
                assert len(asker.units[part][number]) == row.regions  # padding is not ranked
                continue
            recorded = recording.removals[row.name][name][kind]
            rows = explanations[number].scores[recording.method(name).method][0]
            scores = sign * asker.score_units(part, number, rows)
            questions = asker.list_removals(part, number, scores, fractions)
            asker.ask(questions)
            units, ids = asker.units[part][number], recording.batch.text.ids[number].tolist()
            alike = number_by_features(recording.batch, number)
            for place, (fraction, question) in enumerate(zip(fractions, questions, strict=True)):
                kept = [unit[0][1] for at, unit in enumerate(units) if at not in question.gone]
                theirs = kept_by_release(recorded, place, row, part)
                assert len(kept) == count_kept(len(units), fraction)
                assert len(theirs) == int((1 - fraction) * len(units)) <= len(kept)
                if len(theirs) < len(kept) or is_accident(scores, len(kept)):
                    continue
                ours = sorted(alike[at] for at in kept) if part == "regions" else [ids[at] for at in kept]
                assert ours == theirs, f"{row.name} {name} {fraction}"
                answer = int(asker[question].value)
                assert answer == recorded["answers"][place]
                score = float(recording.target[number, answer])
                assert score == pytest.approx(recorded["accuracy"][place], abs=1e-5)
                compared += 1
    assert compared > 20


def kept_by_release(recorded: Mapping[str, Any], place: int, row: Row, part: Part) -> list[int]:
    """Numbers of regions, or ids of the tokens that are not always kept."""
    if part == "regions":
        return sorted(recorded["kept_regions_in_order"][place])
    ids: list[int] = recorded["kept_token_ids"][place]
    return ids[1 : -2 if row.read_at else -1]


def number_by_features(batch: Batch, row: int) -> list[int]:
    """For each region the first one with the same features, by which the recordings name it."""
    assert batch.regions is not None
    features = batch.regions.features[row]
    return [next(k for k, first in enumerate(features) if torch.equal(first, own)) for own in features]


def is_accident(scores: NDArray[np.float64], kept: int) -> bool:
    """Whether equal scores make it a matter of chance what is kept."""
    order = np.sort(scores)
    return 0 < kept < len(order) and order[kept] - order[kept - 1] <= 1e-6 * np.abs(order).max()


def test_what_is_kept_is_exact() -> None:
    """1 - .8 is just below .2 in binary, and so the release keeps none of five."""
    assert count_kept(5, 0.8) == 1 > int((1 - 0.8) * 5)
    assert count_kept(10, 0.9) == 1 > int((1 - 0.9) * 10)
    assert [count_kept(7, fraction) for fraction in (0, 0.25, 0.5, 0.75, 1)] == [7, 5, 3, 1, 0]
