"""What the kernels for Hopper share: tickets, barriers, notes in shared memory, a row's end, bulk copies."""

# mypy: ignore-errors

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
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


@gluon.jit
def new_barriers(STAGES: gl.constexpr):
    """One arrival by the loading warp fills a place, one by each of two computing warpgroups empties it.

    Queries, keys and values by stage, the numbers of two rows, and "the row's last keys have been read".
    """
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], LAYOUT)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], LAYOUT)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    note_ready = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    note_empty = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    k_read = gl.allocate_shared_memory(gl.int64, [1], LAYOUT)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(k_read, count=2)
    for i in gl.static_range(2):
        mbarrier.init(note_ready.index(i), count=1)
        mbarrier.init(note_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    return q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, note_ready, note_empty, k_read


@gluon.jit
def send(o, o_desc, at, tile, WARPGROUP: gl.constexpr, D: gl.constexpr):
    """A warpgroup's 64 rows of output, by a bulk copy out of its half of a tile of keys that all have read.

    Args:
        at: batch row, head and first query.
    """
    place = tile._reinterpret(o_desc.dtype, [2, 1, 1, 64, D], o_desc.layout).index(WARPGROUP)
    place.reshape([64, D]).store(o.to(o_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [at[0], at[1], at[2], 0], place)


@gluon.jit
def store_lse(lse, start, m0, n_queries, b_m, b_l):
    """The log-sum-exp of 64 rows, from maxima in base 2 and sums; -inf where nothing was seen."""
    # Not "b_l > 0": a query or key that is NaN must show.
    b_lse = gl.where(b_l == 0.0, float("-inf"), (b_m + gl.log2(b_l)) * 0.6931471805599453)
    i_row = m0 + gl.arange(0, 64, layout=b_l.type.layout)
    gl.store(lse + start + i_row.to(gl.int64), b_lse, mask=i_row < n_queries)


def descriptor(x: Tensor, rows: int, numbers: int) -> TensorDescriptor:
    """For bulk copies of ``rows`` tokens by ``numbers`` of a head's numbers."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, numbers], layout)


def tma_ready(x: Tensor) -> Tensor:
    """Bulk copies want 16-byte steps and a dense last dimension."""
    aligned = x.stride(3) == 1 and all(s % 8 == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if aligned else x.contiguous()
