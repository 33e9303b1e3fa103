"""Which tokens of a prompt are vision: read from a vision-language model's call, for methods that ask.

Images and videos stand in ``input_ids`` as runs of placeholder tokens, whose ids the model's configuration
names. A hook on the whole model notes them before the decoder, which sees embeddings only, runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs
from sparseland.models.attention import switched
from sparseland.models.surgery import attention_layers, decoder_of

# How configurations call the placeholders.
_NAMES = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
_GRIDS = ("video_grid_thw", "image_grid_thw")  # Qwen's: frames, rows and columns of patches


def vision_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids that stand for parts of images and videos; none for a text model."""
    config: Any = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _NAMES)
    return tuple(sorted({int(i) for i in found if i is not None}))


def vision_mask(model: nn.Module, ids: Int[Tensor, "B N"]) -> Bool[Tensor, "B N"] | None:
    """True at image and video tokens, on the CPU; None for a model without any."""
    wanted = vision_token_ids(model)
    if not wanted:
        return None
    return torch.isin(ids.cpu(), torch.tensor(wanted))


def frame_strides(model: nn.Module, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens per frame and per row of the videos and images of a call, where it tells (Qwen's grids).

    ``merge x merge`` patches are one token.
    """
    vision: Any = getattr(getattr(model, "config", None), "vision_config", None)
    merge = int(getattr(vision, "spatial_merge_size", 1) or 1)
    strides: set[int] = set()
    for name in _GRIDS:
        grid = call.get(name)
        if isinstance(grid, Tensor):
            for _, height, width in grid.tolist():
                strides |= {height * width // merge**2, width // merge}
    return tuple(sorted(s for s in strides if s > 1))


class Modality:
    """What the layers of one model share about the prompt at hand.

    Args:
        rows: vision tokens of every cached and new token ``[B, N]``, on the CPU; None: not known.
        strides: tokens per frame and row, where the call told.
    """

    def __init__(self) -> None:
        self.rows: Bool[Tensor, "B N"] | None = None
        self.strides: tuple[int, ...] = ()
        self.active = False  # while the whole model runs; a call of the decoder alone is not known

    def note(self, model: nn.Module, call: Mapping[str, Any]) -> None:
        """Take in one call of the whole model; a later chunk of a prompt is appended to the earlier ones."""
        ids, cache = call.get("input_ids"), call.get("past_key_values")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            self.rows, self.strides = None, ()
            return
        past = int(cache.get_seq_length()) if cache is not None else 0
        # A decoding step is text, and looking at its token would wait for the device.
        new = torch.zeros(ids.shape, dtype=torch.bool) if ids.shape[1] == 1 else vision_mask(model, ids)
        before = self.rows
        if new is None or (past and (before is None or before.shape != (ids.shape[0], past))):
            self.rows = None  # another cache than the one at hand
        else:
            self.rows = new if not past or before is None else torch.cat([before, new], 1)
        if not past:
            self.strides = ()
        self.strides = tuple(sorted({*self.strides, *frame_strides(model, call)}))

    def of(self, batch: int, n_keys: int) -> Bool[Tensor, "B N"] | None:
        """The vision tokens of a layer's keys, if they are known for keys of this shape."""
        if not self.active or self.rows is None or self.rows.shape != (batch, n_keys):
            return None
        return self.rows


def track_modality(model: nn.Module, runtimes: Iterable[Any]) -> Callable[[], None]:
    """Keep one :class:`Modality` up to date and hand it to the layers' runtimes; returns the undo."""
    shared = Modality()
    for runtime in runtimes:
        runtime.modality = shared
    if not vision_token_ids(model):
        return lambda: None

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shared.note(model, {**kwargs, **({"input_ids": args[0]} if args else {})})
        shared.active = True

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shared.active = False

    hooks = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    )

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


class _Recorder:
    """Stands where a layer's runtime stands: computes dense attention and notes its inputs."""

    active = False

    def __init__(self, layer: int, n_layers: int) -> None:
        self.layer, self.n_layers = layer, n_layers
        self.noted: AttentionInputs | None = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        from sparseland.ops.attend import attend
        from sparseland.patterns import WindowPattern

        self.noted = AttentionInputs(q.clone(), k.clone(), v.clone(), scale, self.layer, self.n_layers)
        pattern = WindowPattern(q.shape[2], k.shape[2], 0, mask.window or k.shape[2])
        return attend(q, k, v, pattern, scale=scale)


@torch.no_grad()
def capture_inputs(model: nn.Module, call: Mapping[str, Any]) -> Iterator[AttentionInputs]:
    """What every attention layer sees in one dense call of the whole model, one batch row at a time.

    Args:
        call: the model's own keyword arguments: ``input_ids`` and, for vision, pixel values and grids. Rows
            without padding.
    """
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise SparselandError("the call to learn from needs input_ids [B, N]")
    modality = Modality()
    modality.note(model, call)
    modules = attention_layers(model)
    recorders: dict[int, Any] = {i: _Recorder(i, len(modules)) for i in modules}
    device = next(model.parameters()).device
    inputs = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in call.items()}
    with switched(modules, recorders):
        # Without vision, the decoder alone: no logits of a whole prompt are made.
        whole = model if modality.rows is not None and len(inputs) > 1 else decoder_of(model)
        whole(**inputs, use_cache=False)
    for recorder in recorders.values():
        x, recorder.noted = recorder.noted, None
        assert x is not None
        for row in range(ids.shape[0]):
            at = slice(row, row + 1)
            vision = None if modality.rows is None else modality.rows[row]
            yield replace(x, q=x.q[at], k=x.k[at], v=x.v[at], vision=vision, strides=modality.strides)
