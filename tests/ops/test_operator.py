"""Operators: called directly where nobody looks on, else as PyTorch knows them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sparseland.ops._operator import Operator

calls: list[str] = []


def _double(x: Tensor, times: int) -> Tensor:
    calls.append("direct" if torch._C._len_torch_dispatch_stack() == 0 else "watched")
    return x.detach() * 2**times


double = Operator(_double, "sparseland_tests::double")
double.registered.register_kernel("cpu")(lambda x, times: calls.append("registered") or _double(x, times))
double.register_fake(lambda x, times: torch.empty_like(x))
double.register_autograd(
    lambda ctx, grad: (double(grad, ctx.times), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "times", inputs[1]),
)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def test_plain_tensors_go_the_short_way() -> None:
    x = torch.ones(3)
    assert torch.equal(double(x, times=2), 4 * x)
    assert torch.equal(double(torch.nn.Parameter(x, requires_grad=False), 1), 2 * x)
    with torch.no_grad():
        double(x.clone().requires_grad_(), 1)
    with torch.inference_mode():
        double(x, 1)
    assert calls == ["direct"] * 4


def test_gradients_are_kept() -> None:
    x = torch.ones(3, requires_grad=True)
    double(x, 3).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3,), 8.0))
    assert calls[0] == "registered"


def test_modes_transforms_and_tensors_of_other_kinds_are_told() -> None:
    x = torch.ones(3)
    with FlopCounterMode(display=False):
        double(x, 1)
    assert calls[0] == "registered"
    # No transform is served, and none goes by in silence.
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda t: double(t, 1).sum())(x)
    calls.clear()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert double(fake, 1).shape == x.shape
    assert not calls, "a fake tensor holds nothing to compute with"


def test_a_graph_holds_the_operator() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: double(x, 1) + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    assert any("sparseland_tests.double" in str(node.target) for node in graphs[0].graph.nodes)
