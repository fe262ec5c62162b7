"""Released weights in and out: every family, BERT's weights, transformers, answers, and what is refused with the way
out."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from official_recordings import lxmert_batch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from visling import config as configs
from visling import models
from visling.checkpoints import catalog
from visling.data.answers import AnswerVocabulary
from visling.errors import CheckpointError, ConfigError, DataError
from visling.models import head_styles
from visling.models.base import Encoder
from visling.models.cvlp import KeyNetwork
from visling.models.task_model import TaskModel
from visling.nn.heads import build
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.matching import Matching
from visling.pretrained import convert as conversion
from visling.pretrained import verify as verification
from visling.pretrained.answers import carry_over, table_of
from visling.pretrained.export import export
from visling.pretrained.features import check_features
from visling.pretrained.folder import KEPT, check_family, load_heads, read_model_folder
from visling.pretrained.recognise import _head, _only_preset
from visling.recipes.tables import PRETRAINING
from visling.regions.store import NativeStore
from visling.runs import pretrain as pretraining
from visling.tasks.vqa import VQA
from visling.types import Batch, Regions, Text

FAMILIES = models.names()
TUNED = ("visualbert vqa", "vlbert vqa", "vilbert vqa", "lxmert vqa")
OFFLINE = {"offline": True}


def answers_file(folder: Path, count: int, suffix: str = ".json") -> Path:
    """Answers `a0`, `a1`, ..."""
    path = folder / f"answers{suffix}"
    answers = [f"a{number}" for number in range(count)]
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(answers))
    else:
        AnswerVocabulary(answers).save(path)
    return path


def convert(source: Any, tmp_path: Path, *, suffix: str = ".pth", **options: Any) -> conversion.Converted:
    """A recorded file, saved and converted into `model`."""
    if source.answers and "answers" not in options and not options.get("encoder_only"):
        options["answers"] = [answers_file(tmp_path, source.answers)]
    given = {"layout": source.layout, "model": source.model, "config": source.config} | options
    return conversion.convert(source.save(tmp_path / f"weights{suffix}"), tmp_path / "model", **given)


def same_tensors(found: Path, expected: dict[str, Tensor]) -> None:
    written = load_file(found) if found.suffix == ".safetensors" else torch.load(found, weights_only=True)
    assert written.keys() == expected.keys()
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(written[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------------------- in
# and out


@pytest.mark.parametrize("name", [*FAMILIES, *TUNED, "vilbert multitask"])
def test_a_file_goes_in_and_comes_out_bit_for_bit(recorded: Any, tmp_path: Path, name: str) -> None:
    source = recorded(name)
    done = convert(source, tmp_path)
    assert done.coverage.complete
    assert (done.task, bool(source.answers)) in (("vqa", True), (None, False))
    for file in ("back.pth", "back.safetensors"):
        exported = export(tmp_path / "model", tmp_path / file)
        assert exported.layout == source.layout
        same_tensors(tmp_path / file, dict(source.weights))


@pytest.mark.parametrize("name", ["lxmert", "vilbert"])
def test_a_file_in_half_precision_comes_back_in_half_precision(recorded: Any, tmp_path: Path, name: str) -> None:
    source = recorded(name)
    whole = ("bert.embeddings.LayerNorm.weight", "bert.pooler.dense.bias", "bert.t_pooler.dense.bias")
    weights = {key: tensor if key in whole else tensor.half() for key, tensor in source.weights.items()}
    convert(replace(source, weights=weights), tmp_path)
    saved = read_model_folder(tmp_path / "model")
    assert {tensor.dtype for tensor in saved.weights.values()} == {torch.float32}
    export(tmp_path / "model", tmp_path / "back.pth")
    same_tensors(tmp_path / "back.pth", weights)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in weights.items()
    }  # written in today's spelling
    shutil.rmtree(tmp_path / "model")
    convert(replace(source, weights=old), tmp_path)
    export(tmp_path / "model", tmp_path / "again.pth")
    same_tensors(tmp_path / "again.pth", weights)


def test_what_is_never_read_is_kept_for_the_way_back_alone(recorded: Any, tmp_path: Path) -> None:
    source = recorded("vilbert")
    done = convert(source, tmp_path)
    kept = load_file(tmp_path / "model" / KEPT)
    assert kept.keys() == done.coverage.dropped.keys()
    assert any("q_dense1" in name for name in kept)
    saved = read_model_folder(tmp_path / "model")
    assert not any("q_dense" in name for name in saved.weights)
    saved.save_pretrained(tmp_path / "copy")
    export(tmp_path / "copy", tmp_path / "back.pth")
    same_tensors(tmp_path / "back.pth", dict(source.weights))
    export(tmp_path / "copy", tmp_path / "other.pth", layout="first")  # another layout has no names for it
    assert torch.load(tmp_path / "other.pth", weights_only=True).keys() == source.weights.keys() - kept.keys()
    shutil.rmtree(tmp_path / "model")
    convert(source, tmp_path, encoder_only=True)
    assert not (tmp_path / "model" / KEPT).exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_folder(recorded: Any, tmp_path: Path, name: str) -> None:
    source = recorded(name)
    convert(source, tmp_path)
    kept = {KEPT} if source.model == "vilbert" else set()  # the others' files hold nothing that is never read
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "README.md",
        *kept,
    }
    saved = read_model_folder(tmp_path / "model")
    assert (saved.model, saved.config, saved.task, saved.fingerprint, saved.text_only) == (
        source.model,
        source.config,
        None,
        "",
        False,
    )
    assert (saved.source["file"], saved.source["layout"]) == ("weights.pth", source.layout)
    assert {"objectives.masked_lm.head", "objectives.matching.head"} <= saved.heads.keys()
    encoder = saved.encoder()
    mapped = models.spec(source.model).keys[source.layout].convert(source.weights)[0]
    ours = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    assert all(torch.equal(ours[key], tensor) for key, tensor in mapped.items() if key.startswith("encoder."))
    for place in saved.heads:
        assert saved.head(place, encoder)
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: visling\n")
    for words in (f"# {source.model}", "weights.pth", "not recorded", "objectives.masked_lm.head (vocabulary"):
        assert words in card


@pytest.mark.parametrize("name", TUNED)
def test_a_classifier_becomes_a_task_model(recorded: Any, tmp_path: Path, name: str) -> None:
    source = recorded(name)
    convert(source, tmp_path)
    model, task = read_model_folder(tmp_path / "model").task_model()
    assert isinstance(task, VQA)
    assert list(task.answers) == [f"a{number}" for number in range(source.answers)]
    assert (task.config.loss, task.config.mask_unknown) == {"visualbert": ("kl", True), "vlbert": ("bce", False)}.get(
        source.model, ("bce", None)
    )
    batch = verification.sample_batch(read_model_folder(tmp_path / "model"), 0)
    assert model.eval()(batch)["classify"].shape == (4, source.answers)


def test_logits_are_those_of_the_release(recorded: Any, tmp_path: Path) -> None:
    source = recorded("lxmert vqa")
    convert(source, tmp_path)
    inputs = load_file(source.folder / "inputs.safetensors")
    model, _ = read_model_folder(tmp_path / "model").task_model()
    logits = model.eval()(lxmert_batch(inputs, inputs["visual_feats"]))["classify"]
    assert_close(logits, load_file(source.folder / "finetune_outputs.safetensors")["vqa.logits"], atol=1e-5, rtol=1e-5)


def test_a_head_of_the_first_vilbert_keeps_its_style(recorded: Any, tmp_path: Path) -> None:
    source = recorded("vilbert vqa")
    convert(source, tmp_path)
    model, _ = read_model_folder(tmp_path / "model").task_model()
    pooled = load_file(source.folder / "inputs.safetensors")["beta_vqa_head.pooled"]
    logits = model.eval().heads["classify"](pooled)
    assert_close(logits, load_file(source.folder / "outputs.safetensors")["beta_vqa_head.logits"], atol=1e-5, rtol=1e-5)


def test_other_heads_of_a_multi_task_file_stay_beside_the_tasks(recorded: Any, tmp_path: Path) -> None:
    done = convert(recorded("vilbert multitask"), tmp_path)
    assert {place for place in done.heads if place.startswith("heads.")} == {
        "heads.classify", "heads.classifier_gqa", "heads.pair", "heads.entailment", "heads.score", "heads.regions"
    }  # fmt: skip
    saved = read_model_folder(tmp_path / "model")
    saved.task_model()
    assert (saved.task, saved.task_token) == ("vqa", 1)
    assert saved.head("heads.pair", saved.encoder()).get_parameter("linear.bias").shape == (2,)


def test_a_task_token_can_be_chosen(recorded: Any, tmp_path: Path) -> None:
    """Retrieval on COCO and on Flickr30K have a number each."""
    convert(recorded("vilbert multitask"), tmp_path, task="retrieval", task_token=7, answers=[])
    saved = read_model_folder(tmp_path / "model")
    assert (saved.task, saved.task_token) == ("retrieval", 7)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ConfigError, match="the model has no task tokens"):
        convert(recorded("visualbert"), tmp_path, task_token=7)


def test_the_encoder_alone(recorded: Any, tmp_path: Path) -> None:
    done = convert(recorded("vilbert multitask"), tmp_path, encoder_only=True)
    assert not done.heads
    assert all(name.startswith("encoder.") for name in load_file(tmp_path / "model" / "model.safetensors"))
    exported = export(tmp_path / "model", tmp_path / "back.safetensors")
    assert all(name.startswith("bert.") for name in load_file(exported.path))


def test_parameters_that_the_file_lacks_depend_on_the_seed_alone(recorded: Any, tmp_path: Path) -> None:
    made = []
    for seed in (0, 0, 1):
        convert(recorded("vlbert vqa"), tmp_path, seed=seed)
        made.append(load_file(tmp_path / "model" / "model.safetensors")["encoder.pooler.dense.weight"])
        shutil.rmtree(tmp_path / "model")
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("suffix", [".bin", ".th", ".model", ".tar"])
def test_every_suffix_is_read(recorded: Any, tmp_path: Path, suffix: str) -> None:
    assert convert(recorded("visualbert"), tmp_path, suffix=suffix).coverage.complete


def test_a_folder_with_one_weight_file_is_a_source(recorded: Any, tmp_path: Path) -> None:
    source = recorded("lxmert")
    (tmp_path / "given").mkdir()
    save_file({key: tensor.clone() for key, tensor in source.weights.items()}, tmp_path / "given" / "model.safetensors")
    done = conversion.convert(
        tmp_path / "given", tmp_path / "model", model="lxmert", layout="official", config=source.config
    )
    assert done.coverage.complete
    (tmp_path / "given" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds 0 weight files: none"):
        conversion.convert(tmp_path / "given", tmp_path / "other")


def test_our_own_run_is_written_in_a_released_layout(world: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"cannot be written as 'official' of visualbert.*'encoder.region_features.whiten"
    ):
        export(world.vqa, tmp_path / "out.pth")
    plain = shutil.copytree(world.pretrained / "model", tmp_path / "plain")
    weights = {key: tensor for key, tensor in load_file(plain / "model.safetensors").items() if ".whiten." not in key}
    save_file(weights, plain / "model.safetensors")
    exported = export(plain, tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert exported.layout == "official"
    assert torch.equal(written["bert.cls.predictions.bias"], weights["objectives.masked_lm.head.bias"])
    assert torch.equal(written["bert.cls.seq_relationship.bias"], weights["objectives.matching.head.linear.bias"])
    assert not list(tmp_path.glob("*.part"))


# ---------------------------------------------------------------------------------------------------------------- what
# a source is


def test_family_and_layout_are_found_by_the_names(recorded: Any, tmp_path: Path) -> None:
    source = recorded("cvlp")
    done = convert(source, tmp_path, layout=None, model=None)
    assert (done.model, done.layout) == ("cvlp", "official")
    with pytest.raises(
        CheckpointError, match=r"fit --model lxmert --from official or --model cvlp --from official. Choose with"
    ):
        conversion.convert(recorded("lxmert").save(tmp_path / "l.pth"), tmp_path / "l")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"fit no family: the first are a.weight\.$"):
        conversion.convert(tmp_path / "odd.pth", tmp_path / "odd")


def test_the_preset_is_found_by_the_shapes(full_size: Any, tmp_path: Path) -> None:
    for family, variant, expected in (
        ("visualbert", "nlvr2_pretraining(coco/task)", "nlvr2"),
        ("visualbert", "bypass_variant_extra_keys", "vqa_bypass"),
    ):
        released = full_size(family)[variant]
        tensors = {name: torch.empty(shape, device="meta") for name, shape in released.shapes.items()}
        found = _only_preset(tensors, models.spec(family), family, "official")
        assert found == expected
    tensors = {
        name: torch.empty(shape, device="meta") for name, shape in full_size("vilbert")["pretraining"].shapes.items()
    }
    with pytest.raises(
        CheckpointError, match=r"fit several presets of vilbert: connect6, vqa, vcr, .*choose with --preset"
    ):
        _only_preset(tensors, models.spec("vilbert"), "vilbert", "multitask")


def test_a_size_of_no_preset_is_named(recorded: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fits no preset of visualbert in layout 'official'.*--set"):
        conversion.convert(
            recorded("visualbert").save(tmp_path / "w.pth"), tmp_path / "m", model="visualbert", layout="official"
        )


def test_settings_change_a_preset(recorded: Any, tmp_path: Path) -> None:
    source = recorded("visualbert")
    differences = [
        "hidden_size=32", "num_layers=3", "num_heads=4", "intermediate_size=64", "max_positions=24", "max_tokens=9",
        "feature_size=20",
        "vocab_size=120", f"vocabulary={source.config.vocabulary}",
    ]  # fmt: skip
    given = {"model": "visualbert", "layout": "official", "preset": "nlvr2"}
    done = conversion.convert(source.save(tmp_path / "w.pth"), tmp_path / "m", settings=differences, **given)
    assert done.preset == "nlvr2"
    with pytest.raises(ConfigError, match=r"30522 entries, but the word table has 120 rows.*--set vocabulary=FILE"):
        conversion.convert(tmp_path / "w.pth", tmp_path / "n", settings=differences[:-1], **given)


def test_a_file_that_is_called_like_a_release_is_taken_for_it(
    recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = recorded("visualbert")
    done = conversion.convert(source.save(tmp_path / "vqa_pre_trained.th"), tmp_path / "m", config=source.config)
    assert (done.release, done.model, done.layout) == ("vqa_pre_trained", "visualbert", "official")
    saved = read_model_folder(tmp_path / "m")
    assert saved.source["licence"] == "none stated; code MIT"
    assert saved.source["address"] in (tmp_path / "m" / "README.md").read_text()
    known = [replace(entry, size=3) for entry in catalog.RELEASED_FILES if entry.name == "vqa_pre_trained"]
    monkeypatch.setattr(catalog, "RELEASED_FILES", tuple(known))
    with pytest.raises(CheckpointError, match=r"bytes; vqa_pre_trained has 3. Fetch it again"):
        conversion.convert(tmp_path / "vqa_pre_trained.th", tmp_path / "n", config=source.config)
    monkeypatch.setattr(catalog, "RELEASED_FILES", tuple(replace(entry, size=None, sha256="00") for entry in known))
    with pytest.raises(CheckpointError, match=r"has the SHA-256 .*; vqa_pre_trained has 00"):
        conversion.convert(tmp_path / "vqa_pre_trained.th", tmp_path / "n", config=source.config)


def test_a_release_that_is_not_here_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISLING_HOME", str(tmp_path / "home"))
    with pytest.raises(CheckpointError, match=r"published at https://drive.google.com/.*Download it"):
        conversion.convert("vqa_fine_tuned", tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"http://nlp.cs.unc.edu/data/model_LXRT.pth is not asked while offline"):
        conversion.convert("model_LXRT", tmp_path / "m", offline=True)
    with pytest.raises(CheckpointError, match=r"no weight file gone.pth.*visling catalog"):
        conversion.convert("gone.pth", tmp_path / "m")
    with pytest.raises(CheckpointError, match="Did you mean 'vqa_fine_tuned'"):
        conversion.convert("gone.pth", tmp_path / "m", release="vqa_fine_tune")


@pytest.mark.parametrize("source", ["uclanlp/visualbert-vqa", "visualbert-vqa"])
def test_the_hub_is_not_asked_while_offline(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        CheckpointError,
        match=r"visualbert-vqa is neither a folder here.*not asked while offline \(HF_HUB_OFFLINE",
    ):
        conversion.convert(source, tmp_path / "m", offline=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not asked while offline"):
        conversion.convert(source, tmp_path / "m")


def test_a_repository_is_a_source(recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = recorded("visualbert"), []
    (tmp_path / "cached").mkdir()
    weights = load_file(source.folder / "hf" / "state_dict.safetensors")
    torch.save(weights, tmp_path / "cached" / "pytorch_model.bin")

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options["local_files_only"]))
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    done = conversion.convert("uclanlp/visualbert-vqa-coco-pre", tmp_path / "m", config=source.config)
    assert asked == [("uclanlp/visualbert-vqa-coco-pre", False)]
    assert (done.release, done.layout) == ("visualbert-vqa-coco-pre", "transformers")
    export(tmp_path / "m", tmp_path / "official.pth")
    same_tensors(tmp_path / "official.pth", dict(source.weights))


# ---------------------------------------------------------------------------------------------------------------- what
# is refused


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("visualbert", ("visualbert", "transformers"), "--model visualbert --from official"),
        ("lxmert vqa", ("lxmert", "official"), "--model lxmert --from official_finetuned"),
        ("vilbert vqa", ("vilbert", "multitask"), "--model vilbert --from first"),
        ("vlbert vqa", ("vlbert", "official"), "--model vlbert --from vqa"),
        ("visualbert", ("lxmert", "official"), "--model visualbert --from official"),
    ],
)
def test_another_layout_is_refused_and_the_right_one_named(
    recorded: Any, tmp_path: Path, name: str, wrong: tuple[str, str], right: str
) -> None:
    model, layout = wrong
    config = recorded(model).config
    with pytest.raises(CheckpointError) as caught:
        convert(recorded(name), tmp_path, model=model, layout=layout, config=config)
    assert f"The names fit {right}" in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_an_unknown_layout_is_refused_and_the_right_one_named(recorded: Any, tmp_path: Path) -> None:
    for wrong in ("offical", "vqa_start"):
        with pytest.raises(
            ConfigError, match=rf"vlbert has no layout '{wrong}'.*The names fit --model vlbert --from official"
        ):
            convert(recorded("vlbert"), tmp_path, layout=wrong)
    convert(recorded("vlbert"), tmp_path)
    with pytest.raises(ConfigError, match=r"vlbert has no layout 'transformers'"):
        export(tmp_path / "model", tmp_path / "out", layout="transformers")


def test_another_size_is_refused_with_both_shapes(recorded: Any, tmp_path: Path) -> None:
    source = recorded("visualbert")
    with pytest.raises(CheckpointError, match=r"encoder.projection.weight \(32, 20\) -> \(32, 21\)"):
        convert(source, tmp_path, config=replace(source.config, feature_size=21))


def test_a_missing_weight_is_named(recorded: Any, tmp_path: Path) -> None:
    source = recorded("lxmert")
    for lost, words in (
        ("bert.pooler.dense.bias", "encoder.pooler.dense.bias"),
        ("answer_head.logit_fc.3.bias", "the head 'answers' .* damaged file"),
    ):
        less = replace(source, weights={key: tensor for key, tensor in source.weights.items() if key != lost})
        with pytest.raises(CheckpointError, match=words):
            convert(less, tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(recorded: Any, tmp_path: Path, suffix: str) -> None:
    source = recorded("visualbert")
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file({key: tensor.clone() for key, tensor in source.weights.items()}, path)
    else:
        source.save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"[Ff]etch it again"):
        conversion.convert(path, tmp_path / "m", model="visualbert", layout="official", config=source.config)


def test_nothing_is_overwritten(recorded: Any, tmp_path: Path) -> None:
    source = recorded("visualbert")
    (tmp_path / "model").mkdir()
    convert(source, tmp_path)  # an empty folder will do
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"model exists.*nothing is overwritten"):
        convert(source, tmp_path)
    (tmp_path / "file").write_text("x")
    for layout, out in (("official", tmp_path / "file"), ("transformers", tmp_path / "model")):
        with pytest.raises(CheckpointError, match=r"exists.*nothing is overwritten"):
            export(tmp_path / "model", out, layout=layout)
    with pytest.raises(CheckpointError, match=r"cannot write"):
        export(tmp_path / "model", tmp_path / "file" / "below.pth")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "file"),
    [("visualbert vqa", "answers_vqa.txt"), ("vlbert vqa", "answers_vqa.txt"), ("lxmert vqa", "label2ans.json")],
)
def test_a_classifier_needs_its_answers(recorded: Any, tmp_path: Path, name: str, file: str) -> None:
    source = recorded(name)
    with pytest.raises(CheckpointError, match=rf"over {source.answers} answers.*--answers FILE.*{file}.*another order"):
        convert(source, tmp_path, answers=(), task="vqa")
    with pytest.raises(CheckpointError, match=rf"lists 7 answers, but the classifier has {source.answers}.*{file}"):
        convert(source, tmp_path, answers=[answers_file(tmp_path, 7)])
    assert not (tmp_path / "model").exists()


def test_a_classifier_of_released_size_is_question_answering(recorded: Any, tmp_path: Path) -> None:
    source = recorded("lxmert vqa")
    wide = {
        name: torch.zeros(3129, *tensor.shape[1:]) if name.startswith("logit_fc.3") else tensor
        for name, tensor in source.weights.items()
    }
    with pytest.raises(CheckpointError, match="over 3129 answers"):
        convert(replace(source, weights=wide, answers=0), tmp_path)


def widened(source: Any, outputs: int, last: str) -> Any:
    """The file with a classifier of released size, all zeros."""
    wide = {
        name: torch.zeros(outputs, *tensor.shape[1:]) if name.startswith(last) else tensor
        for name, tensor in source.weights.items()
    }
    return replace(source, weights=wide, answers=0)


@pytest.mark.parametrize(
    ("name", "outputs", "last"),
    [("lxmert vqa", 1842, "logit_fc.3"), ("vilbert multitask", 1533, "vil_prediction_gqa.logit_fc.3")],
)
def test_a_classifier_over_the_answers_of_gqa_needs_its_list_too(
    recorded: Any, tmp_path: Path, name: str, outputs: int, last: str
) -> None:
    source = widened(recorded(name), outputs, last)
    answers = [answers_file(tmp_path, recorded(name).answers)] if name.startswith("vilbert") else []
    with pytest.raises(
        CheckpointError, match=rf"over {outputs} answers, whose order it does not contain.*trainval_label2ans"
    ):
        convert(source, tmp_path, answers=answers)
    assert not (tmp_path / "model").exists()


def test_a_classifier_over_the_answers_of_gqa_alone_makes_a_model_of_gqa(recorded: Any, tmp_path: Path) -> None:
    source = widened(recorded("lxmert vqa"), 1842, "logit_fc.3")
    assert convert(source, tmp_path, answers=[answers_file(tmp_path, 1842)], other_answers=True).task == "gqa"
    _, task = read_model_folder(tmp_path / "model").task_model()
    assert task.state()["config"]["loss"] == "bce"
    assert task.answers is not None
    assert len(task.answers) == 1842


def test_every_classifier_has_a_list_of_its_own(recorded: Any, tmp_path: Path) -> None:
    source = recorded("vilbert multitask")
    gqa = widened(source, 1533, "vil_prediction_gqa.logit_fc.3")
    lists = [answers_file(tmp_path, source.answers), answers_file(tmp_path, 1533, ".pkl")]
    for order in (lists, lists[::-1]):
        assert convert(gqa, tmp_path, answers=order).task == "vqa"
        saved = read_model_folder(tmp_path / "model")
        assert len(saved.state["answers"]) == source.answers
        assert saved.state["others"] == {"heads.classifier_gqa": [f"a{number}" for number in range(1533)]}
        assert list(saved.task_model()[1].state()["answers"]) == saved.state["answers"]
        shutil.rmtree(tmp_path / "model")


LISTS: dict[str, list[str]] = {
    "unknown first": ["<unk>", *(f"a{number}" for number in range(3128))],
    "unknown listed": [
        *(f"a{number}" for number in range(3000)),
        "<unk>",
        *(f"a{number}" for number in range(3000, 3128)),
    ],
    "unknown absent": [f"a{number}" for number in range(3129)],
    # of airsplay/lxmert, data/vqa/trainval_label2ans.json (MIT licence), without white space
    "lxmert": json.loads((Path(__file__).parent / "files" / "lxmert_vqa_label2ans.json").read_text()),
}


@pytest.mark.parametrize(
    ("name", "last", "right", "wrong"),
    [
        ("visualbert vqa", "bert.classifier", ["unknown first"], {
            "unknown listed": "<unk> must be the first answer, and is number 3000",
            "lxmert": "must be the first answer, and is missing",
        }),
        ("vlbert vqa", "final_mlp.2", ["unknown first", "unknown listed"], {"lxmert": "it lacks <unk>"}),
        ("vilbert vqa", "vil_prediction.main.3.", ["lxmert", "unknown absent"], {"unknown first": "it holds <unk>"}),
        ("lxmert vqa", "logit_fc.3", ["lxmert"], {
            "unknown first": "it holds <unk>", "unknown absent": "their order differ .the first are 'a0'",
        }),
    ],
)  # fmt: skip
def test_the_list_of_another_release_is_refused(
    recorded: Any, tmp_path: Path, name: str, last: str, right: list[str], wrong: dict[str, str]
) -> None:
    source = widened(recorded(name), 3129, last)
    if name == "vilbert vqa":  # its gains are single numbers
        source = replace(source, weights=source.weights | {"vil_prediction.main.3.weight_g": torch.tensor(1.0)})
    for number, listed in enumerate([*wrong, *right]):
        AnswerVocabulary(LISTS[listed]).save(tmp_path / f"{number}.json")
        if listed in wrong:
            with pytest.raises(
                CheckpointError, match=rf"not the list of the release: .*{wrong[listed]}.*pass --other-answers"
            ):
                convert(source, tmp_path, answers=[tmp_path / f"{number}.json"])
            convert(source, tmp_path, answers=[tmp_path / f"{number}.json"], other_answers=True)
        else:
            convert(source, tmp_path, answers=[tmp_path / f"{number}.json"])
        assert read_model_folder(tmp_path / "model").state["answers"] == LISTS[listed]
        shutil.rmtree(tmp_path / "model")


def test_cvlp_starts_from_an_lxmert_file_with_its_heads(recorded: Any, tmp_path: Path) -> None:
    source = recorded("lxmert")
    convert(source, tmp_path)
    lxmert = read_model_folder(tmp_path / "model")
    with pytest.raises(
        CheckpointError,
        match=r"holds lxmert, but the recipe trains cvlp.*--to-layout official.*--model cvlp --from official",
    ):
        check_family(lxmert, "cvlp")
    with pytest.raises(
        CheckpointError, match=r"holds lxmert, but the recipe trains vilbert\. Name a model of vilbert with --init"
    ):
        check_family(lxmert, "vilbert")
    export(tmp_path / "model", tmp_path / "official.pth")
    config = models.spec("cvlp").config(**vars(source.config))
    conversion.convert(tmp_path / "official.pth", tmp_path / "start", model="cvlp", layout="official", config=config)
    start = read_model_folder(tmp_path / "start")
    check_family(start, "cvlp")
    encoder = start.encoder()
    styles = head_styles("cvlp")
    objectives = {
        "masked_lm": MaskedLM(encoder.dims, styles["vocabulary"], encoder.word_embeddings),
        "matching": Matching(encoder.dims, styles["matching"], encoder.word_embeddings),
    }
    assert load_heads(objectives, start) == []
    assert torch.equal(
        objectives["matching"].get_parameter("head.linear.bias"), source.weights["cls.seq_relationship.bias"]
    )
    assert torch.equal(objectives["masked_lm"].get_parameter("head.bias"), source.weights["cls.predictions.bias"])


@pytest.mark.parametrize("model", ["lxmert", "cvlp"])
def test_the_answer_table_of_pre_training_is_carried_over_to_a_task(recorded: Any, tmp_path: Path, model: str) -> None:
    source = replace(
        recorded("lxmert"), model=model, config=models.spec(model).config(**vars(recorded("lxmert").config))
    )
    bias = source.weights["answer_head.logit_fc.3.bias"]
    table = [f"a{number}" for number in range(len(bias))]
    (tmp_path / "all_ans.json").write_text(json.dumps([{"ans": answer, "dsets": ["vqa"]} for answer in table]))
    done = convert(source, tmp_path, layout="official", answers=[tmp_path / "all_ans.json"])
    assert done.task is None
    saved = read_model_folder(tmp_path / "model")
    assert list(table_of(saved)) == table
    task = VQA.from_state({"config": {}, "answers": ["a3", "not in the table", "The a1."]})
    made = TaskModel(saved.encoder(), task.heads, head_styles(model), group=task.group)
    assert carry_over(made, saved, task.state()["answers"]).endswith("2 of 3 answers carried over")
    assert torch.equal(
        made.heads["classify"].get_parameter("linear.bias"), torch.stack([bias[3], torch.tensor(0.0), bias[1]])
    )
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "all_ans.json").write_text(json.dumps([{"ans": answer, "dsets": ["vqa"]} for answer in table[:-1]]))
    with pytest.raises(
        CheckpointError, match=rf"lists {len(table) - 1} answers, but the classifier has {len(table)}.*all_ans.json"
    ):
        convert(source, tmp_path, layout="official", answers=[tmp_path / "all_ans.json"])


def test_answers_without_a_classifier_are_refused(recorded: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs a classifier over answers; the file has none, only: vocabulary"):
        convert(recorded("visualbert"), tmp_path, answers=[answers_file(tmp_path, 3)])
    with pytest.raises(ConfigError, match="the task nlvr has no list of answers"):
        convert(recorded("visualbert nlvr"), tmp_path, answers=[answers_file(tmp_path, 3)], task="nlvr")
    with pytest.raises(
        CheckpointError, match=r"needs a head of kind classify with 2 outputs; the file has classifier \(classify, 31\)"
    ):
        convert(recorded("visualbert vqa"), tmp_path, answers=(), task="nlvr")


def test_a_task_without_answers(recorded: Any, tmp_path: Path) -> None:
    assert convert(recorded("visualbert nlvr"), tmp_path, task="nlvr").task == "nlvr"
    model, task = read_model_folder(tmp_path / "model").task_model()
    assert task.name == "nlvr"
    assert model.heads.keys() == {"classify"}


@pytest.mark.parametrize("suffix", [".json", ".txt", ".pkl"])
def test_lists_of_answers(tmp_path: Path, suffix: str) -> None:
    assert list(AnswerVocabulary.load(answers_file(tmp_path, 3, suffix))) == ["a0", "a1", "a2"]


def test_a_pickled_list_runs_nothing(tmp_path: Path) -> None:
    class Touches:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    path = tmp_path / "answers.pkl"
    for content, words in (
        (pickle.dumps(["a", Touches()]), "which no data file needs"),
        (b"\x80\x04", "is not read"),
        (pickle.dumps({}), "found dict"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            AnswerVocabulary.load(path)
    with pytest.raises(DataError, match="Check the path"):
        AnswerVocabulary.load(tmp_path / "gone.pkl")
    assert not (tmp_path / "touched").exists()


# ----------------------------------------------------------------------------------------------------------------
# features


def test_the_features_are_told_or_asked_for(recorded: Any, world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    convert(recorded("visualbert"), tmp_path)
    unknown = read_model_folder(tmp_path / "model")
    with pytest.raises(
        CheckpointError,
        match=r"which region features they were trained on is not recorded.*--other-features.*--features STORE",
    ):
        check_features(unknown, store, override=False)
    check_features(unknown, store, override=True)
    shutil.rmtree(tmp_path / "model")
    convert(recorded("visualbert"), tmp_path, features=world.regions)
    check_features(read_model_folder(tmp_path / "model"), store, override=False)


# ---------------------------------------------------------------------------------------------------------------- BERT


def bert_of(encoder: Encoder, layers: int, *, old: bool = False) -> dict[str, Tensor]:
    """BERT of an encoder's text width, as released."""
    config = encoder.config
    width, vocabulary = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (vocabulary, width),
        "bert.embeddings.position_embeddings.weight": (config.max_positions, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
        "cls.predictions.bias": (vocabulary,),
    }
    linear = {
        "bert.pooler.dense": (width, width),
        "cls.predictions.transform.dense": (width, width),
        "cls.seq_relationship": (2, width),
    }
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for number in range(layers):
        name = f"bert.encoder.layer.{number}"
        linear |= {f"{name}.attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        linear |= {
            f"{name}.attention.output.dense": (width, width),
            f"{name}.intermediate.dense": (config.intermediate_size, width),
        }
        linear |= {f"{name}.output.dense": (width, config.intermediate_size)}
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {
        f"{name}.{part}": (width,) for name in norms for part in (("gamma", "beta") if old else ("weight", "bias"))
    }
    made = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**made, "cls.predictions.decoder.weight": made["bert.embeddings.word_embeddings.weight"]}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_starts_from_bert(world: Any, tmp_path: Path, model: str, bare: bool) -> None:
    encoder = models.build_tiny(model)
    layers = 12 if model in ("lxmert", "cvlp") else encoder.config.num_layers
    weights = bert_of(encoder, layers, old=not bare)
    if model in ("lxmert", "cvlp"):  # nine layers there; the tiny preset has fewer, and reads these
        weights = {
            name: tensor
            for name, tensor in weights.items()
            if ".layer." not in name or int(name.split(".")[3]) < encoder.config.num_text_layers
        }
    if bare:  # a file of the bare model
        weights = {name.removeprefix("bert."): tensor for name, tensor in weights.items() if name.startswith("bert.")}
    torch.save(weights, tmp_path / "bert.bin")
    given: dict[str, Any] = {"layout": "bert", "model": model, "preset": "tiny"}
    with pytest.raises(ConfigError, match="name the store with --features"):
        conversion.convert(tmp_path / "bert.bin", tmp_path / "start", **given)
    done = conversion.convert(tmp_path / "bert.bin", tmp_path / "start", features=world.regions, **given)
    assert done.task is None
    assert bool(done.heads) == (not bare)
    saved = read_model_folder(tmp_path / "start")
    assert saved.text_only  # trained without regions, so any store will do
    check_features(saved, NativeStore.open(world.other_regions), override=False)
    start = saved.encoder()
    words = weights["embeddings.word_embeddings.weight" if bare else "bert.embeddings.word_embeddings.weight"]
    assert torch.equal(start.word_embeddings.weight, words)
    if model == "visualbert":
        assert torch.equal(
            start.get_parameter("visual_positions.weight"), start.get_parameter("embeddings.positions.weight")
        )


