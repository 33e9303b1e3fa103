"""Dropping a prompt's tokens by what its last queries looked at: SnapKV and Ada-SnapKV, and the cache for it.

Scores are per key head, budgets per key head (SnapKV) or shared by a layer's key heads (Ada-SnapKV), and
what is kept lies in one ragged tensor per row of the batch. What is decoded later is all kept.

SnapKV: Li et al., *SnapKV: LLM Knows What You are Looking for Before Generation* (2024). Ada-SnapKV: Feng et
al., *Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation* (2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, KVStore, SelectState
from sparseland.ops.gather_decode import dense_decode, gather_decode
from sparseland.ops.merge import merge_attention

# Logits held at once while scoring: 64 MiB of float32.
_PIECE = 2**24

Reduce = Literal["mean", "max"]


def probe_scores(
    q: Float[Tensor, "B Hq L D"],
    k: Float[Tensor, "B Hkv N D"],
    scale: float,
    reduce: Reduce,
    first_key: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B Hkv N"]:
    """How much the last ``L`` queries look at each key, float32.

    Args:
        q: queries of the last L of the N tokens.
        reduce: ``mean`` sums the attention over the queries and averages it over a group's query heads;
            ``max`` takes the largest of all.
        first_key: each row's first token that is no padding; what stands before it neither looks nor is
            looked at.
    """
    batch, heads, n_probe, dim = q.shape
    kv_heads, n = k.shape[1:3]
    keys = k.float().mT[:, :, None]
    position = torch.arange(n, device=q.device)
    total = q.new_zeros(batch, kv_heads, n, dtype=torch.float32)
    step = max(1, _PIECE // (batch * heads * n))
    for i in range(0, n_probe, step):
        rows = q[:, :, i : i + step].float()
        rows = rows.reshape(batch, kv_heads, -1, rows.shape[2], dim)
        at = torch.arange(i, i + rows.shape[3], device=q.device) + n - n_probe
        hidden = (position > at[:, None])[None, None, None]
        if first_key is not None:
            hidden = hidden | (position < first_key[:, None, None, None, None])
        p = (rows @ keys * scale).masked_fill_(hidden, -torch.inf).softmax(-1)
        if first_key is not None:
            # A padding query sees nothing: its softmax is no number.
            p = torch.where((at >= first_key[:, None])[:, None, None, :, None], p, 0)
        if reduce == "mean":
            total += p.mean(2).sum(2)
        else:
            total = torch.maximum(total, p.amax((2, 3)))
    return total


def eviction_scores(
    scores: Float[Tensor, "B Hkv N"],
    kernel: int,
    window: int,
    sinks: int,
    first_key: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B Hkv N"]:
    """Scores averaged over ``kernel`` neighbours; infinite for the last ``window`` and first ``sinks`` ones.

    Averages count what lies outside the sequence as 0; padding gets minus infinity.
    """
    n = scores.shape[2]
    scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).max)
    pooled = F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    position = torch.arange(n, device=scores.device)
    first = torch.zeros(1, dtype=torch.long, device=scores.device) if first_key is None else first_key
    start = first[:, None, None]
    forced = (position >= n - window) | (position < start + sinks)
    return pooled.masked_fill(forced, torch.inf).masked_fill(position < start, -torch.inf)


def uniform_top(scores: Float[Tensor, "B H N"], capacity: int) -> Bool[Tensor, "B H N"]:
    """The ``capacity`` best tokens of each head; minus infinity is never taken."""
    best = scores.topk(min(capacity, scores.shape[2]), dim=-1)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, best.indices, best.values > -torch.inf)


def adaptive_top(scores: Float[Tensor, "B H N"], capacity: int, least: int) -> Bool[Tensor, "B H N"]:
    """Each head's ``least`` best, then the best of what is left over all heads: ``capacity * H`` in total."""
    heads, n = scores.shape[1:]
    own = uniform_top(scores, least)
    rest = scores.masked_fill(own, -torch.inf).flatten(1)
    more = uniform_top(rest[:, None], max(0, capacity - least) * heads)[:, 0]
    return own | torch.unflatten(more, 1, (heads, n))


