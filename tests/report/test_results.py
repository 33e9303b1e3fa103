"""Reading results files: whole, unfinished, and broken ones."""

from __future__ import annotations

import json

import pytest
from sample import write_sample

from sparseland.errors import SparselandError
from sparseland.report.results import read_results, score, with_fastest_dense


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(stage="full", loss=2.0, **changes):
    return {"kind": "measurement", "recipe": ["a"], "length": 128, "stage": stage, "loss": loss, **changes}


def test_every_kind_is_read_and_unknown_ones_are_left_out(sample):
    assert sample.lengths == [2048, 4096]
    assert len(sample.measurements) == 2 * 21
    assert len(sample.drifts) == 2
    assert len(sample.maps) == 4
    assert sample.chosen[0] == "flexprefill"
    assert sample.run["threads"] == 2


def test_a_last_line_that_was_cut_is_left_out(tmp_path):
    results = read_results(write_sample(tmp_path / "r.jsonl", finished=False))
    assert len(results.maps) == 3
    assert results.choice is None


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"kind": "drift"}\n{"kind": \n{"kind": "drift"}\n')
    with pytest.raises(SparselandError, match="line 2: not JSON"):
        read_results(path)


@pytest.mark.parametrize("order", [["screen", "full"], ["full", "screen"]])
def test_a_full_measurement_stands_whatever_the_order(tmp_path, order):
    rows = [measured(stage, loss=3.0 if stage == "full" else 2.0) for stage in order]
    (row,) = read_results(write(tmp_path / "r", *rows)).measurements
    assert row["loss"] == 3.0


def test_the_newest_of_equals_stands(tmp_path):
    failed = measured(status="failed", reason="out of memory", loss=None)
    (row,) = read_results(write(tmp_path / "r", failed, measured(loss=2.5))).measurements
    assert row["loss"] == 2.5


def test_a_newer_schema_is_refused(tmp_path):
    with pytest.raises(SparselandError, match="schema 2; this version reads 1"):
        read_results(write(tmp_path / "r", {"kind": "run", "schema": 2}))


@pytest.mark.parametrize(
    ("text", "message"),
    [('[1]\n{"kind":"x"}\n', "a JSON object"), ('{"kind":"measurement"}\n', "length")],
)
def test_malformed_rows_are_errors(tmp_path, text, message):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(SparselandError, match=message):
        read_results(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(SparselandError, match="can't read"):
        read_results(tmp_path / "nothing.jsonl")


def test_scores_count_right_answers():
    tasks = [
        {"recipe": ["a"], "task": "needle", "length": 128, "depth": 0.0, "correct": True},
        {"recipe": ["a"], "task": "needle", "length": 256, "depth": 0.0, "correct": False},
        {"recipe": [], "task": "needle", "length": 128, "depth": 0.0, "correct": True},
        {"recipe": ["a"], "task": "other", "length": 128, "depth": 0.0, "correct": True},
    ]
    assert score(tasks, ("a",)) == (1, 2)
    assert score(tasks, ("a",), 128) == (1, 1)
    assert score(tasks, ("b",)) is None


def test_speedups_are_against_the_faster_of_denses_timings() -> None:
    dense = {"label": "dense", "recipe": [], "length": 64, "prefill_s": 9.0, "dense_prefill_s": 9.0}
    sparse = {"label": "x", "recipe": ["x"], "length": 64, "prefill_s": 6.0, "dense_prefill_s": 9.0}
    other = {**sparse, "dense_prefill_s": 5.0}  # of another run
    rows = [{**r, "decode_ms": None, "dense_decode_ms": 3.0} for r in (dense, sparse, other)]
    drift = {"kind": "drift", "length": 64, "before_s": 9.0, "after_s": 7.5}
    found = with_fastest_dense(rows, [drift, {**drift, "length": 128, "after_s": 1.0}])
    assert [r["dense_prefill_s"] for r in found] == [7.5, 7.5, 5.0]
    assert [r["prefill_s"] for r in found] == [7.5, 6.0, 6.0]
    assert with_fastest_dense(rows, [{**drift, "after_s": 10.0}]) == rows
