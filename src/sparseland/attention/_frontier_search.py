"""Budgets that compute a wanted part of the pairs: by counting tokens, or by trying them on real inputs."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TypeVar

from sparseland.method import AttentionInputs, PrefillMethod
from sparseland.ops.attend import attend
from sparseland.patterns import WindowPattern

Setting = TypeVar("Setting", bound=PrefillMethod)

# Halvings of the budget: the density is then within a thousandth of what the family can reach.
STEPS = 10


def nominal_columns(density: float, length: int, per_diagonal: int) -> int:
    """Columns that, with the local diagonals and one more for every ``per_diagonal``, make ``density``.

    Columns lie anywhere, so ``v`` of them hold ``v / N`` of the causal pairs; the local diagonals fill two
    blocks of 64, every other one touches one or two of its own, and a band of width w near the diagonal
    holds ``2 w / N - (w / N)^2``. What both hold is counted once.
    """

    def computed(columns: int) -> float:
        width = min(length, 128 + 96 * (columns // per_diagonal))
        return 1 - (1 - columns / length) * (1 - width / length) ** 2

    return bisect_left(range(length), density, key=computed)


def search(
    families: Sequence[Callable[[float], Setting]], density: float, inputs: Sequence[AttentionInputs]
) -> Setting:
    """Of each family (a number in [0, 1] -> setting) the member nearest to ``density``; of these the best.

    Best is what keeps the most attention on ``inputs`` among those within a tenth of the nearest density.
    """
    found = [_fit(family, density, inputs) for family in families]
    nearest = min(abs(d - density) for _, d in found)
    close = [s for s, d in found if abs(d - density) <= nearest + 0.1 * density]
    return close[0] if len(close) == 1 else max(close, key=lambda s: recall_of(s, inputs))


def _fit(
    family: Callable[[float], Setting], density: float, inputs: Sequence[AttentionInputs]
) -> tuple[Setting, float]:
    low, high = 0.0, 1.0
    tried: list[tuple[Setting, float]] = []
    for _ in range(STEPS):
        setting = family((low + high) / 2)
        tried.append((setting, density_of(setting, inputs)))
        low, high = (low, (low + high) / 2) if tried[-1][1] > density else ((low + high) / 2, high)
    return min(tried, key=lambda t: abs(t[1] - density))


def density_of(method: PrefillMethod, inputs: Sequence[AttentionInputs]) -> float:
    """Mean density over the inputs and their heads."""
    return statistics.fmean(float(method.pattern(x).density().mean()) for x in inputs)


def recall_of(method: PrefillMethod, inputs: Sequence[AttentionInputs]) -> float:
    """Mean attention mass of the computed pairs."""
    kept = []
    for x in inputs:
        full = WindowPattern.dense(x.q.shape[2], x.k.shape[2])
        lse, dense = (
            attend(x.q, x.k, x.v, p, scale=x.scale, return_lse=True)[1] for p in (method.pattern(x), full)
        )
        kept.append(float((lse - dense).exp().mean()))
    return statistics.fmean(kept)
