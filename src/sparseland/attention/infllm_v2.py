"""InfLLM-V2: each query token reads the first block, a window, and the key blocks that mean keys point to.

MiniCPM Team: *MiniCPM4: Ultra-Efficient LLMs on End Devices* (2025), section 2, and Zhao, Zhou, Su et al.:
*InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation* (2025), section 3.

With windows of ``p`` keys every ``s`` and blocks of ``b``, for query i and a key head's G query heads::

    c_j    = mean(k[s j .. s j + p - 1])                       complete windows only, after RoPE
    S_ij   = softmax_j(q_i . c_j scale) over s j + p - 1 <= i   R_ij = sum over the G heads
    score_B = max of R_ij over the windows that touch block B
    i reads {first blocks} + {window: its own block and those before} + {best blocks by score}

and attends exactly to those blocks, all G heads to the same. There are no parameters: with a context below
``dense_len`` attention is dense, with the same weights. Gradients flow through the attention, not through
the choice; keys learn because windows are means of the keys that stage 2 trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.attention._infllm_state import KernelState
from sparseland.errors import SparselandError
from sparseland.method import (
    AttentionInputs,
    Calibration,
    Card,
    PrefillMethod,
    Role,
    SelectMethod,
    SelectState,
    param,
)
from sparseland.ops.kernel_scores import (
    block_scores,
    check_sizes,
    coarsen,
    compress_keys,
    select_blocks,
    top_blocks,
)
from sparseland.ops.token_block_attention import tile_for
from sparseland.patterns import Pattern, TokenBlockPattern, WindowPattern, cdiv


@dataclass(frozen=True)
class InfLLMV2(PrefillMethod, SelectMethod):
    """First blocks, a window and the ``topk`` best blocks per query token and key head."""

    card: ClassVar[Card] = Card(
        slug="infllm-v2",
        title="MiniCPM4: Ultra-Efficient LLMs on End Devices",
        paper="MiniCPM Team 2025, arXiv 2506.07900; Zhao et al. 2025, arXiv 2509.24663",
        site="attention",
        training="none",
        summary="per query token the key blocks that overlapping mean keys point to; dense below a length",
        claims=(
            "reads less than 5 % of the tokens at 128K; about 7x the decoding speed of Qwen3-8B there on a "
            "Jetson AGX Orin",
            "attention forward and backward 1.57x, 2.76x and 4.61x faster than flash attention at 32K, 64K "
            "and 128K (H100, 32 query and 2 key heads, head size 128)",
            "trained dense at short lengths, then sparse at long ones, with the same weights",
        ),
        deviations=(
            "the switch to dense goes by each query's own context, not by the prompt's length: chunks, "
            "decoding and the whole prompt compute the same pairs (only queries between topk blocks + window "
            "and dense_len notice), but for near ties in half precision on GPUs, see the scores",
            "topk counts the first blocks and not the window, as in the released configuration",
            "at equal scores the earlier block is taken; the released kernels leave it to the sort",
            "scores are kept in float32 (released: the model's precision); only the GPU kernel for prompts "
            "in half precision rounds them to bfloat16 before it compares blocks, so that it may choose "
            "otherwise than decoding, which compares float32",
            "a block that a key with NaN or infinity touches ranks above all others, so that such a key "
            "shows as in dense attention (of more than topk of them, the first)",
            "where no coarse window has ended yet, the softmax's denominator is exact",
            "windows are means after RoPE; the released option of scoring without RoPE is not here",
        ),
        limits=(
            "finding blocks costs (queries x keys / stride) products: at very long prompts it dominates",
            "query heads that share keys share one choice; small groups leave little to share",
            "on a model that was not trained for it, it is a training-free approximation",
            "nothing is here of the papers' other parts (data filtering, ternary weights, serving)",
        ),
    )
    looks_ahead: ClassVar[bool] = False
    chunkable: ClassVar[bool] = True
    shares_group: ClassVar[bool] = True

    kernel: int = param(32, "keys per mean (a multiple of stride)", ge=1)
    stride: int = param(16, "keys from one mean to the next (a divisor of block_size)", ge=1)
    block_size: int = param(64, "keys per block: 16, 32, 64 or 128", ge=16, le=128)
    init: int = param(1, "first blocks that every query reads", ge=0)
    window: int = param(
        2048, "nearest tokens that are read, rounded up to blocks, the own block included", ge=1
    )
    topk: int = param(64, "blocks chosen before the window, the first ones included", ge=1)
    dense_len: int = param(8192, "contexts shorter than this are read whole", ge=0)
    lse: str = param(
        "coarse",
        "the score softmax's denominator: from all means, or from means of four times the length",
        choices=("exact", "coarse"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size not in (16, 32, 64, 128):
            raise SparselandError(
                f"infllm-v2: block_size={self.block_size} is not allowed; it must be 16, 32, 64 or 128"
            )
        if reason := check_sizes(self.kernel, self.stride, self.block_size):
            raise SparselandError(f"infllm-v2: {reason}")
        if self.init > self.topk:
            raise SparselandError(
                f"infllm-v2: init={self.init} is above topk={self.topk}, which includes the first blocks"
            )

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"prefill", "select"})

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """The paper's sizes for long prompts; for short ones finer blocks and budgets in proportion.

        A sixteenth, an eighth and a quarter of the prompt chosen, with windows of half of that.
        """
        if length > 16_384:
            return [cls(topk=k, window=w) for k, w in ((32, 1024), (64, 2048), (128, 4096))]
        size = 32 if length > 1024 else 16
        return [
            cls(
                kernel=size // 2,
                stride=size // 4,
                block_size=size,
                window=max(size, length // (2 * part)),
                topk=max(2, length // (part * size)),
                dense_len=length // 4,
            )
            for part in (16, 8, 4)
        ]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(topk=cdiv(length, 64), dense_len=0)

    @property
    def _near(self) -> int:
        """Blocks of the window."""
        return cdiv(self.window, self.block_size)

    def _reads_all(self, length: int) -> bool:
        """Whether a query with ``length`` tokens of context, and so every shorter one, reads all of them."""
        return length < self.dense_len or cdiv(length, self.block_size) <= self._near + self.topk

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        n_queries, n_keys = x.q.shape[2], x.k.shape[2]
        if self._reads_all(n_keys):
            return WindowPattern.dense(n_queries, n_keys)
        windows = compress_keys(x.k, self.kernel, self.stride)
        tile = tile_for(x.group, x.q.shape[3])
        lists = select_blocks(
            x.q, windows, n_keys, kernel=self.kernel, stride=self.stride, block_size=self.block_size,
            window=self._near, init=self.init, topk=self.topk, dense_len=self.dense_len, tile=tile,
            scale=x.scale, coarse=self._coarse(windows),
        )  # fmt: skip
        return TokenBlockPattern(n_queries, n_keys, self.block_size, self._near, tile, x.group, *lists)

    def _coarse(self, windows: Float[Tensor, "B Hkv n D"]) -> Float[Tensor, "B Hkv m D"] | None:
        return coarsen(windows, self.kernel, self.stride) if self.lse == "coarse" else None

    # ------------------------------------------------------------ decoding

    def new_state(self, layer: int, calibration: Calibration | None = None) -> KernelState:
        return KernelState(self.kernel, self.stride)

    def append(self, state: SelectState, k_new: Float[Tensor, "B Hkv n D"]) -> None:
        state.push(k_new)

    def observe(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> None:
        """Compress a prompt's keys, unless padding may still be to come (then the first step does it)."""
        assert isinstance(state, KernelState)
        if first_key is None:
            state.settle(x.k, None)

    @torch.no_grad()
    def select(
        self, state: SelectState, x: AttentionInputs, first_key: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "B Hkv n"] | None:
        """The tokens of the first blocks, the window and the best blocks, per key head.

        Blocks count from each row's first real token; a row whose context is short reads all of it.
        """
        assert isinstance(state, KernelState)
        n, size = len(state), self.block_size
        if self._reads_all(n):
            return None
        state.settle(x.k, first_key)
        batch, heads, device = x.k.shape[0], x.k.shape[1], x.q.device
        first = torch.zeros(batch, dtype=torch.long, device=device) if first_key is None else first_key.long()
        position = n - 1 - first  # of the query, in its row
        scores = block_scores(
            x.q, state.windows, self._coarse(state.windows), position[:, None], n, self.kernel, self.stride,
            size, x.scale,
        )  # fmt: skip
        columns = (n - 1) // size - self._near + 1
        sizes = (size, self._near, self.init, self.topk, 0)
        taken = top_blocks(scores[..., :columns], position, *sizes)[:, :, 0]  # [B, Hkv, columns]
        block = torch.arange(columns, device=device)
        chosen = torch.where(taken, block, columns).topk(self.topk, dim=-1, largest=False).values
        chosen = torch.where(chosen < columns, chosen, -1)
        window = (position // size)[:, None] - torch.arange(self._near, device=device)
        blocks = torch.cat([chosen, window[:, None].expand(batch, heads, -1)], -1)
        tokens = (blocks[..., None] * size + torch.arange(size, device=device)).flatten(-2)
        tokens = torch.where(
            (tokens >= 0) & (tokens <= position[:, None, None]), tokens + first[:, None, None], -1
        )
        if first_key is None or self.dense_len <= 1:
            return tokens
        # A row below dense_len reads all it has, which may be more than the others' budget.
        whole = torch.arange(max(tokens.shape[2], min(n, self.dense_len - 1)), device=device) + first[:, None]
        whole = torch.where(whole < n, whole, -1)[:, None]
        tokens = torch.nn.functional.pad(tokens, (0, whole.shape[2] - tokens.shape[2]), value=-1)
        return torch.where((position + 1 < self.dense_len)[:, None, None], whole, tokens)
