"""S2-Attention's cache: a key head keeps its window and the blocks of its own shards, nothing else.

Strided blocks lie at absolute positions, so a block that has left the window and is on none of a head's
strides is never read again. Of each row and head the newest tokens lie in a ring, the blocks of its
shards behind it; a decoding step lists what its query sees and reads it in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, KVStore
from sparseland.ops.gather_decode import dense_decode, gather_decode
from sparseland.patterns import cdiv

# Buffers grow by a sixteenth: doubling would give the saved memory back.
GROW_BLOCKS = 4


@dataclass(frozen=True)
class Shards:
    """Which blocks the heads of a layer see.

    Args:
        block_size: tokens per block.
        window: blocks up to and including a query's own that every head sees.
        stride: one block in so many is a head's.
        residues: per list of a head, which one (block number modulo ``stride``); -1: all blocks.
    """

    block_size: int
    window: int
    stride: int
    residues: tuple[int, ...]

    def per_key_head(self, kv_heads: int) -> list[tuple[int, ...]]:
        """The residues that each key head must keep, for all its lists; (-1,): everything."""
        share = len(self.residues) // kv_heads
        parts = [self.residues[h * share : (h + 1) * share] for h in range(kv_heads)]
        return [(-1,) if -1 in part else tuple(sorted(set(part))) for part in parts]

    def seen(self, residue: int, length: int) -> int:
        """Tokens that a query at position ``length - 1`` sees in a list with this residue."""
        if residue < 0 or not length:
            return length
        own = (length - 1) // self.block_size
        start = max(0, own - self.window + 1)
        far = max(0, (start - 1 - residue + self.stride) // self.stride)
        return far * self.block_size + length - start * self.block_size


class ShardStore(KVStore):
    """One layer's keys and values.

    Args:
        shards_of: what the heads see, given the numbers of query and key heads; the lists are one per key
            head, or one per query head.
    """

    def __init__(self, shards_of: Callable[[int, int], Shards]) -> None:
        self._shards_of = shards_of
        self._known: Shards | None = None
        self._total = 0
        self._settled = 0  # tokens in the ring or behind it
        self._left = 0  # of these, tokens that have left the ring
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._first: Int[Tensor, " B"] | None = None
        self._sparse: tuple[Tensor, Tensor] | None = None  # [B, Hs, ring + slots + 1, D]; the last is a bin
        self._whole: tuple[Tensor, Tensor] | None = None  # heads that keep everything, [B, Hf, capacity, D]
        self._table: Int[Tensor, "Hs r"] | None = None  # residues that each sparse key head keeps
        self._residues: Int[Tensor, " L"] | None = None  # the shards', on the device

    def __len__(self) -> int:
        return self._total

    @property
    def _shards(self) -> Shards:
        assert self._known is not None, "nothing was settled yet"
        return self._known

    @property
    def _ring(self) -> int:
        """Tokens in the ring: the window and a block more, so that short crops stay exact."""
        return (self._shards.window + 1) * self._shards.block_size

    def kept(self) -> float:
        if self._known is None:
            return self._total
        seen = [self._shards.seen(r, self._total) for r in self._shards.residues]
        return sum(seen) / len(seen)

    # ------------------------------------------------------------ taking in

    def append(self, k: Float[Tensor, "B Hkv n D"], v: Float[Tensor, "B Hkv n D"]) -> None:
        # Where a row's blocks begin is known when the prompt is observed, or at the next step.
        self._waiting.append((k, v))
        self._total += k.shape[2]

    def observe(self, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None) -> None:
        self._settle(first_key, x.q.shape[1])

    def _settle(self, first_key: Int[Tensor, " B"] | None, q_heads: int) -> None:
        """Put the waiting tokens into the ring, and what leaves it behind the ring or away."""
        if not self._waiting:
            return
        keys, values = (torch.cat(part, dim=2) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        batch, heads = keys.shape[:2]
        if self._known is None:
            self._known = self._shards_of(q_heads, heads)
        zero = torch.zeros(batch, dtype=torch.long, device=keys.device)
        self._first = zero if first_key is None else first_key.long()
        sparse = self._n_sparse(heads)
        before, self._settled = self._settled, self._total
        self._grow_whole(keys[:, sparse:], values[:, sparse:], before)
        if not sparse:
            return
        new = (keys[:, :sparse], values[:, :sparse])
        self._reserve(new)
        assert self._sparse is not None
        left, device = self._left, keys.device
        self._left = max(left, self._settled - self._ring)
        from_ring = torch.arange(left, max(left, min(self._left, before)), device=device)
        passing = torch.arange(before, max(before, self._left), device=device)  # never in the ring
        at_once = torch.arange(max(before, self._left), self._settled, device=device)
        for part, room in zip(new, self._sparse, strict=True):
            if from_ring.numel():
                self._keep(room, room[:, :, from_ring % self._ring], from_ring)
            if passing.numel():
                self._keep(room, part[:, :, : passing.numel()], passing)
            room[:, :, at_once % self._ring] = part[:, :, part.shape[2] - at_once.numel() :]

    def _keep(self, room: Tensor, tokens: Tensor, position: Int[Tensor, " n"]) -> None:
        """Write what is on a head's strides to its slot, and the rest into the bin."""
        assert self._table is not None
        assert self._first is not None
        s = self._shards
        place = position - self._first[:, None]  # in the row
        block = torch.div(place, s.block_size, rounding_mode="floor")
        match = self._table[None, :, :, None] == (block % s.stride)[:, None, None]  # [B, Hs, r, n]
        which = match.int().argmax(2)
        slot = (block // s.stride)[:, None] * self._table.shape[1] + which
        slot = slot * s.block_size + (place % s.block_size)[:, None] + self._ring
        kept = match.any(2) & (place >= 0)[:, None]
        slot = torch.where(kept, slot, room.shape[2] - 1)
        room.scatter_(2, slot[..., None].expand_as(tokens), tokens)

    def _slots(self, length: int) -> int:
        """Slots behind the ring that the first ``length`` tokens can take."""
        assert self._table is not None
        cycles = cdiv(cdiv(length, self._shards.block_size), self._shards.stride)
        return cycles * self._table.shape[1] * self._shards.block_size

    def _n_sparse(self, heads: int) -> int:
        """Key heads that drop something; they come first. Makes their table on the way."""
        kept = self._shards.per_key_head(heads)
        some = [r for r in kept if r != (-1,)]
        if any(r != (-1,) for r in kept[len(some) :]):
            raise SparselandError("s2-attention: dense heads must be the last ones")
        if some and self._table is None:
            widest = max(len(r) for r in some)
            rows = [[*r, *[-1] * (widest - len(r))] for r in some]  # no block has residue -1
            assert self._first is not None
            self._table = torch.tensor(rows, device=self._first.device)
        return len(some)

    def _reserve(self, new: tuple[Tensor, Tensor]) -> None:
        """Room for all slots that may be taken by now."""
        need = self._ring + self._slots(max(0, self._settled - self._ring)) + 1
        if self._sparse is None or need > self._sparse[0].shape[2]:
            assert self._table is not None
            step = GROW_BLOCKS * self._table.shape[1] * self._shards.block_size
            capacity = need if self._sparse is None else max(need, need + max(step, need // 16))
            rooms = tuple(t.new_zeros(*t.shape[:2], capacity, t.shape[3]) for t in new)
            if self._sparse is not None:
                for room, old in zip(rooms, self._sparse, strict=True):
                    room[:, :, : old.shape[2] - 1] = old[:, :, :-1]
            self._sparse = (rooms[0], rooms[1])

    def _grow_whole(self, k: Tensor, v: Tensor, before: int) -> None:
        if not k.shape[1]:
            return
        need = self._settled
        if self._whole is None:
            self._whole = (k.clone(), v.clone())
            return
        if need > self._whole[0].shape[2]:
            capacity = need + max(GROW_BLOCKS * self._shards.block_size, need // 16)
            grown = tuple(t.new_zeros(*t.shape[:2], capacity, t.shape[3]) for t in (k, v))
            for room, old in zip(grown, self._whole, strict=True):
                room[:, :, :before] = old[:, :, :before]
            self._whole = (grown[0], grown[1])
        for room, new in zip(self._whole, (k, v), strict=True):
            room[:, :, before:need] = new

    # ------------------------------------------------------------ reading

    def attend(
        self,
        q: Float[Tensor, "B Hq 1 D"],
        scale: float,
        first_key: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B Hq 1 D"]:
        self._settle(first_key, q.shape[1])
        assert self._first is not None
        kv_heads = sum(t[0].shape[1] for t in (self._sparse, self._whole) if t is not None)
        group = q.shape[1] // kv_heads
        if self._residues is None:
            self._residues = torch.tensor(self._shards.residues, device=q.device)
        residues = self._residues
        per_list = q.shape[1] // len(residues)
        n_sparse = 0 if self._sparse is None else self._sparse[0].shape[1] * group
        parts = []
        if self._sparse is not None:
            places, held = self._places()  # [B, Hs, slots]
            seen = self._visible(places, held, residues[: n_sparse // per_list])
            index = torch.where(seen, torch.arange(places.shape[2], device=q.device), -1)
            parts.append(gather_decode(q[:, :n_sparse], *self._sparse, index, scale=scale))
        if self._whole is not None:
            k, v = (t[:, :, : self._settled] for t in self._whole)
            rest = residues[n_sparse // per_list :]
            if all(r < 0 for r in self._shards.residues[n_sparse // per_list :]):
                parts.append(dense_decode(q[:, n_sparse:], k, v, first_key=first_key, scale=scale))
            else:
                places = torch.arange(self._settled, device=q.device) - self._first[:, None]
                places = places[:, None].expand(-1, k.shape[1], -1)
                seen = self._visible(places, places >= 0, rest)
                index = torch.where(seen, torch.arange(self._settled, device=q.device), -1)
                parts.append(gather_decode(q[:, n_sparse:], k, v, index, scale=scale))
        return torch.cat(parts, dim=1)

    def _places(self) -> tuple[Int[Tensor, "B Hs n"], Bool[Tensor, "B Hs n"]]:
        """For each slot of the sparse heads: its token's place in the row, and whether it holds one."""
        assert self._table is not None
        assert self._first is not None
        s, device, first = self._shards, self._first.device, self._first
        ring = torch.arange(self._ring, device=device)
        token = self._left + (ring - self._left) % self._ring
        near = token - first[:, None]  # [B, ring]
        near_held = (token < self._settled) & (near >= 0)
        slot = torch.arange(self._slots(self._left), device=device)
        width = self._table.shape[1]
        residue = self._table[:, (slot // s.block_size) % width]  # [Hs, slots]
        block = slot // (s.block_size * width) * s.stride + residue
        far = (block * s.block_size + slot % s.block_size)[None].expand(first.shape[0], -1, -1)
        far_held = (residue >= 0) & (far + first[:, None, None] < self._left)
        heads = self._table.shape[0]
        places = torch.cat([near[:, None].expand(-1, heads, -1), far], -1)
        return places, torch.cat([near_held[:, None].expand(-1, heads, -1), far_held], -1)

    def _visible(
        self, places: Int[Tensor, "B H n"], held: Bool[Tensor, "B H n"], residues: Int[Tensor, " L"]
    ) -> Bool[Tensor, "B L n"]:
        """What the newest query sees of these places, for the lists with these residues."""
        assert self._first is not None
        s = self._shards
        share = residues.shape[0] // places.shape[1]
        places, held = (t.repeat_interleave(share, 1) for t in (places, held))
        block = torch.div(places, s.block_size, rounding_mode="floor")
        own = ((self._settled - 1 - self._first) // s.block_size)[:, None, None]
        mine = (block % s.stride == residues[:, None]) | (residues[:, None] < 0)
        return held & (mine | (own - block < s.window))

    def dense(self) -> tuple[Tensor, Tensor]:
        waiting = [torch.cat(part, dim=2) for part in zip(*self._waiting, strict=True)]
        if not self._settled:
            return waiting[0], waiting[1]
        out = []
        for at in range(2):
            parts = []
            if self._sparse is not None:
                assert self._first is not None
                places, held = self._places()
                token = torch.where(held, places + self._first[:, None, None], self._settled)
                room = self._sparse[at][:, :, : places.shape[2]]
                full = room.new_zeros(*room.shape[:2], self._settled + 1, room.shape[3])
                parts.append(full.scatter_(2, token[..., None].expand_as(room), room)[:, :, :-1])
            if self._whole is not None:
                parts.append(self._whole[at][:, :, : self._settled])
            whole = torch.cat(parts, dim=1)
            out.append(torch.cat([whole, waiting[at]], dim=2) if waiting else whole)
        return out[0], out[1]

    def gather(self, index: Int[Tensor, "B Hkv n"]) -> tuple[Tensor, Tensor]:
        raise SparselandError(
            "s2-attention drops tokens from the cache, so no other method can choose which to read"
        )

    # ------------------------------------------------------------ upkeep

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        def rows(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            k, v = (t.index_select(0, index.to(t.device)) for t in pair)
            return k, v

        self._waiting = [rows(pair) for pair in self._waiting]
        self._sparse = None if self._sparse is None else rows(self._sparse)
        self._whole = None if self._whole is None else rows(self._whole)
        if self._first is not None:
            self._first = self._first.index_select(0, index.to(self._first.device))

    def crop(self, length: int) -> None:
        if length >= self._total:
            return
        if length >= self._settled:
            rest = length - self._settled
            if self._waiting:
                k, v = (torch.cat(part, dim=2)[:, :, :rest] for part in zip(*self._waiting, strict=True))
                self._waiting = [(k, v)] if rest else []
        else:
            window = self._shards.window * self._shards.block_size
            if length and self._left > max(0, length - window):
                raise SparselandError(
                    f"s2-attention: the cache can't be cropped from {self._total} to {length} tokens: what "
                    f"the window showed then is gone; it can be cropped by {self._shards.block_size}"
                )
            self._waiting, self._settled = [], length
            self._left = min(self._left, length)
        self._total = length

    def nbytes(self) -> int:
        held = [*self._waiting, *(pair for pair in (self._sparse, self._whole) if pair is not None)]
        return sum(t.numel() * t.element_size() for pair in held for t in pair)
