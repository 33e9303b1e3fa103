"""How Triton kernels load rows of one head: a stretch of neighbours, or wherever a list points to."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(p_x, inside, i_d, D: tl.constexpr, BD: tl.constexpr, PAST: tl.constexpr):
    """The fewest masks: of rows only where PAST, of columns only where the head is padded."""
    if PAST:
        b_x = tl.load(p_x, mask=inside[:, None] & (i_d < D)[None, :], other=0.0)
    elif D == BD:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(i_d < D)[None, :], other=0.0)
    return b_x


@triton.jit
def rows_from(
    x, n0, stride, N, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr,
    PAST: tl.constexpr,
):  # fmt: skip
    """Rows [n0, n0 + ROWS) as a [ROWS, BD] tile; PAST: some may lie behind the last (0)."""
    if TMA:
        b_x = x.load([n0, 0])
    else:
        i_n = tl.arange(0, ROWS)
        i_d = tl.arange(0, BD)
        # 64 bits: a cache that interleaves heads can pass 2^31 elements within one head.
        p_x = x + n0.to(tl.int64) * stride + i_n[:, None] * stride + i_d[None, :]
        b_x = _load(p_x, n0 + i_n < N, i_d, D, BD, PAST)
    return b_x


@triton.jit
def rows_at(
    x, i_n, stride, N, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, PAST: tl.constexpr
):  # fmt: skip
    """The rows ``i_n [BN]`` as a [BN, BD] tile; PAST: those at N or later are 0.

    WIDE: the head passes 2^31 elements. Row offsets take registers, and narrow ones take half of them.
    """
    i_d = tl.arange(0, BD)
    inside = i_n < N
    if PAST and not WIDE:
        i_n = tl.where(inside, i_n, N)  # the product below must not overflow
    p_x = x + ((i_n.to(tl.int64) if WIDE else i_n) * stride)[:, None] + i_d[None, :]
    return _load(p_x, inside, i_d, D, BD, PAST)
