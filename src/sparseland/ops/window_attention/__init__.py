"""Sliding-window causal attention with attention sinks; a window of all keys is dense attention.

A-shape heads of MInference, StreamingLLM's pattern, and the dense path of chunked prefill. Backends:

- ``sdpa``: PyTorch's own causal attention, where the request is exactly that;
- ``cpu``: PyTorch's CPU flash kernel on slices of the keys;
- ``triton``: one kernel, no lists;
- ``reference``: all scores and a mask.

All are differentiable; ``cpu`` and ``triton`` share a backward in plain PyTorch.
"""

from __future__ import annotations

import math
from typing import Any, overload

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
from sparseland.ops.window_attention import reference, sdpa

_HERE = "sparseland.ops.window_attention"


def _why_no_sdpa(q: Tensor, k: Tensor, sinks: int, window: int, return_lse: bool) -> str | None:
    if window < k.shape[2]:
        return f"a window of {window} keys is sparse: there are {k.shape[2]}"
    if q.shape[2] == k.shape[2]:
        return "it returns no log-sum-exp" if return_lse else None
    # FlashAttention aligns the causal triangle to the last key; SDPA's is_causal to the first.
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0:
        return None
    return f"{q.shape[2]} queries of {k.shape[2]} keys need FlashAttention: CUDA and half precision"


def _why_no_triton(q: Tensor) -> str | None:
    if q.shape[3] > 256:
        return f"head size {q.shape[3]} is above 256"
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return why_no_triton(q)


BACKENDS = (
    Backend("sdpa", f"{_HERE}.sdpa", _why_no_sdpa),
    Backend("cpu", f"{_HERE}.cpu", lambda q, *_: on_cpu(q)),
    Backend("triton", f"{_HERE}.triton", lambda q, *_: _why_no_triton(q)),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def window_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    *,
    sinks: int,
    window: int,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query to the first keys and to the keys just before it.

    The queries are the last Nq of the Nk tokens. The query at position i sees key j if ``j <= i`` and
    (``j < sinks`` or ``i - j < window``): a window of 1 is the query's own key, a window of Nk or more
    is dense causal attention and costs what PyTorch's own does.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2
    (true positions here: rotary angles are applied before).

    Args:
        q: queries ``[B, Hq, Nq, D]``, float32, bfloat16 or float16.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv, Nq <= Nk.
        v: values ``[B, Hkv, Nk, D]``.
        sinks: first keys that every query sees, 0 or more.
        window: last keys that every query sees, itself included, 0 or more.
        scale: factor on q.k; ``1 / sqrt(D)`` by default.
        return_lse: also return the log-sum-exp of the scaled logits.
        backend: ``sdpa``, ``cpu``, ``triton`` or ``reference``; by default the fastest that can.

    Returns:
        The output ``[B, Hq, Nq, D]``; with ``return_lse`` also the log-sum-exp ``[B, Hq, Nq]`` (float32,
        natural log). A row that sees no key (``sinks = window = 0``) gives 0 and ``-inf``.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, sinks or window are negative, or the
            requested backend can't run the input.
    """
    check_attention_shapes(q, k, v)
    if sinks < 0 or window < 0:
        raise SparselandError(f"window_attention: sinks={sinks}, window={window}; both must be 0 or more")
    if sinks + window >= k.shape[2]:
        sinks, window = 0, k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    chosen = choose("window_attention", BACKENDS, backend, q, k, sinks, window, return_lse)
    if chosen.name == "sdpa":
        out, lse = sdpa.window_attention(q, k, v, sinks, window, scale)
    elif chosen.name == "reference":
        out, lse = reference.window_attention(q, k, v, sinks, window, scale)
    else:
        out, lse = _window_attention(q, k, v, sinks, window, scale, chosen.name)
    if not return_lse:
        return out
    assert lse is not None  # `_why_no_sdpa` says so
    return out, lse


@operator("sparseland::window_attention")
def _window_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: int, window: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    module = module_of(BACKENDS, backend)
    out, lse = module.window_attention(q, k, v, sinks, window, scale)
    return out, lse


@_window_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: int, window: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("sparseland::window_attention_backward")
def _window_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sparseland.ops.window_attention.backward import window_attention_backward

    return window_attention_backward(d_out, d_lse, q, k, v, out, lse, sinks, window, scale)


@_window_attention_backward.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.sinks, ctx.window, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    gradients = _window_attention_backward(d_out, d_lse, *ctx.saved_tensors, ctx.sinks, ctx.window, ctx.scale)
    return (*gradients, None, None, None, None)


_window_attention.register_autograd(_backward, setup_context=_save)
