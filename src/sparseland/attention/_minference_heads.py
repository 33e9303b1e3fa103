"""What MInference's offline search decides per head, as data and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparseland.errors import SparselandError

FORMAT = "minference-patterns"
VERSION = 1
SHAPES = ("a-shape", "vertical-slash", "block-sparse")
_SIZES = {
    "a-shape": ("vertical", "slash"),
    "vertical-slash": ("vertical", "slash"),
    "block-sparse": ("blocks",),
}
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class HeadShape:
    """The sparse shape of one query head.

    Args:
        shape: ``a-shape``, ``vertical-slash`` or ``block-sparse``.
        vertical: key columns in tokens (of an A-shape: its sinks).
        slash: diagonals in tokens (of an A-shape: its local window).
        blocks: key blocks of 64 per query block (block-sparse only).
    """

    shape: str
    vertical: int = 0
    slash: int = 0
    blocks: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Shape and the sizes that it uses."""
        return {"shape": self.shape, **{name: getattr(self, name) for name in _SIZES[self.shape]}}

    @classmethod
    def of(cls, value: Any, where: str) -> HeadShape:
        """From :meth:`as_dict`'s form; ``where`` opens the error."""
        if not isinstance(value, dict) or value.get("shape") not in SHAPES:
            raise SparselandError(
                f"{where}: a head needs a shape, one of {', '.join(SHAPES)}; got {value!r:.80}"
            )
        names = _SIZES[value["shape"]]
        for name in names:
            size = value.get(name)
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**31:
                raise SparselandError(
                    f"{where}: {name}={size!r:.80} is not allowed; it must be a whole number >= 0"
                )
        if extra := sorted(set(value) - {"shape", *names}):
            raise SparselandError(f"{where}: a {value['shape']} head has no {', '.join(map(str, extra))}")
        return cls(value["shape"], **{name: value[name] for name in names})

    def scaled(self, factor: float) -> HeadShape:
        """The same shape with all sizes times ``factor``."""
        sizes = {name: round(getattr(self, name) * factor) for name in _SIZES[self.shape]}
        return HeadShape(self.shape, **sizes)


HeadTable = tuple[tuple[HeadShape, ...], ...]


def read_heads(value: Any, where: str) -> HeadTable:
    """A list over layers of lists over query heads, checked.

    Raises:
        SparselandError: not that shape, an unknown head shape, or a size that is not allowed.
    """
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise SparselandError(
            f'{where}: "heads" must be a non-empty list over layers of lists over query heads'
        )
    return tuple(
        tuple(HeadShape.of(head, f"{where}: layer {i}, head {j}") for j, head in enumerate(row))
        for i, row in enumerate(value)
    )


def save_patterns(path: str | Path, heads: Sequence[Sequence[dict[str, Any] | HeadShape]]) -> Path:
    """Write per-head patterns (``Calibration.meta["heads"]``) to a JSON file that ``patterns=`` reads.

    Raises:
        SparselandError: the patterns are malformed, or the file can't be written.
    """
    path = Path(path)
    rows = [[h.as_dict() if isinstance(h, HeadShape) else h for h in row] for row in heads]
    read_heads(rows, "these patterns")
    try:
        path.write_text(json.dumps({"format": FORMAT, "version": VERSION, "heads": rows}, indent=1) + "\n")
    except OSError as cause:
        raise SparselandError(f"can't write the patterns {path}: {cause.strerror or cause}") from cause
    return path


def load_patterns(path: str | Path) -> HeadTable:
    """Read what :func:`save_patterns` wrote; read again only when the file has changed.

    Raises:
        SparselandError: not there, not JSON, of another format or a newer version, or malformed.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as cause:
        raise SparselandError(f"can't read the patterns {path}: {cause.strerror or cause}") from cause
    return _load(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _load(path: Path, changed: int, size: int) -> HeadTable:
    if size > _MAX_BYTES:
        raise SparselandError(f"{path} has {size} bytes; a patterns file has at most {_MAX_BYTES}")
    try:
        data = json.loads(path.read_bytes())
    except OSError as cause:
        raise SparselandError(f"can't read the patterns {path}: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise SparselandError(f"{path} is not a patterns file: {cause}") from cause
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SparselandError(f'{path} is not a patterns file: it does not say "format": "{FORMAT}"')
    version = data.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise SparselandError(f"{path} has version {version!r:.80}; this sparseland reads {VERSION}")
    return read_heads(data.get("heads"), str(path))
