"""Learning curves: which rows are points, how stages and seeds are put together, files that stand alone."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from sparseland.report.curves import DASHES, MARKERS, _columns, curves_of, describe, draw_curves


def row(setting, tokens, loss, **more):
    return {"setting": setting, "tokens": tokens, "loss": loss, **more}


TWO = [row(f"text, {s}", t, 4 - t / 1e6, accuracy=t / 4e6) for s in ("dense", "a_b") for t in (0, 1e6, 2e6)]


def test_rows_without_tokens_are_no_points():
    other = [{"setting": "dense", "loss": 2.5}, {"setting": "union: 8", "covers": True}]
    assert curves_of(other) == []
    (task,) = curves_of([*other, *TWO])
    assert (task.name, task.settings, list(task.curves)) == ("text", ["dense", "a b"], ["loss", "accuracy"])
    assert task.curves["loss"]["a b"] == [(0, 4, 4, 4), (1e6, 3, 3, 3), (2e6, 2, 2, 2)]


def test_the_field_of_the_task_comes_before_the_setting():
    tasks = curves_of([row("recall, dense", 0, 1, task="two-hop recall"), row("recall, dense", 0, 1)])
    assert [task.name for task in tasks] == ["two-hop recall", "recall"]


def test_seeds_become_a_median_with_a_range():
    (task,) = curves_of([row("text, dense", 5, loss) for loss in (3.0, 1.0, 1.5)])
    assert task.curves["loss"]["dense"] == [(5, 1.0, 1.5, 3.0)]
    assert task.seeds == 3


@pytest.mark.parametrize(("first", "later"), [("before", "dense"), ("dense at 8", "then sparse at 16")])
def test_a_second_stage_goes_on_where_the_first_ends(first, later):
    (task,) = curves_of([row(f"t, {s}", t, 1) for s in (first, later) for t in (0, 10)])
    assert [p[0] for p in task.curves["loss"][later]] == [10, 20]
    assert task.joint == 10


def test_divergences_are_a_line_each():
    (task,) = curves_of(
        [{"setting": "training, to step 1", "tokens": 8, "kl_prefill": 1.0, "kl_decode": 2.0}]
    )
    assert (list(task.curves), task.settings) == (["kl"], ["prefill", "decode"])
    assert "KL divergence, nats" in draw_curves("m", task)


def test_a_picture_is_a_file_of_its_own_and_always_the_same():
    (task,) = curves_of(TWO)
    text = draw_curves("m", task)
    assert text == draw_curves("m", task)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == "700"
    assert root.get("aria-label") == describe("m", task)
    assert "var(--" not in text
    assert "<dc:date>" not in text
    for words in ("loss, nats per scored token", "accuracy, % of scored tokens", "trained tokens, millions"):
        assert words in text
    assert "dense: 2.000, 50.0 %" in text


def test_a_setting_looks_the_same_in_all_pictures_of_a_method():
    (task,) = curves_of([r for r in TWO if "a_b" in r["setting"]])
    assert "#0072b2" in draw_curves("m", task)
    assert "#0072b2" not in draw_curves("m", task, ["dense", "a b"])
    assert len(set(MARKERS)) == len(set(map(str, DASHES))) == 8


def test_the_legend_is_not_wider_than_the_picture():
    assert _columns(["x" * 20] * 6) == 3
    assert _columns(["x" * 30] * 6) == 2
    assert _columns(["x" * 60] * 6) == 1
