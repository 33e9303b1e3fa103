"""Who ops are compared with: dense attention of PyTorch, FlashAttention-4 and FlexAttention.

A rival is a piece of work, or the reason why it can't run on these inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseland.bench.timing import Work
from sparseland.machine import versions
from sparseland.method import AttentionInputs
from sparseland.ops.gather_decode import dense_decode
from sparseland.patterns import BlockPattern, Pattern, WindowPattern

# (batch, head, query, key) -> whether the pair is computed; all are 0-dimensional tensors.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def dense_prefill(x: AttentionInputs) -> dict[str, Work | str]:
    """Dense causal attention of a whole prompt; PyTorch's with repeated and with grouped key heads."""
    _forget_compiled(x.q)
    k, v = x.k.repeat_interleave(x.group, 1), x.v.repeat_interleave(x.group, 1)
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, scale=x.scale)
    return {
        "sdpa": partial(sdpa, x.q, k, v),
        "sdpa_gqa": partial(sdpa, x.q, x.k, x.v, enable_gqa=True),
        "fa4": why_no_fa4(x.q) or _fa4(x, causal=True),
        "flex": why_no_flex(x.q) or _flex(x, lambda b, h, i, j: i >= j),
    }


def dense_step(x: AttentionInputs) -> dict[str, Work | str]:
    """Dense attention of one query over the whole cache."""
    _forget_compiled(x.q)
    return {
        "sdpa": partial(dense_decode, x.q, x.k, x.v, scale=x.scale),
        "fa4": why_no_fa4(x.q) or _fa4(x, causal=False),
        "flex": why_no_flex(x.q) or _flex(x, None),
    }


def sparse_peer(x: AttentionInputs, pattern: Pattern) -> Work | str:
    """FlexAttention over the pairs of a pattern."""
    if reason := why_no_flex(x.q):
        return reason
    match pattern:
        case BlockPattern(block_size=size):
            listed = pattern.block_mask().expand(x.q.shape[0], x.q.shape[1], -1, -1).contiguous()
            return _flex(x, lambda b, h, i, j: listed[b, h, i // size, j // size] & (i >= j))
        case WindowPattern(sinks=sinks, window=window):
            return _flex(x, lambda b, h, i, j: (i >= j) & ((j < sinks) | (i - j < window)))
    return f"its block masks don't express a {type(pattern).__name__}"


def why_no_fa4(q: Tensor) -> str | None:
    """The reason FlashAttention-4 can't run on ``q``, or None."""
    if q.device.type != "cuda":
        return "it needs a CUDA device"
    if "flash-attn-4" not in versions():
        return "flash-attn-4 is not installed"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "it needs bfloat16 or float16"
    return None


def why_no_flex(q: Tensor) -> str | None:
    """The reason FlexAttention is not tried on ``q``, or None."""
    # On a CPU it works too, but takes a C++ compiler and half a minute for each mask.
    return None if q.device.type == "cuda" else "it is compiled for CUDA devices only here"


def _fa4(x: AttentionInputs, causal: bool) -> Work:
    turned = [t.transpose(1, 2) for t in (x.q, x.k, x.v)]

    def run() -> Any:
        from flash_attn.cute import interface

        return interface._flash_attn_fwd(*turned, causal=causal, softmax_scale=x.scale)

    return run


def _flex(x: AttentionInputs, rule: Rule | None) -> Work:
    """Compiled by the first call; what it would do uncompiled (all scores in memory) is nobody's rival."""

    @cache
    def ready() -> Work:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        shape = (x.q.shape[0], x.q.shape[1], x.q.shape[2], x.k.shape[2])
        mask = rule and create_block_mask(rule, *shape, device=str(x.q.device))
        compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return partial(
            compiled, x.q, x.k, x.v, block_mask=mask, scale=x.scale, enable_gqa=x.group > 1
        )  # fmt: skip

    return lambda: ready()()


def _forget_compiled(q: Tensor) -> None:
    # Each mask is compiled anew, and torch.compile gives up on a function after a few of them.
    if why_no_flex(q) is None:
        torch.compiler.reset()
