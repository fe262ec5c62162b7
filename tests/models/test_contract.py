"""What every model family promises, on its tiny preset: head kinds, objectives, gradients, padding, order, counts, what
is read, maps, saving, compiling.

One file although it is long: a family outside the package runs all of it by this one import.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fixtures.attention_ways import Way, attend_by
from fixtures.releases import REGION_LOSSES
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling import config as configs
from visling import models
from visling.errors import ConfigError
from visling.models.base import Encoder
from visling.nn import attention, heads
from visling.objectives.base import Objective, PretrainStep
from visling.objectives.image_qa import ImageQA
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import MaskedRegions, RegionLosses
from visling.objectives.matching import Matching
from visling.objectives.region_contrast import RegionContrast
from visling.types import (
    EVERYTHING,
    IGNORE,
    NOTHING,
    POOLED,
    Batch,
    Encoded,
    Head,
    Reads,
    Regions,
    Slots,
    Targets,
    Text,
)

ROWS, TOKENS, REGIONS, GROUP = 4, 7, 5, 2
LENGTHS, COUNTS = (TOKENS, 4, 6, 5), (REGIONS, 3, 4, 1)
ONE_WITHOUT = (REGIONS, 3, 4, 0)
"""Regions of each row where one has none."""
VOCABULARY, FEATURES = 1000, 16
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}

# ------------------------------------------------------------------------------------------------------------------
# what is asked of every family

KINDS: Mapping[str, Head] = {
    "classify": Head(kind="classify", outputs=6),
    "score": Head(kind="score", outputs=1),
    "pair": Head(kind="pair", outputs=3),
    "matching": Head(kind="classify", outputs=2),
    "vocabulary": Head(kind="vocabulary", outputs=VOCABULARY),
    "slots_regions": Head(kind="slots_regions", outputs=1),
    "regions": Head(kind="regions", outputs=1),
    "region_targets": Head(kind="region_targets", outputs=9, options={"classes": 4, "attributes": 3, "features": 2}),
    "projection": Head(kind="projection", outputs=8),
}
"""What a family names a style for -> a small head of it."""
READS: Mapping[str, set[str]] = {
    **{kind: {"pooled"} for kind in ("classify", "score", "pair", "matching")},
    **{kind: {"regions"} for kind in ("regions", "region_targets", "projection")},
    "vocabulary": {"text"},
    "slots_regions": {"text", "regions"},
}
"""Kind -> fields of `Encoded` that its head is given."""
ALSO_NAMED: Mapping[str, Head] = {"entailment": Head(kind="classify", outputs=3)}
"""Parts of released files that have a style of their own besides the kinds."""

_REGION_LOSSES: Mapping[str, RegionLosses] = {
    **REGION_LOSSES,
    "vilbert_l2": RegionLosses(features="l2"),
    "vilbert_nce": RegionLosses(features="nce", num_negatives=10),
}
_SMALL = {"num_classes": 7, "num_attributes": 4, "feature_size": FEATURES}
OBJECTIVES: Mapping[str, tuple[type[Objective], str, Mapping[str, Any]]] = {
    "masked_lm": (MaskedLM, "vocabulary", {}),
    "matching": (Matching, "matching", {}),
    "image_qa": (ImageQA, "classify", {"num_answers": 6}),
    **{
        f"masked_regions_{name}": (MaskedRegions, "region_targets", {"losses": dataclasses.replace(losses, **_SMALL)})
        for name, losses in _REGION_LOSSES.items()
    },
    "region_contrast": (
        RegionContrast,
        "projection",
        {"queue_size": 2 * ROWS * REGIONS, "projection_size": 8, "momentum": 0.5},
    ),
}
"""Name -> objective, kind of its head, settings."""

QUADRANTS = ("text_to_text", "text_to_regions", "regions_to_text", "regions_to_regions")
_JOINT = ("layers.0", "layers.1")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What differs between families on their tiny presets. The defaults are those of a plain single stream, whose
    layers are called layers.0, layers.1: such a family needs no entry."""

    feeds: Mapping[str, set[str]] = field(default_factory=lambda: {"pooler": {"pooled"}})
    """Parameters, by the start of their names, on which only some of the outputs depend -> fields of `Encoded` that
    do."""
    frozen_first_rows: bool = False
    """Whether the three text tables learn nothing from look-ups of row 0."""
    maps: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(QUADRANTS, _JOINT))
    """Quadrant -> layers with attention of that kind."""
    states: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"both": ("embeddings", *_JOINT)})
    """Stream -> captured states in their order; the last are those that are returned."""
    behind_regions: int = 0
    """Positions behind the regions in captured maps and states: the whole image; in VL-BERT [END] too."""
    one_of_each: Mapping[str, Any] = field(default_factory=lambda: {"num_layers": 1})
    """Settings with one layer of each sort: compiling takes time by the layer."""

    @property
    def single_stream(self) -> bool:
        return "both" in self.states


