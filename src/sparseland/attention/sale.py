"""SALE: every logit is estimated in 4 bits, and tiles that hold an important one are computed exactly.

Ji, Li, Xu, Zhao, Xu, Zhou: *SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM
Prefilling* (2025), section 3. Per query head, with tiles of 64 queries and 32 keys::

    area(i)   the first 32 keys, and at least 128 keys up to the diagonal of i's block
    RAS_ij    = exp(s_ij) / sum over t in area(i) of exp(s_it)        (relative attention score)
    kept      tiles where the 4-bit estimate of RAS exceeds tau_h somewhere

The sum is over a part of the row, so RAS is never below the attention weight. It is taken once, before any
tile is judged (the paper's two-pass variant). ``tau_h`` is found per layer and head: from ``tau`` it is
halved until the head's output on some text is within a bound of dense; below 1e-4 the head stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, Card, LayerShape, PrefillMethod, param
from sparseland.ops.attend import attend
from sparseland.ops.lowbit_scores import lowbit_tiles, tile_blocks
from sparseland.patterns import Pattern, WindowPattern

# Calibration makes a head dense whose tau would fall to this.
_SMALLEST = 1e-4
# The head size for which the released bound was chosen: it is a sum over dimensions.
_BOUND_DIM = 128
_KEY = "tau"


@dataclass(frozen=True)
class Sale(PrefillMethod):
    """Tiles in which a 4-bit estimate finds a relative attention score above ``tau``."""

    card: ClassVar[Card] = Card(
        slug="sale",
        title="SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",
        paper="Ji et al. 2025, arXiv 2505.24179",
        site="attention",
        training="calibration",
        summary="4-bit estimates of all logits; tiles with one that matters are computed exactly",
        claims=(
            "at least 3.36 times faster attention on Llama-3.1-8B beyond 64K tokens at unchanged quality "
            "(RTX 4090, with 4-bit tensor cores)",
            "quantising and selecting take about 11 % of full attention's time (same card)",
        ),
        deviations=(
            "one quantisation scale per token; the released kernel shares scales between the rows and keys "
            "that one tensor core instruction holds",
            "the part of a logit that smoothing moves into the queries' mean (c_j) is added in float32; the "
            "released kernel rounds it to whole steps of the 4-bit product",
            "thresholds and estimates are compared in float32, not in half precision; only on CPUs that "
            "multiply bfloat16 natively the 4-bit numbers times their scales are rounded to bfloat16, and "
            "tiles near the threshold can fall differently",
            "by default calibrated on 2048 tokens of plain text; the paper takes key-value retrieval prompts "
            "of about 30k tokens",
            "4-bit numbers are multiplied as 8-bit ones: Hopper has no 4-bit tensor cores, so the paper's "
            "share of time for the selection can't be expected there",
            "64 x 32 tiles are judged, but 64 x 64 blocks are computed, a block if one of its two tiles is "
            "kept: the kernels work on square blocks (1.3 times the density on SmolLM2 at 2K; see the claim)",
            "the error bound, a sum over dimensions, is scaled by head size / 128",
            "grids start at larger tau than 0.008 for prompts of a few thousand tokens, where a weight of "
            "0.008 is not much above the average",
        ),
        limits=(
            "all logits are estimated: the cost stays quadratic, and the gain is bounded by the estimate",
            "one noisy estimate keeps a whole tile, which costs density on heads of flat attention",
            "the means that smooth queries and keys are those of the call: in chunked prefill each chunk "
            "quantises with other means, and tiles near the threshold can fall differently",
            "which pairs early queries compute depends on later tokens, through the same means",
            "heads are calibrated alone, with dense outputs below them, and on errors summed over the "
            "prompt: bad rows can hide among good ones",
        ),
    )

    tau: float = param(0.008, "relative attention score that counts; where calibration starts", ge=0)
    error_bound: float = param(
        0.4, "largest mean absolute error of a head's output per token, summed over 128 dimensions", gt=0
    )
    dense_up_to: int = param(1024, "prompts of up to this many tokens are dense", ge=0)

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """Larger thresholds and bounds than the paper's at short lengths."""
        if length <= 1024:
            return [cls(tau=tau, error_bound=b, dense_up_to=192) for tau, b in ((32.0, 8.0), (8.0, 4.0))]
        if length <= 16_384:
            return [cls(tau=tau, error_bound=b) for tau, b in ((0.5, 1.6), (0.128, 0.8), (0.032, 0.4))]
        return [cls(tau=0.032, error_bound=0.8), cls()]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(tau=0.0)

    @torch.no_grad()
    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        if self.tau < 1e-5 or x.k.shape[2] <= self.dense_up_to:
            return WindowPattern.dense(x.q.shape[2], x.k.shape[2])
        words = lowbit_tiles(x.q, x.k, self.thresholds(x, calibration), scale=x.scale)
        return tile_blocks(words, x.q.shape[2], x.k.shape[2])

    def thresholds(self, x: AttentionInputs, calibration: Calibration | None) -> Float[Tensor, " H"]:
        """This layer's tau per head; without calibration the same for all."""
        heads = x.q.shape[1]
        if calibration is None or _KEY not in calibration.tensors:
            return torch.full((heads,), self.tau, device=x.q.device)
        known = calibration.tensors[_KEY]
        if x.layer >= known.shape[0] or known.shape[1] != heads:
            raise SparselandError(
                f"sale: the calibration holds tau for {known.shape[0]} layers of {known.shape[1]} heads; "
                f"layer {x.layer} has {heads}"
            )
        return known[x.layer].to(x.q.device, torch.float32, non_blocking=True)

    def check_calibration(self, calibration: Calibration, shapes: Mapping[int, LayerShape]) -> None:
        """One finite tau for every layer and head."""
        if self.tau >= 1e-5:
            heads = max(shape.heads for shape in shapes.values())
            calibration.tensor(self.card.slug, _KEY, (max(shapes) + 1, heads))

    def calibrate(self, model: nn.Module, ids: Int[Tensor, "B N"]) -> Calibration:
        """The largest tau per layer and head that keeps each row of ``ids`` within the error bound.

        tau is halved from ``self.tau``; rows go in turn, and it only falls. The model runs dense.

        Raises:
            SparselandError: ``ids`` are no ``[B, N]`` with N above ``dense_up_to``.
        """
        from sparseland.models.capture import capture_qkv

        if self.tau < 1e-5:
            return Calibration()
        if ids.dim() != 2 or ids.shape[1] <= self.dense_up_to:
            raise SparselandError(
                f"sale: calibration needs token ids [B, N] with N above dense_up_to={self.dense_up_to}, "
                f"got {list(ids.shape)}"
            )
        found: dict[int, Tensor] = {}
        for row in ids:
            for x in capture_qkv(model, row[None]):
                start = found.get(x.layer, torch.full((x.q.shape[1],), self.tau, device=x.q.device))
                found[x.layer] = self.calibrate_layer(x, start)
        if not found:
            raise SparselandError(f"sale: {type(model).__name__} has no attention layer to calibrate")
        heads = max(tau.numel() for tau in found.values())
        table = torch.zeros(max(found) + 1, heads)  # dense, where there is no attention
        for layer, tau in found.items():
            table[layer, : tau.numel()] = tau.cpu()
        dense = float((table == 0).double().mean())
        return Calibration({"tokens": ids.numel(), "dense_heads": dense}, {_KEY: table})

    @torch.no_grad()
    def calibrate_layer(self, x: AttentionInputs, tau: Float[Tensor, " H"]) -> Float[Tensor, " H"]:
        """One layer's tau, halved per head until the output is near enough to dense."""
        full = WindowPattern.dense(x.q.shape[2], x.k.shape[2])
        dense = attend(x.q, x.k, x.v, full, scale=x.scale).float()
        bound = self.error_bound * x.q.shape[3] / _BOUND_DIM * x.q.shape[2]
        tau = tau.clone()
        groups = torch.arange(x.k.shape[1], device=x.q.device)
        while groups.numel():
            # Heads are independent: only key heads with a query head that is still too far go on.
            heads = (groups[:, None] * x.group + torch.arange(x.group, device=groups.device)).flatten()
            q, k, v = x.q[:, heads], x.k[:, groups], x.v[:, groups]
            bits = lowbit_tiles(q, k, tau[heads], scale=x.scale)
            out = attend(q, k, v, tile_blocks(bits, q.shape[2], k.shape[2]), scale=x.scale).float()
            far = ((out - dense[:, heads]).abs().sum((0, 2, 3)) >= bound) & (tau[heads] > 0)
            lower = torch.where(tau[heads] / 2 > _SMALLEST, tau[heads] / 2, 0)
            tau[heads] = torch.where(far, lower, tau[heads])
            groups = groups[far.view(-1, x.group).any(-1)]
        return tau
