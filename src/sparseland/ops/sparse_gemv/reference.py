"""``sparse_gemv`` in plain PyTorch: mask the inputs, then an ordinary product."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def kept_inputs(x: Float[Tensor, "T in"], threshold: Tensor) -> Bool[Tensor, "T in"]:
    """Which inputs count: strictly above the threshold, compared in float32 (never a NaN)."""
    return x.abs().float() > threshold.float()


def sparse_gemv(
    x: Float[Tensor, "T in"],
    wt: Float[Tensor, "in out"],
    threshold: Tensor,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "T out"]:
    """See :func:`sparseland.ops.sparse_gemv.sparse_gemv`; differentiable in all but the threshold."""
    y = torch.where(kept_inputs(x, threshold), x, 0) @ wt
    return y if bias is None else y + bias
