"""MASFormer's claim: a model converted to few full layers does what a dense one does, after some training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sparseland.attention.masformer import MASFormer
from sparseland.claims._pair_recall import pair_batches, pair_vocab
from sparseland.claims._training import Batch, Trained, copy_batches, small_model, text_data, train
from sparseland.models import load_embedded

CLAIM = (
    "full attention in a few layers and short blocks in the others, put on a trained model and trained on, "
    "is competitive with full attention at up to 75 % lower cost of attention"
)

# What the loss may lie above the dense control's (as a share), and accuracy below it, to be competitive.
TOLERANCE, BELOW = 0.05, 0.1
# How far short of the converted models one without any full layer must stay.
SHORT = 0.3
# The share of attention's cost that the paper saves.
PAPER_SAVES = 0.75


def continue_training(
    model: Any,
    method: MASFormer | None,
    batches: Iterable[Batch],
    steps: int,
    evaluate_on: Sequence[Batch],
    *,
    lr: float,
    buckets: int = 4,
    label: str,
) -> Trained:
    """The recipe: change the attention of a trained model, then train it on, on long sequences.

    AdamW with a tenth of the steps as warm-up and a cosine behind; the optimiser starts afresh, all weights
    move. The first row of the curve is the model right after the change, before any step. ``None`` is the
    dense control, which gets the same tokens.
    """
    return train(model, method, batches, steps, lr=lr, evaluate_on=evaluate_on, buckets=buckets, label=label)


def reproduce(scale: str = "smoke", seed: int = 0) -> dict[str, Any]:
    """Convert trained models and train on, with a dense control on equal tokens.

    Args:
        scale: ``smoke`` (a small model of four layers that has learnt to recall, CPU) or ``full`` (also
            SmolLM2-135M on source code, and models trained from scratch to copy, by placement; on a GPU if
            there is one).
        seed: of models and data.
    """
    full = scale == "full"
    device = "cuda" if full and torch.cuda.is_available() else "cpu"
    accuracy, rows = recall_by_placement(seed, device)
    one_full = [accuracy[name] for name in ("bottom", "middle", "top")]
    ours: dict[str, Any] = {f"recall_{name}": value for name, value in accuracy.items()}
    ours["recall_cost_of_attention"] = MASFormer(full=1, span=16).cost(4, 64)
    holds = max(one_full) >= accuracy["dense"] - BELOW and accuracy["no full layer"] <= max(one_full) - SHORT
    if full:
        found, more = copying_by_placement(seed, device)
        rows += more
        ours |= {f"copy_{name}": value for name, value in found.items()}
        losses, more = convert_embedded(seed, device)
        rows += more
        ours |= losses
        gap = (
            min(losses[f"text_loss_{place}"] for place in ("bottom", "even")) / losses["text_loss_dense"] - 1
        )
        ours["text_loss_increase"] = gap
        cheap = losses["text_cost_of_attention"] <= 1 - PAPER_SAVES
        holds = holds and gap <= TOLERANCE and cheap
    return {
        "slug": "masformer",
        "claim": CLAIM,
        "paper": {
            "cost_of_attention_lower_by": PAPER_SAVES,
            "measured_on": "a 1.3B model at 8K tokens: language modelling and generation",
        },
        "ours": ours,
        "differs": (
            "a model of four layers that recalls pairs from 64 tokens, with blocks of 16"
            + (
                "; SmolLM2-135M at 2048 tokens with blocks of 256 and 2.5 M tokens of Python's sources"
                if full
                else ""
            )
            + ", not a 1.3B model at 8192 tokens; training is a matter of minutes; the layout that recalls "
            "saves 55 % of attention's cost at 64 tokens, not 75 %; of the placements the best one on the "
            "held-out text counts"
        ),
        "holds": bool(holds),
        "rows": rows,
    }


def recall_by_placement(seed: int, device: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """A dense model learns to recall over distances beyond a block; then layouts take its place.

    Accuracy by layout after continued training, and the curves.
    """
    keys, values, length = 6, 8, 64
    layouts: dict[str, MASFormer | None] = {
        "dense": None,
        "no full layer": MASFormer(full=0, span=16),
        **{place: MASFormer(full=1, placement=place, span=16) for place in ("bottom", "middle", "top")},
    }

    def batches(batch: int, seed: int) -> Iterable[Batch]:
        return pair_batches(batch, length, keys, values, queries=2 * keys, seed=seed)

    held_out = list(itertools.islice(batches(128, seed + 1000), 2))
    start = small_model(
        "smoke", vocab=pair_vocab(keys, values), length=length, layers=4, seed=seed, initializer_range=0.1
    ).to(device)
    first = train(start, None, batches(32, seed), 110, lr=3e-3, evaluate_on=held_out, label="recall, before")
    rows = [{**row, "task": "recall"} for row in first.curve]
    accuracy = {}
    for name, layout in layouts.items():
        trained = continue_training(
            copy.deepcopy(start),
            layout,
            batches(32, seed + 1),
            60,
            held_out,
            lr=2e-3,
            label=f"recall, {name}",
        )
        rows += [{**row, "task": "recall"} for row in trained.curve]
        accuracy[name] = trained.last["accuracy"]
    return accuracy, rows


def copying_by_placement(seed: int, device: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Models trained from scratch to copy over a distance beyond a block: accuracy by placement, curves.

    Copying takes two steps of attention, to the token before and to the earlier occurrence. Blocks can do
    the first; where the full layer lies decides whether the second can use it.
    """
    length, span, layers = 128, 32, 4

    def batches(batch: int, seed: int) -> Iterable[Batch]:
        return copy_batches(batch, length, segment=24, distance=2 * span, vocab=64, seed=seed)

    held_out = list(itertools.islice(batches(128, seed + 1000), 2))
    layouts: dict[str, MASFormer | None] = {"dense": None, "no full layer": MASFormer(full=0, span=span)}
    layouts |= {p: MASFormer(full=1, placement=p, span=span) for p in ("bottom", "middle", "top")}
    accuracy, rows = {}, []
    for name, layout in layouts.items():
        model = small_model(
            "smoke", vocab=64, length=length, layers=layers, hidden=128, head_dim=32, seed=seed
        )
        trained = train(
            model.to(device),
            layout,
            batches(128, seed),
            400,
            lr=2e-3,
            evaluate_on=held_out,
            label=f"copy, {name}",
        )
        rows += [{**row, "task": "copy"} for row in trained.curve]
        accuracy[name] = trained.last["accuracy"]
    return accuracy, rows


