"""The front against its definition, and who may stand on it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from sparseland.report.pareto import decoding_front, loss_change, pareto, prompt_front

values = st.one_of(st.none(), st.integers(0, 6), st.just(math.nan))


@given(st.lists(st.tuples(values, values), max_size=14))
def test_front_is_what_no_row_dominates(points):
    rows = [{"x": a, "y": b} for a, b in points]
    usable = [i for i, p in enumerate(points) if all(v is not None and not math.isnan(v) for v in p)]

    def dominated(i: int) -> bool:
        (a, b) = points[i]
        return any(points[j] != points[i] and points[j][0] <= a and points[j][1] <= b for j in usable)

    assert pareto(rows, "x", "y") == {i for i in usable if not dominated(i)}


def test_measures_can_be_functions_and_failed_rows_do_not_count():
    rows = [{"t": 3, "q": 1}, {"t": 1, "q": 2}, {"t": 0, "q": 0, "status": "failed"}]
    assert pareto(rows, lambda r: r["t"], "q") == {0, 1}


def row(role="method", length=2048, **changes):
    base = {
        "role": role, "length": length, "density": 1.0, "decode_density": 1.0, "loss": 2.0, "dense_loss": 2.0,
        "decode_loss": 2.0, "dense_decode_loss": 2.0, "prefill_s": 4.0, "decode_ms": 20.0, "cache_bytes": 8,
        "dense_cache_bytes": 8,
    }  # fmt: skip
    return base | changes


def test_a_method_that_leaves_the_prompt_dense_is_not_on_its_front_by_noise():
    rows = [row("dense"), row(decode_density=0.1, prefill_s=3.9, decode_ms=15.0, decode_loss=2.01)]
    assert prompt_front(rows) == {0}
    assert decoding_front(rows) == {0, 1}


def test_a_slower_configuration_is_not_on_the_front_for_a_lucky_loss():
    slower = row(decode_density=0.5, decode_loss=1.98, decode_ms=30.0)
    faster = row(decode_density=0.3, decode_loss=1.99, decode_ms=15.0)
    assert decoding_front([row("dense"), slower]) == {0}
    assert decoding_front([row("dense"), slower, faster]) == {2}


def test_controls_do_not_compete():
    rows = [row("dense"), row("control", density=0.2, loss=1.9, prefill_s=1.0)]
    assert prompt_front(rows) == {0}


def test_sparse_layers_count_for_prompt_and_decoding():
    rows = [row("dense"), row(loss=2.01, decode_loss=2.01, prefill_s=3.0, decode_ms=12.0)]
    assert prompt_front(rows) == decoding_front(rows) == {0, 1}


def test_lengths_have_their_own_fronts():
    slow = row(length=4096, density=0.5, loss=2.1, prefill_s=5.0)
    rows = [row("dense"), row(density=0.5, loss=2.05, prefill_s=3.0), row("dense", 4096, prefill_s=9.0), slow]
    assert prompt_front(rows) == {0, 1, 2, 3}


def test_loss_change_is_relative_and_may_be_missing():
    assert math.isclose(loss_change({"loss": 2.02, "dense_loss": 2.0}), 0.01)
    assert loss_change({"loss": None, "dense_loss": 2.0}) is None
    assert loss_change({"loss": 2.0, "dense_loss": 0.0}) is None


def test_layers_that_are_sparse_only_while_decoding_count_there():
    rows = [row("dense"), row(neuron_density=0.5, decode_loss=2.01, decode_ms=12.0, prefill_s=3.9)]
    assert decoding_front(rows) == {0, 1}
    assert prompt_front(rows) == {0}
