"""Tensors that depend on sizes alone: made once, for each layer of a model asks for the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
# Sizes can differ by layer, and fewer than a model has layers would be forgotten before they come again.
_KEPT = 256


def per_shape(make: Callable[P, R]) -> Callable[P, R]:
    """Remembers what ``make`` returned for its last arguments (numbers and a device, no tensor).

    Nobody may write to the result. While a graph is made nothing is remembered: a graph's tensors live as
    long as it does.
    """

    @lru_cache(maxsize=_KEPT)
    def remembered(stream: int, *args: P.args, **kwargs: P.kwargs) -> R:
        # Tensors made in inference mode could not be saved for a gradient later.
        with torch.inference_mode(False):
            return make(*args, **kwargs)

    @wraps(make)
    def ask(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return make(*args, **kwargs)
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return remembered(0, *args, **kwargs)  # type: ignore[arg-type]
        if torch.cuda.is_current_stream_capturing():
            return make(*args, **kwargs)
        # Another stream would not wait until the tensors are there.
        return remembered(torch.cuda.current_stream().cuda_stream, *args, **kwargs)  # type: ignore[arg-type]

    return ask
