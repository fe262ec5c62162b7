"""The claims of VisualBERT's and VL-BERT's papers, as runs on drawn scenes."""

from __future__ import annotations

from collections.abc import Mapping

from visling.recipes.claim_configs import Arm, Claim, Contrast, Measure, MeasureKind, Training
from visling.recipes.claim_trainings import answer, estimate_minutes, pretrain

VISUALBERT = pretrain("visualbert")
VLBERT = pretrain("vlbert")
END_TO_END = (
    "train.max_steps=2000",
    "objectives.masked_regions=1.0",
    "region_masking.rate=0.15",
    "region_masking.labels=all",
)
"""Of the runs that compute features while they train. The network starts from random weights: it learns classes within
this time only if they weigh as much as words and are predicted of visible regions, too."""

HEAD_NOTE = (
    "The paper has 12 layers of 12 heads, photographs and the sentences of Flickr30K Entities; here are three layers "
    "of six heads, and captions whose phrases and parses are known from the grammar that wrote them. The paper "
    "compares with the most confident region; here the same model with random weights shows what choosing the best "
    "head gives by itself."
)


def _captions() -> Claim:
    arms = {
        "with": Arm(about="pre-trained on captions, then fine-tuned", trainings=(VISUALBERT, answer("visualbert"))),
        "without": Arm(about="fine-tuned only, from random weights", trainings=(answer("visualbert"),)),
    }
    return Claim(
        name="visualbert-captions",
        paper="VisualBERT",
        section="5.1, task-agnostic pre-training; table of VQA in 4.1",
        statement="Pre-training on captions of images (the COCO phase) is needed.",
        figure="VQA test-dev 70.80 with, 70.18 without; VCR dev Q->AR 52.2 and 47.9; NLVR2 dev (36 regions) 66.7 and "
        "62.9",
        differs="whether the fine-tuning starts from a model that was pre-trained on captions",
        arms=arms,
        contrasts={"with - without": Contrast(weights={"with": 1, "without": -1}, size=2)},
        spread=3.4,
        minutes=estimate_minutes(arms),
        note="In the paper both start from BERT, and both have a task-specific phase of masked words; here both start "
        "from random weights and have none.",
    )


def _early_fusion() -> Claim:
    late = pretrain("visualbert", "encoder.bypass=true")
    arms = {
        "early": Arm(about="words and regions together in all layers", trainings=(VISUALBERT, answer("visualbert"))),
        "late": Arm(about="words alone, one more layer adds the regions", trainings=(late, answer("visualbert"))),
    }
    return Claim(
        name="visualbert-early-fusion",
        paper="VisualBERT",
        section="5.1, early fusion; table of VQA in 4.1",
        statement="Words and regions should interact in all layers of the Transformer, not in one at its end.",
        figure="VQA test-dev 70.80 early, 68.18 late; VCR dev Q->AR 52.2 and 50.6; NLVR2 dev 67.4 and 64.6; Flickr30K "
        "dev R@1 70.40 and 70.33",
        differs="where regions enter: encoder.bypass, in pre-training and, inherited, in fine-tuning",
        arms=arms,
        contrasts={"early - late": Contrast(weights={"early": 1, "late": -1}, size=2)},
        spread=12.1,
        minutes=estimate_minutes(arms),
        note="As in the release, late fusion has one layer more, and regions pass through that one only.",
    )


def _heads(name: str, kind: MeasureKind, statement: str, differs: str, size: float) -> Claim:
    arms = {
        "trained": Arm(about="pre-trained on captions", trainings=(VISUALBERT,)),
        "random": Arm(about="the same model with random weights", trainings=(VISUALBERT,), random_weights=True),
    }
    return Claim(
        name=name,
        paper="VisualBERT",
        section="5.2, dissecting attention weights",
        statement=statement,
        figure="in figures only; those of the later version were not accessible",
        differs=differs,
        measure=Measure(kind=kind),
        arms=arms,
        contrasts={"trained - random": Contrast(weights={"trained": 1, "random": -1}, size=size)},
        spread=2.1,
        minutes=estimate_minutes(arms),
        note=HEAD_NOTE,
    )


def _relation() -> Claim:
    related = pretrain("vlbert", "objectives.matching=1.0", 'corpora=[{kind="single_captions"}]')
    arms = {
        "without": Arm(about="masked words and masked regions", trainings=(VLBERT, answer("vlbert"))),
        "with": Arm(
            about="in addition: does the caption belong to the image, where half do not",
            trainings=(related, answer("vlbert")),
        ),
    }
    return Claim(
        name="vlbert-relation",
        paper="VL-BERT",
        section="3.3 and the ablation of table 4 (recalled)",
        statement="Predicting whether a sentence belongs to an image hurts.",
        figure="recalled, unverified: VQA test-dev 71.1 without, 70.3 with; VCR val Q->A 73.0 and 72.2; RefCOCO+ val "
        "70.7 and 69.5",
        differs="the objective matching at weight 1, and with it that half of the captions are of another image",
        arms=arms,
        contrasts={"without - with": Contrast(weights={"without": 1, "with": -1}, size=2)},
        spread=1.7,
        minutes=estimate_minutes(arms),
        note="Masked words of a wrong caption are predicted all the same, as in the release. Words carry more weight "
        "than regions in both arms (1 to 0.1); all objectives weigh alike in the paper.",
    )


