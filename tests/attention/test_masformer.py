"""MASFormer: layouts, spans, receptive fields by Jacobian, what a placement lets through, bounded caches."""

from __future__ import annotations

import pytest
import torch

import sparseland as sl
from sparseland.attention._masformer_store import LocalStore
from sparseland.attention.masformer import MASFormer, full_layers
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, parse_spec
from sparseland.models.caches import cache_nbytes
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.patterns import WindowPattern

IDS = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")  # three layers


def qkv(n=100, n_queries=None, layer=1) -> AttentionInputs:
    g = torch.Generator().manual_seed(n)
    q = torch.randn(1, 4, n_queries or n, 16, generator=g)
    k, v = (torch.randn(1, 2, n, 16, generator=g) for _ in range(2))
    return AttentionInputs(q, k, v, 0.25, layer, n_layers=6)


# ------------------------------------------------------------------ layout


@pytest.mark.parametrize(
    ("full", "placement", "layers"),
    [
        (3, "bottom", {0, 1, 2}),
        (3, "top", {9, 10, 11}),
        (3, "middle", {4, 5, 6}),
        (3, "even", {2, 6, 10}),
        (1, "even", {6}),
        (0, "even", set()),
        (99, "even", set(range(12))),
        (2, "11+0", {0, 11}),
    ],
)
def test_placements(full, placement, layers):
    assert full_layers(12, full, placement) == layers
    method = parse_spec(f"masformer:full={full},placement={placement}")
    assert {i for i in range(12) if method.is_full(i, 12)} == layers
    assert parse_spec(method.spec) == method
    assert [method.new_store(i, n_layers=12) is None for i in range(12)] == [i in layers for i in range(12)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("placement=sideways", "must be one of bottom, top, middle, even, or different layer numbers"),
        ("placement=1+1,full=2", "different layer numbers"),
        ("placement=0+3,full=3", "names 2 layers, but full=3"),
        ("local=window,look_back=1", "look_back=1 needs local=block"),
        ("span=0", "span=0 is not allowed"),
        ("local=ring", "one of block, window"),
    ],
)
def test_wrong_layouts_are_one_clear_line(spec, message):
    with pytest.raises(SparselandError, match=message):
        parse_spec(f"masformer:{spec}")


def test_a_layer_that_does_not_exist_is_refused_before_anything_changes(model):
    with pytest.raises(SparselandError, match="names layer 7; there are 0 to 2"):
        sl.apply(model, "masformer:full=1,placement=7")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(SparselandError, match="must know how many layers"):
        MASFormer(placement="top").is_full(3, None)
    assert MASFormer(full=2).is_full(1, None)
    assert not MASFormer(full=2).is_full(2, None)


