"""Block-local causal attention: independent dense attentions, one per block, by reshaping.

A whole prompt cut into blocks is a batch of ``n / b`` short dense prompts (with ``look_back``, of chunks with
the keys of the blocks before), so PyTorch's own flash kernels compute it and its gradients. Sinks, and chunks
of a prompt, do not reshape; they go through :func:`interval_attention` with ends at the blocks' borders.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparseland.ops._dispatch import check_attention_shapes
from sparseland.ops.interval_attention import interval_attention
from sparseland.ops.window_attention import window_attention
from sparseland.patterns import BlockLocalPattern, cdiv


def block_local_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    pattern: BlockLocalPattern,
    *,
    scale: float,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of a :class:`~sparseland.patterns.BlockLocalPattern`.

    Arguments, results and errors as in :func:`~sparseland.ops.window_attention.window_attention`.
    """
    check_attention_shapes(q, k, v)
    n, span = k.shape[2], (1 + pattern.look_back) * pattern.block
    options: dict[str, Any] = {"scale": scale, "return_lse": return_lse, "backend": backend}
    if span >= n or pattern.sinks >= n:
        return window_attention(q, k, v, sinks=0, window=n, **options)  # type: ignore[no-any-return]
    if pattern.sinks or q.shape[2] != n:
        most = min(n, span + pattern.sinks)
        return interval_attention(q, k, v, pattern.ends(q.device), most=most, **options)  # type: ignore[no-any-return]
    # The first blocks look back to the start: they are one dense prompt.
    start = [x[:, :, :span] for x in (q, k, v)]
    parts = (
        window_attention(*start, sinks=0, window=span, **options),
        window_attention(*_blocks(q, k, v, pattern.block, span), sinks=0, window=span, **options),
    )
    if not return_lse:
        return _together(parts[0], parts[1], n)
    return _together(parts[0][0], parts[1][0], n), _together(parts[0][1], parts[1][1], n)


def _together(start: Tensor, blocks: Tensor, n: int) -> Tensor:
    """The start's tokens, then the blocks' in their order, without the padding of the last."""
    rest = blocks.reshape(start.shape[0], -1, *blocks.shape[1:]).transpose(1, 2).flatten(2, 3)
    return torch.cat([start, rest[:, :, : n - start.shape[2]]], 2)


def _blocks(q: Tensor, k: Tensor, v: Tensor, block: int, span: int) -> tuple[Tensor, Tensor, Tensor]:
    """The M blocks behind the first ``span`` tokens as a batch: ``[B M, H, block or span, D]``.

    The last block is padded; its own tokens see nothing of that, since it comes after them.
    """
    n = q.shape[2]
    count = cdiv(n - span, block)
    padded = [F.pad(x, (0, 0, 0, span + count * block - n)) for x in (q, k, v)]
    q_blocks = torch.unflatten(padded[0][:, :, span:], 2, (count, block))
    # Block m sees the keys [block * (m + 1), block * (m + 1) + span): strided views, nothing is copied yet.
    k_blocks, v_blocks = (x[:, :, block:].unfold(2, span, block).transpose(-1, -2) for x in padded[1:])
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in (q_blocks, k_blocks, v_blocks))  # type: ignore[return-value]
