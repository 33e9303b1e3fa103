"""Anchors and stripes in whole-tensor PyTorch, on the CPU and on GPUs: all heads at once, nothing N x N.

Loops run over query blocks and over pieces of groups; nothing synchronises with the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.ops.block_scores import mean_pool
from sparseland.ops.stripe_scores.areas import (
    LEVELS,
    fitting_level,
    local_start,
    local_starts,
    n_groups,
    thresholds,
    usable,
)
from sparseland.patterns import cdiv

# Float32 scores of pooled queries held at once.
_SCORES = 1 << 25


def anchors(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], block_size: int, step: int, scale: float
) -> Float[Tensor, "B Hq Mq"]:
    """One product per query block: its rows against block 0 and the group's local keys."""
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys = k.shape[1], k.shape[2]
    offset, size = n_keys - n_queries, block_size
    half = q.is_cuda and q.dtype != torch.float32
    keys = k.reshape(B * Hkv, n_keys, D) if half else k.reshape(B * Hkv, n_keys, D).float()
    blocks = cdiv(n_queries, size)
    maxima = q.new_empty(B, Hq, blocks, dtype=torch.float32)
    for u in range(blocks):
        rows = q[:, :, u * size : (u + 1) * size]
        n, first = rows.shape[2], offset + u * size
        rows = rows.reshape(B * Hkv, -1, D)
        start = local_start(u // step, n_queries, n_keys, size, step)
        local = _product(rows, keys[:, start : first + n], half)
        # Only the last n keys can lie after a row.
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        local.view(-1, local.shape[1] // n, n, local.shape[2])[..., -n:].masked_fill_(future, -torch.inf)
        peak = local.amax(-1)
        if start:
            peak = peak.maximum(_product(rows, keys[:, : min(size, start)], half).amax(-1))
        maxima[:, :, u] = peak.reshape(B, Hq, n).mean(-1)
    return maxima * scale


def _product(
    rows: Float[Tensor, "b R D"], keys: Float[Tensor, "b n D"], half: bool
) -> Float[Tensor, "b R n"]:
    """Logits in float32; half-precision factors stay what they are on a GPU."""
    if half:
        return torch.bmm(rows, keys.mT, out_dtype=torch.float32)
    return torch.bmm(rows.float(), keys.mT)


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
    """Pooled queries of some groups against all keys, the best block of each group, lists; piece by piece."""
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys = k.shape[1], k.shape[2]
    groups, limit = n_groups(n_queries, block_size, step), min(limit, n_keys)
    short = groups * step - anchors.shape[2]
    # Blocks that a last group lacks are never selected: their anchors are out of reach.
    anchor = F.pad(usable(anchors), (0, short), value=torch.finfo(torch.float32).max)
    pooled = F.pad(mean_pool(q, block_size) * scale, (0, 0, 0, short))
    pooled = pooled.reshape(B * Hkv, Hq // Hkv, groups, step, D)
    anchor = anchor.reshape(B * Hkv, Hq // Hkv, groups, step)
    keys = k.reshape(B * Hkv, n_keys, D).float().mT
    starts = local_starts(n_queries, n_keys, block_size, step, q.device)
    counts = q.new_zeros(B, Hq, groups, dtype=torch.int32)
    indices = q.new_zeros(B, Hq, groups, limit, dtype=torch.int32)
    piece = max(1, _SCORES // (B * Hq * step * n_keys))
    for g in range(0, groups, piece):
        end = min(g + piece, groups)
        # Keys that some group of the piece may take.
        width = local_start(end - 1, n_queries, n_keys, block_size, step)
        if width <= block_size:
            continue
        q_bar = pooled[:, :, g:end].reshape(B * Hkv, -1, D)
        low = anchor[:, :, g:end].reshape(B * Hkv, -1, 1)
        excess = torch.baddbmm(-low, q_bar, keys[..., :width]).view(B, Hq, end - g, step, width)
        margin = -excess.amax(3)
        # What can't be compared is kept (NaN or infinite inputs; their own rows are NaN anyway).
        margin.masked_fill_(~margin.isfinite(), -torch.inf)
        key = torch.arange(width, device=q.device)
        between = (key >= block_size) & (key < starts[g:end, None])
        margin.masked_fill_(~between, torch.inf)
        counts[:, :, g:end], indices[:, :, g:end] = _lists(margin, theta, limit)
    return counts, indices


def _lists(
    margin: Float[Tensor, "B H g n"], theta: float, limit: int
) -> tuple[Int[Tensor, "B H g"], Int[Tensor, "B H g L"]]:
    """The keys within the largest threshold that fits."""
    chosen = margin <= theta
    if limit < margin.shape[-1]:
        levels = thresholds(theta, margin.device)
        totals = torch.stack([(margin <= levels[level]).sum(-1) for level in range(LEVELS)], -1)
        chosen = margin <= levels[fitting_level(totals, limit)][..., None]
    return compact(chosen, limit)


def compact(
    chosen: Bool[Tensor, "*batch n"], limit: int
) -> tuple[Int[Tensor, "*batch"], Int[Tensor, "*batch L"]]:
    """Ascending places of the True entries, of more than ``limit`` the last; zeros behind the counts."""
    rank = chosen.cumsum(-1, dtype=torch.int32)
    count = rank[..., -1:].clone()
    place = rank - 1 - (count - limit).clamp(min=0)
    # Everything else goes to an extra place that is cut off again.
    place = torch.where(chosen & (place >= 0), place, limit).long()
    lists = torch.zeros(*chosen.shape[:-1], limit + 1, dtype=torch.int32, device=chosen.device)
    key = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device)
    lists.scatter_(-1, place, key.expand(chosen.shape))
    return count.squeeze(-1).clamp(max=limit), lists[..., :limit]
