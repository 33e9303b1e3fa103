"""Sinks + window: against a dense mask written out here, every backend, gradients, compilation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.window_attention import backward, sdpa, window_attention
from sparseland.patterns import WindowPattern

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton"] if DEVICE == "cuda" else ["cpu", "triton"]
# Triton's interpreter multiplies bfloat16 wrongly, so that pair is left to GPUs.
HALF = [
    (backend, dtype)
    for backend in FAST
    for dtype in (torch.bfloat16, torch.float16)
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")
]
# (maximum, relative RMS) by dtype; bfloat16 carries 8 bits.
TOLERANCE = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (3e-2, 6e-3), torch.float16: (4e-3, 8e-4)}
# batch, query heads, key heads, queries, keys, D, sinks, window
CASES = [
    (1, 3, 1, 200, 200, 64, 4, 33),  # inner blocks, grouped
    (2, 4, 1, 75, 131, 80, 20, 17),  # chunked, batch, D no power of two
    (1, 2, 2, 130, 301, 96, 0, 70),  # no sinks
    (1, 3, 3, 65, 65, 16, 70, 1),  # sinks see everything
    (2, 6, 2, 1, 97, 64, 3, 10),  # one query
    (1, 2, 1, 90, 90, 128, 5, 0),  # sinks only
    (1, 1, 1, 150, 257, 8, 1, 128),
    (1, 2, 1, 5, 5, 64, 0, 2),
    (2, 4, 2, 70, 200, 64, 0, 200),  # dense, chunked
    (1, 3, 1, 100, 100, 64, 0, 1000),  # dense, whole
]


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, n_queries, n_keys, size = case[:6]
    g = torch.Generator().manual_seed(sum(case))
    # The layout of transformers: (B, N, H, D) in memory, so no head is contiguous.
    shapes = ((n_queries, heads), (n_keys, kv_heads), (n_keys, kv_heads))
    return tuple(
        torch.randn(batch, n, h, size, generator=g).to(DEVICE, dtype).transpose(1, 2) for n, h in shapes
    )  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, sinks: int, window: int) -> tuple[Tensor, Tensor]:
    """Masked softmax with repeated heads and the definition of visibility, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2])
    visible = (j <= i) & ((j < sinks) | (i - j < window))
    scores = scores.masked_fill(~visible.to(q.device), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def assert_close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    largest, rms = TOLERANCE[dtype]
    hidden = want == -torch.inf
    assert torch.equal(got == -torch.inf, hidden), f"{name}: -inf in other places"
    error = (got.double() - want.double()).masked_fill(hidden, 0.0)
    size = want.double().masked_fill(hidden, 0.0)
    assert error.abs().max() <= largest * max(1.0, size.abs().max()), f"{name}: {error.abs().max()}"
    assert error.norm() <= rms * size.norm(), f"{name}: {error.norm() / size.norm()}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_masked_softmax(case: tuple[int, ...]) -> None:
    q, k, v = inputs(case)
    sinks, window = case[6:]
    out, lse = window_attention(q, k, v, sinks=sinks, window=window, return_lse=True, backend="reference")
    want, want_lse = dense(q, k, v, sinks, window)
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_match_the_reference(case: tuple[int, ...], backend: str) -> None:
    q, k, v = inputs(case)
    options = {"sinks": case[6], "window": case[7], "return_lse": True, "scale": 0.2}
    want, want_lse = window_attention(q, k, v, **options, backend="reference")
    out, lse = window_attention(q, k, v, **options, backend=backend)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[8]], ids=str)
