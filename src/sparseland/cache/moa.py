"""MoA: every head gets its own sliding window, and its own rule for how the window grows with the input.

Fu, Huang, Ning, Zhang, Li, Wang, Shi, Yuan, Yan, Wang, Dai, Yang, Wang: *MoA: Mixture of Sparse Attention for
Automatic Large Language Model Compression* (2024), sections 3 and 4.

A head's span at input length N is ``S = alpha + beta N`` (elastic rule): a block of sinks and the
``S - sinks`` newest tokens, on prompts as in the cache. Rules are found offline, per length N::

    E_ij = -A_ij (G_ij - sum_k G_ik A_ik) / (1 - A_ij)     G = dLoss/dA: what dropping A_ij does to the loss
    loss(head, rule, N) = sum over the blocks outside the rule's mask of |sum of E in the block|
    cost(head, rule, N) = S / N
    min (loss(N_1), loss(N_2), …)  so that the mean cost <= density at every N, one rule per head and
                                   at most two per layer; of the Pareto plans, the best at an unseen length
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparseland.cache._moa_plan import PLAN, Rule, per_head
from sparseland.cache._moa_store import SpanStore
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
from sparseland.patterns import BlockPattern, Pattern, WindowPattern, cdiv

__all__ = ["MoA", "Rule", "load_plan", "save_plan"]


def save_plan(path: str | Path, rules: Sequence[Sequence[Rule | dict[str, Any]]]) -> Path:
    """Write rules (``Calibration.meta["rules"]``) to a JSON file that ``plan=`` reads.

    Raises:
        SparselandError: the rules are malformed, or the file can't be written.
    """
    return PLAN.save(path, rules)


def load_plan(path: str | Path) -> tuple[tuple[Rule, ...], ...]:
    """Read what :func:`save_plan` wrote, layers of key heads; again only when the file has changed.

    Raises:
        SparselandError: not there, not JSON, of another format or a newer version, or malformed.
    """
    return PLAN.load(path)


@dataclass(frozen=True)
class MoA(PrefillMethod, StoreMethod):
    """Sinks and a window per key head, sized by an elastic rule; the cache holds no more than that."""

    calibrates_slowly: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        slug="moa",
        title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        paper="Fu et al. 2024, arXiv 2406.14909, COLM 2025",
        site="cache",
        training="calibration",
        summary="per head a window that grows with the input by its own rule, found by gradients and a MIP",
        claims=(
            "effective context 3.9x longer and retrieval accuracy 1.5-7.1x higher than one window for all "
            "heads at equal mean span (Vicuna-7B/13B, Llama-3-8B)",
            "largest relative drop on two long-context benchmarks from 9-36 % to within 5 %",
            "1.2-1.4x less GPU memory, 5.5-6.7x decoding throughput of dense FlashAttention-2",
        ),
        deviations=(
            "the loss is that of the text's last quarter (supervision=model: of the dense model's own "
            "answers there); the paper asks long-range questions and takes the dense model's answers",
            "effects are summed over a block before their magnitude is taken; the released code sums "
            "magnitudes (effect=elements), which on SmolLM2 predicts the true loss of plans far worse",
            "lengths follow the calibration text's N tokens as the paper's 2k/4k/8k, 12k and 16k follow 16k: "
            "profiled at N/8, N/4, N/2, validated at 3N/4, density bounded up to N",
            "spans count the sinks everywhere; in the released code the search has them on top of the span",
            "rules are per key head: grouped heads keep their memory advantage, where the released code "
            "repeats keys and values; influence is the largest of a group's query heads, as there",
            "the programme is solved by HiGHS, not Gurobi",
            "of the Pareto plans the four of least predicted loss are run at the unseen length, not all",
            "a rule with beta=1 and alpha>=0 keeps everything, however long the generation gets",
            "prompts may continue a cache, and left-padded rows have spans of their own length; neither is "
            "possible in the released code",
        ),
        limits=(
            "the influence of a few thousand tokens is noisy: more rows of calibration text, better plans",
            "windows are those of the prompt plus new_tokens: later they slide, but no longer grow",
            "what has left a head's window is gone for that head, also when a cache is cropped",
            "a prompt in pieces has the windows of the length so far, not of the whole",
            "the mean span is what density bounds; a prompt computes more of its pairs than that, since "
            "early queries see all they can",
        ),
    )

    looks_ahead: ClassVar[bool] = False

    density: float = param(0.5, "mean span of all heads over the input's length, sinks included", gt=0, le=1)
    new_tokens: int = param(1024, "windows are sized for the prompt plus this many tokens", ge=0)
    block_size: int = param(64, "spans are whole blocks, the first is the sinks: 16, 32, 64 or 128", ge=16)
    profile_block: int | None = param(
        None, "block of the influence profile (default: block_size, or 1/16 of the shortest length)", ge=4
    )
    supervision: str = param(
        "text",
        "whose next tokens the profiled loss is of: the text's, or the dense model's own",
        choices=("text", "model"),
    )
    effect: str = param(
        "blocks",
        "what counts of a block: the magnitude of its effects' sum, or the sum of their magnitudes",
        choices=("blocks", "elements"),
    )
    plan: str = param("", "JSON file of rules, or uniform (0 + density N for all heads), instead of a search")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size not in (16, 32, 64, 128):
            raise SparselandError(
                f"moa: block_size={self.block_size} is not allowed; it must be 16, 32, 64 or 128"
            )
        if self.plan not in ("", "uniform"):
            load_plan(self.plan)

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"prefill", "store"})

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """A quarter and the paper's half, with room for an eighth of the prompt in new tokens.

        At a few thousand tokens the paper's 1024 new tokens would make most windows the whole prompt.
        """
        size = 64 if length >= 2048 else 32
        new = min(1024, length // 8)
        return [cls(density=d, new_tokens=new, block_size=size) for d in (0.25, 0.5)]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(density=1.0)

    # --------------------------------------------------------- calibration

    @property
    def calibration_key(self) -> str:
        """Windows are scaled to the prompt afterwards: room for new tokens is no part of the search."""
        return type(self)(**{**self.params(), "new_tokens": 1024}).spec

    @property
    def _searches(self) -> bool:
        return not self.plan and self.density < 1

    @property
    def learns_from_text(self) -> bool:
        return self._searches

    def calibrate(self, model: nn.Module, ids: Int[Tensor, "B N"]) -> Calibration:
        """Profile, optimise and validate on ``ids`` (with a plan or at density 1: nothing to do).

        ``meta["rules"]`` is a list over layers of lists over key heads of ``{"alpha": tokens, "beta":
        share}``, to be kept with :func:`save_plan`; beside it the lengths, predicted and validated losses.
        """
        if not self._searches:
            return Calibration()
        from sparseland.cache._moa_search import search

        return Calibration(search(model, ids, self))

    def check_calibration(self, calibration: Calibration, shapes: Mapping[int, LayerShape]) -> None:
        """One rule for every layer and key head, where rules come from the search."""
        if not self._searches:
            return
        plan = PLAN.table(calibration.meta.get("rules"), "moa: the calibration")
        if len(plan) != max(shapes) + 1:
            raise SparselandError(
                f"moa: the calibration has rules for {len(plan)} layers, this model has {max(shapes) + 1}"
            )
        for layer, shape in shapes.items():
            per_head(plan[layer], shape.kv_heads)

    def _rules(self, layer: int, calibration: Calibration | None) -> Rule | tuple[Rule, ...]:
        """This layer's rules, one per key head, or one for all."""
        if self.plan == "uniform" or self.density == 1:
            return Rule(0, self.density)
        if self.plan:
            table = load_plan(self.plan)
            if layer >= len(table):
                raise SparselandError(f"{self.plan} has no layer {layer}")
            return table[layer]
        if calibration is None or "rules" not in calibration.meta:
            return Rule(0, self.density)
        value = calibration.meta["rules"]
        if not isinstance(value, list) or layer >= len(value):
            raise SparselandError(f"moa: the calibration has no layer {layer}")
        return PLAN.table([value[layer]], "moa: the calibration")[0]

    # -------------------------------------------------------------- prompts

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        rules = per_head(self._rules(x.layer, calibration), x.k.shape[1])
        return span_pattern(rules, x, self.block_size, self.new_tokens)

    # ---------------------------------------------------------------- cache

    def new_store(
        self,
        layer: int,
        calibration: Calibration | None = None,
        *,
        n_layers: int | None = None,
        learner: nn.Module | None = None,
    ) -> SpanStore | None:
        rules = self._rules(layer, calibration)
        if all(rule.full for rule in per_head(rules)):
            return None
        return SpanStore(rules, self.block_size, self.block_size, self.new_tokens)


