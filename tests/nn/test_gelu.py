"""A linear layer over GELU that computes GELU again in the backward pass: values, gradients, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from visling.nn.gelu import linear_of_gelu


def inputs(dtype: torch.dtype = torch.float64, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """States, weight and bias."""
    states, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((rows, 6), (4, 6), (4,)))
    return states * 2, weight, bias


def plain(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(states), weight, bias)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_values_and_gradients_equal_those_of_the_two_layers(rows: int) -> None:
    given = inputs(rows=rows)
    found = []
    for function in (linear_of_gelu, plain):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        output = function(*leaves)
        found.append((output, *torch.autograd.grad(output.sin().sum(), leaves)))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected)
    with torch.no_grad():
        assert_close(linear_of_gelu(*given), plain(*given))


def test_gradients_are_those_of_the_function() -> None:
    assert gradcheck(linear_of_gelu, [tensor.requires_grad_() for tensor in inputs()])


@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, True), (False, False, True), (True, True, True)]
)
def test_only_what_is_trained_has_a_gradient(trained: tuple[bool, bool, bool]) -> None:
    given = [tensor.requires_grad_(learns) for tensor, learns in zip(inputs(), trained, strict=True)]
    linear_of_gelu(*given).square().sum().backward()
    found = [tensor.grad for tensor in given]
    twins = [tensor.detach().clone().requires_grad_(learns) for tensor, learns in zip(given, trained, strict=True)]
    plain(*twins).square().sum().backward()
    for ours, twin in zip(found, twins, strict=True):
        assert (ours is None) == (twin.grad is None)
        if ours is not None:
            assert_close(ours, twin.grad)


def test_half_precision_by_autocast_is_near_single_precision() -> None:
    given = inputs(torch.float32)
    found = []
    for half in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            states = F.linear(leaves[0], torch.eye(6))  # as a layer before hands them over: half, if autocast is on
            output = linear_of_gelu(states, *leaves[1:])
        assert output.dtype == (torch.bfloat16 if half else torch.float32)
        found.append((output.float(), *torch.autograd.grad(output.float().sin().sum(), leaves)))
        assert all(gradient.dtype == torch.float32 for gradient in found[-1][1:])
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_the_values_after_gelu_are_not_kept() -> None:
    states, weight, bias = (tensor.requires_grad_() for tensor in inputs())
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_of_gelu(states, weight, bias)
    assert set(kept) == {states.data_ptr(), weight.data_ptr()}
