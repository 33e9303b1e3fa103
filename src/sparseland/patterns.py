"""Patterns: which query-key pairs to compute. Methods make them, ops consume them, neither knows the other.

All patterns speak of the last ``n_queries`` of ``n_keys`` tokens and are causal: a pair (i, j) counts
only if ``j <= offset + i`` with ``offset = n_keys - n_queries``, whatever the lists say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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
        pairs = self.pairs().double()
        # By a tensor: a GPU divides by a number by multiplying with its rounded inverse, and all is not 1.
        return pairs / torch.full_like(pairs, causal_pairs(self.n_queries, self.n_keys))

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


@dataclass(frozen=True)
class BlockPattern(Pattern):
    """Per batch row, query head and query block: a list of key blocks.

    Query block ``i`` holds the queries ``[i * block_size, (i + 1) * block_size)`` of this call; key block
    ``j`` the keys ``[j * block_size, (j + 1) * block_size)`` of the whole cache. ``indices[..., :count]``
    are distinct and ascending; what lies behind ``count`` is never read. A listed block may stick out of
    the causal triangle (its future keys are masked), but none lies wholly outside.

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
        """Lists from a boolean block mask; blocks wholly in the future are dropped.

        On a GPU the lists' length is that of all key blocks: the longest is not asked for.
        """
        # What makes lists is an op; patterns know ops only here, where they are made from masks.
        from sparseland.ops.block_lists import block_lists

        (few,) = unexpanded(blocks)
        counts, indices = block_lists(n_queries, n_keys, block_size, mask=few)
        shape = blocks.shape[:2]
        counts, indices = counts.expand(*shape, -1), indices.expand(*shape, -1, -1)
        return cls(n_queries, n_keys, block_size, counts, indices)

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
        counts, indices = unexpanded(self.counts, self.indices)
        if not indices.shape[-1]:
            return torch.zeros(self.counts.shape[:2], dtype=torch.int64, device=counts.device)
        size = self.block_size
        start = torch.arange(counts.shape[-1], device=counts.device)[:, None] * size + self.offset
        end = (start + size).clamp(max=self.n_keys)
        # Blocks ascend and none is wholly in the future, so at most the last two are cut by the diagonal (or
        # by the end of the keys).
        place = counts[..., None] - torch.arange(1, 3, device=counts.device)
        first = indices.gather(-1, place.clamp(min=0)).long() * size
        lost = (end - start) * size - pairs_from(first, start, end)
        lost += pairs_from((first + size).clamp(max=self.n_keys), start, end)
        whole = (counts * ((end - start) * size)[:, 0]).sum(-1)
        total = whole - (lost * (place >= 0)).sum((-1, -2))
        return total.expand(self.counts.shape[:2])

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
        cls,
        columns: Bool[Tensor, "B H Mq Nk"],
        block_size: int,
        n_queries: int,
        n_keys: int,
        cap: int | None = None,
    ) -> ColumnPattern:
        """Lists from a boolean mask of keys per query block, without those after the block's last query.

        ``cap`` is the longest list there can be, if that is known; what does not fit is dropped. On a GPU it
        is the lists' length (all keys unless given): the longest is not asked for.
        """
        from sparseland.ops.block_lists import block_lists

        (few,) = unexpanded(columns)
        counts, indices = block_lists(n_queries, n_keys, block_size, mask=few, unit=1, cap=cap)
        shape = columns.shape[:2]
        counts, indices = counts.expand(*shape, -1), indices.expand(*shape, -1, -1)
        return cls(n_queries, n_keys, block_size, counts, indices)

    def column_mask(self) -> Bool[Tensor, "B H Mq Nk"]:
        """The lists as a boolean mask of keys per query block."""
        listed = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        target = torch.where(listed, self.indices.long(), self.n_keys)
        shape = (*self.counts.shape, self.n_keys + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.counts.device)
        return mask.scatter_(-1, target, True)[..., : self.n_keys]

    def pairs(self) -> Int[Tensor, "B H"]:
        from sparseland.ops.block_lists import list_pairs

        counts, indices = unexpanded(self.counts, self.indices)
        pairs = list_pairs(counts, indices, self.n_queries, self.n_keys, self.block_size, 1)
        return pairs.expand(self.counts.shape[:2])

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
    def of(
        cls, blocks: BlockPattern, columns: Bool[Tensor, "B H Nk"], cap: int | None = None
    ) -> BlockColumnPattern:
        """Blocks, and per head a set of key columns for all queries (at most ``cap``, if that is known)."""
        from sparseland.ops.block_lists import block_lists, column_lists

        n_queries, n_keys, size = blocks.n_queries, blocks.n_keys, blocks.block_size
        # As the list of one query that stands at the end.
        counts, places = block_lists(1, n_keys, 1, mask=columns[:, :, None], unit=1, cap=cap)
        lists = column_lists(
            places[:, :, 0], counts[:, :, 0], n_queries, n_keys, size, mask=blocks.block_mask()
        )
        return cls(n_queries, n_keys, blocks, ColumnPattern(n_queries, n_keys, size, *lists))

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


