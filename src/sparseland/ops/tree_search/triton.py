"""The beam search in Triton: one program per query block and head goes through all stages.

Where the segments lie at first depends on the query block alone, so that all heads that share keys look at
the same blocks then: one kernel scores these for all of them with one load of the keys, a second searches on.

A program keeps its segments (start, size, what to score next, scores of both halves' representatives) in a
few KB of global memory: registers can't be indexed, and a stage gathers by them. A stage scores the second
halves in tiles of representatives on the tensor cores, finds the K-th largest of the 2K scores by a search
over their bits, and compacts the halves above it in order, so the result needs no sorting.
"""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv

# Segments of all programs of a launch; up to 28 bytes of working memory each.
_SEGMENTS = 3 << 22


@dataclass(frozen=True)
class Tile:
    """How a program is cut: keys that are scored together, warps, and stages of their loads."""

    keys: int
    warps: int
    stages: int = 1


# By padded head dimension; large tiles of scores (many queries) or of keys take half as many keys.
TILES = {64: Tile(128, 4), 128: Tile(128, 4), 256: Tile(64, 4)}
# The same for the first scores, where addresses are computed, not loaded.
OPENING = {64: Tile(64, 4, 3), 128: Tile(64, 4, 3), 256: Tile(32, 4, 2)}

LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST_BITS = tl.constexpr(-2147483648)
HIGHEST_BITS = tl.constexpr(2147483647)


