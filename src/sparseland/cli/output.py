"""What all commands share: consoles, JSON, tables of free-form rows."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

# Where there is no terminal to measure: wide enough for the widest table.
PLAIN_WIDTH = 120


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints user strings as they are (no markup, no guesses at numbers).

    ``width`` holds where the output is not a terminal; a terminal's own width is kept.
    """
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=False,
        width=None if stream.isatty() else width or PLAIN_WIDTH,
    )


def finite(value: Any) -> Any:
    """``value`` with numbers that JSON can't write (NaN, infinities) as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False, default=str))


def emit(renderable: RenderableType, *, width: int | None = None) -> None:
    """Print to stdout; without a terminal lines end at their last letter, fit for files and diffs."""
    out = console(width=width)
    if out.is_terminal:
        out.print(renderable)
        return
    with out.capture() as capture:
        out.print(renderable)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_claim(result: dict[str, Any], *, details: bool = True) -> None:
    """A claim's result: what the paper says, what we measured, and what differs."""
    holds = {True: "holds", False: "does not hold", None: "not judged"}[result.get("holds")]
    emit(Text.assemble((f"{holds}: ", "bold"), str(result.get("claim", ""))), width=100)
    paper, ours = (result.get(name) or {} for name in ("paper", "ours"))
    rows = [
        {"": name, "paper": _said(paper, name), "ours": _said(ours, name)}
        for name in dict.fromkeys([*paper, *ours])
    ]
    table = rows_table(rows)
    if table.columns:
        table.columns[0].no_wrap = True  # names stay in one piece
    emit(Padding(table, (1, 0, 0, 2)), width=100)
    if result.get("differs"):
        emit(Padding(Text(f"What differs: {result['differs']}"), (1, 0, 0, 0)), width=100)
    if details and result.get("rows"):
        emit(Padding(rows_table(result["rows"]), (1, 0, 0, 2)), width=160)


def _said(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return ", ".join(f"{k} {cell(v)}" for k, v in value.items()) if isinstance(value, dict) else cell(value)


def rows_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of numbers and words as a table; columns in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_plain(value)))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(name))) for name in names))
    return table


def cell(value: Any) -> str:
    """A value as a cell: about three significant digits, words as they are."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"
    return str(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
