"""What published weights need in addition: detectors, answer lists, feature files; and the sets that answer together.

As for the weights, this project has downloaded none of it but the lists that say otherwise.
"""

from __future__ import annotations

from visling.checkpoints.entries import HUB, AnswerFile, FeatureFile, ReadyAnswer, ReleasedDetector, Selection

_UNC = "http://nlp.cs.unc.edu/"
_UNC_DEAD = "The server was unreachable in October 2021 and came back (issue 108 of airsplay/lxmert)."
_FACEBOOK = "https://dl.fbaipublicfiles.com/"
_DRIVE_FILE = "https://drive.google.com/file/d/{}/view"

_KINDS_36: dict[Selection, str] = {"original": "vg-frcnn-36-caffe", "port": "vg-frcnn-36"}

DETECTORS: tuple[ReleasedDetector, ...] = (
    ReleasedDetector(
        name="vg-frcnn",
        kinds=_KINDS_36,
        regions=(36, 36),
        source=f"{HUB}unc-nlp/frcnn-vg-finetuned",
        mirror="https://s3.amazonaws.com/models.huggingface.co/bert/unc-nlp/frcnn-vg-finetuned/",
        files=("config.yaml", "pytorch_model.bin"),
        licence="none stated; code of the port Apache-2.0",
        note=(
            "Faster R-CNN, ResNet-101, 1,600 classes and 400 attributes of Visual Genome, about 262 MB. The mirror is "
            "the address in MMF's extraction script (tools/scripts/features/frcnn)."
        ),
        dead=(
            "A user did not find the repository on the hub in May 2025 (issue 42 of "
            "hila-chefer/Transformer-MM-Explainability); nobody has tried the mirror from here."
        ),
    ),
    ReleasedDetector(
        name="vg-frcnn-pickle",
        kinds=_KINDS_36,
        regions=(36, 36),
        source=f"{_UNC}models/faster_rcnn_from_caffe_attr.pkl",
        licence="none stated; code Apache-2.0",
        note=(
            "The file that vg-frcnn was made from, as airsplay/py-bottom-up-attention publishes it (262 MB): the "
            "weights for 36 regions."
        ),
        dead=f"{_UNC_DEAD} Its earlier name nlp1.cs.unc.edu does not answer any more.",
    ),
    ReleasedDetector(
        name="vg-frcnn-10-100",
        kinds={"original": "vg-frcnn-10-100-caffe", "port": "vg-frcnn-10-100"},
        regions=(10, 100),
        source=f"{_UNC}models/faster_rcnn_from_caffe_attr_original.pkl",
        licence="none stated; code Apache-2.0",
        note="The weights for 10 to 100 regions, as airsplay/py-bottom-up-attention publishes them.",
        dead=_UNC_DEAD,
    ),
)
"""Detectors that can be read here. So can the files of MILVLG's port, which were on OneDrive (a user asked for a copy
in May 2023, issue 104 of its repository): `visling detect convert` takes them. The Caffe files, Pythia's and the
multi-task release's networks (vqa-maskrcnn-benchmark) and Detectron's Mask R-CNN cannot be read."""

_LXMERT_DATA = "https://raw.githubusercontent.com/airsplay/lxmert/0db1182b9030da3ce41f17717cc628e1cd0a95d5/data/"
"""The last state of the repository."""

ANSWERS: tuple[AnswerFile, ...] = (
    AnswerFile(
        name="lxmert-vqa-answers",
        file="trainval_label2ans.json",
        answers=3129,
        source=f"{_LXMERT_DATA}vqa/trainval_label2ans.json",
        licence="MIT",
        size=46668,
        sha256="e72e568a6303130f5a627db06360605ee3b306366ff463aa5153d782adc12a7d",
    ),
    AnswerFile(
        name="lxmert-gqa-answers",
        file="trainval_label2ans.json",
        answers=1842,
        source=f"{_LXMERT_DATA}gqa/trainval_label2ans.json",
        licence="MIT",
        size=20586,
        sha256="3ba2e3668760dfcfcfe40dc58711a7c551ca7da48be87a7fdd3fae9963f8264d",
    ),
    AnswerFile(
        name="lxmert-pretraining-answers",
        file="all_ans.json",
        answers=9500,
        source=f"{_LXMERT_DATA}lxmert/all_ans.json",
        licence="MIT",
        size=986576,
        sha256="b860c6cd7b8fe3afa1e5308933664c37bc8728eff967e9845543169a06d012b8",
        note="For the answer head of LXMERT's pre-trained files.",
    ),
    AnswerFile(
        name="pythia-vqa-answers",
        file="answers_vqa.txt",
        answers=3129,
        source=f"{_FACEBOOK}pythia/data/answers_vqa.txt",
        licence="none stated; code BSD",
        note="VisualBERT's list: Pythia's, <unk> first.",
    ),
    AnswerFile(
        name="vlbert-vqa-answers",
        file="answers_vqa.txt",
        answers=3129,
        source=_DRIVE_FILE.format("1CPnYcOgIOP5CZkp_KChuCg54_Ljr6-fp"),
        licence="none stated; code MIT",
        note="VL-BERT's list, <unk> among the answers.",
    ),
    AnswerFile(
        name="vilbert-vqa-answers",
        file="trainval_label2ans.pkl",
        answers=3129,
        source="https://drive.google.com/drive/folders/1o7sCLl1_PKCoaGvigCr_uGuBg6koOJm8",
        licence="none stated",
        note="ViLBERT's list: VQA/cache/trainval_label2ans.pkl of the release's meta data.",
    ),
)


