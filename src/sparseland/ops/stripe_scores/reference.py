"""Anchors and stripes by loops over the definitions: slow, for small tests."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.stripe_scores.areas import LEVELS, local_start, n_groups, thresholds


def anchors(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], block_size: int, step: int, scale: float
) -> Float[Tensor, "B Hq Mq"]:
    """One query at a time: the largest logit over its area; then means over blocks of queries."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    rows = []
    for i in range(n_queries):
        position = n_keys - n_queries + i
        start = local_start(i // (block_size * step), n_queries, n_keys, block_size, step)
        area = [j for j in range(position + 1) if j < block_size or j >= start]
        logits = torch.einsum("bhd,bhnd->bhn", q[:, :, i].float(), keys[:, :, area]) * scale
        rows.append(logits.amax(-1))
    blocks = torch.split(torch.stack(rows, -1), block_size, dim=-1)
    return torch.stack([block.mean(-1) for block in blocks], -1)


def stripes(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    anchors: Float[Tensor, "B Hq Mq"],
    block_size: int,
    step: int,
    theta: float,
    limit: int,
    scale: float,
) -> tuple[Int[Tensor, "B Hq G"], Int[Tensor, "B Hq G L"]]:
    """One group at a time, one key at a time."""
    B, Hq, n_queries, _ = q.shape
    n_keys, per_kv = k.shape[2], Hq // k.shape[1]
    groups, limit = n_groups(n_queries, block_size, step), min(limit, n_keys)
    levels = thresholds(theta).tolist()
    counts = torch.zeros(B, Hq, groups, dtype=torch.int32, device=q.device)
    indices = torch.zeros(B, Hq, groups, limit, dtype=torch.int32, device=q.device)
    for b in range(B):
        for h in range(Hq):
            for g in range(groups):
                margin: dict[int, float] = {}
                for j in range(block_size, local_start(g, n_queries, n_keys, block_size, step)):
                    key = k[b, h // per_kv, j].float()
                    each = []
                    for u in range(g * step, min((g + 1) * step, anchors.shape[2])):
                        mean = q[b, h, u * block_size : (u + 1) * block_size].float().mean(0)
                        difference = float(anchors[b, h, u] - (mean * scale) @ key)
                        finite = abs(difference) < float("inf")  # False for NaN
                        each.append(difference if finite else float("-inf"))
                    margin[j] = min(each)
                for level in range(LEVELS):
                    chosen = [j for j, m in margin.items() if m <= levels[level]]
                    if len(chosen) <= limit:
                        break
                chosen = chosen[max(0, len(chosen) - limit) :]  # the nearest, where no level fits
                counts[b, h, g] = len(chosen)
                indices[b, h, g, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return counts, indices
