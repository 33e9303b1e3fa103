"""Choosing the backend of an op: the fastest that supports the input, or the one that was asked for.

A backend is a name, a module and a predicate that says in words why it can't run an input (None if it
can). The order of the list is the order of speed. ``backend=...`` and the environment variable
``SPARSELAND_BACKEND`` ask for one by name; a request that can't be met raises, it never falls back.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from sparseland.errors import SparselandError

ENVIRONMENT = "SPARSELAND_BACKEND"


class _OnInputDevice:
    """A module whose functions run on the GPU of their first tensor.

    Kernels are launched on the current device, which need not be the one that holds the inputs.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        module = self._module
        value = getattr(module, name)
        if not callable(value) or isinstance(value, type):
            return value

        def run(*args: Any, **kwargs: Any) -> Any:
            function = getattr(module, name)
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
            if first is None or not first.is_cuda or first.device.index == torch.cuda.current_device():
                return function(*args, **kwargs)
            with torch.cuda.device(first.device):
                return function(*args, **kwargs)

        setattr(self, name, run)  # found at once from now on
        return run


@cache
def loaded(module: str) -> Any:
    """A backend's module, imported now, its functions running on the device of their inputs."""
    return _OnInputDevice(importlib.import_module(module))


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: ``reference``, ``cpu``, ``triton``, ``gluon`` or ``fa4``.
        module: where its functions live, e.g. ``sparseland.ops.block_sparse_attention.triton``.
        why_not: called with the op's arguments; the reason it can't run them, or None.
    """

    name: str
    module: str
    why_not: Callable[..., str | None]

    def load(self) -> Any:
        """The module, imported now: Triton and FlashAttention stay unloaded until they are used."""
        return loaded(self.module)


def choose(
    op: str, backends: tuple[Backend, ...], requested: str | None, *args: Any, **kwargs: Any
) -> Backend:
    """The backend for these arguments.

    Raises:
        SparselandError: the requested backend does not exist or can't run the input, or none can.
    """
    requested = requested or os.environ.get(ENVIRONMENT) or None
    if requested is not None:
        for backend in backends:
            if backend.name == requested:
                if reason := backend.why_not(*args, **kwargs):
                    raise SparselandError(f"{op}: backend {requested!r} can't run this input: {reason}")
                return backend
        names = ", ".join(b.name for b in backends)
        raise SparselandError(f"{op}: no backend {requested!r}; it has {names}")
    reasons = []
    for backend in backends:
        if backend.name == "triton" and interpreting():
            continue  # Triton's interpreter is for tests that ask for it; it is never the fastest
        reason = backend.why_not(*args, **kwargs)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise SparselandError(f"{op}: no backend can run this input ({'; '.join(reasons)})")


def module_of(backends: tuple[Backend, ...], name: str) -> Any:
    """The module of the backend of this name, which is all that a registered operator is told."""
    return next(b for b in backends if b.name == name).load()


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


# Looked up once, here: torch.compile can't trace the look-up. Nothing is imported.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_VERSION = _triton_version()
_GLUON_TRITON = "3.6."  # Gluon's interface is not stable between Triton's releases


def has_triton() -> bool:
    """Whether Triton is installed."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``, tests only)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# The second and third side of a CUDA grid, which kernels number the heads of a batch by.
LONGEST_SIDE = 65535


def why_no_triton(tensor: torch.Tensor, heads: int | None = None) -> str | None:
    """The reason Triton can't run on this tensor's device, or number so many heads; or None.

    Args:
        heads: of each row of the batch; by default the second size of a tensor ``[B, H, N, D]``. 0 if a
            kernel does not number them.
    """
    if not has_triton():
        return "triton is not installed"
    if heads is None:
        heads = tensor.shape[1] if tensor.dim() == 4 else 0
    if heads and tensor.shape[0] * heads > LONGEST_SIDE:
        return (
            f"a batch of {tensor.shape[0]} with {heads} heads is more than the {LONGEST_SIDE} that a grid "
            "numbers: split the batch"
        )
    if tensor.device.type == "cuda":
        return None
    if interpreting():
        return None
    return f"triton needs a CUDA device, the input is on {tensor.device.type}"


def why_no_gluon(tensor: torch.Tensor) -> str | None:
    """The reason a Gluon kernel for Hopper can't run on this tensor's device, or None."""
    if tensor.device.type != "cuda":
        return f"it needs a CUDA device, the input is on {tensor.device.type}"
    if not (_TRITON_VERSION or "").startswith(_GLUON_TRITON):
        return f"it needs triton {_GLUON_TRITON}x, found {_TRITON_VERSION or 'none'}"
    if torch.cuda.get_device_capability(tensor.device)[0] != 9:
        return "it is made for compute capability 9.0 (Hopper)"
    return None


def why_not_float(tensor: torch.Tensor) -> str | None:
    """The reason a kernel for the common floating-point types can't take this tensor, or None."""
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return f"it needs bfloat16, float16 or float32, got {tensor.dtype}"


def may_ask(tensor: torch.Tensor) -> bool:
    """Whether Python may look at the tensor's values: no one waits for a CPU, but a graph holds none yet."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def on_cpu(tensor: torch.Tensor) -> str | None:
    """The reason a CPU backend can't take this tensor, or None."""
    return None if tensor.device.type == "cpu" else f"the input is on {tensor.device.type}, not on the CPU"


def check_attention_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """``q [B, Hq, Nq, D]``, ``k, v [B, Hkv, Nk, D]``, Hq a multiple of Hkv, Nq <= Nk; or a clear error."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise SparselandError(
            f"q, k, v must be [B, H, N, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if k.shape != v.shape:
        raise SparselandError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise SparselandError(f"q {list(q.shape)} and k {list(k.shape)} differ in batch or head size")
    if q.shape[1] % k.shape[1]:
        raise SparselandError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if q.shape[2] > k.shape[2]:
        raise SparselandError(f"{q.shape[2]} queries but only {k.shape[2]} keys")
    if not (q.dtype == k.dtype == v.dtype):
        raise SparselandError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise SparselandError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
