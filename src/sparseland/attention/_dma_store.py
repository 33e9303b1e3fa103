"""A KV cache of the w best keys per head: what a causal top-w by the keys' own scores can ever read again."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparseland.attention._dma_selection import best_first, eviction_times, ranking
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, KVStore

# Slots are added this many at a time, or by half of what there is, up to the width.
GROW_SLOTS = 64


class TopStore(KVStore):
    """Slots for the ``width`` best tokens of each key head, in no particular order.

    A token that was once displaced can't be seen by any later query, so decoding from the slots equals
    computing over all tokens. Empty slots have position -1 and score ``-inf``.

    Args:
        width: tokens kept per key head.
        own: whether a query sees its own token even if it is not kept.
        head: gives the scores of values, ``[B, Hkv, n]``, and their bias; None: all scores are 0.
    """

    def __init__(self, width: int, own: bool, head: nn.Module | None) -> None:
        self.width, self.own, self.head = width, own, head
        self._length = self._used = 0
        self._k = self._v = self._score = self._position = _NOTHING
        # Per head: the newest token that displaced another (see `crop`), and whether the very newest is kept.
        self._displacer = self._kept_newest = _NOTHING
        self._newest: tuple[Tensor, Tensor, Tensor] | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self._first: Int[Tensor, " B"] | None = None

    def __len__(self) -> int:
        return self._length

    def kept(self) -> float:
        pending = 0 if self._pending is None else self._pending[0].shape[2]
        return min(self._length, self.width, self._used + pending)

    def append(self, k: Float[Tensor, "B Hkv n D"], v: Float[Tensor, "B Hkv n D"]) -> None:
        """Take in new tokens. A prompt's wait until it was computed, when its padding is known."""
        self._settle()
        n = k.shape[2]
        if self._k is _NOTHING:
            self._start(k)
        self._length += n
        self._newest = None
        if n == 1:
            self._push(k, v)
        else:
            self._pending = (k, v)

    def observe(self, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None) -> None:
        if first_key is not None:
            self._first = first_key
        self._settle()

    def marks(self) -> Float[Tensor, "B Hkv n"] | None:
        """The kept tokens' scores, ``-inf`` for those that are gone."""
        n = self._length - (0 if self._pending is None else self._pending[0].shape[2])
        if n == 0 or self._used == 0:
            return None
        score, position = self._slots(self._score), self._slots(self._position)
        marks = score.new_full((*score.shape[:2], n + 1), -torch.inf)
        # Empty slots go to one extra place that is cut off again.
        return marks.scatter_(-1, torch.where(position >= 0, position, n), score)[..., :n]

    def dense(self) -> tuple[Tensor, Tensor]:
        self._settle()
        position = self._slots(self._position)
        target = torch.where(position >= 0, position, self._length)[..., None]
        out = []
        for kept in (self._slots(self._k), self._slots(self._v)):
            full = kept.new_zeros(*kept.shape[:2], self._length + 1, kept.shape[3])
            out.append(full.scatter_(2, target.expand_as(kept), kept)[:, :, : self._length])
        return out[0], out[1]

    def attend(
        self, q: Float[Tensor, "B Hq 1 D"], scale: float, first_key: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B Hq 1 D"]:
        self._settle()
        k, v = self._slots(self._k), self._slots(self._v)
        score, seen = self._slots(self._score), self._slots(self._position) >= 0
        if first_key is not None:
            seen = seen & (self._slots(self._position) >= first_key[:, None, None])
        if self.own and self._newest is not None:
            k, v = torch.cat([k, self._newest[0]], 2), torch.cat([v, self._newest[1]], 2)
            score = torch.cat([score, self._newest[2]], -1)
            seen = torch.cat([seen, ~self._kept_newest], -1)
        bias = score if self.head is None else self.head.bias(score)  # type: ignore[operator]
        return attend_biased(q, k, v, bias, seen, scale)

    def gather(self, index: Int[Tensor, "B Hkv n"]) -> tuple[Tensor, Tensor]:
        raise SparselandError(
            "dynamic-mask-attention drops tokens from the cache and can't be combined with a method that "
            "selects them"
        )

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        self._settle()
        if self._k is _NOTHING:
            return
        index = index.to(self._k.device)
        for name in ("_k", "_v", "_score", "_position", "_displacer", "_kept_newest"):
            setattr(self, name, getattr(self, name).index_select(0, index))
        if self._newest is not None:
            k, v, score = (t.index_select(0, index) for t in self._newest)
            self._newest = (k, v, score)
        if self._first is not None:
            self._first = self._first.index_select(0, index.to(self._first.device))

    def crop(self, length: int) -> None:
        """Forget everything after ``length`` tokens.

        Raises:
            SparselandError: one of those tokens displaced an earlier one, which is gone.
        """
        length = max(0, length)
        if length >= self._length:
            return
        self._settle()
        if bool((self._displacer >= length).any()):
            raise SparselandError(
                f"dynamic-mask-attention keeps {self.width} tokens per head: a cache of {self._length} can't "
                f"go back to {length}, since later tokens displaced some of those"
            )
        late = self._position >= length
        self._position = self._position.masked_fill(late, -1)
        self._score = self._score.masked_fill(late, -torch.inf)
        self._newest = None
        self._length = length

    def nbytes(self) -> int:
        """Bytes allocated: slots, their scores and positions, and a prompt that waits."""
        held = [self._k, self._v, self._score, self._position, *(self._newest or ()), *(self._pending or ())]
        return sum(t.numel() * t.element_size() for t in held)

    def _slots(self, x: Tensor) -> Tensor:
        return x[:, :, : self._used]

    def _scores(self, v: Float[Tensor, "B Hkv n D"]) -> Float[Tensor, "B Hkv n"]:
        with torch.no_grad():
            return v.new_zeros(v.shape[:3], dtype=torch.float32) if self.head is None else self.head(v)

    def _start(self, k: Tensor) -> None:
        self._k, self._v = k.new_empty(*k.shape[:2], 0, k.shape[3]), k.new_empty(*k.shape[:2], 0, k.shape[3])
        self._score = torch.empty(*k.shape[:2], 0, device=k.device)
        self._position = torch.empty(*k.shape[:2], 0, dtype=torch.int64, device=k.device)
        self._displacer = torch.full((*k.shape[:2], 1), -1, dtype=torch.int64, device=k.device)
        self._kept_newest = torch.ones(*k.shape[:2], 1, dtype=torch.bool, device=k.device)

    def _push(self, k: Float[Tensor, "B Hkv 1 D"], v: Float[Tensor, "B Hkv 1 D"]) -> None:
        """One token: into a new slot, or into the worst one's if it is at least as good."""
        score, at = self._scores(v), self._length - 1
        if self._used < self.width:
            if self._used == self._k.shape[2]:
                self._grow()
            self._k[:, :, self._used], self._v[:, :, self._used] = k[:, :, 0], v[:, :, 0]
            self._score[:, :, self._used], self._position[:, :, self._used] = score[:, :, 0], at
            self._used += 1
            self._kept_newest = torch.ones_like(self._kept_newest)
            return
        ranks = ranking(self._score)
        lowest = ranks.amin(-1, keepdim=True)
        # Of the worst the earliest goes, an empty slot (position -1) before all.
        age = torch.where(ranks == lowest, self._position, torch.iinfo(torch.int64).max)
        slot = age.argmin(-1, keepdim=True)
        enters = ranking(score) >= lowest
        old = self._position.gather(-1, slot)
        self._displacer = torch.where(enters & (old >= 0), at, self._displacer)
        self._kept_newest = enters
        self._newest = (k, v, score) if self.own else None
        self._position.scatter_(-1, slot, torch.where(enters, at, old))
        self._score.scatter_(-1, slot, torch.where(enters, score, self._score.gather(-1, slot)))
        rows = slot[..., None].expand(-1, -1, -1, k.shape[3])
        for kept, new in ((self._k, k), (self._v, v)):
            kept.scatter_(2, rows, torch.where(enters[..., None], new, kept.gather(2, rows)))

    def _grow(self) -> None:
        more = min(self.width, self._used + max(GROW_SLOTS, self._used // 2)) - self._used
        shape = (*self._k.shape[:2], more)
        self._k, self._v = (torch.cat([x, x.new_zeros(*shape, x.shape[3])], 2) for x in (self._k, self._v))
        self._score = torch.cat([self._score, self._score.new_full(shape, -torch.inf)], 2)
        self._position = torch.cat([self._position, self._position.new_full(shape, -1)], 2)

    def _settle(self) -> None:
        """Let a prompt's tokens that are not padding compete with those held."""
        if self._pending is None:
            return
        (k, v), self._pending = self._pending, None
        n = k.shape[2]
        position = torch.arange(self._length - n, self._length, device=k.device).expand(k.shape[:3])
        score = self._scores(v)
        if self._first is not None:
            padding = position < self._first.to(k.device)[:, None, None]
            position, score = position.masked_fill(padding, -1), score.masked_fill(padding, -torch.inf)
        # In the order of positions, since of equal scores the later stays.
        order = self._slots(self._position).argsort(dim=-1, stable=True)
        slots = (self._position, self._score)
        position, score = (
            torch.cat([x.gather(-1, order), new], -1)
            for x, new in zip(map(self._slots, slots), (position, score), strict=True)
        )
        rows = order[..., None].expand(-1, -1, -1, k.shape[3])
        k, v = (
            torch.cat([self._slots(x).gather(2, rows), new], 2) for x, new in ((self._k, k), (self._v, v))
        )
        total = position.shape[2]
        if total > self.width:
            ranks = ranking(score)
            ends = eviction_times(ranks, self.width)
            index = torch.arange(total, device=k.device)
            displaced = (ends > index) & (ends < total) & (position >= 0)
            by = position.gather(-1, ends.clamp(max=total - 1)).masked_fill(~displaced, -1)
            self._displacer = torch.maximum(self._displacer, by.amax(-1, keepdim=True))
            best = best_first(ranks)[..., : self.width].sort(-1).values
            position, score = position.gather(-1, best), score.gather(-1, best)
            rows = best[..., None].expand(-1, -1, -1, k.shape[3])
            k, v = k.gather(2, rows), v.gather(2, rows)
        self._k, self._v, self._score, self._position = k, v, score, position.contiguous()
        self._used = position.shape[2]


_NOTHING = torch.empty(0)


def attend_biased(
    q: Float[Tensor, "B Hq 1 D"],
    k: Float[Tensor, "B Hkv n D"],
    v: Float[Tensor, "B Hkv n D"],
    bias: Float[Tensor, "B Hkv n"],
    seen: Bool[Tensor, "B Hkv n"],
    scale: float,
) -> Float[Tensor, "B Hq 1 D"]:
    """One query over a few keys with a bias each, in float32; 0 where a head sees nothing."""
    grouped = torch.unflatten(q[:, :, 0].float(), 1, (k.shape[1], -1))  # (B, Hkv, G, D)
    logits = grouped @ k.float().mT * scale + bias[:, :, None]
    logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
    # Values of what is not seen may be anything.
    values = v.float().masked_fill(~seen[..., None], 0.0)
    out = (weights @ values) / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return out.flatten(1, 2)[:, :, None].to(q.dtype)
