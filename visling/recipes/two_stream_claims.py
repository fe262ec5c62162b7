"""The claims of ViLBERT's, LXMERT's and CVLP's papers, as runs on drawn scenes."""

from __future__ import annotations

from collections.abc import Mapping

from visling.recipes.claim_configs import Arm, Claim, Contrast, Measure, Training, World
from visling.recipes.claim_trainings import answer, estimate_minutes, judge, pretrain

VILBERT = pretrain("vilbert")
LXMERT = pretrain("lxmert")
CVLP = pretrain("cvlp")
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
        spread=3.3,
        minutes=estimate_minutes(arms),
        note="All pre-trainings have equally many updates, so that fewer captions are seen more often. Whether the "
        "paper's smaller sets also meant fewer updates is unknown. The spread is that of 4,530 updates and 2,000 "
        "questions.",
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
        section="3.1, masked multi-modal modelling",
        statement="Of masked regions the distribution over classes is a better target than the feature.",
        figure="none given: the paper argues that language names classes and cannot tell features",
        differs="what is predicted of masked regions: region_losses, the release's visual_target 0 or 1",
        arms=arms,
        contrasts={"classes - features": Contrast(weights={"classes": 1, "features": -1}, size=2)},
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
        minutes=estimate_minutes(arms),
        note="The paper's baseline is BERT base and has fewer parameters than ViLBERT; here 0.63 and 0.69 million.",
    )


def _qa() -> Claim:
    unasked = pretrain("lxmert", "objectives={masked_lm=1.0, matching=0.1, masked_regions=0.05}")
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
        minutes=estimate_minutes(arms),
        note="Masked regions weigh 0.05, words 1; the paper weighs both alike.",
    )


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
        minutes=estimate_minutes(arms),
        note="Contrast reads features alone, and noise changes labels alone: its run is the same in every world, so it "
        "has one arm.",
    )


TWO_STREAMS: Mapping[str, Claim] = {
    claim.name: claim for claim in (_data(), _classes(), _two_streams(), _qa(), _vision(), _contrast(), _noise())
}
"""Name -> claim."""
