"""Interval attention in Triton: lists of living keys made on the device, then a flash kernel that gathers.

Scattered keys would touch nearly every tile of consecutive keys (3 % of 32K keys lie in 86 % of all tiles of
64), so tiles are made of living keys instead: one program per query block compacts the keys whose interval
meets the block, and the attention kernel walks over that list with the interval test for the corners.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

LOG2E = 1.4426950408889634
_CHUNK = 1024


@triton.jit
def load_tile(base, i_n, stride_n, i_d, inside, D, PADDED: tl.constexpr):
    """Rows ``i_n`` of a matrix; 0 where ``inside`` is False."""
    mask = inside[:, None]
    if PADDED:
        mask = mask & (i_d < D)[None, :]
    return tl.load(base + i_n[:, None].to(tl.int64) * stride_n + i_d[None, :], mask=mask, other=0.0)


@triton.jit
def _list_kernel(ends, lists, counts, n_queries, n_keys, Mq, L, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The keys that some query of a block sees, ascending; the count goes beyond L if they do not fit."""
    # The longest scans first.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    first = i_m * BLOCK + n_keys - n_queries
    stop = tl.minimum(first + BLOCK, n_keys)
    ends += i_bh * n_keys
    i_list = i_bh * Mq + i_m
    lists += i_list * L
    found = 0
    for start in range(0, stop, CHUNK):
        i_k = start + tl.arange(0, CHUNK)
        b_end = tl.load(ends + i_k, mask=i_k < stop, other=0)
        alive = ((b_end > first) & (b_end > i_k)).to(tl.int32)
        place = found + tl.cumsum(alive, 0) - 1
        tl.store(lists + place, i_k, mask=(alive > 0) & (place < L))
        found += tl.sum(alive, 0)
    tl.store(counts + i_list, found)


@triton.jit
def _forward_kernel(
    q, k, v, ends, bias, lists, counts, o, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    Hq, Hkv, n_queries, n_keys, D, Mq, L, scale_log2,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PADDED: tl.constexpr,
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
    k += i_b * stride_kb + i_hkv * stride_kh
    v += i_b * stride_vb + i_hkv * stride_vh
    i_keys = (i_b * Hkv + i_hkv) * n_keys
    i_list = (i_b * Hkv + i_hkv) * Mq + i_m * BM // BLOCK
    found = tl.load(counts + i_list)
    count = tl.minimum(found, L)

    b_o = tl.zeros([BM, BD], dtype=tl.float32)
    b_m = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, count, BN):
        listed = start + i_n < count
        i_k = tl.load(lists + i_list * L + start + i_n, mask=listed, other=0)
        b_end = tl.load(ends + i_keys + i_k, mask=listed, other=0)
        b_bias = tl.load(bias + i_keys + i_k, mask=listed, other=0.0)
        b_k = load_tile(k, i_k, stride_kn, i_d, listed, D, PADDED)
        b_v = load_tile(v, i_k, stride_vn, i_d, listed, D, PADDED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_s += (b_bias * 1.4426950408889634)[None, :]
        # Unlisted places have an end of 0: no query is before it.
        b_s = tl.where((i_k[None, :] <= i_q[:, None]) & (i_q[:, None] < b_end[None, :]), b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row may have seen nothing so far: keep -inf - (-inf) out.
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
        b_decay = tl.exp2(b_m - b_shift)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_l = b_l * b_decay + tl.sum(b_p, 1)
        b_o = b_o * b_decay[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        b_m = b_m_new

    b_empty = b_l == 0.0
    b_sum = tl.where(b_empty, 1.0, b_l)
    b_lse = tl.where(b_empty, float("-inf"), (b_m + tl.log2(b_sum)) * 0.6931471805599453)
    # Keys were left out because the caller's bound was wrong: say so rather than answer.
    wrong = tl.where(found > L, float("nan"), 0.0)
    b_o = b_o / b_sum[:, None] + wrong
    b_io = b_rows[:, None]
    if PADDED:
        b_io = b_io & (i_d < D)[None, :]
    i_out = (i_b * Hq + i_h) * n_queries
    tl.store(
        o + i_out * D + i_row[:, None].to(tl.int64) * D + i_d[None, :], b_o.to(o.dtype.element_ty), mask=b_io
    )
    tl.store(lse + i_out + i_row, b_lse + wrong, mask=b_rows)


def living_lists(
    ends: Int[Tensor, "B Hkv Nk"], n_queries: int, block: int, most: int
) -> tuple[Int[Tensor, "B Hkv Mq L"], Int[Tensor, "B Hkv Mq"]]:
    """Per query block its living keys and their number. Nothing waits for the device.

    A query sees at most ``most`` keys, so a block's first query and the keys born after it are
    ``most + block - 1`` at most.
    """
    B, Hkv, n_keys = ends.shape
    Mq, L = cdiv(n_queries, block), min(n_keys, most + block - 1)
    lists = torch.empty(B, Hkv, Mq, L, dtype=torch.int32, device=ends.device)
    counts = torch.empty(B, Hkv, Mq, dtype=torch.int32, device=ends.device)
    _list_kernel[(Mq, B * Hkv)](
        ends.contiguous(), lists, counts, n_queries, n_keys, Mq, L, BLOCK=block, CHUNK=_CHUNK
    )
    return lists, counts


def interval_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    ends: Int[Tensor, "B Hkv Nk"],
    bias: Float[Tensor, "B Hkv Nk"],
    most: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp. Deterministic: each program owns its rows."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    ends, bias = ends.contiguous(), bias.contiguous()
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys = k.shape[1:3]
    BD = max(16, next_power_of_2(D))
    BM, BN, warps, stages = _tile_sizes(BD, q.dtype)
    lists, counts = living_lists(ends, n_queries, BM, most)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _forward_kernel[(cdiv(n_queries, BM), B * Hq)](
        q, k, v, ends, bias, lists, counts, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        Hq, Hkv, n_queries, n_keys, D, lists.shape[2], lists.shape[3], scale * LOG2E,
        BLOCK=BM, BM=BM, BN=BN, BD=BD, PADDED=BD != D, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def _tile_sizes(BD: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BM, BN, warps, stages: what fits into the shared memory and registers of an H100/H200."""
    if dtype == torch.float32:
        return (64, 32, 4, 2) if BD <= 128 else (32, 32, 4, 1)
    if BD <= 64:
        return 128, 64, 4, 3
    if BD <= 128:
        return 128, 64, 8, 2
    return 64, 32, 8, 2
