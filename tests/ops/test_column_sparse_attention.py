"""Columns, and blocks + columns: against a dense masked softmax, every backend, compilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.column_sparse_attention import block_column_attention, column_sparse_attention, cpu
from sparseland.patterns import BlockColumnPattern, BlockPattern, ColumnPattern, cdiv

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
# batch, query heads, key heads, queries, keys, D, block size
CASES = [
    (1, 3, 1, 130, 130, 64, 32),
    (2, 4, 1, 75, 131, 80, 16),
    (1, 2, 2, 100, 301, 96, 64),
    (2, 6, 2, 1, 97, 64, 16),
    (1, 2, 1, 150, 150, 128, 128),
    (1, 1, 1, 7, 7, 16, 16),
]


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, n_queries, n_keys, size = case[:6]
    g = torch.Generator().manual_seed(sum(case))
    shapes = ((n_queries, heads), (n_keys, kv_heads), (n_keys, kv_heads))
    return tuple(
        torch.randn(batch, n, h, size, generator=g).to(DEVICE, dtype).transpose(1, 2) for n, h in shapes
    )  # type: ignore[return-value]


def columns_for(case: tuple[int, ...], keep: float = 0.2, shared: bool = False) -> ColumnPattern:
    """Random columns per query block (also in a block's own future); the second query block lists none."""
    batch, heads, _, n_queries, n_keys, _, block_size = case
    g = torch.Generator().manual_seed(1)
    rows = cdiv(n_queries, block_size)
    mask = torch.rand(1 if shared else batch, 1 if shared else heads, rows, n_keys, generator=g) < keep
    mask[:, :, 1:2] = False
    return ColumnPattern.from_column_mask(mask.to(DEVICE), block_size, n_queries, n_keys)


def union_for(case: tuple[int, ...]) -> BlockColumnPattern:
    """Random blocks (some rows without their diagonal, some lists empty) and random columns per head."""
    batch, heads, _, n_queries, n_keys, _, block_size = case
    g = torch.Generator().manual_seed(2)
    shape = (batch, heads, cdiv(n_queries, block_size), cdiv(n_keys, block_size))
    blocks = torch.rand(shape, generator=g) < 0.3
    blocks[:, :, 2:3] = False
    lists = BlockPattern.from_block_mask(blocks.to(DEVICE), block_size, n_queries, n_keys)
    columns = torch.rand(batch, heads, n_keys, generator=g) < 0.1
    return BlockColumnPattern.of(lists, columns.to(DEVICE))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked softmax with repeated heads, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def assert_close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    largest, rms = TOLERANCE[dtype]
    hidden = want == -torch.inf
    assert torch.equal(got == -torch.inf, hidden), f"{name}: -inf in other places"
    error = (got.double() - want.double()).masked_fill(hidden, 0.0)
    size = want.double().masked_fill(hidden, 0.0)
    assert error.abs().max() <= largest * max(1.0, size.abs().max()), f"{name}: {error.abs().max()}"
    assert error.norm() <= rms * size.norm(), f"{name}: {error.norm() / size.norm()}"


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_are_the_masked_softmax(case: tuple[int, ...], backend: str) -> None:
    q, k, v = inputs(case)
    pattern = columns_for(case)
    out, lse = column_sparse_attention(q, k, v, pattern, return_lse=True, backend=backend)
    want, want_lse = dense(q, k, v, pattern.mask())
    assert lse.dtype == torch.float32
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_union_is_the_masked_softmax(case: tuple[int, ...], backend: str) -> None:
    q, k, v = inputs(case)
    pattern = union_for(case)
    out, lse = block_column_attention(q, k, v, pattern, return_lse=True, backend=backend)
    want, want_lse = dense(q, k, v, pattern.mask())
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


def test_the_cases_have_rows_that_see_nothing() -> None:
    """Else the tests above would not cover them, within a block and for whole blocks."""
    empty = ~columns_for(CASES[0]).mask().any(-1)[0, 0]
    assert empty[32:64].all()
    assert (~union_for(CASES[0]).mask().any(-1)).any()


@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_half_precision(case: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(case, dtype)
    pattern = union_for(case)
    out, lse = block_column_attention(q, k, v, pattern, return_lse=True, backend=backend)
    want, want_lse = dense(q, k, v, pattern.mask())
    assert out.dtype == dtype
    assert_close("out", out, want, dtype)
    assert_close("lse", lse, want_lse, dtype)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_scale(backend: str) -> None:
    q, k, v = inputs(CASES[1])
    pattern = union_for(CASES[1])
    out = block_column_attention(q, k, v, pattern, scale=0.3, backend=backend)
    want, _ = dense(q * (0.3 * math.sqrt(80)), k, v, pattern.mask())
    assert_close("out", out, want, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_lists_shared_by_all_heads_and_rows(backend: str) -> None:
    q, k, v = inputs(CASES[1])
    pattern = columns_for(CASES[1], shared=True)
    assert pattern.counts.shape[:2] == (1, 1)
    out = column_sparse_attention(q, k, v, pattern, backend=backend)
    assert_close("out", out, dense(q, k, v, pattern.mask())[0], torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_all_columns_or_all_blocks_is_dense_sdpa(backend: str) -> None:
    case = (1, 6, 2, 130, 130, 64, 32)
    q, k, v = inputs(case)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    everything = columns_for(case, keep=2.0).column_mask() | True
    columns = ColumnPattern.from_column_mask(everything, 32, 130, 130)
    out = column_sparse_attention(q, k, v, columns, backend=backend)
    assert_close("columns", out, want, torch.float32)

    blocks = BlockPattern.from_block_mask(
        torch.ones(1, 6, 5, 5, dtype=torch.bool, device=DEVICE), 32, 130, 130
    )
    union = BlockColumnPattern.of(blocks, torch.ones(1, 6, 130, dtype=torch.bool, device=DEVICE))
    assert int(union.columns.counts.sum()) == 0
    assert_close("blocks", block_column_attention(q, k, v, union, backend=backend), want, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_blocks_wholly_in_the_future_are_hidden(backend: str) -> None:
    """A hand-made list may stick out of the causal triangle."""
    q, k, v = inputs((1, 1, 1, 64, 64, 16, 16))
    counts = torch.full((1, 1, 4), 2, dtype=torch.int32, device=DEVICE)
    indices = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE).expand(1, 1, 4, 2)
    blocks = BlockPattern(64, 64, 16, counts, indices)
    union = BlockColumnPattern.of(blocks, torch.zeros(1, 1, 64, dtype=torch.bool, device=DEVICE))
    out, lse = block_column_attention(q, k, v, union, return_lse=True, backend=backend)
    want, want_lse = dense(q, k, v, union.mask())
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


def test_the_future_changes_nothing() -> None:
    q, k, v = inputs(CASES[0])
    pattern = union_for(CASES[0])
    out = block_column_attention(q, k, v, pattern)
    k, v = k.clone(), v.clone()
    k[:, :, 100:], v[:, :, 100:] = 7.0, -7.0
    changed = block_column_attention(q, k, v, pattern)
    assert torch.equal(out[:, :, :100], changed[:, :, :100])
    assert not torch.equal(out[:, :, 100:], changed[:, :, 100:])


def test_cpu_batches_cover_each_item_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a batch holds one item only, and when lists differ in length a lot."""
    case = (1, 3, 1, 300, 300, 16, 16)
    q, k, v = (x.cpu() for x in inputs(case))
    p = union_for(case)
    tensors = (p.blocks.counts, p.blocks.indices, p.columns.counts, p.columns.indices)
    tensors = tuple(x.cpu() for x in tensors)
    results = []
    for batch_keys in (1, 700, 1 << 20):
        monkeypatch.setattr(cpu, "_BATCH_KEYS", batch_keys)
        lists = cpu._Lists(*(x.reshape(-1, *x.shape[3:]) for x in tensors))
        batches = list(cpu._batches(lists, 16))
        listed = (lists.block_counts + lists.column_counts > 0).nonzero().squeeze(-1)
        assert torch.equal(torch.cat([b.items for b in batches]).sort().values, listed)
        assert all(len(b.items) == 1 or len(b.items) * b.width <= batch_keys for b in batches)
        results.append(cpu.block_column_attention(q, k, v, 16, *tensors, 0.25)[0])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_gradient_by_the_reference_only() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(CASES[0]))
    pattern = union_for(CASES[0])
    out = block_column_attention(q, k, v, pattern, backend="reference")
    (got,) = torch.autograd.grad(out.square().sum(), q)
    want_out, _ = dense(q, k, v, pattern.mask())
    # A row that sees nothing has no gradient; the softmax over -inf alone would make it NaN.
    (want,) = torch.autograd.grad(want_out.square().sum(), q)
    assert_close("d_q", got, want.nan_to_num(0.0), torch.float32)
    for backend in FAST:
        out = block_column_attention(q, k, v, pattern, backend=backend)
        with pytest.raises(SparselandError, match=f"no gradient with backend '{backend}'"):
            out.sum().backward()


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend: str) -> None:
    case = (1, 2, 1, 40, 50, 16, 16)
    p = union_for(case)
    lists = (p.blocks.counts, p.blocks.indices, p.columns.counts, p.columns.indices)
    arguments = (*inputs(case), 16, *lists, 0.25, backend)
    torch.library.opcheck(torch.ops.sparseland.block_column_attention.default, arguments)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_whole() -> None:
    case = (1, 2, 1, 40, 50, 16, 16)
    union, columns = union_for(case), columns_for(case)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = block_column_attention(q * 2, k, v, union)
        return both + column_sparse_attention(q, k, v, columns)

    q, k, v = inputs(case)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))


def test_clear_errors() -> None:
    q, k, v = inputs(CASES[0])
    pattern = columns_for(CASES[0])
    with pytest.raises(SparselandError, match="pattern is for 130 queries of 130 keys, the input has 100"):
        column_sparse_attention(q[:, :, :100], k, v, pattern)
    with pytest.raises(SparselandError, match=r"lists are for \[1, 3, 5\]"):
        column_sparse_attention(q[:, :2], k, v, pattern)
    with pytest.raises(SparselandError, match="no backend 'fa4'"):
        column_sparse_attention(q, k, v, pattern, backend="fa4")
    odd = ColumnPattern.from_column_mask(
        torch.ones(1, 1, 6, 130, dtype=torch.bool, device=DEVICE), 24, 130, 130
    )
    with pytest.raises(SparselandError, match="block size 24"):
        column_sparse_attention(q, k, v, odd, backend="triton")
    blocks = BlockPattern.from_block_mask(
        torch.ones(1, 3, 9, 9, dtype=torch.bool, device=DEVICE), 16, 130, 130
    )
    with pytest.raises(SparselandError, match="one block size, got 16 and 32"):
        block_column_attention(q, k, v, BlockColumnPattern(130, 130, blocks, pattern))
