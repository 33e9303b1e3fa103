"""Cheap estimates of where attention mass lies, shared by the selection methods: all heads at once.

- pooled: mean queries against mean keys, block by block (FlexPrefill, block-sparse heads of MInference);
- probe: exact probabilities of the last queries, and their sums along columns and diagonals
  (vertical-slash heads of MInference and FlexPrefill).

Everything is float32. Nothing here has a gradient that a method needs; nothing synchronises with the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
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
from sparseland.ops._operator import operator
from sparseland.ops.block_scores import fast, reference

_HERE = "sparseland.ops.block_scores"


def _why_no_probe(q: Tensor, n_probe: int) -> str | None:
    if min(n_probe, q.shape[2]) > 128:
        return f"{n_probe} probe rows are above 128"
    if q.dtype == torch.float32 and min(n_probe, q.shape[2]) > 64 and q.shape[3] > 128:
        return f"{n_probe} probe rows of {q.shape[3]} float32 numbers don't fit into shared memory"
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return _why_no_triton(q)


def _why_no_pool(x: Tensor, block_size: int) -> str | None:
    if block_size > 256:
        return f"block size {block_size} is above 256"
    return _why_no_triton(x)


def _why_no_triton(x: Tensor, _: int = 0) -> str | None:
    if x.shape[3] > 256:
        return f"head size {x.shape[3]} is above 256"
    return why_no_triton(x)


def _backends(why_no_triton: Callable[[Tensor, int], str | None]) -> tuple[Backend, ...]:
    # `cpu` and `torch` are one module: so a process-wide choice of the CPU backend holds here too.
    return (
        Backend("cpu", f"{_HERE}.fast", lambda x, _: on_cpu(x)),
        Backend("triton", f"{_HERE}.triton", why_no_triton),
        Backend("torch", f"{_HERE}.fast", lambda *_: None),
        Backend("reference", f"{_HERE}.reference", lambda *_: None),
    )


_TRITON = Backend("triton", f"{_HERE}.triton", _why_no_triton)
_PROBE, _POOL, _MAP = _backends(_why_no_probe), _backends(_why_no_pool), _backends(_why_no_triton)


def mean_pool(
    x: Float[Tensor, "B H N D"],
    block_size: int,
    *,
    active: Bool[Tensor, "B H"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "B H M D"]:
    """Mean token of each block, ``M = ceil(N / block_size)``; a last partial block counts what it holds.

    Args:
        x: queries or keys ``[B, H, N, D]``, any float dtype.
        block_size: tokens per block, 1 or more (``triton``: up to 256).
        active: heads that are wanted (default: all); what the others get is undefined.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[B, H, M, D]`` float32.

    Raises:
        SparselandError: ``x`` is no ``[B, H, N, D]``, the block size is below 1, or the requested backend
            can't run the input.
    """
    if x.dim() != 4:
        raise SparselandError(f"mean_pool: x must be [B, H, N, D], got {list(x.shape)}")
    _check_positive("mean_pool", "block_size", block_size)
    chosen = choose("mean_pool", _POOL, backend, x, block_size)
    if chosen.name == "triton":
        result: Tensor = _mean_pool(x, block_size, active)
        return result
    if chosen.name == "reference":
        return reference.mean_pool(x, block_size)
    return fast.mean_pool(x, block_size)


def pooled_map(
    q: Float[Tensor, "B Hq Mq D"],
    k: Float[Tensor, "B Hkv Mk D"],
    n_queries: int,
    n_keys: int,
    block_size: int,
    scale: float,
    *,
    normalise: bool = False,
    active: Bool[Tensor, "B Hq"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "B Hq Mq Mk"]:
    """Logits between mean queries and mean keys that are there already, or the softmax of their rows.

    A block wholly in the future gives ``-inf`` (normalised: 0). Source as of :func:`pooled_scores`.

    Args:
        q: mean queries, float32; queries are the last of the keys.
        k: mean keys, float32.
        n_queries: tokens that the mean queries stand for.
        n_keys: tokens that the mean keys stand for.
        block_size: tokens per block.
        scale: factor on the logits.
        normalise: whether rows sum to 1.
        active: heads that are wanted (default: all); what the others get is undefined.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Raises:
        SparselandError: the requested backend can't run the input.
    """
    chosen = choose("pooled_map", _MAP, backend, q, block_size)
    options = (n_queries, n_keys, block_size, scale, normalise, active)
    if chosen.name == "triton":
        result: Tensor = _pooled_map(q, k, *options)
        return result
    if chosen.name == "reference":
        return reference.pooled_map(q, k, *options)
    return fast.pooled_map(q, k, *options)


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
    means = mean_pool(q, block_size), mean_pool(k, block_size)
    return pooled_map(*means, q.shape[2], k.shape[2], block_size, _scale(q, scale))


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
    tokens, _ = probe_sums(q, k, n_probe, 64, scale, backend=backend)
    return tokens[0], tokens[1]


def probe_sums(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    n_probe: int,
    block_size: int,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "2 B Hq Nk"], Float[Tensor, "2 B Hq Mk"]]:
    """:func:`probe_vertical_slash`'s two rows of sums, and their sums over blocks of columns and distances.

    Block ``m`` holds the columns, or the distances, ``m * block_size`` to ``(m + 1) * block_size - 1``.
    Arguments and errors as there.

    Returns:
        ``(tokens, blocks)``, float32; entry 0 is vertical, entry 1 slash.
    """
    check_attention_shapes(q, k, k)
    _check_positive("probe_sums", "n_probe", n_probe)
    _check_positive("probe_sums", "block_size", block_size)
    scale = _scale(q, scale)
    chosen = choose("probe_sums", _PROBE, backend, q, n_probe)
    if chosen.name == "triton":
        tokens, blocks = _probe_sums(q, k, n_probe, block_size, scale)
        return tokens, blocks
    if chosen.name == "reference":
        return reference.probe_sums(q, k, n_probe, block_size, scale)
    return fast.probe_sums(q, k, n_probe, block_size, scale)


def probe_distance(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Mk D"],
    true: Float[Tensor, "B Hq Mk"],
    n_probe: int,
    scale: float,
    *,
    backend: str | None = None,
) -> Float[Tensor, "B Hq"]:
    """How far the probe's attention per block is from what block means tell of it.

    The square root of the Jensen-Shannon divergence (nats) between ``softmax(mean(probe) . k * scale)`` and
    ``true / n_probe``. Zero probabilities count 0; NaN or infinity in the inputs gives NaN.

    Source: Lai et al. 2025, "FlexPrefill", algorithm 1.

    Args:
        q: queries; the last ``n_probe`` are the probe.
        k: mean keys of blocks, float32.
        true: the probe's attention per block, summed over its rows (:func:`probe_sums`).
        n_probe: probe rows, 1 or more; no more than Nq are used.
        scale: factor on the logits.
        backend: ``cpu``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Raises:
        SparselandError: ``n_probe`` is below 1, or the requested backend can't run the input.
    """
    _check_positive("probe_distance", "n_probe", n_probe)
    chosen = choose("probe_distance", _PROBE, backend, q, n_probe)
    if chosen.name == "triton":
        result: Tensor = _probe_distance(q, k, true, n_probe, scale)
        return result
    if chosen.name == "reference":
        return reference.probe_distance(q, k, true, n_probe, scale)
    return fast.probe_distance(q, k, true, n_probe, scale)


@operator("sparseland::mean_pool")
def _mean_pool(x: Tensor, block_size: int, active: Tensor | None) -> Tensor:
    result: Tensor = _TRITON.load().mean_pool(x, block_size, active)
    return result


@_mean_pool.register_fake
def _(x: Tensor, block_size: int, active: Tensor | None) -> Tensor:
    shape = (*x.shape[:2], -(-x.shape[2] // block_size), x.shape[3])
    return x.new_empty(shape, dtype=torch.float32)


@operator("sparseland::pooled_map")
def _pooled_map(
    q: Tensor,
    k: Tensor,
    n_queries: int,
    n_keys: int,
    block_size: int,
    scale: float,
    normalise: bool,
    active: Tensor | None,
) -> Tensor:
    result: Tensor = _TRITON.load().pooled_map(q, k, n_queries, n_keys, block_size, scale, normalise, active)
    return result


@_pooled_map.register_fake
def _(
    q: Tensor,
    k: Tensor,
    n_queries: int,
    n_keys: int,
    block_size: int,
    scale: float,
    normalise: bool,
    active: Tensor | None,
) -> Tensor:
    return q.new_empty((*q.shape[:3], k.shape[2]), dtype=torch.float32)


@operator("sparseland::probe_sums")
def _probe_sums(q: Tensor, k: Tensor, n_probe: int, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    tokens, blocks = _TRITON.load().probe_sums(q, k, n_probe, block_size, scale)
    return tokens, blocks


@_probe_sums.register_fake
def _(q: Tensor, k: Tensor, n_probe: int, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    shape = (2, q.shape[0], q.shape[1])
    tokens = q.new_empty((*shape, k.shape[2]), dtype=torch.float32)
    return tokens, q.new_empty((*shape, -(-k.shape[2] // block_size)), dtype=torch.float32)


@operator("sparseland::probe_distance")
def _probe_distance(q: Tensor, k: Tensor, true: Tensor, n_probe: int, scale: float) -> Tensor:
    result: Tensor = _TRITON.load().probe_distance(q, k, true, n_probe, scale)
    return result


@_probe_distance.register_fake
def _(q: Tensor, k: Tensor, true: Tensor, n_probe: int, scale: float) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float32)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[3]) if scale is None else scale


def _check_positive(function: str, name: str, value: int) -> None:
    if value < 1:
        raise SparselandError(f"{function}: {name}={value}; it must be 1 or more")
