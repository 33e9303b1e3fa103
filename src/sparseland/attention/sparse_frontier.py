"""The Sparse Frontier: six training-free methods in one form, each at a budget of its own.

Nawrot, Li, Huang, Ruder, Marchisio, Ponti: *The Sparse Frontier: Sparse Attention Trade-offs in Transformer
LLMs* (2025). The study compares units of sparsity; ``unit`` picks one:

prompts
    ``vertical-slash``   one number of columns and of diagonals for all heads, placed by the last queries
    ``flexprefill``      as many columns and diagonals per head as cover ``coverage`` of the attention
    ``block``            per block of queries the best blocks of keys, by mean query times mean key
cache
    ``snapkv``           the tokens that the prompt's last queries looked at, equally many per key head
    ``ada-snapkv``       the same, with the budget shared among a layer's key heads
reading the cache
    ``quest``            pages of the cache by the bound that their extreme keys put on attention

They carry the names of their models but differ from them (see the card). A prompt unit, a cache unit and
``quest`` can be put on a model together as a list of two methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.attention._frontier_prefill import blocks_for, rank, top_blocks, vertical_slash
from sparseland.attention._frontier_search import nominal_columns, search
from sparseland.cache._quest import PageBounds, best_pages
from sparseland.cache._snapkv import (
    EvictingStore,
    adaptive_top,
    eviction_scores,
    probe_scores,
    uniform_top,
)
from sparseland.errors import SparselandError
from sparseland.method import (
    AttentionInputs,
    Calibration,
    Card,
    PrefillMethod,
    Role,
    SelectMethod,
    SelectState,
    StoreMethod,
    param,
)
from sparseland.patterns import Pattern, WindowPattern, cdiv

PREFILL_UNITS = ("vertical-slash", "block", "flexprefill")
DECODE_UNITS = ("snapkv", "ada-snapkv", "quest")
UNITS = (*PREFILL_UNITS, *DECODE_UNITS)

# What each unit reads, and the study's values (its prompts have 16K tokens and more).
_SNAPKV: dict[str, Any] = {"capacity": 1024, "probe": 256, "window": 128, "sinks": 4, "kernel": 21}
DEFAULTS: dict[str, dict[str, Any]] = {
    "vertical-slash": {"verticals": 512, "slashes": 512, "probe": 256, "sinks": 4, "local": 64},
    "block": {"blocks": 64, "block_size": 16},
    "flexprefill": {"coverage": 0.65, "min_budget": 512, "probe": 512, "sinks": 4, "local": 64},
    "snapkv": _SNAPKV,
    "ada-snapkv": {**_SNAPKV, "floor": 0.2},
    "quest": {"budget": 1024, "page_size": 16, "share_pages": True},
}

# Without a prompt to look at: many columns and few diagonals, each of which costs whole blocks.
COLUMNS_PER_DIAGONAL = 32


@dataclass(frozen=True)
class SparseFrontier(PrefillMethod, StoreMethod, SelectMethod):
    """One of the study's six selectors. Parameters left at None have the value of the unit (in brackets)."""

    left_out: ClassVar[str | None] = "its selectors are for `sparseland study`"
    card: ClassVar[Card] = Card(
        slug="sparse-frontier",
        title="The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs",
        paper="Nawrot et al. 2025, arXiv 2504.17768",
        site="attention",
        training="none",
        summary="the study's six harmonised selectors for prompts, cache and decoding, one by `unit`",
        claims=(
            "at equal FLOPs and very long sequences, larger and highly sparse models beat smaller dense ones",
            "the sparsity without significant loss is higher in decoding than for prompts, and grows with "
            "model size in decoding",
            "no unit is best for all tasks; even moderate sparsity hurts at least one task",
            "scaling laws of sparse attention hold beyond the measured sizes, lengths and sparsities",
        ),
        deviations=(
            "units differ from their namesakes, as in the study: one budget for all heads "
            "(vertical-slash), coverage only, without divergence test and block fallback (flexprefill), "
            "blocks of 16 with forced ones (block)",
            "density counts computed pairs; the study counts blocks",
            "diagonals are computed in 64x64 blocks on the keys' grid, so a lone diagonal costs two blocks "
            "per row",
            "a last partial block's mean covers its own tokens, and no empty block is added where the length "
            "is a multiple of the block; the released code does both otherwise",
            "flexprefill counts the forced columns and diagonals first, so that what it takes reaches the "
            "coverage",
            "tokens are dropped when the first token is decoded, not layer by layer: a prompt in pieces is "
            "scored as a whole, at the price of the whole prompt's cache until then (a last piece of one "
            "token is taken for decoding's first)",
        ),
        limits=(
            "the budgets belong to prompts of 16K tokens and more; at_sparsity() fits them to a length",
            "the 64 forced diagonals touch two blocks of 64 per row: vertical-slash and flexprefill can't be "
            "sparser than about 0.2 of the pairs at 1K tokens, 0.05 at 4K",
            "after snapkv or ada-snapkv dropped tokens no second prompt can follow in the same cache",
            "which pairs early queries compute depends on the prompt's last queries (vertical-slash, "
            "flexprefill)",
        ),
    )

    unit: str = param("vertical-slash", "the unit of sparsity", choices=UNITS)
    verticals: int | None = param(None, "vertical-slash: columns of every head (512)", ge=1)
    slashes: int | None = param(None, "vertical-slash: diagonals of every head (512)", ge=1)
    coverage: float | None = param(None, "flexprefill: attention that each head covers (0.65)", gt=0, le=1)
    min_budget: int | None = param(None, "flexprefill: at least this many columns, and diagonals (512)", ge=1)
    blocks: int | None = param(None, "block: key blocks per block of queries (64)", ge=3)
    block_size: int | None = param(None, "block: tokens per block, 16, 32, 64 or 128 (16)", ge=16, le=128)
    local: int | None = param(None, "vertical-slash, flexprefill: nearest diagonals, always taken (64)", ge=1)
    capacity: int | None = param(None, "snapkv, ada-snapkv: tokens kept per key head (1024)", ge=1)
    window: int | None = param(None, "snapkv, ada-snapkv: last tokens, always kept (128)", ge=0)
    kernel: int | None = param(None, "snapkv, ada-snapkv: neighbours that scores average, odd (21)", ge=1)
    floor: float | None = param(None, "ada-snapkv: part of capacity that each head has (0.2)", ge=0, le=1)
    probe: int | None = param(None, "last queries that estimate (256; flexprefill 512)", ge=1)
    sinks: int | None = param(
        None, "vertical-slash, flexprefill, snapkv: first tokens, always taken (4)", ge=0
    )
    budget: int | None = param(None, "quest: tokens read beside the newest page (1024)", ge=1)
    page_size: int | None = param(None, "quest: tokens per page (16)", ge=1)
    share_pages: bool | None = param(None, "quest: one choice for all query heads of a key head (true)")

    def __post_init__(self) -> None:
        super().__post_init__()
        own = DEFAULTS[self.unit]
        for name, value in self.params().items():
            if name != "unit" and value is not None and name not in own:
                raise SparselandError(
                    f"sparse-frontier: {name} means nothing to unit={self.unit}, which has {', '.join(own)}"
                )
        wrong = self._misfit()
        if wrong:
            raise SparselandError(f"sparse-frontier: {wrong}")

    def _misfit(self) -> str | None:
        """What is wrong with values that are each allowed."""
        if self.unit == "block" and self.value("block_size") not in (16, 32, 64, 128):
            return f"block_size={self.block_size} is not allowed; it must be 16, 32, 64 or 128"
        if self.unit == "vertical-slash" and self.value("verticals") < self.value("sinks"):
            return (
                f"verticals={self.value('verticals')} are fewer than the {self.value('sinks')} forced sinks"
            )
        if self.unit == "vertical-slash" and self.value("slashes") < self.value("local"):
            return (
                f"slashes={self.value('slashes')} are fewer than the {self.value('local')} forced local ones"
            )
        if self.unit == "quest" and self.value("budget") < self.value("page_size"):
            return f"budget={self.value('budget')} is less than one page of {self.value('page_size')} tokens"
        if self.unit in ("snapkv", "ada-snapkv"):
            if self.value("kernel") % 2 == 0:
                return f"kernel={self.kernel} is not allowed; it must be odd"
            forced = self.value("window") + self.value("sinks")
            if self.value("capacity") < forced:
                return f"capacity={self.value('capacity')} is less than the {forced} forced tokens"
        return None

    def value(self, name: str) -> Any:
        """A parameter's value: as given, or the unit's own."""
        value = getattr(self, name)
        return DEFAULTS[self.unit][name] if value is None else value

    @property
    def roles(self) -> frozenset[Role]:
        if self.unit in PREFILL_UNITS:
            return frozenset({"prefill"})
        return frozenset({"select"} if self.unit == "quest" else {"store"})

    # ------------------------------------------------------------------ budgets

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """The units that the study found best, at four times fewer pairs or tokens."""
        return [cls.at_sparsity(u, 4, length) for u in ("vertical-slash", "block", "quest", "ada-snapkv")]

    @classmethod
    def full_budget(cls, length: int, unit: str = "vertical-slash") -> Self:
        settings: dict[str, dict[str, Any]] = {
            "vertical-slash": {"verticals": max(4, length), "slashes": max(64, length)},
            "block": {"blocks": max(3, cdiv(length, 16))},
            "flexprefill": {"coverage": 1.0},
            "snapkv": {"capacity": max(132, length)},
            "ada-snapkv": {"capacity": max(132, length)},
            "quest": {"budget": max(16, length)},
        }
        return cls(unit=unit, **settings[unit])

    @classmethod
    def at_sparsity(
        cls, unit: str, compression: float, length: int, inputs: Sequence[AttentionInputs] = ()
    ) -> Self:
        """The setting that leaves about ``1 / compression`` of the pairs (of the tokens kept or read).

        ``block`` and the decoding units have it by counting. What ``vertical-slash`` and ``flexprefill``
        compute depends on the prompt: with ``inputs`` (some layers of a prompt of this length) the budget is
        searched until their density fits, and of several proportions of columns to diagonals the one that
        keeps the most attention is taken; without, columns are counted, with few diagonals, and flexprefill
        gets them as its minimum. Where the forced part alone is denser, it is what comes back: measure the
        density, don't assume it.

        At short lengths what the study fixes for long ones shrinks in proportion (probe, window, minimum).

        Raises:
            SparselandError: no such unit, or a compression below 1.
        """
        if unit not in UNITS:
            raise SparselandError(f"sparse-frontier: no unit {unit!r}; it must be one of {', '.join(UNITS)}")
        if not compression >= 1:
            raise SparselandError(f"sparse-frontier: compression={compression} must be 1 or more")
        if compression == 1:
            return cls.full_budget(length, unit)
        probe = min(256, max(32, length // 16))
        if unit == "block":
            return cls(unit=unit, blocks=blocks_for(1 / compression, cdiv(length, 16)))
        if unit == "quest":
            pages = round(length / compression / 16) - 1  # the newest page comes on top
            return cls(unit=unit, budget=16 * max(1, pages))
        if unit in ("snapkv", "ada-snapkv"):
            capacity = max(8, round(length / compression))
            window = min(128, capacity // 4)
            return cls(unit=unit, capacity=capacity, window=window, probe=probe)
        if not inputs:
            columns = max(4, nominal_columns(1 / compression, length, COLUMNS_PER_DIAGONAL))
            if unit == "flexprefill":
                return cls(unit=unit, min_budget=max(64, columns), probe=min(512, 2 * probe))
            return cls(verticals=columns, slashes=64 + columns // COLUMNS_PER_DIAGONAL, probe=probe)
        if unit == "flexprefill":
            least = min(512, max(64, length // 32))
            settings = ({"min_budget": m, "probe": min(512, 2 * probe)} for m in dict.fromkeys((least, 64)))
            return search([partial(cls._covering, s) for s in settings], 1 / compression, inputs)
        proportions = (0.25, 1.0, 4.0, COLUMNS_PER_DIAGONAL)
        return search(
            [partial(cls._in_tokens, length, probe, p) for p in proportions], 1 / compression, inputs
        )

    @classmethod
    def _in_tokens(cls, length: int, probe: int, proportion: float, part: float) -> Self:
        """Vertical-slash with ``part`` of the length as the larger of columns and non-local diagonals."""
        columns = min(length, 4 + round(part * length * min(1.0, proportion)))
        diagonals = min(length, 64 + round(part * length * min(1.0, 1 / proportion)))
        return cls(unit="vertical-slash", verticals=columns, slashes=diagonals, probe=probe)

    @classmethod
    def _covering(cls, settings: dict[str, Any], part: float) -> Self:
        """FlexPrefill that covers ``part`` of the attention."""
        return cls(unit="flexprefill", coverage=min(1.0, max(1e-3, part)), **settings)

    # ------------------------------------------------------------------ prompts

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys = x.q.shape[2], x.k.shape[2]
        dense = WindowPattern.dense(n_queries, n_keys)
        if self.unit == "block":
            size, count = self.value("block_size"), self.value("blocks")
            return dense if count >= cdiv(n_keys, size) else top_blocks(x, size, count)
        if self.unit == "vertical-slash":
            verticals, slashes = self.value("verticals"), self.value("slashes")
            if max(verticals, slashes) >= n_keys:
                return dense
            columns, diagonals = rank(x, self.value("probe"), self.value("sinks"), self.value("local"))
            return vertical_slash(x, columns, verticals, diagonals, slashes)
        least, share = self.value("min_budget"), self.value("coverage")
        if share == 1 or max(least, self.value("local")) >= n_keys:
            return dense
        columns, diagonals = rank(x, self.value("probe"), self.value("sinks"), self.value("local"))
        counts = [r.covering(share).clamp(least, n_keys) for r in (columns, diagonals)]
        # Without its local diagonals a query would not see itself.
        counts[1] = counts[1].clamp(min=self.value("local"))
        return vertical_slash(x, columns, counts[0], diagonals, counts[1])

    # -------------------------------------------------------------------- cache

    def new_store(
        self,
        layer: int,
        calibration: Calibration | None = None,
        *,
        n_layers: int | None = None,
        learner: torch.nn.Module | None = None,
    ) -> EvictingStore:
        name = f"sparse-frontier:unit={self.unit}"
        return EvictingStore(self.value("probe"), self.keep, self.value("capacity"), name)

    def keep(
        self,
        q: Float[Tensor, "B Hq L D"],
        k: Float[Tensor, "B Hkv N D"],
        scale: float,
        first_key: Int[Tensor, " B"] | None = None,
    ) -> Bool[Tensor, "B Hkv N"]:
        """The tokens of a prompt that are kept, by its last queries."""
        adaptive = self.unit == "ada-snapkv"
        raw = probe_scores(q, k, scale, "max" if adaptive else "mean", first_key)
        window, sinks, capacity = self.value("window"), self.value("sinks"), self.value("capacity")
        scores = eviction_scores(raw, self.value("kernel"), window, sinks, first_key)
        if not adaptive:
            return uniform_top(scores, capacity)
        least = min(capacity, max(int(self.value("floor") * capacity), window + sinks))
        return adaptive_top(scores, capacity, least)

    # ------------------------------------------------------------------ reading

    def new_state(self, layer: int, calibration: Calibration | None = None) -> SelectState:
        return PageBounds(self.value("page_size"))

    def append(self, state: SelectState, k_new: Float[Tensor, "B Hkv n D"]) -> None:
        state.push(k_new)

    def observe(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> None:
        assert isinstance(state, PageBounds)
        if first_key is not None:
            state.rebuild(x.k, first_key)

    def select(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "B H n"] | None:
        assert isinstance(state, PageBounds)
        return best_pages(
            state, x.q, self.value("budget") // self.value("page_size"), self.value("share_pages")
        )