def test_pretraining_starts_from_bert(world: Any, tmp_path: Path) -> None:
    run = PRETRAINING["visualbert-scenes"]()
    settings = [*world.settings, "encoder.feature_size=16"]
    run = configs.override(run, settings)
    torch.save(bert_of(models.build("visualbert", run.encoder), run.encoder.num_layers), tmp_path / "bert.bin")
    start = tmp_path / "start"
    conversion.convert(
        tmp_path / "bert.bin", start, layout="bert", model="visualbert", config=run.encoder, features=world.regions
    )
    state = pretraining.pretrain(
        run, tmp_path / "run", data=[str(world.scenes)], store=world.other_regions, init=start, device="cpu"
    )
    assert state.stopped == "finished"


# ----------------------------------------------------------------------------------------------------------------
# transformers


def batch_of(feature_size: int, vocabulary: int) -> Batch:
    """Two rows without padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, vocabulary, (2, 6), generator=generator)
    return Batch(
        text=Text(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), segments=torch.zeros_like(ids)),
        regions=Regions(
            features=torch.randn(2, 4, feature_size, generator=generator),
            boxes=torch.tensor([0.1, 0.2, 0.6, 0.9]).expand(2, 4, 4),
            mask=torch.ones(2, 4, dtype=torch.bool),
            size=torch.ones(2, 2),
        ),
    )


def from_transformers(folder: Path) -> Any:
    """The folder as its own class in the installed package, every weight of it there and known."""
    transformers = pytest.importorskip("transformers")
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, about = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    # position_ids is a constant; the value projection of phrase grounding is never read, and no release's key map keeps
    # it
    missing = {name for name in about["missing_keys"] if "position_ids" not in name and "attention.value" not in name}
    assert not missing
    assert not about["unexpected_keys"]
    assert not about["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("visualbert", "VisualBertForPreTraining"),
        ("visualbert vqa", "VisualBertForQuestionAnswering"),
        ("visualbert nlvr", "VisualBertForVisualReasoning"),
        ("visualbert multichoice", "VisualBertForMultipleChoice"),
        ("visualbert flickr", "VisualBertForRegionToPhraseAlignment"),
    ],
)
def test_visualbert_in_transformers(recorded: Any, tmp_path: Path, name: str, architecture: str) -> None:
    source = recorded(name)
    convert(source, tmp_path)
    assert export(tmp_path / "model", tmp_path / "hf", layout="transformers").layout == "transformers"
    theirs = from_transformers(tmp_path / "hf")
    assert type(theirs).__name__ == architecture
    saved = read_model_folder(tmp_path / "model")
    batch = batch_of(source.config.feature_size, source.config.vocab_size)
    assert batch.regions is not None
    given = {
        "input_ids": batch.text.ids,
        "attention_mask": batch.text.mask.long(),
        "token_type_ids": batch.text.segments,
        "visual_embeds": batch.regions.features,
        "visual_attention_mask": batch.regions.mask.long(),
        "visual_token_type_ids": torch.zeros(2, 4, dtype=torch.long),  # transformers' own default is 1
    }
    with torch.inference_mode():
        encoder = saved.encoder().eval()
        encoded = encoder(batch)
        found = theirs.visual_bert(**given)
        assert_close(torch.cat([encoded.text, encoded.regions], dim=1), found.last_hidden_state, atol=1e-5, rtol=1e-5)
        assert_close(encoded.pooled, found.pooler_output, atol=1e-5, rtol=1e-5)
        if name == "visualbert":
            out = theirs(**given)
            assert_close(
                saved.head("objectives.masked_lm.head", encoder)(encoded.text),
                out.prediction_logits[:, :6],
                atol=1e-5,
                rtol=1e-5,
            )
            assert_close(
                saved.head("objectives.matching.head", encoder)(encoded.pooled),
                out.seq_relationship_logits,
                atol=1e-5,
                rtol=1e-5,
            )
        elif name == "visualbert vqa":
            head = saved.head("heads.classify", encoder).eval()
            assert_close(head(encoded.text[:, 4]), theirs(**given).logits.view(2, -1), atol=1e-5, rtol=1e-5)
            assert theirs.config.id2label[3] == "a3"
    back = conversion.convert(
        tmp_path / "hf",
        tmp_path / "again",
        layout="transformers",
        model="visualbert",
        config=source.config,
        encoder_only=True,
    )
    assert torch.equal(
        read_model_folder(back.path).weights["encoder.projection.weight"], saved.weights["encoder.projection.weight"]
    )


@pytest.mark.parametrize(
    ("name", "encoder_only", "architecture"),
    [
        ("lxmert", False, "LxmertForPreTraining"),
        ("lxmert vqa", False, "LxmertForQuestionAnswering"),
        ("lxmert", True, "LxmertModel"),
    ],
)
def test_lxmert_in_transformers(
    recorded: Any, tmp_path: Path, name: str, encoder_only: bool, architecture: str
) -> None:
    source = recorded(name)
    convert(source, tmp_path, encoder_only=encoder_only)
    export(tmp_path / "model", tmp_path / "hf", layout="transformers")
    theirs = from_transformers(tmp_path / "hf")
    assert type(theirs).__name__ == architecture
    saved = read_model_folder(tmp_path / "model")
    batch = batch_of(source.config.feature_size, source.config.vocab_size)
    assert batch.regions is not None
    given = {
        "input_ids": batch.text.ids,
        "attention_mask": batch.text.mask.long(),
        "token_type_ids": batch.text.segments,
        "visual_feats": batch.regions.features,
        "visual_pos": batch.regions.boxes,
    }
    with torch.inference_mode():
        encoder = saved.encoder().eval()
        encoded = encoder(batch)
        found = (theirs if encoder_only else theirs.lxmert)(**given)
        for ours, their in (
            (encoded.text, found.language_output),
            (encoded.regions, found.vision_output),
            (encoded.pooled, found.pooled_output),
        ):
            assert_close(ours, their, atol=1e-5, rtol=1e-5)
        if name == "lxmert vqa":
            assert_close(
                saved.head("heads.classify", encoder)(encoded.pooled),
                theirs(**given).question_answering_score,
                atol=1e-5,
                rtol=1e-5,
            )
        elif not encoder_only:
            out = theirs(**given)
            assert_close(
                saved.head("objectives.masked_lm.head", encoder)(encoded.text),
                out.prediction_logits,
                atol=1e-5,
                rtol=1e-5,
            )
            assert_close(
                saved.head("objectives.matching.head", encoder)(encoded.pooled),
                out.cross_relationship_score,
                atol=1e-5,
                rtol=1e-5,
            )
            assert_close(
                saved.head("objectives.image_qa.head", encoder)(encoded.pooled),
                out.question_answering_score,
                atol=1e-5,
                rtol=1e-5,
            )


def test_transformers_question_answering_comes_back_as_a_task(recorded: Any, tmp_path: Path) -> None:
    source = recorded("lxmert vqa")
    convert(source, tmp_path)
    export(tmp_path / "model", tmp_path / "hf", layout="transformers")
    again = conversion.convert(
        tmp_path / "hf",
        tmp_path / "again",
        layout="transformers",
        model="lxmert",
        config=source.config,
        answers=[tmp_path / "answers.json"],
    )
    assert again.task == "vqa"
    assert export(tmp_path / "again", tmp_path / "back.safetensors").layout == "official_finetuned"
    same_tensors(tmp_path / "back.safetensors", dict(source.weights))


# ---------------------------------------------------------------------------------------------------------------- full
# size

CATALOGUED = {
    (entry.family, entry.layout, entry.preset, *sorted(entry.heads)): entry for entry in catalog.RELEASED_FILES
}
"""One entry of each kind."""


@pytest.mark.parametrize("entry", CATALOGUED.values(), ids=lambda entry: entry.name)
def test_heads_are_told_by_the_names_and_shapes_of_every_catalogued_file(entry: catalog.ReleasedFile) -> None:
    spec = models.spec(entry.family)
    styles = {
        part: next(
            filter(
                None,
                (
                    spec.head_styles.get((place, name))
                    for place in (entry.layout, spec.layout)
                    for name in (part, head.kind)
                ),
            )
        )
        for part, head in entry.heads.items()
    }
    with torch.device("meta"):
        encoder = spec.build(spec.presets[entry.preset])
        modules = {
            part: build(
                head,
                encoder.dims,
                style=styles[part],
                words=encoder.word_embeddings,
                group=2 if head.kind == "pair" else 1,
            )
            for part, head in entry.heads.items()
        }
        ours = {
            f"{part}.{name}": tensor
            for part, module in {"encoder": encoder, **modules}.items()
            for name, tensor in module.state_dict().items()
        }
        if (entry.family, entry.layout) == ("visualbert", "volta"):  # no pooler there
            ours = {name: tensor for name, tensor in ours.items() if ".pooler." not in name}
        theirs = spec.keys[entry.layout].invert(ours)
    again, _ = spec.keys[entry.layout].convert(theirs)
    for part, head in entry.heads.items():
        tensors = {
            name.removeprefix(f"{part}."): tensor for name, tensor in again.items() if name.startswith(f"{part}.")
        }
        found = _head(part, tensors, spec, entry.layout, encoder)
        assert (found.head.kind, found.style) == (head.kind, styles[part])
        assert found.head.outputs == head.outputs or head.options, part


def test_a_task_without_answers_has_the_settings_of_the_release(recorded: Any, tmp_path: Path) -> None:
    source = replace(recorded("vilbert multitask"), answers=None)
    assert convert(source, tmp_path, task="referring").task == "referring"
    model, task = read_model_folder(tmp_path / "model").task_model()
    settings = models.spec("vilbert").tasks["referring"]
    assert {name: getattr(task.config, name) for name in settings} == settings
    assert torch.equal(model.heads["regions"].linear.weight, source.weights["vision_logit.weight"])


FULL_SIZE = [
    *(("visualbert", variant) for variant in (
        "vqa_pretraining", "vqa_finetuned", "nlvr2_pretraining(coco/task)", "nlvr2_finetuned",
        "vcr_pretraining_transformer_part", "vcr_finetuned_transformer_part", "flickr_pretraining", "flickr_finetuned",
        "bypass_variant_extra_keys", "transformers_vqa_pretraining", "transformers_vqa_finetuned", "volta",
    )),
    *(("vlbert", variant) for variant in ("prec", "e2e", "large", "vqa", "refcoco", "vcr")),
    *(("vilbert", variant) for variant in ("pretraining", "multitask", "first", "volta")),
    *(("lxmert", variant) for variant in ("official", "transformers", "vqa", "volta")),
    *(("cvlp", variant) for variant in ("official", "vqa")),
]  # fmt: skip


def test_every_variant_is_tried(full_size: Callable[[str], dict[str, Any]]) -> None:
    assert {(family, variant) for family in FAMILIES for variant in full_size(family)} == set(FULL_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), FULL_SIZE)
def test_full_size_files_run_and_are_written_back_bit_for_bit(
    full_size: Any, tmp_path: Path, family: str, variant: str
) -> None:
    released = full_size(family)[variant]
    weights = released.weights(torch.Generator().manual_seed(0))
    source, back = tmp_path / "w.pth", tmp_path / "back.pth"
    torch.save(weights, source)
    try:
        answers = []
        for count in released.answers:
            (tmp_path / str(count)).mkdir()
            answers.append(answers_file(tmp_path / str(count), count))
        task = {"nlvr2_finetuned": "nlvr"}.get(variant)
        given = {
            "layout": released.layout,
            "model": family,
            "preset": released.preset,
            "task": task,
            "other_answers": True,
        }
        done = conversion.convert(source, tmp_path / "model", answers=answers, **given)
        saved = read_model_folder(tmp_path / "model")
        batch = verification.sample_batch(saved, 0)
        with torch.inference_mode():
            if done.task is None:
                encoded = saved.encoder().eval()(batch)
                assert all(bool(states.isfinite().all()) for states in (encoded.text[batch.text.mask], encoded.pooled))
            else:
                (logits,) = saved.task_model()[0].eval()(batch).values()
                assert logits.shape[0] == 4
                assert bool(logits.isfinite().all())
        exported = export(tmp_path / "model", back, layout="official")
        expected = released.layout
        if released.layout == "transformers":
            expected = (
                "official_finetuned" if family == "lxmert" and released.answers else "official"
            )  # the release's own
            again = export(tmp_path / "model", tmp_path / "hf", layout="transformers")
            back = again.path / "model.safetensors"
        assert exported.layout == expected
        same_tensors(back, weights)
    finally:
        shutil.rmtree(tmp_path)  # a gigabyte and more


def test_every_name_of_a_full_size_key_file_is_known_and_written_back(full_size: Any) -> None:
    """CVLP's key network, which training alone reads: LXMERT's layers, a successor for every pair of layers and for the
    last, and the projections."""
    shapes = dict(full_size("cvlp")["official"].shapes)
    for layers, successor, count in (
        ("layer", "scc_layer_l", 5),
        ("r_layers", "scc_layer_r", 3),
        ("x_layers", "scc_layer_x", 3),
    ):
        first = f"bert.encoder.{layers}.0."
        inner = {name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)}
        shapes |= {
            f"bert.encoder.{successor}.{number}.{name}": shape
            for number in range(count)
            for name, shape in inner.items()
        }
    theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    keys = models.spec("cvlp").keys["official_key"]
    ours, coverage = keys.convert(theirs)
    assert coverage.complete
    assert not coverage.dropped
    back = keys.invert(ours)
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    network = KeyNetwork(models.build("cvlp", replace(models.spec("cvlp").presets["base"], key_layers="replace")))
    held = network.state_dict()
    assert {f"encoder.{name.removeprefix('lxmert.')}" if name.startswith("lxmert.") else name for name in held} == {
        name for name in ours if name.startswith(("encoder.", "successors."))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", ["visualbert vqa", "vlbert base_prec", "vilbert connect6", "lxmert base", "cvlp base"]
)
def test_bert_at_full_size_starts_every_family(tmp_path: Path, preset: str) -> None:
    model, name = preset.split()
    torch.manual_seed(0)
    config = replace(models.spec("visualbert").presets["vqa"], vocab_size=30522)  # the widths of bert-base-uncased
    with torch.device("meta"):
        shaped = models.build("visualbert", config)
    weights = bert_of(shaped, 12)
    torch.save(weights, tmp_path / "bert.bin")
    try:
        done = conversion.convert(tmp_path / "bert.bin", tmp_path / "start", layout="bert", model=model, preset=name)
        assert done.coverage.complete
        saved = read_model_folder(tmp_path / "start")
        encoder = saved.encoder().eval()
        assert torch.equal(encoder.word_embeddings.weight, weights["bert.embeddings.word_embeddings.weight"])
        batch = verification.sample_batch(saved, 0)
        with torch.inference_mode():
            encoded = encoder(batch)
        assert all(bool(states.isfinite().all()) for states in (encoded.text[batch.text.mask], encoded.pooled))
    finally:
        shutil.rmtree(tmp_path)
