"""Per-token block lists on CPU: gather what a tile of queries lists together, then batched matrix products.

A tile's rows are its tokens times the query heads of the list; its keys are the union of the tokens' lists
followed by the window, and a mask of whole blocks tells the tokens apart. Tiles of nearly equal work share a
batch whose scores stay in the cache. The gradients walk the same batches, on any device. Nothing is N x N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.patterns import cdiv

# Bytes of scores held at once: about the last-level cache that two cores share on a laptop.
_SCORE_BYTES = 3 << 20
# Tiles whose numbers of blocks lie within this ratio share a batch.
_PADDING = 1 / 12


@dataclass(frozen=True)
class _Batch:
    """Tiles that are computed together.

    Args:
        which: the tiles, among all of all rows and lists.
        blocks: their key blocks, among all blocks of all rows and key heads; padding in front.
        hidden: blocks that a token does not see (padding included).
        future: keys of the last blocks that come after a token.
    """

    which: Int[Tensor, " n"]
    blocks: Int[Tensor, "n L"]
    hidden: Bool[Tensor, "n tile L"]
    future: Bool[Tensor, "n tile tail"]

    def hide(self, scores: Float[Tensor, "n rows keys"]) -> None:
        """Set what is not seen to -inf, in place."""
        n, tile, length = self.hidden.shape
        scores.view(n, tile, -1, length, scores.shape[2] // length).masked_fill_(
            self.hidden[:, :, None, :, None], -math.inf
        )
        tail = self.future.shape[2]
        scores.view(n, tile, -1, scores.shape[2])[..., -tail:].masked_fill_(
            self.future[:, :, None], -math.inf
        )


def _batches(
    counts: Int[Tensor, "B Hl T"],
    indices: Int[Tensor, "B Hl T L"],
    members: Int[Tensor, "B Hl T L"],
    block_size: int,
    window: int,
    tile: int,
    n_queries: int,
    n_keys: int,
    kv_heads: int,
    group: int,
    max_scores: int,
) -> Iterator[_Batch]:
    """All tiles, a batch at a time, by growing number of blocks."""
    batch, lists, tiles = counts.shape
    device, size = counts.device, block_size
    row = torch.arange(batch * lists * tiles, device=device)
    first = (row % tiles) * tile + n_keys - n_queries
    last = (first + tile - 1).clamp(max=n_keys - 1)
    start = (first // size - window + 1).clamp(min=0)  # first block of the window
    near = last // size - start + 1
    far = counts.reshape(-1)
    head = row // tiles
    key_head = (head // lists) * kv_heads + head % lists // (lists // kv_heads)
    indices, members = (t.reshape(row.numel(), -1) for t in (indices, members))

    total = far + near
    order = total.argsort(stable=True)
    lengths = total[order].tolist()
    # The blocks of a tile's tokens: those that need the causal mask stand at the end.
    tail = min(cdiv(n_keys, size), (tile + size - 2) // size + 1)
    token = torch.arange(tile, device=device)
    at = 0
    while at < len(lengths):
        limit = lengths[at] + int(lengths[at] * _PADDING)
        end = at + 1
        per_block = tile * group * size
        while (
            end < len(lengths)
            and lengths[end] <= limit
            and (end + 1 - at) * lengths[end] * per_block <= max_scores
        ):
            end += 1
        which = order[at:end]
        length = max(lengths[end - 1], tail)
        place = torch.arange(length, device=device) - (length - total[which])[:, None]  # < 0: padding
        in_list = (place >= 0) & (place < far[which, None])
        beyond = place - far[which, None] + start[which, None]
        blocks = beyond.clamp(min=0)
        bits = torch.zeros_like(blocks)
        if indices.shape[1]:
            spot = place.clamp(0, indices.shape[1] - 1)
            blocks = torch.where(in_list, indices[which].long().gather(1, spot), blocks)
            bits = torch.where(in_list, members[which].long().gather(1, spot), bits)
        position = (first[which, None] + token).clamp(max=n_keys - 1)
        own = (position // size)[:, :, None]
        listed = ((bits[:, None] >> token[:, None]) & 1).bool()
        local = (place >= far[which, None])[:, None] & (blocks[:, None] > own - window)
        hidden = ~(listed | (local & (blocks[:, None] <= own)))
        key = (blocks[:, -tail:, None] * size + torch.arange(size, device=device)).flatten(1)
        future = key[:, None] > position[:, :, None]
        yield _Batch(which, blocks + key_head[which, None] * cdiv(n_keys, size), hidden, future)
        at = end


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    counts: Int[Tensor, "b Hl T"],
    indices: Int[Tensor, "b Hl T L"],
    members: Int[Tensor, "b Hl T L"],
    block_size: int,
    window: int,
    tile: int,
    scale: float,
    need_lse: bool = True,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp (an empty tensor unless ``need_lse``)."""
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    counts, indices, members = (t.expand(batch, *t.shape[1:]) for t in (counts, indices, members))
    group = heads // counts.shape[1]
    keys, values = (_blocks(t, block_size) for t in (k, v))
    queries = _tiles(q, tile, group)
    # Scaling the queries is free; where it would round them, the scores are scaled instead.
    scale_queries = q.dtype == torch.float32 or math.frexp(scale)[0] == 0.5
    if scale_queries:
        queries = queries * scale
    out = torch.empty_like(queries)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty(queries.shape[:2] if need_lse else (0,), dtype=dtype)
    sizes = (block_size, window, tile, n_queries, n_keys, kv_heads, group)
    for part in _batches(counts, indices, members, *sizes, _SCORE_BYTES // q.element_size()):
        n, length = part.blocks.shape
        k_part, v_part = (
            t.index_select(0, part.blocks.flatten()).view(n, length * block_size, dim) for t in (keys, values)
        )
        s = torch.bmm(queries[part.which], k_part.transpose(1, 2))
        if not scale_queries:
            s.mul_(scale)
        part.hide(s)
        if need_lse:
            lse[part.which] = s.to(dtype).logsumexp(-1)
        out[part.which] = torch.bmm(torch.softmax(s, -1), v_part)
    out = _untile(out, tile, group, batch, n_queries)
    return out, _untile(lse[..., None], tile, group, batch, n_queries)[..., 0] if need_lse else lse


def backward(
    d_out: Float[Tensor, "B Hq Nq D"],
    d_lse: Float[Tensor, "B Hq Nq"],
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    out: Float[Tensor, "B Hq Nq D"],
    lse: Float[Tensor, "B Hq Nq"],
    counts: Int[Tensor, "b Hl T"],
    indices: Int[Tensor, "b Hl T L"],
    members: Int[Tensor, "b Hl T L"],
    block_size: int,
    window: int,
    tile: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hkv Nk D"], Float[Tensor, "B Hkv Nk D"]]:
    """Gradients of q, k and v in their own types; sums are kept in fp32 (fp64 for fp64 inputs).

    With p = exp(s - lse) and delta = rowsum(do * out) - dlse::

        dv = p^T do      dp = do v^T      ds = p * (dp - delta)      dq = ds k      dk = ds^T q
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    counts, indices, members = (t.expand(batch, *t.shape[1:]) for t in (counts, indices, members))
    group = heads // counts.shape[1]
    keys, values = (_blocks(t, block_size) for t in (k, v))
    queries, d_outs = (_tiles(t, tile, group) for t in (q, d_out))
    delta = (d_out.to(dtype) * out.to(dtype)).sum(-1) - d_lse.to(dtype)
    deltas = _tiles(delta[..., None], tile, group)
    lses = _tiles(lse.to(dtype)[..., None], tile, group, math.inf)  # rows behind the last: p = 0
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros(keys.shape, dtype=dtype, device=k.device) for _ in range(2))
    sizes = (block_size, window, tile, n_queries, n_keys, kv_heads, group)
    for part in _batches(counts, indices, members, *sizes, _SCORE_BYTES // 4):
        n, length = part.blocks.shape
        flat = part.blocks.flatten()
        k_i, v_i = (t[flat].view(n, length * block_size, dim).to(dtype) for t in (keys, values))
        q_i, do_i = (t[part.which].to(dtype) for t in (queries, d_outs))
        s = q_i @ k_i.transpose(1, 2) * scale
        part.hide(s)
        p = (s - lses[part.which]).exp()
        ds = p * (do_i @ v_i.transpose(1, 2) - deltas[part.which])
        dq[part.which] = (ds @ k_i * scale).to(q.dtype)
        for total, share in ((dk, ds.transpose(1, 2) @ q_i * scale), (dv, p.transpose(1, 2) @ do_i)):
            total.index_add_(0, flat, share.reshape(n * length, -1))
    dk, dv = (t.view(batch, kv_heads, -1, dim)[:, :, :n_keys] for t in (dk, dv))
    return _untile(dq, tile, group, batch, n_queries), dk.to(k.dtype), dv.to(v.dtype)


def _blocks(x: Float[Tensor, "B H N D"], size: int) -> Float[Tensor, "M size_D"]:
    """All rows' and heads' key blocks in one dimension, the last of each padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    return padded.reshape(-1, size * x.shape[3])


def _tiles(
    x: Float[Tensor, "B Hq Nq D"], tile: int, group: int, behind: float = 0.0
) -> Float[Tensor, "R rows D"]:
    """Tiles of all rows and lists in one dimension; a tile's rows are its tokens, each with its heads."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % tile), value=behind)
    split = torch.unflatten(torch.unflatten(padded, 2, (-1, tile)), 1, (-1, group))  # [B, Hl, g, T, tile, D]
    return split.permute(0, 1, 3, 4, 2, 5).reshape(-1, tile * group, x.shape[3])


def _untile(
    x: Float[Tensor, "R rows D"], tile: int, group: int, batch: int, n: int
) -> Float[Tensor, "B Hq Nq D"]:
    """The inverse of :func:`_tiles`."""
    tiles = cdiv(n, tile)
    split = x.reshape(batch, -1, tiles, tile, group, x.shape[2]).permute(0, 1, 4, 2, 3, 5)
    return split.reshape(batch, -1, tiles * tile, x.shape[2])[:, :, :n].contiguous()
