"""Dense causal attention by PyTorch itself: the fastest there is where no key is skipped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def window_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    sinks: int,
    window: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"] | None]:
    """Output, and the log-sum-exp where the kernel gives it (Nq < Nk, which only CUDA takes)."""
    if q.shape[2] == k.shape[2]:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped), None
    # The operator itself takes grouped heads and aligns the triangle to the last key.
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    return out, lse
