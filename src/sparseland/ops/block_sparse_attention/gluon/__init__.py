"""Block-sparse attention for Hopper in Gluon: a kernel for each block size."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.block_sparse_attention.gluon import blocks64, blocks128

_KERNELS = {64: blocks64, 128: blocks128}


def forward(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    counts: Int[Tensor, "b h Mq"],
    indices: Int[Tensor, "b h Mq L"],
    block_size: int,
    scale: float,
    need_lse: bool = True,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp (an empty tensor unless ``need_lse``)."""
    kernel = _KERNELS[block_size]
    return kernel.forward(q, k, v, counts, indices, scale, need_lse)  # type: ignore[no-any-return]
