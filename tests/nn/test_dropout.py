"""Dropout that draws sixteen bits an element: the rate, the mean, the seed, and what is added to a residual."""

from __future__ import annotations

import math

import pytest
import torch
from fixtures.attention_ways import fix_dropout
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from visling.nn.dropout import Dropout, add_dropped, draw_kept, drop

MANY = 1_000_000
RATES = (0.1, 0.25, 0.5, 0.9, 1 / 3)


@pytest.mark.parametrize("rate", RATES)
def test_the_share_that_is_dropped_is_the_rate(rate: float) -> None:
    kept, scale = draw_kept(MANY, rate)
    assert kept.dtype == torch.bool
    assert abs((~kept).sum().item() - rate * MANY) < 5 * math.sqrt(MANY * rate * (1 - rate)) + MANY / 2**17
    assert scale == pytest.approx(1 / (1 - rate), rel=1e-4)


@pytest.mark.parametrize("rate", RATES)
def test_the_mean_is_exact(rate: float) -> None:
    """Of the 2**16 values that decide about an element, kept ones times the factor are all of them."""
    _, scale = draw_kept(1, rate)
    kept_values = 2**16 - round(rate * 2**16)
    assert kept_values * scale == 2**16


def test_nothing_is_dropped_at_rates_that_round_to_zero_and_everything_at_one() -> None:
    kept, scale = draw_kept(1000, 2.0**-18)
    assert kept.all()
    assert scale == 1.0
    assert not drop(torch.ones(1000), 1.0, training=True).any()
    assert draw_kept(1000, 1.0)[1] == 0.0


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 4097])
def test_any_number_of_elements(size: int) -> None:
    assert draw_kept(size, 0.5)[0].shape == (size,)


def test_elements_are_independent() -> None:
    """Neighbours share one random number: of pairs, at every distance within and beyond it, a quarter are kept."""
    kept = draw_kept(MANY, 0.5)[0]
    for distance in (*range(1, 9), 64, 1000):
        both = (kept[:-distance] & kept[distance:]).sum().item()
        pairs = MANY - distance
        assert abs(both - pairs / 4) < 6 * math.sqrt(pairs), distance
    for lane in range(4):
        share = kept[lane::4].float().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(MANY / 4), lane


def test_what_is_drawn_follows_torchs_seed() -> None:
    def draw() -> Tensor:
        return draw_kept(4096, 0.3)[0]

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    again = draw()
    torch.manual_seed(6)
    other = draw()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_draw_is_repeated_and_disturbs_no_other() -> None:
    state = torch.get_rng_state()
    first, second = draw_kept(4096, 0.3)[0], draw_kept(4096, 0.3)[0]
    after = torch.get_rng_state()
    assert torch.equal(draw_kept(4096, 0.3, state)[0], first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_module_drops_in_training_only() -> None:
    module, states = Dropout(0.25), torch.randn(64, 5)
    assert module.eval()(states) is states
    assert module.train()(states).shape == states.shape
    dropped = module(states)
    kept = dropped != 0
    assert 0.6 < kept.float().mean() < 0.9
    assert_close(dropped[kept], states[kept] / 0.75)
    assert isinstance(module, nn.Dropout)  # what looks for dropout in a model finds it
    assert Dropout(0.0).train()(states) is states


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.4, False), (0.4, True)])
def test_what_is_added_to_a_residual(rate: float, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    residual, states = torch.randn(3, 4), torch.randn(3, 4)
    if training and rate:
        torch.manual_seed(1)
        added = add_dropped(residual, states, rate, training=training) - residual
        torch.manual_seed(1)
        assert_close(added, drop(states, rate, training=training))
        assert 0 < (added.abs() < 1e-6).sum() < states.numel()
    fix_dropout(monkeypatch, lambda rate: 1 - rate)
    expected = residual + states * (1 - rate if training else 1)
    assert_close(add_dropped(residual, states, rate, training=training), expected)


def seeded(residual: Tensor, states: Tensor) -> Tensor:
    torch.manual_seed(2)
    return add_dropped(residual, states, 0.4, training=True)


def test_gradients_pass_what_was_kept() -> None:
    residual, states = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(seeded, (residual, states))
    half = states.detach().bfloat16().requires_grad_()
    seeded(residual.detach().float(), half).sum().backward()  # autocast: the residual is single, the states are half
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert 0 < (half.grad == 0).sum() < half.numel()
