"""The bounded KV cache of a local layer: the tokens of the current blocks or window, and the sinks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, KVStore
from sparseland.ops.gather_decode import dense_decode


class LocalStore(KVStore):
    """Keeps what the newest token of some row still sees.

    Args:
        low: the first position that the query at a position sees, sinks apart; both count from a row's
            first token that is no padding.
        sinks: first tokens of each row that stay.
    """

    def __init__(self, low: Callable[[int], int], sinks: int) -> None:
        self._low, self._sinks = low, sinks
        self._length = 0
        self._start = 0  # position of the first token of `_recent`
        self._recent: tuple[Tensor, Tensor] | None = None
        self._head: tuple[Tensor, Tensor] | None = None  # tokens 0 ... n, as far as some row's sinks reach
        self._firsts: list[int] | None = None  # each row's padding, once a prompt showed it
        self._pending: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self._length

    def kept(self) -> float:
        pending = 0 if self._pending is None else self._pending[0].shape[2]
        return min(self._length, sum(len(p) for p in self._positions()) + pending)

    def append(self, k: Float[Tensor, "B Hkv n D"], v: Float[Tensor, "B Hkv n D"]) -> None:
        """Take in new tokens. A prompt's wait until it was computed, when its padding is known."""
        self._settle()
        self._length += k.shape[2]
        self._pending = (k, v)
        if k.shape[2] == 1 and self._firsts is not None:
            self._settle()

    def observe(self, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None) -> None:
        self._note_padding(first_key)
        self._settle()

    def dense(self) -> tuple[Tensor, Tensor]:
        self._settle()
        assert self._recent is not None, "nothing was appended yet"
        out = []
        for part, recent in enumerate(self._recent):
            full = recent.new_zeros(*recent.shape[:2], self._length, recent.shape[3])
            full[:, :, self._start :] = recent
            if self._head is not None:
                full[:, :, : self._head[part].shape[2]] = self._head[part]
            out.append(full)
        return out[0], out[1]

    def attend(
        self, q: Float[Tensor, "B Hq 1 D"], scale: float, first_key: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B Hq 1 D"]:
        if self._firsts is None:
            self._note_padding(first_key)
        self._settle()
        assert self._recent is not None, "nothing was appended yet"
        head, recent = self._positions()
        k, v = self._recent
        if head:
            assert self._head is not None
            k, v = (torch.cat([h[:, :, : len(head)], r], 2) for h, r in zip(self._head, (k, v), strict=True))
        firsts = self._row_starts(q.shape[0])
        lows = [self._low(max(0, self._length - 1 - f)) + f for f in firsts]
        if not head and len(set(lows)) == 1:
            seen = slice(lows[0] - self._start, None)
            return dense_decode(q, k[:, :, seen], v[:, :, seen], scale=scale)
        position = torch.tensor([*head, *recent], device=q.device)
        low, first = (torch.tensor(x, device=q.device)[:, None] for x in (lows, firsts))
        near = (position >= low) | (position < first + self._sinks)
        return dense_decode(q, k, v, valid=near & (position >= first), scale=scale)

    def gather(self, index: Int[Tensor, "B Hkv n"]) -> tuple[Tensor, Tensor]:
        raise SparselandError(
            "masformer drops tokens from the cache and can't be combined with a method that selects them"
        )

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        self._settle()
        if self._recent is not None:
            self._recent = _rows(self._recent, index)
        if self._head is not None:
            self._head = _rows(self._head, index)
        if self._firsts is not None and any(self._firsts):
            self._firsts = [self._firsts[i] for i in index.tolist()]
        elif self._firsts is not None:
            self._firsts = [0] * index.numel()

    def crop(self, length: int) -> None:
        """Forget everything after ``length`` tokens.

        Raises:
            SparselandError: the next token would see one that is gone.
        """
        length = max(0, length)
        if length >= self._length:
            return
        self._settle()
        assert self._recent is not None
        firsts = self._row_starts(self._recent[0].shape[0])
        needed = min(self._low(max(0, length - f)) + f for f in firsts)
        if length > needed and needed < self._start:
            raise SparselandError(
                f"masformer keeps the tokens from {self._start} on in this layer: a cache of {self._length} "
                f"can't go back to {length}, where tokens from {needed} on are seen"
            )
        self._length = length
        self._recent = _columns(self._recent, slice(0, max(0, length - self._start)))
        self._start = min(self._start, length)
        if self._head is not None:
            self._head = _columns(self._head, slice(0, length))

    def nbytes(self) -> int:
        """Bytes of keys and values held, a prompt that waits included."""
        held = [*(self._recent or ()), *(self._head or ()), *(self._pending or ())]
        return sum(t.numel() * t.element_size() for t in held)

    def _positions(self) -> tuple[range, range]:
        """Positions of the sinks that are not among the recent tokens, and of those."""
        recent = 0 if self._recent is None else self._recent[0].shape[2]
        head = 0 if self._head is None else min(self._head[0].shape[2], self._start)
        return range(head), range(self._start, self._start + recent)

    def _row_starts(self, batch: int) -> list[int]:
        return [0] * batch if self._firsts is None else self._firsts

    def _note_padding(self, first_key: Tensor | None) -> None:
        if first_key is not None:
            self._firsts = [int(f) for f in first_key.tolist()]
        elif self._firsts is None and self._pending is not None:
            self._firsts = [0] * self._pending[0].shape[0]

    def _settle(self) -> None:
        """Add the tokens that wait, then let go of what the newest token does not see."""
        if self._pending is None:
            return
        new, self._pending = self._pending, None
        firsts = self._row_starts(new[0].shape[0])
        last = self._length - 1
        low = min(self._low(max(0, last - f)) + f for f in firsts)
        self._extend_head(new, max(firsts) + self._sinks)
        begin = last + 1 - new[0].shape[2]  # position of the first new token
        if self._recent is not None and low < begin:
            old = _columns(self._recent, slice(max(0, low - self._start), None))
            self._recent = _joined(old, new)
            self._start = max(self._start, low)
        else:
            # A copy: a slice would hold the whole prompt.
            k, v = (t[:, :, max(0, low - begin) :].clone() for t in new)
            self._recent, self._start = (k, v), max(begin, low)

    def _extend_head(self, new: tuple[Tensor, Tensor], end: int) -> None:
        if not self._sinks:
            return
        have = 0 if self._head is None else self._head[0].shape[2]
        begin = self._length - new[0].shape[2]
        if have < min(end, self._length) and have == begin:
            more = _columns(new, slice(0, end - begin))
            k, v = (t.clone() for t in more)
            self._head = (k, v) if self._head is None else _joined(self._head, (k, v))


def _joined(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([a[0], b[0]], 2), torch.cat([a[1], b[1]], 2)


def _columns(pair: tuple[Tensor, Tensor], which: slice) -> tuple[Tensor, Tensor]:
    return pair[0][:, :, which], pair[1][:, :, which]


def _rows(pair: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    index = index.to(pair[0].device)
    return pair[0].index_select(0, index), pair[1].index_select(0, index)
