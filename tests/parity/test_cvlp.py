"""CVLP against values recorded from the official release (`golden/cvlp`; its config.json describes every tensor).

Sizes and tolerance come from the recorded config.json: 5e-5 on states, embeddings and logits (14 layers deep), 1e-4
relative on losses and gradients. Text states are compared at real positions; ours of padding are zeros. Exempt, and
checked for our definition instead: the word table after the momentum update (the release moves it twice, because it is
tied to the vocabulary head).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_support import assert_rows_close, nudge_first, rough_norms
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from visling import models
from visling.checkpoints.keymap import Coverage
from visling.models.cvlp import Cvlp, CvlpConfig, KeyNetwork
from visling.nn.attention import Attention
from visling.nn.heads import build
from visling.nn.momentum import MomentumCopy
from visling.objectives.base import PretrainStep
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.matching import Matching
from visling.objectives.region_contrast import RegionContrast
from visling.types import Batch, Encoded, Head, Loss, Regions, Slots, Targets, Text

CLOSE: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-5}
LOSSES: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}
PATTERNS = ("none_dropped", "all_dropped", "mixed_a", "mixed_b")
KEYS = models.spec("cvlp").keys


@dataclass(frozen=True)
class Recording:
    """The recorded set and ways to rebuild its models."""

    folder: Path

    @property
    def about(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return described

    @property
    def sizes(self) -> dict[str, Any]:
        described: dict[str, Any] = self.about["hyper_parameters"]
        return described

    def config(self, **changes: Any) -> CvlpConfig:
        sizes = self.sizes
        config = CvlpConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_text_layers=sizes["l_layers"],
            num_region_layers=sizes["r_layers"],
            num_cross_layers=sizes["x_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            norm_eps=sizes["layer_norm_eps"],
            feature_size=sizes["visual_feat_dim"],
            max_tokens=sizes["max_position_embeddings"],
            dropout_rate=0.0,
            attention_dropout_rate=0.0,
            key_layers="replace",
        )
        return replace(config, **changes)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def stats(self, name: str) -> dict[str, list[float] | None]:
        """Norm and sum by their key; None = no gradient."""
        found: dict[str, list[float] | None] = json.loads((self.folder / "stats.json").read_text())[name]
        return found

    def chosen(self, pattern: str) -> list[bool]:
        return [bool(drawn) for drawn in self.about["drop_patterns"][pattern]]

    def batch(self) -> Batch:
        """What the query network reads."""
        inputs = self.tensors("inputs")
        shape = inputs["query_visual_feats"].shape[:2]
        return Batch(
            text=Text(ids=inputs["input_ids"], mask=inputs["attention_mask"].bool(), segments=inputs["token_type_ids"]),
            regions=Regions(
                features=inputs["query_visual_feats"],
                boxes=inputs["visual_pos"],
                mask=torch.ones(shape, dtype=torch.bool),
                size=torch.ones(shape[0], 2),
            ),
        )

    def clean(self) -> Batch:
        """What the key network reads."""
        batch = self.batch()
        assert batch.regions is not None
        return replace(batch, regions=replace(batch.regions, features=self.tensors("inputs")["key_visual_feats"]))

    def targets(self) -> Targets:
        inputs = self.tensors("inputs")
        labels = inputs["lm_labels"]
        positions = torch.arange(labels.shape[1]).expand_as(labels)
        return Targets(
            token_slots=Slots(at=positions.masked_fill(labels < 0, 0), mask=labels >= 0),
            token_ids=labels,
            matched=inputs["matched_label"],
            region_features=inputs["key_visual_feats"],
        )


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "cvlp")


class Pretraining(nn.Module):
    """Both networks with their heads and objectives, recorded weights loaded and the recorded queue filled in."""

    def __init__(self, recording: Recording, **changes: Any) -> None:
        super().__init__()
        sizes, inputs = recording.sizes, recording.tensors("inputs")
        self.encoder = Cvlp(recording.config(**changes))
        dims, words = self.encoder.dims, self.encoder.word_embeddings
        queue = inputs["visn_queue"].flatten(0, 1)
        self.masked_lm, self.matching = MaskedLM(dims, "bert", words), Matching(dims, "plain", words)
        self.contrast = RegionContrast(
            dims,
            "cvlp",
            words,
            encoder=self.encoder,
            projection_size=sizes["projection_dim"],
            momentum=sizes["ema_momentum"],
            temperature=sizes["temperature"],
            clip=sizes["tanh_clip"],
            queue_size=len(queue),
        )
        text = build(Head(kind="projection", outputs=sizes["projection_dim"]), dims, style="cvlp")
        self.parts = {
            "encoder": self.encoder,
            "vocabulary": self.masked_lm.head,
            "matching": self.matching.head,
            "projection": self.contrast.head,
            "text_projection": text,
        }
        self.coverage = KEYS["official"].load(recording.tensors("query_state_dict"), self.parts)
        network = self.contrast.key.network
        assert isinstance(network, KeyNetwork)
        self.key = network
        self.key_text = build(Head(kind="projection", outputs=sizes["projection_dim"]), dims, style="cvlp")
        self.key_parts: dict[str, nn.Module] = {
            "encoder": network.lxmert,
            "projection": self.contrast.key_head.network,
            "text_projection": self.key_text,
            **({} if network.successors is None else {"successors": network.successors}),
        }
        self.key_coverage = KEYS["official_key"].load(recording.tensors("key_state_dict"), self.key_parts)
        self.contrast.queue.push(queue, torch.ones(len(queue), dtype=torch.bool))

    def losses(self, recording: Recording) -> tuple[Encoded, Loss, Loss, Loss]:
        """Masked language modelling, matching and contrast, through the objectives themselves."""
        batch = recording.batch()
        encoded = self.encoder(batch, capture=True)
        step = PretrainStep(model=self.encoder, batch=batch, encoded=encoded, targets=recording.targets())
        return encoded, self.masked_lm(step), self.matching(step), self.contrast(step)


def unit(states: Tensor) -> Tensor:
    """Rows of length 1, all positions in one list as the release has them."""
    return F.normalize(states, dim=-1).flatten(0, 1)


def draw(monkeypatch: pytest.MonkeyPatch, recording: Recording, pattern: str) -> None:
    """Let the key network draw a recorded pattern, in the recorded order."""
    drawn = np.array([0.0 if chosen else 1.0 for chosen in recording.chosen(pattern)])

    class Recorded:
        def random(self, count: int) -> np.ndarray[Any, Any]:
            assert count == len(drawn)
            return drawn

    monkeypatch.setattr("visling.models.cvlp.runtime.generator_for", lambda *key: Recorded())


def compare_query(recording: Recording, model: Pretraining, encoded: Encoded) -> None:
    """Everything recorded of the query network in a forward pass."""
    recorded = {
        name.removeprefix("query."): tensor
        for name, tensor in recording.tensors("outputs").items()
        if name.startswith("query.")
    }
    real = recording.batch().text.mask
    assert_rows_close(encoded.text, recorded.pop("language_output"), real, "text", **CLOSE)
    assert_close(encoded.regions, recorded.pop("vision_output"), **CLOSE)
    assert_close(encoded.pooled, recorded.pop("pooled_output"), **CLOSE)
    embeddings = model.contrast.head(encoded.regions)
    assert_close(embeddings, recorded.pop("visn_embed_raw"), **CLOSE)
    assert_close(unit(embeddings), recorded.pop("visn_embed_normalised"), **CLOSE)
    assert_close(model.masked_lm.head(encoded.text)[real], recorded.pop("logits_lm")[real], **CLOSE)
    assert_close(model.matching.head(encoded.pooled), recorded.pop("logits_matched"), **CLOSE)
    assert not recorded


def compare_key(recording: Recording, model: Pretraining, pattern: str) -> None:
    """Everything recorded of the key network under one pattern."""
    recorded = {
        name.split(".")[2]: tensor
        for name, tensor in recording.tensors("outputs").items()
        if name.startswith(f"key.{pattern}.")
    }
    batch = recording.clean()
    real = batch.text.mask
    with torch.no_grad():
        encoded = (
            model.key.eval()(batch)
            if pattern == "eval_mode"
            else model.key.train()(batch, chosen=recording.chosen(pattern))
        )
        assert_close(unit(model.contrast.key_head(encoded.regions)), recorded.pop("visn_embed"), **CLOSE)
        if pattern != "eval_mode":
            assert_rows_close(encoded.text, recorded.pop("language_output"), real, "text", **CLOSE)
            assert_close(encoded.regions, recorded.pop("vision_output"), **CLOSE)
            assert_close(encoded.pooled, recorded.pop("pooled_output"), **CLOSE)
            assert_close(
                unit(model.key_text(encoded.text))[real.flatten()], recorded.pop("lang_embed")[real.flatten()], **CLOSE
            )
    assert not recorded


def compare_losses(recording: Recording, model: Pretraining) -> None:
    """States, logits, keys and losses of a step with pattern mixed_a."""
    recorded = recording.tensors("outputs")
    encoded, masked_lm, matching, contrast = model.losses(recording)
    compare_query(recording, model, encoded)
    keys = model.contrast.keys(recording.batch(), recording.targets())
    assert_close(keys.flatten(0, 1), recorded["key.mixed_a.visn_embed"], **CLOSE)
    assert_close(masked_lm.value[None], recorded["loss.lm"], **LOSSES)
    assert_close(matching.value[None], recorded["loss.matched"], **LOSSES)
    assert_close(contrast.value[None], recorded["loss.contrastive"], **LOSSES)
    assert_close((masked_lm + matching + contrast).value[None], recorded["loss.total"], **LOSSES)


def test_query_network_and_losses(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Pretraining(recording).train()
    assert model.coverage.complete
    draw(monkeypatch, recording, "mixed_a")
    compare_losses(recording, model)


@pytest.mark.parametrize("pattern", [*PATTERNS, "eval_mode"])
def test_key_network_with_successors(recording: Recording, pattern: str) -> None:
    model = Pretraining(recording)
    compare_key(recording, model, pattern)
    assert model.key_coverage.complete
    assert set(model.key_coverage.dropped) == {
        key for key in recording.tensors("key_state_dict") if key.startswith("cls.")
    } - set(model.key_coverage.tied)


def test_key_file_without_its_successors(recording: Recording) -> None:
    """With nothing left out the two ways of leaving out are one."""
    model = Pretraining(recording, key_layers="drop")
    compare_key(recording, model, "none_dropped")
    dropped = {key for key in model.key_coverage.dropped if not key.startswith("cls.")}
    assert dropped == {key for key in recording.tensors("key_state_dict") if ".scc_layer_" in key}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dropping_a_layer_is_a_successor_that_equals_the_first(recording: Recording, pattern: str) -> None:
    """Once successors have come to equal what they follow, the release does what the paper says."""
    model, other = Pretraining(recording), Pretraining(recording, key_layers="drop")
    assert model.key.successors is not None
    for stream, successors in model.key.successors.items():
        for number, successor in enumerate(successors.children()):
            successor.load_state_dict(model.key.lxmert.get_submodule(f"{stream}.{2 * number}").state_dict())
    chosen, batch = recording.chosen(pattern), recording.clean()
    for network in (model.key, other.key):
        network.train()
    assert torch.equal(model.key(batch, chosen=chosen).regions, other.key(batch, chosen=chosen).regions)


def test_scores_against_the_queue(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, sizes = recording.tensors("outputs"), recording.sizes
    model = Pretraining(recording).train()
    draw(monkeypatch, recording, "mixed_a")
    queries = unit(model.contrast.head(model.encoder(recording.batch()).regions))
    keys = model.contrast.keys(recording.batch(), recording.targets()).flatten(0, 1)
    cosines = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ model.contrast.queue.rows.T], dim=1)
    assert_close(keys, recorded["key.mixed_a.visn_embed"], **CLOSE)
    assert_close(cosines, recorded["contrastive.cosines"], **CLOSE)
    scores = sizes["tanh_clip"] * torch.tanh(cosines / sizes["temperature"] / sizes["tanh_clip"])
    assert_close(scores, recorded["contrastive.logits"], atol=5e-5 / sizes["temperature"], rtol=1e-5)


def test_gradient_of_every_weight(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = recording.stats("query_grad_norm_and_sum")
    model = Pretraining(recording).train()
    draw(monkeypatch, recording, "mixed_a")
    _, masked_lm, matching, contrast = model.losses(recording)
    torch.autograd.backward((masked_lm + matching + contrast).value)
    ours = {
        f"{part}.{name}": value for part, module in model.parts.items() for name, value in module.named_parameters()
    }
    assert {key for keys in model.coverage.mapped.values() for key in keys} == stats.keys()
    for name, parameter in ours.items():
        (theirs,) = model.coverage.mapped[name]
        expected = stats[theirs]
        if expected is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        norm, total = expected
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name
        assert parameter.grad.sum().item() == pytest.approx(total, rel=1e-4, abs=1e-6 + 1e-4 * norm), name
    assert not any(parameter.requires_grad for parameter in model.key.parameters())


def compare_momentum(recording: Recording, model: Pretraining) -> None:
    """Everything recorded of one update of the key network, of both projections too."""
    momentum = recording.sizes["ema_momentum"]
    table = "bert.embeddings.word_embeddings.weight"
    source, key = recording.tensors("query_state_dict"), recording.tensors("key_state_dict")
    once = momentum * key[table] + (1 - momentum) * source[table]
    model.contrast.after_update()
    slow_text = MomentumCopy(model.key_text, momentum=model.contrast.key.momentum)
    slow_text.update(model.parts["text_projection"])
    after = KEYS["official_key"].invert(
        {
            f"{part}.{name}": value
            for part, module in model.key_parts.items()
            for name, value in module.state_dict().items()
        }
    )
    for name, tensor in recording.tensors("key_after_ema").items():
        if name == table:
            assert_close(after[name], once)
            assert_close(tensor, momentum * once + (1 - momentum) * source[table])  # the release, moved twice
        else:
            assert_close(after[name], tensor, atol=1e-6, rtol=1e-5)
    stats = recording.stats("key_after_ema_norm_and_sum")
    assert stats.keys() - after.keys() == {
        name for name in stats if name.startswith("cls.")
    }  # heads that the key network never uses
    for name, tensor in after.items():
        expected = stats[name]
        assert expected is not None
        if name != table:
            assert tensor.norm().item() == pytest.approx(expected[0], rel=1e-5, abs=1e-6), name
            assert tensor.sum().item() == pytest.approx(expected[1], rel=1e-5, abs=1e-5), name


def test_momentum_update(recording: Recording) -> None:
    compare_momentum(recording, Pretraining(recording))


def _swap(first: str, second: str) -> Callable[[Pretraining], None]:
    """Exchange the weights of two modules of one shape."""
    return lambda model: _exchange(model.get_submodule(first), model.get_submodule(second))


def _exchange(one: nn.Module, two: nn.Module) -> None:
    kept = {name: value.clone() for name, value in one.state_dict().items()}
    one.load_state_dict(two.state_dict())
    two.load_state_dict(kept)


def _outer_layers(model: Pretraining) -> None:
    """First and last text layer exchanged."""
    first, *_, last = model.encoder.lxmert.text_layers.children()
    _exchange(first, last)


def _running_successor(recording: Recording, model: Pretraining) -> tuple[nn.Module, nn.Module]:
    """A successor that runs under pattern mixed_a, and the last one of its stream."""
    assert model.key.successors is not None
    stream, number = next(
        pair for pair, chosen in zip(model.key.pairs, recording.chosen("mixed_a"), strict=True) if chosen
    )
    successors = list(model.key.successors[stream].children())
    return successors[number], successors[-1]


def _other_heads(model: Pretraining) -> None:
    *_, last = model.encoder.lxmert.region_layers.children()
    attention = last.get_submodule("self_attention.attention")
    assert isinstance(attention, Attention)
    attention.num_heads = 2 if attention.num_heads == 1 else 1


def _with(**changes: Any) -> Callable[[Pretraining], None]:
    """Change settings of the contrast."""

    def change(model: Pretraining) -> None:
        for name, value in changes.items():
            setattr(model.contrast, name, value)

    return change


def _dropout(model: Pretraining) -> None:
    for module in model.encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1


# The last layer of a stream is never left out, so all of these are live in the key network too.
LIVE = (
    "lxmert.embeddings.positions.weight",
    "lxmert.norm.bias",
    "lxmert.region_embeddings.features.bias",
    "lxmert.region_embeddings.box_norm.weight",
    "lxmert.text_layers.-1.self_attention.attention.value.bias",
    "lxmert.region_layers.-1.feed_forward.up.bias",
    "lxmert.cross_layers.-1.cross_attention.attention.value.weight",
    "lxmert.cross_layers.-1.cross_attention.norm.weight",
    "lxmert.cross_layers.-1.region_feed_forward.down.bias",
)
MUTATIONS: Mapping[str, Callable[[Pretraining], Any]] = {
    **{f"nudge {name}": nudge_first(f"encoder.{name}") for name in (*LIVE, "lxmert.pooler.dense.bias")},
    **{
        f"nudge {name}": nudge_first(name)
        for name in ("contrast.head.dense.bias", "contrast.head.norm.weight", "contrast.head.linear.bias")
    },
    **{f"nudge key {name}": nudge_first(f"contrast.key.network.{name}") for name in LIVE},
    "nudge key projection": nudge_first("contrast.key_head.network.linear.bias"),
    "nudge the queue": lambda model: model.contrast.queue.rows[-1].neg_(),
    "epsilon of the norms": rough_norms,
    "another number of heads": _other_heads,
    "self-attention of the streams swapped": _swap(
        "encoder.lxmert.cross_layers.0.text_self_attention", "encoder.lxmert.cross_layers.0.region_self_attention"
    ),
    "cross- and self-attention swapped": _swap(
        "encoder.lxmert.cross_layers.0.cross_attention", "encoder.lxmert.cross_layers.0.region_self_attention"
    ),
    "layers swapped": _outer_layers,
    "dropout on": _dropout,
    "no clipping": _with(clip=None),
    "another temperature": _with(temperature=0.075),
    "nothing left out": lambda model: setattr(model.key, "drop_rate", 0.0),
    "key network for query network": lambda model: model.contrast.key.update(model.encoder),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_model_is_noticed(recording: Recording, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    model = Pretraining(recording).train()
    draw(monkeypatch, recording, "mixed_a")
    MUTATIONS[mutation](model)
    with pytest.raises(AssertionError):
        compare_losses(recording, model)


@pytest.mark.parametrize("swapped", [True, False])
def test_a_broken_successor_is_noticed(recording: Recording, monkeypatch: pytest.MonkeyPatch, swapped: bool) -> None:
    model = Pretraining(recording).train()
    draw(monkeypatch, recording, "mixed_a")
    running, last = _running_successor(recording, model)
    if swapped:
        _exchange(running, last)
    else:
        with torch.no_grad():
            next(weight for name, weight in running.named_parameters() if name.endswith("norm.weight"))[0] += 0.01
    with pytest.raises(AssertionError):
        compare_losses(recording, model)


def test_a_wrongly_chosen_pair_is_noticed(recording: Recording) -> None:
    model, right = Pretraining(recording), recording.tensors("outputs")["key.mixed_a.visn_embed"]
    for pair in range(len(model.key.pairs)):
        chosen = recording.chosen("mixed_a")
        chosen[pair] = not chosen[pair]
        with pytest.raises(AssertionError):
            assert_close(
                unit(model.contrast.key_head(model.key.train()(recording.clean(), chosen=chosen).regions)),
                right,
                **CLOSE,
            )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "name", ["dense.weight", "dense.bias", "norm.weight", "norm.bias", "linear.weight", "linear.bias"]
)
def test_a_broken_text_projection_is_noticed(recording: Recording, pattern: str, name: str) -> None:
    model = Pretraining(recording)
    nudge_first(name)(model.key_text)
    with pytest.raises(AssertionError):
        compare_key(recording, model, pattern)


def _second_update(model: Pretraining) -> None:
    model.contrast.key.update(model.encoder)


def _another_momentum(model: Pretraining) -> None:
    model.contrast.key.momentum = model.contrast.key.momentum - 0.01


def _successors_follow_their_start(model: Pretraining) -> None:
    """Successor i follows layer i, which it starts as, in the place of layer 2i."""

    def follows(name: str) -> str:
        part, _, rest = name.partition(".")
        return f"lxmert.{rest}" if part == "successors" else name

    model.contrast.key._source_name = follows


MOMENTUM: Mapping[str, Callable[[Pretraining], None]] = {
    **{
        f"nudge {name}": nudge_first(name)
        for name in (
            "encoder.lxmert.norm.bias",
            "encoder.lxmert.cross_layers.-1.cross_attention.norm.weight",
            "contrast.head.linear.bias",
            "contrast.key.network.lxmert.text_layers.0.self_attention.output.bias",
            "contrast.key.network.successors.region_layers.0.feed_forward.norm.weight",
            "contrast.key_head.network.norm.weight",
        )
    },
    "nudge text projection": lambda model: nudge_first("norm.weight")(model.parts["text_projection"]),
    "nudge key text projection": lambda model: nudge_first("linear.bias")(model.key_text),
    "another momentum": _another_momentum,
    "an update too many": _second_update,
    "successors follow their start": _successors_follow_their_start,
}


@pytest.mark.parametrize("mutation", MOMENTUM)
def test_a_broken_momentum_update_is_noticed(recording: Recording, mutation: str) -> None:
    model = Pretraining(recording)
    MOMENTUM[mutation](model)
    with pytest.raises(AssertionError):
        compare_momentum(recording, model)


def test_masked_regions_for_the_keys_are_noticed(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Pretraining(recording).train()
    draw(monkeypatch, recording, "mixed_a")
    masked = replace(recording.targets(), region_features=recording.tensors("inputs")["query_visual_feats"])
    with pytest.raises(AssertionError):
        assert_close(
            model.contrast.keys(recording.batch(), masked).flatten(0, 1),
            recording.tensors("outputs")["key.mixed_a.visn_embed"],
            **CLOSE,
        )


def test_coverage_is_printed_in_full(recording: Recording) -> None:
    coverage: Coverage = Pretraining(recording).key_coverage
    assert "part 'vocabulary' was not requested" in str(coverage)
