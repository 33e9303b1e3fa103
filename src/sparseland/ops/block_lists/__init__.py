"""From selections (masks, columns, diagonals, weights above a threshold) to the lists that patterns hold.

One kernel walks over the blocks that a query block can see and writes down those that are selected: no map
of all blocks is stored where columns and diagonals make up the selection, nothing is sorted, and nothing
synchronises with the host. The lists' length is therefore a bound that is known beforehand, the number of
blocks that can be seen, unless the caller knows a smaller one; on the CPU it is what the longest list needs.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import Backend, choose, on_cpu, why_no_triton
from sparseland.ops._operator import operator
from sparseland.ops.block_lists import fast, reference

__all__ = ["block_lists", "column_lists", "list_pairs"]

_HERE = "sparseland.ops.block_lists"

BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", on_cpu),
    Backend("triton", f"{_HERE}.triton", why_no_triton),
    Backend("torch", f"{_HERE}.fast", lambda _: None),
    Backend("reference", f"{_HERE}.reference", lambda _: None),
)
_TRITON = BACKENDS[1]


def block_lists(
    n_queries: int,
    n_keys: int,
    block_size: int,
    *,
    mask: Bool[Tensor, "B H Mq Mk"] | None = None,
    weights: Float[Tensor, "B H Mq Mk"] | None = None,
    threshold: Float[Tensor, "B H"] | None = None,
    active: Bool[Tensor, "B H"] | None = None,
    bands: Bool[Tensor, "B H W"] | None = None,
    columns: Bool[Tensor, "B H Mk"] | None = None,
    unit: int | None = None,
    cap: int | None = None,
    backend: str | None = None,
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """Ascending lists of what is selected by any of the criteria, without what lies wholly in the future.

    Query block ``r`` begins at position ``offset + r * block_size``, in block ``R = r + offset //
    block_size`` of the keys. It lists entry ``c`` if one of these says so:

    - ``mask[b, h, r, c]``;
    - ``weights[b, h, r, c] >= threshold[b, h]`` (or either is NaN) in a head that is ``active``;
    - ``columns[b, h, c]``, for all queries;
    - ``bands[b, h, R - c + 1]``, a diagonal: entry 0 is the block right of R (a chunk that begins inside a
      block reaches it), 1 is R itself.

    Args:
        n_queries: queries, the last of the keys.
        n_keys: keys.
        block_size: queries per query block.
        mask: batch and heads may be 1; so may those of all other tensors.
        weights: float32; needs ``threshold``.
        threshold: float32.
        active: heads whose weights count (default: all); those of others are not read.
        bands: bool.
        columns: bool.
        unit: keys that an entry stands for, ``block_size`` unless given (1: lists of single keys).
        cap: longest list; what does not fit is dropped from the end. Default: all entries.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        Counts ``[B, H, Mq]`` and indices ``[B, H, Mq, L]``, int32. What lies behind a count is undefined.

    Raises:
        SparselandError: no criterion, shapes that don't fit, or a backend that can't run the input.
    """
    unit = block_size if unit is None else unit
    given = [t for t in (mask, weights, bands, columns) if t is not None]
    if not given:
        raise SparselandError("block_lists: nothing to list: pass mask, weights, bands or columns")
    rows, entries = -(-n_queries // block_size), -(-n_keys // unit)
    for name, t, tail in (
        ("mask", mask, (rows, entries)),
        ("weights", weights, (rows, entries)),
        ("columns", columns, (entries,)),
    ):
        if t is not None and tuple(t.shape[2:]) != tail:
            raise SparselandError(f"block_lists: {name} must be [B, H, *{tail}], got {list(t.shape)}")
    if (weights is None) != (threshold is None):
        raise SparselandError("block_lists: weights and threshold go together")
    if bands is not None and unit != block_size:
        raise SparselandError(f"block_lists: bands need entries of one block, got unit={unit}")
    length = entries if cap is None else min(cap, entries)
    chosen = choose("block_lists", BACKENDS, backend, given[0])
    tensors = (mask, weights, threshold, active, bands, columns)
    if chosen.name == "triton":
        counts, indices = _block_lists(*tensors, n_queries, n_keys, block_size, unit, length)
        return counts, indices
    if chosen.name == "reference":
        return reference.block_lists(*tensors, n_queries, n_keys, block_size, unit, length)
    return fast.block_lists(*tensors, n_queries, n_keys, block_size, unit, length)


def column_lists(
    positions: Int[Tensor, "B H V"],
    counts: Int[Tensor, "B H"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    *,
    mask: Bool[Tensor, "B H Mq Mk"] | None = None,
    bands: Bool[Tensor, "B H W"] | None = None,
    backend: str | None = None,
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """Per query block the key columns of its head that no block of the query block covers, and no future one.

    Args:
        positions: ascending key positions of each head, int32.
        counts: how many of them a head has.
        n_queries: queries, the last of the keys.
        n_keys: keys.
        block_size: queries, and keys, per block.
        mask: covered blocks; batch and heads may be 1.
        bands: covered diagonals of blocks, as in :func:`block_lists`.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        Counts ``[B, H, Mq]`` and indices ``[B, H, Mq, L]``, int32, ``L`` at most ``V``.

    Raises:
        SparselandError: the requested backend can't run the input.
    """
    chosen = choose("column_lists", BACKENDS, backend, positions)
    if chosen.name == "triton":
        found, indices = _column_lists(positions, counts, mask, bands, n_queries, n_keys, block_size)
        return found, indices
    if chosen.name == "reference":
        return reference.column_lists(positions, counts, mask, bands, n_queries, n_keys, block_size)
    return fast.column_lists(positions, counts, mask, bands, n_queries, n_keys, block_size)


def list_pairs(
    counts: Int[Tensor, "B H Mq"],
    indices: Int[Tensor, "B H Mq L"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    unit: int,
    *,
    backend: str | None = None,
) -> Int[Tensor, "B H"]:
    """Causal pairs of all listed entries of ``unit`` keys, per row and head (int64).

    Raises:
        SparselandError: the requested backend can't run the input.
    """
    chosen = choose("list_pairs", BACKENDS, backend, indices)
    if chosen.name == "triton":
        per_block: Tensor = _list_pairs(counts, indices, n_queries, n_keys, block_size, unit)
        return per_block.sum(-1)
    if chosen.name == "reference":
        return reference.list_pairs(counts, indices, n_queries, n_keys, block_size, unit)
    return fast.list_pairs(counts, indices, n_queries, n_keys, block_size, unit)


def _heads_of(*tensors: Tensor | None) -> tuple[int, int]:
    given = [t for t in tensors if t is not None]
    return max(t.shape[0] for t in given), max(t.shape[1] for t in given)


@operator("sparseland::block_lists")
def _block_lists(
    mask: Tensor | None,
    weights: Tensor | None,
    threshold: Tensor | None,
    active: Tensor | None,
    bands: Tensor | None,
    columns: Tensor | None,
    n_queries: int,
    n_keys: int,
    block_size: int,
    unit: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    heads = _heads_of(mask, weights, threshold, active, bands, columns)
    counts, indices = _TRITON.load().block_lists(
        mask, weights, threshold, active, bands, columns, *heads, n_queries, n_keys, block_size, unit, length
    )
    return counts, indices


@_block_lists.register_fake
def _(
    mask: Tensor | None,
    weights: Tensor | None,
    threshold: Tensor | None,
    active: Tensor | None,
    bands: Tensor | None,
    columns: Tensor | None,
    n_queries: int,
    n_keys: int,
    block_size: int,
    unit: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    some = next(t for t in (mask, weights, bands, columns) if t is not None)
    shape = (*_heads_of(mask, weights, threshold, active, bands, columns), -(-n_queries // block_size))
    return some.new_empty(shape, dtype=torch.int32), some.new_empty((*shape, length), dtype=torch.int32)


@operator("sparseland::column_lists")
def _column_lists(
    positions: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    bands: Tensor | None,
    n_queries: int,
    n_keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    heads = _heads_of(positions, mask, bands)
    sizes = (*heads, n_queries, n_keys, block_size)
    found, indices = _TRITON.load().column_lists(positions, counts, mask, bands, *sizes)
    return found, indices


@_column_lists.register_fake
def _(
    positions: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    bands: Tensor | None,
    n_queries: int,
    n_keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    shape = (*_heads_of(positions, mask, bands), -(-n_queries // block_size))
    lists = positions.new_empty((*shape, positions.shape[-1]), dtype=torch.int32)
    return positions.new_empty(shape, dtype=torch.int32), lists


@operator("sparseland::list_pairs")
def _list_pairs(
    counts: Tensor, indices: Tensor, n_queries: int, n_keys: int, block_size: int, unit: int
) -> Tensor:
    pairs: Tensor = _TRITON.load().list_pairs(counts, indices, n_queries, n_keys, block_size, unit)
    return pairs


@_list_pairs.register_fake
def _(counts: Tensor, indices: Tensor, n_queries: int, n_keys: int, block_size: int, unit: int) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.int64)
