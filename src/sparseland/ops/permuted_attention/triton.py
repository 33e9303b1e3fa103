"""Permuted attention in Triton: one program per tile of query slots walks its list of key blocks.

Queries, keys and values stay where they are; every tile is loaded through its position list. A key tile
whose first position lies after all of the program's queries is skipped before anything of it is loaded.
"""

# mypy: ignore-errors

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

_LOG2E = 1.4426950408889634
# Sizes that change from call to call: specialised kernels would gain nothing.
_UNSPECIALIZED = (
    "stride_qib", "stride_qih", "stride_kib", "stride_kih", "stride_cb", "stride_ch", "stride_ib",
    "stride_ih", "stride_im", "H", "Nq", "Sq", "Sk", "offset", "gap", "first_key",
)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward(
    q, k, v, o, lse, q_index, k_index, counts, indices, kv_heads,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_qib, stride_qih, stride_kib, stride_kih, stride_cb, stride_ch, stride_ib, stride_ih, stride_im,
    H, Nq, Sq, Sk, offset, gap, first_key, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    FAR: tl.constexpr = 2147483647
    i_t = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_kv = tl.load(kv_heads + i_h)
    i_d = tl.arange(0, BD)
    in_d = (i_d < D)[None, :]

    i_m = i_t * BM + tl.arange(0, BM)
    b_pos = tl.load(q_index + i_b * stride_qib + i_h * stride_qih + i_m, mask=i_m < Sq, other=-1)
    held = b_pos >= 0
    limit = tl.where(held, b_pos - gap, -1)
    latest = tl.max(limit, 0)
    i_row = tl.where(held, b_pos - offset, 0).to(tl.int64)
    q += i_b * stride_qb + i_h * stride_qh
    b_q = tl.load(q + i_row[:, None] * stride_qn + i_d[None, :], mask=held[:, None] & in_d, other=0.0)
    k += i_b * stride_kb + i_kv * stride_kh
    v += i_b * stride_vb + i_kv * stride_vh
    k_index += i_b * stride_kib + i_h * stride_kih

    acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    i_block = i_t * BM // BS
    indices += i_b * stride_ib + i_h * stride_ih + i_block.to(tl.int64) * stride_im
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_block)
    SUB: tl.constexpr = BS // BN
    i_n = tl.arange(0, BN)
    for step in range(0, count * SUB):
        slot = tl.load(indices + step // SUB) * BS + step % SUB * BN + i_n
        b_key = tl.load(k_index + slot, mask=slot < Sk, other=-1)
        real = (b_key >= 0) & (b_key >= first_key)
        b_key = tl.where(real, b_key, FAR)
        if tl.min(b_key, 0) <= latest:
            i_k = tl.where(real, b_key, 0).to(tl.int64)
            load = real[:, None] & in_d
            b_k = tl.load(k + i_k[:, None] * stride_kn + i_d[None, :], mask=load, other=0.0)
            b_v = tl.load(v + i_k[:, None] * stride_vn + i_d[None, :], mask=load, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
            b_s = tl.where(b_key[None, :] <= limit[:, None], b_s, float("-inf"))
            b_new = tl.maximum(b_m, tl.max(b_s, 1))
            # A row that has seen nothing yet: exp2(-inf - 0) = 0 where exp2(-inf + inf) is NaN.
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_p = tl.exp2(b_s - b_shift[:, None])
            b_decay = tl.exp2(b_m - b_shift)
            b_l = b_l * b_decay + tl.sum(b_p, 1)
            acc = acc * b_decay[:, None]
            acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="ieee")
            b_m = b_new

    # Not "b_l > 0": a query or key that is NaN must show.
    unseen = b_l == 0.0
    b_l = tl.where(unseen, 1.0, b_l)
    b_o = acc / b_l[:, None]
    b_lse = tl.where(unseen, float("-inf"), (b_m + tl.log2(b_l)) * 0.6931471805599453)
    i_out = (i_b * H + i_h) * Nq + i_row
    tl.store(o + i_out[:, None] * D + i_d[None, :], b_o.to(o.dtype.element_ty), mask=held[:, None] & in_d)
    tl.store(lse + i_out, b_lse, mask=held)


def forward(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    q_index: Int[Tensor, "b h Sq"],
    k_index: Int[Tensor, "b h Sk"],
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    kv_heads: Int[Tensor, " H"],
    block_size: int,
    gap: int,
    first_key: int,
    scale: float,
) -> tuple[Float[Tensor, "B H Nq D"], Float[Tensor, "B H Nq"]]:
    """Output and log-sum-exp. Deterministic: each program owns its rows."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q_index, k_index, indices = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_index, k_index, indices)
    )
    counts = counts if counts.stride(-1) == 1 else counts.contiguous()
    B, H, Nq, D = q.shape
    # Queries outside the pattern are no program's.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    Sq, Sk = q_index.shape[-1], k_index.shape[-1]
    BD = max(16, next_power_of_2(D))
    BM, BN, warps, stages = _tile_sizes(block_size, BD, q.dtype)
    q_index, k_index, counts, indices = (
        x.expand(B, H, *x.shape[2:]) for x in (q_index, k_index, counts, indices)
    )
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _forward[(cdiv(Sq, block_size) * (block_size // BM), B * H)](
            q, k, v, out, lse, q_index, k_index, counts, indices, kv_heads,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *q_index.stride()[:2], *k_index.stride()[:2], *counts.stride()[:2], *indices.stride()[:3],
            H, Nq, Sq, Sk, k.shape[2] - Nq, gap, first_key, scale * _LOG2E,
            D=D, BD=BD, BS=block_size, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def _tile_sizes(block_size: int, BD: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BM, BN (both divide the block size), warps, stages."""
    if dtype == torch.float32 or BD > 128:
        return min(block_size, 64), min(block_size, 32), 4, 2
    return min(block_size, 128), min(block_size, 64), 8 if min(block_size, 128) * BD > 128 * 64 else 4, 2
