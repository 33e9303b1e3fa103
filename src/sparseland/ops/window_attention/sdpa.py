"""Dense causal attention by PyTorch itself: the fastest there is where no key is skipped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# PyTorch 2.11's CUDA kernels answer wrongly for tensors beyond what 32 bits count, and fail for more heads,
# of all rows of the batch, than a side of a grid.
_MOST = 2**31 - 1
_MOST_HEADS = 65535


def window_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    sinks: int,
    window: int,
    scale: float,
    most: int = _MOST,
    most_heads: int = _MOST_HEADS,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"] | None]:
    """Output, and the log-sum-exp where the kernel gives it (Nq < Nk, which only CUDA takes).

    Tensors of more than ``most`` elements, or ``most_heads``, are cut by their batch, or by key heads with
    their query heads.
    """
    share = min(most / max(q.numel(), k.numel(), 1), most_heads / max(q.shape[0] * q.shape[1], 1))
    if share >= 1 or q.shape[0] * k.shape[1] <= 1:
        return _attend(q, k, v, scale)
    axis = 0 if q.shape[0] > 1 else 1
    # Pieces are cut as k is; q has a whole number of heads for each of k's.
    count, group = k.shape[axis], q.shape[axis] // k.shape[axis]
    each = max(1, int(share * count))
    cuts = ((q, each * group), (k, each), (v, each))
    pieces = zip(*(torch.split(x, size, axis) for x, size in cuts), strict=True)
    found = [window_attention(*qkv, sinks, window, scale, most, most_heads) for qkv in pieces]  # type: ignore[call-arg]
    lse = [part for _, part in found if part is not None]
    return torch.cat([out for out, _ in found], axis), torch.cat(lse, axis) if lse else None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    if q.shape[2] == k.shape[2]:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped), None
    # The operator itself takes grouped heads and aligns the triangle to the last key.
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    return out, lse
