"""The beam search as it reads, one query block at a time."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.tree_search import n_stages


def tree_search(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    first: Int[Tensor, "B M"],
    blocks: Int[Tensor, "B M"],
    block_q: int,
    block_k: int,
    keep: int,
    stride: int,
    shared: bool,
) -> Int[Tensor, "B H M n"]:
    """Positions of the found blocks' first keys, ascending; 0 behind the last."""
    kv_heads = k.shape[1]
    grouped = torch.unflatten(q, 1, (kv_heads, -1))  # [B, Hkv, G, Nq, D]
    heads = kv_heads if shared else q.shape[1]
    starts = torch.zeros(q.shape[0], heads, first.shape[1], keep, dtype=torch.int32, device=q.device)
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in starts.shape[:3])).view(-1, 3).tolist():
        rows = slice(m * block_q, (m + 1) * block_q, stride)
        if shared:
            queries, keys = grouped[b, h, :, rows].flatten(0, 1), k[b, h]
        else:
            queries, keys = q[b, h, rows], k[b, h // (q.shape[1] // kv_heads)]
        origin, B = int(first[b, m]), int(blocks[b, m])
        found = _search(queries.float(), keys[origin : origin + B * block_k].float(), block_k, keep)
        starts[b, h, m, : len(found)] = (found * block_k + origin).to(torch.int32)
    return starts


def _search(
    q: Float[Tensor, "rows D"], k: Float[Tensor, "n D"], block_k: int, keep: int
) -> Int[Tensor, " found"]:
    """The found blocks of one query block, ascending."""
    B = k.shape[0] // block_k
    if keep >= B:
        return torch.arange(B, device=k.device)
    edges = torch.arange(keep + 1, device=k.device) * B // keep
    start, size = edges[:-1], edges.diff()
    for _ in range(n_stages(B, keep)):
        half = size // 2
        start = torch.stack((start, start + half), 1).flatten()
        size = torch.stack((half, size - half), 1).flatten()
        scores = _scores(q, k, start, block_k).masked_fill(size == 0, -math.inf)
        kept = scores.argsort(descending=True, stable=True)[:keep].sort().values
        start, size = start[kept], size[kept]
    return start


def _scores(
    q: Float[Tensor, "rows D"], k: Float[Tensor, "n D"], block: Int[Tensor, " halves"], block_k: int
) -> Float[Tensor, " halves"]:
    """Largest product of a query with a key of each block; finite, and lowest where it is not a number."""
    key = block[:, None] * block_k + torch.arange(block_k, device=k.device)
    largest = torch.finfo(torch.float32).max
    scores = torch.einsum("rd,hkd->hkr", q, k[key]).nan_to_num(-largest)
    return scores.amax((1, 2)).clamp(-largest, largest)
