"""What every model family promises, on its tiny preset: padding, order, counts, gradients, saving, compiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visling import config as configs
from visling import models
from visling.errors import ConfigError
from visling.models.base import Encoder
from visling.types import Batch, Encoded, Regions, Text

ROWS, TOKENS, REGIONS = 3, 7, 5
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=models.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> Encoder:
    encoder = models.build_tiny(name).eval()
    with torch.no_grad():  # away from the symmetric start: norms and biases that matter
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def make_batch(name: str, *, regions: int = REGIONS, counts: tuple[int, ...] | None = None, slot: bool = False, links: bool = True) -> Batch:
    spec = models.spec(name)
    feature_size = spec.inputs(spec.presets["tiny"]).feature_size
    text_mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [4], [6]])
    text = Text(
        ids=torch.randint(1, 1000, (ROWS, TOKENS)) * text_mask,
        mask=text_mask,
        segments=(torch.arange(TOKENS) > 3).long().expand(ROWS, -1) * text_mask,
        slot=torch.tensor([5, 2, 4]) if slot else None,
    )
    corners = torch.rand(ROWS, regions, 2) * 0.5
    mask = torch.arange(regions) < torch.tensor(counts or (regions, max(regions - 2, 0), max(regions - 1, 0)))[:, None]
    return Batch(
        text=text,
        regions=Regions(
            features=torch.randn(ROWS, regions, feature_size),
            boxes=torch.cat([corners, corners + 0.1 + torch.rand(ROWS, regions, 2) * 0.3], dim=-1),
            mask=mask,
            size=torch.full((ROWS, 2), 100.0),
        ),
        links=(torch.rand(ROWS, TOKENS, regions) < 0.3) & text_mask[:, :, None] & mask[:, None, :] if links else None,
    )


def regions_of(batch: Batch) -> Regions:
    assert batch.regions is not None
    return batch.regions


def same(first: Encoded, second: Encoded, text: Tensor, regions: Tensor) -> None:
    """Equal at real positions, given as masks over the first one's shape."""
    assert_close(first.text[text], second.text[:, : text.shape[1]][text], **CLOSE)
    assert_close(first.regions[regions], second.regions[:, : regions.shape[1]][regions], **CLOSE)
    assert_close(first.pooled, second.pooled, **CLOSE)


@pytest.mark.parametrize("slot", [False, True])
def test_padding_is_invisible(name: str, model: Encoder, slot: bool) -> None:
    batch = make_batch(name, slot=slot)
    text, regions = batch.text, regions_of(batch)

    def garbage(tensor: Tensor, extra: int, value: float) -> Tensor:
        return torch.cat([tensor, torch.full((ROWS, extra, *tensor.shape[2:]), value).to(tensor.dtype)], dim=1)

    padded = dataclasses.replace(
        batch,
        text=dataclasses.replace(text, ids=garbage(text.ids, 2, 77), mask=garbage(text.mask, 2, 0), segments=garbage(text.segments, 2, 1)),
        regions=dataclasses.replace(
            regions, features=garbage(regions.features, 3, 1e3), boxes=garbage(regions.boxes, 3, 0.5), mask=garbage(regions.mask, 3, 0)
        ),
        links=torch.nn.functional.pad(batch.links, (0, 3, 0, 2)) if batch.links is not None else None,
    )
    same(model(batch), model(padded), text.mask, regions.mask)


def test_what_stands_on_padding_is_invisible(name: str, model: Encoder) -> None:
    batch = make_batch(name)
    text, regions = batch.text, regions_of(batch)
    other = dataclasses.replace(
        batch,
        text=dataclasses.replace(text, ids=text.ids.masked_fill(~text.mask, 99)),
        regions=dataclasses.replace(regions, features=regions.features.masked_fill(~regions.mask[..., None], 1e3)),
    )
    same(model(batch), model(other), text.mask, regions.mask)


def test_region_order_is_irrelevant(name: str, model: Encoder) -> None:
    batch = make_batch(name, counts=(REGIONS,) * ROWS)
    regions, order = regions_of(batch), torch.tensor([3, 0, 4, 1, 2])
    shuffled = dataclasses.replace(
        batch,
        regions=dataclasses.replace(regions, features=regions.features[:, order], boxes=regions.boxes[:, order]),
        links=batch.links[:, :, order] if batch.links is not None else None,
    )
    first, second = model(batch), model(shuffled)
    assert_close(first.pooled, second.pooled, **CLOSE)
    assert_close(first.text[batch.text.mask], second.text[batch.text.mask], **CLOSE)
    assert_close(first.regions[:, order], second.regions, **CLOSE)


def test_batch_order_is_irrelevant(name: str, model: Encoder) -> None:
    batch, order = make_batch(name, slot=True), torch.tensor([2, 0, 1])
    first, second = model(batch), model(batch.map(lambda tensor: tensor[order]))
    assert_close(first.pooled[order], second.pooled, **CLOSE)
    assert_close(first.text[order], second.text, **CLOSE)


