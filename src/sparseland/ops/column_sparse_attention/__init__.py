"""Attention over listed single keys, alone or together with listed blocks of keys, in one softmax.

For verticals and stripes, and for MInference's vertical-slash heads (blocks + columns). Backends:

- ``cpu``: listed keys gathered in batches for PyTorch's CPU flash kernel;
- ``gluon`` (Hopper; blocks and columns): a kernel for the blocks, another that goes on with the columns;
- ``triton``: one kernel for blocks and columns;
- ``reference``: all scores and a mask.

All are differentiable; all but ``reference`` share a backward in plain PyTorch.
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
    module_of,
    on_cpu,
    why_no_triton,
    why_not_float,
)
from sparseland.ops._operator import operator
from sparseland.ops.block_sparse_attention import why_not_gluon
from sparseland.ops.column_sparse_attention import reference
from sparseland.patterns import BlockColumnPattern, BlockPattern, ColumnPattern, cdiv, unexpanded

_HERE = "sparseland.ops.column_sparse_attention"


def _why_no_triton(q: Tensor, block_size: int) -> str | None:
    if reason := why_not_float(q):
        return reason
    if block_size < 16 or block_size & (block_size - 1):
        return f"block size {block_size} is no power of two of 16 or more"
    if q.shape[3] > 256:
        return f"head size {q.shape[3]} is above 256"
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return why_no_triton(q)


_GLUON = Backend("gluon", f"{_HERE}.gluon", lambda q, size: _why_no_triton(q, size) or why_not_gluon(q, size))
BACKENDS = (
    Backend("cpu", f"{_HERE}.cpu", lambda q, _: on_cpu(q)),
    Backend("triton", f"{_HERE}.triton", _why_no_triton),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)
# For blocks and columns, in the order of speed.
UNION_BACKENDS = (_GLUON, *BACKENDS)


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
        natural log). A row that sees no key gives 0 and ``-inf``. Both carry gradients to q, k and v.

    Raises:
        SparselandError: shapes, dtypes, devices or the pattern don't fit, the scale is not positive, or
            the requested backend can't run the input.
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
    (:meth:`~sparseland.patterns.BlockColumnPattern.of` sees to it), else it counts twice. The columns'
    block size is the blocks' or a multiple of it.

    Source: Jiang et al. 2024, "MInference 1.0", section 3.2 and appendix C (vertical-slash kernel).
    Arguments, results and errors are those of :func:`column_sparse_attention`; ``gluon`` is one more backend.
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
    column_counts, column_indices = _checked_lists(op, q, k, columns)
    if isinstance(pattern, BlockColumnPattern):
        block_size = pattern.blocks.block_size
        block_counts, block_indices = _checked_lists(op, q, k, pattern.blocks)
        if columns.block_size % block_size:
            raise SparselandError(
                f"{op}: the columns' block size must be a multiple of the blocks', "
                f"got {columns.block_size} and {block_size}"
            )
    else:
        block_size = columns.block_size
        block_counts = column_counts.new_zeros(1, 1, column_counts.shape[2])
        block_indices = column_indices.new_empty(1, 1, column_counts.shape[2], 0)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if not scale > 0:
        raise SparselandError(f"{op}: scale must be > 0, got {scale}")
    backends = UNION_BACKENDS if isinstance(pattern, BlockColumnPattern) else BACKENDS
    chosen = choose(op, backends, backend, q, block_size)
    if chosen.name == "reference":
        out, lse = reference.pattern_attention(q, k, v, pattern, scale)
    else:
        lists = (block_counts, block_indices, column_counts, column_indices)
        out, lse = _block_column_attention(
            q, k, v, block_size, columns.block_size, *lists, scale, chosen.name
        )
    return (out, lse) if return_lse else out


def _checked_lists(
    op: str, q: Tensor, k: Tensor, pattern: BlockPattern | ColumnPattern
) -> tuple[Int[Tensor, "b h M"], Int[Tensor, "b h M L"]]:
    """The lists, held once where all heads or rows share them; or a clear error."""
    if (pattern.n_queries, pattern.n_keys) != (q.shape[2], k.shape[2]):
        raise SparselandError(
            f"{op}: the pattern is for {pattern.n_queries} queries of {pattern.n_keys} keys, "
            f"the input has {q.shape[2]} of {k.shape[2]}"
        )
    counts, indices = pattern.counts, pattern.indices
    B, Hq, M = q.shape[0], q.shape[1], cdiv(q.shape[2], pattern.block_size)
    if (
        counts.dim() != 3
        or counts.shape[0] not in (1, B)
        or counts.shape[1] not in (1, Hq)
        or counts.shape[2] != M
        or indices.shape[:-1] != counts.shape
    ):
        raise SparselandError(
            f"{op}: lists are for {list(counts.shape)}, with indices {list(indices.shape)}; "
            f"the input needs {[B, Hq, M]} (batch or heads may be 1), with indices a length longer"
        )
    if counts.dtype != torch.int32 or indices.dtype != torch.int32:
        raise SparselandError(
            f"{op}: counts and indices must be int32, got {counts.dtype} and {indices.dtype}"
        )
    if counts.device != q.device or indices.device != q.device:
        raise SparselandError(f"{op}: the pattern is on {counts.device}, q on {q.device}")
    counts, indices = unexpanded(counts, indices)
    return counts, indices


@operator("sparseland::block_column_attention")
def _block_column_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    column_size: int,
    block_counts: Tensor,
    block_indices: Tensor,
    column_counts: Tensor,
    column_indices: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or not block_indices.shape[3] + column_indices.shape[3]:
        # No pair at all: kernels need not know this case.
        return q.new_zeros(q.shape), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    module = module_of(UNION_BACKENDS, backend)
    out, lse = module.block_column_attention(
        q, k, v, block_size, column_size, block_counts, block_indices, column_counts, column_indices, scale
    )
    return out, lse


@_block_column_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    column_size: int,
    block_counts: Tensor,
    block_indices: Tensor,
    column_counts: Tensor,
    column_indices: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("sparseland::block_column_attention_backward")
def _block_column_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    column_size: int,
    block_counts: Tensor,
    block_indices: Tensor,
    column_counts: Tensor,
    column_indices: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sparseland.ops.column_sparse_attention.backward import backward

    lists = (block_counts, block_indices, column_counts, column_indices)
    return backward(d_out, d_lse, q, k, v, out, lse, block_size, column_size, *lists, scale)


@_block_column_attention_backward.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    column_size: int,
    block_counts: Tensor,
    block_indices: Tensor,
    column_counts: Tensor,
    column_indices: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.block_size, ctx.column_size, *lists, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output, *lists)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    gradients = _block_column_attention_backward(
        d_out, d_lse, q, k, v, out, lse, ctx.block_size, ctx.column_size, *lists, ctx.scale
    )
    return (*gradients, *[None] * 8)


_block_column_attention.register_autograd(_gradients, setup_context=_save)
