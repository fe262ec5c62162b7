"""An encoder with the heads of a task, and the network that computes its region features, if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from visling.errors import ConfigError
from visling.models.base import WHOLE, Encoder
from visling.nn import heads as heads_module
from visling.nn.extraction import count_extracted, extract_features
from visling.types import NOTHING, Batch, Encoded, Head, Loss, Reads


@dataclass(frozen=True, kw_only=True)
class SavedHead:
    """A head as a model folder describes it, where its style or size is not that of the family's main layout."""

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
        return self.read(self.encoder(batch, reads=self.reads_of_encoded(batch)), batch), own

    def count_extracted(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the terms of the extractor's own loss divide by, by name."""
        return count_extracted(self.extractor, batch)

    @property
    def shows_whole(self) -> bool:
        """Whether logits of regions have that of the whole image behind them."""
        return WHOLE in self.encoder.behind_regions

    def reads_of_encoded(self, batch: Batch) -> Reads:
        """What the heads read of the encoded batch."""
        reads = NOTHING
        for kind in self.kinds.values():
            reads |= heads_module.reads_of_encoded(kind, batch)
        return reads

    def read(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """The heads' logits of a batch that the encoder has encoded."""
        logits: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            logits |= heads_module.flatten(name, heads_module.read(self.kinds[name], head, encoded, batch))
        return logits


class JointModel(nn.Module):
    """An encoder with the heads of several tasks; tasks that name a head alike share it.

    Args:
        tasks: name -> the task's heads by their own names, and rows per example.
        names: task -> its head -> the head's name in this model.
        styles: head kind -> style of the family.
    Raises:
        ConfigError: two tasks that share a head want different ones.
    """

    def __init__(
        self,
        encoder: Encoder,
        tasks: Mapping[str, tuple[Mapping[str, Head], int]],
        names: Mapping[str, Mapping[str, str]],
        styles: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict()
        self._of_task: dict[str, TaskModel] = {}
        wanted: dict[str, tuple[str, Head]] = {}
        for task, (heads, group) in tasks.items():
            model = TaskModel(encoder, heads, styles, group=group)
            for own, head in heads.items():
                name = names[task][own]
                first, known = wanted.setdefault(name, (task, head))
                if head != known:
                    raise ConfigError(
                        f"the tasks {first} and {task} cannot share the head {name}: one is {known.kind} of "
                        f"{known.outputs} outputs, the other {head.kind} of {head.outputs}. Give one of them another "
                        f"name: --set tasks.{task}.shares=OTHER."
                    )
                if name in self.heads:
                    model.heads[own] = self.heads[name]
                else:
                    self.heads[name] = model.heads[own]
            self._of_task[task] = model

    def of_task(self, name: str) -> TaskModel:
        """The encoder with the heads of one task: the same modules."""
        return self._of_task[name]
