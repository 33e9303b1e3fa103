"""Mustafar: keep the largest elements of every cached key and value, and attend to them as they lie.

Joo, Hosseini, Hadidi, Asgari: *Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM
Inference* (NeurIPS 2025).

Each key and each value vector older than a local window keeps its ``(1 - sparsity) D`` elements of largest
magnitude (keys after RoPE), packed behind a bitmap of which they are. No token is dropped. A decoding
step attends to the packed part and to the dense window, and merges both by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseland.method import Calibration, Card, KVStore, StoreMethod, param
from sparseland.ops.bitmap_cache import Bitmap, bitmap_decode, compress, decompress
from sparseland.ops.merge import merge_attention

# Packed buffers grow by this many tokens, or by a sixteenth: doubling would give the saved memory back.
GROW_TOKENS = 256


@dataclass(frozen=True)
class Mustafar(StoreMethod):
    """Per-token magnitude pruning of keys and values behind a dense window, stored as bitmaps."""

    card: ClassVar[Card] = Card(
        slug="mustafar",
        title="Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
        paper="Joo et al., NeurIPS 2025, arXiv 2505.22913",
        site="cache",
        training="none",
        summary="keeps the largest elements of each cached key and value, stored and read as bitmaps",
        claims=(
            "up to 70 % sparsity of keys and values without fine-tuning and little loss (Llama-2-7B, "
            "Llama-3-8B-Instruct, Mistral-7B-Instruct on LongBench and RULER)",
            "KV cache down to 45 % of dense; up to 2.23x tokens/s of dense decoding",
        ),
        deviations=(
            "every vector keeps exactly D - floor(sparsity D) elements; the authors' comparison keeps one "
            "more, and more at ties",
            "the equal count per vector makes the format simpler than the authors' tiles: no offsets, no "
            "padding",
            "one token is pruned after each step's attention, as in the authors' accuracy code; their "
            "kernels wait for 256 (group=256), which costs less per step but keeps up to 255 more dense",
        ),
        limits=(
            "a prompt, whole or in pieces, is computed densely with unpruned keys and values: it is pruned "
            "when the first single token follows, and takes a dense cache's memory until then; so do steps "
            "of several tokens (assisted decoding)",
            "with group above 1, a padded row prunes at other steps than it would alone",
            "the bitmap costs one bit per element: at little sparsity the cache is larger than dense",
        ),
    )

    sparsity: float = param(0.7, "share of each key's and value's elements to drop", ge=0, lt=1)
    key_sparsity: float | None = param(None, "the same for keys only", ge=0, lt=1)
    value_sparsity: float | None = param(None, "the same for values only", ge=0, lt=1)
    window: int = param(32, "newest tokens kept dense", ge=0)
    group: int = param(1, "tokens pruned at a time, once they have left the window", ge=1)

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """The paper's 70 % and 50 %, and keys harder than values."""
        return [cls(), cls(key_sparsity=0.8, value_sparsity=0.5), cls(sparsity=0.5)]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        return cls(sparsity=0.0)

    def new_store(
        self,
        layer: int,
        calibration: Calibration | None = None,
        *,
        n_layers: int | None = None,
        learner: torch.nn.Module | None = None,
    ) -> BitmapStore:
        key = self.sparsity if self.key_sparsity is None else self.key_sparsity
        value = self.sparsity if self.value_sparsity is None else self.value_sparsity
        return BitmapStore(key, value, self.window, self.group)


def kept_elements(dim: int, sparsity: float) -> int:
    """Elements that a vector of ``dim`` keeps: at least one."""
    return max(1, dim - int(sparsity * dim + 1e-6))


