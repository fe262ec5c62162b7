"""Configs to plain values and back, settings from the command line, and messages that say how to mend."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from visling import config as configs
from visling.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    clip: Literal["global", "per_tensor", "none"] = "global"
    warmup_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """Two settings that check each other."""

    width: int = 12
    heads: int = 3
    stride: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width must be a multiple of heads; found {self.width} and {self.heads}.")


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    epochs: int = 3
    shuffle: bool = True
    optim: Optim = field(default_factory=Optim)
    second: Optim | None = None
    stages: tuple[Optim, ...] = ()
    folder: Path = Path("runs")
    resume: Path | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    phases: Mapping[str, Optim] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    limit: int | str = 0
    encoder: Any = None


FULL = Run(
    name="a",
    epochs=7,
    shuffle=False,
    optim=Optim(lr=0.5, betas=(0.1, 0.2), clip="none", warmup_steps=10),
    second=Optim(clip="per_tensor"),
    stages=(Optim(lr=1.0), Optim(lr=2.0)),
    folder=Path("a") / "b",
    resume=Path("c"),
    weights={"mlm": 1.0, "match": 0.5},
    extra={"deep": {"list": [1, "two", None]}},
    names=("x", "y"),
    limit="all",
)


# Plain values


@pytest.mark.parametrize("config", [FULL, Run(name="b")])
def test_round_trip_through_json(config: Run) -> None:
    back = configs.from_dict(Run, json.loads(json.dumps(configs.to_dict(config))))
    assert back == config
    assert isinstance(back.folder, Path)
    assert isinstance(back.names, tuple)
    assert isinstance(back.optim, Optim)


def test_plain_values_by_hand() -> None:
    plain = configs.to_dict(FULL)
    assert plain["optim"] == {"lr": 0.5, "betas": [0.1, 0.2], "clip": "none", "warmup_steps": 10}
    assert plain["folder"] == str(Path("a") / "b")
    assert [stage["lr"] for stage in plain["stages"]] == [1.0, 2.0]
    assert configs.to_dict(Run(name="b", encoder=Model()))["encoder"] == {"width": 12, "heads": 3, "stride": 2}


def test_a_given_config_is_kept_and_whole_numbers_become_floats() -> None:
    run = configs.from_dict(Run, {"name": "a", "optim": Optim(lr=2.0), "weights": {"mlm": 2}, "stages": [{"lr": 3}]})
    assert run.optim == Optim(lr=2.0)
    assert (run.weights, type(run.weights["mlm"])) == ({"mlm": 2.0}, float)
    assert type(run.stages[0].lr) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 1}, "'epoch' is not a setting of Run. Did you mean 'epochs'?"),
        ({"optim": {"warmup_step": 1}}, "'optim.warmup_step' is not a setting of Optim. Did you mean 'warmup_steps'?"),
        ({"second": {"rate": 1}}, "'second.rate' is not a setting of Optim."),
        ({"zzzzzz": 1}, "Valid: encoder, epochs, extra"),
        ({"epochs": True}, "'epochs' must be of type int; found True (bool)."),
        ({"epochs": 1.0}, "'epochs' must be of type int; found 1.0 (float)."),
        ({"epochs": None}, "'epochs' must be of type int; found None (NoneType)."),
        ({"shuffle": 1}, "'shuffle' must be of type bool; found 1 (int)."),
        ({"name": 1}, "'name' must be of type str; found 1 (int)."),
        ({"folder": 1}, "'folder' must be of type Path; found 1 (int)."),
        ({"optim": 3}, "'optim' must be of type Optim; found 3 (int)."),
        ({"optim": {"lr": True}}, "'optim.lr' must be of type float; found True (bool)."),
        ({"optim": {"lr": "fast"}}, "'optim.lr' must be of type float; found 'fast' (str)."),
        ({"optim": {"warmup_steps": "x"}}, "'optim.warmup_steps' must be of type int; found 'x' (str)."),
        ({"optim": {"clip": "globel"}}, "'optim.clip' is 'globel'; Did you mean 'global'?"),
        ({"optim": {"betas": [0.1]}}, "'optim.betas' must hold 2 values; found 1."),
        ({"optim": {"betas": [0.1, "b"]}}, "'optim.betas[1]' must be of type float; found 'b' (str)."),
        ({"stages": [{}, {"lr": "x"}]}, "'stages[1].lr' must be of type float"),
        ({"names": "xy"}, "'names' must be of type tuple; found 'xy' (str)."),
        ({"names": ["x", 2]}, "'names[1]' must be of type str; found 2 (int)."),
        ({"weights": {"mlm": "x"}}, "'weights.mlm' must be of type float; found 'x' (str)."),
        ({"weights": [1]}, "'weights' must be of type Mapping; found [1] (list)."),
        ({"limit": None}, "'limit' must be of type int; found None (NoneType)."),
        ({"limit": 0.5}, "'limit' must be of type int; found 0.5 (float)."),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        configs.from_dict(Run, {"name": "a"} | values)


@pytest.mark.parametrize("value", [True, 1.0, 3, "1"])
def test_a_choice_of_numbers_is_strict(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'stride' is {value!r}; "):
        configs.from_dict(Model, {"stride": value})
    assert configs.from_dict(Model, {"stride": 1}).stride == 1


def test_missing_values_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^Run needs 'name': no value was given\.$"):
        configs.from_dict(Run, {"epochs": 1})
    with pytest.raises(ConfigError, match=r"Run needs 'outer\.name'"):
        configs.from_dict(Run, {}, where="outer")


# Settings


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("epochs=5", {"epochs": 5}),
        (" epochs = 5 ", {"epochs": 5}),
        ("shuffle=false", {"shuffle": False}),
        ("name=big run", {"name": "big run"}),
        ("name=a=b", {"name": "a=b"}),
        ('name="5"', {"name": "5"}),
        ("name=", {"name": ""}),
        ("name=none", {"name": "none"}),  # a string cannot be None
        ("folder=x/y", {"folder": Path("x/y")}),
        ("resume=none", {"resume": None}),
        ("resume=z", {"resume": Path("z")}),
        ("names=['p', 'q']", {"names": ("p", "q")}),
        ("limit=4", {"limit": 4}),
        ("limit=four", {"limit": "four"}),
        ("weights={mlm = 2}", {"weights": {"mlm": 2.0}}),
        ("optim={lr = 2}", {"optim": Optim(lr=2.0)}),
        ("second=none", {"second": None}),
    ],
)
def test_settings_at_the_top(setting: str, expected: dict[str, Any]) -> None:
    changed = configs.override(FULL, [setting])
    assert {name: getattr(changed, name) for name in expected} == expected
    others = set(Run.__dataclass_fields__) - set(expected)
    assert all(getattr(changed, name) == getattr(FULL, name) for name in others)


def test_settings_below() -> None:
    changed = configs.override(
        FULL,
        [
            "optim.lr=1e-4",
            "optim.betas=[0.5, 1]",
            "second.warmup_steps=9",
            "optim.warmup_steps=none",
            "optim.clip=none",
        ],
    )
    assert changed.optim == Optim(lr=1e-4, betas=(0.5, 1.0), clip="none", warmup_steps=None)
    assert changed.second == Optim(clip="per_tensor", warmup_steps=9)
    assert FULL.optim.lr == 0.5, "the original must stay"


def test_settings_reach_into_mappings() -> None:
    settings = ["weights.mlm=2", "weights.new=3", "groups.one.size=512", "extra.deep.flag=true", "extra.x.y=z"]
    changed = configs.override(FULL, settings)
    assert changed.weights == {"mlm": 2.0, "match": 0.5, "new": 3.0}
    assert all(type(weight) is float for weight in changed.weights.values())
    assert changed.groups == {"one": {"size": 512}}
    assert changed.extra == {"deep": {"list": [1, "two", None], "flag": True}, "x": {"y": "z"}}
    assert FULL.weights == {"mlm": 1.0, "match": 0.5}, "the original must stay"
    assert configs.override(FULL, ["weights={mlm = 3}", "weights.new=4"]).weights == {"mlm": 3.0, "new": 4.0}
    assert configs.override(FULL, ["weights.new=4", "weights={mlm = 3}"]).weights == {"mlm": 3.0}
    assert configs.override(Run(name="a", phases={"a": Optim(clip="none")}), ["phases.a.lr=5"]).phases == {
        "a": Optim(lr=5.0, clip="none")
    }
    assert configs.override(FULL, ["phases.b.lr=5"]).phases == {"b": Optim(lr=5.0)}


def test_a_setting_of_nothing_says_so() -> None:
    with pytest.raises(
        ConfigError,
        match=r"cannot set 'second\.lr': 'second' is None\. Set 'second' first, for example second=\{lr = value\}",
    ):
        configs.override(Run(name="a"), ["second.lr=1"])
    assert configs.override(Run(name="a"), ["second={}", "second.lr=1"]).second == Optim(lr=1.0)


def test_no_settings_change_nothing() -> None:
    assert configs.override(FULL, []) is FULL


def test_a_choice_may_be_called_none() -> None:
    assert configs.override(Optim(), ["clip=none"]).clip == "none"
    assert configs.override(Optim(warmup_steps=3), ["warmup_steps=none"]).warmup_steps is None


def test_settings_that_check_each_other_come_in_any_order() -> None:
    settings = ["width=10", "heads=5"]
    assert configs.override(Model(), settings) == configs.override(Model(), settings[::-1]) == Model(width=10, heads=5)
    with pytest.raises(ConfigError, match="width must be a multiple of heads; found 10 and 3"):
        configs.override(Model(), ["width=10"])


def test_the_last_setting_of_a_name_wins() -> None:
    assert configs.override(FULL, ["epochs=1", "epochs=2"]).epochs == 2
    assert configs.override(FULL, ["optim.lr=1", "optim={warmup_steps = 2}"]).optim == Optim(warmup_steps=2)
    assert configs.override(FULL, ["optim={warmup_steps = 2}", "optim.lr=1"]).optim == Optim(warmup_steps=2, lr=1.0)


def test_settings_reach_a_config_in_a_field_of_any_type() -> None:
    run = Run(name="a", encoder=Model())
    assert configs.override(run, ["encoder.width=24", "encoder.heads=4"]).encoder == Model(width=24, heads=4)
    with pytest.raises(
        ConfigError, match=r"'encoder\.widht' is not a setting: Model has no 'widht'\. Did you mean 'width'\?"
    ):
        configs.override(run, ["encoder.widht=24"])
    with pytest.raises(ConfigError, match=r"'encoder\.width' must be of type int; found 'x' \(str\)"):
        configs.override(run, ["encoder.width=x"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs", "cannot read setting 'epochs': expected name=value"),
        ("epoch=1", "'epoch' is not a setting: Run has no 'epoch'. Did you mean 'epochs'?"),
        (
            "optim.wamup_steps=1",
            "'optim.wamup_steps' is not a setting: Optim has no 'wamup_steps'. Did you mean 'warmup_steps'?",
        ),
        ("epochs.first=1", "cannot set 'epochs.first': int has no settings of its own."),
        ("weights.mlm=x", "'weights.mlm' must be of type float; found 'x' (str)."),
        ("weights.mlm.rate=1", "cannot set 'weights.mlm.rate': float has no settings of its own."),
        ("weights.new.rate=1", "'weights.new' must be of type float; found {'rate': 1} (dict)."),
        ("groups.a.b.c=1", "'groups.a.b' must be of type int; found {'c': 1} (dict)."),
        ("phases.b.rate=1", "'phases.b.rate' is not a setting of Optim."),
        ("extra.deep.list.x=1", "cannot set 'extra.deep.list.x': list has no settings of its own."),
        ("optim.lr.x.y=1", "cannot set 'optim.lr.x.y': float"),
        ("epochs=true", "'epochs' must be of type int; found True (bool)."),
        ("epochs=none", "'epochs' must be of type int; found 'none' (str)."),
        ("optim.clip=some", "'optim.clip' is 'some'; "),
        ("optim.clip=1", "'optim.clip' is 1; "),
        ("name=5", "'name' must be of type str; found 5 (int)."),
    ],
)
def test_wrong_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        configs.override(FULL, [setting])


# Difference and files


def test_difference_names_what_changed() -> None:
    assert configs.difference(FULL, FULL) == {}
    other = configs.override(FULL, ["optim.lr=1", "second=none", "names=['x']", "weights={mlm = 1, extra = 2}"])
    assert configs.difference(other, FULL) == {
        "optim.lr": (0.5, 1.0),
        "second": (configs.to_dict(FULL.second), None),
        "names": (["x", "y"], ["x"]),
        "weights.match": (0.5, None),
        "weights.extra": (None, 2.0),
    }


def test_toml_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('name = "é"\n[optim]\nlr = 1\nbetas = [0.5, 0.6]\n', encoding="utf-8")
    assert configs.from_dict(Run, configs.load_toml(file)) == Run(name="é", optim=Optim(lr=1.0, betas=(0.5, 0.6)))


@pytest.mark.parametrize("content", [b"name = \n", b'name = "\xff"\n'])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML: "):
        configs.load_toml(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"no configuration file {re.escape(str(path))}. Check the path"):
            configs.load_toml(path)


def test_all_settings_that_cannot_be_read_are_named_at_once() -> None:
    settings = ["epoch=3", "optim.lrr=1", "shuffle=maybe", "epochs", "optim.clip=none", "stages=3"]
    with pytest.raises(ConfigError) as caught:
        configs.override(FULL, settings)
    assert len(caught.value.several) == 5
    for said in (
        "5 problems were found:\n- ",
        "Did you mean 'epochs'",
        "'optim.lrr'",
        "'shuffle'",
        "expected name=value",
    ):
        assert said in str(caught.value)


def test_all_values_that_a_config_refuses_are_named_at_once() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Two:
        first: Model = field(default_factory=Model)
        second: Model = field(default_factory=Model)
        size: int = 1

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ConfigError(f"size must be 1 or more; found {self.size}.")

    with pytest.raises(ConfigError) as caught:
        configs.override(Two(), ["first.width=10", "second.width=11", "size=0"])
    assert [str(error) for error in caught.value.several] == [
        "width must be a multiple of heads; found 10 and 3.",
        "width must be a multiple of heads; found 11 and 3.",
        "size must be 1 or more; found 0.",
    ]
    with pytest.raises(ConfigError) as alone:
        configs.override(Two(), ["first.width=10"])
    assert (str(alone.value), alone.value.several) == ("width must be a multiple of heads; found 10 and 3.", ())


def test_unknown_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(Run, {"name": "a", "epoch": 1, "optim": {"lrr": 2, "warmup_steps": "x"}})
    assert len(caught.value.several) == 3
