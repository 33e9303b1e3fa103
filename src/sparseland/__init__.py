"""Sparseland: sparse transformers you can measure.

Importing this package loads neither torch nor transformers; names are resolved on first use. Methods
are reachable by their class name (``sparseland.FlexPrefill``) without being listed anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparseland.errors import SparselandError
    from sparseland.handle import Handle, apply
    from sparseland.method import Method
    from sparseland.recipe import Recipe

__all__ = ["Handle", "Method", "Recipe", "SparselandError", "__version__", "apply"]

_HOMES = {
    "apply": "sparseland.handle",
    "Handle": "sparseland.handle",
    "Recipe": "sparseland.recipe",
    "Method": "sparseland.method",
    "SparselandError": "sparseland.errors",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name[:1].isupper():
        from sparseland.method import find_by_class_name

        cls = find_by_class_name(name)
        if cls is not None:
            return cls
    raise AttributeError(f"module 'sparseland' has no attribute {name!r}")
