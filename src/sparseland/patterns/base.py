"""What all patterns share, and arithmetic on causal pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """Integer division, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, which is 1 or more.

    Triton's functions for this and :func:`cdiv` can be called in kernels, too, and take longer from Python.
    """
    return 1 << (n - 1).bit_length()


def causal_pairs(n_queries: int, n_keys: int) -> int:
    """Pairs that dense causal attention computes for the last ``n_queries`` of ``n_keys`` tokens."""
    return n_queries * (n_keys - n_queries) + n_queries * (n_queries + 1) // 2


@dataclass(frozen=True)
class Pattern:
    """What all patterns share. ``n_heads`` and ``batch`` may be 1 where a pattern is the same for all."""

    n_queries: int
    n_keys: int

    @property
    def offset(self) -> int:
        """Position of the first query among the keys."""
        return self.n_keys - self.n_queries

    def pairs(self) -> Int[Tensor, "B H"]:
        """Computed causal pairs per batch row and query head (int64)."""
        raise NotImplementedError

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        """The pairs as a dense boolean mask: for tests and pictures, never for computing."""
        raise NotImplementedError

    def density(self) -> Tensor:
        """Computed / total causal pairs, ``[B, H]`` float64."""
        pairs = self.pairs().double()
        # By a tensor: a GPU divides by a number by multiplying with its rounded inverse, and all is not 1.
        return pairs / torch.full_like(pairs, causal_pairs(self.n_queries, self.n_keys))

    def _causal(self, device: torch.device) -> Bool[Tensor, "Nq Nk"]:
        rows = torch.arange(self.n_queries, device=device)[:, None] + self.offset
        return torch.arange(self.n_keys, device=device)[None, :] <= rows


def unexpanded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with batch and head dimensions of 1 where all of them only repeat one entry (stride 0)."""
    for dim in (0, 1):
        longer = [t for t in tensors if t.shape[dim] != 1]
        if longer and all(t.stride(dim) == 0 for t in longer):
            tensors = tuple(t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors)
    return tensors


def pairs_from(
    key: Int[Tensor, "*any"], start: Int[Tensor, "*any"], end: Int[Tensor, "*any"]
) -> Int[Tensor, "*any"]:
    """Causal pairs of the queries in [start, end) with keys from ``key`` on: sums of consecutive numbers."""
    most, before = (end - key).clamp(min=0), (start - key).clamp(min=0)
    return (most * (most + 1) - before * (before + 1)) // 2


def visible_blocks(
    n_queries: int, n_keys: int, block_size: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "Mq Mk"]:
    """Blocks that hold at least one causal pair."""
    last = torch.arange(1, cdiv(n_queries, block_size) + 1, device=device) * block_size - 1
    last = last.clamp(max=n_queries - 1) + (n_keys - n_queries)
    first_key = torch.arange(cdiv(n_keys, block_size), device=device) * block_size
    return first_key[None, :] <= last[:, None]


def pairs_per_block(
    n_queries: int, n_keys: int, block_size: int, device: torch.device | str = "cpu"
) -> Int[Tensor, "Mq Mk"]:
    """Causal pairs in each block, by closed form (int64)."""
    offset = n_keys - n_queries
    # f(i, j) = pairs among the queries < i and keys < j; blocks are its second difference.
    i = (torch.arange(cdiv(n_queries, block_size) + 1, device=device) * block_size).clamp(max=n_queries)
    j = (torch.arange(cdiv(n_keys, block_size) + 1, device=device) * block_size).clamp(max=n_keys)
    i, j = i[:, None], j[None, :]
    # Query r sees min(offset + r + 1, j) of the keys < j: a ramp up to row j - offset - 1, then flat.
    ramp = (j - offset - 1).clamp(min=0).minimum(i)
    started = (j > offset).long()
    f = started * (ramp * (offset + 1) + ramp * (ramp - 1) // 2 + (i - ramp) * j) + (1 - started) * i * j
    return f[1:, 1:] - f[:-1, 1:] - f[1:, :-1] + f[:-1, :-1]


def listed(counts: Int[Tensor, "*B"], indices: Int[Tensor, "*B L"]) -> Bool[Tensor, "*B L"]:
    """Which entries of lists are real: the first ``counts`` of each."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]


def list_mask(counts: Int[Tensor, "*B"], indices: Int[Tensor, "*B L"], width: int) -> Bool[Tensor, "*B n"]:
    """Lists as rows of ``width`` booleans."""
    # Padding goes to an extra column that is cut off again.
    target = torch.where(listed(counts, indices), indices.long(), width)
    mask = torch.zeros(*target.shape[:-1], width + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, target, True)[..., :width]
