"""The keys that are alive for some query of a block: what the CPU path and the plain backward gather."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.ops.interval_attention.reference import visible


@dataclass(frozen=True)
class Living:
    """One query block's keys.

    Args:
        rows: the block's queries.
        keys: ``[B, Hkv, L]`` ascending; behind a head's last key stands Nk - 1, hidden by ``mask``.
        mask: ``[B, Hkv, R, L]`` which query sees which key.
    """

    rows: slice
    keys: Int[Tensor, "B Hkv L"]
    mask: Bool[Tensor, "B Hkv R L"]


def living_keys(ends: Int[Tensor, "B Hkv Nk"], n_queries: int, block: int) -> Iterator[Living]:
    """The living keys of each block of ``block`` queries; heads with fewer are padded to the longest."""
    n_keys = ends.shape[2]
    offset = n_keys - n_queries
    key = torch.arange(n_keys, device=ends.device)
    lives = ends > key
    for start in range(0, n_queries, block):
        stop = min(start + block, n_queries)
        last = offset + stop  # keys from here on are in every query's future
        alive = (lives & (ends > offset + start))[..., :last]
        rank = alive.cumsum(-1)
        longest = int(rank[..., -1].max()) if rank.numel() else 0
        # Everything that is not alive is written to one extra place that is cut off again.
        place = torch.where(alive, rank - 1, longest)
        keys = torch.full((*ends.shape[:2], longest + 1), n_keys - 1, device=ends.device)
        keys = keys.scatter_(-1, place, key[:last].expand_as(place))[..., :longest]
        listed = torch.arange(longest, device=ends.device) < rank[..., -1:]
        mask = visible(ends.gather(-1, keys), key[offset + start : last], keys)
        yield Living(slice(start, stop), keys, mask & listed[..., None, :])
