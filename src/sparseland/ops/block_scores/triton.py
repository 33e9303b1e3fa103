"""Vertical and slash sums of the probe rows in Triton: K is read twice, no L x Nk matrix is stored.

The first kernel finds the rows' log-sum-exp over chunks of the keys. The second takes up to 64 probe rows
and a tile of keys as wide as they are high, recomputes its probabilities, and sums them along columns and,
after a skew in registers, along diagonals. A tile touches two runs of diagonals, the second shared with its
neighbour's first; each run goes to its own place and the last kernel adds the two, adds the parts of the
probe and sums blocks: no atomics, so the result is the same in every run.

The rest: block means, the map of their products, and the distance of the probe's attention per block from
what block means tell of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

_LOG2E = 1.4426950408889634
_CHUNKS = 64  # parts of the keys whose log-sum-exps are found apart
_PART = 64  # probe rows of one program of the sums


# Products of block means use the tensor cores, three tf32 products for one of float32.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _logits(
    b_q, k_base, stride_kn, i_k, i_row, i_d, n_keys, n_probe, D, scale_log2, MASKED: tl.constexpr
):  # fmt: skip
    """Base-2 logits of one tile, -inf for the future, for rows past the probe and keys past the end.

    Not MASKED: all keys lie before the probe; what rows past it get is undefined.
    """
    if MASKED:
        b_load = (i_k < n_keys)[:, None] & (i_d < D)[None, :]
    else:
        b_load = (i_d < D)[None, :]
    b_k = tl.load(k_base + i_k[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_load, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    if not MASKED:
        return b_s
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
def _lse_step(
    b_m, b_l, b_q, k_base, stride_kn, start, i_row, i_d, n_keys, n_probe, D, scale_log2,
    MASKED: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """One tile of keys joins the running maximum (base 2) and sum of each row."""
    i_k = start + tl.arange(0, BL)
    b_s = _logits(b_q, k_base, stride_kn, i_k, i_row, i_d, n_keys, n_probe, D, scale_log2, MASKED)
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    # A row may see none of a chunk: keep -inf - (-inf) out.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_l = b_l * tl.exp2(b_m - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
    return b_new, b_l


@triton.jit
def _chunk_lse(
    q, k, lse, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    Hq, Hkv, n_queries, n_keys, n_probe, D, chunk, scale_log2, ROWS, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Part ``program_id(2)`` of the probe, BL of its ROWS rows, against a chunk of the keys."""
    i_chunk, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_row, i_d = tl.program_id(2) * BL + tl.arange(0, BL), tl.arange(0, BD)
    b_q = _load_q(q, stride_qb, stride_qh, stride_qn, i_b, i_h, i_row, i_d, n_queries, n_probe, D)
    k_base = k + i_b * stride_kb + (i_h // (Hq // Hkv)) * stride_kh
    b_m = tl.full([BL], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BL], dtype=tl.float32)
    begin, end = i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, n_keys)
    middle = tl.maximum(begin, tl.minimum(end, n_keys - n_probe) // BL * BL)
    for start in range(begin, middle, BL):
        b_m, b_l = _lse_step(
            b_m, b_l, b_q, k_base, stride_kn, start, i_row, i_d, n_keys, n_probe, D, scale_log2, False, BL
        )
    for start in range(middle, end, BL):
        b_m, b_l = _lse_step(
            b_m, b_l, b_q, k_base, stride_kn, start, i_row, i_d, n_keys, n_probe, D, scale_log2, True, BL
        )
    b_lse = tl.where(b_l == 0.0, float("-inf"), b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l)))
    i_out = (i_bh.to(tl.int64) * tl.num_programs(0) + i_chunk) * ROWS
    tl.store(lse + i_out + i_row, b_lse)


