"""One program per query block and head reads the keys twice: for the log-sum-exp, then for the maxima.

Recomputing the logits costs less memory than the alternative, each row's maximum of each block kept until
the denominators are known: that would be ``[B, Hq, Nq, Mk]``.
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
def _logits(
    b_q, k, stride_kn, n0, position, Nk, scale_log2, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Base-2 logits of one tile, -inf for the future and for keys past the end."""
    i_n, i_d = n0 + tl.arange(0, BN), tl.arange(0, BD)
    b_in = (i_n < Nk)[:, None] & (i_d < D)[None, :]
    b_k = tl.load(k + i_n[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_in, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    b_seen = (i_n[None, :] <= position[:, None]) & (i_n < Nk)[None, :]
    return tl.where(b_seen, b_s, float("-inf"))


@triton.jit
def _kernel(
    q, k, out, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    Hq, G, Nq, Nk, M, Mk, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    # The last query blocks read most: they start first.
    i_t, i_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_m, i_d = i_t * BS + tl.arange(0, BS), tl.arange(0, BD)
    p_q = q + i_b * stride_qb + i_h * stride_qh + i_m[:, None].to(tl.int64) * stride_qn + i_d[None, :]
    b_q = tl.load(p_q, mask=(i_m < Nq)[:, None] & (i_d < D)[None, :], other=0.0)
    k += i_b * stride_kb + (i_h // G) * stride_kh
    position = i_m + (Nk - Nq)
    end = tl.minimum(i_t * BS + BS, Nq) + (Nk - Nq)

    b_m = tl.full([BS], float("-inf"), tl.float32)
    b_l = tl.zeros([BS], tl.float32)
    for n0 in range(0, end, BN):
        b_s = _logits(b_q, k, stride_kn, n0, position, Nk, scale_log2, D, BD, BN)
        b_max = tl.maximum(b_m, tl.max(b_s, 1))
        # Key 0 is seen by all, but a NaN's maximum may be -inf: keep -inf - (-inf) out.
        b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_l = b_l * tl.exp2(b_m - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
        b_m = b_max
    # +inf makes the probabilities of rows past the end 0.
    b_lse = tl.where((i_m < Nq) & (b_l > 0), b_m + tl.log2(tl.where(b_l > 0, b_l, 1.0)), float("inf"))

    i_row = (i_bh.to(tl.int64) * M + i_t) * Mk
    if PER_QUERY:
        i_rows = (i_bh.to(tl.int64) * M + i_m) * Mk
    for block in range(0, tl.cdiv(end, BS)):
        b_best = tl.full([BS], float("-inf"), tl.float32)
        for part in tl.static_range(BS // BN):
            b_s = _logits(b_q, k, stride_kn, block * BS + part * BN, position, Nk, scale_log2, D, BD, BN)
            b_best = tl.maximum(b_best, tl.max(b_s, 1))
        b_p = tl.exp2(b_best - b_lse)
        if PER_QUERY:
            tl.store(out + i_rows + block, b_p, mask=i_m < Nq)
        else:
            tl.store(out + i_row + block, tl.max(b_p, 0))


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    scale: float,
    per_query: bool,
) -> Float[Tensor, "B Hq M Mk"]:
    """Blocks of 16, 32, 64 or 128 tokens."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, Hq, Nq, D = q.shape
    Nk, tiles = k.shape[2], cdiv(Nq, block_size)
    M, Mk = Nq if per_query else tiles, cdiv(Nk, block_size)
    # Zeros: programs do not write what lies in their future.
    out = torch.zeros(B, Hq, M, Mk, dtype=torch.float32, device=q.device)
    BD = max(16, next_power_of_2(D))
    # float32 products use no tensor cores: smaller tiles, or registers spill.
    widest = 32 if q.dtype == torch.float32 or BD > 128 else 64
    _kernel[(tiles, B * Hq)](
        q, k, out, *q.stride()[:3], *k.stride()[:3], Hq, Hq // k.shape[1], Nq, Nk, M, Mk, scale * _LOG2E,
        D, BD, block_size, min(block_size, widest), per_query,
        num_warps=8 if block_size * BD > 64 * 64 else 4, num_stages=2,
    )  # fmt: skip
    return out
