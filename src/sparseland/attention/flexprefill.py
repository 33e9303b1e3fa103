"""FlexPrefill: each head's pattern and budget are found per prompt, to keep a given part of the attention.

Lai, Lu, Luo, Ma, Zhou: *FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence
Inference* (2025), section 4 and algorithms 1-3.

With blocks of ``b`` tokens, ``M`` of them, and the last block of queries Q^ as probe, per query head::

    P    = softmax(Q^ k^T scale), causal
    a_v  = mean_i P_ij                  a_s[o] = mean_i P_{i, i-o}
    A_v, A_s = sums of a_v, a_s over blocks of keys and of distances
    p^   = softmax(mean(Q^) . mean_b(k) scale)
    D    = sqrt(JS(p^ || A_v));  the head is query-aware if D < tau, else vertical-slash

    vertical-slash   n = ceil(c / b) + 0 or 1, c = how many of the largest a reach mass gamma; the n_v best
                     blocks by A_v as columns, the n_s best by A_s as block diagonals
    query-aware      blocks of softmax_c(mean_r(q) . mean_c(k) scale), ranked over the whole map, until they
                     reach gamma of it; and the min_budget best columns and diagonals
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, Card, PrefillMethod, param
from sparseland.ops._dispatch import may_ask
from sparseland.ops.block_lists import block_lists
from sparseland.ops.block_scores import mean_pool, pooled_map, probe_distance, probe_sums
from sparseland.ops.top_values import covering, top_mask
from sparseland.patterns import BlockPattern, Pattern, WindowPattern, cdiv, in_pieces

# The query-aware heads' maps that may exist at once.
_MAP_BYTES = 1 << 30


@dataclass(frozen=True)
class FlexPrefill(PrefillMethod):
    """Blocks that cover ``gamma`` of the attention, by a pattern chosen per head and prompt."""

    card: ClassVar[Card] = Card(
        slug="flexprefill",
        title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
        paper="Lai et al. 2025, arXiv 2502.20766, ICLR 2025",
        site="attention",
        training="none",
        summary="per head and prompt query-aware blocks or vertical-slash, as many as cover gamma",
        claims=(
            "better speed at equal accuracy than MInference and fixed budgets on RULER and InfiniteBench "
            "(Llama-3.1-8B, GLM-4-9B, Yi-9B, Qwen2-7B)",
            "gamma trades speed for accuracy smoothly",
        ),
        deviations=(
            "zero probabilities count as 0 log 0 = 0 in the divergence; in the released code they give NaN, "
            "which makes the head vertical-slash",
            "the block that crosses gamma in the query-aware map is kept, so that gamma is reached as in the "
            "paper's objective; the released code drops it",
            "coverage is turned into blocks of the size in use; the released code always divides by 128",
            "distances are pooled from 0 upwards; the released code pools from the far end, which shifts the "
            "groups when the length is no multiple of the block size",
            "gamma=1 is dense, whatever rounding does to the sums",
            "in the query-aware map, blocks that weigh exactly as much as the one that crosses gamma are "
            "kept with it",
            "a head whose estimates are not finite (NaN or infinity in its queries or keys) is dense",
            "neighbours=1 (not the default) is ours: it also computes the block before each query block",
        ),
        limits=(
            "the chosen blocks' mass can lie below gamma: tokens are counted, but blocks are picked by "
            "pooled sums, and a block of distances straddles two block diagonals of which one is computed: "
            "a block's first queries can miss their own predecessors, which costs SmolLM2 a quarter to two "
            "fifths of what it loses at 4K (neighbours=1 computes these, at equal density)",
            "the query-aware ranking is over the whole map: rows of flat attention may get only the minimum",
            "vertical-slash heads miss keys that only queries before the last block look for",
            "which pairs early queries compute depends on the prompt's last queries",
            "in chunked prefill the probe is each chunk's last block of queries; a chunk that does not start "
            "at a multiple of block_size computes up to twice the diagonals",
        ),
    )

    gamma: float = param(0.9, "part of the attention mass to cover", gt=0, le=1)
    tau: float = param(0.1, "largest distance at which pooled scores are trusted (0: never)", ge=0, le=1)
    min_budget: int = param(512, "at least this many tokens of columns, and of diagonals", ge=1)
    max_budget: int | None = param(None, "at most this many tokens of columns, and of diagonals", ge=1)
    neighbours: int = param(0, "blocks just before a query's own that are always computed", ge=0)
    block_size: int = param(128, "queries and keys per block: 16, 32, 64 or 128", ge=16, le=128)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size not in (16, 32, 64, 128):
            raise SparselandError(
                f"flexprefill: block_size={self.block_size} is not allowed; it must be 16, 32, 64 or 128"
            )
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise SparselandError(
                f"flexprefill: max_budget={self.max_budget} is below min_budget={self.min_budget}"
            )

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """The paper's setting, then ``tau=1`` with the block before a query's own and growing budgets.

        Blocks are smaller at short lengths. On SmolLM2, at equal density, trusting the pooled scores of every
        head lost a half to a fifth of what vertical-slash heads lost; the block before a query's own, without
        which the first queries of a block miss their predecessors, took two fifths off that.
        """
        size = 64 if length <= 16_384 else 128
        return [
            cls(
                gamma=gamma, tau=tau, min_budget=min(cap, max(size, length // part // size * size)),
                neighbours=neighbours, block_size=size,
            )
            for gamma, tau, part, cap, neighbours in (
                (0.9, 0.1, 8, 512, 0), (0.9, 1.0, 8, 1024, 1), (0.95, 1.0, 8, 1024, 1),
                (0.95, 1.0, 4, 2048, 1),
            )
        ]  # fmt: skip

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(gamma=1.0)

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys, size = x.q.shape[2], x.k.shape[2], self.block_size
        least, columns = cdiv(self.min_budget, size), cdiv(n_keys, size)
        if n_keys <= max(2, least) * size:
            return WindowPattern.dense(n_queries, n_keys)
        most = columns if self.max_budget is None else min(columns, cdiv(self.max_budget, size))
        probe = min(size, n_queries)
        # Entry 0: a_v and A_v, entry 1: a_s and A_s, as sums over the probe's rows.
        tokens, sums = probe_sums(x.q, x.k, probe, size, x.scale)
        mass = math.inf if self.gamma >= 1 else self.gamma * probe
        budget = covering_blocks(tokens, mass, size).clamp(least, most)

        keys = mean_pool(x.k, size)
        trusted = probe_distance(x.q, keys, sums[0], probe, x.scale) < self.tau  # [B, H]; NaN is no
        budget = torch.where(trusted, least, budget)
        if self.max_budget is not None:
            # Where estimates are not finite, the head is dense, whatever the maximum.
            budget = torch.where(sums.sum(-1).isfinite(), budget, columns)
        # The first keys, and each query's own neighbourhood, come before all others.
        vertical, slash = top_mask(sums, budget, forced=1)
        if self.neighbours:
            slash[..., 1 : 1 + self.neighbours] = True
        bands = block_bands(slash, x.offset % size)
        awareness = self._query_aware(x, keys, trusted)

        def lists(start: int, stop: int) -> BlockPattern:
            seen = x.offset + stop
            blocks = vertical[..., : cdiv(seen, size)]
            weights, threshold = (None, None) if awareness is None else awareness.chosen(start, stop)
            counts, indices = block_lists(
                stop - start, seen, size, columns=blocks, bands=bands, weights=weights, threshold=threshold,
                active=None if awareness is None else trusted,
            )  # fmt: skip
            return BlockPattern(stop - start, seen, size, counts, indices)

        return in_pieces(lists, n_queries, n_keys, size, 4 * columns * trusted.numel())

    def _query_aware(
        self, x: AttentionInputs, keys: Float[Tensor, "B Hkv Mk D"], trusted: Bool[Tensor, "B H"]
    ) -> QueryAware | None:
        """What the trusted heads choose, unless there is surely none."""
        if self.tau == 0 or (may_ask(trusted) and not bool(trusted.any())):
            return None
        return QueryAware(x, keys, trusted, self.gamma, self.block_size)


class QueryAware:
    """The blocks of the map of block means that together reach ``gamma`` of it, head by head.

    Each row of the map sums to 1. It is held for all heads at once if it is small enough, else for some heads
    while their threshold is found, and for a stretch of queries while their lists are made.
    """

    def __init__(
        self,
        x: AttentionInputs,
        keys: Float[Tensor, "B Hkv Mk D"],
        trusted: Bool[Tensor, "B H"],
        gamma: float,
        size: int,
    ) -> None:
        self.x, self.keys, self.trusted, self.size = x, keys, trusted, size
        self.queries = mean_pool(x.q, size, active=trusted)
        batch, heads, rows = self.queries.shape[:3]
        mass = math.inf if gamma >= 1 else gamma * rows
        step = max(1, _MAP_BYTES // (4 * batch * x.group * rows * keys.shape[2])) * x.group
        self.map = self._map(slice(0, heads)) if step >= heads else None
        thresholds = []
        for start in range(0, heads, step):
            some = slice(start, start + step)
            weights = self._map(some) if self.map is None else self.map
            # In a head with a NaN, or that never reaches the mass, the threshold is 0: all blocks.
            thresholds.append(covering(weights.flatten(-2), mass, trusted[:, some])[0])
        self.threshold = thresholds[0] if len(thresholds) == 1 else torch.cat(thresholds, 1)

    def _map(self, heads: slice) -> Float[Tensor, "B h Mq Mk"]:
        own = slice(heads.start // self.x.group, cdiv(heads.stop, self.x.group))
        sizes = (self.x.q.shape[2], self.x.k.shape[2])
        return self._weigh(self.queries[:, heads], self.keys[:, own], self.trusted[:, heads], *sizes)

    def _weigh(
        self, queries: Tensor, keys: Tensor, active: Tensor, n_queries: int, n_keys: int
    ) -> Float[Tensor, "B h m n"]:
        sizes = (n_queries, n_keys, self.size)
        return pooled_map(queries, keys, *sizes, self.x.scale, normalise=True, active=active)

    def chosen(self, start: int, stop: int) -> tuple[Float[Tensor, "B H m n"], Float[Tensor, "B H"]]:
        """The map's rows of the queries [start, stop), up to the keys that they see, and what they need."""
        if self.map is not None and stop - start == self.x.q.shape[2]:
            return self.map, self.threshold
        rows, seen = slice(start // self.size, cdiv(stop, self.size)), self.x.offset + stop
        keys = self.keys[:, :, : cdiv(seen, self.size)]
        weights = self._weigh(self.queries[:, :, rows], keys, self.trusted, stop - start, seen)
        # Weights that are computed again may round otherwise: the block that crosses must not be lost.
        return weights, self.threshold * (1 - 1e-6)


def covering_blocks(scores: Float[Tensor, "*batch n"], mass: float, block_size: int) -> Int[Tensor, "*batch"]:
    """How many blocks' worth of tokens it takes until the largest scores exceed ``mass``."""
    return covering(scores, mass)[1] // block_size + 1


def block_bands(slash: Bool[Tensor, "B H Mk"], shift: int) -> Bool[Tensor, "B H W"]:
    """Diagonals of blocks for distances in blocks: entry 1 + d stands for ``d`` blocks before a query's own.

    A query block that starts at position p takes, for distance s, the keys ``p - s b ... p - s b + b - 1``:
    one block where p is a multiple of b, the two it touches where a chunk starts ``shift`` tokens later.
    """
    bands = F.pad(slash, (1, 0))
    return bands | F.pad(slash, (0, 1)) if shift else bands
