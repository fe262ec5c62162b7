"""Region contrast: recognise, among the regions of earlier batches, the embedding that a momentum copy of the encoder
gives to the same region unmasked (CVLP).

Letters  B rows, R regions, N real regions of the batch, Dr region width, E embedding width, K queued embeddings.
Source   CVLP (arXiv 2007.13135) and its release, whose pre-training script an earlier commit holds. The query network
         reads masked regions, the key network the same text and the clean regions; every region counts, hidden or not,
         of a fitting caption or not. Embeddings are normalised; cosines over 0.07 are bounded by 10 tanh(x / 10)
         (release only; the paper has the plain softmax); cross-entropy against the queue, mean over all regions. The
         negatives are earlier batches only; the loss is zero until the queue is full.
Differs  With several processes each reads the whole queue, of all processes, which receives the keys of an update in
         the order of its examples: it is the same row for row, however the update is divided. The release splits the
         queue among its devices. What the key network skips is drawn once per update, alike everywhere, not once per
         device. The word table, tied to the vocabulary head, follows once per update; the release moves it twice.
         Heads that the key network never uses do not follow.
Cost     The scores against the queue (9216 x 276480 at the release's sizes, 10 GB) are never held at once: they are
         computed, used and freed in blocks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from visling import runtime
from visling.errors import ConfigError
from visling.nn.heads import build
from visling.nn.momentum import DrawsPath, HasMomentumCopy, MomentumCopy, RingQueue, from_all_processes
from visling.nn.packing import Packing
from visling.objectives.base import Objective, PretrainStep
from visling.types import NOTHING, Batch, Dims, Head, Loss, Reads, Targets

REGIONS = dataclasses.replace(NOTHING, regions=None)
"""What contrast reads of both networks' states: every region."""

BLOCK = 2**24
"""Scores that exist at one time; two arrays of this size (64 MB each in float32) are the loss's working memory."""


