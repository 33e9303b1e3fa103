"""Sorts of whole tensors in PyTorch: the CPU's path; on other devices nothing synchronises."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_mask(
    values: Float[Tensor, "*batch n"], count: Int[Tensor, "*batch"], forced: int
) -> Bool[Tensor, "*batch n"]:
    """A stable sort (NaN first), with the forced places out of its way."""
    taken = torch.arange(values.shape[-1], device=values.device) < count[..., None]
    if forced:
        # The forced come first, so the others' places start behind them.
        taken = taken.clone()
        rest = values[..., forced:].argsort(dim=-1, descending=True, stable=True)
        taken[..., forced:] = torch.zeros_like(rest, dtype=torch.bool).scatter_(-1, rest, taken[..., forced:])
        return taken
    order = values.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(taken).scatter_(-1, order, taken)


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
