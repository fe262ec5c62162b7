"""The runs of the papers' claims on drawn scenes. Claims share those that are equal, so each is written once, here."""

from __future__ import annotations

from collections.abc import Mapping

from visling.recipes.claim_configs import PLAIN, Arm, Training

UPDATES: Mapping[str, int] = {
    "visualbert": 3000,
    "vlbert": 3000,
    "vilbert-baseline": 3000,
    "vilbert": 3000,
    "lxmert": 4000,
    "cvlp": 2000,
}
"""Family -> of a pre-training. The models learn which word belongs to which region somewhere between 700 and 2,000
updates, LXMERT later; runs that stop before that show who came first, and differ by ten points between seeds."""
QUESTIONS = 4000
"""On which VQA is fine-tuned, of the 20,000 of the world `plain`."""
EPOCHS = 5
STATEMENTS = 1200
"""On which NLVR2 is fine-tuned: all that the world `plain` has."""
BATCH = 32
"""Of all recipes on scenes."""
POINTING = RANKING = 600
"""Updates of fine-tuning on referring expressions (2,130 of them) and retrieval (10,000 captions)."""
UPDATES_PER_SECOND: Mapping[str, float] = {
    "visualbert": 48.0,
    "vlbert": 42.0,
    "vilbert-baseline": 33.0,
    "vilbert": 33.0,
    "lxmert": 25.0,
    "cvlp": 18.0,
}
"""Family -> of its recipe on scenes, measured on one core of an AMD EPYC on 2026-11-30; the baseline's is a guess."""
COSTS: Mapping[str, float] = {"-nlvr2-": 2.0, "-retrieval-": 4.0, "-e2e": 7.0}
"""Part of a recipe's name -> how many times as long its updates take: two images and four captions an example;
VL-BERT's end-to-end fine-tuning (docs/results/runs/vlbert-end-to-end.json)."""


def pretrain(family: str, *settings: str, world: str = PLAIN, updates: int | None = None) -> Training:
    """A family's pre-training on captions, of `UPDATES` unless a number is given."""
    length = f"train.max_steps={updates or UPDATES[family]}"
    return Training(recipe=f"{family}-scenes", settings=(length, *settings), world=world)


def answer(family: str, *settings: str, world: str = PLAIN, end_to_end: bool = False) -> Training:
    """Fine-tuning on VQA."""
    length = (f"train_limit={QUESTIONS}", f"train.epochs={EPOCHS}")
    recipe = f"{family}-vqa-scenes{'-e2e' if end_to_end else ''}"
    return Training(recipe=recipe, settings=(*length, *settings), world=world)


def point(family: str) -> Training:
    """Fine-tuning on referring expressions."""
    return Training(recipe=f"{family}-referring-scenes", settings=(f"train.max_steps={POINTING}",))


def rank(family: str) -> Training:
    """Fine-tuning on caption retrieval."""
    return Training(recipe=f"{family}-retrieval-scenes", settings=(f"train.max_steps={RANKING}",))


def judge(family: str) -> Training:
    """Fine-tuning on NLVR2, whose statements are too few for fewer epochs."""
    return Training(recipe=f"{family}-nlvr2-scenes", settings=(f"train_limit={STATEMENTS}", "train.epochs=20"))


def estimate_minutes(arms: Mapping[str, Arm]) -> float:
    """Minutes of one seed on one core: all updates of all different runs, at the rate of their family."""
    runs = {arm.trainings[: count + 1] for arm in arms.values() for count in range(len(arm.trainings))}
    return round(sum(_estimate_seconds(run[-1]) for run in runs) / 60, 1)


def _estimate_seconds(training: Training) -> float:
    values = dict(setting.split("=", 1) for setting in training.settings)
    if "train.max_steps" in values:
        updates = float(values["train.max_steps"])
    else:
        updates = int(values["train_limit"]) * int(values["train.epochs"]) / BATCH
    family = max((name for name in UPDATES_PER_SECOND if training.recipe.startswith(f"{name}-")), key=len)
    cost = next((factor for part, factor in COSTS.items() if part in training.recipe), 1.0)
    return updates * cost / UPDATES_PER_SECOND[family]
