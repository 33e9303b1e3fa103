"""The registry finds methods by their files; specs name them."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from sparseland.errors import SparselandError
from sparseland.method.base import Method

# Folders that may hold methods, one per site or field of use (see docs/methods/index.md).
METHOD_PACKAGES = (
    "attention", "cache", "tokens", "neurons", "weights", "adapters", "features", "mixers",
    "vision", "graph", "retrieval", "recommendation",
)  # fmt: skip


@cache
def _method_files() -> dict[str, str]:
    """Slug -> module name, for every file that may hold a method."""
    root = Path(__file__).parent.parent
    found: dict[str, str] = {}
    for package in METHOD_PACKAGES:
        for module in pkgutil.iter_modules([str(root / package)]):
            if module.name.startswith("_"):
                continue
            slug = module.name.replace("_", "-")
            if slug in found:
                raise ImportError(f"two methods are called {slug}: {found[slug]} and {package}")
            found[slug] = f"sparseland.{package}.{module.name}"
    return found


def method_slugs() -> list[str]:
    """The slugs of all methods, sorted."""
    return sorted(_method_files())


@cache
def method_class(slug: str) -> type[Method]:
    """The class of a slug; an unknown slug is an error that names the nearest ones."""
    files = _method_files()
    if slug not in files:
        near = difflib.get_close_matches(slug, files, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see `sparseland list`"
        raise SparselandError(f"unknown method {slug!r}; {hint}")
    module = importlib.import_module(files[slug])
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Method)
            and value.__module__ == module.__name__
            and "card" in vars(value)
        ):
            if value.card.slug != slug:
                raise ImportError(f"{files[slug]} calls itself {value.card.slug}, not {slug}")
            return value
    raise ImportError(f"{files[slug]} holds no method with a card")


def find_by_class_name(name: str) -> type[Method] | None:
    """``FlexPrefill`` -> its class, by the file whose name is the same letters (None if there is none)."""
    wanted = name.lower()
    for slug in _method_files():
        if slug.replace("-", "") == wanted:
            cls = method_class(slug)
            return cls if cls.__name__ == name else None
    return None


def parse_spec(spec: str) -> Method:
    """``"flexprefill:gamma=0.9,min_budget=512"`` -> a method, or one clear line."""
    slug, colon, rest = spec.strip().partition(":")
    cls = method_class(slug)
    names = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        if not item.strip():
            raise SparselandError(f"{spec.strip()!r}: a parameter is empty; write {slug} or {slug}:key=value")
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals:
            raise SparselandError(f"{slug}: {item!r} is not a parameter; write key=value")
        if name not in names:
            raise SparselandError(
                f"{slug}: no parameter {name!r}; it has {', '.join(names) if names else 'none'}"
            )
        if name in values:
            raise SparselandError(f"{slug}: {name} is given twice")
        values[name] = value.strip()
    return cls(**values)


def as_method(value: str | Method) -> Method:
    """A spec or a method -> a method."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return parse_spec(value)
    raise SparselandError(f"a method or a spec was expected, not {type(value).__name__}")


def as_methods(value: str | Method | Iterable[str | Method]) -> list[Method]:
    """Comma-separated specs, a method, or several specs and methods -> methods."""
    if isinstance(value, str):
        value = split_specs(value)
    if isinstance(value, Method):
        return [value]
    if not isinstance(value, Iterable):
        raise SparselandError(
            f"a spec, a method or a list of them was expected, not {value!r:.80} ({type(value).__name__})"
        )
    return [as_method(item) for item in value]


def split_specs(text: str) -> list[str]:
    """``"a,b:x=1,y=2,c"`` -> ``["a", "b:x=1,y=2", "c"]``: a comma before ``key=value`` stays inside.

    Raises:
        SparselandError: nothing stands before, between or after commas.
    """
    specs: list[str] = []
    for item in text.split(",") if text else ():
        if not item.strip():
            raise SparselandError(f"methods {text!r}: a name is empty; write specs such as a,b:key=value")
        head = item.split("=", 1)[0]
        if specs and "=" in item and ":" not in head:
            specs[-1] += "," + item
        else:
            specs.append(item.strip())
    return specs
