"""Every corpus of a run from small files of its true layout: what is read, what is left out and told, what is refused."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling import models
from visling.data.pretraining import Labelled, LxmertSentences, Mixture, SingleCaption, VilbertCaptions
from visling.data.store import NativeStore, StoreWriter
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, StoreError
from visling.recipes import corpora
from visling.recipes.plans import Corpus, CorpusKind, Pretraining
from visling.runtime import generator_for
from visling.train.engine import TrainConfig
from visling.types import IGNORE, RegionArray

LAYOUT = TextLayout(Tokenizer(), models.spec("lxmert").inputs(models.spec("lxmert").presets["tiny"]))
STREET, SKY = "http://a.org/street.jpg", "http://a.org/sky.jpg"
BOX = {"x": 0, "y": 0, "width": 9, "height": 9}


def store_of(path: Path, images: Iterable[str], bare: Iterable[str] = ()) -> NativeStore:
    """A store with two regions for each image, none for the bare ones."""
    with StoreWriter(path, feature_size=4, fingerprint="test") as writer:
        for image, count in (*((image, 2) for image in images), *((image, 0) for image in bare)):
            box = np.tile(np.array([0, 0, 5, 5], np.float32), (count, 1))
            writer.add(image, RegionArray(features=np.zeros((count, 4), np.float16), boxes=box, size=(10, 10)))
    return NativeStore.open(path)


def run_of(*kinds: CorpusKind | Corpus, objectives: tuple[str, ...] = ("masked_lm", "matching"), **settings: Any) -> Pretraining:
    return Pretraining(
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


def read(run: Pretraining, data: Path | list[str], store: NativeStore, *, valid: bool = False) -> corpora.Corpora:
    places = [str(data)] if isinstance(data, Path) else data
    return corpora.read(run, places, LAYOUT, store, valid=valid, answers=corpora.answer_table(run, places))


def sentences(found: corpora.Corpora) -> list[str]:
    source = found.images
    return [LAYOUT.tokenizer.decode(source.example(index, generator_for(0, index)).rows[0].ids) for index in range(len(source))]


def files(folder: Path, kind: str) -> Path:
    """A training split of a kind: two sentences of images 1 and 2 (or their addresses), one of image 3, which the stores lack."""
    if kind == "conceptual_captions":
        save(folder / "Train_GCC-training.tsv", f"the street\t{STREET}\nthe sky\t{SKY}\n\t{SKY}\nno address\ngone\thttp://a.org/gone.jpg\n")
    elif kind == "vilbert_captions":
        save(folder / "caption_train.json", {"1": "the street", "2": "the sky", "3": "gone", "4": ""})
    elif kind == "sbu":
        addresses = [f"http://static.flickr.com/{image}.jpg" for image in (1, 2, 3, 1)]
        save(
            folder / "sbu-captions-all.json", {"image_urls": addresses, "user_ids": list("abcd"), "captions": ["the street", "the sky", "gone", " "]}
        )
    elif kind == "flickr30k":
        save(folder / "results_20130124.token", "1.jpg#0\tthe street\n2.jpg#0\tthe sky\n3.jpg#0\tgone\n9.jpg#0\tof another split\n2.jpg#1\t\n")
        save(folder / "train.txt", "1\n2\n3\n")
    elif kind == "vg_regions":
        phrases = [(1, "the street"), (2, "the sky"), (3, "gone"), (9, "held"), (2, "")]
        regions = [
            {"id": image, "regions": [{"region_id": at, "image_id": image, "phrase": text, **BOX}]} for at, (image, text) in enumerate(phrases)
        ]
        save(folder / "region_descriptions.json", regions)
        save(folder / "val_images.txt", "9\n")
    elif kind == "vg_qa":
        pairs = [(1, "the street", "The man."), (2, "the sky", "blue"), (3, "gone", "Blue."), (9, "held", "no"), (2, "what", "")]
        asked = [
            {"id": image, "qas": [{"qa_id": at, "image_id": image, "question": question, "answer": answer}]}
            for at, (image, question, answer) in enumerate(pairs)
        ]
        save(folder / "question_answers.json", asked)
        save(folder / "val_images.txt", "9\n")
    elif kind == "gqa":
        asked_gqa = {
            "07": {"question": "the street", "imageId": "1", "answer": "man"},
            "8": {"question": "the sky", "imageId": "2", "answer": "blue"},
            "9": {"question": "gone", "imageId": "3", "answer": "blue"},
        }
        save(folder / "train_balanced_questions.json", asked_gqa)
    elif kind == "answered_questions":
        asked_vqa = [(1, "the street", "man"), (2, "the sky", "Blue"), (3, "gone", "blue")]
        questions = [{"question_id": image, "image_id": image, "question": text} for image, text, _ in asked_vqa]
        annotations = [
            {"question_id": image, "image_id": image, "answers": [{"answer": answer}] * 10, "multiple_choice_answer": answer}
            for image, _, answer in asked_vqa
        ]
        save(folder / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
        save(folder / "v2_mscoco_train2014_annotations.json", {"annotations": annotations})
    else:
        merged = [
            {"img_id": "1", "sentf": {"vqa": ["the street"]}, "labelf": {"vqa": [{"A man.": 1.0}]}},
            {"img_id": "2", "sentf": {"mscoco": [""], "gqa": ["the sky"]}, "labelf": {"gqa": [{"blue": 1.0}]}},
            {"img_id": "3", "sentf": {"mscoco": ["gone"]}},
        ]
        save(folder / "mscoco_train.json", merged)
        save(folder / "mscoco_nominival.json", [])
        save(folder / "vgnococo.json", [])
    return folder


LENIENT: tuple[CorpusKind, ...] = (
    "conceptual_captions", "vilbert_captions", "sbu", "flickr30k", "vg_regions", "vg_qa", "gqa", "answered_questions", "lxmert"
)  # fmt: skip
EMPTY = {
    "conceptual_captions": "1 empty captions, 1 lines of another layout",
    "vg_qa": "1 empty or repeated questions",
    "lxmert": "1 empty sentences",
    "gqa": None,
    "answered_questions": None,
}
WITH_ANSWERS: tuple[CorpusKind, ...] = ("vg_qa", "gqa", "answered_questions", "lxmert")


@pytest.mark.parametrize("kind", LENIENT)
def test_sentences_without_regions_are_left_out_and_told_once(tmp_path: Path, kind: CorpusKind) -> None:
    folder = files(tmp_path / "data", kind)
    names = [str(zlib.crc32(address.encode())) for address in (STREET, SKY)] if kind == "conceptual_captions" else ["1", "2"]
    store = store_of(tmp_path / "store", [*names, "9"], bare=["3"])
    found = read(run_of(kind, objectives=("masked_lm",)), folder, store)
    assert sentences(found) == ["the street", "the sky"]
    told = [f"{kind} of {folder}: left out {EMPTY[kind]}"] if EMPTY.get(kind, "") else []
    if kind not in EMPTY:
        told = [f"{kind} of {folder}: left out 1 empty captions"]
    assert list(found.notes) == [*told, f"{kind} of {folder}: left out 1 sentences of 1 images without regions"]
    with pytest.raises(StoreError, match=f"has none of the 3 images of {kind} in .*ids must be those of the annotations"):
        read(run_of(kind), folder, store_of(tmp_path / "other", ["x", "y"]))


@pytest.mark.parametrize("kind", LENIENT)
def test_wrong_sentences_are_mixed_in_where_the_run_learns_matching(tmp_path: Path, kind: CorpusKind) -> None:
    folder = files(tmp_path / "data", kind)
    names = [str(zlib.crc32(address.encode())) for address in (STREET, SKY)] if kind == "conceptual_captions" else ["1", "2"]
    store = store_of(tmp_path / "store", names)
    for objectives, labels in ((("masked_lm", "matching"), {0, 1}), (("masked_lm",), {IGNORE})):
        source = read(run_of(kind, objectives=objectives), folder, store).images
        assert isinstance(source, VilbertCaptions if kind == "vilbert_captions" else LxmertSentences if kind in WITH_ANSWERS else SingleCaption)
        assert {source.example(0, generator_for(draw)).labels["matched"] for draw in range(30)} == labels


def test_vilbert_draws_captions_of_images_that_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save(folder / "caption_train.json", {"3": "gone", "1": "the street", "2": "the sky"})
    source = read(run_of("vilbert_captions"), folder, store_of(tmp_path / "store", ["1", "2"])).images
    drawn = {LAYOUT.tokenizer.decode(source.example(1, generator_for(draw)).rows[0].ids) for draw in range(60)}
    assert drawn == {"the sky", "gone", "the street"}


@pytest.mark.parametrize("kind", WITH_ANSWERS)
def test_questions_are_asked_for_answers_of_the_runs_own_table(tmp_path: Path, kind: CorpusKind) -> None:
    folder, store = files(tmp_path / "data", kind), store_of(tmp_path / "store", ["1", "2"])
    run = run_of(kind, objectives=("masked_lm", "image_qa"), min_answer_count=1)
    table = corpora.answer_table(run, [str(folder)])
    assert table is not None
    assert list(table) == ["blue", "man"]
    source = read(run, folder, store).images
    assert [source.example(index, generator_for(0)).labels for index in range(2)] == [
        {"matched": IGNORE, "answer": 1},
        {"matched": IGNORE, "answer": 0},
    ]
    if kind != "lxmert":
        rare = run_of(kind, objectives=("masked_lm", "image_qa"), min_answer_count=2)
        source = read(rare, folder, store).images
        answers = [source.example(index, generator_for(0)).labels["answer"] for index in range(2)]
        assert answers == [IGNORE, 0], "an answer outside the table is not asked for"


def test_the_table_beside_merged_files_is_everybodys(tmp_path: Path) -> None:
    merged = files(tmp_path / "merged", "lxmert")
    save(merged / "all_ans.json", [{"ans": answer, "dsets": ["vqa"]} for answer in ("apple", "blue", "man")])
    asked = files(tmp_path / "gqa", "gqa")
    data = [str(asked), str(merged)]
    run = run_of("lxmert", "gqa", objectives=("masked_lm", "image_qa"))
    table = corpora.answer_table(run, data)
    assert table is not None
    assert list(table) == ["apple", "blue", "man"]
    source = read(run, data, store_of(tmp_path / "store", ["1", "2"])).images
    assert [source.example(index, generator_for(0)).labels["answer"] for index in range(4)] == [2, 1, 2, 1]
    other = files(tmp_path / "other", "lxmert")
    save(other / "all_ans.json", [{"ans": answer, "dsets": ["vqa"]} for answer in ("blue", "man")])
    with pytest.raises(DataError, match=r"answer tables .* differ"):
        corpora.answer_table(run, [*data, str(other)])


def test_answers_need_a_corpus_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_qa needs a corpus with answers \(vg_qa, gqa, answered_questions, lxmert\)"):
        corpora.answer_table(run_of("captions", objectives=("image_qa",)), [str(tmp_path)])
    assert corpora.answer_table(run_of("gqa"), [str(tmp_path)]) is None


def test_captions_beside_questions_have_all_labels(tmp_path: Path) -> None:
    """A batch of captions alone must tell image_qa that nothing is asked."""
    files(tmp_path / "data", "gqa")
    files(tmp_path / "data", "vilbert_captions")
    run = run_of("gqa", "vilbert_captions", objectives=("masked_lm", "image_qa"), min_answer_count=1)
    source = read(run, tmp_path / "data", store_of(tmp_path / "store", ["1", "2"])).images
    assert isinstance(source, Mixture)
    assert all(isinstance(part, Labelled) for part in source.sources)
    assert [source.example(index, generator_for(0)).labels["answer"] for index in range(4)] == [1, 0, IGNORE, IGNORE]
    assert corpora.images_of(source) == ["1", "2", "1", "2"]


def test_corpora_are_mixed_by_ratio(tmp_path: Path) -> None:
    for number, kind in enumerate(("gqa", "vilbert_captions", "sbu")):
        files(tmp_path / str(number), kind)
    data = [str(tmp_path / str(number)) for number in range(3)]
    mixed = (Corpus(kind="gqa", weight=2.0), Corpus(kind="vilbert_captions"), Corpus(kind="sbu", weight=0.5))
    source = read(run_of(*mixed), data, store_of(tmp_path / "store", ["1", "2"])).images
    assert len(source) == 4 + 2 + 1
    shown = Counter(source.example(index, generator_for(0)).id for index in range(4))
    assert shown == {"07": 2, "8": 2}


def test_images_of_conceptual_captions_named_by_line(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "conceptual_captions")
    found = read(run_of("conceptual_captions", objectives=("masked_lm",)), folder, store_of(tmp_path / "store", ["00000001", "00000004"]))
    assert sentences(found) == ["the sky", "gone"]
    row = {"image": "train_image.zip@/00000004.jpg", "caption": ["the", "street"], "frcnn": "x"}
    save(tmp_path / "rows" / "train_frcnn.json", json.dumps(row))
    found = read(run_of("conceptual_captions", objectives=("masked_lm",)), tmp_path / "rows", store_of(tmp_path / "lines", ["00000004"]))
    assert sentences(found) == ["the street"]


def test_validation_takes_what_has_a_split(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "sbu")
    files(folder, "vilbert_captions")
    store = store_of(tmp_path / "store", ["1", "2"])
    run = run_of("sbu", "vilbert_captions", objectives=("masked_lm",))
    with pytest.raises(DataError, match=r"no ViLBERT's captions of split 'val'"):
        read(run, folder, store, valid=True)
    save(folder / "caption_valid.json", {"1": "the sky"})
    assert sentences(read(run, folder, store, valid=True)) == ["the sky"], "SBU is training data"


def test_visual_genome_is_split_by_lists(tmp_path: Path) -> None:
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
        ("lxmert", r"lacks mscoco_train\.json, mscoco_nominival\.json, vgnococo\.json; found no JSON file"),
        ("text", r"no text of split 'train'"),
    ],
)
def test_what_no_folder_has_is_named(tmp_path: Path, kind: CorpusKind, message: str) -> None:
    (tmp_path / "empty").mkdir()
    beside: CorpusKind = "sbu" if kind == "vilbert_captions" else "vilbert_captions"
    data = [str(tmp_path / "empty"), str(files(tmp_path / "captions", beside))]
    with pytest.raises(DataError, match=message):
        read(run_of(kind, beside), data, store_of(tmp_path / "store", ["1", "2"]))


def test_questions_without_annotations_have_no_answers(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "answered_questions")
    (folder / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(DataError, match="learning to answer needs their answers"):
        read(run_of("answered_questions"), folder, store_of(tmp_path / "store", ["1", "2"]))


def test_text_of_all_folders_is_one_corpus(tmp_path: Path) -> None:
    folder, store = files(tmp_path / "data", "vilbert_captions"), store_of(tmp_path / "store", ["1", "2"])
    save(folder / "en_corpus" / "wiki.doc", "a sentence .\n\nanother .\n")
    book = save(tmp_path / "book", "from a book\n")
    found = read(run_of("vilbert_captions", Corpus(kind="text", weight=0.5)), [str(folder), str(book)], store)
    assert found.text is not None
    assert list(found.text.passages) == ["a sentence .", "another .", "from a book"]
    assert found.text_share == 0.5
    assert len(found.images) == 2
    assert found.notes[-1] == f"text of {folder / 'en_corpus'}: left out 1 lines without a word"
    save(folder / "caption_val.json", {"1": "the sky"})
    assert read(run_of("vilbert_captions", "text"), folder, store, valid=True).text is None, "text without a validation split is not validated on"
    with pytest.raises(ConfigError, match="found text alone"):
        read(run_of("text", objectives=("masked_lm",)), folder, store)
    with pytest.raises(ConfigError, match="one text corpus"):
        read(run_of("vilbert_captions", "text", "text"), folder, store)
