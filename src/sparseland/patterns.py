"""Patterns: which query-key pairs to compute. Methods make them, ops consume them, neither knows the other.

All patterns speak of the last ``n_queries`` of ``n_keys`` tokens and are causal: a pair (i, j) counts
only if ``j <= offset + i`` with ``offset = n_keys - n_queries``, whatever the lists say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """Integer division, rounded up."""
    return -(-a // b)


def causal_pairs(n_queries: int, n_keys: int) -> int:
    """Pairs that dense causal attention computes for the last ``n_queries`` of ``n_keys`` tokens."""
    return n_queries * (n_keys - n_queries) + n_queries * (n_queries + 1) // 2


@dataclass(frozen=True)
class Pattern:
    """What all patterns share. ``n_heads`` and ``batch`` may be 1 where a pattern is the same for all."""

    n_queries: int
    n_keys: int

    @property
    def offset(self) -> int:
        """Position of the first query among the keys."""
        return self.n_keys - self.n_queries

    def pairs(self) -> Int[Tensor, "B H"]:
        """Computed causal pairs per batch row and query head (int64)."""
        raise NotImplementedError

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        """The pairs as a dense boolean mask: for tests and pictures, never for computing."""
        raise NotImplementedError

    def density(self) -> Tensor:
        """Computed / total causal pairs, ``[B, H]`` float64."""
        return self.pairs().double() / causal_pairs(self.n_queries, self.n_keys)

    def _causal(self, device: torch.device) -> Bool[Tensor, "Nq Nk"]:
        rows = torch.arange(self.n_queries, device=device)[:, None] + self.offset
        return torch.arange(self.n_keys, device=device)[None, :] <= rows


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
        position = torch.arange(self.offset, self.n_keys) + 1  # keys each query could see
        local = position.clamp(max=self.window)
        sinks = (position - local).clamp(max=self.sinks)
        return (local + sinks).sum().view(1, 1)

    def mask(self) -> Bool[Tensor, "1 1 Nq Nk"]:
        rows = torch.arange(self.offset, self.n_keys)[:, None]
        columns = torch.arange(self.n_keys)[None, :]
        near = (rows - columns < self.window) | (columns < self.sinks)
        return (near & self._causal(near.device))[None, None]


@dataclass(frozen=True)
class BlockPattern(Pattern):
    """Per batch row, query head and query block: a list of key blocks.

    Query block ``i`` holds the queries ``[i * block_size, (i + 1) * block_size)`` of this call; key block
    ``j`` the keys ``[j * block_size, (j + 1) * block_size)`` of the whole cache. ``indices[..., :count]``
    are distinct and ascending; what lies behind ``count`` is never read. A listed block may stick out of
    the causal triangle; its future keys are masked.

    Args:
        counts: ``[B, Hq, Mq]`` int32, ``Mq = ceil(n_queries / block_size)``.
        indices: ``[B, Hq, Mq, L]`` int32.
    """

    block_size: int
    counts: Int[Tensor, "B H Mq"]
    indices: Int[Tensor, "B H Mq L"]

    @classmethod
    def from_block_mask(
        cls, blocks: Bool[Tensor, "B H Mq Mk"], block_size: int, n_queries: int, n_keys: int
    ) -> BlockPattern:
        """Lists from a boolean block mask; blocks wholly in the future are dropped."""
        allowed = visible_blocks(n_queries, n_keys, block_size, blocks.device)
        blocks = blocks & allowed
        counts = blocks.sum(-1, dtype=torch.int32)
        longest = int(counts.max()) if counts.numel() else 0
        # Stable sort of "not listed" puts the listed blocks first, in ascending order.
        order = (~blocks).to(torch.int8).argsort(dim=-1, stable=True)
        return cls(n_queries, n_keys, block_size, counts, order[..., :longest].to(torch.int32).contiguous())

    def block_mask(self) -> Bool[Tensor, "B H Mq Mk"]:
        """The lists as a boolean block mask."""
        columns = cdiv(self.n_keys, self.block_size)
        listed = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        # Padding goes to an extra column that is cut off again.
        target = torch.where(listed, self.indices.long(), columns)
        mask = torch.zeros(*self.counts.shape, columns + 1, dtype=torch.bool, device=self.counts.device)
        return mask.scatter_(-1, target, True)[..., :columns]

    def block_pairs(self) -> Int[Tensor, "Mq Mk"]:
        """Causal pairs inside each block (int64)."""
        return pairs_per_block(self.n_queries, self.n_keys, self.block_size, self.counts.device)

    def pairs(self) -> Int[Tensor, "B H"]:
        # From the lists: a map of all blocks would be quadratic in the length.
        return _sum_over_lists(self, self._listed_pairs)

    def _listed_pairs(
        self, indices: Int[Tensor, "b h m L"], start: Int[Tensor, " m"]
    ) -> Int[Tensor, "*bhmL"]:
        """Causal pairs of each listed block, for query blocks that begin at the positions ``start``."""
        end = (start + self.block_size).clamp(max=self.n_keys)
        first = indices.long() * self.block_size

        def seen_from(key: Tensor) -> Tensor:
            # Pairs of the block's queries with keys at or after ``key``: a sum of consecutive numbers.
            most = (end[:, None] - key).clamp(min=0)
            before = (start[:, None] - key).clamp(min=0)
            return most * (most + 1) - before * (before + 1)

        return (seen_from(first) - seen_from((first + self.block_size).clamp(max=self.n_keys))) // 2

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        wide = self.block_mask().repeat_interleave(self.block_size, -1)[..., : self.n_keys]
        tall = wide.repeat_interleave(self.block_size, -2)[..., : self.n_queries, :]
        return tall & self._causal(tall.device)


@dataclass(frozen=True)
class ColumnPattern(Pattern):
    """Per batch row, query head and query block: a list of single keys (verticals, stripes).

    ``indices[..., :count]`` are distinct, ascending key positions; future keys are masked per query.

    Args:
        counts: ``[B, Hq, Mq]`` int32, ``Mq = ceil(n_queries / block_size)``.
        indices: ``[B, Hq, Mq, L]`` int32.
    """

    block_size: int
    counts: Int[Tensor, "B H Mq"]
    indices: Int[Tensor, "B H Mq L"]

    @classmethod
    def from_column_mask(
        cls, columns: Bool[Tensor, "B H Mq Nk"], block_size: int, n_queries: int, n_keys: int
    ) -> ColumnPattern:
        """Lists from a boolean mask of keys per query block, without those after the block's last query."""
        last = torch.arange(1, columns.shape[-2] + 1, device=columns.device) * block_size - 1
        last = last.clamp(max=n_queries - 1) + (n_keys - n_queries)
        columns = columns & (torch.arange(n_keys, device=columns.device) <= last[:, None])
        counts = columns.sum(-1, dtype=torch.int32)
        longest = int(counts.max()) if counts.numel() else 0
        order = (~columns).to(torch.int8).argsort(dim=-1, stable=True)
        return cls(n_queries, n_keys, block_size, counts, order[..., :longest].to(torch.int32).contiguous())

    def column_mask(self) -> Bool[Tensor, "B H Mq Nk"]:
        """The lists as a boolean mask of keys per query block."""
        listed = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        target = torch.where(listed, self.indices.long(), self.n_keys)
        shape = (*self.counts.shape, self.n_keys + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.counts.device)
        return mask.scatter_(-1, target, True)[..., : self.n_keys]

    def pairs(self) -> Int[Tensor, "B H"]:
        return _sum_over_lists(self, self._listed_pairs)

    def _listed_pairs(
        self, indices: Int[Tensor, "b h m L"], start: Int[Tensor, " m"]
    ) -> Int[Tensor, "*bhmL"]:
        # Query i of a block sees a listed key j if j <= offset + i: count the queries at or below j.
        end = (start + self.block_size).clamp(max=self.n_keys)
        return (end[:, None] - torch.maximum(indices, start[:, None])).clamp(min=0)

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        tall = self.column_mask().repeat_interleave(self.block_size, -2)[..., : self.n_queries, :]
        return tall & self._causal(tall.device)


