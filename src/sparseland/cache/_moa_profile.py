"""What each attention value is worth to the loss (section 4.1 of the paper), summed over blocks.

The dense model runs once with gradients; ``dLoss/dO`` of each attention output is enough, since with
``O = A V`` the gradient of the attention values is ``G = dLoss/dO V^T``. A and G are recomputed layer by
layer, a few rows of queries at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.cache._moa_plan import Plan
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs
from sparseland.ops.attend import attend
from sparseland.patterns import Pattern, WindowPattern

_ROWS = 256  # queries whose attention values are held at once
_IGNORE = -100


class _Layer:
    """Stands where a layer's runtime stands: computes a pattern's attention and, if asked, notes it."""

    active = False

    def __init__(self, layer: int, pattern: Callable[[AttentionInputs], Pattern], note: bool = False) -> None:
        self.layer, self._pattern, self._note = layer, pattern, note
        self.inputs: AttentionInputs | None = None
        self.out: Tensor | None = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        x = AttentionInputs(q, k, v, scale, self.layer)
        pattern = self._pattern(x)
        if mask.window is not None and mask.window < k.shape[2]:
            pattern = WindowPattern(q.shape[2], k.shape[2], 0, mask.window)
        out = attend(q, k, v, pattern, scale=scale)
        if self._note:
            # With frozen weights nothing before the first layer asks for a gradient.
            out = out if out.requires_grad else out.requires_grad_()
            self.inputs = AttentionInputs(q.detach(), k.detach(), v.detach(), scale, self.layer)
            self.out = out
        return out


def _dense(x: AttentionInputs) -> Pattern:
    return WindowPattern.dense(x.q.shape[2], x.k.shape[2])


@contextmanager
def _frozen_float32(model: nn.Module) -> Iterator[None]:
    """Float32 weights that ask for no gradient: bf16 gradients are too coarse for differences of them."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t, t.data, t.requires_grad) for t in tensors]
    try:
        for t in tensors:
            t.requires_grad_(False)
            if t.dtype in (torch.bfloat16, torch.float16):
                t.data = t.data.float()
        yield
    finally:
        for t, data, grad in before:
            if t.dtype != data.dtype:
                t.data = data
            t.requires_grad_(grad)


def profile(
    model: nn.Module,
    ids: Int[Tensor, "B N"],
    length: int,
    block: int,
    supervision: str = "text",
    effect: str = "blocks",
) -> Float[Tensor, "L Hkv n n"]:
    """Mean importance of each block of keys to each block of queries, on pieces of ``length`` tokens.

    Each length reads all of ``ids``, in as many pieces as they hold.
    The loss is that of a piece's last quarter: of the text's tokens, or of the model's own next tokens.
    """
    count = max(1, ids.shape[1] // length)
    pieces = ids[:, : count * length].reshape(-1, length)
    total: Tensor | None = None
    with _frozen_float32(model):
        for piece in pieces.to(next(model.parameters()).device):
            labels = torch.full_like(piece, _IGNORE)
            quarter = max(1, length // 4)
            labels[-quarter:] = piece[-quarter:]
            if supervision == "model":
                with torch.no_grad():
                    logits = model(input_ids=piece[None], use_cache=False, logits_to_keep=quarter + 1).logits
                labels[-quarter:] = logits[0, :-1].argmax(-1)
            found = influence(model, piece[None], labels[None], block, effect)
            total = found if total is None else total + found
    assert total is not None
    if not total.isfinite().all():
        raise SparselandError(
            f"moa: the model's gradients on the calibration text ({length} tokens a piece) are not finite"
        )
    return total.cpu() / len(pieces)


def influence(
    model: nn.Module,
    ids: Int[Tensor, "B N"],
    labels: Int[Tensor, "B N"],
    block: int,
    effect: str = "blocks",
) -> Float[Tensor, "L Hkv n n"]:
    """Influence of each block, the largest of a group's query heads, mean over the batch.

    Args:
        labels: the token that each position holds in the loss (-100: none), aligned with ``ids``.
        block: tokens per block.
        effect: ``blocks``, ``|sum E|`` over a block, or ``elements``, ``sum |E|``.
    """
    from sparseland.models.attention import switched
    from sparseland.models.surgery import attention_layers

    modules = attention_layers(model)
    layers: dict[int, Any] = {i: _Layer(i, _dense, note=True) for i in modules}
    with torch.enable_grad(), switched(modules, layers):
        # Logits are a large part of a small model's work: only those that the loss reads.
        scored = ids.shape[1] - int((labels[:, 1:] != _IGNORE).any(0).int().argmax()) - 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=scored + 1).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, -scored:].flatten(), ignore_index=_IGNORE
        )
        grads = torch.autograd.grad(loss, [layer.out for layer in layers.values()])
    blocks = []
    for layer, grad in zip(layers.values(), grads, strict=True):
        x = layer.inputs
        heads = block_influence(x, grad, block, effect).mean(0)
        blocks.append(torch.unflatten(heads, 0, (-1, x.group)).amax(1))
        layer.inputs = layer.out = None
    return torch.stack(blocks)


