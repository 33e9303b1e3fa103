"""Lists of key blocks, of single keys, and their union, per query head and block of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.patterns.base import Pattern, cdiv, list_mask, pairs_from, pairs_per_block, unexpanded


def _lists(
    mask: Bool[Tensor, "B H Mq n"], block_size: int, n_queries: int, n_keys: int, **options: Any
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """Counts and indices of a mask; made once where batch rows or heads only repeat one entry."""
    # What makes lists is an op; patterns know ops only where they are made from masks, or counted.
    from sparseland.ops.block_lists import block_lists

    (few,) = unexpanded(mask)
    counts, indices = block_lists(n_queries, n_keys, block_size, mask=few, **options)
    return counts.expand(*mask.shape[:2], -1), indices.expand(*mask.shape[:2], -1, -1)


def _list_pairs(
    counts: Int[Tensor, "B H Mq"], indices: Int[Tensor, "B H Mq L"], of: Pattern, block_size: int, unit: int
) -> Int[Tensor, "B H"]:
    """Causal pairs of lists whose entries stand for ``unit`` keys."""
    from sparseland.ops.block_lists import list_pairs

    return list_pairs(counts, indices, of.n_queries, of.n_keys, block_size, unit)


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
        return cls(n_queries, n_keys, block_size, *_lists(blocks, block_size, n_queries, n_keys))

    def block_mask(self) -> Bool[Tensor, "B H Mq Mk"]:
        """The lists as a boolean block mask."""
        return list_mask(self.counts, self.indices, cdiv(self.n_keys, self.block_size))

    def block_pairs(self) -> Int[Tensor, "Mq Mk"]:
        """Causal pairs inside each block (int64)."""
        return pairs_per_block(self.n_queries, self.n_keys, self.block_size, self.counts.device)

    def pairs(self) -> Int[Tensor, "B H"]:
        counts, indices = unexpanded(self.counts, self.indices)
        if not indices.shape[-1]:
            return torch.zeros(self.counts.shape[:2], dtype=torch.int64, device=counts.device)
        size = self.block_size
        if counts.is_cuda:
            # Reading all lists is one launch, looking at their ends alone a dozen.
            return _list_pairs(counts, indices, self, size, size).expand(self.counts.shape[:2])
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
        lists = _lists(columns, block_size, n_queries, n_keys, unit=1, cap=cap)
        return cls(n_queries, n_keys, block_size, *lists)

    def column_mask(self) -> Bool[Tensor, "B H Mq Nk"]:
        """The lists as a boolean mask of keys per query block."""
        return list_mask(self.counts, self.indices, self.n_keys)

    def pairs(self) -> Int[Tensor, "B H"]:
        counts, indices = unexpanded(self.counts, self.indices)
        return _list_pairs(counts, indices, self, self.block_size, 1).expand(self.counts.shape[:2])

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
