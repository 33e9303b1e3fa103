"""Anchors and stripes in Triton: all heads at once, nothing N x N.

Anchors: one program per query block and head walks over block 0 and the local keys and keeps row maxima.
Stripes: one program per tile of keys and tile of groups multiplies the groups' pooled queries with the
keys and writes a byte per group and key, how many thresholds the key passes; then one program per group
counts its bytes, chooses the threshold and writes the list. Pooled queries are float32; for half-precision
keys they go through the tensor cores as two summands, so that a selection does not depend on their rounding.
"""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.block_scores import mean_pool
from sparseland.ops.stripe_scores.areas import (
    LEVELS,
    local_starts,
    n_groups,
    thresholds,
    usable,
)
from sparseland.patterns import cdiv, next_power_of_2

# Bytes per group and key held at once.
_BYTES = 1 << 28
# Bytes of a list that are read at once.
_CHUNK = 4096
# Tiles of keys that a program goes through with the same pooled queries.
_PARTS = 8


@dataclass(frozen=True)
class Tile:
    """How the comparison is cut: pooled rows and keys of a program's product, warps, stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


# By padded head dimension. At least 64 rows: a group of as many blocks is the largest.
TILES = {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 4, 2), 256: Tile(128, 64, 8, 2)}
FULL_PRECISION = Tile(64, 32, 4, 2)


@triton.jit
def _maxima(
    b_m, b_q, k_base, stride_kn, start, stop, i_q, i_d, n_keys, D,
    BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Row maxima of the raw products with the keys [start, stop), ``start`` a multiple of BN."""
    for n0 in range(start, stop, BN):
        i_k = n0 + tl.arange(0, BN)
        b_load = (i_d < D)[None, :]
        if MASKED:
            b_load = b_load & (i_k < n_keys)[:, None]
        b_k = tl.load(k_base + i_k[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_load, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            b_s = tl.where((i_k[None, :] <= i_q[:, None]) & (i_k < n_keys)[None, :], b_s, float("-inf"))
        b_m = tl.maximum(b_m, tl.max(b_s, 1))
    return b_m


@triton.jit(do_not_specialize=["n_queries", "n_keys", "step"])
def _anchors(
    q, k, anchors, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    Hq, Hkv, n_queries, n_keys, D, step, scale,
    BLOCK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # The last blocks of a group see most local keys: they go first.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_row, i_d = i_m * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BD)
    offset = n_keys - n_queries
    i_q = i_row + offset
    b_rows = i_row < n_queries
    q_base = q + i_b * stride_qb + i_h * stride_qh
    b_load = b_rows[:, None] & (i_d < D)[None, :]
    b_q = tl.load(q_base + i_row[:, None].to(tl.int64) * stride_qn + i_d[None, :], mask=b_load, other=0.0)
    k_base = k + i_b * stride_kb + (i_h // (Hq // Hkv)) * stride_kh

    first = i_m * BLOCK + offset
    last = tl.minimum(i_m * BLOCK + BLOCK, n_queries) - 1 + offset
    start = tl.maximum((offset + i_m // step * step * BLOCK) // BLOCK - 1, 0) * BLOCK
    b_m = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    # Block 0 lies wholly before the local keys, or is among them.
    b_m = _maxima(b_m, b_q, k_base, stride_kn, 0, tl.minimum(start, BLOCK), i_q, i_d, n_keys, D, BN, False)
    seen = tl.maximum((first + 1) // BN * BN, start)
    b_m = _maxima(b_m, b_q, k_base, stride_kn, start, seen, i_q, i_d, n_keys, D, BN, False)
    b_m = _maxima(b_m, b_q, k_base, stride_kn, seen, last + 1, i_q, i_d, n_keys, D, BN, True)
    count = (last - first + 1).to(tl.float32)
    b_sum = tl.sum(tl.where(b_rows, b_m * scale, 0.0), 0)
    tl.store(anchors + i_bh.to(tl.int64) * tl.num_programs(0) + i_m, b_sum / count)


def anchors(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], block_size: int, step: int, scale: float
) -> Float[Tensor, "B Hq Mq"]:
    """Mean row maximum of each query block over its exact area. The block size is a power of two >= 16."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, Hq, n_queries, D = q.shape
    blocks = cdiv(n_queries, block_size)
    out = torch.empty(B, Hq, blocks, dtype=torch.float32, device=q.device)
    BD = max(16, next_power_of_2(D))
    full = q.dtype == torch.float32
    BN = min(block_size, 32 if full or BD > 128 else 64)
    _anchors[(blocks, B * Hq)](
        q, k, out, *q.stride()[:3], *k.stride()[:3],
        Hq, k.shape[1], n_queries, k.shape[2], D, step, scale,
        BLOCK=block_size, BN=BN, BD=BD,
        num_warps=8 if block_size * BD > 64 * 128 else 4, num_stages=2 if full else 3,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_keys", "groups", "padded", "g0", "piece"])
def _compare(
    q_high, q_low, anchors, starts, k, levels, passed, stride_kb, stride_kh, stride_kn,
    Hq, Hkv, n_keys, block_size, step, groups, padded, g0, piece, width,
    D: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    SPLIT: tl.constexpr, FULL: tl.constexpr, PARTS: tl.constexpr, N_LEVELS: tl.constexpr,
):  # fmt: skip
    """How many thresholds each key passes, for the groups [g0, g0 + piece).

    Keys are the rows of the product, so that the blocks of a group, of which the best counts, lie in few
    threads. FULL: no row of a group is padding.
    """
    GT: tl.constexpr = R // STEP
    i_bh = tl.program_id(2)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_local = tl.program_id(1) * GT + tl.arange(0, GT)
    b_mine = (i_local < piece) & (g0 + i_local < groups)
    b_start = tl.load(starts + g0 + i_local, mask=b_mine, other=0)
    first = tl.program_id(0) * PARTS
    stop = tl.minimum(first + PARTS, (tl.max(b_start, 0) + BN - 1) // BN)
    if first >= stop:
        return
    i_r, i_d = tl.arange(0, R), tl.arange(0, BD)
    # Pooled rows are padded to BD columns and to whole tiles of rows.
    i_row = (i_bh.to(tl.int64) * padded + g0 + tl.program_id(1) * GT) * STEP + i_r
    b_high = tl.trans(tl.load(q_high + i_row[:, None] * BD + i_d[None, :]))
    b_low = tl.trans(tl.load(q_low + i_row[:, None] * BD + i_d[None, :])) if SPLIT else b_high
    b_anchor = tl.load(anchors + i_row)
    k_base = k + i_b * stride_kb + (i_h // (Hq // Hkv)) * stride_kh
    p_out = passed + (i_bh.to(tl.int64) * piece + i_local) * width
    for i_t in range(first, stop):
        i_k = i_t * BN + tl.arange(0, BN)
        b_load = (i_k < n_keys)[:, None]
        if D < BD:
            b_load = b_load & (i_d < D)[None, :]
        b_k = tl.load(k_base + i_k[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_load, other=0.0)
        b_s = tl.dot(b_k, b_high, input_precision="ieee")  # [BN, R]
        if SPLIT:
            b_s = tl.dot(b_k, b_low, b_s, input_precision="ieee")
        b_margin = b_anchor[None, :] - b_s
        # What can't be compared is kept: NaN and infinity are not below infinity.
        b_margin = tl.where(b_margin < float("inf"), b_margin, float("-inf"))
        if not FULL:
            b_margin = tl.where((i_r % STEP < step)[None, :], b_margin, float("inf"))
        b_margin = tl.min(tl.reshape(b_margin, (BN, GT, STEP)), 2)
        b_between = (i_k[:, None] >= block_size) & (i_k[:, None] < b_start[None, :])
        b_margin = tl.where(b_between, b_margin, float("inf"))
        b_passed = tl.zeros([BN, GT], tl.int32)
        for level in tl.static_range(N_LEVELS):
            b_passed += (b_margin <= tl.load(levels + level)).to(tl.int32)
        tl.store(p_out[None, :] + i_k[:, None], b_passed.to(tl.uint8), mask=b_mine[None, :])


@triton.jit
def _total(passed, stop, least, CHUNK: tl.constexpr):
    """How many of the first ``stop`` keys pass ``least`` thresholds or more."""
    i_n = tl.arange(0, CHUNK)
    b_count = tl.zeros([CHUNK], tl.int32)
    for n0 in range(0, stop, CHUNK):
        b_passed = tl.load(passed + n0 + i_n, mask=n0 + i_n < stop, other=0).to(tl.int32)
        b_count += (b_passed >= least).to(tl.int32)
    return tl.sum(b_count, 0)


@triton.jit(do_not_specialize=["groups", "g0", "piece", "limit"])
def _fill(
    passed, starts, counts, indices, groups, g0, piece, width, limit,
    CHUNK: tl.constexpr, N_LEVELS: tl.constexpr,
):  # fmt: skip
    """One group's list: the keys that pass the first threshold that fits, the last ``limit`` of them."""
    i_local = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    i_group, i_bh = g0 + i_local, tl.program_id(1).to(tl.int64)
    if i_group >= groups:
        return
    start = tl.multiple_of(tl.load(starts + i_group), 16)  # of a block: the masks below don't split loads
    passed += (i_bh * piece + i_local) * width
    least = 1
    total = _total(passed, start, least, CHUNK)
    for level in tl.static_range(2, N_LEVELS + 1):
        if total > limit:
            least = level
            total = _total(passed, start, level, CHUNK)
    i_list = i_bh * groups + i_group
    tl.store(counts + i_list, tl.minimum(total, limit))
    indices += i_list * limit
    i_n = tl.arange(0, CHUNK)
    before = tl.minimum(limit - total, 0)  # negative places are cut off
    for n0 in range(0, start, CHUNK):
        i_k = n0 + i_n
        b_passed = tl.load(passed + i_k, mask=i_k < start, other=0).to(tl.int32)
        b_take = (b_passed >= least).to(tl.int32)
        b_place = before + tl.cumsum(b_take, 0) - 1
        tl.store(indices + b_place, i_k, mask=(b_take > 0) & (b_place >= 0))
        before += tl.sum(b_take, 0)


def stripes(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    anchors: Float[Tensor, "B Hq Mq"],
    block_size: int,
    step: int,
    theta: float,
    limit: int,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Int[Tensor, "B Hq G"], Int[Tensor, "B Hq G L"]]:
    """Lists per group, of at most 64 blocks. Deterministic: no atomics. ``tile`` replaces the table's."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    B, Hq, n_queries, D = q.shape
    n_keys, device = k.shape[2], q.device
    groups, limit = n_groups(n_queries, block_size, step), min(limit, n_keys)
    BD = max(16, next_power_of_2(D))
    split = k.dtype != torch.float32
    tile = tile or (TILES[max(BD, 64)] if split else FULL_PRECISION)
    STEP = next_power_of_2(step)
    GT = tile.rows // STEP
    padded = cdiv(groups, GT) * GT
    high, low = _pooled(q, block_size, step, STEP, padded, BD, scale, k.dtype)
    short = groups * step - anchors.shape[2]
    # Blocks that a last group lacks are out of reach, as are groups that fill a tile.
    far = torch.finfo(torch.float32).max
    anchor = F.pad(usable(anchors), (0, short), value=far).reshape(B, Hq, groups, step)
    anchor = F.pad(anchor, (0, STEP - step, 0, padded - groups), value=far).contiguous()
    starts = local_starts(n_queries, n_keys, block_size, step, device)

    counts = torch.empty(B, Hq, groups, dtype=torch.int32, device=device)
    indices = torch.empty(B, Hq, groups, limit, dtype=torch.int32, device=device)
    levels = thresholds(theta, device)
    n_levels = LEVELS if limit < n_keys else 1
    tiles = cdiv(n_keys, tile.keys)
    width = tiles * tile.keys
    piece = min(padded, max(1, _BYTES // (B * Hq * width * GT)) * GT)
    passed = torch.empty(B * Hq, piece, width, dtype=torch.uint8, device=device)
    for g0 in range(0, groups, piece):
        _compare[(cdiv(tiles, _PARTS), cdiv(piece, GT), B * Hq)](
            high, low, anchor, starts, k, levels, passed, *k.stride()[:3],
            Hq, k.shape[1], n_keys, block_size, step, groups, padded, g0, piece, width,
            D=D, R=tile.rows, STEP=STEP, BN=tile.keys, BD=BD, SPLIT=split, FULL=step == STEP, PARTS=_PARTS,
            N_LEVELS=n_levels, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _fill[(min(piece, groups - g0), B * Hq)](
            passed, starts, counts, indices, groups, g0, piece, width, limit,
            CHUNK=_CHUNK, N_LEVELS=n_levels, num_warps=8,
        )  # fmt: skip
    return counts, indices


def _pooled(
    q: Float[Tensor, "B Hq Nq D"],
    block_size: int,
    step: int,
    STEP: int,
    padded: int,
    BD: int,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "B Hq g S BD"], Float[Tensor, "B Hq g S BD"]]:
    """Scaled mean queries ``[B, Hq, padded, STEP, BD]`` as two summands of the keys' type."""
    mean = mean_pool(q, block_size) * scale
    groups = cdiv(mean.shape[2], step)
    mean = F.pad(mean, (0, BD - mean.shape[3], 0, groups * step - mean.shape[2]))
    mean = mean.unflatten(2, (groups, step))
    mean = F.pad(mean, (0, 0, 0, STEP - step, 0, padded - groups)).contiguous()
    high = mean.to(dtype)
    # Where a mean is infinite or NaN its remainder adds nothing that changes what it is.
    return high, (mean - high.float()).to(dtype)
