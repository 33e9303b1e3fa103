"""What one attention layer does while methods are applied: ask for a pattern, compute it, keep count."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.method import (
    AttentionInputs,
    Calibration,
    Method,
    PrefillMethod,
    Rope,
    SelectMethod,
    StoreMethod,
)
from sparseland.models.masks import MaskSpec
from sparseland.ops.attend import attend
from sparseland.ops.gather_decode import dense_decode, gather_decode
from sparseland.patterns import Pattern, WindowPattern, causal_pairs

if TYPE_CHECKING:
    from sparseland.models.caches import TrackedLayer
    from sparseland.models.modality import Modality


@dataclass
class Tally:
    """Counts of one layer, summed over calls and kept on the device (no synchronisation per call)."""

    pairs: Tensor | float = 0.0  # computed pairs per query head
    possible: float = 0.0  # causal pairs per query head
    read: Tensor | float = 0.0  # cached tokens read while decoding, per head
    readable: float = 0.0
    recall: Tensor | float = 0.0  # attention mass kept per query head, summed over queries
    queries: float = 0.0
    select_s: float = 0.0  # seconds of choosing the pairs of prompts, and of computing them
    attend_s: float = 0.0


@dataclass
class AttentionRuntime:
    """The state object of one attention layer."""

    layer: int
    prefill: PrefillMethod | None = None
    select: SelectMethod | None = None
    store: StoreMethod | None = None
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    n_layers: int | None = None
    learners: dict[str, nn.Module] = field(default_factory=dict)  # slug -> the method's own parameters
    rope: Rope | None = None  # where a method asks for it
    modality: Modality | None = None  # which tokens are vision, where a method asks for it
    measure_recall: bool = False
    measure_time: bool = False
    active: bool = True
    tally: Tally = field(default_factory=Tally)
    tracked: TrackedLayer | None = None  # the cache layer whose update() came just before this attention
    last_pattern: Pattern | None = None
    keep_pattern: bool = False

    # ------------------------------------------------------------ cache

    @property
    def keeps_something(self) -> bool:
        """Whether the layer's cache needs a selector's state or a store."""
        return self.active and (self.select is not None or self.store is not None)

    def track(self, inner: Any) -> TrackedLayer:
        """A tracked layer around an empty cache layer."""
        from sparseland.models.caches import TrackedLayer

        tracked = TrackedLayer(inner, self, self.select, None, None)
        self.renew(tracked)
        return tracked

    def renew(self, tracked: TrackedLayer) -> None:
        """Give a tracked layer fresh state (a new or a reset cache)."""
        if self.select is not None:
            tracked.state = self.select.new_state(self.layer, self._calibration(self.select.card.slug))
        if self.store is not None:
            slug = self.store.card.slug
            tracked.store = self.store.new_store(
                self.layer,
                self._calibration(slug),
                n_layers=self.n_layers,
                learner=self.learners.get(slug),
            )

    def _calibration(self, slug: str) -> Calibration | None:
        return self.calibrations.get(slug)

    # -------------------------------------------------------- attention

    def attention(
        self,
        q: Float[Tensor, "B Hq Nq D"],
        k: Float[Tensor, "B Hkv N D"],
        v: Float[Tensor, "B Hkv N D"],
        mask: MaskSpec,
        scale: float,
    ) -> Float[Tensor, "B Hq Nq D"]:
        """Attention of the newest ``Nq`` tokens over the cache, under the applied methods."""
        tracked, self.tracked = self.tracked, None
        n = min(mask.n_keys, k.shape[2])
        k, v = k[:, :, :n], v[:, :, :n]
        local = mask.window is not None and mask.window < n
        if q.shape[2] == 1:
            return self._decode(q, k, v, mask, scale, tracked, local)
        marks = None if tracked is None or tracked.store is None or local else tracked.store.marks()
        out = self._prompts(q, k, v, mask, scale, mask.window, marks)
        if tracked is not None and not local:
            self._observe(tracked, q, k, v, mask, scale)
        return out

    def _observe(
        self, tracked: TrackedLayer, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float
    ) -> None:
        """Show a prompt to what keeps or reads the cache."""
        if self.select is not None and tracked.state is not None:
            x = self._inputs(self.select, q, k, v, scale)
            self.select.observe(tracked.state, x, mask.first_key)
        if self.store is not None and tracked.store is not None:
            tracked.store.observe(self._inputs(self.store, q, k, v, scale), mask.first_key)

    def _inputs(self, method: Method, q: Tensor, k: Tensor, v: Tensor, scale: float) -> AttentionInputs:
        learner = self.learners.get(method.card.slug)
        return AttentionInputs(q, k, v, scale, self.layer, self.n_layers, learner, self.rope)

    def _prompts(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: MaskSpec,
        scale: float,
        window: int | None,
        marks: Tensor | None = None,
    ) -> Tensor:
        """A prompt's attention; padded rows one by one."""
        n = k.shape[2]
        vision = None if self.modality is None else self.modality.of(q.shape[0], n)
        if mask.valid is None and (vision is None or bool((vision == vision[:1]).all())):
            return self._prompt(q, k, v, scale, window, marks, None if vision is None else vision[0])
        # Padding is cut off row by row, so that a padded row computes exactly what it would alone.
        out = torch.zeros_like(q)
        for row in range(q.shape[0]):
            valid = k.new_ones(n, dtype=torch.bool) if mask.valid is None else mask.valid[row, :n]
            if not bool(valid.any()):
                continue
            keys = _run_or_index(valid)
            queries = _run_or_index(valid[n - q.shape[2] :])
            if isinstance(queries, Tensor) and not queries.numel():
                continue
            at = slice(row, row + 1)
            own = marks
            if marks is not None:
                before = keys if isinstance(keys, slice) else keys[keys < marks.shape[2]]
                own = marks[at][:, :, before]
            x = (q[at][:, :, queries], k[at][:, :, keys], v[at][:, :, keys])
            seen = None
            if vision is not None:
                seen = vision[row, keys if isinstance(keys, slice) else keys.cpu()]
            part = self._prompt(*x, scale, window, own, seen)
            out[at, :, queries] = part
        return out

    def _prompt(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        marks: Tensor | None = None,
        vision: Tensor | None = None,
    ) -> Tensor:
        n_queries, n_keys = q.shape[2], k.shape[2]
        start = self._clock(q)
        if window is not None and window >= n_keys:
            window = None  # it binds longer rows of the batch, not this one
        if window is not None:
            # Where the model's own window binds it is the pattern; methods act on shorter prompts.
            pattern: Pattern = WindowPattern(n_queries, n_keys, 0, window)
        elif self.prefill is None:
            pattern = WindowPattern.dense(n_queries, n_keys)
        else:
            strides = self.modality.strides if vision is not None and self.modality is not None else ()
            known = {"marks": marks, "vision": vision, "strides": strides}
            x = replace(self._inputs(self.prefill, q, k, v, scale), **known)  # type: ignore[arg-type]
            pattern = self.prefill.pattern(x, self._calibration(self.prefill.card.slug))
        selected = self._clock(q)
        if self.keep_pattern:
            self.last_pattern = pattern
        if self.measure_time:
            before = self._clock(q)
            attend(q, k, v, pattern, scale=scale)
            self.tally.select_s += selected - start
            self.tally.attend_s += self._clock(q) - before
        if self.measure_recall:
            out, lse = attend(q, k, v, pattern, scale=scale, return_lse=True)
            full = WindowPattern.dense(n_queries, n_keys) if window is None else pattern
            _, dense_lse = attend(q, k, v, full, scale=scale, return_lse=True)
            # The softmax denominators tell the kept mass: no second pass over the pairs.
            self.tally.recall = self.tally.recall + (lse - dense_lse).exp().sum((0, 2)).double()
            self.tally.queries += q.shape[0] * n_queries
        else:
            out = attend(q, k, v, pattern, scale=scale)
        if not torch.compiler.is_compiling():
            self._count(pattern, q)  # last: a pattern made in pieces is counted while it is computed
        return out

    def _clock(self, x: Tensor) -> float:
        """Seconds, the device waited for; 0 where no time is measured."""
        if not self.measure_time:
            return 0.0
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter()

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: MaskSpec,
        scale: float,
        tracked: TrackedLayer | None,
        local: bool,
    ) -> Tensor:
        first = mask.first_key
        if local:
            start = k.shape[2] - (mask.window or 0)
            k, v = k[:, :, start:], v[:, :, start:]
            first = None if first is None else (first - start).clamp(min=0)
        if local or not mask.one_run or tracked is None:
            valid = None if mask.one_run or mask.valid is None else mask.valid[:, -k.shape[2] :]
            if valid is not None and tracked is not None and tracked.store is not None:
                if self.store is not None and tracked.store.kept() < len(tracked.store):
                    raise SparselandError(
                        f"{self.store.card.slug} drops tokens and needs every row's padding on its left"
                    )
                k, v = tracked.store.dense()
            self._count_reads(q, k.shape[2], k.shape[2])
            return dense_decode(q, k, v, first_key=first, valid=valid, scale=scale)
        index = None
        if self.select is not None and tracked.state is not None:
            x = self._inputs(self.select, q, k, v, scale)
            index = self.select.select(tracked.state, x, first)
        store = tracked.store
        whole = k.shape[2] if store is None else store.kept()
        self._count_reads(q, whole if index is None else index.shape[2], k.shape[2])
        if store is None:
            if index is None:
                return dense_decode(q, k, v, first_key=first, scale=scale)
            return gather_decode(q, k, v, index, scale=scale)
        if index is None:
            return store.attend(q, scale, first)
        return _attend_stored(q, store.gather, index, k.shape[1], scale)

    # ------------------------------------------------------------ counts

    def _count(self, pattern: Pattern, q: Tensor) -> None:
        batch, heads = q.shape[:2]
        pairs = pattern.pairs().double()
        per_head = pairs.expand(batch, heads).sum(0)
        self.tally.pairs = self.tally.pairs + per_head
        self.tally.possible += batch * causal_pairs(pattern.n_queries, pattern.n_keys)

    def _count_reads(self, q: Tensor, read: float, readable: int) -> None:
        self.tally.read = self.tally.read + q.shape[0] * float(min(read, readable))
        self.tally.readable += q.shape[0] * float(readable)


def _run_or_index(valid: Tensor) -> slice | Tensor:
    """A slice where the True entries are one run (no copy), else their indices."""
    index = valid.nonzero().flatten()
    if index.numel() and int(index[-1]) - int(index[0]) + 1 == index.numel():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _attend_stored(q: Tensor, gather: Any, index: Tensor, kv_heads: int, scale: float) -> Tensor:
    """Select-then-attend over a compressed cache: only the chosen tokens are expanded."""
    batch, _, _, dim = q.shape
    # A store gathers per key head; the indices of a group's query heads go through in one call, after
    # which every head of ``index`` has keys of its own.
    gathered = gather(index.reshape(batch, kv_heads, -1).clamp(min=0))
    shape = (batch, index.shape[1], index.shape[2], dim)
    k, v = (t.reshape(shape).to(q.dtype) for t in gathered)
    position = torch.arange(index.shape[2], device=q.device)
    return gather_decode(q, k, v, torch.where(index >= 0, position, -1), scale=scale)
