"""What a trace keeps, under which name, in which quadrant and for which rows."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from visling.nn.layers import LayerSizes, TransformerLayer
from visling.nn.packing import Packing
from visling.nn.trace import Trace

SIZES = LayerSizes(
    hidden_size=4, num_heads=2, intermediate_size=6, dropout_rate=0.0, attention_dropout_rate=0.0, norm_eps=1e-12
)
ROWS = Packing.of(torch.ones(2, 2, dtype=torch.bool))
"""Two rows of two real positions."""


def test_nothing_is_kept_unless_asked() -> None:
    trace = Trace(False)
    trace.add_states("embeddings", torch.zeros(2, 4), ROWS)
    assert trace.at("layers.0") is None
    assert trace.maps() is None
    assert trace.states() is None


def test_a_layer_reports_its_states_and_attention() -> None:
    layer, states, rows = (
        TransformerLayer(SIZES),
        torch.randn(4, 4),
        Packing.of(torch.tensor([[True] * 3, [True, False, False]])),
    )
    trace = Trace(True)
    new = layer(states, rows, trace.at("text_layers.0", "text"))
    assert_close(new, layer(states, rows))
    kept, maps = trace.states(), trace.maps()
    assert kept is not None
    assert maps is not None
    assert torch.equal(kept["text_layers.0"], rows.unpack(new))
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


def test_states_are_zeros_at_padding_even_where_it_fills_up_the_packing() -> None:
    mask, trace = torch.tensor([[True, False], [True, True]]), Trace(True)
    trace.add_states("embeddings", torch.ones(4, 3), Packing.of(mask, 4))
    kept = trace.states()
    assert kept is not None
    assert torch.equal(kept["embeddings"], mask[..., None].expand(-1, -1, 3).float())


def test_shared_rows_are_kept_for_every_row_of_the_batch() -> None:
    states, probs, row = torch.randn(4, 4), torch.rand(2, 1, 2, 2), torch.tensor([1, 1, 0])
    trace = Trace(True)
    here = trace.at("region_layers.0", "regions", row)
    assert here is not None
    here.add(states, ROWS, probs)
    kept, maps = trace.states(), trace.maps()
    assert kept is not None
    assert maps is not None
    assert torch.equal(kept["region_layers.0"], states.view(2, 2, 4)[row])
    assert torch.equal(maps.regions_to_regions["region_layers.0"], probs[row])


def test_both_streams_of_a_layer_are_kept_with_its_parts() -> None:
    text, regions, square = torch.randn(4, 4), torch.randn(2, 3), torch.rand(1, 1, 2, 2)
    trace = Trace(True)
    here = trace.at("cross_layers.0")
    assert here is not None
    here.add_streams(text, regions, ROWS, Packing.of(torch.ones(1, 2, dtype=torch.bool)))
    here.add_cross_attention(square, square + 1, part=".cross")
    here.add_self_attention(square + 2, square + 3, part=".self")
    kept, maps = trace.states(), trace.maps()
    assert kept is not None
    assert maps is not None
    assert torch.equal(kept["cross_layers.0.text"], text.view(2, 2, 4))
    assert torch.equal(kept["cross_layers.0.regions"], regions.view(1, 2, 3))
    assert torch.equal(maps.text_to_regions["cross_layers.0.cross"], square)
    assert torch.equal(maps.regions_to_text["cross_layers.0.cross"], square + 1)
    assert torch.equal(maps.text_to_text["cross_layers.0.self"], square + 2)
    assert torch.equal(maps.regions_to_regions["cross_layers.0.self"], square + 3)
