"""Stage 1 of InfLLM-V2 written out: all queries at once, one block after the other."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseland.patterns import cdiv

# The score of what is not a number: above all others, and finite, so that sums and products keep it. A
# denominator from coarser windows may be too small by any factor: scores end here, too.
UNJUDGED = 2.0**120


def scores(
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    coarse: Float[Tensor, "B Hkv Nf D"] | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
) -> Float[Tensor, "B Hkv Nq Mk"]:
    """See :func:`sparseland.ops.kernel_scores.kernel_scores`."""
    logits = _logits(q, finite(compressed), n_keys, kernel, stride, scale)
    lse = logits.logsumexp(-1)
    if coarse is not None:
        rough = _logits(q, finite(coarse), n_keys, 4 * kernel, 4 * stride, scale).logsumexp(-1)
        lse = torch.where(rough == -math.inf, lse, rough)
    p = (logits - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    total = torch.unflatten(p, 1, (compressed.shape[1], -1)).sum(2)  # [B, Hkv, Nq, Nc]
    total = total.masked_fill(total.isnan() | ~judged(compressed)[:, :, None], UNJUDGED).clamp(max=UNJUDGED)
    total = total.masked_fill(_later(compressed, q.shape[2], n_keys, kernel, stride), 0.0)
    blocks = []
    for block in range(cdiv(n_keys, block_size)):
        touching = [
            j
            for j in range(total.shape[-1])
            if j * stride < (block + 1) * block_size and j * stride + kernel > block * block_size
        ]
        blocks.append(total[..., touching].amax(-1) if touching else total.new_zeros(total.shape[:-1]))
    return torch.stack(blocks, -1)


def top(
    scores: Float[Tensor, "B Hkv R M"],
    first: int,
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
) -> Bool[Tensor, "B Hkv R M"]:
    """The blocks that queries at the positions ``first, first + 1, …`` take: sort, keep the best."""
    position = torch.arange(first, first + scores.shape[2], device=scores.device)[:, None]
    block = torch.arange(scores.shape[3], device=scores.device)
    before = block <= position // block_size - window
    ranked = scores.masked_fill(block < init, math.inf).masked_fill(~before, -math.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    taken = torch.zeros_like(before.expand_as(scores)).scatter(-1, order[..., :topk], True)
    return (taken | (position + 1 < dense_len)) & before


def _logits(
    q: Tensor, compressed: Tensor, n_keys: int, kernel: int, stride: int, scale: float
) -> Float[Tensor, "B Hq Nq Nc"]:
    """Scaled products with the windows, -inf for those that end after the query."""
    group = q.shape[1] // compressed.shape[1]
    logits = q.float() @ compressed.float().repeat_interleave(group, 1).mT * scale
    return logits.masked_fill(_later(compressed, q.shape[2], n_keys, kernel, stride), -math.inf)


def _later(windows: Tensor, n_queries: int, n_keys: int, kernel: int, stride: int) -> Bool[Tensor, "Nq Nc"]:
    """Whether the window ends after the query."""
    position = torch.arange(n_keys - n_queries, n_keys, device=windows.device)[:, None]
    return torch.arange(windows.shape[2], device=windows.device) * stride + kernel - 1 > position


def finite(windows: Float[Tensor, "B H n D"], other: float = 0.0) -> Float[Tensor, "B H n D"]:
    """The windows, zeros (or another number) in place of those that hold NaN or infinity."""
    return windows.masked_fill(~judged(windows)[..., None], other)


def judged(windows: Float[Tensor, "B H n D"]) -> Bool[Tensor, "B H n"]:
    """Whether all of a window's mean is finite."""
    return windows.isfinite().all(-1)
