"""Attention over blocks and columns in plain PyTorch: every score, the pattern's boolean mask, softmax."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sparseland.ops.window_attention.reference import masked_attention
from sparseland.patterns import BlockColumnPattern, ColumnPattern


def pattern_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    pattern: ColumnPattern | BlockColumnPattern,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp; differentiable by autograd."""
    return masked_attention(q, k, v, pattern.mask(), scale)