@pytest.mark.parametrize("local", ["block", "window"])
@pytest.mark.parametrize("look_back", [0, 1])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("n_queries", [100, 41])
def test_local_layers_are_the_definition(local, look_back, sinks, n_queries):
    if local == "window" and look_back:
        return
    method = MASFormer(full=1, local=local, span=16, look_back=look_back, sinks=sinks)
    x = qkv(100, n_queries)
    t = torch.arange(100 - n_queries, 100)[:, None]
    u = torch.arange(100)
    near = (t - u < 16) if local == "window" else (t // 16 - u // 16 <= look_back)
    seen = (u <= t) & (near | (u < sinks))
    pattern = method.pattern(x)
    assert torch.equal(pattern.mask()[0, 0], seen)
    assert method.pattern(qkv(100, n_queries, layer=0)).density() == 1
    s = (x.q @ x.k.repeat_interleave(2, 1).mT * x.scale).masked_fill(~seen, -torch.inf)
    want = s.softmax(-1) @ x.v.repeat_interleave(2, 1)
    torch.testing.assert_close(attend(x.q, x.k, x.v, pattern, scale=x.scale), want, rtol=1e-4, atol=1e-5)
    for position in range(100):
        first = min(j for j in range(100) if j <= position and (
            position - j < 16 if local == "window" else position // 16 - j // 16 <= look_back))  # fmt: skip
        assert method.first_seen(position) == first


@pytest.mark.parametrize(
    "spec", ["full=3", "full=0,span=60", "full=0,span=200", "full=0,local=window,span=60"]
)
def test_layouts_that_leave_nothing_out_are_dense(model, spec):
    with torch.no_grad():
        want = model(IDS).logits
        with sl.apply(model, f"masformer:{spec}") as handle:
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
            assert handle.stats().density == 1
        with sl.apply(model, "masformer:full=1,span=16"):
            assert (model(IDS).logits - want).abs().max() > 1e-2


def test_cost_is_the_papers_formula():
    """24 layers, 8192 tokens, blocks of 1024: 23, 27, 34 and 42 % for 3, 4, 6 and 8 full layers."""
    for full, share in ((3, 0.23), (4, 0.27), (6, 0.34), (8, 0.42)):
        cost = MASFormer(full=full, span=1024).cost(24, 8192)
        assert cost == pytest.approx((full + (24 - full) * 1024 / 8192) / 24, abs=1e-3)
        assert round(cost, 2) == share
    assert MASFormer(full=24).cost(24, 8192) == 1
    assert MASFormer(full=2, local="window").cost(24, 8192) > MASFormer(full=2).cost(24, 8192)


# ------------------------------------------------- what reaches a token


def reached(model, method, t) -> list[int]:
    """Positions whose embedding changes the output at ``t``."""
    embeds = model.get_input_embeddings()(IDS[:1]).detach().requires_grad_()
    with sl.apply(model, method):
        out = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, t]
        (grad,) = torch.autograd.grad(out.square().sum(), embeds)
    return grad[0].abs().sum(-1).nonzero().flatten().tolist()


def test_receptive_fields(model):
    """Blocks reach their own border, windows L (b - 1) back, and one full layer anywhere makes it all."""
    assert reached(model, MASFormer(full=0, span=8), 45) == list(range(40, 46))
    assert reached(model, MASFormer(full=0, span=8, look_back=1), 45) == list(range(16, 46))
    assert reached(model, MASFormer(full=0, span=8, sinks=1), 45) == [0, *range(40, 46)]
    assert reached(model, MASFormer(full=0, span=5, local="window"), 45) == list(range(45 - 3 * 4, 46))
    for layer in range(3):
        method = MASFormer(full=1, placement=str(layer), span=8)
        assert reached(model, method, 45) == list(range(46))


def test_a_full_layer_sees_what_the_layers_below_made(model):
    """Full layer at the bottom: of far tokens only their embeddings count; at the top: what local layers
    made of them counts too."""

    def out(placement: str, wipe: bool) -> torch.Tensor:
        def erase(module, args, result):
            changed = result[0].clone()
            changed[:, :8] = 0
            return (changed, *result[1:])

        hooks = []
        with torch.no_grad(), sl.apply(model, MASFormer(full=1, placement=placement, span=8)):
            if wipe:  # the local layers' attention outputs in the first block
                locals_ = [0, 1] if placement == "top" else [1, 2]
                layers = model.get_decoder().layers
                hooks = [layers[i].self_attn.register_forward_hook(erase) for i in locals_]
            result = model.get_decoder()(input_ids=IDS[:1], use_cache=False).last_hidden_state[0, 45]
        for hook in hooks:
            hook.remove()
        return result

    assert torch.equal(out("bottom", True), out("bottom", False))
    assert (out("top", True) - out("top", False)).abs().max() > 1e-3


# ------------------------------------------------------------------ caches

LOCAL = [
    "span=8",
    "span=8,look_back=1,sinks=2",
    "local=window,span=8",
    "local=window,span=5,sinks=3",
    "span=16,sinks=9",
]


@pytest.mark.parametrize("spec", LOCAL)
@pytest.mark.parametrize("pieces", [[50], [3, 2, 1, 30]])
def test_decoding_from_bounded_caches_equals_recomputing(model, spec, pieces):
    method = parse_spec(f"masformer:full=1,{spec}")
    got, at, past = [], 0, None
    with torch.no_grad(), sl.apply(model, method):
        want = model(input_ids=IDS, use_cache=False).logits
        for size in (*pieces, *[1] * (60 - sum(pieces))):
            step = model(input_ids=IDS[:, at : at + size], past_key_values=past, use_cache=True)
            past, at = step.past_key_values, at + size
            got.append(step.logits)
            for layer in past.layers[1:]:
                held = method.span * (1 + method.look_back) + method.sinks
                assert layer.store.kept() <= held
        assert past.layers[0].store is None  # the full layer keeps the ordinary cache
        assert len(past.layers[1].store) == 60
        one = 2 * 2 * 2 * 16 * 4  # rows, keys and values, heads, D, float32
        assert cache_nbytes(past) <= one * (60 + 2 * (held + method.sinks))
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", LOCAL)
def test_blocks_count_from_the_first_real_token(model, spec):
    """Rows of a left-padded batch, with block borders of their own, decode as they would alone."""
    mask = torch.ones_like(IDS)
    mask[1, :29] = 0
    padded = torch.where(mask.bool(), IDS, 5)
    short = IDS[1:, 29:]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with sl.apply(model, f"masformer:full=1,{spec}"):
        together = model.generate(input_ids=padded, attention_mask=mask, **options)
        alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **options)
    assert torch.equal(together[1, -12:], alone[0, -12:])


@pytest.mark.parametrize("spec", LOCAL[1:3])
def test_beams_follow(model, spec):
    options = {
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    ids, mask = IDS[:, :40].clone(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :11] = 0
    with sl.apply(model, f"masformer:full=1,{spec}"):
        results = [
            model.generate(input_ids=ids, attention_mask=mask, use_cache=cached, **options)
            for cached in (True, False)
        ]
    assert torch.equal(*results)


def fill(store: LocalStore, *sizes: int) -> None:
    g = torch.Generator().manual_seed(0)
    for n in sizes:
        store.append(*(torch.randn(1, 2, n, 8, generator=g) for _ in range(2)))
        store.observe(qkv())


def test_cropping_within_what_is_held():
    method = MASFormer(span=8)
    store, same = LocalStore(method.first_seen, 0), LocalStore(method.first_seen, 0)
    fill(store, 20, 1, 1)
    fill(same, 20, 1)
    store.crop(21)
    assert len(store) == 21
    for a, b in zip(store.dense(), same.dense(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(
        SparselandError, match="from 16 on in this layer: a cache of 21 can't go back to 15, where"
    ):
        store.crop(15)
    assert len(store) == 21
    store.crop(16)  # the next token begins a block: it sees nothing of the past
    assert len(store) == 16
    with pytest.raises(SparselandError, match="can't be combined"):
        store.gather(torch.zeros(1, 2, 1, dtype=torch.long))


def test_gradients_reach_through_blocks(model):
    """Training through blocks equals training through the dense mask of the same layout."""
    x = qkv(70)
    pattern = MASFormer(full=0, span=16).pattern(x)
    grads = []
    for backend in (None, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        attend(*leaves, pattern, scale=x.scale, backend=backend).square().sum().backward()
        grads.append([t.grad for t in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(
        attend(x.q, x.k, x.v, pattern, scale=x.scale),
        attend(x.q, x.k, x.v, WindowPattern.dense(70, 70), scale=x.scale),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_keys_stay_in_their_block(value):
    x = qkv(64)
    k = x.k.clone()
    k[:, :, 20, 3] = value
    pattern = MASFormer(full=0, span=16).pattern(x)
    out, clean = (attend(x.q, keys, x.v, pattern, scale=x.scale) for keys in (k, x.k))
    rows = torch.arange(64)
    other = rows // 16 != 1
    torch.testing.assert_close(out[:, :, other], clean[:, :, other])
