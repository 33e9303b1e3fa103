"""Attention over patterns of a whole prompt, against dense causal attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sparseland.bench.inputs import DTYPES, captured, cast, labels
from sparseland.bench.rivals import dense_prefill, sparse_peer
from sparseland.bench.timing import Benchmark, Case, Work
from sparseland.method import AttentionInputs, LayerShape, parse_spec
from sparseland.ops.attend import attend
from sparseland.ops.block_scores import probe_vertical_slash
from sparseland.patterns import BlockPattern, ColumnPattern, Pattern, PermutedPattern, cdiv

DENSITY = 0.12
_BLOCK = 64

# A name, and what makes a pattern for inputs.
Source = tuple[str, Callable[[AttentionInputs], Pattern]]


def _attention(
    sources: Callable[[int, float | None], list[Source]], length: int | None, density: float | None
) -> Sequence[Callable[[], Case]]:
    inputs = captured(length)
    found = sources(inputs[0].q.shape[2], density)
    return [
        partial(_case, x, dtype, name, make) for dtype in DTYPES for x in inputs for name, make in found
    ]  # fmt: skip


def _case(x: AttentionInputs, dtype: torch.dtype, name: str, make: Callable[..., Pattern]) -> Case:
    x = cast(x, dtype)
    pattern = make(x)
    selection: dict[str, Work | str] = {} if _is_control(name) else {"selection": partial(make, x)}
    return Case(
        {"pattern": name, **labels(x)},
        partial(attend, x.q, x.k, x.v, pattern, scale=x.scale),
        dense_prefill(x),
        pattern.density().mean().item(),
        {**selection, "flex_sparse": sparse_peer(x, pattern)},
    )


def _is_control(name: str) -> bool:
    """Whether a pattern's selection is nothing that anybody would run."""
    return name.startswith(("oracle:", "random-blocks:"))


def _of_spec(spec: str) -> Source:
    method: Any = parse_spec(spec)
    return spec, method.pattern


def reach(length: int, density: float) -> int:
    """Last keys of each query that make up this part of all causal pairs."""
    return max(1, round(length * (1 - math.sqrt(1 - density))))


def _blocks(length: int, density: float | None) -> list[Source]:
    specs = [f"oracle:budget={density or DENSITY}", f"random-blocks:budget={density or DENSITY}"]
    if density is None:  # its density is its own choice
        specs.append("flexprefill:gamma=0.7,min_budget=256")
    return [_of_spec(spec) for spec in specs]


def _block_columns(length: int, density: float | None) -> list[Source]:
    return [_of_spec("minference:vertical=128,slash=256")]


def _window(length: int, density: float | None) -> list[Source]:
    if density is None:
        return [_of_spec(f"streaming:sinks=64,window={length // 16}")]
    sinks = min(64, reach(length, density) // 2)
    return [_of_spec(f"streaming:sinks={sinks},window={reach(length, density) - sinks}")]


def _token_blocks(length: int, density: float | None) -> list[Source]:
    blocks = max(2, round(reach(length, density or DENSITY) / _BLOCK))
    near = blocks // 2
    return [_of_spec(f"infllm-v2:dense_len=0,window={near * _BLOCK},topk={blocks - near}")]


def _columns(length: int, density: float | None) -> list[Source]:
    count = max(1, round(length * (density or DENSITY)))

    def make(x: AttentionInputs) -> Pattern:
        vertical, _ = probe_vertical_slash(x.q, x.k, 64, x.scale)
        chosen = torch.zeros_like(vertical, dtype=torch.bool)
        chosen.scatter_(-1, vertical.topk(count).indices, True)
        rows = cdiv(length, _BLOCK)
        mask = chosen[:, :, None].expand(-1, -1, rows, -1)
        return ColumnPattern.from_column_mask(mask, _BLOCK, length, length, cap=count)

    return [(f"verticals:count={count}", make)]


def _intervals(length: int, density: float | None) -> list[Source]:
    spec = f"dynamic-mask-attention:keep={reach(length, density or DENSITY)}"
    method: Any = parse_spec(spec)

    def make(x: AttentionInputs) -> Pattern:
        shape = LayerShape(x.layer, x.n_layers or 1, x.q.shape[1], x.k.shape[1], x.q.shape[3])
        learner = method.new_learner(shape)
        learner.A.fill_(1.0)  # untrained it would be a sliding window
        pattern: Pattern = method.pattern(replace(x, learner=learner.to(x.q.device, x.q.dtype)))
        return pattern

    return [(spec, make)]


def _grid(length: int, density: float | None) -> list[Source]:
    """Every query sees the earlier keys of its own place in the frames, as in a video."""
    frame = max(1, round(1 / (density or DENSITY)))

    def make(x: AttentionInputs) -> Pattern:
        place = torch.arange(length, device=x.q.device)
        order = (place % frame * length + place).argsort()
        phase = order % frame
        first = phase[::_BLOCK]
        last = phase[_BLOCK - 1 :: _BLOCK]
        last = torch.cat([last, phase[-1:]])[: len(first)]
        shared = (first[:, None] <= last) & (first <= last[:, None])
        lists = BlockPattern.from_block_mask(shared[None, None], _BLOCK, length, length)
        index = order.int()[None, None]
        return PermutedPattern(length, length, _BLOCK, index, index, lists.counts, lists.indices)

    return [(f"grid:frame={frame}", make)]


def _benchmark(sources: Callable[[int, float | None], list[Source]], *options: str) -> Benchmark:
    return Benchmark(partial(_attention, sources), frozenset({"length", *options}))


BENCHMARKS = {
    "block_sparse_attention": _benchmark(_blocks, "density"),
    "block_column_attention": _benchmark(_block_columns),
    "column_sparse_attention": _benchmark(_columns, "density"),
    "window_attention": _benchmark(_window, "density"),
    "token_block_attention": _benchmark(_token_blocks, "density"),
    "interval_attention": _benchmark(_intervals, "density"),
    "permuted_attention": _benchmark(_grid, "density"),
}
