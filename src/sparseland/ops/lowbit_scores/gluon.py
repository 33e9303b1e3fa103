"""The low-bit estimate for Hopper in Gluon: a loading warp and four computing warpgroups per program.

A program keeps 512 queries and streams the keys between sink and local ones past them, a segment of 128 at
a time, with their scales and shifts (bulk copies, TMA). Each warpgroup owns 128 rows; while one multiplies,
the others judge. Scores are float16 from the product on and stay two to a register: three instructions for
two scores (scale, shift, maximum), which Triton's elementwise code does not keep together.

The factors are those of the ``triton`` backend. Source: see the package.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparseland.ops.lowbit_scores.tiles import KEYS, ROWS, SEGMENT, WORD, judged, n_words
from sparseland.ops.lowbit_scores.triton import factors
from sparseland.patterns import cdiv

WARPGROUPS = gl.constexpr(4)
STAGES = gl.constexpr(4)  # segments of keys in flight
_BLOCKS = gl.constexpr(2)  # query blocks of a warpgroup
_M = gl.constexpr(2 * ROWS)
_N = gl.constexpr(SEGMENT * KEYS)
_ROWS, _KEYS = gl.constexpr(ROWS), gl.constexpr(KEYS)
_SEGMENT, _WORD = gl.constexpr(SEGMENT), gl.constexpr(WORD)
_TURNS = gl.constexpr(WORD // SEGMENT)  # segments that fill a word
# Two float16 columns in one int32: the layout of a product's pairs of columns, and of the largest of each
# tile by [block, warp, half, row, tile, fourth of the columns].
_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16], [0, 32], [64, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[128, 64],
    )
)
_TILES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0], [1, 0, 0, 0, 0, 0]],
        lane_bases=[
            [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2],
            [0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0], [0, 0, 0, 4, 0, 0],
        ],
        warp_bases=[[0, 1, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0]],
        block_bases=[],
        shape=[2, 4, 2, 8, 4, 4],
    )
)  # fmt: skip
_BITS = gl.constexpr(gl.SliceLayout(2, _TILES.value))  # the halves' rows have met
_WORDS = gl.constexpr(gl.SliceLayout(3, _BITS.value))
_ROW_WORDS = gl.constexpr(gl.SliceLayout(2, gl.SliceLayout(3, _WORDS.value)))  # [block, warp]


@gluon.jit
def _pair(a, b):
    return gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _of_two(INSTRUCTION: gl.constexpr, a, b):
    return gl.inline_asm_elementwise(INSTRUCTION, "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _larger(a, b):
    return _of_two("max.NaN.f16x2 $0, $1, $2;", a, b)


@gluon.jit
def _scaled(a, by, shift):
    """``a * by + shift``, rounded once."""
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, by, shift], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _one_above(a, b):
    """1 where either half of ``a`` is above that of ``b`` or no number."""
    return _of_two(
        "{ .reg .pred p, q; setp.gtu.f16x2 p|q, $1, $2; or.pred p, p, q; selp.b32 $0, 1, 0, p; }", a, b
    )


@gluon.jit
def _or(a, b):
    return a | b


@gluon.jit
def _columns(smem):
    """A segment's numbers, stored so that a thread loads 16 bytes per tile, by pairs of columns."""
    STORED: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16], [0, 32]],
        lane_bases=[[0, 4], [0, 8], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [0, 0]],
        block_bases=[],
        shape=[1, 64],
    )
    b_x = smem.load(STORED).reshape([4, 4, 4]).permute([0, 2, 1]).reshape([64])
    return gl.convert_layout(b_x, gl.SliceLayout(0, _PAIRS), assert_trivial=True)[None, :]


@gluon.jit
def _store(b_bits, i_w, out, place):
    """Ors a warp's bits into word ``i_w`` of its blocks, as far as their tiles are judged."""
    words, counts, Mq, W = out
    i_bh, i_hk, block, steps, dense = place
    i_block = block + gl.arange(0, _BLOCKS, layout=gl.SliceLayout(1, _ROW_WORDS))
    i_block = i_block[:, None] + gl.zeros([_BLOCKS, 4], gl.int32, layout=_ROW_WORDS)
    here = i_block < Mq
    left = gl.load(counts + i_block, mask=here, other=0) - i_w * _WORD
    one = gl.full([_BLOCKS, 4], 1, gl.int32, layout=_ROW_WORDS)
    mine = gl.where(left >= _WORD, -1, (one << gl.minimum(gl.maximum(left, 0), _WORD - 1)) - 1)
    p_word = words + (i_bh * Mq + i_block).to(gl.int64) * W + i_w
    # The bits are those of any order.
    gl.atomic_or(p_word, b_bits & mine, mask=here, sem="relaxed")


