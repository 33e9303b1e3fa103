"""HiP: a literal transcription, what is found and what is missed, decoding with kept selections, limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import sparseland as sl
from sparseland.attention.hip_attention import FoundState, HipAttention
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, parse_spec
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.patterns import BlockColumnPattern, PiecedPattern, WindowPattern

# Whole prompt, odd length, chunks that do and do not start at a block's edge, fewer queries than a block.
SHAPES = [(256, 256), (251, 251), (64, 320), (77, 211), (10, 200)]
SMALL = HipAttention(k=16, block_q=16, window=20, sinks=10, dense_layers=0, dense_queries=0)


def whole_numbers(x: AttentionInputs) -> AttentionInputs:
    """Products that are exact in any order of summation, so that ties are ties everywhere."""
    return replace(x, q=(2 * x.q).round(), k=(2 * x.k).round())


def literal_search(q: Tensor, k: Tensor, m: HipAttention) -> list[int]:
    """The keys that the queries ``q [rows, D]`` find among ``k``, by the paper's procedure."""
    B, K = len(k) // m.block_k, m.k // m.block_k
    if K >= B:
        return list(range(B * m.block_k))
    segments = [(B * i // K, B * (i + 1) // K - B * i // K) for i in range(K)]
    for _ in range(math.ceil(math.log2(B / K))):
        halves = []
        for start, size in segments:
            for at, length in ((start, size // 2), (start + size // 2, size - size // 2)):
                if length:
                    block = k[at * m.block_k : (at + 1) * m.block_k]
                    halves.append(((q @ block.T).max().item(), at, length))
        best = sorted(range(len(halves)), key=lambda i: (-halves[i][0], i))[:K]
        segments = [halves[i][1:] for i in sorted(best)]
    return [start * m.block_k + t for start, _ in segments for t in range(m.block_k)]


def literal_mask(x: AttentionInputs, m: HipAttention) -> Tensor:
    """All pairs, head by head and query block by query block."""
    heads, n_queries, n_keys = x.q.shape[1], x.q.shape[2], x.k.shape[2]
    mask = torch.zeros(1, heads, n_queries, n_keys, dtype=torch.bool)
    sinks = -(-m.sinks // m.block_q) * m.block_q
    for h in range(heads):
        kv = h // x.group
        voters = range(kv * x.group, (kv + 1) * x.group) if m.group == "shared" else [h]
        for i in range(0, n_queries, m.block_q):
            rows, first = slice(i, i + m.block_q), i + x.offset
            near = max(0, first - m.window + 1) // m.block_q * m.block_q
            if m.dense_queries is not None and first < m.dense_queries:
                near = 0
            mask[0, h, rows, : min(sinks, near)] = True
            mask[0, h, rows, near:] = True
            if near > sinks:
                q = torch.cat([x.q[0, g, rows][:: m.query_stride] for g in voters])
                found = literal_search(q, x.k[0, kv, sinks:near], m)
                mask[0, h, rows, [sinks + j for j in found]] = True
    causal = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(x.offset)
    return mask & causal


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group": "shared", "query_stride": 1},
        {"block_k": 1, "k": 9, "sinks": 0, "window": 1},
        {"block_k": 8, "k": 32, "block_q": 32, "query_stride": 3},
        {"dense_queries": 90},
    ],
    ids=str,
)
def test_the_pairs_are_the_literal_ones(inputs, n_queries, n_keys, options):
    x = whole_numbers(inputs(n_keys, n_queries=n_queries))
    method = HipAttention(**{**SMALL.params(), **options})
    pattern = method.pattern(x)
    # Dense queries, where the call has any, are a stretch of their own.
    pieced = n_keys - n_queries < (method.dense_queries or 0)
    assert isinstance(pattern, PiecedPattern if pieced else BlockColumnPattern)
    assert torch.equal(pattern.mask(), literal_mask(x, method))
    assert torch.equal(pattern.pairs(), pattern.mask().sum((-1, -2)))


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_no_key_twice_and_every_query_sees_its_window(inputs, n_queries, n_keys):
    pattern = SMALL.pattern(inputs(n_keys, n_queries=n_queries))
    assert not (pattern.blocks.mask() & pattern.columns.mask()).any()
    columns = pattern.columns
    for row, n in zip(columns.indices.flatten(0, 2).tolist(), columns.counts.flatten().tolist(), strict=True):
        assert row[:n] == sorted(set(row[:n]))
    assert columns.counts.max() == SMALL.k
    least = WindowPattern(n_queries, n_keys, SMALL.sinks, SMALL.window).mask()
    assert (pattern.mask() | ~least).all()


def test_memory_is_linear_in_the_length(inputs):
    """Lists of k columns per query block and head, and blocks that all heads share."""
    entries = []
    for n in (512, 1024, 2048):
        pattern = SMALL.pattern(inputs(n, heads=2, kv_heads=1))
        assert pattern.columns.indices.shape == (1, 2, n // 16, SMALL.k)
        assert pattern.blocks.indices.shape[:2] == (1, 1)
        entries.append(pattern.columns.indices.numel() + pattern.blocks.indices.numel())
    assert entries == [entries[0], 2 * entries[0], 4 * entries[0]]


def test_a_group_shares_its_lists_only_if_asked(inputs):
    x = inputs(256)
    own = SMALL.pattern(x).columns.indices
    shared = replace(SMALL, group="shared").pattern(x).columns.indices
    assert not torch.equal(own[:, 0], own[:, 1])
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert not torch.equal(shared[:, 1], shared[:, 2])


def near_needle(n: int, place: int, run: int) -> AttentionInputs:
    """Flat keys, but for a run of equal ones that all queries look for."""
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 2, n, 16, generator=g) * 0.1, torch.randn(1, 1, n, 16, generator=g) * 0.1
    q[..., 0], k[..., 0] = 3.0, 0.0
    k[0, 0, place : place + run, 0] = 3.0
    return AttentionInputs(q, k, k.clone(), 0.25, 5)


@pytest.mark.parametrize("place", [100, 333, 470])
def test_a_stretch_of_like_keys_is_found_by_all_later_queries(place):
    """Locality is what the search lives from: a passage of 64 tokens shows in a representative."""
    x = near_needle(1024, place, 64)
    method = HipAttention(k=64, dense_layers=0, dense_queries=0, window=32)
    mask = method.pattern(x).mask()
    assert mask[0, :, 640:, place : place + 60].float().mean() > 0.9
    blind = WindowPattern(1024, 1024, 32, 32 + 64).mask()
    assert blind[0, 0, 640:, place : place + 60].sum() == 0


def test_a_single_key_among_flat_ones_is_mostly_missed():
    """The failure that the paper's assumption implies; each query block has its own segments."""
    kept = []
    for place in range(101, 500, 19):
        mask = (
            HipAttention(k=32, dense_layers=0, dense_queries=0, window=32)
            .pattern(near_needle(1024, place, 1))
            .mask()
        )
        kept.append(mask[0, :, 640:, place].float().mean().item())
    assert 0 < sum(kept) / len(kept) < 0.5


def test_queries_at_odd_places_have_no_vote(inputs):
    x = inputs(512, heads=2, kv_heads=1)
    q = x.q.clone()
    q[:, :, 1::2] *= -3
    changed = replace(x, q=q)
    assert torch.equal(SMALL.pattern(changed).mask(), SMALL.pattern(x).mask())
    every = replace(SMALL, query_stride=1)
    assert not torch.equal(every.pattern(changed).mask(), every.pattern(x).mask())


def test_without_a_recipe_nothing_looks_ahead_and_chunks_agree(inputs):
    x = inputs(320)
    whole = SMALL.pattern(x).mask()
    start = 0
    for end in (96, 160, 320):
        piece = AttentionInputs(x.q[:, :, start:end], x.k[:, :, :end], x.v[:, :, :end], x.scale, 5)
        assert torch.equal(SMALL.pattern(piece).mask(), whole[:, :, start:end, :end])
        start = end
    q, k = x.q.clone(), x.k.clone()
    q[:, :, 200:], k[:, :, 200:] = 5.0, -5.0
    assert torch.equal(SMALL.pattern(replace(x, q=q, k=k)).mask()[:, :, :192], whole[:, :, :192])


def test_dense_where_it_must_be(inputs):
    x = inputs(300)

    def density(**options):
        return float(HipAttention(**{**SMALL.params(), **options}).pattern(x).density().mean())

    assert density() < 0.6
    assert density(k=300) == density(window=300) == density(dense_queries=300) == 1.0
    assert density(dense_layers=1) == 1.0  # the input is layer 0's
    assert (
        HipAttention(**{**SMALL.params(), "dense_layers": 3}).pattern(replace(x, layer=3)).density().max() < 1
    )


def test_the_recipe_for_dense_queries(inputs):
    """3 (log2(N / 2k) + 1) k: three quarters of a prompt of 8192 at k = 512. Density counts them."""
    assert HipAttention()._dense_queries(8192) == 6144
    assert HipAttention()._dense_queries(131_072) == 3 * 8 * 512
    assert HipAttention()._dense_queries(700) == 3 * 512
    x = inputs(512)
    recipe = HipAttention(**{**SMALL.params(), "dense_queries": None})
    n = recipe._dense_queries(512)
    assert n == 3 * 16 * 5
    mask = recipe.pattern(x).mask()
    causal = torch.ones(512, 512, dtype=torch.bool).tril()
    assert torch.equal(mask[0, 0, :n], causal[:n])
    assert torch.equal(mask[:, :, n:], SMALL.pattern(x).mask()[:, :, n:])
    assert recipe.pattern(x).density().min() > SMALL.pattern(x).density().max()


@pytest.mark.parametrize(("n_queries", "n_keys"), [(512, 512), (300, 387)])
def test_dense_queries_are_computed_as_the_pairs_say(inputs, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries)
    pattern = HipAttention(**{**SMALL.params(), "dense_queries": 200}).pattern(x)
    assert isinstance(pattern, PiecedPattern)
    out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
    k, v = (t.repeat_interleave(x.group, 1) for t in (x.k, x.v))
    scores = (x.q @ k.mT * x.scale).masked_fill(~pattern.mask(), -math.inf)
    assert torch.allclose(out, scores.softmax(-1) @ v, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_where_they_are(inputs, bad):
    """One key that is no number: queries that do not read it are as without it."""
    x = inputs(256)
    k = x.k.clone()
    k[0, 0, 200, 3] = bad
    x = replace(x, k=k)
    pattern = SMALL.pattern(x)
    assert pattern.columns.counts.max() == SMALL.k
    out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
    assert out[:, :, :200].isfinite().all()
    assert out[:, 2:].isfinite().all()


def test_strided_inputs_are_their_copies(inputs):
    x = inputs(256)
    turned = replace(x, q=x.q.mT.contiguous().mT, k=x.k.mT.contiguous().mT)
    assert torch.equal(SMALL.pattern(turned).mask(), SMALL.pattern(x).mask())


# ----------------------------------------------------------------- decoding


def step(x: AttentionInputs, n: int) -> AttentionInputs:
    """The last of the first ``n`` tokens as a decoding step."""
    return replace(x, q=x.q[:, :, n - 1 : n], k=x.k[:, :, :n], v=x.v[:, :, :n])


def decode(method: HipAttention, x: AttentionInputs, start: int, first: Tensor | None = None) -> list[Tensor]:
    """What each step from ``start`` tokens on reads."""
    state = method.new_state(5)
    method.append(state, x.k[:, :, :start])
    read = []
    for n in range(start + 1, x.k.shape[2] + 1):
        method.append(state, x.k[:, :, n - 1 : n])
        index = method.select(state, step(x, n), first)
        assert index is not None
        read.append(index)
    return read


def once(method: HipAttention, x: AttentionInputs, n: int, first: Tensor | None = None) -> Tensor:
    """What a step at ``n`` tokens reads that nothing was found for before."""
    state = method.new_state(5)
    method.append(state, x.k[:, :, :n])
    index = method.select(state, step(x, n), first)
    assert index is not None
    return index


def tokens(index: Tensor, head: int, row: int = 0) -> list[int]:
    listed = [t for t in index[row, head].tolist() if t >= 0]
    assert len(set(listed)) == len(listed), "a token is read twice"
    return sorted(listed)


@pytest.mark.parametrize("options", [{}, {"group": "shared"}, {"block_k": 4, "sinks": 0}], ids=str)
def test_a_step_reads_the_literal_selection(inputs, options):
    method = HipAttention(**{**SMALL.params(), "refresh": 1, **options})
    x = whole_numbers(inputs(206, seed=3))
    for n, index in enumerate(decode(method, x, 200), start=201):
        assert index.shape[1] == (2 if method.group == "shared" else 4)
        blocks = (n - method.window - method.sinks) // method.block_k
        near = method.sinks + blocks * method.block_k
        for h in range(index.shape[1]):
            kv = h if method.group == "shared" else h // 2
            q = x.q[0, kv * 2 : kv * 2 + 2, n - 1] if method.group == "shared" else x.q[0, h, n - 1][None]
            found = literal_search(q, x.k[0, kv, method.sinks : near], method)
            want = [*range(method.sinks), *(method.sinks + j for j in found), *range(near, n)]
            assert tokens(index, h) == want


def test_refresh_of_one_is_recomputation(inputs):
    x = inputs(220)
    every = decode(replace(SMALL, refresh=1), x, 200)
    for n, index in enumerate(every, start=201):
        assert torch.equal(index, once(SMALL, x, n))


def test_a_selection_serves_its_steps_and_no_new_token_is_lost(inputs):
    x = inputs(225)
    fresh, kept = decode(replace(SMALL, refresh=1), x, 200), decode(replace(SMALL, refresh=8), x, 200)
    for i, (a, b) in enumerate(zip(fresh, kept, strict=True)):
        n, made = 201 + i, 201 + i // 8 * 8
        for h in range(4):
            got = set(tokens(b, h))
            assert set(range(made - SMALL.window, n)) <= got, "between refreshes the window only grows"
            before = made - SMALL.window - SMALL.block_k
            assert {t for t in got if t < before} == {t for t in tokens(kept[made - 201], h) if t < before}
        if i % 8 == 0:
            assert torch.equal(a, b)
    assert any(set(tokens(a, 0)) - set(tokens(b, 0)) for a, b in zip(fresh, kept, strict=True))


def test_a_padded_row_reads_what_it_would_alone(inputs):
    x = inputs(210, batch=2)
    first = torch.tensor([0, 47])
    together = decode(SMALL, x, 200, first)
    alone = replace(x, q=x.q[1:, :, 47:], k=x.k[1:, :, 47:], v=x.v[1:, :, 47:])
    for index, own in zip(together, decode(SMALL, alone, 153), strict=True):
        for h in range(4):
            assert [t - 47 for t in tokens(index, h, row=1)] == tokens(own, h)
    # A row too short for a search is read whole, and nothing before its first token.
    for start in (170, 195):
        index = once(SMALL, x, 201, torch.tensor([0, start]))
        assert tokens(index, 3, row=1) == list(range(start, 201))


def test_state_follows_beams_and_cropping(inputs):
    x = inputs(220, batch=2)
    state = SMALL.new_state(5)
    assert isinstance(state, FoundState)
    SMALL.append(state, x.k[:, :, :210])
    index = SMALL.select(state, step(x, 210))
    state.reorder(torch.tensor([1, 1]))
    again = SMALL.select(state, step(x, 210))
    assert torch.equal(again, index[[1, 1]])
    assert state.nbytes() > 0
    state.crop(205)
    assert len(state) == 205
    assert state.far is None
    assert tokens(SMALL.select(state, step(x, 205)), 0)[-1] == 204


def test_short_caches_and_dense_layers_are_read_whole(inputs):
    x = inputs(300)
    method = HipAttention(k=64, dense_layers=2)
    for layer, n, whole in ((0, 300, True), (1, 300, True), (2, 300, False), (2, 64 + 128 + 32, True)):
        state = method.new_state(layer)
        method.append(state, x.k[:, :, :n])
        assert (method.select(state, step(x, n)) is None) == whole


def test_a_store_that_hides_the_keys_is_refused(inputs):
    x = inputs(300)
    state = SMALL.new_state(5)
    SMALL.append(state, x.k)
    hidden = replace(step(x, 300), k=x.k.new_full((1, 1, 1, 1), math.nan).expand(x.k.shape))
    with pytest.raises(SparselandError, match="use phase=prefill"):
        SMALL.select(state, hidden)


def test_it_generates_with_beams():
    model = tiny_model("llama", max_position_embeddings=512)
    ids = torch.randint(3, 128, (1, 150), generator=torch.Generator().manual_seed(0))
    with sl.apply(model, SMALL) as handle:
        out = model.generate(
            input_ids=ids, max_new_tokens=12, num_beams=2, do_sample=False, eos_token_id=None
        )
        assert out.shape == (1, 162)
        assert handle.stats().decode_density < 0.6


# --------------------------------------------------------------- parameters


def test_phases():
    roles = {p: HipAttention(phase=p).roles for p in ("prefill", "decode", "both")}
    assert roles == {"prefill": {"prefill"}, "decode": {"select"}, "both": {"prefill", "select"}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hip-attention:block_q=24", "block_q=24 is not allowed; it must be 16, 32, 64 or 128"),
        ("hip-attention:block_k=3", "block_k=3 is not allowed; it must be a power of two up to block_q=32"),
        ("hip-attention:block_k=64", "block_k=64 is not allowed"),
        ("hip-attention:k=33", "k=33 is not allowed; it must be a multiple of block_k=2"),
        ("hip-attention:window=0", "window=0 is not allowed; it must be a whole number >= 1"),
        ("hip-attention:group=all", "group=all is not allowed; it must be one of head, shared"),
    ],
)
def test_clear_errors(spec, message):
    with pytest.raises(SparselandError, match=message):
        parse_spec(spec)


def test_defaults_are_the_papers():
    m = HipAttention()
    assert (m.k, m.block_q, m.block_k, m.query_stride, m.refresh, m.dense_layers) == (512, 32, 2, 2, 8, 3)
    assert m.dense_queries is None
    assert m.group == "head"
