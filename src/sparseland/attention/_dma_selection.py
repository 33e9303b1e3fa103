"""When a key leaves the causal top-w of its scores: one pass over the whole row, on the device.

Scores do not depend on the query, so a key that has left the top-w of a prefix never comes back: later
prefixes only hold more keys that are better. The queries that see key j are therefore one interval
``[j, e_j)``, and ``e_j`` is the position of the w-th key (in the order of positions) that is better than j.
With the keys sorted by score, that is the w-th smallest among the first ``rank_j`` positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.prefix_order import nth_of_prefixes

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
    nth = nth_of_prefixes(order, width - 1)
    # The key of rank r has r better ones; with fewer than `width` it stays for good.
    stays = torch.arange(n, device=ranks.device) < width
    ends = torch.where(stays, n, torch.maximum(nth, order))
    return torch.empty_like(ends).scatter_(-1, order, ends)
