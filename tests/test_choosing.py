"""Choosing among measurements: tolerance, costs, what is combined, what wins."""

from types import SimpleNamespace

import pytest

from sparseland.frontier.choosing import NEW_TOKENS, Judge, relative_time, seconds
from sparseland.measure import DECODE_TOKENS
from sparseland.method import parse_spec

LENGTHS = [1024, 2048]


def row(recipe, length, loss=1.0, decode_loss=1.0, prefill=1.0, decode=10.0, stage="full", **more):
    return {
        "kind": "measurement", "recipe": recipe, "length": length, "stage": stage, "status": "ok",
        "loss": loss, "dense_loss": 1.0, "decode_loss": decode_loss, "dense_decode_loss": 1.0,
        "decode_tokens": DECODE_TOKENS, "prefill_s": prefill, "dense_prefill_s": 1.0,
        "decode_ms": decode, "dense_decode_ms": 10.0, "density": 0.5 if recipe else 1.0,
        "decode_density": 1.0, "neuron_density": None, "cache_bytes": 100, "dense_cache_bytes": 100, **more,
    }  # fmt: skip


def judge(*rows):
    def of(kind, **values):
        return [r for r in rows if r["kind"] == kind and all(r.get(k) == v for k, v in values.items())]

    return Judge(SimpleNamespace(of=of), LENGTHS, 0.01)


def at_all(recipe, **values):
    return [row(recipe, n, **values) for n in LENGTHS]


def test_a_request_is_a_prompt_and_new_tokens():
    assert seconds(2.0, 10.0) == pytest.approx(2 + NEW_TOKENS / 100)
    assert relative_time(row([], 1024, prefill=0.5, decode=5.0)) == pytest.approx(0.5)


def test_a_row_that_did_not_decode_is_charged_with_denses_decoding():
    assert relative_time(row([], 1024, prefill=1.0, decode=None)) == pytest.approx(1.0)


def test_every_length_has_to_stay_within_the_tolerance():
    good = at_all(["flexprefill"], loss=1.009)
    assert judge(*good).within(["flexprefill"])
    assert not judge(*good[:1]).within(["flexprefill"])
    assert not judge(*good[:1], row(["flexprefill"], 2048, loss=1.02)).within(["flexprefill"])
    assert not judge(*at_all(["flexprefill"], decode_loss=1.02)).within(["flexprefill"])


def test_a_screening_neither_wins_nor_judges_by_its_few_decoded_tokens():
    short = row(["flexprefill"], 2048, decode_loss=2.0, stage="screen", decode_tokens=24)
    assert judge(short).excess(short) == 0
    fast = at_all(["flexprefill"], prefill=0.1, stage="screen")
    assert judge(*at_all([]), *fast).choose()["recipe"] == []


def test_what_failed_at_every_length_is_not_called_slow():
    slow = at_all(["flexprefill"], prefill=2.0)
    failed = [{**r, "status": "failed"} for r in at_all(["mustafar"])]
    assert judge(*at_all([]), *slow).choose()["reason"].startswith("none of 1 configurations is faster")
    reason = judge(*at_all([]), *slow, *failed).choose()["reason"]
    assert reason.startswith("none of 1 configurations (1 more failed) is faster")


def test_the_fastest_within_the_tolerance_is_chosen_with_the_numbers_in_words():
    rows = [
        *at_all([]),
        *at_all(["flexprefill"], prefill=0.5, loss=1.005),
        *at_all(["minference"], prefill=0.2, loss=1.05),
        *at_all(["streaming"], prefill=0.1),  # a control is never chosen
    ]
    choice = judge(*rows).choose()
    assert choice["recipe"] == ["flexprefill"]
    assert "1.78 s, dense 2.28 s" in choice["reason"]


def test_our_own_dense_path_is_a_rival():
    rows = [*at_all([]), *at_all(["dense"], decode=1.0), *at_all(["flexprefill"], prefill=0.9, decode=9.0)]
    choice = judge(*rows).choose()
    assert choice["recipe"] == []
    assert "faster than dense" in choice["reason"]


def test_the_best_of_each_role_are_combined_where_they_can_be():
    methods = [parse_spec(s) for s in ("flexprefill", "minference", "double-sparsity", "mustafar")]
    rows = [
        *at_all(["flexprefill"], prefill=0.5),
        *at_all(["minference"], prefill=0.6),
        *at_all(["double-sparsity"], decode=5.0),
        *at_all(["mustafar"], decode_loss=2.0),
    ]
    found = [[m.card.slug for m in c] for c in judge(*rows).compositions(methods)]
    assert found == [["flexprefill", "double-sparsity"]]


def test_methods_that_decide_the_same_are_not_combined():
    both, other = parse_spec("streaming:phase=both"), parse_spec("double-sparsity")
    rows = [*at_all([both.spec], prefill=0.5), *at_all([other.spec], decode=5.0)]
    assert judge(*rows).compositions([both, other]) == []


def test_what_acts_on_prompts_only_shares_the_fastest_decoding_time():
    """They all decode densely on the same kernels: a difference is noise, and must not choose."""
    rows = [
        *at_all([]),
        *at_all(["dense"], decode=9.0, dense_decoding=True, density=1.0),
        *at_all(["flexprefill"], prefill=0.9, decode=5.0, dense_decoding=True),
        *at_all(["minference"], prefill=0.8, decode=9.5, dense_decoding=True),
    ]
    judging = judge(*rows)
    assert judging.cost(["dense"]) == pytest.approx(relative_time(row([], 2048, decode=5.0)))
    choice = judging.choose()
    assert choice["recipe"] == ["minference"]
    assert "1.44 s, dense (own kernels) 1.64 s" in choice["reason"]


def test_a_selector_keeps_its_own_decoding_time():
    rows = [
        *at_all([]),
        *at_all(["dense"], decode=9.0, dense_decoding=True),
        *at_all(["double-sparsity"], decode=8.0, decode_density=0.2, density=1.0),
    ]
    assert judge(*rows).choose()["recipe"] == ["double-sparsity"]
    faster = [*rows, *at_all(["flexprefill"], prefill=1.2, decode=7.0, dense_decoding=True)]
    assert judge(*faster).choose()["recipe"] == []


def test_a_configuration_that_leaves_nothing_out_is_not_chosen():
    nothing = at_all(["flexprefill"], prefill=0.5, density=1.0)
    assert judge(*at_all([]), *nothing).choose()["recipe"] == []
    smaller = at_all(["mustafar"], prefill=0.9, density=1.0, cache_bytes=50)
    assert judge(*at_all([]), *smaller).choose()["recipe"] == ["mustafar"]


def test_denses_faster_time_counts():
    drift = {
        "kind": "drift", "length": 2048, "before_s": 1.0, "after_s": 0.5,
        "before_decode_ms": 10.0, "after_decode_ms": 5.0,
    }  # fmt: skip
    rows = [*at_all([]), *at_all(["flexprefill"], prefill=0.6)]
    assert judge(*rows).choose()["recipe"] == ["flexprefill"]
    assert judge(*rows, drift).choose()["recipe"] == []
