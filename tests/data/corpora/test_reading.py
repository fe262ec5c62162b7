"""Every corpus of a run from small files of its true layout: what is read, what is left out and told, what is
refused."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling import models
from visling.data.annotations.captions import Captions, find_coco_captions
from visling.data.batches.collate import Collator
from visling.data.batches.examples import Source
from visling.data.corpora.base import Corpus
from visling.data.corpora.captions import SingleCaption, VilbertCaptions
from visling.data.corpora.mixture import Labelled, Mixture
from visling.data.corpora.questions import LxmertSentences
from visling.data.corpora.reading import Corpora, images_of
from visling.data.corpora.text import PlainText
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, StoreError
from visling.image_ids import canonical
from visling.recipes.configs import PretrainConfig
from visling.recipes.tables import PUBLISHED_PRETRAINING
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.pretrain import read_corpora, run_answers
from visling.runtime import generator_for
from visling.train.config import TrainConfig
from visling.types import IGNORE, RegionArray

LAYOUT = TextLayout(Tokenizer(), models.spec("lxmert").inputs(models.spec("lxmert").presets["tiny"]))
STREET, SKY = "http://a.org/street.jpg", "http://a.org/sky.jpg"
Files = Callable[..., Path]
"""The fixture `files`."""


def store_of(path: Path, images: Iterable[str], bare: Iterable[str] = ()) -> NativeStore:
    """A store with two regions for each image, none for the bare ones."""
    with StoreWriter(path, feature_size=4, fingerprint="test") as writer:
        for image, count in (*((image, 2) for image in images), *((image, 0) for image in bare)):
            box = np.tile(np.array([0, 0, 5, 5], np.float32), (count, 1))
            writer.add(image, RegionArray(features=np.zeros((count, 4), np.float16), boxes=box, size=(10, 10)))
    return NativeStore.open(path)


def run_of(
    *kinds: str | Corpus, objectives: tuple[str, ...] = ("masked_lm", "matching"), **settings: Any
) -> PretrainConfig:
    return PretrainConfig(
        recipe="test",
        model="lxmert",
        encoder="tiny",
        corpora=tuple(Corpus(kind=kind) if isinstance(kind, str) else kind for kind in kinds),
        objectives=dict.fromkeys(objectives, 1.0),
        train=TrainConfig(),
        **settings,
    )


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(run: PretrainConfig, data: Path | list[str], store: NativeStore | None, *, valid: bool = False) -> Corpora:
    places = [str(data)] if isinstance(data, Path) else data
    return read_corpora(run, places, LAYOUT, store, valid=valid, answers=run_answers(run, places))


def sentences(found: Corpora) -> list[str]:
    source = found.examples
    return [
        LAYOUT.tokenizer.decode(source.example(index, generator_for(0, index)).rows[0].ids)
        for index in range(len(source))
    ]


LENIENT: tuple[str, ...] = (
    "conceptual_captions", "vilbert_captions", "sbu", "flickr30k", "vg_regions", "vg_qa", "gqa",
    "answered_questions", "lxmert",
)  # fmt: skip
EMPTY = {
    "conceptual_captions": "1 empty captions, 1 lines of another layout",
    "vg_qa": "1 empty or repeated questions",
    "lxmert": "1 empty sentences",
    "gqa": "1 questions without a word",
    "answered_questions": "1 questions without a word",
}
WITH_ANSWERS: tuple[str, ...] = ("vg_qa", "gqa", "answered_questions", "lxmert")


@pytest.mark.parametrize("kind", LENIENT)
def test_sentences_without_regions_are_left_out_and_told_once(files: Files, tmp_path: Path, kind: str) -> None:
    folder = files(tmp_path / "data", kind)
    names = (
        [str(zlib.crc32(address.encode())) for address in (STREET, SKY)]
        if kind == "conceptual_captions"
        else ["1", "2"]
    )
    store = store_of(tmp_path / "store", [*names, "9"], bare=["3"])
    found = read(run_of(kind, objectives=("masked_lm",)), folder, store)
    assert sentences(found) == ["the street", "the sky"]
    assert list(found.notes) == [
        f"{kind} of {folder}: left out {EMPTY.get(kind, '1 empty captions')}",
        f"{kind} of {folder}: left out 1 sentences of 1 images without regions",
    ]
    with pytest.raises(
        StoreError, match=f"has none of the 3 images of {kind} in .*ids must be those of the annotations"
    ):
        read(run_of(kind), folder, store_of(tmp_path / "other", ["x", "y"]))


COMPLETE: dict[str, int] = {
    "captions": 1,
    "caption_pairs": 1,
    "single_captions": 1,
    "statements": 6,
    "unmasked_statements": 6,
    "true_statements": 6,
    "questions": 1,
    "spelled_questions": 1,
    "vcr": 1,
}
"""Kinds whose images the store must know, and the sentences about one (of NLVR its six pictures)."""


@pytest.mark.parametrize("kind", COMPLETE)
def test_images_in_which_nothing_was_found_are_not_trained_on(files: Files, tmp_path: Path, kind: str) -> None:
    folder = files(tmp_path / "data", kind.replace("spelled_", ""))
    held, bare = ["1", "4"], ["2"]
    if "statements" in kind:
        held, bare = ([f"train-{number}-0-{order}" for order in range(6)] for number in (1, 2))
    if "captions" in kind or "pairs" in kind:
        file = folder / "annotations" / "captions_train2014.json"
        content = json.loads(file.read_text())
        content["images"].append({"id": 4, "file_name": "COCO_train2014_000000000004.jpg"})
        content["annotations"].append({"id": 40, "image_id": 4, "caption": "a tree"})
        save(file, content)
    found = read(run_of(kind), folder, store_of(tmp_path / "store", held, bare=bare))
    shown = set(images_of(found.examples))
    assert {canonical(image) for image in shown} <= {canonical(image) for image in held}
    assert shown
    assert (
        f"{kind} of {folder}: left out {COMPLETE[kind]} sentences of {len(bare)} images without regions" in found.notes
    )
    with pytest.raises(StoreError, match=rf"none of the \d+ images of {kind} in .*, with a region"):
        read(run_of(kind), folder, store_of(tmp_path / "nothing", ["x"], bare=[*held, *bare]))
    with pytest.raises(StoreError, match="needs image"):
        read(run_of(kind), folder, store_of(tmp_path / "absent", held))


def test_a_pair_of_images_of_which_one_has_no_region_is_not_trained_on(files: Files, tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "nlvr2")
    store = store_of(
        tmp_path / "store", ["train-1-0-img0", "train-1-0-img1", "train-2-0-img0"], bare=["train-2-0-img1"]
    )
    found = read(run_of("statements"), folder, store)
    assert [record.images for record in found.examples.records] == [("train-1-0-img0", "train-1-0-img1")]  # type: ignore[attr-defined]
    assert list(found.notes) == [f"statements of {folder}: left out 1 sentences of 1 images without regions"]


NUMBERED: tuple[str, ...] = ("vg_regions", "vg_qa", "gqa", "lxmert")


@pytest.mark.parametrize("kind", NUMBERED)
def test_numbers_of_visual_genome_are_not_those_of_coco(files: Files, tmp_path: Path, kind: str) -> None:
    folder = files(tmp_path / "data", kind)
    coco = "COCO_train2014_000000000003"
    store = store_of(tmp_path / "store", ["1", "2", coco])
    assert "3" in store, "as VQA asks for it"
    found = read(run_of(kind, objectives=("masked_lm",)), folder, store)
    assert images_of(found.examples) == ["1", "2"]
    assert found.notes[-1] == f"{kind} of {folder}: left out 1 sentences of 1 images without regions"
    both = read(
        run_of(kind, objectives=("masked_lm",)),
        folder,
        marked(tmp_path / "both", {"1": 1.0, "2": 2.0, "3": 3.0, coco: 4.0}),
    ).examples
    assert images_of(both) == ["1", "2", "3"]
    collated = marked_features(both, NativeStore.open(tmp_path / "both"))
    assert collated == [1.0, 2.0, 3.0]


def test_an_image_of_coco_is_not_found_under_a_number_of_visual_genome(tmp_path: Path) -> None:
    merged = [
        {"img_id": "COCO_train2014_000000000009", "sentf": {"mscoco": ["of coco"]}},
        {"img_id": "COCO_val2014_000000000007", "sentf": {"mscoco": ["by number"]}},
        {"img_id": "9", "sentf": {"vg": ["of visual genome"]}},
    ]
    save(tmp_path / "mscoco_train.json", merged)
    for name in ("mscoco_nominival", "vgnococo"):
        save(tmp_path / f"{name}.json", [])
    found = read(run_of("lxmert", objectives=("masked_lm",)), tmp_path, store_of(tmp_path / "store", ["9", "7"]))
    assert sentences(found) == ["by number", "of visual genome"]


def marked(path: Path, images: dict[str, float]) -> NativeStore:
    """A store with one region for each image, whose features are the number given."""
    with StoreWriter(path, feature_size=4, fingerprint="test") as writer:
        for image, number in images.items():
            box = np.array([[0, 0, 5, 5]], np.float32)
            writer.add(image, RegionArray(features=np.full((1, 4), number, np.float16), boxes=box, size=(10, 10)))
    return NativeStore.open(path)


def marked_features(source: Source, store: NativeStore) -> list[float]:
    """The number of each example's image, as a model gets it."""
    spec = replace(LAYOUT.spec, feature_size=4)
    rngs = [generator_for(0, index) for index in range(len(source))]
    examples = [source.example(index, rng) for index, rng in enumerate(rngs)]
    regions = Collator(store, spec, LAYOUT.tokenizer)(examples, rngs)[0].regions
    assert regions is not None
    return regions.features[:, 0, 0].tolist()


