"""A few query blocks at a time, only the keys that they see: for CPUs, and GPUs without Triton.

The maximum of a row's probabilities in a block is ``exp(r - m) / l``, with ``r`` the block's largest logit:
one pass finds r, and only l needs the exponentials. They are taken in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Logits held at once: what a CPU's cache can still hold, and enough work for a GPU.
_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**25


@torch.no_grad()
def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    scale: float,
    per_query: bool,
) -> Float[Tensor, "B Hq M Mk"]:
    """Chunk by chunk; one product per key head, the queries of its group as rows."""
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys = k.shape[1:3]
    group, offset = Hq // Hkv, n_keys - n_queries
    blocks = -(-n_keys // block_size)
    keys = F.pad(k.float(), (0, 0, 0, -n_keys % block_size)).mT  # (B, Hkv, D, Mk * b)
    chunk = _CPU_CHUNK if q.device.type == "cpu" else _GPU_CHUNK
    out = q.new_zeros(B, Hq, n_queries if per_query else -(-n_queries // block_size), blocks).float()
    start = 0
    while start < n_queries:
        seen = min(offset + start + block_size, n_keys)
        rows = max(1, chunk // (B * Hq * seen * block_size)) * block_size
        end = min(start + rows, n_queries)
        wide = -(-(offset + end) // block_size) * block_size
        part = q[:, :, start:end].float().reshape(B, Hkv, group * (end - start), D) * scale
        logits = (part @ keys[..., :wide]).reshape(B, Hq, end - start, wide)
        # Only the columns from the first row's own position on can lie in any row's future.
        position = torch.arange(offset + start, offset + end, device=q.device)
        column = torch.arange(offset + start, wide, device=q.device)
        logits[..., offset + start :].masked_fill_(column > position[:, None], -torch.inf)
        best = torch.unflatten(logits, -1, (-1, block_size)).amax(-1)
        peak = best.amax(-1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(-1, keepdim=True)
        best = (best - peak).exp_().div_(total)
        if per_query:
            out[:, :, start:end, : best.shape[-1]] = best
        else:
            best = F.pad(best, (0, 0, 0, -(end - start) % block_size))
            best = torch.unflatten(best, 2, (-1, block_size)).amax(3)
            first = start // block_size
            out[:, :, first : first + best.shape[2], : best.shape[3]] = best
        start = end
    return out
