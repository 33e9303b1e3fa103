"""Dynamic Mask Attention: a learned score per key decides which keys are remembered, and biases their logits.

Shi, Wu, Peng, Luo and others: *Trainable Dynamic Mask Sparse Attention* (2025). Symbols: w keys are kept
per query (``keep``), v_j are the values of token j in all key heads, h is a key head::

    z_j      = dt_proj [v_j,1 ; ... ; v_j,Hkv]              (one number per key head)
    delta_j  = exp(A softplus(z_j))                          (``score=linear``: without the exp)
    T_i      = the w largest of {delta_j : j <= i}
    s_ij     = q_i . k_j / sqrt(d) + delta_j   for j in T_i, else -inf

A starts at 0, so all scores are equal at first. Of equal keys the later stays: an untrained layer is a
sliding window of w. Gradients reach A, dt_proj and v through delta in the logits, never through the choice
of T_i.

Since scores do not depend on the query, the queries that see a key form one interval (``_dma_selection``);
the mask is one number per key, and a decoding cache needs exactly w tokens per key head (``_dma_store``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparseland.attention._dma_selection import eviction_times, ranking
from sparseland.attention._dma_store import TopStore
from sparseland.method import (
    AttentionInputs,
    Calibration,
    Card,
    LayerShape,
    PrefillMethod,
    Role,
    StoreMethod,
    param,
)
from sparseland.patterns import IntervalPattern

# exp of more would leave float32; a bias of e^80 already is "this key only".
MAX_EXPONENT = 80.0


class ScoreHead(nn.Module):
    """``A softplus(dt_proj v)``, one number per key and key head, and the logits' bias that follows from it.

    Keys are ranked by the number before the exp: that is the same order, without the ties of what float32
    rounds to 1 or cuts off.

    Args:
        kv_heads: key heads.
        dim: head size.
        exp: whether the bias is the exp of the number, or the number itself.
        seed: of the linear map's first weights; torch's global random state is left alone.
    """

    def __init__(self, kv_heads: int, dim: int, exp: bool, seed: int = 0) -> None:
        super().__init__()
        self.exp = exp
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.dt_proj = nn.Linear(kv_heads * dim, kv_heads, bias=False)
        self.A = nn.Parameter(torch.zeros(kv_heads))

    def forward(self, v: Float[Tensor, "B Hkv N D"]) -> Float[Tensor, "B Hkv N"]:
        """What keys are ranked by, in float32 whatever the values' type."""
        with torch.autocast(v.device.type, enabled=False):
            weight = torch.unflatten(self.dt_proj.weight.float(), 1, (v.shape[1], v.shape[3]))
            # Head by head, so that the values stay where they are: joining them first copies them.
            z = (v.float() @ weight.permute(1, 2, 0)).sum(1).mT
            return self.A.float()[:, None] * F.softplus(z)

    def bias(self, scores: Float[Tensor, "B Hkv N"]) -> Float[Tensor, "B Hkv N"]:
        """``delta``: what joins the logits of the keys with these scores."""
        return scores.clamp(max=MAX_EXPONENT).exp() if self.exp else scores


@dataclass(frozen=True)
class DynamicMaskAttention(PrefillMethod, StoreMethod):
    """Causal top-w of learned key scores on prompts; a cache of w tokens per key head while decoding."""

    card: ClassVar[Card] = Card(
        slug="dynamic-mask-attention",
        title="Trainable Dynamic Mask Sparse Attention",
        paper="Shi et al. 2025, arXiv 2508.02124",
        site="attention",
        training="training",
        summary="learned scores of the values choose the w keys that are remembered, and bias their logits",
        claims=(
            "lower perplexity than dense, sliding-window, latent and native sparse attention at equal "
            "training compute (80M to 1.7B parameters)",
            "better than them on multi-query associative recall",
            "up to 10x overall speed-up over dense attention (abstract, v6)",
        ),
        deviations=(
            "the w keys are chosen per query among the keys before it, as the paper defines; the authors' "
            "current code chooses once over the whole sequence, so later tokens decide what earlier queries "
            "see",
            "score=exp is the paper's; the authors' current code leaves the exp out (score=linear)",
            "of equal scores the later key stays, so the untrained layer is a sliding window; the authors' "
            "order of equal scores is arbitrary. Scores within a thousandth are equal: a repeated word has "
            "equal values in the first layer, and rounding must not choose",
            "keys are gathered by their lifetimes instead of testing tiles of consecutive keys for one that "
            "is allowed: scattered keys touch nearly every tile",
            "the exponent of the score is cut at 80, where float32 would overflow",
        ),
        limits=(
            "untrained it is a sliding window without sinks; scores must be trained with the model, and may "
            "fail to: keys outside the window give no gradient at first, and a strength A that crosses 0 "
            "turns the order round (some seeds of harder recall tasks stayed windows)",
            "a query is not guaranteed to see its own key (own=true adds it), nor sinks or neighbours",
            "keys that have left are gone: the cache can't be cropped to before a displacement",
            "`recall` of the statistics compares with logits without the bias",
        ),
    )
    looks_ahead: ClassVar[bool] = False
    chunkable: ClassVar[bool] = True

    keep: int = param(2048, "keys that a query sees: the best before it, per key head (w)", ge=1)
    score: str = param("exp", "delta = exp(A softplus(z)), or without the exp", choices=("exp", "linear"))
    own: bool = param(False, "a query always sees its own key")

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"prefill", "store"})

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """An eighth, a quarter and half of the prompt."""
        return [cls(keep=max(1, length // part)) for part in (8, 4, 2)]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(keep=length)

    def new_learner(self, shape: LayerShape) -> ScoreHead:
        return ScoreHead(shape.kv_heads, shape.dim, self.score == "exp", shape.layer)

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> IntervalPattern:
        """Without a learner all scores are equal."""
        n_queries, n_keys = x.q.shape[2], x.k.shape[2]
        known = 0 if x.marks is None else x.marks.shape[2]
        new = x.v[:, :, known:]
        scores = new.new_zeros(new.shape[:3], dtype=torch.float32) if x.learner is None else x.learner(new)
        if x.marks is not None:
            scores = torch.cat([x.marks, scores], -1)
        ends = eviction_times(ranking(scores), self.keep)
        most = min(n_keys, self.keep)
        if self.own:
            ends = torch.maximum(ends, torch.arange(1, n_keys + 1, device=ends.device))
            most = min(n_keys, self.keep + 1)
        bias = x.learner.bias(scores) if isinstance(x.learner, ScoreHead) else None
        return IntervalPattern(n_queries, n_keys, ends, bias, x.group, most)

    def new_store(
        self,
        layer: int,
        calibration: Calibration | None = None,
        *,
        n_layers: int | None = None,
        learner: nn.Module | None = None,
    ) -> TopStore:
        return TopStore(self.keep, self.own, learner)
