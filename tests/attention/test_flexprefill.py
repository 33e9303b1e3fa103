"""FlexPrefill: a literal transcription per head, planted structure, the known failure, and its parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sparseland import patterns
from sparseland.attention import flexprefill
from sparseland.attention.flexprefill import FlexPrefill
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, method_class, parse_spec
from sparseland.ops.attend import attend
from sparseland.ops.block_scores.fast import js_distance
from sparseland.patterns import BlockPattern, PiecedPattern, WindowPattern

# Whole prompt, odd length, chunks that do and do not start at a block's edge, fewer queries than a block.
SHAPES = [(256, 256), (251, 251), (64, 192), (77, 211), (10, 150)]


def causal(n_queries: int, n_keys: int) -> torch.Tensor:
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


# ------------------------------------------ the paper's equations, with loops


def coverage(scores: list[float], gamma: float) -> int:
    """Size of the smallest set of scores that sums to more than gamma."""
    total, count = 0.0, 0
    for score in sorted(scores, reverse=True):
        total, count = total + score, count + 1
        if total > gamma:
            break
    return count


def top(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def literal(x: AttentionInputs, head: int, m: FlexPrefill) -> tuple[torch.Tensor, bool]:
    """The block mask of one head, and whether it is query-aware."""
    n_queries, n_keys, b = x.q.shape[2], x.k.shape[2], m.block_size
    offset, rows, columns = n_keys - n_queries, -(-n_queries // b), -(-n_keys // b)
    q, k = x.q[0, head].double(), x.k[0, head // x.group].double()
    n_probe = min(b, n_queries)
    logits = q[-n_probe:] @ k.T * x.scale
    p = logits.masked_fill(~causal(n_probe, n_keys), -torch.inf).softmax(-1)
    a_v = [p[:, j].mean().item() for j in range(n_keys)]
    a_s = [0.0] * n_keys
    for i in range(n_probe):
        for j in range(n_keys - n_probe + i + 1):
            a_s[n_keys - n_probe + i - j] += p[i, j].item() / n_probe
    pool = [[sum(a[b * c : b * c + b]) for c in range(columns)] for a in (a_v, a_s)]

    k_bar = torch.stack([k[b * c : b * c + b].mean(0) for c in range(columns)])
    guess = (q[-n_probe:].mean(0) @ k_bar.T * x.scale).softmax(-1).tolist()
    js = 0.0
    for u, w in zip(guess, pool[0], strict=True):
        js += sum(t * math.log(t / ((u + w) / 2)) for t in (u, w) if t > 0) / 2
    query_aware = math.sqrt(max(js, 0)) < m.tau

    least = -(-m.min_budget // b)
    most = columns if m.max_budget is None else min(columns, -(-m.max_budget // b))
    n_v, n_s = (
        least if query_aware else min(most, max(least, coverage(a, m.gamma) // b + 1)) for a in (a_v, a_s)
    )
    pool[0][0] = pool[1][0] = math.inf
    vertical, slash = top(pool[0], n_v), top(pool[1], n_s) | set(range(1, 1 + m.neighbours))
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for r in range(rows):
        first = offset + b * r
        mask[r, sorted(vertical)] = True
        for s in slash:
            low = first - s * b
            for c in {low // b, (low + b - 1) // b}:
                if 0 <= c < columns:
                    mask[r, c] = True

    if query_aware:
        weight: dict[tuple[int, int], float] = {}
        for r in range(rows):
            q_bar = q[b * r : b * r + b].mean(0)
            last = min(offset + b * r + b, n_keys) - 1
            row = (q_bar @ k_bar[: last // b + 1].T * x.scale).softmax(-1)
            weight.update({(r, c): w for c, w in enumerate(row.tolist())})
        kept = 0.0
        for r, c in sorted(weight, key=lambda rc: (-weight[rc], rc)):
            mask[r, c] = True
            kept += weight[r, c]
            if kept > m.gamma * rows:
                break
    for r in range(rows):
        last = min(offset + b * r + b, n_keys) - 1
        mask[r, last // b + 1 :] = False
    return mask, query_aware


# ------------------------------------------------------------------ selection


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
@pytest.mark.parametrize("tau", [0, 0.2, 1])
@pytest.mark.parametrize(
    "budget",
    [{"gamma": 0.5}, {"gamma": 0.8, "min_budget": 30}, {"max_budget": 40}, {"gamma": 0.4, "neighbours": 2}],
)
def test_selection_is_the_literal_algorithm(inputs, n_queries, n_keys, tau, budget):
    x = inputs(n_keys, n_queries=n_queries, sharpness=3.0)
    method = FlexPrefill(**{"min_budget": 16, "block_size": 16, "tau": tau, **budget})
    got = method.pattern(x).block_mask()[0]
    aware = []
    for head in range(4):
        expected, query_aware = literal(x, head, method)
        aware.append(query_aware)
        assert torch.equal(got[head], expected), f"head {head}"
    assert tau == 0.2 or aware == [tau == 1] * 4


def test_the_middle_tau_splits_the_heads(inputs):
    # Otherwise the test above would never mix both kinds of head in one layer.
    method = FlexPrefill(min_budget=16, block_size=16, tau=0.2)
    kinds = {
        literal(inputs(n, n_queries=q, sharpness=3.0), h, method)[1] for q, n in SHAPES for h in range(4)
    }
    assert kinds == {True, False}


def test_rows_of_a_batch_do_not_meet(inputs):
    x = inputs(256, batch=2, sharpness=3.0)
    method = FlexPrefill(gamma=0.6, min_budget=16, block_size=16, tau=0.2)
    both = method.pattern(x).block_mask()
    for row in range(2):
        alone = AttentionInputs(x.q[[row]], x.k[[row]], x.v[[row]], x.scale, 0)
        assert torch.equal(both[row], method.pattern(alone).block_mask()[0])


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
@pytest.mark.parametrize("tau", [0, 0.1, 1])
@pytest.mark.parametrize("full", [{"gamma": 1, "min_budget": 16}, {"gamma": 0.5, "min_budget": 4096}])
def test_full_coverage_is_dense(inputs, n_queries, n_keys, tau, full):
    x = inputs(n_keys, n_queries=n_queries, sharpness=3.0)
    mask = FlexPrefill(tau=tau, block_size=16, **full).pattern(x).mask()
    assert torch.equal(mask, causal(n_queries, n_keys).expand_as(mask))


@pytest.mark.parametrize("tau", [0, 0.1, 1])
def test_density_grows_with_gamma_and_selections_are_nested(inputs, tau):
    x = inputs(512, sharpness=4.0)
    masks = [
        FlexPrefill(gamma=gamma, tau=tau, min_budget=16, block_size=16).pattern(x).block_mask()
        for gamma in (0.3, 0.6, 0.9, 0.99)
    ]
    for small, large in pairwise(masks):
        assert not (small & ~large).any()
        assert small.sum() < large.sum()


def test_budgets_adapt_to_the_head(inputs):
    x = inputs(512, heads=2, kv_heads=1)
    x.q[:, 0] *= 8  # sharp attention needs fewer blocks than flat
    density = FlexPrefill(gamma=0.8, tau=0, min_budget=16, block_size=16).pattern(x).density()[0]
    assert density[0] < density[1] - 0.1


def test_every_query_sees_itself_and_the_first_block(inputs):
    for n_queries, n_keys in SHAPES:
        x = inputs(n_keys, n_queries=n_queries, sharpness=5.0)
        for tau in (0, 1):
            mask = FlexPrefill(gamma=0.1, tau=tau, min_budget=1, block_size=16).pattern(x).mask()
            assert mask.diagonal(n_keys - n_queries, -2, -1).all()
            assert mask[..., :16][causal(n_queries, n_keys)[:, :16].expand_as(mask[..., :16])].all()


# ---------------------------------------------------------- planted structure


def one_head(n: int, seed: int = 0) -> AttentionInputs:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (0.1 * torch.randn(1, 1, n, 16, generator=g) for _ in range(3))
    return AttentionInputs(q, k, v, 1.0, 0)


@pytest.mark.parametrize("tau", [0, 1])
def test_a_planted_block_is_found_by_both_paths(tau):
    x = one_head(512)
    x.q[..., 0] = 3
    x.k[:, :, 160:176, 0] = 3
    # The forced first block takes one of the two columns of the minimum.
    blocks = FlexPrefill(gamma=0.8, tau=tau, min_budget=32, block_size=16).pattern(x).block_mask()[0, 0]
    assert blocks[10:, 10].all()
    assert blocks.double().mean() < 0.25


def test_a_planted_diagonal_is_found_by_vertical_slash():
    x = one_head(512)
    code = torch.nn.functional.normalize(
        torch.randn(512, 16, generator=torch.Generator().manual_seed(3)), dim=-1
    )
    x.k[0, 0] = code
    x.q[0, 0] = 40 * code.roll(160, 0)  # query i wants key i - 160, ten blocks back
    blocks = FlexPrefill(gamma=0.5, tau=0, min_budget=32, block_size=16).pattern(x).block_mask()[0, 0]
    assert blocks.diagonal(-10).all()
    assert not blocks.diagonal(-14).all()


@pytest.mark.parametrize("spike", [6.0, 8.0, 10.0])
def test_a_spike_that_pooling_hides_goes_to_vertical_slash(spike):
    x = one_head(512)
    x.q[..., 0] = spike
    x.k[..., 0] = 0
    x.k[:, :, 200, 0] = 1.0
    # The other keys of the block pull the other way: its mean is that of any block.
    x.k[:, :, 192:208, 0] -= 1 / 16
    method = FlexPrefill(gamma=0.3, min_budget=32, block_size=16)
    assert not literal(x, 0, method)[1]
    assert method.pattern(x).block_mask()[0, 0, 13:, 12].all()
    # Trusting the pooled scores would lose it, which is why the method tests them.
    trusting = FlexPrefill(gamma=0.3, min_budget=16, block_size=16, tau=1)
    assert not trusting.pattern(x).block_mask()[0, 0, 14:, 12].all()


def test_the_block_before_a_querys_own_is_missed_by_default_and_given_by_neighbours():
    """Queries that look eight tokens back: half of a block's find them in the block before."""
    x = one_head(512)
    code = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 4
    x.k[0, 0], x.q[0, 0] = code, code.roll(8, 0)
    x.q[0, 0, 500:] = code[500:]  # the probe's last queries look at themselves
    plain = FlexPrefill(gamma=0.2, tau=0, min_budget=16, block_size=16)
    assert not plain.pattern(x).block_mask()[0, 0].diagonal(-1)[5:].all()
    given = replace(plain, neighbours=1).pattern(x).block_mask()[0, 0]
    assert given.diagonal(-1).all()
    assert not given.diagonal(-2)[5:].all()


