"""MMInference's online part: from one mixed prompt to parts, all heads of a kind at once.

Every head that is not plainly MInference's has a *base*, the first ``SINKS`` keys and the ``LOCAL`` nearest,
in the prompt's own order. What its regions add (pairs of at least ``LOCAL`` distance to later keys) are
blocks over gathered tokens, so that no pair is in two parts:

- vertical-slash and A-shape: chosen columns gathered into blocks of their own, and the blocks that chosen
  diagonals touch, without those columns;
- grid: tokens sorted by their place in the frame (see :mod:`sparseland.attention._mminference_grid`).

Distances and causality are those of the prompt's positions, whatever was gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.attention._lazy import lazy
from sparseland.attention._mminference_heads import Shape
from sparseland.attention._mminference_layout import Layout, at, kind_mask, last_positions, slots
from sparseland.attention._shape_index import (
    BLOCK,
    LOCAL,
    MIN_SLASH,
    MIN_VERTICAL,
    PROBE,
    SINKS,
    LayerIndex,
)
from sparseland.method import AttentionInputs
from sparseland.ops._dispatch import may_ask
from sparseland.ops.block_scores import vertical_slash_scores
from sparseland.ops.permuted_attention import on_device
from sparseland.ops.top_values import top_mask
from sparseland.patterns import Part, PermutedPattern, cdiv

FAR = torch.iinfo(torch.int32).max
# Lists of one part that may exist at once.
_LIST_BYTES = 1 << 30


class MixedIndex:
    """What one layer's inputs say about which keys matter to which kind of queries.

    Args:
        x: the layer's inputs; a later chunk's queries are split by kind like a whole prompt's.
        layout: where its text and vision lie.
        ranked: whether many sizes will be asked for (the search).
    """

    def __init__(self, x: AttentionInputs, layout: Layout, ranked: bool = False) -> None:
        self.x, self.layout, self.ranked = x, layout, ranked
        self.batch, self.heads, self.n_queries = x.q.shape[:3]
        self.n_keys, self.device = x.k.shape[2], x.q.device
        self._sums: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        self.strides: dict[tuple[int, tuple[int, ...]], Any] = {}  # what the grid found, by video and heads

    @lazy
    def whole(self) -> LayerIndex:
        """MInference's own index of the same inputs."""
        return LayerIndex(self.x, self.ranked)

    @lazy
    def position(self) -> Int[Tensor, " Nk"]:
        """All positions."""
        return torch.arange(self.n_keys, device=self.device)

    # ------------------------------------------------------- estimates

    def probe_runs(self, kind: str) -> list[tuple[int, int]]:
        """Where a kind of queries is probed: at its last 64 of this call, or all where there are fewer."""
        return last_positions(self.layout.of_kind(kind, self.x.offset), PROBE)

    def logits(self, runs: Sequence[tuple[int, int]]) -> Float[Tensor, "B H R Nk"]:
        """Scaled products of the queries at these positions with all keys, float32; -inf in the future."""
        rows = at(tuple(runs), self.device)
        scores = grouped_product(self.x.q.index_select(2, rows - self.x.offset), self.x.k) * self.x.scale
        return scores.masked_fill_(self.position > rows[:, None], -torch.inf)

    def sums(
        self, a: str, b: str
    ) -> tuple[Float[Tensor, "B H Nk"], Float[Tensor, "B H Nk"], Bool[Tensor, "B H"]]:
        """The probe's attention from queries of kind a to keys of kind b, by column and by distance.

        -inf at keys of another kind and at what the base computes. The last is true where it is not a number.
        """
        if (a, b) not in self._sums:
            first = self.layout.of_kind(b)[0][0]
            # A probe row before the first key of this kind says nothing.
            runs = [(max(s, first), e) for s, e in self.probe_runs(a) if e > first]
            columns = torch.zeros(self.batch, self.heads, self.n_keys, device=self.device)
            distances, start = columns.clone(), 0
            if runs:
                scores = self.logits(runs)
                if b != "all":
                    scores = scores.masked_fill(~kind_mask(self.layout, b, self.device), -torch.inf)
                p = scores.softmax(-1)
                columns += p.sum(2)
                for low, high in runs:
                    piece = p[:, :, start : start + high - low, :high].contiguous()
                    distances[..., :high] += vertical_slash_scores(piece)[1]
                    start += high - low
            broken = columns.sum(-1).isnan()
            hidden = self.position < SINKS
            if b != "all":
                hidden = hidden | ~kind_mask(self.layout, b, self.device)
            columns.masked_fill_(hidden, -torch.inf)
            distances[..., :LOCAL] = -torch.inf
            self._sums[a, b] = columns, distances, broken
        return self._sums[a, b]

    # ----------------------------------------------------------- parts

    def chosen(
        self, a: str, b: str, heads: Sequence[int], shapes: Sequence[Shape]
    ) -> tuple[Bool[Tensor, "B h Nk"], Bool[Tensor, "B h Nk"], int]:
        """Columns and distances of some heads beyond the base, and the most columns of any of them."""
        n = self.n_keys
        fixed = [s.shape == "a-shape" for s in shapes]
        vertical = [
            min(n, s.vertical if f else max(s.vertical, MIN_VERTICAL))
            for s, f in zip(shapes, fixed, strict=True)
        ]
        slash = [
            min(n, s.slash if f else max(s.slash, MIN_SLASH)) for s, f in zip(shapes, fixed, strict=True)
        ]
        index = on_device(tuple(heads), self.device)
        columns, distances, broken = (t.index_select(1, index) for t in self.sums(a, b))
        beyond = [
            [max(0, v - SINKS) for v in vertical], [n if s >= n else max(0, s - LOCAL) for s in slash],
            vertical, slash, fixed,
        ]  # fmt: skip
        table = torch.tensor(beyond).to(self.device, non_blocking=True)
        shape = (self.batch, len(heads))
        # A head whose estimate is not a number takes all distances: it is dense.
        wanted = torch.where(broken, n, table[1])
        top_columns = top_mask(columns.contiguous(), table[0].expand(shape)) & (columns > -torch.inf)
        top_distances = top_mask(distances.nan_to_num(0.0, neginf=-torch.inf), wanted) & (
            self.position >= LOCAL
        )
        # An A-shape takes the first columns of its kind, and the nearest distances.
        own = kind_mask(self.layout, b, self.device)
        first = (own.cumsum(0) - 1 < table[2][:, None]) & own & (self.position >= SINKS)
        near = (self.position < table[3][:, None]) & (self.position >= LOCAL)
        is_fixed = table[4].bool()[:, None]
        most = max(v if f else max(0, v - SINKS) for v, f in zip(vertical, fixed, strict=True))
        return torch.where(is_fixed, first, top_columns), torch.where(is_fixed, near, top_distances), most

    def vertical_slash(self, a: str, b: str, heads: Sequence[int], shapes: Sequence[Shape]) -> list[Part]:
        """Columns and diagonals of queries of kind a over keys of kind b, beyond the base."""
        queries = slots(self.layout, a, self.x.offset, self.device)
        keys = slots(self.layout, b, 0, self.device)
        if not queries.numel() or not keys.numel():
            return []
        columns, distances, most = self.chosen(a, b, heads, shapes)
        shape = columns.shape[:2]
        q_first, q_last = ends(queries)
        parts = []
        most = min(most, self.n_keys)
        if most:
            # The chosen first, in order: a list as long as the longest head's.
            order = (~columns).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
            listed = torch.arange(most, device=self.device) < columns.sum(-1, keepdim=True)
            index = torch.where(listed, order, -1).to(torch.int32)
            starts = index[..., ::BLOCK]
            starts = torch.where(starts >= 0, starts, FAR)
            count = (starts[..., None, :] <= (q_last - LOCAL)[:, None]).sum(-1, dtype=torch.int32)
            blocks = torch.arange(starts.shape[-1], device=self.device, dtype=torch.int32)
            pattern = PermutedPattern(
                self.n_queries, self.n_keys, BLOCK, queries[None, None], index, count,
                blocks.expand(1, 1, len(q_last), -1), LOCAL, SINKS,
            )  # fmt: skip
            parts.append(Part(tuple(heads), pattern))
        # What a column covers is no diagonal's.
        covered = columns.index_select(-1, keys.clamp(min=0).long())
        k_index = torch.where(covered, -1, keys)
        k_first, k_last = ends(keys)
        before = F.pad(distances.cumsum(-1, dtype=torch.int32), (1, 0))

        def mask(start: int, stop: int) -> Bool[Tensor, "B h m Mk"]:
            # Block r and block c hold the distances [q_first - k_last, q_last - k_first].
            low = (q_first[start:stop, None] - k_last).clamp(min=LOCAL)
            high = q_last[start:stop, None] - k_first
            seen = high >= low
            low, high = low.clamp(max=self.n_keys), (high + 1).clamp(0, self.n_keys)
            return (before[..., high.long()] > before[..., low.long()]) & seen

        if any(s.slash > LOCAL for s in shapes):
            parts += self.listed(heads, queries.expand(*shape, -1), k_index, mask)
        return parts

    def listed(
        self,
        heads: Sequence[int],
        q_index: Int[Tensor, "B h Sq"],
        k_index: Int[Tensor, "B h Sk"],
        mask: Callable[[int, int], Bool[Tensor, "B h m Mk"]],
    ) -> list[Part]:
        """Parts from a block mask that is asked for a stretch of query blocks at a time."""
        rows, columns = cdiv(q_index.shape[-1], BLOCK), cdiv(k_index.shape[-1], BLOCK)
        step = max(1, _LIST_BYTES // max(1, 16 * columns * self.batch * len(heads)))

        def made(start: int, stop: int) -> PermutedPattern:
            counts, indices = block_lists_of(mask(start, stop))
            piece = q_index[..., start * BLOCK : stop * BLOCK]
            return PermutedPattern(
                self.n_queries, self.n_keys, BLOCK, piece, k_index, counts, indices, LOCAL, SINKS
            )

        if step >= rows:
            return [Part(tuple(heads), made(0, rows))]
        stretches = [(start, min(rows, start + step)) for start in range(0, rows, step)]
        return [Part(tuple(heads), lambda s=s, e=e: made(s, e)) for s, e in stretches]  # type: ignore[misc]


def block_lists_of(mask: Bool[Tensor, "B h M Mk"]) -> tuple[Int[Tensor, "B h M"], Int[Tensor, "B h M L"]]:
    """Counts and ascending lists; as long as the row where the longest can't be asked for."""
    counts = mask.sum(-1, dtype=torch.int32)
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    if may_ask(mask):
        order = order[..., : int(counts.max()) if counts.numel() else 0]
    return counts, order.to(torch.int32)


def ends(index: Int[Tensor, " S"]) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """First and last position of each block of slots whose tokens are one stretch."""
    blocks = torch.unflatten(index, 0, (-1, BLOCK))
    return blocks[:, 0], blocks.amax(1)


def grouped_product(q: Float[Tensor, "B H R D"], k: Float[Tensor, "B Hkv n D"]) -> Float[Tensor, "B H R n"]:
    """q . k in float32 with grouped heads: the queries of a group are rows of one product per key head."""
    batch, kv_heads, n, dim = k.shape
    rows = q.reshape(batch * kv_heads, -1, dim)
    keys = k.reshape(batch * kv_heads, n, dim).mT
    if q.is_cuda and q.dtype != torch.float32:
        # Tensor cores take half-precision factors and give float32 sums; a cast of K would double it.
        product = torch.bmm(rows, keys, out_dtype=torch.float32)
    else:
        product = torch.bmm(rows.float(), keys.float())
    return product.view(batch, q.shape[1], q.shape[2], n)
