"""Queries and keys before RoPE: a decoder's own rotary embedding, undone and redone.

A rotary module gives ``(cos, sin) [1, n, R]``, the two halves of the last dimension equal. Which one a layer
uses, and whether it uses any, is found by trying: what comes back must be what the layer's own projections
gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.models.attention import evaluating, relative_distance, switched, tiny_forward, tiny_ids
from sparseland.models.masks import MaskSpec
from sparseland.models.surgery import attention_layers, decoder_of
from sparseland.ops.attend import attend
from sparseland.ops.rotary import turn, turn_back
from sparseland.patterns import WindowPattern

# Types whose frequencies change with the length: keys in a cache were turned by other angles than new ones.
_CHANGING = ("dynamic", "longrope")
# Moved by so many positions, q and k that a rotary embedding turned differ by more than this share.
_ELSEWHERE, _MOVED = 50, 0.1


@dataclass(eq=False)
class RotaryRope:
    """Layers that share a rotary module (and a layer type) share one of these.

    Args:
        module: transformers' rotary embedding.
        layer_type: its further argument, where it has one.
    """

    module: nn.Module
    layer_type: str | None = None
    _known: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rotate(self, x: Float[Tensor, "B H n D"], positions: Int[Tensor, "*B n"]) -> Float[Tensor, "B H n D"]:
        cos, sin = self._at(x, positions)
        return turn(x, cos, sin)

    def unrotate(
        self, x: Float[Tensor, "B H n D"], positions: Int[Tensor, "*B n"]
    ) -> Float[Tensor, "B H n D"]:
        cos, sin = self._at(x, positions)
        return turn_back(x, cos, sin)

    def tables(self, n: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        key = (like.dtype, like.device)
        known = self._known.get(key)
        if known is None or known[0].shape[0] < n:
            # Doubling, so that a growing cache asks the module rarely.
            size = max(n, 1024 if known is None else 2 * known[0].shape[0])
            known = self._cos_sin(like, torch.arange(size, device=like.device))
            self._known[key] = known
        return known[0][:n], known[1][:n]

    def _at(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._cos_sin(x, positions)
        return (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)

    def _cos_sin(self, like: Tensor, positions: Int[Tensor, "*B n"]) -> tuple[Tensor, Tensor]:
        """The module's values at these positions, ``[*B, n, R / 2]``."""
        ids = positions.reshape(-1, positions.shape[-1]).to(like.device)
        options = {} if self.layer_type is None else {"layer_type": self.layer_type}
        given = self.module(like.new_empty(1), ids, **options)
        if not (isinstance(given, tuple) and len(given) == 2):  # Llama 4's are complex numbers
            raise SparselandError(f"{type(self.module).__name__} gives no (cos, sin); not supported")
        cos, sin = given
        if cos.shape[:-1] != ids.shape:
            raise SparselandError(
                f"{type(self.module).__name__} gives angles {list(cos.shape)} for positions "
                f"{list(ids.shape)}; only one angle per position and channel is supported"
            )
        shape = (*positions.shape, cos.shape[-1])
        half = shape[-1] // 2
        return cos.reshape(shape)[..., :half].contiguous(), sin.reshape(shape)[..., :half].contiguous()


