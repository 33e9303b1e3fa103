"""Block-sparse attention for Hopper in Gluon: a loading warp and two computing warpgroups per query block.

The grid is one program per multiprocessor. Whichever is free takes the next query block: key heads one
after the other and, within one, from the last block of queries to the first, so that programs that are
busy together read neighbouring lists from the L2 cache, and the shortest lists come last. The loading
warp runs ahead through query blocks and lists with bulk copies (TMA); each computing warpgroup owns 64
rows, overlaps the product of one key block with the softmax of the one before, and sends its output by a
bulk copy, too.

Source of the schedule inside a warpgroup: Shah et al. 2024, "FlashAttention-3", section 3.2.
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

BLOCK = 128
NOTES = gl.constexpr(5)  # numbers that the loading warp leaves for each query block


@gluon.jit
def _list(lists, sizes, i_b, i_h, i_m):
    """Where the list of a query block begins."""
    stride_ib, stride_ih, stride_im = sizes[8], sizes[9], sizes[10]
    start = i_b.to(gl.int64) * stride_ib + i_h.to(gl.int64) * stride_ih + i_m.to(gl.int64) * stride_im
    return lists[2] + start


@gluon.jit
def _draw(lists, sizes, notes, ready, empty, turn):
    """The loading warp takes the next ticket and leaves what is to know of it to the computing warpgroups.

    It runs ahead of them, so that they wait for no list: all they need is a few numbers in shared memory.
    """
    n_rows, H, G, Nq, Nk, Mq, stride_cb, stride_ch, stride_ib, stride_ih, stride_im = sizes
    slot = turn % 2
    mbarrier.wait(empty.index(slot), ((turn // 2) & 1) ^ 1)
    ticket = gl.atomic_add(lists[0], 1, sem="relaxed")
    count = 0
    if ticket < n_rows:
        i_b, i_h, _i_hk, i_m = place_of(ticket, H, G, Mq)
        count = gl.load(lists[1] + i_b * stride_cb + i_h * stride_ch + i_m)
        at = _list(lists, sizes, i_b, i_h, i_m)
        visible = (i_m * 128 + Nk - Nq + 1) // 128
        # Blocks that end at or before the first query need no causal test: those after them end the list.
        last = gl.load(at + count - 1, mask=count > 0, other=-1)
        before = gl.load(at + count - 2, mask=count > 1, other=-1)
        masked = (last >= visible).to(gl.int32) + (before >= visible).to(gl.int32)
        if masked == 2:
            while gl.load(at + count - 1 - masked, mask=masked < count, other=-1) >= visible:
                masked += 1
        leave(notes, slot * NOTES + 2, masked)
        leave(notes, slot * NOTES + 3, last)
        leave(notes, slot * NOTES + 4, before)
    leave(notes, slot * NOTES + 0, ticket)
    leave(notes, slot * NOTES + 1, count)
    mbarrier.arrive(ready.index(slot), count=1)
    return ticket, count


@gluon.jit
def _load(
    inputs, outputs, buffers, barriers, lists, sizes, scale_log2,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, NEED_LSE: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of each row, then its keys and values, last listed block first."""
    q_desc, k_desc, v_desc = inputs
    q_smem, k_smem, v_smem, notes = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, note_ready, note_empty, k_read = barriers
    n_rows, H, G, Nq, Nk, Mq, stride_cb, stride_ch, stride_ib, stride_ih, stride_im = sizes
    BYTES: gl.constexpr = 128 * D * 2
    turn = 0
    step = 0
    queries = 0  # query blocks loaded so far: rows that list nothing need none
    ticket, count = _draw(lists, sizes, notes, note_ready, note_empty, turn)
    while ticket < n_rows:
        i_b, i_h, i_hk, i_m = place_of(ticket, H, G, Mq)
        at = _list(lists, sizes, i_b, i_h, i_m)
        block = gl.load(at + count - 1, mask=count > 0, other=0)
        # The next row is drawn while the first blocks are under way: it takes several loads in turn.
        drawing = gl.minimum(count - 1, STAGES - 1)
        next_ticket = n_rows
        next_count = 0
        for i in range(0, count):
            following = gl.load(at + count - 2 - i, mask=i + 1 < count, other=0)
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), BYTES)
            tma.async_copy_global_to_shared(
                k_desc, [i_b, i_hk, block * 128, 0], k_ready.index(stage), k_smem.index(stage)
            )
            if i == 0:
                # After the first keys: their place is free long before that of the queries.
                mbarrier.wait(q_empty, (queries & 1) ^ 1)
                mbarrier.expect(q_ready, BYTES)
                tma.async_copy_global_to_shared(q_desc, [i_b, i_h, i_m * 128, 0], q_ready, q_smem)
                queries += 1
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_ready.index(stage), BYTES)
            tma.async_copy_global_to_shared(
                v_desc, [i_b, i_hk, block * 128, 0], v_ready.index(stage), v_smem.index(stage)
            )
            if i == drawing:
                next_ticket, next_count = _draw(lists, sizes, notes, note_ready, note_empty, turn + 1)
            block = following
            step += 1
        if count == 0:
            next_ticket, next_count = _draw(lists, sizes, notes, note_ready, note_empty, turn + 1)
        turn += 1
        ticket = next_ticket
        count = next_count


