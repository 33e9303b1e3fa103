"""Proof on a tiny input that methods would act on a model and nothing else would change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.method import LayerShape
from sparseland.models.attention import (
    ATTRIBUTE,
    evaluating,
    relative_distance,
    switched,
    tiny_forward,
    tiny_ids,
)
from sparseland.models.surgery import attention_layers
from sparseland.runtime import AttentionRuntime


class _Spy:
    """Stands where a layer's runtime stands: dense attention by the registered path, with shapes noted."""

    def __init__(self, layer: int, n_layers: int, seen: dict[int, LayerShape]) -> None:
        self.inner, self.n_layers, self.seen = AttentionRuntime(layer), n_layers, seen

    def attention(self, q: Tensor, k: Tensor, *args: Any) -> Tensor:
        layer = self.inner.layer
        self.seen[layer] = LayerShape(layer, self.n_layers, q.shape[1], k.shape[1], q.shape[3])
        return self.inner.attention(q, k, *args)


@torch.no_grad()
def probe(model: nn.Module) -> dict[int, LayerShape]:
    """The attention layers' shapes by index, if the model is supported; it is left as it was.

    Models that call scaled_dot_product_attention themselves bypass the registry, and a function without
    its mask function gets no causality; both would go unnoticed, so both are checked here.

    Raises:
        SparselandError: why the model is not supported.
    """
    name = type(model).__name__
    layers = attention_layers(model)
    if any(ATTRIBUTE in layer.__dict__ for layer in layers.values()):
        raise SparselandError("the model is sparse already; call remove() on its handle first")
    _refuse_chunks(model, layers)
    ids = tiny_ids(model)
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    seen: dict[int, LayerShape] = {}
    spies = {i: _Spy(i, len(layers), seen) for i in layers}
    with evaluating(model):
        with switched(layers, spies):
            a, b = (tiny_forward(model, x) for x in (ids, other))
        stock = tiny_forward(model, ids)
    missing = sorted(set(layers) - set(seen))
    if missing:
        raise SparselandError(
            f"{name}: attention layers {missing} do not go through transformers' AttentionInterface, so no "
            "method would act on them; not supported"
        )
    # Not exactly equal: an expert's other tokens may change how its product is rounded.
    limit = 1e-3 if a.dtype == torch.float32 else 5e-2
    if not relative_distance(b[:, :-1], a[:, :-1]) < limit:
        raise SparselandError(
            f"{name}: a later token changes earlier outputs; only causal decoders are supported"
        )
    error = relative_distance(a, stock)
    if not error < limit:
        raise SparselandError(
            f"{name}: not plain softmax attention (dense outputs differ by {error:.1e}); not supported"
        )
    return dict(sorted(seen.items()))


def _refuse_chunks(model: nn.Module, layers: dict[int, nn.Module]) -> None:
    """Chunks are longer than the tiny input: their mask would be refused at the first call that they cut."""
    for i, layer in layers.items():
        config: Any = layer.config
        types = getattr(config, "layer_types", None) or ()
        if i < len(types) and types[i] == "chunked_attention":
            size = getattr(config, "attention_chunk_size", None)
            raise SparselandError(
                f"{type(model).__name__}: layer {i} attends within chunks (of {size} tokens), which no "
                "sparse op computes; not supported"
            )
