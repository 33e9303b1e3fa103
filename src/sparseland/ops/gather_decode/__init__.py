"""Attention of one query over chosen cached tokens or pages: the step shared by all selectors.

``gather_decode`` reads only the listed keys and values; ``dense_decode`` is the same query over the
whole cache, for layers and steps where nothing is selected.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import Backend, check_attention_shapes, choose, on_cpu, why_no_triton
from sparseland.ops._operator import operator

__all__ = ["dense_decode", "gather_decode"]


def _why_no_rows(k: Tensor, v: Tensor) -> str | None:
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return f"the last dimension of k and v must be contiguous, strides are {k.stride()} and {v.stride()}"
    return None


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if reason := why_no_triton(q):
        return reason
    dim = q.shape[-1]
    if dim % 8 or dim > 256:
        return f"the head size must be a multiple of 8 up to 256, got {dim}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the dtype must be float32, bfloat16 or float16, got {q.dtype}"
    return _why_no_rows(k, v)


BACKENDS = (
    Backend("cpu", "sparseland.ops.gather_decode.cpu", lambda q, k, v: on_cpu(q) or _why_no_rows(k, v)),
    Backend("triton", "sparseland.ops.gather_decode.triton", _why_not_triton),
    Backend("reference", "sparseland.ops.gather_decode.reference", lambda q, k, v: None),
)


@operator("sparseland::gather_decode")
def _gather_decode(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, page_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = choose("gather_decode", BACKENDS, backend or None, q, k, v)
    if not indices.shape[2] or not q.shape[0]:
        empty = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), empty
    out, lse = chosen.load().gather_decode(q, k, v, indices, scale, page_size)
    return out, lse


@_gather_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, page_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@overload
def gather_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    page_size: int = 1,
    backend: str | None = None,
) -> Tensor: ...
@overload
def gather_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    page_size: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def gather_decode(
    q: Float[Tensor, "B Hq 1 D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    indices: Int[Tensor, "B H n"],
    *,
    scale: float | None = None,
    return_lse: bool = False,
    page_size: int = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention of one query over the selected tokens only.

    The gathering step of Double Sparsity (Yang et al., 2024, section 3.2) and, with pages, of Quest (Tang
    et al., 2024, section 3.3), split over the selected tokens as in flash-decoding. Inference only.

    Args:
        q: the query of the newest token.
        k, v: the cache; a view into larger storage will do if its last dimension is contiguous.
        indices: what to read, in any order: token positions, or page numbers if ``page_size > 1``. ``H``
            is the number of key heads (one list for a group of query heads) or of query heads. int32 or
            int64. -1 is padding and reads nothing. An entry that stands twice counts twice.
        scale: of the logits; default ``D ** -0.5``.
        return_lse: also return the natural-log sum of exponentials, to merge with other parts.
        page_size: tokens in a page; page ``p`` holds the tokens ``[p * page_size, (p + 1) * page_size)``
            of the cache, the last one perhaps fewer.
        backend: ``cpu``, ``triton`` or ``reference``; default the fastest for this input.

    Returns:
        ``[B, Hq, 1, D]``, and with ``return_lse`` also ``[B, Hq, 1]`` in float32. A head whose list is
        empty gives 0 and -inf.

    Raises:
        SparselandError: shapes, dtypes or the page size don't fit, or the backend can't run the input. An
            index beyond the cache raises on the CPU; in Triton, where looking would stall the GPU, it
            reads nothing.
    """
    check_attention_shapes(q, k, v)
    _check_single_query(q)
    heads = indices.shape[1] if indices.dim() == 3 else None
    if indices.dim() != 3 or indices.shape[0] != q.shape[0] or heads not in (k.shape[1], q.shape[1]):
        raise SparselandError(
            f"indices must be [B, H, n] with B = {q.shape[0]} and H = {k.shape[1]} (key heads) or "
            f"{q.shape[1]} (query heads), got {list(indices.shape)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise SparselandError(f"indices must be int32 or int64, got {indices.dtype}")
    if indices.device != q.device:
        raise SparselandError(f"indices must be on q's device {q.device}, got {indices.device}")
    if page_size < 1:
        raise SparselandError(f"page_size must be at least 1, got {page_size}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _gather_decode(q, k, v, indices, scale, page_size, backend or "")
    return (out, lse) if return_lse else out


def dense_decode(
    q: Float[Tensor, "B Hq 1 D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    *,
    first_key: Int[Tensor, " B"] | None = None,
    valid: Bool[Tensor, "B N"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B Hq 1 D"]:
    """Attention of one query over the whole cache: ``scaled_dot_product_attention`` on grouped heads.

    The query heads of a group stand in the place of several queries, so keys and values are read once
    for all of them and never repeated.

    Args:
        first_key: each row's first valid key (left padding); None means 0.
        valid: which keys may be seen, where they are no run that ends with the newest key.
        scale: of the logits; default ``D ** -0.5``.

    Returns:
        ``[B, Hq, 1, D]``; rows that see no key give 0.

    Raises:
        SparselandError: the shapes don't fit.
    """
    check_attention_shapes(q, k, v)
    _check_single_query(q)
    batch, heads, _, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    if first_key is not None:
        seen = torch.arange(k.shape[2], device=k.device) >= first_key[:, None]
        valid = seen if valid is None else valid & seen
    if valid is None:
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(q.shape)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=valid[:, None, None], scale=scale)
    # Not every backend of SDPA answers 0 where the mask leaves nothing.
    return torch.where(valid.any(-1)[:, None, None, None], out, 0).reshape(q.shape)


def _check_single_query(q: Tensor) -> None:
    if q.shape[2] != 1:
        raise SparselandError(f"decoding takes one query at a time, got {q.shape[2]}")
