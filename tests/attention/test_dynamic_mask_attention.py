"""DMA: intervals against per-row top-w, scores and gradients against a transcription, the exact cache."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import sparseland as sl
from sparseland.attention._dma_selection import eviction_times, ranking
from sparseland.attention._dma_store import TopStore
from sparseland.attention.dynamic_mask_attention import DynamicMaskAttention, ScoreHead
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, LayerShape
from sparseland.models.caches import cache_nbytes
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.patterns import WindowPattern


def top_per_row(scores: list[float], width: int) -> list[set[int]]:
    """The definition: for every query the ``width`` best keys before it, the later of equals."""
    rows = []
    for i in range(len(scores)):
        best = sorted(range(i + 1), key=lambda j: (-scores[j], -j))
        rows.append(set(best[:width]))
    return rows


def trained(x: AttentionInputs, method: DynamicMaskAttention, strength=1.0, seed=1) -> AttentionInputs:
    """Inputs with a score head that has learnt something."""
    head = method.new_learner(LayerShape(0, 1, x.q.shape[1], x.k.shape[1], x.q.shape[3]))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.A.copy_(torch.randn(head.A.shape, generator=g) * strength)
        head.dt_proj.weight.mul_(4)
    return AttentionInputs(x.q, x.k, x.v, x.scale, x.layer, learner=head)


def qkv(n=96, heads=(4, 2), dim=16, batch=1, seed=0, n_queries=None) -> AttentionInputs:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], n_queries or n, dim, generator=g)
    k, v = (torch.randn(batch, heads[1], n, dim, generator=g) for _ in range(2))
    return AttentionInputs(q, k, v, dim**-0.5, 0)


def literal(x: AttentionInputs, method: DynamicMaskAttention) -> torch.Tensor:
    """Equations of the paper with an N x N mask, top-w query by query; differentiable."""
    head = x.learner
    b, h, n, _ = x.k.shape
    z = head.dt_proj(x.v.transpose(1, 2).reshape(b, n, -1)).transpose(1, 2)
    delta = head.A[:, None] * F.softplus(z)
    compared = ranking(delta)
    if method.score == "exp":
        delta = delta.exp()
    mask = torch.zeros(b, h, n, n, dtype=torch.bool)
    for row, head_ in itertools.product(range(b), range(h)):
        for i, kept in enumerate(top_per_row(compared[row, head_].tolist(), method.keep)):
            mask[row, head_, i, sorted(kept)] = True
    k, v, delta, mask = (t.repeat_interleave(x.group, 1) for t in (x.k, x.v, delta, mask))
    s = x.q @ k.mT * x.scale + delta[:, :, None]
    return s.masked_fill(~mask[:, :, x.offset :], -torch.inf).softmax(-1) @ v


def run(x: AttentionInputs, method: DynamicMaskAttention, **options) -> torch.Tensor:
    return attend(x.q, x.k, x.v, method.pattern(x), scale=x.scale, **options)


# ------------------------------------------------------------------ selection


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (2, 1), (17, 4), (64, 64), (65, 1), (100, 7), (100, 99)])
def test_lifetimes_are_the_per_row_top_w(n, width, ties):
    g = torch.Generator().manual_seed(n + width)
    for _ in range(6):
        scores = torch.randn(2, 3, n, generator=g)
        if ties:
            scores = (scores * 2).round()
        ends = eviction_times(ranking(scores), width)
        for row, head in itertools.product(range(2), range(3)):
            want = top_per_row(scores[row, head].tolist(), width)
            got = [{j for j in range(i + 1) if i < ends[row, head, j]} for i in range(n)]
            assert got == want


def test_rounding_noise_does_not_choose():
    """Equal scores up to their last bits: the later stays, as if they were equal."""
    scores = torch.full((1, 1, 40), 0.7)
    noisy = scores * (1 + 1e-6 * torch.randn(40, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(eviction_times(ranking(noisy), 6), eviction_times(scores, 6))
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38, 1.0, 1.01])
    order = ranking(special)
    assert order[2] == -torch.inf
    assert order.isfinite().sum() == 8
    assert order[0] < order[6] < order[3] == order[4] < order[7] < order[8] < order[5] <= order[1]


def test_a_key_that_left_never_returns():
    """The property that the intervals stand on, from the definition alone."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = top_per_row(torch.rand(40, generator=g).tolist(), 5)
        for j in range(40):
            seen = [j in rows[i] for i in range(j, 40)]
            assert seen == sorted(seen, reverse=True)


