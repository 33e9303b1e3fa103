"""Gradients of attention over blocks and columns in plain PyTorch, some queries at a time, for any device.

The listed keys are gathered again and the probabilities computed again from the log-sum-exp
(FlashAttention's backward, Dao et al. 2022, appendix B.4)::

    dv = p^T do      dp = do v^T      ds = p * (dp - delta)      dq = ds k      dk = ds^T q

where delta = rowsum(do * out) - dlse; the second term carries the gradient of the log-sum-exp itself.
Nothing is N x N: the largest arrays hold the listed keys of one piece of queries, in every head.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Queries that are looked at together; those of a larger block share its list piece by piece.
_ROWS = 128


def backward(
    d_out: Float[Tensor, "B Hq Nq D"],
    d_lse: Float[Tensor, "B Hq Nq"],
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    out: Float[Tensor, "B Hq Nq D"],
    lse: Float[Tensor, "B Hq Nq"],
    block_size: int,
    column_size: int,
    block_counts: Int[Tensor, "b h M"],
    block_indices: Int[Tensor, "b h M L"],
    column_counts: Int[Tensor, "b h Mc"],
    column_indices: Int[Tensor, "b h Mc Lc"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hkv Nk D"], Float[Tensor, "B Hkv Nk D"]]:
    """Gradients of q, k and v in their own types; sums are kept in fp32 (fp64 for fp64 inputs)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    offset = n_keys - n_queries
    delta = (d_out.to(dtype) * out.to(dtype)).sum(-1) - d_lse.to(dtype)
    # +inf makes every probability of a query that sees nothing 0.
    lse = lse.masked_fill(lse == -math.inf, math.inf).to(dtype)
    dq = q.new_zeros(q.shape)
    dk, dv = (torch.zeros(batch * kv_heads * n_keys, dim, dtype=dtype, device=k.device) for _ in range(2))
    k_rows, v_rows = k.reshape(-1, dim), v.reshape(-1, dim)
    # Where the keys of each (row, query head) begin among the rows of all.
    row = torch.arange(batch, device=q.device)[:, None, None]
    head = torch.arange(heads, device=q.device)[:, None]
    base = (row * kv_heads + head // (heads // kv_heads)) * n_keys
    within = torch.arange(block_size, device=q.device)
    most_blocks, most_columns = (c.amax((0, 1)).tolist() for c in (block_counts, column_counts))

    for start in range(0, n_queries, min(block_size, _ROWS)):
        rows = slice(start, min(start + min(block_size, _ROWS), n_queries))
        i, j = start // block_size, start // column_size
        blocks, listed = _listed(block_counts, block_indices, i, most_blocks[i])
        columns, listed_columns = _listed(column_counts, column_indices, j, most_columns[j])
        keys = (blocks[..., None] * block_size + within).flatten(2)
        keys = _join(keys.masked_fill(~listed.repeat_interleave(block_size, -1), n_keys),
                     columns.masked_fill(~listed_columns, n_keys), batch, heads)  # fmt: skip
        if not keys.shape[2]:
            continue
        which = base + keys.clamp(max=n_keys - 1)  # [B, Hq, n]
        k_i, v_i = (t[which].to(dtype) for t in (k_rows, v_rows))
        q_i, do_i = (t[:, :, rows].to(dtype) for t in (q, d_out))
        query = torch.arange(rows.start, rows.stop, device=q.device) + offset
        # A key of ``n_keys`` or more stands for none; it lies in every query's future.
        hidden = keys[:, :, None] > query[:, None]
        s = (q_i @ k_i.transpose(-1, -2) * scale).masked_fill(hidden, -math.inf)
        p = (s - lse[:, :, rows, None]).exp()
        ds = p * (do_i @ v_i.transpose(-1, -2) - delta[:, :, rows, None])
        dq[:, :, rows] = (ds @ k_i * scale).to(q.dtype)
        dk.index_add_(0, which.flatten(), (ds.transpose(-1, -2) @ q_i * scale).flatten(0, 2))
        dv.index_add_(0, which.flatten(), (p.transpose(-1, -2) @ do_i).flatten(0, 2))

    return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


def _listed(
    counts: Int[Tensor, "b h M"], indices: Int[Tensor, "b h M L"], i: int, most: int
) -> tuple[Int[Tensor, "b h n"], Tensor]:
    """The entries of one query block's lists, and which of them count."""
    listed = torch.arange(most, device=counts.device) < counts[:, :, i, None]
    return indices[:, :, i, :most].long().masked_fill(~listed, 0), listed


def _join(a: Int[Tensor, "b h n"], b: Int[Tensor, "b h m"], batch: int, heads: int) -> Int[Tensor, "B H nm"]:
    return torch.cat([x.expand(batch, heads, -1) for x in (a, b)], dim=-1)