def block_influence(
    x: AttentionInputs, grad: Float[Tensor, "B Hq N D"], block: int, effect: str = "blocks"
) -> Float[Tensor, "B Hq n n"]:
    """Influence of each block of one layer, from ``dLoss/dO``; pieces of queries at a time."""
    n = x.q.shape[2]
    rows = max(block, _ROWS // block * block)
    out = []
    for start in range(0, n, rows):
        found = effects(x, grad, start, min(n, start + rows))
        found = found.abs() if effect == "elements" else found
        padded = F.pad(found, (0, -n % block, 0, -found.shape[2] % block))
        batch, heads, height, width = padded.shape
        blocks = padded.view(batch, heads, height // block, block, width // block, block).sum((3, 5))
        out.append(blocks.abs())
    return torch.cat(out, 2)


def effects(
    x: AttentionInputs, grad: Float[Tensor, "B Hq N D"], start: int, stop: int
) -> Float[Tensor, "B Hq n N"]:
    """First-order change of the loss when ``A_ij`` is dropped and its row renormalised, rows [start, stop).

    ``dA_ij = -A_ij`` and ``dA_ik = A_ik A_ij / (1 - A_ij)``, so
    ``E_ij = -A_ij (G_ij - sum_k G_ik A_ik) / (1 - A_ij)``; a row of one key loses it: ``-G A``.
    """
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    n = x.q.shape[2]
    k, v = (t.to(dtype).repeat_interleave(x.group, 1) for t in (x.k, x.v))
    logits = x.q[:, :, start:stop].to(dtype) @ k.mT * x.scale
    position = torch.arange(n, device=logits.device)
    future = position > position[start:stop, None]
    a = logits.masked_fill(future, -torch.inf).softmax(-1)
    g = grad[:, :, start:stop].to(dtype) @ v.mT
    mean = (g * a).sum(-1, keepdim=True)
    rest = (1 - a).clamp(min=torch.finfo(dtype).eps)
    found = -a * (g - mean) / rest
    if start == 0:
        found[:, :, 0] = -(g * a)[:, :, 0]
    return found


def _windows(row: Any, block: int, x: AttentionInputs) -> Pattern:
    from sparseland.cache.moa import span_pattern

    return span_pattern(row, x, block, 0)


@torch.no_grad()
def loss_with(model: nn.Module, ids: Int[Tensor, "B N"], plan: Plan, block: int) -> float:
    """Mean loss of the last quarter of ``ids`` with a plan's windows on all layers."""
    from sparseland.models.attention import switched
    from sparseland.models.surgery import attention_layers

    modules = attention_layers(model)
    layers: dict[int, Any] = {
        i: _Layer(i, partial(_windows, plan[at], block)) for at, i in enumerate(modules)
    }
    losses = []
    quarter = max(1, ids.shape[1] // 4)
    with switched(modules, layers):
        for row in ids.to(next(model.parameters()).device):
            logits = model(input_ids=row[None], use_cache=False, logits_to_keep=quarter + 1).logits[0, :-1]
            losses.append(float(F.cross_entropy(logits.float(), row[-quarter:])))
    return sum(losses) / len(losses)
