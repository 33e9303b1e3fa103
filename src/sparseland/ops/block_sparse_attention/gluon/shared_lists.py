"""What two neighbouring query blocks list: both of them, or only one."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from sparseland.patterns import cdiv

# Blocks of a list that are looked at together, by one warp.
_CHUNK = 128


@triton.jit
def _holds(p_list, n, b_block):
    """Whether an ascending list of ``n`` holds these blocks, by halving."""
    b_low = tl.zeros_like(b_block)
    b_high = b_low + n
    left = n
    while left > 0:
        b_middle = (b_low + b_high) // 2
        b_found = tl.load(p_list + b_middle, mask=b_low < b_high, other=0)
        b_after = (b_found < b_block) & (b_low < b_high)
        b_high = tl.where(b_after, b_high, b_middle)
        b_low = tl.where(b_after, b_middle + 1, b_low)
        left //= 2
    return (tl.load(p_list + b_low, mask=b_low < n, other=-1) == b_block).to(tl.int32)


@triton.jit
def _keep(p_blocks, b_block, b_on, done, STEP: tl.constexpr):
    """Appends the blocks that are on; how many there are then."""
    b_place = done + tl.cumsum(b_on, 0) - 1
    tl.store(p_blocks + b_place * STEP, b_block, mask=b_on != 0)
    return done + tl.sum(b_on, 0)


@triton.jit(do_not_specialize=["H", "Mq", "width"])
def _kernel(
    counts, indices, shared_counts, blocks,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_im, H, Mq, width, CHUNK: tl.constexpr,
):  # fmt: skip
    i_g, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (i_b * H + i_h).to(tl.int64) * tl.num_programs(0) + i_g
    i_m = i_g * 2
    counts += i_b * stride_cb + i_h * stride_ch + i_m
    p_first = indices + i_b.to(tl.int64) * stride_ib + i_h.to(tl.int64) * stride_ih
    p_first += i_m.to(tl.int64) * stride_im
    p_second = p_first + stride_im
    blocks += row * 2 * width
    n_first = tl.load(counts)
    n_second = tl.load(counts + 1, mask=i_m + 1 < Mq, other=0)
    both, only_first, only_second = 0, 0, 0
    for start in range(0, n_first, CHUNK):
        i_l = start + tl.arange(0, CHUNK)
        b_block = tl.load(p_first + i_l, mask=i_l < n_first, other=0)
        b_shared = _holds(p_second, n_second, b_block)
        b_in = (i_l < n_first).to(tl.int32)
        both = _keep(blocks, b_block, b_in & b_shared, both, 1)
        only_first = _keep(blocks + width - 1, b_block, b_in & ~b_shared, only_first, -1)
    for start in range(0, n_second, CHUNK):
        i_l = start + tl.arange(0, CHUNK)
        b_block = tl.load(p_second + i_l, mask=i_l < n_second, other=0)
        b_in = (i_l < n_second).to(tl.int32)
        b_in &= ~_holds(p_first, n_first, b_block)
        only_second = _keep(blocks + width, b_block, b_in, only_second, 1)
    tl.store(shared_counts + row * 3, both)
    tl.store(shared_counts + row * 3 + 1, only_first)
    tl.store(shared_counts + row * 3 + 2, only_second)


def share_lists(
    counts: Int[Tensor, "B H Mq"], indices: Int[Tensor, "B H Mq L"]
) -> tuple[Int[Tensor, "B H G 3"], Int[Tensor, "B H G 2 L"]]:
    """For each two query blocks three lists: blocks of both, of the first only, of the second only.

    The first two share a row, as long as the first query block's list together: what is only the first's
    begins at the row's end and goes backwards. What lies behind a list's count is not defined.

    Args:
        counts, indices: as in :class:`~sparseland.patterns.BlockPattern`, ascending.
    """
    counts = counts.contiguous()
    indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    B, H, Mq = counts.shape
    groups, width = cdiv(Mq, 2), indices.shape[3]
    shared_counts = torch.empty(B, H, groups, 3, dtype=torch.int32, device=counts.device)
    blocks = torch.empty(B, H, groups, 2, width, dtype=torch.int32, device=counts.device)
    if shared_counts.numel():
        _kernel[(groups, H, B)](
            counts, indices, shared_counts, blocks, *counts.stride()[:2], *indices.stride()[:3], H, Mq,
            width, _CHUNK, num_warps=1,
        )  # fmt: skip
    return shared_counts, blocks
