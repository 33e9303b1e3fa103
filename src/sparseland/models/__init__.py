"""Models to work on, and everything that touches transformers' insides."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseland.models.embedded import load_embedded
    from sparseland.models.folder import LoadedModel
    from sparseland.models.load import load_model
    from sparseland.models.tiny import tiny_model

__all__ = ["LoadedModel", "load_embedded", "load_model", "tiny_model"]

_HOMES = {"LoadedModel": "folder", "load_embedded": "embedded", "load_model": "load", "tiny_model": "tiny"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
