"""Softmax attention in which every query token has its own list of key blocks, with gradients.

The lists are shared by the query heads of a group, which stand beside each other as the rows of one
product, and the lists of neighbouring tokens are walked as their union under a bit mask: keys and values
that neighbours agree on are loaded once for all of them. The computation is that of block-sparse
FlashAttention (Dao et al., 2022, section 3.3, gradients in appendix B.4); packing a group's heads into one
tile comes from NSA (Yuan et al., 2025, section 3.4) and InfLLM-V2.
"""

from __future__ import annotations

import math
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
from sparseland.patterns import TokenBlockPattern, cdiv

__all__ = ["tile_for", "token_block_attention"]

_OP = "token_block_attention"


def tile_for(group: int, dim: int = 128) -> int:
    """Tokens per list with which groups of ``group`` query heads of ``dim`` fill the kernels' tiles best.

    A program works on 128 rows (tokens x heads of a group), or 64 of small heads: fewer tokens list fewer
    blocks together.
    """
    return max(1, min(32, (64 if dim <= 64 else 128) // group))


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


# In the order of speed. `plain` holds the gradients of the two PyTorch backends.
_BACKENDS = (
    Backend("triton", f"{__name__}.triton", _why_not_triton),
    Backend("cpu", f"{__name__}.cpu", lambda q, _: on_cpu(q)),
    Backend("reference", f"{__name__}.reference", lambda *_: None),
)
_BACKWARD = {"triton": Backend("triton", f"{__name__}.triton_backward", _why_not_triton)}
_PLAIN_BACKWARD = Backend("plain", f"{__name__}.cpu", lambda *_: None)


@overload
def token_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: TokenBlockPattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def token_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: TokenBlockPattern,
    *,
    scale: float | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def token_block_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    pattern: TokenBlockPattern,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "B Hq Nq D"] | tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Attention of each query over its window of key blocks and the blocks it lists, and no future key.

    Args:
        q: queries, the last ``Nq`` of the ``Nk`` tokens; ``Hq`` is a multiple of ``Hkv``.
        k: keys.
        v: values.
        pattern: the window and the lists, one per key head or per smaller group of query heads; its batch
            dimension may be 1 (the same for all).
        scale: factor on the logits, positive; ``1 / sqrt(D)`` unless given.
        return_lse: also give the log-sum-exp of the scaled logits (natural log, fp32).
        backend: ``triton``, ``cpu`` or ``reference``; the fastest that can run this unless given.

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
    lists = (pattern.counts, pattern.indices, pattern.members)
    sizes = (pattern.block_size, pattern.window, pattern.tile)
    out, lse = _forward(q, k, v, *lists, *sizes, scale, need_lse, backend or "")
    return (out, lse) if return_lse else out


def _check_pattern(q: Tensor, k: Tensor, pattern: TokenBlockPattern) -> None:
    if (pattern.n_queries, pattern.n_keys) != (q.shape[2], k.shape[2]):
        raise SparselandError(
            f"{_OP}: the pattern is for {pattern.n_queries} queries and {pattern.n_keys} keys, "
            f"got {q.shape[2]} and {k.shape[2]}"
        )
    if not 1 <= pattern.tile <= 32:
        raise SparselandError(f"{_OP}: tile must be 1 to 32, got {pattern.tile}")
    if pattern.window < 1:
        raise SparselandError(f"{_OP}: window must be at least the query's own block, got {pattern.window}")
    counts, indices, members = pattern.counts, pattern.indices, pattern.members
    tiles = cdiv(q.shape[2], pattern.tile)
    heads = q.shape[1] // pattern.group if pattern.group >= 1 and q.shape[1] % pattern.group == 0 else -1
    if (
        counts.dim() != 3
        or counts.shape[0] not in (1, q.shape[0])
        or counts.shape[1] != heads
        or heads % k.shape[1]
        or counts.shape[2] != tiles
        or indices.shape[:-1] != counts.shape
        or members.shape != indices.shape
    ):
        raise SparselandError(
            f"{_OP}: counts must be [{q.shape[0]} or 1, {q.shape[1]} / group, {tiles}], whole lists per key "
            f"head ({k.shape[1]}), indices and members the same with a length behind; got group "
            f"{pattern.group}, {list(counts.shape)}, {list(indices.shape)} and {list(members.shape)}"
        )
    if not (counts.dtype == indices.dtype == members.dtype == torch.int32):
        raise SparselandError(
            f"{_OP}: counts, indices and members must be int32, got {counts.dtype}, {indices.dtype} and "
            f"{members.dtype}"
        )
    if not (counts.device == indices.device == members.device == q.device):
        raise SparselandError(f"{_OP}: the pattern is on {counts.device}, q on {q.device}")


# The backend is chosen inside the operators, so torch.compile sees one opaque call.


@operator("sparseland::token_block_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    members: Tensor,
    block_size: int,
    window: int,
    tile: int,
    scale: float,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = choose(_OP, _BACKENDS, backend, q, block_size)
    if q.numel() == 0:
        shape = q.shape[:3] if need_lse else (0,)
        out, lse = q.new_zeros(q.shape), q.new_full(shape, -math.inf, dtype=_lse_dtype(q))
    else:
        lists = (counts, indices, members)
        out, lse = chosen.load().forward(q, k, v, *lists, block_size, window, tile, scale, need_lse)
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    members: Tensor,
    block_size: int,
    window: int,
    tile: int,
    scale: float,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3] if need_lse else (0,), dtype=_lse_dtype(q))
    return q.new_empty(q.shape), lse


@operator("sparseland::token_block_attention_backward")
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
    members: Tensor,
    block_size: int,
    window: int,
    tile: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    chosen = choose(_OP, _BACKENDS, backend, q, block_size)
    module = _BACKWARD.get(chosen.name, _PLAIN_BACKWARD).load()
    dq, dk, dv = module.backward(
        d_out, d_lse, q, k, v, out, lse, counts, indices, members, block_size, window, tile, scale
    )
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
    members: Tensor,
    block_size: int,
    window: int,
    tile: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int, float, bool, str],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, counts, indices, members, block_size, window, tile, scale, _, backend = inputs
    ctx.save_for_backward(q, k, v, *output, counts, indices, members)
    ctx.options = (block_size, window, tile, scale, backend)  # type: ignore[attr-defined]


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor | None, ...]:
    grads = _backward(d_out, d_lse, *ctx.saved_tensors, *ctx.options)  # type: ignore[attr-defined]
    return (*grads, *[None] * 9)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
