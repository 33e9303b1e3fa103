"""The sparse shapes that MInference's offline search chooses among, as data and as a JSON file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sparseland.errors import SparselandError
from sparseland.headfile import HeadFile

SHAPES = ("a-shape", "vertical-slash", "block-sparse")
_SIZES = {
    "a-shape": ("vertical", "slash"),
    "vertical-slash": ("vertical", "slash"),
    "block-sparse": ("blocks",),
}


def read_sizes(value: dict[str, Any], names: Collection[str], where: str) -> dict[str, int]:
    """The sizes of a shape in its file's form: these ``names`` and no others.

    Raises:
        SparselandError: one is missing, too many, or no whole number from 0 on.
    """
    for name in names:
        size = value.get(name)
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**31:
            raise SparselandError(
                f"{where}: {name}={size!r:.80} is not allowed; it must be a whole number >= 0"
            )
    if extra := sorted(set(value) - {"shape", *names}):
        raise SparselandError(f"{where}: a {value['shape']} has no {', '.join(map(str, extra))}")
    return {name: value[name] for name in names}


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
        return cls(value["shape"], **read_sizes(value, _SIZES[value["shape"]], where))

    def scaled(self, factor: float) -> HeadShape:
        """The same shape with all sizes times ``factor``."""
        sizes = {name: round(getattr(self, name) * factor) for name in _SIZES[self.shape]}
        return HeadShape(self.shape, **sizes)


# Per layer and query head; ``Calibration.meta["heads"]`` has the same form.
PATTERNS = HeadFile("minference-patterns", 1, "patterns file", "heads", "head", HeadShape)
