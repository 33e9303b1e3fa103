"""A run's measurements on disk: one JSON object a line, appended as they are made, read again by a rerun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparseland.errors import SparselandError
from sparseland.recipe import write_atomically


class RunLog:
    """``results.jsonl``: appended to as measurements are made, read again by a rerun."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path = out / "results.jsonl"
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.rows = list(_read_rows(self.path)) if self.path.exists() else []
            known = next((r["fingerprint"] for r in self.rows if r["kind"] == "run"), fingerprint)
            if known != fingerprint:
                raise SparselandError(
                    f"{self.path} holds results of another model, text or setting; choose another --out"
                )
            # A line cut short by an interrupt is dropped, so that the next one starts on its own.
            write_atomically(self.path, "".join(map(_line, self.rows)).encode())
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as cause:
            raise SparselandError(f"can't write to {out}: {cause.strerror or cause}") from cause
        self.fingerprint = fingerprint

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row; it is on disk when this returns."""
        self.rows.append(row)
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as cause:
            raise SparselandError(f"can't write to {self.path}: {cause.strerror or cause}") from cause
        return row

    def of(self, kind: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of a kind with these values."""
        return [r for r in self.rows if r["kind"] == kind and all(r.get(k) == v for k, v in values.items())]

    def close(self) -> None:
        """Done writing."""
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str):
            yield row
