"""Per-token block lists in Triton: one program per tile of tokens and list, a group's heads as its rows.

Row ``r`` of a tile is token ``r // G`` and head ``r % G`` of the group. A program walks the blocks that all
its tokens have in their window, then those at the window's two ends under a mask, then the union of the
tokens' lists, whose words say which rows see a block. After the second walk every row has seen its own
key, so the third, usually the longest, needs no care for empty rows. The next block's index and word are
loaded one step ahead, so that the loads of keys and values can be pipelined.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops._rows import rows_at
from sparseland.ops.block_sparse_attention.triton import (
    LN2,
    LOG2E,
    Tile,
    first_fitting,
    last_dim_dense,
    longest_first,
    padded,
)
from sparseland.patterns import next_power_of_2

# Sizes that change from call to call: compiling again where one happens to divide by 16 would gain nothing.
UNSPECIALIZED = (
    "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_im", "H", "Nq", "Nk", "Np", "T", "offset",
    "window", "probes",
)  # fmt: skip

# How many rows a tile has is the pattern's choice; a cut is keys per step, warps, stages of the pipeline.
cut = partial(Tile, 16)
# Preferred first; the first that fits the device's shared memory is used. Keys: padded head dimension.
FORWARD = {
    64: (cut(64, 4, 2), cut(64, 8, 2), cut(32, 4, 2), cut(16, 4, 1)),
    128: (cut(64, 8, 3), cut(64, 8, 2), cut(32, 8, 2), cut(16, 4, 1)),
    256: (cut(32, 8, 2), cut(32, 8, 1), cut(16, 8, 1)),
}
# fp32 products use no tensor cores here (they would round to tf32), and larger tiles only spill registers.
FULL_PRECISION = (cut(32, 8, 1), cut(16, 8, 1))

WHOLE = tl.constexpr(0)  # every row sees every key of the block
WINDOW = tl.constexpr(1)  # the window begins or ends in the block, for some rows
LISTED = tl.constexpr(2)  # rows whose bit is set see all of the block


@triton.jit
def tile_rows(i_t, Nq, TILE: tl.constexpr, G: tl.constexpr, BM: tl.constexpr):
    """Of each row: its token in the tile, its head in the group, its token, and whether it exists."""
    i_r = tl.arange(0, BM)
    i_token = tl.minimum(i_r // G, TILE - 1)  # a shift by 32 or more would be undefined
    i_q = i_t * TILE + i_token
    return i_token, i_r % G, tl.minimum(i_q, Nq - 1), (i_r < TILE * G) & (i_q < Nq)


@triton.jit
def window_blocks(i_t, Nq, offset, window, TILE: tl.constexpr, BS: tl.constexpr):
    """The tile's window: [start, lead) and [first, last] need a mask, [lead, first) is whole."""
    first = (i_t * TILE + offset) // BS
    last = (tl.minimum(i_t * TILE + TILE, Nq) - 1 + offset) // BS
    start = tl.maximum(first - window + 1, 0)
    lead = tl.maximum(tl.minimum(last - window + 1, first), start)
    return start, lead, first, last


@triton.jit
def block_at(step, base, skip, turn, indices, members, MODE: tl.constexpr):
    """The block of a step, and its word (LISTED). The window's masked blocks lie in two runs."""
    if MODE == 2:
        block = tl.load(indices + step)
        word = tl.load(members + step)
    elif MODE == 1:
        block = base + step + tl.where(step < turn, 0, skip)
        word = block * 0
    else:
        block = base + step
        word = block * 0
    return block, word


