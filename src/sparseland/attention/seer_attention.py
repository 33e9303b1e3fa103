"""SeerAttention: small learned gates say which key blocks matter, taught by the model's own attention.

Gao et al.: *SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs* (2024); decoding:
Gao et al.: *SeerAttention-R: Sparse Attention Adaptation for Long Reasoning* (2025).

With blocks of b tokens and q, k as they are *before* RoPE, per query head::

    q_p = mean_b(q)      k_p = [max_b(k), min_b(k), mean_b(k)]
    q_g = RoPE(q_p)      k_g = RoPE(k_p W_k)           at positions 0, b, 2b, …
    g   = q_g k_g^T / sqrt(d_g), block-causal

    read   softmax(g) > t;  or the floor((1 - sqrt(1 - rho)) M) best of M key blocks in every row

The W_k are trained to ``max P`` of each tile, rows normalised, by KL divergence; the model stays as it is.
While decoding, one gate per key head merges the queries of its group, W_q [q_1 … q_group], and scores one
vector per full key block, which is all it keeps of the keys.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.attention._controls import check_block_size, phase_param, roles_of
from sparseland.attention._seer_decode import GateState
from sparseland.attention._seer_gate import Gates, Turns
from sparseland.attention._seer_training import train_gates
from sparseland.errors import SparselandError
from sparseland.method import (
    AttentionInputs,
    Calibration,
    Card,
    LayerShape,
    PrefillMethod,
    Role,
    SelectMethod,
    SelectState,
    param,
)
from sparseland.ops._dispatch import may_ask
from sparseland.ops.block_gate import select_blocks, unrotated_pool
from sparseland.ops.rotary import turn_back
from sparseland.patterns import Pattern, WindowPattern, cdiv

__all__ = ["SeerAttention", "train_gates"]


@dataclass(frozen=True)
class SeerAttention(PrefillMethod, SelectMethod):
    """Key blocks whose score by a learned gate is above a threshold, or among the best of their row."""

    card: ClassVar[Card] = Card(
        slug="seer-attention",
        title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
        paper="Gao et al. 2024, arXiv 2410.13276, NeurIPS 2025; decoding: SeerAttention-R, 2025",
        site="attention",
        training="training",
        summary="small gates, trained on the model's own attention, say which key blocks to read",
        claims=(
            "90 % sparsity at 32K tokens with little loss in perplexity after fine-tuning with YaRN, 5.67x "
            "over FlashAttention-2",
            "SeerAttention-R: AIME24 with 4K of tokens read, Qwen3-14B 75.73 against 78.91 dense",
        ),
        deviations=(
            "the blocks of a row's own positions are always read; with the paper's threshold alone a token "
            "can lose sight of itself",
            "gates start as the product of mean queries and mean keys, the identity on what they pool, "
            "instead of at random: a short training improves on what needs none",
            "the divergence is summed over key blocks and averaged over rows, heads and batch, so that one "
            "learning rate serves all lengths; PyTorch's mean, in the released code, also divides by blocks",
            "calibrate() trains on the few thousand tokens that it is given, shifted so that block edges "
            "fall elsewhere each step; the paper takes 0.5 B tokens (train_gates() takes any number)",
            "decoding: a completed block is turned by the position of its first token, as in prompts; the "
            "released code turns it by the newest token's",
            "decoding: the gate ranks the blocks before the token's own, which is always read; it is trained "
            "on at most 512 positions of a text's last half",
            "the decode gate's optional RMS norms are left out",
            "a block whose score is not finite is read",
        ),
        limits=(
            "the gates know lengths like those they were trained on",
            "with a threshold the density depends on the length: fewer blocks have larger scores, so early "
            "rows are nearly dense",
            "chunks compute other pairs than the whole prompt: the last two query blocks of every call are "
            "dense, which adds some, and nz_ratio counts blocks by the keys so far, which leaves early "
            "chunks fewer (4096 tokens in 4 chunks at 0.25: density 0.14 instead of 0.22)",
            "with dense last blocks lists are stored as wide as the key blocks (last_dense=0 makes them "
            "short)",
            "the positions of a row count from its first token, as in generate(); a padded batch given "
            "without position ids is judged by gates that see its keys turned by the padding",
            "frequencies of RoPE that change with the length (dynamic, longrope) can't be undone",
            "while decoding with a threshold on a GPU the list is as long as the longest there can be",
            "joint fine-tuning of model and gates (the paper's long-context mode) is not offered",
        ),
    )
    needs_rope: ClassVar[bool] = True

    threshold: float = param(2e-3, "read blocks above this part of a row's gate (0: all)", ge=0, lt=1)
    nz_ratio: float | None = param(
        None, "prompts: read the best blocks of each row instead, this part of all", gt=0, le=1
    )
    budget: int | None = param(4096, "decoding: read this many tokens a step (none: by the threshold)", ge=1)
    block_size: int = param(64, "queries and keys per block: 16, 32, 64 or 128", ge=16, le=128)
    last_dense: int = param(2, "the last query blocks of a prompt that read everything", ge=0)
    gate_dim: int | None = param(None, "length of a gate's vectors (none: the head's)", ge=1)
    phase: str = phase_param()
    steps: int = param(200, "training steps of calibrate() (0: gates of mean queries and keys)", ge=0)
    lr: float = param(1e-3, "learning rate of the gates", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.card.slug, self.block_size)

    @property
    def roles(self) -> frozenset[Role]:
        return roles_of(self.phase)

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """A quarter, a half and 3/4 of the blocks, in blocks that a short prompt has enough of."""
        size = 64 if length >= 4096 else 32 if length >= 2048 else 16
        return [
            cls(nz_ratio=part, budget=max(2 * size, round(length * part)), block_size=size, phase="both")
            for part in (0.25, 0.5, 0.75)
        ]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(threshold=0.0, budget=None, phase="both", steps=0)

    # ------------------------------------------------------------ training

    @property
    def calibration_key(self) -> str:
        """Thresholds and budgets share their gates."""
        size = f"{self.block_size},gate_dim={self.gate_dim}"
        return f"{self.card.slug}:block_size={size},phase={self.phase},steps={self.steps},lr={self.lr:g}"

    def new_learner(self, shape: LayerShape) -> nn.Module:
        gate_dim = shape.dim if self.gate_dim is None else self.gate_dim
        if gate_dim < shape.dim:
            raise SparselandError(
                f"{self.card.slug}: gate_dim={gate_dim} is not allowed; it must be the model's head size "
                f"{shape.dim} or more"
            )
        return Gates(shape.heads, shape.kv_heads, shape.dim, gate_dim, self.phase)

    def calibrate(self, model: nn.Module, ids: Int[Tensor, "B N"]) -> Calibration:
        """Train the gates on ``ids``, told on stderr; a text is read from another start each time."""

        def tell(step: int, loss: float) -> None:
            if step == 1 or step % max(1, self.steps // 10) == 0:
                print(f"{self.card.slug}: step {step}/{self.steps}, KL {loss:.3f}", file=sys.stderr)

        return train_gates(model, _shifted(ids, self.block_size), self, on_step=tell)

    def _gates(self, x: AttentionInputs, calibration: Calibration | None) -> Gates:
        """The layer's gates: those that apply() hands over, or read from a calibration."""
        if isinstance(x.learner, Gates):
            return x.learner
        shape = LayerShape(x.layer, x.n_layers or 0, x.q.shape[1], x.k.shape[1], x.q.shape[3])
        gates = self.new_learner(shape)
        assert isinstance(gates, Gates)
        known = {} if calibration is None else calibration.tensors
        state = {n: known.get(f"{x.layer}.{n}") for n in gates.state_dict()}
        if any(t is None for t in state.values()):
            raise SparselandError(f"{self.card.slug}: no gates for layer {x.layer}; apply() makes them")
        gates.load_state_dict(state)
        return gates.to(x.q.device)

    # ------------------------------------------------------------- prompts

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys, size = x.q.shape[2], x.k.shape[2], self.block_size
        blocks = cdiv(n_keys, size)
        top = None if self.nz_ratio is None else blocks_per_row(self.nz_ratio, blocks)
        everything = top == blocks if top is not None else self.threshold == 0
        if everything or cdiv(n_queries, size) <= self.last_dense:
            return WindowPattern.dense(n_queries, n_keys)
        gate = self._gates(x, calibration).prefill
        assert gate is not None
        tables = None if x.rope is None else x.rope.tables(n_keys, x.k)
        late: Turns = None if tables is None else (tables[0][x.offset :], tables[1][x.offset :])
        q_g, k_g = gate(
            unrotated_pool(x.q, size, late, extremes=False),
            unrotated_pool(x.k, size, tables, extremes=True),
            _every(late, size),
            _every(tables, size),
        )
        return select_blocks(
            q_g, k_g, n_queries, n_keys, size, scale=1 / math.sqrt(gate.gate_dim),
            threshold=self.threshold if top is None else None, top=top, dense_rows=self.last_dense,
        )  # fmt: skip

    # ------------------------------------------------------------ decoding

    def new_state(self, layer: int, calibration: Calibration | None = None) -> GateState:
        return GateState(self.block_size)

    def append(self, state: SelectState, k_new: Float[Tensor, "B Hkv n D"]) -> None:
        state.push(k_new)

    @torch.no_grad()
    def observe(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> None:
        assert isinstance(state, GateState)
        gate = self._gates(x, None).decode
        assert gate is not None
        state.compress(gate, x.k, None if x.rope is None else x.rope.tables(len(state), x.k), first_key)

    @torch.no_grad()
    def select(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "B Hkv n"] | None:
        """The best full blocks before the token's own, and its own, per key head."""
        assert isinstance(state, GateState)
        gate = self._gates(x, None).decode
        assert gate is not None
        n, size = len(state), self.block_size
        tables = None if x.rope is None else x.rope.tables(n, x.q)
        state.compress(gate, x.k, tables, first_key)
        if n <= size or (self.threshold == 0 if self.budget is None else self.budget >= n):
            return None
        device = x.q.device
        first = torch.zeros(1, dtype=torch.long, device=device) if first_key is None else first_key.long()
        last = n - 1 - first  # the newest token's place in its row, [B] or [1]
        own = (last // size)[:, None, None]
        q, turns = x.q.float(), None
        if tables is not None:
            turns = (tables[0][last][:, None, None], tables[1][last][:, None, None])
            q = turn_back(q, *turns)
        vectors = state.rows
        scores = (gate.queries(q, turns) @ vectors.mT)[:, :, 0] / math.sqrt(gate.gate_dim)
        chosen = self._chosen(scores, torch.arange(vectors.shape[2], device=device) < own)
        chosen = torch.cat((chosen, own.expand(*chosen.shape[:2], 1)), dim=-1)
        token = chosen[..., None] * size + torch.arange(size, device=device)
        token = token.masked_fill((chosen < 0)[..., None] | (token > last[:, None, None, None]), -1)
        return torch.where(token >= 0, token + first[:, None, None, None], -1).flatten(2)

    def _chosen(self, scores: Float[Tensor, "B Hkv M"], before: Tensor) -> Int[Tensor, "B Hkv m"]:
        """The blocks to read of those ``before`` the token's own; -1 where there are no more."""
        odd = ~scores.isfinite()
        if self.budget is not None:
            most = max(0, self.budget // self.block_size - 1)  # one is the token's own
            rank = scores.masked_fill(odd, torch.inf)
        else:
            most = math.ceil(1 / self.threshold)
            part = scores.masked_fill(odd | ~before, -torch.inf).softmax(-1)
            rank = part.masked_fill(~(part > self.threshold), -torch.inf).masked_fill(odd, torch.inf)
        value, index = rank.masked_fill(~before, -torch.inf).topk(min(most, scores.shape[-1]), dim=-1)
        if self.budget is None and may_ask(scores):
            longest = int((value > -torch.inf).sum(-1).max())  # no one waits for a CPU
            value, index = value[..., :longest], index[..., :longest]
        return index.masked_fill(value == -torch.inf, -1)


def blocks_per_row(nz_ratio: float, blocks: int) -> int:
    """The constant number of blocks per row that fills ``nz_ratio`` of the causal triangle.

    ``k`` of M blocks in every row (all where there are fewer) are ``1 - (1 - k / M)^2`` of the triangle.
    """
    return max(1, int((1 - math.sqrt(1 - nz_ratio)) * blocks + 1e-9))


def _every(turns: Turns, step: int) -> Turns:
    return None if turns is None else (turns[0][::step], turns[1][::step])


def _shifted(ids: Int[Tensor, "B N"], block_size: int, shifts: int = 4) -> list[Int[Tensor, "B n"]]:
    """The text from a few starts inside its first block: block edges fall elsewhere in each."""
    if ids.shape[1] <= 3 * block_size:
        return [ids]
    return [ids[:, i * block_size // shifts :] for i in range(shifts)]
