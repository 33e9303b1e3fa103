"""Recipes: the methods for one model, with what they learnt about it and the evidence they were chosen on.

A recipe is a JSON file; calibration tensors lie beside it as safetensors. Both are untrusted input:
every field is checked, file names can't leave the recipe's folder, and nothing is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseland.errors import SparselandError
from sparseland.files import read_object, write_atomically
from sparseland.method import Calibration, Method, as_methods, by_role, method_class

if TYPE_CHECKING:
    from torch import nn

    from sparseland.handle import Handle

SCHEMA = 1
MAX_TENSOR_BYTES = 8 * 2**30

# What makes two checkpoints interchangeable for a recipe: shapes, not weights or versions.
_ARCHITECTURE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "sliding_window", "layer_types",
)  # fmt: skip


@dataclass
class Recipe:
    """A list of methods with parameters, and the evidence they were chosen on.

    Args:
        methods: methods or specs; at least one unless dense won.
        calibrations: what calibrated methods learnt, by slug.
        model: the model the recipe is for: name, architecture and the hash of its shapes; empty = any.
        evidence: measurements and how they were made (free-form JSON).
    """

    methods: Sequence[Method] = ()
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.methods = tuple(as_methods(self.methods))
        by_role(self.methods)  # what can't be combined is no recipe

    @classmethod
    def of(
        cls,
        model: nn.Module,
        methods: Sequence[Method],
        calibrations: dict[str, Calibration] | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> Recipe:
        """A recipe for ``model``."""
        return cls(methods, dict(calibrations or {}), describe_model(model), dict(evidence or {}))

    def check(self, model: nn.Module) -> None:
        """Raise unless the recipe was made for a model of these shapes."""
        here = describe_model(model)
        wanted = self.model.get("config_sha256")
        if wanted is not None and wanted != here["config_sha256"]:
            raise SparselandError(
                f"this recipe was made for {self.model.get('name', '?')} "
                f"({self.model.get('architecture', '?')}), whose shapes differ from {here['name']} "
                f"({here['architecture']}); run frontier on this model"
            )

    def apply(self, model: nn.Module, **options: Any) -> Handle:
        """Put the recipe's methods on ``model`` (see :func:`sparseland.apply`)."""
        from sparseland.handle import apply

        return apply(model, self, **options)

    # ----------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write the recipe, tensors first and each file atomically, so that no half recipe can be read.

        Raises:
            SparselandError: the folder can't be written to.
        """
        path = Path(path)
        entries: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for slug, calibration in self.calibrations.items():
                entries[slug] = {"meta": calibration.meta}
                if calibration.tensors:
                    name = f"{path.stem}.{slug}.safetensors"
                    _write_tensors(path.parent / name, calibration)
                    entries[slug]["tensors"] = name
            data = {
                "schema": SCHEMA,
                "methods": [{"slug": m.card.slug, "params": m.params()} for m in self.methods],
                "model": self.model,
                "calibration": entries,
                "evidence": self.evidence,
            }
            write_atomically(path, _json(data))
        except OSError as cause:
            raise SparselandError(f"can't write the recipe {path}: {cause.strerror or cause}") from cause
        return path

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        Raises:
            SparselandError: not there, malformed, from a newer schema, or naming an unknown method.
        """
        path = Path(path)
        data = read_object(path, "recipe")
        schema = data.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise SparselandError(f"{path} is not a recipe: it has no schema number")
        if schema < 1:
            raise SparselandError(f"{path} has schema {schema}, which never was; schemas are numbered from 1")
        if schema > SCHEMA:
            raise SparselandError(
                f"{path} has schema {schema}, newer than this sparseland reads ({SCHEMA}); upgrade"
            )
        methods = [_method(path, entry) for entry in _typed(path, data, "methods", list)]
        calibrations = {}
        for slug, entry in _typed(path, data, "calibration", dict, {}).items():
            if slug not in [m.card.slug for m in methods] or not isinstance(entry, dict):
                raise SparselandError(f"{path}: calibration for {slug!r}, which is none of its methods")
            meta = _typed(path, entry, "meta", dict, {})
            tensors = _read_tensors(path, entry["tensors"]) if "tensors" in entry else {}
            calibrations[slug] = Calibration(meta, tensors)
        model = _typed(path, data, "model", dict, {})
        try:
            return cls(methods, calibrations, model, _typed(path, data, "evidence", dict, {}))
        except SparselandError as cause:
            raise SparselandError(f"{path}: {cause}") from cause


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Name, architecture and the hash of the shapes a recipe depends on."""
    config: Any = model.config
    text = config.get_text_config()
    shapes = {key: getattr(text, key, None) for key in _ARCHITECTURE}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True, default=str).encode()).hexdigest()
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    return {"name": Path(name).name, "architecture": type(model).__name__, "config_sha256": digest}


def _write_tensors(path: Path, calibration: Calibration) -> None:
    from safetensors.torch import save

    write_atomically(path, save({k: t.detach().cpu().contiguous() for k, t in calibration.tensors.items()}))


def _json(data: dict[str, Any]) -> bytes:
    try:
        return json.dumps(data, indent=1, allow_nan=False).encode()
    except (ValueError, TypeError) as cause:
        raise SparselandError(f"this recipe holds what JSON can't: {cause}") from cause


def _typed(path: Path, data: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = data.get(key, default)
    if not isinstance(value, kind):
        raise SparselandError(f"{path} is not a recipe: {key!r} must be a {kind.__name__}")
    return value


def _method(path: Path, entry: Any) -> Method:
    if not isinstance(entry, dict) or not isinstance(entry.get("slug"), str):
        raise SparselandError(f"{path} is not a recipe: each method must have a slug")
    params = _typed(path, entry, "params", dict, {})
    try:
        return _made(entry["slug"], params)
    except SparselandError as cause:
        raise SparselandError(f"{path}: {cause}") from cause


def _made(slug: str, params: dict[str, Any]) -> Method:
    cls = method_class(slug)
    known = set(cls.__dataclass_fields__)
    if unknown := sorted(set(params) - known):
        raise SparselandError(f"{slug} has no parameter {unknown[0]!r}")
    return cls(**params)


def _read_tensors(recipe: Path, name: Any) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise SparselandError(f"{recipe}: {name!r} is no safetensors file beside the recipe")
    path = recipe.parent / name
    try:
        if path.stat().st_size > MAX_TENSOR_BYTES:
            raise SparselandError(
                f"{path} has over {MAX_TENSOR_BYTES >> 30} GiB; calibration tensors are small"
            )
        return dict(load_file(path))
    except OSError as cause:
        raise SparselandError(f"can't read {path}: {cause.strerror or cause}") from cause
    except SafetensorError as cause:
        raise SparselandError(f"{path} is no valid safetensors file: {cause}") from cause
