"""What a claim compares, read off tiny runs: equal to what the commands report, kept, and never of another world."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visling import config as configs
from visling.analysis.head_accuracy import FEWEST_QUERIES as SHOWN_FROM
from visling.checked_weights import write_checked
from visling.errors import ConfigError, RunError
from visling.pretrained.folder import read_model_folder
from visling.recipes.claim_configs import Measure
from visling.recipes.tables import PRETRAINING
from visling.regions.relabelling import replace_labels
from visling.regions.store import NativeStore
from visling.runs import claim_measures
from visling.runs.claim_measures import FEWEST_QUERIES, HIDDEN_SHARE, Measured, measure
from visling.runs.pretrain import pretrain

EXTRACTOR = (
    "extractor={blocks = [1, 1, 1], stem_size = 4, widths = [4, 4, 6, 4], shorter_side = 32, longer_side = 64}",
    "encoder.feature_size=16", "encoder.whiten_features=false", "encoder.masks_features=false",
)  # fmt: skip


@pytest.fixture
def vqa(world: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.vqa, tmp_path / "vqa"))


@pytest.fixture
def pretrained(world: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.pretrained, tmp_path / "pretrained"))


def take(
    run: Path,
    world: Any,
    kind: Any,
    name: str = "accuracy",
    split: str = "test",
    fewest_words: int = 0,
    **options: Any,
) -> Measured:
    given = {"data": world.scenes, "store": world.regions, "device": "cpu", **options}
    return measure(run, Measure(kind=kind, name=name, split=split, fewest_words=fewest_words), **given)


def train(world: Any, out: Path, *settings: str, images: Path | None = None) -> Path:
    """VL-BERT, which predicts the class distribution of hidden regions."""
    config = configs.override(PRETRAINING["vlbert-scenes"](), [*world.settings, "encoder.visual_size=16", *settings])
    pretrain(config, out, data=[str(world.scenes)], store=world.regions, device="cpu", images=images)
    return out


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("it was computed again")


# score


def test_a_score_is_that_of_the_evaluation_and_is_kept(world: Any, vqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = take(vqa, world, "score")
    score = json.loads((vqa / "evaluation_test.json").read_text())["scores"]["accuracy"]
    assert found == Measured(value=score["value"], examples=score["count"])
    with pytest.raises(RunError, match=r"no score 'recall'; it has .*accuracy"):
        take(vqa, world, "score", "recall")
    with monkeypatch.context() as patched:
        patched.setattr(claim_measures, "evaluate", forbid)
        assert take(vqa, world, "score") == found
    (vqa / "evaluation_test.json").write_text('{"scores": {"accur')
    assert take(vqa, world, "score") == found, "a torn file is written again"


def test_long_texts_are_scored_apart(world: Any, vqa: Path) -> None:
    whole = take(vqa, world, "score")
    rows = [json.loads(line) for line in (vqa / "details_test.jsonl").read_text().splitlines()]
    lengths = sorted(len(row["text"].split()) for row in rows)
    assert take(vqa, world, "score", fewest_words=lengths[0]).value == pytest.approx(whole.value, abs=0.01)
    words = lengths[len(rows) // 2]
    scores = [row["score"] for row in rows if len(row["text"].split()) >= words]
    assert 0 < len(scores) < len(rows)
    found = take(vqa, world, "score", fewest_words=words)
    assert found.value == pytest.approx(100 * sum(scores) / len(scores))
    assert found.examples == len(scores)
    with pytest.raises(RunError, match="no text of 99 words or more"):
        take(vqa, world, "score", fewest_words=99)
    (vqa / "details_test.jsonl").write_text(json.dumps(rows[0] | {"score": 1 - round(whole.value / 100)}) + "\n")
    with pytest.raises(RunError, match=r"'accuracy' .* is no mean over examples"):
        take(vqa, world, "score", fewest_words=1)
    with pytest.raises(ConfigError, match="found 3 with heads"):
        Measure(kind="heads", fewest_words=3)


def test_a_score_in_another_world_is_kept_apart(world: Any, vqa: Path, tmp_path: Path) -> None:
    here = take(vqa, world, "score")
    fewer = world.annotations(tmp_path / "scenes")
    (questions,) = fewer.rglob("*OpenEnded*test*questions.json")
    content = json.loads(questions.read_text())
    content["questions"] = content["questions"][:5]
    questions.write_text(json.dumps(content))
    there = take(vqa, world, "score", data=fewer)
    assert (here.examples, there.examples) == (12, 5)
    (other,) = vqa.glob("measured-*")
    assert json.loads((other / "evaluation_test.json").read_text())["scores"]["accuracy"]["count"] == 5
    names = {"evaluation_test.json", "details_test.jsonl", "predictions_test.json"}
    assert {file.name for file in other.iterdir()} == names
    assert json.loads((vqa / "evaluation_test.json").read_text())["scores"]["accuracy"]["count"] == 12
    noisy = replace_labels(NativeStore.open(world.regions), 0.5, tmp_path / "noisy")
    take(vqa, world, "score", store=noisy.path)
    assert len(list(vqa.glob("measured-*"))) == 2, "another store is another world"


# validation


def test_a_validation_is_the_last_one_in_percent(world: Any, pretrained: Path, vqa: Path) -> None:
    with (pretrained / "log.jsonl").open("a") as file:
        for shares in (0.25, 0.5):
            scores = {"masked_lm_accuracy": shares, "masked_lm": 2.0}
            file.write(json.dumps({"kind": "valid", "step": 4, "epoch": 1, "scores": scores}) + "\n")
    assert take(pretrained, world, "validation", "masked_lm_accuracy") == Measured(value=50.0, examples=None)
    assert take(pretrained, world, "validation", "masked_lm").value == 2.0
    with pytest.raises(RunError, match=r"no score 'accuracy'; it has masked_lm, masked_lm_accuracy\."):
        take(pretrained, world, "validation")
    with (vqa / "log.jsonl").open("a") as file:  # the judging of statements (NLVR) has a score of this name
        file.write(json.dumps({"kind": "valid", "step": 4, "epoch": 1, "scores": {"example_accuracy": 61.0}}) + "\n")
    assert take(vqa, world, "validation", "example_accuracy").value == 61.0, "scores of tasks are in percent"


def test_a_run_without_a_validation_says_so(world: Any, pretrained: Path) -> None:
    (pretrained / "log.jsonl").write_text("")
    with pytest.raises(RunError, match="validated nothing"):
        take(pretrained, world, "validation", "loss")


# heads and syntax


def test_heads_and_syntax_come_from_one_alignment(
    world: Any, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = take(pretrained, world, "heads")
    file = pretrained / "measure_heads_test" / "alignment.json"
    found = json.loads(file.read_text())
    assert found["weights"] == "trained weights"
    assert heads == Measured(value=found["phrases"]["best"]["held_out"]["value"], examples=found["phrases"]["queries"])
    random = take(pretrained, world, "heads", random_seed=3)
    kept = json.loads((pretrained / "measure_heads_test_random-3" / "alignment.json").read_text())
    assert kept["weights"] == "random weights, seed 3"
    assert random.value == kept["phrases"]["best"]["held_out"]["value"]
    monkeypatch.setattr(claim_measures.subprocess, "run", forbid)
    assert take(pretrained, world, "heads") == heads
    assert take(pretrained, world, "heads", random_seed=3) == random
    for part in (part for directions in found["relations"].values() for part in directions.values()):
        part["queries"] = 19
    file.write_text(json.dumps(found))
    with pytest.raises(RunError, match="no relation has 20 queries in one direction; the most frequent one has 19"):
        take(pretrained, world, "syntax")


def part(queries: int, held_out: float | None, any_word: float) -> dict[str, Any]:
    held = None if held_out is None else {"value": held_out}
    return {"queries": queries, "best": {"held_out": held, "any_word": {"value": any_word}}}


def test_syntax_is_the_mean_over_frequent_relations_minus_any_word(world: Any, pretrained: Path) -> None:
    relations = {
        "amod": {"dependent_to_head": part(30, 60.0, 40.0), "head_to_dependent": part(20, 50.0, 60.0)},
        "nsubj": {"dependent_to_head": part(19, 90.0, 10.0), "head_to_dependent": part(25, None, 10.0)},
    }
    kept = pretrained / "measure_heads_val"
    kept.mkdir()
    phrases = part(9, None, 1.0)
    (kept / "alignment.json").write_text(json.dumps({"relations": relations, "phrases": phrases}))
    assert take(pretrained, world, "syntax", split="val") == Measured(value=5.0, examples=50)
    with pytest.raises(RunError, match="all 9 phrases are about one image"):
        take(pretrained, world, "heads", split="val")
    assert FEWEST_QUERIES == SHOWN_FROM


def test_a_command_that_fails_shows_its_last_lines(world: Any, pretrained: Path, tmp_path: Path) -> None:
    bare = world.annotations(tmp_path / "scenes")
    with pytest.raises(RunError, match=r"(?s)visling analysis alignment .*ended with status \d.*flickr30k_entities"):
        take(pretrained, world, "heads", data=bare)


# unread


def test_hidden_regions_are_named_without_any_text(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(world, tmp_path / "run")
    store = NativeStore.open(world.regions)
    found = take(run, world, "unread", split="train")
    images = [path.stem for path in (world.scenes / "images" / "train").iterdir()]
    regions = sum(store.count(image) for image in images)
    assert found.examples is not None
    assert abs(found.examples - HIDDEN_SHARE * regions) < 4 * (HIDDEN_SHARE * (1 - HIDDEN_SHARE) * regions) ** 0.5
    assert take(run, world, "unread", split="val") != found
    with monkeypatch.context() as patched:
        patched.setattr(claim_measures, "open_run", forbid)
        assert take(run, world, "unread", split="train") == found
    # A model that always names the class of most hidden regions is right as often as that class is.
    always = _name_always(run, tmp_path / "always", world)
    assert {one.examples for one in always} == {found.examples}
    assert sum(one.value for one in always) == pytest.approx(100.0)


def _name_always(run: Path, out: Path, world: Any) -> list[Measured]:
    """What is measured of models each of which predicts one class, whatever it sees, and the background even more."""
    measured = []
    store = NativeStore.open(world.regions)
    for number in range(len(store.class_names)):
        planted = Path(shutil.copytree(run, out / str(number)))
        weights = dict(read_model_folder(planted).weights)
        weights["objectives.masked_regions.head.outputs.classes.weight"] *= 0
        bias = weights["objectives.masked_regions.head.outputs.classes.bias"]
        bias *= 0
        bias[number], bias[-1] = 1, 2
        write_checked(weights, planted / "model" / "model.safetensors")
        (planted / "measure_unread_train.json").unlink()
        measured.append(take(planted, world, "unread", split="train"))
    return measured


def test_features_computed_from_pixels_are_measured_too(world: Any, tmp_path: Path) -> None:
    run = train(world, tmp_path / "run", *EXTRACTOR, images=world.scenes)
    found = take(run, world, "unread", split="train", images=world.scenes / "images")
    assert found.examples == take(train(world, tmp_path / "stored"), world, "unread", split="train").examples
    assert 0 <= found.value <= 100


def test_a_run_that_predicts_no_class_is_refused(world: Any, pretrained: Path, vqa: Path, tmp_path: Path) -> None:
    for run in (pretrained, vqa):
        with pytest.raises(RunError, match="not pre-trained to predict the class of hidden regions"):
            take(run, world, "unread")
    features = train(world, tmp_path / "run", 'region_losses={classes = "none", features = "l2"}')
    with pytest.raises(RunError, match="not pre-trained to predict the class"):
        take(features, world, "unread")


# what is refused of all


def test_unfinished_runs_and_random_weights_of_scores_are_refused(world: Any, vqa: Path) -> None:
    with pytest.raises(ConfigError, match="found the measure 'score'"):
        take(vqa, world, "score", random_seed=0)
    known = json.loads((vqa / "run.json").read_text())
    (vqa / "run.json").write_text(json.dumps({**known, "status": "running"}))
    with pytest.raises(RunError, match="is running, and only a finished run is measured"):
        take(vqa, world, "score")
