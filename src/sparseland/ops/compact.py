"""Lists from marks: which entries of a row are True, without asking the device how many."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def compact(
    marked: Bool[Tensor, "*batch n"], limit: int, *, keep_first: bool = False
) -> tuple[Int[Tensor, "*batch"], Int[Tensor, "*batch L"]]:
    """Ascending places of each row's True entries; of more than ``limit`` the last ones stay.

    Args:
        marked: the entries, at most 2^31 in a row.
        limit: length of the lists, 1 or more.
        keep_first: the first True entry stays too, in the place of one of the last.

    Returns:
        ``(counts, lists)``, int32; zeros behind the counts.
    """
    rank = marked.cumsum(-1, dtype=torch.int32)
    count = rank[..., -1:].clone()
    place = rank - 1 - (count - limit).clamp(min=0)
    if keep_first:
        place = torch.where(rank == 1, 0, torch.where(place > 0, place, -1))
    # Everything else goes to an extra place that is cut off again.
    place = torch.where(marked & (place >= 0), place, limit).long()
    lists = torch.zeros(*marked.shape[:-1], limit + 1, dtype=torch.int32, device=marked.device)
    entry = torch.arange(marked.shape[-1], dtype=torch.int32, device=marked.device)
    lists.scatter_(-1, place, entry.expand(marked.shape))
    return count.squeeze(-1).clamp(max=limit), lists[..., :limit].contiguous()
