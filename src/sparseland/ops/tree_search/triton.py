"""The beam search in Triton: one program per query block and head goes through all stages.

Where the segments lie at first depends on the query block alone, so that all heads that share keys look at
the same blocks then: one kernel scores these for all of them with one load of the keys, a second searches on.

A program keeps its segments (start, size, what to score next, scores of both halves' representatives) in a
few KB of global memory: registers can't be indexed, and a stage gathers by them. A stage scores the second
halves in tiles of representatives on the tensor cores, finds the K-th largest of the 2K scores by a search
over their bits, and compacts the halves above it in order, so the result needs no sorting. It is one warp:
a search is a chain of sums, which cost more across warps than the warps save. Where there are too few
searches to fill the device, four warps share one.
"""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

# Segments of all programs of a launch; up to 28 bytes of working memory each.
_SEGMENTS = 3 << 22


@dataclass(frozen=True)
class Tile:
    """How a program is cut: keys that are scored together, warps, and stages of their loads."""

    keys: int
    warps: int
    stages: int = 1


# By padded head dimension; large tiles of scores (many queries) or of float32 keys take half as many keys.
TILES = {64: Tile(64, 1), 128: Tile(64, 1), 256: Tile(32, 2)}
# The same for fewer searches than FEW, as in decoding.
FEW = 1024
WIDE = {64: Tile(128, 4, 3), 128: Tile(128, 4, 3), 256: Tile(64, 4)}
# The same for the first scores, where addresses are computed, not loaded.
OPENING = {64: Tile(64, 4, 2), 128: Tile(64, 4, 2), 256: Tile(32, 4, 2)}

LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST_BITS = tl.constexpr(-2147483648)
HIGHEST_BITS = tl.constexpr(2147483647)


