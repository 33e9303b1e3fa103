"""What small models of claims are trained on: real text from this machine, and tasks of recall."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparseland.errors import SparselandError

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
