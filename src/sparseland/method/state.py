"""What methods keep per layer while a model decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseland.errors import SparselandError
from sparseland.method.inputs import AttentionInputs

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int


class SelectState:
    """Per-layer memory of a :class:`SelectMethod`: one tensor ``rows`` that grows along tokens.

    Shape ``[B, H, n, C]``; storage doubles when full, so appending one row costs one row.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def rows(self) -> torch.Tensor:
        """The rows so far, ``[B, H, n, C]`` (a view)."""
        if self._buffer is None:
            raise SparselandError("a decoding step came before any prompt")
        return self._buffer[:, :, : self._length]

    def push(self, new: Float[torch.Tensor, "B H n C"]) -> None:
        """Append rows."""
        if (capacity := self._room_for(new.shape[2])) is not None:
            grown = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            if self._buffer is not None:
                grown[:, :, : self._length] = self.rows
            self._buffer = grown
        assert self._buffer is not None
        self._buffer[:, :, self._length : self._length + new.shape[2]] = new
        self._length += new.shape[2]

    def _room_for(self, more: int) -> int | None:
        """Rows of the larger buffer that ``more`` rows need, at least twice those now; None: they fit."""
        need = self._length + more
        if self._buffer is not None and need <= self._buffer.shape[2]:
            return None
        return max(need, 2 * self._length)

    def reorder(self, index: Int[torch.Tensor, " B"]) -> None:
        """Follow a beam search that keeps rows ``index`` of the batch."""
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, index.to(self._buffer.device))

    def crop(self, length: int) -> None:
        """Forget everything after ``length`` tokens."""
        self._length = min(self._length, length)

    def nbytes(self) -> int:
        """Bytes held for the rows in use."""
        return 0 if self._buffer is None else self.rows.numel() * self._buffer.element_size()


class KVStore:
    """One layer's keys and values in a method's own form (see :class:`StoreMethod`)."""

    def __len__(self) -> int:
        """Tokens taken in, dropped ones included: the position of the next."""
        raise NotImplementedError

    def kept(self) -> float:
        """Tokens that a decoding step reads, averaged over heads; below ``len`` where some are dropped."""
        return len(self)

    def append(self, k: Float[torch.Tensor, "B Hkv n D"], v: Float[torch.Tensor, "B Hkv n D"]) -> None:
        """Take in new tokens."""
        raise NotImplementedError

    def observe(self, x: AttentionInputs, first_key: Int[torch.Tensor, " B"] | None = None) -> None:
        """See a prompt's queries, keys and values (the whole batch, padding included), after it was computed.

        Stores that drop tokens by what the prompt looked at do it here.
        """

    def marks(self) -> Float[torch.Tensor, "B Hkv n"] | None:
        """A number per token and key head of all tokens before the newest prompt (None: nothing).

        For stores that drop tokens and whose own prompts must know what they were: it comes back as
        ``AttentionInputs.marks``.
        """
        return None

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as the method gives them back, ``[B, Hkv, N, D]`` each.

        A store that drops tokens gives zeros in their place: its own prefill pattern never reads them.
        """
        raise NotImplementedError

    def attend(
        self,
        q: Float[torch.Tensor, "B Hq 1 D"],
        scale: float,
        first_key: Int[torch.Tensor, " B"] | None = None,
    ) -> Float[torch.Tensor, "B Hq 1 D"]:
        """Attention of one query over everything held, computed on the stored form."""
        raise NotImplementedError

    def gather(self, index: Int[torch.Tensor, "B Hkv n"]) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen tokens' keys and values, ``[B, Hkv, n, D]`` each (entries -1: any value)."""
        raise NotImplementedError

    def reorder(self, index: Int[torch.Tensor, " B"]) -> None:
        """Follow a beam search."""
        raise NotImplementedError

    def crop(self, length: int) -> None:
        """Forget everything after ``length`` tokens."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes held."""
        raise NotImplementedError
