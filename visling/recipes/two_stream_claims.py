"""The claims of ViLBERT's, LXMERT's and CVLP's papers, as runs on drawn scenes."""

from __future__ import annotations

from collections.abc import Mapping

from visling.recipes.claim_configs import PLAIN, Arm, Claim, Contrast, Measure, Training, World
from visling.recipes.claim_trainings import answer, estimate_minutes, judge, point, pretrain, rank

VILBERT = pretrain("vilbert")
LXMERT = pretrain("lxmert")
CVLP = pretrain("cvlp")
UNASKED = "objectives={masked_lm=1.0, matching=0.1, masked_regions=0.05}"
"""LXMERT's objectives but for image_qa. At weight 0 its questions would be left out too."""
QA_SETS = (
    'corpora=[{kind="captions"}, {kind="single_captions", weight=0.05}, {kind="answered_questions", weight=0.2}, '
    '{kind="gqa", weight=0.2}]'
)
"""LXMERT's corpora with GQA's questions in addition."""
ALL_UPDATES = 3125
"""Five passes over all of VQA's questions."""
TEXT_UPDATES = 2000
EARLY = 500
"""Updates after which a collapse would be early."""
REGRESSION = (
    "objectives.region_contrast=0",
    "objectives.masked_regions=0.1",
    'region_losses={features="smooth_l1"}',
)
CLASSIFICATION = (
    "objectives.region_contrast=0",
    "objectives.masked_regions=0.1",
    'region_losses={classes="hard"}',
)
"""What CVLP's family predicts about regions in place of contrast: LXMERT's two losses, at the weight that contrast
has."""
CVLP_FIGURE = (
    "ablations not accessible; the release's table: VQA test-dev 72.87 (LXMERT 72.42), NLVR2 test-P 76.81 (74.45)"
)
CVLP_SECTION = "1 (the ablations were not accessible)"


def _data() -> Claim:
    def share(split: str) -> Training:
        return pretrain("vilbert", f"train_split={split}", world="subsets")

    arms = {
        "none": Arm(about="fine-tuned only", trainings=(answer("vilbert"),)),
        "25 %": Arm(about="captions of a quarter of the images", trainings=(share("quarter"), answer("vilbert"))),
        "50 %": Arm(about="captions of half of the images", trainings=(share("half"), answer("vilbert"))),
        "100 %": Arm(about="captions of all images", trainings=(VILBERT, answer("vilbert"))),
    }
    return Claim(
        name="vilbert-data",
        paper="ViLBERT",
        section="4 and table 3",
        statement="The more captions there are to pre-train on, the better.",
        figure="recalled: VQA test-dev 68.93 (0 %), 69.82 (25 %), 70.30 (50 %), 70.55 (100 %); RefCOCO+ val 68.61, "
        "69.90, 71.16, 72.34",
        differs="the share of the 2,000 training images whose captions are pre-trained on",
        arms=arms,
        contrasts={
            "25 % - none": Contrast(weights={"25 %": 1, "none": -1}, size=2),
            "100 % - 25 %": Contrast(weights={"100 %": 1, "25 %": -1}, size=2),
        },
        worlds={"subsets": World(shares={"quarter": 0.25, "half": 0.5})},
        spread=2.8,
        minutes=estimate_minutes(arms),
        note="All pre-trainings have equally many updates, so that fewer captions are seen more often. Whether the "
        "paper's smaller sets also meant fewer updates is unknown.",
    )


def _classes() -> Claim:
    regressed = pretrain("vilbert", "region_losses.classes=none", "region_losses.features=l2")
    arms = {
        "classes": Arm(about="the detector's distribution, KL divergence", trainings=(VILBERT, answer("vilbert"))),
        "features": Arm(about="the feature itself, squared error", trainings=(regressed, answer("vilbert"))),
    }
    return Claim(
        name="vilbert-classes",
        paper="ViLBERT",
        section="2.2 and 3.1, masked multi-modal modelling",
        statement="Of masked regions the distribution over classes is a better target than the feature.",
        figure="none given: the paper argues that language names classes and cannot tell features",
        differs="what is predicted of masked regions: region_losses, the release's visual_target 0 or 1",
        arms=arms,
        contrasts={"classes - features": Contrast(weights={"classes": 1, "features": -1}, size=2)},
        spread=8.5,
        minutes=estimate_minutes(arms),
        note="Masked regions weigh 0.1, words 1; the paper weighs both alike.",
    )


