"""AnchorAttention: single keys that come near the strongest local logit, shared by many queries.

Zhang, Guo, Feng, Sun, Zhang: *AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity*
(2025), section 3. With blocks of ``b`` tokens and groups of ``step`` query blocks, per query head::

    area(i)   key block 0, and the keys from the block before the group of query i up to i
    a[u]      = mean over i in query block u of max over j in area(i) of q_i . k_j scale      (the anchor)
    stripes   keys j between block 0 and the local keys of group g with
              a[u] - mean(q_u) . k_j scale <= theta    for some block u of g

Attention is computed over area and stripes in one softmax. A stripe is a key for all queries of its
group. Nothing is sorted, and there is no budget: how much is computed follows from theta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, Card, PrefillMethod, param
from sparseland.ops._dispatch import may_ask
from sparseland.ops.stripe_scores import local_starts, stripe_columns
from sparseland.patterns import (
    BlockColumnPattern,
    BlockPattern,
    ColumnPattern,
    Pattern,
    WindowPattern,
    cdiv,
    per_shape,
)

# Above any margin between finite logits of half-precision inputs: every key is a stripe.
_ALL = 1e30


@dataclass(frozen=True)
class AnchorAttention(PrefillMethod):
    """Block 0, local keys, and the keys within ``theta`` of the local maximum."""

    card: ClassVar[Card] = Card(
        slug="anchor-attention",
        title="AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
        paper="Zhang et al. 2025, arXiv 2505.23520",
        site="attention",
        training="none",
        summary="block 0, local keys, and single keys whose pooled logit comes near the local maximum",
        claims=(
            "1.44 times faster than FlexPrefill at 128K tokens at a higher recall (Llama-3.1-8B)",
            "stripes (many queries, one key) reach a recall at a lower density than blocks",
        ),
        deviations=(
            "areas and stripes are a partition, as in the paper; the released kernel (v4) computes keys "
            "between block 0 and the end of group 0 twice and the last block before each group never",
            "a last group that is not full is computed like the others; the released code makes it dense",
            "anchors, pooled queries and their logits are compared in float32; the released code rounds "
            "them to bfloat16, which moves keys across the threshold",
            "a group's list holds at most max_stripes keys: where more pass, its threshold is lowered up to "
            "seven times by theta / 8, or by 1 where theta is below 8 (to theta / 8, or theta - 7), until "
            "they fit, and if they never do, the nearest stay",
            "groups are counted from the first query of each call, which matters only in chunked prefill",
        ),
        limits=(
            "a key that few queries of a block look for is averaged away with the mean query",
            "with a flat head many keys lie within theta, and the head is computed almost densely",
            "which keys a query sees depends on the later queries of its group",
            "chunks that start at multiples of step * block_size compute what the whole prompt would; "
            "others are cut into other groups",
            "theta is in logits: the paper's 12 was chosen on models of head size 128 at long contexts",
        ),
    )
    chunkable: ClassVar[bool] = True  # at the borders of groups

    theta: float = param(12.0, "how far below the anchor a logit may be, in natural log units")
    step: int = param(16, "query blocks that share their stripes", ge=1, le=64)
    block_size: int = param(128, "queries and keys per block: 16, 32, 64 or 128", ge=16, le=128)
    max_stripes: int = param(32_768, "most stripes of a group", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size not in (16, 32, 64, 128):
            raise SparselandError(
                f"anchor-attention: block_size={self.block_size} is not allowed; it must be 16, 32, 64 or 128"
            )

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """Thresholds up to the paper's; at short lengths groups of an eighth of the prompt, blocks of 64."""
        thetas = (6.0, 9.0, 12.0)
        if length > 16_384:
            return [cls(theta=theta) for theta in thetas]
        step = 16 if length > 4096 else 8 if length > 2048 else 4
        return [cls(theta=theta, step=step, block_size=64) for theta in thetas]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(theta=_ALL, max_stripes=max(1, length))

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys, size = x.q.shape[2], x.k.shape[2], self.block_size
        group = size * self.step
        last_group = n_keys - n_queries + (cdiv(n_queries, group) - 1) * group
        if last_group // size - 1 <= 1:  # no key lies between block 0 and the local keys
            return WindowPattern.dense(n_queries, n_keys)
        stripes = stripe_columns(
            x.q, x.k, block_size=size, step=self.step, theta=self.theta, limit=self.max_stripes, scale=x.scale
        )
        blocks = areas(n_queries, n_keys, size, self.step, x.q.device)
        return BlockColumnPattern(n_queries, n_keys, blocks, trimmed(stripes))


@per_shape
def areas(
    n_queries: int, n_keys: int, block_size: int, step: int, device: torch.device | str = "cpu"
) -> BlockPattern:
    """Key block 0 and the local blocks of each query block, the same for all heads."""
    m = cdiv(n_queries, block_size)
    block = torch.arange(m, device=device)
    start = local_starts(n_queries, n_keys, block_size, step, device) // block_size
    start = start.repeat_interleave(step)[:m]
    last = ((block + 1) * block_size).clamp(max=n_queries) - 1 + (n_keys - n_queries)
    end = last // block_size + 1
    # Block 0, then [start, end); where the local blocks begin with block 0 it is not listed twice.
    extra = (start > 0).int()
    place = torch.arange(min(step + 3, cdiv(n_keys, block_size)), device=device, dtype=torch.int32)
    indices = (start - extra)[:, None] + place
    indices = torch.where((place == 0) & (start > 0)[:, None], 0, indices)
    counts = (end - start + extra).to(torch.int32)
    return BlockPattern(n_queries, n_keys, block_size, counts[None, None], indices.int()[None, None])


def trimmed(lists: ColumnPattern) -> ColumnPattern:
    """Lists as long as the longest of them, where it can be asked for: short ones are cheap on a CPU."""
    if not may_ask(lists.counts):
        return lists
    return replace(lists, indices=lists.indices[..., : int(lists.counts.max())].contiguous())
