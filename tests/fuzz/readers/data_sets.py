"""Annotation files of every data set: JSON, JSON lines, pickles, XML, CoNLL-U."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.promises import check, check_records, check_texts
from fuzz.readers.base import Reader, writes_all, writes_json, writes_lines, writes_pickle, writes_text

from visling.data.annotations import captions, gqa, prepared_questions, web_captions
from visling.data.annotations.boxes import read_boxes
from visling.data.annotations.entities import read_entities
from visling.data.annotations.genome import read_genome_questions, read_region_descriptions
from visling.data.annotations.lxmert import read_lxmert
from visling.data.annotations.nlvr import read_nlvr_pictures, read_nlvr_statements
from visling.data.annotations.parses import read_parses
from visling.data.annotations.questions import read_gqa, read_lxmert_questions, read_questions, read_vqa
from visling.data.annotations.referring import read_refer
from visling.data.annotations.retrieval import read_retrieval
from visling.data.annotations.statements import read_nlvr2
from visling.data.annotations.vcr import read_metadata, read_vcr
from visling.runs.detect import read_annotations

_IMAGES = [{"id": 9, "file_name": "a.jpg", "width": 40, "height": 20}, {"id": 7, "file_name": "b.jpg"}]


def _records(read: Callable[[Path], Iterable[Any]], name: str = "") -> Callable[[Path], None]:
    return lambda folder: check_records(read(folder / name))


def _captions(read: Callable[[Path], captions.Captions], name: str = "") -> Callable[[Path], None]:
    return lambda folder: check_records(read(folder / name).records)


_VQA = {
    "data_type": "mscoco", "data_subtype": "val2014",
    "questions": [{"question_id": number, "image_id": 9, "question": "Is it red?"} for number in (1, 2)],
}  # fmt: skip
_VQA_ANSWERS = {
    "annotations": [
        {
            "question_id": number, "image_id": 9, "question_type": "is it", "answer_type": "yes/no",
            "multiple_choice_answer": "yes", "answers": [{"answer": "yes", "answer_id": 1}] * 3,
        }
        for number in (1, 2)
    ]
}  # fmt: skip
_QUESTIONS, _ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
_LXMERT_QUESTIONS = [
    {"question_id": 1, "img_id": "a", "sent": "is it?", "label": {"yes": 1, "no": 0.3}, "answer_type": "yes/no",
     "question_type": "is it"},
]  # fmt: skip
_TARGETS = [{"question_id": number, "image_id": 9, "labels": [0, 1], "scores": [0.3, 1.0]} for number in (1, 2)]
_IMDB: list[Any] = [
    {"dataset_name": "vqa"},
    {"question_id": 1, "image_id": 9, "image_name": "a", "question_tokens": ["is", "it"], "answers": ["yes"] * 10},
    {"question_id": 2, "image_id": 9, "question_str": "is it?", "valid_answers": ["yes"]},
]


def _save_imdb(folder: Path) -> None:
    array = np.empty(len(_IMDB), object)
    array[:] = _IMDB
    np.save(folder / "imdb_val.npy", array, allow_pickle=True)


_GQA = {
    "01": {
        "question": "Is it red?", "imageId": "n9", "answer": "yes", "isBalanced": True, "entailed": ["02"],
        "types": {"structural": "verify", "semantic": "attr", "detailed": "x"}, "groups": {"global": "g", "local": "l"},
        "semantic": [{"operation": "select", "argument": "dog", "dependencies": []}],
    },
    "02": {"question": "What is it?", "imageId": "9"},
}  # fmt: skip
_CHOICES = {name: {"valid": ["yes", "no"], "plausible": ["yes"]} for name in _GQA}


def _read_gqa_split(folder: Path) -> None:
    records = gqa.read_gqa_split(folder, "val")
    check_records(records)
    for record in records:
        if record.choices is not None:
            for answers in record.choices[record.id]:
                check_texts(answers)


_COCO_CAPTIONS = {"images": _IMAGES, "annotations": [{"id": 1, "image_id": 9, "caption": "A red dog."}]}
_KARPATHY = {
    "images": [
        {
            "filename": "a.jpg", "split": "train",
            "sentences": [{"sentid": 1, "raw": "A dog.", "tokens": ["a", "dog"]}, {"tokens": ["red"]}],
        }
    ]
}  # fmt: skip
_FLICKR = ({"sentences": ["A dog.", "Red."], "img_path": "a.jpg", "id": "9"},)
_INSTANCES = {
    "images": _IMAGES,
    "categories": [{"id": 1, "name": "dog"}],
    "attributes": ["red"],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 1, "bbox": [1, 2, 10, 10], "attributes": ["red"], "iscrowd": 0}
    ],
}
_REFERENCES = [
    {
        "ref_id": 3, "ann_id": 1, "image_id": 9, "split": "train", "file_name": "a_1.jpg", "category_id": 1,
        "sentences": [{"sent_id": 5, "raw": "The dog!", "sent": "the dog", "tokens": ["the", "dog"]}],
    }
]  # fmt: skip


def _read_instances(folder: Path) -> None:
    found = read_annotations(folder / "x.json")
    check_records(found.records)
    check_texts([*found.category_names, *found.attribute_names])


def _read_boxes(folder: Path) -> None:
    found = read_boxes(folder / "x.json")
    for name, boxes in found.boxes.items():
        assert isinstance(name, str)
        assert boxes.shape[1:] == (4,)
        assert boxes.dtype == np.float32
    assert found.fingerprint


_BOX_FOLDER = {"boxes": [[1, 2, 30, 19, 0.9]], "segms": [[[[1, 2], [3, 4]]]], "names": ["person"]} | {
    "width": 40, "height": 20,
}  # fmt: skip
_VCR = {
    "annot_id": "val-0", "movie": "x", "question_number": 0, "img_fn": "m/a.jpg", "metadata_fn": "m/a.json",
    "objects": ["person"], "question": ["Is", [0], "red", "?"], "answer_choices": [["Yes", [0]]] * 4,
    "rationale_choices": [["So"]] * 4, "answer_label": 1, "rationale_label": 2,
}  # fmt: skip


def _read_vcr(folder: Path) -> None:
    found = read_vcr(folder / "val.jsonl", folder / "vcr1images")
    check_records(found.records)
    for record in found.records:
        check(read_metadata(record))


_XML = """<annotation>
  <size><width>40</width><height>20</height><depth>3</depth></size>
  <object><name>1</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>19</ymax></bndbox></object>
  <object><name>2</name><scene>1</scene><nobndbox>1</nobndbox></object>
