"""R-Sparse: large input channels go through the weight's columns, all the rest through a low-rank copy.

Zhang, Liu, Tian, Khaitan, Wang, Li: *R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM
Inference* (ICLR 2025).

For one linear layer ``W [out, in]`` and one token ``x``, with column norms ``c_i = ||W[:, i]||``::

    m_i = |x_i| c_i > t
    y   = W (m ⊙ x) + A B ((1 - m) ⊙ x) + bias         A B: truncated SVD of W

``t`` is a quantile of ``|x_i| c_i`` on calibration text. Of the layer's budget ``1 - sparsity``, channels
get the share ``alpha`` and the rank the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.method import Calibration, Card, LinearMethod, param

# The authors calibrate on one window of this many tokens.
CALIBRATION_TOKENS = 512
# Extra columns and power iterations of the truncated SVD.
OVERSAMPLE = 8
POWER_STEPS = 8
# Single-token steps between two looks at the realised density: looking costs as much as masking.
COUNT_EVERY = 16


@dataclass(frozen=True)
class RSparse(LinearMethod):
    """Input channels above a calibrated threshold, and a low-rank term for those below."""

    card: ClassVar[Card] = Card(
        slug="r-sparse",
        title="R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference",
        paper="Zhang et al., ICLR 2025, arXiv 2504.19449",
        site="neurons",
        training="calibration",
        summary="while decoding, linear layers read only the weights of large inputs, plus a low-rank term",
        claims=(
            "comparable to dense on ten tasks at 50 % sparsity of the decoder's linear layers, without "
            "training (Llama-2-7B, Llama-3-8B, Mistral-7B)",
            "43 % faster generation end to end with custom kernels (FP32)",
        ),
        deviations=(
            "inputs are compared by |x_i| times their column's norm (alpha=1: plain |x_i|), as in the "
            "authors' code; the paper's text compares plain |x_i|",
            "the low-rank factors come from randomised subspace iteration in float32, not from a full SVD",
            "one alpha for all layers (the paper's uniform recipe), not one per layer found by evolution",
            "ranks of grouped-query projections follow from their true shapes; the authors' code takes the "
            "hidden size as output width of all",
            "single-token steps are sparse and prompts dense; the authors' accuracy code makes a trailing "
            "fraction of every sequence sparse (scope=all makes every token sparse)",
        ),
        limits=(
            "no speed-up for prompts, and little for batches: every row has its own mask",
            "layers of a few MB fit in cache, where skipping rows gains nothing",
            "the weights stay in memory, the low-rank factors come on top",
        ),
    )

    sparsity: float = param(0.5, "share of each layer's multiplications to leave out", ge=0, lt=1)
    alpha: float = param(0.95, "share of what remains that input channels get; the rest is rank", ge=0, le=1)
    scope: str = param(
        "decode",
        "which tokens are sparse: those of single-token steps, or all (to study quality, not speed)",
        choices=("decode", "all"),
    )

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """The paper's 50 %, by channels alone and with a low-rank term, and its 40 %."""
        return [cls(alpha=1.0), cls(), cls(sparsity=0.4)]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(sparsity=0.0, alpha=1.0)

    # --------------------------------------------------------- calibration

    @property
    def calibration_key(self) -> str:
        return f"{self.card.slug}:sparsity={self.sparsity!r},alpha={self.alpha!r}"  # any scope

    @torch.no_grad()
    def calibrate(self, model: nn.Module, ids: Int[Tensor, "B N"]) -> Calibration:
        """Thresholds from one dense forward of at most 512 tokens of ``ids``, ranks from the weights.

        Tensors, per linear layer ``name``: ``name.threshold`` (float32 scalar, for ``|x_i| c_i``, or for
        ``|x_i|`` where ``alpha`` is 1) and, where ``alpha`` leaves a rank, ``name.A [out, r]``,
        ``name.B [r, in]`` in the weight's dtype. They hold for this ``sparsity`` and ``alpha`` only.
        """
        from sparseland.models.surgery import decoder_linears

        linears = decoder_linears(model)
        tensors: dict[str, Tensor] = {}

        def watch(name: str, linear: nn.Linear) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                # Reduced at once: no layer's inputs outlive its forward.
                score = args[0].flatten(0, -2).float().abs() * self._column_scale(linear)
                tensors[f"{name}.threshold"] = quantile(score, self.mask_sparsity).cpu()

            return hook

        handles = [lin.register_forward_pre_hook(watch(name, lin)) for name, lin in linears.items()]
        columns = min(ids.shape[1], CALIBRATION_TOKENS)
        sample = ids[: max(1, CALIBRATION_TOKENS // max(1, columns)), :columns]
        if sample.numel() == 0:
            raise SparselandError("r-sparse: the calibration text is empty")
        try:
            model(sample.to(next(model.parameters()).device))
        finally:
            for handle in handles:
                handle.remove()
        for name, linear in linears.items():
            if f"{name}.threshold" not in tensors:
                raise SparselandError(
                    f"r-sparse: the model did not use its layer {name} on the calibration text"
                )
            rank = self.rank(linear.in_features, linear.out_features)
            if rank:
                a, b = low_rank(linear.weight, rank)
                tensors[f"{name}.A"], tensors[f"{name}.B"] = a.cpu(), b.cpu()
        meta = {"sparsity": self.sparsity, "alpha": self.alpha, "tokens": sample.numel()}
        return Calibration(meta, tensors)

    @property
    def mask_sparsity(self) -> float:
        """Share of (token, channel) pairs below the threshold."""
        return 1 - (1 - self.sparsity) * self.alpha

    def rank(self, n_in: int, n_out: int) -> int:
        """Rank of the low-rank term: what the channels leave of the budget, at least 1; 0 if alpha is 1."""
        if self.alpha == 1:
            return 0
        channels = max(int(n_in * (1 - self.sparsity) * self.alpha), 1) if self.alpha > 0 else 0
        left = n_in * n_out * (1 - self.sparsity) - channels * n_out
        return min(max(int(left / (n_in + n_out)), 1), n_in, n_out)

    def _column_scale(self, linear: nn.Linear) -> Float[Tensor, " in"]:
        """``c_i``; ones where only channels are used, as in the authors' code."""
        if self.alpha == 1:
            return linear.weight.new_ones(linear.in_features, dtype=torch.float32)
        norms: Tensor = torch.linalg.vector_norm(linear.weight.detach().float(), dim=0)
        return norms

    # ------------------------------------------------------------ conversion

    def convert(self, linear: nn.Linear, name: str, calibration: Calibration | None = None) -> RSparseLinear:
        if calibration is None:
            raise SparselandError("r-sparse needs a calibration: give apply() some calibration text")
        made_for = {key: calibration.meta.get(key) for key in ("sparsity", "alpha")}
        if made_for != {"sparsity": self.sparsity, "alpha": self.alpha}:
            raise SparselandError(
                f"r-sparse: the calibration was made for sparsity={made_for['sparsity']}, "
                f"alpha={made_for['alpha']}, not for sparsity={self.sparsity}, alpha={self.alpha}"
            )
        # -inf: every channel counts.
        limit = calibration.tensor(self.card.slug, f"{name}.threshold", (), finite=False)
        weight = linear.weight
        scale = self._column_scale(linear)
        if self.alpha == 0:
            threshold = torch.full_like(scale, math.inf)  # pure low rank: no channel at all
        else:
            # A zero column never counts, whatever its input.
            threshold = torch.where(scale > 0, limit.to(scale.device) / scale, math.inf)
            threshold = torch.where(limit.to(scale.device) == -math.inf, -math.inf, threshold)
        factors = None
        if rank := self.rank(linear.in_features, linear.out_features):
            a = calibration.tensor(self.card.slug, f"{name}.A", (linear.out_features, rank))
            b = calibration.tensor(self.card.slug, f"{name}.B", (rank, linear.in_features))
            factors = (a.to(weight.device, weight.dtype), b.to(weight.device, weight.dtype))
        return RSparseLinear(linear, threshold, factors, everywhere=self.scope == "all")


class RSparseLinear(nn.Module):
    """A linear layer that reads the weight's columns of large inputs only, plus a low-rank term.

    Shares ``linear``'s weight and bias. The weight is laid out once with its columns contiguous (same
    values, same parameter), so that a skipped channel is a skipped contiguous row of ``W^T``.

    Args:
        linear: the layer it replaces.
        threshold: per channel, for ``|x_i|`` (``t / c_i``), float32.
        factors: ``A [out, r]`` and ``B [r, in]``, or None for no low-rank term.
        everywhere: sparse for every token; else only for single-token inputs ``[..., 1, in]``.
    """

    threshold: Tensor
    A: Tensor | None
    B: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        threshold: Float[Tensor, " in"],
        factors: tuple[Tensor, Tensor] | None,
        everywhere: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.everywhere = everywhere
        self.register_buffer("threshold", threshold, persistent=False)
        self.register_buffer("A", None if factors is None else factors[0], persistent=False)
        self.register_buffer("B", None if factors is None else factors[1], persistent=False)
        self._stride = linear.weight.stride()
        self.weight.data = self.weight.data.t().contiguous().t()
        self._steps = 0
        self._seen = 0  # (token, channel) pairs looked at
        self._kept: Tensor | float = 0.0  # and those above the threshold

    def forward(self, x: Float[Tensor, "*batch N in"]) -> Float[Tensor, "*batch N out"]:
        single = x.shape[-2] == 1
        y: Tensor
        if not (self.everywhere or single):
            y = F.linear(x, self.weight, self.bias)
            return y
        if not torch.compiler.is_compiling():
            if self._steps % COUNT_EVERY == 0 or not single:
                self._kept = self._kept + (x.detach().abs() > self.threshold).sum(dtype=torch.float64)
                self._seen += x.numel()
            self._steps += 1
        if single and not torch.is_grad_enabled():
            from sparseland.ops.sparse_gemv import sparse_gemv

            rows = sparse_gemv(x.flatten(0, -2), self.weight.t(), self.threshold, bias=self.bias)
            y = rows.view(*x.shape[:-1], self.out_features)
        else:
            # Differentiable, and the better shape for many tokens: their masks together skip nothing.
            y = F.linear(torch.where(x.abs() > self.threshold, x, 0), self.weight, self.bias)
        if self.A is not None and self.B is not None:
            small = torch.where(x.abs() > self.threshold, 0, x)
            y = y + F.linear(F.linear(small, self.B), self.A)
        return y

    def density(self) -> float | None:
        """Multiplications done per multiplication of the dense layer, on the sparse tokens seen so far.

        Single-token steps are sampled, one in 16. None before the first sparse token.
        """
        if not self._seen:
            return None
        rank = 0 if self.A is None else self.A.shape[1]
        extra = rank * (self.in_features + self.out_features) / (self.in_features * self.out_features)
        return float(self._kept) / self._seen + extra

    def undo(self) -> None:
        """Give the weight back its first layout, bit for bit."""
        weight = self.weight.data
        self.weight.data = torch.empty_strided(
            weight.shape, self._stride, dtype=weight.dtype, device=weight.device
        ).copy_(weight)

    def extra_repr(self) -> str:
        rank = 0 if self.A is None else self.A.shape[1]
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}"


def quantile(scores: Float[Tensor, "N in"], share: float) -> Float[Tensor, ""]:
    """The k-th smallest, ``k = share * n``: that many scores are at or below it (-inf for none)."""
    k = int(share * scores.numel() + 1e-6)
    if k == 0:
        return torch.tensor(-math.inf, device=scores.device)
    return scores.flatten().kthvalue(k).values


def low_rank(
    weight: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """A rank-``r`` product ``A B`` close to the best one, singular values split evenly between both.

    Subspace iteration from a fixed random start (Halko, Martinsson, Tropp 2011, algorithm 4.4) instead of a
    full SVD: the same error to about a percent, in seconds instead of hours for a 7B model.
    """
    w = weight.detach().float()
    width = min(rank + OVERSAMPLE, *w.shape)
    generator = torch.Generator().manual_seed(0)
    basis = w @ torch.randn(w.shape[1], width, generator=generator).to(w.device)
    for _ in range(POWER_STEPS):
        basis = w @ (w.t() @ torch.linalg.qr(basis).Q)
    q = torch.linalg.qr(basis).Q
    u, s, vh = torch.linalg.svd(q.t() @ w, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = (q @ u[:, :rank]) * root, root[:, None] * vh[:rank]
    return a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()
