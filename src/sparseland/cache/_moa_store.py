"""MoA's cache: per key head the first block of tokens and a ring of the newest ones, nothing else.

Key heads of one layer with the same rule share a buffer ``[B, h, sinks + ring, D]``, so a decoding step
is one dense attention per rule (a plan has at most two per layer), and the memory is what the rules say.
Rings hold keys after RoPE at their true positions; within a ring the order does not matter to attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.cache._moa_plan import Rule, per_head
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, KVStore
from sparseland.ops.gather_decode import dense_decode

# Buffers of heads that drop nothing grow by this many tokens, or by a sixteenth.
GROW_TOKENS = 256


class SpanStore(KVStore):
    """One layer's ragged circular caches.

    Args:
        rules: one per key head, or one for all.
        sinks: first tokens that stay.
        block_size: spans are whole blocks of this size.
        new_tokens: spans are those of the prompt's length plus this.
    """

    def __init__(self, rules: Sequence[Rule] | Rule, sinks: int, block_size: int, new_tokens: int) -> None:
        self._rules = rules
        self._sizes = (sinks, block_size, new_tokens)
        self._rings: list[_Ring] = []
        self._lengths: list[int] = []  # tokens of each row, without padding
        self._total = 0
        self._pending: tuple[Tensor, Tensor] | None = None  # a prompt that observe() has not shown yet

    def __len__(self) -> int:
        return self._total

    def kept(self) -> float:
        if not self._rings:
            return self._total
        heads = sum(len(ring.heads) for ring in self._rings)
        rows = len(self._lengths)
        held = sum(len(r.heads) * sum(r.held_in(b) for b in range(rows)) for r in self._rings)
        return held / (heads * rows)

    def append(self, k: Float[Tensor, "B Hkv n D"], v: Float[Tensor, "B Hkv n D"]) -> None:
        if self._pending is not None:
            self._settle([0] * k.shape[0])
        self._total += k.shape[2]
        if k.shape[2] > 1 or not self._rings:
            # Where the rows' padding ends is only known when the prompt is observed.
            for ring in self._rings:
                ring.check_continues()
            self._pending = (k, v)
            return
        for ring in self._rings:
            ring.push(ring.pick(k), ring.pick(v))
        self._lengths = [n + 1 for n in self._lengths]

    def observe(self, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None) -> None:
        if self._pending is not None:
            first = [0] * x.q.shape[0] if first_key is None else [int(f) for f in first_key.tolist()]
            self._settle(first)

    def _settle(self, first: list[int]) -> None:
        """Move the pending prompt into the rings; ``first`` is each row's first token that is no padding."""
        assert self._pending is not None
        (k, v), self._pending = self._pending, None
        lengths = [max(0, self._total - f) for f in first]
        if not self._rings:
            self._rings = self._new_rings(k)
            self._lengths = [0] * len(lengths)
        for ring in self._rings:
            ring.extend(ring.pick(k), ring.pick(v), lengths)
        self._lengths = lengths

    def _new_rings(self, k: Tensor) -> list[_Ring]:
        heads = k.shape[1]
        rules = per_head(self._rules, heads)
        return [
            _Ring(rule, [h for h in range(heads) if rules[h] == rule], k, *self._sizes)
            for rule in dict.fromkeys(rules)
        ]

    def attend(
        self,
        q: Float[Tensor, "B Hq 1 D"],
        scale: float,
        first_key: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B Hq 1 D"]:
        if self._pending is not None:  # a prompt of one token is its own decoding step
            self.observe(AttentionInputs(q, q, q, scale, 0), first_key)
        if len(self._rings) == 1:
            return self._rings[0].attend(q, scale)
        group = q.shape[1] // sum(len(ring.heads) for ring in self._rings)
        grouped = torch.unflatten(q, 1, (-1, group))
        out = torch.empty_like(grouped)
        for ring in self._rings:
            part = ring.attend(ring.pick(grouped).flatten(1, 2), scale)
            out.index_copy_(1, ring.index, torch.unflatten(part, 1, (-1, group)))
        return out.view(q.shape)

    def dense(self) -> tuple[Tensor, Tensor]:
        if not self._rings:
            assert self._pending is not None, "nothing was appended yet"
            return self._pending
        n = self._total - (0 if self._pending is None else self._pending[0].shape[2])
        shape = (len(self._lengths), sum(len(r.heads) for r in self._rings), n, self._rings[0].k.shape[3])
        out = tuple(self._rings[0].k.new_zeros(shape) for _ in range(2))
        for ring in self._rings:
            for row, length in enumerate(self._lengths):
                ring.unroll(row, out, n - length)
        if self._pending is None:
            return out[0], out[1]
        k, v = (torch.cat([old, new], 2) for old, new in zip(out, self._pending, strict=True))
        return k, v

    def gather(self, index: Int[Tensor, "B Hkv n"]) -> tuple[Tensor, Tensor]:
        """Refused: a selector would choose among tokens that are no longer there."""
        raise SparselandError(
            "moa drops tokens from the cache and can't be combined with a method that selects them"
        )

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        rows = [int(i) for i in index.tolist()]
        if self._pending is not None:
            k, v = (t.index_select(0, index.to(t.device)) for t in self._pending)
            self._pending = (k, v)
        for ring in self._rings:
            ring.reorder(index, rows)
        if self._rings:
            self._lengths = [self._lengths[i] for i in rows]

    def crop(self, length: int) -> None:
        """Forget everything after ``length`` tokens; what the rings have dropped before stays dropped."""
        cut = self._total - max(0, length)
        if cut <= 0:
            return
        if self._pending is not None:
            n = self._pending[0].shape[2]
            if cut < n or not self._rings:
                k, v = (t[:, :, : max(0, n - cut)] for t in self._pending)
                self._pending, self._total = (k, v) if k.shape[2] else None, self._total - cut
                return
            self._pending, self._total, cut = None, self._total - n, cut - n
        self._total -= cut
        self._lengths = [max(0, n - cut) for n in self._lengths]
        for ring in self._rings:
            ring.crop(self._lengths)

    def nbytes(self) -> int:
        pending = () if self._pending is None else self._pending
        tensors = [*pending, *(t for ring in self._rings for t in (ring.k, ring.v))]
        return sum(t.numel() * t.element_size() for t in tensors)


class _Ring:
    """The caches of the key heads that share a rule: ``[B, h, sinks + ring, D]``, one ring size per row.

    Position p of a row lies in slot p if it is a sink, else in slot ``sinks + (p - sinks) % ring``.
    """

    def __init__(
        self, rule: Rule, heads: list[int], like: Tensor, sinks: int, block_size: int, new_tokens: int
    ) -> None:
        self.rule, self.heads = rule, heads
        self.sinks, self.block_size, self.new_tokens = sinks, block_size, new_tokens
        self.index = torch.tensor(heads, device=like.device)
        self.all = len(heads) == like.shape[1]
        self.k = self.v = like.new_empty(like.shape[0], len(heads), 0, like.shape[3])
        self.ring = [0] * like.shape[0]
        self.held = [0] * like.shape[0]  # newest tokens in the ring, per row
        self.lengths = [0] * like.shape[0]

    def pick(self, x: Tensor) -> Tensor:
        """This ring's heads of a tensor ``[B, Hkv, …]``."""
        return x if self.all else x.index_select(1, self.index)

    def held_in(self, row: int) -> int:
        """Tokens held of one row."""
        return min(self.sinks, self.lengths[row]) + self.held[row]

    def _wanted(self, length: int) -> int:
        """Ring size of a row whose prompt has ``length`` tokens."""
        if self.rule.full:
            return length + max(GROW_TOKENS, length // 16)
        n = length + self.new_tokens
        return self.rule.blocks(n, self.block_size) * self.block_size - self.sinks

    def check_continues(self) -> None:
        """Raise unless a prompt that comes now finds what its pattern reads of the past."""
        for row, n in enumerate(self.lengths):
            needed = (self.rule.blocks(n, self.block_size, up=False) - 1) * self.block_size - 1
            if self.held[row] < min(needed, n - self.sinks) and not self.rule.full:
                raise SparselandError(
                    f"moa: the cache was decoded into further than new_tokens={self.new_tokens} (or was "
                    "cropped), so a later prompt would miss part of its windows; raise new_tokens"
                )

    def extend(self, k: Tensor, v: Tensor, lengths: list[int]) -> None:
        """Take in a prompt: each row's newest tokens up to a length of ``lengths``."""
        sizes = [max(old, self._wanted(n)) for old, n in zip(self.ring, lengths, strict=True)]
        if self.rule.full:  # positions are slots: no row may wrap before another
            sizes = [max(sizes)] * len(sizes)
        before, (old_k, old_v) = self.lengths, (self.k, self.v)
        old_ring, old_held = self.ring, self.held
        shape = (*k.shape[:2], self.sinks + max(sizes), k.shape[3])
        # Slots that no token has reached yet are masked, and 0 so that no NaN gets past the mask.
        self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        self.ring, self.lengths = sizes, list(lengths)
        self.held = [
            min(size, max(0, n - self.sinks), held + n - old)
            for size, n, held, old in zip(sizes, lengths, old_held, before, strict=True)
        ]
        for row, n in enumerate(lengths):
            # Old and new tokens of the row in order of position, then to their slots.
            for new, old, target in ((k, old_k, self.k), (v, old_v, self.v)):
                came = new[row, :, new.shape[2] - (n - before[row]) :]
                if before[row]:
                    past = _in_order(old[row], self.sinks, old_ring[row], before[row], old_held[row])
                    came = torch.cat([past, came], 1)
                sinks = min(self.sinks, n)
                target[row, :, :sinks] = came[:, :sinks]
                self._write(target[row], came[:, came.shape[1] - self.held[row] :], row)

    def _write(self, target: Float[Tensor, "h S D"], tokens: Float[Tensor, "h n D"], row: int) -> None:
        """Put a row's newest tokens into its ring: at most two runs of slots."""
        n, size = tokens.shape[1], self.ring[row]
        if not n:
            return
        start = (self.lengths[row] - n - self.sinks) % size
        first = min(n, size - start)
        target[:, self.sinks + start : self.sinks + start + first] = tokens[:, :first]
        target[:, self.sinks : self.sinks + n - first] = tokens[:, first:]

    def push(self, k: Float[Tensor, "B h 1 D"], v: Float[Tensor, "B h 1 D"]) -> None:
        """Take in one token per row, over the oldest where the ring is full."""
        if self.rule.full and max(self.lengths) >= self.k.shape[2]:
            self._grow()
        slots = [self._slot(row, n) for row, n in enumerate(self.lengths)]
        for target, new in ((self.k, k), (self.v, v)):
            if len(set(slots)) == 1:
                target[:, :, slots[0]] = new[:, :, 0]
            else:
                at = torch.tensor(slots, device=new.device)
                target[torch.arange(len(slots), device=new.device), :, at] = new[:, :, 0]
        for row, n in enumerate(self.lengths):
            if n >= self.sinks:
                self.held[row] = min(self.ring[row], self.held[row] + 1)
            self.lengths[row] = n + 1

    def _slot(self, row: int, position: int) -> int:
        if position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % self.ring[row]

    def _grow(self) -> None:
        size = self.k.shape[2] + max(GROW_TOKENS, self.k.shape[2] // 16)
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], size, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)
        self.ring = [size - self.sinks] * len(self.ring)

    def attend(self, q: Float[Tensor, "B Hq 1 D"], scale: float) -> Float[Tensor, "B Hq 1 D"]:
        """Attention of one query of each head over what its ring holds."""
        reach = [min(n, self.sinks + ring) for n, ring in zip(self.lengths, self.ring, strict=True)]
        end = max(reach)
        k, v = self.k[:, :, :end], self.v[:, :, :end]
        if all(self.held_in(row) == end for row in range(len(reach))):
            return dense_decode(q, k, v, scale=scale)
        return dense_decode(q, k, v, valid=self._valid(end, q.device), scale=scale)

    def _valid(self, end: int, device: torch.device) -> Tensor:
        """Slots in use, ``[B, end]``."""
        slot = torch.arange(end, device=device)
        lengths, ring, held = (
            torch.tensor(x, device=device)[:, None] for x in (self.lengths, self.ring, self.held)
        )
        # The newest position that slot s can hold, if the row reaches that far.
        newest = lengths - 1 - (lengths - 1 - slot) % ring
        in_ring = (slot >= self.sinks) & (slot < self.sinks + ring) & (newest >= self.sinks)
        return (slot < lengths.clamp(max=self.sinks)) | (in_ring & (newest >= lengths - held))

    def unroll(self, row: int, out: tuple[Tensor, ...], shift: int) -> None:
        """Write one row's tokens to their positions (plus ``shift``) in ``out [B, Hkv, N, D]``."""
        n, held, sinks = self.lengths[row], self.held[row], min(self.sinks, self.lengths[row])
        at = torch.cat([torch.arange(sinks), torch.arange(n - held, n)]).to(self.k.device) + shift
        for source, target in ((self.k, out[0]), (self.v, out[1])):
            tokens = _in_order(source[row], self.sinks, self.ring[row], n, held)
            target[row, self.index[:, None], at] = tokens

    def reorder(self, index: Int[Tensor, " B"], rows: list[int]) -> None:
        """Follow a beam search."""
        self.k, self.v = (t.index_select(0, index.to(t.device)) for t in (self.k, self.v))
        self.ring, self.held, self.lengths = (
            [x[i] for i in rows] for x in (self.ring, self.held, self.lengths)
        )

    def crop(self, lengths: list[int]) -> None:
        """Forget the newest tokens of each row down to ``lengths``."""
        for row, n in enumerate(lengths):
            self.held[row] = max(0, min(self.held[row] - (self.lengths[row] - n), n - self.sinks))
        self.lengths = list(lengths)


def _in_order(
    slots: Float[Tensor, "h S D"], sinks: int, ring: int, length: int, held: int
) -> Float[Tensor, "h n D"]:
    """A row's tokens by position: its sinks, then the ``held`` newest."""
    position = torch.arange(length - held, length, device=slots.device)
    at = torch.cat(
        [
            torch.arange(min(sinks, length), device=slots.device),
            sinks + (position - sinks) % max(1, ring),
        ]
    )
    return slots[:, at]