def test_untrained_is_a_sliding_window():
    x = qkv()
    method = DynamicMaskAttention(keep=10)
    head = method.new_learner(LayerShape(0, 1, 4, 2, 16))
    for learner in (None, head):
        pattern = method.pattern(AttentionInputs(x.q, x.k, x.v, x.scale, 0, learner=learner))
        assert torch.equal(pattern.mask(), WindowPattern(96, 96, 0, 10).mask().expand(1, 4, -1, -1))
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with sl.apply(model, "streaming:sinks=0,window=10"):
            want = model(ids).logits
        with sl.apply(model, method) as handle:
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
            assert len(list(handle.parameters())) == 2 * 3


@pytest.mark.parametrize("score", ["exp", "linear"])
@pytest.mark.parametrize(("n", "n_queries", "keep"), [(96, 96, 12), (77, 30, 20), (40, 40, 100)])
def test_output_is_the_literal_equations(score, n, n_queries, keep):
    method = DynamicMaskAttention(keep=keep, score=score)
    x = trained(qkv(n, batch=2, n_queries=n_queries), method, strength=0.5)
    torch.testing.assert_close(run(x, method), literal(x, method), rtol=1e-4, atol=1e-5)
    if keep < n:
        assert method.pattern(x).density().max() < 1
        assert method.pattern(x).mask().sum(-1).max() == keep


@pytest.mark.parametrize("score", ["exp", "linear"])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_gradients_go_through_the_bias_only(score, strength):
    """q, k, v, A and dt_proj as in the dense transcription; A = 0 learns from the first step."""
    method = DynamicMaskAttention(keep=9, score=score)
    grads = []
    for function in (literal, run):
        x = trained(qkv(50), method, strength)
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        y = AttentionInputs(*leaves, x.scale, 0, learner=x.learner)
        weight = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(3))
        (function(y, method) * weight).sum().backward()
        grads.append([t.grad for t in (*leaves, x.learner.A, x.learner.dt_proj.weight)])
    for name, want, got in zip(("q", "k", "v", "A", "dt_proj"), *grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=name)
    assert grads[1][3].abs().min() > 1e-4
    assert (grads[1][4].abs().max() > 0) == (strength > 0)  # dz is A times something


def test_a_key_is_trained_by_the_queries_that_see_it():
    method = DynamicMaskAttention(keep=4, score="linear")
    x = trained(qkv(30), method, 1.0)
    ends = method.pattern(x).ends[0, 0]
    never, left = (
        (ends <= torch.arange(30)).nonzero()[0],
        ((ends > torch.arange(30)) & (ends < 29)).nonzero()[0],
    )
    bias = method.pattern(x).bias.detach().requires_grad_()
    pattern = method.pattern(x)
    out = attend(x.q, x.k, x.v, type(pattern)(30, 30, pattern.ends, bias, 2, 4), scale=x.scale)
    (late,) = torch.autograd.grad(out[:, :2, int(ends[left]) :].square().sum(), bias, retain_graph=True)
    (whole,) = torch.autograd.grad(out[:, :2].square().sum(), bias)
    assert late[0, 0, left] == 0
    assert whole[0, 0, left] != 0
    assert whole[0, 0, never] == 0


def test_full_width_is_dense_with_a_bias():
    x = qkv()
    method = DynamicMaskAttention.full_budget(96)
    plain = attend(x.q, x.k, x.v, WindowPattern.dense(96, 96), scale=x.scale)
    torch.testing.assert_close(run(trained(x, method, 0.0), method), plain, rtol=1e-4, atol=1e-5)
    y = trained(x, method, 1.0)
    bias = y.learner.bias(y.learner(x.v)).repeat_interleave(2, 1)[:, :, None]
    s = (x.q @ x.k.repeat_interleave(2, 1).mT) * x.scale + bias
    want = s.masked_fill(torch.ones(96, 96).triu(1).bool(), -torch.inf).softmax(-1) @ x.v.repeat_interleave(
        2, 1
    )
    torch.testing.assert_close(run(y, method), want, rtol=1e-4, atol=1e-5)
    assert (want - plain).abs().max() > 1e-2


def test_later_tokens_decide_nothing_unless_chosen_over_the_whole_row():
    """Definition (a) is causal; choosing once over all keys, as the authors' current code does, is not."""
    method = DynamicMaskAttention(keep=8)
    x = trained(qkv(), method)
    v = x.v.clone()
    v[:, :, 60:] *= 5
    y = AttentionInputs(x.q, x.k, v, x.scale, 0, learner=x.learner)
    assert torch.equal(run(y, method)[:, :, :60], run(x, method)[:, :, :60])
    assert not torch.equal(run(y, method)[:, :, 60:], run(x, method)[:, :, 60:])

    def once(x):
        chosen = x.learner(x.v).topk(8, -1).indices
        return torch.zeros(x.v.shape[:3], dtype=torch.bool).scatter_(-1, chosen, True)[..., :60]

    assert not torch.equal(once(x), once(y))
    assert (once(y).sum(-1) < 8).any()  # and early queries see fewer than w keys, or none


