"""Random inputs for one attention layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparseland.method import AttentionInputs


def make_inputs(
    n_keys: int = 300,
    *,
    n_queries: int | None = None,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    layer: int = 0,
    seed: int = 0,
    sharpness: float = 1.0,
) -> AttentionInputs:
    """Gaussian q, k, v; ``sharpness`` multiplies q, so that attention is far from flat."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n_queries or n_keys, dim, generator=g) * sharpness
    k, v = (torch.randn(batch, kv_heads, n_keys, dim, generator=g) for _ in range(2))
    return AttentionInputs(q, k, v, dim**-0.5, layer)


@pytest.fixture
def inputs() -> Callable[..., AttentionInputs]:
    return make_inputs
