"""The beam search: a literal transcription, all backends, planted trees, locality, its cost, bad numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.tree_search import fast, n_representatives, n_stages, reference, tree_search

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton", "torch"] if DEVICE == "cuda" else ["cpu", "triton"]
# Triton's interpreter multiplies bfloat16 wrongly, so that pair is left to GPUs.
HALF = [
    (backend, dtype)
    for backend in FAST
    for dtype in (torch.bfloat16, torch.float16)
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")
]
# batch, query heads, key heads, queries, keys, D, block_q, block_k, keep, stride
CASES = [
    (1, 2, 1, 64, 64, 16, 16, 2, 5, 2),
    (2, 4, 2, 24, 90, 24, 16, 1, 8, 1),  # a later chunk, a last block of 8 queries
    (1, 3, 1, 33, 257, 64, 32, 4, 7, 2),  # one query alone in the last block
    (1, 2, 2, 1, 203, 16, 1, 2, 16, 1),  # one decoding step
    (1, 1, 1, 32, 500, 80, 16, 2, 16, 3),
    (1, 2, 1, 20, 20, 16, 16, 8, 3, 2),  # fewer blocks than wanted
]


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Small whole numbers: their products are exact in any order, so all backends must agree, ties too."""
    batch, heads, kv_heads, n_queries, n_keys, dim = case[:6]
    g = torch.Generator().manual_seed(sum(case))
    shapes = ((n_queries, heads), (n_keys, kv_heads))
    q, k = (torch.randint(-4, 5, (batch, n, h, dim), generator=g).to(DEVICE, dtype) for n, h in shapes)
    return q.transpose(1, 2), k.transpose(1, 2)


