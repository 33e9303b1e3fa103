"""Exact attention over a pattern's pairs: picks the op that fits the kind of pattern."""

from __future__ import annotations

from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from sparseland.patterns import (
    BlockColumnPattern,
    BlockLocalPattern,
    BlockPattern,
    ColumnPattern,
    IntervalPattern,
    PartsPattern,
    Pattern,
    PermutedPattern,
    PiecedPattern,
    TokenBlockPattern,
    WindowPattern,
)


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, scale: float, backend: str | None = None
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float,
    return_lse: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    pattern: Pattern,
    *,
    scale: float,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of ``pattern`` (causal), with its log-sum-exp on request.

    Raises:
        SparselandError: no backend can run the input, or the requested one can't.
    """
    options = {"scale": scale, "return_lse": return_lse, "backend": backend}
    match pattern:
        case WindowPattern(sinks=sinks, window=window):
            from sparseland.ops.window_attention import window_attention

            return window_attention(q, k, v, sinks=sinks, window=window, **options)  # type: ignore[arg-type]
        case BlockPattern():
            from sparseland.ops.block_sparse_attention import block_sparse_attention

            return block_sparse_attention(q, k, v, pattern, **options)  # type: ignore[arg-type]
        case ColumnPattern():
            from sparseland.ops.column_sparse_attention import column_sparse_attention

            return column_sparse_attention(q, k, v, pattern, **options)  # type: ignore[arg-type]
        case BlockColumnPattern():
            from sparseland.ops.column_sparse_attention import block_column_attention

            return block_column_attention(q, k, v, pattern, **options)  # type: ignore[arg-type]
        case TokenBlockPattern():
            from sparseland.ops.token_block_attention import token_block_attention

            return token_block_attention(q, k, v, pattern, **options)  # type: ignore[arg-type]
        case IntervalPattern(ends=ends, bias=bias, most=most):
            from sparseland.ops.interval_attention import interval_attention

            return interval_attention(q, k, v, ends, bias, most=most, **options)  # type: ignore[arg-type]
        case BlockLocalPattern():
            from sparseland.ops.interval_attention.local import block_local_attention

            return block_local_attention(q, k, v, pattern, **options)  # type: ignore[arg-type]
        case PermutedPattern():
            from sparseland.ops.permuted_attention import permuted_attention

            return permuted_attention(q, k, v, pattern, **options)  # type: ignore[arg-type]
        case PartsPattern():
            from sparseland.ops.permuted_attention.parts import attend_parts

            return attend_parts(q, k, v, pattern, attend, **options)  # type: ignore[arg-type]
        case PiecedPattern():
            return _attend_pieces(q, k, v, pattern, scale, return_lse, backend)
    raise TypeError(f"no op computes a {type(pattern).__name__}")


def _attend_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PiecedPattern,
    scale: float,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One stretch of queries after the other, over the keys up to its end."""
    out = q.new_empty(q.shape)
    parts = []
    for at, piece in pattern.pieces():
        seen = pattern.offset + at.stop
        inputs = (q[:, :, at], k[:, :, :seen], v[:, :, :seen])
        out[:, :, at], lse = attend(*inputs, piece, scale=scale, return_lse=True, backend=backend)
        parts.append(lse)
    return (out, torch.cat(parts, 2)) if return_lse else out
