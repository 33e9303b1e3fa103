"""Gradients of block-sparse attention in Triton, deterministic: no atomics.

Two kernels share the recomputed probabilities p = exp(s - lse). One walks each query tile's list and
sums dq; the other walks each key tile's list of query blocks, the transposed lists, for every query
head of its group and sums dk and dv. The formulas stand in ``backward.py``.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops._rows import rows_from
from sparseland.ops.block_sparse_attention.triton import (
    LOG2E,
    UNSPECIALIZED,
    Tile,
    first_fitting,
    last_dim_dense,
    longest_first,
    next_tile,
    padded,
    preferred,
    rows_of,
)
from sparseland.patterns import cdiv

# As in triton.py; DQ loops over keys (BN rows at a time), DKDV over queries (BM rows at a time).
DQ = {
    64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
    128: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
    256: (Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
}
DKDV = {
    64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
    128: (Tile(64, 128, 8, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)),
    256: (Tile(32, 64, 8, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
}


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prepare_kernel(
    out, d_out, lse, d_lse, delta, lse2,
    stride_ob, stride_oh, stride_on, stride_db, stride_dh, stride_dn, stride_lb, stride_lh, stride_ln,
    H, Nq, Np, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * d_out) - d_lse, and lse in base 2; rows behind the last give p = 0."""
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_m = i_t * BM + tl.arange(0, BM)
    i_d = tl.arange(0, BD)
    inside = i_m < Nq
    tile = inside[:, None] & (i_d < D)[None, :]
    rows = i_m.to(tl.int64)
    out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    d_out += i_b.to(tl.int64) * stride_db + i_h.to(tl.int64) * stride_dh
    b_o = tl.load(out + rows[:, None] * stride_on + i_d[None, :], mask=tile, other=0.0).to(tl.float32)
    b_do = tl.load(d_out + rows[:, None] * stride_dn + i_d[None, :], mask=tile, other=0.0).to(tl.float32)
    d_lse += i_b.to(tl.int64) * stride_lb + i_h.to(tl.int64) * stride_lh
    b_dlse = tl.load(d_lse + rows * stride_ln, mask=inside, other=0.0)
    i_bh = (i_b * H + i_h).to(tl.int64)
    b_lse = tl.load(lse + i_bh * Nq + i_m, mask=inside, other=float("-inf"))
    unseen = b_lse == float("-inf")
    tl.store(delta + i_bh * Np + i_m, tl.where(unseen, 0.0, tl.sum(b_o * b_do, 1) - b_dlse), mask=i_m < Np)
    tl.store(lse2 + i_bh * Np + i_m, tl.where(unseen, float("inf"), b_lse * LOG2E), mask=i_m < Np)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _transpose_kernel(
    counts, indices, starts, t_counts, t_indices, stride_im, Mq, Mk, offset, probes,
    BS: tl.constexpr, CHUNK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """For one key block, the query blocks that list it and can see it: their number, or (FILL) their list."""
    i_j, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    counts += i_bh * Mq
    indices += i_bh * Mq * stride_im
    if FILL:
        t_indices += tl.load(starts + i_bh * Mk + i_j)
    found = 0
    for i_0 in range(tl.maximum(i_j * BS - offset, 0) // BS, Mq, CHUNK):
        i_i = i_0 + tl.arange(0, CHUNK)
        b_n = tl.load(counts + i_i, mask=i_i < Mq, other=0)
        p_list = indices + i_i.to(tl.int64) * stride_im
        # Binary search for i_j in CHUNK ascending lists at once.
        b_low = tl.zeros([CHUNK], tl.int32)
        b_high = b_n
        for _ in range(probes):
            open_ = b_low < b_high
            b_mid = (b_low + b_high) // 2
            right = tl.load(p_list + b_mid, mask=open_, other=0) < i_j
            b_low = tl.where(open_ & right, b_mid + 1, b_low)
            b_high = tl.where(open_ & (right == 0), b_mid, b_high)
        hit = (tl.load(p_list + b_low, mask=b_low < b_n, other=-1) == i_j).to(tl.int32)
        if FILL:
            tl.store(t_indices + found + tl.cumsum(hit, 0) - 1, i_i, mask=hit > 0)
        found += tl.sum(hit, 0)
    if not FILL:
        tl.store(t_counts + i_bh * Mk + i_j, found)


def transposed(
    counts: Int[Tensor, "b h Mq"], indices: Int[Tensor, "b h Mq L"], block_size: int, Mk: int, offset: int
) -> tuple[Int[Tensor, "b h Mk"], Int[Tensor, "b h Mk"], Int[Tensor, " n"]]:
    """Per key block its number of query blocks, where their ascending list starts, and all lists end to end.

    The space for the lists is what the given ones take, so nothing waits for the device.
    """
    b, h, Mq, L = indices.shape
    counts, indices = counts.contiguous(), indices.contiguous()
    t_counts = counts.new_empty(b, h, Mk)
    t_indices = counts.new_empty(b * h * Mq * L)
    starts = torch.empty(b, h, Mk, dtype=torch.int64, device=counts.device)
    for fill in (False, True):
        _transpose_kernel[(Mk, b * h)](
            counts, indices, starts, t_counts, t_indices, L, Mq, Mk, offset, L.bit_length(),
            block_size, 128, fill,
        )  # fmt: skip
        if not fill:
            flat = t_counts.flatten()
            starts = (flat.cumsum(0) - flat).view(b, h, Mk)
    return t_counts, starts, t_indices


@triton.jit
def _dq_walk(
    acc, b_q, b_do, b_lse, b_delta, k, v, stride_kn, stride_vn, indices, start, stop, position, Nk,
    scale_log2, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds to dq / scale over the key tiles of steps [start, stop)."""
    SUB: tl.constexpr = BS // BN
    i_n = tl.arange(0, BN)
    n0 = next_tile(indices, start, stop, SUB, BS, BN)
    for step in range(start, stop):
        b_k = rows_from(k, n0, stride_kn, Nk, D, BD, TMA, BN, MASKED)
        b_v = rows_from(v, n0, stride_vn, Nk, D, BD, TMA, BN, MASKED)
        following = next_tile(indices, step + 1, stop, SUB, BS, BN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        if MASKED:
            b_p = tl.where(position[:, None] >= (n0 + i_n)[None, :], b_p, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        acc = tl.dot(b_ds.to(b_k.dtype), b_k, acc, input_precision="ieee")
        n0 = following
    return acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dq_kernel(
    q, k, v, d_out, delta, lse2, dq, counts, indices, order,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_db, stride_dh, stride_dn, stride_cb, stride_ch, stride_ib, stride_ih, stride_im,
    H, G, Nq, Nk, Np, scale, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_hk = i_h // G
    i_block = tl.load(order + i_b * stride_cb + i_h * stride_ch + i_t // (BS // BM))
    m0 = i_block * BS + i_t % (BS // BM) * BM
    if m0 >= Nq:
        return

    i_m = tl.arange(0, BM)
    i_d = tl.arange(0, BD)
    q += i_b * stride_qb + i_h.to(tl.int64) * stride_qh
    d_out += i_b * stride_db + i_h.to(tl.int64) * stride_dh
    b_q = rows_from(q, m0, stride_qn, Nq, D, BD, False, BM, True)
    b_do = rows_from(d_out, m0, stride_dn, Nq, D, BD, False, BM, True)
    i_row = (i_b * H + i_h) * Np + m0
    b_lse = tl.load(lse2 + i_row + i_m)
    b_delta = tl.load(delta + i_row + i_m)
    k = rows_of(k, i_b * stride_kb + i_hk.to(tl.int64) * stride_kh, stride_kn, Nk, D, BD, TMA, BN)
    v = rows_of(v, i_b * stride_vb + i_hk.to(tl.int64) * stride_vh, stride_vn, Nk, D, BD, TMA, BN)

    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_block)
    indices += i_b * stride_ib + i_h.to(tl.int64) * stride_ih + i_block.to(tl.int64) * stride_im
    first = m0 + Nk - Nq
    whole = count
    while tl.load(indices + whole - 1, mask=whole > 0, other=-1) >= (first + 1) // BS:
        whole -= 1

    SUB: tl.constexpr = BS // BN
    position = first + i_m
    acc = tl.zeros([BM, BD], tl.float32)
    acc = _dq_walk(
        acc, b_q, b_do, b_lse, b_delta, k, v, stride_kn, stride_vn, indices, 0, whole * SUB, position, Nk,
        scale_log2, D, BD, BS, BN, False, TMA,
    )  # fmt: skip
    acc = _dq_walk(
        acc, b_q, b_do, b_lse, b_delta, k, v, stride_kn, stride_vn, indices, whole * SUB, count * SUB,
        position, Nk, scale_log2, D, BD, BS, BN, True, TMA,
    )  # fmt: skip
    dq += ((i_b * H + i_h) * Nq + m0) * D + i_m[:, None] * D + i_d[None, :]
    tl.store(dq, (acc * scale).to(dq.dtype.element_ty), mask=(m0 + i_m < Nq)[:, None] & (i_d < D)[None, :])


@triton.jit
def _dkdv_walk(
    b_dk, b_dv, b_k, b_v, q, d_out, delta, lse2, stride_qn, stride_dn, indices, start, stop, i_n, Nq, offset,
    scale_log2, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds to dk / scale and dv over the query tiles of steps [start, stop) of one head."""
    SUB: tl.constexpr = BS // BM
    i_m = tl.arange(0, BM)
    m0 = next_tile(indices, start, stop, SUB, BS, BM)
    for step in range(start, stop):
        b_q = rows_from(q, m0, stride_qn, Nq, D, BD, TMA, BM, not EVEN)
        b_do = rows_from(d_out, m0, stride_dn, Nq, D, BD, TMA, BM, not EVEN)
        b_lse = tl.load(lse2 + m0 + i_m)
        b_delta = tl.load(delta + m0 + i_m)
        following = next_tile(indices, step + 1, stop, SUB, BS, BM)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        if MASKED:
            b_p = tl.where((m0 + i_m + offset)[None, :] >= i_n[:, None], b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        m0 = following
    return b_dk, b_dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dkdv_kernel(
    q, k, v, d_out, delta, lse2, dk, dv, t_counts, starts, t_indices, order,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_db, stride_dh, stride_dn, stride_cb, stride_ch, stride_ob, stride_oh,
    H, G, Nq, Nk, Np, scale, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i_t, i_hk, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_block = tl.load(order + i_b * stride_ob + i_hk * stride_oh + i_t // (BS // BN))
    n0 = i_block * BS + i_t % (BS // BN) * BN
    if n0 >= Nk:
        return

    i_n = tl.arange(0, BN)
    i_d = tl.arange(0, BD)
    b_k = rows_from(k + i_b * stride_kb + i_hk * stride_kh, n0, stride_kn, Nk, D, BD, False, BN, True)
    b_v = rows_from(v + i_b * stride_vb + i_hk * stride_vh, n0, stride_vn, Nk, D, BD, False, BN, True)
    # Query blocks before `visible` have a row that does not see the whole tile; they begin the lists.
    offset = Nk - Nq
    visible = (tl.maximum(n0 + BN - 1 - offset, 0) + BS - 1) // BS

    SUB: tl.constexpr = BS // BM
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for i_g in range(0, G):
        i_h = i_hk * G + i_g
        i_list = i_b * stride_cb + i_h * stride_ch + i_block
        count = tl.load(t_counts + i_list)
        p_list = t_indices + tl.load(starts + i_list)
        partly = 0
        while tl.load(p_list + partly, mask=partly < count, other=visible) < visible:
            partly += 1
        p_q = rows_of(q, i_b * stride_qb + i_h * stride_qh, stride_qn, Nq, D, BD, TMA, BM)
        p_do = rows_of(d_out, i_b * stride_db + i_h * stride_dh, stride_dn, Nq, D, BD, TMA, BM)
        p_delta = delta + (i_b * H + i_h) * Np
        p_lse = lse2 + (i_b * H + i_h) * Np
        b_dk, b_dv = _dkdv_walk(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_delta, p_lse, stride_qn, stride_dn, p_list, 0, partly * SUB,
            n0 + i_n, Nq, offset, scale_log2, D, BD, BS, BM, EVEN, True, TMA,
        )  # fmt: skip
        b_dk, b_dv = _dkdv_walk(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_delta, p_lse, stride_qn, stride_dn, p_list, partly * SUB,
            count * SUB, n0 + i_n, Nq, offset, scale_log2, D, BD, BS, BM, EVEN, False, TMA,
        )  # fmt: skip
    inside = (n0 + i_n < Nk)[:, None] & (i_d < D)[None, :]
    i_row = ((i_b * (H // G) + i_hk) * Nk + n0) * D + i_n[:, None] * D + i_d[None, :]
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
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    block_size: int,
    scale: float,
    tiles: tuple[tuple[Tile, ...], tuple[Tile, ...]] | None = None,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hkv Nk D"], Float[Tensor, "B Hkv Nk D"]]:
    """Gradients of q, k and v in their own types; ``tiles`` (dq, dk and dv) replaces the tables above."""
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1:3]
    Mq, Mk, G, BD = counts.shape[2], cdiv(Nk, block_size), H // Hkv, padded(D)
    Np = Mq * block_size
    q, k, v, d_out, out, indices = (last_dim_dense(t) for t in (q, k, v, d_out, out, indices))
    lse = lse.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta, lse2 = (lse.new_empty(B, H, Np) for _ in range(2))
    _prepare_kernel[(cdiv(Np, 16), H, B)](
        out, d_out, lse, d_lse, delta, lse2, *out.stride()[:3], *d_out.stride()[:3], *d_lse.stride(),
        H, Nq, Np, D, BD, 16,
    )  # fmt: skip
    scalars = (H, G, Nq, Nk, Np, scale, scale * LOG2E.value, D, BD, block_size)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])

    t_counts, starts, t_indices = transposed(counts, indices, block_size, Mk, Nk - Nq)
    # One program serves all query heads of a key head: order by what they list together.
    shared = t_counts.expand(-1, H, -1).unflatten(1, (Hkv, G)).sum(2)
    t_order = longest_first(shared).expand(B, Hkv, Mk)
    t_counts, starts = (t.expand(B, H, Mk) for t in (t_counts, starts))
    order = longest_first(counts).expand(B, H, Mq)
    counts, indices = counts.contiguous().expand(B, H, -1), indices.expand(B, H, -1, -1)
    even = Nq % block_size == 0

    def launch_dq(tile: Tile) -> None:
        _dq_kernel[(Mq * (block_size // tile.BM), H, B)](
            q, k, v, d_out, delta, lse2, dq, counts, indices, order, *strides, *counts.stride()[:2],
            *indices.stride()[:3], *scalars, tile.BM, tile.BN, tile.tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def launch_dkdv(tile: Tile) -> None:
        _dkdv_kernel[(Mk * (block_size // tile.BN), Hkv, B)](
            q, k, v, d_out, delta, lse2, dk, dv, t_counts, starts, t_indices, t_order, *strides,
            *t_counts.stride()[:2], *t_order.stride()[:2], *scalars, tile.BM, tile.BN, even, tile.tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    dq_tiles, dkdv_tiles = tiles or (preferred(DQ, q), preferred(DKDV, q))
    first_fitting(("dq", D, block_size, q.dtype), dq_tiles, block_size, q, launch_dq)
    first_fitting(("dkdv", D, block_size, q.dtype), dkdv_tiles, block_size, q, launch_dkdv)
    return dq, dk, dv
