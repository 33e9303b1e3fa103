"""Block-sparse attention in Triton: one program per query tile and head walks its list of key blocks.

A list is ascending, so the blocks that need the causal mask stand at its end: the main loop runs
without masks. The next block's index is loaded one step ahead, so that the loads of keys and values,
which depend on it, can be pipelined. Programs of one head run side by side (its keys and values stay
in the L2 cache), the longest lists first (no straggler at the end).
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparseland.ops._rows import rows_from
from sparseland.patterns import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Sizes that change from call to call: compiling again where one happens to divide by 16 would gain nothing.
UNSPECIALIZED = (
    "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_im", "stride_ob", "stride_oh",
    "H", "G", "Nq", "Nk", "Mq", "Mk", "offset", "probes",
)  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: query rows and key rows of a tile, warps, stages of the load pipeline.

    ``tma``: load keys and values through tensor descriptors (the copy engine of Hopper and newer).
    """

    BM: int
    BN: int
    warps: int
    stages: int
    tma: bool = False


# Preferred first; the first that fits the device's shared memory is used. Keys: padded head dimension.
FORWARD = {
    64: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
    128: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
    256: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
}
# fp32 products use no tensor cores here (they would round to tf32), and larger tiles only spill registers.
FULL_PRECISION = (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1))


