"""What a method is: a frozen dataclass of parameters with a card, found by its file name.

A method is named by a *spec*, ``slug`` or ``slug:key=value,key=value``. The slug is the paper's short
name; the file is the slug with ``-`` written ``_``, in the folder of its site (``attention/``,
``cache/``, …). Nothing registers methods by hand: the registry looks at the files.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import types
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from sparseland.errors import SparselandError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int

    from sparseland.patterns import Pattern

Site = Literal["attention", "cache", "tokens", "neurons", "weights", "adapters", "features", "mixer"]
Training = Literal["none", "calibration", "training"]

# What a method does at run time. A model can carry one method per role; apply() refuses a second.
Role = Literal["prefill", "select", "store", "linear"]
ROLES: dict[Role, str] = {
    "prefill": "which query-key pairs a prompt computes",
    "select": "which cached tokens a decoding step reads",
    "store": "how keys and values are kept in the cache",
    "linear": "which channels the linear layers compute",
}

# Folders that may hold methods, one per site or field of use (see docs/methods/index.md).
METHOD_PACKAGES = (
    "attention", "cache", "tokens", "neurons", "weights", "adapters", "features", "mixers",
    "vision", "graph", "retrieval", "recommendation",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What a reader wants to know before using a method.

    Args:
        slug: the name used in specs; equals the file name with ``-`` for ``_``.
        title: the paper's title ("" for a control that no paper introduced).
        paper: where it stands, e.g. ``"arXiv 2502.20766, ICLR 2025"``.
        site: what the method makes sparse.
        training: what has to happen before it can be used.
        summary: one line for ``sparseland list``.
        claims: the paper's headline results, in its own numbers.
        deviations: where we differ from the paper or from its code, and why.
        limits: what the method is known not to do.
        control: a yardstick rather than a proposal; ``frontier`` runs it at a method's density and
            never recommends it.
    """

    slug: str
    title: str
    paper: str
    site: Site
    training: Training
    summary: str
    claims: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    control: bool = False


