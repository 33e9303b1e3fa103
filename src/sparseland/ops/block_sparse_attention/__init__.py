"""Softmax attention over lists of key blocks, causal by token index, with gradients.

Sources of the computation: block-sparse FlashAttention (Dao et al., 2022, section 3.3) for the tiling
and the online softmax; its gradients from the same paper's appendix B.4, with the log-sum-exp's own
gradient added so that merged parts can be trained through.
"""

from __future__ import annotations

import importlib.metadata
import math
from functools import cache
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
    why_no_gluon,
    why_no_triton,
    why_not_float,
)
from sparseland.ops._operator import operator
from sparseland.patterns import BlockPattern, cdiv

__all__ = ["block_sparse_attention", "why_not_gluon"]

_OP = "block_sparse_attention"
_FA4_VERSION = "4.0.0b36"  # its block-sparse interface is not stable between betas


@cache
def _fa4_version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not_fa4(q: Tensor, block_size: int) -> str | None:
    if q.device.type != "cuda":
        return f"it needs a CUDA device, the input is on {q.device.type}"
    if _fa4_version() != _FA4_VERSION:
        return f"it needs flash-attn-4 {_FA4_VERSION}, found {_fa4_version() or 'none'}"
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return "its route here is made for compute capability 9.0 (Hopper)"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    if block_size != 128:
        return f"it needs block size 128, got {block_size}"
    if q.shape[3] not in (64, 96, 128):
        return f"it needs a head dimension of 64, 96 or 128 (80 gave wrong results), got {q.shape[3]}"
    return None


# By block size, the head dimensions that Gluon's kernels take (in heads of 64 Triton's has blocks of 64 as
# fast).
_GLUON_DIMS = {64: (128,), 128: (64, 128)}


def why_not_gluon(q: Tensor, block_size: int) -> str | None:
    """The reason Gluon's kernels can't run on these queries with blocks of this size, or None."""
    if reason := why_no_gluon(q) or why_no_triton(q):
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    if block_size not in _GLUON_DIMS:
        return f"it needs block size 64 or 128, got {block_size}"
    if q.shape[3] not in (dims := _GLUON_DIMS[block_size]):
        allowed = " or ".join(map(str, dims))
        return f"it needs a head dimension of {allowed} with blocks of {block_size}, got {q.shape[3]}"
    return None


def _why_not_triton(q: Tensor, block_size: int) -> str | None:
    if reason := why_no_triton(q):
        return reason
    if reason := why_not_float(q):
        return reason
    if q.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter multiplies no bfloat16"
    if block_size not in (16, 32, 64, 128, 256):
        return f"it needs block size 16, 32, 64, 128 or 256, got {block_size}"
    if q.shape[3] > 256:
        return f"it needs a head dimension of at most 256, got {q.shape[3]}"
    return None


def _why_not_cpu(q: Tensor, block_size: int) -> str | None:
    return on_cpu(q)


def _why_not_reference(q: Tensor, block_size: int) -> str | None:
    return None


