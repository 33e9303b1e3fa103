"""SALE's geometry: 64 x 32 tiles, the sink tile, the local tiles, and the judged ones as bits."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.patterns import cdiv

ROWS = 64  # queries of a tile
KEYS = 32  # keys of a tile
LOCAL = 4  # at least this many tiles up to the diagonal are local: 128 keys
SEGMENT = 4  # judged tiles come in segments of this many: 128 keys
WORD = 32  # judged tiles in one int32


def n_judged(block: int, n_queries: int, n_keys: int) -> int:
    """Judged tiles of one query block: the tiles ``1 ... n_judged``; tile 0 is the sink, later ones local.

    A block counts as if it were full, also where it is the last one and is not.
    """
    to_diagonal = cdiv(n_keys - n_queries + (block + 1) * ROWS, KEYS)
    return max(0, (to_diagonal - 1 - LOCAL) // SEGMENT) * SEGMENT


def judged(n_queries: int, n_keys: int, device: torch.device | str = "cpu") -> Int[Tensor, " Mq"]:
    """:func:`n_judged` of all query blocks (int32)."""
    block = torch.arange(1, cdiv(n_queries, ROWS) + 1, device=device, dtype=torch.int32)
    to_diagonal = (n_keys - n_queries + block * ROWS + KEYS - 1) // KEYS
    return (to_diagonal - 1 - LOCAL).clamp(min=0) // SEGMENT * SEGMENT


def n_words(n_queries: int, n_keys: int) -> int:
    """Words that hold the judged tiles of the longest row."""
    return max(1, cdiv(n_judged(cdiv(n_queries, ROWS) - 1, n_queries, n_keys), WORD))


def pack(kept: Bool[Tensor, "*batch T"]) -> Int[Tensor, "*batch W"]:
    """Bits of int32 words, the first tile lowest."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % WORD))
    bits = torch.unflatten(padded, -1, (-1, WORD)).long() << torch.arange(WORD, device=kept.device)
    return bits.sum(-1).to(torch.int32)  # the highest bit becomes the sign


def unpack(words: Int[Tensor, "*batch W"]) -> Bool[Tensor, "*batch T"]:
    """The bits of :func:`pack`; as many as the words hold."""
    bits = words[..., None] >> torch.arange(WORD, device=words.device, dtype=torch.int32)
    return (bits & 1).bool().flatten(-2)


def kept_tiles(words: Int[Tensor, "B H Mq W"], n_queries: int, n_keys: int) -> Bool[Tensor, "B H Mq T"]:
    """All tiles that are computed: the sink, the judged ones that were kept, the local ones."""
    count = cdiv(n_keys, KEYS)
    tile = torch.arange(count, device=words.device)
    last = judged(n_queries, n_keys, words.device)[:, None]
    bits = torch.nn.functional.pad(unpack(words), (1, 1))
    kept = bits.gather(-1, tile.clamp(max=bits.shape[-1] - 1).expand(*words.shape[:3], count))
    block = torch.arange(1, last.shape[0] + 1, device=words.device)[:, None]
    visible = tile * KEYS < (block * ROWS).clamp(max=n_queries) + n_keys - n_queries
    return torch.where((tile >= 1) & (tile <= last), kept, True) & visible
