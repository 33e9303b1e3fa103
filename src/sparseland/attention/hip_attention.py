"""HiP: for each block of queries a beam search over a tree of the keys finds its top k, in O(log N) steps.

Lee, Park, Lee, Kim, Park, Jeon, Hwang: *A Training-free Sub-quadratic Cost Transformer Model Serving
Framework With Hierarchically Pruned Attention* (2024), section 3 and algorithm 1, in the integer form of its
code.

Query block I holds b_q queries; before its local window lie B key blocks of b_k keys; K = k / b_k::

    K segments of the B blocks; until each is a single block: halve them, score the first block of each half
        s = max over every 2nd query of I and the b_k keys of q . k          and keep the K best halves

The pairs are those of the found blocks, the window and the sinks (keys in either are not searched, so nothing
counts twice), all pairs of the first l_d layers and those of a prompt's first queries::

    dense queries   n_d = 3 (log2(N / 2k) + 1) k

A decoding step is a block of one query. It keeps what it found for r_m steps; tokens that come in between are
read with the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
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
from sparseland.ops.tree_search import tree_search
from sparseland.patterns import (
    BlockColumnPattern,
    BlockPattern,
    ColumnPattern,
    Pattern,
    PiecedPattern,
    WindowPattern,
    cdiv,
    per_shape,
)

_ROLES: dict[str, frozenset[Role]] = {
    "prefill": frozenset({"prefill"}),
    "decode": frozenset({"select"}),
    "both": frozenset({"prefill", "select"}),
}


@dataclass(frozen=True)
class HipAttention(PrefillMethod, SelectMethod):
    """Top ``k`` keys per block of queries by hierarchical pruning, a window and sinks."""

    card: ClassVar[Card] = Card(
        slug="hip-attention",
        title="A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically "
        "Pruned Attention",
        paper="Lee et al. 2024, arXiv 2406.09827, ICLR 2025",
        site="attention",
        training="none",
        summary="per query block the top keys, found by a beam search over a tree of the keys: O(N log N)",
        claims=(
            "selection in O(N log N) time and O(N) memory, without training",
            "quality near full attention on WikiText-2, LongBench, passkey retrieval and BookSum where "
            "StreamingLLM fails (Llama 2 and 3.1, Qwen)",
        ),
        deviations=(
            "the integer form of the search (the authors' v1.1), deterministic: a half is represented by its "
            "first key block, as in their code; the first preprint's floating grid finds some keys twice, "
            "and draws representatives at random",
            "the window and the sinks are whole blocks of block_q keys in a prompt, and at least what was "
            "asked for",
            "while a selection is kept, tokens that leave the window are still read; in the authors' code "
            "they are unseen until the next refresh",
            "the paper's optional position extension (Self-Extend) and channel-sampled scores are left out",
        ),
        limits=(
            "a key that stands out from its neighbours is found only if it represents a half: the search "
            "assumes that nearby keys have similar scores",
            "the recipe's dense queries are most of a short prompt (6144 of 8192 at k = 512): "
            "dense_queries=0 shows the method itself; they depend on the prompt's length, so a prompt in "
            "pieces computes other pairs unless dense_queries is given",
            "queries at odd places of a block have no vote (query_stride=1 gives them one)",
            "decoding reads the cached keys themselves, so it can't be combined with a method that stores "
            "them in another form (phase=prefill can)",
        ),
    )

    k: int = param(512, "keys to find per block of queries, window and sinks apart", ge=1)
    block_q: int = param(32, "queries that search together in a prompt: 16, 32, 64 or 128", ge=16, le=128)
    block_k: int = param(2, "neighbouring keys that are found together: a power of two up to block_q", ge=1)
    window: int = param(128, "nearest keys that a query sees, itself included", ge=1)
    sinks: int = param(32, "first keys that every query sees", ge=0)
    dense_layers: int = param(
        3, "first layers that compute all pairs (the authors: 3 for Llama, else 4)", ge=0
    )
    dense_queries: int | None = param(
        None, "first queries of a prompt that compute all pairs; none: 3 (log2(N / 2k) + 1) k", ge=0
    )
    group: str = param(
        "head",
        "search per query head, or once for the query heads that share keys",
        choices=("head", "shared"),
    )
    query_stride: int = param(2, "every so-many-th query of a block scores", ge=1)
    refresh: int = param(8, "decoding steps that a selection serves", ge=1)
    phase: str = param("both", "where it acts", choices=("prefill", "decode", "both"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_q not in (16, 32, 64, 128):
            raise SparselandError(
                f"hip-attention: block_q={self.block_q} is not allowed; it must be 16, 32, 64 or 128"
            )
        if self.block_k & (self.block_k - 1) or self.block_k > self.block_q:
            raise SparselandError(
                f"hip-attention: block_k={self.block_k} is not allowed; it must be a power of two up to "
                f"block_q={self.block_q}"
            )
        if self.k % self.block_k:
            raise SparselandError(
                f"hip-attention: k={self.k} is not allowed; it must be a multiple of block_k={self.block_k}"
            )

    @property
    def roles(self) -> frozenset[Role]:
        return _ROLES[self.phase]

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """The search alone, with neither dense queries nor dense layers: 1/32 to 1/4 of the keys.

        Dense layers bought no more quality than the pairs they cost on a small model.
        """
        window = max(64, length // 32)
        return [
            cls(k=max(64, length // part // 64 * 64), window=window, dense_layers=0, dense_queries=0)
            for part in (32, 16, 8, 4)
        ]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(k=length + length % 2)

    # -------------------------------------------------------------- prompts

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys, size = x.q.shape[2], x.k.shape[2], self.block_q
        rows, sinks = cdiv(n_queries, size), cdiv(self.sinks, size)
        dense = self._dense_queries(n_keys)
        # The key block in which the last query block's window begins.
        near = max(0, x.offset + (rows - 1) * size - self.window + 1) // size
        if x.layer < self.dense_layers or dense >= n_keys or (near - sinks) * size <= self.k:
            return WindowPattern.dense(n_queries, n_keys)

        # Query blocks that begin with a dense query are a stretch of their own: lists of small blocks would
        # make all their pairs slow.
        cut = min(max(0, cdiv(dense - x.offset, size)), rows) * size
        if not cut:
            return self._searched(x, 0)
        if cut >= n_queries:
            return WindowPattern.dense(n_queries, n_keys)
        batch, heads = x.q.shape[:2]
        early = causal_blocks(cut, x.offset + cut, batch, heads, x.q.device)
        parts: dict[int, Pattern] = {0: early, cut: self._searched(x, cut)}
        return PiecedPattern(n_queries, n_keys, lambda start, stop: parts[start], (cut, n_queries))

    def _searched(self, x: AttentionInputs, start: int) -> BlockColumnPattern:
        """The pattern of the queries from ``start`` on, a multiple of ``block_q``."""
        size, q = self.block_q, x.q[:, :, start:]
        n_queries, n_keys, sinks = q.shape[2], x.k.shape[2], cdiv(self.sinks, size)
        begin, blocks, near = _near(n_queries, n_keys, size, sinks, self.window, q.device)
        counts, starts = tree_search(
            q, x.k, begin, blocks * (size // self.block_k),
            block_q=size, block_k=self.block_k, keep=self.k // self.block_k, stride=self.query_stride,
            shared=self.group == "shared",
        )  # fmt: skip
        keys = starts[..., None] + torch.arange(self.block_k, dtype=torch.int32, device=starts.device)
        counts, indices = counts * self.block_k, keys.flatten(-2)
        if self.group == "shared":
            counts, indices = (t.repeat_interleave(x.group, 1) for t in (counts, indices))
        columns = ColumnPattern(n_queries, n_keys, size, counts, indices)
        return BlockColumnPattern(n_queries, n_keys, near, columns)

    def _dense_queries(self, n_keys: int) -> int:
        """The recipe's number, or the given one."""
        if self.dense_queries is not None:
            return self.dense_queries
        return math.ceil(3 * self.k * (1 + max(0.0, math.log2(n_keys / self.k / 2))))

    # ------------------------------------------------------------- decoding

    def new_state(self, layer: int, calibration: Calibration | None = None) -> FoundState:
        return FoundState(layer >= self.dense_layers)

    def append(self, state: SelectState, k_new: Float[Tensor, "B Hkv n D"]) -> None:
        state.push(k_new)

    def select(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "B H n"] | None:
        """Sinks, found keys and window, in this order; a shorter row of a batch reads as it would alone."""
        assert isinstance(state, FoundState)
        n = len(state)
        if not state.searches or n <= self.k + self.window + self.sinks:
            return None
        if state.far is None or n - state.length_then >= self.refresh:
            self._search(state, x, first_key)
        assert state.far is not None
        assert state.near_from is not None
        width = min(n, self.window + self.block_k - 1 + n - state.length_then)
        near = torch.arange(n - width, n, device=x.q.device)
        near = torch.where(near >= state.near_from[:, None], near, -1)
        return torch.cat([state.far, near[:, None].expand(-1, state.far.shape[1], -1)], dim=-1)

    @torch.no_grad()
    def _search(self, state: FoundState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None) -> None:
        """Look for the best keys before the window of the newest token."""
        n, batch, device = len(state), x.q.shape[0], x.q.device
        if x.k.shape[2] > 1 and x.k.stride(2) == 0:
            raise SparselandError(
                "hip-attention searches the cached keys and can't be combined with a method that stores them "
                "in another form while decoding; use phase=prefill"
            )
        first = torch.zeros(batch, dtype=torch.long, device=device) if first_key is None else first_key.long()
        begin, end = first + self.sinks, n - self.window
        blocks = (end - begin).clamp(min=0) // self.block_k
        # Keys that fill no block go with the window; a row too short for a search has all its keys there.
        near_from = torch.where(begin <= end, begin + blocks * self.block_k, first.clamp(min=end))
        counts, starts = tree_search(
            x.q, x.k, begin[:, None], blocks[:, None], block_q=1, block_k=self.block_k,
            keep=self.k // self.block_k, shared=self.group == "shared",
        )  # fmt: skip
        counts, starts = counts[:, :, 0, None], starts[:, :, 0].long()
        found = starts[..., None] + torch.arange(self.block_k, device=device)
        listed = torch.arange(starts.shape[-1], device=device) < counts
        found = torch.where(listed[..., None], found, -1).flatten(-2)
        sinks = first[:, None] + torch.arange(self.sinks, device=device)
        sinks = torch.where(sinks < near_from[:, None], sinks, -1)
        state.far = torch.cat([sinks[:, None].expand(-1, found.shape[1], -1), found], dim=-1)
        state.near_from, state.length_then = near_from, n


