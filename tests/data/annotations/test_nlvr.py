"""NLVR v1's files: messy ones, missing ones, extra statements, parts by presentation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.nlvr import NlvrRecord, hold_out, read_nlvr
from visling.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2] / "tasks" / "files" / "nlvr"
"""Real lines of the official file."""
SIX = tuple(range(6))


def picture(identifier: str, k: int, *, sentence: str = "there is a box") -> NlvrRecord:
    name = f"dev-{identifier}-{k}"
    return NlvrRecord(
        id=name,
        images=(name,),
        sentence=sentence,
        label=True,
        identifier=identifier,
        presentation=identifier.split("-")[0],
        official=True,
    )


def write(root: Path, lines: list[str], split: str = "dev") -> Path:
    (root / split).mkdir(parents=True)
    (root / split / f"{split}.json").write_text("\n".join(lines))
    return root


def line(**fields: Any) -> str:
    return json.dumps({"sentence": "there is a box", "label": "true", "identifier": "7-0", "directory": "0"} | fields)


def test_without_pictures_all_six_are_listed(tmp_path: Path) -> None:
    assert [record.id for record in read_nlvr(write(tmp_path, [line()]), "dev")] == [f"dev-7-0-{k}" for k in SIX]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (line()[:40], "line 2 is not a JSON object.*truncated"),
        ("[1, 2]", "line 2 is a JSON list"),
        (line(label="True"), "line 2: label 'True' is unknown"),
        (line(label=[1]), "line 2: label .* is unknown"),
        (line(identifier="dev-850-0-1"), "NLVR2 have four fields"),
        (line(sentence=" "), "line 2: field 'sentence'"),
        (line(identifier=70), "line 2: field 'identifier'"),
        (line(identifier="6-0"), "identifier '6-0' comes twice"),
    ],
)
def test_messy_files_are_refused(tmp_path: Path, wrong: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_nlvr(write(tmp_path, [line(identifier="6-0"), wrong]), "dev")


def test_a_missing_split_names_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no statements of split 'train'"):
        read_nlvr(ROOT, "train")
    shutil.copytree(ROOT, tmp_path / "nlvr")
    with pytest.raises(DataError, match="give that folder"):
        read_nlvr(tmp_path, "dev")


def test_hold_out_keeps_presentations_together() -> None:
    records = [picture(f"{n}-{m}", k, sentence=f"sentence {n % 19}") for n in range(20) for m in range(4) for k in SIX]
    parts = hold_out(records, 0.25, seed=1)
    train, held = ({record.presentation for record in part} for part in (parts.train, parts.held))
    assert not train & held
    assert len(held) == 5
    assert len(parts.train) + len(parts.held) == len(records)
    assert hold_out(records, 0.25, seed=1) == parts
    assert hold_out(records, 0.25, seed=2).held != parts.held
    seeds = [hold_out(records, 0.5, seed=seed) for seed in range(10)]
    for split in seeds:  # presentations 0 and 19 have the same sentence
        apart = ("0" in {r.presentation for r in split.train}) != ("19" in {r.presentation for r in split.train})
        assert split.shared == (("sentence 0",) if apart else ())
    assert any(split.shared for split in seeds)
    assert {r.presentation for r in hold_out([picture("1-0", 0), picture("2-0", 0)], 0.01, 0).held} <= {"1", "2"}
    for share, some in ((0.0, records), (1.0, records), (0.5, records[:6])):
        with pytest.raises(ConfigError, match="cannot hold out"):
            hold_out(some, share, 0)


def test_parts_of_a_split_share_no_presentation(tmp_path: Path) -> None:
    root = write(tmp_path, [line(identifier=f"{number}-0") for number in range(10)])
    train, held = (read_nlvr(root, f"dev.{part}", held_out=0.3) for part in ("train", "held"))
    assert len(train) + len(held) == len(read_nlvr(root, "dev")) == 60
    assert len({record.presentation for record in held}) == 3
    assert not {record.presentation for record in train} & {record.presentation for record in held}
    with pytest.raises(ConfigError, match=r"parts train and held; found dev\.test"):
        read_nlvr(root, "dev.test")


def test_extra_statements_follow_the_official_ones(tmp_path: Path) -> None:
    write(tmp_path, [line()])
    (tmp_path / "statements").mkdir()
    (tmp_path / "statements" / "dev.json").write_text(line(identifier="42-0", image="scene_000000000042"))
    records = read_nlvr(tmp_path, "dev", pictures=(2,))
    assert [record.id for record in records] == ["dev-7-0-2", "statement-42-0"]
    assert [record.official for record in records] == [True, False]
    assert records[1].presentation == "scene_000000000042"
    assert len(read_nlvr(tmp_path, "dev", pictures=(2,), statements=False)) == 1
