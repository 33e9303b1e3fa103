"""The estimators by loops and definitions: slow, for small tests."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mean_pool(x: Float[Tensor, "B H N D"], block_size: int) -> Float[Tensor, "B H M D"]:
    """Mean of each block's tokens, block by block."""
    starts = range(0, x.shape[2], block_size)
    return torch.stack([x[:, :, start : start + block_size].float().mean(2) for start in starts], dim=2)


def pooled_scores(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], block_size: int, scale: float
) -> Float[Tensor, "B Hq Mq Mk"]:
    """Pooled query block . pooled key block, one pair at a time."""
    offset, groups = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    q_pooled, k_pooled = mean_pool(q, block_size), mean_pool(k, block_size)
    scores = q_pooled.new_full((*q_pooled.shape[:3], k_pooled.shape[2]), -torch.inf)
    for i in range(q_pooled.shape[2]):
        last_query = min((i + 1) * block_size, q.shape[2]) - 1 + offset
        for j in range(k_pooled.shape[2]):
            if j * block_size <= last_query:
                key = k_pooled[:, :, j].repeat_interleave(groups, dim=1)
                scores[:, :, i, j] = (q_pooled[:, :, i] * key).sum(-1) * scale
    return scores


def probe_probabilities(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], n_probe: int, scale: float
) -> Float[Tensor, "B Hq L Nk"]:
    """Causal softmax, one query at a time over the keys up to its own position."""
    n_keys, groups = k.shape[2], q.shape[1] // k.shape[1]
    n_probe = min(n_probe, q.shape[2])
    keys = k.float().repeat_interleave(groups, dim=1)
    result = keys.new_zeros(*q.shape[:2], n_probe, n_keys)
    for i in range(n_probe):
        seen = n_keys - n_probe + i + 1
        query = q[:, :, q.shape[2] - n_probe + i].float()
        scores = torch.einsum("bhd,bhnd->bhn", query, keys[:, :, :seen]) * scale
        result[:, :, i, :seen] = scores.softmax(-1)
    return result


def vertical_slash_scores(
    probabilities: Float[Tensor, "B H L Nk"],
) -> tuple[Float[Tensor, "B H Nk"], Float[Tensor, "B H Nk"]]:
    """Sums by column, and by distance: entry (i, j) goes to offset ``(Nk - L + i) - j``."""
    n_probe, n_keys = probabilities.shape[2:]
    slash = torch.zeros_like(probabilities[:, :, 0])
    for i in range(n_probe):
        position = n_keys - n_probe + i
        for j in range(position + 1):
            slash[:, :, position - j] += probabilities[:, :, i, j]
    return probabilities.sum(2), slash


def probe_vertical_slash(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], n_probe: int, scale: float
) -> tuple[Float[Tensor, "B Hq Nk"], Float[Tensor, "B Hq Nk"]]:
    """The two steps one after the other."""
    return vertical_slash_scores(probe_probabilities(q, k, n_probe, scale))


def probe_sums(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], n_probe: int, block_size: int, scale: float
) -> tuple[Float[Tensor, "2 B Hq Nk"], Float[Tensor, "2 B Hq Mk"]]:
    """Sums by column and distance, then block by block."""
    tokens = torch.stack(probe_vertical_slash(q, k, n_probe, scale))
    starts = range(0, tokens.shape[-1], block_size)
    return tokens, torch.stack([tokens[..., i : i + block_size].sum(-1) for i in starts], dim=-1)


def pooled_map(
    q: Float[Tensor, "B Hq Mq D"],
    k: Float[Tensor, "B Hkv Mk D"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    scale: float,
    normalise: bool,
    active: Bool[Tensor, "B Hq"] | None = None,
) -> Float[Tensor, "B Hq Mq Mk"]:
    """Row by row over the key blocks that begin no later than the row's last query."""
    groups = q.shape[1] // k.shape[1]
    fill = 0.0 if normalise else -torch.inf
    scores = q.new_full((*q.shape[:3], k.shape[2]), fill)
    for r in range(q.shape[2]):
        last = min((r + 1) * block_size, n_queries) - 1 + n_keys - n_queries
        keys = k[:, :, : last // block_size + 1].repeat_interleave(groups, dim=1)
        row = torch.einsum("bhd,bhnd->bhn", q[:, :, r], keys) * scale
        scores[:, :, r, : keys.shape[2]] = row.softmax(-1) if normalise else row
    return scores


def probe_distance(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Mk D"],
    true: Float[Tensor, "B Hq Mk"],
    n_probe: int,
    scale: float,
) -> Float[Tensor, "B Hq"]:
    """The definition, term by term."""
    n_probe = min(n_probe, q.shape[2])
    out = q.new_zeros(q.shape[:2], dtype=torch.float32)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            mean = q[b, h, -n_probe:].double().mean(0)
            logits = k[b, h // (q.shape[1] // k.shape[1])].double() @ mean * scale
            divergence = 0.0
            for p, t in zip(logits.softmax(-1).tolist(), true[b, h].tolist(), strict=True):
                middle = (p + t / n_probe) / 2
                divergence += sum(a * math.log(a / middle) for a in (p, t / n_probe) if a > 0) / 2
            out[b, h] = math.sqrt(max(divergence, 0))
    return out
