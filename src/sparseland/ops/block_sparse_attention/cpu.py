"""Block-sparse attention on CPU: gather each query block's keys, then plain batched matrix products.

Query blocks are sorted by list length and processed in small batches whose scores stay in the cache;
lists of nearly equal length share a batch, the shorter ones padded in front. Nothing is N x N, and all
buffers are reused. In bf16 and fp16 the logits are rounded to that type, as transformers' eager
attention does; sums are in fp32 inside the matrix products.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.patterns import cdiv

# Bytes of scores held at once: about the last-level cache that two cores share on a laptop.
_SCORE_BYTES = 3 << 20
# Lists within this ratio share a batch; the padding they cost is at most this much.
_PADDING = 1 / 12


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    counts: Int[Tensor, "B Hq Mq"],
    indices: Int[Tensor, "B Hq Mq L"],
    block_size: int,
    scale: float,
    need_lse: bool = True,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp (an empty tensor unless ``need_lse``)."""
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2]
    size, offset = block_size, n_keys - n_queries
    q_blocks, k_blocks = cdiv(n_queries, size), cdiv(n_keys, size)
    rows = batch * heads * q_blocks

    keys, values = (_blocks(t, k_blocks, size).reshape(-1, size * dim) for t in (k, v))
    queries = _blocks(q, q_blocks, size).reshape(rows, size * dim)
    counts = counts.expand(batch, heads, q_blocks).reshape(rows)
    order = counts.argsort(stable=True)
    lengths = counts[order].tolist()

    out = q.new_zeros(rows, size * dim)
    lse = torch.full((rows, size) if need_lse else (0,), -math.inf)
    longest = lengths[-1] if lengths else 0
    capacity = max(_SCORE_BYTES // q.element_size(), 2 * size * size * longest)
    batches = _batches(lengths, capacity // (size * size))
    # What each row of a batch is, for all batches at once: a call for each of them would take longer.
    order = order[rows - sum(n for n, _ in batches) :]  # rows without keys stay 0
    head = order // q_blocks
    kv_base = ((head // heads) * kv_heads + (head % heads) // (heads // kv_heads)) * k_blocks
    lists = indices.expand(batch, heads, q_blocks, indices.shape[-1]).reshape(rows, -1)
    sizes = torch.tensor(batches, dtype=torch.long).view(-1, 2)
    widths = sizes[:, 1].repeat_interleave(sizes[:, 0])
    chosen, shift = _aligned(lists, counts, order, widths)
    flat = chosen + kv_base.repeat_interleave(widths)
    first_query = (order % q_blocks) * size + offset

    scores = q.new_empty(capacity)
    gathered = q.new_empty(4, capacity // size * dim)
    # Scaling the queries is free; where it would round them, the scores are scaled instead.
    scale_queries = q.dtype == torch.float32 or math.frexp(scale)[0] == 0.5
    future = torch.ones(size, size, dtype=torch.bool).triu_(1)

    start = done = 0
    for n, length in batches:
        width = length * size
        at = slice(start, start + n)
        which = order[at]
        part = slice(done, done + n * length)
        q_part, k_part, v_part, o_part = (buffer[: n * m * dim] for buffer, m in
                                          zip(gathered, (size, width, width, size), strict=True))  # fmt: skip
        torch.index_select(keys, 0, flat[part], out=k_part.view(n * length, size * dim))
        torch.index_select(values, 0, flat[part], out=v_part.view(n * length, size * dim))
        torch.index_select(queries, 0, which, out=q_part.view(n, size * dim))
        s = scores[: n * size * width].view(n, size, width)
        if scale_queries:
            q_part.mul_(scale)
        torch.bmm(q_part.view(n, size, dim), k_part.view(n, width, dim).transpose(1, 2), out=s)
        if not scale_queries:
            s.mul_(scale)
        unseen = _mask(s, chosen[part].view(n, length), shift[at], first_query[at], future)
        if need_lse:
            lse[which] = s.float().logsumexp(-1)
        torch.softmax(s, -1, out=s)
        if unseen is not None:
            s.masked_fill_(unseen[..., None], 0)
        o = torch.bmm(s, v_part.view(n, width, dim), out=o_part.view(n, size, dim))
        out.index_copy_(0, which, o.view(n, size * dim))
        start, done = at.stop, part.stop

    out = out.view(batch, heads, q_blocks * size, dim)[:, :, :n_queries]
    if need_lse:
        lse = lse.view(batch, heads, q_blocks * size)[:, :, :n_queries].contiguous()
    return out.contiguous(), lse


def _blocks(x: Float[Tensor, "B H N D"], blocks: int, size: int) -> Float[Tensor, "B H M_size D"]:
    """Contiguous, padded with zeros to whole blocks (padded keys lie in every query's future)."""
    short = blocks * size - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x.contiguous()


def _batches(lengths: list[int], max_blocks: int) -> list[tuple[int, int]]:
    """Rows of each batch, and its longest list; ``lengths`` ascend, rows without keys are in none."""
    found = []
    start = next((i for i, n in enumerate(lengths) if n), len(lengths))
    while start < len(lengths):
        limit = lengths[start] + int(lengths[start] * _PADDING)
        end = start + 1
        while end < len(lengths) and lengths[end] <= limit and (end + 1 - start) * lengths[end] <= max_blocks:
            end += 1
        # An even number keeps two threads equally busy.
        if end - start > 2 and (end - start) % 2:
            end -= 1
        found.append((end - start, lengths[end - 1]))
        start = end
    return found


def _aligned(
    lists: Int[Tensor, "rows L"],
    counts: Int[Tensor, " rows"],
    order: Int[Tensor, " n"],
    widths: Int[Tensor, " n"],
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " n"]]:
    """The lists in this order one after the other, as long as ``widths`` says, and what that adds to each.

    They are aligned to the right, so that the diagonal is the last block in every row.
    """
    shift = widths - counts[order]
    row = torch.arange(order.numel()).repeat_interleave(widths)
    begin = widths.cumsum(0) - widths
    position = torch.arange(row.numel()) - (begin + shift)[row]
    return lists[order[row], position.clamp_(min=0)].long(), shift


def _mask(
    s: Float[Tensor, "n size width"],
    chosen: Int[Tensor, "n L"],
    shift: Int[Tensor, " n"],
    first_query: Int[Tensor, " n"],
    future: Bool[Tensor, "size size"],
) -> Tensor | None:
    """Hide padding in front and the future at the end; returns the queries that see nothing, if any."""
    size, length = future.shape[0], chosen.shape[1]
    padding = int(shift.max())
    if padding:
        hidden = (torch.arange(padding) < shift[:, None]).repeat_interleave(size, 1)
        s[..., : padding * size].masked_fill_(hidden[:, None], -math.inf)
    # Blocks come in ascending order, so only the last one (two, where a chunk begins inside a block)
    # can reach past a query.
    on_diagonal = chosen[:, -1] * size == first_query
    if bool(on_diagonal.all()):
        # Filled, not added: a NaN among the future keys must not reach the queries before it.
        s[..., -size:].masked_fill_(future, -math.inf)
        return None
    wide = min(2, length)
    key = (chosen[:, -wide:, None] * size + torch.arange(size)).flatten(1)
    query = first_query[:, None] + torch.arange(size)
    hidden = key[:, None, :] > query[:, :, None]
    s[..., -wide * size :].masked_fill_(hidden, -math.inf)
    unseen = hidden.all(-1) & (length - shift <= wide)[:, None]
    return unseen if bool(unseen.any()) else None
