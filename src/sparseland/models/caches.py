"""transformers' KV cache with something beside each layer: a selector's state, or another store.

A :class:`TrackedLayer` wraps one cache layer. With a selector it passes everything through and tells
the selector's state of each appended key. With a store it keeps keys and values only in the store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from sparseland.errors import SparselandError
from sparseland.method import KVStore, SelectMethod, SelectState
from sparseland.models.surgery import decoder_of

if TYPE_CHECKING:
    from sparseland.runtime import AttentionRuntime


class TrackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One cache layer with a selector's state, a store, or both."""

    is_croppable = True

    def __init__(
        self,
        inner: Any,
        runtime: AttentionRuntime,
        selector: SelectMethod | None,
        state: SelectState | None,
        store: KVStore | None,
    ) -> None:
        super().__init__()
        self.inner, self.runtime = inner, runtime
        self.selector, self.state, self.store = selector, state, store
        self._batch = 0
        # Compiled decoding replays one graph; a growing state or store would not be in it.
        self.is_compileable = False
        self.is_sliding = getattr(inner, "is_sliding", False)

    @property
    def is_initialized(self) -> bool:
        return len(self.store) > 0 if self.store is not None else self.inner.is_initialized

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:  # the base class sets it; the inner layer knows better
        pass

    @property
    def keys(self) -> Tensor | None:
        if self.store is None:
            return self.inner.keys  # type: ignore[no-any-return]
        return self.store.dense()[0] if len(self.store) else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            self.inner.keys = value

    @property
    def values(self) -> Tensor | None:
        if self.store is None:
            return self.inner.values  # type: ignore[no-any-return]
        return self.store.dense()[1] if len(self.store) else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            self.inner.values = value

    def lazy_initialization(self, *args: Any) -> None:
        self.inner.lazy_initialization(*args)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new keys and values; what comes back goes to the attention function."""
        self._batch = key_states.shape[0]
        if self.selector is not None and self.state is not None:
            self.selector.append(self.state, key_states)
        if self.store is None:
            keys, values = self.inner.update(key_states, value_states, *args, **kwargs)
        elif key_states.shape[2] == 1 and self.runtime.active:
            # One decoding step reads the store itself. Models only pass these tensors on; should one look
            # inside, it finds NaN rather than wrong numbers.
            self.store.append(key_states, value_states)
            shape = (*key_states.shape[:2], len(self.store), key_states.shape[3])
            keys = values = key_states.new_full((1, 1, 1, 1), float("nan")).expand(shape)
        else:
            # A prompt attends to its own keys as they are, and to what the store gives back of the past.
            past = self.store.dense() if len(self.store) else None
            self.store.append(key_states, value_states)
            keys, values = key_states, value_states
            if past is not None:
                keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        self.runtime.tracked = self
        return keys, values

    def get_seq_length(self) -> int:
        return len(self.store) if self.store is not None else self.inner.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.store is None:
            return self.inner.get_mask_sizes(query_length)  # type: ignore[no-any-return]
        return len(self.store) + query_length, 0

    def get_max_length(self) -> int:
        return self.inner.get_max_length()  # type: ignore[no-any-return]

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._batch = beam_idx.numel()
        if self.store is None:
            self.inner.reorder_cache(beam_idx)
        else:
            self.store.reorder(beam_idx)
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self._batch).repeat_interleave(repeats))

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens or, if negative, all but the last ``-length``; 0 does nothing.

        Assisted decoding calls it with minus the number of tokens that were guessed wrong, often 0.
        """
        if length == 0:
            return
        if self.store is None:
            before = int(self.inner.get_seq_length())
            self.inner.crop(length)
            length = int(self.inner.get_seq_length())
            if length == before:
                return
        else:
            # transformers counts from the front, or, if negative, from the end.
            length = len(self.store) + length if length < 0 else length
            self.store.crop(max(0, length))
        if length <= 0:
            self.runtime.renew(self)  # nothing is left, not even where padding ended
        elif self.state is not None:
            self.state.crop(length)

    def reset(self) -> None:
        self.inner.reset()
        self.runtime.renew(self)

    def nbytes(self) -> int:
        """Bytes held: keys and values in the store's form, and the selector's state."""
        total = self.state.nbytes() if self.state is not None else 0
        if self.store is not None:
            return total + self.store.nbytes()
        if not self.inner.is_initialized:
            return total
        return total + sum(int(t.nbytes) for t in (self.inner.keys, self.inner.values))


def track_cache(cache: Any, runtimes: dict[int, AttentionRuntime]) -> None:
    """Wrap the layers of ``cache`` in place, once, for every layer that has something to keep."""
    replicate = getattr(cache, "layer_class_to_replicate", None)
    if replicate is not None:
        while len(cache.layers) <= max(runtimes):
            cache.layers.append(replicate())
    for index, runtime in runtimes.items():
        if not runtime.keeps_something or index >= len(cache.layers):
            continue
        inner = cache.layers[index]
        if isinstance(inner, TrackedLayer):
            if inner.runtime is runtime:
                continue
            raise SparselandError("this cache belongs to another sparse model; start with a fresh one")
        if getattr(inner, "is_sliding", False):
            continue  # a local layer's cache is bounded by its window already
        if runtime.store is not None and type(inner) is not DynamicLayer:
            raise SparselandError(
                f"{runtime.store.card.slug} replaces the cache and works with a dynamic cache only, "
                f"not with {type(inner).__name__}"
            )
        if int(inner.get_seq_length()) > 0:
            raise SparselandError(
                "a cache filled before the method was applied can't be used; start with a fresh one"
            )
        cache.layers[index] = runtime.track(inner)


def local_layers(model: torch.nn.Module) -> set[int]:
    """The layers whose cache is bounded by the model's own window, and which no cache method changes."""
    cache = DynamicCache(config=decoder_of(model).config)
    return {i for i, layer in enumerate(cache.layers) if getattr(layer, "is_sliding", False)}


def cache_hook(runtimes: dict[int, AttentionRuntime]) -> Callable[..., Any]:
    """A forward pre-hook for the decoder that wraps whatever cache comes in, or brings one."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(r.keeps_something for r in runtimes.values()):
            return None
        cache = kwargs.get("past_key_values")
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if use_cache is False or (use_cache is None and not getattr(module.config, "use_cache", False)):
                return None
            cache = kwargs["past_key_values"] = DynamicCache(config=module.config)
        track_cache(cache, runtimes)
        return args, kwargs

    return hook


def cache_nbytes(cache: Any) -> int:
    """Bytes of keys and values (and selector states) that a transformers cache holds."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, TrackedLayer):
            total += layer.nbytes()
        elif getattr(layer, "is_initialized", False):
            total += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    return total
