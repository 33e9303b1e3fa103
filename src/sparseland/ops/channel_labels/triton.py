"""Labels in Triton: one kernel writes them, one multiplies a query with all of them.

A decoding step does little, so that launches are what it costs: the channels are gathered, rounded and packed
in registers, and a query's label is gathered by the program that uses it, once for a slice of the rows. The
bytes of a tile are read once, whatever the number of bits.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseland.ops.channel_labels.reference import combined
from sparseland.ops.gather_decode.triton import n_multiprocessors, split
from sparseland.patterns import cdiv, next_power_of_2

# Entries of a tile of rows, and programs per multiprocessor that a product is cut into.
_TILE = 4096
_PER_SM = 8
_SMALLEST_STEP = tl.constexpr(2.0**-24)
# Adding and subtracting it rounds to the nearest whole number, ties to the even one.
_TO_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _plane(channels, i_h, i, C, W: tl.constexpr, BW: tl.constexpr):
    """Which channels the bit plane ``i`` holds, and where it holds any."""
    i_w = tl.arange(0, BW)
    i_c = i * W + i_w
    b_in = (i_w < W) & (i_c < C)
    return tl.load(channels + i_h * C + i_c, mask=b_in, other=0), b_in


@triton.jit(do_not_specialize=["n_new", "at"])
def _write(
    k, channels, rows, ranges, n_new, at,
    skb, skh, skn, skd, srb, srh, srn, sgb, sgh, sgn, sgi,
    H, C, SHARE: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_new = i_n < n_new
    p_k = k + i_b * skb + (i_h // SHARE).to(tl.int64) * skh + i_n.to(tl.int64)[:, None] * skn
    i_row = (at + i_n).to(tl.int64)
    i_w = tl.arange(0, BW)
    p_rows = rows + i_b * srb + i_h.to(tl.int64) * srh + i_row[:, None] * srn + i_w[None, :]
    b_store = b_new[:, None] & (i_w < W)[None, :]
    if BITS == 16:
        b_channel, b_in = _plane(channels, i_h, 0, C, W, BW)
        b_x = tl.load(p_k + b_channel[None, :] * skd, mask=b_new[:, None] & b_in[None, :], other=0.0)
        tl.store(p_rows, b_x, mask=b_store)
    else:
        b_low = tl.full([BN], float("inf"), tl.float32)
        b_high = tl.full([BN], float("-inf"), tl.float32)
        b_odd = tl.zeros([BN], tl.int32)
        for i in tl.static_range(8 // BITS):
            b_channel, b_in = _plane(channels, i_h, i, C, W, BW)
            b_load = b_new[:, None] & b_in[None, :]
            b_x = tl.load(p_k + b_channel[None, :] * skd, mask=b_load, other=0.0).to(tl.float32)
            b_low = tl.minimum(b_low, tl.min(tl.where(b_in[None, :], b_x, float("inf")), 1))
            b_high = tl.maximum(b_high, tl.max(tl.where(b_in[None, :], b_x, float("-inf")), 1))
            b_odd = tl.maximum(b_odd, tl.max((b_x != b_x).to(tl.int32), 1))
        b_low = tl.where(b_odd > 0, float("nan"), b_low)
        b_step = tl.div_rn(b_high - b_low, tl.full([BN], 2.0**BITS - 1, tl.float32))
        b_low_half = b_low.to(tl.float16)
        b_step_half = tl.where(b_step == 0, 1.0, b_step).to(tl.float16)
        b_low = b_low_half.to(tl.float32)
        b_divisor = tl.maximum(b_step_half.to(tl.float32), _SMALLEST_STEP)
        b_byte = tl.zeros([BN, BW], tl.int32)
        for i in tl.static_range(8 // BITS):
            b_channel, b_in = _plane(channels, i_h, i, C, W, BW)
            b_load = b_new[:, None] & b_in[None, :]
            b_x = tl.load(p_k + b_channel[None, :] * skd, mask=b_load, other=0.0).to(tl.float32)
            b_code = tl.div_rn(b_x - b_low[:, None], tl.broadcast_to(b_divisor[:, None], [BN, BW]))
            b_code = tl.minimum(tl.maximum(b_code, 0.0), 2.0**BITS - 1)
            b_code = (b_code + _TO_WHOLE) - _TO_WHOLE
            b_byte |= tl.where(b_in[None, :], b_code.to(tl.int32), 0) << (BITS * i)
        tl.store(p_rows, b_byte.to(tl.uint8), mask=b_store)
        p_ranges = ranges + i_b * sgb + i_h.to(tl.int64) * sgh + i_row * sgn
        tl.store(p_ranges, b_low_half, mask=b_new)
        tl.store(p_ranges + sgi, b_step_half, mask=b_new)


@triton.jit
def _one_and_code(b_rows, i: tl.constexpr, BITS: tl.constexpr):
    """``1 + code / 2**BITS`` of one bit plane, exact: the code is put into the mantissa of 1.

    A shift and a logical operation, where converting a whole number takes as long as four multiplications.
    """
    b_code = (b_rows >> (BITS * i)) & (2**BITS - 1)
    return ((b_code << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _half_codes(b_rows, i: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """The same in half precision, of up to 4 bits; larger codes as they are."""
    b_code = (b_rows >> (BITS * i)) & (2**BITS - 1)
    if BITS > 4:
        b_half = b_code.to(TYPE)
    elif tl.float16 == TYPE:
        b_half = ((b_code << (10 - BITS)) | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        b_half = ((b_code << (7 - BITS)) | 0x3F80).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return b_half


@triton.jit
def _two_planes(b_rows, i: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    return tl.join(_half_codes(b_rows, i, BITS, TYPE), _half_codes(b_rows, i + 1, BITS, TYPE))


@triton.jit
def _query_plane(p_q, sqd, channels, i_h, i, C, W: tl.constexpr, BW: tl.constexpr):
    b_channel, b_in = _plane(channels, i_h, i, C, W, BW)
    return tl.load(p_q + b_channel * sqd, mask=b_in, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "per_slice"])
def _scores(
    q, channels, rows, ranges, first_key, out, n_rows, per_slice,
    sqb, sqh, sqd, srb, srh, srn, sgb, sgh, sgn, sgi,
    Hq, C, SHARE: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, HAS_FIRST: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One query head, which its label stays in registers for, and a slice of the rows."""
    i_b, i_q = (tl.program_id(1) // Hq).to(tl.int64), tl.program_id(1) % Hq
    i_h = i_q // SHARE
    p_q = q + i_b * sqb + i_q.to(tl.int64) * sqh
    b_q0 = _query_plane(p_q, sqd, channels, i_h, 0, C, W, BW)
    b_total = b_q0
    if BITS <= 4:
        b_q1 = _query_plane(p_q, sqd, channels, i_h, 1, C, W, BW)
        b_total += b_q1
    if BITS == 2:
        b_q2 = _query_plane(p_q, sqd, channels, i_h, 2, C, W, BW)
        b_q3 = _query_plane(p_q, sqd, channels, i_h, 3, C, W, BW)
        b_total += b_q2 + b_q3
    total = tl.sum(b_total, 0)
    i_w = tl.arange(0, BW)
    p_rows = rows + i_b * srb + i_h.to(tl.int64) * srh
    p_ranges = ranges
    if BITS < 16:
        p_ranges += i_b * sgb + i_h.to(tl.int64) * sgh
    p_out = out + tl.program_id(1).to(tl.int64) * n_rows
    start = tl.program_id(0) * per_slice
    for i in range(start, tl.minimum(start + per_slice, n_rows), BN):
        i_n = i + tl.arange(0, BN)
        b_on = i_n < n_rows
        i_row = i_n.to(tl.int64)
        b_rows = tl.load(
            p_rows + i_row[:, None] * srn + i_w[None, :], mask=b_on[:, None] & (i_w < W)[None, :], other=0
        )
        if BITS == 16:
            b_s = tl.sum(b_rows.to(tl.float32) * b_q0[None, :], 1)
        else:
            b_rows = b_rows.to(tl.int32)
            b_product = _one_and_code(b_rows, 0, BITS) * b_q0[None, :]
            if BITS <= 4:
                b_product += _one_and_code(b_rows, 1, BITS) * b_q1[None, :]
            if BITS == 2:
                b_product += _one_and_code(b_rows, 2, BITS) * b_q2[None, :]
                b_product += _one_and_code(b_rows, 3, BITS) * b_q3[None, :]
            b_s = (tl.sum(b_product, 1) - total) * 2.0**BITS
            b_low = tl.load(p_ranges + i_row * sgn, mask=b_on, other=0.0).to(tl.float32)
            b_step = tl.load(p_ranges + i_row * sgn + sgi, mask=b_on, other=0.0).to(tl.float32)
            b_s = b_low * total + b_step * b_s
        if HAS_FIRST:
            b_s = tl.where(i_n < tl.load(first_key + i_b), float("-inf"), b_s)
        tl.store(p_out + i_n, b_s, mask=b_on)


@triton.jit(do_not_specialize=["n_rows", "per_slice"])
def _shared_scores(
    q, channels, rows, ranges, first_key, out, n_rows, per_slice,
    sqb, sqh, sqd, srb, srh, srn, sgb, sgh, sgn, sgi,
    H, C, SHARE: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, HAS_FIRST: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """The query heads that share a label head together: a row is unpacked once, tensor cores multiply.

    Codes below 256, and ``1 + code / 2**BITS``, are exact in every half-precision type.
    """
    PLANES: tl.constexpr = 1 if BITS == 16 else 8 // BITS
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i_m, i_k = tl.arange(0, BM), tl.arange(0, PLANES * BW)
    # join() lays planes next to each other: entry k is byte k // PLANES of a plane.
    i_plane = i_k % PLANES
    if PLANES == 4:  # joined in pairs: 0 and 2, then 1 and 3
        i_plane = (i_plane % 2) * 2 + i_plane // 2
    i_w = i_k // PLANES
    i_c = i_plane * W + i_w
    b_in = (i_w < W) & (i_c < C)
    b_channel = tl.load(channels + i_h * C + i_c, mask=b_in, other=0)
    i_head = (i_h * SHARE + i_m).to(tl.int64)
    p_q = q + i_b * sqb + i_head[:, None] * sqh + b_channel[None, :] * sqd
    b_q = tl.load(p_q, mask=(i_m < SHARE)[:, None] & b_in[None, :], other=0.0)
    b_total = tl.sum(b_q.to(tl.float32), 1)

    i_byte = tl.arange(0, BW)
    p_rows = rows + i_b * srb + i_h.to(tl.int64) * srh
    p_ranges = ranges
    if BITS < 16:
        p_ranges += i_b * sgb + i_h.to(tl.int64) * sgh
    p_out = out + (i_b * H * SHARE + i_head) * n_rows
    start = tl.program_id(0) * per_slice
    for i in range(start, tl.minimum(start + per_slice, n_rows), BN):
        i_n = i + tl.arange(0, BN)
        b_on = i_n < n_rows
        i_row = i_n.to(tl.int64)
        b_load = b_on[:, None] & (i_byte < W)[None, :]
        b_rows = tl.load(p_rows + i_row[:, None] * srn + i_byte[None, :], mask=b_load, other=0)
        if BITS == 16:
            b_s = tl.dot(b_q, tl.trans(b_rows))
        else:
            b_rows = b_rows.to(tl.int32)
            if PLANES == 1:
                b_code = _half_codes(b_rows, 0, BITS, b_q.dtype)
            elif PLANES == 2:
                b_code = _two_planes(b_rows, 0, BITS, b_q.dtype)
            else:
                b_code = tl.join(
                    _two_planes(b_rows, 0, BITS, b_q.dtype), _two_planes(b_rows, 2, BITS, b_q.dtype)
                )
            b_s = tl.dot(b_q, tl.trans(tl.reshape(b_code, [BN, PLANES * BW])))
            if BITS <= 4:
                b_s = (b_s - b_total[:, None]) * 2.0**BITS
            b_low = tl.load(p_ranges + i_row * sgn, mask=b_on, other=0.0).to(tl.float32)
            b_step = tl.load(p_ranges + i_row * sgn + sgi, mask=b_on, other=0.0).to(tl.float32)
            b_s = b_low[None, :] * b_total[:, None] + b_step[None, :] * b_s
        if HAS_FIRST:
            b_s = tl.where((i_n < tl.load(first_key + i_b))[None, :], float("-inf"), b_s)
        b_head = (i_m < SHARE)[:, None]
        if COMBINE == "mean":
            b_mean = tl.sum(tl.where(b_head, b_s, 0.0), 0) / SHARE
            tl.store(out + tl.program_id(1).to(tl.int64) * n_rows + i_n, b_mean, mask=b_on)
        elif COMBINE == "max":
            b_top = tl.max(tl.where(b_head, b_s, float("-inf")), 0)
            # A maximum of numbers ignores NaN.
            b_odd = tl.max((b_head & (b_s != b_s)).to(tl.int32), 0)
            b_top = tl.where(b_odd > 0, float("nan"), b_top)
            tl.store(out + tl.program_id(1).to(tl.int64) * n_rows + i_n, b_top, mask=b_on)
        else:
            tl.store(p_out[:, None] + i_n[None, :], b_s, mask=b_head & b_on[None, :])


def write_labels(
    k: Tensor, channels: Tensor, bits: int, rows: Tensor, ranges: Tensor | None, at: int
) -> None:
    """See :func:`sparseland.ops.channel_labels.write_labels`."""
    (batch, kv_heads, n_new, _), (heads, count) = k.shape, channels.shape
    width, BN, BW = _tile(rows, n_new)
    _write[(cdiv(n_new, BN), batch * heads)](
        k, channels.contiguous(), rows, ranges, n_new, at, *k.stride(), *rows.stride()[:3], *_strides(ranges),
        heads, count, SHARE=heads // kv_heads, W=width, BITS=bits, BN=BN, BW=BW, num_warps=4,
    )  # fmt: skip


def label_scores(
    q: Tensor,
    channels: Tensor,
    bits: int,
    rows: Tensor,
    ranges: Tensor | None,
    first_key: Tensor | None,
    combine: str | None,
) -> Tensor:
    """See :func:`sparseland.ops.channel_labels.label_scores`."""
    (batch, heads, _, _), n_rows = q.shape, rows.shape[2]
    label_heads, count = channels.shape
    share = heads // label_heads
    together = share > 1 and q.dtype != torch.float32
    if combine is not None and not together:
        scores = label_scores(q, channels, bits, rows, ranges, first_key, None)
        return combined(scores, label_heads, combine)
    out_heads = heads if combine is None else label_heads
    out = torch.empty(batch, out_heads, n_rows, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    width, BN, BW = _tile(rows, n_rows, 16 if together else 1)
    lists = batch * (label_heads if together else heads)
    per_slice, n_slices = split(n_rows, BN, lists, _PER_SM * n_multiprocessors(q.device))
    arguments = (
        q, channels.contiguous(), rows, ranges, first_key, out, n_rows, per_slice,
        *q.stride()[:2], q.stride(3), *rows.stride()[:3], *_strides(ranges),
        label_heads if together else heads, count,
    )  # fmt: skip
    known = {
        "SHARE": share, "W": width, "BITS": bits, "HAS_FIRST": first_key is not None, "BN": BN, "BW": BW,
        "num_warps": 4,
    }  # fmt: skip
    if together:
        BM = max(16, next_power_of_2(share))
        _shared_scores[(n_slices, lists)](*arguments, BM=BM, COMBINE=combine or "none", **known)
    else:
        _scores[(n_slices, lists)](*arguments, **known)
    return out


def _strides(ranges: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if ranges is None else ranges.stride()


def _tile(rows: Tensor, n: int, least: int = 1) -> tuple[int, int, int]:
    """Entries of a row, rows of a tile, and entries of a padded row."""
    width = rows.shape[3]
    BW = max(least, next_power_of_2(width))
    return width, max(least, min(next_power_of_2(n), _TILE // BW)), BW