class RegionContrast(Objective):
    """Cross-entropy of each region's own key among the keys of earlier batches.

    Forward in training keeps the batch's keys; `after_update` lets the key network follow and then puts them into the
    queue. In evaluation the queue is read and left as it is.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"region_features"})

    pushed: Tensor
    """() int64: updates whose keys the queue has received, those that filled it included."""

    def __init__(
        self,
        dims: Dims,
        style: str,
        words: nn.Embedding,
        *,
        encoder: nn.Module,
        projection_size: int = 128,
        momentum: float = 0.99995,
        temperature: float = 0.07,
        clip: float | None = 10.0,
        queue_size: int = 276_480,
        half_queue: bool = False,
        max_regions: int = 36,
        key_start: Literal["query", "init"] = "query",
        independent_heads: bool = False,
        key_encoder: nn.Module | None = None,
    ) -> None:
        """Copy the encoder as it is now: load its weights before.

        Args:
            encoder: the query network. It still belongs to its owner: it is neither saved nor optimised through this
                objective.
            projection_size: E.
            momentum: of the key network.
            temperature: divides the cosines.
            clip: bound c of the scores, c tanh(score / c); None = none (paper).
            queue_size: K. Release: 30 batches of 256 images of 36 regions.
            half_queue: keep the queue in half precision, 71 MB instead of 141 at the release's sizes.
            max_regions: most regions of an example; read only when several processes pad their keys to one size.
            key_start: what the key network is a copy of at first: the query network (paper), or the model that `--init`
                names, while the query network starts from random weights (release: BERT's text weights).
            independent_heads: let the two projection heads start from different random weights (release), or from the
                same (paper).
            key_encoder: that model, with `key_start` "init"; None = the query network all the same.
        """
        super().__init__(dims, style, words)
        if temperature <= 0 or (clip is not None and clip <= 0):
            raise ConfigError(
                f"temperature and clip must be positive; found {temperature} and {clip}. "
                "For scores without a bound use clip = None."
            )
        if key_start not in ("query", "init"):
            raise ConfigError(f"key_start must be query or init; found {key_start!r}.")
        kind = Head(kind="projection", outputs=projection_size)
        self.head = build(kind, dims, style=style)
        first = encoder if key_encoder is None else key_encoder
        self.key = (
            first.momentum_copy(momentum)
            if isinstance(first, HasMomentumCopy)
            else MomentumCopy(copy.deepcopy(first), momentum=momentum)
        )
        key_head = build(kind, dims, style=style) if independent_heads else copy.deepcopy(self.head)
        self.key_head = MomentumCopy(key_head, momentum=momentum)
        self.queue = RingQueue(queue_size, projection_size, dtype=torch.float16 if half_queue else torch.float32)
        self.temperature, self.clip, self.max_regions = temperature, clip, max_regions
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self._number: int | None = 0
        self.register_load_state_dict_post_hook(_forget_number)  # type: ignore[no-untyped-call]
        self._encoder = (encoder,)  # in a tuple: one owner, one entry in files and optimisers
        self._waiting: list[tuple[Tensor, Tensor]] = []
        """Keys (N, S, E) of a micro-batch's examples and which are real (N, S), S regions of all rows of an example."""

    def reads_of_encoded(self, batch: Batch, targets: Targets) -> Reads:
        return REGIONS

    def forward(self, step: PretrainStep) -> Loss:
        self.check(step.targets)
        mask = _region_mask(step.batch, step.encoded.regions)  # (B, R)
        keys = self.keys(step.batch, step.targets)  # (B, R, E)
        if self.training:
            self._waiting.append(_by_example(keys, mask, step.batch.group))
        rows = _pack_regions(step.batch, mask)
        embeddings = _normalised(self.head(rows.pack(step.encoded.regions)))  # (N, E)
        real = rows.pack(mask)  # (N,)
        if not self.queue.full:
            return _zero_loss(embeddings, real)
        values, hits = contrast(
            embeddings, rows.pack(keys), self.queue.rows, temperature=self.temperature, clip=self.clip
        )  # (N,), (N,)
        loss = Loss.mean("region_contrast", values, real)
        return loss.reporting({"region_contrast_accuracy": ((hits & real).sum(), real.sum())})

    def count(self, batch: Batch, targets: Targets) -> Mapping[str, Tensor]:
        if batch.regions is None or not self.queue.full:
            return {"region_contrast": torch.zeros((), dtype=torch.int64, device=batch.text.ids.device)}
        return {"region_contrast": _region_mask(batch, batch.regions.mask).sum()}

    def after_update(self) -> None:
        """The key network follows the query network; the keys of the update's batches, computed before, join the
        queue."""
        self.key.update(self._encoder[0])
        self.key_head.update(self.head)
        self._push_waiting()

    def after_skip(self) -> None:
        """The keys of the update's batches join nothing."""
        self._waiting = []

    def follow_head(self) -> None:
        """Make the key head equal to the head, after weights were loaded into that; at the release's momentum it would
        take 20,000 updates."""
        self.key_head.network.load_state_dict(self.head.state_dict())

    def fill(self, *items: tuple[Batch, Targets]) -> None:
        """Put the keys of the micro-batches of an update into the queue and do nothing else. The release uses its first
        30 batches so, before anything is optimised."""
        for batch, targets in items:
            self.check(targets)
            keys = self.keys(batch, targets)
            self._waiting.append(_by_example(keys, _region_mask(batch, keys), batch.group))
        self._push_waiting()

    @torch.no_grad()
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def keys(self, batch: Batch, targets: Targets) -> Tensor:
        """Normalised embeddings (B, R, E) of the clean regions by the key network, with the text as it is; zeros at
        padding."""
        if isinstance(self.key.network, DrawsPath):
            self.key.network.draw_path(self._count_pushed())
        encoded = self.key(_clean(batch, cast(Tensor, targets.region_features)), reads=REGIONS)
        rows = _pack_regions(batch, _region_mask(batch, encoded.regions))
        return rows.unpack(_normalised(self.key_head(rows.pack(encoded.regions))))

    def _count_pushed(self) -> int:
        """`pushed`, read from the device once."""
        if self._number is None:
            self._number = int(self.pushed)
        return self._number

    def _push_waiting(self) -> None:
        """Queue the keys of the update's micro-batches on all processes in the order of its examples, of which
        micro-batch m of process r has every (processes x micro-batches)-th, from number r + processes x m on."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        rows, regions = (max(mask.shape[dim] for _, mask in waiting) for dim in (0, 1))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if regions > self.max_regions:
                raise ConfigError(
                    f"a batch has {regions} regions an image, more than the {self.max_regions} of region contrast. "
                    "Raise max_regions."
                )
            regions = self.max_regions
        spare = [(0, regions - mask.shape[1], 0, rows - len(mask)) for _, mask in waiting]
        keys = [F.pad(each, (0, 0, *missing)) for (each, _), missing in zip(waiting, spare, strict=True)]
        masks = [F.pad(each, missing) for (_, each), missing in zip(waiting, spare, strict=True)]
        self.queue.push(_in_order(torch.stack(keys)), _in_order(torch.stack(masks)))
        self.pushed.add_(1)
        if self._number is not None:
            self._number += 1


def _forget_number(objective: nn.Module, _: Any) -> None:
    """A loaded objective may be further than the one that it replaces."""
    assert isinstance(objective, RegionContrast)
    objective._number = None


def _by_example(keys: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Keys (B, R, E) and mask (B, R) of rows, those of the rows of an example one behind the other."""
    shape = len(keys) // group, group * keys.shape[1]
    return keys.reshape(*shape, keys.shape[2]), mask.reshape(shape)


def _in_order(values: Tensor) -> Tensor:
    """Values (M, N, S, ...) of this process's M micro-batches -> (N * M * processes * S, ...): those of all processes,
    in the order of the examples."""
    everywhere = from_all_processes(values).reshape(runtime.world_size(), *values.shape)  # (processes, M, N, S, ...)
    return everywhere.movedim((2, 1, 0), (0, 1, 2)).flatten(0, 3)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def contrast(
    queries: Tensor, keys: Tensor, negatives: Tensor, *, temperature: float, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's own key against all negatives, and whether its key scores above them all.

    Args:
        queries: (N, E), normalised; the only argument that gets a gradient.
        keys: (N, E), normalised.
        negatives: (K, E), normalised, of any floating type; K > 0.
        temperature: divides the dot products.
        clip: bound c of the scores, c tanh(score / c); None = none.
    Returns:
        (N,) float32 and (N,) bool.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = queries.float(), keys.detach().float()
        own = (queries * keys).sum(-1) / temperature  # (N,)
        if clip is not None:
            own = clip * torch.tanh(own / clip)
        others, best = _Others.apply(queries, negatives.detach(), temperature, clip)  # type: ignore[no-untyped-call]
        return torch.logaddexp(own, others) - own, own.detach() > best


class _Others(torch.autograd.Function):
    """Log of the summed exponentials of a query's scores against all negatives, and the highest of them, in blocks of
    negatives.

    One pass: the gradient of a query, the mean of the negatives under the softmax, is accumulated together with the
    sum, both relative to the highest score so far (Milakov & Gimelshein 2018, as in fused attention), so that backward
    only multiplies.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, negatives: Tensor, temperature: float, clip: float | None
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        best = queries.new_full((len(queries), 1), -torch.inf)
        total = torch.zeros_like(best)
        pull = torch.zeros_like(queries)
        size = max(1, BLOCK // max(len(queries), 1))
        for start in range(0, len(negatives), size):
            block = negatives[start : start + size].to(queries.dtype)
            scores = (queries / temperature) @ block.T  # (N, C)
            if clip is not None:
                scores = scores.div_(clip).tanh_()
            weights = scores * clip if clip is not None else scores
            higher = torch.maximum(best, weights.amax(1, keepdim=True))
            weights = weights.sub_(higher).exp_()
            rescale = (best - higher).exp_()
            total = total * rescale + weights.sum(1, keepdim=True)
            if wanted:
                if clip is not None:
                    weights.mul_(scores.square_().neg_().add_(1))  # slope of the bound
                pull = pull.mul_(rescale).addmm_(weights, block)
            best = higher
        ctx.save_for_backward(pull.div_(total).div_(temperature) if wanted else None)
        highest = best.squeeze(1)
        ctx.mark_non_differentiable(highest)
        return (total.log() + best).squeeze(1), highest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (pull,) = ctx.saved_tensors
        return grad[:, None] * pull, None, None, None


def _clean(batch: Batch, features: Tensor) -> Batch:
    """The batch with unmasked features (B, R, F)."""
    regions = batch.regions
    if regions is None:
        return batch
    if regions.row is not None:
        row = regions.row
        own = dataclasses.replace(regions, row=None, count=regions.shared, shared=None)
        regions = own.map(lambda tensor: tensor[row])
    return dataclasses.replace(batch, regions=dataclasses.replace(regions, features=features, hidden=None))


def _region_mask(batch: Batch, like: Tensor) -> Tensor:
    """(B, R) bool: the real regions of each row."""
    regions = batch.regions
    if regions is None:
        return torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
    return regions.mask if regions.row is None else regions.mask[regions.row]


def _pack_regions(batch: Batch, mask: Tensor) -> Packing:
    """Where the real regions of the rows lie, of `_region_mask`."""
    regions = batch.regions
    return Packing.of(mask, None if regions is None or regions.row is not None else regions.count)


def _normalised(embeddings: Tensor) -> Tensor:
    """Of length 1, in float32."""
    return F.normalize(embeddings.float(), dim=-1)


def _zero_loss(embeddings: Tensor, mask: Tensor) -> Loss:
    """No loss yet, with gradients of zero, so that processes and accumulated steps agree on what has a gradient."""
    none = torch.zeros_like(mask)
    loss = Loss.mean("region_contrast", embeddings.sum(-1), none)
    return loss.reporting({"region_contrast_accuracy": (none.sum(), none.sum())})
