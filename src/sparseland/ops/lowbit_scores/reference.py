"""The low-bit estimate by definition, one query block at a time: slow, for small tests."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.lowbit_scores.tiles import KEYS, ROWS, n_judged, n_words, pack
from sparseland.patterns import cdiv


def quantize(x: Float[Tensor, "*batch D"]) -> tuple[Int[Tensor, "*batch D"], Float[Tensor, "*batch"]]:
    """Whole numbers from -7 to 7 and one scale per token; a token of zeros has scale 0."""
    scale = x.abs().amax(-1) / 7
    inverse = torch.where(scale > 0, scale, 1)[..., None]
    return (x / inverse).round().nan_to_num(0, 0, 0).clamp(-7, 7).to(torch.int8), scale


def tile_bits(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], tau: Float[Tensor, " Hq"], scale: float
) -> Int[Tensor, "B Hq Mq W"]:
    """Whether an estimate in the tile exceeds its row's threshold."""
    B, Hq, n_queries, _ = q.shape
    n_keys, blocks = k.shape[2], cdiv(n_queries, ROWS)
    q, k = q.float(), k.float().repeat_interleave(Hq // k.shape[1], dim=1)
    q_mean, k_mean = q.mean(2, keepdim=True), k.mean(2, keepdim=True)
    (q4, q_scale), (k4, k_scale) = quantize(q - q_mean), quantize(k - k_mean)
    shift = (q_mean @ (k - k_mean).mT).squeeze(2)  # c_j
    width = n_words(n_queries, n_keys)
    rows = []
    for block in range(blocks):
        at = slice(block * ROWS, min((block + 1) * ROWS, n_queries))
        position = torch.arange(at.start, at.stop, device=q.device) + n_keys - n_queries
        count = n_judged(block, n_queries, n_keys)
        exact = scale * q[:, :, at] @ (k - k_mean).mT
        key = torch.arange(n_keys, device=q.device)
        area = ((key < KEYS) | (key >= (1 + count) * KEYS)) & (key <= position[:, None])
        normaliser = exact.masked_fill(~area, -torch.inf).logsumexp(-1)
        threshold = normaliser + tau.log()[:, None]
        product = q4[:, :, at].float() @ k4.float().mT  # small whole numbers: exact
        estimate = scale * (q_scale[:, :, at, None] * k_scale[:, :, None] * product + shift[:, :, None])
        judged = estimate[..., KEYS : KEYS * (1 + count)]
        # What can't be compared is kept: a comparison with NaN is False.
        kept = ~(judged <= threshold[..., None]) | ~judged.isfinite() | (~normaliser.isfinite())[..., None]
        kept = torch.unflatten(kept, -1, (count, KEYS)).any(-1).any(2)
        rows.append(pack(torch.nn.functional.pad(kept, (0, width * 32 - count))))
    return torch.stack(rows, 2) if rows else q.new_zeros(B, Hq, 0, width, dtype=torch.int32)
