"""Gradients of window attention in plain PyTorch, on any device: probabilities again from the log-sum-exp.

Works on blocks of queries against their sinks and band (FlashAttention's backward, Dao et al. 2022,
algorithm 4, with the blocks of the window), so memory grows with the window, not with Nq x Nk.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS = 256
# Batches are cut so that a tensor of scores has at most so many numbers (1 GiB in float32, two are held),
# where a row of the batch has no more by itself.
_SCORES = 1 << 28


def window_attention_backward(
    d_out: Float[Tensor, "B Hq Nq D"],
    d_lse: Float[Tensor, "B Hq Nq"],
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk D"],
    out: Float[Tensor, "B Hq Nq D"],
    lse: Float[Tensor, "B Hq Nq"],
    sinks: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(d_q, d_k, d_v)`` in the inputs' dtype; accumulated in float32.

    ``d_lse`` is the gradient that reaches the log-sum-exp (zeros if it was not used).
    """
    n_queries, n_keys, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    seen = min(n_keys, sinks + window + _ROWS)
    each = max(1, _SCORES // max(1, q.shape[1] * min(n_queries, _ROWS) * seen))
    if each < q.shape[0]:
        pieces = zip(*(torch.split(x, each) for x in (d_out, d_lse, q, k, v, out, lse)), strict=True)
        parts = [window_attention_backward(*x, sinks, window, scale) for x in pieces]  # type: ignore[call-arg]
        d_q, d_k, d_v = (torch.cat(part) for part in zip(*parts, strict=True))
        return d_q, d_k, d_v
    offset = n_keys - n_queries
    grouped = (kv_heads, q.shape[1] // kv_heads)
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    d_v = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    # Rows that see nothing have lse = -inf; any finite value gives them probabilities of 0.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    for start in range(0, n_queries, _ROWS):
        end = min(start + _ROWS, n_queries)
        low, high = max(offset + start - window + 1, 0), offset + end
        # The sinks that lie before the band, then the band.
        j = torch.arange(min(sinks, low), device=q.device)
        j = torch.cat((j, torch.arange(low, high, device=q.device)))
        i = torch.arange(offset + start, offset + end, device=q.device)[:, None]
        hidden = (j > i) | ((i - j >= window) & (j >= sinks))

        q_rows, do_rows, o_rows = (
            torch.unflatten(x[:, :, start:end].float(), 1, grouped) for x in (q, d_out, out)
        )  # (B, Hkv, G, R, D)
        k_rows, v_rows = k[:, :, j].float(), v[:, :, j].float()
        lse_rows, d_lse_rows = (
            torch.unflatten(x[:, :, start:end, None].float(), 1, grouped) for x in (lse, d_lse)
        )

        p = torch.einsum("bhgqd,bhkd->bhgqk", q_rows, k_rows).mul_(scale).sub_(lse_rows)
        p = p.masked_fill_(hidden, -torch.inf).exp_()
        d_v[:, :, j] += torch.einsum("bhgqk,bhgqd->bhkd", p, do_rows)
        d_s = torch.einsum("bhgqd,bhkd->bhgqk", do_rows, v_rows)
        # d lse / d scores = p, so the gradient of the lse joins the row term.
        d_s = d_s.sub_((do_rows * o_rows).sum(-1, keepdim=True) - d_lse_rows).mul_(p).mul_(scale)
        d_q[:, :, start:end] = torch.einsum("bhgqk,bhkd->bhgqd", d_s, k_rows).flatten(1, 2).to(q.dtype)
        d_k[:, :, j] += torch.einsum("bhgqk,bhgqd->bhkd", d_s, q_rows)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)
