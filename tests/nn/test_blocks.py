"""Attention, layers, pooling and embeddings: the fast path against plain arithmetic, masks, and what may not move."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from visling.errors import ConfigError
from visling.nn.attention import Attention
from visling.nn.embeddings import RegionFeatures, TextEmbeddings
from visling.nn.layers import AttentionBlock, LayerSizes, TransformerLayer, initialise, through_layers
from visling.nn.packing import Packing
from visling.nn.pooling import FirstTokenPooler, gather
from visling.nn.trace import Trace

WIDTH, CONTEXT, HEADS = 8, 6, 2


def sizes(**changes: Any) -> LayerSizes:
    plain = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0, "norm_eps": 1e-12}
    return LayerSizes(**{"hidden_size": WIDTH, "num_heads": HEADS, "intermediate_size": 16} | plain | changes)


def attention(context_size: int = CONTEXT, dropout_rate: float = 0.0) -> Attention:
    return Attention(
        query_size=WIDTH, context_size=context_size, attention_size=12, num_heads=HEADS, dropout_rate=dropout_rate
    )


def by_hand(block: Attention, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of Vaswani et al., one row and one head at a time, padded keys left out altogether."""
    size = block.query.out_features // block.num_heads
    context, probs = (
        x.new_zeros(*x.shape[:2], block.query.out_features),
        x.new_zeros(len(x), block.num_heads, x.shape[1], y.shape[1]),
    )
    for row in range(len(x)):
        for head in range(block.num_heads):
            part = slice(head * size, (head + 1) * size)
            query, key, value = (
                block.query(x[row])[:, part],
                block.key(y[row][mask[row]])[:, part],
                block.value(y[row][mask[row]])[:, part],
            )
            weights = (query @ key.t() / math.sqrt(size)).softmax(-1)
            probs[row, head][:, mask[row]] = weights
            context[row][:, part] = weights @ value
    return context, probs


def through(block: nn.Module, x: Tensor, y: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """What a block makes of padded states (B, M, .) and (B, N, .) whose queries are all real."""
    x_rows, y_rows = Packing.of(torch.ones(x.shape[:2], dtype=torch.bool)), Packing.of(mask)
    states, probs = block(x_rows.pack(x), y_rows.pack(y), x_rows, y_rows, **options)
    return x_rows.unpack(states), probs


def cross_inputs() -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    return torch.randn(3, 4, WIDTH), torch.randn(3, 5, CONTEXT), mask


def test_both_paths_equal_the_formula_and_give_zeros_over_nothing() -> None:
    block, (x, y, mask) = attention(), cross_inputs()
    context, probs = by_hand(block, x, y, mask)
    fused, none = through(block, x, y, mask)
    captured, captured_probs = through(block, x, y, mask, capture=True)
    assert captured_probs is not None
    assert none is None
    assert_close(fused, context)
    assert_close(captured, context)
    assert_close(captured_probs, probs)
    assert (fused[2] == 0).all()
    assert (captured_probs[2] == 0).all()


@pytest.mark.parametrize("capture", [False, True])
def test_gradients_are_finite_over_nothing(capture: bool) -> None:
    block, (x, y, mask) = attention(), cross_inputs()
    x.requires_grad_(), y.requires_grad_()
    through(block, x, y, mask, capture=capture)[0].sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.isfinite().all()
    assert (y.grad[~mask] == 0).all()


def test_dropout_acts_on_probabilities_in_training_only() -> None:
    block, inputs = attention(dropout_rate=0.5), cross_inputs()
    assert not torch.equal(through(block, *inputs)[0], through(block, *inputs)[0])
    assert not torch.equal(through(block, *inputs, capture=True)[0], through(block, *inputs, capture=True)[0])
    block.eval()
    assert torch.equal(through(block, *inputs)[0], through(block, *inputs)[0])


def test_widths_of_two_streams_may_differ() -> None:
    block = AttentionBlock(sizes(), context_size=CONTEXT, attention_size=12)
    x, y, mask = cross_inputs()
    states, probs = through(block, x, y, mask, capture=True)
    assert probs is not None
    assert states.shape == x.shape
    assert probs.shape == (3, HEADS, 4, 5)
    context, _ = by_hand(block.attention, x, y, mask)
    assert_close(states, nn.functional.layer_norm(x + block.output(context), (WIDTH,), eps=1e-12))


def test_layer_is_post_norm_with_exact_gelu() -> None:
    layer = TransformerLayer(sizes())
    rows, x = Packing.of(torch.tensor([[True] * 3, [True, False, False]])), torch.randn(4, WIDTH) * 3
    attended, _ = layer.self_attention(x, x, rows, rows)
    wide = layer.feed_forward.up(attended)
    down = layer.feed_forward.down(wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))))
    summed = attended + down
    centred = summed - summed.mean(-1, keepdim=True)
    assert_close(layer(x, rows), centred / centred.square().mean(-1, keepdim=True).sqrt())


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_the_last_layer_computes_what_is_read(num_layers: int) -> None:
    layers = nn.ModuleList(TransformerLayer(sizes()) for _ in range(num_layers))
    rows, x = Packing.of(torch.tensor([[True] * 3, [True, False, False], [True, True, False]])), torch.randn(6, WIDTH)
    read = rows.read(torch.tensor([[False, True, True], [False] * 3, [True, False, True]]), 3)
    computed: list[int] = []
    for layer in layers:
        layer.feed_forward.register_forward_pre_hook(lambda _, given: computed.append(len(given[0])))
    found = through_layers(layers, x, rows, Trace(False), read=read)
    assert computed == [6] * (num_layers - 1) + [3] * (num_layers > 0)
    everything = through_layers(layers, x, rows, Trace(False))
    assert_close(found, everything[[1, 2, 4]])
    assert_close(through_layers(layers, x, rows, Trace(False), read=rows.read_all()), everything)


