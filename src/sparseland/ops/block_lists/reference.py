"""The lists by loops and definitions: slow, for small tests."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.ops.block_lists.fast import last_positions


def block_lists(
    mask: Bool[Tensor, "b h Mq Mk"] | None,
    weights: Float[Tensor, "b h Mq Mk"] | None,
    threshold: Float[Tensor, "b h"] | None,
    active: Bool[Tensor, "b h"] | None,
    bands: Bool[Tensor, "b h W"] | None,
    columns: Bool[Tensor, "b h Mk"] | None,
    n_queries: int,
    n_keys: int,
    block_size: int,
    unit: int,
    length: int,
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """One entry after the other."""

    def listed(b: int, h: int, r: int, c: int) -> bool:
        band = r + (n_keys - n_queries) // block_size - c + 1
        if weights is not None and threshold is not None and (active is None or _at(active, b, h)):
            low = _at(weights, b, h)[r, c] < _at(threshold, b, h)
            if not low:
                return True
        return bool(
            (mask is not None and _at(mask, b, h)[r, c])
            or (columns is not None and _at(columns, b, h)[c])
            or (bands is not None and 0 <= band < bands.shape[-1] and _at(bands, b, h)[band])
        )

    given = [t for t in (mask, weights, threshold, active, bands, columns) if t is not None]
    batch, heads = (max(t.shape[d] for t in given) for d in (0, 1))
    last = last_positions(n_queries, n_keys, block_size, "cpu").tolist()
    lists = [
        [[[c for c in range(last[r] // unit + 1) if listed(b, h, r, c)][:length] for r in range(len(last))]
         for h in range(heads)] for b in range(batch)
    ]  # fmt: skip
    return _padded(lists, given[0].device)


def column_lists(
    positions: Int[Tensor, "b h V"],
    counts: Int[Tensor, "b h"],
    mask: Bool[Tensor, "b h Mq Mk"] | None,
    bands: Bool[Tensor, "b h W"] | None,
    n_queries: int,
    n_keys: int,
    block_size: int,
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """One column after the other."""

    def covered(b: int, h: int, r: int, c: int) -> bool:
        band = r + (n_keys - n_queries) // block_size - c + 1
        return bool(
            (mask is not None and _at(mask, b, h)[r, c])
            or (bands is not None and 0 <= band < bands.shape[-1] and _at(bands, b, h)[band])
        )

    given = [t for t in (positions, mask, bands) if t is not None]
    batch, heads = (max(t.shape[d] for t in given) for d in (0, 1))
    last = last_positions(n_queries, n_keys, block_size, "cpu").tolist()
    lists: list[list[list[list[int]]]] = []
    for b in range(batch):
        lists.append([])
        for h in range(heads):
            own = _at(positions, b, h)[: int(_at(counts, b, h))].tolist()
            lists[-1].append(
                [[p for p in own if p <= last[r] and not covered(b, h, r, p // block_size)]
                 for r in range(len(last))]
            )  # fmt: skip
    return _padded(lists, positions.device)


def list_pairs(
    counts: Int[Tensor, "B H Mq"],
    indices: Int[Tensor, "B H Mq L"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    unit: int,
) -> Int[Tensor, "B H"]:
    """Query by query, key by key."""
    offset = n_keys - n_queries
    total = torch.zeros(counts.shape[:2], dtype=torch.int64, device=counts.device)
    for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        keys = [
            key
            for entry in indices[b, h, r, : counts[b, h, r]].tolist()
            for key in range(entry * unit, min((entry + 1) * unit, n_keys))
        ]
        for query in range(offset + r * block_size, min(offset + (r + 1) * block_size, n_keys)):
            total[b, h] += sum(key <= query for key in keys)
    return total


def _at(x: Tensor, b: int, h: int) -> Tensor:
    return x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]


def _padded(lists: list[list[list[list[int]]]], device: torch.device) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([[[len(row) for row in head] for head in rows] for rows in lists])
    longest = int(counts.max()) if counts.numel() else 0
    padded = [[[row + [0] * (longest - len(row)) for row in head] for head in rows] for rows in lists]
    indices = torch.tensor(padded, dtype=torch.int32).reshape(*counts.shape, longest)
    return counts.to(device, torch.int32), indices.to(device)
