"""The four kinds of methods, by what they do at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparseland.errors import SparselandError
from sparseland.method.base import ROLES, Method, Role
from sparseland.method.inputs import AttentionInputs, Calibration
from sparseland.method.state import KVStore, SelectState

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int

    from sparseland.patterns import Pattern


@dataclass(frozen=True)
class PrefillMethod(Method):
    """A method that decides which query-key pairs of a prompt are computed.

    Args (class attributes, for readers and for the contract tests):
        looks_ahead: whether the pairs of a query may depend on later tokens of the same call, as in
            every method that estimates from the prompt's last queries. Values never leak, positions may.
        chunkable: whether a prompt fed in pieces computes the same pairs as in one call.
        reads_vision: whether it wants to know a prompt's vision tokens (``AttentionInputs.vision``).
        shares_group: whether the query heads of a key head take one selection together, so that the pairs
            depend on which heads share keys.
    """

    looks_ahead: ClassVar[bool] = True
    chunkable: ClassVar[bool] = False
    reads_vision: ClassVar[bool] = False
    shares_group: ClassVar[bool] = False

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"prefill"})

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        """The pairs to compute for this layer's inputs (causality is added by the op)."""
        raise NotImplementedError


@dataclass(frozen=True)
class SelectMethod(Method):
    """A method that reads only some cached tokens at each decoding step; the cache stays whole.

    ``state`` is one object per cache layer, made by :meth:`new_state`, told of every appended key by
    :meth:`append`, shown each prompt by :meth:`observe`, and kept in step with beam reordering and cropping
    by ``state``'s own ``reorder(index)`` and ``crop(length)``.
    """

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"select"})

    def new_state(self, layer: int, calibration: Calibration | None = None) -> SelectState:
        """Fresh state for an empty cache layer."""
        raise NotImplementedError

    def append(self, state: SelectState, k_new: Float[torch.Tensor, "B Hkv n D"]) -> None:
        """Note the keys that were just appended to the cache."""
        raise NotImplementedError

    def observe(
        self, state: SelectState, x: AttentionInputs, first_key: Int[torch.Tensor, " B"] | None = None
    ) -> None:
        """See a prompt's queries (the whole batch, padding included), after its keys were appended."""

    def select(
        self,
        state: SelectState,
        x: AttentionInputs,
        first_key: Int[torch.Tensor, " B"] | None = None,
    ) -> Int[torch.Tensor, "B H n"] | None:
        """Token indices to read for one query (``Nq == 1``), per query head or per key head.

        ``None`` means all. ``first_key`` is each row's first valid key (left padding); -1 entries in
        the result are padding and read nothing.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StoreMethod(Method):
    """A method that keeps the KV cache in another form (pruned, compressed)."""

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"store"})

    def new_store(
        self,
        layer: int,
        calibration: Calibration | None = None,
        *,
        n_layers: int | None = None,
        learner: torch.nn.Module | None = None,
    ) -> KVStore | None:
        """An empty store for one layer's keys and values; None: this layer keeps the ordinary cache."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearMethod(Method):
    """A method that replaces the decoder's linear layers (embeddings and the head stay)."""

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"linear"})

    def convert(
        self, linear: torch.nn.Linear, name: str, calibration: Calibration | None = None
    ) -> torch.nn.Module:
        """The module that takes ``linear``'s place; it must leave ``linear``'s own values untouched.

        The module may offer ``density()`` (a float, or None before use) and ``undo()`` (called by
        ``handle.remove()``).
        """
        raise NotImplementedError


_KINDS: dict[Role, type[Method]] = {
    "prefill": PrefillMethod,
    "select": SelectMethod,
    "store": StoreMethod,
    "linear": LinearMethod,
}


def by_role(methods: Sequence[Method]) -> dict[Role, Method]:
    """Role -> method.

    Raises:
        SparselandError: two methods take one role; says which, and what it decides.
    """
    taken: dict[Role, Method] = {}
    for method in methods:
        for role in sorted(method.roles):
            if role in taken:
                a, b = taken[role].card.slug, method.card.slug
                raise SparselandError(f"{a} and {b} can't be combined: both decide {ROLES[role]}")
            assert isinstance(method, _KINDS[role]), f"{method.card.slug} lacks what role {role} needs"
            taken[role] = method
    return taken
