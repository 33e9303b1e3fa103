"""Attention over a pattern of parts: each part by the op that fits it, merged per query."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseland.ops.merge import merge_attention
from sparseland.ops.permuted_attention import on_device, permuted_attention
from sparseland.patterns import PartsPattern, PermutedPattern


def attend_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PartsPattern,
    attend: Callable[..., Any],
    *,
    scale: float,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merges the parts with float32 sums; ``attend`` computes what is no permuted pattern."""
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_zeros(q.shape, dtype=dtype), q.new_full(q.shape[:3], -math.inf, dtype=dtype)
    for part in pattern.parts:
        made = part.pattern()
        heads = part.heads
        options: dict[str, Any] = {"scale": scale, "return_lse": True, "backend": backend}
        if heads is not None and heads == tuple(range(q.shape[1])):
            heads = None
        at = None if heads is None else on_device(heads, q.device)
        queries = q if at is None else q.index_select(1, at)
        if isinstance(made, PermutedPattern):
            kv = None if heads is None else tuple(h // group for h in heads)
            found = permuted_attention(queries, k, v, made, kv_heads=kv, **options)
        elif heads is None:
            found = attend(queries, k, v, made, **options)
        else:
            kv_at = on_device(tuple(h // group for h in heads), q.device)
            found = attend(queries, k.index_select(1, kv_at), v.index_select(1, kv_at), made, **options)
        if at is None:
            out, lse = merge_attention([(out, lse), (found[0].to(dtype), found[1].to(dtype))])
            continue
        before = out.index_select(1, at), lse.index_select(1, at)
        new, new_lse = merge_attention([before, (found[0].to(dtype), found[1].to(dtype))])
        out, lse = out.index_copy(1, at, new), lse.index_copy(1, at, new_lse)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)
