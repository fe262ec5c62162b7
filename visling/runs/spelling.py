"""What a run says of words that its vocabulary does not know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visling.data.batches.examples import Source
from visling.data.spelling import Spelling, count_spelled_examples
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.runs.inputs import Inputs

MANY = 0.1
"""Share of the words of the training text that a vocabulary may spell out before the log says so."""

BERT = "bert-base-uncased"


class SpelledWords:
    """Words of the training text that a run's vocabulary does not know.

    Args:
        sources: training examples.
        start: model that the run starts from, whose vocabulary it has.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        inputs: Inputs,
        sources: Sequence[Source],
        start: Path | None,
    ) -> None:
        self.config, self.start = config, start
        self.found: Spelling = count_spelled_examples(sources, inputs.layout)

    def note(self) -> list[str]:
        """For the log: how many there are, which, and how to mend it; nothing if they are few."""
        found, vocabulary = self.found, self.config.encoder.vocabulary
        if found.share <= MANY:
            return []
        if vocabulary == BERT:
            mend = "List them in a vocabulary of your own: --set encoder.vocabulary=FILE."
        elif self.start is not None:
            mend = f"{self.start} was trained with this vocabulary: start from a model that has BERT's."
        else:
            mend = f"Use --set encoder.vocabulary={BERT}, or the recipe {self.config.model}-small."
        return [
            f"{found.share:.0%} of the words of the training text are not in the vocabulary {vocabulary} and are "
            "spelled out letter by letter, so that little is learned of them; most often: "
            f"{', '.join(found.commonest())}. {mend}"
        ]

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {"spelled_out": {"share": round(self.found.share, 4), "most_often": self.found.commonest()}}
