"""The published runs at full size, with the numbers of the releases.

Numbers  From the configuration files and scripts of the releases; where the paper says otherwise, the recipe's `paper` says what. `release` names
         what the released code does and the recipe does not. Batches are those of all the release's devices together: with several processes,
         divide.
Names    FAMILY-PHASE. A phase that goes on from another one's model names it in `start`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from visling import config as configs
from visling import models
from visling.data.masking import REGION_RELEASES, TOKEN_RELEASES
from visling.objectives.image_qa import NUM_ANSWERS
from visling.objectives.masked_regions import RELEASES as REGION_LOSSES
from visling.recipes.plans import Corpus, Finetuning, Pretraining
from visling.train.engine import TrainConfig
from visling.train.optim import OptimConfig
from visling.vision.end_to_end import PRESETS as EXTRACTORS

BERT_BASE, BERT_LARGE = "bert-base-uncased", "bert-large-uncased"

# ------------------------------------------------------------------------------------------------------------------------------------- VisualBERT


def visualbert_coco() -> Pretraining:
    """VisualBERT's COCO phase for VQA as released: caption pairs, 100 regions of width 2048, batch 48, 5e-5, 10 epochs.

    Source:
        configs/vqa/coco-pre-train.json; paper section 3.2, task-agnostic pre-training.
    """
    return _visualbert_coco("visualbert-coco", "vqa", batch_size=48)


def visualbert_nlvr2_coco() -> Pretraining:
    """VisualBERT's COCO phase for NLVR2 as released: caption pairs, 144 regions of width 1024, batch 64, 5e-5, 10 epochs.

    Source:
        configs/nlvr2/coco-pre-train.json.
    """
    return _visualbert_coco("visualbert-nlvr2-coco", "nlvr2", batch_size=64)


def visualbert_flickr30k_coco() -> Pretraining:
    """VisualBERT's COCO phase for Flickr30K as released: caption pairs, 10 to 100 regions of width 2048 and their place, batch 32, 5e-5, 10 epochs.

    Source:
        configs/flickr/coco-pre-train.json.
    """
    return _visualbert_coco("visualbert-flickr30k-coco", "flickr30k", batch_size=32)


def visualbert_vcr_coco() -> Pretraining:
    """VisualBERT's COCO phase for VCR, on fixed features: caption pairs, regions of width 512, batch 128, 1e-4, 10 epochs.

    Source:
        configs/vcr/coco-pre-train.json. There the network that makes the features is trained along, but for its first stages.
    """
    run = _visualbert_coco("visualbert-vcr-coco", "vcr", batch_size=128, lr=1e-4)
    return replace(run, release={**run.release, "features": "made by a ResNet-50 that is trained along, but for its first three stages"})


def visualbert_vqa_pretraining() -> Pretraining:
    """VisualBERT's task-specific phase for VQA as released: masked words over question and answer, batch 64, 5e-5, 10 epochs.

    Source:
        configs/vqa/pre-train.json; paper section 3.2, task-specific pre-training.
    """
    return Pretraining(
        recipe="visualbert-vqa",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        corpora=(Corpus(kind="questions"),),
        objectives={"masked_lm": 1.0},
        masking=TOKEN_RELEASES["visualbert"],
        batch_size=64,
        start="visualbert-coco",
        train=_visualbert_training(5e-5),
        release={"answers": "spelt letter by letter, by mistake (the corpus spelled_questions)", "data": "training and validation questions"},
    )


def visualbert_nlvr2_pretraining() -> Pretraining:
    """VisualBERT's task-specific phase for NLVR2 as released: masked words, and is the sentence true; two images, batch 64, 5e-5, 10 epochs.

    Source:
        configs/nlvr2/pre-train.json, 144 regions of each image; its comment asks for 8 V100.
    """
    return Pretraining(
        recipe="visualbert-nlvr2",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr2"],
        corpora=(Corpus(kind="statements"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TOKEN_RELEASES["visualbert"],
        batch_size=64,
        valid_split="dev",
        start="visualbert-nlvr2-coco",
        train=_visualbert_training(5e-5),
    )


def visualbert_flickr30k_pretraining() -> Pretraining:
    """VisualBERT's task-specific phase for Flickr30K as released: masked words of single captions, batch 32, 5e-5, 10 epochs.

    Source:
        configs/flickr/pre-train.json.
    """
    return Pretraining(
        recipe="visualbert-flickr30k",
        model="visualbert",
        encoder=models.spec("visualbert").presets["flickr30k"],
        corpora=(Corpus(kind="flickr30k"),),
        objectives={"masked_lm": 1.0},
        masking=TOKEN_RELEASES["visualbert"],
        batch_size=32,
        start="visualbert-flickr30k-coco",
        train=_visualbert_training(5e-5),
    )


def visualbert_vcr_pretraining() -> Pretraining:
    """VisualBERT's task-specific phase for VCR, on fixed features: masked words, and is the choice right; batch 32, 5e-5, one epoch.

    A text is a question and one of its answers, or question and right answer and one of the rationales: eight of each question. Names are linked to
    regions where the store holds the objects of VCR's metadata.

    Source:
        configs/vcr/pre-train.json.
    """
    train = _visualbert_training(5e-5)
    return Pretraining(
        recipe="visualbert-vcr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vcr"],
        corpora=(Corpus(kind="vcr"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TOKEN_RELEASES["visualbert"],
        batch_size=32,
        start="visualbert-vcr-coco",
        train=replace(train, epochs=1, optim=replace(train.optim, warmup_share=0.1879)),
        release={
            "features": "made by a ResNet-50 that is trained along, but for its first three stages",
            "regions": "the whole image and the objects that question, answers or rationales name; all persons where none is named",
            "choices": "an item is shown with the same one of its eight choices, eight times an epoch, by mistake (same_choice of the corpus)",
            "links": "count words where they should count word pieces, by mistake (word_links of the corpus)",
        },
    )


def visualbert_vqa_finetuning() -> Finetuning:
    """VisualBERT on VQA v2 as released: 100 regions of width 2048, KL loss, BertAdam 2e-5, batch 64, 10 epochs.

    Source:
        configs/vqa/fine-tune.json.
    """
    return Finetuning(
        recipe="visualbert-vqa",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        task="vqa",
        batch_size=64,
        train=replace(_visualbert_training(2e-5), metric="accuracy", direction="max"),
    )


def visualbert_nlvr2_finetuning() -> Finetuning:
    """VisualBERT on NLVR2 as released: both images in one row, 144 regions of width 1024 each, BertAdam 2e-5, batch 64, 10 epochs.

    Source:
        configs/nlvr2/fine-tune.json; the paper says 5e-5. The head reads BERT's pooler, which nothing trains.
    """
    return Finetuning(
        recipe="visualbert-nlvr2",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr2"],
        task="nlvr2",
        task_settings={"joined": True},
        batch_size=64,
        valid_split="dev",
        train=replace(_visualbert_training(2e-5), metric="accuracy", direction="max"),
    )


def _visualbert_coco(name: str, preset: str, *, batch_size: int, lr: float = 5e-5) -> Pretraining:
    return Pretraining(
        recipe=name,
        model="visualbert",
        encoder=models.spec("visualbert").presets[preset],
        corpora=(Corpus(kind="caption_pairs"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TOKEN_RELEASES["visualbert"],
        batch_size=batch_size,
        start=BERT_BASE,
        train=_visualbert_training(lr),
        paper={"data": "the training part of Karpathy's split, about 100,000 images"},
        release={"data": "train2014 and val2014 but for the 5,000 images of minival, which validate"},
    )


def _visualbert_training(lr: float) -> TrainConfig:
    """Ten epochs of BertAdam; each tensor is clipped by itself, the pooler left out; ends when the best epoch is more than three old.

    The releases' configurations also hold a `grad_norm` that nothing reads.
    """
    optim = OptimConfig(
        name="bert_adam",
        lr=lr,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        no_decay=("bias", "norm"),
        exclude=("pooler",),
        clip="per_tensor",
        clip_norm=1.0,
        schedule="warmup_linear",
        warmup_share=0.1,
        evaluate="before",
    )
    return TrainConfig(epochs=10, patience=3, optim=optim)


# ---------------------------------------------------------------------------------------------------------------------------------------- VL-BERT


def vlbert_base_prec() -> Pretraining:
    """VL-BERT base on features made beforehand, as released: captions and plain text one to one, 2.56e-5, 10 epochs.

    Source:
        cfgs/pretrain/base_prec_4x16G_fp32.yaml: 4 GPUs x (32 captions + 32 passages), LR 1e-7 x 256.
    """
    return _vlbert("vlbert-base-prec", "base_prec", BERT_BASE)


def vlbert_base_prec_without_text() -> Pretraining:
    """VL-BERT base on features made beforehand, captions alone: batch 256, 2.56e-5, half the warm-up, 10 epochs.

    Source:
        cfgs/pretrain/base_prec_withouttextonly_4x16G_fp32.yaml: 4 GPUs x 64 captions; paper, ablation without the text corpus.
    """
    run = _vlbert("vlbert-base-prec-without-text", "base_prec", BERT_BASE)
    train = replace(run.train, optim=replace(run.train.optim, warmup_steps=8000))
    return replace(run, corpora=(Corpus(kind="conceptual_captions"),), batch_size=256, train=train)


def vlbert_large_prec() -> Pretraining:
    """VL-BERT large on features made beforehand, as released: as vlbert-base-prec, in half precision.

    Source:
        cfgs/pretrain/large_prec_4x16G_fp16.yaml.
    """
    run = _vlbert("vlbert-large-prec", "large_prec", BERT_LARGE)
    return replace(run, train=replace(run.train, precision="bf16"), release={**run.release, "train.precision": "fp16"})


def vlbert_base_e2e() -> Pretraining:
    """VL-BERT base end to end, as released: the network that makes the features is trained along, hidden regions are cut out of the picture.

    It starts from a detector of Visual Genome as a plain ResNet (`--backbone`), the Transformer from BERT (`--init`).

    Source:
        cfgs/pretrain/base_e2e_16x16G_fp16.yaml: 16 GPUs x (8 captions + 8 passages), LR 1e-7 x 256; paper, section 4.1.
    """
    return _end_to_end(_vlbert("vlbert-base-e2e", "base_e2e", BERT_BASE))


def vlbert_large_e2e() -> Pretraining:
    """VL-BERT large end to end, as released: as vlbert-base-e2e, in two micro-batches.

    Source:
        cfgs/pretrain/large_e2e_16x16G_fp16.yaml: 16 GPUs x (4 captions + 4 passages) x 2.
    """
    run = _end_to_end(_vlbert("vlbert-large-e2e", "large_e2e", BERT_LARGE))
    return replace(run, batch_size=64, train=replace(run.train, accumulation=2))


def _end_to_end(run: Pretraining) -> Pretraining:
    """A run whose features are made by a network that is trained along, in half precision."""
    return replace(
        run,
        extractor=EXTRACTORS["resnet101"],
        flip=0.5,
        train=replace(run.train, precision="bf16"),
        paper={name: value for name, value in run.paper.items() if name != "features"},
        release={"pictures": "one that cannot be read is shown in the mean colour", "train.precision": "fp16"},
    )


def _vlbert(name: str, preset: str, start: str) -> Pretraining:
    optim = OptimConfig(
        name="release_adamw",
        lr=1e-7 * 256,  # LR times all examples of a step, captions and passages
        betas=(0.9, 0.999),
        eps=1e-6,
        bias_correction=True,
        weight_decay=1e-4,
        no_decay=(),
        clip="global",
        clip_norm=10.0,
        schedule="triangle",
        warmup_steps=16_000,
        evaluate="after",
    )
    return Pretraining(
        recipe=name,
        model="vlbert",
        encoder=models.spec("vlbert").presets[preset],
        corpora=(Corpus(kind="conceptual_captions"), Corpus(kind="text")),
        objectives={"masked_lm": 1.0, "masked_regions": 1.0},
        masking=TOKEN_RELEASES["vlbert"],
        region_masking=REGION_RELEASES["vlbert"],
        region_losses=REGION_LOSSES["vlbert"],
        batch_size=128,
        start=start,
        train=TrainConfig(epochs=10, seed=12345, metric="masked_lm_accuracy", direction="max", optim=optim),
        paper={
            "region_losses.classes": "hard",  # the detector's best class
            "features": "made by a Fast R-CNN that is trained along, hidden regions cut out of the image",
            "devices": "16 V100, 250,000 updates",
        },
        release={"flip": "half of the images: boxes mirrored, features and captions as they are"},
    )


# ---------------------------------------------------------------------------------------------------------------------------------------- ViLBERT

_VILBERT_NO_DECAY: Mapping[str, Any] = {
    "weight_decay": 0.01,
    "no_decay": ("bias", "norm"),
    # bias, LayerNorm.bias, LayerNorm.weight: biOutput.LayerNorm1.weight and LayerNorm2.weight are none of these
    "no_decay_except": ("text_reads.norm.weight", "regions_read.norm.weight"),
}


def vilbert_conceptual() -> Pretraining:
    """ViLBERT on Conceptual Captions as first released: batch 512, 1e-4 and a tenth of it for what starts from BERT, 10 epochs.

    Source:
        vilbert_beta, train_concap.py and the README's command with bert_base_6layer_6conect.json.
    """
    optim = OptimConfig(
        name="bert_adam",
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-6,
        **_VILBERT_NO_DECAY,
        swap_decay=True,
        # the names in config/bert-base-uncased_weight_name.json; BERT's prediction head is not among them
        rates={"encoder.embeddings.": 0.1, "encoder.text_norm.": 0.1, "encoder.text_layers.": 0.1},
        clip="per_tensor",
        clip_norm=1.0,
        schedule="warmup_linear",
        warmup_share=0.1,
        evaluate="before",
    )
    return _vilbert(
        "vilbert-conceptual",
        "vilbert",
        optim,
        paper={"batch_size": "512 over 8 devices together (recalled)", "regions": "10 to 36 above a threshold of the detector"},
        release={"batch_size": "512 for every process"},
    )


def vilbert_multitask() -> Pretraining:
    """ViLBERT on Conceptual Captions as the multi-task release runs it for 12-in-1: batch 512, AdamW 1e-4 for everything, 10 epochs.

    Pairs that do not match teach no words and no regions (`--objective 1`). The training on twelve tasks that follows is no pre-training.

    Source:
        vilbert-multi-task, train_concap.py and the README's command.
    """
    optim = OptimConfig(
        name="release_adamw",
        lr=1e-4,  # a tenth for BERT's weights is meant, but the names that it asks for never match
        betas=(0.9, 0.98),
        eps=1e-8,
        bias_correction=True,
        **_VILBERT_NO_DECAY,
        clip="none",
        schedule="warmup_linear",
        warmup_share=0.1,
        evaluate="after",
    )
    run = _vilbert(
        "vilbert-multitask",
        "vilbert-multitask",
        optim,
        paper={"region_masking.hide_overlapping": True},  # 12-in-1, recalled; the code only counts them in the whole-image feature
    )
    return replace(run, corpora=(Corpus(kind="vilbert_captions", keep_above=False),))


def _vilbert(name: str, masking: str, optim: OptimConfig, *, paper: Mapping[str, Any], release: Mapping[str, Any] | None = None) -> Pretraining:
    return Pretraining(
        recipe=name,
        model="vilbert",
        encoder=models.spec("vilbert").presets["connect6"],
        corpora=(Corpus(kind="vilbert_captions"),),
        objectives={"masked_lm": 1.0, "matching": 1.0, "masked_regions": 1.0},
        masking=TOKEN_RELEASES[masking],
        region_masking=REGION_RELEASES[masking],
        region_losses=REGION_LOSSES["vilbert"],
        batch_size=512,
        start=BERT_BASE,
        train=TrainConfig(epochs=10, seed=42, optim=optim),
        paper=paper,
        release=release or {},
    )


# ----------------------------------------------------------------------------------------------------------------------------------------- LXMERT


def lxmert_20epochs_qa() -> Pretraining:
    """LXMERT as released: from scratch, question answering from the first epoch on, batch 256, 1e-4, 20 epochs.

    Source:
        run/lxmert_pretrain.bash, lxmert_pretrain.py.
    """
    return Pretraining(
        recipe="lxmert-20epochs-qa",
        model="lxmert",
        encoder=models.spec("lxmert").presets["base"],
        corpora=(Corpus(kind="lxmert"),),
        objectives={"masked_lm": 1.0, "matching": 1.0, "masked_regions": 1.0, "image_qa": 1.0},
        objective_settings={"image_qa": {"num_answers": NUM_ANSWERS}},
        masking=TOKEN_RELEASES["lxmert"],
        region_masking=REGION_RELEASES["lxmert"],
        region_losses=REGION_LOSSES["lxmert"],
        batch_size=256,
        train=TrainConfig(epochs=20, seed=9595, optim=_lxmert_optimiser()),
        paper={
            "from_epoch.image_qa": 10,
            "region_masking.hide": 1.0,
            "region_masking.random": 0.0,
            "region_masking.labels": "chosen",
            "region_losses.weighted": False,
            "region_losses.over": "chosen",
            "region_losses.scale": 1.0,
        },
        release={"losses": "means over each of four devices, then the mean of these"},
    )


def lxmert_two_phase_qa() -> Pretraining:
    """LXMERT in two phases, as a comment in the release describes an earlier run: ten epochs without question answering, ten with it at weight 2.

    Source:
        lxmert_pretrain.py. Its author found it about as good as lxmert-20epochs-qa.
    """
    run = lxmert_20epochs_qa()
    return replace(
        run,
        recipe="lxmert-two-phase-qa",
        objectives={**run.objectives, "image_qa": 2.0},
        from_epoch={"image_qa": 10},
        paper={**{name: value for name, value in run.paper.items() if name != "from_epoch.image_qa"}, "objectives.image_qa": 1.0},
        release={**run.release, "objectives.image_qa": 1.0, "from_epoch.image_qa": 0},
    )


def lxmert_paper() -> Pretraining:
    """LXMERT as the paper describes it: ten epochs without question answering, ten with it; hidden regions become zeros, only they are told.

    The learning rate falls in one line over both, so question answering is learnt at the smaller rates that it needs.

    Source:
        Sections 3.1 and 3.3; numbers that the paper leaves open as released.
    """
    run = lxmert_20epochs_qa()
    assert run.region_losses is not None
    return replace(
        run,
        recipe="lxmert-paper",
        from_epoch={"image_qa": 10},
        region_masking=replace(REGION_RELEASES["lxmert"], hide=1.0, random=0.0, labels="chosen"),
        region_losses=replace(run.region_losses, weighted=False, over="chosen", scale=1.0),
        paper={},
        release={
            **run.release,
            "from_epoch.image_qa": 0,
            "region_masking.hide": 0.8,
            "region_masking.random": 0.1,
            "region_masking.labels": "all",
            "region_losses.weighted": True,
            "region_losses.over": "regions",
            "region_losses.scale": 1 / 0.15,
        },
    )


def _lxmert_optimiser() -> OptimConfig:
    """LXMERT and CVLP: BertAdam, every parameter decayed, one norm over all gradients."""
    return OptimConfig(
        name="bert_adam",
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        no_decay=(),
        clip="global",
        clip_norm=1.0,
        schedule="warmup_linear",
        warmup_share=0.05,
        evaluate="before",
    )


# ------------------------------------------------------------------------------------------------------------------------------------------- CVLP

_CONTRAST: Mapping[str, Any] = {
    "projection_size": 128,
    "momentum": 0.99995,
    "temperature": 0.07,
    "clip": 10.0,
    "queue_size": 30 * 256 * 36,  # 30 batches of 256 images of 36 regions
    "max_regions": 36,
}


def cvlp_release() -> Pretraining:
    """CVLP as last released: from scratch, region contrast in the place of region labels and question answering, batch 256, 1e-4, 40 epochs.

    Source:
        run/lxmert_pretrain.bash at 7c7331b and later, src/pretrain/lxmert_pretrain.py at e2a363e (deleted in 13de5fe).
    """
    return Pretraining(
        recipe="cvlp-release",
        model="cvlp",
        encoder=models.spec("cvlp").presets["base_replace"],
        corpora=(Corpus(kind="lxmert"),),
        objectives={"masked_lm": 1.0, "matching": 1.0, "region_contrast": 1.0},
        objective_settings={"region_contrast": _CONTRAST},
        masking=TOKEN_RELEASES["cvlp"],
        region_masking=REGION_RELEASES["cvlp"],
        batch_size=256,
        train=TrainConfig(epochs=40, seed=9595, optim=_lxmert_optimiser()),
        paper={"encoder.key_layers": "drop", "objective_settings.region_contrast.clip": None},
        release={
            "start": "both networks from scratch, each by itself",
            "queue": "dealt out to the devices: each sees its part of the 30 batches",
            "momentum": "the word table follows twice per update",
            "warm-up": "the 30 batches that fill the queue count as updates of the schedule",
        },
    )


def cvlp_from_lxmert() -> Pretraining:
    """CVLP as first released: as cvlp-release, but 20 epochs from the weights of LXMERT, its answer head left out.

    Source:
        run/lxmert_pretrain.bash at 5851373 (`--loadLXMERT`).
    """
    run = cvlp_release()
    return replace(
        run,
        recipe="cvlp-from-lxmert",
        start="lxmert-20epochs-qa",
        train=replace(run.train, epochs=20),
        release={name: value for name, value in run.release.items() if name != "start"},
    )


def cvlp_paper() -> Pretraining:
    """CVLP as the paper describes it: layers of the key network dropped, scores without a bound; schedule as released.

    Source:
        Method section; batch, rate, epochs, temperature and queue size could not be read there and are those of the release.
    """
    run = cvlp_release()
    return replace(
        run,
        recipe="cvlp-paper",
        encoder=models.spec("cvlp").presets["base"],
        objective_settings={"region_contrast": {**_CONTRAST, "clip": None}},
        paper={},
        release={**run.release, "encoder.key_layers": "replace", "objective_settings.region_contrast.clip": 10.0},
    )


def differences(run: Pretraining | Finetuning, recipe: Pretraining | Finetuning) -> dict[str, dict[str, Any]]:
    """Where a run differs from its recipe, from the paper and from the released code, as far as that is known.

    Args:
        run: the recipe after changes of settings.
        recipe: as it was made.
    Returns:
        "changed" (only if anything is), "paper" and "release": setting (dotted) or topic -> its value `here`, unless it is a topic, and in the
        `recipe`, `paper` or `release`.
    """
    plain = configs.to_dict(run)
    changed = {name: {"here": new, "recipe": old} for name, (old, new) in configs.difference(run, recipe).items()}
    found: dict[str, dict[str, Any]] = {"changed": changed} if changed else {}
    for source in ("paper", "release"):
        told = plain.get(source, {})
        here = {name: _value(plain, name) for name in told}
        found[source] = {name: {**here[name], source: value} for name, value in told.items() if here[name] != {"here": value}}
    return found


def _value(plain: Any, name: str) -> dict[str, Any]:
    """The value of a dotted setting under `here`; nothing if it is not one."""
    for part in name.split("."):
        if not isinstance(plain, Mapping) or part not in plain:
            return {}
        plain = plain[part]
    return {"here": plain}


PRETRAINING: Mapping[str, Callable[[], Pretraining]] = {
    "visualbert-coco": visualbert_coco,
    "visualbert-nlvr2-coco": visualbert_nlvr2_coco,
    "visualbert-flickr30k-coco": visualbert_flickr30k_coco,
    "visualbert-vcr-coco": visualbert_vcr_coco,
    "visualbert-vqa": visualbert_vqa_pretraining,
    "visualbert-nlvr2": visualbert_nlvr2_pretraining,
    "visualbert-flickr30k": visualbert_flickr30k_pretraining,
    "visualbert-vcr": visualbert_vcr_pretraining,
    "vlbert-base-prec": vlbert_base_prec,
    "vlbert-base-prec-without-text": vlbert_base_prec_without_text,
    "vlbert-large-prec": vlbert_large_prec,
    "vlbert-base-e2e": vlbert_base_e2e,
    "vlbert-large-e2e": vlbert_large_e2e,
    "vilbert-conceptual": vilbert_conceptual,
    "vilbert-multitask": vilbert_multitask,
    "lxmert-20epochs-qa": lxmert_20epochs_qa,
    "lxmert-two-phase-qa": lxmert_two_phase_qa,
    "lxmert-paper": lxmert_paper,
    "cvlp-release": cvlp_release,
    "cvlp-from-lxmert": cvlp_from_lxmert,
    "cvlp-paper": cvlp_paper,
}
FINETUNING: Mapping[str, Callable[[], Finetuning]] = {
    "visualbert-vqa": visualbert_vqa_finetuning,
    "visualbert-nlvr2": visualbert_nlvr2_finetuning,
}
