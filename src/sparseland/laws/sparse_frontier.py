"""The Sparse Frontier's law and tests: score against model size, length and compression.

Nawrot et al., *The Sparse Frontier* (2025). The law is log-linear, with an intercept for every task and a
slope of compression for every phase (prompts, decoding)::

    link(score) = a_task + b log(parameters) + c log(length) + d_phase log(compression)

``link`` is the logit of the score, drawn in by half a sample on either side so that 0 and 1 have one. The
paper's own link and coefficients were not at hand; what is checked is what it claims: that such a law,
fitted on a range, holds beyond it (largest size, longest prompt, highest compression).

*Preserved accuracy* is decided on the same samples: a paired sign-flip test against the dense model, with
Holm's correction over all comparisons made together. No significant loss is the paper's criterion; it is
easily met by few samples, so an upper bound of the loss says besides whether a loss above a margin is ruled
out. The bound assumes nothing but that no sample loses more than 1, and so is right for few samples, too:
59 that score as dense rule out a loss of 5 %, 58 don't.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from sparseland.errors import SparselandError
from sparseland.laws._statistics import bootstrap_interval, holm, sign_flip_tests, upper_bound

TEST = "paired sign-flip permutation test, one-sided, Holm-corrected"
ALPHA = 0.05
# A loss of this much of the score is called a change even where it is not significant.
MARGIN = 0.05

Held = Literal["params", "length", "compression"]
Item = TypeVar("Item")


# ---------------------------------------------------------------------- law


@dataclass(frozen=True)
class Point:
    """One measured mean score.

    Args:
        score: between 0 and 1.
        samples: how many it is the mean of.
        compression: 1 / measured density; 1 is dense.
    """

    score: float
    samples: int
    params: float
    length: int
    compression: float
    task: str
    phase: str


@dataclass(frozen=True)
class Law:
    """A fitted law: its coefficients by name, and what did not vary and so has none."""

    coefficients: dict[str, float]
    constant: tuple[str, ...]

    @classmethod
    def fit(cls, points: Sequence[Point]) -> Law:
        """Least squares in the link's units.

        Raises:
            SparselandError: fewer points than coefficients.
        """
        constant = tuple(name for name in ("params", "length") if len({getattr(p, name) for p in points}) < 2)
        names = sorted({n for p in points for n in _features(p, constant)})
        if len(points) < max(1, len(names)):
            raise SparselandError(
                f"a law of {len(names)} coefficients needs as many points, got {len(points)}"
            )
        matrix = np.array([[_features(p, constant).get(n, 0.0) for n in names] for p in points])
        target = np.array([link(p.score, p.samples) for p in points])
        solution, *_ = np.linalg.lstsq(matrix, target, rcond=None)
        return cls(dict(zip(names, map(float, solution), strict=True)), constant)

    def predict(self, point: Point) -> float:
        """The score that the law expects.

        Raises:
            SparselandError: a task or phase that the law was not fitted on.
        """
        features = _features(point, self.constant)
        if missing := sorted(set(features) - set(self.coefficients)):
            raise SparselandError(f"the law knows nothing of {', '.join(missing)}")
        return 1 / (1 + math.exp(-sum(self.coefficients[n] * x for n, x in features.items())))

    def r_squared(self, points: Sequence[Point]) -> float:
        """Part of the scores' variance that the law explains; below 0 where their mean guesses better."""
        measured = np.array([p.score for p in points])
        expected = np.array([self.predict(p) for p in points])
        spread = float(((measured - measured.mean()) ** 2).sum())
        left = float(((measured - expected) ** 2).sum())
        return 1 - left / spread if spread > 0 else math.nan


def link(score: float, samples: int) -> float:
    """The logit of a score of so many samples; finite for 0 and 1."""
    inside = (score * samples + 0.5) / (samples + 1)
    return math.log(inside / (1 - inside))


def _features(p: Point, constant: Sequence[str]) -> dict[str, float]:
    found = {f"task {p.task}": 1.0}
    if p.compression != 1:
        found[f"log compression, {p.phase}"] = math.log(p.compression)
    if "params" not in constant:
        found["log params"] = math.log(p.params)
    if "length" not in constant:
        found["log length"] = math.log(p.length)
    return found


