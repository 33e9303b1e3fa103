"""The compressed form: a bitmap of the kept channels and their values, the same number in every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sparseland.errors import SparselandError

MAX_DIM = 256


@dataclass(frozen=True)
class Bitmap:
    """Compressed rows ``[B, H, T, D]``.

    Channel ``c`` of a row is kept if bit ``c % 64`` (least significant first) of word ``c // 64`` is set.
    Each row has exactly ``kept`` bits set and holds its values in channel order; bits past ``D`` are 0.
    Row ``t`` therefore starts at ``t * kept``, and any token is found without offsets. ``bitmap``
    and ``values`` may be views along tokens into larger storage.

    Args:
        bitmap: ``[B, H, T, ceil(D / 64)]`` int64.
        values: ``[B, H, T, kept]``.
        head_dim: ``D``.
    """

    bitmap: Int[Tensor, "B H T W"]
    values: Float[Tensor, "B H T kept"]
    head_dim: int

    def __len__(self) -> int:
        """Tokens held."""
        return self.values.shape[2]

    @property
    def kept(self) -> int:
        """Channels kept in each row."""
        return self.values.shape[3]

    def nbytes(self) -> int:
        """Bytes of bitmap and values for the tokens held."""
        return sum(t.numel() * t.element_size() for t in (self.bitmap, self.values))

    def gather(self, index: Int[Tensor, "B H n"]) -> Bitmap:
        """The rows ``index`` of each key head, still compressed (entries -1: any row).

        Raises:
            SparselandError: ``index`` is not ``[B, H, n]`` for this cache's ``B`` and ``H``.
        """
        if index.dim() != 3 or index.shape[:2] != self.values.shape[:2]:
            lead = list(self.values.shape[:2])
            raise SparselandError(f"index must be [{lead[0]}, {lead[1]}, n], got {list(index.shape)}")
        rows = index.long().clamp(min=0)[..., None]
        bitmap = self.bitmap.gather(2, rows.expand(-1, -1, -1, self.bitmap.shape[3]))
        return Bitmap(bitmap, self.values.gather(2, rows.expand(-1, -1, -1, self.kept)), self.head_dim)

    def slice(self, start: int, stop: int) -> Bitmap:
        """The tokens ``[start, stop)`` (views)."""
        return Bitmap(self.bitmap[:, :, start:stop], self.values[:, :, start:stop], self.head_dim)

    @classmethod
    def cat(cls, parts: list[Bitmap]) -> Bitmap:
        """The tokens of several caches, one after the other.

        Raises:
            SparselandError: they keep different numbers of channels, or there is none.
        """
        if len({(p.head_dim, p.kept) for p in parts}) != 1:
            kinds = ", ".join(f"{p.kept} of {p.head_dim}" for p in parts) or "none"
            raise SparselandError(f"caches to join must keep the same number of channels, got {kinds}")
        bitmap = torch.cat([p.bitmap for p in parts], dim=2)
        return cls(bitmap, torch.cat([p.values for p in parts], dim=2), parts[0].head_dim)


def as_bytes(bitmap: Int[Tensor, "B H T W"]) -> UInt8[Tensor, "B H T 8*W"]:
    """The bitmap by bytes: channel ``c`` is bit ``c % 8`` of byte ``c // 8`` (on little-endian machines)."""
    return bitmap.view(torch.uint8)
