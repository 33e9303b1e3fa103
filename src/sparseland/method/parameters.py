"""Parameters of methods: dataclass fields with help and allowed values, read from text or Python."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import field
from fractions import Fraction
from typing import Any

from sparseland.errors import SparselandError


def param(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field of a method, with its help text and allowed range.

    Example::

        gamma: float = param(0.9, "attention mass to cover", gt=0, le=1)
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return field(default=default, metadata={"help": help, "choices": choices, **bounds})


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Each field's type, for classes whose annotations are strings."""
    return typing.get_type_hints(cls)


def format_value(value: Any) -> str:
    """A value as specs write it; reading it gives the same value back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return "none" if value is None else str(value)


def _allowed(f: dataclasses.Field[Any], kind: type) -> str:
    """What a parameter may be, in words: ``a number > 0 and <= 1``."""
    if f.metadata.get("choices"):
        return "one of " + ", ".join(f.metadata["choices"])
    if kind is bool:
        return "true or false"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = " and ".join(
        f"{sign} {f.metadata[name]:g}" for name, sign in signs.items() if f.metadata.get(name) is not None
    )
    noun = {int: "a whole number", float: "a number", str: "text"}[kind]
    return f"{noun} {bounds}".strip()


def coerce(slug: str, f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """Turn a spec's text (or a Python value) into the field's type, or say what is allowed."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    kind = next(o for o in options if o is not type(None))
    error = SparselandError(f"{slug}: {f.name}={value} is not allowed; it must be {_allowed(f, kind)}")
    try:
        parsed = _parse(kind, value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as cause:
        raise error from cause
    choices = f.metadata.get("choices")
    if choices and parsed not in choices:
        raise error
    if kind in (int, float):
        m = f.metadata
        inside = (
            (m.get("ge") is None or parsed >= m["ge"])
            and (m.get("gt") is None or parsed > m["gt"])
            and (m.get("le") is None or parsed <= m["le"])
            and (m.get("lt") is None or parsed < m["lt"])
        )
        if not inside or (kind is float and not math.isfinite(parsed)):
            raise error
    return parsed


def _parse(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(value)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(value)
        return int(value)
    if kind is float:
        if isinstance(value, bool):
            raise ValueError(value)
        # Fractions are how papers write budgets: 1/16 reads better than 0.0625.
        return float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def describe_params(cls: type[Any]) -> list[dict[str, Any]]:
    """Name, default, help and allowed values of each parameter, for ``sparseland show``."""
    hints = field_types(cls)
    rows = []
    for f in dataclasses.fields(cls):
        options = [o for o in (typing.get_args(hints[f.name]) or (hints[f.name],)) if o is not type(None)]
        rows.append(
            {
                "name": f.name,
                "default": f.default,
                "help": f.metadata["help"],
                "allowed": _allowed(f, options[0]),
            }
        )
    return rows
