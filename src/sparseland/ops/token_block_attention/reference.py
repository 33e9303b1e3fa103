"""Attention over per-token block lists, written out: the pattern's mask, a softmax under it, a product."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import TokenBlockPattern


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    counts: Int[Tensor, "b Hl T"],
    indices: Int[Tensor, "b Hl T L"],
    members: Int[Tensor, "b Hl T L"],
    block_size: int,
    window: int,
    tile: int,
    scale: float,
    need_lse: bool = True,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp (an empty tensor unless ``need_lse``); differentiable, and N x N in memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // counts.shape[1]
    pattern = TokenBlockPattern(
        q.shape[2], k.shape[2], block_size, window, tile, group, counts, indices, members
    )
    keys, values = (t.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    logits = (q.to(dtype) @ keys.transpose(-1, -2) * scale).masked_fill(~pattern.mask(), -math.inf)
    lse = logits.logsumexp(-1)
    return (logits.softmax(-1) @ values).to(q.dtype), lse if need_lse else lse.new_empty(0)