@pytest.mark.parametrize("keep_above", [True, False])
def test_which_draws_keep_a_caption_follows_the_recipe(files: Files, tmp_path: Path, keep_above: bool) -> None:
    folder, store = files(tmp_path / "data", "vilbert_captions"), store_of(tmp_path / "store", ["1", "2"])
    source = read(run_of(Corpus(kind="vilbert_captions", keep_above=keep_above)), folder, store).examples
    for draw in range(20):
        high = generator_for(draw).random() > 0.5
        assert source.example(0, generator_for(draw)).labels["matched"] == int(high == keep_above)
    with pytest.raises(ConfigError, match="keep_above is a setting of vilbert_captions; found it with captions"):
        run_of(Corpus(kind="captions", keep_above=False))


@pytest.mark.parametrize(("recipe", "kept"), [("vilbert-conceptual", True), ("vilbert-multitask", False)])
def test_vilberts_releases_differ_in_the_draws_that_keep_a_caption(recipe: str, kept: bool) -> None:
    assert PUBLISHED_PRETRAINING[recipe]().corpora == (Corpus(kind="vilbert_captions", keep_above=kept),)


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filename": "COCO_val2014_000000000001.jpg",
            "split": "restval",
            "cocoid": 1,
            "sentences": [{"raw": "the street", "sentid": 1}],
        },
        {
            "filename": "COCO_val2014_000000000002.jpg",
            "split": "val",
            "cocoid": 2,
            "sentences": [{"raw": "the sky", "sentid": 2}],
        },
        {
            "filename": "COCO_train2014_000000000004.jpg",
            "split": "train",
            "cocoid": 4,
            "sentences": [{"raw": " ", "sentid": 3}],
        },
    ],
}


