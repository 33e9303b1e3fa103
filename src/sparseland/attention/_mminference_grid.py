"""The grid head: the stride and phase of a video's frames, and the order that makes its lines dense.

Per video (a contiguous span, or frames with a little text between them) and head, with ranks r = 0 … n-1
of its tokens and the attention A of its last 64 queries to its keys beyond the base::

    score(s) = max_p sum_{r_j = p mod s} A_ij  +  sum_{r_i = r_j mod s} A_ij  -  2 / s

The first sum is the vertical lines of phase p, the second the diagonals at multiples of s; 1 / s is what
each would be worth if attention were flat, so that neither a divisor nor a multiple of the stride wins.
Computed are the keys of the best phases for all queries, the queries of these phases over all keys (what
gathers a frame must see all of it), and for every other query the keys of its own place. Sorted by place,
with the lines first, these are a strip of columns, a strip of rows and blocks along the diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseland.attention._mminference_heads import Shape
from sparseland.attention._mminference_index import FAR, MixedIndex, grouped_product
from sparseland.attention._mminference_layout import at, last_positions, positions, segment_positions
from sparseland.attention._shape_index import BLOCK, LOCAL, PROBE, SINKS
from sparseland.ops.block_scores import vertical_slash_scores
from sparseland.ops.permuted_attention import on_device
from sparseland.ops.top_values import top_mask
from sparseland.patterns import Part

CANDIDATES = 6  # strides that are tried exactly, by diagonals and by columns each
SMALLEST, LARGEST = 8, 4096  # tokens of a frame
NEIGHBOURS = 2  # tried around a known stride: separator tokens shift it


def find_strides(
    index: MixedIndex, segment: int, heads: Sequence[int]
) -> tuple[Int[Tensor, "B h"], Float[Tensor, "B h S"], Float[Tensor, "B h"]] | None:
    """Stride, mass of each place, and score of one video for some heads; None if no query probes it."""
    x, layout = index.x, index.layout
    where = segment_positions(layout, segment, index.device)
    own = [(max(s, x.offset), e) for s, e in layout.segments[segment] if e > x.offset]
    runs = last_positions(own, PROBE)
    if not runs:  # a video of an earlier chunk: what this chunk's vision makes of its columns
        end = layout.segments[segment][-1][1]
        runs = last_positions([(s, e) for s, e in layout.of_kind("vision", x.offset) if s >= end], PROBE)
    if not runs:
        return None
    rows = at(tuple(runs), index.device)
    span = layout.segments[segment]
    keys = x.k[:, :, span[0][0] : span[0][1]] if len(span) == 1 else x.k.index_select(2, where)
    scores = grouped_product(x.q.index_select(2, rows - x.offset), keys) * x.scale
    scores = scores.index_select(1, on_device(tuple(heads), index.device))
    p = scores.masked_fill_(where > rows[:, None], -torch.inf).softmax(-1)
    # What the base computes anyway says nothing about lines.
    p = p.nan_to_num(0.0).masked_fill_((where > rows[:, None] - LOCAL) | (where < SINKS), 0.0)
    total = p.sum((2, 3)).clamp(min=torch.finfo(p.dtype).tiny)[..., None]
    n = len(where)
    columns = p.sum(2) / total
    # Own queries are the video's last, so distances are those of ranks; others know no ranks.
    slash = vertical_slash_scores(p.contiguous())[1] / total if own else torch.zeros_like(columns)
    return best_stride(columns, slash, _hints(index, segment, n))


def _hints(index: MixedIndex, segment: int, n: int) -> tuple[int, ...]:
    """Strides to try in any case: what the model's call says, and frames that text sets apart."""
    known = {*index.x.strides, *([f] if (f := index.layout.frames(segment)) else [])}
    near = {s + d for s in known for d in range(-NEIGHBOURS, NEIGHBOURS + 1)}
    return tuple(sorted(s for s in near if SMALLEST <= s <= _largest(n)))


