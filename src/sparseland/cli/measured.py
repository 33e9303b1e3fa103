"""``sparseland bench`` and ``sparseland reproduce``: programs that give rows of numbers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
import sys

from sparseland.cli.output import emit, print_claim, print_json, rows_table
from sparseland.errors import SparselandError
from sparseland.method import method_class

SCALES = ("smoke", "full")


def run_bench(op: str, as_json: bool) -> None:
    """Print the benchmark of an op.

    Raises:
        SparselandError: there is no benchmark of that name.
    """
    from sparseland import bench

    # What a library prints meanwhile must not get between the lines of JSON.
    with contextlib.redirect_stdout(sys.stderr):
        rows = bench.run(op)
    if as_json:
        print_json(rows)
    else:
        emit(rows_table(rows), width=180)


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