def test_coco_by_karpathys_splits(tmp_path: Path) -> None:
    save(tmp_path / "data" / "dataset_coco.json", KARPATHY)
    store = store_of(tmp_path / "store", ["1", "2", "4"])
    found = read(run_of("captions"), tmp_path / "data", store)
    assert sentences(found) == ["the street"]
    assert found.notes == (f"captions of {tmp_path / 'data'}: left out 1 empty captions, 1 images without a caption",)
    assert sentences(read(run_of("captions"), tmp_path / "data", store, valid=True)) == ["the sky"]


def test_coco_as_visualbert_splits_it(files: Files, tmp_path: Path) -> None:
    """Both parts, but for the images of minival, which validate."""
    folder = tmp_path / "data"
    for split, number in (("train", 1), ("val", 3)):
        images = [{"id": image, "file_name": f"COCO_{split}2014_{image:012d}.jpg"} for image in (number, number + 1)]
        told = [{"id": image["id"], "image_id": image["id"], "caption": f"caption {image['id']}"} for image in images]
        save(folder / "annotations" / f"captions_{split}2014.json", {"images": images, "annotations": told})
    save(folder / "annotations" / "captions_val.txt", "COCO_val2014_000000000004.jpg\n")
    store = store_of(tmp_path / "store", ["1", "2", "3", "4"])
    assert sentences(read(run_of("captions"), folder, store)) == ["caption 1", "caption 2", "caption 3"]
    assert sentences(read(run_of("captions"), folder, store, valid=True)) == ["caption 4"]


