"""Choosing key blocks per query token by overlapping mean keys, stage 1 of InfLLM-V2.

``compress_keys`` means windows of ``kernel`` keys, one every ``stride`` (c_j). A query's softmax over the
windows that ended at or before it, summed over the query heads of a key head, and the largest of these
sums over the windows that touch a block, is the block's score; ``select_blocks`` keeps the best of the
blocks before the query's window. Scores live only for some queries at a time: nothing is kept that grows
with queries times windows. No gradients: the method's are those of the attention over what is chosen.

What can't be judged is read: a window with NaN or infinity in its mean scores ``UNJUDGED``, above all
others, and counts as zeros in the denominators; for a query that is NaN all windows that have ended do.

Source: Zhao et al. 2025, "InfLLM-V2: Dense-Sparse Switchable Attention", section 3; MiniCPM Team 2025,
"MiniCPM4", section 2.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import Backend, choose, interpreting, on_cpu, why_no_triton, why_not_float
from sparseland.ops._operator import operator
from sparseland.ops.kernel_scores import fast
from sparseland.ops.kernel_scores.fast import block_scores, coarsen, compress_keys, visible_kernels
from sparseland.ops.kernel_scores.fast import top as top_blocks
from sparseland.ops.kernel_scores.reference import UNJUDGED
from sparseland.patterns import cdiv

__all__ = [
    "UNJUDGED", "block_scores", "check_sizes", "coarsen", "compress_keys", "kernel_scores", "longest_list",
    "select_blocks", "top_blocks", "visible_kernels",
]  # fmt: skip

_HERE = "sparseland.ops.kernel_scores"
_OP = "kernel_scores"
_MOST_BLOCKS = 65534  # with more, the list kernel's packed counts could overflow


def _why_not_triton(q: Tensor, stride: int, block_size: int, n_keys: int) -> str | None:
    if reason := why_no_triton(q):
        return reason
    if reason := why_not_float(q):
        return reason
    if q.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter multiplies no bfloat16"
    per_block = block_size // stride
    if per_block & (per_block - 1) or per_block > 32:
        return f"it needs 1, 2, 4, ... 32 strides per block, got {per_block}"
    if q.shape[3] > 256:
        return f"it needs a head dimension of at most 256, got {q.shape[3]}"
    if (blocks := cdiv(n_keys, block_size)) > _MOST_BLOCKS:
        return f"it numbers at most {_MOST_BLOCKS} blocks, got {blocks}"
    return None


# `cpu` and `torch` are one module: so a process-wide choice of the CPU backend holds here too.
_BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", lambda q, *_: on_cpu(q)),
    Backend("triton", f"{_HERE}.triton", _why_not_triton),
    Backend("torch", f"{_HERE}.fast", lambda *_: None),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)


def check_sizes(kernel: int, stride: int, block_size: int) -> str | None:
    """Why these sizes can't be used together, or None."""
    if kernel % stride:
        return f"kernel={kernel} must be a multiple of stride={stride}"
    if block_size % stride:
        return f"block_size={block_size} must be a multiple of stride={stride}"
    if kernel > block_size + stride:
        return f"kernel={kernel} must be at most block_size + stride = {block_size + stride}"
    return None


