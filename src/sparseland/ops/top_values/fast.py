"""Sorts of whole tensors in PyTorch: the CPU's path; on other devices nothing synchronises."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_mask(
    values: Float[Tensor, "*batch n"], count: Int[Tensor, "*batch"], forced: int
) -> Bool[Tensor, "*batch n"]:
    """The values as large as a row's last; where equal ones leave a choice, a stable sort (NaN first)."""
    # The forced come first, so the others' places start behind them.
    taken = torch.arange(values.shape[-1], device=values.device) < count[..., None]
    rest, wanted = values[..., forced:], taken[..., forced:]
    found = None
    if rest.is_cpu and rest.numel():
        number = (count[..., None] - forced).clamp(0, rest.shape[-1])
        found = _as_large_as_the_last(rest.detach(), number, _descending(rest))
    if found is None:
        order = rest.argsort(dim=-1, descending=True, stable=True)
        found = torch.zeros_like(wanted).scatter_(-1, order, wanted)
    return torch.cat((taken[..., :forced], found), -1) if forced else found


def _as_large_as_the_last(
    x: Float[Tensor, "*batch n"], wanted: Int[Tensor, "*batch 1"], descending: Float[Tensor, "*batch m"]
) -> Bool[Tensor, "*batch n"] | None:
    """The mask of the ``wanted`` largest, or None where some other is as large as the last, or one is NaN.

    Args:
        descending: the largest values of each row in order, as many as are wanted or more, at least one.
    """
    wanted = wanted.long()
    mask = (x >= descending.gather(-1, (wanted - 1).clamp(min=0))) & (wanted > 0)
    # A NaN, which comes first, is not as large as any number: the count would be another's.
    if descending[..., 0].isnan().any() or not torch.equal(mask.sum(-1, keepdim=True), wanted):
        return None
    return mask


def top_indices(
    values: Float[Tensor, "*batch n"], most: int, count: Int[Tensor, "*batch"] | None
) -> Int[Tensor, "*batch most"]:
    """``topk``, which takes any of equal values; where that leaves a choice, a stable sort."""
    shape = (*values.shape[:-1], most)
    if values.device.type == "cpu":
        places = _larger_than_all_others(values.detach().reshape(-1, values.shape[-1]), most, count)
        if places is not None:
            return places.reshape(shape)
    places = values.argsort(dim=-1, descending=True, stable=True)[..., :most]
    if count is not None:
        beyond = torch.arange(most, device=values.device) >= count[..., None]
        places = places.masked_fill(beyond, values.shape[-1])
    places = places.sort(dim=-1).values
    return places.masked_fill(places == values.shape[-1], -1).to(torch.int32)


def _larger_than_all_others(
    x: Float[Tensor, "rows n"], most: int, count: Int[Tensor, "*batch"] | None
) -> Int[Tensor, "rows most"] | None:
    """The places, or None where some other value is as large as a row's last (or that is NaN)."""
    # NumPy looks at the bytes of a mask together, PyTorch at one after the other.
    import numpy as np

    rows, n = x.shape
    if count is None:
        last = x.topk(most, sorted=False).values.amin(-1, keepdim=True)
        found = np.flatnonzero((x >= last).numpy())
        if found.size != rows * most:
            return None
        places = found.reshape(rows, most) - n * np.arange(rows)[:, None]
        # As many in all, but one row had more and another fewer?
        if places[:, 0].min() < 0 or places[:, -1].max() >= n:
            return None
        return torch.from_numpy(places.astype(np.int32))
    wanted = count.reshape(-1, 1).clamp(0, most)
    mask = _as_large_as_the_last(x, wanted, x.topk(most).values)
    if mask is None:
        return None
    listed = torch.full((rows, most), -1, dtype=torch.int32)
    listed[torch.arange(most) < wanted] = torch.from_numpy(np.flatnonzero(mask.numpy()) % n).to(torch.int32)
    return listed


def covering(
    weights: Float[Tensor, "*batch n"], mass: float, active: Bool[Tensor, "*batch"] | None
) -> tuple[Float[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """Running sums of the sorted weights, in float64."""
    if active is not None and weights.device.type == "cpu":
        value = weights.new_zeros(weights.shape[:-1])
        taken = torch.zeros(value.shape, dtype=torch.int64)
        if bool(active.any()):
            value[active], taken[active] = covering(weights[active], mass, None)
        return value, taken
    n = weights.shape[-1]
    descending = _descending(weights)
    taken = 1 + (descending.cumsum(-1, dtype=torch.float64) <= mass).sum(-1)
    # The largest, and so any other, is finite: a sort puts NaN and infinity first.
    finite = descending[..., 0].isfinite() if n else torch.ones_like(taken, dtype=torch.bool)
    taken = torch.where(finite, taken, n + 1)
    padded = torch.nn.functional.pad(descending, (0, 1))
    value = padded.gather(-1, taken[..., None] - 1).squeeze(-1)
    if active is not None:
        value, taken = value * active, taken * active
    return value, taken


def _descending(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Each row sorted, NaN first. NumPy sorts numbers by vector instructions, PyTorch's CPU one by one."""
    if x.device.type != "cpu":
        return x.sort(dim=-1, descending=True).values
    import numpy as np

    return torch.from_numpy(np.sort(x.detach().numpy(), axis=-1)).flip(-1)
