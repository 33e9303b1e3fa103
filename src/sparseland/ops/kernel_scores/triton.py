"""Stage 1 of InfLLM-V2 in Triton: denominators, block scores, and the lists of the best blocks.

Three kernels. The first gives each row's log-sum-exp over the windows (the coarse ones, where they are
given). The second keeps the queries of all heads of a group and passes over the windows once: a tile of
tokens with a tile of windows, one product per head, the heads' exponentials summed in registers, and only
block maxima stored. Windows come in an order in which a block's lie in one thread's registers; what a
block's last windows lend to the next block is moved there by a product with a shifted identity. Only the
tiles at the diagonal are masked. The third finds, one query at a time, the ``topk`` best blocks by
bisection on keys that hold the score's bits above the block's number, so that no two are equal, and merges
the queries of a tile into lists. No atomics: the same bits in every run.

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
from sparseland.ops.kernel_scores.reference import LARGEST, UNJUDGED, finite
from sparseland.patterns import cdiv

_LOG2E = 1.4426950408889634
_UNSPECIALIZED = (
    "H", "Nq", "Nc", "T", "offset", "units", "n_rows", "first", "window", "init", "topk", "dense_len",
    "longest", "i_first",
)  # fmt: skip
# Score rows are padded to a multiple of this many blocks: tiles of windows end there, and loads are aligned.
_UNIT = 64
# Bytes of scores held at once.
_HELD_BYTES = 512 << 20


class Cut(NamedTuple):
    """Tokens and windows of a tile, warps, stages; whether the group's queries stay in shared memory."""

    BT: int
    BN: int
    warps: int
    stages: int
    hold: bool = True


