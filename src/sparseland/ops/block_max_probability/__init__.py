"""Largest attention probability inside each tile of queries and keys: what learned block gates imitate.

Source: Gao et al. 2024, "SeerAttention" (the 2-D max-pooled attention map, from a modified
flash attention); Gao et al. 2025, "SeerAttention-R" (per query, for decoding).

No gradient: it is a teacher's output.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import (
    Backend,
    check_attention_shapes,
    choose,
    interpreting,
    on_cpu,
    why_no_triton,
    why_not_float,
)
from sparseland.ops._operator import operator
from sparseland.patterns import cdiv

__all__ = ["block_max_probability"]

_OP = "block_max_probability"


def _why_not_triton(q: Tensor, block_size: int) -> str | None:
    if block_size not in (16, 32, 64, 128):
        return f"it needs block size 16, 32, 64 or 128, got {block_size}"
    if reason := why_not_float(q):
        return reason
    if q.shape[3] > 256:
        return f"it needs a head dimension of at most 256, got {q.shape[3]}"
    if q.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter multiplies no bfloat16"
    return why_no_triton(q)


# `cpu` and `torch` are one module: so a process-wide choice of the CPU backend holds here too.
BACKENDS = (
    Backend("cpu", f"{__name__}.chunked", lambda q, _: on_cpu(q)),
    Backend("triton", f"{__name__}.triton", _why_not_triton),
    Backend("torch", f"{__name__}.chunked", lambda *_: None),
    Backend("reference", f"{__name__}.reference", lambda *_: None),
)


def block_max_probability(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    scale: float | None = None,
    *,
    per_query: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "B Hq M Mk"]:
    """``max P[i, j]`` over the queries and keys of each tile, P the causal softmax; 0 in the future.

    Query blocks start at this call's first query, key blocks at key 0. Only ``[B, Hq, M, Mk]`` and the logits
    of a few query blocks are held, never the Nq x Nk probabilities.

    Args:
        q: queries, the last Nq of the Nk tokens.
        k: keys; Hq is a multiple of Hkv.
        block_size: tokens per block, 1 or more (``triton``: 16, 32, 64 or 128).
        scale: factor on the logits; ``1 / sqrt(D)`` by default.
        per_query: tiles of a single query instead of a block of them, ``M = Nq`` instead of
            ``ceil(Nq / block_size)``.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[B, Hq, M, Mk]`` float32, ``Mk = ceil(Nk / block_size)``. Not normalised.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, the block size is below 1, or the requested
            backend can't run the input.
    """
    check_attention_shapes(q, k, k)
    if block_size < 1:
        raise SparselandError(f"{_OP}: block_size={block_size}; it must be 1 or more")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    result: Tensor = _forward(q, k, block_size, scale, per_query, backend or "")
    return result


# The backend is chosen inside the operator, so torch.compile sees one opaque call.
@operator("sparseland::block_max_probability")
def _forward(q: Tensor, k: Tensor, block_size: int, scale: float, per_query: bool, backend: str) -> Tensor:
    chosen = choose(_OP, BACKENDS, backend, q, block_size)
    if q.numel() == 0:
        return q.new_zeros(_shape(q, k, block_size, per_query), dtype=torch.float32)
    result: Tensor = chosen.load().forward(q, k, block_size, scale, per_query)
    return result


@_forward.register_fake
def _(q: Tensor, k: Tensor, block_size: int, scale: float, per_query: bool, backend: str) -> Tensor:
    return q.new_empty(_shape(q, k, block_size, per_query), dtype=torch.float32)


def _shape(q: Tensor, k: Tensor, block_size: int, per_query: bool) -> tuple[int, int, int, int]:
    rows = q.shape[2] if per_query else cdiv(q.shape[2], block_size)
    return q.shape[0], q.shape[1], rows, cdiv(k.shape[2], block_size)
