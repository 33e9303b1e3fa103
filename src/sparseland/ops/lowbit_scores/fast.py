"""The low-bit estimate in whole-tensor PyTorch: one product of small factors per piece, nothing N x N.

The scales, the mean's share and the threshold are folded into the factors,
``[scale s_i q4_i, 1, -T_i] . [s_j k4_j, c_j, 1]``, so that a piece of the product is the excess over the
threshold and the largest over a tile's rows is all that is left to do. Where a CPU multiplies bfloat16
natively the factors are bfloat16 (T and c as two summands each): they hold 4-bit numbers times a scale,
and the rounding is a small part of what the 4 bits lost.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.lowbit_scores.tiles import KEYS, ROWS, judged, n_judged, n_words, pack
from sparseland.patterns import cdiv

# Bytes of scores held at once on a CPU (about what two cores' caches hold), and on a GPU.
_CPU_BYTES = 3 << 20
_GPU_BYTES = 1 << 28
# Query blocks that go through one product.
_BLOCKS = 4


@cache
def _half_products() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return probe is not None and bool(probe())


def tile_bits(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], tau: Float[Tensor, " Hq"], scale: float
) -> Int[Tensor, "B Hq Mq W"]:
    """Bits of the judged tiles; see the package."""
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys = k.shape[1], k.shape[2]
    groups = Hq // Hkv
    blocks, device = cdiv(n_queries, ROWS), q.device
    q_mean, k_mean = (x.mean(2, keepdim=True, dtype=torch.float32) for x in (q, k))
    smooth = k - k_mean
    threshold = _thresholds(q, smooth, scale) + tau.log()[:, None]  # [B, Hq, Nq]
    q4, q_scale = quantize(q - q_mean)
    k4, k_scale = quantize(smooth)
    shift = (q_mean.reshape(B, Hkv, groups, D) @ smooth.mT).reshape(B, Hq, n_keys)  # c_j
    # What can't be compared is kept: an infinite excess stands for it.
    threshold = torch.where(q_scale.isfinite(), threshold, -torch.inf)
    shift = torch.unflatten(shift, 1, (Hkv, groups))
    shift = torch.where(k_scale.isfinite()[:, :, None] & shift.isfinite(), scale * shift, torch.inf)
    rows = scale * q_scale.nan_to_num(0, 0, 0)[..., None] * q4
    columns = (k_scale.nan_to_num(0, 0, 0)[..., None] * k4)[:, :, None].expand(B, Hkv, groups, n_keys, D)
    dtype = torch.bfloat16 if device.type == "cpu" and _half_products() else torch.float32
    left = _factors(rows, -threshold, dtype, first=False).reshape(B * Hq, n_queries, -1)
    left = F.pad(left, (0, 0, 0, blocks * ROWS - n_queries))
    right = _factors(columns, shift, dtype, first=True).reshape(B * Hq, n_keys, -1).mT

    words = torch.zeros(B * Hq, blocks, n_words(n_queries, n_keys), dtype=torch.int32, device=device)
    last = judged(n_queries, n_keys, device)
    scores = _buffer(left)
    for u in range(0, blocks, _BLOCKS):
        end = min(u + _BLOCKS, blocks)
        count = n_judged(end - 1, n_queries, n_keys)
        if count == 0:
            continue
        best = left.new_empty(B * Hq, end - u, count * KEYS)
        _largest_of_rows(left[:, u * ROWS : end * ROWS], right[:, :, KEYS : KEYS * (1 + count)], scores, best)
        # Not "> 0": a NaN is an infinite c_j met by a row of padding.
        kept = ~(torch.unflatten(best, -1, (count, KEYS)).amax(-1) <= 0)
        kept &= torch.arange(count, device=device) < last[u:end, None]
        packed = pack(kept)
        words[:, u:end, : packed.shape[-1]] = packed
    return words.view(B, Hq, blocks, -1)


def _buffer(left: Float[Tensor, "BH n E"]) -> Float[Tensor, "h e"]:
    """Room for scores: of all heads on a GPU, of one on a CPU, where a long stretch stays in the cache."""
    heads, size = (1, _CPU_BYTES) if left.device.type == "cpu" else (left.shape[0], _GPU_BYTES)
    return left.new_empty(heads, max(_BLOCKS * ROWS * KEYS, size // left.element_size() // heads))


def _largest_of_rows(
    left: Float[Tensor, "BH R E"],
    right: Float[Tensor, "BH E n"],
    scores: Float[Tensor, "h e"],
    best: Float[Tensor, "BH u n"],
) -> None:
    """Writes, per block of 64 rows and key, the largest product; as many heads and keys at a time as fit."""
    heads, rows, n = scores.shape[0], left.shape[1], right.shape[2]
    piece = scores.shape[1] // rows // KEYS * KEYS
    for h in range(0, left.shape[0], heads):
        for j in range(0, n, piece):
            width = min(piece, n - j)
            out = scores[:, : rows * width].view(heads, rows, width)
            if heads == 1:  # a single product takes strided factors as they are
                torch.mm(left[h], right[h, :, j : j + width], out=out[0])
            else:
                torch.bmm(left, right[:, :, j : j + width], out=out)
            torch.amax(torch.unflatten(out, 1, (-1, ROWS)), 2, out=best[h : h + heads, :, j : j + width])


def quantize(x: Float[Tensor, "*batch D"]) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch"]]:
    """Whole numbers from -7 to 7 (as floats) and one scale per token; a token of zeros has scale 0."""
    scale = x.abs().amax(-1) / 7
    inverse = torch.where(scale > 0, scale, 1)[..., None]
    return (x / inverse).round_().nan_to_num_(0, 0, 0).clamp_(-7, 7), scale


def _thresholds(
    q: Float[Tensor, "B Hq Nq D"], smooth: Float[Tensor, "B Hkv Nk D"], scale: float
) -> Float[Tensor, "B Hq Nq"]:
    """Log-sum-exp of the exact logits of each query's sink and local keys; -inf where that is no number."""
    B, Hq, n_queries, D = q.shape
    Hkv, n_keys = smooth.shape[1], smooth.shape[2]
    keys = smooth.reshape(B * Hkv, n_keys, D)
    result = q.new_empty(B, Hq, n_queries, dtype=torch.float32)
    for block in range(cdiv(n_queries, ROWS)):
        rows = q[:, :, block * ROWS : (block + 1) * ROWS].float() * scale
        n = rows.shape[2]
        end = n_keys - n_queries + block * ROWS + n
        start = (1 + n_judged(block, n_queries, n_keys)) * KEYS
        area = keys[:, :end] if start <= KEYS else torch.cat((keys[:, :KEYS], keys[:, start:end]), 1)
        logits = torch.bmm(rows.reshape(B * Hkv, -1, D), area.mT)
        # Only the last n keys can lie after a row.
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        torch.unflatten(logits, 1, (-1, n))[..., -n:].masked_fill_(future, -torch.inf)
        peak = logits.amax(-1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(-1).log_() + peak.squeeze(-1)
        result[:, :, block * ROWS : block * ROWS + n] = total.view(B, Hq, n)
    return torch.where(result.isfinite(), result, -torch.inf)


def _factors(
    x: Float[Tensor, "*batch n D"], extra: Float[Tensor, "*batch n"], dtype: torch.dtype, *, first: bool
) -> Float[Tensor, "*batch n E"]:
    """``x`` with two more columns, ``extra`` and ones, in this order or the other.

    In bfloat16 ``extra`` is two summands, so it takes two columns and so do the ones.
    """
    if dtype == torch.float32:
        parts = [extra]
    else:
        high = extra.to(dtype).float()
        parts = [high, torch.where(extra.isfinite(), extra - high, 0.0)]
    ones = [torch.ones_like(extra)] * len(parts)
    columns = parts + ones if first else ones + parts
    return torch.cat((x.to(dtype), torch.stack(columns, -1).to(dtype)), -1)
