"""Keys that live for one interval of queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.patterns.base import Pattern


@dataclass(frozen=True)
class IntervalPattern(Pattern):
    """Each key lives for one interval of queries, ``j <= i < ends[j]``, and may carry a bias for its logits.

    Both are per key head; the ``group`` query heads of a key head share them. The bias is part of the
    attention (gradients flow through it), not of the pattern's pairs.

    Args:
        ends: ``[B, Hkv, Nk]`` positions, Nk or more: never; ``<= j``: not seen by anyone.
        bias: ``[B, Hkv, Nk]``, added to the scaled logits; None adds nothing.
        group: query heads per key head.
        most: keys that a query sees at most, if known.
    """

    ends: Int[Tensor, "B Hkv Nk"]
    bias: Float[Tensor, "B Hkv Nk"] | None = None
    group: int = 1
    most: int | None = None

    def pairs(self) -> Int[Tensor, "B H"]:
        first = torch.arange(self.n_keys, device=self.ends.device).clamp(min=self.offset)
        seen_by = (self.ends.long().clamp(max=self.n_keys) - first).clamp(min=0)
        return seen_by.sum(-1).repeat_interleave(self.group, 1)

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        i = torch.arange(self.offset, self.n_keys, device=self.ends.device)[:, None]
        alive = (i < self.ends[:, :, None]) & self._causal(self.ends.device)
        return alive.repeat_interleave(self.group, 1)


@dataclass(frozen=True)
class BlockLocalPattern(Pattern):
    """The keys of a query's own block, of ``look_back`` blocks before it, and the first ``sinks``."""

    block: int
    look_back: int = 0
    sinks: int = 0

    def ends(self, device: torch.device | str = "cpu") -> Int[Tensor, "1 1 Nk"]:
        """The position from which on each key is no longer seen (for :class:`IntervalPattern`)."""
        j = torch.arange(self.n_keys, device=device)
        ends = ((j // self.block + 1 + self.look_back) * self.block).clamp(max=self.n_keys)
        return torch.where(j < self.sinks, self.n_keys, ends)[None, None]

    def pairs(self) -> Int[Tensor, "1 1"]:
        i = torch.arange(self.offset, self.n_keys)
        low = ((i // self.block - self.look_back) * self.block).clamp(min=0)
        return (i + 1 - low + low.clamp(max=self.sinks)).sum().view(1, 1)

    def mask(self) -> Bool[Tensor, "1 1 Nq Nk"]:
        return IntervalPattern(self.n_queries, self.n_keys, self.ends()).mask()
