"""The prompt selectors of the Sparse Frontier study: columns and diagonals, coverage of both, and blocks.

With the last ``L`` queries as probe, per query head::

    P    = softmax(q[-L:] k^T scale), causal
    c_j  = sum_i P_ij      g_o = sum_i P_{i, i-o}       columns and diagonals (distances)

Columns and diagonals are ranked by ``c`` and ``g``, the first keys and the nearest diagonals before all
others. Diagonals are computed in whole 64x64 blocks on the grid of the keys, columns one by one where no
block covers them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.method import AttentionInputs
from sparseland.ops.block_lists import block_lists, column_lists
from sparseland.ops.block_scores import mean_pool, probe_vertical_slash
from sparseland.patterns import (
    BlockColumnPattern,
    BlockPattern,
    ColumnPattern,
    Pattern,
    cdiv,
    in_pieces,
    visible_blocks,
)

TILE = 64
# Probe rows taken at once: few enough for the fused kernel at every head size.
_PROBE_PIECE = 64
# Block scores held at once: 64 MiB of float32.
_PIECE = 2**24


# ------------------------------------------------------- columns and diagonals


@dataclass(frozen=True)
class Ranked:
    """Columns or diagonals of each head, best first, and the part of the probe's attention each holds."""

    order: Int[Tensor, "B H Nk"]
    mass: Float[Tensor, "B H Nk"]

    def covering(self, share: float) -> Int[Tensor, "B H"]:
        """How many of the first reach ``share`` of the attention."""
        total = self.mass.sum(-1, keepdim=True, dtype=torch.float64)
        reached = self.mass.cumsum(-1, dtype=torch.float64) / total
        # Rounding must not ask for the whole sequence where the last few hold nothing.
        return 1 + (reached < share - 1e-9).sum(-1)


def rank(x: AttentionInputs, probe: int, sinks: int, local: int) -> tuple[Ranked, Ranked]:
    """Columns, ``sinks`` first, and diagonals, ``local`` first and nearest foremost, by the probe."""
    sums = probe_sums(x.q, x.k, probe, x.scale)
    ranked = []
    for scores, forced in zip(sums, (sinks, local), strict=True):
        # What is not a number would sort anywhere; as the largest it is computed, and shows as in dense.
        scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).max)
        raised = scores.clone()
        raised[..., :forced] = torch.inf
        # Stable: the forced ones come in their natural order, so that offset 0 is never left out.
        order = raised.sort(dim=-1, descending=True, stable=True).indices
        ranked.append(Ranked(order, scores.gather(-1, order)))
    return ranked[0], ranked[1]