def _two_streams() -> Claim:
    arms = {
        "two": Arm(about="ViLBERT", trainings=(VILBERT, answer("vilbert"))),
        "one": Arm(
            about="its single-stream baseline of about as many parameters",
            trainings=(pretrain("vilbert-baseline"), answer("vilbert-baseline")),
        ),
    }
    return Claim(
        name="vilbert-two-streams",
        paper="ViLBERT",
        section="4.1 and table 1, rows Single-Stream",
        statement="Two streams with co-attention are better than one stream over words and regions.",
        figure="VQA test-dev 70.55 (two) and 68.85 (one, recalled); RefCOCO+ val 72.34 and 69.21 (recalled)",
        differs="the encoder; objectives, data and training are the same",
        arms=arms,
        contrasts={"two - one": Contrast(weights={"two": 1, "one": -1}, size=2)},
        spread=6.0,
        minutes=estimate_minutes(arms),
        note="The paper's baseline is BERT base and has fewer parameters than ViLBERT; here 0.63 and 0.69 million.",
    )


def _depth() -> Claim:
    deep = {
        1: pretrain("vilbert", *_connect((2,), (0,))),
        2: VILBERT,
        3: pretrain("vilbert", *_connect((0, 1, 2), (0, 1, 2))),
    }
    measured: Mapping[str, tuple[Training, Measure]] = {
        "VQA": (answer("vilbert"), Measure()),
        "retrieval": (rank("vilbert"), Measure(kind="validation", name="image_r1")),
        "referring": (point("vilbert"), Measure()),
    }
    arms = {
        f"{task}, {depth}": Arm(
            about=f"{depth} co-attention layer{'s' if depth > 1 else ''}",
            trainings=(first, training),
            measure=measure,
        )
        for task, (training, measure) in measured.items()
        for depth, first in deep.items()
    }

    def gain(task: str) -> dict[str, float]:
        return {f"{task}, 3": 1, f"{task}, 1": -1, "referring, 3": -1, "referring, 1": 1}

    return Claim(
        name="vilbert-depth",
        paper="ViLBERT",
        section="4 and table 2",
        statement="The best depth differs by task: VQA and retrieval gain from more co-attention layers, referring "
        "expressions do not.",
        figure="from 2 to 8 layers, recalled: VQA test-dev 69.92 to 70.47, image retrieval R@1 55.68 to 58.78, "
        "RefCOCO+ val 71.74 to 71.66; with 6 layers 70.55, 58.20 and 72.34",
        differs="the number of co-attention layers, and of region layers between them; all have two text layers",
        arms=arms,
        contrasts={
            f"gain of {task} - gain of referring": Contrast(weights=gain(task), size=3) for task in ("VQA", "retrieval")
        },
        minutes=estimate_minutes(arms),
        note="One to three layers stand for the paper's two to eight. The gain is that from one to three. Recall of "
        "the right image is among the first 100 of the validation split, at the end of the run: 500 captions.",
    )


def _connect(text: tuple[int, ...], regions: tuple[int, ...]) -> tuple[str, ...]:
    """Settings of an encoder with co-attention after so many text and region layers each, the last of both streams
    excepted."""
    return (
        f"encoder.text_layers_before={list(text)}",
        f"encoder.region_layers_before={list(regions)}",
        f"encoder.num_region_layers={regions[-1]}",
    )


