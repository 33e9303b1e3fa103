"""``results.jsonl``: rows appended as they are measured, read again by the next run of the same study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparseland.errors import SparselandError


class Journal:
    """Rows of one study on disk.

    Args:
        out: the folder, made if it is missing.
        fingerprint: what makes earlier rows comparable; rows of another study are refused.

    Raises:
        SparselandError: the folder can't be written to, or holds another study.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path = out / "results.jsonl"
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.rows = list(read_rows(self.path)) if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as cause:
            raise SparselandError(f"can't use {out}: {getattr(cause, 'strerror', None) or cause}") from cause
        known = {str(r.get("fingerprint")) for r in self.rows if r["kind"] == "study"}
        if self.rows and known != {fingerprint}:
            raise SparselandError(
                f"{self.path} holds another study (seed, samples, dtype or text differ); choose another --out"
            )
        try:
            # A line that an interrupt cut short is dropped, so that the next one starts on its own.
            self._file = self.path.open("w", encoding="utf-8")
            for row in self.rows:
                self._put(row)
        except OSError as cause:
            raise SparselandError(f"can't write to {out}: {cause.strerror or cause}") from cause

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row; it is on disk when this returns."""
        self.rows.append(row)
        try:
            self._put(row)
        except OSError as cause:
            raise SparselandError(f"can't write to {self.path}: {cause.strerror or cause}") from cause
        return row

    def find(self, kind: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of a kind with these values."""
        return [r for r in self.rows if r["kind"] == kind and all(r.get(k) == v for k, v in values.items())]

    def _put(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; what is no row is passed over."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str):
            yield row
