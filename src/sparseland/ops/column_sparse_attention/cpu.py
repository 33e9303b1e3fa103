"""Blocks and columns on the CPU: listed keys of many query blocks gathered for one dense kernel call.

Query blocks (of all heads and rows) are sorted by the lengths of their lists; neighbours in that order
go through PyTorch's CPU flash kernel together, as a batch of small dense attentions over gathered keys.
A batch is cut so that its gathered keys stay in the cache and little of it is padding. The additive
mask is one buffer of zeros that is touched only at keys that some row must not see.

Equal lists are gathered once: query heads that share their lists are the heads of one small attention,
and a column list of several query blocks is computed for all of them apart from the blocks, then merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.merge import merge_attention
from sparseland.patterns import cdiv

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Gathered keys per kernel call: 2 + 2 MB of K and V at D = 64 in float32.
_BATCH_KEYS = 8192


def block_column_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    column_size: int,
    block_counts: Int[Tensor, "b h M"],
    block_indices: Int[Tensor, "b h M L"],
    column_counts: Int[Tensor, "b h Mc"],
    column_indices: Int[Tensor, "b h Mc Lc"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp. Extra memory: copies of q, k, v at most, and one batch of gathered keys."""
    blocks, columns = (block_counts, block_indices), (column_counts, column_indices)
    if column_size == block_size:
        return _attend(q, k, v, block_size, blocks, columns, scale)
    parts = [_attend(q, k, v, column_size, _none_like(columns), columns, scale)]
    if block_indices.shape[3]:
        parts.append(_attend(q, k, v, block_size, blocks, _none_like(blocks), scale))
    return merge_attention(parts) if len(parts) > 1 else parts[0]


