"""Exact top-k by true attention: what the best selection at a budget could reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.attention._controls import (
    at_least,
    blocks_by_priority,
    budget_for,
    check_block_size,
    diagonal_blocks,
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

# Logits held at once while measuring attention: 64 MiB of float32.
_CHUNK = 2**24


@dataclass(frozen=True)
class Oracle(PrefillMethod, SelectMethod):
    """Per head and query block the key blocks that hold the most true attention mass."""

    card: ClassVar[Card] = Card(
        slug="oracle",
        title="",
        paper="control",
        site="attention",
        training="none",
        summary="attends to the key blocks with the most true attention: the upper bound at equal budget",
        limits=(
            "no speed-up: it computes all of attention to choose, and while decoding it holds a second copy "
            "of the keys",
            "an upper bound on attention mass among selections of whole blocks with the diagonal; single "
            "columns or budgets that differ between heads can keep more at the same density",
        ),
        control=True,
    )

    budget: float = param(1 / 8, "fraction of the causal blocks (or of the cached tokens)", gt=0, le=1)
    block_size: int = param(64, "queries and keys per block: 16, 32, 64 or 128", ge=16, le=128)
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
        return cls(budget=budget_for(density, length, 64, forced_first=False))

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> BlockPattern:
        n_queries, n_keys, size = x.q.shape[2], x.k.shape[2], self.block_size
        # The diagonal is forced so that no query is left without a key.
        forced = diagonal_blocks(n_queries, n_keys, size, x.q.device)
        mass = block_mass(x, size)
        blocks = blocks_by_priority(mass, forced, self.budget, n_queries, n_keys, size)
        return BlockPattern.from_block_mask(blocks, size, n_queries, n_keys)

    def new_state(self, layer: int, calibration: Calibration | None = None) -> SelectState:
        return SelectState()

    def append(self, state: SelectState, k_new: Float[Tensor, "B Hkv n D"]) -> None:
        state.push(k_new)

    def select(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "B Hq n"] | None:
        """The ``max(1, ceil(budget * N))`` tokens with the largest q·k of a row's ``N``, per query head."""
        n = len(state)
        wanted = at_least(self.budget, n)
        if wanted >= n:
            return None
        keys = state.rows
        batch, heads, _, dim = x.q.shape
        grouped = x.q.reshape(batch, keys.shape[1], -1, dim).float()
        score = (grouped @ keys.float().transpose(-1, -2)).reshape(batch, heads, n)
        position = torch.arange(n, device=x.q.device)
        if first_key is not None:
            score = score.masked_fill(position < first_key[:, None, None], -torch.inf)
        index = score.topk(wanted, dim=-1).indices
        if first_key is None:
            return index
        valid = ((n - first_key) * self.budget - 1e-9).ceil().clamp(min=1)[:, None, None]
        return torch.where(torch.arange(wanted, device=index.device) < valid, index, -1)


def block_mass(x: AttentionInputs, block_size: int) -> Float[Tensor, "B H Mq Mk"]:
    """True attention probability per block, summed over its queries and keys (float32).

    Works through the query blocks a few at a time: no ``Nq x Nk`` tensor exists.
    """
    batch, heads, n_queries, dim = x.q.shape
    kv_heads, n_keys = x.k.shape[1:3]
    rows = max(1, _CHUNK // (batch * heads * n_keys * block_size)) * block_size
    keys = x.k.float().transpose(-1, -2)[:, :, None]
    position = torch.arange(n_keys, device=x.q.device)
    parts = []
    for start in range(0, n_queries, rows):
        q = x.q[:, :, start : start + rows].float()
        n = q.shape[2]
        logits = q.reshape(batch, kv_heads, -1, n, dim) @ keys * x.scale
        future = position > position[x.offset + start : x.offset + start + n, None]
        p = logits.masked_fill_(future, -torch.inf).softmax(-1).reshape(batch, heads, n, n_keys)
        p = F.pad(p, (0, -n_keys % block_size, 0, -n % block_size))
        tiles = (p.shape[2] // block_size, block_size, p.shape[3] // block_size, block_size)
        parts.append(p.reshape(batch, heads, *tiles).sum((3, 5)))
    mass = torch.cat(parts, dim=2)
    assert mass.shape[2:] == (cdiv(n_queries, block_size), cdiv(n_keys, block_size))
    return mass
