"""What a calibration decides per layer and head, as a JSON file that a method's field can name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from sparseland.errors import SparselandError
from sparseland.files import read_object, write_atomically


class Entry(Protocol):
    """One head's part of a table."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        ...

    @classmethod
    def of(cls, value: Any, where: str) -> Self:
        """From :meth:`as_dict`'s form, checked; ``where`` opens the error."""
        ...


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class HeadFile(Generic[E]):
    """A kind of file: ``{"format": …, "version": …, <key>: layers of heads}``.

    Args:
        format: the file's own name for its kind.
        version: the newest that is read, and the one that is written.
        what: the same for messages ("patterns file").
        key: where the table lies.
        head: what a row has one of ("query head").
        entry: the class of one head's part.
    """

    format: str
    version: int
    what: str
    key: str
    head: str
    entry: type[E]

    def table(self, value: Any, where: str) -> tuple[tuple[E, ...], ...]:
        """A list over layers of lists over heads, checked.

        Raises:
            SparselandError: not that form, or an entry that is not allowed.
        """
        rows = value if isinstance(value, list) else []
        if not rows or not all(isinstance(row, list) and row for row in rows):
            form = f"a non-empty list over layers of lists over {self.head}s"
            raise SparselandError(f'{where}: "{self.key}" must be {form}')
        return tuple(
            tuple(self.entry.of(x, f"{where}: layer {i}, {self.head} {j}") for j, x in enumerate(row))
            for i, row in enumerate(rows)
        )

    def save(self, path: str | Path, table: Sequence[Sequence[E | dict[str, Any]]]) -> Path:
        """Write a table, of entries or of what :meth:`Entry.as_dict` makes of them.

        Raises:
            SparselandError: the table is malformed, or the file can't be written.
        """
        path = Path(path)
        rows = [[x.as_dict() if isinstance(x, self.entry) else x for x in row] for row in _rows(table)]
        self.table(rows, "the table")
        data = {"format": self.format, "version": self.version, self.key: rows}
        try:
            write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())
        except OSError as cause:
            raise SparselandError(f"can't write the {self.what} {path}: {cause.strerror or cause}") from cause
        return path

    def load(self, path: str | Path) -> tuple[tuple[E, ...], ...]:
        """Read what :meth:`save` wrote; read again only when the file has changed.

        Raises:
            SparselandError: not there, not JSON, of another format or a newer version, or malformed.
        """
        path = Path(path)
        try:
            status = path.stat()
        except OSError as cause:
            raise SparselandError(f"can't read the {self.what} {path}: {cause.strerror or cause}") from cause
        return _load(self, path, status.st_mtime_ns, status.st_size)


def _rows(table: Any) -> list[list[Any]]:
    """Lists of lists; of what is none of them, nothing."""
    rows = list(table) if isinstance(table, list | tuple) else []
    return [list(row) if isinstance(row, list | tuple) else [] for row in rows]


@lru_cache(maxsize=16)
def _load(file: HeadFile[E], path: Path, changed: int, size: int) -> tuple[tuple[E, ...], ...]:
    data = read_object(path, file.what)
    if data.get("format") != file.format:
        raise SparselandError(f'{path} is not a {file.what}: it does not say "format": "{file.format}"')
    version = data.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= file.version:
        raise SparselandError(f"{path} has version {version!r:.80}; this sparseland reads {file.version}")
    return file.table(data.get(file.key), str(path))