@triton.jit
def next_tile(indices, step, steps, SUB: tl.constexpr, BS: tl.constexpr, ROWS: tl.constexpr):
    """First row of the tile of this step (0 behind the last step, where it is not used)."""
    block = tl.load(indices + step // SUB, mask=step < steps, other=0)
    return block * BS + (step % SUB) * ROWS


@triton.jit
def rows_of(x, base, stride, N, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr):
    """What ``rows_from`` reads from: the pointer, or a tensor descriptor of [N, D]."""
    x += base
    if TMA:
        x = tl.make_tensor_descriptor(x, [N, D], [stride, 1], [ROWS, BD])
    return x


@triton.jit
def _attend(
    acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, indices, start, stop, position, Nk, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles of steps [start, stop)."""
    SUB: tl.constexpr = BS // BN
    i_n = tl.arange(0, BN)
    n0 = next_tile(indices, start, stop, SUB, BS, BN)
    for step in range(start, stop):
        b_k = rows_from(k, n0, stride_kn, Nk, D, BD, TMA, BN, MASKED)
        b_v = rows_from(v, n0, stride_vn, Nk, D, BD, TMA, BN, MASKED)
        following = next_tile(indices, step + 1, stop, SUB, BS, BN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            b_s = tl.where(position[:, None] >= (n0 + i_n)[None, :], b_s, float("-inf"))
            b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
            # A row that has seen nothing yet: exp2(-inf - 0) = 0 where exp2(-inf + inf) is NaN.
            b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        else:
            b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
            b_shift = b_max
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_alpha = tl.exp2(b_m - b_shift)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * b_alpha[:, None], input_precision="ieee")
        b_m = b_max
        n0 = following
    return acc, b_m, b_l


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k, v, out, lse, counts, indices, order,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_im,
    H, G, Nq, Nk, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NEED_LSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # Query tiles run fastest: programs that are alive together share one head's keys and values.
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_hk = i_h // G
    i_block = tl.load(order + i_b * stride_cb + i_h * stride_ch + i_t // (BS // BM))
    m0 = i_block * BS + i_t % (BS // BM) * BM
    if m0 >= Nq:
        return

    i_m = m0 + tl.arange(0, BM)
    i_d = tl.arange(0, BD)
    q += i_b * stride_qb + i_h.to(tl.int64) * stride_qh
    b_q = rows_from(q, m0, stride_qn, Nq, D, BD, False, BM, True)
    k = rows_of(k, i_b * stride_kb + i_hk.to(tl.int64) * stride_kh, stride_kn, Nk, D, BD, TMA, BN)
    v = rows_of(v, i_b * stride_vb + i_hk.to(tl.int64) * stride_vh, stride_vn, Nk, D, BD, TMA, BN)

    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_block)
    indices += i_b * stride_ib + i_h.to(tl.int64) * stride_ih + i_block.to(tl.int64) * stride_im
    # Blocks before `visible` are wholly visible to every row of the tile; the others end the list.
    first = m0 + Nk - Nq
    visible = (first + 1) // BS
    whole = count
    while tl.load(indices + whole - 1, mask=whole > 0, other=-1) >= visible:
        whole -= 1

    acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    position = first + tl.arange(0, BM)
    SUB: tl.constexpr = BS // BN
    acc, b_m, b_l = _attend(
        acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, indices, 0, whole * SUB, position, Nk, scale_log2,
        D, BD, BS, BN, False, TMA,
    )  # fmt: skip
    acc, b_m, b_l = _attend(
        acc, b_m, b_l, b_q, k, v, stride_kn, stride_vn, indices, whole * SUB, count * SUB, position, Nk,
        scale_log2, D, BD, BS, BN, True, TMA,
    )  # fmt: skip

    # Not "b_l > 0": a query or key that is NaN must show.
    unseen = b_l == 0.0
    b_l = tl.where(unseen, 1.0, b_l)
    b_o = acc / b_l[:, None]
    i_row = (i_b * H + i_h) * Nq + m0
    out += i_row * D + tl.arange(0, BM)[:, None] * D + i_d[None, :]
    tl.store(out, b_o.to(out.dtype.element_ty), mask=(i_m < Nq)[:, None] & (i_d < D)[None, :])
    if NEED_LSE:
        b_lse = tl.where(unseen, float("-inf"), (b_m + tl.log2(b_l)) * LN2)
        tl.store(lse + i_row + tl.arange(0, BM), b_lse, mask=i_m < Nq)


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    block_size: int,
    scale: float,
    need_lse: bool = True,
    tiles: tuple[Tile, ...] | None = None,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp (an empty tensor unless ``need_lse``); ``tiles`` replaces the table above."""
    B, H, Nq, D = q.shape
    Nk, Mq = k.shape[2], counts.shape[2]
    q, k, v, indices = (last_dim_dense(t) for t in (q, k, v, indices))
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H, Nq) if need_lse else (0,), dtype=torch.float32)
    order = longest_first(counts).expand(B, H, Mq)
    counts, indices = counts.contiguous().expand(B, H, -1), indices.expand(B, H, -1, -1)
    BD = padded(D)

    def launch(tile: Tile) -> None:
        grid = (Mq * (block_size // tile.BM), H, B)
        _forward_kernel[grid](
            q, k, v, out, lse, counts, indices, order, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *counts.stride()[:2], *indices.stride()[:3], H, H // k.shape[1], Nq, Nk, scale * LOG2E.value,
            D, BD, block_size, tile.BM, tile.BN, need_lse, tile.tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    first_fitting(("forward", D, block_size, q.dtype), tiles or preferred(FORWARD, q), block_size, q, launch)
    return out, lse


# ---------------------------------------------------------------- shared with the backward kernels


def padded(D: int) -> int:
    """The head dimension as the tiles have it."""
    return max(next_power_of_2(D), 16)


def preferred(table: dict[int, tuple[Tile, ...]], q: Tensor) -> tuple[Tile, ...]:
    """The tiles to try for these queries, the best first."""
    return FULL_PRECISION if q.dtype == torch.float32 else table[max(padded(q.shape[3]), 64)]


def last_dim_dense(x: Tensor) -> Tensor:
    """Kernels take any strides but want the last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def longest_first(counts: Int[Tensor, "b h M"]) -> Int[Tensor, "b h M"]:
    """Blocks of each head by falling list length (on the device, without waiting for it)."""
    return counts.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


_FITTING: dict[tuple[object, ...], Tile] = {}


def first_fitting(
    key: tuple[object, ...],
    tiles: tuple[Tile, ...],
    block_size: int,
    x: Tensor,
    launch: Callable[[Tile], None],
) -> None:
    """Launch with the first tile that fits the device's shared memory, and remember which it was.

    Tiles are never larger than a block.
    """
    if any(tile.tma for tile in tiles):
        triton.set_allocator(_workspace)
    key = (*key, tiles, x.device)
    if key in _FITTING:
        launch(_FITTING[key])
        return
    for number, tile in enumerate(tiles):
        if max(tile.BM, tile.BN) > block_size:
            tile = replace(tile, BM=min(tile.BM, block_size), BN=min(tile.BN, block_size), warps=4)
        try:
            launch(tile)
        except OutOfResources:
            if number == len(tiles) - 1:
                raise
            continue
        _FITTING[key] = tile
        return


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for the tensor descriptors that programs make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
