"""Anchors and stripes in Triton: K is read once per pooled tile, and only lists are written.

Anchors: one program per query block and head walks over block 0 and the local keys and keeps row maxima.
Stripes: one program per tile of keys and tile of groups multiplies the groups' pooled queries with the
keys. It runs twice: to count what each tile of keys gives, and, when the counts before it are summed up,
to write the keys to their places. Pooled queries are float32; for half-precision keys they go through the
tensor cores as two summands, so that a selection does not depend on their rounding.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.block_scores import mean_pool
from sparseland.ops.stripe_scores.areas import (
    LEVELS,
    fitting_level,
    local_starts,
    n_groups,
    thresholds,
    usable,
)

# Bytes of per-tile counts held at once.
_COUNT_BYTES = 1 << 28
# Tiles of keys that a program goes through with the same pooled queries.
_PARTS = 8


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
    blocks = triton.cdiv(n_queries, block_size)
    out = torch.empty(B, Hq, blocks, dtype=torch.float32, device=q.device)
    BD = max(16, triton.next_power_of_2(D))
    full = q.dtype == torch.float32
    BN = min(block_size, 32 if full or BD > 128 else 64)
    _anchors[(blocks, B * Hq)](
        q, k, out, *q.stride()[:3], *k.stride()[:3],
        Hq, k.shape[1], n_queries, k.shape[2], D, step, scale,
        BLOCK=block_size, BN=BN, BD=BD,
        num_warps=8 if block_size * BD > 64 * 128 else 4, num_stages=2 if full else 3,
    )  # fmt: skip
    return out


@triton.jit
def _margins(
    b_high, b_low, b_anchor, b_row, b_start, k_base, stride_kn, i_k, i_d, n_keys, D, block_size,
    R: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Least ``anchor - score`` over the blocks of each group, +inf where no stripe may be: [GT, BN]."""
    b_load = (i_k < n_keys)[:, None] & (i_d < D)[None, :]
    b_k = tl.load(k_base + i_k[:, None].to(tl.int64) * stride_kn + i_d[None, :], mask=b_load, other=0.0)
    b_s = tl.dot(b_high, tl.trans(b_k), input_precision="ieee")
    if SPLIT:
        b_s = tl.dot(b_low, tl.trans(b_k), b_s, input_precision="ieee")
    b_margin = b_anchor[:, None] - b_s
    # What can't be compared is kept: NaN and infinities compare False with the first.
    b_margin = tl.where(tl.abs(b_margin) < float("inf"), b_margin, float("-inf"))
    b_margin = tl.where(b_row[:, None], b_margin, float("inf"))
    b_margin = tl.min(tl.reshape(b_margin, (R // STEP, STEP, BN)), 1)
    b_between = (i_k[None, :] >= block_size) & (i_k[None, :] < b_start[:, None])
    return tl.where(b_between, b_margin, float("inf"))


@triton.jit(do_not_specialize=["n_keys", "groups", "padded", "g0", "piece", "tiles"])
def _count(
    q_high, q_low, anchors, starts, k, counts, levels, stride_kb, stride_kh, stride_kn,
    Hq, Hkv, n_keys, D, block_size, step, groups, padded, g0, piece, tiles,
    R: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr,
    PARTS: tl.constexpr, N_LEVELS: tl.constexpr,
):  # fmt: skip
    """Stripes per group, tile of keys and threshold, for the groups [g0, g0 + piece)."""
    GT: tl.constexpr = R // STEP
    i_bh = tl.program_id(2)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_local = tl.program_id(1) * GT + tl.arange(0, GT)
    b_mine = (i_local < piece) & (g0 + i_local < groups)
    b_start = tl.load(starts + g0 + i_local, mask=b_mine, other=0)
    i_r, i_d = tl.arange(0, R), tl.arange(0, BD)
    # Pooled rows are padded to BD columns and to whole tiles of rows.
    i_row = (i_bh.to(tl.int64) * padded + g0 + tl.program_id(1) * GT) * STEP + i_r
    b_high = tl.load(q_high + i_row[:, None] * BD + i_d[None, :])
    b_low = tl.load(q_low + i_row[:, None] * BD + i_d[None, :]) if SPLIT else b_high
    b_anchor = tl.load(anchors + i_row)
    k_base = k + i_b * stride_kb + (i_h // (Hq // Hkv)) * stride_kh
    first = tl.program_id(0) * PARTS
    stop = tl.minimum(first + PARTS, (tl.max(b_start, 0) + BN - 1) // BN)
    for i_t in range(first, stop):
        b_margin = _margins(
            b_high, b_low, b_anchor, i_r % STEP < step, b_start, k_base, stride_kn,
            i_t * BN + tl.arange(0, BN), i_d, n_keys, D, block_size, R, STEP, BN, SPLIT,
        )  # fmt: skip
        i_out = (i_bh.to(tl.int64) * piece + i_local) * tiles + i_t
        for level in tl.static_range(N_LEVELS):
            b_count = tl.sum((b_margin <= tl.load(levels + level)).to(tl.int32), 1)
            tl.store(counts + i_out * N_LEVELS + level, b_count.to(tl.uint8), mask=b_mine)


@triton.jit(do_not_specialize=["n_keys", "groups", "padded", "g0", "piece", "tiles", "limit"])
def _fill(
    q_high, q_low, anchors, starts, k, before, chosen, indices, stride_kb, stride_kh, stride_kn,
    Hq, Hkv, n_keys, D, block_size, step, groups, padded, g0, piece, tiles, limit,
    R: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Writes each tile's stripes behind those ``before`` it; negative places are cut off."""
    GT: tl.constexpr = R // STEP
    i_bh = tl.program_id(2)
    i_b, i_h = (i_bh // Hq).to(tl.int64), (i_bh % Hq).to(tl.int64)
    i_local = tl.program_id(1) * GT + tl.arange(0, GT)
    b_mine = (i_local < piece) & (g0 + i_local < groups)
    b_start = tl.load(starts + g0 + i_local, mask=b_mine, other=0)
    i_r, i_d = tl.arange(0, R), tl.arange(0, BD)
    i_row = (i_bh.to(tl.int64) * padded + g0 + tl.program_id(1) * GT) * STEP + i_r
    b_high = tl.load(q_high + i_row[:, None] * BD + i_d[None, :])
    b_low = tl.load(q_low + i_row[:, None] * BD + i_d[None, :]) if SPLIT else b_high
    b_anchor = tl.load(anchors + i_row)
    i_list = i_bh.to(tl.int64) * piece + i_local
    b_threshold = tl.load(chosen + i_list, mask=b_mine, other=0.0)
    i_out = (i_bh.to(tl.int64) * groups + g0 + i_local) * limit
    k_base = k + i_b * stride_kb + (i_h // (Hq // Hkv)) * stride_kh
    first = tl.program_id(0) * PARTS
    stop = tl.minimum(first + PARTS, (tl.max(b_start, 0) + BN - 1) // BN)
    for i_t in range(first, stop):
        i_k = i_t * BN + tl.arange(0, BN)
        b_margin = _margins(
            b_high, b_low, b_anchor, i_r % STEP < step, b_start, k_base, stride_kn,
            i_k, i_d, n_keys, D, block_size, R, STEP, BN, SPLIT,
        )  # fmt: skip
        b_take = (b_margin <= b_threshold[:, None]) & b_mine[:, None]
        b_before = tl.load(before + i_list * tiles + i_t, mask=b_mine, other=0)
        b_place = b_before[:, None] + tl.cumsum(b_take.to(tl.int32), 1) - 1
        b_take = b_take & (b_place >= 0) & (b_place < limit)
        b_key = tl.broadcast_to(i_k[None, :], (GT, BN))
        tl.store(indices + i_out[:, None] + b_place, b_key, mask=b_take)


def stripes(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    anchors: Float[Tensor, "B Hq Mq"],
    block_size: int,
    step: int,
    theta: float,
    limit: int,
    scale: float,
) -> tuple[Int[Tensor, "B Hq G"], Int[Tensor, "B Hq G L"]]:
    """Lists per group. At most 64 blocks a group. Deterministic: counts and places, no atomics."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    B, Hq, n_queries, D = q.shape
    n_keys, device = k.shape[2], q.device
    groups, limit = n_groups(n_queries, block_size, step), min(limit, n_keys)
    BD = max(16, triton.next_power_of_2(D))
    split = k.dtype != torch.float32
    R, BN = (128, 128 if BD <= 128 else 64) if split else (64, 32)
    STEP = triton.next_power_of_2(step)
    GT = R // STEP
    padded = triton.cdiv(groups, GT) * GT
    high, low = _pooled(q, block_size, step, STEP, padded, BD, scale, k.dtype)
    short = groups * step - anchors.shape[2]
    # Blocks that a last group lacks are out of reach, as are groups that fill a tile.
    far = torch.finfo(torch.float32).max
    anchor = F.pad(usable(anchors), (0, short), value=far).reshape(B, Hq, groups, step)
    anchor = F.pad(anchor, (0, STEP - step, 0, padded - groups), value=far).contiguous()
    starts = local_starts(n_queries, n_keys, block_size, step, device)

    counts = torch.zeros(B, Hq, groups, dtype=torch.int32, device=device)
    indices = torch.empty(B, Hq, groups, limit, dtype=torch.int32, device=device)
    # The last group's local keys begin where no stripe can be any more.
    tiles = triton.cdiv(n_keys, BN)
    n_levels = LEVELS if limit < n_keys else 1
    levels = thresholds(theta, device)
    piece = max(1, _COUNT_BYTES // (B * Hq * tiles * (n_levels + 8) * GT)) * GT
    piece = min(piece, padded)
    sizes = (*k.stride()[:3], Hq, k.shape[1], n_keys, D, block_size, step, groups, padded)
    options = {"R": R, "STEP": STEP, "BN": BN, "BD": BD, "SPLIT": split, "PARTS": _PARTS}
    options |= {"num_warps": 8 if R > 64 else 4, "num_stages": 2}
    for g0 in range(0, groups, piece):
        grid = (triton.cdiv(tiles, _PARTS), triton.cdiv(piece, GT), B * Hq)
        found = torch.zeros(B, Hq, piece, tiles, n_levels, dtype=torch.uint8, device=device)
        _count[grid](
            high, low, anchor, starts, k, found, levels, *sizes, g0, piece, tiles,
            N_LEVELS=n_levels, **options,
        )  # fmt: skip
        level = torch.zeros(B, Hq, piece, dtype=torch.int64, device=device)
        if n_levels > 1:
            level = fitting_level(found.sum(3, dtype=torch.int32), limit)
        per_tile = found.gather(-1, level[..., None, None].expand(B, Hq, piece, tiles, 1)).squeeze(-1)
        ends = per_tile.cumsum(-1, dtype=torch.int32)
        total = ends[..., -1:]
        before = (ends - per_tile - (total - limit).clamp(min=0)).contiguous()
        _fill[grid](
            high, low, anchor, starts, k, before, levels[level], indices, *sizes,
            g0, piece, tiles, limit, **options,
        )  # fmt: skip
        here = min(piece, groups - g0)
        counts[:, :, g0 : g0 + here] = total[:, :, :here, 0].clamp(max=limit)
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
    groups = triton.cdiv(mean.shape[2], step)
    mean = F.pad(mean, (0, BD - mean.shape[3], 0, groups * step - mean.shape[2]))
    mean = mean.unflatten(2, (groups, step))
    mean = F.pad(mean, (0, 0, 0, STEP - step, 0, padded - groups)).contiguous()
    high = mean.to(dtype)
    # Where a mean is infinite or NaN its remainder adds nothing that changes what it is.
    return high, (mean - high.float()).to(dtype)
