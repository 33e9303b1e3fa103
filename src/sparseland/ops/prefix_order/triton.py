"""The wavelet matrix in Triton, in int32: two kernels per level build it, one follows all levels.

A level's places are a running count over the whole row. Tiles are counted first; then each tile adds up the
counts of those before it and ranks its own values, so that no program waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

_TILE = 2048


@triton.jit(do_not_specialize=["n", "bit"])
def _count_zeros(values, counts, n, bit, BN: tl.constexpr):
    """Values of a tile whose bit is 0."""
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_n = i_tile * BN + tl.arange(0, BN)
    b_bit = (tl.load(values + i_row * n + i_n, mask=i_n < n, other=-1) >> bit) & 1
    tl.store(counts + i_row * tl.num_programs(0) + i_tile, tl.sum(1 - b_bit, 0))


@triton.jit(do_not_specialize=["n", "bit"])
def _split(values, counts, zeros, out, n, bit, BN: tl.constexpr, BT: tl.constexpr):
    """A level: zeros before each value (and in all), and the values with the zeros in front of the ones."""
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    before, total = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, tiles, BT):
        i_t = start + tl.arange(0, BT)
        b_count = tl.load(counts + i_row * tiles + i_t, mask=i_t < tiles, other=0)
        before += tl.sum(tl.where(i_t < i_tile, b_count, 0), 0)
        total += tl.sum(b_count, 0)
    i_n = i_tile * BN + tl.arange(0, BN)
    b_in = i_n < n
    b_value = tl.load(values + i_row * n + i_n, mask=b_in, other=-1)
    b_zero = 1 - ((b_value >> bit) & 1)
    b_before = before + tl.cumsum(b_zero, 0) - b_zero
    zeros += i_row * (n + 1)
    tl.store(zeros + i_n, b_before, mask=b_in)
    tl.store(zeros + n, total, mask=i_tile == 0)
    b_target = tl.where(b_zero == 1, b_before, total + i_n - b_before)
    tl.store(out + i_row * n + b_target, b_value, mask=b_in)


@triton.jit(do_not_specialize=["n", "nth", "n_rows", "levels"])
def _follow(zeros, out, n, nth, n_rows, levels, BN: tl.constexpr):
    """Every prefix's question down the levels; prefixes that are too short ask nothing."""
    i_row = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_ask = (i_n < n) & (i_n > nth)
    b_low, b_high = tl.zeros([BN], tl.int32), i_n
    b_place, b_found = tl.zeros([BN], tl.int32) + nth, tl.zeros([BN], tl.int32)
    for level in range(0, levels):
        p = zeros + (level * n_rows + i_row) * (n + 1)
        total = tl.load(p + n)
        b_low_zeros = tl.load(p + b_low, mask=b_ask, other=0)
        b_high_zeros = tl.load(p + b_high, mask=b_ask, other=0)
        b_count = b_high_zeros - b_low_zeros
        b_right = b_place >= b_count
        b_place = tl.where(b_right, b_place - b_count, b_place)
        b_found = b_found * 2 + b_right.to(tl.int32)
        b_low = tl.where(b_right, total + b_low - b_low_zeros, b_low_zeros)
        b_high = tl.where(b_right, total + b_high - b_high_zeros, b_high_zeros)
    tl.store(out + i_row * n + i_n, b_found.to(tl.int64), mask=i_n < n)


def nth_of_prefixes(values: Int[Tensor, "*batch n"], nth: int) -> Int[Tensor, "*batch n"]:
    """All levels are kept until they are followed: 4 bytes per value and bit."""
    n = values.shape[-1]
    out = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    if out.numel() == 0:
        return out
    n_rows = values.numel() // n
    source = values.to(torch.int32).contiguous()
    buffers = [torch.empty_like(source) for _ in range(2)]
    levels = max(1, (n - 1).bit_length())
    zeros = torch.empty(levels, n_rows, n + 1, dtype=torch.int32, device=values.device)
    tile = min(_TILE, max(16, next_power_of_2(n)))
    grid = (cdiv(n, tile), n_rows)
    counts = torch.empty(n_rows, grid[0], dtype=torch.int32, device=values.device)
    some = min(1024, max(16, next_power_of_2(grid[0])))
    for level in range(levels):
        bit, target = levels - 1 - level, buffers[level % 2]
        _count_zeros[grid](source, counts, n, bit, BN=tile, num_warps=4)
        _split[grid](source, counts, zeros[level], target, n, bit, BN=tile, BT=some, num_warps=8)
        source = target
    _follow[(cdiv(n, 256), n_rows)](zeros, out, n, min(nth, n), n_rows, levels, BN=256, num_warps=4)
    return out
