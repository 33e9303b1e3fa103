"""MMInference: MInference for prompts that mix text and video, by permuting tokens into dense blocks.

Li, Jiang, Zhang, Wu, Luo, Ahn, Abdi, Li, Gao, Yang, Qiu: *MMInference: Accelerating Pre-filling for
Long-Context VLMs via Modality-Aware Permutation Sparse Attention* (2025), sections 3 and 4.

Heads differ in two things, found offline:

- the shape of attention within one modality: A-shape, vertical-slash, or *grid*: lines at the distance of
  a video's frames, dense once tokens are sorted by ``j mod stride``;
- what happens at a border of modalities: nothing (*no-boundary*; a border along the keys alone is served by
  vertical-slash, too), a shape per modality of the queries (*Q-boundary*), or one per modality of queries
  and of keys (*2D-boundary*), whose parts are merged by their log-sum-exp.

Where the lines, columns and diagonals lie is found per prompt from the last 64 queries of each modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparseland.attention._head_shapes import HeadShape
from sparseland.attention._mminference_grid import grid
from sparseland.attention._mminference_heads import BOUNDARIES, PATTERNS, HeadPlan, Shape
from sparseland.attention._mminference_index import MixedIndex
from sparseland.attention._mminference_layout import Layout, layout_of
from sparseland.attention._shape_index import LOCAL, SINKS, LayerIndex, Sizes
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, Card, LayerShape, PrefillMethod, param
from sparseland.ops.permuted_attention import on_device
from sparseland.patterns import Part, PartsPattern, Pattern, WindowPattern

# MInference's budget, for heads without a plan of their own.
DEFAULT_VERTICAL, DEFAULT_SLASH = 1000, 6096
DEFAULT_SHAPE = Shape("vertical-slash", DEFAULT_VERTICAL, DEFAULT_SLASH)

__all__ = ["HeadPlan", "MMInference", "Shape", "load_patterns", "save_patterns"]


def save_patterns(path: str | Path, heads: Sequence[Sequence[HeadPlan | dict[str, Any]]]) -> Path:
    """Write per-head patterns (``Calibration.meta["heads"]``) to a JSON file that ``patterns=`` reads.

    Raises:
        SparselandError: the patterns are malformed, or the file can't be written.
    """
    return PATTERNS.save(path, heads)


def load_patterns(path: str | Path) -> tuple[tuple[HeadPlan, ...], ...]:
    """Read what :func:`save_patterns` wrote, layers of query heads; again only when the file has changed.

    Raises:
        SparselandError: not there, not JSON, of another format or a newer version, or malformed.
    """
    return PATTERNS.load(path)


@dataclass(frozen=True)
class MMInference(PrefillMethod):
    """Per head a shape within each modality and a way over their borders.

    Budgets are as MInference's: in tokens, for prompts of 30k tokens and more; with a calibration they scale
    the sizes that were found, but for a grid's lines. Without a calibration, and with the same plans, pure
    text is computed as by MInference; this method's own search tries fewer shapes (see the card).
    """

    left_out: ClassVar[str | None] = "it is for images and video"
    card: ClassVar[Card] = Card(
        slug="mminference",
        title="MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation "
        "Sparse Attention",
        paper="Li et al. 2025, arXiv 2504.16083, ICML 2025",
        site="attention",
        training="calibration",
        summary="text and video: grid, vertical-slash or A-shape per head and modality, permuted to blocks",
        claims=(
            "up to 8.3x faster prefill at 1M tokens with accuracy kept (LongVila, Llava-Video, "
            "VideoChat-Flash, Qwen2.5-VL on video QA, captioning, Vision-NIAH and Mixed-Modality-NIAH)",
        ),
        deviations=(
            "written from the paper's description: its kernels and search have not been released",
            "a grid computes the lines of the best phases for all queries, all keys for the queries on these "
            "lines, and each other query's own place in all frames; text in a grid is on a line",
            "the stride is found from diagonals as well as from columns, less what flat attention would "
            "give, so that divisors and multiples of it lose; per video, not globally",
            "30 sinks and the 100 nearest tokens are always computed, in the prompt's own order, for heads "
            "that are split or permuted; distances and causality are those of the prompt",
            "a border along the keys alone has no type of its own: vertical-slash finds its columns",
            "without a search, mixed prompts are split by the queries' modality, vertical-slash for both",
            "costs are matched by the number of computed pairs, as in our MInference; the two-dimensional "
            "split shares a modality's cost among its keys by the causal pairs of each",
            "the search leaves out two of the candidates of our MInference, block-sparse heads and the "
            "(30, 2048) proportion: after a search pure text need not get what MInference would give it",
            "a grid's lines are as many at any length and budget",
            "a prompt without a video (256 tokens of vision or more in one stretch, or in frames of one size "
            "with at most 32 tokens between them) has no grid: vertical-slash at the budget takes its place",
        ),
        limits=(
            "decoding is dense",
            "a key that only queries before a modality's last 64 look for is not found",
            "beside a video, text and vision outside of videos are on a line of a grid, so dense: a head "
            "without a boundary whose grid meets little video and much text computes almost all pairs",
            "which tokens are vision is read from input_ids: a call with inputs_embeds alone counts as text",
            "in chunked prefill each chunk is probed by its own queries; a video of earlier chunks is known "
            "by its columns only",
            "gradients need the reference backend, which is N x N in memory",
        ),
    )
    reads_vision: ClassVar[bool] = True

    vertical: int = param(DEFAULT_VERTICAL, "key columns of a head, in tokens (at least 30 are taken)", ge=1)
    slash: int = param(DEFAULT_SLASH, "diagonals of a head, in tokens (at least 50 are taken)", ge=1)
    patterns: str = param("", "JSON file of per-head plans, used as they are instead of a search")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patterns:
            load_patterns(self.patterns)

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """As MInference's: many columns and few diagonals, in proportion to 30k tokens."""
        return [
            cls(vertical=max(30, length * vertical // 30_000), slash=max(100, length * slash // 30_000))
            for vertical, slash in ((1000, 100), (3500, 100), (3500, 2000))
        ]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(vertical=length, slash=length)

    @property
    def calibration_key(self) -> str:
        """The search does not depend on the budget: sizes are scaled to it afterwards."""
        return self.card.slug if not self.patterns else self.spec

    @property
    def learns_from_text(self) -> bool:
        return not self.patterns

    def calibrate(self, model: nn.Module, ids: Int[Tensor, "B N"]) -> Calibration:
        """Search every head's plan on ``ids`` (with a patterns file: nothing to search).

        ``meta["heads"]`` is a list over layers of lists over query heads in the form that
        :func:`save_patterns` writes. Token ids hold no pixels: for heads that see real images use
        :func:`sparseland.attention._mminference_search.search` with the model's whole input, save what it
        finds, and pass the file as ``patterns``.
        """
        if self.patterns:
            return Calibration()
        from sparseland.attention._mminference_search import search

        heads = search(model, {"input_ids": ids})
        return Calibration({"length": ids.shape[-1], "heads": [[h.as_dict() for h in row] for row in heads]})

    def check_calibration(self, calibration: Calibration, shapes: Mapping[int, LayerShape]) -> None:
        """A plan for every layer and head."""
        for layer, shape in shapes.items():
            self._heads(layer, shape.heads, calibration)

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys = x.q.shape[2], x.k.shape[2]
        if not self.patterns and max(self.vertical, self.slash) >= n_keys:
            return WindowPattern.dense(n_queries, n_keys)
        layout = None if x.vision is None else layout_of(x.vision)
        if layout is not None and layout.n != n_keys:
            raise SparselandError(f"mminference: {layout.n} tokens are marked, but there are {n_keys}")
        shape = Shape("vertical-slash", self.vertical, self.slash)
        return plan_pattern(x, layout, self._heads(x.layer, x.q.shape[1], calibration), without_grid=shape)

    def _heads(self, layer: int, n_heads: int, calibration: Calibration | None) -> Sequence[HeadPlan]:
        """The plans of this layer's heads: from the file, from the calibration, or split by query."""
        if self.patterns:
            table = load_patterns(self.patterns)
            row: Sequence[HeadPlan] = table[layer] if layer < len(table) else ()
            source = self.patterns
        elif calibration is None or "heads" not in calibration.meta:
            shape = Shape("vertical-slash", self.vertical, self.slash)
            return [HeadPlan.by_query(shape, shape)] * n_heads
        else:
            source, heads = "mminference: the calibration", calibration.meta["heads"]
            if not isinstance(heads, list) or layer >= len(heads):
                raise SparselandError(f"{source} has no layer {layer}")
            factor = (self.vertical + self.slash) / (DEFAULT_VERTICAL + DEFAULT_SLASH)
            row = [head.scaled(factor) for head in PATTERNS.table([heads[layer]], source)[0]]
        if len(row) != n_heads:
            raise SparselandError(
                f"{source}: layer {layer} has {len(row)} heads in the plans and {n_heads} in the model"
            )
        return row


def plan_pattern(
    x: AttentionInputs,
    layout: Layout | None,
    plans: Sequence[HeadPlan],
    index: MixedIndex | None = None,
    without_grid: Shape = DEFAULT_SHAPE,
) -> Pattern:
    """The pairs of one layer's heads by their plans.

    Args:
        layout: where the text and vision lie; None: nothing is vision.
        index: estimates of these inputs that have been made before.
        without_grid: what a grid becomes where there is no video.
    """
    if layout is None or not layout.mixed:
        plans = [plan.alone(layout is not None and layout.has_vision) for plan in plans]
    if layout is None or not layout.segments:
        plans = [plan.with_grids_as(without_grid) for plan in plans]
    plain = [h for h, plan in enumerate(plans) if _is_plain(plan)]
    if len(plain) == len(plans):
        own = [HeadShape(s.shape, s.vertical, s.slash) for s in (plan["all"] for plan in plans)]
        sizes = Sizes.of(own, x.k.shape[2], x.q.device)
        return (LayerIndex(x) if index is None else index.whole).pattern(sizes)
    assert layout is not None
    split = [h for h in range(len(plans)) if h not in set(plain)]
    base = WindowPattern(x.q.shape[2], x.k.shape[2], SINKS, LOCAL)
    parts = [Part(tuple(split), base)]
    if plain:
        parts.append(Part(tuple(plain), _minference(x, plain, plans)))
    index = index or MixedIndex(x, layout)
    for region in dict.fromkeys(region for names in BOUNDARIES.values() for region in names):
        a, _, b = region.partition("-")
        having = [h for h in split if region in dict(plans[h].shapes)]
        for permuted in (False, True):
            heads = [h for h in having if (plans[h][region].shape == "grid") == permuted]
            if heads:
                make = grid if permuted else MixedIndex.vertical_slash
                parts += make(index, a, b or "all", heads, [plans[h][region] for h in heads])
    return PartsPattern(x.q.shape[2], x.k.shape[2], x.q.shape[0], x.q.shape[1], tuple(parts))


def _is_plain(plan: HeadPlan) -> bool:
    """Whether MInference itself computes the head."""
    return plan.boundary == "none" and plan["all"].shape != "grid"


def _minference(x: AttentionInputs, heads: Sequence[int], plans: Sequence[HeadPlan]) -> Pattern:
    """MInference's pattern for some of the heads, with keys of their own each."""
    shapes = [plans[h]["all"] for h in heads]
    own = [HeadShape(s.shape, s.vertical, s.slash) for s in shapes]
    queries = on_device(tuple(heads), x.q.device)
    keys = on_device(tuple(h // x.group for h in heads), x.q.device)
    q, k, v = x.q.index_select(1, queries), x.k.index_select(1, keys), x.v.index_select(1, keys)
    return LayerIndex(AttentionInputs(q, k, v, x.scale, x.layer)).pattern(
        Sizes.of(own, x.k.shape[2], x.q.device)
    )
