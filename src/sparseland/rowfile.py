"""Measurements on disk: one JSON object a line, appended as they are made, read again by a rerun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from sparseland.errors import SparselandError
from sparseland.files import write_atomically


class RowFile:
    """``results.jsonl`` of one job; subclasses say which rows carry its fingerprint.

    Args:
        out: the folder, made if it is missing.
        fingerprint: what makes earlier rows comparable; rows of another job are refused.

    Raises:
        SparselandError: the folder can't be written to, or holds another job.
    """

    KIND: ClassVar[str]  # of the rows that carry the fingerprint
    OTHER: ClassVar[str]  # what a file with another one holds

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = out / "results.jsonl", fingerprint
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.rows = list(read_rows(self.path)) if self.path.exists() else []
            # An interrupt may have cut the very first row short; anything else is somebody's file.
            ours = bool(self.rows) or not self.path.exists() or _begins_a_row(self.path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as cause:
            raise SparselandError(f"can't use {out}: {getattr(cause, 'strerror', None) or cause}") from cause
        if not ours:
            raise SparselandError(f"{self.path} holds something else than results; choose another --out")
        known = {str(r.get("fingerprint")) for r in self.of(self.KIND)}
        if self.rows and known != {fingerprint}:
            raise SparselandError(f"{self.path} holds {self.OTHER}; choose another --out")
        try:
            # A line that an interrupt cut short is dropped, so that the next one starts on its own.
            write_atomically(self.path, "".join(map(_line, self.rows)).encode())
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as cause:
            raise SparselandError(f"can't write to {out}: {cause.strerror or cause}") from cause

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row; the system has it when this returns."""
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
        """Done writing; the system has every row already, or its failure was told."""
        with suppress(OSError):
            self._file.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; what is no row is passed over."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str):
            yield row


def _begins_a_row(text: str) -> bool:
    start = '{"kind": "'
    return start.startswith(text) or (text.startswith(start) and "\n" not in text)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
