"""The lists of InfLLM-V2's stage 1 in Triton: each query's best blocks, merged for a tile of queries.

One query at a time, the ``topk``-th largest score is found by bisection on the scores' bits, two bfloat16 at
a time, from the threshold of the query before on. No atomics: the same bits in every run.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops._dispatch import interpreting
from sparseland.patterns import cdiv, next_power_of_2

# Score rows are padded to a multiple of this many blocks: tiles of windows end there, and loads are aligned.
UNIT = 64
# Columns of a row of scores that one warp holds.
_COLUMNS = 1024
_MOST_REGISTERS = 168
_REGISTERS = 65536  # of a multiprocessor


@triton.jit
def _reach(b_x, least, EACH: tl.constexpr, PACKED: tl.constexpr):
    """All bits set of those scores whose bits are ``least`` or more; EACH: scores in a number, 1 or 2.

    PACKED: in one instruction, as if they were float16. Up to 0x7BFF their bits sort as bfloat16's do.
    """
    if EACH == 1:
        b_mask = tl.where(b_x >= least, -1, 0)
    elif PACKED:
        b_mask = tl.inline_asm_elementwise(
            "set.ge.u32.f16x2 $0, $1, $2;", "=r,r,r", [b_x, least * 0x10001], tl.int32, is_pure=True, pack=1
        )
    else:
        b_mask = tl.where((b_x << 16) >= (least << 16), 0xFFFF, 0)
        b_mask |= tl.where((b_x >> 16) >= least, -0x10000, 0)
    return b_mask


@triton.jit
def _count(b_mask, EACH: tl.constexpr):
    """How many scores a mask holds; fewer than 2^15 of each half."""
    total = tl.sum(b_mask, 0)
    if EACH == 1:
        n = -total
    else:
        # -1 for each low half that is set and borrowed from the high ones, -0x10000 for each high half.
        low = (-total) & 0xFFFF
        n = low * 2 - ((total + low) >> 16)
    return n


@triton.jit(
    do_not_specialize=["units", "n_rows", "T", "i_first", "first", "window", "topk", "dense_len", "longest"]
)
def _list_kernel(
    scores, counts, indices, members, units, n_rows, T, i_first, first, window, topk, dense_len, longest,
    TILE: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, EACH: tl.constexpr, PACKED: tl.constexpr,
    WHOLE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The list of one tile of queries: each query's best blocks, then their union with a word per block.

    Rows are queries at the positions ``first, first + 1, …``; their lists are the ``i_first``-th and on.
    """
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    NX: tl.constexpr = BC // EACH
    NONE: tl.constexpr = -0x407F4080  # -1 and -1: below every score
    TOP: tl.constexpr = 0x7BFF if EACH == 2 else 0x7BFFFFFF  # no score's bits
    i_x = tl.arange(0, NX)
    b_parts = ()
    guess = TOP // 2
    for part in tl.static_range((TILE + 15) // 16):
        # A bit for each of 16 queries, twice where EACH is 1, or for each of two blocks.
        b_part = tl.zeros([NX], tl.int32)
        for t in range(part * 16, min(TILE, part * 16 + 16)):
            i_r = i_t * TILE + t
            position = first + i_r
            # Candidates: the blocks before the query's window.
            before = tl.maximum(tl.where(i_r < n_rows, position // BS - window + 1, 0), 0)
            everything = (before <= topk) | (position + 1 < dense_len)
            if WHOLE:
                b_taken = tl.where(i_x * EACH < before, -1, 0)
                if EACH == 2:
                    b_taken = tl.where(i_x * 2 + 1 < before, b_taken, b_taken & 0xFFFF)
            else:
                p_x = scores + (i_bh * n_rows + i_r) * (units * (UNIT // EACH)) + i_x
                # Masks of 16 blocks let loads be wide; behind ``before`` stand negative numbers.
                b_x = tl.load(p_x, mask=i_x < (before + 15) // 16 * (16 // EACH), other=NONE)
                # ``n`` scores reach ``low``, as many as wanted or more; fewer, ``n_high``, reach ``high``.
                low, n, high, n_high = 0, tl.where(everything, topk, before), TOP, 0
                # Neighbours' thresholds are alike: begin there, and look farther and farther away.
                middle, far = guess, 32 if EACH == 2 else 0x200000
                while (high - low > 1) & (n != topk):
                    n_middle = _count(_reach(b_x, middle, EACH, PACKED), EACH)
                    if n_middle >= topk:
                        low, n = middle, n_middle
                    else:
                        high, n_high = middle, n_middle
                    middle = low + (high - low) // 2
                    if high == TOP:
                        middle = tl.minimum(low + far, TOP - 1)
                    if low == 0:
                        middle = tl.maximum(high - far, 1)
                    far = tl.minimum(far * 2, TOP // 8)
                guess = tl.minimum(tl.maximum(low, 1), TOP - 1)
                b_taken = _reach(b_x, low, EACH, PACKED)
                if n != topk:
                    # Of the scores that equal ``low`` the first, as many as there is room for.
                    b_above = _reach(b_x, high, EACH, PACKED)
                    b_ties = b_taken ^ b_above
                    b_low, b_high = b_ties & 1, (b_ties >> 31) & 1
                    if EACH == 1:
                        b_high = b_high * 0
                    b_rank = tl.cumsum(b_low + b_high, 0)
                    room = topk - n_high
                    b_first = tl.where(b_rank - b_high <= room, b_ties & 0xFFFF, 0)
                    b_taken = b_above | tl.where(b_rank <= room, b_ties, b_first)
            b_part |= b_taken & (tl.full([], 0x10001, tl.int32) << (t % 16))
        b_parts = b_parts + (b_part,)  # noqa: RUF005
    b_even, b_odd = b_parts[0] & 0xFFFF, (b_parts[0] >> 16) & 0xFFFF
    if TILE > 16:
        b_even, b_odd = b_even | (b_parts[1] << 16), b_odd | (b_parts[1] & -0x10000)
    i_list = i_bh * T + i_first + i_t
    p_index = indices + i_list * longest
    p_word = members + i_list * longest
    b_first = (b_even != 0).to(tl.int32)
    b_second = (b_odd != 0).to(tl.int32) if EACH == 2 else b_first * 0
    b_place = tl.cumsum(b_first + b_second, 0) - b_second
    fits = (b_first != 0) & (b_place <= longest)
    tl.store(p_index + b_place - 1, i_x * EACH, mask=fits)
    tl.store(p_word + b_place - 1, b_even, mask=fits)
    if EACH == 2:
        fits = (b_second != 0) & (b_place < longest)
        tl.store(p_index + b_place, i_x * 2 + 1, mask=fits)
        tl.store(p_word + b_place, b_odd, mask=fits)
    tl.store(counts + i_list, tl.sum(b_first + b_second, 0))


def lists(
    scores: Float[Tensor, "b h R M"],
    made: tuple[Int[Tensor, "B Hkv T"], Int[Tensor, "B Hkv T L"], Int[Tensor, "B Hkv T L"]],
    start: int,
    offset: int,
    block_size: int,
    window: int,
    topk: int,
    dense_len: int,
    tile: int,
) -> None:
    """Counts, indices and members of the best blocks of the queries from ``start`` on, into ``made``.

    ``scores`` are as ``score`` in ``triton.py`` leaves them for a ``window``; without columns, where every
    query takes all it can.
    """
    counts, indices, members = made
    B, Hkv, T = counts.shape
    rows, width = scores.shape[2:]
    columns = max(1, (offset + start + rows - 1) // block_size - window + 1)
    BC = max(64, next_power_of_2(columns))
    warps = max(1, min(16, BC // _COLUMNS))
    _list_kernel[(cdiv(rows, tile), B * Hkv)](
        scores.view(torch.int32) if width else counts, counts, indices, members, width // UNIT, rows, T,
        start // tile, offset + start, window, topk, dense_len, indices.shape[3], tile, block_size, BC,
        4 // scores.element_size(), not interpreting(), not width, UNIT, num_warps=warps,
        maxnreg=min(_MOST_REGISTERS, _REGISTERS // (32 * warps)),
    )  # fmt: skip
