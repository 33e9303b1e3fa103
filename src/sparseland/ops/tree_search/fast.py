"""The beam search in whole-tensor PyTorch: all heads and many query blocks at once, no synchronisation.

Two ways to score, for the same result: products with the representatives' gathered keys, ``O(log)`` of them
per query block; or, where the keys are few, one product with all keys, from which scores are looked up: a
plain product is several times as fast per pair as a gathered one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.ops.tree_search import n_stages

# Elements of the largest temporary: products of the query blocks that are searched together.
_ELEMENTS = 1 << 22
# A product with all keys is preferred while they are at most so many times the gathered ones.
_TABLE = 4

Scores = Callable[[Int[Tensor, "B H m K"]], Float[Tensor, "B H m K"]]


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
    """See :func:`sparseland.ops.tree_search.tree_search`; positions only."""
    batch, n_heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    heads, M = kv_heads if shared else n_heads, first.shape[1]
    rows = _scoring_rows(q, block_q, stride, kv_heads, shared)  # [B, H, M, R, D]
    # Rows that fill up the last block must not vote.
    position = torch.arange(0, block_q, stride, device=q.device) + (M - 1) * block_q
    absent = (position >= n_queries).repeat(rows.shape[3] // len(position))
    stages = n_stages(n_keys // block_k, keep)
    table = n_keys <= _TABLE * keep * block_k * (stages + 1)
    per_block = rows.shape[3] * n_keys if table else keep * block_k * max(dim, rows.shape[3])
    step = max(1, _ELEMENTS // (batch * heads * per_block))
    out = torch.empty(batch, heads, M, keep, dtype=torch.int32, device=q.device)
    for i in range(0, M, step):
        part = slice(i, i + step)
        origin, B = first[:, None, part, None].long(), blocks[:, None, part, None].long()
        hidden = absent if i + step >= M and n_queries % block_q else None
        if table:
            # On the CPU, where asking costs nothing, the table ends with the last key that is searched.
            end = n_keys if q.is_cuda else min(n_keys, max(1, int((origin + B * block_k).max())))
            scores = _by_table(rows[:, :, part], k, hidden, origin, block_k, end)
        else:
            scores = _by_gathering(rows[:, :, part], k, hidden, origin, block_k)
        found = _search(scores, B, keep, heads, stages)
        listed = torch.arange(keep, device=q.device) < B
        out[:, :, part] = torch.where(listed, origin + found * block_k, 0).to(torch.int32)
    return out


def _scoring_rows(
    q: Float[Tensor, "B Hq Nq D"], block_q: int, stride: int, kv_heads: int, shared: bool
) -> Float[Tensor, "B H M R D"]:
    """The queries that score, float32: every stride-th of each block, of all heads that search together."""
    padded = F.pad(q, (0, 0, 0, -q.shape[2] % block_q))
    rows = torch.unflatten(padded, 2, (-1, block_q))[:, :, :, ::stride].float()
    if not shared:
        return rows
    return torch.unflatten(rows, 1, (kv_heads, -1)).transpose(2, 3).flatten(3, 4)


def _search(
    scores: Scores, B: Int[Tensor, "B 1 m 1"], keep: int, heads: int, stages: int
) -> Int[Tensor, "B H m K"]:
    """The found blocks, ascending; the first B of the result where B is at most ``keep``.

    Query blocks with fewer keys are through earlier; on single blocks a further stage changes nothing.
    """
    i = torch.arange(keep + 1, device=B.device)
    few = keep >= B  # their scores are never used
    edges = torch.where(few, i, i * B // keep).expand(B.shape[0], heads, -1, -1)
    start, size = edges[..., :-1], edges.diff(dim=-1)
    if not stages:
        return start
    # Of the first half and its segment the representative is the same.
    score = scores(torch.where(few, 0, start))
    for _ in range(stages):
        half = size // 2
        other = scores(torch.where(few, 0, start + half))
        # A single block stays whole, as the second of its halves.
        halves = torch.stack((score.masked_fill(half == 0, -torch.inf), other), -1).flatten(-2)
        starts = torch.stack((start, start + half), -1).flatten(-2)
        sizes = torch.stack((half, size - half), -1).flatten(-2)
        kept = _best(halves, keep)
        score, size = halves.gather(-1, kept), sizes.gather(-1, kept)
        start = torch.where(few, start, starts.gather(-1, kept))
        size = torch.where(few, 1, size)
    return start


def _by_table(
    rows: Float[Tensor, "B H m R D"],
    k: Float[Tensor, "B Hkv Nk D"],
    absent: Bool[Tensor, " R"] | None,
    origin: Int[Tensor, "B 1 m 1"],
    block_k: int,
    end: int,
) -> Scores:
    """Scores looked up in the products with all keys before ``end``."""
    B, H, m, R, _ = rows.shape
    k = k[:, :, :end].float()
    products = rows.reshape(B, k.shape[1], -1, rows.shape[4]) @ k.transpose(-1, -2)
    peak = _peak(products.view(B, H, m, R, end), absent)

    def scores(block: Int[Tensor, "B H m K"]) -> Float[Tensor, "B H m K"]:
        key = origin + block * block_k
        # Only a query block that searches nothing can ask for keys behind the last.
        parts = [peak.gather(-1, (key + t).clamp(max=end - 1)) for t in range(block_k)]
        return torch.stack(parts).amax(0) if block_k > 1 else parts[0]

    return scores


def _by_gathering(
    rows: Float[Tensor, "B H m R D"],
    k: Float[Tensor, "B Hkv Nk D"],
    absent: Bool[Tensor, " R"] | None,
    origin: Int[Tensor, "B 1 m 1"],
    block_k: int,
) -> Scores:
    """Scores from products with the keys that are asked for."""
    B, H, m = rows.shape[:3]
    kv_heads, n_keys, D = k.shape[1:]
    k_rows = k.reshape(-1, D)
    row = torch.arange(B, device=k.device)[:, None]
    base = (row * kv_heads + torch.arange(H, device=k.device) // (H // kv_heads)) * n_keys
    within = torch.arange(block_k, device=k.device)

    def scores(block: Int[Tensor, "B H m K"]) -> Float[Tensor, "B H m K"]:
        key = ((origin + block * block_k)[..., None] + within).clamp(max=n_keys - 1)
        key += base[:, :, None, None, None]
        keys = k_rows.index_select(0, key.flatten()).view(B, H, m, -1, D).float()
        peak = _peak(rows @ keys.transpose(-1, -2), absent)
        return torch.unflatten(peak, -1, (-1, block_k)).amax(-1)

    return scores


def _peak(
    products: Float[Tensor, "B H m R n"], absent: Bool[Tensor, " R"] | None
) -> Float[Tensor, "B H m n"]:
    """Largest over the queries; finite, and lowest where it is not a number. Overwrites.

    ``absent``: queries that the last query block lacks.
    """
    largest = torch.finfo(torch.float32).max
    if absent is not None:
        products[:, :, -1].masked_fill_(absent[:, None], -largest)
    peak = products.amax(-2)
    # One NaN hides the others of its key: only then all products are looked at once more.
    if peak.device.type != "cpu" or bool(peak.isnan().any()):
        peak = products.nan_to_num_(-largest, largest, -largest).amax(-2)
    return peak.clamp_(-largest, largest)


def _best(scores: Float[Tensor, "*B n"], keep: int) -> Int[Tensor, "*B keep"]:
    """Places of the ``keep`` largest, ascending; ties to the earlier. Faster than sorting twice."""
    least = scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tie = scores > least, scores == least
    taken = above | (tie & (tie.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))
    target = torch.where(taken, taken.cumsum(-1) - 1, keep)  # the rest goes to a place that is cut off
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(target)
    return place.new_empty(*scores.shape[:-1], keep + 1).scatter_(-1, target, place)[..., :keep]
