"""Released weight files: what they hold, where they are, under which terms.

This project has downloaded none of them: sizes and digests are None until somebody does; None is shown as "unknown",
never skipped silently.
"""

from __future__ import annotations

from visling.checkpoints.entries import HUB, ReleasedFile
from visling.head import Head

_PRETRAINING = {"vocabulary": Head(kind="vocabulary", outputs=30522), "matching": Head(kind="classify", outputs=2)}
_CLASSIFIERS = {
    "vqa": {"classifier": Head(kind="classify", outputs=3129)},
    "nlvr2": {"classifier": Head(kind="classify", outputs=2)},
    "vcr": {"classifier": Head(kind="score", outputs=1)},
}
_DRIVE = "https://drive.google.com/file/d/{}/view"
_VISUALBERT_FEATURES = {"vqa": "detectron-100", "nlvr2": "detectron-coco-150", "vcr": ""}
"""Task -> kind of features; for VCR the official files hold the network that computes them."""
_VCR_NOTE = "Also holds the network that computes its region features: `visling finetune --backbone` reads it."


def _official(name: str, preset: str, drive: str, *, heads: dict[str, Head], note: str = "") -> ReleasedFile:
    """A file of the uclanlp/visualbert README; its repository is under the MIT licence, the files themselves state
    none."""
    return ReleasedFile(
        name=name,
        family="visualbert",
        preset=preset,
        layout="official",
        heads=heads,
        source=_DRIVE.format(drive),
        licence="none stated; code MIT",
        note=note,
        features=_VISUALBERT_FEATURES[preset],
    )


def _hub(task: str, stage: str, heads: dict[str, Head]) -> ReleasedFile:
    """A conversion of an official file by the authors of the transformers port; the repositories have no model card."""
    return ReleasedFile(
        name=f"visualbert-{task}{stage}",
        family="visualbert",
        preset=task,
        layout="transformers",
        heads=heads,
        source=f"{HUB}uclanlp/visualbert-{task}{stage}",
        licence="none stated",
        note="Features are extracted by the region CNN of the official file, which this one lacks."
        if task == "vcr"
        else "",
        features=_VISUALBERT_FEATURES[task],
    )


def _vlbert(name: str, drive: str) -> ReleasedFile:
    """A file of jackroos/VL-BERT, `PREPARE_PRETRAINED_MODELS.md`; its repository is under the MIT licence, the files
    themselves state none."""
    _, _, size, kind = name.split("-")
    if kind == "e2e":
        note = (
            "Also holds the region network that computes its features, which is left out here; `--backbone` of "
            "`visling pretrain` and `visling finetune` reads it."
        )
    else:
        note = "Reads features of bottom-up attention (ResNet-101, 10 to 100 regions)."
    return ReleasedFile(
        name=name,
        family="vlbert",
        preset=f"{size}_{kind}",
        layout="official",
        heads={
            "vocabulary": Head(kind="vocabulary", outputs=30522),
            "region_targets": Head(kind="region_targets", outputs=1601, options={"classes": 1601}),
        },
        source=_DRIVE.format(drive),
        licence="none stated; code MIT",
        note=f"{note} Holds no pooler.",
        features="" if kind == "e2e" else "bottom-up-10-100",
    )


_LXMERT_PRETRAINING = {
    **_PRETRAINING,
    "region_targets": Head(
        kind="region_targets", outputs=4048, options={"classes": 1600, "attributes": 400, "features": 2048}
    ),
    "answers": Head(kind="classify", outputs=9500),
}
_LXMERT_FEATURES = "Features: bottom-up attention, ResNet-101, 36 regions."


def _lxmert(name: str, path: str, *, note: str = "", megabytes: int | None = None) -> ReleasedFile:
    """A pre-trained file of airsplay/lxmert; its repository is under the MIT licence, the files themselves state
    none."""
    return ReleasedFile(
        name=name,
        family="lxmert",
        preset="base",
        layout="official",
        heads=_LXMERT_PRETRAINING,
        source=f"http://nlp.cs.unc.edu/data/{path}",
        licence="none stated; code MIT",
        megabytes=megabytes,
        note=f"{_LXMERT_FEATURES} {note}".rstrip(),
        features="bottom-up-36",
        dead=(
            "The server was unreachable in October 2021 and came back (issue 108 of airsplay/lxmert); its earlier "
            "name nlp1.cs.unc.edu stopped answering in December 2020."
        ),
    )