def param(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field of a method, with its help text and allowed range.

    Example::

        gamma: float = param(0.9, "attention mass to cover", gt=0, le=1)
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return field(default=default, metadata={"help": help, "choices": choices, **bounds})


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
        hints = _field_types(type(self))
        for f in dataclasses.fields(self):
            value = _coerce(self.card.slug, f, hints[f.name], getattr(self, f.name))
            object.__setattr__(self, f.name, value)

    @property
    def roles(self) -> frozenset[Role]:
        """What this method does at run time; two methods with a common role cannot be combined."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does (roles)")

    @property
    def spec(self) -> str:
        """The shortest spec that gives this method back (defaults are left out)."""
        changed = [
            f"{f.name}={_format(getattr(self, f.name))}"
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
        need = self._length + new.shape[2]
        if self._buffer is None or need > self._buffer.shape[2]:
            capacity = max(need, 2 * self._length)
            grown = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            if self._buffer is not None:
                grown[:, :, : self._length] = self.rows
            self._buffer = grown
        self._buffer[:, :, self._length : need] = new
        self._length = need

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


# ---------------------------------------------------------------- parameters


def _field_types(cls: type[Method]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return "none" if value is None else str(value)


def _allowed(f: dataclasses.Field[Any], kind: type) -> str:
    """What a parameter may be, in words: ``a number > 0 and <= 1``."""
    if f.metadata.get("choices"):
        return "one of " + ", ".join(f.metadata["choices"])
    if kind is bool:
        return "true or false"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = " and ".join(
        f"{sign} {f.metadata[name]:g}" for name, sign in signs.items() if f.metadata.get(name) is not None
    )
    noun = {int: "a whole number", float: "a number", str: "text"}[kind]
    return f"{noun} {bounds}".strip()


def _coerce(slug: str, f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """Turn a spec's text (or a Python value) into the field's type, or say what is allowed."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    kind = next(o for o in options if o is not type(None))
    error = SparselandError(f"{slug}: {f.name}={value} is not allowed; it must be {_allowed(f, kind)}")
    try:
        parsed = _parse(kind, value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as cause:
        raise error from cause
    choices = f.metadata.get("choices")
    if choices and parsed not in choices:
        raise error
    if kind in (int, float):
        m = f.metadata
        inside = (
            (m.get("ge") is None or parsed >= m["ge"])
            and (m.get("gt") is None or parsed > m["gt"])
            and (m.get("le") is None or parsed <= m["le"])
            and (m.get("lt") is None or parsed < m["lt"])
        )
        if not inside or (kind is float and not math.isfinite(parsed)):
            raise error
    return parsed


def _parse(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(value)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(value)
        return int(value)
    if kind is float:
        if isinstance(value, bool):
            raise ValueError(value)
        # Fractions are how papers write budgets: 1/16 reads better than 0.0625.
        return float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def describe_params(cls: type[Method]) -> list[dict[str, Any]]:
    """Name, default, help and allowed values of each parameter, for ``sparseland show``."""
    hints = _field_types(cls)
    rows = []
    for f in dataclasses.fields(cls):
        options = [o for o in (typing.get_args(hints[f.name]) or (hints[f.name],)) if o is not type(None)]
        rows.append(
            {
                "name": f.name,
                "default": f.default,
                "help": f.metadata["help"],
                "allowed": _allowed(f, options[0]),
            }
        )
    return rows


# ------------------------------------------------------------------ registry


@cache
def _method_files() -> dict[str, str]:
    """Slug -> module name, for every file that may hold a method."""
    root = Path(__file__).parent
    found: dict[str, str] = {}
    for package in METHOD_PACKAGES:
        for module in pkgutil.iter_modules([str(root / package)]):
            if module.name.startswith("_"):
                continue
            slug = module.name.replace("_", "-")
            if slug in found:
                raise ImportError(f"two methods are called {slug}: {found[slug]} and {package}")
            found[slug] = f"sparseland.{package}.{module.name}"
    return found


def method_slugs() -> list[str]:
    """The slugs of all methods, sorted."""
    return sorted(_method_files())


@cache
def method_class(slug: str) -> type[Method]:
    """The class of a slug; an unknown slug is an error that names the nearest ones."""
    files = _method_files()
    if slug not in files:
        near = difflib.get_close_matches(slug, files, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see `sparseland list`"
        raise SparselandError(f"unknown method {slug!r}; {hint}")
    module = importlib.import_module(files[slug])
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Method)
            and value.__module__ == module.__name__
            and "card" in vars(value)
        ):
            if value.card.slug != slug:
                raise ImportError(f"{files[slug]} calls itself {value.card.slug}, not {slug}")
            return value
    raise ImportError(f"{files[slug]} holds no method with a card")


def find_by_class_name(name: str) -> type[Method] | None:
    """``FlexPrefill`` -> its class, by the file whose name is the same letters (None if there is none)."""
    wanted = name.lower()
    for slug in _method_files():
        if slug.replace("-", "") == wanted:
            cls = method_class(slug)
            return cls if cls.__name__ == name else None
    return None


def parse_spec(spec: str) -> Method:
    """``"flexprefill:gamma=0.9,min_budget=512"`` -> a method, or one clear line."""
    slug, _, rest = spec.strip().partition(":")
    cls = method_class(slug)
    names = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals:
            raise SparselandError(f"{slug}: {item!r} is not a parameter; write key=value")
        if name not in names:
            raise SparselandError(
                f"{slug}: no parameter {name!r}; it has {', '.join(names) if names else 'none'}"
            )
        if name in values:
            raise SparselandError(f"{slug}: {name} is given twice")
        values[name] = value.strip()
    return cls(**values)


def as_method(value: str | Method) -> Method:
    """A spec or a method -> a method."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return parse_spec(value)
    raise SparselandError(f"a method or a spec was expected, not {type(value).__name__}")


def split_specs(text: str) -> list[str]:
    """``"a,b:x=1,y=2,c"`` -> ``["a", "b:x=1,y=2", "c"]``: a comma before ``key=value`` stays inside."""
    specs: list[str] = []
    for item in text.split(","):
        head = item.split("=", 1)[0]
        if specs and "=" in item and ":" not in head:
            specs[-1] += "," + item
        elif item.strip():
            specs.append(item.strip())
    return specs