def ranges(case: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Query block m searches from key 3 (row 1 of a batch: from 0) up to its own first query."""
    batch, _, _, n_queries, n_keys, _, block_q, block_k = case[:8]
    before = torch.arange(0, n_queries, block_q, device=DEVICE) + n_keys - n_queries
    first = torch.tensor([3, 0][:batch], device=DEVICE)[:, None].expand(batch, len(before))
    return first, ((before - first) // block_k).clamp(min=0)


def options(case: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("block_q", "block_k", "keep", "stride"), case[6:], strict=True))


# ------------------------------------------ the paper's procedure, with loops


def literal(q: Tensor, k: Tensor, block_k: int, keep: int) -> tuple[list[int], int]:
    """Blocks found for the queries ``q [rows, D]`` among the keys ``k [n, D]``, and how many were scored."""
    B, scored = len(k) // block_k, 0
    if keep >= B:
        return list(range(B)), 0
    segments = [(B * i // keep, B * (i + 1) // keep - B * i // keep) for i in range(keep)]
    nominal = B / keep
    while nominal > 1:
        halves = []
        for start, size in segments:
            for at, length in ((start, size // 2), (start + size // 2, size - size // 2)):
                scored += 1
                if length:
                    products = [float(x @ y) for x in q for y in k[at * block_k : (at + 1) * block_k]]
                    halves.append((max(products), at, length))
        best = sorted(range(len(halves)), key=lambda i: (-halves[i][0], i))[:keep]
        segments = [halves[i][1:] for i in sorted(best)]
        nominal /= 2
    assert all(size == 1 for _, size in segments)
    return [start for start, _ in segments], scored


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("shared", [False, True], ids=["per head", "per group"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_search_is_the_literal_one(case: tuple[int, ...], shared: bool, backend: str) -> None:
    q, k = inputs(case)
    first, blocks = ranges(case)
    block_q, block_k, keep, stride = case[6:]
    counts, starts = tree_search(q, k, first, blocks, **options(case), shared=shared, backend=backend)
    group = case[1] // case[2]
    assert counts.shape == starts.shape[:3] == (case[0], case[2] if shared else case[1], first.shape[1])
    assert counts.dtype == starts.dtype == torch.int32
    for b in range(starts.shape[0]):
        for h in range(starts.shape[1]):
            for m in range(starts.shape[2]):
                rows = slice(m * block_q, (m + 1) * block_q, stride)
                heads = slice(h * group, (h + 1) * group) if shared else slice(h, h + 1)
                origin, n = int(first[b, m]), int(blocks[b, m])
                keys = k[b, h if shared else h // group, origin : origin + n * block_k].cpu()
                want, scored = literal(q[b, heads, rows].flatten(0, 1).cpu(), keys, block_k, keep)
                assert scored == n_representatives(n, keep)
                got = starts[b, h, m].tolist()
                assert got[: counts[b, h, m]] == [origin + block_k * i for i in want]
                assert not any(got[counts[b, h, m] :])


@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
def test_half_precision_finds_the_same(backend: str, dtype: torch.dtype) -> None:
    case = CASES[4]
    lists = ranges(case)
    got = tree_search(*inputs(case, dtype), *lists, **options(case), backend=backend)
    assert torch.equal(got[1], tree_search(*inputs(case), *lists, **options(case), backend="reference")[1])


def test_both_ways_of_scoring_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up in a table of all products, and gathered; in one piece and in many."""
    case = (2, 4, 2, 70, 700, 16, 16, 2, 8, 2)
    q, k = inputs(case)
    results = []
    for table, elements in ((0, 1), (0, 1 << 22), (1 << 20, 1), (1 << 20, 1 << 22)):
        monkeypatch.setattr(fast, "_TABLE", table)
        monkeypatch.setattr(fast, "_ELEMENTS", elements)
        results.append(fast.tree_search(q, k, *(x.int() for x in ranges(case)), 16, 2, 8, 2, False))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("backend", FAST)
def test_pieces_of_query_blocks_agree(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseland.ops.tree_search import triton

    case = CASES[0]
    whole = tree_search(*inputs(case), *ranges(case), **options(case), backend=backend)[1]
    monkeypatch.setattr(triton, "_SEGMENTS", 1)
    monkeypatch.setattr(fast, "_ELEMENTS", 1)
    assert torch.equal(whole, tree_search(*inputs(case), *ranges(case), **options(case), backend=backend)[1])


# ------------------------------------------ cost


@pytest.mark.parametrize(
    ("blocks", "keep", "stages"), [(5, 8, 0), (8, 8, 0), (9, 8, 1), (16, 8, 1), (17, 8, 2), (65536, 256, 8)]
)
def test_stages(blocks: int, keep: int, stages: int) -> None:
    assert n_stages(blocks, keep) == stages == max(0, math.ceil(math.log2(blocks / keep)))
    assert n_representatives(blocks, keep) == 2 * keep * stages


@pytest.mark.parametrize("n_keys", [129, 256, 1000, 4096, 40_000])
def test_representatives_grow_with_the_logarithm(n_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where the reference scores them: 2 K ceil(log2(B / K))."""
    keep, block_k = 16, 2
    counted = []
    original = reference._scores

    def count(q: Tensor, k: Tensor, block: Tensor, size: int) -> Tensor:
        counted.append(len(block))
        return original(q, k, block, size)

    monkeypatch.setattr(reference, "_scores", count)
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, n_keys, 8)
    B = n_keys // block_k
    tree_search(q, k, torch.zeros(1, 1).int(), torch.full((1, 1), B).int(), block_q=4, block_k=block_k,
                keep=keep, backend="reference")  # fmt: skip
    assert sum(counted) == 2 * keep * math.ceil(math.log2(B / keep)) == n_representatives(B, keep)


def test_the_fast_way_scores_half_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first half has its parent's representative: K (stages + 1) products of blocks, not 2 K stages."""
    monkeypatch.setattr(fast, "_TABLE", 0)
    counted = []
    original = fast._peak

    def count(products: Tensor, absent: Tensor | None) -> Tensor:
        counted.append(products.shape[-1])
        return original(products, absent)

    monkeypatch.setattr(fast, "_peak", count)
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4096, 8)
    lists = torch.zeros(1, 1).int(), torch.full((1, 1), 2048).int()
    tree_search(q, k, *lists, block_q=4, block_k=2, keep=16, backend="cpu" if DEVICE == "cpu" else "torch")
    assert sum(counted) == 2 * 16 * (n_stages(2048, 16) + 1)


# ------------------------------------------ what it finds


def peaked(n: int, centre: int) -> tuple[Tensor, Tensor]:
    """q . k_j = -|j - centre|, exactly."""
    q = torch.tensor([1.0, 1.0] + [0.0] * 14, device=DEVICE).view(1, 1, 1, 16)
    k = torch.zeros(1, 1, n, 16, device=DEVICE)
    k[0, 0, :, 0] = -(torch.arange(n) - centre).abs().float()
    return q, k


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("centre", [0, 1, 77, 300, 511])
def test_scores_that_fall_with_distance_are_found_exactly(centre: int, backend: str) -> None:
    """The beam finds the nearest keys of a tree on which scores are monotone."""
    n, keep = 512, 16
    q, k = peaked(n, centre)
    lists = (x.to(DEVICE) for x in (torch.zeros(1, 1).int(), torch.full((1, 1), n).int()))
    _, starts = tree_search(q, k, *lists, block_q=1, block_k=1, keep=keep, backend=backend)
    order = sorted(range(n), key=lambda j: (abs(j - centre), j))
    found = set(starts[0, 0, 0].tolist())
    # The two at the rim are equally far, so either may be in.
    assert set(order[: keep - 1]) <= found
    assert found <= set(order[: keep + 1])


def test_a_spike_that_no_representative_shows_is_missed() -> None:
    """The failure that comes with the method: a single key inside a flat stretch."""
    n, keep = 1024, 16
    q = torch.ones(1, 1, 1, 16)
    k = torch.zeros(1, 1, n, 16)
    lists = torch.zeros(1, 1).int(), torch.full((1, 1), n).int()
    hits = []
    for spike in range(0, n, 37):
        k.zero_()[0, 0, spike] = 5.0
        hits.append(spike in tree_search(q, k, *lists, block_q=1, block_k=1, keep=keep)[1].flatten().tolist())
    assert 0 < sum(hits) < len(hits) / 2
    k.zero_()[0, 0, 512] = 5.0  # where a segment begins it is seen
    assert 512 in tree_search(q, k, *lists, block_q=1, block_k=1, keep=keep)[1].flatten().tolist()


def test_recall_rises_with_locality_and_beats_random_choice() -> None:
    """Keys that follow an AR(1) process: the paper's assumption made a number."""
    n, keep, heads = 1024, 64, 24
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, 1, 16, generator=g)
    noise = torch.randn(1, heads, n, 16, generator=g)
    lists = torch.zeros(1, 1).int(), torch.full((1, 1), n).int()
    recall = []
    for rho in (0.0, 0.9, 0.99):
        k = noise.clone()
        for j in range(1, n):
            k[:, :, j] = rho * k[:, :, j - 1] + math.sqrt(1 - rho**2) * noise[:, :, j]
        _, starts = tree_search(q, k, *lists, block_q=1, block_k=1, keep=keep)
        top = (q @ k.mT)[:, :, 0].topk(keep).indices
        found = (starts[:, :, 0, :, None] == top[:, :, None]).any(-2).float().mean()
        recall.append(float(found))
    assert all(a < b for a, b in pairwise(recall)), recall
    assert recall[0] > 1.5 * keep / n  # the last stages compare single keys, even without locality
    assert recall[-1] > 0.7


def test_the_stride_leaves_queries_without_a_vote() -> None:
    """Rows at odd places do not count with a stride of 2; with 1 they do."""
    q, k = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 64, 16)
    q[0, 0, 1, 0] = 1.0
    k[0, 0, 32:34, 0] = 1.0
    lists = torch.zeros(1, 1).int(), torch.full((1, 1), 64).int()
    found = {
        stride: 33
        in tree_search(q, k, *lists, block_q=4, block_k=1, keep=8, stride=stride)[1].flatten().tolist()
        for stride in (1, 2)
    }
    assert found == {1: True, 2: False}