@dataclass(frozen=True)
class BlockColumnPattern(Pattern):
    """The union of blocks and single columns (MInference's vertical-slash).

    No pair may be in both: :meth:`of` drops the columns that a listed block already covers. The columns'
    block size is the blocks' or a multiple of it: one list of columns can serve several query blocks.
    """

    blocks: BlockPattern
    columns: ColumnPattern

    @classmethod
    def of(cls, blocks: BlockPattern, columns: Bool[Tensor, "B H Nk"]) -> BlockColumnPattern:
        """Blocks, and per head a set of key columns for all queries."""
        covered = blocks.block_mask().repeat_interleave(blocks.block_size, -1)[..., : blocks.n_keys]
        rest = columns[:, :, None, :] & ~covered
        size = blocks.block_size
        lists = ColumnPattern.from_column_mask(rest, size, blocks.n_queries, blocks.n_keys)
        return cls(blocks.n_queries, blocks.n_keys, blocks, lists)

    def pairs(self) -> Int[Tensor, "B H"]:
        return self.blocks.pairs() + self.columns.pairs()

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        return self.blocks.mask() | self.columns.mask()


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
        target = torch.where(self._listed(), self.indices.long(), columns)
        words = self.members.new_zeros(*self.counts.shape, columns + 1)
        words = words.scatter_(-1, target, self.members)[..., :columns]
        bit = torch.arange(self.tile, device=words.device)[:, None]
        far = ((words[..., None, :] >> bit) & 1).bool().flatten(-3, -2)[..., : self.n_queries, :]
        own = (torch.arange(self.n_queries, device=words.device)[:, None] + self.offset) // self.block_size
        block = torch.arange(columns, device=words.device)
        return far | ((block > own - self.window) & (block <= own))

    def pairs(self) -> Int[Tensor, "B H"]:
        listed = torch.where(self._listed(), _ones(self.members), 0)  # each is a whole block in the past
        position = torch.arange(self.offset, self.n_keys, device=self.counts.device)
        start = (position // self.block_size - self.window + 1).clamp(min=0) * self.block_size
        pairs = listed.sum((-1, -2)) * self.block_size + (position - start + 1).sum()
        return pairs.repeat_interleave(self.group, 1)

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        wide = self.token_mask().repeat_interleave(self.block_size, -1)[..., : self.n_keys]
        return (wide & self._causal(wide.device)).repeat_interleave(self.group, 1)

    def _listed(self) -> Bool[Tensor, "B Hl T L"]:
        return torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]


