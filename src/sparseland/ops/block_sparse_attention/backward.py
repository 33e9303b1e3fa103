"""Gradients of block-sparse attention in plain PyTorch, one query block at a time, for any device.

With p = exp(s - lse), the softmax's backward needs only the lists, the output and the log-sum-exp::

    dv = p^T do      dp = do v^T      ds = p * (dp - delta)      dq = ds k      dk = ds^T q

where delta = rowsum(do * out) - dlse; the second term carries the gradient of the log-sum-exp itself.
Nothing is N x N: the largest array holds the scores of one query block in every head.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import cdiv


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
    """Gradients of q, k and v in their own types; sums are kept in fp32 (fp64 for fp64 inputs)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    group, offset = heads // kv_heads, n_keys - n_queries
    k_blocks = cdiv(n_keys, block_size)
    counts = counts.expand(batch, heads, -1)
    indices = indices.expand(batch, heads, -1, -1)

    delta = (d_out.to(dtype) * out.to(dtype)).sum(-1) - d_lse.to(dtype)
    # +inf makes every probability of a query that sees nothing 0.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    keys, values = (_blocks(t, k_blocks, block_size) for t in (k, v))
    dq = q.new_zeros(q.shape)
    dk, dv = (torch.zeros(keys.shape, dtype=dtype, device=k.device) for _ in range(2))
    # First key block of each (row, query head) among the flattened blocks of all rows and key heads.
    row = torch.arange(batch, device=q.device)[:, None]
    head = torch.arange(heads, device=q.device)
    base = (row * kv_heads + head // group) * k_blocks
    lengths = counts.amax((0, 1)).tolist()

    for i, length in enumerate(lengths):
        if not length:
            continue
        rows = slice(i * block_size, min((i + 1) * block_size, n_queries))
        listed = torch.arange(length, device=q.device) < counts[:, :, i, None]
        blocks = indices[:, :, i, :length].long().masked_fill(~listed, 0)
        which = base[..., None] + blocks
        k_i, v_i = (t[which].flatten(2, 3).to(dtype) for t in (keys, values))
        q_i, do_i = (t[:, :, rows].to(dtype) for t in (q, d_out))

        key = (blocks[..., None] * block_size + torch.arange(block_size, device=q.device)).flatten(2)
        query = torch.arange(rows.start, rows.stop, device=q.device) + offset
        seen = (key[:, :, None] <= query[:, None]) & listed.repeat_interleave(block_size, -1)[:, :, None]
        s = (q_i @ k_i.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
        p = (s - lse[:, :, rows, None]).exp()
        ds = p * (do_i @ v_i.transpose(-1, -2) - delta[:, :, rows, None])

        dq[:, :, rows] = (ds @ k_i * scale).to(q.dtype)
        for total, part in ((dk, ds.transpose(-1, -2) @ q_i * scale), (dv, p.transpose(-1, -2) @ do_i)):
            total.index_add_(0, which.flatten(), part.reshape(-1, block_size, dim))

    dk, dv = (t.view(batch, kv_heads, -1, dim)[:, :, :n_keys] for t in (dk, dv))
    return dq, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _blocks(x: Float[Tensor, "B H N D"], blocks: int, size: int) -> Float[Tensor, "M size D"]:
    """All rows' and heads' blocks in one dimension, the last of each padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * size - x.shape[2]))
    return padded.reshape(-1, size, x.shape[3])
