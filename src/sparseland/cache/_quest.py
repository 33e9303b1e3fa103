"""Pages of keys with their smallest and largest values per channel, and the bound they put on attention.

Tang et al., *Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference* (2024), section 3. For a
page with channel-wise minimum m and maximum M::

    score(q) = sum_d max(q_d m_d, q_d M_d)  >=  max_{k in page} q . k
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.method import SelectState
from sparseland.patterns import cdiv


class PageBounds(SelectState):
    """A layer's page bounds, ``[B, Hkv, pages, 2 D]``: minima, then maxima; the last page grows.

    A left-padded row's pages begin at its first token, so that it has the pages that it would have alone.

    Args:
        page_size: tokens per page.
    """

    def __init__(self, page_size: int) -> None:
        super().__init__()
        self.page_size = page_size
        self.first: Int[Tensor, " B"] | None = None

    @property
    def rows(self) -> Float[Tensor, "B Hkv P C"]:
        """Bounds of the pages so far; a padded row's last ones may be empty (+inf, -inf)."""
        assert self._buffer is not None, "a decoding step came before any prompt"
        return self._buffer[:, :, : cdiv(self._length, self.page_size)]

    def push(self, new: Float[Tensor, "B Hkv n D"]) -> None:
        """Take in keys; several of them only where there is no padding (else see :meth:`rebuild`)."""
        n, start = new.shape[2], self._length
        self._reserve(new, cdiv(start + n, self.page_size))
        self._length = start + n
        assert self._buffer is not None
        dim = new.shape[3]
        if self.first is not None and n == 1:
            last = torch.div(start - self.first, self.page_size, rounding_mode="floor")
            at = last[:, None, None, None].expand(-1, new.shape[1], 1, 2 * dim)
            old = self._buffer.gather(2, at)
            self._buffer.scatter_(2, at, _tighter(old, new, new))
            return
        low, high = page_bounds(new, self.page_size, start % self.page_size)
        page = start // self.page_size
        part = self._buffer[:, :, page : page + low.shape[2]]
        part.copy_(_tighter(part, low, high))

    def rebuild(self, k: Float[Tensor, "B Hkv N D"], first_key: Int[Tensor, " B"]) -> None:
        """Bounds of all keys afresh, each row's pages from its first token on."""
        _, heads, n, dim = k.shape
        self.first, self._buffer, self._length = first_key.to(k.device), None, n
        self._reserve(k, cdiv(n, self.page_size))
        # Each row is moved to the left by its padding; what comes in at the end belongs to no page.
        source = torch.arange(n, device=k.device) + self.first[:, None]
        at = source.clamp(max=n - 1)[:, None, :, None].expand(-1, heads, -1, dim)
        outside = (source >= n)[:, None, :, None]
        moved = k.gather(2, at)
        low, _ = page_bounds(moved.masked_fill(outside, torch.inf), self.page_size)
        _, high = page_bounds(moved.masked_fill(outside, -torch.inf), self.page_size)
        assert self._buffer is not None
        self._buffer[:, :, : low.shape[2]] = torch.cat([low, high], dim=-1)

    def scores(self, q: Float[Tensor, "B Hq 1 D"]) -> Float[Tensor, "B Hkv g P"]:
        """The bound of every page per query head (float32; no number for pages without tokens)."""
        low, high = self.rows.float().chunk(2, dim=-1)
        grouped = q.float().reshape(q.shape[0], low.shape[1], -1, q.shape[3])
        # max(q m, q M) is q M where q > 0 and q m where q < 0: two products instead of a tensor per channel.
        return grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT

    def crop(self, length: int) -> None:
        """Forget everything after ``length`` tokens.

        The page that is cut keeps its bounds: wider than its keys, but bounds. Later pages are emptied.
        """
        if length >= self._length or self._buffer is None:
            return
        self._length = max(0, length)
        first = 0 if self.first is None else self.first[:, None]
        pages = torch.arange(self._buffer.shape[2], device=self._buffer.device) * self.page_size
        gone = (pages >= self._length - first).expand(self._buffer.shape[0], -1)
        self._buffer = torch.where(gone[:, None, :, None], self._empty(self._buffer), self._buffer)

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        super().reorder(index)
        if self.first is not None:
            self.first = self.first.index_select(0, index.to(self.first.device))

    def nbytes(self) -> int:
        return 0 if self._buffer is None else self.rows.numel() * self._buffer.element_size()

    def _reserve(self, like: Tensor, pages: int) -> None:
        """Room for ``pages`` pages; new ones are empty."""
        held = 0 if self._buffer is None else self._buffer.shape[2]
        if pages <= held:
            return
        batch, heads, _, dim = like.shape
        grown = self._empty(like.new_empty(batch, heads, max(pages, 2 * held), 2 * dim))
        if self._buffer is not None:
            grown[:, :, :held] = self._buffer
        self._buffer = grown

    @staticmethod
    def _empty(like: Tensor) -> Tensor:
        half = torch.full_like(like[..., : like.shape[-1] // 2], torch.inf)
        return torch.cat([half, -half], dim=-1)


def page_bounds(
    k: Float[Tensor, "B H n D"], page_size: int, skip: int = 0
) -> tuple[Float[Tensor, "B H P D"], Float[Tensor, "B H P D"]]:
    """Channel-wise minimum and maximum of pages; the first lacks its first ``skip`` tokens."""
    after = -(k.shape[2] + skip) % page_size
    bounds = []
    for fill, reduce in ((torch.inf, torch.amin), (-torch.inf, torch.amax)):
        pages = F.pad(k, (0, 0, skip, after), value=fill)
        bounds.append(reduce(torch.unflatten(pages, 2, (-1, page_size)), 3))
    return bounds[0], bounds[1]


def _tighter(old: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Bounds of what was in a page and what comes in."""
    old_low, old_high = old.chunk(2, dim=-1)
    return torch.cat([torch.minimum(old_low, low), torch.maximum(old_high, high)], dim=-1)


def best_pages(
    state: PageBounds, q: Float[Tensor, "B Hq 1 D"], pages: int, share: bool
) -> Int[Tensor, "B H n"] | None:
    """Tokens of the ``pages`` best pages and of the newest one, ``-1`` where there is none; None: all.

    Args:
        share: one choice per key head, by the sum of its query heads' scores; else one per query head.
    """
    size, n = state.page_size, len(state)
    held = cdiv(n, size)
    if pages + 1 >= held:
        return None
    scores = state.scores(q)
    scores = scores.sum(2) if share else scores.flatten(1, 2)
    scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).max)
    device = q.device
    first = torch.zeros(1, dtype=torch.long, device=device) if state.first is None else state.first
    newest = torch.div(n - 1 - first, size, rounding_mode="floor")[:, None, None]
    scores = scores.masked_fill(torch.arange(held, device=device) >= newest, -torch.inf)
    best = scores.topk(pages, dim=-1)
    chosen = torch.where(best.values > -torch.inf, best.indices, -1)
    chosen = torch.cat([chosen, newest.expand(*scores.shape[:2], 1)], dim=-1)
    tokens = chosen[..., None] * size + torch.arange(size, device=device)
    tokens = tokens + first[:, None, None, None]
    tokens = torch.where((chosen[..., None] >= 0) & (tokens < n), tokens, -1).flatten(2)
    # Without padding the end of the newest page is known to be empty.
    return tokens if state.first is not None else tokens[..., : tokens.shape[2] - (-n % size)]
