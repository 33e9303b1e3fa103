"""Attention to keys that each live for one interval of queries, with a bias per key.

Key ``j`` is seen by the queries at the positions ``j <= i < ends[j]``; ``bias[j]`` joins its logit. Both are
per key head, so a group of query heads shares them. This is what a causal top-w by scores of the keys comes
to (a key that left never returns), what eviction of any kind comes to, and, with ends at block borders,
block-local attention. Backends:

- ``cpu``: the living keys of each query block gathered for PyTorch's CPU flash kernel;
- ``triton``: the living keys of each query block listed on the device, then a flash kernel that gathers them;
- ``reference``: all scores and a mask.

All are differentiable, in the bias too. ``triton`` has a backward of its own, without atomics.
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
    loaded,
    module_of,
    on_cpu,
    why_no_triton,
)
from sparseland.ops._operator import operator

_HERE = "sparseland.ops.interval_attention"


def _why_no_triton(q: Tensor) -> str | None:
    if q.shape[3] > 256:
        return f"head size {q.shape[3]} is above 256"
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return why_no_triton(q)


BACKENDS = (
    Backend("cpu", f"{_HERE}.cpu", on_cpu),
    Backend("triton", f"{_HERE}.triton", _why_no_triton),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)


@overload
def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    bias: Tensor | None = None,
    *,
    most: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    bias: Tensor | None = None,
    *,
    most: int | None = None,
    scale: float | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def interval_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    ends: Int[Tensor, "b h Nk"],
    bias: Float[Tensor, "b h Nk"] | None = None,
    *,
    most: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which the query at position i sees key j if ``j <= i < ends[j]``.

    The logit of a pair is ``scale * q_i . k_j + bias_j``.

    Args:
        q: queries ``[B, Hq, Nq, D]``, the last Nq of the Nk tokens.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv.
        v: values ``[B, Hkv, Nk, D]``.
        ends: the position from which on a key is no longer seen; Nk: never; ``<= j``: not by anyone.
            Batch or heads of size 1 hold for all.
        bias: added to the logits of a key, any float type (computed in float32); None adds nothing.
        most: keys that a query sees at most, if the caller knows (saves memory on a GPU, where the lists of
            living keys must have a size before they are made). A row that saw more would be NaN there.
        scale: factor on q.k; ``1 / sqrt(D)`` by default.
        return_lse: also return the log-sum-exp of the logits, bias included.
        backend: ``cpu``, ``triton`` or ``reference``; by default the fastest that can.

    Returns:
        The output ``[B, Hq, Nq, D]``; with ``return_lse`` also the log-sum-exp ``[B, Hq, Nq]`` (float32,
        natural log). A row that sees no key gives 0 and ``-inf``.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, or the requested backend can't run the input.
    """
    check_attention_shapes(q, k, v)
    shape = k.shape[:3]
    ends = _per_key("ends", ends, shape, q.device).to(torch.int32)
    if bias is None:
        bias = torch.zeros(shape, dtype=torch.float32, device=q.device)
    else:
        bias = _per_key("bias", bias, shape, q.device).float()
    if most is not None and most < 1:
        raise SparselandError(f"interval_attention: most={most}; it must be 1 or more")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    chosen = choose("interval_attention", BACKENDS, backend, q)
    most = shape[2] if most is None else min(most, shape[2])
    if chosen.name == "reference":
        out, lse = chosen.load().interval_attention(q, k, v, ends, bias, scale)
    else:
        out, lse = _interval_attention(q, k, v, ends, bias, most, scale, chosen.name)
    return (out, lse) if return_lse else out


def _per_key(name: str, x: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    fits = x.dim() == 3 and all(a in (1, b) for a, b in zip(x.shape[:2], shape[:2], strict=True))
    if not fits or x.shape[2] != shape[2]:
        raise SparselandError(f"interval_attention: {name} must be {list(shape)}, got {list(x.shape)}")
    if x.device != device:
        raise SparselandError(f"interval_attention: {name} is on {x.device}, q on {device}")
    if (name == "ends") == x.is_floating_point():
        raise SparselandError(f"interval_attention: {name} can't be {x.dtype}")
    return x.expand(shape)


@operator("sparseland::interval_attention")
def _interval_attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, bias: Tensor, most: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    module = module_of(BACKENDS, backend)
    out, lse = module.interval_attention(q, k, v, ends, bias, most, scale)
    return out, lse


@_interval_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, bias: Tensor, most: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("sparseland::interval_attention_backward")
def _interval_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    most: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = loaded(f"{_HERE}.{'triton_backward' if backend == 'triton' else 'backward'}")
    d_q, d_k, d_v, d_bias = module.backward(d_out, d_lse, q, k, v, ends, bias, out, lse, most, scale)
    return d_q, d_k, d_v, d_bias


@_interval_attention_backward.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    most: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, bias, ctx.most, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, ends, bias, *output)


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    d_q, d_k, d_v, d_bias = _interval_attention_backward(
        d_out, d_lse, *ctx.saved_tensors, ctx.most, ctx.scale, ctx.backend
    )
    return d_q, d_k, d_v, None, d_bias, None, None, None


_interval_attention.register_autograd(_backward, setup_context=_save)