def test_coco_is_read_once_for_all_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        images = [{"id": image, "file_name": f"{image}.jpg"} for image in (1, 2)]
        told = [{"id": image, "image_id": image, "caption": f"folder {number}, image {image}"} for image in (1, 2)]
        save(tmp_path / f"{number}" / "captions_train.json", {"images": images, "annotations": told})
    readings: list[Path] = []

    def find(root: Path, split: str) -> Captions:
        readings.append(root)
        return find_coco_captions(root, split)

    monkeypatch.setattr("visling.data.corpora.captions.find_coco_captions", find)
    folders = [tmp_path / "0", tmp_path / "1"]
    run = run_of("captions", Corpus(kind="single_captions", weight=0.5))
    found = read(run, [str(folder) for folder in folders], store_of(tmp_path / "store", ["1", "2"]))
    assert sorted(readings) == folders
    assert isinstance(found.examples, Mixture)
    texts = [[record.caption for record in source.records] for source in found.examples.sources]
    assert texts == [[f"folder {number}, image {image}" for image in (1, 2)] for number in (0, 1)] * 2


@pytest.mark.parametrize("kind", LENIENT)
def test_wrong_sentences_are_mixed_in_where_the_run_learns_matching(files: Files, tmp_path: Path, kind: str) -> None:
    folder = files(tmp_path / "data", kind)
    names = (
        [str(zlib.crc32(address.encode())) for address in (STREET, SKY)]
        if kind == "conceptual_captions"
        else ["1", "2"]
    )
    store = store_of(tmp_path / "store", names)
    for objectives, labels in ((("masked_lm", "matching"), {0, 1}), (("masked_lm",), {IGNORE})):
        source = read(run_of(kind, objectives=objectives), folder, store).examples
        assert isinstance(
            source,
            VilbertCaptions
            if kind == "vilbert_captions"
            else LxmertSentences
            if kind in WITH_ANSWERS
            else SingleCaption,
        )
        assert {source.example(0, generator_for(draw)).labels["matched"] for draw in range(30)} == labels


def test_vilbert_draws_captions_of_images_that_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save(folder / "caption_train.json", {"3": "gone", "1": "the street", "2": "the sky"})
    source = read(run_of("vilbert_captions"), folder, store_of(tmp_path / "store", ["1", "2"])).examples
    drawn = {LAYOUT.tokenizer.decode(source.example(1, generator_for(draw)).rows[0].ids) for draw in range(60)}
    assert drawn == {"the sky", "gone", "the street"}


@pytest.mark.parametrize("kind", WITH_ANSWERS)
def test_questions_are_asked_for_answers_of_the_runs_own_table(files: Files, tmp_path: Path, kind: str) -> None:
    folder, store = files(tmp_path / "data", kind), store_of(tmp_path / "store", ["1", "2"])
    run = run_of(kind, objectives=("masked_lm", "image_qa"), min_answer_count=1)
    table = run_answers(run, [str(folder)])
    assert table is not None
    assert list(table) == ["blue", "man"]
    source = read(run, folder, store).examples
    assert [source.example(index, generator_for(0)).labels for index in range(2)] == [
        {"matched": IGNORE, "answer": 1},
        {"matched": IGNORE, "answer": 0},
    ]
    if kind != "lxmert":
        rare = run_of(kind, objectives=("masked_lm", "image_qa"), min_answer_count=2)
        source = read(rare, folder, store).examples
        answers = [source.example(index, generator_for(0)).labels["answer"] for index in range(2)]
        assert answers == [IGNORE, 0], "an answer outside the table is not asked for"