@triton.jit
def _voters(
    q, i_head, i_vote, i_m, Nq, stride_qh, stride_qn,
    BLOCK_Q: tl.constexpr, VOTES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Queries [BD, n] that score for the searches of which ``i_head`` are the first heads.

    A vote that is missing is another's once more: the largest score stays the same.
    """
    i_row = i_m * BLOCK_Q + i_vote % VOTES * STRIDE
    i_row = tl.where(i_row < Nq, i_row, i_m * BLOCK_Q).to(tl.int64)
    i_head = (i_head + tl.minimum(i_vote // VOTES, GROUP - 1)).to(tl.int64)
    i_d = tl.arange(0, BD)
    p_q = q + (i_head * stride_qh + i_row * stride_qn)[:, None] + i_d[None, :]
    return tl.trans(tl.load(p_q) if D == BD else tl.load(p_q, mask=(i_d < D)[None, :], other=0.0))


@triton.jit
def _score(
    b_q, k, b_key, stride_kn,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Scores [BT / BLOCK_K, HEADS] of the blocks whose keys ``b_key [BT]`` are, by the columns of ``b_q``."""
    ROWS: tl.constexpr = b_q.shape[1] // HEADS
    i_d = tl.arange(0, BD)
    p_k = k + b_key.to(INDEX)[:, None] * stride_kn + i_d[None, :]
    b_k = tl.load(p_k) if D == BD else tl.load(p_k, mask=(i_d < D)[None, :], other=0.0)
    b_s = tl.dot(b_k, b_q, input_precision="ieee")
    b_score = tl.max(tl.reshape(b_s, (BT, HEADS, ROWS)), 2)
    return tl.max(tl.reshape(b_score, (BT // BLOCK_K, BLOCK_K, HEADS)), 1)


@triton.jit
def _ordered(b_score, b_valid):
    """Bits that compare as integers as the scores do; the lowest number where not valid."""
    # Finite, NaN the lowest (maxima prefer a number): below it is only what is not valid.
    b_score = tl.minimum(tl.maximum(b_score, -LARGEST), LARGEST)
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_valid, b_bits, LOWEST_BITS)


@triton.jit
def _threshold(first_key, second_key, lanes, K: tl.constexpr):
    """A number that just K keys reach, or else the K-th largest key: some that equal it are too many.

    It lies in [low, high]: each of the K pairs has a key of ``low`` or more, and none has two above ``high``.
    """
    larger = tl.maximum(first_key, second_key)
    low = tl.min(tl.where(lanes, larger, HIGHEST_BITS), 0)
    high = tl.max(tl.minimum(first_key, second_key), 0)
    found = 0
    while (low < high) & (found != K):
        # Their mean, rounded up; a sum could be too large.
        cut = (low | high) - ((low ^ high) >> 1)
        above = tl.sum((first_key >= cut).to(tl.int32) + (second_key >= cut).to(tl.int32), 0)
        if above >= K:
            low, found = cut, above
        else:
            high = cut - 1
    return low


@triton.jit
def _places(first_key, second_key, lanes, K: tl.constexpr):
    """Places of two lists' keys among the K largest of both, in the order first, second, first, …

    Returns three lists of places: key ``i`` of the first list is kept where the second list of them is above
    the first, and goes to the first's place; the second list's where the third is above the second.
    """
    threshold = _threshold(first_key, second_key, lanes, K)
    # Two counts in one number: keys above the threshold, and, in the upper bits, keys that equal it.
    COUNTS: tl.constexpr = tl.int32 if K < 1 << 14 else tl.int64
    WIDTH: tl.constexpr = 16 if K < 1 << 14 else 32
    ABOVE: tl.constexpr = (1 << WIDTH) - 1
    first_one = (first_key > threshold).to(COUNTS) + ((first_key == threshold).to(COUNTS) << WIDTH)
    second_one = (second_key > threshold).to(COUNTS) + ((second_key == threshold).to(COUNTS) << WIDTH)
    both = first_one + second_one
    ties = K - (tl.sum(both, 0) & ABOVE)  # those that are kept, the earliest
    end = tl.cumsum(both, 0)
    begin = end - both
    middle = begin + first_one
    return (
        ((begin & ABOVE) + tl.minimum(begin >> WIDTH, ties)).to(tl.int32),
        ((middle & ABOVE) + tl.minimum(middle >> WIDTH, ties)).to(tl.int32),
        ((end & ABOVE) + tl.minimum(end >> WIDTH, ties)).to(tl.int32),
    )


@triton.jit
def _segment(i, B, K: tl.constexpr):
    """Start and size of the first segments ``i``."""
    b_edge = (i.to(tl.int64) * B // K).to(tl.int32)
    return b_edge, ((i + 1).to(tl.int64) * B // K).to(tl.int32) - b_edge


@triton.jit(do_not_specialize=["Nq", "m_start", "Hq", "Hkv", "J", "stride_fb"])
def _first_kernel(
    q, k, first, blocks, scores,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_fb,
    Hq, Hkv, Nq, m_start, J,
    D: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr, VOTES: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, JOINT: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, POINTS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks that every search of a query block looks at, for JOINT of a key head's J searches.

    Point 0 of a segment is its first block, point 1 its second half's, points 2 and 3 those of the second
    halves of both halves.
    """
    i_p = tl.num_programs(0) - 1 - tl.program_id(0)
    i_y, i_b = tl.program_id(1), tl.program_id(2)
    parts = (J + JOINT - 1) // JOINT
    i_kv, j_start = i_y // parts, i_y % parts * JOINT
    i_m = m_start + i_p
    origin = tl.load(first + i_b * stride_fb + i_m)
    B = tl.load(blocks + i_b * stride_fb + i_m)
    if B <= K:
        return
    i_r = tl.arange(0, JOINT * ROWS)
    i_head = (i_kv * J + tl.minimum(j_start + i_r // ROWS, J - 1)) * GROUP
    q += i_b.to(tl.int64) * stride_qb
    b_q = _voters(q, i_head, i_r % ROWS, i_m, Nq, stride_qh, stride_qn, BLOCK_Q, VOTES, STRIDE, GROUP, D, BD)
    k += i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh

    REPS: tl.constexpr = BT // BLOCK_K
    i_t = tl.arange(0, BT)
    i_search = j_start + tl.arange(0, JOINT)
    i_work = ((i_b * Hkv + i_kv) * J + i_search).to(tl.int64) * tl.num_programs(0) + i_p
    p_out = scores + i_work * (POINTS * K)
    for r0 in range(0, POINTS * K, REPS):
        i_n = tl.minimum(r0 + i_t // BLOCK_K, POINTS * K - 1)
        point = i_n % POINTS
        b_block, b_size = _segment(i_n // POINTS, B, K)
        b_half = b_size // 2
        b_block += tl.where(point % 2 == 1, b_half, 0)
        if POINTS > 2:
            b_block += tl.where(point < 2, 0, tl.where(point == 3, b_size - b_half, b_half) // 2)
        b_key = origin + b_block * BLOCK_K + i_t % BLOCK_K
        b_score = _score(b_q, k, b_key, stride_kn, JOINT, BLOCK_K, D, BD, BT, INDEX)
        i_o = r0 + tl.arange(0, REPS)
        b_in = (i_o < POINTS * K)[:, None] & (i_search < J)[None, :]
        tl.store(p_out[None, :] + i_o[:, None], b_score, mask=b_in)


@triton.jit
def _split(
    segments, points, scores, lanes, origin, b_start, b_size, b_first, b_second, b_third, b_fourth,
    BLOCK_K: tl.constexpr, K: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """One stage: the K best halves become the segments; CARRY: their second halves' scores are known."""
    b_half = b_size >> 1
    # A single block stays whole, as the second of its halves.
    b_place, b_next, b_end = _places(
        _ordered(b_first, lanes & (b_half > 0)), _ordered(b_second, lanes), lanes, K
    )
    tl.debug_barrier()
    _keep(
        segments, points, scores, b_place, b_place < b_next, origin, b_start, b_half, b_first, b_third,
        BLOCK_K, K, CARRY,
    )  # fmt: skip
    _keep(
        segments, points, scores, b_next, b_next < b_end, origin, b_start + b_half, b_size - b_half, b_second,
        b_fourth, BLOCK_K, K, CARRY,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _keep(
    segments, points, scores, b_place, b_on, origin, b_start, b_size, b_score, b_other,
    BLOCK_K: tl.constexpr, K: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """Store halves as segments."""
    tl.store(segments + b_place, (b_start.to(tl.int64) << 32) | b_size.to(tl.int64), mask=b_on)
    tl.store(scores + b_place, b_score, mask=b_on)
    if CARRY:
        tl.store(scores + K + b_place, b_other, mask=b_on)
    else:
        # The second half's first key. A single block has no other half, so needs no score: where it looks
        # is the same for all of them, which is soon in the cache.
        b_key = origin + (b_start + (b_size >> 1)) * BLOCK_K
        tl.store(points + b_place, tl.where(b_size > 1, b_key, 0), mask=b_on)


@triton.jit(do_not_specialize=["Nq", "M", "m_start", "Hq", "Hkv", "stride_fb"])
def _search_kernel(
    q, k, first, blocks, out, segments, points, scores,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_fb,
    Hq, Hkv, Nq, M, m_start,
    D: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr, VOTES: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, BQ: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr, POINTS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """GROUP: query heads that search together, with VOTES queries of each block; BQ holds all of them."""
    # The longest searches first: late query blocks have most stages.
    i_p = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    heads = Hq // GROUP
    i_m = m_start + i_p
    origin = tl.load(first + i_b * stride_fb + i_m)
    B = tl.load(blocks + i_b * stride_fb + i_m)
    out += ((i_b * heads + i_h).to(tl.int64) * M + i_m) * K
    # One element a thread, as the scattered stores have it: other layouts would be converted on each of them.
    i_s = tl.max_contiguous(tl.arange(0, BK), 1)
    if B <= K:
        tl.store(out + i_s, tl.where(i_s < B, origin + i_s * BLOCK_K, 0), mask=i_s < K)
        return

    work = ((i_b * heads + i_h).to(tl.int64) * tl.num_programs(0) + i_p) * K
    segments += work
    points += work
    scores += POINTS * work
    q += i_b.to(tl.int64) * stride_qb
    i_r = tl.arange(0, BQ)
    b_q = _voters(q, i_h * GROUP, i_r, i_m, Nq, stride_qh, stride_qn, BLOCK_Q, VOTES, STRIDE, GROUP, D, BD)
    k += i_b.to(tl.int64) * stride_kb + (i_h // (heads // Hkv)).to(tl.int64) * stride_kh

    lanes = i_s < K
    b_start, b_size = _segment(i_s, B, K)
    p_first = scores + i_s * POINTS
    b_first = tl.load(p_first, mask=lanes, other=0.0)
    b_second = tl.load(p_first + 1, mask=lanes, other=0.0)
    b_third = tl.load(p_first + 2, mask=lanes, other=0.0) if POINTS > 2 else b_first
    b_fourth = tl.load(p_first + 3, mask=lanes, other=0.0) if POINTS > 2 else b_second
    _split(
        segments, points, scores, lanes, origin, b_start, b_size, b_first, b_second, b_third, b_fourth,
        BLOCK_K, K, POINTS > 2,
    )  # fmt: skip
    REPS: tl.constexpr = BT // BLOCK_K
    KNOWN: tl.constexpr = 2 * K if POINTS > 2 else 0
    i_t = tl.arange(0, BT)
    reach = 2 * K
    while reach < B:
        if reach > KNOWN:
            for r0 in range(0, K, REPS):
                i_n = r0 + i_t // BLOCK_K
                b_key = tl.load(points + i_n, mask=i_n < K, other=0) + i_t % BLOCK_K
                b_score = _score(b_q, k, b_key, stride_kn, 1, BLOCK_K, D, BD, BT, INDEX)
                i_o = r0 + tl.arange(0, REPS)
                tl.store(scores + K + i_o[:, None], b_score, mask=(i_o < K)[:, None])
            tl.debug_barrier()
        b_segment = tl.load(segments + i_s, mask=lanes, other=1)
        b_start, b_size = (b_segment >> 32).to(tl.int32), b_segment.to(tl.int32)
        b_first = tl.load(scores + i_s, mask=lanes, other=0.0)
        b_second = tl.load(scores + K + i_s, mask=lanes, other=0.0)
        b_second = tl.where(b_size > 1, b_second, b_first)
        _split(
            segments, points, scores, lanes, origin, b_start, b_size, b_first, b_second, b_first, b_second,
            BLOCK_K, K, False,
        )  # fmt: skip
        reach *= 2
    b_start = (tl.load(segments + i_s, mask=lanes, other=0) >> 32).to(tl.int32)
    tl.store(out + i_s, origin + b_start * BLOCK_K, mask=lanes)


def tree_search(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    first: Int[Tensor, "B M"],
    blocks: Int[Tensor, "B M"],
    block_q: int,
    block_k: int,
    keep: int,
    stride: int,
    shared: bool,
    tile: Tile | None = None,
    opening: Tile | None = None,
) -> Int[Tensor, "B H M n"]:
    """See :func:`sparseland.ops.tree_search.tree_search`; positions only. Deterministic.

    ``tile`` replaces the table's, ``opening`` that of the first scores.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, Hq, Nq, D = q.shape
    Hkv, M = k.shape[1], first.shape[1]
    # `expand` makes rows that share their numbers; the kernel takes one stride for both.
    first, blocks = first.contiguous(), blocks.contiguous()
    group = Hq // Hkv if shared else 1
    heads, votes = Hq // group, cdiv(block_q, stride)
    out = torch.empty(B, heads, M, keep, dtype=torch.int32, device=q.device)
    joint = heads // Hkv
    # With three heads or more it is less to score all second halves once than each head's own.
    n_points = 4 if joint > 2 else 2
    step = min(M, max(1, _SEGMENTS // (B * heads * keep)))
    step = cdiv(M, cdiv(M, step))
    segments = B * heads * step * keep
    found = torch.empty(segments, dtype=torch.int64, device=q.device)
    points = torch.empty(segments, dtype=torch.int32, device=q.device)
    scores = torch.empty(n_points * segments, dtype=torch.float32, device=q.device)
    BD, rows = max(16, next_power_of_2(D)), next_power_of_2(group * votes)
    # Heads whose first scores are computed together: 16 to 128 rows of them.
    together = max(min(next_power_of_2(joint), 128 // rows), cdiv(16, rows))
    options: dict[str, Any] = {
        "D": D, "BD": BD, "BLOCK_Q": block_q, "VOTES": votes, "STRIDE": stride, "GROUP": group,
        "BLOCK_K": block_k, "K": keep, "POINTS": n_points,
        "INDEX": tl.int32 if k.shape[2] * k.stride(2) < 1 << 31 else tl.int64,
    }  # fmt: skip

    def cut(tile: Tile) -> dict[str, int]:
        # No more keys than there are to score, and whole blocks of them.
        BT = max(16, block_k, min(next_power_of_2(keep * block_k), tile.keys))
        return {"BT": BT, "num_warps": tile.warps, "num_stages": tile.stages}

    opening = cut(opening or preferred(q, BD, together * rows, OPENING))
    search = cut(tile or preferred(q, BD, max(16, rows), WIDE if B * heads * M < FEW else TILES))
    for start in range(0, M, step):
        here = min(step, M - start)
        _first_kernel[(here, Hkv * cdiv(joint, together), B)](
            q, k, first, blocks, scores, *q.stride()[:3], *k.stride()[:3], M, Hq, Hkv, Nq, start, joint,
            ROWS=rows, JOINT=together, **options, **opening,
        )  # fmt: skip
        _search_kernel[(here, heads, B)](
            q, k, first, blocks, out, found, points, scores, *q.stride()[:3], *k.stride()[:3], M,
            Hq, Hkv, Nq, M, start, BQ=max(16, rows), BK=next_power_of_2(keep), **options, **search,
        )  # fmt: skip
    return out


def preferred(q: Tensor, BD: int, BQ: int, table: dict[int, Tile]) -> Tile:
    """The tile for these queries, of which BQ score together."""
    tile = table[max(BD, 64)]
    return replace(tile, keys=tile.keys // 2) if q.dtype == torch.float32 or BQ > 64 else tile
