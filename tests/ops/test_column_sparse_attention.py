"""Columns, and blocks + columns: against a dense masked softmax, every backend, compilation."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import why_no_gluon
from sparseland.ops.block_sparse_attention.triton import Tile
from sparseland.ops.column_sparse_attention import (
    block_column_attention,
    column_sparse_attention,
    cpu,
    triton,
)
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
    (2, 2, 1, 75, 131, 80, 16),
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


def grouped_union_for(case: tuple[int, ...], times: int = 3, shared: bool = False) -> BlockColumnPattern:
    """Blocks around the diagonal (one list for all heads and rows), and columns of ``times`` query blocks.

    The columns lie outside the blocks of all the query blocks that share them, and in part in their future.
    """
    batch, heads, _, n_queries, n_keys, _, size = case
    g = torch.Generator().manual_seed(4)
    rows, big = cdiv(n_queries, size), size * times
    offset = n_keys - n_queries
    first = torch.arange(rows) * size + offset
    column = torch.arange(cdiv(n_keys, size))
    near = (column >= (first // size)[:, None] - 1) & (column <= ((first + size - 1) // size)[:, None])
    blocks = BlockPattern.from_block_mask(near[None, None].to(DEVICE), size, n_queries, n_keys)
    covered = near.repeat_interleave(size, 1)[:, :n_keys]
    groups = cdiv(n_queries, big)
    covered = torch.stack([covered[i * times : (i + 1) * times].any(0) for i in range(groups)])
    shape = (1, 1) if shared else (batch, heads)
    columns = (torch.rand(*shape, groups, n_keys, generator=g) < 0.3) & ~covered
    columns[:, :, :, -1] = ~covered[:, -1]  # future for all rows but those that see it
    lists = ColumnPattern.from_column_mask(columns.to(DEVICE), big, n_queries, n_keys)
    return BlockColumnPattern(n_queries, n_keys, blocks, lists)


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


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("shared", [False, True], ids=["per head", "for all heads"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_column_list_for_several_query_blocks(case: tuple[int, ...], shared: bool, backend: str) -> None:
    q, k, v = inputs(case)
    pattern = grouped_union_for(case, shared=shared)
    out, lse = block_column_attention(q, k, v, pattern, return_lse=True, backend=backend)
    mask = pattern.mask()
    assert torch.equal(pattern.pairs(), mask.sum((-1, -2)))
    want, want_lse = dense(q, k, v, mask)
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_columns_in_the_future_of_a_tile_are_cut_off(backend: str) -> None:
    """A list of a large block holds keys that only its last queries see, and one that none sees."""
    case = (1, 2, 1, 256, 300, 16, 256)
    q, k, v = inputs(case)
    listed = torch.tensor([[*range(3, 60, 2), *range(70, 300, 3)]], dtype=torch.int32, device=DEVICE)
    n = listed.shape[1]
    counts = torch.full((1, 1, 1), n, dtype=torch.int32, device=DEVICE)
    pattern = ColumnPattern(256, 300, 256, counts, listed.view(1, 1, 1, n))
    out, lse = column_sparse_attention(q, k, v, pattern, return_lse=True, backend=backend)
    want, want_lse = dense(q, k, v, pattern.mask())
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_expanded_lists_are_not_copied(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that all heads or rows share by a stride of 0 reach the backend as one."""
    q, k, v = inputs(CASES[1])
    one = columns_for(CASES[1], shared=True)
    counts, indices = one.counts.expand(2, 2, -1), one.indices.expand(2, 2, -1, -1)
    assert indices.stride()[:2] == (0, 0)
    wide = ColumnPattern(one.n_queries, one.n_keys, one.block_size, counts, indices)
    assert torch.equal(wide.pairs(), one.pairs().expand(2, 2))
    op = "sparseland.ops.column_sparse_attention"
    shapes = []
    original = sys.modules[op]._block_column_attention

    def spy(*arguments: object) -> object:
        shapes.append(arguments[8].shape[:2])  # type: ignore[attr-defined]
        return original(*arguments)

    monkeypatch.setattr(sys.modules[op], "_block_column_attention", spy)
    out = column_sparse_attention(q, k, v, wide, backend=backend)
    assert shapes == ([] if backend == "reference" else [(1, 1)])
    assert torch.equal(out, column_sparse_attention(q, k, v, one, backend=backend))


