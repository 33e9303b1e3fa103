"""Interval attention on the CPU: each query block's living keys gathered for PyTorch's flash kernel.

All rows and key heads go through one call per query block, as a batch of small dense attentions whose
additive mask holds the bias. The query heads of a group read one copy of the keys through a stride of 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.interval_attention.lists import living_keys

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Few rows make thin matrix products, many rows gather keys that only some of them see.
ROWS = 64


def interval_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    ends: Int[Tensor, "B Hkv Nk"],
    bias: Float[Tensor, "B Hkv Nk"],
    most: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hq Nq"]]:
    """Output and log-sum-exp. Extra memory: one query block's gathered keys and its mask."""
    B, Hq, n_queries, D = q.shape
    Hkv = k.shape[1]
    grouped = (B * Hkv, Hq // Hkv)
    q_rows = q.reshape(*grouped, n_queries, D)
    k_rows, v_rows = k.reshape(-1, D), v.reshape(-1, D)
    first = (torch.arange(B * Hkv) * k.shape[2]).view(B, Hkv, 1)
    out = torch.zeros(*grouped, n_queries, D, dtype=q.dtype)
    lse = torch.full((*grouped, n_queries), -torch.inf)
    for block in living_keys(ends, n_queries, ROWS):
        length = block.keys.shape[2]
        if not length:
            continue
        if int(block.mask.sum(-1).max()) > most:
            raise SparselandError(f"interval_attention: a query sees more than most={most} keys")
        source = (block.keys + first).flatten()
        k_block, v_block = (
            x.index_select(0, source).view(-1, 1, length, D).expand(-1, grouped[1], -1, -1)
            for x in (k_rows, v_rows)
        )
        added = bias.gather(-1, block.keys)[:, :, None].masked_fill(~block.mask, -torch.inf)
        o, s = _flash(
            q_rows[:, :, block.rows], k_block, v_block, attn_mask=added.flatten(0, 1)[:, None], scale=scale
        )
        if bool(o.isnan().any()):
            # An infinite or undefined key spoils the rows that an additive mask hides it from.
            o, s = _masked(q_rows[:, :, block.rows], k_block, v_block, added.flatten(0, 1)[:, None], scale)
        # Rows that see nothing: the kernel's 0 as log-sum-exp is not theirs.
        seen = block.mask.any(-1).flatten(0, 1)[:, None]
        out[:, :, block.rows] = torch.where(seen[..., None], o, 0)
        lse[:, :, block.rows] = torch.where(seen, s, -torch.inf)
    return out.view(q.shape), lse.view(q.shape[:3])


def _masked(q: Tensor, k: Tensor, v: Tensor, added: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same with a mask that replaces instead of adding: what a row does not see can't reach it."""
    hidden = added == -torch.inf
    logits = (q.float() @ k.float().mT * scale + added.masked_fill(hidden, 0.0)).masked_fill(
        hidden, -torch.inf
    )
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    # 0 times an undefined value is undefined: such values count only for rows that give them weight.
    broken = ~v.isfinite().all(-1)[..., None, :]
    spoiled = ((weights > 0) & broken).any(-1, keepdim=True)
    out = weights @ v.float().nan_to_num(0.0, 0.0, 0.0) / total.masked_fill(total == 0, 1.0)
    return out.masked_fill(spoiled, torch.nan).to(q.dtype), (peak + total.log())[..., 0]
