"""The table of a run in the terminal: the page's columns in 100 to 120 characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sparseland.report.pareto import (
    decode_loss_change,
    decoding_front,
    loss_change,
    number,
    prompt_front,
    ratio,
)
from sparseland.report.results import Recipe, key, score
from sparseland.report.rows import ordered
from sparseland.report.words import (
    NONE,
    fixed,
    found,
    recipe_name,
    signed,
    significant,
    size,
    spec_name,
    speedup,
    times,
)

# Below this width the columns that follow from others are left out.
FULL_WIDTH = 112
_DERIVED = ("loss", "share")
_LONGEST_SPEC = 27

_LEGEND = (
    "* Pareto front of loss change against prompt or decoding time; > chosen; Δ, ×, share: against dense"
)


def results_table(
    rows: Sequence[dict[str, Any]],
    *,
    tasks: Sequence[dict[str, Any]] = (),
    chosen: Recipe | None = None,
    width: int = FULL_WIDTH,
) -> Table:
    """Measurements as a table, one part a length; ``*`` marks the Pareto front, ``>`` the chosen recipe.

    Args:
        rows: measurement rows of any lengths.
        tasks: single task items; their needles fill the last column, dense's in its own row.
        chosen: the chosen recipe; () or None marks nothing.
        width: characters to fit in; under 112 the loss itself and the cache share are left out.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, caption_justify="left")
    columns = _columns([t for t in tasks if t.get("task") == "needle"])
    names = [name for name in columns if width >= FULL_WIDTH or name not in _DERIVED]
    table.add_column("")
    table.add_column("configuration", overflow="fold", min_width=16)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    failures = []
    for length in sorted({row["length"] for row in rows}):
        part = ordered([row for row in rows if row["length"] == length])
        front = prompt_front(part) | decoding_front(part)
        table.add_section()
        table.add_row("", Text(f"{length:,} tokens", "bold"))
        for i, row in enumerate(part):
            label = Text(_folded(key(row)) + _note(row))
            if row.get("status", "ok") != "ok":
                table.add_row("", label, style="red")
                reason = row.get("reason") or "no reason was recorded"
                failures.append(f"failed at {length:,} tokens: {recipe_name(key(row))}: {reason}")
                continue
            is_chosen = bool(chosen) and key(row) == chosen
            mark = Text((">" if is_chosen else "") + ("*" if i in front else ""))
            style = "bold green" if is_chosen else "dim" if row.get("role") == "control" else ""
            table.add_row(mark, label, *(Text(columns[n](row)) for n in names), style=style)
    table.caption = Text("\n".join([_LEGEND, *failures]))
    return table


def _folded(recipe: Recipe) -> str:
    """A recipe's specs below each other; a long one also breaks between its parameters."""
    specs = [
        s if len(s) <= _LONGEST_SPEC else re.sub(r"(?<=[:,])", "\n  ", s) for s in map(spec_name, recipe)
    ]
    return "\n+ ".join(specs) or "dense"


def _note(row: dict[str, Any]) -> str:
    if row.get("status", "ok") != "ok":
        return " (failed)"
    if row.get("role") == "control":
        return " (control)"
    return " (screened)" if row.get("stage") == "screen" else ""


def _columns(needles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Heading -> text of a row."""
    columns: dict[str, Any] = {
        "dens.": lambda r: fixed(number(r, "density"), 2),
        "dec.": lambda r: fixed(number(r, "decode_density"), 2),
        "loss": lambda r: fixed(number(r, "loss"), 3),
        "Δ%": lambda r: signed(loss_change(r)),
        "Δdec%": lambda r: signed(decode_loss_change(r)),
        "KL": lambda r: fixed(number(r, "kl"), 3),
        "top1": lambda r: NONE if (v := number(r, "top1")) is None else f"{100 * v:.1f}",
        "s": lambda r: significant(number(r, "prefill_s")),
        "×": lambda r: times(speedup(r, "prefill_s")),
        "ms/tok": lambda r: significant(number(r, "decode_ms")),
        "× ": lambda r: times(speedup(r, "decode_ms")),
        "cache": lambda r: size(number(r, "cache_bytes")),
        "share": lambda r: fixed(ratio(r, "cache_bytes", "dense_cache_bytes"), 2),
    }
    if needles:
        columns["needle"] = lambda r: found(score(needles, key(r), r["length"]))
    return columns
