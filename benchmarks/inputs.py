"""Realistic inputs for speed claims: queries, keys and values of SmolLM2-135M reading real text.

Selection depends on the inputs, so Gaussian noise would measure nothing. The embedded model reads the
sources of Python's standard library; beyond its context of 8192 tokens its positions are stretched by YaRN
(factor = length / 8192).

``shape="smollm2"`` is what the model computes: 9 query and 3 key heads of 64.

``shape="llama-8b"`` has the shapes of Llama-3.1-8B: 32 query and 8 key heads of 128. Its 8 key heads are
taken from several layers in turn; a key head keeps its 3 query heads and gets the first of them once more
(with the next position's query, so that it is no copy). Head size: ``q' = R [q, q] / sqrt(2) * 2^(1/4)``
and ``k' = R [k, k] / sqrt(2) * 2^(1/4)`` with one random rotation R, so ``q'.k' / sqrt(128)`` equals
``q.k / sqrt(64)``: attention is that of the real heads. Values are two layers' values side by side.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparseland.method import AttentionInputs

LAYERS = (1, 8, 15, 22, 28)
CONTEXT = 8192
Shape = Literal["smollm2", "llama-8b"]


def load_inputs(
    length: int, shape: Shape = "smollm2", layers: tuple[int, ...] = LAYERS, device: str = "cuda"
) -> list[AttentionInputs]:
    """bf16 inputs of one prompt of ``length`` tokens: one entry a layer, or one of Llama's shape."""
    captured = list(_captured(length, layers, device))
    return captured if shape == "smollm2" else [stretched(captured)]


def stretched(captured: list[AttentionInputs]) -> AttentionInputs:
    """Llama-3.1-8B's shapes out of three layers or more of 9/3 heads of 64 (see above).

    Raises:
        ValueError: fewer layers, whose heads would have to be repeated.
    """
    if len(captured) < 3:
        raise ValueError(f"8 key heads need 3 layers of 3, got {len(captured)}")
    qs, ks, vs = [], [], []
    for i in range(8):
        x, other = captured[i % len(captured)], captured[(i + 1) % len(captured)]
        head = (i // len(captured)) % 3
        own = x.q[:, 3 * head : 3 * head + 3]
        # Shifted by one position: the same interests, no two equal heads.
        qs += [own, own[:, :1].roll(1, 2)]
        ks.append(x.k[:, head : head + 1])
        vs.append(torch.cat([x.v[:, head : head + 1], other.v[:, head : head + 1]], -1))
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(128, 128, generator=generator, dtype=torch.float64)).Q
    turn = turn.to(qs[0].device, torch.float32) * 2**-0.25

    def widen(x: Tensor) -> Tensor:
        return (torch.cat([x, x], -1).float() @ turn).to(x.dtype)

    q, k = (torch.cat([widen(t) for t in parts], 1) for parts in (qs, ks))
    return AttentionInputs(q, k, torch.cat(vs, 1), 128**-0.5, layer=15, n_layers=32)


def text(tokens: int) -> str:
    """At least ``tokens`` tokens' worth of the standard library's sources (four characters each)."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if "test" in path.parts or "site-packages" in path.parts:
            continue
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        size += len(parts[-1])
        if size > 6 * tokens:
            break
    return "\n".join(parts)


@cache
def _model(length: int, device: str) -> Any:
    from sparseland.models import load_model

    factor = length / CONTEXT if length > CONTEXT else None
    return load_model(None, dtype="bfloat16", device=device, rope_scale=factor, length=length)


def _captured(length: int, layers: tuple[int, ...], device: str) -> Iterator[AttentionInputs]:
    from sparseland.models.capture import capture_qkv
    from sparseland.tasks.text import tokenize

    loaded = _model(length, device)
    ids = tokenize(loaded.tokenizer, text(length))[:length]
    if ids.numel() < length:
        raise SystemExit(f"only {ids.numel()} tokens of text for a prompt of {length}")
    yield from capture_qkv(loaded.model, ids[None].to(device), layers)
