"""What a trace keeps, under which name, in which quadrant and for which rows."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from visling.nn.layers import LayerSizes, TransformerLayer
from visling.nn.trace import Trace

SIZES = LayerSizes(
    hidden_size=4, num_heads=2, intermediate_size=6, dropout_rate=0.0, attention_dropout_rate=0.0, norm_eps=1e-12
)


def test_nothing_is_kept_unless_asked() -> None:
    trace = Trace(False)
    trace.add_states("embeddings", torch.zeros(1, 2, 4))
    assert trace.at("layers.0") is None
    assert trace.maps() is None
    assert trace.states() is None


def test_a_layer_reports_its_states_and_attention() -> None:
    layer, states, mask = TransformerLayer(SIZES), torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    trace = Trace(True)
    new = layer(states, mask, trace.at("text_layers.0", "text"))
    assert_close(new, layer(states, mask))
    kept, maps = trace.states(), trace.maps()
    assert kept is not None
    assert maps is not None
    assert kept["text_layers.0"] is new
    assert maps.text_to_text["text_layers.0"].shape == (2, 2, 3, 3)
    assert maps.text_to_regions == maps.regions_to_text == maps.regions_to_regions == {}


def test_joint_attention_is_cut_into_quadrants() -> None:
    probs, trace = torch.arange(25.0).view(1, 1, 5, 5), Trace(True, num_tokens=3)
    trace.add_maps("layers.0", "joint", probs)
    maps = trace.maps()
    assert maps is not None
    top = torch.cat([maps.text_to_text["layers.0"], maps.text_to_regions["layers.0"]], dim=-1)
    bottom = torch.cat([maps.regions_to_text["layers.0"], maps.regions_to_regions["layers.0"]], dim=-1)
    assert top.shape[2] == 3
    assert torch.equal(torch.cat([top, bottom], dim=2), probs)


def test_shared_rows_are_kept_for_every_row_of_the_batch() -> None:
    states, probs, row = torch.randn(2, 3, 4), torch.rand(2, 1, 3, 3), torch.tensor([1, 1, 0])
    trace = Trace(True)
    here = trace.at("region_layers.0", "regions", row)
    assert here is not None
    here.add(states, probs)
    kept, maps = trace.states(), trace.maps()
    assert kept is not None
    assert maps is not None
    assert torch.equal(kept["region_layers.0"], states[row])
    assert torch.equal(maps.regions_to_regions["region_layers.0"], probs[row])


def test_both_streams_of_a_layer_are_kept_with_its_parts() -> None:
    text, regions, square = torch.randn(1, 3, 4), torch.randn(1, 2, 4), torch.rand(1, 1, 2, 2)
    trace = Trace(True)
    here = trace.at("cross_layers.0")
    assert here is not None
    here.add_streams(text, regions)
    here.add_cross_attention(square, square + 1, part=".cross")
    here.add_self_attention(square + 2, square + 3, part=".self")
    kept, maps = trace.states(), trace.maps()
    assert kept is not None
    assert maps is not None
    assert kept["cross_layers.0.text"] is text
    assert kept["cross_layers.0.regions"] is regions
    assert torch.equal(maps.text_to_regions["cross_layers.0.cross"], square)
    assert torch.equal(maps.regions_to_text["cross_layers.0.cross"], square + 1)
    assert torch.equal(maps.text_to_text["cross_layers.0.self"], square + 2)
    assert torch.equal(maps.regions_to_regions["cross_layers.0.self"], square + 3)
