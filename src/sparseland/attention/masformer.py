"""MASFormer: full attention in a few layers, attention of short span in all others.

Zhang, Ram, Hawkins, Zha, Zhao: *Efficient Long-Range Transformers: You Need to Attend More, but Not
Necessarily at Every Layer* (Findings of EMNLP 2023). Of L layers, l attend to everything before a token; the
others, with a span of b, either to the token's own block or to a window::

    block:   u <= t  and  t // b - u // b <= look_back
    window:  u <= t  and  t - u < b

Long-range information enters through the full layers and is carried on by the residual stream. The layout
changes no parameters: a pretrained model is converted by applying it and continuing to train on long text.
Attention costs ``(l + (L - l) b / n) / L`` of full attention for n tokens (blocks; both halves are causal),
and the cache while decoding takes the same share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

from torch import nn

from sparseland.attention._masformer_store import LocalStore
from sparseland.errors import SparselandError
from sparseland.method import (
    AttentionInputs,
    Calibration,
    Card,
    LayerShape,
    PrefillMethod,
    Role,
    StoreMethod,
    param,
)
from sparseland.patterns import BlockLocalPattern, Pattern, WindowPattern

PLACEMENTS = ("bottom", "top", "middle", "even")


@dataclass(frozen=True)
class MASFormer(PrefillMethod, StoreMethod):
    """Which layers attend fully, and how far the others see; their caches are bounded by that."""

    card: ClassVar[Card] = Card(
        slug="masformer",
        title=(
            "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer"
        ),
        paper="Zhang et al., Findings of EMNLP 2023, arXiv 2310.12442",
        site="attention",
        training="training",
        summary="full attention in a few layers, short blocks or windows in the others; needs training",
        claims=(
            "a 1.3B model is competitive with full attention on language modelling and generation at up to "
            "75 % lower cost of attention, with inputs of 8K tokens",
            "continual training on long text converts a pretrained model",
        ),
        deviations=(
            "no code was released and the paper's placement could not be confirmed: placement is a "
            "parameter, and the claim measures it",
            "look_back and sinks are ours: without them the first tokens of a block see almost nothing, and "
            "models that rest on the first token lose it in every block but the first",
            "blocks are counted from a row's first token that is no padding",
        ),
        limits=(
            "without training after the conversion the loss rises steeply",
            "the saving is of attention only: projections and feed-forward layers stay as they are",
            "local layers forget: a cache can't be cropped to before what they still hold",
        ),
    )
    looks_ahead: ClassVar[bool] = False
    chunkable: ClassVar[bool] = True

    full: int = param(4, "layers with full attention (l)", ge=0)
    placement: str = param(
        "bottom", "where they are: bottom, top, middle, even, or their numbers, such as 0+7+15"
    )
    local: str = param("block", "what the other layers see", choices=("block", "window"))
    span: int = param(1024, "tokens of a block or of the window, the query's own included (b)", ge=1)
    look_back: int = param(0, "blocks before its own that a token sees (blocks only)", ge=0)
    sinks: int = param(0, "first tokens that local layers always see", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.look_back and self.local != "block":
            raise SparselandError(
                f"masformer: look_back={self.look_back} needs local=block; a window grows by its span"
            )
        if self.placement not in PLACEMENTS:
            numbers = _numbers(self.placement)
            if len(numbers) != self.full:
                raise SparselandError(
                    f"masformer: placement={self.placement} names {len(numbers)} layers, but full={self.full}"
                )

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"prefill", "store"})

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """Blocks of 1/16 and 1/8 of the prompt; with a block of the past and the sinks, what loses less."""
        sixteenth, eighth = max(1, length // 16), max(1, length // 8)
        return [
            cls(full=2, span=sixteenth),
            cls(full=2, span=sixteenth, look_back=1, sinks=4),
            cls(full=2, span=eighth, look_back=1, sinks=4),
        ]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(span=length)

    def is_full(self, layer: int, n_layers: int | None) -> bool:
        """Whether a layer attends to everything before a token."""
        if n_layers is None:
            if self.placement == "bottom":
                return layer < self.full
            if self.placement in PLACEMENTS:
                raise SparselandError(
                    f"masformer: placement={self.placement} must know how many layers there are"
                )
            return layer in _numbers(self.placement)
        return layer in full_layers(n_layers, self.full, self.placement)

    def cost(self, n_layers: int, length: int) -> float:
        """Query-key pairs of all layers over those of full attention, for a prompt of ``length`` tokens.

        About ``(l + (L - l) b / n) / L`` for blocks; the short first blocks and the diagonal make it exact.
        """
        full = len(full_layers(n_layers, self.full, self.placement))
        local = float(self._local(length, length).density())
        return (full + (n_layers - full) * local) / n_layers

    def new_learner(self, shape: LayerShape) -> None:
        """Nothing to learn; a placement that the model has no layers for is refused here."""
        self.is_full(shape.layer, shape.n_layers)

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys = x.q.shape[2], x.k.shape[2]
        if self.is_full(x.layer, x.n_layers):
            return WindowPattern.dense(n_queries, n_keys)
        return self._local(n_queries, n_keys)

    def _local(self, n_queries: int, n_keys: int) -> Pattern:
        if self.local == "window":
            return WindowPattern(n_queries, n_keys, self.sinks, self.span)
        return BlockLocalPattern(n_queries, n_keys, self.span, self.look_back, self.sinks)

    def new_store(
        self,
        layer: int,
        calibration: Calibration | None = None,
        *,
        n_layers: int | None = None,
        learner: nn.Module | None = None,
    ) -> LocalStore | None:
        """None for full layers: they keep the ordinary cache."""
        return None if self.is_full(layer, n_layers) else LocalStore(self.first_seen, self.sinks)

    def first_seen(self, position: int) -> int:
        """The first position, sinks apart, that a local layer's query at ``position`` sees."""
        if self.local == "window":
            return max(0, position - self.span + 1)
        return max(0, (position // self.span - self.look_back) * self.span)


@cache
def full_layers(n_layers: int, full: int, placement: str) -> frozenset[int]:
    """The layers with full attention; all if ``full`` is at least their number.

    Raises:
        SparselandError: the placement names a layer that does not exist.
    """
    if placement not in PLACEMENTS:
        numbers = _numbers(placement)
        if max(numbers, default=0) >= n_layers:
            raise SparselandError(
                f"masformer: placement={placement} names layer {max(numbers)}; there are 0 to {n_layers - 1}"
            )
        return numbers
    full = min(full, n_layers)
    if placement == "even":  # the middles of `full` equal parts
        return frozenset((2 * i + 1) * n_layers // (2 * full) for i in range(full))
    first = {"bottom": 0, "top": n_layers - full, "middle": (n_layers - full) // 2}[placement]
    return frozenset(range(first, first + full))


@cache
def _numbers(placement: str) -> frozenset[int]:
    """``"0+7+15"`` -> its numbers."""
    parts = placement.split("+")
    if not all(p.isascii() and p.isdigit() for p in parts) or len(set(map(int, parts))) != len(parts):
        raise SparselandError(
            f"masformer: placement={placement} is not allowed; it must be one of {', '.join(PLACEMENTS)}, or "
            "different layer numbers such as 0+7+15"
        )
    return frozenset(map(int, parts))
