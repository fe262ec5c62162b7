"""Layers in which two streams meet: what each direction reads, empty streams, captured maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures.attention_ways import WAYS, Way, attend_by, fix_dropout
from torch import Tensor
from torch.testing import assert_close

from visling.nn.attention import probabilities
from visling.nn.coattention import CoAttentionLayer, CrossModalityLayer, GatedLayer
from visling.nn.layers import LayerSizes, TransformerLayer
from visling.nn.packing import Packing
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


def meet(
    layer: CoAttentionLayer, text: Tensor, regions: Tensor, region_mask: Tensor = REGION_MASK, trace: Any = None
) -> tuple[Tensor, Tensor]:
    """New states of a connection, padded, from padded ones."""
    text_rows, region_rows = Packing.of(TEXT_MASK), Packing.of(region_mask)
    new = layer(text_rows.pack(text), region_rows.pack(regions), text_rows, region_rows, trace)
    return text_rows.unpack(new[0]), region_rows.unpack(new[1])


def among_regions(layer: TransformerLayer | GatedLayer, regions: Tensor, text: Tensor, trace: Any = None) -> Tensor:
    """New states of a layer of the region stream, padded, from padded ones."""
    rows, text_rows = Packing.of(REGION_MASK), Packing.of(TEXT_MASK)
    heard = (text_rows.pack(text), text_rows) if isinstance(layer, GatedLayer) else ()
    return rows.unpack(layer(rows.pack(regions), rows, *heard, trace))


def test_both_directions_read_what_entered_the_layer() -> None:
    layer = co_attention()
    text, regions = states()
    text_rows, region_rows = Packing.of(TEXT_MASK), Packing.of(REGION_MASK)
    text, regions = text_rows.pack(text), region_rows.pack(regions)
    new_text, new_regions = layer(text, regions, text_rows, region_rows)
    informed_text, _ = layer.text_attention(text, regions, text_rows, region_rows)
    informed_regions, _ = layer.region_attention(regions, text, region_rows, text_rows)
    assert_close(new_text, layer.text_feed_forward(informed_text))
    assert_close(new_regions, layer.region_feed_forward(informed_regions))


def test_there_is_no_self_attention_in_co_attention() -> None:
    layer = co_attention()
    text, regions = states()
    before = meet(layer, text, regions)[0]
    text[:, 1] += 1  # a token that others could read; padding in the second row
    after = meet(layer, text, regions)[0]
    moved = (after != before).any(-1)
    assert moved.nonzero().tolist() == [[0, 1]]


def test_padding_is_not_read_across() -> None:
    layer = co_attention()
    text, regions = states()
    before = meet(layer, text, regions)
    text, regions = text.masked_fill(~TEXT_MASK[..., None], 1e3), regions.masked_fill(~REGION_MASK[..., None], -1e3)
    after = meet(layer, text, regions)
    # A packing of all positions, as a compiler has it, computes padding too.
    text_rows, region_rows = (Packing(mask, torch.arange(mask.numel())) for mask in (TEXT_MASK, REGION_MASK))
    compiled = layer(text.flatten(0, 1), regions.flatten(0, 1), text_rows, region_rows)
    for new in (after, [text_rows.unpack(compiled[0]), region_rows.unpack(compiled[1])]):
        assert_close(new[0][TEXT_MASK], before[0][TEXT_MASK])
        assert_close(new[1][REGION_MASK], before[1][REGION_MASK])


def test_captured_maps_of_co_attention() -> None:
    layer = co_attention()
    text, regions = states()
    trace = Trace(True)
    plain = meet(layer, text, regions)
    captured = meet(layer, text, regions, trace=trace.at("layer"))
    assert_close(plain[0], captured[0])
    assert_close(plain[1], captured[1])
    maps = trace.maps()
    assert maps is not None
    to_regions, to_text = maps.text_to_regions["layer"], maps.regions_to_text["layer"]
    assert to_regions.shape == (2, 3, 4, 3)
    assert to_text.shape == (2, 3, 3, 4)
    assert_close(to_regions.sum(-1), torch.ones(2, 3, 4))  # of padding too: maps are padded
    assert (to_regions[0, :, :, 2] == 0).all()
    query = layer.text_attention.attention.query(text)[0, 1, 4:8]  # second head
    key = layer.text_attention.attention.key(regions)[0, :2, 4:8]
    assert_close(to_regions[0, 1, 1, :2], (key @ query / 2).softmax(0))


def test_co_attention_with_an_empty_stream_is_finite() -> None:
    layer = co_attention()
    text, regions = (tensor.requires_grad_() for tensor in states())
    nothing = torch.zeros_like(REGION_MASK)
    new_text, new_regions = meet(layer, text, regions, nothing)
    alone = layer.text_attention.norm(text + layer.text_attention.output.bias)  # attention over nothing gives zeros
    assert_close(new_text[TEXT_MASK], layer.text_feed_forward(alone)[TEXT_MASK])
    assert not new_regions.any()
    (new_text.sum() + new_regions.sum()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert text.grad is not None
    assert text.grad.isfinite().all()


@pytest.mark.parametrize("capture", [False, True])
def test_gates_scale_queries_and_keys(capture: bool) -> None:
    layer = gated()
    text, regions = states()
    trace = Trace(capture)
    found = among_regions(layer, regions, text, trace.at("layer", "regions"))
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
    assert_close(found[REGION_MASK], layer.feed_forward(informed)[REGION_MASK])


def test_shut_gates_leave_a_transformer_layer() -> None:
    layer = gated()
    plain = TransformerLayer(sizes(6, 5)).eval()
    with torch.no_grad():
        for gate in (layer.query_gate, layer.key_gate):
            gate.weight.zero_()
            gate.bias.fill_(-200.0)
    plain.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if "gate" not in name})
    text, regions = states()
    assert_close(among_regions(layer, regions, text), among_regions(plain, regions, text))


def test_gates_do_not_hear_padding() -> None:
    layer = gated()
    text, regions = states()
    other = text.masked_fill(~TEXT_MASK[..., None], 1e3)
    assert_close(among_regions(layer, regions, text), among_regions(layer, regions, other))


def test_a_gated_layer_computes_what_is_read() -> None:
    layer = gated()
    text, regions = states()
    rows, text_rows = Packing.of(REGION_MASK), Packing.of(TEXT_MASK)
    chosen = torch.tensor([[False, True, True], [True, False, True]])
    given = rows.pack(regions), rows, text_rows.pack(text), text_rows
    found = layer(*given, read=rows.read(chosen, 4))
    assert_close(found, layer(*given)[[1, 2, 4]])


def cross_modality() -> CrossModalityLayer:
    layer = CrossModalityLayer(sizes(8, 10)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


READ_TEXT = torch.tensor([[True, False, True, False], [False, False, False, False]])
READ_REGIONS = torch.tensor([[False, True, False], [False, True, True]])


@pytest.mark.parametrize("read_regions", [READ_REGIONS, torch.zeros_like(READ_REGIONS)])
@pytest.mark.parametrize("read_text", [READ_TEXT, torch.zeros_like(READ_TEXT)])
def test_a_last_layer_computes_what_is_read(read_text: Tensor, read_regions: Tensor) -> None:
    layer = cross_modality()
    text_rows, region_rows = Packing.of(TEXT_MASK), Packing.of(REGION_MASK)
    text, regions = torch.randn(4, 8), torch.randn(5, 8)
    everything = layer(text, regions, text_rows, region_rows)
    readings = text_rows.read(read_text, 8), region_rows.read(read_regions, 6)
    found = layer.read(text, regions, text_rows, region_rows, *readings)
    assert_close(found[0], everything[0][read_text[TEXT_MASK]])
    assert_close(found[1], everything[1][read_regions[REGION_MASK]])


def test_a_stream_that_is_not_read_is_not_computed() -> None:
    layer = cross_modality()
    text_rows, region_rows = Packing.of(TEXT_MASK), Packing.of(REGION_MASK)
    called: list[str] = []
    for name, module in layer.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    nothing = region_rows.read(torch.zeros_like(REGION_MASK), 0)
    layer.read(torch.randn(4, 8), torch.randn(5, 8), text_rows, region_rows, text_rows.read(READ_TEXT, 2), nothing)
    assert called == ["cross_attention", "text_self_attention", "text_feed_forward"]


@pytest.mark.parametrize("way", WAYS)
def test_gated_layer_drops_attention_in_training_only(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def factor(rate: float) -> float:
        rates.append(rate)
        return 1.0

    attend_by(monkeypatch, way)
    fix_dropout(monkeypatch, factor)
    layer = gated()
    text, regions = states()
    trace = Trace(way == "captured")
    among_regions(layer, regions, text, trace.at("layer", "regions"))
    assert rates == []
    among_regions(layer.train(), regions, text, trace.at("layer", "regions"))
    assert rates == [RATES["attention_dropout_rate"], RATES["dropout_rate"], RATES["dropout_rate"]]