def longest_list(n_keys: int, block_size: int, window: int, topk: int, dense_len: int, tile: int) -> int:
    """Blocks that ``tile`` neighbouring queries can list together at most."""
    before = max(0, cdiv(n_keys, block_size) - window)
    # Behind dense_len, a tile's first queries may still take all that its last can see.
    return min(before, max(tile * topk, (dense_len + tile) // block_size))


def kernel_scores(
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    n_keys: int,
    *,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
    coarse: Float[Tensor, "B Hkv Nf D"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "B Hkv Nq Mk"]:
    """Each key block's score for each query and key head: 0 where no window that touches it has ended yet.

    ``UNJUDGED`` where one has that can't be compared: its mean holds NaN or infinity, or its product is NaN.

    Args:
        q: queries, the last ``Nq`` of the ``n_keys`` tokens.
        compressed: what :func:`compress_keys` makes of the keys.
        n_keys: keys so far.
        kernel, stride: tokens per window, and from one to the next.
        block_size: tokens per block, a multiple of ``stride``.
        scale: factor on the logits, positive.
        coarse: what :func:`coarsen` makes of ``compressed``: the softmax's denominator then comes from it,
            where a coarse window has ended, and one pass over ``compressed`` is saved. Rows no longer sum to
            one; the order within a head stays.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[B, Hkv, Nq, ceil(n_keys / block_size)]`` float32.

    Raises:
        SparselandError: shapes don't fit, or the requested backend can't run the input.
    """
    _check(q, compressed, coarse, n_keys, kernel, stride, block_size, scale)
    options = (n_keys, kernel, stride, block_size, scale, backend or "")
    return _kernel_scores(q.detach(), compressed.detach(), coarse, *options)  # type: ignore[no-any-return]


def select_blocks(
    q: Float[Tensor, "B Hq Nq D"],
    compressed: Float[Tensor, "B Hkv Nc D"],
    n_keys: int,
    *,
    kernel: int,
    stride: int,
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
    tile: int,
    scale: float,
    coarse: Float[Tensor, "B Hkv Nf D"] | None = None,
    backend: str | None = None,
) -> tuple[Int[Tensor, "B Hkv T"], Int[Tensor, "B Hkv T L"], Int[Tensor, "B Hkv T L"]]:
    """The lists of a :class:`~sparseland.patterns.TokenBlockPattern`: the best blocks before the window.

    Of the blocks before its window a query takes the first ``init`` and, of the others, those with the
    largest :func:`kernel_scores`, ``topk`` in all; equal scores go to the earlier block (the Triton backend
    compares half-precision queries' scores in bfloat16). A query at a
    position below ``dense_len - 1`` takes all. Arguments as in :func:`kernel_scores`, and

    Args:
        window: blocks up to and including a query's own that are not up for selection.
        init: first blocks that are always taken.
        topk: blocks taken, ``init`` included.
        dense_len: contexts shorter than this are taken whole.
        tile: queries per list.

    Returns:
        counts, indices and members, int32, the lists padded to :func:`longest_list`.

    Raises:
        SparselandError: as :func:`kernel_scores`, or ``topk`` below 1.
    """
    _check(q, compressed, coarse, n_keys, kernel, stride, block_size, scale)
    if topk < 1:
        raise SparselandError(f"select_blocks: topk must be >= 1, got {topk}")
    options = (n_keys, kernel, stride, block_size, window, init, topk, dense_len, tile, scale, backend or "")
    return _select_blocks(q.detach(), compressed.detach(), coarse, *options)  # type: ignore[no-any-return]


def _check(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
) -> None:
    if reason := check_sizes(kernel, stride, block_size):
        raise SparselandError(f"{_OP}: {reason}")
    if not scale > 0:
        raise SparselandError(f"{_OP}: scale must be > 0, got {scale}")
    if q.dim() != 4 or compressed.dim() != 4 or q.shape[0] != compressed.shape[0]:
        raise SparselandError(
            f"{_OP}: q must be [B, Hq, Nq, D] and compressed [B, Hkv, Nc, D], got {list(q.shape)} and "
            f"{list(compressed.shape)}"
        )
    if q.shape[1] % compressed.shape[1] or q.shape[3] != compressed.shape[3]:
        raise SparselandError(
            f"{_OP}: heads or head sizes don't fit: {list(q.shape)} and {list(compressed.shape)}"
        )
    if q.shape[2] > n_keys:
        raise SparselandError(f"{_OP}: {q.shape[2]} queries but only {n_keys} keys")
    for name, t, size in (("compressed", compressed, kernel), ("coarse", coarse, 4 * kernel)):
        if t is not None and t.shape[2] < visible_kernels(n_keys, size, stride * size // kernel):
            raise SparselandError(f"{_OP}: {name} holds {t.shape[2]} windows, too few for {n_keys} keys")


@operator("sparseland::kernel_scores")
def _kernel_scores(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
    backend: str,
) -> Tensor:
    module = choose(_OP, _BACKENDS, backend, q, stride, block_size, n_keys).load()
    scores: Tensor = module.scores(q, compressed, coarse, n_keys, kernel, stride, block_size, scale)
    return scores


@_kernel_scores.register_fake
def _(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    scale: float,
    backend: str,
) -> Tensor:
    shape = (q.shape[0], compressed.shape[1], q.shape[2], cdiv(n_keys, block_size))
    return q.new_empty(shape, dtype=torch.float32)


@operator("sparseland::kernel_select_blocks")
def _select_blocks(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
    tile: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = choose("select_blocks", _BACKENDS, backend, q, stride, block_size, n_keys).load()
    # A backend without a way of its own gives scores and the best of them, some queries at a time.
    select = getattr(module, "select", None) or partial(fast.select_in_pieces, module)
    return select(  # type: ignore[no-any-return]
        q, compressed, coarse, n_keys, kernel, stride, block_size, window, init, topk, dense_len, tile, scale,
        longest_list(n_keys, block_size, window, topk, dense_len, tile),
    )  # fmt: skip


@_select_blocks.register_fake
def _(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    n_keys: int,
    kernel: int,
    stride: int,
    block_size: int,
    window: int,
    init: int,
    topk: int,
    dense_len: int,
    tile: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (q.shape[0], compressed.shape[1], cdiv(q.shape[2], tile))
    longest = longest_list(n_keys, block_size, window, topk, dense_len, tile)
    counts = q.new_empty(shape, dtype=torch.int32)
    return counts, *(q.new_empty((*shape, longest), dtype=torch.int32) for _ in range(2))  # type: ignore[return-value]
