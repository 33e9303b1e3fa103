"""``gather_decode`` in Triton: split-K flash-decoding over the selected tokens.

Stage 1: a program takes one list (the whole group of query heads that shares it) and one slice of it, and
leaves a normalised partial output and its log-sum-exp. Stage 2 merges the slices. The work is the
fetching of rows of D * 2 bytes from anywhere; the tensor cores only serve to share each row among the
group. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseland.patterns import cdiv, next_power_of_2

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Args:
        rows: tokens a program fetches at a time.
        warps: warps of a program.
        stages: depth of the pipeline of fetches.
        per_sm: programs per multiprocessor that the split aims at.
    """

    rows: int
    warps: int
    stages: int
    per_sm: int


def default_tiles(dtype: torch.dtype, dim: int) -> Tiles:
    """16 KiB of keys and as much of values at a time; four such programs fit a Hopper multiprocessor."""
    wide = dim > 128 or dtype == torch.float32
    return Tiles(rows=32 if wide else 64, warps=4, stages=3, per_sm=4)


@cache
def n_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 in the interpreter, so that small tests split too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(length: int, tile: int, others: int, programs: int) -> tuple[int, int]:
    """Slices of ``length`` for about ``programs`` programs: tokens per slice (whole tiles), and slices."""
    tiles = cdiv(length, tile)
    slices = min(tiles, max(1, round(programs / others)))
    per_slice = cdiv(tiles, slices)
    return per_slice * tile, cdiv(tiles, per_slice)


@triton.jit(do_not_specialize=["n_listed", "n_keys", "n_slices"])
def _attend_slice(
    q, k, v, indices, partial, partial_lse,
    scale_log2, n_listed, n_keys, per_slice, n_slices,
    sqb, sqh, skb, skh, skn, svb, svh, svn, sib, sih,
    H, HEADS_PER_KV,
    ROWS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_s, i_list = tl.program_id(0), tl.program_id(1)
    i_b = (i_list // H).to(tl.int64)
    i_h = i_list % H
    i_kv = (i_h // HEADS_PER_KV).to(tl.int64)

    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    in_m, in_d = o_m < ROWS, o_d < D
    head = i_h.to(tl.int64) * ROWS + o_m  # query heads of this list
    b_q = tl.load(
        q + i_b * sqb + head[:, None] * sqh + o_d[None, :], mask=in_m[:, None] & in_d[None, :], other=0.0
    )
    p_i = indices + i_b * sib + i_h.to(tl.int64) * sih
    p_k = k + i_b * skb + i_kv * skh + o_d[None, :]
    p_v = v + i_b * svb + i_kv * svh + o_d[None, :]

    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    start = i_s * per_slice
    end = tl.minimum(start + per_slice, n_listed * PAGE)
    for i in tl.range(start, end, BN, num_stages=STAGES):
        o_n = i + tl.arange(0, BN)
        if PAGE == 1:
            b_t = tl.load(p_i + o_n, mask=o_n < end, other=-1).to(tl.int64)
        else:
            b_page = tl.load(p_i + o_n // PAGE, mask=o_n < end, other=-1).to(tl.int64)
            b_t = tl.where(b_page >= 0, b_page * PAGE + o_n % PAGE, -1)
        b_on = (b_t >= 0) & (b_t < n_keys)
        fetch = b_on[:, None] & in_d[None, :]
        b_k = tl.load(p_k + b_t[:, None] * skn, mask=fetch, other=0.0)
        b_v = tl.load(p_v + b_t[:, None] * svn, mask=fetch, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_s = tl.where(b_on[None, :], b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row that has seen nothing keeps -inf; subtracting it would make NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_p = tl.exp2(b_s - m_safe[:, None])
        decay = tl.exp2(b_m - m_safe)
        b_l = b_l * decay + tl.sum(b_p, 1)
        b_o = b_o * decay[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        b_m = m_new

    row = (i_b * H * ROWS + head) * n_slices + i_s
    b_l = tl.where(b_l == 0, 1.0, b_l)  # nothing seen: the output is 0, and the top is -inf already
    b_o = b_o / b_l[:, None]
    tl.store(partial + row[:, None] * D + o_d[None, :], b_o, mask=in_m[:, None] & in_d[None, :])
    tl.store(partial_lse + row, b_m + tl.log2(b_l), mask=in_m)


@triton.jit(do_not_specialize=["n_slices"])
def _merge_slices(
    partial, partial_lse, out, lse, n_slices,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    in_d = o_d < D
    p_lse = partial_lse + i_row * n_slices
    p_o = partial + i_row * n_slices * D

    b_top = tl.full([BS], float("-inf"), tl.float32)
    for i in range(0, n_slices, BS):
        o_s = i + tl.arange(0, BS)
        b_top = tl.maximum(b_top, tl.load(p_lse + o_s, mask=o_s < n_slices, other=float("-inf")))
    top = tl.max(b_top, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)

    b_l = tl.zeros([BS], tl.float32)
    b_o = tl.zeros([BD], tl.float32)
    for i in range(0, n_slices, BS):
        o_s = i + tl.arange(0, BS)
        b_w = tl.exp2(tl.load(p_lse + o_s, mask=o_s < n_slices, other=float("-inf")) - safe)
        within = (o_s < n_slices)[:, None] & in_d[None, :]
        b_part = tl.load(p_o + o_s[:, None] * D + o_d[None, :], mask=within, other=0.0)
        b_l += b_w
        b_o += tl.sum(b_w[:, None] * b_part, 0)
    total = tl.sum(b_l, 0)
    total = tl.where(total == 0, 1.0, total)
    tl.store(out + i_row * D + o_d, (b_o / total).to(out.dtype.element_ty), mask=in_d)
    tl.store(lse + i_row, (top + tl.log2(total)) * 0.6931471805599453)


def merge_slices(partial: Tensor, partial_lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Stage 2: ``partial [B * Hq, S, D]`` and its base-2 log-sum-exp ``[B * Hq, S]``, both float32.

    Returns:
        The output like ``q [B, Hq, 1, D]`` and its natural log-sum-exp ``[B, Hq, 1]``.
    """
    rows, n_slices, dim = partial.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    block = min(32, next_power_of_2(n_slices))
    _merge_slices[(rows,)](
        partial, partial_lse, out, lse, n_slices, D=dim, BS=block, BD=next_power_of_2(dim), num_warps=4
    )
    return out, lse


def gather_decode(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, page_size: int, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`sparseland.ops.gather_decode.gather_decode`."""
    batch, heads, _, dim = q.shape
    lists, n_listed = indices.shape[1:]
    tiles = tiles or default_tiles(q.dtype, dim)
    if q.stride(3) != 1:
        q = q.contiguous()
    if indices.stride(2) != 1:
        indices = indices.contiguous()
    programs = tiles.per_sm * n_multiprocessors(q.device)
    per_slice, n_slices = split(n_listed * page_size, tiles.rows, batch * lists, programs)
    partial = torch.empty(batch * heads, n_slices, dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(batch * heads, n_slices, dtype=torch.float32, device=q.device)
    rows = heads // lists
    _attend_slice[(n_slices, batch * lists)](
        q, k, v, indices, partial, partial_lse,
        scale * LOG2E, n_listed, k.shape[2], per_slice, n_slices,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], *indices.stride()[:2],
        lists, lists // k.shape[1],
        ROWS=rows, D=dim, PAGE=page_size,
        BM=max(16, next_power_of_2(rows)), BN=tiles.rows, BD=max(16, next_power_of_2(dim)),
        STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return merge_slices(partial, partial_lse, q)
