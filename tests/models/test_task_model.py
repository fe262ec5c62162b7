"""An encoder with heads: each reads what its kind needs."""

from __future__ import annotations

import pytest
import torch

from visling import models
from visling.models.task_model import TaskModel
from visling.types import Batch, Head, Regions, Text

HEADS = {
    "answer": Head(kind="classify", outputs=6),
    "choice": Head(kind="score", outputs=1),
    "place": Head(kind="regions", outputs=1),
    "objects": Head(kind="region_targets", outputs=9, options={"classes": 9}),
}


@pytest.mark.parametrize("name", models.names())
def test_every_head_of_a_task_reads_what_its_kind_needs(name: str) -> None:
    encoder = models.build_tiny(name)
    features = models.spec(name).inputs(encoder.config).feature_size
    model = TaskModel(encoder, HEADS, models.head_styles(name), group=2).eval()
    ids = torch.randint(1, 100, (4, 6))
    corners = torch.rand(4, 3, 2) * 0.5
    batch = Batch(
        text=Text(ids=ids, mask=torch.ones(4, 6).bool(), segments=torch.zeros(4, 6).long()),
        regions=Regions(
            features=torch.randn(4, 3, features),
            boxes=torch.cat([corners, corners + 0.3], dim=-1),
            mask=torch.ones(4, 3).bool(),
            size=torch.full((4, 2), 100.0),
        ),
        group=2,
    )
    encoded, logits = encoder(batch), model(batch)
    assert {head: tuple(values.shape) for head, values in logits.items()} == {
        "answer": (4, 6),
        "choice": (2, 2),
        "place": (4, 3 + (encoded.whole is not None)),
        "objects.classes": (4, 3 + (encoded.whole is not None), 9),
    }
    torch.testing.assert_close(logits["answer"], model.heads["answer"](encoded.pooled))