def test_flat_attention_is_query_aware():
    assert literal(one_head(512), 0, FlexPrefill(block_size=16))[1]


def test_a_needle_that_only_middle_queries_look_for_is_missed_by_vertical_slash():
    x = one_head(1024)
    x.q[..., 0] = 0
    x.k[..., 0] = 0
    x.k[:, :, 200, 0] = 20
    x.q[:, :, 600:616, 0] = 20
    x.q[..., 1] = 12  # the probe has a column of its own
    x.k[:, :, 300, 1] = 1
    missed = FlexPrefill(gamma=0.9, min_budget=16, block_size=16).pattern(x).mask()
    assert not missed[0, 0, 600:616, 200].any()
    x.q[:, :, 1008:, 0] = 20
    found = FlexPrefill(gamma=0.9, min_budget=32, block_size=16).pattern(x).mask()
    assert found[0, 0, 600:616, 200].all()


# ---------------------------------------------------------------------- faults


def outputs(method, x):
    """The method's attention and dense attention, by the op's definition."""
    dense = WindowPattern.dense(x.q.shape[2], x.k.shape[2])
    made = (method.pattern(x), dense)
    return [attend(x.q, x.k, x.v, pattern, scale=x.scale, backend="reference") for pattern in made]


@pytest.mark.parametrize(
    ("bad", "tau", "most"),
    [(math.nan, 0, None), (math.nan, 1, 64), (math.inf, 0.1, 64), (-math.inf, 1, None)],
)
def test_a_key_that_is_no_number_makes_its_heads_dense(inputs, bad, tau, most):
    x = inputs(256, sharpness=3.0)
    x.k[0, 1, 70, 3] = bad
    method = FlexPrefill(gamma=0.5, tau=tau, min_budget=16, max_budget=most, block_size=16)
    pattern = method.pattern(x)
    got, dense = outputs(method, x)
    assert torch.equal(got.isnan(), dense.isnan())
    assert (pattern.density()[0, 2:] == 1).all()  # the two query heads of the key head
    assert (pattern.density()[0, :2] < 1).all()
    clean = inputs(256, sharpness=3.0)
    assert torch.equal(pattern.block_mask()[0, :2], method.pattern(clean).block_mask()[0, :2])


