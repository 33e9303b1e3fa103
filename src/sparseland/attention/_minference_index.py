"""MInference's online part: from one prompt's queries and keys to blocks and columns, all heads at once.

Terms: a *vertical* is a key column that all queries see, a *slash* is a diagonal (a fixed distance
``o = i - j``). Slashes are computed in whole 64x64 blocks on the grid of the keys, verticals as single
columns wherever no block covers them already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.attention._minference_heads import HeadShape
from sparseland.method import AttentionInputs
from sparseland.ops.block_scores import pooled_scores, probe_vertical_slash
from sparseland.patterns import (
    BlockColumnPattern,
    BlockPattern,
    ColumnPattern,
    Pattern,
    cdiv,
    pairs_per_block,
    visible_blocks,
)

BLOCK = 64
PROBE = 64  # the last queries, whose attention stands for the whole prompt's
SINKS = 30  # columns that every vertical-slash head takes
LOCAL = 100  # diagonals that it takes first
MIN_VERTICAL = 30
MIN_SLASH = 50


@dataclass(frozen=True)
class Sizes:
    """The shapes of one layer's heads as tensors ``[H]``, so that no step loops over heads.

    An A-shape is a vertical-slash head whose columns and diagonals are the first ones (``fixed``); a
    block-sparse head has no columns and no diagonals.
    """

    fixed: Bool[Tensor, " H"]
    vertical: Int[Tensor, " H"]
    slash: Int[Tensor, " H"]
    blocks: Int[Tensor, " H"]
    most_verticals: int
    most_slashes: int
    most_blocks: int
    dynamic: bool

    @classmethod
    def of(cls, heads: Sequence[HeadShape], n_keys: int, device: torch.device) -> Sizes:
        """Sizes for ``n_keys`` tokens, with the floors that the method always applies."""
        rows = []
        for head in heads:
            vertical, slash = min(head.vertical, n_keys), min(head.slash, n_keys)
            if head.shape == "vertical-slash":
                vertical, slash = min(n_keys, max(vertical, MIN_VERTICAL)), min(n_keys, max(slash, MIN_SLASH))
            elif head.shape == "a-shape":
                slash = max(slash, 1)  # a query sees itself
            rows.append((vertical, slash, max(head.blocks, 1) if head.shape == "block-sparse" else 0))
        vertical, slash, blocks = torch.tensor(rows).T.to(device)
        fixed = torch.tensor([head.shape == "a-shape" for head in heads], device=device)
        most = [max(column) for column in zip(*rows, strict=True)]
        dynamic = any(head.shape == "vertical-slash" for head in heads)
        return cls(fixed, vertical, slash, blocks, most[0], most[1], most[2], dynamic)


class LayerIndex:
    """What one layer's inputs say about which keys matter; estimates are made when first needed."""

    def __init__(self, x: AttentionInputs) -> None:
        self.x = x
        self.batch, self.heads, self.n_queries = x.q.shape[:3]
        self.n_keys = x.k.shape[2]
        self.device = x.q.device
        self.rows, self.columns = cdiv(self.n_queries, BLOCK), cdiv(self.n_keys, BLOCK)
        last = torch.arange(1, self.rows + 1, device=self.device) * BLOCK - 1
        self.last_query = last.clamp(max=self.n_queries - 1) + x.offset

    # ------------------------------------------------------- estimates

    @cached_property
    def _ranked(self) -> tuple[Int[Tensor, "B H Nk"], Int[Tensor, "B H Nk"]]:
        """Columns and diagonals, best first, by the probe's attention (forced ones first of all)."""
        vertical, slash = probe_vertical_slash(self.x.q, self.x.k, PROBE, self.x.scale)
        vertical[..., :SINKS] = torch.inf
        slash[..., :LOCAL] = torch.inf
        # The sort is stable: among the forced diagonals the nearest come first, so that a budget below
        # 100 keeps offset 0, without which a query would not see itself.
        return (
            vertical.sort(dim=-1, descending=True, stable=True).indices,
            slash.sort(dim=-1, descending=True, stable=True).indices,
        )

    def _order(self, which: int, sizes: Sizes, count: int) -> Int[Tensor, "B H n"]:
        """The first ``count`` columns (0) or diagonals (1) of each head."""
        natural = torch.arange(count, device=self.device)
        if not sizes.dynamic:
            return natural.expand(self.batch, self.heads, -1)
        return torch.where(sizes.fixed[:, None], natural, self._ranked[which][..., :count])

    @cached_property
    def _block_order(self) -> Int[Tensor, "B H Mq Mk"]:
        """Key blocks per query block, by the product of mean query and mean key, best first."""
        scores: Tensor = pooled_scores(self.x.q, self.x.k, BLOCK, self.x.scale)
        return scores.argsort(dim=-1, descending=True, stable=True)

    @cached_property
    def _diagonal(self) -> Bool[Tensor, "Mq Mk"]:
        """Blocks that hold a query's own key."""
        first = torch.arange(self.rows, device=self.device) * BLOCK + self.x.offset
        column = torch.arange(self.columns, device=self.device)
        return (column >= (first // BLOCK)[:, None]) & (column <= (self.last_query // BLOCK)[:, None])

    # ----------------------------------------------------------- masks

    def slash_blocks(self, sizes: Sizes) -> Bool[Tensor, "B H Mq Mk"]:
        """All blocks that a chosen diagonal touches.

        Query block r starts at position ``64 R + m`` with ``R = r + offset // 64`` and ``m = offset % 64``.
        Diagonal o meets there the keys ``64 R - t ... 64 R - t + 63`` with ``t = o - m``, which lie in the
        key blocks ``R - ceil(t / 64)`` and ``R - floor(t / 64)``: the mask depends on R - c only.
        """
        order = self._order(1, sizes, sizes.most_slashes)
        unused = self.columns + 2
        chosen = torch.arange(order.shape[-1], device=self.device) < sizes.slash[:, None]
        t = order - self.x.offset % BLOCK
        shape = (self.batch, self.heads, self.columns + 3)
        bands = torch.zeros(shape, dtype=torch.bool, device=self.device)
        low = torch.div(t, BLOCK, rounding_mode="floor")
        for band in (low, low + (t % BLOCK > 0)):
            # Shifted by one: a chunk that starts inside a block reaches one block right of R.
            bands.scatter_(-1, torch.where(chosen, band + 1, unused), True)
        bands[..., unused] = False
        row = torch.arange(self.rows, device=self.device) + self.x.offset // BLOCK
        distance = row[:, None] - torch.arange(self.columns, device=self.device) + 1
        return bands[..., torch.where(distance >= 0, distance, unused)]

    def block_mask(self, sizes: Sizes) -> Bool[Tensor, "B H Mq Mk"]:
        """Blocks of all heads: what slashes touch, and the block-sparse heads' own."""
        mask = self.slash_blocks(sizes) if sizes.most_slashes else None
        if sizes.most_blocks:
            order = self._block_order
            taken = torch.arange(self.columns, device=self.device) < sizes.blocks[:, None, None]
            top = torch.zeros(order.shape, dtype=torch.bool, device=self.device)
            top.scatter_(-1, order, taken.expand(order.shape))
            # Without its own block, a query of a poorly ranked row might see no key at all.
            top |= self._diagonal & (sizes.blocks > 0)[:, None, None]
            mask = top if mask is None else mask | top
        assert mask is not None
        return mask & visible_blocks(self.n_queries, self.n_keys, BLOCK, self.device)

    def _verticals(self, sizes: Sizes) -> Int[Tensor, "B H V"]:
        """Each head's columns, ascending; ``n_keys`` fills the rest."""
        order = self._order(0, sizes, sizes.most_verticals)
        chosen = torch.arange(order.shape[-1], device=self.device) < sizes.vertical[:, None]
        return torch.where(chosen, order, self.n_keys).sort(dim=-1).values

    # ---------------------------------------------------------- results

    def pattern(self, sizes: Sizes) -> Pattern:
        """The pairs to compute."""
        mask = self.block_mask(sizes)
        blocks = BlockPattern.from_block_mask(mask, BLOCK, self.n_queries, self.n_keys)
        if not sizes.most_verticals:
            return blocks
        top = self._verticals(sizes)[:, :, None]
        shape = (self.batch, self.heads, self.rows, top.shape[-1])
        block = (top // BLOCK).clamp(max=self.columns - 1).expand(shape)
        keep = ~mask.gather(-1, block) & (top <= self.last_query[:, None])
        counts = keep.sum(-1, dtype=torch.int32)
        longest = int(counts.max())
        indices = torch.zeros(*shape[:3], longest, dtype=torch.int32, device=self.device)
        listed = torch.arange(longest, device=self.device) < counts[..., None]
        # Both masks are read in the same order, so each row's columns land in its own list, ascending.
        indices.masked_scatter_(listed, top.to(torch.int32).expand(shape).masked_select(keep))
        columns = ColumnPattern(self.n_queries, self.n_keys, BLOCK, counts, indices)
        return BlockColumnPattern(self.n_queries, self.n_keys, blocks, columns)

    def pairs(self, sizes: Sizes) -> Int[Tensor, "B H"]:
        """What :meth:`pattern` would compute, counted without building lists."""
        mask = self.block_mask(sizes)
        pairs = (mask * pairs_per_block(self.n_queries, self.n_keys, BLOCK, self.device)).sum((-1, -2))
        if not sizes.most_verticals:
            return pairs
        top = self._verticals(sizes)
        block = torch.where(top < self.n_keys, top // BLOCK, self.columns)
        per_block = torch.zeros(
            self.batch, self.heads, self.columns + 1, dtype=torch.int64, device=self.device
        )
        per_block.scatter_add_(-1, block, torch.ones_like(block))
        # The diagonal's blocks are always listed, so every query of the row sees a column outside a block.
        height = torch.full((self.rows,), BLOCK, device=self.device)
        height[-1] = self.n_queries - (self.rows - 1) * BLOCK
        visible = visible_blocks(self.n_queries, self.n_keys, BLOCK, self.device)
        outside = (visible & ~mask) * height[:, None]
        return pairs + (outside * per_block[..., None, : self.columns]).sum((-1, -2))