_LXMERT_FEEDS: Mapping[str, set[str]] = {
    "pooler": {"pooled"},
    "cross_layers.1.text_": {"text", "pooled"},
    "cross_layers.1.region_": {"regions"},
}
_LXMERT = Expected(
    feeds=_LXMERT_FEEDS,
    frozen_first_rows=True,
    maps={
        "text_to_text": ("text_layers.0", "text_layers.1", "cross_layers.0.self", "cross_layers.1.self"),
        "text_to_regions": ("cross_layers.0.cross", "cross_layers.1.cross"),
        "regions_to_text": ("cross_layers.0.cross", "cross_layers.1.cross"),
        "regions_to_regions": ("region_layers.0", "region_layers.1", "cross_layers.0.self", "cross_layers.1.self"),
    },
    states={
        "text": ("text_embeddings", "text_layers.0", "text_layers.1", "cross_layers.0.text", "cross_layers.1.text"),
        "regions": (
            "region_embeddings",
            "region_layers.0",
            "region_layers.1",
            "cross_layers.0.regions",
            "cross_layers.1.regions",
        ),
    },
    one_of_each={"num_text_layers": 1, "num_region_layers": 1, "num_cross_layers": 1},
)
EXPECTED: Mapping[str, Expected] = {
    "vlbert": Expected(behind_regions=2),
    "vilbert-baseline": Expected(frozen_first_rows=True, behind_regions=1),
    "lxmert": _LXMERT,
    "cvlp": dataclasses.replace(
        _LXMERT, feeds={f"lxmert.{prefix}": fields for prefix, fields in _LXMERT_FEEDS.items()}
    ),
    "vilbert": Expected(
        feeds={
            "text_pooler": {"pooled"},
            "region_pooler": {"pooled"},
            "text_layers.1": {"text", "pooled"},
            "co_attention_layers.1.text_": {"text", "pooled"},
            "region_layers.1": {"regions", "pooled"},
            "co_attention_layers.1.region": {"regions", "pooled"},
        },
        maps={
            "text_to_text": ("text_layers.0", "text_layers.1"),
            "text_to_regions": ("co_attention_layers.0", "co_attention_layers.1"),
            "regions_to_text": ("co_attention_layers.0", "co_attention_layers.1"),
            "regions_to_regions": ("region_layers.0", "region_layers.1"),
        },
        states={
            "text": (
                "text_embeddings",
                "co_attention_layers.0.text",
                "text_layers.0",
                "co_attention_layers.1.text",
                "text_layers.1",
            ),
            "regions": (
                "region_embeddings",
                "co_attention_layers.0.regions",
                "region_layers.0",
                "co_attention_layers.1.regions",
                "region_layers.1",
            ),
        },
        behind_regions=1,
        one_of_each={"num_layers": 1, "num_region_layers": 1, "text_layers_before": (0,), "region_layers_before": (0,)},
    ),
}


def expected_of(name: str) -> Expected:
    return EXPECTED.get(name, Expected())


# ---------------------------------------------------------------------------------------------------- models and inputs


