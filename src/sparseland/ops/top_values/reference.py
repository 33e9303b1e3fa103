"""The definitions in loops over Python numbers: slow, for small tests."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_mask(
    values: Float[Tensor, "*batch n"], count: Int[Tensor, "*batch"], forced: int
) -> Bool[Tensor, "*batch n"]:
    """Row by row: forced places, then by falling value, then by place."""
    n = values.shape[-1]
    mask = torch.zeros(values.numel() // n, n, dtype=torch.bool)
    for row, numbers, wanted in zip(
        mask, values.reshape(-1, n).tolist(), count.reshape(-1).tolist(), strict=True
    ):
        by_rank = sorted(
            range(n), key=lambda i: (i >= forced, i if i < forced else -_nan_first(numbers[i]), i)
        )
        row[by_rank[: max(wanted, 0)]] = True
    return mask.reshape(values.shape).to(values.device)


def top_indices(
    values: Float[Tensor, "*batch n"], most: int, count: Int[Tensor, "*batch"] | None
) -> Int[Tensor, "*batch most"]:
    """What :func:`top_mask` marks, place by place."""
    wanted = torch.full(values.shape[:-1], most) if count is None else count.clamp(max=most)
    mask = top_mask(values, wanted, 0).reshape(-1, values.shape[-1])
    places = torch.full((len(mask), most), -1, dtype=torch.int32)
    for row, marked in zip(places, mask.cpu(), strict=True):
        found = marked.nonzero().flatten()
        row[: len(found)] = found
    return places.reshape(*values.shape[:-1], most).to(values.device)


def covering(
    weights: Float[Tensor, "*batch n"], mass: float, active: Bool[Tensor, "*batch"] | None
) -> tuple[Float[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """Row by row, one weight at a time."""
    n = weights.shape[-1]
    looked_at = torch.ones(weights.shape[:-1], dtype=torch.bool) if active is None else active
    found = [
        _cross(numbers, mass) if look else (0.0, 0)
        for numbers, look in zip(weights.reshape(-1, n).tolist(), looked_at.reshape(-1).tolist(), strict=True)
    ]
    value, taken = (torch.tensor(x, device=weights.device) for x in zip(*found, strict=True))
    return value.to(torch.float32).reshape(weights.shape[:-1]), taken.reshape(weights.shape[:-1])


def _cross(numbers: list[float], mass: float) -> tuple[float, int]:
    if not all(math.isfinite(x) for x in numbers):
        return 0.0, len(numbers) + 1
    total = 0.0
    for taken, number in enumerate(sorted(numbers, reverse=True), 1):
        total += number
        if total > mass:
            return number, taken
    return 0.0, len(numbers) + 1


def _nan_first(x: float) -> float:
    # Infinity is smaller than NaN here; floats have nothing above it, so finite numbers step back.
    return math.inf if math.isnan(x) else min(x, 3.5e38)