def test_half_precision(case: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(case, dtype)
    options = {"sinks": case[6], "window": case[7], "return_lse": True}
    out, lse = window_attention(q, k, v, **options, backend=backend)
    want, want_lse = dense(q, k, v, case[6], case[7])
    assert out.dtype == dtype
    assert_close("out", out, want, dtype)
    assert_close("lse", lse, want_lse, dtype)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_rows_that_see_nothing(backend: str) -> None:
    q, k, v = inputs(CASES[0])
    out, lse = window_attention(q, k, v, sinks=0, window=0, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize(("sinks", "window"), [(0, 10_000), (150, 150), (300, 0)])
@pytest.mark.parametrize("backend", [None, *FAST])
def test_all_keys_is_dense_sdpa(backend: str | None, sinks: int, window: int) -> None:
    q, k, v = inputs((2, 6, 2, 300, 300, 64, 0, 0))
    out = window_attention(q, k, v, sinks=sinks, window=window, backend=backend)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close("out", out, want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_dense_equals_whole(dtype: torch.dtype) -> None:
    q, k, v = inputs((1, 4, 2, 300, 300, 64, 0, 0), dtype)
    whole = window_attention(q, k, v, sinks=0, window=300)
    chunk = window_attention(q[:, :, 190:], k, v, sinks=0, window=300)
    assert_close("out", chunk, whole[:, :, 190:], dtype)


def test_the_future_changes_nothing() -> None:
    q, k, v = inputs(CASES[0])
    out = window_attention(q, k, v, sinks=4, window=33)
    k, v = k.clone(), v.clone()
    k[:, :, 150:], v[:, :, 150:] = 7.0, -7.0
    changed = window_attention(q, k, v, sinks=4, window=33)
    assert torch.equal(out[:, :, :150], changed[:, :, :150])
    assert not torch.equal(out[:, :, 150:], changed[:, :, 150:])


def test_inputs_stay_as_they_were() -> None:
    q, k, v = inputs(CASES[0])
    before = [x.clone() for x in (q, k, v)]
    window_attention(q, k, v, sinks=4, window=33)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", [(1, 4, 2, 280, 300, 16, 5, 40), (2, 2, 1, 20, 33, 8, 0, 33)], ids=str)
def test_gradients(case: tuple[int, ...], backend: str) -> None:
    """Of output and log-sum-exp: one loss over both, against autograd through the reference."""
    sinks, window = case[6:]
    gradients = []
    for name in (backend, "reference"):
        q, k, v = (x.detach().requires_grad_() for x in inputs(case))
        out, lse = window_attention(q, k, v, sinks=sinks, window=window, return_lse=True, backend=name)
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(out.shape, generator=g).to(DEVICE)
        ((out * weight).sum() + (lse * weight[..., 0]).sum()).backward()
        gradients.append((q.grad, k.grad, v.grad))
    for name, got, want in zip("qkv", *gradients, strict=True):
        assert_close(f"d_{name}", got, want, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_gradients_row_by_row(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches whose scores would need too much memory together."""
    results, batches = [], []
    whole = backward.window_attention_backward

    def noted(d_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        batches.append(len(d_out))
        return whole(d_out, *rest)

    monkeypatch.setattr(backward, "window_attention_backward", noted)
    for limit in (1 << 28, 1):
        monkeypatch.setattr(backward, "_SCORES", limit)
        q, k, v = (x.detach().requires_grad_() for x in inputs((3, 4, 2, 70, 80, 16, 2, 30)))
        out = window_attention(q, k, v, sinks=2, window=30, backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert batches == [3, 3, 1, 1, 1]


@pytest.mark.parametrize("limited", ["elements", "heads"])
@pytest.mark.parametrize("shape", [(5, 4, 2, 30, 30), (1, 6, 3, 30, 30), (2, 6, 3, 30, 30)])
def test_dense_attention_of_what_kernels_can_not_count(
    shape: tuple[int, ...], limited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut by the batch, or by key heads: here as if the limit were one key head with its query heads."""
    q, k, v = inputs((*shape, 16, 0, 0))
    group = shape[1] // shape[2]
    sizes, attend = [], sdpa._attend

    def noted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        sizes.append((*q.shape[:2], k.shape[1]))
        return attend(q, k, v, scale)

    monkeypatch.setattr(sdpa, "_attend", noted)
    limits = {"most": q[:1, :group].numel()} if limited == "elements" else {"most_heads": group}
    out, lse = sdpa.window_attention(q, k, v, 0, 30, 0.25, **limits)
    assert lse is None
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    assert_close("out", out, want, torch.float32)
    assert sizes == [(1, group, 1)] * (shape[0] * shape[2])


def test_dense_default_is_differentiable() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(CASES[8]))
    window_attention(q, k, v, sinks=0, window=200).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))


def opcheck_arguments() -> Iterator[tuple[object, ...]]:
    for name in FAST:
        yield (*(x.requires_grad_() for x in inputs((1, 2, 1, 40, 50, 16, 0, 0))), 3, 9, 0.25, name)


@pytest.mark.parametrize("arguments", list(opcheck_arguments()), ids=FAST)
def test_opcheck(arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(torch.ops.sparseland.window_attention.default, arguments)


@pytest.mark.parametrize(
    ("n_queries", "window", "backend"),
    [(40, 9, None), (40, 64, None), (64, 64, None), (64, 9, "triton"), (40, 9, "reference")],
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_whole(n_queries: int, window: int, backend: str | None) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q * 2, k, v, sinks=2, window=window, backend=backend) + 1

    torch.compiler.reset()  # the cases share this function's cache of eight
    q, k, v = inputs((1, 2, 1, n_queries, 64, 16, 0, 0))
    q = q.requires_grad_()
    results = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        out = function(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), q)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_density_is_what_is_computed() -> None:
    """The pattern counts the pairs that the op uses: uniform scores make the log-sum-exp their logarithm."""
    q, k, v = inputs((1, 1, 1, 50, 80, 16, 0, 0))
    _, lse = window_attention(q * 0, k, v, sinks=4, window=7, return_lse=True)
    assert lse.exp().sum().round().item() == WindowPattern(50, 80, 4, 7).pairs().item()


def test_clear_errors() -> None:
    q, k, v = inputs(CASES[0])
    with pytest.raises(SparselandError, match="window=-1"):
        window_attention(q, k, v, sinks=0, window=-1)
    with pytest.raises(SparselandError, match="no backend 'fast'"):
        window_attention(q, k, v, sinks=0, window=4, backend="fast")
    with pytest.raises(SparselandError, match="a window of 4 keys is sparse"):
        window_attention(q, k, v, sinks=0, window=4, backend="sdpa")
    with pytest.raises(SparselandError, match="no log-sum-exp"):
        window_attention(q, k, v, sinks=0, window=200, return_lse=True, backend="sdpa")


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_keys_that_are_no_numbers_harm_only_those_that_see_them(bad: float, backend: str) -> None:
    """Neither the queries before them, nor those that no longer see them; also where there are several."""
    q, k, v = inputs((1, 4, 2, 190, 190, 64, 3, 40))
    want, want_lse = window_attention(q, k, v, sinks=3, window=40, return_lse=True, backend="reference")
    k = k.clone()
    k[:, 0, 10] = k[:, 0, 60:62] = k[:, 1, 150] = bad
    out, lse = window_attention(q, k, v, sinks=3, window=40, return_lse=True, backend=backend)
    i = torch.arange(190)
    harmed = torch.zeros(1, 4, 190, dtype=torch.bool)
    for head, keys in ((0, (10, 60, 61)), (1, (150,))):
        for j in keys:
            harmed[:, 2 * head : 2 * head + 2] |= (i >= j) & (i - j < 40)
    clean = ~harmed.to(DEVICE)
    assert_close("out", out[clean], want[clean], torch.float32)
    assert_close("lse", lse[clean], want_lse[clean], torch.float32)
    if bad != -math.inf:  # where it meets a positive query channel that is +inf too
        assert not out[~clean].isfinite().all(-1).any()
