"""What every method must pass. Written once, run over the registry: a new method enters by its file."""

from dataclasses import replace

import pytest
import torch

import sparseland as sl
from sparseland.method import (
    AttentionInputs,
    LayerShape,
    PrefillMethod,
    SelectMethod,
    StoreMethod,
    method_class,
    method_slugs,
)
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.patterns import WindowPattern

LENGTH = 640
CUDA = torch.cuda.is_available()


def with_role(role):
    return [s for s in method_slugs() if role in method_class(s).full_budget(LENGTH).roles]


PREFILL, SELECT, STORE, LINEAR = (with_role(r) for r in ("prefill", "select", "store", "linear"))


def sparse_setting(slug):
    """A setting that leaves pairs out at the length used here."""
    cls = method_class(slug)
    return cls.at_density(0.3, LENGTH) if cls.card.control and slug != "dense" else cls.grid(LENGTH)[0]


def inputs(n_queries=LENGTH, n_keys=LENGTH, batch=1, heads=(6, 2), dim=32, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    # Keys that differ in strength, and queries that look back: flat noise would tell methods nothing.
    q = torch.randn(batch, heads[0], n_queries, dim, generator=g) * 2
    k = torch.randn(batch, heads[1], n_keys, dim, generator=g) * torch.rand(1, 1, n_keys, 1, generator=g) * 2
    v = torch.randn(batch, heads[1], n_keys, dim, generator=g)
    return AttentionInputs(q.to(dtype), k.to(dtype), v.to(dtype), dim**-0.5, layer=3)


def dense(x):
    return attend(x.q, x.k, x.v, WindowPattern.dense(x.q.shape[2], x.k.shape[2]), scale=x.scale)


def pattern_of(method, x):
    """The method's pattern, with random parameters of its own where it has any."""
    shape = LayerShape(x.layer, 6, x.q.shape[1], x.k.shape[1], x.q.shape[3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learner = method.new_learner(shape)
    learner = None if learner is None else learner.to(x.q.device)
    return method.pattern(replace(x, n_layers=6, learner=learner))


def run(method, x):
    return attend(x.q, x.k, x.v, pattern_of(method, x), scale=x.scale)


@pytest.mark.parametrize("slug", PREFILL)
class TestPrefill:
    def test_full_budget_equals_dense(self, slug):
        x = inputs()
        method = method_class(slug).full_budget(LENGTH)
        assert pattern_of(method, x).density().min() == 1.0
        torch.testing.assert_close(run(method, x), dense(x), rtol=1e-4, atol=1e-5)

    def test_a_small_budget_leaves_pairs_out(self, slug):
        if slug == "dense":
            assert pattern_of(method_class(slug)(), inputs()).density().min() == 1.0
            return
        x = inputs()
        method = sparse_setting(slug)
        assert pattern_of(method, x).density().mean() < 0.95
        assert (run(method, x) - dense(x)).abs().max() > 1e-3

    def test_the_computed_pairs_are_the_pattern(self, slug):
        x = inputs()
        pattern = pattern_of(sparse_setting(slug), x)
        mask = pattern.mask()
        assert torch.equal(pattern.pairs().expand(1, 6), mask.sum((-1, -2)).expand(1, 6))
        scores = (x.q @ x.k.repeat_interleave(x.group, 1).mT) * x.scale
        expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ x.v.repeat_interleave(x.group, 1)
        torch.testing.assert_close(
            attend(x.q, x.k, x.v, pattern, scale=x.scale), expected, rtol=1e-4, atol=1e-5
        )
        assert not mask.triu(1).any()

    def test_no_future_token_changes_a_past_output(self, slug):
        x = inputs()
        method = sparse_setting(slug)
        cut = 384
        v = x.v.clone()
        v[:, :, cut:] += 10
        changed = AttentionInputs(x.q, x.k, v, x.scale, x.layer)
        assert torch.equal(run(method, changed)[:, :, :cut], run(method, x)[:, :, :cut])
        if not method.looks_ahead:
            k, q = x.k.clone(), x.q.clone()
            k[:, :, cut:] += 3
            q[:, :, cut:] *= -1
            changed = AttentionInputs(q, k, v, x.scale, x.layer)
            torch.testing.assert_close(run(method, changed)[:, :, :cut], run(method, x)[:, :, :cut])

    def test_grouped_queries_equal_repeated_keys(self, slug):
        x = inputs()
        method = sparse_setting(slug)
        if method.shares_group:
            mask = pattern_of(method, x).mask().expand(1, 6, -1, -1).unflatten(1, (2, 3))
            assert torch.equal(mask, mask[:, :, :1].expand_as(mask))
            return
        repeated = AttentionInputs(
            x.q, x.k.repeat_interleave(3, 1), x.v.repeat_interleave(3, 1), x.scale, x.layer
        )
        torch.testing.assert_close(run(method, x), run(method, repeated), rtol=1e-4, atol=1e-5)

    def test_a_batch_equals_its_rows(self, slug):
        x = inputs(batch=2)
        method = sparse_setting(slug)
        together = run(method, x)
        for row in range(2):
            at = slice(row, row + 1)
            alone = run(method, AttentionInputs(x.q[at], x.k[at], x.v[at], x.scale, x.layer))
            torch.testing.assert_close(together[at], alone, rtol=1e-4, atol=1e-5)

    def test_the_same_input_gives_the_same_output(self, slug):
        method = sparse_setting(slug)
        assert torch.equal(run(method, inputs()), run(method, inputs()))

    @pytest.mark.parametrize("n_queries", [1, 63, 129, 400])
    def test_later_chunks_and_odd_lengths(self, slug, n_queries):
        x = inputs(n_queries, 593)
        full = method_class(slug).full_budget(LENGTH)
        torch.testing.assert_close(run(full, x), dense(x), rtol=1e-4, atol=1e-5)
        assert run(sparse_setting(slug), x).isfinite().all()

    @pytest.mark.parametrize("n", [1, 2, 65])
    def test_tiny_prompts(self, slug, n):
        assert run(sparse_setting(slug), inputs(n, n)).isfinite().all()

    def test_chunked_prefill_equals_whole_prefill_where_promised(self, slug):
        method = sparse_setting(slug)
        x = inputs()
        whole = run(method, x)
        # Cut at a multiple of every block size, as engines do.
        for start, end in ((0, 256), (256, 512), (512, LENGTH)):
            piece = AttentionInputs(x.q[:, :, start:end], x.k[:, :, :end], x.v[:, :, :end], x.scale, x.layer)
            out = run(method, piece)
            assert out.isfinite().all()
            if method.chunkable:
                torch.testing.assert_close(out, whole[:, :, start:end], rtol=1e-4, atol=1e-5)

    def test_bf16_stays_close_to_fp32(self, slug):
        method = sparse_setting(slug)
        x = inputs(dtype=torch.bfloat16)
        exact = inputs()
        pattern = pattern_of(method, x)
        got = attend(x.q, x.k, x.v, pattern, scale=x.scale).float()
        expected = attend(exact.q, exact.k, exact.v, pattern, scale=exact.scale)
        assert (got - expected).norm() / expected.norm() < 0.03

    def test_gradients_reach_q_k_and_v(self, slug):
        x = inputs(n_queries=192, n_keys=192)
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        y = AttentionInputs(*leaves, x.scale, x.layer)
        pattern = pattern_of(sparse_setting(slug), x)
        out = attend(y.q, y.k, y.v, pattern, scale=y.scale, backend="reference")
        out.square().sum().backward()
        assert all(t.grad.isfinite().all() and t.grad.abs().sum() > 0 for t in leaves)

    def test_it_acts_on_a_model(self, slug):
        model = tiny_model("llama", max_position_embeddings=1024)
        ids = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            with sl.apply(model, method_class(slug).full_budget(LENGTH), calibration_ids=ids[:, :256]):
                torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
            method = sparse_setting(slug)
            with sl.apply(model, method, calibrations=learnt(method)) as handle:
                model(input_ids=ids)
                assert (handle.stats().density < 1) == (slug != "dense")


@pytest.mark.parametrize("slug", method_slugs())
def test_a_layer_compiles_whole(slug):
    """No value steers Python: one graph per layer, which other lengths use, too."""
    torch._dynamo.reset()
    model = tiny_model("llama", max_position_embeddings=1024)
    layer, backend = model.model.layers[1], "inductor" if CUDA else "aot_eager"
    model.to("cuda" if CUDA else "cpu")
    method = sparse_setting(slug)
    with torch.no_grad(), sl.apply(model, method, calibrations=learnt(method)):
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for n in (LENGTH, 576, 500):
            x = torch.randn(1, n, model.config.hidden_size, device=model.device)
            rotary = model.model.rotary_emb(x, torch.arange(n, device=model.device)[None])
            expected = layer(x, position_embeddings=rotary, attention_mask=None)
            got = compiled(x, position_embeddings=rotary, attention_mask=None)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


KNOWN = {}


def learnt(method):
    """A calibration of the tiny model, made once for all tests: learning takes long."""
    if method.calibration_key not in KNOWN:
        short = replace(method, steps=5) if "steps" in method.params() else method
        model = tiny_model("llama", max_position_embeddings=1024)
        ids = torch.randint(3, 128, (2, 256), generator=torch.Generator().manual_seed(0))
        with sl.apply(model, short, calibration_ids=ids) as handle:
            KNOWN[method.calibration_key] = handle.calibrations
    return KNOWN[method.calibration_key]


def decoded(model, ids, method, steps=6):
    """Logits of ``steps`` decoding steps after a prompt."""
    out = []
    with torch.no_grad(), sl.apply(model, method, calibrations=learnt(method)) as handle:
        past = model(input_ids=ids[:, :-steps], use_cache=True).past_key_values
        for token in ids[:, -steps:].split(1, 1):
            step = model(input_ids=token, past_key_values=past, use_cache=True)
            out.append(step.logits[:, -1])
        stats = handle.stats()
    return torch.stack(out, 1), stats


@pytest.mark.parametrize("slug", sorted({*SELECT, *STORE, *LINEAR}))
class TestDecoding:
    @pytest.fixture
    def model(self):
        return tiny_model("llama", max_position_embeddings=1024)

    @pytest.fixture
    def ids(self):
        return torch.randint(3, 128, (2, 300), generator=torch.Generator().manual_seed(0))

    def test_full_budget_equals_dense(self, slug, model, ids):
        with torch.no_grad():
            expected = model(input_ids=ids).logits[:, -6:]
        got, _ = decoded(model, ids, method_class(slug).full_budget(LENGTH))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    def test_a_small_budget_changes_the_output(self, slug, model, ids):
        cls = method_class(slug)
        method = cls(budget=0.05, phase="both") if cls.card.control and "budget" in cls().params() else None
        method = method or (cls.at_density(0.05, 300) if cls.card.control else cls.grid(300)[0])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[:, -6:]
        got, stats = decoded(model, ids, method)
        assert (got - expected).abs().max() > 1e-4
        if slug in SELECT:
            assert stats.decode_density < 1

    def test_rows_of_a_left_padded_batch_decode_as_alone(self, slug, model, ids):
        cls = method_class(slug)
        method = cls.grid(300)[0] if not cls.card.control else cls.full_budget(LENGTH)
        short = ids[1:, 50:]
        mask = torch.ones_like(ids)
        mask[1, :50] = 0
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with sl.apply(model, method, calibrations=learnt(method)):
            padded = torch.where(mask.bool(), ids, 0)
            together = model.generate(input_ids=padded, attention_mask=mask, **options)[1, -5:]
            alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **options)[0, -5:]
        assert torch.equal(together, alone)


def test_every_method_has_a_role_that_is_tested():
    kinds = (PrefillMethod, SelectMethod, StoreMethod)
    covered = {*PREFILL, *SELECT, *STORE, *LINEAR}
    assert covered == set(method_slugs())
    assert all(issubclass(method_class(s), kinds) or s in LINEAR for s in covered)
