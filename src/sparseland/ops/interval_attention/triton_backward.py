"""Gradients of interval attention in Triton, without atomics (deterministic). Formulas: ``backward.py``.

The queries' pass walks each query block's list of living keys. The keys' pass takes the keys in the order of
their ends (then of their births), so that a tile's keys live at about the same time, and walks over the
queries of the tile's common span for every query head of the group. Keys that nobody sees come last; their
tiles have an empty span.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.interval_attention.triton import LOG2E, living_lists, load_tile
from sparseland.patterns import cdiv, next_power_of_2


@triton.jit
def _dq_kernel(
    q, k, v, ends, bias, lists, counts, d_out, delta, lse, d_q,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_db, stride_dh, stride_dn,
    Hq, Hkv, n_queries, n_keys, D, Mq, L, scale, scale_log2,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_hkv = i_h // (Hq // Hkv)
    i_row = i_m * BM + tl.arange(0, BM)
    i_q = i_row + n_keys - n_queries
    i_d = tl.arange(0, BD)
    i_n = tl.arange(0, BN)
    b_rows = i_row < n_queries
    b_q = load_tile(q + i_b * stride_qb + i_h * stride_qh, i_row, stride_qn, i_d, b_rows, D, PADDED)
    b_do = load_tile(d_out + i_b * stride_db + i_h * stride_dh, i_row, stride_dn, i_d, b_rows, D, PADDED)
    i_rows = (i_b * Hq + i_h) * n_queries + i_row
    b_lse = tl.load(lse + i_rows, mask=b_rows, other=float("inf"))
    b_delta = tl.load(delta + i_rows, mask=b_rows, other=0.0)
    k += i_b * stride_kb + i_hkv * stride_kh
    v += i_b * stride_vb + i_hkv * stride_vh
    i_keys = (i_b * Hkv + i_hkv) * n_keys
    i_list = (i_b * Hkv + i_hkv) * Mq + i_m
    count = tl.minimum(tl.load(counts + i_list), L)

    acc = tl.zeros([BM, BD], dtype=tl.float32)
    for start in range(0, count, BN):
        listed = start + i_n < count
        i_k = tl.load(lists + i_list * L + start + i_n, mask=listed, other=0)
        b_end = tl.load(ends + i_keys + i_k, mask=listed, other=0)
        b_bias = tl.load(bias + i_keys + i_k, mask=listed, other=0.0)
        b_k = load_tile(k, i_k, stride_kn, i_d, listed, D, PADDED)
        b_v = load_tile(v, i_k, stride_vn, i_d, listed, D, PADDED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_s += (b_bias * 1.4426950408889634)[None, :]
        seen = (i_k[None, :] <= i_q[:, None]) & (i_q[:, None] < b_end[None, :])
        b_p = tl.where(seen, tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        acc = tl.dot(b_ds.to(b_k.dtype), b_k, acc, input_precision="ieee")
    b_io = b_rows[:, None]
    if PADDED:
        b_io = b_io & (i_d < D)[None, :]
    d_q += (i_b * Hq + i_h) * n_queries * D + i_row[:, None].to(tl.int64) * D + i_d[None, :]
    tl.store(d_q, (acc * scale).to(d_q.dtype.element_ty), mask=b_io)


@triton.jit
def _dkdv_kernel(
    q, k, v, ends, bias, order, d_out, delta, lse, d_k, d_v, d_bias,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_db, stride_dh, stride_dn,
    Hkv, G, n_queries, n_keys, D, scale, scale_log2,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1)
    i_b, i_hkv = (i_bh // Hkv).to(tl.int64), (i_bh % Hkv).to(tl.int64)
    offset = n_keys - n_queries
    i_m = tl.arange(0, BM)
    i_d = tl.arange(0, BD)
    # The last keys of the order live longest, and those behind them cost nothing: start from the end.
    i_place = (tl.num_programs(0) - 1 - tl.program_id(0)) * BN + tl.arange(0, BN)
    inside = i_place < n_keys
    i_keys = (i_b * Hkv + i_hkv) * n_keys
    i_k = tl.load(order + i_keys + i_place, mask=inside, other=0)
    b_end = tl.load(ends + i_keys + i_k, mask=inside, other=0)
    b_bias = tl.load(bias + i_keys + i_k, mask=inside, other=0.0) * 1.4426950408889634
    b_k = load_tile(k + i_b * stride_kb + i_hkv * stride_kh, i_k, stride_kn, i_d, inside, D, PADDED)
    b_v = load_tile(v + i_b * stride_vb + i_hkv * stride_vh, i_k, stride_vn, i_d, inside, D, PADDED)

    # Rows of the span in which some key of the tile is seen.
    born = tl.maximum(i_k - offset, 0)
    gone = tl.minimum(b_end - offset, n_queries)
    lives = (b_end > i_k) & (gone > born)
    low = tl.min(tl.where(lives, born, n_queries), 0) // BM * BM
    high = tl.max(tl.where(lives, gone, 0), 0)

    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BD], dtype=tl.float32)
    b_db = tl.zeros([BN], dtype=tl.float32)
    for i_g in range(0, G):
        i_h = i_hkv * G + i_g
        q_base = q + i_b * stride_qb + i_h * stride_qh
        do_base = d_out + i_b * stride_db + i_h * stride_dh
        i_rows = (i_b * Hkv * G + i_h) * n_queries
        for start in range(low, high, BM):
            i_row = start + i_m
            b_rows = i_row < n_queries
            b_q = load_tile(q_base, i_row, stride_qn, i_d, b_rows, D, PADDED)
            b_do = load_tile(do_base, i_row, stride_dn, i_d, b_rows, D, PADDED)
            b_lse = tl.load(lse + i_rows + i_row, mask=b_rows, other=float("inf"))
            b_delta = tl.load(delta + i_rows + i_row, mask=b_rows, other=0.0)
            i_q = i_row + offset
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2 + b_bias[:, None]
            seen = (i_k[:, None] <= i_q[None, :]) & (i_q[None, :] < b_end[:, None])
            b_p = tl.where(seen, tl.exp2(b_s - b_lse[None, :]), 0.0)
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_db += tl.sum(b_ds, 1)
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    b_io = inside[:, None]
    if PADDED:
        b_io = b_io & (i_d < D)[None, :]
    i_out = (i_keys + i_k)[:, None].to(tl.int64) * D + i_d[None, :]
    tl.store(d_k + i_out, (b_dk * scale).to(d_k.dtype.element_ty), mask=b_io)
    tl.store(d_v + i_out, b_dv.to(d_v.dtype.element_ty), mask=b_io)
    tl.store(d_bias + i_keys + i_k, b_db, mask=inside)


def backward(
    d_out: Float[Tensor, "B Hq Nq D"],
    d_lse: Float[Tensor, "B Hq Nq"],
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    ends: Int[Tensor, "B Hkv Nk"],
    bias: Float[Tensor, "B Hkv Nk"],
    out: Float[Tensor, "B Hq Nq D"],
    lse: Float[Tensor, "B Hq Nq"],
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(d_q, d_k, d_v, d_bias)`` in the inputs' types."""
    q, k, v, d_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, d_out))
    ends, bias = ends.contiguous(), bias.contiguous()
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys = k.shape[1:3]
    BD = max(16, next_power_of_2(D))
    BM, BN, warps, stages = _tile_sizes(BD, q.dtype)
    delta = (out.float() * d_out.float()).sum(-1) - d_lse.float()
    # In base 2; +inf makes every probability of a query that sees nothing 0.
    lse2 = torch.where(lse == -torch.inf, torch.inf, lse * LOG2E).contiguous()
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    d_bias = torch.empty(bias.shape, dtype=torch.float32, device=k.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    tiles = {"BM": BM, "BN": BN, "BD": BD, "PADDED": BD != D, "num_warps": warps, "num_stages": stages}
    lists, counts = living_lists(ends, n_queries, BM, most)
    _dq_kernel[(cdiv(n_queries, BM), B * Hq)](
        q, k, v, ends, bias, lists, counts, d_out, delta, lse2, d_q, *strides,
        Hq, Hkv, n_queries, n_keys, D, lists.shape[2], lists.shape[3], scale, scale * LOG2E, **tiles,
    )  # fmt: skip
    order = by_end(ends, n_queries)
    _dkdv_kernel[(cdiv(n_keys, BN), B * Hkv)](
        q, k, v, ends, bias, order, d_out, delta, lse2, d_k, d_v, d_bias, *strides,
        Hkv, Hq // Hkv, n_queries, n_keys, D, scale, scale * LOG2E, **tiles,
    )  # fmt: skip
    return d_q, d_k, d_v, d_bias.to(bias.dtype)


def by_end(ends: Int[Tensor, "B Hkv Nk"], n_queries: int) -> Int[Tensor, "B Hkv Nk"]:
    """The keys in the order of their ends, then of their births; those that no query sees at the end."""
    n_keys = ends.shape[2]
    key = torch.arange(n_keys, device=ends.device)
    first = key.clamp(min=n_keys - n_queries)
    rank = ends.long() * (n_keys + 1) + key
    never = (n_keys + 2) ** 2
    return torch.where(ends > first, rank, never).argsort(dim=-1, stable=True).to(torch.int32)


def _tile_sizes(BD: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BM, BN, warps, stages of both passes."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if BD <= 128 else (16, 16, 4, 1)
    if BD <= 64:
        return 64, 64, 4, 2
    if BD <= 128:
        return 64, 64, 8, 2
    return 32, 32, 4, 1
