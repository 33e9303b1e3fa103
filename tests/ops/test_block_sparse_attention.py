"""block_sparse_attention: every backend against a float64 softmax under the pattern's mask.

On a machine with a CUDA device the same tests run there (and the Triton kernels are compiled).
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops._dispatch import why_no_gluon
from sparseland.ops.block_sparse_attention import (
    _backward,
    _forward,
    block_sparse_attention,
)
from sparseland.patterns import BlockPattern, cdiv

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
    shared: tuple[bool, bool] = (False, False)  # one list for all rows, for all heads
    dtype: torch.dtype = torch.float32


CASES = {
    "aligned": Case(1, 2, 2, 64, 64, 16, 16),
    "grouped, odd length": Case(2, 4, 2, 75, 75, 16, 16),
    "a chunk that begins inside a block": Case(1, 4, 2, 40, 75, 24, 16),
    "shorter than a block": Case(1, 2, 1, 5, 9, 8, 16, listed=1),
    "one query": Case(2, 2, 1, 1, 50, 32, 16),
    "one list for all heads": Case(2, 2, 1, 70, 128, 32, 32, shared=(False, True)),
    "one list for all": Case(2, 2, 1, 64, 96, 40, 32, shared=(True, True)),
    "half precision": Case(1, 2, 1, 128, 128, 80, 64, dtype=torch.float16),
}
SIZES = [(64, 64), (64, 128), (80, 128), (96, 64), (128, 64), (128, 128), (256, 128), (256, 64)]
# Head and block sizes that FA4's and Gluon's routes take.
TAKEN = {
    "fa4": [(D, 128) for D in (64, 96, 128)],
    "gluon": [(64, 128), (128, 128), (128, 64)],
}
COMPILED = [
    (D, block_size, backend)
    for D, block_size in SIZES
    for backend in ("triton", *TAKEN)
    if (D, block_size) in TAKEN.get(backend, SIZES)
]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, BlockPattern]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(case.B, h, n, case.D, generator=generator).to(DEVICE, case.dtype).requires_grad_()
        for h, n in ((case.Hq, case.Nq), (case.Hkv, case.Nk), (case.Hkv, case.Nk))
    )
    rows, heads = 1 if case.shared[0] else case.B, 1 if case.shared[1] else case.Hq
    shape = (rows, heads, cdiv(case.Nq, case.block_size), cdiv(case.Nk, case.block_size))
    blocks = (torch.rand(shape, generator=generator) < case.listed).to(DEVICE)
    return q, k, v, BlockPattern.from_block_mask(blocks, case.block_size, case.Nq, case.Nk)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax under a mask in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    lse = s.logsumexp(-1)
    return (s - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp() @ v, lse


def relative(got: Tensor, expected: Tensor) -> float:
    """Error in the Frobenius norm, relative; NaN never passes a comparison with it."""
    return float((got.double() - expected).detach().norm() / expected.detach().norm().clamp(min=1e-30))


def loss_and_gradients(out: Tensor, lse: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of a loss that uses the output and the log-sum-exp of the queries that see something."""
    generator = torch.Generator().manual_seed(1)
    w_out = torch.randn(out.shape, generator=generator).to(out)
    w_lse = torch.randn(lse.shape, generator=generator).to(lse)
    seen = lse > -math.inf
    loss = (out * w_out).sum() + (lse.masked_fill(~seen, 0) * w_lse).sum()
    return torch.autograd.grad(loss, of)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel forgets to write shows."""
    allocate = torch.Tensor.new_empty

    def filled(self: Tensor, *size: object, **options: object) -> Tensor:
        fresh = allocate(self, *size, **options)  # type: ignore[arg-type]
        return fresh.fill_(math.nan if fresh.is_floating_point() else 2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_output_lse_and_gradients(name: str, backend: str) -> None:
    case = CASES[name]
    q, k, v, pattern = inputs(case)
    scale = 0.7 / math.sqrt(case.D)
    expected, expected_lse = oracle(q, k, v, pattern.mask(), scale)
    expected_grads = loss_and_gradients(expected, expected_lse, (q, k, v))

    out, lse = block_sparse_attention(q, k, v, pattern, scale=scale, return_lse=True, backend=backend)
    grads = loss_and_gradients(out, lse, (q, k, v))

    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
    assert (out[lse == -math.inf] == 0).all()
    seen = lse > -math.inf
    assert relative(out, expected) < TOLERANCE[case.dtype]
    assert (lse[seen] - expected_lse[seen]).abs().max() < TOLERANCE[case.dtype]
    for got, wanted, x in zip(grads, expected_grads, (q, k, v), strict=True):
        assert got.dtype == case.dtype
        assert got.shape == x.shape
        assert relative(got, wanted.double()) < 3 * TOLERANCE[case.dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["a query", "a key"])
def test_what_is_no_number_shows_in_output_and_lse(where: str, backend: str) -> None:
    """In those that see it, and in no others: an lse of -inf would make a merge take the row for empty."""
    q, k, v, pattern = (t.detach() if isinstance(t, Tensor) else t for t in inputs(CASES[next(iter(CASES))]))
    mask = pattern.mask()
    q, k = q.clone(), k.clone()
    (q if where == "a query" else k)[:, 0, 20] = math.nan
    group = q.shape[1] // k.shape[1]
    harmed = torch.zeros(mask.shape[:3], dtype=torch.bool, device=DEVICE)
    if where == "a query":
        harmed[:, 0, 20] = mask[:, 0, 20].any(-1)
    else:
        harmed[:, :group] = mask[:, :group, :, 20]
    harmed = harmed.expand(q.shape[:3])
    assert harmed.any()
    out, lse = block_sparse_attention(q, k, v, pattern, return_lse=True, backend=backend)
    assert torch.equal(lse.isnan(), harmed)
    assert torch.equal(out.isnan().all(-1), harmed)
    assert torch.equal(out.isnan().any(-1), harmed)


def skip_where_missing(backend: str) -> None:
    if backend == "fa4":
        pytest.importorskip("flash_attn.cute")
    if backend == "gluon" and (reason := why_no_gluon(torch.empty(0, device=DEVICE))):
        pytest.skip(reason)


if DEVICE == "cuda":  # elsewhere there is nothing to collect

    @pytest.mark.gpu
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize(("D", "block_size", "backend"), COMPILED)
    def test_compiled_kernels(D: int, block_size: int, backend: str) -> None:
        skip_where_missing(backend)
        for dtype in (torch.bfloat16, torch.float16):
            for n_queries, n_keys in ((1000, 1000), (300, 1111)):
                case = Case(2, 4, 2, n_queries, n_keys, D, block_size, 0.4, dtype=dtype)
                q, k, v, pattern = inputs(case)
                expected, expected_lse = oracle(q, k, v, pattern.mask(), D**-0.5)
                out, lse = block_sparse_attention(q, k, v, pattern, return_lse=True, backend=backend)
                assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
                assert relative(out, expected) < TOLERANCE[dtype]
                expected_grads = loss_and_gradients(expected, expected_lse, (q, k, v))
                for got, wanted in zip(loss_and_gradients(out, lse, (q, k, v)), expected_grads, strict=True):
                    assert relative(got, wanted.double()) < 2 * TOLERANCE[dtype]

    @pytest.mark.gpu
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize(("D", "block_size", "backend"), COMPILED)
    def test_more_rows_than_multiprocessors_some_without_blocks(
        D: int, block_size: int, backend: str
    ) -> None:
        """Persistent kernels go from row to row, past those that list nothing."""
        skip_where_missing(backend)
        for n_queries, n_keys in ((4000, 4000), (3900, 4099)):
            case = Case(1, 16, 4, n_queries, n_keys, D, block_size, 0.03, dtype=torch.bfloat16)
            q, k, v, pattern = inputs(case)
            with torch.no_grad():
                expected, expected_lse = oracle(q, k, v, pattern.mask(), D**-0.5)
                out, lse = block_sparse_attention(q, k, v, pattern, return_lse=True, backend=backend)
            unseen = expected_lse == -math.inf
            assert unseen.any()
            assert torch.equal(lse == -math.inf, unseen)
            assert (out[unseen] == 0).all()
            assert relative(out, expected) < TOLERANCE[case.dtype]
            assert (lse - expected_lse)[~unseen].abs().max() < TOLERANCE[case.dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_blocks_are_dense_causal_attention(backend: str) -> None:
    q, k, v, pattern = inputs(Case(2, 4, 2, 75, 75, 16, 16, listed=1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative(block_sparse_attention(q, k, v, pattern, backend=backend), dense.double()) < 3e-6
    sparse = inputs(CASES["grouped, odd length"])[3]
    assert relative(block_sparse_attention(q, k, v, sparse, backend=backend), dense.double()) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_listed_past_keys_are_read(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 64, 64, 16, 16))
    before = block_sparse_attention(q, k, v, pattern, backend=backend)
    unused = ~pattern.mask()[0, :, 40].any(0)  # keys that query 40 does not see in any head
    assert unused[:40].any()
    k2, v2 = (torch.where(unused[:, None], t + 100, t) for t in (k, v))
    after = block_sparse_attention(q, k2, v2, pattern, backend=backend)
    assert torch.equal(before[:, :, 40], after[:, :, 40])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_heads_and_expanded_gradients(backend: str) -> None:
    q, k, v, pattern = inputs(Case(2, 2, 1, 40, 40, 16, 16))
    expected = block_sparse_attention(q, k, v, pattern, backend=backend)
    expected_grads = torch.autograd.grad(expected.sum(), (q, k, v))
    strided = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    out = block_sparse_attention(*strided, pattern, backend=backend)
    assert relative(out, expected.double()) < 1e-6
    for got, wanted in zip(torch.autograd.grad(out.sum(), strided), expected_grads, strict=True):
        assert relative(got, wanted.double()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_listed_block_at_all(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 40, 40, 16, 16, listed=0))
    out, lse = block_sparse_attention(q, k, v, pattern, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (grad == 0).all()


def test_plain_backward_passes_gradcheck() -> None:
    case = Case(1, 2, 1, 6, 9, 8, 4, listed=0.6)
    q, k, v, pattern = inputs(case)

    def attention(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(*x, pattern, return_lse=True, backend="reference")
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(attention, [t.detach().double().requires_grad_() for t in (q, k, v)])


@pytest.mark.parametrize("chunk", [16, 128])
@pytest.mark.parametrize(
    ("blocks", "keys", "listed"), [(7, 600, 0.2), (4, 30, 0.5), (5, 300, 0.0), (8, 256, 1.0), (1, 1, 1.0)]
)
def test_neighbours_lists_are_parted_into_shared_and_own(
    blocks: int, keys: int, listed: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseland.ops.block_sparse_attention.gluon import shared_lists

    monkeypatch.setattr(shared_lists, "_CHUNK", chunk)
    mask = torch.rand(2, 2, blocks, keys, generator=torch.Generator().manual_seed(0)) < listed
    mask[:, :, 1:2] &= mask[:, :, 0:1]
    pattern = BlockPattern.from_block_mask(mask.to(DEVICE), 64, 64 * blocks, 64 * keys)
    counts, lists = shared_lists.share_lists(pattern.counts, pattern.indices)
    assert counts.shape == (2, 2, cdiv(blocks, 2), 3)
    one = shared_lists.share_lists(pattern.counts[:1, 1:].clone(), pattern.indices[:1, 1:])
    assert torch.equal(one[0], counts[:1, 1:])
    mask = torch.nn.functional.pad(pattern.block_mask(), (0, 0, 0, blocks % 2))
    first, second = mask[:, :, 0::2], mask[:, :, 1::2]
    parts = torch.stack((first & second, first & ~second, second & ~first), 3)
    # What is only the first's goes backwards from its row's end.
    rows = torch.stack((lists[..., 0, :], lists[..., 0, :].flip(-1), lists[..., 1, :]), 3)
    for part, count, row in zip(parts.flatten(0, 3), counts.flatten(), rows.flatten(0, 3), strict=True):
        assert row[:count].tolist() == part.nonzero().flatten().tolist()


def test_triton_is_deterministic() -> None:
    q, k, v, pattern = inputs(Case(1, 4, 2, 40, 40, 16, 16))
    runs = []
    for _ in range(2):
        out, lse = block_sparse_attention(q, k, v, pattern, return_lse=True, backend="triton")
        runs.append((out, *loss_and_gradients(out, lse, (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tiles_smaller_than_blocks_and_descriptor_loads() -> None:
    from sparseland.ops.block_sparse_attention import triton, triton_backward

    case = Case(1, 2, 1, 70, 100, 24, 64)
    q, k, v, pattern = inputs(case)
    lists = (pattern.counts, pattern.indices, case.block_size, 0.2)
    expected, _ = oracle(q, k, v, pattern.mask(), 0.2)
    descriptors = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    plain = triton.Tile(32, 16, 4, 2), triton.Tile(16, 64, 4, 1)
    for tile in (*plain, triton.Tile(32, 32, 4, 2, tma=descriptors)):
        with torch.no_grad():
            out, lse = triton.forward(q, k, v, *lists, tiles=(tile,))
        assert relative(out, expected) < 3e-6
    d_out = torch.randn_like(out)
    d_lse = torch.zeros_like(lse)
    expected_grads = torch.autograd.grad(expected, (q, k, v), d_out.double())
    for tile in plain:
        with torch.no_grad():
            grads = triton_backward.backward(
                d_out, d_lse, q, k, v, out, lse, *lists, tiles=((tile,), (tile,))
            )
        for got, wanted in zip(grads, expected_grads, strict=True):
            assert relative(got, wanted.double()) < 1e-5


def test_the_first_tile_that_fits_is_taken_and_remembered() -> None:
    from triton.runtime.errors import OutOfResources

    from sparseland.ops.block_sparse_attention.triton import Tile, first_fitting

    tried: list[Tile] = []

    def launch(tile: Tile) -> None:
        tried.append(tile)
        if tile.BN > 32:
            raise OutOfResources(300_000, 200_000, "shared memory")

    x = torch.zeros(1, dtype=torch.float16)
    tiles = (Tile(128, 128, 8, 3), Tile(64, 32, 4, 2))
    for _ in range(2):
        first_fitting(("test",), tiles, 64, x, launch)
    assert tried == [Tile(64, 64, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)]
    with pytest.raises(OutOfResources):
        first_fitting(("other",), tiles[:1], 64, x, launch)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(75, 75), (40, 75), (16, 32)])
def test_transposed_and_split_lists(n_queries: int, n_keys: int) -> None:
    """The lists that the backward and FA4 are given hold exactly the pattern's visible pairs."""
    from sparseland.ops.block_sparse_attention import fa4, triton_backward

    size, offset = 16, n_keys - n_queries
    _, _, _, pattern = inputs(Case(2, 3, 1, n_queries, n_keys, 8, size))
    mask = pattern.block_mask()
    t_counts, starts, lists = triton_backward.transposed(
        pattern.counts, pattern.indices, size, mask.shape[-1], offset
    )
    whole, partial, partly = fa4.forward_lists(pattern.counts, pattern.indices, size, n_queries, n_keys)
    b_partly, b_partial, b_whole, b_full = fa4.backward_lists(
        pattern.counts, pattern.indices, size, n_queries, n_keys
    )
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist():
        column = mask[b, h, :, j].nonzero().flatten().tolist()
        start = int(starts[b, h, j])
        assert lists[start : start + int(t_counts[b, h, j])].tolist() == column
        n, m = int(whole[b, h, i]), int(partly[b, h, i])
        row = pattern.indices[b, h, i, :n].tolist() + partial[b, h, i, :m].tolist()
        assert row == mask[b, h, i].nonzero().flatten().tolist()
        # Wholly visible: the block's last key is no later than the query block's first query.
        assert all(((key + 1) * size - 1 <= i * size + offset) == (at < n) for at, key in enumerate(row))
        n, m = int(b_partly[b, h, j]), int(b_whole[b, h, j])
        assert b_partial[b, h, j, :n].tolist() + b_full[b, h, j, :m].tolist() == column
        assert all(
            ((j + 1) * size - 1 <= query * size + offset) == (at >= n) for at, query in enumerate(column)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 20, 36, 16, 16))
    lists = (pattern.counts, pattern.indices, 16, 0.25)
    torch.library.opcheck(_forward.registered, (q, k, v, *lists, True, backend))
    with torch.no_grad():
        out, lse = _forward(q, k, v, *lists, True, backend)
        detached = [t.detach() for t in (out, torch.zeros_like(lse), q, k, v, out, lse)]
    torch.library.opcheck(_backward.registered, (*detached, *lists, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 20, 36, 16, 16))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q * 2, k, v, pattern, backend=backend).tanh()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [
        (out, *torch.autograd.grad(out.sum(), (q, k, v))) for out in (layer(q, k, v), compiled(q, k, v))
    ]
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_refusals() -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 20, 36, 16, 16))
    with pytest.raises(SparselandError, match="no backend 'fast'"):
        block_sparse_attention(q, k, v, pattern, backend="fast")
    with pytest.raises(SparselandError, match="scale must be > 0, got -1"):
        block_sparse_attention(q, k, v, pattern, scale=-1)
    with pytest.raises(SparselandError, match="for 20 queries and 36 keys, got 19 and 36"):
        block_sparse_attention(q[:, :, :19], k, v, pattern)
    other = BlockPattern(20, 36, 16, pattern.counts[:, :, :1], pattern.indices[:, :, :1])
    with pytest.raises(SparselandError, match=r"counts must be \[1 or 1, 2 or 1, 2\]"):
        block_sparse_attention(q, k, v, other)
    longs = BlockPattern(20, 36, 16, pattern.counts.long(), pattern.indices)
    with pytest.raises(SparselandError, match=r"must be int32, got torch\.int64"):
        block_sparse_attention(q, k, v, longs)
    with pytest.raises(SparselandError, match="no multiple of"):
        block_sparse_attention(
            q[:, :1].repeat(1, 3, 1, 1), k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), pattern
        )
    with pytest.raises(SparselandError, match=r"'fa4' can't run this input: it needs"):
        block_sparse_attention(q, k, v, pattern, backend="fa4")
    *_, odd = inputs(Case(1, 2, 1, 20, 36, 16, 12))
    with pytest.raises(SparselandError, match="block size 16, 32, 64, 128 or 256, got 12"):
        block_sparse_attention(q, k, v, odd, backend="triton")
    with pytest.raises(SparselandError, match=r"got torch\.float64"):
        block_sparse_attention(q.double(), k.double(), v.double(), pattern, backend="triton")


def test_environment_asks_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 20, 36, 16, 16))
    monkeypatch.setenv("SPARSELAND_BACKEND", "fa4")
    with pytest.raises(SparselandError, match="'fa4' can't run"):
        block_sparse_attention(q, k, v, pattern)


def test_importing_the_op_loads_no_backend() -> None:
    program = (
        "import sys, sparseland.ops.block_sparse_attention;"
        "assert not {'triton', 'flash_attn', 'cutlass'} & sys.modules.keys(), 'a backend was loaded'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
