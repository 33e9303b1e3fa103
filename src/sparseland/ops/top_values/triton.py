"""The value where a row's set ends, narrowed down pass by pass in Triton; no pass waits for the host.

By number: radix selection. Each level counts, per row, the keys that share the bits found so far by their
next eight. A tile's 256-bin histogram is a product of two one-hot matrices, 16 upper by 16 lower digits: far
fewer comparisons than one per bin, and no atomics inside a tile.

By sum: each pass over a long row adds up what lies at or above 16 thresholds inside the interval of bit
patterns that is left, which shrinks it 17-fold; eight passes leave one pattern. Sums of programs are added in
fixed point: integers add to the same sum in any order, so every run gives the same result. One program does
the same for a short row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.ops.top_values.keys import ordered_keys
from sparseland.ops.top_values.listing import top_indices
from sparseland.patterns import cdiv, next_power_of_2

__all__ = ["covering", "top_indices", "top_mask"]

# Fixed point of sums: rows add up to less than 2^20 (int64 holds 2^62), 2^-40 is a rounding error of theirs.
_UNIT = tl.constexpr(2.0**40)
# Compiling again where one of these happens to be 1 or to divide by 16 would gain nothing.
_UNSPECIALIZED = ("goal", "n_rows", "forced")
# Rows up to this length stay in the registers of one program.
_SHORT = 16384
# One program sums rows up to this length by itself: slower on the device than many, but one launch, not ten.
_ALONE = 65536
# Values that one program looks at. Rows come first in a grid, whose other sides end at 65535.
_PER_PROGRAM = 4096


@triton.jit
def _keys(b_x, i_x, forced):
    """Integers that order like the values: NaN above all numbers, forced places above NaN, earlier first."""
    return tl.where(i_x < forced, 0x7FFFFFFF - i_x, ordered_keys(b_x))


@triton.jit
def _state(hist, wanted, i_row, n_rows, LEVELS: tl.constexpr):
    """What the first LEVELS levels say of a row.

    Returns the leading bits of the key of the last wanted value, the number of values above those bits and
    with them, and whether there are fewer values than wanted.
    """
    i_bin = tl.arange(0, 256)
    prefix = tl.zeros([], tl.int32)
    larger = tl.zeros([], tl.int64)
    same = tl.zeros([], tl.int64)
    never = tl.zeros([], tl.int32)
    for level in tl.static_range(LEVELS):
        b_count = tl.load(hist + (level * n_rows + i_row).to(tl.int64) * 256 + i_bin)
        b_reached = tl.cumsum(b_count, 0, reverse=True) + larger
        digit = tl.sum((b_reached >= wanted).to(tl.int32), 0) - 1
        never = tl.maximum(never, (digit < 0).to(tl.int32))
        larger += tl.sum(tl.where(i_bin > digit, b_count, 0), 0)
        same = tl.sum(tl.where(i_bin == digit, b_count, 0), 0)
        if level == 0:
            prefix = digit - 128  # keys are signed
        else:
            prefix = prefix * 256 + digit
    return prefix, larger, same, never


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _count_digits(x, count, hist, n, n_rows, forced, per_program, LEVEL: tl.constexpr, BN: tl.constexpr):
    i_row = tl.program_id(0)
    wanted = tl.load(count + i_row).to(tl.int64)
    prefix, _larger, _same, never = _state(hist, wanted, i_row, n_rows, LEVEL)
    if never != 0:
        return
    x += i_row.to(tl.int64) * n
    begin = tl.program_id(1) * per_program
    i_digit = tl.arange(0, 16)
    b_count = tl.zeros([16, 16], tl.float32)
    for start in range(begin, tl.minimum(begin + per_program, n), BN):
        i_x = start + tl.arange(0, BN)
        b_in = i_x < n
        key = _keys(tl.load(x + i_x, mask=b_in, other=0.0), i_x, forced)
        if LEVEL > 0:
            b_in = b_in & ((key >> (32 - 8 * LEVEL)) == prefix)
        if tl.max(b_in.to(tl.int32), 0) > 0:
            if LEVEL == 0:
                digit = (key >> 24) + 128
            else:
                digit = (key >> (24 - 8 * LEVEL)) & 255
            b_upper = (i_digit[:, None] == (digit >> 4)[None, :]) & b_in[None, :]
            b_lower = (digit & 15)[:, None] == i_digit[None, :]
            b_count = tl.dot(b_upper.to(tl.float16), b_lower.to(tl.float16), b_count)
    p = hist + (LEVEL * n_rows + i_row).to(tl.int64) * 256 + tl.arange(0, 256)
    b_found = tl.reshape(b_count, [256]).to(tl.int64)
    tl.atomic_add(p, b_found, mask=b_found > 0, sem="relaxed")


@triton.jit
def _interval(sums, goal, i_row, n_rows, PASSES: tl.constexpr):
    """Bit patterns after so many passes: the goal is exceeded at ``low``, not yet at ``high``."""
    i_t = tl.arange(0, 16)
    low, high = tl.full([], 1, tl.int64), tl.full([], 0x7F800000, tl.int64)
    for i in tl.static_range(PASSES):
        b_sum = tl.load(sums + (i * n_rows + i_row).to(tl.int64) * 16 + i_t)
        reached = tl.sum((b_sum > goal).to(tl.int64), 0)
        width = high - low
        high = tl.where(reached == 16, high, low + width * (reached + 1) // 17)
        low = tl.where(reached == 0, low, low + width * reached // 17)
    return low, high


@triton.jit
def _part(x, start, n, BN: tl.constexpr):
    """Positive finite numbers, 0 for all others, and how many of these are not finite."""
    i_x = start + tl.arange(0, BN)
    b_x = tl.load(x + i_x, mask=i_x < n, other=0.0)
    b_finite = b_x < 1e37  # false for NaN too
    return tl.where((b_x > 0.0) & b_finite, b_x, 0.0), (b_finite == 0).to(tl.int32)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _sum_above(
    x, active, sums, goal, n, n_rows, PASS: tl.constexpr, HAS_ACTIVE: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Sums of what lies at or above 16 thresholds inside the interval that is left.

    The values stay in registers and the thresholds go by: one sum over the program for each.
    """
    i_row = tl.program_id(0)
    if HAS_ACTIVE:  # noqa: SIM102  a pointer that is None can't be read, not even by `and`
        if tl.load(active + i_row) == 0:
            return
    i_t = tl.arange(0, 16)
    low, high = _interval(sums, goal, i_row, n_rows, PASS)
    b_x, _ = _part(x + i_row.to(tl.int64) * n, tl.program_id(1) * BN, n, BN)
    if tl.max(b_x, 0) == 0.0:
        return
    key = b_x.to(tl.int32, bitcast=True)
    b_sum = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        limit = (low + (high - low) * (i + 1) // 17).to(tl.int32)
        b_sum = tl.where(i_t == i, tl.sum(tl.where(key >= limit, b_x, 0.0), 0), b_sum)
    b_fixed = (b_sum.to(tl.float64) * _UNIT).to(tl.int64)
    p = sums + (PASS * n_rows + i_row).to(tl.int64) * 16 + i_t
    tl.atomic_add(p, b_fixed, mask=b_fixed > 0, sem="relaxed")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _around(
    x, active, sums, found, goal, n, n_rows, per_program, HAS_ACTIVE: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Per row: sum and number above the last value, its ties, the whole sum, what is not finite."""
    i_row = tl.program_id(0)
    if HAS_ACTIVE:  # noqa: SIM102  a pointer that is None can't be read, not even by `and`
        if tl.load(active + i_row) == 0:
            return
    low, _high = _interval(sums, goal, i_row, n_rows, 8)
    x += i_row.to(tl.int64) * n
    begin = tl.program_id(1) * per_program
    b_above = tl.zeros([BN], tl.float32)
    b_all = tl.zeros([BN], tl.float32)
    b_larger = tl.zeros([BN], tl.int32)
    b_ties = tl.zeros([BN], tl.int32)
    b_odd = tl.zeros([BN], tl.int32)
    for start in range(begin, tl.minimum(begin + per_program, n), BN):
        b_x, b_strange = _part(x, start, n, BN)
        b_odd += b_strange
        key = b_x.to(tl.int32, bitcast=True)
        b_above += tl.where(key > low, b_x, 0.0)
        b_all += b_x
        b_larger += (key > low).to(tl.int32)
        b_ties += (key == low).to(tl.int32)
    p = found + i_row.to(tl.int64) * 5
    tl.atomic_add(p, (tl.sum(b_above, 0).to(tl.float64) * _UNIT).to(tl.int64), sem="relaxed")
    tl.atomic_add(p + 1, tl.sum(b_larger, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(p + 2, tl.sum(b_ties, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(p + 3, (tl.sum(b_all, 0).to(tl.float64) * _UNIT).to(tl.int64), sem="relaxed")
    tl.atomic_add(p + 4, tl.sum(b_odd, 0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _cross(goal, active, sums, found, value, taken, n, n_rows, HAS_ACTIVE: tl.constexpr):
    """The value that the bits spell, and how many of its ties are needed."""
    i_row = tl.program_id(0)
    if HAS_ACTIVE:  # noqa: SIM102  a pointer that is None can't be read, not even by `and`
        if tl.load(active + i_row) == 0:
            tl.store(value + i_row, 0.0)
            tl.store(taken + i_row, tl.zeros([], tl.int64))
            return
    low, _high = _interval(sums, goal, i_row, n_rows, 8)
    p = found + i_row.to(tl.int64) * 5
    above, larger, ties = tl.load(p), tl.load(p + 1), tl.load(p + 2)
    never = (tl.load(p + 3) <= goal) | (tl.load(p + 4) > 0)
    last = low.to(tl.int32).to(tl.float32, bitcast=True)
    each = last.to(tl.float64) * _UNIT
    needed = ((goal - above).to(tl.float64) / each).to(tl.int64) + 1
    needed = tl.maximum(tl.minimum(needed, ties), 1)
    tl.store(value + i_row, tl.where(never, 0.0, last))
    tl.store(taken + i_row, tl.where(never, tl.zeros([], tl.int64) + n + 1, larger + needed))


@triton.jit(do_not_specialize=("goal",))
def _cover_alone(x, active, value, taken, goal, n, HAS_ACTIVE: tl.constexpr, BN: tl.constexpr):
    """All of `covering` for one row: each sweep adds up what lies at or above three thresholds.

    Numbers order like their bits. The goal is exceeded at ``low``, not at ``high``; a sweep leaves a quarter.
    """
    i_row = tl.program_id(0)
    if HAS_ACTIVE:  # noqa: SIM102  a pointer that is None can't be read, not even by `and`
        if tl.load(active + i_row) == 0:
            tl.store(value + i_row, 0.0)
            tl.store(taken + i_row, tl.zeros([], tl.int64))
            return
    x += i_row.to(tl.int64) * n
    mass = goal.to(tl.float64) / _UNIT
    b_all = tl.zeros([BN], tl.float32)
    b_peak = tl.zeros([BN], tl.float32)
    b_odd = tl.zeros([BN], tl.int32)
    for start in range(0, n, BN):
        b_x, b_strange = _part(x, start, n, BN)
        b_all += b_x
        b_peak = tl.maximum(b_peak, b_x)
        b_odd += b_strange
    never = (tl.sum(b_all.to(tl.float64), 0) <= mass) | (tl.sum(b_odd, 0) > 0)
    if never:
        tl.store(value + i_row, 0.0)
        tl.store(taken + i_row, tl.zeros([], tl.int64) + n + 1)
        return
    low = tl.full([], 1, tl.int32)
    high = tl.max(b_peak, 0).to(tl.int32, bitcast=True) + 1
    while high - low > 1:
        step = (high - low + 3) // 4
        first, second = low + step, tl.minimum(low + 2 * step, high)
        third = tl.minimum(second + step, high)
        b_1 = tl.zeros([BN], tl.float32)
        b_2 = tl.zeros([BN], tl.float32)
        b_3 = tl.zeros([BN], tl.float32)
        for start in range(0, n, BN):
            b_x, _ = _part(x, start, n, BN)
            key = b_x.to(tl.int32, bitcast=True)
            b_1 += tl.where(key >= first, b_x, 0.0)
            b_2 += tl.where(key >= second, b_x, 0.0)
            b_3 += tl.where(key >= third, b_x, 0.0)
        if tl.sum(b_3.to(tl.float64), 0) > mass:
            low = third
        elif tl.sum(b_2.to(tl.float64), 0) > mass:
            low, high = second, third
        elif tl.sum(b_1.to(tl.float64), 0) > mass:
            low, high = first, second
        else:
            high = first
    b_above = tl.zeros([BN], tl.float32)
    b_larger = tl.zeros([BN], tl.int32)
    b_ties = tl.zeros([BN], tl.int32)
    for start in range(0, n, BN):
        b_x, _ = _part(x, start, n, BN)
        key = b_x.to(tl.int32, bitcast=True)
        b_above += tl.where(key > low, b_x, 0.0)
        b_larger += (key > low).to(tl.int32)
        b_ties += (key == low).to(tl.int32)
    last = low.to(tl.float32, bitcast=True)
    left = mass - tl.sum(b_above.to(tl.float64), 0)
    needed = (left / last.to(tl.float64)).to(tl.int32) + 1
    needed = tl.maximum(tl.minimum(needed, tl.sum(b_ties, 0)), 1)
    tl.store(value + i_row, last)
    tl.store(taken + i_row, (tl.sum(b_larger, 0) + needed).to(tl.int64))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _mark_long(x, count, hist, out, n, n_rows, forced, BN: tl.constexpr):
    """One tile of a row. Only where some ties of the last key stay out, those before the tile are counted."""
    i_row = tl.program_id(0)
    wanted = tl.load(count + i_row).to(tl.int64)
    last, larger, ties, never = _state(hist, wanted, i_row, n_rows, 4)
    left = (wanted - larger).to(tl.int32)  # ties of the last key that are taken
    x += i_row.to(tl.int64) * n
    begin = tl.program_id(1) * BN
    i_x = begin + tl.arange(0, BN)
    b_in = i_x < n
    key = _keys(tl.load(x + i_x, mask=b_in, other=0.0), i_x, forced)
    b_tie = (key == last) & b_in
    if (ties > left) & (never == 0):
        for start in range(0, begin, BN):
            i_b = start + tl.arange(0, BN)
            left -= tl.sum((_keys(tl.load(x + i_b), i_b, forced) == last).to(tl.int32), 0)
        b_tie = b_tie & (tl.cumsum(b_tie.to(tl.int32), 0) <= left)
    b_keep = (key > last) | b_tie | (never != 0)
    tl.store(out + i_row.to(tl.int64) * n + i_x, b_keep.to(tl.int8), mask=b_in)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _mark_short(x, count, out, n, forced, BN: tl.constexpr):
    """The same for a row that fits into registers: one program, one bit of the last key at a time."""
    i_row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(count + i_row)
    i_x = tl.arange(0, BN)
    b_in = i_x < n
    out += i_row * n
    if wanted <= 0:
        # Rows without a wish are not even read: their values may never have been written.
        tl.store(out + i_x, tl.zeros([BN], tl.int8), mask=b_in)
        return
    key = _keys(tl.load(x + i_row * n + i_x, mask=b_in, other=0.0), i_x, forced)
    positive = tl.sum((b_in & (key >= 0)).to(tl.int32), 0)
    last = tl.where(positive >= wanted, 0, -2147483648).to(tl.int32)
    step = tl.full([], 1 << 30, tl.int32)
    for _ in range(31):
        larger = last + step
        step = step >> 1
        enough = tl.sum((b_in & (key >= larger)).to(tl.int32), 0) >= wanted
        last = tl.where(enough, larger, last)
    b_tie = b_in & (key == last)
    left = wanted - tl.sum((b_in & (key > last)).to(tl.int32), 0)
    b_keep = (key > last) | (b_tie & (tl.cumsum(b_tie.to(tl.int32), 0) <= left))
    tl.store(out + i_x, b_keep.to(tl.int8), mask=b_in)


def top_mask(
    values: Float[Tensor, "*batch n"], count: Int[Tensor, "*batch"], forced: int
) -> Bool[Tensor, "*batch n"]:
    """Short rows in one kernel, long ones by histograms over many programs."""
    n = values.shape[-1]
    x = values.contiguous()
    count = count.contiguous()
    n_rows = x.numel() // n
    out = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    if n_rows == 0:
        return out.view(torch.bool)
    if n <= _SHORT:
        BN = next_power_of_2(n)
        _mark_short[(n_rows,)](x, count, out, n, forced, BN=BN, num_warps=_warps(BN))
        return out.view(torch.bool)
    hist = torch.zeros(4, n_rows, 256, dtype=torch.int64, device=x.device)
    grid = (n_rows, cdiv(n, _PER_PROGRAM))
    for level in range(4):
        _count_digits[grid](x, count, hist, n, n_rows, forced, _PER_PROGRAM, LEVEL=level, BN=512, num_warps=8)
    _mark_long[grid](x, count, hist, out, n, n_rows, forced, BN=_PER_PROGRAM, num_warps=8)
    return out.view(torch.bool)


def covering(
    weights: Float[Tensor, "*batch n"],
    mass: float,
    active: Bool[Tensor, "*batch"] | None,
    alone: int = _ALONE,
) -> tuple[Float[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """Rows of up to ``alone`` numbers in one kernel, longer ones by sums of many programs."""
    n, rows = weights.shape[-1], weights.shape[:-1]
    x = weights.contiguous()
    value = torch.empty(rows, dtype=torch.float32, device=x.device)
    taken = torch.empty(rows, dtype=torch.int64, device=x.device)
    n_rows = value.numel()
    if n_rows == 0:
        return value, taken
    if n == 0:
        return value.zero_(), taken.fill_(1)
    if active is not None:
        active = active.contiguous().view(torch.int8)
    goal = int(mass * _UNIT.value)
    if n <= alone:
        BN = min(8192, next_power_of_2(n))
        _cover_alone[(n_rows,)](
            x, active, value, taken, goal, n, HAS_ACTIVE=active is not None, BN=BN, num_warps=_warps(2 * BN)
        )
        return value, taken
    numbers = torch.zeros(n_rows * (8 * 16 + 5), dtype=torch.int64, device=x.device)
    sums, found = numbers[: n_rows * 128], numbers[n_rows * 128 :]
    grid = (n_rows, cdiv(n, _PER_PROGRAM))
    known = {"HAS_ACTIVE": active is not None, "num_warps": 4}
    for i in range(8):
        _sum_above[grid](x, active, sums, goal, n, n_rows, PASS=i, BN=_PER_PROGRAM, **known)
    _around[grid](x, active, sums, found, goal, n, n_rows, _PER_PROGRAM, BN=1024, **known)
    _cross[(n_rows,)](goal, active, sums, found, value, taken, n, n_rows, **known)
    return value, taken


def _warps(BN: int) -> int:
    return 4 if BN <= 2048 else 8 if BN <= 8192 else 16