def _lxmert_features(name: str, path: str, images: str) -> FeatureFile:
    """A zip of airsplay/lxmert's README; about 45 % of its size unpacked."""
    return FeatureFile(
        name=f"lxmert-{name}-features",
        features="bottom-up-36",
        images=images,
        source=f"{_UNC}data/lxmert_data/{path}_obj36.zip",
        dead=(
            f"{_UNC_DEAD} The same files are on a drive (https://drive.google.com/drive/folders/"
            "1Gq1uLUk6NdD0CcJOptXjxE6ssY5XAuat) and on Baidu."
        ),
    )


def _bottom_up_features(name: str, images: str, *, fixed: bool) -> FeatureFile:
    """A zip of peteanderson80/bottom-up-attention's README."""
    file = f"{name}_36" if fixed else name
    return FeatureFile(
        name=f"bottom-up-{file.replace('_', '-')}-features",
        features="bottom-up-36" if fixed else "bottom-up-10-100",
        images=images,
        source=f"https://imagecaption.blob.core.windows.net/imagecaption/{file}.zip",
        dead=(
            "Reported gone: the server answers that public access is not permitted, and the later address "
            "(storage.googleapis.com/up-down-attention) has been empty or private since May 2025 (issues 124 to 132 of "
            "peteanderson80/bottom-up-attention; issue 4 of CrossmodalGroup/ER-SAN)."
        ),
    )


def _multitask_features(name: str, path: str, images: str) -> FeatureFile:
    """An LMDB of facebookresearch/vilbert-multi-task, data/README.md: its file data.mdb."""
    return FeatureFile(
        name=f"vilbert-multi-task-{name}-features",
        features="resnext-152-100",
        images=images,
        source=f"{_FACEBOOK}vilbert-multi-task/datasets/{path}_resnext152_faster_rcnn_genome.lmdb/data.mdb",
        licence="none stated; code MIT",
    )


def _by_hand(name: str, features: str, images: str, source: str) -> FeatureFile:
    """Files behind a page."""
    return FeatureFile(name=f"{name}-features", features=features, images=images, source=source)


