"""All recipes by name: the tables of the modules of this package, joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from visling.recipes import cvlp, lxmert, nlvr, scenes, vilbert, visualbert, vlbert
from visling.recipes.configs import FinetuneConfig, PretrainConfig

PUBLISHED_PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    **visualbert.PRETRAINING,
    **vlbert.PRETRAINING,
    **vilbert.PRETRAINING,
    **lxmert.PRETRAINING,
    **cvlp.PRETRAINING,
}
"""Pre-training of the papers and releases."""

PUBLISHED_FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {**visualbert.FINETUNING}
"""Fine-tuning of the papers and releases."""

PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    **scenes.PRETRAINING,
    **nlvr.PRETRAINING,
    **PUBLISHED_PRETRAINING,
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **scenes.FINETUNING,
    **nlvr.FINETUNING,
    **PUBLISHED_FINETUNING,
}
