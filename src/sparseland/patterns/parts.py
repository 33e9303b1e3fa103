"""Patterns put together: stretches of queries made one at a time, and parts for some of the heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.patterns.base import Pattern


@dataclass(frozen=True)
class PiecedPattern(Pattern):
    """A pattern that is made a stretch of queries at a time: all its lists at once would fill the memory.

    Going through the pieces makes the lists, and drops them again; their pairs are counted on the way.

    Args:
        make: called with ``(start, stop)``, gives the pattern of the queries ``[start, stop)`` of this call:
            ``stop - start`` queries, and keys up to the last of them, ``offset + stop``.
        stops: where the stretches end; the last is ``n_queries``.
    """

    make: Callable[[int, int], Pattern]
    stops: tuple[int, ...]
    _counted: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def pieces(self) -> Iterator[tuple[slice, Pattern]]:
        """The queries of each stretch, and their pattern, made now."""
        start, pairs = 0, []
        for stop in self.stops:
            piece = self.make(start, stop)
            pairs.append(piece.pairs())
            yield slice(start, stop), piece
            start = stop
        self._counted[:] = [torch.stack(pairs).sum(0)]

    def pairs(self) -> Int[Tensor, "B H"]:
        """Without work where the pieces have been gone through before."""
        if not self._counted:
            for _ in self.pieces():
                pass
        return self._counted[0]

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        masks = [pattern.mask() for _, pattern in self.pieces()]
        return torch.cat([torch.nn.functional.pad(m, (0, self.n_keys - m.shape[-1])) for m in masks], -2)


# Lists of one call that may exist at once.
_LIST_BYTES = 1 << 30


def in_pieces(
    make: Callable[[int, int], Pattern], n_queries: int, n_keys: int, block_size: int, row_bytes: int
) -> Pattern:
    """``make(0, n_queries)``, or a :class:`PiecedPattern` where that would take too much memory.

    Args:
        make: as of :class:`PiecedPattern`; it is called with multiples of ``block_size`` (or the end).
        n_queries: queries, the last of the keys.
        n_keys: keys.
        block_size: queries per query block.
        row_bytes: memory of one query block, of all batch rows and heads.
    """
    step = max(1, _LIST_BYTES // max(1, row_bytes)) * block_size
    if step >= n_queries:
        return make(0, n_queries)
    stops = (*range(step, n_queries, step), n_queries)
    return PiecedPattern(n_queries, n_keys, make, stops)


@dataclass(frozen=True)
class Part:
    """Some heads' pairs: a pattern, or a function that makes it when it is needed.

    Args:
        heads: the query heads that the pattern's head dimension stands for; None: all.
    """

    heads: tuple[int, ...] | None
    source: Pattern | Callable[[], Pattern]

    def pattern(self) -> Pattern:
        """The pattern, made now if it has to be."""
        return self.source if isinstance(self.source, Pattern) else self.source()


@dataclass(frozen=True)
class PartsPattern(Pattern):
    """The union of parts that have no pair in common, each for some of the heads.

    Args:
        batch: rows.
        heads: query heads of the whole.
        parts: their attention is merged per query by its log-sum-exp.
    """

    batch: int
    heads: int
    parts: tuple[Part, ...]

    def pairs(self) -> Int[Tensor, "B H"]:
        total: Tensor | None = None
        for part in self.parts:
            pairs = part.pattern().pairs()
            if total is None:
                total = torch.zeros(self.batch, self.heads, dtype=torch.int64, device=pairs.device)
            at = list(range(self.heads)) if part.heads is None else list(part.heads)
            total[:, at] += pairs.to(total.device).expand(self.batch, len(at))
        assert total is not None
        return total

    def mask(self) -> Bool[Tensor, "B H Nq Nk"]:
        shape = (self.batch, self.heads, self.n_queries, self.n_keys)
        total: Tensor | None = None
        for part in self.parts:
            mask = part.pattern().mask()
            if total is None:
                total = torch.zeros(shape, dtype=torch.bool, device=mask.device)
            at = list(range(self.heads)) if part.heads is None else list(part.heads)
            total[:, at] |= mask.to(total.device)
        assert total is not None
        return total