@gluon.jit
def _load(descs, buffers, barriers, place, D: gl.constexpr):
    """The loading warp: all queries, then segment after segment."""
    q_desc, k_desc, k_scale_desc, shift_desc = descs
    q_smem, k_smem, k_scale_smem, shift_smem = buffers
    q_ready, ready, empty = barriers
    i_bh, i_hk, block, steps, dense = place
    mbarrier.expect(q_ready, WARPGROUPS * _M * D)
    for i in gl.static_range(WARPGROUPS):
        at = (block + i * _BLOCKS) * _ROWS
        tma.async_copy_global_to_shared(q_desc, [i_bh, at, 0], q_ready, q_smem.index(i))
    for i in range(0, steps):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), _N * D + 2 * 2 * _N)
        key = _KEYS + i * _N  # behind the sink
        tma.async_copy_global_to_shared(k_desc, [i_hk, key, 0], ready.index(stage), k_smem.index(stage))
        tma.async_copy_global_to_shared(
            k_scale_desc, [i_hk, key // 2], ready.index(stage), k_scale_smem.index(stage)
        )
        tma.async_copy_global_to_shared(
            shift_desc, [i_bh, key // 2], ready.index(stage), shift_smem.index(stage)
        )


@gluon.jit
def _compute(rows, out, buffers, barriers, place, WARPGROUP: gl.constexpr, D: gl.constexpr):
    """One computing warpgroup: the bits of two query blocks."""
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    TILE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, _BITS))))
    q_scale, threshold, n_rows = rows
    q_smem, k_smem, k_scale_smem, shift_smem = buffers
    q_ready, ready, empty = barriers
    i_bh, i_hk, block, steps, dense = place
    block += WARPGROUP * _BLOCKS
    place = (i_bh, i_hk, block, steps, dense)
    i_r = block * _ROWS + gl.arange(0, _M, layout=gl.SliceLayout(1, _PAIRS))
    p_row = i_bh.to(gl.int64) * n_rows + i_r
    b_scale = gl.load(q_scale + p_row, mask=i_r < n_rows, other=0.0)
    b_t = gl.load(threshold + p_row, mask=i_r < n_rows, other=float("inf"))
    b_scale, b_t = _pair(b_scale, b_scale)[:, None], _pair(b_t, b_t)
    b_t = gl.convert_layout(b_t.reshape([2, 4, 2, 8, 1, 1]), _TILES)
    nothing = gl.zeros([_M, _N], gl.float16, layout=PRODUCT)
    zero = gl.zeros([2, 4, 8, 4, 4], gl.int32, layout=_BITS)
    b_tile = gl.arange(0, 4, layout=TILE)[None, None, None, :, None]
    b_word = gl.zeros([2, 4, 8, 4], gl.int32, layout=_WORDS)
    for i in range(0, dense):
        _store(gl.full([_BLOCKS, 4], -1, gl.int32, layout=_ROW_WORDS), i, out, place)
    mbarrier.wait(q_ready, 0)
    q = q_smem.index(WARPGROUP).reshape([_M, D])
    filled = 0  # bits of the word
    for i in range(0, steps):
        stage = i % STAGES
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        b_e = warpgroup_mma(q, k_smem.index(stage).reshape([_N, D]).permute((1, 0)), nothing, use_acc=False)
        b_left, b_right = gl.split(b_e.reshape([_M, _N // 2, 2]))
        b_e = gl.convert_layout(_pair(b_left, b_right), _PAIRS, assert_trivial=True)
        b_by = _of_two("mul.rn.f16x2 $0, $1, $2;", b_scale, _columns(k_scale_smem.index(stage)))
        b_e = _scaled(b_e, b_by, _columns(shift_smem.index(stage)))
        mbarrier.arrive(empty.index(stage), count=1)
        # A thread holds an eighth of a tile's columns for each of its rows: their largest takes no exchange.
        b_top = gl.convert_layout(
            gl.reduce(b_e.reshape([2, 4, 2, 8, 4, 4, 4]), 5, _larger), _TILES, assert_trivial=True
        )
        b_top = gl.reduce(_of_two("sub.rn.f16x2 $0, $1, $2;", b_top, b_t), 2, _larger)
        b_bits = _one_above(b_top, zero) << b_tile
        b_word = b_word | (gl.sum(b_bits, 3) << filled)
        filled += _SEGMENT
        if (filled == _WORD) | (i + 1 == steps):
            _store(gl.reduce(gl.reduce(b_word, 3, _or), 2, _or), i // _TURNS, out, place)
            b_word = gl.zeros([2, 4, 8, 4], gl.int32, layout=_WORDS)
            filled = 0


@gluon.jit(do_not_specialize=["Hq", "G", "n_rows", "Mq", "W"])
def _estimate(
    q_desc, k_desc, k_scale_desc, shift_desc, q_scale, threshold, log_tau, words, counts,
    Hq, G, n_rows, Mq, W, D: gl.constexpr,
):  # fmt: skip
    """Bits of the judged tiles of 512 queries; ``dense``: words of a head that keeps all of them."""
    i_t = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest rows first
    i_bh = gl.program_id(1)
    i_h = i_bh % Hq
    i_hk = i_bh // Hq * (Hq // G) + i_h // G
    block = i_t * (WARPGROUPS * _BLOCKS)
    # All warpgroups go as far as the last: what lies behind their own tiles is dropped when it is stored.
    steps = gl.load(counts + gl.minimum(block + WARPGROUPS * _BLOCKS, Mq) - 1) // _SEGMENT
    dense = 0
    if gl.load(log_tau + i_h) == float("-inf"):
        dense = (steps + _TURNS - 1) // _TURNS
        steps = 0
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [WARPGROUPS, 1, _M, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, _N, D], k_desc.layout)
    k_scale_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 1, _N // 2], k_scale_desc.layout)
    shift_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 1, _N // 2], shift_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()

    descs = (q_desc, k_desc, k_scale_desc, shift_desc)
    rows, out = (q_scale, threshold, n_rows), (words, counts, Mq, W)
    buffers = (q_smem, k_smem, k_scale_smem, shift_smem)
    barriers = (q_ready, ready, empty)
    place = (i_bh, i_hk, block, steps, dense)
    gl.warp_specialize(
        [
            (_compute, (rows, out, buffers, barriers, place, 0, D)),
            (_compute, (rows, out, buffers, barriers, place, 1, D)),
            (_compute, (rows, out, buffers, barriers, place, 2, D)),
            (_compute, (rows, out, buffers, barriers, place, 3, D)),
            (_load, (descs, buffers, barriers, place, D)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )


def tile_bits(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], tau: Float[Tensor, " Hq"], scale: float
) -> Int[Tensor, "B Hq Mq W"]:
    """Bits of the judged tiles; see the package. Deterministic."""
    B, Hq, n_queries, _ = q.shape
    n_keys = k.shape[2]
    counts = judged(n_queries, n_keys, q.device)
    Mq, W = counts.shape[0], n_words(n_queries, n_keys)
    made = factors(q, k, tau, scale)
    words = torch.zeros(B, Hq, Mq, W, dtype=torch.int32, device=q.device)
    BD = made.q4.shape[2]
    whole = gl.NVMMASharedLayout(swizzle_byte_width=BD, element_bitwidth=8, rank=3)
    pairs = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    columns = (x.view(torch.int32) for x in (made.k_scale, made.shift))
    grid = (cdiv(Mq, WARPGROUPS.value * _BLOCKS.value), B * Hq)
    _estimate[grid](
        _descriptor(made.q4, [1, _M.value, BD], whole), _descriptor(made.k4, [1, _N.value, BD], whole),
        *(_descriptor(x, [1, _N.value // 2], pairs) for x in columns),
        made.q_scale, made.threshold, made.log_tau, words, counts,
        Hq, Hq // k.shape[1], Mq * ROWS, Mq, W, BD, num_warps=4, maxnreg=96,
    )  # fmt: skip
    return words


def _descriptor(x: Tensor, block: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
