"""Attention over listed single keys, alone or together with listed blocks of keys, in one softmax.

For verticals and stripes, and for MInference's vertical-slash heads (blocks + columns). Backends:

- ``cpu``: listed keys gathered in batches for PyTorch's CPU flash kernel;
- ``triton``: one kernel for blocks and columns;
- ``reference``: all scores and a mask; the only one with a backward.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import (
    Backend,
    check_attention_shapes,
    choose,
    interpreting,
    on_cpu,
    why_no_triton,
)
from sparseland.ops.column_sparse_attention import reference
from sparseland.patterns import BlockColumnPattern, ColumnPattern, Pattern, cdiv

_HERE = "sparseland.ops.column_sparse_attention"


def _why_no_triton(q: Tensor, block_size: int) -> str | None:
    if block_size < 16 or block_size & (block_size - 1):
        return f"block size {block_size} is no power of two of 16 or more"
    if q.shape[3] > 256:
        return f"head size {q.shape[3]} is above 256"
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return why_no_triton(q)


BACKENDS = (
    Backend("cpu", f"{_HERE}.cpu", lambda q, _: on_cpu(q)),
    Backend("triton", f"{_HERE}.triton", _why_no_triton),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)


@overload
def column_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: ColumnPattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def column_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: ColumnPattern,
    *,
    scale: float | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def column_sparse_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    pattern: ColumnPattern,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query block to its own list of single keys, causal per query.

    Args:
        q: queries ``[B, Hq, Nq, D]``, the last Nq of the Nk tokens.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv.
        v: values ``[B, Hkv, Nk, D]``.
        pattern: the lists; batch or heads of size 1 hold for all.
        scale: factor on q.k; ``1 / sqrt(D)`` by default.
        return_lse: also return the log-sum-exp of the scaled logits.
        backend: ``cpu``, ``triton`` or ``reference``; by default the fastest that can.

    Returns:
        The output ``[B, Hq, Nq, D]``; with ``return_lse`` also the log-sum-exp ``[B, Hq, Nq]`` (float32,
        natural log). A row that sees no key gives 0 and ``-inf``.

    Raises:
        SparselandError: shapes, dtypes, devices or the pattern don't fit, the requested backend can't
            run the input, or (at ``backward()``) the backend has no gradient.
    """
    return _attention("column_sparse_attention", q, k, v, pattern, scale, return_lse, backend)


@overload
def block_column_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockColumnPattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def block_column_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockColumnPattern,
    *,
    scale: float | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def block_column_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    pattern: BlockColumnPattern,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query block to its listed key blocks and single keys, causal per query.

    One softmax over both. No key may be in a list of both kinds for one query block
    (:meth:`~sparseland.patterns.BlockColumnPattern.of` sees to it), else it counts twice. Blocks and
    columns have one block size.

    Source: Jiang et al. 2024, "MInference 1.0", section 3.2 and appendix C (vertical-slash kernel).
    Arguments, results and errors are those of :func:`column_sparse_attention`.
    """
    return _attention("block_column_attention", q, k, v, pattern, scale, return_lse, backend)


def _attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: ColumnPattern | BlockColumnPattern,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    check_attention_shapes(q, k, v)
    columns = pattern.columns if isinstance(pattern, BlockColumnPattern) else pattern
    _check_lists(op, q, k, pattern, columns.counts, columns.block_size)
    if isinstance(pattern, BlockColumnPattern):
        _check_lists(op, q, k, pattern, pattern.blocks.counts, pattern.blocks.block_size)
        if pattern.blocks.block_size != columns.block_size:
            sizes = f"{pattern.blocks.block_size} and {columns.block_size}"
            raise SparselandError(f"{op}: blocks and columns must have one block size, got {sizes}")
        block_counts, block_indices = pattern.blocks.counts, pattern.blocks.indices
    else:
        block_counts = torch.zeros_like(columns.counts)
        block_indices = columns.indices.new_empty((*columns.counts.shape, 0))
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    chosen = choose(op, BACKENDS, backend, q, columns.block_size)
    if chosen.name == "reference":
        out, lse = reference.pattern_attention(q, k, v, pattern, scale)
    else:
        lists = (block_counts, block_indices, columns.counts, columns.indices)
        out, lse = _block_column_attention(q, k, v, columns.block_size, *lists, scale, chosen.name)
    return (out, lse) if return_lse else out


def _check_lists(
    op: str, q: Tensor, k: Tensor, pattern: Pattern, counts: Int[Tensor, "b h Mq"], block_size: int
) -> None:
    if (pattern.n_queries, pattern.n_keys) != (q.shape[2], k.shape[2]):
        raise SparselandError(
            f"{op}: the pattern is for {pattern.n_queries} queries of {pattern.n_keys} keys, "
            f"the input has {q.shape[2]} of {k.shape[2]}"
        )
    B, Hq, Mq = q.shape[0], q.shape[1], cdiv(q.shape[2], block_size)
    if counts.shape[0] not in (1, B) or counts.shape[1] not in (1, Hq) or counts.shape[2] != Mq:
        raise SparselandError(f"{op}: lists are for {list(counts.shape)}, the input needs {[B, Hq, Mq]}")


@torch.library.custom_op("sparseland::block_column_attention", mutates_args=())
def _block_column_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    block_counts: Tensor,
    block_indices: Tensor,
    column_counts: Tensor,
    column_indices: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = next(b for b in BACKENDS if b.name == backend).load()
    out, lse = module.block_column_attention(
        q, k, v, block_size, block_counts, block_indices, column_counts, column_indices, scale
    )
    return out, lse


@_block_column_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    block_counts: Tensor,
    block_indices: Tensor,
    column_counts: Tensor,
    column_indices: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _name_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend = inputs[-1]


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    raise SparselandError(
        f"attention over columns has no gradient with backend {ctx.backend!r}; backend='reference' has one"
    )


_block_column_attention.register_autograd(_backward, setup_context=_name_backend)
