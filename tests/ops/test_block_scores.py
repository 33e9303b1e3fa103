"""Pooled and probe estimates: against loops over the definitions, planted structure, every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops import block_scores
from sparseland.ops.block_scores import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton", "torch"] if DEVICE == "cuda" else ["cpu", "triton", "torch"]
# Triton's interpreter multiplies bfloat16 wrongly, so that pair is left to GPUs.
KINDS = [
    (backend, dtype)
    for backend in FAST
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")
]
# batch, query heads, key heads, queries, keys, D, block size, probe rows
CASES = [
    (1, 3, 1, 70, 70, 64, 16, 20),
    (2, 4, 1, 33, 90, 80, 32, 64),  # fewer queries than probe rows, chunked
    (1, 2, 2, 50, 50, 16, 64, 1),  # one block, one probe row
    (1, 4, 2, 5, 130, 96, 16, 5),
    (1, 1, 1, 40, 40, 8, 7, 40),  # the probe is the whole prompt
    (1, 2, 1, 1, 1, 16, 4, 3),
]


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    batch, heads, kv_heads, n_queries, n_keys, size = case[:6]
    g = torch.Generator().manual_seed(sum(case))
    q = torch.randn(batch, n_queries, heads, size, generator=g).to(DEVICE, dtype).transpose(1, 2)
    k = torch.randn(batch, n_keys, kv_heads, size, generator=g).to(DEVICE, dtype).transpose(1, 2)
    return q, k


def assert_close(got: Tensor, want: Tensor, largest: float = 2e-5, rms: float = 2e-6) -> None:
    assert got.dtype == want.dtype == torch.float32
    hidden = want == -torch.inf
    assert torch.equal(got == -torch.inf, hidden)
    error = (got - want).masked_fill(hidden, 0.0).double()
    size = want.masked_fill(hidden, 0.0).double()
    assert error.abs().max() <= largest * max(1.0, size.abs().max())
    assert error.norm() <= rms * size.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mean_pool(case: tuple[int, ...], dtype: torch.dtype) -> None:
    _, k = inputs(case, dtype)
    assert_close(block_scores.mean_pool(k, case[6]), reference.mean_pool(k, case[6]))


def test_a_partial_block_counts_its_own_tokens_only() -> None:
    x = torch.ones(1, 1, 10, 8, device=DEVICE)
    assert torch.equal(block_scores.mean_pool(x, 4), torch.ones(1, 1, 3, 8, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pooled_scores(case: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k = inputs(case, dtype)
    assert_close(block_scores.pooled_scores(q, k, case[6], 0.3), reference.pooled_scores(q, k, case[6], 0.3))
    default = reference.pooled_scores(q, k, case[6], 1 / math.sqrt(case[5]))
    assert_close(block_scores.pooled_scores(q, k, case[6]), default)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_probe_probabilities(case: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k = inputs(case, dtype)
    got = block_scores.probe_probabilities(q, k, case[7], 0.3)
    assert got.shape == (case[0], case[1], min(case[7], case[3]), case[4])
    # The products of bfloat16 numbers are exact in float32, so the bound is the same.
    assert_close(got, reference.probe_probabilities(q, k, case[7], 0.3))
    assert (got.triu(case[4] - got.shape[2] + 1) == 0).all()


def test_probe_is_the_end_of_dense_attention() -> None:
    q, k = inputs(CASES[0])
    scores = q @ k.repeat_interleave(3, 1).mT / 8
    mask = torch.ones(70, 70, dtype=torch.bool, device=DEVICE).tril()
    want = scores.masked_fill(~mask, -torch.inf).softmax(-1)[:, :, -20:]
    assert_close(block_scores.probe_probabilities(q, k, 20), want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vertical_slash_scores(case: tuple[int, ...]) -> None:
    q, k = inputs(case)
    probabilities = reference.probe_probabilities(q, k, case[7], 0.3)
    for got, want in zip(
        block_scores.vertical_slash_scores(probabilities),
        reference.vertical_slash_scores(probabilities),
        strict=True,
    ):
        assert_close(got, want)


def test_a_planted_diagonal_and_a_planted_column() -> None:
    probabilities = torch.zeros(1, 2, 8, 50, device=DEVICE)
    rows = torch.arange(8, device=DEVICE)
    probabilities[0, 0, rows, 42 + rows - 13] = 1.0  # head 0: distance 13
    probabilities[0, 1, :, 5] = 1.0  # head 1: column 5
    vertical, slash = block_scores.vertical_slash_scores(probabilities)
    assert slash[0, 0].argmax() == 13
    assert slash[0, 0, 13] == 8
    assert slash[0, 0].count_nonzero() == 1
    assert vertical[0, 1].argmax() == 5
    assert vertical[0, 1, 5] == 8
    assert torch.equal(slash[0, 1].nonzero().squeeze(-1), 42 + rows - 5)


def test_a_matrix_that_is_no_view_of_its_own() -> None:
    """A slice of another tensor: strides and offset must not leak into the diagonal view."""
    probabilities = torch.rand(2, 3, 6, 40, device=DEVICE).tril(34)
    part = probabilities[:, 1:]
    for got, want in zip(
        block_scores.vertical_slash_scores(part), reference.vertical_slash_scores(part), strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_probe_vertical_slash(case: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    q, k = inputs(case, dtype)
    got = block_scores.probe_vertical_slash(q, k, case[7], 0.3, backend=backend)
    want = block_scores.probe_vertical_slash(q, k, case[7], 0.3, backend="reference")
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    assert got[0].sum().item() == pytest.approx(case[0] * case[1] * min(case[7], case[3]), rel=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_same_input_same_bits(backend: str) -> None:
    q, k = inputs(CASES[0])
    first = block_scores.probe_vertical_slash(q, k, 20, backend=backend)
    second = block_scores.probe_vertical_slash(q, k, 20, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_probe_sums_are_those_of_tokens_and_of_blocks(case: tuple[int, ...], backend: str) -> None:
    q, k = inputs(case)
    tokens, blocks = block_scores.probe_sums(q, k, case[7], case[6], 0.3, backend=backend)
    want = block_scores.probe_sums(q, k, case[7], case[6], 0.3, backend="reference")
    assert tokens.shape == (2, case[0], case[1], case[4])
    assert_close(tokens, want[0])
    assert_close(blocks, want[1])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_means_their_map_and_their_distance(case: tuple[int, ...], backend: str) -> None:
    q, k = inputs(case)
    means = [block_scores.mean_pool(x, case[6], backend=backend) for x in (q, k)]
    for got, x in zip(means, (q, k), strict=True):
        assert_close(got, reference.mean_pool(x, case[6]))
    sizes = (case[3], case[4], case[6], 0.3)
    for normalise in (False, True):
        got = block_scores.pooled_map(*means, *sizes, normalise=normalise, backend=backend)
        assert_close(got, reference.pooled_map(*means, *sizes, normalise))
    true = reference.probe_sums(q, k, case[7], case[6], 0.3)[1][0]
    got = block_scores.probe_distance(q, means[1], true, case[7], 0.3, backend=backend)
    want = reference.probe_distance(q, means[1], true, case[7], 0.3)
    # The root of a small difference of large numbers: an error of 1e-7 in it is one of 3e-4.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", FAST)
def test_a_head_that_is_not_active_costs_nothing_and_changes_nothing(backend: str) -> None:
    q, k = inputs(CASES[1])
    active = torch.tensor([[True, False, True, False], [False, True, True, True]], device=DEVICE)
    means = block_scores.mean_pool(q, 32, active=active, backend=backend)
    assert_close(means[active], reference.mean_pool(q, 32)[active])
    keys = reference.mean_pool(k, 32)
    means[~active] = torch.nan
    got = block_scores.pooled_map(
        means, keys, 33, 90, 32, 0.3, normalise=True, active=active, backend=backend
    )
    want = reference.pooled_map(reference.mean_pool(q, 32), keys, 33, 90, 32, 0.3, True)
    assert_close(got[active], want[active])


@pytest.mark.parametrize("backend", FAST)
def test_large_half_precision_numbers_do_not_overflow(backend: str) -> None:
    # Products reach 2e9 and sums of 16 numbers 1e6: both above fp16's 65504.
    q, k = inputs((1, 2, 1, 40, 40, 64, 16, 16))
    q, k = (q.sign() * 6e3).half(), (k.sign() * 6e4).half()
    tokens, blocks = block_scores.probe_sums(q, k, 16, 16, 1e-9, backend=backend)
    want = block_scores.probe_sums(q.float(), k.float(), 16, 16, 1e-9, backend="reference")
    torch.testing.assert_close(tokens, want[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(blocks, want[1], rtol=1e-3, atol=1e-4)
    mean = block_scores.mean_pool(k, 16, backend=backend)
    assert torch.equal(mean, reference.mean_pool(k, 16))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float, backend: str) -> None:
    q, k = inputs(CASES[0])
    k = k.contiguous()
    k[0, 0, 30, 3] = bad
    tokens, blocks = block_scores.probe_sums(q, k, 20, 16, 0.3, backend=backend)
    assert tokens.isnan().any(-1).all()
    assert blocks.isnan().any(-1).all()
    means = block_scores.mean_pool(k, 16, backend=backend)
    assert not means[0, 0, 1].isfinite().all()
    assert means[0, 0, [0, 2, 3, 4]].isfinite().all()
    assert block_scores.probe_distance(q, means, blocks[0], 20, 0.3, backend=backend).isnan().all()


def test_opcheck() -> None:
    q, k = inputs(CASES[0])
    ops = torch.ops.sparseland
    torch.library.opcheck(ops.probe_sums.default, (q, k, 20, 16, 0.3))
    active = torch.tensor([[True, False, True]], device=DEVICE)
    torch.library.opcheck(ops.mean_pool.default, (k, 16, None))
    q, k = block_scores.mean_pool(q, 16), block_scores.mean_pool(k, 16)
    # What an inactive head gets is undefined, so all are active where results are compared.
    torch.library.opcheck(ops.pooled_map.default, (q, k, 70, 70, 16, 0.3, True, active | True))
    torch.library.opcheck(
        ops.probe_distance.default, (*inputs(CASES[0])[:1], k, k.new_ones(1, 3, 5), 20, 0.3)
    )


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_whole() -> None:
    def estimate(q: Tensor, k: Tensor) -> Tensor:
        vertical, slash = block_scores.probe_vertical_slash(q, k, 20)
        fused, _ = block_scores.probe_vertical_slash(q, k, 20, backend="triton")
        pooled = block_scores.pooled_scores(q, k, 16)
        return vertical.sum() + 2 * slash.sum() + fused[..., 3].sum() + pooled[..., 0].sum()

    q, k = inputs(CASES[0])
    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), estimate(q, k))


def test_clear_errors() -> None:
    q, k = inputs(CASES[0])
    with pytest.raises(SparselandError, match="block_size=0"):
        block_scores.pooled_scores(q, k, 0)
    with pytest.raises(SparselandError, match="n_probe=0"):
        block_scores.probe_probabilities(q, k, 0)
    with pytest.raises(SparselandError, match="no backend 'fa4'"):
        block_scores.probe_vertical_slash(q, k, 20, backend="fa4")
    with pytest.raises(SparselandError, match="L <= Nk"):
        block_scores.vertical_slash_scores(torch.zeros(1, 1, 5, 4))
    with pytest.raises(SparselandError, match=r"x must be \[B, H, N, D\]"):
        block_scores.mean_pool(q[0], 4)
    long = torch.zeros(1, 1, 200, 8, device=DEVICE)
    with pytest.raises(SparselandError, match="150 probe rows are above 128"):
        block_scores.probe_vertical_slash(long, long, 150, backend="triton")
    wide = torch.zeros(1, 1, 100, 256, device=DEVICE)
    with pytest.raises(SparselandError, match="100 probe rows of 256 float32 numbers"):
        block_scores.probe_vertical_slash(wide, wide, 100, backend="triton")