# In the order of speed. All forwards share one signature; backwards are chosen in `_backward_module`.
_BACKENDS = (
    Backend("gluon", f"{__name__}.gluon", why_not_gluon),
    Backend("fa4", f"{__name__}.fa4", _why_not_fa4),
    Backend("triton", f"{__name__}.triton", _why_not_triton),
    Backend("cpu", f"{__name__}.cpu", _why_not_cpu),
    Backend("reference", f"{__name__}.reference", _why_not_reference),
)
_BACKWARD = {
    "fa4": Backend("fa4", f"{__name__}.fa4", _why_not_fa4),
    "triton": Backend("triton", f"{__name__}.triton_backward", _why_not_triton),
}
_TRAINABLE = (*_BACKWARD, "cpu", "reference")
_PLAIN_BACKWARD = Backend("plain", f"{__name__}.backward", _why_not_reference)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "B Hq Nq D"] | tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Attention of each query over the listed key blocks of its query block, and no future key.

    Query ``i`` of this call stands at position ``Nk - Nq + i`` and sees key ``j`` if ``j`` is at or before
    that position and in a listed block. A query that sees nothing gets output 0 and log-sum-exp -inf.

    Args:
        q: queries, the last ``Nq`` of the ``Nk`` tokens; ``Hq`` is a multiple of ``Hkv``.
        k: keys.
        v: values.
        pattern: lists of key blocks; its batch and head dimensions may be 1 (the same for all).
        scale: factor on the logits, positive; ``1 / sqrt(D)`` unless given.
        return_lse: also give the log-sum-exp of the scaled logits (natural log, fp32).
        backend: ``gluon``, ``fa4``, ``triton``, ``cpu`` or ``reference``; by default the fastest that can.

    Returns:
        The output in q's type, and on request the log-sum-exp. Both carry gradients to q, k and v.

    Raises:
        SparselandError: shapes, types or devices disagree, the scale is not positive, or the requested
            backend can't run this input.
    """
    check_attention_shapes(q, k, v)
    _check_pattern(q, k, pattern)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    if not scale > 0:
        raise SparselandError(f"{_OP}: scale must be > 0, got {scale}")
    need_lse = return_lse or (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)))
    out, lse = _forward(
        q, k, v, pattern.counts, pattern.indices, pattern.block_size, scale, need_lse, backend or ""
    )
    return (out, lse) if return_lse else out


def _check_pattern(q: Tensor, k: Tensor, pattern: BlockPattern) -> None:
    if (pattern.n_queries, pattern.n_keys) != (q.shape[2], k.shape[2]):
        raise SparselandError(
            f"{_OP}: the pattern is for {pattern.n_queries} queries and {pattern.n_keys} keys, "
            f"got {q.shape[2]} and {k.shape[2]}"
        )
    counts, indices = pattern.counts, pattern.indices
    blocks = cdiv(q.shape[2], pattern.block_size)
    if (
        counts.dim() != 3
        or counts.shape[0] not in (1, q.shape[0])
        or counts.shape[1] not in (1, q.shape[1])
        or counts.shape[2] != blocks
        or indices.shape[:-1] != counts.shape
    ):
        raise SparselandError(
            f"{_OP}: counts must be [{q.shape[0]} or 1, {q.shape[1]} or 1, {blocks}] and indices the same "
            f"with a length behind, got {list(counts.shape)} and {list(indices.shape)}"
        )
    if counts.dtype != torch.int32 or indices.dtype != torch.int32:
        raise SparselandError(
            f"{_OP}: counts and indices must be int32, got {counts.dtype} and {indices.dtype}"
        )
    if counts.device != q.device or indices.device != q.device:
        raise SparselandError(f"{_OP}: the pattern is on {counts.device}, q on {q.device}")


# The backend is chosen inside the operators, so torch.compile sees one opaque call.


@operator("sparseland::block_sparse_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = choose(_OP, _BACKENDS, backend, q, block_size)
    if q.numel() == 0 or indices.shape[3] == 0:  # no pair at all: kernels need not know this case
        shape = q.shape[:3] if need_lse else (0,)
        out, lse = q.new_zeros(q.shape), q.new_full(shape, -math.inf, dtype=_lse_dtype(q))
    else:
        out, lse = chosen.load().forward(q, k, v, counts, indices, block_size, scale, need_lse)
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3] if need_lse else (0,), dtype=_lse_dtype(q))
    return q.new_empty(q.shape), lse


@operator("sparseland::block_sparse_attention_backward")
def _backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or indices.shape[3] == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    chosen = choose(_OP, _BACKENDS, backend, q, block_size)
    if chosen.name not in _TRAINABLE:  # no backward of its own: the fastest that can
        chosen = choose(_OP, tuple(b for b in _BACKENDS if b.name in _TRAINABLE), None, q, block_size)
    module = _BACKWARD.get(chosen.name, _PLAIN_BACKWARD).load()
    dq, dk, dv = module.backward(d_out, d_lse, q, k, v, out, lse, counts, indices, block_size, scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, float, bool, str],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, counts, indices, block_size, scale, _, backend = inputs
    ctx.save_for_backward(q, k, v, *output, counts, indices)
    ctx.options = (block_size, scale, backend)  # type: ignore[attr-defined]


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, counts, indices = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = _backward(d_out, d_lse, q, k, v, out, lse, counts, indices, *ctx.options)  # type: ignore[attr-defined]
    return (*grads, None, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