# By padded head dimension; the queries of larger groups than fit are loaded again for each tile of windows.
SCORE = {64: Cut(64, 64, 4, 3), 128: Cut(64, 64, 4, 2), 256: Cut(64, 64, 4, 2, False)}
LSE = {64: Cut(128, 64, 4, 3), 128: Cut(128, 64, 8, 3), 256: Cut(64, 64, 4, 2)}
FULL_PRECISION = Cut(32, 32, 4, 1, False)
_HELD_QUERIES = 128 << 10
# Columns of a row of scores that one warp of the list kernel holds.
LIST_COLUMNS = 2048


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
    b_before, b_qs, b_lses, p_q, p_lse, p_out, row, c, stride_qh, stride_cn, Nq, Nc, b_seen, begin, end,
    scale_log2,
    G: tl.constexpr, PER: tl.constexpr, REACH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, CLAMP: tl.constexpr, LARGEST: tl.constexpr,
    UNJUDGED: tl.constexpr, HOLD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks of the windows [begin, end); ``b_before``: what the tile before lends on."""
    NB: tl.constexpr = BN // PER
    i_d = tl.arange(0, BD)
    i_nb = tl.arange(0, NB)
    i_n = tl.arange(0, BN)
    # Column p NB + b is window p of block b.
    i_window = i_n % NB * PER + i_n // NB
    if REACH > 0:
        # Block b lends to block b + 1, and the last one to the first of the next tile.
        b_shift = (i_nb[:, None] + 1 == i_nb[None, :]).to(p_out.dtype.element_ty)
        b_wrap = (i_nb[:, None] == i_nb[None, :] + (NB - 1)).to(p_out.dtype.element_ty)
        i_per = tl.arange(0, PER)[None, :, None]
    for n0 in range(begin, end, BN):
        i_c = n0 + i_window
        b_c = tl.trans(rows_at(c, i_c, stride_cn, Nc, D, BD, True, EDGE))
        b_r = tl.zeros([BT, BN], tl.float32)
        if HOLD:
            for i_g in tl.static_range(G):
                b_s = tl.dot(b_qs[i_g], b_c, input_precision="ieee") * scale_log2 - b_lses[i_g][:, None]
                if CLAMP:
                    b_s = tl.minimum(b_s, LARGEST, propagate_nan=tl.PropagateNan.ALL)
                b_r += tl.exp2(b_s)
        else:
            p_head = p_q
            for i_g in range(0, G):
                b_q = tl.load(p_head, mask=row[:, None] & (i_d < D)[None, :], other=0.0)
                p_head += stride_qh
                b_lse = tl.load(p_lse + i_g * Nq, mask=row, other=0.0)
                b_s = tl.dot(b_q, b_c, input_precision="ieee") * scale_log2 - b_lse[:, None]
                if CLAMP:
                    b_s = tl.minimum(b_s, LARGEST, propagate_nan=tl.PropagateNan.ALL)
                b_r += tl.exp2(b_s)
        # What is not a number is above all numbers.
        b_r = tl.where(b_r < UNJUDGED, b_r, UNJUDGED)
        if EDGE:
            b_r = tl.where(i_c[None, :] < b_seen[:, None], b_r, 0.0)
        b_split = tl.reshape(b_r, [BT, PER, NB])
        b_best = tl.max(b_split, 1)
        if REACH > 0:
            # The last windows of a block reach into the next one.
            b_tail = tl.max(tl.where(i_per >= PER - REACH, b_split, 0.0), 1).to(p_out.dtype.element_ty)
            b_lent = tl.dot(b_tail, b_shift, input_precision="ieee")
            b_lent = tl.dot(b_before, b_wrap, b_lent, input_precision="ieee")
            b_best = tl.maximum(b_best, b_lent)
            b_before = b_tail
        tl.store(p_out + n0 // PER + i_nb[None, :], b_best.to(p_out.dtype.element_ty), mask=row[:, None])
    return b_before


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _score_kernel(
    q, c, lse, scores,
    stride_qb, stride_qh, stride_qn, stride_cb, stride_ch, stride_cn, H, Nq, Nc, offset, i_first, n_rows,
    units, scale_log2,
    G: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PER: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, CLAMP: tl.constexpr, LARGEST: tl.constexpr,
    UNJUDGED: tl.constexpr, HOLD: tl.constexpr, UNIT: tl.constexpr,
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
    sure = sure // BN * BN
    last = i_first + tl.minimum(i_t * BT + BT, n_rows) + offset
    # The blocks of all tokens up to the last: their windows may still lack keys.
    end = (last + PER * STRIDE - 1) // (PER * STRIDE) * PER
    b_qs = ()
    b_lses = ()
    p_head = p_q
    if HOLD:
        for i_g in tl.static_range(G):
            b_qs = b_qs + (tl.load(p_head, mask=inside, other=0.0),)  # noqa: RUF005
            p_head += stride_qh
            b_lses = b_lses + (tl.load(p_lse + i_g * Nq, mask=row, other=0.0),)  # noqa: RUF005
    b_before = tl.zeros([BT, BN // PER], scores.dtype.element_ty)
    b_before = _score_walk(
        b_before, b_qs, b_lses, p_q, p_lse, p_out, row, c, stride_qh, stride_cn, Nq, Nc, b_seen, 0, sure,
        scale_log2, G, PER, REACH, D, BD, BT, BN, CLAMP, LARGEST, UNJUDGED, HOLD, False,
    )  # fmt: skip
    b_before = _score_walk(
        b_before, b_qs, b_lses, p_q, p_lse, p_out, row, c, stride_qh, stride_cn, Nq, Nc, b_seen, sure, end,
        scale_log2, G, PER, REACH, D, BD, BT, BN, CLAMP, LARGEST, UNJUDGED, HOLD, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _list_kernel(
    scores, counts, indices, members, units, n_rows, T, i_first, first, window, init, topk, dense_len,
    longest, TILE: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """The list of one tile of queries: each query's best blocks, then their union with a word per block.

    Rows are queries at the positions ``first, first + 1, …``; their lists are the ``i_first``-th and on.
    """
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_c = tl.arange(0, BC)
    NUMBER: tl.constexpr = 16  # bits for a block's number
    WIDE: tl.constexpr = scores.dtype.element_ty == tl.float32
    INT: tl.constexpr = tl.int64 if WIDE else tl.int32
    BITS: tl.constexpr = tl.int32 if WIDE else tl.int16
    b_words = tl.zeros([BC], tl.int32)
    for t in range(0, TILE):
        i_r = i_t * TILE + t
        position = first + i_r
        # Candidates: the blocks before the query's window.
        before = tl.maximum(tl.where(i_r < n_rows, position // BS - window + 1, 0), 0)
        wanted = tl.where((before <= topk) | (position + 1 < dense_len), before, topk)
        if wanted == before:
            b_words = b_words | ((i_c < before).to(tl.int32) << t)
        else:
            p_s = scores + (i_bh * n_rows + i_r) * (units * UNIT) + i_c
            # A mask of whole units lets loads be wide; what lies behind ``before`` is dropped below.
            b_s = tl.load(p_s, mask=i_c < (before + UNIT - 1) // UNIT * UNIT, other=0.0)
            # The first blocks come before all; of the others ``need`` are wanted.
            firsts = tl.minimum(init, wanted)
            need = wanted - firsts
            # Scores are not negative, so their bits sort as they do.
            b_key = b_s.to(BITS, bitcast=True).to(INT)
            b_key = (b_key << NUMBER) | ((1 << NUMBER) - 1 - i_c)
            b_key = tl.where((i_c >= init) & (i_c < before), b_key, -1)
            # low: at least as many as needed are not below it; high: fewer are not below it.
            b_group = tl.max(tl.reshape(b_key, [BC // GROUPS, GROUPS]), 0)
            low = tl.maximum(tl.min(b_group, 0), 0)  # each of GROUPS >= topk groups has one
            high = tl.max(b_group, 0) + 1
            n = need + 1
            while (high - low > 1) & (n != need):
                middle = low + (high - low) // 2
                n = tl.sum((b_key >= middle).to(tl.int32), 0)
                low = tl.where(n >= need, middle, low)
                high = tl.where(n >= need, high, middle)
            b_taken = (i_c < firsts) | ((b_key >= low) & (need > 0))
            b_words = b_words | (b_taken.to(tl.int32) << t)
    b_listed = (b_words != 0).to(tl.int32)
    b_place = tl.cumsum(b_listed, 0) - 1
    i_list = i_bh * T + i_first + i_t
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
    B, _, Nq, _ = q.shape
    offset, columns = n_keys - Nq, cdiv(n_keys, block_size)
    lse = denominators(q, compressed, coarse, kernel, stride, offset, scale)
    out = q.new_zeros(B, compressed.shape[1], Nq, cdiv(columns, _UNIT) * _UNIT, dtype=torch.float32)
    score(out, q, compressed, lse, 0, offset, kernel, stride, block_size, scale, coarse is not None)
    return out[..., :columns].contiguous()


def score(
    out: Float[Tensor, "B Hkv R M"],
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    lse: Float[Tensor, "B Hq Nq"],
    start: int,
    offset: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
    clamp: bool,
    cut: Cut | None = None,
) -> None:
    """Scores of the queries from ``start`` on, into ``out``, as far as each tile's windows go."""
    B, H, Nq, D = q.shape
    Hkv, rows, width = out.shape[1:]
    per_block, BD = block_size // stride, max(16, triton.next_power_of_2(D))
    compressed = finite(compressed, math.nan)  # an infinity could give -inf, which is a number's score
    if cut is None:
        cut = FULL_PRECISION if q.dtype == torch.float32 else SCORE[max(BD, 64)]
    # At least 16 blocks, which a product takes, and whole units.
    BN = min(max(cut.BN, 16 * per_block), _UNIT * per_block)

    def launch(hold: bool) -> None:
        _score_kernel[(cdiv(rows, cut.BT), Hkv, B)](
            q, compressed, lse, out, *q.stride()[:3], *compressed.stride()[:3], H, Nq, compressed.shape[2],
            offset, start, rows, width // _UNIT, scale * _LOG2E, H // Hkv, kernel, stride, per_block, D, BD,
            cut.BT, BN, clamp, LARGEST * _LOG2E, UNJUDGED, hold, _UNIT, num_warps=cut.warps,
            num_stages=cut.stages,
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
    BD = max(16, triton.next_power_of_2(D))
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
    choice = (offset, block_size, window, init, topk, dense_len, tile)
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
    sizes = (kernel, stride, block_size, scale, coarse is not None)
    widest = cdiv(cdiv(n_keys, block_size), _UNIT) * _UNIT
    rows = max(tile, _HELD_BYTES // (B * Hkv * widest * dtype.itemsize) // tile * tile)
    for start in range(whole, Nq, rows):
        end = min(start + rows, Nq)
        width = cdiv(cdiv(offset + end, block_size), _UNIT) * _UNIT
        held = q.new_empty(B, Hkv, end - start, width, dtype=dtype)
        score(held, later, compressed, lse, start - whole, offset + whole, *sizes)
        lists(held, made, start, *choice)
    return made


def lists(
    scores: Float[Tensor, "b h R M"],
    made: tuple[Int[Tensor, "B Hkv T"], Int[Tensor, "B Hkv T L"], Int[Tensor, "B Hkv T L"]],
    start: int,
    offset: int,
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
    tile: int,
    per_warp: int | None = None,
) -> None:
    """Counts, indices and members of the best blocks of the queries from ``start`` on, into ``made``.

    ``scores`` are as :func:`score` leaves them; without columns, where every query takes all it can.
    """
    counts, indices, members = made
    B, Hkv, T = counts.shape
    rows = scores.shape[2]
    columns = max(1, (offset + start + rows - 1) // block_size - window + 1)
    GROUPS = triton.next_power_of_2(topk)
    BC = max(16, GROUPS, triton.next_power_of_2(columns))
    _list_kernel[(cdiv(rows, tile), B * Hkv)](
        scores, counts, indices, members, scores.shape[3] // _UNIT, rows, T, start // tile, offset + start,
        window, init, topk, dense_len, indices.shape[3], tile, block_size, BC, GROUPS, _UNIT,
        num_warps=max(1, min(16, BC // (per_warp or LIST_COLUMNS))),
    )  # fmt: skip
