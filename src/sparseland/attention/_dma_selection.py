"""When a key leaves the causal top-w of its scores: one pass over the whole row, on the device.

Scores do not depend on the query, so a key that has left the top-w of a prefix never comes back: later
prefixes only hold more keys that are better. The queries that see key j are therefore one interval
``[j, e_j)``, and ``e_j`` is the position of the w-th key (in the order of positions) that is better than j.
With the keys sorted by score, that is the w-th smallest among the first ``rank_j`` positions: a wavelet
matrix answers it for all keys at once in ``log2 N`` steps of a few tensor operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_LOWEST = torch.finfo(torch.float32).min
_HIGHEST = torch.finfo(torch.float32).max
# Bits of a float32's fraction that do not count: 13 of 23 leave steps of a thousandth.
_UNCOUNTED = 13


def ranking(scores: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
    """Scores as they are compared: NaN is the lowest of all tokens, ``-inf`` is no token at all.

    They are rounded to a thousandth of themselves. The first layer's values of a word are the same wherever
    it stands, up to the last bits, which differ from one matrix product to the next: without rounding these
    would decide which of two equal keys stays, differently on a prompt and while decoding.
    """
    finite = torch.nan_to_num(scores.detach().float(), nan=_LOWEST, posinf=_HIGHEST, neginf=_LOWEST)
    bits = finite.contiguous().view(torch.int32)
    # Half a step is added to the magnitude; what that would carry beyond the largest number is cut.
    rounded = ((bits + (1 << (_UNCOUNTED - 1))) >> _UNCOUNTED << _UNCOUNTED).view(torch.float32)
    return rounded.clamp(_LOWEST, _HIGHEST).masked_fill(scores == -torch.inf, -torch.inf)


def best_first(ranks: Float[Tensor, "*B N"]) -> Int[Tensor, "*B N"]:
    """Positions from the best key to the worst; of equal keys the later is better."""
    n = ranks.shape[-1]
    return n - 1 - ranks.flip(-1).argsort(dim=-1, descending=True, stable=True)


def eviction_times(ranks: Float[Tensor, "*B N"], width: int) -> Int[Tensor, "*B N"]:
    """For each key the first position from which on it is not among the ``width`` best of its prefix.

    N where it stays; its own position where not even its own query sees it. With equal scores this is a
    sliding window of ``width``.
    """
    n = ranks.shape[-1]
    if width >= n:
        return torch.full(ranks.shape, n, dtype=torch.int64, device=ranks.device)
    order = best_first(ranks)
    nth = _nth_smallest_of_prefixes(order, width - 1)
    # The key of rank r has r better ones; with fewer than `width` it stays for good.
    stays = torch.arange(n, device=ranks.device) < width
    ends = torch.where(stays, n, torch.maximum(nth, order))
    return torch.empty_like(ends).scatter_(-1, order, ends)


def _nth_smallest_of_prefixes(order: Int[Tensor, "*B N"], nth: int) -> Int[Tensor, "*B N"]:
    """For each r, the ``nth`` smallest (from 0) of ``order[:r]``; anything where r <= nth.

    Wavelet matrix (Claude, Navarro and Ordóñez 2015): level by level, from the highest bit down, the
    sequence is split stably by one bit, and each query follows the side that holds its answer.
    """
    n = order.shape[-1]
    low = torch.zeros_like(order)
    high = torch.arange(n, device=order.device).expand_as(order)
    place = torch.full_like(order, nth)
    found = torch.zeros_like(order)
    values, index = order, torch.arange(n, device=order.device)
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
