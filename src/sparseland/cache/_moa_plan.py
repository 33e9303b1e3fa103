"""MoA's plan: per layer and key head an elastic rule for how far back the head looks, and its JSON file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseland.errors import SparselandError
from sparseland.headfile import HeadFile


@dataclass(frozen=True, order=True)
class Rule:
    """A head's span in tokens at ``n`` tokens of input: ``alpha + beta * n``."""

    alpha: int
    beta: float

    @property
    def full(self) -> bool:
        """Whether the head sees everything, however long the input."""
        return self.beta >= 1 and self.alpha >= 0

    def blocks(self, n: int, block_size: int, *, up: bool = True) -> int:
        """The span at ``n`` tokens in blocks, the block of sinks among them; at least 2, at most all.

        ``up=False`` rounds down: what is certainly still held of an input that has grown since.
        """
        exact = (self.alpha + self.beta * n) / block_size
        blocks = math.ceil(exact - 1e-9) if up else math.floor(exact + 1e-9)
        return max(2, min(blocks, -(-n // block_size)))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"alpha": self.alpha, "beta": self.beta}

    @classmethod
    def of(cls, value: Any, where: str) -> Rule:
        """From :meth:`as_dict`'s form; ``where`` opens the error."""
        if not isinstance(value, dict) or set(value) != {"alpha", "beta"}:
            raise SparselandError(f"{where}: a rule is an alpha and a beta, got {value!r:.80}")
        alpha, beta = value["alpha"], value["beta"]
        if isinstance(alpha, bool) or not isinstance(alpha, int) or not -(2**31) < alpha < 2**31:
            raise SparselandError(f"{where}: alpha={alpha!r:.80} is not allowed; it must be a whole number")
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
            raise SparselandError(
                f"{where}: beta={beta!r:.80} is not allowed; it must be a number >= 0 and <= 1"
            )
        return cls(alpha, float(beta))


Plan = tuple[tuple[Rule, ...], ...]


def per_head(rules: Rule | Sequence[Rule], kv_heads: int | None = None) -> tuple[Rule, ...]:
    """Rules as one per key head.

    Raises:
        SparselandError: as many rules as the model has no key heads.
    """
    if isinstance(rules, Rule):
        return (rules,) * (kv_heads or 1)
    if kv_heads is not None and len(rules) != kv_heads:
        raise SparselandError(f"moa: the plan has {len(rules)} key heads and the model has {kv_heads}")
    return tuple(rules)


# Per layer and key head; ``Calibration.meta["rules"]`` has the same form.
PLAN = HeadFile("moa-plan", 1, "plan", "rules", "key head", Rule)