@triton.jit
def row_sees(position, i_k, b_bit, window, BS: tl.constexpr, MODE: tl.constexpr):
    """Which rows see which keys; the three come with a dimension for rows and one for keys."""
    if MODE == 2:
        seen = (b_bit != 0) & (i_k >= 0)
    else:
        seen = (i_k // BS > position // BS - window) & (i_k <= position)
    return seen


@triton.jit
def _attend(
    acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, indices, members, base, skip, turn, count, i_token,
    position, window, Nk, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Online softmax over ``count`` blocks."""
    SUB: tl.constexpr = BS // BN
    i_n = tl.arange(0, BN)
    steps = count * SUB
    block, word = block_at(0, base, skip, turn, indices, members, MODE)
    for step in range(0, steps):
        i_k = block * BS + (step % SUB) * BN + i_n
        b_k = rows_at(k, i_k, stride_kn, Nk, D, BD, True, MODE == 1)
        b_v = rows_at(v, i_k, stride_vn, Nk, D, BD, True, MODE == 1)
        b_bit = (word >> i_token) & 1
        # One step ahead; behind the last step the first block stands in.
        ahead = tl.where(step + 1 < steps, (step + 1) // SUB, 0)
        block, word = block_at(ahead, base, skip, turn, indices, members, MODE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MODE != 0:
            b_seen = row_sees(position[:, None], i_k[None, :], b_bit[:, None], window, BS, MODE)
            b_s = tl.where(b_seen, b_s, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
        b_shift = b_max
        if MODE == 1:
            # A row that has seen nothing yet: exp2(-inf - 0) = 0 where exp2(-inf + inf) is NaN.
            b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_alpha = tl.exp2(b_m - b_shift)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * b_alpha[:, None], input_precision="ieee")
        b_m = b_max
    return acc, b_m, b_l


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k, v, out, lse, counts, indices, members, order,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_im,
    H, Nq, Nk, window, scale_log2,
    LISTS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NEED_LSE: tl.constexpr,
):  # fmt: skip
    # Tiles run fastest: programs that are alive together share one head's keys and values.
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_t = tl.load(order + i_b * stride_cb + i_h * stride_ch + tl.program_id(0))
    offset = Nk - Nq
    i_token, i_g, i_q, live = tile_rows(i_t, Nq, TILE, G, BM)
    position = i_q + offset
    i_d = tl.arange(0, BD)
    inside = live[:, None] & (i_d < D)[None, :]
    i_head = i_h * G + i_g
    q += i_b * stride_qb + i_head[:, None] * stride_qh + i_q.to(tl.int64)[:, None] * stride_qn + i_d[None, :]
    b_q = tl.load(q, mask=inside, other=0.0)
    k += i_b * stride_kb + (i_h // LISTS) * stride_kh
    v += i_b * stride_vb + (i_h // LISTS) * stride_vh

    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_t)
    i_list = i_b * stride_ib + i_h * stride_ih + i_t.to(tl.int64) * stride_im
    indices += i_list
    members += i_list
    start, lead, first, last = window_blocks(i_t, Nq, offset, window, TILE, BS)

    acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    acc, b_m, b_l = _attend(
        acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, indices, members, lead, 0, 0, first - lead, i_token,
        position, window, Nk, scale_log2, D, BD, BS, BN, WHOLE,
    )  # fmt: skip
    acc, b_m, b_l = _attend(
        acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, indices, members, start, first - lead, lead - start,
        lead - start + last - first + 1, i_token, position, window, Nk, scale_log2, D, BD, BS, BN, WINDOW,
    )  # fmt: skip
    acc, b_m, b_l = _attend(
        acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, indices, members, 0, 0, 0, count, i_token,
        position, window, Nk, scale_log2, D, BD, BS, BN, LISTED,
    )  # fmt: skip

    i_row = (i_b * H + i_head) * Nq + i_q
    tl.store(
        out + i_row[:, None] * D + i_d[None, :], (acc / b_l[:, None]).to(out.dtype.element_ty), mask=inside
    )
    if NEED_LSE:
        tl.store(lse + i_row, (b_m + tl.log2(b_l)) * LN2, mask=live)


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    counts: Int[Tensor, "b Hl T"],
    indices: Int[Tensor, "b Hl T L"],
    members: Int[Tensor, "b Hl T L"],
    block_size: int,
    window: int,
    tile: int,
    scale: float,
    need_lse: bool = True,
    cuts: tuple[Tile, ...] | None = None,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp (an empty tensor unless ``need_lse``); ``cuts`` replaces the table above."""
    B, H, Nq, D = q.shape
    Hl, T = counts.shape[1:]
    q, k, v = (last_dim_dense(t) for t in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H, Nq) if need_lse else (0,), dtype=torch.float32)
    order, counts, indices, members = lists_of(B, counts, indices, members)
    G, BD = H // Hl, padded(D)
    BM = rows_of_tile(tile, G)

    def launch(cut: Tile) -> None:
        _forward_kernel[(T, Hl, B)](
            q, k, v, out, lse, counts, indices, members, order, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], *counts.stride()[:2], *indices.stride()[:3], H, Nq, k.shape[2], window,
            scale * LOG2E.value, Hl // k.shape[1], G, tile, D, BD, block_size, BM, cut.BN, need_lse,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    key = ("token blocks", D, block_size, BM, q.dtype)
    first_fitting(key, cuts or preferred(FORWARD, q), block_size, q, launch)
    return out, lse


# ---------------------------------------------------------------- shared with the backward kernels


def preferred(table: dict[int, tuple[Tile, ...]], q: Tensor) -> tuple[Tile, ...]:
    """The cuts to try for these queries, the best first."""
    return FULL_PRECISION if q.dtype == torch.float32 else table[max(padded(q.shape[3]), 64)]


def rows_of_tile(tile: int, group: int) -> int:
    """Rows of a kernel's tile: tokens times heads, as the tensor cores take them."""
    return max(16, next_power_of_2(tile * group))


def lists_of(
    batch: int,
    counts: Int[Tensor, "b Hl T"],
    indices: Int[Tensor, "b Hl T L"],
    members: Int[Tensor, "b Hl T L"],
) -> tuple[Tensor, ...]:
    """Tiles by falling list length, and the lists, expanded to the batch; one set of strides for all."""
    order = longest_first(counts).expand(batch, -1, -1)
    counts = counts.contiguous().expand(batch, -1, -1)
    if not indices.shape[3]:  # nothing is listed, but a pointer must point somewhere
        indices, members = (t.new_zeros(*t.shape[:3], 1) for t in (indices, members))
    indices, members = (t.contiguous().expand(batch, -1, -1, -1) for t in (indices, members))
    return order, counts, indices, members
