"""Plots of the selections: the attention mass they keep for the pairs they compute, and their own cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from sparseland.report import svg
from sparseland.report.figures import Mark, family
from sparseland.report.pareto import number
from sparseland.report.results import key
from sparseland.report.words import fixed, recipe_name, significant


def recall_curves(rows: Sequence[dict[str, Any]], marks: dict[str, Mark]) -> Markup | None:
    """Recall against density, a curve through the settings of each method; None below two points.

    Args:
        rows: inspections of one length.
        marks: how each family is drawn, from :func:`sparseland.report.figures.families`.
    """
    drawn = [
        (i, row, x, y)
        for i, row in enumerate(rows)
        if family(row) in marks
        and (x := number(row, "density")) is not None
        and (y := number(row, "recall")) is not None
    ]
    if len(drawn) < 2:
        return None
    figure = svg.new_figure(3.7)
    axes = figure.subplots()
    svg.style(axes)
    axes.set_xlabel("density (computed pairs / causal pairs)")
    axes.set_ylabel("recall (attention mass kept)")
    axes.grid(True, color=svg.GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for name in dict.fromkeys(family(row) for _, row, _, _ in drawn):
        path = sorted((x, y) for _, row, x, y in drawn if family(row) == name)
        axes.plot(*zip(*path, strict=True), color=marks[name].colour, linewidth=0.8, alpha=0.55)
    for i, row, x, y in drawn:
        mark = marks[family(row)]
        axes.plot(
            [x], [y], mark.marker, gid=f"recall-{i}", ms=6.5, mfc=mark.colour, mec=mark.colour, clip_on=False
        )
    tips = {f"recall-{i}": "\n".join(_facts(row)) for i, row, _, _ in drawn}
    length = rows[0]["length"]
    description = f"Recall against density at {length:,} tokens, {len(drawn)} configurations"
    return svg.to_svg(figure, f"recall-{length}", description, tips)


def time_split(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of choosing and of computing the pairs of a prompt, the slowest together as 100 %."""
    timed = [r for r in rows if number(r, "attend_s") is not None and number(r, "select_s") is not None]
    longest = max((r["select_s"] + r["attend_s"] for r in timed), default=0.0)
    return [
        {
            "recipe": key(r),
            "select": f"{100 * r['select_s'] / longest:.1f}",
            "attend": f"{100 * r['attend_s'] / longest:.1f}",
            "words": f"{significant(r['select_s'], ' s')} choosing, "
            f"{significant(r['attend_s'], ' s')} computing",
        }
        for r in sorted(timed, key=lambda r: r["select_s"] + r["attend_s"])
        if longest > 0
    ]


def _facts(row: dict[str, Any]) -> list[str]:
    return [
        recipe_name(key(row)),
        f"density {fixed(number(row, 'density'), 3)}, recall {fixed(number(row, 'recall'), 3)}",
        f"selection {significant(number(row, 'select_s'), ' s')}, "
        f"computation {significant(number(row, 'attend_s'), ' s')}",
    ]
