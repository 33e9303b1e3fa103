"""``sparseland list`` and ``sparseland show``: the registry and its cards."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import sparseland
from sparseland.cli.output import cell, emit, print_claim, print_json, rows_table
from sparseland.errors import SparselandError
from sparseland.method import Site, describe_params, method_class, method_slugs

# One line a method, whatever its summary: nothing is folded where nobody looks at a screen.
LIST_WIDTH = 240
WIDTH = 100
# Measurements beside each other: their names below each other take less room than as headings.
BESIDE = 3
_LONGEST_SPEC = 24


def show_list(site: str | None, as_json: bool) -> None:
    """Print every method, or those of a site.

    Raises:
        SparselandError: there is no such site.
    """
    sites = typing.get_args(Site)
    if site is not None and site not in sites:
        raise SparselandError(f"unknown site {site!r}; it must be one of {', '.join(sites)}")
    cards = [method_class(slug).card for slug in method_slugs()]
    cards = [card for card in cards if site is None or card.site == site]
    if as_json:
        names = ("slug", "site", "training", "paper", "title", "summary", "control")
        print_json([{name: getattr(card, name) for name in names} for card in cards])
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("slug", "site", "training"):
        table.add_column(name, no_wrap=True)
    table.add_column("summary", overflow="fold")
    for card in cards:
        table.add_row(*map(Text, (card.slug, card.site, card.training, card.summary)))
    emit(table, width=LIST_WIDTH)


def show_card(slug: str, as_json: bool) -> None:
    """Print a method's card with what we measured."""
    cls = method_class(slug)
    recorded = recorded_results(slug)
    if as_json:
        print_json({**dataclasses.asdict(cls.card), "parameters": describe_params(cls), "results": recorded})
        return
    card = cls.card
    emit(Text.assemble((card.slug, "bold"), f"  {card.summary}"), width=WIDTH)
    needs = {"none": "nothing", "calibration": "calibration on text", "training": "training"}[card.training]
    head = {"title": card.title, "paper": card.paper, "site": card.site, "needs": needs}
    emit(_pairs({name: value for name, value in head.items() if value}), width=WIDTH)
    parameters = [
        {"name": p["name"], "default": cell(p["default"]), "allowed": p["allowed"], "": p["help"]}
        for p in describe_params(cls)
    ]
    _section("Parameters", rows_table(parameters) if parameters else Text("none"))
    for heading, lines in (
        ("Claims of the paper", card.claims),
        ("Where we differ", card.deviations),
        ("Limits", card.limits),
    ):
        if lines:
            _section(heading, _pairs([("-", line) for line in lines]))
    files = dict.fromkeys(str(entry["file"]) for entry in recorded)
    _section("Our measurements", Text("" if files else "none recorded"))
    for file in files:
        _show_recorded(file, [entry for entry in recorded if entry["file"] == file])


def _show_recorded(file: str, entries: list[dict[str, Any]]) -> None:
    emit(Padding(Text(file, "dim"), (0, 0, 0, 2)), width=WIDTH)
    for entry in entries:
        if "claim" in entry and "ours" in entry:
            print_claim(entry, details=False)
    rows = [{k: v for k, v in e.items() if k not in ("file", "slug")} for e in entries if "ours" not in e]
    for start in range(0, len(rows), BESIDE):
        emit(Padding(_beside(rows[start : start + BESIDE]), (0, 0, 1, 2)), width=WIDTH)


def _beside(rows: list[dict[str, Any]]) -> Table:
    """A column for each measurement, a line for each thing measured."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    for _ in rows:
        grid.add_column(justify="right" if len(rows) > 1 else "left", overflow="fold")
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if not any(isinstance(value, dict | list) for value in values):
            texts = map(cell, values) if len(rows) == 1 else (_broken(cell(value)) for value in values)
            grid.add_row(Text(name, "dim"), *map(Text, texts))
    return grid


def _broken(text: str) -> str:
    """A long spec with a line for each parameter."""
    return text if len(text) <= _LONGEST_SPEC else re.sub(r"(?<=[:,])(?=\S)", "\n", text)


def _section(heading: str, body: RenderableType) -> None:
    emit(Group(Text(""), Text(heading, "bold"), Padding(body, (0, 0, 0, 2))), width=WIDTH)


def _pairs(lines: dict[str, str] | list[tuple[str, str]]) -> Table:
    """Words beside text that folds within its own column."""
    grid = Table.grid(padding=(0, 1))
    for name, text in lines.items() if isinstance(lines, dict) else lines:
        grid.add_row(Text(name, "dim"), Text(text))
    return grid


def recorded_results(slug: str) -> list[dict[str, Any]]:
    """Entries about a method in ``benchmarks/results`` of the checkout, with their file's name.

    These are objects at any depth of ``*.json`` whose ``slug`` is this one, and all of ``claims/SLUG.json``.
    An installed package has no such folder, and no entries.
    """
    folder = Path(sparseland.__file__).resolve().parents[2] / "benchmarks" / "results"
    found = []
    for path in sorted(folder.glob("*.json")):
        found += [{"file": path.name, **entry} for entry in _entries(_read(path), slug)]
    claim = _read(folder / "claims" / f"{slug}.json")
    rows = claim if isinstance(claim, list) else [claim] if claim else []
    found += [{"file": f"claims/{slug}.json", **row} for row in rows if isinstance(row, dict)]
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _entries(value: Any, slug: str) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if value.get("slug") == slug:
            yield value
        else:
            for inner in value.values():
                yield from _entries(inner, slug)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, slug)
