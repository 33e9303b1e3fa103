"""Agreement with the dense model on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """``kl``: mean KL(dense || sparse) in nats; ``top1``: share of equal most likely next tokens."""

    kl: float
    top1: float


def agreement(
    logits: Float[Tensor, "T V"], dense_logits: Float[Tensor, "T V"], chunk: int = 256
) -> Agreement:
    """Compare two models' logits on the same tokens."""
    kl = same = 0.0
    for a, b in zip(torch.split(logits, chunk), torch.split(dense_logits, chunk), strict=True):
        log_p, log_q = b.float().log_softmax(-1), a.float().log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        same += (a.argmax(-1) == b.argmax(-1)).sum().item()
    return Agreement(kl / logits.shape[0], same / logits.shape[0])
