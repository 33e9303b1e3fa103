"""The largest values of rows: so many of them, or as many as reach a given sum.

Selections need the set, not the order, so rows are not sorted on a GPU: the value where the set ends is found
by its bits (radix selection), and then what lies above it. Nothing synchronises with the host there.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import LONGEST_SIDE, Backend, choose, module_of, on_cpu, why_no_triton
from sparseland.ops._operator import operator

__all__ = ["covering", "top_indices", "top_mask"]

_HERE = "sparseland.ops.top_values"
# How far a row's sum may reach: sums are fixed-point numbers in the kernels, 2^-40 of a unit exact.
LARGEST_SUM = 2.0**20
# A side of a grid of programs that look at 4096 numbers each.
LONGEST_ROW = LONGEST_SIDE * 4096

BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", on_cpu),
    # Grids number rows by their first side: there may be any number of them.
    Backend("triton", f"{_HERE}.triton", lambda x: why_no_triton(x, heads=0)),
    Backend("torch", f"{_HERE}.fast", lambda _: None),
    Backend("reference", f"{_HERE}.reference", lambda _: None),
)


def top_mask(
    values: Float[Tensor, "*batch n"],
    count: Int[Tensor, "*batch"],
    forced: int = 0,
    *,
    backend: str | None = None,
) -> Bool[Tensor, "*batch n"]:
    """Marks the ``count`` largest values of each row, ties to the earlier place.

    Args:
        values: float32 rows; NaN counts as larger than any number.
        count: how many to mark per row, at most all; broadcasts against the rows.
        forced: the first so many places come before all others, in their order.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[*batch, n]`` bool.

    Raises:
        SparselandError: not float32, a row of more than 268,431,360 numbers, ``forced`` is negative, or the
            requested backend can't run the input.
    """
    _check("top_mask", values)
    if forced < 0:
        raise SparselandError(f"top_mask: forced={forced}; it must be 0 or more")
    chosen = choose("top_mask", BACKENDS, backend, values)
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape, dtype=torch.bool)
    count = count.expand(values.shape[:-1])
    return _top_mask(values, count, forced, chosen.name)


def top_indices(
    values: Float[Tensor, "*batch n"],
    most: int,
    count: Int[Tensor, "*batch"] | None = None,
    *,
    backend: str | None = None,
) -> Int[Tensor, "*batch most"]:
    """The places of the ``most`` largest values of each row, ascending; of equal ones, the earlier places.

    Args:
        values: float32 rows; NaN counts as larger than any number.
        most: places per row.
        count: where a row wants fewer; broadcasts against the rows.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[*batch, most]`` int32; -1 behind the last of ``count``.

    Raises:
        SparselandError: not float32, a row of more than 268,431,360 numbers, ``most`` is negative or more
            than a row has, or the requested backend can't run the input.
    """
    _check("top_indices", values)
    if not 0 <= most <= values.shape[-1]:
        raise SparselandError(f"top_indices: most={most}; a row of {values.shape[-1]} has 0 to so many")
    chosen = choose("top_indices", BACKENDS, backend, values)
    if not most or not values.numel():
        return values.new_empty((*values.shape[:-1], most), dtype=torch.int32)
    if count is not None:
        count = count.expand(values.shape[:-1])
    return _top_indices(values, most, count, chosen.name)


def covering(
    weights: Float[Tensor, "*batch n"],
    mass: float,
    active: Bool[Tensor, "*batch"] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """Where each row's largest weights, taken one by one, first exceed ``mass`` together.

    Args:
        weights: float32 rows of numbers >= 0 whose sums are below 2^20.
        mass: what to exceed.
        active: rows that are looked at; the results of others are 0 (no work is done for them on a GPU).
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        The weight with which a row's sum exceeds ``mass`` (float32), and how many were taken (int64). A row
        that never does, or that holds a number which is not finite, gives 0 and ``n + 1``: all.

    Raises:
        SparselandError: not float32, a row of more than 268,431,360 numbers, or the requested backend can't
            run the input.
    """
    _check("covering", weights)
    chosen = choose("covering", BACKENDS, backend, weights)
    # A graph holds no infinity.
    return _covering(weights, min(mass, 2 * LARGEST_SUM), active, chosen.name)


def _check(op: str, x: Tensor) -> None:
    if x.dim() < 1 or x.dtype != torch.float32:
        raise SparselandError(f"{op}: rows of float32 numbers are needed, got {x.dtype} {list(x.shape)}")
    if x.shape[-1] > LONGEST_ROW:
        raise SparselandError(f"{op}: a row may have up to {LONGEST_ROW} numbers, got {x.shape[-1]}")


@operator("sparseland::top_mask")
def _top_mask(values: Tensor, count: Tensor, forced: int, backend: str) -> Tensor:
    mask: Tensor = module_of(BACKENDS, backend).top_mask(values, count, forced)
    return mask


@_top_mask.register_fake
def _(values: Tensor, count: Tensor, forced: int, backend: str) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.bool)


@operator("sparseland::top_indices")
def _top_indices(values: Tensor, most: int, count: Tensor | None, backend: str) -> Tensor:
    places: Tensor = module_of(BACKENDS, backend).top_indices(values, most, count)
    return places


@_top_indices.register_fake
def _(values: Tensor, most: int, count: Tensor | None, backend: str) -> Tensor:
    return values.new_empty((*values.shape[:-1], most), dtype=torch.int32)


@operator("sparseland::covering")
def _covering(weights: Tensor, mass: float, active: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    value, taken = module_of(BACKENDS, backend).covering(weights, mass, active)
    return value, taken


@_covering.register_fake
def _(weights: Tensor, mass: float, active: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    rows = weights.shape[:-1]
    return weights.new_empty(rows), weights.new_empty(rows, dtype=torch.int64)
