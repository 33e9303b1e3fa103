"""permuted_attention and patterns of parts: every backend against a float64 softmax under the pattern's mask.

On a machine with a CUDA device the same tests run there (and the Triton kernel is compiled).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.attend import attend
from sparseland.ops.permuted_attention import _forward, permuted_attention
from sparseland.patterns import BlockPattern, Part, PartsPattern, PermutedPattern, WindowPattern, cdiv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "reference"] + (["cpu"] if DEVICE == "cpu" else [])
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Case:
    B: int
    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    block_size: int
    listed: float = 0.5
    shared: bool = False  # one pattern for all rows and heads
    empty: float = 0.2  # slots without a token
    gap: int = 0
    first_key: int = 0
    dtype: torch.dtype = torch.float32


CASES = {
    "aligned": Case(1, 2, 2, 64, 64, 16, 16),
    "grouped, odd length": Case(2, 4, 2, 75, 75, 16, 16),
    "a later chunk": Case(1, 4, 2, 40, 75, 24, 16),
    "shorter than a block": Case(1, 2, 1, 5, 9, 8, 16, listed=1),
    "one query": Case(2, 2, 1, 1, 50, 32, 16),
    "one pattern for all": Case(2, 2, 1, 70, 128, 32, 32, shared=True),
    "near pairs and first keys belong to others": Case(1, 4, 2, 90, 90, 16, 16, gap=7, first_key=5),
    "half precision": Case(1, 2, 1, 128, 128, 80, 64, dtype=torch.float16),
}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, PermutedPattern]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(case.B, h, n, case.D, generator=generator).to(DEVICE, case.dtype)
        for h, n in ((case.Hq, case.Nq), (case.Hkv, case.Nk), (case.Hkv, case.Nk))
    )
    b, h = (1, 1) if case.shared else (case.B, case.Hq)
    indices = []
    for low, high in ((case.Nk - case.Nq, case.Nk), (0, case.Nk)):
        order = torch.rand(b, h, high - low, generator=generator).argsort(-1) + low
        # Empty slots anywhere, and a few at the end.
        gone = torch.rand(order.shape, generator=generator) < case.empty
        index = torch.nn.functional.pad(torch.where(gone, -1, order), (0, 3), value=-1)
        indices.append(index.to(DEVICE, torch.int32))
    rows, columns = (cdiv(i.shape[-1], case.block_size) for i in indices)
    blocks = torch.rand(b, h, rows, columns, generator=generator) < case.listed
    counts = blocks.sum(-1, dtype=torch.int32).to(DEVICE)
    # Lists in any order, with nonsense behind the count.
    lists = (~blocks).to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)
    behind = torch.arange(columns) >= blocks.sum(-1, keepdim=True)
    lists = torch.where(behind, 2**30, lists).to(DEVICE)
    pattern = PermutedPattern(
        case.Nq, case.Nk, case.block_size, *indices, counts, lists, case.gap, case.first_key
    )
    return q, k, v, pattern


def slow_mask(case: Case, pattern: PermutedPattern) -> Tensor:
    """The definition, pair by pair."""
    size = case.block_size
    b, h = pattern.counts.shape[:2]
    mask = torch.zeros(b, h, case.Nq, case.Nk, dtype=torch.bool)
    for row in range(b):
        for head in range(h):
            for slot, query in enumerate(pattern.q_index[row, head].tolist()):
                count = int(pattern.counts[row, head, slot // size])
                listed = set(pattern.indices[row, head, slot // size, :count].tolist())
                for other, key in enumerate(pattern.k_index[row, head].tolist()):
                    if query < 0 or key < case.first_key or key > query - case.gap:
                        continue
                    if other // size in listed:
                        mask[row, head, query - (case.Nk - case.Nq), key] = True
    return mask


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax under a mask in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    lse = s.logsumexp(-1)
    return (s - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp() @ v, lse


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", CASES)
def test_mask_and_pairs_are_the_definition(name: str) -> None:
    case = CASES[name]
    pattern = inputs(case)[3]
    expected = slow_mask(case, pattern)
    assert torch.equal(pattern.mask().cpu(), expected)
    assert torch.equal(pattern.pairs().cpu(), expected.sum((-1, -2)))
    assert expected.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_lse(name: str, backend: str) -> None:
    case = CASES[name]
    q, k, v, pattern = inputs(case)
    scale = 0.7 / math.sqrt(case.D)
    expected, expected_lse = oracle(q, k, v, pattern.mask(), scale)
    out, lse = permuted_attention(q, k, v, pattern, scale=scale, return_lse=True, backend=backend)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
    assert (out[lse == -math.inf] == 0).all()
    seen = lse > -math.inf
    assert relative(out, expected) < TOLERANCE[case.dtype]
    assert (lse[seen] - expected_lse[seen]).abs().max() < TOLERANCE[case.dtype] * 3


if DEVICE == "cuda":  # elsewhere there is nothing to collect

    @pytest.mark.gpu
    @pytest.mark.parametrize("D", [64, 96, 128, 256])
    @pytest.mark.parametrize("block_size", [16, 32, 64, 128])
    def test_compiled_kernels(D: int, block_size: int) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            case = Case(2, 4, 2, 300, 1111, D, block_size, 0.4, gap=100, first_key=30, dtype=dtype)
            q, k, v, pattern = inputs(case)
            expected, expected_lse = oracle(q, k, v, pattern.mask(), D**-0.5)
            out, lse = permuted_attention(q, k, v, pattern, return_lse=True, backend="triton")
            assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
            assert relative(out, expected) < TOLERANCE[dtype]


def by_residue(n: int, stride: int, size: int, heads: int) -> PermutedPattern:
    """All blocks over tokens sorted by their place modulo ``stride``."""
    order = torch.arange(n) % stride * n + torch.arange(n)
    index = order.argsort()[None, None].to(DEVICE, torch.int32)
    blocks = cdiv(n, size)
    counts = torch.full((1, 1, blocks), blocks, dtype=torch.int32, device=DEVICE)
    lists = torch.arange(blocks, dtype=torch.int32, device=DEVICE).expand(1, 1, blocks, -1)
    return PermutedPattern(n, n, size, index, index, counts, lists)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "stride"), [(96, 12), (101, 49), (50, 60)])
def test_dense_attention_in_permuted_order_is_dense_attention(n: int, stride: int, backend: str) -> None:
    q, k, v, _ = inputs(Case(1, 2, 1, n, n, 16, 16))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = permuted_attention(q, k, v, by_residue(n, stride, 16, 4), backend=backend)
    assert relative(out, dense.double()) < 3e-6


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("n_queries", [90, 33])
def test_a_partition_by_kinds_of_tokens_merges_to_dense(n_queries: int, backend: str | None) -> None:
    # Two kinds of tokens, four parts, for two of four heads; the other two by blocks of their own.
    n = 90
    size = 32
    q, k, v, _ = inputs(Case(1, 4, 2, n_queries, n, 16, size))
    vision = torch.zeros(n, dtype=torch.bool)
    vision[20:50] = vision[61:80] = True
    parts = []
    for a in (vision, ~vision):
        queries = a.nonzero().flatten()
        queries = queries[queries >= n - n_queries]
        for b in (vision, ~vision):
            keys = b.nonzero().flatten()
            rows, columns = cdiv(len(queries), size), cdiv(len(keys), size)
            pattern = PermutedPattern(
                n_queries,
                n,
                size,
                queries[None, None].to(DEVICE, torch.int32),
                keys[None, None].to(DEVICE, torch.int32),
                torch.full((1, 1, rows), columns, dtype=torch.int32, device=DEVICE),
                torch.arange(columns, dtype=torch.int32, device=DEVICE).expand(1, 1, rows, -1),
                gap=10,
                first_key=4,
            )
            parts.append(Part((0, 3), pattern))
    parts.append(Part((0, 3), lambda: WindowPattern(n_queries, n, 4, 10)))
    blocks = torch.rand(1, 2, cdiv(n_queries, 16), 6, device=DEVICE) < 0.6
    other = BlockPattern.from_block_mask(blocks, 16, n_queries, n)
    parts.append(Part((1, 2), other))
    pattern = PartsPattern(n_queries, n, 1, 4, tuple(parts))

    causal = WindowPattern.dense(n_queries, n).mask()[0, 0].to(DEVICE)
    assert (pattern.mask()[:, (0, 3)] == causal).all()
    assert torch.equal(pattern.mask()[:, 1:3], other.mask())
    assert torch.equal(pattern.pairs(), pattern.mask().sum((-1, -2)))
    expected, expected_lse = oracle(q, k, v, pattern.mask(), 0.25)
    out, lse = attend(q, k, v, pattern, scale=0.25, return_lse=True, backend=backend)
    assert relative(out, expected) < 3e-6
    assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
    seen = lse > -math.inf
    assert (lse[seen] - expected_lse[seen]).abs().max() < 1e-5
    assert torch.equal(attend(q, k, v, pattern, scale=0.25, backend=backend), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_visible_listed_keys_are_read(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 64, 64, 16, 16, gap=3))
    before = permuted_attention(q, k, v, pattern, backend=backend)
    unused = ~pattern.mask()[0, :, 40].any(0)
    assert unused[:38].any()
    k2, v2 = (torch.where(unused[:, None], t + 100, t) for t in (k, v))
    after = permuted_attention(q, k2, v2, pattern, backend=backend)
    torch.testing.assert_close(after[:, :, 40], before[:, :, 40], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_lists(backend: str) -> None:
    q, k, v, pattern = inputs(Case(2, 4, 2, 40, 40, 16, 16))
    expected = permuted_attention(q, k, v, pattern, backend=backend)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    lists = {
        name: torch.stack([getattr(pattern, name)] * 2, -1)[..., 0]
        for name in ("q_index", "k_index", "counts", "indices")
    }
    out = permuted_attention(*strided, replace(pattern, **lists), backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_may_read_any_key_head(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 3, 3, 40, 40, 16, 16))
    out = permuted_attention(q, k[:, :2], v[:, :2], pattern, kv_heads=(1, 0, 1), backend=backend)
    at = torch.tensor([1, 0, 1], device=DEVICE)
    expected = permuted_attention(q, k[:, at], v[:, at], pattern, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["nothing listed", "all slots empty", "no blocks"])
def test_nothing_to_compute(backend: str, what: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 40, 40, 16, 16))
    if what == "nothing listed":
        pattern = replace(pattern, counts=torch.zeros_like(pattern.counts))
    elif what == "no blocks":
        pattern = replace(pattern, counts=torch.zeros_like(pattern.counts), indices=pattern.indices[..., :0])
    else:
        pattern = replace(pattern, k_index=torch.full_like(pattern.k_index, -1))
    out, lse = permuted_attention(q, k, v, pattern, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert pattern.pairs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_query_shows_in_that_query_only(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 64, 64, 16, 16, listed=1, empty=0))
    clean = permuted_attention(q, k, v, pattern, backend=backend)
    q = q.clone()
    q[0, 1, 20] = math.nan
    out = permuted_attention(q, k, v, pattern, backend=backend)
    assert out[0, 1, 20].isnan().all()
    out[0, 1, 20] = clean[0, 1, 20]
    torch.testing.assert_close(out, clean, rtol=1e-6, atol=1e-6)


def test_gradients_come_from_the_reference() -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 20, 36, 16, 16))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = permuted_attention(*leaves, pattern)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    exact = [t.double().clone().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(oracle(*exact, pattern.mask(), 0.25)[0].square().sum(), exact)
    for got, wanted in zip(grads, expected, strict=True):
        assert relative(got, wanted) < 1e-5
    with pytest.raises(SparselandError, match="has no gradients; use reference"):
        permuted_attention(*leaves, pattern, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 20, 36, 16, 16))
    lists = (pattern.q_index, pattern.k_index, pattern.counts, pattern.indices)
    heads = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(_forward.registered, (q, k, v, *lists, heads, 16, 0, 0, 0.25, backend))


def test_refusals() -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 20, 36, 16, 16))
    with pytest.raises(SparselandError, match="no backend 'fast'"):
        permuted_attention(q, k, v, pattern, backend="fast")
    with pytest.raises(SparselandError, match="the pattern is for 20 queries and 36 keys, got 19 and 36"):
        permuted_attention(q[:, :, 1:], k, v, pattern)
    with pytest.raises(SparselandError, match="kv_heads must name one of 1 key heads"):
        permuted_attention(q, k, v, pattern, kv_heads=(0, 1))
    with pytest.raises(SparselandError, match="q_index must be int32"):
        permuted_attention(q, k, v, replace(pattern, q_index=pattern.q_index.long()))
    with pytest.raises(SparselandError, match="counts must begin with"):
        permuted_attention(q, k, v, replace(pattern, counts=pattern.counts[..., 1:]))


if DEVICE == "cpu":

    def test_the_cpu_path_beats_dense_where_blocks_are_few() -> None:
        import time

        n, stride, size = 4096, 64, 64
        q, k, v, _ = inputs(Case(1, 4, 4, n, n, 64, size))
        whole = by_residue(n, stride, size, 4)
        # Each class of 64 tokens sees itself and one strip of the first class.
        own = torch.arange(64, dtype=torch.int32)
        lists = torch.stack([torch.zeros_like(own), own], -1)[None, None]
        counts = torch.where(own == 0, 1, 2).to(torch.int32)[None, None]
        lists[0, 0, 0, 0] = 0
        pattern = replace(whole, counts=counts, indices=lists)

        def seconds(work) -> float:  # type: ignore[no-untyped-def]
            times = []
            for _ in range(4):
                start = time.process_time()
                work()
                times.append(time.process_time() - start)
            return min(times)

        with torch.no_grad():
            dense = seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
            sparse = seconds(lambda: permuted_attention(q, k, v, pattern))
        assert sparse < dense / 2
