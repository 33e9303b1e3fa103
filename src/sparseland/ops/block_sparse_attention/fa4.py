"""Block-sparse attention on FlashAttention-4's block-sparse kernels (``flash_attn.cute``, Hopper).

FA4 takes two lists per query block: blocks that are wholly visible, computed without a mask, and blocks
that need one. Ours are ascending, so the first are a prefix of each list and the second at most two
blocks after it (one where query and key blocks are aligned); the rest of a list lies in the future.
The backward takes the same for the transposed lists. Everything is derived on the device.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv


@cache
def _fa4() -> tuple[Any, Any, Any]:
    """FA4's interface, its container for lists and the causal mask (compiled by FA4 on first use)."""
    import cutlass  # type: ignore[import-not-found]
    import cutlass.cute as cute  # type: ignore[import-not-found]
    from flash_attn.cute import interface, utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit  # type: ignore[untyped-decorator]
    def causal(batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
        offset = utils.scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, cutlass.Int32)
        return key <= query + offset

    return interface, BlockSparseTensorsTorch, causal


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    block_size: int,
    scale: float,
    need_lse: bool = True,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp (an empty tensor unless ``need_lse``)."""
    interface, lists, causal = _fa4()
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3] if need_lse else (0,), dtype=torch.float32)
    whole, partial, partly = forward_lists(counts, indices, block_size, q.shape[2], k.shape[2])
    interface._flash_attn_fwd(
        *(t.transpose(1, 2) for t in (q, k, v)),
        softmax_scale=scale,
        pack_gqa=False,  # each query head has its own lists
        mask_mod=causal,
        block_sparse_tensors=lists(
            mask_block_cnt=partly,
            mask_block_idx=partial,
            full_block_cnt=whole,
            full_block_idx=indices[..., : cdiv(k.shape[2], block_size)].contiguous(),
            block_size=(block_size, block_size),
        ),
        return_lse=need_lse,
        out=out.transpose(1, 2),
        lse=lse if need_lse else None,
    )
    return out, lse


def backward(
    d_out: Float[Tensor, "B Hq Nq D"],
    d_lse: Float[Tensor, "B Hq Nq"],
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    out: Float[Tensor, "B Hq Nq D"],
    lse: Float[Tensor, "B Hq Nq"],
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    block_size: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hkv Nk D"], Float[Tensor, "B Hkv Nk D"]]:
    """Gradients of q, k and v in their own types (sums of dq in the order of arrival)."""
    interface, lists, causal = _fa4()
    partly, partial, whole, full = backward_lists(counts, indices, block_size, q.shape[2], k.shape[2])
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    interface._flash_attn_bwd(
        *(t.transpose(1, 2) for t in (q, k, v, out, d_out)),
        lse,
        softmax_scale=scale,
        mask_mod=causal,
        block_sparse_tensors=lists(
            mask_block_cnt=partly,
            mask_block_idx=partial,
            full_block_cnt=whole,
            full_block_idx=full,
            block_size=(block_size, block_size),
        ),
        dlse=d_lse,
        dq=dq.transpose(1, 2),
        dk=dk.transpose(1, 2),
        dv=dv.transpose(1, 2),
    )
    return dq, dk, dv


def forward_lists(
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    block_size: int,
    n_queries: int,
    n_keys: int,
) -> tuple[Int[Tensor, "b h Mq"], Int[Tensor, "b h Mq w"], Int[Tensor, "b h Mq"]]:
    """How many listed blocks are wholly visible; the blocks partly visible, and how many those are.

    Found by a binary search in each list, so that most of it need not be read.
    """
    wide = min(2, cdiv(n_keys, block_size))  # FA4 refuses lists longer than there are blocks
    counts, indices = counts.contiguous(), indices.contiguous()
    whole, partly = torch.empty_like(counts), torch.empty_like(counts)
    partial = indices.new_empty(*counts.shape, wide)
    rows = counts.numel()
    _split_lists[(cdiv(rows, 32),)](
        counts, indices, whole, partial, partly, rows, counts.shape[2], indices.shape[3],
        n_keys - n_queries, n_keys - 1, block_size,
        WIDE=wide, STEPS=indices.shape[3].bit_length(), BR=32, num_warps=1,
    )  # fmt: skip
    return whole, partial, partly


@triton.jit
def _split_lists(
    counts, indices, whole, partial, partly, n_rows, n_blocks, length, offset, last_key, size,
    WIDE: tl.constexpr, STEPS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    in_r = o_r < n_rows
    b_count = tl.load(counts + o_r, mask=in_r, other=0)
    first = (o_r % n_blocks) * size + offset
    last = tl.minimum(first + size - 1, last_key)
    p_list = indices + o_r.to(tl.int64) * length
    # low blocks are known to end at or before the row's first query, those from high on are known not to.
    low, high = tl.zeros([BR], tl.int32), b_count
    for _ in range(STEPS):
        middle = (low + high) // 2
        block = tl.load(p_list + middle, mask=in_r & (middle < b_count), other=0)
        seen = (low < high) & ((block + 1) * size <= first + 1)
        high = tl.where((low < high) & (seen == 0), middle, high)
        low = tl.where(seen, middle + 1, low)
    tl.store(whole + o_r, low, mask=in_r)
    more = tl.zeros([BR], tl.int32)
    for i in tl.static_range(WIDE):
        at = low + i
        block = tl.load(p_list + at, mask=in_r & (at < b_count), other=0)
        more += ((at < b_count) & (block * size <= last)).to(tl.int32)
        tl.store(partial + o_r.to(tl.int64) * WIDE + i, block, mask=in_r)
    tl.store(partly + o_r, more, mask=in_r)


def backward_lists(
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    block_size: int,
    n_queries: int,
    n_keys: int,
) -> tuple[Int[Tensor, "b h Mk"], Int[Tensor, "b h Mk w"], Int[Tensor, "b h Mk"], Int[Tensor, "b h Mk Mq"]]:
    """Per key block, the query blocks that see it partly and those that see it wholly (counts, lists)."""
    from sparseland.ops.block_sparse_attention.triton_backward import transposed

    key_blocks, query_blocks = cdiv(n_keys, block_size), counts.shape[2]
    t_counts, starts, t_indices = transposed(counts, indices, block_size, key_blocks, n_keys - n_queries)
    position = torch.arange(query_blocks, device=counts.device)
    listed = position < t_counts[..., None]
    lists = t_indices[(starts[..., None] + position).clamp(max=t_indices.numel() - 1)]
    # The last key of a block is visible to every query from this position on.
    last = (torch.arange(1, key_blocks + 1, device=counts.device) * block_size - 1)[:, None]
    partly = (listed & (lists * block_size + n_keys - n_queries < last)).sum(-1, dtype=torch.int32)
    rest = (partly[..., None] + position).clamp(max=query_blocks - 1)
    return partly, lists[..., :2].contiguous(), t_counts - partly, lists.gather(3, rest)
