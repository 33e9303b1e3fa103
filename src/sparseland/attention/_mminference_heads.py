"""What MMInference's offline search decides per head, as data and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparseland.errors import SparselandError

FORMAT = "mminference-patterns"
VERSION = 1
_MAX_BYTES = 64 * 2**20

_SIZES = {"a-shape": ("vertical", "slash"), "vertical-slash": ("vertical", "slash"), "grid": ("lines",)}
# How a head treats the border between modalities: which of its queries and keys have a shape of their own.
BOUNDARIES = {
    "none": ("all",),
    "q": ("text", "vision"),
    "2d": ("text-text", "text-vision", "vision-text", "vision-vision"),
}
# A grid is one of vision queries and vision keys.
_GRIDS = ("all", "vision", "vision-vision")


@dataclass(frozen=True)
class Shape:
    """The sparse shape of some queries and keys of one head.

    Args:
        shape: ``a-shape``, ``vertical-slash`` or ``grid``.
        vertical: key columns in tokens (of an A-shape: its sinks).
        slash: diagonals in tokens (of an A-shape: its local window).
        lines: places in a frame whose tokens see and are seen by all (grid only).
    """

    shape: str
    vertical: int = 0
    slash: int = 0
    lines: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Shape and the sizes that it uses."""
        return {"shape": self.shape, **{name: getattr(self, name) for name in _SIZES[self.shape]}}

    @classmethod
    def of(cls, value: Any, where: str) -> Shape:
        """From :meth:`as_dict`'s form; ``where`` opens the error."""
        if not isinstance(value, dict) or value.get("shape") not in _SIZES:
            raise SparselandError(
                f"{where}: a shape must be one of {', '.join(_SIZES)} with its sizes; got {value!r:.80}"
            )
        names = _SIZES[value["shape"]]
        for name in names:
            size = value.get(name)
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**31:
                raise SparselandError(
                    f"{where}: {name}={size!r:.80} is not allowed; it must be a whole number >= 0"
                )
        if extra := sorted(set(value) - {"shape", *names}):
            raise SparselandError(f"{where}: a {value['shape']} has no {', '.join(map(str, extra))}")
        return cls(value["shape"], **{name: value[name] for name in names})

    def scaled(self, factor: float) -> Shape:
        """The same shape with columns and diagonals times ``factor``; a frame's lines stay as they are."""
        return replace(self, vertical=round(self.vertical * factor), slash=round(self.slash * factor))


@dataclass(frozen=True)
class HeadPlan:
    """One head: its boundary type and a shape for each of that type's regions.

    Args:
        boundary: ``none`` (one shape for all tokens), ``q`` (one per modality of the queries) or ``2d`` (one
            per modality of queries and keys).
        shapes: region -> shape, the regions of ``BOUNDARIES[boundary]``.
    """

    boundary: str
    shapes: tuple[tuple[str, Shape], ...]

    def __getitem__(self, region: str) -> Shape:
        return dict(self.shapes)[region]

    @classmethod
    def plain(cls, shape: Shape) -> HeadPlan:
        """The same shape everywhere."""
        return cls("none", (("all", shape),))

    @classmethod
    def by_query(cls, text: Shape, vision: Shape) -> HeadPlan:
        """A shape per modality of the queries."""
        return cls("q", (("text", text), ("vision", vision)))

    @classmethod
    def by_pair(cls, shapes: dict[str, Shape]) -> HeadPlan:
        """A shape per modality of queries and keys."""
        return cls("2d", tuple((region, shapes[region]) for region in BOUNDARIES["2d"]))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"boundary": self.boundary, **{region: shape.as_dict() for region, shape in self.shapes}}

    @classmethod
    def of(cls, value: Any, where: str) -> HeadPlan:
        """From :meth:`as_dict`'s form; ``where`` opens the error."""
        if not isinstance(value, dict) or value.get("boundary") not in BOUNDARIES:
            raise SparselandError(
                f"{where}: a head needs a boundary, one of {', '.join(BOUNDARIES)}; got {value!r:.80}"
            )
        regions = BOUNDARIES[value["boundary"]]
        if set(value) != {"boundary", *regions}:
            raise SparselandError(
                f"{where}: a head with boundary {value['boundary']} has the regions {', '.join(regions)}; "
                f"got {', '.join(sorted(map(str, set(value) - {'boundary'}))) or 'none':.80}"
            )
        shapes = tuple((region, Shape.of(value[region], f"{where}, {region}")) for region in regions)
        for region, shape in shapes:
            if shape.shape == "grid" and region not in _GRIDS:
                raise SparselandError(f"{where}: {region} has no video frames and can't be a grid")
        return cls(value["boundary"], shapes)

    def scaled(self, factor: float) -> HeadPlan:
        """All shapes with their columns and diagonals times ``factor``."""
        return HeadPlan(self.boundary, tuple((r, shape.scaled(factor)) for r, shape in self.shapes))

    def with_grids_as(self, other: Shape) -> HeadPlan:
        """The plan with another shape in place of each grid."""
        return HeadPlan(self.boundary, tuple((r, other if s.shape == "grid" else s) for r, s in self.shapes))

    def alone(self, vision: bool) -> HeadPlan:
        """What remains of it on a prompt of one modality."""
        name = "vision" if vision else "text"
        region = {"none": "all", "q": name, "2d": f"{name}-{name}"}[self.boundary]
        return HeadPlan.plain(self[region])


HeadTable = tuple[tuple[HeadPlan, ...], ...]


def read_heads(value: Any, where: str) -> HeadTable:
    """A list over layers of lists over query heads, checked.

    Raises:
        SparselandError: not that form, an unknown boundary or shape, or a size that is not allowed.
    """
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise SparselandError(
            f'{where}: "heads" must be a non-empty list over layers of lists over query heads'
        )
    return tuple(
        tuple(HeadPlan.of(head, f"{where}: layer {i}, head {j}") for j, head in enumerate(row))
        for i, row in enumerate(value)
    )


def save_patterns(path: str | Path, heads: Sequence[Sequence[dict[str, Any] | HeadPlan]]) -> Path:
    """Write per-head patterns (``Calibration.meta["heads"]``) to a JSON file that ``patterns=`` reads.

    Raises:
        SparselandError: the patterns are malformed, or the file can't be written.
    """
    path = Path(path)
    rows = [[h.as_dict() if isinstance(h, HeadPlan) else h for h in row] for row in heads]
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
