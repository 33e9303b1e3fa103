"""SALE's selection: every causal logit estimated from 4-bit queries and keys, tile by tile.

With tiles of 64 queries and 32 keys, per query head::

    k' = k - mean(k),  q' = q - mean(q)            so that  q . k' = q' . k' + mean(q) . k'
    s_i = max|q'_i| / 7,  q4_i = round(q'_i / s_i)     and the same for keys: 4 bits, one scale per token
    estimate   e_ij = scale (s_i s_j q4_i . k4_j + c_j),   c_j = mean(q) . k'_j   in float32
    area(i)    tile 0 (the sink), and the last 4 to 7 tiles up to i's diagonal (the local keys)
    T_i        = log sum over j in area(i) of exp(scale q_i . k'_j)  +  log tau
    kept       the tiles with some e_ij > T_i: a relative attention score exp(e_ij) / sum above tau

Source: Ji et al. 2025, "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM
Prefilling", section 3. Backends: ``gluon`` (Hopper) and ``triton``, where 8-bit tensor cores hold the 4-bit
numbers and estimates are compared in float16, as in the authors' kernels; ``cpu`` and ``torch`` (one module
of whole-tensor PyTorch); ``reference``. Nothing here has a gradient.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import (
    Backend,
    check_attention_shapes,
    choose,
    interpreting,
    loaded,
    module_of,
    on_cpu,
    why_no_gluon,
    why_no_triton,
)
from sparseland.ops._operator import operator
from sparseland.ops.lowbit_scores.tiles import ROWS, kept_tiles, n_words
from sparseland.patterns import BlockPattern, Pattern, cdiv, in_pieces

__all__ = ["kept_tiles", "lowbit_tiles", "tile_blocks"]

_HERE = "sparseland.ops.lowbit_scores"


def _why_no_triton(q: Tensor) -> str | None:
    if q.shape[3] > 256:
        return f"head size {q.shape[3]} is above 256"
    if interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return why_no_triton(q)


def _why_no_gluon(q: Tensor) -> str | None:
    if not 32 < q.shape[3] <= 128:
        return f"head size {q.shape[3]} is not one of 33 to 128"
    return why_no_gluon(q) or why_no_triton(q)


BACKENDS = (
    Backend("cpu", f"{_HERE}.fast", on_cpu),
    Backend("gluon", f"{_HERE}.gluon", _why_no_gluon),
    Backend("triton", f"{_HERE}.triton", _why_no_triton),
    Backend("torch", f"{_HERE}.fast", lambda *_: None),
    Backend("reference", f"{_HERE}.reference", lambda *_: None),
)


def lowbit_tiles(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    tau: Float[Tensor, " Hq"],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Int[Tensor, "B Hq Mq W"]:
    """Which tiles between sink and local keys are kept, as bits.

    Tiles whose estimate or threshold is NaN or infinite are kept.

    Args:
        q: queries ``[B, Hq, Nq, D]``, the last Nq of the Nk tokens.
        k: keys ``[B, Hkv, Nk, D]``, Hq a multiple of Hkv.
        tau: smallest relative attention score that counts, per query head, ``[Hq]`` float32; 0 keeps all.
        scale: factor on the logits; ``1 / sqrt(D)`` by default.
        backend: ``cpu``, ``gluon``, ``triton``, ``torch`` or ``reference``; by default the fastest that can.

    Returns:
        ``[B, Hq, Mq, W]`` int32, ``Mq = ceil(Nq / 64)``: tile ``t`` of 32 keys is bit ``(t - 1) % 32`` of
        word ``(t - 1) // 32``. Bits of tiles that are not judged are 0; :func:`kept_tiles` and
        :func:`tile_blocks` know that sink and local tiles are computed whatever the bits say.

    Raises:
        SparselandError: shapes, dtypes or devices don't fit, ``tau`` is no ``[Hq]`` on the same device, the
            scale is not positive, or the requested backend can't run the input.
    """
    check_attention_shapes(q, k, k)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if not scale > 0:
        raise SparselandError(f"lowbit_tiles: scale must be > 0, got {scale}")
    if tau.shape != (q.shape[1],) or tau.dtype != torch.float32 or tau.device != q.device:
        raise SparselandError(
            f"lowbit_tiles: tau must be [{q.shape[1]}] float32 on {q.device}, "
            f"got {list(tau.shape)} {tau.dtype} on {tau.device}"
        )
    chosen = choose("lowbit_tiles", BACKENDS, backend, q)
    words: Tensor = _lowbit_tiles(q, k, tau, scale, chosen.name)
    return words


def tile_blocks(words: Int[Tensor, "B H Mq W"], n_queries: int, n_keys: int) -> Pattern:
    """The computed tiles as lists of 64 x 64 blocks: those that hold the sink, a kept or a local tile.

    On a GPU the lists' length is the number of key blocks, since nobody asks the device for the longest;
    where lists of all queries would fill the memory they are made from the bits a stretch at a time.

    Args:
        words: what :func:`lowbit_tiles` gave.
        n_queries: queries of the call.
        n_keys: keys of the call.
    """
    blocks = cdiv(n_keys, ROWS)

    def lists(start: int, stop: int) -> BlockPattern:
        queries, keys = stop - start, n_keys - n_queries + stop
        part = words[:, :, start // ROWS : cdiv(stop, ROWS)]
        if words.is_cuda:
            return BlockPattern(queries, keys, ROWS, *_tile_lists(part, queries, keys))
        tiles = kept_tiles(part, queries, keys)
        tiles = torch.nn.functional.pad(tiles, (0, tiles.shape[-1] % 2))
        return BlockPattern.from_block_mask(torch.unflatten(tiles, -1, (-1, 2)).any(-1), ROWS, queries, keys)

    return in_pieces(lists, n_queries, n_keys, ROWS, 4 * blocks * words.shape[0] * words.shape[1])


@operator("sparseland::lowbit_tiles")
def _lowbit_tiles(q: Tensor, k: Tensor, tau: Tensor, scale: float, backend: str) -> Tensor:
    module = module_of(BACKENDS, backend)
    words: Tensor = module.tile_bits(q, k, tau, scale)
    return words


@_lowbit_tiles.register_fake
def _(q: Tensor, k: Tensor, tau: Tensor, scale: float, backend: str) -> Tensor:
    shape = (*q.shape[:2], cdiv(q.shape[2], ROWS), n_words(q.shape[2], k.shape[2]))
    return q.new_empty(shape, dtype=torch.int32)


@operator("sparseland::lowbit_tile_lists")
def _tile_lists(words: Tensor, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor]:
    counts, indices = loaded(f"{_HERE}.triton").tile_lists(words, n_queries, n_keys)
    return counts, indices


@_tile_lists.register_fake
def _(words: Tensor, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor]:
    indices = words.new_empty((*words.shape[:3], cdiv(n_keys, ROWS)))
    return words.new_empty(words.shape[:3]), indices
