"""Blocks and columns in one Triton kernel: forward, one program per tile of queries and query head.

A program first walks over its listed blocks, then over its listed columns in gathered tiles, with one
running softmax. Both are the same loop over vectors of key positions. Lists ascend, so the keys that
need a causal test come last: each list is cut where they begin, and the part before runs without one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_LOG2E = 1.4426950408889634


@triton.jit
def _add_keys(
    b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, i_k, i_q, i_d, n_keys, D, scale_log2,
    MASKED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Adds the keys at positions ``i_k [BN]`` to the running output, maximum (base 2) and sum.

    MASKED hides the future; a position of ``n_keys`` or more is no key.
    """
    i_kn = i_k.to(tl.int64)[:, None]
    if MASKED:
        b_load = (i_k < n_keys)[:, None]
        if PADDED:
            b_load = b_load & (i_d < D)[None, :]
        b_k = tl.load(k_base + i_kn * stride_kn + i_d[None, :], mask=b_load, other=0.0)
        b_v = tl.load(v_base + i_kn * stride_vn + i_d[None, :], mask=b_load, other=0.0)
    elif PADDED:
        b_load = (i_d < D)[None, :]
        b_k = tl.load(k_base + i_kn * stride_kn + i_d[None, :], mask=b_load, other=0.0)
        b_v = tl.load(v_base + i_kn * stride_vn + i_d[None, :], mask=b_load, other=0.0)
    else:
        b_k = tl.load(k_base + i_kn * stride_kn + i_d[None, :])
        b_v = tl.load(v_base + i_kn * stride_vn + i_d[None, :])
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    if MASKED:
        b_s = tl.where(i_q[:, None] >= i_k[None, :], b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    if MASKED:
        # A row may have seen nothing so far: keep -inf - (-inf) out.
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    else:
        b_shift = b_m_new
    b_decay = tl.exp2(b_m - b_shift)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_o = b_o * b_decay[:, None]
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
    return b_o, b_m_new, b_l


@triton.jit
def _count_before(indices, count, limit, BC: tl.constexpr):
    """How many of the ascending ``indices[:count]`` are below ``limit``."""
    total = 0
    for i_start in range(0, count, BC):
        i_c = i_start + tl.arange(0, BC)
        b_index = tl.load(indices + i_c, mask=i_c < count, other=2147483647)
        total += tl.sum((b_index < limit).to(tl.int32), 0)
    return total


@triton.jit
def _forward(
    q, k, v, o, lse, block_counts, block_indices, column_counts, column_indices,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_cb, stride_ch,
    Hq, Hkv, n_queries, n_keys, D, Mq, Lb, Lc, scale_log2,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    # The longest programs first: late queries list most keys.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // Hq).to(tl.int64)
    i_h = (i_bh % Hq).to(tl.int64)
    i_hkv = i_h // (Hq // Hkv)
    i_row = i_m * BM + tl.arange(0, BM)
    first = i_m * BM + n_keys - n_queries
    i_q = i_row + n_keys - n_queries
    i_d = tl.arange(0, BD)
    b_rows = i_row < n_queries
    b_io = b_rows[:, None]
    if PADDED:
        b_io = b_io & (i_d < D)[None, :]
    q_base = q + i_b * stride_qb + i_h * stride_qh
    b_q = tl.load(q_base + i_row[:, None].to(tl.int64) * stride_qn + i_d[None, :], mask=b_io, other=0.0)
    k_base = k + i_b * stride_kb + i_hkv * stride_kh
    v_base = v + i_b * stride_vb + i_hkv * stride_vh

    b_o = tl.zeros([BM, BD], dtype=tl.float32)
    b_m = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)
    i_n = tl.arange(0, BN)

    # Strides of the lists count query blocks; they are 0 where all heads or rows share a list.
    i_list = i_b * stride_bb + i_h * stride_bh + i_m * BM // BLOCK
    block_list = block_indices + i_list * Lb
    n_blocks = tl.load(block_counts + i_list)
    # One tile per turn, not one block: what a turn loads is what the pipeline keeps in shared memory.
    PARTS: tl.constexpr = BLOCK // BN
    # Blocks that end at or before the first query: (index + 1) * BLOCK <= first + 1.
    n_seen = _count_before(block_list, n_blocks, (first + 1) // BLOCK, 128)
    for i in range(0, n_seen * PARTS):
        i_k = tl.load(block_list + i // PARTS) * BLOCK + i % PARTS * BN + i_n
        b_o, b_m, b_l = _add_keys(
            b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, i_k, i_q, i_d,
            n_keys, D, scale_log2, False, PADDED,
        )  # fmt: skip
    for i in range(n_seen * PARTS, n_blocks * PARTS):
        i_k = tl.load(block_list + i // PARTS) * BLOCK + i % PARTS * BN + i_n
        b_o, b_m, b_l = _add_keys(
            b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, i_k, i_q, i_d,
            n_keys, D, scale_log2, True, PADDED,
        )  # fmt: skip

    i_list = i_b * stride_cb + i_h * stride_ch + i_m * BM // BLOCK
    column_list = column_indices + i_list * Lc
    n_columns = tl.load(column_counts + i_list)
    n_seen = _count_before(column_list, n_columns, first + 1, 128) // BN * BN
    for i in range(0, n_seen, BN):
        i_k = tl.load(column_list + i + i_n)
        b_o, b_m, b_l = _add_keys(
            b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, i_k, i_q, i_d,
            n_keys, D, scale_log2, False, PADDED,
        )  # fmt: skip
    for i in range(n_seen, n_columns, BN):
        # Positions fit into int32, so its largest value is a key in every query's future.
        i_k = tl.load(column_list + i + i_n, mask=i + i_n < n_columns, other=2147483647)
        b_o, b_m, b_l = _add_keys(
            b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, i_k, i_q, i_d,
            n_keys, D, scale_log2, True, PADDED,
        )  # fmt: skip

    b_empty = b_l == 0.0
    b_sum = tl.where(b_empty, 1.0, b_l)
    b_o = b_o / b_sum[:, None]
    b_lse = tl.where(b_empty, float("-inf"), (b_m + tl.log2(b_sum)) * 0.6931471805599453)
    o_base = o + (i_b * Hq + i_h) * n_queries * D
    tl.store(o_base + i_row[:, None].to(tl.int64) * D + i_d[None, :], b_o.to(o.dtype.element_ty), mask=b_io)
    tl.store(lse + (i_b * Hq + i_h) * n_queries + i_row, b_lse, mask=b_rows)


def block_column_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    block_counts: Int[Tensor, "b h Mq"],
    block_indices: Int[Tensor, "b h Mq Lb"],
    column_counts: Int[Tensor, "b h Mq"],
    column_indices: Int[Tensor, "b h Mq Lc"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp. Deterministic: each program owns its rows."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    lists = [x.contiguous() for x in (block_counts, block_indices, column_counts, column_indices)]
    B, Hq, n_queries, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    BD = max(16, triton.next_power_of_2(D))
    BM, BN, warps, stages = _tile_sizes(block_size, BD, q.dtype)
    _forward[(triton.cdiv(n_queries, BM), B * Hq)](
        q, k, v, out, lse, *lists,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *_list_strides(lists[0]), *_list_strides(lists[2]),
        Hq, k.shape[1], n_queries, k.shape[2], D, lists[0].shape[2], lists[1].shape[3], lists[3].shape[3],
        scale * _LOG2E,
        BLOCK=block_size, BM=BM, BN=BN, BD=BD, PADDED=BD != D, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def _list_strides(counts: Int[Tensor, "b h Mq"]) -> tuple[int, int]:
    return tuple(0 if counts.shape[d] == 1 else counts.stride(d) for d in (0, 1))


def _tile_sizes(block_size: int, BD: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BM, BN (both divide the block size), warps, stages."""
    if dtype == torch.float32 or BD > 128:
        return min(block_size, 64), min(block_size, 32), 4, 2
    rows = min(block_size, 128)
    return rows, min(block_size, 64), 8 if rows * BD > 128 * 64 else 4, 3
