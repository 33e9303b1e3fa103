"""DMA's claim: with w remembered keys per query it recalls like dense attention, a window of w does not."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import sparseland as sl
from sparseland.attention._dma_selection import eviction_times
from sparseland.attention.dynamic_mask_attention import DynamicMaskAttention
from sparseland.claims._pair_recall import pair_batches, pair_vocab
from sparseland.claims._training import (
    Batch,
    Trained,
    recall_batches,
    small_model,
    text_data,
    train,
)
from sparseland.method import AttentionInputs, Calibration, LayerShape, Method
from sparseland.models import load_embedded
from sparseland.patterns import IntervalPattern

CLAIM = (
    "learned scores of the values choose which w keys are remembered: associative recall like dense "
    "attention and far above a window of w, and language modelling no worse than the window's at equal tokens"
)

# What must lie between DMA and dense, and between a window and DMA, to be called "like" and "far above".
LIKE, ABOVE = 0.15, 0.3
# Scores learn faster than the model: a strength that stays about 0 changes its sign, and with it the order.
OWN_RATE = 3.0


@dataclass(frozen=True)
class RandomTop(DynamicMaskAttention):
    """The control: keys remembered by scores that are random, fixed per position, and no bias."""

    def new_learner(self, shape: LayerShape) -> None:  # type: ignore[override]
        return None

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> IntervalPattern:
        n = x.k.shape[2]
        generator = torch.Generator().manual_seed(x.layer)
        scores = torch.rand(x.k.shape[1], n, generator=generator).to(x.k.device).expand(x.k.shape[:3])
        return IntervalPattern(x.q.shape[2], n, eviction_times(scores, self.keep), None, x.group, self.keep)


@dataclass(frozen=True)
class Recall:
    """One recall task and the training that dense attention solves it with.

    Args:
        name: in the rows.
        length: tokens of a sequence; every query sees ``keep`` of them.
        batch, steps, lr: of the training.
        hops: 1: a pair is one token; 2: a key and a value, for which a layer must first look one token back.
    """

    name: str
    length: int
    keep: int
    batch: int
    steps: int
    lr: float
    hops: int = 1
    pairs: int = 6

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """The task's sequences, without end."""
        if self.hops == 1:
            return pair_batches(batch, self.length, self.pairs, 8, queries=2 * self.pairs, seed=seed)
        return recall_batches(batch, self.length, self.pairs, vocab=64, queries=2 * self.pairs, seed=seed)

    def methods(self) -> dict[str, Method | None]:
        """Dense, and three ways to choose ``keep`` keys."""
        return {
            "dense": None,
            "window": sl.method.parse_spec(f"streaming:sinks=0,window={self.keep}"),
            "random": RandomTop(keep=self.keep),
            "dma": DynamicMaskAttention(keep=self.keep),
        }

    def run(self, seed: int, device: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Accuracy by method, and the rows of the curves."""
        vocab = 64 if self.hops == 2 else pair_vocab(self.pairs, 8)
        held_out = list(itertools.islice(self.batches(128, seed + 1000), 2))
        accuracy: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        for name, method in self.methods().items():
            model = small_model(
                "smoke", vocab=vocab, length=self.length, layers=self.hops, seed=seed, initializer_range=0.1
            ).to(device)
            trained = train(
                model, method, self.batches(self.batch, seed), self.steps, lr=self.lr,
                own_lr=OWN_RATE * self.lr, evaluate_on=held_out, label=f"{self.name}, {name}",
            )  # fmt: skip
            rows += [{**row, "task": self.name} for row in trained.curve]
            accuracy[name] = trained.last["accuracy"]
            if self.hops == 1 and method is not None:
                rows[-1]["pairs_remembered"] = self.remembered(model, method, trained, held_out[0], device)
        return accuracy, rows

    @torch.no_grad()
    def remembered(self, model: Any, method: Method, trained: Trained, batch: Batch, device: str) -> float:
        """The share of all pairs that the last query still sees, in the head that sees most."""
        with sl.apply(model, method, calibrations=trained.calibrations) as handle:
            runtime = handle.runtimes[0]
            runtime.keep_pattern = True
            model.get_decoder()(input_ids=batch.ids.to(device), use_cache=False)
            assert runtime.last_pattern is not None
            seen = runtime.last_pattern.mask()[:, :, -1].to(device)  # (B or 1, H or 1, N)
        pairs = (batch.ids.to(device) > self.pairs)[:, None]  # ids: noise, queries, pairs
        return float((seen & pairs).sum(-1).double().mean(0).max() / self.pairs)


def reproduce(scale: str = "smoke", seed: int = 0) -> dict[str, Any]:
    """Train small models on recall (and on text) with dense, window, random and learned choice of keys.

    Args:
        scale: ``smoke`` (recall in one hop, a model of one layer, CPU) or ``full`` (also recall in two hops,
            and a language model of 27 M parameters on source code; on a GPU if there is one).
        seed: of models and data.
    """
    full = scale == "full"
    device = "cuda" if full and torch.cuda.is_available() else "cpu"
    task = Recall("recall", length=64, keep=16, batch=48, steps=150, lr=3e-3)
    if full:
        task = Recall("recall", length=128, keep=32, batch=128, steps=300, lr=3e-3)
    runs = [task.run(seed + i, device) for i in range(3 if full else 1)]
    rows = [row for _, more in runs for row in more]
    # The middle of the seeds: a run can stay the window that it begins as (see the card's limits).
    accuracy = {name: statistics.median(found[name] for found, _ in runs) for name in runs[0][0]}
    ours: dict[str, Any] = {f"recall_{name}": value for name, value in accuracy.items()}
    ours["recall_dma_of_each_seed"] = [found["dma"] for found, _ in runs]
    for name in ("window", "random", "dma"):
        shares = [
            r["pairs_remembered"]
            for r in rows
            if r["setting"] == f"recall, {name}" and "pairs_remembered" in r
        ]
        ours[f"pairs_remembered_{name}"] = statistics.median(shares)
    holds = like_dense(accuracy)
    if full:
        two = Recall("two-hop recall", 64, keep=24, batch=512, steps=500, lr=3e-3, hops=2, pairs=4)
        accuracy, more = two.run(seed, device)
        rows += more
        ours |= {f"two_hop_recall_{name}": value for name, value in accuracy.items()}
        # Where dense itself has not learnt to look back, the comparison says nothing.
        if accuracy["dense"] > 0.8:
            holds = holds and like_dense(accuracy)
        losses, more = language_models(seed, device)
        rows += more
        ours |= {f"text_loss_{name}": value for name, value in losses.items()}
        holds = holds and losses["dma"] <= losses["window"]
    return {
        "slug": "dynamic-mask-attention",
        "claim": CLAIM,
        "paper": {
            "better_than": ["dense", "sliding window", "MLA", "NSA"],
            "measured_on": "80M to 1.7B parameters under Chinchilla settings; multi-query associative recall",
        },
        "ours": ours,
        "differs": (
            "models of one or two layers of 64 on synthetic recall"
            + (", and 27 M parameters on 3 M tokens of Python's sources at 1024 tokens" if full else "")
            + ", not 80M to 1.7B parameters; 'recall' has a pair in one token, since the two hops of the "
            "paper's task take thousands of steps to learn; scores train at three times the model's rate"
        ),
        "holds": bool(holds),
        "rows": rows,
    }


def like_dense(accuracy: dict[str, float]) -> bool:
    """DMA near dense, and far above the window and the random choice of equally many keys."""
    return accuracy["dense"] - accuracy["dma"] <= LIKE and all(
        accuracy["dma"] - accuracy[name] >= ABOVE for name in ("window", "random")
    )


def language_models(seed: int, device: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Validation loss of one small model trained with dense, window and learned attention on equal tokens."""
    length, keep, batch, steps = 1024, 256, 16, 200
    data = text_data(load_embedded().tokenizer, max_bytes=2**24, vocab=8192)
    losses: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    methods = {
        "dense": None,
        "window": f"streaming:sinks=0,window={keep}",
        "dma": f"dynamic-mask-attention:keep={keep}",
    }
    for name, method in methods.items():
        model = small_model("full", vocab=data.vocab, length=length, seed=seed).to(device)
        trained = train(
            model, method, data.batches(batch, length, seed), steps, lr=2e-3,
            evaluate_on=data.validation(batch, length), label=f"text, {name}",
        )  # fmt: skip
        rows += [{**row, "task": "text"} for row in trained.curve]
        losses[name] = trained.last["loss"]
    return losses, rows
