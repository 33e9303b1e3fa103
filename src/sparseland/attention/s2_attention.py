"""S2-Attention: every head sees a window and its own shard of the context; together they see all of it.

Lin, Zhang, et al.: *Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention
Heads* (2024; later *S2-Attention: Hardware-Aware Context Sharding Among Attention Heads*), section 3.

With blocks of ``b`` tokens, query block I, key block J <= I, head h of those that have a shard each::

    head h sees block J   iff   I - J < W   or   (J + h step + o) mod v = 0

    step = max(1, floor(v / query heads));   dense heads, the last ones, see every block

W is the window in blocks (the query's own included), v the stride, o an offset. J is an absolute position:
a block that has left the window and is not on a head's stride is never read by that head again, so its keys
and values need not be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Int
from torch import Tensor

from sparseland.attention._s2_store import Shards, ShardStore
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
from sparseland.ops.token_block_attention import tile_for
from sparseland.patterns import BlockPattern, Pattern, TokenBlockPattern, WindowPattern, cdiv


@dataclass(frozen=True)
class S2Attention(PrefillMethod, StoreMethod):
    """A window and one block in ``vert_stride`` per head, shifted from head to head and layer to layer."""

    card: ClassVar[Card] = Card(
        slug="s2-attention",
        title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
        paper="Lin et al. 2024, arXiv 2407.17678",
        site="attention",
        training="training",
        summary="a window and every n-th block, another one for each head: together the heads see everything",
        claims=(
            "up to 25.3x faster attention than FlashAttention-2, 6x less end-to-end training time, 10x lower "
            "inference latency",
            "on-par quality with dense attention when trained from scratch; perfect needle retrieval at 32K "
            "(later version: 128K)",
            "the KV cache shrinks by the same pattern at no further loss",
        ),
        deviations=(
            "by default each layer continues the shift where the layer before ended, so that all layers "
            "together cover the context where one alone can't (cover=layers); the released code shifts every "
            "layer alike (cover=any), and with grouped queries, where shards go by key head, covers a part",
            "shards that can't cover the context are refused unless cover=any",
            "only the causal pattern, with absolute strides; not the relative one for bidirectional models",
            "masked scores are -inf; the released kernels add -1e6",
        ),
        limits=(
            "a model must be trained with it: on a finished dense model quality falls",
            "the first block is seen by the heads of one shard only: there is no common attention sink",
            "a model trained with one window and stride is out of its range with another",
            "dense heads take lists as long as the context: their pattern's memory is quadratic in blocks",
            "a cache that has dropped tokens can be cropped by a block at most",
        ),
    )
    looks_ahead: ClassVar[bool] = False
    chunkable: ClassVar[bool] = True

    block_size: int = param(64, "tokens per block: 16, 32, 64 or 128", ge=16, le=128)
    local_blocks: int = param(16, "nearest blocks that every head sees, the own block included", ge=1)
    vert_stride: int = param(8, "each head sees one block in so many", ge=1)
    shards: str = param("kv", "a shard per key head, or per query head", choices=("kv", "query"))
    cover: str = param(
        "layers",
        "what must see the whole context: all layers together (each goes on shifting), each layer, or none",
        choices=("layers", "layer", "any"),
    )
    dense_heads: int = param(0, "last heads (of those that have shards) that see everything", ge=0)
    offset: int = param(0, "shift of all strides, in blocks", ge=0)
    homo_head: bool = param(False, "one shard for all heads: the paper's ablation; it covers nothing else")
    dense_first: int = param(0, "first layers that are dense", ge=0)
    dense_every: int = param(0, "every so-many-th layer is dense (2: the second, fourth, …; 0: none)", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size not in (16, 32, 64, 128):
            raise SparselandError(
                f"s2-attention: block_size={self.block_size} is not allowed; it must be 16, 32, 64 or 128"
            )
        if self.homo_head and self.cover != "any":
            raise SparselandError("s2-attention: homo_head=true covers no whole context; set cover=any")

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"prefill", "store"})

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """Windows of an eighth and a quarter of the prompt, strides of 8 and 4, shards per query head."""
        size = 64 if length > 4096 else 32 if length > 1024 else 16
        return [
            cls(block_size=size, local_blocks=max(1, length // (part * size)), vert_stride=v, shards="query")
            for part, v in ((16, 8), (8, 8), (4, 4))
        ]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(vert_stride=1)

    # ------------------------------------------------------------- shards

    def is_dense(self, layer: int) -> bool:
        """Whether a layer computes dense attention."""
        every = self.dense_every
        return layer < self.dense_first or (every > 0 and layer % every == every - 1)

    def residues(self, layer: int, heads: int, kv_heads: int) -> tuple[int, ...]:
        """Per head that has a shard, which blocks it sees beside the window: J mod v; -1 for dense heads."""
        sparse, step, shift = self._steps(layer, heads, kv_heads)
        shards = tuple(-(h * step + shift) % self.vert_stride for h in range(sparse))
        return shards + (-1,) * self.dense_heads

    def _steps(self, layer: int, heads: int, kv_heads: int) -> tuple[int, int, int]:
        """Heads whose shard is not everything, the step from one's to the next, the shift of the first."""
        lists = kv_heads if self.shards == "kv" else heads
        sparse, step, shift = lists - self.dense_heads, max(1, self.vert_stride // heads), self.offset
        if sparse < 0:
            raise SparselandError(
                f"s2-attention: dense_heads={self.dense_heads} is above the {lists} heads that have shards"
            )
        if self.cover == "layers":
            # Each sparse layer takes up where the one before ended; between multiples of a step, by one.
            turn = sum(not self.is_dense(i) for i in range(layer))
            shift += turn % step + turn // step * sparse * step
        return sparse, 0 if self.homo_head else step, shift

    def check_cover(self, heads: int, kv_heads: int, n_layers: int | None) -> None:
        """Refuse shards that leave blocks that nobody sees.

        Raises:
            SparselandError: what is to cover the context (``cover``) doesn't.
        """
        if self.cover == "any" or (self.cover == "layers" and n_layers is None):
            return
        layers = [0] if self.cover == "layer" else [i for i in range(n_layers or 0) if not self.is_dense(i)]
        seen = {r for i in layers for r in self.residues(i, heads, kv_heads)} - {-1}
        if layers and len(seen) < self.vert_stride:
            lists = (kv_heads if self.shards == "kv" else heads) - self.dense_heads
            where = "a layer" if self.cover == "layer" else f"{len(layers)} sparse layers"
            raise SparselandError(
                f"s2-attention: the {lists} shards of {where} see {len(seen)} of vert_stride="
                f"{self.vert_stride} strides; take a smaller vert_stride, shards=query, or cover=any"
            )

    def new_learner(self, shape: LayerShape) -> None:
        """Nothing to learn beside the model; but here a model is refused before it is changed."""
        self.check_cover(shape.heads, shape.kv_heads, shape.n_layers)

    def _shards(self, layer: int, heads: int, kv_heads: int) -> Shards:
        residues = self.residues(layer, heads, kv_heads)
        return Shards(self.block_size, self.local_blocks, self.vert_stride, residues)

    # ------------------------------------------------------------- prompts

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        """The lists in closed form; where a chunk begins inside a block, per token."""
        n_queries, n_keys, size = x.q.shape[2], x.k.shape[2], self.block_size
        heads, kv_heads = x.q.shape[1], x.k.shape[1]
        self.check_cover(heads, kv_heads, x.n_layers)
        residues = self.residues(x.layer, heads, kv_heads)
        all_dense = self.vert_stride == 1 or all(r < 0 for r in residues)
        if self.is_dense(x.layer) or all_dense or cdiv(n_keys, size) <= self.local_blocks:
            return WindowPattern.dense(n_queries, n_keys)
        # The same numbers made on the device: copying them there would wait for it.
        sparse, step, shift = self._steps(x.layer, heads, kv_heads)
        head = torch.arange(len(residues), device=x.q.device)
        residue = torch.where(head < sparse, torch.remainder(-(head * step + shift), self.vert_stride), -1)
        group = heads // len(residues)
        if x.offset % size:
            return self._token_pattern(residues, residue, n_queries, n_keys, group)
        rows = torch.arange(cdiv(n_queries, size), device=x.q.device) + x.offset // size
        counts, indices = self._lists(residues, residue, rows, cdiv(n_keys, size) - 1, self.local_blocks)
        counts, indices = (t.repeat_interleave(group, 0)[None] for t in (counts, indices))
        return BlockPattern(n_queries, n_keys, size, counts, indices.contiguous())

    def _lists(
        self,
        residues: tuple[int, ...],
        residue: Int[Tensor, " H"],
        own: Int[Tensor, " m"],
        last: int,
        near: int,
    ) -> tuple[Int[Tensor, "H m"], Int[Tensor, "H m L"]]:
        """Ascending blocks per head for queries in the blocks ``own``: strided, then at most ``near`` local.

        ``last`` is the largest of ``own``, known without asking the device.
        """
        v, window = self.vert_stride, self.local_blocks
        local = torch.clamp(own - window + 1, min=0)  # first block of the window
        r, stride = (torch.where(residue < 0, a, b)[:, None] for a, b in ((0, residue), (1, v)))
        far = torch.div(local - 1 - r + stride, stride, rounding_mode="floor").clamp(min=0)
        counts = far + (own - local + 1 if near else 0)
        before = max(0, last - window + 1)
        longest = max((before if r < 0 else max(0, -((r - before) // v))) for r in residues) + min(
            near, last + 1
        )
        place = torch.arange(longest, device=own.device)
        strided = r[..., None] + place * stride[..., None]
        indices = torch.where(place < far[..., None], strided, local[:, None] + place - far[..., None])
        return counts.to(torch.int32), indices.to(torch.int32)

    def _token_pattern(
        self, residues: tuple[int, ...], residue: Int[Tensor, " H"], n_queries: int, n_keys: int, group: int
    ) -> TokenBlockPattern:
        """The same pairs for queries that do not begin at a block's edge."""
        size, window, tile = self.block_size, self.local_blocks, tile_for(group)
        first = torch.arange(0, n_queries, tile, device=residue.device) + n_keys - n_queries
        live = (n_keys - first).clamp(max=tile)  # queries of the tile
        own = (first + live - 1) // size
        counts, indices = self._lists(residues, residue, own, (n_keys - 1) // size, 0)
        # A query lists a block once its window has passed it: the later ones of the tile, from this one on.
        start = ((indices.long() + window) * size - first[:, None]).clamp(min=0)
        words = (1 << live)[:, None] - (1 << start.minimum(live[:, None]))
        members = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        lists = (t[None].contiguous() for t in (counts, indices, members))
        return TokenBlockPattern(n_queries, n_keys, size, window, tile, group, *lists)

    # --------------------------------------------------------------- cache

    def new_store(
        self,
        layer: int,
        calibration: Calibration | None = None,
        *,
        n_layers: int | None = None,
        learner: torch.nn.Module | None = None,
    ) -> ShardStore | None:
        """A store that drops what a head will not read again; None for dense layers."""
        if self.is_dense(layer):
            return None
        return ShardStore(lambda heads, kv_heads: self._shards(layer, heads, kv_heads))