@gluon.jit
def _hide_future(s, position, block, S_LAYOUT: gl.constexpr):
    key = block * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, S_LAYOUT))
    return gl.where(key[None, :] <= position[:, None], s, float("-inf"))


@gluon.jit
def _compute(
    inputs, outputs, buffers, barriers, lists, sizes, scale_log2,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, NEED_LSE: gl.constexpr,
):  # fmt: skip
    """One computing warpgroup: 64 rows of every query block of this program."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    q_desc, k_desc, v_desc = inputs
    q_smem, k_smem, v_smem, notes = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, note_ready, note_empty, k_read = barriers
    n_rows, H, G, Nq, Nk, Mq, stride_cb, stride_ch, stride_ib, stride_ih, stride_im = sizes
    o_desc, out, lse = outputs
    q_rows = q_smem.reshape([128, D]).slice(WARPGROUP * 64, 64, dim=0)
    turn = 0
    step = 0
    queries = 0
    mbarrier.wait(note_ready.index(0), 0)
    ticket = found(notes, 0)
    while ticket < n_rows:
        slot = turn % 2
        count = found(notes, slot * NOTES + 1)
        masked = found(notes, slot * NOTES + 2)
        last = found(notes, slot * NOTES + 3)
        before = found(notes, slot * NOTES + 4)
        mbarrier.arrive(note_empty.index(slot), count=1)
        i_b, i_h, _i_hk, i_m = place_of(ticket, H, G, Mq)
        at = _list(lists, sizes, i_b, i_h, i_m)
        m0 = i_m * 128 + WARPGROUP * 64
        position = m0 + Nk - Nq + gl.arange(0, 64, layout=S_ROWS)

        b_m = gl.full([64], float("-inf"), gl.float32, layout=S_ROWS)
        b_l = gl.zeros([64], gl.float32, layout=S_ROWS)
        o = gl.zeros([64, D], gl.float32, layout=O_LAYOUT)
        if count > 0:
            mbarrier.wait(q_ready, queries & 1)
            queries += 1
            zero = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
            stage = step % STAGES
            mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
            s = warpgroup_mma(
                q_rows,
                k_smem.index(stage).reshape([128, D]).permute((1, 0)),
                zero,
                use_acc=False,
                is_async=True,
            )
            s = warpgroup_mma_wait(0, deps=(s,))
            if count == 1:
                mbarrier.arrive(k_read, count=1)  # the output needs the place of the last keys
            else:
                mbarrier.arrive(k_empty.index(stage), count=1)
            if masked > 0:
                s = _hide_future(s, position, last, S_LAYOUT)
            b_m = gl.max(s, 1) * scale_log2
            shift = gl.where(b_m == float("-inf"), 0.0, b_m)
            s = gl.exp2(s * scale_log2 - shift[:, None])
            b_l = gl.sum(s, 1)
            p = gl.convert_layout(s.to(q_desc.dtype), P_LAYOUT)
            for i in range(1, count):
                v_stage = step % STAGES
                v_phase = (step // STAGES) & 1
                step += 1
                stage = step % STAGES
                mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
                s = warpgroup_mma(
                    q_rows, k_smem.index(stage).reshape([128, D]).permute((1, 0)), zero,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                mbarrier.wait(v_ready.index(v_stage), v_phase)
                o = warpgroup_mma(p, v_smem.index(v_stage).reshape([128, D]), o, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                if i == count - 1:
                    mbarrier.arrive(k_read, count=1)
                else:
                    mbarrier.arrive(k_empty.index(stage), count=1)
                if i < masked:
                    block = before
                    if i > 1:  # only where blocks wholly in the future are listed
                        block = gl.load(at + count - 1 - i)
                    s = _hide_future(s, position, block, S_LAYOUT)
                b_max = gl.maximum(b_m, gl.max(s, 1) * scale_log2)
                shift = gl.where(b_max == float("-inf"), 0.0, b_max)
                alpha = gl.exp2(b_m - shift)
                s = gl.exp2(s * scale_log2 - shift[:, None])
                b_l = b_l * alpha + gl.sum(s, 1)
                b_m = b_max
                o, p = warpgroup_mma_wait(0, deps=(o, p))
                mbarrier.arrive(v_empty.index(v_stage), count=1)
                o = o * gl.convert_layout(alpha, O_ROWS)[:, None]
                p = gl.convert_layout(s.to(q_desc.dtype), P_LAYOUT)
            v_stage = step % STAGES
            mbarrier.wait(v_ready.index(v_stage), (step // STAGES) & 1)
            o = warpgroup_mma(p, v_smem.index(v_stage).reshape([128, D]), o, is_async=True)
            mbarrier.arrive(q_empty, count=1)
            o, p = warpgroup_mma_wait(0, deps=(o, p))
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            step += 1

        start = (i_b * H + i_h).to(gl.int64) * Nq
        if count > 0:
            # The output leaves through the place of the last keys, once both warpgroups have read them.
            o = o * gl.convert_layout(1.0 / gl.where(b_l == 0.0, 1.0, b_l), O_ROWS)[:, None]
            mbarrier.wait(k_read, (queries - 1) & 1)
            send(o, o_desc, (i_b, i_h, m0), k_smem.index((step - 1) % STAGES), WARPGROUP, D)
        else:
            i_row = m0 + gl.arange(0, 64, layout=O_ROWS)
            i_d = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
            p_out = out + (start + i_row.to(gl.int64))[:, None] * D + i_d[None, :]
            gl.store(p_out, o.to(q_desc.dtype), mask=(i_row < Nq)[:, None])
        if NEED_LSE:
            store_lse(lse, start, m0, Nq, b_m, b_l)
        if count > 0:
            tma.store_wait(0)
            mbarrier.arrive(k_empty.index((step - 1) % STAGES), count=1)
        turn += 1
        mbarrier.wait(note_ready.index(turn % 2), (turn // 2) & 1)
        ticket = found(notes, turn % 2 * NOTES)


# One compilation serves all of them: it takes about 15 seconds.
_SIZES = (
    "n_rows", "H", "G", "Nq", "Nk", "Mq", "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_im",
)  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _kernel(
    q_desc, k_desc, v_desc, o_desc, out, lse, counts, indices, counter,
    n_rows, H, G, Nq, Nk, Mq, stride_cb, stride_ch, stride_ib, stride_ih, stride_im, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, NEED_LSE: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [1, 1, 128, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 128, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, 128, D], v_desc.layout)
    notes = gl.allocate_shared_memory(gl.int32, [2 * NOTES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffers = (q_smem, k_smem, v_smem, notes)
    barriers = new_barriers(STAGES)
    lists = (counter, counts, indices)
    sizes = (n_rows, H, G, Nq, Nk, Mq, stride_cb, stride_ch, stride_ib, stride_ih, stride_im)
    inputs, outputs = (q_desc, k_desc, v_desc), (o_desc, out, lse)
    gl.warp_specialize(
        [
            (
                _compute,
                (inputs, outputs, buffers, barriers, lists, sizes, scale_log2, 0, STAGES, D, NEED_LSE),
            ),
            (
                _compute,
                (inputs, outputs, buffers, barriers, lists, sizes, scale_log2, 1, STAGES, D, NEED_LSE),
            ),
            (_load, (inputs, outputs, buffers, barriers, lists, sizes, scale_log2, 0, STAGES, D, NEED_LSE)),
        ],
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
    G, Nk, Mq = H // k.shape[1], k.shape[2], counts.shape[2]
    q, k, v = (tma_ready(t) for t in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H, Nq) if need_lse else (0,), dtype=torch.float32)
    indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    counts, indices = counts.contiguous().expand(B, H, -1), indices.expand(B, H, -1, -1)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    n_rows = B * H * Mq
    _kernel[(min(programs, n_rows),)](
        *(descriptor(t, BLOCK, D) for t in (q, k, v)), descriptor(out, 64, D), out, lse, counts, indices,
        counter, n_rows, H, G, Nq, Nk, Mq, *counts.stride()[:2], *indices.stride()[:3], scale * LOG2E,
        D, STAGES[D], need_lse, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out, lse
