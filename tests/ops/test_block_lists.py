"""Lists from selections: every backend against loops, bounds on their length, pairs, clear errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.block_lists import block_lists, column_lists, fast, list_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton", "torch"] if DEVICE == "cuda" else ["cpu", "triton", "torch"]
# queries, keys, block size: whole prompts, chunks that begin at a block's edge and inside, one token.
SHAPES = [(70, 70, 16), (32, 96, 16), (33, 90, 16), (5, 130, 32), (40, 40, 64), (1, 1, 16)]


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Equal counts and equal lists up to them."""
    assert got[0].dtype == got[1].dtype == torch.int32
    assert torch.equal(got[0], want[0])
    length = min(got[1].shape[-1], want[1].shape[-1])
    assert not want[0].numel() or int(want[0].max()) <= length
    listed = torch.arange(length, device=DEVICE) < want[0][..., None]
    assert torch.equal(got[1][..., :length] * listed, want[1][..., :length] * listed)


def random(*shape: int, part: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < part


def criteria(n_queries: int, n_keys: int, size: int) -> dict[str, dict[str, Tensor | int]]:
    rows, columns = -(-n_queries // size), -(-n_keys // size)
    weights = torch.rand(2, 3, rows, columns, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    weights[0, 0, 0, 0] = torch.nan
    heavy = {"weights": weights, "threshold": torch.full((2, 3), 0.6, device=DEVICE)}
    active = torch.tensor([[True, False, True], [False, True, True]], device=DEVICE)
    mask, bands = random(2, 3, rows, columns), random(2, 3, columns + 1, seed=1)
    return {
        "mask": {"mask": mask},
        "a mask for all heads": {"mask": mask[:, :1], "bands": bands},
        "an expanded mask": {"mask": mask[:1, :1].expand(2, 3, -1, -1)},
        "a mask in another order": {"mask": mask.transpose(0, 3).contiguous().transpose(0, 3)},
        "weights": heavy,
        "bands": {"bands": bands},
        "columns, at most one": {"columns": random(2, 3, columns, seed=2), "cap": 1},
        "all": {**heavy, "active": active, "bands": bands, "columns": random(1, 3, columns, seed=2)},
        "keys": {"mask": random(2, 3, rows, n_keys, seed=3), "unit": 1},
        "keys, at most three": {"mask": random(2, 3, rows, n_keys, seed=3), "unit": 1, "cap": 3},
        "nothing": {"mask": mask & False},
    }


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_lists_and_their_pairs(shape: tuple[int, int, int], backend: str) -> None:
    for options in criteria(*shape).values():
        want = block_lists(*shape, **options, backend="reference")  # type: ignore[arg-type]
        same(block_lists(*shape, **options, backend=backend), want)  # type: ignore[arg-type]
        unit = options.get("unit", shape[2])
        pairs = list_pairs(*want, *shape, unit, backend="reference")  # type: ignore[arg-type]
        assert torch.equal(list_pairs(*want, *shape, unit, backend=backend), pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_lists(shape: tuple[int, int, int], backend: str) -> None:
    n_queries, n_keys, size = shape
    g = torch.Generator().manual_seed(0)
    places = [torch.randperm(n_keys, generator=g)[: min(9, n_keys)].sort().values for _ in range(6)]
    positions = torch.stack(places).view(2, 3, -1).to(DEVICE, torch.int32)
    counts = torch.randint(0, positions.shape[-1] + 1, (2, 3), generator=g).to(DEVICE)
    mask = random(2, 3, -(-n_queries // size), -(-n_keys // size))
    bands = random(2, 3, -(-n_keys // size) + 1, seed=1)
    for cover in ({"mask": mask}, {"bands": bands}, {"mask": mask[:1, :1], "bands": bands}, {}):
        want = column_lists(positions, counts, *shape, **cover, backend="reference")
        same(column_lists(positions, counts, *shape, **cover, backend=backend), want)


def test_a_planted_diagonal_and_a_planted_column() -> None:
    bands = torch.zeros(1, 1, 9, dtype=torch.bool, device=DEVICE)
    bands[..., 1 + 2] = True  # two blocks back
    columns = torch.zeros(1, 1, 8, dtype=torch.bool, device=DEVICE)
    columns[..., 3] = True
    counts, indices = block_lists(128, 128, 16, bands=bands, columns=columns)
    lists = [sorted({c for c in (r - 2, 3) if 0 <= c <= r}) for r in range(8)]
    assert [indices[0, 0, r, : counts[0, 0, r]].tolist() for r in range(8)] == lists


def test_what_is_not_active_is_not_read() -> None:
    weights = torch.full((1, 2, 4, 4), torch.nan, device=DEVICE)
    weights[0, 1] = torch.eye(4)
    active = torch.tensor([[False, True]], device=DEVICE)
    threshold = torch.full((1, 2), 0.5, device=DEVICE)
    for backend in FAST:
        counts, _ = block_lists(
            64, 64, 16, weights=weights, threshold=threshold, active=active, backend=backend
        )
        assert counts.tolist() == [[[0] * 4, [1] * 4]]


def test_lists_on_the_cpu_are_no_longer_than_the_longest() -> None:
    mask = torch.eye(64, dtype=torch.bool)[None, None]
    assert block_lists(1024, 1024, 16, mask=mask, backend="cpu")[1].shape == (1, 1, 64, 1)


@pytest.mark.parametrize("length", [20, 3])
def test_lists_of_static_length_are_the_same(length: int) -> None:
    mask = random(2, 3, 5, 20)
    values = torch.arange(100, 700, dtype=torch.int32, device=DEVICE).view(2, 3, 5, 20)
    for numbers in (None, values):
        got = fast.compact_without_asking(mask, length, numbers)
        assert got[1].shape[-1] == length
        want = fast.compact(mask.cpu(), length, None if numbers is None else numbers.cpu())
        same(got, (want[0].to(DEVICE), want[1].to(DEVICE)))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="12 GB on a GPU")
def test_more_than_2_to_the_31_entries() -> None:
    size, blocks = 16, 46_400
    mask = torch.zeros(1, 1, blocks, blocks, dtype=torch.bool, device=DEVICE)
    assert mask.numel() > 2**31
    mask[..., 0] = True
    mask[0, 0, -1, -3:] = True
    counts, indices = block_lists(blocks * size, blocks * size, size, mask=mask, cap=8)
    assert counts[0, 0, :-1].eq(1).all()
    assert indices[0, 0, -1, : counts[0, 0, -1]].tolist() == [0, blocks - 3, blocks - 2, blocks - 1]
    wide = torch.zeros(1, 1, blocks, 50_000, dtype=torch.int32, device=DEVICE)[..., :8]
    wide[0, 0, -1, :4] = indices[0, 0, -1, :4]
    pairs = list_pairs(counts, wide, blocks * size, blocks * size, size, size)
    assert pairs.item() == (blocks + 1) * size**2 + 2 * (size * (size + 1) // 2)


def test_opcheck() -> None:
    options = criteria(33, 90, 16)["all"]
    tensors = [options.get(n) for n in ("mask", "weights", "threshold", "active", "bands", "columns")]
    # What lies behind the counts is undefined, so all entries are listed where results are compared.
    everything = torch.ones(1, 1, 1, 6, dtype=torch.bool, device=DEVICE)
    ops, utils = torch.ops.sparseland, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.block_lists.default, (*tensors, 33, 90, 16, 16, 6), test_utils=utils)
    torch.library.opcheck(ops.block_lists.default, (everything, *[None] * 5, 1, 6, 1, 1, 6))
    positions = torch.arange(4, dtype=torch.int32, device=DEVICE)[None, None]
    counts = torch.full((1, 1), 4, device=DEVICE)
    torch.library.opcheck(ops.column_lists.default, (positions, counts, None, None, 1, 6, 1))
    lists = block_lists(33, 90, 16, mask=random(2, 3, 3, 6))
    torch.library.opcheck(ops.list_pairs.default, (*lists, 33, 90, 16, 16))


def test_clear_errors() -> None:
    mask = random(1, 1, 4, 4)
    with pytest.raises(SparselandError, match="nothing to list"):
        block_lists(64, 64, 16)
    with pytest.raises(SparselandError, match=r"mask must be \[B, H, \*\(5, 5\)\]"):
        block_lists(80, 80, 16, mask=mask)
    with pytest.raises(SparselandError, match="weights and threshold go together"):
        block_lists(64, 64, 16, weights=mask.float())
    with pytest.raises(SparselandError, match="bands need entries of one block"):
        block_lists(64, 64, 16, bands=mask[..., 0], unit=1)
    with pytest.raises(SparselandError, match="no backend 'fa4'"):
        block_lists(64, 64, 16, mask=mask, backend="fa4")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cap", [None, 700])
def test_one_long_list(cap: int | None, backend: str) -> None:
    """The columns of a head: one query, more keys than one program lists; a head with none, one with all."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, 1, 9_001, generator=g) < 0.1
    mask[0, 1], mask[1, 2], mask[1, 1, :, :8500] = False, True, False
    mask = mask.to(DEVICE)
    counts, indices = block_lists(1, 9_001, 1, mask=mask, unit=1, cap=cap, backend=backend)
    for row, head in itertools.product(range(2), range(3)):
        want = mask[row, head, 0].nonzero().flatten()[:cap]
        assert counts[row, head, 0] == len(want)
        assert torch.equal(indices[row, head, 0, : len(want)].long(), want)