def _qa() -> Claim:
    unasked = pretrain("lxmert", UNASKED)
    arms = {
        "with": Arm(about="answers questions in pre-training", trainings=(LXMERT, judge("lxmert"))),
        "without": Arm(about="reads the same questions as further sentences", trainings=(unasked, judge("lxmert"))),
    }
    return Claim(
        name="lxmert-qa",
        paper="LXMERT",
        section="5.2 and table 4",
        statement="Question answering in pre-training helps NLVR2, which has no questions.",
        figure="NLVR2 dev 74.9 with, 72.4 without; VQA dev 69.9 and 68.9; GQA dev 60.0 and 58.2",
        differs="the objective image_qa; the same captions and questions are read, with masked words, in both arms",
        measure=Measure(split="test1"),
        arms=arms,
        contrasts={"with - without": Contrast(weights={"with": 1, "without": -1}, size=5)},
        spread=2.1,
        minutes=estimate_minutes(arms),
        note="About 1,200 statements train and 450 test, a standard error of 2.4 points for one run. In the paper "
        "answers are asked in the second half of pre-training only, of all questions; here throughout, of a fifth.",
    )


def _vision() -> Claim:
    blind = pretrain("lxmert", "objectives.masked_regions=0")
    arms = {
        "with": Arm(about="classes, attributes and features of masked regions", trainings=(LXMERT, answer("lxmert"))),
        "without": Arm(about="no region is masked", trainings=(blind, answer("lxmert"))),
    }
    return Claim(
        name="lxmert-vision",
        paper="LXMERT",
        section="5.3 and table 5",
        statement="Predicting masked regions in pre-training helps.",
        figure="VQA dev 69.9 with, 66.3 without; GQA dev 60.0 and 57.1; NLVR2 dev 74.9 and 50.9",
        differs="the objective masked_regions, and with it the masking of regions",
        arms=arms,
        contrasts={"with - without": Contrast(weights={"with": 1, "without": -1}, size=2)},
        spread=7.8,
        minutes=estimate_minutes(arms),
        note="Masked regions weigh 0.05, words 1; the paper weighs both alike.",
    )


def _scratch() -> Claim:
    text = pretrain(
        "lxmert",
        'corpora=[{kind="text", special_tokens=true}]',
        "objectives={masked_lm=1.0}",
        updates=TEXT_UPDATES,
    )
    arms = {
        "scratch": Arm(about="pre-trained from random weights", trainings=(LXMERT, answer("lxmert"))),
        "text": Arm(about="pre-trained on text first", trainings=(text, LXMERT, answer("lxmert"))),
    }
    return Claim(
        name="lxmert-scratch",
        paper="LXMERT",
        section="5.1 and table 3",
        statement="Pre-training from scratch is better than pre-training that starts from a model of text.",
        figure="dev, from scratch and from BERT: VQA 69.9 and 68.8, GQA 60.0 and 58.3, NLVR2 74.9 and 70.1",
        differs="whether the pre-training starts from a model that was trained on masked words of text alone",
        arms=arms,
        contrasts={"scratch - text": Contrast(weights={"scratch": 1, "text": -1}, size=2)},
        minutes=10.0,  # a passage takes as long as four captions
        note="BERT has read books and an encyclopedia, and fills LXMERT's text layers. Here the text is captions of "
        "the same scenes, one after the other, and the whole encoder is taken. As in the paper, the pre-training that "
        "follows is as long in both arms, so that the one from text is trained for longer in all.",
    )


