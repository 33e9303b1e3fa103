"""Around a learned block gate: pooling what came before RoPE, and turning scores of blocks into lists.

Both are one pass over memory on a GPU: :func:`unrotated_pool` turns tokens back and pools them in
registers, :func:`select_blocks` reads each row of scores once and writes its list. Nothing synchronises with
the host.

Source: Gao et al. 2024, "SeerAttention": pooling, threshold and top-k.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import Backend, choose, on_cpu, why_no_triton, why_not_float
from sparseland.ops._operator import operator
from sparseland.patterns import BlockPattern, cdiv

__all__ = ["select_blocks", "unrotated_pool"]

# Scores held at once while selecting on a GPU: 256 MiB of float32.
_CHUNK = 2**26
_MAX_ROW = 2**16


def _why_no_pool(x: Tensor, block_size: int) -> str | None:
    if block_size not in (16, 32, 64, 128):
        return f"it needs block size 16, 32, 64 or 128, got {block_size}"
    if reason := why_not_float(x):
        return reason
    if x.shape[3] > 512:
        return f"it needs a head dimension of at most 512, got {x.shape[3]}"
    return why_no_triton(x)


def _why_no_select(scores: Tensor, columns: int) -> str | None:
    if columns > _MAX_ROW:
        return f"{columns} key blocks in a row are above {_MAX_ROW}"
    return why_no_triton(scores)


# The reference is whole-tensor PyTorch, which nothing on a CPU beats by much: it is the `cpu` backend too, so
# that a process-wide choice of that holds here.
_PLAIN = (
    Backend("cpu", f"{__name__}.reference", lambda x, _: on_cpu(x)),
    Backend("torch", f"{__name__}.reference", lambda *_: None),
    Backend("reference", f"{__name__}.reference", lambda *_: None),
)
_POOL = (Backend("triton", f"{__name__}.triton", _why_no_pool), *_PLAIN)
_SELECT = (Backend("triton", f"{__name__}.triton", _why_no_select), *_PLAIN)


def unrotated_pool(
    x: Float[Tensor, "B H N D"],
    block_size: int,
    tables: tuple[Tensor, Tensor] | None,
    *,
    extremes: bool,
    backend: str | None = None,
) -> Float[Tensor, "B H M C"]:
    """Tokens as they were before RoPE, pooled over blocks; a last block counts what it holds.

    Args:
        x: queries or keys after RoPE.
        block_size: tokens per block, 1 or more (``triton``: 16, 32, 64 or 128).
        tables: cosine and sine ``[N, R / 2]`` of these tokens' positions; None: they were not turned.
        extremes: largest, smallest and mean value of each channel, in this order, ``C = 3 D``; else the
            mean alone, ``C = D``.
        backend: ``triton``, ``cpu``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[B, H, ceil(N / block_size), C]`` float32.

    Raises:
        SparselandError: shapes don't fit, the block size is below 1, or the requested backend can't run.
    """
    if x.dim() != 4:
        raise SparselandError(f"unrotated_pool: x must be [B, H, N, D], got {list(x.shape)}")
    if block_size < 1:
        raise SparselandError(f"unrotated_pool: block_size={block_size}; it must be 1 or more")
    cos, sin = tables if tables is not None else (x.new_empty(x.shape[2], 0), x.new_empty(x.shape[2], 0))
    if cos.shape != sin.shape or cos.dim() != 2 or len(cos) != x.shape[2] or 2 * cos.shape[1] > x.shape[3]:
        raise SparselandError(
            f"unrotated_pool: tables must be [{x.shape[2]}, R / 2] with R <= {x.shape[3]}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    result: Tensor = _pool(x, cos, sin, block_size, extremes, backend or "")
    return result


@operator("sparseland::unrotated_pool")
def _pool(x: Tensor, cos: Tensor, sin: Tensor, block_size: int, extremes: bool, backend: str) -> Tensor:
    chosen = choose("unrotated_pool", _POOL, backend, x, block_size)
    if x.numel() == 0:
        return x.new_empty(_pooled_shape(x, block_size, extremes), dtype=torch.float32)
    result: Tensor = chosen.load().pool(x, cos, sin, block_size, extremes)
    return result


@_pool.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, block_size: int, extremes: bool, backend: str) -> Tensor:
    return x.new_empty(_pooled_shape(x, block_size, extremes), dtype=torch.float32)


def _pooled_shape(x: Tensor, block_size: int, extremes: bool) -> tuple[int, int, int, int]:
    B, H, N, D = x.shape
    return B, H, cdiv(N, block_size), 3 * D if extremes else D


def select_blocks(
    queries: Float[Tensor, "B H Mq C"],
    keys: Float[Tensor, "B H Mk C"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    *,
    scale: float,
    threshold: float | None = None,
    top: int | None = None,
    dense_rows: int = 0,
    backend: str | None = None,
) -> BlockPattern:
    """Lists of the key blocks whose score, one vector of queries times one of keys, is large in its row.

    A row's candidates are the blocks that hold a key its last query sees. Kept are those whose softmax over
    the row exceeds ``threshold``, or the ``top`` largest (ties to the earlier). The blocks of a row's own
    positions are always kept; with ``top`` they count. A block whose score is not finite is kept and left out
    of the softmax: what a gate can't judge is read.

    Args:
        queries, keys: a vector per block, float32; query blocks start at the first of the last
            ``n_queries`` of ``n_keys`` tokens, key blocks at key 0.
        scale: factor on the scores.
        threshold: part of a row's softmax, above 0; exactly one of ``threshold`` and ``top`` is given.
        top: blocks per row, 1 or more.
        dense_rows: the last so many query blocks keep everything.
        backend: ``triton``, ``cpu``, ``torch`` or ``reference``; by default the fastest that can.

    Raises:
        SparselandError: shapes don't fit, not exactly one rule, or the requested backend can't run.
    """
    if (threshold is None) == (top is None):
        raise SparselandError(f"select_blocks: give threshold or top, got {threshold} and {top}")
    if (top is not None and top < 1) or (threshold is not None and not 0 < threshold < 1):
        raise SparselandError(f"select_blocks: threshold={threshold}, top={top}; 0 < threshold < 1, top >= 1")
    wanted = (cdiv(n_queries, block_size), cdiv(n_keys, block_size))
    if queries.dim() != 4 or queries.shape[:2] != keys.shape[:2] or queries.shape[3] != keys.shape[3] or (
        (queries.shape[2], keys.shape[2]) != wanted
    ):  # fmt: skip
        raise SparselandError(
            f"select_blocks: vectors must be [B, H, {wanted[0]}, C] and [B, H, {wanted[1]}, C], "
            f"got {list(queries.shape)} and {list(keys.shape)}"
        )
    rule = (threshold or 0.0, top or 0, dense_rows)
    counts, indices = _select(queries, keys, n_queries, n_keys, block_size, scale, *rule, backend or "")
    return BlockPattern(n_queries, n_keys, block_size, counts, indices)


@operator("sparseland::select_blocks")
def _select(
    queries: Tensor,
    keys: Tensor,
    n_queries: int,
    n_keys: int,
    block_size: int,
    scale: float,
    threshold: float,
    top: int,
    dense_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, H, rows, _ = queries.shape
    columns, width = keys.shape[2], list_width(keys.shape[2], threshold, top, dense_rows)
    counts = torch.empty(B, H, rows, dtype=torch.int32, device=queries.device)
    # Never written whole: what lies behind a list's end is no one's.
    indices = torch.empty(B, H, rows, width, dtype=torch.int32, device=queries.device)
    if counts.numel() == 0:
        return counts, indices
    module = choose("select_blocks", _SELECT, backend, queries, columns).load()
    queries, keys = queries.float(), keys.float().mT * scale
    step = max(1, _CHUNK // max(1, B * H * columns))
    for start in range(0, rows, step):
        end = min(start + step, rows)
        seen = cdiv(min(end * block_size, n_queries) + n_keys - n_queries, block_size)
        # Autocast would hand over half precision.
        scores = (queries[:, :, start:end] @ keys[..., :seen]).float()
        module.write_lists(
            scores, counts[:, :, start:end], indices[:, :, start:end], start, rows, n_queries, n_keys,
            block_size, threshold, top, dense_rows,
        )  # fmt: skip
    return counts, indices


@_select.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    n_queries: int,
    n_keys: int,
    block_size: int,
    scale: float,
    threshold: float,
    top: int,
    dense_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = queries.shape[:3]
    width = list_width(keys.shape[2], threshold, top, dense_rows)
    return (
        queries.new_empty(shape, dtype=torch.int32),
        queries.new_empty((*shape, width), dtype=torch.int32),
    )


def list_width(columns: int, threshold: float, top: int, dense_rows: int) -> int:
    """The longest list there can be, known without looking at the scores.

    Fewer than ``1 / threshold`` parts of a whole exceed ``threshold``; two blocks more hold a row's own
    positions.
    """
    if dense_rows:
        return columns
    return min(columns, max(2, top) if top else math.ceil(1 / threshold) + 2)