def test_gqas_questions_may_lie_in_a_folder_of_their_own(files: Files, tmp_path: Path) -> None:
    files(tmp_path / "scenes" / "gqa", "gqa")
    run = run_of("gqa", objectives=("masked_lm", "image_qa"), min_answer_count=1)
    table = run_answers(run, [str(tmp_path / "scenes")])
    assert table is not None
    assert list(table) == ["blue", "man"]
    assert len(read(run, tmp_path / "scenes", store_of(tmp_path / "store", ["1", "2"])).examples) == 2


def test_the_table_beside_merged_files_is_everybodys(files: Files, tmp_path: Path) -> None:
    merged = files(tmp_path / "merged", "lxmert")
    save(merged / "all_ans.json", [{"ans": answer, "dsets": ["vqa"]} for answer in ("apple", "blue", "man")])
    asked = files(tmp_path / "gqa", "gqa")
    data = [str(asked), str(merged)]
    run = run_of("lxmert", "gqa", objectives=("masked_lm", "image_qa"))
    table = run_answers(run, data)
    assert table is not None
    assert list(table) == ["apple", "blue", "man"]
    source = read(run, data, store_of(tmp_path / "store", ["1", "2"])).examples
    assert [source.example(index, generator_for(0)).labels["answer"] for index in range(4)] == [2, 1, 2, 1]
    other = files(tmp_path / "other", "lxmert")
    save(other / "all_ans.json", [{"ans": answer, "dsets": ["vqa"]} for answer in ("blue", "man")])
    with pytest.raises(DataError, match=r"answer tables .* differ"):
        run_answers(run, [*data, str(other)])


def test_answers_need_a_corpus_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"image_qa needs a corpus with answers \(answered_questions, gqa, lxmert, vg_qa\)"
    ):
        run_answers(run_of("captions", objectives=("image_qa",)), [str(tmp_path)])
    assert run_answers(run_of("gqa"), [str(tmp_path)]) is None


def test_the_answers_of_some_data_sets_alone(files: Files, tmp_path: Path) -> None:
    folder, store = files(tmp_path / "data", "lxmert"), store_of(tmp_path / "store", ["1", "2"])
    whole = run_of("lxmert", objectives=("masked_lm", "image_qa"), min_answer_count=1)
    blue = replace(whole, answer_sources=("gqa",))
    with pytest.raises(ConfigError, match=r"answer_sources=gqa picks answers from LXMERT's table, .* leave"):
        run_answers(blue, [str(folder)])
    save(folder / "all_ans.json", [{"ans": "blue", "dsets": ["gqa"]}, {"ans": "man", "dsets": ["vqa"]}])
    asked = []
    for run, table in ((whole, ["blue", "man"]), (blue, ["blue"])):
        answers = run_answers(run, [str(folder)])
        assert answers is not None
        assert list(answers) == table
        source = read(run, folder, store).examples
        asked.append([source.example(index, generator_for(0)).labels["answer"] for index in range(2)])
    assert asked == [[1, 0], [IGNORE, 0]]


def test_captions_beside_questions_have_all_labels(files: Files, tmp_path: Path) -> None:
    """A batch of captions alone must tell image_qa that nothing is asked."""
    files(tmp_path / "data", "gqa")
    files(tmp_path / "data", "vilbert_captions")
    run = run_of("gqa", "vilbert_captions", objectives=("masked_lm", "image_qa"), min_answer_count=1)
    source = read(run, tmp_path / "data", store_of(tmp_path / "store", ["1", "2"])).examples
    assert isinstance(source, Mixture)
    assert all(isinstance(part, Labelled) for part in source.sources)
    assert [source.example(index, generator_for(0)).labels["answer"] for index in range(4)] == [1, 0, IGNORE, IGNORE]
    assert images_of(source) == ["1", "2", "1", "2"]


