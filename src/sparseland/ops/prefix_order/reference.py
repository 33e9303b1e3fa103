"""The definition in loops over Python numbers: slow, for small tests."""

from __future__ import annotations

from bisect import insort

import torch
from jaxtyping import Int
from torch import Tensor


def nth_of_prefixes(values: Int[Tensor, "*batch n"], nth: int) -> Int[Tensor, "*batch n"]:
    """Row by row, one value at a time; 0 where a prefix is too short."""
    n = values.shape[-1]
    found = torch.zeros_like(values).reshape(-1, n)
    for row, numbers in zip(found, values.reshape(-1, n).tolist(), strict=True):
        prefix: list[int] = []
        for r, number in enumerate(numbers):
            if r > nth:
                row[r] = prefix[nth]
            insort(prefix, number)
    return found.reshape(values.shape)