@triton.jit
def _score(
    b_q, b_votes, k, b_key, b_load, stride_kn,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Scores [BT / BLOCK_K, HEADS] of the blocks whose keys ``b_key [BT]`` are, by the columns of ``b_q``."""
    ROWS: tl.constexpr = b_q.shape[1] // HEADS
    i_d = tl.arange(0, BD)
    b_load = b_load[:, None] if D == BD else b_load[:, None] & (i_d < D)[None, :]
    b_k = tl.load(k + b_key.to(tl.int64)[:, None] * stride_kn + i_d[None, :], mask=b_load, other=0.0)
    b_s = tl.dot(b_k, b_q, input_precision="ieee")
    b_s = tl.where(b_votes[None, :] & (b_s == b_s), b_s, float("-inf"))
    b_score = tl.max(tl.reshape(b_s, (BT, HEADS, ROWS)), 2)
    b_score = tl.max(tl.reshape(b_score, (BT // BLOCK_K, BLOCK_K, HEADS)), 1)
    # Finite: only a half that holds nothing may be the lowest of all.
    return tl.minimum(tl.maximum(b_score, -LARGEST), LARGEST)


@triton.jit
def _ordered(b_score, b_valid):
    """Bits that compare as integers as the scores do; the lowest number where not valid."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_valid, b_bits, LOWEST_BITS)


@triton.jit
def _keep_best(first_key, second_key, lanes, K: tl.constexpr):
    """Which of two lists of keys are among the K largest of both, ties in order (first, second, first, …)."""
    # The K-th largest lies in [low, high]: each of the K pairs has a key of `low` or more.
    larger = tl.maximum(first_key, second_key)
    low = tl.min(tl.where(lanes, larger, HIGHEST_BITS), 0).to(tl.int64)
    high = tl.max(larger, 0).to(tl.int64)
    # Three cuts at a time, their counts packed in one number: a sum over the warps is what takes long.
    WIDTH: tl.constexpr = 10 if K < 512 else 20
    PACKED: tl.constexpr = tl.int32 if K < 512 else tl.int64
    MASK: tl.constexpr = (1 << WIDTH) - 1
    found = 0
    while (low < high) & (found != K):
        span = high - low
        cut_1, cut_2, cut_3 = low + (span + 3) // 4, low + (span + 1) // 2, low + (3 * span + 3) // 4
        least_1, least_2, least_3 = cut_1.to(tl.int32), cut_2.to(tl.int32), cut_3.to(tl.int32)
        packed = (first_key >= least_1).to(PACKED) + (second_key >= least_1).to(PACKED)
        packed += ((first_key >= least_2).to(PACKED) + (second_key >= least_2).to(PACKED)) << WIDTH
        packed += ((first_key >= least_3).to(PACKED) + (second_key >= least_3).to(PACKED)) << (2 * WIDTH)
        counts = tl.sum(packed, 0)
        above_1 = (counts & MASK).to(tl.int32)
        above_2 = ((counts >> WIDTH) & MASK).to(tl.int32)
        above_3 = ((counts >> (2 * WIDTH)) & MASK).to(tl.int32)
        if above_3 >= K:
            low, found = cut_3, above_3
        elif above_2 >= K:
            low, high, found = cut_2, cut_3 - 1, above_2
        elif above_1 >= K:
            low, high, found = cut_1, cut_2 - 1, above_1
        else:
            high = cut_1 - 1
    threshold = low.to(tl.int32)
    first_above, second_above = (first_key > threshold).to(tl.int32), (second_key > threshold).to(tl.int32)
    first_tie, second_tie = (first_key == threshold).to(tl.int32), (second_key == threshold).to(tl.int32)
    wanted = K - tl.sum(first_above + second_above, 0)
    ties = first_tie + second_tie
    before = tl.cumsum(ties, 0) - ties
    keep_first = first_above + first_tie * (before < wanted).to(tl.int32)
    keep_second = second_above + second_tie * (before + first_tie < wanted).to(tl.int32)
    return keep_first, keep_second


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
    BT: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks that every search of a query block looks at, for JOINT of a key head's J searches.

    Point 0 of a segment is its first block, point 1 its second half's, points 2 and 3 those of the second
    halves of both halves.
    """
    i_p = tl.num_programs(0) - 1 - tl.program_id(0)
    i_y, i_b = tl.program_id(1), tl.program_id(2)
    point = i_y % POINTS
    parts = (J + JOINT - 1) // JOINT
    i_kv, j_start = i_y // POINTS // parts, i_y // POINTS % parts * JOINT
    i_m = m_start + i_p
    origin = tl.load(first + i_b * stride_fb + i_m)
    B = tl.load(blocks + i_b * stride_fb + i_m)
    if B <= K:
        return
    i_r = tl.arange(0, JOINT * ROWS)
    i_j, i_vote = j_start + i_r // ROWS, i_r % ROWS
    i_row = i_m * BLOCK_Q + i_vote % VOTES * STRIDE
    b_votes = (i_j < J) & (i_vote < GROUP * VOTES) & (i_row < Nq)
    i_head = ((i_kv * J + tl.minimum(i_j, J - 1)) * GROUP + tl.minimum(i_vote // VOTES, GROUP - 1)).to(
        tl.int64
    )
    i_d = tl.arange(0, BD)
    q += i_b.to(tl.int64) * stride_qb
    p_q = q + (i_head * stride_qh + i_row.to(tl.int64) * stride_qn)[:, None] + i_d[None, :]
    b_q = tl.trans(tl.load(p_q, mask=b_votes[:, None] & (i_d < D)[None, :], other=0.0))
    k += i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh

    REPS: tl.constexpr = BT // BLOCK_K
    i_t = tl.arange(0, BT)
    i_search = j_start + tl.arange(0, JOINT)
    i_work = ((i_b * Hkv + i_kv) * J + i_search).to(tl.int64) * tl.num_programs(0) + i_p
    p_out = scores + (i_work * POINTS + point) * K
    for r0 in range(0, K, REPS):
        i_s = r0 + i_t // BLOCK_K
        b_block, b_size = _segment(i_s, B, K)
        b_half = b_size // 2
        b_block += tl.where(point % 2 == 1, b_half, 0)
        if POINTS > 2:
            b_block += tl.where(point < 2, 0, tl.where(point == 3, b_size - b_half, b_half) // 2)
        b_key = origin + b_block * BLOCK_K + i_t % BLOCK_K
        b_score = _score(b_q, b_votes, k, b_key, i_s < K, stride_kn, JOINT, BLOCK_K, D, BD, BT)
        i_o = r0 + tl.arange(0, REPS)
        tl.store(p_out[None, :] + i_o[:, None], b_score, mask=(i_o < K)[:, None] & (i_search < J)[None, :])


@triton.jit
def _split(
    starts, sizes, points, scores, i_s, lanes, b_start, b_size, b_first, b_second, b_third, b_fourth,
    K: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """One stage: the K best halves become the segments; CARRY: their second halves' scores are known."""
    b_half = b_size // 2
    # A single block stays whole, as the second of its halves.
    keep_first, keep_second = _keep_best(
        _ordered(b_first, lanes & (b_half > 0)), _ordered(b_second, lanes), lanes, K
    )
    both = keep_first + keep_second
    b_place = tl.cumsum(both, 0) - both
    tl.debug_barrier()
    first_on, second_on = keep_first > 0, keep_second > 0
    tl.store(starts + b_place, b_start, mask=first_on)
    tl.store(sizes + b_place, b_half, mask=first_on)
    tl.store(points + b_place, b_start + b_half // 2, mask=first_on)
    tl.store(scores + b_place, b_first, mask=first_on)
    if CARRY:
        tl.store(scores + K + b_place, b_third, mask=first_on)
    b_place += keep_first
    b_start += b_half
    b_size -= b_half
    tl.store(starts + b_place, b_start, mask=second_on)
    tl.store(sizes + b_place, b_size, mask=second_on)
    tl.store(points + b_place, b_start + b_size // 2, mask=second_on)
    tl.store(scores + b_place, b_second, mask=second_on)
    if CARRY:
        tl.store(scores + K + b_place, b_fourth, mask=second_on)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["Nq", "M", "m_start", "Hq", "Hkv", "stride_fb"])
def _search_kernel(
    q, k, first, blocks, out, starts, sizes, points, scores,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_fb,
    Hq, Hkv, Nq, M, m_start,
    D: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr, VOTES: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, BQ: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr, POINTS: tl.constexpr,
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
    starts += work
    sizes += work
    points += work
    scores += POINTS * work
    i_r = tl.arange(0, BQ)
    i_row = i_m * BLOCK_Q + i_r % VOTES * STRIDE
    b_votes = (i_r < GROUP * VOTES) & (i_row < Nq)
    i_head = (i_h * GROUP + tl.minimum(i_r // VOTES, GROUP - 1)).to(tl.int64)
    i_d = tl.arange(0, BD)
    q += i_b.to(tl.int64) * stride_qb
    p_q = q + (i_head * stride_qh + i_row.to(tl.int64) * stride_qn)[:, None] + i_d[None, :]
    b_q = tl.trans(tl.load(p_q, mask=b_votes[:, None] & (i_d < D)[None, :], other=0.0))  # [BD, BQ]
    k += i_b.to(tl.int64) * stride_kb + (i_h // (heads // Hkv)).to(tl.int64) * stride_kh

    lanes = i_s < K
    b_start, b_size = _segment(i_s, B, K)
    b_first = tl.load(scores + i_s, mask=lanes, other=0.0)
    b_second = tl.load(scores + K + i_s, mask=lanes, other=0.0)
    b_third = tl.load(scores + 2 * K + i_s, mask=lanes, other=0.0) if POINTS > 2 else b_first
    b_fourth = tl.load(scores + 3 * K + i_s, mask=lanes, other=0.0) if POINTS > 2 else b_second
    _split(
        starts, sizes, points, scores, i_s, lanes, b_start, b_size, b_first, b_second, b_third, b_fourth,
        K, POINTS > 2,
    )  # fmt: skip
    REPS: tl.constexpr = BT // BLOCK_K
    KNOWN: tl.constexpr = 2 * K if POINTS > 2 else 0
    i_t = tl.arange(0, BT)
    reach = 2 * K
    while reach < B:
        if reach > KNOWN:
            for r0 in range(0, K, REPS):
                i_n = r0 + i_t // BLOCK_K
                b_block = tl.load(points + i_n, mask=i_n < K, other=0)
                b_key = origin + b_block * BLOCK_K + i_t % BLOCK_K
                b_score = _score(b_q, b_votes, k, b_key, i_n < K, stride_kn, 1, BLOCK_K, D, BD, BT)
                i_o = r0 + tl.arange(0, REPS)
                tl.store(scores + K + i_o[:, None], b_score, mask=(i_o < K)[:, None])
            tl.debug_barrier()
        b_start = tl.load(starts + i_s, mask=lanes, other=0)
        b_size = tl.load(sizes + i_s, mask=lanes, other=0)
        b_first = tl.load(scores + i_s, mask=lanes, other=0.0)
        b_second = tl.load(scores + K + i_s, mask=lanes, other=0.0)
        _split(
            starts, sizes, points, scores, i_s, lanes, b_start, b_size, b_first, b_second, b_first, b_second,
            K, False,
        )  # fmt: skip
        reach *= 2
    b_start = tl.load(starts + i_s, mask=lanes, other=0)
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
    starts, sizes, points = (torch.empty(segments, dtype=torch.int32, device=q.device) for _ in range(3))
    scores = torch.empty(n_points * segments, dtype=torch.float32, device=q.device)
    BD, rows = max(16, triton.next_power_of_2(D)), triton.next_power_of_2(group * votes)
    # Heads whose first scores are computed together: 16 to 128 rows of them.
    together = max(min(triton.next_power_of_2(joint), 128 // rows), cdiv(16, rows))
    options: dict[str, int] = {
        "D": D, "BD": BD, "BLOCK_Q": block_q, "VOTES": votes, "STRIDE": stride, "GROUP": group,
        "BLOCK_K": block_k, "K": keep, "POINTS": n_points,
    }  # fmt: skip

    def cut(tile: Tile) -> dict[str, int]:
        # No more keys than there are to score, and whole blocks of them.
        BT = max(16, block_k, min(triton.next_power_of_2(keep * block_k), tile.keys))
        return {"BT": BT, "num_warps": tile.warps, "num_stages": tile.stages}

    opening = cut(opening or preferred(q, BD, together * rows, OPENING))
    search = cut(tile or preferred(q, BD, max(16, rows)))
    for start in range(0, M, step):
        here = min(step, M - start)
        _first_kernel[(here, Hkv * cdiv(joint, together) * n_points, B)](
            q, k, first, blocks, scores, *q.stride()[:3], *k.stride()[:3], M, Hq, Hkv, Nq, start, joint,
            ROWS=rows, JOINT=together, **options, **opening,
        )  # fmt: skip
        _search_kernel[(here, heads, B)](
            q, k, first, blocks, out, starts, sizes, points, scores, *q.stride()[:3], *k.stride()[:3], M,
            Hq, Hkv, Nq, M, start, BQ=max(16, rows), BK=triton.next_power_of_2(keep), **options, **search,
        )  # fmt: skip
    return out


def preferred(q: Tensor, BD: int, BQ: int, table: dict[int, Tile] = TILES) -> Tile:
    """The tile for these queries, of which BQ score together."""
    tile = table[max(BD, 64)]
    return replace(tile, keys=tile.keys // 2) if q.dtype == torch.float32 or BQ > 64 else tile
