"""VisualBERT's published pre-training and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from visling import models
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.base import Corpus
from visling.recipes import scenes
from visling.recipes.configs import BERT_BASE, FinetuneConfig, PretrainConfig
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig
from visling.vision.vcr_network import VcrNetworkConfig

TOKEN_MASKING = TokenMasking(in_turn=True)
"""VisualBERT hides no regions."""
NO_DECAY_WITH_NETWORK = ("bias", "encoder.norm", "self_attention.norm", "feed_forward.norm", "transform.norm")
"""Biases and the norms of BERT. Those of the network for VCR are decayed: the release exempts what is called LayerNorm,
and its batch norms are not."""


def visualbert_coco() -> PretrainConfig:
    """VisualBERT's COCO phase for VQA as released: caption pairs, 100 regions of width 2048, batch 48, 5e-5, 10 epochs.

    Source:
        configs/vqa/coco-pre-train.json; paper section 3.2, task-agnostic pre-training.
    """
    return _visualbert_coco("visualbert-coco", "vqa", batch_size=48)


def visualbert_nlvr2_coco() -> PretrainConfig:
    """VisualBERT's COCO phase for NLVR2 as released: caption pairs, 144 regions, batch 64, 5e-5, 10 epochs.

    Features have a width of 1024.

    Source:
        configs/nlvr2/coco-pre-train.json.
    """
    return _visualbert_coco("visualbert-nlvr2-coco", "nlvr2", batch_size=64)


def visualbert_flickr30k_coco() -> PretrainConfig:
    """VisualBERT's COCO phase for Flickr30K as released: caption pairs, batch 32, 5e-5, 10 epochs.

    10 to 100 regions of width 2048 and their boxes.

    Source:
        configs/flickr/coco-pre-train.json.
    """
    return _visualbert_coco("visualbert-flickr30k-coco", "flickr30k", batch_size=32)


def visualbert_vcr_coco() -> PretrainConfig:
    """VisualBERT's COCO phase for VCR, on fixed features: caption pairs, batch 128, 1e-4, 10 epochs.

    Features have a width of 512.

    Source:
        configs/vcr/coco-pre-train.json. There the network that computes the features is trained jointly, except for its
        first stages.
    """
    run = _visualbert_coco("visualbert-vcr-coco", "vcr", batch_size=128, lr=1e-4)
    return replace(
        run,
        release={
            **run.release,
            "features": "computed by a ResNet-50 that is trained jointly, except for its first three stages",
        },
    )


def visualbert_vqa_pretraining() -> PretrainConfig:
    """VisualBERT's task-specific phase for VQA as released: masked words, batch 64, 5e-5, 10 epochs.

    Words of question and answer are masked.

    Source:
        configs/vqa/pre-train.json; paper section 3.2, task-specific pre-training.
    """
    return PretrainConfig(
        recipe="visualbert-vqa",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        corpora=(Corpus(kind="questions", question_text="release"),),
        objectives={"masked_lm": 1.0},
        masking=TOKEN_MASKING,
        batch_size=64,
        start="visualbert-coco",
        train=_visualbert_training(5e-5),
        train_split="train+val",
        valid_split="minival",
        release={
            "answers": "spelt letter by letter, by mistake (the corpus spelled_questions)",
            "drawn answers": "only those in its list, <unk> where there is none (answers of the corpus names the file)",
        },
    )


def visualbert_nlvr2_pretraining() -> PretrainConfig:
    """VisualBERT's task-specific phase for NLVR2 as released: masked words and matching, batch 64, 5e-5, 10 epochs.

    Matching asks whether the sentence is true of its two images.

    Source:
        configs/nlvr2/pre-train.json, 144 regions of each image; its comment asks for 8 V100.
    """
    return PretrainConfig(
        recipe="visualbert-nlvr2",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr2"],
        corpora=(Corpus(kind="statements"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TOKEN_MASKING,
        batch_size=64,
        valid_split="dev",
        start="visualbert-nlvr2-coco",
        train=_visualbert_training(5e-5),
    )


def visualbert_flickr30k_pretraining() -> PretrainConfig:
    """VisualBERT's task-specific phase for Flickr30K as released: masked words, batch 32, 5e-5, 10 epochs.

    Each text is a single caption, a sentence of Flickr30K Entities where its files are present. Karpathy's files, which
    are read where they are not, train on most test images of Entities.

    Source:
        configs/flickr/pre-train.json.
    """
    return PretrainConfig(
        recipe="visualbert-flickr30k",
        model="visualbert",
        encoder=models.spec("visualbert").presets["flickr30k"],
        corpora=(Corpus(kind="flickr30k"),),
        objectives={"masked_lm": 1.0},
        masking=TOKEN_MASKING,
        batch_size=32,
        start="visualbert-flickr30k-coco",
        train=_visualbert_training(5e-5),
        release={
            "data": "sentences and splits of Flickr30K Entities, except sentences without an entity in a box; here "
            "only if --data has its Sentences, Annotations and lists of images"
        },
    )


def visualbert_vcr_pretraining() -> PretrainConfig:
    """VisualBERT's task-specific phase for VCR, on fixed features: masked words, matching, batch 32, 5e-5, one epoch.

    Matching asks whether the choice is right. A text is a question and one of its answers, or question, right answer
    and one of the rationales: eight texts per question. Names are linked to regions where the store holds the objects
    of VCR's metadata.

    Source:
        configs/vcr/pre-train.json.
    """
    train = _visualbert_training(5e-5)
    return PretrainConfig(
        recipe="visualbert-vcr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vcr"],
        corpora=(Corpus(kind="vcr"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TOKEN_MASKING,
        batch_size=32,
        start="visualbert-vcr-coco",
        train=replace(train, epochs=1, optim=replace(train.optim, warmup_share=0.1879)),
        release={
            "features": "computed by a ResNet-50 that is trained jointly, except for its first three stages",
            "regions": "the whole image and the objects that question, answers or rationales name; "
            "all persons where none is named",
            "choices": "an item is shown with the same one of its eight choices, eight times an epoch, by mistake "
            "(same_choice of the corpus)",
            "links": "count words where they should count word pieces, by mistake (word_links of the corpus)",
        },
    )


def visualbert_vqa_finetuning() -> FinetuneConfig:
    """VisualBERT on VQA v2 as released: 100 regions of width 2048, KL loss, BertAdam 2e-5, batch 64, 10 epochs.

    The answers are the 3,129 of the release, read from the file that `task_settings.answers` names. A list of minival's
    images or questions stands next to val's files. As in the release minival is trained on too, so that the best
    epoch is chosen on questions that were seen; `train_split=train+nominival` keeps them apart.

    Source:
        configs/vqa/fine-tune.json; dataloaders/vqa_dataset.py.
    """
    return FinetuneConfig(
        recipe="visualbert-vqa",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        task="vqa",
        task_settings={"min_count": None, "question_text": "release"},
        batch_size=64,
        start="visualbert-vqa",
        train_split="train+val",
        valid_split="minival",
        train=replace(_visualbert_training(2e-5), metric="accuracy", direction="max"),
    )


def visualbert_nlvr2_finetuning() -> FinetuneConfig:
    """VisualBERT on NLVR2 as released: both images in one row, BertAdam 2e-5, batch 64, 10 epochs.

    144 regions of width 1024 of each image.

    Source:
        configs/nlvr2/fine-tune.json; the paper says 5e-5. The head reads BERT's pooler, which nothing trains.
    """
    return FinetuneConfig(
        recipe="visualbert-nlvr2",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr2"],
        task="nlvr2",
        task_settings={"joined": True},
        batch_size=64,
        start="visualbert-nlvr2",
        valid_split="dev",
        train=replace(_visualbert_training(2e-5), metric="accuracy", direction="max"),
        paper={"train.optim.lr": 5e-5},
    )


def visualbert_flickr30k_finetuning() -> FinetuneConfig:
    """VisualBERT on Flickr30K Entities as released: phrases choose regions, BertAdam 2e-5, batch 32, 5 epochs.

    10 to 100 regions of width 2048 and their boxes. A phrase that occurs twice in a sentence stands at its first
    occurrence, and sentences about something else than their image are kept.

    Source:
        configs/flickr/fine-tune.json; dataloaders/flickr_ban/dataset.py.
    """
    train = _visualbert_training(2e-5)
    return FinetuneConfig(
        recipe="visualbert-flickr30k",
        model="visualbert",
        encoder=models.spec("visualbert").presets["flickr30k"],
        task="grounding",
        task_settings={"phrase_at": "release", "unrelated": True},
        batch_size=32,
        start="visualbert-flickr30k",
        train=replace(train, epochs=5, metric="recall_at_1", direction="max"),
    )


def visualbert_vcr_finetuning() -> FinetuneConfig:
    """VisualBERT on VCR, Q -> A, as released: its own network for regions, BertAdam 2e-5, batch 32, 8 epochs.

    The network is trained jointly. It sees pictures of 768 x 384, and in them the whole image and the objects that
    question, answers or rationales name, each with its class and its outline. It starts from torchvision's ResNet-50 on
    ImageNet (`--backbone`), or is that of the model which `--init` names. The head reads BERT's pooler, which nothing
    trains. `extractor=none` reads stored features of width 512 instead; in the paper a network that is not trained
    costs 0.8 points of Q -> AR.

    Source:
        configs/vcr/fine-tune-qa.json, utils/detector.py; paper, sections 4.2 and 5.
    """
    return _visualbert_vcr("visualbert-vcr", "answer", epochs=8)


def visualbert_vcr_rationale_finetuning() -> FinetuneConfig:
    """VisualBERT on VCR, QA -> R, as released: as visualbert-vcr, with rationales for the right answer, 12 epochs.

    Source:
        configs/vcr/fine-tune-qar.json.
    """
    return _visualbert_vcr("visualbert-vcr-rationale", "rationale", epochs=12)


def _visualbert_vcr(name: str, phase: str, *, epochs: int) -> FinetuneConfig:
    train = _visualbert_training(2e-5)
    optim = replace(train.optim, no_decay=NO_DECAY_WITH_NETWORK)
    return FinetuneConfig(
        recipe=name,
        model="visualbert",
        encoder=models.spec("visualbert").presets["vcr"],
        task="vcr",
        task_settings={"phase": phase, "only_relevant": True, "relevance": "all_texts"},
        extractor=VcrNetworkConfig(),
        batch_size=32,
        start="visualbert-vcr",
        train=replace(train, epochs=epochs, metric="accuracy", direction="max", optim=optim),
        release={
            "links": "count words where they should count word pieces, by mistake",
            "norms": "measure the 8 examples of each of 4 GPUs; the statistics of the first one are kept",
        },
    )


def _visualbert_coco(name: str, preset: str, *, batch_size: int, lr: float = 5e-5) -> PretrainConfig:
    return PretrainConfig(
        recipe=name,
        model="visualbert",
        encoder=models.spec("visualbert").presets[preset],
        corpora=(Corpus(kind="caption_pairs"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TOKEN_MASKING,
        batch_size=batch_size,
        start=BERT_BASE,
        train=_visualbert_training(lr),
        paper={"data": "the training part of Karpathy's split, about 100,000 images"},
        release={"data": "train2014 and val2014 but for the 5,000 images of minival, which validate"},
    )


def _visualbert_training(lr: float) -> TrainConfig:
    """Ten epochs of BertAdam without the pooler, each tensor clipped by itself; stops three epochs after the best.

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
    return TrainConfig(epochs=10, patience=3, keep=("best", "epochs"), optim=optim)


