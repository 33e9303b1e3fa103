"""The law finds planted coefficients, also beyond its range, and is told from noise; fronts and costs."""

import math
import random
from itertools import pairwise

import pytest

from sparseland.attention.sparse_frontier import UNITS, SparseFrontier
from sparseland.errors import SparselandError
from sparseland.laws._flops import (
    QWEN,
    ModelShape,
    choosing_flops,
    decode_bytes,
    decode_flops,
    equal_cost_compression,
    prefill_flops,
)
from sparseland.laws.sparse_frontier import Law, Point, front, grouped, hold_out, link
from sparseland.models.tiny import tiny_model

TRUE = {"log params": 0.4, "log length": -0.3, "prefill": -0.5, "decode": -0.2, "easy": -4.0, "hard": -6.0}


def planted(noise=0.0, samples=10**7, sizes=(1e8, 4e8, 2e9), lengths=(1024, 4096, 16384)):
    rng, points = random.Random(0), []
    for params in sizes:
        for length in lengths:
            for phase in ("prefill", "decode"):
                for compression in (1, 1.9, 3.7, 7.2, 14):
                    for task in ("easy", "hard"):
                        z = TRUE[task] + TRUE["log params"] * math.log(params)
                        z += TRUE["log length"] * math.log(length) + TRUE[phase] * math.log(compression)
                        score = 1 / (1 + math.exp(-z - rng.gauss(0, noise)))
                        points.append(Point(score, samples, params, length, compression, task, phase))
    return points


def test_planted_coefficients_are_recovered():
    law = Law.fit(planted())
    for name in ("log params", "log length"):
        assert law.coefficients[name] == pytest.approx(TRUE[name], abs=1e-4)
    for phase in ("prefill", "decode"):
        assert law.coefficients[f"log compression, {phase}"] == pytest.approx(TRUE[phase], abs=1e-4)
    for task in ("easy", "hard"):
        assert law.coefficients[f"task {task}"] == pytest.approx(TRUE[task], abs=1e-3)
    assert law.r_squared(planted()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("axis", ["params", "length", "compression"])
def test_it_holds_on_what_was_held_out(axis):
    held = hold_out(planted(noise=0.1), axis)
    assert held.r_squared > 0.9
    assert held.error < 0.05
    assert held.value == {"params": 2e9, "length": 16384, "compression": 14}[axis]
    other = [p for p in planted() if getattr(p, axis) >= held.value]
    assert len(other) == held.points


def test_a_law_of_something_else_does_not_hold():
    rng = random.Random(1)
    noise = [Point(rng.random(), 50, p.params, p.length, p.compression, p.task, p.phase) for p in planted()]
    assert hold_out(noise, "compression").r_squared < 0.3


def test_one_size_has_no_slope_and_can_not_be_held_out():
    points = planted(sizes=(1e8,))
    law = Law.fit(points)
    assert law.constant == ("params",)
    assert "log params" not in law.coefficients
    assert hold_out(points, "params") is None
    assert hold_out(planted(sizes=(1e8, 4e8)), "params") is None  # one size left to fit on: no slope
    assert hold_out(points, "length").r_squared > 0.99


def test_too_few_points_and_strange_tasks_are_refused():
    with pytest.raises(SparselandError, match="coefficients needs as many points"):
        Law.fit(planted()[2:3])
    point = Point(0.5, 1, 1e8, 1024, 2, "odd", "prefill")
    with pytest.raises(SparselandError, match="knows nothing of task odd"):
        Law.fit(planted()).predict(point)


def test_the_link_is_finite_at_the_ends():
    assert link(0, 10) == pytest.approx(-link(1, 10))
    assert link(1, 10) == pytest.approx(math.log(10.5 / 0.5))


def test_a_front_is_what_nothing_beats():
    points = [(3, 0.5), (1, 0.2), (2, 0.6), (2, 0.4), (5, 0.6), (6, 0.9)]
    assert front(points, lambda p: p[0], lambda p: p[1]) == [(1, 0.2), (2, 0.6), (6, 0.9)]
    assert front([], lambda p: p, lambda p: p) == []


def test_rows_by_fields():
    rows = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 2, "b": 2}]
    assert list(grouped(rows, "a")) == [(1,), (2,)]
    assert grouped(rows, "a", "b")[(1, 3)] == [{"a": 1, "b": 3}]


# ------------------------------------------------------------------- costs

SHAPE = ModelShape(1e8, 1e7, 10, 8, 2, 64)


def test_a_prompt_by_hand():
    n = 1000
    pairs = sum(range(1, n + 1))
    assert prefill_flops(SHAPE, n) == 2 * 1e8 * n + 2e7 + 10 * 8 * pairs * 2 * 2 * 64
    assert prefill_flops(SHAPE, n, 0.25) - prefill_flops(SHAPE, n, 0) == pytest.approx(
        (prefill_flops(SHAPE, n) - prefill_flops(SHAPE, n, 0)) / 4
    )


def test_choosing_is_not_free():
    n = 16384
    attention = prefill_flops(SHAPE, n) - prefill_flops(SHAPE, n, 0)
    for unit in UNITS:
        method = SparseFrontier(unit=unit)
        assert prefill_flops(SHAPE, n, 0.1, method) > prefill_flops(SHAPE, n, 0.1)
        assert choosing_flops(SHAPE, n, method) < 0.2 * attention
    # Blocks of 16 halve what the products of means cost by a square law; 64 are sixteen times cheaper.
    small, large = (choosing_flops(SHAPE, n, SparseFrontier(unit="block", block_size=b)) for b in (16, 64))
    assert 10 < small / large < 16


def test_quest_reads_its_pages_too():
    n = 16384
    quest = SparseFrontier(unit="quest")
    snap = SparseFrontier(unit="snapkv")
    assert decode_flops(SHAPE, n, 1 / 16, quest) > decode_flops(SHAPE, n, 1 / 16, snap)
    row = 2 * 10 * 2 * 64 * 2
    assert decode_bytes(SHAPE, n, 1 / 16, quest) == 2.2e8 + row * 2 * (n / 16)
    assert decode_bytes(SHAPE, n, 1 / 16, snap) == 2.2e8 + row * (n / 16)


def test_a_sparse_large_model_meets_a_dense_small_one_only_on_long_prompts():
    """The paper's first finding, by arithmetic on its models."""
    large, small = QWEN["14B"], QWEN["7B"]
    assert equal_cost_compression(large, small, 4096) is None
    met = [equal_cost_compression(large, small, n) for n in (65536, 131072, 262144)]
    assert met[-1] is not None
    assert all(a is None or a > b for a, b in pairwise(met) if b is not None)
    n = 262144
    assert prefill_flops(large, n, 1 / met[-1]) == pytest.approx(prefill_flops(small, n))


def test_a_model_s_own_shape():
    model = tiny_model("llama")
    shape = ModelShape.of(model)
    total = sum(p.numel() for p in model.parameters())
    assert shape.params == total - 2 * 128 * 64
    assert (shape.head, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (128 * 64, 3, 4, 2, 16)
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert ModelShape.of(tied) == shape
