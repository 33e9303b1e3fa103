"""Window attention and masked attention in plain PyTorch: every score, a boolean mask, softmax in float32."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseland.patterns import WindowPattern


def masked_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    mask: Bool[Tensor, "b h Nq Nk"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Softmax attention over the pairs where ``mask`` is true, and its log-sum-exp (float32, natural log).

    Materialises all Nq x Nk scores. ``b`` and ``h`` may be 1. Rows that see nothing give 0 and ``-inf``,
    and pass no gradient.
    """
    groups = q.shape[1] // k.shape[1]
    q_grouped = torch.unflatten(q.float(), 1, (-1, groups))  # (B, Hkv, G, Nq, D)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q_grouped, k.float()).flatten(1, 2) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    probabilities = torch.unflatten(weights / total, 1, (-1, groups))
    out = torch.einsum("bhgqk,bhkd->bhgqd", probabilities, v.float()).flatten(1, 2)
    lse = (peak + total.log()).masked_fill(empty, -torch.inf)
    return out.to(q.dtype), lse.squeeze(-1)


def window_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    sinks: int,
    window: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp by the dense mask of :class:`~sparseland.patterns.WindowPattern`."""
    mask = WindowPattern(q.shape[2], k.shape[2], sinks, window).mask().to(q.device)
    return masked_attention(q, k, v, mask, scale)
