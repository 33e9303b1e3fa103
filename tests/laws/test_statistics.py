"""Tests of tests: exact values, error rates on simulated data, intervals that cover."""

import itertools
import random
import tracemalloc

import numpy as np
import pytest
from scipy.stats import beta

from sparseland.laws._statistics import (
    bootstrap_interval,
    holm,
    sign_flip_tests,
    smallest_bound,
    smallest_p,
    upper_bound,
)
from sparseland.laws.sparse_frontier import MARGIN, compare, largest_safe


def sign_flip_test(differences, seed=0):
    return sign_flip_tests([differences], seed=seed)[0]


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


def test_random_flips_come_to_what_all_signs_say():
    d = np.random.default_rng(5).normal(-0.2, 1, 14).tolist()
    # By itself, 2^14 signs are more than the flips; among fifty, fewer.
    assert sign_flip_test(d) == pytest.approx(sign_flip_tests([d] * 50)[0], rel=0.05)
    assert sign_flip_test(d) != sign_flip_tests([d] * 50)[0]


def test_comparisons_of_different_sizes_do_not_disturb_each_other():
    few, many = [-0.1, -0.3, 0.2], np.random.default_rng(6).normal(-0.1, 1, 40).tolist()
    more = [*many, *[0.0] * 30]  # no sign changes zeros
    p = sign_flip_tests([few, many, [], more])
    assert p[0] == sign_flip_test(few) == 3 / 8
    assert p[1] == p[3] == pytest.approx(sign_flip_test(many), abs=0.02)
    assert p[2] == 1


def test_any_number_of_comparisons_can_all_be_significant():
    """With as many flips for a thousand tests as for one, none of them could reach alpha / 1000."""
    tracemalloc.start()
    found = compare([([0.5] * 30, [0.6] * 30)] * 600)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {c.verdict for c in found} == {"lost"}
    assert peak < 200 * 2**20


@pytest.mark.parametrize("samples", [3, 13, 14, 16, 40])
def test_the_smallest_p_is_that_of_a_loss_in_every_sample(samples):
    for comparisons in (1, 60):
        (p, *others) = sign_flip_tests([[-1.0] * samples] * comparisons)
        assert set(others) <= {p}
        # Random flips may come upon the observed signs a few times.
        assert smallest_p(samples, comparisons) <= p < 0.05 / 5 / comparisons or p == 0.5**samples
    # Times the comparisons, it leaves room below alpha, however many they are.
    assert smallest_p(samples + 30, 10**6) * 10**6 < 0.05 / 19


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


def test_a_bound_of_two_values_is_clopper_and_pearson_s():
    for samples in (1, 2, 12, 60):
        for ones in {0, 1, samples // 3, samples - 1} - {samples}:
            values = [1.0] * ones + [0.0] * (samples - ones)
            exact = beta.ppf(0.95, ones + 1, samples - ones)
            assert upper_bound(values) == pytest.approx(exact, rel=0.05)
        assert smallest_bound(samples) == pytest.approx(beta.ppf(0.95, 1, samples))
    assert upper_bound([1.0] * 5) == pytest.approx(1)
    assert upper_bound([]) == smallest_bound(0) == 1


def rare_and_large(rng, shape):
    """One sample in twelve loses much."""
    return np.where(rng.random(shape) < 0.08, rng.uniform(0.25, 1, shape), rng.normal(0, 0.01, shape))


def lost_or_gained(rng, shape):
    """Right or wrong; more is lost than gained."""
    u = rng.random(shape)
    return np.where(u < 0.2, 1.0, np.where(u < 0.35, -1.0, 0.0))


def only_lost(rng, shape):
    return (rng.random(shape) < 0.05).astype(float)


def skewed(rng, shape):
    return rng.exponential(0.05, shape)


@pytest.mark.parametrize("samples", [1, 12, 64])
@pytest.mark.parametrize("losses", [only_lost, lost_or_gained, rare_and_large, skewed])
def test_a_loss_at_the_margin_is_ruled_out_no_oftener_than_allowed(losses, samples):
    """The percentile bootstrap rules it out in half of the trials where losses are rare, or of one sample."""
    lost = losses(np.random.default_rng(samples), (150, samples))
    assert np.mean(losses(np.random.default_rng(0), 10**6)) == pytest.approx(MARGIN, abs=2e-3)
    found = compare([((1 - d).tolist(), [1.0] * samples) for d in lost])
    # Three standard errors of a rate of 5 %.
    assert np.mean([c.within for c in found]) <= 0.05 + 3 * (0.05 * 0.95 / 150) ** 0.5


def test_no_loss_is_told_from_one_with_enough_samples():
    noise = np.random.default_rng(8).normal(0, 0.05, (50, 96))
    found = compare([((0.8 + d).tolist(), [0.8] * 96) for d in noise])
    assert np.mean([c.within for c in found]) > 0.9


@pytest.mark.parametrize(("samples", "verdict"), [(1, "open"), (12, "open"), (55, "open"), (64, "kept")])
def test_few_samples_that_are_all_right_rule_nothing_out(samples, verdict):
    (found,) = compare([([1.0] * samples, [1.0] * samples)])
    assert found.verdict == verdict
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / samples), rel=0.05)
    assert found.loss == 0


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
    dense = [0.3 + 0.005 * i for i in range(80)]
    worse = [s - 0.2 - 0.01 * (i % 3) for i, s in enumerate(dense)]
    rng = random.Random(0)
    noisy = [s + rng.gauss(0, 0.6) for s in dense]
    lost, kept, unsure = compare([(worse, dense), (dense, dense), (noisy, dense)])
    assert lost.verdict == "lost"
    assert lost.loss == pytest.approx(0.21, abs=1e-3)
    assert lost.interval[0] <= lost.loss <= lost.interval[1] < lost.bound
    assert kept.verdict == "kept"
    assert unsure.verdict == "open"
    assert largest_safe([(2, kept), (8, kept), (4, unsure), (16, lost)]) == 8
    assert largest_safe([(2, kept), (8, kept), (4, unsure)], within=True) == 2
    assert largest_safe([(2, lost), (4, kept)]) == 1
    assert largest_safe([]) == 1
