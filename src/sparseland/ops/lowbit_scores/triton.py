"""The low-bit estimate in Triton: 4-bit numbers in 8-bit tensor cores, bits out.

Three kernels make the factors (keys; queries with their thresholds; both read once) and the bits: a program
of the third keeps a tile of queries and streams all keys between sink and local ones past it. Each row
gathers one bit per tile of 32 keys; every 1024 keys the rows' words are or-ed together, so that what is
written is N^2 / 2048 / 8 bytes a head. A fourth kernel turns bits into lists.

Hopper has no 4-bit tensor cores. Whole numbers up to 7 are exact in float8 too. Products, scales and
thresholds are float16, two in a register: what is left to do for each score costs as much as the product.
Float16 holds whole numbers up to 2048; the products above them are rounded by a 2048th, which is far below
what the 4 bits lost.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.lowbit_scores.tiles import KEYS, LOCAL, ROWS, SEGMENT, WORD, n_words
from sparseland.patterns import cdiv, next_power_of_2

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to the nearest whole number, ties to even.
_ROUND = tl.constexpr(12582912.0)
_ROWS, _KEYS, _LOCAL = tl.constexpr(ROWS), tl.constexpr(KEYS), tl.constexpr(LOCAL)
_SEGMENT, _WORD = tl.constexpr(SEGMENT), tl.constexpr(WORD)
_LARGEST = tl.constexpr(65504.0)  # of float16


@triton.jit
def _n_judged(block, n_queries, n_keys):
    """See ``tiles.n_judged``."""
    to_diagonal = (n_keys - n_queries + (block + 1) * _ROWS + _KEYS - 1) // _KEYS
    return tl.maximum(to_diagonal - 1 - _LOCAL, 0) // _SEGMENT * _SEGMENT


@triton.jit
def _padded(n_keys):
    """Numbers per head: whole tiles."""
    return (n_keys + _KEYS - 1) // _KEYS * _KEYS


@triton.jit
def _stored(i_n):
    """Where a key's number lies: what a thread of the product needs of a tile is one piece of 16 bytes."""
    return i_n // _KEYS * _KEYS + i_n % 8 // 2 * 8 + i_n % _KEYS // 8 * 2 + i_n % 2


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
    k, k_mean, q_mean, unit, k4, k_scale, shift, stride_kb, stride_kh, stride_kn, Hkv, G, n_keys, D, scale,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """4-bit keys ``[B * Hkv, Nk, BD]``, their scales in ``unit`` s, and per query head ``scale c_j``."""
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
    b_scale /= tl.load(unit + i_bh)
    tl.store(k_scale + i_bh * _padded(n_keys) + _stored(i_n), b_scale.to(tl.float16), mask=b_here)
    for i_g in range(0, G):
        i_q = i_bh * G + i_g
        b_mean = tl.load(q_mean + i_q * D + i_d, mask=b_dim, other=0.0)
        b_shift = tl.sum(b_k * b_mean[None, :], 1) * scale
        # What can't be compared is kept: an infinite estimate stands for it.
        b_shift = tl.where(b_finite & (tl.abs(b_shift) < _LARGEST), b_shift, float("inf"))
        tl.store(shift + i_q * _padded(n_keys) + _stored(i_n), b_shift.to(tl.float16), mask=b_here)


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
    q, k, q_mean, k_mean, unit, log_tau, q4, q_scale, threshold, stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn, Hq, G, n_queries, n_keys, D, scale,
    ROW: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """4-bit queries ``[B * Hq, Mq * 64, BD]``, ``scale unit`` times their scales, and thresholds."""
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
    b_scale *= scale * tl.load(unit + i_b * (Hq // G) + i_hk)
    b_keep_all = ~(b_finite & (tl.abs(b_t) < _LARGEST) & (b_scale < _LARGEST))
    b_t = tl.where(b_keep_all, float("-inf"), b_t + tl.load(log_tau + i_h))
    out = i_bh * tl.num_programs(0) * ROW + i_n
    tl.store(q4 + out[:, None] * BD + i_d[None, :], b_q4.to(q4.dtype.element_ty))
    tl.store(q_scale + out, tl.where(b_keep_all, 0.0, b_scale).to(tl.float16))
    # Rows behind the last keep nothing.
    tl.store(threshold + out, tl.where(b_here, b_t, float("inf")).to(tl.float16))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _columns(p, PARTS: tl.constexpr):
    """Float16 numbers of PARTS tiles' keys as they lie in memory, in the order of the keys."""
    b_x = tl.load(p + tl.arange(0, PARTS * _KEYS))
    return tl.reshape(tl.permute(tl.reshape(b_x, (PARTS, 4, 4, 2)), (0, 2, 1, 3)), (PARTS * _KEYS,))[None, :]


@triton.jit(do_not_specialize=["n_queries", "n_keys", "Mq", "W"])
def _estimate(
    q4, q_scale, threshold, k4, k_scale, shift, log_tau, words, Hq, G, n_queries, n_keys, Mq, W,
    BM: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Bits of the judged tiles of BM / 64 query blocks."""
    BLOCKS: tl.constexpr = BM // _ROWS
    PARTS: tl.constexpr = BN // _KEYS
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
    words += (i_bh * Mq + i_block) * W
    if tl.load(log_tau + i_h) == float("-inf"):
        for i_w in range(0, (most + _WORD - 1) // _WORD):
            tl.store(words + i_w, _first_bits(b_judged - i_w * _WORD), mask=b_blocks)
        return
    b_rows = i_r < Mq * _ROWS
    row = i_bh * Mq * _ROWS + i_r
    b_q = tl.load(q4 + row[:, None] * BD + i_d[None, :], mask=b_rows[:, None], other=0.0)
    b_scale = tl.load(q_scale + row, mask=b_rows, other=0.0)
    b_t = tl.load(threshold + row, mask=b_rows, other=float("inf"))
    b_t = tl.reshape(b_t, (BLOCKS, 4, 2, 8, 1, 1, 1))
    # Tested tiles start behind the sink; the last ends well before the last key.
    k4 += i_hk * n_keys * BD + _KEYS * BD
    k_scale += i_hk * _padded(n_keys) + _KEYS
    shift += i_bh * _padded(n_keys) + _KEYS
    i_part = tl.arange(0, PARTS)
    b_word = tl.zeros([BLOCKS, 4, 8, 4], dtype=tl.int32)
    filled = 0  # bits of the word
    for done in range(0, most, PARTS):
        b_ks, b_c = _columns(k_scale, PARTS), _columns(shift, PARTS)
        k_scale += BN
        shift += BN
        b_k = tl.load(k4 + i_n[:, None] * BD + i_d[None, :])
        k4 += BN * BD
        b_e = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.float16).to(tl.float16)
        b_e = b_e * (b_scale[:, None] * b_ks) + b_c
        # A thread of the product holds two rows of each block and of them pairs of columns, every fourth
        # pair: over these the largest excess takes no exchange; the threads' bits meet at the word's end.
        b_e = tl.reduce(tl.reshape(b_e, (BLOCKS, 4, 2, 8, PARTS, 4, 4, 2)), 5, _larger) - b_t
        b_e = tl.reduce(tl.reduce(b_e, 2, _larger), 5, _larger)
        b_bits = (~(b_e <= 0.0)).to(tl.int32) << i_part[None, None, None, :, None]
        b_word |= tl.sum(b_bits, 3) << filled
        filled += PARTS
        if (filled == _WORD) | (done + PARTS == most):
            # Or over a block's rows.
            b_all = tl.reduce(tl.reshape(b_word, (BLOCKS, 128)), 1, _or)
            # Tiles that are local to the earlier of the blocks are none of its judged ones.
            tl.store(words, b_all & _first_bits(b_judged), mask=b_blocks)
            words += 1
            b_judged -= _WORD
            b_word = tl.zeros([BLOCKS, 4, 8, 4], dtype=tl.int32)
            filled = 0


@triton.jit
def _first_bits(count):
    """A word whose first ``count`` bits are set."""
    b_one = tl.full(count.shape, 1, dtype=tl.int32)
    return tl.where(count >= _WORD, -1, (b_one << tl.minimum(tl.maximum(count, 0), _WORD - 1)) - 1)


class Factors(NamedTuple):
    """What the estimates are made of; see the kernels that write it."""

    q4: Tensor
    q_scale: Tensor
    threshold: Tensor
    k4: Tensor
    k_scale: Tensor
    shift: Tensor
    log_tau: Tensor


def factors(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], tau: Float[Tensor, " Hq"], scale: float
) -> Factors:
    """Queries and keys as whole numbers, with their scales, shifts and thresholds."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys, device = k.shape[1], k.shape[2], q.device
    G, Mq = Hq // Hkv, cdiv(n_queries, ROWS)
    BD = max(32, next_power_of_2(D))  # 8-bit products sum over 32 at least
    q_mean, k_mean = (x.mean(2, dtype=torch.float32) for x in (q, k))
    log_tau = tau.log()
    # In this unit the keys' scales are about 1 at most, which float16 likes.
    unit = torch.linalg.vector_norm(k, torch.inf, (2, 3), dtype=torch.float32) / 7
    unit = torch.where((unit > 0) & unit.isfinite(), unit, 1)

    k4 = torch.empty(B * Hkv, n_keys, BD, dtype=_number(device), device=device)
    padded = cdiv(n_keys, KEYS) * KEYS
    k_scale = torch.empty(B * Hkv, padded, dtype=torch.float16, device=device)
    shift = torch.empty(B * Hq, padded, dtype=torch.float16, device=device)
    BN = 64 if BD <= 64 else 32  # more rows would not fit into the registers
    _keys[(cdiv(n_keys, BN), B * Hkv)](
        k, k_mean, q_mean, unit, k4, k_scale, shift, *k.stride()[:3], Hkv, G, n_keys, D, scale,
        BN=BN, BD=BD, num_warps=4,
    )  # fmt: skip

    q4 = torch.empty(B * Hq, Mq * ROWS, BD, dtype=k4.dtype, device=device)
    q_scale = torch.empty(B * Hq, Mq * ROWS, dtype=torch.float16, device=device)
    threshold = torch.empty_like(q_scale)
    _queries[(Mq, B * Hq)](
        q, k, q_mean, k_mean, unit, log_tau, q4, q_scale, threshold, *q.stride()[:3], *k.stride()[:3],
        Hq, G, n_queries, n_keys, D, scale, ROW=ROWS, BN=64, BD=BD, num_warps=4, num_stages=2,
    )  # fmt: skip
    return Factors(q4, q_scale, threshold, k4, k_scale, shift, log_tau)


def tile_bits(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], tau: Float[Tensor, " Hq"], scale: float
) -> Int[Tensor, "B Hq Mq W"]:
    """Bits of the judged tiles; see the package. Deterministic: no atomics."""
    B, Hq, n_queries, _ = q.shape
    n_keys = k.shape[2]
    Mq, W = cdiv(n_queries, ROWS), n_words(n_queries, n_keys)
    made = factors(q, k, tau, scale)
    words = torch.zeros(B, Hq, Mq, W, dtype=torch.int32, device=q.device)
    BD = made.q4.shape[2]
    BM, BN, warps, stages = _tile_sizes(BD)
    _estimate[(cdiv(Mq * ROWS, BM), B * Hq)](
        *made, words, Hq, Hq // k.shape[1], n_queries, n_keys, Mq, W,
        BM=BM, BD=BD, BN=BN, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return words


def _number(device: torch.device) -> torch.dtype:
    """What holds the 4-bit numbers: float8 where the card (or the interpreter) multiplies it."""
    new = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return torch.float8_e4m3fn if new else torch.int8


def _tile_sizes(BD: int) -> tuple[int, int, int, int]:
    """Query rows, keys per product (at most a segment), warps, stages: what TILES names first."""
    return TILES[64 if BD <= 64 else BD][0]


TILES = {
    64: ((256, 64, 4, 3), (128, 128, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3)),
    128: ((256, 64, 4, 3), (128, 128, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3)),
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
    blocks = cdiv(n_keys, ROWS)
    counts = torch.empty(B, H, Mq, dtype=torch.int32, device=words.device)
    indices = torch.empty(B, H, Mq, blocks, dtype=torch.int32, device=words.device)
    BJ = min(256, max(16, next_power_of_2(blocks)))
    _lists[(Mq, B * H)](words, counts, indices, n_queries, n_keys, W, blocks, BJ=BJ, num_warps=1)
    return counts, indices
