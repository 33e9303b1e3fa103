"""Numbers in words, and the verdict for every outcome."""

from __future__ import annotations

import pytest

from sparseland.report.results import Results
from sparseland.report.words import facts, percent, signed, significant, size, verdict


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0042, "+0.42 %"),
        (-0.00001, "0.00 %"),
        (-0.02, "-2.00 %"),
        (0.5, "+50.0 %"),
        (12.3, "+1,230 %"),
        (None, "–"),
    ],
)
def test_changes_are_signed_and_never_minus_zero(value, text):
    assert percent(value) == text


def test_signed_has_no_unit():
    assert signed(0.01) == "+1.00"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (44_236_800, "44.2 MB"), (3e16, "30,000 TB")],
)  # fmt: skip
def test_sizes(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_significant_digits(value, text):
    assert significant(value) == text


def test_the_verdict_names_recipe_speeds_loss_and_needles(sample):
    text = " ".join(verdict(sample))
    row = sample.row(sample.chosen, 4096)
    assert text.startswith(
        "flexprefill + double-sparsity + mustafar:sparsity=0.5 + r-sparse:sparsity=0.4 reads"
    )
    assert f"{row['dense_prefill_s'] / row['prefill_s']:.2f}× as fast as the dense model" in text
    assert f"{row['dense_decode_ms'] / row['decode_ms']:.2f}× as fast (" in text
    assert "0.62× the bytes" in text
    assert "inside the allowed 1 %" in text
    assert "finds 12 of 15 needles, the dense model 14 of 15" in text


def test_the_verdict_says_so_when_the_loss_is_outside(sample):
    worse = dict(sample.row(sample.chosen, 4096), decode_loss=2.8)
    results = Results([sample.run], [worse], choice=sample.choice)
    assert "outside the allowed 1 %" in " ".join(verdict(results))


def test_the_verdict_of_dense_and_of_an_unfinished_run():
    dense = Results(choice={"recipe": [], "length": 128, "reason": "none of 7 is faster"})
    assert verdict(dense) == ["Keep the dense model: none of 7 is faster."]
    assert "not finished" in verdict(Results())[0]


def test_the_verdict_names_some_of_what_a_run_had_no_time_for():
    row = {"kind": "left_out", "what": "; ".join("abcdefgh"), "reason": "its minutes were over", "late": True}
    said = verdict(Results(left_out=[row]))[-1]
    assert said.startswith("Left out because its minutes were over: a; b; c; d; e; f; and 2 more. The same")


def test_needles_that_dense_misses_say_nothing(sample):
    tasks = [
        {"recipe": r, "task": "needle", "length": 4096, "depth": 0.5, "correct": False}
        for r in ([], list(sample.chosen))
    ]
    results = Results([sample.run], sample.measurements, tasks=tasks, choice=sample.choice)
    assert "needles say nothing" in " ".join(verdict(results))


def test_facts_name_what_is_missing_by_a_dash():
    lines = facts({"recipe": ["a"], "length": 128, "loss": 2.0, "dense_loss": 2.0})
    assert lines[0] == "a"
    assert "loss 2.000 (0.00 %)" in lines
    assert "prompt – (– dense)" in lines
