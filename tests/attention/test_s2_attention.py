"""S2-Attention: the rule with loops, the union that covers or does not, a cache that drops what is unread."""

from __future__ import annotations

import math

import pytest
import torch

import sparseland as sl
from sparseland.attention.s2_attention import S2Attention
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, method_class, parse_spec
from sparseland.models.caches import cache_nbytes
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.patterns import BlockPattern, TokenBlockPattern, WindowPattern

SMALL = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "cover": "any"}
SETTINGS = [
    {},
    {"shards": "query"},
    {"offset": 3, "local_blocks": 1},
    {"dense_heads": 1},
    {"dense_heads": 3, "shards": "query"},
    {"homo_head": True},
    {"vert_stride": 9},
    {"cover": "layers", "vert_stride": 5},
]


def literal(
    m: S2Attention, layer: int, heads: int, kv_heads: int, n_queries: int, n_keys: int
) -> torch.Tensor:
    """The mask by the rule, token by token."""
    lists = kv_heads if m.shards == "kv" else heads
    step = max(1, m.vert_stride // heads)
    mask = torch.zeros(heads, n_queries, n_keys, dtype=torch.bool)
    for head in range(heads):
        h = head * lists // heads
        shard = 0 if m.homo_head else h
        shift = m.offset
        if m.cover == "layers":
            shift += layer % step + layer // step * (lists - m.dense_heads) * step
        for i in range(n_queries):
            position = n_keys - n_queries + i
            for j in range(position + 1):
                block, own = j // m.block_size, position // m.block_size
                mask[head, i, j] = (
                    own - block < m.local_blocks
                    or (block + shard * step + shift) % m.vert_stride == 0
                    or h >= lists - m.dense_heads
                )
    return mask


@pytest.mark.parametrize(("n_queries", "n_keys"), [(118, 118), (48, 128), (45, 126), (1, 123)])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_pattern_is_the_rule(inputs, n_queries, n_keys, setting):
    m = S2Attention(**{**SMALL, **setting})
    x = inputs(n_keys, n_queries=n_queries, heads=6, kv_heads=2, layer=1)
    pattern = m.pattern(x)
    assert isinstance(pattern, TokenBlockPattern if x.offset % 16 else BlockPattern)
    mask = pattern.mask()[0]
    assert torch.equal(mask, literal(m, 1, 6, 2, n_queries, n_keys))
    assert torch.equal(pattern.pairs()[0], mask.sum((-1, -2)))


@pytest.mark.parametrize("setting", [{}, {"shards": "query"}, {"dense_heads": 1}], ids=str)
@pytest.mark.parametrize("n_keys", [150, 160])
def test_outputs_and_gradients_are_the_masked_softmaxs(inputs, n_keys, setting):
    m = S2Attention(**{**SMALL, **setting})
    x = inputs(n_keys, n_queries=150, heads=4, kv_heads=2, batch=2)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    pattern = m.pattern(x)
    weight = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(5))
    out = attend(*leaves, pattern, scale=x.scale)
    k, v = (t.repeat_interleave(2, 1) for t in leaves[1:])
    logits = (leaves[0] @ k.mT * x.scale).masked_fill(~pattern.mask(), -math.inf)
    expected = logits.softmax(-1) @ v
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    got, wanted = (torch.autograd.grad((o * weight).sum(), leaves) for o in (out, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "full", [{"vert_stride": 1}, {"local_blocks": 13}, {"dense_heads": 2}, {"dense_first": 1}]
)
def test_full_budgets_are_dense(inputs, full):
    x = inputs(200)
    assert isinstance(S2Attention(**{**SMALL, **full}).pattern(x), WindowPattern)


def test_density_is_window_plus_one_in_v(inputs):
    x = inputs(4096, heads=2, kv_heads=1, dim=4)
    m = S2Attention(block_size=16, local_blocks=4, vert_stride=8, cover="any")
    blocks = [min(i + 1, 4) + max(0, i - 3) / 8 for i in range(256)]
    assert float(m.pattern(x).density()[0, 0]) == pytest.approx(sum(blocks) / (256 * 257 / 2), rel=0.02)


# ---------------------------------------------------------------- union


def union(m: S2Attention, heads: int, kv_heads: int, layers: int, n: int = 320) -> torch.Tensor:
    """Pairs that some sparse head of some layer sees, as blocks."""
    seen = torch.zeros(n // 16, n // 16, dtype=torch.bool)
    for layer in range(layers):
        x = AttentionInputs(
            torch.zeros(1, heads, n, 2),
            torch.zeros(1, kv_heads, n, 2),
            torch.zeros(1, kv_heads, n, 2),
            1.0,
            layer,
        )
        dense = m.dense_heads * (heads // kv_heads if m.shards == "kv" else 1)
        seen |= m.pattern(x).block_mask()[0, : heads - dense].any(0)
    return seen


def covers(m: S2Attention, heads: int, kv_heads: int, layers: int = 1) -> bool:
    seen = union(m, heads, kv_heads, layers)
    return torch.equal(seen, torch.ones_like(seen).tril())


@pytest.mark.parametrize("dense_heads", [0, 1])
@pytest.mark.parametrize("v", [2, 3, 4, 5])
def test_a_layer_covers_the_context_iff_it_has_v_shards(v, dense_heads):
    m = S2Attention(block_size=16, local_blocks=1, vert_stride=v, dense_heads=dense_heads, cover="any")
    for kv_heads in (2, 4):
        assert covers(m, 8, kv_heads) == (kv_heads - dense_heads >= v)
        checked = S2Attention(**{**m.params(), "cover": "layer"})
        if kv_heads - dense_heads >= v:
            checked.check_cover(8, kv_heads, 1)
        else:
            with pytest.raises(SparselandError, match=f"vert_stride={v} strides"):
                checked.check_cover(8, kv_heads, 1)


def test_grouped_queries_cover_half_in_the_published_setting():
    # 8 key heads and a stride of 16: in every layer the same 8 of 16 residues.
    m = S2Attention(vert_stride=16, cover="any")
    assert {m.residues(layer, 32, 8) for layer in range(4)} == {m.residues(0, 32, 8)}
    assert len(set(m.residues(0, 32, 8))) == 8
    shifted = S2Attention(vert_stride=16)
    assert len({r for layer in range(2) for r in shifted.residues(layer, 32, 8)}) == 16
    shifted.check_cover(32, 8, 2)
    with pytest.raises(SparselandError, match="8 shards of 1 sparse layers see 8 of vert_stride=16"):
        shifted.check_cover(32, 8, 1)


def test_fewer_heads_than_the_stride_step_over_and_layers_fill_the_gaps():
    # 2 query heads, v = 8: step 4, residues 0 and 4; four layers are needed.
    m = S2Attention(block_size=16, local_blocks=1, vert_stride=8)
    assert m.residues(0, 2, 2) == (0, 4)
    assert sorted(r for layer in range(4) for r in m.residues(layer, 2, 2)) == list(range(8))
    assert [covers(m, 2, 2, layers) for layers in (3, 4)] == [False, True]


def test_dense_layers_do_not_take_a_turn():
    m = S2Attention(vert_stride=4, dense_every=2, dense_first=1)
    assert [m.is_dense(i) for i in range(6)] == [True, True, False, True, False, True]
    assert m.residues(2, 4, 2) == (0, 3)
    assert m.residues(4, 4, 2) == (2, 1)
    m.check_cover(4, 2, 6)
    with pytest.raises(SparselandError, match="2 shards of 1 sparse layers"):
        m.check_cover(4, 2, 4)


def test_the_first_block_belongs_to_one_shard(inputs):
    # No common sink: the other heads lose the first block once it has left their window.
    mask = S2Attention(**SMALL).pattern(inputs(200)).mask()[0, :, -1, 0]
    assert mask.tolist() == [True, True, False, False]


def test_dense_heads_are_the_last(inputs):
    mask = S2Attention(**SMALL, dense_heads=1).pattern(inputs(200)).mask()[0]
    assert [bool(mask[h].tril().sum() == 200 * 201 // 2) for h in range(4)] == [False, False, True, True]


def test_what_is_used_later_was_used_before(inputs):
    # The condition under which a block may be dropped for good.
    for setting in SETTINGS:
        m = S2Attention(**{**SMALL, **setting})
        blocks = m.pattern(inputs(320, heads=6, kv_heads=2)).block_mask()[0]
        own = torch.arange(20)
        far = own[:, None] - own[None] >= m.local_blocks
        later = blocks[:, 1:] & far[1:] & far[:-1]
        assert not (later & ~blocks[:, :-1]).any()


def test_long_prompts_build_lists_only(inputs):
    x = inputs(100_000, heads=2, kv_heads=1, dim=1)
    pattern = S2Attention(cover="any").pattern(x)
    assert pattern.indices.shape[-1] < 16 + 1563 // 8 + 3
    assert pattern.counts.max() <= pattern.indices.shape[-1]


# ----------------------------------------------------------------- cache


def expected_step(m, x, n, first=0):
    """Attention of the query at position n - 1 under the full mask, for one row without padding."""
    y = AttentionInputs(x.q[:, :, :n], x.k[:, :, :n], x.v[:, :, :n], x.scale, x.layer)
    mask = m.pattern(y).mask().expand(x.q.shape[0], x.q.shape[1], -1, -1)[:, :, -1:]
    k, v = (t[:, :, :n].repeat_interleave(x.group, 1) for t in (x.k, x.v))
    logits = (x.q[:, :, n - 1 : n] @ k.mT * x.scale).masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_cache_that_drops_gives_what_the_full_cache_gives(inputs, setting):
    m = S2Attention(**{**SMALL, **setting})
    x = inputs(230, heads=6, kv_heads=2, batch=2, layer=1)
    store = m.new_store(1, n_layers=3)
    for start, end in ((0, 70), (70, 110), *((n - 1, n) for n in range(111, 231))):
        store.append(x.k[:, :, start:end], x.v[:, :, start:end])
        assert len(store) == end
        if end - start > 1:
            part = AttentionInputs(x.q[:, :, start:end], x.k[:, :, :end], x.v[:, :, :end], x.scale, 1)
            store.observe(part)
            continue
        got = store.attend(x.q[:, :, start:end], x.scale)
        torch.testing.assert_close(got, expected_step(m, x, end), rtol=1e-4, atol=1e-5)
    whole = 2 * x.k.numel() * 4
    assert store.kept() <= 230
    if not m.dense_heads and m.vert_stride > 3 and m.shards == "kv":
        assert store.nbytes() < 0.75 * whole
        assert store.kept() < 0.6 * 230
    # What is given back is what a later prompt reads; the rest is zero.
    k, v = store.dense()
    mask = m.pattern(AttentionInputs(x.q, x.k, x.v, x.scale, 1)).mask().expand(2, 6, -1, -1)
    read = mask[:, ::3, -1] | mask[:, 1::3, -1] | mask[:, 2::3, -1]
    assert torch.equal(k[read], x.k[read])
    assert torch.equal(v[read], x.v[read])
    zero = (k == 0).all(-1)
    assert torch.equal(k[~zero], x.k[~zero])
    assert bool(zero.any()) == (not m.dense_heads or m.dense_heads == 1 or m.shards == "query")


@pytest.mark.parametrize("setting", [{}, {"shards": "query"}, {"dense_heads": 1}], ids=str)
def test_rows_of_a_padded_batch_keep_their_own_blocks(inputs, setting):
    m = S2Attention(**{**SMALL, **setting})
    pads, n = [0, 13, 101], 200
    rows = [inputs(n - pad, heads=6, kv_heads=2, seed=i) for i, pad in enumerate(pads)]
    q, k, v = (
        torch.cat(
            [
                torch.nn.functional.pad(getattr(r, name), (0, 0, pad, 0), value=9.0)
                for r, pad in zip(rows, pads, strict=True)
            ]
        )
        for name in "qkv"
    )
    first = torch.tensor(pads)
    store = m.new_store(0)
    for start, end in ((0, 120), *((i - 1, i) for i in range(121, n + 1))):
        store.append(k[:, :, start:end], v[:, :, start:end])
        part = AttentionInputs(q[:, :, start:end], k[:, :, :end], v[:, :, :end], rows[0].scale, 0)
        if end - start > 1:
            store.observe(part, first)
            continue
        got = store.attend(part.q, part.scale, first)
        for row, pad in enumerate(pads):
            expected = expected_step(m, rows[row], end - pad)
            torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_window_and_shards(inputs):
    m = S2Attention(block_size=16, local_blocks=2, vert_stride=8, cover="any")
    x = inputs(1600, heads=4, kv_heads=2)
    store = m.new_store(0)
    store.append(x.k, x.v)
    store.observe(x)
    per_token = 2 * 2 * 16 * 4  # keys and values of two heads, fp32
    ring, strided = 3 * 16, 13 * 16  # window and a block more; 13 of 100 blocks
    assert store.nbytes() == pytest.approx((ring + strided) * per_token, rel=0.1)
    assert store.kept() == pytest.approx(2 * 16 + 12.5 * 16, rel=0.1)


def test_store_follows_beams_and_short_crops(inputs):
    m = S2Attention(**SMALL)
    x = inputs(230, heads=4, kv_heads=2, batch=2)

    def feed(store, start, end, rows):
        for n in range(start, end):
            store.append(x.k[rows][:, :, n : n + 1], x.v[rows][:, :, n : n + 1])
            got = store.attend(x.q[rows][:, :, n : n + 1], x.scale)
            torch.testing.assert_close(got, expected_step(m, x, n + 1)[rows], rtol=1e-4, atol=1e-5)

    store = m.new_store(0)
    store.append(x.k[:, :, :100], x.v[:, :, :100])
    store.observe(AttentionInputs(x.q[:, :, :100], x.k[:, :, :100], x.v[:, :, :100], x.scale, 0))
    feed(store, 100, 150, [0, 1])
    store.crop(140)
    assert len(store) == 140
    feed(store, 140, 150, [0, 1])
    store.append(x.k[:, :, 150:151], x.v[:, :, 150:151])
    store.crop(150)  # nothing but what was waiting
    store.reorder(torch.tensor([1, 1]))
    feed(store, 150, 160, [1, 1])
    with pytest.raises(SparselandError, match="can't be cropped from 160 to 100 tokens"):
        store.crop(100)
    store.crop(0)
    assert len(store) == 0
    feed(store, 0, 80, [1, 1])


def test_generation_drops_and_stays_exact():
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (2, 260), generator=torch.Generator().manual_seed(0))
    m = S2Attention(block_size=16, local_blocks=2, vert_stride=6)
    with torch.no_grad(), sl.apply(model, m) as handle:
        whole = model(input_ids=ids).logits[:, -20:]
        past = model(input_ids=ids[:, :200], use_cache=True).past_key_values
        second = model(input_ids=ids[:, 200:241], past_key_values=past).logits  # a later prompt
        steps = [
            model(input_ids=ids[:, n : n + 1], past_key_values=past).logits[:, -1] for n in range(241, 260)
        ]
        torch.testing.assert_close(second[:, -1:], whole[:, :1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.stack(steps, 1), whole[:, 1:], rtol=1e-4, atol=1e-4)
        assert cache_nbytes(past) < 0.7 * 3 * 2 * 2 * 260 * 2 * 16 * 4
        stats = handle.stats()
    assert stats.density < 0.6
    assert stats.decode_density < 0.5


def test_dense_layers_keep_the_ordinary_cache():
    m = S2Attention(block_size=16, local_blocks=2, vert_stride=2, dense_every=3)
    assert m.new_store(2) is None
    assert m.new_store(1) is not None
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sl.apply(model, m) as handle:
        whole = model(input_ids=ids).logits[:, -1]
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=past).logits[:, -1]
        density = [layer.density[0] for layer in handle.stats().layers]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)
    assert [d == 1 for d in density] == [False, False, True]


def test_selecting_from_a_cache_that_drops_is_refused(inputs):
    store = S2Attention(**SMALL).new_store(0)
    with pytest.raises(SparselandError, match="no other method can choose"):
        store.gather(torch.zeros(1, 2, 3, dtype=torch.long))


def test_a_model_that_can_not_be_covered_is_refused_before_it_is_changed():
    model = tiny_model("llama")
    with pytest.raises(SparselandError, match="2 shards of 3 sparse layers see 6 of vert_stride=8"):
        sl.apply(model, S2Attention(block_size=16))
    with sl.apply(model, S2Attention(block_size=16, cover="any")):
        pass
    with pytest.raises(SparselandError, match="dense_heads=3 is above the 2 heads"):
        sl.apply(model, S2Attention(block_size=16, dense_heads=3, cover="layer"))


# ------------------------------------------------------------------ faults


def test_not_a_number_stays_with_who_reads_it(inputs):
    x = inputs(160)
    x.k[:, :, 40] = math.nan
    pattern = S2Attention(**SMALL).pattern(x)
    out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
    apart = torch.ones(160, dtype=torch.bool)
    apart[32:40] = False  # earlier queries of the same block, which share its products
    assert torch.equal(out[0].isnan().all(-1)[:, apart], pattern.mask()[0, :, apart, 40])


def test_strided_inputs(inputs):
    x = inputs(160)
    pattern = S2Attention(**SMALL).pattern(x)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v)]
    torch.testing.assert_close(
        attend(*strided, pattern, scale=x.scale), attend(x.q, x.k, x.v, pattern, scale=x.scale)
    )


# -------------------------------------------------------------- parameters


def test_card_spec_and_defaults():
    assert method_class("s2-attention") is S2Attention
    default = S2Attention()
    assert (default.block_size, default.local_blocks, default.vert_stride) == (64, 16, 8)
    assert (default.dense_heads, default.offset, default.homo_head) == (0, 0, False)
    method = parse_spec("s2-attention:vert_stride=16,shards=query,dense_every=2")
    assert method == S2Attention(vert_stride=16, shards="query", dense_every=2)
    assert parse_spec(method.spec) == method
    for length in (300, 2048, 8192, 131_072):
        assert all(parse_spec(s.spec) == s for s in S2Attention.grid(length))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("s2-attention:block_size=48", "block_size=48 is not allowed; it must be 16, 32, 64 or 128"),
        ("s2-attention:local_blocks=0", "local_blocks=0"),
        ("s2-attention:vert_stride=0", "vert_stride=0"),
        ("s2-attention:homo_head=true", "homo_head=true covers no whole context; set cover=any"),
        ("s2-attention:cover=all", "cover=all is not allowed; it must be one of layers, layer, any"),
        ("s2-attention:shards=value", "shards=value is not allowed"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(spec, words):
    with pytest.raises(SparselandError, match=words):
        parse_spec(spec)
