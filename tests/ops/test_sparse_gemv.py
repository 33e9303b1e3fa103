"""Products that skip small inputs: every backend against a masked product in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.sparse_gemv import cpu, sparse_gemv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton"] if DEVICE == "cuda" else ["cpu", "triton"]
ALL = ["reference", *FAST]
# Relative to the largest output, by dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# tokens, in, out
SHAPES = [(1, 300, 256), (1, 33, 1), (3, 70, 130), (2, 64, 97), (5, 1, 8), (16, 40, 48)]
# Triton's interpreter multiplies bfloat16 matrices wrongly, so those are left to GPUs.
PRODUCTS = [
    (shape, dtype, backend)
    for shape in SHAPES
    for dtype in TOLERANCE
    for backend in ALL
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu") or shape[0] == 1
]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    n_tokens, n_in, n_out = shape
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(n_tokens, n_in, generator=g).to(DEVICE, dtype)
    return x, torch.randn(n_in, n_out, generator=g).to(DEVICE, dtype)


def masked(x: Tensor, wt: Tensor, threshold: Tensor) -> Tensor:
    kept = torch.where(x.abs().double() > threshold.double(), x.double(), 0)
    return kept @ wt.double()


def assert_close(got: Tensor, want: Tensor) -> None:
    bound = TOLERANCE[got.dtype] * max(1.0, want.abs().max().item())
    assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize(("shape", "dtype", "backend"), PRODUCTS, ids=str)
def test_masked_product(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    x, wt = inputs(shape, dtype)
    per_input = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bias = torch.linspace(-1, 1, shape[2]).to(DEVICE, dtype)
    for threshold in (
        per_input,
        torch.tensor(0.7, device=DEVICE),
        torch.tensor(0.5, device=DEVICE, dtype=dtype),
    ):
        y = sparse_gemv(x, wt, threshold, backend=backend)
        assert y.dtype == dtype
        assert_close(y, masked(x, wt, threshold))
        assert_close(
            sparse_gemv(x, wt, threshold, bias=bias, backend=backend), masked(x, wt, threshold) + bias
        )
    if x.numel() > 30:
        assert (masked(x, wt, per_input) - masked(x, wt, per_input * 0)).abs().max() > 0.1  # the mask matters


@pytest.mark.parametrize("backend", ALL)
def test_all_and_nothing(backend: str) -> None:
    x, wt = inputs(SHAPES[0])
    everything = sparse_gemv(x, wt, torch.tensor(-1.0, device=DEVICE), backend=backend)
    assert_close(everything, x.double() @ wt.double())
    bias = torch.ones(256, device=DEVICE)
    nothing = sparse_gemv(x, wt, torch.tensor(1e9, device=DEVICE), bias=bias, backend=backend)
    assert torch.equal(nothing, bias[None])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("n_tokens", [1, 2])
def test_the_comparison_is_strict(backend: str, n_tokens: int) -> None:
    x = torch.tensor([[0.5, -0.5, 0.25, -0.75]], device=DEVICE).expand(n_tokens, -1).contiguous()
    y = sparse_gemv(x, torch.eye(4, device=DEVICE), torch.tensor(0.5, device=DEVICE), backend=backend)
    assert torch.equal(y, torch.tensor([[0.0, 0.0, 0.0, -0.75]], device=DEVICE).expand(n_tokens, -1))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_what_is_skipped_does_not_leak(backend: str, n_tokens: int) -> None:
    """NaN and inf in skipped inputs; for one token also in the weights that it would not read."""
    x, wt = inputs((n_tokens, 70, 40))
    threshold = torch.zeros(70, device=DEVICE)
    threshold[:3] = torch.inf
    want = masked(x, wt, threshold)
    x[:, 0], x[:, 1], x[:, 2] = torch.nan, torch.inf, 3.0
    wt[:3] = torch.nan
    if backend != "reference" and n_tokens == 1:  # a masked dense product multiplies these weights by 0
        assert_close(sparse_gemv(x, wt, threshold, backend=backend), want)
    wt[:3] = 1.0
    assert_close(sparse_gemv(x, wt, threshold, backend=backend), want)


@pytest.mark.parametrize("backend", ALL)
def test_strided_tokens(backend: str) -> None:
    x, wt = inputs((3, 70, 64))
    threshold = torch.tensor(0.6, device=DEVICE)
    columns = x.t().contiguous().t()
    assert columns.stride(1) != 1
    assert_close(sparse_gemv(columns, wt, threshold, backend=backend), masked(x, wt, threshold))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("n_tokens", [1, 4])
def test_deterministic(backend: str, n_tokens: int) -> None:
    x, wt = inputs((n_tokens, 200, 96))
    runs = [sparse_gemv(x, wt, torch.tensor(0.5, device=DEVICE), backend=backend) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU backend")
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 60), st.floats(0, 2), st.integers(1, 5))
def test_cpu_pieces(n_tokens: int, n_in: int, n_out: int, threshold: float, threads: int) -> None:
    """Any width and number of threads, dense for many tokens or not."""
    x, wt = inputs((n_tokens, n_in, n_out))
    t = torch.tensor(threshold)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(sparse_gemv(x, wt, t, backend="cpu"), masked(x, wt, t))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU backend")
def test_many_tokens_are_computed_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    dense = cpu.dense
    monkeypatch.setattr(cpu, "dense", lambda x, *rest: seen.append(x.shape[0]) or dense(x, *rest))
    for n_tokens in (1, 2, 8):
        x, wt = inputs((n_tokens, 50, 20))
        sparse_gemv(x, wt, torch.tensor(0.1), backend="cpu")
    assert seen == [8]


@pytest.mark.parametrize("backend", ["", *ALL])
@pytest.mark.parametrize("n_tokens", [1, 2])
def test_library_registration(backend: str, n_tokens: int) -> None:
    x, wt = inputs((n_tokens, 20, 32))
    bias = torch.ones(32, device=DEVICE)
    threshold = torch.full((20,), 0.5, device=DEVICE)
    torch.library.opcheck(torch.ops.sparseland.sparse_gemv, (x, wt, threshold, bias, backend))
    torch.library.opcheck(torch.ops.sparseland.sparse_gemv, (x, wt, threshold[0], None, backend))


def test_compiles() -> None:
    x, wt = inputs((1, 64, 96))
    threshold = torch.tensor(0.5, device=DEVICE)

    def layer(x: Tensor) -> Tensor:
        return sparse_gemv(x * 2, wt, threshold).relu()

    assert_close(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x), masked(x * 2, wt, threshold).relu()
    )


def test_mistakes_are_named() -> None:
    x, wt = inputs((1, 64, 96))
    threshold = torch.tensor(0.5, device=DEVICE)
    with pytest.raises(SparselandError, match=r"got \[1, 64\] and \[96, 64\]"):
        sparse_gemv(x, wt.t(), threshold)
    with pytest.raises(SparselandError, match=r"scalar or \[64\], got \[3\]"):
        sparse_gemv(x, wt, threshold.expand(3))
    with pytest.raises(SparselandError, match=r"bias must be \[96\], got \[64\]"):
        sparse_gemv(x, wt, threshold, bias=x[0])
    with pytest.raises(SparselandError, match=r"got torch.float32 and torch.bfloat16"):
        sparse_gemv(x, wt.bfloat16(), threshold)
    with pytest.raises(SparselandError, match="at most 16 rows, got 17"):
        sparse_gemv(x.expand(17, -1), wt, threshold, backend="triton")
    with pytest.raises(SparselandError, match="contiguous, strides are"):
        sparse_gemv(x, wt.t().contiguous().t(), threshold, backend=FAST[0])