def span_pattern(rules: Sequence[Rule], x: AttentionInputs, block_size: int, new_tokens: int) -> Pattern:
    """Blocks of sinks and window per query head, by closed form: the key heads' ``rules`` at this length.

    Where the prompt continues a cache (``x.offset > 0``) a query sees of it what a ring is sure to hold:
    the sinks and the whole blocks of the span at ``x.offset`` tokens, rounded down. See
    :class:`~sparseland.cache._moa_store.SpanStore`: a ring may have been sized at any earlier length, and
    since ``beta <= 1`` it has kept at least that many of the tokens that came later.
    """
    n_queries, n_keys, size, device = x.q.shape[2], x.k.shape[2], block_size, x.q.device
    offset = x.offset
    if all(rule.full for rule in rules):
        return WindowPattern.dense(n_queries, n_keys)
    columns = cdiv(n_keys, size)
    spans, held = [], []
    for rule in rules:
        spans.append(columns if rule.full else rule.blocks(n_keys + new_tokens, size))
        known = 0 if rule.full else offset - (rule.blocks(offset, size, up=False) - 1) * size
        held.append(max(0, cdiv(known, size)))
    if min(spans) >= columns and max(held) <= 1:
        return WindowPattern.dense(n_queries, n_keys)
    span, first_held = _on_device((tuple(spans), tuple(held)), device).repeat_interleave(x.group, 1)

    first = torch.arange(cdiv(n_queries, size), device=device) * size + offset
    last = (first + size - 1).clamp(max=n_keys - 1) // size  # the block of a row's last query
    low = torch.maximum(first // size - span[:, None] + 2, first_held[:, None]).clamp(min=1)  # [H, Mq]
    counts = (last - low + 1).clamp(min=0) + 1
    longest = min(columns, max(spans) + (1 if offset % size else 0))
    place = torch.arange(longest, device=device)
    indices = torch.where(place > 0, low[..., None] + place - 1, 0)
    return BlockPattern(n_queries, n_keys, size, counts[None].to(torch.int32), indices[None].to(torch.int32))


@lru_cache(maxsize=1024)
def _on_device(values: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """A small table, copied to the device once: a copy at every call would wait for the device."""
    return torch.tensor(values, device=device)
