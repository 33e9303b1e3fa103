"""Cheap estimates of where attention mass lies, shared by the selection methods: all heads at once.

- pooled: mean queries against mean keys, block by block (FlexPrefill, block-sparse heads of MInference);
- probe: exact probabilities of the last queries, and their sums along columns and diagonals
  (vertical-slash heads of MInference and FlexPrefill).

Everything is float32. Nothing here has a gradient that a method needs; nothing synchronises with the host.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import (
    Backend,
    check_attention_shapes,
    choose,
    interpreting,
    on_cpu,
    why_no_triton,
)
from sparseland.ops.block_scores import fast, reference

_HERE = "sparseland.ops.block_scores"


def _why_no_triton(q: Tensor, n_probe: int) -> str | None:
    if min(n_probe, q.shape[2]) > 128:
        return f"{n_probe} probe rows are above 128"
    if q.dtype == torch.float32 and min(n_probe, q.shape[2]) > 64 and q.shape[3] > 128:
        return f"{n_probe} probe rows of {q.shape[3]} float32 numbers don't fit into shared memory"
    if q.shape[3] > 256:
        return f"head size {q.shape[3]} is above 256"
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return why_no_triton(q)


# `cpu` and `torch` are one module: so a process-wide choice of the CPU backend holds here too.
BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", lambda q, _: on_cpu(q)),
    Backend("triton", f"{_HERE}.triton", _why_no_triton),
    Backend("torch", f"{_HERE}.fast", lambda *_: None),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)


def mean_pool(x: Float[Tensor, "B H N D"], block_size: int) -> Float[Tensor, "B H M D"]:
    """Mean token of each block, ``M = ceil(N / block_size)``; a last partial block counts what it holds.

    Args:
        x: queries or keys ``[B, H, N, D]``, any float dtype.
        block_size: tokens per block, 1 or more.

    Returns:
        ``[B, H, M, D]`` float32.

    Raises:
        SparselandError: ``x`` is no ``[B, H, N, D]`` or the block size is below 1.
    """
    if x.dim() != 4:
        raise SparselandError(f"mean_pool: x must be [B, H, N, D], got {list(x.shape)}")
    _check_positive("mean_pool", "block_size", block_size)
    return fast.mean_pool(x, block_size)


def pooled_scores(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    block_size: int,
    scale: float | None = None,
) -> Float[Tensor, "B Hq Mq Mk"]:
    """Logits between mean queries and mean keys of blocks; ``-inf`` for blocks wholly in the future.

    Blocks are those of :class:`~sparseland.patterns.BlockPattern`: query blocks start at this call's first
    query, key blocks at key 0.

    Source: Jiang et al. 2024, "MInference 1.0", algorithm 3; Lai et al. 2025, "FlexPrefill", algorithm 3.

    Args:
        q: queries ``[B, Hq, Nq, D]``, the last Nq of the Nk tokens.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv.
        block_size: tokens per block, 1 or more.
        scale: factor on the logits; ``1 / sqrt(D)`` by default.

    Returns:
        ``[B, Hq, Mq, Mk]`` float32.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, or the block size is below 1.
    """
    check_attention_shapes(q, k, k)
    _check_positive("pooled_scores", "block_size", block_size)
    return fast.pooled_scores(q, k, block_size, _scale(q, scale))


def probe_probabilities(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    n_probe: int,
    scale: float | None = None,
) -> Float[Tensor, "B Hq L Nk"]:
    """Exact causal attention probabilities of the last ``L = min(n_probe, Nq)`` queries over all keys.

    Holds ``L x Nk`` float32 per query head; :func:`probe_vertical_slash` does not on a GPU.

    Source: Jiang et al. 2024, "MInference 1.0", algorithm 2, line 1.

    Args:
        q: queries ``[B, Hq, Nq, D]``, the last Nq of the Nk tokens.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv.
        n_probe: probe rows, 1 or more; no more than Nq are used.
        scale: factor on the logits; ``1 / sqrt(D)`` by default.

    Returns:
        ``[B, Hq, L, Nk]`` float32; row i belongs to position ``Nk - L + i``.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, or ``n_probe`` is below 1.
    """
    check_attention_shapes(q, k, k)
    _check_positive("probe_probabilities", "n_probe", n_probe)
    return fast.probe_probabilities(q, k, n_probe, _scale(q, scale))


def vertical_slash_scores(
    probabilities: Float[Tensor, "B H L Nk"],
) -> tuple[Float[Tensor, "B H Nk"], Float[Tensor, "B H Nk"]]:
    """Sums of probe probabilities along columns and along diagonals.

    ``vertical[j] = sum_i P[i, j]`` and, for a distance o >= 0, ``slash[o] = sum_i P[i, (Nk - L + i) - o]``;
    places left of column 0 count 0. Both sum to the mass of all rows.

    Source: Jiang et al. 2024, "MInference 1.0", algorithm 2.

    Args:
        probabilities: ``[B, H, L, Nk]`` float32 of the last L queries, 0 for future keys.

    Returns:
        ``(vertical, slash)``, both ``[B, H, Nk]`` float32.

    Raises:
        SparselandError: not 4 dimensions, or more rows than keys.
    """
    if probabilities.dim() != 4 or probabilities.shape[2] > probabilities.shape[3]:
        raise SparselandError(
            f"vertical_slash_scores: probabilities must be [B, H, L, Nk] with L <= Nk, "
            f"got {list(probabilities.shape)}"
        )
    return fast.vertical_slash_scores(probabilities)


def probe_vertical_slash(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    n_probe: int,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "B Hq Nk"], Float[Tensor, "B Hq Nk"]]:
    """:func:`vertical_slash_scores` of :func:`probe_probabilities`, without the matrix in between on a GPU.

    Each backend gives the same bits in every run (no atomics).

    Args:
        q: queries ``[B, Hq, Nq, D]``, the last Nq of the Nk tokens.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv.
        n_probe: probe rows, 1 or more (``triton``: up to 128); no more than Nq are used.
        scale: factor on the logits; ``1 / sqrt(D)`` by default.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``(vertical, slash)``, both ``[B, Hq, Nk]`` float32.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, ``n_probe`` is below 1, or the requested
            backend can't run the input.
    """
    check_attention_shapes(q, k, k)
    _check_positive("probe_vertical_slash", "n_probe", n_probe)
    scale = _scale(q, scale)
    chosen = choose("probe_vertical_slash", BACKENDS, backend, q, n_probe)
    if chosen.name == "triton":
        vertical, slash = _probe_vertical_slash(q, k, n_probe, scale)
        return vertical, slash
    if chosen.name == "reference":
        return reference.probe_vertical_slash(q, k, n_probe, scale)
    return fast.probe_vertical_slash(q, k, n_probe, scale)


@torch.library.custom_op("sparseland::probe_vertical_slash", mutates_args=())
def _probe_vertical_slash(q: Tensor, k: Tensor, n_probe: int, scale: float) -> tuple[Tensor, Tensor]:
    from sparseland.ops.block_scores.triton import probe_vertical_slash

    return probe_vertical_slash(q, k, n_probe, scale)


@_probe_vertical_slash.register_fake
def _(q: Tensor, k: Tensor, n_probe: int, scale: float) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[1], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[3]) if scale is None else scale


def _check_positive(function: str, name: str, value: int) -> None:
    if value < 1:
        raise SparselandError(f"{function}: {name}={value}; it must be 1 or more")
