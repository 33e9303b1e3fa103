"""The estimators in whole-tensor PyTorch, on the CPU and on GPUs: all heads at once, no synchronisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sparseland.patterns import visible_blocks


def mean_pool(x: Float[Tensor, "B H N D"], block_size: int) -> Float[Tensor, "B H M D"]:
    """Means of the full blocks, and of what is left."""
    full = x.shape[2] // block_size * block_size
    pooled = torch.unflatten(x[:, :, :full], 2, (-1, block_size)).mean(3, dtype=torch.float32)
    if full == x.shape[2]:
        return pooled
    rest = x[:, :, full:].mean(2, keepdim=True, dtype=torch.float32)
    return torch.cat((pooled, rest), dim=2)


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
    """One product of pooled queries and pooled keys, for all heads."""
    scores = _grouped_product(q * scale, k)
    visible = visible_blocks(n_queries, n_keys, block_size, q.device)
    scores.masked_fill_(~visible, -torch.inf)
    return scores.softmax(-1) if normalise else scores


def probe_probabilities(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], n_probe: int, scale: float
) -> Float[Tensor, "B Hq L Nk"]:
    """One product of the last queries and all keys, then softmax; only the last L x L corner is masked."""
    n_probe = min(n_probe, q.shape[2])
    scores = _grouped_product(q[:, :, -n_probe:], k) * scale
    future = torch.ones(n_probe, n_probe, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -n_probe:].masked_fill_(future, -torch.inf)
    return scores.softmax(-1)


def vertical_slash_scores(
    probabilities: Float[Tensor, "B H L Nk"],
) -> tuple[Float[Tensor, "B H Nk"], Float[Tensor, "B H Nk"]]:
    """Column sums, and sums of a view whose columns are the diagonals (a row stride of Nk + 1)."""
    n_probe, n_keys = probabilities.shape[2:]
    p = probabilities.contiguous()
    # Diagonal c = j - i for c >= 0, which starts in row 0: offsets Nk - L down to 0.
    strides = (p.stride(0), p.stride(1), n_keys + 1, 1)
    whole = p.as_strided((*p.shape[:3], n_keys - n_probe + 1), strides).sum(2)
    # Diagonals that start below row 0, of the leftmost L - 1 columns: offsets Nk - 1 down to Nk - L + 1.
    width = 2 * (n_probe - 1)
    corner = F.pad(p[..., : n_probe - 1], (n_probe - 1, 0))
    strides = (corner.stride(0), corner.stride(1), width + 1, 1)
    cut = corner.as_strided((*p.shape[:3], n_probe - 1), strides).sum(2)
    return p.sum(2), torch.cat((cut, whole), dim=-1).flip(-1)


def probe_vertical_slash(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], n_probe: int, scale: float
) -> tuple[Float[Tensor, "B Hq Nk"], Float[Tensor, "B Hq Nk"]]:
    """The two steps one after the other; holds all L x Nk probabilities of all heads."""
    return vertical_slash_scores(probe_probabilities(q, k, n_probe, scale))


def probe_sums(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], n_probe: int, block_size: int, scale: float
) -> tuple[Float[Tensor, "2 B Hq Nk"], Float[Tensor, "2 B Hq Mk"]]:
    """The sums of tokens side by side, then those of blocks."""
    tokens = torch.stack(probe_vertical_slash(q, k, n_probe, scale))
    padded = F.pad(tokens, (0, -tokens.shape[-1] % block_size))
    return tokens, torch.unflatten(padded, -1, (-1, block_size)).sum(-1)


def probe_distance(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Mk D"],
    true: Float[Tensor, "B Hq Mk"],
    n_probe: int,
    scale: float,
) -> Float[Tensor, "B Hq"]:
    """One small product, then the distance of two distributions."""
    n_probe = min(n_probe, q.shape[2])
    mean = q[:, :, -n_probe:].mean(2, keepdim=True, dtype=torch.float32)
    guess = (_grouped_product(mean, k)[:, :, 0] * scale).softmax(-1)
    return js_distance(guess, true / n_probe)


def js_distance(p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Square root of the Jensen-Shannon divergence in nats, in [0, sqrt(ln 2)]; zeros are allowed."""
    m = (p + q) / 2
    # Where m is 0, p and q are too and xlogy(0, 0) is 0 on both sides.
    divergence = sum((torch.xlogy(a, a) - torch.xlogy(a, m)).sum(-1) for a in (p, q)) / 2
    assert isinstance(divergence, Tensor)
    return divergence.clamp(min=0).sqrt()


def _grouped_product(
    q: Float[Tensor, "B Hq Mq D"], k: Float[Tensor, "B Hkv Mk D"]
) -> Float[Tensor, "B Hq Mq Mk"]:
    """q . k in float32 with grouped heads: the queries of a group are rows of one product per key head."""
    B, Hkv, Mk, D = k.shape
    rows = q.reshape(B * Hkv, -1, D)
    if q.is_cuda and q.dtype != torch.float32:
        # Tensor cores take half-precision factors and give float32 sums; a cast of K would double it.
        product = torch.bmm(rows, k.reshape(B * Hkv, Mk, D).mT, out_dtype=torch.float32)
    else:
        product = torch.bmm(rows.float(), k.reshape(B * Hkv, Mk, D).float().mT)
    return product.view(*q.shape[:3], Mk)
