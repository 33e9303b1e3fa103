"""One program per query block and head walks over what it can see and writes the selected down in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

# Sizes that change from call to call: compiling again where one happens to divide by 16 would gain nothing.
_UNSPECIALIZED = (
    "stride_mb", "stride_mh", "stride_mr", "stride_mc", "stride_wb", "stride_wh", "stride_wr",
    "stride_tb", "stride_th", "stride_ab", "stride_ah", "stride_bb", "stride_bh", "stride_cb", "stride_ch",
    "stride_pb", "stride_ph", "stride_nb", "stride_nh", "stride_ib", "stride_ih", "stride_im",
    "H", "n_queries", "n_keys", "n_entries", "width", "length", "longest",
)  # fmt: skip


# A single list that is longer (the columns of a head) is the work of several programs.
_LONG = 4096


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _block_lists(
    mask, weights, threshold, active, bands, columns, counts, indices,
    stride_mb, stride_mh, stride_mr, stride_mc, stride_wb, stride_wh, stride_wr, stride_tb, stride_th,
    stride_ab, stride_ah, stride_bb, stride_bh, stride_cb, stride_ch,
    H, n_queries, n_keys, width, length,
    SIZE: tl.constexpr, UNIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr, HAS_BANDS: tl.constexpr, HAS_COLUMNS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_r, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    offset = n_keys - n_queries
    last = tl.minimum((i_r + 1) * SIZE, n_queries) - 1 + offset
    seen = last // UNIT + 1
    i_out = i_bh.to(tl.int64) * tl.num_programs(0) + i_r
    weighted = seen  # entries whose weights are read: all, or none
    if HAS_WEIGHTS:
        if HAS_ACTIVE:
            weighted = seen * tl.load(active + i_b * stride_ab + i_h * stride_ah).to(tl.int32)
        b_least = tl.load(threshold + i_b * stride_tb + i_h * stride_th)
    found = tl.zeros([], tl.int32)
    for start in range(0, seen, BC):
        i_c = start + tl.arange(0, BC)
        b_in = i_c < seen
        b_keep = tl.zeros([BC], tl.int32)
        if HAS_MASK:
            p = mask + i_b * stride_mb + i_h * stride_mh + i_r.to(tl.int64) * stride_mr
            b_keep |= tl.load(p + i_c.to(tl.int64) * stride_mc, mask=b_in, other=0).to(tl.int32)
        if HAS_BANDS:
            band = i_r + offset // SIZE - i_c + 1
            b_band = b_in & (band >= 0) & (band < width)
            p = bands + i_b * stride_bb + i_h * stride_bh
            b_keep |= tl.load(p + band, mask=b_band, other=0).to(tl.int32)
        if HAS_COLUMNS:
            p = columns + i_b * stride_cb + i_h * stride_ch
            b_keep |= tl.load(p + i_c, mask=b_in, other=0).to(tl.int32)
        if HAS_WEIGHTS:
            p = weights + i_b * stride_wb + i_h * stride_wh + i_r.to(tl.int64) * stride_wr
            b_read = i_c < weighted
            b_w = tl.load(p + i_c, mask=b_read, other=0.0)
            # Not "at least": NaN on either side selects.
            b_keep |= (b_read & ((b_w < b_least) == 0)).to(tl.int32)
        b_keep = tl.where(b_in & (b_keep != 0), 1, 0)
        b_place = found + tl.cumsum(b_keep, 0) - 1
        tl.store(indices + i_out * length + b_place, i_c, mask=(b_keep > 0) & (b_place < length))
        found += tl.sum(b_keep, 0)
    tl.store(counts + i_out, tl.minimum(found, length))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _one_list(
    mask, counts, indices, stride_mb, stride_mh, stride_mc, H, n_entries, length, BC: tl.constexpr
):  # fmt: skip
    """The list of a single query block by many programs: each counts what is selected before its entries."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    mask += i_b * stride_mb + i_h * stride_mh
    i_c = tl.arange(0, BC)
    b_count = tl.zeros([BC], tl.int32)
    for start in range(0, i_t * BC, BC):
        b_count += (tl.load(mask + (start + i_c).to(tl.int64) * stride_mc) != 0).to(tl.int32)
    i_c += i_t * BC
    b_keep = tl.load(mask + i_c.to(tl.int64) * stride_mc, mask=i_c < n_entries, other=0) != 0
    b_place = tl.sum(b_count, 0) + tl.cumsum(b_keep.to(tl.int32), 0) - 1
    tl.store(indices + i_bh.to(tl.int64) * length + b_place, i_c, mask=b_keep & (b_place < length))
    if i_t == tl.num_programs(0) - 1:
        tl.store(counts + i_bh, tl.minimum(tl.max(b_place, 0) + 1, length))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _column_lists(
    positions, numbers, mask, bands, counts, indices,
    stride_pb, stride_ph, stride_nb, stride_nh, stride_mb, stride_mh, stride_mr, stride_mc,
    stride_bb, stride_bh, H, n_queries, n_keys, width, longest,
    SIZE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BANDS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_r, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    offset = n_keys - n_queries
    last = tl.minimum((i_r + 1) * SIZE, n_queries) - 1 + offset
    i_out = i_bh.to(tl.int64) * tl.num_programs(0) + i_r
    positions += i_b * stride_pb + i_h * stride_ph
    number = tl.minimum(tl.load(numbers + i_b * stride_nb + i_h * stride_nh).to(tl.int32), longest)
    found = tl.zeros([], tl.int32)
    for start in range(0, number, BC):
        i_v = start + tl.arange(0, BC)
        i_key = tl.load(positions + i_v, mask=i_v < number, other=2147483647)
        b_keep = i_key <= last
        i_c = i_key // SIZE
        if HAS_BANDS:
            band = i_r + offset // SIZE - i_c + 1
            b_band = b_keep & (band >= 0) & (band < width)
            p = bands + i_b * stride_bb + i_h * stride_bh
            b_keep = b_keep & (tl.load(p + band, mask=b_band, other=0) == 0)
        if HAS_MASK:
            p = mask + i_b * stride_mb + i_h * stride_mh + i_r.to(tl.int64) * stride_mr
            b_keep = b_keep & (tl.load(p + i_c.to(tl.int64) * stride_mc, mask=b_keep, other=0) == 0)
        b_one = b_keep.to(tl.int32)
        b_place = found + tl.cumsum(b_one, 0) - 1
        tl.store(indices + i_out * longest + b_place, i_key, mask=b_keep)
        found += tl.sum(b_one, 0)
    tl.store(counts + i_out, found)


@triton.jit
def _pairs_from(key, start, end):
    """Causal pairs of the queries in [start, end) with keys from ``key`` on (int64)."""
    most = tl.maximum(end - key, 0)
    before = tl.maximum(start - key, 0)
    return (most * (most + 1) - before * (before + 1)) // 2


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _list_pairs(
    counts, indices, out, stride_nb, stride_nh, stride_ib, stride_ih, stride_im, H, n_queries, n_keys,
    SIZE: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_r, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    start = (n_keys - n_queries + i_r * SIZE).to(tl.int64)
    end = tl.minimum(start + SIZE, n_keys)
    number = tl.load(counts + i_b * stride_nb + i_h * stride_nh + i_r)
    indices += i_b * stride_ib + i_h * stride_ih + i_r.to(tl.int64) * stride_im
    b_total = tl.zeros([BC], tl.int64)
    for i in range(0, number, BC):
        i_v = i + tl.arange(0, BC)
        b_in = i_v < number
        key = tl.load(indices + i_v, mask=b_in, other=0).to(tl.int64) * UNIT
        b_pairs = _pairs_from(key, start, end) - _pairs_from(tl.minimum(key + UNIT, n_keys), start, end)
        b_total += tl.where(b_in, b_pairs, 0)
    tl.store(out + i_bh.to(tl.int64) * tl.num_programs(0) + i_r, tl.sum(b_total, 0))


def block_lists(
    mask: Bool[Tensor, "b h Mq Mk"] | None,
    weights: Float[Tensor, "b h Mq Mk"] | None,
    threshold: Float[Tensor, "b h"] | None,
    active: Bool[Tensor, "b h"] | None,
    bands: Bool[Tensor, "b h W"] | None,
    columns: Bool[Tensor, "b h Mk"] | None,
    B: int,
    H: int,
    n_queries: int,
    n_keys: int,
    block_size: int,
    unit: int,
    length: int,
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """Counts and lists of static length; only what is listed is written."""
    device = next(t for t in (mask, weights, bands, columns) if t is not None).device
    rows = cdiv(n_queries, block_size)
    counts = torch.empty(B, H, rows, dtype=torch.int32, device=device)
    indices = torch.empty(B, H, rows, length, dtype=torch.int32, device=device)
    mask, active, bands, columns = (_bytes(t) for t in (mask, active, bands, columns))
    weights, bands, columns = (_last_dense(t) for t in (weights, bands, columns))
    entries = cdiv(n_keys, unit)
    if rows == 1 and entries > _LONG and mask is not None and weights is bands is columns is None:
        strides = _strides(mask, 4)
        _one_list[(cdiv(entries, _LONG), B * H)](
            mask, counts, indices, strides[0], strides[1], strides[3], H, entries, length,
            BC=_LONG, num_warps=8,
        )  # fmt: skip
        return counts, indices
    BC = min(1024, max(16, next_power_of_2(entries)))
    if counts.numel():
        _block_lists[(rows, B * H)](
            mask, weights, threshold, active, bands, columns, counts, indices,
            *_strides(mask, 4), *_strides(weights, 3), *_strides(threshold, 2), *_strides(active, 2),
            *_strides(bands, 2), *_strides(columns, 2),
            H, n_queries, n_keys, 0 if bands is None else bands.shape[-1], length,
            SIZE=block_size, UNIT=unit, HAS_MASK=mask is not None, HAS_WEIGHTS=weights is not None,
            HAS_ACTIVE=active is not None, HAS_BANDS=bands is not None, HAS_COLUMNS=columns is not None,
            BC=BC, num_warps=4,
        )  # fmt: skip
    return counts, indices


def column_lists(
    positions: Int[Tensor, "b h V"],
    numbers: Int[Tensor, "b h"],
    mask: Bool[Tensor, "b h Mq Mk"] | None,
    bands: Bool[Tensor, "b h W"] | None,
    B: int,
    H: int,
    n_queries: int,
    n_keys: int,
    block_size: int,
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """Counts and lists as long as a head's columns; only what is listed is written."""
    rows, longest = cdiv(n_queries, block_size), positions.shape[-1]
    counts = torch.empty(B, H, rows, dtype=torch.int32, device=positions.device)
    indices = torch.empty(B, H, rows, longest, dtype=torch.int32, device=positions.device)
    mask, bands = _bytes(mask), _last_dense(_bytes(bands))
    positions = _last_dense(positions.to(torch.int32))
    BC = min(1024, max(16, next_power_of_2(longest)))
    if counts.numel():
        _column_lists[(rows, B * H)](
            positions, numbers, mask, bands, counts, indices,
            *_strides(positions, 2), *_strides(numbers, 2), *_strides(mask, 4), *_strides(bands, 2),
            H, n_queries, n_keys, 0 if bands is None else bands.shape[-1], longest,
            SIZE=block_size, HAS_MASK=mask is not None, HAS_BANDS=bands is not None, BC=BC, num_warps=4,
        )  # fmt: skip
    return counts, indices


def list_pairs(
    counts: Int[Tensor, "B H Mq"],
    indices: Int[Tensor, "B H Mq L"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    unit: int,
) -> Int[Tensor, "B H Mq"]:
    """Pairs per query block: reads what is listed and nothing behind it."""
    B, H, rows = counts.shape
    out = torch.zeros(counts.shape, dtype=torch.int64, device=counts.device)
    counts, indices = _last_dense(counts), _last_dense(indices)
    if out.numel() and indices.shape[-1]:
        _list_pairs[(rows, B * H)](
            counts, indices, out, *_strides(counts, 2), *_strides(indices, 3), H, n_queries, n_keys,
            SIZE=block_size, UNIT=unit, BC=128, num_warps=1,
        )  # fmt: skip
    return out


def _bytes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(torch.int8)


def _last_dense(x: Tensor | None) -> Tensor | None:
    """Kernels take any strides but want the last dimension dense."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None, n: int) -> tuple[int, ...]:
    """The first ``n`` strides, 0 where one entry serves all."""
    if x is None:
        return (0,) * n
    return tuple(0 if x.shape[d] == 1 else x.stride(d) for d in range(n))
