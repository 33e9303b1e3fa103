"""token_block_attention: every backend against a float64 softmax under the pattern's mask, gradients too.

On a machine with a CUDA device the same tests run there (and the Triton kernels are compiled).
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.attend import attend
from sparseland.ops.token_block_attention import _backward, _forward, tile_for, token_block_attention
from sparseland.patterns import TokenBlockPattern, WindowPattern, cdiv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "reference"] + (["cpu"] if DEVICE == "cpu" else [])
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SIZES = [(64, 32), (64, 64), (80, 64), (128, 64), (128, 128), (256, 64)]


@dataclass(frozen=True)
class Case:
    B: int
    Hq: int
    Hkv: int
    lists: int
    Nq: int
    Nk: int
    D: int
    block_size: int
    window: int
    tile: int
    listed: float = 0.4
    shared: bool = False  # one list for all rows
    dtype: torch.dtype = torch.float32


CASES = {
    "aligned": Case(1, 2, 2, 2, 64, 64, 16, 16, 1, 8),
    "grouped, odd length": Case(2, 6, 2, 2, 53, 53, 16, 16, 1, 5),
    "a chunk that begins inside a block": Case(1, 4, 2, 2, 40, 91, 24, 16, 2, 8),
    "tiles longer than blocks": Case(1, 2, 1, 1, 70, 100, 16, 16, 2, 32),
    "one list per query head": Case(1, 4, 2, 4, 50, 80, 16, 16, 1, 16),
    "one query": Case(2, 2, 1, 1, 1, 70, 32, 16, 2, 4),
    "shorter than a block": Case(1, 2, 1, 1, 5, 9, 8, 16, 3, 8),
    "one list for all rows": Case(2, 2, 1, 1, 48, 96, 40, 32, 1, 16, shared=True),
    "nothing but the window": Case(1, 2, 1, 1, 40, 90, 16, 16, 2, 8, listed=0),
    "half precision": Case(1, 4, 1, 1, 96, 160, 64, 32, 1, 16, dtype=torch.float16),
}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, TokenBlockPattern]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(case.B, h, n, case.D, generator=generator).to(DEVICE, case.dtype).requires_grad_()
        for h, n in ((case.Hq, case.Nq), (case.Hkv, case.Nk), (case.Hkv, case.Nk))
    )
    shape = (1 if case.shared else case.B, case.lists, case.Nq, cdiv(case.Nk, case.block_size))
    blocks = (torch.rand(shape, generator=generator) < case.listed).to(DEVICE)
    sizes = (case.block_size, case.window, case.tile, case.Hq // case.lists, case.Nk)
    return q, k, v, TokenBlockPattern.from_token_mask(blocks, *sizes)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax under a mask in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def relative(got: Tensor, expected: Tensor) -> float:
    """Error in the Frobenius norm, relative; NaN never passes a comparison with it."""
    return float((got.double() - expected).detach().norm() / expected.detach().norm().clamp(min=1e-30))


def loss_and_gradients(out: Tensor, lse: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of a loss that uses the output and the log-sum-exp."""
    generator = torch.Generator().manual_seed(1)
    w_out = torch.randn(out.shape, generator=generator).to(out)
    w_lse = torch.randn(lse.shape, generator=generator).to(lse)
    return torch.autograd.grad((out * w_out).sum() + (lse * w_lse).sum(), of)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel forgets to write shows."""
    allocate = torch.Tensor.new_empty

    def filled(self: Tensor, *size: object, **options: object) -> Tensor:
        fresh = allocate(self, *size, **options)  # type: ignore[arg-type]
        return fresh.fill_(math.nan if fresh.is_floating_point() else 2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.mark.parametrize("name", CASES)
def test_the_pattern_is_what_its_mask_shows(name: str) -> None:
    case = CASES[name]
    pattern = inputs(case)[3]
    mask = pattern.mask()
    assert mask.shape[1:] == (case.Hq, case.Nq, case.Nk)
    assert torch.equal(pattern.pairs(), mask.sum((-1, -2)))
    offset = case.Nk - case.Nq
    for i in range(case.Nq):
        own = (offset + i) // case.block_size
        start = max(0, own - case.window + 1) * case.block_size
        assert mask[..., i, start : offset + i + 1].all()
        assert not mask[..., i, offset + i + 1 :].any()
    assert case.listed == 0 or case.Nk < 16 or not mask.all()


def test_lists_come_back_as_they_went_in() -> None:
    torch.manual_seed(0)
    blocks = torch.rand(2, 3, 40, 6) < 0.5
    pattern = TokenBlockPattern.from_token_mask(blocks, 16, 1, 7, 2, 90)
    own = (torch.arange(40) + 50) // 16
    column = torch.arange(6)
    expected = (blocks & (column < own[:, None])) | (column == own[:, None])
    assert torch.equal(pattern.token_mask(), expected)
    # What lies behind count is never read.
    listed = torch.arange(pattern.indices.shape[-1]) < pattern.counts[..., None]
    spoiled = [torch.where(listed, t, 10**6).to(torch.int32) for t in (pattern.indices, pattern.members)]
    other = replace(pattern, indices=spoiled[0], members=spoiled[1])
    assert torch.equal(other.mask(), pattern.mask())
    assert torch.equal(other.pairs(), pattern.pairs())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_output_lse_and_gradients(name: str, backend: str) -> None:
    case = CASES[name]
    q, k, v, pattern = inputs(case)
    scale = 0.7 / math.sqrt(case.D)
    expected, expected_lse = oracle(q, k, v, pattern.mask(), scale)
    expected_grads = loss_and_gradients(expected, expected_lse, (q, k, v))
    out, lse = token_block_attention(q, k, v, pattern, scale=scale, return_lse=True, backend=backend)
    grads = loss_and_gradients(out, lse, (q, k, v))
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert relative(out, expected) < TOLERANCE[case.dtype]
    assert (lse - expected_lse).abs().max() < TOLERANCE[case.dtype]
    for got, wanted, x in zip(grads, expected_grads, (q, k, v), strict=True):
        assert got.dtype == case.dtype
        assert got.shape == x.shape
        assert relative(got, wanted.double()) < 3 * TOLERANCE[case.dtype]


if DEVICE == "cuda":  # elsewhere there is nothing to collect

    @pytest.mark.gpu
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("group", [1, 3, 4, 16])
    @pytest.mark.parametrize(("D", "block_size"), SIZES)
    def test_compiled_kernels(D: int, block_size: int, group: int) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            for n_queries, n_keys in ((900, 900), (300, 1111)):
                heads = (2 * group, 2)
                case = Case(
                    1, *heads, 2, n_queries, n_keys, D, block_size, 2, tile_for(group, D), 0.3, dtype=dtype
                )
                q, k, v, pattern = inputs(case)
                expected, expected_lse = oracle(q, k, v, pattern.mask(), D**-0.5)
                out, lse = token_block_attention(q, k, v, pattern, return_lse=True, backend="triton")
                assert relative(out, expected) < TOLERANCE[dtype]
                expected_grads = loss_and_gradients(expected, expected_lse, (q, k, v))
                for got, wanted in zip(loss_and_gradients(out, lse, (q, k, v)), expected_grads, strict=True):
                    assert relative(got, wanted.double()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_blocks_are_dense_causal_attention(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 1, 75, 75, 16, 16, 1, 8, listed=1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert pattern.density().min() == 1
    assert relative(token_block_attention(q, k, v, pattern, backend=backend), dense.double()) < 3e-6
    sparse = inputs(Case(1, 2, 1, 1, 75, 75, 16, 16, 1, 8, listed=0.3))[3]
    assert relative(token_block_attention(q, k, v, sparse, backend=backend), dense.double()) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_with_other_lists_do_not_meet(backend: str) -> None:
    # Two queries of one tile list disjoint blocks; each must see only its own.
    blocks = torch.zeros(1, 1, 8, 6, dtype=torch.bool)
    blocks[0, 0, 2, [0, 3]] = True
    blocks[0, 0, 3, [1, 2]] = True
    q, k, v, _ = inputs(Case(1, 2, 1, 1, 8, 96, 16, 16, 1, 8))
    pattern = TokenBlockPattern.from_token_mask(blocks.to(DEVICE), 16, 1, 8, 2, 96)
    before = token_block_attention(q, k, v, pattern, backend=backend)
    v2 = v.clone()
    v2[:, :, 16:48] += 100  # blocks 1 and 2
    after = token_block_attention(q, k, v2, pattern, backend=backend)
    changed = (before != after).any(-1)[0, 0].tolist()
    assert changed == [i == 3 for i in range(8)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_heads_and_expanded_gradients(backend: str) -> None:
    q, k, v, pattern = inputs(Case(2, 2, 1, 1, 40, 56, 16, 16, 1, 8))
    expected = token_block_attention(q, k, v, pattern, backend=backend)
    expected_grads = torch.autograd.grad(expected.sum(), (q, k, v))
    strided = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    out = token_block_attention(*strided, pattern, backend=backend)
    assert relative(out, expected.double()) < 1e-6
    for got, wanted in zip(torch.autograd.grad(out.sum(), strided), expected_grads, strict=True):
        assert relative(got, wanted.double()) < 1e-6


def test_plain_backward_passes_gradcheck() -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 1, 7, 13, 4, 4, 1, 3))

    def attention(*x: Tensor) -> tuple[Tensor, Tensor]:
        return token_block_attention(*x, pattern, return_lse=True, backend="reference")

    assert torch.autograd.gradcheck(attention, [t.detach().double().requires_grad_() for t in (q, k, v)])


def test_triton_is_deterministic() -> None:
    q, k, v, pattern = inputs(Case(1, 4, 2, 2, 40, 60, 16, 16, 1, 8))
    runs = []
    for _ in range(2):
        out, lse = token_block_attention(q, k, v, pattern, return_lse=True, backend="triton")
        runs.append((out, *loss_and_gradients(out, lse, (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_cuts_narrower_than_blocks() -> None:
    from sparseland.ops.token_block_attention import triton, triton_backward

    case = Case(1, 2, 1, 1, 70, 150, 24, 64, 1, 16)
    q, k, v, pattern = inputs(case)
    lists = (pattern.counts, pattern.indices, pattern.members, case.block_size, case.window, case.tile, 0.2)
    expected, _ = oracle(q, k, v, pattern.mask(), 0.2)
    d_out = torch.randn_like(expected).to(q.dtype)
    expected_grads = torch.autograd.grad(expected, (q, k, v), d_out.double())
    for cut in (triton.cut(16, 4, 1), triton.cut(32, 4, 2)):
        with torch.no_grad():
            out, lse = triton.forward(q, k, v, *lists, cuts=(cut,))
            saved = (d_out, torch.zeros_like(lse), q, k, v, out, lse)
            grads = triton_backward.backward(*saved, *lists, cuts=((cut,), (cut,)))
        assert relative(out, expected) < 3e-6
        for got, wanted in zip(grads, expected_grads, strict=True):
            assert relative(got, wanted.double()) < 1e-5


def test_transposed_lists() -> None:
    from sparseland.ops.token_block_attention.triton_backward import transposed

    case = Case(2, 2, 1, 2, 60, 100, 8, 16, 2, 7)
    pattern = inputs(case)[3]
    far = pattern.token_mask()
    own = (torch.arange(case.Nq, device=DEVICE) + 40) // 16
    far &= torch.arange(far.shape[-1], device=DEVICE) <= own[:, None] - 2
    counts, starts, tiles, words = transposed(
        pattern.counts, pattern.indices, pattern.members, 16, 2, 7, far.shape[-1], 40
    )
    for b, h, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, far.shape[-1]))).tolist():
        at, n = int(starts[b, h, j]), int(counts[b, h, j])
        listed = {7 * int(t) + bit for t, w in zip(tiles[at : at + n], words[at : at + n], strict=True)
                  for bit in range(7) if int(w) >> bit & 1}  # fmt: skip
        assert listed == set(far[b, h, :, j].nonzero().flatten().tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 1, 20, 52, 16, 16, 1, 8))
    lists = (pattern.counts, pattern.indices, pattern.members, 16, 1, 8, 0.25)
    torch.library.opcheck(_forward.registered, (q, k, v, *lists, True, backend))
    with torch.no_grad():
        out, lse = _forward(q, k, v, *lists, True, backend)
        detached = [t.detach() for t in (out, torch.zeros_like(lse), q, k, v, out, lse)]
    torch.library.opcheck(_backward.registered, (*detached, *lists, backend))


def test_compiles_into_one_graph() -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 1, 20, 52, 16, 16, 1, 8))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v, pattern, scale=0.25).tanh()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [
        (out, *torch.autograd.grad(out.sum(), (q, k, v))) for out in (layer(q, k, v), compiled(q, k, v))
    ]
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_where_it_is_read(backend: str) -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 1, 40, 64, 16, 16, 1, 8, listed=0.3))
    bad = k.detach().clone()
    bad[:, :, 20] = math.nan
    with torch.no_grad():
        out = token_block_attention(q, bad, v, pattern, backend=backend)
    reads = pattern.mask()[0, 0, :, 20]
    assert torch.equal(out[0, 0].isnan().all(-1), reads)
    assert not out[0, 0, ~reads].isnan().any() or backend != "reference"


def test_an_empty_batch() -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 1, 20, 52, 16, 16, 1, 8, shared=True))
    out, lse = token_block_attention(q[:0], k[:0], v[:0], pattern, return_lse=True)
    assert out.shape == (0, 2, 20, 16)
    assert lse.shape == (0, 2, 20)


def test_refusals() -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 1, 20, 52, 16, 16, 1, 8))
    with pytest.raises(SparselandError, match="no backend 'fast'"):
        token_block_attention(q, k, v, pattern, backend="fast")
    with pytest.raises(SparselandError, match="scale must be > 0, got -1"):
        token_block_attention(q, k, v, pattern, scale=-1)
    with pytest.raises(SparselandError, match="for 20 queries and 52 keys, got 19 and 52"):
        token_block_attention(q[:, :, :19], k, v, pattern)
    with pytest.raises(SparselandError, match=r"counts must be \[1 or 1, 2 / group, 3\]"):
        token_block_attention(q, k, v, replace(pattern, group=1))
    with pytest.raises(SparselandError, match=r"must be int32, got torch\.int64"):
        token_block_attention(q, k, v, replace(pattern, counts=pattern.counts.long()))
    with pytest.raises(SparselandError, match="tile must be 1 to 32, got 33"):
        token_block_attention(q, k, v, replace(pattern, tile=33))
    with pytest.raises(SparselandError, match="window must be at least the query's own block, got 0"):
        token_block_attention(q, k, v, replace(pattern, window=0))
    odd = inputs(Case(1, 2, 1, 1, 20, 52, 16, 12, 1, 8))[3]
    with pytest.raises(SparselandError, match="block size 16, 32, 64, 128 or 256, got 12"):
        token_block_attention(q, k, v, odd, backend="triton")
    with pytest.raises(SparselandError, match=r"got torch\.float64"):
        token_block_attention(q.double(), k.double(), v.double(), pattern, backend="triton")


def test_a_tile_fills_the_rows_of_a_program() -> None:
    assert [tile_for(group, 128) for group in (1, 3, 4, 8, 16, 200)] == [32, 32, 32, 16, 8, 1]
    assert [tile_for(group, 64) for group in (1, 3, 4, 8, 16, 200)] == [32, 21, 16, 8, 4, 1]


def test_dense_window_needs_no_lists() -> None:
    q, k, v, pattern = inputs(Case(1, 2, 1, 1, 40, 40, 16, 16, 3, 8, listed=0))
    assert not pattern.counts.any()
    torch.testing.assert_close(
        attend(q, k, v, pattern, scale=0.25), attend(q, k, v, WindowPattern.dense(40, 40), scale=0.25)
    )


def test_importing_the_op_loads_no_backend() -> None:
    program = (
        "import sys, sparseland.ops.token_block_attention;"
        "assert not {'triton', 'flash_attn', 'cutlass'} & sys.modules.keys(), 'a backend was loaded'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
