"""What MMInference's offline search decides per head, as data and as a JSON file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparseland.attention._head_shapes import read_sizes
from sparseland.errors import SparselandError
from sparseland.headfile import HeadFile

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
        return cls(value["shape"], **read_sizes(value, _SIZES[value["shape"]], where))

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


# Per layer and query head; ``Calibration.meta["heads"]`` has the same form.
PATTERNS = HeadFile("mminference-patterns", 1, "patterns file", "heads", "head", HeadPlan)
