"""The objectives of a pre-training config: which exist, how they are built, and which heads they start from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from visling.data.answers import AnswerVocabulary
from visling.errors import ConfigError, nearest
from visling.models import head_styles
from visling.models.base import Encoder
from visling.objectives.base import Objective
from visling.objectives.image_qa import ImageQA
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import MaskedRegions
from visling.objectives.matching import Matching
from visling.objectives.region_contrast import RegionContrast
from visling.pretrained.answers import continue_head
from visling.pretrained.folder import ModelFolder, load_heads
from visling.recipes.configs import PretrainConfig

_OBJECTIVES: Mapping[str, tuple[Callable[..., Objective], str]] = {
    "masked_lm": (MaskedLM, "vocabulary"),
    "matching": (Matching, "matching"),
    "masked_regions": (MaskedRegions, "region_targets"),
    "image_qa": (ImageQA, "classify"),
    "region_contrast": (RegionContrast, "projection"),
}
"""Name -> class, and the kind under which a model names the style of its head."""


def check_objectives(config: PretrainConfig) -> None:
    """Refuse settings of objectives that do not exist.

    Raises:
        ConfigError: names the nearest one that does.
    """
    for name, settings in config.objective_settings.items():
        kind, _ = _OBJECTIVES[name]
        known = [key for key in inspect.signature(kind).parameters if key not in _FROM_RUN]
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"objective {name} has no setting {key!r}. "
                    f"{nearest(key, known) if known else 'It has none: leave it out.'}"
                )


_FROM_RUN = ("dims", "style", "words", "encoder", "key_encoder", "losses")
"""Arguments of objectives that the run supplies itself."""


def build_objectives(
    config: PretrainConfig, encoder: Encoder, answers: AnswerVocabulary | None, key_encoder: Encoder | None = None
) -> dict[str, Objective]:
    """The objectives of a config on an encoder, randomly initialised.

    Args:
        key_encoder: what the key network of region contrast is a copy of; None = the encoder.
    Raises:
        ConfigError: the family has no head for one, or it lacks its settings.
    """
    styles = head_styles(config.model)
    built = {}
    for name in config.objectives:
        kind, head = _OBJECTIVES[name]
        if head not in styles:
            raise ConfigError(
                f"{config.model} has no head for the objective {name}. Leave it out of the recipe's objectives."
            )
        built[name] = kind(
            encoder.dims,
            styles[head],
            encoder.word_embeddings,
            **_collect_settings(config, encoder, name, answers),
            **({"key_encoder": key_encoder} if name == "region_contrast" else {}),
        )
    return built


def init_starts_key_alone(config: PretrainConfig) -> bool:
    """Whether the model that a run starts from is that of the key network, and the trained network starts from random
    weights (CVLP's release)."""
    return config.objective_settings.get("region_contrast", {}).get("key_start") == "init"


def load_objective_heads(
    objectives: Mapping[str, Objective], saved: ModelFolder, encoder: Encoder, answers: AnswerVocabulary | None
) -> list[str]:
    """Load the heads of a pre-trained model into these objectives; returns notes for the log."""
    by_answers = answers is not None and "image_qa" in objectives
    missing = load_heads(
        {name: objective for name, objective in objectives.items() if not (by_answers and name == "image_qa")}, saved
    )
    notes = [f"{saved.path} has no head for {', '.join(missing)}: randomly initialised"] if missing else []
    if answers is not None and by_answers:
        carried = continue_head(objectives["image_qa"], encoder.dims, saved, list(answers))
        notes += [carried or f"{saved.path} has no head for image_qa: randomly initialised"]
    contrast = objectives.get("region_contrast")
    if isinstance(contrast, RegionContrast) and "region_contrast" not in missing:
        contrast.follow_head()
    return notes


def _collect_settings(
    config: PretrainConfig, encoder: Encoder, objective: str, answers: AnswerVocabulary | None
) -> dict[str, Any]:
    """What an objective takes in addition to its head."""
    given = dict(config.objective_settings.get(objective, {}))
    if objective == "masked_regions":
        if config.region_losses is None or config.region_masking is None:
            raise ConfigError(
                "the objective masked_regions needs region_losses and region_masking in the recipe; found none."
            )
        return {"losses": config.region_losses, **given}
    if (
        objective == "image_qa"
        and answers is not None
        and given.setdefault("num_answers", len(answers)) != len(answers)
    ):
        raise ConfigError(
            f"the recipe's image_qa distinguishes {given['num_answers']} answers, but the data's answer table has "
            f"{len(answers)}. Give the table that belongs to it (all_ans.json), or use "
            f"--set objective_settings.image_qa.num_answers={len(answers)}."
        )
    return {"encoder": encoder, **given} if objective == "region_contrast" else given
