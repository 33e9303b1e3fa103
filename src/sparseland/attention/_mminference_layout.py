"""Where a prompt's text and vision lie: runs, video segments, and position lists, all known to the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.attention._shape_index import BLOCK

# Shorter stretches of vision have no grid worth finding; in a grid their tokens are on a line, like text.
MIN_SPAN = 256
# Frames of one size with no more text between them than this (time stamps) are one video.
MAX_BETWEEN = 32


@dataclass(frozen=True)
class Layout:
    """A prompt's runs of one modality.

    Args:
        n: tokens.
        runs: ``(start, end, whether vision)``, in order, covering everything.
        segments: per video, its runs (one, or frames with a little text between them).
    """

    n: int
    runs: tuple[tuple[int, int, bool], ...]
    segments: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def mixed(self) -> bool:
        """Whether there is both text and vision."""
        return len({kind for _, _, kind in self.runs}) > 1

    @property
    def has_vision(self) -> bool:
        """Whether there is any vision."""
        return any(kind for _, _, kind in self.runs)

    def of_kind(self, kind: str, low: int = 0) -> list[tuple[int, int]]:
        """The runs of ``text``, ``vision`` or ``all`` tokens from position ``low`` on."""
        runs = (
            [(0, self.n)] if kind == "all" else [(s, e) for s, e, v in self.runs if v == (kind == "vision")]
        )
        return [(max(s, low), e) for s, e in runs if e > low]

    def frames(self, segment: int) -> int | None:
        """The size of a segment's frames, where text between them shows it."""
        runs = self.segments[segment]
        return runs[0][1] - runs[0][0] if len(runs) > 1 else None


def layout_of(vision: Bool[Tensor, " N"]) -> Layout:
    """Runs and segments of a prompt (the last few prompts' are remembered)."""
    return _layout(vision.cpu().numpy().tobytes())


@lru_cache(maxsize=16)
def _layout(flags: bytes) -> Layout:
    runs: list[tuple[int, int, bool]] = []
    vision = torch.frombuffer(bytearray(flags), dtype=torch.bool) if flags else torch.zeros(0).bool()
    edges = (vision[1:] != vision[:-1]).nonzero().flatten().add(1).tolist()
    for start, end in zip([0, *edges], [*edges, len(vision)], strict=True):
        runs.append((start, end, bool(vision[start])))
    segments: list[tuple[tuple[int, int], ...]] = []
    for start, end, kind in runs:
        if not kind:
            continue
        last = segments[-1] if segments else ()
        if last and start - last[-1][1] <= MAX_BETWEEN and end - start == last[-1][1] - last[-1][0]:
            segments[-1] = (*last, (start, end))
        else:
            segments.append(((start, end),))
    long = tuple(s for s in segments if sum(e - b for b, e in s) >= MIN_SPAN)
    return Layout(len(vision), tuple(runs), long)


@lru_cache(maxsize=16)
def slots(layout: Layout, kind: str, low: int, device: torch.device) -> Int[Tensor, " S"]:
    """Positions of the tokens of a kind from ``low`` on, each run filled up to whole blocks with -1 (int32).

    So every block of slots is one stretch of positions.
    """
    parts = []
    for start, end in layout.of_kind(kind, low):
        positions = torch.arange(start, end, dtype=torch.int32)
        parts.append(torch.nn.functional.pad(positions, (0, -len(positions) % BLOCK), value=-1))
    return (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)).to(device)


@lru_cache(maxsize=16)
def positions(layout: Layout, kind: str, low: int, device: torch.device) -> Int[Tensor, " n"]:
    """Positions of the tokens of a kind from ``low`` on (int64)."""
    parts = [torch.arange(start, end) for start, end in layout.of_kind(kind, low)]
    return (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)).to(device)


@lru_cache(maxsize=16)
def segment_positions(layout: Layout, segment: int, device: torch.device) -> Int[Tensor, " n"]:
    """Positions of a segment's tokens (int64)."""
    return torch.cat([torch.arange(start, end) for start, end in layout.segments[segment]]).to(device)


@lru_cache(maxsize=16)
def kind_mask(layout: Layout, kind: str, device: torch.device) -> Bool[Tensor, " N"]:
    """True at the tokens of a kind."""
    mask = torch.zeros(layout.n, dtype=torch.bool)
    for start, end in layout.of_kind(kind):
        mask[start:end] = True
    return mask.to(device)


def last_positions(runs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The runs of the last ``count`` positions."""
    found: list[tuple[int, int]] = []
    for start, end in reversed(runs):
        if count <= 0:
            break
        found.insert(0, (max(start, end - count), end))
        count -= end - start
    return found


@lru_cache(maxsize=256)
def at(runs: tuple[tuple[int, int], ...], device: torch.device) -> Int[Tensor, " n"]:
    """The positions of some runs, one after the other."""
    return torch.cat([torch.arange(start, end) for start, end in runs]).to(device)
