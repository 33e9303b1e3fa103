"""Exact attention over a pattern's pairs: picks the op that fits the kind of pattern."""

from __future__ import annotations

from typing import overload

from jaxtyping import Float
from torch import Tensor

from sparseland.patterns import (
    BlockColumnPattern,
    BlockPattern,
    ColumnPattern,
    Pattern,
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
    raise TypeError(f"no op computes a {type(pattern).__name__}")
