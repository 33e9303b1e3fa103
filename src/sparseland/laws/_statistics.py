"""Paired comparisons of two systems on the same samples, and many of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Random flips of a test by itself.
RESAMPLES = 9999
# Many tests corrected together need smaller p-values: this many flips for one at alpha / comparisons.
FLIPS_AT_ALPHA = 20
BOOTSTRAPS = 4000
# Numbers held at once while flipping.
_HELD = 2**22

Values = NDArray[np.float64]


def resamples(comparisons: int, alpha: float = 0.05) -> int:
    """Random flips per test where so many are corrected together.

    The smallest p-value that random flips can give, times the comparisons, stays below a twentieth of alpha.
    """
    return max(RESAMPLES, math.ceil(FLIPS_AT_ALPHA * comparisons / alpha))


def smallest_p(samples: int, comparisons: int, alpha: float = 0.05) -> float:
    """The p-value of a loss in every sample, uncorrected: what :func:`sign_flip_tests` can give at least."""
    return 1 / int(min(2**samples, resamples(comparisons, alpha) + 1))


def sign_flip_tests(
    differences: Sequence[Sequence[float]], alpha: float = 0.05, seed: int = 0
) -> list[float]:
    """p-values of paired sign-flip permutation tests that the mean is below 0 (one-sided), uncorrected.

    If the two systems were alike, each sample's difference would as soon have the other sign. All signs are
    tried where they are no more than :func:`resamples`; else so many random ones, the same for all
    comparisons, and the observed ones counted among them.

    Args:
        differences: of every comparison, per sample, the tested score minus the reference's.
        alpha: what the corrected p-values will be held against.
    """
    tries = resamples(len(differences), alpha)
    # No sign changes differences of 0.
    changed = [d[d != 0] for d in (np.asarray(d, dtype=float) for d in differences)]
    found = [_exact(d) if 2**d.size <= tries else math.nan for d in changed]
    large = [i for i, p in enumerate(found) if math.isnan(p)]
    for i, p in zip(large, _random([changed[i] for i in large], tries, seed), strict=True):
        found[i] = p
    return found


def _exact(d: Values) -> float:
    sums = np.zeros(1)
    for x in d:
        sums = np.concatenate((sums + x, sums - x))
    return float((sums <= _limit(d)).mean())


def _random(many: Sequence[Values], tries: int, seed: int) -> list[float]:
    if not many:
        return []
    longest = max(d.size for d in many)
    columns = np.stack([np.pad(d, (0, longest - d.size)) for d in many], axis=1)
    limits = np.array([_limit(d) for d in many])
    rng = np.random.default_rng(seed)
    step = max(1, _HELD // max(longest, len(many)))
    below = np.zeros(len(many))
    for start in range(0, tries, step):
        signs = 2.0 * rng.integers(0, 2, (min(step, tries - start), longest), dtype=np.int8) - 1
        below += (signs @ columns <= limits).sum(0)
    return [float(p) for p in (below + 1) / (tries + 1)]


def _limit(d: Values) -> float:
    """The observed sum; sums that should equal it differ by rounding."""
    return float(d.sum() + 1e-9 * np.abs(d).sum())


def bootstrap_interval(
    differences: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean by resampling the samples (paired, since differences are).

    For looking at: it has no width where all samples are alike. :func:`upper_bound` is for deciding.
    """
    d = np.asarray(differences, dtype=float)
    if d.size == 0:
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(0, d.size, (BOOTSTRAPS, d.size))
    low, high = np.quantile(d[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def upper_bound(values: Sequence[float], alpha: float = 0.05, highest: float = 1.0, seed: int = 0) -> float:
    """Upper confidence bound of the mean of values that are never above ``highest`` (Gaffke, 2005).

    The values and one more at ``highest`` are weighted at random, all weights alike likely (flat Dirichlet);
    the bound is the ``1 - alpha`` quantile of such means. It assumes no shape and no number of samples: what
    few samples may have missed is in the one more. For values of two kinds, one of them ``highest``, it is
    Clopper and Pearson's exact bound. That it holds for all others is Gaffke's conjecture, to which
    Learned-Miller and Thomas (2019, arXiv 1905.06208) found no exception. The percentile bootstrap and
    Student's t are too short for losses that are rare and large, as those of sparse attention are.
    """
    all_values = np.append(np.asarray(values, dtype=float), highest)
    weights = np.random.default_rng(seed).dirichlet(np.ones(all_values.size), BOOTSTRAPS)
    return float(np.quantile(weights @ all_values, 1 - alpha))


def smallest_bound(samples: int, alpha: float = 0.05) -> float:
    """The :func:`upper_bound` of so many zeros: samples that score as dense."""
    return 1 - alpha ** (1 / samples) if samples else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979): all those below alpha may be believed together."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
