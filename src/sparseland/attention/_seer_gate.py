"""SeerAttention's gates: a few linear maps per head on pooled queries and keys, then RoPE of block positions.

The gates start as what needs no training, the product of mean queries and mean keys, and are taught from
there.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparseland.ops.rotary import turn

# Cosine and sine of some positions, [n, R / 2] or broadcast over heads; None where a layer has no positions.
Turns = tuple[Tensor, Tensor] | None


class PrefillGate(nn.Module):
    """Scores of key blocks for blocks of queries, per query head.

    ``q_g = RoPE(q_mean W_q)``, ``k_g = RoPE([k_max, k_min, k_mean] W_k)``; with a gate as wide as a head, W_q
    is left out and W_k is per query head; with a wider one W_q is per query head and W_k per key head (both
    as in the released code).
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, gate_dim: int) -> None:
        super().__init__()
        narrow = gate_dim == dim
        self.key = nn.Parameter(_mean_of_keys(heads if narrow else kv_heads, dim, gate_dim))
        self.query = None if narrow else nn.Parameter(torch.eye(dim, gate_dim).repeat(heads, 1, 1))

    @property
    def gate_dim(self) -> int:
        """Length of a block's vector."""
        return self.key.shape[2]

    def forward(
        self,
        q: Float[Tensor, "B Hq Mq D"],
        k: Float[Tensor, "B Hkv Mk 3D"],
        q_turns: Turns,
        k_turns: Turns,
    ) -> tuple[Float[Tensor, "B Hq Mq C"], Float[Tensor, "B Hq Mk C"]]:
        """A vector per query block and per key block, from pooled queries and keys before RoPE."""
        group = q.shape[1] // k.shape[1]
        if self.query is not None:
            q = q @ self.query
        # The heads of a group share their keys' pooled values but have maps of their own.
        maps = self.key.reshape(k.shape[1], -1, *self.key.shape[1:])
        keys = (k[:, :, None] @ maps).flatten(1, 2)
        keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1) if group > 1 else keys
        return _turned(q, q_turns), _turned(keys, k_turns)


class DecodeGate(nn.Module):
    """Scores of key blocks for single queries, per key head: the query heads of a group are merged.

    ``q_g = RoPE([q_1 … q_group] W_q)`` at the token's position, ``k_g`` as in :class:`PrefillGate`.
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, gate_dim: int) -> None:
        super().__init__()
        group = heads // kv_heads
        merge = torch.eye(dim, gate_dim).repeat(group, 1) / group
        self.key = nn.Parameter(_mean_of_keys(kv_heads, dim, gate_dim))
        self.query = nn.Parameter(merge.repeat(kv_heads, 1, 1))

    @property
    def gate_dim(self) -> int:
        """Length of a block's vector."""
        return self.key.shape[2]

    def queries(self, q: Float[Tensor, "B Hq n D"], turns: Turns) -> Float[Tensor, "B Hkv n C"]:
        """A vector per key head and query."""
        B, _, n, _ = q.shape
        grouped = q.reshape(B, self.query.shape[0], -1, n, q.shape[3]).transpose(2, 3).flatten(3)
        return _turned(grouped @ self.query, turns)

    def keys(self, k: Float[Tensor, "B Hkv M 3D"], turns: Turns) -> Float[Tensor, "B Hkv M C"]:
        """A vector per key block, which is all that decoding keeps of it."""
        return _turned(k @ self.key, turns)


class Gates(nn.Module):
    """One layer's gates: for prompts, for decoding steps, or both."""

    def __init__(self, heads: int, kv_heads: int, dim: int, gate_dim: int, phase: str) -> None:
        super().__init__()
        shape = (heads, kv_heads, dim, gate_dim)
        self.prefill = PrefillGate(*shape) if phase != "decode" else None
        self.decode = DecodeGate(*shape) if phase != "prefill" else None


def _mean_of_keys(heads: int, dim: int, gate_dim: int) -> Float[Tensor, "H 3D C"]:
    """The map that takes the mean and leaves the extremes out."""
    one = torch.cat((torch.zeros(2 * dim, gate_dim), torch.eye(dim, gate_dim)))
    return one.repeat(heads, 1, 1)


def _turned(x: Tensor, turns: Turns) -> Tensor:
    return x if turns is None else turn(x, *turns)
