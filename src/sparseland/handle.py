"""Putting methods on a model, and taking them off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.method import (
    Calibration,
    LayerShape,
    LinearMethod,
    Method,
    PrefillMethod,
    as_methods,
    by_role,
)
from sparseland.models.attention import NAME, evaluating, switch
from sparseland.models.caches import cache_hook, local_layers
from sparseland.models.modality import track_modality
from sparseland.models.probe import probe
from sparseland.models.rope import find_ropes
from sparseland.models.surgery import attention_layers, decoder_linears, decoder_of, replace_module
from sparseland.runtime import AttentionRuntime, Tally

if TYPE_CHECKING:
    from sparseland.recipe import Recipe


@dataclass(frozen=True)
class LayerStats:
    """What one attention layer computed since the last reset.

    Args:
        layer: the layer's index.
        density: computed / causal pairs per query head, prompts only (None if there was none).
        recall: attention mass kept per query head (None unless asked for).
        decode_density: cached tokens read / held while decoding (None if there was none).
        select_s, attend_s: seconds of choosing and of computing the pairs of prompts (None unless asked for).
    """

    layer: int
    density: list[float] | None
    recall: list[float] | None
    decode_density: float | None
    select_s: float | None = None
    attend_s: float | None = None


@dataclass(frozen=True)
class Stats:
    """Counts over all calls since ``apply`` or ``handle.reset_stats()``."""

    layers: list[LayerStats]
    linear_density: dict[str, float]

    @property
    def density(self) -> float | None:
        """Mean over layers and heads of computed / causal pairs (1.0 is dense)."""
        return _mean(d for layer in self.layers for d in layer.density or ())

    @property
    def recall(self) -> float | None:
        """Mean over layers and heads of the attention mass kept."""
        return _mean(r for layer in self.layers for r in layer.recall or ())

    @property
    def decode_density(self) -> float | None:
        """Mean over layers of cached tokens read / held."""
        return _mean(layer.decode_density for layer in self.layers if layer.decode_density is not None)

    @property
    def neuron_density(self) -> float | None:
        """Mean over sparse linear layers of multiplications done / dense multiplications."""
        return _mean(self.linear_density.values())


class Handle:
    """Methods on a model. Also a context manager: leaving it removes them."""

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        calibrations: dict[str, Calibration],
        runtimes: dict[int, AttentionRuntime],
        linears: dict[str, nn.Module],
        undo: Callable[[], None],
        learners: dict[str, dict[int, nn.Module]] | None = None,
    ) -> None:
        self.model = model
        self.methods = tuple(methods)
        self.calibrations = calibrations
        self.runtimes = runtimes
        self.learners = learners or {}
        self._linears = linears
        self._undo: Callable[[], None] | None = undo

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        specs = ", ".join(m.spec for m in self.methods)
        return f"<sparseland handle: {specs}{'' if self._undo else ' (removed)'}>"

    def remove(self) -> None:
        """Give the model back bit for bit as it was. A second call does nothing."""
        if self._undo is not None:
            undo, self._undo = self._undo, None
            undo()

    def stats(self) -> Stats:
        """Densities (and recall, if asked for) per layer and head since the last reset."""
        layers = [_layer_stats(i, r.tally) for i, r in self.runtimes.items()]
        densities = {n: getattr(m, "density", lambda: None)() for n, m in self._linears.items()}
        return Stats(layers, {n: d for n, d in densities.items() if d is not None})

    def reset_stats(self) -> None:
        """Start counting anew."""
        for runtime in self.runtimes.values():
            runtime.tally = Tally()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The methods' own trainable parameters (gates, score heads), for an optimiser.

        They are not among ``model.parameters()``: the model is the user's.
        """
        for layers in self.learners.values():
            for learner in layers.values():
                yield from learner.parameters()

    def recipe(self, evidence: dict[str, Any] | None = None) -> Recipe:
        """These methods, with what they learnt about this model so far, as a recipe to save."""
        from sparseland.recipe import Recipe

        found = dict(self.calibrations)
        for slug, layers in self.learners.items():
            known = found.get(slug, Calibration())
            found[slug] = Calibration(known.meta, {**known.tensors, **learner_tensors(layers)})
        return Recipe.of(self.model, self.methods, found, evidence)


