"""MInference's offline part: which shape, and which sizes, each head gets (the paper's algorithm 1).

Every candidate is grown or shrunk until it costs as much as the paper's A-shape; then all are run, and a
head takes the one whose attention output is nearest to dense. What is equal is the number of computed pairs,
or the time that this library's ops take for them on the device at hand (the paper's "kernel-aware" cost).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.attention._head_shapes import HeadShape
from sparseland.attention._shape_index import LayerIndex, Sizes
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs
from sparseland.ops.attend import attend
from sparseland.patterns import Pattern, WindowPattern

# The paper's target cost: an A-shape of these sinks and this window, on a text of about 30k tokens.
TARGET = (1024, 4096)
TARGET_LENGTH = 30_000
# Candidates, (vertical, slash): the default budget's proportion and the paper's. Only proportions count
# here, since all are scaled to the target's cost.
VERTICAL_SLASH = ((1000, 6096), (30, 2048), (100, 1800), (500, 1500), (3000, 200))
_STEPS = 16  # halvings of the interval in which a candidate's size is searched
_MATCHES = 5  # times that a candidate is resized until its time is the target's
_RUNS = 5  # timings of which the median counts


@dataclass
class Candidate:
    """One family of shapes at matched cost, for all heads of a layer.

    Args:
        shape: the shape's name.
        sizes: vertical, slash and blocks per head, ``[3, H]``.
        error: squared error of the attention output per head, ``[H]`` float64.
    """

    shape: str
    sizes: Float[Tensor, "3 H"]
    error: Float[Tensor, " H"]


def target_for(length: int) -> tuple[int, int]:
    """Sinks and window of the target on ``length`` tokens.

    A budget that covers most pairs tells shapes apart no better than dense does, so a shorter text than the
    paper's is searched with a smaller target, in proportion.
    """
    factor = min(1.0, length / TARGET_LENGTH)
    return max(1, round(TARGET[0] * factor)), max(1, round(TARGET[1] * factor))


def search(model: nn.Module, ids: Int[Tensor, "B N"], cost: str = "pairs") -> list[list[HeadShape]]:
    """The best shape per layer and query head on ``ids``, with sizes as for 30k tokens.

    Row by row; errors and sizes are averaged. ``cost``, ``pairs`` or ``time``, is what candidates have in
    common.
    """
    # transformers stays unloaded until a model is really searched.
    from sparseland.models.capture import capture_qkv

    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise SparselandError(
            f"minference: calibration needs token ids [B, N] with N >= 2, got {list(ids.shape)}"
        )
    found: dict[int, list[list[Candidate]]] = {}
    sinks, window = target_for(ids.shape[1])
    for row in ids:
        for x in capture_qkv(model, row[None]):
            found.setdefault(x.layer, []).append(search_layer(x, sinks, window, cost))
    if not found:
        raise SparselandError(f"minference: {type(model).__name__} has no attention layer to search")
    grow = max(1.0, TARGET_LENGTH / ids.shape[1])
    rows = [choose(found[i]) if i in found else [] for i in range(max(found) + 1)]
    # The number of blocks per row belongs to a proportion of the prompt just as tokens do.
    return [[head.scaled(grow) for head in row] for row in rows]


@torch.no_grad()
def search_layer(x: AttentionInputs, sinks: int, window: int, cost: str = "pairs") -> list[Candidate]:
    """All candidates of one layer, at the cost of an A-shape with these sinks and this window."""
    index = LayerIndex(x, ranked=True)
    n, heads, device = index.n_keys, index.heads, x.q.device
    dense = attend(x.q, x.k, x.v, WindowPattern.dense(index.n_queries, n), scale=x.scale).float()

    def candidate(shape: str, sizes: Sizes) -> Candidate:
        out = attend(x.q, x.k, x.v, index.pattern(sizes), scale=x.scale).float()
        error = (out - dense).double().square().sum((0, 2, 3))
        return Candidate(shape, torch.stack([sizes.vertical, sizes.slash, sizes.blocks]).double(), error)

    target = Sizes.of([HeadShape("a-shape", sinks, window)] * heads, n, device)
    pairs = index.pairs(target).double().mean(0)
    seconds = _seconds(x, index.pattern(target)) if cost == "time" else None

    def matched(family: Callable[[Tensor], Sizes], most: float) -> Sizes:
        sizes = _largest(index, pairs, family, most)
        return sizes if seconds is None else _match_time(index, pairs, family, most, sizes, seconds)

    # The A-shape comes first and wins ties: it needs no probe.
    found = [candidate("a-shape", target)]
    for v, s in VERTICAL_SLASH:
        sizes = matched(_proportion(v, s, index), n / max(v, s))
        found.append(candidate("vertical-slash", sizes))
    found.append(candidate("block-sparse", matched(_top_blocks(index), float(index.columns))))
    return found


def _match_time(
    index: LayerIndex,
    pairs: Float[Tensor, " H"],
    family: Callable[[Tensor], Sizes],
    most: float,
    sizes: Sizes,
    seconds: float,
) -> Sizes:
    """The family's member whose computation takes ``seconds`` for all heads of the layer together.

    Time per pair is a matter of the kind of pattern, not of the head, so heads keep equal pairs and the
    pairs are scaled until the time fits.
    """
    share = 1.0
    for _ in range(_MATCHES):
        share *= min(4.0, max(0.25, seconds / _seconds(index.x, index.pattern(sizes))))
        sizes = _largest(index, pairs * share, family, most)
    return sizes


def _seconds(x: AttentionInputs, pattern: Pattern) -> float:
    """How long the computation of a pattern takes on the device at hand: the median of a few runs, warm."""

    def run() -> float:
        start = time.perf_counter()
        attend(x.q, x.k, x.v, pattern, scale=x.scale)
        if x.q.is_cuda:
            torch.cuda.synchronize(x.q.device)
        return time.perf_counter() - start

    run()
    return statistics.median(run() for _ in range(_RUNS))


def _proportion(vertical: int, slash: int, index: LayerIndex) -> Callable[[Tensor], Sizes]:
    """Vertical-slash sizes in this proportion, by a factor per head."""
    floors = Sizes.of([HeadShape("vertical-slash")] * index.heads, index.n_keys, index.device)

    def sizes(factor: Float[Tensor, " H"]) -> Sizes:
        columns = (factor * vertical).round().long().maximum(floors.vertical).clamp(max=index.n_keys)
        diagonals = (factor * slash).round().long().maximum(floors.slash).clamp(max=index.n_keys)
        return replace(
            floors, vertical=columns, slash=diagonals,
            most_verticals=int(columns.max()), most_slashes=int(diagonals.max()),
        )  # fmt: skip

    return sizes


def _top_blocks(index: LayerIndex) -> Callable[[Tensor], Sizes]:
    """Block-sparse sizes, by the number of blocks per head."""
    one = Sizes.of([HeadShape("block-sparse", blocks=1)] * index.heads, index.n_keys, index.device)

    def sizes(factor: Float[Tensor, " H"]) -> Sizes:
        blocks = factor.floor().long().clamp(min=1)
        return replace(one, blocks=blocks, most_blocks=int(blocks.max()))

    return sizes


def _largest(
    index: LayerIndex, cost: Float[Tensor, " H"], sizes: Callable[[Tensor], Sizes], most: float
) -> Sizes:
    """Per head the largest candidate that computes no more than ``cost`` pairs (or the smallest there is).

    Selections are nested in their size, so the cost grows with it and bisection finds the edge; the
    authors go there in steps of 50 tokens.
    """
    low = torch.zeros(index.heads, dtype=torch.float64, device=index.device)
    high = torch.full_like(low, most)
    fits = index.pairs(sizes(high)).double().mean(0) <= cost
    low = torch.where(fits, high, low)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        fits = index.pairs(sizes(middle)).double().mean(0) <= cost
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return sizes(low)


def choose(rows: list[list[Candidate]]) -> list[HeadShape]:
    """Per head the family with the smallest summed error; its sizes averaged over the texts."""
    names = [c.shape for c in rows[0]]
    error = torch.stack([torch.stack([c.error for c in row]) for row in rows]).sum(0)  # [C, H]
    sizes = torch.stack([torch.stack([c.sizes for c in row]) for row in rows]).mean(0)  # [C, 3, H]
    return list(_shapes(names, error.argmin(0), sizes.round().long().cpu()))


def _shapes(names: list[str], best: Tensor, sizes: Int[Tensor, "C 3 H"]) -> Iterator[HeadShape]:
    for head, c in enumerate(best.tolist()):
        vertical, slash, blocks = sizes[c, :, head].tolist()
        if names[c] == "block-sparse":
            yield HeadShape(names[c], blocks=blocks)
        else:
            yield HeadShape(names[c], vertical, slash)