@per_shape
def _near(
    n_queries: int, n_keys: int, size: int, sinks: int, window: int, device: torch.device
) -> tuple[Int[Tensor, "1 Mq"], Int[Tensor, "1 Mq"], BlockPattern]:
    """What every head and row of a batch has in common, for each block of ``size`` queries.

    Returns:
        The first key that is searched, how many blocks of ``size`` keys are, and lists of ``sinks`` blocks
        and those of the window.
    """
    row = torch.arange(cdiv(n_queries, size), device=device, dtype=torch.int32)
    first = row * size + n_keys - n_queries
    local = (first - window + 1).clamp(min=0) // size
    last = (first + size - 1).clamp(max=n_keys - 1) // size
    leading = local.clamp(max=sinks)
    longest = min(cdiv(n_keys, size), sinks + cdiv(window + size - 1, size) + 1)
    place = torch.arange(longest, dtype=torch.int32, device=device)
    blocks = torch.where(place < leading[:, None], place, place + (local - leading)[:, None])
    lists = (leading + last - local + 1)[None, None], blocks[None, None]
    begin = torch.full_like(first, sinks * size)[None]
    searched = (local - sinks).clamp(min=0)[None]
    return begin, searched, BlockPattern(n_queries, n_keys, size, *lists)


@per_shape
def causal_blocks(n_queries: int, n_keys: int, batch: int, heads: int, device: torch.device) -> BlockPattern:
    """All causal pairs, as lists of 128 keys."""
    size = 128
    end = (torch.arange(cdiv(n_queries, size), device=device, dtype=torch.int32) + 1) * size
    counts = (end.clamp(max=n_queries) + (n_keys - n_queries - 1)) // size + 1
    place = torch.arange(cdiv(n_keys, size), device=device, dtype=torch.int32)
    lists = counts.expand(batch, heads, -1), place.expand(batch, heads, len(counts), -1)
    return BlockPattern(n_queries, n_keys, size, *lists)


class FoundState(SelectState):
    """The length of one layer's cache, and what the last search found.

    Args:
        searches: whether the layer searches at all; else it is read whole.
    """

    def __init__(self, searches: bool) -> None:
        super().__init__()
        self.searches = searches
        self.far: Int[Tensor, "B H n"] | None = None  # sinks and found keys, -1 for none
        self.near_from: Int[Tensor, " B"] | None = None  # every key from here on is read
        self.length_then = 0  # of the cache, when the search was made

    def push(self, new: Tensor) -> None:
        self._length += new.shape[2]

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        if self.far is not None and self.near_from is not None:
            index = index.to(self.far.device)
            self.far, self.near_from = self.far.index_select(0, index), self.near_from.index_select(0, index)

    def crop(self, length: int) -> None:
        super().crop(length)
        if length < self.length_then:
            self.far = self.near_from = None

    def nbytes(self) -> int:
        return 0 if self.far is None else self.far.numel() * self.far.element_size()
