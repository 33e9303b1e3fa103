"""Tensors that depend on sizes alone: made once, for each layer of a model asks for the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_KEPT = 16  # shapes; a model asks for a few


def per_shape(make: Callable[P, R]) -> Callable[P, R]:
    """Remembers what ``make`` returned for the last few arguments (numbers and a device, no tensor).

    Nobody may write to the result. While a graph is made nothing is remembered: a graph's tensors live as
    long as it does.
    """
    remembered = lru_cache(maxsize=_KEPT)(make)

    @wraps(make)
    def ask(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _recorded():
            return make(*args, **kwargs)
        # Tensors made in inference mode could not be saved for a gradient later.
        with torch.inference_mode(False):
            return remembered(*args, **kwargs)  # type: ignore[arg-type]

    return ask


def _recorded() -> bool:
    """Whether operators are recorded or replaced instead of computed now."""
    if torch._C._len_torch_dispatch_stack():
        return True
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()
