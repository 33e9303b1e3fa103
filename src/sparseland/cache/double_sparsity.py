"""Double Sparsity: guess each cached token's weight from a few channels of its key, read the best ones.

Yang, Sheng, Gonzalez, Stoica, Zheng: *Post-Training Sparse Attention with Double Sparsity* (2024).

Offline, rank the channels of every head by their mean magnitude on calibration text. While decoding,
keep a *label* of each cached key, its first ``C`` ranked channels in a few bits. Per step and query head::

    s_hat = label(q) · label(K)^T          C of D channels, every token
    I     = top-k(s_hat)                   the newest token competes like any other, no forced window
    out   = softmax(q · K[I]^T scale) V[I]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.method import (
    AttentionInputs,
    Calibration,
    Card,
    LayerShape,
    SelectMethod,
    SelectState,
    param,
)
from sparseland.ops.channel_labels import label_scores, new_labels, write_labels
from sparseland.ops.top_values import top_indices

# The authors cut their calibration text into blocks of this many tokens.
CALIBRATION_BLOCK = 512


@dataclass(frozen=True)
class DoubleSparsity(SelectMethod):
    """Top-k tokens by a few channels of few bits; calibration ranks the channels."""

    card: ClassVar[Card] = Card(
        slug="double-sparsity",
        title="Post-Training Sparse Attention with Double Sparsity",
        paper="Yang et al. 2024, arXiv 2408.07092",
        site="cache",
        training="calibration",
        summary="reads only the top cached tokens, found by a few calibrated channels of each key in 4 bits",
        claims=(
            "1/16 token and 1/16 channel sparsity (D/4 channels in 4 bits) with minimal loss in perplexity, "
            "key-value retrieval and long-context tasks (Llama-2-7B/70B, Mixtral-8x7B)",
            "up to 14.1x faster attention and 1.9x faster decoding end to end on GPUs",
        ),
        deviations=(
            "all three channel statistics are averaged over the whole calibration text; the authors' script "
            "keeps only the last block's query-key statistic",
            "channels are ranked by mean |q k| by default, which kept the most attention mass of all on "
            "SmolLM2; the paper picks a metric per model, the authors' scripts use |q|",
            "key labels are really packed into their bits; the query's label, which nothing stores, is not "
            "rounded (the authors' accuracy code rounds both)",
            "the token budget is a fraction of the cache with a floor; the authors' code fixes a number",
            "caches shorter than min_length=256 tokens are read whole; the paper reads its 128 tokens from "
            "129 on (min_length=0)",
            "the paper's DS-Offload, which keeps keys and values in the host's memory, is left out",
            "group=mean and group=max (one selection per key head) are ours; the paper's is per query head",
        ),
        limits=(
            "the whole cache stays in memory, labels come on top",
            "a token that differs only in channels outside the label is not found",
            "with grouped queries, labels per query head cost group times the bytes of labels per key head",
        ),
    )

    budget: float = param(1 / 16, "fraction of the cached tokens that each step reads", gt=0, le=1)
    min_tokens: int = param(128, "read at least this many tokens (the authors' 1/16 of 2048)", ge=1)
    channels: float = param(1 / 4, "fraction of the head's channels kept in the label", gt=0, le=1)
    bits: int = param(4, "bits per label channel: 2, 4, 8, or 16 for the model's own precision", ge=2, le=16)
    metric: str = param(
        "qk",
        "statistic that ranks channels: mean |q|, mean |k|, or mean |q k| after RoPE",
        choices=("q", "k", "qk"),
    )
    group: str = param(
        "head",
        "select per query head, or per key head by the mean or max score of its query heads",
        choices=("head", "mean", "max"),
    )
    dense_layers: int = param(2, "the first layers read everything (the authors' accuracy code: 2)", ge=0)
    min_length: int = param(256, "shorter caches are read whole: selecting would save too little", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4, 8, 16):
            raise SparselandError(
                f"double-sparsity: bits={self.bits} is not allowed; it must be 2, 4, 8 or 16"
            )

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """The paper's setting; unrounded labels, which cost bytes but no unpacking; twice the tokens."""
        return [cls(bits=16), cls(), cls(budget=1 / 8, bits=16)]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(budget=1.0)

    # --------------------------------------------------------- calibration

    @property
    def calibration_key(self) -> str:
        return self.card.slug  # the statistics serve every setting

    def calibrate(self, model: nn.Module, ids: Int[Tensor, "B N"]) -> Calibration:
        """Mean magnitude of every channel on ``ids``, read in blocks of 512 tokens.

        Tensors ``layer.<i>.q [Hq, D]``, ``layer.<i>.k [Hkv, D]`` and ``layer.<i>.qk [Hq, D]``, float32. They
        do not depend on this method's parameters, so one calibration serves every setting. As in the
        authors' code, ``q`` and ``k`` are read before RoPE (the projections' outputs) and ``qk`` after it.
        Where a model has no separate projections, or normalises their output per channel, ``q`` and ``k``
        are read after RoPE instead (``meta["position"]`` says which).
        """
        from sparseland.models.capture import capture_qkv
        from sparseland.models.surgery import attention_layers

        layers = attention_layers(model)
        before_rope = all(_has_plain_projections(layer) for layer in layers.values())
        sums: dict[str, Tensor] = {}
        tokens = 0

        def add(name: str, values: Float[Tensor, "N H D"]) -> None:
            total = values.abs().double().sum(0)
            sums[name] = sums[name] + total if name in sums else total

        for row in ids:
            for block in row.split(CALIBRATION_BLOCK):
                tokens += block.numel()
                flat: dict[str, Tensor] = {}
                with _projection_outputs(layers if before_rope else {}, flat.__setitem__):
                    for x in capture_qkv(model, block[None]):
                        q, k = x.q[0].transpose(0, 1).float(), x.k[0].transpose(0, 1).float()
                        name = f"layer.{x.layer}"
                        add(f"{name}.qk", q * k.repeat_interleave(x.group, 1))
                        add(f"{name}.q", flat.pop(f"{name}.q").view_as(q) if before_rope else q)
                        add(f"{name}.k", flat.pop(f"{name}.k").view_as(k) if before_rope else k)
        if tokens == 0:
            raise SparselandError("double-sparsity: the calibration text is empty")
        tensors = {name: (total / tokens).float().cpu() for name, total in sums.items()}
        return Calibration(
            {"tokens": tokens, "position": "pre-RoPE" if before_rope else "post-RoPE"}, tensors
        )

    def check_calibration(self, calibration: Calibration, shapes: Mapping[int, LayerShape]) -> None:
        """Every statistic that a sparse layer reads has the layer's heads and channels."""
        for layer, shape in shapes.items():
            if layer < self.dense_layers:
                continue
            heads = {"q": shape.heads, "k": shape.kv_heads, "qk": shape.heads}
            for name in {self.metric} if self.group == "head" else {self.metric, "k"}:
                calibration.tensor(self.card.slug, f"layer.{layer}.{name}", (heads[name], shape.dim))

    def _label_channels(self, layer: int, calibration: Calibration | None) -> Int[Tensor, "H C"]:
        """The layer's label channels, best first: per query head, or per key head where heads share them."""
        if calibration is None:
            raise SparselandError("double-sparsity needs a calibration: give apply() some calibration text")
        statistic = calibration.tensors.get(f"layer.{layer}.{self.metric}")
        if statistic is None:
            raise SparselandError(
                f"double-sparsity: the calibration knows no layer {layer}; it is another model's"
            )
        if self.group != "head" and self.metric != "k":
            kv_heads = calibration.tensors[f"layer.{layer}.k"].shape[0]
            statistic = torch.unflatten(statistic, 0, (kv_heads, -1)).mean(1)
        keep = max(1, round(self.channels * statistic.shape[1]))
        # Stable, so that equal channels keep their order on every machine.
        return statistic.argsort(dim=-1, descending=True, stable=True)[:, :keep]

    # ------------------------------------------------------------ decoding

    def new_state(self, layer: int, calibration: Calibration | None = None) -> LabelState:
        channels = None if layer < self.dense_layers else self._label_channels(layer, calibration)
        return LabelState(channels, self.bits)

    def append(self, state: SelectState, k_new: Float[Tensor, "B Hkv n D"]) -> None:
        assert isinstance(state, LabelState)
        state.push(k_new)

    def select(
        self,
        state: SelectState,
        x: AttentionInputs,
        first_key: Int[Tensor, " B"] | None = None,
    ) -> Int[Tensor, "B H n"] | None:
        """The top tokens by label score; only shapes of ``x.k`` and ``x.v`` are used, never their values."""
        assert isinstance(state, LabelState)
        if state.channels is None:
            return None
        length = len(state)
        columns = self._wanted(length)
        if first_key is not None:
            # A shorter row below min_length is read whole, exactly as it would be alone.
            columns = max(columns, min(length, self.min_length - 1))
        if columns >= length:
            return None
        scores = state.scores(x.q, first_key, None if self.group == "head" else self.group)
        if first_key is None:
            return top_indices(scores, columns)
        # Each row reads what its own length entitles it to.
        valid = length - first_key
        share = (valid.double() * self.budget - 1e-6).ceil().long().clamp(min=self.min_tokens)
        wanted = torch.where(valid < self.min_length, valid, torch.minimum(share, valid))
        return top_indices(scores, columns, wanted[:, None])

    def _wanted(self, length: int) -> int:
        """Tokens to read of a cache of ``length``."""
        if length < self.min_length:
            return length
        return min(length, max(self.min_tokens, math.ceil(length * self.budget - 1e-6)))


