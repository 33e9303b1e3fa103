"""Gradients of interval attention in plain PyTorch, one query block at a time, for any device.

With p = exp(s - lse) (FlashAttention's backward, Dao et al. 2022, algorithm 4)::

    dv = p^T do      dp = do v^T      ds = p * (dp - delta)      dq = ds k      dk = ds^T q

where delta = rowsum(do * out) - dlse, and the bias of a key gets the sum of ds over the queries that see it.
Nothing is N x N: the largest array holds the scores of one query block in every head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.interval_attention.lists import living_keys

_ROWS = 128


def backward(
    d_out: Float[Tensor, "B Hq Nq D"],
    d_lse: Float[Tensor, "B Hq Nq"],
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    ends: Int[Tensor, "B Hkv Nk"],
    bias: Float[Tensor, "B Hkv Nk"],
    out: Float[Tensor, "B Hq Nq D"],
    lse: Float[Tensor, "B Hq Nq"],
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(d_q, d_k, d_v, d_bias)`` in the inputs' types; sums are kept in float32."""
    Hkv, D = k.shape[1], k.shape[3]
    grouped = (Hkv, q.shape[1] // Hkv)
    d_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=k.device)
    # +inf makes every probability of a query that sees nothing 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    for block in living_keys(ends, q.shape[2], _ROWS):
        if not block.keys.shape[2]:
            continue
        q_rows, do_rows, o_rows = (
            torch.unflatten(x[:, :, block.rows].float(), 1, grouped) for x in (q, d_out, out)
        )  # (B, Hkv, G, R, D)
        lse_rows, d_lse_rows = (
            torch.unflatten(x[:, :, block.rows, None].float(), 1, grouped) for x in (lse, d_lse)
        )
        index = block.keys[..., None].expand(-1, -1, -1, D)
        k_rows, v_rows = k.gather(2, index).float(), v.gather(2, index).float()
        s = torch.einsum("bhgqd,bhkd->bhgqk", q_rows, k_rows).mul_(scale)
        s = s.add_(bias.gather(-1, block.keys)[:, :, None, None]).sub_(lse_rows)
        p = s.masked_fill_(~block.mask[:, :, None], -torch.inf).exp_()
        d_s = torch.einsum("bhgqd,bhkd->bhgqk", do_rows, v_rows)
        d_s = d_s.sub_((do_rows * o_rows).sum(-1, keepdim=True) - d_lse_rows).mul_(p)
        d_q[:, :, block.rows] = (
            torch.einsum("bhgqk,bhkd->bhgqd", d_s, k_rows).mul_(scale).flatten(1, 2).to(q.dtype)
        )
        d_k.scatter_add_(2, index, torch.einsum("bhgqk,bhgqd->bhkd", d_s, q_rows).mul_(scale))
        d_v.scatter_add_(2, index, torch.einsum("bhgqk,bhgqd->bhkd", p, do_rows))
        d_bias.scatter_add_(2, block.keys, d_s.sum((2, 3)))
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_bias.to(bias.dtype)