@pytest.mark.skipif(DEVICE == "cuda", reason="the tiles of the table are larger than the interpreter is fast")
@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 2), Tile(64, 16, 4, 3, True)], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_any_tile_gives_the_same(tile: Tile, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "INT32", 0 if wide else 1 << 31)
    case = (1, 2, 1, 140, 203, 32, 64)
    q, k, v = inputs(case)
    p = grouped_union_for(case, times=2)
    lists = (p.blocks.counts, p.blocks.indices, p.columns.counts, p.columns.indices)
    out, lse = triton.block_column_attention(q, k, v, 64, 128, *lists, 32**-0.5, tiles=(tile,))
    want, want_lse = dense(q, k, v, p.mask())
    assert_close("out", out, want, torch.float32)
    assert_close("lse", lse, want_lse, torch.float32)


def test_tables_have_a_tile_for_every_size() -> None:
    for dim in (16, 64, 80, 96, 128, 256):
        for size in (16, 32, 64, 128, 256, 2048):
            q = torch.empty(1, 1, 1, dim, dtype=torch.float16)
            for tile in triton.preferred(q, size):
                assert min(tile.BM, size) % 16 == 0
                assert tile.BN % 16 == 0
                assert size % min(tile.BN, size) == 0


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


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # the interpreter's
@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_no_number_harms_only_those_that_see_it(bad: float, backend: str) -> None:
    case = CASES[0]
    q, k, v = inputs(case)
    pattern = union_for(case)
    reads = pattern.mask()[..., 70].any(1)[0].expand(130)
    want, _ = dense(q, k, v, pattern.mask())
    k = k.clone()
    k[:, :, 70] = bad
    out, lse = block_column_attention(q, k, v, pattern, return_lse=True, backend=backend)
    assert reads[70:].any()
    if math.isnan(bad):
        assert torch.equal(lse.isnan(), pattern.mask()[..., 70].expand(lse.shape))
    assert_close("out", out[:, :, ~reads], want[:, :, ~reads], torch.float32)


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
        results.append(cpu.block_column_attention(q, k, v, 16, 16, *tensors, 0.25)[0])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def gradients(
    case: tuple[int, ...], pattern: ColumnPattern | BlockColumnPattern, backend: str
) -> tuple[Tensor, ...]:
    """d_q, d_k and d_v of a loss on output and log-sum-exp."""
    q, k, v = (x.requires_grad_() for x in inputs(case))
    attend = block_column_attention if isinstance(pattern, BlockColumnPattern) else column_sparse_attention
    out, lse = attend(q, k, v, pattern, return_lse=True, backend=backend)  # type: ignore[operator]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    loss = (out * weight).sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()
    return torch.autograd.grad(loss, (q, k, v))


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("kind", ["columns", "union", "shared columns"])
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_gradients(case: tuple[int, ...], kind: str, backend: str) -> None:
    """Of output and log-sum-exp, against autograd through the masked softmax."""
    makers = {"columns": columns_for, "union": union_for, "shared columns": grouped_union_for}
    pattern = makers[kind](case)
    got = gradients(case, pattern, backend)
    want = gradients(case, pattern, "reference")
    if backend == "reference":
        q, k, v = (x.requires_grad_() for x in inputs(case))
        mask = pattern.mask()
        seen = mask.any(-1).expand(q.shape[:3])
        # A row that sees nothing has no gradient; the softmax over -inf alone would make it NaN.
        out, lse = dense(q, k, v, mask | ~seen[..., None])
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        loss = (out * weight * seen[..., None]).sum() + (lse * seen).square().sum()
        want = torch.autograd.grad(loss, (q, k, v))
    for name, a, b in zip(("d_q", "d_k", "d_v"), got, want, strict=True):
        assert b.abs().sum() > 0
        assert_close(name, a, b, torch.float32)


