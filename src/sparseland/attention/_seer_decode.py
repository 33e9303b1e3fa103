"""SeerAttention-R's memory while decoding: a vector per full block of a row's keys, and the newest keys."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.attention._seer_gate import DecodeGate, Turns
from sparseland.method import SelectState
from sparseland.ops.block_gate import unrotated_pool
from sparseland.ops.rotary import turn_back


class GateState(SelectState):
    """One layer's compressed keys, ``rows [B, Hkv, M, C]``: a block's vector once the block is full.

    A row's blocks count from its first token, so a padded row has the vectors that it would have alone.
    The last two blocks' keys are kept beside them: a block that fills up while decoding is pooled from these,
    since with a store the cache itself can't be read.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self._tokens = 0
        self._pooled = 0  # tokens that the vectors know of
        self._newest: Tensor | None = None  # (B, Hkv, <= 2 b, D), the last keys

    def __len__(self) -> int:
        return self._tokens

    def push(self, new: Float[Tensor, "B Hkv n D"]) -> None:
        """Note new keys; their blocks are pooled when a gate is at hand."""
        self._tokens += new.shape[2]
        keep = 2 * self.block_size
        old = new[:, :, :0] if self._newest is None else self._newest
        self._newest = torch.cat((old, new[:, :, -keep:]), dim=2)[:, :, -keep:]

    def compress(
        self,
        gate: DecodeGate,
        keys: Float[Tensor, "B Hkv N D"],
        tables: Turns,
        first_key: Int[Tensor, " B"] | None,
    ) -> None:
        """Bring the vectors up to date; ``keys`` are the cache's, of which only missing blocks are read."""
        b, n, before = self.block_size, self._tokens, self._pooled
        self._pooled = n
        if first_key is None:
            have, full = before // b, n // b
            if full > have:
                self._write(have, self._vectors(gate, self._last(keys, have * b), tables, have, full))
        elif n == before + 1 and self._buffer is not None and self._known(b):
            self._write_completed(gate, tables, first_key)
        elif n != before:
            self._write(0, self._vectors(gate, _aligned(keys, first_key, b), tables, 0, n // b))

    def _last(self, keys: Tensor, start: int) -> Tensor:
        """The keys from token ``start`` on: the newest where they reach back so far."""
        assert self._newest is not None
        held = self._tokens - self._newest.shape[2]
        # A prompt's own keys are at hand; only a step that follows a store finds nothing in the cache.
        return self._newest[:, :, start - held :] if start >= held else keys[:, :, start:]

    def _known(self, count: int) -> bool:
        return self._newest is not None and self._newest.shape[2] >= count

    def _vectors(
        self, gate: DecodeGate, keys: Tensor, tables: Turns, first: int, end: int
    ) -> Float[Tensor, "B Hkv m C"]:
        """The vectors of blocks ``first`` to ``end``, whose keys ``keys`` begin with."""
        b = self.block_size
        keys = keys[:, :, : (end - first) * b]
        if tables is None:
            return gate.keys(unrotated_pool(keys, b, None, extremes=True), None)
        cos, sin = (t[first * b : end * b] for t in tables)
        return gate.keys(unrotated_pool(keys, b, (cos, sin), extremes=True), (cos[::b], sin[::b]))

    def _write(self, first: int, vectors: Float[Tensor, "B Hkv m C"]) -> None:
        """Put vectors in place, from block ``first`` on."""
        end = first + vectors.shape[2]
        if self._buffer is None or self._buffer.shape[2] < end:
            grown = vectors.new_zeros(*vectors.shape[:2], max(end, 2 * first, 16), vectors.shape[3])
            if self._buffer is not None:
                grown[:, :, :first] = self._buffer[:, :, :first]
            self._buffer = grown
        self._buffer[:, :, first:end] = vectors
        self._length = end

    def _write_completed(self, gate: DecodeGate, tables: Turns, first_key: Int[Tensor, " B"]) -> None:
        """Pool every row's last b tokens, and keep what is a full block; the host never asks which."""
        assert self._newest is not None
        b, last = self.block_size, self._newest[:, :, -self.block_size :]
        tokens = self._tokens - first_key  # of each row
        block = tokens // b - 1
        turns: Turns = None
        if tables is not None:
            position = (tokens - b)[:, None] + torch.arange(b, device=last.device)
            cos, sin = (t[position.clamp(min=0)][:, None] for t in tables)
            last, turns = turn_back(last.float(), cos, sin), (cos[:, :, :1], sin[:, :, :1])
        vector = gate.keys(unrotated_pool(last, b, None, extremes=True), turns)  # (B, Hkv, 1, C)
        width = self._tokens // b
        if self._length < width:
            self._write(
                self._length, vector.new_zeros(*vector.shape[:2], width - self._length, vector.shape[3])
            )
        full = (tokens % b == 0) & (block >= 0)
        slot = torch.arange(self._length, device=last.device) == torch.where(full, block, -1)[:, None]
        self.rows.copy_(torch.where(slot[:, None, :, None], vector, self.rows))

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        super().reorder(index)
        if self._newest is not None:
            self._newest = self._newest.index_select(0, index.to(self._newest.device))

    def crop(self, length: int) -> None:
        gone = max(0, self._tokens - length)
        self._tokens -= gone
        self._pooled = min(self._pooled, self._tokens)
        if self._newest is not None:
            self._newest = self._newest[:, :, : max(0, self._newest.shape[2] - gone)]

    def nbytes(self) -> int:
        newest = 0 if self._newest is None else self._newest.numel() * self._newest.element_size()
        return super().nbytes() + newest


def _aligned(
    keys: Float[Tensor, "B Hkv N D"], first_key: Int[Tensor, " B"], block_size: int
) -> Float[Tensor, "B Hkv n D"]:
    """Each row's keys from its own first one on; behind its last, any."""
    n = keys.shape[2] // block_size * block_size
    index = (first_key[:, None] + torch.arange(n, device=keys.device)).clamp(max=keys.shape[2] - 1)
    return keys.gather(2, index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))
