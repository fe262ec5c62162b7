"""Every kind of rule, forwards and back; strictness; the report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from visling.checkpoints.keymap import KeyMap, Rule, drop, fresh, fuse, rename, repair, split, tie, transpose
from visling.errors import CheckpointError

MAP = KeyMap(
    (
        repair("**.gamma", "**.weight"),
        rename("net.block.*.lin.*", "body.*.linear.*"),
        fuse(("net.q.*", "net.k.*", "net.v.*"), "body.qkv.*"),
        split("net.both", ("body.first", "body.second")),
        transpose("net.table", "body.table"),
        rename("net.out.bias", "top.bias"),
        tie("net.out.weight", "net.table", part="top"),
        drop("net.**.steps", "a counter"),
        fresh("body.new.**", "not in the file"),
    )
)


def source() -> dict[str, Tensor]:
    table = torch.randn(4, 2)
    return {
        "net.block.0.lin.weight": torch.randn(2, 3),
        "net.block.11.lin.gamma": torch.randn(3),
        "net.q.bias": torch.randn(2),
        "net.k.bias": torch.randn(2),
        "net.v.bias": torch.randn(2),
        "net.both": torch.randn(6, 2),
        "net.table": table,
        "net.out.weight": table.clone(),
        "net.out.bias": torch.randn(4),
        "net.norm.a.steps": torch.zeros(()),
    }


def test_every_rule_forwards() -> None:
    given = source()
    ours, coverage = MAP.convert(given)
    assert coverage.complete
    assert torch.equal(ours["body.0.linear.weight"], given["net.block.0.lin.weight"])
    assert torch.equal(ours["body.11.linear.weight"], given["net.block.11.lin.gamma"])
    assert torch.equal(
        ours["body.qkv.bias"], torch.cat([given["net.q.bias"], given["net.k.bias"], given["net.v.bias"]])
    )
    assert torch.equal(ours["body.second"], given["net.both"][3:])
    assert torch.equal(ours["body.table"], given["net.table"].t())
    assert coverage.mapped["body.qkv.bias"] == ("net.q.bias", "net.k.bias", "net.v.bias")
    assert coverage.tied == {"net.out.weight": "net.table"}
    assert coverage.dropped == {"net.norm.a.steps": "a counter"}
    assert len(ours) == 7


def test_back_again_bit_for_bit() -> None:
    given = source()
    ours, coverage = MAP.convert(given)
    back = MAP.invert(ours)
    modern = {name.replace("gamma", "weight"): tensor for name, tensor in given.items() if name not in coverage.dropped}
    assert back.keys() == modern.keys()
    assert all(torch.equal(back[name], modern[name]) for name in modern)


def test_tied_copy_is_written_with_its_part_only() -> None:
    ours, _ = MAP.convert(source())
    assert "net.out.weight" not in MAP.invert(
        {name: tensor for name, tensor in ours.items() if not name.startswith("top.")}
    )


def test_unwanted_parts_are_dropped_with_a_reason() -> None:
    ours, coverage = MAP.convert(source(), parts=["top"])
    assert list(ours) == ["top.bias"]
    assert coverage.dropped["net.both"] == "part 'body' was not requested"


def test_the_first_rule_wins() -> None:
    two = KeyMap((rename("a.b", "x.special"), rename("a.*", "x.*")))
    assert two.convert({"a.b": torch.zeros(1), "a.c": torch.zeros(1)})[0].keys() == {"x.special", "x.c"}


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.new = nn.Linear(1, 1)


LOADED = KeyMap((rename("lin.*", "body.linear.*"), fresh("body.new.*", "random")))


def test_load_copies_and_reports() -> None:
    body = Body()
    weights = {"lin.weight": torch.randn(2, 3).half(), "lin.bias": torch.randn(2)}
    coverage = LOADED.load(weights, {"body": body})
    assert torch.equal(body.linear.weight, weights["lin.weight"].float())
    assert coverage.fresh == {"body.new.weight": "random", "body.new.bias": "random"}
    assert [line.split()[:2] for line in str(coverage).splitlines()] == [
        ["mapped", "2"],
        ["tied", "0"],
        ["dropped", "0"],
        ["fresh", "2"],
        ["missing", "0"],
        ["unexpected", "0"],
        ["shape", "differs"],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lin.bias": None}, r"missing +1  body.linear.bias"),
        ({"lin.gain": torch.zeros(1)}, r"unexpected +1  lin.gain"),
        ({"other": torch.zeros(1)}, r"unexpected +1  other"),
        ({"lin.bias": torch.zeros(3)}, r"shape differs +1  body.linear.bias \(3,\) -> \(2,\)"),
    ],
)
def test_strict_loading_names_what_is_wrong_and_copies_nothing(change: dict[str, Tensor | None], message: str) -> None:
    body = Body()
    before = body.linear.weight.clone()
    weights = {"lin.weight": torch.randn(2, 3), "lin.bias": torch.randn(2), **change}
    given = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        LOADED.load(given, {"body": body})
    assert torch.equal(body.linear.weight, before)
    assert not LOADED.load(given, {"body": body}, strict=False).complete
    assert torch.equal(body.linear.weight, given["lin.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net.k.bias": None}, "built from 3 tensors, but the file lacks net.k.bias"),
        ({"net.q.bias": None}, "built from 3 tensors, but the file lacks net.q.bias"),
        ({"net.out.weight": torch.zeros(4, 2)}, "should be a copy of 'net.table'"),
        ({"net.block.11.lin.weight": torch.zeros(3)}, "two spellings"),
    ],
)
def test_damaged_files(change: dict[str, Tensor | None], message: str) -> None:
    given = {name: tensor for name, tensor in {**source(), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        MAP.convert(given)


def test_what_a_layout_cannot_name_is_not_written() -> None:
    with pytest.raises(CheckpointError, match="no name in this layout"):
        MAP.invert({"side.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"body.second was not given"):
        MAP.invert({"body.first": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'net\.out\.weight' is a copy of 'net\.table', which was not given"):
        MAP.invert({"top.bias": torch.zeros(4)})


def test_modules_are_named_where_one_key_becomes_one() -> None:
    assert MAP.modules(source()) == {
        "net.block.0.lin": "body.0.linear",
        "net.block.11.lin": "body.11.linear",
        "net": "body",
        "net.out": "top",
    }


def test_rules_are_plain_data() -> None:
    assert rename("a", "b") == Rule(kind="move", theirs=("a",), ours=("b",))
