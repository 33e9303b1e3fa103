"""Window attention in Triton: forward, one program per tile of queries and query head, no lists.

A program walks over three runs of key tiles: the sinks that lie before its band, the start of the band
(masked: its left edge cuts rows differently), the inner tiles (no mask at all) and the causal edge.
Dense causal attention is the case without sinks and without a left edge.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

_LOG2E = 1.4426950408889634


@triton.jit
def _tiles(
    b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, start, stop, i_q, i_d,
    n_keys, D, sinks, window, scale_log2,
    BN: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles [start, stop) to the running output, maximum (base 2) and sum."""
    for i_tile in range(start, stop):
        i_k = i_tile * BN + tl.arange(0, BN)
        # Keys past the end are hidden by causality; MASKED tiles must not load them.
        if MASKED:
            b_valid = i_k < n_keys
            if PADDED:
                b_load = b_valid[:, None] & (i_d < D)[None, :]
            else:
                b_load = b_valid[:, None]
            b_k = tl.load(
                k_base + i_k[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_load, other=0.0
            )
            b_v = tl.load(
                v_base + i_k[:, None].to(tl.int64) * stride_vn + i_d[None, :], mask=b_load, other=0.0
            )
        elif PADDED:
            b_load = (i_d < D)[None, :]
            b_k = tl.load(
                k_base + i_k[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_load, other=0.0
            )
            b_v = tl.load(
                v_base + i_k[:, None].to(tl.int64) * stride_vn + i_d[None, :], mask=b_load, other=0.0
            )
        else:
            b_k = tl.load(k_base + i_k[:, None].to(tl.int64) * stride_kn + i_d[None, :])
            b_v = tl.load(v_base + i_k[:, None].to(tl.int64) * stride_vn + i_d[None, :])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        if MASKED:
            b_distance = i_q[:, None] - i_k[None, :]
            b_near = (b_distance < window) | (i_k < sinks)[None, :]
            b_s = tl.where((b_distance >= 0) & b_near, b_s, float("-inf"))
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
        b_m = b_m_new
    return b_o, b_m, b_l


@triton.jit
def _forward(
    q, k, v, o, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    Hq, Hkv, n_queries, n_keys, D, sinks, window, scale_log2,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    # The longest programs first: late queries see most keys.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // Hq).to(tl.int64)
    i_h = (i_bh % Hq).to(tl.int64)
    i_hkv = i_h // (Hq // Hkv)
    offset = n_keys - n_queries
    i_row = i_m * BM + tl.arange(0, BM)
    i_q = i_row + offset
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

    first = i_m * BM + offset
    last = tl.minimum(i_m * BM + BM, n_queries) - 1 + offset
    # Tiles [band, stop) hold the band; [band, inner) and [edge, stop) need the mask.
    low = tl.maximum(first - window + 1, 0)
    band = low // BN
    stop = last // BN + 1
    edge = tl.maximum((first + 1) // BN, band)
    inner = tl.minimum((tl.maximum(last - window + 1, 0) + BN - 1) // BN, edge)
    inner = tl.maximum(inner, band)
    sink_stop = tl.minimum((sinks + BN - 1) // BN, band)
    b_o, b_m, b_l = _tiles(
        b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, 0, sink_stop, i_q, i_d,
        n_keys, D, sinks, window, scale_log2, BN, True, PADDED,
    )  # fmt: skip
    b_o, b_m, b_l = _tiles(
        b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, band, inner, i_q, i_d,
        n_keys, D, sinks, window, scale_log2, BN, True, PADDED,
    )  # fmt: skip
    b_o, b_m, b_l = _tiles(
        b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, inner, edge, i_q, i_d,
        n_keys, D, sinks, window, scale_log2, BN, False, PADDED,
    )  # fmt: skip
    b_o, b_m, b_l = _tiles(
        b_o, b_m, b_l, b_q, k_base, v_base, stride_kn, stride_vn, edge, stop, i_q, i_d,
        n_keys, D, sinks, window, scale_log2, BN, True, PADDED,
    )  # fmt: skip

    b_empty = b_l == 0.0
    b_sum = tl.where(b_empty, 1.0, b_l)
    b_o = b_o / b_sum[:, None]
    b_lse = tl.where(b_empty, float("-inf"), (b_m + tl.log2(b_sum)) * 0.6931471805599453)
    o_base = o + (i_b * Hq + i_h) * n_queries * D
    tl.store(o_base + i_row[:, None].to(tl.int64) * D + i_d[None, :], b_o.to(o.dtype.element_ty), mask=b_io)
    tl.store(lse + (i_b * Hq + i_h) * n_queries + i_row, b_lse, mask=b_rows)


def window_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    sinks: int,
    window: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp. Deterministic: each program owns its rows."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, Hq, n_queries, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    BD = max(16, next_power_of_2(D))
    BM, BN, warps, stages = _tile_sizes(BD, q.dtype)
    _forward[(cdiv(n_queries, BM), B * Hq)](
        q, k, v, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        Hq, k.shape[1], n_queries, k.shape[2], D, sinks, window, scale * _LOG2E,
        BM=BM, BN=BN, BD=BD, PADDED=BD != D, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def _tile_sizes(BD: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BM, BN, warps, stages: what fits into the shared memory and registers of an H100/H200."""
    if dtype == torch.float32:
        return (64, 32, 4, 2) if BD <= 128 else (32, 32, 4, 2)
    if BD <= 64:
        return 128, 64, 4, 3
    if BD <= 128:
        return 128, 64, 8, 3
    return 64, 64, 8, 2
