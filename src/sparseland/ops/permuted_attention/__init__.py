"""Softmax attention over blocks of gathered tokens, causal by the tokens' own positions.

Permuting queries and keys makes strewn pairs dense (Li et al., MMInference, 2025: the grid of a video's
frames becomes blocks when tokens are sorted by their place in the frame). Neither is copied on a GPU: the
kernel reads both through their position lists, and skips tiles whose keys all come after its queries.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import overload

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
from sparseland.patterns import PermutedPattern, cdiv

__all__ = ["permuted_attention"]

_OP = "permuted_attention"


def _why_not_triton(q: Tensor, block_size: int) -> str | None:
    if reason := why_no_triton(q):
        return reason
    if reason := why_not_float(q):
        return reason
    if q.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter multiplies no bfloat16"
    if block_size not in (16, 32, 64, 128):
        return f"it needs block size 16, 32, 64 or 128, got {block_size}"
    if q.shape[3] > 256:
        return f"it needs a head dimension of at most 256, got {q.shape[3]}"
    return None


BACKENDS = (
    Backend("triton", f"{__name__}.triton", _why_not_triton),
    Backend("cpu", f"{__name__}.cpu", lambda q, _: on_cpu(q)),
    Backend("reference", f"{__name__}.reference", lambda *_: None),
)


@overload
def permuted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PermutedPattern,
    *,
    scale: float | None = None,
    kv_heads: tuple[int, ...] | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def permuted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PermutedPattern,
    *,
    scale: float | None = None,
    kv_heads: tuple[int, ...] | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def permuted_attention(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    pattern: PermutedPattern,
    *,
    scale: float | None = None,
    kv_heads: tuple[int, ...] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the pattern's queries over its listed, visible keys.

    Args:
        q: queries, the last ``Nq`` of the ``Nk`` tokens, in their order.
        k: keys in their order.
        v: values.
        pattern: position lists and block lists; see :class:`~sparseland.patterns.PermutedPattern`.
        scale: factor on the logits; ``1 / sqrt(D)`` unless given.
        kv_heads: the key head of each query head (default: groups of equal size).
        return_lse: also give the log-sum-exp of the scaled logits (natural log, fp32).
        backend: ``triton``, ``cpu`` or ``reference``; by default the fastest that can, and the reference
            where gradients are wanted: only it has them.

    Returns:
        ``[B, H, Nq, D]`` in the order of ``q``, and on request the log-sum-exp. Queries that are not in the
        pattern, or see none of its keys, give 0 and -inf.

    Raises:
        SparselandError: shapes, types or devices disagree, or the requested backend can't run this input.
    """
    heads = kv_heads
    if heads is None:
        check_attention_shapes(q, k, v)
        heads = tuple(h // (q.shape[1] // k.shape[1]) for h in range(q.shape[1]))
    elif len(heads) != q.shape[1] or not all(0 <= h < k.shape[1] for h in heads):
        raise SparselandError(
            f"{_OP}: kv_heads must name one of {k.shape[1]} key heads for each of {q.shape[1]} query heads, "
            f"got {heads}"
        )
    _check_pattern(q, k, pattern)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        if backend not in (None, "reference"):
            raise SparselandError(f"{_OP}: backend {backend!r} has no gradients; use reference")
        from sparseland.ops.permuted_attention import reference

        out, lse = reference.forward(
            q, k, v, *_lists(pattern), on_device(heads, q.device), *_sizes(pattern), scale
        )
    else:
        out, lse = _forward(
            q, k, v, *_lists(pattern), on_device(heads, q.device), *_sizes(pattern), scale, backend or ""
        )
    return (out, lse) if return_lse else out


def _lists(pattern: PermutedPattern) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pattern.q_index, pattern.k_index, pattern.counts, pattern.indices


def _sizes(pattern: PermutedPattern) -> tuple[int, int, int]:
    return pattern.block_size, pattern.gap, pattern.first_key


@lru_cache(maxsize=256)
def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A short list on a device, copied there once (int64)."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def _check_pattern(q: Tensor, k: Tensor, pattern: PermutedPattern) -> None:
    if (pattern.n_queries, pattern.n_keys) != (q.shape[2], k.shape[2]):
        raise SparselandError(
            f"{_OP}: the pattern is for {pattern.n_queries} queries and {pattern.n_keys} keys, "
            f"got {q.shape[2]} and {k.shape[2]}"
        )
    rows = cdiv(pattern.q_index.shape[-1], pattern.block_size)
    for name, tensor, dims in (("q_index", pattern.q_index, 3), ("k_index", pattern.k_index, 3),
                               ("counts", pattern.counts, 3), ("indices", pattern.indices, 4)):  # fmt: skip
        fits = (
            tensor.dim() == dims and tensor.shape[0] in (1, q.shape[0]) and tensor.shape[1] in (1, q.shape[1])
        )
        if not fits or (name in ("counts", "indices") and tensor.shape[2] != rows):
            raise SparselandError(
                f"{_OP}: {name} must begin with [{q.shape[0]} or 1, {q.shape[1]} or 1] (lists: {rows} rows), "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype != torch.int32 or tensor.device != q.device:
            raise SparselandError(
                f"{_OP}: {name} must be int32 on {q.device}, got {tensor.dtype} on {tensor.device}"
            )


@operator("sparseland::permuted_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    counts: Tensor,
    indices: Tensor,
    kv_heads: Tensor,
    block_size: int,
    gap: int,
    first_key: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = choose(_OP, BACKENDS, backend, q, block_size)
    if not q.numel() or not q_index.numel() or not k_index.numel() or not indices.numel():
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(q.shape), q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype)
    out, lse = chosen.load().forward(
        q, k, v, q_index, k_index, counts, indices, kv_heads, block_size, gap, first_key, scale
    )
    return out, lse


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    counts: Tensor,
    indices: Tensor,
    kv_heads: Tensor,
    block_size: int,
    gap: int,
    first_key: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)
