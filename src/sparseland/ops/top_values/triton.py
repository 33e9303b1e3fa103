"""Radix selection in Triton: the bits of the value where a row's set ends, eight at a time.

Each level counts, per row, the keys that share the bits found so far by their next eight (and adds their
values up, in fixed point: integers add to the same sum in any order, so every run gives the same result).
The next kernel reads the histograms before it and goes on from there; no level waits for the host.

A tile's 256-bin histogram is a product of two one-hot matrices, 16 upper by 16 lower digits: far fewer
comparisons than one per bin, and no atomics inside a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Fixed point of sums: rows add up to less than 2^20 (int64 holds 2^62), 2^-40 is a rounding error of theirs.
_UNIT = tl.constexpr(2.0**40)
# Compiling again where one of these happens to be 1 or to divide by 16 would gain nothing.
_UNSPECIALIZED = ("goal", "n_rows", "forced")
# Rows up to this length stay in the registers of one program.
_SHORT = 16384
# Values that one program looks at.
_PER_PROGRAM = 4096


@triton.jit
def _keys(b_x, i_x, forced):
    """Integers that order like the values: NaN above all numbers, forced places above NaN, earlier first."""
    b_x = tl.where(b_x == 0.0, 0.0, b_x)  # -0 ties with 0
    bits = b_x.to(tl.int32, bitcast=True)
    bits = tl.where(b_x != b_x, 0x7FC00000, bits)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(i_x < forced, 0x7FFFFFFF - i_x, key)


@triton.jit
def _state(hist, goal, i_row, n_rows, LEVELS: tl.constexpr, WEIGHTED: tl.constexpr):
    """What the first LEVELS levels say of a row.

    Returns the leading bits of the key with which the goal is exceeded, the sum and the number of the values
    above those bits, and whether the goal is never exceeded.
    """
    i_bin = tl.arange(0, 256)
    prefix = tl.zeros([], tl.int32)
    above = tl.zeros([], tl.int64)
    larger = tl.zeros([], tl.int64)
    never = tl.zeros([], tl.int32)
    for level in tl.static_range(LEVELS):
        p = hist + (level * n_rows + i_row).to(tl.int64) * 512
        b_count = tl.load(p + i_bin)
        if WEIGHTED:
            b_sum = tl.load(p + 256 + i_bin)
        else:
            b_sum = b_count
        if WEIGHTED and level == 0:
            # The topmost bin holds what is not finite.
            never = tl.maximum(never, (tl.sum(tl.where(i_bin == 255, b_count, 0), 0) > 0).to(tl.int32))
        b_reached = tl.cumsum(b_sum, 0, reverse=True) + above
        digit = tl.sum((b_reached > goal).to(tl.int32), 0) - 1
        never = tl.maximum(never, (digit < 0).to(tl.int32))
        above += tl.sum(tl.where(i_bin > digit, b_sum, 0), 0)
        larger += tl.sum(tl.where(i_bin > digit, b_count, 0), 0)
        if level == 0:
            prefix = digit - 128  # keys are signed
        else:
            prefix = prefix * 256 + digit
    return prefix, above, larger, never


@triton.jit
def _goal(count, goal, i_row, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        found = goal.to(tl.int64)
    else:
        found = tl.load(count + i_row).to(tl.int64) - 1  # the n-th largest is the first to exceed n - 1
    return found


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _count_digits(
    x, count, goal, active, hist, n, n_rows, forced, per_program,
    LEVEL: tl.constexpr, WEIGHTED: tl.constexpr, HAS_ACTIVE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(1)
    if HAS_ACTIVE:  # noqa: SIM102  a pointer that is None can't be read, not even by `and`
        if tl.load(active + i_row) == 0:
            return
    b_goal = _goal(count, goal, i_row, WEIGHTED)
    prefix, _above, _larger, never = _state(hist, b_goal, i_row, n_rows, LEVEL, WEIGHTED)
    if never != 0:
        return
    x += i_row.to(tl.int64) * n
    begin = tl.program_id(0) * per_program
    i_digit = tl.arange(0, 16)
    b_count = tl.zeros([16, 16], tl.float32)
    b_sum = tl.zeros([16, 16], tl.float32)
    for start in range(begin, tl.minimum(begin + per_program, n), BN):
        i_x = start + tl.arange(0, BN)
        b_in = i_x < n
        b_x = tl.load(x + i_x, mask=b_in, other=0.0)
        key = _keys(b_x, i_x, forced)
        if LEVEL > 0:
            b_in = b_in & ((key >> (32 - 8 * LEVEL)) == prefix)
        if WEIGHTED:
            b_in = b_in & (b_x != 0.0)
        if tl.max(b_in.to(tl.int32), 0) > 0:
            if LEVEL == 0:
                digit = (key >> 24) + 128
            else:
                digit = (key >> (24 - 8 * LEVEL)) & 255
            b_upper = (i_digit[:, None] == (digit >> 4)[None, :]) & b_in[None, :]
            b_lower = (digit & 15)[:, None] == i_digit[None, :]
            b_count = tl.dot(b_upper.to(tl.float16), b_lower.to(tl.float16), b_count)
            if WEIGHTED:
                b_w = tl.where(b_x < 1e37, b_x, 0.0)  # false for NaN too
                b_sum = tl.dot(
                    b_upper.to(tl.float32), tl.where(b_lower, b_w[:, None], 0.0), b_sum,
                    input_precision="tf32x3",
                )  # fmt: skip
    p = hist + (LEVEL * n_rows + i_row).to(tl.int64) * 512 + tl.arange(0, 256)
    b_found = tl.reshape(b_count, [256]).to(tl.int64)
    tl.atomic_add(p, b_found, mask=b_found > 0, sem="relaxed")
    if WEIGHTED:
        b_fixed = (tl.reshape(b_sum, [256]).to(tl.float64) * _UNIT).to(tl.int64)
        tl.atomic_add(p + 256, b_fixed, mask=b_found > 0, sem="relaxed")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _cross(goal, active, hist, value, taken, n, n_rows, HAS_ACTIVE: tl.constexpr):
    """The value that the bits spell, and how many of its ties are needed."""
    i_row = tl.program_id(0)
    if HAS_ACTIVE:  # noqa: SIM102  a pointer that is None can't be read, not even by `and`
        if tl.load(active + i_row) == 0:
            tl.store(value + i_row, 0.0)
            tl.store(taken + i_row, tl.zeros([], tl.int64))
            return
    b_goal = _goal(hist, goal, i_row, True)
    key, above, larger, never = _state(hist, b_goal, i_row, n_rows, 4, True)
    p = hist + (3 * n_rows + i_row).to(tl.int64) * 512 + (key & 255)
    ties = tl.load(p)
    each = tl.load(p + 256).to(tl.float64) / tl.maximum(ties, 1).to(tl.float64)
    needed = ((b_goal - above).to(tl.float64) / tl.where(each > 0.0, each, 1.0)).to(tl.int64) + 1
    needed = tl.maximum(tl.minimum(needed, ties), 1)
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    tl.store(value + i_row, tl.where(never != 0, 0.0, bits.to(tl.float32, bitcast=True)))
    tl.store(taken + i_row, tl.where(never != 0, tl.zeros([], tl.int64) + n + 1, larger + needed))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _mark_long(x, count, hist, out, n, n_rows, forced, BN: tl.constexpr):
    i_row = tl.program_id(0)
    b_goal = _goal(count, 0, i_row, False)
    last, _above, larger, never = _state(hist, b_goal, i_row, n_rows, 4, False)
    left = (b_goal + 1 - larger).to(tl.int32)  # ties of the last key that are taken
    x += i_row.to(tl.int64) * n
    out += i_row.to(tl.int64) * n
    for start in range(0, n, BN):
        i_x = start + tl.arange(0, BN)
        b_in = i_x < n
        key = _keys(tl.load(x + i_x, mask=b_in, other=0.0), i_x, forced)
        b_keep = (key > last) | (never != 0)
        b_tie = ((key == last) & b_in).to(tl.int32)
        ties = tl.sum(b_tie, 0)
        if ties > 0:
            b_keep = b_keep | ((b_tie > 0) & (tl.cumsum(b_tie, 0) <= left))
            left -= ties
        tl.store(out + i_x, b_keep.to(tl.int8), mask=b_in)


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
        BN = triton.next_power_of_2(n)
        _mark_short[(n_rows,)](x, count, out, n, forced, BN=BN, num_warps=_warps(BN))
        return out.view(torch.bool)
    hist = _histograms(x, n, n_rows, count=count, forced=forced)
    _mark_long[(n_rows,)](x, count, hist, out, n, n_rows, forced, BN=8192, num_warps=16)
    return out.view(torch.bool)


def covering(
    weights: Float[Tensor, "*batch n"], mass: float, active: Bool[Tensor, "*batch"] | None
) -> tuple[Float[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """Histograms over many programs, whatever the length."""
    n, rows = weights.shape[-1], weights.shape[:-1]
    x = weights.contiguous()
    value = torch.empty(rows, dtype=torch.float32, device=x.device)
    taken = torch.empty(rows, dtype=torch.int64, device=x.device)
    if value.numel() == 0:
        return value, taken
    if n == 0:
        return value.zero_(), taken.fill_(1)
    if active is not None:
        active = active.contiguous().view(torch.int8)
    goal = int(mass * _UNIT.value)
    hist = _histograms(x, n, value.numel(), goal=goal, active=active)
    _cross[(value.numel(),)](
        goal, active, hist, value, taken, n, value.numel(), HAS_ACTIVE=active is not None, num_warps=4
    )
    return value, taken


def _histograms(
    x: Tensor,
    n: int,
    n_rows: int,
    count: Tensor | None = None,
    goal: int | None = None,
    active: Tensor | None = None,
    forced: int = 0,
) -> Int[Tensor, "4 R 2 256"]:
    """The four levels, of numbers (up to ``count``) or of sums (up to ``goal``)."""
    hist = torch.zeros(4, n_rows, 2, 256, dtype=torch.int64, device=x.device)
    options = {
        "WEIGHTED": goal is not None, "HAS_ACTIVE": active is not None, "BN": 512, "num_warps": 8,
    }  # fmt: skip
    grid = (triton.cdiv(n, _PER_PROGRAM), n_rows)
    for level in range(4):
        _count_digits[grid](
            x, count, goal or 0, active, hist, n, n_rows, forced, _PER_PROGRAM, LEVEL=level, **options
        )
    return hist


def _warps(BN: int) -> int:
    return 4 if BN <= 2048 else 8 if BN <= 8192 else 16
