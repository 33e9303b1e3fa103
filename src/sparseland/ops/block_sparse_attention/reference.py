"""Block-sparse attention, written out: the mask of the lists, a softmax under it, a product."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.patterns import BlockPattern


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
    """Output and log-sum-exp (an empty tensor unless ``need_lse``); differentiable, and N x N in memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask = BlockPattern(q.shape[2], k.shape[2], block_size, counts, indices).mask()
    group = q.shape[1] // k.shape[1]
    keys, values = (t.to(dtype).repeat_interleave(group, 1) for t in (k, v))
    logits = (q.to(dtype) @ keys.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    # A query that sees nothing has lse -inf; its probabilities are exp(-inf - 0) = 0.
    p = (logits - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return (p @ values).to(q.dtype), lse if need_lse else lse.new_empty(0)
