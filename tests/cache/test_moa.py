"""MoA: influence by finite differences, the optimiser by brute force, rings by the masked full cache."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

import sparseland as sl
from sparseland.cache import _moa_profile
from sparseland.cache._moa_optimise import Problem, candidates, non_dominated, outside, pareto_plans, solve
from sparseland.cache._moa_plan import PLAN
from sparseland.cache._moa_profile import block_influence, effects, influence, loss_with, profile
from sparseland.cache._moa_store import SpanStore
from sparseland.cache.moa import MoA, Rule, load_plan, save_plan, span_pattern
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, method_class, parse_spec
from sparseland.models.tiny import tiny_model
from sparseland.patterns import BlockPattern, WindowPattern


def inputs(n, n_queries=None, batch=1, heads=4, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, h, m, dim, generator=g).to(dtype)
        for h, m in ((heads, n_queries or n), (kv_heads, n), (kv_heads, n))
    )
    return AttentionInputs(q, k, v, dim**-0.5, 0)


# ------------------------------------------------------------------ influence


def attention(x, drop=None, share=1.0):
    """Dense attention in x's type; ``drop = (head, i, j)`` takes a share of A_ij away and renormalises."""
    k, v = (t.repeat_interleave(x.group, 1) for t in (x.k, x.v))
    n = x.q.shape[2]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    a = (x.q @ k.mT * x.scale).masked_fill(~causal, -torch.inf).softmax(-1)
    if drop is not None:
        h, i, j = drop
        row = a[0, h, i].clone()
        row[j] *= 1 - share
        a = a.clone()
        a[0, h, i] = row / row.sum() * a[0, h, i].sum() if i else row
    return a @ v


@pytest.mark.parametrize("seed", range(3))
def test_the_effect_of_dropping_a_value_is_exact_for_a_linear_loss(seed):
    x = inputs(9, dtype=torch.float64, seed=seed)
    weight = torch.randn(1, 4, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    effect = effects(x, weight, 0, 9)
    before = (attention(x) * weight).sum()
    for h, i, j in itertools.product(range(4), range(9), range(9)):
        if j <= i:
            change = (attention(x, (h, i, j)) * weight).sum() - before
            torch.testing.assert_close(effect[0, h, i, j], change)
        else:
            assert effect[0, h, i, j] == 0


class Dropping(_moa_profile._Layer):
    """A layer whose first row of the batch loses a share of one attention value."""

    drop, share = None, 0.0

    def attention(self, q, k, v, mask, scale):
        return attention(AttentionInputs(q, k, v, scale, 0), self.drop, self.share)


def test_the_profile_of_a_model_is_the_slope_of_its_loss():
    from sparseland.models.attention import switched
    from sparseland.models.surgery import attention_layers

    model = tiny_model("llama", initializer_range=0.1).double()
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :8] = -100
    found = influence(model, ids, labels, 1)  # [3, 2, 12, 12]: one value per block
    modules = attention_layers(model)

    def run(layers):
        with torch.no_grad(), switched(modules, layers):
            logits = model(input_ids=ids, use_cache=False).logits[0, 7:-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 8:]).item()

    noted = {n: _moa_profile._Layer(n, _moa_profile._dense, note=True) for n in modules}
    run(noted)
    step = 0.02  # the norms compute in float32 whatever the model's type: smaller steps drown in it
    for layer, kv, i, j in [(0, 0, 9, 3), (1, 1, 11, 0), (2, 0, 8, 8), (2, 1, 10, 5)]:
        effects_of_heads = []
        for head in (2 * kv, 2 * kv + 1):
            losses = []
            for share in (-step, step):
                layers = {n: Dropping(n, _moa_profile._dense) for n in modules}
                layers[layer].drop, layers[layer].share = (head, i, j), share
                losses.append(run(layers))
            slope = abs(losses[1] - losses[0]) / (2 * step)
            # Taking the share s of A_ij away moves the row by s A_ij (A_i - e_j) / (1 - s A_ij): at first
            # order in s that is E times 1 - A_ij.
            x = noted[layer].inputs
            a = (x.q[0, head, i] @ x.k[0, kv, : i + 1].T * x.scale).softmax(-1)[j].item()
            effects_of_heads.append(slope / (1 - a))
        assert found[layer, kv, i, j].item() == pytest.approx(max(effects_of_heads), rel=3e-3)


