"""Multi-query recall in one hop: what a query token asks for lies in a single earlier token.

In associative recall a model must first learn to look one token back, which takes it thousands of steps
before the first query can be answered. Here a pair is one token, so a step of attention by content finds it,
and what is left to measure is which tokens a pattern lets a query see.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparseland.claims._training import IGNORE, Batch


def pair_vocab(keys: int, values: int) -> int:
    """Token ids in use: one noise token, the queries, and all pairs."""
    return 1 + keys + keys * values


def pair_batches(
    batch: int, length: int, keys: int, values: int, *, queries: int, seed: int = 0
) -> Iterator[Batch]:
    """Each key's pair stands once, at a random place of the first half; the second half asks, without end.

    A query is scored right where it stands: its target is the value of its key's pair, as a token id below
    ``values``. Everything else is the noise token, id 0. Queries are the ids from 1, pairs those after.
    """
    g = torch.Generator().manual_seed(seed)
    rows, half = torch.arange(batch)[:, None], length // 2
    while True:
        ids = torch.zeros(batch, length, dtype=torch.long)
        targets = torch.full((batch, length), IGNORE)
        value = torch.randint(values, (batch, keys), generator=g)
        place = torch.rand(batch, half, generator=g).argsort(-1)[:, :keys]
        ids[rows, place] = 1 + keys + torch.arange(keys) * values + value
        asked = torch.randint(keys, (batch, queries), generator=g)
        where = half + torch.rand(batch, length - half, generator=g).argsort(-1)[:, :queries]
        ids[rows, where] = 1 + asked
        targets[rows, where] = value.gather(1, asked)
        yield Batch(ids, targets)
