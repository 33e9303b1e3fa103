"""Labels in whole-tensor PyTorch: a bit plane at a time, so that codes are never expanded to keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from sparseland.ops.channel_labels.reference import chosen_channels, combined, masked, write_labels

__all__ = ["label_scores", "write_labels"]


def label_scores(
    q: Float[Tensor, "B Hq 1 D"],
    channels: Int[Tensor, "H C"],
    bits: int,
    rows: Shaped[Tensor, "B H N W"],
    ranges: Float[Tensor, "B H N 2"] | None,
    first_key: Int[Tensor, " B"] | None,
    combine: str | None,
) -> Float[Tensor, "B H N"]:
    """See :func:`sparseland.ops.channel_labels.label_scores`."""
    heads, group = channels.shape[0], q.shape[1] // channels.shape[0]
    label = chosen_channels(q, channels.repeat_interleave(group, 0))[:, :, 0]
    label = torch.unflatten(label, 1, (heads, group))
    if ranges is None or bits == 16:
        return masked(combined(torch.flatten(_dot(label, rows), 1, 2), heads, combine), first_key)
    dots = _packed_dot(label, rows, bits)
    low, step = ranges.float().unbind(-1)  # (B, H, N)
    total = label.float().sum(-1, keepdim=True)  # (B, H, g, 1)
    scores = torch.addcmul(low[:, :, None] * total, step[:, :, None], dots)
    return masked(combined(torch.flatten(scores, 1, 2), heads, combine), first_key)


def _packed_dot(
    q: Float[Tensor, "B H g C"], packed: UInt8[Tensor, "B H N W"], bits: int
) -> Float[Tensor, "B H g N"]:
    """``q · code`` of every packed row, one product per bit plane (fp32)."""
    per_byte = 8 // bits
    planes = torch.unflatten(F.pad(q, (0, per_byte * packed.shape[-1] - q.shape[-1])), -1, (per_byte, -1))
    dots = q.new_zeros(*q.shape[:3], packed.shape[2], dtype=torch.float32)
    for i in range(per_byte):
        code = (packed >> (bits * i)) & (2**bits - 1) if per_byte > 1 else packed
        dots += _dot(planes[..., i, :], code)
    return dots


def _dot(q: Float[Tensor, "B H g C"], rows: Shaped[Tensor, "B H N C"]) -> Float[Tensor, "B H g N"]:
    """``q · row`` in float32: rounding scores to half precision would tie tokens that differ."""
    if q.is_cuda and q.dtype != torch.float32:
        # Half-precision operands with a float32 result: no float32 copy of the rows.
        keys = rows.to(q.dtype).flatten(0, 1).mT
        return torch.unflatten(torch.bmm(q.flatten(0, 1), keys, out_dtype=torch.float32), 0, q.shape[:2])
    return q.float() @ rows.float().mT
