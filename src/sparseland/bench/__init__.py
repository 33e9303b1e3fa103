"""Ops against the fastest dense rival on this machine, in one run, on inputs from a real model.

Times are medians of interleaved runs: dense, ours, dense, ours, …, so that a drifting machine treats
both alike. *Ideal* is what the rival's time would be if it could skip pairs (or bytes) for free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparseland.bench import attention, decode, selection, weights
from sparseland.bench.timing import Benchmark, measure
from sparseland.errors import SparselandError

__all__ = ["BENCHMARKS", "run"]

SHORTEST = 512

BENCHMARKS: dict[str, Benchmark] = {
    **attention.BENCHMARKS,
    **decode.BENCHMARKS,
    **selection.BENCHMARKS,
    **weights.BENCHMARKS,
}


def run(
    op: str,
    length: int | None = None,
    density: float | None = None,
    progress: Callable[[str, float], None] = lambda message, done: None,
) -> list[dict[str, Any]]:
    """Rows of one op's benchmark (``sparseland bench OP``).

    Args:
        length: tokens of the prompt or the cache (default: 8192 on a GPU, 4096 on a CPU).
        density: part of the pairs, tokens, channels or weights that is computed; the row says what came out.
        progress: told what comes next and the part (0 to 1) that is done.

    Raises:
        SparselandError: there is no benchmark of that name, or it has no such option or value.
    """
    if op not in BENCHMARKS:
        raise SparselandError(f"no benchmark {op!r}; there are {', '.join(sorted(BENCHMARKS))}")
    benchmark = BENCHMARKS[op]
    for name, value in (("length", length), ("density", density)):
        if value is not None and name not in benchmark.options:
            raise SparselandError(f"{op}: its benchmark has no {name} to set")
    if length is not None and length < SHORTEST:
        raise SparselandError(f"length={length} is not allowed; it must be {SHORTEST} or more")
    if density is not None and not 0 < density <= 1:
        raise SparselandError(f"density={density} is not allowed; it must lie above 0 and be at most 1")
    rows = []
    progress("preparing inputs", 0.0)
    with torch.no_grad():
        cases = benchmark.cases(length, density)
        for i, case in enumerate(cases):
            progress(f"{op}, {i + 1} of {len(cases)}", i / len(cases))
            rows.append({"op": op, **measure(case())})
    progress(op, 1.0)
    return rows
