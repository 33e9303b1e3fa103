"""Stage 1 in whole-tensor PyTorch, some queries at a time, on the CPU and on GPUs; no synchronisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.ops.kernel_scores.reference import UNJUDGED, finite, judged
from sparseland.patterns import cdiv, token_words, word_lists

# Bytes of logits or scores held at once.
_CPU_BYTES = 16 << 20
_GPU_BYTES = 256 << 20


def visible_kernels(length: Any, kernel: int, stride: int) -> Any:
    """Windows that have ended within the first ``length`` tokens (a number or a tensor of them)."""
    rest = length - kernel + stride
    return (rest.clamp(min=0) if isinstance(rest, Tensor) else max(rest, 0)) // stride


def compress_keys(k: Float[Tensor, "B H N D"], kernel: int, stride: int) -> Float[Tensor, "B H Nc D"]:
    """Means of the complete windows of ``kernel`` keys, one every ``stride`` (a divisor), in k's type.

    Only sums of whole tensors are used, in an order that does not depend on the length: a window's mean has
    the same bits whether it is made with others or alone.
    """
    count = visible_kernels(k.shape[2], kernel, stride)
    parts = kernel // stride
    if not count:
        return k.new_zeros(k.shape[0], k.shape[1], 0, k.shape[3])
    used = (count + parts - 1) * stride
    steps = _halved(torch.unflatten(k[:, :, :used].float(), 2, (-1, stride)), 3)
    total = steps[:, :, :count]
    for part in range(1, parts):
        total = total + steps[:, :, part : part + count]
    return (total / kernel).to(k.dtype)


def _halved(x: Tensor, dim: int) -> Tensor:
    """The sum over ``dim``, by adding halves."""
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        rest = x.narrow(dim, 2 * half, x.shape[dim] - 2 * half)
        x = torch.cat([x.narrow(dim, 0, half) + x.narrow(dim, half, half), rest], dim)
    return x.squeeze(dim)


def coarsen(compressed: Float[Tensor, "B H Nc D"], kernel: int, stride: int) -> Float[Tensor, "B H Nf D"]:
    """Windows four times as long and as far apart: each the mean of the four that lie in it end to end."""
    apart = kernel // stride
    count = (compressed.shape[2] - 3 * apart + 3) // 4 if compressed.shape[2] > 3 * apart else 0
    total = torch.zeros_like(compressed[:, :, :count], dtype=torch.float32)
    for part in range(4):
        total = total + compressed[:, :, part * apart : part * apart + 4 * count : 4][:, :, :count].float()
    return (total / 4).to(compressed.dtype)


def scores(
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    coarse: Float[Tensor, "B Hkv Nf D"] | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
) -> Float[Tensor, "B Hkv Nq Mk"]:
    """See :func:`sparseland.ops.kernel_scores.kernel_scores`; queries in pieces."""
    n_queries, blocks = q.shape[2], cdiv(n_keys, block_size)
    out = q.new_zeros(q.shape[0], compressed.shape[1], n_queries, blocks, dtype=torch.float32)
    rows = rows_at_once(q, compressed.shape[2])
    for start in range(0, n_queries, rows):
        part = q[:, :, start : start + rows]
        length = n_keys - n_queries + start + part.shape[2]
        positions = torch.arange(length - part.shape[2], length, device=q.device)
        sizes = (length, kernel, stride, block_size, scale)
        found = block_scores(part, compressed, coarse, positions, *sizes, seen_by_all=length - part.shape[2])
        out[:, :, start : start + rows, : found.shape[3]] = found
    return out


def block_scores(
    q: Float[Tensor, "B Hq R D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    coarse: Float[Tensor, "B Hkv Nf D"] | None,
    positions: Int[Tensor, "*B R"],
    length: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
    seen_by_all: int = 0,
) -> Float[Tensor, "B Hkv R M"]:
    """Scores of the blocks of the first ``length`` tokens for queries at any ``positions`` among them.

    ``positions`` are ``[R]``, or ``[B, R]`` where the rows of a batch stand at different places. Windows
    within the first ``seen_by_all`` tokens need no mask.
    """
    kv_heads = compressed.shape[1]
    n, per_block = q.shape[2], block_size // stride
    blocks, count = cdiv(length, block_size), visible_kernels(length, kernel, stride)
    # Rows of all heads of a group in one product, [B, Hkv, G, R, windows].
    positions = positions.reshape(-1, 1, 1, n, 1)

    def later(first: int, count: int, kernel: int, stride: int) -> Tensor:
        """Whether the windows from the ``first`` on end after the query, [B or 1, 1, 1, R, windows]."""
        ended: Tensor = visible_kernels(positions + 1, kernel, stride)
        return torch.arange(first, count, device=q.device) >= ended

    def logits(windows: Tensor, count: int, kernel: int, stride: int) -> Tensor:
        s = torch.unflatten(_grouped_product(q, finite(windows[:, :, :count]), scale), 1, (kv_heads, -1))
        sure = visible_kernels(seen_by_all, kernel, stride)
        s[..., sure:].masked_fill_(later(sure, count, kernel, stride), -math.inf)
        return s

    fine = logits(compressed, count, kernel, stride)
    n_coarse = visible_kernels(length, 4 * kernel, 4 * stride) if coarse is not None else 0
    if not n_coarse:
        # A row that has seen no window yet is NaN here, and 0 below.
        p = fine.softmax(-1)
    else:
        assert coarse is not None
        lse = logits(coarse, n_coarse, 4 * kernel, 4 * stride).logsumexp(-1)
        early = lse == -math.inf
        # Only the first positions have fine windows and no coarse one: few fine windows tell their sum.
        exact = fine[..., : 4 * kernel // stride].logsumexp(-1)
        lse = torch.where(early, exact.masked_fill(exact == -math.inf, 0), lse)
        p = fine.sub_(lse[..., None]).exp_()
    total = p.sum(2).nan_to_num_(UNJUDGED, UNJUDGED).clamp_(max=UNJUDGED)
    total.masked_fill_(~judged(compressed[:, :, None, :count]), UNJUDGED)
    sure = visible_kernels(seen_by_all, kernel, stride)
    total[..., sure:].masked_fill_(later(sure, count, kernel, stride)[:, :, 0], 0.0)
    padded = torch.nn.functional.pad(total, (0, blocks * per_block - count))
    split = torch.unflatten(padded, -1, (blocks, per_block))
    best = split.amax(-1)
    reaching = kernel // stride - 1  # windows that begin in a block and reach into the next
    if reaching:
        tail = split[..., per_block - reaching :].amax(-1)
        best[..., 1:] = torch.maximum(best[..., 1:], tail[..., :-1])
    return best


def top(
    scores: Float[Tensor, "B Hkv R M"],
    first: int | Int[Tensor, " B"],
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
) -> Bool[Tensor, "B Hkv R M"]:
    """As :func:`reference.top`, by the ``topk``-th largest score; ``first`` may differ from row to row."""
    step = torch.arange(scores.shape[2], device=scores.device)[:, None]
    if isinstance(first, Tensor):
        first = first[:, None, None, None]
    position = step + first
    block = torch.arange(scores.shape[3], device=scores.device)
    before = block <= torch.div(position, block_size, rounding_mode="floor") - window
    taken = before.expand_as(scores)
    if topk < scores.shape[3]:
        ranked = scores.masked_fill(block < init, math.inf).masked_fill(~before, -math.inf)
        least = ranked.topk(topk, dim=-1).values[..., -1:]
        above, equal = ranked > least, (ranked == least) & before
        # Of equal scores the earlier blocks, as many as there is room for.
        room = topk - above.sum(-1, keepdim=True)
        taken = above | (equal & (equal.cumsum(-1) <= room))
    return (taken | (position + 1 < dense_len)) & before


def select_in_pieces(
    module: Any,
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    coarse: Float[Tensor, "B Hkv Nf D"] | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
    tile: int,
    scale: float,
    longest: int,
) -> tuple[Int[Tensor, "B Hkv T"], Int[Tensor, "B Hkv T L"], Int[Tensor, "B Hkv T L"]]:
    """See :func:`sparseland.ops.kernel_scores.select_blocks`: scores and lists, some queries at a time.

    ``module`` is the backend: it gives ``scores`` of a piece, and those at the ``top`` of them.
    """
    n_queries, offset = q.shape[2], n_keys - q.shape[2]
    shape = (q.shape[0], compressed.shape[1], cdiv(n_queries, tile))
    counts = torch.zeros(shape, dtype=torch.int32, device=q.device)
    indices, members = (torch.zeros(*shape, longest, dtype=torch.int32, device=q.device) for _ in range(2))
    if not longest:
        return counts, indices, members
    # Queries up to here take every block before their window: their scores don't matter.
    whole = max(dense_len - 1, (topk + window) * block_size) - offset
    whole = min(max(whole, 0), n_queries) // tile * tile
    rows = rows_at_once(q, compressed.shape[2] if q.device.type == "cpu" else cdiv(n_keys, block_size))
    rows = max(tile, rows // tile * tile)
    starts = [*range(0, whole, rows), *range(whole, n_queries, rows)]
    for start, end in zip(starts, [*starts[1:], n_queries], strict=True):
        last = offset + end - 1
        columns = last // block_size - window + 1  # blocks before the window of the piece's last query
        if columns <= 0:
            continue
        if start < whole:
            found = torch.zeros(1, 1, end - start, columns, device=q.device)
            taken = top(found, offset + start, block_size, window, init, columns, dense_len)
            made = word_lists(token_words(taken, tile), longest)
        else:
            part = (q[:, :, start:end], compressed, coarse, last + 1, kernel, stride, block_size, scale)
            found = module.scores(*part)[..., :columns]
            choice = (offset + start, block_size, window, init, topk, dense_len)
            made = word_lists(token_words(module.top(found, *choice), tile), longest)
        at = slice(start // tile, cdiv(end, tile))
        for kept, new in zip((counts, indices, members), made, strict=True):
            kept[:, :, at] = new
    return counts, indices, members


def rows_at_once(q: Tensor, width: int) -> int:
    """Queries whose numbers, ``width`` per query head, fit into what is held at once."""
    held = _CPU_BYTES if q.device.type == "cpu" else _GPU_BYTES
    return max(1, held // max(1, 4 * q.shape[0] * q.shape[1] * width))


def _grouped_product(
    q: Float[Tensor, "B Hq R D"], c: Float[Tensor, "B Hkv n D"], scale: float
) -> Float[Tensor, "B Hq R n"]:
    """q . c scale in float32, grouped heads: the queries of a group are rows of one product per key head."""
    batch, kv_heads, n, dim = c.shape
    rows = q.reshape(batch * kv_heads, -1, dim)
    windows = c.reshape(batch * kv_heads, n, dim)
    if q.is_cuda and q.dtype != torch.float32:
        # Tensor cores take half-precision factors and give float32 sums.
        product = torch.bmm(rows, windows.mT, out_dtype=torch.float32).mul_(scale)
    else:
        product = torch.bmm(rows.float() * scale, windows.float().mT)
    return product.view(*q.shape[:3], n)
