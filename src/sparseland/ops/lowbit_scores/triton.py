"""The low-bit estimate in Triton: 4-bit numbers in 8-bit tensor cores, bits out.

Three kernels make the factors (keys; queries with their thresholds; both read once) and the bits: a program
of the third keeps a tile of queries and streams all keys between sink and local ones past it, 128 at a
time. Each row gathers one bit per tile of 32 keys; every 1024 keys the rows' words are or-ed together, so
that what is written is N^2 / 2048 / 8 bytes a head. A fourth kernel turns bits into lists.

Hopper has no 4-bit tensor cores. Whole numbers up to 7 are exact in float8 too, and so are their sums (below
2^14): where a card multiplies float8, the product is a float32 already, and no score has to be converted.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.lowbit_scores.tiles import KEYS, LOCAL, ROWS, SEGMENT, WORD, n_words

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to the nearest whole number, ties to even.
_ROUND = tl.constexpr(12582912.0)
_ROWS, _KEYS, _LOCAL = tl.constexpr(ROWS), tl.constexpr(KEYS), tl.constexpr(LOCAL)
_SEGMENT, _WORD = tl.constexpr(SEGMENT), tl.constexpr(WORD)


@triton.jit
def _n_judged(block, n_queries, n_keys):
    """See ``tiles.n_judged``."""
    to_diagonal = (n_keys - n_queries + (block + 1) * _ROWS + _KEYS - 1) // _KEYS
    return tl.maximum(to_diagonal - 1 - _LOCAL, 0) // _SEGMENT * _SEGMENT


@triton.jit
def _padded(n_keys):
    """Columns of a head: what starts a head is aligned for wide loads."""
    return (n_keys + 15) // 16 * 16


@triton.jit
def _quantize(b_x):
    """Whole numbers from -7 to 7, one scale per row, and whether the row is finite."""
    # 0 times NaN or infinity is NaN, which equals nothing.
    b_finite = tl.sum(b_x * 0.0, 1) == 0.0
    b_x = tl.where(b_finite[:, None], b_x, 0.0)
    b_scale = tl.max(tl.abs(b_x), 1) / 7.0
    # A sum of finite differences may still be infinite.
    b_finite = b_finite & (b_scale < float("inf"))
    b_scale = tl.where(b_finite, b_scale, 0.0)
    b_x = b_x / tl.where(b_scale > 0.0, b_scale, 1.0)[:, None]
    b_x = tl.minimum(tl.maximum((b_x + _ROUND) - _ROUND, -7.0), 7.0)
    return b_x, b_scale, b_finite


@triton.jit(do_not_specialize=["n_keys"])
def _keys(
    k, k_mean, q_mean, k4, columns, stride_kb, stride_kh, stride_kn, Hkv, G, n_keys, D, scale,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """4-bit keys ``[B * Hkv, Nk, BD]``, and per query head their scales and ``scale c_j``, side by side."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_n, i_d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    b_here, b_dim = i_n < n_keys, i_d < D
    k += (i_bh // Hkv) * stride_kb + (i_bh % Hkv) * stride_kh
    at = i_n[:, None].to(tl.int64)
    b_k = tl.load(k + at * stride_kn + i_d[None, :], mask=b_here[:, None] & b_dim[None, :], other=0.0)
    b_k = b_k.to(tl.float32) - tl.load(k_mean + i_bh * D + i_d, mask=b_dim, other=0.0)[None, :]
    b_k4, b_scale, b_finite = _quantize(b_k)
    tl.store(
        k4 + i_bh * n_keys * BD + at * BD + i_d[None, :], b_k4.to(k4.dtype.element_ty), mask=b_here[:, None]
    )
    for i_g in range(0, G):
        i_q = i_bh * G + i_g
        b_mean = tl.load(q_mean + i_q * D + i_d, mask=b_dim, other=0.0)
        b_shift = tl.sum(b_k * b_mean[None, :], 1) * scale
        # What can't be compared is kept: an infinite estimate stands for it.
        b_shift = tl.where(b_finite & (tl.abs(b_shift) < float("inf")), b_shift, float("inf"))
        p = columns + (i_q * _padded(n_keys) + i_n) * 2
        tl.store(p, b_scale, mask=b_here)
        tl.store(p + 1, b_shift, mask=b_here)


@triton.jit
def _area(
    b_m, b_l, b_q, k, stride_kn, start, stop, i_p, i_d, n_keys, D, scale_log2, BN: tl.constexpr
):  # fmt: skip
    """Adds the keys [start, stop) to the running maximum (base 2) and sum of each row, causally."""
    for n0 in range(start, stop, BN):
        i_n = n0 + tl.arange(0, BN)
        b_here = i_n < stop
        b_load = b_here[:, None] & (i_d < D)[None, :]
        b_k = tl.load(k + i_n[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_load, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_s = tl.where(b_here[None, :] & (i_n[None, :] <= i_p[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row may see none of a part: keep -inf - (-inf) out.
        b_by = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_l = b_l * tl.exp2(b_m - b_by) + tl.sum(tl.exp2(b_s - b_by[:, None]), 1)
        b_m = b_new
    return b_m, b_l


@triton.jit(do_not_specialize=["n_queries", "n_keys"])
def _queries(
    q, k, q_mean, k_mean, log_tau, q4, q_scale, threshold, stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn, Hq, G, n_queries, n_keys, D, scale,
    ROW: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """4-bit queries ``[B * Hq, Mq * 64, BD]``, ``scale`` times their scales, and thresholds."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // Hq, i_bh % Hq
    i_hk = i_h // G
    i_n, i_d = i_m * ROW + tl.arange(0, ROW), tl.arange(0, BD)
    b_here, b_dim = i_n < n_queries, i_d < D
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_hk * stride_kh
    at = i_n[:, None].to(tl.int64)
    b_q = tl.load(q + at * stride_qn + i_d[None, :], mask=b_here[:, None] & b_dim[None, :], other=0.0)
    b_qf = b_q.to(tl.float32)
    # Sum over the sink and the local keys of the unsmoothed logits; the keys' mean is taken off below.
    first = i_m * ROW + n_keys - n_queries
    end = tl.minimum(first + ROW, n_keys)
    start = (1 + _n_judged(i_m, n_queries, n_keys)) * _KEYS
    b_m = tl.full([ROW], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([ROW], dtype=tl.float32)
    i_p = first + tl.arange(0, ROW)
    scale_log2 = scale * _LOG2E
    b_m, b_l = _area(
        b_m, b_l, b_q, k, stride_kn, 0, tl.minimum(_KEYS, end), i_p, i_d, n_keys, D, scale_log2, BN
    )
    b_m, b_l = _area(b_m, b_l, b_q, k, stride_kn, start, end, i_p, i_d, n_keys, D, scale_log2, BN)
    b_k_mean = tl.load(k_mean + (i_b * (Hq // G) + i_hk) * D + i_d, mask=b_dim, other=0.0)
    b_t = (b_m + tl.log2(b_l)) * _LN2 - tl.sum(b_qf * b_k_mean[None, :], 1) * scale

    b_mean = tl.load(q_mean + i_bh * D + i_d, mask=b_dim, other=0.0)
    b_q4, b_scale, b_finite = _quantize(tl.where(b_here[:, None], b_qf - b_mean[None, :], 0.0))
    b_keep_all = ~(b_finite & (tl.abs(b_t) < float("inf")))
    b_t = tl.where(b_keep_all, float("-inf"), b_t + tl.load(log_tau + i_h))
    out = i_bh * tl.num_programs(0) * ROW + i_n
    tl.store(q4 + out[:, None] * BD + i_d[None, :], b_q4.to(q4.dtype.element_ty))
    tl.store(q_scale + out, b_scale * scale)
    # Rows behind the last keep nothing.
    tl.store(threshold + out, tl.where(b_here, b_t, float("inf")))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=["n_queries", "n_keys", "Mq", "W"])
def _estimate(
    q4, q_scale, threshold, k4, columns, log_tau, words, Hq, G, n_queries, n_keys, Mq, W,
    BM: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Bits of the judged tiles of BM / 64 query blocks."""
    BLOCKS: tl.constexpr = BM // _ROWS
    PARTS: tl.constexpr = BN // _KEYS
    TURNS: tl.constexpr = _WORD // PARTS  # products that fill a word
    # The longest rows first.
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_h = i_bh % Hq
    i_hk = i_bh // Hq * (Hq // G) + i_h // G
    i_r, i_d, i_n = i_t * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    i_block = i_t * BLOCKS + tl.arange(0, BLOCKS)
    b_blocks = i_block < Mq
    b_judged = tl.where(b_blocks, _n_judged(i_block, n_queries, n_keys), 0)
    most = tl.max(b_judged, 0)
    b_rows = i_r < Mq * _ROWS
    row = i_bh * Mq * _ROWS + i_r
    b_q = tl.load(q4 + row[:, None] * BD + i_d[None, :], mask=b_rows[:, None], other=0.0)
    b_scale = tl.load(q_scale + row, mask=b_rows, other=0.0)
    b_t = tl.load(threshold + row, mask=b_rows, other=float("inf"))
    # Tested tiles start behind the sink; the last ends well before the last key.
    k4 += i_hk * n_keys * BD + _KEYS * BD
    columns += i_bh * _padded(n_keys) + _KEYS
    i_part = tl.arange(0, PARTS)
    dense = tl.load(log_tau + i_h) == float("-inf")
    for i_w in range(0, (most + _WORD - 1) // _WORD):
        b_word = tl.zeros([BM, 4], dtype=tl.int32)
        if dense:
            b_word = tl.full([BM, 4], -1, dtype=tl.int32)
        else:
            turns = tl.minimum(TURNS, (most - i_w * _WORD) // PARTS)
            for turn in range(0, turns):
                i_k = (i_w * TURNS + turn) * BN + i_n
                b_k = tl.load(k4 + i_k[:, None].to(tl.int64) * BD + i_d[None, :])
                b_both = tl.load(columns + i_k)  # two float32 in one int64: half the loads
                b_ks = b_both.to(tl.int32).to(tl.float32, bitcast=True)
                b_c = (b_both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                b_e = tl.dot(b_q, tl.trans(b_k)).to(tl.float32)
                b_e = b_e * (b_scale[:, None] * b_ks[None, :]) + b_c[None, :]
                # A thread of the product holds pairs of columns, every fourth pair: over these eight of a
                # tile's columns the largest takes no exchange; the four threads' bits meet at the word's end.
                b_e = tl.reshape(b_e, (BM, PARTS, 4, 4, 2))
                b_above = tl.max(tl.max(b_e, 4), 2) > b_t[:, None, None]
                b_word |= tl.sum(b_above.to(tl.int32) << i_part[None, :, None], 1) << (turn * PARTS)
        # Or over a block's rows.
        b_bits = tl.reduce(tl.reshape(b_word, (BLOCKS, _ROWS * 4)), 1, _or)
        # Tiles that are local to the earlier of the blocks are none of its judged ones.
        left = b_judged - i_w * _WORD
        b_one = tl.full([BLOCKS], 1, dtype=tl.int32)
        b_mine = tl.where(left >= _WORD, -1, (b_one << tl.minimum(tl.maximum(left, 0), _WORD - 1)) - 1)
        tl.store(words + (i_bh * Mq + i_block) * W + i_w, b_bits & b_mine, mask=b_blocks)


def tile_bits(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], tau: Float[Tensor, " Hq"], scale: float
) -> Int[Tensor, "B Hq Mq W"]:
    """Bits of the judged tiles; see the package. Deterministic: no atomics."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys, device = k.shape[1], k.shape[2], q.device
    G, Mq, W = Hq // Hkv, triton.cdiv(n_queries, ROWS), n_words(n_queries, n_keys)
    BD = max(32, triton.next_power_of_2(D))  # int8 products sum over 32 at least
    q_mean, k_mean = (x.mean(2, dtype=torch.float32) for x in (q, k))
    log_tau = tau.log()

    k4 = torch.empty(B * Hkv, n_keys, BD, dtype=_number(device), device=device)
    columns = torch.empty(B * Hq, triton.cdiv(n_keys, 16) * 16, 2, dtype=torch.float32, device=device)
    BN = 64 if BD <= 64 else 32  # more rows would not fit into the registers
    _keys[(triton.cdiv(n_keys, BN), B * Hkv)](
        k, k_mean, q_mean, k4, columns, *k.stride()[:3], Hkv, G, n_keys, D, scale,
        BN=BN, BD=BD, num_warps=4,
    )  # fmt: skip

    q4 = torch.empty(B * Hq, Mq * ROWS, BD, dtype=k4.dtype, device=device)
    q_scale = torch.empty(B * Hq, Mq * ROWS, dtype=torch.float32, device=device)
    threshold = torch.empty_like(q_scale)
    _queries[(Mq, B * Hq)](
        q, k, q_mean, k_mean, log_tau, q4, q_scale, threshold, *q.stride()[:3], *k.stride()[:3],
        Hq, G, n_queries, n_keys, D, scale, ROW=ROWS, BN=64, BD=BD, num_warps=4, num_stages=2,
    )  # fmt: skip

    words = torch.zeros(B, Hq, Mq, W, dtype=torch.int32, device=device)
    BM, BN, warps, stages = _tile_sizes(BD)
    _estimate[(triton.cdiv(Mq * ROWS, BM), B * Hq)](
        q4, q_scale, threshold, k4, columns.view(torch.int64), log_tau, words,
        Hq, G, n_queries, n_keys, Mq, W, BM=BM, BD=BD, BN=BN, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return words


def _number(device: torch.device) -> torch.dtype:
    """What holds the 4-bit numbers: float8 where the card (or the interpreter) multiplies it."""
    new = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return torch.float8_e4m3fn if new else torch.int8


def _tile_sizes(BD: int) -> tuple[int, int, int, int]:
    """Query rows, keys per product (at most a segment), warps, stages: what TILES names first."""
    return TILES[64 if BD <= 64 else BD][0]


# Each thread loads the scale and shift of all its columns: with more rows to a thread they serve more scores.
TILES = {
    64: ((256, 64, 4, 3), (128, 128, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3), (256, 128, 8, 3)),
    128: ((256, 64, 4, 3), (128, 128, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3), (256, 128, 8, 3)),
    256: ((64, 128, 4, 3), (128, 64, 4, 3), (128, 128, 8, 2)),
}


@triton.jit
def _kept(words, i_tile, judged, last):
    """Whether the tiles are computed: sink, kept or local, and not wholly in the future."""
    i_bit = i_tile - 1
    b_in = (i_bit >= 0) & (i_bit < judged)
    b_word = tl.load(words + i_bit // _WORD, mask=b_in, other=0)
    return (~b_in | (((b_word >> (i_bit % _WORD)) & 1) == 1)) & (i_tile * _KEYS <= last)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "W", "blocks"])
def _lists(words, counts, indices, n_queries, n_keys, W, blocks, BJ: tl.constexpr):
    i_m, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_row = i_bh * tl.num_programs(0) + i_m
    words += i_row * W
    judged = _n_judged(i_m, n_queries, n_keys)
    last = tl.minimum((i_m + 1) * _ROWS, n_queries) - 1 + n_keys - n_queries
    total = 0
    for j0 in range(0, last // _ROWS + 1, BJ):
        i_j = j0 + tl.arange(0, BJ)
        # A block of 64 keys is two tiles.
        b_take = _kept(words, 2 * i_j, judged, last) | _kept(words, 2 * i_j + 1, judged, last)
        b_one = b_take.to(tl.int32)
        b_place = total + tl.cumsum(b_one, 0) - 1
        tl.store(indices + i_row * blocks + b_place, i_j, mask=b_take)
        total += tl.sum(b_one, 0)
    tl.store(counts + i_row, total)


def tile_lists(
    words: Int[Tensor, "B H Mq W"], n_queries: int, n_keys: int
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """Lists of 64 x 64 blocks, as in :func:`sparseland.ops.lowbit_scores.tile_blocks`."""
    words = words.contiguous()
    B, H, Mq, W = words.shape
    blocks = triton.cdiv(n_keys, ROWS)
    counts = torch.empty(B, H, Mq, dtype=torch.int32, device=words.device)
    indices = torch.empty(B, H, Mq, blocks, dtype=torch.int32, device=words.device)
    BJ = min(256, max(16, triton.next_power_of_2(blocks)))
    _lists[(Mq, B * H)](words, counts, indices, n_queries, n_keys, W, blocks, BJ=BJ, num_warps=1)
    return counts, indices
