"""The largest values by number and by sum: every backend against loops; ties, NaN, rows that ask for none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.top_values import covering, listing, top_indices, top_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton", "torch"] if DEVICE == "cuda" else ["cpu", "triton", "torch"]
# One value; few; several tiles of a program (sums), or what no longer fits into one (numbers, from 16385).
LENGTHS = [1, 7, 300, 9000]
LONG = [1, 7, 300, 16_500]


def rows(n: int) -> Tensor:
    """Six rows: noise, ties, all equal, all negative, and (from 7 values on) NaN and infinity."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2, 3, n, generator=g)
    x[0, 1] = x[0, 1].round()
    x[1, 1] = 0
    x[0, 2] = -x[0, 2].abs()
    if n >= 7:
        x[1, 2, 3], x[1, 2, 4], x[1, 0, 5] = torch.nan, torch.inf, -torch.inf
    return x.to(DEVICE)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("forced", [0, 3])
@pytest.mark.parametrize("n", LONG)
def test_top_mask(n: int, forced: int, backend: str) -> None:
    x = rows(n)
    count = torch.tensor([[0, 1, n // 2], [n, n - 1, min(n, 7)]], device=DEVICE)
    got = top_mask(x, count, forced, backend=backend)
    assert torch.equal(got, top_mask(x, count, forced, backend="reference"))
    assert torch.equal(got.sum(-1), count)


@pytest.mark.parametrize("backend", FAST)
def test_forced_places_come_first_and_in_order(backend: str) -> None:
    x = torch.tensor([[0.0, -5.0, torch.inf, 3.0, torch.nan]], device=DEVICE)
    for count, expected in ((1, [0]), (2, [0, 1]), (3, [0, 1, 4]), (4, [0, 1, 2, 4])):
        mask = top_mask(x, torch.tensor([count], device=DEVICE), 2, backend=backend)
        assert mask[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("n", [1, 7, 300, 8300])
def test_top_indices(n: int, backend: str) -> None:
    x = rows(n)
    for most in {0, 1, n // 3, n}:
        got = top_indices(x, most, backend=backend)
        assert got.dtype == torch.int32
        assert torch.equal(got, top_indices(x, most, backend="reference"))
    count = torch.tensor([[0, 1, n // 2], [n, n - 1, min(n, 7)]], device=DEVICE)
    for most in (n, max(1, n // 2)):
        got = top_indices(x, most, count, backend=backend)
        assert torch.equal(got, top_indices(x, most, count, backend="reference"))
        assert torch.equal((got >= 0).sum(-1), count.clamp(max=most))


@pytest.mark.parametrize("with_count", [False, True])
@pytest.mark.parametrize("most", [1, 40, 1000, 2999, 3000])
def test_long_rows_listed_by_several_programs(most: int, with_count: bool) -> None:
    """Rows of 3000 are short: programs share them when told so."""
    x = rows(3000)
    x[0, 0, :1500].clamp_(max=-1)  # the sample is fair, the slices are not
    x[1, 0] = torch.arange(3000) % 2  # equal values where the list ends
    count = torch.tensor([[0, 5, 999], [1000, 2000, 3000]], device=DEVICE) if with_count else None
    got = listing.top_indices(x, most, None if count is None else count.clamp(max=most), short=64)
    assert torch.equal(got, top_indices(x, most, count, backend="reference"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        ([[torch.nan, 1.0, 1.0, 0.0]], 2, [[0, 1]]),  # as many 1s as places, but NaN comes first
        ([[1.0, 1.0, 0.0], [torch.nan, 0.0, 1.0]], 1, [[0], [0]]),  # one too many and one too few
        ([[-0.0, -1.0, 0.0, 0.0]], 2, [[0, 2]]),  # zeros are equal
        ([[-torch.inf, -torch.inf, -torch.inf]], 2, [[0, 1]]),
    ],
)
def test_equal_values_and_nan(
    rows: list[list[float]], most: int, expected: list[list[int]], backend: str
) -> None:
    x = torch.tensor(rows, device=DEVICE)
    assert top_indices(x, most, backend=backend).tolist() == expected
    count = torch.tensor(most, device=DEVICE)
    assert top_indices(x, x.shape[1], count, backend=backend)[:, :most].tolist() == expected
    shared = top_indices(x.t().contiguous().t(), most, backend=backend)
    assert shared.tolist() == expected


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_no_places_no_rows(backend: str) -> None:
    for shape, most in (((3, 0), 0), ((3, 5), 0), ((0, 5), 2)):
        assert top_indices(torch.empty(shape, device=DEVICE), most, backend=backend).shape == (shape[0], most)


def test_very_long_rows_are_sampled_more_and_cut_finer() -> None:
    x = torch.randn(1, (1 << 18) + 1001, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    x[:, -500:] += 9
    assert torch.equal(listing.top_indices(x, 9000, None), top_indices(x, 9000, backend="torch"))


def test_a_misleading_sample_only_costs_time() -> None:
    x = torch.rand(1, 8192, generator=torch.Generator().manual_seed(4))
    x[:, ::2] += 5  # a sample of 4096 takes every other value
    x = x.to(DEVICE)
    for most in (1000, 5000):
        assert torch.equal(
            listing.top_indices(x, most, None, short=64), top_indices(x, most, backend="torch")
        )


def weights(n: int) -> Tensor:
    """Six rows: many small ones, ties, half zeros, and (from 7 weights on) NaN and infinity."""
    g = torch.Generator().manual_seed(n)
    x = torch.rand(2, 3, n, generator=g) ** 8
    x[x < 1e-6] = 0
    x[0, 1] = 0.25
    x[1, 0, n // 2 :] = 0
    if n >= 7:
        x[1, 2, 3], x[1, 1, 2] = torch.nan, torch.inf
    return x.to(DEVICE)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("n", LENGTHS)
def test_covering(n: int, backend: str) -> None:
    x = weights(n)
    active = torch.tensor([[False, True, True], [True, True, True]], device=DEVICE)
    for mass in (0.0, 0.05 * n, torch.inf):
        value, taken = covering(x, mass, active, backend=backend)
        wanted_value, wanted = covering(x, mass, active, backend="reference")
        assert torch.equal(value, wanted_value)
        assert torch.equal(taken, wanted)
        assert value[0, 0] == taken[0, 0] == 0  # not active


@pytest.mark.parametrize("n", [1, 300, 9000])
def test_many_programs_cover_a_row_as_one_does(n: int) -> None:
    from sparseland.ops.top_values import triton

    x = weights(n)
    active = torch.tensor([[False, True, True], [True, True, True]], device=DEVICE)
    for mass in (0.0, 0.05 * n, 2.0**21):
        many = triton.covering(x, mass, active, alone=0)
        for a, b in zip(many, triton.covering(x, mass, active), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", FAST)
def test_what_is_taken_reaches_the_mass_and_one_less_does_not(backend: str) -> None:
    x = torch.rand(2, 5000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    value, taken = covering(x, 1000.0, backend=backend)
    order = x.sort(dim=-1, descending=True).values.double()
    for row, n, v in zip(order, taken.tolist(), value.tolist(), strict=True):
        assert row[: n - 1].sum() <= 1000 < row[:n].sum()
        assert row[n - 1] == v


@pytest.mark.parametrize("backend", FAST)
def test_same_input_same_bits(backend: str) -> None:
    x = torch.rand(2, 5000, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    first, second = (covering(x, 1000.0, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_row_that_asks_for_nothing_is_not_read() -> None:
    x = torch.full((2, 40), torch.nan, device=DEVICE)
    x[1] = torch.arange(40)
    mask = top_mask(x, torch.tensor([0, 2], device=DEVICE), backend="triton")
    assert not mask[0].any()
    assert mask[1].nonzero().flatten().tolist() == [38, 39]


@pytest.mark.parametrize("backend", FAST)
def test_rows_that_are_a_view(backend: str) -> None:
    x = torch.rand(6, 50, 4, generator=torch.Generator().manual_seed(3)).to(DEVICE).permute(2, 0, 1)
    count = torch.tensor(5, device=DEVICE)
    assert torch.equal(
        top_mask(x, count, backend=backend), top_mask(x.contiguous(), count, backend="reference")
    )
    for a, b in zip(covering(x, 9.0, backend=backend), covering(x.contiguous(), 9.0), strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    x = torch.rand(2, 3, 40, device=DEVICE)
    count = torch.full((2, 3), 4, device=DEVICE)
    for backend in FAST:
        torch.library.opcheck(torch.ops.sparseland.top_mask.default, (x, count, 1, backend))
        torch.library.opcheck(torch.ops.sparseland.top_indices.default, (x, 7, count, backend))
        torch.library.opcheck(torch.ops.sparseland.covering.default, (x, 3.0, count > 0, backend))


def test_clear_errors() -> None:
    x = torch.rand(2, 4, device=DEVICE)
    with pytest.raises(SparselandError, match="float32 numbers are needed"):
        covering(x.double(), 1.0)
    with pytest.raises(SparselandError, match="forced=-1"):
        top_mask(x, torch.tensor(1, device=DEVICE), -1)
    with pytest.raises(SparselandError, match="most=5; a row of 4"):
        top_indices(x, 5)
    with pytest.raises(SparselandError, match="no backend 'fa4'"):
        covering(x, 1.0, backend="fa4")