# ------------------------------------------ what could go wrong


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # the interpreter's
@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_give_distinct_blocks_in_range(bad: float, backend: str) -> None:
    case = CASES[4]
    q, k = (x.clone() for x in inputs(case))
    lists = ranges(case)
    k[0, 0, 100] = bad
    q[0, 0, 2, 1] = bad
    counts, starts = tree_search(q, k, *lists, **options(case), backend=backend)
    for m, n in enumerate(counts[0, 0].tolist()):
        listed = starts[0, 0, m, :n].tolist()
        assert all(a < b for a, b in pairwise(listed))
        assert all(3 <= x < 3 + 2 * int(lists[1][0, m]) for x in listed)
    if bad is math.nan and backend != "reference":
        assert torch.equal(
            starts, tree_search(q, k, *lists, **options(case), backend="reference")[1]
        )  # NaN is the lowest everywhere


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_ranges_that_are_empty_or_shared_by_the_batch(backend: str) -> None:
    case = CASES[1]
    q, k = inputs(case)
    first = torch.full((1, 2), 10, device=DEVICE)
    blocks = torch.tensor([[4, 50]], device=DEVICE)
    counts, starts = tree_search(q, k, first, blocks, **options(case), backend=backend)
    assert counts.tolist() == [[[4, 8]] * 4] * 2
    assert starts[1, 2, 0].tolist() == [10, 11, 12, 13, 0, 0, 0, 0]
    counts, starts = tree_search(q, k, first + 100, 0 * blocks, **options(case), backend=backend)
    assert not counts.any()
    assert not starts.any()


def test_a_strided_view_is_searched_as_its_copy() -> None:
    case = CASES[3]
    q, k = inputs(case)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k)]
    for backend in FAST:
        got = tree_search(*turned, *ranges(case), **options(case), backend=backend)
        assert torch.equal(got[1], tree_search(q, k, *ranges(case), **options(case), backend=backend)[1])


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend: str) -> None:
    case = CASES[3]
    lists = (x.int().contiguous() for x in ranges(case))
    block_q, block_k, keep, stride = case[6:]
    arguments = (*inputs(case), *lists, block_q, block_k, keep, stride, True, backend)
    torch.library.opcheck(torch.ops.sparseland.tree_search.default, arguments)


def test_clear_errors() -> None:
    case = CASES[0]
    q, k = inputs(case)
    first, blocks = ranges(case)
    good = options(case)
    with pytest.raises(SparselandError, match="block_k=3 a power of two"):
        tree_search(q, k, first, blocks, **{**good, "block_k": 3})
    with pytest.raises(SparselandError, match="keep=0"):
        tree_search(q, k, first, blocks, **{**good, "keep": 0})
    with pytest.raises(SparselandError, match=r"blocks must be \[1 or 1, 4\]"):
        tree_search(q, k, first, blocks[:, :2], **good)
    with pytest.raises(SparselandError, match="256 queries score together"):
        tree_search(q, k, first[:, :1], blocks[:, :1], **{**good, "block_q": 512}, backend="triton")
