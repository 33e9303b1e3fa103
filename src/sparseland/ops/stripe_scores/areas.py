"""Where AnchorAttention's areas lie: key block 0, each group's local keys, and what is between them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv, per_shape

# Thresholds that are tried where a group's stripes don't fit into their list: theta, and LEVELS - 1 below.
LEVELS = 8


def n_groups(n_queries: int, block_size: int, step: int) -> int:
    """Groups of ``step`` query blocks, counted from the call's first query."""
    return cdiv(n_queries, block_size * step)


@per_shape
def local_starts(
    n_queries: int, n_keys: int, block_size: int, step: int, device: torch.device | str = "cpu"
) -> Int[Tensor, " G"]:
    """First local key of each group: where the key block before its first query's begins (int32).

    Stripes of group g are looked for among the keys ``block_size <= j < local_starts[g]``.
    """
    group = torch.arange(n_groups(n_queries, block_size, step), device=device, dtype=torch.int32)
    first_block = (n_keys - n_queries + group * (block_size * step)) // block_size
    return (first_block - 1).clamp(min=0) * block_size


def local_start(group: int, n_queries: int, n_keys: int, block_size: int, step: int) -> int:
    """:func:`local_starts` of one group."""
    first_block = (n_keys - n_queries + group * block_size * step) // block_size
    return max(0, first_block - 1) * block_size


@per_shape
def thresholds(theta: float, device: torch.device | str = "cpu") -> Float[Tensor, " L"]:
    """``theta`` and the smaller ones, evenly down to an eighth of it (in steps of 1 nat at least)."""
    level = torch.arange(LEVELS, device=device, dtype=torch.float32)
    return theta - level * (max(theta, float(LEVELS)) / LEVELS)


def fitting_level(totals: Int[Tensor, "*batch L"], limit: int) -> Int[Tensor, "*batch"]:
    """The first level whose number of stripes is within ``limit``; the last if none is."""
    return (totals > limit).sum(-1).clamp(max=LEVELS - 1)


def usable(anchors: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Anchors with ``-inf`` (keep everything) where NaN or infinite inputs leave nothing to compare with."""
    return torch.where(anchors.isfinite(), anchors, -torch.inf)
