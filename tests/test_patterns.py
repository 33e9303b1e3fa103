"""Patterns count the pairs their masks show, drop nothing visible, and never show the future."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from sparseland import patterns
from sparseland.ops.attend import attend
from sparseland.patterns import (
    BlockColumnPattern,
    BlockPattern,
    ColumnPattern,
    PiecedPattern,
    WindowPattern,
    causal_pairs,
    cdiv,
    in_pieces,
    pairs_per_block,
    per_shape,
    visible_blocks,
)

SHAPES = [(5, 5, 2), (7, 20, 4), (64, 64, 16), (33, 100, 16), (1, 9, 4), (20, 20, 64), (50, 63, 16)]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    torch.manual_seed(0)
    return request.param


def random_blocks(n_queries, n_keys, size):
    mask = torch.rand(2, 3, cdiv(n_queries, size), cdiv(n_keys, size)) < 0.5
    return BlockPattern.from_block_mask(mask, size, n_queries, n_keys), mask


def test_block_pairs_are_the_causal_pairs_of_each_block(shape):
    n_queries, n_keys, size = shape
    causal = WindowPattern.dense(n_queries, n_keys).mask()[0, 0].long()
    rows, columns = cdiv(n_queries, size) * size, cdiv(n_keys, size) * size
    padded = torch.nn.functional.pad(causal, (0, columns - n_keys, 0, rows - n_queries))
    expected = padded.view(rows // size, size, columns // size, size).sum((1, 3))
    assert torch.equal(pairs_per_block(n_queries, n_keys, size), expected)
    assert torch.equal(visible_blocks(n_queries, n_keys, size), expected > 0)
    assert expected.sum() == causal_pairs(n_queries, n_keys)


def test_blocks_round_trip_and_count(shape):
    n_queries, n_keys, size = shape
    pattern, mask = random_blocks(n_queries, n_keys, size)
    assert torch.equal(pattern.block_mask(), mask & visible_blocks(n_queries, n_keys, size))
    assert torch.equal(pattern.pairs(), pattern.mask().sum((-1, -2)))
    for row in range(pattern.counts.shape[-1]):
        listed = pattern.indices[0, 0, row, : pattern.counts[0, 0, row]].tolist()
        assert listed == sorted(set(listed))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 1.0])
def test_pairs_of_blocks_are_those_of_the_map(shape, part):
    n_queries, n_keys, size = shape
    mask = torch.rand(2, 3, cdiv(n_queries, size), cdiv(n_keys, size)) < part
    pattern = BlockPattern.from_block_mask(mask, size, n_queries, n_keys)
    assert torch.equal(pattern.pairs(), (pattern.block_mask() * pattern.block_pairs()).sum((-1, -2)))
    shared = BlockPattern.from_block_mask(mask[:1, :1].expand(2, 3, -1, -1), size, n_queries, n_keys)
    assert torch.equal(shared.pairs(), pattern.pairs()[:1, :1].expand(2, 3))


def test_lists_may_have_room_to_spare(shape):
    n_queries, n_keys, size = shape
    pattern, _ = random_blocks(*shape)
    wide = torch.nn.functional.pad(pattern.indices, (0, 9), value=10**6)
    other = BlockPattern(n_queries, n_keys, size, pattern.counts, wide)
    assert torch.equal(other.pairs(), pattern.pairs())
    columns = torch.rand(1, 2, cdiv(n_queries, size), n_keys) < 0.3
    narrow = ColumnPattern.from_column_mask(columns, size, n_queries, n_keys, cap=3)
    assert narrow.indices.shape[-1] <= 3
    full = ColumnPattern.from_column_mask(columns, size, n_queries, n_keys)
    assert torch.equal(narrow.counts, full.counts.clamp(max=3))


def test_a_huge_pattern_is_counted_without_a_map_of_its_blocks():
    # 16M tokens: a map would have 1.7e10 entries.
    n, size = 2**24, 128
    rows = torch.arange(n // size, dtype=torch.int32)
    indices = torch.stack([(rows - 1).clamp(min=0), rows], -1)
    indices[0] = 0
    counts = torch.full_like(rows, 2)
    counts[0] = 1
    pattern = BlockPattern(n, n, size, counts[None, None], indices[None, None])
    own = size * (size + 1) // 2
    assert pattern.pairs().item() == len(rows) * own + (len(rows) - 1) * size**2
    assert WindowPattern(n, n, 4, 1000).pairs().item() == 1004 * 1005 // 2 + (n - 1004) * 1004


@pytest.mark.parametrize("step", [1, 2, 100])
def test_a_pattern_made_in_pieces_is_the_whole_pattern(shape, step, monkeypatch):
    n_queries, n_keys, size = shape
    whole, mask = random_blocks(*shape)

    def make(start, stop):
        seen = n_keys - n_queries + stop
        rows = mask[:, :, start // size : cdiv(stop, size), : cdiv(seen, size)]
        return BlockPattern.from_block_mask(rows, size, stop - start, seen)

    calls = []
    monkeypatch.setattr(patterns.parts, "_LIST_BYTES", 10 * step)
    pattern = in_pieces(lambda *at: calls.append(at) or make(*at), n_queries, n_keys, size, 10)
    assert isinstance(pattern, PiecedPattern) == (step < cdiv(n_queries, size))
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, n_queries, 8, generator=g)
    k, v = (torch.randn(2, 3, n_keys, 8, generator=g) for _ in range(2))
    got = attend(q, k, v, pattern, scale=0.3, return_lse=True)
    assert torch.equal(pattern.pairs(), whole.pairs())
    assert len(calls) == cdiv(cdiv(n_queries, size), step)  # counted on the way: no list is made twice
    assert torch.equal(pattern.mask(), whole.mask())
    for a, b in zip(got, attend(q, k, v, whole, scale=0.3, return_lse=True), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(attend(q, k, v, pattern, scale=0.3), got[0])


def test_what_lies_behind_count_is_never_read(shape):
    pattern, _ = random_blocks(*shape)
    listed = torch.arange(pattern.indices.shape[-1]) < pattern.counts[..., None]
    spoiled = torch.where(listed, pattern.indices, 10**6).to(torch.int32)
    other = BlockPattern(pattern.n_queries, pattern.n_keys, pattern.block_size, pattern.counts, spoiled)
    assert torch.equal(other.mask(), pattern.mask())


def test_columns_count_and_see_no_future(shape):
    n_queries, n_keys, size = shape
    mask = torch.rand(2, 3, cdiv(n_queries, size), n_keys) < 0.3
    pattern = ColumnPattern.from_column_mask(mask, size, n_queries, n_keys)
    dense = pattern.mask()
    causal = WindowPattern.dense(n_queries, n_keys).mask()
    tall = mask.repeat_interleave(size, -2)[..., :n_queries, :]
    assert torch.equal(dense, tall & causal)
    assert torch.equal(pattern.pairs(), dense.sum((-1, -2)))


def test_union_counts_no_pair_twice(shape):
    n_queries, n_keys, size = shape
    blocks, _ = random_blocks(n_queries, n_keys, size)
    columns = torch.rand(2, 3, n_keys) < 0.4
    union = BlockColumnPattern.of(blocks, columns)
    assert not (union.blocks.mask() & union.columns.mask()).any()
    causal = WindowPattern.dense(n_queries, n_keys).mask()
    assert torch.equal(union.mask(), (blocks.mask() | columns[:, :, None]) & causal)
    assert torch.equal(union.pairs(), union.mask().sum((-1, -2)))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 50), st.integers(0, 90))
def test_window_counts(n_queries, past, sinks, window):
    pattern = WindowPattern(n_queries, n_queries + past, sinks, window)
    assert pattern.pairs().item() == pattern.mask().sum().item()
    if window >= pattern.n_keys:
        assert pattern.density().item() == 1.0


def test_tensors_of_sizes_alone_are_made_once_and_can_be_trained_with() -> None:
    made = []

    @per_shape
    def steps(n: int, device: torch.device) -> torch.Tensor:
        made.append(n)
        return torch.arange(n, device=device)

    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = steps(3, cpu)
    assert steps(3, cpu) is first
    assert not first.is_inference()
    assert steps(4, cpu).tolist() == [0, 1, 2, 3]
    assert made == [3, 4]
    with FakeTensorMode():
        assert steps(3, cpu) is not first, "what a mode makes is not what it stands for"
    compiled = torch.compile(lambda x: x + steps(3, x.device), backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [1, 2, 3]
    assert steps(3, cpu) is first


def test_what_every_layer_of_a_deep_model_asks_for_is_kept() -> None:
    made = []

    @per_shape
    def own(layer: int) -> int:
        made.append(layer)
        return layer

    for _ in range(2):
        for layer in range(126):
            own(layer)
    assert made == list(range(126))
