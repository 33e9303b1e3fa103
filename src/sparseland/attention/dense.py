"""Dense causal attention through the same path as every method: what all others are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from sparseland.method import AttentionInputs, Calibration, Card, PrefillMethod
from sparseland.patterns import WindowPattern


@dataclass(frozen=True)
class Dense(PrefillMethod):
    """All causal pairs."""

    card: ClassVar[Card] = Card(
        slug="dense",
        title="",
        paper="control",
        site="attention",
        training="none",
        summary="computes every causal pair of the prompt: the control with density 1",
        limits=("saves nothing; it shows what the path itself costs",),
        control=True,
    )

    looks_ahead: ClassVar[bool] = False
    chunkable: ClassVar[bool] = True

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls()

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> WindowPattern:
        return WindowPattern.dense(x.q.shape[2], x.k.shape[2])
