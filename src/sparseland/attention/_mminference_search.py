"""MMInference's offline part: which shape each region of a head gets, and which boundary type the head has.

Every shape is grown or shrunk until it computes as many pairs as MInference's A-shape does for the same
queries. First each region (queries of one modality over keys of one or of both) takes the shape under which
the attention output is nearest to dense, with the other regions dense; then the head takes the boundary type
whose regions together are nearest, the simplest where they are about equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparseland.attention._mminference_heads import BOUNDARIES, HeadPlan, Shape
from sparseland.attention._mminference_index import MixedIndex
from sparseland.attention._mminference_layout import Layout, kind_mask, layout_of, positions
from sparseland.attention._shape_index import LOCAL, SINKS
from sparseland.attention._shape_search import TARGET_LENGTH, target_for
from sparseland.attention.mminference import DEFAULT_SHAPE, plan_pattern
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs
from sparseland.ops.attend import attend
from sparseland.patterns import PartsPattern, Pattern, WindowPattern

# Candidates, (vertical, slash): proportions only, all are scaled to the target's cost.
VERTICAL_SLASH = ((1000, 6096), (100, 1800), (500, 1500), (3000, 200))
_STEPS = 10  # halvings of the interval in which a candidate's size is searched
# A more complicated boundary type must lower the error by more than this part of it, and of the output.
_MARGIN, _NEGLIGIBLE = 0.02, 1e-4
# A family whose smallest member costs more than this times the target is out, unless all are.
_OVER = 1.1


@dataclass
class Candidate:
    """One family of shapes in one region at matched cost, for all heads of a layer.

    Args:
        shapes: one per head.
        error: squared error of the region's queries' attention output per head, ``[H]`` float64.
        fits: whether the cost is the target's, ``[H]``.
    """

    shapes: list[Shape]
    error: Float[Tensor, " H"]
    fits: Bool[Tensor, " H"]


def search(model: nn.Module, call: Mapping[str, Any]) -> list[list[HeadPlan]]:
    """The best plan per layer and query head on one call of the whole model, with sizes as for 30k tokens.

    Args:
        call: keyword arguments of the model: ``input_ids`` without padding, pixel values, grids. Of several
            rows, errors are added up and each head takes the plan of least error over all rows' own plans.

    Raises:
        SparselandError: no ``input_ids``, or fewer than two tokens.
    """
    from sparseland.models.modality import capture_inputs

    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        shape = list(ids.shape) if isinstance(ids, Tensor) else None
        raise SparselandError(f"mminference: calibration needs token ids [B, N] with N >= 2, got {shape}")
    found: dict[int, list[list[HeadPlan]]] = {}
    inputs: dict[int, list[AttentionInputs]] = {}
    for x in capture_inputs(model, call):
        found.setdefault(x.layer, []).append(search_layer(x))
        if ids.shape[0] > 1:
            inputs.setdefault(x.layer, []).append(x)
    rows = []
    grow = max(1.0, TARGET_LENGTH / ids.shape[1])
    for layer in range(max(found) + 1):
        plans = _best_of(found[layer], inputs.get(layer, [])) if layer in found else []
        rows.append([plan.scaled(grow) for plan in plans])
    return rows


def _best_of(plans: list[list[HeadPlan]], inputs: list[AttentionInputs]) -> list[HeadPlan]:
    """Per head, of the plans that each row would choose, the one of least error over all rows."""
    if len(plans) == 1:
        return plans[0]
    errors = torch.stack(
        [sum((_output_error(x, row) for x in inputs), torch.zeros(len(row))) for row in plans]
    )
    best = errors.argmin(0).tolist()
    return [plans[row][head] for head, row in enumerate(best)]


def _output_error(x: AttentionInputs, plans: Sequence[HeadPlan]) -> Float[Tensor, " H"]:
    dense = attend(x.q, x.k, x.v, WindowPattern.dense(x.q.shape[2], x.k.shape[2]), scale=x.scale)
    layout = None if x.vision is None else layout_of(x.vision)
    # Another row's grid may meet no video here: in its place comes the budget for this length.
    share = min(1.0, x.k.shape[2] / TARGET_LENGTH)
    pattern = plan_pattern(x, layout, plans, without_grid=DEFAULT_SHAPE.scaled(share))
    out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
    return (out.float() - dense.float()).double().square().sum((0, 2, 3)).cpu()


@torch.no_grad()
def search_layer(x: AttentionInputs, sinks: int | None = None, window: int | None = None) -> list[HeadPlan]:
    """Every head's plan on one layer's inputs, at the cost of an A-shape of this size (by length)."""
    sizes = target_for(x.k.shape[2])
    searched = _LayerSearch(x, sinks or sizes[0], window or sizes[1])
    heads = x.q.shape[1]
    none = searched.best("all")
    plans = [[HeadPlan.plain(shape) for shape in none.shapes]]
    if searched.layout.mixed:
        found = {r: searched.best(r) for names in BOUNDARIES.values() for r in names if r != "all"}
        plans.append(
            [HeadPlan.by_query(found["text"].shapes[h], found["vision"].shapes[h]) for h in range(heads)]
        )
        plans.append(
            [HeadPlan.by_pair({r: found[r].shapes[h] for r in BOUNDARIES["2d"]}) for h in range(heads)]
        )
    chosen, least = plans[0], searched.error(plans[0], "all")
    for other in plans[1:]:
        error = searched.error(other, "all")
        better = least - error > torch.maximum(_MARGIN * least, _NEGLIGIBLE * searched.energy)
        chosen = [b if take else a for a, b, take in zip(chosen, other, better.tolist(), strict=True)]
        least = torch.where(better, error, least)
    return chosen


class _LayerSearch:
    """Candidates of one layer, region by region."""

    def __init__(self, x: AttentionInputs, sinks: int, window: int) -> None:
        self.x = x
        n = x.k.shape[2]
        vision = torch.zeros(n, dtype=torch.bool) if x.vision is None else x.vision
        self.layout: Layout = layout_of(vision)
        self.heads, self.n = x.q.shape[1], n
        self.dense = attend(x.q, x.k, x.v, WindowPattern.dense(x.q.shape[2], n), scale=x.scale).float()
        self.energy = self.dense.double().square().sum((0, 2, 3)).cpu()
        self.sinks, self.window = sinks, window
        self.index = MixedIndex(x, self.layout, ranked=True)
        self._best: dict[str, Candidate] = {}

    # ------------------------------------------------------------ costs

    def _rows(self, region: str) -> Int[Tensor, " n"]:
        """The region's queries, counted from the first of this call."""
        kind = region.partition("-")[0]
        return positions(self.layout, kind, self.x.offset, self.x.q.device) - self.x.offset

    def target(self, region: str) -> float:
        """Pairs that the A-shape of the target computes for the region's queries, shared among its keys."""
        b = region.partition("-")[2]
        at = self._rows(region).cpu() + self.x.offset + 1  # keys that each could see
        local = at.clamp(max=self.window)
        cost = float((local + (at - local).clamp(max=self.sinks)).sum())
        if not b:
            return cost
        seen = kind_mask(self.layout, b, torch.device("cpu")).long().cumsum(0)[at - 1]
        return cost * float(seen.sum() / at.sum())

    def _others(self, region: str) -> dict[str, Shape]:
        """Dense shapes for everything but the region (of the same boundary type)."""
        names = next(names for names in BOUNDARIES.values() if region in names)
        full = Shape("vertical-slash", self.n, self.n)
        return {name: full for name in names if name != region}

    def _pattern(self, region: str, shapes: Sequence[Shape], others: bool) -> Pattern:
        """All heads' pattern with these shapes in one region; the other regions dense or empty."""
        none = Shape("a-shape", 0, 0)
        rest = self._others(region) if others else dict.fromkeys(self._others(region), none)
        boundary = next(kind for kind, names in BOUNDARIES.items() if region in names)
        plans = [
            HeadPlan(boundary, tuple((r, shape if r == region else rest[r]) for r in BOUNDARIES[boundary]))
            for shape in shapes
        ]
        return plan_pattern(self.x, self.layout, plans, self.index)

    def pairs(self, region: str, shapes: Sequence[Shape]) -> Float[Tensor, " H"]:
        """Computed pairs of the region's queries per head, the base's part of the region among them."""
        pattern = self._pattern(region, shapes, others=False)
        pairs = pattern.pairs().double().expand(self.x.q.shape[0], self.heads).mean(0).cpu()
        if not isinstance(pattern, PartsPattern):
            return pairs
        return pairs - self._base_elsewhere(region)

    def _base_elsewhere(self, region: str) -> float:
        """Pairs of the base outside the region: of other queries, or with keys of the other kind."""
        a, _, b = region.partition("-")
        whole = float(WindowPattern(self.x.q.shape[2], self.n, SINKS, LOCAL).pairs())
        if a == "all":
            return 0.0
        at = self._rows(region).cpu() + self.x.offset
        kind = kind_mask(self.layout, b or "all", torch.device("cpu"))
        seen = torch.nn.functional.pad(kind.long().cumsum(0), (1, 0))
        near = (at - LOCAL + 1).clamp(min=0)
        inside = seen[at + 1] - seen[near] + seen[torch.minimum(near, torch.tensor(SINKS).expand_as(near))]
        return whole - float(inside.sum())

    def error(self, plans: Sequence[HeadPlan], region: str) -> Float[Tensor, " H"]:
        """Squared error of the region's queries' output per head under these plans."""
        return self._error(plan_pattern(self.x, self.layout, plans, self.index), region)

    def _error(self, pattern: Pattern, region: str) -> Float[Tensor, " H"]:
        out = attend(self.x.q, self.x.k, self.x.v, pattern, scale=self.x.scale).float()
        wrong = (out - self.dense).index_select(2, self._rows(region))
        return wrong.double().square().sum((0, 2, 3)).cpu()

    # ------------------------------------------------------- candidates

    def best(self, region: str) -> Candidate:
        """Per head the family of least error at the target's cost."""
        if region not in self._best:
            candidates = [self._candidate(region, make, most) for make, most in self._families(region)]
            fits = torch.stack([c.fits for c in candidates])
            error = torch.stack([c.error for c in candidates])
            error = error.masked_fill(~fits & fits.any(0), torch.inf)
            pick = error.argmin(0).tolist()
            shapes = [candidates[c].shapes[head] for head, c in enumerate(pick)]
            self._best[region] = Candidate(shapes, error.amin(0), fits.any(0))
        return self._best[region]

    def _families(self, region: str) -> list[tuple[Callable[[float], Shape], float]]:
        """Shapes by a size, and the largest size. The A-shape wins ties: it needs no probe."""
        n = self.n

        def scaled(shape: str, vertical: int, slash: int) -> tuple[Callable[[float], Shape], float]:
            def make(f: float) -> Shape:
                return Shape(shape, min(n, round(f * vertical)), min(n, round(f * slash)))

            return make, n / max(vertical, slash)

        families = [scaled("a-shape", self.sinks, self.window)]
        families += [scaled("vertical-slash", v, s) for v, s in VERTICAL_SLASH]
        if region in ("all", "vision", "vision-vision") and self.layout.segments:
            longest = max(sum(e - s for s, e in segment) for segment in self.layout.segments)
            families.append((lambda f: Shape("grid", lines=max(1, round(f))), longest / 3))
        return families

    def _candidate(self, region: str, make: Callable[[float], Shape], most: float) -> Candidate:
        """Per head the largest member of a family that costs no more than the target (or the smallest)."""
        cost = self.target(region)
        low = torch.zeros(self.heads, dtype=torch.float64)
        high = torch.full_like(low, most)

        def at(factor: Float[Tensor, " H"]) -> list[Shape]:
            return [make(f) for f in factor.tolist()]

        fits = self.pairs(region, at(high)) <= cost
        low = torch.where(fits, high, low)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            fits = self.pairs(region, at(middle)) <= cost
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        shapes = at(low)
        error = self._error(self._pattern(region, shapes, others=True), region)
        return Candidate(shapes, error, self.pairs(region, shapes) <= _OVER * cost)
