"""InfLLM-V2's compressed keys of one cache layer, kept up to date while decoding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.method import SelectState
from sparseland.ops.kernel_scores import compress_keys, visible_kernels


class KernelState(SelectState):
    """Means of windows of ``kernel`` keys, one every ``stride``, counted from each row's first real token.

    A window is added once its last key is there; the keys of the next ones wait in a short tail. Nothing is
    compressed before it is known where each row begins, which a padded batch tells after its prompt.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self._tokens = 0  # appended
        self._settled = 0  # of these, tokens whose windows are made
        self._waiting: list[Tensor] = []  # keys behind the settled ones
        self._tail: Tensor | None = None  # the last settled keys, kernel - 1 of them if there are as many
        self._windows: Tensor | None = None  # [B, Hkv, capacity, D]

    def __len__(self) -> int:
        return self._tokens

    @property
    def windows(self) -> Float[Tensor, "B Hkv n D"]:
        """The windows made so far; a shorter row's last ones may hold anything, but no query sees them."""
        assert self._windows is not None, "nothing was settled yet"
        return self._windows[:, :, : visible_kernels(self._settled, self.kernel, self.stride)]

    def push(self, new: Float[Tensor, "B Hkv n D"]) -> None:
        self._waiting.append(new)
        self._tokens += new.shape[2]

    def settle(self, k: Float[Tensor, "B Hkv N D"], first_key: Int[Tensor, " B"] | None) -> None:
        """Make the windows that are complete; ``k``, the cache, is only read where a crop lost the tail."""
        if not self._waiting:
            return
        reach, settled = self.kernel - 1, self._settled
        kept = min(reach, settled)
        tail = self._tail[:, :, -kept:] if self._tail is not None and kept else None
        if kept and (tail is None or tail.shape[2] < kept):
            if k.stride(2) == 0:
                raise SparselandError(
                    f"infllm-v2: the cache was cropped to {settled} tokens, and its store does not give back "
                    "the keys before that; crop less, or leave out the store"
                )
            tail = k[:, :, settled - kept : settled]
        keys = torch.cat([*([] if tail is None else [tail]), *self._waiting], dim=2)
        begin = self._tokens - keys.shape[2]  # position of the first of them
        if first_key is None:
            made = visible_kernels(settled, self.kernel, self.stride)
            new = compress_keys(keys[:, :, made * self.stride - begin :], self.kernel, self.stride)
            self._reserve(new, made + new.shape[2])
            assert self._windows is not None
            self._windows[:, :, made : made + new.shape[2]] = new
        else:
            self._settle_rows(keys, begin, first_key)
        self._tail = keys[:, :, keys.shape[2] - min(reach, self._tokens) :].clone()
        self._waiting, self._settled = [], self._tokens

    def _settle_rows(self, keys: Tensor, begin: int, first_key: Int[Tensor, " B"]) -> None:
        """Rows that begin at different places complete their windows at different steps."""
        made = visible_kernels(self._settled - first_key, self.kernel, self.stride)  # [B]
        place = (first_key + made * self.stride - begin)[:, None] + torch.arange(
            keys.shape[2], device=keys.device
        )
        index = place.clamp(max=keys.shape[2] - 1)[:, None, :, None].expand(
            -1, *keys.shape[1:2], -1, keys.shape[3]
        )
        new = compress_keys(keys.gather(2, index), self.kernel, self.stride)
        if not new.shape[2]:
            self._reserve(new, 0)
            return
        # What lies behind a row's last complete window is written again before any query sees it.
        slot = made[:, None] + torch.arange(new.shape[2], device=keys.device)
        self._reserve(new, visible_kernels(self._tokens, self.kernel, self.stride) + new.shape[2])
        assert self._windows is not None
        self._windows.scatter_(2, slot[:, None, :, None].expand_as(new), new)

    def _reserve(self, new: Tensor, count: int) -> None:
        """Room for ``count`` windows."""
        old = self._windows
        if old is None or count > old.shape[2]:
            capacity = count if old is None else max(count, 2 * old.shape[2])
            self._windows = new.new_zeros(*new.shape[:2], capacity, new.shape[3])
            if old is not None:
                self._windows[:, :, : old.shape[2]] = old

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        def rows(t: Tensor) -> Tensor:
            return t.index_select(0, index.to(t.device))

        self._waiting = [rows(t) for t in self._waiting]
        self._tail = None if self._tail is None else rows(self._tail)
        self._windows = None if self._windows is None else rows(self._windows)

    def crop(self, length: int) -> None:
        if length >= self._tokens:
            return
        if length >= self._settled:
            keys = torch.cat(self._waiting, dim=2) if self._waiting else None
            rest = length - self._settled
            self._waiting = [keys[:, :, :rest]] if keys is not None and rest else []
        else:
            lost = self._settled - length
            if self._tail is not None:
                self._tail = self._tail[:, :, : max(0, self._tail.shape[2] - lost)]
            self._waiting, self._settled = [], length
        self._tokens = length

    def nbytes(self) -> int:
        held = [*self._waiting, *(t for t in (self._tail, self._windows) if t is not None)]
        return sum(t.numel() * t.element_size() for t in held)
