"""Hierarchical top-k: a beam search over a binary partition of the keys, for every block of queries.

A query block searches ``B`` key blocks of ``block_k`` keys from ``first`` on for ``K`` that it likes best::

    segments    K of them, segment i = blocks floor(B i / K) ... floor(B (i + 1) / K) - 1
    ceil(log2(B / K)) times:
        split   every segment into two halves, the first floor(size / 2) blocks and the rest; none is empty
        score   a half by its first block: max of q . k over that block's keys and the block's queries
                (every ``stride``-th of them)
        keep    the K halves of the highest scores, ties to the earlier
    result      the K segments, single blocks by now, in ascending order

So ``2 K ceil(log2(B / K))`` halves are looked at per query block (:func:`n_representatives`), not B; the
first half of a segment has its parent's representative, so that about half of them need no new product. Where
B is at most K, all blocks are the result.

Source: Lee et al. 2024, "A Training-free Sub-quadratic Cost Transformer Model Serving Framework With
Hierarchically Pruned Attention" (HiP), section 3, in its integer form. Backends: ``triton``; ``cpu`` and
``torch`` (one module of whole-tensor PyTorch); ``reference``. Nothing here has a gradient, and nothing
synchronises with the host.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import (
    Backend,
    check_attention_shapes,
    choose,
    interpreting,
    module_of,
    on_cpu,
    why_no_triton,
    why_not_float,
)
from sparseland.ops._operator import operator
from sparseland.patterns import cdiv

__all__ = ["n_representatives", "n_stages", "tree_search"]

_HERE = "sparseland.ops.tree_search"


def _why_no_triton(q: Tensor, k: Tensor, block_q: int, stride: int, shared: bool) -> str | None:
    rows = cdiv(block_q, stride) * (q.shape[1] // k.shape[1] if shared else 1)
    if rows > 128:
        return f"{rows} queries score together, above 128"
    if q.shape[3] > 256:
        return f"head size {q.shape[3]} is above 256"
    if reason := why_not_float(q):
        return reason
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return why_no_triton(q)


BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", lambda q, *_: on_cpu(q)),
    Backend("triton", f"{_HERE}.triton", _why_no_triton),
    Backend("torch", f"{_HERE}.fast", lambda *_: None),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)


def n_stages(blocks: int, keep: int) -> int:
    """``ceil(log2(blocks / keep))``, and 0 where nothing is left to choose."""
    return max(0, -(-blocks // keep) - 1).bit_length()


def n_representatives(blocks: int, keep: int) -> int:
    """How many halves a query block looks at to find ``keep`` of ``blocks`` key blocks."""
    return 2 * keep * n_stages(blocks, keep)


def tree_search(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    first: Int[Tensor, "b M"],
    blocks: Int[Tensor, "b M"],
    *,
    block_q: int,
    block_k: int,
    keep: int,
    stride: int = 1,
    shared: bool = False,
    backend: str | None = None,
) -> tuple[Int[Tensor, "B H M"], Int[Tensor, "B H M n"]]:
    """The key blocks that a beam search finds for each query block.

    Nothing here is causal: the caller sees to it that a query block searches only keys before itself.

    Args:
        q: queries; query block ``m`` is rows ``m * block_q`` and following, ``M = ceil(Nq / block_q)``.
        k: keys.
        first: position of the first key that a query block searches, int32 or int64; ``b`` may be 1.
        blocks: how many whole key blocks it searches from there (0: none); the last must end within Nk.
        block_q: queries that search together.
        block_k: keys of a block, a power of two.
        keep: key blocks to find, K.
        stride: every so-many-th query of a block scores, beginning with its first.
        shared: one search for all query heads of a key head, by the best score of any of them.
        backend: ``triton``, ``cpu``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``(counts, starts)``, int32: how many blocks were found, ``min(blocks, keep)``, and the position of
        each one's first key, ascending and distinct; 0 behind the count. ``H`` is Hq, or Hkv where
        ``shared``; ``n`` is ``keep``, or fewer where Nk has no more.

    NaN scores count as the lowest.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, a number is out of range, or the requested
            backend can't run the input.
    """
    check_attention_shapes(q, k, k)
    if min(block_q, keep, stride) < 1 or block_k < 1 or block_k & (block_k - 1):
        raise SparselandError(
            f"tree_search: block_q={block_q}, keep={keep} and stride={stride} must be 1 or more and "
            f"block_k={block_k} a power of two"
        )
    shape = (cdiv(q.shape[2], block_q),)
    for name, x in (("first", first), ("blocks", blocks)):
        if x.dim() != 2 or x.shape[0] not in (1, q.shape[0]) or x.shape[1:] != shape or x.device != q.device:
            raise SparselandError(
                f"tree_search: {name} must be [{q.shape[0]} or 1, {shape[0]}] on {q.device}, "
                f"got {list(x.shape)} on {x.device}"
            )
    chosen = choose("tree_search", BACKENDS, backend, q, k, block_q, stride, shared)
    keep = min(keep, k.shape[2] // block_k)
    heads = k.shape[1] if shared else q.shape[1]
    first, blocks = (x.to(torch.int32).expand(q.shape[0], -1) for x in (first, blocks))
    counts = blocks.clamp(0, keep)[:, None].expand(-1, heads, -1)
    if not keep or not q.numel():
        return counts, counts.new_empty(*counts.shape, keep)
    return counts, _tree_search(q, k, first, blocks, block_q, block_k, keep, stride, shared, chosen.name)


@operator("sparseland::tree_search")
def _tree_search(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    blocks: Tensor,
    block_q: int,
    block_k: int,
    keep: int,
    stride: int,
    shared: bool,
    backend: str,
) -> Tensor:
    module = module_of(BACKENDS, backend)
    starts: Tensor = module.tree_search(q, k, first, blocks, block_q, block_k, keep, stride, shared)
    return starts


@_tree_search.register_fake
def _(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    blocks: Tensor,
    block_q: int,
    block_k: int,
    keep: int,
    stride: int,
    shared: bool,
    backend: str,
) -> Tensor:
    heads = k.shape[1] if shared else q.shape[1]
    return q.new_empty(q.shape[0], heads, first.shape[1], keep, dtype=torch.int32)
