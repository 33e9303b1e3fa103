"""A pruned key or value cache kept small, and attention computed on it: Mustafar's format.

``compress`` keeps the largest channels of every cached token and packs them beside a bitmap;
``bitmap_decode`` attends to compressed keys and values, expanding a tile at a time.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import Backend, choose, on_cpu, why_no_triton
from sparseland.ops._operator import operator
from sparseland.ops.bitmap_cache.layout import MAX_DIM, Bitmap

__all__ = ["Bitmap", "bitmap_decode", "compress", "decompress"]


def _why_not_triton(x: Tensor, *stored: Tensor) -> str | None:
    if reason := why_no_triton(x):
        return reason
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the dtype must be float32, bfloat16 or float16, got {x.dtype}"
    if any(t.stride(-1) != 1 for t in stored):
        return "the last dimension of the tensors must be contiguous"
    return None


BACKENDS = (
    Backend("cpu", "sparseland.ops.bitmap_cache.cpu", lambda x, *stored: on_cpu(x)),
    Backend("triton", "sparseland.ops.bitmap_cache.triton", _why_not_triton),
    Backend("reference", "sparseland.ops.bitmap_cache.reference", lambda x, *stored: None),
)


@operator("sparseland::bitmap_compress")
def _compress(x: Tensor, kept: int, backend: str) -> tuple[Tensor, Tensor]:
    chosen = choose("bitmap_cache", BACKENDS, backend or None, x, x)
    if not x.numel():
        bits = torch.zeros(*x.shape[:3], -(-x.shape[3] // 64), dtype=torch.int64, device=x.device)
        return bits, x.new_zeros(*x.shape[:3], kept)
    bits, values = chosen.load().compress(x, kept)
    return bits, values


@_compress.register_fake
def _(x: Tensor, kept: int, backend: str) -> tuple[Tensor, Tensor]:
    lead = x.shape[:3]
    return x.new_empty(*lead, -(-x.shape[3] // 64), dtype=torch.int64), x.new_empty(*lead, kept)


@operator("sparseland::bitmap_decompress")
def _decompress(bits: Tensor, values: Tensor, head_dim: int, backend: str) -> Tensor:
    chosen = choose("bitmap_cache", BACKENDS, backend or None, values, bits, values)
    if not values.numel():
        return values.new_zeros(*values.shape[:3], head_dim)
    return chosen.load().decompress(bits, values, head_dim)  # type: ignore[no-any-return]


@_decompress.register_fake
def _(bits: Tensor, values: Tensor, head_dim: int, backend: str) -> Tensor:
    return values.new_empty(*values.shape[:3], head_dim)


@operator("sparseland::bitmap_decode")
def _bitmap_decode(
    q: Tensor,
    k_bitmap: Tensor,
    k_values: Tensor,
    v_bitmap: Tensor,
    v_values: Tensor,
    first_key: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    stored = (k_bitmap, k_values, v_bitmap, v_values)
    chosen = choose("bitmap_cache", BACKENDS, backend or None, q, *stored)
    if not k_values.numel() or not q.numel():
        empty = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), empty
    out, lse = chosen.load().bitmap_decode(q, *stored, first_key, scale)
    return out, lse


@_bitmap_decode.register_fake
def _(
    q: Tensor,
    k_bitmap: Tensor,
    k_values: Tensor,
    v_bitmap: Tensor,
    v_values: Tensor,
    first_key: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def compress(x: Float[Tensor, "B H T D"], kept: int, *, backend: str | None = None) -> Bitmap:
    """Keep the ``kept`` channels of largest magnitude in every row, pack them beside a bitmap.

    Per-token magnitude pruning as in Mustafar (Joo et al., 2025, section 3), whose code keeps every channel
    at or above the threshold, so that ties make rows longer. Here ties go to the lowest channel and every
    row keeps exactly ``kept``: the constant stride takes the place of the paper's tile offsets and lets
    single tokens be gathered. NaN counts as larger than any number, so it is kept and stays visible.

    Args:
        x: keys (after RoPE) or values, ``D`` a multiple of 8 up to 256.
        kept: channels to keep, 1 to ``D``.
        backend: ``cpu``, ``triton`` or ``reference``; default the fastest for this input.

    Raises:
        SparselandError: a shape, dtype or ``kept`` doesn't fit, or the backend can't run the input.
    """
    if x.dim() != 4:
        raise SparselandError(f"x must be [B, H, T, D], got {list(x.shape)}")
    dim = x.shape[3]
    if dim % 8 or not 8 <= dim <= MAX_DIM:
        raise SparselandError(f"the head size must be a multiple of 8 up to {MAX_DIM}, got {dim}")
    if not 1 <= kept <= dim:
        raise SparselandError(f"kept must lie between 1 and the head size {dim}, got {kept}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SparselandError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    bits, values = _compress(x, kept, backend or "")
    return Bitmap(bits, values, dim)


def decompress(c: Bitmap, *, backend: str | None = None) -> Float[Tensor, "B H T D"]:
    """The rows again, with zeros in place of what was dropped.

    Raises:
        SparselandError: the backend can't run the input.
    """
    x: Tensor = _decompress(c.bitmap, c.values, c.head_dim, backend or "")
    return x


@overload
def bitmap_decode(
    q: Tensor,
    kc: Bitmap,
    vc: Bitmap,
    *,
    scale: float | None = None,
    first_key: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def bitmap_decode(
    q: Tensor,
    kc: Bitmap,
    vc: Bitmap,
    *,
    scale: float | None = None,
    first_key: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def bitmap_decode(
    q: Float[Tensor, "B Hq 1 D"],
    kc: Bitmap,
    vc: Bitmap,
    *,
    scale: float | None = None,
    first_key: Int[Tensor, " B"] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of one query over compressed keys and values (Mustafar, section 4).

    The paper's kernel makes two sparse products with a softmax over all tokens between them. Here each
    tile of tokens is expanded once for all query heads of its group, and slices are merged by their
    log-sum-exp, so nothing as long as the cache is written. Inference only.

    Args:
        q: the query of the newest token.
        kc, vc: compressed keys and values of the same tokens; they may keep different numbers of channels.
        scale: of the logits; default ``D ** -0.5``.
        first_key: each row's first valid token (left padding); None means 0.
        return_lse: also return the natural-log sum of exponentials, to merge with the dense window.
        backend: ``cpu``, ``triton`` or ``reference``; default the fastest for this input.

    Returns:
        ``[B, Hq, 1, D]``, and with ``return_lse`` also ``[B, Hq, 1]`` in float32. A row that sees no token
        (an empty cache, say) gives 0 and -inf.

    Raises:
        SparselandError: the shapes or dtypes don't fit, or the backend can't run the input.
    """
    if kc.values.shape[:3] != vc.values.shape[:3]:
        shapes = f"{list(kc.values.shape[:3])} and {list(vc.values.shape[:3])}"
        raise SparselandError(f"keys and values must hold the same tokens, got [B, H, T] = {shapes}")
    batch, kv_heads = kc.values.shape[:2]
    if q.dim() != 4 or q.shape[2] != 1 or q.shape[0] != batch or q.shape[1] % kv_heads:
        raise SparselandError(f"q must be [{batch}, a multiple of {kv_heads}, 1, D], got {list(q.shape)}")
    if not q.shape[3] == kc.head_dim == vc.head_dim:
        raise SparselandError(f"head sizes differ: q {q.shape[3]}, keys {kc.head_dim}, values {vc.head_dim}")
    if not q.dtype == kc.values.dtype == vc.values.dtype:
        raise SparselandError(f"dtypes differ: q {q.dtype}, keys {kc.values.dtype}, values {vc.values.dtype}")
    if first_key is not None and (first_key.shape != (batch,) or first_key.dtype.is_floating_point):
        raise SparselandError(
            f"first_key must be {batch} integers, got {first_key.dtype} {list(first_key.shape)}"
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse = _bitmap_decode(q, kc.bitmap, kc.values, vc.bitmap, vc.values, first_key, scale, backend or "")
    return (out, lse) if return_lse else out
