"""MoA's plan: per layer and key head an elastic rule for how far back the head looks, and its JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparseland.errors import SparselandError

FORMAT = "moa-plan"
VERSION = 1
_MAX_BYTES = 64 * 2**20


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


def read_rules(value: Any, where: str) -> Plan:
    """A list over layers of lists over key heads, checked.

    Raises:
        SparselandError: not that shape, or a rule that is not allowed.
    """
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        raise SparselandError(
            f'{where}: "rules" must be a non-empty list over layers of lists over key heads'
        )
    return tuple(
        tuple(Rule.of(rule, f"{where}: layer {i}, key head {j}") for j, rule in enumerate(row))
        for i, row in enumerate(value)
    )


def save_plan(path: str | Path, rules: Sequence[Sequence[Rule | dict[str, Any]]]) -> Path:
    """Write rules (``Calibration.meta["rules"]``) to a JSON file that ``plan=`` reads.

    Raises:
        SparselandError: the rules are malformed, or the file can't be written.
    """
    path = Path(path)
    rows = [[r.as_dict() if isinstance(r, Rule) else r for r in row] for row in rules]
    read_rules(rows, "this plan")
    try:
        path.write_text(json.dumps({"format": FORMAT, "version": VERSION, "rules": rows}, indent=1) + "\n")
    except OSError as cause:
        raise SparselandError(f"can't write the plan {path}: {cause.strerror or cause}") from cause
    return path


def load_plan(path: str | Path) -> Plan:
    """Read what :func:`save_plan` wrote; read again only when the file has changed.

    Raises:
        SparselandError: not there, not JSON, of another format or a newer version, or malformed.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as cause:
        raise SparselandError(f"can't read the plan {path}: {cause.strerror or cause}") from cause
    return _load(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _load(path: Path, changed: int, size: int) -> Plan:
    if size > _MAX_BYTES:
        raise SparselandError(f"{path} has {size} bytes; a plan has at most {_MAX_BYTES}")
    try:
        data = json.loads(path.read_bytes())
    except OSError as cause:
        raise SparselandError(f"can't read the plan {path}: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise SparselandError(f"{path} is not a plan: {cause}") from cause
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SparselandError(f'{path} is not a plan: it does not say "format": "{FORMAT}"')
    version = data.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise SparselandError(f"{path} has version {version!r:.80}; this sparseland reads {VERSION}")
    return read_rules(data.get("rules"), str(path))
