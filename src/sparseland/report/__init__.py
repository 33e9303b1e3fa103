"""Tables, plots and one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path


def write_report(results: Path, out: Path) -> None:
    """Make ``report.html`` of a results file: one file, no network, readable without scripts.

    Args:
        results: ``results.jsonl`` as ``sparseland frontier`` writes it; may be of an unfinished run.
        out: the page to write (replaced atomically).

    Raises:
        SparselandError: the results can't be read or hold no measurement, or ``out`` can't be written.
    """
    # Matplotlib takes half a second to import; the command line must not pay for it in `--help`.
    from sparseland.report.page import write_page

    write_page(Path(results), Path(out))
