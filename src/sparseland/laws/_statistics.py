"""Paired comparisons of two systems on the same samples, and many of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# With so many samples that differ, all signs are tried; beyond, so many random ones.
EXACT = 13
RESAMPLES = 9999
BOOTSTRAPS = 4000

Values = NDArray[np.float64]


def sign_flip_test(differences: Sequence[float], seed: int = 0) -> float:
    """p-value of the paired sign-flip permutation test that the mean is below 0 (one-sided).

    If the two systems were alike, each sample's difference would as soon have the other sign. Exact for up
    to 13 samples that differ at all, else by 9999 random flips, the observed one counted among them.

    Args:
        differences: per sample, the tested score minus the reference's.
    """
    d = np.asarray(differences, dtype=float)
    d = d[d != 0]  # no sign changes them
    if not d.size:
        return 1.0
    observed = d.sum()
    if d.size <= EXACT:
        bits = np.arange(2**d.size)[:, None] >> np.arange(d.size)
        sums = (1 - 2 * (bits & 1)) @ d
        extra = 0
    else:
        signs = np.random.default_rng(seed).integers(0, 2, (RESAMPLES, d.size))
        sums = (2 * signs - 1) @ d
        extra = 1
    # Sums that should be equal differ by rounding.
    below = int((sums <= observed + 1e-9 * np.abs(d).sum()).sum())
    return (below + extra) / (len(sums) + extra)


def bootstrap_interval(
    differences: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean by resampling the samples (paired, since differences are)."""
    d = np.asarray(differences, dtype=float)
    if d.size == 0:
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(0, d.size, (BOOTSTRAPS, d.size))
    low, high = np.quantile(d[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979): all those below alpha may be believed together."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
