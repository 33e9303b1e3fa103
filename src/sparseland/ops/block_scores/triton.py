"""Vertical and slash sums of the probe rows in Triton: K is read twice, no L x Nk matrix is stored.

The first kernel finds the rows' log-sum-exp over chunks of the keys. The second takes a tile of keys as
wide as the probe is high, recomputes its probabilities, and sums them along columns and, after a skew in
registers, along diagonals. A tile touches two runs of diagonals, the second shared with its neighbour's
first; each run goes to its own place and the two are added at the end: no atomics, so the result is
the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_LOG2E = 1.4426950408889634


@triton.jit
def _logits(
    b_q, k_base, stride_kn, i_k, i_row, i_d, n_keys, n_probe, D, scale_log2
):  # fmt: skip
    """Base-2 logits of one tile, -inf for the future, for rows past the probe and keys past the end."""
    b_load = (i_k < n_keys)[:, None] & (i_d < D)[None, :]
    b_k = tl.load(k_base + i_k[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_load, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    b_seen = i_k[None, :] <= (n_keys - n_probe + i_row)[:, None]
    b_seen = b_seen & (i_row < n_probe)[:, None] & (i_k < n_keys)[None, :]
    return tl.where(b_seen, b_s, float("-inf"))


@triton.jit
def _load_q(q, stride_qb, stride_qh, stride_qn, i_b, i_h, i_row, i_d, n_queries, n_probe, D):
    i_q = (n_queries - n_probe + i_row).to(tl.int64)
    b_load = (i_row < n_probe)[:, None] & (i_d < D)[None, :]
    q_base = q + i_b * stride_qb + i_h * stride_qh
    return tl.load(q_base + i_q[:, None] * stride_qn + i_d[None, :], mask=b_load, other=0.0)


@triton.jit
def _chunk_lse(
    q, k, lse, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    Hq, Hkv, n_queries, n_keys, n_probe, D, chunk, scale_log2, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_chunk, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_row, i_d = tl.arange(0, BL), tl.arange(0, BD)
    b_q = _load_q(q, stride_qb, stride_qh, stride_qn, i_b, i_h, i_row, i_d, n_queries, n_probe, D)
    k_base = k + i_b * stride_kb + (i_h // (Hq // Hkv)) * stride_kh
    b_m = tl.full([BL], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BL], dtype=tl.float32)
    for i_start in range(i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, n_keys), BL):
        i_k = i_start + tl.arange(0, BL)
        b_s = _logits(b_q, k_base, stride_kn, i_k, i_row, i_d, n_keys, n_probe, D, scale_log2)
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row may see none of a chunk: keep -inf - (-inf) out.
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
        b_l = b_l * tl.exp2(b_m - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
        b_m = b_m_new
    b_lse = tl.where(b_l == 0.0, float("-inf"), b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l)))
    i_out = (i_bh.to(tl.int64) * tl.num_programs(0) + i_chunk) * BL
    tl.store(lse + i_out + i_row, b_lse)


@triton.jit
def _sums(
    q, k, lse, vertical, low, high, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    Hq, Hkv, n_queries, n_keys, n_probe, D, scale_log2, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_row, i_d, i_c = tl.arange(0, BL), tl.arange(0, BD), tl.arange(0, BL)
    b_q = _load_q(q, stride_qb, stride_qh, stride_qn, i_b, i_h, i_row, i_d, n_queries, n_probe, D)
    k_base = k + i_b * stride_kb + (i_h // (Hq // Hkv)) * stride_kh
    i_k = i_tile * BL + i_c
    b_lse = tl.load(lse + i_bh.to(tl.int64) * BL + i_row)
    b_s = _logits(b_q, k_base, stride_kn, i_k, i_row, i_d, n_keys, n_probe, D, scale_log2)
    b_p = tl.exp2(b_s - b_lse[:, None])
    tl.store(vertical + i_bh.to(tl.int64) * n_keys + i_k, tl.sum(b_p, 0), mask=i_k < n_keys)
    # Skew: place (i, c) gets the column c + i; past the tile's end it is the diagonal c - BL.
    i_from = i_c[None, :] + i_row[:, None]
    b_skew = tl.gather(b_p, i_from % BL, 1)
    i_out = (i_bh.to(tl.int64) * tl.num_programs(0) + i_tile) * BL + i_c
    tl.store(high + i_out, tl.sum(tl.where(i_from < BL, b_skew, 0.0), 0))
    tl.store(low + i_out, tl.sum(tl.where(i_from >= BL, b_skew, 0.0), 0))


def probe_vertical_slash(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], n_probe: int, scale: float
) -> tuple[Float[Tensor, "B Hq Nk"], Float[Tensor, "B Hq Nk"]]:
    """Column and diagonal sums; at most 128 probe rows. Deterministic."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, Hq, n_queries, D = q.shape
    n_keys, n_probe = k.shape[2], min(n_probe, n_queries)
    BL = max(16, triton.next_power_of_2(n_probe))
    BD = max(16, triton.next_power_of_2(D))
    strides = (*q.stride()[:3], *k.stride()[:3])
    sizes = (Hq, k.shape[1], n_queries, n_keys, n_probe, D)
    tiles = triton.cdiv(n_keys, BL)
    # Enough programs for a large GPU, few enough that their partial sums stay small.
    chunk = BL * triton.cdiv(tiles, 64)
    chunks = triton.cdiv(n_keys, chunk)
    partial = torch.empty(B, Hq, chunks, BL, dtype=torch.float32, device=q.device)
    warps = 4 if BL * BD <= 64 * 64 else 8
    options = {"BL": BL, "BD": BD, "num_warps": warps, "num_stages": 2}
    _chunk_lse[(chunks, B * Hq)](q, k, partial, *strides, *sizes, chunk, scale * _LOG2E, **options)
    # Rows past the probe see nothing; +inf makes their probabilities 0.
    peak = partial.amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    lse = (partial - peak).exp2().sum(2).log2() + peak.squeeze(2)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()
    vertical = torch.empty(B, Hq, n_keys, dtype=torch.float32, device=q.device)
    low, high = torch.empty(2, B, Hq, tiles * BL, dtype=torch.float32, device=q.device)
    _sums[(tiles, B * Hq)](q, k, lse, vertical, low, high, *strides, *sizes, scale * _LOG2E, **options)
    # Diagonal d = j - i runs from -BL up: `high` of a tile starts at its first key, `low` BL before it.
    diagonals = torch.nn.functional.pad(low, (0, BL)) + torch.nn.functional.pad(high, (BL, 0))
    # Offset o is the diagonal Nk - L - o, which stands at place Nk - L - o + BL.
    start = BL - n_probe + 1
    return vertical, diagonals[..., start : start + n_keys].flip(-1)
