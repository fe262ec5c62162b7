"""How attention, layer by layer, adds up to what each position took from each other one: rules for one stream and for
two.

A layer is a step. One block is self-attention, within a stream or over both in one sequence; two blocks are the
directions of a cross-attention, which read the same states and are therefore computed from the same matrices. All
rules work on one matrix over all positions, text first; a step changes the rows of its queries.

Source   Chefer, Gur & Wolf 2021, "Generic Attention-model Explainability" (arXiv 2103.15679), section 3; release
         hila-chefer/Transformer-MM-Explainability, `ExplanationGenerator.py` of LXMERT and of VisualBERT. Rollout:
         Abnar & Zuidema 2020 (arXiv 2005.00928).
Differs  A row without relevance is normalised to zeros, where the release divides by zero. The identity that every
         position starts from is kept apart, so that a summary's own position has what the layers add to it, where the
         release sets it to zero. Methods that need layer-wise relevance propagation are not offered.
Letters  B rows, H heads, T and R positions of text and regions with what stands behind them, N = T + R, M and K of a
         block's queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visling.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Variants of the paper and of its release; the defaults are the published method."""

    normalise: bool = True
    """Divide each row of a stream's own relevance by its sum before it weighs a cross-attention (equations 8, 9)."""
    through_streams: bool = True
    """Weigh a cross-attention by the relevance within both streams (equation 10); False = add it as it is."""
    accumulate: bool = True
    """Add to what earlier layers have found; False = replace it, after which some matrices are zero."""
    divide_rows: bool = True
    """In rollout, divide the rows of attention plus identity by their sum. VisualBERT's part of the release does not,
    which doubles the result in each layer."""
    first_layer: str | None = None
    """Begin with this layer, by its name in `Encoded.maps` and in the order of computation; None = all layers."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention as the encoder computed it."""

    layer: str
    queries: slice
    keys: slice
    probs: Tensor
    """(B, H, M, K)."""


@dataclass(frozen=True, slots=True)
class Block:
    """An attention as one weight for each pair of positions."""

    queries: slice
    keys: slice
    weights: Tensor
    """(B, M, K); zeros where a query or a key is padding."""


Step = tuple[Block, ...]
"""A self-attention, or those directions of a cross-attention that the output depends on."""

