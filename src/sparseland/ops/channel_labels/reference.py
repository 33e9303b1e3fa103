"""Labels written out: gather the channels, round them; expand them again to multiply."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sparseland.ops.channel_labels.layout import pack, quantise, unpack


def write_labels(
    k: Float[Tensor, "B Hkv n D"],
    channels: Int[Tensor, "H C"],
    bits: int,
    rows: Shaped[Tensor, "B H N W"],
    ranges: Float[Tensor, "B H N 2"] | None,
    at: int,
) -> None:
    """See :func:`sparseland.ops.channel_labels.write_labels`."""
    labels = chosen_channels(k.repeat_interleave(channels.shape[0] // k.shape[1], 1), channels)
    here = slice(at, at + k.shape[2])
    if ranges is None or bits == 16:
        rows[:, :, here] = labels
        return
    codes, ranges[:, :, here] = quantise(labels, bits)
    rows[:, :, here] = pack(codes, bits)


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
    group = q.shape[1] // channels.shape[0]
    labels = rows.float()
    if ranges is not None and bits < 16:
        low, step = ranges.float().unbind(-1)
        labels = low[..., None] + step[..., None] * unpack(rows, bits, channels.shape[1])
    label = chosen_channels(q, channels.repeat_interleave(group, 0)).float()
    scores = (label @ labels.repeat_interleave(group, 1).mT)[:, :, 0]
    return masked(combined(scores, channels.shape[0], combine), first_key)


def combined(scores: Float[Tensor, "B Hq N"], heads: int, combine: str | None) -> Float[Tensor, "B H N"]:
    """Mean or largest score of the query heads that share a label head."""
    if combine is None:
        return scores
    grouped = torch.unflatten(scores, 1, (heads, -1))
    return grouped.mean(2) if combine == "mean" else grouped.amax(2)


def chosen_channels(x: Float[Tensor, "B H n D"], channels: Int[Tensor, "H C"]) -> Float[Tensor, "B H n C"]:
    """Each head's channels."""
    return x.gather(-1, channels[None, :, None].expand(x.shape[0], -1, x.shape[2], -1))


def masked(scores: Float[Tensor, "B H N"], first_key: Int[Tensor, " B"] | None) -> Float[Tensor, "B H N"]:
    """-inf for what lies before each row's first key."""
    if first_key is None:
        return scores
    padded = torch.arange(scores.shape[2], device=scores.device) < first_key[:, None]
    return scores.masked_fill(padded[:, None], -torch.inf)