def test_shared_rows_equal_repeated_rows(name: str, model: Encoder) -> None:
    batch, row = make_batch(name, slot=True), torch.tensor([0, 0, 2, 1])
    repeated = batch.map(lambda tensor: tensor[row])
    shared_regions = dataclasses.replace(repeated, regions=dataclasses.replace(regions_of(batch), row=row))
    shared_text = dataclasses.replace(repeated, text=dataclasses.replace(batch.text, row=row))
    expected = model(repeated)
    for shared in (shared_regions, shared_text):
        assert_close(model(shared).pooled, expected.pooled, **CLOSE)
        assert_close(model(shared).regions, expected.regions, **CLOSE)


@pytest.mark.parametrize(("regions", "counts"), [(0, (0, 0, 0)), (1, (1, 1, 0)), (100, (100, 0, 1)), (5, (0, 0, 0))])
def test_any_number_of_regions_is_finite(name: str, model: Encoder, regions: int, counts: tuple[int, ...]) -> None:
    batch = make_batch(name, regions=regions, counts=counts)
    encoded = model(batch)
    assert encoded.regions.shape == (ROWS, regions, model.dims.regions)
    (encoded.pooled.sum() + encoded.text.sum() + encoded.regions.sum()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    if not any(counts):
        without = model(dataclasses.replace(batch, regions=None, links=None))
        assert without.regions.shape == (ROWS, 0, model.dims.regions)
        assert_close(encoded.pooled, without.pooled, **CLOSE)


@pytest.mark.parametrize("slot", [False, True])
def test_gradients_reach_every_parameter(name: str, model: Encoder, slot: bool) -> None:
    batch = make_batch(name, slot=slot)
    encoded = model(batch)
    weights = torch.randn(model.dims.pooled)
    ((encoded.pooled * weights).sum() + (encoded.text * weights).sum()).backward()
    skipped = {"pooler.dense.weight", "pooler.dense.bias"} if slot else set()
    without = {n for n, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert without == skipped


def test_capture_changes_nothing(name: str, model: Encoder) -> None:
    batch = make_batch(name)
    plain, captured = model(batch), model(batch, capture=True)
    assert plain.maps is None
    assert plain.states is None
    assert_close(plain.text, captured.text, **CLOSE)
    assert_close(plain.pooled, captured.pooled, **CLOSE)
    assert captured.states
    for layer in captured.maps.text_to_text.keys() & captured.maps.text_to_regions.keys():
        rows = captured.maps.text_to_text[layer].sum(-1) + captured.maps.text_to_regions[layer].sum(-1)
        assert_close(rows, torch.ones_like(rows))
        assert captured.maps.text_to_regions[layer].shape[2:] == (TOKENS, REGIONS)
        assert captured.maps.regions_to_text[layer].shape[2:] == (REGIONS, TOKENS)


def test_weights_saved_and_loaded_give_equal_outputs(name: str, model: Encoder) -> None:
    batch = make_batch(name)
    twin = models.build(name, model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(batch).pooled, model(batch).pooled)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)  # tied tensors would be written twice


def test_compiled_equals_eager(name: str, model: Encoder) -> None:
    batch = make_batch(name, slot=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(batch).pooled, model(batch).pooled, **CLOSE)
    assert_close(compiled(batch).text, model(batch).text, **CLOSE)


def test_half_precision_features_are_read(name: str, model: Encoder) -> None:
    batch = make_batch(name)
    half = dataclasses.replace(batch, regions=dataclasses.replace(regions_of(batch), features=regions_of(batch).features.half()))
    assert model(half).pooled.dtype == torch.float32
    assert_close(model(half).pooled, model(batch).pooled, atol=1e-2, rtol=0)


def test_word_table_is_the_models_own(model: Encoder) -> None:
    assert any(parameter is model.word_embeddings.weight for parameter in model.parameters())


def test_every_preset_survives_a_round_trip_and_is_described(name: str) -> None:
    spec = models.spec(name)
    for config in spec.presets.values():
        assert configs.from_dict(spec.config, configs.to_dict(config)) == config
        inputs = spec.inputs(config)
        with torch.device("meta"):
            encoder = models.build(name, config)
        assert encoder.config == config
        assert inputs.max_tokens > 0
        assert inputs.feature_size > 0
        assert encoder.untrained <= {n for n, _ in encoder.named_parameters()}


def _unknown_name() -> None:
    models.spec("visualbart")


def _foreign_config() -> None:
    models.build("visualbert", object())


@pytest.mark.parametrize(("wrong", "message"), [(_unknown_name, "Did you mean 'visualbert'"), (_foreign_config, "configured by VisualBertConfig")])
def test_errors_by_name(wrong: Callable[[], None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()
