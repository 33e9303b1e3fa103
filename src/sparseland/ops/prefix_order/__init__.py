"""Order statistics of all prefixes of a sequence: the n-th smallest of its first r values, for every r.

Wavelet matrix (Claude, Navarro and Ordóñez 2015): level by level, from the highest bit down, the sequence is
split stably by one bit, and each question follows the side that holds its answer. Nothing synchronises with
the host.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import Backend, choose, on_cpu, why_no_triton
from sparseland.ops._operator import operator
from sparseland.ops.prefix_order import fast, reference

__all__ = ["nth_of_prefixes"]

_HERE = "sparseland.ops.prefix_order"

BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", on_cpu),
    Backend("triton", f"{_HERE}.triton", why_no_triton),
    Backend("torch", f"{_HERE}.fast", lambda _: None),
    Backend("reference", f"{_HERE}.reference", lambda _: None),
)
_TRITON = BACKENDS[1]


def nth_of_prefixes(
    values: Int[Tensor, "*batch n"], nth: int, *, backend: str | None = None
) -> Int[Tensor, "*batch n"]:
    """For each r, the ``nth`` smallest (from 0) of ``values[..., :r]``.

    Args:
        values: int64 rows of numbers from 0 to n - 1, n below 2^31.
        nth: which one, 0 or more.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        int64 as ``values``; undefined where a prefix holds no more than ``nth`` values (r <= nth).

    Raises:
        SparselandError: not int64, ``nth`` is negative, or the requested backend can't run the input.
    """
    if values.dim() < 1 or values.dtype != torch.int64:
        raise SparselandError(
            f"nth_of_prefixes: rows of int64 are needed, got {values.dtype} {list(values.shape)}"
        )
    if nth < 0:
        raise SparselandError(f"nth_of_prefixes: nth={nth}; it must be 0 or more")
    chosen = choose("nth_of_prefixes", BACKENDS, backend, values)
    if chosen.name == "triton":
        found: Tensor = _nth_of_prefixes(values, nth)
        return found
    if chosen.name == "reference":
        return reference.nth_of_prefixes(values, nth)
    return fast.nth_of_prefixes(values, nth)


@operator("sparseland::nth_of_prefixes")
def _nth_of_prefixes(values: Tensor, nth: int) -> Tensor:
    found: Tensor = _TRITON.load().nth_of_prefixes(values, nth)
    return found


@_nth_of_prefixes.register_fake
def _(values: Tensor, nth: int) -> Tensor:
    return values.new_empty(values.shape)
