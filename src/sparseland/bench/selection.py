"""What choosing costs: selections of prompt methods, against the dense attention that they are to save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from sparseland.bench.inputs import DTYPES, captured, cast, labels
from sparseland.bench.rivals import dense_prefill
from sparseland.bench.timing import Benchmark, Case, Work
from sparseland.method import AttentionInputs
from sparseland.ops.block_max_probability import block_max_probability
from sparseland.ops.block_scores import pooled_scores, probe_vertical_slash
from sparseland.ops.kernel_scores import compress_keys, select_blocks
from sparseland.ops.lowbit_scores import lowbit_tiles
from sparseland.ops.stripe_scores import stripe_columns
from sparseland.ops.token_block_attention import tile_for
from sparseland.ops.top_values import top_mask
from sparseland.ops.tree_search import tree_search

Works = Callable[[AttentionInputs], dict[str, Work]]


def _selections(works: Works, length: int | None, density: float | None) -> Sequence[Callable[[], Case]]:
    inputs = captured(length)
    names = works(inputs[0])
    return [partial(_case, works, x, dtype, name) for dtype in DTYPES for x in inputs for name in names]


def _case(works: Works, x: AttentionInputs, dtype: torch.dtype, name: str) -> Case:
    x = cast(x, dtype)
    return Case({"setting": name, **labels(x)}, works(x)[name], dense_prefill(x))


def _block_scores(x: AttentionInputs) -> dict[str, Work]:
    return {
        "pooled_scores, blocks of 64": partial(pooled_scores, x.q, x.k, 64, x.scale),
        "probe_vertical_slash, 64 queries": partial(probe_vertical_slash, x.q, x.k, 64, x.scale),
    }


def _block_max(x: AttentionInputs) -> dict[str, Work]:
    return {"blocks of 64": partial(block_max_probability, x.q, x.k, 64, x.scale)}


def _stripes(x: AttentionInputs) -> dict[str, Work]:
    work = partial(stripe_columns, x.q, x.k, block_size=128, step=16, theta=12.0, scale=x.scale)
    return {"theta 12": work}


def _lowbit(x: AttentionInputs) -> dict[str, Work]:
    tau = torch.full((x.q.shape[1],), 0.008, device=x.q.device)
    return {"tau 0.008": partial(lowbit_tiles, x.q, x.k, tau, scale=x.scale)}


def _kernels(x: AttentionInputs) -> dict[str, Work]:
    tile = tile_for(x.group, x.q.shape[3])

    def run() -> object:
        return select_blocks(
            x.q, compress_keys(x.k, 32, 16), x.k.shape[2], kernel=32, stride=16, block_size=64,
            window=4, init=1, topk=16, dense_len=0, tile=tile, scale=x.scale,
        )  # fmt: skip

    return {"16 blocks of 64": run}


def _tree(x: AttentionInputs) -> dict[str, Work]:
    rows = torch.arange(-(-x.q.shape[2] // 32), device=x.q.device, dtype=torch.int32)
    return {
        "256 blocks of 2": partial(
            tree_search, x.q, x.k, torch.zeros_like(rows)[None], rows[None] * 16,
            block_q=32, block_k=2, keep=256, stride=2,
        )
    }  # fmt: skip


def _top_values(length: int | None, density: float | None) -> Sequence[Callable[[], Case]]:
    x = captured(length)[0]
    scores, _ = probe_vertical_slash(x.q, x.k, 64, x.scale)
    rows = scores.repeat(1, 16, 1)
    count = max(1, round(rows.shape[-1] * (density or 1 / 8)))
    given = {"rows": rows.shape[1], "length": rows.shape[2], "count": count}
    ours = partial(top_mask, rows, torch.tensor(count, device=rows.device))
    rivals: dict[str, Work | str] = {
        "topk": partial(torch.topk, rows, count),
        "sort": partial(torch.sort, rows, dim=-1, descending=True),
    }
    return [lambda: Case({"dtype": "float32", **given}, ours, rivals)]


_WORKS: dict[str, Works] = {
    "block_scores": _block_scores,
    "block_max_probability": _block_max,
    "stripe_scores": _stripes,
    "lowbit_scores": _lowbit,
    "kernel_scores": _kernels,
    "tree_search": _tree,
}


def _benchmarks() -> Iterator[tuple[str, Benchmark]]:
    for op, works in _WORKS.items():
        yield op, Benchmark(partial(_selections, works), frozenset({"length"}))
    yield "top_values", Benchmark(_top_values)


BENCHMARKS = dict(_benchmarks())
