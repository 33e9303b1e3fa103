"""AnchorAttention: the equations by loops, an exact partition, planted stripes, the admitted failure."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sparseland.attention.anchor_attention import AnchorAttention
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, method_class, parse_spec
from sparseland.ops.attend import attend
from sparseland.ops.merge import merge_attention
from sparseland.patterns import BlockColumnPattern, BlockPattern, WindowPattern

# Whole prompts that groups of 64 do and do not divide, chunks at a group's edge, a block's edge and inside.
SHAPES = [(256, 256), (251, 251), (320, 320), (130, 322), (96, 240), (77, 211), (5, 150)]


def small(theta: float = 3.0, **options: int) -> AnchorAttention:
    return AnchorAttention(theta=theta, **{"block_size": 16, "step": 4, **options})


def causal(n_queries: int, n_keys: int) -> torch.Tensor:
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


def literal(x: AttentionInputs, head: int, m: AnchorAttention) -> torch.Tensor:
    """The computed pairs of one head, from the paper's equations, query by query."""
    n_queries, n_keys, b, step = x.q.shape[2], x.k.shape[2], m.block_size, m.step
    offset = n_keys - n_queries
    q, k = x.q[0, head].double(), x.k[0, head // x.group].double()
    mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    anchor = torch.zeros(n_queries, dtype=torch.float64)
    local = {}
    for i in range(n_queries):
        group = i // (b * step)
        local[group] = max(0, (offset + group * b * step) // b - 1) * b
        area = [j for j in range(offset + i + 1) if j < b or j >= local[group]]
        mask[i, area] = True
        anchor[i] = (k[area] @ q[i] * x.scale).max()
    for group, start in local.items():
        rows = slice(group * b * step, min((group + 1) * b * step, n_queries))
        for j in range(b, start):
            for first in range(rows.start, rows.stop, b):
                block = slice(first, min(first + b, n_queries))
                if anchor[block].mean() - q[block].mean(0) @ k[j] * x.scale <= m.theta:
                    mask[rows, j] = True
    return mask


def blocky(inputs, n_keys: int, **options) -> AttentionInputs:
    """Queries with a part in common per 16: random ones have means near 0, which no key comes near to."""
    x = inputs(n_keys, **options)
    g = torch.Generator().manual_seed(5)
    shared = torch.randn(*x.q.shape[:2], -(-x.q.shape[2] // 16), x.q.shape[3], generator=g)
    x.q.add_(2 * shared.repeat_interleave(16, 2)[:, :, : x.q.shape[2]])
    return x


# ------------------------------------------------------------------ selection


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
@pytest.mark.parametrize("step", [2, 4])
def test_selection_is_the_literal_algorithm(inputs, n_queries, n_keys, step):
    x = blocky(inputs, n_keys, n_queries=n_queries)
    method = small(step=step)
    mask = method.pattern(x).mask()
    for head in range(4):
        assert torch.equal(mask[0, head], literal(x, head, method)), f"head {head}"


def test_the_literal_cases_have_stripes_and_gaps(inputs):
    x = blocky(inputs, 320)
    pattern = small().pattern(x)
    stripes = pattern.columns.mask().sum((-1, -2))[0]
    possible = (causal(320, 320) & ~pattern.blocks.mask()[0, 0]).sum()
    assert ((stripes > 0.05 * possible) & (stripes < 0.9 * possible)).all()


def test_rows_of_a_batch_do_not_meet(inputs):
    x = blocky(inputs, 256, batch=2)
    both = small().pattern(x).mask()
    for row in range(2):
        alone = AttentionInputs(x.q[[row]], x.k[[row]], x.v[[row]], x.scale, 0)
        assert torch.equal(both[row], small().pattern(alone).mask()[0])


@pytest.mark.parametrize(("n_queries", "n_keys"), [*SHAPES, (300, 300), (129, 129)])
@pytest.mark.parametrize(("block_size", "step"), [(16, 1), (16, 4), (32, 2), (16, 3)])
def test_areas_and_stripes_are_a_partition(inputs, n_queries, n_keys, block_size, step):
    x = inputs(n_keys, n_queries=n_queries, sharpness=3.0)
    pattern = small(theta=1e30, block_size=block_size, step=step).pattern(x)
    if isinstance(pattern, WindowPattern):
        assert n_keys < (step + 2) * block_size + n_queries
        return
    assert isinstance(pattern, BlockColumnPattern)
    blocks, stripes = pattern.blocks.mask(), pattern.columns.mask()
    assert not (blocks & stripes).any()
    assert torch.equal((blocks | stripes)[0], causal(n_queries, n_keys).expand(4, -1, -1))
    assert (pattern.density() == 1).all()


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_the_lowest_threshold_is_sinks_and_local_keys(inputs, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries, sharpness=3.0)
    pattern = small(theta=-1e30).pattern(x)
    for i in range(n_queries):
        start = max(0, (n_keys - n_queries + i // 64 * 64) // 16 - 1) * 16
        position = n_keys - n_queries + i
        expected = [j for j in range(position + 1) if j < 16 or j >= start]
        assert pattern.mask()[0, 0, i].nonzero().flatten().tolist() == expected


def test_the_released_partition_would_count_keys_twice_and_skip_a_block():
    """Why the areas are the paper's: those of the released kernel (v4) are no partition."""
    b, step, groups = 16, 4, 5
    size = b * step
    for group in range(1, groups):
        for position in (group * size, group * size + size - 1):
            counted = [0] * (position + 1)
            for j in range(position + 1):
                counted[j] += j < size or j >= group * size  # stage 1: group 0, and the own group
                counted[j] += b <= j < group * size - b  # stage 2 at theta = infinity
            twice, never = counted.count(2), counted.count(0)
            assert twice == (size - b if group > 1 else size - 2 * b)
            assert never == (b if group > 1 else 0)
    ours = [0] * (3 * size)
    for j in range(3 * size):
        ours[j] += j < b or j >= 2 * size - b
        ours[j] += b <= j < 2 * size - b
    assert ours == [1] * (3 * size)


def test_parts_merge_to_the_whole(inputs):
    x = blocky(inputs, 251)
    pattern = small().pattern(x)
    options = {"scale": x.scale, "return_lse": True}
    parts = [attend(x.q, x.k, x.v, part, **options) for part in (pattern.blocks, pattern.columns)]
    whole = attend(x.q, x.k, x.v, pattern, **options)
    for got, want in zip(merge_attention(parts), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_density_grows_with_theta_and_selections_are_nested(inputs):
    x = blocky(inputs, 512)
    masks = [small(theta).pattern(x).mask() for theta in (-3.0, 0.0, 2.0, 4.0, 8.0)]
    for few, many in pairwise(masks):
        assert not (few & ~many).any()
        assert few.sum() < many.sum()


def test_flat_heads_are_denser_than_sharp_ones(inputs):
    x = blocky(inputs, 512, heads=2, kv_heads=1)
    x.q[:, 0] *= 4
    density = small().pattern(x).density()[0]
    assert density[0] < density[1] - 0.1


# ---------------------------------------------------------- planted structure


def planted(below: float, blocks: slice) -> AttentionInputs:
    """Queries whose anchor is 10 everywhere; those of ``blocks`` see key 100 that much below it."""
    n, d = 1024, 16
    q, k = torch.zeros(1, 1, n, d), torch.zeros(1, 1, n, d)
    q[..., 0] = 1
    k[:, :, :16, 0] = 10
    k[:, :, 100, 0], k[:, :, 100, 1] = -50, 1
    first, stop = blocks.start * 16, blocks.stop * 16
    q[:, :, first:stop, 1] = 60 - below
    return AttentionInputs(q, k, torch.randn(1, 1, n, d), 1.0, 0)


@pytest.mark.parametrize("blocks", [slice(48, 64), slice(48, 49), slice(63, 64)])
def test_a_planted_stripe_is_found_for_the_whole_group(blocks):
    method = AnchorAttention(theta=8.0, step=16, block_size=16)
    mask = method.pattern(planted(4.0, blocks)).mask()[0, 0]
    assert mask[768:, 100].all()
    assert not mask[512:768, 100].any()  # no block of that group sees it
    assert not method.pattern(planted(16.0, blocks)).mask()[0, 0, 256:, 100].any()


def test_a_key_that_one_query_looks_for_is_averaged_away():
    method = AnchorAttention(theta=8.0, step=16, block_size=16)
    x = planted(4.0, slice(0, 0))
    x.q[:, :, 900, 1] = 65  # five above its anchor: most of this query's attention
    assert not method.pattern(x).mask()[0, 0, 768:, 100].any()
    x.q[:, :, 896:912, 1] = 65
    assert method.pattern(x).mask()[0, 0, 768:, 100].all()


def test_stripes_beat_blocks_on_heavy_columns():
    """At equal density, single columns keep more of a head of scattered heavy keys than whole blocks do."""
    g = torch.Generator().manual_seed(0)
    n, d = 1024, 16
    x = AttentionInputs(*(torch.randn(1, 1, n, d, generator=g) for _ in range(3)), d**-0.5, 0)
    x.q[..., 0] = 6
    heavy = torch.randperm(n, generator=g)[:60]
    x.k[:, :, heavy, 0] += 4
    pattern = small(theta=4.0, step=2).pattern(x)
    logits = (x.q @ x.k.mT)[0, 0] * x.scale
    weights = logits.masked_fill(~causal(n, n), -torch.inf).softmax(-1)
    stripes = (weights * pattern.mask()[0, 0]).sum() / n
    # The best blocks there are, by true mass, at the density of the stripes.
    mass = weights.view(n // 16, 16, n // 16, 16).sum((1, 3))
    count = int(pattern.density()[0, 0] * (n // 16) * (n // 16 + 1) / 2)
    best = mass.flatten().argsort(descending=True)[:count]
    blocks = torch.zeros(n // 16 * (n // 16), dtype=torch.bool)
    blocks[best] = True
    rival = BlockPattern.from_block_mask(blocks.view(1, 1, n // 16, n // 16), 16, n, n)
    assert rival.density()[0, 0] > 0.9 * pattern.density()[0, 0]
    assert stripes > 0.9
    assert stripes > (weights * rival.mask()[0, 0]).sum() / n + 0.05


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_bad_numbers_spoil_what_they_spoil_in_dense_attention(inputs, bad, where):
    x = blocky(inputs, 300)
    (x.q if where == "q" else x.k)[0, 1, 100, 3] = bad
    dense = attend(x.q, x.k, x.v, WindowPattern.dense(300, 300), scale=x.scale, backend="reference")
    pattern = small().pattern(x)
    got = attend(x.q, x.k, x.v, pattern, scale=x.scale, backend="reference")
    assert torch.equal(got.isfinite(), dense.isfinite())


def test_the_limit_on_stripes_holds(inputs):
    x = blocky(inputs, 512)
    free, bound = small(8.0), small(8.0, max_stripes=50)
    counts = bound.pattern(x).columns.counts
    assert counts.max() <= 50 < free.pattern(x).columns.counts.max()
    assert not (bound.pattern(x).mask() & ~free.pattern(x).mask()).any()


def test_views_and_later_tokens(inputs):
    x = blocky(inputs, 320)
    strided = AttentionInputs(*(t.mT.contiguous().mT for t in (x.q, x.k, x.v)), x.scale, 0)
    assert torch.equal(small().pattern(strided).mask(), small().pattern(x).mask())
    # Later groups change nothing of earlier ones.
    part = AttentionInputs(x.q[:, :, :192], x.k[:, :, :192], x.v[:, :, :192], x.scale, 0)
    assert torch.equal(small().pattern(part).mask(), small().pattern(x).mask()[:, :, :192, :192])


# ------------------------------------------------------------------ parameters


def test_card_spec_and_defaults():
    assert method_class("anchor-attention") is AnchorAttention
    default = AnchorAttention()
    assert (default.theta, default.step, default.block_size) == (12.0, 16, 128)
    method = parse_spec("anchor-attention:theta=9.5,step=32,block_size=64")
    assert method == AnchorAttention(theta=9.5, step=32, block_size=64)
    for length in (640, 2048, 8192, 131_072):
        settings = AnchorAttention.grid(length)
        assert [s.theta for s in settings] == sorted(s.theta for s in settings)
        assert all(parse_spec(s.spec) == s for s in settings)
    assert parse_spec(AnchorAttention.full_budget(4096).spec) == AnchorAttention.full_budget(4096)


def test_short_prompts_are_dense(inputs):
    assert isinstance(AnchorAttention().pattern(inputs(2048)), WindowPattern)
    assert isinstance(small().pattern(inputs(64)), WindowPattern)
    assert isinstance(small().pattern(inputs(65)), BlockColumnPattern)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("anchor-attention:theta=inf", "theta=inf is not allowed; it must be a number"),
        ("anchor-attention:step=0", "step=0"),
        ("anchor-attention:step=65", "step=65"),
        ("anchor-attention:block_size=96", "block_size=96 is not allowed; it must be 16, 32, 64 or 128"),
        ("anchor-attention:max_stripes=0", "max_stripes=0"),
        ("anchor-attention:gamma=1", "no parameter 'gamma'"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(spec, words):
    with pytest.raises(SparselandError, match=words):
        parse_spec(spec)
