"""Stage 1 of InfLLM-V2 in Triton: denominators, block scores, and pieces of them that become lists.

Two kernels, and a third in ``lists.py``. The first gives each row's log-sum-exp over the windows (the coarse
ones, where they are given). The second keeps the queries of all heads of a group and passes over the windows
once: a tile of tokens with a tile of windows, one product per head, the heads' exponentials summed in
registers, and only block maxima stored. Windows come in an order in which a block's lie in one thread's
registers; what a block's last windows lend to the next block is moved there by a product with a shifted
identity. Only the tiles at the diagonal are masked. No atomics: the same bits in every run.

With half-precision queries the scores behind a choice are rounded to bfloat16 (to nearest, 8 bits), as
blocks whose scores agree that far count as equal: the earlier is taken. With float32 they are not rounded.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparseland.ops._rows import rows_at
from sparseland.ops.kernel_scores.lists import UNIT, lists
from sparseland.ops.kernel_scores.reference import UNJUDGED, finite
from sparseland.patterns import cdiv, next_power_of_2

_LOG2E = 1.4426950408889634
_UNSPECIALIZED = ("H", "Nq", "Nc", "offset", "n_rows", "units", "i_first")
# What the first blocks get instead of a score; its bits as bfloat16 are finite as float16, too.
FOREMOST = 1.5 * UNJUDGED
_UNJUDGED_BITS = (127 + int(math.log2(UNJUDGED))) << 23
# Bytes of scores held at once.
_HELD_BYTES = 1 << 30
# Fewer columns make no smaller pieces.
_SHORT = 512


class Cut(NamedTuple):
    """Tokens and windows of a tile, warps, stages; whether the group's queries stay in shared memory."""

    BT: int
    BN: int
    warps: int
    stages: int
    hold: bool = True


# By padded head dimension; the queries of larger groups than fit are loaded again for each tile of windows.
SCORE = {64: Cut(64, 64, 4, 4), 128: Cut(64, 64, 4, 2), 256: Cut(64, 64, 4, 2, False)}
LSE = {64: Cut(128, 64, 4, 2), 128: Cut(256, 64, 8, 2), 256: Cut(64, 64, 4, 2)}
FULL_PRECISION = Cut(32, 32, 4, 1, False)
_HELD_QUERIES = 128 << 10


