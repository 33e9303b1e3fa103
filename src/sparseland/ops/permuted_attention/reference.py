"""Permuted attention, written out: the pattern's mask in the tokens' order, and a softmax under it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import PermutedPattern


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
    """Output and log-sum-exp; differentiable, and N x N in memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask = PermutedPattern(
        q.shape[2], k.shape[2], block_size, q_index, k_index, counts, indices, gap, first_key
    ).mask()
    keys, values = (t.to(dtype).index_select(1, kv_heads) for t in (k, v))
    logits = (q.to(dtype) @ keys.mT * scale).masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    # A query that sees nothing has lse -inf; its probabilities are exp(-inf - 0) = 0.
    p = (logits - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return (p @ values).to(q.dtype), lse
