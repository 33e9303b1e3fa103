"""Permuted attention on the CPU: listed keys of many query blocks gathered for one dense kernel call.

Query blocks of all heads are sorted by the length of their lists; neighbours in that order go through
PyTorch's CPU flash kernel together. A block's list is walked by the blocks' last positions, so that keys
which some query must not see stand together at the end, and only there is a mask written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Gathered keys per kernel call: 2 + 2 MB of K and V at D = 64 in float32.
_BATCH_KEYS = 8192
_FAR = torch.iinfo(torch.int32).max


def forward(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    q_index: Int[Tensor, "b h Sq"],
    k_index: Int[Tensor, "b h Sk"],
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    kv_heads: Int[Tensor, " H"],
    block_size: int,
    gap: int,
    first_key: int,
    scale: float,
) -> tuple[Float[Tensor, "B H Nq D"], Float[Tensor, "B H Nq"]]:
    """Output and log-sum-exp. Extra memory: copies of q, k, v at most, and one batch of gathered keys."""
    B, H, n_queries, D = q.shape
    n_keys, size, Mq = k.shape[2], block_size, counts.shape[2]
    offset = n_keys - n_queries
    rows = B * H * Mq
    queries = _blocked(q_index, size, -1).expand(B, H, -1, -1)  # (B, H, Mq, R): positions, -1 for none
    keys = torch.where(k_index >= max(first_key, 0), k_index, _FAR)
    keys = _blocked(keys, size, _FAR).expand(B, H, -1, -1)
    Mk = keys.shape[2]
    keys = keys.reshape(B * H * Mk, size)
    # Blocks with empty slots come last too: those slots are masked like the future.
    last = keys.amax(-1).view(B, H, 1, Mk)
    lists = indices.long().expand(B, H, -1, -1)
    place = torch.arange(lists.shape[-1])
    listed = place < counts.expand(B, H, -1)[..., None]
    ends = last.expand(-1, -1, Mq, -1).gather(3, torch.where(listed, lists, 0))
    order = torch.where(listed, ends.long(), 2 * _FAR).argsort(dim=-1, stable=True)
    lists = lists.gather(3, order) + (torch.arange(B * H) * Mk).view(B, H, 1, 1)
    lists, number = lists.reshape(rows, -1), counts.expand(B, H, -1).reshape(rows)

    row_of = torch.arange(rows).div(Mq, rounding_mode="floor")  # batch row and head
    base = (row_of.div(H, rounding_mode="floor") * k.shape[1] + kv_heads[row_of % H]) * n_keys
    k_rows, v_rows = (t.reshape(-1, D) for t in (k, v))
    position = queries.reshape(rows, size).long()
    held = position >= 0
    source = torch.where(held, position - offset, 0) + row_of[:, None] * n_queries
    q_rows = q.reshape(-1, D)
    limit = torch.where(held, position - gap, -1)

    out = q.new_zeros(B * H * n_queries + 1, D)  # the last row takes what empty slots compute
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((B * H * n_queries + 1,), -torch.inf, dtype=lse_dtype)
    sink = B * H * n_queries
    by_length = number.argsort(stable=True)
    lengths = number[by_length].tolist()
    start = next((i for i, n in enumerate(lengths) if n), rows)
    while start < rows:
        length = lengths[start]
        end = start + 1
        while end < rows and lengths[end] == length and (end + 1 - start) * length * size <= _BATCH_KEYS:
            end += 1
        which = by_length[start:end]
        n, width = end - start, length * size
        seen = keys[lists[which, :length]].view(n, width).long()  # positions
        visible_to = limit[which]  # (n, R)
        first = torch.where(held[which], visible_to, _FAR).amin(-1, keepdim=True)
        hidden = (seen > first).any(0).nonzero()
        at = (seen.clamp(max=n_keys - 1) + base[which, None]).flatten()
        mask = torch.zeros(n, 1, size, width, dtype=q.dtype)
        blind = torch.zeros(n, size, dtype=torch.bool)
        if len(hidden):
            span = slice(int(hidden[0]), int(hidden[-1]) + 1)
            later = seen[:, None, span] > visible_to[..., None]
            mask[:, 0, :, span].masked_fill_(later, -torch.inf)
            if span == slice(0, width):
                blind = later.all(-1)
        part, part_lse = _flash(
            q_rows[source[which]].view(n, 1, size, D),
            k_rows.index_select(0, at).view(n, 1, width, D),
            v_rows.index_select(0, at).view(n, 1, width, D),
            attn_mask=mask,
            scale=scale,
        )
        # The kernel gives no usable numbers for a row whose every key is masked.
        blind |= ~held[which]
        target = torch.where(blind, sink, source[which]).flatten()
        out[target], lse[target] = part.reshape(-1, D), part_lse.reshape(-1).to(lse_dtype)
        start = end
    return out[:-1].view(B, H, n_queries, D), lse[:-1].view(B, H, n_queries)


def _blocked(index: Int[Tensor, "b h S"], size: int, empty: int) -> Int[Tensor, "b h M R"]:
    padded = F.pad(index, (0, -index.shape[-1] % size), value=empty)
    return torch.unflatten(padded, -1, (-1, size))
