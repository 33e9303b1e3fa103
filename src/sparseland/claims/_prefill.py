"""What the claims about prompts share: a window of real text, dense as the yardstick, and rows of numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

import sparseland as sl
from sparseland.measure import timed
from sparseland.method import AttentionInputs, Calibration, PrefillMethod
from sparseland.models import load_embedded, load_model
from sparseland.models.capture import capture_qkv
from sparseland.ops.attend import attend
from sparseland.patterns import Pattern, WindowPattern
from sparseland.tasks.loss import cross_entropy
from sparseland.tasks.text import default_text, tokenize

# A loss is taken over at most this many of a window's last tokens: those with the longest context.
TAIL = 1024
# Every so-many-th layer is looked at from inside; all layers count in the loss.
LAYER_STEP = 3
# The context that the embedded model was trained with.
CONTEXT = 8192

PatternOf = Callable[[AttentionInputs], Pattern]


@dataclass
class Kept:
    """What a selection computes and keeps on captured layers, one number per layer and head.

    Args:
        density: computed / causal pairs.
        recall: attention mass of the computed pairs, averaged over queries.
        error: norm of the attention output's error over the norm of the dense output.
    """

    density: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """The three averages, for a row of a table."""
        return {
            "density": statistics.fmean(self.density),
            "recall": statistics.fmean(self.recall),
            "output_error": statistics.fmean(self.error),
        }


class Window:
    """The embedded model on one window of the default text, another window before it for calibration.

    Args:
        length: tokens of each window.
        seed: where in the text they lie.
    """

    def __init__(self, length: int, seed: int, device: str = "cpu") -> None:
        loaded = load_embedded()
        self.model: Any = loaded.model.to(device)
        self.length = length
        ids = tokenize(loaded.tokenizer, default_text()).to(device)
        generator = torch.Generator().manual_seed(seed)
        start = int(torch.randint(max(1, ids.numel() - 2 * length), (1,), generator=generator))
        self.other: Int[Tensor, "1 N"] = ids[None, start : start + length]
        self.ids: Int[Tensor, "1 N"] = ids[None, start + length : start + 2 * length]
        self.layers = list(self._capture(self.ids))
        self._dense = [_dense(x) for x in self.layers]
        self.dense_loss = self.loss()

    def _capture(self, ids: Int[Tensor, "1 N"]) -> Iterator[AttentionInputs]:
        layers = range(0, self.model.config.num_hidden_layers, LAYER_STEP)
        return capture_qkv(self.model, ids, layers)

    @torch.no_grad()
    def loss(self) -> float:
        """Nats per token of the window's tail, with whatever is applied to the model."""
        tail = min(TAIL, self.length // 2)
        logits = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=tail + 1).logits
        return cross_entropy(logits[0, :-1], self.ids[0, -tail:])

    def loss_with(self, method: PrefillMethod, calibrations: dict[str, Calibration] | None = None) -> float:
        """The loss with a method on all layers."""
        with sl.apply(self.model, method, calibrations=calibrations):
            return self.loss()

    @torch.no_grad()
    def keep(self, pattern_of: PatternOf) -> Kept:
        """What a selection keeps on this window's layers."""
        kept = Kept()
        for x, (dense, dense_lse) in zip(self.layers, self._dense, strict=True):
            pattern = pattern_of(x)
            out, lse = attend(x.q, x.k, x.v, pattern, scale=x.scale, return_lse=True)
            heads = x.q.shape[1]
            kept.density += pattern.density().expand(1, heads)[0].tolist()
            # The ratio of the softmax denominators is the mass of the computed pairs.
            kept.recall += (lse - dense_lse).exp().mean(-1)[0].tolist()
            kept.error += ((out - dense).norm(dim=(-2, -1)) / dense.norm(dim=(-2, -1)))[0].tolist()
        return kept

    @torch.no_grad()
    def keep_of_other(self, pattern_of: PatternOf) -> Kept:
        """What is kept with patterns made on the other window: indices that don't follow the input."""
        patterns = {x.layer: pattern_of(x) for x in self._capture(self.other)}
        return self.keep(lambda x: patterns[x.layer])

    def density(self, pattern_of: PatternOf) -> float:
        """Mean density over the captured layers, without computing attention."""
        return statistics.fmean(float(pattern_of(x).density().mean()) for x in self.layers)


def at_density(
    window: Window, wanted: float, family: Callable[[float], PatternOf]
) -> tuple[float, PatternOf]:
    """The member of a family, grown by a factor, whose density comes nearest to ``wanted`` (bisection)."""
    low, high = 0.0, 1.0
    while window.density(family(high)) < wanted and high < 64:
        low, high = high, 2 * high
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if window.density(family(middle)) < wanted else (low, middle)
    best = min((low, high), key=lambda f: abs(window.density(family(f)) - wanted))
    return best, family(best)


def _dense(x: AttentionInputs) -> tuple[Tensor, Tensor]:
    pattern = WindowPattern.dense(x.q.shape[2], x.k.shape[2])
    return attend(x.q, x.k, x.v, pattern, scale=x.scale, return_lse=True)


@torch.no_grad()
def attention_times(
    methods: dict[str, PatternOf], length: int, seed: int, device: str
) -> list[dict[str, Any]]:
    """Milliseconds of a layer's attention against dense, selection and computation apart; one layer in ten.

    Queries and keys come from the embedded model on real text; beyond its context by YaRN.
    """
    dtype = "bfloat16" if device == "cuda" else "float32"
    scale = length / CONTEXT if length > CONTEXT else None
    loaded = load_model(None, dtype=dtype, device=device, rope_scale=scale, length=length)
    ids = tokenize(loaded.tokenizer, default_text())
    start = int(
        torch.randint(max(1, ids.numel() - length), (1,), generator=torch.Generator().manual_seed(seed))
    )
    ids = ids[None, start : start + length].to(device)
    model: Any = loaded.model
    inputs = list(capture_qkv(model, ids, range(1, model.config.num_hidden_layers, 10)))
    rows: list[dict[str, Any]] = []
    patterns: dict[str, PatternOf] = {
        "dense": lambda x: WindowPattern.dense(x.q.shape[2], x.k.shape[2]),
        **methods,
    }
    for name, pattern_of in patterns.items():
        select, compute, density = [], [], []
        for x in inputs:
            made = [timed(partial(pattern_of, x), x.q.device) for _ in range(4)]
            pattern = made[-1][1]
            attention = partial(attend, x.q, x.k, x.v, pattern, scale=x.scale)
            runs = [timed(attention, x.q.device)[0] for _ in range(4)]
            # The first of each warms up.
            select.append(statistics.median(t for t, _ in made[1:]))
            compute.append(statistics.median(runs[1:]))
            density.append(float(pattern.density().mean()))
        rows.append(
            {
                "setting": f"{name}, {length} tokens",
                "select_ms": 1e3 * statistics.fmean(select),
                "attend_ms": 1e3 * statistics.fmean(compute),
                "density": statistics.fmean(density),
            }
        )
        dense = rows[0]["attend_ms"]
        rows[-1]["speedup"] = dense / (rows[-1]["attend_ms"] + (rows[-1]["select_ms"] if rows[1:] else 0))
    return rows
