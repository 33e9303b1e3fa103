"""Where attention lies and what a recipe computes, as small matrices for the report's pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.handle import apply
from sparseland.method import AttentionInputs, Calibration, Method
from sparseland.models.capture import capture_qkv
from sparseland.models.surgery import attention_layers, decoder_of
from sparseland.patterns import Pattern

# Pictures of a few heads tell the kinds of pattern apart; all of them would tell nothing.
MAX_LAYERS = 3
HEADS_PER_LAYER = 2


@torch.no_grad()
def attention_map_rows(
    model: nn.Module,
    methods: Sequence[Method],
    calibrations: dict[str, Calibration],
    ids: Int[Tensor, " N"],
    bins: int = 64,
    layers: int = MAX_LAYERS,
    heads: int = HEADS_PER_LAYER,
) -> Iterator[dict[str, Any]]:
    """``mass`` and ``computed`` of a few heads, ``[bins, bins]`` each (rows: queries).

    ``mass`` is the dense model's attention summed over a bin's keys and averaged over its queries;
    ``computed`` the fraction of the bin's causal pairs that the recipe computes on the same tokens.
    """
    if not any("prefill" in m.roles for m in methods):
        return
    indices = list(attention_layers(model))
    step = max(1, len(indices) // (layers + 1))
    chosen = indices[step::step][:layers]
    with apply(model, list(methods), calibrations=calibrations) as handle:
        for i in chosen:
            handle.runtimes[i].keep_pattern = True
        decoder_of(model)(input_ids=ids[None].to(next(model.parameters()).device), use_cache=False)
        patterns = {i: handle.runtimes[i].last_pattern for i in chosen}
    for x in capture_qkv(model, ids[None], chosen):
        pattern = patterns[x.layer]
        if pattern is None:
            continue
        computed = _binned_density(pattern, bins)
        for head in sorted(set(torch.linspace(0, x.q.shape[1] - 1, heads).long().tolist())):
            mass = binned_mass(x, head, bins)
            yield {
                "layer": x.layer,
                "head": head,
                "mass": [[round(v, 6) for v in row] for row in mass.tolist()],
                "computed": [
                    [round(v, 3) for v in row] for row in computed[min(head, len(computed) - 1)].tolist()
                ],
            }


def binned_mass(x: AttentionInputs, head: int, bins: int) -> Float[Tensor, "M M"]:
    """One head's true attention, summed over key bins and averaged over query bins."""
    n = x.k.shape[2]
    q, k = x.q[0, head].float(), x.k[0, head // x.group].float()
    edges = _edges(n, bins)
    out = torch.zeros(bins, bins)
    for row in range(bins):
        a, b = int(edges[row]), int(edges[row + 1])
        if b <= a:
            continue
        scores = q[a:b] @ k.T * x.scale
        future = torch.arange(n)[None] > torch.arange(a, b)[:, None]
        p = scores.masked_fill(future.to(scores.device), float("-inf")).softmax(-1).mean(0).cpu()
        out[row] = _bin_sums(p[None], edges)[0]
    return out


def _binned_density(pattern: Pattern, bins: int) -> Float[Tensor, "H M M"]:
    edges = _edges(pattern.n_keys, bins)
    mask = pattern.mask()[0].cpu()
    causal = torch.ones(pattern.n_queries, pattern.n_keys, dtype=torch.bool).tril(pattern.offset)
    total = _bin2d(causal.float(), edges)
    return torch.stack([_bin2d(m.float(), edges) / total.clamp(min=1) for m in mask])


def _bin2d(x: Float[Tensor, "N N"], edges: Int[Tensor, " M1"]) -> Float[Tensor, "M M"]:
    return _bin_sums(_bin_sums(x, edges).T.contiguous(), edges).T


def _bin_sums(x: Float[Tensor, "R N"], edges: Int[Tensor, " M1"]) -> Float[Tensor, "R M"]:
    total = torch.nn.functional.pad(x.cumsum(-1, dtype=torch.float64), (1, 0))
    return (total[:, edges[1:]] - total[:, edges[:-1]]).float()


def _edges(n: int, bins: int) -> Int[Tensor, " M1"]:
    return torch.linspace(0, n, bins + 1).round().long()
