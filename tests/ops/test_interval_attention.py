"""Keys that live for an interval, with a bias each: against a dense mask written out here, every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.attend import attend
from sparseland.ops.interval_attention import interval_attention
from sparseland.ops.interval_attention.lists import living_keys
from sparseland.patterns import BlockLocalPattern, IntervalPattern

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
TOLERANCE = {torch.float32: (3e-5, 3e-6), torch.bfloat16: (3e-2, 8e-3), torch.float16: (4e-3, 1e-3)}
# batch, query heads, key heads, queries, keys, D, kind of ends
CASES = [
    (1, 3, 1, 200, 200, 64, "random"),
    (2, 4, 2, 75, 131, 80, "random"),  # chunked, batch, D no power of two
    (1, 2, 2, 130, 301, 96, "window"),
    (2, 6, 2, 1, 97, 64, "random"),  # one query
    (1, 2, 1, 63, 63, 16, "all"),
    (1, 1, 1, 150, 257, 8, "block"),
    (1, 4, 2, 140, 140, 32, "few"),  # whole blocks see nothing
    (1, 1, 1, 1, 1, 16, "all"),
]


def inputs(case: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v in the layout of transformers (no head is contiguous), ends, bias."""
    batch, heads, kv_heads, n_queries, n_keys, size, kind = case
    g = torch.Generator().manual_seed(sum(case[:6]))
    shapes = ((n_queries, heads), (n_keys, kv_heads), (n_keys, kv_heads))
    q, k, v = (torch.randn(batch, n, h, size, generator=g).to(dtype).transpose(1, 2) for n, h in shapes)
    key = torch.arange(n_keys).expand(batch, kv_heads, -1)
    life = torch.rand(batch, kv_heads, n_keys, generator=g)
    ends = {
        "random": key + (life**4 * n_keys).long() - 2,  # some are seen by nobody, some by all
        "window": key + 40,
        "all": torch.full_like(key, n_keys),
        "block": (key // 48 + 1) * 48,
        "few": torch.where(key % 100 == 3, key + 20, key),
    }[kind]
    bias = torch.randn(batch, kv_heads, n_keys, generator=g)
    return tuple(x.to(DEVICE) for x in (q, k, v, ends, bias))


def dense(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Masked softmax with repeated heads and the definition of visibility, in float64."""
    groups = q.shape[1] // k.shape[1]
    k, v, bias = (x.double().repeat_interleave(groups, 1) for x in (k, v, bias))
    scores = q.double() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias[:, :, None]
    j = torch.arange(k.shape[2], device=q.device)
    i = j[k.shape[2] - q.shape[2] :, None]
    seen = (j <= i) & (i < ends.repeat_interleave(groups, 1)[:, :, None])
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def assert_close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    largest, rms = TOLERANCE[dtype]
    hidden = want == -torch.inf
    assert torch.equal(got == -torch.inf, hidden), f"{name}: -inf in other places"
    error = (got.double() - want.double()).masked_fill(hidden, 0.0)
    size = want.double().masked_fill(hidden, 0.0)
    assert error.abs().max() <= largest * max(1.0, size.abs().max()), f"{name}: {error.abs().max()}"
    assert error.norm() <= rms * size.norm() + 1e-12, f"{name}: {error.norm() / size.norm()}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` holds NaN (or huge numbers), so that reading before writing shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_are_the_masked_softmax(case: tuple, backend: str, poisoned: None) -> None:
    tensors = inputs(case)
    out, lse = interval_attention(*tensors, return_lse=True, backend=backend)
    want, want_lse = dense(*tensors)
    assert lse.dtype == torch.float32
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_half_precision(case: tuple, backend: str, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    out, lse = interval_attention(*tensors, return_lse=True, backend=backend)
    want, want_lse = dense(*tensors)
    assert out.dtype == dtype
    assert_close("out", out, want, dtype)
    assert_close("lse", lse, want_lse, dtype)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_gradients_of_q_k_v_and_bias(backend: str, poisoned: None) -> None:
    """Of output and log-sum-exp, against autograd in float64 through the dense mask."""
    for case in (CASES[1], CASES[6], (1, 4, 2, 150, 150, 16, "random")):
        gradients = []
        for function in (lambda *x: interval_attention(*x, return_lse=True, backend=backend), dense):
            *leaves, ends, bias = inputs(case)
            leaves = [x.detach().requires_grad_() for x in (*leaves, bias)]
            q, k, v, bias = leaves
            out, lse = function(q, k, v, ends, bias)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
            seen = lse.detach() > -torch.inf
            # Rows without keys pass no gradient; NaN of the plain softmax's own is kept out.
            loss = (torch.where(seen[..., None], out, 0) * weight).sum()
            (loss + (torch.where(seen, lse, 0) * weight[..., 0]).sum()).backward()
            gradients.append([x.grad.nan_to_num(0.0) for x in leaves])
        for name, got, want in zip(("q", "k", "v", "bias"), *gradients, strict=True):
            assert_close(f"d_{name}, {case}", got, want, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_a_bound_saves_memory_not_keys(backend: str) -> None:
    tensors = inputs(CASES[2])  # a window: 40 keys at most
    assert_close(
        "out",
        interval_attention(*tensors, most=40, backend=backend),
        interval_attention(*tensors, backend="reference"),
        torch.float32,
    )
    if backend == "cpu":
        with pytest.raises(SparselandError, match="more than most=5"):
            interval_attention(*tensors, most=5, backend=backend)
        return
    # A wrong bound can't raise without waiting for the device: it must not pass unnoticed.
    assert interval_attention(*tensors, most=5, backend=backend).isnan().any()


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_rows_that_see_nothing(backend: str) -> None:
    q, k, v, ends, bias = inputs(CASES[0])
    out, lse = interval_attention(q, k, v, ends * 0, bias, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("backend", FAST)
def test_shared_ends_and_no_bias(backend: str) -> None:
    q, k, v, ends, bias = inputs(CASES[1])
    one = ends[:1, :1]
    got = interval_attention(q, k, v, one, backend=backend)
    assert_close("out", got, dense(q, k, v, one.expand_as(ends), bias * 0)[0], torch.float32)


def test_the_future_and_the_dead_change_nothing() -> None:
    q, k, v, ends, bias = inputs(CASES[0])
    out = interval_attention(q, k, v, ends, bias)
    key = torch.arange(200, device=DEVICE)
    k, v, bias = k.clone(), v.clone(), bias.clone()
    k[:, :, 150:], v[:, :, 150:], bias[:, :, 150:] = 7.0, -7.0, 3.0
    changed = interval_attention(q, k, v, ends, bias)
    assert torch.equal(out[:, :, :150], changed[:, :, :150])
    assert not torch.equal(out[:, :, 150:], changed[:, :, 150:])
    dead = (ends <= key)[:, 0, :, None]
    assert dead.any()
    v = torch.where(dead[:, None], 100.0, v)
    assert torch.equal(interval_attention(q, k, v, ends, bias), changed)


@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU a tile of values is multiplied whole")
def test_broken_keys_reach_only_the_rows_that_see_them(what: str, value: float) -> None:
    q, k, v, ends, bias = inputs((1, 2, 1, 90, 90, 16, "random"))
    ends[:] = torch.arange(90) + 20
    clean = interval_attention(q, k, v, ends, bias)
    k, v = k.clone(), v.clone()
    (k if what == "k" else v)[0, 0, 40, 3] = value
    out = interval_attention(q, k, v, ends, bias)
    rows = torch.arange(90)
    sees = (rows >= 40) & (rows < 60)
    torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees])
    if value != value:
        assert out[:, :, sees].isnan().any(-1).all()


def test_living_keys_are_all_that_a_block_sees() -> None:
    _, _, _, ends, _ = inputs((2, 2, 2, 90, 160, 8, "random"))
    ends = ends.cpu()
    for block in living_keys(ends, 90, 32):
        for b in range(2):
            for h in range(2):
                for r, row in enumerate(range(*block.rows.indices(90))):
                    i = 70 + row
                    want = [j for j in range(160) if j <= i < int(ends[b, h, j])]
                    assert block.keys[b, h][block.mask[b, h, r]].tolist() == want


def opcheck_arguments() -> Iterator[tuple[object, ...]]:
    for name in FAST:
        q, k, v, ends, bias = inputs((1, 2, 1, 40, 50, 16, "random"))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        yield (*leaves, ends.int(), bias.requires_grad_(), 50, 0.25, name)


@pytest.mark.parametrize("arguments", list(opcheck_arguments()), ids=FAST)
def test_opcheck(arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(torch.ops.sparseland.interval_attention.default, arguments)


def test_clear_errors() -> None:
    q, k, v, ends, bias = inputs(CASES[0])
    with pytest.raises(SparselandError, match=r"ends must be \[1, 1, 200\], got \[1, 1, 199\]"):
        interval_attention(q, k, v, ends[..., 1:], bias)
    with pytest.raises(SparselandError, match=r"bias can't be torch\.int64"):
        interval_attention(q, k, v, ends, ends)
    with pytest.raises(SparselandError, match=r"ends can't be torch\.float32"):
        interval_attention(q, k, v, bias, bias)
    with pytest.raises(SparselandError, match="most=0"):
        interval_attention(q, k, v, ends, bias, most=0)
    with pytest.raises(SparselandError, match="no backend 'fast'"):
        interval_attention(q, k, v, ends, bias, backend="fast")


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "block", "look_back", "sinks"),
    [(100, 100, 32, 0, 0), (96, 96, 32, 0, 0), (150, 150, 32, 1, 0), (100, 100, 30, 2, 0),
     (100, 100, 32, 0, 3), (37, 100, 32, 0, 0), (50, 120, 16, 1, 5), (20, 20, 32, 0, 0), (64, 64, 1, 1, 0)],
)  # fmt: skip
def test_block_local_attention(n_queries: int, n_keys: int, block: int, look_back: int, sinks: int) -> None:
    """Output, log-sum-exp, gradients and counts against the definition, pair by pair."""
    q, k, v, _, _ = inputs((2, 4, 2, n_queries, n_keys, 16, "all"))
    pattern = BlockLocalPattern(n_queries, n_keys, block, look_back, sinks)
    seen = torch.tensor(
        [
            [j <= i and (j < sinks or i // block - j // block <= look_back) for j in range(n_keys)]
            for i in range(n_keys - n_queries, n_keys)
        ]
    )
    assert torch.equal(pattern.mask()[0, 0], seen)
    assert pattern.pairs().item() == seen.sum()
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    keys, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = (q.double() @ keys.mT / 4).masked_fill(~seen.to(DEVICE), -torch.inf)
    want = scores.softmax(-1) @ values
    want_grads = torch.autograd.grad(want.square().sum(), (q, k, v))
    out, lse = attend(q, k, v, pattern, scale=0.25, return_lse=True)
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, scores.logsumexp(-1), torch.float32)
    alone = attend(q, k, v, pattern, scale=0.25)
    assert_close("out alone", alone, want, torch.float32)
    for name, got, expected in zip(
        "qkv", torch.autograd.grad(alone.square().sum(), (q, k, v)), want_grads, strict=True
    ):
        assert_close(f"d_{name}", got, expected, torch.float32)


def test_interval_pattern_counts_what_the_op_computes() -> None:
    q, k, v, ends, bias = inputs(CASES[1])
    pattern = IntervalPattern(75, 131, ends, bias, group=2)
    mask = pattern.mask()
    assert mask.shape == (2, 4, 75, 131)
    assert torch.equal(pattern.pairs(), mask.sum((-1, -2)))
    assert_close(
        "out", attend(q, k, v, pattern, scale=80**-0.5), dense(q, k, v, ends, bias)[0], torch.float32
    )
