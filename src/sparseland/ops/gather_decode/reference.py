"""``gather_decode`` in plain PyTorch: look up the chosen rows, then an ordinary softmax in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError


def listed_tokens(indices: Int[Tensor, "B H n"], page_size: int, n_keys: int) -> Int[Tensor, "B H m"]:
    """Token positions (int64) of the listed tokens or pages; -1 where nothing is to be read.

    Raises:
        SparselandError: an index lies beyond the cache.
    """
    indices = indices.long()
    # The part of the last page that the cache does not fill is padding; whole pages beyond are mistakes.
    n_pages = -(-n_keys // page_size)
    if indices.numel() and int(indices.max()) >= n_pages:
        what = "tokens" if page_size == 1 else f"pages of {page_size} tokens"
        raise SparselandError(f"indices reach {int(indices.max())}, but the cache has {n_pages} {what}")
    if page_size == 1:
        return indices
    tokens = indices[..., None] * page_size + torch.arange(page_size, device=indices.device)
    keep = (indices[..., None] >= 0) & (tokens < n_keys)
    return torch.where(keep, tokens, -1).flatten(2)


def gather_decode(
    q: Float[Tensor, "B Hq 1 D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    indices: Int[Tensor, "B H n"],
    scale: float,
    page_size: int,
) -> tuple[Float[Tensor, "B Hq 1 D"], Float[Tensor, "B Hq 1"]]:
    """See :func:`sparseland.ops.gather_decode.gather_decode`; differentiable."""
    batch, heads = indices.shape[:2]
    tokens = listed_tokens(indices, page_size, k.shape[2])
    listed = tokens >= 0

    row = torch.arange(batch, device=q.device)[:, None, None]
    kv_head = torch.arange(heads, device=q.device)[None, :, None] // (heads // k.shape[1])
    # Padding looks up some row; it is replaced so that not even a NaN in it can be felt.
    keys = torch.where(listed[..., None], k[row, kv_head, tokens.clamp(min=0)].float(), 0)  # [B, H, m, D]
    values = torch.where(listed[..., None], v[row, kv_head, tokens.clamp(min=0)].float(), 0)

    # All query heads that share a list: [B, H, Hq / H, D].
    queries = q.reshape(batch, heads, -1, q.shape[-1]).float()
    logits = (queries @ keys.mT * scale).masked_fill(~listed[:, :, None], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
    out = (weights @ values).reshape(q.shape).to(q.dtype)
    return out, lse.reshape(q.shape[:3])
