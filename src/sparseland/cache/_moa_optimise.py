"""MoA's optimiser (section 4.2 of the paper): which rule each head gets, as a mixed-integer programme.

``x[head, rule]`` is 1 where the head has the rule, ``y[layer, rule]`` where any of the layer's heads has it::

    min  sum loss(head, rule, N_p) x          for one length N_p, the others' losses bounded (epsilon)
    s.t. sum_rule x[head, rule] = 1           x[head, rule] <= y[layer, rule],  sum_rule y[layer, rule] <= 2
         0.9 density <= mean cost(N) <= density   at every profiled length and at the longest target length
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparseland.cache._moa_plan import Plan, Rule
from sparseland.errors import SparselandError

INTERVALS = 4  # per other length, steps of its loss's range
RULES_PER_LAYER = 2
USED = 0.9  # part of the density that a plan must use
_GAP, _SECONDS = 1e-3, 10.0  # a solution this near to the best is good enough

Choice = tuple[int, ...]  # per head (layer by layer) the number of its rule


def candidates(lengths: Sequence[int], target: int, block: int) -> list[Rule]:
    """Rules to choose from: alpha in steps of half the shortest length, beta in eighths.

    Kept are those with a span above 0 at the shortest length and of no more than N at the longest profiled
    and at the target length; of those with equal spans (in blocks) at all these lengths, the first.
    """
    step = max(1, min(lengths) // 2)
    found: dict[tuple[int, ...], Rule] = {}
    # Full attention first, then few tokens before many: of equal ones the plainest is kept.
    grid = product([e / 8 for e in range(9)], range(-min(lengths), max(lengths) + 1, step))
    for beta, alpha in sorted(grid, key=lambda r: (r != (1.0, 0), abs(r[1]))):
        at = [alpha + beta * n for n in (min(lengths), max(lengths), target)]
        if at[0] <= 0 or at[1] > max(lengths) or at[2] > target:
            continue
        rule = Rule(alpha, beta)
        spans = tuple(rule.blocks(n, block) for n in (*lengths, target))
        found.setdefault(spans, rule)
    return sorted(found.values())


@dataclass
class Problem:
    """What is chosen among, and what it costs.

    Args:
        rules: the candidates, R of them.
        loss: predicted loss ``[P, heads, R]`` at each profiled length.
        cost: span over length ``[P + 1, R]``, the last at the target length.
        heads: key heads of each layer.
    """

    rules: list[Rule]
    loss: np.ndarray[Any, Any]
    cost: np.ndarray[Any, Any]
    heads: list[int]

    @classmethod
    def of(
        cls,
        importance: Sequence[Float[Tensor, "L H n n"]],
        rules: list[Rule],
        lengths: Sequence[int],
        target: int,
        block: int,
    ) -> Problem:
        """From block importances at each length."""
        loss = [
            outside(e, [rule.blocks(n, block) for rule in rules]).flatten(0, 1).double().numpy()
            for e, n in zip(importance, lengths, strict=True)
        ]
        cost = [[rule.blocks(n, block) / -(-n // block) for rule in rules] for n in (*lengths, target)]
        layers, heads = importance[0].shape[:2]
        return cls(rules, np.stack(loss), np.array(cost), [heads] * layers)

    def losses(self, choice: Choice) -> list[float]:
        """Predicted loss at each profiled length."""
        return [float(x) for x in self.loss[:, range(len(choice)), list(choice)].sum(1)]

    def relative(self, choice: Choice) -> list[float]:
        """The same as parts of what the worst choice of every head would lose."""
        worst = self.loss.max(2).sum(1)
        return [x / w if w else 0.0 for x, w in zip(self.losses(choice), worst, strict=True)]

    def density(self, choice: Choice) -> list[float]:
        """Mean cost at each profiled length and at the target length."""
        return [float(x) for x in self.cost[:, list(choice)].mean(1)]

    def plan(self, choice: Choice) -> Plan:
        """The choice as rules per layer."""
        flat = [self.rules[r] for r in choice]
        rows, at = [], 0
        for n in self.heads:
            rows.append(tuple(flat[at : at + n]))
            at += n
        return tuple(rows)


def outside(importance: Float[Tensor, "L H n n"], spans: Sequence[int]) -> Float[Tensor, "L H R"]:
    """Importance that each span (in blocks, one of them sinks) leaves out.

    Kept are key block 0 and the ``span - 1`` blocks that end at the query's own.
    """
    n = importance.shape[-1]
    rest = importance[..., 1:]  # without the sinks
    # Sum along each diagonal: distance 0 … n - 2 in blocks.
    along = [rest.diagonal(-1 - o, -2, -1).sum(-1) for o in range(n - 1)]
    diagonals = torch.stack(along, -1) if along else importance.new_zeros(*importance.shape[:2], 0)
    beyond = diagonals.flip(-1).cumsum(-1).flip(-1)
    beyond = torch.cat([beyond, beyond.new_zeros(*beyond.shape[:2], 1)], -1)
    return beyond[..., [min(max(0, s - 1), n - 1) for s in spans]]


def solve(
    problem: Problem,
    density: float,
    primary: int,
    limits: Sequence[float] | None = None,
    *,
    used: float = USED,
    gap: float = _GAP,
) -> Choice | None:
    """The plan of least predicted loss at length number ``primary``; None if none fits.

    Args:
        density: bound on the mean cost at every length.
        limits: bounds on the predicted loss at each length (inf: none).
        used: part of ``density`` that must be used at every length.
        gap: a solution within this part of the best is good enough.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    n_heads, n_rules = problem.loss.shape[1:]
    n_layers = len(problem.heads)
    layer = np.repeat(np.arange(n_layers), problem.heads)
    x = np.arange(n_heads * n_rules).reshape(n_heads, n_rules)
    y = n_heads * n_rules + np.arange(n_layers * n_rules).reshape(n_layers, n_rules)
    n = x.size + y.size

    def constraint(rows: Any, columns: Any, values: Any, low: Any, high: Any) -> LinearConstraint:
        shape = (int(np.max(rows)) + 1, n)
        return LinearConstraint(coo_array((values, (rows, columns)), shape).tocsc(), low, high)

    scale = np.maximum(problem.loss.max(2).sum(1), 1e-300)  # losses as parts of the worst
    heads = np.repeat(np.arange(n_heads), n_rules)
    constraints = [
        constraint(heads, x.ravel(), np.ones(x.size), 1, 1),
        constraint(
            np.tile(np.arange(x.size), 2), np.concatenate([x.ravel(), y[layer].ravel()]),
            np.repeat([1.0, -1.0], x.size), -np.inf, 0,
        ),
        constraint(np.repeat(np.arange(n_layers), n_rules), y.ravel(), np.ones(y.size), 0, RULES_PER_LAYER),
    ]  # fmt: skip
    for cost in problem.cost:
        mean = np.tile(cost, n_heads) / n_heads
        at_least = min(used * density, float(cost.max()))
        constraints.append(constraint(np.zeros(x.size, int), x.ravel(), mean, at_least, density + 1e-9))
    for p, limit in enumerate(limits or ()):
        if p != primary and math.isfinite(limit):
            share = problem.loss[p].ravel() / scale[p]
            constraints.append(
                constraint(np.zeros(x.size, int), x.ravel(), share, -np.inf, limit / scale[p] + 1e-9)
            )
    objective = np.concatenate([problem.loss[primary].ravel() / scale[primary], np.zeros(y.size)])
    result = milp(
        objective,
        integrality=np.concatenate([np.ones(x.size), np.zeros(y.size)]),  # binary x make y follow
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": _SECONDS},
    )
    if result.x is None:
        return None
    return tuple(int(r) for r in result.x[: x.size].reshape(n_heads, n_rules).argmax(1))