@triton.jit
def _sums(
    q, k, lse, vertical, low, high, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    Hq, Hkv, n_queries, n_keys, n_probe, D, scale_log2, ROWS, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Part ``program_id(2)`` of the probe, BL of its ROWS rows, against as many keys."""
    i_tile, i_bh, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_c, i_d = tl.arange(0, BL), tl.arange(0, BD)
    i_row = i_part * BL + i_c
    b_q = _load_q(q, stride_qb, stride_qh, stride_qn, i_b, i_h, i_row, i_d, n_queries, n_probe, D)
    k_base = k + i_b * stride_kb + (i_h // (Hq // Hkv)) * stride_kh
    i_k = i_tile * BL + i_c
    b_lse = tl.load(lse + i_bh.to(tl.int64) * ROWS + i_row)
    b_s = _logits(b_q, k_base, stride_kn, i_k, i_row, i_d, n_keys, n_probe, D, scale_log2, True)
    b_p = tl.exp2(b_s - b_lse[:, None])
    i_pbh = i_part.to(tl.int64) * tl.num_programs(1) + i_bh
    tl.store(vertical + i_pbh * n_keys + i_k, tl.sum(b_p, 0), mask=i_k < n_keys)
    # Skew: place (i, c) gets the column c + i; past the tile's end it is the diagonal c - BL.
    i_from = i_c[None, :] + i_c[:, None]
    b_skew = tl.gather(b_p, i_from % BL, 1)
    i_out = (i_pbh * tl.num_programs(0) + i_tile) * BL + i_c
    tl.store(high + i_out, tl.sum(tl.where(i_from < BL, b_skew, 0.0), 0))
    tl.store(low + i_out, tl.sum(tl.where(i_from >= BL, b_skew, 0.0), 0))


@triton.jit
def _merge_lse(partial, lse, chunks, n_probe, BL: tl.constexpr, BC: tl.constexpr):
    """One log-sum-exp per probe row out of those of the chunks; +inf where a row sees nothing."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_row, i_c = tl.arange(0, BL), tl.arange(0, BC)
    p = partial + (i_bh * chunks + i_c[:, None]) * BL + i_row[None, :]
    b_x = tl.load(p, mask=(i_c < chunks)[:, None], other=float("-inf"))
    b_m = tl.max(b_x, 0)
    b_shift = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_sum = tl.sum(tl.exp2(b_x - b_shift[None, :]), 0)
    # Rows past the probe see nothing; +inf makes their probabilities 0.
    b_none = (b_sum == 0.0) | (i_row >= n_probe)
    b_lse = tl.where(b_none, float("inf"), b_shift + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))
    tl.store(lse + i_bh * BL + i_row, b_lse)


