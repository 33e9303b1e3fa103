"""Lists of key blocks per query token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.patterns.base import Pattern, cdiv, listed


@dataclass(frozen=True)
class TokenBlockPattern(Pattern):
    """Per query token: the last ``window`` key blocks, and a list of key blocks before those.

    Key block ``j`` holds the keys ``[j * block_size, (j + 1) * block_size)``; a query's own block is that of
    its position, so the window begins at a block's edge: it sees block ``j`` if ``own - window < j <= own``
    (causal inside). The lists of ``tile`` neighbouring queries, which mostly agree, are kept as their union
    and a word per entry: bit ``t`` of ``members`` says that the tile's query ``t`` lists the block.
    ``indices[..., :count]`` are distinct and ascending; what lies behind ``count`` is never read. A query
    lists no block of its window and none in its future.

    Query head ``h`` follows list ``h // group``: lists are per key head, or finer.

    Args:
        window: blocks up to and including the query's own, 1 or more.
        tile: queries that share a list, 1 to 32.
        group: query heads per list.
        counts: ``[B, H / group, T]`` int32, ``T = ceil(n_queries / tile)``.
        indices, members: ``[B, H / group, T, L]`` int32.
    """

    block_size: int
    window: int
    tile: int
    group: int
    counts: Int[Tensor, "B Hl T"]
    indices: Int[Tensor, "B Hl T L"]
    members: Int[Tensor, "B Hl T L"]

    @classmethod
    def from_token_mask(
        cls,
        blocks: Bool[Tensor, "B Hl Nq Mk"],
        block_size: int,
        window: int,
        tile: int,
        group: int,
        n_keys: int,
    ) -> TokenBlockPattern:
        """Lists from a boolean mask of key blocks per query; blocks of the window or later are dropped."""
        n_queries = blocks.shape[-2]
        own = torch.arange(n_keys - n_queries, n_keys, device=blocks.device) // block_size
        before = torch.arange(blocks.shape[-1], device=blocks.device) <= own[:, None] - window
        words = token_words(blocks & before, tile)
        counts, indices, members = word_lists(words, int((words != 0).sum(-1).max()) if words.numel() else 0)
        return cls(n_queries, n_keys, block_size, window, tile, group, counts, indices, members)

    def token_mask(self) -> Bool[Tensor, "B Hl Nq Mk"]:
        """The key blocks of each query as a boolean mask, window included."""
        columns = cdiv(self.n_keys, self.block_size)
        target = torch.where(listed(self.counts, self.indices), self.indices.long(), columns)
        words = self.members.new_zeros(*self.counts.shape, columns + 1)
        words = words.scatter_(-1, target, self.members)[..., :columns]
        bit = torch.arange(self.tile, device=words.device)[:, None]
        far = ((words[..., None, :] >> bit) & 1).bool().flatten(-3, -2)[..., : self.n_queries, :]
        own = (torch.arange(self.n_queries, device=words.device)[:, None] + self.offset) // self.block_size
        block = torch.arange(columns, device=words.device)
        return far | ((block > own - self.window) & (block <= own))

    def pairs(self) -> Int[Tensor, "B H"]:
        # Each is a whole block in the past.
        blocks = torch.where(listed(self.counts, self.indices), _ones(self.members), 0)
        position = torch.arange(self.offset, self.n_keys, device=self.counts.device)
        start = (position // self.block_size - self.window + 1).clamp(min=0) * self.block_size
        pairs = blocks.sum((-1, -2)) * self.block_size + (position - start + 1).sum()
        return pairs.repeat_interleave(self.group, 1)

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        wide = self.token_mask().repeat_interleave(self.block_size, -1)[..., : self.n_keys]
        return (wide & self._causal(wide.device)).repeat_interleave(self.group, 1)


def token_words(blocks: Bool[Tensor, "*B Nq Mk"], tile: int) -> Int[Tensor, "*B T Mk"]:
    """One int32 per tile of queries and key block: bit ``t`` is what query ``t`` of the tile says."""
    short = -blocks.shape[-2] % tile
    tiles = torch.unflatten(torch.nn.functional.pad(blocks, (0, 0, 0, short)), -2, (-1, tile))
    words = torch.zeros_like(tiles[..., 0, :], dtype=torch.int32)
    for t in range(tile):
        words |= tiles[..., t, :].to(torch.int32) << t
    return words


def word_lists(
    words: Int[Tensor, "*B T Mk"], longest: int
) -> tuple[Int[Tensor, "*B T"], Int[Tensor, "*B T L"], Int[Tensor, "*B T L"]]:
    """Counts, ascending columns and values of the words that are not 0: at most ``longest`` in a row."""
    taken = words != 0
    place = torch.where(taken, taken.cumsum(-1) - 1, longest)  # the rest goes to a place that is cut off
    column = torch.arange(words.shape[-1], dtype=torch.int32, device=words.device).expand_as(words)
    shape = (*words.shape[:-1], longest + 1)
    indices = words.new_zeros(shape).scatter_(-1, place, column)[..., :longest]
    members = words.new_zeros(shape).scatter_(-1, place, words)[..., :longest]
    return taken.sum(-1, dtype=torch.int32), indices.contiguous(), members.contiguous()


def _ones(words: Int[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """Bits that are set in each int32 word."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24) & 0xFF