FEATURES: tuple[FeatureFile, ...] = (
    _lxmert_features("train2014", "mscoco_imgfeat/train2014", "COCO train2014, 82,783 images"),
    _lxmert_features("val2014", "mscoco_imgfeat/val2014", "COCO val2014, 40,504 images"),
    _lxmert_features("test2015", "mscoco_imgfeat/test2015", "COCO test2015, 81,434 images"),
    _lxmert_features("vg-gqa", "vg_gqa_imgfeat/vg_gqa", "Visual Genome and GQA, 148,854 images"),
    _lxmert_features("gqa-testdev", "vg_gqa_imgfeat/gqa_testdev", "GQA testdev"),
    _lxmert_features("nlvr2-train", "nlvr2_imgfeat/train", "NLVR2 train, 103,170 images"),
    _lxmert_features("nlvr2-valid", "nlvr2_imgfeat/valid", "NLVR2 development, 8,102 images"),
    _lxmert_features("nlvr2-test", "nlvr2_imgfeat/test", "NLVR2 public test, 8,082 images"),
    *(
        _bottom_up_features(name, images, fixed=fixed)
        for fixed in (True, False)
        for name, images in (
            ("trainval", "COCO train2014 and val2014"),
            ("test2014", "COCO test2014"),
            ("test2015", "COCO test2015"),
        )
    ),
    _by_hand("vlbert-trainval2014", "bottom-up-10-100", "COCO train2014 and val2014",
             _DRIVE_FILE.format("1KyLyqTqBsMX7QtLTma0xFrmhAzdQDUed")),
    _by_hand("vlbert-test2015", "bottom-up-10-100", "COCO test2015",
             _DRIVE_FILE.format("10nM3kRz2c827aqwVvLnv430YYFp0po6O")),
    _by_hand("vilbert-coco", "bottom-up-10-100", "COCO",
             "https://www.dropbox.com/sh/09182lupkagw1ov/AACShSEVClAh6CzbhyIKxmtga?dl=0"),
    _by_hand("vilbert-vcr", "bottom-up-10-100", "VCR, detected and annotated boxes",
             "https://www.dropbox.com/sh/9pgxc3njd3iq03o/AADXgnT1HmEdrds7aujTncBGa?dl=0"),
    _by_hand("vilbert-refcoco+", "bottom-up-10-100", "RefCOCO+",
             "https://www.dropbox.com/sh/4jqadcfkai68yoe/AADHI6dKviFcraeCMdjiaDENa?dl=0"),
    _by_hand("vilbert-flickr30k", "bottom-up-10-100", "Flickr30K",
             "https://www.dropbox.com/sh/qqk1xlhkqjyek8q/AAADni5hVBV2PAC8R_13xpIja?dl=0"),
    _by_hand("volta-coco", "bottom-up-36", "COCO", "https://sid.erda.dk/sharelink/e4iGIc3xYv"),
    _by_hand("volta-vqa", "bottom-up-36", "VQA v2 (COCO)", "https://sid.erda.dk/sharelink/gzyTWulKAa"),
    _by_hand("volta-gqa", "bottom-up-36", "GQA", "https://sid.erda.dk/sharelink/erYmVzgpny"),
    _by_hand("volta-nlvr2", "bottom-up-36", "NLVR2", "https://sid.erda.dk/sharelink/fEZT4BVb9l"),
    _by_hand("volta-flickr30k", "bottom-up-36", "Flickr30K", "https://sid.erda.dk/sharelink/CrLpUMgIKh"),
    _by_hand("volta-refcoco", "bottom-up-36", "RefCOCO", "https://sid.erda.dk/sharelink/GdBuBzki8m"),
    _by_hand("volta-conceptual-captions", "bottom-up-36", "Conceptual Captions",
             "https://sid.erda.dk/sharelink/hPGl0eTED3"),
    _multitask_features("coco-trainval", "coco/features_100/COCO_trainval", "COCO train2014 and val2014"),
    _multitask_features("coco-test", "coco/features_100/COCO_test", "COCO test2015"),
    _multitask_features("gqa", "gqa/gqa", "GQA"),
    _multitask_features("nlvr2", "nlvr2/nlvr2", "NLVR2"),
    FeatureFile(
        name="pythia-vqa-features",
        features="detectron-100",
        images="COCO train2014, val2014 and test2015",
        source=f"{_FACEBOOK}pythia/features/detectron_fix_100.tar.gz",
        licence="none stated; code BSD",
    ),
    _by_hand("visualbert-nlvr2-train", "detectron-coco-150", "NLVR2 train",
             _DRIVE_FILE.format("1iK9CDfxZ4ejKRWOIItLhD8-sgw78ld7w")),
    _by_hand("visualbert-nlvr2-dev", "detectron-coco-150", "NLVR2 development",
             _DRIVE_FILE.format("13rFujBIBr6PLnG5A5i8WJJVT52RPYH9j")),
    _by_hand("visualbert-nlvr2-test", "detectron-coco-150", "NLVR2 public test",
             _DRIVE_FILE.format("1RTXZCK_kbFkqOeBnZ5wOAyDSzlmuaKRx")),
    _by_hand("visualbert-coco-train", "detectron-coco-150", "COCO train2014",
             _DRIVE_FILE.format("1F-LSQhpKleV4nmiKMjQvpHMS2gkbK3bY")),
    _by_hand("visualbert-coco-val", "detectron-coco-150", "COCO val2014",
             _DRIVE_FILE.format("1cZjPob3YqfM46LaWY3-Ky12claxeXbWi")),
)  # fmt: skip

_NO_DETECTRON = (
    "Its features come from a network of {} that nothing here reads."
    " Features of vg-frcnn have the same width and give poor answers: users of the transformers demo, which does that,"
    " measured 40 to 46 % on VQA v2's validation questions (issue 17360 of huggingface/transformers)."
)

READY: tuple[ReadyAnswer, ...] = (
    ReadyAnswer(
        name="lxmert-vqa", task="vqa", weights="lxmert-vqa-uncased", answers="lxmert-vqa-answers", detector="vg-frcnn"
    ),
    ReadyAnswer(
        name="lxmert-gqa", task="gqa", weights="lxmert-gqa-uncased", answers="lxmert-gqa-answers", detector="vg-frcnn"
    ),
    ReadyAnswer(
        name="visualbert-vqa",
        task="vqa",
        weights="visualbert-vqa",
        answers="pythia-vqa-answers",
        why_no_detector=_NO_DETECTRON.format("Pythia's Detectron (Visual Genome, fc6, 100 regions)"),
    ),
    ReadyAnswer(
        name="visualbert-nlvr2",
        task="nlvr2",
        weights="visualbert-nlvr2",
        why_no_detector=(
            "Its features are 1,024 wide, from Detectron's Mask R-CNN (model 35861858), which nothing here reads; no "
            "other detector has features of that width and meaning."
        ),
    ),
    ReadyAnswer(
        name="vilbert-vqa",
        task="vqa",
        weights="vilbert_beta_vqa",
        answers="vilbert-vqa-answers",
        detector="vg-frcnn-10-100",
    ),
)
"""Fine-tuned weights with all that an answer about a photograph needs. VL-BERT, VOLTA and CVLP published pre-trained
weights only; VisualBERT's for VCR needs boxes and masks that people drew; the answer lists of the multi-task ViLBERT
lie in an archive of all its data."""