@triton.jit
def _gather_sums(
    vertical, low, high, tokens, blocks, n_bh, n_keys, n_probe, n_blocks, padded, SIZE,
    PARTS: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Sums over the probe's parts, diagonals by their distance, and sums of blocks of both."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_s = tl.arange(0, BS)
    i_n = i_m * SIZE + i_s
    b_in = (i_s < SIZE) & (i_n < n_keys)
    b_v = tl.zeros([BS], tl.float32)
    b_s = tl.zeros([BS], tl.float32)
    for i_part in tl.static_range(PARTS):
        i_pbh = i_part * n_bh + i_bh
        b_v += tl.load(vertical + i_pbh * n_keys + i_n, mask=b_in, other=0.0)
        # Diagonal d = j - i of a tile runs from -BL up: `high` starts at the tile's first key, `low` BL
        # before. Distance o is the diagonal Nk - L - o of the first part's rows i, BL more for each other.
        i_d = n_keys - n_probe + i_part * BL - i_n
        b_s += tl.load(high + i_pbh * padded + i_d, mask=b_in & (i_d >= 0) & (i_d < padded), other=0.0)
        b_low = b_in & (i_d >= -BL) & (i_d + BL < padded)
        b_s += tl.load(low + i_pbh * padded + i_d + BL, mask=b_low, other=0.0)
    tl.store(tokens + i_bh * n_keys + i_n, b_v, mask=b_in)
    tl.store(tokens + (n_bh + i_bh) * n_keys + i_n, b_s, mask=b_in)
    tl.store(blocks + i_bh * n_blocks + i_m, tl.sum(b_v, 0))
    tl.store(blocks + (n_bh + i_bh) * n_blocks + i_m, tl.sum(b_s, 0))


@triton.jit
def _mean_pool(
    x, out, active, stride_xb, stride_xh, stride_xn, H, N, D, SIZE,
    HAS_ACTIVE: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    if HAS_ACTIVE:  # noqa: SIM102  a pointer that is None can't be read, not even by `and`
        if tl.load(active + i_bh) == 0:
            return
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_s, i_d = tl.arange(0, BS), tl.arange(0, BD)
    i_n = i_m * SIZE + i_s
    b_in = (i_s < SIZE) & (i_n < N)
    p = x + i_b * stride_xb + i_h * stride_xh + i_n.to(tl.int64)[:, None] * stride_xn + i_d[None, :]
    b_x = tl.load(p, mask=b_in[:, None] & (i_d < D)[None, :], other=0.0).to(tl.float32)
    held = tl.minimum(SIZE, N - i_m * SIZE).to(tl.float32)
    i_out = (i_bh.to(tl.int64) * tl.num_programs(0) + i_m) * D
    tl.store(out + i_out + i_d, tl.sum(b_x, 0) / held, mask=i_d < D)


@triton.jit
def _map_tile(q, k, i_m, i_c, seen, Mq, D, scale_log2, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """Logits of a tile of query blocks and key blocks, -inf for blocks wholly in the future.

    The head dimension goes by in parts: three factors of each operand would not fit into the registers.
    """
    b_s = tl.zeros([BM, BC], tl.float32)
    for start in range(0, D, BD):
        i_d = start + tl.arange(0, BD)
        b_d = (i_d < D)[None, :]
        b_q = tl.load(q + i_m[:, None] * D + i_d[None, :], mask=(i_m < Mq)[:, None] & b_d, other=0.0)
        b_load = (i_c < tl.max(seen, 0))[:, None] & b_d
        b_k = tl.load(k + i_c[:, None] * D + i_d[None, :], mask=b_load, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=_PRECISION)
    return tl.where(i_c[None, :] < seen[:, None], b_s * scale_log2, float("-inf"))


@triton.jit
def _pooled_map(
    q, k, out, active, stride_qb, stride_qh, stride_kb, stride_kh, H, G, Mq, Mk, D, n_queries, n_keys,
    scale, SIZE: tl.constexpr, NORMALISE: tl.constexpr, HAS_ACTIVE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    if HAS_ACTIVE:  # noqa: SIM102  a pointer that is None can't be read, not even by `and`
        if tl.load(active + i_bh) == 0:
            return
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    i_m = i_t * BM + tl.arange(0, BM)
    q += i_b * stride_qb + i_h.to(tl.int64) * stride_qh
    k += i_b * stride_kb + (i_h // G).to(tl.int64) * stride_kh
    b_rows = i_m < Mq
    b_last = tl.minimum((i_m + 1) * SIZE, n_queries) - 1 + n_keys - n_queries
    seen = tl.where(b_rows, b_last // SIZE + 1, 0)
    most = tl.cdiv(tl.max(seen, 0), BC) * BC
    p_out = out + i_bh.to(tl.int64) * Mq * Mk + i_m.to(tl.int64)[:, None] * Mk
    if NORMALISE:
        scale_log2 = scale * 1.4426950408889634
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        for start in range(0, most, BC):
            i_c = start + tl.arange(0, BC)
            b_s = _map_tile(q, k, i_m, i_c, seen, Mq, D, scale_log2, BM, BC, BD)
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
            b_max = b_new
        # Rows past the end have no sum; every other sees its own block.
        b_lse = tl.where(b_rows, b_max + tl.log2(tl.where(b_rows, b_sum, 1.0)), 0.0)
    for start in range(0, most, BC):
        i_c = start + tl.arange(0, BC)
        if NORMALISE:
            b_out = tl.exp2(_map_tile(q, k, i_m, i_c, seen, Mq, D, scale_log2, BM, BC, BD) - b_lse[:, None])
        else:
            b_out = _map_tile(q, k, i_m, i_c, seen, Mq, D, scale, BM, BC, BD)
        tl.store(p_out + i_c[None, :], b_out, mask=b_rows[:, None] & (i_c < Mk)[None, :])
    for start in range(most, Mk, BC):
        i_c = start + tl.arange(0, BC)
        b_out = tl.full([BM, BC], 0.0 if NORMALISE else float("-inf"), tl.float32)
        tl.store(p_out + i_c[None, :], b_out, mask=b_rows[:, None] & (i_c < Mk)[None, :])


@triton.jit
def _probe_distance(
    q, k, true, out, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_tb, stride_th,
    H, G, n_queries, n_probe, Mk, D, scale, BL: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    i_row, i_d = tl.arange(0, BL), tl.arange(0, BD)
    b_q = _load_q(
        q, stride_qb, stride_qh, stride_qn, i_b, i_h.to(tl.int64), i_row, i_d, n_queries, n_probe, D
    )
    b_mean = tl.sum(b_q.to(tl.float32), 0) / n_probe * scale
    k += i_b * stride_kb + (i_h // G).to(tl.int64) * stride_kh
    true += i_b * stride_tb + i_h.to(tl.int64) * stride_th
    b_max = tl.full([BC], float("-inf"), tl.float32)
    b_sum = tl.zeros([BC], tl.float32)
    for start in range(0, Mk, BC):
        i_c = start + tl.arange(0, BC)
        b_load = (i_c < Mk)[:, None] & (i_d < D)[None, :]
        b_k = tl.load(k + i_c[:, None] * D + i_d[None, :], mask=b_load, other=0.0)
        b_s = tl.where(i_c < Mk, tl.sum(b_k * b_mean[None, :], 1), float("-inf"))
        b_new = tl.maximum(b_max, b_s)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.exp(b_s - b_shift)
        b_max = b_new
    peak = tl.max(b_max, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(b_sum * tl.exp(b_max - peak), 0)
    b_js = tl.zeros([BC], tl.float32)
    for start in range(0, Mk, BC):
        i_c = start + tl.arange(0, BC)
        b_load = (i_c < Mk)[:, None] & (i_d < D)[None, :]
        b_k = tl.load(k + i_c[:, None] * D + i_d[None, :], mask=b_load, other=0.0)
        b_s = tl.where(i_c < Mk, tl.sum(b_k * b_mean[None, :], 1), float("-inf"))
        b_guess = tl.exp(b_s - peak) / total
        b_true = tl.load(true + i_c, mask=i_c < Mk, other=0.0) / n_probe
        # 0 log 0 = 0, also where both are 0; a NaN is no 0 and stays one.
        b_middle = (b_guess + b_true) / 2
        b_middle = tl.where(b_middle == 0.0, 1.0, b_middle)
        b_js += tl.where(
            b_guess == 0.0, 0.0, b_guess * tl.log(tl.where(b_guess == 0.0, 1.0, b_guess) / b_middle)
        )
        b_js += tl.where(b_true == 0.0, 0.0, b_true * tl.log(tl.where(b_true == 0.0, 1.0, b_true) / b_middle))
    js = tl.sum(b_js, 0) / 2
    tl.store(out + i_bh, tl.sqrt(tl.where(js < 0.0, 0.0, js)))


def probe_sums(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], n_probe: int, block_size: int, scale: float
) -> tuple[Float[Tensor, "2 B Hq Nk"], Float[Tensor, "2 B Hq Mk"]]:
    """Column and diagonal sums, and their sums over blocks; at most 128 probe rows. Deterministic."""
    q, k = _last_dense(q), _last_dense(k)
    B, Hq, n_queries, D = q.shape
    n_keys, n_probe = k.shape[2], min(n_probe, n_queries)
    BL = max(16, next_power_of_2(n_probe))
    BD = max(16, next_power_of_2(D))
    strides = (*q.stride()[:3], *k.stride()[:3])
    sizes = (Hq, k.shape[1], n_queries, n_keys, n_probe, D)
    # Softmax and skew are dear in wide tiles: the probe goes by in parts.
    part = min(BL, _PART)
    parts, tiles = BL // part, cdiv(n_keys, part)
    # Enough programs for a large GPU, few enough that their partial sums stay small.
    chunk = part * cdiv(tiles, _CHUNKS)
    chunks = cdiv(n_keys, chunk)
    number = {"dtype": torch.float32, "device": q.device}
    partial = torch.empty(B * Hq, chunks, BL, **number)
    lse = torch.empty(B * Hq, BL, **number)
    tokens = torch.empty(2, B, Hq, n_keys, **number)
    blocks = torch.empty(2, B, Hq, cdiv(n_keys, block_size), **number)
    vertical = torch.empty(parts, B * Hq, n_keys, **number)
    low, high = torch.empty(2, parts, B * Hq, tiles * part, **number)
    options = {"BL": part, "BD": BD, "num_warps": 4 if part * BD <= 64 * 64 else 8, "num_stages": 2}
    _chunk_lse[(chunks, B * Hq, parts)](q, k, partial, *strides, *sizes, chunk, scale * _LOG2E, BL, **options)
    _merge_lse[(B * Hq,)](partial, lse, chunks, n_probe, BL=BL, BC=_CHUNKS, num_warps=4)
    _sums[(tiles, B * Hq, parts)](
        q, k, lse, vertical, low, high, *strides, *sizes, scale * _LOG2E, BL, **options
    )
    _gather_sums[(blocks.shape[3], B * Hq)](
        vertical, low, high, tokens, blocks, B * Hq, n_keys, n_probe, blocks.shape[3], tiles * part,
        block_size, PARTS=parts, BL=part, BS=next_power_of_2(block_size),
        num_warps=1 if block_size <= 256 else 4,
    )  # fmt: skip
    return tokens, blocks


def mean_pool(
    x: Float[Tensor, "B H N D"], block_size: int, active: Bool[Tensor, "B H"] | None
) -> Float[Tensor, "B H M D"]:
    """Sums in float32; nothing is read or written for heads that are not active."""
    x = _last_dense(x)
    B, H, N, D = x.shape
    out = torch.empty(B, H, cdiv(N, block_size), D, dtype=torch.float32, device=x.device)
    active = None if active is None else active.contiguous().view(torch.int8)
    if out.numel():
        _mean_pool[(out.shape[2], B * H)](
            x, out, active, *x.stride()[:3], H, N, D, block_size, HAS_ACTIVE=active is not None,
            BS=next_power_of_2(block_size), BD=max(16, next_power_of_2(D)), num_warps=4,
        )  # fmt: skip
    return out


def pooled_map(
    q: Float[Tensor, "B Hq Mq D"],
    k: Float[Tensor, "B Hkv Mk D"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    scale: float,
    normalise: bool,
    active: Bool[Tensor, "B Hq"] | None,
) -> Float[Tensor, "B Hq Mq Mk"]:
    """Two sweeps over the key blocks where rows are normalised: products are cheaper than a second map."""
    B, Hq, Mq, D = q.shape
    Mk = k.shape[2]
    out = torch.empty(B, Hq, Mq, Mk, dtype=torch.float32, device=q.device)
    q, k = (x if x.stride(2) == D and x.stride(3) == 1 else x.contiguous() for x in (q, k))
    active = None if active is None else active.contiguous().view(torch.int8)
    BM, BD = 64, max(16, min(32, next_power_of_2(D)))
    if out.numel():
        _pooled_map[(cdiv(Mq, BM), B * Hq)](
            q, k, out, active, *q.stride()[:2], *k.stride()[:2], Hq, Hq // k.shape[1], Mq, Mk, D,
            n_queries, n_keys, scale, SIZE=block_size, NORMALISE=normalise, HAS_ACTIVE=active is not None,
            BM=BM, BC=64, BD=BD, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def probe_distance(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Mk D"],
    true: Float[Tensor, "B Hq Mk"],
    n_probe: int,
    scale: float,
) -> Float[Tensor, "B Hq"]:
    """One program per head."""
    q, true = _last_dense(q), _last_dense(true)
    k = k if k.stride(2) == k.shape[3] and k.stride(3) == 1 else k.contiguous()
    B, Hq, n_queries, D = q.shape
    n_probe = min(n_probe, n_queries)
    out = torch.empty(B, Hq, dtype=torch.float32, device=q.device)
    if out.numel():
        _probe_distance[(B * Hq,)](
            q, k, true, out, *q.stride()[:3], *k.stride()[:2], *true.stride()[:2], Hq, Hq // k.shape[1],
            n_queries, n_probe, k.shape[2], D, scale, BL=max(16, next_power_of_2(n_probe)), BC=64,
            BD=max(16, next_power_of_2(D)), num_warps=8,
        )  # fmt: skip
    return out


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
