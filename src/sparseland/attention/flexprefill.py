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
from sparseland.ops.block_scores import mean_pool, pooled_scores, probe_vertical_slash
from sparseland.patterns import BlockPattern, Pattern, WindowPattern, cdiv


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
        ),
        limits=(
            "the chosen blocks' mass can lie below gamma: tokens are counted, but blocks are picked by "
            "pooled sums, and a block of distances straddles two block diagonals of which one is computed",
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
        """The paper's coverages; at short lengths with smaller blocks, and larger and larger minima.

        A small model at a few thousand tokens spreads its attention wider than the paper's: coverage alone
        loses several percent, and the minimum is what buys it back.
        """
        size = 64 if length <= 16_384 else 128
        return [
            cls(gamma=gamma, min_budget=min(cap, max(size, length // part // size * size)), block_size=size)
            for gamma, part, cap in ((0.9, 8, 512), (0.95, 8, 1024), (0.95, 4, 2048), (0.95, 2, 4096))
        ]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(gamma=1.0)

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys, size = x.q.shape[2], x.k.shape[2], self.block_size
        least, columns = cdiv(self.min_budget, size), cdiv(n_keys, size)
        if n_keys <= max(2, least) * size:
            return WindowPattern.dense(n_queries, n_keys)
        most = columns if self.max_budget is None else cdiv(self.max_budget, size)
        probe = min(size, n_queries)
        sums = probe_vertical_slash(x.q, x.k, probe, x.scale)
        scores = torch.stack(sums) / probe  # [2, B, H, Nk]: a_v and a_s
        budget = covering_blocks(scores, self.gamma, size).clamp(least, min(most, columns))
        pooled = sum_blocks(scores, size)  # [2, B, H, Mk]: A_v and A_s

        trusted = self._query_aware(x, probe, pooled[0])  # [B, H]
        budget = torch.where(trusted, least, budget)
        pooled[..., 0] = torch.inf  # the first keys, and each query's own neighbourhood
        vertical, slash = top_mask(pooled, budget)
        blocks = vertical[:, :, None, :] | block_diagonals(slash, n_queries, n_keys, size)
        blocks |= covering_map(pooled_scores(x.q, x.k, size, x.scale), self.gamma) & trusted[..., None, None]
        return BlockPattern.from_block_mask(blocks, size, n_queries, n_keys)

    def _query_aware(
        self, x: AttentionInputs, probe: int, true: Float[Tensor, "B H Mk"]
    ) -> Bool[Tensor, "B H"]:
        """Whether the probe's attention per block is well told by block means."""
        batch, heads, _, dim = x.q.shape
        q = x.q[:, :, -probe:].float().mean(2).reshape(batch, x.k.shape[1], -1, dim)
        k = mean_pool(x.k, self.block_size).float()
        guess = (q @ k.transpose(-1, -2) * x.scale).softmax(-1).reshape(batch, heads, -1)
        return js_distance(guess, true) < self.tau


def js_distance(p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Square root of the Jensen-Shannon divergence in nats, in [0, sqrt(ln 2)]; zeros are allowed."""
    m = (p + q) / 2
    # Where m is 0, p and q are too and xlogy(0, 0) is 0 on both sides.
    divergence = sum((torch.xlogy(a, a) - torch.xlogy(a, m)).sum(-1) for a in (p, q)) / 2
    assert isinstance(divergence, Tensor)
    return divergence.clamp(min=0).sqrt()


def covering_blocks(
    scores: Float[Tensor, "*batch n"], gamma: float, block_size: int
) -> Int[Tensor, "*batch"]:
    """How many blocks' worth of tokens it takes until the largest scores reach ``gamma``."""
    return _covering(scores.sort(dim=-1, descending=True).values, gamma) // block_size + 1


def covering_map(scores: Float[Tensor, "B H Mq Mk"], gamma: float) -> Bool[Tensor, "B H Mq Mk"]:
    """The fewest blocks of the whole map whose row-softmaxed ``scores`` reach ``gamma`` of it."""
    weights, order = scores.softmax(-1).flatten(-2).sort(dim=-1, descending=True, stable=True)
    count = _covering(weights, gamma, total=scores.shape[-2])
    return _mark(order, count).reshape(scores.shape)


def _covering(
    descending: Float[Tensor, "*batch n"], gamma: float, total: float = 1.0
) -> Int[Tensor, "*batch"]:
    """How many leading values exceed ``gamma * total``; more than there are if gamma is 1."""
    mass = math.inf if gamma >= 1 else gamma * total
    return 1 + (descending.cumsum(-1, dtype=torch.float64) <= mass).sum(-1)


def sum_blocks(scores: Float[Tensor, "*batch n"], block_size: int) -> Float[Tensor, "*batch m"]:
    """Sums of ``block_size`` neighbours."""
    padded = F.pad(scores, (0, -scores.shape[-1] % block_size))
    return padded.reshape(*scores.shape[:-1], -1, block_size).sum(-1)


def top_mask(scores: Float[Tensor, "*batch n"], count: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch n"]:
    """Marks the ``count`` largest, ties to the earlier."""
    return _mark(scores.argsort(dim=-1, descending=True, stable=True), count)


def _mark(order: Int[Tensor, "*batch n"], count: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch n"]:
    """True at the first ``count`` positions that ``order`` names."""
    taken = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def block_diagonals(
    slash: Bool[Tensor, "B H Mk"], n_queries: int, n_keys: int, block_size: int
) -> Bool[Tensor, "B H Mq Mk"]:
    """Key blocks at the chosen distances (in blocks) before each query block.

    A query block that starts at position p takes, for distance s, the keys ``p - s b ... p - s b + b - 1``:
    one block where p is a multiple of b, the two it touches where a chunk starts elsewhere.
    """
    offset, m = n_keys - n_queries, slash.shape[-1]
    row = torch.arange(cdiv(n_queries, block_size), device=slash.device) + offset // block_size
    distance = row[:, None] - torch.arange(m, device=slash.device)  # in blocks, -1 for one to the right
    bands = F.pad(slash, (0, 1))  # the last entry stands for "no such distance"
    blocks = bands[..., torch.where(distance >= 0, distance, m)]
    if offset % block_size:
        blocks = blocks | bands[..., torch.where(distance >= -1, distance + 1, m).clamp(max=m)]
    return blocks