def _none_like(lists: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Empty lists for all heads and rows."""
    counts, indices = lists
    M = counts.shape[2]
    return counts.new_zeros(1, 1, M), indices.new_empty(1, 1, M, 0)


class _Lists(NamedTuple):
    """The lists, one row per item: batch row, head (or key head) and query block in one dimension."""

    block_counts: Int[Tensor, " I"]
    block_indices: Int[Tensor, "I L"]
    column_counts: Int[Tensor, " I"]
    column_indices: Int[Tensor, "I Lc"]


def _attend(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    size: int,
    blocks: tuple[Int[Tensor, "b h M"], Int[Tensor, "b h M L"]],
    columns: tuple[Int[Tensor, "b h M"], Int[Tensor, "b h M Lc"]],
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    B, Hq, n_queries, D = q.shape
    kv_heads, n_keys, M = k.shape[1], k.shape[2], cdiv(n_queries, size)
    shared = blocks[0].shape[1] == columns[0].shape[1] == 1
    # Query heads of an item, and items per key head.
    G, per_key_head = (Hq // kv_heads, 1) if shared else (1, Hq // kv_heads)
    n_items = B * (Hq // G) * M
    lists = _Lists(
        *(x.expand(B, Hq // G, *x.shape[2:]).reshape(n_items, *x.shape[3:]) for x in (*blocks, *columns))
    )
    item = torch.arange(n_items)
    first_query = item % M * size + (n_keys - n_queries)
    # Where an item's key 0 lies in K as (B * Hkv * Nk, D).
    first_row = item.div(M * per_key_head, rounding_mode="floor") * n_keys
    k_rows, v_rows = k.reshape(-1, D), v.reshape(-1, D)
    padded = F.pad(q, (0, 0, 0, M * size - n_queries))
    q_items = padded.reshape(B, -1, G, M, size, D).transpose(2, 3).reshape(n_items, G, size, D)
    out = torch.empty(n_items, G, size, D, dtype=q.dtype)
    lse = torch.full((n_items, G, size), -torch.inf)

    # What an additive mask hides must be a number.
    kernel = _flash if bool(k.isfinite().all()) else _plain
    rows = torch.arange(size)
    batches = list(_batches(lists, size))
    longest = max((len(batch.items) * batch.width for batch in batches), default=0)
    k_buffer, v_buffer = k_rows.new_empty(longest, D), k_rows.new_empty(longest, D)
    zeros = k_rows.new_zeros(longest * size)
    for batch in batches:
        items, n, width = batch.items, len(batch.items), batch.width
        keys = _keys(batch, size, n_keys, lists)  # (n, W)
        source = (keys.clamp(max=n_keys - 1) + first_row[items, None]).flatten()
        k_batch = torch.index_select(k_rows, 0, source, out=k_buffer[: n * width])
        v_batch = torch.index_select(v_rows, 0, source, out=v_buffer[: n * width])
        mask = zeros[: n * size * width].view(n, 1, size, width)
        query = first_query[items, None, None] + rows[:, None]  # (n, R, 1)
        spans = _hidden_spans(keys, first_query[items, None], batch.padding)
        for span in spans:
            mask[:, 0, :, span].masked_fill_(keys[:, None, span] > query, -torch.inf)
        out[items], lse[items] = kernel(
            q_items[items],
            k_batch.view(n, 1, width, D).expand(-1, G, -1, -1),
            v_batch.view(n, 1, width, D).expand(-1, G, -1, -1),
            attn_mask=mask,
            scale=scale,
        )
        for span in spans:
            mask[:, 0, :, span].zero_()

    out[lists.block_counts + lists.column_counts == 0] = 0.0
    # Rows before the first listed key see nothing: the kernel gives them 0, and 0 as log-sum-exp too.
    first_key = _first_key(size, n_keys, lists)
    lse.masked_fill_((first_query[:, None] + rows < first_key[:, None])[:, None], -torch.inf)
    out = out.view(B, -1, M, G, size, D).transpose(2, 3).reshape(B, Hq, -1, D)
    lse = lse.view(B, -1, M, G, size).transpose(2, 3).reshape(B, Hq, -1)
    return out[:, :, :n_queries].contiguous(), lse[:, :, :n_queries].contiguous()


def _plain(
    q: Float[Tensor, "n G R D"],
    k: Float[Tensor, "n G W D"],
    v: Float[Tensor, "n G W D"],
    attn_mask: Float[Tensor, "n 1 R W"],
    scale: float,
) -> tuple[Float[Tensor, "n G R D"], Float[Tensor, "n G R"]]:
    """What the flash kernel computes, where hidden keys may be infinite or NaN."""
    scores = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(attn_mask < 0, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return (weights @ v.float()).to(q.dtype), lse


class _Batch(NamedTuple):
    """Items whose lists hold the same number of blocks and about as many columns."""

    items: Int[Tensor, " n"]
    n_blocks: int
    n_columns: int  # of the longest column list
    padding: int  # what the shortest lacks
    width: int  # keys per item, padding included


def _batches(lists: _Lists, block_size: int) -> Iterator[_Batch]:
    """All items that list a key, each in one batch of at most ``_BATCH_KEYS`` keys (or of one item)."""
    n_blocks, n_columns = lists.block_counts.long(), lists.column_counts.long()
    order = (n_blocks * (lists.column_indices.shape[1] + 1) + n_columns).argsort(stable=True)
    lengths = list(zip(n_blocks[order].tolist(), n_columns[order].tolist(), strict=True))
    start = 0
    while start < len(lengths):
        blocks, fewest = lengths[start]
        # In this order the column lists grow, so the last item of a batch is its widest.
        most = fewest + (blocks * block_size + fewest) // 8 + 16
        end = start + 1
        while end < len(lengths) and lengths[end][0] == blocks and lengths[end][1] <= most:
            if (end + 1 - start) * (blocks * block_size + lengths[end][1]) > _BATCH_KEYS:
                break
            end += 1
        columns = lengths[end - 1][1]
        if width := blocks * block_size + columns:
            yield _Batch(order[start:end], blocks, columns, columns - fewest, width)
        start = end


def _keys(batch: _Batch, block_size: int, n_keys: int, lists: _Lists) -> Int[Tensor, "n W"]:
    """The items' keys: padding, columns in ascending order, blocks in descending order.

    So the keys that lie after an item's first query meet in the middle. Padding is ``n_keys``: a key in
    every query's future.
    """
    lacking = batch.n_columns - lists.column_counts[batch.items, None].long()
    place = torch.arange(batch.n_columns) - lacking
    columns = lists.column_indices[batch.items].gather(1, place.clamp(min=0)).long()
    columns = columns.masked_fill_(place < 0, n_keys)
    blocks = lists.block_indices[batch.items, : batch.n_blocks].flip(1).long() * block_size
    return torch.cat((columns, (blocks[:, :, None] + torch.arange(block_size)).flatten(1)), dim=1)


def _hidden_spans(keys: Int[Tensor, "n W"], first_query: Int[Tensor, "n 1"], padding: int) -> list[slice]:
    """The stretches of the key axis that some query of the batch must not see all of."""
    after = (keys[:, padding:] > first_query).any(0).nonzero()
    spans = [slice(0, padding)] if padding else []
    if len(after):
        spans.append(slice(padding + int(after[0]), padding + int(after[-1]) + 1))
    return spans


def _first_key(block_size: int, n_keys: int, lists: _Lists) -> Int[Tensor, " I"]:
    """Each item's first listed key; ``n_keys`` if it has none."""
    first = torch.full(lists.block_counts.shape, n_keys)
    if lists.block_indices.shape[1]:
        blocks = lists.block_indices[:, 0].long() * block_size
        first = torch.where(lists.block_counts > 0, blocks, first)
    if lists.column_indices.shape[1]:
        columns = lists.column_indices[:, 0].long()
        first = torch.where(lists.column_counts > 0, columns.minimum(first), first)
    return first
