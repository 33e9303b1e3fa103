"""Blocks over gathered tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.patterns.base import Pattern, cdiv, list_mask, listed


@dataclass(frozen=True)
class PermutedPattern(Pattern):
    """Blocks over gathered tokens, causal by the tokens' own positions: permuted or partitioned attention.

    Query slot i of this pattern holds the query at position ``q_index[..., i]`` (counted like keys: the
    first query is at ``offset``), key slot j the key ``k_index[..., j]``; -1 is an empty slot. A pair is
    computed if its key block is listed for its query block and ``first_key <= key <= query - gap``: pairs
    nearer than ``gap``, and the keys before ``first_key``, are another pattern's.

    Args:
        q_index: ``[b, h, Sq]`` int32, b and h of all tensors 1 or the full size; no query stands twice.
        k_index: ``[b, h, Sk]`` int32; no key stands twice.
        counts: ``[b, h, Mq]`` int32, ``Mq = ceil(Sq / block_size)``.
        indices: ``[b, h, Mq, L]`` int32, distinct key blocks up to the count.
    """

    block_size: int
    q_index: Int[Tensor, "b h Sq"]
    k_index: Int[Tensor, "b h Sk"]
    counts: Int[Tensor, "b h Mq"]
    indices: Int[Tensor, "b h Mq L"]
    gap: int = 0
    first_key: int = 0

    def shape(self) -> tuple[int, int]:
        """Batch and heads that the tensors speak of (1 where all are the same)."""
        tensors = (self.q_index, self.k_index, self.counts, self.indices)
        return max(t.shape[0] for t in tensors), max(t.shape[1] for t in tensors)

    def pairs(self) -> Int[Tensor, "b h"]:
        size, shape = self.block_size, self.shape()
        far = torch.iinfo(torch.int32).max
        # Per query slot the last key it sees (-1: none), per key slot its position (far: none), by blocks.
        limit = torch.where(self.q_index >= 0, self.q_index - self.gap, -1).clamp(min=-1)
        limit = torch.nn.functional.pad(limit, (0, -limit.shape[-1] % size), value=-1)
        limit = torch.unflatten(limit, -1, (-1, size)).expand(*shape, -1, -1).contiguous()
        keys = torch.where((self.k_index >= self.first_key) & (self.k_index >= 0), self.k_index, far)
        keys = torch.nn.functional.pad(keys, (0, -keys.shape[-1] % size), value=far)
        keys = torch.unflatten(keys, -1, (-1, size)).sort(dim=-1).values.expand(*shape, -1, -1)
        held = keys < far
        per_block = torch.stack([keys[..., 0], torch.where(held, keys, -1).amax(-1), held.sum(-1)])
        real_entry = listed(self.counts, self.indices)
        lists = torch.where(real_entry, self.indices.long(), 0).expand(*shape, -1, -1)
        first, last, n_keys = (t[:, :, None].expand(*lists.shape[:3], -1).gather(3, lists) for t in per_block)
        real = limit >= 0
        lowest = torch.where(real, limit, far).amin(-1)[..., None]
        highest = limit.amax(-1)[..., None]
        seen = real_entry & (first <= highest)
        whole = seen & (last <= lowest)
        total = (torch.where(whole, n_keys.long(), 0).sum(-1) * real.sum(-1)).sum(-1)
        # What is cut by causality is counted key by key; few blocks of a row are.
        cut = seen & ~whole
        order = (~cut).to(torch.uint8).argsort(dim=-1, stable=True)
        for place in range(int(cut.sum(-1).max()) if cut.numel() else 0):
            at = order[..., place : place + 1]
            sought = keys.gather(2, lists.gather(3, at).expand(-1, -1, -1, size))
            found = torch.searchsorted(sought, limit, right=True).sum(-1)
            total += torch.where(cut.gather(3, at)[..., 0], found, 0).sum(-1)
        return total

    def mask(self) -> Bool[Tensor, "b h Nq Nk"]:
        size, (batch, heads) = self.block_size, self.shape()
        device, columns = self.counts.device, cdiv(self.k_index.shape[-1], self.block_size)
        blocks = list_mask(self.counts, self.indices, columns)
        rows, keys = self.q_index.long()[..., :, None], self.k_index.long()[..., None, :]
        wide = blocks.repeat_interleave(size, -1)[..., : self.k_index.shape[-1]]
        slots = wide.repeat_interleave(size, -2)[..., : self.q_index.shape[-1], :]
        slots = slots & (rows >= 0) & (keys >= self.first_key) & (keys >= 0) & (keys <= rows - self.gap)
        # From slots to positions: keys first, then queries; empty slots go to a place that is cut off.
        shape = (batch, heads, self.q_index.shape[-1], self.n_keys + 1)
        at = torch.where(keys >= 0, keys, self.n_keys).expand(*shape[:3], -1)
        by_key = torch.zeros(shape, dtype=torch.bool, device=device).scatter_(-1, at, slots.expand(at.shape))
        out = torch.zeros(batch, heads, self.n_queries + 1, self.n_keys, dtype=torch.bool, device=device)
        at = torch.where(rows >= 0, rows - self.offset, self.n_queries).expand(batch, heads, -1, self.n_keys)
        return out.scatter_(2, at, by_key[..., : self.n_keys])[:, :, : self.n_queries]
