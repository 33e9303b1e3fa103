"""``sparse_gemv`` on the CPU: ``embedding_bag`` sums the kept rows of ``W^T`` where they lie.

Each kept row is cut into as many pieces as there are threads, so that a row's piece is an "embedding" and
each thread sums one bag of them: no weight is copied, and each is read once. Selecting the rows first and
then multiplying takes several times as long, for the copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.sparse_gemv.reference import kept_inputs
from sparseland.ops.sparse_gemv.reference import sparse_gemv as dense

# Kept inputs, summed over tokens, in multiples of ``in``, from which the dense product is faster: measured
# between 1.4 and 2.5 at 4096 x 11008, one and two threads, float32 and bfloat16. Two tokens never reach it.
DENSE_FROM = 2.0


def sparse_gemv(
    x: Float[Tensor, "T in"],
    wt: Float[Tensor, "in out"],
    threshold: Tensor,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "T out"]:
    """See :func:`sparseland.ops.sparse_gemv.sparse_gemv`."""
    n_tokens, n_in = x.shape
    kept = kept_inputs(x, threshold)
    # PyTorch's float16 product on the CPU is so slow that no number of tokens makes up for it.
    if n_tokens > DENSE_FROM and x.dtype != torch.float16 and int(kept.sum()) > DENSE_FROM * n_in:
        return dense(x, wt, threshold, bias)
    y = x.new_empty(n_tokens, wt.shape[1])
    for token in range(n_tokens):
        index = kept[token].nonzero().flatten()
        y[token] = _sum_rows(wt, index, x[token].index_select(0, index))
    return y if bias is None else y.add_(bias)


def _sum_rows(
    wt: Float[Tensor, "in out"], index: Int[Tensor, " nnz"], factors: Float[Tensor, " nnz"]
) -> Float[Tensor, " out"]:
    """``sum_i factors[i] * wt[index[i]]``, columns shared among the threads."""
    n_in, n_out = wt.shape
    if not index.numel() or not n_out:
        return wt.new_zeros(n_out)
    pieces = _pieces(n_out, torch.get_num_threads())
    rows = index * pieces + torch.arange(pieces)[:, None]
    return F.embedding_bag(
        rows,
        wt.view(n_in * pieces, n_out // pieces),
        mode="sum",
        per_sample_weights=factors.expand(pieces, -1),
    ).flatten()


def _pieces(n_out: int, threads: int) -> int:
    """The largest number of equal pieces, up to the number of threads, that a row can be cut into."""
    return next(n for n in range(min(threads, n_out), 0, -1) if n_out % n == 0)
