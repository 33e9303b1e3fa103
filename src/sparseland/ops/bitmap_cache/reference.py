"""``bitmap_cache`` in plain PyTorch: sort, shift and mask; decoding expands everything at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def pack(mask: Bool[Tensor, "B H T D"]) -> Int[Tensor, "B H T W"]:
    """Booleans to words of 64 bits, least significant first."""
    words = -(-mask.shape[-1] // 64)
    padded = F.pad(mask, (0, words * 64 - mask.shape[-1])).view(*mask.shape[:-1], words, 64)
    packed: Tensor = (padded.long() << torch.arange(64, device=mask.device)).sum(-1)
    return packed


def unpack(bits: Int[Tensor, "B H T W"], dim: int) -> Bool[Tensor, "B H T D"]:
    """The inverse of :func:`pack`."""
    # The shift is arithmetic, which is harmless: only the lowest bit is looked at.
    channels = bits[..., None] >> torch.arange(64, device=bits.device) & 1
    return channels.flatten(-2)[..., :dim].bool()


def compress(
    x: Float[Tensor, "B H T D"], kept: int
) -> tuple[Int[Tensor, "B H T W"], Float[Tensor, "B H T kept"]]:
    """See :func:`sparseland.ops.bitmap_cache.compress`."""
    # A stable sort puts NaN first and leaves ties in channel order.
    channels = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :kept].sort(-1).values
    mask = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, channels, True)
    return pack(mask), x.gather(-1, channels)


def decompress(
    bits: Int[Tensor, "B H T W"], values: Float[Tensor, "B H T kept"], dim: int
) -> Float[Tensor, "B H T D"]:
    """See :func:`sparseland.ops.bitmap_cache.decompress`."""
    mask = unpack(bits, dim)
    rank = mask.long().cumsum(-1) - 1
    return torch.where(mask, values.gather(-1, rank.clamp(min=0)), 0)


def bitmap_decode(
    q: Float[Tensor, "B Hq 1 D"],
    k_bitmap: Int[Tensor, "B H T W"],
    k_values: Float[Tensor, "B H T kept"],
    v_bitmap: Int[Tensor, "B H T W"],
    v_values: Float[Tensor, "B H T kept_v"],
    first_key: Int[Tensor, " B"] | None,
    scale: float,
) -> tuple[Float[Tensor, "B Hq 1 D"], Float[Tensor, "B Hq 1"]]:
    """See :func:`sparseland.ops.bitmap_cache.bitmap_decode`; differentiable in ``q`` and the values."""
    batch, kv_heads, n_keys = k_values.shape[:3]
    k = decompress(k_bitmap, k_values, q.shape[3]).float()
    v = decompress(v_bitmap, v_values, q.shape[3]).float()
    grouped = q.reshape(batch, kv_heads, -1, q.shape[3]).float()
    logits = grouped @ k.mT * scale
    if first_key is not None:
        hidden = torch.arange(n_keys, device=q.device) < first_key[:, None]
        logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
    return (weights @ v).reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])