class BitmapStore(KVStore):
    """One layer's keys and values: bitmaps for the old tokens, dense tensors for the newest.

    Args:
        key_sparsity, value_sparsity: share of elements dropped.
        window: newest tokens that stay dense.
        group: packed at a time: after a step, ``window`` to ``window + group - 1`` tokens are dense.
    """

    def __init__(self, key_sparsity: float, value_sparsity: float, window: int, group: int) -> None:
        self.window, self.group = window, group
        self._sparsity = (key_sparsity, value_sparsity)
        self._packed = (_Packed(), _Packed())
        self._recent: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self._old + (0 if self._recent is None else self._recent[0].shape[2])

    @property
    def _old(self) -> int:
        """Tokens in packed form."""
        return self._packed[0].length

    def append(self, k: Float[Tensor, "B Hkv n D"], v: Float[Tensor, "B Hkv n D"]) -> None:
        """Take in new tokens, dense. A single one is a decoding step: the prompt before it is pruned now."""
        if k.shape[2] == 1:
            self.settle()
        if self._recent is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self._recent, (k, v), strict=True))
        self._recent = (k, v)

    def settle(self) -> None:
        """Prune what has left the window, ``group`` tokens at a time."""
        if self._recent is None:
            return
        k, v = self._recent
        leaving = max(0, k.shape[2] - self.window) // self.group * self.group
        if not leaving:
            return
        for packed, new in zip(self._packed, self._pack(k[:, :, :leaving], v[:, :, :leaving]), strict=True):
            packed.push(new)
        # Copied: a view of the prompt's tail would keep the whole prompt in memory.
        self._recent = (k[:, :, leaving:].clone(), v[:, :, leaving:].clone())

    def _pack(self, k: Tensor, v: Tensor) -> tuple[Bitmap, Bitmap]:
        kept_k, kept_v = (kept_elements(k.shape[3], sparsity) for sparsity in self._sparsity)
        if kept_k != kept_v or not self._old:
            return compress(k, kept_k), compress(v, kept_v)
        # A decoding step packs so little that the call is what costs: keys and values share one.
        both, heads = compress(torch.cat([k, v], dim=1), kept_k), k.shape[1]
        return (
            Bitmap(both.bitmap[:, :heads], both.values[:, :heads], both.head_dim),
            Bitmap(both.bitmap[:, heads:], both.values[:, heads:], both.head_dim),
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        k, v = self._window()
        if not self._old:
            return k, v
        old = (decompress(packed.rows()).to(k.dtype) for packed in self._packed)
        return tuple(torch.cat([o, n], dim=2) for o, n in zip(old, (k, v), strict=True))  # type: ignore[return-value]

    def attend(
        self,
        q: Float[Tensor, "B Hq 1 D"],
        scale: float,
        first_key: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B Hq 1 D"]:
        out = self._attend(q, scale, first_key)
        self.settle()  # after the step's attention: the token that leaves is still seen dense
        return out

    def _attend(
        self, q: Float[Tensor, "B Hq 1 D"], scale: float, first_key: Int[Tensor, " B"] | None
    ) -> Float[Tensor, "B Hq 1 D"]:
        k, v = self._window()
        if not self._old:
            return _attend_dense(q, k, v, scale, first_key)[0]
        keys, values = (packed.rows() for packed in self._packed)
        old = bitmap_decode(q, keys, values, scale=scale, first_key=first_key, return_lse=True)
        if not k.shape[2]:
            return old[0]
        first_recent = None if first_key is None else (first_key - self._old).clamp(min=0)
        return merge_attention([old, _attend_dense(q, k, v, scale, first_recent)])[0]

    def gather(self, index: Int[Tensor, "B Hkv n"]) -> tuple[Tensor, Tensor]:
        """The chosen tokens' keys and values; of the packed part, only these are expanded."""
        recent = self._window()
        out = []
        for packed, new in zip(self._packed, recent, strict=True):
            near = (index - self._old).clamp(0, max(0, new.shape[2] - 1))
            near = near[..., None].expand(-1, -1, -1, new.shape[3])
            if not self._old:
                out.append(new.gather(2, near))
                continue
            far = decompress(packed.rows().gather(index.clamp(0, self._old - 1))).to(new.dtype)
            out.append(
                torch.where((index < self._old)[..., None], far, new.gather(2, near)) if new.shape[2] else far
            )
        return out[0], out[1]

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        for packed in self._packed:
            packed.reorder(index)
        if self._recent is not None:
            k, v = (t.index_select(0, index.to(t.device)) for t in self._recent)
            self._recent = (k, v)

    def crop(self, length: int) -> None:
        """Forget everything after ``length`` tokens; what was pruned stays pruned."""
        if self._recent is None:
            return
        k, v = (t[:, :, : max(0, length - self._old)].clone() for t in self._recent)
        self._recent = (k, v)
        for packed in self._packed:
            packed.length = min(packed.length, length)

    def nbytes(self) -> int:
        """Bytes allocated: bitmaps, kept elements, the room they grow into, and the dense window."""
        recent = 0 if self._recent is None else sum(t.numel() * t.element_size() for t in self._recent)
        return recent + sum(packed.nbytes() for packed in self._packed)

    def _window(self) -> tuple[Tensor, Tensor]:
        assert self._recent is not None, "nothing was appended yet"
        return self._recent


class _Packed:
    """A growing :class:`Bitmap` along tokens, with spare room behind its end."""

    def __init__(self) -> None:
        self.length = 0
        self._room: Bitmap | None = None

    def rows(self) -> Bitmap:
        """The tokens held (views, nothing is copied)."""
        assert self._room is not None
        return self._room.slice(0, self.length)

    def push(self, new: Bitmap) -> None:
        """Append packed tokens (the first are taken over as they are, later ones copied)."""
        end = self.length + len(new)
        if self._room is None:
            self._room = new
        else:
            if end > self._room.bitmap.shape[2]:
                self._grow(end + max(GROW_TOKENS, end // 16))
            self._room.bitmap[:, :, self.length : end] = new.bitmap
            self._room.values[:, :, self.length : end] = new.values
        self.length = end

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        if self._room is not None:
            index = index.to(self._room.bitmap.device)
            bitmap, values = (t.index_select(0, index) for t in (self._room.bitmap, self._room.values))
            self._room = Bitmap(bitmap, values, self._room.head_dim)

    def nbytes(self) -> int:
        return 0 if self._room is None else self._room.nbytes()

    def _grow(self, capacity: int) -> None:
        old = self.rows()
        bitmap, values = (t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in (old.bitmap, old.values))
        bitmap[:, :, : self.length] = old.bitmap
        values[:, :, : self.length] = old.values
        self._room = Bitmap(bitmap, values, old.head_dim)


def _attend_dense(
    q: Float[Tensor, "B Hq 1 D"],
    k: Float[Tensor, "B Hkv n D"],
    v: Float[Tensor, "B Hkv n D"],
    scale: float,
    first_key: Int[Tensor, " B"] | None,
) -> tuple[Float[Tensor, "B Hq 1 D"], Float[Tensor, "B Hq 1"]]:
    """Attention of one query over the short window, with its log-sum-exp (fp32)."""
    batch, heads, _, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, dim).float()
    logits = grouped @ k.float().transpose(-1, -2) * scale  # (B, Hkv, g, n)
    if first_key is not None:
        padded = torch.arange(k.shape[2], device=q.device) < first_key[:, None]
        logits = logits.masked_fill(padded[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    # A row whose window is all padding has lse -inf and must give 0, not NaN.
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0)).exp()
    out = (weights @ v.float()).to(q.dtype)
    return out.view(batch, heads, 1, dim), lse.view(batch, heads, 1)
