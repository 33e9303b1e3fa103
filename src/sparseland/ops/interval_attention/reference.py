"""Interval attention in plain PyTorch: every score, the bias, a boolean mask, softmax in float32."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def visible(
    ends: Int[Tensor, "*B Nk"], positions: Int[Tensor, " Nq"], keys: Int[Tensor, "*B Nk"]
) -> Bool[Tensor, "*B Nq Nk"]:
    """Which queries see which keys: ``j <= i < ends[j]``."""
    i = positions[:, None]
    return (keys[..., None, :] <= i) & (i < ends[..., None, :])


def interval_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    ends: Int[Tensor, "B Hkv Nk"],
    bias: Float[Tensor, "B Hkv Nk"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp; materialises all Nq x Nk scores."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    keys = torch.arange(n_keys, device=q.device)
    mask = visible(ends, keys[n_keys - n_queries :], keys)[:, :, None]  # (B, Hkv, 1, Nq, Nk)
    grouped = torch.unflatten(q.float(), 1, (k.shape[1], -1))
    scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, k.float()) * scale + bias[:, :, None, None]
    scores = scores.masked_fill(~mask, -torch.inf)
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = torch.einsum("bhgqk,bhkd->bhgqd", weights / total, v.float()).flatten(1, 2)
    lse = (peak + total.log()).masked_fill(empty, -torch.inf)
    return out.to(q.dtype), lse.squeeze(-1).flatten(1, 2)
