"""The beam search in Triton: one program per query block and head goes through all stages.

A program keeps its segments (start, size, scores of both halves' representatives) in a few KB of global
memory that stay in the L1 cache: registers can't be indexed, and a stage gathers by them. A stage scores the
second halves in tiles of representatives on the tensor cores, finds the K-th largest of the 2K scores by
bisection over their bits, and compacts the halves above it in order, so the result needs no sorting. Loads
are not pipelined: a multiprocessor holds enough programs to hide them.
"""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv

# Segments of all programs of a launch; 16 bytes of working memory each.
_SEGMENTS = 1 << 24


@dataclass(frozen=True)
class Tile:
    """How a program is cut: keys that are scored together, and warps."""

    keys: int
    warps: int


# By padded head dimension; large tiles of scores (many queries) or of keys take half as many keys.
TILES = {64: Tile(128, 4), 128: Tile(128, 4), 256: Tile(64, 4)}

LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST_BITS = tl.constexpr(-2147483648)


@triton.jit
def _score(
    b_q, b_votes, k, first, starts, sizes, scores, stride_kn, D, lane: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Scores of all segments by their first block (lane 0), or by their second half's (lane 1)."""
    REPS: tl.constexpr = BT // BLOCK_K
    i_t = tl.arange(0, BT)
    i_d = tl.arange(0, BD)
    for r0 in range(0, K, REPS):
        i_s = r0 + i_t // BLOCK_K
        b_block = tl.load(starts + i_s, mask=i_s < K, other=0)
        if lane == 1:
            b_block += tl.load(sizes + i_s, mask=i_s < K, other=0) // 2
        b_key = (first + b_block * BLOCK_K + i_t % BLOCK_K).to(tl.int64)
        b_load = (i_s < K)[:, None] & (i_d < D)[None, :]
        b_k = tl.load(k + b_key[:, None] * stride_kn + i_d[None, :], mask=b_load, other=0.0)
        b_s = tl.dot(b_k, b_q, input_precision="ieee")  # [BT, rows]
        b_s = tl.where(b_votes[None, :] & (b_s == b_s), b_s, float("-inf"))
        b_score = tl.max(tl.reshape(tl.max(b_s, 1), [REPS, BLOCK_K]), 1)
        # Finite: only a half that holds nothing may be the lowest of all.
        b_score = tl.minimum(tl.maximum(b_score, -LARGEST), LARGEST)
        i_r = r0 + tl.arange(0, REPS)
        tl.store(scores + 2 * i_r + lane, b_score, mask=i_r < K)


@triton.jit
def _ordered(b_score, b_valid):
    """Bits that compare as integers as the scores do; the lowest number where not valid."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_valid, b_bits, LOWEST_BITS)


@triton.jit
def _keep_best(first_key, second_key, K: tl.constexpr):
    """Which of two lists of keys are among the K largest of both, ties in order (first, second, first, …)."""
    # The K-th largest lies in [low, high]; at least K are low or more.
    low = tl.minimum(tl.min(first_key, 0), tl.min(second_key, 0)).to(tl.int64)
    high = tl.maximum(tl.max(first_key, 0), tl.max(second_key, 0)).to(tl.int64)
    found = 0
    while (low < high) & (found != K):
        middle = low + (high - low + 1) // 2
        above = (first_key >= middle).to(tl.int32) + (second_key >= middle).to(tl.int32)
        found = tl.sum(above, 0)
        if found >= K:
            low = middle
        else:
            high = middle - 1
    first_above, second_above = (first_key > low).to(tl.int32), (second_key > low).to(tl.int32)
    first_tie, second_tie = (first_key == low).to(tl.int32), (second_key == low).to(tl.int32)
    wanted = K - tl.sum(first_above + second_above, 0)
    ties = first_tie + second_tie
    before = tl.cumsum(ties, 0) - ties
    keep_first = first_above + first_tie * (before < wanted).to(tl.int32)
    keep_second = second_above + second_tie * (before + first_tie < wanted).to(tl.int32)
    return keep_first, keep_second


@triton.jit(do_not_specialize=["Nq", "M", "m_start", "Hq", "Hkv", "stride_fb"])
def _search_kernel(
    q, k, first, blocks, out, starts, sizes, scores,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_fb,
    Hq, Hkv, Nq, M, m_start,
    D: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr, VOTES: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, BQ: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr,
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
    i_s = tl.arange(0, BK)
    if B <= K:
        tl.store(out + i_s, tl.where(i_s < B, origin + i_s * BLOCK_K, 0), mask=i_s < K)
        return

    work = ((i_b * heads + i_h).to(tl.int64) * tl.num_programs(0) + i_p) * K
    starts += work
    sizes += work
    scores += 2 * work
    i_r = tl.arange(0, BQ)
    i_row = i_m * BLOCK_Q + i_r % VOTES * STRIDE
    b_votes = (i_r < GROUP * VOTES) & (i_row < Nq)
    i_head = (i_h * GROUP + tl.minimum(i_r // VOTES, GROUP - 1)).to(tl.int64)
    i_d = tl.arange(0, BD)
    q += i_b.to(tl.int64) * stride_qb
    p_q = q + (i_head * stride_qh + i_row.to(tl.int64) * stride_qn)[:, None] + i_d[None, :]
    b_q = tl.trans(tl.load(p_q, mask=b_votes[:, None] & (i_d < D)[None, :], other=0.0))  # [BD, BQ]
    k += i_b.to(tl.int64) * stride_kb + (i_h // (heads // Hkv)).to(tl.int64) * stride_kh

    b_edge = (i_s.to(tl.int64) * B // K).to(tl.int32)
    b_next = ((i_s + 1).to(tl.int64) * B // K).to(tl.int32)
    lanes = i_s < K
    tl.store(starts + i_s, b_edge, mask=lanes)
    tl.store(sizes + i_s, b_next - b_edge, mask=lanes)
    tl.debug_barrier()
    _score(b_q, b_votes, k, origin, starts, sizes, scores, stride_kn, D, 0, K, BLOCK_K, BD, BT)
    reach = K
    while reach < B:
        _score(b_q, b_votes, k, origin, starts, sizes, scores, stride_kn, D, 1, K, BLOCK_K, BD, BT)
        tl.debug_barrier()
        b_start = tl.load(starts + i_s, mask=lanes, other=0)
        b_size = tl.load(sizes + i_s, mask=lanes, other=0)
        b_first = tl.load(scores + 2 * i_s, mask=lanes, other=0.0)
        b_second = tl.load(scores + 2 * i_s + 1, mask=lanes, other=0.0)
        b_half = b_size // 2
        # A single block stays whole, as the second of its halves.
        keep_first, keep_second = _keep_best(
            _ordered(b_first, lanes & (b_half > 0)), _ordered(b_second, lanes), K
        )
        both = keep_first + keep_second
        b_place = tl.cumsum(both, 0) - both
        tl.debug_barrier()
        first_on, second_on = keep_first > 0, keep_second > 0
        tl.store(starts + b_place, b_start, mask=first_on)
        tl.store(sizes + b_place, b_half, mask=first_on)
        tl.store(scores + 2 * b_place, b_first, mask=first_on)
        b_place += keep_first
        tl.store(starts + b_place, b_start + b_half, mask=second_on)
        tl.store(sizes + b_place, b_size - b_half, mask=second_on)
        tl.store(scores + 2 * b_place, b_second, mask=second_on)
        tl.debug_barrier()
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
) -> Int[Tensor, "B H M n"]:
    """See :func:`sparseland.ops.tree_search.tree_search`; positions only. Deterministic.

    ``tile`` replaces the table's.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, Hq, Nq, D = q.shape
    Hkv, M = k.shape[1], first.shape[1]
    # `expand` makes rows that share their numbers; the kernel takes one stride for both.
    first, blocks = first.contiguous(), blocks.contiguous()
    group = Hq // Hkv if shared else 1
    heads, votes = Hq // group, cdiv(block_q, stride)
    out = torch.empty(B, heads, M, keep, dtype=torch.int32, device=q.device)
    step = min(M, max(1, _SEGMENTS // (B * heads * keep)))
    segments = B * heads * step * keep
    starts, sizes = (torch.empty(segments, dtype=torch.int32, device=q.device) for _ in range(2))
    scores = torch.empty(2 * segments, dtype=torch.float32, device=q.device)
    BD, BQ = max(16, triton.next_power_of_2(D)), max(16, triton.next_power_of_2(group * votes))
    tile = tile or preferred(q, BD, BQ)
    # No more keys than there are to score, and whole blocks of them.
    BT = max(16, block_k, min(triton.next_power_of_2(keep * block_k), tile.keys))
    for start in range(0, M, step):
        _search_kernel[(min(step, M - start), heads, B)](
            q, k, first, blocks, out, starts, sizes, scores, *q.stride()[:3], *k.stride()[:3], M,
            Hq, Hkv, Nq, M, start,
            D=D, BD=BD, BLOCK_Q=block_q, VOTES=votes, STRIDE=stride, GROUP=group, BQ=BQ, BLOCK_K=block_k,
            K=keep, BK=triton.next_power_of_2(keep), BT=BT, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    return out


def preferred(q: Tensor, BD: int, BQ: int) -> Tile:
    """The tile for these queries, of which BQ score together."""
    tile = TILES[max(BD, 64)]
    return Tile(tile.keys // 2, tile.warps) if q.dtype == torch.float32 or BQ > 64 else tile
