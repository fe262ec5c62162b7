"""The single-stream baseline of ViLBERT: the contract of all families, and its arithmetic written out a second time,
slowly, from the facts of the release. No values of it were recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from models import test_contract as contract
from parity_support import labelled
from torch import Tensor, nn
from torch.testing import assert_close

from visling import models
from visling.models.task_model import TaskModel
from visling.models.vilbert_baseline import PRESETS, SPEC, VilbertBaseline, VilbertBaselineConfig
from visling.nn import heads
from visling.types import Batch, Head

globals().update({test: value for test, value in vars(contract).items() if test.startswith("test_")})
model = contract.model


@pytest.fixture
def name() -> str:
    return "vilbert-baseline"


# ------------------------------------------------------------------------------------------------------------------
# written out a second time: position by position, head by head, under the release's names


def softmax(scores: list[float]) -> list[float]:
    most = max(scores)
    powers = [math.exp(score - most) for score in scores]
    return [power / sum(powers) for power in powers]


class Slow:
    """The release's arithmetic in double precision, on its own names of weights."""

    def __init__(self, weights: Mapping[str, Tensor], config: VilbertBaselineConfig) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.config = config

    def linear(self, name: str, vector: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ vector + self.weights[f"{name}.bias"]

    def norm(self, name: str, vector: Tensor) -> Tensor:
        centred = vector - vector.mean()
        scaled = centred / torch.sqrt((centred * centred).mean() + 1e-12)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def word(self, at: int, piece: int, segment: int) -> Tensor:
        tables = {"word_embeddings": piece, "position_embeddings": at, "token_type_embeddings": segment}
        summed = sum((self.weights[f"bert.embeddings.{table}.weight"][row] for table, row in tables.items()), 0.0)
        return self.norm("bert.embeddings.LayerNorm", torch.as_tensor(summed))

    def region(self, feature: Tensor, corners: list[float]) -> Tensor:
        left, top, right, bottom = corners
        place = torch.tensor([left, top, right, bottom, (bottom - top) * (right - left)], dtype=torch.float64)
        summed = self.linear("bert.image_embeddings.image_embeddings", feature)
        summed = summed + self.linear("bert.image_embeddings.image_location_embeddings", place)
        summed = summed + self.weights["bert.image_embeddings.token_type_embeddings.weight"][1]
        return self.norm("bert.image_embeddings.LayerNorm", summed)

    def attend(self, at: str, states: list[Tensor], number: int) -> Tensor:
        """What position `number` reads of all positions."""
        size = self.config.hidden_size // self.config.num_heads
        found = []
        for head in range(self.config.num_heads):
            part = slice(head * size, (head + 1) * size)
            query = self.linear(f"{at}.self.query", states[number])[part]
            keys = [self.linear(f"{at}.self.key", state)[part] for state in states]
            shares = softmax([float(query @ key) / math.sqrt(size) for key in keys])
            values = [self.linear(f"{at}.self.value", state)[part] for state in states]
            found.append(torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0))
        return self.norm(f"{at}.output.LayerNorm", self.linear(f"{at}.output.dense", torch.cat(found)) + states[number])

    def layer(self, number: int, states: list[Tensor]) -> list[Tensor]:
        at, new = f"bert.encoder.layer.{number}", []
        for position in range(len(states)):
            state = self.attend(f"{at}.attention", states, position)
            inner = self.linear(f"{at}.intermediate.dense", state)
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            new.append(self.norm(f"{at}.output.LayerNorm", self.linear(f"{at}.output.dense", inner) + state))
        return new

    def row(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """States and logits of one row without its padding: text, then the whole image, then the regions."""
        regions = contract.regions_of(batch)
        tokens, real = batch.text.mask[number], regions.mask[number]
        ids, segments = batch.text.ids[number][tokens].tolist(), batch.text.segments[number][tokens].tolist()
        features = [feature.double() for feature in regions.features[number][real]]
        whole = torch.stack(features).mean(0)
        states = [self.word(at, *pair) for at, pair in enumerate(zip(ids, segments, strict=True))]
        states.append(self.region(whole, [0.0, 0.0, 1.0, 1.0]))
        boxes = regions.boxes[number][real].double().tolist()
        states += [self.region(feature, box) for feature, box in zip(features, boxes, strict=True)]
        for layer in range(self.config.num_layers):
            states = self.layer(layer, states)
        pooled = torch.tanh(self.linear("bert.pooler.dense", states[0]))
        seen = states[len(ids) :]
        return {
            "text": torch.stack(states[: len(ids)]),
            "whole": seen[0],
            "regions": torch.stack(seen[1:]),
            "pooled": pooled,
            "alignment": self.linear("cls.seq_relationship", pooled),
            "answers": self.answer(pooled),
            "score": self.linear("vil_logit", pooled),
            "choices": torch.cat([self.linear("vision_logit", state) for state in seen]),
        }

    def answer(self, pooled: Tensor) -> Tensor:
        for number in (0, 3):
            gain, direction = (self.weights[f"vil_prediction.main.{number}.weight_{part}"] for part in ("g", "v"))
            pooled = direction * (gain / direction.norm()) @ pooled + self.weights[f"vil_prediction.main.{number}.bias"]
            pooled = pooled.clamp(min=0) if number == 0 else pooled
        return pooled


HEADS = {
    "classifier": Head(kind="classify", outputs=5),
    "score": Head(kind="score", outputs=1),
    "regions": Head(kind="regions", outputs=1),
}


def make_parts() -> tuple[VilbertBaseline, dict[str, nn.Module]]:
    """The encoder; and with the heads, by the part of the key map that each is."""
    torch.manual_seed(3)
    encoder = contract.build("vilbert-baseline")
    assert isinstance(encoder, VilbertBaseline)
    styles = models.head_styles("vilbert-baseline")
    parts: dict[str, nn.Module] = {"encoder": encoder}
    for part, head in HEADS.items():
        parts[part] = heads.build(head, encoder.dims, style=styles[head.kind])
    parts["matching"] = heads.build(Head(kind="classify", outputs=2), encoder.dims, style=styles["matching"])
    for module in parts.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        module.eval()
    return encoder, parts


def released(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return SPEC.keys["first"].invert(
        {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    )


def compare(encoder: VilbertBaseline, parts: Mapping[str, nn.Module], slow: Slow, batch: Batch) -> None:
    encoded = encoder(batch)
    ours = {
        "alignment": parts["matching"](encoded.pooled).flip(-1),  # class 0 of the release means "fits"
        "answers": parts["classifier"](encoded.pooled),
        "score": parts["score"](encoded.pooled)[:, None],
        "choices": heads.read("regions", parts["regions"], encoded, batch),
    }
    for row in range(len(batch.text.ids)):
        theirs = slow.row(batch, row)
        real = contract.regions_of(batch).mask[row]
        choices = ours["choices"][row]
        assert isinstance(choices, Tensor)
        found = {
            "text": encoded.text[row][batch.text.mask[row]],
            "regions": encoded.regions[row][real],
            "whole": None if encoded.whole is None else encoded.whole[row],
            "pooled": encoded.pooled[row],
            **{name: ours[name][row] for name in ("alignment", "answers", "score")},
            "choices": torch.cat([choices[-1:], choices[:-1][real]]),
        }
        for name, tensor in theirs.items():
            assert_close(found[name], tensor.float(), atol=2e-5, rtol=2e-5, msg=labelled(name))


def test_equals_the_arithmetic_of_the_release() -> None:
    encoder, parts = make_parts()
    compare(encoder, parts, Slow(released(parts), encoder.config), contract.make_batch(links=False))


@pytest.mark.parametrize(
    ("name_of", "row"),
    [
        ("bert.image_embeddings.token_type_embeddings.weight", 1),
        ("bert.image_embeddings.image_location_embeddings.weight", 0),
        ("bert.embeddings.position_embeddings.weight", 2),
        ("bert.encoder.layer.1.output.LayerNorm.weight", 0),
        ("bert.pooler.dense.weight", 0),
        ("vision_logit.bias", 0),
        ("vil_prediction.main.3.weight_v", 0),
    ],
)
def test_another_weight_is_noticed(name_of: str, row: int) -> None:
    encoder, parts = make_parts()
    weights = {name: tensor.clone() for name, tensor in released(parts).items()}
    weights[name_of][row].view(-1)[0] += 0.5  # one entry: a norm takes off what all have
    with pytest.raises(AssertionError):
        compare(encoder, parts, Slow(weights, encoder.config), contract.make_batch(links=False))


def test_the_first_rows_of_the_tables_and_the_other_segment_of_regions_learn_nothing() -> None:
    """The release makes all its tables with padding_idx=0; regions read row 1 of their own."""
    encoder = models.build("vilbert-baseline", replace(PRESETS["tiny"], vocab_size=contract.VOCABULARY))
    assert isinstance(encoder, VilbertBaseline)
    encoder(contract.make_batch(links=False)).pooled.sum().backward()
    for table in (encoder.embeddings.positions, encoder.embeddings.segments, encoder.region_segments):
        assert table.weight.grad is not None
        assert not table.weight.grad[0].any()
        assert table.weight.grad[1].any()


def test_dropout_is_where_the_release_has_it() -> None:
    """Not before the classifier, the score and the alignment, whose heads read the summary; before `vision_logit`."""
    encoder = models.build_tiny("vilbert-baseline")
    assert isinstance(encoder, VilbertBaseline)
    model = TaskModel(encoder, HEADS, models.head_styles("vilbert-baseline"))
    rates = {
        name: [module.p for module in head.modules() if isinstance(module, nn.Dropout)]
        for name, head in model.heads.items()
    }
    assert rates == {"classifier": [0.0, 0.5], "score": [0.0], "regions": [0.1]}
    assert encoder.dropout.p == 0.1


def test_starts_from_bert_with_its_summary_and_its_next_sentence_head() -> None:
    encoder, parts = make_parts()
    head = Head(kind="vocabulary", outputs=contract.VOCABULARY)
    vocabulary = heads.build(head, encoder.dims, style="bert", words=encoder.word_embeddings)
    wanted = {"encoder": encoder, "matching": parts["matching"], "vocabulary": vocabulary}
    words = "bert.embeddings.word_embeddings.weight"
    source = {name: torch.randn_like(tensor) for name, tensor in released(wanted).items() if "image_emb" not in name}
    source["cls.predictions.decoder.weight"] = source[words]
    coverage = SPEC.keys["bert"].load(source, wanted)
    random = {"projection", "box_projection", "region_segments", "region_norm"}
    assert {name.split(".")[1] for name in coverage.fresh} == random
    for ours, theirs in (
        (encoder.embeddings.words.weight, words),
        (encoder.pooler.dense.weight, "bert.pooler.dense.weight"),
        (parts["matching"].get_parameter("linear.weight"), "cls.seq_relationship.weight"),
    ):
        assert torch.equal(ours, source[theirs]), theirs
