"""The definition, with the whole attention matrix: slow, for small tests. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    scale: float,
    per_query: bool,
) -> Float[Tensor, "B Hq M Mk"]:
    """Softmax, then the maximum of each tile."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
    p = (q.float() @ keys.float().mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    rows = 1 if per_query else block_size
    p = F.pad(p, (0, -n_keys % block_size, 0, -n_queries % rows))
    tiles = (p.shape[2] // rows, rows, p.shape[3] // block_size, block_size)
    best: Tensor = p.reshape(*p.shape[:2], *tiles).amax((3, 5))
    return best