def pareto_plans(problem: Problem, density: float) -> list[Choice]:
    """Plans that no other beats at all lengths, by the epsilon-constraint method.

    Each length in turn is minimised, the others' losses confined to the upper ends of four intervals of
    their range.

    Raises:
        SparselandError: no plan fits the density.
    """
    lengths = len(problem.loss)
    used = USED
    best = [solve(problem, density, p, used=used) for p in range(lengths)]
    if any(choice is None for choice in best):  # few and coarse rules may leave nothing between the bounds
        used = 0.0
        best = [solve(problem, density, p, used=used) for p in range(lengths)]
    found = [choice for choice in best if choice is not None]
    if len(found) < lengths:
        least = max(float(cost.min()) for cost in problem.cost)
        raise SparselandError(
            f"moa: no plan has density {density}; at these lengths the least is {least:.3g}"
        )
    table = np.array([problem.losses(choice) for choice in found])
    low, high = table.min(0), table.max(0)
    steps = [
        [math.inf] + [low[p] + (high[p] - low[p]) * i / INTERVALS for i in reversed(range(1, INTERVALS))]
        for p in range(lengths)
    ]
    for primary in range(lengths):
        optimal = [found[primary]]  # each the best under the limits it was found with, loose ones first
        for limits in product(*([math.inf] if p == primary else steps[p] for p in range(lengths))):
            if any(_within(problem.losses(choice), limits) for choice in optimal):
                continue  # the best under looser limits keeps these too
            choice = solve(problem, density, primary, limits, used=used)
            if choice is not None:
                optimal.append(choice)
        found += optimal
    return non_dominated(problem, found)


def _within(losses: Sequence[float], limits: Sequence[float]) -> bool:
    return all(loss <= limit for loss, limit in zip(losses, limits, strict=True))


def non_dominated(problem: Problem, choices: Sequence[Choice]) -> list[Choice]:
    """Those that no other is at least as good as at all lengths and better at one; equal ones once."""
    kept: list[tuple[Choice, list[float]]] = []
    rows = [(choice, problem.losses(choice)) for choice in dict.fromkeys(choices)]
    for choice, losses in rows:
        beaten = any(
            all(a <= b for a, b in zip(other, losses, strict=True)) and other != losses for _, other in rows
        )
        if not beaten and losses not in [known for _, known in kept]:
            kept.append((choice, losses))
    return [choice for choice, _ in kept]