def apply(
    model: nn.Module,
    methods: str | Method | Recipe | Sequence[str | Method],
    *,
    calibration_ids: Int[Tensor, "B N"] | None = None,
    calibrations: dict[str, Calibration] | None = None,
    recall: bool = False,
    timing: bool = False,
) -> Handle:
    """Make ``model`` sparse.

    Args:
        model: a transformers decoder whose attention goes through ``AttentionInterface``.
        methods: specs (``"flexprefill:gamma=0.9"``, several with commas between them), a method, a list of
            them, or a recipe.
        calibration_ids: token ids ``[B, N]`` for methods that must see the model first; default: the
            start of the default text, read with the model's own tokenizer.
        calibrations: earlier results by slug, used instead of calibrating.
        recall: also measure the attention mass that is kept (costs a dense pass).
        timing: also measure the time of choosing and of computing a prompt's pairs (computes them twice).

    Raises:
        SparselandError: unknown method or value, methods that can't be combined, a model that is not
            supported, a calibration of another model. Nothing has been changed then.
    """
    from sparseland.recipe import Recipe

    if not isinstance(model, nn.Module):
        raise SparselandError(f"a transformers model was expected, not {type(model).__name__}")
    if isinstance(methods, Recipe):
        methods.check(model)
        if not methods.methods:  # dense won: nothing is to be changed
            return Handle(model, (), {}, {}, {}, lambda: None)
        calibrations = {**methods.calibrations, **(calibrations or {})}
        methods = methods.methods
    chosen = as_methods(methods)
    if not chosen:
        raise SparselandError("no method given; `sparseland list` shows them")
    role_of = by_role(chosen)
    shapes = probe(model)
    layers = attention_layers(model)
    linear = role_of.get("linear")
    dense_linears = {} if linear is None else _linears(model, linear)
    for method in chosen:
        _refuse_idle(model, method, layers)
    ropes = find_ropes(model) if any(m.needs_rope for m in chosen) else {}
    for method in chosen:
        if known := (calibrations or {}).get(method.card.slug):
            method.check_calibration(known, shapes)
    found = _calibrate(model, chosen, calibration_ids, calibrations or {})

    learners = _learners(chosen, layers, shapes, found)
    runtimes = {
        i: AttentionRuntime(
            i,
            n_layers=len(layers),
            learners={slug: modules[i] for slug, modules in learners.items() if i in modules},
            rope=ropes.get(i),
            prefill=role_of.get("prefill"),  # type: ignore[arg-type]
            select=role_of.get("select"),  # type: ignore[arg-type]
            store=role_of.get("store"),  # type: ignore[arg-type]
            calibrations=found,
            measure_recall=recall,
            measure_time=timing,
        )
        for i in layers
    }
    with ExitStack() as stack:  # whatever was done is undone if a later step fails
        stack.callback(switch(layers, runtimes))
        hook = decoder_of(model).register_forward_pre_hook(cache_hook(runtimes), with_kwargs=True)
        stack.callback(hook.remove)
        stack.callback(_deactivate, runtimes)
        prefill = role_of.get("prefill")
        if isinstance(prefill, PrefillMethod) and prefill.reads_vision:
            stack.callback(track_modality(model, runtimes.values()))
        linears: dict[str, nn.Module] = {}
        for name, old in dense_linears.items():
            assert isinstance(linear, LinearMethod)
            new = linear.convert(old, name, found.get(linear.card.slug))
            new.train(old.training)
            replace_module(model, name, new)
            stack.callback(_restore_linear, model, name, old, new)
            linears[name] = new
        undo = stack.pop_all().close
    return Handle(model, chosen, found, runtimes, linears, undo, learners)


def _linears(model: nn.Module, method: Method) -> dict[str, nn.Linear]:
    """The layers that a linear method is to replace; a model without any is refused, not left dense."""
    found = decoder_linears(model)
    if not found:
        raise SparselandError(
            f"{type(model).__name__}: {method.card.slug} found no torch.nn.Linear in its decoder layers and "
            "would do nothing; not supported"
        )
    return found


def _refuse_idle(model: nn.Module, method: Method, layers: Iterable[int]) -> None:
    """A method of the cache acts where the model keeps all tokens; where it never does, it is refused."""
    if method.roles <= {"select", "store"} and local_layers(model).issuperset(layers):
        raise SparselandError(
            f"{type(model).__name__}: every layer's cache ends at the model's own window, so "
            f"{method.card.slug} would do nothing; not supported"
        )


