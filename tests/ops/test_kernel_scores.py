"""kernel_scores: compressed keys, block scores and lists against loops that follow the paper's rules.

On a machine with a CUDA device the same tests run there (and the Triton kernels are compiled).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.kernel_scores import (
    UNJUDGED,
    _kernel_scores,
    _select_blocks,
    coarsen,
    compress_keys,
    fast,
    kernel_scores,
    select_blocks,
    visible_kernels,
)
from sparseland.patterns import TokenBlockPattern, cdiv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch", "reference"] + (["cpu"] if DEVICE == "cpu" else [])


@dataclass(frozen=True)
class Case:
    B: int
    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    kernel: int = 8
    stride: int = 4
    block_size: int = 16

    @property
    def sizes(self) -> dict[str, Any]:
        sizes = {"kernel": self.kernel, "stride": self.stride, "block_size": self.block_size}
        return {**sizes, "scale": self.D**-0.5}


CASES = {
    "whole prompt": Case(1, 4, 2, 70, 70, 16),
    "odd chunk, batch": Case(2, 6, 2, 19, 143, 16),
    "no overlap": Case(1, 3, 1, 50, 90, 8, kernel=4),
    "one query": Case(1, 2, 2, 1, 90, 16),
    "wider blocks": Case(1, 4, 1, 30, 130, 24, block_size=32),
    "windows of two blocks": Case(1, 2, 1, 50, 70, 16, kernel=32, stride=16),
    "shorter than a window": Case(1, 2, 1, 5, 5, 16),
}


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.B, case.Hq, case.Nq, case.D, generator=g) * 2
    return q.to(DEVICE), torch.randn(case.B, case.Hkv, case.Nk, case.D, generator=g).to(DEVICE)


def literal_scores(q: Tensor, k: Tensor, case: Case, rough: bool = False) -> Tensor:
    """Float64 loops: causal rule, softmax, sum over the group, largest of the windows that touch a block."""
    p, s, b, group = case.kernel, case.stride, case.block_size, case.Hq // case.Hkv
    q, k = q.double().cpu(), k.double().cpu()

    def logits(row: int, h: int, i: int, p: int, s: int) -> Tensor:
        """Products with the windows that end at or before query i."""
        position, keys = case.Nk - case.Nq + i, k[row, h // group]
        means = [keys[j : j + p].mean(0) for j in range(0, case.Nk, s) if j + p - 1 <= position]
        return torch.stack(means) @ q[row, h, i] * case.D**-0.5 if means else torch.zeros(0).double()

    out = torch.zeros(case.B, case.Hkv, case.Nq, cdiv(case.Nk, b), dtype=torch.float64)
    for row, hk, i in torch.cartesian_prod(*(torch.arange(n) for n in out.shape[:3])).tolist():
        total = torch.zeros(cdiv(case.Nk, s), dtype=torch.float64)
        for h in range(hk * group, hk * group + group):
            fine, coarse = logits(row, h, i, p, s), logits(row, h, i, 4 * p, 4 * s)
            lse = (coarse if rough and coarse.numel() else fine).logsumexp(0)
            total[: len(fine)] += (fine - lse).exp()
        for block in range(out.shape[3]):
            touching = [j for j in range(len(total)) if s * j < b * block + b and s * j + p > b * block]
            out[row, hk, i, block] = max(float(total[j]) for j in touching)
    return out


def test_compressed_keys_are_means_of_complete_windows() -> None:
    torch.manual_seed(0)
    for n in (0, 7, 8, 11, 12, 50):
        k = torch.randn(2, 2, n, 8)
        c = compress_keys(k, 8, 4)
        windows = [k[:, :, j : j + 8].mean(2) for j in range(0, n - 7, 4)]
        assert c.shape[2] == len(windows) == visible_kernels(n, 8, 4)
        if windows:
            torch.testing.assert_close(c, torch.stack(windows, 2))
    assert compress_keys(torch.randn(1, 1, 96, 8), 12, 4).shape[2] == 22


def test_a_window_has_the_same_bits_made_alone_or_with_others() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        k = torch.randn(2, 3, 200, 16).to(DEVICE, dtype)
        whole = compress_keys(k, 32, 16)
        for j in range(whole.shape[2]):
            assert torch.equal(compress_keys(k[:, :, 16 * j : 16 * j + 32], 32, 16)[:, :, 0], whole[:, :, j])


def test_coarse_windows_are_four_times_as_long() -> None:
    torch.manual_seed(0)
    for n in (31, 32, 47, 48, 100):
        k = torch.randn(1, 2, n, 8)
        rough = coarsen(compress_keys(k, 8, 4), 8, 4)
        assert rough.shape[2] == visible_kernels(n, 32, 16)
        torch.testing.assert_close(rough, compress_keys(k, 32, 16))


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_papers(name: str, backend: str, rough: bool) -> None:
    case = CASES[name]
    q, k = inputs(case)
    c = compress_keys(k, case.kernel, case.stride)
    coarse = coarsen(c, case.kernel, case.stride) if rough else None
    got = kernel_scores(q, c, case.Nk, **case.sizes, coarse=coarse, backend=backend)
    assert got.dtype == torch.float32
    expected = literal_scores(q, k, case, rough).to(DEVICE)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_counts_from_the_query_at_its_last_key_on(backend: str) -> None:
    # Kernel 8, stride 4, block 16: window j covers 4 j ... 4 j + 7. Block 1 holds 16 ... 31.
    case = Case(1, 1, 1, 64, 64, 8)
    q, k = inputs(case)
    scores = kernel_scores(q, compress_keys(k, 8, 4), 64, **case.sizes, backend=backend)[0, 0]
    first = [int((scores[:, block] > 0).nonzero()[0]) for block in range(4)]
    # The first window that touches block B > 0 begins 4 before it: it ends with the block's fourth key.
    assert first == [7, 16 + 3, 32 + 3, 48 + 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_are_sorting_by_score(backend: str) -> None:
    for case, window, init, topk, dense_len, tile in (
        (Case(2, 2, 1, 19, 143, 16), 2, 1, 3, 0, 5),
        (Case(1, 2, 1, 30, 90, 8, kernel=4), 1, 0, 2, 75, 32),
        (CASES["one query"], 1, 1, 2, 0, 4),
        (Case(1, 1, 1, 12, 130, 8, block_size=32), 1, 1, 1, 0, 8),
        (Case(1, 1, 1, 12, 70, 8), 1, 2, 2, 0, 8),
        (Case(1, 1, 1, 12, 70, 8), 9, 1, 3, 0, 8),
    ):
        q, k = inputs(case)
        c = compress_keys(k, case.kernel, case.stride)
        options = {**case.sizes, "window": window, "init": init, "topk": topk, "dense_len": dense_len}
        lists = select_blocks(q, c, case.Nk, **options, tile=tile, backend=backend)
        pattern = TokenBlockPattern(
            case.Nq, case.Nk, case.block_size, window, tile, case.Hq // case.Hkv, *lists
        )
        got = pattern.token_mask()
        scores = kernel_scores(q, c, case.Nk, **case.sizes, backend="reference")
        for i in range(case.Nq):
            position = case.Nk - case.Nq + i
            own = position // case.block_size
            for row in range(case.B):
                for h in range(case.Hkv):
                    far = list(range(max(0, own - window + 1)))
                    taken = set(far[:init])
                    ranked = sorted(far[init:], key=lambda b: (-float(scores[row, h, i, b]), b))
                    taken |= set(ranked[: max(0, topk - init)])
                    if position + 1 < dense_len:
                        taken = set(far)
                    taken |= set(range(max(0, own - window + 1), own + 1))
                    assert set(got[row, h, i].nonzero().flatten().tolist()) == taken


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_earlier_block(backend: str) -> None:
    case = Case(1, 1, 1, 16, 128, 8)
    q, k = inputs(case)
    lists = select_blocks(
        q * 0, compress_keys(k, 8, 4), 128, **case.sizes, window=1, init=0, topk=3, dense_len=0, tile=16,
        backend=backend,
    )  # fmt: skip
    # All windows weigh the same; block 0 is touched by as heavy windows as any.
    assert lists[0].tolist() == [[[3]]]
    assert lists[1][0, 0, 0, :3].tolist() == [0, 1, 2]
    assert lists[2][0, 0, 0, :3].tolist() == [0xFFFF] * 3


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 4, 2, 150, 260, 16)
    q, k = inputs(case)
    c = compress_keys(k, 8, 4)
    options = {**case.sizes, "window": 2, "init": 1, "topk": 4, "dense_len": 130, "tile": 8}
    whole = [select_blocks(q, c, 260, **options), kernel_scores(q, c, 260, **case.sizes)]
    monkeypatch.setattr(fast, "_CPU_BYTES", 4 * 2 * 4 * 65 * 20)
    monkeypatch.setattr(fast, "_GPU_BYTES", 4 * 2 * 4 * 65 * 20)
    assert fast.rows_at_once(q, c.shape[2]) < 30
    pieces = [select_blocks(q, c, 260, **options), kernel_scores(q, c, 260, **case.sizes)]
    assert all(torch.equal(a, b) for a, b in zip(whole[0], pieces[0], strict=True))
    torch.testing.assert_close(whole[1], pieces[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("init", "topk"), [(0, 1), (1, 5), (3, 3), (2, 16), (5, 3)])
def test_triton_lists_are_the_largest_rounded_scores(dtype: torch.dtype, init: int, topk: int) -> None:
    from sparseland.ops.kernel_scores.lists import lists
    from sparseland.ops.kernel_scores.reference import top
    from sparseland.ops.kernel_scores.triton import FOREMOST

    # Few different values: ties everywhere, and rows whose scores are all 0.
    g = torch.Generator().manual_seed(init)
    scores = (torch.rand(2, 1, 20, 128, generator=g) * 6).round() / 3e5
    scores[:, :, 5], scores[:, :, 6] = 0, 1e17
    scores = scores.to(DEVICE, dtype)
    made = tuple(torch.zeros(2, 1, 5, *n, dtype=torch.int32, device=DEVICE) for n in ((), (128,), (128,)))
    # Queries at 700 ... 719 of blocks of 16, the tiles from the second on; those below 705 take all.
    sizes = (16, 2, init, topk, 705)
    block, own = torch.arange(128, device=DEVICE), torch.arange(700, 720, device=DEVICE)[:, None] // 16
    marked = scores.masked_fill(block < init, FOREMOST).masked_fill(block > own - 2, -1)
    lists(marked, made, 5, 695, 16, 2, topk, 705, tile=5)
    sizes_of = (25, 725, 16, 2, 5, 1)
    got = TokenBlockPattern(*sizes_of, *made).token_mask()[:, :, 5:, :44]
    expected = top(scores.float(), 700, *sizes)[..., :44]
    listed = torch.arange(44) <= torch.arange(700, 720)[:, None] // 16 - 2
    assert torch.equal(got & listed.to(DEVICE), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [8200, 16500])
def test_rows_of_many_blocks(columns: int, dtype: torch.dtype) -> None:
    """As many as take 16 warps, which have fewer registers each."""
    from sparseland.ops.kernel_scores.lists import lists

    g = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 1, 3, cdiv(columns, 64) * 64, generator=g).to(DEVICE, dtype)
    scores[..., columns:] = -1
    made = tuple(torch.zeros(1, 1, 1, *n, dtype=torch.int32, device=DEVICE) for n in ((), (30,), (30,)))
    # The last of these queries' windows begins behind all columns.
    lists(scores, made, 0, 16 * columns, 16, 1, 10, 0, tile=3)
    counts, indices, members = made
    for row in range(3):
        chosen = {
            int(i) for i, word in zip(indices[0, 0, 0], members[0, 0, 0], strict=True) if word >> row & 1
        }
        assert chosen == set(scores[0, 0, row].topk(10).indices.tolist())
    assert counts.item() == (members != 0).sum()


def test_pieces_of_the_kernels_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseland.ops.kernel_scores import triton as kernels

    case = Case(1, 2, 1, 80, 190, 16)
    q, k = inputs(case)
    c = compress_keys(k, 8, 4)
    options = {**case.sizes, "window": 2, "init": 1, "topk": 4, "dense_len": 130, "tile": 8}
    options["coarse"] = coarsen(c, 8, 4)
    whole = select_blocks(q, c, 190, **options, backend="triton")
    expected = select_blocks(q, c, 190, **options, backend="reference")
    monkeypatch.setattr(kernels, "_HELD_BYTES", 4 * 64 * 24)
    pieces = select_blocks(q, c, 190, **options, backend="triton")
    assert all(
        torch.equal(a, b) and torch.equal(a, e) for a, b, e in zip(whole, pieces, expected, strict=True)
    )


@pytest.mark.parametrize("hold", [True, False])
def test_queries_held_or_loaded_again(hold: bool) -> None:
    from sparseland.ops.kernel_scores import triton as kernels

    # 90 blocks: several tiles of windows before the diagonal, what one lends to the next, a last one masked.
    case = Case(1, 3, 1, 40, 1440, 24)
    q, k = inputs(case)
    c = compress_keys(k, 8, 4)
    lse = kernels.denominators(q, c, None, 8, 4, 1400, 0.2)
    out = q.new_zeros(1, 1, 40, 128)
    cut = kernels.Cut(16, 64, 4, 1, hold)
    kernels.score(out, q, c, lse, 0, 1400, 8, 4, 16, 0.2, cut=cut)
    sizes = {"kernel": 8, "stride": 4, "block_size": 16, "scale": 0.2}
    expected = kernel_scores(q, c, 1440, **sizes, backend="reference")
    torch.testing.assert_close(out[..., :90], expected, rtol=1e-4, atol=1e-6)


def test_coarse_denominators_keep_the_order_within_a_head() -> None:
    case = Case(1, 2, 2, 80, 400, 16)
    q, k = inputs(case)
    c = compress_keys(k, 8, 4)
    exact, rough = (
        kernel_scores(q, c, 400, **case.sizes, coarse=coarse) for coarse in (None, coarsen(c, 8, 4))
    )
    assert not torch.allclose(exact, rough)
    assert torch.equal(*(t.argsort(dim=-1, stable=True) for t in (exact, rough)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_read(bad: float, rough: bool, backend: str) -> None:
    case = Case(1, 2, 1, 144, 144, 16)
    q, k = inputs(case)
    k[:, :, 70, 3] = bad  # in block 4, in windows of its own only
    q[:, 1, 100] = bad
    c = compress_keys(k, 8, 4)
    coarse = coarsen(c, 8, 4) if rough else None
    scores = kernel_scores(q, c, 144, **case.sizes, coarse=coarse, backend=backend)
    assert scores.isfinite().all()
    expected = kernel_scores(q, c, 144, **case.sizes, coarse=coarse, backend="reference")
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    # Before the windows end nothing is known; then this block is first, and others are compared as ever.
    assert (scores[0, 0, :7] == 0).all()
    assert (scores[0, 0, :71, 4] < UNJUDGED).all()
    assert (scores[0, 0, 75:, 4] == UNJUDGED).all()
    others = torch.arange(9, device=DEVICE) != 4
    assert (scores[0, 0, 101:, others] < UNJUDGED).all()
    assert (scores[0, 0, 130:][:, [0, 1, 2, 3]] > 0).all()
    assert (scores[0, 0, 100, :6] == UNJUDGED).all()
    options = {"window": 1, "init": 1, "topk": 2, "dense_len": 0, "tile": 8, "coarse": coarse}
    lists = select_blocks(q, c, 144, **case.sizes, **options, backend=backend)
    pattern = TokenBlockPattern(144, 144, 16, 1, 8, 2, *lists)
    mask = pattern.token_mask()[0, 0]
    later = torch.arange(144, device=DEVICE) >= 80
    assert mask[later & (torch.arange(144, device=DEVICE) != 100), 4].all()
    assert (mask[later].sum(-1) == 3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_queries_do_not_overflow(backend: str) -> None:
    case = Case(1, 2, 1, 40, 200, 16)
    q, k = inputs(case)
    c = compress_keys(k, 8, 4)
    scores = kernel_scores(q * 1e3, c, 200, **case.sizes, coarse=coarsen(c, 8, 4), backend=backend)
    assert scores.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "triton"] if DEVICE == "cpu" else ["triton"])
def test_opcheck(backend: str) -> None:
    case = Case(1, 2, 1, 20, 70, 16)
    q, k = inputs(case)
    c = compress_keys(k, 8, 4)
    torch.library.opcheck(_kernel_scores.registered, (q, c, None, 70, 8, 4, 16, 0.25, backend))
    torch.library.opcheck(
        _select_blocks.registered, (q, c, coarsen(c, 8, 4), 70, 8, 4, 16, 1, 1, 2, 0, 8, 0.25, backend)
    )


def test_strided_inputs() -> None:
    case = Case(2, 4, 2, 40, 90, 16)
    q, k = inputs(case)
    c = compress_keys(k, 8, 4)
    expected = kernel_scores(q, c, 90, **case.sizes)
    for backend in BACKENDS:
        strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, c)]
        got = kernel_scores(*strided, 90, **case.sizes, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_refusals() -> None:
    case = Case(1, 2, 1, 20, 70, 16)
    q, k = inputs(case)
    c = compress_keys(k, 8, 4)
    good = {**case.sizes}
    with pytest.raises(SparselandError, match="kernel=8 must be a multiple of stride=3"):
        kernel_scores(q, c, 70, **{**good, "stride": 3})
    with pytest.raises(SparselandError, match="block_size=18 must be a multiple of stride=4"):
        kernel_scores(q, c, 70, **{**good, "block_size": 18})
    with pytest.raises(SparselandError, match="kernel=24 must be at most block_size"):
        kernel_scores(q, c, 70, **{**good, "kernel": 24})
    with pytest.raises(SparselandError, match=r"scale must be > 0, got -1\.0"):
        kernel_scores(q, c, 70, **{**good, "scale": -1.0})
    with pytest.raises(SparselandError, match="20 queries but only 10 keys"):
        kernel_scores(q, c, 10, **good)
    with pytest.raises(SparselandError, match="compressed holds 3 windows, too few for 70 keys"):
        kernel_scores(q, c[:, :, :3], 70, **good)
    with pytest.raises(SparselandError, match="heads or head sizes don't fit"):
        kernel_scores(q[..., :8], c, 70, **good)
    with pytest.raises(SparselandError, match="no backend 'fast'"):
        kernel_scores(q, c, 70, **good, backend="fast")
    with pytest.raises(SparselandError, match="strides per block, got 3"):
        kernel_scores(q, c, 70, **{**good, "block_size": 12}, backend="triton")


if DEVICE == "cuda":  # elsewhere there is nothing to collect

    @pytest.mark.gpu
    @pytest.mark.parametrize("rough", [False, True])
    @pytest.mark.parametrize(("D", "heads"), [(64, (9, 3)), (128, (8, 2)), (128, (32, 2)), (80, (4, 4))])
    def test_compiled_kernels(D: int, heads: tuple[int, int], rough: bool) -> None:
        case = Case(1, *heads, 1500, 2100, D, 32, 16, 64)
        q, k = (t.to(torch.bfloat16) for t in inputs(case))
        c = compress_keys(k, 32, 16)
        coarse = coarsen(c, 32, 16) if rough else None
        got = kernel_scores(q, c, case.Nk, **case.sizes, coarse=coarse, backend="triton")
        expected = kernel_scores(q, c, case.Nk, **case.sizes, coarse=coarse, backend="reference")
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-4)
        options = {"window": 4, "init": 1, "topk": 6, "dense_len": 700, "tile": 32, "coarse": coarse}
        lists = [
            select_blocks(q, c, case.Nk, **case.sizes, **options, backend=backend)
            for backend in ("triton", "reference")
        ]
        sizes = (case.Nq, case.Nk, 64, 4, 32, heads[0] // heads[1])
        a, b = (TokenBlockPattern(*sizes, *made).token_mask() for made in lists)
        assert torch.equal(a.sum(-1), b.sum(-1))
        # Near ties may fall to either side: what is chosen is, up to rounding, no worse than what is not.
        position = torch.arange(600, 2100, device=DEVICE)[:, None]
        block = torch.arange(33, device=DEVICE)
        far = (block >= 1) & (block <= position // 64 - 4) & (position + 1 >= 700)
        listed = a[..., ::64]
        worst = expected.masked_fill(~(far & listed), math.inf).amin(-1)
        best = expected.masked_fill(~(far & ~listed), 0).amax(-1)
        assert (worst >= 0.96 * best).all()
        assert (a != b).float().mean() < 2e-2
