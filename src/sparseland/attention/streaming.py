"""StreamingLLM's pattern: the first tokens (attention sinks) and a sliding window, nothing else.

Xiao, Tian, Chen, Han, Lewis: *Efficient Streaming Language Models with Attention Sinks* (2023), section 3.
Key j is seen by query i if ``j < sinks`` or ``i - j < window``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.attention._controls import LengthState, phase_param, roles_of
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
from sparseland.patterns import WindowPattern


@dataclass(frozen=True)
class Streaming(PrefillMethod, SelectMethod):
    """Sinks and window, on prompts, while decoding, or both."""

    card: ClassVar[Card] = Card(
        slug="streaming",
        title="Efficient Streaming Language Models with Attention Sinks",
        paper="Xiao et al. 2023, arXiv 2309.17453, ICLR 2024",
        site="attention",
        training="none",
        summary="attends to the first tokens and a sliding window only: the static control",
        claims=(
            "stable perplexity over 4M tokens with 4 sinks and a window, where a window alone collapses",
        ),
        deviations=(
            "keys keep their true positions; the paper re-numbers positions inside its rolling cache",
            "while decoding, the cache stays whole and only sinks and window are read; the paper evicts",
            "64 sinks by default, a block of the kernels; the paper has 4",
        ),
        limits=("what lies between the sinks and the window is not seen: needles there are lost",),
        control=True,
    )

    looks_ahead: ClassVar[bool] = False
    chunkable: ClassVar[bool] = True

    sinks: int = param(64, "first tokens that every query sees", ge=0)
    window: int = param(1024, "nearest tokens that a query sees, itself included", ge=1)
    phase: str = phase_param()

    @property
    def roles(self) -> frozenset[Role]:
        return roles_of(self.phase)

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """Windows of 1/16, 1/8 and 1/4 of the prompt."""
        return [cls(window=max(64, length // part)) for part in (16, 8, 4)]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(window=length)

    @classmethod
    def at_density(cls, density: float, length: int) -> Self:
        """The window that computes ``density`` of the pairs, beside 64 sinks (fewer where they cost much)."""
        sinks = max(4, min(64, int(density * length / 8)))
        low, high = 1, length
        while low < high:
            middle = (low + high) // 2
            if float(WindowPattern(length, length, sinks, middle).density()) < density:
                low = middle + 1
            else:
                high = middle
        return cls(sinks=sinks, window=low)

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> WindowPattern:
        return WindowPattern(x.q.shape[2], x.k.shape[2], self.sinks, self.window)

    def new_state(self, layer: int, calibration: Calibration | None = None) -> LengthState:
        return LengthState()

    def append(self, state: SelectState, k_new: Float[Tensor, "B Hkv n D"]) -> None:
        state.push(k_new)

    def select(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "B H n"] | None:
        """Each row's first ``sinks`` valid tokens and its last ``window``, per key head."""
        n = len(state)
        if n <= self.sinks + self.window:
            return None
        batch, heads = x.k.shape[:2]
        first = (
            torch.zeros(batch, dtype=torch.long, device=x.q.device) if first_key is None else first_key.long()
        )
        window = torch.arange(n - self.window, n, device=x.q.device).expand(batch, -1)
        window = torch.where(window >= first[:, None], window, -1)
        sinks = torch.arange(self.sinks, device=x.q.device) + first[:, None]
        # In a short row the sinks run into the window; a token must not be read twice.
        sinks = torch.where(sinks < n - self.window, sinks, -1)
        return torch.cat([sinks, window], -1)[:, None].expand(batch, heads, -1)
