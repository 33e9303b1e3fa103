"""Reading ``results.jsonl``: one JSON object a line, written while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseland.errors import SparselandError

SCHEMA = 1

Recipe = tuple[str, ...]


@dataclass
class Results:
    """What a results file holds, sorted by kind.

    Args:
        runs: one header per start of the command (a resumed run has several).
        measurements: the newest row of each recipe and length; a full one replaces a screening one.
        drifts: the dense model's times before and after, per length.
        tasks: single task items, right or wrong.
        inspections: recall, and seconds of selection and of computation, per recipe that acts on prompts.
        maps: attention maps with the computed pairs.
        left_out: what there was no memory or time for, since the newest run that came to a choice.
        choice: the chosen recipe, or None while the run is unfinished.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    drifts: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    inspections: list[dict[str, Any]] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    choice: dict[str, Any] | None = None

    @property
    def run(self) -> dict[str, Any]:
        """The newest header ({} if there is none)."""
        return self.runs[-1] if self.runs else {}

    @property
    def lengths(self) -> list[int]:
        """The measured lengths, ascending."""
        return sorted({row["length"] for row in self.measurements})

    @property
    def chosen(self) -> Recipe | None:
        """The chosen recipe; () is dense, None is no choice yet."""
        return None if self.choice is None else key(self.choice)

    def row(self, recipe: Recipe, length: int) -> dict[str, Any] | None:
        """The measurement of a recipe at a length, or None."""
        return next((r for r in self.measurements if key(r) == recipe and r["length"] == length), None)


def key(row: dict[str, Any]) -> Recipe:
    """A row's recipe as a hashable value."""
    return tuple(row.get("recipe") or ())


def score(
    tasks: Sequence[dict[str, Any]], recipe: Recipe, length: int | None = None, task: str = "needle"
) -> tuple[int, int] | None:
    """Items found and asked of a task, or None if the recipe was not asked."""
    items = [
        bool(t.get("correct"))
        for t in tasks
        if t.get("task") == task and key(t) == recipe and (length is None or t.get("length") == length)
    ]
    return (sum(items), len(items)) if items else None


def with_shared_decoding(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, those that decode densely on the library's kernels with the least of their decoding times.

    What acts on prompts alone leaves decoding as it is: all of these time the same thing, and what else a
    machine does only ever adds time. Compared with dense's time, which a resumed run measures anew.
    """
    ratios: dict[int, float] = {}
    for row in rows:
        ours, dense = row.get("decode_ms"), row.get("dense_decode_ms")
        if row.get("dense_decoding") and ours and dense:
            length = row["length"]
            ratios[length] = min(ours / dense, ratios.get(length, ours / dense))
    return [
        {**row, "decode_ms": ratios[row["length"]] * row["dense_decode_ms"]}
        if row.get("dense_decoding") and row.get("decode_ms")
        else row
        for row in rows
    ]


def with_fastest_dense(
    rows: Sequence[dict[str, Any]], drifts: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows, against the faster of dense's two timings, before and after them, where they differ.

    On a machine that was slow at first everything measured later would seem faster than dense.
    """
    fastest = {}
    for drift in drifts:
        for name, before, after in (
            ("prefill_s", "before_s", "after_s"),
            ("decode_ms", "before_decode_ms", "after_decode_ms"),
        ):
            if drift.get(before) and drift.get(after):
                fastest[name, drift["length"], drift[before]] = min(drift[before], drift[after])
    changed = []
    for row in rows:
        found = {
            name: fastest[name, row["length"], row[f"dense_{name}"]]
            for name in ("prefill_s", "decode_ms")
            if (name, row["length"], row.get(f"dense_{name}")) in fastest
        }
        own = found if not row.get("recipe") and row.get("label") == "dense" else {}
        changed.append({**row, **{f"dense_{name}": value for name, value in found.items()}, **own})
    return changed


def read_results(path: Path) -> Results:
    """Read a results file; a last line cut short by an interrupted run is left out.

    Raises:
        SparselandError: the file can't be read, a line is not a JSON object, or the schema is newer.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as cause:
        raise SparselandError(f"can't read {path}: {cause.strerror or cause}") from cause
    results = Results()
    newest: dict[tuple[Recipe, int], dict[str, Any]] = {}
    left_out: list[tuple[int, dict[str, Any]]] = []  # with the number of the run
    chose = 0  # the number of the newest run with a choice
    for at, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as cause:
            if at == len(lines) - 1:
                break
            raise SparselandError(f"{path}, line {at + 1}: not JSON; remove the line or the file") from cause
        if not isinstance(row, dict):
            raise SparselandError(f"{path}, line {at + 1}: a JSON object is expected")
        _file(results, newest, row, f"{path}, line {at + 1}")
        if row.get("kind") == "left_out":
            left_out.append((len(results.runs), row))
        elif row.get("kind") == "choice":
            chose = len(results.runs)
    results.measurements = with_fastest_dense(with_shared_decoding([*newest.values()]), results.drifts)
    # A rerun goes on with what the runs before it left out: once it has chosen, theirs is history.
    results.left_out = [row for at, row in left_out if at >= chose]
    return results


def _file(
    results: Results, newest: dict[tuple[Recipe, int], dict[str, Any]], row: dict[str, Any], where: str
) -> None:
    kind = row.get("kind")
    if kind == "run":
        if row.get("schema") != SCHEMA:
            raise SparselandError(f"{where}: schema {row.get('schema')!r}; this version reads {SCHEMA}")
        results.runs.append(row)
    elif kind == "measurement":
        if not isinstance(row.get("length"), int):
            raise SparselandError(f"{where}: a measurement without a whole number as length")
        place = (key(row), row["length"])
        before = newest.get(place)
        # A short screening never replaces a full measurement, whatever their order in a resumed file.
        if before is None or not (before.get("stage") == "full" and row.get("stage") == "screen"):
            newest[place] = row
    elif kind == "drift":
        results.drifts.append(row)
    elif kind == "task":
        results.tasks.append(row)
    elif kind == "inspection":
        results.inspections.append(row)
    elif kind == "map":
        results.maps.append(row)
    elif kind == "choice":
        results.choice = row
