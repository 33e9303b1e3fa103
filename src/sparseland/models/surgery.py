"""Finding one's way in a transformers decoder: its attention layers and its linear layers."""

from __future__ import annotations

from torch import nn

from sparseland.errors import SparselandError


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Layer index -> self-attention module, for every softmax attention layer of a decoder.

    Raises:
        SparselandError: there is none, or two claim one index.
    """
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        # transformers' convention since 4.48: `<Model>Attention` with a layer index and a config.
        if not type(module).__name__.endswith("Attention") or not hasattr(module, "config"):
            continue
        index = getattr(module, "layer_idx", None)
        if index is None or getattr(module, "is_cross_attention", False):
            continue
        if getattr(module, "is_causal", True) is False:
            continue
        if index in found:
            raise SparselandError(
                f"{type(model).__name__}: {name} repeats attention layer {index}; not supported"
            )
        found[index] = module
    if not found:
        raise SparselandError(f"{type(model).__name__} has no decoder attention layers that sparseland knows")
    return dict(sorted(found.items()))


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Qualified name -> linear layer, for all linears inside the decoder's layers.

    Embeddings and the output head are not in a decoder layer, so they never count.
    """
    layers = next(iter(attention_layers(model).values()))
    stack = _layer_stack(model, layers)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(stack + ".")
    }


def _layer_stack(model: nn.Module, attention: nn.Module) -> str:
    """Name of the ModuleList that holds the decoder layers."""
    name = next(name for name, module in model.named_modules() if module is attention)
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end])
        if isinstance(model.get_submodule(prefix), nn.ModuleList):
            return prefix
    raise SparselandError(f"{type(model).__name__}: attention layer {name} is in no list of layers")


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the module called ``name`` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module whose forward takes ``past_key_values`` and loops over the layers."""
    stack = _layer_stack(model, next(iter(attention_layers(model).values())))
    return model.get_submodule(stack.rpartition(".")[0])