@triton.jit
def _lse_walk(
    b_m, b_l, b_q, c, stride_cn, Nc, b_seen, begin, end, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Online sums over the windows [begin, end); EDGE: some rows don't see all of them."""
    for n0 in range(begin, end, BN):
        i_c = n0 + tl.arange(0, BN)
        b_c = rows_at(c, i_c, stride_cn, Nc, D, BD, True, EDGE)
        b_s = tl.dot(b_q, tl.trans(b_c), input_precision="ieee")
        if EDGE:
            b_s = tl.where(i_c[None, :] < b_seen[:, None], b_s, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
        b_shift = b_max
        if EDGE:
            b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_l = b_l * tl.exp2(b_m - b_shift) + tl.sum(tl.exp2(b_s * scale_log2 - b_shift[:, None]), 1)
        b_m = b_max
    return b_m, b_l


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
    q += i_b * stride_qb + i_h * stride_qh
    b_q = rows_at(q, i_q, stride_qn, Nq, D, BD, True, True)
    c += i_b * stride_cb + (i_h // G) * stride_ch
    b_seen = tl.maximum(i_q + offset + 1 - KERNEL + STRIDE, 0) // STRIDE
    last = tl.minimum(i_t * BT + BT, Nq) + offset
    end = tl.minimum(tl.maximum(last - KERNEL + STRIDE, 0) // STRIDE, Nc)
    sure = tl.minimum(tl.maximum(i_t * BT + offset + 1 - KERNEL + STRIDE, 0) // STRIDE, Nc) // BN * BN
    b_m = tl.full([BT], float("-inf"), tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    b_m, b_l = _lse_walk(
        b_m, b_l, b_q, c, stride_cn, Nc, b_seen, 0, sure, scale_log2, D, BD, BN, False
    )  # fmt: skip
    b_m, b_l = _lse_walk(
        b_m, b_l, b_q, c, stride_cn, Nc, b_seen, sure, end, scale_log2, D, BD, BN, True
    )  # fmt: skip
    b_out = tl.where(b_l == 0.0, float("-inf"), b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l)))
    tl.store(lse + (i_b * H + i_h) * Nq + i_q, b_out, mask=i_q < Nq)


@triton.jit
def _score_walk(
    b_late, b_qs, b_lses, p_q, p_lse, p_out, row, c, stride_qh, stride_cn, Nq, Nc, b_seen, b_end, begin, end,
    scale_log2,
    G: tl.constexpr, PER: tl.constexpr, REACH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, UNJUDGED: tl.constexpr, HOLD: tl.constexpr, EDGE: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks of the windows [begin, end); ``b_late``: what the tile before lends."""
    NB: tl.constexpr = BN // PER
    i_d = tl.arange(0, BD)
    i_nb = tl.arange(0, NB)
    i_n = tl.arange(0, BN)
    # Column p NB + b is window p of block b.
    i_window = i_n % NB * PER + i_n // NB
    if REACH > 0:
        # Block b lends to block b + 1, and the last one to the first of the next tile.
        i_to = tl.arange(0, 2 * NB)
        b_move = (i_nb[:, None] + 1 == tl.where(i_to == NB, NB, i_to)[None, :]) & (i_to <= NB)[None, :]
        b_move = b_move.to(p_out.dtype.element_ty)
        i_per = tl.arange(0, PER)[None, :, None]
    for n0 in range(begin, end, BN):
        i_c = n0 + i_window
        b_c = tl.trans(rows_at(c, i_c, stride_cn, Nc, D, BD, True, EDGE))
        if HOLD:
            for i_g in tl.static_range(G):
                b_s = tl.dot(b_qs[i_g], b_c, input_precision="ieee") * scale_log2 - b_lses[i_g][:, None]
                b_e = tl.exp2(b_s)
                b_r = b_e if i_g == 0 else b_r + b_e
        else:
            b_r = tl.zeros([BT, BN], tl.float32)
            p_head = p_q
            for i_g in range(0, G):
                b_q = tl.load(p_head, mask=row[:, None] & (i_d < D)[None, :], other=0.0)
                p_head += stride_qh
                b_lse = tl.load(p_lse + i_g * Nq, mask=row, other=0.0)
                b_r += tl.exp2(tl.dot(b_q, b_c, input_precision="ieee") * scale_log2 - b_lse[:, None])
        # As numbers without sign: what is not a number is then above all numbers.
        b_bits = b_r.to(tl.uint32, bitcast=True)
        if EDGE:
            b_bits = tl.where(i_c[None, :] < b_seen[:, None], b_bits, 0)
        b_split = tl.reshape(b_bits, [BT, PER, NB])
        b_best = tl.minimum(tl.max(b_split, 1), UNJUDGED)
        if REACH > 0:
            # The last windows of a block reach into the next one.
            b_tail = tl.minimum(tl.max(tl.where(i_per >= PER - REACH, b_split, 0), 1), UNJUDGED)
            b_tail = b_tail.to(tl.float32, bitcast=True).to(p_out.dtype.element_ty)
            b_lent = tl.dot(b_tail, b_move, input_precision="ieee")
            b_lent, b_next = tl.split(tl.trans(tl.reshape(b_lent, [BT, 2, NB]), 0, 2, 1))
            b_best = tl.maximum(b_best, tl.maximum(b_lent, b_late).to(tl.uint32, bitcast=True))
            b_late = b_next
        b_best = b_best.to(tl.float32, bitcast=True).to(p_out.dtype.element_ty)
        i_block = n0 // PER + i_nb[None, :]
        if EDGE and LISTED:
            b_best = tl.where(i_block < b_end[:, None], b_best, -1.0)
        tl.store(p_out + i_block, b_best, mask=row[:, None])
    return b_late


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _score_kernel(
    q, c, lse, scores,
    stride_qb, stride_qh, stride_qn, stride_cb, stride_ch, stride_cn, H, Nq, Nc, offset, i_first, n_rows,
    units, scale_log2,
    G: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PER: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, UNJUDGED: tl.constexpr, HOLD: tl.constexpr,
    UNIT: tl.constexpr, LISTED: tl.constexpr, WINDOW: tl.constexpr, INIT: tl.constexpr,
    FIRSTS: tl.constexpr, FOREMOST: tl.constexpr,
):  # fmt: skip
    """Block scores of a tile of tokens and one key head, up to the last block that a window of it touches.

    Rows are the queries ``i_first``, ``i_first + 1``, … of the ``Nq``.
    """
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_hk, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_r = i_t * BT + tl.arange(0, BT)
    i_q = i_first + i_r
    i_d = tl.arange(0, BD)
    REACH: tl.constexpr = KERNEL // STRIDE - 1
    row = i_r < n_rows
    inside = row[:, None] & (i_d < D)[None, :]
    c += i_b * stride_cb + i_hk * stride_ch
    p_q = q + i_b * stride_qb + i_hk * G * stride_qh + i_q.to(tl.int64)[:, None] * stride_qn + i_d[None, :]
    p_lse = lse + (i_b * H + i_hk * G) * Nq + i_q
    i_row = (i_b * (H // G) + i_hk) * n_rows + i_r.to(tl.int64)
    p_out = scores + i_row[:, None] * (units * UNIT)
    b_seen = tl.maximum(i_q + offset + 1 - KERNEL + STRIDE, 0) // STRIDE
    sure = tl.minimum(tl.maximum(i_first + i_t * BT + offset + 1 - KERNEL + STRIDE, 0) // STRIDE, Nc)
    last = i_first + tl.minimum(i_t * BT + BT, n_rows) + offset
    # The blocks of all tokens up to the last: their windows may still lack keys.
    end = tl.maximum((last + PER * STRIDE - 1) // (PER * STRIDE) - WINDOW, 0) * PER
    b_end = (i_q + offset) // (PER * STRIDE) - WINDOW + 1
    if LISTED:
        first_end = (i_first + i_t * BT + offset) // (PER * STRIDE) - WINDOW + 1
        sure = tl.minimum(sure, tl.maximum(first_end, 0) * PER)
    sure = sure // BN * BN
    b_qs = ()
    b_lses = ()
    p_head = p_q
    if HOLD:
        for i_g in tl.static_range(G):
            b_qs = b_qs + (tl.load(p_head, mask=inside, other=0.0),)  # noqa: RUF005
            p_head += stride_qh
            b_lses = b_lses + (tl.load(p_lse + i_g * Nq, mask=row, other=0.0),)  # noqa: RUF005
    b_late = tl.zeros([BT, BN // PER], tl.float32)
    b_late = _score_walk(
        b_late, b_qs, b_lses, p_q, p_lse, p_out, row, c, stride_qh, stride_cn, Nq, Nc, b_seen, b_end,
        0, sure, scale_log2, G, PER, REACH, D, BD, BT, BN, UNJUDGED, HOLD, False, LISTED,
    )  # fmt: skip
    b_late = _score_walk(
        b_late, b_qs, b_lses, p_q, p_lse, p_out, row, c, stride_qh, stride_cn, Nq, Nc, b_seen, b_end,
        sure, end, scale_log2, G, PER, REACH, D, BD, BT, BN, UNJUDGED, HOLD, True, LISTED,
    )  # fmt: skip
    if LISTED and INIT > 0:
        # The first blocks come before all others. Other threads may have stored their scores.
        tl.debug_barrier()
        i_f = tl.arange(0, FIRSTS)[None, :]
        b_above = tl.full([BT, FIRSTS], FOREMOST, scores.dtype.element_ty)
        tl.store(p_out + i_f, b_above, mask=row[:, None] & (i_f < INIT) & (i_f < b_end[:, None]))


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
    B, _, Nq, _ = q.shape
    offset, columns = n_keys - Nq, cdiv(n_keys, block_size)
    lse = denominators(q, compressed, coarse, kernel, stride, offset, scale)
    out = q.new_zeros(B, compressed.shape[1], Nq, cdiv(columns, UNIT) * UNIT, dtype=torch.float32)
    windows = finite(compressed, math.nan)  # an infinity could give -inf, which is a number's score
    score(out, q, windows, lse, 0, offset, kernel, stride, block_size, scale)
    return out[..., :columns].contiguous()


def score(
    out: Float[Tensor, "B Hkv R M"],
    q: Float[Tensor, "B Hq Nq D"],
    windows: Float[Tensor, "B Hkv Nc D"],
    lse: Float[Tensor, "B Hq Nq"],
    start: int,
    offset: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
    window: int | None = None,
    init: int = 0,
    cut: Cut | None = None,
) -> None:
    """Scores of the queries from ``start`` on, into ``out``, as far as each tile's windows go.

    ``windows`` that can't be judged are NaN. With a ``window`` (in blocks) scores are as :func:`lists` takes
    them: the first ``init`` blocks' are ``FOREMOST``, and from the query's window on stand negative numbers,
    up to a multiple of 16 blocks.
    """
    B, H, Nq, D = q.shape
    Hkv, rows, width = out.shape[1:]
    G, per_block, BD = H // Hkv, block_size // stride, max(16, next_power_of_2(D))
    if cut is None:
        cut = FULL_PRECISION if q.dtype == torch.float32 else SCORE[max(BD, 64)]
    # At least 16 blocks, which a product takes, and whole units.
    BN = min(max(cut.BN, 16 * per_block), UNIT * per_block)

    def launch(hold: bool) -> None:
        _score_kernel[(cdiv(rows, cut.BT), Hkv, B)](
            q, windows, lse, out, *q.stride()[:3], *windows.stride()[:3], H, Nq, windows.shape[2],
            offset, start, rows, width // UNIT, scale * _LOG2E, G, kernel, stride, per_block, D, BD,
            cut.BT, BN, _UNJUDGED_BITS, hold, UNIT, window is not None, window or 0, init,
            next_power_of_2(init or 1), FOREMOST, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    if cut.hold and H // Hkv * cut.BT * BD * q.element_size() <= _HELD_QUERIES:
        try:
            return launch(True)
        except OutOfResources:  # devices with less shared memory
            pass
    return launch(False)


def denominators(
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    coarse: Float[Tensor, "B Hkv Nf D"] | None,
    kernel: int,
    stride: int,
    offset: int,
    scale: float,
    cut: Cut | None = None,
) -> Float[Tensor, "B Hq Nq"]:
    """Base-2 log-sum-exp over the coarse windows; over all where a query has seen none of them."""
    if coarse is None:
        return _lse(q, finite(compressed), kernel, stride, offset, scale, cut)
    lse = _lse(q, finite(coarse).contiguous(), 4 * kernel, 4 * stride, offset, scale, cut)
    early = min(max(4 * kernel - 1 - offset, 0), q.shape[2])
    if early:
        lse[:, :, :early] = _lse(q[:, :, :early], finite(compressed), kernel, stride, offset, scale, cut)
    return lse


def _lse(
    q: Tensor, windows: Tensor, kernel: int, stride: int, offset: int, scale: float, cut: Cut | None
) -> Tensor:
    B, H, Nq, D = q.shape
    lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    BD = max(16, next_power_of_2(D))
    if cut is None:
        cut = FULL_PRECISION if q.dtype == torch.float32 else LSE[max(BD, 64)]
    _lse_kernel[(cdiv(Nq, cut.BT), H, B)](
        q, windows, lse, *q.stride()[:3], *windows.stride()[:3], H, H // windows.shape[1], Nq,
        windows.shape[2], offset, scale * _LOG2E, kernel, stride, D, BD, cut.BT, cut.BN,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return lse


def select(
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    coarse: Float[Tensor, "B Hkv Nf D"] | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
    tile: int,
    scale: float,
    longest: int,
) -> tuple[Int[Tensor, "B Hkv T"], Int[Tensor, "B Hkv T L"], Int[Tensor, "B Hkv T L"]]:
    """See :func:`sparseland.ops.kernel_scores.select_blocks`: a few large pieces, two launches for each."""
    q, compressed = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, compressed))
    B, _, Nq, _ = q.shape
    Hkv, offset = compressed.shape[1], n_keys - Nq
    shape = (B, Hkv, cdiv(Nq, tile))
    counts = torch.zeros(shape, dtype=torch.int32, device=q.device)
    indices, members = (torch.zeros(*shape, longest, dtype=torch.int32, device=q.device) for _ in range(2))
    if not longest:
        return counts, indices, members
    made = (counts, indices, members)
    choice = (offset, block_size, window, topk, dense_len, tile)
    # Queries up to here take every block before their window: they need no scores.
    whole = max(dense_len - 1, (topk + window) * block_size) - offset
    whole = min(max(whole, 0), Nq) // tile * tile
    dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    if whole:
        lists(q.new_zeros(1, 1, whole, 0, dtype=dtype), made, 0, *choice)
    if whole == Nq:
        return made
    later = q[:, :, whole:]
    lse = denominators(later, compressed, coarse, kernel, stride, offset + whole, scale)
    # An infinity could give -inf, which is a number's score.
    windows = finite(compressed, math.nan)
    sizes = (kernel, stride, block_size, scale, window, init)
    held = torch.empty(0, dtype=dtype, device=q.device)
    start = whole
    while start < Nq:
        # A piece ends where its rows would need a list kernel of twice the columns, or with the space.
        columns = next_power_of_2((offset + start + tile) // block_size - window + 1)
        widest = cdiv(min(max(columns, _SHORT) + window, cdiv(n_keys, block_size)), UNIT) * UNIT
        rows = (max(columns, _SHORT) + window) * block_size - offset - start
        rows = max(tile, min(rows, _HELD_BYTES // (B * Hkv * widest * dtype.itemsize)) // tile * tile)
        end = min(start + rows, Nq)
        width = cdiv(cdiv(offset + end, block_size), UNIT) * UNIT
        size = B * Hkv * (end - start) * width
        if held.numel() < size:
            held = torch.empty(size, dtype=dtype, device=q.device)
        piece = held[:size].view(B, Hkv, end - start, width)
        score(piece, later, windows, lse, start - whole, offset + whole, *sizes)
        lists(piece, made, start, *choice)
        start = end
    return made
