"""What the kernels for Hopper share: tickets, numbers in shared memory, and tensors for bulk copies."""

# mypy: ignore-errors

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = 1.4426950408889634
# Blocks of 128 keys and of as many values in flight, by head dimension: what fits beside the queries into
# shared memory.
STAGES = {64: 6, 128: 3}


@gluon.jit
def place_of(ticket, H, G, Mq):
    """Ticket -> batch row, query head, key head, query block."""
    of_group = ticket // (Mq * G)
    inside = ticket % (Mq * G)
    i_hk = of_group % (H // G)
    return of_group // (H // G), i_hk * G + inside % G, i_hk, Mq - 1 - inside // G


@gluon.jit
def leave(numbers, place, value):
    """The loading warp leaves a number in shared memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(place).store(gl.full([1], value, gl.int32, layout=LAYOUT))


@gluon.jit
def found(numbers, place):
    """A computing warpgroup finds it there."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    # The largest of one number: a scalar.
    return gl.max(numbers.index(place).load(LAYOUT), 0)


def descriptor(x: Tensor, rows: int, numbers: int) -> TensorDescriptor:
    """For bulk copies of ``rows`` tokens by ``numbers`` of a head's numbers."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, numbers], layout)


def tma_ready(x: Tensor) -> Tensor:
    """Bulk copies want 16-byte steps and a dense last dimension."""
    aligned = x.stride(3) == 1 and all(s % 8 == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if aligned else x.contiguous()
