"""Window attention on the CPU: the flash kernel of PyTorch on contiguous slices of the keys.

Queries are cut into blocks of a few dozen rows. A block sees the sinks and one contiguous band of keys,
so nothing is gathered: the sinks are written in front of the band, into a private copy of K and V, over
keys that no later query sees. One short additive mask, the same for all inner blocks, cuts the corners.
Grouped queries read one K/V head through a stride of 0. Dense attention needs no mask at all: the keys
before the first query are visible to all, the rest is causal, and the two are merged by log-sum-exp.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.ops.window_attention.reference import masked_attention

# Queries that see a key which is not finite, computed at a time.
_SPOILED_ROWS = 64

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def window_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    sinks: int,
    window: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp; time is close to density x dense causal attention (see :func:`block_rows`)."""
    dense = sinks + window >= k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    for row in range(q.shape[0]):
        q_row, k_row, v_row = (x if x.stride(-1) == 1 else x.contiguous() for x in (q[row], k[row], v[row]))
        # The kernel takes as many K/V heads as query heads: (Hkv, G, N, D) with a stride of 0 over G.
        shape = (k.shape[1], q.shape[1] // k.shape[1])
        q_row = torch.unflatten(q_row, 0, shape)
        out_row, lse_row = torch.unflatten(out[row], 0, shape), torch.unflatten(lse[row], 0, shape)
        if dense:
            _dense(q_row, k_row, v_row, scale, out_row, lse_row)
        elif k_row.sum().isfinite():
            _banded(q_row, k_row, v_row, sinks, window, scale, out_row, lse_row)
        else:
            _banded_around_bad_keys(q_row, k_row, v_row, sinks, window, scale, out_row, lse_row)
    return out, lse


def block_rows(window: int) -> int:
    """Queries per block: R rows compute R keys more than ``window``, few rows make thin matrix products."""
    return 64 if window <= 2048 else 128


def _over_groups(x: Float[Tensor, "Hkv N D"], groups: int) -> Float[Tensor, "Hkv G N D"]:
    return x[:, None].expand(-1, groups, -1, -1)


def _dense(
    q: Float[Tensor, "Hkv G Nq D"],
    k: Float[Tensor, "Hkv Nk D"],
    v: Float[Tensor, "Hkv Nk D"],
    scale: float,
    out: Float[Tensor, "Hkv G Nq D"],
    lse: Float[Tensor, "Hkv G Nq"],
) -> None:
    k, v = _over_groups(k, q.shape[1]), _over_groups(v, q.shape[1])
    offset = k.shape[2] - q.shape[2]
    near, near_lse = _flash(q, k[:, :, offset:], v[:, :, offset:], is_causal=True, scale=scale)
    if offset == 0:
        out.copy_(near)
        lse.copy_(near_lse)
        return
    past, past_lse = _flash(q, k[:, :, :offset], v[:, :, :offset], scale=scale)
    torch.logaddexp(past_lse, near_lse, out=lse)
    # past + w * (near - past), w the share of the causal part in the softmax.
    share = (near_lse - lse).exp_()[..., None].to(q.dtype)
    torch.lerp(past, near, share.expand_as(near), out=out)


def _banded(
    q: Float[Tensor, "Hkv G Nq D"],
    k: Float[Tensor, "Hkv Nk D"],
    v: Float[Tensor, "Hkv Nk D"],
    sinks: int,
    window: int,
    scale: float,
    out: Float[Tensor, "Hkv G Nq D"],
    lse: Float[Tensor, "Hkv G Nq"],
) -> None:
    groups, n_queries, n_keys = q.shape[1], q.shape[2], k.shape[1]
    offset = n_keys - n_queries
    k_sinks, v_sinks = k[:, :sinks], v[:, :sinks]
    if sinks:
        k, v = k.clone(), v.clone()
    rows = block_rows(window)
    inner_mask = None
    for start in range(0, n_queries, rows):
        end = min(start + rows, n_queries)
        # Besides the sinks, the rows of this block see keys of the band [low, high).
        low, high = max(offset + start - window + 1, 0), offset + end
        inner = low > sinks
        first = 0
        if inner:
            first = low - sinks
            k[:, first:low], v[:, first:low] = k_sinks, v_sinks
        if inner and inner_mask is not None and end - start == rows:
            mask = inner_mask
        else:
            band = torch.arange(first, high)
            if inner:
                band[:sinks] = torch.arange(sinks)
            mask = _mask(torch.arange(offset + start, high), band, sinks, window, q.dtype)
            inner_mask = mask if inner else None
        k_band, v_band = _over_groups(k[:, first:high], groups), _over_groups(v[:, first:high], groups)
        out[:, :, start:end], lse[:, :, start:end] = _flash(
            q[:, :, start:end], k_band, v_band, attn_mask=mask, scale=scale
        )
    if sinks + window == 0:
        lse.fill_(-torch.inf)  # the kernel says 0 for rows that see nothing


def _banded_around_bad_keys(
    q: Float[Tensor, "Hkv G Nq D"],
    k: Float[Tensor, "Hkv Nk D"],
    v: Float[Tensor, "Hkv Nk D"],
    sinks: int,
    window: int,
    scale: float,
    out: Float[Tensor, "Hkv G Nq D"],
    lse: Float[Tensor, "Hkv G Nq"],
) -> None:
    """Keys that are not finite count for those queries alone that see them.

    The additive mask of the kernel would let them through (NaN - inf), and 0 * inf is NaN: for all others
    they are 0, and what sees one is computed by itself.
    """
    offset = k.shape[1] - q.shape[2]
    position = torch.arange(offset, k.shape[1])
    for h in range(k.shape[0]):
        at = slice(h, h + 1)
        bad = ~k[h].isfinite().all(-1)
        _banded(
            q[at], k[at].masked_fill(bad[None, :, None], 0), v[at], sinks, window, scale, out[at], lse[at]
        )
        spoiled = torch.zeros(q.shape[2], dtype=torch.bool)
        for j in bad.nonzero().flatten().tolist():
            spoiled |= (position >= j) & ((position - j < window) | (j < sinks))
        for rows in torch.split(spoiled.nonzero().flatten(), _SPOILED_ROWS):
            hidden = _mask(position[rows], torch.arange(k.shape[1]), sinks, window, torch.float32)
            out[at, :, rows], lse[at, :, rows] = masked_attention(
                q[at, :, rows], k[None, at], v[None, at], hidden[None, None] == 0, scale
            )


def _mask(
    i: Int[Tensor, " R"], j: Int[Tensor, " K"], sinks: int, window: int, dtype: torch.dtype
) -> Float[Tensor, "R K"]:
    """0 where the query at position i sees the key at position j, else -inf."""
    distance = i[:, None] - j
    hidden = (distance < 0) | ((distance >= window) & (j >= sinks))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
