"""What a method is: a frozen dataclass of parameters with a card, found by its file name.

A method is named by a *spec*, ``slug`` or ``slug:key=value,key=value``. The slug is the paper's short
name; the file is the slug with ``-`` written ``_``, in the folder of its site (``attention/``,
``cache/``, …). Nothing registers methods by hand: the registry looks at the files.
"""

from sparseland.method.base import ROLES, Method, Role
from sparseland.method.card import Card, Site, Training
from sparseland.method.inputs import AttentionInputs, Calibration, LayerShape, Rope
from sparseland.method.parameters import describe_params, param
from sparseland.method.registry import (
    METHOD_PACKAGES,
    as_method,
    as_methods,
    find_by_class_name,
    method_class,
    method_slugs,
    parse_spec,
    split_specs,
)
from sparseland.method.roles import LinearMethod, PrefillMethod, SelectMethod, StoreMethod, by_role
from sparseland.method.state import KVStore, SelectState

__all__ = [
    "METHOD_PACKAGES",
    "ROLES",
    "AttentionInputs",
    "Calibration",
    "Card",
    "KVStore",
    "LayerShape",
    "LinearMethod",
    "Method",
    "PrefillMethod",
    "Role",
    "Rope",
    "SelectMethod",
    "SelectState",
    "Site",
    "StoreMethod",
    "Training",
    "as_method",
    "as_methods",
    "by_role",
    "describe_params",
    "find_by_class_name",
    "method_class",
    "method_slugs",
    "param",
    "parse_spec",
    "split_specs",
]