def _lxmert_hub(task: str, heads: dict[str, Head], note: str) -> ReleasedFile:
    """A conversion of an official file by the authors of the transformers port."""
    name = f"lxmert-{task}-uncased"
    return ReleasedFile(
        name=name,
        family="lxmert",
        preset="base",
        layout="transformers",
        heads=heads,
        source=f"{HUB}unc-nlp/{name}",
        licence="none stated",
        note=f"{_LXMERT_FEATURES} {note}",
        features="bottom-up-36",
    )


_SOFT_CLASSES = Head(kind="region_targets", outputs=1601, options={"classes": 1601})
_VILBERT_PRETRAINING = {**_PRETRAINING, "region_targets": _SOFT_CLASSES}
_VILBERT_FOLDER = "https://drive.google.com/drive/folders/{}"
_VILBERT_UNSEEN = "Nobody has opened it here: its keys are taken from the code that writes it."


def _vilbert_first(
    name: str, preset: str, folder: str, heads: dict[str, Head], note: str, dead: str = ""
) -> ReleasedFile:
    """A folder of the jiasenlu/vilbert_beta README; neither the repository nor the files state a licence."""
    return ReleasedFile(
        name=f"vilbert_beta_{name}",
        family="vilbert",
        preset=preset,
        layout="first",
        heads=heads,
        source=_VILBERT_FOLDER.format(folder),
        licence="none stated",
        note=f"{note} {_VILBERT_UNSEEN}",
        features="bottom-up-10-100",
        dead=dead,
    )


def _vilbert_multitask(name: str, preset: str, heads: dict[str, Head], note: str) -> ReleasedFile:
    """A file of facebookresearch/vilbert-multi-task; its repository is under the MIT licence, the files themselves
    state none."""
    return ReleasedFile(
        name=f"vilbert-multi-task_{name}",
        family="vilbert",
        preset=preset,
        layout="multitask",
        heads=heads,
        source=f"https://dl.fbaipublicfiles.com/vilbert-multi-task/{name}.bin",
        licence="none stated; code MIT",
        note=(
            "Features: Faster R-CNN, ResNeXt-152, 100 regions. 11 million dead weights (q_dense) are dropped. "
            f"{note} {_VILBERT_UNSEEN}"
        ),
        features="resnext-152-100",
    )


_VOLTA_SEEDS = "all ten are at https://sid.erda.dk/sharelink/GWj9Oh5dx4"


def _volta(family: str, name: str, preset: str, share: str, heads: dict[str, Head], note: str = "") -> ReleasedFile:
    """A pre-trained file of e-bug/volta, `MODELS.md`; its repository is under the MIT licence, the files themselves
    state none."""
    return ReleasedFile(
        name=f"volta_{name}",
        family=family,
        preset=preset,
        layout="volta",
        heads=heads,
        source=f"https://sid.erda.dk/share_redirect/{share}",
        licence="none stated; code MIT",
        note=f"Features: bottom-up attention, ResNet-101, 36 regions. {note} {_VILBERT_UNSEEN}".replace("  ", " "),
        features="bottom-up-36",
    )