def test_corpora_are_mixed_by_ratio(files: Files, tmp_path: Path) -> None:
    for number, kind in enumerate(("gqa", "vilbert_captions", "sbu")):
        files(tmp_path / str(number), kind)
    data = [str(tmp_path / str(number)) for number in range(3)]
    mixed = (Corpus(kind="gqa", weight=2.0), Corpus(kind="vilbert_captions"), Corpus(kind="sbu", weight=0.5))
    source = read(run_of(*mixed), data, store_of(tmp_path / "store", ["1", "2"])).examples
    assert len(source) == 4 + 2 + 1
    shown = Counter(source.example(index, generator_for(0)).id for index in range(4))
    assert shown == {"07": 2, "8": 2}


def test_images_of_conceptual_captions_named_by_line(files: Files, tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "conceptual_captions")
    found = read(
        run_of("conceptual_captions", objectives=("masked_lm",)),
        folder,
        store_of(tmp_path / "store", ["00000001", "00000004"]),
    )
    assert sentences(found) == ["the sky", "gone"]
    row = {"image": "train_image.zip@/00000004.jpg", "caption": ["the", "street"], "frcnn": "x"}
    save(tmp_path / "rows" / "train_frcnn.json", json.dumps(row))
    found = read(
        run_of("conceptual_captions", objectives=("masked_lm",)),
        tmp_path / "rows",
        store_of(tmp_path / "lines", ["00000004"]),
    )
    assert sentences(found) == ["the street"]


def test_validation_takes_what_has_a_split(files: Files, tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "sbu")
    files(folder, "vilbert_captions")
    store = store_of(tmp_path / "store", ["1", "2"])
    run = run_of("sbu", "vilbert_captions", objectives=("masked_lm",))
    with pytest.raises(DataError, match=r"no ViLBERT's captions of split 'val'"):
        read(run, folder, store, valid=True)
    save(folder / "caption_valid.json", {"1": "the sky"})
    assert sentences(read(run, folder, store, valid=True)) == ["the sky"], "SBU is training data"


