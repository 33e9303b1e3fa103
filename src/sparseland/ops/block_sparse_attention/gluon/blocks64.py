"""Blocks of 64 on Hopper, in Gluon: two neighbouring query blocks share the key blocks that both list.

A key block of 64 is soon multiplied: 64 queries alone would wait for the L2 cache. Neighbours list much
the same keys, so a program takes two query blocks of one head, one for each computing warpgroup, and the
loading warp brings what both list once. Key blocks come in pairs, wherever they lie, as tiles of 128 keys:
first those of both, then those of one and of the other in turn, which the one they don't belong to passes
over. All else is as in ``blocks128.py``.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparseland.ops.block_sparse_attention.gluon.common import (
    LOG2E,
    STAGES,
    descriptor,
    found,
    leave,
    new_barriers,
    place_of,
    send,
    store_lse,
    tma_ready,
)
from sparseland.ops.block_sparse_attention.gluon.shared_lists import share_lists
from sparseland.patterns import unexpanded

BLOCK = 64
_BLOCK = gl.constexpr(BLOCK)
_NOWHERE = gl.constexpr(1 << 30)  # a position behind all queries


@gluon.jit
def _draw(lists, buffers, barriers, turn):
    """The loading warp takes the next ticket and leaves it to the computing warpgroups."""
    _q_smem, _k_smem, _v_smem, notes, _marks = buffers
    _q_ready, _q_empty, _k_ready, _k_empty, _v_ready, _v_empty, note_ready, note_empty, _read = barriers
    mbarrier.wait(note_empty.index(turn % 2), ((turn // 2) & 1) ^ 1)
    ticket = gl.atomic_add(lists[0], 1, sem="relaxed")
    leave(notes, turn % 2, ticket)
    mbarrier.arrive(note_ready.index(turn % 2), count=1)
    return ticket


@gluon.jit
def _tile(p_blocks, width, i, both, first, second):
    """The ``i``-th tile's two blocks, the second of them -1 where there is none, and whose they are."""
    tiles, tiles_1, tiles_2 = (both + 1) // 2, (first + 1) // 2, (second + 1) // 2
    fewer = gl.minimum(tiles_1, tiles_2)
    j = i - tiles
    longer = gl.where(tiles_1 > tiles_2, 1, 2)
    owner = gl.where(j < 0, 0, gl.where(j < 2 * fewer, 1 + j % 2, longer))
    place = 2 * gl.where(j < 0, i, gl.where(j < 2 * fewer, j // 2, j - fewer))
    n = gl.where(owner == 0, both, gl.where(owner == 1, first, second))
    # What is only the first's begins at the end of the row of what is both's.
    start = gl.where(owner == 0, 0, gl.where(owner == 1, width - 1, width))
    way = gl.where(owner == 1, -1, 1)
    p_blocks += start + way * place
    block = gl.load(p_blocks, mask=place < n, other=0)
    other = gl.load(p_blocks + way, mask=place + 1 < n, other=-1)
    return block, other, gl.where(place < n, gl.where(owner == 0, 3, owner), 0)


@gluon.jit
def _copy(desc, smem, i_b, i_h, row, other_row, ready, stage, D: gl.constexpr):
    """Two blocks of keys or values, 64 numbers of a token at a time, as a tile of 128 lies in memory."""
    PIECES: gl.constexpr = D // 64
    for c in gl.static_range(PIECES):
        place = (stage * PIECES + c) * 2
        tma.async_copy_global_to_shared(desc, [i_b, i_h, row, c * 64], ready, smem.index(place))
        tma.async_copy_global_to_shared(desc, [i_b, i_h, other_row, c * 64], ready, smem.index(place + 1))


@gluon.jit
def _load(state, SHAPE: gl.constexpr):
    """The loading warp: queries, then the tiles of keys and values."""
    STAGES: gl.constexpr = SHAPE[0]
    D: gl.constexpr = SHAPE[1]
    BYTES: gl.constexpr = 128 * D * 2
    inputs, _outputs, buffers, barriers, lists, sizes, _scale = state
    q_desc, k_desc, v_desc = inputs
    q_smem, k_smem, v_smem, _notes, marks = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, _ready, _empty, _read = barriers
    rows, H, G, _Nq, Nk, groups, stride_b, stride_h, width = sizes
    turn = 0
    step = 0
    ticket = _draw(lists, buffers, barriers, turn)
    while ticket < rows:
        i_b, i_h, i_hk, i_r = place_of(ticket, H, G, groups)
        row = i_b * stride_b + i_h * stride_h + i_r
        both = gl.load(lists[1] + row * 3)
        first = gl.load(lists[1] + row * 3 + 1)
        second = gl.load(lists[1] + row * 3 + 2)
        p_blocks = lists[2] + row.to(gl.int64) * 2 * width
        # Where nothing is listed, one tile that is nobody's.
        tiles = gl.maximum((both + 1) // 2 + (first + 1) // 2 + (second + 1) // 2, 1)
        block, other, owners = _tile(p_blocks, width, 0, both, first, second)
        drawing = gl.minimum(tiles - 1, STAGES - 1)
        next_ticket = rows
        for i in range(0, tiles):
            next_block, next_other, next_owners = _tile(p_blocks, width, i + 1, both, first, second)
            stage = step % STAGES
            phase = (step // STAGES) & 1
            # What lies behind the keys is zeros.
            other_row = gl.where(other >= 0, other * _BLOCK, Nk)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            # A mark: 1 if the first query block lists the tile's blocks, 2 if the second does, 4 if it is the
            # row's last tile, and above these bits one block; beside it the other one, or -1.
            leave(marks, stage * 2, block * 8 + gl.where(i == tiles - 1, 4, 0) + owners)
            leave(marks, stage * 2 + 1, other)
            mbarrier.expect(k_ready.index(stage), BYTES)
            _copy(k_desc, k_smem, i_b, i_hk, block * _BLOCK, other_row, k_ready.index(stage), stage, D)
            if i == 0:
                # After the first keys: their place is free long before that of the queries.
                mbarrier.wait(q_empty, (turn & 1) ^ 1)
                mbarrier.expect(q_ready, BYTES)
                tma.async_copy_global_to_shared(q_desc, [i_b, i_h, i_r * 128, 0], q_ready, q_smem)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_ready.index(stage), BYTES)
            _copy(v_desc, v_smem, i_b, i_hk, block * _BLOCK, other_row, v_ready.index(stage), stage, D)
            # The next row is drawn while the first blocks are under way.
            if i == drawing:
                next_ticket = _draw(lists, buffers, barriers, turn + 1)
            block = next_block
            other = next_other
            owners = next_owners
            step += 1
        turn += 1
        ticket = next_ticket


@gluon.jit
def _weights(s, b_m, b_l, block, other, position, first, scale_log2, S_LAYOUT: gl.constexpr):
    """The online softmax's step: weights, new maximum and sum, and the factor for the output."""
    if (gl.maximum(block, other) * _BLOCK + _BLOCK - 1 > first) | (other < 0):
        i_n = gl.arange(0, 128, layout=gl.SliceLayout(0, S_LAYOUT))
        other_key = gl.where(other < 0, _NOWHERE, other * _BLOCK)
        key = i_n % _BLOCK + gl.where(i_n < _BLOCK, block * _BLOCK, other_key)
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    b_max = gl.maximum(b_m, gl.max(s, 1) * scale_log2)
    shift = gl.where(b_max == float("-inf"), 0.0, b_max)
    alpha = gl.exp2(b_m - shift)
    s = gl.exp2(s * scale_log2 - shift[:, None])
    return s, b_max, b_l * alpha + gl.sum(s, 1), alpha


@gluon.jit
def _compute(state, WARPGROUP: gl.constexpr, SHAPE: gl.constexpr):
    """One computing warpgroup: one of the two query blocks of every row of this program."""
    STAGES: gl.constexpr = SHAPE[0]
    D: gl.constexpr = SHAPE[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    _inputs, outputs, buffers, barriers, _lists, sizes, scale_log2 = state
    q_smem, k_smem, v_smem, notes, marks = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, note_ready, note_empty, k_read = barriers
    rows, H, G, Nq, Nk, groups, _stride_b, _stride_h, _width = sizes
    o_desc, lse = outputs
    q = q_smem.reshape([128, D]).slice(WARPGROUP * 64, 64, dim=0)
    keys = k_smem._reinterpret(q.dtype, [STAGES, 1, 1, 128, D], q_smem.layout)
    values = v_smem._reinterpret(q.dtype, [STAGES, 1, 1, 128, D], q_smem.layout)
    turn = 0
    step = 0
    mbarrier.wait(note_ready.index(0), 0)
    ticket = found(notes, 0)
    while ticket < rows:
        mbarrier.arrive(note_empty.index(turn % 2), count=1)
        i_b, i_h, _i_hk, i_r = place_of(ticket, H, G, groups)
        m0 = i_r * 128 + WARPGROUP * 64
        first = m0 + Nk - Nq
        position = first + gl.arange(0, 64, layout=S_ROWS)
        b_m = gl.full([64], float("-inf"), gl.float32, layout=S_ROWS)
        b_l = gl.zeros([64], gl.float32, layout=S_ROWS)
        o = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
        p = gl.zeros([64, 128], q.dtype, layout=P_LAYOUT)
        zero = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
        waiting = 0  # whether ``p`` is still to be multiplied, with the values of ``v_step``
        v_step = 0
        more = 1
        mbarrier.wait(q_ready, turn & 1)
        while more != 0:
            stage = step % STAGES
            phase = (step // STAGES) & 1
            v_stage = v_step % STAGES
            v_phase = (v_step // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            mark = found(marks, stage * 2)
            other = found(marks, stage * 2 + 1)
            more = 1 - ((mark >> 2) & 1)
            if ((mark >> WARPGROUP) & 1) == 0:
                # What waits is done at once: its values' place is needed for what comes.
                if waiting != 0:
                    mbarrier.wait(v_ready.index(v_stage), v_phase)
                    o = warpgroup_mma(p, values.index(v_stage).reshape([128, D]), o, is_async=True)
                    o, p = warpgroup_mma_wait(0, deps=(o, p))
                    mbarrier.arrive(v_empty.index(v_stage), count=1)
                    waiting = 0
                _free(k_empty.index(stage), k_read, more)
                # Not before they have come: the place's last values may still be read by the other one.
                mbarrier.wait(v_ready.index(stage), phase)
                mbarrier.arrive(v_empty.index(stage), count=1)
            else:
                block = mark >> 3
                k = keys.index(stage).reshape([128, D]).permute((1, 0))
                product = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
                if waiting != 0:
                    mbarrier.wait(v_ready.index(v_stage), v_phase)
                    o = warpgroup_mma(p, values.index(v_stage).reshape([128, D]), o, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(product,))
                    _free(k_empty.index(stage), k_read, more)
                    s, b_m, b_l, alpha = _weights(
                        s, b_m, b_l, block, other, position, first, scale_log2, S_LAYOUT
                    )
                    o, p = warpgroup_mma_wait(0, deps=(o, p))
                    mbarrier.arrive(v_empty.index(v_stage), count=1)
                    o = o * gl.convert_layout(alpha, O_ROWS)[:, None]
                    p = gl.convert_layout(s.to(q.dtype), P_LAYOUT)
                else:  # its last two lines are the other's, too: behind both they cost up to a tenth
                    s = warpgroup_mma_wait(0, deps=(product,))
                    _free(k_empty.index(stage), k_read, more)
                    s, b_m, b_l, alpha = _weights(
                        s, b_m, b_l, block, other, position, first, scale_log2, S_LAYOUT
                    )
                    o = o * gl.convert_layout(alpha, O_ROWS)[:, None]
                    p = gl.convert_layout(s.to(q.dtype), P_LAYOUT)
                waiting = 1
                v_step = step
            step += 1
        mbarrier.arrive(q_empty, count=1)
        if waiting != 0:
            v_stage = v_step % STAGES
            mbarrier.wait(v_ready.index(v_stage), (v_step // STAGES) & 1)
            o = warpgroup_mma(p, values.index(v_stage).reshape([128, D]), o, is_async=True)
            o, p = warpgroup_mma_wait(0, deps=(o, p))
            mbarrier.arrive(v_empty.index(v_stage), count=1)

        o = o * gl.convert_layout(1.0 / gl.where(b_l == 0.0, 1.0, b_l), O_ROWS)[:, None]
        # The output leaves through the place of the last keys, once both warpgroups are done with them.
        mbarrier.wait(k_read, turn & 1)
        stage = (step - 1) % STAGES
        send(o, o_desc, (i_b, i_h, m0), keys.index(stage), WARPGROUP, D)
        if SHAPE[2]:
            store_lse(lse, (i_b * H + i_h).to(gl.int64) * Nq, m0, Nq, b_m, b_l)
        tma.store_wait(0)
        mbarrier.arrive(k_empty.index(stage), count=1)
        turn += 1
        mbarrier.wait(note_ready.index(turn % 2), (turn // 2) & 1)
        ticket = found(notes, turn % 2)


@gluon.jit
def _free(empty, read, more):
    """The keys have been read; the place of a row's last ones is needed for its output."""
    if more != 0:
        mbarrier.arrive(empty, count=1)
    else:
        mbarrier.arrive(read, count=1)


# One compilation serves all of them: it takes about 15 seconds.
_SIZES = ("rows", "H", "G", "Nq", "Nk", "groups", "stride_b", "stride_h", "width")


@gluon.jit(do_not_specialize=_SIZES)
def _kernel(
    q_desc, k_desc, v_desc, o_desc, lse, counts, blocks, counter,
    rows, H, G, Nq, Nk, groups, stride_b, stride_h, width, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, NEED_LSE: gl.constexpr,
):  # fmt: skip
    PIECES: gl.constexpr = D // 64
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [1, 1, 128, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES * PIECES * 2, 1, 1, 64, 64], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES * PIECES * 2, 1, 1, 64, 64], v_desc.layout)
    notes = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    marks = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    inputs, outputs = (q_desc, k_desc, v_desc), (o_desc, lse)
    buffers = (q_smem, k_smem, v_smem, notes, marks)
    barriers = new_barriers(STAGES)
    lists = (counter, counts, blocks)
    sizes = (rows, H, G, Nq, Nk, groups, stride_b, stride_h, width)
    state = (inputs, outputs, buffers, barriers, lists, sizes, scale_log2)
    SHAPE: gl.constexpr = (STAGES, D, NEED_LSE)
    gl.warp_specialize(
        [(_compute, (state, 0, SHAPE)), (_compute, (state, 1, SHAPE)), (_load, (state, SHAPE))],
        [4, 1],
        [240, 24],
    )


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    scale: float,
    need_lse: bool = True,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp (an empty tensor unless ``need_lse``)."""
    B, H, Nq, D = q.shape
    G, Nk = H // k.shape[1], k.shape[2]
    q, k, v = (tma_ready(t) for t in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H, Nq) if need_lse else (0,), dtype=torch.float32)
    # Lists that are one for all rows of the batch, or for all heads, are parted once.
    shared_counts, blocks = share_lists(*unexpanded(counts, indices))
    groups, width = blocks.shape[2], blocks.shape[4]
    strides = [0 if blocks.shape[d] == 1 else blocks.stride(d) // (2 * width) for d in (0, 1)]
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    rows = B * H * groups
    _kernel[(min(programs, rows),)](
        descriptor(q, 128, D), *(descriptor(t, 64, 64) for t in (k, v)), descriptor(out, 64, D), lse,
        shared_counts, blocks, counter, rows, H, G, Nq, Nk, groups, *strides, width, scale * LOG2E,
        D, STAGES[D], need_lse, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out, lse
