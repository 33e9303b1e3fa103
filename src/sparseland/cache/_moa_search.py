"""MoA's calibration: profile at three lengths, optimise under the density, validate at an unseen length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jaxtyping import Int
from torch import Tensor, nn

from sparseland.cache._moa_optimise import Problem, candidates, pareto_plans
from sparseland.cache._moa_plan import Plan, Rule
from sparseland.cache._moa_profile import loss_with, profile
from sparseland.errors import SparselandError

if TYPE_CHECKING:
    from sparseland.cache.moa import MoA

# Blocks that the shortest profiled length has at least, if the block may shrink for it.
FEWEST_BLOCKS = 16
SHORTEST = 64  # tokens of calibration text
VALIDATED = 4  # plans that are run at the unseen length, the best predicted ones


def search(model: nn.Module, ids: Int[Tensor, "B N"], method: MoA) -> dict[str, Any]:
    """Rules and how they were found, as a calibration's ``meta``.

    Raises:
        SparselandError: the text is too short, or no plan fits the density.
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < SHORTEST:
        raise SparselandError(
            f"moa: calibration needs token ids [B, N] with N >= {SHORTEST}, got {list(ids.shape)}"
        )
    n = ids.shape[1]
    lengths, unseen = (n // 8, n // 4, n // 2), 3 * n // 4
    block = method.profile_block or min(method.block_size, max(4, _power_of_two(lengths[0] // FEWEST_BLOCKS)))
    importance = _importance(model, ids, lengths, block, method)
    rules = candidates(lengths, n, block)
    problem = Problem.of(importance, rules, lengths, n, block)
    plans = pareto_plans(problem, method.density)
    plans = sorted(plans, key=lambda plan: sum(problem.relative(plan)))[:VALIDATED]
    losses = [loss_with(model, ids[:, -unseen:], problem.plan(plan), block) for plan in plans]
    best = min(range(len(plans)), key=losses.__getitem__)
    chosen = problem.plan(plans[best])
    return {
        "rules": [[rule.as_dict() for rule in row] for row in chosen],
        "lengths": list(lengths),
        "unseen": unseen,
        "extension": n,
        "block": block,
        "density": problem.density(plans[best]),
        "predicted": problem.losses(plans[best]),
        "dense_loss": loss_with(model, ids[:, -unseen:], _dense(chosen), block),
        "validation": losses,
    }


# The last profile of each model: settings that differ in their density share it.
_PROFILES: WeakKeyDictionary[nn.Module, tuple[object, list[Tensor]]] = WeakKeyDictionary()


def _importance(
    model: nn.Module, ids: Int[Tensor, "B N"], lengths: tuple[int, ...], block: int, method: MoA
) -> list[Tensor]:
    """Block importances at each length; those of the last call if nothing has changed since."""
    text = (tuple(ids.shape), ids.cpu().contiguous().numpy().tobytes())
    settings = (text, lengths, block, method.supervision, method.effect)
    known = _PROFILES.get(model)
    if known is None or known[0] != (settings, _weights(model)):
        found = [profile(model, ids, n, block, method.supervision, method.effect) for n in lengths]
        known = _PROFILES[model] = ((settings, _weights(model)), found)
    return known[1]


def _weights(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes whenever a weight is written to or replaced."""
    return tuple((p.data_ptr(), p._version) for p in model.parameters())


def _dense(like: Plan) -> Plan:
    return tuple(tuple(Rule(0, 1.0) for _ in row) for row in like)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n.bit_length() - 1)