def token_words(blocks: Bool[Tensor, "*B Nq Mk"], tile: int) -> Int[Tensor, "*B T Mk"]:
    """One int32 per tile of queries and key block: bit ``t`` is what query ``t`` of the tile says."""
    short = -blocks.shape[-2] % tile
    tiles = torch.nn.functional.pad(blocks, (0, 0, 0, short)).unflatten(-2, (-1, tile))
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


# Entries of lists that are looked at together when pairs are counted.
_COUNTED = 1 << 24


def unexpanded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with batch and head dimensions of 1 where all of them only repeat one entry (stride 0)."""
    for dim in (0, 1):
        if all(t.shape[dim] == 1 or t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors)
    return tensors


def _sum_over_lists(
    pattern: BlockPattern | ColumnPattern, pairs: Callable[[Tensor, Tensor], Tensor]
) -> Int[Tensor, "B H"]:
    """Pairs of all listed entries, some query blocks at a time; ``pairs`` gives each entry's."""
    counts, indices = unexpanded(pattern.counts, pattern.indices)
    start = torch.arange(counts.shape[-1], device=counts.device) * pattern.block_size + pattern.offset
    place = torch.arange(indices.shape[-1], device=counts.device)
    total = torch.zeros(counts.shape[:2], dtype=torch.int64, device=counts.device)
    step = max(1, _COUNTED // max(1, counts.shape[0] * counts.shape[1] * indices.shape[-1]))
    for i in range(0, counts.shape[-1], step):
        part = slice(i, i + step)
        listed = place < counts[:, :, part, None]
        total += (pairs(indices[:, :, part], start[part]) * listed).sum((-1, -2))
    return total.expand(pattern.counts.shape[:2])


def visible_blocks(
    n_queries: int, n_keys: int, block_size: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "Mq Mk"]:
    """Blocks that hold at least one causal pair."""
    last = torch.arange(1, cdiv(n_queries, block_size) + 1, device=device) * block_size - 1
    last = last.clamp(max=n_queries - 1) + (n_keys - n_queries)
    first_key = torch.arange(cdiv(n_keys, block_size), device=device) * block_size
    return first_key[None, :] <= last[:, None]


def pairs_per_block(
    n_queries: int, n_keys: int, block_size: int, device: torch.device | str = "cpu"
) -> Int[Tensor, "Mq Mk"]:
    """Causal pairs in each block, by closed form (int64)."""
    offset = n_keys - n_queries
    # f(i, j) = pairs among the queries < i and keys < j; blocks are its second difference.
    i = (torch.arange(cdiv(n_queries, block_size) + 1, device=device) * block_size).clamp(max=n_queries)
    j = (torch.arange(cdiv(n_keys, block_size) + 1, device=device) * block_size).clamp(max=n_keys)
    i, j = i[:, None], j[None, :]
    # Query r sees min(offset + r + 1, j) of the keys < j: a ramp up to row j - offset - 1, then flat.
    ramp = (j - offset - 1).clamp(min=0).minimum(i)
    started = (j > offset).long()
    f = started * (ramp * (offset + 1) + ramp * (ramp - 1) // 2 + (i - ramp) * j) + (1 - started) * i * j
    return f[1:, 1:] - f[:-1, 1:] - f[1:, :-1] + f[:-1, :-1]