@pytest.mark.parametrize("tau", [0, 1])
def test_a_query_that_is_no_number_spoils_its_own_row_only(inputs, tau):
    x = inputs(256, sharpness=3.0)
    x.q[0, 1, 100] = math.nan
    got, dense = outputs(FlexPrefill(gamma=0.5, tau=tau, min_budget=16, block_size=16), x)
    assert torch.equal(got.isnan(), dense.isnan())
    assert got.isnan().any(-1).sum() == 1


def test_half_precision_scores_do_not_overflow(inputs):
    x = inputs(256, heads=1, kv_heads=1)
    # Logits of 1e6 before scaling; fp16 ends at 65504.
    half = AttentionInputs(*((t.sign() * 2.0**9).half() for t in (x.q, x.k)), x.v.half(), 2.0**-18, 0)
    full = AttentionInputs(half.q.float(), half.k.float(), x.v, 2.0**-18, 0)
    for tau in (0, 1):
        method = FlexPrefill(gamma=0.5, tau=tau, min_budget=16, block_size=16)
        assert torch.equal(method.pattern(half).block_mask(), method.pattern(full).block_mask())
        assert method.pattern(half).density() < 1


def test_inputs_may_be_views(inputs):
    x = inputs(211, n_queries=77, sharpness=3.0)
    turned = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v))
    view = AttentionInputs(*turned, x.scale, 0)
    assert not view.q.is_contiguous()
    method = FlexPrefill(gamma=0.5, tau=0.2, min_budget=16, block_size=16)
    assert torch.equal(method.pattern(view).block_mask(), method.pattern(x).block_mask())


