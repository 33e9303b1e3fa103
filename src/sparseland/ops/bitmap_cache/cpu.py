"""``bitmap_cache`` on the CPU: bits are handled eight at a time by tables, rows in chunks that stay cached.

PyTorch's own compaction (``masked_scatter_``, boolean indexing) runs on one thread and branches on every
element. Here each byte of the bitmap looks up the ranks of its eight channels, one 64-bit addition moves
all eight to the byte's place in the row, and one parallel ``index_select`` fetches the values.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from sparseland.ops.bitmap_cache.layout import as_bytes

# Elements expanded at a time: with its integer temporaries about 10 MB, which stays in a last-level cache.
CHUNK = 1 << 20
# Multiplied by this, the eight 0/1 bytes of a word meet in its top byte, the lowest byte as the lowest bit.
_GATHER_BITS = 0x0102040810204080
_EVERY_BYTE = 0x0101010101010101


@cache
def _tables() -> tuple[Int[Tensor, " 256"], Int[Tensor, " 256"], Int[Tensor, " 256"]]:
    """For each byte, as eight bytes: 255 for set bits, and how many lie below; and their number."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    below = bits.cumsum(1) - bits
    as_words = [t.to(torch.uint8).view(torch.int64).flatten() for t in (bits * 255, below)]
    return as_words[0], as_words[1], bits.sum(1)


def _expand_bytes(packed: UInt8[Tensor, "R W"], dim: int) -> tuple[Int8[Tensor, "R D"], UInt8[Tensor, "R D"]]:
    """For each channel of each row: -1 if its bit is set, else 0; and how many set bits lie below it."""
    bits, below, count = _tables()
    n_bytes = dim // 8
    which = packed[:, :n_bytes].to(torch.int32).flatten()
    counts = count.index_select(0, which).view(-1, n_bytes)
    # Ranks stay below 256, so the eight sums inside one word never carry into each other.
    ranks = below.index_select(0, which).view(-1, n_bytes) + (counts.cumsum(1) - counts) * _EVERY_BYTE
    return bits.index_select(0, which).view(torch.int8).view(-1, dim), ranks.view(torch.uint8).view(-1, dim)


def _expand(
    bitmap: Int[Tensor, "B H T W"], values: Float[Tensor, "B H T kept"], dim: int
) -> Float[Tensor, "R D"]:
    """All rows, dense, in order of ``[B, H, T]``."""
    kept = values.shape[3]
    rows = values.shape[:3].numel()
    mask, ranks = _expand_bytes(as_bytes(bitmap).reshape(rows, -1), dim)
    start = torch.arange(rows, dtype=torch.int32)[:, None] * kept
    # A clear bit behind a row's last set bit points one too far, past the end in the last row.
    source = (ranks + start).clamp_(max=rows * kept - 1)
    out = values.reshape(-1).index_select(0, source.view(-1)).view(rows, dim)
    # Clearing bits is several times as fast as masked_fill_, and unlike a product it clears NaN.
    patterns = out.view(_integers(values.dtype))
    patterns.bitwise_and_(mask.to(patterns.dtype))
    return out


def _integers(dtype: torch.dtype) -> torch.dtype:
    """Integers as wide as ``dtype``."""
    return torch.int32 if dtype == torch.float32 else torch.int16


