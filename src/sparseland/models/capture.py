"""Reading a dense model's queries, keys and values, as attention sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Rope
from sparseland.models.attention import switched
from sparseland.models.masks import MaskSpec
from sparseland.models.rope import find_ropes
from sparseland.models.surgery import attention_layers, decoder_of
from sparseland.ops.attend import attend
from sparseland.patterns import WindowPattern


class _Enough(Exception):
    """All asked layers are noted: the rest of the forward is not needed."""


class _Recorder:
    """Stands where a layer's runtime stands: computes dense attention and notes its inputs."""

    active = False

    def __init__(
        self, layer: int, n_layers: int, rope: Rope | None, notes: list[AttentionInputs], wanted: set[int]
    ) -> None:
        self.layer, self.n_layers, self.rope, self.notes, self.wanted = layer, n_layers, rope, notes, wanted

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
        if self.layer in self.wanted:
            # A later layer must not be able to write into what was noted.
            noted = (q.clone(), k.clone(), v.clone())
            self.notes.append(AttentionInputs(*noted, scale, self.layer, self.n_layers, rope=self.rope))
            if len(self.notes) == len(self.wanted):
                raise _Enough
        n_queries, n_keys = q.shape[2], k.shape[2]
        pattern = WindowPattern(n_queries, n_keys, 0, mask.window or n_keys)
        return attend(q, k, v, pattern, scale=scale)


@torch.no_grad()
def capture_qkv(
    model: nn.Module,
    ids: Int[Tensor, "B N"],
    layers: Iterable[int] | None = None,
    *,
    ropes: Mapping[int, Rope] | None = None,
) -> Iterator[AttentionInputs]:
    """q, k, v of the asked attention layers (default all), post-RoPE, from one dense forward of ``ids``.

    No padding; nothing stays on the model; the forward ends with the last asked layer. All asked layers are
    held in memory until they are consumed.
    ``x.rope`` comes from ``ropes``, or is looked for; it is None where a model's RoPE can't be undone.
    """
    modules = attention_layers(model)
    ropes = _ropes(model) if ropes is None else ropes
    wanted = set(modules) if layers is None else set(layers) & set(modules)
    notes: list[AttentionInputs] = []
    recorders: dict[int, Any] = {i: _Recorder(i, len(modules), ropes.get(i), notes, wanted) for i in modules}
    with switched(modules, recorders), suppress(_Enough):
        decoder_of(model)(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    while notes:
        yield notes.pop(0)


def _ropes(model: nn.Module) -> Mapping[int, Rope]:
    """What :func:`find_ropes` gives, or nothing: whoever needs it says so when it is missing."""
    try:
        return find_ropes(model)
    except SparselandError:
        return {}