def test_dropout_sites_of_a_layer() -> None:
    layer = TransformerLayer(sizes(dropout_rate=1.0))
    x, rows = torch.randn(6, WIDTH), Packing.of(torch.ones(2, 3, dtype=torch.bool))
    norm = nn.LayerNorm(WIDTH)
    # with both outputs dropped, the residual is all that is left
    assert_close(layer(x, rows), norm(norm(x)), atol=1e-4, rtol=0)


def test_initialisation() -> None:
    layer = TransformerLayer(sizes(hidden_size=64, num_heads=4, intermediate_size=256))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    layer.apply(initialise)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std().item() - 0.02) < 0.002, name


def test_text_embeddings_sum_three_tables_and_stop_at_the_last_position() -> None:
    tables = TextEmbeddings(vocab_size=10, max_positions=4, num_segments=2, hidden_size=WIDTH)
    ids, segments = torch.tensor([[5, 0, 5]]), torch.tensor([[0, 1, 1]])
    states = tables(ids, segments)
    assert_close(states[0, 2], tables.words.weight[5] + tables.positions.weight[2] + tables.segments.weight[1])
    with pytest.raises(ConfigError, match=r"5 tokens.*holds 4"):
        tables(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64))


def test_region_features_are_cast_whitened_and_of_one_width() -> None:
    features = torch.randn(50, 3, dtype=torch.float64).to(torch.float16) * 4 + 1
    plain, whitened = RegionFeatures(3, whiten=False), RegionFeatures(3, whiten=True)
    assert torch.equal(plain(features, torch.float32), features.float())
    assert_close(whitened(features, torch.float32), features.float())  # not measured yet
    plain.fit(features.float())  # nothing to measure
    whitened.fit(features.float())
    assert_close(torch.cov(whitened(features, torch.float32).T), torch.eye(3), atol=0.01, rtol=0)
    assert not plain.state_dict()
    with pytest.raises(ConfigError, match=r"4 wide; this model reads 3\. Set feature_size"):
        plain(torch.zeros(2, 4), torch.float32)


def test_pooler_and_gather() -> None:
    states = torch.randn(2, 3, WIDTH)
    pooler = FirstTokenPooler(WIDTH)
    assert_close(pooler(states), torch.tanh(states[:, 0] @ pooler.dense.weight.t() + pooler.dense.bias))
    assert torch.equal(gather(states, torch.tensor([2, 0])), torch.stack([states[0, 2], states[1, 0]]))
    assert torch.equal(gather(states, torch.tensor([[2, 2], [0, 1]]))[1], states[1, :2])
