"""What the controls share: which phase they act in, and what a budget means for blocks and for tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.method import Role, SelectState, param
from sparseland.patterns import visible_blocks


def phase_param() -> Any:
    """The field that says whether a control acts on prompts, on decoding steps, or on both."""
    return param("prefill", "where it acts", choices=("prefill", "decode", "both"))


def roles_of(phase: str) -> frozenset[Role]:
    """The roles a control takes in this phase."""
    roles: dict[str, frozenset[Role]] = {
        "prefill": frozenset({"prefill"}),
        "decode": frozenset({"select"}),
        "both": frozenset({"prefill", "select"}),
    }
    return roles[phase]


def check_block_size(slug: str, block_size: int) -> None:
    """Raise unless ``block_size`` is a power of two that the block-sparse op can tile."""
    if block_size not in (16, 32, 64, 128):
        raise SparselandError(f"{slug}: block_size={block_size} is not allowed; it must be 16, 32, 64 or 128")


class LengthState(SelectState):
    """State of a selector that needs only the number of cached tokens."""

    def push(self, new: Tensor) -> None:
        self._length += new.shape[2]


def at_least(fraction: float, n: int) -> int:
    """``max(1, ceil(fraction * n))``, blind to the fraction's rounding (1/10 of 10 is 1)."""
    return max(1, math.ceil(fraction * n - 1e-9))


def blocks_per_row(budget: float, visible: Sequence[int]) -> list[int]:
    """Key blocks of each row: one number for all, fewer only where there are no more, ``budget`` in total.

    Args:
        budget: fraction of all visible blocks.
        visible: causal key blocks of each row of queries, never fewer than the row's before.

    The number is no integer in general; rows then take turns (4, 5, 4, 5 for 4.5). A fraction per row would
    starve the first rows, whose few blocks all matter, and no method spends a budget so.
    """
    wanted, kappa = budget * sum(visible), 0.0
    for rank, n in enumerate(visible):
        # The rows so far are full at n; what is left is shared by the others, if it does not reach n.
        share = wanted / (len(visible) - rank)
        kappa = min(share, n)
        if share <= n:
            break
        wanted -= n
    marks = [math.floor(r * kappa + 1e-9) for r in range(len(visible) + 1)]
    return [max(1, min(n, high - low)) for n, low, high in zip(visible, marks, marks[1:], strict=False)]


def budget_for(density: float, length: int, block_size: int, forced_first: bool) -> float:
    """The smallest budget at which :func:`blocks_by_priority` computes ``density`` of a prompt's pairs.

    Four digits, for short specs.
    """
    rows = -(-length // block_size)
    heights = [min(block_size, length - r * block_size) for r in range(rows)]
    total = length * (length + 1) / 2

    def computed(budget: float) -> float:
        pairs = 0
        for r, count in enumerate(blocks_per_row(budget, range(1, rows + 1))):
            # All taken blocks but the diagonal's lie wholly in the past.
            others = max(count, 2 if forced_first and r else 1) - 1
            pairs += heights[r] * (heights[r] + 1) // 2 + others * heights[r] * block_size
        return pairs / total

    low, high = 0, 10_000
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if computed(middle / 10_000) < density else (low, middle)
    return max(low, 1) / 10_000


def diagonal_blocks(
    n_queries: int, n_keys: int, block_size: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "Mq Mk"]:
    """Blocks that hold a query's own key (two per row where a chunk does not start at a block's edge)."""
    offset = n_keys - n_queries
    first = torch.arange(-(-n_queries // block_size), device=device) * block_size + offset
    last = (first + block_size - 1).clamp(max=n_keys - 1)
    column = torch.arange(-(-n_keys // block_size), device=device)
    low = torch.div(first, block_size, rounding_mode="floor")[:, None]
    return (column >= low) & (column <= torch.div(last, block_size, rounding_mode="floor")[:, None])


def blocks_by_priority(
    priority: Tensor,
    forced: Bool[Tensor, "Mq Mk"],
    budget: float,
    n_queries: int,
    n_keys: int,
    block_size: int,
) -> Bool[Tensor, "B H Mq Mk"]:
    """Per row the blocks of highest ``priority [B, H, Mq, Mk]``, as many as :func:`blocks_per_row` says.

    ``forced`` blocks count towards the budget and are taken even where they exceed it. Ties go to the
    earlier block.
    """
    device = priority.device
    visible = visible_blocks(n_queries, n_keys, block_size, device)
    forced = forced & visible
    # Python's own numbers: a graph that is being compiled has no others that could steer it.
    ends = (min(end, n_queries) for end in range(block_size, n_queries + block_size, block_size))
    rows = [(n_keys - n_queries + end - 1) // block_size + 1 for end in ends]
    wanted = torch.tensor(blocks_per_row(budget, rows))
    # A copy that does not wait for the device.
    count = wanted.to(device, non_blocking=True).maximum(forced.sum(-1))
    ranked = priority.double().masked_fill(~visible, -math.inf).masked_fill(forced, math.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    taken = (torch.arange(order.shape[-1], device=device) < count[:, None]).expand(order.shape)
    return torch.zeros_like(taken).scatter(-1, order, taken) & visible


def hashed(*parts: int | Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """A well-mixed number in [0, 2^32) per broadcast tuple of integers; the same on every device.

    Draws that depend only on positions give one selection for a prompt, alone or in a batch, whole or in
    chunks, which a stream of random numbers does not. Mixing: Wellons' ``lowbias32`` (2018).
    """
    mask = 0xFFFFFFFF
    state: Tensor = torch.zeros((), dtype=torch.int64)
    for part in parts:
        value = torch.as_tensor(part)
        # A number on the CPU joins a tensor on the device without a copy that is waited for.
        state = ((state ^ (value.long() & mask)) + 0x9E3779B9) & mask
        state = ((state ^ (state >> 16)) * 0x7FEB352D) & mask
        state = ((state ^ (state >> 15)) * 0x846CA68B) & mask
        state = state ^ (state >> 16)
    return state
