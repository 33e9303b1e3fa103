"""``sparseland bench`` and ``sparseland reproduce``: programs that give rows of numbers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
from typing import Any

from rich.padding import Padding
from rich.text import Text

from sparseland.cli.output import cell, emit, print_claim, print_json, rows_table
from sparseland.cli.progress import progress
from sparseland.errors import SparselandError
from sparseland.method import method_class

SCALES = ("smoke", "full")


def run_bench(
    op: str,
    as_json: bool,
    length: int | None = None,
    density: float | None = None,
    command: str | None = None,
) -> None:
    """Print the benchmark of an op; what is being measured goes to stderr.

    Raises:
        SparselandError: there is no benchmark of that name, or it has no such option or value.
    """
    from sparseland import bench
    from sparseland.machine import circumstances

    # What a library prints meanwhile must not get between the lines of JSON.
    with contextlib.redirect_stdout(sys.stderr), progress() as update:
        rows = bench.run(op, length=length, density=density, progress=update)
    if as_json:
        print_json({**circumstances(command or f"sparseland bench {op} --json"), "rows": rows})
    else:
        _print_rows(rows)


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """A table; above it the words and sizes of all rows, below it the rivals that did not run."""
    plain = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows]
    same = {
        k: v
        for k, v in plain[0].items()
        if isinstance(v, str | int) and all(row.get(k) == v for row in plain)
    }
    emit(Text(", ".join(f"{name} {cell(value)}" for name, value in same.items())), width=100)
    emit(
        Padding(rows_table([{k: v for k, v in row.items() if k not in same} for row in plain]), (1, 0, 0, 0))
    )
    where: dict[tuple[str, str], int] = {}
    for row in rows:
        for missing in (row.get("not_run") or {}).items():
            where[missing] = where.get(missing, 0) + 1
    for (name, reason), count in where.items():
        part = "" if count == len(rows) else f" in {count} of {len(rows)} rows"
        emit(Text(f"not run: {name}{part}: {reason}"), width=100)


def run_claim(slug: str, scale: str, as_json: bool) -> None:
    """Run a paper's claim: ``reproduce(scale)`` of ``sparseland/claims/<slug>.py``.

    Raises:
        SparselandError: no such method, no claim program for it, or no such scale.
    """
    if scale not in SCALES:
        raise SparselandError(f"scale={scale} is not allowed; it must be one of {', '.join(SCALES)}")
    names = claim_slugs()
    if slug not in names:
        method_class(slug)  # a method that does not exist is the better error
        have = f"there are {', '.join(names)}" if names else "there is none yet"
        raise SparselandError(f"no claim program for {slug!r}; {have}")
    module = importlib.import_module(f"sparseland.claims.{slug.replace('-', '_')}")
    with contextlib.redirect_stdout(sys.stderr):
        result = module.reproduce(scale)
    if as_json:
        from sparseland.machine import circumstances

        print_json({**result, **circumstances(f"sparseland reproduce {slug} --scale {scale} --json")})
    else:
        print_claim(result)


def claim_slugs() -> list[str]:
    """Slugs that have a claim program."""
    from sparseland import claims

    modules = pkgutil.iter_modules(claims.__path__)
    return sorted(m.name.replace("_", "-") for m in modules if not m.name.startswith("_"))
