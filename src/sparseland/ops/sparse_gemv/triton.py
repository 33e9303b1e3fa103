"""``sparse_gemv`` in Triton: the threshold is tested in the kernel, rows below it are never loaded.

A program takes a block of columns and a slice of the inputs (split-K) and leaves a float32 partial sum; a
second kernel adds the slices and the bias. No atomics, so the same input gives the same bits and bfloat16
loses nothing between slices. With several tokens a row is read if any of them needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseland.ops.gather_decode.triton import n_multiprocessors, split
from sparseland.patterns import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Args:
        rows, columns: of the weight tile that a program reads at a time.
        warps: warps of a program.
        stages: depth of the pipeline of reads.
        per_sm: programs per multiprocessor that the split aims at.
    """

    rows: int = 64
    columns: int = 128
    warps: int = 4
    stages: int = 1
    per_sm: int = 8


@triton.jit
def _partial_sums(
    x, wt, threshold, partial, n_in, n_out, per_slice, sxt, sxi, swi, sth,
    T: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    in_n = o_n < n_out
    start = i_s * per_slice
    end = tl.minimum(start + per_slice, n_in)
    if T == 1:
        b_acc = tl.zeros([BK, BN], tl.float32)
        for i in tl.range(start, end, BK, num_stages=STAGES):
            o_k = i + tl.arange(0, BK)
            b_x = tl.load(x + o_k * sxi, mask=o_k < end, other=0.0).to(tl.float32)
            b_th = tl.load(threshold + o_k * sth, mask=o_k < end, other=float("inf")).to(tl.float32)
            on = tl.abs(b_x) > b_th
            p_w = wt + o_k.to(tl.int64)[:, None] * swi + o_n[None, :]
            b_w = tl.load(p_w, mask=on[:, None] & in_n[None, :], other=0.0, eviction_policy="evict_first")
            # The input is masked as well: 0 * inf would be NaN.
            b_acc += b_w.to(tl.float32) * tl.where(on, b_x, 0.0)[:, None]
        tl.store(partial + i_s * tl.cast(n_out, tl.int64) + o_n, tl.sum(b_acc, 0), mask=in_n)
    else:
        o_t = tl.arange(0, BT)
        b_sum = tl.zeros([BT, BN], tl.float32)
        for i in tl.range(start, end, BK, num_stages=STAGES):
            o_k = i + tl.arange(0, BK)
            p_x = x + o_t[:, None] * sxt + o_k[None, :] * sxi
            b_x = tl.load(p_x, mask=(o_t < T)[:, None] & (o_k < end)[None, :], other=0.0)
            b_th = tl.load(threshold + o_k * sth, mask=o_k < end, other=float("inf")).to(tl.float32)
            on = tl.abs(b_x.to(tl.float32)) > b_th[None, :]
            needed = tl.max(on.to(tl.int32), 0) > 0
            p_w = wt + o_k.to(tl.int64)[:, None] * swi + o_n[None, :]
            b_w = tl.load(p_w, mask=needed[:, None] & in_n[None, :], other=0.0, eviction_policy="evict_first")
            b_sum = tl.dot(tl.where(on, b_x, 0.0).to(b_w.dtype), b_w, b_sum, input_precision="ieee")
        p_out = partial + (i_s * T + o_t[:, None]) * tl.cast(n_out, tl.int64) + o_n[None, :]
        tl.store(p_out, b_sum, mask=(o_t < T)[:, None] & in_n[None, :])


@triton.jit
def _add_slices(
    partial, bias, y, n_slices, n_out, T: tl.constexpr, HAS_BIAS: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    in_n = o_n < n_out
    b_acc = tl.zeros([BS, BN], tl.float32)
    for i in range(0, n_slices, BS):
        o_s = i + tl.arange(0, BS)
        p = partial + (o_s * T + i_t)[:, None] * tl.cast(n_out, tl.int64) + o_n[None, :]
        b_acc += tl.load(p, mask=(o_s < n_slices)[:, None] & in_n[None, :], other=0.0)
    b_y = tl.sum(b_acc, 0)
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(y + i_t * tl.cast(n_out, tl.int64) + o_n, b_y.to(y.dtype.element_ty), mask=in_n)


def sparse_gemv(
    x: Tensor, wt: Tensor, threshold: Tensor, bias: Tensor | None, tiles: Tiles | None = None
) -> Tensor:
    """See :func:`sparseland.ops.sparse_gemv.sparse_gemv`."""
    (n_tokens, n_in), n_out = x.shape, wt.shape[1]
    if not n_tokens or not n_in or not n_out:
        y = torch.zeros(n_tokens, n_out, dtype=x.dtype, device=x.device)
        return y if bias is None else y + bias
    tiles = tiles or Tiles()
    y = torch.empty(n_tokens, n_out, dtype=x.dtype, device=x.device)
    blocks = cdiv(n_out, tiles.columns)
    per_slice, n_slices = split(n_in, tiles.rows, blocks, tiles.per_sm * n_multiprocessors(x.device))
    partial = torch.empty(n_slices, n_tokens, n_out, dtype=torch.float32, device=x.device)
    _partial_sums[(blocks, n_slices)](
        x, wt, threshold, partial, n_in, n_out, per_slice, x.stride(0), x.stride(1), wt.stride(0),
        threshold.stride(0) if threshold.dim() else 0,
        T=n_tokens, BT=max(16, next_power_of_2(n_tokens)), BK=tiles.rows, BN=tiles.columns,
        STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    _add_slices[(cdiv(n_out, 128), n_tokens)](
        partial, bias, y, n_slices, n_out, T=n_tokens, HAS_BIAS=bias is not None,
        BS=min(16, next_power_of_2(n_slices)), BN=128, num_warps=4,
    )  # fmt: skip
    return y
