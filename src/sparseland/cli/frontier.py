"""``sparseland frontier``: progress while it runs, the table and the verdict when it is done."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from sparseland.cli import Interrupted, real
from sparseland.cli.output import PLAIN_WIDTH, console, emit, print_json
from sparseland.cli.progress import progress
from sparseland.errors import SparselandError
from sparseland.method import parse_spec, split_specs
from sparseland.report.provenance import drifts
from sparseland.report.results import Results, read_results
from sparseland.report.tables import results_table
from sparseland.report.words import verdict

FILES = ("recipe.json", "report.html", "results.jsonl")


def run_frontier(options: dict[str, Any], methods: str, as_json: bool) -> None:
    """Check what can be checked without the model, run, and print.

    Args:
        options: fields of ``FrontierOptions`` but the methods.
        methods: comma-separated specs; "" means all.
        as_json: print one JSON object and nothing else on stdout.

    Raises:
        SparselandError: an option is wrong, the model or text can't be used.
        Interrupted: Ctrl-C; says where the results so far are.
    """
    specs = split_specs(methods)
    for spec in specs:
        parse_spec(spec)
    out = Path(options["out"])
    check_folder(out)

    from sparseland import frontier

    request = frontier.FrontierOptions(**options, methods=specs)
    try:
        with contextlib.redirect_stdout(sys.stderr), progress() as update:
            result = frontier.run(request, update)
    except KeyboardInterrupt as stop:
        raise Interrupted(_stopped(out)) from stop
    if as_json:
        print_json({"choice": result.choice, "rows": result.rows, "out": str(result.out)})
    else:
        _print(result)


def gpu_defaults(lengths: str | None, device: str | None, rope_scale: str | None) -> tuple[str, str, str]:
    """What ``--gpu`` means where these options say nothing else.

    Raises:
        SparselandError: another kind of device was asked for.
    """
    if device is not None and not device.startswith("cuda"):
        raise SparselandError(f"--gpu and --device {device} exclude each other")
    return (
        "8192,32768" if lengths is None else lengths,
        "cuda" if device is None else device,
        "fit" if rope_scale is None else rope_scale,
    )


def parse_stretch(text: str | None) -> float | Literal["fit"] | None:
    """The factor of ``--rope-scale``, or "fit".

    Raises:
        SparselandError: neither.
    """
    if text is None or text == "fit":
        return text  # type: ignore[return-value]
    return real("--rope-scale", text)


def parse_lengths(text: str) -> list[int]:
    """``"2048,8192"`` -> ``[2048, 8192]``, ascending and without repeats.

    Raises:
        SparselandError: something is not a positive whole number.
    """
    lengths = set()
    for item in text.split(","):
        if not (item.strip().isascii() and item.strip().isdigit() and int(item) > 0):
            raise SparselandError(
                f"--lengths {text!r}: {item.strip()!r} is not allowed; write token counts such as 2048,8192"
            )
        lengths.add(int(item))
    return sorted(lengths)


def check_folder(out: Path) -> None:
    """Refuse a folder that can't be written to before a model is loaded; create nothing.

    Raises:
        SparselandError: a file is in the way, or the folder or its nearest parent is not writable.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise SparselandError(f"--out {out}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise SparselandError(f"--out {out}: no permission to write in {place}")


def _stopped(out: Path) -> str:
    results = out / "results.jsonl"
    if not results.exists():
        return "interrupted before the first measurement"
    return f"interrupted; what was measured is kept in {results}, the same command again goes on from there"


def _print(result: Any) -> None:
    out = console()
    path = Path(result.out) / "results.jsonl"
    results = read_results(path) if path.exists() else Results(measurements=result.rows, choice=result.choice)
    width = out.width if out.is_terminal else PLAIN_WIDTH
    emit(results_table(results.measurements, tasks=results.tasks, chosen=results.chosen, width=width))
    print()
    for d in drifts(results):
        what = f"dense before and after all others, {d['length']:,} tokens, {d['what']}"
        emit(Text(f"{what}: {d['before']}, {d['after']} ({d['change']}); the faster counts"))
    if results.drifts:
        print()
    emit(Text(" ".join(verdict(results))), width=100)
    print()
    for name in FILES:
        if (Path(result.out) / name).exists():
            print(Path(result.out) / name)
