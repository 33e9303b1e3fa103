"""What methods are given: a layer's inputs, its place in the model, and what was learnt of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sparseland.errors import SparselandError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int


class Rope(Protocol):
    """One layer's rotary position embedding, as the model applies it, and undone.

    A token's position counts from its row's first token. ``positions`` are ``[n]``, or ``[B, n]`` where the
    rows of a batch stand at different places.
    """

    def rotate(
        self, x: Float[torch.Tensor, "B H n D"], positions: Int[torch.Tensor, "*B n"]
    ) -> Float[torch.Tensor, "B H n D"]:
        """What the model makes of queries or keys at these positions, scaling included."""

    def unrotate(
        self, x: Float[torch.Tensor, "B H n D"], positions: Int[torch.Tensor, "*B n"]
    ) -> Float[torch.Tensor, "B H n D"]:
        """The inverse of :meth:`rotate`: queries or keys as they were before RoPE."""

    def tables(self, n: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosine and sine ``[n, R / 2]`` of positions 0 to n - 1, in ``like``'s type, on its device.

        Channel ``r < R / 2`` turns together with channel ``r + R / 2``; channels from R on do not turn. None:
        the layer has no positions.
        """


@dataclass(frozen=True)
class AttentionInputs:
    """One attention layer's inputs as a method sees them: after RoPE, unpadded, causal.

    The queries are the *last* ``Nq`` of the ``Nk`` tokens, so the first query's position is
    ``offset = Nk - Nq`` (0 for a whole prompt, larger for a later chunk). ``Hq`` is a multiple of
    ``Hkv``; query head ``h`` reads key head ``h // (Hq // Hkv)``.
    """

    q: Float[torch.Tensor, "B Hq Nq D"]
    k: Float[torch.Tensor, "B Hkv Nk D"]
    v: Float[torch.Tensor, "B Hkv Nk D"]
    scale: float
    layer: int
    # What only some methods ask for; None where nobody has set it (inputs made by hand).
    n_layers: int | None = None
    learner: torch.nn.Module | None = None
    rope: Rope | None = None  # undoes the rotation; None here: q and k are taken as they are
    marks: Float[torch.Tensor, "B Hkv n"] | None = None  # KVStore.marks() of the n tokens before this call
    # Of a vision-language model's prompt: which tokens are vision (on the CPU, one row for the whole batch),
    # and tokens per frame and per row of its videos, where the call tells.
    vision: Bool[torch.Tensor, " Nk"] | None = None
    strides: tuple[int, ...] = ()

    @property
    def offset(self) -> int:
        """Position of the first query among the keys."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True)
class LayerShape:
    """What a method is told of an attention layer before its first input: where it is and how large."""

    layer: int
    n_layers: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads


@dataclass
class Calibration:
    """What a method learnt about one model before use: JSON-able facts and tensors, both small.

    Stored beside a recipe as ``<slug>.json`` and ``<slug>.safetensors``.
    """

    meta: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensor(self, slug: str, name: str, shape: tuple[int, ...], *, finite: bool = True) -> torch.Tensor:
        """A tensor of real numbers of this shape, without NaN and, unless said otherwise, infinity.

        Raises:
            SparselandError: it is missing, of another shape, or holds something else.
        """
        found = self.tensors.get(name)
        if found is None:
            raise SparselandError(
                f"{slug}: the calibration lacks {name!r}; it is another model's, or damaged"
            )
        if tuple(found.shape) != shape:
            raise SparselandError(
                f"{slug}: the calibration's {name!r} is {list(found.shape)}, this model's is {list(shape)}"
            )
        if not found.is_floating_point() or bool((~found.isfinite() if finite else found.isnan()).any()):
            kind = "finite numbers" if finite else "numbers"
            raise SparselandError(f"{slug}: the calibration's {name!r} must hold {kind} only ({found.dtype})")
        return found