def convert_embedded(
    seed: int, device: str, *, length: int = 2048, span: int = 256, batch: int = 8, steps: int = 150
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """SmolLM2-135M with four full layers of thirty, with none, and dense, on equal tokens of source code.

    Losses before and after, and the curves, with the loss by block of positions: only behind the first
    block can layouts differ.
    """
    loaded = load_embedded()
    data = text_data(loaded.tokenizer, max_bytes=2**24)
    held_out = data.validation(batch, length, count=2)
    layouts: dict[str, MASFormer | None] = {
        "dense": None,
        "no_full_layer": MASFormer(full=0, span=span),
        "bottom": MASFormer(full=4, placement="bottom", span=span),
        "even": MASFormer(full=4, placement="even", span=span),
    }
    config: Any = loaded.model.config
    cost = MASFormer(full=4, span=span).cost(config.num_hidden_layers, length)
    found: dict[str, float] = {"text_cost_of_attention": cost}
    rows: list[dict[str, Any]] = []
    for name, layout in layouts.items():
        model = copy.deepcopy(loaded.model).to(device)
        trained = continue_training(
            model,
            layout,
            data.batches(batch, length, seed),
            steps,
            held_out,
            lr=1e-4,
            buckets=length // span,
            label=f"text, {name}",
        )
        rows += [{**row, "task": "text"} for row in trained.curve]
        found[f"text_loss_{name}_untrained"] = trained.curve[0]["loss"]
        found[f"text_loss_{name}"] = trained.last["loss"]
    return found, rows