def _largest(n: int) -> int:
    """A stride of which a video of n tokens shows at least three periods."""
    return max(SMALLEST, min(n // 3, LARGEST))


def best_stride(
    columns: Float[Tensor, "B h n"], slash: Float[Tensor, "B h n"], hints: tuple[int, ...] = ()
) -> tuple[Int[Tensor, "B h"], Float[Tensor, "B h S"], Float[Tensor, "B h"]]:
    """The stride of the highest score, the column mass of each of its places, and the score.

    Args:
        columns: the probe's attention by key, a part of 1 each.
        slash: the same by distance.
        hints: strides that are tried besides the most promising ones.
    """
    n, device = columns.shape[-1], columns.device
    largest = _largest(n)
    share = _over_multiples(slash, largest)  # [B, h, largest + 1]: mass at multiples of each stride
    count = _over_multiples(torch.ones(n, device=device), largest)
    by_slash = share - count / n
    # Peaks of columns that repeat: their correlation with themselves, by FFT.
    peaks = (columns - columns.mean(-1, keepdim=True)).clamp(min=0)
    spectrum = torch.fft.rfft(peaks, 2 * n)
    repeats = torch.fft.irfft(spectrum.abs().square(), 2 * n)[..., :n]
    repeats = repeats - repeats[..., 1:].mean(-1, keepdim=True)
    by_columns = _over_multiples(repeats, largest)
    found = []
    for scores in (by_slash, by_columns):
        scores[..., :SMALLEST] = -torch.inf
        found.append(scores.topk(min(CANDIDATES, largest - SMALLEST + 1), dim=-1).indices)
    if hints:
        found.append(on_device(hints, device).expand(*columns.shape[:2], -1))
    strides = torch.cat(found, -1)  # [B, h, K]
    rank = torch.arange(n, device=device)
    # Sums in fixed point: whole numbers add up to the same in any order.
    mass = (columns.double() * 2.0**40).round().long()
    best = torch.zeros(columns.shape[:2], dtype=torch.int64, device=device)
    top = torch.full(columns.shape[:2], -torch.inf, device=device)
    places = torch.zeros(*columns.shape[:2], largest + 1, device=device)
    for candidate in strides.unbind(-1):
        place = rank % candidate[..., None]
        held = torch.zeros(*columns.shape[:2], largest + 1, dtype=torch.int64, device=device)
        line = (held.scatter_add_(-1, place, mass) / 2.0**40).float()
        at_stride = share.gather(-1, candidate[..., None])[..., 0]
        score = line.amax(-1) + at_stride - 2.0 / candidate
        better = score > top
        best, top = torch.where(better, candidate, best), torch.where(better, score, top)
        places = torch.where(better[..., None], line, places)
    return best, places, top


def _over_multiples(values: Float[Tensor, "*batch n"], largest: int) -> Float[Tensor, "*batch s"]:
    """Per stride s <= largest the sum of the values at s, 2 s, 3 s, … (0 for strides 0 and 1)."""
    index, stops = _multiples(values.shape[-1], largest, values.device)
    # Differences of running sums: in float64, they are exact enough and the same at every run.
    running = F.pad(values[..., index].double().cumsum(-1), (1, 0))
    sums = running[..., stops[1:]] - running[..., stops[:-1]]
    return F.pad(sums, (2, 0)).to(values.dtype)


@lru_cache(maxsize=4)
def _multiples(n: int, largest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The multiples of 2, of 3, … of ``largest`` below n one after the other, and where each begins."""
    rows = [torch.arange(s, n, s) for s in range(2, largest + 1)]
    stops = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return torch.cat(rows).to(device), stops.to(device)


def grid(index: MixedIndex, a: str, b: str, heads: Sequence[int], shapes: Sequence[Shape]) -> list[Part]:
    """Lines and places of queries of kind a over keys of kind b, beyond the base.

    Text, and vision outside of videos, is part of the lines: it sees all and is seen by all. Where there is
    no video at all, :func:`~sparseland.attention.mminference.plan_pattern` makes no grid.
    """
    queries = positions(index.layout, a, index.x.offset, index.device)
    keys = positions(index.layout, b, 0, index.device)
    if not queries.numel() or not keys.numel():
        return []
    place, line = _places(index, heads, shapes)
    q_index, q_place = _sorted(queries, place, line)
    k_index, k_place = _sorted(keys, place, line)
    q_line, q_low, q_high, _, q_last = _of_blocks(q_index, q_place)
    k_line, k_low, k_high, k_first, k_last = _of_blocks(k_index, k_place)
    # Blocks whose every key comes after every query, or belongs to the base, are left out.
    useful = k_last >= SINKS

    def mask(start: int, stop: int) -> Bool[Tensor, "B h m Mk"]:
        rows = slice(start, stop)
        same = (q_low[..., rows, None] <= k_high[..., None, :]) & (
            k_low[..., None, :] <= q_high[..., rows, None]
        )
        wanted = same | q_line[..., rows, None] | k_line[..., None, :]
        past = k_first[..., None, :] <= q_last[..., rows, None] - LOCAL
        return wanted & past & useful[..., None, :]

    return index.listed(heads, q_index, k_index, mask)


def _places(
    index: MixedIndex, heads: Sequence[int], shapes: Sequence[Shape]
) -> tuple[Int[Tensor, "B h Nk"], Bool[Tensor, "B h Nk"]]:
    """Per token and head a number for its place in its video's frames, and whether it is on a line."""
    shape = (index.batch, len(heads), index.n_keys)
    place = torch.zeros(shape, dtype=torch.int64, device=index.device)
    line = torch.ones(shape, dtype=torch.bool, device=index.device)
    wanted = on_device(tuple(s.lines for s in shapes), index.device)
    offset = 1
    for segment in range(len(index.layout.segments)):
        where = segment_positions(index.layout, segment, index.device)
        target = where.expand(*shape[:2], -1)
        known = (segment, tuple(heads))
        if known not in index.strides:
            index.strides[known] = find_strides(index, segment, heads)
        found = index.strides[known]
        if found is None:
            own, on_line = torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool)
            largest = 1
        else:
            stride, mass, _ = found
            largest = mass.shape[-1]
            own = torch.arange(len(where), device=index.device) % stride[..., None]
            real = torch.arange(largest, device=index.device) < stride[..., None]
            best = top_mask(mass.masked_fill(~real, -1.0), wanted.expand(shape[:2]).clamp(max=largest))
            on_line = (best & real).gather(-1, own)
        place.scatter_(-1, target, own + offset)
        line.scatter_(-1, target, on_line)
        offset += largest
    return place, line


def _sorted(
    tokens: Int[Tensor, " n"], place: Int[Tensor, "B h Nk"], line: Bool[Tensor, "B h Nk"]
) -> tuple[Int[Tensor, "B h S"], Int[Tensor, "B h S"]]:
    """Slots of some tokens, lines first and then by place, and each slot's place (0: line, -1: empty).

    The lines fill whole blocks of their own, so that no block is half line.
    """
    key = torch.where(line, 0, place)[..., tokens]
    order = key.argsort(dim=-1, stable=True)
    n = len(tokens)
    lines = (key == 0).sum(-1, keepdim=True)
    slot = torch.arange(n, device=tokens.device).expand(key.shape)
    slot = slot + (slot >= lines) * (-lines % BLOCK)
    size = -(-(n + BLOCK - 1) // BLOCK) * BLOCK
    empty = key.new_full((*key.shape[:2], size), -1)
    index = empty.scatter(-1, slot, tokens[order])
    places = empty.scatter(-1, slot, key.gather(-1, order))
    return index.to(torch.int32), places


def _of_blocks(
    index: Int[Tensor, "B h S"], place: Int[Tensor, "B h S"]
) -> tuple[Bool[Tensor, "B h M"], Tensor, Tensor, Tensor, Tensor]:
    """Per block: whether it is line, its lowest and highest place, its first and last position."""
    index, place = (torch.unflatten(t, -1, (-1, BLOCK)) for t in (index, place))
    held = index >= 0
    off_line = place > 0
    low = torch.where(off_line, place, torch.iinfo(torch.int64).max).amin(-1)
    high = torch.where(off_line, place, -1).amax(-1)
    first = torch.where(held, index, FAR).amin(-1)
    return (place == 0).any(-1), low, high, first, index.amax(-1)
