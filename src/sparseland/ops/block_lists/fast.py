"""The lists in whole-tensor PyTorch: trimmed to the longest on the CPU, of static length elsewhere."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.ops._dispatch import may_ask
from sparseland.patterns import pairs_from

# Entries of lists that are looked at together when pairs are counted.
_COUNTED = 1 << 24


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
    """The map of all entries, then its True places."""
    found = mask
    if bands is not None:
        found = _either(found, band_mask(bands, n_queries, n_keys, block_size))
    if columns is not None:
        found = _either(found, columns[:, :, None])
    if weights is not None:
        assert threshold is not None
        heavy = ~(weights < threshold[..., None, None])
        found = _either(found, heavy if active is None else heavy & active[..., None, None])
    assert found is not None
    entry = torch.arange(-(-n_keys // unit), device=found.device)
    found = found & (entry <= last_positions(n_queries, n_keys, block_size, found.device)[:, None] // unit)
    return compact(found, length)


def column_lists(
    positions: Int[Tensor, "b h V"],
    counts: Int[Tensor, "b h"],
    mask: Bool[Tensor, "b h Mq Mk"] | None,
    bands: Bool[Tensor, "b h W"] | None,
    n_queries: int,
    n_keys: int,
    block_size: int,
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """All columns of all query blocks, then those that stay."""
    device = positions.device
    listed = torch.arange(positions.shape[-1], device=device) < counts[..., None]
    place = torch.where(listed, positions, n_keys)[:, :, None]
    keep = place <= last_positions(n_queries, n_keys, block_size, device)[:, None]
    block = (place.long() // block_size).clamp(max=-(-n_keys // block_size) - 1)
    if bands is not None:
        band = _rows(n_queries, n_keys, block_size, device)[:, None] - block + 1
        keep = keep & ~bands.gather(-1, band.clamp(0, bands.shape[-1] - 1).flatten(-2)).view(band.shape)
    if mask is not None:
        batch, heads = (max(mask.shape[d], block.shape[d]) for d in (0, 1))
        rows = (batch, heads, mask.shape[2], -1)
        keep = keep & ~mask.expand(rows).gather(-1, block.expand(rows))
    return compact(keep, positions.shape[-1], place.to(torch.int32).expand(keep.shape))


def list_pairs(
    counts: Int[Tensor, "B H Mq"],
    indices: Int[Tensor, "B H Mq L"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    unit: int,
) -> Int[Tensor, "B H"]:
    """Some query blocks at a time."""
    start = torch.arange(counts.shape[-1], device=counts.device) * block_size + (n_keys - n_queries)
    end = (start + block_size).clamp(max=n_keys)
    place = torch.arange(indices.shape[-1], device=counts.device)
    total = torch.zeros(counts.shape[:2], dtype=torch.int64, device=counts.device)
    step = max(1, _COUNTED // max(1, counts.shape[0] * counts.shape[1] * indices.shape[-1]))
    for i in range(0, counts.shape[-1], step):
        part = slice(i, i + step)
        rows, first = (start[part, None], end[part, None]), indices[:, :, part]
        if unit == 1:  # one key: the queries at or after it
            pairs = (rows[1] - torch.maximum(first, rows[0])).clamp_(min=0)
        else:
            first = first.long() * unit
            pairs = pairs_from(first, *rows) - pairs_from((first + unit).clamp(max=n_keys), *rows)
        total += (pairs * (place < counts[:, :, part, None])).sum((-1, -2))
    return total


def band_mask(
    bands: Bool[Tensor, "b h W"], n_queries: int, n_keys: int, block_size: int
) -> Bool[Tensor, "b h Mq Mk"]:
    """The chosen diagonals as a map of blocks."""
    column = torch.arange(-(-n_keys // block_size), device=bands.device)
    band = _rows(n_queries, n_keys, block_size, bands.device)[:, None] - column + 1
    outside = bands.shape[-1]  # an extra entry: "no such diagonal"
    padded = torch.nn.functional.pad(bands, (0, 1))
    return padded[..., torch.where(band >= 0, band, outside).clamp(max=outside)]


def last_positions(
    n_queries: int, n_keys: int, block_size: int, device: torch.device | str
) -> Int[Tensor, " Mq"]:
    """The position of each query block's last query."""
    last = torch.arange(1, -(-n_queries // block_size) + 1, device=device) * block_size - 1
    return last.clamp(max=n_queries - 1) + (n_keys - n_queries)


def compact(
    mask: Bool[Tensor, "B H Mq n"], length: int, values: Int[Tensor, "B H Mq n"] | None = None
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """The True places of each row in ascending order (or the ``values`` there), at most ``length``."""
    if not may_ask(mask):
        return compact_without_asking(mask, length, values)
    counts = mask.sum(-1, dtype=torch.int32)
    longest = int(counts.max()) if counts.numel() else 0
    row, column = mask.flatten(0, -2).nonzero(as_tuple=True)
    per_row = counts.flatten().long()
    # A place in the output is the number of its row times the length, and how far it is in the row.
    place = torch.arange(row.numel()) + row * longest - (per_row.cumsum(0) - per_row)[row]
    indices = torch.zeros(per_row.numel() * longest, dtype=torch.int32)
    indices[place] = column.to(torch.int32) if values is None else values.flatten(0, -2)[row, column]
    indices = indices.view(*counts.shape, longest)
    if longest > length:
        counts, indices = counts.clamp(max=length), indices[..., :length].contiguous()
    return counts, indices


def compact_without_asking(
    mask: Bool[Tensor, "B H Mq n"], length: int, values: Int[Tensor, "B H Mq n"] | None
) -> tuple[Int[Tensor, "B H Mq"], Int[Tensor, "B H Mq L"]]:
    """The same without asking how long the lists are."""
    place = mask.cumsum(-1) - 1
    target = torch.where(mask & (place < length), place, length)
    if values is None:
        values = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    indices = torch.zeros(*mask.shape[:-1], length + 1, dtype=torch.int32, device=mask.device)
    indices.scatter_(-1, target, values)
    return mask.sum(-1, dtype=torch.int32).clamp(max=length), indices[..., :length].contiguous()


def _rows(n_queries: int, n_keys: int, block_size: int, device: torch.device) -> Int[Tensor, " Mq"]:
    """The key block in which each query block begins."""
    return torch.arange(-(-n_queries // block_size), device=device) + (n_keys - n_queries) // block_size


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a | b
