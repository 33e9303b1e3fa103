"""MInference: one of three sparse shapes per head, found offline; where it lies, found per prompt.

Jiang, Li, Zhang, Wu, Luo, Ahn, Han, Abdi, Li, Lin, Yang, Qiu: *MInference 1.0: Accelerating Pre-filling for
Long-Context LLMs via Dynamic Sparse Attention* (2024), section 3 and algorithms 1-3.

Per query head, with N keys (section 3.2)::

    vertical-slash   P = softmax(q[-64:] k^T scale), causal                     [64, N]
                     c_j = sum_i P_ij                  columns: 30 sinks, then the largest
                     g_o = sum_i P_{i, i-o}            diagonals: 100 nearest, then the largest
                     pairs (i, j) with j in columns or i - j in diagonals
    a-shape          pairs with j < sinks or i - j < window
    block-sparse     top key blocks of 64 per query block by mean(q) . mean(k)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparseland.attention._head_shapes import PATTERNS, HeadShape
from sparseland.attention._shape_index import LayerIndex, Sizes
from sparseland.attention._shape_search import search
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, Card, LayerShape, PrefillMethod, param
from sparseland.patterns import Pattern, WindowPattern

# The paper's budget, for heads without a pattern of their own.
DEFAULT_VERTICAL, DEFAULT_SLASH = 1000, 6096

__all__ = ["HeadShape", "MInference", "load_patterns", "save_patterns"]


def save_patterns(path: str | Path, heads: Sequence[Sequence[HeadShape | dict[str, Any]]]) -> Path:
    """Write per-head patterns (``Calibration.meta["heads"]``) to a JSON file that ``patterns=`` reads.

    Raises:
        SparselandError: the patterns are malformed, or the file can't be written.
    """
    return PATTERNS.save(path, heads)


def load_patterns(path: str | Path) -> tuple[tuple[HeadShape, ...], ...]:
    """Read what :func:`save_patterns` wrote, layers of query heads; again only when the file has changed.

    Raises:
        SparselandError: not there, not JSON, of another format or a newer version, or malformed.
    """
    return PATTERNS.load(path)


@dataclass(frozen=True)
class MInference(PrefillMethod):
    """Columns and diagonals (or blocks, or sinks and window) per head, estimated from the last 64 queries.

    Budgets are in tokens, as the paper's are, and belong to its prompts of 30k tokens and more:
    ``vertical`` or ``slash`` that reach the prompt's length mean dense attention. With a calibration, each
    head has the sizes that were searched for it, times ``(vertical + slash) / (1000 + 6096)``.
    """

    card: ClassVar[Card] = Card(
        slug="minference",
        title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        paper="Jiang et al. 2024, arXiv 2407.02490, NeurIPS 2024",
        site="attention",
        training="calibration",
        summary="per head A-shape, vertical-slash or block-sparse, placed by the last 64 queries",
        claims=(
            "up to 10x faster prefill at 1M tokens on one A100 (1.8x at 100K, 4.1x at 300K), slower than "
            "dense below about 50K",
            "RULER 4K-128K mean, Llama-3-8B-Instruct-262k: 87.0 against 84.4 with full attention",
        ),
        deviations=(
            "the search's error is that of the attention output, as in the paper; the released code scores "
            "attention recall and then rewrites A-shape and block-sparse heads to vertical-slash, which is "
            "not done here",
            "a candidate's cost is its number of computed pairs (cost=pairs, the same on every machine), or "
            "the time that our kernels take for it on this device, matched per layer with all heads at once "
            "(cost=time); sizes are found by bisection instead of steps of 50 tokens; the uncalibrated "
            "proportion of columns to diagonals is one more candidate",
            "by default the search reads 2048 tokens of plain text; the paper's reads a key-value retrieval "
            "prompt of about 30k tokens",
            "texts shorter than the paper's 30k tokens are searched with a proportionally smaller budget, "
            "and sizes are scaled up again; they also scale with vertical + slash: one search serves all",
            "diagonals are covered by 64x64 blocks on the keys' grid (the authors' kernel shifts its "
            "blocks), so a lone diagonal costs two blocks per row instead of one; other columns are exact",
            "with a budget of fewer than 100 diagonals the nearest are taken; in the released code any of "
            "the 100 forced ones may be dropped, offset 0 among them",
            "block-sparse heads always compute the diagonal's blocks, and the last block's mean covers its "
            "valid tokens only",
            "a head whose probe is not finite (NaN or infinity in its queries or keys) takes all diagonals: "
            "it is dense",
        ),
        limits=(
            "a key that only queries before the last 64 look for is not found",
            "which pairs early queries compute depends on the prompt's last queries",
            "in chunked prefill the last 64 queries of each chunk are the probe, so chunks select otherwise "
            "than the whole prompt",
            "at a few thousand tokens the forced sinks and diagonals are a large part of all pairs",
        ),
    )

    vertical: int = param(DEFAULT_VERTICAL, "key columns of a head, in tokens (at least 30 are taken)", ge=1)
    slash: int = param(DEFAULT_SLASH, "diagonals of a head, in tokens (at least 50 are taken)", ge=1)
    cost: str = param("pairs", "what the search's candidates have in common", choices=("pairs", "time"))
    patterns: str = param("", "JSON file of per-head patterns, used as they are instead of a search")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patterns:
            load_patterns(self.patterns)

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """Many columns and few diagonals, as the released (3500, 100), in proportion to 30k tokens.

        The default's 6096 diagonals of 30k would leave little out at a few thousand tokens, where blocks of
        64 make each strewn diagonal cost a far larger part of all pairs.
        """
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
        return f"{self.card.slug}:cost={self.cost}" if not self.patterns else self.spec

    @property
    def learns_from_text(self) -> bool:
        return not self.patterns

    def calibrate(self, model: nn.Module, ids: Int[Tensor, "B N"]) -> Calibration:
        """Search every head's shape on ``ids`` (with a patterns file: nothing to search).

        ``meta["heads"]`` is a list over layers of lists over query heads of ``{"shape": "a-shape" |
        "vertical-slash", "vertical": tokens, "slash": tokens}`` or ``{"shape": "block-sparse",
        "blocks": n}``, at the paper's budget for 30k tokens; ``meta["length"]`` is the text's length,
        ``meta["cost"]`` what the candidates had in common.
        """
        if self.patterns:
            return Calibration()
        heads = [[head.as_dict() for head in row] for row in search(model, ids, self.cost)]
        return Calibration({"length": ids.shape[-1], "cost": self.cost, "heads": heads})

    def check_calibration(self, calibration: Calibration, shapes: Mapping[int, LayerShape]) -> None:
        """A shape for every layer and head."""
        for layer, shape in shapes.items():
            self._heads(layer, shape.heads, calibration)

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys = x.q.shape[2], x.k.shape[2]
        if not self.patterns and max(self.vertical, self.slash) >= n_keys:
            return WindowPattern.dense(n_queries, n_keys)
        return LayerIndex(x).pattern(
            Sizes.of(self._heads(x.layer, x.q.shape[1], calibration), n_keys, x.q.device)
        )

    def _heads(self, layer: int, n_heads: int, calibration: Calibration | None) -> Sequence[HeadShape]:
        """The shapes of this layer's heads: from the file, from the calibration, or all vertical-slash."""
        if self.patterns:
            table = load_patterns(self.patterns)
            row: Sequence[HeadShape] = table[layer] if layer < len(table) else ()
            source = self.patterns
        elif calibration is None or "heads" not in calibration.meta:
            return [HeadShape("vertical-slash", self.vertical, self.slash)] * n_heads
        else:
            source, heads = "minference: the calibration", calibration.meta["heads"]
            if not isinstance(heads, list) or layer >= len(heads):
                raise SparselandError(f"{source} has no layer {layer}")
            factor = (self.vertical + self.slash) / (DEFAULT_VERTICAL + DEFAULT_SLASH)
            row = [head.scaled(factor) for head in PATTERNS.table([heads[layer]], source)[0]]
        if len(row) != n_heads:
            raise SparselandError(
                f"{source}: layer {layer} has {len(row)} heads in the patterns and {n_heads} in the model"
            )
        return row