def _one_stream() -> Claim:
    arms = {
        "one": Arm(about="VL-BERT", trainings=(VLBERT, answer("vlbert"))),
        "two": Arm(about="ViLBERT", trainings=(pretrain("vilbert"), answer("vilbert"))),
    }
    return Claim(
        name="vlbert-one-stream",
        paper="VL-BERT",
        section="2 and the comparison with other models on VQA, table 2 (recalled)",
        statement="One stream in which every element attends to every other is enough: two streams are no better.",
        figure="VQA test-dev 71.16 (VL-BERT, base) and 70.55 (ViLBERT)",
        differs="the whole model, each with its own paper's objectives: one stream (VL-BERT) or two (ViLBERT)",
        arms=arms,
        contrasts={"one - two": Contrast(weights={"one": 1, "two": -1}, expected="not below", size=2)},
        spread=1.1,
        minutes=estimate_minutes(arms),
        note="More differs than the streams, as between the papers: ViLBERT has 0.69 million parameters and learns "
        "matching, VL-BERT has 0.40 million and does not. The claim vilbert-two-streams changes the streams alone.",
    )


def _text() -> Claim:
    texted = (pretrain("vlbert", 'corpora=[{kind="captions"}, {kind="text"}]'), answer("vlbert"))
    plain = (VLBERT, answer("vlbert"))
    arms = {
        "with": Arm(about="a batch of text next to each batch of captions", trainings=texted),
        "without": Arm(about="captions alone", trainings=plain),
        "with, all questions": Arm(about="the same run", trainings=texted, measure=Measure()),
        "without, all questions": Arm(about="the same run", trainings=plain, measure=Measure()),
    }
    return Claim(
        name="vlbert-text",
        paper="VL-BERT",
        section="3.3 and the ablation of table 4 (recalled)",
        statement="A corpus of text without images helps with long sentences.",
        figure="recalled, unverified: VCR val Q->A 73.4 with, 73.0 without; QA->R 73.8 and 73.1; VQA test-dev, whose "
        "questions are short, 71.1 and 71.1",
        differs="whether masked words of passages without an image are learnt in addition",
        measure=Measure(fewest_words=10),
        arms=arms,
        contrasts={"with - without": Contrast(weights={"with": 1, "without": -1}, size=2)},
        minutes=6.0,  # an update with passages takes two to three times as long
        note="Long are questions of 10 words or more, a quarter of VQA's test questions; captions have 8 words on "
        "average, passages 38. Passages are captions one after the other, so that the text teaches no new word.",
    )


def _hidden_pixels() -> Claim:
    cut = Training(recipe="vlbert-scenes-e2e", settings=END_TO_END)
    shown = Training(
        recipe="vlbert-scenes-e2e",
        settings=(*END_TO_END, "region_masking.cut_pixels=false", "encoder.masks_features=true"),
    )
    asked = answer("vlbert", end_to_end=True)
    unread = Measure(kind="unread")
    arms = {
        "pixels": Arm(about="hidden regions cut out of the pictures", trainings=(cut, asked)),
        "features": Arm(about="features of hidden regions replaced", trainings=(shown, asked)),
        "pixels, unread": Arm(about="hidden regions named without any text", trainings=(cut,), measure=unread),
        "features, unread": Arm(about="hidden regions named without any text", trainings=(shown,), measure=unread),
    }
    return Claim(
        name="vlbert-hidden-pixels",
        paper="VL-BERT",
        section="3.3, masked RoI classification",
        statement="Features of overlapping regions and of the whole image show what is hidden; cutting it out of the "
        "picture stops this and helps.",
        figure="none given: the paper argues for it",
        differs="what is hidden of a masked region: its feature, or its pixels before features are computed",
        arms=arms,
        contrasts={
            "pixels - features": Contrast(weights={"pixels": 1, "features": -1}, size=2),
            "what features show": Contrast(weights={"features, unread": 1, "pixels, unread": -1}, size=5),
        },
        minutes=estimate_minutes(arms),
        note="The second contrast is how often the class of a hidden region is named when no text helps: more of it is "
        "leakage. The network that computes the features has 0.12 million parameters and starts from random weights; "
        "classes of visible regions are predicted too, from which it learns to see.",
    )


SINGLE_STREAM: Mapping[str, Claim] = {
    claim.name: claim
    for claim in (
        _captions(),
        _early_fusion(),
        _heads(
            "visualbert-heads-ground",
            "heads",
            "Attention heads ground entities in regions without any supervision of it.",
            "whether the weights were trained; measured is the head that is best on other images",
            5,
        ),
        _heads(
            "visualbert-heads-syntax",
            "syntax",
            "Attention heads follow syntax: a word attends to the region of the word that it depends on.",
            "whether the weights were trained; measured is the best head of each relation",
            2,
        ),
        _relation(),
        _one_stream(),
        _text(),
        _hidden_pixels(),
    )
}
"""Name -> claim."""
