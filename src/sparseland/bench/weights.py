"""A weight matrix read in part, against all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseland.bench.inputs import DTYPES, device, name
from sparseland.bench.timing import Benchmark, Case
from sparseland.ops.sparse_gemv import sparse_gemv

_IN, _OUT = 4096, 11008
_DENSITIES = (1.0, 0.75, 0.6, 0.5, 0.3, 0.1)
# Several weights in turn: one alone would stay in the cache, as no model's weights do.
_COPIES = 3

Weights = Callable[[torch.dtype], tuple[Iterator[Tensor], Iterator[Tensor]]]


def _cases(length: int | None, density: float | None) -> Sequence[Callable[[], Case]]:
    chosen = _DENSITIES if density is None else (density,)
    weights = lru_cache(maxsize=1)(_weights)
    return [partial(_case, weights, dtype, share) for dtype in DTYPES for share in chosen]


def _weights(dtype: torch.dtype) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """The same matrices row by row and column by column, over and over."""
    rows = [torch.randn(_OUT, _IN, dtype=dtype, device=device()) for _ in range(_COPIES)]
    return cycle(rows), cycle([w.T.contiguous() for w in rows])


def _case(weights: Weights, dtype: torch.dtype, share: float) -> Case:
    rows, columns = weights(dtype)
    x = torch.randn(1, _IN, dtype=dtype, device=device())
    threshold = x.abs().float().quantile(1 - share).to(dtype) if share < 1 else x.new_tensor(-1.0)
    return Case(
        {"dtype": name(dtype), "in": _IN, "out": _OUT},
        partial(_ours, x, columns, threshold),
        {"rows": partial(_dense_rows, x, rows), "columns": partial(_dense_columns, x, columns)},
        share,
    )


def _dense_rows(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return F.linear(x, next(weights))


def _dense_columns(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return x @ next(weights)


def _ours(x: Tensor, weights: Iterator[Tensor], threshold: Tensor) -> Tensor:
    return sparse_gemv(x, next(weights), threshold)


BENCHMARKS = {"sparse_gemv": Benchmark(_cases, frozenset({"density"}))}