@dataclass(frozen=True)
class HoldOut:
    """A law fitted on all but the largest values of one axis, and how well it tells those."""

    axis: Held
    value: float
    law: Law
    points: int
    r_squared: float
    r_squared_fit: float
    error: float


def hold_out(points: Sequence[Point], axis: Held) -> HoldOut | None:
    """Fit without the largest size, length or compression, and predict it; None where that can't be done.

    Compressions are measured and so hardly ever equal: the top quarter of the sparse points is held out.
    """
    values = sorted({getattr(p, axis) for p in points if axis != "compression" or p.compression > 1})
    if len(values) < (4 if axis == "compression" else 2):
        return None
    edge = values[-1] if axis != "compression" else values[len(values) * 3 // 4]
    inside = [p for p in points if getattr(p, axis) < edge]
    outside = [p for p in points if getattr(p, axis) >= edge]
    if len(outside) < 2:  # one point has no variance to explain
        return None
    try:
        law = Law.fit(inside)
        # With one value left, the axis has no coefficient, and the law can't be asked beyond it.
        if axis in law.constant:
            return None
        expected = [law.predict(p) for p in outside]
    except SparselandError:
        return None
    error = float(np.mean([abs(p.score - e) for p, e in zip(outside, expected, strict=True)]))
    return HoldOut(axis, edge, law, len(outside), law.r_squared(outside), law.r_squared(inside), error)


# -------------------------------------------------------------------- tests


@dataclass(frozen=True)
class Comparison:
    """A setting against dense on the same samples.

    Args:
        loss: mean score lost (negative: gained).
        interval: of the loss, 95 %, paired bootstrap.
        bound: what the mean loss is at most (one-sided, at ``1 - alpha``, this comparison by itself).
        p: of the sign-flip test, corrected for all comparisons made together.
        within: whether a loss above the margin is ruled out: the bound is below it.
        verdict: ``lost`` (significant, be it small), else ``kept`` if within the margin, else ``open``.
    """

    loss: float
    interval: tuple[float, float]
    bound: float
    p: float
    within: bool
    verdict: Literal["lost", "kept", "open"]


def compare(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    alpha: float = ALPHA,
    margin: float = MARGIN,
    seed: int = 0,
) -> list[Comparison]:
    """Compare ``(scores, dense scores)`` of the same samples, corrected for being many.

    Args:
        pairs: of scores between 0 and 1.
        alpha: of the corrected tests, and of each bound.
        margin: a mean loss that matters.
    """
    differences = [[a - b for a, b in zip(scores, dense, strict=True)] for scores, dense in pairs]
    adjusted = holm(sign_flip_tests(differences, alpha, seed))
    found = []
    for d, p in zip(differences, adjusted, strict=True):
        low, high = bootstrap_interval(d, seed=seed)
        loss = -sum(d) / len(d) if d else math.nan
        bound = upper_bound([-x for x in d], alpha, seed=seed)
        within = bound < margin
        verdict: Literal["lost", "kept", "open"] = "lost" if p <= alpha else "kept" if within else "open"
        found.append(Comparison(loss, (-high, -low), bound, p, within, verdict))
    return found


def largest_safe(comparisons: Iterable[tuple[float, Comparison]], within: bool = False) -> float:
    """The largest compression that, like all smaller ones, is no significant loss; 1 if there is none.

    Args:
        comparisons: ``(compression, comparison)`` of one method at one model and length.
        within: ask instead that a loss above the margin is ruled out.
    """
    safe = 1.0
    for compression, comparison in sorted(comparisons, key=lambda c: c[0]):
        if not (comparison.within if within else comparison.verdict != "lost"):
            break
        safe = compression
    return safe


# --------------------------------------------------------------------- fronts


def front(
    points: Sequence[Item], cost: Callable[[Item], float], score: Callable[[Item], float]
) -> list[Item]:
    """What nothing else beats at its cost, cheapest first."""
    best, kept = -math.inf, []
    for point in sorted(points, key=lambda p: (cost(p), -score(p))):
        if score(point) > best:
            best = score(point)
            kept.append(point)
    return kept


def grouped(rows: Iterable[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by the values of these fields, in order of appearance."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[n] for n in names), []).append(row)
    return found