def test_visual_genome_is_split_by_lists(files: Files, tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "vg_regions")
    store = store_of(tmp_path / "store", ["1", "2", "9"])
    run = run_of("vg_regions", objectives=("masked_lm",))
    assert sentences(read(run, folder, store, valid=True)) == ["held"]
    save(folder / "train_images.txt", "2\n")
    assert sentences(read(run, folder, store)) == ["the sky"]
    (folder / "val_images.txt").unlink()
    with pytest.raises(DataError, match=r"none of .*data holds a split 'val'"):
        read(run, folder, store, valid=True)
    with pytest.raises(DataError, match=r"no list dev_images\.txt"):
        read(run_of("vg_regions", objectives=("masked_lm",), train_split="dev"), folder, store)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("conceptual_captions", r"expected Train_GCC-training\.tsv or train_frcnn\.json"),
        ("vilbert_captions", r"expected caption_train\.json"),
        ("sbu", r"expected sbu-captions-all\.json"),
        ("flickr30k", r"expected dataset_flickr30k\.json"),
        ("vg_regions", r"no annotation file .*region_descriptions\.json"),
        ("vg_qa", r"no annotation file .*question_answers\.json"),
        ("gqa", r"no train_balanced_questions\.json"),
        ("answered_questions", r"no file v2_OpenEnded"),
        ("vcr", r"no train\.jsonl of VCR in .*empty"),
        ("lxmert", r"lacks mscoco_train\.json, mscoco_nominival\.json, vgnococo\.json; found no JSON file"),
        ("text", r"no text of split 'train'"),
    ],
)
def test_what_no_folder_has_is_named(files: Files, tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    beside: str = "sbu" if kind == "vilbert_captions" else "vilbert_captions"
    data = [str(tmp_path / "empty"), str(files(tmp_path / "captions", beside))]
    with pytest.raises(DataError, match=message):
        read(run_of(kind, beside), data, store_of(tmp_path / "store", ["1", "2"]))


def test_questions_without_annotations_have_no_answers(files: Files, tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "answered_questions")
    (folder / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(DataError, match="learning to answer needs their answers"):
        read(run_of("answered_questions"), folder, store_of(tmp_path / "store", ["1", "2"]))


def test_text_of_all_folders_is_one_corpus(files: Files, tmp_path: Path) -> None:
    folder, store = files(tmp_path / "data", "vilbert_captions"), store_of(tmp_path / "store", ["1", "2"])
    save(folder / "en_corpus" / "wiki.doc", "a sentence .\n\nanother .\n")
    book = save(tmp_path / "book", "from a book\n")
    found = read(run_of("vilbert_captions", Corpus(kind="text", weight=0.5)), [str(folder), str(book)], store)
    assert isinstance(found.text, PlainText)
    assert list(found.text.passages) == ["a sentence .", "another .", "from a book"]
    assert found.text_share == 0.5
    assert len(found.examples) == 2
    assert found.notes[-1] == f"text of {folder / 'en_corpus'}: left out 1 lines without a word"
    save(folder / "caption_val.json", {"1": "the sky"})
    assert read(run_of("vilbert_captions", "text"), folder, store, valid=True).text is None, (
        "text without a validation split is not validated on"
    )
    with pytest.raises(ConfigError, match="one text corpus"):
        read(run_of("vilbert_captions", "text", "text"), folder, store)


def test_text_alone_is_what_a_run_reads(tmp_path: Path) -> None:
    save(tmp_path / "data" / "text" / "train.txt", "a sentence .\nanother .\n")
    data, alone = [str(tmp_path / "data")], run_of("text", objectives=("masked_lm",))
    assert alone.text_only
    found = read(alone, data, None)
    assert isinstance(found.examples, PlainText)
    assert (list(found.examples.passages), found.text) == (["a sentence .", "another ."], None)
    twice = read(run_of(Corpus(kind="text", weight=2.0), objectives=("masked_lm",)), data, None)
    assert len(twice.examples) == 4, "a weight counts passes, as there is no row with an image to count by"
    with pytest.raises(DataError, match=r"text alone is validated on its own split 'val'.* text/val.txt"):
        read(alone, data, None, valid=True)
    save(tmp_path / "data" / "text" / "val.txt", "the last .\n")
    held = read(alone, data, None, valid=True).examples
    assert isinstance(held, PlainText)
    assert list(held.passages) == ["the last ."]
    with pytest.raises(ConfigError, match="one text corpus"):
        read(run_of("text", "text", objectives=("masked_lm",)), data, None)


def test_several_splits_are_read_as_one(files: Files, tmp_path: Path) -> None:
    for split in ("train", "val"):
        files(tmp_path, "questions", split)
    store = store_of(tmp_path / "regions", ["1", "2"])
    one = [len(read(run_of("questions", train_split=split), tmp_path, store).examples) for split in ("train", "val")]
    both = read(run_of("questions", train_split="train+val"), tmp_path, store)
    assert len(both.examples) == sum(one)
    assert len(read(run_of("questions"), [f"{tmp_path}@train+val"], store).examples) == sum(one)
    with pytest.raises(DataError, match=r"has the split train but not trian of 'train\+trian'"):
        read(run_of("questions", train_split="train+trian"), tmp_path, store)


def test_a_part_of_val_is_held_out(files: Files, tmp_path: Path) -> None:
    files(tmp_path, "questions", "train")
    files(tmp_path, "questions", "val")
    store = store_of(tmp_path / "regions", ["1", "2"])
    (tmp_path / "minival.txt").write_text("1\n")
    run = run_of("questions", train_split="train+nominival", valid_split="minival")
    every = len(read(run_of("questions", train_split="train+val"), tmp_path, store).examples)
    held = read(run, tmp_path, store, valid=True).examples
    assert set(images_of(held)) == {"1"}
    assert len(read(run, tmp_path, store).examples) == every - len(held)
