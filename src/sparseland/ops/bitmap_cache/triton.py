"""``bitmap_cache`` in Triton: one program per (batch row, key head, slice of tokens).

A program reads its tokens' bitmaps by bytes, counts bits before each byte with one short scan, then walks
the eight bits of all bytes in step: each step fetches one value per byte and moves on where the bit was
set. The eight steps are joined to a dense tile whose channels lie side by side in each thread, which the
whole group of query heads then uses. No shared offsets and no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseland.ops.bitmap_cache.layout import as_bytes
from sparseland.ops.gather_decode.triton import LOG2E, merge_slices, n_multiprocessors, split
from sparseland.patterns import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tiles:
    """How decoding is cut.

    Args:
        rows: tokens a program expands at a time.
        warps: warps of a program.
        per_sm: programs per multiprocessor that the split aims at.
    """

    rows: int = 64
    warps: int = 4
    per_sm: int = 8


@triton.jit
def _step(values, o_value, b_bytes, BIT: tl.constexpr):
    """One bit of every byte: its value (0 if clear), and the offsets moved on where it is set."""
    on = (b_bytes & (1 << BIT)) != 0
    return tl.load(values + o_value, mask=on, other=0.0), tl.where(on, o_value + 1, o_value)


@triton.jit
def _expand(packed, values, o_packed, o_value, live, NB: tl.constexpr, BB: tl.constexpr):
    """Dense rows ``[BN, 8 * BB]`` of the tokens at the given offsets; zeros where not ``live``.

    Bytes lie along the first axis, because that is the axis along which Triton lays neighbouring threads
    where addresses tell it nothing: a warp then fetches whole rows.
    """
    o_g = tl.arange(0, BB)
    within = (o_g < NB)[:, None] & live[None, :]
    b = tl.load(packed + (o_g[:, None] + o_packed[None, :]), mask=within, other=0).to(tl.int32)
    count = b - ((b >> 1) & 0x55)
    count = (count & 0x33) + ((count >> 2) & 0x33)
    count = (count + (count >> 4)) & 0x0F
    o = o_value[None, :] + (tl.cumsum(count, 0) - count)
    x0, o = _step(values, o, b, 0)
    x1, o = _step(values, o, b, 1)
    x2, o = _step(values, o, b, 2)
    x3, o = _step(values, o, b, 3)
    x4, o = _step(values, o, b, 4)
    x5, o = _step(values, o, b, 5)
    x6, o = _step(values, o, b, 6)
    x7, o = _step(values, o, b, 7)
    # join() adds a fastest axis of 2: the outermost join tells even channels from odd ones.
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    x = tl.permute(tl.join(even, odd), (1, 0, 2, 3, 4))
    return tl.reshape(x, [o_value.shape[0], 8 * BB])


@triton.jit(do_not_specialize=["n_keys", "n_slices"])
def _decode_slice(
    q, k_bytes, k_values, v_bytes, v_values, first_key, partial, partial_lse,
    scale_log2, n_keys, per_slice, n_slices,
    sqb, sqh, s_kbb, s_kbh, s_kbt, s_kvb, s_kvh, s_kvt, s_vbb, s_vbh, s_vbt, s_vvb, s_vvh, s_vvt,
    H, ROWS: tl.constexpr, D: tl.constexpr, HAS_FIRST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    i_s, i_head = tl.program_id(0), tl.program_id(1)
    i_b = (i_head // H).to(tl.int64)
    i_h = (i_head % H).to(tl.int64)
    BD: tl.constexpr = 8 * BB
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    in_m, in_d = o_m < ROWS, o_d < D
    head = i_h * ROWS + o_m
    b_q = tl.load(
        q + i_b * sqb + head[:, None] * sqh + o_d[None, :], mask=in_m[:, None] & in_d[None, :], other=0.0
    )
    k_bytes += i_b * s_kbb + i_h * s_kbh
    k_values += i_b * s_kvb + i_h * s_kvh
    v_bytes += i_b * s_vbb + i_h * s_vbh
    v_values += i_b * s_vvb + i_h * s_vvh

    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    start = i_s * per_slice
    end = tl.minimum(start + per_slice, n_keys)
    first = start
    if HAS_FIRST:
        # Padding at the front is skipped a whole tile at a time.
        hidden = tl.maximum(tl.load(first_key + i_b).to(tl.int32) - start, 0)
        first = start + hidden // BN * BN
    for i in range(first, end, BN):
        o_n = tl.arange(0, BN)
        live = i + o_n < end
        if HAS_FIRST:
            live = live & (i + o_n >= start + hidden)
        # 64-bit arithmetic once per tile; inside a tile 32 bits will do.
        i_t = tl.cast(i, tl.int64)
        p_kb, p_kv = k_bytes + i_t * s_kbt, k_values + i_t * s_kvt
        p_vb, p_vv = v_bytes + i_t * s_vbt, v_values + i_t * s_vvt
        b_k = _expand(p_kb, p_kv, o_n * s_kbt, o_n * s_kvt, live, D // 8, BB)
        b_v = _expand(p_vb, p_vv, o_n * s_vbt, o_n * s_vvt, live, D // 8, BB)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_s = tl.where(live[None, :], b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_p = tl.exp2(b_s - m_safe[:, None])
        decay = tl.exp2(b_m - m_safe)
        b_l = b_l * decay + tl.sum(b_p, 1)
        b_o = b_o * decay[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        b_m = m_new

    row = (i_b * H * ROWS + head) * n_slices + i_s
    b_l = tl.where(b_l == 0, 1.0, b_l)  # nothing seen: the output is 0, and the top is -inf already
    b_o = b_o / b_l[:, None]
    tl.store(partial + row[:, None] * D + o_d[None, :], b_o, mask=in_m[:, None] & in_d[None, :])
    tl.store(partial_lse + row, b_m + tl.log2(b_l), mask=in_m)


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])
def _compress_rows(
    x, packed, values, n_rows, n_tokens, H, sxb, sxh, sxt,
    KEPT: tl.constexpr, D: tl.constexpr, NB: tl.constexpr, MAGNITUDE_BITS: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    in_r = o_r < n_rows
    o_d = tl.arange(0, BD)
    i_t, i_head = o_r % n_tokens, o_r // n_tokens
    p_x = x + i_head // H * sxb + i_head % H * sxh + i_t * sxt
    b_x = tl.load(p_x[:, None] + o_d[None, :], mask=in_r[:, None] & (o_d < D)[None, :], other=0.0)
    # A magnitude's bits are ordered like its value, NaN above all; columns past D come after everything.
    if MAGNITUDE_BITS == 31:
        b_size = b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        b_size = b_x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    b_size = tl.where((o_d < D)[None, :], b_size, -1)
    # The KEPT-th largest, found bit by bit from above.
    b_least = tl.zeros([BR], tl.int32)
    for i in tl.static_range(MAGNITUDE_BITS):
        candidate = b_least | (1 << (MAGNITUDE_BITS - 1 - i))
        reached = tl.sum((b_size >= candidate[:, None]).to(tl.int32), 1)
        b_least = tl.where(reached >= KEPT, candidate, b_least)
    above = (b_size > b_least[:, None]).to(tl.int32)
    tied = (b_size == b_least[:, None]).to(tl.int32)
    room = KEPT - tl.sum(above, 1)
    keep = above + tied * (tl.cumsum(tied, 1) <= room[:, None]).to(tl.int32)

    place = tl.cumsum(keep, 1) - keep
    tl.store(values + o_r[:, None] * KEPT + place, b_x, mask=(keep != 0) & in_r[:, None])
    o_g = tl.arange(0, BD // 8)
    weight = 1 << tl.arange(0, 8)
    b_byte = tl.sum(tl.reshape(keep, [BR, BD // 8, 8]) * weight[None, None, :], 2)
    tl.store(
        packed + o_r[:, None] * NB + o_g[None, :],
        b_byte.to(tl.uint8),
        mask=in_r[:, None] & (o_g < NB)[None, :],
    )


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])
def _expand_rows(
    packed, values, out, n_rows, n_tokens, H, s_bb, s_bh, s_bt, s_vb, s_vh, s_vt,
    D: tl.constexpr, BR: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    in_r = o_r < n_rows
    i_t, i_head = o_r % n_tokens, o_r // n_tokens
    i_b, i_h = i_head // H, i_head % H
    o_packed = i_b * s_bb + i_h * s_bh + i_t * s_bt
    o_value = i_b * s_vb + i_h * s_vh + i_t * s_vt
    b_x = _expand(packed, values, o_packed, o_value, in_r, D // 8, BB)
    o_d = tl.arange(0, 8 * BB)
    tl.store(out + o_r[:, None] * D + o_d[None, :], b_x, mask=in_r[:, None] & (o_d < D)[None, :])


def compress(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """See :func:`sparseland.ops.bitmap_cache.compress`."""
    batch, heads, length, dim = x.shape
    bits = torch.empty(batch, heads, length, -(-dim // 64), dtype=torch.int64, device=x.device)
    values = torch.empty(batch, heads, length, kept, dtype=x.dtype, device=x.device)
    rows, block = batch * heads * length, 16
    _compress_rows[(cdiv(rows, block),)](
        x, as_bytes(bits), values, rows, length, heads, *x.stride()[:3],
        KEPT=kept, D=dim, NB=8 * bits.shape[3], MAGNITUDE_BITS=31 if x.dtype == torch.float32 else 15,
        BR=block, BD=max(64, next_power_of_2(dim)), num_warps=4,
    )  # fmt: skip
    return bits, values


def decompress(bits: Tensor, values: Tensor, dim: int) -> Tensor:
    """See :func:`sparseland.ops.bitmap_cache.decompress`."""
    batch, heads, length = values.shape[:3]
    out = torch.empty(batch, heads, length, dim, dtype=values.dtype, device=values.device)
    packed = as_bytes(bits)
    rows, block = batch * heads * length, 64
    _expand_rows[(cdiv(rows, block),)](
        packed, values, out, rows, length, heads, *packed.stride()[:3], *values.stride()[:3],
        D=dim, BR=block, BB=max(2, next_power_of_2(dim // 8)), num_warps=4,
    )  # fmt: skip
    return out


def bitmap_decode(
    q: Tensor,
    k_bitmap: Tensor,
    k_values: Tensor,
    v_bitmap: Tensor,
    v_values: Tensor,
    first_key: Tensor | None,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`sparseland.ops.bitmap_cache.bitmap_decode`."""
    batch, heads, _, dim = q.shape
    kv_heads, n_keys = k_values.shape[1:3]
    tiles = tiles or Tiles(rows=32 if dim > 128 or q.dtype == torch.float32 else 64)
    if q.stride(3) != 1:
        q = q.contiguous()
    k_bytes, v_bytes = as_bytes(k_bitmap), as_bytes(v_bitmap)
    programs = tiles.per_sm * n_multiprocessors(q.device)
    per_slice, n_slices = split(n_keys, tiles.rows, batch * kv_heads, programs)
    partial = torch.empty(batch * heads, n_slices, dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(batch * heads, n_slices, dtype=torch.float32, device=q.device)
    rows = heads // kv_heads
    _decode_slice[(n_slices, batch * kv_heads)](
        q, k_bytes, k_values, v_bytes, v_values, first_key, partial, partial_lse,
        scale * LOG2E, n_keys, per_slice, n_slices,
        q.stride(0), q.stride(1), *k_bytes.stride()[:3], *k_values.stride()[:3],
        *v_bytes.stride()[:3], *v_values.stride()[:3],
        kv_heads, ROWS=rows, D=dim, HAS_FIRST=first_key is not None,
        BM=max(16, next_power_of_2(rows)), BN=tiles.rows, BB=max(2, next_power_of_2(dim // 8)),
        num_warps=tiles.warps, num_stages=1,
    )  # fmt: skip
    return merge_slices(partial, partial_lse, q)
