"""Gradients of attention over per-token block lists in Triton, deterministic: no atomics.

As in the block-sparse op, one kernel walks each tile's blocks and sums dq, the other walks the tiles that
see each key block (its window's, then those that list it) and sums dk and dv over a group's heads.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops._rows import rows_at
from sparseland.ops.block_sparse_attention.triton import (
    LOG2E,
    Tile,
    first_fitting,
    last_dim_dense,
    longest_first,
    padded,
)
from sparseland.ops.block_sparse_attention.triton_backward import _prepare_kernel
from sparseland.ops.token_block_attention.triton import (
    LISTED,
    UNSPECIALIZED,
    WHOLE,
    WINDOW,
    block_at,
    cut,
    lists_of,
    preferred,
    row_sees,
    rows_of_tile,
    tile_rows,
    window_blocks,
)
from sparseland.patterns import cdiv

# As in triton.py: keys per step of the dq kernel, keys per program of the dk and dv kernel.
DQ = {
    64: (cut(64, 8, 2), cut(32, 8, 2), cut(16, 4, 1)),
    128: (cut(64, 8, 2), cut(32, 8, 2), cut(32, 8, 1), cut(16, 4, 1)),
    256: (cut(32, 8, 1), cut(16, 8, 1)),
}
DKDV = {
    64: (cut(64, 8, 2), cut(32, 8, 2), cut(16, 4, 1)),
    128: (cut(64, 8, 2), cut(64, 8, 1), cut(32, 8, 1), cut(16, 4, 1)),
    256: (cut(32, 8, 1), cut(16, 8, 1)),
}
# Lists that one step of the transposition searches at once.
CHUNK = 128


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _transpose_kernel(
    counts, indices, members, starts, t_counts, t_tiles, t_words, stride_im, T, offset, window, probes,
    BS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """For one key block, the tiles that list it: their number, or (FILL) the tiles and their words."""
    i_j, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_out = i_bh * tl.num_programs(0) + i_j
    counts += i_bh * T
    indices += i_bh * T * stride_im
    members += i_bh * T * stride_im
    if FILL:
        at = tl.load(starts + i_out)
        t_tiles += at
        t_words += at
    found = 0
    # A query lists a block only once its window has passed it.
    for i_0 in range(tl.maximum((i_j + window) * BS - offset, 0) // TILE, T, CHUNK):
        i_t = i_0 + tl.arange(0, CHUNK)
        b_n = tl.load(counts + i_t, mask=i_t < T, other=0)
        i_list = i_t.to(tl.int64) * stride_im
        # Binary search for i_j in CHUNK ascending lists at once.
        b_low = tl.zeros([CHUNK], tl.int32)
        b_high = b_n
        for _ in range(probes):
            open_ = b_low < b_high
            b_mid = (b_low + b_high) // 2
            right = tl.load(indices + i_list + b_mid, mask=open_, other=0) < i_j
            b_low = tl.where(open_ & right, b_mid + 1, b_low)
            b_high = tl.where(open_ & (right == 0), b_mid, b_high)
        hit = (tl.load(indices + i_list + b_low, mask=b_low < b_n, other=-1) == i_j).to(tl.int32)
        if FILL:
            spot = found + tl.cumsum(hit, 0) - 1
            word = tl.load(members + i_list + b_low, mask=hit > 0, other=0)
            tl.store(t_tiles + spot, i_t, mask=hit > 0)
            tl.store(t_words + spot, word, mask=hit > 0)
        found += tl.sum(hit, 0)
    if not FILL:
        tl.store(t_counts + i_out, found)


def transposed(
    counts: Int[Tensor, "b Hl T"],
    indices: Int[Tensor, "b Hl T L"],
    members: Int[Tensor, "b Hl T L"],
    block_size: int,
    window: int,
    tile: int,
    Mk: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per key block how many tiles list it and where they start; tiles and words of all blocks end to end.

    The space for them is what the given lists take, so nothing waits for the device.
    """
    b, h, T, L = indices.shape
    counts, indices, members = (t.contiguous() for t in (counts, indices, members))
    t_counts = counts.new_empty(b, h, Mk)
    t_tiles, t_words = (counts.new_empty(max(1, b * h * T * L)) for _ in range(2))
    starts = torch.zeros(b, h, Mk, dtype=torch.int64, device=counts.device)
    for fill in (False, True):
        _transpose_kernel[(Mk, b * h)](
            counts, indices, members, starts, t_counts, t_tiles, t_words, L, T, offset, window,
            L.bit_length(), block_size, tile, CHUNK, fill,
        )  # fmt: skip
        if not fill:
            flat = t_counts.flatten()
            starts = (flat.cumsum(0) - flat).view(b, h, Mk)
    return t_counts, starts, t_tiles, t_words


