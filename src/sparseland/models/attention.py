"""The one attention function that is registered with transformers, and reading a model through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseland.errors import SparselandError, out_of_memory
from sparseland.models.masks import MaskSpec, build_mask_spec
from sparseland.models.surgery import decoder_of

NAME = "sparseland"
# Where a layer's runtime hangs on its attention module.
ATTRIBUTE = "_sparseland"


def register() -> None:
    """Register attention and mask function; only models switched to ``NAME`` ever call them."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, build_mask_spec)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskSpec | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ``q [B, Hq, Nq, D]`` -> ``[B, Nq, Hq, D]``."""
    runtime = module.__dict__.get(ATTRIBUTE)
    if runtime is None:
        raise SparselandError(
            f"{type(module).__name__} runs sparseland's attention but no method was applied to it"
        )
    if dropout:
        raise SparselandError(
            f"attention dropout ({dropout}) is not supported with sparse attention; set it to 0"
        )
    for name, what in (("softcap", "soft-capped attention logits"), ("s_aux", "learned attention sinks"),
                       ("position_bias", "an attention bias")):  # fmt: skip
        if kwargs.get(name) is not None:
            raise SparselandError(f"{type(module).__name__} uses {what}, which no sparse op computes")
    if value.shape[-1] != query.shape[-1]:
        raise SparselandError(f"{type(module).__name__}: keys and values differ in head size; not supported")
    if isinstance(attention_mask, Tensor):
        raise SparselandError(
            "a ready-made 4-D attention mask can't be combined with sparse attention; pass [B, N]"
        )
    window = kwargs.get("sliding_window")
    mask = attention_mask or MaskSpec(key.shape[2])
    if window is not None and mask.window is None:
        mask = MaskSpec(mask.n_keys, int(window), mask.valid, mask.first_key, mask.one_run)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = _autocast(query, key, value)
    out = runtime.attention(query, key, value, mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, a prompt's q, k, v in autocast's dtype, as PyTorch's own attention takes them.

    Rotary angles are float32, so q and k come in wider than v. A decoding step stays as it is: its keys
    are read from a cache or store that was filled without autocast's knowledge.
    """
    kind = q.device.type
    if q.shape[2] == 1 or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@contextmanager
def switched(layers: dict[int, nn.Module], runtimes: dict[int, Any]) -> Iterator[None]:
    """Run ``layers`` through :func:`attention_forward` with these runtimes, then restore everything."""
    undo = switch(layers, runtimes)
    try:
        yield
    finally:
        undo()


def switch(layers: dict[int, nn.Module], runtimes: dict[int, Any]) -> Any:
    """Like :func:`switched`, but returns the function that restores."""
    register()
    # Layers share their model's config object, which is also what the model builds its masks from.
    configs = {id(layer.config): layer.config for layer in layers.values()}
    before = [(config, config._attn_implementation) for config in configs.values()]  # type: ignore[union-attr]
    for index, layer in layers.items():
        layer.__dict__[ATTRIBUTE] = runtimes[index]
    for config in configs.values():
        config._attn_implementation = NAME  # type: ignore[union-attr]

    def undo() -> None:
        for config, name in before:
            config._attn_implementation = name  # type: ignore[union-attr]
        for layer in layers.values():
            layer.__dict__.pop(ATTRIBUTE, None)

    return undo


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own mode comes back after (parts of a model may be frozen)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def tiny_forward(model: nn.Module, ids: Tensor, **options: Tensor) -> Tensor:
    """The decoder's last hidden states ``[B, N, C]`` of a short input.

    Raises:
        SparselandError: the decoder can't be run in this way, for whatever reason.
    """
    try:
        output = decoder_of(model)(input_ids=ids, use_cache=False, **options)
        states: Tensor = output.last_hidden_state
    except SparselandError:
        raise
    except Exception as cause:
        if out_of_memory(cause):
            raise
        reason = " ".join(str(cause).split()) or type(cause).__name__
        if MaskSpec.__name__ in reason:
            reason = "its attention adds a mask to scores of its own, not through AttentionInterface"
        raise SparselandError(
            f"{type(model).__name__}: its decoder fails on a tiny input and is not supported: {reason:.200}"
        ) from cause
    return states


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b``."""
    a, b = a.float(), b.float()
    return float((a - b).norm() / b.norm().clamp(min=1e-9))


def tiny_ids(model: nn.Module, length: int = 12) -> Tensor:
    """A short input for probing: distinct small token ids."""
    config: Any = model.config
    vocab = getattr(config.get_text_config(), "vocab_size", 2)
    device = next(model.parameters()).device
    return (torch.arange(length, device=device) * 7 + 3).remainder(vocab)[None]
