"""Attention sinks and a local window: dense attention is the widest of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.patterns.base import Pattern


@dataclass(frozen=True)
class WindowPattern(Pattern):
    """Attention sinks and a local window, no lists: key j if ``j < sinks`` or ``i - j < window``.

    ``window >= n_keys`` is dense causal attention.
    """

    sinks: int = 0
    window: int = 0

    @classmethod
    def dense(cls, n_queries: int, n_keys: int) -> WindowPattern:
        """All causal pairs."""
        return cls(n_queries, n_keys, 0, n_keys)

    def pairs(self) -> Int[Tensor, "1 1"]:
        # Of n keys that a query could see it sees min(n, window + sinks): a ramp, then flat.
        most = self.window + self.sinks

        def up_to(n: int) -> int:
            low = min(n, most)
            return low * (low + 1) // 2 + (n - low) * most

        return torch.tensor([[up_to(self.n_keys) - up_to(self.offset)]])

    def mask(self) -> Bool[Tensor, "1 1 Nq Nk"]:
        rows = torch.arange(self.offset, self.n_keys)[:, None]
        columns = torch.arange(self.n_keys)[None, :]
        near = (rows - columns < self.window) | (columns < self.sinks)
        return (near & self._causal(near.device))[None, None]
