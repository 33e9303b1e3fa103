"""Joining attention over disjoint sets of keys: weights by each part's log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sparseland.errors import SparselandError


def merge_attention(
    parts: Sequence[tuple[Float[Tensor, "*N D"], Float[Tensor, "*N"]]],
) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N"]]:
    """Attention over the union of the parts' keys, from each part's output and log-sum-exp.

    With ``lse = logsumexp_i(lse_i)`` the output is ``sum_i exp(lse_i - lse) * out_i`` (Dao et al., 2022,
    section 3.1: softmax decomposes over blocks). A part in which a query saw nothing (lse -inf) has no
    weight there, whatever its output holds; a query that saw nothing in any part gets 0 and -inf.

    Args:
        parts: one or more ``(out, lse)`` of one shape, ``out [..., D]`` in any float type and
            ``lse [...]`` in fp32, natural log. No key may be in two parts.

    Returns:
        ``(out, lse)``, the output in the first part's type. Differentiable.

    Raises:
        SparselandError: no parts, or shapes that differ.
    """
    if not parts:
        raise SparselandError("merge_attention: there are no parts to merge")
    shape = parts[0][0].shape
    for out, lse in parts:
        if out.shape != shape or lse.shape != shape[:-1]:
            raise SparselandError(
                f"merge_attention: every part must be {list(shape)} with a log-sum-exp {list(shape[:-1])}, "
                f"got {list(out.shape)} and {list(lse.shape)}"
            )
    lses = torch.stack([lse for _, lse in parts])
    # Shifting by 0 where nothing was seen keeps exp(-inf - shift) at 0, and its gradient finite.
    shift = lses.amax(0).detach()
    shift = shift.masked_fill(shift == -math.inf, 0)
    weights = (lses - shift).exp()
    total = weights.sum(0)
    seen = total != 0  # a NaN in any part is NaN in the whole
    safe = total.masked_fill(~seen, 1)
    merged = torch.zeros(shape, dtype=torch.promote_types(parts[0][0].dtype, lses.dtype), device=lses.device)
    for weight, (out, _) in zip(weights, parts, strict=True):
        merged = merged + torch.where((weight != 0)[..., None], out, 0) * (weight / safe)[..., None]
    return merged.to(parts[0][0].dtype), (safe.log() + shift).masked_fill(~seen, -math.inf)
