"""What claims about trained methods share: a small decoder, real text, recall tasks, one training loop.

A claim trains the same small model several times, each time with another method on its attention, and
compares the curves at equal tokens::

    data = text_data(tokenizer, max_bytes=2**24)
    model = small_model(length=1024)
    dense = train(model, None, data.batches(8, 1024), 500, evaluate_on=data.validation(4, 1024))

``train`` puts the method on the model with ``sl.apply``, optimises the model's and the method's own
parameters together, and takes the method off again; ``dense.curve`` holds rows for a report.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseland as sl
from sparseland.claims._training_data import (
    IGNORE,
    Batch,
    TextData,
    copy_batches,
    recall_batches,
    stdlib_texts,
    text_data,
)
from sparseland.errors import SparselandError
from sparseland.method import Calibration, Method
from sparseland.models.tiny import tiny_model

__all__ = [
    "IGNORE", "Batch", "TextData", "Trained", "copy_batches", "evaluate", "mean_last", "recall_batches",
    "small_model", "stdlib_texts", "text_data", "train",
]  # fmt: skip


# ------------------------------------------------------------------ model


def small_model(
    scale: str = "full",
    *,
    vocab: int = 49_152,
    length: int = 2048,
    seed: int = 0,
    hidden: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    **config: Any,
) -> Any:
    """A random Llama-style decoder with a tied embedding, float32, on the CPU.

    Args:
        scale: ``full`` (8 layers of 512, 8 query and 2 key heads of 64: 47 M parameters with the whole
            vocabulary) or ``smoke`` (2 layers of 64, 4 query and 2 key heads of 16).
        vocab: size of the vocabulary.
        length: longest input.
        seed: equal seeds give equal weights.
        hidden, layers, heads, kv_heads, head_dim: instead of the scale's own.
        config: further fields of transformers' Llama configuration.
    """
    sizes = {"full": (512, 8, 8, 2, 64), "smoke": (64, 2, 4, 2, 16)}
    if scale not in sizes:
        raise SparselandError(f"small_model: no scale {scale!r}; there are {', '.join(sizes)}")
    given = (hidden, layers, heads, kv_heads, head_dim)
    hidden, layers, heads, kv_heads, head_dim = (
        own if value is None else value for value, own in zip(given, sizes[scale], strict=True)
    )
    # The usual gated layer: two thirds of four times the width, in multiples of 32.
    inner = -(-hidden * 8 // 96) * 32
    options = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "pad_token_id": None,  # a padding id would never be trained
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return tiny_model("llama", seed, **{**options, **config})


# ------------------------------------------------------------- training


@dataclass
class Trained:
    """What a training gave.

    Args:
        curve: rows for a report: step, tokens so far, seconds, training loss and what :func:`evaluate` says.
        calibrations: what the method learnt, to apply it again.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    @property
    def last(self) -> dict[str, Any]:
        """The last row that was evaluated."""
        return self.curve[-1]