def _qa_sets() -> Claim:
    asked = pretrain("lxmert", QA_SETS)
    read = pretrain("lxmert", QA_SETS, UNASKED)
    arms = {
        "pre-training": Arm(
            about="questions of VQA and GQA answered in pre-training, VQA fine-tuned",
            trainings=(asked, _answer_all()),
        ),
        "augmentation": Arm(
            about="the same questions only read in pre-training, VQA and GQA fine-tuned together",
            trainings=(read, _answer_all("train_split=train+gqa", world="questions")),
        ),
    }
    return Claim(
        name="lxmert-qa-sets",
        paper="LXMERT",
        section="5.2 and table 4",
        statement="Several sets of questions serve better in pre-training than as additional data of the fine-tuning.",
        figure="VQA dev 69.9 in pre-training, 68.0 by augmentation (and without questions in pre-training); GQA dev "
        "60.0 and 58.1",
        differs="when GQA's questions are answered: in pre-training, with VQA's, or in fine-tuning next to VQA's",
        arms=arms,
        contrasts={"pre-training - augmentation": Contrast(weights={"pre-training": 1, "augmentation": -1}, size=2)},
        worlds={"questions": World(questions={"gqa": "gqa"})},
        minutes=estimate_minutes(arms),
        note="Fine-tuning reads all 20,000 questions of VQA, and in one arm as many of GQA, for 3,125 updates in both.",
    )


def _answer_all(*settings: str, world: str = PLAIN) -> Training:
    """Fine-tuning on all of VQA's questions."""
    return Training(recipe="lxmert-vqa-scenes", settings=(f"train.max_steps={ALL_UPDATES}", *settings), world=world)


def _contrast() -> Claim:
    arms = {
        "contrast": Arm(about="picked out among earlier regions", trainings=(CVLP, answer("cvlp"))),
        "regression": Arm(
            about="the feature of masked regions, smooth L1", trainings=(pretrain("cvlp", *REGRESSION), answer("cvlp"))
        ),
        "classification": Arm(
            about="the detector's class of masked regions",
            trainings=(pretrain("cvlp", *CLASSIFICATION), answer("cvlp")),
        ),
    }
    return Claim(
        name="cvlp-contrast",
        paper="CVLP",
        section=CVLP_SECTION,
        statement="Contrast of regions is a better objective than regression of features or classification.",
        figure=CVLP_FIGURE,
        differs="what is learnt about regions, at the same weight",
        arms=arms,
        contrasts={
            "contrast - regression": Contrast(weights={"contrast": 1, "regression": -1}, size=2),
            "contrast - classification": Contrast(weights={"contrast": 1, "classification": -1}, size=2),
        },
        spread=1.2,
        minutes=estimate_minutes(arms),
        note="As in CVLP, contrast is learnt of every region; the losses that it replaces, of masked ones.",
    )


def _noise() -> Claim:
    def classify(percent: int) -> Training:
        return pretrain("cvlp", *CLASSIFICATION, world=f"noise-{percent}")

    arms = {
        "contrast": Arm(about="contrast, which reads no label", trainings=(CVLP, answer("cvlp"))),
        "classification": Arm(
            about="classification, labels as the detector gives them",
            trainings=(pretrain("cvlp", *CLASSIFICATION), answer("cvlp")),
        ),
        "classification, 20 %": Arm(about="a fifth of the labels replaced", trainings=(classify(20), answer("cvlp"))),
        "classification, 40 %": Arm(
            about="two fifths of the labels replaced", trainings=(classify(40), answer("cvlp"))
        ),
    }
    return Claim(
        name="cvlp-noise",
        paper="CVLP",
        section=CVLP_SECTION,
        statement="Noisy labels of regions harm classification, and contrast does without labels.",
        figure=CVLP_FIGURE,
        differs="how many of the detector's labels are replaced in pre-training; fine-tuning is in the world plain",
        arms=arms,
        contrasts={
            # The sum (contrast - classification) at 40 % minus that without noise, in which contrast cancels out
            "what 40 % take away": Contrast(weights={"classification": 1, "classification, 40 %": -1}, size=2),
            "contrast - classification, 40 %": Contrast(weights={"contrast": 1, "classification, 40 %": -1}, size=2),
        },
        worlds={f"noise-{percent}": World(label_noise=percent / 100) for percent in (20, 40)},
        spread=4.9,
        minutes=estimate_minutes(arms),
        note="Contrast reads features alone, and noise changes labels alone: its run is the same in every world, so it "
        "has one arm.",
    )


