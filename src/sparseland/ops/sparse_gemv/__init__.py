"""``x @ W^T`` that reads only the weight rows of inputs above a threshold."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import Backend, choose, on_cpu, why_no_triton
from sparseland.ops._operator import operator

__all__ = ["sparse_gemv"]

TRITON_ROWS = 16


def _why_not_cpu(x: Tensor, wt: Tensor) -> str | None:
    return on_cpu(x) or (None if wt.is_contiguous() else f"wt must be contiguous, strides are {wt.stride()}")


def _why_not_triton(x: Tensor, wt: Tensor) -> str | None:
    if reason := why_no_triton(x):
        return reason
    if x.shape[0] > TRITON_ROWS:
        return f"at most {TRITON_ROWS} rows, got {x.shape[0]}"
    if wt.stride(1) != 1:
        return f"the last dimension of wt must be contiguous, strides are {wt.stride()}"
    return None


BACKENDS = (
    Backend("cpu", "sparseland.ops.sparse_gemv.cpu", _why_not_cpu),
    Backend("triton", "sparseland.ops.sparse_gemv.triton", _why_not_triton),
    Backend("reference", "sparseland.ops.sparse_gemv.reference", lambda x, wt: None),
)


@operator("sparseland::sparse_gemv")
def _sparse_gemv(x: Tensor, wt: Tensor, threshold: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    chosen = choose("sparse_gemv", BACKENDS, backend or None, x, wt)
    return chosen.load().sparse_gemv(x, wt, threshold, bias)  # type: ignore[no-any-return]


@_sparse_gemv.register_fake
def _(x: Tensor, wt: Tensor, threshold: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], wt.shape[1])


def sparse_gemv(
    x: Float[Tensor, "T in"],
    wt: Float[Tensor, "in out"],
    threshold: Float[Tensor, " in"] | Float[Tensor, ""],
    *,
    bias: Float[Tensor, " out"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "T out"]:
    """``y = sum of x_i * wt[i]`` over the inputs with ``|x_i| > threshold_i``, plus the bias.

    The product behind TEAL (Liu et al., 2025), R-Sparse (Zhang et al., 2025) and CATS (Lee et al., 2024):
    with the weight stored transposed, a skipped input is a skipped contiguous row. The comparison is
    strict and made in float32. Skipped inputs count for nothing even if they are NaN, which no
    threshold lets through. Inference only.

    The gain is in not reading the weight, so it is for one token or a few. On the CPU, three or
    more tokens that together keep more than twice ``in`` inputs are computed densely, except in float16;
    that changes the time, not the result.

    Args:
        x: the tokens.
        wt: ``W^T``, contiguous, of x's dtype.
        threshold: one for all inputs (a scalar tensor), or one for each.
        bias: added to each row.
        backend: ``cpu``, ``triton`` (up to 16 tokens) or ``reference``; default the fastest for this input.

    Raises:
        SparselandError: shapes or dtypes don't fit, or the backend can't run the input.
    """
    if x.dim() != 2 or wt.dim() != 2 or x.shape[1] != wt.shape[0]:
        raise SparselandError(f"x must be [T, in] and wt [in, out], got {list(x.shape)} and {list(wt.shape)}")
    if threshold.dim() > 1 or (threshold.dim() == 1 and threshold.shape[0] != x.shape[1]):
        raise SparselandError(f"threshold must be a scalar or [{x.shape[1]}], got {list(threshold.shape)}")
    if bias is not None and bias.shape != (wt.shape[1],):
        raise SparselandError(f"bias must be [{wt.shape[1]}], got {list(bias.shape)}")
    if x.dtype != wt.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SparselandError(
            f"x and wt must both be float32, bfloat16 or float16, got {x.dtype} and {wt.dtype}"
        )
    y: Tensor = _sparse_gemv(x, wt, threshold, bias, backend or "")
    return y
