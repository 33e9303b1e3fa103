"""Tests of tests: exact values, error rates on simulated data, intervals that cover."""

import itertools
import random

import numpy as np
import pytest

from sparseland.laws._statistics import bootstrap_interval, holm, sign_flip_test
from sparseland.laws.sparse_frontier import compare, largest_safe


def test_all_signs_are_tried_for_few_samples():
    d = [-0.5, 0.2, -0.1, -0.7, 0.0, 0.3]
    below = [sum(s * abs(x) for s, x in zip(signs, d, strict=True)) <= sum(d) + 1e-12
             for signs in itertools.product((1, -1), repeat=6)]  # fmt: skip
    assert sign_flip_test(d) == pytest.approx(sum(below) / 64)


def test_equal_scores_and_gains_are_no_loss():
    assert sign_flip_test([]) == sign_flip_test([0.0] * 20) == 1
    assert sign_flip_test([0.1] * 20) == 1
    assert sign_flip_test([-0.1] * 20) == pytest.approx(1e-4)
    assert sign_flip_test([-1.0] * 5) == 1 / 32


@pytest.mark.parametrize("samples", [10, 40])
def test_false_alarms_come_as_often_as_allowed(samples):
    """Two systems that differ by chance only: graded scores, skewed, some of them equal."""
    rng = np.random.default_rng(0)
    trials, alarms = 300, 0
    for trial in range(trials):
        noise = rng.exponential(1, (2, samples))
        d = (noise[0] - noise[1]) * (rng.random(samples) < 0.8)
        alarms += sign_flip_test(d.tolist(), trial) <= 0.05
    # Five standard errors of the rate.
    assert 0.05 - 0.045 < alarms / trials < 0.05 + 0.045


def test_a_real_loss_is_found():
    rng = np.random.default_rng(1)
    found = sum(sign_flip_test((rng.normal(-0.5, 1, 40)).tolist(), i) <= 0.05 for i in range(100))
    assert found > 85


def test_intervals_cover_the_mean():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval((rng.exponential(1, 50) - 1).tolist(), seed=trial)
        covered += low <= 0 <= high
    assert 0.85 < covered / 200 <= 0.99


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_twelve_comparisons_of_nothing_are_rarely_one_loss():
    rng = random.Random(3)
    trials, families = 80, 0
    for trial in range(trials):
        pairs = [
            ([rng.gauss(0, 1) for _ in range(20)], [rng.gauss(0, 1) for _ in range(20)]) for _ in range(12)
        ]
        families += any(c.verdict == "lost" for c in compare(pairs, seed=trial))
    assert families / trials < 0.14


def test_verdicts():
    dense = [0.5 + 0.01 * i for i in range(30)]
    worse = [s - 0.2 - 0.01 * (i % 3) for i, s in enumerate(dense)]
    rng = random.Random(0)
    noisy = [s + rng.gauss(0, 0.4) for s in dense]
    lost, kept, unsure = compare([(worse, dense), (dense, dense), (noisy, dense)])
    assert lost.verdict == "lost"
    assert lost.loss == pytest.approx(0.21)
    assert lost.interval[0] <= 0.21 <= lost.interval[1]
    assert kept.verdict == "kept"
    assert unsure.verdict == "open"
    assert largest_safe([(2, kept), (8, kept), (4, unsure), (16, lost)]) == 8
    assert largest_safe([(2, kept), (8, kept), (4, unsure)], within=True) == 2
    assert largest_safe([(2, lost), (4, kept)]) == 1
    assert largest_safe([]) == 1