def _calibrate(
    model: nn.Module,
    methods: Sequence[Method],
    ids: Tensor | None,
    known: dict[str, Calibration],
) -> dict[str, Calibration]:
    """Calibrations by slug for the methods that need one, made now where they are not known."""
    found = {m.card.slug: known[m.card.slug] for m in methods if m.card.slug in known}
    for method in methods:
        slug = method.card.slug
        if not method.calibrates() or slug in found:
            continue
        if ids is not None:
            _check_ids(model, ids)
        elif method.learns_from_text:
            ids = _default_calibration_ids(model, slug)
        with evaluating(model), torch.no_grad():  # a method that trains enables gradients itself
            found[slug] = method.calibrate(model, ids)  # type: ignore[arg-type]
    return found


def _check_ids(model: nn.Module, ids: Any) -> None:
    """Token ids of this model, ``[B, N]``, or a clear error."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise SparselandError(f"calibration_ids must be a tensor of token ids [B, N], got {got}")
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    low, high, size = int(ids.min()), int(ids.max()), embeddings.weight.shape[0]
    if low < 0 or high >= size:
        raise SparselandError(
            f"calibration_ids go from {low} to {high}; this model's tokens are numbered from 0 to {size - 1}"
        )


def _learners(
    methods: Sequence[Method],
    layers: dict[int, nn.Module],
    shapes: dict[int, LayerShape],
    found: dict[str, Calibration],
) -> dict[str, dict[int, nn.Module]]:
    """Slug -> layer -> the method's own parameters, as its calibration left them."""
    made: dict[str, dict[int, nn.Module]] = {}
    for method in methods:
        slug = method.card.slug
        known = found[slug].tensors if slug in found else {}
        for i, layer in layers.items():
            learner = method.new_learner(shapes[i])
            if learner is None:
                continue
            state = {n.partition(".")[2]: t for n, t in known.items() if n.partition(".")[0] == str(i)}
            if state:
                try:
                    learner.load_state_dict(state)
                except RuntimeError as cause:
                    raise SparselandError(
                        f"{slug}: what was learnt for layer {i} does not fit this model: "
                        f"{str(cause).splitlines()[-1].strip()}"
                    ) from cause
            made.setdefault(slug, {})[i] = learner.to(next(layer.parameters()).device)
    return made


def learner_tensors(learners: dict[int, nn.Module]) -> dict[str, Tensor]:
    """Learners' states as a calibration's tensors: ``<layer>.<name>``."""
    return {
        f"{i}.{name}": t.detach().cpu().clone()
        for i, learner in learners.items()
        for name, t in learner.state_dict().items()
    }


def _default_calibration_ids(model: nn.Module, slug: str, length: int = 2048) -> Tensor:
    """The start of the default text in the model's own tokens."""
    from transformers import AutoTokenizer

    from sparseland.tasks.text import default_text

    config: Any = model.config
    source = getattr(config, "_name_or_path", "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as cause:
        raise SparselandError(
            f"{slug} must see the model on text first, and no tokenizer was found at {source!r}; "
            "pass calibration_ids (token ids [B, N])"
        ) from cause
    ids = tokenizer(default_text()[: 8 * length], return_tensors="pt").input_ids[:, :length]
    limit = getattr(config, "max_position_embeddings", length)
    return ids[:, :limit].to(next(model.parameters()).device)  # type: ignore[no-any-return]


def _restore_linear(model: nn.Module, name: str, linear: nn.Linear, new: nn.Module) -> None:
    if undo := getattr(new, "undo", None):
        undo()
    replace_module(model, name, linear)


def _deactivate(runtimes: dict[int, AttentionRuntime]) -> None:
    """Caches that live on after remove() must hand out real tensors again."""
    for runtime in runtimes.values():
        runtime.active = False


def _layer_stats(layer: int, tally: Tally) -> LayerStats:
    density = recall = None
    if isinstance(tally.pairs, Tensor):
        density = (tally.pairs / tally.possible).tolist()
    if isinstance(tally.recall, Tensor):
        recall = (tally.recall / tally.queries).tolist()
    decode = float(tally.read) / tally.readable if tally.readable else None
    times = (tally.select_s, tally.attend_s) if tally.attend_s else (None, None)
    return LayerStats(layer, density, recall, decode, *times)


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


__all__ = ["NAME", "Handle", "LayerStats", "Stats", "apply"]