@pytest.fixture(params=models.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(name: str, **changes: Any) -> Encoder:
    """The tiny preset with few words, away from its symmetric start: norms and biases that matter."""
    encoder = models.build(
        name, dataclasses.replace(models.spec(name).presets["tiny"], vocab_size=VOCABULARY, **changes)
    ).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


@functools.cache
def _original(name: str) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build(name)


@pytest.fixture
def model(name: str) -> Encoder:
    return copy.deepcopy(_original(name))  # three times faster than building it


def styles(name: str) -> dict[str, str]:
    """Kind -> style of the family's main layout."""
    spec = models.spec(name)
    return {kind: style for (layout, kind), style in spec.head_styles.items() if layout == spec.layout}


def make_head(name: str, kind: str, model: Encoder) -> Any:
    group = GROUP if kind in ("score", "pair") else 1
    return heads.build(
        KINDS[kind], model.dims, style=styles(name)[kind], words=model.word_embeddings, group=group
    ).eval()


def make_batch(
    *,
    regions: int = REGIONS,
    counts: tuple[int, ...] = COUNTS,
    slot: bool = False,
    links: bool = True,
    hidden: bool = False,
) -> Batch:
    text_mask = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    text = Text(
        ids=torch.randint(1, VOCABULARY, (ROWS, TOKENS)) * text_mask,
        mask=text_mask,
        segments=(torch.arange(TOKENS) > 3).long().expand(ROWS, -1) * text_mask,
        answer_at=torch.tensor([5, 2, 4, 3]) if slot else None,
    )
    corners = torch.rand(ROWS, regions, 2) * 0.5
    mask = torch.arange(regions) < torch.tensor(counts)[:, None]
    batch = Batch(
        text=text,
        regions=Regions(
            features=torch.randn(ROWS, regions, FEATURES),
            boxes=torch.cat([corners, corners + 0.1 + torch.rand(ROWS, regions, 2) * 0.3], dim=-1),
            mask=mask,
            size=torch.full((ROWS, 2), 100.0),
            hidden=(torch.arange(regions) % 2 == 1) & mask if hidden else None,
        ),
        links=(torch.rand(ROWS, TOKENS, regions) < 0.3) & text_mask[:, :, None] & mask[:, None, :] if links else None,
    )
    batch.validate()
    return batch


def regions_of(batch: Batch) -> Regions:
    assert batch.regions is not None
    return batch.regions


def text_alone(batch: Batch) -> Batch:
    return dataclasses.replace(batch, regions=None, links=None)


SLOTS = Slots(
    at=torch.tensor([[1, 3], [2, 0], [5, 4], [3, 0]]),
    mask=torch.tensor([[True, True], [True, False], [True, True], [True, False]]),
)
"""Of tokens, in every row."""


def logits(kind: str, head: nn.Module, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
    """Logits of a head for a batch, by name of its output."""
    grouped = dataclasses.replace(batch, group=GROUP if kind == "score" else 1)
    found = heads.read(KINDS[kind].kind, head, encoded, grouped, at=SLOTS.at)
    return found if isinstance(found, dict) else {kind: found}


def expected_shapes(kind: str, encoded: Encoded) -> dict[str, tuple[int, ...]]:
    rows, regions, slots = ROWS, encoded.regions.shape[1], SLOTS.at.shape[1]
    candidates = regions + (encoded.whole is not None)
    outputs = KINDS[kind].outputs
    return {
        "classify": {kind: (rows, outputs)},
        "matching": {kind: (rows, outputs)},
        "score": {kind: (rows // GROUP, GROUP)},
        "pair": {kind: (rows // GROUP, outputs)},
        "vocabulary": {kind: (rows, slots, outputs)},
        "slots_regions": {kind: (rows, slots, regions)},
        "regions": {kind: (rows, candidates)},
        "region_targets": {option: (rows, candidates, width) for option, width in KINDS[kind].options.items()},
        "projection": {kind: (rows, regions, outputs)},
    }[kind]


def counted(kind: str, values: Tensor, batch: Batch) -> Tensor:
    """Where a loss would look, broadcastable to the logits."""
    real = regions_of(batch).mask
    if kind == "vocabulary":
        return SLOTS.mask[..., None]
    if kind == "slots_regions":
        return SLOTS.mask[..., None] & real[:, None]
    if kind in ("regions", "region_targets"):
        real = F.pad(real, (0, values.shape[1] - real.shape[1]), value=True)  # the whole image, where a family has it
        return real if kind == "regions" else real[..., None]
    return real[..., None] if kind == "projection" else torch.ones((), dtype=torch.bool)


def loss_of(kind: str, found: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """A loss without a softmax, which would leave the biases of scores at rest."""
    total = torch.zeros(())
    for values in found.values():
        chosen = values[counted(kind, values, batch).expand_as(values)]
        total = total + F.binary_cross_entropy_with_logits(chosen, torch.rand_like(chosen))
    return total


class Answers(nn.Module):
    """An encoder with a head of every kind that its family has."""

    def __init__(self, name: str, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({kind: make_head(name, kind, encoder) for kind in KINDS if kind in styles(name)})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        encoded = self.encoder(batch)
        return {
            f"{kind}.{part}": values
            for kind, head in self.heads.items()
            for part, values in logits(kind, head, encoded, batch).items()
        }


def at_rest(module: nn.Module) -> set[str]:
    """Names of trainable parameters without a gradient, or with one of zero."""
    return {name for name, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}


def not_fed(name: str, model: Encoder, reads: set[str]) -> set[str]:
    """Names of parameters that the given fields of `Encoded` do not depend on."""
    prefixes = tuple(prefix for prefix, fields in expected_of(name).feeds.items() if not fields & reads)
    return {n for n, _ in model.named_parameters() if prefixes and n.startswith(prefixes)}


def not_called_for(name: str, batch: Batch) -> set[str]:
    """Names of VL-BERT's vectors for hidden regions and for rows without any, where the batch has none."""
    if name != "vlbert":
        return set()
    regions = regions_of(batch)
    return (set() if regions.hidden is not None else {"mask_word", "mask_feature"}) | (
        set() if not regions.mask.any(1).all() else {"text_only"}
    )


def same(first: Encoded, second: Encoded, text: Tensor, regions: Tensor) -> None:
    """Equal at real positions, given as masks over the first one's shape."""
    assert_close(first.text[text], second.text[:, : text.shape[1]][text], **CLOSE)
    assert_close(first.regions[regions], second.regions[:, : regions.shape[1]][regions], **CLOSE)
    assert_close(first.pooled, second.pooled, **CLOSE)


# ---------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_kind(name: str, kind: str) -> None:
    model = copy.deepcopy(_original(name))
    head = make_head(name, kind, model)
    batch = make_batch(hidden=True)
    encoded = model(batch)
    found = logits(kind, head, encoded, batch)
    assert {part: tuple(values.shape) for part, values in found.items()} == expected_shapes(kind, encoded)
    loss = loss_of(kind, found, batch)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert at_rest(head) == set()
    assert at_rest(model) == not_fed(name, model, READS[kind]) | not_called_for(name, batch)
    assert all(p.grad is None or p.grad.isfinite().all() for p in (*model.parameters(), *head.parameters()))


def test_every_layout_names_styles_that_exist(name: str, model: Encoder) -> None:
    spec = models.spec(name)
    for (layout, kind), style in spec.head_styles.items():
        assert layout in spec.keys
        head = heads.build(
            {**KINDS, **ALSO_NAMED}[kind], model.dims, style=style, words=model.word_embeddings, group=GROUP
        )
        assert list(head.parameters())


# ----------------------------------------------------------------------------------------------------------- objectives


def make_targets(*, labelled: bool = True) -> Targets:
    """Labels of `make_batch`, or the same fields with nothing to be told."""
    chosen = torch.tensor([[True, True], [True, False], [True, True], [False, False]]) & labelled

    def label(*values: int) -> Tensor:
        return torch.tensor(values) if labelled else torch.full((len(values),), IGNORE)

    return Targets(
        token_slots=Slots(at=SLOTS.at, mask=SLOTS.mask & labelled),
        token_ids=torch.randint(1, VOCABULARY, SLOTS.at.shape),
        class_slots=Slots(at=torch.tensor([[0, 4], [2, 0], [1, 3], [0, 0]]), mask=chosen),
        feature_slots=Slots(at=torch.tensor([[1, 3], [1, 0], [3, 1], [0, 0]]), mask=chosen),
        region_probs=torch.rand(ROWS, 2, 7).softmax(-1),
        region_classes=torch.randint(0, 7, (ROWS, 2)),
        region_weights=torch.rand(ROWS, 2),
        region_attributes=torch.randint(0, 4, (ROWS, 2)),
        attribute_weights=torch.rand(ROWS, 2),
        region_features=torch.randn(ROWS, REGIONS, FEATURES),
        matched=label(1, 0, IGNORE, 1),
        answer=label(2, IGNORE, 5, 0),
    )


def make_objective(name: str, objective: str, model: Encoder) -> Objective:
    kind, wanted, settings = OBJECTIVES[objective]
    style = styles(name)[wanted]
    more = {"encoder": model} if kind is RegionContrast else {}
    return kind(model.dims, style, model.word_embeddings, **settings, **more)  # type: ignore[arg-type, call-arg]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(name: str, model: Encoder, objective: str) -> None:
    module = make_objective(name, objective, model)
    batch, targets = make_batch(hidden=True), make_targets()
    if isinstance(module, RegionContrast):
        for _ in range(2):  # its queue holds two batches
            module.fill((make_batch(counts=(REGIONS,) * ROWS), targets))
    loss = module(PretrainStep(model=model, batch=batch, encoded=model(batch), targets=targets))
    loss.value.backward()
    assert loss.value.shape == ()
    assert loss.value.isfinite()
    assert loss.value > 0
    assert all(total.isfinite() and count > 0 and not total.requires_grad for total, count in loss.parts.values())
    assert ("masked_regions" if objective.startswith("masked_regions") else objective) in loss.parts
    assert loss.terms is not None
    assert {key: int(count) for key, count in module.count(batch, targets).items()} == {
        key: int(term.count) for key, term in loss.terms.items()
    }, "what is counted beforehand is what the loss divides by"
    assert_close(sum(term.over(term.count) for term in loss.terms.values()), loss.value)
    assert at_rest(module) == set()
    assert at_rest(model) == not_fed(name, model, READS[OBJECTIVES[objective][1]]) | not_called_for(name, batch)
    few = make_batch(hidden=True, counts=ONE_WITHOUT)
    assert module(PretrainStep(model=model, batch=few, encoded=model(few), targets=targets)).value.isfinite()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_without_targets_is_exactly_zero(name: str, model: Encoder, objective: str) -> None:
    module = make_objective(name, objective, model)
    targets = make_targets(labelled=False)  # the queue of region contrast is empty
    images = make_batch(hidden=True, counts=ONE_WITHOUT)
    for batch, features in ((images, targets.region_features), (text_alone(images), torch.zeros(ROWS, 0, FEATURES))):
        loss = module(
            PretrainStep(
                model=model,
                batch=batch,
                encoded=model(batch),
                targets=dataclasses.replace(targets, region_features=features),
            )
        )
        loss.value.backward()
        assert loss.value.item() == 0
        assert all(total == 0 for total, _ in loss.parts.values())
        assert at_rest(model) | at_rest(module) == {
            n for each in (model, module) for n, p in each.named_parameters() if p.requires_grad
        }


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("slot", [False, True])
def test_gradients_reach_every_parameter(name: str, model: Encoder, slot: bool) -> None:
    batch = make_batch(slot=slot, hidden=True)
    for each in (batch, text_alone(batch)):
        encoded = model(each)
        fields = [encoded.pooled, encoded.text[batch.text.mask], encoded.regions]
        torch.stack([(states * torch.randn(states.shape[-1])).sum() for states in fields]).sum().backward()
    answers_in_a_slot = models.spec(name).inputs(model.config).answer_slot != "none"
    assert at_rest(model) == ({"pooler.dense.weight", "pooler.dense.bias"} if slot and answers_in_a_slot else set())


def test_what_a_batch_does_not_call_for_is_at_rest(name: str, model: Encoder) -> None:
    for hidden in (False, True):
        for counts in (COUNTS, ONE_WITHOUT):
            batch = make_batch(hidden=hidden, counts=counts)
            model.zero_grad()
            encoded = model(batch)
            torch.stack(
                [(s * torch.randn(s.shape[-1])).sum() for s in (encoded.pooled, encoded.text, encoded.regions)]
            ).sum().backward()
            assert at_rest(model) == not_called_for(name, batch)


def test_rows_of_tables_learn_if_they_are_read(name: str, model: Encoder) -> None:
    batch = make_batch()
    encoded = model(batch)
    fields = [encoded.pooled, encoded.text[batch.text.mask], encoded.regions[regions_of(batch).mask]]
    torch.stack([(states * torch.randn(states.shape[-1])).sum() for states in fields]).sum().backward()
    longest = TOKENS + (
        2 if name == "vlbert" else 0
    )  # its regions share the position behind the text, [END] has the next one
    read = {
        "words": set(batch.text.ids[batch.text.mask].tolist()),
        "positions": set(range(longest)),
        "segments": {0, 1},
    }
    if name == "visualbert":
        read |= {"visual_positions": {0}, "visual_segments": {model.config.region_segment}}
    found = 0
    for parameter, tensor in model.named_parameters():
        table = parameter.removesuffix(".weight").rpartition(".")[2]
        if table in read and tensor.dim() == 2:
            assert tensor.grad is not None
            with_gradient = set(tensor.grad.any(1).nonzero().flatten().tolist())
            assert with_gradient == read[table] - ({0} if expected_of(name).frozen_first_rows else set()), parameter
            found += 1
    assert found >= 2


# --------------------------------------------------------------------------------------------------------------------
# padding, order and counts


@pytest.mark.parametrize("slot", [False, True])
def test_padding_is_invisible(name: str, model: Encoder, slot: bool) -> None:
    batch = make_batch(slot=slot, hidden=True, counts=ONE_WITHOUT)
    text, regions = batch.text, regions_of(batch)
    assert regions.hidden is not None
    assert batch.links is not None

    def garbage(tensor: Tensor, extra: int, value: float) -> Tensor:
        return torch.cat([tensor, torch.full((ROWS, extra, *tensor.shape[2:]), value).to(tensor.dtype)], dim=1)

    padded = dataclasses.replace(
        batch,
        text=dataclasses.replace(
            text, ids=garbage(text.ids, 2, 77), mask=garbage(text.mask, 2, 0), segments=garbage(text.segments, 2, 1)
        ),
        regions=dataclasses.replace(
            regions,
            features=garbage(regions.features, 3, 1e3),
            boxes=garbage(regions.boxes, 3, 0.5),
            mask=garbage(regions.mask, 3, 0),
            hidden=garbage(regions.hidden, 3, 1),
        ),
        links=F.pad(batch.links, (0, 3, 0, 2)),
    )
    same(model(batch), model(padded), text.mask, regions.mask)


def test_what_stands_on_padding_is_invisible(model: Encoder) -> None:
    batch = make_batch(counts=ONE_WITHOUT)
    text, regions = batch.text, regions_of(batch)
    other = dataclasses.replace(
        batch,
        text=dataclasses.replace(text, ids=text.ids.masked_fill(~text.mask, 99)),
        regions=dataclasses.replace(regions, features=regions.features.masked_fill(~regions.mask[..., None], 1e3)),
    )
    same(model(batch), model(other), text.mask, regions.mask)


def test_region_order_is_irrelevant(model: Encoder) -> None:
    batch = make_batch(counts=(REGIONS,) * ROWS, hidden=True)
    regions, order = regions_of(batch), torch.tensor([3, 0, 4, 1, 2])
    assert regions.hidden is not None
    assert batch.links is not None
    shuffled = dataclasses.replace(
        batch,
        regions=dataclasses.replace(
            regions, features=regions.features[:, order], boxes=regions.boxes[:, order], hidden=regions.hidden[:, order]
        ),
        links=batch.links[:, :, order],
    )
    first, second = model(batch), model(shuffled)
    assert_close(first.pooled, second.pooled, **CLOSE)
    assert_close(first.text[batch.text.mask], second.text[batch.text.mask], **CLOSE)
    assert_close(first.regions[:, order], second.regions, **CLOSE)


def test_batch_order_is_irrelevant(model: Encoder) -> None:
    batch, order = make_batch(slot=True, counts=ONE_WITHOUT), torch.tensor([2, 0, 3, 1])
    first, second = model(batch), model(batch.map(lambda tensor: tensor[order]))
    assert_close(first.pooled[order], second.pooled, **CLOSE)
    assert_close(first.text[order], second.text, **CLOSE)
    assert_close(first.regions[order], second.regions, **CLOSE)


def test_shared_rows_equal_repeated_rows(model: Encoder) -> None:
    batch, row = make_batch(slot=True, counts=ONE_WITHOUT), torch.tensor([0, 0, 2, 1, 3])
    repeated = batch.map(lambda tensor: tensor[row])
    shared_regions = dataclasses.replace(repeated, regions=dataclasses.replace(regions_of(batch), row=row))
    shared_text = dataclasses.replace(repeated, text=dataclasses.replace(batch.text, row=row))
    expected = model(repeated)
    for shared in (shared_regions, shared_text):
        assert_close(model(shared).pooled, expected.pooled, **CLOSE)
        assert_close(model(shared).regions, expected.regions, **CLOSE)


@pytest.mark.parametrize(
    ("regions", "counts"), [(0, (0, 0, 0, 0)), (1, (1, 1, 0, 1)), (100, (100, 0, 1, 50)), (5, (0, 0, 0, 0))]
)
def test_any_number_of_regions(name: str, model: Encoder, regions: int, counts: tuple[int, ...]) -> None:
    answers, batch = Answers(name, model), make_batch(regions=regions, counts=counts)
    encoded = model(batch)
    assert encoded.regions.shape == (ROWS, regions, model.dims.regions)
    found = answers(batch)
    shapes = {
        f"{kind}.{part}": shape for kind in answers.heads for part, shape in expected_shapes(kind, encoded).items()
    }
    assert {part: tuple(values.shape) for part, values in found.items()} == shapes
    real = regions_of(batch).mask
    finite = {
        part: values[:, :, real.any(0)] if part.startswith("slots_regions") else values
        for part, values in found.items()
    }
    assert all(values.isfinite().all() for values in found.values())
    torch.stack([values.clamp(-1e4, 1e4).sum() for values in finite.values()]).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in answers.parameters())
    if not any(counts):
        without = model(text_alone(batch))
        assert without.regions.shape == (ROWS, 0, model.dims.regions)
        assert_close(encoded.pooled, without.pooled, **CLOSE)


# ------------------------------------------------------------------------------------------- what is computed, and read

EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-8}
"""In double precision."""
REGION_SLOTS = Slots(
    at=torch.tensor([[0, 4], [2, 0], [1, 3], [0, 0]]),
    mask=torch.tensor([[True, True], [True, False], [True, True], [False, False]]),
)
"""Of regions, where one row has none."""
ROUNDED = dataclasses.replace(SLOTS, taken=torch.tensor([0, 1, 2, 4, 5, 6, 3]))
"""The chosen slots of tokens, and a free one."""
ONLY_SOME: Mapping[str, Reads] = {
    "pooled": POOLED,
    "slots of text": dataclasses.replace(NOTHING, text=(SLOTS,)),
    "regions": dataclasses.replace(NOTHING, regions=None),
    "slots of regions": dataclasses.replace(NOTHING, regions=(REGION_SLOTS,)),
    "pooled and slots": Reads(text=(ROUNDED, SLOTS), regions=(REGION_SLOTS,), whole=False),
    "text and whole image": dataclasses.replace(NOTHING, text=None, whole=True),
    "whole image": dataclasses.replace(NOTHING, whole=True),
    "nothing": NOTHING,
}
NO_SLOTS = dataclasses.replace(REGION_SLOTS, mask=torch.zeros_like(REGION_SLOTS.mask))


def reads_of(some: str, batch: Batch) -> Reads:
    """As `ONLY_SOME` has it; of text alone no region is chosen, as collate has it."""
    reads = ONLY_SOME[some]
    return dataclasses.replace(reads, regions=(NO_SLOTS,)) if reads.regions and batch.regions is None else reads


def _few() -> Batch:
    return make_batch(hidden=True, counts=ONE_WITHOUT)


def _shared_text() -> Batch:
    batch = _few()
    return dataclasses.replace(
        batch,
        links=None,
        text=dataclasses.replace(batch.text, row=torch.tensor([0, 0, 2, 3]), answer_at=torch.tensor([5, 2, 4, 3])),
    )


def _shared_regions() -> Batch:
    batch = _few()
    return dataclasses.replace(
        batch, links=None, regions=dataclasses.replace(regions_of(batch), row=torch.tensor([0, 2, 2, 3]))
    )


COMPOSITIONS: Mapping[str, Callable[[], Batch]] = {
    "pairs": _few,
    "answers in a slot": lambda: make_batch(slot=True, counts=ONE_WITHOUT),
    "text alone": lambda: text_alone(make_batch()),
    "a text with two images": _shared_text,
    "an image with two texts": _shared_regions,
}


def real_masks(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the batch's rows: (B, T) and (B, R)."""
    text, regions = batch.text, batch.regions
    text_mask = text.mask if text.row is None else text.mask[text.row]
    if regions is None:
        return text_mask, text_mask[:, :0]
    return text_mask, regions.mask if regions.row is None else regions.mask[regions.row]


def marked(slots: tuple[Slots, ...] | None, real: Tensor) -> Tensor:
    """Real positions that are read, one slot at a time."""
    if slots is None:
        return real
    found = torch.zeros_like(real)
    for each in slots:
        for row, slot in each.mask.nonzero().tolist():
            found[row, each.at[row, slot]] = True
    return found & real


def read_states(encoded: Encoded, reads: Reads, batch: Batch) -> dict[str, Tensor]:
    """The states of which a caller said that it reads them."""
    text_mask, region_mask = real_masks(batch)
    found = {
        "text": encoded.text[marked(reads.text, text_mask)],
        "regions": encoded.regions[marked(reads.regions, region_mask)],
    }
    if reads.pooled:
        found["pooled"] = encoded.pooled
    if reads.whole and encoded.whole is not None:
        found["whole"] = encoded.whole
    return found


def with_gradients(model: Any, batch: Batch, reads: Reads, seen: Reads) -> tuple[Encoded, dict[str, Tensor]]:
    """The encoded batch, of which `reads` is asked for, and gradients of a sum over the states that `seen` names."""
    model.zero_grad()
    encoded = model(batch, reads=reads)
    scalar = torch.zeros((), dtype=torch.float64)
    for states in read_states(encoded, seen, batch).values():
        weights = torch.linspace(-1, 2, states.shape[-1], dtype=torch.float64)
        scalar = scalar + (states * weights).sin().sum()
    if scalar.requires_grad:
        scalar.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    return encoded, gradients


def assert_equal_where_read(found: Encoded, expected: Encoded, reads: Reads, batch: Batch) -> None:
    """What is read is equal; of the rest every state is equal or zero."""
    ours = read_states(found, reads, batch)
    assert_close(ours, read_states(expected, reads, batch), **EXACT)
    for some, all_ in ((found.text, expected.text), (found.regions, expected.regions)):
        assert some.shape == all_.shape
        assert_close(some, torch.where((some != 0).any(-1, keepdim=True), all_, 0.0), **EXACT)
    assert found.pooled.shape == (expected.pooled.shape if reads.pooled else (len(expected.pooled), 0))


def counted_by_host(batch: Batch, extra: int) -> Batch:
    """The batch with the numbers of its real positions, and so many more, filled with padding; no more than there
    are."""

    def count(mask: Tensor) -> int:
        return min(int(mask.sum()) + extra, mask.numel())

    text, regions = batch.text, batch.regions
    text_mask, region_mask = real_masks(batch)
    counted = dataclasses.replace(
        batch,
        text=dataclasses.replace(text, count=count(text.mask), shared=count(text_mask)),
        regions=None
        if regions is None
        else dataclasses.replace(regions, count=count(regions.mask), shared=count(region_mask)),
    )
    counted.validate()
    return counted


@pytest.mark.parametrize("way", ["padded", "rows"])
@pytest.mark.parametrize("some", ONLY_SOME)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_what_is_not_read_changes_nothing(
    model: Encoder, composition: str, some: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend_by(monkeypatch, way)
    model, batch = model.double(), COMPOSITIONS[composition]()
    reads = reads_of(some, batch)
    expected, expected_gradients = with_gradients(model, batch, EVERYTHING, reads)
    for given in (batch, counted_by_host(batch, 0), counted_by_host(batch, 2)):
        found, gradients = with_gradients(model, given, reads, reads)
        assert_equal_where_read(found, expected, reads, batch)
        assert_close(gradients, expected_gradients, **EXACT)


@pytest.mark.parametrize("way", ["padded", "rows"])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_counts_of_the_host_change_nothing(
    model: Encoder, composition: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend_by(monkeypatch, way)
    model, batch = model.double(), COMPOSITIONS[composition]()
    expected, expected_gradients = with_gradients(model, batch, EVERYTHING, EVERYTHING)
    for extra in (0, 1, 100):  # 100: all positions
        found, gradients = with_gradients(model, counted_by_host(batch, extra), EVERYTHING, EVERYTHING)
        assert_equal_where_read(found, expected, EVERYTHING, batch)
        assert_close(gradients, expected_gradients, **EXACT)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_states_are_zeros_at_padding(model: Encoder, composition: str) -> None:
    batch = COMPOSITIONS[composition]()
    text_mask, region_mask = real_masks(batch)
    for given in (batch, counted_by_host(batch, 2)):
        encoded = model(given)
        assert not encoded.text[~text_mask].any()
        assert not encoded.regions[~region_mask].any()
        assert encoded.text[text_mask].all()
        assert encoded.regions[region_mask].all()


@pytest.mark.parametrize("way", ["padded", "rows"])
@pytest.mark.parametrize("slot", [False, True])
def test_rows_do_not_depend_on_their_batch(
    model: Encoder, slot: bool, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and without any padding, or with other rows, in any order, padded wider: a row's states are the same."""
    attend_by(monkeypatch, way)
    model, batch = model.double(), make_batch(slot=slot, hidden=True, counts=ONE_WITHOUT)
    expected = model(batch)

    def rows_of(chosen: list[int], tokens: int, regions: int) -> Batch:
        """Some rows, cut or padded to these lengths."""
        some = batch.map(lambda tensor: tensor[chosen])
        text, seen = some.text, regions_of(some)
        assert some.links is not None
        assert seen.hidden is not None

        def fit(tensor: Tensor, length: int) -> Tensor:
            padding = tensor.new_ones(len(tensor), max(length - tensor.shape[1], 0), *tensor.shape[2:])
            return torch.cat([tensor[:, :length], padding], dim=1)

        def fit_mask(mask: Tensor, length: int) -> Tensor:
            return F.pad(mask[:, :length], (0, max(length - mask.shape[1], 0)))

        return dataclasses.replace(
            some,
            text=dataclasses.replace(
                text,
                ids=fit(text.ids, tokens),
                mask=fit_mask(text.mask, tokens),
                segments=fit(text.segments, tokens),
            ),
            regions=dataclasses.replace(
                seen,
                features=fit(seen.features, regions),
                boxes=fit(seen.boxes, regions),
                mask=fit_mask(seen.mask, regions),
                hidden=fit_mask(seen.hidden, regions),
            ),
            links=F.pad(some.links[:, :tokens, :regions], (0, max(regions - REGIONS, 0), 0, max(tokens - TOKENS, 0))),
        )

    alone = [([row], LENGTHS[row], ONE_WITHOUT[row]) for row in range(ROWS)]
    together = [(torch.randint(ROWS, (size,)).tolist(), TOKENS + size, REGIONS + size) for size in (1, 2, 3, 6)]
    for chosen, tokens, regions in (*alone, *together):
        found = model(rows_of(chosen, tokens, regions))
        assert_close(found.pooled, expected.pooled[chosen], **EXACT)
        for place, row in enumerate(chosen):
            for ours, theirs, length in (
                (found.text, expected.text, LENGTHS[row]),
                (found.regions, expected.regions, ONE_WITHOUT[row]),
            ):
                assert_close(ours[place, :length], theirs[row, :length], **EXACT)
            assert found.whole is None or (
                expected.whole is not None and torch.allclose(found.whole[place], expected.whole[row], **EXACT)
            )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_says_all_that_it_reads(name: str, model: Encoder, objective: str) -> None:
    model, targets = model.double(), make_targets()
    module = make_objective(name, objective, model).double()
    targets = targets.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    for batch in (make_batch(hidden=True), _few()):
        found = []
        for reads in (EVERYTHING, module.reads_of_encoded(batch, targets)):
            twin = copy.deepcopy(module)  # contrast moves its queue
            torch.manual_seed(4)  # negatives are drawn
            model.zero_grad()
            loss = twin(
                PretrainStep(model=model, batch=batch, encoded=model(batch, reads=reads), targets=targets)
            ).value
            loss.backward()
            found.append(
                [loss, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]
            )
        assert_close(found[1], found[0], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_given_all_that_it_reads(name: str, model: Encoder, kind: str) -> None:
    model, head = model.double(), make_head(name, kind, model).double()
    batch = dataclasses.replace(_few(), phrases=SLOTS, group=GROUP if kind == "score" else 1)
    asked = KINDS[kind].kind
    found = []
    for reads in (EVERYTHING, heads.reads_of_encoded(asked, batch)):
        output = heads.read(asked, head, model(batch, reads=reads), batch)
        parts = output if isinstance(output, dict) else {kind: output}
        if kind == "slots_regions":
            parts = {kind: parts[kind][SLOTS.mask]}
        found.append(parts)
    assert_close(found[1], found[0], **EXACT)


# ------------------------------------------------------------------------------------------------------ maps and states


def test_attention_has_four_quadrants(name: str, model: Encoder) -> None:
    batch = make_batch(hidden=True, counts=ONE_WITHOUT)
    maps = model(batch, capture=True).maps
    assert maps is not None
    assert {quadrant: tuple(getattr(maps, quadrant)) for quadrant in QUADRANTS} == dict(expected_of(name).maps)
    extra = expected_of(name).behind_regions
    sizes = {"text": TOKENS, "regions": REGIONS + extra}
    real = {"text": batch.text.mask, "regions": F.pad(regions_of(batch).mask, (0, extra), value=True)}
    if name == "vlbert":
        real["regions"][-1, REGIONS] = False  # no region, no whole image
    sums: dict[tuple[str, str], Tensor] = {}
    for quadrant in QUADRANTS:
        source, _, target = quadrant.partition("_to_")
        for layer, probs in getattr(maps, quadrant).items():
            assert probs.shape[0] == ROWS
            assert probs.shape[2:] == (sizes[source], sizes[target]), (quadrant, layer)
            assert ((probs > 0) == real[target][:, None, None, :]).all(), (
                quadrant,
                layer,
            )  # padding is never read, everything else is
            share = probs.sum(-1)
            readable = real[target].any(1)
            key = (source, layer) if expected_of(name).single_stream else (quadrant, layer)
            sums[key] = sums.get(key, torch.zeros_like(share)) + share
            if not expected_of(name).single_stream:  # attention over nothing gives nothing
                assert_close(share, readable[:, None, None].expand_as(share).float())
    if expected_of(name).single_stream:
        assert all(torch.allclose(total, torch.ones_like(total)) for total in sums.values())


def test_attention_as_computed_is_what_the_maps_show_and_keeps_its_graph(name: str, model: Encoder) -> None:
    batch = make_batch(counts=ONE_WITHOUT)
    encoded = model(batch, capture=True)
    assert encoded.maps is not None
    assert encoded.attention is not None
    seen = set()
    for key, probs in encoded.attention.items():
        layer, _, kind = key.rpartition("/")
        if kind == "joint":
            parts = [
                torch.cat([getattr(encoded.maps, f"{source}_to_{target}")[layer] for target in ("text", "regions")], -1)
                for source in ("text", "regions")
            ]
            assert torch.equal(probs, torch.cat(parts, -2))
            seen |= {(quadrant, layer) for quadrant in QUADRANTS}
        else:
            quadrant = kind if "_to_" in kind else f"{kind}_to_{kind}"
            assert torch.equal(probs, getattr(encoded.maps, quadrant)[layer])
            seen.add((quadrant, layer))
    assert seen == {(quadrant, layer) for quadrant in QUADRANTS for layer in getattr(encoded.maps, quadrant)}
    gradients = torch.autograd.grad(
        encoded.text.sum() + encoded.regions.sum(), list(encoded.attention.values()), allow_unused=True
    )
    assert all(gradient is not None for gradient in gradients)
    behind = (0 if batch.regions is None else REGIONS) + len(model.behind_regions)
    assert {probs.shape[-1] for probs in encoded.maps.text_to_regions.values()} == {behind}
    assert {probs.shape[-1] for probs in encoded.maps.regions_to_text.values()} == {TOKENS + len(model.behind_text)}


def test_states_are_those_of_every_layer(name: str, model: Encoder) -> None:
    batch = make_batch()
    encoded = model(batch, capture=True)
    assert encoded.states is not None
    assert encoded.states.keys() == {state for stream in expected_of(name).states.values() for state in stream}
    behind = REGIONS + expected_of(name).behind_regions
    for stream, layers in expected_of(name).states.items():
        positions = {"text": TOKENS, "regions": behind, "both": TOKENS + behind}[stream]
        assert {encoded.states[layer].shape[:2] for layer in layers} == {(ROWS, positions)}
        last = encoded.states[layers[-1]]
        if stream != "regions":
            assert torch.equal(last[:, :TOKENS], encoded.text)
        if stream != "text":
            start = TOKENS if stream == "both" else 0
            assert torch.equal(last[:, start : start + REGIONS], encoded.regions)
            assert encoded.whole is None or torch.equal(last[:, start + REGIONS], encoded.whole)


def test_capture_changes_nothing_and_costs_nothing_if_off(model: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(hidden=True, counts=ONE_WITHOUT)
    captured = model(batch, capture=True)

    def never(*_: Tensor) -> Tensor:
        raise AssertionError("attention probabilities were computed")

    monkeypatch.setattr(attention, "probabilities", never)
    plain = model(batch)
    assert plain.maps is None
    assert plain.states is None
    same(plain, captured, batch.text.mask, regions_of(batch).mask)
    with pytest.raises(AssertionError, match="probabilities were computed"):
        model(batch, capture=True)


# ------------------------------------------------------------------------------------------------------------- saving,
# compiling, precision, presets


def test_weights_saved_and_loaded_give_equal_outputs(name: str, model: Encoder) -> None:
    batch, answers = make_batch(), Answers(name, model).eval()
    file = save_bytes(answers.state_dict())  # refuses tensors that share memory: tied ones would be written twice
    twin = Answers(name, build(name)).eval()
    twin.load_state_dict(load_bytes(file))
    expected, found = answers(batch), twin(batch)
    assert all(torch.equal(found[part], values) for part, values in expected.items())


def compiled(module: nn.Module, *, backend: str = "aot_eager") -> Any:
    """The module as one graph, whatever other tests have compiled: dynamo limits the graphs of a function."""
    torch.compiler.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def test_compiled_equals_eager(name: str) -> None:
    model, batch = build(name, **expected_of(name).one_of_each), make_batch(slot=True, hidden=True)
    with torch.no_grad():  # a graph with gradients takes twice as long to make; the slow tests have them
        found, expected = compiled(model)(batch), model(batch)
    for output in ("text", "regions", "pooled"):
        assert_close(getattr(found, output), getattr(expected, output), **CLOSE)


def test_compiled_with_counts_and_reads_equals_eager(name: str) -> None:
    model, reads = build(name, **expected_of(name).one_of_each), ONLY_SOME["pooled and slots"]
    batch = counted_by_host(_few(), 1)
    with torch.no_grad():
        found, expected = compiled(model)(batch, reads=reads), model(batch, reads=reads)
    for output in ("text", "regions", "pooled"):
        assert_close(getattr(found, output), getattr(expected, output), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("some", ["everything", *ONLY_SOME])
def test_compiled_with_gradients_equals_eager(name: str, some: str, counted: bool) -> None:
    model, reads = build(name, **expected_of(name).one_of_each).double(), ONLY_SOME.get(some, EVERYTHING)
    batch = _few()
    given = counted_by_host(batch, 1) if counted else batch
    found, gradients = with_gradients(compiled(model), given, reads, reads)
    expected, expected_gradients = with_gradients(model, batch, reads, reads)
    assert_equal_where_read(found, expected, reads, batch)
    gradients = {parameter.removeprefix("_orig_mod."): gradient for parameter, gradient in gradients.items()}
    assert_close(gradients, expected_gradients, **EXACT)


@pytest.mark.slow
def test_training_with_dropout_compiles(name: str) -> None:
    changes = {**expected_of(name).one_of_each, "dropout_rate": 0.1, "attention_dropout_rate": 0.1}
    model = build(name, **changes).train()
    for batch in (_few(), counted_by_host(_few(), 1)):
        compiled(model)(batch).text.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # what inductor imports of torch itself
def test_compiled_to_machine_code_equals_eager_with_every_head_and_gradient(name: str) -> None:
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        pytest.skip("not run: inductor needs a C++ compiler (g++ or clang++), and there is none")
    answers = Answers(name, build(name, **expected_of(name).one_of_each)).eval()
    batch = make_batch(slot=True, hidden=True, counts=ONE_WITHOUT)
    found = []
    for module in (answers, compiled(answers, backend="inductor")):
        answers.zero_grad()
        outputs = module(batch)
        torch.stack([values.clamp(-1e4, 1e4).sin().sum() for values in outputs.values()]).sum().backward()
        found.append((outputs, {parameter: tensor.grad for parameter, tensor in answers.named_parameters()}))
    (eager, eager_gradients), (fast, fast_gradients) = found
    assert_close(dict(fast), dict(eager), **CLOSE)
    for parameter, gradient in eager_gradients.items():
        assert_close(
            fast_gradients[parameter], gradient, atol=1e-4, rtol=1e-4, msg=lambda text, at=parameter: f"{at}: {text}"
        )


def test_half_precision_features_are_read(model: Encoder) -> None:
    batch = make_batch()
    half = dataclasses.replace(
        batch, regions=dataclasses.replace(regions_of(batch), features=regions_of(batch).features.half())
    )
    assert model(half).pooled.dtype == torch.float32
    assert_close(model(half).pooled, model(batch).pooled, atol=1e-2, rtol=0)


def test_word_table_is_the_models_own(model: Encoder) -> None:
    assert any(parameter is model.word_embeddings.weight for parameter in model.parameters())


def test_every_preset_survives_a_round_trip_and_is_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nn.init, "normal_", lambda tensor, **_: tensor
    )  # slow on the meta device, and there are no values
    spec = models.spec(name)
    for config in spec.presets.values():
        assert configs.from_dict(spec.config, configs.to_dict(config)) == config
        inputs = spec.inputs(config)
        with torch.device("meta"):
            encoder = models.build(name, config)
        assert encoder.config == config
        assert inputs.max_tokens > 0
        assert inputs.feature_size > 0


def _unknown_name() -> None:
    models.spec("visualbart")


def _foreign_config() -> None:
    models.build("visualbert", object())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(_unknown_name, "Did you mean 'visualbert'"), (_foreign_config, "configured by VisualBertConfig")],
)
def test_errors_by_name(wrong: Callable[[], None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()