def test_a_remembered_needle_outlives_a_window():
    """A key whose score is high is seen to the end, where a window of the same width has lost it."""
    x = qkv(200, seed=4)
    method = DynamicMaskAttention(keep=16, score="linear")
    head = method.new_learner(LayerShape(0, 1, 4, 2, 16))
    with torch.no_grad():
        head.A.fill_(1.0)
        head.dt_proj.weight.zero_()
        head.dt_proj.weight[:, 0] = 1  # z is the first channel of the first key head
        x.v[..., 0] = 0
        x.v[:, 0, 20, 0] = 10
    pattern = method.pattern(AttentionInputs(x.q, x.k, x.v, x.scale, 0, learner=head))
    assert pattern.mask()[0, :, -1, 20].all()
    assert not WindowPattern(200, 200, 0, 16).mask()[0, 0, -1, 20]
    with torch.no_grad():
        head.A.fill_(-1.0)  # without the exp, a negative A forgets what scores high
    pattern = method.pattern(AttentionInputs(x.q, x.k, x.v, x.scale, 0, learner=head))
    assert (pattern.ends[:, :, 20] == 20 + 0).all() or (pattern.ends[:, :, 20] < 40).all()


def test_the_own_key_is_an_option():
    x = qkv(60)
    plain, own = DynamicMaskAttention(keep=5), DynamicMaskAttention(keep=5, own=True)
    diagonals = [m.pattern(trained(x, m)).mask().diagonal(dim1=-2, dim2=-1) for m in (plain, own)]
    assert not diagonals[0].all()
    assert diagonals[1].all()
    assert own.pattern(trained(x, own)).mask().sum(-1).max() == 6


def test_an_overflowing_score_stays_finite():
    head = ScoreHead(2, 16, exp=True)
    with torch.no_grad():
        head.A.fill_(500.0)
    score = head.bias(head(qkv().v))
    assert score.isfinite().all()
    method = DynamicMaskAttention(keep=9)
    x = qkv()
    assert run(AttentionInputs(x.q, x.k, x.v, x.scale, 0, learner=head), method).isfinite().all()


@pytest.mark.parametrize("what", ["k", "q"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_keys_and_queries_stay_where_they_are_seen(what, value):
    """Scores come from the values alone: what is chosen stays, and so do the rows that do not see it."""
    method = DynamicMaskAttention(keep=8)
    x = trained(qkv(80), method)
    clean, mask = run(x, method), method.pattern(x).mask()
    parts = {name: getattr(x, name).clone() for name in "qkv"}
    counts = mask[0, 0].sum(0)
    at = int(torch.where(counts < 80 - torch.arange(80), counts, 0).argmax())  # seen, and later left
    parts[what][0, :, at, 3] = value
    y = AttentionInputs(**parts, scale=x.scale, layer=0, learner=x.learner)
    assert torch.equal(method.pattern(y).mask(), mask)
    out = run(y, method)
    sees = mask[0, :, :, at] if what == "k" else (torch.arange(80) == at).expand(4, -1)
    assert (out - clean)[0][~sees].abs().max() < 1e-5
    assert 0 < sees.sum() < sees.numel()


def test_a_value_that_is_no_number_is_the_first_to_go():
    method = DynamicMaskAttention(keep=8)
    x = trained(qkv(80), method)
    v = x.v.clone()
    v[0, 1, 20] = torch.nan  # both heads' scores read it
    ends = method.pattern(AttentionInputs(x.q, x.k, v, x.scale, 0, learner=x.learner)).ends
    assert (ends[0, :, 20] <= 20).all()
    clean = method.pattern(x)
    expected = [
        top_per_row([-9e9 if j == 20 else s for j, s in enumerate(row)], 8)
        for row in ranking(x.learner(x.v))[0].tolist()
    ]
    for head in range(2):
        got = [{j for j in range(i + 1) if i < ends[0, head, j]} for i in range(80)]
        assert got == expected[head]
    assert clean.ends.shape == ends.shape


# ------------------------------------------------------------------ the cache


def full_logits(model, ids, method, calibrations):
    with torch.no_grad(), sl.apply(model, method, calibrations=calibrations):
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def learnt(model):
    """Calibrations of a model whose score heads have moved away from their start."""
    with sl.apply(model, "dynamic-mask-attention:keep=20") as handle:
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in handle.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.5)
        return handle.recipe().calibrations


IDS = torch.randint(3, 128, (2, 56), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", ["keep=20", "keep=20,own=true", "keep=9,score=linear", "keep=50"])
@pytest.mark.parametrize("pieces", [[48], [5, 2, 31]])
def test_decoding_from_w_tokens_equals_recomputing(model, learnt, spec, pieces):
    """A prompt in one or several pieces, then token by token, from a cache of w tokens per head."""
    method = sl.method.parse_spec(f"dynamic-mask-attention:{spec}")
    want = full_logits(model, IDS, method, learnt)
    got, at = [], 0
    with torch.no_grad(), sl.apply(model, method, calibrations=learnt) as handle:
        past = None
        for size in (*pieces, *[1] * (56 - sum(pieces))):
            step = model(input_ids=IDS[:, at : at + size], past_key_values=past, use_cache=True)
            past, at = step.past_key_values, at + size
            got.append(step.logits)
        store = past.layers[0].store
        assert len(store) == 56
        assert store.kept() == min(56, method.keep)
        if method.keep < 40:
            assert handle.stats().decode_density < 1
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-3, atol=1e-3)
    if method.keep < 40:
        # Keys and values of w tokens, one score and one position each, and a little per head.
        per_token = 2 * 16 * 4 + 4 + 8
        assert cache_nbytes(past) < 3 * 2 * 2 * (method.keep + 4) * per_token


def test_padding_is_never_kept(model, learnt):
    """Rows of a left-padded batch decode as they would alone, with more padding than the cache is wide."""
    method = DynamicMaskAttention(keep=12)
    short = IDS[1:, 34:]
    padded = IDS.clone()
    padded[1, :34] = 5
    mask = torch.ones_like(IDS)
    mask[1, :34] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with sl.apply(model, method, calibrations=learnt):
        together = model.generate(input_ids=padded, attention_mask=mask, **options)
        alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **options)
        first = model.generate(input_ids=IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options)
    assert torch.equal(together[1, -6:], alone[0, -6:])
    assert torch.equal(together[0, -6:], first[0, -6:])


