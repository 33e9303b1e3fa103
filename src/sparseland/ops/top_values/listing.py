"""The places of a row's largest values in Triton, rows of any length, without sorting them.

A short row is searched by one program: the key (an integer that orders like the values) of the last wanted
value is found by halving the interval it lies in. For longer rows

1. two keys between which the last one lies, almost surely, are read off a sample of the row;
2. programs that share the row count what lies above them and copy what lies between, a few percent;
3. one program finds the last key among the copies, and how much of the list each part of the row holds;
4. the programs write their parts.

A row whose sample misleads (or that holds too many equal values where the list ends) is searched whole in
step 3: slower, as exact. Lists are ascending, whichever program comes first, so a run repeats bit for bit.
"""

# mypy: ignore-errors

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseland.ops.top_values.keys import ordered_keys
from sparseland.patterns import cdiv, next_power_of_2

# Rows up to this length stay in the registers of one program.
_SHORT = 8192
# Values that a program of steps 2 and 4 looks at together: few, since they are what scans wait for.
_TILE = 1024
# Counters that many programs add to lie so many numbers apart: neighbours would wait for one another.
_APART = tl.constexpr(64)
# Sampled ranks are this many standard deviations away from the wanted one.
_MARGIN = 4.0
_LEAST = tl.constexpr(-2147483648)
_MOST = tl.constexpr(2147483647)
_UNSPECIALIZED = ["n", "wanted", "per_slice", "most"]


@triton.jit
def _count(count, wanted, i_row, HAS_COUNT: tl.constexpr):
    """How many the row wants."""
    if HAS_COUNT:
        wanted = tl.minimum(tl.load(count + i_row), wanted).to(tl.int32)
    return wanted


@triton.jit
def _ranks(b_one):
    """How many of a tile's marks stand before each place, and how many there are; all below 2^15.

    ``b_one`` is ``[rows, 32]``: lanes of a warp scan a row together, and only the rows' sums go from warp to
    warp; a scan of one long vector would wait for the warps again and again.
    """
    b_row = tl.sum(b_one, 1)
    b_before = tl.cumsum(b_row, 0) - b_row
    return b_before[:, None] + tl.cumsum(b_one, 1) - b_one, tl.sum(b_row, 0)


@triton.jit
def _store_kept(out, i_x, b_in, key, last, left):
    """List the places of a tile whose keys are larger than the last one, and of up to ``left`` ties.

    Returns how many are listed, and how many ties are left.
    """
    b_tie = b_in & (key == last)
    # Both counts in one number, so that one scan does.
    b_rank, both = _ranks((b_in & (key > last)).to(tl.int32) + (b_tie.to(tl.int32) << 16))
    i_tie = b_rank >> 16
    b_keep = b_in & ((key > last) | (b_tie & (i_tie < left)))
    tl.store(out + (b_rank & 0xFFFF) + tl.minimum(i_tie, left), i_x, mask=b_keep)
    ties = tl.minimum(both >> 16, left)
    return (both & 0xFFFF) + ties, left - ties