def _gap() -> Claim:
    sketched = answer("cvlp", world="sketch")
    classified = pretrain("cvlp", *CLASSIFICATION)
    arms = {
        "contrast": Arm(about="contrast; plain drawings throughout", trainings=(CVLP, answer("cvlp"))),
        "classification": Arm(
            about="classification; plain drawings throughout", trainings=(classified, answer("cvlp"))
        ),
        "contrast, sketch": Arm(about="contrast; fine-tuned on pencil sketches", trainings=(CVLP, sketched)),
        "classification, sketch": Arm(
            about="classification; fine-tuned on pencil sketches", trainings=(classified, sketched)
        ),
    }
    gain = {"contrast, sketch": 1.0, "classification, sketch": -1.0, "contrast": -1.0, "classification": 1.0}
    return Claim(
        name="cvlp-gap",
        paper="CVLP",
        section=CVLP_SECTION,
        statement="What contrast is ahead of classification grows with the gap between the domains of pre-training and "
        "task.",
        figure=CVLP_FIGURE,
        differs="what is learnt about regions, and in what style the pictures of the task are drawn",
        arms=arms,
        contrasts={"(contrast - classification) in sketches - in plain drawings": Contrast(weights=gain, size=2)},
        worlds={"sketch": World(scenes={"style": "sketch"})},
        spread=3.5,
        minutes=estimate_minutes(arms),
        note="The detector has seen plain drawings only. Fine-tuned and tested in the same style.",
    )


def _queue() -> Claim:
    short = pretrain("cvlp", f"objective_settings.region_contrast.queue_size={30 * 32 * 6 // 15}")
    arms = {
        "long": Arm(about="5,760 regions of about 60 batches", trainings=(CVLP, answer("cvlp"))),
        "short": Arm(about="384 regions of about 4 batches", trainings=(short, answer("cvlp"))),
    }
    return Claim(
        name="cvlp-queue",
        paper="CVLP",
        section=CVLP_SECTION,
        statement="Contrast with a longer queue of earlier regions is better.",
        figure="ablation not accessible; the release queues 276,480 regions",
        differs="objective_settings.region_contrast.queue_size",
        arms=arms,
        contrasts={"long - short": Contrast(weights={"long": 1, "short": -1}, size=2)},
        spread=1.9,
        minutes=estimate_minutes(arms),
    )


def _collapse() -> Claim:
    deep = ("encoder.num_region_layers=3", "encoder.num_cross_layers=3")
    arms = {
        "without": Arm(
            about="the key network runs all layers",
            trainings=(pretrain("cvlp", *deep, "encoder.key_drop_rate=0.0", updates=EARLY),),
        ),
        "with": Arm(
            about="it skips one layer of each stream half of the time",
            trainings=(pretrain("cvlp", *deep, updates=EARLY),),
        ),
    }
    return Claim(
        name="cvlp-collapse",
        paper="CVLP",
        section=CVLP_SECTION,
        statement="Without skipped layers the contrastive task becomes trivial early.",
        figure="none accessible",
        differs="encoder.key_drop_rate, 0 or 0.5",
        measure=Measure(kind="validation", name="region_contrast_accuracy"),
        arms=arms,
        contrasts={"without - with": Contrast(weights={"without": 1, "with": -1}, size=5)},
        spread=0.3,
        minutes=1.4,  # 12 updates a second with three layers in all streams
        note=f"After {EARLY} updates of a schedule of that length. All streams have three layers, the fewest of which "
        "one can be skipped. In validation no layer is skipped, so that both arms are asked the same.",
    )


TWO_STREAMS: Mapping[str, Claim] = {
    claim.name: claim
    for claim in (
        _data(),
        _classes(),
        _two_streams(),
        _depth(),
        _qa(),
        _qa_sets(),
        _scratch(),
        _vision(),
        _contrast(),
        _noise(),
        _gap(),
        _queue(),
        _collapse(),
    )
}
"""Name -> claim."""
