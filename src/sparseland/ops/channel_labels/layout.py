"""How a label lies in memory: rounding, and packing of codes into bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

# Bits per channel; 16 stands for the keys' own type, unrounded.
BITS = (2, 4, 8, 16)


def row_width(channels: int, bits: int) -> int:
    """Entries of a row: bytes that hold ``channels`` codes, or the channels themselves at 16 bits."""
    return channels if bits == 16 else -(-channels * bits // 8)


def new_labels(
    k: Float[Tensor, "B Hkv n D"], channels: Int[Tensor, "H C"], bits: int, length: int
) -> tuple[Shaped[Tensor, "B H N W"], Float[Tensor, "B H N 2"] | None]:
    """Room for the labels of ``length`` keys like ``k``, not written yet: the rows, and their ranges."""
    shape = (k.shape[0], channels.shape[0], length)
    width = row_width(channels.shape[1], bits)
    if bits == 16:
        return k.new_empty(*shape, width), None
    rows = k.new_empty(*shape, width, dtype=torch.uint8)
    return rows, k.new_empty(*shape, 2, dtype=torch.float16)


def quantise(
    x: Float[Tensor, "*rows C"], bits: int
) -> tuple[UInt8[Tensor, "*rows C"], Float[Tensor, "*rows 2"]]:
    """Asymmetric rounding of each row to ``2**bits`` levels between its smallest and largest value.

    Returns:
        codes (uint8), and the row's (smallest value, step) in float16; ``x ≈ smallest + step * code``.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    # By a tensor: a GPU multiplies by the reciprocal of a plain number, which rounds otherwise.
    step = (high.float() - low.float()) / torch.full_like(low, 2**bits - 1, dtype=torch.float32)
    ranges = torch.cat([low.float(), torch.where(step == 0, 1.0, step)], dim=-1).half()
    low, step = ranges[..., :1].float(), ranges[..., 1:].float()
    # A tiny range can vanish in half precision; its row is then all equal, whatever the codes.
    codes = ((x.float() - low) / step.clamp(min=2**-24)).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), ranges


def pack(codes: UInt8[Tensor, "*rows C"], bits: int) -> UInt8[Tensor, "*rows W"]:
    """``8 // bits`` codes per byte: byte ``j`` holds channels ``j, j + W, j + 2 W, …`` of ``W`` bytes."""
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % per_byte))
    planes = torch.unflatten(codes, -1, (per_byte, -1)).unbind(-2)
    packed = planes[0].clone()
    for i, plane in enumerate(planes[1:], start=1):
        packed |= plane << (bits * i)
    return packed


def unpack(packed: UInt8[Tensor, "*rows W"], bits: int, channels: int) -> UInt8[Tensor, "*rows C"]:
    """The codes that :func:`pack` packed."""
    planes = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(planes, dim=-1)[..., :channels]
