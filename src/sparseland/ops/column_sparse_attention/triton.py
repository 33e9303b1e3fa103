"""Blocks and columns in one Triton kernel: one program per query tile and head walks both of its lists.

A program takes its listed blocks first (the walk of block-sparse attention), then its listed columns in
gathered tiles, with one running softmax. Lists ascend, so the keys that need a causal test come last: each
list is cut where they begin, and the part before runs without a test; columns wholly in the tile's future
(a list that several query blocks share has some) are cut off. The next tile's positions are loaded one step
ahead, so that the loads of keys and values, which depend on them, can be pipelined. Programs of one head run
side by side (its keys and values stay in the L2 cache), those with the most keys first. Where another kernel
has attended to the blocks already, the softmax goes on from its output and log-sum-exp.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops._rows import rows_at, rows_from
from sparseland.ops.block_sparse_attention.triton import (
    LN2,
    LOG2E,
    Tile,
    first_fitting,
    last_dim_dense,
    longest_first,
    padded,
    rows_of,
)
from sparseland.ops.block_sparse_attention.triton import (
    _attend as walk_blocks,
)

# Sizes that change from call to call: compiling again where one happens to divide by 16 would gain nothing.
UNSPECIALIZED = (
    "stride_bb", "stride_bh", "stride_bm", "stride_cb", "stride_ch", "stride_cm", "stride_nb", "stride_nh",
    "stride_ob", "stride_oh", "stride_tb", "stride_th", "H", "G", "Nq", "Nk", "share",
)  # fmt: skip

# By padded head dimension and query rows of a tile (a block's, 128 at most), preferred first; the first that
# fits the device's shared memory is used. BN counts gathered columns; tiles of blocks are no larger than a
# block. ``tma`` is about the blocks: gathered rows have no descriptor before Blackwell.
TILES = {
    (64, 128): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
    (64, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
    (64, 32): (Tile(32, 64, 2, 4), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)),
    (64, 16): (Tile(16, 64, 2, 3), Tile(16, 64, 2, 2), Tile(16, 32, 4, 1)),
    (128, 128): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
    (128, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
    (128, 32): (Tile(32, 128, 4, 2), Tile(32, 64, 4, 3), Tile(32, 32, 4, 1)),
    (128, 16): (Tile(16, 64, 2, 3), Tile(16, 32, 4, 1)),
    (256, 128): (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
    (256, 64): (Tile(64, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
    (256, 32): (Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)),
    (256, 16): (Tile(16, 64, 4, 2), Tile(16, 32, 4, 1)),
}  # fmt: skip
# fp32 products use no tensor cores here (they would round to tf32), and larger tiles only spill registers.
FULL_PRECISION = (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1))

# Heads of this many elements need 64-bit offsets.
INT32 = 1 << 31

# Behind the last position of a list: a key in every query's future (positions fit into int32).
NONE = tl.constexpr(2147483647)


@triton.jit
def _walk_columns(
    acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, columns, start, stop, count, position, Nk, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the columns [start, stop) of ``columns[:count]``, BN at a time."""
    i_n = tl.arange(0, BN)
    b_next = tl.load(columns + start + i_n, mask=start + i_n < count, other=NONE)
    for i in range(start, stop, BN):
        i_k = b_next
        b_k = rows_at(k, i_k, stride_kn, Nk, D, BD, WIDE, MASKED)
        b_v = rows_at(v, i_k, stride_vn, Nk, D, BD, WIDE, MASKED)
        b_next = tl.load(columns + i + BN + i_n, mask=i + BN + i_n < count, other=NONE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            b_s = tl.where(position[:, None] >= i_k[None, :], b_s, float("-inf"))
            b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
            # A row that has seen nothing yet: exp2(-inf - 0) = 0 where exp2(-inf + inf) is NaN.
            b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        else:
            b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
            b_shift = b_max
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_alpha = tl.exp2(b_m - b_shift)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * b_alpha[:, None], input_precision="ieee")
        b_m = b_max
    return acc, b_m, b_l


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k, v, out, lse, block_counts, block_indices, column_counts, column_indices, order,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_tb, stride_th, stride_bm, stride_cb, stride_ch, stride_nb, stride_nh,
    stride_cm, stride_ob, stride_oh,
    H, G, Nq, Nk, share, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BB: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, ONTO: tl.constexpr, WIDE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """BB: keys of a tile of blocks. Strides: b and t of block counts and lists, c and n of columns'."""
    # Query tiles run fastest: programs that are alive together share one head's keys and values.
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_hk = i_h // G
    i_block = tl.load(order + i_b * stride_ob + i_h * stride_oh + i_t // (BS // BM))
    m0 = i_block * BS + i_t % (BS // BM) * BM
    if m0 >= Nq:
        return

    i_m = m0 + tl.arange(0, BM)
    i_d = tl.arange(0, BD)
    b_q = rows_from(q + i_b * stride_qb + i_h * stride_qh, m0, stride_qn, Nq, D, BD, False, BM, True)
    k += i_b * stride_kb + i_hk * stride_kh
    v += i_b * stride_vb + i_hk * stride_vh
    first = m0 + Nk - Nq
    position = first + tl.arange(0, BM)
    if ONTO:
        # The same addresses as at the end, made anew there: kept in between they cost registers, and with
        # them a third of the programs that are alive together.
        i_row = (i_b * H + i_h) * Nq + m0
        p_out = out + i_row * D + tl.arange(0, BM)[:, None] * D + i_d[None, :]
        inside = (i_m < Nq)[:, None] & (i_d < D)[None, :]
        acc = tl.load(p_out, mask=inside, other=0.0).to(tl.float32)
        b_m = tl.load(lse + i_row + tl.arange(0, BM), mask=i_m < Nq, other=float("-inf")) * LOG2E
        b_l = tl.where(b_m == float("-inf"), 0.0, 1.0)
    else:
        acc = tl.zeros([BM, BD], tl.float32)
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)

    if BLOCKS:
        blocks = block_indices + i_b * stride_tb + i_h * stride_th + i_block.to(tl.int64) * stride_bm
        count = tl.load(block_counts + i_b * stride_bb + i_h * stride_bh + i_block)
        # Blocks before `visible` are wholly visible to every row of the tile; the others end the list.
        visible = (first + 1) // BS
        whole = count
        while tl.load(blocks + whole - 1, mask=whole > 0, other=-1) >= visible:
            whole -= 1
        PARTS: tl.constexpr = BS // BB
        k_blocks = rows_of(k, 0, stride_kn, Nk, D, BD, TMA, BB)
        v_blocks = rows_of(v, 0, stride_vn, Nk, D, BD, TMA, BB)
        acc, b_m, b_l = walk_blocks(
            acc, b_m, b_l, b_q, k_blocks, v_blocks, stride_kn, stride_vn, blocks, 0, whole * PARTS, position,
            Nk, scale_log2, D, BD, BS, BB, False, TMA,
        )  # fmt: skip
        acc, b_m, b_l = walk_blocks(
            acc, b_m, b_l, b_q, k_blocks, v_blocks, stride_kn, stride_vn, blocks, whole * PARTS,
            count * PARTS, position, Nk, scale_log2, D, BD, BS, BB, True, TMA,
        )  # fmt: skip

    if COLUMNS:
        i_list = i_block // share
        columns = column_indices + i_b * stride_nb + i_h * stride_nh + i_list.to(tl.int64) * stride_cm
        count = tl.load(column_counts + i_b * stride_cb + i_h * stride_ch + i_list)
        stop = (count + BN - 1) // BN * BN
        while tl.load(columns + stop - BN, mask=stop > 0, other=-1) > first + BM - 1:
            stop -= BN
        if ONTO and stop == 0:
            return
        seen = tl.minimum(stop, count // BN * BN)
        while tl.load(columns + seen - 1, mask=seen > 0, other=-1) > first:
            seen -= BN
        acc, b_m, b_l = _walk_columns(
            acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, columns, 0, seen, count, position, Nk,
            scale_log2, D, BD, BN, WIDE, False,
        )  # fmt: skip
        acc, b_m, b_l = _walk_columns(
            acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, columns, seen, stop, count, position, Nk,
            scale_log2, D, BD, BN, WIDE, True,
        )  # fmt: skip

    # Not "b_l > 0": a query or key that is NaN must show.
    unseen = b_l == 0.0
    b_l = tl.where(unseen, 1.0, b_l)
    b_o = acc / b_l[:, None]
    b_lse = tl.where(unseen, float("-inf"), (b_m + tl.log2(b_l)) * LN2)
    i_row = (i_b * H + i_h) * Nq + m0
    out += i_row * D + tl.arange(0, BM)[:, None] * D + i_d[None, :]
    tl.store(out, b_o.to(out.dtype.element_ty), mask=(i_m < Nq)[:, None] & (i_d < D)[None, :])
    tl.store(lse + i_row + tl.arange(0, BM), b_lse, mask=i_m < Nq)


def block_column_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    column_size: int,
    block_counts: Int[Tensor, "b h M"],
    block_indices: Int[Tensor, "b h M L"],
    column_counts: Int[Tensor, "b h Mc"],
    column_indices: Int[Tensor, "b h Mc Lc"],
    scale: float,
    tiles: tuple[Tile, ...] | None = None,
    onto: tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]] | None = None,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp. Deterministic: each program owns its rows. ``tiles`` replaces the table.

    ``onto``: output and log-sum-exp of other keys, contiguous; what is computed here is added in place.
    """
    B, H, Nq, D = q.shape
    Nk, M = k.shape[2], block_counts.shape[2]
    q, k, v, block_indices, column_indices = (
        last_dim_dense(t) for t in (q, k, v, block_indices, column_indices)
    )
    block_counts, column_counts = block_counts.contiguous(), column_counts.contiguous()
    out, lse = onto or (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32))
    share, BD = column_size // block_size, padded(D)
    wide = (Nk + 1) * max(k.stride(2), v.stride(2)) >= INT32
    has_blocks, has_columns = block_indices.shape[3] > 0, column_indices.shape[3] > 0
    of_columns = column_counts.repeat_interleave(share, 2)[:, :, :M] if share > 1 else column_counts
    order = longest_first(block_counts * block_size + of_columns).expand(B, H, -1)
    lists = [
        t.expand(B, H, *t.shape[2:]) for t in (block_counts, block_indices, column_counts, column_indices)
    ]

    def launch(tile: Tile) -> None:
        BM, BB = min(tile.BM, block_size), min(tile.BN, block_size)
        _forward_kernel[(M * (block_size // BM), H, B)](
            q, k, v, out, lse, *lists, order, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *lists[0].stride()[:2], *lists[1].stride()[:3], *lists[2].stride()[:2], *lists[3].stride()[:3],
            *order.stride()[:2], H, H // k.shape[1], Nq, Nk, share, scale * LOG2E.value,
            D, BD, block_size, BM, tile.BN, BB, has_blocks, has_columns, onto is not None,
            wide, tile.tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    key = ("columns", D, block_size, q.dtype, has_blocks, has_columns, onto is None)
    # Tiles are cut to the block here, not by `first_fitting`: only blocks bound the keys of a tile.
    first_fitting(key, tiles or preferred(q, block_size), 1 << 30, q, launch)
    return out, lse


def preferred(q: Tensor, block_size: int) -> tuple[Tile, ...]:
    """The tiles to try for these queries and this block size, the best first."""
    if q.dtype == torch.float32:
        return FULL_PRECISION
    return TILES[max(padded(q.shape[3]), 64), min(block_size, 128)]