@pytest.mark.parametrize("tau", [0, 0.2, 1])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(251, 251), (77, 211)])
def test_lists_made_in_pieces_are_the_same(inputs, monkeypatch, n_queries, n_keys, tau):
    x = inputs(n_keys, n_queries=n_queries, batch=2, sharpness=3.0)
    method = FlexPrefill(gamma=0.6, tau=tau, min_budget=16, block_size=16)
    whole = method.pattern(x)
    monkeypatch.setattr(patterns.parts, "_LIST_BYTES", 3 * 4 * 14 * 8)
    monkeypatch.setattr(flexprefill, "_MAP_BYTES", 1)  # the map of one key head's queries at a time
    pieces = method.pattern(x)
    assert isinstance(pieces, PiecedPattern)
    assert torch.equal(pieces.mask(), whole.mask())
    assert torch.equal(pieces.pairs(), whole.pairs())


@pytest.mark.parametrize(("n_queries", "n_keys", "tau"), [(100, 100, 1), (45, 101, 0.2), (96, 96, 0)])
def test_kernels_select_the_same(inputs, monkeypatch, n_queries, n_keys, tau):
    x = inputs(n_keys, n_queries=n_queries, heads=2, kv_heads=1, batch=2, sharpness=3.0)
    method = FlexPrefill(gamma=0.6, tau=tau, min_budget=16, block_size=16)
    expected = method.pattern(x)
    monkeypatch.setenv("SPARSELAND_BACKEND", "triton")
    if torch.cuda.is_available():  # compiled there, interpreted elsewhere
        x = replace(x, q=x.q.cuda(), k=x.k.cuda(), v=x.v.cuda())
    got = method.pattern(x)
    assert got.indices.shape[-1] == -(-n_keys // 16)  # a length that needs no look at the data
    assert torch.equal(got.block_mask().cpu(), expected.block_mask())
    assert torch.equal(got.pairs().cpu(), expected.pairs())


# ------------------------------------------------------------------- distance


def test_distance_is_that_of_jensen_and_shannon():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    m = [0.375, 0.375, 0.25]
    js = 0.5 * sum(a * math.log(a / c) for a, c in zip(p.tolist(), m, strict=True) if a) + 0.5 * sum(
        a * math.log(a / c) for a, c in zip(q.tolist(), m, strict=True)
    )
    assert js_distance(p, q).item() == pytest.approx(math.sqrt(js), rel=1e-5)
    assert js_distance(q, p) == js_distance(p, q)


def test_distance_of_zeros_is_a_number():
    p, q = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    assert js_distance(p, q).item() == pytest.approx(math.sqrt(math.log(2)), rel=1e-6)
    assert js_distance(p, p) == 0


def test_underflowing_attention_is_still_a_decision(inputs):
    # Probabilities that are exactly zero must not make every head vertical-slash.
    x = inputs(256, heads=1, kv_heads=1)
    x.q[:] = 0
    x.k[:] = 0
    x.q[..., 0] = 400
    x.k[:, :, :16, 0] = 10
    method = FlexPrefill(gamma=0.5, min_budget=16, block_size=16)
    assert literal(x, 0, method)[1]
    assert torch.equal(method.pattern(x).block_mask()[0, 0], literal(x, 0, method)[0])


# ------------------------------------------------------------------ parameters


def test_card_spec_and_defaults():
    assert method_class("flexprefill") is FlexPrefill
    method = parse_spec("flexprefill:gamma=0.95,tau=0,max_budget=1024")
    assert method == FlexPrefill(gamma=0.95, tau=0, max_budget=1024)
    assert parse_spec(method.spec) == method
    default = FlexPrefill()
    assert (default.gamma, default.tau, default.min_budget, default.max_budget, default.block_size) == (
        0.9, 0.1, 512, None, 128,
    )  # fmt: skip
    for length in (2048, 8192, 131_072):
        settings = FlexPrefill.grid(length)
        assert [s.gamma for s in settings] == sorted(s.gamma for s in settings)
        assert all(parse_spec(s.spec) == s for s in settings)


def test_short_prompts_are_dense(inputs):
    assert isinstance(FlexPrefill().pattern(inputs(512)), WindowPattern)
    assert isinstance(FlexPrefill().pattern(inputs(513)), BlockPattern)
    assert isinstance(FlexPrefill(min_budget=1).pattern(inputs(256)), WindowPattern)
    assert isinstance(FlexPrefill(min_budget=1).pattern(inputs(257)), BlockPattern)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("flexprefill:gamma=0", "gamma=0 is not allowed; it must be a number > 0 and <= 1"),
        ("flexprefill:gamma=1.1", "gamma=1.1"),
        ("flexprefill:tau=-1", "tau=-1"),
        ("flexprefill:min_budget=0", "min_budget=0"),
        ("flexprefill:max_budget=100", "max_budget=100 is below min_budget=512"),
        ("flexprefill:block_size=96", "block_size=96 is not allowed"),
        ("flexprefill:beta=1", "no parameter 'beta'"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(spec, words):
    with pytest.raises(SparselandError, match=words):
        parse_spec(spec)