@triton.jit
def _dq_walk(
    acc, b_q, b_do, b_lse, b_delta, k, v, stride_kn, stride_vn, indices, members, base, skip, turn, count,
    i_token, position, window, Nk, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Adds to dq / scale over ``count`` blocks."""
    SUB: tl.constexpr = BS // BN
    i_n = tl.arange(0, BN)
    steps = count * SUB
    block, word = block_at(0, base, skip, turn, indices, members, MODE)
    for step in range(0, steps):
        i_k = block * BS + (step % SUB) * BN + i_n
        b_k = rows_at(k, i_k, stride_kn, Nk, D, BD, True, MODE == 1)
        b_v = rows_at(v, i_k, stride_vn, Nk, D, BD, True, MODE == 1)
        b_bit = (word >> i_token) & 1
        ahead = tl.where(step + 1 < steps, (step + 1) // SUB, 0)
        block, word = block_at(ahead, base, skip, turn, indices, members, MODE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        if MODE != 0:
            b_seen = row_sees(position[:, None], i_k[None, :], b_bit[:, None], window, BS, MODE)
            b_p = tl.where(b_seen, b_p, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        acc = tl.dot(b_ds.to(b_k.dtype), b_k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dq_kernel(
    q, k, v, d_out, delta, lse2, dq, counts, indices, members, order,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_db, stride_dh, stride_dn, stride_cb, stride_ch, stride_ib, stride_ih, stride_im,
    H, Nq, Nk, Np, window, scale, scale_log2,
    LISTS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_t = tl.load(order + i_b * stride_cb + i_h * stride_ch + tl.program_id(0))
    offset = Nk - Nq
    i_token, i_g, i_q, live = tile_rows(i_t, Nq, TILE, G, BM)
    position = i_q + offset
    i_d = tl.arange(0, BD)
    inside = live[:, None] & (i_d < D)[None, :]
    i_head = i_h * G + i_g
    i_q = i_q.to(tl.int64)
    q += i_b * stride_qb + i_head[:, None] * stride_qh + i_q[:, None] * stride_qn + i_d[None, :]
    d_out += i_b * stride_db + i_head[:, None] * stride_dh + i_q[:, None] * stride_dn + i_d[None, :]
    b_q = tl.load(q, mask=inside, other=0.0)
    b_do = tl.load(d_out, mask=inside, other=0.0)
    i_row = (i_b * H + i_head) * Np + i_q
    b_lse = tl.load(lse2 + i_row, mask=live, other=float("inf"))
    b_delta = tl.load(delta + i_row, mask=live, other=0.0)
    k += i_b * stride_kb + (i_h // LISTS) * stride_kh
    v += i_b * stride_vb + (i_h // LISTS) * stride_vh

    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_t)
    i_list = i_b * stride_ib + i_h * stride_ih + i_t.to(tl.int64) * stride_im
    indices += i_list
    members += i_list
    start, lead, first, last = window_blocks(i_t, Nq, offset, window, TILE, BS)

    acc = tl.zeros([BM, BD], tl.float32)
    acc = _dq_walk(
        acc, b_q, b_do, b_lse, b_delta, k, v, stride_kn, stride_vn, indices, members, lead, 0, 0,
        first - lead, i_token, position, window, Nk, scale_log2, D, BD, BS, BN, WHOLE,
    )  # fmt: skip
    acc = _dq_walk(
        acc, b_q, b_do, b_lse, b_delta, k, v, stride_kn, stride_vn, indices, members, start, first - lead,
        lead - start, lead - start + last - first + 1, i_token, position, window, Nk, scale_log2, D, BD, BS,
        BN, WINDOW,
    )  # fmt: skip
    acc = _dq_walk(
        acc, b_q, b_do, b_lse, b_delta, k, v, stride_kn, stride_vn, indices, members, 0, 0, 0, count,
        i_token, position, window, Nk, scale_log2, D, BD, BS, BN, LISTED,
    )  # fmt: skip
    dq += ((i_b * H + i_head) * Nq + i_q)[:, None] * D + i_d[None, :]
    tl.store(dq, (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _dkdv_walk(
    b_dk, b_dv, b_k, b_v, q, d_out, delta, lse2, stride_qh, stride_qn, stride_dh, stride_dn, tiles, words,
    start, stop, i_k, i_h, Nq, Np, offset, window, scale_log2,
    G: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    BM: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Adds to dk / scale and dv over the tiles [start, stop), or over as many of a list."""
    i_d = tl.arange(0, BD)
    for step in range(start, stop):
        if MODE == 2:
            i_t = tl.load(tiles + step)
            word = tl.load(words + step)
        else:
            i_t = step
            word = step * 0
        i_token, i_g, i_q, live = tile_rows(i_t, Nq, TILE, G, BM)
        inside = live[:, None] & (i_d < D)[None, :]
        i_row = i_q.to(tl.int64)
        i_head = i_h * G + i_g
        p_q = q + i_head[:, None] * stride_qh + i_row[:, None] * stride_qn + i_d[None, :]
        p_do = d_out + i_head[:, None] * stride_dh + i_row[:, None] * stride_dn + i_d[None, :]
        b_q = tl.load(p_q, mask=inside, other=0.0)
        b_do = tl.load(p_do, mask=inside, other=0.0)
        # Rows that do not exist: p = exp2(s - inf) = 0.
        b_lse = tl.load(lse2 + i_head * Np + i_row, mask=live, other=float("inf"))
        b_delta = tl.load(delta + i_head * Np + i_row, mask=live, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_bit = (word >> i_token) & 1
        b_seen = row_sees((i_q + offset)[None, :], i_k[:, None], b_bit[None, :], window, BS, MODE)
        b_p = tl.where(b_seen, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dkdv_kernel(
    q, k, v, d_out, delta, lse2, dk, dv, t_counts, starts, t_tiles, t_words, order,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_db, stride_dh, stride_dn, stride_cb, stride_ch, stride_ob, stride_oh,
    H, Nq, Nk, Np, window, scale, scale_log2,
    LISTS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_p, i_hk, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_block = tl.load(order + i_b * stride_ob + i_hk * stride_oh + i_p // (BS // BN))
    i_k = i_block * BS + i_p % (BS // BN) * BN + tl.arange(0, BN)
    i_d = tl.arange(0, BD)
    b_k = rows_at(k + i_b * stride_kb + i_hk * stride_kh, i_k, stride_kn, Nk, D, BD, True, True)
    b_v = rows_at(v + i_b * stride_vb + i_hk * stride_vh, i_k, stride_vn, Nk, D, BD, True, True)
    offset = Nk - Nq
    # Queries from the block's first key to the last whose window reaches back to it.
    first = tl.maximum(i_block * BS - offset, 0) // TILE
    end = tl.maximum(tl.minimum((i_block + window) * BS - offset, Nq) + TILE - 1, 0) // TILE
    q += i_b * stride_qb
    d_out += i_b * stride_db
    delta += i_b * H * Np
    lse2 += i_b * H * Np
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for i_l in range(0, LISTS):
        i_h = i_hk * LISTS + i_l
        i_list = i_b * stride_cb + i_h * stride_ch + i_block
        count = tl.load(t_counts + i_list)
        at = tl.load(starts + i_list)
        b_dk, b_dv = _dkdv_walk(
            b_dk, b_dv, b_k, b_v, q, d_out, delta, lse2, stride_qh, stride_qn, stride_dh, stride_dn,
            t_tiles, t_words, first, end, i_k, i_h, Nq, Np, offset, window, scale_log2, G, TILE, D, BD, BS,
            BM, WINDOW,
        )  # fmt: skip
        b_dk, b_dv = _dkdv_walk(
            b_dk, b_dv, b_k, b_v, q, d_out, delta, lse2, stride_qh, stride_qn, stride_dh, stride_dn,
            t_tiles + at, t_words + at, 0, count, i_k, i_h, Nq, Np, offset, window, scale_log2, G, TILE, D,
            BD, BS, BM, LISTED,
        )  # fmt: skip
    inside = (i_k < Nk)[:, None] & (i_d < D)[None, :]
    i_row = ((i_b * (H // (G * LISTS)) + i_hk) * Nk + i_k)[:, None] * D + i_d[None, :]
    tl.store(dk + i_row, (b_dk * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + i_row, b_dv.to(dv.dtype.element_ty), mask=inside)


def backward(
    d_out: Float[Tensor, "B Hq Nq D"],
    d_lse: Float[Tensor, "B Hq Nq"],
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    out: Float[Tensor, "B Hq Nq D"],
    lse: Float[Tensor, "B Hq Nq"],
    counts: Int[Tensor, "b Hl T"],
    indices: Int[Tensor, "b Hl T L"],
    members: Int[Tensor, "b Hl T L"],
    block_size: int,
    window: int,
    tile: int,
    scale: float,
    cuts: tuple[tuple[Tile, ...], tuple[Tile, ...]] | None = None,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hkv Nk D"], Float[Tensor, "B Hkv Nk D"]]:
    """Gradients of q, k and v in their own types; ``cuts`` (dq, dk and dv) replaces the tables above."""
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1:3]
    Hl, T = counts.shape[1:]
    G, BD, Mk, Np = H // Hl, padded(D), cdiv(Nk, block_size), T * tile
    BM = rows_of_tile(tile, G)
    q, k, v, d_out, out = (last_dim_dense(t) for t in (q, k, v, d_out, out))
    lse = lse.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta, lse2 = (lse.new_empty(B, H, Np) for _ in range(2))
    _prepare_kernel[(cdiv(Np, 16), H, B)](
        out, d_out, lse, d_lse, delta, lse2, *out.stride()[:3], *d_out.stride()[:3], *d_lse.stride(),
        H, Nq, Np, D, BD, 16,
    )  # fmt: skip
    t_counts, starts, t_tiles, t_words = transposed(
        counts, indices, members, block_size, window, tile, Mk, Nk - Nq
    )
    # One program serves all lists of a key head: order by what they list together.
    t_order = longest_first(t_counts.unflatten(1, (Hkv, -1)).sum(2)).expand(B, -1, -1)
    t_counts, starts = (t.expand(B, -1, -1) for t in (t_counts, starts))
    order, counts, indices, members = lists_of(B, counts, indices, members)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    scalars = (H, Nq, Nk, Np, window, scale, scale * LOG2E.value, Hl // Hkv, G, tile, D, BD, block_size, BM)

    def launch_dq(cut: Tile) -> None:
        _dq_kernel[(T, Hl, B)](
            q, k, v, d_out, delta, lse2, dq, counts, indices, members, order, *strides,
            *counts.stride()[:2], *indices.stride()[:3], *scalars, cut.BN,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    def launch_dkdv(cut: Tile) -> None:
        _dkdv_kernel[(Mk * (block_size // cut.BN), Hkv, B)](
            q, k, v, d_out, delta, lse2, dk, dv, t_counts, starts, t_tiles, t_words, t_order, *strides,
            *t_counts.stride()[:2], *t_order.stride()[:2], *scalars, cut.BN,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    dq_cuts, dkdv_cuts = cuts or (preferred(DQ, q), preferred(DKDV, q))
    key = (D, block_size, BM, q.dtype)
    first_fitting(("token blocks dq", *key), dq_cuts, block_size, q, launch_dq)
    first_fitting(("token blocks dkdv", *key), dkdv_cuts, block_size, q, launch_dkdv)
    return dq, dk, dv
