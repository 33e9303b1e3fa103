"""What claims about trained methods share: a small decoder, real text, recall tasks, one training loop.

A claim trains the same small model several times, each time with another method on its attention, and
compares the curves at equal tokens::

    data = text_data(tokenizer, max_bytes=2**24)
    model = small_model(length=1024)
    dense = train(model, None, data.batches(8, 1024), 500, evaluate=data.validation(4, 1024))

``train`` puts the method on the model with ``sl.apply``, optimises the model's and the method's own
parameters together, and takes the method off again; ``dense.curve`` holds rows for a report.
"""

from __future__ import annotations

import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

import sparseland as sl
from sparseland.errors import SparselandError
from sparseland.method import Calibration, Method
from sparseland.models.tiny import tiny_model

# Target of a position that is not scored.
IGNORE = -100
MAX_FILE_BYTES = 2**18
# Every so-many-th source file is kept for validation.
VALIDATION_EVERY = 16


@dataclass(frozen=True)
class Batch:
    """Token ids, and what each position should predict (:data:`IGNORE`: not scored)."""

    ids: Int[Tensor, "B N"]
    targets: Int[Tensor, "B N"]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(self.ids.to(device), self.targets.to(device))


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


# ------------------------------------------------------------- real text


@dataclass(frozen=True)
class TextData:
    """Tokens of real text, split by file into training and validation."""

    train: Int[Tensor, " N"]
    valid: Int[Tensor, " N"]
    vocab: int

    def batches(self, batch: int, length: int, seed: int = 0) -> Iterator[Batch]:
        """Windows at random places of the training text, without end."""
        _check_room(self.train, length)
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(self.train.numel() - length, (batch,), generator=generator)
            yield _lm_batch(self.train, starts.tolist(), length)

    def validation(self, batch: int, length: int, count: int = 4) -> list[Batch]:
        """``count`` batches of windows, evenly spread over the validation text."""
        _check_room(self.valid, length)
        room, total = self.valid.numel() - length - 1, batch * count
        starts = [i * room // max(total - 1, 1) for i in range(total)]
        return [_lm_batch(self.valid, starts[i : i + batch], length) for i in range(0, total, batch)]


def text_data(tokenizer: Any, *, max_bytes: int = 2**25, vocab: int | None = None) -> TextData:
    """Python's own sources and documentation on this machine, in a tokenizer's tokens (kept in memory).

    Files are taken in order of their names, every 16th for validation. With ``vocab`` the rare tokens
    become one: ids are renumbered by frequency and everything after ``vocab - 1`` becomes id 0, so that a
    tiny model need not carry a large embedding.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_bytes: about how much text to read (the files are spread over the whole library).
        vocab: size of the vocabulary; None keeps the tokenizer's.

    Raises:
        SparselandError: the standard library's sources are not on this machine.
    """
    return _text_data(_Hashed(tokenizer), max_bytes, vocab)


class _Hashed:
    """A tokenizer as a cache key: equal if it is the same vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.key = (type(tokenizer).__name__, tokenizer.name_or_path, len(tokenizer))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.key == other.key


@cache
def _text_data(hashed: _Hashed, max_bytes: int, vocab: int | None) -> TextData:
    texts = list(stdlib_texts(max_bytes))
    tokenizer = hashed.tokenizer
    parts = []
    for at in range(0, len(texts), 64):  # a batch of files at a time: the tokenizer's lists are large
        lists = tokenizer(texts[at : at + 64], add_special_tokens=False, verbose=False)["input_ids"]
        parts += [torch.tensor(ids, dtype=torch.int32) for ids in lists]
    end = torch.tensor([tokenizer.eos_token_id or 0], dtype=torch.int32)
    split: dict[bool, list[Tensor]] = {True: [], False: []}
    last = min(VALIDATION_EVERY, len(parts)) - 1
    for i, part in enumerate(parts):
        split[i % VALIDATION_EVERY == last] += [part, end]
    train, valid = (torch.cat(split[key]).long() for key in (False, True))
    size = len(tokenizer)
    if vocab is not None and vocab < size:
        counts = torch.bincount(train, minlength=size)
        common = counts.argsort(descending=True, stable=True)[: vocab - 1]
        renumbered = torch.zeros(size, dtype=torch.long)
        renumbered[common] = torch.arange(1, vocab)
        train, valid, size = renumbered[train], renumbered[valid], vocab
    return TextData(train, valid, size)


def stdlib_texts(max_bytes: int) -> Iterator[str]:
    """UTF-8 sources and documentation of the standard library, and the default text, about ``max_bytes``."""
    from sparseland.tasks.text import default_text

    root = Path(sysconfig.get_path("stdlib"))
    # Larger files are tables rather than text, and a small sample should hold more than one file.
    largest = min(MAX_FILE_BYTES, max_bytes // VALIDATION_EVERY)
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix in (".py", ".txt", ".rst")
        and not skipped.intersection(path.relative_to(root).parts)
        and path.is_file()
        and 0 < path.stat().st_size <= largest
    ]
    if len(files) < VALIDATION_EVERY:
        raise SparselandError(f"no text to train on: {root} holds {len(files)} source files")
    total = sum(path.stat().st_size for path in files)
    step = max(1, round(total / max_bytes))
    taken = 0
    for path in files[::step]:
        if taken >= max_bytes:
            return
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # the library's own tests hold files in other encodings
        taken += len(text)
        yield text
    if taken < max_bytes:
        yield default_text()[: max_bytes - taken]


def _check_room(ids: Tensor, length: int) -> None:
    if ids.numel() <= length + 1:
        raise SparselandError(f"the text has {ids.numel()} tokens; windows of {length} need more")


def _lm_batch(ids: Tensor, starts: Sequence[int], length: int) -> Batch:
    rows = torch.stack([ids[s : s + length + 1] for s in starts])
    return Batch(rows[:, :-1], rows[:, 1:])


# --------------------------------------------------------- recall tasks


def recall_batches(
    batch: int,
    length: int,
    pairs: int,
    *,
    vocab: int = 256,
    queries: int | None = None,
    seed: int = 0,
) -> Iterator[Batch]:
    """Multi-query associative recall (Arora et al. 2023, "Zoology"), without end.

    The first half of the sequence holds ``pairs`` pairs (a key and, right behind it, its value) at random
    places among noise tokens; the second half asks for ``queries`` of the keys, again among noise. At a
    query the target is the key's value; nothing else is scored. Ids: noise, then keys, then values, a
    half, a quarter and a quarter of the vocabulary.
    """
    queries = pairs if queries is None else queries
    noise, some = vocab // 2, vocab // 4
    half = length // 2
    if not 0 < pairs <= min(some, half // 2) or not 0 < queries <= length - half:
        raise SparselandError(
            f"recall_batches: {pairs} pairs and {queries} queries do not fit {length} tokens and {some} keys"
        )
    g = torch.Generator().manual_seed(seed)
    rows = torch.arange(batch)[:, None]
    while True:
        ids = torch.randint(noise, (batch, length), generator=g)
        targets = torch.full((batch, length), IGNORE)
        keys = torch.rand(batch, some, generator=g).argsort(-1)[:, :pairs] + noise
        values = torch.randint(some, (batch, pairs), generator=g) + noise + some
        # Pairs take two slots each of `half - pairs` units, so that none overlap.
        place = torch.rand(batch, half - pairs, generator=g).argsort(-1)[:, :pairs].sort(-1).values
        place = place + torch.arange(pairs)
        ids[rows, place], ids[rows, place + 1] = keys, values
        asked = torch.randint(pairs, (batch, queries), generator=g)
        where = half + torch.rand(batch, length - half, generator=g).argsort(-1)[:, :queries]
        ids[rows, where] = keys.gather(1, asked)
        targets[rows, where] = values.gather(1, asked)
        yield Batch(ids, targets)


def copy_batches(
    batch: int, length: int, segment: int, distance: int, *, vocab: int = 64, seed: int = 0
) -> Iterator[Batch]:
    """Induction: random tokens in which one segment comes again at least ``distance`` later, without end.

    Scored are the repeated tokens from the second on, each predicted from the one before it: whoever finds
    the earlier occurrence of the current token can copy what followed. Place and distance are random, so
    that no fixed look back will do.
    """
    if not 1 < segment <= distance or distance + segment > length:
        raise SparselandError(
            f"copy_batches: a segment of {segment} at distance {distance} does not fit {length} tokens"
        )
    g = torch.Generator().manual_seed(seed)
    rows, steps = torch.arange(batch)[:, None], torch.arange(segment)
    while True:
        ids = torch.randint(vocab, (batch, length), generator=g)
        far = distance + torch.randint(length - distance - segment + 1, (batch, 1), generator=g)
        room = length - far - segment + 1
        first = (torch.rand(batch, 1, generator=g) * room).long() + steps
        ids[rows, first + far] = ids[rows, first]
        targets = torch.full((batch, length), IGNORE)
        targets[rows, (first + far)[:, :-1]] = ids[rows, first[:, 1:]]
        yield Batch(ids, targets)


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