Found = tuple[Tensor, Tensor]
"""What each position took from each other one (B, N, N), and what each still is of itself because of the residual
connections (B, N)."""

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Probabilities and their gradient (B, H, M, K), both zero at padding, and the number of pairs that are not padding
(B,) -> weights (B, M, K)."""


def mix_positive(probs: Tensor, gradient: Tensor, pairs: Tensor) -> Tensor:
    """Mean over heads of what speaks for the output: the positive part of gradient times attention (equation 5)."""
    return (gradient * probs).clamp(min=0).mean(1)


def mix_negative(probs: Tensor, gradient: Tensor, pairs: Tensor) -> Tensor:
    """What speaks against the output: the same of its negation."""
    return mix_positive(probs, -gradient, pairs)


def mix_evenly(probs: Tensor, gradient: Tensor, pairs: Tensor) -> Tensor:
    """Mean over heads, whatever the gradient."""
    return probs.mean(1)


def mix_by_head(probs: Tensor, gradient: Tensor, pairs: Tensor) -> Tensor:
    """Positive part of the mean over heads, each times its mean gradient (Grad-CAM of attention)."""
    weight = gradient.sum((2, 3)) / pairs.clamp(min=1)[:, None]
    return (probs * weight[:, :, None, None]).mean(1).clamp(min=0)


def list_attention(attention: Mapping[str, Tensor], num_text: int) -> list[Attention]:
    """`Encoded.attention` with the positions that each is over.

    Args:
        num_text: T.
    """
    found = []
    for key, probs in attention.items():
        layer, _, kind = key.rpartition("/")
        rows, columns = probs.shape[2:]
        if kind == "joint":  # layers of a single stream over the text alone end with it
            queries = keys = slice(0, rows)
        else:
            source, _, target = kind.partition("_to_")
            queries = slice(0, rows) if source == "text" else slice(num_text, num_text + rows)
            keys = (
                queries
                if not target
                else slice(0, columns)
                if target == "text"
                else slice(num_text, num_text + columns)
            )
        found.append(Attention(layer, queries, keys, probs))
    return found


def list_steps(
    attention: Sequence[Attention],
    gradients: Sequence[Tensor | None],
    real: Tensor,
    mix: Mix,
    *,
    first_layer: str | None = None,
) -> list[Step]:
    """The layers' attention in the order of computation, as the rules read it.

    Args:
        gradients: of an output with respect to each attention's probabilities; None = the output does not depend on
            it, and it is left out.
        real: (B, N) bool.
        first_layer: see `Rules`.
    Raises:
        ConfigError: no such layer.
    """
    steps: list[Step] = []
    begun, last = first_layer is None, ""
    for one, gradient in zip(attention, gradients, strict=True):
        begun = begun or one.layer == first_layer or one.layer.startswith(f"{first_layer}.")
        if not begun or gradient is None:
            continue
        pairs = real[:, one.queries, None] & real[:, None, one.keys]
        padding = ~pairs[:, None]
        probs, slope = one.probs.detach().masked_fill(padding, 0), gradient.masked_fill(padding, 0)
        block = Block(one.queries, one.keys, mix(probs, slope, pairs.sum((1, 2))))
        if one.queries != one.keys and one.layer == last:
            steps[-1] = (*steps[-1], block)
        else:
            steps.append((block,))
        last = one.layer if one.queries != one.keys else ""
    if not begun:
        names = list(dict.fromkeys(one.layer for one in attention))
        raise ConfigError(f"no layer {first_layer!r} in this model. {nearest(str(first_layer), names)}")
    return steps


def accumulate_relevance(steps: Sequence[Step], real: Tensor, rules: Rules) -> Found:
    """The published rules (equations 6, 7, 10, 11).

    Self-attention A of a stream adds A times the rows of that stream. Cross-attention A from stream s to stream q adds
    N(R_ss)^T A N(R_qq) to R_sq and A R_qs to R_ss, where N divides the rows of what is added to the identity by their
    sum.
    """
    added = _zeros(steps, real)
    for step in steps:
        old, added = added, added.clone()
        for block in step:
            queries, keys, weights = block.queries, block.keys, block.weights
            if queries == keys:
                found = weights @ old[:, queries]
                found[:, :, queries] += weights
                _put(added, queries, slice(None), found, rules)
            else:
                _put(added, queries, keys, _cross(old, block, rules), rules)
                _put(added, queries, queries, weights @ old[:, keys, queries], rules)
    return added, torch.ones_like(added[:, 0])


def _cross(old: Tensor, block: Block, rules: Rules) -> Tensor:
    """What a cross-attention adds between the streams: N(R_ss)^T A N(R_qq)."""
    if not rules.through_streams:
        return block.weights
    own, other = old[:, block.queries, block.queries], old[:, block.keys, block.keys]
    if rules.normalise:
        own, other = _normalise(own), _normalise(other)
    carried = block.weights + block.weights @ other
    return carried + own.transpose(1, 2) @ carried


def _normalise(added: Tensor) -> Tensor:
    """Rows divided by their sum; a row of zeros stays one."""
    total = added.sum(-1, keepdim=True)
    return added / total.masked_fill(total == 0, 1)


def _put(added: Tensor, rows: slice, columns: slice, found: Tensor, rules: Rules) -> None:
    """Add `found` to a part of the matrix, or put it in its place, where the identity is left out of both."""
    if rules.accumulate:
        added[:, rows, columns] += found
        return
    added[:, rows, columns] = found
    if columns in (rows, slice(None)):
        added[:, rows, rows].diagonal(dim1=1, dim2=2).sub_(1)


def roll_out(steps: Sequence[Step], real: Tensor, rules: Rules) -> Found:
    """Attention rollout: the product of the layers' attention plus identity. Between streams, what both had before the
    last cross-attention is joined by it."""
    rolled = _zeros(steps, real)
    rolled.diagonal(dim1=1, dim2=2).fill_(1)
    kept = torch.ones_like(rolled[:, 0])
    for step in steps:
        old, rolled = rolled, rolled.clone()
        for block in step:
            queries, keys, weights = block.queries, block.keys, block.weights
            if queries == keys:
                total = 1 + weights.sum(-1, keepdim=True) if rules.divide_rows else torch.ones_like(weights[:, :, :1])
                before = old[:, queries, queries]
                rolled[:, queries, queries] = (weights @ before + before) / total
                kept[:, queries] /= total[:, :, 0]
            else:
                own, other = old[:, queries, queries], old[:, keys, keys]
                rolled[:, queries, keys] = own.transpose(1, 2) @ weights @ other
    return rolled - torch.diag_embed(kept), kept


def keep_last(steps: Sequence[Step], real: Tensor, rules: Rules) -> Found:
    """The weights of the last layer that has them, for each pair of streams."""
    kept = _zeros(steps, real)
    for step in steps:
        for block in step:
            kept[:, block.queries, block.keys] = block.weights
    return kept, torch.zeros_like(kept[:, 0])


def _zeros(steps: Sequence[Step], real: Tensor) -> Tensor:
    rows, length = real.shape
    dtype = steps[0][0].weights.dtype if steps else torch.float32
    return torch.zeros(rows, length, length, dtype=dtype, device=real.device)
