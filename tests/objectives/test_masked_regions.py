"""Losses over regions: recorded losses of the releases, plain arithmetic, what must not count, empty batches, and the
objective over a head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.releases import REGION_LOSSES
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling.errors import ConfigError
from visling.nn.heads import STYLES
from visling.objectives.base import PretrainStep, average
from visling.objectives.masked_regions import (
    MaskedRegions,
    RegionLosses,
    attribute_loss,
    draw_negatives,
    feature_regression_loss,
    hard_class_loss,
    region_nce_loss,
    soft_class_cross_entropy_loss,
    soft_class_kl_loss,
)
from visling.types import IGNORE, Batch, Dims, Encoded, Loss, Regions, Slots, Targets, Text

B, R, Q, C, A, F, WIDTH = 3, 5, 4, 7, 6, 8, 6
DIMS = Dims(text=WIDTH, regions=WIDTH, pooled=WIDTH)
WORDS = nn.Embedding(11, WIDTH)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def near(value: Tensor, recorded: Tensor) -> None:
    assert_close(value, recorded, rtol=1e-5, atol=1e-5)


def part(loss: Loss, name: str) -> tuple[Any, Any]:
    total, count = loss.parts[name]
    assert not total.requires_grad
    return total.item(), count.item()


# Recorded losses


def test_vilbert_losses(golden: Path) -> None:
    inputs, outputs = (
        load_file(golden / "vilbert/inputs.safetensors"),
        load_file(golden / "vilbert/outputs.safetensors"),
    )
    chosen = inputs["pretrain.image_label"] == 1
    logits = outputs["pretrain.prediction_scores_v"][:, 1:]  # the global row is no target
    loss = soft_class_kl_loss(logits, inputs["pretrain.image_target"], chosen)
    near(loss.value, outputs["pretrain.loss.masked_img_kl"][0])
    fitting = chosen & (inputs["pretrain.next_sentence_label"] == 0)[:, None]
    loss = soft_class_kl_loss(logits, inputs["pretrain.image_target"], fitting)
    near(loss.value, outputs["pretrain.loss_objective1.masked_img_kl"][0])
    predicted, features = outputs["regression.prediction_scores_v"][:, 1:], inputs["pretrain.image_target_feat"]
    loss = feature_regression_loss(predicted, features, chosen, distance="l2")
    near(loss.value, outputs["regression.loss.masked_img"][0])
    slots = Slots(at=torch.arange(chosen.shape[1]).expand_as(chosen), mask=chosen)
    loss = region_nce_loss(predicted, features, slots, inputs["nce.negative_index"])
    near(loss.value, outputs["nce.loss.masked_img"][0])


@pytest.mark.parametrize(("over", "file"), [("chosen", "outputs"), ("rows", "outputs_norm_in_batch_first")])
def test_vlbert_losses(golden: Path, over: Any, file: str) -> None:
    inputs = load_file(golden / "vlbert/pretrain_multitask/inputs.safetensors")
    logits = load_file(golden / "vlbert/pretrain_multitask/outputs.safetensors")["mvrc_logits"]
    labels = inputs["mvrc_labels"]
    loss = soft_class_cross_entropy_loss(logits, labels, labels.sum(-1) > 0, over=over)
    near(loss.value, load_file(golden / f"vlbert/pretrain_multitask/{file}.safetensors")["mvrc_loss"])


def test_lxmert_losses(golden: Path) -> None:
    inputs, outputs = load_file(golden / "lxmert/inputs.safetensors"), load_file(golden / "lxmert/outputs.safetensors")
    classes, attributes = (
        inputs[name].masked_fill(inputs[name] == -1, IGNORE) for name in ("obj_labels", "attr_labels")
    )
    every = torch.ones_like(classes, dtype=torch.bool)
    count = every.sum()
    scale = REGION_LOSSES["lxmert"].scale
    loss = hard_class_loss(outputs["logits.obj"], classes, every, weights=inputs["obj_conf"], count=count)
    near(loss.value * scale, outputs["loss.obj"][0])
    loss = attribute_loss(outputs["logits.attr"], attributes, every, weights=inputs["attr_conf"], count=count)
    near(loss.value * scale, outputs["loss.attr"][0])
    loss = feature_regression_loss(outputs["logits.feat"], inputs["feat_labels"], inputs["feat_mask"] > 0, count=count)
    near(loss.value * scale, outputs["loss.feat"][0])


# Plain arithmetic


def test_kl_divergence_by_hand() -> None:
    logits, probs = torch.randn(1, 2, C), torch.rand(1, 2, C).softmax(-1)
    probs[0, 0, 2] = 0  # a class without mass adds nothing
    loss = soft_class_kl_loss(logits, probs, torch.tensor([[True, False]]))
    predicted = logits[0, 0].double().softmax(-1)
    expected = sum(
        p * (math.log(p) - math.log(q)) for p, q in zip(probs[0, 0].tolist(), predicted.tolist(), strict=True) if p
    )
    assert loss.value.item() == pytest.approx(expected, rel=1e-5)
    assert part(loss, "region_classes") == (pytest.approx(expected, rel=1e-5), 1)


def test_distributions_that_do_not_sum_to_one_do_not_count() -> None:
    logits, probs = torch.randn(1, 3, C), torch.full((1, 3, C), 1 / C)
    probs[0, 1] *= 0.8
    probs[0, 2] *= 0.95
    loss = soft_class_cross_entropy_loss(logits, probs, torch.ones(1, 3, dtype=torch.bool))
    assert part(loss, "region_classes")[1] == 2
    expected = [-(probs[0, k] * logits[0, k].log_softmax(-1)).sum() for k in (0, 2)]
    assert_close(loss.value, torch.stack(expected).mean())


def test_confidence_weighs_and_unlabelled_regions_count_only_if_asked() -> None:
    logits = torch.randn(1, 3, C)
    classes, weights = torch.tensor([[2, IGNORE, 4]]), torch.tensor([[0.5, 0.9, 0.25]])
    every = torch.ones(1, 3, dtype=torch.bool)
    expected = 0.5 * -logits[0, 0].log_softmax(-1)[2] + 0.25 * -logits[0, 2].log_softmax(-1)[4]
    assert_close(hard_class_loss(logits, classes, every, weights=weights).value, expected / 2)
    loss = hard_class_loss(logits, classes, every, weights=weights, count=torch.tensor(10))
    assert_close(loss.value, expected / 10)
    assert part(loss, "region_classes")[1] == 10
    assert part(loss, "region_classes_accuracy")[1] == 2
    plain = hard_class_loss(logits, classes, every).value
    assert_close(plain, nn.functional.cross_entropy(logits[0], classes[0], ignore_index=IGNORE))


def test_accuracy_counts_exact_hits() -> None:
    logits = torch.zeros(1, 3, C)
    logits[0, 0, 2] = logits[0, 1, 3] = logits[0, 2, 1] = 5.0
    mask = torch.tensor([[True, True, False]])
    assert part(hard_class_loss(logits, torch.tensor([[2, 2, 1]]), mask), "region_classes_accuracy") == (1, 2)
    probs = nn.functional.one_hot(torch.tensor([[2, 3, 0]]), C).float()
    assert part(soft_class_kl_loss(logits, probs, mask), "region_classes_accuracy") == (2, 2)


@pytest.mark.parametrize(("distance", "expected"), [("smooth_l1", (0.5 * 0.25 + 2.5) / 2), ("l2", (0.25 + 9) / 2)])
def test_feature_distances(distance: Any, expected: float) -> None:
    predicted, features = torch.tensor([[[1.0, 2.0], [9.0, 9.0]]]), torch.tensor([[[1.5, 5.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, False]])
    assert feature_regression_loss(predicted, features, mask, distance=distance).value.item() == pytest.approx(expected)
    counted = feature_regression_loss(predicted, features, mask, distance=distance, count=torch.tensor(4))
    assert counted.value.item() == pytest.approx(expected / 4)


def test_average_over_rows() -> None:
    values, mask = (
        torch.tensor([[1.0, 3.0], [5.0, 0.0], [7.0, 7.0]]),
        torch.tensor([[True, True], [True, False], [False, False]]),
    )
    loss = average("x", values, mask, over="rows")
    assert loss.value.item() == pytest.approx((4 / 2.0001 + 5 / 1.0001) / 2.0001, rel=1e-6)
    assert average("x", values, mask & False, over="rows").value.item() == 0


# Negatives


def test_a_region_does_not_compete_with_itself() -> None:
    predicted, features = torch.randn(1, 1, F), torch.randn(1, R, F)
    slots = Slots(at=torch.tensor([[2]]), mask=torch.tensor([[True]]))
    alone = region_nce_loss(predicted, features, slots, torch.tensor([[[2, 2]]]))
    assert alone.value.item() == 0
    some = region_nce_loss(predicted, features, slots, torch.tensor([[[2, 4]]]))
    scores = features[0, [2, 4]] @ predicted[0, 0]
    assert_close(some.value, -scores.log_softmax(0)[0])


def test_negatives_are_real_regions_of_other_images_then_of_the_same() -> None:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5, [True] * 4 + [False]])
    at = torch.tensor([[0, 4], [1, 2], [0, 0], [3, 0]])
    drawn = draw_negatives(mask, at, 2000)
    assert drawn.shape == (4, 2, 2000)
    elsewhere, here = drawn[..., :1400], drawn[..., 1400:]
    real = set(mask.flatten().nonzero().flatten().tolist())
    for row in (0, 1, 3):
        own = {row * 5 + region for region in range(5)} & real
        for slot in range(2):
            assert set(elsewhere[row, slot].tolist()) == real - own
            assert set(here[row, slot].tolist()) == own - {row * 5 + int(at[row, slot])}
            counts = elsewhere[row, slot].bincount(minlength=20)[sorted(real - own)].float()
            expected = 1400 / len(real - own)
            assert (counts - expected).abs().max() < 5 * expected**0.5


def test_negatives_of_a_lonely_image_and_of_a_lonely_region() -> None:
    alone = draw_negatives(torch.ones(1, 4, dtype=torch.bool), torch.tensor([[1]]), 100)
    assert set(alone.flatten().tolist()) == {0, 2, 3}
    single = draw_negatives(torch.tensor([[True, False]]), torch.tensor([[0]]), 10)
    assert set(single.flatten().tolist()) == {0}, "only itself, which does not compete"
    none = draw_negatives(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.int64), 10)
    assert int(none.min()) >= 0
    assert int(none.max()) < 6
    assert (
        draw_negatives(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.int64), 128).shape[-1]
        == 89 + 38
    )


def test_scores_are_not_computed_in_half_precision() -> None:
    predicted, features = torch.randn(1, 1, F) * 30, torch.randn(1, R, F) * 30
    slots, negatives = Slots(at=torch.tensor([[2]]), mask=torch.tensor([[True]])), torch.tensor([[[0, 1, 3, 4]]])
    expected = region_nce_loss(predicted, features, slots, negatives).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(region_nce_loss(predicted, features, slots, negatives).value, expected, rtol=0, atol=0)


# Nothing chosen, half precision


def calls(mask: Tensor, kind: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Any]]:
    logits, predicted = torch.randn(B, Q, C).to(kind), torch.randn(B, Q, F).to(kind)
    probs, labels = torch.randn(B, Q, C).softmax(-1), torch.randint(C, (B, Q))
    features = torch.randn(B, R, F)
    slots = Slots(at=torch.zeros(B, Q, dtype=torch.int64), mask=mask)
    logits.requires_grad_()
    predicted.requires_grad_()
    return {
        "kl": (logits, lambda: soft_class_kl_loss(logits, probs, mask)),
        "cross_entropy": (logits, lambda: soft_class_cross_entropy_loss(logits, probs, mask)),
        "hard": (logits, lambda: hard_class_loss(logits, labels, mask, weights=torch.rand(B, Q))),
        "rows": (logits, lambda: hard_class_loss(logits, labels, mask, over="rows")),
        "attributes": (logits, lambda: attribute_loss(logits, labels, mask, count=torch.tensor(0))),
        "features": (predicted, lambda: feature_regression_loss(predicted, features[:, :Q], mask)),
        "nce": (predicted, lambda: region_nce_loss(predicted, features, slots, torch.ones(B, Q, 3, dtype=torch.int64))),
    }


@pytest.mark.parametrize("name", list(calls(torch.zeros(B, Q, dtype=torch.bool))))
def test_nothing_chosen_gives_zero_and_zero_gradient(name: str) -> None:
    leaf, call = calls(torch.zeros(B, Q, dtype=torch.bool))[name]
    loss = call()
    torch.autograd.backward(loss.value)
    assert loss.value.item() == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize("name", list(calls(torch.ones(B, Q, dtype=torch.bool))))
def test_losses_are_float32(name: str) -> None:
    _, call = calls(torch.ones(B, Q, dtype=torch.bool), torch.bfloat16)[name]
    value = call().value
    assert value.dtype == torch.float32
    assert value.isfinite()


# The objective


def make(losses: RegionLosses) -> MaskedRegions:
    return MaskedRegions(DIMS, "bert", WORDS, losses=losses).eval()


def small(losses: RegionLosses) -> RegionLosses:
    return dataclasses.replace(losses, num_classes=C, num_attributes=A, feature_size=F, num_negatives=10)


def grid(values: list[list[int]]) -> Slots:
    mask = torch.tensor([[value >= 0 for value in row] for row in values])
    return Slots(at=torch.tensor(values).clamp(min=0), mask=mask)


CHOSEN = grid([[1, 3, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1]])
REAL = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])
EVERY = Slots(at=torch.arange(R).expand(B, R), mask=REAL)


def step(class_slots: Slots = CHOSEN, row: Tensor | None = None, **changes: Any) -> PretrainStep:
    q = class_slots.at.shape[1]
    regions = Regions(
        features=torch.randn(B, R, F), boxes=torch.zeros(B, R, 4), mask=REAL, size=torch.ones(B, 2), row=row
    )
    ids = torch.ones(B, 2, dtype=torch.int64)
    targets: dict[str, Any] = {
        "class_slots": class_slots,
        "feature_slots": CHOSEN,
        "region_probs": torch.randn(B, q, C).softmax(-1),
        "region_classes": torch.randint(C, (B, q)),
        "region_weights": torch.rand(B, q),
        "region_attributes": torch.randint(A, (B, q)),
        "attribute_weights": torch.rand(B, q),
        "region_features": torch.randn(B, R, F),
    }
    states = torch.randn(B, R, WIDTH, requires_grad=True)
    return PretrainStep(
        nn.Identity(),
        Batch(text=Text(ids=ids, mask=ids > 0, segments=ids * 0), regions=regions),
        Encoded(text=torch.randn(B, 2, WIDTH), regions=states, pooled=torch.randn(B, WIDTH)),
        Targets(**{**targets, **changes}),
    )


def at_slots(values: Tensor, slots: Slots) -> Tensor:
    return torch.stack([row[at] for row, at in zip(values, slots.at, strict=True)])


@pytest.mark.parametrize("release", ["vilbert", "vlbert"])
def test_soft_classes_at_the_slots(release: str) -> None:
    objective = make(small(REGION_LOSSES[release]))
    now = step()
    loss = objective(now)
    logits = at_slots(objective.head(now.encoded.regions)["classes"], CHOSEN)
    assert now.targets.region_probs is not None
    function = {"vilbert": soft_class_kl_loss, "vlbert": soft_class_cross_entropy_loss}[release]
    assert_close(loss.value, function(logits, now.targets.region_probs, CHOSEN.mask).value)
    assert part(loss, "masked_regions") == pytest.approx(part(loss, "region_classes"))
    torch.autograd.backward(loss.value)
    assert now.encoded.regions.grad is not None
    assert now.encoded.regions.grad.any(-1).tolist() == [
        [False, True, False, True, False],
        [True] + [False] * 4,
        [False] * 5,
    ]


def test_lxmert_is_the_mean_over_all_regions() -> None:
    objective = make(small(REGION_LOSSES["lxmert"]))
    now = step(EVERY)
    targets = now.targets
    told: dict[str, int] = {}
    for name, output in objective.head.outputs.named_children():
        output.register_forward_hook(lambda module, given, found, name=name: told.update({name: len(found)}))
    loss = objective(now)
    # each at its own regions only
    assert told == {"classes": B * R, "attributes": B * R, "features": CHOSEN.at.numel()}
    predicted: Mapping[str, Tensor] = objective.head(now.encoded.regions.detach())
    predicted = {name: logits.detach() for name, logits in predicted.items()}
    total = 0.0
    for b in range(B):
        for r in range(R):
            if not REAL[b, r]:
                continue
            for name, labels, weights in (
                ("classes", targets.region_classes, targets.region_weights),
                ("attributes", targets.region_attributes, targets.attribute_weights),
            ):
                assert labels is not None
                assert weights is not None
                total += float(weights[b, r] * -predicted[name][b, r].log_softmax(-1)[labels[b, r]])
    assert targets.region_features is not None
    for b, r in ((0, 1), (0, 3), (1, 0)):
        total += float(nn.functional.smooth_l1_loss(predicted["features"][b, r], targets.region_features[b, r]))
    assert loss.value.item() == pytest.approx(total / int(REAL.sum()) / 0.15, rel=1e-5)
    assert part(loss, "masked_regions") == (pytest.approx(total / 0.15, rel=1e-5), 11)
    parts = [part(loss, name)[0] for name in ("region_classes", "region_attributes", "region_features")]
    assert sum(parts) == pytest.approx(total / 0.15, rel=1e-5)


def test_lxmert_of_the_paper_asks_for_hidden_regions_alone() -> None:
    objective = make(dataclasses.replace(small(REGION_LOSSES["lxmert"]), weighted=False, over="chosen", scale=1.0))
    loss = objective(step())
    assert part(loss, "region_classes")[1] == part(loss, "region_features")[1] == 3


@pytest.mark.parametrize("padded", [False, True])
def test_nce_through_the_objective(padded: bool) -> None:
    losses = RegionLosses(features="nce", feature_size=F, num_negatives=10, padded_negatives=padded)
    objective = make(losses)
    now = step()
    torch.manual_seed(1)
    loss = objective(now)
    torch.manual_seed(1)
    negatives = draw_negatives(torch.ones_like(REAL) if padded else REAL, CHOSEN.at, 10)
    assert bool((~REAL.flatten()[negatives]).any()) == padded, "padding among the negatives"
    assert now.targets.region_features is not None
    predicted = at_slots(objective.head(now.encoded.regions)["features"], CHOSEN)
    assert_close(loss.value, region_nce_loss(predicted, now.targets.region_features, CHOSEN, negatives).value)


def test_shared_region_rows_count_once_per_text() -> None:
    objective = make(small(REGION_LOSSES["lxmert"]))
    row = torch.tensor([0, 0, 1])
    every = Slots(at=EVERY.at, mask=REAL[row])
    assert part(objective(step(every, row=row)), "masked_regions")[1] == 12


def test_text_alone_gives_zero() -> None:
    objective = make(small(REGION_LOSSES["vlbert"]))
    full = step()
    batch = dataclasses.replace(full.batch, regions=None)
    states = torch.zeros(B, 0, WIDTH, requires_grad=True)
    loss = objective(PretrainStep(full.model, batch, dataclasses.replace(full.encoded, regions=states), Targets()))
    torch.autograd.backward(loss.value)
    assert loss.value.item() == 0
    assert part(loss, "masked_regions") == (0, 0)


@pytest.mark.parametrize("release", list(REGION_LOSSES))
def test_a_batch_without_chosen_regions(release: str) -> None:
    objective = make(small(REGION_LOSSES[release])).train()
    nothing = Slots(at=torch.zeros(B, Q, dtype=torch.int64), mask=torch.zeros(B, Q, dtype=torch.bool))
    now = step(nothing, feature_slots=nothing)
    loss = objective(now)
    torch.autograd.backward(loss.value)
    assert loss.value.item() == 0
    assert now.encoded.regions.grad is not None
    assert not now.encoded.regions.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("release", list(REGION_LOSSES))
def test_missing_targets_are_named(release: str) -> None:
    losses = REGION_LOSSES[release]
    assert make(small(losses)).reads() == losses.needs
    names = ", ".join(sorted(losses.needs))
    now = step()
    with pytest.raises(ConfigError, match=f"MaskedRegions needs the targets {names}"):
        make(small(losses))(dataclasses.replace(now, targets=Targets()))


def test_needs_follow_the_losses() -> None:
    assert REGION_LOSSES["vilbert"].needs == {"class_slots", "region_probs"}
    assert RegionLosses(features="l2").needs == {"feature_slots", "region_features"}
    assert RegionLosses(classes="hard").needs == {"class_slots", "region_classes"}
    assert REGION_LOSSES["lxmert"].widths == {"classes": 1600, "attributes": 400, "features": 2048}
    assert REGION_LOSSES["vlbert"].widths == {"classes": 1601}


def test_impossible_losses() -> None:
    with pytest.raises(ConfigError, match="nothing to predict"):
        RegionLosses()
    with pytest.raises(ConfigError, match="weighted needs"):
        RegionLosses(classes="kl", weighted=True)


def test_the_head_is_built_with_the_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def build(request: Any) -> nn.Module:
        seen.append(request.head)
        return nn.Identity()

    monkeypatch.setitem(STYLES["region_targets"], "probe", build)
    MaskedRegions(DIMS, "probe", WORDS, losses=REGION_LOSSES["lxmert"])
    assert seen[0].kind == "region_targets"
    assert dict(seen[0].options) == {"classes": 1600, "attributes": 400, "features": 2048}


def test_compiles_whole() -> None:
    objective = make(small(REGION_LOSSES["lxmert"]))
    now = step(EVERY)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    assert_close(compiled(now).value, objective(now).value)
