"""Layers in which two streams meet: what each direction reads, empty streams, captured maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from visling.nn.attention import probabilities
from visling.nn.coattention import CoAttentionLayer, GatedLayer
from visling.nn.layers import LayerSizes, TransformerLayer
from visling.nn.trace import Trace

RATES: dict[str, Any] = {"dropout_rate": 0.1, "attention_dropout_rate": 0.2, "norm_eps": 1e-12}
TEXT_MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
REGION_MASK = torch.tensor([[True, True, False], [True, True, True]])


def sizes(width: int, intermediate_size: int, num_heads: int = 2) -> LayerSizes:
    return LayerSizes(hidden_size=width, num_heads=num_heads, intermediate_size=intermediate_size, **RATES)


def co_attention() -> CoAttentionLayer:
    layer = CoAttentionLayer(sizes(8, 10), sizes(6, 7), attention_size=12, num_heads=3).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def gated() -> GatedLayer:
    layer = GatedLayer(8, sizes(6, 5)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def states() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 8), torch.randn(2, 3, 6)


def test_both_directions_read_what_entered_the_layer() -> None:
    layer = co_attention()
    text, regions = states()
    new_text, new_regions = layer(text, regions, TEXT_MASK, REGION_MASK)
    informed_text, _ = layer.text_attention(text, regions, REGION_MASK)
    informed_regions, _ = layer.region_attention(regions, text, TEXT_MASK)
    assert_close(new_text, layer.text_feed_forward(informed_text))
    assert_close(new_regions, layer.region_feed_forward(informed_regions))


def test_there_is_no_self_attention_in_co_attention() -> None:
    layer = co_attention()
    text, regions = states()
    before = layer(text, regions, TEXT_MASK, REGION_MASK)[0]
    text[:, 1] += 1  # a token that others could read
    after = layer(text, regions, TEXT_MASK, REGION_MASK)[0]
    moved = (after != before).any(-1)
    assert moved.nonzero().tolist() == [[0, 1], [1, 1]]


def test_padding_is_not_read_across() -> None:
    layer = co_attention()
    text, regions = states()
    before = layer(text, regions, TEXT_MASK, REGION_MASK)
    after = layer(
        text.masked_fill(~TEXT_MASK[..., None], 1e3),
        regions.masked_fill(~REGION_MASK[..., None], -1e3),
        TEXT_MASK,
        REGION_MASK,
    )
    assert_close(before[0][TEXT_MASK], after[0][TEXT_MASK])
    assert_close(before[1][REGION_MASK], after[1][REGION_MASK])


def test_captured_maps_of_co_attention() -> None:
    layer = co_attention()
    text, regions = states()
    trace = Trace(True)
    plain = layer(text, regions, TEXT_MASK, REGION_MASK)
    captured = layer(text, regions, TEXT_MASK, REGION_MASK, trace.at("layer"))
    assert_close(plain[0], captured[0])
    assert_close(plain[1], captured[1])
    maps = trace.maps()
    assert maps is not None
    to_regions, to_text = maps.text_to_regions["layer"], maps.regions_to_text["layer"]
    assert to_regions.shape == (2, 3, 4, 3)
    assert to_text.shape == (2, 3, 3, 4)
    assert_close(to_regions.sum(-1), torch.ones(2, 3, 4))
    assert (to_regions[0, :, :, 2] == 0).all()
    query = layer.text_attention.attention.query(text)[0, 1, 4:8]  # second head
    key = layer.text_attention.attention.key(regions)[0, :2, 4:8]
    assert_close(to_regions[0, 1, 1, :2], (key @ query / 2).softmax(0))


def test_co_attention_with_an_empty_stream_is_finite() -> None:
    layer = co_attention()
    text, regions = (tensor.requires_grad_() for tensor in states())
    nothing = torch.zeros_like(REGION_MASK)
    new_text, new_regions = layer(text, regions, TEXT_MASK, nothing)
    alone = layer.text_attention.norm(text + layer.text_attention.output.bias)  # attention over nothing gives zeros
    assert_close(new_text, layer.text_feed_forward(alone))
    (new_text.sum() + new_regions.sum()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert text.grad is not None
    assert text.grad.isfinite().all()


@pytest.mark.parametrize("capture", [False, True])
def test_gates_scale_queries_and_keys(capture: bool) -> None:
    layer = gated()
    text, regions = states()
    trace = Trace(capture)
    found = layer(regions, REGION_MASK, text, TEXT_MASK, trace.at("layer", "regions"))
    maps = trace.maps()
    assert (maps is None) != capture
    assert maps is None or list(maps.regions_to_regions) == ["layer"]
    attention = layer.self_attention.attention
    mean = torch.stack([text[0, :3].mean(0), text[1, 0]])[:, None]
    query = attention.query(regions) * (1 + torch.sigmoid(layer.query_gate(mean)))
    key = attention.key(regions) * (1 + torch.sigmoid(layer.key_gate(mean)))
    split = [x.view(2, 3, 2, 3).transpose(1, 2) for x in (query, key, attention.value(regions))]
    context = probabilities(split[0], split[1], REGION_MASK[:, None, None]) @ split[2]
    informed = layer.self_attention.norm(regions + layer.self_attention.output(context.transpose(1, 2).flatten(2)))
    assert_close(found, layer.feed_forward(informed))


def test_shut_gates_leave_a_transformer_layer() -> None:
    layer = gated()
    plain = TransformerLayer(sizes(6, 5)).eval()
    with torch.no_grad():
        for gate in (layer.query_gate, layer.key_gate):
            gate.weight.zero_()
            gate.bias.fill_(-200.0)
    plain.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if "gate" not in name})
    text, regions = states()
    assert_close(layer(regions, REGION_MASK, text, TEXT_MASK), plain(regions, REGION_MASK))


def test_gates_do_not_hear_padding() -> None:
    layer = gated()
    text, regions = states()
    other = text.masked_fill(~TEXT_MASK[..., None], 1e3)
    assert_close(layer(regions, REGION_MASK, text, TEXT_MASK), layer(regions, REGION_MASK, other, TEXT_MASK))


def test_gated_layer_drops_attention_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    genuine = F.scaled_dot_product_attention

    def spy(*arguments: Any, dropout_p: float, **named: Any) -> Tensor:
        rates.append(dropout_p)
        return genuine(*arguments, dropout_p=dropout_p, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer = gated()
    text, regions = states()
    layer(regions, REGION_MASK, text, TEXT_MASK)
    layer.train()(regions, REGION_MASK, text, TEXT_MASK)
    assert rates == [0.0, 0.2]
