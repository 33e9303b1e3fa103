"""Stage 1 of InfLLM-V2 in Triton: denominators, block scores, and the lists of the best blocks.

Three kernels. The first gives each row's log-sum-exp over the windows (the coarse ones, where they are
given). The second multiplies a tile of tokens with a tile of windows once per head of the group, sums the
heads' exponentials in registers and stores only block maxima; what a tile's last windows lend to the next
block is carried on. The third finds, one query at a time, the ``topk``-th largest score by bisection on
the numbers' bits, and merges the queries of a tile into lists. No atomics: the same bits in every run.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.kernel_scores.reference import LARGEST
from sparseland.patterns import cdiv

_LOG2E = 1.4426950408889634
_UNSPECIALIZED = (
    "stride_sr", "H", "Nq", "Nc", "offset", "n_rows", "first", "window", "init", "topk", "dense_len",
    "columns", "longest",
)  # fmt: skip


@triton.jit
def _windows(x, i_c, stride, Nc, i_d, D: tl.constexpr):
    """A tile of windows, [BN, BD]; 0 behind the last."""
    inside = (i_c < Nc)[:, None] & (i_d < D)[None, :]
    return tl.load(x + i_c.to(tl.int64)[:, None] * stride + i_d[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _lse_kernel(
    q, c, lse,
    stride_qb, stride_qh, stride_qn, stride_cb, stride_ch, stride_cn, H, G, Nq, Nc, offset, scale_log2,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of each query over the windows that have ended; -inf where there is none."""
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_q = i_t * BT + tl.arange(0, BT)
    i_d = tl.arange(0, BD)
    q += i_b * stride_qb + i_h * stride_qh
    inside = (i_q < Nq)[:, None] & (i_d < D)[None, :]
    b_q = tl.load(q + i_q.to(tl.int64)[:, None] * stride_qn + i_d[None, :], mask=inside, other=0.0)
    c += i_b * stride_cb + (i_h // G) * stride_ch
    b_seen = tl.maximum(i_q + offset + 1 - KERNEL + STRIDE, 0) // STRIDE
    last = tl.minimum(i_t * BT + BT, Nq) + offset
    end = tl.minimum(tl.maximum(last - KERNEL + STRIDE, 0) // STRIDE, Nc)
    b_m = tl.full([BT], float("-inf"), tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    for n0 in range(0, end, BN):
        i_c = n0 + tl.arange(0, BN)
        b_c = _windows(c, i_c, stride_cn, Nc, i_d, D)
        b_s = tl.dot(b_q, tl.trans(b_c), input_precision="ieee") * scale_log2
        b_s = tl.where(i_c[None, :] < b_seen[:, None], b_s, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, 1))
        b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_l = b_l * tl.exp2(b_m - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
        b_m = b_max
    b_out = tl.where(b_l == 0.0, float("-inf"), b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l)))
    tl.store(lse + (i_b * H + i_h) * Nq + i_q, b_out, mask=i_q < Nq)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _score_kernel(
    q, c, lse, scores,
    stride_qb, stride_qh, stride_qn, stride_cb, stride_ch, stride_cn, H, Nq, Nc, offset, columns, scale_log2,
    G: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PER: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, CLAMP: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Block scores of a tile of tokens and one key head: ``columns`` blocks, all of them written."""
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_hk, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_q = i_t * BT + tl.arange(0, BT)
    i_d = tl.arange(0, BD)
    NB: tl.constexpr = BN // PER
    REACH: tl.constexpr = KERNEL // STRIDE - 1
    i_nb = tl.arange(0, NB)
    row = i_q < Nq
    inside = row[:, None] & (i_d < D)[None, :]
    c += i_b * stride_cb + i_hk * stride_ch
    p_q = q + i_b * stride_qb + i_hk * G * stride_qh + i_q.to(tl.int64)[:, None] * stride_qn + i_d[None, :]
    p_lse = lse + (i_b * H + i_hk * G) * Nq + i_q
    p_out = scores + ((i_b * (H // G) + i_hk) * Nq + i_q.to(tl.int64)) * columns
    b_seen = tl.maximum(i_q + offset + 1 - KERNEL + STRIDE, 0) // STRIDE
    b_carry = tl.zeros([BT], tl.float32)
    for n0 in range(0, columns * PER, BN):
        i_c = n0 + tl.arange(0, BN)
        b_c = tl.trans(_windows(c, i_c, stride_cn, Nc, i_d, D))
        b_r = tl.zeros([BT, BN], tl.float32)
        for i_g in range(0, G):
            b_q = tl.load(p_q + i_g * stride_qh, mask=inside, other=0.0)
            b_lse = tl.load(p_lse + i_g * Nq, mask=row, other=float("inf"))
            # A row that has seen no window: exp2(s - inf) = 0.
            b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
            b_s = tl.dot(b_q, b_c, input_precision="ieee") * scale_log2 - b_lse[:, None]
            if CLAMP:
                b_s = tl.minimum(b_s, LARGEST)
            b_r += tl.exp2(b_s)
        # Not a number compares false, here and in the sum of what is not.
        b_r = tl.where((i_c[None, :] < b_seen[:, None]) & (b_r == b_r), b_r, 0.0)
        b_split = tl.reshape(b_r, [BT, NB, PER])
        b_best = tl.max(b_split, 2)
        if REACH > 0:
            # The last windows of a block reach into the next one.
            i_per = tl.arange(0, PER)[None, None, :]
            b_tail = tl.max(tl.where(i_per >= PER - REACH, b_split, 0.0), 2)
            i_from = tl.broadcast_to(tl.maximum(i_nb - 1, 0)[None, :], [BT, NB])
            b_before = tl.where(i_nb[None, :] == 0, b_carry[:, None], tl.gather(b_tail, i_from, 1))
            b_best = tl.maximum(b_best, b_before)
            b_carry = tl.sum(tl.where(i_nb[None, :] == NB - 1, b_tail, 0.0), 1)
        i_block = n0 // PER + i_nb
        tl.store(p_out[:, None] + i_block[None, :], b_best, mask=row[:, None] & (i_block < columns)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _list_kernel(
    scores, counts, indices, members, stride_sr, n_rows, columns, first, window, init, topk, dense_len,
    longest, TILE: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The list of one tile of queries: each query's best blocks, then their union with a word per block."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_c = tl.arange(0, BC)
    b_words = tl.zeros([BC], tl.int32)
    for t in range(0, TILE):
        i_r = i_t * TILE + t
        position = first + i_r
        # Candidates: the blocks before the query's window.
        before = tl.where(i_r < n_rows, position // BS - window + 1, 0)
        before = tl.minimum(tl.maximum(before, 0), columns)
        p_s = scores + (i_bh * n_rows + i_r) * stride_sr + i_c
        b_s = tl.load(p_s, mask=i_c < before, other=0.0)
        # Scores are not negative, so their bits sort as they do; the first blocks come before all.
        b_key = b_s.to(tl.int32, bitcast=True)
        b_key = tl.where(i_c < init, 0x7F800000, b_key)
        b_key = tl.where(i_c < before, b_key, -1)
        wanted = tl.where((before <= topk) | (position + 1 < dense_len), before, topk)
        # low: at least as many as wanted are not below it; high: fewer are not below it.
        low = tl.zeros([], tl.int32)
        high = tl.max(b_key, 0) + 1
        n_low, n_high = before, tl.zeros([], tl.int32)
        while (high - low > 1) & (n_low != wanted):
            middle = low + (high - low) // 2
            n = tl.sum((b_key >= middle).to(tl.int32), 0)
            enough = n >= wanted
            low = tl.where(enough, middle, low)
            n_low = tl.where(enough, n, n_low)
            high = tl.where(enough, high, middle)
            n_high = tl.where(enough, n_high, n)
        b_taken = (b_key >= low).to(tl.int32)
        if n_low != wanted:
            # Equal scores at the edge: the earlier blocks, as many as there is room for.
            b_equal = (b_key == low).to(tl.int32)
            b_fits = (tl.cumsum(b_equal, 0) <= wanted - n_high).to(tl.int32)
            b_taken = (b_key > low).to(tl.int32) + b_equal * b_fits
        b_words = b_words | (b_taken << t)
    b_listed = (b_words != 0).to(tl.int32)
    b_place = tl.cumsum(b_listed, 0) - 1
    i_list = i_bh * tl.num_programs(0) + i_t
    fits = (b_listed != 0) & (b_place < longest)
    tl.store(indices + i_list * longest + b_place, i_c, mask=fits)
    tl.store(members + i_list * longest + b_place, b_words, mask=fits)
    tl.store(counts + i_list, tl.sum(b_listed, 0))


def scores(
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    coarse: Float[Tensor, "B Hkv Nf D"] | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
) -> Float[Tensor, "B Hkv Nq Mk"]:
    """See :func:`sparseland.ops.kernel_scores.kernel_scores`."""
    q, compressed = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, compressed))
    B, H, Nq, D = q.shape
    Hkv, offset, columns = compressed.shape[1], n_keys - Nq, cdiv(n_keys, block_size)
    wide = D > 64 or q.dtype == torch.float32
    BT, BN = (32, 32) if q.dtype == torch.float32 else (128, 64) if wide else (128, 128)
    per_block = block_size // stride
    BN = max(BN, per_block)
    BD = max(16, triton.next_power_of_2(D))
    if coarse is None:
        lse = _lse(q, compressed, kernel, stride, offset, scale)
    else:
        lse = _lse(q, coarse.contiguous(), 4 * kernel, 4 * stride, offset, scale)
        # The first positions have seen no coarse window.
        early = min(max(4 * kernel - 1 - offset, 0), Nq)
        if early:
            lse[:, :, :early] = _lse(q[:, :, :early], compressed, kernel, stride, offset, scale)
    out = torch.empty(B, Hkv, Nq, columns, dtype=torch.float32, device=q.device)
    _score_kernel[(cdiv(Nq, BT), Hkv, B)](
        q, compressed, lse, out, *q.stride()[:3], *compressed.stride()[:3], H, Nq, compressed.shape[2],
        offset, columns, scale * _LOG2E, H // Hkv, kernel, stride, per_block, D, BD, BT, BN,
        coarse is not None, LARGEST * _LOG2E, num_warps=4 if BT < 128 else 8, num_stages=2,
    )  # fmt: skip
    return out


def _lse(q: Tensor, windows: Tensor, kernel: int, stride: int, offset: int, scale: float) -> Tensor:
    B, H, Nq, D = q.shape
    lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    BT, BN = (32, 32) if q.dtype == torch.float32 else (128, 64)
    _lse_kernel[(cdiv(Nq, BT), H, B)](
        q, windows, lse, *q.stride()[:3], *windows.stride()[:3], H, H // windows.shape[1], Nq,
        windows.shape[2], offset, scale * _LOG2E, kernel, stride, D, max(16, triton.next_power_of_2(D)),
        BT, BN, num_warps=4 if BT < 128 else 8, num_stages=2,
    )  # fmt: skip
    return lse


def lists(
    scores: Float[Tensor, "B Hkv R M"],
    first: int,
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
    tile: int,
    longest: int,
) -> tuple[Int[Tensor, "B Hkv T"], Int[Tensor, "B Hkv T L"], Int[Tensor, "B Hkv T L"]]:
    """Counts, indices and members of the best blocks of queries at ``first, first + 1, …``.

    ``scores`` may be the first columns of a wider array, as :func:`scores` gives it.
    """
    B, Hkv, rows, columns = scores.shape
    stride = scores.stride(2)
    if scores.stride() != (Hkv * rows * stride, rows * stride, stride, 1):
        scores = scores.contiguous()
        stride = columns
    shape = (B, Hkv, cdiv(rows, tile))
    counts = torch.empty(shape, dtype=torch.int32, device=scores.device)
    indices, members = (
        torch.zeros(*shape, longest, dtype=torch.int32, device=scores.device) for _ in range(2)
    )
    BC = max(16, triton.next_power_of_2(columns))
    _list_kernel[(shape[2], B * Hkv)](
        scores, counts, indices, members, stride, rows, columns, first, window, init, topk, dense_len,
        longest, tile, block_size, BC, num_warps=max(1, min(8, BC // 512)),
    )  # fmt: skip
    return counts, indices, members
