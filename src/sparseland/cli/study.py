"""``sparseland study``: a paper's grid of measurements on one's own models, its analyses and its page."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from sparseland.cli import Interrupted
from sparseland.cli.frontier import check_folder, parse_lengths
from sparseland.cli.output import emit, finite, print_json, rows_table
from sparseland.cli.progress import progress
from sparseland.errors import SparselandError
from sparseland.files import write_atomically

STUDIES = ("sparse-frontier",)


def run_study(
    study: str,
    options: dict[str, Any],
    units: str,
    compression: str,
    lengths: str,
    tasks: str,
    score: str,
    as_json: bool,
) -> None:
    """Check what can be checked without a model, measure, analyse, and print.

    Args:
        study: a name in :data:`STUDIES`.
        options: fields of ``StudyOptions`` that need no parsing.
        units, compression, lengths, tasks: comma-separated; "" means the default.
        score: what is compared (see ``sparseland.study.analysis.SCORES``).
        as_json: print the summary and nothing else on stdout.

    Raises:
        SparselandError: an option is wrong, a model, text or folder can't be used.
        Interrupted: Ctrl-C; says where the results so far are.
    """
    if study not in STUDIES:
        raise SparselandError(f"no study {study!r}; there is {', '.join(STUDIES)}")
    out = Path(options["out"])
    from sparseland.study import analysis
    from sparseland.study.job import StudyOptions, check, measure
    from sparseland.study.page import write_page

    if score not in analysis.SCORES:
        raise SparselandError(
            f"--score {score!r} is not allowed; it must be one of {', '.join(analysis.SCORES)}"
        )
    if score == "generated" and not options.get("generate", True):
        raise SparselandError("--score generated needs generation; leave --no-generate out")
    lists: dict[str, Any] = {}
    if units:
        lists["units"] = _words("--units", units)
    if tasks:
        lists["tasks"] = _words("--tasks", tasks)
    if lengths:
        lists["lengths"] = parse_lengths(lengths)
    if compression:
        lists["compressions"] = parse_compressions(compression)
    request = StudyOptions(**options, **lists)
    check(request)
    check_folder(out)
    try:
        with contextlib.redirect_stdout(sys.stderr), progress() as update:
            rows = measure(request, update)
        summary = analysis.summary(rows, score)
        text = json.dumps(finite(summary), indent=1, allow_nan=False)
        write_atomically(out / "summary.json", text.encode())
        write_page(summary, out / "report.html")
    except OSError as cause:
        raise SparselandError(f"can't write to {out}: {cause.strerror or cause}") from cause
    except KeyboardInterrupt as stop:
        kept = out / "results.jsonl"
        told = f"what was measured is kept in {kept}, the same command again goes on from there"
        raise Interrupted(
            f"interrupted; {told}" if kept.exists() else "interrupted before the first cell"
        ) from stop
    if as_json:
        print_json({**summary, "out": str(out)})
    else:
        _print(summary, out)


def parse_compressions(text: str) -> list[float]:
    """``"1,2,4.5"`` -> numbers, ascending and without repeats.

    Raises:
        SparselandError: something is not a number of at least 1.
    """
    found = set()
    for item in text.split(","):
        try:
            value = float(item)
        except ValueError:
            value = math.nan
        if not 1 <= value < math.inf:
            raise SparselandError(
                f"--compression {text!r}: {item.strip()!r} is not allowed; write numbers >= 1 such as 2,4,8"
            )
        found.add(value)
    return sorted(found)


def _words(option: str, text: str) -> list[str]:
    words = [item.strip() for item in text.split(",")]
    if not all(words):
        raise SparselandError(f"{option} {text!r}: a name is empty; write names with commas between them")
    return list(dict.fromkeys(words))


def _print(summary: dict[str, Any], out: Path) -> None:
    from sparseland.study.page import dense_table, ranking_table, safe_table

    for heading, table in (
        ("What the dense model can do (only tasks that count are compared)", dense_table(summary)),
        (f"Largest compression without significant loss ({summary['test']})", safe_table(summary)),
        ("Units at equal measured compression", ranking_table(summary)),
    ):
        emit(Text(heading, style="bold"), width=120)
        emit(rows_table(table) if table else Text("nothing measured, or no task counts"), width=180)
        print()
    law = summary["law"]
    if law["coefficients"] is None:
        emit(Text(f"The law was not fitted: {law['reason']}"), width=120)
    else:
        slopes = ", ".join(f"{k} {v:+.3f}" for k, v in law["coefficients"].items() if k.startswith("log"))
        emit(Text(f"Law: {slopes}; R² {law['r_squared']:.3f} on {law['points']} points"), width=120)
        for h in law["hold_out"]:
            emit(Text(f"  {h['axis']} >= {h['from']:g} held out: R² {h['r_squared']:.3f}"), width=120)
    for row in summary["failed"]:
        emit(
            Text(f"failed: {row['task']}, {row['length']} tokens, {row['unit']}: {row['reason']}"), width=120
        )
    print()
    for name in ("report.html", "summary.json", "results.jsonl"):
        print(out / name)