def test_blocks_sum_magnitudes_and_pieces_do_not_matter(monkeypatch):
    x = inputs(50, dtype=torch.float64)
    grad = torch.randn(1, 4, 50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = effects(x, grad, 0, 50)
    expected = torch.zeros(2, 1, 4, 7, 7, dtype=torch.float64)
    for r, c in itertools.product(range(7), range(7)):
        block = whole[..., 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
        expected[0, ..., r, c] = block.sum((-2, -1)).abs()
        expected[1, ..., r, c] = block.abs().sum((-2, -1))
    for rows in (8, 16, 256):
        monkeypatch.setattr(_moa_profile, "_ROWS", rows)
        for effect, wanted in zip(("blocks", "elements"), expected, strict=True):
            torch.testing.assert_close(block_influence(x, grad, 8, effect), wanted)
    assert expected.triu(1).abs().max() == 0
    assert not torch.allclose(expected[0], expected[1])


def test_a_half_precision_model_is_profiled_in_float32_and_left_as_it_was():
    model = tiny_model("llama").to(torch.bfloat16)
    before = {name: (t.data_ptr(), t.dtype, t.clone()) for name, t in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    ids = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    got = profile(model, ids, 32, 8)
    exact = profile(tiny_model("llama").to(torch.bfloat16).float(), ids, 32, 8)
    torch.testing.assert_close(got, exact)
    for name, t in model.state_dict().items():
        pointer, dtype, value = before[name]
        assert (t.data_ptr(), t.dtype) == (pointer, dtype)
        assert torch.equal(t, value)
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())


def test_whose_answers_are_the_loss():
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    text, own = (profile(model, ids, 32, 8, s) for s in ("text", "model"))
    assert not torch.allclose(text, own)
    # Only the last quarter is in the loss: queries after the text's last label have no influence.
    assert text[..., -1, :].sum() > 0
    labels = torch.full((1, 32), -100)
    labels[:, 10] = ids[:, 10]
    only = influence(model, ids[:, :32], labels, 8)
    assert only[:, :, 2:].abs().max() == 0  # position 9 predicts it, in block 1


# ------------------------------------------------------------------ optimiser


def test_candidates_are_the_grid_within_its_bounds():
    rules = candidates((32, 64, 128), 256, 4)
    assert Rule(0, 1.0) in rules
    assert {r.beta for r in rules} <= {e / 8 for e in range(9)}
    assert {r.alpha % 16 for r in rules} == {0}
    seen = set()
    for rule in rules:
        assert rule.alpha + rule.beta * 32 > 0
        assert rule.alpha + rule.beta * 128 <= 128
        assert rule.alpha + rule.beta * 256 <= 256
        seen.add(tuple(rule.blocks(n, 4) for n in (32, 64, 128, 256)))
    assert len(seen) == len(rules)  # no two are the same masks
    assert any(r.alpha < 0 for r in rules)
    assert any(r.alpha > 0 for r in rules)


def test_what_a_span_leaves_out():
    importance = torch.rand(2, 3, 6, 6).tril()
    got = outside(importance, [2, 4, 6])
    for at, span in enumerate((2, 4, 6)):
        total = torch.zeros(2, 3)
        for r, c in itertools.product(range(6), range(6)):
            if c and r - c >= span - 1:
                total += importance[:, :, r, c]
        torch.testing.assert_close(got[..., at], total)
    assert got[..., 2].abs().max() == 0


def toy(seed, layers=(3,), lengths=2):
    rng = np.random.default_rng(seed)
    rules = [Rule(4, 0.0), Rule(0, 0.25), Rule(0, 0.5), Rule(0, 1.0)]
    heads = sum(layers)
    # More span, less loss; heads differ.
    loss = np.sort(rng.random((lengths, heads, 4)), axis=-1)[..., ::-1] * rng.random((1, heads, 1))
    cost = np.array([[0.2, 0.25, 0.5, 1.0], [0.1, 0.25, 0.5, 1.0], [0.05, 0.25, 0.5, 1.0]])[: lengths + 1]
    return Problem(rules, loss, cost, list(layers))


def brute(problem, density, primary, limits=None, used=0.9):
    best, least = None, np.inf
    heads = problem.loss.shape[1]
    for choice in itertools.product(range(4), repeat=heads):
        at = 0
        rows = []
        for n in problem.heads:
            rows.append(choice[at : at + n])
            at += n
        if any(len(set(row)) > 2 for row in rows):
            continue
        spent = problem.density(choice)
        if any(d > density + 1e-9 or d < used * density - 1e-9 for d in spent):
            continue
        losses = problem.losses(choice)
        if limits and any(x > limit for x, limit in zip(losses, limits, strict=True)):
            continue
        if losses[primary] < least:
            best, least = choice, losses[primary]
    return best, least


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layers", [(3,), (2, 2), (3, 3)])
@pytest.mark.parametrize("density", [0.5, 0.7])
def test_the_programme_equals_brute_force(seed, layers, density):
    problem = toy(seed, layers)
    for primary in (0, 1):
        expected, least = brute(problem, density, primary, used=0.8)
        got = solve(problem, density, primary, used=0.8, gap=0.0)
        assert (got is None) == (expected is None)
        if got is not None:
            assert problem.losses(got)[primary] == pytest.approx(least, rel=1e-9)
            assert all(0.8 * density - 1e-9 <= d <= density + 1e-9 for d in problem.density(got))


def test_two_rules_a_layer_bind():
    # Three heads that would each take another rule if they could.
    loss = np.array([[[0, 9, 9, 9], [9, 0, 9, 9], [9, 9, 0, 9]]], dtype=float)
    problem = Problem([Rule(4, 0), Rule(0, 0.25), Rule(0, 0.5), Rule(0, 1)], loss, np.full((2, 4), 0.5), [3])
    got = solve(problem, 0.5, 0, gap=0.0)
    assert got is not None
    assert len(set(got)) == 2
    assert problem.losses(got) == [9.0]


def test_limits_on_other_lengths_hold_and_plans_are_not_dominated():
    problem = toy(4, (3, 3))
    free = solve(problem, 0.6, 0, used=0.5, gap=0.0)
    other = solve(problem, 0.6, 1, used=0.5, gap=0.0)
    limit = sum(problem.losses(c)[1] for c in (free, other)) / 2
    bound = solve(problem, 0.6, 0, [np.inf, limit], used=0.5, gap=0.0)
    if bound is not None:
        assert problem.losses(bound)[1] <= limit + 1e-6
        assert problem.losses(bound)[0] == pytest.approx(
            brute(problem, 0.6, 0, [np.inf, limit], 0.5)[1], rel=1e-6
        )
    plans = pareto_plans(problem, 0.6)
    losses = [problem.losses(p) for p in plans]
    for a, b in itertools.permutations(losses, 2):
        assert not all(x <= y for x, y in zip(a, b, strict=True))
    assert min(x[0] for x in losses) <= problem.losses(free)[0] * 1.01
    assert non_dominated(problem, [*plans, *plans]) == plans


def test_an_impossible_density_says_what_is_possible():
    with pytest.raises(
        SparselandError, match=r"no plan has density 0\.01; at these lengths the least is 0\.2"
    ):
        pareto_plans(toy(0), 0.01)


# ------------------------------------------------------------------- patterns


def literal(rules, x, b, new):
    """Block mask of each query head, by loops over the definition."""
    n_queries, n_keys, offset = x.q.shape[2], x.k.shape[2], x.offset
    mask = torch.zeros(x.q.shape[1], -(-n_queries // b), -(-n_keys // b), dtype=torch.bool)
    for h in range(x.q.shape[1]):
        rule = rules[h // x.group]
        span = rule.alpha + rule.beta * (n_keys + new)
        span = min(-(-(n_keys + new) // b), max(2, int(np.ceil(span / b - 1e-9))))
        for r in range(mask.shape[1]):
            first, last = offset + r * b, min(offset + r * b + b, n_keys) - 1
            for c in range(last // b + 1):
                near = c > first // b - (span - 1)
                if rule.full or c == 0 or near:
                    mask[h, r, c] = True
    return mask


RULES = (Rule(0, 0.5), Rule(96, 0.0))


@pytest.mark.parametrize("n", [64, 200, 257])
@pytest.mark.parametrize("new", [0, 64])
@pytest.mark.parametrize("rules", [RULES, (Rule(0, 1.0), Rule(0, 0.125)), (Rule(-64, 1.0), Rule(16, 0.25))])
def test_pattern_is_the_literal_mask(n, new, rules):
    x = inputs(n)
    pattern = span_pattern(rules, x, 16, new)
    expected = literal(rules, x, 16, new)
    if isinstance(pattern, WindowPattern):
        assert pattern.density().min() == 1
        assert expected.tril().sum() == torch.ones_like(expected).tril().sum()
    else:
        assert torch.equal(pattern.block_mask()[0], expected)


def test_full_rules_are_dense_and_uniform_is_sinks_and_half_the_input():
    x = inputs(300)
    assert span_pattern((Rule(0, 1.0),) * 2, x, 16, 0).density().min() == 1
    mask = span_pattern((Rule(0, 0.5),) * 2, x, 16, 0).mask()[0, 0]
    streaming = WindowPattern(300, 300, 16, 160 - 16).mask()[0, 0]
    assert (mask & ~streaming).sum() == 0  # blocks are cut on the keys' grid: never more than the window
    assert (WindowPattern(300, 300, 16, 160 - 32).mask()[0, 0] & ~mask).sum() == 0


def test_rules_grow_with_the_input():
    wide, narrow = Rule(0, 0.5), Rule(64, 0.0)
    assert [wide.blocks(n, 16) for n in (64, 256, 1024)] == [2, 8, 32]
    assert [narrow.blocks(n, 16) for n in (64, 256, 1024)] == [4, 4, 4]
    assert Rule(0, 0.001).blocks(64, 16) == 2  # a block of sinks and the query's own
    assert Rule(0, 1.0).blocks(70, 16) == 5  # no more than there is


# ---------------------------------------------------------------------- cache


def masked(q, k, v, held, scale):
    """Attention of one query per row over the positions in ``held[kv head]``."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for h in range(q.shape[1]):
        at = torch.tensor(sorted(held[h // group]))
        keys, values = k[0, h // group, at], v[0, h // group, at]
        out[0, h, 0] = (q[0, h, 0] @ keys.T * scale).softmax(-1) @ values
    return out


def span(rule, prompt, new, b):
    return rule.blocks(prompt + new, b) * b


@pytest.mark.parametrize("prompt", [5, 16, 37, 64, 150])
@pytest.mark.parametrize("rules", [RULES, (Rule(0, 0.25), Rule(0, 1.0)), (Rule(0, 0.25), Rule(0, 0.25))])
def test_rings_equal_the_masked_full_cache_over_several_wrap_arounds(prompt, rules):
    x = inputs(prompt + 260, dtype=torch.float64)
    store = SpanStore(rules, 16, 16, 8)
    store.append(x.k[:, :, :prompt], x.v[:, :, :prompt])
    store.observe(AttentionInputs(x.q[:, :, :prompt], x.k[:, :, :prompt], x.v[:, :, :prompt], x.scale, 0))
    for n in range(prompt + 1, prompt + 261):
        k, v = x.k[:, :, n - 1 : n], x.v[:, :, n - 1 : n]
        store.append(k, v)
        held = []
        for rule in rules:
            ring = n if rule.full else span(rule, prompt, 8, 16) - 16
            held.append(set(range(min(16, n))) | set(range(max(0, n - ring), n)))
        if n % 7 == 0 or n < prompt + 5:
            expected = masked(x.q[:, :, n - 1 : n], x.k, x.v, held, x.scale)
            torch.testing.assert_close(store.attend(x.q[:, :, n - 1 : n], x.scale), expected)
            assert store.kept() == sum(map(len, held)) / 2
    assert len(store) == prompt + 260


def test_memory_is_that_of_the_spans():
    x = inputs(1000)
    store = SpanStore((Rule(0, 0.125), Rule(64, 0.0)), 16, 16, 24)
    store.append(x.k, x.v)
    dense = 2 * x.k.numel() * 4
    assert store.nbytes() == dense  # not yet observed
    store.observe(x)
    assert store.nbytes() == 2 * (128 + 64) * 16 * 4
    assert len(store._rings) == 2
    for _ in range(200):
        store.append(x.k[:, :, :1], x.v[:, :, :1])
    assert store.nbytes() == 2 * (128 + 64) * 16 * 4


def test_left_padded_rows_have_spans_of_their_own_length():
    x = inputs(200, batch=3)
    first = torch.tensor([0, 90, 170])
    store = SpanStore(RULES, 16, 16, 8)
    store.append(x.k[:, :, :190], x.v[:, :, :190])
    prompt = AttentionInputs(x.q[:, :, :190], x.k[:, :, :190], x.v[:, :, :190], x.scale, 0)
    store.observe(prompt, first)
    alone = []
    for row, start in enumerate(first.tolist()):
        single = SpanStore(RULES, 16, 16, 8)
        at = slice(row, row + 1)
        single.append(x.k[at, :, start:190], x.v[at, :, start:190])
        single.observe(AttentionInputs(x.q[at], x.k[at], x.v[at], x.scale, 0))
        alone.append(single)
    for n in range(190, 200):
        store.append(x.k[:, :, n : n + 1], x.v[:, :, n : n + 1])
        got = store.attend(x.q[:, :, n : n + 1], x.scale, first)
        for row, single in enumerate(alone):
            at = slice(row, row + 1)
            single.append(x.k[at, :, n : n + 1], x.v[at, :, n : n + 1])
            torch.testing.assert_close(got[at], single.attend(x.q[at, :, n : n + 1], x.scale))
    order = torch.tensor([2, 0, 0])
    store.reorder(order)
    got = store.attend(x.q[order][:, :, -1:], x.scale)
    for row, old in enumerate(order.tolist()):
        expected = alone[old].attend(x.q[[old], :, -1:], x.scale)
        torch.testing.assert_close(got[[row]], expected)


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("rules", [RULES, (Rule(-32, 1.0), Rule(0, 0.3)), (Rule(0, 1.0), Rule(8, 0.9))])
def test_a_later_prompt_reads_only_what_the_rings_still_hold(steps, rules):
    x = inputs(700)
    store = SpanStore(rules, 16, 16, 10)
    at = 0
    for turn, size in enumerate((70, steps, 131, steps, 189, 2, steps, 250)):
        end = at + size
        if size == steps:
            for i in range(at, end):
                store.append(x.k[:, :, i : i + 1], x.v[:, :, i : i + 1])
        else:
            past = store.dense() if turn else ()
            k, v = x.k[:, :, at:end], x.v[:, :, at:end]
            store.append(k, v)
            piece = AttentionInputs(x.q[:, :, at:end], x.k[:, :, :end], x.v[:, :, :end], x.scale, 0)
            mask = span_pattern(rules, piece, 16, 10).mask().expand(1, 4, -1, -1)
            assert mask.diagonal(at, -2, -1).all()
            read = mask.any(-2)[0, ::2]  # per key head: what some query of the piece reads
            assert read[:, :at].float().mean() > 0.2 or not turn
            for old, full in zip(past, (x.k, x.v), strict=False):
                assert torch.equal(old[0][read[:, :at]], full[0, :, :at][read[:, :at]])
            # What the store is shown is what the attention function had: zeros where tokens were dropped.
            if turn:
                k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True))
            store.observe(AttentionInputs(piece.q, k, v, x.scale, 0))
        at = end
    assert len(store) == at


def test_a_prompt_after_too_long_a_generation_is_refused():
    x = inputs(200)
    store = SpanStore(RULES, 16, 16, 10)
    store.append(x.k, x.v)
    store.observe(x)
    for _ in range(60):
        store.append(x.k[:, :, :1], x.v[:, :, :1])
    with pytest.raises(SparselandError, match="decoded into further than new_tokens=10"):
        store.append(x.k, x.v)


def test_cropping_goes_back_and_dropped_tokens_stay_dropped():
    x = inputs(120, dtype=torch.float64)
    store = SpanStore(RULES, 16, 16, 8)
    prompt = AttentionInputs(*(t[:, :, :100] for t in (x.q, x.k, x.v)), x.scale, 0)
    store.append(prompt.k, prompt.v)
    store.observe(prompt)
    for n in range(100, 110):
        store.append(x.k[:, :, n : n + 1], x.v[:, :, n : n + 1])
    store.crop(104)
    assert len(store) == 104
    store.append(x.k[:, :, 104:105], x.v[:, :, 104:105])
    held = [set(range(16)) | set(range(max(16, 110 - (span(r, 100, 8, 16) - 16)), 105)) for r in RULES]
    expected = masked(x.q[:, :, 104:105], x.k, x.v, held, x.scale)
    torch.testing.assert_close(store.attend(x.q[:, :, 104:105], x.scale), expected)
    store.crop(3)
    assert (len(store), store.kept()) == (3, 3)
    store.crop(0)
    assert len(store) == 0


def test_dense_gives_back_what_is_held_and_zeros():
    x = inputs(100, batch=2)
    store = SpanStore(RULES, 16, 16, 0)
    store.append(x.k, x.v)
    store.observe(x, torch.tensor([0, 30]))
    k, v = store.dense()
    for row, (start, length) in enumerate(((0, 100), (30, 70))):
        for head, rule in enumerate(RULES):
            ring = span(rule, length, 0, 16) - 16
            for p in range(length):
                there = p < 16 or p >= length - ring
                for got, full in ((k, x.k), (v, x.v)):
                    expected = full[row, head, start + p] if there else torch.zeros(16)
                    assert torch.equal(got[row, head, start + p], expected)


def test_selecting_from_a_cache_with_holes_is_refused():
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 400), generator=torch.Generator().manual_seed(0))
    methods = [MoA(plan="uniform", density=0.25, new_tokens=0, block_size=32), "double-sparsity:min_length=8"]
    words = "can't be combined with a method that selects"
    with sl.apply(model, methods, calibration_ids=ids), pytest.raises(SparselandError, match=words):
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)


def test_padding_that_is_not_on_the_left_is_refused():
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (2, 400), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 300:] = 0
    with sl.apply(model, MoA(plan="uniform", density=0.25, new_tokens=0, block_size=32)), torch.no_grad():
        past = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        with pytest.raises(
            SparselandError, match="moa drops tokens and needs every row's padding on its left"
        ):
            model(
                input_ids=ids[:, :1],
                attention_mask=torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1),
                past_key_values=past,
            )


# ------------------------------------------------------------- on a model


def test_calibrated_rules_fit_the_model_and_the_cache_shrinks():
    from sparseland.models.caches import cache_nbytes

    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 512), generator=torch.Generator().manual_seed(0))
    method = MoA(density=0.5, new_tokens=16, block_size=16)
    with torch.no_grad(), sl.apply(model, method, calibration_ids=ids[:, :256]) as handle:
        meta = handle.calibrations["moa"].meta
        rules = PLAN.table(meta["rules"], "here")
        assert [len(row) for row in rules] == [2, 2, 2]
        assert all(len(set(row)) <= 2 for row in rules)
        assert (meta["lengths"], meta["unseen"], meta["extension"]) == ([32, 64, 128], 192, 256)
        assert max(meta["density"]) <= 0.5 + 1e-9
        assert json.loads(json.dumps(meta)) == meta
        past = model(input_ids=ids, use_cache=True).past_key_values
        sparse = cache_nbytes(past)
        for token in ids[:, :4].split(1, 1):
            model(input_ids=token, past_key_values=past)
        stats = handle.stats()
        assert 0.3 < stats.decode_density < 0.62
        assert stats.density < 1
    dense = cache_nbytes(model(input_ids=ids, use_cache=True).past_key_values)
    assert sparse < 0.65 * dense
    assert min(meta["validation"]) == pytest.approx(loss_with(model, ids[:, 64:256], rules, meta["block"]))


def test_decoding_past_the_windows_equals_a_masked_model():
    # The whole path: every step's logits against dense attention under each head's explicit mask.
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 180), generator=torch.Generator().manual_seed(2))
    method = MoA(plan="uniform", density=0.25, new_tokens=0, block_size=16)
    rule, prompt = Rule(0, 0.25), 120

    class Masked:
        active = False

        def attention(self, q, k, v, mask, scale):
            x = AttentionInputs(q, k, v, scale, 0)
            whole = span_pattern(
                (rule,) * 2, AttentionInputs(*(t[:, :, :prompt] for t in (q, k, v)), scale, 0), 16, 0
            )
            allowed = torch.zeros(1, 1, 180, 180, dtype=torch.bool)
            allowed[..., :prompt, :prompt] = whole.mask()[:, :1]
            allowed[..., prompt:, :] = WindowPattern(180, 180, 16, span(rule, prompt, 0, 16) - 16).mask()[
                ..., prompt:, :
            ]
            keys, values = (t.repeat_interleave(x.group, 1) for t in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, keys, values, allowed, scale=scale)

    from sparseland.models.attention import switched
    from sparseland.models.surgery import attention_layers

    layers = attention_layers(model)
    with torch.no_grad():
        with switched(layers, {i: Masked() for i in layers}):
            expected = model(input_ids=ids, use_cache=False).logits[0, prompt:]
        with sl.apply(model, method):
            past = model(input_ids=ids[:, :prompt], use_cache=True).past_key_values
            got = [
                model(input_ids=t, past_key_values=past).logits[0, -1] for t in ids[:, prompt:].split(1, 1)
            ]
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-3, atol=1e-3)


def test_settings_share_a_profile_until_something_changes(monkeypatch):
    calls = []
    original = _moa_profile.profile
    monkeypatch.setattr("sparseland.cache._moa_search.profile", lambda *a: calls.append(a) or original(*a))
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 128), generator=torch.Generator().manual_seed(0))
    first = MoA(density=0.5, block_size=16).calibrate(model, ids)
    assert len(calls) == 3
    MoA(density=0.75, block_size=16).calibrate(model, ids)
    assert MoA(density=0.5, block_size=16).calibrate(model, ids).meta == first.meta
    assert len(calls) == 3
    MoA(density=0.5, block_size=16, effect="elements").calibrate(model, ids)
    assert len(calls) == 6
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    MoA(density=0.5, block_size=16).calibrate(model, ids)
    assert len(calls) == 9


def test_calibration_needs_some_text():
    with pytest.raises(SparselandError, match=r"token ids \[B, N\] with N >= 64, got \[1, 20\]"):
        MoA().calibrate(tiny_model("llama"), torch.zeros(1, 20, dtype=torch.long))


# ------------------------------------------------------------------ parameters


def test_card_spec_and_defaults():
    assert method_class("moa") is MoA
    method = parse_spec("moa:density=1/4,new_tokens=128,plan=uniform")
    assert method == MoA(density=0.25, new_tokens=128, plan="uniform")
    assert parse_spec(method.spec) == method
    default = MoA()
    assert (default.density, default.new_tokens, default.block_size) == (0.5, 1024, 64)
    assert default.roles == {"prefill", "store"}
    assert MoA(new_tokens=5).calibration_key == MoA(new_tokens=9).calibration_key
    assert MoA(density=0.25).calibration_key != MoA().calibration_key
    assert not MoA(plan="uniform").learns_from_text
    assert MoA(density=1).new_store(0) is None
    assert isinstance(MoA(plan="uniform", new_tokens=0).pattern(inputs(512)), BlockPattern)


def test_plan_files_round_trip_and_are_checked(tmp_path):
    rules = [[Rule(0, 0.5), Rule(-32, 1.0)], [Rule(64, 0.0), Rule(64, 0.0)]]
    path = save_plan(tmp_path / "plan.json", rules)
    assert load_plan(path) == tuple(map(tuple, rules))
    method = MoA(plan=str(path), new_tokens=0, block_size=16)
    assert parse_spec(method.spec) == method
    x = inputs(200)
    assert torch.equal(method.pattern(x).block_mask()[0], literal(rules[0], x, 16, 0))
    with pytest.raises(SparselandError, match="has no layer 5"):
        method.pattern(AttentionInputs(x.q, x.k, x.v, x.scale, 5))
    with pytest.raises(SparselandError, match="the plan has 2 key heads and the model has 4"):
        method.pattern(inputs(200, kv_heads=4))
    store, y = method.new_store(0), inputs(200, kv_heads=4)
    store.append(y.k, y.v)
    with pytest.raises(SparselandError, match="the plan has 2 key heads and the model has 4"):
        store.observe(y)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not a plan"),
        ('{"format": "x"}', 'does not say "format": "moa-plan"'),
        ('{"format": "moa-plan", "version": 2}', "has version 2; this sparseland reads 1"),
        ('{"format": "moa-plan", "version": 1}', "must be a non-empty list"),
        ('{"format": "moa-plan", "version": 1, "rules": [[{"alpha": 0}]]}', "a rule is an alpha and a beta"),
        ('{"format": "moa-plan", "version": 1, "rules": [[{"alpha": 0.5, "beta": 1}]]}', "alpha=0.5"),
        ('{"format": "moa-plan", "version": 1, "rules": [[{"alpha": 0, "beta": 2}]]}', "beta=2 is not"),
        ('{"format": "moa-plan", "version": 1, "rules": [[{"alpha": 0, "beta": NaN}]]}', "beta=nan"),
        ("[" * 100_000, "is not a plan"),
    ],
)
def test_bad_plan_files_are_one_clear_line(tmp_path, content, words):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(SparselandError, match=words) as caught:
        MoA(plan=str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("moa:density=0", "density=0 is not allowed; it must be a number > 0 and <= 1"),
        ("moa:block_size=48", "block_size=48 is not allowed; it must be 16, 32, 64 or 128"),
        ("moa:new_tokens=-1", "new_tokens=-1"),
        ("moa:supervision=me", "supervision=me is not allowed; it must be one of text, model"),
        ("moa:plan=/nowhere/p.json", "can't read the plan"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(spec, words):
    with pytest.raises(SparselandError, match=words):
        parse_spec(spec)


def test_a_calibration_of_another_model_is_refused():
    x = inputs(200)
    for rules, words in (
        ([], "has no layer 0"),
        ("x", "has no layer 0"),
        ([[{"alpha": 0}]], "a rule is an alpha"),
    ):
        with pytest.raises(SparselandError, match=words):
            MoA().pattern(x, Calibration({"rules": rules}))
