"""Random key blocks at a given budget: what any selection must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.attention._controls import (
    LengthState,
    at_least,
    blocks_by_priority,
    budget_for,
    check_block_size,
    diagonal_blocks,
    hashed,
    phase_param,
    roles_of,
)
from sparseland.method import (
    AttentionInputs,
    Calibration,
    Card,
    PrefillMethod,
    Role,
    SelectMethod,
    SelectState,
    param,
)
from sparseland.patterns import BlockPattern, cdiv


@dataclass(frozen=True)
class RandomBlocks(PrefillMethod, SelectMethod):
    """Per head and query block: the first block, the diagonal, and random causal blocks."""

    card: ClassVar[Card] = Card(
        slug="random-blocks",
        title="",
        paper="control",
        site="attention",
        training="none",
        summary="attends to random key blocks, the first one and the diagonal: the control at equal budget",
        limits=(
            "knows nothing of the input; it is here to be beaten",
            "the budget is spread over one call's queries, so chunks draw other blocks than the whole prompt",
        ),
        control=True,
    )

    looks_ahead: ClassVar[bool] = False

    budget: float = param(1 / 8, "fraction of the causal blocks (or of the cached tokens)", gt=0, le=1)
    block_size: int = param(64, "queries and keys per block: 16, 32, 64 or 128", ge=16, le=128)
    seed: int = param(0, "which random selection", ge=0)
    phase: str = phase_param()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.card.slug, self.block_size)

    @property
    def roles(self) -> frozenset[Role]:
        return roles_of(self.phase)

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """1/16, 1/8 and 1/4 of the blocks."""
        return [cls(budget=part) for part in (1 / 16, 1 / 8, 1 / 4)]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(budget=1.0, phase="both")

    @classmethod
    def at_density(cls, density: float, length: int) -> Self:
        """The budget that computes ``density`` of the pairs of a prompt."""
        return cls(budget=budget_for(density, length, 64, forced_first=True))

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> BlockPattern:
        n_queries, n_keys, size, device = x.q.shape[2], x.k.shape[2], self.block_size, x.q.device
        rows = torch.arange(cdiv(n_queries, size), device=device)[:, None] + x.offset // size
        columns = torch.arange(cdiv(n_keys, size), device=device)
        head = torch.arange(x.q.shape[1], device=device)[:, None, None]
        draw = hashed(self.seed, x.layer, head, rows, columns)[None]
        forced = diagonal_blocks(n_queries, n_keys, size, device)
        forced[:, 0] = True
        blocks = blocks_by_priority(draw, forced, self.budget, n_queries, n_keys, size)
        return BlockPattern.from_block_mask(blocks.expand(x.q.shape[0], -1, -1, -1), size, n_queries, n_keys)

    def new_state(self, layer: int, calibration: Calibration | None = None) -> LengthState:
        return LengthState()

    def append(self, state: SelectState, k_new: Float[Tensor, "B Hkv n D"]) -> None:
        state.push(k_new)

    def select(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "B Hq n"] | None:
        """The newest token and random others, ``max(1, ceil(budget * N))`` of a row's ``N`` valid tokens."""
        n = len(state)
        wanted = at_least(self.budget, n)
        if wanted >= n:
            return None
        batch, heads = x.q.shape[:2]
        first = (
            torch.zeros(batch, dtype=torch.long, device=x.q.device) if first_key is None else first_key.long()
        )
        first = first[:, None, None]
        head = torch.arange(heads, device=x.q.device)[:, None]
        position = torch.arange(n, device=x.q.device)
        # Counted from each row's first token, so that padding changes no draw.
        draw = hashed(self.seed, x.layer, head, n - first, position - first).expand(batch, heads, n).double()
        draw = draw.masked_fill(position < first, -torch.inf)
        draw[..., -1] = torch.inf
        index = draw.topk(wanted, dim=-1).indices
        valid = ((n - first) * self.budget - 1e-9).ceil().clamp(min=1)
        return torch.where(torch.arange(wanted, device=index.device) < valid, index, -1)