RELEASED_FILES: tuple[ReleasedFile, ...] = (
    _official("nlvr2_coco_pre_trained", "nlvr2", "1QvivVfRsRF518OQSQNaN7aFk6eQ43vP_", heads=_PRETRAINING),
    _official("nlvr2_pre_trained", "nlvr2", "1Z19G_rAuKn0TQ5Cj-KCcavBKSwBhvxGq", heads=_PRETRAINING),
    _official("nlvr2_fine_tuned", "nlvr2", "1GCV6woBnWY09JhjtLOXyKUhuFiQz9L5U", heads=_CLASSIFIERS["nlvr2"]),
    _official("vqa_coco_pre_trained", "vqa", "1tgYovjB6MZZlqdSAOPzB8bZqnFezWNBO", heads=_PRETRAINING),
    _official("vqa_pre_trained", "vqa", "1kuPr187zWxSJbtCbVW87XzInXltM-i9Y", heads=_PRETRAINING),
    _official("vqa_fine_tuned", "vqa", "19FpfLYo3rwv0eybUvfkDMCoivyL4XLqB", heads=_CLASSIFIERS["vqa"]),
    _official("vcr_coco_pre_train", "vcr", "1pPobkXAL9Evlp7fDjPeXnixtG0O-efoH", heads=_PRETRAINING, note=_VCR_NOTE),
    _official("vcr_pre_train", "vcr", "1iZ7QUv_jG6E6KNofO0jM5H9ee7nMEuYM", heads=_PRETRAINING, note=_VCR_NOTE),
    _official(
        "vcr_fine_tune",
        "vcr",
        "1z7XSUpPthhBKvgKb0wOcBe2eUNGDmf2o",
        heads=_CLASSIFIERS["vcr"],
        note=f"{_VCR_NOTE} One file although there are two sub-tasks; which one it answers is not stated.",
    ),
    *(_hub(task, stage, _PRETRAINING) for task in ("vqa", "nlvr2", "vcr") for stage in ("-coco-pre", "-pre")),
    *(_hub(task, "", _CLASSIFIERS[task]) for task in ("vqa", "nlvr2", "vcr")),
    _vlbert("vl-bert-base-e2e", "1jjV1ARYMs37tOaBalhJmwq7LcWeMai96"),
    _vlbert("vl-bert-large-e2e", "1YTHWWyP7Kq6zPySoEcTs3STaQdc5OJ7f"),
    _vlbert("vl-bert-base-prec", "1YBFsyoWwz83VPzbimKymSBxE37gYtfgh"),
    _vlbert("vl-bert-large-prec", "1REZLN7c3JCHVFoi_nEO-Nn6A4PTKIygG"),
    _lxmert(
        "model_LXRT",
        "model_LXRT.pth",
        megabytes=870,
        note=(
            "The default of the release. Object and attribute heads were not trained by the released code: do not "
            "judge losses by them."
        ),
    ),
    *(
        _lxmert(
            f"lxmert_Epoch{epoch:02d}_LXRT",
            f"github_pretrain/lxmert/Epoch{epoch:02d}_LXRT.pth",
            note="Released code, a run of 12 epochs.",
        )
        for epoch in range(1, 13)
    ),
    *(
        _lxmert(
            f"lxmert20_Epoch{epoch:02d}_LXRT",
            f"github_pretrain/lxmert20/Epoch{epoch:02d}_LXRT.pth",
            note="Released code, a run of 20 epochs.",
        )
        for epoch in range(1, 21)
    ),
    _lxmert_hub(
        "base", _LXMERT_PRETRAINING, "Whether it holds all heads is unknown; without them load the encoder alone."
    ),
    _lxmert_hub(
        "vqa", {"answers": Head(kind="classify", outputs=3129)}, "A user measured 70.8 on VQA test-dev instead of 72.4."
    ),
    _lxmert_hub("gqa", {"answers": Head(kind="classify", outputs=1842)}, "Fine-tuned on GQA."),
    _vilbert_first(
        "conceptual_captions",
        "connect6",
        "1JVM5WiolJJLnY9_lruxSaSop7IFX8a-v",
        _VILBERT_PRETRAINING,
        (
            "Six co-attention layers, as all fine-tuned ones have. pytorch_model_9.bin is the last epoch; the "
            "paper's tasks start from 8."
        ),
        "The folder linked first (1Re0L75uazH3Qrep_aRgtaVelDEz4HV9c) was not found in May 2020; the author then "
        "linked this one (issue 47 of jiasenlu/vilbert_beta).",
    ),
    *(
        _vilbert_first(
            f"conceptual_captions_{count}layer",
            f"connect{count}",
            folder,
            _VILBERT_PRETRAINING,
            f"{count} co-attention layers (the paper's table 2).",
        )
        for count, folder in (
            (2, "1asaQDYTacetm12j1K4AkYWdjPincLnap"),
            (4, "1uDa1UsJC-Vz0ZdbHUMw5imRGhk5oM-YR"),
            (8, "1M-QoxLB6WJaqY9nq4KzPwfpJ8Va5FNCy"),
        )
    ),
    _vilbert_first(
        "vqa",
        "vqa",
        "1nrcVww0u_vozcFRQVr58-YH5LOU1ZiWT",
        {"classifier": Head(kind="classify", outputs=3129)},
        "Answers are numbered as in the release's trainval_label2ans.pkl.",
    ),
    _vilbert_first(
        "vcr",
        "vcr",
        "1QJuMzBarTKU_hAWDSZm60rWiDnbAVEVZ",
        {"score": Head(kind="score", outputs=1)},
        "Trained on both sub-tasks together.",
    ),
    _vilbert_first(
        "refcoco+",
        "referring",
        "1GWY2fEbZCYHkcnxd0oysU0olfPdzcD3l",
        {"regions": Head(kind="regions", outputs=1)},
        "Evaluated on MAttNet's detections.",
    ),
    _vilbert_first(
        "retrieval",
        "retrieval",
        "18zUTF3ZyOEuOT1z1aykwtIkBUhfROmJo",
        {"score": Head(kind="score", outputs=1)},
        "Fine-tuned on Flickr30K.",
    ),
    _vilbert_multitask(
        "pretrained_model",
        "connect6",
        _VILBERT_PRETRAINING,
        "Conceptual Captions, no masked losses on mismatched pairs.",
    ),
    _vilbert_multitask(
        "multi_task_model",
        "multitask",
        {
            "classifier": Head(kind="classify", outputs=3129),
            "classifier_gqa": Head(kind="classify", outputs=1533),
            "entailment": Head(kind="classify", outputs=3),
            "pair": Head(kind="pair", outputs=2),
            "score": Head(kind="score", outputs=1),
            "regions": Head(kind="regions", outputs=1),
        },
        "Twelve tasks in one model; every text must name its task.",
    ),
    _volta(
        "vilbert",
        "vilbert",
        "connect6",
        "AgwrMiOjTv",
        _VILBERT_PRETRAINING,
        "Sizes of the release, trained from scratch.",
    ),
    _volta(
        "vilbert", "ctrl_vilbert", "ctrl", "aQCx8cLWK7", _VILBERT_PRETRAINING, f"The best of ten seeds; {_VOLTA_SEEDS}."
    ),
    _volta(
        "lxmert",
        "lxmert",
        "volta",
        "fYBrp01t8M",
        {part: head for part, head in _LXMERT_PRETRAINING.items() if part != "answers"},
        "LXMERT's own recipe on Conceptual Captions, without questions.",
    ),
    _volta(
        "lxmert",
        "original_lxmert",
        "volta",
        "cFGANaAtmN",
        _LXMERT_PRETRAINING,
        "lxmert20_Epoch20_LXRT under VOLTA's names. VOLTA's pooler ends in ReLU, but these weights were trained "
        "with tanh: add --set pooler=tanh, or take the release's own file.",
    ),
    _volta(
        "visualbert",
        "ctrl_visualbert",
        "ctrl",
        "GCBlzUuoJl",
        {"vocabulary": Head(kind="vocabulary", outputs=30522), "region_targets": _SOFT_CLASSES},
        f"The best of ten seeds; {_VOLTA_SEEDS}. The whole image must be the first region. Its two poolers, and the "
        "matching head on them, are not read.",
    ),
    ReleasedFile(
        name="cvlp_model_LXRT",
        family="cvlp",
        preset="base",
        layout="official",
        heads={**_PRETRAINING, "projection": Head(kind="projection", outputs=128)},
        source="https://github.com/gao-peng-cuhk/CVLP-",
        licence="none stated",
        note=(
            f"{_LXMERT_FEATURES} The README links it on a drive, as snap/pretrained/model_LXRT.pth. The query "
            "network. Nobody has opened it here: its keys are taken from the code that writes it. Object, attribute "
            "and answer heads, if present, were never trained by contrast; the text projection is never read."
        ),
        features="bottom-up-36",
    ),
)
"""All known files that can be read here. VOLTA's VL-BERT, UNITER and equal-width LXMERT, and MMF's files, are other
architectures. The authors of VisualBERT released no file for Flickr30K and none with late fusion; those of LXMERT
released no fine-tuned file."""
