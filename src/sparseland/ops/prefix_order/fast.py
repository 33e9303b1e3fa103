"""The wavelet matrix in whole-tensor PyTorch: a few operations per bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor


def nth_of_prefixes(values: Int[Tensor, "*batch n"], nth: int) -> Int[Tensor, "*batch n"]:
    """Levels are built and followed in one go: none is kept."""
    n = values.shape[-1]
    index = torch.arange(n, device=values.device)
    low, high = torch.zeros_like(values), index.expand_as(values)
    place = torch.full_like(values, nth)
    found = torch.zeros_like(values)
    for bit in reversed(range(max(1, (n - 1).bit_length()))):
        ones = (values >> bit) & 1
        zeros_before = F.pad((1 - ones).cumsum(-1), (1, 0))  # among the first i values, i = 0 ... N
        zeros = zeros_before[..., -1:]
        low_zeros, high_zeros = zeros_before.gather(-1, low), zeros_before.gather(-1, high)
        count = high_zeros - low_zeros
        right = place >= count
        place = torch.where(right, place - count, place)
        found = torch.where(right, found | (1 << bit), found)
        low = torch.where(right, zeros + low - low_zeros, low_zeros)
        high = torch.where(right, zeros + high - high_zeros, high_zeros)
        before = zeros_before[..., :-1]
        target = torch.where(ones == 1, zeros + index - before, before)
        values = torch.empty_like(values).scatter_(-1, target, values)
    return found