def probe_sums(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], probe: int, scale: float
) -> tuple[Float[Tensor, "B Hq Nk"], Float[Tensor, "B Hq Nk"]]:
    """``c`` and ``g`` of the last ``probe`` queries, a few queries at a time."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    columns = q.new_zeros(*q.shape[:2], n_keys, dtype=torch.float32)
    diagonals = torch.zeros_like(columns)
    first = n_queries - min(probe, n_queries)
    for start in range(first, n_queries, _PROBE_PIECE):
        end = min(start + _PROBE_PIECE, n_queries)
        seen = n_keys - (n_queries - end)  # earlier rows see fewer keys
        c, g = probe_vertical_slash(q[:, :, start:end], k[:, :, :seen], end - start, scale)
        columns[..., :seen] += c
        diagonals[..., :seen] += g
    return columns, diagonals


def vertical_slash(
    x: AttentionInputs,
    columns: Ranked,
    n_columns: int | Int[Tensor, "B H"],
    diagonals: Ranked,
    n_diagonals: int | Int[Tensor, "B H"],
) -> Pattern:
    """The first columns and diagonals of each head as blocks and single columns; nothing is synchronised."""
    n_queries, n_keys, device = x.q.shape[2], x.k.shape[2], x.q.device
    most = min(n_columns, n_keys) if isinstance(n_columns, int) else n_keys
    counts = _counts(n_columns, columns.order).clamp(max=n_keys)
    # What is not taken sorts behind what is: ascending lists without looking at their lengths.
    taken = torch.arange(most, device=device) < counts[..., None]
    positions = torch.where(taken, columns.order[..., :most], n_keys).sort(dim=-1).values.to(torch.int32)
    bands = diagonal_bands(diagonals.order, n_diagonals, n_queries, n_keys)

    def lists(start: int, stop: int) -> Pattern:
        rows, seen = stop - start, x.offset + stop
        blocks = BlockPattern(rows, seen, TILE, *block_lists(rows, seen, TILE, bands=bands))
        single = column_lists(positions, counts, rows, seen, TILE, bands=bands)
        return BlockColumnPattern(rows, seen, blocks, ColumnPattern(rows, seen, TILE, *single))

    row_bytes = 4 * (cdiv(n_keys, TILE) + most) * counts.numel()
    return in_pieces(lists, n_queries, n_keys, TILE, row_bytes)


def _counts(count: int | Int[Tensor, "B H"], order: Int[Tensor, "B H n"]) -> Int[Tensor, "B H"]:
    """A count per head, made on the device."""
    if isinstance(count, int):
        return torch.full(order.shape[:2], count, device=order.device)
    return count


def diagonal_bands(
    order: Int[Tensor, "B H Nk"], count: int | Int[Tensor, "B H"], n_queries: int, n_keys: int
) -> Bool[Tensor, "B H W"]:
    """Which diagonals of blocks the chosen ones touch, as ``block_lists`` takes them.

    A row of query blocks starts at position ``p = 64 R + m``. Distance o leads from there to the keys
    ``p - o ... p - o + 63``, which lie ``-floor((m - o) / 64)`` and ``-floor((m - o + 63) / 64)`` key blocks
    to the left of block R: which blocks are touched depends on that number only. Entry d + 1 stands for d
    blocks to the left, d >= -1.
    """
    device, offset = order.device, n_keys - n_queries
    if isinstance(count, int):
        order = order[..., :count]
    chosen = torch.arange(order.shape[-1], device=device) < _counts(count, order)[..., None]
    width = cdiv(n_keys, TILE) + 2
    touched = torch.zeros(*order.shape[:2], width + 1, dtype=torch.bool, device=device)
    for edge in (offset % TILE, offset % TILE + TILE - 1):
        left = -torch.div(edge - order, TILE, rounding_mode="floor")
        # The last entry takes what is not chosen, and is cut off.
        touched.scatter_(-1, torch.where(chosen, left + 1, width), True)
    return touched[..., :width].contiguous()


# ----------------------------------------------------------------------- blocks


def top_blocks(x: AttentionInputs, size: int, count: int) -> BlockPattern:
    """Per query block the first key block, its own, the one before, and the best others: ``count`` in all.

    Best by mean query times mean key. Works through the query blocks a few at a time.
    """
    n_queries, n_keys, device = x.q.shape[2], x.k.shape[2], x.q.device
    batch, heads, _, dim = x.q.shape
    kv_heads = x.k.shape[1]
    rows, width = cdiv(n_queries, size), cdiv(n_keys, size)
    visible = visible_blocks(n_queries, n_keys, size, device)
    forced = forced_blocks(n_queries, n_keys, size, device)
    # A chunk that starts inside a block has two blocks of its own per row.
    most = min(width, max(count, 4 if x.offset % size else 3))
    q = mean_pool(x.q, size).reshape(batch, kv_heads, -1, rows, dim).float()
    k = mean_pool(x.k, size).float().mT[:, :, None]
    step = max(1, _PIECE // (batch * heads * width))
    counts, indices = [], []
    for i in range(0, rows, step):
        part = slice(i, i + step)
        scores = (q[:, :, :, part] @ k * x.scale).flatten(1, 2)  # (B, H, r, Mk)
        scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).max)
        scores = scores.masked_fill(~visible[part], -torch.inf).masked_fill(forced[part], torch.inf)
        best = scores.topk(most, dim=-1)
        listed = best.values > -torch.inf
        lists = torch.where(listed, best.indices, width).sort(dim=-1).values
        counts.append(listed.sum(-1, dtype=torch.int32))
        indices.append(lists.clamp(max=width - 1).to(torch.int32))
    return BlockPattern(n_queries, n_keys, size, torch.cat(counts, 2), torch.cat(indices, 2))


def forced_blocks(
    n_queries: int, n_keys: int, size: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "Mq Mk"]:
    """The first key block, those that hold a query's own key, and the one before them."""
    row = torch.arange(cdiv(n_queries, size), device=device)[:, None] * size + n_keys - n_queries
    column = torch.arange(cdiv(n_keys, size), device=device)
    own = row // size
    last = (row + size - 1).clamp(max=n_keys - 1) // size
    return (column == 0) | ((column >= own - 1) & (column <= last))


def blocks_density(count: int, n: int) -> float:
    """Computed part of the causal blocks of ``n`` rows that take ``count`` each, or all there are."""
    count = min(count, n)
    return (count * (count + 1) / 2 + (n - count) * count) / (n * (n + 1) / 2)


def blocks_for(density: float, n: int, least: int = 3) -> int:
    """The blocks per row whose density over ``n`` rows is nearest to ``density``, at least ``least``."""
    low, high = 1, n
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if blocks_density(middle, n) < density else (low, middle)
    nearest = min((low - 1, low), key=lambda c: abs(blocks_density(c, n) - density)) if low > 1 else low
    return max(least, nearest)
