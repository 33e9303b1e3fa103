"""Loss on real text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"], chunk: int = 256) -> float:
    """Mean negative log-likelihood of the targets, nats per token, in fp32."""
    parts = zip(torch.split(logits, chunk), torch.split(targets, chunk), strict=True)
    total = sum(F.cross_entropy(a.float(), b, reduction="sum").item() for a, b in parts)
    return total / targets.numel()
