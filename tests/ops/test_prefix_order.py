"""The n-th smallest of every prefix: each backend against a sorted list that grows."""

from __future__ import annotations

import pytest
import torch

from sparseland.errors import SparselandError
from sparseland.ops.prefix_order import _nth_of_prefixes, nth_of_prefixes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton", "torch"] if DEVICE == "cuda" else ["cpu", "triton", "torch"]


def orders(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    rows = [torch.randperm(n, generator=g) for _ in range(4)]
    rows += [torch.arange(n), torch.randint(0, n, (n,), generator=g)]  # in order; with repeats
    return torch.stack(rows).view(2, 3, n).to(DEVICE)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("n", [1, 2, 17, 64, 300, 4500])  # 4500: several tiles
def test_against_the_definition(n: int, backend: str) -> None:
    values = orders(n)
    for nth in {0, 3, n // 2, n - 1, n + 5}:
        got = nth_of_prefixes(values, nth, backend=backend)
        expected = nth_of_prefixes(values, nth, backend="reference")
        assert got.dtype == torch.int64
        assert torch.equal(got[..., nth + 1 :], expected[..., nth + 1 :])


@pytest.mark.parametrize("backend", FAST)
def test_views_and_nothing(backend: str) -> None:
    values = orders(100)
    view = values.transpose(0, 1).contiguous().transpose(0, 1)
    got = nth_of_prefixes(view, 4, backend=backend)[..., 5:]
    assert torch.equal(got, nth_of_prefixes(values, 4, backend=backend)[..., 5:])
    assert nth_of_prefixes(values[:0], 4, backend=backend).shape == (0, 3, 100)


def test_errors() -> None:
    with pytest.raises(SparselandError, match="int64"):
        nth_of_prefixes(torch.zeros(3, device=DEVICE), 0)
    with pytest.raises(SparselandError, match="nth=-1"):
        nth_of_prefixes(orders(5), -1)


def test_opcheck() -> None:
    # What lies before the first answer is undefined, so every prefix here has one but the empty one.
    values = orders(20)
    torch.library.opcheck(_nth_of_prefixes.registered, (values, 0))