@dataclass(frozen=True)
class PiecedPattern(Pattern):
    """A pattern that is made a stretch of queries at a time: all its lists at once would fill the memory.

    Computing and counting each make the lists anew, and drop them again.

    Args:
        make: called with ``(start, stop)``, gives the pattern of the queries ``[start, stop)`` of this call:
            ``stop - start`` queries, and keys up to the last of them, ``offset + stop``.
        stops: where the stretches end; the last is ``n_queries``.
    """

    make: Callable[[int, int], Pattern]
    stops: tuple[int, ...]

    def pieces(self) -> Iterator[tuple[slice, Pattern]]:
        """The queries of each stretch, and their pattern, made now."""
        start = 0
        for stop in self.stops:
            yield slice(start, stop), self.make(start, stop)
            start = stop

    def pairs(self) -> Int[Tensor, "B H"]:
        return torch.stack([pattern.pairs() for _, pattern in self.pieces()]).sum(0)

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        masks = [pattern.mask() for _, pattern in self.pieces()]
        return torch.cat([torch.nn.functional.pad(m, (0, self.n_keys - m.shape[-1])) for m in masks], -2)


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
        listed = torch.arange(self.indices.shape[-1], device=keys.device) < self.counts[..., None]
        lists = torch.where(listed, self.indices.long(), 0).expand(*shape, -1, -1)
        first, last, n_keys = (t[:, :, None].expand(*lists.shape[:3], -1).gather(3, lists) for t in per_block)
        real = limit >= 0
        lowest = torch.where(real, limit, far).amin(-1)[..., None]
        highest = limit.amax(-1)[..., None]
        seen = listed & (first <= highest)
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
        listed = torch.arange(self.indices.shape[-1], device=device) < self.counts[..., None]
        target = torch.where(listed, self.indices.long(), columns)
        blocks = torch.zeros(*target.shape[:3], columns + 1, dtype=torch.bool, device=device)
        blocks = blocks.scatter_(-1, target, True)[..., :columns]
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


@dataclass(frozen=True)
class Part:
    """Some heads' pairs: a pattern, or a function that makes it when it is needed.

    Args:
        heads: the query heads that the pattern's head dimension stands for; None: all.
    """

    heads: tuple[int, ...] | None
    source: Pattern | Callable[[], Pattern]

    def pattern(self) -> Pattern:
        """The pattern, made now if it has to be."""
        return self.source if isinstance(self.source, Pattern) else self.source()


@dataclass(frozen=True)
class PartsPattern(Pattern):
    """The union of parts that have no pair in common, each for some of the heads.

    Args:
        batch: rows.
        heads: query heads of the whole.
        parts: their attention is merged per query by its log-sum-exp.
    """

    batch: int
    heads: int
    parts: tuple[Part, ...]

    def pairs(self) -> Int[Tensor, "B H"]:
        total: Tensor | None = None
        for part in self.parts:
            pairs = part.pattern().pairs()
            if total is None:
                total = torch.zeros(self.batch, self.heads, dtype=torch.int64, device=pairs.device)
            at = list(range(self.heads)) if part.heads is None else list(part.heads)
            total[:, at] += pairs.to(total.device).expand(self.batch, len(at))
        assert total is not None
        return total

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        shape = (self.batch, self.heads, self.n_queries, self.n_keys)
        total: Tensor | None = None
        for part in self.parts:
            mask = part.pattern().mask()
            if total is None:
                total = torch.zeros(shape, dtype=torch.bool, device=mask.device)
            at = list(range(self.heads)) if part.heads is None else list(part.heads)
            total[:, at] |= mask.to(total.device)
        assert total is not None
        return total


# Lists of one call that may exist at once.
_LIST_BYTES = 1 << 30


def in_pieces(
    make: Callable[[int, int], Pattern], n_queries: int, n_keys: int, block_size: int, row_bytes: int
) -> Pattern:
    """``make(0, n_queries)``, or a :class:`PiecedPattern` where that would take too much memory.

    Args:
        make: as of :class:`PiecedPattern`; it is called with multiples of ``block_size`` (or the end).
        n_queries: queries, the last of the keys.
        n_keys: keys.
        block_size: queries per query block.
        row_bytes: memory of one query block, of all batch rows and heads.
    """
    step = max(1, _LIST_BYTES // max(1, row_bytes)) * block_size
    if step >= n_queries:
        return make(0, n_queries)
    stops = (*range(step, n_queries, step), n_queries)
    return PiecedPattern(n_queries, n_keys, make, stops)


def unexpanded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with batch and head dimensions of 1 where all of them only repeat one entry (stride 0)."""
    for dim in (0, 1):
        if all(t.shape[dim] == 1 or t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors)
    return tensors


def pairs_from(
    key: Int[Tensor, "*any"], start: Int[Tensor, "*any"], end: Int[Tensor, "*any"]
) -> Int[Tensor, "*any"]:
    """Causal pairs of the queries in [start, end) with keys from ``key`` on: sums of consecutive numbers."""
    most, before = (end - key).clamp(min=0), (start - key).clamp(min=0)
    return (most * (most + 1) - before * (before + 1)) // 2


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