</annotation>
"""
_SENTENCES = "[/EN#1/people A man] with [/EN#0/notvisual nothing] on [/EN#2/scene/other a street] .\nA man .\n"
_ENTITIES = writes_all(
    writes_text("Sentences/a.txt", _SENTENCES),
    writes_text("Annotations/a.xml", _XML),
    writes_text("val.txt", "a\n"),
    writes_text("UNRELATED_CAPTIONS", "comment\na 2\n"),
)
_PARSE = (
    "# sent_id = 1\n1\ta\ta\tDET\t_\t_\t2\tdet\t_\t_\n2\tdog\tdog\tNOUN\t_\t_\t0\troot\t_\t_\n"
    "3-4\tdon't\t_\t_\t_\t_\t_\t_\t_\t_\n3\tdo\tdo\tAUX\t_\t_\t2\taux\t_\t_\n4\tn't\tnot\tPART\t_\t_\t3\tneg\t_\t_\n\n"
)
_NLVR = {"identifier": "12-1", "sentence": "There is a box.", "label": "true", "directory": "0"} | {
    "structured_rep": [[{"x_loc": 1, "y_loc": 2, "size": 10, "color": "Yellow", "type": "circle"}]] * 3
}
_STATEMENT = {"identifier": "s1", "image": "val-12-1-0", "sentence": "There is a box.", "label": "false"}
_NLVR2 = {"identifier": "dev-850-0-1", "sentence": "Two dogs.", "label": "True", "validation": {"1": "True"}}
_NLVR2_LXMERT = [{"identifier": "dev-850-0-1", "sent": "Two dogs.", "img0": "a", "img1": "b", "label": 1}]
_LXMERT = [
    {
        "img_id": "a", "sentf": {"mscoco": ["A dog."], "vqa": ["Is it red?"]},
        "labelf": {"vqa": [{"yes": 1.0, "no": 0.3}]},
    }
]  # fmt: skip
_GENOME = [
    {
        "id": 9, "image_id": 9, "regions": [{"region_id": 1, "image_id": 9, "phrase": "a dog"}],
        "qas": [{"qa_id": 1, "image_id": 9, "question": "What?", "answer": "A dog."}],
    }
]  # fmt: skip


def _read_nlvr_instances(folder: Path) -> None:
    check_records(read_annotations(folder / "val" / "val.json").records)


def _read_retrieval(folder: Path) -> None:
    check_records(read_retrieval(folder, "train").records)


def _read_parses(folder: Path) -> None:
    for parse in read_parses(folder / "x.conllu"):
        check(parse)
        if parse.id == "1" and parse.tokens == ("a", "dog", "don't"):
            assert len(parse.place("a dog don't")) == len(parse.words)


_TARGET_FILES = writes_all(
    writes_json(_QUESTIONS, _VQA),
    writes_pickle("val_target.pkl", _TARGETS),
    writes_pickle("trainval_label2ans.pkl", ["yes", "no"]),
)
_GQA_TARGETS = writes_all(
    writes_pickle(
        "val_target.pkl", [{"question_id": "01", "image_id": "n9", "question": "Is it?", "labels": [1], "scores": [1]}]
    ),
    writes_pickle("trainval_label2ans.pkl", ["yes", "no"]),
)


def _read_targets(folder: Path) -> Iterable[Any]:
    return prepared_questions.read_targets(folder / _QUESTIONS, folder / "val_target.pkl")


READERS = (
    Reader(
        "questions, VQA",
        writes_all(writes_json(_QUESTIONS, _VQA), writes_json(_ANSWERS, _VQA_ANSWERS)),
        _records(lambda folder: read_questions(folder / _QUESTIONS, folder / _ANSWERS)),
    ),
    Reader(
        "questions, a part of VQA",
        writes_all(
            writes_json(_QUESTIONS, _VQA),
            writes_json(_ANSWERS, _VQA_ANSWERS),
            writes_json("minival.json", [{"question_id": 1}, 2]),
        ),
        _records(lambda folder: read_vqa(folder, "minival")),
    ),
    Reader(
        "questions, LXMERT's VQA",
        writes_json("x.json", _LXMERT_QUESTIONS),
        _records(read_lxmert_questions, "x.json"),
    ),
    Reader("questions, ViLBERT's VQA", _TARGET_FILES, _records(_read_targets)),
    Reader(
        "questions, Pythia's VQA",
        _save_imdb,
        _records(prepared_questions.read_imdb, "imdb_val.npy"),
    ),
    Reader("questions, GQA", writes_json("x.json", _GQA), _records(read_gqa, "x.json")),
    Reader(
        "questions, GQA as columns",
        writes_all(writes_json("val_balanced_questions.json", _GQA), writes_json("val_choices.json", _CHOICES)),
        _read_gqa_split,
    ),
    Reader(
        "questions, LXMERT's GQA",
        writes_json("x.json", [{"question_id": "01", "img_id": "n9", "sent": "is it?", "label": {"yes": 1.0}}]),
        _records(gqa.read_lxmert_gqa, "x.json"),
    ),
    Reader("questions, ViLBERT's GQA", _GQA_TARGETS, _records(gqa.read_vilbert_gqa, "val_target.pkl")),
    Reader(
        "questions, Visual Genome",
        writes_json("x.json", _GENOME),
        _records(lambda file: read_genome_questions(file)[0], "x.json"),
    ),
    Reader("captions, COCO", writes_json("x.json", _COCO_CAPTIONS), _captions(captions.read_captions, "x.json")),
    Reader(
        "captions, Karpathy",
        writes_json("x.json", _KARPATHY),
        _captions(lambda file: captions.read_karpathy(file, "train"), "x.json"),
    ),
    Reader(
        "captions, Flickr30K",
        writes_text("x.token", "a.jpg#0\tA dog .\na.jpg#1\tRed .\n"),
        _captions(captions.read_flickr30k, "x.token"),
    ),
    Reader(
        "captions, JSON lines", writes_lines("x.jsonl", *_FLICKR), _captions(captions.read_flickr30k_lines, "x.jsonl")
    ),
    Reader(
        "captions, by list",
        writes_all(writes_json("captions_val2014.json", _COCO_CAPTIONS), writes_text("captions_val.txt", "a.jpg\n")),
        _captions(lambda folder: captions.find_coco_captions(folder, "val")),
    ),
    Reader(
        "captions, retrieval",
        writes_all(
            writes_json("dataset_coco.json", _KARPATHY),
            writes_pickle("hard_negative.pkl", {"train_hard_pool": [[0, 0]], "train_image_list": ["a"]}),
        ),
        _read_retrieval,
    ),
    Reader(
        "captions, Conceptual Captions",
        writes_text("x.tsv", "a dog\thttp://x/a.jpg\nred\thttp://x/b.jpg\n"),
        _captions(web_captions.read_conceptual_captions, "x.tsv"),
    ),
    Reader(
        "captions, VL-BERT",
        writes_lines("x.json", {"image": "train.zip@/00000000.jpg", "caption": ["a", "dog"]}),
        _captions(web_captions.read_vlbert_captions, "x.json"),
        kind="lines",
    ),
    Reader(
        "captions, ViLBERT",
        writes_json("x.json", {"9": "a dog"}),
        _captions(web_captions.read_vilbert_captions, "x.json"),
    ),
    Reader(
        "captions, SBU",
        writes_json("sbu-captions-all.json", {"image_urls": ["http://x/a.jpg"], "captions": ["a dog"]}),
        _captions(web_captions.read_sbu),
    ),
    Reader("captions, Visual Genome", writes_json("x.json", _GENOME), _captions(read_region_descriptions, "x.json")),
    Reader(
        "captions, LXMERT", writes_json("x.json", _LXMERT), _records(lambda file: read_lxmert(file).records, "x.json")
    ),
    Reader("objects, COCO instances", writes_json("x.json", _INSTANCES), _read_instances),
    Reader("objects, boxes of instances", writes_json("x.json", _INSTANCES), _read_boxes),
    Reader("objects, detections", writes_json("x.json", [{"image_id": 9, "box": [1, 2, 3, 4]}]), _read_boxes),
    Reader(
        "objects, boxes of VCR",
        writes_json("boxes/a.json", _BOX_FOLDER),
        lambda folder: read_boxes(folder / "boxes").fingerprint and None,
    ),
    Reader(
        "objects, NLVR",
        writes_all(writes_lines("val/val.json", _NLVR), writes_text("val/images/0/val-12-1-0.png", "a picture")),
        _read_nlvr_instances,
        kind="lines",
    ),
    Reader(
        "expressions, refer",
        writes_all(writes_json("instances.json", _INSTANCES), writes_pickle("refs(unc).p", _REFERENCES)),
        _records(lambda folder: read_refer(folder, "train", by="unc")),
    ),
    Reader(
        "questions, VCR",
        writes_all(writes_lines("val.jsonl", _VCR), writes_json("vcr1images/m/a.json", _BOX_FOLDER)),
        _read_vcr,
    ),
    Reader("XML, Flickr30K Entities", _ENTITIES, _records(lambda folder: read_entities(folder, "val").records)),
    Reader(
        "XML, Flickr30K Entities by table",
        writes_all(
            writes_text("Sentences/a.txt", _SENTENCES),
            writes_text("Annotations/a.xml", _XML),
            writes_pickle("val_imgid2idx.pkl", {"a": 0}),
        ),
        _records(lambda folder: read_entities(folder, "val").records),
    ),
    Reader("CoNLL-U", writes_text("x.conllu", _PARSE), _read_parses),
    Reader(
        "statements, NLVR",
        writes_lines("val.json", _NLVR),
        _records(lambda file: read_nlvr_pictures(file, "val", [0, 1]), "val.json"),
        kind="lines",
    ),
    Reader(
        "statements, written for NLVR",
        writes_lines("val.json", _STATEMENT),
        _records(read_nlvr_statements, "val.json"),
        kind="lines",
    ),
    Reader("statements, NLVR2", writes_lines("dev.json", _NLVR2), _records(read_nlvr2, "dev.json"), kind="lines"),
    Reader("statements, LXMERT's NLVR2", writes_json("dev.json", _NLVR2_LXMERT), _records(read_nlvr2, "dev.json")),
)