class LabelState(SelectState):
    """Labels of one layer's cached keys: few bits and, per row, the smallest value and the step.

    Args:
        channels: label channels per query head or per key head, ``[H, C]``; None for a layer that is
            read whole and keeps no labels.
        bits: 2, 4 or 8 bits per channel, packed into bytes; 16 keeps the keys' own precision.
    """

    def __init__(self, channels: Int[Tensor, "H C"] | None, bits: int) -> None:
        super().__init__()
        self.channels = channels
        self.bits = bits
        # (smallest value, step) of each row, in half precision like the authors' labels.
        self._ranges: Tensor | None = None

    def push(self, new: Float[Tensor, "B Hkv n D"]) -> None:
        """Append the labels of new keys."""
        if self.channels is None:
            return
        self.channels = self.channels.to(new.device)  # once: a later step finds it there
        if (capacity := self._room_for(new.shape[2])) is not None:
            old = self._buffer, self._ranges
            made = new_labels(new, self.channels, self.bits, capacity)
            for kept, grown in zip(old, made, strict=True):
                if kept is not None and grown is not None:
                    grown[:, :, : self._length] = kept[:, :, : self._length]
            self._buffer, self._ranges = made
        assert self._buffer is not None
        write_labels(new, self.channels, self.bits, self._buffer, self._ranges, self._length)
        self._length += new.shape[2]

    def scores(
        self,
        q: Float[Tensor, "B Hq 1 D"],
        first_key: Int[Tensor, " B"] | None = None,
        combine: str | None = None,
    ) -> Float[Tensor, "B H N"]:
        """Estimated logits (up to a positive factor per head) of one query over all cached tokens.

        Per query head, or per key head by the mean or max of its query heads.
        """
        assert self.channels is not None
        ranges = None if self._ranges is None else self._ranges[:, :, : self._length]
        return label_scores(
            q, self.channels, self.bits, self.rows, ranges, first_key=first_key, combine=combine
        )

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        super().reorder(index)
        if self._ranges is not None:
            self._ranges = self._ranges.index_select(0, index.to(self._ranges.device))

    def nbytes(self) -> int:
        ranges = 0 if self._ranges is None else self._ranges[:, :, : self._length].numel() * 2
        return super().nbytes() + ranges


def _has_plain_projections(layer: nn.Module) -> bool:
    """Whether the projections' outputs are the queries and keys before RoPE."""
    linears = all(isinstance(getattr(layer, name, None), nn.Linear) for name in ("q_proj", "k_proj"))
    return linears and not any(
        hasattr(layer, name) for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
    )


@contextmanager
def _projection_outputs(layers: dict[int, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Note the outputs of every layer's query and key projections as ``layer.<i>.q`` and ``layer.<i>.k``."""

    def hook(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, output: Tensor) -> None:
            note(name, output[0].float())

        return read

    handles = [
        getattr(layer, f"{which}_proj").register_forward_hook(hook(f"layer.{index}.{which}"))
        for index, layer in layers.items()
        for which in ("q", "k")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