def test_beams_reorder_the_slots(model, learnt):
    """A beam search over the cache of w tokens gives what one without any cache gives."""
    options = {
        "max_new_tokens": 8,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with sl.apply(model, DynamicMaskAttention(keep=12), calibrations=learnt):
        ids = IDS[:, :40]
        mask = torch.ones_like(ids)
        with_cache = model.generate(input_ids=ids, attention_mask=mask, **options)
        without = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(with_cache, without)


def fill(store: TopStore, *sizes: int, seed=0) -> None:
    g = torch.Generator().manual_seed(seed)
    for n in sizes:
        store.append(torch.randn(1, 2, n, 8, generator=g), torch.randn(1, 2, n, 8, generator=g))


def test_cropping_goes_back_until_something_was_displaced():
    for head in (None, ScoreHead(2, 8, exp=False)):
        store, kept = TopStore(10, False, head), TopStore(10, False, head)
        fill(store, 6, 1, 1)
        fill(kept, 6)
        store.crop(6)
        assert len(store) == 6
        for a, b in zip(store.dense(), kept.dense(), strict=True):
            torch.testing.assert_close(a, b)
        fill(store, 1, 5, 1, 1, 1)
        with pytest.raises(SparselandError, match="a cache of 15 can't go back to 9"):
            store.crop(9)
        assert len(store) == 15
        store.crop(40)
        assert len(store) == 15
    with pytest.raises(SparselandError, match="can't be combined"):
        store.gather(torch.zeros(1, 2, 1, dtype=torch.long))


def test_tokens_that_were_never_kept_can_be_cropped():
    """Scores that fall all the time: nothing is ever displaced, so any crop is exact."""

    class Falling(torch.nn.Module):
        at = 0

        def forward(self, v):
            self.at += v.shape[2]
            return -torch.arange(self.at - v.shape[2], self.at).float().expand(v.shape[:3])

        def bias(self, scores):
            return scores

    store = TopStore(4, False, Falling())
    fill(store, 7, 1, 1)
    store.crop(5)
    assert len(store) == 5
    assert store.dense()[0].abs().sum(-1).ne(0)[0, 0].tolist() == [True] * 4 + [False]


def test_the_learner_is_saved_with_the_recipe(model, learnt, tmp_path):
    method = DynamicMaskAttention(keep=20)
    with sl.apply(model, method, calibrations=learnt) as handle:
        handle.recipe().save(tmp_path / "r.json")
    recipe = sl.Recipe.load(tmp_path / "r.json")
    with recipe.apply(model) as handle:
        for i, learner in handle.learners["dynamic-mask-attention"].items():
            assert torch.equal(learner.A, learnt["dynamic-mask-attention"].tensors[f"{i}.A"])
            assert learner.A.abs().min() > 0


def test_parameters_are_checked():
    for spec in ("keep=0", "score=relu", "keep=1.5"):
        with pytest.raises(SparselandError, match="not allowed"):
            sl.method.parse_spec(f"dynamic-mask-attention:{spec}")
