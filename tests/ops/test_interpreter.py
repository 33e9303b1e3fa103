"""The tests' own way to reduce in Triton's interpreter gives what the interpreter's does."""

import pytest
import torch
import triton
import triton.language as tl

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here", allow_module_level=True)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _kernel(x, out, total, AXIS: tl.constexpr, N: tl.constexpr):
    b_x = tl.load(x + tl.arange(0, 8)[:, None] * 4 + tl.arange(0, 4)[None, :])
    tl.store(out + tl.arange(0, N), tl.reduce(b_x, AXIS, _largest))
    tl.store(total, tl.reduce(tl.reduce(b_x, 1, _largest), 0, _largest))


@pytest.mark.parametrize(("axis", "n"), [(0, 4), (1, 8)])
def test_reductions_of_our_own(axis: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    fast = interpreter.ReduceOps.generic_reduce
    (slow,) = fast.__defaults__

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    x[3, 2] = torch.nan
    results = []
    for reduce in (fast, slow):
        monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce)
        out, total = torch.zeros(n), torch.zeros(1)
        _kernel[(1,)](x, out, total, axis, n)
        results.append((out, total))
    for out, total in results:
        assert torch.equal(out.nan_to_num(9), x.amax(axis).nan_to_num(9))
        assert out.isnan().sum() == 1
        assert total.isnan().all()