def _chunks(values: Tensor, dim: int) -> list[slice]:
    per_token = values.shape[0] * values.shape[1] * dim
    step = max(1, CHUNK // per_token)
    return [slice(t, t + step) for t in range(0, values.shape[2], step)]


def compress(
    x: Float[Tensor, "B H T D"], kept: int
) -> tuple[Int[Tensor, "B H T W"], Float[Tensor, "B H T kept"]]:
    """See :func:`sparseland.ops.bitmap_cache.compress`."""
    words = -(-x.shape[3] // 64)
    bits = torch.zeros(*x.shape[:3], words, dtype=torch.int64)
    values = x.new_empty(*x.shape[:3], kept)
    for at in _chunks(x, x.shape[3]):
        bits[:, :, at], values[:, :, at] = _compress_chunk(x[:, :, at].contiguous(), kept, words)
    return bits, values


def _compress_chunk(x: Tensor, kept: int, words: int) -> tuple[Tensor, Tensor]:
    dim = x.shape[3]
    # Magnitude and channel in one integer: the bit patterns of non-negative floats are ordered like their
    # values (NaN above all), and the reversed channel below them makes all keys of a row distinct.
    magnitude = x.abs().view(_integers(x.dtype)).to(torch.int64 if x.dtype == torch.float32 else torch.int32)
    key = (magnitude << 8) | torch.arange(dim - 1, -1, -1, dtype=magnitude.dtype)
    smallest = key.topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    mask = key >= smallest

    eights = mask.view(torch.int64)  # eight channels to a word
    packed = torch.zeros(*x.shape[:3], words * 8, dtype=torch.uint8)
    packed[..., : dim // 8] = (eights * _GATHER_BITS) >> 56 & 255
    rows = x.shape[:3].numel()
    keep, ranks = _expand_bytes(packed.view(rows, -1), dim)
    # Kept channels go to their row's places, counted from 1; the dropped ones pile up in place 0.
    target = (ranks + (torch.arange(rows) * kept + 1)[:, None]).bitwise_and_(keep.to(torch.int64))
    values = x.new_empty(1 + rows * kept).index_copy_(0, target.view(-1), x.view(-1))
    return packed.view(torch.int64), values[1:].view(*x.shape[:3], kept)


def decompress(
    bits: Int[Tensor, "B H T W"], values: Float[Tensor, "B H T kept"], dim: int
) -> Float[Tensor, "B H T D"]:
    """See :func:`sparseland.ops.bitmap_cache.decompress`."""
    out = values.new_empty(*values.shape[:3], dim)
    for at in _chunks(values, dim):
        part = values[:, :, at]
        out[:, :, at] = _expand(bits[:, :, at], part, dim).view(*part.shape[:3], dim)
    return out


def bitmap_decode(
    q: Float[Tensor, "B Hq 1 D"],
    k_bitmap: Int[Tensor, "B H T W"],
    k_values: Float[Tensor, "B H T kept"],
    v_bitmap: Int[Tensor, "B H T W"],
    v_values: Float[Tensor, "B H T kept_v"],
    first_key: Int[Tensor, " B"] | None,
    scale: float,
) -> tuple[Float[Tensor, "B Hq 1 D"], Float[Tensor, "B Hq 1"]]:
    """See :func:`sparseland.ops.bitmap_cache.bitmap_decode`."""
    batch, kv_heads, n_keys = k_values.shape[:3]
    dim = q.shape[3]
    grouped = q.reshape(batch, kv_heads, -1, dim).float() * scale
    top = grouped.new_full((*grouped.shape[:3], 1), float("-inf"))
    total = torch.zeros_like(top)
    out = torch.zeros_like(grouped)
    for at in _chunks(k_values, dim):
        rows = k_values[:, :, at].shape[:3]
        k = _expand(k_bitmap[:, :, at], k_values[:, :, at], dim).view(*rows, dim).float()
        logits = torch.matmul(grouped, k.mT)
        if first_key is not None:
            position = torch.arange(at.start, min(at.stop, n_keys))
            logits.masked_fill_((position < first_key[:, None])[:, None, None], float("-inf"))
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        safe = new_top.masked_fill(new_top == float("-inf"), 0)
        decay = (top - safe).exp_()
        weights = logits.sub_(safe).exp_()
        v = _expand(v_bitmap[:, :, at], v_values[:, :, at], dim).view(*rows, dim).float()
        out.mul_(decay).add_(torch.matmul(weights, v))
        total.mul_(decay).add_(weights.sum(-1, keepdim=True))
        top = new_top
    out.div_(total.clamp(min=torch.finfo(torch.float32).tiny))
    lse = total.log_().add_(top)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])
