"""Pooling in registers, and one program per row of scores that writes the row's list.

The k-th largest score is found by its bits, highest first: with floats mapped to integers of the same order,
31 counts of "how many are at least this" fix them. No sort, and ties go to the earlier block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _store_pooled(
    out, b_x, b_rows, b_cols, count, column, D: tl.constexpr, EXTREMES: tl.constexpr
):  # fmt: skip
    """Statistics of one tile's rows; ``out`` points at the block's first number."""
    b_mean = tl.sum(tl.where(b_rows[:, None], b_x, 0.0), 0) / count
    i_c = column + tl.arange(0, b_x.shape[1])
    if EXTREMES:
        tl.store(out + i_c, tl.max(tl.where(b_rows[:, None], b_x, float("-inf")), 0), mask=b_cols)
        tl.store(out + D + i_c, tl.min(tl.where(b_rows[:, None], b_x, float("inf")), 0), mask=b_cols)
        out += 2 * D
    tl.store(out + i_c, b_mean, mask=b_cols)


@triton.jit
def _pool_kernel(
    x, cos, sin, out, stride_b, stride_h, stride_n, stride_c, stride_s, H, N, M,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
    EXTREMES: tl.constexpr,
):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_n = i_m * BS + tl.arange(0, BS)
    b_rows = i_n < N
    count = tl.minimum(N - i_m * BS, BS).to(tl.float32)
    i_row = i_n[:, None].to(tl.int64)
    x += i_b * stride_b + i_h * stride_h + i_row * stride_n
    out += (i_bh.to(tl.int64) * M + i_m) * (3 * D if EXTREMES else D)
    if HALF > 0:
        i_c = tl.arange(0, BH)
        b_cols = i_c < HALF
        b_in = b_rows[:, None] & b_cols[None, :]
        b_a = tl.load(x + i_c[None, :], mask=b_in, other=0.0).to(tl.float32)
        b_b = tl.load(x + HALF + i_c[None, :], mask=b_in, other=0.0).to(tl.float32)
        # Tables come from one tensor, but are read by their own strides.
        b_c = tl.load(cos + i_row * stride_c + i_c[None, :], mask=b_in, other=1.0).to(tl.float32)
        b_s = tl.load(sin + i_row * stride_s + i_c[None, :], mask=b_in, other=0.0).to(tl.float32)
        b_size = b_c * b_c + b_s * b_s
        b_c, b_s = b_c / b_size, b_s / b_size
        _store_pooled(out, b_a * b_c + b_b * b_s, b_rows, b_cols, count, 0, D, EXTREMES)
        _store_pooled(out, b_b * b_c - b_a * b_s, b_rows, b_cols, count, HALF, D, EXTREMES)
    if BP > 0:
        i_p = tl.arange(0, BP)
        b_cols = i_p < D - 2 * HALF
        p_x = x + 2 * HALF + i_p[None, :]
        b_p = tl.load(p_x, mask=b_rows[:, None] & b_cols[None, :], other=0.0).to(tl.float32)
        _store_pooled(out, b_p, b_rows, b_cols, count, 2 * HALF, D, EXTREMES)


def pool(
    x: Float[Tensor, "B H N D"],
    cos: Float[Tensor, "N R2"],
    sin: Float[Tensor, "N R2"],
    block_size: int,
    extremes: bool,
) -> Float[Tensor, "B H M C"]:
    """Blocks of 16, 32, 64 or 128 tokens: each program turns and pools one block of one head."""
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    B, H, N, D = x.shape
    M, half = cdiv(N, block_size), cos.shape[1]
    out = torch.empty(B, H, M, 3 * D if extremes else D, dtype=torch.float32, device=x.device)
    rest = D - 2 * half
    BH, BP = (next_power_of_2(n) if n else 0 for n in (half, rest))
    # A program holds four tiles at once: two halves of the channels, cosine and sine.
    warps = 4 if block_size * max(BH, BP) <= 2048 else 8
    _pool_kernel[(M, B * H)](
        x, cos, sin, out, *x.stride()[:3], cos.stride(0), sin.stride(0), H, N, M,
        D, half, BH, BP, block_size, extremes, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def _ordered(b_s):
    """Integers in the order of these floats (0 and -0 alike)."""
    b_bits = tl.where(b_s == 0.0, 0.0, b_s).to(tl.int32, bitcast=True)
    return tl.where(b_bits >= 0, b_bits, b_bits ^ 0x7FFFFFFF)


@triton.jit
def _largest(b_rank, b_seen, top):
    """Marks the ``top`` largest of the seen (none if below 1), ties to the earlier."""
    b_key = _ordered(b_rank)
    positive = tl.sum((b_seen & (b_key >= 0)).to(tl.int32), 0)
    # The largest number that at least `top` keys reach.
    bound = tl.where(positive >= top, 0, -2147483648)
    for i in range(0, 31):
        trial = bound + (1 << (30 - i))
        reached = tl.sum((b_seen & (b_key >= trial)).to(tl.int32), 0)
        bound = tl.where(reached >= top, trial, bound)
    b_above = b_seen & (b_key > bound)
    b_tie = b_seen & (b_key == bound)
    room = top - tl.sum(b_above.to(tl.int32), 0)
    return b_above | (b_tie & (tl.cumsum(b_tie.to(tl.int32), 0) <= room))


# Sizes that change from prompt to prompt: compiling again for each would gain nothing.
_UNSPECIALIZED = (
    "first", "rows", "columns", "n_queries", "n_keys", "width", "top", "dense_rows", "stride_sb", "stride_sh",
    "stride_sm", "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_im",
)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _list_kernel(
    scores, counts, indices, stride_sb, stride_sh, stride_sm, stride_cb, stride_ch, stride_cm,
    stride_ib, stride_ih, stride_im, H, first, rows, columns, n_queries, n_keys, width, threshold, top,
    dense_rows, BS: tl.constexpr, BN: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    start = (first + i_m) * BS + n_keys - n_queries
    last = tl.minimum(start + BS, n_keys) - 1
    i_n = tl.arange(0, BN)
    b_seen = (i_n <= last // BS) & (i_n < columns)
    b_own = b_seen & (i_n >= start // BS)
    p_s = scores + i_b * stride_sb + i_h * stride_sh + i_m.to(tl.int64) * stride_sm + i_n
    b_s = tl.load(p_s, mask=b_seen, other=float("-inf"))
    b_odd = b_seen & ((b_s != b_s) | (tl.abs(b_s) == float("inf")))
    own = tl.sum(b_own.to(tl.int32), 0)
    if TOP:
        b_keep = _largest(tl.where(b_odd, float("inf"), b_s), b_seen & (i_n < start // BS), top - own)
    else:
        b_clean = tl.where(b_odd, float("-inf"), b_s)
        peak = tl.max(b_clean, 0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        b_e = tl.exp2((b_clean - peak) * _LOG2E)
        b_keep = (b_e > threshold * tl.sum(b_e, 0)) | b_odd
    if first + i_m >= rows - dense_rows:
        b_keep = b_seen
    b_keep = b_keep & b_seen & (i_n < start // BS)
    b_place = tl.cumsum(b_keep.to(tl.int32), 0) - 1
    # Only scores that are not finite can be more than a list has room for.
    b_keep = b_keep & (b_place < width - own)
    others = tl.sum(b_keep.to(tl.int32), 0)
    p_i = indices + i_b * stride_ib + i_h * stride_ih + i_m.to(tl.int64) * stride_im
    tl.store(p_i + tl.where(b_own, others + i_n - start // BS, b_place), i_n, mask=b_keep | b_own)
    p_c = counts + i_b * stride_cb + i_h * stride_ch + i_m.to(tl.int64) * stride_cm
    tl.store(p_c, others + own)


def write_lists(
    scores: Float[Tensor, "B H m n"],
    counts: Int[Tensor, "B H m"],
    indices: Int[Tensor, "B H m L"],
    first: int,
    rows: int,
    n_queries: int,
    n_keys: int,
    block_size: int,
    threshold: float,
    top: int,
    dense_rows: int,
) -> None:
    """Lists of the query blocks ``first, first + 1, …`` of ``rows``, from their scores."""
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    B, H, m, columns = scores.shape
    BN = max(16, next_power_of_2(columns))
    _list_kernel[(m, B * H)](
        scores, counts, indices, *scores.stride()[:3], *counts.stride(), *indices.stride()[:3],
        H, first, rows, columns, n_queries, n_keys, indices.shape[-1], threshold, top, dense_rows,
        block_size, BN, top > 0, num_warps=4 if BN <= 2048 else 8 if BN <= 8192 else 16,
    )  # fmt: skip
