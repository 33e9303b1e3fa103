"""``gather_decode`` on the CPU: one row-wise copy of the chosen rows, then grouped matmuls in float32.

Rows are fetched with ``index_select`` on a flat view of the cache's storage: it copies whole rows and is
about ten times as fast as ``gather`` or advanced indexing, and needs no contiguous cache.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.gather_decode.reference import listed_tokens


def gather_decode(
    q: Float[Tensor, "B Hq 1 D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    indices: Int[Tensor, "B H n"],
    scale: float,
    page_size: int,
) -> tuple[Float[Tensor, "B Hq 1 D"], Float[Tensor, "B Hq 1"]]:
    """See :func:`sparseland.ops.gather_decode.gather_decode`."""
    batch, heads = indices.shape[:2]
    tokens = listed_tokens(indices, page_size, k.shape[2])
    padding = tokens < 0
    padded = bool(padding.any())
    if padded:
        tokens = tokens.clamp(min=0)

    queries = q.reshape(batch, heads, -1, q.shape[-1]).float()
    keys = select_rows(k, tokens).float()
    logits = torch.matmul(queries, keys.mT).mul_(scale)
    values = select_rows(v, tokens)
    if padded:
        # Zero times NaN is NaN: what padding fetched must go from the values too.
        logits.masked_fill_(padding[:, :, None], float("-inf"))
        values.masked_fill_(padding[..., None], 0)

    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top.masked_fill(top == float("-inf"), 0)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights, values.float()).div_(total.clamp(min=torch.finfo(torch.float32).tiny))
    lse = total.log_().add_(top)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])


def select_rows(x: Float[Tensor, "B Hkv N D"], tokens: Int[Tensor, "B H m"]) -> Float[Tensor, "B H m D"]:
    """Copies of the rows ``tokens`` (all >= 0) of each key head, ``H`` a multiple of ``Hkv``."""
    batch, kv_heads, length, dim = x.shape
    heads = tokens.shape[1]
    # A stride along an axis of size 1 means nothing and may hold anything.
    strides = [s if size > 1 else 0 for s, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    unit = math.gcd(*strides) or dim
    steps = [s // unit for s in strides]
    last = (batch - 1) * steps[0] + (kv_heads - 1) * steps[1] + (length - 1) * steps[2]
    flat = x.as_strided((last + 1, dim), (unit, 1))
    start = (
        torch.arange(batch)[:, None] * steps[0] + torch.arange(heads)[None] // (heads // kv_heads) * steps[1]
    )
    rows = tokens * steps[2] + start[..., None]
    return flat.index_select(0, rows.flatten()).view(*tokens.shape, dim)
