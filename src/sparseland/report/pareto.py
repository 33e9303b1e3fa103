"""The Pareto front: the configurations that no other beats in both of two measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Measure = str | Callable[[Row], float | None]


def number(row: Row, key: str) -> float | None:
    """``row[key]`` as a finite float, or None where it is missing, null, or not finite."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def ratio(row: Row, over: str, under: str) -> float | None:
    """``row[over] / row[under]``, or None."""
    top, bottom = number(row, over), number(row, under)
    return None if top is None or not bottom else top / bottom


def loss_change(row: Row) -> float | None:
    """Relative change of the loss on a prompt against dense (0.01 = 1 % worse)."""
    change = ratio(row, "loss", "dense_loss")
    return None if change is None else change - 1


def decode_loss_change(row: Row) -> float | None:
    """Relative change of the loss of decoding steps against dense (0.01 = 1 % worse)."""
    change = ratio(row, "decode_loss", "dense_decode_loss")
    return None if change is None else change - 1


def pareto(rows: Sequence[Row], x: Measure, y: Measure) -> set[int]:
    """Indices of the rows on the front; smaller is better in ``x`` and in ``y``.

    A row is on it if no other is at least as good in both and better in one; equal rows stand together.
    Failed rows and rows that lack a number are never on it.

    Args:
        rows: measurement rows, in any order.
        x, y: a key of the rows, or a function of a row (None: the row has no such number).
    """
    points = []
    for i, row in enumerate(rows):
        if row.get("status", "ok") != "ok":
            continue
        a = number(row, x) if isinstance(x, str) else x(row)
        b = number(row, y) if isinstance(y, str) else y(row)
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b):
            points.append((a, b, i))
    front: set[int] = set()
    last: tuple[float, float] | None = None
    for a, b, i in sorted(points):
        if last is None or b < last[1] or (a, b) == last:
            front.add(i)
            last = (a, b)
    return front


def acts_on_prompt(row: Row) -> bool:
    """Whether the configuration changes what a prompt computes: only then is its prompt time its own."""
    density = number(row, "density")
    return (density is not None and density < 1) or loss_change(row) not in (0.0, None)


def acts_on_decoding(row: Row) -> bool:
    """Whether the configuration changes a decoding step: what it reads, what is stored, or the layers."""
    shares = (number(row, name) for name in ("decode_density", "neuron_density"))
    if any(share is not None and share < 1 for share in shares):
        return True
    if number(row, "cache_bytes") != number(row, "dense_cache_bytes"):
        return True
    # The loss of the prompt moved although attention is whole: the layers themselves are sparse.
    return acts_on_prompt(row) and number(row, "density") in (1, None)


def _competes(row: Row, acts: Callable[[Row], bool]) -> bool:
    return row.get("role") == "dense" or (row.get("role") != "control" and acts(row))


def prompt_front(rows: Sequence[Row], x: Measure = "prefill_s") -> set[int]:
    """The front of loss change against prompt time, each length by itself.

    Controls don't compete (they are yardsticks), nor do configurations that leave the prompt dense: among
    those only timing noise would choose. A loss below dense's counts as dense's.
    """
    return _front_per_length(rows, x, loss_change, acts_on_prompt)


def decoding_front(rows: Sequence[Row], x: Measure = "decode_ms") -> set[int]:
    """The front of decoding loss change against time a token, each length by itself."""
    return _front_per_length(rows, x, decode_loss_change, acts_on_decoding)


def _front_per_length(
    rows: Sequence[Row], x: Measure, y: Callable[[Row], float | None], acts: Callable[[Row], bool]
) -> set[int]:
    def harm(row: Row) -> float | None:
        # A loss below dense's is luck on this text: no reason to call a slower configuration better.
        change = y(row)
        return None if change is None else max(change, 0.0)

    front: set[int] = set()
    for length in {row.get("length") for row in rows}:
        of_length = [i for i, row in enumerate(rows) if row.get("length") == length and _competes(row, acts)]
        front |= {of_length[j] for j in pareto([rows[i] for i in of_length], x, harm)}
    return front