def train(
    model: Any,
    method: str | Method | Sequence[str | Method] | None,
    batches: Iterable[Batch],
    steps: int,
    *,
    lr: float = 1e-3,
    own_lr: float | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    evaluate_on: Sequence[Batch] = (),
    every: int | None = None,
    buckets: int = 4,
    calibrations: dict[str, Calibration] | None = None,
    label: str | None = None,
) -> Trained:
    """Train ``model`` with ``method`` on its attention: AdamW, warm-up, then a cosine down to a tenth.

    The model's parameters and the method's own are optimised together, in bfloat16 autocast on a GPU and
    in float32 elsewhere. Progress goes to stderr. Ctrl-C, like any error, takes the method off the model
    before it goes on; the model keeps the steps made so far.

    Args:
        model: where it lies is where it is trained.
        method: a spec, a method, a list of them, or None for the plain model.
        batches: at least ``steps`` of them.
        steps: optimiser steps.
        lr: peak learning rate.
        own_lr: the same for the method's own parameters (default: ``lr``).
        warmup: share of the steps over which it rises.
        weight_decay: on matrices only.
        clip: largest gradient norm.
        evaluate_on: batches for :func:`evaluate`, before the first step, every ``every`` steps, at the end.
        every: steps between evaluations (default: a quarter of all).
        buckets: position buckets of the evaluation.
        calibrations: what the method knows already.
        label: its name in the rows (default: the spec).
    """
    device = next(model.parameters()).device
    every = every or max(1, steps // 4)
    was_training = model.training
    with (
        sl.apply(model, method, calibrations=calibrations) if method is not None else nullcontext() as handle
    ):
        specs = "+".join(m.spec for m in handle.methods) if handle is not None else "dense"
        name = label or specs
        own = list(handle.parameters()) if handle is not None else []
        parameters = [p for p in (*model.parameters(), *own) if p.requires_grad]
        groups = [
            {
                "params": [p for p in some if p.requires_grad and matrix == (p.dim() >= 2)],
                "lr": rate,
                "weight_decay": decay,
            }
            for some, rate in ((list(model.parameters()), lr), (own, lr if own_lr is None else own_lr))
            for matrix, decay in ((True, weight_decay), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=device.type == "cuda"
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps, warmup))
        result = Trained()
        started, tokens = time.perf_counter(), 0
        losses: list[Tensor] = []

        def note(step: int) -> None:
            row: dict[str, Any] = {"setting": name, "step": step, "tokens": tokens}
            row["seconds"] = round(time.perf_counter() - started, 2)
            if losses:
                row["train_loss"] = float(torch.stack(losses).mean())
                losses.clear()
            if evaluate_on:
                row |= evaluate(model, evaluate_on, buckets)
                model.train()
            result.curve.append(row)
            shown = {k: v for k, v in row.items() if isinstance(v, float) and k != "seconds"}
            text = ", ".join(f"{k} {v:.3f}" for k, v in shown.items())
            print(f"{name}: step {step}/{steps}, {row['seconds']:.0f} s, {text}", file=sys.stderr, flush=True)

        source = iter(batches)
        try:
            model.train()
            note(0)
            for step in range(1, steps + 1):
                batch = next(source, None)
                if batch is None:
                    raise SparselandError(f"train: the batches ended after {step - 1} of {steps} steps")
                batch = batch.to(device)
                loss = _loss(model, batch).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                tokens += batch.ids.numel()
                if step % every == 0 or step == steps:
                    note(step)
        finally:
            model.train(was_training)
        if handle is not None:
            result.calibrations = handle.recipe().calibrations
    return result


@torch.no_grad()
def evaluate(model: Any, batches: Sequence[Batch], buckets: int = 4) -> dict[str, Any]:
    """Loss (nats), accuracy, and the loss per position bucket, over all scored positions of ``batches``.

    Works with whatever is applied to the model. ``loss_by_position`` has ``buckets`` entries, from the
    start of the sequence to its end; None where nothing is scored.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(buckets, 3, dtype=torch.float64, device=device)  # loss, hits, count
    try:
        for batch in batches:
            batch = batch.to(device)
            position = (batch.targets != IGNORE).nonzero()[:, 1]
            at = position * buckets // batch.ids.shape[1]
            logits, targets = _scored(model, batch)
            loss = F.cross_entropy(logits.float(), targets, reduction="none")
            hits = logits.argmax(-1) == targets
            sums.index_add_(0, at, torch.stack([loss, hits, torch.ones_like(loss)], -1).double())
    finally:
        model.train(was_training)
    rows = sums.tolist()
    count = sum(row[2] for row in rows)
    return {
        "loss": sum(row[0] for row in rows) / count,
        "accuracy": sum(row[1] for row in rows) / count,
        "loss_by_position": [row[0] / row[2] if row[2] else None for row in rows],
    }


def mean_last(curves: Sequence[Trained], key: str) -> float:
    """The mean of a number of the last rows (over seeds)."""
    return statistics.fmean(t.last[key] for t in curves)


def _scored(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets of the scored positions; only those go through the output layer."""
    device = batch.ids.device
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with autocast:
        hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
        scored = batch.targets != IGNORE
        logits = model.get_output_embeddings()(hidden[scored])
    return logits, batch.targets[scored]


def _loss(model: Any, batch: Batch) -> Tensor:
    logits, targets = _scored(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _cosine(steps: int, warmup: float) -> Any:
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, steps - rise)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2

    return factor
