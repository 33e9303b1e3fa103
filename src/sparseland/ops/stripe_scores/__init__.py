"""AnchorAttention's selection: exact row maxima as anchors, and the keys that come near them.

For groups of ``step`` query blocks of ``b`` tokens, counted from the call's first query::

    area of query i     key block 0, and the keys from the block before its group's first query up to i
    anchor a[u]         mean over the queries i of block u of the largest logit in i's area
    stripes of group g  keys j between block 0 and g's local keys with
                        a[u] - mean(q of block u) . k_j scale <= theta   for some block u of g

Source: Zhang et al. 2025, "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
section 3. Backends: ``triton``; ``cpu`` and ``torch`` (one module of whole-tensor PyTorch); ``reference``.
Nothing here has a gradient, and nothing synchronises with the host.
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
    module_of,
    on_cpu,
    why_no_triton,
)
from sparseland.ops._operator import operator
from sparseland.ops.stripe_scores.areas import local_starts, n_groups
from sparseland.patterns import ColumnPattern, cdiv

__all__ = ["local_starts", "row_anchors", "stripe_columns"]

_HERE = "sparseland.ops.stripe_scores"


def _why_no_triton(q: Tensor, block_size: int, step: int) -> str | None:
    if block_size not in (16, 32, 64, 128):
        return f"it needs block size 16, 32, 64 or 128, got {block_size}"
    if step > 64:
        return f"{step} blocks a group are above 64"
    if q.shape[3] > 256:
        return f"head size {q.shape[3]} is above 256"
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return why_no_triton(q)


BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", lambda q, *_: on_cpu(q)),
    Backend("triton", f"{_HERE}.triton", _why_no_triton),
    Backend("torch", f"{_HERE}.fast", lambda *_: None),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)


def row_anchors(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    *,
    block_size: int,
    step: int,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Tensor, "B Hq Mq"]:
    """Mean over each query block of its rows' largest logits in block 0 and the local area.

    Args:
        q: queries ``[B, Hq, Nq, D]``, the last Nq of the Nk tokens.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv.
        block_size: tokens per block.
        step: query blocks per group; the area of all of them starts at the same key.
        scale: factor on the logits; ``1 / sqrt(D)`` by default.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[B, Hq, Mq]`` float32.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, a size is below 1, the scale is not positive,
            or the requested backend can't run the input.
    """
    scale = _check("row_anchors", q, k, block_size, step, scale)
    chosen = choose("row_anchors", BACKENDS, backend, q, block_size, step)
    anchors: Tensor = _anchors(q, k, block_size, step, scale, chosen.name)
    return anchors


def stripe_columns(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    *,
    block_size: int,
    step: int,
    theta: float,
    limit: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> ColumnPattern:
    """The stripes of each group: single keys for ``step`` query blocks together.

    Where more than ``limit`` keys of a group pass, its threshold is lowered, up to seven times by
    ``theta / 8`` or by 1, whichever is more, until they fit; if even the last has too many, the nearest keys
    stay. Keys whose comparison is NaN or infinite are kept.

    Args:
        q: queries ``[B, Hq, Nq, D]``, the last Nq of the Nk tokens.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv.
        block_size: tokens per block.
        step: query blocks per group.
        theta: how far below the anchor a logit may be (natural log units), finite.
        limit: most keys in a list, which is also the lists' length; all keys by default.
        scale: factor on the logits; ``1 / sqrt(D)`` by default.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        Lists for query blocks of ``step * block_size`` queries. All listed keys lie before the queries.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, a size is below 1, the scale is not positive,
            ``theta`` is not finite, or the requested backend can't run the input.
    """
    scale = _check("stripe_columns", q, k, block_size, step, scale)
    if not math.isfinite(theta):
        raise SparselandError(f"stripe_columns: theta={theta}; it must be finite")
    n_queries, n_keys = q.shape[2], k.shape[2]
    limit = n_keys if limit is None else min(limit, n_keys)
    if limit < 1:
        raise SparselandError(f"stripe_columns: limit={limit}; it must be 1 or more")
    chosen = choose("stripe_columns", BACKENDS, backend, q, block_size, step)
    anchors = _anchors(q, k, block_size, step, scale, chosen.name)
    counts, indices = _stripes(q, k, anchors, block_size, step, theta, limit, scale, chosen.name)
    return ColumnPattern(n_queries, n_keys, block_size * step, counts, indices)


def _check(op: str, q: Tensor, k: Tensor, block_size: int, step: int, scale: float | None) -> float:
    check_attention_shapes(q, k, k)
    if block_size < 1 or step < 1:
        raise SparselandError(f"{op}: block_size={block_size}, step={step}; both must be 1 or more")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if not scale > 0:
        raise SparselandError(f"{op}: scale must be > 0, got {scale}")
    return scale


@operator("sparseland::row_anchors")
def _anchors(q: Tensor, k: Tensor, block_size: int, step: int, scale: float, backend: str) -> Tensor:
    module = module_of(BACKENDS, backend)
    anchors: Tensor = module.anchors(q, k, block_size, step, scale)
    return anchors


@_anchors.register_fake
def _(q: Tensor, k: Tensor, block_size: int, step: int, scale: float, backend: str) -> Tensor:
    return q.new_empty((*q.shape[:2], cdiv(q.shape[2], block_size)), dtype=torch.float32)


@operator("sparseland::stripe_columns")
def _stripes(
    q: Tensor,
    k: Tensor,
    anchors: Tensor,
    block_size: int,
    step: int,
    theta: float,
    limit: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = module_of(BACKENDS, backend)
    counts, indices = module.stripes(q, k, anchors, block_size, step, theta, limit, scale)
    return counts, indices


@_stripes.register_fake
def _(
    q: Tensor,
    k: Tensor,
    anchors: Tensor,
    block_size: int,
    step: int,
    theta: float,
    limit: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], n_groups(q.shape[2], block_size, step))
    indices = q.new_empty((*shape, limit), dtype=torch.int32)
    return q.new_empty(shape, dtype=torch.int32), indices