@dataclass(frozen=True)
class Kept:
    """The tokens that were kept of a prompt, ragged over heads.

    Args:
        k, v: ``[B, S, D]``, head after head; rows of the batch with fewer tokens end in unused slots.
        index: ``[B, Hkv, n]`` slots of each head's tokens in the order of the prompt; -1 behind them.
        position: ``[B, Hkv, n]`` where in the sequence they stood.
        mean: kept tokens, averaged over rows and heads.
    """

    k: Float[Tensor, "B S D"]
    v: Float[Tensor, "B S D"]
    index: Int[Tensor, "B Hkv n"]
    position: Int[Tensor, "B Hkv n"]
    mean: float

    @classmethod
    def of(
        cls, k: Float[Tensor, "B Hkv N D"], v: Float[Tensor, "B Hkv N D"], mask: Bool[Tensor, "B Hkv N"]
    ) -> Kept:
        """What ``mask`` marks. Looks at the sizes once, on the host: memory is to be given back."""
        batch, heads, n, dim = k.shape
        counts = mask.sum(-1)
        per_row = counts.sum(-1)
        slots, longest, total = torch.stack([per_row.max(), counts.max(), per_row.sum()]).tolist()
        # Sorting "not kept" brings the kept tokens to the front, in the order of heads and positions.
        order = (~mask).flatten(1).to(torch.int8).sort(dim=-1, stable=True).indices[:, :slots]
        rows = order[..., None].expand(-1, -1, dim)
        start = counts.cumsum(-1) - counts
        place = torch.arange(longest, device=k.device)
        index = torch.where(place < counts[..., None], start[..., None] + place, -1)
        position = order.gather(1, index.clamp(min=0).flatten(1)).view_as(index) % n
        flat_k, flat_v = (t.reshape(batch, heads * n, dim).gather(1, rows) for t in (k, v))
        return cls(flat_k, flat_v, index, position, total / (batch * heads))

    def attend(self, q: Float[Tensor, "B Hq 1 D"], scale: float) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of one query per head over its own tokens."""
        heads = self.index.shape[1]
        k, v = (t[:, None].expand(-1, heads, -1, -1) for t in (self.k, self.v))
        return gather_decode(q, k, v, self.index, scale=scale, return_lse=True)

    def reorder(self, index: Int[Tensor, " B"]) -> Kept:
        """The rows ``index`` of the batch."""
        index = index.to(self.k.device)
        k, v, slots, position = (t.index_select(0, index) for t in self._tensors)
        return Kept(k, v, slots, position, self.mean)

    def crop(self, length: int) -> Kept:
        """Without what stood at ``length`` or after it (the slots stay)."""
        index = torch.where(self.position < length, self.index, -1)
        mean = float((index >= 0).sum()) / max(1, index.shape[0] * index.shape[1])
        return Kept(self.k, self.v, index, self.position, mean)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k, self.v, self.index, self.position

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self._tensors)


class EvictingStore(KVStore):
    """A layer's cache that drops tokens of the prompt when the first token is decoded.

    Until then everything is held, so that a prompt may come in pieces; the last ``probe`` queries decide.

    Args:
        probe: queries that :meth:`observe` remembers.
        choose: ``(q, k, scale, first_key) -> mask [B, Hkv, N]`` of the tokens to keep.
        capacity: shorter prompts are kept whole.
        name: for errors.
    """

    def __init__(
        self,
        probe: int,
        choose: Callable[[Tensor, Tensor, float, Tensor | None], Tensor],
        capacity: int,
        name: str,
    ) -> None:
        self.probe, self.choose, self.capacity, self.name = probe, choose, capacity, name
        self._length = self._prompt = 0  # tokens taken in, and of which some were dropped
        self._kept: Kept | None = None
        self._k, self._v = SelectState(), SelectState()  # what nothing was dropped of, as it came
        self._seen: tuple[Tensor, float, Tensor | None, int] | None = None  # queries, scale, first key, end

    def __len__(self) -> int:
        return self._length

    def kept(self) -> float:
        return len(self._k) + (0 if self._kept is None else self._kept.mean)

    def append(self, k: Float[Tensor, "B Hkv n D"], v: Float[Tensor, "B Hkv n D"]) -> None:
        if k.shape[2] > 1 and self._kept is not None:
            raise SparselandError(
                f"{self.name} has dropped tokens of this cache, so no second prompt can follow; start afresh"
            )
        if k.shape[2] == 1 and self._seen is not None:
            self._evict()
        self._k.push(k)
        self._v.push(v)
        self._length += k.shape[2]

    def observe(self, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None) -> None:
        q = x.q[:, :, -self.probe :]
        if self._seen is not None and self._seen[3] == self._length - x.q.shape[2]:
            q = torch.cat([self._seen[0], q], dim=2)[:, :, -self.probe :]
        self._seen = (q.clone(), x.scale, first_key, self._length)

    def _evict(self) -> None:
        assert self._seen is not None
        (q, scale, first_key, _), self._seen = self._seen, None
        k, v = self._k.rows, self._v.rows
        if self._kept is None and k.shape[2] > self.capacity:
            self._kept = Kept.of(k, v, self.choose(q, k, scale, first_key))
            self._k, self._v = SelectState(), SelectState()
            self._prompt = self._length

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values.

        Raises:
            SparselandError: some were dropped; nothing that stood in their place would be right.
        """
        if self._kept is not None:
            raise SparselandError(
                f"{self.name} has dropped tokens of this cache; it can only be decoded from, one token at a "
                "time, with padding on the left and the method applied"
            )
        return self._k.rows, self._v.rows

    def attend(
        self, q: Float[Tensor, "B Hq 1 D"], scale: float, first_key: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B Hq 1 D"]:
        if self._kept is None:
            return dense_decode(q, self._k.rows, self._v.rows, first_key=first_key, scale=scale)
        parts = [self._kept.attend(q, scale)]
        if len(self._k):
            k, v = self._k.rows, self._v.rows
            every = torch.arange(k.shape[2], device=q.device).expand(*k.shape[:2], -1)
            parts.append(gather_decode(q, k, v, every, scale=scale, return_lse=True))
        return merge_attention(parts)[0]

    def gather(self, index: Int[Tensor, "B Hkv n"]) -> tuple[Tensor, Tensor]:
        """The chosen tokens; none can be chosen once some were dropped."""
        k, v = self.dense()
        rows = index.clamp(min=0)[..., None].expand(-1, -1, -1, k.shape[3])
        return k.gather(2, rows), v.gather(2, rows)

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        self._k.reorder(index)
        self._v.reorder(index)
        if self._kept is not None:
            self._kept = self._kept.reorder(index)
        if self._seen is not None:
            q, scale, first_key, end = self._seen
            index = index.to(q.device)
            first_key = None if first_key is None else first_key.index_select(0, index)
            self._seen = (q.index_select(0, index), scale, first_key, end)

    def crop(self, length: int) -> None:
        """Forget everything after ``length`` tokens; what was dropped stays dropped."""
        cut = self._length - length
        if cut <= 0:
            return
        if self._seen is not None:
            q, scale, first_key, end = self._seen
            over = max(0, end - length)  # remembered queries that are forgotten
            q = q[:, :, : max(0, q.shape[2] - over)]
            self._seen = (q, scale, first_key, end - over) if q.shape[2] else None
        left = max(0, len(self._k) - cut)
        self._k.crop(left)
        self._v.crop(left)
        if self._kept is not None and length < self._prompt:
            self._kept = self._kept.crop(length)
        self._length = length

    def nbytes(self) -> int:
        held = 0 if self._kept is None else self._kept.nbytes()
        return held + self._k.nbytes() + self._v.nbytes()