class NoRope:
    """A layer without positions (some of SmolLM3's), or a model that adds them to its embeddings."""

    def rotate(self, x: Float[Tensor, "B H n D"], positions: Int[Tensor, "*B n"]) -> Float[Tensor, "B H n D"]:
        return x

    unrotate = rotate

    def tables(self, n: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        return None


def find_ropes(model: nn.Module) -> dict[int, RotaryRope | NoRope]:
    """Layer index -> the rotary embedding of each attention layer of a dense model, proven on a tiny input.

    Raises:
        SparselandError: some layer's queries or keys can't be given back as its projections made them.
    """
    layers = attention_layers(model)
    options = _candidates(model, layers)
    seen = _look(model, layers)
    elsewhere: dict[int, _Seen] = {}
    found: dict[int, RotaryRope | NoRope] = {}
    for i in layers:
        fitting = (rope for rope in options[i] if _gives_angles(rope, seen[i][0]) and _fits(rope, *seen[i]))
        rope = next(fitting, None)
        if isinstance(rope, NoRope) and len(options[i]) > 1:
            # A norm behind the rotation gives q and k as well: without positions they are the same elsewhere.
            elsewhere = elsewhere or _look(model, layers, start=_ELSEWHERE)
            pairs = zip(elsewhere[i][:2], seen[i][:2], strict=True)
            if any(relative_distance(there, here) > _MOVED for there, here in pairs):
                rope = None
        if rope is None:
            raise SparselandError(
                f"{type(model).__name__}: layer {i}'s queries and keys before RoPE can't be got back from "
                "those after it; not supported by methods that read them"
            )
        found[i] = rope
    return found


def _candidates(model: nn.Module, layers: dict[int, nn.Module]) -> dict[int, list[RotaryRope | NoRope]]:
    """The rotary embeddings that each layer may use: its own, or the decoder's."""
    decoder = decoder_of(model)
    inside = {id(m) for layer in layers.values() for m in layer.modules()}
    shared = [m for m in decoder.modules() if _is_rotary(m) and id(m) not in inside]
    made: dict[tuple[int, str | None], RotaryRope] = {}
    options: dict[int, list[RotaryRope | NoRope]] = {}
    for i, layer in layers.items():
        options[i] = []
        for module in [m for m in layer.modules() if _is_rotary(m)] or shared:
            kind = _layer_type(module, layer, i)
            _refuse_changing(model, module, kind)
            options[i].append(made.setdefault((id(module), kind), RotaryRope(module, kind)))
        # Last: on the tiny input a slow rotation may look like none.
        options[i].append(NoRope())
    return options


def _is_rotary(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RotaryEmbedding")


def _layer_type(module: nn.Module, layer: nn.Module, i: int) -> str | None:
    """The further argument of modules that hold the frequencies of several layer types (Gemma 3)."""
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return None
    config: Any = layer.config
    return str(config.layer_types[i])


def _refuse_changing(model: nn.Module, module: nn.Module, kind: str | None) -> None:
    types = getattr(module, "rope_type", None)
    name = types.get(kind) if isinstance(types, dict) else types
    if name in _CHANGING:
        raise SparselandError(
            f"{type(model).__name__}: its RoPE ({name}) changes with the length, so cached keys can't be "
            "turned back; not supported by methods that read queries and keys before RoPE"
        )


# ------------------------------------------------------------------ the proof

_Seen = tuple[Tensor, Tensor, list[Tensor]]  # q and k after RoPE, and what the layer's own modules gave


class _Spy:
    """Stands where a layer's runtime stands: dense attention, with q and k noted."""

    active = False

    def __init__(self) -> None:
        self.noted: tuple[Tensor, Tensor] | None = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
        self.noted = (q.clone(), k.clone())
        return attend(q, k, v, WindowPattern.dense(q.shape[2], k.shape[2]), scale=scale)


@torch.no_grad()
def _look(model: nn.Module, layers: dict[int, nn.Module], start: int = 0) -> dict[int, _Seen]:
    """One tiny dense forward, with each layer's queries, keys, and the outputs of its direct parts.

    Args:
        start: position of the first token; 0: positions are left to the model.
    """
    spies = {i: _Spy() for i in layers}
    outputs: dict[int, list[Tensor]] = {i: [] for i in layers}
    with ExitStack() as stack, evaluating(model), switched(layers, spies):
        for i, layer in layers.items():
            for part in layer.children():
                hook = part.register_forward_hook(_note(outputs[i]))
                stack.callback(hook.remove)
        ids = tiny_ids(model)
        places = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        tiny_forward(model, ids, **({"position_ids": places} if start else {}))
    found = {}
    for i, spy in spies.items():
        assert spy.noted is not None, f"layer {i} did not run"
        found[i] = (*spy.noted, outputs[i])
    return found


def _note(notes: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            notes.append(output.clone())

    return hook


def _gives_angles(rope: RotaryRope | NoRope, q: Tensor) -> bool:
    """Whether its module gives cosines and sines of positions alone."""
    try:
        rope.tables(1, q)
    except (SparselandError, TypeError):  # other numbers, or another call
        return False
    return True


def _fits(rope: RotaryRope | NoRope, q: Tensor, k: Tensor, outputs: list[Tensor]) -> bool:
    """Whether turning q and k back gives what the layer's projections (or norms) gave, and forth q and k."""
    positions = torch.arange(q.shape[2], device=q.device)
    tolerance = 1e-3 if q.dtype in (torch.float32, torch.float64) else 3e-2
    for x, other in ((q, k), (k, q)):
        if isinstance(rope, RotaryRope) and 2 * _turned(rope, x) > x.shape[3]:
            return False
        before = rope.unrotate(x, positions)
        if relative_distance(rope.rotate(before, positions), x) > tolerance:
            return False
        made = (y for out in outputs for y in _readings(out, x, other))
        if not any(relative_distance(before, y) <= tolerance for y in made):
            return False
    return True


def _turned(rope: RotaryRope, x: Tensor) -> int:
    tables = rope.tables(1, x)
    assert tables is not None
    return int(tables[0].shape[-1])


def _readings(output: Tensor, x: Tensor, other: Tensor) -> Iterator[Tensor]:
    """The ways in which an output may hold the heads of ``x [1, H, N, D]``."""
    _, H, N, D = x.shape
    if output.numel() == x.numel():
        yield output.reshape(x.shape)  # heads first
        yield output.reshape(1, N, H, D).transpose(1, 2)
    rest = output.numel() // N - H * D
    if output.shape[-1] == output.numel() // N and rest > 0:
        flat = output.reshape(N, -1)
        yield from (
            flat[:, start : start + H * D].reshape(1, N, H, D).transpose(1, 2)
            for start in (0, other.shape[1] * D)  # queries come first in a joint projection, keys next
            if start + H * D <= flat.shape[1]
        )
        if flat.shape[1] == 3 * H * D:  # or head by head
            heads = flat.reshape(1, N, H, 3, D).permute(3, 0, 2, 1, 4)
            yield from heads[:2]
