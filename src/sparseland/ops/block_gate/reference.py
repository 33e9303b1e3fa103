"""Both in whole-tensor PyTorch: what the kernels must equal, and fast enough for CPUs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.ops.rotary import turn_back


def pool(
    x: Float[Tensor, "B H N D"],
    cos: Float[Tensor, "N R2"],
    sin: Float[Tensor, "N R2"],
    block_size: int,
    extremes: bool,
) -> Float[Tensor, "B H M C"]:
    """The full blocks at once, and what is left."""
    x = x.float()
    if cos.shape[1]:
        x = turn_back(x, cos, sin)
    full = x.shape[2] // block_size * block_size
    parts = [_pooled(torch.unflatten(x[:, :, :full], 2, (-1, block_size)), extremes)]
    if full < x.shape[2]:
        parts.append(_pooled(x[:, :, None, full:], extremes))
    return torch.cat(parts, dim=2)


def _pooled(x: Float[Tensor, "B H M b D"], extremes: bool) -> Float[Tensor, "B H M C"]:
    mean = x.mean(3)
    return torch.cat((x.amax(3), x.amin(3), mean), dim=-1) if extremes else mean


def write_lists(
    scores: Float[Tensor, "B H m n"],
    counts: Int[Tensor, "B H m"],
    indices: Int[Tensor, "B H m L"],
    first: int,
    rows: int,
    n_queries: int,
    n_keys: int,
    block_size: int,
    threshold: float,
    top: int,
    dense_rows: int,
) -> None:
    """Lists of the query blocks ``first, first + 1, …`` of ``rows``, from their scores."""
    rule = (threshold, top, dense_rows)
    keep = kept(scores, first, rows, n_queries, n_keys, block_size, *rule, indices.shape[-1])
    width = min(indices.shape[-1], keep.shape[-1])
    counts.copy_(keep.sum(-1))
    # Stable sort of "not kept" puts the kept blocks first, in ascending order.
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    indices[..., :width] = order[..., :width]


def kept(
    scores: Float[Tensor, "B H m n"],
    first: int,
    rows: int,
    n_queries: int,
    n_keys: int,
    block_size: int,
    threshold: float,
    top: int,
    dense_rows: int,
    width: int,
) -> Bool[Tensor, "B H m n"]:
    """The blocks that each row keeps."""
    device, offset = scores.device, n_keys - n_queries
    row = torch.arange(first, first + scores.shape[2], device=device)[:, None]
    column = torch.arange(scores.shape[3], device=device)
    start = row * block_size + offset
    last = torch.clamp(start + block_size, max=n_keys) - 1
    seen = column * block_size <= last
    own = seen & (column >= start // block_size)
    before = seen & ~own
    odd = ~scores.isfinite()
    if top:
        rank = scores.masked_fill(odd, torch.inf).masked_fill(~before, -torch.inf)
        order = rank.argsort(dim=-1, descending=True, stable=True)
        taken = torch.arange(order.shape[-1], device=device) < top - own.sum(-1, keepdim=True)
        keep = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, taken.expand(order.shape))
    else:
        # A row without a finite score is NaN here, which exceeds nothing.
        keep = (scores.masked_fill(odd | ~seen, -torch.inf).softmax(-1) > threshold) | odd
    keep = (keep | (row >= rows - dense_rows)) & before
    # Only scores that are not finite can be more than a list has room for.
    return (keep & (keep.cumsum(-1) <= width - own.sum(-1, keepdim=True))) | own
