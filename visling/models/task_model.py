"""An encoder with the heads of a task, and the network that computes its region features, if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from visling.models.base import Encoder
from visling.nn import heads as heads_module
from visling.nn.extraction import extract_features
from visling.types import Batch, Encoded, Head, Loss


@dataclass(frozen=True, kw_only=True)
class SavedHead:
    """A head as a converted model folder describes it."""

    part: str
    """Its name in the key maps of the family."""
    head: Head
    style: str
    group: int = 1
    """Rows per example."""

    def build(self, encoder: Encoder) -> nn.Module:
        """The head on an encoder, randomly initialised."""
        return heads_module.build(
            self.head, encoder.dims, style=self.style, words=encoder.word_embeddings, group=self.group
        )


class TaskModel(nn.Module):
    """An encoder with the heads of one task.

    Args:
        heads: heads of the task by name.
        group: rows per example, which its heads see together.
        styles: head kind -> style of the family.
        saved: heads of another style or size, by name.
        extractor: a `FeatureExtractor` that was or is trained jointly; None = the features of the batch.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: Mapping[str, Head],
        styles: Mapping[str, str],
        *,
        group: int = 1,
        saved: Mapping[str, SavedHead] | None = None,
        extractor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.extractor = extractor
        self.kinds = {name: head.kind for name, head in heads.items()}
        saved = saved or {}
        self.heads = nn.ModuleDict(
            {
                name: saved[name].build(encoder)
                if name in saved
                else heads_module.build(
                    head, encoder.dims, style=styles[head.kind], words=encoder.word_embeddings, group=group
                )
                for name, head in heads.items()
            }
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Logits by head name, or by head.target for a head of several targets; shapes in `nn.heads`."""
        return self.respond(batch)[0]

    def respond(self, batch: Batch) -> tuple[dict[str, Tensor], Loss | None]:
        """The logits, and the extractor's own loss, if it has one."""
        batch, own = extract_features(self.extractor, batch)
        return self.read(self.encoder(batch), batch), own

    def read(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """The heads' logits of a batch that the encoder has encoded."""
        logits: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            logits |= heads_module.flatten(name, heads_module.read(self.kinds[name], head, encoded, batch))
        return logits
