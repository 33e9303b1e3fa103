"""Anchors and stripes: every backend against loops over the definitions, areas, limits, bad numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.stripe_scores import local_starts, row_anchors, stripe_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton", "torch"] if DEVICE == "cuda" else ["cpu", "triton"]
# Triton's interpreter multiplies bfloat16 wrongly, so that pair is left to GPUs.
KINDS = [
    (backend, dtype)
    for backend in FAST
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")
]
# batch, query heads, key heads, queries, keys, D, block size, blocks per group
CASES = [
    (1, 3, 1, 200, 200, 64, 16, 2),
    (2, 4, 2, 70, 150, 80, 16, 3),  # a later chunk that starts within a block
    (1, 2, 1, 150, 150, 16, 32, 1),
    (1, 2, 2, 97, 225, 40, 16, 4),  # a later chunk that starts at a block's edge
    (1, 1, 1, 5, 90, 16, 16, 2),
    (1, 1, 1, 30, 30, 16, 16, 2),  # one group: nothing is between
    (1, 1, 1, 1, 1, 16, 16, 2),
]


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    batch, heads, kv_heads, n_queries, n_keys, size = case[:6]
    g = torch.Generator().manual_seed(sum(case))
    # Blocks of queries with a common part, else their means are near 0.
    q = torch.randn(batch, n_queries, heads, size, generator=g)
    q += (
        2
        * torch.randn(batch, n_queries // 16 + 1, heads, size, generator=g).repeat_interleave(16, 1)[
            :, :n_queries
        ]
    )
    k = torch.randn(batch, n_keys, kv_heads, size, generator=g)
    return q.to(DEVICE, dtype).transpose(1, 2), k.to(DEVICE, dtype).transpose(1, 2)


def options(case: tuple[int, ...]) -> dict[str, int]:
    return {"block_size": case[6], "step": case[7]}


def as_sets(columns) -> list[list[int]]:
    """The lists without what lies behind the counts."""
    counts, indices = columns.counts.flatten().tolist(), columns.indices.flatten(0, 2).tolist()
    return [row[:n] for n, row in zip(counts, indices, strict=True)]


@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_anchors(case: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    q, k = inputs(case, dtype)
    got = row_anchors(q, k, **options(case), backend=backend)
    want = row_anchors(q, k, **options(case), backend="reference")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stripes(case: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    q, k = inputs(case, dtype)
    got = stripe_columns(q, k, **options(case), theta=3.0, backend=backend)
    want = stripe_columns(q, k, **options(case), theta=3.0, backend="reference")
    assert got.block_size == case[6] * case[7]
    assert torch.equal(got.counts, want.counts)
    assert as_sets(got) == as_sets(want)


def test_the_cases_choose_some_and_leave_some() -> None:
    shares = []
    for case in CASES[:5]:
        columns = stripe_columns(*inputs(case), **options(case), theta=3.0, backend="reference")
        starts = local_starts(case[3], case[4], case[6], case[7], DEVICE)
        possible = (starts - case[6]).clamp(min=0).sum() * case[0] * case[1]
        shares.append(float(columns.counts.sum() / possible))
    assert all(0.02 < share < 0.98 for share in shares), shares


@pytest.mark.parametrize("limit", [1, 7, 20, 60])
@pytest.mark.parametrize("backend", FAST)
def test_a_limit_lowers_the_threshold(backend: str, limit: int) -> None:
    case = CASES[0]
    q, k = inputs(case)
    got = stripe_columns(q, k, **options(case), theta=8.0, limit=limit, backend=backend)
    want = stripe_columns(q, k, **options(case), theta=8.0, limit=limit, backend="reference")
    free = stripe_columns(q, k, **options(case), theta=8.0, backend=backend)
    assert got.indices.shape[-1] == limit
    assert as_sets(got) == as_sets(want)
    assert free.counts.max() > limit
    for few, all_of_them in zip(as_sets(got), as_sets(free), strict=True):
        assert set(few) <= set(all_of_them)
        assert len(few) == len(all_of_them) or len(few) <= limit


def test_a_limit_keeps_the_strongest_where_levels_tell_them_apart() -> None:
    q, k = torch.zeros(1, 1, 128, 16, device=DEVICE), torch.zeros(1, 1, 128, 16, device=DEVICE)
    q[..., 0] = 1
    k[0, 0, :16, 0] = 20.0  # the anchor
    k[0, 0, 16:80, 0] = 12.5  # 7.5 below: 64 stripes at theta 8
    k[0, 0, 20:80:10, 0] = 19.0  # 1 below: six of them
    for backend in (*FAST, "reference"):
        got = stripe_columns(q, k, block_size=16, step=1, theta=8.0, limit=10, scale=1.0, backend=backend)
        assert as_sets(got)[-1] == [20, 30, 40, 50, 60, 70]
        # All alike: the nearest stay.
        got = stripe_columns(q, k, block_size=16, step=1, theta=1e9, limit=10, scale=1.0, backend=backend)
        assert as_sets(got)[-1] == list(range(86, 96))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_keep_what_they_touch(backend: str, bad: float) -> None:
    case = (1, 2, 1, 160, 160, 16, 16, 2)
    q, k = inputs(case)
    plain = as_sets(stripe_columns(q, k, **options(case), theta=2.0, backend=backend))
    dirty = k.clone()
    dirty[0, 0, 40, 3] = bad
    got = as_sets(stripe_columns(q, dirty, **options(case), theta=2.0, backend=backend))
    # Groups whose exact area holds no bad key: as before, and the bad key itself.
    assert got[4] == sorted({*plain[4], 40})
    dirty = q.clone()
    dirty[0, 1, 130, 3] = bad
    got = as_sets(stripe_columns(dirty, k, **options(case), theta=2.0, backend=backend))
    assert got[:9] == plain[:9]
    assert got[9] == list(range(16, 112))  # the bad query's group keeps all


@pytest.mark.parametrize("backend", FAST)
def test_same_input_same_bits(backend: str) -> None:
    q, k = inputs(CASES[0])
    first, second = (stripe_columns(q, k, **options(CASES[0]), theta=3.0, backend=backend) for _ in range(2))
    assert as_sets(first) == as_sets(second)


def test_views_of_other_tensors() -> None:
    q, k = inputs(CASES[0])
    wide = torch.randn(1, 3, 200, 128, device=DEVICE)
    wide[..., ::2] = q
    for backend in FAST:
        got = stripe_columns(wide[..., ::2], k, **options(CASES[0]), theta=3.0, backend=backend)
        assert as_sets(got) == as_sets(stripe_columns(q, k, **options(CASES[0]), theta=3.0, backend=backend))


def test_pieces_of_groups_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseland.ops.stripe_scores import fast, triton

    q, k = inputs(CASES[0])
    whole = as_sets(stripe_columns(q, k, **options(CASES[0]), theta=3.0, backend="reference"))
    monkeypatch.setattr(fast, "_SCORES", 1)
    monkeypatch.setattr(triton, "_BYTES", 1)
    monkeypatch.setattr(triton, "_PARTS", 2)
    for backend in FAST:
        got = stripe_columns(q, k, block_size=16, step=2, theta=3.0, backend=backend)
        assert as_sets(got) == whole


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend: str) -> None:
    q, k = inputs((1, 2, 1, 80, 96, 16))
    torch.library.opcheck(torch.ops.sparseland.row_anchors.default, (q, k, 16, 2, 0.25, backend))
    anchors = row_anchors(q, k, block_size=16, step=2, backend=backend)
    # What lies behind the counts is not defined, so a comparison of two runs is left to the tests above.
    torch.library.opcheck(
        torch.ops.sparseland.stripe_columns.default,
        (q, k, anchors, 16, 2, 3.0, 96, 0.25, backend),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_local_areas_start_a_block_before_the_group() -> None:
    assert local_starts(256, 256, 16, 4).tolist() == [0, 48, 112, 176]
    assert local_starts(100, 170, 16, 2).tolist() == [48, 80, 112, 144]  # first queries 70, 102, 134, 166


def test_clear_errors() -> None:
    q, k = inputs(CASES[0])
    with pytest.raises(SparselandError, match="step=0"):
        row_anchors(q, k, block_size=16, step=0)
    with pytest.raises(SparselandError, match="theta=inf; it must be finite"):
        stripe_columns(q, k, block_size=16, step=2, theta=float("inf"))
    with pytest.raises(SparselandError, match="limit=0"):
        stripe_columns(q, k, block_size=16, step=2, theta=1.0, limit=0)
    with pytest.raises(SparselandError, match="scale must be > 0, got -1"):
        row_anchors(q, k, block_size=16, step=2, scale=-1.0)
    with pytest.raises(SparselandError, match="block size 16, 32, 64 or 128, got 24"):
        stripe_columns(q, k, block_size=24, step=2, theta=1.0, backend="triton")
    with pytest.raises(SparselandError, match="65 blocks a group"):
        row_anchors(q, k, block_size=16, step=65, backend="triton")