@triton.jit
def _places(start, BN: tl.constexpr):
    """A tile's places, ``[BN / 32, 32]``."""
    return start + tl.arange(0, BN // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def _last_key(key, b_in, wanted, low, high):
    """The key of the ``wanted``-th largest, which lies in ``[low, high]``."""
    low, high = low.to(tl.int64), high.to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = tl.sum((b_in & (key >= middle.to(tl.int32))).to(tl.int32)) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _last_key_of_row(x, n, wanted, BN: tl.constexpr):
    """The same for a row in memory, of any keys."""
    low, high = tl.full([], -(1 << 31), tl.int64), tl.full([], 1 << 31, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        b_enough = tl.zeros([BN], tl.int32)
        for start in range(0, n, BN):
            i_x = start + tl.arange(0, BN)
            key = ordered_keys(tl.load(x + i_x, mask=i_x < n, other=0.0))
            b_enough += ((i_x < n) & (key >= middle.to(tl.int32))).to(tl.int32)
        enough = tl.sum(b_enough, 0) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _list_short(x, count, out, n, most, HAS_COUNT: tl.constexpr, BN: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    wanted = _count(count, most, i_row, HAS_COUNT)
    if wanted <= 0:
        return
    i_x = _places(0, BN)
    b_in = i_x < n
    key = ordered_keys(tl.load(x + i_row * n + i_x, mask=b_in, other=0.0))
    last = _last_key(
        key, b_in, wanted, tl.min(tl.where(b_in, key, _MOST)), tl.max(tl.where(b_in, key, _LEAST))
    )
    left = wanted - tl.sum((b_in & (key > last)).to(tl.int32))
    _store_kept(out + i_row * most, i_x, b_in, key, last, left)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _bracket(
    x, count, bounds, held, n, wanted, MARGIN: tl.constexpr, HAS_COUNT: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Keys above and below the last one, from BS values at equal distances."""
    i_row = tl.program_id(0).to(tl.int64)
    wanted = _count(count, wanted, i_row, HAS_COUNT)
    share = wanted.to(tl.float32) / n
    off = MARGIN * tl.sqrt(BS * share * (1.0 - share)) + 2.0
    upper = (share * BS - off).to(tl.int32)
    lower = (share * BS + off).to(tl.int32) + 1
    i_x = tl.arange(0, BS).to(tl.int64) * n // BS
    key = ordered_keys(tl.load(x + i_row * n + i_x))
    least, largest = tl.min(key, 0).to(tl.int64), tl.max(key, 0).to(tl.int64) + 1
    # The keys of two ranks by halving, both at once: two counts of at most 2^14 fit into one sum. A 2^-20th
    # of the interval is near enough.
    high, high_end, low, low_end = least, largest, least, largest
    for _ in range(20):
        high_mid, low_mid = (high + high_end) >> 1, (low + low_end) >> 1
        b_both = (key >= high_mid.to(tl.int32)).to(tl.int32) + (
            (key >= low_mid.to(tl.int32)).to(tl.int32) << 16
        )
        both = tl.sum(b_both, 0)
        up, down = (both & 0xFFFF) >= upper, (both >> 16) >= lower
        high, high_end = tl.where(up, high_mid, high), tl.where(up, high_end, high_mid)
        low, low_end = tl.where(down, low_mid, low), tl.where(down, low_end, low_mid)
    tl.store(bounds + i_row * 2, tl.where(upper < 1, _MOST, high_end).to(tl.int32))
    tl.store(bounds + i_row * 2 + 1, tl.where(lower > BS, _LEAST, low).to(tl.int32))
    tl.store(held + i_row * _APART, 0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _collect(
    x, bounds, held, copies, owners, larger, ties, n, per_slice, ROOM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Copies of the keys between the bounds, in any order, with the slices that they come from."""
    i_row, i_slice = tl.program_id(0).to(tl.int64), tl.program_id(1)
    high, low = tl.load(bounds + i_row * 2), tl.load(bounds + i_row * 2 + 1)
    x += i_row * n
    begin = i_slice * per_slice
    b_above = tl.zeros([BN // 32, 32], tl.int32)
    for start in range(begin, tl.minimum(begin + per_slice, n), BN):
        i_x = _places(start, BN)
        b_in = i_x < n
        key = ordered_keys(tl.load(x + i_x, mask=b_in, other=0.0))
        b_above += (b_in & (key > high)).to(tl.int32)
        b_between = b_in & (key >= low) & (key <= high)
        p_held = held + i_row * _APART + tl.zeros_like(i_x)
        i_copy = tl.atomic_add(p_held, tl.zeros_like(i_x) + 1, mask=b_between, sem="relaxed")
        b_fits = b_between & (i_copy < ROOM)
        tl.store(copies + i_row * ROOM + i_copy, key, mask=b_fits)
        tl.store(owners + i_row * ROOM + i_copy, tl.zeros_like(i_x) + i_slice, mask=b_fits)
    p_slice = i_row * tl.num_programs(1) + i_slice
    tl.store(larger + p_slice, tl.sum(b_above))
    tl.store(ties + p_slice, 0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _settle(
    x, count, bounds, held, copies, owners, larger, ties, last_key, n, wanted, per_slice,
    HAS_COUNT: tl.constexpr, SLICES: tl.constexpr, ROOM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The last key; per slice, how many keys are larger and how many tie."""
    i_row = tl.program_id(0).to(tl.int64)
    wanted = _count(count, wanted, i_row, HAS_COUNT)
    i_slice = tl.arange(0, SLICES)
    larger += i_row * SLICES
    ties += i_row * SLICES
    b_larger = tl.load(larger + i_slice)
    n_above, n_between = tl.sum(b_larger, 0), tl.load(held + i_row * _APART)
    if wanted <= 0:
        last = tl.full([], _MOST, tl.int32)
    elif (n_above < wanted) & (n_above + n_between >= wanted) & (n_between <= ROOM):
        i_copy = tl.arange(0, ROOM)
        b_in = i_copy < n_between
        key = tl.load(copies + i_row * ROOM + i_copy, mask=b_in, other=0)
        i_owner = tl.load(owners + i_row * ROOM + i_copy, mask=b_in, other=0)
        last = _last_key(
            key, b_in, wanted - n_above, tl.load(bounds + i_row * 2 + 1), tl.load(bounds + i_row * 2)
        )
        tl.store(larger + i_slice, b_larger + tl.histogram(i_owner, SLICES, mask=b_in & (key > last)))
        tl.store(ties + i_slice, tl.histogram(i_owner, SLICES, mask=b_in & (key == last)))
    else:
        x += i_row * n
        last = _last_key_of_row(x, n, wanted, BN)
        b_larger = tl.zeros([SLICES], tl.int32)
        b_ties = tl.zeros([SLICES], tl.int32)
        for start in range(0, n, BN):
            i_x = start + tl.arange(0, BN)
            key = ordered_keys(tl.load(x + i_x, mask=i_x < n, other=0.0))
            # A tile lies in one slice: slices are whole tiles.
            b_here = (i_slice == start // per_slice).to(tl.int32)
            b_larger += b_here * tl.sum(((i_x < n) & (key > last)).to(tl.int32), 0)
            b_ties += b_here * tl.sum(((i_x < n) & (key == last)).to(tl.int32), 0)
        tl.store(larger + i_slice, b_larger)
        tl.store(ties + i_slice, b_ties)
    tl.store(last_key + i_row, last)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _list_slices(
    x, count, larger, ties, last_key, out, n, most, per_slice,
    HAS_COUNT: tl.constexpr, SLICES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    wanted = _count(count, most, i_row, HAS_COUNT)
    if wanted <= 0:
        return
    i_slice = tl.arange(0, SLICES)
    b_larger, b_ties = tl.load(larger + i_row * SLICES + i_slice), tl.load(ties + i_row * SLICES + i_slice)
    before, here = i_slice < tl.program_id(1), i_slice == tl.program_id(1)
    left = wanted - tl.sum(b_larger, 0)  # ties in the whole row's list; the earlier slices' first
    ties_before = tl.minimum(tl.sum(tl.where(before, b_ties, 0), 0), left)
    at = tl.sum(tl.where(before, b_larger, 0), 0) + ties_before
    left = tl.minimum(left - ties_before, tl.sum(tl.where(here, b_ties, 0), 0))
    last = tl.load(last_key + i_row)
    x += i_row * n
    out += i_row * most
    begin = tl.program_id(1) * per_slice
    for start in range(begin, tl.minimum(begin + per_slice, n), BN):
        i_x = _places(start, BN)
        b_in = i_x < n
        key = ordered_keys(tl.load(x + i_x, mask=b_in, other=0.0))
        listed, left = _store_kept(out + at, i_x, b_in, key, last, left)
        at += listed


def top_indices(values: Tensor, most: int, count: Tensor | None, short: int = _SHORT) -> Tensor:
    """See :func:`sparseland.ops.top_values.top_indices`; there are rows, and places are wanted.

    Rows of up to ``short`` values take one program.
    """
    n = values.shape[-1]
    x = values.contiguous()
    n_rows = math.prod(values.shape[:-1])
    shape = (*values.shape[:-1], most)
    if count is None:
        out = torch.empty(shape, dtype=torch.int32, device=x.device)
    else:
        count = count.contiguous()
        out = torch.full(shape, -1, dtype=torch.int32, device=x.device)
    known = {"HAS_COUNT": count is not None}
    if n <= short:
        BN = max(32, next_power_of_2(n))
        _list_short[(n_rows,)](x, count, out, n, most, BN=BN, num_warps=4 if BN <= 2048 else 8, **known)
        return out
    slices, sample, room = (32, 4096, 8192) if n <= 1 << 18 else (64, 16384, 32768)
    room = min(room, next_power_of_2(cdiv(n, 4)))
    tile = min(_TILE, max(128, next_power_of_2(cdiv(n, slices))))
    sample = min(sample, 1 << (n.bit_length() - 1))
    per_slice = cdiv(cdiv(n, slices), tile) * tile
    parts = [n_rows * part for part in (_APART.value, 2, 1, slices, slices, room, room)]
    numbers = torch.empty(sum(parts), dtype=torch.int32, device=x.device)
    held, bounds, last, larger, ties, copies, owners = numbers.split(parts)
    _bracket[(n_rows,)](x, count, bounds, held, n, most, MARGIN=_MARGIN, BS=sample, num_warps=8, **known)
    _collect[(n_rows, slices)](
        x, bounds, held, copies, owners, larger, ties, n, per_slice, ROOM=room, BN=tile, num_warps=4
    )
    known["SLICES"] = slices
    _settle[(n_rows,)](
        x, count, bounds, held, copies, owners, larger, ties, last, n, most, per_slice,
        ROOM=room, BN=tile, num_warps=16 if room <= 8192 else 32, **known,
    )  # fmt: skip
    _list_slices[(n_rows, slices)](
        x, count, larger, ties, last, out, n, most, per_slice, BN=tile, num_warps=4, **known
    )
    return out
