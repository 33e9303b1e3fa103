"""The terminal's table: same numbers, fits, marks the front, prints users' strings as they are."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparseland.report.tables import results_table


def text(sample, width, **changes):
    out = io.StringIO()
    options = {"tasks": sample.tasks, "chosen": sample.chosen, "width": width} | changes
    Console(file=out, width=width).print(results_table(sample.measurements, **options))
    return out.getvalue()


@pytest.mark.parametrize("width", [100, 120])
def test_no_column_is_cut(sample, width):
    lines = text(sample, width).splitlines()
    assert max(map(len, lines)) <= width
    head = lines[0].split()
    assert head[0] == "configuration"
    assert head[-1] == "needle"
    assert ("share" in head) == (width == 120)
    row = next(line for line in lines if "mustafar:sparsity=0.5" in line and "MB" in line)
    assert "58.5 MB" in row
    assert "…" not in text(sample, width)


def test_marks_front_choice_controls_and_failures(sample):
    lines = text(sample, 120).splitlines()
    assert sum(line.startswith(">*") for line in lines) == 2
    assert any(line.startswith("*  flexprefill:gamma=0.8") for line in lines)
    assert not any(line.startswith("*") and "control" in line for line in lines)
    assert any("minference:budget=1/2 (failed)" in line for line in lines)
    assert any(
        line.startswith("failed at 2,048 tokens: minference:budget=1/2: out of memory") for line in lines
    )


def test_without_tasks_there_is_no_needle_column(sample):
    assert "needle" not in text(sample, 120, tasks=())


def test_rich_markup_in_names_is_text(sample):
    rows = [dict(sample.measurements[0], recipe=["[red]x[/]"], role="method")]
    out = io.StringIO()
    Console(file=out, width=120).print(results_table(rows))
    assert "[red]x[/]" in out.getvalue()