def visualbert_scenes() -> PretrainConfig:
    """VisualBERT's COCO phase on drawn scenes: masked words of captions, and caption pairs."""
    run = scenes.on_captions("visualbert", wrong=Corpus(kind="caption_pairs", weight=scenes.WRONG_CAPTIONS.weight))
    return replace(
        run,
        release={
            "masking.rate": 0.15,
            "objectives.matching": 1.0,
            "data": "caption pairs alone, half of the second captions wrong",
        },
    )


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    "visualbert-coco": visualbert_coco,
    "visualbert-nlvr2-coco": visualbert_nlvr2_coco,
    "visualbert-flickr30k-coco": visualbert_flickr30k_coco,
    "visualbert-vcr-coco": visualbert_vcr_coco,
    "visualbert-vqa": visualbert_vqa_pretraining,
    "visualbert-nlvr2": visualbert_nlvr2_pretraining,
    "visualbert-flickr30k": visualbert_flickr30k_pretraining,
    "visualbert-vcr": visualbert_vcr_pretraining,
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    "visualbert-vqa": visualbert_vqa_finetuning,
    "visualbert-nlvr2": visualbert_nlvr2_finetuning,
    "visualbert-flickr30k": visualbert_flickr30k_finetuning,
    "visualbert-vcr": visualbert_vcr_finetuning,
    "visualbert-vcr-rationale": visualbert_vcr_rationale_finetuning,
}

SCENES: Mapping[str, Callable[[], PretrainConfig]] = {"visualbert-scenes": visualbert_scenes}
"""Of ours, on drawn scenes."""
