"""The base of all methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from sparseland.errors import SparselandError
from sparseland.method.card import Card
from sparseland.method.inputs import Calibration, LayerShape
from sparseland.method.parameters import coerce, field_types, format_value

if TYPE_CHECKING:
    import torch
    from jaxtyping import Int

# What a method does at run time. A model can carry one method per role; apply() refuses a second.
Role = Literal["prefill", "select", "store", "linear"]
ROLES: dict[Role, str] = {
    "prefill": "which query-key pairs a prompt computes",
    "select": "which cached tokens a decoding step reads",
    "store": "how keys and values are kept in the cache",
    "linear": "which channels the linear layers compute",
}


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses whose fields are the parameters."""

    card: ClassVar[Card]
    # Why a default run of ``frontier`` does not measure it (it does if the method is named), or None.
    left_out: ClassVar[str | None] = None
    # Calibration takes minutes on a CPU: a default run of the frontier tries one setting only.
    calibrates_slowly: ClassVar[bool] = False
    # Reads queries or keys before RoPE: apply() finds the model's rotary embedding and proves that it can be
    # undone, or refuses the model; it comes as AttentionInputs.rope.
    needs_rope: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for f in dataclasses.fields(self):
            value = coerce(self.card.slug, f, hints[f.name], getattr(self, f.name))
            object.__setattr__(self, f.name, value)

    @property
    def roles(self) -> frozenset[Role]:
        """What this method does at run time; two methods with a common role cannot be combined."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does (roles)")

    @property
    def spec(self) -> str:
        """The shortest spec that gives this method back (defaults are left out)."""
        changed = [
            f"{f.name}={format_value(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.card.slug + (":" + ",".join(changed) if changed else "")

    def params(self) -> dict[str, Any]:
        """All parameters, JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def grid(cls, length: int) -> list[Self]:
        """The settings worth trying for prompts of ``length`` tokens, cheapest first (``frontier``)."""
        return [cls()]

    @classmethod
    def full_budget(cls, length: int) -> Self:
        """The setting at which the method must equal dense attention for ``length`` tokens."""
        raise NotImplementedError(f"{cls.card.slug} does not say which setting is dense")

    @classmethod
    def at_density(cls, density: float, length: int) -> Self:
        """A control set to compute ``density`` of the causal pairs of ``length`` tokens."""
        raise NotImplementedError(f"{cls.card.slug} is no control")

    @property
    def calibration_key(self) -> str:
        """Equal for methods that can share one calibration (default: only equal ones can)."""
        return self.spec

    @property
    def learns_from_text(self) -> bool:
        """Whether :meth:`calibrate` reads the token ids it is given."""
        return True

    def calibrate(self, model: torch.nn.Module, ids: Int[torch.Tensor, "B N"]) -> Calibration:
        """Learn what the method needs from the dense ``model`` on ``ids`` (only if the card says so)."""
        raise SparselandError(f"{self.card.slug} needs no calibration")

    def check_calibration(self, calibration: Calibration, shapes: Mapping[int, LayerShape]) -> None:
        """Raise SparselandError if what is known can't be of this model's layers (by default: nothing).

        ``apply`` asks before it changes anything; ``shapes`` are those of the attention layers, by index.
        """

    @classmethod
    def calibrates(cls) -> bool:
        """Whether the method has a :meth:`calibrate` of its own; ``apply`` runs it where nothing is known."""
        return cls.calibrate is not Method.calibrate

    def new_learner(self, shape: LayerShape) -> torch.nn.Module | None:
        """The method's own trainable parameters for one attention layer (None: it has none).

        ``apply`` makes one per layer, loads what a calibration holds under ``<layer>.<name>``, hands it to
        the method as ``AttentionInputs.learner`` and lists its parameters in ``handle.parameters()``.
        """
        return None