def test_gradients_in_bf16_are_close_and_keep_the_type() -> None:
    pattern = union_for(CASES[1])
    q, k, v = (x.requires_grad_() for x in inputs(CASES[1], torch.bfloat16))
    got = torch.autograd.grad(block_column_attention(q, k, v, pattern).float().square().sum(), (q, k, v))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    out = block_column_attention(*exact, pattern, backend="reference")
    want = torch.autograd.grad(out.square().sum(), exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend: str) -> None:
    case = (1, 2, 1, 40, 50, 16, 16)
    p = union_for(case)
    lists = (p.blocks.counts, p.blocks.indices, p.columns.counts, p.columns.indices)
    q, k, v = (x.requires_grad_() for x in inputs(case))
    arguments = (q, k, v, 16, 16, *lists, 0.25, backend)
    torch.library.opcheck(torch.ops.sparseland.block_column_attention.default, arguments)
    out, lse = torch.ops.sparseland.block_column_attention(*arguments)
    saved = (torch.ones_like(out), torch.zeros_like(lse), q, k, v, out, lse, 16, 16, *lists, 0.25)
    saved = tuple(x.detach() if isinstance(x, Tensor) else x for x in saved)
    torch.library.opcheck(torch.ops.sparseland.block_column_attention_backward.default, saved)


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
    with pytest.raises(SparselandError, match="scale must be > 0, got -1"):
        column_sparse_attention(q, k, v, pattern, scale=-1)
    long = ColumnPattern(130, 130, 32, pattern.counts.long(), pattern.indices.long())
    with pytest.raises(SparselandError, match=r"must be int32, got torch\.int64"):
        column_sparse_attention(q, k, v, long)
    with pytest.raises(SparselandError, match="no backend 'fa4'"):
        column_sparse_attention(q, k, v, pattern, backend="fa4")
    odd = ColumnPattern.from_column_mask(
        torch.ones(1, 1, 6, 130, dtype=torch.bool, device=DEVICE), 24, 130, 130
    )
    with pytest.raises(SparselandError, match="block size 24"):
        column_sparse_attention(q, k, v, odd, backend="triton")
    blocks = BlockPattern.from_block_mask(
        torch.ones(1, 3, 3, 3, dtype=torch.bool, device=DEVICE), 64, 130, 130
    )
    with pytest.raises(SparselandError, match="must be a multiple of the blocks', got 32 and 64"):
        block_column_attention(q, k, v, BlockColumnPattern(130, 130, blocks, pattern))


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_empty_lists_give_zero(backend: str) -> None:
    case = CASES[0]
    q, k, v = inputs(case)
    nothing = ColumnPattern.from_column_mask(
        torch.zeros(1, 1, 5, 130, dtype=torch.bool, device=DEVICE), 32, 130, 130
    )
    assert nothing.counts.max() == 0
    out, lse = column_sparse_attention(q, k, v, nothing, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", FAST)
def test_non_contiguous_inputs(backend: str) -> None:
    case = CASES[3]
    pattern = union_for(case)
    q, k, v = inputs(case)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert turned[0].stride(-1) != 1 or q.shape[2] == 1
    assert_close(
        "out",
        block_column_attention(*turned, pattern, backend=backend),
        dense(q, k, v, pattern.mask())[0],
        torch.float32,
    )


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_columns_go_on_from_the_blocks_output(case: tuple[int, ...]) -> None:
    """As behind another kernel for the blocks; tiles without a column leave its output as it is."""
    from sparseland.ops.block_sparse_attention import block_sparse_attention
    from sparseland.ops.column_sparse_attention import triton as kernels

    q, k, v = inputs(case)
    pattern = union_for(case)
    blocks, columns = pattern.blocks, pattern.columns
    size, rows = blocks.block_size, blocks.counts.shape[2]
    onto = block_sparse_attention(q, k, v, blocks, return_lse=True, backend="triton")
    before = tuple(t.clone() for t in onto)
    nothing = (blocks.counts.new_zeros(1, 1, rows), blocks.indices[:1, :1, :, :0])
    scale = 1 / math.sqrt(q.shape[3])
    got = kernels.block_column_attention(
        q, k, v, size, size, *nothing, columns.counts, columns.indices, scale, onto=onto
    )
    for name, a, b in zip(("out", "lse"), got, dense(q, k, v, pattern.mask()), strict=True):
        assert_close(name, a, b, torch.float32)
    none = torch.zeros_like(columns.counts)
    same = kernels.block_column_attention(
        q, k, v, size, size, *nothing, none, columns.indices, scale, onto=tuple(t.clone() for t in before)
    )
    assert all(torch.equal(a, b) for a, b in zip(same, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("dim", "block_size"), [(128, 64), (128, 128), (64, 128)])
def test_compiled_kernels_for_blocks_and_columns(dim: int, block_size: int, grouped: bool) -> None:
    if why_no_gluon(torch.empty(0, device=DEVICE)):
        pytest.skip("needs Hopper and Triton 3.6")
    case = (2, 4, 2, 700, 1500, dim, block_size)
    q, k, v = inputs(case, torch.bfloat16)
    pattern = grouped_union_for(case) if grouped else union_for(case)
    out, lse = block_column_attention(q, k, v, pattern, return_lse=True, backend="gluon")
    want, want_lse = dense(q, k, v, pattern.mask())
    assert_close("out", out, want, torch.bfloat16)
    assert_close("lse", lse, want_lse, torch.bfloat16)
    assert torch.equal(out, block_column_attention(q, k, v, pattern))
