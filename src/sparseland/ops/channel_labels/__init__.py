"""Labels of cached keys: a few channels of each, in a few bits, to guess its product with a query.

``write_labels`` puts the labels of new keys where they belong in a cache of them; ``label_scores``
multiplies one query with all labels. With fewer than 16 bits a row is rounded between its smallest and
largest value, ``x ≈ low + step * code``, and stored packed: byte ``j`` of ``W`` holds the channels ``j``,
``j + W``, ``j + 2 W``, … The products need no unpacked keys: ``q · x ≈ low * sum(q) + step * (q · code)``.

Source: Yang et al. 2024, "Post-Training Sparse Attention with Double Sparsity", section 3 (label cache).
Backends: ``triton`` (one kernel for each of both); ``cpu`` and ``torch`` (one module of whole-tensor
PyTorch); ``reference``. Nothing here has a gradient, and nothing synchronises with the host.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import Backend, choose, interpreting, on_cpu, why_no_triton, why_not_float
from sparseland.ops._operator import operator
from sparseland.ops.channel_labels.layout import BITS, new_labels, row_width

__all__ = ["BITS", "label_scores", "new_labels", "row_width", "write_labels"]

_HERE = "sparseland.ops.channel_labels"


def _why_no_triton(x: Tensor, heads: int) -> str | None:
    if reason := why_not_float(x):
        return reason
    if interpreting() and x.dtype == torch.bfloat16:
        return "Triton's interpreter rounds bfloat16 otherwise"
    return why_no_triton(x, heads)


_BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", lambda x, _: on_cpu(x)),
    Backend("triton", f"{_HERE}.triton", _why_no_triton),
    Backend("torch", f"{_HERE}.fast", lambda *_: None),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)
_TRITON = _BACKENDS[1]


def write_labels(
    k: Float[Tensor, "B Hkv n D"],
    channels: Int[Tensor, "H C"],
    bits: int,
    rows: Shaped[Tensor, "B H N W"],
    ranges: Float[Tensor, "B H N 2"] | None,
    at: int,
    *,
    backend: str | None = None,
) -> None:
    """Write the labels of ``k`` into the rows ``at`` … ``at + n - 1`` of a cache of labels.

    Args:
        k: new keys, as they are cached (after RoPE).
        channels: which channels of a key its label holds, for each label head; ``H`` is a multiple of
            ``Hkv``, and label head ``h`` takes its keys from key head ``h * Hkv // H``.
        bits: 2, 4 or 8 bits per channel, or 16 for k's own type.
        rows: where to, as :func:`new_labels` makes it; uint8 with ``W = row_width(C, bits)``, or of k's type
            with ``W = C`` at 16 bits.
        ranges: (smallest value, step) of each row, float16; None at 16 bits. A row that holds a NaN has
            NaN for its range.
        at: the first row to write.
        backend: ``triton``, ``cpu``, ``torch`` or ``reference``; by default the fastest that can.

    Raises:
        SparselandError: shapes or types don't fit, or the requested backend can't run the input.
    """
    if k.dim() != 4 or channels.dim() != 2 or channels.shape[0] % k.shape[1]:
        raise SparselandError(
            f"write_labels: k must be [B, Hkv, n, D] and channels [H, C], H a multiple of Hkv, got "
            f"{list(k.shape)} and {list(channels.shape)}"
        )
    _check_cache("write_labels", rows, ranges, channels, bits, k.shape[0], k.dtype)
    if at < 0 or at + k.shape[2] > rows.shape[2]:
        raise SparselandError(
            f"write_labels: rows {at} to {at + k.shape[2]} were asked for, the cache has {rows.shape[2]}"
        )
    chosen = choose("write_labels", _BACKENDS, backend, k, channels.shape[0])
    if not k.numel():
        return
    # Whole-tensor PyTorch needs no operator of its own: it would only make the call longer.
    write = _write_labels if chosen.name == "triton" else chosen.load().write_labels
    write(k.detach(), channels, bits, rows, ranges, at)


def label_scores(
    q: Float[Tensor, "B Hq 1 D"],
    channels: Int[Tensor, "H C"],
    bits: int,
    rows: Shaped[Tensor, "B H N W"],
    ranges: Float[Tensor, "B H N 2"] | None,
    *,
    first_key: Int[Tensor, " B"] | None = None,
    combine: str | None = None,
    backend: str | None = None,
) -> Float[Tensor, "B Hq N"] | Float[Tensor, "B H N"]:
    """One query's products with all labels, in float32.

    Args:
        q: queries, ``Hq`` a multiple of ``H``: label head ``h`` serves ``Hq / H`` of them.
        channels, bits, rows, ranges: as they were given to :func:`write_labels`; the rows may be a view.
        first_key: each row's first valid key (left padding); those before it score -inf. None means 0.
        combine: ``mean`` or ``max`` for one score per label head, over the query heads that it serves.
        backend: ``triton``, ``cpu``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[B, Hq, N]``, with ``combine`` ``[B, H, N]``, float32.

    Raises:
        SparselandError: shapes or types don't fit, or the requested backend can't run the input.
    """
    if q.dim() != 4 or q.shape[2] != 1 or channels.dim() != 2 or q.shape[1] % channels.shape[0]:
        raise SparselandError(
            f"label_scores: q must be [B, Hq, 1, D] and channels [H, C], Hq a multiple of H, got "
            f"{list(q.shape)} and {list(channels.shape)}"
        )
    _check_cache("label_scores", rows, ranges, channels, bits, q.shape[0], q.dtype)
    if combine not in (None, "mean", "max"):
        raise SparselandError(f"label_scores: combine={combine!r} is not allowed; it must be mean or max")
    chosen = choose("label_scores", _BACKENDS, backend, q, q.shape[1])
    score = _label_scores if chosen.name == "triton" else chosen.load().label_scores
    scores: Tensor = score(q.detach(), channels, bits, rows, ranges, first_key, combine)
    return scores


def _check_cache(
    op: str,
    rows: Tensor,
    ranges: Tensor | None,
    channels: Tensor,
    bits: int,
    batch: int,
    dtype: torch.dtype,
) -> None:
    if bits not in BITS:
        raise SparselandError(f"{op}: bits={bits} is not allowed; it must be 2, 4, 8 or 16")
    heads, width = channels.shape[0], row_width(channels.shape[1], bits)
    kept = dtype if bits == 16 else torch.uint8
    if rows.dim() != 4 or rows.dtype != kept or rows.shape[:2] != (batch, heads) or rows.shape[3] != width:
        raise SparselandError(
            f"{op}: rows must be {kept} [{batch}, {heads}, N, {width}], got {rows.dtype} {list(rows.shape)}"
        )
    if rows.numel() and rows.stride(3) != 1:
        raise SparselandError(f"{op}: the last dimension of rows must be contiguous, got {rows.stride()}")
    if bits == 16:
        return
    if ranges is None or ranges.dtype != torch.float16 or ranges.shape != (*rows.shape[:3], 2):
        found = "none" if ranges is None else f"{ranges.dtype} {list(ranges.shape)}"
        raise SparselandError(f"{op}: ranges must be float16 {[*rows.shape[:3], 2]}, got {found}")


@operator("sparseland::write_labels", mutates=("rows", "ranges"))
def _write_labels(
    k: Tensor, channels: Tensor, bits: int, rows: Tensor, ranges: Tensor | None, at: int
) -> None:
    _TRITON.load().write_labels(k, channels, bits, rows, ranges, at)


@_write_labels.register_fake
def _(k: Tensor, channels: Tensor, bits: int, rows: Tensor, ranges: Tensor | None, at: int) -> None:
    return None


@operator("sparseland::label_scores")
def _label_scores(
    q: Tensor,
    channels: Tensor,
    bits: int,
    rows: Tensor,
    ranges: Tensor | None,
    first_key: Tensor | None,
    combine: str | None,
) -> Tensor:
    scores: Tensor = _TRITON.load().label_scores(q, channels, bits, rows, ranges, first_key, combine)
    return scores


@_label_scores.register_fake
def _(
    q: Tensor,
    channels: Tensor,
    bits: int,
    rows: Tensor,
    ranges: Tensor | None,
    first_key: Tensor | None,
    combine: str | None,
) -> Tensor:
    heads = q.shape[1] if combine is None else channels.shape[0]
    return q.new_empty(q.shape[0], heads, rows.shape[2], dtype=torch.float32)
