"""Blocks and columns on Hopper: Gluon's kernel for the blocks, then Triton's goes on with the columns."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.block_sparse_attention import gluon
from sparseland.ops.column_sparse_attention import triton


def block_column_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    column_size: int,
    block_counts: Int[Tensor, "b h M"],
    block_indices: Int[Tensor, "b h M L"],
    column_counts: Int[Tensor, "b h Mc"],
    column_indices: Int[Tensor, "b h Mc Lc"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp. Between the two kernels the output is rounded to the input's type once more."""
    done = gluon.forward(q, k, v, block_counts, block_indices, block_size, scale)
    if not column_indices.shape[3]:
        return done
    nothing = (block_counts.new_zeros(1, 1, block_counts.shape[2]), block_indices[:1, :1, :, :0])
    return triton.block_column_attention(  # type: ignore[no-any-return]
        q, k, v, block_size, column_size, *nothing, column_counts, column_indices, scale, onto=done
    )
