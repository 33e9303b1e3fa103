"""Measurements as lines of a table, ordered and numbered: shared by the page and its plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparseland.report.figures import family
from sparseland.report.pareto import (
    decode_loss_change,
    decoding_front,
    loss_change,
    number,
    prompt_front,
    ratio,
)
from sparseland.report.results import Results, key, score
from sparseland.report.words import NONE, fixed, found, recipe_name, signed, significant, size, speedup, times

_ORDER = {"dense": 0, "composition": 1, "method": 2, "control": 3}


@dataclass(frozen=True)
class Line:
    """One line of the table of a length.

    Args:
        row: the measurement.
        number: its place in the table, from 1; plots refer to it.
        prompt_front, decoding_front: whether it is on the front of loss against that time.
        chosen: whether it is the chosen recipe.
        cells: (text, css class) after the name; empty for a failed row.
    """

    row: dict[str, Any]
    number: int
    prompt_front: bool
    decoding_front: bool
    chosen: bool
    cells: list[tuple[str, str]]

    @property
    def name(self) -> str:
        """The label, or the recipe."""
        return str(self.row.get("label") or self.recipe)

    @property
    def recipe(self) -> str:
        """The specs."""
        return recipe_name(key(self.row))

    @property
    def failed(self) -> str | None:
        """Why there are no numbers, or None."""
        if self.row.get("status", "ok") == "ok":
            return None
        return str(self.row.get("reason") or "no reason was recorded")

    @staticmethod
    def densities(results: Results) -> dict[str, str]:
        """Key -> heading of the densities worth a column."""
        columns = {"density": "prompt", "decode_density": "dec."}
        if any((number(row, "neuron_density") or 1) < 1 for row in results.measurements):
            columns["neuron_density"] = "linear"
        return columns

    @staticmethod
    def tasks(results: Results, length: int) -> list[str]:
        """The tasks that were asked at a length, needles first."""
        names = dict.fromkeys(str(t.get("task")) for t in results.tasks if t.get("length") == length)
        return sorted(names, key=lambda n: n != "needle")


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense, compositions, methods by family, controls; failed ones at the end of their family."""
    families: dict[str, int] = {}
    for row in rows:
        families.setdefault(family(row), len(families))
    return sorted(
        rows,
        key=lambda r: (
            _ORDER.get(str(r.get("role")), 2),
            families[family(r)],
            r.get("status", "ok") != "ok",
            -(number(r, "density") or 0) - (number(r, "decode_density") or 0),
        ),
    )


def lines(results: Results, length: int) -> list[Line]:
    """The table of one length."""
    rows = ordered([r for r in results.measurements if r["length"] == length])
    prompt, decoding = prompt_front(rows), decoding_front(rows)
    tasks = Line.tasks(results, length)
    out = []
    for i, row in enumerate(rows):
        ok = row.get("status", "ok") == "ok"
        cells = [(fixed(number(row, name), 3), "") for name in Line.densities(results)]
        cells += _cells(row, i in prompt, i in decoding) + _scores(results, row, tasks)
        chosen = bool(results.chosen) and key(row) == results.chosen
        out.append(Line(row, i + 1, i in prompt, i in decoding, chosen, cells if ok else []))
    return out


def _cells(row: dict[str, Any], prompt: bool, decoding: bool) -> list[tuple[str, str]]:
    top1 = number(row, "top1")
    return [
        (fixed(number(row, "loss"), 3), "first"),
        (signed(loss_change(row)), "front" if prompt else ""),
        (signed(decode_loss_change(row)), "front" if decoding else ""),
        (fixed(number(row, "kl"), 4), ""),
        (NONE if top1 is None else f"{100 * top1:.1f}", ""),
        (significant(number(row, "prefill_s")), "first"),
        (times(speedup(row, "prefill_s")), "front" if prompt else ""),
        (significant(number(row, "decode_ms")), "first"),
        (times(speedup(row, "decode_ms")), "front" if decoding else ""),
        (size(number(row, "cache_bytes")), "first"),
        (times(ratio(row, "cache_bytes", "dense_cache_bytes")), ""),
    ]


def _scores(results: Results, row: dict[str, Any], tasks: list[str]) -> list[tuple[str, str]]:
    """Found / asked beside dense's; a task that dense can't do counts for nobody."""
    cells = []
    for task in tasks:
        ours, dense = (score(results.tasks, r, row["length"], task) for r in (key(row), ()))
        if ours is None:
            cells.append((NONE, ""))
        elif not key(row) or dense is None:
            cells.append((found(ours), ""))
        elif dense[0] == 0:
            cells.append(("dense can't", "quiet"))
        else:
            cells.append((f"{found(ours)} ({found(dense)})", ""))
    return cells
