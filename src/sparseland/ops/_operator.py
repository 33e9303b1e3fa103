"""Operators that ``torch.compile``, autograd and CUDA graphs see whole, and that cost eager code nothing.

A call of an operator registered with ``torch.library`` goes through PyTorch's dispatcher and back to Python
several times, which takes longer than to launch a kernel, and a selection is a dozen calls. So it goes that
way only where somebody looks on: where a graph is traced, a gradient is wanted, or a mode or a transform is
active.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Operator(Generic[R]):
    """A function that is called itself where nobody looks on, else by the name it is registered under.

    Args:
        function: what computes; it must not return its inputs or views of them.
        name: ``sparseland::...``.
        mutates: the arguments that it writes to.
    """

    def __init__(self, function: Callable[..., R], name: str, mutates: tuple[str, ...] = ()) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=mutates)
        self.register_fake = self.registered.register_fake
        self.register_autograd = self.registered.register_autograd

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        if torch.compiler.is_compiling() or _watched((*args, *kwargs.values())):
            return self.registered(*args, **kwargs)  # type: ignore[no-any-return]
        return self.function(*args, **kwargs)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., R]], Operator[R]]:
    """Registers the function below under this name (:class:`Operator`)."""
    return partial(Operator, name=name, mutates=mutates)


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether PyTorch must see this call: a mode, a transform, a tensor of another kind or a gradient."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    wanted = torch.is_grad_enabled()
    return any(
        type(x) not in (Tensor, torch.nn.Parameter) or (wanted and x.requires_grad)
        for x in args
        if isinstance(x, Tensor)
    )
