"""MInference's online part: from one prompt's queries and keys to blocks and columns, all heads at once.

Terms: a *vertical* is a key column that all queries see, a *slash* is a diagonal (a fixed distance
``o = i - j``). Slashes are computed in whole 64x64 blocks on the grid of the keys, verticals as single
columns wherever no block covers them already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.attention._head_shapes import HeadShape
from sparseland.attention._lazy import lazy
from sparseland.method import AttentionInputs
from sparseland.ops.block_lists import block_lists, column_lists
from sparseland.ops.block_lists.fast import band_mask
from sparseland.ops.block_scores import mean_pool, pooled_map, probe_sums
from sparseland.ops.top_values import top_mask
from sparseland.patterns import (
    BlockColumnPattern,
    BlockPattern,
    ColumnPattern,
    Pattern,
    cdiv,
    in_pieces,
    pairs_per_block,
    per_shape,
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
    some_fixed: bool

    @classmethod
    def of(cls, heads: Sequence[HeadShape], n_keys: int, device: torch.device) -> Sizes:
        """Sizes for ``n_keys`` tokens, with the floors that the method always applies."""
        return _sizes(tuple(heads), n_keys, device)


@per_shape
def _sizes(heads: tuple[HeadShape, ...], n_keys: int, device: torch.device) -> Sizes:
    rows = []
    for head in heads:
        vertical, slash = min(head.vertical, n_keys), min(head.slash, n_keys)
        if head.shape == "vertical-slash":
            vertical, slash = min(n_keys, max(vertical, MIN_VERTICAL)), min(n_keys, max(slash, MIN_SLASH))
        elif head.shape == "a-shape":
            slash = max(slash, 1)  # a query sees itself
        rows.append((vertical, slash, max(head.blocks, 1) if head.shape == "block-sparse" else 0))
    fixed = [head.shape == "a-shape" for head in heads]
    # One copy that does not wait for the device.
    table = torch.tensor([*zip(*rows, strict=True), fixed]).to(device, non_blocking=True)
    vertical, slash, blocks, is_fixed = table
    most = [max(column) for column in zip(*rows, strict=True)]
    dynamic = any(head.shape == "vertical-slash" for head in heads)
    return Sizes(is_fixed.bool(), vertical, slash, blocks, most[0], most[1], most[2], dynamic, any(fixed))


class LayerIndex:
    """What one layer's inputs say about which keys matter; estimates are made when first needed.

    Args:
        x: the layer's inputs. The probe is this call's last queries: each chunk of a prompt has its own.
        ranked: sort columns, diagonals and blocks once, for many sizes (the search); else each size finds its
            set without a sort.
    """

    def __init__(self, x: AttentionInputs, ranked: bool = False) -> None:
        self.x, self.ranked = x, ranked
        self.batch, self.heads, self.n_queries = x.q.shape[:3]
        self.n_keys = x.k.shape[2]
        self.device = x.q.device
        self.rows, self.columns = cdiv(self.n_queries, BLOCK), cdiv(self.n_keys, BLOCK)

    # ------------------------------------------------------- estimates

    @lazy
    def _sums(self) -> tuple[Float[Tensor, "2 B H Nk"], Bool[Tensor, "B H"]]:
        """The probe's attention by column (0) and by diagonal (1), forced ones first of all; where it is NaN.

        Equals come in their order, so among the forced diagonals the nearest come first, and a budget below
        100 keeps offset 0, without which a query would not see itself.
        """
        tokens, blocks = probe_sums(self.x.q, self.x.k, PROBE, BLOCK, self.x.scale)
        tokens[0, ..., :SINKS] = torch.inf
        tokens[1, ..., :LOCAL] = torch.inf
        return tokens, blocks[0].sum(-1).isnan()

    @lazy
    def _ranks(self) -> Int[Tensor, "2 B H Nk"]:
        """The place of each column and diagonal, best first."""
        return _ranks(self._sums[0])

    def _chosen(self, sizes: Sizes) -> Bool[Tensor, "2 B H Nk"]:
        """Each head's columns (0) and diagonals (1)."""
        wanted = torch.stack([sizes.vertical, sizes.slash])[:, None].expand(2, self.batch, -1)
        if sizes.some_fixed or not sizes.dynamic:
            first = torch.arange(self.n_keys, device=self.device) < wanted[..., None]
        if not sizes.dynamic:
            return first
        sums, broken = self._sums
        # A head whose estimate is not a number takes all diagonals: it is dense.
        taken = torch.stack([wanted[0], torch.where(broken, self.n_keys, wanted[1])])
        top = self._ranks < taken[..., None] if self.ranked else top_mask(sums, taken)
        return torch.where(sizes.fixed[:, None], first, top) if sizes.some_fixed else top

    @lazy
    def _means(self) -> tuple[Float[Tensor, "B H Mq D"], Float[Tensor, "B Hkv Mk D"]]:
        return mean_pool(self.x.q, BLOCK), mean_pool(self.x.k, BLOCK)

    def _scores(self, start: int, stop: int, active: Bool[Tensor, " H"]) -> Float[Tensor, "B H m n"]:
        """Products of block means, for the queries [start, stop)."""
        q, k = self._means
        seen = self.x.offset + stop
        q, k = q[:, :, start // BLOCK : cdiv(stop, BLOCK)], k[:, :, : cdiv(seen, BLOCK)]
        heads = active.expand(self.batch, -1)
        return pooled_map(q, k, stop - start, seen, BLOCK, self.x.scale, active=heads)

    @lazy
    def _block_ranks(self) -> Int[Tensor, "B H Mq Mk"]:
        """The place of each key block in its row, best first."""
        every = torch.ones(self.heads, dtype=torch.bool, device=self.device)
        return _ranks(self._scores(0, self.n_queries, every))

    def _top_blocks(self, sizes: Sizes, start: int, stop: int) -> Bool[Tensor, "B H m n"] | None:
        """The block-sparse heads' key blocks, for the queries [start, stop)."""
        if not sizes.most_blocks:
            return None
        if self.ranked:
            rows, seen = slice(start // BLOCK, cdiv(stop, BLOCK)), cdiv(self.x.offset + stop, BLOCK)
            return self._block_ranks[:, :, rows, :seen] < sizes.blocks[:, None, None]
        scores = self._scores(start, stop, sizes.blocks > 0)
        return top_mask(scores, sizes.blocks[:, None].expand(scores.shape[:3]))

    # ----------------------------------------------------------- masks

    def _bands(self, sizes: Sizes, diagonals: Bool[Tensor, "B H Nk"]) -> Bool[Tensor, "B H W"]:
        """All diagonals of blocks that a chosen diagonal touches; entry 1 + d is d blocks before a query's.

        Query block r starts at position ``64 R + m`` with ``R = r + offset // 64`` and ``m = offset % 64``.
        Diagonal o meets there the keys ``64 R - t ... 64 R - t + 63`` with ``t = o - m``, which lie in the
        key blocks ``R - ceil(t / 64)`` and ``R - floor(t / 64)``.
        """
        left = BLOCK - self.x.offset % BLOCK
        right = -(left + self.n_keys) % BLOCK
        # Place t + 64 on a grid of 64: entry j of it holds floor(t / 64) = j - 1.
        grid = torch.unflatten(F.pad(diagonals, (left, right)), -1, (-1, BLOCK))
        bands = F.pad(grid.any(-1), (0, 1)) | F.pad(grid[..., 1:].any(-1), (1, 0))
        if sizes.most_blocks:
            # Without its own block, a query of a poorly ranked row might see no key at all.
            bands[..., :2] |= (sizes.blocks > 0)[:, None]
        return bands

    def block_mask(self, sizes: Sizes) -> Bool[Tensor, "B H Mq Mk"]:
        """Blocks of all heads as a map: what slashes touch, and the block-sparse heads' own."""
        bands = self._bands(sizes, self._chosen(sizes)[1])
        mask = band_mask(bands, self.n_queries, self.n_keys, BLOCK)
        top = self._top_blocks(sizes, 0, self.n_queries)
        mask = mask if top is None else mask | top
        return mask & visible_blocks(self.n_queries, self.n_keys, BLOCK, self.device)

    # ---------------------------------------------------------- results

    def pattern(self, sizes: Sizes) -> Pattern:
        """The pairs to compute."""
        columns, diagonals = self._chosen(sizes)
        bands = self._bands(sizes, diagonals)
        if sizes.most_verticals:
            # As the list of one query that stands at the end.
            mask = columns[:, :, None]
            number, places = block_lists(1, self.n_keys, 1, mask=mask, unit=1, cap=sizes.most_verticals)

        def lists(start: int, stop: int) -> Pattern:
            n_queries, seen = stop - start, self.x.offset + stop
            top = self._top_blocks(sizes, start, stop)
            found = block_lists(n_queries, seen, BLOCK, mask=top, bands=bands)
            blocks = BlockPattern(n_queries, seen, BLOCK, *found)
            if not sizes.most_verticals:
                return blocks
            # Block-sparse heads have no columns, so diagonals are all that can cover one.
            found = column_lists(places[:, :, 0], number[:, :, 0], n_queries, seen, BLOCK, bands=bands)
            return BlockColumnPattern(n_queries, seen, blocks, ColumnPattern(n_queries, seen, BLOCK, *found))

        entries = self.columns * (3 if sizes.most_blocks else 1) + sizes.most_verticals
        row_bytes = 4 * entries * self.batch * self.heads
        return in_pieces(lists, self.n_queries, self.n_keys, BLOCK, row_bytes)

    def pairs(self, sizes: Sizes) -> Int[Tensor, "B H"]:
        """What :meth:`pattern` would compute, counted without building lists."""
        mask = self.block_mask(sizes)
        pairs = (mask * pairs_per_block(self.n_queries, self.n_keys, BLOCK, self.device)).sum((-1, -2))
        if not sizes.most_verticals:
            return pairs
        columns = self._chosen(sizes)[0]
        padded = F.pad(columns, (0, -self.n_keys % BLOCK))
        per_block = torch.unflatten(padded, -1, (-1, BLOCK)).sum(-1)
        # The diagonal's blocks are always listed, so every query of the row sees a column outside a block.
        height = torch.full((self.rows,), BLOCK, device=self.device)
        height[-1] = self.n_queries - (self.rows - 1) * BLOCK
        visible = visible_blocks(self.n_queries, self.n_keys, BLOCK, self.device)
        outside = (visible & ~mask) * height[:, None]
        return pairs + (outside * per_block[:, :, None]).sum((-1, -2))


def _ranks(scores: Float[Tensor, "*batch n"]) -> Int[Tensor, "*batch n"]:
    """The place of each entry among its row's in falling order, equals in their order."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.empty_like(order).scatter_(-1, order, place)
